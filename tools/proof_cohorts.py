"""The cohorts of the proof as converted datasets, and what simple readers make of them.

Readers see the frames that networks see, and are what a network has to be held against: a mean image, an SD image,
functional connectivity, and lagged connectivity, which is the oracle of effects that lie in the order of frames alone.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

import fmristream
from tools.controls import PENALTIES, stack_features, subject_features
from tools.proof_cells import SPLIT_RATIOS, Settings
from train.baselines_connectivity import cube_parcels

FloatArray = npt.NDArray[np.float64]
# Frames by which lagged connectivity shifts one series against the other: effects of order are 3 to 5 frames.
LAGS = (1, 2, 3, 4)
# Reader of tools/proof_cells.py -> the feature of tools/controls.py.
_FEATURES = {"mean": "mean image", "sd": "SD image", "fc": "functional connectivity"}
READERS = (*_FEATURES, "lagged-fc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """Test subjects, their class (1: M) and what a reader or a network says of each; `shuffled` with frames out of order."""

    subject: tuple[str, ...]
    truth: FloatArray
    score: FloatArray
    shuffled: FloatArray


def dataset_of(out: Path, settings: Settings, effect: str, seed: int) -> str:
    """The URL of a cohort's dataset with its parcel series, converted where it is not there yet.

    Two processes that want the same one wait for each other; a conversion that was killed goes on.
    """
    from fmristream.ingest.options import ConvertOptions

    cohort = settings.cohort(effect, seed)
    folder = out / "cohorts"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{effect}-{seed}-{settings.subjects}x{'x'.join(map(str, settings.shape))}x{settings.frames}"
    done, part = folder / name, folder / f"{name}.part"
    with _alone(folder / f"{name}.lock"):
        if not done.exists():
            atlas = folder / f"{name}.nii"
            write_blocks(atlas, cohort.brain_mask(), cohort.affine(), settings.block)
            options = ConvertOptions(
                split="exact",
                split_ratios=SPLIT_RATIOS,
                split_seed=seed,
                atlases=(str(atlas),),
                sketch=False,
                side=False,
                threads=1,
            )
            fmristream.convert(cohort.url(), str(part), options=options)
            os.replace(part, done)
    return str(done)


def write_blocks(path: Path, mask: npt.NDArray[np.bool_], affine: FloatArray, block: int) -> None:
    """A label image whose parcels are the cubes of `block`³ voxels that connectivity is computed of."""
    import nibabel

    parcels = cube_parcels(np.flatnonzero(mask), mask.shape, block)
    numbers = np.zeros(int(mask.sum()), dtype=np.int16)
    sizes = np.diff(parcels.starts, append=len(parcels.order))
    numbers[parcels.order] = np.repeat(np.arange(1, len(parcels) + 1), sizes)
    labels = np.zeros(mask.shape, dtype=np.int16)
    labels[mask] = numbers
    nibabel.save(nibabel.Nifti1Image(labels, affine), path)


def read_scores(out: Path, settings: Settings, effect: str, seed: int, reader: str) -> tuple[Scores, int]:
    """A reader trained on a cohort's training subjects; also how many they were."""
    features = _features(out, settings, effect, seed)
    train = features["split"] == "train"
    male = (features["sex"] == "M").astype(np.float64)
    ordered, shuffled = ridge_scores(
        features[reader][train], male[train], (features[reader][~train], features[f"{reader}, shuffled"][~train])
    )
    labels = tuple(str(label) for label in features["subject"][~train])
    return Scores(subject=labels, truth=male[~train], score=ordered, shuffled=shuffled), int(train.sum())


def ridge_scores(train: FloatArray, truth: FloatArray, tests: tuple[FloatArray, ...]) -> list[FloatArray]:
    """Scores of each test set by a ridge whose penalty is chosen by leave-one-out within the training subjects."""
    from sklearn.linear_model import RidgeCV

    centre, spread = train.mean(axis=0), train.std(axis=0)
    spread = np.where(spread > 0, spread, 1)
    model = RidgeCV(alphas=PENALTIES).fit((train - centre) / spread, 2 * truth - 1)
    return [model.predict((test - centre) / spread) for test in tests]


def lagged_connectivity(series: FloatArray) -> FloatArray:
    """How much parcel j follows parcel i rather than the other way round: (t, parcels) to the upper triangle, row by row.

    The mean over lags of the correlation of i with j later, less that of j with i later. It is 0 on average where a run
    looks the same when it is reversed, and changes its sign where it does not.
    """
    centred = series - series.mean(axis=0)
    spread = centred.std(axis=0)
    z = centred / np.where(spread > 0, spread, 1)
    later = np.mean([z[:-lag].T @ z[lag:] / len(z) for lag in LAGS], axis=0)
    return (later - later.T)[np.triu_indices(z.shape[1], k=1)]


def shuffled_windows(frames: int, window: int, rng: np.random.Generator) -> npt.NDArray[np.intp]:
    """An order of frames in which each stays in its window; those behind the last whole window stay in place."""
    order = np.arange(frames)
    for start in range(0, frames - window + 1, window):
        order[start : start + window] = start + rng.permutation(window)
    return order


def _features(out: Path, settings: Settings, effect: str, seed: int) -> dict[str, npt.NDArray]:
    """Features of every subject, with frames in order and shuffled within windows; computed once."""
    url = dataset_of(out, settings, effect, seed)
    path = Path(f"{url}-features-{settings.window}-{settings.block}.npz")
    with _alone(path.with_suffix(".lock")):
        if not path.exists():
            part = path.with_suffix(".part.npz")
            np.savez(part, **_compute_features(url, settings, seed))
            os.replace(part, path)
    with np.load(path) as stored:
        return dict(stored)


def _compute_features(url: str, settings: Settings, seed: int) -> dict[str, npt.NDArray]:
    opened = fmristream.open(url)
    sexes = {str(row["subject"]): str(row["sex"]) for row in opened.participants}
    runs = sorted(opened.runs, key=lambda run: run.subject)
    rng = np.random.default_rng(seed)
    found = {
        "subject": np.array([run.subject for run in runs]),
        "sex": np.array([sexes[run.subject] for run in runs]),
        "split": np.array([run.split for run in runs]),
    }
    rows: dict[str, list[tuple[FloatArray, ...]]] = {"": [], ", shuffled": []}
    for run in runs:
        mask = opened.space(run).mask
        frames = opened.read(run)
        order = shuffled_windows(len(frames), settings.window, rng)
        for suffix, now in (("", frames), (", shuffled", frames[order])):
            rows[suffix].append((*subject_features(now, mask, settings.block), _lagged(now, mask, settings.block)))
    for suffix, subjects in rows.items():
        stacked = stack_features([(mean, sd, fc) for mean, sd, fc, _ in subjects])
        found |= {f"{reader}{suffix}": stacked[name] for reader, name in _FEATURES.items()}
        found[f"lagged-fc{suffix}"] = np.stack([lagged for *_, lagged in subjects])
    return found


def _lagged(frames: npt.NDArray, mask: npt.NDArray[np.bool_], block: int) -> FloatArray:
    parcels = cube_parcels(np.flatnonzero(mask), mask.shape, block)
    return lagged_connectivity(parcels.means(frames[:, mask].astype(np.float64)))


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process, however it ends."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
