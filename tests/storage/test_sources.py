"""Sources: whole files from front to back, on disks and in buckets."""

import os

import numpy as np
import pytest

from fmristream.errors import ObjectMissingError, StorageError
from fmristream.storage import open_store
from fmristream.storage.sources import is_folder, list_source, open_source, read_source_range, source_size

DATA = np.random.default_rng(0).bytes(9 * 2**20 + 5)


@pytest.fixture
def folder(dataset_url: str) -> str:
    """A folder with sub-01/func/a.nii, sub-01/b.json and c.txt, once per back end."""
    store = open_store(dataset_url)
    store.put_new("sub-01/func/a.nii", DATA)
    store.put_new("sub-01/b.json", b"{}")
    store.put_new("c.txt", b"")
    if "://" not in dataset_url:
        os.rmdir(os.path.join(dataset_url, "tmp"))
    return dataset_url


def test_a_file_is_read_from_front_to_back(folder):
    pieces = []
    file = open_source(f"{folder}/sub-01/func/a.nii")
    while piece := file.read(3 * 2**20):
        pieces.append(bytes(piece))
    file.close()
    assert b"".join(pieces) == DATA


def test_the_size_of_a_file_is_known(folder):
    assert source_size(f"{folder}/sub-01/func/a.nii") == len(DATA)
    assert source_size(f"{folder}/c.txt") == 0


@pytest.mark.parametrize(
    ("start", "stop"), [(0, 10), (len(DATA) - 8, len(DATA)), (5, 6), (0, len(DATA)), (len(DATA) - 3, len(DATA) + 50)]
)
def test_a_range_of_a_file_is_read_and_ends_where_the_file_ends(folder, start, stop):
    assert read_source_range(f"{folder}/sub-01/func/a.nii", start, stop) == DATA[start:stop]


def test_every_file_below_a_folder_is_listed_in_order(folder):
    assert list_source(folder) == ["c.txt", "sub-01/b.json", "sub-01/func/a.nii"]
    assert list_source(folder + "/") == list_source(folder)
    assert list_source(f"{folder}/sub-01") == ["b.json", "func/a.nii"]


def test_folders_and_files_are_told_apart(folder):
    assert is_folder(folder)
    assert is_folder(f"{folder}/sub-01")
    assert not is_folder(f"{folder}/c.txt")
    assert not is_folder(f"{folder}/nowhere")


def test_what_is_not_there_is_named(folder):
    url = f"{folder}/nowhere.nii"
    for use in (open_source, source_size, lambda u: read_source_range(u, 0, 1)):
        with pytest.raises(ObjectMissingError, match=r"nowhere\.nii"):
            use(url)


def test_a_folder_cannot_be_read_as_a_file(tmp_path):
    with pytest.raises(StorageError):
        open_source(str(tmp_path))


def test_links_to_folders_are_followed_once(tmp_path):
    (tmp_path / "data" / "sub-01").mkdir(parents=True)
    (tmp_path / "data" / "sub-01" / "a.nii").write_bytes(b"1")
    (tmp_path / "data" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.nii").write_bytes(b"1")
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    assert list_source(str(tmp_path / "data")) == ["linked/b.nii", "sub-01/a.nii"]
