"""Eigenvalues of linear BYOL: decoupled equations, the flow of its matrices, and a trained network.

On isotropic data, from a start where predictor, network and target share singular vectors, each mode moves by
itself. The flow of whole matrices and a network that descends from there are set beside those equations; from
starts and data of any kind the network is set beside the flow of matrices, with a target and without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.flow import Trajectory, integrate
from dynamics.noncontrastive import (
    ByolWeights,
    Modes,
    balance,
    byol_flow,
    decoupled_flow,
    predictor_measures,
)
from models.byol import LinearByol, byol_loss, byol_weights, exact_views, flow_gradient
from models.draws import normal, uniform
from models.functional import as_function
from models.self_supervised import Views
from models.training import Descent
from sims import plotting
from sims.claims import (
    ROUNDING,
    SECOND_ORDER,
    SOLVER,
    Check,
    Claim,
    Preset,
    at_least,
    at_most,
    corrected,
    slope,
    stated,
)
from sims.compare import (
    SOLVE,
    WRONG_FACTOR,
    first_order,
    lane_gaps,
    largest,
    named_lanes,
    orders,
    require_ok,
    right_and_wrong,
)
from sims.ranges import NonNegative, Positive, Range, check_ranges
from sims.results import Context, Saved

SLIDE = "tian2021directpred, the talk's slide on decoupled dynamics"
TIGHT: dict[str, Any] = {**SOLVE, "rtol": 1e-9, "atol": 1e-12}
# Starts with shared singular vectors: with a tau for each mode, with one tau, and with no target of its own.
ALIGNED = ("aligned", "common", "instant")
# X, X' and weights of any kind: of full rank, with a singular X, and with no target of its own.
DRAWN = ("drawn", "singular", "drawn_instant")
FOLLOWED = {
    "aligned": "aligned, to the decoupled equations",
    "instant": "aligned without average, to the decoupled equations",
    "drawn": "any X, X' and weights",
    "singular": "a singular X",
    "drawn_instant": "any X, X' and weights without average",
}


@dataclass(frozen=True)
class Config:
    """The network, its data, and its training."""

    inputs: Annotated[int, Range(at_least=3)] = 8
    """Dimension of the inputs."""
    outputs: Annotated[int, Range(at_least=2)] = 5
    """Dimension of the outputs, at most that of the inputs: the number of modes."""
    augmentation_variance: Positive = 0.25
    """Variance of the augmentation, where data are isotropic."""
    predictor_rate: Positive = 2.0
    """Learning rate of the predictor over that of the network."""
    ema_rate: Positive = 0.5
    """Rate of the target's moving average."""
    weight_decay: NonNegative = 0.04
    """Weight decay."""
    descent: Descent = Descent(horizon=20.0, points=50, substeps=(4, 12, 40, 120))
    """Training beside the flows, at several learning rates."""

    def __post_init__(self):
        check_ranges(self)
        if self.outputs > self.inputs:
            raise ValueError(f"outputs must be at most inputs = {self.inputs}, got {self.outputs}")

    @property
    def rates(self) -> dict[str, float]:
        """What all flows have in common."""
        return {"predictor_rate": self.predictor_rate, "weight_decay": self.weight_decay}


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(Config(), descent=Descent(40.0, 100, (4, 12, 40, 120, 400))),
    "paper": replace(Config(), inputs=24, outputs=16, descent=Descent(80.0, 200, (8, 24, 80, 240, 800))),
}


class Case(NamedTuple):
    """Weights to start from, covariances of the data, and the rate of the moving average."""

    weights: ByolWeights
    X: Any
    X_aug_cov: Any
    ema_rate: Any


class Start(NamedTuple):
    """Modes that are aligned, and the singular vectors that they share."""

    modes: Modes
    U: Any
    V: Any


@partial(jax.jit, static_argnames=("n1", "n2"))
def _draws(n1: int, n2: int, key: Array) -> tuple[Array, Array]:
    one, other = jax.random.split(key)
    return normal(one, (7, n1, n1)), uniform(other, (3, n2), minval=0.1)


