"""What every gRPC server and channel here share: lifecycle, limits, keys, errors."""
