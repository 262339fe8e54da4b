"""How processes end: children with their parent, in whatever way that ends (Linux only); services when told, at once.

The kernel sends the signal when the *thread* that started the child ends, so start children in a thread that lives as
long as they should.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Called in a child: it is killed when its parent ends; it outlives exec."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The parent may have ended before that was set; then this id is no longer its parent's.
    if os.getppid() != parent_pid:
        os._exit(1)


def dying_with_parent(argv: Sequence[str]) -> list[str]:
    """A command line that sets this up and then becomes `argv`; without the time that importing a package takes."""
    code = (
        f"import ctypes, os, sys; ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGKILL)}); "
        "os.getppid() == int(sys.argv[1]) or sys.exit(1); os.execv(sys.argv[2], sys.argv[2:])"
    )
    return [sys.executable, "-I", "-S", "-c", code, str(os.getpid()), *argv]


def end_when_told() -> None:
    """SIGTERM ends the process while it starts; once it serves, its server decides what that does.

    So it is anyway, but in a container whose first process this is: the kernel keeps from process 1 every signal for
    which it has no handler.
    """
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))


@contextmanager
def ended_at_once() -> Iterator[None]:
    """The process ends where this context does, with 0 or the code of a SystemExit; other errors go on.

    For what has been stopped in order by then. The interpreter's own end would abort in a thread that is still inside a
    network call, and takes longer than a drain to take apart what the libraries loaded.
    """
    code = 0
    try:
        yield
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 1
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
