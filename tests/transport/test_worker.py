"""The stage worker, over every transport: nothing is lost, nothing is done twice, nobody else pays for a failure."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from dataclasses import replace

import pytest

from streamflow.errors import DeadlineError, GenerationError, JobCancelledError, UnavailableError
from streamflow.transport.base import Entry, Heartbeat, ImageRef, Transport
from streamflow.transport.embedded import EmbeddedRedis
from streamflow.transport.handling import Advance, EntryContext, Finish, Outcome, WorkRecord
from streamflow.transport.redis_client import Calls
from streamflow.transport.redis_streams import RedisTransport
from streamflow.types import Failure, JobState, Stage
from tests.transport.workers import STEADY, Hold, ended, make_worker, running
from tests.transport.worlds import FAST, QUIET, World, new_job


@pytest.fixture
def steady(world: World) -> Transport:
    return world.open(policy=STEADY)


async def test_three_stages_carry_jobs_to_their_end(steady, eventually):
    def go_on(to: Stage):
        async def handle(context: EntryContext) -> Outcome:
            payload = {**context.entry.payload, context.entry.stage.value: b"%d" % context.entry.ref.index}
            return Advance(to, payload, warnings=(f"through {context.entry.stage}",))

        return handle

    async def finish(context: EntryContext) -> Outcome:
        return Finish(context.entry.payload["encode"] + context.entry.payload["denoise"])

    workers = [
        make_worker(steady, go_on(Stage.DENOISE), stage=Stage.ENCODE, worker_id="e"),
        make_worker(steady, go_on(Stage.DECODE), stage=Stage.DENOISE, worker_id="n"),
        make_worker(steady, finish, stage=Stage.DECODE, worker_id="d"),
    ]
    async with running(workers[0]), running(workers[1]), running(workers[2]):
        for k in range(4):
            await steady.admit(new_job(f"j{k}", num_images=3))
        for k in range(4):
            view = await eventually(ended(steady, f"j{k}"))
            assert view.state is JobState.IMAGES
            assert sorted(view.warnings) == ["through denoise", "through encode"]
            assert [await steady.result(ImageRef(f"j{k}", n)) for n in range(3)] == [b"00", b"11", b"22"]
        assert {worker.worker_id for worker in await steady.workers()} == {"e", "n", "d"}
    assert await steady.backlog() == QUIET
    assert await steady.workers() == []
    assert [worker.counters["ended_total"] for worker in workers] == [12, 12, 12]


async def test_no_more_than_its_capacity_is_in_hand(steady, eventually):
    hold = Hold()
    worker = make_worker(steady, hold, capacity=2)
    async with running(worker):
        await steady.admit(new_job(num_images=5))
        await eventually(hold.has(2))
        assert (worker.in_hand, len(hold.seen)) == (2, 2)
        hold.let_go.set()
        assert (await eventually(ended(steady))).num_finished == 5


async def test_it_says_what_it_holds_in_the_registry(steady, eventually):
    hold = Hold()
    async with running(make_worker(steady, hold, register_every_s=0.05)):
        await steady.admit(new_job(num_images=2))

        async def two_in_use():
            return [worker.slots_in_use for worker in await steady.workers()] == [2]

        await eventually(two_in_use)


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (GenerationError("the network gave NaN"), JobState.ERROR, "INTERNAL"),
        (DeadlineError("too late"), JobState.DEADLINE, "DEADLINE_EXCEEDED"),
        (JobCancelledError("not wanted"), JobState.CANCELLED, "CANCELLED"),
    ],
)
async def test_what_a_handler_raises_decides(steady, eventually, error, state, code):
    async def handle(context: EntryContext) -> Outcome:
        raise error

    async with running(make_worker(steady, handle)):
        await steady.admit(new_job())
        view = await eventually(ended(steady))
    assert (view.state, view.failure) == (state, Failure(code, str(error), "encoder"))


async def test_a_failure_that_will_pass_does_not_count(steady, eventually):
    attempts = []

    async def handle(context: EntryContext) -> Outcome:
        attempts.append(context.entry.attempt)
        if len(attempts) < 5:
            raise UnavailableError("a blob store is away")
        return Finish(b"picture")

    async with running(make_worker(steady, handle)):
        await steady.admit(new_job())
        assert (await eventually(ended(steady))).state is JobState.IMAGES
    assert attempts == [1] * 5


async def test_attempts_that_fail_at_once_have_pauses_between_them(steady, eventually):
    at_s: list[float] = []

    async def handle(context: EntryContext) -> Outcome:
        at_s.append(asyncio.get_running_loop().time())
        raise RuntimeError("the network crashed")

    async with running(make_worker(steady, handle, capacity=1)):
        await steady.admit(new_job())
        assert (await eventually(ended(steady))).state is JobState.ERROR
    first, second, third = at_s
    assert second - first > 0.045
    assert third - second > 0.095


async def test_an_entry_may_come_back_before_its_first_task_is_seen_to_end(world, eventually, monkeypatch):
    # No beat ends the first task in between.
    transport = world.open(policy=replace(FAST, lease_s=60))
    hold, taken_again = Hold(), asyncio.Event()
    hand_back = transport.hand_back

    async def slow_hand_back(*args, **kwargs) -> int:
        """The reply comes when the next attempt has begun."""
        count = await hand_back(*args, **kwargs)
        if args[2] is not None:
            await taken_again.wait()
        return count

    async def handle(context: EntryContext) -> Outcome:
        if not hold.seen:
            hold.seen.append(("", 0))
            raise UnavailableError("a blob store is away")
        taken_again.set()
        return await hold(context)

    monkeypatch.setattr(transport, "hand_back", slow_hand_back)
    worker = make_worker(transport, handle)
    async with running(worker):
        await transport.admit(new_job())
        await eventually(hold.has(2))
        first = [task for task in asyncio.all_tasks() if task.get_name().endswith("a:0 attempt 1")]

        async def only_one_is_left():
            return sum(not task.done() for task in first) == 1

        await eventually(only_one_is_left)
        await asyncio.sleep(0)
        assert worker.in_hand == 1
        hold.let_go.set()
        assert (await eventually(ended(transport))).state is JobState.IMAGES


async def test_a_poisonous_image_ends_alone(steady, eventually):
    together: list[set[str]] = []
    in_hand: set[str] = set()

    async def handle(context: EntryContext) -> Outcome:
        name = context.entry.ref.job_id
        in_hand.add(name)
        try:
            if name == "poison":
                if context.entry.attempt > 1:
                    together.append(set(in_hand))
                raise RuntimeError("the network crashed")
            # Whatever is admitted beside a second delivery would be seen here.
            for _ in range(5):
                await asyncio.sleep(0.01)
                assert context.entry.attempt == 1
            return Finish(b"picture")
        finally:
            in_hand.discard(name)

    worker = make_worker(steady, handle, capacity=3)
    async with running(worker):
        for name in ("n1", "n2", "poison", "n3", "n4", "n5"):
            await steady.admit(new_job(name))
        view = await eventually(ended(steady, "poison"))
        for name in ("n1", "n2", "n3", "n4", "n5"):
            assert (await eventually(ended(steady, name))).state is JobState.IMAGES
    assert (view.state, view.failure.stage) == (JobState.ERROR, "encoder")
    assert len(together) == 2
    assert worker.counters["handed_back_total"] == 3


async def test_nothing_is_read_beside_a_second_delivery(world, eventually):
    transport = world.open(policy=STEADY)
    hold = Hold()
    await transport.admit(new_job("second"))
    await transport.read(Stage.ENCODE, "dead", 1, block_s=0)
    await transport.hand_back(Stage.ENCODE, "dead", None, count_attempt=True)
    worker = make_worker(world.open(policy=STEADY), hold)
    async with running(worker):
        await eventually(hold.has(1))
        await transport.admit(new_job("first"))
        # Another worker is free to take it, so it was there to be read.
        [entry] = await transport.read(Stage.ENCODE, "other", 1, block_s=0)
        await transport.hand_back(Stage.ENCODE, "other", [entry], count_attempt=False)
        await asyncio.sleep(0.2)
        assert hold.seen == [("second:0", 2)]
        hold.let_go.set()
        await eventually(ended(transport, "first"))
    assert hold.seen == [("second:0", 2), ("first:0", 1)]


async def test_work_that_does_not_get_on_is_stopped(steady, eventually):
    attempts = []

    async def handle(context: EntryContext) -> Outcome:
        attempts.append(context.entry.attempt)
        await asyncio.Event().wait()
        raise AssertionError

    async with running(make_worker(steady, handle, progress_timeout_s=0.1)):
        await steady.admit(new_job())
        view = await eventually(ended(steady))
    assert attempts == [1, 2, 3]
    assert (view.state, view.failure.code) == (JobState.ERROR, "INTERNAL")


async def test_a_late_beat_does_not_stop_the_next_attempt(steady, eventually, monkeypatch):
    attempts, again = [], asyncio.Event()

    async def late_beat(stage: Stage, worker_id: str, entries: Iterable[Entry]) -> Heartbeat:
        """The answer for the first attempt comes during the second one."""
        lost = frozenset(entry.id for entry in entries if entry.attempt == 1)
        await again.wait()
        return Heartbeat(lost=lost)

    async def handle(context: EntryContext) -> Outcome:
        attempts.append(context.entry.attempt)
        if context.entry.attempt == 1:
            await asyncio.Event().wait()
        again.set()
        await asyncio.sleep(0.5)
        return Finish(b"picture")

    monkeypatch.setattr(steady, "heartbeat", late_beat)
    async with running(make_worker(steady, handle, progress_timeout_s=1.0)):
        await steady.admit(new_job())
        view = await eventually(ended(steady))
    assert (view.state, attempts) == (JobState.IMAGES, [1, 2])


async def test_work_that_gets_on_may_take_long(world, eventually):
    transport = world.open(policy=STEADY)
    context_of = []

    async def handle(context: EntryContext) -> Outcome:
        context_of.append(context)
        for _ in range(20):
            await asyncio.sleep(0.1)  # 2 s together: more than the lease and the progress time-out
            context.progress()
        return Finish(b"picture")

    async with running(make_worker(transport, handle, progress_timeout_s=1.5)):
        await transport.admit(new_job())
        other = world.open(policy=STEADY)
        while not (view := await transport.job("a")).state.terminal:
            assert await other.read(Stage.ENCODE, "other", 1, block_s=0.1) == [] or not context_of
    assert view.state is JobState.IMAGES
    assert len(context_of) == 1
    context_of[0].progress()  # late, and harmless


async def test_the_deadline_ends_the_work(steady, eventually):
    hold = Hold()
    async with running(make_worker(steady, hold)):
        await steady.admit(new_job(timeout_s=0.3))
        view = await eventually(ended(steady))
    assert (view.state, view.failure.code) == (JobState.DEADLINE, "DEADLINE_EXCEEDED")
    assert hold.cancelled == ["a:0"]


async def test_a_cancelled_job_frees_its_worker(steady, eventually):
    hold = Hold()
    worker = make_worker(steady, hold, capacity=1)
    async with running(worker):
        await steady.admit(new_job("unwanted"))
        await eventually(hold.has(1))
        await steady.admit(new_job("next"))
        await steady.cancel("unwanted")
        await eventually(hold.has(2))
        assert hold.cancelled == ["unwanted:0"]
        hold.let_go.set()
        assert (await eventually(ended(steady, "next"))).state is JobState.IMAGES


async def test_work_of_no_more_use_stops_without_waiting_for_a_beat(world, eventually):
    patient = replace(FAST, lease_s=60.0)
    gateway, hold = world.open(policy=patient), Hold()
    async with running(make_worker(world.open(policy=patient), hold)):
        await gateway.admit(new_job("unwanted", num_images=2))
        await gateway.admit(new_job("wanted"))
        await eventually(hold.has(3))
        await gateway.cancel("unwanted")
        await eventually(lambda: asyncio.sleep(0, len(hold.cancelled) == 2))
    assert sorted(hold.cancelled[:2]) == ["unwanted:0", "unwanted:1"]


async def test_a_lost_entry_is_let_go(world, eventually):
    gateway = world.open(policy=STEADY)
    hold = Hold()
    worker = make_worker(world.open(policy=STEADY), hold, capacity=1)
    async with running(worker):
        await gateway.admit(new_job())
        await eventually(hold.has(1))
        # As if its lease had lapsed: somebody else has it now.
        await gateway.hand_back(Stage.ENCODE, "w", None, count_attempt=False)
        [entry] = await gateway.read(Stage.ENCODE, "other", 1, block_s=0)

        async def let_go():
            return hold.cancelled == ["a:0"]

        await eventually(let_go)
        # It was put down as well, so it may come again.
        await gateway.hand_back(Stage.ENCODE, "other", [entry], count_attempt=False)
        await eventually(hold.has(2))
        hold.let_go.set()
        await eventually(ended(gateway))
    assert worker.counters["lost_total"] == 1


async def moved_before_its_answer(transport: Transport, monkeypatch, eventually, *, lost: bool) -> None:
    """An image is elsewhere for some beats before its worker knows that its own move did that."""
    where, name = (Calls, "script") if lost else (transport, "advance")
    move, heartbeat = getattr(where, name), transport.heartbeat
    beats: list[Heartbeat] = []
    moved: list[int] = []
    told: list[WorkRecord] = []

    async def slow_move(*args, **kwargs) -> object:
        answer = await move(*args, **kwargs)
        if "advance" in (name, *args) and not moved:
            moved.append(len(beats))
            await eventually(lambda: asyncio.sleep(0, len(beats) >= moved[0] + 3))
            if lost:
                raise UnavailableError("the answer was lost")
        return answer

    async def watched_beat(*args) -> Heartbeat:
        beats.append(await heartbeat(*args))
        return beats[-1]

    async def handle(context: EntryContext) -> Outcome:
        return Advance(Stage.DENOISE, {})

    monkeypatch.setattr(where, name, slow_move)
    monkeypatch.setattr(transport, "heartbeat", watched_beat)
    worker = make_worker(transport, handle, on_worked=told.append)
    async with running(worker):
        await transport.admit(new_job())
        await eventually(lambda: asyncio.sleep(0, told))
    # The first one may have been on its way.
    assert all(beat.lost for beat in beats[moved[0] + 1 :])
    assert [record.outcome for record in told] == ["advanced"]
    assert +worker.counters == {"ended_total": 1}


async def test_a_beat_that_overtakes_the_answer_of_a_move_stops_nothing(steady, monkeypatch, eventually):
    await moved_before_its_answer(steady, monkeypatch, eventually, lost=False)


async def test_a_move_whose_answer_was_lost_is_known_again_after_a_beat(redis_world, monkeypatch, eventually):
    await moved_before_its_answer(redis_world.open(policy=STEADY), monkeypatch, eventually, lost=True)


async def test_an_outcome_that_cannot_be_stored_is_let_go_once_nobody_waits_for_it(steady, eventually, monkeypatch):
    tries = 0
    told: list[WorkRecord] = []

    async def refuse(*args) -> bool:
        nonlocal tries
        tries += 1
        raise UnavailableError("too large to be sent in time")

    async def handle(context: EntryContext) -> Outcome:
        return Finish(b"picture")

    monkeypatch.setattr(steady, "finish", refuse)
    worker = make_worker(steady, handle, on_worked=told.append)
    async with running(worker):
        await steady.admit(new_job())
        await eventually(lambda: asyncio.sleep(0, tries >= 3))
        assert worker.in_hand == 1
        await steady.cancel("a")
        await eventually(lambda: asyncio.sleep(0, not worker.in_hand))
    assert [record.outcome for record in told] == ["late"]
    assert +worker.counters == {"late_total": 1}


async def test_a_drain_waits_for_what_is_in_hand(steady, eventually):
    hold = Hold()
    worker = make_worker(steady, hold)
    async with running(worker) as run:
        await steady.admit(new_job(num_images=3))
        await eventually(hold.has(3))
        draining = asyncio.create_task(worker.drain(30))
        await steady.admit(new_job("later"))
        await asyncio.sleep(0)
        hold.let_go.set()
        report = await draining
        await run
    assert report.finished == 3
    assert (await steady.job("a")).state is JobState.IMAGES
    # A read that was under way may have got it, but nobody began with it.
    assert len(hold.seen) == 3
    [entry] = await steady.read(Stage.ENCODE, "other", 9, block_s=0)
    assert (entry.ref.job_id, entry.attempt) == ("later", 1)
    assert await steady.workers() == []


async def test_a_second_drain_may_be_shorter(steady, eventually):
    hold = Hold()
    worker = make_worker(steady, hold)
    async with running(worker) as run:
        await steady.admit(new_job())
        await eventually(hold.has(1))
        patient = asyncio.create_task(worker.drain(60))
        await asyncio.sleep(0)
        assert worker.draining
        async with asyncio.timeout(10):
            assert (await worker.drain(0.05)).handed_back == 1
            assert (await patient).handed_back == 1
            await run
    assert hold.cancelled == ["a:0"]


async def test_a_drain_hands_back_what_takes_too_long(world, eventually):
    transport = world.open(policy=STEADY)
    hold = Hold()
    worker = make_worker(world.open(policy=STEADY), hold)
    async with running(worker) as run:
        await transport.admit(new_job(num_images=3))
        await eventually(hold.has(3))
        report = await worker.drain(0.05)
        await run
    assert (report.finished, report.handed_back) == (0, 3)
    assert len(hold.cancelled) == 3
    # At once, and as if nobody had tried.
    entries = await transport.read(Stage.ENCODE, "other", 9, block_s=0)
    assert [entry.attempt for entry in entries] == [1, 1, 1]


async def test_at_the_end_of_a_drain_handlers_may_hand_over_what_they_have(world, eventually):
    """What is handed over is a new entry of the same stage, which holds how far it is."""
    transport = world.open(policy=STEADY)
    leaving, begun = asyncio.Event(), []

    async def handle(context: EntryContext) -> Outcome:
        begun.append(context.entry.ref.index)
        if context.entry.ref.index == 2:
            await asyncio.Event().wait()  # does not listen
        await leaving.wait()
        return Advance(Stage.ENCODE, {"done": b"half"})

    told = []
    worker = make_worker(world.open(policy=STEADY), handle, suspend=leaving.set, on_worked=told.append)
    async with running(worker) as run:
        await transport.admit(new_job(num_images=3))
        await eventually(lambda: asyncio.sleep(0, len(begun) == 3))
        report = await worker.drain(0.05)
        await run
    assert (report.finished, report.handed_back) == (0, 3)
    entries = await transport.read(Stage.ENCODE, "other", 9, block_s=0)
    found = {entry.ref.index: (entry.attempt, dict(entry.payload)) for entry in entries}
    assert found == {0: (1, {"done": b"half"}), 1: (1, {"done": b"half"}), 2: (1, {})}
    # Counted, told and timed alike: none of them was made here.
    outcomes = {record.entry.ref.index: record.outcome for record in told}
    assert outcomes == {0: "handed_back", 1: "handed_back", 2: "dropped"}
    assert worker.counters["handed_back_total"] == 3
    assert worker.info().image_ms == 0


async def test_a_cancelled_worker_leaves_nothing_in_its_name(world, eventually):
    transport = world.open(policy=STEADY)
    hold = Hold()
    async with running(make_worker(world.open(policy=STEADY), hold)):
        await transport.admit(new_job(num_images=2))
        await eventually(hold.has(2))

    async def handed_back():
        return await transport.read(Stage.ENCODE, "other", 9, block_s=0)

    # Nobody asked it to leave: what it held may be why.
    assert [entry.attempt for entry in await eventually(handed_back)] == [2, 2]
    assert await transport.workers() == []


async def test_a_place_that_is_lent_is_not_filled_from_the_stream(world, eventually):
    transport = world.open(policy=STEADY)
    hold = Hold()
    worker = make_worker(world.open(policy=STEADY), hold, capacity=2)
    async with running(worker):
        with worker.lend():
            await transport.admit(new_job(num_images=2))
            await eventually(hold.has(1))
            await asyncio.sleep(0.1)
            assert worker.in_hand == 1
        await eventually(hold.has(2))
        hold.let_go.set()
        assert (await eventually(ended(transport))).state is JobState.IMAGES


def test_a_worker_without_room_is_a_mistake(transport):
    with pytest.raises(ValueError, match="capacity"):
        make_worker(transport, Hold(), capacity=0)


async def test_it_tells_what_became_of_every_entry(steady, eventually) -> None:
    told = {}

    async def handle(context: EntryContext) -> Outcome:
        name = context.entry.ref.job_id
        context.note("began", number=len(told))
        context.image_s = 12.5
        if name == "fails":
            raise GenerationError("the network gave NaN")
        if name == "gone":
            await asyncio.Event().wait()
        return Finish(b"picture")

    def on_worked(record) -> None:
        told[record.entry.ref.job_id] = record
        raise RuntimeError("who watches must not stop the work")

    worker = make_worker(steady, handle, on_worked=on_worked)
    async with running(worker):
        for name in ("fine", "fails", "gone"):
            await steady.admit(new_job(name))
        await eventually(ended(steady, "fine"))
        await eventually(ended(steady, "fails"))
        await steady.cancel("gone")

        async def all_told() -> bool:
            return len(told) == 3

        await eventually(all_told)
    assert {name: record.outcome for name, record in told.items()} == {
        "fine": "finished",
        "fails": "failed",
        "gone": "dropped",
    }
    assert {name: record.image_s for name, record in told.items()} == {"fine": 12.5, "fails": None, "gone": None}
    for record in told.values():
        assert [note.name for note in record.notes] == ["began"]
        assert 0 <= record.worked_s < 30
        assert 0 <= record.waited_s < 30
    assert worker.info().image_ms > 0


async def test_counters_begin_at_zero(steady):
    names = ("ended_total", "late_total", "handed_back_total", "lost_total", "cancelled_total")
    assert make_worker(steady, Hold()).info().counters == dict.fromkeys(names, 0)


async def test_a_store_that_is_away_makes_no_image_dearer(deployment, eventually):
    away_s = 1.5
    with EmbeddedRedis() as server:
        transport = RedisTransport.from_url(server.url, deployment=deployment, policy=replace(FAST, lease_s=60.0))

        async def handle(context: EntryContext) -> Outcome:
            if context.entry.ref.job_id == "a":
                server.kill()
            return Finish(b"picture")

        worker = make_worker(transport, handle)
        async with running(worker):
            await transport.admit(new_job("a"))
            await eventually(lambda: asyncio.sleep(0, worker.in_hand == 1))
            await asyncio.sleep(away_s)
            assert worker.in_hand == 1
            server.start()
            await eventually(ended(transport, "a"))
            await transport.admit(new_job("b"))
            await eventually(ended(transport, "b"))
            await eventually(lambda: asyncio.sleep(0, not worker.in_hand))
        assert 0 < worker.info().image_ms < 250 * away_s
        await transport.close()
