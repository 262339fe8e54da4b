"""An uploaded picture gives the same pixels through the gateway, in a call of the encoder, and in the fused form."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gateway.images import prepare
from services.encoder.servicer import service
from streamflow.config import StageSettings
from streamflow.host.control import StageControl
from streamflow.pipeline import Pipeline
from streamflow.rpc.channels import Target, open_aio_channel
from streamflow.rpc.server import RpcServer
from streamflow.stages.imaging import decode_mask, decode_rgb
from streamflow.transport import codec
from streamflow.types import Stage
from streamflow.v1 import encoder_pb2, encoder_pb2_grpc
from tests.services.conftest import Rig, Stages

SIZE = (64, 32)
EXIF = Image.Exif()
EXIF[0x0112] = 6  # rotate by 90 degrees clockwise to view


def encode(pixels: np.ndarray, kind: str) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, exif=EXIF)
    return out.getvalue()


RNG = np.random.default_rng(0)
FILES = {
    "JPEG": encode(RNG.integers(0, 256, (90, 70, 3), np.uint8), "JPEG"),
    "16 bits": encode(RNG.integers(0, 2**16, (90, 70), np.uint16), "PNG"),
}
each_file = pytest.mark.parametrize("data", FILES.values(), ids=FILES.keys())


@pytest.fixture(scope="module")
def pipeline(sd_checkpoint: Path) -> Pipeline:
    return Pipeline.from_pretrained(sd_checkpoint, device="cpu", deterministic=True)


@pytest.mark.asyncio(loop_scope="module")
@each_file
async def test_the_encoders_call_encodes_what_the_gateway_stores(data: bytes, rig: Rig, stages: Stages) -> None:
    settings = StageSettings()
    control = StageControl(
        Stage.ENCODE,
        hosted=stages.encoder,
        handler=rig.handlers[Stage.ENCODE],
        transport=rig.transport,
        settings=settings,
        device="cpu",
    )
    request = encoder_pb2.EncodeRequest(init_image=data, width=SIZE[0], height=SIZE[1])
    async with (
        RpcServer(settings, services=[service(stages.encoder, control)]) as server,
        open_aio_channel(Target(server.address)) as channel,
    ):
        response = await encoder_pb2_grpc.TextEncoderStub(channel).Encode(request)
    stored = prepare(data, b"", width=SIZE[0], height=SIZE[1], max_pixels=10_000).init
    expected = await stages.encoder.encode_image(decode_rgb(stored, size=SIZE))
    assert np.array_equal(codec.from_pb(response.init_latents), expected)


@each_file
def test_the_fused_form_starts_from_what_the_gateway_stores(data: bytes, pipeline: Pipeline, tmp_path: Path) -> None:
    stored = prepare(data, data, width=SIZE[0], height=SIZE[1], max_pixels=10_000)
    assert stored.mask is not None
    plain = Image.fromarray(decode_rgb(stored.init, size=SIZE)), Image.fromarray(decode_mask(stored.mask, size=SIZE))
    (tmp_path / "picture").write_bytes(data)

    def latents(image: object, mask: object) -> np.ndarray:
        options = {"width": SIZE[0], "height": SIZE[1], "strength": 0.5, "steps": 2, "seed": 1, "output": "latents"}
        return pipeline(["a", "b"], image=image, mask=mask, **options).latents  # type: ignore[arg-type]

    expected = latents(*plain)
    opened = Image.open(io.BytesIO(data))
    for image in (data, tmp_path / "picture", str(tmp_path / "picture"), opened):
        assert np.array_equal(latents(image, image), expected)
    # The comparison would notice another picture.
    assert not np.array_equal(latents(plain[0].transpose(Image.Transpose.FLIP_LEFT_RIGHT), plain[1]), expected)
    assert not np.array_equal(latents(plain[0], plain[1].transpose(Image.Transpose.FLIP_LEFT_RIGHT)), expected)
