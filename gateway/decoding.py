"""Pictures of clients, decoded away from the gateway: a file that breaks a decoder costs its own request.

async with ImageDecoder(max_pixels=4_000_000) as decoder:
    with decoder.room(request):
        async with decoder.turn(request) as prepare:
            images = await prepare(width=512, height=512)
"""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self

from gateway import frames
from gateway.images import prepare_all
from streamflow.config import environment_without_settings
from streamflow.errors import BusyError, InvalidRequestError, UnavailableError
from streamflow.processes import dying_with_parent
from streamflow.rpc.errors import from_status
from streamflow.telemetry import get_logger
from streamflow.v1 import types_pb2

# Decoding takes tens of megabytes at a time.
DECODERS_AT_ONCE = 2

# Of pictures as they came, until they are stored.
WAITING_BYTES = 128 * 2**20

# What a process may answer with, whatever became of it.
_FIELDS = frozenset({"init_image_blob", "mask_blob", "control_blob"})

_START_S = 60.0
_TIMEOUT_S = 15.0
_CPU_S = 10
# Longer is no queue, but Redis that hangs, or more pictures than a machine can decode.
_TURN_S = 30.0
# For the decoder's own needs, and for a picture in a few forms at once: 16 bits, with transparency, turned, resized.
_LEAST_BYTES, _BYTES_A_PIXEL = 192 * 2**20, 32

_log = get_logger(__name__)


class Prepare(Protocol):
    """Decodes the images of a request; answers by the fields of a JobSpec that refer to them."""

    async def __call__(self, *, width: int, height: int) -> Mapping[str, bytes]:
        """Raises InvalidRequestError: see `streamflow.pictures.load_source`."""
        ...


class Decoder(Protocol):
    """Decodes pictures, of a few requests at a time."""

    def room(self, request: types_pb2.GenerateRequest, *, tenant: str = "") -> AbstractContextManager[None]:
        """Counts the request's pictures as here, until they are stored or refused; to be entered before anything waits.

        Raises:
            BusyError: too many of this tenant, or of all, are here.
        """
        ...

    def turn(self, request: types_pb2.GenerateRequest) -> AbstractAsyncContextManager[Prepare]:
        """Entered when it is the request's turn, which others wait for until it is left.

        Raises:
            BusyError: it did not come in time.
        """
        ...


class InThread:
    """Decodes in this process: for pictures of one's own."""

    def __init__(self, *, max_pixels: int) -> None:
        self._max_pixels, self._at_once = max_pixels, asyncio.Semaphore(DECODERS_AT_ONCE)

    def room(self, request: types_pb2.GenerateRequest, *, tenant: str = "") -> AbstractContextManager[None]:
        """There is always room for what is here anyway."""
        return nullcontext()

    @asynccontextmanager
    async def turn(self, request: types_pb2.GenerateRequest) -> AsyncIterator[Prepare]:
        """See Decoder."""

        async def prepare(*, width: int, height: int) -> Mapping[str, bytes]:
            return await asyncio.to_thread(
                prepare_all, request, width=width, height=height, max_pixels=self._max_pixels
            )

        async with self._at_once:
            yield prepare


