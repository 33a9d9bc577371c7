"""What the diffusion experiments share: network, optimiser, sampler."""
