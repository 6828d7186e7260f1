"""Weighted sums of a function of the distance over all pairs of two clouds, shared by `mmd` and `energy_distance`."""