class ImageDecoder:
    """Decodes in processes that are kept warm; see `decode_child` for what they may do.

    A process that dies, takes too long or answers nonsense is ended and replaced, and its request refused. Use it from
    the main thread, because a child's life is tied to the thread that started it.

    Args:
        max_pixels: of a picture.
        children: processes.
        timeout_s, cpu_s: what the pictures of one request may take.
        turn_s: how long a request may wait for its turn.
        waiting_bytes: of pictures that are here; a tenant that has a key gets half.
        command: what runs a child.
    """

    def __init__(
        self,
        *,
        max_pixels: int,
        children: int = DECODERS_AT_ONCE,
        timeout_s: float = _TIMEOUT_S,
        cpu_s: int = _CPU_S,
        turn_s: float = _TURN_S,
        waiting_bytes: int = WAITING_BYTES,
        command: Sequence[str] = (sys.executable, "-m", "gateway.decode_child"),
    ) -> None:
        self._max_pixels, self._timeout_s, self._turn_s = max_pixels, timeout_s, turn_s
        memory = _LEAST_BYTES + _BYTES_A_PIXEL * max_pixels
        self._command = [*command, str(memory), str(cpu_s)]
        self._children = [_Child(self._command) for _ in range(children)]
        self._idle: asyncio.LifoQueue[_Child] = asyncio.LifoQueue()
        self._waiting = _Waiting(waiting_bytes)

    async def __aenter__(self) -> Self:
        for child in self._children:
            self._idle.put_nowait(child)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*(child.end() for child in self._children))

    async def warm_up(self) -> None:
        """Starts what is idle, so that no request waits for it."""
        await asyncio.gather(*(child.start() for child in self._children), return_exceptions=True)

    def room(self, request: types_pb2.GenerateRequest, *, tenant: str = "") -> AbstractContextManager[None]:
        """See Decoder."""
        return self._waiting.place(tenant, sum(map(len, _images(request).values())))

    @asynccontextmanager
    async def turn(self, request: types_pb2.GenerateRequest) -> AsyncIterator[Prepare]:
        """See Decoder; to prepare raises UnavailableError where no process can be started."""
        try:
            async with asyncio.timeout(self._turn_s):
                child = await self._idle.get()
        except TimeoutError as error:
            given = f"its pictures have waited for {self._turn_s:g} s to be decoded"
            raise BusyError(f"{given}; try again in a moment", reason="pictures") from error
        try:
            yield partial(self._prepare, child, _images(request))
        finally:
            self._idle.put_nowait(child)

    async def _prepare(
        self, child: _Child, images: Mapping[str, bytes], *, width: int, height: int
    ) -> Mapping[str, bytes]:
        size = {"width": width, "height": height, "max_pixels": self._max_pixels}
        try:
            about, found = await self._ask(child, frames.pack(size, images))
        except (TimeoutError, EOFError, OSError, ValueError) as error:
            if isinstance(error, UnavailableError):
                raise
            _log.warning("a process that decodes pictures was lost to one", reason=type(error).__name__)
            raise _too_much(images) from error
        if "refused" in about:
            raise from_status("INVALID_ARGUMENT", str(about["refused"]), dict(about.get("parts") or {}))
        return found

    async def _ask(self, child: _Child, frame: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
        go_on = False
        try:
            await child.start()
            async with asyncio.timeout(self._timeout_s):
                answer, after = await child.ask(frame)
            about, found = frames.unpack(answer)
            if not found.keys() <= _FIELDS:
                raise ValueError("not an answer")
            # It says when the CPU time of its life is nearly used up, before that costs a request.
            go_on = bool(frames.unpack(after)[0].get("go_on"))
            return about, found
        finally:
            # Whoever was broken off in the middle would answer the next request with what this one asked for.
            if not go_on:
                child.kill()


class _Waiting:
    """Counts the bytes of pictures that are here."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: Counter[str] = Counter()

    @contextmanager
    def place(self, tenant: str, size: int) -> Iterator[None]:
        """Whoever has nothing here, and finds nothing, may bring more than that.

        Raises:
            BusyError: too much of this tenant, or of all, is here.
        """
        mine, total = self._held[tenant], self._held.total()
        most = self._most // 2 if tenant else self._most
        if (mine and mine + size > most) or (total and total + size > self._most):
            raise BusyError("too many pictures wait to be decoded; try again in a moment", reason="pictures")
        self._held[tenant] += size
        try:
            yield
        finally:
            self._held[tenant] -= size


class _Child:
    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: asyncio.subprocess.Process | None = None
        self._killed: list[asyncio.subprocess.Process] = []
        self._starting = asyncio.Lock()

    async def start(self) -> None:
        """Where it does not run yet, or any more."""
        async with self._starting:
            if self._process is not None and self._process.returncode is None:
                return
            try:
                async with asyncio.timeout(_START_S):
                    self._process = await asyncio.create_subprocess_exec(
                        *dying_with_parent(self._command),
                        stdin=asyncio.subprocess.PIPE,
                        stdout=asyncio.subprocess.PIPE,
                        env=environment_without_settings(),
                        start_new_session=True,  # Ctrl-C is the gateway's business
                    )
                    await self._read(self._process)
            except (TimeoutError, EOFError, OSError, ValueError) as error:
                self.kill()
                raise UnavailableError("pictures cannot be decoded here now; try again in a moment") from error

    async def ask(self, frame: bytes) -> tuple[bytes, bytes]:
        """Its answer, and whether it can take another."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        process.stdin.write(frame)
        await process.stdin.drain()
        return await self._read(process), await self._read(process)

    def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                self._process.kill()
            self._killed = [*(one for one in self._killed if one.returncode is None), self._process]
        self._process = None

    async def end(self) -> None:
        """Returns when all that ever ran here has ended."""
        self.kill()
        await asyncio.gather(*(process.wait() for process in self._killed))

    async def _read(self, process: asyncio.subprocess.Process) -> bytes:
        assert process.stdout is not None
        prefix = await process.stdout.readexactly(frames.LENGTH.size)
        return await process.stdout.readexactly(frames.body_size(prefix))


def _images(request: types_pb2.GenerateRequest) -> dict[str, bytes]:
    return {"init": request.init_image, "mask": request.mask_image, "control": request.control.image}


def _too_much(images: Mapping[str, bytes]) -> InvalidRequestError:
    names = {"init": "init_image", "mask": "mask_image", "control": "control.image"}
    given = ", ".join(f"{len(data)} bytes of {names[name]}" for name, data in images.items() if data)
    field = next(names[name] for name, data in images.items() if data)
    allowed = "a picture that can be decoded in a few seconds and a little memory"
    return InvalidRequestError(field, given, allowed, "save it again as a plain PNG or JPEG")
