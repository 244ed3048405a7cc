"""Members of zip and tar archives: read as they are, on every back end, and not at all where something is wrong."""

import gzip
import random
import tarfile
import time
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from fmristream.errors import FmriStreamError, ObjectMissingError, SourceError, UsageError
from fmristream.storage import open_store
from fmristream.storage.sources import (
    is_folder,
    known_checksum,
    list_refused,
    list_source,
    open_source,
    read_source_range,
    source_size,
)
from tests.storage.archives import ZipEntry, hand_made_zip, tar_bytes, tar_of, zip_bytes

RANDOM = np.random.default_rng(3).bytes(300_000)
FILES = {
    "fMRI/rfMRI.nii.gz": gzip.compress(RANDOM, mtime=0),
    "fMRI/zeros.nii": bytes(3_000_000),
    "fMRI/a.json": b'{"RepetitionTime": 0.735}',
    "empty.txt": b"",
    "a long name " * 12 + "é/x.nii": b"abc",
}
ARCHIVES = {
    "deflated.zip": lambda: zip_bytes(FILES),
    "stored.zip": lambda: zip_bytes(FILES, method=zipfile.ZIP_STORED),
    "piped.zip": lambda: zip_bytes(FILES, streamed=True),
    "pax.tar": lambda: tar_bytes(FILES),
    "gnu.tar": lambda: tar_bytes(FILES, format=tarfile.GNU_FORMAT),
    "packed.tar.gz": lambda: tar_bytes(FILES, compressed=True),
    "packed.tgz": lambda: gzip.compress(tar_bytes(FILES)[:70_000]) + gzip.compress(tar_bytes(FILES)[70_000:]),
}


def whole(url: str, step: int = 100_003) -> bytes:
    pieces = []
    with open_source(url) as file:
        while piece := file.read(step):
            assert len(piece) <= step
            pieces.append(piece)
    return b"".join(pieces)


def put(root: Path, name: str, data: bytes) -> str:
    (root / name).write_bytes(data)
    return str(root / name)


@pytest.mark.parametrize("name", ARCHIVES)
def test_members_are_listed_measured_and_read_on_every_back_end(dataset_url: str, name: str) -> None:
    open_store(dataset_url).put_new(name, ARCHIVES[name]())
    archive = f"{dataset_url}/{name}!"
    assert list_source(archive) == sorted(FILES)
    assert list_source(f"{archive}/fMRI") == ["a.json", "rfMRI.nii.gz", "zeros.nii"]
    assert list_refused(archive) == []
    assert is_folder(archive)
    assert is_folder(f"{archive}/fMRI")
    assert not is_folder(f"{archive}/nowhere")
    for member, data in FILES.items():
        url = f"{archive}/{member}"
        assert source_size(url) == len(data)
        assert whole(url) == data
        assert read_source_range(url, 0, len(data) + 9) == data
        assert read_source_range(url, 1, 7) == data[1:7]
        assert read_source_range(url, max(0, len(data) - 8), len(data)) == data[-8:]


@pytest.mark.parametrize("name", ["deflated.zip", "packed.tar.gz"])
def test_a_checksum_known_beforehand_changes_with_the_content(tmp_path: Path, name: str) -> None:
    before = known_checksum(put(tmp_path, name, ARCHIVES[name]()) + "!/fMRI/a.json")
    pack = zip_bytes if name.endswith(".zip") else lambda files: tar_bytes(files, compressed=True)
    after = known_checksum(
        put(tmp_path, name, pack(FILES | {"fMRI/a.json": b'{"RepetitionTime": 0.736}'})) + "!/fMRI/a.json"
    )
    assert before
    assert before != after
    assert known_checksum(put(tmp_path, "plain.tar", ARCHIVES["pax.tar"]()) + "!/fMRI/a.json") == ""


def test_a_member_that_is_not_there_is_named_and_the_archive_too(tmp_path: Path) -> None:
    archive = put(tmp_path, "a.zip", zip_bytes(FILES))
    with pytest.raises(ObjectMissingError, match=r"a\.zip!/other"):
        open_source(f"{archive}!/other")
    with pytest.raises(ObjectMissingError, match="no such file"):
        open_source(f"{tmp_path}/b.zip!/other")
    with pytest.raises(UsageError, match="archives within archives"):
        open_source(f"{archive}!/inner.zip!/other")


