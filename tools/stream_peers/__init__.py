"""What `tools/bench_stream.py` measures with: the data, the layouts of it, and every way to read windows of them.

`data` and the modules of other loaders import nothing but numpy at their top: they run in environments of their own.
"""
