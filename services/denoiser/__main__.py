"""`python -m services.denoiser`: one denoiser. --help lists its settings."""

from __future__ import annotations

import sys


def main() -> None:
    from streamflow.config import StageSettings, settings_from

    # First, so that --help and wrong values are answered at once.
    settings = settings_from(sys.argv[1:], StageSettings, program="python -m services.denoiser")

    # Imported here because the processes that a service starts import its main module again, and need none of it.
    from services.denoiser.handler import DenoiseHandler
    from services.denoiser.metrics import watch_ticks
    from services.denoiser.servicer import service
    from streamflow.families.source import checkpoint_from
    from streamflow.host.process import StageService, run_process
    from streamflow.stages.denoiser import DenoiserStage
    from streamflow.transport.base import Transport
    from streamflow.types import Stage

    def load(settings: StageSettings) -> DenoiserStage:
        return DenoiserStage.load(
            checkpoint_from(settings),
            device=settings.device,
            dtype=settings.dtype,
            backend=settings.backend,
            engines=settings.engines,
            make_engines=settings.make_engines,
            threads=settings.threads or int(settings.deterministic),
            slots=settings.slots,
            deterministic=settings.deterministic,
            compiled=settings.compiled,
        )

    def handler(stage: DenoiserStage, transport: Transport, settings: StageSettings) -> DenoiseHandler:
        return DenoiseHandler(stage, transport)

    run_process(
        StageService(
            Stage.DENOISE,
            load=load,
            handler=handler,
            servicer=service,
            suspend=DenoiseHandler.suspend,
            watch=watch_ticks,
        ),
        settings,
    )


if __name__ == "__main__":
    main()
