"""Requests that end a worker, that are cancelled, that come twice: each ends as it should, and its neighbours too."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from typing import Any

import grpc.aio
import pytest

from streamflow.client import AsyncClient
from streamflow.errors import AlreadyExistsError, DeadlineError, GenerationError
from streamflow.types import JobState
from streamflow.v1 import gateway_pb2_grpc, types_pb2
from tests.faults.harness import (
    Asked,
    Drained,
    Tally,
    ask,
    check,
    descriptors,
    everything,
    light_deployment,
    requests,
)
from tests.faults.light_stage import CURSE, HANG, POISON

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]


@pytest.mark.parametrize("how", [pytest.param(POISON, marks=pytest.mark.full), CURSE])
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


@pytest.mark.full
async def test_5_a_hung_denoiser_loses_its_work(tally: Tally) -> None:
    sent = requests(16, "beside", steps=30)
    # It hangs in every attempt, so it ends as poison does; what is beside it must not.
    bad = Asked(f"{HANG}-bad", f"a {HANG}", 1, 20, state=JobState.ERROR)
    settings = {"progress_timeout_s": 1.0}
    async with (
        light_deployment(settings=settings, denoisers=2, slots=8) as deployment,
        AsyncClient(deployment.address) as client,
    ):
        began = time.monotonic()
        answers = await asyncio.gather(*(ask(client, asked) for asked in [*sent, bad]))
        tally.recovery_s = time.monotonic() - began
        error = answers.pop()
        assert isinstance(error, GenerationError), error
        assert answers == [asked.files for asked in sent]
        await check(deployment, client, [*sent, bad], tally)


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
    kept = requests(4, f"kept-{stage}", steps=20)
    late = [Asked(f"late-{stage}-{k}", "late", k, 100, state=JobState.DEADLINE) for k in range(6)]
    async with (
        light_deployment(slots=2 if stage == "waiting" else 16) as deployment,
        AsyncClient(deployment.address) as client,
    ):
        frozen = deployment.processes[f"{stage}-1"].pid if stage in ("encoder", "decoder") else None
        if frozen:
            os.kill(frozen, signal.SIGSTOP)
        # Before anything is measured: later they would be refused at once.
        answers = await asyncio.gather(*(ask(client, asked, timeout_s=1.5) for asked in late))
        assert all(isinstance(answer, DeadlineError) for answer in answers), answers
        if frozen:
            os.kill(frozen, signal.SIGCONT)
        await everything(client, kept)
        await check(deployment, client, [*kept, *late], tally)


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
        while (await client.job(sent[-1].request_id)).state is not JobState.RUNNING:  # noqa: ASYNC110 - remote
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.5)
        for asked in sent:
            await client.cancel(asked.request_id)
        await check(deployment, client, sent, tally)
    # Each would have made a hundred steps of 0.1 s; a beat comes every 5 s.
    assert 0 < drained.counters["steps_total"] < 8 * 30


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
        light_deployment(settings={"step_s": 0.15, "watch_lease_s": 4.0}, slots=32) as deployment,
        AsyncClient(deployment.address) as client,
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
        for one in clients:
            one.kill()
            await one.wait()
        await everything(client, kept[3:])
        began = time.monotonic()
        while not all([(await client.job(asked.request_id)).state.terminal for asked in sent]):
            assert time.monotonic() < began + 20
            await asyncio.sleep(0.1)
        tally.recovery_s = time.monotonic() - began
        await check(deployment, client, [*kept, *sent], tally)
        assert descriptors(deployment, "gateway") <= files + 2


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
