"""Decoupled Autoencoder: latents from which a simple generator can produce the data."""

__version__ = "0.1.0"
