"""The contract of the transport once more, as users with the least rights: nothing that it does is refused."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.transport.acl_worlds import AclWorld
from tests.transport.test_admission import *  # noqa: F403
from tests.transport.test_contract import *  # noqa: F403
from tests.transport.test_contract_ends import *  # noqa: F403
from tests.transport.test_contract_lists import *  # noqa: F403
from tests.transport.test_contract_retries import *  # noqa: F403


@pytest.fixture(params=["redis_62", "redis_7"])
async def world(request: pytest.FixtureRequest, deployment: str) -> AsyncIterator[AclWorld]:
    world = AclWorld(deployment, request.getfixturevalue(request.param))
    yield world
    await world.close()
    assert world.denied() == []


@pytest.fixture
async def redis_world(world: AclWorld) -> AclWorld:
    return world
