"""Latent diffusion (Rombach et al. 2022): autoencoders, and what turns pixels into latents and back."""
