"""Frames and predictions written to files."""
