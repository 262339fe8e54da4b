"""Starts a gateway: `python -m gateway --model models/shapes --redis-url redis://127.0.0.1:6379/0`."""

# ruff: noqa: E402 - gRPC reads its variable when it is imported

from __future__ import annotations

from streamflow.config import GatewaySettings, misspelled, quiet_grpc, settings_from
from streamflow.processes import end_when_told

end_when_told()
quiet_grpc()

import asyncio
import sys
from functools import partial

from gateway.decoding import Decoder, ImageDecoder
from gateway.models import Models, Served
from gateway.servicer import FOR_TENANTS, GatewayServicer
from gateway.upkeep import keep_up
from gateway.watching import GatewayWatch
from streamflow.errors import InvalidRequestError, StreamFlowError, first_of
from streamflow.families import describe
from streamflow.families.source import checkpoint_from
from streamflow.rpc.certificates import certificate_files
from streamflow.rpc.key_file import KeyFile
from streamflow.rpc.server import RpcServer, Service
from streamflow.telemetry import Counters, configure_logging, get_logger
from streamflow.telemetry.metrics import registry, serving
from streamflow.telemetry.traces import open_tracing
from streamflow.transport.base import Limits
from streamflow.transport.redis_streams import RedisTransport
from streamflow.v1 import gateway_pb2, gateway_pb2_grpc

_log = get_logger(__name__)


async def serve(settings: GatewaySettings) -> None:
    """Serves until SIGTERM or SIGINT."""
    keys, certificates = KeyFile(settings.api_keys_file), certificate_files(settings.tls_cert, settings.tls_key)
    counters = Counters()
    metrics, tracing = registry(), open_tracing(settings.traces, service="gateway", ratio=settings.trace_ratio)
    watch, decoder = GatewayWatch(metrics, counts=counters.snapshot), ImageDecoder(max_pixels=settings.max_image_pixels)
    models = _models(settings, counters, decoder, watch)
    servicer = GatewayServicer(models, settings=settings, keys=keys, counters=counters, tracing=tracing)
    name = gateway_pb2.DESCRIPTOR.services_by_name["Gateway"].full_name
    server = RpcServer(
        settings,
        services=[Service(name, gateway_pb2_grpc.add_GatewayServicer_to_server, servicer, FOR_TENANTS)],
        keys=keys,
        credentials=None if certificates is None else certificates.credentials(),
        on_drain=models.drain,
        on_call=watch.called,
        health_port=settings.health_port,
    )
    try:
        with serving(metrics, host=settings.host, port=settings.metrics_port):
            async with decoder, keys, server, asyncio.TaskGroup() as tasks:
                tasks.create_task(decoder.warm_up(), name="warm up decoders")
                upkeep = keep_up(models, server, every_s=settings.reap_interval_s)
                endless = [tasks.create_task(upkeep, name="upkeep")]
                endless += [tasks.create_task(watch.keep_looking(models), name="metrics")]
                await server.run_until_stopped()
                # Without Redis they would wait for it.
                for task in endless:
                    task.cancel()
    finally:
        await models.close()
        tracing.close()


def _models(settings: GatewaySettings, counters: Counters, decoder: Decoder, watch: GatewayWatch) -> Models:
    """All that are served. Limits are of each, as everything is that a deployment counts."""
    limits = Limits(
        max_jobs=settings.max_jobs,
        max_tenant_jobs=settings.max_tenant_jobs or None,
        max_reserved_bytes=settings.max_reserved_bytes,
        max_tenant_reserved_bytes=settings.max_tenant_reserved_bytes or None,
        tenant_images_per_minute=settings.tenant_images_per_minute,
    )
    served = []
    for own in settings.each():
        card = describe(checkpoint_from(own))
        transport = RedisTransport.of(own, revision=card.revision, limits=limits)
        on_ended = partial(watch.ended, card.name)
        served.append(
            Served.over(transport, card=card, settings=own, counters=counters, decoder=decoder, on_ended=on_ended)
        )
    return Models(served)


def main(argv: list[str] | None = None) -> None:
    try:
        given = sys.argv[1:] if argv is None else argv
        settings = settings_from(given, GatewaySettings, program="python -m gateway")
        configure_logging(level=settings.log_level, log_format=settings.log_format, service="gateway")
        for name, meant in misspelled().items():
            _log.warning("no setting has this name", variable=name, meant=meant)
        asyncio.run(serve(settings))
    except InvalidRequestError as error:
        # As for a setting that can be seen to be wrong by itself: starting it again helps nobody.
        sys.stderr.write(f"gateway: {error}\n")
        sys.exit(2)
    except (StreamFlowError, ValueError, OSError) as error:
        sys.exit(f"gateway: {error}")
    except ExceptionGroup as group:
        # Of the tasks of `serve`. There a ValueError is a bug, which its traceback shows best.
        known, unexpected = group.split(StreamFlowError)
        if known is None or unexpected is not None:
            raise
        sys.exit(f"gateway: {first_of(known)}")


if __name__ == "__main__":
    main()
