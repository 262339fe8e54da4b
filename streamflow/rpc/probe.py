"""Whether a server is ready, as an exit code: for health checks of containers.

python -m streamflow.rpc.probe 127.0.0.1:50051 streamflow.v1.Gateway

Where STREAMFLOW_TLS_CERT names the server's certificate, as it does in a gateway's container, it is asked with TLS.
"""

from __future__ import annotations

import sys
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from streamflow.rpc.certificates import probe_target
from streamflow.rpc.channels import open_channel

TIMEOUT_S = 3.0


def is_ready(address: str, service: str = "", *, tls_cert: Path | None = None) -> bool:
    """Asks the health service of `address`; an empty `service` asks only whether the process serves at all.

    Args:
        tls_cert: see `certificates.probe_target`.
    """
    # Without the retries of a client: what is not there now is not ready.
    with open_channel(probe_target(address, tls_cert), ()) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S
            )
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    from streamflow.config import TlsSettings

    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m streamflow.rpc.probe HOST:PORT [SERVICE]")
    sys.exit(0 if is_ready(*sys.argv[1:], tls_cert=TlsSettings().tls_cert) else 1)
