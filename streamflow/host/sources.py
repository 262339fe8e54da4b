"""The images of a request, as the gateway stored them."""

from __future__ import annotations

import asyncio

import numpy as np

from streamflow.errors import GenerationError
from streamflow.host.handoff import malformed
from streamflow.host.request import ImageRequest
from streamflow.pictures import Source
from streamflow.stages.imaging import decode_mask, decode_rgb
from streamflow.transport.base import Entry, Transport


async def stored_source(transport: Transport, entry: Entry, request: ImageRequest) -> Source | None:
    """None for a request without an init image. Raises GenerationError for what is gone or broken."""
    if not request.init_image_blob:
        return None
    image = await _blob(transport, request.init_image_blob)
    mask = await _blob(transport, request.mask_blob) if request.mask_blob else None
    size = (request.width, request.height)
    with malformed(entry):
        return await asyncio.to_thread(_decode, image, mask, size)


async def stored_control(transport: Transport, entry: Entry, request: ImageRequest) -> np.ndarray | None:
    """What the request's ControlNet reads, uint8 [height, width, 3]; None for a request without one.

    Raises:
        GenerationError: it is gone or broken.
    """
    if not request.control_blob:
        return None
    image = await _blob(transport, request.control_blob)
    with malformed(entry):
        return await asyncio.to_thread(decode_rgb, image, size=(request.width, request.height))


async def _blob(transport: Transport, sha256: str) -> bytes:
    data = await transport.get_blob(sha256)
    if data is None:
        raise GenerationError("an image of the request is no longer stored; send the request again")
    return data


def _decode(image: bytes, mask: bytes | None, size: tuple[int, int]) -> Source:
    return Source(decode_rgb(image, size=size), None if mask is None else decode_mask(mask, size=size))
