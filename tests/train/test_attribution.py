"""Maps come out where the voxels came from: planted voxels are found in the NIfTI at their millimetres, whatever the grid."""

import json
from contextlib import ExitStack
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from torch import nn

import fmristream
from fmristream import StreamingDataset, StreamingLoader, convert
from fmristream.errors import UsageError
from fmristream.ingest.options import ConvertOptions
from tests.train.small import MODEL
from train.attribution import main
from train.attribution_maps import native_volume, write_map, write_picture
from train.attribution_runs import Method, SubjectMean, attribute_runs, cube_regions, parcel_regions
from train.data import Part
from train.launch import World
from train.loop import train

CPU = torch.device("cpu")
# Oblique, left-handed, with unequal edges: an image of which no axis may be mistaken for another.
AFFINE = np.array([[-2.0, 0.1, 0, 11], [0.1, 0.2, 3.0, -20], [0, -2.5, 0.1, 30], [0, 0, 0, 1]])
SIZES, PLANTED = (13, 10, 11), (9, 2, 7)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """Two subjects of noise on an odd grid, the second with two runs; one voxel fluctuates a hundred times as much."""
    folder = tmp_path_factory.mktemp("planted")
    (folder / "in").mkdir()
    rng = np.random.default_rng(0)
    for name in ("sub-1_task-rest_bold", "sub-2_task-rest_run-1_bold", "sub-2_task-rest_run-2_bold"):
        values = rng.normal(1000, 1, (*SIZES, 16))
        values[PLANTED] += rng.normal(0, 100, 16)
        image = nibabel.Nifti1Image(values.astype(np.float32), AFFINE)
        image.header.set_xyzt_units("mm", "sec")
        image.header["pixdim"][4] = 2.0
        nibabel.save(image, folder / "in" / f"{name}.nii")
    mask = np.ones(SIZES, dtype=np.uint8)
    mask[0], mask[:, :, -1] = 0, 0
    nibabel.save(nibabel.Nifti1Image(mask, AFFINE), folder / "mask.nii")
    options = ConvertOptions(split="none", mask=str(folder / "mask.nii"), space="MNI152")
    convert(str(folder / "in"), str(folder / "out"), options=options)
    return str(folder / "out")


class Power(nn.Module):
    """Summed squared fluctuations: it reads the planted voxel, wherever that lies."""

    def forward(self, bold):
        return (bold - bold.mean(-1, keepdim=True)).square().sum((1, 2, 3, 4, 5))[:, None]


def opened(url, stack, *, batch_size=3, **options):
    clips = StreamingDataset(url, **{"window": 4, "stride": 4, "normalize": "none"} | options)
    loader = StreamingLoader(clips, batch_size=batch_size)
    stack.callback(loader.close)
    return Part(clips=clips, loader=loader)


def peak_mm(path):
    image = nibabel.load(path)
    values = image.get_fdata()
    assert values.ndim == 3
    return nibabel.affines.apply_affine(image.affine, np.unravel_index(np.abs(values).argmax(), values.shape)), image


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"grid": (16, 16, 16)},
        {"grid": (11, 8, 9)},
        {"orientation": "RAS"},
        {"orientation": "PIR", "grid": (9, 14, 12)},
        {"normalize": "crop:2:-1,1:-2,3:-1"},
    ],
    ids=["stored", "padded", "cut", "turned", "turned, cut and padded", "cut by the recipe"],
)
@pytest.mark.parametrize("name", ["gradients", "occlusion"])
def test_a_planted_voxel_is_found_at_its_millimetres(planted, tmp_path, options, name):
    with ExitStack() as stack:
        part = opened(planted, stack, **options)
        regions = cube_regions(part.clips, 1) if name == "occlusion" else None
        method = Method(name=name, baseline="window-mean", steps=4, chunk=200, regions=regions)
        found = next(attribute_runs(Power(), part, method, device=CPU))
        write_map(part.clips, found.run, found.values, tmp_path / "map.nii.gz")
    place, image = peak_mm(tmp_path / "map.nii.gz")
    np.testing.assert_allclose(place, nibabel.affines.apply_affine(AFFINE, PLANTED), atol=1e-3)
    assert image.get_data_dtype() == np.float32
    if "crop" not in options.get("normalize", ""):
        assert image.shape == SIZES
        np.testing.assert_allclose(image.affine, AFFINE, atol=1e-6)
        assert (
            image.get_fdata()[PLANTED]
            > 100 * np.abs(np.delete(image.get_fdata().ravel(), np.ravel_multi_index(PLANTED, SIZES))).max()
        )


def test_every_voxel_goes_back_to_its_place(planted):
    for options in ({}, {"grid": (16, 12, 16)}, {"orientation": "PIR", "grid": (9, 14, 12)}):
        with ExitStack() as stack:
            clips = opened(planted, stack, **options).clips
            item = clips[0]["bold"][0, ..., 0]
            back = native_volume(clips, item)
            source = clips.dataset.read(0, 0, 1)[0]
            kept = np.zeros(source.shape, dtype=bool)
            kept[clips.mask] = clips.positions >= 0
            np.testing.assert_array_equal(back, np.where(kept, source, 0))
            with pytest.raises(UsageError, match="the windows have the grid"):
                native_volume(clips, item[:-1])


