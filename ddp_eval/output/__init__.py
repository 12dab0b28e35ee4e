"""Everything in --output_path: the directory, its lock, journals, status, tables and files."""
