"""Grayordinates from end to end: converted, described, verified, streamed packed, withdrawn, and never mixed with volumes."""

import gzip
import json
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import zarr

import fmristream
from fmristream.cli.main import main
from fmristream.errors import CorruptDataError, SourceError, SpaceError, UsageError
from fmristream.ingest.options import ConvertOptions
from fmristream.report.export import export_run
from fmristream.report.info import describe
from fmristream.report.look import look_at
from fmristream.report.preview import preview
from fmristream.report.verify import verify
from fmristream.shards import codec
from fmristream.storage import open_store
from tests.ingest.cifti_files import brain_models, cifti_bytes, series_like, write_series, xml_of
from tests.ingest.cohorts import bold, contents, convert, stored, write_runs

AXIS = brain_models()
FRAMES = 14
RUNS = {
    f"sub-{label}_task-rest_bold": series_like(FRAMES, AXIS, dtype, seed=seed)
    for seed, (label, dtype) in enumerate((("ann", "f4"), ("ben", "i2"), ("cid", "f8")))
}


def sources(folder: Path, runs: dict[str, "np.ndarray[Any, Any]"] = RUNS, **options: Any) -> str:
    return str(write_series(folder, runs, AXIS, **options))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> tuple[str, str]:
    """(source, URL) of three subjects, never changed."""
    folder = tmp_path_factory.mktemp("cifti")
    source, url = sources(folder / "in"), str(folder / "dataset")
    convert(source, url, mask="auto")
    return source, url


def test_every_value_and_brain_model_is_that_of_the_source(dataset, tmp_path, dataset_url):
    source, _ = dataset
    report = convert(source, dataset_url, mask="auto")
    assert (report.runs, report.frames, report.spaces, report.exit_code) == (3, 3 * FRAMES, ("fsLR",), 0)
    found = verify(dataset_url, deep=True, against=source)
    assert found.is_sound
    assert found.voxels_compared == 3 * FRAMES * len(AXIS)
    opened = fmristream.open(dataset_url)
    for run in opened.runs:
        image: Any = nibabel.load(f"{source}/{run.name}.nii")
        assert np.array_equal(opened.read(run, packed=True), image.get_fdata().astype("f4"))
        assert (run.tr_s, run.shape, run.voxels, run.affine) == (0.72, (len(AXIS), 1, 1), len(AXIS), (0.0,) * 16)


def test_values_are_put_nowhere_and_the_message_says_what_to_do(dataset):
    opened = fmristream.open(dataset[1])
    for ask in (lambda: opened.read(0), lambda: opened.space(0)):
        with pytest.raises(SpaceError, match="packed"):
            ask()


def test_windows_come_packed_in_items_and_batches(dataset):
    torch = pytest.importorskip("torch")
    clips = fmristream.StreamingDataset(dataset[1], window=4, normalize="none", seed=0)
    item = clips[0]
    assert "bold" not in item
    run = clips.dataset.run(item["run"])
    whole = clips.dataset.read(run, packed=True)
    assert np.array_equal(item["packed"][0], whole[item["start"] : item["start"] + 4])
    with fmristream.StreamingLoader(clips, batch_size=3) as loader:
        for batch in loader:
            batch = batch.to("cpu")
            assert batch.packed.shape == (3, 1, 4, len(AXIS))
            assert (batch.grid, batch.positions, batch.placed) == (None, None, None)
            for row, (name, start) in enumerate(zip(batch.run, batch.start.tolist(), strict=True)):
                expected = clips.dataset.read(name, start, start + 4, packed=True)
                assert torch.equal(batch.packed[row, 0], torch.from_numpy(expected))
            with pytest.raises(SpaceError, match="use batch"):
                _ = batch.bold


def test_windows_are_normalised_like_those_of_volumes(dataset):
    clips = fmristream.StreamingDataset(dataset[1], window=FRAMES, normalize="voxel-zscore")
    packed = clips[0]["packed"][0].astype(np.float64)
    assert np.abs(packed.mean(axis=0)).max() < 1e-3
    assert np.abs(packed.std(axis=0) - 1).max() < 1e-3


def test_a_grid_cannot_be_asked_for(dataset):
    clips = fmristream.StreamingDataset(dataset[1], window=4)
    for ask in (lambda: clips.grid, lambda: clips.positions):
        with pytest.raises(SpaceError, match="SwiFT"):
            ask()
    with pytest.raises(SpaceError, match="SwiFT"):
        fmristream.StreamingDataset(dataset[1], window=4, grid=(96, 96, 96))


