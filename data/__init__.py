"""Images, labels, latents, and every random number of training and sampling."""