def test_signed_maps_sum_to_the_mean_change_and_runs_are_averaged_by_subject(planted):
    with ExitStack() as stack:
        part = opened(planted, stack, normalize="voxel-zscore")
        maps = list(attribute_runs(Power(), part, Method(steps=4), device=CPU))
        again = list(
            attribute_runs(
                Power(),
                opened(planted, stack, normalize="voxel-zscore", batch_size=1),
                Method(steps=4, chunk=3),
                device=CPU,
            )
        )
        grid = part.clips.grid
    assert [found.windows for found in maps] == [4, 4, 4]
    assert [found.run.name for found in maps] == [run.name for run in part.clips.runs]
    mean = SubjectMean(grid)
    for found, same in zip(maps, again, strict=True):
        assert found.values.sum(dtype=np.float64) == pytest.approx(found.change, rel=1e-3)
        assert found.gap < 1e-3 * abs(found.change)
        np.testing.assert_allclose(same.values, found.values, rtol=1e-4, atol=1e-8)
        mean.add(found)
    one, two, three = (found.values.astype(np.float64) for found in maps)
    np.testing.assert_allclose(mean.value, (one + (two + three) / 2) / 2, rtol=1e-5, atol=1e-10)
    assert mean.subjects == 2


def test_magnitudes_do_not_cancel_over_time(planted):
    with ExitStack() as stack:
        signed, sizes = (
            next(
                attribute_runs(
                    Power(),
                    opened(planted, stack, normalize="voxel-zscore"),
                    Method(steps=3, magnitude=magnitude),
                    device=CPU,
                )
            )
            for magnitude in (False, True)
        )
    assert (sizes.values >= np.abs(signed.values) - 1e-7).all()
    assert sizes.values.sum() > 1.01 * np.abs(signed.values).sum()


class MeanFrame(nn.Module):
    """The mean over voxels and frames: frames of padding would thin it out."""

    def forward(self, bold):
        return bold.mean((1, 2, 3, 4, 5))[:, None]


def test_whole_runs_of_different_lengths_are_asked_about_their_own_frames_alone(tmp_path):
    (tmp_path / "in").mkdir()
    values = np.random.default_rng(0).normal(1000, 10, (6, 7, 5, 12)).astype(np.float32)
    for subject, frames in ((1, 12), (2, 5)):
        image = nibabel.Nifti1Image(values[..., :frames], AFFINE)
        image.header.set_xyzt_units("mm", "sec")
        image.header["pixdim"][4] = 2.0
        nibabel.save(image, tmp_path / "in" / f"sub-{subject}_task-rest_bold.nii")
    convert(
        str(tmp_path / "in"), str(tmp_path / "out"), options=ConvertOptions(split="none", mask="none", space="MNI152")
    )
    with ExitStack() as stack:
        part = opened(str(tmp_path / "out"), stack, window=None, stride=None)
        for method in (Method(steps=2), Method(name="occlusion", regions=cube_regions(part.clips, 7))):
            found = {one.run.frames: one for one in attribute_runs(MeanFrame(), part, method, device=CPU)}
            assert set(found) == {12, 5}
            for frames, one in found.items():
                whole = one.values.sum() if method.name == "gradients" else one.values.max()
                np.testing.assert_allclose(whole, values[..., :frames].astype(np.float64).mean(), rtol=1e-5)


def test_a_shuffled_stream_is_refused(planted):
    with ExitStack() as stack:
        part = opened(planted, stack, seed=1)
        with pytest.raises(UsageError, match="seed=None"):
            next(attribute_runs(Power(), part, Method(), device=CPU))
    with pytest.raises(UsageError, match="needs regions"):
        Method(name="occlusion")


def test_parcels_can_be_occluded(tmp_path):
    """An atlas of two slabs: hiding the one that holds the planted voxel takes the score away."""
    rng = np.random.default_rng(0)
    values = rng.normal(1000, 1, (*SIZES, 16))
    values[PLANTED] += rng.normal(0, 100, 16)
    (tmp_path / "in").mkdir()
    for subject in (1, 2):
        nibabel.save(
            nibabel.Nifti1Image(values.astype(np.float32), AFFINE),
            tmp_path / "in" / f"sub-{subject}_space-MNI152_bold.nii",
        )
    atlas = np.zeros(SIZES, dtype=np.int16)
    atlas[:6], atlas[6:, :8] = 3, 8
    nibabel.save(nibabel.Nifti1Image(atlas, AFFINE), tmp_path / "atlas.nii")
    convert(
        str(tmp_path / "in"),
        str(tmp_path / "out"),
        options=ConvertOptions(split="none", mask="none", atlases=(str(tmp_path / "atlas.nii"),), space="MNI152"),
    )
    with ExitStack() as stack:
        part = opened(str(tmp_path / "out"), stack, grid=(16, 16, 16))
        regions = parcel_regions(part.clips)
        assert np.bincount(regions[regions >= 0]).tolist() == [6 * 10 * 11, 7 * 8 * 11]
        method = Method(name="occlusion", baseline="window-mean", regions=regions)
        found = next(attribute_runs(Power(), part, method, device=CPU))
        native = native_volume(part.clips, found.values)
        assert native[PLANTED] > 10 * abs(native[0, 0, 0])
        assert native[12, 9, 0] == 0
        with pytest.raises(UsageError, match="first digits"):
            parcel_regions(part.clips, "ffff")


