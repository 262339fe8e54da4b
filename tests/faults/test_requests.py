"""Requests that end a worker, that are cancelled, that come twice: each ends as it should, and its neighbours too."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from typing import Any

import grpc.aio
import pytest
import redis.asyncio as redis

from streamflow.client import AsyncClient
from streamflow.errors import AlreadyExistsError, DeadlineError, GenerationError
from streamflow.transport.keys import Keys
from streamflow.types import JobState, Stage
from streamflow.v1 import gateway_pb2_grpc, types_pb2
from tests.faults.harness import (
    ATTEMPTS,
    Asked,
    Drained,
    Tally,
    ask,
    check,
    counters,
    descriptors,
    everything,
    light_deployment,
    requests,
)
from tests.faults.light_stage import CURSE, HANG, ONCE, POISON

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

STAGES = {stage.service: stage.value for stage in Stage}


@pytest.mark.parametrize("how", [POISON, pytest.param(CURSE, marks=pytest.mark.full)])
async def test_14_poison_ends_alone(how: str, tally: Tally) -> None:
    sent = requests(20, "neighbour", steps=30)
    bad = Asked(f"{how}-bad", f"a {how}", 1, 20, state=JobState.ERROR)
    async with light_deployment(denoisers=2, slots=8) as deployment, AsyncClient(deployment.address) as client:
        answers = await asyncio.gather(*(ask(client, asked) for asked in [*sent[:10], bad, *sent[10:]]))
        error = answers.pop(10)
        assert isinstance(error, GenerationError), error
        assert error.stage == "denoiser"
        assert answers == [asked.files for asked in sent]
        [letter] = await client.dead_letters()
        assert (letter.request_id, letter.attempts) == (bad.request_id, ATTEMPTS)
        await check(deployment, client, [*sent, bad], tally)
        # Each attempt cost its worker where it could, and nobody else's work did.
        died = {name: process.restarts for name, process in deployment.processes.items() if process.restarts}
        assert sum(died.values()) == (ATTEMPTS if how == POISON else 0), died
        assert died.keys() <= {"denoiser-1", "denoiser-2"}


@pytest.mark.full
async def test_5_a_hung_denoiser_loses_its_work(tally: Tally) -> None:
    sent = requests(16, "beside", steps=30)
    # What hangs once comes with its pictures, from the next attempt.
    once = Asked(f"{HANG}-{ONCE}", f"a {HANG} {ONCE}", 2, 20, num_images=2)
    # What hangs in every attempt ends as poison does; what is beside it must not.
    bad = Asked(f"{HANG}-bad", f"a {HANG}", 1, 20, state=JobState.ERROR)
    settings = {"progress_timeout_s": 1.0}
    async with (
        light_deployment(settings=settings, denoisers=2, slots=8) as deployment,
        AsyncClient(deployment.address) as client,
    ):
        began = time.monotonic()
        answers = await asyncio.gather(*(ask(client, asked) for asked in [*sent, once, bad]))
        tally.recovery_s = time.monotonic() - began
        error = answers.pop()
        assert isinstance(error, GenerationError), error
        assert answers == [asked.files for asked in [*sent, once]]
        [letter] = await client.dead_letters()
        assert (letter.request_id, letter.attempts) == (bad.request_id, ATTEMPTS)
        handed_back = [(await counters(deployment, f"denoiser-{k}"))["handed_back_total"] for k in (1, 2)]
        assert sum(handed_back) >= ATTEMPTS + once.num_images
        await check(deployment, client, [*sent, once, bad], tally)


@pytest.mark.full
async def test_14_a_dead_letter_is_tried_again(tally: Tally) -> None:
    bad = Asked(f"{CURSE}-once", f"a {CURSE}", 1, 20, state=JobState.ERROR)
    async with light_deployment(slots=8) as deployment, AsyncClient(deployment.address) as client:
        await ask(client, bad)
        [letter] = await client.dead_letters()
        assert (letter.request_id, letter.service, letter.prompts) == (bad.request_id, "denoiser", (bad.prompt,))
        # Still cursed, so it ends the same way, as a job of its own.
        again = await client.retry(letter.id)
        with pytest.raises(GenerationError):
            async for _ in client.watch(again.request_id):
                pass
        assert [one.request_id for one in await client.dead_letters()] == [again.request_id]
        await check(deployment, client, [bad], tally)


@pytest.mark.parametrize(
    "stage", [*(pytest.param(stage, marks=pytest.mark.full) for stage in ("waiting", "encoder", "decoder")), "denoiser"]
)
async def test_15_the_deadline_passes_in_every_stage(stage: str, tally: Tally) -> None:
    place, waits = STAGES.get(stage, stage), stage == "waiting"
    kept = requests(4, f"kept-{stage}", steps=10)
    late = [
        Asked(f"late-{stage}-{k}", "late", k, 4 if stage == "decoder" else 100, state=JobState.DEADLINE)
        for k in range(6)
    ]
    # They fill the stages, so that the late ones are never let in.
    before = [Asked(f"before-{k}", "before", k, 100, state=JobState.CANCELLED) for k in range(4 * waits)]
    async with (
        light_deployment(settings={"step_s": 0.05}, slots=2 if waits else 16) as deployment,
        AsyncClient(deployment.address) as client,
        redis.from_url(deployment.redis_url, decode_responses=True) as store,
    ):
        frozen = deployment.processes[f"{stage}-1"].pid if stage in ("encoder", "decoder") else None
        if frozen:
            os.kill(frozen, signal.SIGSTOP)
        for asked in before:
            await client.submit(asked.prompt, **asked.options)
        # Before anything is measured: later they would be refused at once.
        asks = [asyncio.create_task(ask(client, asked, timeout_s=2.0)) for asked in late]
        while {where.partition(":")[0] for where in await places(store, late)} != {place}:
            assert not any(one.done() for one in asks), f"not all were in {place} by their deadline"
            await asyncio.sleep(0.02)
        answers = await asyncio.gather(*asks)
        assert all(isinstance(answer, DeadlineError) for answer in answers), answers
        # A moment later than by the clients' clocks: until then a decoder that wakes up may still be in time.
        await asyncio.sleep(max(0.0, await seconds_left(store, late)))
        if frozen:
            os.kill(frozen, signal.SIGCONT)
        for asked in before:
            await client.cancel(asked.request_id)
        await everything(client, kept)
        await check(deployment, client, [*kept, *late, *before], tally)


async def seconds_left(store: redis.Redis, sent: Sequence[Asked]) -> float:
    """Until the last of their deadlines, by the clock that decides."""
    deadlines = [float(await store.hget(Keys("default").job(asked.request_id), "deadline")) for asked in sent]
    seconds, microseconds = await store.time()
    return max(deadlines) - seconds - microseconds / 1e6


async def places(store: redis.Redis, sent: Sequence[Asked]) -> list[str]:
    """Where the first image of each is, as its job says."""
    keys = Keys("default")
    return [await store.hget(keys.job(asked.request_id), "i0") or "nowhere" for asked in sent]


async def test_15_cancelled_work_stops_at_once(tally: Tally) -> None:
    """Within a step or two, not with the next heartbeat."""
    drained = Drained()
    sent = [Asked(f"unwanted-{k}", "cancelled", k, 100, state=JobState.CANCELLED) for k in range(8)]
    settings = {"lease_s": 20.0, "step_s": 0.1, "log_format": "json"}
    async with (
        light_deployment(settings=settings, slots=16, on_line=drained.take) as deployment,
        AsyncClient(deployment.address) as client,
    ):
        for asked in sent:
            await client.submit(asked.prompt, **asked.options)
        # All of them are in the middle of it.
        while (await counters(deployment, "denoiser-1"))["steps_total"] < 3 * len(sent):  # noqa: ASYNC110 - remote
            await asyncio.sleep(0.02)
        await asyncio.gather(*(client.cancel(asked.request_id) for asked in sent))
        made = (await counters(deployment, "denoiser-1"))["steps_total"]
        await check(deployment, client, sent, tally)
    # Each would have gone on for a hundred steps of 0.1 s; a beat comes every 5 s, and the drain waits as long.
    assert made <= drained.counters["steps_total"] <= made + 2 * len(sent)
    tally.note = f"{made} steps when they were cancelled, {drained.counters['steps_total']} in the end"


async def test_20_bad_input_beside_good(tally: Tally) -> None:
    """Refused with INVALID_ARGUMENT, never UNKNOWN, while others are served; the space of it is in tests/properties."""
    sent = requests(12, "good", steps=40)
    generate = "/streamflow.v1.Gateway/Generate"
    bad = [b"\xff" * 100, b"\x0a\x05ab", b"\x1a\x02\xff\xfe", b"\x1a\x01a" + b"\x0b" * 5000, bytes(1000)]
    hostile: list[dict[str, Any]] = [
        {"steps": 0},
        {"steps": 2**31},
        {"width": 65},
        {"guidance_scale": float("nan")},
        {"num_images": 10**6},
        {"sampler": "euler[" + "," * 10_000 + "]"},
        {"request_id": "../" * 10},
        {"init_image": b"\x89PNG\r\n\x1a\n" + bytes(100)},
    ]
    async with light_deployment(slots=8) as deployment, AsyncClient(deployment.address) as client:
        work = asyncio.create_task(everything(client, sent))
        async with grpc.aio.insecure_channel(deployment.address) as channel:
            raw = channel.unary_stream(generate)
            for data in bad * 4:
                with pytest.raises(grpc.aio.AioRpcError) as refusal:
                    async for _ in raw(data):
                        pass
                assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT, refusal.value
            stub: Any = gateway_pb2_grpc.GatewayStub(channel)
            for fields in hostile * 4:
                with pytest.raises(grpc.aio.AioRpcError) as refusal:
                    await stub.Submit(types_pb2.GenerateRequest(prompts=["a"], **fields))
                assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT, refusal.value
        await work
        await check(deployment, client, sent, tally)


@pytest.mark.full
async def test_21_clients_killed_in_the_middle(tally: Tally) -> None:
    """What they asked for is cancelled when their watch lease runs out; the gateway keeps nothing of them."""
    code = (
        "import sys\n"
        "from streamflow.client import Client\n"
        "for event in Client(sys.argv[1]).stream('never seen', steps=100, request_id=sys.argv[2], num_images=2,"
        " width=64, height=64):\n"
        "    print(type(event).__name__, flush=True)\n"
    )
    sent = [Asked(f"orphan-{k}", "never seen", 0, 100, 2, state=JobState.CANCELLED) for k in range(8)]
    kept = requests(6, "kept-beside", steps=10)
    async with (
        light_deployment(settings={"step_s": 0.2, "watch_lease_s": 6.0}, slots=32) as deployment,
        AsyncClient(deployment.address) as client,
        redis.from_url(deployment.redis_url) as store,
    ):
        await everything(client, kept[:3])
        files = descriptors(deployment, "gateway")
        clients = [
            await asyncio.create_subprocess_exec(
                sys.executable, "-c", code, deployment.address, asked.request_id, stdout=asyncio.subprocess.PIPE
            )
            for asked in sent
        ]
        for one in clients:
            assert one.stdout is not None
            await one.stdout.readline()
        assert await open_streams(store) == len(sent)
        for one in clients:
            one.kill()
            await one.wait()
        began = time.monotonic()
        while await open_streams(store):
            assert time.monotonic() < began + 5
            await asyncio.sleep(0.02)
        # The gateway let go of them because their clients went, not because their jobs ended.
        assert not any([(await client.job(asked.request_id)).state.terminal for asked in sent])
        await everything(client, kept[3:])
        while not all([(await client.job(asked.request_id)).state.terminal for asked in sent]):
            assert time.monotonic() < began + 20
            await asyncio.sleep(0.1)
        tally.recovery_s = time.monotonic() - began
        await check(deployment, client, [*kept, *sent], tally)
        assert descriptors(deployment, "gateway") <= files + 2


async def open_streams(store: redis.Redis) -> int:
    """Jobs that a gateway listens to, for whoever follows them."""
    return len(await store.pubsub_channels(Keys("default").events("*").replace("{", "\\{")))


@pytest.mark.full
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


async def test_18_twenty_clients_with_one_id_and_the_first_leaves(tally: Tally) -> None:
    asked, drained = Asked("one", "the same for everybody", 5, 60, num_images=2), Drained()
    async with (
        light_deployment(settings={"step_s": 0.1, "log_format": "json"}, on_line=drained.take) as deployment,
        contextlib.AsyncExitStack() as stack,
    ):
        clients = [await stack.enter_async_context(AsyncClient(deployment.address)) for _ in range(20)]
        first = asyncio.create_task(ask(clients[0], asked))
        while not await clients[1].jobs():  # noqa: ASYNC110 - remote
            await asyncio.sleep(0.02)
        asks = [asyncio.create_task(ask(client, asked)) for client in clients[1:]]
        other = await ask(clients[2], Asked("one", "another picture", 5, 60))
        assert isinstance(other, AlreadyExistsError)
        while (await clients[2].status()).counters.get("attached_total") != len(asks):  # noqa: ASYNC110 - remote
            await asyncio.sleep(0.02)
        # In the middle of it the one leaves whose request began the job.
        assert (await counters(deployment, "denoiser-1"))["steps_total"] < asked.steps * asked.num_images
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        assert first.cancelled()
        assert await asyncio.gather(*asks) == [asked.files] * len(asks)
        assert [job.request_id for job in await clients[1].jobs()] == [asked.request_id]
        await check(deployment, clients[1], [asked], tally)
    assert drained.counters["steps_total"] == asked.steps * asked.num_images
