"""Classes of the libraries that load checkpoints, imported when one is needed and told to be quiet.

A stage whose networks run as graphs needs few of them, and starts in a fraction of the time.
"""

from __future__ import annotations

from typing import Any


def from_diffusers(name: str) -> Any:
    import diffusers

    diffusers.logging.set_verbosity_error()
    diffusers.logging.disable_progress_bar()
    return getattr(diffusers, name)


def from_transformers(name: str) -> Any:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return getattr(transformers, name)
