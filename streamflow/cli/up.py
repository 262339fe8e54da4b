"""`streamflow up`: a whole deployment on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from streamflow.cli.supervisor import LocalDeployment


_OWN = frozenset({"host", "port", "redis_url", "model", "more_models", "log_format", "drain_grace_s"})
"""Settings that this command gives to its processes, whatever the environment says."""


def up(
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]PATH",
            help="Checkpoint folder in diffusers layout; by default the built-in model. Several are served side by "
            "side, the first one to requests that name none.",
        ),
    ] = None,
    flow: Annotated[
        str | None,
        typer.Option(help="What the first model's weights were distilled to: rectified, instaflow, 2rf, perflow."),
    ] = None,
    adapters: Annotated[Path | None, typer.Option(help="Folder of LoRA adapters for the first model.")] = None,
    controls: Annotated[Path | None, typer.Option(help="Folder of ControlNets for the first model.")] = None,
    host: Annotated[str, typer.Option(help="Where the gateway listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Its port; 0 takes a free one.")] = 50051,
    redis_url: Annotated[str | None, typer.Option(help="A running Redis; by default a private one is started.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Where the private Redis keeps jobs; default: nowhere.")] = None,
    encoders: Annotated[int, typer.Option(min=0, help="Text encoder processes of each model.")] = 1,
    denoisers: Annotated[int, typer.Option(min=0, help="Denoiser processes of each model.")] = 1,
    decoders: Annotated[int, typer.Option(min=0, help="Decoder processes of each model.")] = 1,
    deterministic: Annotated[bool | None, typer.Option(help="Equal bytes whatever runs beside.")] = None,
    slots: Annotated[int, typer.Option(min=0, help="Images in a denoiser's batch; 0 = its default.")] = 0,
    threads: Annotated[int | None, typer.Option(min=0, help="CPU threads of each stage; 0 = its default.")] = None,
    metrics_port: Annotated[
        int | None,
        typer.Option(min=0, max=65535, help="Serve Prometheus metrics: the gateway's here, the others on free ports."),
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(
            metavar="0,1,...",
            help="GPUs for the stages, by number or UUID as nvidia-smi -L says; each process gets one of them. By "
            "default every process chooses the one with the least work.",
        ),
    ] = None,
    log_dir: Annotated[
        Path | None, typer.Option(help="A log file for each process here, in place of lines on stderr.")
    ] = None,
) -> None:
    """Start Redis, the gateway and the stages here, and keep them running until Ctrl-C.

    A process that crashes is started again. Everything else is set by STREAMFLOW_ variables, which
    `python -m gateway --help` and `python -m services.denoiser --help` list as options.

    \b
    Examples:
        streamflow up
        streamflow up --model checkpoints/stable-diffusion-3-medium --decoders 2
        streamflow up --model checkpoints/perflow-sd15 --flow perflow --adapters loras
        streamflow up --model models/shapes --model sd15=checkpoints/stable-diffusion-1.5
        streamflow up --decoders 4 --denoisers 2 --gpus 0,1,2,3
        streamflow up --port 0 --redis-url redis://127.0.0.1:6379/0 --log-dir logs
    """
    import asyncio
    from importlib.util import find_spec

    for needed in ("torch", "redis"):
        if find_spec(needed) is None:
            # Said before anything that is amiss with a model, which may be part of what is missing.
            raise ModuleNotFoundError(name=needed)

    from streamflow.cli.model_settings import settings_of_first
    from streamflow.cli.supervisor import LocalDeployment
    from streamflow.config import check_environment, default_model, visible_gpus
    from streamflow.families.source import default_name
    from streamflow.gpus import list_gpus, read_gpus, visible
    from streamflow.model_names import by_name, name_of, read_model

    given = {"deterministic": deterministic, "threads": threads, "metrics_port": metrics_port}
    # What else the environment says is told of here, once, rather than by every process.
    check_environment(but=_OWN | {name for name, value in given.items() if value is not None}, program="streamflow up")
    (name, folder), *others = map(read_model, model or [str(default_model())])
    deployment = LocalDeployment(
        model=folder,
        more_models=by_name((other or default_name(Path(path)) or name_of(path), path) for other, path in others),
        host=host,
        port=port,
        redis_url=redis_url,
        data_dir=data_dir,
        encoders=encoders,
        denoisers=denoisers,
        decoders=decoders,
        deterministic=deterministic,
        slots=slots,
        threads=threads,
        settings={
            **settings_of_first(name, flow=flow, adapters=adapters, controls=controls),
            **({} if metrics_port is None else {"metrics_port": metrics_port}),
        },
        gpus=[] if gpus is None else read_gpus(gpus, visible(list_gpus(), visible_gpus())),
        log_dir=log_dir,
        on_line=_print_supervisor if log_dir else _print_line,
    )
    asyncio.run(_serve(deployment))


async def _serve(deployment: LocalDeployment) -> None:
    import asyncio
    import signal
    from contextlib import suppress

    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    stop = asyncio.Event()

    def on_signal() -> None:
        # The first one stops in order, during the start too.
        if stop.is_set():
            deployment.end_now()
            return
        stop.set()
        typer.echo("stopping: what is under way may finish; Ctrl-C again ends it at once", err=True)
        task.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal)
    typer.echo("starting; loading the model takes a while", err=True)
    with suppress(asyncio.CancelledError):
        async with deployment:
            _print_table(deployment)
            await asyncio.Event().wait()
    typer.echo("stopped", err=True)


def _print_table(deployment: LocalDeployment) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = {"process": list(deployment.processes)}
    shown["pid"] = [str(process.pid) for process in deployment.processes.values()]
    shown["address"] = [deployment.addresses[name] for name in deployment.processes]
    if deployment.metrics:
        shown["metrics"] = [deployment.metrics.get(name, "") for name in deployment.processes]
    if len(deployment.models) > 1:
        shown["model"] = [deployment.model_of(name) for name in deployment.processes]
    gpus = [str(deployment.gpu_of(name) or "") for name in deployment.processes]
    if any(gpus):
        shown["GPU"] = gpus
    table = Table(*shown, title="StreamFlow is ready")
    for row in zip(*shown.values(), strict=True):
        table.add_row(*row)
    console = Console()
    console.print(table)
    where = "" if deployment.address == "127.0.0.1:50051" else f" --address {deployment.address}"
    where += " --tls-ca FILE" if deployment.tls_cert else ""
    where += " --api-key KEY" if deployment.asks_for_keys else ""
    card = deployment.cards[0]
    what = "--class-label 0" if card.class_labels else '"a large red circle on a white background"'
    console.print(f"Try: streamflow generate {what} -o picture.png{where}", soft_wrap=True, highlight=False)


def _print_line(name: str, line: str) -> None:
    typer.echo(f"{name:<10} | {line}", err=True)


def _print_supervisor(name: str, line: str) -> None:
    if name == "supervisor":
        _print_line(name, line)
