"""Read golden cases: a description in json, tensors in safetensors or by the closed formula of the published-size cases."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

_FNV_OFFSET, _FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3
_STEP = 0x9E3779B97F4A7C15


class GoldenError(Exception):
    """A case that is damaged, incomplete or contradicts its own description."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One golden case: its name, the folder of its files, and its description."""

    name: str
    folder: Path
    about: Mapping[str, Any]

    def __getitem__(self, key: str) -> Any:
        if key not in self.about:
            raise GoldenError(f"{self.name}.json has no {key!r}; fetch the case again")
        return self.about[key]

    def tensors(self, part: str) -> dict[str, Tensor]:
        """All tensors of `weights`, `heads` or `io`, exactly those that the description lists."""
        path = self.folder / f"{self.name}.{part}.safetensors"
        try:
            found = dict(load_file(path))
        except (OSError, SafetensorError) as error:
            raise GoldenError(f"{path}: not a whole safetensors file ({error}); fetch the case again") from error
        listed = {name: (entry["shape"], entry["dtype"]) for name, entry in self[part].items()}
        stored = {name: (list(tensor.shape), str(tensor.dtype)[6:]) for name, tensor in found.items()}
        if listed != stored:
            differing = sorted(name for name in {*listed, *stored} if listed.get(name) != stored.get(name))
            raise GoldenError(
                f"{path}: {', '.join(differing[:5])} not as {self.name}.json lists them; fetch the case again"
            )
        return found


def case_names(folder: Path) -> list[str]:
    """Every name that any file of a case has, so that a case without its json is still seen."""
    files = [path for path in folder.iterdir() if path.suffix in (".json", ".safetensors")]
    return sorted({path.name.split(".")[0] for path in files} - {"tolerances"})


def read_case(folder: Path, name: str) -> Case:
    """The description of a case."""
    path = folder / f"{name}.json"
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise GoldenError(f"{path}: cannot be read ({error}); fetch the case again") from error
    if not isinstance(about, dict):
        raise GoldenError(f"{path}: expected an object, got {type(about).__name__}; fetch the case again")
    return Case(name=name, folder=folder, about=about)


def formula_tensor(seed: int, key: str, *, shape: Sequence[int], scale: float, offset: float) -> Tensor:
    """The values offset + scale * w, rounded to float32 after each step; w comes from the seed, the key and the index."""
    values = np.float32(scale) * formula_noise(seed, key, int(np.prod(shape)))
    return torch.from_numpy(values + np.float32(offset)).reshape(tuple(shape))


def formula_noise(seed: int, key: str, count: int) -> NDArray[np.float32]:
    """The first `count` values w: splitmix64's finaliser over a counter that starts at FNV-1a-64 of `seed:key`."""
    start = _FNV_OFFSET
    for byte in f"{seed}:{key}".encode():
        start = (start ^ byte) * _FNV_PRIME % 2**64
    x = np.arange(1, count + 1, dtype=np.uint64)
    x *= np.uint64(_STEP)
    x += np.uint64(start)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x ^= x >> np.uint64(shift)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    # The upper 24 bits, which float32 holds exactly.
    return (x >> np.uint64(40)).astype(np.float32) * np.float32(2**-23) - np.float32(1)
