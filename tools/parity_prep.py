"""Preprocessing parity: a published input goes through `fmristream convert` and a stream, and must come out as published."""

import json
import re
import tempfile
from pathlib import Path

import nibabel
import numpy as np
from safetensors.numpy import load_file

import fmristream
from fmristream.ingest.options import ConvertOptions

# SwiFT's names of its outputs -> our recipes.
SWIFT_RECIPES = {
    "expected.z-norm.minback": "global-zscore",
    "expected.z-norm.zeroback": "global-zscore-zeroback",
    "expected.minmax.minback": "global-minmax",
    "expected.minmax.zeroback": "global-minmax-zeroback",
}


def check_prep_swift(case: str, folder: Path) -> dict[str, float]:
    """Max abs difference of each expected output of a SwiFT preprocessing case.

    Raises:
        ValueError: the case has outputs or a crop that are not known here.
    """
    description = json.loads((folder / f"{case}.json").read_text())
    tensors = load_file(folder / f"{case}.io.safetensors")
    source = cropped(tensors.pop("input"), description["rule_parameters"]["crop"])
    unknown = sorted(set(tensors) - set(SWIFT_RECIPES))
    if unknown:
        raise ValueError(f"{case}: no recipe is known for {', '.join(unknown)}")
    with tempfile.TemporaryDirectory() as scratch:
        nibabel.save(nibabel.Nifti1Image(source, np.eye(4), dtype=source.dtype), f"{scratch}/sub-1_bold.nii.gz")
        options = ConvertOptions(mask="none", split="none")
        fmristream.convert(f"{scratch}/sub-1_bold.nii.gz", f"{scratch}/dataset", options=options)
        return {name: _difference(f"{scratch}/dataset", SWIFT_RECIPES[name], tensors[name]) for name in sorted(tensors)}


def cropped(volumes: np.ndarray, rule: str) -> np.ndarray:
    """The input cut as a rule such as `axis 1 [14:-7]` says."""
    match = re.fullmatch(r"axis (\d) \[(-?\d*):(-?\d*)\]", rule)
    if match is None:
        raise ValueError(f"crop rule {rule!r} is not understood; expected `axis N [start:stop]`")
    start, stop = (int(text) if text else None for text in match.groups()[1:])
    cut = [slice(None)] * volumes.ndim
    cut[int(match.group(1))] = slice(start, stop)
    return np.ascontiguousarray(volumes[tuple(cut)])


def _difference(url: str, recipe: str, expected: np.ndarray) -> float:
    clips = fmristream.StreamingDataset(url, window=expected.shape[-1], normalize=recipe)
    ours = clips[0]["bold"][0]
    if ours.shape != expected.shape:
        raise ValueError(f"{recipe}: shape {ours.shape}, expected {expected.shape}")
    return float(np.abs(ours.astype(np.float64) - expected.astype(np.float64)).max())
