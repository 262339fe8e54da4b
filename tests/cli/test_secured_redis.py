"""A whole small deployment on a Redis with TLS and a user for each kind of process."""

from __future__ import annotations

import asyncio
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
import trustme

from streamflow.cli.acl_files import users_of, write
from streamflow.cli.supervisor import COMMANDS, LocalDeployment
from streamflow.client import AsyncClient
from streamflow.errors import InvalidRequestError, StreamFlowError, UnavailableError
from streamflow.ports import free_port
from streamflow.transport.acl import RIGHTS
from streamflow.transport.embedded import EmbeddedRedis
from streamflow.transport.redis_access import RedisAccess
from streamflow.transport.redis_streams import RedisTransport
from tests.transport.worlds import redis_binary

pytestmark = pytest.mark.timeout(180)
SHAPES = Path(__file__).parent.parent.parent / "models" / "shapes"
PROMPT = "a large red circle on a white background"


class SecuredRedis(EmbeddedRedis):
    """With the users of a file, and TLS where there are certificates in the folder."""

    def __init__(self, version: str, folder: Path, *, tls: bool) -> None:
        super().__init__(binary=redis_binary(version), directory=folder / "data", port=free_port())
        self._folder, self._tls = folder, tls

    @property
    def url(self) -> str:
        return self.url_of("administrator", password=True)

    def url_of(self, user: str, *, password: bool = False) -> str:
        secret = ":" + (self._folder / f"{user}.password").read_text() if password else ""
        return f"redis{'s' if self._tls else ''}://{user}{secret}@localhost:{self._port}/0"

    def raw_client(self) -> redis.Redis:
        names = {"ssl_ca_certs": "ca.pem", "ssl_certfile": "client.pem", "ssl_keyfile": "client-key.pem"}
        files = {name: str(self._folder / file) for name, file in names.items()}
        return redis.Redis.from_url(self.url, **(files if self._tls else {}))

    def _config(self) -> str:
        lines = [line for line in super()._config().splitlines() if not line.startswith(("requirepass", "bind"))]
        lines += [f'aclfile "{self._folder / "users.acl"}"', "bind 127.0.0.1"]
        if self._tls:
            lines = [line for line in lines if not line.startswith("port")]
            lines += ["port 0", f"tls-port {self._port}", f'tls-ca-cert-file "{self._folder / "ca.pem"}"']
            lines += [f'tls-cert-file "{self._folder / "cert.pem"}"', f'tls-key-file "{self._folder / "key.pem"}"']
            lines += ["tls-auth-clients yes"]
        return "\n".join(lines) + "\n"

    def _wait_until_ready(self, process: object) -> None:
        for _ in range(200):
            with asyncio.Runner() as runner:
                try:
                    return runner.run(self._ask())
                except (StreamFlowError, OSError):
                    runner.run(asyncio.sleep(0.05))
        raise UnavailableError(self._log.read_text())

    async def _ask(self) -> None:
        transport = RedisTransport.from_url(access(self, self._folder, "administrator", tls=self._tls))
        try:
            await transport.ping()
        finally:
            await transport.close()


def access(server: SecuredRedis, folder: Path, user: str, *, tls: bool) -> RedisAccess:
    files = (folder / "ca.pem", folder / "client.pem", folder / "client-key.pem") if tls else (None, None, None)
    return RedisAccess(server.url_of(user), folder / f"{user}.password", *files)


@dataclass
class Secured:
    server: SecuredRedis
    folder: Path
    tls: bool

    def settings(self) -> dict[str, object]:
        """For every process, beside its user and its password."""
        if not self.tls:
            return {}
        folder = self.folder
        files = {"ca": folder / "ca.pem", "cert": folder / "client.pem", "key": folder / "client-key.pem"}
        return {f"redis_{name}": path for name, path in files.items()}

    def commands(self) -> dict[str, tuple[str, ...]]:
        """Each kind of process is told its own user."""
        found = {}
        for kind in COMMANDS:
            user = f"default-{kind}"
            told = {"REDIS_URL": self.server.url_of(user), "REDIS_PASSWORD_FILE": self.folder / f"{user}.password"}
            command = ("-m", "gateway") if kind == "gateway" else ("-m", "tests.faults.light_stage", kind)
            settings = [f"STREAMFLOW_{name}={value}" for name, value in told.items()]
            found[kind] = ("/usr/bin/env", *settings, sys.executable, *command)
        return found

    def deployment(self, **options: Any) -> LocalDeployment:
        """All of it; options are further ones of LocalDeployment."""
        return LocalDeployment(
            model=SHAPES,
            redis_url=self.server.url_of("administrator"),
            settings={**self.settings(), "redis_password_file": self.folder / "administrator.password"},
            commands=self.commands(),
            grace_s=3.0,
            **options,
        )

    def denied(self) -> list[object]:
        with self.server.raw_client() as raw:
            return [(one["username"], one["reason"], one["object"]) for one in raw.acl_log()]


