"""DiT: text to image with a latent diffusion transformer."""
