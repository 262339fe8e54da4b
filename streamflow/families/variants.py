"""Networks of a denoiser that requests change: with adapters merged in, and with a ControlNet beside them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
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
        make: the base network of a variant that is not the plain one.
        changing: names of the adapters that change the base network.
        kept: how many are kept; the one that was not used for the longest time goes first. More than so many must not
            be under way at once, or each tick would make them all again.
        on_drop: told of each that goes.
    """

    def __init__(
        self,
        networks: Mapping[str, Network],
        make: Callable[[Variant], Network],
        *,
        changing: Collection[str],
        kept: int = KEPT,
        on_drop: Callable[[Network], None] | None = None,
    ) -> None:
        self.kept = kept
        self._networks, self._make, self._changing, self._on_drop = networks, make, changing, on_drop
        self._made: OrderedDict[Variant, Network] = OrderedDict()

    def relevant(self, variant: Variant) -> Variant:
        """Without the adapters that change nothing here: those of weight 0, and those of text encoders only."""
        return replace(variant, adapters=tuple(use for use in variant.adapters if use.changes(self._changing)))

    def __call__(self, name: str, variant: Variant) -> Network:
        if name != BASE:
            return self._networks[name]
        if variant not in self._made:
            while len(self._made) >= self.kept:
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
        module = adapted(variant.adapters) if variant.adapters else runner.module
        return network.using(controls[variant.control](module) if variant.control else runner.using(module))

    return Variants(denoiser.networks, make, changing=adapted.names, kept=kept, on_drop=on_drop)


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
