"""From a graph to a TensorRT engine, through Polygraphy. Every call of the builder is in this file.

Networks are strongly typed: the types in the graph are the precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from streamflow.backends.engine_cache import Options, Shapes
from streamflow.errors import UnavailableError, install

OnPhase = Callable[[str, int, int], None]
"""Called with (phase, steps done, steps) from the builder's threads; done = steps at the phase's end."""


def build(
    graph: Path,
    engine: Path,
    shapes: Sequence[Shapes],
    timing_cache: Path,
    options: Options,
    *,
    on_phase: OnPhase | None = None,
) -> None:
    """Builds and writes an engine; takes minutes.

    Args:
        shapes: of the inputs, for each optimisation profile.
        timing_cache: read, and added to.

    Raises:
        UnavailableError: TensorRT's full library, or Polygraphy, is not installed.
    """
    try:
        import tensorrt
        from polygraphy.backend.trt import CreateConfig, Profile, engine_bytes_from_network, network_from_onnx_path
    except ImportError as error:
        message = f"{error.name} is missing; building needs it, and a GPU; {install('tensorrt')}"
        raise UnavailableError(message) from None
    profiles = []
    for one in shapes:
        profile = Profile()
        for name, shape in one.items():
            profile.add(name, min=shape, opt=shape, max=shape)
        profiles.append(profile)
    timing_cache.parent.mkdir(parents=True, exist_ok=True)
    config = CreateConfig(
        profiles=profiles,
        load_timing_cache=str(timing_cache) if timing_cache.exists() else None,
        refittable=options.refittable,
        version_compatible=options.version_compatible,
        progress_monitor=None if on_phase is None else _monitor(tensorrt, on_phase),
    )
    # The parser reads weights that stand beside the graph by its path.
    network = network_from_onnx_path(str(graph), strongly_typed=True)
    engine.write_bytes(engine_bytes_from_network(network, config=config, save_timing_cache=str(timing_cache)))


def _monitor(tensorrt: Any, on_phase: OnPhase) -> Any:
    class Monitor(tensorrt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._steps[phase_name] = num_steps
            on_phase(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            on_phase(phase_name, step + 1, self._steps[phase_name])
            return True

        def phase_finish(self, phase_name: str) -> None:
            steps = self._steps.pop(phase_name)
            on_phase(phase_name, steps, steps)

    return Monitor()
