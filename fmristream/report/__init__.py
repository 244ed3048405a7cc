"""Questions about a dataset and their answers: what it holds, whether it is whole and true to its source, how it looks."""
