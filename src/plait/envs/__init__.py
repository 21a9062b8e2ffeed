"""Where stages run: recipes of images, what a host has, a shell in the training environment."""
