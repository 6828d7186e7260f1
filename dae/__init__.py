"""Decoupled Autoencoder: latents from which the simplest generator can make the data."""

__version__ = "0.1.0"
