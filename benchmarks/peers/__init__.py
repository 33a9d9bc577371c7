"""What the benchmarks compare with; imported in the bench environment only (see README.md)."""
