"""What every adapter must fulfil, whatever its kind.

:class:`AdapterContract` holds for every backbone; ``conservative.py`` adds what holds where forces are
gradients of the energy, ``variational.py`` what holds once weights are random, ``vendor.py`` what holds
for weights that come in files of a vendor's package. An adapter's test combines them, gives ``load`` and the
attributes, and inherits all tests::

    @pytest.mark.backend("sevennet")
    class TestSevenNet(VendorContract, ConservativeContract):
        package = "sevenn"

        @classmethod
        def load(cls) -> Backbone:
            return SevenNetBackbone.load("7net-0")

Checks of symmetry and of derivatives run in float64, where rounding cannot hide a defect. Tolerances
are in eV, Å and their combinations.
"""

from __future__ import annotations

import copy
import json
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.stress import full_3x3_to_voigt_6_stress, voigt_6_to_full_3x3_stress
from scipy.spatial.transform import Rotation

from blip_ft.backbones.protocol import Backbone, Prediction
from blip_ft.errors import CheckpointError, DataError
from blip_ft.testing.helpers import (
    array,
    close,
    evaluate,
    evaluate_all,
    is_linear,
    rotation_defect,
    same,
    tensors,
)
from blip_ft.training.sanity_checks import stock_predictions
from blip_ft.variational.convert import plan


