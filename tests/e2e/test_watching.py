"""What live processes tell of themselves: metrics that add up to what was asked, and one trace for each request."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml
from opentelemetry.sdk.trace import TracerProvider
from prometheus_client.parser import text_string_to_metric_families

from streamflow.cli.supervisor import LocalDeployment
from streamflow.client import AsyncClient
from streamflow.errors import InvalidRequestError
from streamflow.ports import free_port
from tests.e2e.conftest import wishes

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(400)]

DEPLOY = Path(__file__).parent.parent.parent / "deploy"

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
        # A stage tells of an image a moment after the image went on.
        worked = (total(grew, stage, "entry_work_seconds_count") for stage in ("encoder", "denoiser", "decoder"))
        return total(grew, "gateway", "jobs_ended_total") >= len(asked) and min(worked) >= images

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


def expressions() -> dict[str, str]:
    """Every query of the dashboard and of the alerts, by what it is for; for all models, over half a minute."""
    found = {}
    for panel in json.loads((DEPLOY / "grafana" / "dashboards" / "streamflow.json").read_text("utf-8"))["panels"]:
        for target in panel.get("targets", ()):
            expr = target["expr"].replace("$model", ".*").replace("$__rate_interval", "30s")
            found[f"{panel['title']}, {target['legendFormat']}"] = expr
    (group,) = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text("utf-8"))["groups"]
    return found | {rule["alert"]: rule["expr"] for rule in group["rules"]}


async def test_the_dashboard_and_the_alerts_ask_for_what_there_is(
    deployment: LocalDeployment, client: AsyncClient
) -> None:
    await client.generate("a red circle")
    told = await asyncio.to_thread(names, deployment)
    for what, expr in expressions().items():
        for name in re.findall(r"\b(?:streamflow|process)_\w+", expr):
            assert re.sub("_(bucket|count|sum)$", "", name) in told, f"{what}: no process tells {name}"


def names(deployment: LocalDeployment) -> set[str]:
    """Of all metrics that any process has, also of those that have no value at the moment."""
    found: set[str] = set()
    for address in deployment.metrics.values():
        with urlopen(address, timeout=10) as answer:
            found.update(re.findall(r"(?m)^# TYPE (\S+) ", answer.read().decode()))
    return found


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not installed (Debian: prometheus)")
async def test_every_query_of_the_dashboard_returns_data(
    deployment: LocalDeployment, client: AsyncClient, tmp_path: Path
) -> None:
    async with prometheus(deployment, tmp_path) as address:
        missing: list[str] = []
        for _ in range(30):
            # The same prompt twice, so that the prompt cache has hits.
            await asyncio.gather(*(client.generate("a red circle", num_images=4) for _ in range(2)))
            missing = await asyncio.to_thread(without_data, address)
            if not missing:
                break
            await asyncio.sleep(1)
        assert not missing


def without_data(address: str) -> list[str]:
    """Names of the dashboard's queries to which Prometheus has no answer."""
    missing = []
    for what, expr in expressions().items():
        if not what.startswith("StreamFlow"):
            with urlopen(f"{address}/api/v1/query?{urlencode({'query': expr})}", timeout=10) as answer:
                if not json.load(answer)["data"]["result"]:
                    missing.append(f"{what}: {expr}")
    return missing


def answers(address: str) -> bool:
    with suppress(OSError), urlopen(address, timeout=1):
        return True
    return False


@asynccontextmanager
async def prometheus(deployment: LocalDeployment, folder: Path) -> AsyncIterator[str]:
    """A Prometheus that scrapes every process each second; its address."""
    targets = [address.removeprefix("http://").removesuffix("/metrics") for address in deployment.metrics.values()]
    config = {
        "global": {"scrape_interval": "1s"},
        "scrape_configs": [{"job_name": "streamflow", "static_configs": [{"targets": targets}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    address = f"127.0.0.1:{free_port()}"
    process = await asyncio.create_subprocess_exec(
        "prometheus",
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
    )
    try:
        for _ in range(100):
            if await asyncio.to_thread(answers, f"http://{address}/-/ready"):
                break
            await asyncio.sleep(0.1)
        yield f"http://{address}"
    finally:
        process.terminate()
        await process.wait()
