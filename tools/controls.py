"""What simple readers make of a cohort: how well a mean image, an SD image and functional connectivity tell sex.

A network that learns from a planted effect has to be held against these. Ridge regression on each, trained on some
subjects and scored on the others, with an interval over the others.

    python -m tools.controls 'synth://?subjects=128&effect=coupling'
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fmristream.synth import Cohort, parse_url

FEATURES = ("mean image", "SD image", "functional connectivity")
PENALTIES = np.logspace(-2, 6, 17)
NUM_DRAWS = 2_000
# A block is a parcel if at least this share of it is brain.
LEAST_BRAIN = 0.1
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One reader's AUROC on held-out subjects and its 95 % interval."""

    name: str
    auroc: float
    low: float
    high: float


def controls(
    features: dict[str, FloatArray], labels: Sequence[str] | npt.NDArray, train_mask: BoolArray, seed: int
) -> list[Row]:
    """One row per entry of `features` (subject × number): trained where `train_mask` holds, scored elsewhere.

    The label that sorts last counts as positive. Penalties are chosen by leave-one-out within the training subjects;
    the interval redraws the test subjects of each class and takes the reader as it is.
    """
    classes, coded = np.unique(np.asarray(labels), return_inverse=True)
    train = np.asarray(train_mask, dtype=bool)
    for part, chosen in {"training": train, "test": ~train}.items():
        if len(classes) != 2 or len(np.unique(coded[chosen])) != 2:
            raise ValueError(f"controls need two classes, the {part} subjects have {sorted(set(coded[chosen]))}")
    rows = []
    for name, values in features.items():
        scores = _ridge_scores(values, coded, train)
        auroc, low, high = auroc_interval(scores, coded[~train] == 1, seed=seed)
        rows.append(Row(name=name, auroc=auroc, low=low, high=high))
    return rows


def auroc_interval(scores: FloatArray, positive: BoolArray, *, seed: int) -> tuple[float, float, float]:
    """AUROC, ties counted half, and its 95 % bootstrap interval, stratified by class."""
    wins = scores[positive][:, None] - scores[~positive][None, :]
    wins = (np.sign(wins) + 1) / 2
    rng = np.random.default_rng(seed)
    # How often each subject is drawn.
    rows, columns = (rng.multinomial(n, np.full(n, 1 / n), NUM_DRAWS) for n in wins.shape)
    draws = ((rows @ wins) * columns).sum(axis=1) / wins.size
    low, high = np.quantile(draws, (0.025, 0.975))
    return float(wins.mean()), float(low), float(high)


