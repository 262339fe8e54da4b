"""Why a job is not admitted, in words; the same for both transports."""

from __future__ import annotations

from streamflow.errors import BusyError, DeadlineError

_WHY = {
    "jobs": "too many jobs are under way",
    "tenant_jobs": "too many jobs of yours are under way",
    "rate": "you have asked for more images than you may have in a minute",
    "bytes": "too many bytes of results are stored or under way",
    "tenant_bytes": "too many bytes of results of yours are stored or under way",
    "work": "so much waits that the deadline would pass first",
}


def busy(why: str, *, retry_after_s: float) -> BusyError:
    """Args: why: a key of the sentences above."""
    message = f"{_WHY[why]}; try again in {retry_after_s:.0f} s"
    return BusyError(message, retry_after_s=retry_after_s, reason=why)


def too_late(expected_s: float, *, left_s: float) -> DeadlineError:
    # Two digits, and no power of ten.
    about_s = float(f"{expected_s:.2g}")
    return DeadlineError(
        f"this request takes about {about_s:.12g} s here, too much for the {left_s:.3g} s that it may take, with a "
        "margin of a quarter; allow more time, or ask for fewer steps or images"
    )
