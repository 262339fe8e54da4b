"""Nothing arrives any more, and nobody is told: what must hold then, however the silence is made."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from streamflow.cli.supervisor import LocalDeployment
from streamflow.client import AsyncClient
from streamflow.errors import DeadlineError, NotFoundError, StreamFlowError, UnavailableError
from streamflow.types import JobState
from tests.faults.harness import Asked, Tally, ask, check, everything, read_again, requests, settled

IMPATIENT_S = 5.0
"""The deadline of requests that meet a dead connection."""
SLACK_S = 2.0
"""How much later than its deadline a request may end, on a busy machine."""


async def meet_silence(
    deployment: LocalDeployment,
    address: str,
    tally: Tally,
    *,
    begin: Callable[[], object],
    end: Callable[[], object],
) -> None:
    """Who cannot wait gets an error in time; who can, and who comes later, gets pictures."""
    names = ("impatient", "patient", "later")
    impatient, patient, later = (requests(8, name, steps=60) for name in names)
    async with (
        AsyncClient(address, timeout_s=60.0) as client,
        AsyncClient(address, timeout_s=IMPATIENT_S) as impatient_client,
    ):
        waiting = asyncio.create_task(everything(client, patient))
        work = [asyncio.create_task(in_time(impatient_client, asked)) for asked in impatient]
        await asyncio.sleep(0.5)
        begin()
        assert any(await asyncio.gather(*work)), "the silence came too late"
        end()
        # Nobody is told that the connections of before are dead.
        began_s = time.monotonic()
        await everything(client, later)
        tally.recovery_s = time.monotonic() - began_s
        await waiting
        await check(deployment, client, [*patient, *later], tally)
        await check_ended(deployment, client, impatient, tally)


async def in_time(client: AsyncClient, asked: Asked) -> StreamFlowError | None:
    """Asks; the pictures, or an error that says what is wrong, must come by the deadline."""
    began_s = time.monotonic()
    async with asyncio.timeout(60):
        answer = await ask(client, asked)
    took_s = time.monotonic() - began_s
    assert took_s < client.timeout_s + SLACK_S, (asked, took_s, answer)
    if isinstance(answer, list):
        assert answer == asked.files
        return None
    assert isinstance(answer, DeadlineError | UnavailableError), answer
    assert client.address in str(answer) or "not finished within" in str(answer), answer
    return answer


async def check_ended(deployment: LocalDeployment, client: AsyncClient, sent: Sequence[Asked], tally: Tally) -> None:
    """Whatever their clients were told, the jobs end: with their pictures, or because nobody waits for them."""
    tally.requests += len(sent)
    for asked in sent:
        # It may never have been admitted.
        with suppress(NotFoundError):
            while not (job := await client.job(asked.request_id)).state.terminal:  # noqa: ASYNC110 - remote
                await asyncio.sleep(0.1)
            if job.state is JobState.IMAGES:
                assert await read_again(client, asked.request_id) == asked.files
            else:
                assert job.state in (JobState.DEADLINE, JobState.CANCELLED), (asked, job)
    await settled(deployment)
