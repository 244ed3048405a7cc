"""What is imported when: the library stays light, heavy packages come in by their doors, every public name is there."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import fmristream

ROOT = Path(fmristream.__file__).parent
# Not scipy: numba looks at it where it is installed.
HEAVY = (
    "blake3",
    "torch",
    "zarr",
    "dask",
    "distributed",
    "nibabel",
    "nilearn",
    "matplotlib",
    "s3fs",
    "tensorstore",
    "sklearn",
    "pandas",
)

# Modules whose work is to talk to a heavy package, or that are reached through such a module only.
LIGHT_MODULES = (
    "fmristream.catalog.run",
    "fmristream.catalog.split",
    "fmristream.catalog.tables",
    "fmristream.errors",
    "fmristream.shards",
    "fmristream.shards.codec",
    "fmristream.shards.dataset",
    "fmristream.shards.digest",
    "fmristream.shards.frames",
    "fmristream.shards.generation",
    "fmristream.shards.index",
    "fmristream.shards.run_reader",
    "fmristream.shards.run_writer",
    "fmristream.shards.spaces",
    "fmristream.shards.volume",
    "fmristream.signal.grid",
    "fmristream.signal.measure",
    "fmristream.storage",
    "fmristream.storage.sources",
)


def loaded_by(statement: str) -> set[str]:
    """Top-level packages that a fresh interpreter holds after a statement."""
    probe = f"{statement}\nimport sys\nprint(*{{name.partition('.')[0] for name in sys.modules}}, sep='\\n')"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    return set(done.stdout.split())


def test_the_probe_can_fail():
    assert "numpy" in loaded_by("import numpy")
    assert "zarr" in loaded_by("import fmristream.shards.zarr_metadata")


def test_importing_fmristream_loads_no_numpy_and_nothing_heavy():
    loaded = loaded_by("import fmristream; fmristream.__version__; dir(fmristream)")
    assert "fmristream" in loaded
    assert not loaded & {"numpy", "fsspec", "pyarrow", "numba", "numcodecs", *HEAVY}


def test_storage_loads_no_numpy_and_no_client():
    loaded = loaded_by(
        "import fmristream.storage, fmristream.storage.sources; fmristream.storage.open_store('x').list('a')"
    )
    assert not loaded & {"numpy", "fsspec", "pyarrow", *HEAVY}


def test_the_format_loads_nothing_heavy():
    loaded = loaded_by("import " + ", ".join(LIGHT_MODULES))
    assert not loaded & set(HEAVY)


def test_opening_a_dataset_loads_no_compiler():
    assert "numba" not in loaded_by("import fmristream; fmristream.open")


@pytest.mark.parametrize("name", fmristream.__all__)
def test_every_public_name_resolves(name):
    value = getattr(fmristream, name)
    assert value is getattr(fmristream, name)
    assert name in dir(fmristream)


def test_public_names_are_sorted_and_others_are_refused():
    assert sorted(fmristream.__all__, key=str.lower) == sorted(dir(fmristream), key=str.lower)
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        _ = fmristream.convrt


def public_modules() -> list[str]:
    """Every module of the library that spells out its public names."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        names = {target.id for node in ast.parse(path.read_text()).body if isinstance(node, ast.Assign)
                 for target in node.targets if isinstance(target, ast.Name)}  # fmt: skip
        if "__all__" in names:
            parts = path.relative_to(ROOT.parent).with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


@pytest.mark.parametrize("module", public_modules())
def test_every_name_in_all_resolves(module):
    loaded = import_module(module)
    for name in loaded.__all__:
        assert getattr(loaded, name) is not None
    assert len(set(loaded.__all__)) == len(loaded.__all__)


def test_every_module_says_first_what_it_is_for():
    silent = [path for path in ROOT.rglob("*.py") if ast.get_docstring(ast.parse(path.read_text())) is None]
    assert silent == []


def test_every_error_is_in_the_tree_of_the_docstring_and_one_of_ours():
    from fmristream import errors

    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    for one in classes:
        assert issubclass(one, errors.FmriStreamError)
        assert one.__name__ in (errors.__doc__ or "")
    assert issubclass(errors.ObjectMissingError, FileNotFoundError)
    assert issubclass(errors.ObjectExistsError, FileExistsError)
    assert issubclass(errors.UsageError, ValueError)
