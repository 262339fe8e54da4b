"""Between what Redis stores and the values of `base`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from streamflow.transport.base import (
    DeadLetter,
    Entry,
    ImageRef,
    JobPlace,
    JobView,
    Overview,
    Payload,
    PreviewTask,
    Queue,
)
from streamflow.types import Failure, JobState, SlotView, Stage, WorkerInfo

log = logging.getLogger(__name__)

_PAYLOAD = b"p:"


def payload_args(payload: Payload) -> Iterator[str | bytes]:
    """Names and values for a stream entry; the prefix keeps them apart from our own fields."""
    for name, value in payload.items():
        yield _PAYLOAD + name.encode()
        yield value


@dataclass(frozen=True, slots=True)
class Delivery:
    """A stream entry as Redis gives it out."""

    id: str
    attempt: int
    fields: Mapping[bytes, bytes]


def taken_by_script(reply: Iterable[tuple[bytes, int, Sequence[bytes]]]) -> list[Delivery]:
    return [Delivery(entry_id.decode(), attempt, _pairs(raw)) for entry_id, attempt, raw in reply]


def entry_from(stage: Stage, delivery: Delivery, *, now_s: float) -> Entry:
    fields = delivery.fields
    deadline_at_s = float(fields[b"deadline"])
    return Entry(
        id=delivery.id,
        stage=stage,
        ref=_ref(fields),
        payload=_payload(fields),
        attempt=delivery.attempt,
        enqueued_at_s=int(delivery.id.split("-")[0]) / 1000,
        deadline_at_s=deadline_at_s,
        remaining_s=deadline_at_s - now_s,
        traceparent=fields[b"trace"].decode(errors="replace"),
    )


def preview_from(raw: Sequence[bytes]) -> PreviewTask:
    fields = _pairs(raw)
    return PreviewTask(_ref(fields), int(fields[b"step"]), _payload(fields))


def overview_from(reply: tuple[Sequence[Sequence[bytes]], Sequence[bytes], int]) -> Overview:
    queues, totals, dead_letters = reply
    return Overview(
        tuple(
            Queue(place.decode(), int(priority), int(images), float(age_s)) for place, priority, images, age_s in queues
        ),
        {name.decode(): int(total) for name, total in _pairs(totals).items()},
        dead_letters,
    )


def places_from(reply: Sequence[bytes]) -> list[JobPlace]:
    """Of ids and scores in turn."""
    return [JobPlace(float(score), job_id.decode()) for job_id, score in zip(reply[::2], reply[1::2], strict=True)]


def job_from(job_id: str, fields: Mapping[bytes, bytes]) -> JobView:
    failure = None
    if b"code" in fields:
        failure = Failure(*(fields[name].decode() for name in (b"code", b"message", b"stage")))
    warnings = sorted((float(at), name[2:].decode()) for name, at in fields.items() if name.startswith(b"w:"))
    return JobView(
        id=job_id,
        state=JobState(fields[b"state"].decode()),
        spec=fields[b"spec"],
        tenant=fields[b"tenant"].decode(),
        images=tuple(fields[b"i%d" % k].split(b":")[0].decode() for k in range(int(fields[b"images"]))),
        admitted_at_s=float(fields[b"admitted"]),
        deadline_at_s=float(fields[b"deadline"]),
        finished_at_s=float(fields[b"finished"]) if b"finished" in fields else None,
        failure=failure,
        warnings=tuple(text for _, text in warnings),
        estimate_s=float(fields[b"estimate"]) if b"estimate" in fields else None,
    )


def worker_text(worker: WorkerInfo) -> str:
    """JSON that begins with what the scripts read of it: they need not decode the rest (`registered` in common.lua)."""
    head = {"stage": worker.stage, "slots": worker.slots, "draining": worker.draining}
    return json.dumps({**head, **asdict(worker)})


def worker_from(value: bytes) -> tuple[WorkerInfo, float] | None:
    """A worker and when its lease lapses. Fields that we do not know are those of a newer replica.

    None for what no replica of ours wrote.
    """
    try:
        lapses, info = value.split(b" ", 1)
        known = {name: said for name, said in json.loads(info).items() if name in WorkerInfo.__dataclass_fields__}
        of_ours = {
            "stage": Stage(known["stage"]),
            "row_counts": tuple(known.get("row_counts", ())),
            "work": _work_from(known.get("work")),
        }
        return WorkerInfo(**{**known, **of_ours}), float(lapses)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        log.warning("an entry of the registry cannot be read: %s", error)
        return None


def _work_from(said: Any) -> tuple[SlotView, ...]:
    """Empty where it cannot be read: nothing but what people are shown depends on it."""
    names = SlotView.__dataclass_fields__
    try:
        return tuple(SlotView(**{name: slot[name] for name in slot.keys() & names}) for slot in said or ())
    except (TypeError, AttributeError):
        return ()


def dead_letter_from(entry: tuple[bytes, Mapping[bytes, bytes]]) -> DeadLetter | None:
    """None for what no replica of ours wrote."""
    letter_id, fields = entry[0].decode(), entry[1]
    try:
        return DeadLetter(
            id=letter_id,
            ref=_ref(fields),
            service=fields[b"stage"].decode(),
            attempts=int(fields[b"attempts"]),
            reason=fields[b"reason"].decode(),
            at_s=int(letter_id.split("-")[0]) / 1000,
            tenant=fields[b"tenant"].decode(),
            spec=fields[b"spec"],
        )
    except (ValueError, KeyError) as error:
        log.warning("dead letter %s cannot be read: %s", letter_id, error)
        return None


def _pairs(raw: Sequence[bytes]) -> dict[bytes, bytes]:
    return dict(zip(raw[::2], raw[1::2], strict=True))


def _ref(fields: Mapping[bytes, bytes]) -> ImageRef:
    return ImageRef(fields[b"job"].decode(), int(fields[b"index"]))


def _payload(fields: Mapping[bytes, bytes]) -> dict[str, bytes]:
    return {name[2:].decode(errors="replace"): value for name, value in fields.items() if name.startswith(_PAYLOAD)}
