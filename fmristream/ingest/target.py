"""Look before the work begins: is the mask there, can the target be written, does it hold something else?"""

import os
import secrets

from fmristream.errors import ObjectExistsError, StorageError, UsageError
from fmristream.ingest.options import ConvertOptions, MaskChoice
from fmristream.shards.side import SIDE_FOLDERS
from fmristream.storage import Store
from fmristream.storage.sources import source_size
from fmristream.storage.urls import display_url, local_path, scheme_of

# What an interrupted conversion may have left.
_OURS = frozenset(
    {"generations", "index", "pending", "runs", "receipts", "spaces", "stats", "tables", "tmp", "dataset.json"}
    | set(SIDE_FOLDERS)
)


def require_readable_mask(options: ConvertOptions) -> None:
    """Raise UsageError if the given mask is not there."""
    choice = MaskChoice.parse(options.mask)
    if choice.kind == "file":
        try:
            source_size(choice.path)
        except StorageError as error:
            raise UsageError(f"--mask {display_url(choice.path)}: cannot be read; give a 3-D NIfTI file") from error


def require_writable(store: Store) -> None:
    """The target is ours to fill; the store takes objects, and a name only once.

    Raises:
        UsageError: the target is a folder that holds other things, the source itself perhaps.
        StorageError: it cannot be written, or overwrites what is there.
    """
    _refuse_other_things(store)
    require_exclusive(store)


def require_exclusive(store: Store) -> None:
    """Write, claim twice and remove a small object.

    Raises:
        StorageError: the store cannot be written, or overwrites what is there.
    """
    key = f"tmp/probe-{secrets.token_hex(8)}"
    try:
        store.put_new(key, b"probe")
    except StorageError as error:
        raise StorageError(f"{store.name}: cannot be written ({error}); choose another target") from error
    try:
        store.put_new(key, b"probe")
    except ObjectExistsError:
        return
    finally:
        store.delete(key)
    raise StorageError(
        f"{store.name}: the store overwrites objects that exist, so two writers could destroy each other's work; "
        "use a local folder or an S3 server that honours If-None-Match"
    )


def _refuse_other_things(store: Store) -> None:
    if scheme_of(store.name) != "file" or not os.path.isdir(local_path(store.name)):
        return
    others = sorted(set(os.listdir(local_path(store.name))) - _OURS)
    if others:
        raise UsageError(
            f"{store.name}: holds other things already ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}); "
            "convert into a new folder"
        )