def test_a_large_archive_with_64_bit_sizes_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The standard library writes the 64-bit records above these limits.
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1000)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 3)
    archive = put(tmp_path, "a.zip", zip_bytes(FILES))
    assert b"PK\6\6" in Path(archive).read_bytes()
    assert {name: whole(f"{archive}!/{name}") for name in list_source(f"{archive}!")} == FILES


def test_what_comes_before_other_members_and_a_comment_do_no_harm(tmp_path: Path) -> None:
    entries = [ZipEntry(b"a.nii", b"abc" * 1000, method=8), ZipEntry(b"b.nii", b"xyz")]
    archive = put(tmp_path, "a.zip", hand_made_zip(entries, comment=b"a comment with PK\5\6 in it"))
    assert whole(f"{archive}!/a.nii") == b"abc" * 1000
    assert whole(f"{archive}!/b.nii") == b"xyz"


REFUSED_MEMBERS = {
    "encrypted": ZipEntry(b"x.nii", b"abc", flags=1),
    "LZMA": ZipEntry(b"x.nii", b"abc", method=14),
    "method 77": ZipEntry(b"x.nii", b"abc", method=77),
    "a link": ZipEntry(b"x.nii", b"/etc/passwd", mode=0xA1FF),
    "a device": ZipEntry(b"x.nii", b"", mode=0x21FF),
    "absolute path": ZipEntry(b"/etc/x.nii", b"abc"),
    "leads out": ZipEntry(b"a/../../x.nii", b"abc"),
    "is an absolute": ZipEntry(b"..\\x.nii", b"abc"),
    "absolute": ZipEntry(b"C:/x.nii", b"abc"),
    "no text": ZipEntry(b"a\n.nii", b"abc"),
    "no text ": ZipEntry(b"a\xff.nii", b"abc", flags=0x800),
    "composed form": ZipEntry("e\u0301.nii".encode(), b"abc", flags=0x800),
    "entry lies": ZipEntry(b"x.nii", b"abc", size=4),
    "entry lies: 40000000": ZipEntry(b"x.nii", bytes(100), method=8, size=40_000_000),
}


@pytest.mark.parametrize("reason", REFUSED_MEMBERS)
def test_a_member_that_an_honest_archive_would_not_hold_is_refused_and_the_others_are_read(
    tmp_path: Path, reason: str
) -> None:
    odd = REFUSED_MEMBERS[reason]
    archive = put(tmp_path, "a.zip", hand_made_zip([ZipEntry(b"good.nii", b"good"), odd]))
    assert list_source(f"{archive}!") == ["good.nii"]
    assert whole(f"{archive}!/good.nii") == b"good"
    ((name, said),) = list_refused(f"{archive}!")
    assert reason.strip() in said
    with pytest.raises(SourceError, match=reason.strip()):
        open_source(f"{archive}!/{name}")


def test_a_name_that_stands_twice_is_refused_both_times(tmp_path: Path) -> None:
    archive = put(tmp_path, "a.zip", hand_made_zip([ZipEntry(b"x.nii", b"one"), ZipEntry(b"x.nii", b"two")]))
    assert list_source(f"{archive}!") == []
    assert {reason for _, reason in list_refused(f"{archive}!")} == {"its name stands twice in the archive"}


LYING_ARCHIVES = {
    "count too high": lambda e: hand_made_zip(e, count=3),
    "count too low": lambda e: hand_made_zip(e, count=1),
    "directory elsewhere": lambda e: hand_made_zip(e, start=4),
    "directory longer": lambda e: hand_made_zip(e, bytes=10_000),
    "several parts": lambda e: hand_made_zip(e, disk=1),
    "a million members": lambda e: hand_made_zip(e, count=60_000),
    "bytes behind": lambda e: hand_made_zip(e) + b"x",
    "no archive": lambda e: b"not a zip archive at all",
    "nothing": lambda e: b"",
    "64-bit record missing": lambda e: hand_made_zip(e, start=2**32 - 1),
    "overlapping": lambda e: hand_made_zip([e[0], ZipEntry(b"b.nii", b"y" * 50, offset=0)]),
    "offset behind the end": lambda e: hand_made_zip([e[0], ZipEntry(b"b.nii", b"y", offset=2**31)]),
}


