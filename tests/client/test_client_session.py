"""The rules of retrying and re-attaching, without a connection: scripted answers, a clock that is set by hand."""

from __future__ import annotations

import pytest

from streamflow.client.events import Event, ImageReady
from streamflow.client.retry import Retry, RetryPolicy
from streamflow.client.session import Session
from streamflow.errors import (
    BusyError,
    DeadlineError,
    InvalidRequestError,
    JobCancelledError,
    NotFoundError,
    StreamFlowError,
    UnavailableError,
)
from streamflow.types import JobState
from streamflow.v1 import gateway_pb2, types_pb2


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Stub:
    """Tells which call was made."""

    def Generate(self, request: object, **_: object) -> str:
        return "Generate"

    def Watch(self, request: object, **_: object) -> str:
        return "Watch"


@pytest.fixture
def clock() -> Clock:
    return Clock()


def make_retry(clock: Clock, *, timeout_s: float = 60.0, **policy: float | int | None) -> Retry:
    return Retry(RetryPolicy("host:1", **policy), timeout_s=timeout_s, clock=clock, jitter=lambda: 1.0)  # type: ignore[arg-type]


def make_session(clock: Clock, *, shared: bool = False, time_budget_s: float | None = None) -> Session:
    request = types_pb2.GenerateRequest(request_id="r", time_budget_s=time_budget_s)
    return Session("r", make_retry(clock), request=request, shared=shared)


def message(**event: object) -> gateway_pb2.GenerateEvent:
    return gateway_pb2.GenerateEvent(request_id="r", **event)  # type: ignore[arg-type]


def accepted(num_images: int = 1, *, attached: bool = False) -> gateway_pb2.GenerateEvent:
    return message(accepted=gateway_pb2.Accepted(seed=1, num_images=num_images, attached=attached))


def part(index: int, offset: int, data: bytes, total: int) -> gateway_pb2.GenerateEvent:
    info = types_pb2.ImageInfo(index=index)
    return message(image=gateway_pb2.Image(info=info, offset_bytes=offset, total_bytes=total, data=data))


def done(state: types_pb2.JobState = types_pb2.JOB_STATE_IMAGES) -> gateway_pb2.GenerateEvent:
    return message(done=gateway_pb2.Done(state=state))


def feed(session: Session, *messages: gateway_pb2.GenerateEvent) -> list[Event]:
    return [event for each in messages for event in session.feed(each)]


def test_unanswered_calls_back_off_and_end_with_the_connect_timeout(clock: Clock) -> None:
    retry = make_retry(clock, connect_timeout_s=5)
    for expected_s in (0.1, 0.2, 0.4, 0.8, 1.6):
        delay_s = retry.delay_s(UnavailableError("refused"))
        assert delay_s == pytest.approx(expected_s)
        clock.now_s += delay_s
    with pytest.raises(UnavailableError, match="host:1: no StreamFlow gateway answers: refused"):
        retry.delay_s(UnavailableError("refused"))


def test_once_heard_the_deadline_is_the_limit_and_the_delay_starts_anew(clock: Clock) -> None:
    retry = make_retry(clock, timeout_s=60, connect_timeout_s=1)
    retry.heard()
    for _ in range(6):
        longest = retry.delay_s(UnavailableError("lost"))
    assert longest == 2.0
    retry.heard()
    assert retry.delay_s(JobCancelledError("the call was cut")) == pytest.approx(0.1)
    clock.now_s += 59.95
    with pytest.raises(UnavailableError, match="connection was lost"):
        retry.delay_s(UnavailableError("lost"))


def test_busy_is_retried_no_sooner_than_asked_and_as_often_as_allowed(clock: Clock) -> None:
    retry = make_retry(clock, max_busy_retries=2)
    for _ in range(2):
        assert 3.0 <= retry.delay_s(BusyError("full", retry_after_s=3.0)) <= 3.6
    with pytest.raises(BusyError):
        retry.delay_s(BusyError("full", retry_after_s=3.0))


def test_a_delay_beyond_the_deadline_is_not_waited_for(clock: Clock) -> None:
    with pytest.raises(BusyError):
        make_retry(clock, timeout_s=10).delay_s(BusyError("full", retry_after_s=30))


