"""What both clients share: settings, messages to send, and what becomes of the answers. No I/O but reading files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from streamflow.client.arguments import (
    check_address,
    check_api_key,
    check_max_message_bytes,
    check_text,
    check_timeout_s,
    root_ca_of,
)
from streamflow.client.request import GenerateOptions, build_request
from streamflow.client.retry import Contact, Retry, RetryPolicy
from streamflow.client.session import Metadata, Session
from streamflow.client.views import Job
from streamflow.errors import InvalidRequestError
from streamflow.rpc.channels import DEFAULT_MAX_MESSAGE_BYTES, Target, key_metadata
from streamflow.telemetry.traces import current_metadata
from streamflow.v1 import gateway_pb2

DEFAULT_ADDRESS = "127.0.0.1:50051"
CALL_TIMEOUT_S = 30.0
CANCEL_TIMEOUT_S = 2.0
CLOSED = "this client is closed; make another one"

_PAGE_SIZE = 1000


class BaseClient:
    """Where the gateway is, and how patient its client.

    Args:
        address: "host:port" of a gateway, or what else gRPC resolves, such as "dns:///gateway:50051".
        api_key: sent with every call.
        tls: True trusts the system's authorities; a path or bytes (PEM) name others.
        timeout_s: deadline of a request that sets none of its own.
        connect_timeout_s: how long a gateway that has never answered this client is tried; one that has, until the
            call's own deadline.
        max_busy_retries: how often a request that is refused for load is sent again; None = until its deadline.
        max_message_bytes: largest gRPC message, either way: a request with its pictures, an answer in one piece.
            Images come in parts, whatever their size. The gateway has a limit of its own, 32 MiB by default.

    Raises:
        InvalidRequestError: one of them cannot be used; max_message_bytes is from 2 MiB to 1 GiB.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        api_key: str | None = None,
        tls: bool | bytes | str | Path = False,
        timeout_s: float = 600.0,
        connect_timeout_s: float = 10.0,
        max_busy_retries: int | None = None,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
    ) -> None:
        self.address, self.timeout_s = check_address(address), check_timeout_s(timeout_s)
        limit = check_max_message_bytes(max_message_bytes)
        self._target = Target(address, tls=bool(tls), root_ca=root_ca_of(tls), max_message_bytes=limit)
        self._key = key_metadata(check_api_key(api_key))
        connect_s = check_timeout_s(connect_timeout_s, "connect_timeout_s")
        self._policy = RetryPolicy(address, connect_s, max_busy_retries, tls=bool(tls))
        self._contact = Contact()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.address}{' with TLS' if self._target.tls else ''}>"

    @property
    def _metadata(self) -> Metadata:
        """Of a call: the key, and the span of the application, where it traces itself."""
        return (*self._key, *current_metadata())

    def _retry(self, timeout_s: float | None) -> Retry:
        limit_s = self.timeout_s if timeout_s is None else check_timeout_s(timeout_s)
        return Retry(self._policy, timeout_s=limit_s, contact=self._contact)

    def _session(self, prompt: str | Sequence[str], options: GenerateOptions, timeout_s: float | None) -> Session:
        request = build_request(prompt, **options)
        shared = bool(options.get("request_id"))
        return Session(request.request_id, self._retry(timeout_s), request=request, shared=shared)

    def _watching(self, request_id: str, timeout_s: float | None) -> Session:
        return Session(check_text("request_id", request_id), self._retry(timeout_s))


def job_request(request_id: str) -> gateway_pb2.GetJobRequest:
    return gateway_pb2.GetJobRequest(request_id=check_text("request_id", request_id))


def cancel_request(request_id: str) -> gateway_pb2.CancelRequest:
    return gateway_pb2.CancelRequest(request_id=check_text("request_id", request_id))


def retry_request(letter_id: str) -> gateway_pb2.RetryDeadLetterRequest:
    return gateway_pb2.RetryDeadLetterRequest(id=check_text("letter_id", letter_id))


def job_page(limit: int, token: str = "") -> gateway_pb2.ListJobsRequest:
    if limit < 1:
        raise InvalidRequestError("limit", limit, "1 or more")
    return gateway_pb2.ListJobsRequest(page_size=min(limit, _PAGE_SIZE), page_token=token)


def letters_request(limit: int) -> gateway_pb2.ListDeadLettersRequest:
    if not 1 <= limit <= _PAGE_SIZE:
        raise InvalidRequestError("limit", limit, f"1 to {_PAGE_SIZE}")
    return gateway_pb2.ListDeadLettersRequest(limit=limit)


def take_page(jobs: list[Job], page: gateway_pb2.ListJobsResponse, limit: int) -> gateway_pb2.ListJobsRequest | None:
    """Adds a page to `jobs`; returns what to ask next, None when that was all."""
    jobs += [Job.from_pb(job) for job in page.jobs]
    if not page.next_page_token or len(jobs) >= limit:
        return None
    return job_page(limit - len(jobs), page.next_page_token)
