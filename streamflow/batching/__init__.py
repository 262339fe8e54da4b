"""The running batch: slots, rows, the tick."""