def test_what_a_gateway_answers_is_told_rather_than_that_it_is_gone(
    clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    away = UnavailableError("Redis cannot be reached")
    away.answered = True
    retry = make_retry(clock)
    for _ in range(5):
        retry.delay_s(away)
    assert [record.message for record in caplog.records] == [
        "host:1: Redis cannot be reached; trying again until the time is up"
    ]
    with pytest.raises(DeadlineError, match="host:1: Redis cannot be reached; given up after 60 s"):
        retry.delay_s(DeadlineError("Deadline Exceeded"))
    # It has gone itself since.
    retry.delay_s(UnavailableError("refused"))
    with pytest.raises(DeadlineError, match="host:1 does not answer; given up after 60 s"):
        retry.delay_s(DeadlineError("Deadline Exceeded"))


def test_a_stack_that_comes_back_part_by_part_is_told_of_once(clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    retry = make_retry(clock)
    retry.heard()
    for _ in range(3):
        retry.delay_s(UnavailableError("refused"))
    # The gateway is there, and Redis is not.
    away = UnavailableError("Redis cannot be reached")
    away.answered = True
    for _ in range(5):
        retry.delay_s(away)
    assert [record.message for record in caplog.records] == [
        "host:1: Redis cannot be reached; trying again until the time is up"
    ]


@pytest.mark.parametrize("error", [BusyError("full", retry_after_s=1.0), UnavailableError("refused")])
def test_nothing_is_sent_again_once_its_time_budget_is_over(clock: Clock, error: StreamFlowError) -> None:
    session = make_session(clock, time_budget_s=1.5)
    session.open(Stub(), ())
    assert session.retry_in_s(error) < 1.5
    clock.now_s += 1.45
    with pytest.raises(type(error)):
        session.retry_in_s(error)
    # What is admitted is fetched however late the connection comes back.
    admitted = make_session(clock, time_budget_s=1.5)
    admitted.open(Stub(), ())
    feed(admitted, accepted())
    clock.now_s += 2.0
    assert admitted.retry_in_s(UnavailableError("lost")) > 0


def test_the_deadline_counts_from_the_first_call(clock: Clock) -> None:
    session = Session("r", make_retry(clock, timeout_s=10))
    clock.now_s += 60
    session.open(Stub(), ())
    assert session.retry_in_s(UnavailableError("refused")) > 0
    clock.now_s += 10
    with pytest.raises(UnavailableError):
        session.retry_in_s(UnavailableError("refused"))


@pytest.mark.parametrize(
    "error", [InvalidRequestError("steps", 0, "1 to 50"), NotFoundError("no job"), DeadlineError("")]
)
def test_final_errors_are_raised_at_once(clock: Clock, error: StreamFlowError) -> None:
    retry = make_retry(clock)
    retry.heard()
    with pytest.raises(type(error)):
        retry.delay_s(error)


def test_a_time_that_passed_without_any_answer_is_no_question_of_time(clock: Clock) -> None:
    with pytest.raises(UnavailableError, match="host:1: no StreamFlow gateway answered within 60 s"):
        make_retry(clock).delay_s(DeadlineError("Deadline Exceeded"))


def test_a_refusal_for_its_deadline_is_told_in_the_servers_words(clock: Clock) -> None:
    refusal = DeadlineError("this request takes about 9 s here")
    refusal.answered = True
    retry = make_retry(clock)
    with pytest.raises(DeadlineError, match="takes about 9 s"):
        retry.delay_s(refusal)
    with pytest.raises(DeadlineError, match="not finished within"):
        retry.delay_s(DeadlineError("Deadline Exceeded"))


def test_a_server_that_forgets_between_admitting_and_answering_is_asked_again(clock: Clock) -> None:
    session = make_session(clock)
    assert session.open(Stub(), ()) == "Generate"
    assert session.retry_in_s(NotFoundError("no job 'r'")) > 0
    assert session.open(Stub(), ()) == "Generate"


def test_a_request_is_sent_until_it_is_admitted_then_watched(clock: Clock) -> None:
    session = make_session(clock)
    assert session.open(Stub(), ()) == "Generate"
    session.retry_in_s(UnavailableError("lost before headers"))
    assert session.open(Stub(), ()) == "Generate"
    feed(session, accepted())
    session.retry_in_s(UnavailableError("lost"))
    assert session.open(Stub(), ()) == "Watch"
    assert session.retry_in_s(NotFoundError("no job 'r'")) == 0.0
    assert session.open(Stub(), ()) == "Generate"


def test_parts_are_put_together_and_begun_again_after_a_break(clock: Clock) -> None:
    session = make_session(clock)
    session.open(Stub(), ())
    assert feed(session, accepted(2), part(0, 0, b"ab", 2), part(1, 0, b"cd", 6), part(1, 2, b"ef", 6))[2:] == []
    session.retry_in_s(None)
    session.open(Stub(), ())
    again = feed(session, accepted(2, attached=True), part(0, 0, b"ab", 2))
    assert again == []
    events = feed(session, part(1, 0, b"cde", 6), part(1, 3, b"fgh", 6), done())
    ready = events[0]
    assert isinstance(ready, ImageReady)
    assert (ready.info.index, ready.data) == (1, b"cdefgh")
    session.check()


def test_a_missing_part_is_an_error(clock: Clock) -> None:
    session = make_session(clock)
    session.open(Stub(), ())
    feed(session, accepted(), part(0, 0, b"ab", 6))
    with pytest.raises(StreamFlowError, match="expected from 2"):
        feed(session, part(0, 4, b"ef", 6))


def test_done_without_all_images_is_told(clock: Clock) -> None:
    session = make_session(clock)
    session.open(Stub(), ())
    feed(session, accepted(2), part(0, 0, b"ab", 2), done())
    with pytest.raises(NotFoundError, match=r"1 of 2 .* under another id"):
        session.check()


@pytest.mark.parametrize("state", [JobState.ERROR, JobState.CANCELLED, JobState.DEADLINE])
def test_every_terminal_state_but_images_raises(clock: Clock, state: JobState) -> None:
    session = make_session(clock)
    feed(session, accepted(), done(types_pb2.JobState.Value(f"JOB_STATE_{state.name}")))
    with pytest.raises(StreamFlowError, match=state):
        session.check()


def test_what_is_abandoned_and_what_is_not(clock: Clock) -> None:
    session = make_session(clock)
    assert not session.abandoned  # never sent
    session.open(Stub(), ())
    assert session.abandoned  # it may have been admitted
    feed(session, accepted())
    assert session.abandoned
    feed(session, part(0, 0, b"ab", 2), done())
    assert not session.abandoned

    refused = make_session(clock)
    refused.open(Stub(), ())
    with pytest.raises(InvalidRequestError):
        refused.retry_in_s(InvalidRequestError("steps", 0, "1 to 50"))
    assert not refused.abandoned

    for attached in (False, True):
        for shared in (False, True):
            session = make_session(clock, shared=shared)
            session.open(Stub(), ())
            feed(session, accepted(attached=attached))
            # An id of our own is nobody else's, even where a lost reply was sent again; a given one is anybody's.
            assert session.abandoned is not shared
