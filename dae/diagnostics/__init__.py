"""Diagnostics of a trained latent before a prior is trained: predictors, their report card, and how reliable each is."""
