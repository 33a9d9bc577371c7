"""Task factories: from a loss and an optimiser to what `blogjax.train.loop.fit` runs."""
