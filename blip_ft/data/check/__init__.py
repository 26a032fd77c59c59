"""Frames and labels checked before training."""
