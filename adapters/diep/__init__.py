"""DIEP."""
