"""The arrays of a denoise job, checked, as tensors on the CPU."""

from __future__ import annotations

import numpy as np
import torch

from streamflow.errors import InvalidRequestError
from streamflow.families.controls import CONTROL_IMAGE, CONTROL_SCALE
from streamflow.types import DenoiseJob


def control_inputs(job: DenoiseJob) -> dict[str, torch.Tensor]:
    """What a ControlNet is fed, as it was trained: colours in [0, 1]; empty without one. Raises InvalidRequestError."""
    if job.control_image is None:
        return {}
    shape = (job.height, job.width, 3)
    if job.control_image.dtype != np.uint8 or job.control_image.shape != shape:
        given = f"{job.control_image.dtype} {list(job.control_image.shape)}"
        raise InvalidRequestError("control_image", given, f"uint8 {list(shape)}")
    image = torch.from_numpy(job.control_image.transpose(2, 0, 1).astype(np.float32) / 255)
    return {CONTROL_IMAGE: image, CONTROL_SCALE: torch.tensor(job.control_scale)}


def mask_tensor(mask: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    """A mask of this shape, in [0, 1]. Raises InvalidRequestError."""
    checked = tensor("mask", mask, shape)
    if not 0 <= checked.min() <= checked.max() <= 1:
        given = f"values from {checked.min():g} to {checked.max():g}"
        raise InvalidRequestError("mask", given, "0 (stays as it is) to 1 (is made anew)")
    return checked


def tensor(field: str, array: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    """An array of this shape in float32. Raises InvalidRequestError, which names the field."""
    if array.shape != shape:
        raise InvalidRequestError(field, f"shape {list(array.shape)}", f"shape {list(shape)}")
    # Not ascontiguousarray, which gives an array without axes one.
    return torch.from_numpy(np.asarray(array, dtype=np.float32, order="C"))
