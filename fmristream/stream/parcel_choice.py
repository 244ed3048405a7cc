"""Which of a run's stored parcels are meant."""

from collections.abc import Mapping

from fmristream.catalog.run import Run
from fmristream.errors import UsageError
from fmristream.shards.dataset import Dataset


def the_only_parcels(dataset: Dataset, run: Run, spaces: Mapping[str, str], atlas: str) -> str:
    """Digest of the space of parcels of an atlas.

    Args:
        dataset: where the run lies.
        run: which.
        spaces: name of the series' array -> digest of its space.
        atlas: the first 8 digits or more of the atlas's digest, "" for the only one.

    Raises:
        UsageError: there is none, or there are several.
    """
    documents = dataset.generation.document["spaces"]
    of = {digest: str(documents[digest]["atlas"]) for digest in spaces.values()}
    found = [digest for digest, name in of.items() if not atlas or (len(atlas) >= 8 and name.startswith(atlas.lower()))]
    if len(found) != 1:
        known = ", ".join(name[:12] for name in of.values()) or "none"
        step = f"parcels:{atlas}" if atlas else "parcels"
        raise UsageError(
            f"{dataset.store.name}: run {run.name}: {step}: it has parcels of: {known}; give the first 8 digits or more of one "
            "atlas's digest, convert with --atlas, or pass atlases={name: atlas} and write parcels:name"
        )
    return found[0]
