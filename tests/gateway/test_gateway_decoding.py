"""Pictures that break decoders cost their own request, and neither the gateway nor the next one."""

from __future__ import annotations

import asyncio
import io
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image

from gateway import frames
from gateway.decoding import DECODERS_AT_ONCE, Decoder, ImageDecoder, InThread, Prepare
from gateway.models import Models, Served
from gateway.pipeline import Pipeline
from streamflow.config import GatewaySettings
from streamflow.errors import BusyError, InvalidRequestError, StreamFlowError, UnavailableError
from streamflow.rpc.auth import Caller
from streamflow.stages.imaging import encode_image
from streamflow.telemetry import Counters
from streamflow.transport.memory import MemoryTransport
from streamflow.transport.redis_streams import RedisTransport
from streamflow.types import ImageFormat, Quota
from streamflow.v1 import types_pb2
from tests.cards import CARD

MAX_PIXELS = 4_000_000
NOISE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
PICTURE = encode_image(NOISE, ImageFormat.PNG)
GRAY = encode_image(np.repeat(NOISE[..., :1], 3, 2), ImageFormat.JPEG)
REQUESTS = [
    types_pb2.GenerateRequest(init_image=PICTURE),
    types_pb2.GenerateRequest(init_image=GRAY, mask_image=PICTURE),
    types_pb2.GenerateRequest(control=types_pb2.Control(image=PICTURE)),
]
REFUSED = [
    types_pb2.GenerateRequest(init_image=b"GIF89a"),
    types_pb2.GenerateRequest(init_image=PICTURE[:200]),
    types_pb2.GenerateRequest(init_image=PICTURE, mask_image=encode_image(NOISE[:32], ImageFormat.PNG)),
    types_pb2.GenerateRequest(control=types_pb2.Control(image=b"\0")),
]

# What a picture could make a decoder do; the real child, with one function of it exchanged.
BROKEN = {
    "hangs": "import time; time.sleep(60)",
    "spins": "while True: pass",
    "eats memory": "x = bytearray(2**40)",
    "eats memory bit by bit": "x = []\n    while True: x.append(bytearray(2**20))",
    "crashes": "import ctypes; ctypes.string_at(0)",
    "exits": "import os; os._exit(0)",
    "answers nonsense": "return b'\\5\\0\\0\\0hello'",
    "answers what it was not asked": "return frames.pack({}, {'tenant': b'another'})",
    "answers without end": "return b'\\xff\\xff\\xff\\xff'",
}


def child(folder: Path, what: str, *, life_cpu_s: int = 600, imports: str = "os") -> tuple[str, ...]:
    """Breaks at every request whose init image is b"break"; the others it decodes."""
    # What a trial needs is loaded before, so that it is not the import that fails.
    code = f"""
import sys, {imports}
from gateway import decode_child, frames
usual = decode_child.answer

def breaks():
    {what}

def answer(body):
    return breaks() if frames.unpack(body)[1]["init"] == b"break" else usual(body)

decode_child.answer = answer
decode_child.main(int(sys.argv[1]), int(sys.argv[2]), {life_cpu_s})
"""
    (folder / "child.py").write_text(textwrap.dedent(code))
    return (sys.executable, str(folder / "child.py"))


async def decode(decoder: Decoder, request: types_pb2.GenerateRequest, **size: Any) -> Mapping[str, bytes]:
    with decoder.room(request, tenant=size.pop("tenant", "")):
        async with decoder.turn(request) as prepare:
            return await prepare(**size)


@pytest.mark.parametrize("number", range(len(REQUESTS)))
async def test_it_gives_what_decoding_here_gives(number):
    request = REQUESTS[number]
    expected = await decode(InThread(max_pixels=MAX_PIXELS), request, width=32, height=48)
    async with ImageDecoder(max_pixels=MAX_PIXELS) as decoder:
        assert await decode(decoder, request, width=32, height=48) == expected
        many = await asyncio.gather(*(decode(decoder, request, width=32, height=48) for _ in range(8)))
    assert many == [expected] * 8


