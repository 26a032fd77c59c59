#!/usr/bin/env bash
# MAPIE: intervals from StdConformityScore are one rank short below, so that they cover less than was asked for.
#
# Scores |y - prediction| / std of n points give an interval of level 1 - a at the ceil((n + 1)(1 - a))-th smallest. With this score the
# lower bound is taken at the rank before: 90 % intervals from 10 points cover 86 %. AbsoluteConformityScore on the same data covers 91 %.
# Seen with MAPIE 1.6.0. Exits 0 while it is so.
set -euo pipefail
folder=$(mktemp -d); trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q --disable-pip-version-check mapie==1.6.0
cd "$folder"; "$folder/env/bin/python" -W ignore - <<'PYTHON'
from importlib.metadata import version

import numpy as np
from mapie.conformity_scores import AbsoluteConformityScore, StdConformityScore
from mapie.regression import SplitConformalRegressor
from sklearn.base import BaseEstimator, RegressorMixin


class Known(RegressorMixin, BaseEstimator):
    """A model that is right: mean 0 and std 1."""

    def fit(self, x, y):
        self.n_features_in_ = x.shape[1]
        return self

    def __sklearn_is_fitted__(self):
        return True

    def predict(self, x, return_std=False):
        mean = np.zeros(len(x))
        return (mean, np.ones(len(x))) if return_std else mean


def outside(score):
    """Shares of new points below and above 90 % intervals from 10 points."""
    rng, below, above = np.random.default_rng(0), [], []
    for _ in range(1500):
        x, y = rng.normal(size=(10, 1)), rng.normal(size=10)
        model = SplitConformalRegressor(Known().fit(x, y), confidence_level=0.9, conformity_score=score, prefit=True)
        new = rng.normal(size=40)
        _, intervals = model.conformalize(x, y).predict_interval(rng.normal(size=(40, 1)))
        below.append(np.mean(new < intervals[:, 0, 0]))
        above.append(np.mean(new > intervals[:, 1, 0]))
    return np.mean(below), np.mean(above)


print("mapie", version("mapie"))
std, absolute = outside(StdConformityScore()), outside(AbsoluteConformityScore())
print("below, above, covered: std %.3f %.3f %.3f" % (*std, 1 - sum(std)), "absolute %.3f %.3f %.3f" % (*absolute, 1 - sum(absolute)))
assert 1 - sum(std) < 0.88 and std[0] > 1.7 * std[1]
assert 1 - sum(absolute) >= 0.9
PYTHON
