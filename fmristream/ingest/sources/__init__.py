"""Where runs come from: BIDS datasets, known collections, plain folders, archives, tables, synthetic cohorts."""

from fmristream.ingest.sources.choose import EntityFilter
from fmristream.ingest.sources.find import find_runs
from fmristream.ingest.sources.listing import Listing, Skipped, SourceRun
from fmristream.ingest.sources.phenotypes import Phenotypes

__all__ = ["EntityFilter", "Listing", "Phenotypes", "Skipped", "SourceRun", "find_runs"]
