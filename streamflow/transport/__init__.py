"""What carries work between the gateway and the stages: Redis streams, or memory in one process."""
