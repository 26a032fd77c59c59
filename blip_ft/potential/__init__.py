"""The Bayesian potential, what it carries beside its weights, and its files."""
