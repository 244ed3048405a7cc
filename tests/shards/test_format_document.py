"""FORMAT.md says what the code does: columns, constants and golden values are the same in both."""

import io
import json
import re
from importlib.resources import files
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fmristream.catalog.split import hash_fraction
from fmristream.catalog.tables import encode_arrays, encode_runs
from fmristream.shards import FORMAT_VERSION, codec, frames
from fmristream.shards.digest import canonical_json
from fmristream.shards.generation import FEATURES
from fmristream.shards.side import FOLDERS
from fmristream.storage import open_store
from tests.catalog.test_tables import A_RUN
from tests.shards.tiny_dataset import write_dataset

DOCUMENT = files("fmristream").joinpath("FORMAT.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return re.split(r"^## ", DOCUMENT.partition(f"\n## {title}")[2], flags=re.MULTILINE)[0]


def columns_of(data: bytes) -> pa.Schema:
    return pq.read_schema(io.BytesIO(data))


TYPES = {"string": "string", "double": "double", "int32": "int32", "int64": "int64", "bool": "bool"}


@pytest.mark.parametrize(
    ("title", "schema"),
    [
        ("**runs**", columns_of(encode_runs([A_RUN]))),
        ("**arrays**", columns_of(encode_arrays([], bulk_digest="blake3"))),
        ("**arrays**", columns_of(encode_arrays([], bulk_digest="sha256"))),
    ],
)
def test_every_column_is_documented_with_its_type(title, schema):
    text = section("3 Tables").partition(title)[2].partition("\n**")[0]
    rows = [line.split("|") for line in text.replace(r"\|", "¦").splitlines() if line.startswith("| `")]
    documented = {name: row[2].strip() for row in rows for name in re.findall(r"`([a-z0-9_]+)`", row[1])}
    assert set(documented) == set(schema.names)
    for field in schema:
        if str(field.type) in TYPES:
            assert str(field.type) in documented[field.name], field.name
        elif pa.types.is_fixed_size_binary(field.type):
            assert documented[field.name] == "32 bytes"
        else:
            assert documented[field.name].startswith("list of")
        if field.name == "files":
            told = next(row[3] for row in rows if "`files`" in row[1])
            assert all(f"`{member.name}`" in told for member in field.type.value_type)


def test_every_member_of_a_generation_is_documented(memory_url):
    write_dataset(memory_url)
    document = json.loads(open_store(memory_url).read("generations/1.json"))
    text = section("2 Generations")
    for name in document:
        assert f"`{name}`" in text
    (segment, *_) = document["segments"]
    for name in {*segment, *segment["runs"], *segment["index"], *next(iter(document["spaces"].values()))}:
        assert name in text


def test_every_top_folder_is_documented(memory_url):
    write_dataset(memory_url)
    store = open_store(memory_url)
    tops = {folder for folder in ("generations", "tables", "index", "spaces", "runs", "stats") if store.list(folder)}
    assert len(tops) == 6
    for name in (*tops, *FOLDERS.values(), "dataset.json", "pending", "tmp"):
        assert re.search(rf"^{re.escape(name)}", section("1 The root"), flags=re.MULTILINE) or f"{name}/" in section(
            "1 The root"
        )


def test_constants_are_those_of_the_code():
    text = section("5 Chunks")
    assert f"level {codec.LEVEL}, blocks of {codec.BLOCK_BYTES // 1024} KiB" in text
    assert f"{frames.SHARD_BYTES // 2**20} MiB" in text
    assert f"version {FORMAT_VERSION}" in DOCUMENT
    for name in FEATURES:
        assert f'"{name}"' in section("2 Generations"), "a feature must be named in the document"


def test_the_test_vectors_are_those_of_the_code():
    text = section("14 Test vectors")
    assert f"0x{int(hash_fraction('01') * 2**48):012x}" in text
    value = {"a": 'é/"\n', "b": [1.0, -0.0, 1e-7, 1e-5, 0.0001, 1e16], "ab": None}
    assert canonical_json(value).decode() in text
    assert codec.checksum(b"123456789").hex(" ") in text
    golden = Path(__file__).with_name("test_digest.py").read_text()
    for digest in re.findall(r"`([0-9a-f]{64})`", text):
        assert digest in golden


def test_links_within_the_document_lead_somewhere():
    headings = {
        re.sub(r"[^a-z0-9 -]", "", line[3:].lower()).replace(" ", "-")
        for line in DOCUMENT.splitlines()
        if line.startswith("## ")
    }
    targets = re.findall(r"\]\(#([^)]+)\)", DOCUMENT)
    assert targets
    assert set(targets) <= headings
