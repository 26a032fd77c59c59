"""Which unit explains the slope of labels against a pretrained model.

If labels are in a unit of u eV/Å, their numbers are the true values divided by u: the slope is
1/u. People also convert the wrong way, which gives u. Both are looked for, with either sign.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from blip_ft.data.read.units import conversion

#: a slope this close to a unit's factor is explained by it
TOLERANCE = 0.2

#: frames and rms shear of the model, eV/Å^3, that an order of components can be told from
_ORDER_FRAMES, _ORDER_SHEAR = 4, 1e-4

#: units that labels come in, as ``data.units`` takes them; all differ from eV and Å by more than two
CANDIDATES: dict[str, tuple[str, ...]] = {
    "energy": ("kcal/mol", "kJ/mol", "meV", "Hartree", "Ry"),
    "forces": (
        "kcal/mol/Ang",
        "kJ/mol/Ang",
        "meV/Ang",
        "Hartree/Ang",
        "Hartree/Bohr",
        "Ry/Ang",
        "Ry/Bohr",
        "kcal/mol/Bohr",
    ),
    "stress": ("GPa", "kbar", "bar", "Pa", "Hartree/Bohr^3", "Ry/Bohr^3", "kcal/mol/Ang^3", "meV/Ang^3"),
}


@dataclass(frozen=True)
class Comparison:
    """Labels and predictions of one quantity on the same components.

    Attributes:
        label: (m,) as the source has them after the recipe's units.
        model: (m,) predictions, eV and Å.
        virial: (m,) stress times volume, eV; only for stress.
    """

    label: NDArray[np.float64]
    model: NDArray[np.float64]
    virial: NDArray[np.float64] | None = None

    @property
    def slope(self) -> float:
        """Least squares through zero: sum(label * model) / sum(model^2)."""
        return slope(self.label, self.model)

    @property
    def correlation(self) -> float:
        """Cosine between labels and predictions (correlation through zero)."""
        return cosine(self.label, self.model)


@dataclass(frozen=True)
class Suspicion:
    """A unit or sign that explains a slope.

    Attributes:
        text: what the labels look like, in words.
        remedy: what to write into the recipe.
        correlation: how well the explanation fits.
        sign_only: only the sign differs.
    """

    text: str
    remedy: str
    correlation: float
    sign_only: bool = False


def slope(label: NDArray[np.float64], model: NDArray[np.float64]) -> float:
    """sum(label * model) / sum(model^2); NaN if the model predicts zeros."""
    square = float(model @ model)
    return float(label @ model) / square if square else math.nan


def cosine(label: NDArray[np.float64], model: NDArray[np.float64]) -> float:
    """Cosine of the angle between two vectors; 0 if one is zero."""
    norms = float(np.linalg.norm(label) * np.linalg.norm(model))
    return float(label @ model) / norms if norms else 0.0


def likely_unit(quantity: str, compared: Comparison) -> Suspicion | None:
    """The unit or sign that explains the slope, or ``None`` if none is needed or none fits.

    Args:
        quantity: ``energy``, ``forces`` or ``stress``.
        compared: labels and predictions.
    """
    unit, virial = _unit(quantity, compared), _virial(compared)
    if unit and virial:
        # In one cell both explain the same slope; over several, the better correlation decides.
        return virial if abs(virial.correlation) > abs(unit.correlation) + 1e-4 else unit
    return unit or virial or _sign(quantity, compared) or (_order(compared) if quantity == "stress" else None)


def _unit(quantity: str, compared: Comparison) -> Suspicion | None:
    value = compared.slope
    if not math.isfinite(value) or value == 0.0:
        return None
    names = _explaining(quantity, abs(value))
    if not names:
        return None
    (best, inverted), *rest = names
    others = [name + (" converted the wrong way" if wrong else "") for name, wrong in rest]
    also = f"; also possible: {', '.join(others)}" if others else ""
    flipped = " of the wrong sign" if value < 0 else ""
    if inverted:
        size = f"{max(abs(value), 1 / abs(value)):.3g} times too {'large' if abs(value) > 1 else 'small'}"
        return Suspicion(
            f"{best}{flipped} converted the wrong way{also}",
            f"the numbers are {size}: convert the original again",
            compared.correlation,
        )
    return Suspicion(
        f"{best}{flipped}, not {_OURS[quantity]}{also}",
        f"set data.units: {{{quantity}: {'-1 * ' if flipped else ''}{best}}}",
        compared.correlation,
    )


def _explaining(quantity: str, value: float) -> list[tuple[str, bool]]:
    """Units (name, converted the wrong way) whose factor is near ``value``, likeliest first.

    Labels as they came are far likelier than labels converted the wrong way.
    """
    found = []
    for name in CANDIDATES[quantity]:
        factor = conversion(name, quantity)
        for wrong, expected in ((False, 1.0 / factor), (True, factor)):
            distance = abs(math.log(value / expected))
            if distance <= math.log1p(TOLERANCE):
                found.append((wrong, distance, name))
    return [(name, wrong) for wrong, _, name in sorted(found)]


def _virial(compared: Comparison) -> Suspicion | None:
    """Virials (stress times volume, either sign) in eV in place of stresses."""
    if compared.virial is None:
        return None
    value = slope(compared.label, compared.virial)
    if not math.isfinite(value) or value == 0.0 or abs(math.log(abs(value))) > math.log1p(TOLERANCE):
        return None
    return Suspicion(
        f"virials in eV ({'-' if value < 0 else ''}stress times volume), not stresses in eV/Å^3",
        "name them as such, data.fields: {virial: NAME}"
        + (", and turn their sign, data.units: {virial: -1 * eV}" if value > 0 else ""),
        cosine(compared.label, compared.virial),
    )


def _sign(quantity: str, compared: Comparison) -> Suspicion | None:
    value = compared.slope
    if not -2.0 <= value <= -0.5:
        return None
    return Suspicion(
        {"forces": "gradients (the wrong sign)"}.get(quantity, f"{quantity} of the wrong sign"),
        f"set data.units: {{{quantity}: -1 * {_OURS[quantity].replace('Å', 'Ang')}}}",
        compared.correlation,
        sign_only=True,
    )


def _order(compared: Comparison) -> Suspicion | None:
    """Shear components in another order than yz xz xy: by how each of the six regresses on the model's."""
    if compared.label.size % 6 or compared.label.size < 6 * _ORDER_FRAMES:
        return None
    label, model = compared.label.reshape(-1, 6)[:, 3:], compared.model.reshape(-1, 6)[:, 3:]
    if float(np.sqrt(np.mean(model**2))) < _ORDER_SHEAR:
        return None
    scores = {p: cosine(label[:, p].ravel(), model.ravel()) for p in permutations(range(3))}
    best = max(scores, key=lambda p: scores[p])
    if best == (0, 1, 2) or scores[0, 1, 2] > 0.5 or scores[best] < 0.8:
        return None
    if best == (1, 2, 0):
        text, remedy = "stresses in VASP's order xx yy zz xy yz zx", "set data.stress_order: vasp"
    else:
        order = " ".join(("yz", "xz", "xy")[best.index(i)] for i in range(3))
        text = f"stresses with their shear components in the order {order}"
        remedy = (
            "write the components in the order xx yy zz yz xz xy, of 3 x 3 numbers those in their places; if only "
            "some of the frames (a group, a source) are so, in these"
        )
    return Suspicion(text, remedy, scores[best])


_OURS = {"energy": "eV", "forces": "eV/Å", "stress": "eV/Å^3"}
