"""Nothing is lost or doubled when connections break, servers refuse, or callers leave."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from streamflow import AsyncClient, BusyError, Client, DeadlineError, JobCancelledError, UnavailableError
from streamflow.client import Accepted, Event, ImageReady
from streamflow.types import JobState
from tests.client.deployment import Deployment, in_thread


def indices(events: list[Event]) -> list[int]:
    return [event.info.index for event in events if isinstance(event, ImageReady)]


def id_of(events: list[Event]) -> str:
    assert isinstance(events[0], Accepted)
    return events[0].request_id


@pytest.mark.parametrize("forget", [False, True], ids=["same store", "empty store"])
def test_a_lost_connection_loses_and_doubles_nothing(forget: bool) -> None:
    with Deployment(permits=1) as deployment, Client(deployment.address, timeout_s=60) as client:
        events: list[Event] = []

        def on_event(event: Event) -> None:
            events.append(event)
            if isinstance(event, ImageReady) and event.info.index == 0:
                deployment.kill_gateway()
                deployment.start_gateway(forget=forget)
                deployment.allow(10)

        result = client.generate("a ring", num_images=3, on_event=on_event)
        assert sorted(indices(events)) == [0, 1, 2]
        assert sum(isinstance(event, Accepted) for event in events) == 1
        assert [info.seed for info in result.infos] == [result.seed, result.seed + 1, result.seed + 2]
        job = client.job(result.request_id)
        assert (job.state, job.num_images) == (JobState.IMAGES, 3)
        # Re-attaching made nothing anew; an empty store had to.
        assert len(deployment.worker.painted) == 3


async def test_the_asyncio_client_survives_it_too() -> None:
    with Deployment(permits=1) as deployment:
        async with AsyncClient(deployment.address, timeout_s=60) as client:
            events: list[Event] = []
            async for event in client.stream("a ring", num_images=3):
                events.append(event)
                if isinstance(event, ImageReady) and event.info.index == 0:
                    await asyncio.to_thread(deployment.kill_gateway)
                    await asyncio.to_thread(deployment.start_gateway)
                    deployment.allow(10)
            assert sorted(indices(events)) == [0, 1, 2]
            assert len(deployment.worker.painted) == 3


def test_a_gateway_that_starts_late_is_waited_for() -> None:
    with Deployment() as deployment:
        deployment.kill_gateway()
        starting = in_thread(deployment.start_gateway)
        with Client(deployment.address, connect_timeout_s=20) as client:
            assert len(client.generate("a ring").images) == 1
        starting.join()


def test_a_gateway_that_has_answered_before_is_waited_for_longer() -> None:
    with Deployment() as deployment, Client(deployment.address, timeout_s=30, connect_timeout_s=0.2) as client:
        client.status()
        deployment.kill_gateway()
        starting = threading.Timer(1.5, deployment.start_gateway)
        starting.start()
        assert len(client.generate("a ring").images) == 1
        starting.join()


def test_a_gateway_that_never_comes_back_fails_at_the_deadline() -> None:
    with Deployment(permits=0) as deployment, Client(deployment.address, timeout_s=3) as client:
        stream = client.stream("a ring")
        assert isinstance(next(stream), Accepted)
        deployment.kill_gateway()
        started_s = time.monotonic()
        with pytest.raises((UnavailableError, DeadlineError)):
            list(stream)
        assert time.monotonic() - started_s < 6
        deployment.start_gateway()


def test_a_refusal_for_load_is_tried_again_after_the_delay() -> None:
    with Deployment(permits=0, max_jobs=1) as deployment, Client(deployment.address, timeout_s=30) as client:
        first = client.submit("a ring")
        with Client(deployment.address, max_busy_retries=0) as hasty, pytest.raises(BusyError) as caught:
            hasty.generate("a star")
        assert caught.value.retry_after_s > 0
        freeing = in_thread(lambda: (client.cancel(first.request_id), deployment.allow(5)))
        assert len(client.generate("a star").images) == 1
        freeing.join()


def test_a_refusal_that_outlasts_the_deadline_is_raised_as_such() -> None:
    with Deployment(permits=0, max_jobs=1) as deployment, Client(deployment.address) as client:
        client.submit("a ring")
        with pytest.raises(BusyError):
            client.generate("a star", timeout_s=1.5)


def test_a_refusal_that_outlasts_the_time_budget_is_too() -> None:
    with Deployment(permits=0, max_jobs=1) as deployment, Client(deployment.address) as client:
        client.submit("a ring")
        for ask in (client.generate, client.submit):
            started_s = time.monotonic()
            with pytest.raises(BusyError):
                ask("a star", time_budget_s=1.5)
            assert time.monotonic() - started_s < 5


def test_the_deadline_is_the_jobs_too() -> None:
    with Deployment(permits=0) as deployment, Client(deployment.address) as client:
        with pytest.raises(DeadlineError):
            client.generate("a ring", timeout_s=1, request_id="late")
        deployment.wait_for("late", JobState.DEADLINE)


def test_closing_the_iterator_cancels_the_job() -> None:
    with Deployment(permits=0) as deployment, Client(deployment.address) as client:
        stream = client.stream("a ring")
        accepted = next(stream)
        assert isinstance(accepted, Accepted)
        stream.close()
        assert deployment.state(accepted.request_id) is JobState.CANCELLED


def test_an_iterator_outlives_its_client_quietly() -> None:
    with Deployment(permits=0) as deployment:
        client = Client(deployment.address)
        left, asked = client.stream("a ring"), client.stream("a ring")
        next(left)
        next(asked)
        client.close()
        left.close()
        for ask in (lambda: next(asked), lambda: client.generate("a ring"), client.models):
            with pytest.raises(UnavailableError, match="this client is closed"):
                ask()


async def test_a_closed_asyncio_client_says_so() -> None:
    with Deployment() as deployment:
        async with AsyncClient(deployment.address) as client:
            await client.models()
        for ask in (lambda: client.generate("a ring"), client.models):
            with pytest.raises(UnavailableError, match="this client is closed"):
                await ask()


def test_ctrl_c_cancels_the_job() -> None:
    accepted: list[Event] = []

    def interrupt(event: Event) -> None:
        accepted.append(event)
        raise KeyboardInterrupt

    with Deployment(permits=0) as deployment, Client(deployment.address) as client:
        with pytest.raises(KeyboardInterrupt):
            client.generate("a ring", on_event=interrupt)
        assert deployment.state(id_of(accepted)) is JobState.CANCELLED


async def test_cancelling_the_task_cancels_the_job() -> None:
    with Deployment(permits=0) as deployment:
        async with AsyncClient(deployment.address) as client:
            accepted: asyncio.Queue[Event] = asyncio.Queue()
            task = asyncio.create_task(client.generate("a ring", on_event=accepted.put_nowait))
            first = await asyncio.wait_for(accepted.get(), 20)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert deployment.state(id_of([first])) is JobState.CANCELLED


@pytest.mark.parametrize("leaves", [0, 1], ids=["who began it", "who attached"])
def test_whoever_leaves_a_shared_job_leaves_it_to_the_others(leaves: int) -> None:
    with Deployment(permits=0) as deployment, Client(deployment.address) as client:
        streams = [client.stream("a ring", request_id="ours") for _ in range(2)]
        attached = [event.attached for event in map(next, streams) if isinstance(event, Accepted)]
        assert attached == [False, True]
        streams.pop(leaves).close()
        assert not deployment.state("ours").terminal
        deployment.allow(1)
        assert indices(list(streams[0])) == [0]


async def test_a_task_that_is_cancelled_leaves_a_shared_job_to_the_others() -> None:
    with Deployment(permits=0) as deployment:
        async with AsyncClient(deployment.address) as client:
            accepted: asyncio.Queue[Event] = asyncio.Queue()

            def tell(event: Event) -> None:
                if isinstance(event, Accepted):
                    accepted.put_nowait(event)

            first, second = (
                asyncio.create_task(client.generate("a ring", request_id="ours", on_event=tell)) for _ in range(2)
            )
            for _ in range(2):
                await asyncio.wait_for(accepted.get(), 20)
            first.cancel()
            with pytest.raises(asyncio.CancelledError):
                await first
            assert not deployment.state("ours").terminal
            deployment.allow(1)
            assert len((await second).images) == 1


def test_a_shared_job_that_everybody_has_left_is_cancelled() -> None:
    with Deployment(permits=0, watch_lease_s=0.5) as deployment, Client(deployment.address) as client:
        stream = client.stream("a ring", request_id="ours")
        next(stream)
        stream.close()
        deployment.wait_for("ours", JobState.CANCELLED)


def test_a_job_cancelled_by_another_says_so() -> None:
    with Deployment(permits=0) as deployment, Client(deployment.address) as client:
        stream = client.stream("a ring", request_id="mine")
        next(stream)
        client.cancel("mine")
        with pytest.raises(JobCancelledError):
            list(stream)
