"""Windows out of a dataset into torch: planned by position, read by byte range, normalised, placed on the device."""