def _cases(config: Config, key: Array) -> tuple[dict[str, Case], Start]:
    """All cases, and the modes of those that are aligned at the start."""
    n1, n2 = config.inputs, config.outputs
    drawn, (p, s, tau) = jax.device_get(_draws(n1, n2, key))
    left, right, A, B, *rest = drawn / n1**0.5
    U, V = np.linalg.qr(left[:n2, :n2])[0], np.linalg.qr(right[:, :n2])[0]
    modes = Modes(p, s, 0.5 + tau)
    W = U * np.sqrt(s) @ V.T
    aligned = ByolWeights(W, U * p @ U.T, U * modes.tau @ U.T @ W)
    anyhow = ByolWeights(*(part / 2 for part in (rest[0][:n2], rest[1][:n2, :n2], rest[2][:n2])))
    few = A[:, : n1 // 2]
    isotropic = np.eye(n1), config.augmentation_variance * np.eye(n1)
    full, singular = (A @ A.T, B @ B.T / 2), (few @ few.T, B @ B.T / 2)
    beta = config.ema_rate
    cases = {
        "aligned": Case(aligned, *isotropic, beta),
        "common": Case(aligned._replace(Wa=W), *isotropic, beta),
        "instant": Case(aligned, *isotropic, np.inf),
        "drawn": Case(anyhow, *full, beta),
        "singular": Case(anyhow, *singular, beta),
        "drawn_instant": Case(anyhow, *full, np.inf),
    }
    return cases, Start(modes, U, V)


@jax.jit
def _views(cases: dict[str, Case]) -> dict[str, Views]:
    """Views with exactly the moments of each case."""
    given = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(leaf) for leaf in leaves]), *cases.values())
    # One after another: several decompositions at once can wait on each other.
    views = jax.lax.map(lambda case: exact_views(case.X, case.X_aug_cov), given)
    return {name: jax.tree.map(lambda leaf, i=i: leaf[i], views) for i, name in enumerate(cases)}


@partial(jax.jit, static_argnames="config")
def _flows(config: Config, cases: dict[str, Case], ts: Array) -> dict[str, Trajectory]:
    """The flow of the matrices of every case."""

    def one(case: Case):
        rates = {**config.rates, "ema_rate": case.ema_rate}
        return byol_flow(*case.weights, case.X, case.X_aug_cov, ts, **rates, **TIGHT)

    return named_lanes(one, **cases)


@partial(jax.jit, static_argnames=("config", "average"))
def _trained(config: Config, average: bool, cases: dict[str, tuple[Case, Views]]) -> dict[str, Trajectory]:
    """Networks of every case at several learning rates, with a target of their own or without."""

    def one(pair):
        case, views = pair
        weights = case.weights if average else case.weights._replace(Wa=None)
        predict, params = as_function(LinearByol(weights))
        gradient = flow_gradient(ema_rate=case.ema_rate if average else 0.0, **config.rates)
        loss = Partial(byol_loss, predict, views=views)
        return config.descent.train(loss, params, byol_weights, gradient)[1]

    return named_lanes(one, **cases)


def _one_tau_field(t: Any, state: Modes, setting: dict[str, Array]) -> Modes:
    """The printed equations with one tau, whose own equation is the sum of those of all modes."""
    p, s, tau = state
    e = tau - setting["spread"] * p
    ds = 2 * p * s * e - 2 * setting["weight_decay"] * s
    dtau = setting["ema_rate"] * (1 - tau) - tau * jnp.sum(ds) / (2 * jnp.sum(s))
    return Modes(setting["predictor_rate"] * s * e - setting["weight_decay"] * p, ds, dtau)


