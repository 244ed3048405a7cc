"""Digests: golden values, so that nobody changes one by accident, and what does and does not enter them."""

import hashlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import example, given
from hypothesis import strategies as st

from fmristream.shards import codec
from fmristream.shards.digest import (
    PREFIX,
    RunDigest,
    canonical_json,
    content_digest,
    matches,
    run_header,
    sha256,
    sha256_json,
)
from fmristream.shards.grayordinates import BrainModel, BrainModels
from fmristream.shards.hashing import NEW_BULK_DIGEST
from fmristream.shards.spaces import Space
from fmristream.signal.grid import Grid
from fmristream.storage import open_store
from tests.catalog.test_tables import A_RUN
from tests.shards.tiny_dataset import small_shards, tiny_runs, write_run

IDENTITY = tuple(float(n) for n in np.eye(4).ravel())

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(json_values)
@example({"b": 1, "a": [1.0, -0.0, 1e-7, 1e16, 123456789.125, None, True], "é": "\ud83d\ude00\n/"})
def test_canonical_json_reads_back_equal_and_is_its_own_canonical_form(value):
    data = canonical_json(value)
    assert data.isascii()
    assert json.loads(data) == json.loads(json.dumps(value))
    assert canonical_json(json.loads(data)) == data


def test_canonical_json_has_one_spelling():
    value = {
        "b": [1.0, -0.0, 1e-7, 1e-5, 0.0001, 1e16, 123456.75, 1e22],
        "a": 'é/"\n',
        "ab": None,
        "B": {"y": 1, "x": True},
    }
    assert canonical_json(value) == (
        b'{"B":{"x":true,"y":1},"a":"\\u00e9/\\"\\n","ab":null,"b":[1.0,-0.0,1e-07,1e-05,0.0001,1e+16,123456.75,1e+22]}'
    )


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_canonical_json_has_no_spelling_for_what_is_not_finite(number):
    with pytest.raises(ValueError, match="JSON"):
        canonical_json({"x": number})


def a_header(**changes):
    header = {
        "frames": 2,
        "shape": (1, 2, 2),
        "dtype": "<i2",
        "slope": 1.0,
        "inter": 0.0,
        "affine": IDENTITY,
        "tr_s": 0.72,
    }
    return run_header(**{**header, **changes})


def two_frames_digest(bulk_digest):
    digest = RunDigest(header=a_header(), space_digest="5ace", bulk_digest=bulk_digest)
    for frame in np.array([[1, -1], [2, 3]], dtype="<i2"):
        digest.add(frame.data)
    return digest.hexdigest()


def test_the_run_digest_is_a_sha256_of_plain_bytes_in_datasets_that_name_no_other():
    # ( printf '%s' '{"header":{"affine":[1.0,0.0,0.0,0.0,0.0,1.0,0.0,0.0,0.0,0.0,1.0,0.0,0.0,0.0,0.0,1.0],
    # "dtype":"<i2","frames":2,"inter":0.0,"shape":[1,2,2],"slope":1.0,"tr_s":0.72},"space":"5ace"}';
    # printf '\x01\x00\xff\xff\x02\x00\x03\x00' ) | sha256sum, the JSON in one line
    assert two_frames_digest("sha256") == "360b44700127002ada03c6cb0aaaf627e473bdf072d07eba8c16931944a1cf8c"


def test_the_run_digest_of_new_datasets_is_a_blake3_of_the_same_bytes():
    said = (
        '{"header":{"affine":[1.0,0.0,0.0,0.0,0.0,1.0,0.0,0.0,0.0,0.0,1.0,0.0,0.0,0.0,0.0,1.0],"dtype":"<i2","frames":2,'
        '"inter":0.0,"shape":[1,2,2],"slope":1.0,"tr_s":0.72},"space":"5ace"}'
    )
    expected = blake3(said.encode() + b"\x01\x00\xff\xff\x02\x00\x03\x00").hexdigest()
    assert (
        two_frames_digest(NEW_BULK_DIGEST)
        == expected
        == "fb47b9a08969afac154b13fed24cbd7c1d08a11424bb740aabf3f2b06cf9b16d"
    )


