"""One's own data in the phase diagram: thresholds, survivors, files, and what is wrong with them."""

import json
from typing import Any

import jax
import numpy as np
import pytest

from dynamics.collapse import moments, two_layer_minimum, where
from models.data.images import digits
from sims.__main__ import main

X = np.random.default_rng(0).normal(size=(200, 3)) * [2.0, 1.0, 0.5]


def test_digits_have_the_thresholds_of_their_covariance():
    images = np.asarray(digits()[0]).reshape(1797, -1)
    found = where("vae", images, value=0.3)
    expected = [0.69886, 0.63917, 0.55355, 0.39470, 0.27138, 0.23076, 0.20256, 0.17184]
    assert found.thresholds[:8] == pytest.approx(expected, abs=6e-6)
    assert len(found.thresholds) == 61
    assert found.surviving == 4
    assert found.distance == pytest.approx(0.09470, abs=1e-5)
    # An active unit has a variance and a posterior that share what the mode has.
    unit = found.units[3]
    assert unit.variance + unit.sigma2 == pytest.approx(1)
    assert unit.kl == pytest.approx(-np.log(unit.sigma2) / 2)
    assert found.units[4].kl == 0
    assert "3 of 64 columns are constant" in found.notes[0]


def test_modes_that_survive_are_those_of_64_bit_whatever_the_caller_has():
    images, labels = (np.asarray(part, np.float32) for part in digits())
    images, classes = images.reshape(1797, -1), np.eye(10, dtype=np.float32)[labels.astype(int)]
    with jax.enable_x64(False):
        counts = [where("supervised", images, classes, value=value).surviving for value in (0.05, 0.12, 0.2)]
        small = where("vae", images, value=1e-5).surviving
    assert counts == [9, 5, 2]
    assert small == where("vae", images, value=1e-5).surviving


def test_a_supervised_network_dies_at_its_threshold():
    y = X @ np.array([1.0, -0.5, 0.2])
    (gamma,) = where("supervised", X, y[:, None]).thresholds
    data = moments(X - X.mean(axis=0), y - y.mean())
    for share, alive in (0.99, 1), (1.01, 0):
        assert (two_layer_minimum(data, share * gamma, share * gamma, 0.0, 2).b > 0) == alive
        assert where("supervised", X, y[:, None], value=share * gamma).surviving == alive


def test_augmentations_collapse_modes_only_with_attraction():
    variances = np.sort(np.linalg.eigvalsh(np.cov(X.T, bias=True)))[::-1]
    found = where("ssl", X, value=1.0, attraction=1.5)
    assert found.thresholds == pytest.approx(2 * variances)
    assert found.surviving == 2
    assert found.distance == pytest.approx(2 * variances[1] - 1)
    usual = where("ssl", X, value=100.0)
    assert (usual.surviving, usual.distance) == (3, np.inf)
    assert "nothing collapses at attraction 1" in usual.notes[0]


def test_odd_data_have_an_answer_with_a_note():
    few = where("vae", X[:2], value=0.0)
    assert (len(few.thresholds), few.surviving) == (1, 1)
    assert "fewer rows (2) than columns (3)" in few.notes[0]
    assert few.units[0].kl == np.inf
    kinds: dict[Any, Any] = {"vae": None, "ssl": None, "supervised": np.ones((4, 1))}
    for kind, target in kinds.items():
        nothing = where(kind, np.ones((4, 2)), target, value=0.5)
        assert (nothing.thresholds, nothing.surviving, nothing.distance) == ((), 0, None)


@pytest.mark.parametrize(
    ("kind", "arguments", "wrong"),
    [
        ("supervised", {}, "target must be given"),
        ("ssl", {"target": X}, "target must be left out"),
        ("vae", {"attraction": 2.0}, "attraction must be left out"),
        ("vae", {"value": np.nan}, "value must be"),
    ],
)
def test_what_does_not_go_together_is_told(kind: Any, arguments, wrong):
    with pytest.raises(ValueError, match=wrong):
        where(kind, X, **arguments)


def run(capsys, *arguments):
    code = main(["where", *map(str, arguments)])
    return code, capsys.readouterr()


def test_files_of_all_kinds_give_the_same(tmp_path, capsys):
    np.save(tmp_path / "a.npy", X.reshape(200, 3, 1))
    np.savez(tmp_path / "b.npz", X)
    np.savetxt(tmp_path / "c.csv", X, delimiter=",", header="a,b,c", comments="", fmt="%.17g")
    answers = []
    for name in ("a.npy", "b.npz", "c.csv"):
        options = ("--kind", "vae", "--value", 0.5, "--out", tmp_path, "--format", "json")
        code, told = run(capsys, "--data", tmp_path / name, *options)
        assert code == 0
        answers.append(json.loads(told.out))
    assert answers[0] == answers[1] == answers[2]
    assert answers[0]["surviving"] == 2
    assert (tmp_path / "where-vae.png").stat().st_size > 1000
    code, told = run(capsys, "--kind", "ssl", "--data", tmp_path / "c.csv", "--out", tmp_path)
    assert "none of which ever collapses" in told.out


@pytest.mark.parametrize(
    ("name", "content", "wrong"),
    [
        ("text.csv", b"a,b\n1,2\n3,x\n", "got 'x' in column b"),
        ("uneven.csv", b"1,2\n3\n", "rows of one length"),
        ("empty.csv", b"", "rows of one length"),
        ("nan.csv", b"1,2\n3,nan\n", "x must be finite"),
        ("no.npy", b"nothing", "an array that NumPy saved"),
        ("no.npz", b"nothing", "arrays that NumPy saved"),
        ("data.txt", b"1", "must be a file .npy, .npz or .csv"),
    ],
)
def test_files_that_cannot_be_read_are_told_in_one_line(name, content, wrong, tmp_path, capsys):
    (tmp_path / name).write_bytes(content)
    code, told = run(capsys, "--kind", "vae", "--data", tmp_path / name, "--out", tmp_path)
    assert code == 2
    assert wrong in told.err
    assert told.err.count("\n") == 1


def test_a_file_that_is_not_there_is_told(tmp_path, capsys):
    code, told = run(capsys, "--kind", "vae", "--data", tmp_path / "none.npy")
    assert (code, told.err.count("\n")) == (2, 1)
    assert "cannot be read" in told.err


@pytest.mark.parametrize(
    "options", [("--kind", "vae", "--value", "0"), ("--kind", "ssl", "--value", "0.3")], ids=["vae", "ssl"]
)
def test_what_is_infinite_is_null_in_json(options, tmp_path, capsys):
    np.save(tmp_path / "x.npy", X)
    arguments = ["where", "--data", str(tmp_path / "x.npy"), *options, "--out", str(tmp_path)]
    assert main([*arguments, "--format", "json"]) == 0

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert None in (found["distance"], *(unit["kl"] for unit in found["units"]))


def test_data_whose_squares_overflow_are_refused():
    with pytest.raises(ValueError, match="x and target must have squares that are finite"):
        where("vae", 1e200 * X)
