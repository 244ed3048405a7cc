"""The trainer: an application run by torchrun from a checkout, over what `fmristream` streams."""
