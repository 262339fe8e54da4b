"""LoRA adapters: read by the library that made them, and merged into copies of a network that share the rest with it.

A mix of adapters is a network of its own, W + sum of weight x scale x B A in the layers that they change. It costs
those layers' memory, the time to add them up once, and nothing in a call.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamflow.errors import InvalidRequestError, UnavailableError
from streamflow.families.libraries import from_diffusers, one_file, refused
from streamflow.types import AdapterUse

if TYPE_CHECKING:
    from torch import Tensor, nn

    from streamflow.backends.parts import Runner
    from streamflow.backends.torch_eager import TorchRunner

LOADERS = {
    "sd": ("StableDiffusionPipeline", "unet"),
    "sdxl": ("StableDiffusionXLPipeline", "unet"),
    "sd3": ("StableDiffusion3Pipeline", "transformer"),
    "flux": ("FluxPipeline", "transformer"),
}
"""Pipelines of diffusers that know the formats of each family's adapters, and the network that these change."""

TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
"""Parts that they may change besides."""

KEPT = 4
"""Mixes that are kept at once, of each network."""

_NAME = "one"


class AdapterFiles:
    """The adapters of a checkpoint as they are on disk.

    Args:
        family: whose formats they have.
        files: by the names that requests use: a safetensors file each, or a folder with one.

    Raises:
        InvalidRequestError: adapters for a family that takes none, or a file that is none.
        UnavailableError: the library that reads them is not installed.
    """

    def __init__(self, family: str, files: Mapping[str, Path]) -> None:
        self._files = files
        if not files:
            return
        if family not in LOADERS:
            raise InvalidRequestError("adapters", ", ".join(files), f"none: the family {family} takes no adapters")
        try:
            import peft  # noqa: F401 - what diffusers reads them with
        except ModuleNotFoundError as error:
            raise UnavailableError("adapters need: pip install peft") from error
        pipeline, network = LOADERS[family]
        self._loader, self._parts = from_diffusers(pipeline), (network, *TEXT_ENCODERS)

    def into(self, part: str, module: nn.Module) -> dict[str, Mapping[str, Any]]:
        """For each adapter the layers of a network that it changes, by their paths; empty where it changes none.

        Args:
            part: the network's folder in the checkpoint.
            module: the network, which stays as it is.

        Raises:
            InvalidRequestError: an adapter is damaged, or not for this network.
        """
        return {name: self._layers(name, path, part, module) for name, path in self._files.items()}

    def _layers(self, name: str, path: Path, part: str, module: nn.Module) -> Mapping[str, Any]:
        with refused(path, field="adapters", allowed=f"a LoRA adapter of this model as {name}"):
            # Blocks of SDXL are counted otherwise in some formats.
            blocks = {"unet_config": module.config} if part == "unet" else {}
            state, alphas, metadata = self._read(path, **blocks)
            if not any(key.startswith(f"{one}.") for one in self._parts for key in state):
                raise ValueError(f"it changes none of {', '.join(self._parts)}")
            if not any(key.startswith(f"{part}.") for key in state):
                return {}
            wrapped = shared_copy(module)
            given = {"prefix": part, "adapter_name": _NAME, "network_alphas": alphas, "metadata": metadata}
            if part in TEXT_ENCODERS:
                self._loader.load_lora_into_text_encoder(state, text_encoder=wrapped, **given)
            else:
                # One of the methods of the library's networks.
                load: Callable[..., None] = wrapped.load_lora_adapter  # type: ignore[assignment]
                load(state, **given)
            return dict(_changed_layers(wrapped))

    def _read(
        self, path: Path, **more: Any
    ) -> tuple[dict[str, Any], Mapping[str, Any] | None, Mapping[str, Any] | None]:
        """Tensors by the names that diffusers gives them, factors of their scales, and what the file says of itself."""
        from safetensors import safe_open

        weights = one_file(path)
        with safe_open(weights, "pt") as file:
            if not any("lora" in key or "lokr" in key for key in file.keys()):  # noqa: SIM118 - not a mapping
                raise ValueError("it holds no tensors of an adapter")
        read = self._loader.lora_state_dict(
            str(weights.parent),
            weight_name=weights.name,
            use_safetensors=True,
            return_lora_metadata=True,
            **more,
        )
        state, metadata = read[0], read[-1]
        alphas = read[1] if len(read) == 3 else None
        return state, alphas or None, metadata or None


class Adapted:
    """A network with any mix of its adapters.

    Args:
        module: as it is without any.
        layers: see `AdapterFiles.into`.
    """

    def __init__(self, module: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> None:
        self._module, self._layers = module, layers

    @property
    def names(self) -> frozenset[str]:
        """Of the adapters that change this network."""
        return frozenset(name for name, layers in self._layers.items() if layers)

    def __call__(self, uses: Iterable[AdapterUse]) -> nn.Module:
        """The network with these adapters merged in; what none of them changes is shared with the others."""
        import torch
        from torch import nn

        merged, uses = shared_copy(self._module), list(uses)
        with torch.no_grad():
            # One layer after the other: the changes of all at once would take as much again, in float32.
            for path in dict.fromkeys(path for use in uses for path in self._layers[use.name]):
                layer = merged.get_submodule(path)
                weight = layer.weight
                assert isinstance(weight, nn.Parameter)
                layer.weight = nn.Parameter(self._summed(path, weight, uses), requires_grad=False)
        return merged

    def _summed(self, path: str, weight: Tensor, uses: Iterable[AdapterUse]) -> Tensor:
        """A layer's weight with what the adapters add to it; summed up in float32."""
        total = weight.float()
        for use in uses:
            if path in self._layers[use.name]:
                change = self._layers[use.name][path].get_delta_weight(_NAME)
                total = total + use.weight * change.to(weight.device).float()
        return total.to(weight.dtype)


def torch_runner(runner: Runner) -> TorchRunner:
    """Whose weights can be others. Where there are adapters, torch was chosen for what they change."""
    from streamflow.backends.torch_eager import TorchRunner

    assert isinstance(runner, TorchRunner)
    return runner


def shared_copy(module: nn.Module) -> nn.Module:
    """A copy with the same tensors."""
    from itertools import chain

    return copy.deepcopy(module, {id(one): one for one in chain(module.parameters(), module.buffers())})


def _changed_layers(wrapped: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers that an adapter was put into, by the paths that they have without it."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, layer in wrapped.named_modules():
        if isinstance(layer, BaseTunerLayer):
            if getattr(layer, "use_dora", {}).get(_NAME):
                raise ValueError("it is a DoRA, which cannot be added to weights")
            yield path, layer
