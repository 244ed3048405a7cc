"""One flipped bit, one cut or one lost object, anywhere: readers raise, or give exactly what was written."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3

from fmristream.catalog.tables import encode_participants
from fmristream.errors import CorruptDataError, FmriStreamError, FormatError, ObjectMissingError
from fmristream.shards.dataset import open_dataset
from tests.shards.tiny_dataset import PARTICIPANTS, SKIPPED, small_shards, tiny_runs, write_dataset

RUNS = tiny_runs()
VECTORS = ("reference", "moments", "exact_moments", "own_mask")

# What is meant for other readers only: ours has the same from the tables.
NOT_READ = ("zarr.json",)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """Two generations, several shards, two segments."""
    root = tmp_path_factory.mktemp("pristine") / "data"
    with pytest.MonkeyPatch.context() as patch:
        small_shards(patch.setattr)
        first = write_dataset(str(root), RUNS[:2])
        write_dataset(str(root), RUNS[:1], RUNS[1:], number=2, parent=first.digest)
    shutil.rmtree(root / "tmp", ignore_errors=True)
    return root


@pytest.fixture
def copy(pristine, tmp_path) -> Path:
    shutil.copytree(pristine, tmp_path / "data")
    return tmp_path / "data"


def objects_of(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


def vectors_of(dataset, name: str) -> dict[str, np.ndarray | None]:
    reader = dataset.reader(name)
    return {vector: getattr(reader, vector) for vector in VECTORS if vector != "reference" or reader.is_difference}


def outcomes(root: Path, expected: dict) -> list[str]:
    """What came of reading everything: 'right' or the name of our error, per question; anything else fails."""
    found = []

    def ask(question, answer) -> None:
        try:
            got = question()
        except (CorruptDataError, ObjectMissingError, FormatError) as error:
            found.append(type(error).__name__)
            return
        assert equal(got, answer), "wrong data was returned"
        found.append("right")

    try:
        dataset = open_dataset(str(root))
    except FmriStreamError as error:
        return [type(error).__name__]
    ask(lambda: list(dataset.participants), PARTICIPANTS)
    ask(lambda: list(dataset.skipped), SKIPPED)
    ask(lambda: dataset.content_digest, expected["content"])
    for run in RUNS:
        ask(lambda run=run: dataset.read(run.name), run.scaled)
        ask(lambda run=run: dataset.reader(run.name).read_stored(1, 5), run.values[1:5])
        ask(lambda run=run: vectors_of(dataset, run.name), expected[run.name])
    return found


def equal(one, other) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other, equal_nan=one.dtype.kind == "f")
    return one == other


@pytest.fixture(scope="module")
def expected(pristine) -> dict:
    dataset = open_dataset(str(pristine))
    return {"content": dataset.content_digest, **{run.name: vectors_of(dataset, run.name) for run in RUNS}}


def is_read(key: str) -> bool:
    """Whether the newest version's reader looks into the object at all."""
    return not key.endswith(NOT_READ)


def test_the_undamaged_dataset_is_right(pristine, expected):
    assert set(outcomes(pristine, expected)) == {"right"}
    kinds = {key.split("/")[0] for key in objects_of(pristine)}
    assert kinds == {"dataset.json", "generations", "tables", "index", "spaces", "runs", "stats"}


def test_one_flipped_bit_in_any_object_is_detected_or_harmless(copy, expected):
    rng = np.random.default_rng(0)
    detected = set()
    for key in objects_of(copy):
        path = copy / key
        data = path.read_bytes()
        # The first byte is always needed; a shard's own index, at its end, is for other readers.
        for bit in (5, *rng.choice(8 * len(data), size=4, replace=False)):
            damaged = bytearray(data)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            if set(outcomes(copy, expected)) != {"right"}:
                detected.add(key)
        path.write_bytes(data)
    assert set(outcomes(copy, expected)) == {"right"}
    assert detected == needed_objects(copy) - {"dataset.json"}, (
        "every object that samples come from was missed at least once"
    )


def test_one_lost_object_is_detected_or_harmless(copy, expected):
    detected = set()
    for key in objects_of(copy):
        path = copy / key
        data = path.read_bytes()
        path.unlink()
        if set(outcomes(copy, expected)) != {"right"}:
            detected.add(key)
        path.write_bytes(data)
    assert detected == needed_objects(copy) - {"dataset.json"}


@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_one_object_cut_short_is_detected_or_harmless(copy, expected, keep):
    for key in objects_of(copy):
        path = copy / key
        data = path.read_bytes()
        path.write_bytes(data[: int(keep * len(data))])
        outcomes(copy, expected)
        path.write_bytes(data)


def needed_objects(root: Path) -> set[str]:
    """Objects that the newest generation names and our reader reads."""
    dataset = open_dataset(str(root))
    document = dataset.generation.document
    entries = [document["participants"], document["skipped"]]
    entries += [segment[part] for segment in document["segments"] for part in ("runs", "arrays", "index")]
    named = {entry["key"] for entry in entries}
    named |= {one["name"] for space in document["spaces"].values() for one in space["objects"]}
    for run in dataset.runs:
        _, arrays = dataset.arrays_of(run)
        for array in arrays.values():
            named |= {f"{array.object}/{file.name}" if file.name else array.object for file in array.files}
    return {key for key in named if is_read(key)} | {"dataset.json", "generations/2.json"}


def test_every_stored_object_is_named_by_a_generation(pristine):
    named = needed_objects(pristine) | {key for key in objects_of(pristine) if not is_read(key)}
    first_only = {key for key in objects_of(pristine) if key not in named}
    dataset_objects = {run.object for run in open_dataset(str(pristine)).runs}
    assert all(not any(key.startswith(run) for run in dataset_objects) for key in first_only), (
        "left over from generation 1"
    )
    assert "generations/1.json" in first_only


def test_a_table_that_is_intact_but_not_the_committed_one_is_refused(copy):
    entry = open_dataset(str(copy)).generation.document["participants"]
    (copy / entry["key"]).write_bytes(encode_participants([{**PARTICIPANTS[0], "age": 99.0}, *PARTICIPANTS[1:]]))
    with pytest.raises(CorruptDataError, match="not the one that was committed"):
        _ = open_dataset(str(copy)).participants


def test_errors_name_the_object_and_what_to_do(copy):
    dataset = open_dataset(str(copy))
    shard = copy / dataset.run(0).object / "residual" / "c" / "0" / "0"
    shard.write_bytes(b"\0" + shard.read_bytes()[1:])
    with pytest.raises(CorruptDataError, match=r"residual/c/0/0, frame 0 of sub-01_bold.*restore the object"):
        dataset.read(0)
    shard.unlink()
    with pytest.raises(ObjectMissingError, match=r"residual/c/0/0.*restore"):
        dataset.read(0)


def test_chunks_that_changed_places_are_told_by_the_digest_of_their_shard(copy):
    """A checksum of each chunk cannot see it where both have one length: `verify` does."""
    dataset = open_dataset(str(copy))
    array = dataset.reader(1).frames_array
    shard = copy / array.object / array.files[0].name
    data = bytearray(shard.read_bytes())
    length = int(dataset.reader(1).lengths[0])
    assert length == dataset.reader(1).lengths[1], "noise does not compress: all chunks have one length"
    data[:length], data[length : 2 * length] = data[length : 2 * length], data[:length]
    shard.write_bytes(data)
    assert not blake3(data).hexdigest().startswith(array.files[0].digest)
