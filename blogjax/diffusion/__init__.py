"""Diffusion models: noise schedules, DDPM and DDIM, their bound and their samplers."""
