"""What a compromised peer writes to Redis: each image fails alone, and the workers and the images beside it go on.

The workers, handlers and stages are the product's; only the networks are replaced, and Redis is a real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.decoder.handler import DecodeHandler
from services.denoiser.handler import DenoiseHandler
from services.encoder.handler import EncodeHandler
from streamflow.errors import GenerationError, InvalidRequestError
from streamflow.flow.programs import Role
from streamflow.host import handoff
from streamflow.host.request import read_request
from streamflow.stages.decoder import DecoderStage
from streamflow.stages.denoiser import DenoiserStage
from streamflow.stages.encoder import EncoderStage, prompt_cache_key
from streamflow.transport import codec
from streamflow.transport.base import Entry, ImageRef, JobView, NewJob
from streamflow.transport.embedded import EmbeddedRedis
from streamflow.transport.handling import EntryContext, Finish, Handler, Outcome
from streamflow.transport.keys import Keys
from streamflow.transport.policy import Policy
from streamflow.transport.redis_client import connect
from streamflow.transport.redis_streams import RedisTransport
from streamflow.transport.worker import StageWorker
from streamflow.types import AdapterUse, DecoderKind, DenoiseJob, JobState, Stage, Tensors, WorkerInfo
from streamflow.v1 import types_pb2
from tests.properties.strategies import (
    CARD,
    MAX_MESSAGE_CHARS,
    STRANGE,
    bounded,
    check_failure,
    check_refusal,
    conditioning_bytes,
    picture_bytes,
    repeated,
    request_bytes,
    tensor_bytes,
    varint,
    wire,
)

pytestmark = pytest.mark.timeout(120)

# -- codec and specifications ----------------------------------------------------------------------------------------


@bounded(250)
@given(tensor_bytes(), st.booleans(), st.sampled_from([8, 64 * 2**20]))
@example(types_pb2.Tensor(dtype="float32", shape=[0, 2**32 - 1, 2**32 - 1]).SerializeToString(), False, 8)
def test_any_bytes_give_an_array_or_our_error(data, finite, max_bytes):
    try:
        array = codec.decode(data, field="latents", finite=finite, max_bytes=max_bytes)
    except InvalidRequestError as refusal:
        check_refusal(refusal, "latents")
        return
    message = types_pb2.Tensor.FromString(data)
    assert (array.dtype.name, array.shape) == (message.dtype, tuple(message.shape))
    assert array.astype(codec.DTYPES[message.dtype]).tobytes() == message.data
    assert message.crc32 == zlib.crc32(message.data)
    assert array.nbytes <= max_bytes
    assert array.flags.writeable
    assert np.isfinite(array).all() or not finite


@bounded(120)
@given(conditioning_bytes())
def test_any_bytes_give_named_arrays_or_our_error(data):
    try:
        arrays = codec.decode_tensors(data, field="text0", finite=True)
    except InvalidRequestError as refusal:
        check_refusal(refusal, "text0")
        return
    assert all(np.isfinite(array).all() for array in arrays.values())


def spec_of(request: bytes, *, revision: str, image: str, mask: str) -> bytes:
    others = types_pb2.JobSpec(model_revision=revision, init_image_blob=image, mask_blob=mask)
    return b"\x0a" + varint(len(request)) + request + others.SerializeToString()


BLOBS = st.sampled_from(["", "0" * 64, "../x", "\0", "f" * 70])


@bounded(150)
@given(
    st.one_of(
        st.builds(spec_of, request_bytes(), revision=st.sampled_from(["r1", "r1", "r2"]), image=BLOBS, mask=BLOBS),
        st.lists(wire(), max_size=3).map(b"".join),
    ),
    st.one_of(st.integers(0, 3), st.integers(-(2**70), 2**70)),
)
def test_any_specification_is_a_request_or_a_failure(data, index):
    try:
        request = read_request(data, index, CARD)
    except GenerationError as failure:
        check_failure(failure, "cannot be used")
        return
    assert 1 <= request.steps <= CARD.max_steps
    assert 0 <= request.seed < 2**64
    assert np.isfinite(request.program.coefficients).all()


# -- stages without networks -----------------------------------------------------------------------------------------

EMBEDS = {"prompt_embeds": np.zeros((4, 8), np.float32)}
LATENTS = np.zeros((4, 2, 2), np.float32)
LARGER = codec.encode(np.zeros((4, 8, 8), np.float32))
"""Good, but not of the picture that was asked for."""


class Texts:
    max_tokens = 32

    def encode(self, prompts: Sequence[str], adapters: Sequence[AdapterUse] = ()) -> list[Tensors]:
        return [EMBEDS for _ in prompts]

    def relevant(self, adapters: Sequence[AdapterUse]) -> tuple[AdapterUse, ...]:
        return ()

    def truncated(self, prompt: str) -> str:
        return ""


class Pictures:
    def encode(self, images: np.ndarray) -> np.ndarray:
        return np.zeros((len(images), 4, images.shape[2] // 8, images.shape[3] // 8), np.float32)

    def decode(self, latents: np.ndarray) -> np.ndarray:
        count, _, height, width = latents.shape
        return np.zeros((count, height * 8, width * 8, 3), np.uint8)


class Denoising:
    """Takes what a DenoiserStage takes, and refuses conditioning that does not fit as it does."""

    card = CARD

    async def denoise(
        self,
        job: DenoiseJob,
        *,
        label: str,
        on_progress: Callable[[int, int], None],
        on_preview: object,
        on_wait: object,
    ) -> np.ndarray:
        for tensors in job.conditioning.values():
            if {name: array.shape for name, array in tensors.items()} != {"prompt_embeds": (4, 8)}:
                raise InvalidRequestError("conditioning", sorted(tensors), "prompt_embeds [4, 8]")
        on_progress(1, 1)
        return np.zeros(handoff.latent_shape(CARD, width=job.width, height=job.height), np.float32)


@dataclass(frozen=True)
class Stages:
    encoder: EncoderStage
    decoder: DecoderStage

    def handlers(self, transport: RedisTransport) -> dict[Stage, Handler]:
        return {
            Stage.ENCODE: EncodeHandler(self.encoder, transport, cache_s=60.0),
            Stage.DENOISE: DenoiseHandler(cast("DenoiserStage", Denoising()), transport),
            Stage.DECODE: DecodeHandler(self.decoder, transport),
        }


@asynccontextmanager
async def stages() -> AsyncIterator[Stages]:
    async with (
        EncoderStage(Texts(), Pictures(), CARD, max_wait_s=0.0) as encoder,
        DecoderStage({DecoderKind.TINY: Pictures()}, CARD, max_wait_s=0.0) as decoder,
    ):
        yield Stages(encoder, decoder)


# -- what the peer writes --------------------------------------------------------------------------------------------

VICTIM, GOOD = "victim", "good"
CACHED = b"c" * 64
Fields = dict[bytes, bytes]


@dataclass(frozen=True)
class Forged:
    """An entry that no worker made.

    Attributes:
        how: "advanced" with the stages' own script, "placed" so that the image's field names it, or only "added".
        head: fields that the transport reads.
        payload: fields that the stages read, without their prefix.
        store: is cached, and kept as a blob; payloads refer to it.
    """

    how: str
    stage: Stage
    head: Fields
    payload: Fields
    store: bytes


NUMBERS = st.one_of(
    st.sampled_from([b"", b"0x10", b"nan", b"inf", b"-inf", b"1e999", b" 5 ", b"-1", b"1_0", "٣".encode(), b"\xff"]),
    repeated(b"9", 5000),
    st.integers(-(2**70), 2**70).map(lambda number: str(number).encode()),
    st.floats().map(lambda number: repr(number).encode()),
)
# Of jobs that are there, of none, and of what is no text.
JOBS = st.one_of(
    st.sampled_from([GOOD.encode(), VICTIM.encode(), b"none", b"", b"\xff\xfe", b"a:0"]),
    repeated(b"a", 3000),
    st.binary(max_size=9),
)
TRACES = st.one_of(st.just(b""), st.sampled_from([b"\xff", b"\0", STRANGE.encode()]), st.binary(max_size=60))
HEADS = st.fixed_dictionaries(
    {},
    optional={
        b"v": st.one_of(st.just(b"1"), NUMBERS),
        b"job": JOBS,
        b"index": st.one_of(st.just(b"0"), NUMBERS),
        b"deadline": NUMBERS,
        b"trace": TRACES,
        b"extra": st.binary(max_size=30),
    },
)
# At least what the script that gives entries out looks for.
PLACED = {b"v": b"1", b"job": VICTIM.encode(), b"index": b"0", b"deadline": b"9999999999.5", b"trace": b""}
PLACED_HEADS = st.fixed_dictionaries(
    {
        b"v": st.just(b"1"),
        b"job": st.one_of(st.sampled_from([VICTIM.encode(), b"none"]), JOBS.filter(lambda job: job != GOOD.encode())),
        b"index": st.one_of(st.just(b"0"), NUMBERS),
        b"deadline": st.one_of(st.just(PLACED[b"deadline"]), NUMBERS),
        b"trace": TRACES,
    }
)
NAMES = st.sampled_from(
    [b"text0", b"text1", b"init", b"mask", b"timings", b"returns", b"latents", b"latents_blob", b"state", b"state_blob"]
)
PROMPT, NEGATIVE = "a red circle", ""
TEXT_FIELDS = {
    f"text{role.value}".encode(): prompt_cache_key(CARD.revision, text).encode()
    for role, text in ((Role.TARGET, PROMPT), (Role.NEGATIVE, NEGATIVE))
}
"""What a denoiser needs to begin."""
DONE = st.sampled_from([b"1/2", b"0/4", b"2/1", b"999999/999999", b"1/2\n", "\u0661/2".encode(), b""])
VALUES = st.one_of(
    st.just(CACHED),
    st.just(b"hash of what is stored"),
    st.sampled_from([b"0" * 64, b"C" * 64, b"../../etc/passwd"]),
    repeated(b"a", 3000),
    NUMBERS,
    tensor_bytes(),
    st.lists(wire(), max_size=2).map(b"".join),
    st.builds(lambda ms: types_pb2.Timings(waiting_ms=ms, denoise_ms=-ms).SerializeToString(), st.floats()),
)
PAYLOADS = st.one_of(
    st.dictionaries(st.one_of(NAMES, st.binary(max_size=6)), VALUES, max_size=4),
    st.builds(lambda value: {b"text0": value, b"text1": value}, VALUES),
    st.builds(lambda value: {b"latents": value}, tensor_bytes()),
    st.builds(
        lambda name, value, done: TEXT_FIELDS | {name: value, b"done": done},
        st.sampled_from([b"state", b"state_blob", b"timings"]),
        st.one_of(
            VALUES, conditioning_bytes(), st.just(codec.encode_tensors({"latents": LATENTS, "velocity": LATENTS}))
        ),
        DONE,
    ),
)
STORES = st.one_of(tensor_bytes(), conditioning_bytes(), picture_bytes())


def forged(how: str, heads: st.SearchStrategy[Fields]) -> st.SearchStrategy[Forged]:
    return st.builds(Forged, st.just(how), st.sampled_from(Stage), heads, PAYLOADS, STORES)


FORGED = st.one_of(
    forged("added", HEADS),
    forged("advanced", st.just({})),
    # Fields that stand a second time behind the right ones.
    forged("advanced", HEADS),
    forged("placed", PLACED_HEADS),
)


def spec(*, init_image: str = "") -> bytes:
    request = types_pb2.GenerateRequest(
        prompts=[PROMPT],
        steps=2,
        guidance_scale=2.0,
        sampler="euler",
        seed=7,
        width=16,
        height=16,
        model=CARD.name,
    )
    return types_pb2.JobSpec(
        request=request, model_revision=CARD.revision, init_image_blob=init_image
    ).SerializeToString()


class Peer:
    """Whoever has a stage's connection to Redis: instead of the encoder, it works on the victim's image."""

    def __init__(self, transport: RedisTransport, keys: Keys, url: str, encode: Handler) -> None:
        self._transport, self._keys, self._encode = transport, keys, encode
        self.redis: Any = connect(url)
        self._next: Forged | None = None

    async def attack(self, one: Forged) -> None:
        """Begins an attack; what is not only added happens when the victim's image is given to us."""
        await self._transport.put_cached(CACHED.decode(), one.store, keep_s=60)
        for key in TEXT_FIELDS.values():
            await self._transport.put_cached(key.decode(), codec.encode_tensors(EMBEDS), keep_s=60)
        blob = await self._transport.put_blob(one.store, keep_s=60)
        if one.how == "added":
            await self._add(one, self.redis)
            return
        self._next = one
        with_image = b"init" in one.payload or b"mask" in one.payload
        data = spec(init_image=blob if with_image else "")
        await self._transport.admit(NewJob(VICTIM, hashlib.sha256(data).hexdigest(), data, num_images=1))

    async def __call__(self, context: EntryContext) -> Outcome:
        one, entry = self._next, context.entry
        if one is None or entry.ref.job_id != VICTIM:
            return await self._encode(context)
        # Once; an image that comes back from a later stage is the encoder's.
        self._next = None
        if one.how == "advanced":
            await self._advance(one, entry)
        else:
            await self._place(one)
        return Finish(b"too late, the image is elsewhere")

    async def _advance(self, one: Forged, entry: Entry) -> None:
        job, index = entry.ref.job_id, entry.ref.index
        more = [*itertools.chain(*one.head.items()), *self._payload(one)]
        args = (job, index, entry.stage.value, entry.id, "", one.stage.value, 0, *more)
        await self._transport._calls.script("advance", *args)

    async def _place(self, one: Forged) -> None:
        async with self.redis.pipeline(transaction=True) as both:
            # The id is ours to choose; what is added later comes behind it.
            entry = f"{(await self.redis.time())[0] * 1000 + 999}-{next(_numbers)}"
            await self._add(one, both, entry)
            both.hset(self._job(one.head[b"job"]), b"i" + one.head[b"index"], f"{one.stage.value}:{entry}")
            await both.execute()

    async def _add(self, one: Forged, redis: Any, entry: str = "*") -> None:
        payload = self._payload(one)
        fields = {**one.head, **dict(zip(payload[::2], payload[1::2], strict=True))} or {b"nothing": b""}
        await redis.execute_command("XADD", self._keys.stream(one.stage), entry, *itertools.chain(*fields.items()))

    def _payload(self, one: Forged) -> list[bytes]:
        blob = hashlib.sha256(one.store).hexdigest().encode()
        known = {name: blob if value == b"hash of what is stored" else value for name, value in one.payload.items()}
        return [part for name, value in known.items() for part in (b"p:" + name, value)]

    def _job(self, job_id: bytes) -> bytes:
        return self._keys.job("").encode() + job_id


