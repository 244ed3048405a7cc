"""Preprocessing parity: a published input goes through `fmristream convert` and a stream, and must come out as published."""

import json
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

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
# BrainLM's names of its columns -> our recipes; those of the toolkit's version act per frame.
UKB_RECIPES = {
    "All_Patient_All_Voxel": "brainlm-all-patient-all-voxel",
    "Per_Patient_All_Voxel": "brainlm-per-patient-all-voxel",
    "Per_Patient_Per_Voxel": "brainlm-per-patient-per-voxel",
    "Per_Voxel_All_Patient": "brainlm-per-voxel-all-patient",
    "Subtract_Mean": "brainlm-subtract-mean",
    "Subtract_Mean_Divide_Global_STD": "brainlm-global-std",
    "Subtract_Mean_Divide_Global_99thPercent": "brainlm-global-99",
}
TOOLKIT_RECIPES = {
    "All_Patient_All_Voxel": "brainlm-all-patient-all-voxel",
    "Per_Patient_All_Voxel": "brainlm-per-patient-all-voxel",
    "Per_Patient_Per_Voxel": "brainlm-toolkit-per-patient-per-voxel",
    "Per_Voxel_All_Patient": "brainlm-toolkit-per-voxel-all-patient",
    "Subtract_Mean": "brainlm-toolkit-subtract-mean",
}
# Of the parcels that the toolkit's case keeps of these columns.
TOOLKIT_ROWS = (0, 53, 106, 159, 212, 265, 318, 371)


def check_prep_swift(case: str, folder: Path) -> dict[str, float]:
    """Max abs difference of each expected output of a SwiFT preprocessing case.

    Raises:
        ValueError: the case has outputs or a crop that are not known here.
    """
    description, tensors = _read(case, folder)
    source = cropped(tensors.pop("input"), description["rule_parameters"]["crop"])
    _require_known(case, tensors, SWIFT_RECIPES)
    with tempfile.TemporaryDirectory() as scratch:
        url = _converted(scratch, [source])
        return {name: _difference(_run(url, SWIFT_RECIPES[name]), tensors[name]) for name in sorted(tensors)}


def check_prep_tff(case: str, folder: Path) -> dict[str, float]:
    """Max abs difference of both channels of a TFF preprocessing case, as its loader hands them out.

    Raises:
        ValueError: the case has outputs or a crop that are not known here.
    """
    description, tensors = _read(case, folder)
    if description["rule_parameters"]["crop"] != "[8:-8, 8:-8, :-10, 10:] (x, y, z, t)":
        raise ValueError(f"{case}: crop {description['rule_parameters']['crop']!r} is not that of tff-hcp")
    names = {"expected.global": 0, "expected.per_voxel_after_loader": 1}
    _require_known(case, tensors, {"input", "expected.per_voxel", *names})
    with tempfile.TemporaryDirectory() as scratch:
        url = _converted(scratch, [tensors["input"]])
        clips = fmristream.StreamingDataset(url, window=tensors["input"].shape[3], normalize="tff-hcp")
        ours = clips[0]["bold"][..., 10:]
    return {name: _difference(ours[channel], tensors[name]) for name, channel in names.items()}


def check_prep_brainlm_ukb(case: str, folder: Path) -> dict[str, float]:
    """Max abs difference of every column of BrainLM's UK Biobank converter, in each of its splits.

    Its statistics are of each split by itself, so that each is a dataset of its own here.
    """
    description, tensors = _read(case, folder)
    recordings, found = tensors.pop("input"), {}
    numbers = {split: [int(file[1:4]) for file in files] for split, files in sorted(description["split_files"].items())}
    suffix = "_Normalized_Recording"
    _require_known(case, tensors, {f"{split}.{name}{suffix}" for split in numbers for name in UKB_RECIPES})
    for split, of in numbers.items():
        with tempfile.TemporaryDirectory() as scratch:
            url = _converted(scratch, [_as_volumes(recordings[number]) for number in of])
            for name, recipe in UKB_RECIPES.items():
                expected = tensors[f"{split}.{name}{suffix}"]
                found[f"{split}.{name}"] = _difference(_courses(url, recipe), expected)
    return found


