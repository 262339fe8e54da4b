"""One network of a checkpoint as a function of named tensors: what is exported, and what every runtime runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn

ROWS = "rows"
"""The axis of independent rows, the first one of every input."""


@dataclass(frozen=True, slots=True)
class Input:
    """What a part is fed.

    Attributes:
        shape: sizes, or the names of axes whose sizes vary.
        dtype: of what callers give.
        below: values are drawn from [0, below) for examples, from a normal distribution where it is 0.
        exact: stays as it is given; else what is floating becomes the precision in which the part runs.
        shared: the same for all rows of an image, whatever they are conditioned on.
    """

    shape: tuple[int | str, ...]
    dtype: torch.dtype = torch.float32
    below: int = 0
    exact: bool = False
    shared: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """A network with all that is needed to export or run it.

    Attributes:
        name: within its checkpoint, such as "unet".
        revision: of the checkpoint's weights; a graph of another one is not this part.
        inputs: by name, in the order in which `call` takes them.
        output: the name of what comes out, [rows, ...].
        sizes: of the named axes besides rows, in examples: "height" and "width", or none.
        unit_px: pixels of the picture in one unit of its height and width.
        upcast: half precision overflows in it; it runs in float32 instead.
        load: reads the weights; the module is in eval mode, on the device, in the precision.
        call: (module, *inputs) -> output, made of what can be exported.
    """

    name: str
    revision: str
    inputs: Mapping[str, Input]
    output: str
    load: Callable[[torch.device, torch.dtype], nn.Module]
    call: Callable[..., Tensor]
    sizes: Mapping[str, int] = field(default_factory=dict)
    unit_px: int = 1
    upcast: bool = False

    def precision(self, dtype: torch.dtype) -> torch.dtype:
        """In which it runs where `dtype` is asked for."""
        return torch.float32 if self.upcast and dtype is torch.float16 else dtype

    def example(self, rows: int, *, seed: int = 0, **sizes: int) -> dict[str, Tensor]:
        """Random inputs, with rows that differ in all of them."""
        generator = torch.Generator().manual_seed(seed)
        known = {**self.sizes, ROWS: rows, **sizes}
        return {
            name: _drawn(one, [known[size] if isinstance(size, str) else size for size in one.shape], generator)
            for name, one in self.inputs.items()
        }


class Runner(Protocol):
    """Runs one part.

    Attributes:
        name: of the backend, such as "onnxruntime".
        row_invariant: whether a row's output has the same bits whatever the other rows are and however many.
    """

    name: str
    row_invariant: bool

    @property
    def row_counts(self) -> tuple[int, ...] | None:
        """Those for which it was compiled, rising; None = any. It takes others too, padded or in parts."""
        ...

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Args: inputs: all that the part has, by name. Returns: float32 [rows, ...], the caller's own."""
        ...


OpenPart = Callable[[Part], Runner]
"""How a stage gets a runner for a part: which backend, on what device, in which precision."""


class PartModule(nn.Module):
    """A part in torch: its inputs by position, as they are given; float32 comes out."""

    def __init__(self, part: Part, *, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__()
        # Rather than a mode around each call: exporters and compilers trace through here.
        self._module = part.load(device, dtype).requires_grad_(False)
        self._call, self._device = part.call, device
        self._dtypes = [
            dtype if one.dtype.is_floating_point and not one.exact else one.dtype for one in part.inputs.values()
        ]

    @property
    def own(self) -> nn.Module:
        """The part's network itself."""
        return self._module

    def forward(self, *inputs: Tensor) -> Tensor:
        placed = [one.to(self._device, dtype) for one, dtype in zip(inputs, self._dtypes, strict=True)]
        return self._call(self._module, *placed).float()


def _drawn(one: Input, shape: list[int], generator: torch.Generator) -> Tensor:
    if not one.dtype.is_floating_point:
        return torch.randint(one.below, shape, generator=generator, dtype=one.dtype)
    if one.below:
        return torch.rand(shape, generator=generator, dtype=one.dtype) * one.below
    return torch.randn(shape, generator=generator, dtype=one.dtype)
