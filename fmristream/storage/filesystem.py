"""The one place where an fsspec file system is made."""

from typing import Any

from fmristream.errors import MissingExtraError, StorageError
from fmristream.storage.urls import display_url, scheme_of

# 8 MiB parts: s3fs' own 50 MiB would cost more memory than the rest of a conversion (64 parts make a 512 MiB shard).
PART_BYTES = 8 * 2**20

_EXTRA_OF = {"s3": "s3"}


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url`, and the path in it.

    Credentials and endpoints come from the environment and the provider's own configuration files, never from the URL.

    Raises:
        MissingExtraError: the scheme's client package is not installed.
        StorageError: the client could not be set up.
    """
    import fsspec

    scheme = scheme_of(url)
    options: dict[str, Any] = {}
    if scheme == "s3":
        options = {"default_block_size": PART_BYTES, "default_cache_type": "none"}
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        extra = _EXTRA_OF.get(scheme, scheme)
        raise MissingExtraError(
            f"{display_url(url)}: the client for {scheme}:// is not installed ({error}); pip install 'fmristream[{extra}]'"
        ) from error
    except (OSError, ValueError) as error:
        raise StorageError(f"{display_url(url)}: the store could not be opened: {error}") from error
    return fs, str(path)
