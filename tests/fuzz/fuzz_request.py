"""Bytes as a client sends them: a request that runs, or a refusal that helps.

The first byte chooses the model, the rest is a GenerateRequest.
"""

from __future__ import annotations

from collections.abc import Iterator

from tests.fuzz.fuzzing import run, watched

with watched():
    from google.protobuf.message import DecodeError

    from streamflow.errors import InvalidRequestError
    from streamflow.v1 import types_pb2
    from tests.properties.strategies import BIG, CARDS, big_request
    from tests.properties.test_requests import assert_helpful, assert_runs, take

SAMPLERS = ("euler", "euler-sde[eta=0.5]", "perflow[windows=4,exact=true]", "flowedit[last_plain=1]", "H2P1R1[shift=3]")


def target(data: bytes) -> None:
    try:
        request = types_pb2.GenerateRequest.FromString(data[1:])
    except DecodeError:
        return
    card = CARDS[(data or b"\0")[0] % len(CARDS)]
    try:
        filled = take(request, card)
    except InvalidRequestError as refusal:
        assert_helpful(refusal, request)
    else:
        assert_runs(request, filled, card)


def seeds() -> Iterator[bytes]:
    for number in range(len(CARDS)):
        for sampler in SAMPLERS:
            request = types_pb2.GenerateRequest(
                prompts=["a red circle", "שלום"],
                sampler=sampler,
                num_images=2,
                guidance_scale=3.5,
                seed=2**64 - 1,
                width=64,
                height=128,
                guidance=types_pb2.GuidanceOptions(mode=types_pb2.GUIDANCE_MODE_FULL, start_sigma=0.9, end_sigma=0.1),
                output=types_pb2.OutputOptions(format=types_pb2.IMAGE_FORMAT_JPEG, quality=80),
            )
            if sampler.startswith("flowedit"):
                request.MergeFrom(
                    types_pb2.GenerateRequest(init_image=b"x", strength=0.5, source_prompt="a blue square")
                )
            yield bytes([number]) + request.SerializeToString()
    for kind in BIG:
        yield b"\0" + big_request(kind, 300).SerializeToString()


if __name__ == "__main__":
    run(target, seeds())