_numbers = itertools.count(1)
_deployments = itertools.count(1)


class Deployment:
    """Three workers on a deployment of their own, and a peer among them."""

    def __init__(self, url: str, stages: Stages) -> None:
        self.name = f"entries-{next(_deployments)}"
        self.transport = RedisTransport.from_url(url, deployment=self.name, policy=Policy(lease_s=2.0))
        self.keys = Keys(self.name)
        handlers = stages.handlers(self.transport)
        self.peer = Peer(self.transport, self.keys, url, handlers[Stage.ENCODE])
        handlers[Stage.ENCODE] = self.peer
        self.workers = {
            stage: asyncio.create_task(self._worker(stage, handler).run(), name=f"worker {stage}")
            for stage, handler in handlers.items()
        }

    def _worker(self, stage: Stage, handler: Handler) -> StageWorker:
        info = WorkerInfo(f"{stage.value}-1", stage, "", CARD.name, CARD.revision, "none", "cpu", slots=4)
        return StageWorker(self.transport, stage, handler, info=lambda: info, capacity=4, progress_timeout_s=5.0)

    async def close(self) -> None:
        for task in self.workers.values():
            task.cancel()
        await asyncio.gather(*self.workers.values(), return_exceptions=True)
        await self.transport.close()
        await self.peer.redis.aclose()

    def check_workers(self) -> None:
        for task in self.workers.values():
            if task.done():
                raise AssertionError(f"{task.get_name()} ended") from task.exception()

    async def make(self, job_id: str) -> bytes:
        """One image in good faith: the bytes of its file."""
        data = spec()
        await self.transport.admit(NewJob(job_id, hashlib.sha256(data).hexdigest(), data, num_images=1))
        view = await self.ended(job_id)
        assert view.state is JobState.IMAGES, view.failure
        return await self.picture(job_id)

    async def picture(self, job_id: str) -> bytes:
        stored = await self.transport.result(ImageRef(job_id, 0))
        assert stored is not None
        return types_pb2.StoredImage.FromString(stored).data

    async def ended(self, job_id: str) -> JobView:
        async with asyncio.timeout(20):
            while not (view := await self.transport.job(job_id)).state.terminal:
                self.check_workers()
                await asyncio.sleep(0.005)
        return view

    async def until_empty(self) -> None:
        """Nothing waits in any stream: whatever was put there has been dealt with."""
        async with asyncio.timeout(20):
            while any([await self.peer.redis.xlen(self.keys.stream(stage)) for stage in Stage]):
                self.check_workers()
                await asyncio.sleep(0.005)


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with EmbeddedRedis() as server:
        yield server.url


