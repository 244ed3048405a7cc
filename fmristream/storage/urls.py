"""URLs as text: which scheme, what may be shown to people, how to join."""

import os
import re
from urllib.parse import urlsplit, urlunsplit

from fmristream.errors import UsageError

# Schemes that reach bytes and nothing else. fsspec knows more, some of which run commands or hop through other hosts.
SCHEMES = frozenset({"file", "memory", "s3", "gs", "gcs", "az", "abfs", "http", "https"})


def scheme_of(url: str) -> str:
    """The URL's scheme in lower case; `file` for a plain path.

    Raises:
        UsageError: the scheme is not one that fmristream opens.
    """
    match = re.match(r"^([A-Za-z][A-Za-z0-9+.-]*)::?/", url) or re.match(r"^([A-Za-z][A-Za-z0-9+.-]+)::", url)
    if match is None or "://" not in url:
        return "file"
    scheme = match.group(1).lower()
    if scheme not in SCHEMES:
        known = ", ".join(sorted(SCHEMES))
        raise UsageError(f"{display_url(url)}: scheme {scheme!r} is not opened by fmristream; use one of {known}")
    return scheme


def display_url(url: str) -> str:
    """The URL without user name, password, query and fragment, which may hold secrets."""
    if "://" not in url:
        return url
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit((parts.scheme, host, parts.path, "", ""))


def join_url(base: str, *names: str) -> str:
    """Append path components to a URL or a path."""
    return "/".join([base.rstrip("/"), *(name.strip("/") for name in names)])


def local_path(url: str) -> str:
    """The path that a `file` URL or a plain path means, made absolute."""
    path = url[len("file://") :] if url.lower().startswith("file://") else url
    return os.path.abspath(os.path.expanduser(path))
