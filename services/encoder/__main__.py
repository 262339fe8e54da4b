"""`python -m services.encoder`: one encoder. --help lists its settings."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from streamflow.config import StageSettings
    from streamflow.gpus import Gpu


def main() -> None:
    from streamflow.config import StageSettings, quiet_grpc, settings_from
    from streamflow.processes import end_when_told, ended_at_once

    end_when_told()
    quiet_grpc()
    # First, so that --help and wrong values are answered at once.
    settings = settings_from(sys.argv[1:], StageSettings, program="python -m services.encoder")

    from streamflow.host.gpus import own_gpu
    from streamflow.telemetry import configure_logging
    from streamflow.types import Stage

    configure_logging(level=settings.log_level, log_format=settings.log_format, service=Stage.ENCODE.service)
    # Before torch is imported: it sees this one alone.
    with ended_at_once(), own_gpu(settings, Stage.ENCODE) as gpu:
        serve(settings, gpu)


def serve(settings: StageSettings, gpu: Gpu | None) -> None:
    # Imported here because the processes that a service starts import its main module again, and need none of it.
    from services.encoder.handler import EncodeHandler
    from services.encoder.servicer import service
    from streamflow.families.source import checkpoint_from
    from streamflow.host.process import StageService, run_stage
    from streamflow.stages.encoder import DEFAULT_SLOTS, EncoderStage
    from streamflow.transport.base import Transport
    from streamflow.types import Stage

    def load(settings: StageSettings) -> EncoderStage:
        return EncoderStage.load(
            checkpoint_from(settings),
            device=settings.device,
            dtype=settings.dtype,
            backend=settings.backend,
            engines=settings.engines,
            make_engines=settings.make_engines,
            threads=settings.threads or int(settings.deterministic),
            max_wait_s=settings.max_wait_ms / 1000,
            slots=settings.slots or DEFAULT_SLOTS,
            deterministic=settings.deterministic,
        )

    def handler(stage: EncoderStage, transport: Transport, settings: StageSettings) -> EncodeHandler:
        return EncodeHandler(stage, transport, cache_s=settings.prompt_cache_s)

    run_stage(StageService(Stage.ENCODE, load=load, handler=handler, servicer=service), settings, gpu)


if __name__ == "__main__":
    main()