async def test_forged_entries_stop_no_worker_and_disturb_no_image(redis_url, monkeypatch):
    # What is handed back is seen by the next read.
    monkeypatch.setattr("streamflow.transport.worker._BLOCK_S", 0.05)
    loop = asyncio.get_running_loop()
    seen: set[JobState] = set()
    pictures: set[bytes] = set()

    async with stages() as running:

        async def one_example(attacks: list[Forged]) -> None:
            deployment = Deployment(redis_url, running)
            try:
                for one in attacks[1:]:
                    await deployment.peer.attack(one)
                async with asyncio.TaskGroup() as both:
                    both.create_task(deployment.peer.attack(attacks[0]))
                    good = both.create_task(deployment.make(GOOD))
                pictures.add(good.result())
                await deployment.until_empty()
                if attacks[0].how == "advanced" and not attacks[0].head:
                    view = await deployment.ended(VICTIM)
                    seen.add(view.state)
                    if view.failure is None:
                        pictures.add(await deployment.picture(VICTIM))
                    else:
                        # The first attempt says what is wrong: no other would do better.
                        assert "attempts" not in view.failure.message
                        assert len(view.failure.message) < MAX_MESSAGE_CHARS
                pictures.add(await deployment.make("afterwards"))
                deployment.check_workers()
            finally:
                await deployment.close()

        @bounded(35)
        @given(FORGED, st.lists(forged("added", HEADS), max_size=2))
        @example(Forged("advanced", Stage.DENOISE, {}, {b"\xff": b""}, b""), [])
        @example(Forged("advanced", Stage.DECODE, {}, {b"latents": codec.encode(LATENTS)}, b""), [])
        @example(Forged("advanced", Stage.DECODE, {}, {b"latents": LARGER}, b""), [])
        @example(Forged("placed", Stage.DECODE, PLACED | {b"deadline": b"0x10"}, {}, b""), [])
        @example(Forged("placed", Stage.DECODE, PLACED | {b"trace": b"\xff"}, {}, b""), [])
        @example(Forged("placed", Stage.DECODE, PLACED | {b"index": b"-1"}, {}, b""), [])
        @example(Forged("placed", Stage.DECODE, PLACED | {b"job": b"none"}, {}, b""), [])
        def attack(first: Forged, more: list[Forged]) -> None:
            in_loop(one_example([first, *more]), loop)

        # The examples come from a thread of their own; the workers stay in this loop.
        await asyncio.to_thread(attack)
    assert len(pictures) == 1
    assert seen == {JobState.IMAGES, JobState.ERROR}


