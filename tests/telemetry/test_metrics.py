"""Where metrics are served."""

from __future__ import annotations

from urllib.request import urlopen

import pytest

from streamflow.ports import local_addresses
from streamflow.telemetry.metrics import registry, serving


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "[::]", "::1"])
def test_metrics_listen_on_every_host_that_grpc_takes(host: str) -> None:
    try:
        local_addresses(host)
    except OSError:
        pytest.skip("this machine has no IPv6")
    with serving(registry(), host=host, port=0) as address:
        port = address.removesuffix("/metrics").rpartition(":")[2]
        loopback = "[::1]" if ":" in host else "127.0.0.1"
        with urlopen(f"http://{loopback}:{port}/metrics", timeout=10) as answer:
            assert b"process_start_time_seconds" in answer.read()
