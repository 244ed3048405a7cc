"""Bytes at rest: the on-disk format, its writer, its reader and its commits. FORMAT.md is the specification."""

FORMAT_VERSION = 1

# Layout `volume`: name and encoding of the array that holds whole frames. OME-Zarr calls its first level so.
VOLUMES = "0"
VOLUME_ENCODING = "volume"

# Frames as they are, without compression; integer codes with a scale for each voxel, and what they cannot say beside them.
RAW_ENCODING = "raw"
QUANTIZED_ENCODING = "quantized"
CODES = "codes"
QUANTIZATION = "quantization"

# What comes before the first voxel of a NIfTI file: a CIFTI file's description of its rows is some 10 MB; whole megabytes
# more are not believed, neither of a file nor of a table.
MAX_PREFIX_BYTES = 64 * 2**20
