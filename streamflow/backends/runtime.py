"""Devices, precisions and threads from settings."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

import torch

from streamflow.errors import InvalidRequestError

DETERMINISTIC_ROWS = 8
"""Rows of every network call in deterministic mode, in every process: no row's bits depend on its neighbours then."""

_CPUINFO, _CPU_MAX = Path("/proc/cpuinfo"), Path("/sys/fs/cgroup/cpu.max")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def resolve_device(device: str = "auto") -> torch.device:
    """`auto` is the first GPU where there is one. Raises InvalidRequestError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
        torch.empty(0, device=resolved)
    except (RuntimeError, AssertionError) as error:
        raise InvalidRequestError(
            "device", device, "auto, cpu, cuda or cuda:N of a GPU that torch sees", str(error).splitlines()[0]
        ) from error
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is float32 on a CPU and float16 on a GPU."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    if dtype not in _DTYPES:
        raise InvalidRequestError("dtype", dtype, "auto, " + ", ".join(_DTYPES))
    return _DTYPES[dtype]


def set_threads(threads: int = 0, *, deterministic: bool = False) -> int:
    """Sets the CPU threads of torch for this process and returns them.

    Args:
        threads: 0 = all cores, or 1 in deterministic mode: the number of threads changes the last bits of a result.
    """
    count = threads or (1 if deterministic else available_cores())
    torch.set_num_threads(count)
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    return count


def available_cores() -> int:
    """CPU cores that this process may use: those it may run on, or the whole ones of a container's share."""
    return max(1, min(len(os.sched_getaffinity(0)), _container_share()))


def _container_share() -> int:
    """By cgroup v2; a large number where there is no limit."""
    try:
        quota, period = _CPU_MAX.read_text().split()
        return int(quota) // int(period)
    except (OSError, ValueError):
        return sys.maxsize


def processor_name(device: torch.device) -> str:
    """Of the GPU, or of the CPU as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = _CPUINFO.read_text("utf-8").splitlines() if _CPUINFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
