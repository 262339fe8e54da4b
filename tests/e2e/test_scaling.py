"""Decoders that come and go under load: no picture is lost, none is made twice, and all are right."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from streamflow.cli.supervisor import LocalDeployment
from streamflow.client import AsyncClient
from streamflow.pipeline import Pipeline
from tests.e2e.conftest import wishes

pytestmark = [pytest.mark.nightly, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(400)]


async def test_decoders_come_and_go_under_load(shapes: Path, fused: Pipeline) -> None:
    asked = wishes(120, first_seed=9000)
    async with (
        LocalDeployment(model=shapes, deterministic=True, threads=1, settings={"device": "cpu"}) as deployment,
        AsyncClient(deployment.address) as client,
    ):
        under_way = asyncio.gather(*(wish.ask(client, decoder="full") for wish in asked))
        second, _ = await asyncio.gather(deployment.add("decoder"), deployment.add("decoder"))
        await deployment.remove("decoder-1")
        await deployment.add("decoder")
        await deployment.remove(second)
        made = await under_way
        counters = (await client.status()).counters
    for wish, files in zip(asked, made, strict=True):
        assert files == wish.fuse(fused), wish
    assert counters["images_sent_total"] == counters["admitted_total"] == len(asked)
