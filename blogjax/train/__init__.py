"""The training loop: its contract, state, mesh, checkpoints and reports. Knows no method."""
