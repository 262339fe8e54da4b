"""Devices, precisions and threads from settings."""

from __future__ import annotations

import os

import torch

from streamflow.errors import InvalidRequestError

DETERMINISTIC_ROWS = 8
"""Rows of every network call in deterministic mode, in every process: no row's bits depend on its neighbours then."""

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
    count = threads or (1 if deterministic else len(os.sched_getaffinity(0)))
    torch.set_num_threads(count)
    if deterministic:
        torch.use_deterministic_algorithms(True, warn_only=True)
    return count
