"""`--codec`: what raw, int16 and int8 give back, what they promise, and what they refuse."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorstore
import zarr

import fmristream
from fmristream.errors import CorruptDataError, FormatError, UsageError
from fmristream.ingest import tasks
from fmristream.ingest.fingerprint import Fingerprint
from fmristream.ingest.options import CODECS, ConvertOptions
from fmristream.ingest.withdraw import withdraw
from fmristream.report.info import describe
from fmristream.report.verify import verify
from fmristream.shards.run_reader import RunReader
from fmristream.signal.normalize import RECIPES
from tests.ingest.cohorts import SHAPE, bold, convert, six_runs, write_runs
from tests.ingest.test_convert_resume import interrupt
from tests.report.datasets import recommit
from tests.shards.tiny_dataset import small_shards

LOSSY = ("int8", "int16")


def sources(folder: Path) -> str:
    """An int16 run with a spike and zeros at the edge, a float32 run with NaN, a float64 run; scaled."""
    spiky = bold()
    spiky[3, 3, 3, 7] = 32000
    spiky[0, 0], spiky[1, 0, :, 5:9], spiky[2, 2, 2] = 0, 0, 77
    floats = bold("f4", seed=1)
    floats[1, 1, 1, 4], floats[2, 2, 2, 5], floats[4, 4, 4], floats[0] = np.nan, np.inf, np.nan, 0
    runs = {"sub-1_bold": spiky, "sub-2_bold": floats, "sub-3_bold": bold("f8", seed=2)}
    return write_runs(folder, runs, scl_slope=0.5)


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> dict[str, str]:
    """URL of a dataset of the same sources in each codec; `source` is theirs. Shards of a few frames."""
    root = tmp_path_factory.mktemp("codecs")
    source = sources(root / "in")
    with pytest.MonkeyPatch.context() as patch:
        small_shards(patch.setattr, 6000)
        for codec in CODECS:
            assert convert(source, str(root / codec), codec=codec, space="MNI").quarantined == ()
    return {"source": source, **{codec: str(root / codec) for codec in CODECS}}


@pytest.fixture
def copied(converted, tmp_path):
    """A copy that may be damaged."""

    def copy(codec: str) -> Path:
        return Path(shutil.copytree(converted[codec], tmp_path / codec))

    return copy


def encodings(url: str) -> list[str]:
    dataset = fmristream.open(url)
    return [dataset.reader(run).frames_array.encoding for run in dataset.runs]


def source_values(converted: dict[str, str], run: int) -> np.ndarray:
    """(t, v) as they were stored in the source."""
    return fmristream.open(converted["lossless"]).reader(run).read_stored(0, SHAPE[3])


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_passes_the_deep_check_and_the_comparison_with_its_source(converted, codec):
    report = verify(converted[codec], deep=True, against=converted["source"])
    assert report.faults == ()
    assert (report.runs_compared, report.frames_compared, report.frames_decoded) == (3, 60, 60)
    assert report.frames_cross_read == 9


def test_each_codec_stores_what_it_says(converted):
    assert encodings(converted["lossless"]) == ["difference", "direct", "direct"]
    assert encodings(converted["raw"]) == ["raw"] * 3
    assert encodings(converted["int8"]) == ["quantized"] * 3
    assert encodings(converted["int16"]) == ["difference", "quantized", "quantized"], "integers stay lossless"


def test_raw_is_the_same_dataset_as_lossless_with_the_same_samples(converted):
    raw, lossless = fmristream.open(converted["raw"]), fmristream.open(converted["lossless"])
    assert raw.content_digest == lossless.content_digest
    for run in range(3):
        assert raw.reader(run).read_stored(3, 17).tobytes() == lossless.reader(run).read_stored(3, 17).tobytes()
    for recipe in RECIPES:
        ours, theirs = (
            fmristream.StreamingDataset(dataset.url, window=5, normalize=recipe)[2]["bold"]
            for dataset in (raw, lossless)
        )
        assert ours.tobytes() == theirs.tobytes()


def test_raw_frames_can_be_mapped_into_memory(converted):
    dataset = fmristream.open(converted["raw"])
    reader = dataset.reader(0)
    array = reader.frames_array
    size = 2 * reader.padded_voxels + 4
    for frame in (0, 7, 19):
        shard = Path(dataset.url) / array.object / f"c/{frame // array.frames_per_shard}/0"
        at = frame % array.frames_per_shard * size
        mapped = np.memmap(shard, dtype="<i2", mode="r", offset=at, shape=reader.run.voxels)
        assert np.array_equal(mapped, source_values(converted, 0)[frame])


@pytest.mark.parametrize("codec", LOSSY)
def test_the_stored_bound_holds_for_every_voxel_and_frame(converted, codec):
    dataset = fmristream.open(converted[codec])
    for run in range(3):
        reader = dataset.reader(run)
        if not reader.is_quantized:
            continue
        told, known = reader.attributes["quantization"], np.isfinite(source_values(converted, run))
        values = np.where(known, source_values(converted, run), 0).astype(np.float64)
        decoded = np.where(known, reader.read_stored(0, SHAPE[3]), 0).astype(np.float64)
        sd, constant = spread(values, known)
        error = np.abs(decoded - values)
        assert (error <= told["bound_sd"] * sd * (1 + 1e-9)).all()
        relative = error[:, ~constant] / sd[~constant]
        assert told["max_error_sd"] == pytest.approx(relative.max(), rel=1e-6)
        assert told["rms_error_sd"] == pytest.approx(np.sqrt((relative**2).mean()), rel=1e-6)
        assert not error[:, constant].any(), "what never changes is exact"


def spread(values: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(v,) SD over the known frames, and which voxels never change; by the definitions."""
    sd = np.array(
        [column[finite].std() if finite.any() else 0.0 for column, finite in zip(values.T, known.T, strict=True)]
    )
    constant = np.array([len(set(column[finite])) < 2 for column, finite in zip(values.T, known.T, strict=True)])
    return np.where(constant, 0.0, sd), constant


