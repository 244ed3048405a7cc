"""From NIfTI files, wherever they lie, to a dataset: list, plan, read, measure, write, commit."""
