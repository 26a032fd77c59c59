"""Frames divided into roles."""