@partial(jax.jit, static_argnames="config")
def _decoupled(config: Config, start: Modes, F: Array, ts: Array) -> tuple[Trajectory, Trajectory]:
    """Decoupled equations of all aligned cases, and with the eigenvalues F for s; and those with one tau."""
    sigma2, beta = config.augmentation_variance, config.ema_rate
    p, s, tau = start
    values, taus = jnp.stack([s, s, s, F]), jnp.stack([tau, jnp.ones_like(tau), tau, tau])
    betas = np.array([beta, beta, np.inf, beta])[:, None]
    rates = {**config.rates, "augmentation_variance": sigma2, "ema_rate": betas}
    setting = {**config.rates, "ema_rate": beta, "spread": 1 + sigma2}
    return (
        decoupled_flow(p, values, taus, ts, **rates, **TIGHT),
        integrate(_one_tau_field, Modes(p, s, jnp.ones(())), ts, setting, **TIGHT),
    )


def _modes(start: Start, weights: ByolWeights) -> tuple[Modes, float]:
    """What weights, with leading axes, are in the modes of the start, and the largest part out of these."""
    U, V = np.asarray(start.U), np.asarray(start.V)
    W, Wp = (np.asarray(part) for part in (weights.W, weights.Wp))
    Wa = W if weights.Wa is None else np.asarray(weights.Wa)
    inner = [U.T @ W @ V, U.T @ Wp @ U, U.T @ Wa @ V]
    root, p, held = (np.diagonal(part, axis1=-2, axis2=-1) for part in inner)
    parts = [part * (1 - np.eye(len(U))) for part in inner] + [W - W @ V @ V.T, Wa - Wa @ V @ V.T]
    return Modes(p, root**2, held / root), np.max([largest(part) for part in parts])


def run(config: Config, context: Context) -> dict:
    """The decoupled equations, the flow of matrices, and networks that descend, from the same starts."""
    context.progress("flows", 0.0)
    cases, start = _cases(config, jax.random.key(context.seed))
    views = _views(cases)
    f = np.asarray(views["aligned"].first) @ cases["aligned"].weights.W.T
    values = np.diagonal(start.U.T @ f.T @ f @ start.U) / len(f)
    # A gradient that is too large is a flow that is too fast.
    ts = config.descent.times
    times = np.union1d(ts, WRONG_FACTOR * ts)
    at = right_and_wrong(lambda factor: np.searchsorted(times, factor * ts))
    decoupled, one_tau = jax.device_get(_decoupled(config, start.modes, values, times))
    paths = jax.device_get(_flows(config, cases, times))
    context.progress("training", 0.5)
    trained = {}
    for average, names in ((True, ("aligned", "drawn", "singular")), (False, ("instant", "drawn_instant"))):
        trained |= _trained(config, average, {name: (cases[name], views[name]) for name in names})
    trained = jax.device_get(trained)
    require_ok("flows and training", decoupled, one_tau, *paths.values(), *trained.values())
    one_tau = _at(one_tau.ys, at["right"])
    equations, flowed = {}, {}
    for side, index in at.items():
        ys = _at(decoupled.ys, index)
        lanes = enumerate((*ALIGNED, "by_F"))
        equations[side] = {name: jax.tree.map(lambda x, i=i: x[:, i], ys) for i, name in lanes}
        flowed[side] = {name: _at(path.ys, index) for name, path in paths.items()}
    seen = {name: _modes(start, flowed["right"][name]) for name in ALIGNED}
    finest = jax.tree.map(lambda x: x[int(np.argmin(config.descent.rates))], trained["aligned"].ys)
    measured = jax.device_get(jax.jit(predictor_measures)(finest.W, finest.Wp))
    return {
        "rate": ("rate", config.descent.rates),
        "time": ("time", ts),
        "equations": {name: ("time mode", _shown(name, equations["right"][name])) for name in ALIGNED},
        "matrices": {name: ("time mode", _shown(name, modes)) for name, (modes, _) in seen.items()},
        "mixed": {name: seen[name][1] for name in ("aligned", "instant")},
        "F": ("mode", values),
        "by_F": ("time mode", equations["right"]["by_F"].p),
        "by_one_tau": {"p": ("time mode", one_tau.p), "tau": ("time", one_tau.tau)},
        "trained": {name: ("time mode", getattr(measured, name)) for name in ("p", "s")},
        "gap": {
            name: ("rate", _gaps(start, equations, flowed, name, path)) for name, path in trained.items()
        },
        "gap_by_F": ("rate", _gap_of_p(start, equations["right"]["by_F"].p, trained["aligned"])),
        **_invariant(config, cases, flowed["right"], trained),
    }


