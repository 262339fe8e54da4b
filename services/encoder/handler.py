"""What an entry of the encode stream becomes: stored tensors, and an entry for the denoiser."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence

import numpy as np

from streamflow.flow.programs import Role
from streamflow.host import handoff
from streamflow.host.handoff import Stopwatch, malformed
from streamflow.host.request import ImageRequest, read_request
from streamflow.host.sources import stored_source
from streamflow.stages.encoder import EncodedText, EncoderStage, prompt_cache_key, truncation_warning
from streamflow.transport import codec
from streamflow.transport.base import Entry, Transport
from streamflow.transport.handling import Advance, EntryContext, Outcome
from streamflow.types import AdapterUse, Stage
from streamflow.v1 import encoder_pb2


class EncodeHandler:
    """Encodes one image's prompts, init image and mask.

    Args:
        stage: entered by the caller.
        transport: where tensors are stored.
        cache_s: how long a prompt's tensors are kept after their last use.
    """

    def __init__(self, stage: EncoderStage, transport: Transport, *, cache_s: float) -> None:
        self._stage, self._transport, self._cache_s = stage, transport, cache_s
        self.counters = Counter({"prompt_cache_hits_total": 0, "prompt_cache_misses_total": 0})

    async def __call__(self, context: EntryContext) -> Outcome:
        """Advances the image to the denoiser. Raises GenerationError for what cannot be read or encoded."""
        entry = context.entry
        job = await self._transport.job(entry.ref.job_id)
        with malformed(entry):
            watch = Stopwatch(entry, since_s=job.admitted_at_s)
        request = read_request(job.spec, entry.ref.index, self._stage.card)
        adapters = self._stage.relevant(request.variant.adapters)
        warnings = await asyncio.gather(
            *(self._text(entry, role, text, adapters) for role, text in request.texts.items())
        )
        payload = {handoff.text_field(role): self._key(text, adapters) for role, text in request.texts.items()}
        payload |= await self._images(entry, request)
        payload |= handoff.carried(entry, watch.stop("encode"))
        return Advance(
            Stage.DENOISE, payload, tuple(warning for warning in (*warnings, *request.program.warnings) if warning)
        )

    def _key(self, text: str, adapters: Sequence[AdapterUse]) -> bytes:
        return prompt_cache_key(self._stage.card.revision, text, adapters).encode()

    async def _text(self, entry: Entry, role: Role, text: str, adapters: Sequence[AdapterUse]) -> str:
        """Sees to it that the text's tensors are stored; returns a warning, or ""."""
        key, keep_s = self._key(text, adapters).decode(), max(self._cache_s, handoff.keep_s(entry))
        data = await self._transport.get_cached(key, keep_s=keep_s)
        self.counters["prompt_cache_misses_total" if data is None else "prompt_cache_hits_total"] += 1
        if data is None:
            encoded = await self._stage.encode_text(text, adapters)
            await self._transport.put_cached(key, _to_bytes(encoded), keep_s=keep_s)
            truncated = encoded.truncated
        else:
            with malformed(entry):
                truncated = encoder_pb2.Conditioning.FromString(data).truncated
        return truncation_warning(role, truncated, self._stage.max_tokens) if truncated else ""

    async def _images(self, entry: Entry, request: ImageRequest) -> dict[str, bytes]:
        """References to the init image's latents and the small mask; empty without them."""
        source = await stored_source(self._transport, entry, request)
        if source is None:
            return {}
        found = {handoff.INIT: await self._store(entry, await self._stage.encode_image(source.image))}
        if source.mask is not None:
            found[handoff.MASK] = await self._store(entry, self._stage.mask_latents(source.mask))
        return found

    async def _store(self, entry: Entry, array: np.ndarray) -> bytes:
        data = codec.encode(array)
        return (await self._transport.put_blob(data, keep_s=handoff.keep_s(entry), admitted=True)).encode()


def _to_bytes(encoded: EncodedText) -> bytes:
    message = codec.tensors_to_pb(encoded.conditioning, truncated=encoded.truncated)
    return message.SerializeToString(deterministic=True)
