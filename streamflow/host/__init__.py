"""What the three stage services share: reading entries, telling the next stage, and running as a process."""
