"""StreamFlow: a serving system for rectified-flow image models.

    from streamflow import Client

    with Client("127.0.0.1:50051") as client:
        client.generate("a red circle on a white background").images[0].save("circle.png")

Names are loaded on first use: importing this package costs nothing, and only `Pipeline` needs the serving extra.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamflow.client import AsyncClient, Client, Result
    from streamflow.errors import (
        AlreadyExistsError,
        BusyError,
        DeadlineError,
        GenerationError,
        InvalidRequestError,
        JobCancelledError,
        NotFoundError,
        PermissionDeniedError,
        StreamFlowError,
        UnauthenticatedError,
        UnavailableError,
    )
    from streamflow.pipeline import Pipeline

__version__ = "0.1.0"

__all__ = [
    "AlreadyExistsError",
    "AsyncClient",
    "BusyError",
    "Client",
    "DeadlineError",
    "GenerationError",
    "InvalidRequestError",
    "JobCancelledError",
    "NotFoundError",
    "PermissionDeniedError",
    "Pipeline",
    "Result",
    "StreamFlowError",
    "UnauthenticatedError",
    "UnavailableError",
    "__version__",
]

_HOMES = {
    "AsyncClient": "streamflow.client",
    "Client": "streamflow.client",
    "Pipeline": "streamflow.pipeline",
    "Result": "streamflow.client",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, "streamflow.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
