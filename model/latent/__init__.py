"""Autoencoders for latent diffusion (Rombach et al. 2022)."""
