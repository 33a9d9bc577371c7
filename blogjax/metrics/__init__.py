"""What experiments measure with: host side, float64, from samples that are already on the host."""
