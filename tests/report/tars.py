"""Tar shards as other tools see them."""

import io
import json
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from fmristream.shards.dataset import Dataset
from fmristream.storage import Store


def samples_of(folder: Path) -> list[dict[str, Any]]:
    """Every sample of a folder of tars, as the webdataset package reads and decodes them."""
    import webdataset

    urls = sorted(str(path) for path in folder.glob("*.tar"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves files to be closed by the garbage collector
        return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=True).decode())


def members_of(data: bytes) -> dict[str, bytes]:
    """Name -> content, as Python's tarfile has it."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar.getmembers()}


def contents(store: Store, keys: list[str]) -> dict[str, bytes]:
    return {key: store.read(key) for key in keys}


def objects_of(store: Store) -> dict[str, bytes]:
    """Everything that finished shards consist of, by the index and nothing else."""
    index = json.loads(store.read("index.json"))
    keys = ["index.json"]
    for part in index["parts"].values():
        keys += [part["mask"]["key"], *(shard["key"] for shard in part["shards"])]
    return contents(store, sorted(keys))


def window_ids(dataset: Dataset, split: str, frames: int) -> set[tuple[str, int]]:
    """(run name, first frame) of every window without overlap."""
    runs = [run for run in dataset.runs if run.split == split]
    return {(run.name, start) for run in runs for start in range(0, run.frames - frames + 1, frames)}


def unpacked(packed: np.ndarray, mask: np.ndarray, fill: float) -> np.ndarray:
    """(t, v) onto the grid of the mask, by boolean indexing: (t, x, y, z)."""
    placed = np.full((len(packed), *mask.shape), fill, dtype=packed.dtype)
    placed[:, mask] = packed
    return placed
