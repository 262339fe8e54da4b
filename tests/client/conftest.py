"""A deployment for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from streamflow.client import Client
from tests.client.deployment import Deployment


@pytest.fixture
def deployment() -> Iterator[Deployment]:
    with Deployment() as deployment:
        yield deployment


@pytest.fixture
def client(deployment: Deployment) -> Iterator[Client]:
    with Client(deployment.address, timeout_s=30) as client:
        yield client