@pytest.mark.parametrize("number", range(len(REFUSED)))
async def test_it_refuses_as_decoding_here_refuses(number):
    errors = []
    async with ImageDecoder(max_pixels=MAX_PIXELS) as there:
        for decoder in (there, InThread(max_pixels=MAX_PIXELS)):
            with pytest.raises(InvalidRequestError) as caught:
                await decode(decoder, REFUSED[number], width=32, height=32)
            error = caught.value
            errors.append((str(error), error.field, error.given, error.allowed, error.hint))
    assert errors[0] == errors[1]


@pytest.mark.parametrize("what", BROKEN.values(), ids=BROKEN.keys())
async def test_what_breaks_a_decoder_costs_its_own_request(tmp_path, monkeypatch, what):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    command = child(tmp_path, what)
    async with ImageDecoder(max_pixels=MAX_PIXELS, children=1, timeout_s=3.0, cpu_s=1, command=command) as decoder:
        with pytest.raises(InvalidRequestError, match="init_image: got '5 bytes"):
            await decode(decoder, types_pb2.GenerateRequest(init_image=b"break"), width=32, height=32)
        assert await decode(decoder, REQUESTS[0], width=32, height=32)


async def test_a_request_that_is_broken_off_leaves_no_answer_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    command = child(tmp_path, "import time; time.sleep(60)")
    async with ImageDecoder(max_pixels=MAX_PIXELS, children=1, command=command) as decoder:
        await decoder.warm_up()
        left = asyncio.create_task(decode(decoder, types_pb2.GenerateRequest(init_image=b"break"), width=32, height=32))
        await asyncio.sleep(0.3)
        left.cancel()
        await asyncio.wait([left])
        async with asyncio.timeout(10):
            assert {*await decode(decoder, REQUESTS[0], width=32, height=32)} == {"init_image_blob"}


BREAK = types_pb2.GenerateRequest(init_image=b"break")
CANNOT = {
    "open a file": "open('/proc/self/environ')",
    "read what its parent knows": "open(f'/proc/{os.getppid()}/environ')",
    "make a socket": "socket.socket()",
    "make a pipe": "os.pipe()",
    "start a program": "subprocess.run(['true'])",
    "take back its limits": "resource.setrlimit(7, (64, 64))",
}


@pytest.mark.parametrize("what", CANNOT.values(), ids=CANNOT.keys())
async def test_a_process_that_decodes_can_open_nothing(tmp_path, monkeypatch, what):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    trial = f"""
    try:
        {what}
    except (OSError, ValueError) as error:
        return frames.pack({{"refused": f"it could not: {{error!r}}"}}, {{}})
    return frames.pack({{}}, {{}})
"""
    command = child(tmp_path, trial, imports="os, socket, subprocess, resource")
    async with ImageDecoder(max_pixels=MAX_PIXELS, children=1, command=command) as decoder:
        with pytest.raises(InvalidRequestError, match=r"it could not: (OSError|PermissionError|ValueError)"):
            await decode(decoder, BREAK, width=32, height=32)
        assert await decode(decoder, REQUESTS[0], width=32, height=32)


