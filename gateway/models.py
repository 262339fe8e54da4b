"""The models behind one gateway: which of them a request is for, and which one has a job.

Each has a deployment of its own, and nothing of theirs meets before it comes here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import merge
from itertools import islice
from typing import Self

from gateway.decoding import Decoder
from gateway.pipeline import JobKey, Pipeline, no_letter
from streamflow.config import GatewaySettings
from streamflow.errors import AlreadyExistsError, InvalidRequestError, NotFoundError, UnavailableError
from streamflow.rpc.auth import Caller
from streamflow.telemetry import Counters
from streamflow.transport.base import DeadLetter, JobPlace, JobView, Transport
from streamflow.types import ModelCard, Stage
from streamflow.v1 import types_pb2
from streamflow.validation import check_request_id

# What is served can be told without Redis, so nobody waits for it longer than this to hear what is live.
_LIVE_S = 2.0


@dataclass(frozen=True, slots=True)
class Served:
    """One model: what it offers, where its jobs live, and what becomes of them."""

    card: ModelCard
    transport: Transport
    pipeline: Pipeline

    @classmethod
    def over(
        cls,
        transport: Transport,
        *,
        card: ModelCard,
        settings: GatewaySettings,
        counters: Counters,
        decoder: Decoder | None = None,
        on_ended: Callable[[JobView], None] | None = None,
    ) -> Self:
        """Arguments are those of Pipeline."""
        pipeline = Pipeline(
            transport, card=card, settings=settings, counters=counters, decoder=decoder, on_ended=on_ended
        )
        return cls(card, transport, pipeline)

    async def live(self) -> bool:
        """Whether every stage has a replica of this revision that takes work; False where Redis does not say."""
        try:
            async with asyncio.timeout(_LIVE_S):
                workers = await self.transport.workers()
        except (UnavailableError, TimeoutError):
            return False
        taking = {w.stage for w in workers if w.model_revision == self.card.revision and not w.draining}
        return taking == set(Stage)

    async def has(self, key: JobKey) -> bool:
        try:
            await self.pipeline.job(key)
        except NotFoundError:
            return False
        return True


class Models:
    """Calls that concern more than one model, or that do not say which.

    Where there is one model only, none of them reads more than its pipeline does.

    Args:
        served: at least one, of different names; the first is for requests that name none.
    """

    def __init__(self, served: Sequence[Served]) -> None:
        self._served = {each.card.name: each for each in served}
        assert served, "a gateway without a model"
        if len(self._served) != len(served):
            names = [each.card.name for each in served]
            raise InvalidRequestError("more_models", ", ".join(names), "a name of its own for every model")
        self.default = served[0]

    def __iter__(self) -> Iterator[Served]:
        return iter(self._served.values())

    @property
    def names(self) -> list[str]:
        """The default one's first."""
        return list(self._served)

    def named(self, name: str) -> Served:
        """Raises InvalidRequestError for a model that is not served."""
        if name and name not in self._served:
            raise InvalidRequestError("model", name, "one of " + ", ".join(self._served))
        return self._served[name] if name else self.default

    async def submit(
        self,
        request: types_pb2.GenerateRequest,
        *,
        caller: Caller,
        remaining_s: float | None,
        detach: bool,
        traceparent: str = "",
    ) -> tuple[Pipeline, JobKey, bool]:
        """Admits a request to its model; true when the same request was there already.

        Raises:
            InvalidRequestError: no such model.
            AlreadyExistsError: another model has a job of that id.
            StreamFlowError: see `Pipeline.submit`.
        """
        if request.request_id:
            check_request_id(request.request_id)
        served = self.named(request.model)
        pipeline = served.pipeline
        with pipeline.room(request, tenant=caller.tenant):
            if request.request_id:
                await self._check_free(JobKey(caller.tenant, request.request_id), served)
            key, attached = await pipeline.submit(
                request, caller=caller, remaining_s=remaining_s, detach=detach, traceparent=traceparent
            )
        return pipeline, key, attached

    async def having(self, key: JobKey) -> Pipeline:
        """The pipeline of the model that has a job, or of the default one, which says that there is none."""
        holders = await self._holders(key)
        return (holders or [self.default])[0].pipeline

    async def jobs(self, *, tenant: str, after: JobPlace | None, count: int) -> list[JobView]:
        """A tenant's jobs, newest first. The clock is that of Redis, so one order holds for the jobs of all."""
        found = await asyncio.gather(*(each.transport.jobs(tenant=tenant, after=after, count=count) for each in self))
        return list(islice(merge(*found, key=lambda view: view.place, reverse=True), count))

    async def dead_letters(self, tenant: str, *, count: int) -> list[DeadLetter]:
        """Newest first; the ids are those that `retry` takes."""
        found = await asyncio.gather(*(self._letters_of(each, tenant, count) for each in self))
        return list(islice(merge(*found, key=lambda letter: letter.at_s, reverse=True), count))

    async def retry(self, caller: Caller, letter_id: str) -> tuple[Pipeline, JobKey]:
        """Admits the job of a dead letter to its model again; see `Pipeline.retry`.

        Raises:
            NotFoundError: no such letter.
        """
        number, _, name = letter_id.partition(".")
        if name and name not in self._served:
            raise no_letter(letter_id)
        pipeline, key = self.named(name).pipeline, JobKey(caller.tenant, f"retry-{letter_id}")
        await pipeline.retry(key, number, quota=caller.quota)
        return pipeline, key

    async def drain(self, grace_s: float) -> None:
        """See `Pipeline.drain`."""
        for each in self:
            await each.pipeline.drain(grace_s)

    async def close(self) -> None:
        await asyncio.gather(*(each.transport.close() for each in self))

    async def _check_free(self, key: JobKey, served: Served) -> None:
        # Two that come at once under one id can both be admitted, one to each model: no script sees two deployments.
        # Each is then streamed to its end; by the id alone the one of the model that is listed first is found.
        for holder in await self._holders(key):
            if holder is not served:
                given = f"a request to the model {holder.card.name} has the id {key.request_id!r}"
                raise AlreadyExistsError(f"request_id: {given} already; use another id")

    async def _holders(self, key: JobKey) -> list[Served]:
        if len(self._served) == 1:
            return [self.default]  # who else
        has = await asyncio.gather(*(each.has(key) for each in self))
        return [each for each, there in zip(self, has, strict=True) if there]

    async def _letters_of(self, served: Served, tenant: str, count: int) -> list[DeadLetter]:
        letters = await served.pipeline.dead_letters(tenant, count=count)
        if served is self.default:
            return letters
        # An id is a time and a number in its own deployment: letters of two models can have the same one.
        return [replace(letter, id=f"{letter.id}.{served.card.name}") for letter in letters]
