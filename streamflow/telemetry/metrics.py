"""Prometheus metrics over HTTP: one registry for each process, made and served by its `__main__`.

    metrics = registry()
    with serving(metrics, host="127.0.0.1", port=9464):
        ...

Names follow the conventions of Prometheus: the prefix `streamflow_`, base units, `_total` for what only grows.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from streamflow.errors import UnavailableError
from streamflow.ports import join
from streamflow.telemetry.logs import get_logger

PREFIX = "streamflow_"

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
"""Upper bounds of latency histograms: from a cached prompt to a long queue."""

Family = CounterMetricFamily | GaugeMetricFamily

_log = get_logger(__name__)


def registry() -> CollectorRegistry:
    """With the process's own CPU time, memory and descriptors, where the platform tells them."""
    made = CollectorRegistry()
    PlatformCollector(registry=made)
    if platform.system() == "Linux":
        ProcessCollector(registry=made)
    return made


@contextmanager
def serving(metrics: CollectorRegistry, *, host: str, port: int | None) -> Iterator[str]:
    """Answers GET /metrics while it is entered, from a thread of its own; yields the address.

    Args:
        port: 0 takes a free one; None = nothing is served, and the address is empty.

    Raises:
        UnavailableError: the address cannot be listened on.
    """
    if port is None:
        yield ""
        return
    try:
        # Sockets take an IPv6 address as it is, gRPC in brackets.
        server, thread = start_http_server(port, addr=host.strip("[]"), registry=metrics)
    except OSError as error:
        where = join(host, port)
        message = f"metrics_port: cannot listen on {where} ({error.strerror}): choose another one; 0 takes a free one"
        raise UnavailableError(message) from error
    address = f"http://{join(host, server.server_port)}/metrics"
    _log.info("metrics", address=address)
    try:
        yield address
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Snapshot(Collector):
    """Families that are made anew for every scrape, from what is known at that moment.

    Args:
        families: called in the scrape's thread.
    """

    def __init__(self, families: Callable[[], Iterable[Family]]) -> None:
        self._families = families

    def collect(self) -> Iterable[Family]:
        return self._families()


def counters(prefix: str, counts: Mapping[str, float], labels: Mapping[str, str]) -> Iterator[CounterMetricFamily]:
    """A family for each of a process's counts, which are called `..._total`."""
    for name, count in sorted(counts.items()):
        about = f"Count of {name.removesuffix('_total').replace('_', ' ')}; see docs/operations.md"
        family = CounterMetricFamily(f"{PREFIX}{prefix}_{name}", about, labels=list(labels))
        family.add_metric(list(labels.values()), count)
        yield family


def gauge(
    name: str, about: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], float]]
) -> GaugeMetricFamily:
    """Args: values: of the labels in their order, and the number."""
    family = GaugeMetricFamily(PREFIX + name, about, labels=labels)
    for of, value in values:
        family.add_metric(list(of), value)
    return family


def counter(
    name: str, about: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], float]]
) -> CounterMetricFamily:
    """Args: see `gauge`."""
    family = CounterMetricFamily(PREFIX + name, about, labels=labels)
    for of, value in values:
        family.add_metric(list(of), value)
    return family
