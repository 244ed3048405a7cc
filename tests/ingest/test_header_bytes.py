"""Headers as bytes: scrubbed ones say the same of the image and nothing of the person; made ones say what they were told."""

import struct
from itertools import product

import nibabel
import numpy as np
import pytest

from fmristream.errors import SourceError
from fmristream.ingest.header_bytes import INTENT_NAMES, header_of, is_big_endian, make_prefix, scrub, version_of
from fmristream.ingest.nifti_header import parse_header
from tests.ingest.nifti_files import DATATYPES, bold_like, comment_extension, nifti_bytes
from tests.ingest.odd_files import KINDS, odd_file

BOLD = bold_like((3, 4, 5, 6))
FORMATS = tuple(product((1, 2), "<>"))
AFFINE = (-2.0, 0.5, 0.0, 90.0, 0.0, 3.0, -0.5, -126.5, 0.125, 0.0, 4.0, -72.0, 0.0, 0.0, 0.0, 1.0)


def prefix_of(*, version: int = 1, order: str = "<", extension: bytes = b"", **lies) -> bytes:
    image = nifti_bytes(BOLD, version=version, order=order, extension=extension, **lies)
    return image[: len(image) - BOLD.nbytes]


def with_text(prefix: bytes, place: int, text: bytes) -> bytes:
    return prefix[:place] + text + prefix[place + len(text) :]


