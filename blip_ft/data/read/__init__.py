"""Sources of every format, read into one schema."""
