"""The ``sketch`` family: see ``options.py`` and ``posterior.py``."""
