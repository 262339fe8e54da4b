"""How much work lies before each stage."""

from __future__ import annotations

from dataclasses import replace

from gateway.backlog import UNKNOWN_S, backlog_s, image_costs_s
from streamflow.transport.base import Overview, Queue
from streamflow.types import Stage
from tests.client.deployment import DENOISER

QUEUES = (
    Queue("waiting", 0, 10, 3.0),
    Queue("waiting", 1, 2, 1.0),
    Queue("encode", 0, 1, 0.1),
    Queue("denoise", 0, 4, 0.5),
    Queue("decode", 1, 3, 0.2),
)


def test_what_has_not_passed_a_stage_is_before_it() -> None:
    costs = {Stage.ENCODE: 0.01, Stage.DENOISE: 2.0, Stage.DECODE: 0.5}
    found = backlog_s(Overview(QUEUES, {}, 0), costs)
    assert found == {Stage.ENCODE: 13 * 0.01, Stage.DENOISE: 17 * 2.0, Stage.DECODE: 20 * 0.5}
    assert set(backlog_s(Overview((), {}, 0), costs).values()) == {0.0}


def test_costs_are_those_of_the_replicas_that_have_measured_them() -> None:
    denoisers = [replace(DENOISER, image_ms=ms) for ms in (100.0, 300.0, 0.0)]
    known = {Stage.DECODE: 0.7}
    found = image_costs_s(denoisers, known=known)
    assert found == {Stage.ENCODE: UNKNOWN_S, Stage.DENOISE: 0.2, Stage.DECODE: 0.7}