def in_loop(work: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop) -> None:
    asyncio.run_coroutine_threadsafe(work, loop).result(60)


PREVIEWS = st.builds(
    lambda head, payload: head | {b"p:" + name: value for name, value in payload.items()} or {b"nothing": b""},
    st.fixed_dictionaries({}, optional={b"job": JOBS, b"index": NUMBERS, b"step": NUMBERS, b"extra": NUMBERS}),
    PAYLOADS,
)


async def test_forged_previews_are_dropped_and_the_decoder_goes_on(redis_url, monkeypatch):
    monkeypatch.setattr("services.decoder.handler.LOOK_AGAIN_S", 0.01)
    loop = asyncio.get_running_loop()
    keys = Keys("previews")
    good = codec.encode(LATENTS)

    async with stages() as running, AsyncExitStack() as resources:
        transport = RedisTransport.from_url(redis_url, deployment="previews")
        resources.push_async_callback(transport.close)
        peer: Any = connect(redis_url)
        resources.push_async_callback(peer.aclose)

        async def one_example(forged: list[Fields]) -> None:
            handler = DecodeHandler(running.decoder, transport)
            for fields in [*forged, {b"job": b"j", b"index": b"0", b"step": b"1", b"p:latents": good}]:
                await peer.execute_command("XADD", keys.preview, "*", *itertools.chain(*fields.items()))
            showing = asyncio.create_task(handler.show_previews(idle=lambda: True), name="previews")
            try:
                async with asyncio.timeout(20):
                    while await peer.xlen(keys.preview) or not handler.counters["previews_total"]:
                        assert not showing.done()
                        await asyncio.sleep(0.005)
            finally:
                showing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await showing

        @bounded(30)
        @given(st.lists(PREVIEWS, min_size=1, max_size=3))
        def show(forged: list[Fields]) -> None:
            in_loop(one_example(forged), loop)

        await asyncio.to_thread(show)
