"""What a call returns, blocking and asyncio alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from streamflow import (
    AsyncClient,
    Client,
    GenerationError,
    InvalidRequestError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from streamflow.client import Accepted, Done, Event, ImageReady, Preview, Progress
from streamflow.types import Failure, ImageFormat, JobState
from tests.client.deployment import Deployment, noise


def test_generate_returns_every_image_in_order(client: Client) -> None:
    result = client.generate(["a red circle", "a blue ring"], num_images=2, seed=7, steps=3, width=32, height=24)
    assert [info.seed for info in result.infos] == [7, 8, 9, 10]
    assert result.seed == 7
    assert len(result.request_id) == 32
    for info, image in zip(result.infos, result.images, strict=True):
        assert (image.size, image.mode, info.steps) == ((32, 24), "RGB", 3)
        np.testing.assert_array_equal(np.asarray(image), noise(info.seed, 32, 24))
    assert result.timings["denoise_ms"] == 4.5  # of 3, 4, 5, 6


@pytest.mark.parametrize("kind", ["png", "raw"])
def test_large_images_come_in_parts_and_are_put_together(client: Client, kind: str) -> None:
    result = client.generate("a star", seed=3, width=720, height=720, format=kind)
    assert len(result.files[0]) > 2**20
    assert result.infos[0].format == kind
    np.testing.assert_array_equal(np.asarray(result.images[0]), noise(3, 720, 720))


def test_events_tell_the_story_in_order(client: Client) -> None:
    events = list(client.stream("a cross", steps=4))
    kinds = [type(event) for event in events]
    assert kinds[0] is Accepted
    assert kinds[-1] is Done
    assert kinds.count(ImageReady) == 1
    accepted, done = events[0], events[-1]
    assert isinstance(accepted, Accepted)
    assert (accepted.num_images, accepted.model, accepted.steps, accepted.attached) == (1, "shapes", 4, False)
    assert isinstance(done, Done)
    assert done.state is JobState.IMAGES
    ready = next(event for event in events if isinstance(event, ImageReady))
    assert ready.image.size == (64, 64)


def test_previews_and_progress_reach_who_watches_in_time() -> None:
    with Deployment(permits=0) as deployment, Client(deployment.address, timeout_s=30) as client:
        events = []
        for event in client.stream("a cross", steps=4, preview_interval_steps=2):
            if isinstance(event, Accepted):
                deployment.allow(1)
            events.append(event)
        steps = [event.step for event in events if isinstance(event, Progress)]
        assert steps == [1, 2, 3, 4]
        previews = [event for event in events if isinstance(event, Preview)]
        assert [(preview.step, preview.image.size) for preview in previews] == [(2, (16, 16)), (4, (16, 16))]


async def test_both_clients_give_the_same(deployment: Deployment, client: Client) -> None:
    arguments: dict[str, Any] = {"seed": 11, "num_images": 3, "format": "webp", "width": 64, "height": 32}
    blocking = client.generate("a ring", **arguments)
    async with AsyncClient(deployment.address) as other:
        asynchronous = await other.generate("a ring", **arguments)
        assert await other.models() == client.models()
        assert [event async for event in other.watch(blocking.request_id)][1:] == list(
            client.watch(blocking.request_id)
        )[1:]
    assert blocking.files == asynchronous.files
    assert [info.seed for info in blocking.infos] == [info.seed for info in asynchronous.infos] == [11, 12, 13]
    assert blocking.infos[0].format is ImageFormat.WEBP


def test_a_seed_follows_from_the_request_id(client: Client) -> None:
    first, again = (client.generate("a star", request_id="job-1") for _ in range(2))
    assert first.files == again.files
    assert client.generate("a star").seed != first.seed


def test_init_image_and_mask_from_a_picture_bytes_or_a_path(client: Client, tmp_path: Path) -> None:
    picture = Image.new("RGB", (64, 64), "red")
    picture.save(tmp_path / "red.png")
    mask = Image.new("L", (64, 64), 255)
    for image in (picture, (tmp_path / "red.png").read_bytes(), str(tmp_path / "red.png"), tmp_path / "red.png"):
        assert len(client.generate("a ring", image=image, mask=mask, strength=0.5).images) == 1


@pytest.mark.parametrize(
    ("options", "field", "allowed"),
    [
        ({"steps": -1}, "steps", "0 to 2"),
        ({"seed": 2**64}, "seed", "2**64 - 1"),
        ({"steps": 51}, "steps", "50"),
        ({"format": "gif"}, "format", "png, jpeg, webp, raw"),
        ({"priority": "urgent"}, "priority", "low, normal, high"),
        ({"image": "nowhere.png"}, "image", "a file that can be read"),
        ({"width": 63}, "width", "8"),
    ],
)
def test_a_bad_value_is_named_wherever_it_is_found(
    client: Client, options: dict[str, Any], field: str, allowed: str
) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        client.generate("a ring", **options)
    assert caught.value.field == field
    assert allowed in str(caught.value)


def test_an_option_that_does_not_exist_is_a_type_error(client: Client) -> None:
    with pytest.raises(TypeError, match="stepz"):
        client.generate("a ring", stepz=3)  # type: ignore[call-arg]


def test_a_failed_image_raises_what_the_stage_said(deployment: Deployment, client: Client) -> None:
    deployment.worker.fail[0] = Failure("INTERNAL", "the latents are not finite", "denoiser")
    events: list[Event] = []
    with pytest.raises(GenerationError, match="not finite") as caught:
        client.generate("a ring", on_event=events.append)
    assert caught.value.stage == "denoiser"
    assert [event.state for event in events if isinstance(event, Done)] == [JobState.ERROR]


def test_warnings_reach_the_result(deployment: Deployment, client: Client) -> None:
    deployment.worker.warnings = ("the prompt was cut",)
    assert [warning.message for warning in client.generate("a ring").warnings] == ["the prompt was cut"]


def test_submit_watch_and_look_up() -> None:
    with Deployment(permits=0) as deployment, Client(deployment.address, timeout_s=30) as client:
        job = client.submit("a ring", num_images=2, seed=5)
        assert (job.num_images, job.num_finished, job.seed) == (2, 0, 5)
        # Leaving a watch does not cancel.
        watching = client.watch(job.request_id)
        assert isinstance(next(watching), Accepted)
        watching.close()
        assert not client.job(job.request_id).state.terminal
        deployment.allow(2)
        ready = [event for event in client.watch(job.request_id) if isinstance(event, ImageReady)]
        assert sorted(event.info.seed for event in ready) == [5, 6]
        assert client.job(job.request_id).state is JobState.IMAGES
        assert client.cancel(job.request_id).state is JobState.IMAGES


def test_jobs_are_listed_page_by_page(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamflow.client.base._PAGE_SIZE", 2)
    ids = [client.submit("a ring", request_id=f"job-{k}").request_id for k in range(5)]
    assert [job.request_id for job in client.jobs()] == ids[::-1]
    assert [job.request_id for job in client.jobs(limit=3)] == ids[:1:-1]
    with pytest.raises(InvalidRequestError, match="limit: got 0; allowed: 1 or more"):
        client.jobs(limit=0)


def test_models_and_status(client: Client) -> None:
    (model,) = client.models()
    assert (model.name, model.default_steps, model.samplers) == ("shapes", 4, ("euler",))
    (stage,) = client.status().stages
    assert (stage.stage, stage.slots, stage.slots_in_use, stage.backend) == ("denoiser", 8, 3, "torch-eager")


def test_an_unknown_job_is_not_found(client: Client) -> None:
    for ask in (client.job, client.cancel, lambda name: list(client.watch(name))):
        with pytest.raises(NotFoundError, match="nobody"):
            ask("nobody")


def test_keys_are_sent_and_never_shown() -> None:
    with Deployment(keys="secret-1 alice\n") as deployment:
        with Client(deployment.address, api_key="secret-1") as client:
            assert client.models()
            assert "secret" not in repr(client)
        for key in (None, "wrong"):
            with Client(deployment.address, api_key=key) as client, pytest.raises(UnauthenticatedError):
                client.generate("a ring")


def test_a_gateway_that_is_not_there_is_given_up_soon() -> None:
    # Port 1 is never listened on here.
    client = Client("127.0.0.1:1", connect_timeout_s=0.5)
    with client, pytest.raises(UnavailableError, match=r"127.0.0.1:1: no StreamFlow gateway answers"):
        client.generate("a ring")
