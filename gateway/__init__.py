"""What clients call: validates, admits, and streams what happens."""
