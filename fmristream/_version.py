"""The release this checkout is; the wheel reads it from here."""

__version__ = "0.1.0"
