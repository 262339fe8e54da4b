"""From a job as it stands to the events that its client has not heard yet: no I/O."""

from __future__ import annotations

from collections.abc import Iterator

from google.protobuf.message import DecodeError

from streamflow.errors import InvalidRequestError, NotFoundError
from streamflow.rpc import convert
from streamflow.rpc.errors import from_status
from streamflow.transport.base import DeadLetter, JobView, QueuePosition
from streamflow.types import Failure, JobState
from streamflow.v1 import gateway_pb2, types_pb2

CHUNK_BYTES = 2**20

_WITHOUT_FAILURE = {
    JobState.ERROR: Failure("INTERNAL", "an image could not be made"),
    JobState.CANCELLED: Failure("CANCELLED", "the job was cancelled"),
    JobState.DEADLINE: Failure("DEADLINE_EXCEEDED", "the job's deadline passed"),
}


class Story:
    """What one watcher has been told about one job.

    Args:
        request_id: the client's id of it.
    """

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._warnings = 0
        self._images: set[int] = set()
        self._position: int | None = None

    def accepted(self, view: JobView, *, attached: bool) -> gateway_pb2.GenerateEvent:
        spec = types_pb2.JobSpec.FromString(view.spec)
        request = spec.request
        accepted = gateway_pb2.Accepted(
            seed=request.seed,
            num_images=len(view.images),
            model=request.model,
            model_revision=spec.model_revision,
            attached=attached,
            steps=request.steps,
            guidance_scale=request.guidance_scale,
            sampler=request.sampler,
            width=request.width,
            height=request.height,
            estimate_s=view.estimate_s,
            decoder=request.output.decoder,
        )
        return self._event(accepted=accepted)

    def warnings(self, view: JobView) -> Iterator[gateway_pb2.GenerateEvent]:
        """Those that are new."""
        for message in view.warnings[self._warnings :]:
            yield self._event(warning=warning(message))
        self._warnings = max(self._warnings, len(view.warnings))

    def queued(self, position: QueuePosition) -> gateway_pb2.GenerateEvent | None:
        """The position, if it changed."""
        if position.ahead is None or position.ahead == self._position:
            return None
        self._position = position.ahead
        return self._event(queued=gateway_pb2.Queued(position=position.ahead, estimate_s=position.estimate_s))

    def new_images(self, view: JobView) -> list[int]:
        """Finished images that were not sent yet; they count as sent from now on."""
        new = [index for index, state in enumerate(view.images) if state == "done" and index not in self._images]
        self._images.update(new)
        return new

    def image(self, index: int, stored: bytes | None) -> Iterator[gateway_pb2.GenerateEvent]:
        """A stored image in parts of at most 1 MiB; a warning for one that has expired."""
        if stored is None:
            message = f"image {index} has expired; its seed makes it again"
            yield self._event(warning=gateway_pb2.Warning(code="expired", message=message))
            return
        image = types_pb2.StoredImage.FromString(stored)
        total = len(image.data)
        for offset in range(0, max(total, 1), CHUNK_BYTES):
            data = image.data[offset : offset + CHUNK_BYTES]
            part = gateway_pb2.Image(info=image.info, offset_bytes=offset, total_bytes=total, data=data)
            yield self._event(image=part)

    def live(self, published: bytes) -> gateway_pb2.GenerateEvent | None:
        """A published progress or preview, unless its image has been sent already."""
        try:
            event = gateway_pb2.GenerateEvent.FromString(published)
        except DecodeError:
            return None
        kind = event.WhichOneof("event")
        if kind not in ("progress", "preview") or getattr(event, kind).index in self._images:
            return None
        event.request_id = self._request_id
        return event

    def done(self, view: JobView) -> gateway_pb2.GenerateEvent:
        finished_at_s = view.finished_at_s if view.finished_at_s is not None else view.admitted_at_s
        done = gateway_pb2.Done(
            state=convert.state_to_pb(view.state), total_ms=max(0.0, (finished_at_s - view.admitted_at_s) * 1000)
        )
        failure = failure_of(view)
        if failure is not None:
            done.failure.CopyFrom(convert.failure_to_pb(failure))
        return self._event(done=done)

    def _event(self, **kind: object) -> gateway_pb2.GenerateEvent:
        return gateway_pb2.GenerateEvent(request_id=self._request_id, **kind)  # type: ignore[arg-type]


class Collected:
    """The events of a job as one answer."""

    def __init__(self, request_id: str) -> None:
        self._response = gateway_pb2.GenerateImagesResponse(request_id=request_id)
        self._images: dict[int, types_pb2.StoredImage] = {}
        self._expected = 0

    def add(self, event: gateway_pb2.GenerateEvent) -> None:
        """Raises the StreamFlowError of a job that gave no pictures."""
        match event.WhichOneof("event"):
            case "accepted":
                self._response.seed = event.accepted.seed
                self._expected = event.accepted.num_images
            case "warning":
                self._response.warnings.append(event.warning)  # type: ignore[arg-type]
            case "image":
                info = event.image.info
                self._images.setdefault(info.index, types_pb2.StoredImage(info=info)).data += event.image.data
            case "done" if event.done.HasField("failure"):
                failure = event.done.failure
                raise from_status(failure.code, failure.message, {"stage": failure.stage})

    def response(self, *, max_bytes: int) -> gateway_pb2.GenerateImagesResponse:
        """Images in the request's order.

        Raises:
            NotFoundError: some have expired.
            InvalidRequestError: they do not fit into one message.
        """
        if len(self._images) < self._expected:
            have = f"{len(self._images)} of {self._expected} images of job {self._response.request_id!r}"
            raise NotFoundError(f"only {have} are still there; generate them again under another id")
        self._response.images.extend(self._images[index] for index in sorted(self._images))
        size = self._response.ByteSize()
        if size > max_bytes:
            hint = f"read job {self._response.request_id!r} by Watch, or use Generate, which sends images in parts"
            raise InvalidRequestError(
                "num_images", f"{size} bytes of images", f"{max_bytes} bytes in one message", hint
            )
        return self._response


def failure_of(view: JobView) -> Failure | None:
    """Why a terminal job has not all its images."""
    return view.failure or _WITHOUT_FAILURE.get(view.state) if view.state is not JobState.IMAGES else None


def warning(message: str) -> gateway_pb2.Warning:
    return gateway_pb2.Warning(code="notice", message=message)


def letter_to_pb(letter: DeadLetter) -> gateway_pb2.DeadLetter:
    request = types_pb2.JobSpec.FromString(letter.spec).request
    return gateway_pb2.DeadLetter(
        id=letter.id,
        request_id=request.request_id,
        index=letter.ref.index,
        service=letter.service,
        attempts=letter.attempts,
        reason=letter.reason,
        at_s=letter.at_s,
        request=request,
    )


def job_to_pb(request_id: str, view: JobView) -> gateway_pb2.Job:
    request = types_pb2.JobSpec.FromString(view.spec).request
    failure = failure_of(view)
    return gateway_pb2.Job(
        request_id=request_id,
        state=convert.state_to_pb(view.state),
        num_images=len(view.images),
        num_finished=view.num_finished,
        failure=convert.failure_to_pb(failure) if failure else None,
        admitted_at_s=view.admitted_at_s,
        deadline_at_s=view.deadline_at_s,
        warnings=[warning(message) for message in view.warnings],
        seed=request.seed,
        model=request.model,
    )
