"""Learning rate of the plain fine-tune: the best of three by the force MAE on validation frames.

    python benchmarks/plain_learning_rate.py sio2_sevennet

The winner is written into the recipe (``plain.learning_rate``) by hand, once. Test frames are not
looked at. Prints a table and writes benchmarks/results/plain_learning_rate-<recipe>.json.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from blip_ft.config import load_recipe
from blip_ft.training.fit import prepare, reset_mean
from blip_ft.training.loop import train

RATES = (3e-4, 1e-3, 3e-3)


def main(name: str, overrides: list[str]) -> None:
    console = Console(stderr=True)
    rows = []
    recipe = load_recipe(name, overrides)
    prepared = prepare(recipe, console)
    for rate in RATES:
        recipe = load_recipe(name, [*overrides, f"plain.learning_rate={rate}"])
        with tempfile.TemporaryDirectory() as folder:
            history = train(recipe, prepared.potential, prepared.sets, Path(folder), console, plain=True)
        reset_mean(prepared.potential)
        best = min(history, key=lambda row: row["val_crps"])
        rows.append(
            {"learning_rate": rate, "seed": recipe.seed, "validation_force_mae": best["val_force_mae"]}
        )
        print(f"{rate:8.1e}  {best['val_force_mae']:6.2f} meV/Å on validation, epoch {best['epoch'] + 1:.0f}")
    out = Path(__file__).parent / "results" / f"plain_learning_rate-{name}.json"
    out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
