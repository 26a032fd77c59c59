"""The ``weight`` family: see ``options.py`` and ``posterior.py``."""
