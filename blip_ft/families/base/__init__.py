"""What posterior families share; no family of its own."""
