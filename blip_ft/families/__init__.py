"""Posterior families, one folder each: ``options.py`` and ``posterior.py``.

``options.py`` has the keys of the recipe that are the family's own, what others may ask about it (closed form,
paired draws, ...) and how it is fitted into ``posterior.max_bytes``; it imports no torch. ``posterior.py`` has its
mathematics, a class with the same functions in the same order for all:

===============  =============================================================================
``init``         (``__init__``) from the sites, the prior and the starting std; ``make`` from a recipe
``fit``          set what has a closed form from the data; ``ClosedFormPosterior`` only
``latent``       keyed standard normal numbers, one row per key
``sample``       latent numbers -> perturbation of every site
``kl``           KL of the spread from the prior, nats
``std``          marginal std of every weight
===============  =============================================================================

``base`` has what families share. :mod:`blip_ft.families.registry` finds them by name, also those of other packages.
"""
