"""The one place where an fsspec file system is made."""

import asyncio
import sys
from typing import Any

from fmristream.errors import MissingExtraError, StorageError
from fmristream.storage.urls import display_url, redacted, scheme_of, without_credentials

# 8 MiB parts: s3fs' own 50 MiB would cost more memory than the rest of a conversion (64 parts make a 512 MiB shard).
PART_BYTES = 8 * 2**20

_EXTRA_OF = {"s3": "s3", "http": "http", "https": "http"}

# Between two pieces of an answer, and to connect; a whole file may take hours.
_HTTP_SILENCE_S = 60.0

# Bases of what the clients raise beside OSError.
_CLIENT_ERRORS = (
    ("botocore.exceptions", "BotoCoreError"),
    ("botocore.exceptions", "ClientError"),
    ("aiohttp", "ClientError"),
    ("gcsfs.retry", "HttpError"),
    ("azure.core.exceptions", "AzureError"),
)


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url`, and the path in it.

    Credentials and endpoints come from the environment and the provider's own configuration files, never from the URL.

    Raises:
        UsageError: the URL holds credentials, or its scheme is not opened.
        MissingExtraError: the scheme's client package is not installed.
        StorageError: the client could not be set up.
    """
    import fsspec

    scheme = scheme_of(without_credentials(url))
    # A remembered listing would hide what other writers did since.
    options: dict[str, Any] = {"use_listings_cache": False}
    try:
        if scheme in ("http", "https"):
            options["client_kwargs"] = _http_client()
        if scheme == "s3":
            return _s3(url, options)
        fs, path = fsspec.core.url_to_fs(f"{scheme}://{url.partition('://')[2]}", **options)
    except ImportError as error:
        extra = _EXTRA_OF.get(scheme, scheme)
        raise MissingExtraError(
            f"{display_url(url)}: the client for {scheme}:// is not installed ({error}); pip install 'fmristream[{extra}]'"
        ) from error
    except (OSError, ValueError) as error:
        raise StorageError(f"{display_url(url)}: the store could not be opened: {redacted(str(error))}") from error
    return fs, str(path)


def _http_client() -> dict[str, Any]:
    """Options of the HTTP client: the file's own bytes, no limit on the whole, proxies and passwords as the machine has them."""
    import aiohttp

    return {
        # Servers that call .nii.gz "gzip-encoded" would have it inflated on the way, and no size or range would fit.
        "auto_decompress": False,
        "headers": {"Accept-Encoding": "identity"},
        "timeout": aiohttp.ClientTimeout(total=None, sock_connect=_HTTP_SILENCE_S, sock_read=_HTTP_SILENCE_S),
        "trust_env": True,
    }


def _s3(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    from fmristream.storage.s3_client import S3Client, client_options

    fs = S3Client(**options, **client_options(), default_block_size=PART_BYTES)
    return fs, str(fs._strip_protocol(f"s3://{url.partition('://')[2]}"))


def event_loop() -> asyncio.AbstractEventLoop:
    """The one loop of this process on which asynchronous clients work, in a thread of its own."""
    from fsspec.asyn import get_loop

    loop: asyncio.AbstractEventLoop = get_loop()
    return loop


def client_errors() -> tuple[type[Exception], ...]:
    """Every error class that means "the store failed": OSError, and those of the clients that are loaded."""
    loaded = ((sys.modules.get(module), name) for module, name in _CLIENT_ERRORS)
    return (OSError, *(getattr(module, name) for module, name in loaded if module is not None))
