"""What is refused, in which words, and what unset fields become."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway import admission
from streamflow.config import GatewaySettings
from streamflow.errors import DeadlineError, InvalidRequestError
from streamflow.types import ModelCard
from streamflow.v1 import types_pb2
from tests import cards

SETTINGS = GatewaySettings(max_prompts=4, max_images=8, max_prompt_chars=200, max_image_bytes=2**16)
CARD = replace(cards.CARD, default_height=96, max_width=128, max_height=256, default_steps=8)
TEXT = "a red circle"
IMAGE = b"not looked at here"


def request(**fields: object) -> types_pb2.GenerateRequest:
    return types_pb2.GenerateRequest(**{"prompts": [TEXT], **fields})


def output(**fields: object) -> types_pb2.GenerateRequest:
    return request(output=types_pb2.OutputOptions(**fields))


def fill_in(asked: types_pb2.GenerateRequest, card: ModelCard = CARD) -> types_pb2.GenerateRequest:
    return admission.fill_in(asked, card=card, settings=SETTINGS, request_id="made-here", seed=77)


BAD = [
    # request, field, what the message must hold
    (request(request_id="a" * 65), "request_id", "1 to 64"),
    (request(request_id="a:b"), "request_id", "'a:b'"),
    (request(request_id="../x"), "request_id", "A-Z"),
    (request(request_id="x\n"), "request_id", r"\n"),
    (request(request_id="ключ"), "request_id", "A-Z"),
    (request(request_id="a~b"), "request_id", "A-Z"),
    (request(request_id="x" * 10_240), "request_id", "10240 characters"),
    (request(model="flux"), "model", "shapes"),
    (request(priority=9), "priority", "PRIORITY_HIGH"),
    (request(priority=-1), "priority", "PRIORITY_HIGH"),
    (request(prompts=[]), "prompts", "1 to 4"),
    (request(prompts=[TEXT] * 5), "prompts", "5 prompts"),
    (request(prompts=[TEXT, ""]), "prompts[1]", "say what"),
    (request(prompts=[" \t\n "]), "prompts[0]", "say what"),
    (request(prompts=["x" * 201]), "prompts[0]", "at most 200 characters"),
    (request(prompts=["x" * 1_000_000]), "prompts[0]", "1000000 characters"),
    (request(prompts=["nul \0"]), "prompts[0]", "U+0000"),
    (request(prompts=["bell \x07"]), "prompts[0]", "U+0007"),
    (request(prompts=["escape \x1b[2J"]), "prompts[0]", "U+001B"),
    (request(negative_prompt="nul \0"), "negative_prompt", "U+0000"),
    (request(negative_prompt="x" * 201), "negative_prompt", "at most 200"),
    (request(class_labels=[3]), "class_labels", "takes prompts"),
    (request(steps=0), "steps", "1 to 50"),
    (request(steps=51), "steps", "got 51"),
    (request(steps=2**31), "steps", "2147483648"),
    (request(num_images=9), "num_images", "at most 8"),
    (request(prompts=[TEXT] * 4, num_images=3), "num_images", "over all prompts"),
    (request(num_images=10**6), "num_images", "at most 8"),
    (request(preview_interval_steps=51), "preview_interval_steps", "0 to 50"),
    (request(guidance_scale=math.nan), "guidance_scale", "nan"),
    (request(guidance_scale=math.inf), "guidance_scale", "inf"),
    (request(guidance_scale=-1), "guidance_scale", "0 to 100"),
    (request(guidance_scale=101), "guidance_scale", "0 to 100"),
    (request(true_cfg_scale=2), "true_cfg_scale", "guidance_scale only"),
    (request(sampler="dopri9"), "sampler", "euler"),
    (request(sampler="euler[x=1]"), "sampler", "the options shift"),
    (request(sampler="instaflow[x=1]"), "sampler", "no options"),
    (request(sampler="R2H2"), "sampler", "a first block E, H, M or P"),
    (request(sampler="H2X2"), "sampler", "there is no X"),
    (request(sampler="H2R2"), "sampler", "a checkpoint with a refiner"),
    (request(sampler="H2P2", steps=5), "steps", "4 with the sampler H2P2"),
    (request(sampler="perflow", steps=3), "steps", "at least 4 with 4 windows"),
    (request(sampler="flowedit"), "sampler", "only with an image"),
    (request(sampler="flowedit", init_image=b"x"), "source_prompt", "say what the image shows"),
    (request(source_prompt="a"), "source_prompt", "choose the sampler flowedit"),
    (request(sampler="euler]"), "sampler", "euler"),
    (request(width=1), "width", "multiples of 8 from 8 to 128"),
    (request(width=65), "width", "got 65"),
    (request(width=136), "width", "to 128"),
    (request(height=264), "height", "to 256"),
    (request(width=2**31), "width", "2147483648"),
    (request(height=2**32 - 1), "height", "4294967295"),
    (request(mask_image=IMAGE), "mask_image", "init_image"),
    (request(strength=0.5), "strength", "init_image"),
    (request(init_image=IMAGE, strength=0), "strength", "greater than 0"),
    (request(init_image=IMAGE, strength=-0.5), "strength", "greater than 0"),
    (request(init_image=IMAGE, strength=1.01), "strength", "at most 1"),
    (request(init_image=IMAGE, strength=math.nan), "strength", "nan"),
    (request(init_image=IMAGE, strength=math.inf), "strength", "inf"),
    (request(init_image=IMAGE, strength=0.01), "strength", "raise strength or steps"),
    (request(init_image=bytes(2**16 + 1)), "init_image", "65537 bytes"),
    (request(init_image=IMAGE, mask_image=bytes(2**16 + 1)), "mask_image", "65537 bytes"),
    (output(format=77), "output.format", "IMAGE_FORMAT_WEBP"),
    (output(decoder=-3), "output.decoder", "DECODER_KIND_TINY"),
    (output(decoder=types_pb2.DECODER_KIND_FULL), "output.decoder", "one of tiny"),
    (output(quality=101), "output.quality", "0 to 100"),
]


@pytest.mark.parametrize(("asked", "field", "said"), BAD, ids=[f"{field}-{said}" for _, field, said in BAD])
def test_a_refusal_names_field_value_and_what_is_allowed(asked, field, said):
    with pytest.raises(InvalidRequestError) as caught:
        fill_in(asked)
    assert caught.value.field == field
    assert said in str(caught.value)
    assert "got " in str(caught.value)
    assert "allowed: " in str(caught.value)
    assert len(str(caught.value)) < 500


GOOD = [
    request(prompts=["مرحبا עברית"]),
    request(prompts=["e\u0301 zero\u200bwidth \u202eright-to-left"]),
    request(prompts=["two\nlines\tand a tab"]),
    request(prompts=["x" * 200] * 4, num_images=2),
    request(seed=0),
    request(seed=2**64 - 1),
    request(steps=50, guidance_scale=0, sampler=" euler[] "),
    request(guidance_scale=100, preview_interval_steps=50),
    request(width=8, height=256),
    request(init_image=IMAGE, strength=1),
    request(init_image=IMAGE, mask_image=IMAGE),
    output(format=types_pb2.IMAGE_FORMAT_RAW, quality=100),
    request(request_id="a" * 64, model="shapes", priority=types_pb2.PRIORITY_HIGH),
]


@pytest.mark.parametrize("asked", GOOD, ids=range(len(GOOD)))
def test_what_is_allowed_is_taken_and_stays_as_it_was_given(asked):
    filled = fill_in(asked)
    for descriptor, value in asked.ListFields():
        if descriptor.name not in ("init_image", "mask_image", "sampler", "output"):
            assert getattr(filled, descriptor.name) == value
    assert not filled.init_image
    assert not filled.mask_image
    # What was filled in is itself a request that is taken, and nothing is left to fill in (its images are elsewhere).
    filled.ClearField("strength")
    again = fill_in(filled)
    assert again == filled


def test_unset_fields_take_the_models_values():
    filled = fill_in(request())
    assert (filled.request_id, filled.model, filled.seed, filled.num_images) == ("made-here", "shapes", 77, 1)
    assert (filled.width, filled.height, filled.steps, filled.guidance_scale) == (64, 96, 8, 3.0)
    assert (filled.sampler, filled.priority) == ("euler", types_pb2.PRIORITY_NORMAL)
    assert not filled.HasField("strength")
    expected = {"format": types_pb2.IMAGE_FORMAT_PNG, "quality": 90, "decoder": types_pb2.DECODER_KIND_TINY}
    assert filled.output == types_pb2.OutputOptions(**expected)
    assert fill_in(request(init_image=IMAGE)).strength == pytest.approx(0.8)


def test_zero_that_was_given_is_not_unset():
    filled = fill_in(request(seed=0, guidance_scale=0))
    assert (filled.seed, filled.guidance_scale) == (0, 0)


def test_the_digest_is_of_what_was_asked():
    assert admission.digest(request()) == admission.digest(request())
    assert admission.digest(request()) != admission.digest(request(seed=0))
    assert admission.digest(request(seed=1)) != admission.digest(request(seed=2))


@pytest.mark.parametrize("setting", ["max_reserved_bytes", "max_tenant_reserved_bytes"])
def test_a_request_that_can_never_fit_is_not_told_to_come_back(setting):
    settings = GatewaySettings(**{setting: 2**20})
    with pytest.raises(InvalidRequestError, match="fewer or smaller"):
        admission.check(request(num_images=8), card=CARD, settings=settings)


@pytest.mark.parametrize(("remaining_s", "expected_s"), [(None, 600), (5, 5), (1e9, 3600), (math.inf, 3600)])
def test_the_deadline_is_the_calls_within_bounds(remaining_s, expected_s):
    assert admission.timeout_s(remaining_s, GatewaySettings()) == expected_s


@pytest.mark.parametrize("remaining_s", [0, -1, math.nan])
def test_a_deadline_that_has_passed_is_said_to_have(remaining_s):
    with pytest.raises(DeadlineError, match="allow it more time"):
        admission.timeout_s(remaining_s, GatewaySettings())


NUMBERS = st.one_of(st.integers(0, 2**32 - 1), st.integers(0, 130))
SIGNED = st.integers(-(2**31), 2**31 - 1)
FLOATS = st.floats(width=32)
PROMPTS = st.one_of(st.just([TEXT]), st.lists(st.text(max_size=210), max_size=6))
WISHES = {
    "request_id": st.text(max_size=70),
    "model": st.text(max_size=10),
    "negative_prompt": st.text(max_size=210),
    "steps": NUMBERS,
    "guidance_scale": FLOATS,
    "sampler": st.one_of(st.just("euler"), st.text(max_size=10)),
    "seed": st.integers(0, 2**64 - 1),
    "num_images": NUMBERS,
    "class_labels": st.lists(NUMBERS, max_size=2),
    "true_cfg_scale": FLOATS,
    "width": NUMBERS,
    "height": NUMBERS,
    "init_image": st.binary(max_size=20),
    "strength": FLOATS,
    "mask_image": st.binary(max_size=20),
    "preview_interval_steps": NUMBERS,
    "priority": SIGNED,
    "output": st.builds(types_pb2.OutputOptions, format=SIGNED, quality=NUMBERS, decoder=SIGNED),
}


@given(st.fixed_dictionaries({"prompts": PROMPTS}, optional=WISHES))
def test_whatever_is_asked_is_taken_or_refused_by_name(fields):
    asked = types_pb2.GenerateRequest(**fields)
    try:
        filled = fill_in(asked)
    except InvalidRequestError as error:
        name = error.field.partition(".")[0].partition("[")[0]
        assert name in types_pb2.GenerateRequest.DESCRIPTOR.fields_by_name
        str(error).encode()
    else:
        assert 1 <= filled.steps <= CARD.max_steps
        assert filled.width % 8 == filled.height % 8 == 0
        assert 1 <= admission.num_images(filled) <= SETTINGS.max_images
        assert 0 <= filled.guidance_scale <= 100
        assert admission.reserved_bytes(filled) > 0
