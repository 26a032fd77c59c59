"""The ``pathwise`` family: see ``options.py`` and ``posterior.py``."""
