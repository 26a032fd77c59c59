"""The ``channel`` family: see ``options.py`` and ``posterior.py``."""
