"""optax transformations, one file each; they compose with optax's own."""
