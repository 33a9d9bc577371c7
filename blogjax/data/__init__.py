"""Where examples come from and how they become batches: host side, numpy, no model knowledge."""
