"""Conversions there and back."""

from __future__ import annotations

import pytest

from streamflow.rpc import convert
from streamflow.types import DecoderKind, Failure, ImageFormat, JobState, OutputSpec, Stage, WorkerInfo
from streamflow.v1 import gateway_pb2, types_pb2


@pytest.mark.parametrize("kind", ImageFormat)
def test_formats(kind):
    assert convert.format_from_pb(convert.format_to_pb(kind)) is kind


@pytest.mark.parametrize("kind", DecoderKind)
def test_decoders(kind):
    assert convert.decoder_from_pb(convert.decoder_to_pb(kind)) is kind


@pytest.mark.parametrize("state", JobState)
def test_states(state):
    assert convert.state_from_pb(convert.state_to_pb(state)) is state
    assert types_pb2.JobState.Name(convert.state_to_pb(state)) == f"JOB_STATE_{state.name}"


def test_unspecified_values_take_the_default():
    assert convert.format_from_pb(types_pb2.IMAGE_FORMAT_UNSPECIFIED) is ImageFormat.PNG
    assert convert.decoder_from_pb(types_pb2.DECODER_KIND_UNSPECIFIED, DecoderKind.FULL) is DecoderKind.FULL
    assert convert.output_from_pb(types_pb2.OutputOptions()) == OutputSpec()


@pytest.mark.parametrize("read", [convert.format_from_pb, convert.decoder_from_pb, convert.state_from_pb])
def test_values_from_the_future_are_refused(read):
    with pytest.raises(ValueError, match="99"):
        read(99)


def test_no_state_is_no_state():
    with pytest.raises(ValueError, match="not known"):
        convert.state_from_pb(types_pb2.JOB_STATE_UNSPECIFIED)


def test_output_and_failure():
    output = OutputSpec(ImageFormat.WEBP, 40, DecoderKind.FULL, embed_metadata=True)
    assert convert.output_from_pb(convert.output_to_pb(output)) == output
    failure = Failure("INTERNAL", "no", "decoder")
    assert convert.failure_from_pb(convert.failure_to_pb(failure)) == failure


def test_workers():
    worker = WorkerInfo(
        "w-1", Stage.ENCODE, "h:1", "m", "r", "torch-eager", "cpu", 8, 3, 5, True, 100.0, {"images_total": 9}, 2.0, 0.5
    )
    shown = convert.worker_to_pb(worker, now_s=160.5)
    assert (shown.stage, shown.worker_id, shown.slots, shown.slots_in_use, shown.backlog) == ("encoder", "w-1", 8, 3, 5)
    assert (shown.draining, shown.uptime_s, dict(shown.counters)) == (True, 60.5, {"images_total": 9})
    assert (shown.call_ms, shown.row_ms, list(shown.row_counts)) == (2.0, 0.5, [])
    assert convert.worker_to_pb(worker, backlog=0, now_s=0).backlog == 0


def test_published_events_are_events():
    progress = gateway_pb2.GenerateEvent.FromString(convert.progress_event(2, step=3, steps=4)).progress
    assert (progress.index, progress.step, progress.steps) == (2, 3, 4)
    published = convert.preview_event(1, step=2, jpeg=b"jpeg", width=8, height=16)
    preview = gateway_pb2.GenerateEvent.FromString(published).preview
    assert (preview.index, preview.step, preview.data, preview.width, preview.height) == (1, 2, b"jpeg", 8, 16)
