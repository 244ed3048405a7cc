"""Every command and every line of Python in the README runs, in its order, as a newcomer would run it."""

import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(sh two-nodes|sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def run(command: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, cwd=folder, env=environment(), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def require_success(process: subprocess.Popen[str]) -> None:
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, f"{shlex.join(map(str, process.args))}\n{output}"


def words_of(line: str) -> list[str]:
    words = shlex.split(line, comments=True)
    # The README is read in the checkout; the test runs elsewhere, so that nothing is left behind.
    return [str(ROOT / word) if word.startswith("tools/") else word for word in words]


def test_the_readme_has_the_blocks_that_are_tested() -> None:
    kinds = [kind for kind, _ in blocks()]
    assert kinds.count("sh") >= 4
    assert kinds.count("python") == 1
    assert kinds.count("sh two-nodes") == 1


def test_every_block_of_the_readme_runs(tmp_path: Path) -> None:
    for kind, text in blocks():
        if kind == "python":
            (tmp_path / "stream.py").write_text(text, encoding="utf-8")
            require_success(run([sys.executable, "stream.py"], tmp_path))
        elif kind == "sh":
            for line in text.splitlines():
                require_success(run(words_of(line), tmp_path))
        else:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            here = [
                ["127.0.0.1" if word == "node0" else port if word == "29500" else word for word in words_of(line)]
                for line in text.splitlines()
            ]
            nodes = [run(words, tmp_path) for words in here]
            for node in nodes:
                require_success(node)
    assert (tmp_path / "my-dataset" / "generations" / "1.json").is_file()
    assert list((tmp_path / "pictures").glob("*.png"))
    assert (tmp_path / "runs" / "two-nodes" / "report.json").is_file()


def test_every_file_that_the_readme_links_to_exists() -> None:
    links = re.findall(r"\]\(([^)#:]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert links
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


@pytest.mark.parametrize("name", ["README.md", "CHANGELOG.md", "docs", "fmristream", "train", "tools"])
def test_the_project_speaks_of_itself_alone(name: str) -> None:
    # Package registries are named by whoever installs, never by us.
    hosts = re.compile(r"pypi\.org|download\.pytorch|files\.pythonhosted|registry\.npmjs", re.IGNORECASE)
    paths = [ROOT / name] if (ROOT / name).is_file() else sorted((ROOT / name).rglob("*"))
    texts = {path: path.read_text(encoding="utf-8") for path in paths if path.suffix in {".md", ".py", ".toml"}}
    assert texts
    assert not [str(path) for path, text in texts.items() if hosts.search(text)]
