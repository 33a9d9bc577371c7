"""Measured side by side with the peers, ratios in one run; `results/` holds what was measured."""
