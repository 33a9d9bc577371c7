"""Functions on gradients: normalised critics, penalties, adversarial inputs, sharpness, bounds."""