def test_volumes_and_grayordinates_are_never_in_one_batch(tmp_path):
    url = str(tmp_path / "dataset")
    convert(sources(tmp_path / "in"), url, space="fsLR")
    convert(write_runs(tmp_path / "volumes", {"sub-dot_bold": bold()}), url, space="fsLR", update="new")
    opened = fmristream.open(url)
    assert [opened.is_grayordinates(run) for run in opened.runs] == [True, True, True, False]
    assert opened.read("sub-dot_bold").shape == (20, 7, 6, 5)
    with pytest.raises(SpaceError, match="holds volumes"):
        opened.grayordinates("sub-dot_bold")
    for mix_spaces in (False, True):
        with pytest.raises(SpaceError, match="lists of grayordinates"):
            fmristream.StreamingDataset(url, window=4, mix_spaces=mix_spaces)
    assert verify(url, deep=True).is_sound


def test_two_lists_that_differ_in_one_voxel_are_never_in_one_batch(tmp_path):
    write_series(tmp_path / "in", {"sub-1_bold": series_like(5, AXIS)}, AXIS)
    source = write_series(tmp_path / "in", {"sub-2_bold": series_like(5, AXIS)}, brain_models(shift=1))
    url = str(tmp_path / "dataset")
    convert(str(source), url)
    assert verify(url, deep=True, against=str(source)).is_sound
    with pytest.raises(SpaceError, match="lists of grayordinates"):
        fmristream.StreamingDataset(url, window=2, mix_spaces=True)


def test_the_brain_models_are_there_for_any_reader_of_zarr(dataset):
    opened = fmristream.open(dataset[1])
    (digest,) = {run.space_digest for run in opened.runs}
    group: Any = zarr.open_group(f"{dataset[1]}/spaces/{digest}", mode="r")
    told = group.attrs["fmristream"]
    models = opened.grayordinates(0)
    assert np.array_equal(group["indices"][:], models.indices)
    assert [model["structure"] for model in told["models"]] == list(dict.fromkeys(AXIS.name))
    assert [(model.structure, part.start, part.stop) for model, part in models.slices()] == [
        (name, part.start, part.stop or len(AXIS)) for name, part, _ in AXIS.iter_structures()
    ]
    stored_run: Any = opened.zarr(0)
    assert np.array_equal(stored_run["bold"][:], next(iter(RUNS.values())))


def test_nothing_that_people_wrote_into_the_xml_is_stored(dataset):
    source, url = dataset
    assert all(b"Jo Doe" in path.read_bytes() for path in Path(source).iterdir())
    for key, data in stored(url).items():
        assert b"Doe" not in data, key
        assert b"Provenance" not in data, key