def _moved(atoms: Atoms, images: int) -> Atoms:
    other = atoms.copy()
    other.positions[2] += (images, -images, images // 2) @ atoms.cell.array
    return other


def _described(atoms: Atoms, change: Any) -> Atoms:
    other = atoms.copy()
    other.set_cell(np.array(change) @ atoms.cell.array)
    return other


#: the same crystal: no distance and no direction changes
DESCRIPTIONS = {
    "unwrapped": lambda a: _moved(a, 3),
    "1000 Å outside": lambda a: _moved(a, 200),
    "skewed": lambda a: _described(a, [[1, 0, 0], [7, 1, 0], [-5, 9, 1]]),
    "left-handed": lambda a: _described(a, [[0, 1, 0], [1, 0, 0], [0, 0, 1]]),
}
NAMES = ["quartz", "carbide", "ethanol", "boxed_atom", "periodic_atom", "slab"]


class AdapterContract:
    """The contract; see the module's text."""

    #: largest defect of rotational invariance that the vendor's own float64 model may have
    #: (tables of coefficients that were stored in single precision stay so)
    invariance: ClassVar[float] = 1e-9
    #: whether the vendor's model is equivariant by construction; if not, a defect of symmetry may be twice
    #: that of the vendor's own calculator on float64 weights
    equivariant: ClassVar[bool] = True
    #: whether the energy is a sum over atoms
    atomic: ClassVar[bool] = True
    #: (eV/atom, eV/Å, eV/Å^3) agreement with the stock calculator in the vendor's own precision
    step0: ClassVar[tuple[float, float, float]] = (1e-5, 1e-4, 1e-5)

    # ---- to be given ---------------------------------------------------------------------
    @classmethod
    def load(cls) -> Backbone:
        """A backbone as the vendor ships it."""
        raise NotImplementedError

    # ---- fixtures ------------------------------------------------------------------------
    @pytest.fixture(scope="class")
    @classmethod
    def native(cls) -> Backbone:
        """In the vendor's own precision."""
        return cls.load()

    @pytest.fixture(scope="class")
    @classmethod
    def backbone(cls, native: Backbone) -> Backbone:
        """In float64."""
        return copy.deepcopy(native).double()

    # ---- the vendor's numbers ------------------------------------------------------------
    @pytest.mark.parametrize("name", NAMES)
    def test_step_zero_in_the_vendors_precision(self, native, native_stock, structures, name):
        self._compare_with_stock(native, native_stock, structures[name], *self.step0)

    @pytest.mark.parametrize("name", NAMES)
    def test_step_zero_in_float64(self, backbone, stock, structures, name):
        self._compare_with_stock(backbone, stock, structures[name], 1e-9, 1e-9, 1e-9)

    def _compare_with_stock(self, backbone, calculator, atoms, energy, forces, stress):
        stock = atoms.copy()
        stock.calc = calculator
        ours = evaluate(backbone, atoms)
        assert ours.energy.item() == pytest.approx(stock.get_potential_energy(), abs=energy * len(atoms))
        np.testing.assert_allclose(array(ours.forces), stock.get_forces(), rtol=0, atol=forces)
        if atoms.pbc.all() and backbone.has_stress:
            np.testing.assert_allclose(array(ours.stress[0]), stock.get_stress(), rtol=0, atol=stress)

    def _stock(self, calculator: Any, atoms: Atoms, *, has_stress: bool) -> Prediction:
        """Energy, forces and (where the cell is periodic) stress from the vendor's calculator."""
        stock = atoms.copy()
        stock.calc = calculator
        stress = stock.get_stress() if atoms.pbc.all() and has_stress else None
        return Prediction(
            energy=torch.tensor([stock.get_potential_energy()], dtype=torch.float64),
            forces=torch.as_tensor(stock.get_forces()),
            stress=None if stress is None else torch.as_tensor(stress)[None],
        )

    # ---- symmetries ----------------------------------------------------------------------
    @pytest.mark.parametrize("name", NAMES)
    def test_rotation(self, backbone, structures, name, request):
        atoms = structures[name]
        turn = Rotation.random(random_state=7).as_matrix()
        turned = atoms.copy()
        turned.set_cell(atoms.cell.array @ turn.T)
        turned.set_positions(atoms.positions @ turn.T)
        before, after = evaluate(backbone, atoms), evaluate(backbone, turned)
        if not self.equivariant:
            calculator = request.getfixturevalue("stock")
            has_stress = backbone.has_stress
            stock = rotation_defect(
                lambda a: self._stock(calculator, a, has_stress=has_stress), atoms, turned, turn
            )
            ours = rotation_defect(lambda a: evaluate(backbone, a), atoms, turned, turn)
            assert (ours <= 2 * stock + self.invariance).all(), (ours, stock)
            return
        tolerance = self.invariance
        close(after.energy, before.energy, tolerance * len(atoms))
        close(after.node_energy, before.node_energy, tolerance)
        np.testing.assert_allclose(
            array(after.forces), array(before.forces) @ turn.T, rtol=0, atol=10 * tolerance
        )
        if before.node_features is not None:
            close(after.node_features, before.node_features, 100 * tolerance)
        if atoms.pbc.all() and backbone.has_stress:
            stress = turn @ voigt_6_to_full_3x3_stress(array(before.stress[0])) @ turn.T
            np.testing.assert_allclose(
                array(after.stress[0]), full_3x3_to_voigt_6_stress(stress), rtol=0, atol=tolerance
            )

    def test_permutation(self, backbone, quartz):
        order = np.random.default_rng(0).permutation(len(quartz))
        before, after = evaluate(backbone, quartz), evaluate(backbone, quartz[order])
        close(after.energy, before.energy, 1e-10)
        if self.atomic:
            close(after.node_energy, before.node_energy[order], 1e-10)
        close(after.forces, before.forces[order], 1e-10)
        close(after.stress, before.stress, 1e-10)

    @pytest.mark.parametrize("name", NAMES)
    def test_translation(self, backbone, structures, name):
        moved = structures[name].copy()
        moved.positions += (3.3, -47.1, 12.9)
        same(evaluate(backbone, moved), evaluate(backbone, structures[name]), 1e-9)

    def test_an_atom_moved_by_a_lattice_vector(self, backbone, quartz):
        moved = quartz.copy()
        moved.positions[2] += (2, -1, 1) @ quartz.cell.array
        same(evaluate(backbone, moved), evaluate(backbone, quartz), 1e-9)

    @pytest.mark.parametrize("how", DESCRIPTIONS)
    def test_another_description_of_the_same_crystal(self, native, backbone, quartz, how):
        """Also in the vendor's precision, in which a far image would lose its digits."""
        other = DESCRIPTIONS[how](quartz)
        same(evaluate(backbone, other), evaluate(backbone, quartz), 1e-9)
        one, two = evaluate(native, quartz), evaluate(native, other)
        assert (two.energy - one.energy).abs().item() < self.step0[0] * len(quartz)
        close(two.forces, one.forces, self.step0[1])
        close(two.stress, one.stress, self.step0[2])

    @pytest.mark.parametrize("how", DESCRIPTIONS)
    def test_step_zero_of_another_description(self, backbone, stock, quartz, how):
        """As the gate compares; right labels are refused where the vendor's sign of the stress is wrong."""
        other = DESCRIPTIONS[how](quartz)
        (theirs,) = stock_predictions(stock, [other])
        (mine,) = stock_predictions(stock, [quartz])
        ours = evaluate(backbone, other)
        assert ours.energy.item() == pytest.approx(theirs["energy"], abs=1e-9 * len(quartz))
        np.testing.assert_allclose(array(ours.forces), theirs["forces"], rtol=0, atol=1e-9)
        np.testing.assert_allclose(theirs["forces"], mine["forces"], rtol=0, atol=1e-9)
        if backbone.has_stress:
            np.testing.assert_allclose(array(ours.stress[0]), theirs["stress"], rtol=0, atol=1e-7)

    def test_a_molecule_far_from_the_origin(self, native, ethanol, slab):
        for atoms in (ethanol, slab):
            far = atoms.copy()
            far.positions += (0.0, 0.0, 3000.0) if atoms.pbc.any() else (3000.0, -2000.0, 500.0)
            close(evaluate(native, far).forces, evaluate(native, atoms).forces, self.step0[1])

    def test_energies_of_far_molecules_add_up(self, backbone, ethanol):
        pair = ethanol.copy()
        pair.extend(Atoms(ethanol.numbers, ethanol.positions + np.array([60.0, 0.0, 0.0])))
        one, two = evaluate(backbone, ethanol), evaluate(backbone, pair)
        close(two.energy, 2 * one.energy, 1e-9)
        close(two.forces, torch.cat((one.forces, one.forces)), 1e-9)

    # ---- modes ---------------------------------------------------------------------------
    def test_only_what_is_asked_for(self, backbone, quartz):
        batch = backbone.batch([quartz])
        energy = backbone(batch, forces=False, stress=False)
        assert energy.forces is None
        assert energy.stress is None
        assert backbone(batch, stress=False).stress is None
        close(energy.energy, evaluate(backbone, quartz).energy, 1e-12)

    def test_train_mode_changes_nothing(self, backbone, quartz):
        model = copy.deepcopy(backbone)
        before = evaluate(model.eval(), quartz)
        same(evaluate(model.train(), quartz), before, 1e-12)

    def test_a_deep_copy_is_independent(self, native, backbone, quartz):
        twin = copy.deepcopy(backbone)
        assert twin.state_dict().keys() == native.state_dict().keys()
        same(evaluate(twin, quartz), evaluate(backbone, quartz), 1e-12)
        before = evaluate(backbone, quartz)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(1.1)
        same(evaluate(backbone, quartz), before, 1e-12)
        assert (evaluate(twin, quartz).energy - before.energy).abs() > 1e-3

    # ---- awkward structures --------------------------------------------------------------
    def test_an_isolated_atom(self, backbone, boxed_atom):
        bare = Atoms(boxed_atom.numbers, boxed_atom.positions)
        box, free = evaluate(backbone, boxed_atom), evaluate(backbone, bare)
        close(box.energy, free.energy, 1e-10)
        assert array(box.forces).tolist() == [[0.0, 0.0, 0.0]]
        if backbone.has_stress and backbone.conservative:
            assert array(box.stress).tolist() == [[0.0] * 6]
        if backbone.has_stress:
            assert torch.isnan(free.stress).all()

    def test_an_atom_among_its_images(self, backbone, periodic_atom):
        prediction = evaluate(backbone, periodic_atom)
        if backbone.conservative:
            close(prediction.forces, torch.zeros(1, 3, dtype=torch.float64), self.invariance)
        if backbone.has_stress:
            assert torch.isfinite(prediction.stress).all()
            assert prediction.stress.abs().max() > 1e-4
        double = periodic_atom.repeat((2, 1, 1))
        close(evaluate(backbone, double).energy, 2 * prediction.energy, 1e-9)

    @pytest.mark.parametrize("name", ["ethanol", "slab"])
    def test_no_stress_without_full_periodicity(self, backbone, structures, name):
        prediction = evaluate(backbone, structures[name])
        assert torch.isfinite(prediction.forces).all()
        if backbone.has_stress:
            assert torch.isnan(prediction.stress).all()

    def test_vacuum_does_not_matter(self, backbone, slab, ethanol):
        thick = slab.copy()
        thick.cell[2] = (0.0, 0.0, 60.0)
        thick.pbc = True
        close(evaluate(backbone, thick).forces, evaluate(backbone, slab).forces, 1e-9)
        box = ethanol.copy()
        box.set_cell([50.0, 60.0, 70.0])
        box.pbc = True
        close(evaluate(backbone, box).forces, evaluate(backbone, ethanol).forces, 1e-9)

    def test_unknown_element(self, backbone, ethanol):
        atoms = ethanol.copy()
        atoms.numbers[0] = max(set(range(1, 119)) - backbone.elements)
        with pytest.raises(DataError, match=atoms.symbols[0]):
            backbone.graph(atoms)

    def test_charge_and_spin_count_where_the_model_says_so(self, backbone, ethanol):
        # in `atoms.info`, for graph, batch and the vendor's calculator alike
        known = {key: 0 if key == "charge" else 1 for key in backbone.conditions}
        energies = []
        for state in ({}, {"charge": 1, "spin": 2}):
            atoms = ethanol.copy()
            atoms.info = known | state
            energies.append(evaluate(backbone, atoms).energy.item())
        assert (abs(energies[0] - energies[1]) > 1e-6) == bool(known)
        if not known:
            assert energies[0] == energies[1]

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_coordinates_that_are_no_numbers(self, backbone, quartz, value):
        """The vendors' own answers are finite energies, or trace-backs."""
        atoms = quartz.copy()
        atoms.positions[3, 0] = value
        with pytest.raises(DataError, match="atom 3") as caught:
            backbone.batch([atoms])
        assert caught.value.field == "positions"
        atoms = quartz.copy()
        atoms.cell[1, 2] = value
        with pytest.raises(DataError) as caught:
            backbone.graph(atoms)
        assert caught.value.field == "cell"

    def test_periodic_without_a_lattice_vector(self, backbone, ethanol):
        atoms = ethanol.copy()
        atoms.pbc = True
        with pytest.raises(DataError, match="lattice"):
            backbone.graph(atoms)

    # ---- batches -------------------------------------------------------------------------
    def test_a_batch_is_its_structures(self, backbone, structures):
        order = ["boxed_atom", "quartz", "ethanol", "periodic_atom", "carbide", "boxed_atom", "slab"]
        frames = [structures[name] for name in order]
        together = evaluate_all(backbone, frames)
        start = 0
        for index, atoms in enumerate(frames):
            alone, stop = evaluate(backbone, atoms), start + len(atoms)
            part = Prediction(
                together.energy[index : index + 1],
                together.forces[start:stop],
                None if together.stress is None else together.stress[index : index + 1],
                None if together.node_energy is None else together.node_energy[start:stop],
            )
            same(part, alone, 1e-9)
            start = stop

    def test_node_energies_add_up(self, backbone, structures):
        frames = list(structures.values())
        prediction, start = evaluate_all(backbone, frames), 0
        if not self.atomic:
            assert prediction.node_energy is None
            return
        for index, atoms in enumerate(frames):
            total = prediction.node_energy[start : start + len(atoms)].sum()
            assert total.item() == pytest.approx(prediction.energy[index].item(), abs=1e-9)
            start += len(atoms)

    def test_input_is_left_alone(self, backbone, structures):
        frames = list(structures.values())
        copies = copy.deepcopy(frames)
        graphs = [backbone.graph(atoms) for atoms in frames]
        kept = copy.deepcopy(graphs)
        first = backbone(backbone.collate(frames, graphs))
        second = backbone(backbone.collate(frames, graphs), create_graph=True)
        same(first, second, 1e-12)
        for atoms, before in zip(frames, copies, strict=True):
            assert atoms == before
            assert np.array_equal(atoms.cell.array, before.cell.array)
        for graph, before in zip(graphs, kept, strict=True):
            for one, two in zip(tensors(graph), tensors(before), strict=True):
                assert torch.equal(one, two)
                assert not one.requires_grad

    def test_rows_are_contiguous_and_match_every_linear_module(self, backbone, structures):
        frames = list(structures.values())
        batch, seen = backbone.batch(frames), {}
        hooks = [
            module.register_forward_hook(lambda _m, args, _out, name=name: seen.update({name: len(args[0])}))
            for name, module in backbone.model.named_modules()
            if is_linear(module)
        ]
        backbone(batch, forces=False, stress=False)
        for hook in hooks:
            hook.remove()
        assert seen
        for name, rows in seen.items():
            assert rows == len(batch.rows[backbone.row_kind(name)]), name
        for kind, owner in batch.rows.items():
            assert torch.equal(owner, owner.sort().values), kind
        assert torch.equal(batch.structure.bincount(minlength=len(frames)), batch.n_atoms)
        sizes = {len(owner) for owner in batch.rows.values()}
        assert len(sizes) == len(batch.rows), "two kinds of rows have equal sizes: the test cannot tell them"

    def test_a_batch_moves_whole(self, backbone, quartz):
        batch = backbone.batch([quartz]).to("meta")
        assert {t.device.type for t in tensors(batch.graph)} == {"meta"}
        assert batch.numbers.device.type == batch.rows["atom"].device.type == "meta"

    # ---- conversion ----------------------------------------------------------------------
    def test_every_preset_matches_convertible_modules(self, native):
        for preset in native.presets:
            report = plan(native, train=preset, noise=preset)
            assert report.counts["noisy"] > 0, preset
        assert {"all", "scalar"} <= set(native.presets)

    def test_the_preset_all_leaves_nothing_convertible(self, native):
        report = plan(native, train="all", noise="all")
        assert [row.name for row in report.table if row.action == "converted" and not row.trained] == []
        assert all(row.reason for row in report.table if row.action == "left")

    # ---- files ---------------------------------------------------------------------------
    def test_config_round_trip(self, native, quartz):
        config = json.loads(json.dumps(native.config()))
        twin = type(native).from_config(config)
        twin.load_state_dict(native.state_dict())
        assert twin.elements == native.elements
        assert twin.cutoff == native.cutoff
        assert twin.origin == native.origin
        assert json.loads(json.dumps(twin.config())) == config
        one, two = evaluate(twin.double(), quartz), evaluate(copy.deepcopy(native).double(), quartz)
        same(one, two, 1e-12)

    def test_unknown_name(self, native):
        with pytest.raises(CheckpointError, match=r"valid names|did you mean"):
            type(native).load("no-such-model")
