"""The denoiser stage: jobs to latents, from a script and from asyncio."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry

from services.denoiser.metrics import watch_ticks
from streamflow.batching.engine import TickReport
from streamflow.errors import GenerationError, InvalidRequestError, NotFoundError, UnavailableError
from streamflow.flow.guidance import Guidance
from streamflow.flow.programs import Role
from streamflow.stages.denoiser import DenoiserStage
from streamflow.stages.runner import EngineEndedError
from streamflow.types import DenoiseJob, JobChange
from tests.checkpoints import TOKENS


@pytest.fixture(scope="module")
def stage(sd_checkpoint: Path) -> DenoiserStage:
    return DenoiserStage.load(sd_checkpoint, device="cpu", slots=4)


def embeds(seed: int) -> dict[str, np.ndarray]:
    return {"prompt_embeds": np.random.default_rng(seed).normal(size=(TOKENS, 16)).astype(np.float32)}


def job(seed: int = 0, **changes: object) -> DenoiseJob:
    fields = {
        "conditioning": {Role.TARGET: embeds(seed), Role.NEGATIVE: embeds(1000 + seed)},
        "steps": 3,
        "guidance": Guidance(),
        "sampler": "euler",
        "seed": seed,
        "height": 64,
        "width": 64,
    }
    return DenoiseJob(**fields | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("sampler", ["euler", "perflow", "perflow[windows=6]", "H2P1"])
def test_a_stage_warms_up_with_the_checkpoints_own_sampler(sd_checkpoint: Path, tmp_path: Path, sampler: str) -> None:
    shutil.copytree(sd_checkpoint, tmp_path, dirs_exist_ok=True)
    (tmp_path / "streamflow.json").write_text(json.dumps({"default_steps": 6, "default_sampler": sampler}))
    DenoiserStage.load(tmp_path, device="cpu", slots=1).warm_up()


async def test_concurrent_jobs_mix_timesteps_and_equal_the_script(stage: DenoiserStage) -> None:
    jobs = [job(k, steps=2 + 3 * k, guidance=Guidance(1.0 + k % 2)) for k in range(6)]
    async with stage:
        together = await asyncio.gather(*(stage.denoise(one) for one in jobs))
        assert any(len(set(tick.timesteps)) > 1 for tick in stage.ticks)
        assert stage.counters["mixed_ticks_total"] > 0
        assert stage.counters["images_total"] == len(jobs)
        assert stage.slots_in_use == 0
    for ours, expected in zip(together, stage.run(jobs), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4)


async def test_progress_and_previews_arrive_in_order(stage: DenoiserStage) -> None:
    steps: list[tuple[int, int]] = []
    previews: list[int] = []
    async with stage:
        await stage.denoise(
            job(steps=5, preview_interval_steps=2),
            on_progress=lambda step, of: steps.append((step, of)),
            on_preview=lambda step, latents: previews.append(step),
        )
    assert steps == [(k, 5) for k in range(1, 6)]
    assert previews == [2, 4]


async def test_cancelled_caller_frees_its_slot_and_neighbours_go_on(stage: DenoiserStage) -> None:
    async with stage:
        started = asyncio.Event()
        long = asyncio.create_task(stage.denoise(job(1, steps=100), on_progress=lambda *_: started.set()))
        neighbour = asyncio.create_task(stage.denoise(job(2, steps=8)))
        await started.wait()
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        latents = await neighbour
        # Every slot can be had again: the cancelled one too.
        await asyncio.gather(*(stage.denoise(job(k)) for k in range(stage.slots)))
        assert stage.counters["ticks_total"] < 60
    np.testing.assert_allclose(latents, stage.run([job(2, steps=8)])[0], rtol=0, atol=1e-4)


async def test_a_bad_image_fails_alone(stage: DenoiserStage) -> None:
    poison = np.full((4, 16, 16), np.inf, np.float32)
    async with stage:
        good, bad = await asyncio.gather(
            stage.denoise(job(1)), stage.denoise(job(2, noise=poison)), return_exceptions=True
        )
    assert isinstance(good, np.ndarray)
    assert isinstance(bad, GenerationError)
    assert "not finite" in str(bad)


async def test_an_engine_that_ended_says_so_to_its_process(
    sd_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = DenoiserStage.load(sd_checkpoint, device="cpu", slots=2)

    def lost(report: object) -> None:
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(stage._engine, "_retire", lost)
    # The thread's own traceback goes to the hook for threads, which the tests would take for a failure.
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    async with stage:
        watch = asyncio.create_task(stage.watch())
        with pytest.raises(UnavailableError):
            await stage.denoise(job())
        with pytest.raises(UnavailableError, match="restart"):
            await watch
        with pytest.raises(UnavailableError, match="restart"):
            await stage.denoise(job())


async def test_an_engine_that_hangs_says_so_to_its_process(
    sd_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = DenoiserStage.load(sd_checkpoint, device="cpu", slots=2)
    come_back, tick = threading.Event(), stage._engine.tick

    def hang() -> TickReport:
        come_back.wait()
        return tick()

    async with stage:
        await stage.denoise(job())
        watch = asyncio.create_task(stage.watch(hung_after_s=0.2))
        await asyncio.sleep(0.5)
        assert not watch.done(), "an idle engine does not hang"
        monkeypatch.setattr(stage._engine, "tick", hang)
        with pytest.raises(EngineEndedError, match=r"has not ended after 0\.2 s"):
            await stage.denoise(job())
        with pytest.raises(UnavailableError, match="restart"):
            await watch
        come_back.set()


async def test_leaving_the_stage_ends_what_is_under_way(stage: DenoiserStage) -> None:
    async with stage:
        task = asyncio.create_task(stage.denoise(job(steps=100)))
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(stage._engine) == 0
    stage._engine.check_integrity()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noise": np.zeros((4, 8, 8), np.float32)}, r"noise: got 'shape \[4, 8, 8\]'"),
        ({"conditioning": {Role.TARGET: {"other": np.zeros(3)}}}, "prompt_embeds"),
        (
            {"conditioning": {Role.TARGET: {"prompt_embeds": np.zeros((3, 16))}}},
            r"conditioning.prompt_embeds.*\[12, 16\]",
        ),
        ({"guidance": Guidance(2.0), "conditioning": {Role.TARGET: embeds(0)}}, "negative text"),
        ({"sampler": "nope"}, "sampler.*euler"),
        ({"mask": np.ones((16, 16), np.float32)}, "init image"),
        ({"init_latents": np.zeros((4, 16, 16), np.float32), "strength": 0.1}, "strength"),
    ],
)
def test_jobs_that_cannot_run_are_refused(stage: DenoiserStage, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        stage.run([job(**changes)])
    assert stage.slots_in_use == 0


def test_image_to_image_starts_from_its_source(stage: DenoiserStage) -> None:
    source = np.random.default_rng(5).normal(size=(4, 16, 16)).astype(np.float32)
    near, far = (
        np.linalg.norm(stage.run([job(init_latents=source, strength=strength, steps=10)])[0] - source)
        for strength in (0.1, 0.9)
    )
    assert near < far


def test_more_jobs_than_slots_from_a_script(stage: DenoiserStage) -> None:
    seen: list[object] = []
    results = stage.run([job(k) for k in range(9)], on_progress=lambda progress: seen.append(progress.handle))
    assert len(results) == 9
    assert sorted(set(seen)) == list(range(9))  # type: ignore[type-var]


async def test_a_change_under_way_replaces_the_text_and_the_guidance(stage: DenoiserStage) -> None:
    new_text = embeds(77)
    async with stage:
        changed = asyncio.Event()

        def on_progress(step: int, steps: int) -> None:
            if step == 2:
                changed.set()

        running = asyncio.create_task(stage.denoise(job(3, steps=60), key="live", on_progress=on_progress))
        await changed.wait()
        change = JobChange(conditioning={Role.TARGET: new_text}, guidance=Guidance(2.0))
        await stage.change("live", change)
        latents = await running
        with pytest.raises(NotFoundError, match="live"):
            await stage.change("live", change)
    old = stage.run([job(3, steps=60)])[0]
    texts = {**job(3).conditioning, Role.TARGET: new_text}
    new = stage.run([job(3, steps=60, conditioning=texts, guidance=Guidance(2.0))])
    # It began with the old text and ended with the new one.
    assert not np.allclose(latents, old, atol=1e-3)
    assert not np.allclose(latents, new[0], atol=1e-6)
    assert np.linalg.norm(latents - new[0]) < np.linalg.norm(latents - old)


async def test_changes_that_come_at_once_are_all_made(stage: DenoiserStage) -> None:
    async with stage:
        started = asyncio.Event()
        running = asyncio.create_task(
            stage.denoise(job(3, steps=60), key="k", on_progress=lambda step, steps: started.set())
        )
        await started.wait()
        given_up = asyncio.create_task(stage.change("k", JobChange(guidance=Guidance(3.0))))
        await asyncio.sleep(0)
        given_up.cancel()
        texts = {Role.TARGET: embeds(77)}
        await asyncio.gather(
            stage.change("k", JobChange(conditioning=texts)), stage.change("k", JobChange(guidance=Guidance(2.0)))
        )
        _, changed = stage._changeable_jobs["k"]
        assert changed.guidance == Guidance(2.0)
        assert changed.conditioning[Role.TARGET] is texts[Role.TARGET]
        running.cancel()


async def test_a_late_change_leaves_the_next_image_of_its_key_alone(stage: DenoiserStage) -> None:
    async with stage:
        started = asyncio.Event()
        first = asyncio.create_task(
            stage.denoise(job(1, steps=100), key="k", on_progress=lambda step, steps: started.set())
        )
        await started.wait()
        first.cancel()
        late = asyncio.create_task(stage.change("k", JobChange(guidance=Guidance(2.0))))
        await asyncio.wait([first])
        started.clear()
        second = asyncio.create_task(
            stage.denoise(job(2, steps=100), key="k", on_progress=lambda step, steps: started.set())
        )
        await asyncio.gather(late, return_exceptions=True)
        await started.wait()
        await stage.change("k", JobChange(guidance=Guidance(4.0)))
        assert stage._changeable_jobs["k"][1].guidance == Guidance(4.0)
        second.cancel()


async def test_changes_that_cannot_be_made_leave_the_image_as_it_is(stage: DenoiserStage) -> None:
    bad_text = {Role.TARGET: {"prompt_embeds": np.zeros((3, 16), np.float32)}}
    async with stage:
        started = asyncio.Event()
        running = asyncio.create_task(
            stage.denoise(job(4, steps=40), key=1, on_progress=lambda step, steps: started.set())
        )
        await started.wait()
        for change in (JobChange(conditioning=bad_text), JobChange(strength=0.5)):
            with pytest.raises(InvalidRequestError):
                await stage.change(1, change)
        with pytest.raises(InvalidRequestError, match="key"):
            await stage.denoise(job(5), key=1)
        with pytest.raises(NotFoundError):
            await stage.change(2, JobChange(guidance=Guidance(2.0)))
        latents = await running
    np.testing.assert_allclose(latents, stage.run([job(4, steps=40)])[0], rtol=0, atol=1e-4)


async def test_a_new_strength_starts_again_from_the_source(stage: DenoiserStage) -> None:
    source = np.random.default_rng(5).normal(size=(4, 16, 16)).astype(np.float32)
    given = job(6, steps=40, init_latents=source, strength=1.0)
    async with stage:
        started = asyncio.Event()
        running = asyncio.create_task(stage.denoise(given, key="k", on_progress=lambda step, steps: started.set()))
        await started.wait()
        await stage.change("k", JobChange(strength=0.5))
        latents = await running
    np.testing.assert_allclose(latents, stage.run([replace(given, strength=0.5)])[0], rtol=0, atol=1e-4)


async def test_what_slots_hold_can_be_asked_from_any_thread(stage: DenoiserStage) -> None:
    """As a scrape does."""
    over, failed = threading.Event(), []

    def ask() -> None:
        while not over.is_set():
            try:
                stage.work  # noqa: B018 it is computed
            except RuntimeError as error:
                failed.append(error)

    usual_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        async with stage:
            asking = asyncio.create_task(asyncio.to_thread(ask))
            for _ in range(30):
                # Most of them never get a slot.
                coming = [asyncio.create_task(stage.denoise(job(k), label=str(k))) for k in range(16)]
                await asyncio.sleep(0)
                for one in coming:
                    one.cancel()
                await asyncio.gather(*coming, return_exceptions=True)
            over.set()
            await asking
    finally:
        over.set()
        sys.setswitchinterval(usual_s)
    assert not failed


async def test_time_without_work_is_told_while_it_passes(sd_checkpoint: Path) -> None:
    stage, metrics = DenoiserStage.load(sd_checkpoint, device="cpu", slots=4), CollectorRegistry()
    watch_ticks(stage, metrics)

    def waited_s() -> float:
        labels = {"model": stage.card.name, "phase": "wait"}
        return metrics.get_sample_value("streamflow_tick_phase_seconds_total", labels)

    assert waited_s() == 0
    async with stage:
        began_s = time.perf_counter()
        await asyncio.sleep(0.3)
        idle_s = waited_s()
        assert 0.2 < idle_s <= time.perf_counter() - began_s + 0.1
        # With the next tick it has been told already.
        working = asyncio.create_task(stage.denoise(job(steps=8)))
        while not working.done():
            before_s, _ = waited_s(), await asyncio.sleep(0.005)
            assert waited_s() >= before_s
        spent_s = sum(tick.seconds for tick in stage.ticks)
        assert waited_s() == pytest.approx(time.perf_counter() - began_s - spent_s, abs=0.2)