def test_info_tells_grayordinates_from_a_grid(dataset, capsys):
    (grid,) = describe(fmristream.open(dataset[1])).grids
    assert (grid.kind, grid.voxels, grid.runs) == ("brain-models", len(AXIS), 3)
    assert grid.structures[0] == "CORTEX_LEFT 21 of 32492"
    assert main(["info", dataset[1]]) == 0
    assert "51 grayordinates of 4 structures" in capsys.readouterr().out
    assert main(["info", dataset[1], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["grids"][0]["kind"] == "brain-models"


def test_what_is_made_of_volumes_is_refused_in_a_sentence(dataset, tmp_path):
    opened = fmristream.open(dataset[1])
    with pytest.raises(UsageError, match="no NIfTI image"):
        export_run(opened, 0, tmp_path / "run.nii")
    with pytest.raises(SourceError, match="without --layout volume"):
        convert(dataset[0], str(tmp_path / "volume"), layout="volume", mask="auto")


def test_a_picture_of_grayordinates_is_a_carpet(dataset, tmp_path):
    pytest.importorskip("matplotlib")
    opened = fmristream.open(dataset[1])
    look = look_at(opened, opened.run(0))
    assert (look.mean, look.sd, look.tsnr) == (None, None, None)
    values = next(iter(RUNS.values())).astype(np.float64)
    z = (values - values.mean(axis=0)) / values.std(axis=0)
    assert look.carpet.shape == (len(AXIS), FRAMES)
    assert np.abs(look.global_signal - z.mean(axis=1)).max() < 1e-3
    pictures = list(preview(opened, str(tmp_path / "pictures")))
    assert all(Path(picture.path).read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert len(pictures) == 3


def test_tar_shards_are_refused_in_a_sentence(dataset, tmp_path, capsys):
    assert main(["convert", dataset[1], str(tmp_path / "tars"), "--format", "webdataset", "--window", "4"]) != 0
    assert "no tar shards" in capsys.readouterr().err


@pytest.mark.parametrize("codec", ["raw", "int16", "int8"])
def test_every_codec_holds_for_grayordinates(dataset, tmp_path, codec):
    url = str(tmp_path / "dataset")
    report = convert(dataset[0], url, codec=codec, mask="auto")
    assert verify(url, deep=True, against=dataset[0]).is_sound
    assert (report.content_digest == fmristream.open(dataset[1]).content_digest) == (codec == "raw")


@pytest.mark.parametrize("options", [{"threads": 1}, {"threads": 2}, {"mask": "first:4"}, {"mask": "none"}])
def test_the_digest_depends_on_no_option_that_leaves_values_as_they_are(dataset, tmp_path, options):
    url = str(tmp_path / "dataset")
    report = convert(dataset[0], url, **{"mask": "auto", **options})
    assert report.content_digest == fmristream.open(dataset[1]).content_digest
    assert any("--mask is for volumes" in note for note in report.warnings) == (options.get("mask") == "first:4")


def test_the_digest_depends_neither_on_compression_nor_on_what_else_the_xml_says(dataset, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, values in RUNS.items():
        xml = xml_of(AXIS, frames=FRAMES).replace(b"Jo Doe", b"Ann Other").replace(b"><", b">\n<")
        (folder / f"{name}.dtseries.nii.gz").write_bytes(gzip.compress(cifti_bytes(values, xml, order=">")))
    url = str(tmp_path / "dataset")
    assert convert(str(folder), url, mask="auto").content_digest == fmristream.open(dataset[1]).content_digest


@pytest.mark.parametrize("mask", ["auto", pytest.param("none", marks=pytest.mark.full)])
def test_shards_of_a_conversion_give_the_same_dataset(tmp_path, mask):
    """Volumes and grayordinates together, named by a table."""
    sources(tmp_path)
    write_runs(tmp_path, {f"sub-{n}_bold": bold(seed=n) for n in range(3)})
    files = sorted(path.name for path in tmp_path.iterdir())
    rows = [f"{name}\t{name.split('_')[0]}\n" for name in files]
    (tmp_path / "runs.tsv").write_text("path\tsubject\n" + "".join(rows))
    source, one, many = str(tmp_path / "runs.tsv"), str(tmp_path / "one"), str(tmp_path / "many")
    whole = convert(source, one, mask=mask)
    assert whole.runs == 6
    for _ in range(2):
        for shard in ("1/2", "2/2"):
            convert(source, many, mask=mask, shard=shard)
    report = convert(source, many, mask=mask)
    assert (report.resumed, report.content_digest) == (6, whole.content_digest)
    assert contents(one) == contents(many)


def test_runs_are_added_replaced_and_withdrawn(tmp_path, memory_url):
    folder = tmp_path / "in"
    first, second, third = RUNS
    sources(folder, {first: RUNS[first], second: RUNS[second]})
    convert(str(folder), memory_url)
    sources(folder, {third: RUNS[third], second: RUNS[second] + 1})
    report = convert(str(folder), memory_url, update="all")
    assert (report.added, report.replaced) == (1, 1)
    assert contents(memory_url)[f"{second}.dtseries"] == (RUNS[second] + 1).tobytes()
    assert len({run.space_digest for run in fmristream.open(memory_url).runs}) == 1
    fmristream.withdraw(memory_url, ["ann"])
    fmristream.gc(memory_url, purge=True)
    assert list(contents(memory_url)) == [f"{second}.dtseries", f"{third}.dtseries"]
    assert verify(memory_url, deep=True).is_sound
    assert not any(b"ann" in data for data in stored(memory_url).values())


def test_damage_to_the_list_is_found(dataset, tmp_path):
    source, _ = dataset
    url = str(tmp_path / "dataset")
    convert(source, url)
    opened = fmristream.open(url)
    digest = opened.run(0).space_digest
    path = tmp_path / "dataset" / "spaces" / digest / "indices" / "c" / "0" / "0"
    data = bytearray(path.read_bytes())
    other = opened.grayordinates(0).indices.copy()
    other[0, 0] += 1
    path.chmod(0o644)
    for wrong in (bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]), codec.encode(other)):
        path.write_bytes(wrong)
        assert not verify(url).is_sound
        with pytest.raises(CorruptDataError):
            fmristream.open(url).grayordinates(0)


def test_verify_tells_a_source_with_other_values_or_other_brain_models(dataset, tmp_path):
    _, url = dataset
    name, values = next(iter(RUNS.items()))
    folder = tmp_path / "in"
    sources(folder)
    changed = values.copy()
    changed[3, 40] = np.nextafter(changed[3, 40], np.float32(np.inf))
    xml = xml_of(AXIS, frames=FRAMES)
    other = xml_of(brain_models(shift=1), frames=FRAMES)
    for data, told in (
        (cifti_bytes(changed, xml), "1 stored values differ from the source; frame 3, stored voxel 40"),
        (cifti_bytes(values, other), "the voxels of its grayordinates"),
        (cifti_bytes(values, xml.replace(b"CORTEX_RIGHT", b"CEREBELLUM_RIGHT")), "the structures of its grayordinates"),
        (cifti_bytes(values, xml.replace(b"32492", b"40962")), "the numbers of vertices of its grayordinates"),
        (cifti_bytes(values, xml.replace(b"-126.0", b"-126.5")), "the volume of its grayordinates"),
    ):
        (folder / f"{name}.dtseries.nii").write_bytes(data)
        faults = verify(url, against=str(folder)).faults
        assert any(told in fault.what for fault in faults)
        assert {fault.run for fault in faults} == {f"{name}.dtseries"}


def test_other_kinds_and_damaged_files_do_not_stop_the_others(tmp_path):
    folder = tmp_path / "in"
    sources(folder)
    xml = xml_of(AXIS, frames=FRAMES)
    values = series_like(FRAMES, AXIS)
    (folder / "sub-x.dscalar.nii").write_bytes(cifti_bytes(values, xml, intent_code=3006))
    (folder / "sub-y.dtseries.nii").write_bytes(cifti_bytes(values, xml)[:-100])
    report = convert(str(folder), str(tmp_path / "dataset"))
    assert (report.runs, report.exit_code) == (3, 3)
    reasons = {one.name: one.reason for one in report.quarantined}
    assert "dense scalars (.dscalar)" in reasons["sub-x.dscalar"]
    assert "cut short" in reasons["sub-y.dtseries"]


def test_volumes_are_taken_beside_grayordinates_unless_these_are_asked_for(tmp_path, capsys):
    source = sources(tmp_path / "in", {"sub-1_bold": RUNS["sub-ann_task-rest_bold"]})
    write_runs(tmp_path / "in", {"sub-1_bold": bold()})
    volumes, lists = str(tmp_path / "volumes"), str(tmp_path / "lists")
    report = fmristream.convert(source, volumes, options=ConvertOptions(split="none", mask="none"))
    assert [(one.name, "--cifti" in one.reason) for one in report.not_chosen] == [("sub-1_bold.dtseries.nii", True)]
    assert not fmristream.open(volumes).is_grayordinates(0)
    assert main(["convert", source, lists, "--cifti", "--split", "none", "--quiet"]) == 0
    assert f"verify {lists} --against {source} --cifti" in capsys.readouterr().out
    assert fmristream.open(lists).is_grayordinates(0)
    assert main(["verify", lists, "--against", source, "--cifti", "--quiet"]) == 0


def test_a_sidecar_and_tr_win_over_the_series(tmp_path):
    folder = tmp_path / "in"
    sources(folder / "sub-1" / "func", {"sub-1_task-rest_space-fsLR_den-91k_bold": RUNS["sub-ann_task-rest_bold"]})
    (folder / "dataset_description.json").write_text('{"Name": "x", "BIDSVersion": "1", "DatasetType": "derivative"}')
    beside = folder / "sub-1" / "func" / "sub-1_task-rest_space-fsLR_den-91k_bold.json"

    def tr_s(name: str, **options: Any) -> float | None:
        url = str(tmp_path / name)
        convert(str(folder), url, **options)
        return fmristream.open(url).run(0).tr_s

    assert tr_s("series") == 0.72
    beside.write_text('{"RepetitionTime": 0.8}')
    assert tr_s("sidecar") == 0.8
    assert tr_s("option", tr_s=0.9) == 0.9


def test_a_dataset_is_the_same_wherever_its_sources_lie(dataset, tmp_path, s3_url):
    store = open_store(s3_url)
    for path in Path(dataset[0]).iterdir():
        store.put_new(path.name, path.read_bytes())
    report = convert(s3_url, str(tmp_path / "dataset"), mask="auto")
    assert report.content_digest == fmristream.open(dataset[1]).content_digest