def files() -> list[bytes]:
    """Every kind and mode, photographs that are turned or carry a second picture, 16 bits, and damage."""
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    modes = {"PNG": "RGB L P RGBA LA 1 I;16", "JPEG": "RGB L CMYK", "WEBP": "RGB RGBA", "MPO": "RGB"}
    made = []
    for kind, mode in ((kind, mode) for kind, several in modes.items() for mode in several.split()):
        out = io.BytesIO()
        image = Image.fromarray(NOISE)
        image = image.convert("L").convert("I").convert(mode) if mode == "I;16" else image.convert(mode)
        more = {"save_all": True, "append_images": [image]} if kind == "MPO" else {}
        image.save(out, kind, exif=turned, **more)
        made += [out.getvalue(), out.getvalue()[: out.tell() // 2]]
    return made


async def outcome(answer: Awaitable[object]) -> object:
    try:
        return await answer
    except InvalidRequestError as error:
        return str(error)


async def test_a_process_that_can_open_nothing_decodes_as_one_that_can():
    usual = InThread(max_pixels=MAX_PIXELS)
    for data in files():
        request = types_pb2.GenerateRequest(init_image=data, mask_image=data, control=types_pb2.Control(image=data))
        expected = await outcome(decode(usual, request, width=32, height=48))
        # A process for each, which has seen nothing before.
        async with ImageDecoder(max_pixels=MAX_PIXELS, children=1) as decoder:
            assert await outcome(decode(decoder, request, width=32, height=48)) == expected


async def test_a_process_is_replaced_before_its_time_is_over(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    work = """
    import time
    until_s = time.process_time() + 0.7
    while time.process_time() < until_s: pass
    return frames.pack({}, {"init_image_blob": str(os.getpid()).encode()})
"""
    command = child(tmp_path, work, life_cpu_s=8)
    async with ImageDecoder(max_pixels=MAX_PIXELS, children=1, cpu_s=1, command=command) as decoder:
        seen = [(await decode(decoder, BREAK, width=32, height=32))["init_image_blob"] for _ in range(8)]
    assert len({*seen}) > 1


async def test_more_than_can_wait_is_busy_and_one_tenant_does_not_take_it_all(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    command = child(tmp_path, "import time; time.sleep(60)")
    most = 4 * len(PICTURE)
    async with (
        ImageDecoder(max_pixels=MAX_PIXELS, children=1, timeout_s=3.0, waiting_bytes=most, command=command) as decoder,
        asyncio.TaskGroup() as tasks,
    ):

        def asked(tenant: str, request: types_pb2.GenerateRequest = REQUESTS[0]) -> asyncio.Task[Any]:
            return tasks.create_task(decode(decoder, request, width=32, height=32, tenant=tenant))

        await decoder.warm_up()
        hung = tasks.create_task(refused(decode(decoder, BREAK, width=32, height=32, tenant="alice")))
        waiting = [asked("alice")]
        await asyncio.sleep(0)
        assert isinstance(await refused(decode(decoder, REQUESTS[0], width=32, height=32, tenant="alice")), BusyError)
        waiting += [asked("bob"), asked("bob")]
        await asyncio.sleep(0)
        for tenant in ("bob", "carol"):
            error = await refused(decode(decoder, REQUESTS[0], width=32, height=32, tenant=tenant))
            assert isinstance(error, BusyError)
            assert error.retry_after_s > 0
        assert isinstance(await hung, InvalidRequestError)
        for one in waiting:
            assert await one
        assert await asked("carol")
        # Alone, a picture may be larger than all of it.
        large = types_pb2.GenerateRequest(init_image=encode_image(np.tile(NOISE, (8, 8, 1)), ImageFormat.PNG))
        assert len(large.init_image) > most
        assert await asked("alice", large)


class Counting:
    """Decodes as another one does, and counts it."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder, self.decoded = decoder, 0

    def room(self, request: types_pb2.GenerateRequest, *, tenant: str = "") -> AbstractContextManager[None]:
        return self._decoder.room(request, tenant=tenant)

    @asynccontextmanager
    async def turn(self, request: types_pb2.GenerateRequest) -> AsyncIterator[Prepare]:
        async with self._decoder.turn(request) as prepare:

            async def counted(*, width: int, height: int) -> Mapping[str, bytes]:
                self.decoded += 1
                return await prepare(width=width, height=height)

            yield counted


async def test_pictures_that_come_at_once_and_are_over_a_quota_are_not_decoded():
    decoder = Counting(InThread(max_pixels=MAX_PIXELS))
    transport, counters = MemoryTransport(), Counters()
    pipeline = Pipeline(transport, card=CARD, settings=GatewaySettings(), counters=counters, decoder=decoder)
    caller = Caller("alice", quota=Quota(jobs=1))

    async def submit(number: int) -> object:
        request = types_pb2.GenerateRequest(
            request_id=f"r{number}", prompts=["a red circle"], init_image=PICTURE, width=64, height=64
        )
        return await pipeline.submit(request, caller=caller, remaining_s=None, detach=True)

    answers = await asyncio.gather(*map(submit, range(40)), return_exceptions=True)
    assert sum(isinstance(answer, BusyError) for answer in answers) == 39
    assert decoder.decoded <= DECODERS_AT_ONCE
    await transport.close()


async def test_a_turn_that_does_not_come_is_not_waited_for_longer_than_is_of_use():
    async with ImageDecoder(max_pixels=MAX_PIXELS, children=1, turn_s=0.2) as decoder:
        async with decoder.turn(REQUESTS[0]):
            error = await refused(decode(decoder, REQUESTS[0], width=32, height=32))
        assert isinstance(error, BusyError)
        assert error.reason == "pictures"
        assert await decode(decoder, REQUESTS[0], width=32, height=32)


async def test_while_redis_hangs_no_more_pictures_are_here_than_there_is_room_for(unused_tcp_port):
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    counters = Counters()
    settings = GatewaySettings(max_image_pixels=MAX_PIXELS)
    async with (
        await asyncio.start_server(hang, "127.0.0.1", unused_tcp_port),
        ImageDecoder(max_pixels=MAX_PIXELS, waiting_bytes=6 * len(PICTURE)) as decoder,
    ):
        served = []
        for name in ("shapes", "rings"):
            transport = RedisTransport.from_url(f"redis://127.0.0.1:{unused_tcp_port}/0", deployment=name)
            card = replace(CARD, name=name)
            served.append(Served.over(transport, card=card, settings=settings, counters=counters, decoder=decoder))
        models = Models(served)
        kinds = ({"request_id": "a"}, {"time_budget_s": 30.0}, {})
        request = types_pb2.GenerateRequest(prompts=["a ring"], init_image=PICTURE, width=64, height=64)
        waiting = []
        for number in range(12):
            one = types_pb2.GenerateRequest(**kinds[number % 3])
            one.MergeFrom(request)
            submit = models.submit(one, caller=Caller("alice"), remaining_s=None, detach=True)
            waiting.append(asyncio.create_task(submit))
        await asyncio.sleep(0.2)
        refusals = [task.exception() for task in waiting if task.done()]
        # Half of the room is one tenant's.
        assert len(refusals) == 9
        assert all(isinstance(error, BusyError) and error.reason == "pictures" for error in refusals)
        assert counters.snapshot()["busy_pictures_total"] == 9
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        await models.close()


async def refused(answer: Awaitable[object]) -> StreamFlowError:
    with pytest.raises(StreamFlowError) as caught:
        await answer
    return caught.value


def decoders() -> list[psutil.Process]:
    """There may be a Redis of other tests beside them."""
    return [one for one in psutil.Process().children() if "gateway.decode_child" in one.cmdline()]


def rights_of(process: psutil.Process) -> dict[str, str]:
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


async def test_the_processes_are_kept_warm_limited_and_ended(monkeypatch):
    monkeypatch.setenv("STREAMFLOW_REDIS_URL", "redis://:secret@host:1/0")
    async with ImageDecoder(max_pixels=MAX_PIXELS, children=2) as decoder:
        await decoder.warm_up()
        children = decoders()
        assert len(children) == 2
        for _ in range(3):
            await decode(decoder, REQUESTS[0], width=32, height=32)
        assert decoders() == children
        for one in children:
            assert "secret" not in str(one.environ())
            assert one.rlimit(psutil.RLIMIT_AS)[0] < 2**31
            for what in (psutil.RLIMIT_FSIZE, psutil.RLIMIT_NOFILE, psutil.RLIMIT_NPROC):
                assert one.rlimit(what) == (0, 0)
            rights = rights_of(one)
            assert rights["NoNewPrivs"] == "1"
            assert {int(rights[kind], 16) for kind in ("CapInh", "CapPrm", "CapEff")} == {0}
    assert psutil.wait_procs(children, timeout=10)[1] == []


async def test_where_no_process_starts_the_client_may_come_again():
    async with ImageDecoder(max_pixels=MAX_PIXELS, command=("/bin/false",)) as decoder:
        await decoder.warm_up()
        with pytest.raises(UnavailableError):
            await decode(decoder, REQUESTS[0], width=32, height=32)


@settings(deadline=None)
@given(
    st.dictionaries(st.text(max_size=5), st.binary(max_size=50)), st.dictionaries(st.text(max_size=5), st.integers())
)
def test_a_frame_reads_as_it_was_written(blobs, about):
    frame = frames.pack(about, blobs)
    assert frames.body_size(frame[:4]) == len(frame) - 4
    assert frames.unpack(frame[4:]) == (about, blobs)


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_what_is_no_frame_is_refused_in_one_way(body):
    with suppress(ValueError):
        assert frames.pack(*frames.unpack(body))


def test_a_frame_without_end_is_not_waited_for():
    with pytest.raises(ValueError, match="allowed"):
        frames.body_size(b"\xff\xff\xff\xff")
