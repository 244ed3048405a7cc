"""A recipe of a SwiFT that takes milliseconds a step, on windows of 8 frames of 12 voxels along each axis."""

from pathlib import Path
from typing import Any

from train.config import as_toml, recipe_from

MODEL = {
    "patch_size": [3, 3, 3, 1],
    "embed_dim": 6,
    "depths": [1, 1],
    "num_heads": [1, 2],
    "window_size": [2, 2, 2, 4],
    "first_window_size": [2, 2, 2, 4],
}


def small_tables(url: str, **sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Its sections, with what keywords change in them."""
    tables: dict[str, dict[str, Any]] = {
        "data": {"url": url, "window": 8, "stride": 7},
        "model": dict(MODEL),
        "train": {"steps": 6, "batch_size": 4},
        "eval": {"bootstrap_draws": 50},
    }
    for section, changes in sections.items():
        tables.setdefault(section, {}).update(changes)
    return tables


def write_small(folder: Path, url: str, **sections: dict[str, Any]) -> Path:
    """The same as a file."""
    path = folder / "small.toml"
    path.write_text(as_toml(recipe_from(small_tables(url, **sections))))
    return path