def _shown(name: str, modes: Modes) -> dict[str, np.ndarray]:
    """What is saved of modes: tau is one by definition without an average."""
    return {part: values for part, values in modes._asdict().items() if (name, part) != ("instant", "tau")}


def _at(tree: Any, index: np.ndarray) -> Any:
    """What a pytree of arrays has at some times."""
    return jax.tree.map(lambda leaf: leaf[index], tree)


def _gaps(start: Start, equations: Mapping, flowed: Mapping, name: str, trained: Trajectory) -> dict:
    """Gaps by learning rate to what a network follows: equations of its modes, or the flow of matrices."""
    gaps = {}
    for side in equations:
        if name in ALIGNED:
            theory, seen = equations[side][name], _modes(start, trained.ys)[0]
        else:
            theory, seen = flowed[side][name], trained.ys
            theory = theory if seen.Wa is not None else theory._replace(Wa=None)
        ts = np.asarray(trained.ts)[0]
        gaps[side] = lane_gaps(Trajectory(ts, theory, True), Trajectory(trained.ts, seen, trained.ok))
    return gaps


def _gap_of_p(start: Start, p: np.ndarray, trained: Trajectory) -> np.ndarray:
    """Gaps by learning rate of the predictor's eigenvalues alone."""
    return np.max(np.abs(_modes(start, trained.ys)[0].p - p[None]), axis=(1, 2))


def _invariant(config: Config, cases: Mapping[str, Case], flowed: Mapping, trained: Mapping) -> dict:
    """Decay of W W^T - W_p^T W_p / alpha_p along flows and in networks, and what they start from."""
    decay = np.exp(-2 * config.weight_decay * config.descent.times)[:, None, None]

    def drift(path):
        kept = np.asarray(balance(path.W, path.Wp, config.predictor_rate))
        first = kept[..., :1, :, :]
        return np.max(_size(kept - decay * first) / _size(first), axis=-1)

    given = [jax.tree.map(np.asarray, cases[name]) for name in DRAWN]
    X, other, Wp = (
        np.stack(part) for part in zip(*((c.X, c.X_aug_cov, c.weights.Wp) for c in given), strict=True)
    )
    values = np.linalg.eigvalsh(X)
    return {
        "case": ("case", list(DRAWN)),
        "drift": ("case", np.array([drift(flowed[name]) for name in DRAWN])),
        "descended": ("case rate", np.array([drift(trained[name].ys) for name in DRAWN])),
        "asymmetry": ("case", _size(Wp - Wp.mT) / _size(Wp)),
        "least": ("case", values[:, 0] / values[:, -1]),
        "commutator": ("case", _size(X @ other - other @ X) / (_size(X) * _size(other))),
    }


def _size(matrices: np.ndarray) -> np.ndarray:
    """Frobenius norms."""
    return np.linalg.norm(matrices, axis=(-2, -1))


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """The decoupled equations and their invariant, what s and tau are in them, and that training follows."""
    yield _of_equations(saved)
    yield _of_invariant(config, saved)
    yield _of_matrix_invariant(saved)
    yield _of_F(config, saved)
    yield _of_tau(saved)
    yield _of_training(saved)


def _apart(saved: Saved, name: str, part: str) -> float:
    """How far the equations are from what the flow of matrices has in the same modes."""
    return largest(
        np.asarray(saved[f"equations/{name}/{part}"]) - np.asarray(saved[f"matrices/{name}/{part}"])
    )


def _of_equations(saved: Saved) -> Claim:
    words = {"aligned": "a tau for each mode", "instant": "no average"}
    return stated(
        "decoupled",
        "Once eigenspaces are aligned the dynamics is decoupled: each mode moves by itself",
        f"{SLIDE} (with a tau for each mode, and s of W W^T)",
        *(
            at_most(
                f"{text}: {part} of the equations less that of the matrices",
                _apart(saved, name, part),
                1e-7,
                why=SOLVER,
            )
            for name, text in words.items()
            for part in (("p", "s", "tau") if name == "aligned" else ("p", "s"))
        ),
        *(
            at_most(
                f"{text}: largest part of the matrices that is in none of the modes",
                saved[f"mixed/{name}"],
                1e-12,
                why=ROUNDING,
            )
            for name, text in words.items()
        ),
    )


