"""Molecular dynamics with error bars: runs that say how sure the model is, stop themselves, and go on after a kill."""