@pytest.mark.parametrize("lie", LYING_ARCHIVES)
def test_an_archive_that_contradicts_itself_is_refused_at_once_and_in_little_memory(tmp_path: Path, lie: str) -> None:
    entries = [ZipEntry(b"a.nii", b"abc"), ZipEntry(b"b.nii", b"xyz")]
    archive = put(tmp_path, "a.zip", LYING_ARCHIVES[lie](entries))
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match=r"a\.zip: "):
            list_source(f"{archive}!")
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "claims",
    [{"crc": 1}, {"method": 0, "stored": 2000, "size": 2000}, {"stored": 2001}, {"size": 1999}, {"size": 2001}],
    ids=str,
)
def test_a_directory_entry_that_does_not_fit_the_data_is_found_out(tmp_path: Path, claims: dict[str, int]) -> None:
    data = bytes(range(200)) * 10
    lying = ZipEntry(b"a.nii", data, method=8)
    lying.claimed |= claims
    entries = [lying, ZipEntry(b"b.nii", b"pad" * 1000)]
    archive = put(tmp_path, "a.zip", hand_made_zip(entries))
    with pytest.raises(SourceError):
        whole(f"{archive}!/a.nii")


@pytest.mark.parametrize("change", [-1, 1], ids=["fewer", "more"])
def test_packed_data_of_another_length_than_declared_everywhere_are_found_out(tmp_path: Path, change: int) -> None:
    for method in (0, 8):
        entry = ZipEntry(b"a.nii", b"abc" * 1000, method=method)
        for claims in (entry.local, entry.claimed):
            claims["size"] += change
            claims["stored"] += change if method == 0 else 0
        archive = put(tmp_path, f"{method}.zip", hand_made_zip([entry, ZipEntry(b"b.nii", b"pad")]))
        with pytest.raises(SourceError):
            whole(f"{archive}!/a.nii")


