"""What each stage does to a job, free of wire and process."""
