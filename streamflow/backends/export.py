"""From a part of a checkpoint to an ONNX graph with dynamic rows and sizes, and a timestep in every row."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from streamflow.backends.parts import Part, PartModule
from streamflow.errors import UnavailableError, install

OPSET = 20
# protobuf's own limit is 2 GiB; beyond this the weights stand in a file beside the graph.
_MOST_INLINE_BYTES = 1_500_000_000


def export(part: Part, path: Path, *, dtype: torch.dtype = torch.float32) -> None:
    """Writes the graph, and its weights beside it where they are too many for one file.

    Args:
        dtype: of weights and computation. Inputs and output are float32 whatever it is.

    Raises:
        UnavailableError: the exporter is not installed.
    """
    try:
        import onnx
        import onnxscript  # noqa: F401 - what torch's exporter needs
    except ModuleNotFoundError as error:
        raise UnavailableError(f"{error.name} is missing; exporting needs it; {install('export')}") from None
    module = PartModule(part, device=torch.device("cpu"), dtype=dtype)
    example = part.example(rows=2)
    # By position: the module takes its inputs so.
    dynamic = tuple(
        {axis: size for axis, size in enumerate(one.shape) if isinstance(size, str)} for one in part.inputs.values()
    )
    with _quiet(), torch.inference_mode():
        program = torch.onnx.export(
            module,
            tuple(example.values()),
            dynamo=True,
            input_names=list(part.inputs),
            output_names=[part.output],
            dynamic_shapes=(dynamic,),
            opset_version=OPSET,
            verbose=False,
        )
    assert program is not None
    size = sum(weights.numel() * weights.element_size() for weights in module.state_dict().values())
    program.save(path, external_data=size > _MOST_INLINE_BYTES)
    onnx.checker.check_model(path)


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells its own progress, and warns of libraries that nobody needs here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
