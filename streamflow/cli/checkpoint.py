"""`streamflow models FOLDER`: what a checkpoint is, and what serving it would take."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from streamflow.cli.tables import print_json, print_out, table

if TYPE_CHECKING:
    from streamflow.families.plan import Plan


def show(model: Path, *, flow: str, dtype: str, slots: int, as_json: bool) -> None:
    """Prints it. Raises InvalidRequestError for what cannot be served."""
    from streamflow.backends.runtime import resolve_device, resolve_dtype
    from streamflow.families.plan import plan
    from streamflow.families.source import checkpoint_at

    precision = resolve_dtype(dtype, resolve_device())
    found = plan(checkpoint_at(model, flow=flow), precision)
    if as_json:
        print_json(_as_json(found, slots))
    else:
        _print(found, str(precision).removeprefix("torch."), slots)


def _print(found: Plan, precision: str, slots: int) -> None:
    from streamflow.types import Stage

    card = found.card
    size = f"{card.default_width}x{card.default_height}"
    print_out(
        table(
            card.name,
            "",
            rows=[
                ("family", card.family),
                ("revision", card.revision),
                ("pictures", f"{size}, up to {card.max_width}x{card.max_height}, multiples of {card.size_multiple}"),
                ("takes", f"labels 0 to {card.class_labels - 1}" if card.class_labels else "prompts"),
                ("steps", f"{card.default_steps} (up to {card.max_steps})"),
                ("guidance", f"{card.default_guidance_scale:g}{', fed to it' if card.embedded_guidance else ''}"),
                ("sampler", card.default_sampler),
                ("decoders", ", ".join(card.decoders)),
                *([("adapters", ", ".join(card.adapters))] if card.adapters else []),
                *([("controls", ", ".join(card.controls))] if card.controls else []),
                *([("not loaded", ", ".join(found.unused))] if found.unused else []),
            ],
        )
    )
    rows = [
        (part.stage.service, part.name, part.class_name, _millions(part.parameters), _size(part.memory_bytes))
        for part in found.parts
    ]
    print_out(table("service", "network", "class", "parameters", f"in {precision}", rows=rows))
    for stage in Stage:
        beside = f", {_size(slots * found.slot_bytes)} of it for {slots} slots" if stage is Stage.DENOISE else ""
        typer.echo(f"{stage.service}: {_size(found.memory_bytes(stage, slots=slots))}{beside}")
    typer.echo("What networks need while they run comes on top.")


def _as_json(found: Plan, slots: int) -> dict[str, object]:
    from streamflow.types import Stage

    return {
        "card": asdict(found.card),
        "parts": [asdict(part) for part in found.parts],
        "slot_bytes": found.slot_bytes,
        "unused": found.unused,
        "memory_bytes": {stage.service: found.memory_bytes(stage, slots=slots) for stage in Stage},
    }


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}M"


def _size(count_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count_bytes < 1024:
            return f"{count_bytes:.1f} {unit}"
        count_bytes /= 1024
    return f"{count_bytes:.1f} GiB"
