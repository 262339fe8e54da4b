"""`python -m services.encoder`: one encoder. --help lists its settings."""

from __future__ import annotations

import sys


def main() -> None:
    from streamflow.config import StageSettings, settings_from

    # First, so that --help and wrong values are answered at once.
    settings = settings_from(sys.argv[1:], StageSettings, program="python -m services.encoder")

    # Imported here because the processes that a service starts import its main module again, and need none of it.
    from services.encoder.handler import EncodeHandler
    from services.encoder.servicer import service
    from streamflow.families.source import checkpoint_from
    from streamflow.host.process import StageService, run_process
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

    run_process(StageService(Stage.ENCODE, load=load, handler=handler, servicer=service), settings)


if __name__ == "__main__":
    main()
