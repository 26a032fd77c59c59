"""The ``adaptive`` family: see ``options.py`` and ``posterior.py``."""
