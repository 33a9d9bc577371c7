"""Batches prepared ahead of the step that needs them, by one thread."""

from blogjax.data.batches import prefetch

__all__ = ["prefetch"]
