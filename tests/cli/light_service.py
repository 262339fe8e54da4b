"""A service that is ready at once and does nothing: `light_service KIND`, with settings from the environment."""

from __future__ import annotations

import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from streamflow.cli.supervisor import SERVICES
from streamflow.config import StageSettings

if __name__ == "__main__":
    kind, settings, stop = sys.argv[1], StageSettings(), threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    servicer.set(SERVICES[kind], health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(f"{settings.host}:{settings.port}")
    server.start()
    print(f"slots {settings.slots} deterministic {settings.deterministic}", flush=True)
    while not stop.wait(0.05):
        pass
    print("stopping", flush=True)
    server.stop(0).wait()
