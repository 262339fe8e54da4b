"""Listing GPUs, and sharing them out."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from streamflow.errors import InvalidRequestError
from streamflow.gpus import WEIGHTS, Gpu, find, least_used, list_gpus, place, read_gpus, read_listing, visible
from streamflow.types import Stage
from tests import nvidia_smi

CUT = """\
GPU 0: NVIDIA A100-SXM4-40GB (UUID: GPU-5c89852c-d268-c3f3-1b07-005d5ae1dc3f)
  MIG 3g.20gb     Device  0: (UUID: MIG-a4b7b1e2-5d4c-5f80-8a7e-0b5e1c5a9a01)
  MIG 3g.20gb     Device  1: (UUID: MIG-a4b7b1e2-5d4c-5f80-8a7e-0b5e1c5a9a02)
GPU 1: NVIDIA A100-SXM4-40GB (UUID: GPU-f08ec2c1-0be7-4a9c-9d4b-7b1f6a3b7d3a)
"""


def gpus(count: int) -> list[Gpu]:
    return read_listing(nvidia_smi.listing(count))


def test_what_nvidia_smi_lists() -> None:
    assert gpus(2) == [Gpu(str(k), nvidia_smi.uuid(k), f"NVIDIA Test {k}") for k in range(2)]
    assert read_listing("No devices found.\n") == []


def test_a_gpu_that_is_cut_counts_as_its_parts() -> None:
    found = read_listing(CUT)
    assert [gpu.number for gpu in found] == ["0:0", "0:1", "1"]
    assert found[1].uuid == "MIG-a4b7b1e2-5d4c-5f80-8a7e-0b5e1c5a9a02"
    assert str(found[0]) == "0:0 (MIG 3g.20gb)"


def test_the_program_on_the_path_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    monkeypatch.setenv("PATH", nvidia_smi.install(tmp_path, 3))
    assert list_gpus() == gpus(3)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'has failed: no driver' >&2\nexit 9\n")
    assert list_gpus() == []
    (tmp_path / "nvidia-smi").unlink()
    assert list_gpus() == []


class Nvml(ModuleType):
    """What we use of nvidia-ml-py, for three GPUs: an old one, one that is cut, one that could be and is not."""

    NVML_DEVICE_MIG_ENABLE = 1

    class NVMLError(Exception):
        """Of the library."""

    def __init__(self, *, driver: bool = True) -> None:
        super().__init__("pynvml")
        self._driver, self.open = driver, 0

    def nvmlInit(self) -> None:
        if not self._driver:
            raise self.NVMLError("NVML Shared Library Not Found")
        self.open += 1

    def nvmlShutdown(self) -> None:
        self.open -= 1

    def nvmlDeviceGetCount(self) -> int:
        return 3

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        return str(index)

    def nvmlDeviceGetMigMode(self, device: str) -> list[int]:
        if device == "0":
            raise self.NVMLError("Not Supported")
        return [int(device == "1"), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, device: str) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: str, part: int) -> str:
        if part not in (0, 2):
            raise self.NVMLError("Not Found")
        return f"{device}:{part}"

    def nvmlDeviceGetMemoryInfo(self, device: str) -> SimpleNamespace:
        return SimpleNamespace(used=100 + len(device))

    def nvmlDeviceGetUUID(self, device: str) -> str:
        return ("MIG-" if ":" in device else "GPU-") + device

    def nvmlDeviceGetName(self, device: str) -> str:
        return f"NVIDIA {device}"


def test_nvml_is_asked_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    assert list_gpus() == [
        Gpu("0", "GPU-0", "NVIDIA 0", 101),
        Gpu("1:0", "MIG-1:0", "NVIDIA 1", 103),
        Gpu("1:2", "MIG-1:2", "NVIDIA 1", 103),
        Gpu("2", "GPU-2", "NVIDIA 2", 101),
    ]
    assert nvml.open == 0
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(driver=False))
    assert list_gpus() == []


@pytest.mark.parametrize(
    ("said", "seen"),
    [
        (None, "0123"),
        ("", ""),
        ("-1", ""),
        ("2,0", "20"),
        (nvidia_smi.uuid(3)[:12], "3"),
        (f"1, {nvidia_smi.uuid(2)}", "12"),
        ("1,9,2", "1"),
    ],
)
def test_what_cuda_visible_devices_lets_through(said: str | None, seen: str) -> None:
    assert "".join(gpu.number for gpu in visible(gpus(4), said)) == seen


def test_a_gpu_is_named_by_number_or_uuid() -> None:
    assert find(gpus(2), "1") == find(gpus(2), nvidia_smi.uuid(1)) == gpus(2)[1]
    assert read_gpus("1, 0", gpus(2)) == [gpus(2)[1], gpus(2)[0]]


@pytest.mark.parametrize(
    ("text", "count", "says"),
    [
        ("7", 2, "gpus: got '7'; allowed: number or UUID of one of 0 (NVIDIA Test 0), 1 (NVIDIA Test 1)"),
        ("0,", 2, "gpus: got ''"),
        ("0,1,0", 2, "gpus: got '0,1,0'; allowed: every GPU once"),
        ("0,1", 0, "gpus: got '0'; allowed: nothing, as no GPU is to be seen; nvidia-smi -L lists none here"),
    ],
)
def test_wrong_gpus_are_told(text: str, count: int, says: str) -> None:
    with pytest.raises(InvalidRequestError) as refusal:
        read_gpus(text, gpus(count))
    assert says in str(refusal.value)


def test_the_least_used_is_the_first_of_several() -> None:
    assert least_used(["a", "b", "c"], {"a": 2, "b": 1, "c": 1}) == "b"
    assert least_used(["a", "b", "c"], {"a": 0.5, "x": 9}) == "b"


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("replicas", [(1, 1, 1), (1, 2, 4), (2, 8, 3), (1, 4, 0)])
def test_gpus_are_shared_out_evenly(count: int, replicas: tuple[int, int, int]) -> None:
    weights = [WEIGHTS[stage] for stage, number in zip(Stage, replicas, strict=True) for _ in range(number)]
    placed = place(weights, gpus(count))
    load = Counter({gpu.uuid: 0.0 for gpu in gpus(count)})
    for gpu, weight in zip(placed, weights, strict=True):
        load[gpu.uuid] += weight  # type: ignore[assignment]
    # Whoever came last to the fullest one found none emptier.
    assert max(load.values()) - min(load.values()) <= max(weights)
    if len(weights) >= count:
        assert min(load.values()) > 0


def test_denoisers_choose_first() -> None:
    encoder, *denoisers, decoder, another = place([1, 4, 4, 2, 2], gpus(3))
    assert [gpu.number for gpu in denoisers] == ["0", "1"]
    assert decoder.number == another.number == "2"
    assert encoder.number == "0"


def test_nothing_of_this_loads_torch() -> None:
    program = "import sys, streamflow.host.gpus; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