def certificates(folder: Path) -> None:
    authority = trustme.CA()
    server, client = authority.issue_cert("localhost"), authority.issue_cert("streamflow")
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for name, key, certificate in (("cert.pem", "key.pem", server), ("client.pem", "client-key.pem", client)):
        certificate.cert_chain_pems[0].write_to_path(folder / name)
        certificate.private_key_pem.write_to_path(folder / key)


@pytest.fixture(params=["6.2", "7 with TLS"])
def secured(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Secured]:
    version, _, tls = request.param.partition(" with ")
    write(tmp_path, users_of("default", []))
    certificates(tmp_path)
    with SecuredRedis(version, tmp_path, tls=bool(tls)) as server:
        yield Secured(server, tmp_path, bool(tls))


@pytest.mark.parametrize("user", ["", "nobody"])
async def test_a_user_who_is_not_let_in_is_told_what_to_name(secured: Secured, user: str) -> None:
    url = secured.server.url_of(user) if user else secured.server.url_of("administrator").replace("administrator@", "")
    deployment = LocalDeployment(model=SHAPES, redis_url=url, settings=secured.settings(), commands=secured.commands())
    with pytest.raises(
        InvalidRequestError, match=r"redis_url: .*STREAMFLOW_REDIS_USER.*STREAMFLOW_REDIS_PASSWORD_FILE"
    ):
        async with deployment:
            raise AssertionError("it was let in")


async def test_a_deployment_makes_pictures_and_is_refused_nothing(secured: Secured) -> None:
    async with (
        secured.deployment() as deployment,
        AsyncClient(deployment.address) as client,
    ):
        results = await asyncio.gather(*(client.generate(PROMPT, steps=3, seed=seed) for seed in range(4)))
        assert all(len(result.images) == 1 for result in results)
        job = await client.submit(PROMPT, steps=50)
        await client.cancel(job.request_id)
        assert len(await client.jobs()) == 5
        assert len((await client.status()).stages) == 3
        # As after a crash: what it had is taken over.
        await deployment.kill("denoiser-1")
        assert (await client.generate(PROMPT, steps=3, seed=9)).images
    assert secured.denied() == []


async def test_who_is_not_let_in_is_told_why(secured: Secured) -> None:
    folder, tls = secured.folder, secured.tls
    (folder / "wrong.password").write_text("wrong")
    good = access(secured.server, folder, "default-gateway", tls=tls)
    bad = [RedisAccess(good.url, folder / "wrong.password", good.ca, good.cert, good.key)]
    if tls:
        trustme.CA().cert_pem.write_to_path(folder / "other.pem")
        bad += [
            RedisAccess(good.url, good.password_file, folder / "other.pem", good.cert, good.key),
            RedisAccess(good.url, good.password_file, good.ca),
            RedisAccess(good.url.replace("rediss://", "redis://"), good.password_file),
            RedisAccess(good.url.replace("localhost", "127.0.0.1"), good.password_file, good.ca, good.cert, good.key),
        ]
    for wrong in bad:
        transport = RedisTransport.from_url(wrong)
        with pytest.raises(UnavailableError, match="cannot be reached"):
            await transport.ping()
        await transport.close()
    transport = RedisTransport.from_url(good)
    await transport.ping()
    await transport.close()


async def test_a_password_is_exchanged_under_a_running_process(secured: Secured) -> None:
    user = "default-gateway"
    transport = RedisTransport.from_url(access(secured.server, secured.folder, user, tls=secured.tls))
    await transport.ping()
    (secured.folder / f"{user}.password").unlink()
    write(secured.folder, users_of("default", []))
    with secured.server.raw_client() as raw:
        raw.acl_load()  # which ends the connections of users that changed
    await transport.ping()
    await transport.close()


