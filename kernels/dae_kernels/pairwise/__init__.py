"""Weighted sums of a function of the distance over all pairs of two clouds: what `mmd` and `energy_distance` are made of."""
