"""Whether a server is ready, as an exit code: for health checks of containers.

python -m streamflow.rpc.probe 127.0.0.1:50051 streamflow.v1.Gateway
"""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

TIMEOUT_S = 3.0


def is_ready(address: str, service: str = "") -> bool:
    """Asks the health service of `address`; an empty `service` asks only whether the process serves at all."""
    with grpc.insecure_channel(address) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(service=service), timeout=TIMEOUT_S
            )
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: python -m streamflow.rpc.probe HOST:PORT [SERVICE]")
    sys.exit(0 if is_ready(*sys.argv[1:]) else 1)
