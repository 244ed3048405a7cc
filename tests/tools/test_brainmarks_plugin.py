"""brainmarks finds our plug-in and gets one vector a window from it; runs where brainmarks is installed."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

base = pytest.importorskip("brainmarks.models.base", reason="brainmarks is not installed")

PLUGIN = Path(__file__).parents[2] / "tools" / "brainmarks_plugin"
SERIES = """
[data]
url = "{url}"
window = 8
stride = 8
normalize = "parcels | voxel-zscore"
target = "age"
[model]
name = "lstm"
hidden = 6
[objective]
kind = "regression"
[train]
steps = 1
batch_size = 2
[eval]
bootstrap_draws = 10
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from fmristream import convert
    from fmristream.ingest.options import ConvertOptions
    from fmristream.synth.cohort import parse_url
    from tests.ingest.nifti_files import nifti_bytes
    from train.main import main

    folder = tmp_path_factory.mktemp("plugin")
    cohort = parse_url("synth://?subjects=6&shape=12x12x12&frames=16")
    blocks = np.arange(12) // 4
    labels = 1 + (9 * blocks[:, None, None] + 3 * blocks[:, None] + blocks)
    header = {
        "sform_code": 4,
        "srow": cohort.affine()[:3].tolist(),
        "pixdim": (1.0, 16.0, 16.0, 16.0, 2.0, 0.0, 0.0, 0.0),
    }
    (folder / "blocks.nii").write_bytes(nifti_bytes(labels.astype("<i2"), **header))
    options = ConvertOptions(split="exact", split_ratios=(0.5, 0.0, 0.5), atlases=(str(folder / "blocks.nii"),))
    convert(cohort.url(), str(folder / "dataset"), options=options)
    recipe = folder / "small.toml"
    recipe.write_text(SERIES.format(url=folder / "dataset").replace("[model]", 'val_split = ""\n[model]'))
    assert main([str(recipe), "--out", str(folder / "run")]) == 0
    return folder / "run"


@pytest.fixture
def registry(monkeypatch):
    import brainmarks.models

    monkeypatch.setattr(
        brainmarks.models, "__path__", [*brainmarks.models.__path__, str(PLUGIN / "brainmarks" / "models")]
    )
    for name in ("brainmarks.models.registry", "brainmarks.models.fmristream_run"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    from brainmarks.models import registry

    return registry


def test_it_is_found_and_gives_a_vector_a_window(registry, run):
    from train.beyond.api import load

    assert "fmristream_run" in registry.list_models()
    transform, model = registry.create_model("fmristream_run", ckpt_path=str(run), space="blocks")
    bold = torch.randn(20, 27)
    sample = transform({"bold": bold, "mean": torch.zeros(1, 27), "std": torch.ones(1, 27), "tr": 2.0})
    found = model({"bold": torch.stack([sample["bold"], sample["bold"]])})
    assert found.patch_embeds.shape[:2] == (2, 2)
    assert found.cls_embeds.shape[:2] == (2, 1)
    expected = load(run).embed(bold[:16].T.numpy(), tr_s=2.0)
    assert np.allclose(found.patch_embeds[0].numpy(), expected, atol=1e-6)


def test_other_trs_are_resampled_and_short_runs_filled(registry, run):
    transform, _ = registry.create_model("fmristream_run", ckpt_path=str(run), space="blocks")
    line = torch.arange(40.0)[:, None].expand(-1, 27)
    windows = transform({"bold": line, "tr": 1.0})["bold"]
    assert torch.allclose(windows[0, 0], 2 * torch.arange(8.0))
    assert transform({"bold": line[:5], "tr": 2.0})["bold"].shape == (1, 27, 8)
    with pytest.raises(ValueError, match="parcels"):
        transform({"bold": line[:, :5], "tr": 2.0})
