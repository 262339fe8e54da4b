"""The SDK: `Client` blocks, `AsyncClient` is for asyncio; both make the same calls and return the same types."""

from streamflow.client.aio import AsyncClient
from streamflow.client.events import (
    Accepted,
    Done,
    Event,
    ImageInfo,
    ImageReady,
    Preview,
    Progress,
    Queued,
    RequestWarning,
    Timings,
)
from streamflow.client.request import GenerateOptions, new_request_id
from streamflow.client.result import Result
from streamflow.client.sync import Client
from streamflow.client.views import Job, Model, Queue, SlotWork, StageStatus, Status

__all__ = [
    "Accepted",
    "AsyncClient",
    "Client",
    "Done",
    "Event",
    "GenerateOptions",
    "ImageInfo",
    "ImageReady",
    "Job",
    "Model",
    "Preview",
    "Progress",
    "Queue",
    "Queued",
    "RequestWarning",
    "Result",
    "SlotWork",
    "StageStatus",
    "Status",
    "Timings",
    "new_request_id",
]
