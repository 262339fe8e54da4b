"""Programs that are kept running: started, watched, started again after a crash, stopped in order.

Linux only: an exit is noticed through a pidfd, and children die with their parent by PR_SET_PDEATHSIG. That signal
comes when the *thread* that started them ends: run the event loop in a thread that lives as long as they should.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from streamflow.errors import StreamFlowError, UnavailableError
from streamflow.processes import dying_with_parent

OnLine = Callable[[str, str], None]
"""Takes the name of a program and one line that it wrote."""

Probe = Callable[[], Awaitable[None]]
"""Returns once the program is ready for work."""

_FIRST_DELAY_S = 0.25
_LONGEST_DELAY_S = 10.0
# Whoever lived so long was well; its next crash is a new one.
_WELL_AFTER_S = 30.0
_LAST_LINES = 20
_DRAIN_S = 0.5


class Program(Protocol):
    """Something that can be started again and again; `Command` and the embedded Redis are."""

    @property
    def pid(self) -> int: ...

    async def start(self) -> None: ...

    async def reap(self) -> str:
        """Called once after it has ended; says how."""
        ...


class Command:
    """A command line as a Program; what it writes goes to `on_line`.

    Args:
        argv: the program and its arguments.
        environment: all of it.
        on_line: takes lines of stdout and stderr.
    """

    def __init__(self, argv: Sequence[str], *, environment: Mapping[str, str], on_line: Callable[[str], None]) -> None:
        self._argv, self._environment, self._on_line = list(argv), dict(environment), on_line
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: asyncio.ReadTransport | None = None
        self._reader = LineReader(on_line)

    @property
    def pid(self) -> int:
        if self._process is None:
            raise UnavailableError(f"{self._argv[0]} is not running")
        return self._process.pid

    async def start(self) -> None:
        # Not in a worker thread: the child dies with the thread that started it.
        self._process = subprocess.Popen(  # noqa: ASYNC220
            dying_with_parent(self._argv),
            env=self._environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for us: we stop them in order
        )
        self._reader = LineReader(self._on_line)
        self._pipe, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: self._reader, self._process.stdout)

    async def reap(self) -> str:
        assert self._process is not None
        assert self._pipe is not None
        code = self._process.wait()
        # A grandchild that outlives it may keep the pipe open.
        with suppress(TimeoutError):
            await asyncio.wait_for(self._reader.ended.wait(), _DRAIN_S)
        self._pipe.close()
        return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"


class Supervised:
    """One program that is kept running by `run`.

    Args:
        name: for messages.
        probe: returns once the program is ready.
        on_line: takes what the supervisor has to say.
        grace_s: between SIGTERM and SIGKILL.

    Attributes:
        restarts: how often it was started again.
        last_ending: how it ended the last time, such as "exit code 0"; empty while it never has.
        last_lines: what it wrote last.
    """

    def __init__(self, name: str, program: Program, *, probe: Probe, on_line: OnLine, grace_s: float = 20.0) -> None:
        self.name = name
        self.restarts = 0
        self.last_ending = ""
        self.last_lines: deque[str] = deque(maxlen=_LAST_LINES)
        self._program, self._probe, self._on_line, self._grace_s = program, probe, on_line, grace_s
        self._running = False
        self._was_ready = False
        self._at_once = False
        self._stopping = asyncio.Event()
        self._over = asyncio.Event()
        self._exit = asyncio.Event()
        self._failure: StreamFlowError | None = None

    def __repr__(self) -> str:
        state = f"pid {self.pid}" if self._running else "stopped" if self._over.is_set() else "down"
        return f"<Supervised {self.name} {state}, {self.restarts} restarts>"

    @property
    def pid(self) -> int:
        """Raises UnavailableError while it is down."""
        if not self._running:
            raise UnavailableError(f"{self.name} is not running now")
        return self._program.pid

    @property
    def running(self) -> bool:
        return self._running

    async def run(self) -> None:
        """Keeps it running until `stop`; ends, with a failure for `wait_ready`, if it dies before it was ever ready."""
        delay_s = _FIRST_DELAY_S
        try:
            while not self._stopping.is_set():
                began_s = time.monotonic()
                ending = await self._run_once()
                if self._stopping.is_set():
                    return
                if not self._was_ready:
                    self._failure = UnavailableError(f"{self.name} ended with {ending}:\n" + "\n".join(self.last_lines))
                    return
                delay_s = _FIRST_DELAY_S if time.monotonic() - began_s > _WELL_AFTER_S else delay_s
                if not self._at_once:
                    self._say(f"ended with {ending}; starting it again in {delay_s:g} s")
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._stopping.wait(), delay_s)
                    delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
                self._at_once = False
                self.restarts += 1
        finally:
            self._over.set()

    async def wait_ready(self, timeout_s: float) -> None:
        """Raises UnavailableError when it ended first, or was not ready in time."""
        probe = asyncio.ensure_future(self._probe())
        over = asyncio.ensure_future(self._over.wait())
        try:
            await asyncio.wait({probe, over}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if probe.done():
                self._was_ready = True
                return probe.result()
            if self._failure is not None:
                raise self._failure
            lines = "\n".join(self.last_lines)
            raise UnavailableError(f"{self.name} is not ready after {timeout_s:g} s; it said last:\n{lines}")
        finally:
            for task in (probe, over):
                task.cancel()
            await asyncio.gather(probe, over, return_exceptions=True)

    async def kill(self) -> bool:
        """SIGKILL, as a crash would be; it is started again. Returns when it is dead; false where it was down."""
        if not self._running:
            return False
        self._signal(signal.SIGKILL)
        await self._exit.wait()
        return True

    async def restart(self) -> None:
        """Stops it in order and starts it at once; returns when the old one has ended.

        One that is down is left alone: it is about to be started anyway.
        """
        if self._running:
            self._at_once = True
            await self._terminate()

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL after the grace period. Returns when it has ended for good."""
        self._stopping.set()
        if self._running:
            await self._terminate()
        await self._over.wait()

    async def _run_once(self) -> str:
        self._exit.clear()
        try:
            await self._program.start()
        except (StreamFlowError, OSError) as error:
            self.last_lines.append(str(error))
            return str(error)
        self._running = True
        if self._stopping.is_set():
            # Asked to stop while it started: nobody else will tell it.
            self._signal(signal.SIGTERM)
        try:
            await _exited(self._program.pid)
        except asyncio.CancelledError:
            self._signal(signal.SIGKILL)
            raise
        finally:
            self._running = False
            self.last_ending = await self._program.reap()
            self._exit.set()
        return self.last_ending

    async def _terminate(self) -> None:
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self._exit.wait(), self._grace_s)
        except TimeoutError:
            self._say(f"has not ended {self._grace_s:g} s after SIGTERM: killed")
            await self.kill()

    def _signal(self, number: signal.Signals) -> None:
        assert self._running, "its id may be somebody else's by now"
        # It may end at any time, but its id is not given to others before it is reaped, and then it does not run.
        with suppress(ProcessLookupError):
            os.kill(self._program.pid, number)

    def _say(self, line: str) -> None:
        self._on_line("supervisor", f"{self.name} {line}")


async def _exited(pid: int) -> None:
    """Returns when a child has ended, without reaping it."""
    loop = asyncio.get_running_loop()
    ended = asyncio.Event()
    descriptor = os.pidfd_open(pid)
    loop.add_reader(descriptor, ended.set)
    try:
        await ended.wait()
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)


class LineReader(asyncio.Protocol):
    """Cuts what comes through a pipe into lines."""

    def __init__(self, on_line: Callable[[str], None]) -> None:
        self._on_line = on_line
        self._rest = b""
        self.ended = asyncio.Event()

    def data_received(self, data: bytes) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._on_line(line.decode("utf-8", "replace"))

    def connection_lost(self, exc: Exception | None) -> None:
        if self._rest:
            self._on_line(self._rest.decode("utf-8", "replace"))
        self.ended.set()
