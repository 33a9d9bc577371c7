"""Leaf mathematics that every other package may import; this one imports jax only."""
