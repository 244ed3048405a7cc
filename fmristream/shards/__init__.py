"""Bytes at rest: the on-disk format, its writer, its reader and its commits. FORMAT.md is the specification."""

FORMAT_VERSION = 1
