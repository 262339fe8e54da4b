"""The GPUs of this machine, known before torch is imported, and which of them a process gets.

A MIG device, a part of a GPU, counts as one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from streamflow.errors import InvalidRequestError
from streamflow.types import Stage

WEIGHTS: Mapping[Stage, float] = {Stage.ENCODE: 1.0, Stage.DENOISE: 4.0, Stage.DECODE: 2.0}
"""How much of a GPU's time a replica takes; a denoiser calls its network at every step of every image."""

_LIST_TIMEOUT_S = 30.0
_GPU = re.compile(r"GPU (?P<number>\d+): (?P<name>.*) \(UUID: (?P<uuid>GPU-[\w-]+)\)")
_MIG = re.compile(r"\s+(?P<name>MIG \S+)\s+Device\s+(?P<number>\d+): \(UUID: (?P<uuid>MIG-[\w/-]+)\)")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One that processes can be shown.

    Attributes:
        number: as nvidia-smi counts; that of a MIG device is `GPU:DEVICE`, such as 0:1.
        used_bytes: of its memory, by whatever process; 0 = not known.
    """

    number: str
    uuid: str
    name: str = ""
    used_bytes: int = 0

    def __str__(self) -> str:
        return f"{self.number} ({self.name or self.uuid})"


def list_gpus() -> list[Gpu]:
    """All that the driver tells of, by NVML where its Python package is installed, or else by nvidia-smi.

    Neither of them needs CUDA, which reads CUDA_VISIBLE_DEVICES once and for all. Empty where there is no driver.
    """
    try:
        import pynvml
    except ImportError:
        return _listed_by_nvidia_smi()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [gpu for index in range(pynvml.nvmlDeviceGetCount()) for gpu in _listed_by_nvml(pynvml, index)]
    finally:
        pynvml.nvmlShutdown()


def visible(gpus: Sequence[Gpu], said: str | None) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES lets through, in its order; None = it is not set.

    As CUDA reads it, a UUID may be cut short, and what follows an item that fits nothing is not seen.
    """
    if said is None:
        return list(gpus)
    found: list[Gpu] = []
    for item in map(str.strip, said.split(",")):
        gpu = next((gpu for gpu in gpus if item and (gpu.number == item or gpu.uuid.startswith(item))), None)
        if gpu is None:
            break
        found.append(gpu)
    return found


def find(gpus: Sequence[Gpu], wanted: str, *, field: str = "gpu") -> Gpu:
    """By number or UUID. Raises InvalidRequestError where there is none of it."""
    for gpu in gpus:
        if wanted in (gpu.number, gpu.uuid):
            return gpu
    if not gpus:
        hint = "nvidia-smi -L lists none here: install the driver, or give the container its GPUs"
        raise InvalidRequestError(field, wanted, "nothing, as no GPU is to be seen", hint)
    raise InvalidRequestError(field, wanted, "number or UUID of one of " + ", ".join(map(str, gpus)))


def read_gpus(text: str, gpus: Sequence[Gpu], *, field: str = "gpus") -> list[Gpu]:
    """Reads `0,1,3`. Raises InvalidRequestError for what is not there, or there twice."""
    items = [item.strip() for item in text.split(",")]
    found = [find(gpus, item, field=field) for item in items]
    if len(set(found)) < len(found):
        raise InvalidRequestError(field, text, "every GPU once")
    return found


def least_used(gpus: Sequence[str], load: Mapping[str, float]) -> str:
    """Of these UUIDs the one with the least load; the first of several."""
    return min(gpus, key=lambda gpu: load.get(gpu, 0.0))


def place(weights: Sequence[float], gpus: Sequence[Gpu]) -> list[Gpu]:
    """A GPU for every process of these weights: the heaviest choose first, each the one with the least load."""
    load: dict[str, float] = {}
    by_uuid = {gpu.uuid: gpu for gpu in gpus}
    placed: dict[int, Gpu] = {}
    for index in sorted(range(len(weights)), key=lambda index: -weights[index]):
        uuid = least_used(list(by_uuid), load)
        load[uuid] = load.get(uuid, 0.0) + weights[index]
        placed[index] = by_uuid[uuid]
    return [placed[index] for index in range(len(weights))]


def read_listing(text: str) -> list[Gpu]:
    """What `nvidia-smi -L` writes. A GPU that is cut into MIG devices is there as these alone."""
    found: dict[str, list[Gpu]] = {}
    whole = ""
    for line in text.splitlines():
        if match := _GPU.match(line):
            whole = match["number"]
            found[whole] = [Gpu(whole, match["uuid"], match["name"])]
        elif (match := _MIG.match(line)) and whole:
            parts = [gpu for gpu in found[whole] if gpu.number != whole]
            found[whole] = [*parts, Gpu(f"{whole}:{match['number']}", match["uuid"], match["name"])]
    return [gpu for gpus in found.values() for gpu in gpus]


def _listed_by_nvidia_smi() -> list[Gpu]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    try:
        answer = subprocess.run(
            [program, "-L"], capture_output=True, text=True, check=True, timeout=_LIST_TIMEOUT_S
        ).stdout
    except (OSError, subprocess.SubprocessError):
        # It is there without a driver as well.
        return []
    return read_listing(answer)


def _listed_by_nvml(nvml: Any, index: int) -> Iterator[Gpu]:
    whole = nvml.nvmlDeviceGetHandleByIndex(index)
    parts = list(_mig_devices(nvml, whole))
    for number, device in [(f"{index}:{part}", device) for part, device in parts] or [(str(index), whole)]:
        used_bytes = 0
        with suppress(nvml.NVMLError):  # some share their memory with the processor, and tell none
            used_bytes = int(nvml.nvmlDeviceGetMemoryInfo(device).used)
        yield Gpu(number, nvml.nvmlDeviceGetUUID(device), nvml.nvmlDeviceGetName(whole), used_bytes)


def _mig_devices(nvml: Any, whole: Any) -> Iterator[tuple[int, Any]]:
    try:
        if nvml.nvmlDeviceGetMigMode(whole)[0] != nvml.NVML_DEVICE_MIG_ENABLE:
            return
    except nvml.NVMLError:
        return  # a kind of GPU that has no such mode
    for part in range(nvml.nvmlDeviceGetMaxMigDeviceCount(whole)):
        try:
            yield part, nvml.nvmlDeviceGetMigDeviceHandleByIndex(whole, part)
        except nvml.NVMLError:
            continue  # there may be fewer than fit
