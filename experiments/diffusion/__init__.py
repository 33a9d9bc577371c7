"""What the diffusion experiments share: data, network, optimiser, sampler."""
