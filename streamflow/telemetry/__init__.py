"""What a process tells of itself: log lines, counts, metrics (`metrics`) and traces (`traces`).

The last two are imported where they are used: they need libraries that a client has not.
"""

from streamflow.telemetry.counters import Counters
from streamflow.telemetry.logs import EventLogger, Sparing, Told, configure_logging, fingerprint, get_logger

__all__ = ["Counters", "EventLogger", "Sparing", "Told", "configure_logging", "fingerprint", "get_logger"]
