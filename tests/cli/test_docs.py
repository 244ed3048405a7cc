"""What the documents tell people to type is what the command line takes."""

import re
import shlex
from pathlib import Path

import pytest

from fmristream.cli.main import build_parser

ROOT = Path(__file__).parents[2]
_BLOCK = re.compile(r"^```[a-z]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def commands(path: Path) -> list[list[str]]:
    """Arguments of every `fmristream` that stands at the begin of a line of a block."""
    lines = [line for block in _BLOCK.findall(path.read_text()) for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("fmristream ")]


@pytest.mark.parametrize("path", sorted(ROOT.glob("docs/*.md")), ids=lambda path: path.stem)
def test_every_command_of_a_document_parses(path):
    for arguments in commands(path):
        words = [word for word in arguments if word not in ("...", "…")]
        assert build_parser(words).parse_args(words).command == words[0]


def test_there_are_commands_in_the_documents():
    assert len(commands(ROOT / "docs/convert.md")) >= 10


def _anchors(path):
    """What a link may name of a page: its headings, as they are turned into anchors."""
    words = [re.sub(r"[^\w\- ]", "", line.lower()) for line in re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)]
    return {one.replace(" ", "-") for one in words}


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))], ids=lambda path: path.stem)
def test_every_link_of_a_document_leads_somewhere(path):
    prose = _BLOCK.sub("", path.read_text())
    links = [link.partition("#") for link in re.findall(r"\]\(([^)\s]+)\)", prose) if not link.startswith("http")]
    for name, _, anchor in links:
        there = path.parent / name if name else path
        assert there.exists(), f"{path}: {name}"
        assert not anchor or anchor in _anchors(there), f"{path}: {name}#{anchor}"