def extension(code: int, order: str, text: bytes) -> bytes:
    size = -(-(8 + len(text)) // 16) * 16
    return struct.pack(order + "2i", size, code) + text.ljust(size - 8, b"\0")


@pytest.mark.parametrize(("version", "order"), FORMATS)
def test_version_and_byte_order_are_those_of_the_bytes(version, order):
    prefix = prefix_of(version=version, order=order)
    assert (version_of(prefix), is_big_endian(prefix)) == (version, order == ">")


@pytest.mark.parametrize("number", range(0, len(KINDS), 3))
def test_a_scrubbed_header_says_the_same_of_the_image(number):
    file = odd_file(number)
    before = file.image[: file.data_offset]
    after = scrub(before).prefix
    one, other = (parse_header(header_of(prefix, "run"), "run") for prefix in (before, after))
    for name in ("dims", "dtype", "slope", "inter", "tr_s", "space", "notes"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.affine.tobytes() == other.affine.tobytes()
    assert other.data_offset == len(after)
    assert scrub(after).prefix == after
    assert scrub(after).removed == ()


TEXTS = {
    1: {"data_type": 4, "db_name": 14, "extents": 32, "session_error": 36, "glmax": 140, "glmin": 144, "descrip": 148,
        "aux_file": 228, "intent_name": 328},
    2: {"descrip": 240, "aux_file": 320, "intent_name": 508, "unused_str": 525},
}  # fmt: skip


@pytest.mark.parametrize(
    ("version", "field", "place"), [(version, *item) for version, places in TEXTS.items() for item in places.items()]
)
def test_text_in_any_free_field_is_removed_and_its_field_is_named(version, field, place):
    clean = scrub(prefix_of(version=version)).prefix
    scrubbed = scrub(with_text(clean, place, b"Jo"))
    assert scrubbed.removed == (field,)
    assert scrubbed.prefix == clean


def test_the_places_are_those_that_nibabel_has():
    for version, header in ((1, nibabel.Nifti1Header), (2, nibabel.Nifti2Header)):
        for name, place in TEXTS[version].items():
            assert header.template_dtype.fields[name][1] == place


@pytest.mark.parametrize("version", [1, 2])
def test_names_of_intents_stay_and_other_words_go(version):
    place = TEXTS[version]["intent_name"]
    for name in sorted(INTENT_NAMES - {""}):
        prefix = with_text(scrub(prefix_of(version=version)).prefix, place, name.encode())
        assert scrub(prefix).prefix == prefix
        hidden = with_text(prefix, place + 15, b"J")
        assert scrub(hidden).removed == (("intent_name",) if len(name) < 16 else ())
    assert scrub(with_text(prefix_of(version=version), place, b"Jo Doe")).prefix[place : place + 16] == bytes(16)


@pytest.mark.parametrize(("version", "order"), FORMATS)
def test_no_extension_is_kept_not_even_a_description_of_cifti_rows(version, order):
    cifti = extension(32, order, b"<CIFTI/>")
    many = (
        extension(4, order, b"AFNI history of Jo") + cifti + comment_extension(30, order) + extension(-7, order, b"x")
    )
    scrubbed = scrub(prefix_of(version=version, order=order, extension=many))
    size = {1: 348, 2: 540}[version]
    assert scrubbed.prefix[size:] == bytes(4)
    kinds = ("afni", "cifti", "comment", "of another kind")
    assert scrubbed.removed == ("descrip", *(f"extension {kind}" for kind in kinds))
    assert parse_header(header_of(scrubbed.prefix, "run"), "run").data_offset == size + 4


@pytest.mark.parametrize("size", [-16, 0, 8, 17, 10**6])
def test_what_is_no_extension_goes_as_padding(size):
    broken = struct.pack("<2i", size, 32) + b"Jo Doe, 1970"
    scrubbed = scrub(prefix_of(extension=broken.ljust(32, b"\0")))
    assert scrubbed.removed == ("descrip", "padding")
    assert len(scrubbed.prefix) == 352


def test_zeros_before_the_voxels_are_cut_off_without_a_word():
    scrubbed = scrub(prefix_of(extension=bytes(64)))
    assert scrubbed.removed == ("descrip",)
    assert len(scrubbed.prefix) == 352


def test_extender_bytes_that_mean_nothing_are_removed():
    prefix = prefix_of()
    scrubbed = scrub(with_text(prefix, 349, b"Jo"))
    assert scrubbed.removed == ("descrip", "extender")
    assert scrubbed.prefix[348:] == bytes(4)


@pytest.mark.parametrize("dtype", DATATYPES)
@pytest.mark.parametrize("slope", [0.5, 0.1])
def test_a_made_header_is_read_back_exactly_by_nibabel(dtype, slope):
    kind = np.dtype(dtype).newbyteorder("<")
    prefix = make_prefix(
        shape=(3, 4, 5),
        frames=6,
        dtype=kind,
        slope=slope,
        inter=-8.0,
        affine=AFFINE,
        tr_s=0.72,
        space="MNI152NLin6Asym",
    )
    stored = bold_like((3, 4, 5, 6), dtype)
    kinds = {348: nibabel.Nifti1Image, 540: nibabel.Nifti2Image}
    image = kinds[int.from_bytes(prefix[:4], "little")].from_bytes(prefix + stored.tobytes("F"))
    assert (int.from_bytes(prefix[:4], "little") == 348) is (slope == 0.5), "0.1 needs a double"
    assert image.dataobj.get_unscaled().tobytes("F") == stored.tobytes("F")
    assert (image.dataobj.slope, image.dataobj.inter) == (slope, -8.0)
    np.testing.assert_array_equal(image.affine, np.reshape(AFFINE, (4, 4)))
    assert int(image.header["sform_code"]) == 4
    assert image.header.get_xyzt_units() == ("mm", "sec")
    np.testing.assert_allclose(image.header.get_zooms(), [*nibabel.affines.voxel_sizes(image.affine), 0.72], rtol=1e-6)
    ours = parse_header(header_of(prefix, "run"), "run")
    assert (ours.dims, ours.dtype, ours.tr_s, ours.space) == ((3, 4, 5, 6), kind, 0.72, "MNI")


@pytest.mark.parametrize(
    ("space", "code"),
    [("MNI", 4), ("Talairach", 3), ("template", 5), ("native", 1), ("T1w", 2), ("unknown", 2), ("", 2)],
)
def test_the_affine_of_a_made_header_is_used_whatever_the_space(space, code):
    prefix = make_prefix(
        shape=(3, 4, 5), frames=1, dtype=np.dtype("<i2"), slope=1.0, inter=0.0, affine=AFFINE, tr_s=None, space=space
    )
    header = nibabel.Nifti1Header(prefix[:348])
    assert int(header["sform_code"]) == code
    np.testing.assert_array_equal(header.get_best_affine(), np.reshape(AFFINE, (4, 4)))
    assert parse_header(prefix[:348], "run").tr_s is None


def test_more_frames_than_16_bits_count_need_nifti_2():
    prefix = make_prefix(
        shape=(1, 1, 1),
        frames=40_000,
        dtype=np.dtype("<i2"),
        slope=1.0,
        inter=0.0,
        affine=AFFINE,
        tr_s=1.0,
        space="MNI",
    )
    assert parse_header(header_of(prefix, "run"), "run").dims == (1, 1, 1, 40_000)


@pytest.mark.parametrize("data", [b"", b"\x5c\1", b"not a header at all", nifti_bytes(BOLD)[:350]])
def test_bytes_that_begin_with_no_whole_header_are_refused(data):
    with pytest.raises(SourceError):
        header_of(data, "run")
