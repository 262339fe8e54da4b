"""Files on disk that were made of something: used only while they are whole, and what they were made of is the same.

engines/REVISION/unet.onnx           what was made
                 unet.json           its manifest, written last: what it was made of, and the digest of every file
                 unet.lock           held by the process that makes it
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from streamflow.errors import NotFoundError, StreamFlowError, UnavailableError

MadeOf = Mapping[str, Any]
"""What a thing was made of, in terms of JSON."""


class Store:
    """Things by name in one folder.

    Args:
        folder: made when something is.
        kind: of what is there, such as "graph".
        remedy: what errors tell users to do.
    """

    def __init__(self, folder: Path, *, kind: str, remedy: str) -> None:
        self.folder, self._kind, self._remedy = folder, kind, remedy

    def __repr__(self) -> str:
        return f"Store({self.folder}, {self._kind})"

    def make(self, name: str, made_of: MadeOf, write: Callable[[Path], None]) -> None:
        """Has it made, unless it is there; of several processes one makes it, and the others wait.

        Args:
            write: puts files whose names begin with `name` into the folder that it is given.

        Raises:
            UnavailableError: the folder cannot be written to.
        """
        # First without the lock: a folder that can only be read may have it.
        with suppress(NotFoundError):
            self.check(name, made_of)
            return
        try:
            self._make(name, made_of, write)
        except StreamFlowError:
            raise
        except OSError as error:
            message = f"{name}: the {self._kind} cannot be written to {self.folder} (STREAMFLOW_ENGINES): {error}"
            raise UnavailableError(message) from error

    def _make(self, name: str, made_of: MadeOf, write: Callable[[Path], None]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / f"{name}.lock"):
            with suppress(NotFoundError):
                self.check(name, made_of)
                return
            self._manifest(name).unlink(missing_ok=True)
            # What a process left that was killed while it held the lock.
            for left in self.folder.glob(f"{name}.made-*"):
                shutil.rmtree(left, ignore_errors=True)
            with TemporaryDirectory(prefix=f"{name}.made-", dir=self.folder) as made:
                write(Path(made))
                files = sorted(Path(made).iterdir())
                manifest = {"made_of": dict(made_of), "sha256": {file.name: sha256(file) for file in files}}
                for file in files:
                    os.replace(file, self.folder / file.name)
                # Last: without it nothing of the others is used.
                new = Path(made) / "manifest"
                new.write_text(json.dumps(manifest, indent=2) + "\n", "utf-8")
                os.replace(new, self._manifest(name))

    def check(self, name: str, made_of: MadeOf) -> None:
        """Whether it is there, whole and made of just this.

        Raises:
            NotFoundError: it is not, and why.
        """
        try:
            manifest = self._read(name)
            said = manifest["made_of"]
            for key, value in made_of.items():
                if said.get(key) != value:
                    raise ValueError(f"it was made for {key} {said.get(key)!r}, not {value!r}")
            for file, digest in manifest["sha256"].items():
                path = self.folder / file
                if not path.is_file():
                    raise ValueError(f"{file} is missing")
                if sha256(path) != digest:
                    raise ValueError(f"{file} is not what was written")
        except FileNotFoundError:
            raise NotFoundError(f"{name}: no {self._kind} in {self.folder}; {self._remedy}") from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            message = f"{name}: the {self._kind} in {self.folder} cannot be used: {error}; {self._remedy}"
            raise NotFoundError(message) from None

    def contents(self) -> dict[str, MadeOf]:
        """What is there, whole or not, and what it says it was made of; broken manifests are left out."""
        found: dict[str, MadeOf] = {}
        for path in sorted(self.folder.glob("*.json")):
            with suppress(OSError, ValueError, TypeError, KeyError):
                found[path.stem] = dict(self._read(path.stem)["made_of"])
        return found

    def _read(self, name: str) -> dict[str, Any]:
        said: dict[str, Any] = json.loads(self._manifest(name).read_text("utf-8"))
        return said

    def _manifest(self, name: str) -> Path:
        return self.folder / f"{name}.json"


def sha256(file: Path) -> str:
    """Of a file's bytes, in hexadecimal digits."""
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Held by one process at a time; it goes with the process. Raises OSError where it cannot be made."""
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