def check_prep_brainlm_toolkit(case: str, folder: Path) -> dict[str, float]:
    """Max abs difference of every column of BrainLM's toolkit; NaN there, of parcels without signal, is 0 here."""
    description, tensors = _read(case, folder)
    rows = "expected_rows.{}_Normalized_Recording"
    columns = {rows.format(name): recipe for name, recipe in TOOLKIT_RECIPES.items()}
    statistics = {"stats.median", "stats.IQR", "stats.quartiles"}
    _require_known(case, tensors, {"input_q", "expected.robust", *statistics, *columns})
    with tempfile.TemporaryDirectory() as scratch:
        volumes = [_as_volumes(recording) for recording in tensors["input_q"]]
        url = _converted(scratch, volumes, slope=1 / 16)
        found = {
            name: _difference(_courses(url, recipe)[:, :, TOOLKIT_ROWS].transpose(0, 2, 1), tensors[name])
            for name, recipe in columns.items()
        }
        parcels = description.get("robust_parcels", range(tensors["input_q"].shape[2]))
        robust = _courses(url, "brainlm-robust-released")[:, :, list(parcels)]
        found["expected.robust"] = _difference(robust, np.nan_to_num(tensors["expected.robust"]))
        fitted = fmristream.fit(_clips(url, "none"), "brainlm-robust-released").values.arrays
    found["stats.median"] = _difference(fitted["median"], tensors["stats.median"])
    found["stats.IQR"] = _difference(np.nan_to_num(fitted["iqr"]), np.nan_to_num(tensors["stats.IQR"]))
    return found


# Beginning of a case's name -> its check.
CHECKS: dict[str, Callable[[str, Path], dict[str, float]]] = {
    "prep_swift_": check_prep_swift,
    "prep_tff_": check_prep_tff,
    "prep_brainlm_ukb_": check_prep_brainlm_ukb,
    "prep_brainlm_toolkit_": check_prep_brainlm_toolkit,
}


def cropped(volumes: np.ndarray, rule: str) -> np.ndarray:
    """The input cut as a rule such as `axis 1 [14:-7]` says."""
    match = re.fullmatch(r"axis (\d) \[(-?\d*):(-?\d*)\]", rule)
    if match is None:
        raise ValueError(f"crop rule {rule!r} is not understood; expected `axis N [start:stop]`")
    start, stop = (int(text) if text else None for text in match.groups()[1:])
    cut = [slice(None)] * volumes.ndim
    cut[int(match.group(1))] = slice(start, stop)
    return np.ascontiguousarray(volumes[tuple(cut)])


def _read(case: str, folder: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    description = json.loads((folder / f"{case}.json").read_text())
    return description, dict(load_file(folder / f"{case}.io.safetensors"))


def _require_known(case: str, tensors: Any, known: Any) -> None:
    unknown = sorted(set(tensors) - set(known))
    if unknown:
        raise ValueError(f"{case}: no recipe is known for {', '.join(unknown)}")


def _as_volumes(recording: np.ndarray) -> np.ndarray:
    """(t, parcels) as (parcels, 1, 1, t): every parcel a voxel."""
    return np.ascontiguousarray(recording.T[:, None, None, :])


def _converted(scratch: str, runs: Sequence[np.ndarray], *, slope: float = 1.0) -> str:
    """A dataset of these (x, y, z, t) runs, whole volumes, unsplit."""
    (Path(scratch) / "source").mkdir()
    for number, volumes in enumerate(runs):
        image = nibabel.Nifti1Image(volumes, np.eye(4), dtype=volumes.dtype)
        image.header.set_slope_inter(slope, 0)
        nibabel.save(image, f"{scratch}/source/sub-{number:03d}_bold.nii.gz")
    options = ConvertOptions(mask="none", split="none", space="MNI")
    fmristream.convert(f"{scratch}/source", f"{scratch}/dataset", options=options)
    return f"{scratch}/dataset"


def _clips(url: str, recipe: str, **options: Any) -> "fmristream.StreamingDataset":
    frames = fmristream.open(url).runs[0].frames
    return fmristream.StreamingDataset(url, window=frames, normalize=recipe, exact=True, **options)


def _run(url: str, recipe: str) -> np.ndarray:
    """(x, y, z, t) of the first run."""
    clips = fmristream.StreamingDataset(url, window=fmristream.open(url).runs[0].frames, normalize=recipe)
    return clips[0]["bold"][0]


def _courses(url: str, recipe: str) -> np.ndarray:
    """(run, t, parcels) of all runs, with statistics fitted to all of them where the recipe needs some."""
    fitted = []
    if "all-patient" in recipe or "robust" in recipe:
        fitted = [fmristream.fit(_clips(url, "none"), recipe)]
    clips = _clips(url, recipe, fitted=fitted)
    return np.stack([clips[number]["bold"][0, :, 0, 0].T for number in range(len(clips))])


def _difference(ours: np.ndarray, expected: np.ndarray) -> float:
    if ours.shape != expected.shape:
        raise ValueError(f"shape {ours.shape}, expected {expected.shape}")
    return float(np.abs(ours.astype(np.float64) - expected.astype(np.float64)).max())
