"""Properties with propagated error bars, one call each.

Every property is computed with the mean model and with K draws of the one posterior, each at its own minimum, so that
the error bar is that of the property and not of single energies. All that was computed with the same draws is
correlated as the draws are: differences of two estimates keep it.
"""

from blip_ft.properties.crystal import (
    ElasticConstants,
    EquationOfState,
    elastic_constants,
    equation_of_state,
)
from blip_ft.properties.energies import (
    Barrier,
    Difference,
    barrier,
    reaction_energy,
    vacancy_formation_energy,
)
from blip_ft.properties.estimate import Estimate
from blip_ft.properties.members import Members, members_of
from blip_ft.properties.minima import Relaxed, relax
from blip_ft.properties.phonons import Phonons, phonons

__all__ = [
    "Barrier",
    "Difference",
    "ElasticConstants",
    "EquationOfState",
    "Estimate",
    "Members",
    "Phonons",
    "Relaxed",
    "barrier",
    "elastic_constants",
    "equation_of_state",
    "members_of",
    "phonons",
    "reaction_energy",
    "relax",
    "vacancy_formation_energy",
]
