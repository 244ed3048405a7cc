"""Convert 4D fMRI once, share it by URL, stream it into 4D models on any number of nodes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from fmristream._version import __version__

if TYPE_CHECKING:
    from fmristream.ingest.convert import convert
    from fmristream.ingest.gc import gc
    from fmristream.ingest.withdraw import withdraw
    from fmristream.report.leaks import audit
    from fmristream.sampling.order import Locality
    from fmristream.shards.dataset import Dataset
    from fmristream.shards.dataset import open_dataset as open
    from fmristream.stream.clips import StreamingDataset
    from fmristream.stream.fitted import fit, load_fitted, save_fitted
    from fmristream.stream.loader import StreamingLoader
    from fmristream.stream.mixture import Mixture
    from fmristream.stream.selection import split

# Public name -> the module that defines it; imported on first use, so that `import fmristream` stays light.
_HOMES = {
    "Dataset": "fmristream.shards.dataset",
    "Locality": "fmristream.sampling.order",
    "Mixture": "fmristream.stream.mixture",
    "StreamingDataset": "fmristream.stream.clips",
    "StreamingLoader": "fmristream.stream.loader",
    "audit": "fmristream.report.leaks",
    "convert": "fmristream.ingest.convert",
    "fit": "fmristream.stream.fitted",
    "gc": "fmristream.ingest.gc",
    "load_fitted": "fmristream.stream.fitted",
    "open": "fmristream.shards.dataset:open_dataset",
    "save_fitted": "fmristream.stream.fitted",
    "split": "fmristream.stream.selection",
    "withdraw": "fmristream.ingest.withdraw",
}

__all__ = [
    "Dataset",
    "Locality",
    "Mixture",
    "StreamingDataset",
    "StreamingLoader",
    "__version__",
    "audit",
    "convert",
    "fit",
    "gc",
    "load_fitted",
    "open",
    "save_fitted",
    "split",
    "withdraw",
]


def __getattr__(name: str) -> Any:
    """Import the public name that was asked for."""
    if name not in _HOMES:
        raise AttributeError(f"module 'fmristream' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    value = getattr(import_module(module), attribute or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted(__all__)
