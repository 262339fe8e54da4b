"""How many different variants of the networks are under way at once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager, suppress

from streamflow.types import PLAIN, Variant

_LOOK_S = 1.0


def fits(variant: Variant, under_way: Collection[Variant], *, most: int) -> bool:
    """Whether an image of this variant may begin beside those; the plain one always may."""
    others = {one for one in under_way if one != PLAIN}
    return variant == PLAIN or variant in others or len(others) < most


class Mixes:
    """Lets images wait while as many other variants are under way as are kept: more would be made anew in every tick.

    Args:
        most: how many.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._under_way: Counter[Variant] = Counter()
        self._ended = asyncio.Event()

    @asynccontextmanager
    async def held(self, variant: Variant, *, on_wait: Callable[[], None] | None = None) -> AsyncIterator[None]:
        """While it is entered the variant is under way.

        Args:
            on_wait: called now and then while it waits.
        """
        while not fits(variant, self._under_way, most=self._most):
            self._ended.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._ended.wait()
            if on_wait is not None:
                on_wait()
        self._under_way[variant] += 1
        try:
            yield
        finally:
            self._under_way[variant] -= 1
            self._under_way += Counter()  # without those of which none is left
            self._ended.set()