@pytest.mark.parametrize("version", ["6.2", "7"])
def test_one_redis_serves_deployments_whose_users_were_made_one_after_the_other(tmp_path: Path, version: str) -> None:
    write(tmp_path, users_of("a", ["sd"]))
    with SecuredRedis(version, tmp_path, tls=False) as server:

        def get(user: str, key: str) -> object:
            with redis.Redis.from_url(server.url_of(user, password=True)) as client:
                return client.get(key)

        def load() -> None:
            with server.raw_client() as raw:
                raw.acl_load()

        assert write(tmp_path, users_of("b", [])) == [user.name for user in users_of("a", ["sd"])[:-1]]
        load()
        # As Redis itself writes it, and without the model that was named before.
        with server.raw_client() as raw:
            raw.acl_save()
        kept = write(tmp_path, users_of("a", []))
        load()
        assert set(kept) == {f"{one}-{role}" for one in ("a-sd", "b") for role in RIGHTS} - {"a-sd-gateway"}
        for one in ("a", "a-sd", "b"):
            assert get(f"{one}-decoder", f"sf:v1:{{{one}}}:blob:x") is None
        assert get("a-gateway", "sf:v1:{a-sd}:blob:x") is None
        with pytest.raises(redis.exceptions.NoPermissionError):
            get("b-gateway", "sf:v1:{a}:blob:x")
        assert write(tmp_path, users_of("a", []), only=True) == []
        load()
        with pytest.raises(redis.exceptions.NoPermissionError):
            get("a-gateway", "sf:v1:{a-sd}:blob:x")
        with pytest.raises(redis.exceptions.AuthenticationError):
            get("b-decoder", "sf:v1:{b}:blob:x")


def test_users_that_stay_have_the_rights_of_this_version_and_those_of_others_are_left_alone(tmp_path: Path) -> None:
    write(tmp_path, users_of("a", []))
    file = tmp_path / "users.acl"
    now = file.read_text()
    strangers = ["user a-exporter on >secret ~* +info", "user a-decoder off ~sf:v1:{a}:* +get"]
    old = now.replace(" +evalsha", "").splitlines()
    file.write_text("\n".join([line for line in old if " a-decoder " not in line] + strangers) + "\n")
    write(tmp_path, users_of("b", []))
    lines = file.read_text().splitlines()
    assert set(strangers) < set(lines)
    assert {line for line in now.splitlines() if " a-decoder " not in line} < set(lines)


async def test_processes_live_while_their_passwords_are_away(secured: Secured) -> None:
    files = [secured.folder / f"default-{kind}.password" for kind in COMMANDS]
    lines: list[tuple[str, str]] = []
    async with (
        secured.deployment(on_line=lambda name, line: lines.append((name, line))) as deployment,
        AsyncClient(deployment.address) as client,
    ):
        assert (await client.generate(PROMPT, steps=3, seed=1)).images
        pids = {name: process.pid for name, process in deployment.processes.items()}
        # So that something is in everybody's hands.
        calls = [asyncio.create_task(client.generate(PROMPT, steps=100, seed=seed, timeout_s=60)) for seed in range(4)]
        while sum("admitted" in line for _, line in lines) < 5:  # noqa: ASYNC110 nothing tells when
            await asyncio.sleep(0.05)
        began = len(lines)
        for text in ("", "wrong"):
            passwords = [file.read_text() for file in files]
            for file in files:
                file.write_text(text) if text else file.unlink()
            with secured.server.raw_client() as raw:
                for _ in range(30):
                    for file in files:
                        raw.execute_command("CLIENT", "KILL", "USER", file.stem)
                    await asyncio.sleep(0.1)
            for file, password in zip(files, passwords, strict=True):
                file.write_text(password)
        assert all(result.images for result in await asyncio.gather(*calls))
        assert {name: process.pid for name, process in deployment.processes.items()} == pids
    for name in pids:
        # Of a gateway without its calls, each of which has a line.
        said = [line for who, line in lines[began:] if who == name and "a call cannot be answered" not in line]
        for reason in ("a file that can be read", "invalid username-password pair"):
            # One line of each loop that met it, however often.
            told = Counter(
                line.partition(reason)[0][13:] for line in said if reason in line and "a call cannot" not in line
            )
            assert set(told.values()) == {1}, said
        assert not any("Traceback" in line for line in said), said
