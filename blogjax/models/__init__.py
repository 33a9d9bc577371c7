"""Whole networks, one file each, built from the blocks of `blogjax.nn`."""