@pytest.fixture(scope="module")
def finished(cohort, tmp_path_factory):
    """A short run of the trainer on a padded grid."""
    from train.config import recipe_from

    out = tmp_path_factory.mktemp("finished")
    small = {**MODEL, "patch_size": [4, 4, 4, 1]}
    recipe = recipe_from(
        {
            "data": {"url": cohort, "window": 8, "stride": 8, "grid": [16, 16, 16]},
            "model": small,
            "train": {"steps": 3, "batch_size": 4, "checkpoint_every": 2},
            "eval": {"bootstrap_draws": 10},
        }
    )
    train(recipe, out=out, world=World())
    return out


def test_the_command_maps_a_trained_network(finished, cohort, tmp_path, capsys):
    arguments = [
        str(finished),
        "--out",
        str(tmp_path),
        "--runs",
        "3",
        "--steps",
        "16",
        "--chunk",
        "4",
        "--device",
        "cpu",
    ]
    assert main(arguments) == 0
    facts = json.loads((tmp_path / "attribution.json").read_text())
    assert (facts["step"], facts["subjects"], len(facts["runs"])) == (3, 3, 3)
    dataset = fmristream.open(cohort)
    total = np.zeros(dataset.runs[0].shape)
    for row in facts["runs"]:
        image = nibabel.load(tmp_path / row["file"])
        run = dataset.run(row["run"])
        assert run.split == "test"
        assert image.shape == run.shape
        np.testing.assert_allclose(image.affine, run.affine_matrix)
        assert not image.get_fdata()[~dataset.space(run).mask].any()
        assert row["gap"] < 0.1 * max(abs(row["change"]) for row in facts["runs"])
        total += image.get_fdata() / 3
    mean = nibabel.load(tmp_path / "mean_gradients.nii.gz")
    np.testing.assert_allclose(mean.get_fdata(), total, rtol=1e-4, atol=1e-9)
    assert (tmp_path / "mean_gradients.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert "attributions sum to it within" in capsys.readouterr().out


def test_the_command_occludes_cubes_of_another_dataset(finished, cohort, tmp_path):
    arguments = [str(finished), cohort, "--split", "", "--method", "occlusion", "--block", "6", "--runs", "2"]
    assert main([*arguments, "--out", str(tmp_path), "--device", "cpu", "--chunk", "8"]) == 0
    facts = json.loads((tmp_path / "attribution.json").read_text())
    with ExitStack() as stack:
        regions = cube_regions(opened(cohort, stack, grid=(16, 16, 16)).clips, 6)
    assert facts["regions"] == regions.max() + 1
    assert facts["runs"][0]["gap"] is None
    names = [run.name for run in fmristream.open(cohort).runs]
    assert [row["run"] for row in facts["runs"]] == names[:2]
    assert facts["content_digest"] == fmristream.open(cohort).content_digest
    assert (tmp_path / "mean_occlusion.png").exists()


def test_folders_without_a_run_are_wrong_usage(finished, tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    (tmp_path / "recipe.toml").write_text((finished / "recipe.toml").read_text())
    assert main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert "no recipe.toml" in said
    assert "no whole checkpoint" in said


def test_a_pooled_map_lies_on_the_pooled_grid_and_can_be_drawn(planted, tmp_path):
    with ExitStack() as stack:
        part = opened(planted, stack, normalize="pool:2")
        found = next(attribute_runs(Power(), part, Method(baseline="window-mean", steps=3), device=CPU))
        write_map(part.clips, found.run, found.values, tmp_path / "map.nii")
        write_picture(part.clips, found.run, found.values, tmp_path / "map.png", title="pooled")
        clips = part.clips
    place, image = peak_mm(tmp_path / "map.nii")
    np.testing.assert_allclose(image.affine, clips.affine)
    assert image.shape == clips.mask.shape
    # The planted voxel lies in the cube whose centre is the peak.
    inside = np.linalg.inv(image.affine) @ [*nibabel.affines.apply_affine(AFFINE, PLANTED), 1]
    at = np.linalg.inv(image.affine) @ [*place, 1]
    assert np.abs(inside - at)[:3].max() <= 0.5 + 1e-6
    assert Path(tmp_path / "map.png").stat().st_size > 5000