@pytest.mark.parametrize("codec", LOSSY)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_normalisation_is_of_the_decoded_values(converted, codec, recipe):
    """What is streamed is near what the source gives, and voxel-z exactly that of what is decoded."""
    clips = [
        fmristream.StreamingDataset(converted[name], window=20, normalize=recipe)[1]["bold"]
        for name in (codec, "lossless")
    ]
    inside = np.isfinite(clips[1])
    assert np.abs(clips[0] - clips[1])[inside].max() <= (0.06 if recipe == "voxel-zscore" else 40)
    if recipe != "voxel-zscore":
        return
    decoded = fmristream.open(converted[codec]).reader(1).read_stored(0, SHAPE[3]).astype(np.float64)
    known = np.isfinite(decoded)
    filled = np.where(known, decoded, 0)
    sd, constant = spread(filled, known)
    mean = filled.sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    z = np.where(known, (filled - mean) / np.where(constant, 1, sd), 0)
    ours = np.moveaxis(clips[0][0], -1, 0).reshape(SHAPE[3], -1)
    np.testing.assert_allclose(ours[:, ~constant], z[:, ~constant], atol=2e-3)
    assert not ours[:, constant].any()


@pytest.mark.parametrize("codec", ["raw", "int8", "int16"])
def test_zarr_python_and_tensorstore_read_what_is_documented(converted, codec):
    dataset = fmristream.open(converted[codec])
    for run in (1, 2):
        reader = dataset.reader(run)
        folder = Path(dataset.url) / dataset.run(run).object
        name = reader.frames_array.name
        spec = {
            "driver": "zarr3",
            "kvstore": {"driver": "file", "path": str(folder / name)},
            "fill_missing_data_reads": False,
        }
        group = zarr.open_group(str(folder), mode="r")
        values = group[name][:]
        assert values.tobytes() == tensorstore.open(spec, read=True).result().read().result().tobytes()
        expected = reader.read_stored(0, SHAPE[3])
        if codec != "raw":
            step, offset = group["quantization"][:].astype(np.float64)
            here = values != np.iinfo(values.dtype).min
            values = np.where(here, (values * step + offset).astype(expected.dtype), expected)
            assert here.mean() > 0.99
        assert values.tobytes() == expected.tobytes()


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_an_intact_chunk_of_another_frame_or_run_is_refused(copied, codec):
    """All chunks of raw have one length and a right checksum: the index knows which checksum belongs where."""
    url = copied(codec)
    dataset = fmristream.open(str(url))
    shard = url / dataset.reader(0).frames_array.object / "c/0/0"
    lengths = dataset.reader(0).lengths
    data = shard.read_bytes()
    frames = [data[lengths[:i].sum() : lengths[: i + 1].sum()] for i in range(2)]
    if len(frames[0]) == len(frames[1]):
        shard.write_bytes(frames[1] + frames[0] + data[len(frames[0]) * 2 :])
    else:  # shorter and longer: at least the first is at its place
        shard.write_bytes(frames[1] + data[len(frames[1]) :])
    with pytest.raises(CorruptDataError, match=r"frame 0 of sub-1_bold"):
        fmristream.open(str(url)).read(0, 0, 1)
    assert verify(str(url)).faults


