"""What a dataset consists of: runs, arrays, participants, splits; and the Parquet tables that hold them."""
