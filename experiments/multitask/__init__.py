"""What the experiments on multi-task learning share."""
