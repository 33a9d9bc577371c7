"""Many losses, one set of parameters: weights for losses and for their gradients."""
