"""A service that is ready at once and does nothing: `light_service NAME`, with settings from the environment."""

from __future__ import annotations

import os
import signal
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

if __name__ == "__main__":
    # Not through streamflow.config, which would load three times as much.
    settings, stop = os.environ, threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    server = grpc.server(ThreadPoolExecutor(2))
    servicer = health.HealthServicer()
    servicer.set(sys.argv[1], health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    server.add_insecure_port(f"{settings['STREAMFLOW_HOST']}:{settings['STREAMFLOW_PORT']}")
    server.start()
    slots, deterministic = (settings.get(f"STREAMFLOW_{name}") for name in ("SLOTS", "DETERMINISTIC"))
    print("slots", slots, "deterministic", deterministic, flush=True)
    print("gpu", settings.get("STREAMFLOW_GPU"), flush=True)
    print(*(settings.get(f"STREAMFLOW_{name}") for name in ("DEPLOYMENT", "MODEL_NAME", "MORE_MODELS")), flush=True)
    while not stop.wait(0.05):
        pass
    print("stopping", flush=True)
    server.stop(0).wait()
