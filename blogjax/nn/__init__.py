"""Reusable linen blocks, one file each."""
