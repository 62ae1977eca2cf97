"""Model families: configurations, checkpoints, weight images, the decoder's forward pass."""
