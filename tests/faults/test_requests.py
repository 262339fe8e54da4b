"""Requests that end a worker, that are cancelled, that come twice: each ends as it should, and its neighbours too."""

from __future__ import annotations

import asyncio

import pytest

from streamflow.client import AsyncClient
from streamflow.errors import AlreadyExistsError, GenerationError
from streamflow.types import JobState
from tests.faults.harness import Asked, Tally, ask, check, light_deployment, requests
from tests.faults.light_stage import CURSE, POISON

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


@pytest.mark.parametrize("how", [POISON, CURSE])
async def test_14_poison_ends_alone(how: str, tally: Tally) -> None:
    sent = requests(20, "neighbour", steps=30)
    bad = Asked(f"{how}-bad", f"a {how}", 1, 20, state=JobState.ERROR)
    async with light_deployment(denoisers=2, slots=8) as deployment, AsyncClient(deployment.address) as client:
        answers = await asyncio.gather(*(ask(client, asked) for asked in [*sent[:10], bad, *sent[10:]]))
        error = answers.pop(10)
        assert isinstance(error, GenerationError), error
        assert error.stage == "denoiser"
        assert answers == [asked.files for asked in sent]
        await check(deployment, client, [*sent, bad], tally)


async def test_15_cancelled_while_it_is_made(tally: Tally) -> None:
    sent = requests(10, "kept", steps=60)
    dropped = [Asked(f"dropped-{k}", "cancelled", k, 100, state=JobState.CANCELLED) for k in range(10)]
    async with light_deployment(slots=16) as deployment, AsyncClient(deployment.address) as client:
        kept = [asyncio.create_task(ask(client, asked)) for asked in sent]
        for asked in dropped:
            await client.submit(asked.prompt, **asked.options)
        for asked in dropped:
            await client.cancel(asked.request_id)
        assert await asyncio.gather(*kept) == [asked.files for asked in sent]
        await check(deployment, client, [*sent, *dropped], tally)


async def test_18_twenty_clients_with_one_id(tally: Tally) -> None:
    asked = Asked("one", "the same for everybody", 5, 60, num_images=2)
    async with light_deployment() as deployment:
        clients = [AsyncClient(deployment.address) for _ in range(20)]
        asks = [asyncio.create_task(ask(client, asked)) for client in clients]
        while not any(job.request_id == asked.request_id for job in await clients[1].jobs()):  # noqa: ASYNC110 - remote
            await asyncio.sleep(0.02)
        other = await ask(clients[2], Asked("one", "another picture", 5, 60))
        assert isinstance(other, AlreadyExistsError)
        answers = await asyncio.gather(*asks)
        assert answers == [asked.files] * 20
        assert len(await clients[0].jobs()) == 1
        await check(deployment, clients[0], [asked], tally)
        for client in clients:
            await client.close()
