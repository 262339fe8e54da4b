"""The numbers of the protocol, the same for both transports."""

from __future__ import annotations

from dataclasses import dataclass

HEADROOM = 1.25
"""An estimate may be exceeded by this factor."""


@dataclass(frozen=True, slots=True)
class Policy:
    """Times are seconds by the transport's clock.

    Attributes:
        lease_s: an entry on which there was no heartbeat for so long goes to another worker.
        max_deliveries: an entry that was delivered so often without an end is given up.
        min_window: images under way at once while no denoiser is registered; else twice the live denoiser slots.
        priority_weight_s: how much earlier one step of priority makes an image arrive.
        urgent_s: an image is worth its deadline less this, where that is sooner than its arrival.
        blob_margin_s: how much longer than a job's deadline its images are kept, so that no stage misses them.
        result_s, delivered_s: how long results are kept after the job ended, and after they were delivered.
        tombstone_s: how long the job itself can be read after it ended.
        watch_grace_s: no watch lease lapses for so long after nobody reaped for `reap_gap_s`; then watchers could not
            renew either (Redis was away, its clock jumped, the gateways restarted).
        dead_worker_s: how long a worker whose lease lapsed stays in the registry.
        dead_entries_s: how long what was given up can be looked at.
        max_dead: of them; the oldest go first.
        retry_s: pause before the attempt after one that failed; twice as long before the next one.
        memory: what a measured image counts for after each further one.
        headroom: what would be late if its estimate were exceeded by this factor is refused.
        fresh_s: estimates without a measurement for so long refuse nobody.
        work_s: what one unit of work is taken to need before the first measurement.
        max_cached_bytes: of cached values; those that expire first go first.
        max_previews: in the preview stream.
    """

    lease_s: float = 10.0
    max_deliveries: int = 3
    min_window: int = 8
    priority_weight_s: float = 60.0
    urgent_s: float = 15.0
    blob_margin_s: float = 60.0
    result_s: float = 900.0
    delivered_s: float = 60.0
    tombstone_s: float = 3600.0
    watch_grace_s: float = 15.0
    reap_gap_s: float = 5.0
    dead_worker_s: float = 60.0
    dead_entries_s: float = 7 * 86400.0
    max_dead: int = 1000
    retry_s: float = 0.25
    memory: float = 0.95
    headroom: float = HEADROOM
    fresh_s: float = 60.0
    work_s: float = 0.05
    max_cached_bytes: int = 128 * 2**20
    max_previews: int = 32
