"""`streamflow status | models | jobs | cancel`: what a deployment is doing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from streamflow.cli.connection import Address, ApiKey, Tls, TlsCa, connect
from streamflow.cli.tables import Json, duration, print_json, print_out, table
from streamflow.types import JobState

if TYPE_CHECKING:
    from rich.table import Table

    from streamflow.client import Client, Job, StageStatus, Status

_REFRESH_S = 1.0


def status(
    address: Address = None,
    api_key: ApiKey = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    json: Json = False,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Refresh every second until Ctrl-C.")] = False,
) -> None:
    """Show the stages of a deployment: replicas, slots in use, and what waits for them.

    \b
    Examples:
        streamflow status
        streamflow status --watch
        streamflow status --json --address gpu-host:50051
    """
    with connect(address, api_key, tls, tls_ca) as client:
        if json:
            print_json(asdict(client.status()))
        elif watch:
            _watch(client)
        else:
            print_out(_status_table(client.status()))


def models(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(help="A checkpoint folder, or a name on the Hugging Face hub, to look at before it is served."),
    ] = None,
    flow: Annotated[str, typer.Option(help="As which its weights are served; see --flow of the services.")] = "auto",
    dtype: Annotated[
        str, typer.Option(help="In which it would run: float32, float16, bfloat16; auto = here.")
    ] = "auto",
    slots: Annotated[int, typer.Option(min=1, help="Of a denoiser.")] = 16,
    address: Address = None,
    api_key: ApiKey = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    json: Json = False,
) -> None:
    """List the models of a gateway with their defaults and limits; or say what a checkpoint is and what it takes.

    A model is live while every stage has a replica that takes work for it; the first one is the default.

    With a CHECKPOINT no gateway is asked and nothing is loaded: its configs and the headers of its weights tell which
    networks each service would load, and how much memory they take.

    \b
    Examples:
        streamflow models
        streamflow models --json
        streamflow models checkpoints/stable-diffusion-3-medium --dtype float16
        streamflow models checkpoints/perflow-sd15 --flow perflow
    """
    if checkpoint is not None:
        from streamflow.cli.checkpoint import show

        show(checkpoint, flow=flow, dtype=dtype, slots=slots, as_json=json)
        return
    with connect(address, api_key, tls, tls_ca) as client:
        found = client.models()
    if json:
        print_json([asdict(model) for model in found])
        return
    about = {
        "live": ["yes" if model.live else "no" for model in found],
        "family": [model.family for model in found],
        "revision": [model.revision[:12] for model in found],
        "size": [f"{m.default_width}x{m.default_height} (up to {m.max_width}x{m.max_height})" for m in found],
        "steps": [f"{model.default_steps} (up to {model.max_steps})" for model in found],
        "guidance": [f"{model.default_guidance_scale:g}" for model in found],
        "sampler": [model.default_sampler for model in found],
        "samplers": [", ".join(model.samplers) for model in found],
        "decoders": [", ".join(model.decoders) for model in found],
        "takes": [f"labels 0 to {m.class_labels - 1}" if m.class_labels else "prompts" for m in found],
        "adapters": [", ".join(model.adapters) for model in found],
        "controls": [", ".join(model.controls) for model in found],
    }
    # A column for each model: a row for each would be too long for most terminals.
    print_out(table("model", *(m.name for m in found), rows=[(name, *values) for name, values in about.items()]))


def jobs(
    address: Address = None,
    api_key: ApiKey = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    limit: Annotated[int, typer.Option("--limit", "-n", min=1, help="How many, the newest first.")] = 20,
    json: Json = False,
) -> None:
    """List jobs, the newest first.

    \b
    Examples:
        streamflow jobs
        streamflow jobs --limit 100 --json
    """
    with connect(address, api_key, tls, tls_ca) as client:
        found = client.jobs(limit=limit)
    if json:
        print_json([asdict(job) for job in found])
    elif not found:
        typer.echo("no jobs")
    else:
        print_out(_job_table(found))
        for job in found:
            if job.failure is not None:
                typer.echo(f"{job.request_id}: {job.failure.message}")


def cancel(
    ids: Annotated[list[str], typer.Argument(metavar="ID...", help="Ids from `streamflow jobs`.")],
    address: Address = None,
    api_key: ApiKey = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
) -> None:
    """End jobs. A finished job stays as it is.

    \b
    Examples:
        streamflow cancel 3f1c9e0a7d5b4a6c8e2f0b1d9c7a5e31
    """
    with connect(address, api_key, tls, tls_ca) as client:
        for request_id in ids:
            job = client.cancel(request_id)
            ended_before = "" if job.state is JobState.CANCELLED else "it had ended before: "
            typer.echo(f"{job.request_id}: {ended_before}{job.state}")


def _watch(client: Client) -> None:
    from rich.live import Live

    with Live(_status_table(client.status()), auto_refresh=False) as live:
        while True:
            try:
                time.sleep(_REFRESH_S)
            except KeyboardInterrupt:
                return
            live.update(_status_table(client.status()), refresh=True)


def _status_table(status: Status) -> Table:
    rows = [
        (
            stage.stage,
            stage.worker_id,
            f"{stage.model} {stage.model_revision[:12]}",
            f"{stage.backend} on {stage.device}" + _cost(stage),
            f"{stage.slots_in_use} / {stage.slots}",
            stage.backlog,
            "draining" if stage.draining else duration(stage.uptime_s),
        )
        for stage in sorted(status.stages, key=lambda stage: _place(stage, status.models))
    ]
    missing = [(stage, "none", model, "", "", "", "images wait for one") for model, stage in status.missing]
    shown = table("stage", "replica", "model", "backend", "slots", "backlog", "up", rows=[*rows, *missing])
    shown.title = f"{', '.join(status.models)}: {len(status.stages)} replicas, {status.waiting} images waiting"
    return shown


def _place(stage: StageStatus, models: Sequence[str]) -> tuple[int, int, str]:
    """The models in their order, and the stages of each in theirs."""
    from streamflow.client.views import STAGES

    model = models.index(stage.model) if stage.model in models else len(models)
    order = STAGES.index(stage.stage) if stage.stage in STAGES else len(STAGES)
    return model, order, stage.worker_id


def _cost(stage: StageStatus) -> str:
    if not stage.call_ms + stage.row_ms:
        return ""
    return f"\n{stage.call_ms:.1f} + {stage.row_ms:.1f} ms/row"


def _job_table(found: Sequence[Job]) -> Table:
    """As much as fits beside an id on 80 columns; --json has it all."""
    rows = [
        (
            job.request_id,
            job.state,
            f"{job.num_finished} / {job.num_images}",
            time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(job.admitted_at_s)),
        )
        for job in found
    ]
    return table("id", "state", "images", "admitted", rows=rows)


_ORDER = {"encoder": 0, "denoiser": 1, "decoder": 2}
