"""Tables of predictions made by hand."""

import numpy as np

from train.predictions import About, PredictionTable, Target, target_columns, texts_of

SEX = ("F", "M")


def target(name="sex", classes=SEX, **facts):
    truth, scores = target_columns(name, classes, several=len(classes) > 2)
    kind = "classification" if classes else "regression"
    return Target(name=name, kind=kind, classes=classes, truth=truth, scores=scores, **facts)


def table(rows, targets=None, **about):
    """Rows of (split, subject, session, run, family, truth, score or scores) for each target in turn."""
    targets = (target(),) if targets is None else targets
    words = dict(
        zip(("split", "subject", "session", "run", "family"), zip(*(row[:5] for row in rows), strict=True), strict=True)
    )
    words["site"] = [None] * len(rows)
    splits = np.array(words["split"])
    window = np.concatenate([np.arange((splits == split).sum()) for split in dict.fromkeys(words["split"])])
    values, place = {}, 5
    for one in targets:
        for name in (one.truth, *one.scores):
            values[name] = np.array([row[place] for row in rows], dtype=np.float64)
            place += 1
    if not targets:
        values["loss"] = np.array([row[5] for row in rows], dtype=np.float64)
    return PredictionTable(
        about=About(**{"step": 5, "objective": "classification", "targets": targets, "draws": 40, **about}),
        words={name: texts_of(column) for name, column in words.items()},
        numbers={"window": window, "start_frame": 4 * window, "frames": np.full(len(rows), 4)},
        values=values,
    )


def cohort(size=12, *, seed=0, split=None, families=False):
    """Rows of subjects with two runs of two windows; two subjects make a family."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(size):
        part = split or ("val" if number < size // 3 else "test")
        family = f"f{number // 2}" if families else None
        for run in range(2):
            for _ in range(2):
                score = float(np.float32(number % 2 - 0.5 + rng.normal()))
                rows.append((part, f"s{number:02d}", "", f"s{number:02d}-{run}", family, number % 2, score))
    return sorted(rows, key=lambda row: row[0] == "test")
