"""What the experiments on optimisers share."""
