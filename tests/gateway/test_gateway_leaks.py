"""What goes wrong inside is told to nobody outside, and no secret is told to the log."""

from __future__ import annotations

import logging
from typing import Any

import grpc.aio
import pytest

from streamflow.client import Client
from streamflow.config import ClientSettings, GatewaySettings, Settings
from streamflow.transport.base import Transport
from streamflow.transport.redis_access import RedisAccess
from streamflow.transport.redis_streams import RedisTransport
from tests.gateway.conftest import NAME
from tests.surface import call, methods, request_of

pytestmark = pytest.mark.parametrize("make_transport", ["memory"], indirect=True)
each_method = pytest.mark.parametrize("method", methods(NAME), ids=lambda method: method.name)

PASSWORD, PROMPT = "hunter2-of-redis", "a prompt that is nobody else's business"
KEY = "sf_a-key-that-nobody-may-see"
INSIDE = f"cannot open /srv/secret/{PASSWORD}.pem at redis://user:{PASSWORD}@10.9.8.7:6379/0"
# What belongs to the inside of a deployment.
TELLTALES = ("Traceback", ".py", "/srv", "redis", "10.9.8.7", "127.0.0.1:1", PASSWORD, KEY, "RuntimeError", "Errno")


def request(method: Any) -> Any:
    return request_of(method, request_id="r-1", id="1-0", prompts=[PROMPT])


def leaks(told: bytes) -> list[str]:
    return [word for word in TELLTALES if word.encode() in told]


def calls_of_transport(but: tuple[str, ...] = ()) -> list[str]:
    """Those that a gateway's calls lead to; its upkeep goes on."""
    names = [name for name, value in vars(Transport).items() if callable(value) and not name.startswith("_")]
    return [name for name in names if name not in ("close", "ping", "reap", *but)]


@each_method
async def test_internal_errors_are_told_neutrally(deploy, method, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    deployment = deploy()

    async def breaks(*args: object, **kwargs: object) -> None:
        raise RuntimeError(INSIDE)

    gateway = await deployment.gateway(reap_interval_s=60)
    for name in calls_of_transport(but=("subscribe", "ended_jobs")):
        monkeypatch.setattr(deployment.transport, name, breaks)
    metadata = (("authorization", f"Bearer {KEY}"),)
    code, told = await call(gateway.channel, method, request(method), metadata)
    assert code == "INTERNAL"
    assert leaks(told) == []
    assert any(INSIDE in str(one.exc_info) for one in caplog.records), "the operator must be told"
    for secret in (PROMPT, KEY):
        assert secret not in caplog.text


@each_method
async def test_where_redis_is_is_told_to_nobody(method, caplog, deploy, monkeypatch):
    caplog.set_level(logging.DEBUG)
    away = RedisTransport.from_url(f"redis://user:{PASSWORD}@127.0.0.1:1/0")
    deployment = deploy()
    gateway = await deployment.gateway(reap_interval_s=60)
    for name in calls_of_transport():
        monkeypatch.setattr(deployment.transport, name, getattr(away, name))
    # Without the retries of our own channels.
    async with grpc.aio.insecure_channel(gateway.server.address) as channel:
        code, told = await call(channel, method, request(method))
    # What is served can be told without Redis.
    assert code == ("OK" if method.name == "ListModels" else "UNAVAILABLE")
    assert leaks(told) == []
    assert code == "OK" or "127.0.0.1:1" in caplog.text, "the operator must be told"
    for secret in (PASSWORD, PROMPT):
        assert secret not in caplog.text
    await away.close()


@pytest.mark.parametrize("log_prompts", [False, True])
async def test_prompts_are_in_the_log_only_where_that_is_asked_for(deploy, caplog, log_prompts):
    caplog.set_level(logging.DEBUG)
    gateway = await deploy().gateway(log_prompts=log_prompts)
    [submit] = [method for method in methods(NAME) if method.name == "Submit"]
    assert (await call(gateway.channel, submit, request(submit)))[0] == "OK"
    [admitted] = [one for one in caplog.records if one.message == "admitted"]
    assert (PROMPT in str(vars(admitted))) is log_prompts
    assert GatewaySettings.model_fields["log_prompts"].default is False


def test_nothing_that_holds_a_secret_shows_it(monkeypatch, make_transport):
    url = f"redis://user:{PASSWORD}@h:1/0"
    monkeypatch.setenv("STREAMFLOW_API_KEY", KEY)
    for one in (
        Settings(redis_url=url),
        RedisAccess(url),
        RedisTransport.from_url(url),
        ClientSettings(),
        Client("127.0.0.1:1", api_key=KEY),
    ):
        assert PASSWORD not in repr(one)
        assert PASSWORD not in str(one)
        assert KEY not in repr(one) + str(one)