def test_a_run_without_a_repetition_time_has_a_null_in_its_header():
    assert canonical_json(a_header(tr_s=None)["tr_s"]) == b"null"
    assert a_header(slope=2, affine=np.eye(4, dtype="<f4").ravel()) == a_header(slope=2.0)


def identities(runs):
    return sorted(run.identity for run in runs)


def test_the_content_digest_never_changes():
    # printf '%s' '{"format":1,"parameters":{"codec":"lossless","layout":"voxels"},"runs":[["01","","","","","","MNI",
    # "1111111111111111111111111111111111111111111111111111111111111111","train","01"],["02","","rest","","2","","MNI",
    # "1111111111111111111111111111111111111111111111111111111111111111","val","02"]]}' | sha256sum, in one line
    runs = [replace(A_RUN, subject="02", group="02", task="rest", run="2", split="val"), replace(A_RUN, split="train")]
    digest = content_digest(identities(runs), parameters={"layout": "voxels", "codec": "lossless"})
    assert digest == "4346375cfcbdc138fc5a76a76489f60f198e3afd35839a7ece5904b270b8acc8"
    assert content_digest(identities(runs[::-1]), parameters={"codec": "lossless", "layout": "voxels"}) == digest


def test_the_space_digest_never_changes():
    # printf '%s' '{"affine":[1.0,0.0,0.0,0.0,0.0,1.0,0.0,0.0,0.0,0.0,1.0,0.0,0.0,0.0,0.0,1.0],"kind":"grid",
    # "mask_sha256":"'$(printf '\xa0\x80' | sha256sum | cut -c1-64)'","shape":[3,1,3]}' | sha256sum, in one line
    mask = np.zeros((3, 1, 3), dtype=bool)
    mask[0, 0, 0] = mask[0, 0, 2] = mask[2, 0, 2] = True  # bits 101 000 001: a0 80
    expected = "cfef2ffa8a174a3dc017f9af274b01bbc9ccfe2ee97fbc4d585f591044a92feb"
    for layout in (mask, np.asfortranarray(mask)):
        assert Space(grid=Grid(shape=(3, 1, 3), affine=IDENTITY), mask=layout).digest == expected


def test_the_digest_of_grayordinates_never_changes():
    # The sha256 of the indices is that of printf '\0\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff\3\0\0\0…\1\0\0\0\0\0\0\0\2\0\0\0'.
    indices = b"".join(n.to_bytes(4, "little", signed=True) for n in (0, -1, -1, 3, -1, -1, 1, 0, 2))
    said = (
        '{"affine":[0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0,0.0],"indices_sha256":"'
        + hashlib.sha256(indices).hexdigest()
        + '","kind":"brain-models","models":[{"count":2,"structure":"CIFTI_STRUCTURE_CORTEX_LEFT","type":"surface","vertices":4},'
        '{"count":1,"structure":"CIFTI_STRUCTURE_BRAIN_STEM","type":"voxels"}],"shape":[3,1,1],"volume":{"affine":[1.0,0.0,0.0,'
        '0.0,0.0,1.0,0.0,0.0,0.0,0.0,1.0,0.0,0.0,0.0,0.0,1.0],"shape":[2,1,3]}}'
    )
    expected = "068bcdce8b302a38a232edf398ddc0cc0f3e9bc1d06df7ce43fb5909f8d4e900"
    assert hashlib.sha256(said.encode()).hexdigest() == expected
    models = (
        BrainModel(structure="CIFTI_STRUCTURE_CORTEX_LEFT", count=2, surface_vertices=4),
        BrainModel(structure="CIFTI_STRUCTURE_BRAIN_STEM", count=1),
    )
    listed = np.frombuffer(indices, "<i4").reshape(3, 3)
    volume = Grid(shape=(2, 1, 3), affine=IDENTITY)
    for layout in (listed, np.asfortranarray(listed), listed.astype(">i4")):
        assert BrainModels(models=models, indices=layout, volume=volume).digest == expected


