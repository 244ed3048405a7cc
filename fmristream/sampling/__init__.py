"""Which window comes next: pure functions of the data's digest, a seed and a position. No I/O, no state."""