def _of_invariant(config: Config, saved: Saved) -> Claim:
    left = np.exp(-2 * config.weight_decay * np.asarray(saved["time"]))[:, None]

    def drift(where):
        p, s = (np.asarray(saved[f"{where}/aligned/{part}"]) for part in ("p", "s"))
        c = s - p**2 / config.predictor_rate
        return largest(c - left * c[:1]), largest(c[0])

    (equations, size), (matrices, _) = drift("equations"), drift("matrices")
    return stated(
        "invariant",
        "s_j = p_j^2 / alpha_p + exp(-2 eta t) c_j at every time",
        SLIDE,
        at_most("the equations: s_j less that", equations, 1e-8, why=SOLVER),
        at_most("the flow of matrices: s_j less that", matrices, 1e-8, why=SOLVER),
        at_least("largest c_j", size, 0.1, why="there is something to decay"),
    )


def _of_matrix_invariant(saved: Saved) -> Claim:
    rate = np.asarray(saved["rate"])
    X = "X and X'"
    return stated(
        "matrix-invariant",
        "W W^T - W_p^T W_p / alpha_p decays like exp(-2 eta t), for any data and any W_p",
        f"{SLIDE} (the invariance, for matrices)",
        at_most("flows: what it is less that, over its start", largest(saved["drift"]), 1e-8, why=SOLVER),
        *(
            slope(
                f"{FOLLOWED[name]}: order in the learning rate at which descent keeps it",
                orders(rate, {"drift": drift})["drift"],
                1,
                0.1,
                why=SECOND_ORDER,
            )
            for name, drift in zip(DRAWN, np.asarray(saved["descended"]), strict=True)
        ),
        at_least(
            "least asymmetry of W_p at the start, over its size",
            np.min(saved["asymmetry"]),
            0.3,
            why="it is drawn",
        ),
        at_least(
            f"least commutator of {X}, over their sizes",
            np.min(saved["commutator"]),
            0.1,
            why="they are drawn",
        ),
        at_most(
            "least eigenvalue of a singular X over the largest",
            abs(np.asarray(saved["least"])[1]),
            1e-12,
            why=ROUNDING,
        ),
    )


def _of_F(config: Config, saved: Saved) -> Claim:
    flow, by_F = np.asarray(saved["matrices/aligned/p"]), np.asarray(saved["by_F"])
    s, F, rate = np.asarray(saved["matrices/aligned/s"])[0], np.asarray(saved["F"]), np.asarray(saved["rate"])
    return corrected(
        "correlation",
        "The s_j are eigenvalues of F = E[f f^T], the correlation of what the predictor is given; mended: of "
        "W W^T, the correlation without augmentation, which is smaller by the factor 1 + sigma^2",
        SLIDE,
        printed=[
            at_most(
                "with those of E[f f^T] for s: p less that of the matrices",
                largest(by_F - flow),
                1e-7,
                why=SOLVER,
            ),
            slope(
                "the same: order of the trained network's gap in the learning rate",
                orders(rate, {"p": np.asarray(saved["gap_by_F"])})["p"],
                1,
                0.1,
                why=SECOND_ORDER,
            ),
        ],
        mended=[
            at_most(
                "with those of W W^T: p less that of the matrices",
                _apart(saved, "aligned", "p"),
                1e-7,
                why=SOLVER,
            ),
            at_most(
                "E[f f^T] of the views over (1 + sigma^2) W W^T, less one",
                largest(F / s / (1 + config.augmentation_variance) - 1),
                1e-12,
                why=ROUNDING,
            ),
            replace(
                _order(saved, "aligned"), label="order of the trained network's gap in the learning rate"
            ),
        ],
    )


