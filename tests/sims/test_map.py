"""The map of collapse: what it reads off saved results, and what it says where there are none."""

import numpy as np
import pytest

from sims import results, simulations
from sims.collapse import map as collapse_map
from sims.results import Context

VERDICTS = {"origin": "holds", "deeper": "holds", "sgd": "holds", "any-model": "quoted"}
SHARE = np.linspace(0.01, 1.5, 150)
STRENGTH = np.array([0.2, 1.0, 2.5])


def root(strength, critical, exponent=0.5):
    return np.maximum(1 - strength / critical, 0) ** exponent


def put(folder, experiment, **measured):
    """A result as `collapse.<experiment>` would save it, of those arrays that the map reads."""
    saved = results.to_saved(f"collapse.{experiment}", collapse_map.Config(), Context(), measured)
    results.save(saved, folder)


def put_all(folder, *, exponent=0.5, stable=1.87, trapped=0.5, chance=0.0):
    curve = ("at", SHARE)
    put(folder, "two_layer", theory={"share": curve, "b": ("at", root(SHARE, 1, exponent))})
    lam = 3 * root(SHARE, 0.7)[:, None]
    put(folder, "vae", threshold=("mode", [0.7]), fine={"at": curve, "lam": ("at latent", lam)})
    two = root(SHARE, SHARE[100] + 0.005)[:, None]
    put(folder, "ssl", strength=curve, theory={"two": ("at mode", two)})
    norm = np.tile(np.where(SHARE < 1, 2 - SHARE, 0), (5, 1))
    kept = np.full((3, 2), trapped)
    put(
        folder,
        "depth",
        ratio=curve,
        norm=("depth at", norm),
        strength=("strength", [0.3, 0.9]),
        trained={"trapped": ("layers strength", kept)},
        gamma_c={"formula": ("hidden", np.ones(4))},
        gamma_m=("hidden", [1.0, 1.19, 1.41, 1.65]),
    )
    second = (STRENGTH - stable)[:, None] * np.ones(2)
    put(
        folder,
        "landscape",
        strength=("strength", STRENGTH),
        share=("share", [0.3, 1.2]),
        eigenvalue=("row", [1.87, 0.7]),
        supervised={"second": ("share", [-0.7, 0.2])},
        autoencoder={"best": ("strength row", second)},
        encoder={"second": ("encoder strength row", second[None])},
    )

    put(
        folder,
        "sgd",
        share=("share", [0.5, 1.2]),
        map={"collapsed": ("rate trained", [[0.0, 0.0], [1.0, chance]])},
    )


def judged(folder, seed=0):
    saved = simulations.measure("collapse.map", collapse_map.Config(), Context(seed, results=folder))
    return {claim.id.split("/")[1]: claim for claim in saved.claims}, saved


def test_kinds_of_collapse_are_told_apart(tmp_path):
    put_all(tmp_path)
    found, saved = judged(tmp_path)
    assert {name: found[name].verdict for name in ("origin", "deeper")} == {
        "origin": "holds",
        "deeper": "holds",
    }
    assert saved["linear_autoencoder/exponent"] == pytest.approx(1, abs=1e-9)
    assert saved["two_hidden_layers/exponent"] == pytest.approx(0.09, abs=0.03)


@pytest.mark.parametrize(
    ("change", "claim"),
    [
        ({"exponent": 0.25}, "origin"),
        ({"stable": 1.5}, "origin"),
        ({"trapped": 0.0}, "deeper"),
        ({"chance": 0.5}, "sgd"),
    ],
)
def test_another_kind_is_noticed(tmp_path, change, claim):
    put_all(tmp_path, **change)
    assert judged(tmp_path)[0][claim].verdict == "fails"


def test_what_is_missing_is_named_and_not_judged(tmp_path):
    found, saved = judged(tmp_path)
    assert {claim.verdict for claim in found.values()} == {"quoted"}
    assert found["deeper"].needs == "saved results of collapse.depth (missing)"
    put_all(tmp_path)
    assert set(judged(tmp_path, seed=3)[1]["state"]) == {"missing"}  # results of seed 0 are others
    (tmp_path / "collapse.depth.npz").write_bytes(b"not an archive")
    found, saved = judged(tmp_path)
    assert (found["origin"].verdict, found["deeper"].verdict) == ("holds", "quoted")
    assert "damaged" in saved["state"]
    assert set(judged(None)[1]["state"]) == {"no folder"}
