"""The gateway as a pod runs it, with TLS and keys: what the kubelet's probes get to hear."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import trustme

from streamflow.ports import free_port
from streamflow.rpc.channels import Target, open_aio_channel
from streamflow.rpc.probe import is_ready
from streamflow.transport.embedded import EmbeddedRedis
from tests.deploy.rendered import ROOT, deployments, environment, render, server_of
from tests.keys import key_lines


async def answer(port: int, service: str) -> bool:
    return await asyncio.to_thread(is_ready, f"127.0.0.1:{port}", service)


async def test_probes_hear_of_a_gateway_that_serves_tls_and_asks_for_keys(tmp_path: Path) -> None:
    objects = render("overlays/cpu", "api-keys", "tls")
    gateway = deployments(objects)["gateway"]
    certificate = trustme.CA().issue_cert("localhost")
    certificate.private_key_pem.write_to_path(tmp_path / "tls.key")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "tls.crt")
    (tmp_path / "keys").write_text(key_lines("a-key alice\n"))
    port, health_port = free_port(), free_port()
    with EmbeddedRedis() as redis:
        values = environment(objects, gateway, {("streamflow-redis", "url"): redis.url})
        # The files of the Secrets are elsewhere here, and so is the model.
        mounted = {name: tmp_path / Path(value).name for name, value in values.items() if value.startswith("/run/")}
        here = {
            **mounted,
            "STREAMFLOW_MODEL": ROOT / "models" / "shapes",
            "STREAMFLOW_CACHE": tmp_path,
            "STREAMFLOW_PORT": port,
            "STREAMFLOW_HEALTH_PORT": health_port,
            "STREAMFLOW_METRICS_PORT": 0,
            "STREAMFLOW_DRAIN_GRACE_S": 0,
        }
        usual = {name: value for name, value in os.environ.items() if not name.startswith("STREAMFLOW_")}
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gateway"),
            env={**usual, **values, **{name: str(value) for name, value in here.items()}},
            stderr=asyncio.subprocess.PIPE,
        )
        assert process.stderr is not None
        try:
            while b'"transport takes work"' not in (line := await process.stderr.readline()):
                assert line, "the gateway ended"
            probes = [server_of(gateway)[f"{kind}Probe"]["grpc"]["service"] for kind in ("liveness", "readiness")]
            async with open_aio_channel(Target(f"127.0.0.1:{health_port}")) as channel:
                await asyncio.wait_for(channel.channel_ready(), 10)
            assert [await answer(health_port, service) for service in probes] == [True, True]
            # The port for clients is not to be had without TLS.
            assert not await answer(port, probes[0])
        finally:
            process.terminate()
            _, log = await process.communicate()
        assert process.returncode == 0, log
