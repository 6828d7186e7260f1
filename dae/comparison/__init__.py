"""Controlled comparisons: arms that differ in one thing, trained on the same batches, evaluated in the same features."""
