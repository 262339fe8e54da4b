"""Two models behind one gateway: each makes its own pictures, and what one lacks does not concern the other."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from streamflow.cli.app import app
from streamflow.cli.supervisor import LocalDeployment
from streamflow.client import AsyncClient
from streamflow.pipeline import Pipeline
from streamflow.types import JobState
from tests.e2e.conftest import Wish

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(400)]

WISH = Wish("a red circle", {"steps": 3, "seed": 7, "guidance_scale": 2.0})


@pytest.mark.nightly
async def test_two_models_are_served_side_by_side(shapes: Path, sd_checkpoint: Path, fused: Pipeline) -> None:
    tiny = Pipeline.from_pretrained(sd_checkpoint, device="cpu", deterministic=True)
    async with (
        LocalDeployment(
            model=shapes, more_models={"tiny": sd_checkpoint}, deterministic=True, settings={"device": "cpu"}
        ) as deployment,
        AsyncClient(deployment.address) as client,
    ):
        assert await live(client) == {"shapes": True, "tiny": True}
        mine, default, others = await asyncio.gather(
            WISH.ask(client, model="shapes"), WISH.ask(client), WISH.ask(client, model="tiny")
        )
        assert mine == default == WISH.fuse(fused)
        assert others == WISH.fuse(tiny) != mine
        await asyncio.gather(*(deployment.remove(f"tiny-{kind}-1") for kind in ("encoder", "denoiser", "decoder")))
        await _without_the_stages_of_one(client, deployment, fused)


async def _without_the_stages_of_one(client: AsyncClient, deployment: LocalDeployment, fused: Pipeline) -> None:
    assert await live(client) == {"shapes": True, "tiny": False}
    told = json.loads(await command("models", "--json", "--address", deployment.address))
    assert [(model["name"], model["live"]) for model in told] == [("shapes", True), ("tiny", False)]
    lines = (await command("status", "--address", deployment.address)).splitlines()
    missing = [line.replace("│", " ").split()[:3] for line in lines if " none " in line]
    assert missing == [[stage, "none", "tiny"] for stage in ("encoder", "denoiser", "decoder")]

    # What is sent to the one waits, and the other goes on.
    waiting = await client.submit(WISH.prompt, model="tiny")
    assert await WISH.ask(client, model="shapes") == WISH.fuse(fused)
    found = await client.job(waiting.request_id)
    assert (found.state.terminal, found.model, found.num_finished) == (False, "tiny", 0)
    assert [job.model for job in await client.jobs(limit=2)] == ["shapes", "tiny"]
    assert (await client.cancel(waiting.request_id)).state is JobState.CANCELLED


async def live(client: AsyncClient) -> dict[str, bool]:
    return {model.name: model.live for model in await client.models()}


async def command(*arguments: str) -> str:
    """What the command prints."""
    # In a thread: this one has an event loop, which keeps the processes.
    result = await asyncio.to_thread(CliRunner().invoke, app, list(arguments), env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.stdout
