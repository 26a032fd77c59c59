"""A potential inside LAMMPS: what LAMMPS then has, against the calculator and against laws."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.geometry import find_mic
from ase.md.verlet import VelocityVerlet

from blip_ft.config import PosteriorConfig
from blip_ft.errors import BlipError
from blip_ft.lammps import attach
from blip_ft.uncertainty.calculator import BlipCalculator
from blip_ft.uncertainty.predict import predict_atoms

from .conftest import potential_of, setup, structure

pytestmark = pytest.mark.backend("lammps")

PRESSURES = ("pxx", "pyy", "pzz", "pxy", "pxz", "pyz")
VOIGT = [0, 1, 2, 5, 4, 3]


def by_id(lmp: Any, name: str, count: int) -> Any:
    """Values of all atoms in the order of their IDs; a copy."""
    n, tag = lmp.extract_setting("nlocal"), lmp.numpy.extract_atom("id")
    values = lmp.numpy.extract_atom(name)[:n]
    assert values.shape == ((n,) if count == 1 else (n, count))
    return values[np.argsort(tag[:n])].copy()


def in_lammps(lmp: Any, symbols: Any) -> Atoms:
    """The structure that LAMMPS has, atoms in the order of their IDs."""
    low, high, xy, yz, xz, periodic, _ = lmp.extract_box()
    lx, ly, lz = np.subtract(high, low)
    cell = [[lx, 0, 0], [xy, ly, 0], [xz, yz, lz]]
    return Atoms(symbols, positions=by_id(lmp, "x", 3), cell=cell, pbc=periodic)


def results(potential: Any, atoms: Atoms, **options: Any) -> dict[str, Any]:
    calculator = BlipCalculator(potential, **options)
    calculator.calculate(atoms, ["energy"])
    return calculator.results


def thermo(lmp: Any, names: tuple[str, ...]) -> Any:
    return np.array([lmp.get_thermo(name) for name in names])


def dumped(path: Path) -> list[Any]:
    """(n, columns) of each frame, atoms in the order of their IDs."""
    frames = path.read_text().split("ITEM: TIMESTEP\n")[1:]
    out = []
    for frame in frames:
        rows = frame.split("ITEM: ATOMS")[1].splitlines()[1:]
        values = np.array([[float(x) for x in row.split()] for row in rows])
        out.append(values[values[:, 0].argsort()])
    return out


class TestOneEvaluation:
    @pytest.mark.parametrize("style", ["metal", "real"])
    @pytest.mark.parametrize(
        "options", [{}, {"method": "energy"}, {"method": "linear"}, {"n_draws": 0}, {"n_draws": 2}], ids=str
    )
    def test_is_that_of_the_calculator(self, lammps: Any, paired: Any, style: str, options: Any):
        lmp = lammps(atoms := structure(), units=style)
        attach(lmp, paired, **options)
        lmp.command("run 0")
        expected = results(paired, atoms, **options)
        unit = {"metal": 1.0, "real": units.mol / units.kcal}[style]
        close = {"rtol": 1e-10, "atol": 1e-12}
        np.testing.assert_allclose(lmp.get_thermo("pe"), expected["energy"] * unit, **close)
        np.testing.assert_allclose(by_id(lmp, "f", 3), expected["forces"] * unit, **close)
        factor = unit * lmp.extract_global("nktv2p")
        np.testing.assert_allclose(
            thermo(lmp, PRESSURES), -expected["stress"][VOIGT] * factor, rtol=1e-9, atol=1e-9
        )
        np.testing.assert_allclose(by_id(lmp, "d_ood_score", 1), expected["ood_score"], **close)
        assert lmp.extract_variable("ood_score_max") == pytest.approx(expected["ood_score_max"], rel=1e-12)
        if "energy_std" in expected:
            assert lmp.extract_variable("energy_std") == pytest.approx(
                expected["energy_std"] * unit, rel=1e-9
            )
        assert lmp.has_id("variable", "energy_std") == ("energy_std" in expected)
        if "forces_std_norm" in expected:
            column = by_id(lmp, "d_forces_std_norm", 1)
            np.testing.assert_allclose(column, expected["forces_std_norm"] * unit, rtol=1e-8)
            assert lmp.extract_variable("forces_std_norm_max") == column.max() > 0
        assert lmp.has_id("variable", "forces_std_norm_max") == ("forces_std_norm" in expected)

    def test_forces_are_in_electronvolts_at_the_door(self, lammps: Any, single: Any):
        """1 eV is 23.0605 kcal/mol: not taken from the code that is tested."""
        forces = {}
        for style in ("metal", "real"):
            lmp = lammps(structure(), units=style)
            attach(lmp, single)
            lmp.command("run 0")
            forces[style] = by_id(lmp, "f", 3)
        np.testing.assert_allclose(forces["real"], 23.060548 * forces["metal"], rtol=1e-7)

    def test_atoms_have_energies_and_no_virial(self, lammps: Any, single: Any):
        lmp = lammps(structure())
        lmp.command("compute e all pe/atom")
        lmp.command("compute s all stress/atom NULL")
        attach(lmp, single)
        lmp.command("compute sum all reduce sum c_e")
        lmp.command("compute first all reduce sum c_s[1]")
        lmp.command("thermo_style custom step pe press c_sum c_first")
        lmp.command("run 0")
        assert lmp.extract_compute("sum", 0, 0) == pytest.approx(lmp.get_thermo("pe"), rel=1e-12)
        assert np.isnan(lmp.extract_compute("first", 0, 0))
        assert np.isfinite(lmp.get_thermo("press"))

    def test_a_molecule_has_no_pressure(self, lammps: Any, single: Any):
        atoms = structure(n=1, triclinic=False)
        atoms.pbc = False
        lmp = lammps(atoms, boundary="s s s")
        attach(lmp, single)
        lmp.command("run 0")
        expected = results(single, atoms)
        assert lmp.get_thermo("pe") == pytest.approx(expected["energy"], rel=1e-12)
        np.testing.assert_allclose(by_id(lmp, "f", 3), expected["forces"], rtol=1e-10, atol=1e-12)
        assert np.isnan(lmp.get_thermo("press"))

    def test_a_slab(self, lammps: Any, single: Any):
        atoms = structure(n=2)
        atoms.pbc = [True, True, False]
        lmp = lammps(atoms, boundary="p p f")
        attach(lmp, single)
        lmp.command("run 0")
        expected = results(single, atoms)
        assert lmp.get_thermo("pe") == pytest.approx(expected["energy"], rel=1e-12)
        np.testing.assert_allclose(by_id(lmp, "f", 3), expected["forces"], rtol=1e-10, atol=1e-12)

    def test_charge_reaches_the_model(self, lammps: Any):
        charged = potential_of(PosteriorConfig(family="weight", prior_scale=0.1), "charged")
        energies = {}
        for charge in (None, 1.0):
            lmp = lammps(atoms := structure(n=1))
            attach(lmp, charged, charge=charge)
            lmp.command("run 0")
            atoms.info = {} if charge is None else {"charge": charge}
            energies[charge] = lmp.get_thermo("pe")
            assert energies[charge] == pytest.approx(results(charged, atoms)["energy"], rel=1e-12)
        assert energies[None] != energies[1.0]


def test_pressure_is_the_slope_of_the_energy(lammps: Any, single: Any):
    """All six numbers of the box, by LAMMPS alone: dE = -V sum_ij P_ij dF_ij, with dF = dH H^-1 of the box vectors in
    columns.
    """
    lmp = lammps(atoms := structure())
    attach(lmp, single)
    lmp.command("thermo_style custom step pe pxx pyy pzz pxy pxz pyz")
    lmp.command("run 0")
    pressure = np.zeros((3, 3))
    names = {"x": (0, 0), "y": (1, 1), "z": (2, 2), "xy": (0, 1), "xz": (0, 2), "yz": (1, 2)}
    for value, (i, j) in zip(thermo(lmp, PRESSURES), names.values(), strict=True):
        pressure[i, j] = pressure[j, i] = value / lmp.extract_global("nktv2p")
    h, H = 1e-4, atoms.cell.array.T.tolist()
    for name, (i, j) in names.items():
        energies = []
        for shift in (h, -h, 0.0):
            where = f"final 0 {H[i][j] + shift!r}" if i == j else f"final {H[i][j] + shift!r}"
            lmp.command(f"change_box all {name} {where} remap units box")
            lmp.command("run 0")
            energies.append(lmp.get_thermo("pe"))
        change = np.zeros((3, 3))
        change[i, j] = 2 * h
        expected = -atoms.get_volume() * (pressure * (change @ np.linalg.inv(H))).sum()
        assert energies[0] - energies[1] == pytest.approx(expected, rel=1e-5), name


def test_nve_is_that_of_ase(lammps: Any, single: Any):
    """To rounding, over 100 steps, in which atoms leave the box and are sorted anew. LAMMPS's unit of time in ASE's
    comes from its own constants, which differ from ASE's in the eighth digit.
    """
    lmp = lammps(atoms := structure())
    lmp.command("velocity all create 3000 4928459 mom yes")
    lmp.command("neigh_modify every 1 delay 0 check yes")
    lmp.command("atom_modify sort 5 2.0")
    attach(lmp, single, every=10)
    ps = 1 / np.sqrt(lmp.extract_global("mvv2e"))
    atoms.positions = by_id(lmp, "x", 3)
    atoms.set_velocities(by_id(lmp, "v", 3) / ps)
    masses = lmp.numpy.extract_atom("mass")
    atoms.set_masses(masses[by_id(lmp, "type", 1)])
    atoms.calc = BlipCalculator(single, n_draws=0)
    lmp.command("fix n all nve")
    lmp.command("compute u all property/atom xu yu zu")
    lmp.command("timestep 0.001")
    lmp.command("run 100")
    VelocityVerlet(atoms, timestep=0.001 * ps).run(100)
    tag = lmp.numpy.extract_atom("id")[: len(atoms)]
    assert (np.diff(tag) < 0).any()
    unwrapped = lmp.numpy.extract_compute("u", 1, 2)[np.argsort(tag)]
    assert np.abs(unwrapped - atoms.positions).max() < 1e-10
    assert np.abs(by_id(lmp, "v", 3) / ps - atoms.get_velocities()).max() < 1e-11
    assert np.abs(atoms.get_scaled_positions(wrap=False) - 0.5).max() > 0.5
    assert lmp.get_thermo("pe") == pytest.approx(atoms.get_potential_energy(), rel=1e-12)


class TestRuns:
    def test_columns_follow_their_atoms(self, lammps: Any, paired: Any, tmp_path: Path):
        """Sorted and moved every few steps; error bars every third step stay what they were in between."""
        lmp = lammps(atoms := structure())
        lmp.command("velocity all create 3000 1")
        lmp.command("neigh_modify every 1 delay 0 check no")
        lmp.command("atom_modify sort 1 2.0")
        lmp.command("compute e all pe/atom")
        bridge = attach(lmp, paired, every=3)
        lmp.command(f"dump d all custom 1 {tmp_path / 'd'} id x y z d_forces_std_norm d_ood_score c_e")
        lmp.command("dump_modify d format float %20.16g")
        lmp.command("fix n all nve")
        lmp.command("run 7")
        assert (bridge.evaluations, bridge.with_error_bars) == (8, 3)
        orders = lmp.numpy.extract_atom("id")[: len(atoms)]
        assert (np.diff(orders) < 0).any()
        for step, frame in enumerate(dumped(tmp_path / "d")):
            if step % 3 == 0:
                atoms.positions = frame[:, 1:4]
                kept = results(paired, atoms)["forces_std_norm"]
            np.testing.assert_allclose(frame[:, 4], kept, rtol=1e-6)
            atoms.positions = frame[:, 1:4]
            expected = results(paired, atoms, n_draws=0)
            np.testing.assert_allclose(frame[:, 5], expected["ood_score"], rtol=1e-9)
            np.testing.assert_allclose(frame[:, 6], expected["energies"], rtol=1e-9)

    def test_forces_do_not_change_with_the_error_bars(self, lammps: Any, single: Any):
        """Families of single draws have two means; with ``every`` the one of the weights is that of all steps."""
        lmp = lammps(atoms := structure())
        bridge = attach(lmp, single, every=2)
        lmp.command("fix n all nve")
        expected = results(single, atoms, n_draws=0)
        for step in range(2):  # nothing moves yet in the first evaluation of a run
            lmp.command(f"reset_timestep {step}")
            lmp.command("run 0")
            np.testing.assert_allclose(by_id(lmp, "f", 3), expected["forces"], rtol=1e-10, atol=1e-12)
        assert (bridge.evaluations, bridge.with_error_bars) == (2, 1)
        np.testing.assert_allclose(
            bridge.results["forces_std_norm"], results(single, atoms)["forces_std_norm"], rtol=1e-12
        )
        assert np.abs(results(single, atoms)["forces"] - expected["forces"]).max() > 1e-6

    def test_several_runs_are_one(self, lammps: Any, single: Any):
        ends = []
        for runs in (["run 6"], ["run 2", "run 4"], ["run 3", "run 3 pre no"]):
            lmp = lammps(structure())
            lmp.command("velocity all create 300 1")
            attach(lmp, single)
            lmp.command("fix n all nve")
            for command in runs:
                lmp.command(command)
            ends.append(by_id(lmp, "x", 3))
        for end in ends[1:]:  # a run may begin by putting atoms back into the box
            apart, _ = find_mic(end - ends[0], structure().cell)
            np.testing.assert_allclose(apart, 0, atol=1e-12)

    def test_minimize(self, lammps: Any, single: Any):
        lmp = lammps(atoms := structure())
        attach(lmp, single)
        lmp.command("run 0")
        before = lmp.get_thermo("pe")
        lmp.command("minimize 0 0 20 60")
        assert lmp.get_thermo("pe") < before
        end = results(single, in_lammps(lmp, atoms.symbols))
        assert lmp.get_thermo("pe") == pytest.approx(end["energy"], rel=1e-12)
        np.testing.assert_allclose(by_id(lmp, "d_forces_std_norm", 1), end["forces_std_norm"], rtol=1e-6)

    def test_relaxed_cell(self, lammps: Any, single: Any):
        lmp = lammps(atoms := structure())
        attach(lmp, single)
        lmp.command("run 0")
        before = lmp.get_thermo("pe")
        lmp.command("fix b all box/relax tri 0.0 vmax 0.01")
        lmp.command("minimize 0 0 20 60")
        end = in_lammps(lmp, atoms.symbols)
        assert abs(end.get_volume() / atoms.get_volume() - 1) > 0.01
        assert lmp.get_thermo("pe") < before
        assert lmp.get_thermo("pe") == pytest.approx(results(single, end)["energy"], rel=1e-12)

    @pytest.mark.parametrize("box", ["iso 0 0 0.1", "tri 0 0 0.1"])
    def test_npt_conserves_its_energy(self, lammps: Any, single: Any, box: str):
        lmp = lammps(atoms := structure())
        lmp.command("velocity all create 300 1")
        attach(lmp, single, n_draws=0)
        lmp.command(f"fix n all npt temp 300 300 0.1 {box}")
        lmp.command("thermo_style custom step etotal press vol ecouple econserve")
        lmp.command("timestep 0.0005")
        lmp.command("run 0")
        start, volume = lmp.get_thermo("econserve"), lmp.get_thermo("vol")
        lmp.command("run 100")
        assert abs(lmp.get_thermo("vol") / volume - 1) > 1e-3
        drift = abs(lmp.get_thermo("econserve") - start)
        exchanged = abs(lmp.get_thermo("ecouple"))
        assert drift < 0.05 * exchanged
        expected = results(single, in_lammps(lmp, atoms.symbols), n_draws=0)
        assert lmp.get_thermo("pe") == pytest.approx(expected["energy"], rel=1e-12)

    def test_rerun(self, lammps: Any, single: Any, tmp_path: Path):
        lmp = lammps(structure())
        lmp.command("velocity all create 300 1")
        bridge = attach(lmp, single)
        lmp.command(f"dump d all custom 2 {tmp_path / 'd'} id type x y z d_forces_std_norm")
        lmp.command("dump_modify d format float %20.16g")
        lmp.command("fix n all nve")
        lmp.command("run 4")
        lmp.command("undump d")
        again = lammps(structure(seed=1))
        bridge = attach(again, single)
        again.command(f"dump d all custom 2 {tmp_path / 'again'} id type x y z d_forces_std_norm")
        again.command("dump_modify d format float %20.16g")
        again.command(f"rerun {tmp_path / 'd'} dump x y z")
        assert bridge.with_error_bars == 3
        first, second = dumped(tmp_path / "d"), dumped(tmp_path / "again")
        assert len(second) == 3
        for one, other in zip(first, second, strict=True):
            np.testing.assert_allclose(other[:, [0, 1, 5]], one[:, [0, 1, 5]], rtol=1e-7)

    def test_atoms_may_come_and_go(self, lammps: Any, single: Any):
        lmp = lammps(atoms := structure(n=2))
        attach(lmp, single)
        lmp.command("run 0")
        lmp.command("group some id 1 2 5")
        lmp.command("delete_atoms group some compress no")
        lmp.command("run 0")
        left = np.delete(np.arange(len(atoms)), [0, 1, 4])
        np.testing.assert_allclose(
            by_id(lmp, "f", 3), results(single, atoms[left])["forces"], rtol=1e-9, atol=1e-12
        )


class TestThreshold:
    @pytest.mark.parametrize("style", ["metal", "real"])
    def test_stops_where_it_is_passed(self, lammps: Any, single: Any, style: str):
        def made() -> Any:
            lmp = lammps(structure(), units=style)
            lmp.command("velocity all create 3000 1")
            lmp.command("fix n all nve")
            lmp.command(f"timestep {0.001 if style == 'metal' else 1.0}")
            return lmp

        stds: list[float] = []
        attach(lmp := made(), single, after=lambda bridge: stds.append(bridge.worst.std))
        lmp.command("run 20")
        limit = float(np.sort(stds)[-2:].mean())
        first = int(np.argmax(np.array(stds) > limit))
        assert first > 1
        bridge = attach(lmp := made(), single, stop_above=limit)
        lmp.command("run 20")
        assert lmp.extract_global("ntimestep") == bridge.step == first
        assert bridge.exceeded is not None
        assert bridge.exceeded.step == first
        assert bridge.largest == bridge.exceeded  # all before were below
        assert bridge.exceeded.std == pytest.approx(stds[first], rel=1e-6)
        column = by_id(lmp, "d_forces_std_norm", 1)
        assert bridge.exceeded.atom == column.argmax() + 1
        assert f"step {first}: std of the force on atom {bridge.exceeded.atom}" in str(bridge.exceeded)

    def test_stops_a_minimisation(self, lammps: Any, single: Any):
        bridge = attach(lmp := lammps(structure()), single, stop_above=1e-6)
        lmp.command("minimize 0 0 50 50")
        assert bridge.step == 1

    def test_of_ones_own_on_the_score(self, lammps: Any, single: Any):
        bridge = attach(lmp := lammps(structure()), single, n_draws=0)
        lmp.command("velocity all create 3000 1")
        lmp.command("fix n all nve")
        lmp.command("run 0")
        lmp.command(
            f"fix h all halt 1 v_ood_score_max != {lmp.extract_variable('ood_score_max')!r} error soft"
        )
        lmp.command("run 5")
        assert bridge.step == 1


class TestFailure:
    """Whatever a callback raises ends LAMMPS there, and is raised by what was called."""

    @pytest.mark.parametrize(
        "error", [ValueError("a defect"), KeyboardInterrupt(), BlipError("bad", remedy="mend")]
    )
    @pytest.mark.parametrize(
        ("command", "at"),
        [("run 9", 0), ("run 9", 3), ("run 0", 0), ("minimize 0 0 9 9", 0), ("minimize 0 0 9 9", 2)],
    )
    def test_ends_lammps(self, lammps: Any, single: Any, command: str, at: int, error: BaseException):
        def after(bridge: Any) -> None:
            if bridge.evaluations == at + 1:
                raise error

        lmp = lammps(structure())
        bridge = attach(lmp, single, after=after)
        lmp.command("fix n all nve")
        with pytest.raises(type(error), match=r"defect|bad|^$") as raised:
            lmp.command(command)
        assert bridge.evaluations == at + 1
        if isinstance(error, BlipError):
            assert f"LAMMPS step {bridge.step}: bad" in str(raised.value)
            assert raised.value.remedy == "mend"
        lmp.command("run 2")  # the instance is as good as before
        assert bridge.evaluations == at + 4

    def test_what_follows_in_a_file_is_not_done(self, lammps: Any, single: Any, tmp_path: Path):
        def after(bridge: Any) -> None:
            if bridge.step == 2:
                raise RuntimeError("no")

        lmp = lammps(structure())
        attach(lmp, single, after=after)
        path = tmp_path / "in"
        path.write_text(f"fix n all nve\nrun 5\nwrite_data {tmp_path / 'end.data'}\n")
        with pytest.raises(RuntimeError, match="no"):
            lmp.file(str(path))
        assert not (tmp_path / "end.data").exists()
        assert "blip_ft: no" in (tmp_path / "log.lammps").read_text()

    def test_in_a_rerun(self, lammps: Any, single: Any, tmp_path: Path):
        lmp = lammps(structure())
        lmp.command(f"write_dump all custom {tmp_path / 'd'} id type x y z")
        attach(lmp, single, after=lambda bridge: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            lmp.command(f"rerun {tmp_path / 'd'} dump x y z")

    @pytest.mark.parametrize("name", ["energy", "forces", "stress"])
    def test_a_prediction_that_is_not_finite(
        self, lammps: Any, single: Any, monkeypatch: pytest.MonkeyPatch, name: str
    ):
        def broken(*args: Any, **options: Any) -> list[dict[str, Any]]:
            (item,) = predict_atoms(*args, **options)
            return [item | {name: item[name] * np.nan}]

        lmp = lammps(structure())
        attach(lmp, single)
        lmp.command("fix n all nve")
        lmp.command("run 1")
        monkeypatch.setattr("blip_ft.lammps.bridge.predict_atoms", broken)
        with pytest.raises(BlipError, match=f"field '{name}': LAMMPS step 1: .*not finite"):
            lmp.command("run 1")

    def test_errors_of_lammps_stay_its_own(self, lammps: Any, single: Any):
        lmp = lammps(structure())
        attach(lmp, single)
        with pytest.raises(Exception, match="Unknown command: nonsense"):
            lmp.command("nonsense")


class TestRefused:
    def refused(self, lmp: Any, potential: Any, match: str, **options: Any) -> None:
        fixes = lmp.available_ids("fix")
        with pytest.raises(BlipError, match=match) as raised:
            attach(lmp, potential, **options)
        assert raised.value.remedy
        assert lmp.available_ids("fix") == fixes
        assert "command" not in vars(lmp)

    def test_options(self, lammps: Any, single: Any):
        lmp = lammps(structure())
        self.refused(lmp, single, "every 0th step", every=0)
        self.refused(lmp, single, "threshold of -1", stop_above=-1.0)
        self.refused(lmp, single, "without stds", stop_above=0.1, method="energy")
        self.refused(lmp, single, "without stds", stop_above=0.1, n_draws=0)
        self.refused(lmp, single, "takes no charge", charge=1.0)

    def test_a_model_that_must_be_told_the_charge(self, lammps: Any, monkeypatch: pytest.MonkeyPatch):
        charged = potential_of(PosteriorConfig(family="weight", prior_scale=0.1), "charged")
        monkeypatch.setattr(type(charged.backbone), "conditions", {"charge": None, "spin": 1.0})
        self.refused(lammps(structure()), charged, "needs the charge")

    def test_several_ranks(self, lammps: Any, single: Any, monkeypatch: pytest.MonkeyPatch):
        lmp = lammps(structure())
        ask = lmp.extract_setting
        monkeypatch.setattr(lmp, "extract_setting", lambda name: 2 if name == "world_size" else ask(name))
        self.refused(lmp, single, "on 2 MPI ranks, and one process evaluates")

    def test_an_old_lammps(self, lammps: Any, single: Any, monkeypatch: pytest.MonkeyPatch):
        lmp = lammps(structure())
        monkeypatch.setattr(lmp, "version", lambda: 20220623)
        self.refused(lmp, single, "too old")

    @pytest.mark.parametrize("style", ["lj", "si", "electron"])
    def test_other_units(self, lammps: Any, single: Any, style: str):
        self.refused(lammps(structure(), units=style), single, f"units {style}")

    def test_before_there_is_anything(self, lammps: Any, single: Any):
        lmp = lammps()
        lmp.command("units metal")
        self.refused(lmp, single, "no box yet")

    def test_two_dimensions(self, lammps: Any, single: Any):
        lmp = lammps()
        lmp.commands_string(
            "units metal\ndimension 2\nregion b block 0 5 0 5 -1 1\ncreate_box 1 b\nmass 1 28.085"
        )
        self.refused(lmp, single, "two dimensions")

    def test_a_name_that_is_taken(self, lammps: Any, single: Any):
        lmp = lammps(structure())
        lmp.command("variable energy_std equal 1")
        self.refused(lmp, single, "a variable of the name energy_std")

    def test_overlapping_atoms(self, lammps: Any, single: Any):
        atoms = structure()
        atoms.positions[3] = atoms.positions[0] + [0, 0, 0.3]
        lmp = lammps(atoms)
        attach(lmp, single)
        with pytest.raises(BlipError, match=r"step 0: IDs 1 \(Si\) and 4 \(O\) overlap: 0.30 Å"):
            lmp.command("run 0")

    def test_no_atoms(self, lammps: Any, single: Any):
        lmp = lammps()
        lmp.commands_string("units metal\nregion b block 0 5 0 5 0 5\ncreate_box 1 b\nmass 1 28.085")
        bridge = attach(lmp, single)
        with pytest.raises(BlipError, match="LAMMPS has no atoms"):
            lmp.command("run 0")
        assert bridge.evaluations == 0

    def test_respa(self, lammps: Any, single: Any):
        lmp = lammps(structure())
        attach(lmp, single)
        lmp.command("fix n all nve")
        lmp.command("run_style respa 2 2")
        with pytest.raises(BlipError, match="respa"):
            lmp.command("run 1")

    def test_npt_of_a_slab(self, lammps: Any, single: Any):
        atoms = structure(triclinic=False)
        atoms.pbc = [True, True, False]
        lmp = lammps(atoms, boundary="p p f")
        attach(lmp, single)
        lmp.command("fix n all npt temp 300 300 0.1 x 0 0 1")
        with pytest.raises(BlipError, match="no stress, so there is no pressure"):
            lmp.command("run 5")
        assert lmp.extract_global("ntimestep") == 0


class TestElements:
    """Types are elements by name, label or mass; what contradicts itself is refused."""

    def energies(self, lmp: Any, potential: Any, **options: Any) -> float:
        attach(lmp, potential, **options)
        lmp.command("run 0")
        return float(lmp.get_thermo("pe"))

    def test_by_mass_label_and_name(self, lammps: Any, single: Any):
        right = results(single, structure())["energy"]
        assert self.energies(lammps(structure()), single) == pytest.approx(right, rel=1e-12)
        rounded = {"Si": 28.1, "O": 16}
        assert self.energies(lammps(structure(), masses=rounded), single) == pytest.approx(right, rel=1e-12)
        odd = {"Si": 30.5, "O": 17.999}
        lmp = lammps(structure(), masses=odd)
        lmp.command("labelmap atom 1 Si 2 O")
        assert self.energies(lmp, single) == pytest.approx(right, rel=1e-12)
        named = self.energies(lammps(structure(), masses=odd), single, elements=["Si", "O"])
        assert named == pytest.approx(right, rel=1e-12)

    def test_labels_that_are_no_symbols_say_nothing(self, lammps: Any, single: Any):
        lmp = lammps(structure())
        lmp.command("labelmap atom 1 silicon 2 O_bridge")
        assert self.energies(lmp, single) == pytest.approx(results(single, structure())["energy"], rel=1e-12)

    @pytest.mark.parametrize(
        ("masses", "options", "match"),
        [
            ({}, {"elements": ["O", "Si"]}, r"type 1 is to be O and has the mass of Si \(28.085\)"),
            ({}, {"elements": ["Si"]}, r"1 elements \(Si\) for 2 atom types"),
            ({}, {"elements": ["Si", "Ox"]}, "'Ox' is no element"),
            ({"Si": 40.0}, {}, "40 of atom type 1 may be Ar or Ca"),
            ({"Si": 30.5}, {}, "30.5 of atom type 1 is none of an element"),
            ({"Si": 26.98}, {}, "type 1 is Al, which is unknown to the fake model"),
            ({"Si": 30.5}, {"elements": ["U", "O"]}, "type 1 is U, which is unknown"),
        ],
    )
    def test_refused(self, lammps: Any, single: Any, masses: Any, options: Any, match: str):
        lmp = lammps(structure(), masses={"Si": 28.085, "O": 15.999} | masses)
        with pytest.raises(BlipError, match=match) as raised:
            attach(lmp, single, **options)
        assert raised.value.remedy
        assert lmp.available_ids("fix") == []

    def test_a_label_that_contradicts_the_mass(self, lammps: Any, single: Any):
        lmp = lammps(structure())
        lmp.command("labelmap atom 1 O 2 Si")
        with pytest.raises(BlipError, match="type 1 is to be O and has the mass of Si"):
            attach(lmp, single)

    def test_a_type_without_a_mass(self, lammps: Any, single: Any):
        lmp = lammps()
        lmp.commands_string(
            "units metal\nregion b block 0 5 0 5 0 5\ncreate_box 1 b\ncreate_atoms 1 single 1 1 1\n"
        )
        with pytest.raises(BlipError, match="type 1 has neither a label nor a mass"):
            attach(lmp, single)

    def test_a_type_that_comes_later(self, lammps: Any, single: Any):
        atoms = structure()
        lmp = lammps(atoms, masses={"Si": 28.085, "O": 15.999})
        attach(lmp, single)
        lmp.command("run 0")
        lmp.command("mass 2 55.845")
        with pytest.raises(BlipError, match=r"LAMMPS step 0.*: atom type 2 is Fe, which is unknown"):
            lmp.command("run 0")


class TestAgain:
    def test_detached(self, lammps: Any, single: Any):
        lmp = lammps(structure())
        before = {kind: lmp.available_ids(kind) for kind in ("fix", "variable", "group", "compute")}
        bridge = attach(lmp, single, stop_above=1.0)
        lmp.command("run 0")
        assert np.abs(by_id(lmp, "f", 3)).max() > 0
        bridge.detach()
        assert {kind: lmp.available_ids(kind) for kind in before} == before
        lmp.command("run 0")
        assert np.abs(by_id(lmp, "f", 3)).max() == 0
        assert bridge.evaluations == 1

    def test_nothing_is_left_of_it(self, lammps: Any, single: Any):
        lmp = lammps(structure())
        attached = weakref.ref(attach(lmp, single))
        lmp.command("run 0")
        lmp.close()
        lammps.opened.clear()
        del lmp
        gc.collect()
        assert attached() is None

    @pytest.mark.parametrize("name", ["blip", "other"])
    def test_another_potential(self, lammps: Any, single: Any, paired: Any, name: str):
        lmp = lammps(structure())
        attach(lmp, single, stop_above=1.0)
        lmp.command("run 0")
        attach(lmp, paired, fix=name, method="energy")
        lmp.command("run 0")
        assert lmp.get_thermo("pe") == pytest.approx(results(paired, structure())["energy"], rel=1e-12)
        assert not lmp.has_id("variable", "forces_std_norm_max")

    def test_after_clear(self, lammps: Any, single: Any):
        lmp = lammps(structure())
        attach(lmp, single)
        lmp.command("run 0")
        lmp.command("clear")
        atoms = structure(seed=3)
        lmp.commands_string("\n".join([*setup(atoms), "fix blip all external pf/callback 1 1"]))
        attach(lmp, single)
        lmp.command("run 0")
        assert lmp.get_thermo("pe") == pytest.approx(results(single, atoms)["energy"], rel=1e-12)