@pytest.mark.parametrize("name", ["deflated.zip", "stored.zip", "piped.zip", "packed.tar.gz"])
def test_no_flipped_bit_of_a_packed_member_is_read_as_data(tmp_path: Path, name: str) -> None:
    files = {"a.nii": RANDOM[:5000] + bytes(5000), "b.nii": b"b" * 3000}
    packed = {
        "deflated.zip": lambda: zip_bytes(files),
        "stored.zip": lambda: zip_bytes(files, method=zipfile.ZIP_STORED),
        "piped.zip": lambda: zip_bytes(files, streamed=True),
        "packed.tar.gz": lambda: tar_bytes(files, compressed=True),
    }[name]()
    chance = random.Random(5)
    refused = 0
    for trial in range(60):
        place = chance.randrange(len(packed))
        damaged = bytearray(packed)
        damaged[place] ^= 1 << chance.randrange(8)
        archive = put(tmp_path, f"{trial}-{name}", bytes(damaged))
        try:
            found = {member: whole(f"{archive}!/{member}") for member in list_source(f"{archive}!")}
        except FmriStreamError:
            refused += 1
        else:  # a date, a permission, or a name: never other bytes
            assert set(found.values()) <= set(files.values())
    assert refused > 40


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_cut_short_loses_nothing_silently(tmp_path: Path, name: str) -> None:
    packed = ARCHIVES[name]()
    for length in [0, 1, 511, 513, len(packed) // 3, len(packed) // 2, len(packed) - 11_000, len(packed) - 1]:
        archive = put(tmp_path, f"{length}-{name}", packed[: max(0, length)])
        try:
            found = list_source(f"{archive}!")
        except SourceError:
            continue
        assert name.endswith(".tar")  # the padding of the last record may be cut
        assert found == sorted(FILES)


def entry(name: str, kind: bytes = tarfile.REGTYPE, **more: str) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type = kind
    info.size = 3 if kind in (tarfile.REGTYPE, tarfile.CONTTYPE) else 0
    for key, value in more.items():
        setattr(info, key, value)
    return info, b"abc" if info.size else b""


@pytest.mark.parametrize(
    ("odd", "reason"),
    [
        (entry("link.nii", tarfile.SYMTYPE, linkname="/etc/passwd"), "a link"),
        (entry("hard.nii", tarfile.LNKTYPE, linkname="good.nii"), "a link"),
        (entry("device.nii", tarfile.CHRTYPE), "special file"),
        (entry("fifo.nii", tarfile.FIFOTYPE), "special file"),
        (entry("../x.nii"), "leads out"),
        (entry("/x.nii"), "absolute"),
        (entry("e\u0301.nii"), "NFC"),
    ],
)
def test_a_tar_member_that_is_no_honest_file_is_refused_and_the_others_are_read(
    tmp_path: Path, odd, reason: str
) -> None:
    archive = put(tmp_path, "a.tar", tar_of(entry("./good.nii"), odd, entry("last.nii")))
    assert list_source(f"{archive}!") == ["good.nii", "last.nii"]
    assert whole(f"{archive}!/last.nii") == b"abc"
    ((name, said),) = list_refused(f"{archive}!")
    assert reason in said
    with pytest.raises(SourceError, match=reason):
        open_source(f"{archive}!/{name}")


def test_a_second_tar_glued_on_a_first_is_refused_because_its_members_would_be_lost(tmp_path: Path) -> None:
    for name, data in {"a.tar": tar_bytes(FILES) * 2, "a.tgz": tar_bytes(FILES, compressed=True) * 2}.items():
        with pytest.raises(SourceError, match="follow the tar archive's end"):
            list_source(put(tmp_path, name, data) + "!")


def test_a_header_that_claims_more_than_there_is_costs_neither_time_nor_memory(tmp_path: Path) -> None:
    huge, _ = entry("huge.nii")
    huge.size = 2**50
    lying = huge.tobuf(tarfile.GNU_FORMAT) + bytes(1024)
    name, _ = entry("././@LongLink", b"L")
    name.size = 2**40
    began = time.monotonic()
    for archive in (put(tmp_path, "a.tar", lying), put(tmp_path, "a.tgz", gzip.compress(lying))):
        with pytest.raises(SourceError, match="cut short"):
            list_source(f"{archive}!")
    with pytest.raises(SourceError, match="extended tar header of"):
        list_source(put(tmp_path, "b.tar", name.tobuf(tarfile.GNU_FORMAT) + bytes(2048)) + "!")
    assert time.monotonic() - began < 5


def test_an_archive_that_is_replaced_is_read_again(tmp_path: Path) -> None:
    archive = put(tmp_path, "a.zip", zip_bytes({"a.nii": b"one"}))
    assert whole(f"{archive}!/a.nii") == b"one"
    put(tmp_path, "a.zip", zip_bytes({"a.nii": b"other"}))
    assert whole(f"{archive}!/a.nii") == b"other"


@pytest.mark.parametrize("name", ["deflated.zip", "stored.zip", "packed.tar.gz", "pax.tar"])
def test_a_large_member_is_read_in_little_memory(tmp_path: Path, name: str) -> None:
    files = {"before.nii": bytes(10_000_000), "large.nii": RANDOM * 80 + bytes(20_000_000)}
    method = zipfile.ZIP_STORED if name == "stored.zip" else zipfile.ZIP_DEFLATED
    packed = (
        zip_bytes(files, method=method) if name.endswith(".zip") else tar_bytes(files, compressed=name.endswith(".gz"))
    )
    archive = put(tmp_path, name, packed)
    del packed
    tracemalloc.start()
    try:
        with open_source(f"{archive}!/large.nii") as file:
            count = 0
            while piece := file.read(2**20):
                count += len(piece)
        assert count == 44_000_000
        assert tracemalloc.get_traced_memory()[1] < 6 * 2**20
    finally:
        tracemalloc.stop()
