"""A run of a synthetic cohort, made while it is read."""

from collections.abc import Iterator

import numpy as np

from fmristream.ingest.fingerprint import Fingerprint
from fmristream.ingest.run_stream import Closing, Frame, RunHeader
from fmristream.ingest.sources.synth import SPACE, affine_rows, locate_synth, synth_identity


class SynthStream(Closing):
    """An open synthetic run (a `RunStream`)."""

    prefix = b""  # there is no file
    models = None

    def __init__(self, url: str) -> None:
        self._url = url
        self._cohort, self._subject, self._run = locate_synth(url)
        self._header = RunHeader(
            shape=self._cohort.shape,
            frames=self._cohort.frames,
            dtype=np.dtype(self._cohort.dtype).newbyteorder("<"),
            slope=1.0,
            inter=0.0,
            affine=affine_rows(self._cohort.affine()),
            tr_s=self._cohort.tr_s,
            space=SPACE,
        )

    @property
    def header(self) -> RunHeader:
        return self._header

    def frames(self, ring: int = 1) -> Iterator[Frame]:
        """Every frame, each its own array."""
        for frame in self._cohort.run_frames(self._subject, self._run):
            yield np.asfortranarray(frame, dtype=self._header.dtype)

    def fingerprint(self) -> Fingerprint:
        """Of the parameters: equal parameters give equal frames."""
        return Fingerprint(**synth_identity(self._url))

    def close(self) -> None:
        """Nothing is open."""
