"""Users of Redis with the least rights: one for the gateway and one for each stage of a deployment.

Redis checks the commands, keys and channels of whoever runs a script inside that script too, so a user has what its
scripts call. tests/transport/test_acl.py derives the commands from the sources, and runs the transport as these users.

Rights to keys are to read and to write, since Redis 6.2 knows no others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streamflow.transport.keys import SHARED, prefix_of
from streamflow.types import Stage


@dataclass(frozen=True, slots=True)
class Rights:
    """What one kind of process may do.

    Attributes:
        commands: with subcommands as `xgroup|create`.
        keys: patterns behind a deployment's prefix, beside those that all have.
    """

    commands: frozenset[str]
    keys: frozenset[str]


_CONNECTION = "ping subscribe unsubscribe evalsha eval"
# What hands images on and ends them, whoever does it.
_MOVES = (
    "time hdel hget hmget hset hincrby hincrbyfloat hvals publish sadd scard srem xack xadd xdel xlen "
    "zadd zcard zrange zrem pexpire xpending xgroup|delconsumer"
)
_STAGE = "hsetnx set xclaim xgroup|create xinfo|groups xrange xread xreadgroup"
_BLOBS = "get set pttl pexpire"
_CACHE = "get set del strlen"
_GATEWAY = "hgetall smembers xtrim zcount zrangebyscore zrank zscore zrevrangebyscore xrevrange get set del strlen pttl"


def _words(*texts: str) -> frozenset[str]:
    return frozenset(" ".join(texts).split())


RIGHTS: Mapping[str, Rights] = {
    "gateway": Rights(_words(_CONNECTION, _MOVES, _GATEWAY), _words("blob:* cached:* jobs:*")),
    "encoder": Rights(_words(_CONNECTION, _MOVES, _STAGE, _BLOBS, _CACHE, "hgetall"), _words("blob:* cached:*")),
    "denoiser": Rights(_words(_CONNECTION, _MOVES, _STAGE, _BLOBS, _CACHE), _words("blob:* cached:* preview")),
    "decoder": Rights(_words(_CONNECTION, _MOVES, _STAGE, "get"), _words("blob:* preview")),
}
"""By kind of process."""

_KEYS = _words(*SHARED, "job:* res:*", *(f"{stage} {stage}:*" for stage in Stage))
_CHANNELS = _words("ev:* ended_jobs")


def user_line(name: str, rights: Rights, deployments: Sequence[str], password_sha256: str) -> str:
    """A line of the file that Redis reads (`aclfile`).

    Args:
        deployments: whose keys and channels it may touch; `*` stands for those of all.
        password_sha256: hex digits.
    """
    prefixes = [prefix_of(deployment) for deployment in deployments]
    keys = [f"~{prefix}{key}" for prefix in prefixes for key in sorted(_KEYS | rights.keys)]
    channels = [f"&{prefix}{channel}" for prefix in prefixes for channel in sorted(_CHANNELS)]
    commands = [f"+{command}" for command in sorted(rights.commands)]
    return " ".join(
        ["user", name, "reset", "resetchannels", "on", f"#{password_sha256}", *keys, *channels, "-@all", *commands]
    )


def administrator_line(name: str, password_sha256: str) -> str:
    """For people: who may do everything. Nobody else can, as the default user is off."""
    return f"user {name} reset resetchannels on #{password_sha256} ~* &* +@all"


DEFAULT_OFF = "user default reset resetchannels off"
