"""A stage dies in the middle of its work: nothing is lost, nothing comes twice, and the pictures are the same."""

from __future__ import annotations

import asyncio

import pytest

from streamflow.cli.supervisor import LocalDeployment
from streamflow.client import AsyncClient
from streamflow.pipeline import Pipeline
from tests.e2e.conftest import Wish, counters, wishes

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(400)]


async def test_denoiser_killed_in_the_middle_of_twenty_requests(
    deployment: LocalDeployment, client: AsyncClient, fused: Pipeline
) -> None:
    asked = wishes(19, first_seed=9)
    several = Wish("a small green star on a black background", {"steps": 8, "seed": 77, "num_images": 4})
    asked.insert(3, several)
    answers = asyncio.gather(*(wish.ask(client) for wish in asked))
    # Some images are through and others under way when it is killed.
    before = (await counters(deployment, "denoiser-1"))["images_total"]
    while (await counters(deployment, "denoiser-1"))["images_total"] < before + 3:  # noqa: ASYNC110 - another process
        await asyncio.sleep(0.02)
    await deployment.kill("denoiser-1")
    for wish, files in zip(asked, await answers, strict=True):
        assert files == wish.fuse(fused), wish
    assert len(several.fuse(fused)) == 4
    assert deployment.processes["denoiser-1"].restarts >= 1
