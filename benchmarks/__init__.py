"""What is measured; each module prints its figures and writes them under docs/."""
