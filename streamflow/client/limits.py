"""What a client says of a message that is larger than it, or the gateway, takes."""

from __future__ import annotations

import re

import grpc

from streamflow.errors import InvalidRequestError, StreamFlowError
from streamflow.rpc.errors import from_rpc_error

_TOO_LARGE = re.compile(r"(CLIENT|SERVER): (Sent|Received) message larger than max \((\d+) vs\. (\d+)\)")


def client_error(error: grpc.RpcError) -> StreamFlowError:
    """As `from_rpc_error`, but a message over a limit is told of in the user's words: gRPC says neither whose it is."""
    found = _TOO_LARGE.search(error.details() or "") if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED else None
    return _too_large(*found.groups()) if found else from_rpc_error(error)


def _too_large(side: str, direction: str, size: str, limit: str) -> InvalidRequestError:
    upload = (side, direction) in (("CLIENT", "Sent"), ("SERVER", "Received"))
    owner, remedy = {
        "CLIENT": ("this client", "create the client with a larger max_message_bytes"),
        "SERVER": ("the gateway", "have the gateway started with a larger --max-message-bytes"),
    }[side]
    return InvalidRequestError(
        "request" if upload else "answer",
        f"a message of {size} bytes",
        f"{limit} bytes, the limit of {owner}",
        f"send smaller pictures, or {remedy}" if upload else remedy,
    )
