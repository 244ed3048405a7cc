"""The command line: words in, functions called, tables out. Results on stdout, everything else on stderr."""
