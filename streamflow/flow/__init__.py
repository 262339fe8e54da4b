"""The mathematics of the samplers: schedules, programs, guidance, noise."""
