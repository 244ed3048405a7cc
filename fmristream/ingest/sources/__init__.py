"""Where runs come from: BIDS datasets, plain folders, synthetic cohorts."""

from fmristream.ingest.sources.find import find_runs
from fmristream.ingest.sources.listing import Listing, Skipped, SourceRun

__all__ = ["Listing", "Skipped", "SourceRun", "find_runs"]
