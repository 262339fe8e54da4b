"""Any file gives a picture within the limits or a refusal, for a bounded price."""

from __future__ import annotations

import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.images import prepare
from streamflow import pictures
from streamflow.errors import InvalidRequestError
from streamflow.stages.imaging import decode_mask, decode_rgb
from tests.properties.strategies import (
    CLAIMS,
    PARTS,
    SIGNATURES,
    bounded,
    check_refusal,
    claiming,
    other_files,
    picture_bytes,
    profiles,
    scans,
)
from tests.properties.strategies import pictures as good_files

MAX_PIXELS = 100_000
SIZE = (16, 8)


@pytest.fixture(autouse=True)
def as_served() -> Iterator[None]:
    """Pillow warns of much that it reads all the same; here warnings are errors, which would refuse it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def refusal_of(data: bytes, max_pixels: int = MAX_PIXELS) -> InvalidRequestError | None:
    try:
        pictures.load_source(data, size=SIZE, max_pixels=max_pixels)
    except InvalidRequestError as error:
        return error
    return None


def cost_s(call: Callable[[], object]) -> float:
    """Of this thread's time, so that neighbours do not count."""
    began_s = time.thread_time()
    call()
    return time.thread_time() - began_s


@bounded(250)
@given(picture_bytes())
def test_any_bytes_give_a_picture_or_a_refusal(data):
    for mode, channels in (("RGB", (3,)), ("L", ())):
        try:
            picture = pictures.read("init_image", data, mode, max_pixels=MAX_PIXELS)
        except InvalidRequestError as refusal:
            check_refusal(refusal, "init_image")
            continue
        assert picture.mode == mode
        assert 0 < picture.width * picture.height <= MAX_PIXELS
        pixels = np.asarray(picture)
        assert pixels.dtype == np.uint8
        assert pixels.shape == (picture.height, picture.width, *channels)


@bounded(80)
@given(picture_bytes(), st.one_of(st.just(b""), picture_bytes()))
def test_any_image_and_mask_become_files_that_the_stages_read(init, mask):
    try:
        sources = prepare(init, mask, width=SIZE[0], height=SIZE[1], max_pixels=MAX_PIXELS)
    except InvalidRequestError as refusal:
        check_refusal(refusal, "init_image" if refusal.field == "init_image" else "mask_image")
        return
    assert decode_rgb(sources.init, size=SIZE).shape == (8, 16, 3)
    assert (sources.mask is None) == (mask == b"")
    if sources.mask is not None:
        assert decode_mask(sources.mask, size=SIZE).shape == (8, 16)


def test_the_files_above_are_of_both_kinds():
    seen: Counter[bool] = Counter()

    @bounded(120)
    @given(picture_bytes())
    def look(data):
        seen[refusal_of(data) is None] += 1

    look()
    assert min(seen[True], seen[False]) > 20


@pytest.mark.parametrize("name", good_files())
def test_whole_files_are_read_and_animations_refused(name):
    refusal = refusal_of(good_files()[name])
    assert (refusal is None) == ("animated" not in name)


@bounded(60)
@given(st.sampled_from(CLAIMS), st.integers(1, 65535), st.integers(1, 65535))
def test_a_header_that_claims_too_much_is_refused_for_it(kind, width, height):
    if kind == "WEBP":
        width, height = min(width, 16383), min(height, 16383)
    refusal = refusal_of(claiming(kind, width, height), max_pixels=width * height - 1)
    assert refusal is not None
    # What lies about its canvas is damaged before it is too large.
    assert "pixels" in str(refusal) or kind == "WEBP extended"


@bounded(60)
@given(st.sampled_from(SIGNATURES), st.integers(0, len(other_files()) - 1), st.integers(0, 12))
def test_no_other_kind_is_read_whatever_it_is_dressed_as(signature, number, overwritten):
    data = other_files()[number]
    for dressed in (data, signature + data, signature + data[overwritten:]):
        assert refusal_of(dressed) is not None


COSTLY = {"scans": (scans, 3000), "colour profiles": (profiles, 300)}


@pytest.mark.parametrize("name", COSTLY)
def test_what_a_file_repeats_does_not_multiply_the_work(name):
    """Such as scans of a progressive JPEG, each a pass over all pixels: a file of 16 MB has room for a million."""
    make, count = COSTLY[name]
    plain, costly = scans(0), make(count)
    plain_s = min(cost_s(lambda: refusal_of(plain, 2**20)) for _ in range(3))
    assert cost_s(lambda: refusal_of(costly, 2**20)) < 40 * plain_s


# In a process of its own, whose peak is nobody else's.
_MEASURE = """
import sys, warnings
from pathlib import Path
from hypothesis import given
from hypothesis import strategies as st
from tests.properties import strategies
from tests.properties.test_images import refusal_of

def peak_kib():
    # Not ru_maxrss, which begins with what the process that started us had.
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])

def grown_kib(make, max_pixels):
    # Made before the look, so that the file itself does not count.
    data = make()
    before = peak_kib()
    refusal_of(data, max_pixels)
    return peak_kib() - before

warnings.simplefilter("ignore")
for data in strategies.pictures().values():
    refusal_of(data)
"""


def in_a_process(script: str, *args: object) -> int:
    command = [sys.executable, "-c", _MEASURE + script, *map(str, args)]
    return int(subprocess.run(command, capture_output=True, check=True, timeout=100, text=True).stdout)


_CLAIMS_SCRIPT = """
most = 0
side = st.one_of(st.integers(1, 65535), st.sampled_from([16383, 65535, 10_000]))

@strategies.bounded(30)
@given(st.sampled_from(strategies.CLAIMS), side, side)
def claim(kind, width, height):
    global most
    most = max(most, grown_kib(lambda: strategies.claiming(kind, width, height), 100_000))

claim()
print(most)
"""
_BOMB_SCRIPT = "print(grown_kib(lambda: strategies.blank(9000), 10**9))"


def test_what_a_header_claims_takes_no_memory():
    assert in_a_process(_CLAIMS_SCRIPT) < 8 * 1024
    # What one of them would have taken.
    assert in_a_process(_BOMB_SCRIPT) > 100 * 1024


_PARTS_SCRIPT = """
part, size = sys.argv[1], int(sys.argv[2])
tenth = len(strategies.stuffed(part, 11)) - len(strategies.stuffed(part, 1))
print(grown_kib(lambda: strategies.stuffed(part, 10 * size // tenth), 100_000))
"""


@pytest.mark.parametrize("part", PARTS)
def test_what_a_file_repeats_takes_no_more_memory_than_a_picture_of_its_bytes(part):
    size = 2**21
    assert in_a_process(_PARTS_SCRIPT, part, size) * 1024 < 4 * size + 4 * 2**20
