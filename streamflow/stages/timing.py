"""How long the steps of the running batch take."""

from __future__ import annotations

import time
from collections.abc import Sequence

from streamflow.backends.base import Network
from streamflow.batching.slots import Slot, SlotTable
from streamflow.batching.step import Step, StepFunction


class TimedStep:
    """A step function that adds up its time.

    It is that of the host: on a GPU a step returns once it is launched, and the device is waited for where latents are
    read back, after it.

    Attributes:
        seconds: so far.
    """

    def __init__(self, step: StepFunction) -> None:
        self._step = step
        self.seconds = 0.0

    def __call__(self, table: SlotTable, slots: Sequence[Slot], network: Network) -> Step:
        began_s = time.perf_counter()
        try:
            return self._step(table, slots, network)
        finally:
            self.seconds += time.perf_counter() - began_s
