"""Hostile values, and what the property tests need to look at them: generated, so no example is written down here."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from PIL import Image

from streamflow.errors import GenerationError, InvalidRequestError
from streamflow.flow.samplers import SAMPLERS
from streamflow.flow.schedules import DynamicShift, ScheduleSpec
from streamflow.flow.spec import FlowSpec, RefinerSpec, WindowSpec
from streamflow.transport import codec
from streamflow.types import DecoderKind
from streamflow.v1 import encoder_pb2, types_pb2
from tests import cards

Maker = Callable[[], bytes]


def bounded(max_examples: int) -> settings:
    """The same examples in every run, so that a red test is red again."""
    return settings(max_examples=max_examples, deadline=None, derandomize=True, database=None)


MAX_MESSAGE_CHARS = 2000


def check_refusal(refusal: InvalidRequestError, field: str) -> None:
    """It names the field, or a part of it, the value given and what is allowed, in few words."""
    assert refusal.field.startswith(field), refusal.field
    assert str(refusal).startswith(f"{refusal.field}: got {refusal.given}; allowed: {refusal.allowed}")
    assert refusal.given
    assert refusal.allowed
    assert len(str(refusal)) < MAX_MESSAGE_CHARS


def check_failure(failure: GenerationError, words: str) -> None:
    assert words in str(failure)
    assert len(str(failure)) < MAX_MESSAGE_CHARS


def repeated(one: Any, most: int) -> st.SearchStrategy[Any]:
    """Long values, without writing them down in the names of strategies."""
    return st.sampled_from([1, most // 2, most]).map(lambda count: one * count)


# -- models ----------------------------------------------------------------------------------------------------------

CARD = replace(cards.CARD, max_height=512, samplers=tuple(SAMPLERS))
_FLUX = FlowSpec(schedule=ScheduleSpec(DynamicShift(), "to-minimum"), round_up_strength=True, evaluates_data=True)
CARDS = (
    CARD,
    replace(CARD, flow=FlowSpec(timestep_rises=True, velocity_sign=-1.0, refiner=RefinerSpec(0.1, guided=True))),
    replace(CARD, flow=FlowSpec(windows=WindowSpec()), max_steps=1000, default_sampler="perflow"),
    replace(CARD, flow=FlowSpec(windows=WindowSpec("ddim_eps", windows=7)), default_sampler="perflow[exact=true]"),
    replace(
        CARD,
        flow=_FLUX,
        family="flux",
        max_steps=1000,
        default_sampler="H2P4",
        decoders=tuple(DecoderKind),
        embedded_guidance=True,
    ),
    replace(CARD, adapters=("ink", "wash"), controls=("edges",)),
)
"""One of each kind of flow, so that every way to compile a sampler is walked; and one with adapters."""

# -- values ----------------------------------------------------------------------------------------------------------

STRANGE = "\0\x07\x1b\x7f\x85\u00ad\u0301\u200b\u200d\u202e\u2066\u2028\ufeff\ufffe\U000e0001\U0001f469"
"""NUL and other controls, combining, joining, right-to-left, invisible and unassigned characters."""

UINT32 = st.one_of(st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1]), st.integers(0, 2**32 - 1))
UINT64 = st.one_of(st.sampled_from([0, 1, 2**63 - 1, 2**63, 2**64 - 1]), st.integers(0, 2**64 - 1))
FLOATS = st.one_of(
    st.sampled_from([float("nan"), float("inf"), -float("inf"), -0.0, -1.0, 1e-7, 1e-40, 1.0000001, 100.00001]),
    st.floats(width=32),
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.text(STRANGE, max_size=8),
    st.builds(lambda text, strange: f"a red {strange}{text}", st.text(max_size=20), st.sampled_from(STRANGE)),
    st.builds(
        lambda text, size: text * size, st.sampled_from(["x", "\u05d0", "\U0001f469\u200d"]), st.integers(0, 9000)
    ),
)
IDS = st.one_of(
    st.sampled_from(["", ".", "..", "../x", "a:b", "a\nb", "a~b", "a b", "-", "x" * 64, "x" * 65]),
    repeated("x", 10_240),
    st.text("aZ09._-", max_size=70),
    TEXTS,
)
# Where numbers of a name end, these are near; unknown ones are legal on the wire.
ENUMS = st.one_of(st.integers(0, 5), st.sampled_from([-(2**31), -1, 99, 2**31 - 1]))

_NUMBERS = st.one_of(
    st.integers(0, 60).map(str),
    st.floats().map(repr),
    st.sampled_from(["nan", "-inf", "1e999", "1_0", "\uff11\u0662", "+1", " 2 ", "0x10", "", "true", "\n3"]),
    repeated("1", 5000),
)
_OPTIONS = sorted({name for info in SAMPLERS.values() for name in info.options})
_OPTION = st.one_of(
    st.builds("{}={}".format, st.sampled_from(_OPTIONS), _NUMBERS),
    st.builds("windows={}".format, st.integers(1, 100)),
    st.sampled_from(["exact=true", "exact=false", "prediction=velocity", "prediction=ddim_eps", "last_plain=2"]),
    st.builds(
        lambda name, space: f"{space}{name}{space}=1", st.sampled_from(_OPTIONS), st.sampled_from(" \t\n\x1f\u3000")
    ),
    st.text("=,[] x\0\u202e", max_size=5),
)
_BLOCKS = st.lists(
    st.builds("{}{}".format, st.sampled_from("EHMPRLX"), st.one_of(st.integers(0, 9), st.integers(0, 10**5))),
    max_size=4,
).map("".join)
SAMPLER_TEXTS = st.one_of(
    st.sampled_from(sorted(SAMPLERS)),
    st.builds(
        "{}[{}]".format,
        st.one_of(st.sampled_from(sorted(SAMPLERS)), _BLOCKS),
        st.lists(_OPTION, max_size=3).map(",".join),
    ),
    _BLOCKS,
    TEXTS,
)
FILES = st.one_of(st.just(b""), st.binary(max_size=40), st.just(b"\x89PNG"), repeated(b"x", 2**16 + 1))


def _one_of(fields: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """One field of a message or all of them; what is refused first would hide the rest if it were always all."""
    one = [st.fixed_dictionaries({name: values}) for name, values in fields.items()]
    return st.one_of(*one, st.fixed_dictionaries({}, optional=fields))


_GUIDANCE = _one_of({"mode": ENUMS, "start_sigma": FLOATS, "end_sigma": FLOATS, "residual_strength": FLOATS})
_ADAPTER = _one_of({"name": st.one_of(st.sampled_from(["ink", "wash"]), TEXTS), "weight": FLOATS})
_CONTROL = _one_of({"name": st.one_of(st.just("edges"), TEXTS), "image": FILES, "scale": FLOATS})
_OUTPUT = _one_of({"format": ENUMS, "quality": UINT32, "decoder": ENUMS, "embed_metadata": st.booleans()})
HOSTILE: dict[str, st.SearchStrategy[Any]] = {
    "request_id": IDS,
    "model": TEXTS,
    "prompts": st.one_of(st.lists(TEXTS, min_size=1, max_size=1), st.lists(TEXTS, max_size=20)),
    "negative_prompt": TEXTS,
    "steps": UINT32,
    "guidance_scale": FLOATS,
    "sampler": SAMPLER_TEXTS,
    "seed": UINT64,
    "num_images": st.one_of(UINT32, st.just(10**6)),
    "class_labels": st.lists(UINT32, min_size=1, max_size=3),
    "true_cfg_scale": FLOATS,
    "width": st.one_of(UINT32, st.sampled_from([7, 8, 63, 1024, 1032])),
    "height": st.one_of(UINT32, st.sampled_from([7, 8, 63, 512, 1024])),
    "init_image": FILES,
    "strength": FLOATS,
    "mask_image": FILES,
    "output": _OUTPUT,
    "preview_interval_steps": UINT32,
    "priority": ENUMS,
    "detach": st.booleans(),
    "source_prompt": TEXTS,
    "guidance": _GUIDANCE,
    "time_budget_s": FLOATS,
    "min_steps": UINT32,
    "adapters": st.lists(_ADAPTER, min_size=1, max_size=4),
    "control": _CONTROL,
}
assert HOSTILE.keys() == set(types_pb2.GenerateRequest.DESCRIPTOR.fields_by_name), "a field that nothing is hostile to"

_PLAIN: dict[str, st.SearchStrategy[Any]] = {
    "steps": st.integers(4, 50),
    "guidance_scale": st.floats(0, 20, width=32),
    "sampler": st.sampled_from(["euler", "heun", "fireflow", "euler-sde[eta=0.5]", "perflow[windows=4]", "flowedit"]),
    "seed": UINT64,
    "num_images": st.integers(0, 5),
    "width": st.integers(0, 40).map(lambda count: 8 * count),
    "init_image": st.just(b"not looked at here"),
    "strength": st.floats(0.5, 1, width=32),
}
_PROMPTS = st.lists(st.sampled_from(["a red circle", "שלום", "e\u0301", "line\nbreak"]), min_size=1, max_size=3)


@st.composite
def requests(draw: st.DrawFn) -> types_pb2.GenerateRequest:
    """Good requests in which a field or two are hostile, or none: what is refused first would hide the rest."""
    fields = draw(st.fixed_dictionaries({"prompts": _PROMPTS}, optional=_PLAIN))
    if fields.get("sampler") == "flowedit":
        fields |= {"source_prompt": "a blue square", "init_image": b"not looked at here"}
    if "init_image" not in fields:
        fields.pop("strength", None)
    for name in draw(st.lists(st.sampled_from(sorted(HOSTILE)), max_size=2, unique=True)):
        fields[name] = draw(HOSTILE[name])
    return types_pb2.GenerateRequest(**fields)


# -- bytes -----------------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    return bytes([value]) if value < 128 else bytes([value & 127 | 128]) + varint(value >> 7)


def field_bytes(number: int, data: bytes) -> bytes:
    """A length-delimited field."""
    return varint(number << 3 | 2) + varint(len(data)) + data


_FIELD_NUMBERS = st.one_of(st.integers(1, 30), st.sampled_from([100, 1000, 2**29 - 1]))


@st.composite
def wire(draw: st.DrawFn) -> bytes:
    """Fields in every wire type, well-formed or not, nested or not."""
    number = draw(_FIELD_NUMBERS)
    kind = draw(st.integers(0, 8))
    match kind:
        case 0:  # a varint, also one that is too long
            return varint(number << 3) + draw(st.one_of(UINT64.map(varint), st.just(b"\xff" * 11)))
        case 1:
            return varint(number << 3 | 1) + draw(st.binary(min_size=8, max_size=8))
        case 2:
            return field_bytes(number, draw(st.binary(max_size=30)))
        case 3:  # a length that is a lie
            return varint(number << 3 | 2) + varint(draw(UINT64)) + draw(st.binary(max_size=10))
        case 4:  # groups that nothing ends
            return varint(number << 3 | 3) * draw(st.one_of(st.integers(1, 40), st.integers(90, 20_000)))
        case 5:  # messages in messages
            data = b""
            for _ in range(draw(st.integers(1, 200))):
                data = field_bytes(number, data)
            return data
        case 6:  # text that is not UTF-8
            return field_bytes(
                number, draw(st.sampled_from([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"a\x80", b"\xf4\x90\x80\x80"]))
            )
        case 7:  # a wire type that does not exist
            return varint(number << 3 | draw(st.sampled_from([6, 7]))) + draw(st.binary(max_size=4))
        case _:
            return varint(number << 3 | 5) + draw(st.binary(max_size=4))


@st.composite
def mutated(draw: st.DrawFn, data: bytes, *, most: int = 4) -> bytes:
    """Bytes with some changed, taken out, doubled or put in, or with the end cut off."""
    out = bytearray(data)
    for _ in range(draw(st.integers(0, most))):
        at = draw(st.integers(0, max(0, len(out) - 1)))
        match draw(st.integers(0, 5)):
            case 0 if out:
                out[at] ^= 1 << draw(st.integers(0, 7))
            case 1 if out:
                out[at] = draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFE, 0xFF]))
            case 2:
                del out[at : at + draw(st.integers(1, 20))]
            case 3:
                out[at:at] = draw(st.binary(max_size=10))
            case 4:
                out[at:at] = out[at : at + draw(st.integers(1, 40))]
            case _:
                del out[at:]
    return bytes(out)


def request_bytes() -> st.SearchStrategy[bytes]:
    """Serialized requests, whole, damaged, or with more fields behind; and other bytes."""
    whole = requests().map(lambda request: request.SerializeToString())
    return st.one_of(
        whole,
        whole.flatmap(mutated),
        st.builds(lambda data, more: data + b"".join(more), whole, st.lists(wire(), min_size=1, max_size=3)),
        st.lists(wire(), max_size=3).map(b"".join),
        st.binary(max_size=80),
    )


def big_request(kind: str, size: int) -> types_pb2.GenerateRequest:
    """About `size` bytes in one place of a request that is good but for them."""
    request = types_pb2.GenerateRequest(prompts=["a red circle"])
    match kind:
        case "commas":
            request.sampler = f"euler[{',' * size}]"
        case "spaces":
            request.sampler = f"euler[shift={' ' * size}2]"
        case "zeros":
            request.sampler = f"euler[shift={'0' * size}2]"
        case "blocks":
            request.sampler = f"H2P1[{',' * size}]"
            request.steps = 4
        case "unknown":
            request.MergeFromString(field_bytes(100, bytes(size)))
        case "unknown in guidance":
            request.guidance.MergeFromString(field_bytes(100, bytes(size)))
        case "labels":
            request.class_labels.extend([1] * size)
        case "prompts":
            request.prompts.extend(["x"] * (size // 3))
        case _:
            setattr(request, kind, "x" * size)
    return request


BIG = ("commas", "spaces", "zeros", "blocks", "unknown", "unknown in guidance", "labels", "prompts", "request_id")
BIG += ("negative_prompt", "source_prompt", "model", "sampler")

# -- tensors ---------------------------------------------------------------------------------------------------------

_SIDES = st.one_of(st.integers(0, 4), st.sampled_from([2**16, 2**31, 2**32 - 1]))
_DTYPES = st.one_of(
    st.sampled_from(sorted(codec.DTYPES)), st.sampled_from(["object", "float64", "<f4", "O", "V8", "M8[s]"])
)


@st.composite
def tensors(draw: st.DrawFn) -> types_pb2.Tensor:
    """Tensor messages: whole ones, and ones that lie about their size, type or checksum."""
    shape = draw(st.lists(_SIDES, max_size=9))
    dtype = draw(_DTYPES)
    size = int(np.prod([min(side, 8) for side in shape], dtype=np.int64)) * 4
    data = draw(st.one_of(st.binary(max_size=40), st.just(bytes(size)), st.just(b"\x00\x00\xc0\x7f" * (size // 4))))[
        :4096
    ]
    if draw(st.booleans()) and dtype in codec.DTYPES:
        # Most lies are found before the checksum; let some get past it.
        rest = len(data) - len(data) % codec.DTYPES[dtype].itemsize
        data = data[:rest]
        shape = draw(st.sampled_from([shape, [rest // codec.DTYPES[dtype].itemsize]]))
    crc32 = zlib.crc32(data) if draw(st.integers(0, 3)) else draw(UINT32)
    return types_pb2.Tensor(dtype=dtype, shape=shape, data=data, crc32=crc32)


def tensor_bytes() -> st.SearchStrategy[bytes]:
    whole = tensors().map(lambda tensor: tensor.SerializeToString())
    good = st.builds(
        lambda side, value: codec.encode(np.full((4, side, side), value, np.float32)),
        st.sampled_from([2, 8]),
        st.sampled_from([0.0, np.nan, -np.inf]),
    )
    pickled = st.sampled_from(
        [b"\x80\x04\x95\x0c\0\0\0\0\0\0\0.", b"cposix\nsystem\n(S'true'\ntR.", b"\x93NUMPY\x01\0", b"PK\3\4"]
    )
    damaged = st.one_of(whole, good).flatmap(mutated)
    return st.one_of(whole, good, damaged, pickled, st.lists(wire(), max_size=3).map(b"".join), st.binary(max_size=80))


def conditioning_bytes() -> st.SearchStrategy[bytes]:
    names = st.one_of(st.just("prompt_embeds"), TEXTS, repeated("n", 3000))
    whole = st.builds(
        lambda tensors, cut: encoder_pb2.Conditioning(tensors=tensors, truncated=cut).SerializeToString(),
        st.dictionaries(names, tensors(), max_size=3),
        TEXTS,
    )
    return st.one_of(whole, whole.flatmap(mutated), tensor_bytes())


# -- pictures --------------------------------------------------------------------------------------------------------


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 8
    while at + 12 <= len(data):
        (size,) = struct.unpack(">I", data[at : at + 4])
        yield data[at + 4 : at + 8], data[at + 8 : at + 8 + size]
        at += 12 + size


def _noise(width: int = 40, height: int = 24) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8))


def _file(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@lru_cache
def pictures() -> dict[str, bytes]:
    """Small files of every kind that there is to be read, and of some that are not."""
    picture, exif = _noise(), Image.Exif()
    exif[0x0112], exif[0x010E], exif[0x8769] = 6, "x" * 100, {0x9003: "2000:01:01 00:00:00"}
    frames = [picture.rotate(90), picture.rotate(180)]
    made = {f"PNG {mode}": _file(picture.convert(mode), "PNG") for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")}
    made["PNG palette with transparency"] = _file(picture.convert("P"), "PNG", transparency=bytes(range(200)))
    made["PNG EXIF"] = _file(picture, "PNG", exif=exif, icc_profile=bytes(500), dpi=(72, 72))
    made |= {f"JPEG {mode}": _file(picture.convert(mode), "JPEG") for mode in ("L", "RGB", "CMYK")}
    made["JPEG progressive"] = _file(picture, "JPEG", progressive=True)
    made["JPEG EXIF"] = _file(picture, "JPEG", exif=exif, icc_profile=bytes(500), comment=b"x")
    made["MPO"] = _file(picture, "MPO", save_all=True, append_images=frames)
    made["WEBP"] = _file(picture, "WEBP", method=0)
    made["WEBP lossless"] = _file(picture.convert("RGBA"), "WEBP", lossless=True, method=0)
    made["WEBP EXIF"] = _file(picture, "WEBP", exif=exif, icc_profile=bytes(500), method=0)
    made["WEBP animated"] = _file(picture, "WEBP", save_all=True, append_images=frames, method=0)
    made["PNG animated"] = _file(picture, "PNG", save_all=True, append_images=frames)
    return made


@lru_cache
def other_files() -> tuple[bytes, ...]:
    """What is not to be read, whatever it is dressed as."""
    picture = _noise()
    kinds = ("GIF", "BMP", "TIFF", "ICO", "PPM", "TGA", "PCX", "SGI", "DDS", "EPS", "PDF", "JPEG2000")
    texts = (b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0\n", b"PK\3\4" + bytes(30), b"\x7fELF")
    return (*(_file(picture, kind) for kind in kinds), *texts)


SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\xff\xff\0\0WEBPVP8 ", b"RIFF\xff\xff\0\0WEBPVP8X")


def claiming(kind: str, width: int, height: int) -> bytes:
    """A file whose header claims a size; the rest is that of a small picture."""
    match kind:
        case "PNG":
            (_, header), *rest = png_chunks(pictures()["PNG RGB"])
            chunks = [(b"IHDR", struct.pack(">II", width, height) + header[8:]), *rest]
            return SIGNATURES[0] + b"".join(png_chunk(name, data) for name, data in chunks)
        case "JPEG" | "JPEG progressive":
            data = bytearray(pictures()["JPEG RGB" if kind == "JPEG" else kind])
            at = data.index(b"\xff\xc0" if kind == "JPEG" else b"\xff\xc2")
            data[at + 5 : at + 9] = struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
            return bytes(data)
        case "WEBP":
            data = bytearray(pictures()["WEBP"])
            data[26:30] = struct.pack("<HH", width & 0x3FFF, height & 0x3FFF)
            return bytes(data)
        case _:
            # The canvas of an extended file; its picture stays small.
            data = bytearray(pictures()["WEBP EXIF"])
            data[24:30] = (width - 1 & 0xFFFFFF).to_bytes(3, "little") + (height - 1 & 0xFFFFFF).to_bytes(3, "little")
            return bytes(data)


CLAIMS = ("PNG", "JPEG", "JPEG progressive", "WEBP", "WEBP extended")

PARTS: dict[str, tuple[str, Callable[[int], bytes]]] = {
    "JPEG application data": ("JPEG RGB", lambda n: b"\xff\xe5\0\2" * n),
    "JPEG comments": ("JPEG RGB", lambda n: b"\xff\xfe\0\2" * n),
    "JPEG tables": ("JPEG RGB", lambda n: b"\xff\xdb\0\2" * n),
    "PNG private chunks": ("PNG RGB", lambda n: png_chunk(b"prVt", b"") * n),
    "PNG texts": ("PNG RGB", lambda n: b"".join(png_chunk(b"tEXt", b"%d\0" % k) for k in range(n))),
}
"""What a file may hold any number of: the picture that holds it, and n of them, to put behind the first bytes."""


def stuffed(part: str, count: int) -> bytes:
    """A picture with `count` of a part that no decoder needs."""
    name, make = PARTS[part]
    return _put_in(pictures()[name], make(count))


def profiles(count: int) -> bytes:
    """A PNG with so many colour profiles of a kilobyte, each of which is inflated to a megabyte."""
    return _put_in(pictures()["PNG RGB"], png_chunk(b"iCCP", b"x\0\0" + zlib.compress(bytes(2**20 - 1), 9)) * count)


def _put_in(data: bytes, more: bytes) -> bytes:
    at = 33 if data.startswith(SIGNATURES[0]) else 2
    return data[:at] + more + data[at:]


def scans(count: int, *, side: int = 512) -> bytes:
    """A progressive JPEG whose last scan, 14 bytes or so, comes `count` times more; each is a pass over the picture."""
    data = _file(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:-2] + data[last:-2] * count + data[-2:]


def blank(side: int) -> bytes:
    """A real picture of many pixels in few bytes."""
    return _file(Image.new("1", (side, side)), "PNG")


@st.composite
def picture_bytes(draw: st.DrawFn) -> bytes:
    """Files that are whole, damaged, in disguise, two in one, or that claim any size."""
    known = st.sampled_from(sorted(pictures())).map(lambda name: pictures()[name])
    others = st.integers(0, len(other_files()) - 1).map(lambda place: other_files()[place])
    side = st.one_of(st.integers(1, 300), st.sampled_from([0, 16383, 65535, 2**24, 2**31 - 1, 2**32 - 1]))
    data: bytes
    match draw(st.integers(0, 5)):
        case 0:
            data = draw(known)
        case 1:
            data = claiming(draw(st.sampled_from(CLAIMS)), draw(side), draw(side))
        case 2:
            data = draw(st.sampled_from(SIGNATURES)) + draw(others)
        case 3:
            first, second = draw(known), draw(st.one_of(known, others))
            cut = draw(st.sampled_from([0, 12, len(first) // 2, len(first)]))
            data = first[:cut] + second + first[cut:]
        case 4:
            # Chunks in any order, any number and with any bytes, whose checksums are right.
            chunks = list(
                png_chunks(pictures()[draw(st.sampled_from([name for name in pictures() if name[:3] == "PNG"]))])
            )
            picked = draw(st.lists(st.integers(0, len(chunks) - 1), min_size=1, max_size=8))
            named = [(chunks[k][0], draw(mutated(chunks[k][1], most=1))) for k in (0, *picked, -1)]
            data = SIGNATURES[0] + b"".join(png_chunk(name, data) for name, data in named)
        case _:
            data = stuffed(draw(st.sampled_from(sorted(PARTS))), draw(st.integers(0, 300)))
    return draw(mutated(data)) if draw(st.booleans()) else data
