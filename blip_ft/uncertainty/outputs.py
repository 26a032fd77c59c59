"""What predictions hold: the one table from which calculator, predicted files, stored sets and documents are made.

An output is one row here and the line that computes it (:mod:`blip_ft.uncertainty.predict`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["mean", "epistemic", "aleatoric", "total", "score"]


@dataclass(frozen=True)
class Output:
    """One quantity of a predicted structure.

    Attributes:
        name: key in ``results`` of the calculator, in ``info`` or ``arrays`` of a file, in the dicts of
            ``predict_atoms``.
        per: ``structure`` or ``atom``.
        components: of one entry, ``()`` for a number.
        unit: with ASE's sign and Voigt order for stresses.
        kind: what it says.
        meaning: in words.
        standard: a property that ASE knows.
        in_files: written by ``blip-finetune predict``.
    """

    name: str
    per: Literal["structure", "atom"]
    components: tuple[int, ...]
    unit: str
    kind: Kind
    meaning: str
    standard: bool = False
    in_files: bool = True

    @property
    def shape(self) -> str:
        """As the tables of the documents have it: ``(n, 3)``."""
        sizes = [*(["n"] if self.per == "atom" else []), *map(str, self.components)]
        if not sizes:
            return "scalar"
        return f"({sizes[0]},)" if len(sizes) == 1 else f"({', '.join(sizes)})"

    def size(self, structures: int, atoms: int) -> tuple[int, ...]:
        """Shape for a set of structures that are laid one behind the other."""
        return (atoms if self.per == "atom" else structures, *self.components)


def _std(name: str, kind: Kind, meaning: str, *, per: Literal["structure", "atom"] = "structure") -> Output:
    components = {"energy": (), "forces": (3,), "stress": (6,)}[name.partition("_")[0]]
    units = {"energy": "eV", "forces": "eV/Å", "stress": "eV/Å^3"}
    # the scatter of labels is one number for all components
    size = () if kind == "aleatoric" else components
    return Output(name, per, size, units[name.partition("_")[0]], kind, meaning)


OUTPUTS = (
    Output("energy", "structure", (), "eV", "mean", "total energy", standard=True),
    Output("energies", "atom", (), "eV", "mean", "energy of each atom", standard=True),
    Output("forces", "atom", (3,), "eV/Å", "mean", "forces", standard=True),
    Output("stress", "structure", (6,), "eV/Å^3", "mean", "stress of periodic structures", standard=True),
    _std("energy_std", "epistemic", "of the total energy"),
    _std("energy_std_aleatoric", "aleatoric", "of the total energy"),
    _std("energy_std_total", "total", "of the total energy"),
    _std("forces_std", "epistemic", "of each component in the lab frame", per="atom"),
    _std("forces_std_aleatoric", "aleatoric", "of every component"),
    _std("forces_std_total", "total", "of each component", per="atom"),
    Output(
        "forces_std_norm",
        "atom",
        (),
        "eV/Å",
        "epistemic",
        "root of the trace of the covariance; the same in every orientation",
    ),
    Output(
        "forces_cov",
        "atom",
        (3, 3),
        "(eV/Å)^2",
        "epistemic",
        "covariance of the components",
        in_files=False,
    ),
    _std("stress_std", "epistemic", "of each component"),
    _std("stress_std_aleatoric", "aleatoric", "of every component"),
    _std("stress_std_total", "total", "of each component"),
    Output("energies_std", "atom", (), "eV", "epistemic", "of the energy of each atom"),
    Output(
        "std_sampling_error",
        "structure",
        (),
        "1",
        "score",
        "relative, of stds of forces and stress from few draws or directions; 0 where they are exact",
    ),
    Output("ood_score", "atom", (), "1", "score", "distance from the training atoms in the model's features"),
    Output("ood_score_max", "structure", (), "1", "score", "largest of the structure's atoms"),
)
BY_NAME = {output.name: output for output in OUTPUTS}
#: results that ASE knows
STANDARD = tuple(o.name for o in OUTPUTS if o.standard)
#: and those that it does not
OURS = tuple(o.name for o in OUTPUTS if not o.standard)
#: of ours, what a file holds in ``info`` and in ``arrays``
IN_INFO = tuple(o.name for o in OUTPUTS if o.in_files and not o.standard and o.per == "structure")
IN_ARRAYS = tuple(o.name for o in OUTPUTS if o.in_files and not o.standard and o.per == "atom")

_KINDS = {
    "mean": "prediction",
    "epistemic": "epistemic std",
    "aleatoric": "aleatoric std",
    "total": "total std",
    "score": "score",
}


def markdown() -> str:
    """The table of docs/uncertainty.md."""
    head = ["| name | shape | unit | what | where `predict` writes it |", "|---|---|---|---|---|"]
    rows = []
    for o in OUTPUTS:
        place = "results" if o.standard else "`arrays`" if o.per == "atom" else "`info`"
        what = o.meaning if o.kind in ("mean", "score") else f"{_KINDS[o.kind]} {o.meaning}"
        if o.name in ("forces_std_norm", "forces_cov"):
            what = f"{_KINDS[o.kind]}: {o.meaning}"
        rows.append(f"| `{o.name}` | {o.shape} | {o.unit} | {what} | {place if o.in_files else ''} |")
    return "\n".join([*head, *rows])