IRRELEVANT = {"name": "other", "object": "runs/other.zarr", "source_crc": "x", "source_bytes": 9, "foreground_mean": 9.0,
              "valid_min": -1.0, "outside": 3}  # fmt: skip
RELEVANT = {"subject": "9", "session": "9", "task": "9", "acq": "9", "run": "9", "echo": "9", "space": "9", "split": "test",
            "group": "9", "digest": "22" * 32}  # fmt: skip


@pytest.mark.parametrize("name", IRRELEVANT)
def test_the_content_digest_does_not_see_names_sources_and_statistics(name):
    changed = replace(A_RUN, **{name: IRRELEVANT[name]})
    assert content_digest([changed.identity], parameters={}) == content_digest([A_RUN.identity], parameters={})


@pytest.mark.parametrize("name", RELEVANT)
def test_the_content_digest_sees_labels_splits_and_values(name):
    changed = replace(A_RUN, **{name: RELEVANT[name]})
    assert content_digest([changed.identity], parameters={}) != content_digest([A_RUN.identity], parameters={})


def test_the_content_digest_sees_the_parameters_and_a_repeated_run():
    assert content_digest([A_RUN.identity], parameters={"codec": "int8"}) != content_digest(
        [A_RUN.identity], parameters={}
    )
    assert content_digest([A_RUN.identity, A_RUN.identity], parameters={}) != content_digest(
        [A_RUN.identity], parameters={}
    )


@pytest.mark.parametrize("run", tiny_runs(), ids=lambda run: run.name)
def test_the_run_digest_depends_on_no_setting_of_chunks_shards_or_codec(run, monkeypatch, memory_url):
    store = open_store(memory_url)
    plain = write_run(store, run)
    small_shards(monkeypatch.setattr)
    in_small_shards = write_run(store, run)
    monkeypatch.setattr(codec, "LEVEL", 9)
    monkeypatch.setattr(codec, "BLOCK_BYTES", 64)
    otherwise_encoded = write_run(store, run)
    assert plain.digest == in_small_shards.digest == otherwise_encoded.digest
    assert len({plain.object, in_small_shards.object, otherwise_encoded.object}) == 3
    assert len(in_small_shards.arrays[0].files) > len(plain.arrays[0].files)


@pytest.mark.parametrize("run", tiny_runs(), ids=lambda run: run.name)
def test_the_run_digest_is_that_of_header_space_and_logical_values(run, memory_url):
    header = run_header(frames=len(run.volumes), shape=run.mask.shape, dtype=run.volumes.dtype.str, slope=run.slope,
                        inter=run.inter, affine=run.space.grid.affine, tr_s=run.tr_s)  # fmt: skip
    expected = blake3(canonical_json({"header": header, "space": run.space.digest}) + run.values.tobytes()).hexdigest()
    assert write_run(open_store(memory_url), run).digest == expected


@pytest.mark.parametrize("change", [{"slope": 2.0}, {"inter": 1.0}, {"tr_s": 2.0}, {"volumes": None}, {"mask": None}])
def test_the_run_digest_sees_every_part_of_the_header_every_value_and_the_mask(change, memory_url):
    run = tiny_runs()[1]
    if "volumes" in change:
        change = {"volumes": run.volumes.copy()}
        change["volumes"][-1][run.mask] ^= 1
    if "mask" in change:
        change = {"mask": ~run.mask}
    store = open_store(memory_url)
    assert write_run(store, replace(run, **change)).digest != write_run(store, run).digest


def test_a_pin_matches_by_eight_digits_or_more():
    digest = sha256(b"x")
    for pin in (digest, digest[:8], PREFIX + digest, PREFIX + digest[:20], digest[:12].upper()):
        assert matches(pin, "0" * 64, digest)
    for pin in ("", PREFIX, digest[:7], digest + "0", "f" * 8, digest[1:20]):
        assert not matches(pin, "0" * 64, digest)


def test_the_digest_of_json_is_that_of_its_canonical_form():
    assert sha256_json({"b": 1, "a": 2}) == sha256(b'{"a":2,"b":1}')