def _order(saved: Saved, name: str) -> Check:
    return first_order(saved["rate"], saved[f"gap/{name}"])[0]


def _of_tau(saved: Saved) -> Claim:
    tau, p, apart = (
        np.asarray(saved["matrices/common/tau"]),
        np.asarray(saved["matrices/common/p"]),
        np.asarray(saved["by_one_tau/p"]),
    )
    one = np.asarray(saved["by_one_tau/tau"])[:, None]
    return corrected(
        "tau",
        "All modes have one tau; mended: each has a tau of its own, since its equation has the s of the mode",
        SLIDE,
        printed=[
            at_most(
                "from one tau: its spread over modes in the flow of matrices",
                largest(np.ptp(tau, axis=1)),
                1e-7,
                why=SOLVER,
            ),
            at_most(
                "one tau, with the sum of its equations over the modes: p less that of the matrices",
                largest(apart - p),
                1e-7,
                why=SOLVER,
            ),
            at_most("the same: tau less those of the matrices", largest(one - tau), 1e-7, why=SOLVER),
        ],
        mended=[
            at_most(
                f"a tau for each mode: {part} less that of the matrices",
                _apart(saved, "common", part),
                1e-7,
                why=SOLVER,
            )
            for part in ("p", "s", "tau")
        ],
    )


def _of_training(saved: Saved) -> Claim:
    checks = []
    for name, words in FOLLOWED.items():
        checks += [
            replace(check, label=f"{words}: {check.label}")
            for check in first_order(saved["rate"], saved[f"gap/{name}"])
        ]
    return stated(
        "network",
        "A network that descends follows the decoupled equations from an aligned start, and the flow of its "
        "matrices from any start, on any data, with an average and without one",
        f"{SLIDE} (its equations for matrices are derived)",
        *checks,
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Eigenvalues of predictor and features over time, what other readings give, and gaps to the flows."""
    drawn, ((predictor, features), (readings, gaps)) = plotting.new_figure(2, 2, width=4.6)
    time = np.asarray(saved["time"])
    for ax, part, title in ((predictor, "p", "Predictor"), (features, "s", "Features without augmentation")):
        theory, trained = np.asarray(saved[f"equations/aligned/{part}"]), np.asarray(saved[f"trained/{part}"])
        lines = ax.plot(time, trained, color=f"C{part == 's':d}", **plotting.TRAINED)
        lines[0].set_label("network")
        ax.plot(time, np.sort(theory, axis=1), **plotting.THEORY)[0].set_label("decoupled equations")
        plotting.make_room(ax, below=0.3)
        plotting.finish(ax, title, "time = learning rate × step", f"eigenvalues {part}", "lower right")
    _readings_panel(readings, saved)
    shown = {
        "aligned, to the equations": "aligned/right",
        "any start, to matrices": "drawn/right",
        "the same without average": "drawn_instant/right",
        f"any start, {100 * (WRONG_FACTOR - 1):.0f} % off": "drawn/wrong",
    }
    gap = {label: np.asarray(saved[f"gap/{path}"]) for label, path in shown.items()}
    plotting.gap_panel(
        gaps, np.asarray(saved["rate"]), gap, "learning rate", "largest gap", "Gap to the flows"
    )
    plotting.make_room(gaps, above=0.25)
    return drawn


def _readings_panel(ax: Axes, saved: Saved) -> None:
    time = np.asarray(saved["time"])[1:]
    p, common = (np.asarray(saved[f"matrices/{name}/p"]) for name in ("aligned", "common"))
    errors = {
        "s of $E[ff^T]$": np.asarray(saved["by_F"]) - p,
        "one tau": np.asarray(saved["by_one_tau/p"]) - common,
        "s of $WW^T$, a tau each": np.asarray(saved["equations/aligned/p"]) - p,
    }
    for label, error in errors.items():
        ax.semilogy(time, np.maximum(np.max(np.abs(error), axis=1)[1:], 1e-12), label=label)
    plotting.make_room(ax, above=0.4)
    plotting.finish(ax, "Readings of the equations", "time", "largest error of p", "upper right")
