"""Frames with their graphs, in batches."""
