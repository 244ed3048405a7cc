"""Numerics on arrays: statistics, normalisation, grids and masks. Pure: no files, no network, no torch."""