def subject_features(
    frames: Iterable[npt.NDArray], mask: BoolArray, block: int
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """Mean image, SD image and connectivity of one run in one pass over its (x, y, z) frames.

    Connectivity is Fisher's z of the correlations of the means of `block`³ voxel cubes: upper triangle, row by row.
    """
    parcel_of, num_parcels = parcel_numbers(mask, block)
    sizes = np.bincount(parcel_of, minlength=num_parcels + 1)[:num_parcels]
    count, mean, squares = 0, np.zeros(int(mask.sum())), np.zeros(int(mask.sum()))
    courses = []
    for frame in frames:
        values = np.asarray(frame)[mask].astype(np.float64)
        count += 1
        step = values - mean
        mean += step / count
        squares += step * (values - mean)
        courses.append(np.bincount(parcel_of, weights=values, minlength=num_parcels + 1)[:num_parcels] / sizes)
    if count < 2:
        raise ValueError(f"a run of {count} frames has no fluctuations, expected 2 frames or more")
    return mean, np.sqrt(squares / count), _connectivity(np.array(courses))


def stack_features(subjects: Iterable[tuple[FloatArray, FloatArray, FloatArray]]) -> dict[str, FloatArray]:
    """What `subject_features` gave for each subject, as `controls` wants it; SD images as logarithms."""
    means, sds, connectivity = zip(*subjects, strict=True)
    stacked = (np.stack(means), np.log(np.maximum(np.stack(sds), 1e-6)), np.stack(connectivity))
    return dict(zip(FEATURES, stacked, strict=True))


def cohort_features(cohort: Cohort, *, block: int) -> dict[str, FloatArray]:
    """Features of every subject of a synthetic cohort, averaged over its runs."""
    return stack_features(_each_subject(cohort, block))


def train_subjects(labels: Sequence[str], *, test_share: float, seed: int) -> BoolArray:
    """True for the subjects to train on: the same share of each class."""
    coded = np.asarray(labels)
    rng = np.random.default_rng(seed)
    train = np.ones(len(coded), dtype=bool)
    for label in np.unique(coded):
        members = rng.permutation(np.flatnonzero(coded == label))
        train[members[: max(1, round(test_share * len(members)))]] = False
    return train


def table(rows: Iterable[Row]) -> str:
    """Rows for people."""
    lines = [f"{'control':<26}{'AUROC':>7}  95 % interval"]
    lines += [f"{row.name:<26}{row.auroc:>7.3f}  {row.low:.3f} to {row.high:.3f}" for row in rows]
    return "\n".join(lines)


def parcel_numbers(mask: BoolArray, block: int) -> tuple[npt.NDArray[np.intp], int]:
    """Parcel of every voxel of the mask, and how many parcels there are; the last number means none."""
    blocks = tuple(-(-size // block) for size in mask.shape)
    cube = np.ravel_multi_index(tuple(axis // block for axis in np.nonzero(mask)), blocks)
    sizes = np.bincount(cube, minlength=int(np.prod(blocks)))
    kept = np.flatnonzero(sizes >= LEAST_BRAIN * block**3)
    if not len(kept):
        raise ValueError(f"no cube of {block}³ voxels lies in the mask's {len(cube)} voxels; take a smaller block")
    numbers = np.full(len(sizes), len(kept))
    numbers[kept] = np.arange(len(kept))
    return numbers[cube], len(kept)


def _ridge_scores(values: FloatArray, coded: npt.NDArray, train: BoolArray) -> FloatArray:
    from sklearn.linear_model import RidgeCV

    centre, spread = values[train].mean(axis=0), values[train].std(axis=0)
    scaled = (values - centre) / np.where(spread > 0, spread, 1)
    model = RidgeCV(alphas=PENALTIES).fit(scaled[train], 2.0 * coded[train] - 1)
    return model.predict(scaled[~train])


def _connectivity(courses: FloatArray) -> FloatArray:
    centred = courses - courses.mean(axis=0)
    spread = np.sqrt((centred**2).sum(axis=0))
    unit = centred / np.where(spread > 0, spread, 1)
    upper = np.triu_indices(unit.shape[1], k=1)
    return np.arctanh(np.clip((unit.T @ unit)[upper], -0.999, 0.999))


def _each_subject(cohort: Cohort, block: int) -> Iterator[tuple[FloatArray, FloatArray, FloatArray]]:
    mask = cohort.brain_mask()
    for subject in range(cohort.subjects):
        runs = [subject_features(cohort.run_frames(subject, run), mask, block) for run in range(cohort.runs)]
        mean, sd, connectivity = (np.mean(parts, axis=0) for parts in zip(*runs, strict=True))
        yield mean, sd, connectivity


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the controls of a synthetic cohort."""
    parser = argparse.ArgumentParser(prog=f"python -m tools.{Path(__file__).stem}", description="Controls for sex.")
    parser.add_argument("url", help="synth://?subjects=128&effect=coupling")
    parser.add_argument("--test-share", type=float, default=0.375, help="share of subjects held out (default: .375)")
    parser.add_argument("--block", type=int, default=0, help="voxels along a parcel (default: a sixth of the grid)")
    parser.add_argument("--seed", type=int, default=0, help="of the division and of the bootstrap (default: 0)")
    chosen = parser.parse_args(arguments)
    cohort = parse_url(chosen.url)
    print(cohort_table(cohort, test_share=chosen.test_share, block=chosen.block, seed=chosen.seed))


def cohort_table(cohort: Cohort, *, test_share: float = 0.375, block: int = 0, seed: int = 0) -> str:
    """The controls of a synthetic cohort as text."""
    sexes = [str(row["sex"]) for row in cohort.participants()]
    train = train_subjects(sexes, test_share=test_share, seed=seed)
    features = cohort_features(cohort, block=block or default_block(cohort.shape))
    heading = f"sex, {train.sum()} training and {(~train).sum()} held-out subjects"
    return f"{heading}\n{table(controls(features, sexes, train, seed))}"


def default_block(shape: tuple[int, int, int]) -> int:
    """Parcels of a sixth of the grid, about 3 cm."""
    return max(1, max(shape) // 6)


if __name__ == "__main__":
    main()
