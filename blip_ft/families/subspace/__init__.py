"""The ``subspace`` family: see ``options.py`` and ``posterior.py``."""
