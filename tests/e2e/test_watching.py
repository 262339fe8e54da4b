"""What live processes tell of themselves: metrics that add up to what was asked, and one trace for each request."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client.parser import text_string_to_metric_families

from streamflow.cli.supervisor import LocalDeployment
from streamflow.client import AsyncClient
from streamflow.errors import InvalidRequestError
from tests.e2e.conftest import wishes

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(400)]

Samples = Counter[tuple[str, str, tuple[tuple[str, str], ...]]]
"""Values by process, name and labels."""


def scrape(deployment: LocalDeployment) -> Samples:
    found: Samples = Counter()
    for name, address in deployment.metrics.items():
        with urlopen(address, timeout=10) as answer:
            for family in text_string_to_metric_families(answer.read().decode()):
                for sample in family.samples:
                    found[name, sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


def total(samples: Samples, process: str, name: str, **labels: str) -> float:
    """Over all processes of a kind, and over all labels that are not given."""
    return sum(
        value
        for (of, called, said), value in samples.items()
        if of.startswith(process) and called == f"streamflow_{name}" and labels.items() <= dict(said).items()
    )


async def grown(deployment: LocalDeployment, before: Samples, enough: Callable[[Samples], bool]) -> Samples:
    """By how much everything grew, once it is enough: the gateway looks at the deployment every few seconds."""
    for _ in range(100):
        after = await asyncio.to_thread(scrape, deployment)
        grew = Samples({key: value - before[key] for key, value in after.items()})
        if enough(grew):
            return grew
        await asyncio.sleep(0.2)
    raise AssertionError("the metrics do not tell of all that was done")


async def test_metrics_add_up_to_what_was_asked(deployment: LocalDeployment, client: AsyncClient) -> None:
    before = await asyncio.to_thread(scrape, deployment)
    assert {name for name, *_ in before} == {"gateway", "encoder-1", "denoiser-1", "decoder-1", "decoder-2"}
    asked = wishes(7, first_seed=4000)
    results = await asyncio.gather(*(wish.ask(client, num_images=2) for wish in asked))
    with pytest.raises(InvalidRequestError):
        await client.generate("a red circle", steps=0)
    images = sum(map(len, results))
    assert images == 14

    def all_told(grew: Samples) -> bool:
        return total(grew, "gateway", "jobs_ended_total", state="images") >= len(asked)

    grew = await grown(deployment, before, all_told)
    assert total(grew, "gateway", "jobs_admitted_total") == len(asked)
    assert total(grew, "gateway", "images_admitted_total") == images
    assert total(grew, "gateway", "jobs_ended_total") == len(asked)
    assert total(grew, "gateway", "images_ended_total", state="done") == images
    assert total(grew, "gateway", "rpc_seconds_count", method="Generate", code="OK") == len(asked)
    assert total(grew, "gateway", "rpc_seconds_count", method="Generate", code="INVALID_ARGUMENT") == 1
    assert total(grew, "gateway", "job_seconds_count", state="images") == len(asked)
    assert total(grew, "gateway", "images_given_up_total") == 0
    for process, outcome in (("encoder", "advanced"), ("denoiser", "advanced"), ("decoder", "finished")):
        assert total(grew, process, "entry_work_seconds_count", outcome=outcome) == images
        assert total(grew, process, "entry_work_seconds_count") == images
        assert total(grew, process, "entry_wait_seconds_count") == images
    assert total(grew, "decoder", "image_seconds_count") == images
    assert total(grew, "denoiser", "denoiser_images_total") == images
    evaluations = 2 * sum(wish.options["steps"] for wish in asked)
    assert total(grew, "denoiser", "denoiser_evaluations_total") == evaluations
    ticks = total(grew, "denoiser", "denoiser_ticks_total")
    assert total(grew, "denoiser", "tick_rows_count") == total(grew, "denoiser", "tick_seconds_count") == ticks
    assert total(grew, "denoiser", "tick_rows_sum") == total(grew, "denoiser", "denoiser_rows_total") >= evaluations
    spent = {phase: total(grew, "denoiser", "tick_phase_seconds_total", phase=phase) for phase in ("network", "update")}
    assert spent["network"] > spent["update"] >= 0
    assert sum(spent.values()) == pytest.approx(total(grew, "denoiser", "tick_seconds_sum"), rel=1e-6)
    hits, misses = (total(grew, "encoder", f"encoder_prompt_cache_{what}_total") for what in ("hits", "misses"))
    assert hits + misses >= images


async def test_the_state_of_a_deployment_is_told(deployment: LocalDeployment, client: AsyncClient) -> None:
    waiting = [await client.submit(f"a red circle {k}", steps=8, num_images=8) for k in range(20)]

    def seen(samples: Samples) -> bool:
        return total(samples, "gateway", "queue_images", stage="waiting", priority="0") > 0

    now = await grown(deployment, Samples(), seen)
    assert total(now, "gateway", "replicas", stage="decode") == 2
    assert total(now, "denoiser", "slots_in_use") <= total(now, "denoiser", "slots")
    assert total(now, "denoiser", "slots") == total(now, "gateway", "deployment_slots", stage="denoise")
    backlogs = [total(now, "gateway", "backlog_seconds", stage=stage) for stage in ("encode", "denoise", "decode")]
    assert all(seconds > 0 for seconds in backlogs)
    assert total(now, "gateway", "queue_oldest_seconds", stage="waiting") > 0
    for job in waiting:
        await client.cancel(job.request_id)


async def test_a_request_is_one_trace_through_all_stages(
    deployment: LocalDeployment, client: AsyncClient, spans_file: Path
) -> None:
    with TracerProvider().get_tracer("application").start_as_current_span("draw") as mine:
        await client.generate("a red circle", num_images=2, steps=8, preview_interval_steps=2)
    trace_id = f"0x{mine.get_span_context().trace_id:032x}"

    def spans() -> list[dict[str, Any]]:
        lines = spans_file.read_text().splitlines() if spans_file.exists() else []
        assert not any("a red circle" in line for line in lines)
        return [span for span in map(json.loads, lines) if span["context"]["trace_id"] == trace_id]

    for _ in range(100):
        found = spans()
        if len(found) >= 7:
            break
        await asyncio.sleep(0.2)
    assert Counter(span["name"] for span in found) == {"Generate": 1, "encode": 2, "denoise": 2, "decode": 2}
    (call,) = [span for span in found if span["name"] == "Generate"]
    assert call["parent_id"] == f"0x{mine.get_span_context().span_id:016x}"
    for span in found:
        assert span["resource"]["attributes"]["service.name"].startswith("streamflow-")
        assert span["start_time"] < span["end_time"]
        if span is not call:
            assert span["parent_id"] == call["context"]["span_id"]
            assert span["attributes"]["streamflow.outcome"] in ("advanced", "finished")
            assert span["attributes"]["streamflow.job"] == call["attributes"]["streamflow.job"]
    previews = [event["name"] for span in found if span["name"] == "denoise" for event in span["events"]]
    assert previews
    assert set(previews) == {"preview"}