@pytest.mark.parametrize("codec", ["raw", "int8"])
def test_no_flipped_bit_of_a_frame_is_read(copied, codec):
    url = copied(codec)
    reader = fmristream.open(str(url)).reader(1)
    shard = url / reader.frames_array.object / "c/0/0"
    data = shard.read_bytes()
    length = int(reader.lengths[0])
    tail = range(max(0, length - 40), length)  # what stands beside codes
    for byte in {*tail, *range(0, length, 97)}:
        damaged = bytearray(data)
        damaged[byte] ^= 1 << byte % 8
        shard.write_bytes(damaged)
        with pytest.raises(CorruptDataError):
            fmristream.open(str(url)).read(1, 0, 1)


@pytest.mark.parametrize("codec", LOSSY)
def test_verify_tells_a_value_that_is_off_by_more_than_the_bound(converted, tmp_path, codec):
    source = tmp_path / "in"
    shutil.copytree(converted["source"], source)
    changed = bold("f8", seed=2)
    sd = changed[2, 3, 4].std()
    changed[2, 3, 4, 11] += 0.06 * sd
    write_runs(source, {"sub-3_bold": changed}, scl_slope=0.5)
    faults = [fault for fault in verify(converted[codec], against=str(source)).faults if fault.run == "sub-3_bold"]
    assert any(
        f"1 stored values differ from the source by more than {0.025 if codec == 'int8' else 0.002}" in f.what
        for f in faults
    )


def test_a_claim_that_does_not_hold_is_a_fault(converted, monkeypatch):
    told = RunReader.attributes.fget
    monkeypatch.setattr(
        RunReader,
        "attributes",
        property(lambda self: {**told(self), "quantization": {**told(self)["quantization"], "max_error_sd": 0.03}}),
    )
    assert any("claims a bound" in fault.what for fault in verify(converted["int8"], deep=True).faults)


def test_info_tells_the_bound_and_what_was_measured(converted):
    info = describe(fmristream.open(converted["int8"]))
    records = [fmristream.open(converted["int8"]).reader(run).attributes["quantization"] for run in range(3)]
    assert (info.codec, info.lossy["bound_sd"]) == ("int8", 0.025)
    assert info.lossy["max_error_sd"] == max(record["max_error_sd"] for record in records)
    assert describe(fmristream.open(converted["raw"])).codec == "raw"
    assert describe(fmristream.open(converted["raw"])).lossy == {}


def test_the_digest_of_a_lossy_dataset_depends_on_the_codec_alone(converted, tmp_path):
    digests = {fmristream.open(converted[codec]).content_digest for codec in ("lossless", *LOSSY)}
    assert len(digests) == 3
    again = convert(converted["source"], str(tmp_path / "again"), codec="int8", threads=2, space="MNI")
    assert again.content_digest == fmristream.open(converted["int8"]).content_digest


