"""A small converted cohort and a net that takes milliseconds a step."""

import numpy as np
import pytest
import torch

from fmristream import convert
from fmristream.ingest.options import ConvertOptions
from fmristream.ingest.sources.phenotypes import Phenotypes
from fmristream.synth.cohort import parse_url
from tests.ingest.nifti_files import nifti_bytes
from tests.train.small import small_tables
from train.config import recipe_from


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Nets this small are fastest on one thread, by far so where other tests want the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """20 subjects (10 train, 4 val, 6 test) of 36 frames: 50 training windows of 8 frames every 7."""
    url = str(tmp_path_factory.mktemp("cohort") / "dataset")
    source = "synth://?subjects=20&shape=12x12x12&frames=36&effect=coupling&strength=1.6"
    convert(source, url, options=ConvertOptions(split="exact", split_ratios=(0.5, 0.2, 0.3)))
    return url


@pytest.fixture(scope="session")
def parcelled(tmp_path_factory):
    """12 subjects (6 train, 3 val, 3 test) of 24 frames, 28 parcels of which the last is outside the brain, a word of three.

    Every third subject has no memory score.
    """
    folder = tmp_path_factory.mktemp("parcelled")
    cohort = parse_url("synth://?subjects=12&shape=12x12x12&frames=24")
    blocks = np.arange(12) // 4
    labels = 1 + (9 * blocks[:, None, None] + 3 * blocks[:, None] + blocks)
    labels[0, 0, 0] = 28
    affine = cohort.affine()
    header = {"sform_code": 4, "srow": affine[:3].tolist(), "pixdim": (1.0, 16.0, 16.0, 16.0, 2.0, 0.0, 0.0, 0.0)}
    (folder / "blocks.nii").write_bytes(nifti_bytes(labels.astype("<i2"), **header))
    hands = ("left", "right", "both")
    rows = [
        f"{row['subject']},{row['age']},{hands[place % 3]},{60 + place},{'' if place % 3 == 1 else 7 * place % 5},{row['sex']}"
        for place, row in enumerate(cohort.participants())
    ]
    (folder / "people.csv").write_text("\n".join(["participant_id,age,hand,weight,memory,sex", *rows]) + "\n")
    options = ConvertOptions(
        split="exact",
        split_ratios=(0.5, 0.25, 0.25),
        atlases=(str(folder / "blocks.nii"),),
        phenotypes=Phenotypes(url=str(folder / "people.csv")),
    )
    convert(cohort.url(), str(folder / "dataset"), options=options)
    return str(folder / "dataset")


@pytest.fixture
def small_recipe(cohort):
    """Make a recipe for the cohort; keywords are sections and what to change in them."""

    def make(**sections):
        tables = small_tables(
            cohort,
            train={"steps": 12, "checkpoint_every": 5, "keep_last": 9},
            eval={"baselines": False},
        )
        for section, changes in sections.items():
            tables.setdefault(section, {}).update(changes)
        return recipe_from(tables)

    return make
