"""Networks of a denoiser that requests change: with adapters merged in, and with a ControlNet beside them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from streamflow.errors import InvalidRequestError
from streamflow.families.adapters import KEPT, Adapted, AdapterFiles, torch_runner
from streamflow.families.base import Denoiser
from streamflow.families.checkpoint import Checkpoint
from streamflow.families.controls import load_controls
from streamflow.flow.programs import BASE
from streamflow.types import Variant

if TYPE_CHECKING:
    from streamflow.backends.base import Network
    from streamflow.backends.network import PartNetwork


class Variants:
    """Implements `Engine`'s `variant_of`: networks are made when they are asked for, and kept while there is room.

    Only the base network changes: a refiner is used as it is.

    Args:
        networks: the plain ones, by the names that programs use.
        make: the base network of a variant.
        kept: how many are kept; the one that was not used for the longest time goes first.
        on_drop: told of each that goes.
    """

    def __init__(
        self,
        networks: Mapping[str, Network],
        make: Callable[[Variant], Network],
        *,
        kept: int = KEPT,
        on_drop: Callable[[Network], None] | None = None,
    ) -> None:
        self._networks, self._make, self._kept, self._on_drop = networks, make, kept, on_drop
        self._made: OrderedDict[Variant, Network] = OrderedDict()

    def __call__(self, name: str, variant: Variant) -> Network:
        if name != BASE:
            return self._networks[name]
        if variant not in self._made:
            while len(self._made) >= self._kept:
                _, dropped = self._made.popitem(last=False)
                if self._on_drop is not None:
                    self._on_drop(dropped)
            self._made[variant] = self._make(variant)
        self._made.move_to_end(variant)
        return self._made[variant]


def load_variants(
    checkpoint: Checkpoint,
    denoiser: Denoiser,
    *,
    kept: int = KEPT,
    on_drop: Callable[[Network], None] | None = None,
) -> Variants | None:
    """Reads the checkpoint's adapters and ControlNets; None where it has none.

    Args:
        denoiser: of which torch runs the networks.

    Raises:
        InvalidRequestError: one is damaged, or not for this model.
    """
    if not (checkpoint.adapters or checkpoint.controls):
        return None
    network, card = _network(denoiser.networks[BASE]), denoiser.card
    runner = torch_runner(network.runner)
    layers = AdapterFiles(card.family, checkpoint.adapters).into(runner.part.name, runner.module)
    adapted = Adapted(runner.module, layers)
    controls = load_controls(checkpoint, card, runner)

    def make(variant: Variant) -> Network:
        uses = [use for use in variant.adapters if use.name in adapted.names]
        module = adapted(uses) if uses else runner.module
        if variant.control:
            return network.using(controls[variant.control](module))
        return network.using(runner.using(module)) if uses else network

    return Variants(denoiser.networks, make, kept=kept, on_drop=on_drop)


def check_backend(field: str, names: Collection[str], backend: str, *, allowed: tuple[str, ...]) -> None:
    """Raises InvalidRequestError for a backend whose graphs cannot take other weights.

    Args:
        field: "adapters" or "controls".
        names: of those that there are.
    """
    if names and backend not in allowed:
        hint = "graphs and engines hold the weights of the plain model"
        raise InvalidRequestError("backend", f"{backend} with {field}", " or ".join(allowed), hint)


def _network(network: Network) -> PartNetwork:
    from streamflow.backends.network import PartNetwork

    assert isinstance(network, PartNetwork)
    return network