def test_runs_of_another_codec_are_not_taken_over_from_an_interrupted_conversion(tmp_path, memory_url):
    source = six_runs(tmp_path / "in")
    interrupt(source, memory_url, after_runs=3, codec="int8")
    report = convert(source, memory_url, codec="raw")
    assert (report.resumed, report.runs) == (0, 6)
    assert set(encodings(memory_url)) == {"raw"}
    interrupt(source, f"{memory_url}-int8", after_runs=3, codec="int8")
    report = convert(source, f"{memory_url}-int8", codec="int8")
    assert report.resumed == 3
    assert describe(fmristream.open(f"{memory_url}-int8")).lossy["bound_sd"] == 0.025


@pytest.mark.parametrize(("first", "then"), [("lossless", "raw"), ("raw", "int8"), ("int8", "lossless")])
def test_another_codec_into_the_same_place_is_refused(converted, first, then):
    with pytest.raises(UsageError, match="another codec"):
        convert(converted["source"], converted[first], codec=then, space="MNI")
    assert convert(converted["source"], converted[first], codec=first, space="MNI").already_there


def test_runs_added_later_count_in_what_is_told_of_the_codec(tmp_path):
    source = write_runs(tmp_path / "in", {"sub-1_bold": bold()})
    convert(source, str(tmp_path / "out"), codec="int8")
    write_runs(tmp_path / "in", {"sub-2_bold": bold("f4", seed=3)})
    convert(source, str(tmp_path / "out"), codec="int8", update="new")
    assert describe(fmristream.open(str(tmp_path / "out"))).lossy["bound_sd"] == 0.025
    withdraw(str(tmp_path / "out"), ["1"])
    info = describe(fmristream.open(str(tmp_path / "out")))
    assert (info.codec, info.runs) == ("int8", 1)
    assert verify(str(tmp_path / "out"), deep=True).faults == ()


def test_a_run_whose_bound_cannot_hold_is_left_out_with_the_reason(tmp_path):
    huge = np.full((3, 3, 2, 4), 2**60, dtype="<i8") + np.arange(4)
    source = write_runs(tmp_path / "in", {"sub-1_bold": bold(), "sub-2_bold": huge})
    report = convert(source, str(tmp_path / "out"), codec="int8")
    assert [(q.name, "2^53" in q.reason) for q in report.quarantined] == [("sub-2_bold", True)]
    assert report.exit_code == 3


def test_a_source_that_changes_between_the_passes_is_left_out(tmp_path, monkeypatch):
    source = write_runs(tmp_path / "in", {"sub-1_bold": bold(), "sub-2_bold": bold(seed=2)})
    measured = tasks._quantizer

    def changed_after(task, order, voxels):
        quantizer, seen = measured(task, order, voxels)
        return quantizer, Fingerprint(size=seen.size, crc="gz:00000000:1") if task.name == "sub-2_bold" else seen

    monkeypatch.setattr(tasks, "_quantizer", changed_after)
    report = convert(source, str(tmp_path / "out"), codec="int8")
    assert [(q.name, "changed" in q.reason) for q in report.quarantined] == [("sub-2_bold", True)]


def test_codes_and_what_stands_beside_them_must_fit(copied):
    url = copied("int8")
    lying = recommit(url, run=lambda run: dataclasses.replace(run, dtype="<i2"))
    with pytest.raises(FormatError, match="codes of int8"):
        lying.read(0)
    assert verify(str(url)).faults


@pytest.mark.parametrize("codec", ["raw", "int8", "int16"])
def test_whole_volumes_and_unknown_codecs_are_refused(codec):
    with pytest.raises(UsageError, match="volume"):
        ConvertOptions(layout="volume", codec=codec)
    with pytest.raises(UsageError, match="lossless, raw"):
        ConvertOptions(codec="zip")
