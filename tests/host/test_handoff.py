"""What one stage hands to the next, over a transport in memory."""

from __future__ import annotations

import math

import numpy as np
import pytest

from streamflow.errors import GenerationError
from streamflow.host import handoff
from streamflow.transport import codec
from streamflow.transport.memory import MemoryTransport
from streamflow.types import SlotState

SHAPE = (4, 8, 8)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("broken", ["latents", "velocity"])
async def test_a_state_that_is_not_finite_is_told_in_the_engines_words(bad: float, broken: str) -> None:
    tensors = {name: np.zeros(SHAPE, np.float32) for name in ("latents", "velocity")}
    state = SlotState(**tensors, ops_done=1, ops=2)
    transport = MemoryTransport()
    payload = await handoff.pack_state(transport, state, keep_s=9)
    assert await handoff.unpack_state(transport, payload, shape=SHAPE) is not None
    tensors[broken][0, 0, 0] = bad
    with pytest.raises(GenerationError, match="the latents are not finite; a lower guidance_scale") as told:
        await handoff.pack_state(transport, state, keep_s=9)
    assert told.value.stage == "denoiser"
    # From a denoiser that does not look.
    payload[handoff.STATE] = codec.encode_tensors(tensors)
    with pytest.raises(GenerationError, match="the latents are not finite; a lower guidance_scale"):
        await handoff.unpack_state(transport, payload, shape=SHAPE)
