"""URLs as text: which scheme, what may be shown to people, how to join."""

import os
import re

from fmristream.errors import UsageError

# Schemes that reach bytes and nothing else. fsspec knows more, some of which run commands or hop through other hosts.
SCHEMES = frozenset({"file", "memory", "s3", "gs", "gcs", "az", "abfs", "http", "https"})


def scheme_of(url: str) -> str:
    """The URL's scheme in lower case; `file` for a plain path.

    Raises:
        UsageError: the scheme is not one that fmristream opens.
    """
    if "://" not in url:
        return "file"
    match = re.match(r"^([A-Za-z][A-Za-z0-9+.-]*):", url)
    if match is None:
        return "file"
    scheme = match.group(1).lower()
    if "::" in url:  # fsspec would chain file systems, each with a scheme of its own
        raise UsageError(f"{display_url(url)}: chained URLs ('::') are not opened by fmristream; give a plain one")
    if scheme not in SCHEMES:
        known = ", ".join(sorted(SCHEMES))
        raise UsageError(f"{display_url(url)}: scheme {scheme!r} is not opened by fmristream; use one of {known}")
    return scheme


def without_credentials(url: str) -> str:
    """The URL itself, after a look that it names no user and no password.

    Raises:
        UsageError: it does; shells, logs and tables would keep them.
    """
    user, at, _ = url.partition("://")[2].partition("/")[0].rpartition("@")
    is_container = scheme_of(url) in ("az", "abfs") and ":" not in user  # abfs://container@account...
    if at and not is_container:
        raise UsageError(
            f"{display_url(url)}: credentials do not belong into a URL; give them in the environment or in the "
            "provider's own configuration files"
        )
    return url


# Where a query is a signature or a token for one object, or means nothing to the client.
_WITHOUT_QUERY = frozenset({"http", "https", "az", "abfs"})


def without_query(url: str) -> str:
    """The URL of a dataset itself, after a look that it has no query.

    A presigned URL lets people read one object; a dataset has thousands. What could be sent along with each request would end
    in logs, states and shell histories.

    Raises:
        UsageError: it has one.
    """
    if scheme_of(url) in _WITHOUT_QUERY and ("?" in url or "#" in url):
        raise UsageError(
            f"{display_url(url)}: the URL has a query ('?...', not shown: it may hold a secret), which is not sent with the "
            "requests for a dataset's objects; give the folder's URL without it: passwords of web servers belong into ~/.netrc, "
            "and buckets behind presigned links are opened as s3://, gs:// or az:// with credentials of the environment"
        )
    return url


def redacted(text: str) -> str:
    """A sentence without user names, passwords, queries and fragments of the URLs in it."""
    text = re.sub(r"(?<=://)[^/\s\"']*@", "", text)
    return re.sub(r"(://[^\s\"'?#]*)[?#][^\s\"']*", r"\1", text)


def display_url(url: str) -> str:
    """The URL without user name, password, query and fragment, which may hold secrets."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        return url
    host, slash, path = re.split(r"[?#]", rest, maxsplit=1)[0].partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"


def join_url(base: str, *names: str) -> str:
    """Append path components to a URL or a path."""
    return "/".join([base.rstrip("/"), *(name.strip("/") for name in names)])


def local_path(url: str) -> str:
    """The path that a `file` URL or a plain path means, made absolute."""
    path = url[len("file://") :] if url.lower().startswith("file://") else url
    return os.path.abspath(os.path.expanduser(path))
