"""The ``posthoc_laplace`` family: see ``options.py`` and ``posterior.py``."""
