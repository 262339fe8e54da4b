"""A transport that talks to Redis as what calls it in a deployment: as the gateway, or as one of the stages."""

from __future__ import annotations

import hashlib
import secrets
from typing import Any

import redis

from streamflow.transport.acl import RIGHTS, user_line
from streamflow.transport.base import Limits
from streamflow.transport.embedded import EmbeddedRedis
from streamflow.transport.policy import Policy
from streamflow.transport.redis_streams import RedisTransport
from streamflow.types import Stage
from tests.transport.worlds import FAST, World

# What workers do in every stage, and then which of them has to do with the rest.
OF_STAGES = ("read", "advance", "finish", "heartbeat", "hand_back")
OF_ONE = {
    "spec": "encoder",
    "put_blob": "encoder",
    "get_blob": "denoiser",
    "put_cached": "encoder",
    "get_cached": "denoiser",
    "publish": "denoiser",
    "push_preview": "denoiser",
    "pop_preview": "decoder",
    "register": "denoiser",
    "unregister": "denoiser",
    "ended_jobs": "decoder",
}


def make_users(server: EmbeddedRedis, deployment: str) -> dict[str, str]:
    """Puts the users of a deployment into a running server; their URLs by role."""
    urls = {}
    with redis.Redis.from_url(server.url) as raw:
        for role, rights in RIGHTS.items():
            name, password = f"{deployment}-{role}", secrets.token_hex(8)
            line = user_line(name, rights, [deployment], hashlib.sha256(password.encode()).hexdigest())
            raw.execute_command("ACL", "SETUSER", *line.split()[1:])
            urls[role] = f"redis://{name}:{password}@{server.url.rpartition('@')[2]}"
    return urls


class RoleTransport:
    """Each call goes through the transport of the role whose call it is."""

    def __init__(self, by_role: dict[str, RedisTransport]) -> None:
        self.by_role = by_role

    def __getattr__(self, name: str) -> Any:
        if name not in OF_STAGES:
            return getattr(self.by_role[OF_ONE.get(name, "gateway")], name)

        def call(first: Any, *args: Any, **kwargs: Any) -> Any:
            stage = first if isinstance(first, Stage) else first.stage
            return getattr(self.by_role[stage.service], name)(first, *args, **kwargs)

        return call


class AclWorld(World):
    """Like World; `denied` says what Redis refused."""

    def __init__(self, deployment: str, server: EmbeddedRedis) -> None:
        super().__init__(deployment, server)
        self._urls = make_users(server, deployment)
        with redis.Redis.from_url(server.url) as raw:
            raw.acl_log_reset()

    def open(self, *, policy: Policy = FAST, limits: Limits | None = None) -> Any:
        made = {
            role: RedisTransport.from_url(url, deployment=self.deployment, policy=policy, limits=limits)
            for role, url in self._urls.items()
        }
        self._opened += made.values()
        return RoleTransport(made)

    def denied(self) -> list[Any]:
        assert self.server is not None
        with redis.Redis.from_url(self.server.url) as raw:
            log = raw.acl_log()
        return [(one["username"], one["reason"], one["object"]) for one in log]
