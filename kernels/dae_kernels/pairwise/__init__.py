"""Weighted sums of a function of the distance over all pairs of two clouds: the common part of `mmd` and `energy_distance`."""
