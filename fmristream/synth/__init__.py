"""Synthetic cohorts that look like BOLD and carry known effects, to prove that a pipeline learns; see cohort.py."""

from fmristream.synth.cohort import Cohort, parse_url

__all__ = ["Cohort", "parse_url"]
