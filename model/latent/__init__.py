"""Latent diffusion (Rombach et al. 2022): autoencoders."""
