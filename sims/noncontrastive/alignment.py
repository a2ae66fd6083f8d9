"""Eigenspaces of the predictor and of features come to agree in linear BYOL; DirectPred sets them so.

The commutator L = F W_p - W_p F of F = W W^T with the predictor obeys L' = -(L K + K L). Flows from random
starts tell what the sign of K is needed for; flows whose predictor has no symmetry, and networks that are
trained on exact moments and on batches, tell what is left of it where the assumptions do not hold at first.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics.flow import Trajectory
from dynamics.noncontrastive import (
    ByolWeights,
    alignment_matrix,
    byol_flow,
    fixed_points,
    isotropic_flow,
    predictor_measures,
)
from dynamics.spectra import after
from models.byol import LinearByol, byol_loss, byol_weights, exact_views, flow_gradient, with_average
from models.draws import normal
from models.functional import as_function
from models.predictors import directpred, running_correlation
from models.self_supervised import batch_of_views
from models.training import Descent, train
from sims import plotting
from sims.claims import (
    ROUNDING,
    Check,
    Claim,
    Preset,
    at_least,
    at_most,
    every,
    qualified,
    stated,
)
from sims.compare import SOLVE, first_order, lane_gaps, largest, require_ok, right_and_wrong
from sims.ranges import Count, NonNegative, Positive, Range, check_ranges
from sims.results import Context, Saved

THEOREM = "tian2021directpred, Theorem 3"
SLIDE = "tian2021directpred, the talk's slide on DirectPred"
TIGHT: dict[str, Any] = {**SOLVE, "rtol": 1e-9, "atol": 1e-12}
FALLEN = 1e-6  # of its start: what has aligned


class Setting(NamedTuple):
    """Rates of the isotropic flow, and whether it starts close to where modes end."""

    tau: Any = 1.0
    predictor_rate: Any = 1.0
    weight_decay: Any = 0.04
    near: Any = False


SETTINGS = {
    "plain": Setting(),
    "fast_predictor": Setting(predictor_rate=2.0),
    "slow_predictor": Setting(predictor_rate=0.5),
    "no_decay": Setting(weight_decay=0.0),
    "small_target": Setting(tau=0.6),
    "near": Setting(near=True),
    "strong_decay": Setting(weight_decay=0.15),
}
INSIDE = ("near", "strong_decay")  # where K is positive
OUTSIDE = tuple(name for name in SETTINGS if name not in INSIDE)
# Whether a predictor is set in the slide's form, and whether the loss is that of normalized outputs.
DIRECT = {"paper": (True, False), "scaled": (False, True), "scaled_plain": (False, False)}
MOMENTUM = 0.9  # of the optimizer on batches


@dataclass(frozen=True)
class Config:
    """The flows, and the training of networks beside them."""

    inputs: Annotated[int, Range(at_least=3)] = 8
    """Dimension of the inputs."""
    outputs: Annotated[int, Range(at_least=3)] = 5
    """Dimension of the outputs, at most that of the inputs."""
    augmentation_variance: Positive = 0.25
    """Variance of the augmentation; inputs have variance one in every direction."""
    ema_rate: Positive = 0.5
    """Rate of the target's moving average, per unit of time."""
    weight_decay: Positive = 0.04
    """Weight decay of flows and networks with a target of their own."""
    draws: Annotated[int, Range(at_least=2)] = 16
    """Random starts of every flow."""
    duration: Annotated[float, Range(at_least=80)] = 80.0
    """Time at which flows end, with a record at every half."""
    descent: Descent = Descent(horizon=10.0, points=25, substeps=(4, 12, 40, 120, 400))
    """Training on exact moments, at several learning rates."""
    samples: Annotated[int, Range(at_least=64)] = 512
    """Samples, of which batches are drawn."""
    batch: Count = 256
    """Samples in a batch."""
    rate: Positive = 0.002
    """Learning rate on batches; momentum makes it ten times as large."""
    epsilon: NonNegative = 0.01
    """Regularization of the predictor that is set."""
    memory: Annotated[float, Range(at_least=0, below=1)] = 0.3
    """Share of the old in the running correlation."""

    def __post_init__(self):
        check_ranges(self)
        if self.outputs > self.inputs:
            raise ValueError(f"outputs must be at most inputs = {self.inputs}, got {self.outputs}")
        if self.samples <= self.inputs:
            raise ValueError(f"samples must be more than inputs = {self.inputs}, got {self.samples}")

    @property
    def times(self) -> np.ndarray:
        """Times of the records of flows."""
        return np.linspace(0, self.duration, 2 * round(self.duration) + 1)

    @property
    def speed(self) -> float:
        """Time of a step on batches."""
        return self.rate / (1 - MOMENTUM)

    @property
    def every(self) -> int:
        """Steps on batches between two records, of which there are a hundred."""
        return max(1, round(self.duration / self.speed / 100))


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(Config(), draws=48),
    "paper": replace(Config(), inputs=24, outputs=12, draws=48, samples=2048, rate=0.001),
}


@partial(jax.jit, static_argnames="shape")
def _normal(key: Array, shape: tuple[int, ...]) -> Array:
    return normal(key, shape)


def _turned(values: Any, matrix: np.ndarray) -> np.ndarray:
    """Symmetric matrices with given eigenvalues, and eigenvectors at random."""
    U = np.linalg.qr(matrix)[0]
    return U * values @ U.mT


# The isotropic flow


@partial(jax.jit, static_argnames="sigma2")
def _isotropic(sigma2: float, settings: Any, F: Array, Wp: Array, ts: Array) -> tuple[Trajectory, Array]:
    """Flows by setting and draw, and the matrices K along them."""

    def one(setting, F, Wp):
        tau, alpha_p, eta, _ = setting
        rates = {"augmentation_variance": sigma2, "predictor_rate": alpha_p, "weight_decay": eta}
        path = isotropic_flow(F, Wp, tau, ts, **rates, **TIGHT)
        return path, alignment_matrix(path.ys.F, path.ys.Wp, tau, **rates)

    return _folded(one, settings, (F, Wp))


def _folded(f: Any, outer: Any, inner: Any) -> Any:
    """`f` of every lane of `outer` with its lanes of `inner`, (outer, inner, ...), in one batch."""
    sizes = jax.tree.leaves(inner)[0].shape[:2]
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), inner)
    found = jax.vmap(lambda one, parts: f(one, *parts))(
        jax.tree.map(lambda leaf: jnp.repeat(leaf, sizes[1], axis=0), outer), flat
    )
    return jax.tree.map(lambda leaf: leaf.reshape(*sizes, *leaf.shape[1:]), found)


@jax.jit
def _speeds(settings: Any, sigma2: Array, W: Array, Wp: Array) -> ByolWeights:
    """How gradients of the network's own loss move it, by setting and state, with a target tau W."""
    n = W.shape[-1]
    views = exact_views(jnp.eye(n), sigma2 * jnp.eye(n))

    def one(setting, W, Wp):
        tau, alpha_p, eta, _ = setting
        predict, params = as_function(LinearByol(ByolWeights(W, Wp, tau * W)))
        g = byol_weights(jax.grad(partial(byol_loss, predict))(params, views))
        return ByolWeights(-g.W - eta * W, -alpha_p * g.Wp - eta * Wp, g.Wa)

    return jax.vmap(jax.vmap(one, (None, 0, 0)))(settings, W, Wp)


def _commutator(A: np.ndarray, B: np.ndarray) -> np.ndarray:
    return A @ B - B @ A


def _size(matrices: np.ndarray) -> np.ndarray:
    return np.linalg.norm(matrices, axis=(-2, -1))


def _theorem(config: Config, key: Array) -> dict:
    """Commutators and K by setting, draw and time, and how well the equation holds for the loss itself."""
    n, sigma2, ts = config.outputs, config.augmentation_variance, config.times
    settings = Setting(*(np.array(part, float) for part in zip(*SETTINGS.values(), strict=True)))
    drawn = np.asarray(_normal(key, (2, config.draws, n, n)))
    s, p = (
        np.stack([np.linspace(*ends, n) for ends in pair])
        for pair in (((0.002, 1), (0.5, 1)), ((0.1, 1), (0.6, 1)))
    )
    near = np.asarray(settings.near, int)
    F, Wp = (
        _turned(values[near][:, None, None], part[None]) for values, part in zip((s, p), drawn, strict=True)
    )
    path, K = jax.device_get(_isotropic(sigma2, settings, F, Wp, ts))
    require_ok("the isotropic flow", path)
    (F, Wp), lowest = path.ys, np.linalg.eigvalsh(K)[..., 0]
    L = _commutator(F, Wp)
    # States that are not aligned yet, where no digits are lost in the commutator.
    early = [np.moveaxis(part[:, :, :9:4], 2, 1).reshape(len(SETTINGS), -1, n, n) for part in (F, Wp, K)]
    F0, Wp0, K0 = early
    W0 = np.linalg.cholesky(F0)
    dW, dWp, _ = jax.device_get(_speeds(settings, np.asarray(sigma2), W0, Wp0))
    dF, L0 = dW @ W0.mT + W0 @ dW.mT, _commutator(F0, Wp0)
    expected = -(L0 @ K0 + K0 @ L0)

    def miss(dWp):
        moved = _commutator(dF, Wp0) + _commutator(F0, dWp)
        return np.max(_size(moved - expected) / _size(expected), axis=1)

    return {
        "commutator": ("setting draw time", _size(L)),
        "aligned": ("setting draw", _size(L[:, :, -1]) / _size(F[:, :, -1]) / _size(Wp[:, :, -1])),
        "lowest": ("setting draw time", lowest),
        "miss": {"symmetrized": ("setting", miss((dWp + dWp.mT) / 2)), "as_it_is": ("setting", miss(dWp))},
    }


# Flows and networks whose predictor has no symmetry


@partial(jax.jit, static_argnames="config")
def _flows(config: Config, weights: ByolWeights, etas: Array, ts: Array) -> tuple[Trajectory, Any]:
    """Flows by weight decay and draw, and what is observed along them."""
    X = jnp.eye(config.inputs)

    def one(eta, W, Wp, Wa):
        rates = {"predictor_rate": 1.0, "ema_rate": config.ema_rate, "weight_decay": eta}
        return byol_flow(W, Wp, Wa, X, config.augmentation_variance * X, ts, **rates, **TIGHT)

    twice = jax.tree.map(lambda leaf: jnp.stack([leaf] * len(etas)), weights)
    paths = _folded(one, etas, twice)
    return paths, predictor_measures(paths.ys.W, paths.ys.Wp)


def _seen(params: Any) -> tuple[Array, Array]:
    """Alignment and asymmetry of a network."""
    found = predictor_measures(*byol_weights(params)[:2])
    return found.commutator, found.asymmetry


@partial(jax.jit, static_argnames="config")
def _descended(config: Config, weights: ByolWeights) -> Trajectory:
    """A network that descends on exact moments, at several learning rates."""
    X = jnp.eye(config.inputs)
    predict, params = as_function(LinearByol(weights))
    loss = Partial(byol_loss, predict, views=exact_views(X, config.augmentation_variance * X))
    gradient = flow_gradient(ema_rate=config.ema_rate, weight_decay=config.weight_decay)
    return config.descent.train(loss, params, _seen, gradient)[1]


def _on_batches(config: Config) -> optax.GradientTransformation:
    """Descent with momentum and weight decay, and a target of the rate of the flows."""
    inner = optax.chain(
        optax.add_decayed_weights(config.weight_decay), optax.sgd(config.rate, momentum=MOMENTUM)
    )
    return with_average(inner, 1 - config.ema_rate * config.speed)


@partial(jax.jit, static_argnames="config")
def _sampled(config: Config, weights: ByolWeights, x: Array, key: Array) -> Trajectory:
    """A network with a predictor that is trained on batches."""
    predict, params = as_function(LinearByol(weights))
    return train(
        lambda params, views: byol_loss(predict, params, views),
        params,
        _on_batches(config),
        steps=100 * config.every,
        every=config.every,
        observe=_seen,
        batches=lambda key: batch_of_views(key, x, config.batch, config.augmentation_variance),
        key=key,
        time_step=config.speed,
    )[1]


@partial(jax.jit, static_argnames="config")
def _set(config: Config, how: Any, weights: ByolWeights, x: Array, key: Array) -> dict:
    """Networks whose predictors are set at every step, what these commute with, and the features."""
    return jax.vmap(lambda paper, normalized: _set_one(config, paper, normalized, weights, x, key))(*how)


def _set_one(config: Config, paper: Array, normalized: Array, weights: ByolWeights, x: Array, key: Array):
    optimizer = _on_batches(config)

    def views(step):
        drawn = jax.random.fold_in(key, step)
        return batch_of_views(drawn, x, config.batch, config.augmentation_variance)

    def loss(params, predict, batch):
        parts = predict(params, batch)
        sizes = (jnp.where(normalized, jnp.linalg.norm(part, axis=1, keepdims=True), 1) for part in parts)
        predicted, held = (part / size for part, size in zip(parts, sizes, strict=True))
        return jnp.mean(jnp.sum((predicted - held) ** 2, axis=1)) / 2

    def predictor(F):
        printed = directpred(F, config.epsilon, "paper")
        return jnp.where(paper, printed, directpred(after(printed, F), config.epsilon, "scaled"))

    def apart(F, Wp):
        return jnp.linalg.norm(F @ Wp - Wp @ F) / (jnp.linalg.norm(F) * jnp.linalg.norm(Wp))

    def step(state, count):
        params, optimizer_state, F = state
        batch, now = views(count), byol_weights(params)
        z = jnp.concatenate(batch) @ now.W.T
        F = running_correlation(F, z, config.memory)
        Wp = predictor(F)
        predict, _ = as_function(LinearByol(now._replace(Wp=Wp), train_predictor=False))
        gradient = jax.grad(loss)(params, predict, batch)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        seen = {"running": apart(F, Wp), "batch": apart(z.T @ z / len(z), Wp), "W": now.W}
        return (optax.apply_updates(params, updates), optimizer_state, F), seen

    z = jnp.concatenate(views(0)) @ weights.W.T
    params = as_function(LinearByol(weights, train_predictor=False))[1]
    state = params, optimizer.init(params), z.T @ z / len(z)
    _, seen = jax.lax.scan(step, state, jnp.arange(100 * config.every + 1))
    W = seen.pop("W")[:: config.every]
    return seen | {"s": jnp.linalg.eigvalsh(W @ W.mT)}


def _beside(config: Config, key: Array) -> dict:
    """Flows of matrices of no symmetry, and networks from the same starts."""
    n1, n2, ts = config.inputs, config.outputs, config.times
    first, second, data, *keys = jax.random.split(key, 6)
    W = np.asarray(_normal(first, (config.draws, n2, n1))) / n1**0.5
    Wp = np.eye(n2) / 2 + np.asarray(_normal(second, (config.draws, n2, n2))) / 2 / n2**0.5
    weights, etas = ByolWeights(W, Wp, W), np.array([config.weight_decay, 0.0])
    one = jax.tree.map(lambda leaf: leaf[0], weights)
    trained = jax.device_get(_descended(config, one))
    marks = right_and_wrong(lambda factor: factor * config.descent.times)
    times = np.unique(np.concatenate([ts, *marks.values()]))
    paths, found = jax.device_get(_flows(config, weights, etas, times))
    gaps = {}
    for side, moments in marks.items():
        at = np.searchsorted(times, moments)
        theory = found.commutator[0, 0, at], found.asymmetry[0, 0, at]
        gaps[side] = lane_gaps(Trajectory(config.descent.times, theory, True), trained)
    at = np.searchsorted(times, ts)
    # Samples whose covariance is the identity.
    x = np.asarray(_normal(data, (config.samples, n1)))
    x = np.linalg.svd(x, full_matrices=False)[0] * config.samples**0.5
    sampled = jax.device_get(_sampled(config, one, x, keys[0]))
    require_ok("flows and training", paths, trained, sampled)
    how = tuple(np.array(part) for part in zip(*DIRECT.values(), strict=True))
    given = jax.device_get(_set(config, how, one, x, keys[1]))
    p_plus = fixed_points(1.0, config.weight_decay, config.augmentation_variance).p_plus
    values = np.linalg.svd(paths.ys.Wp[0, :, -1], compute_uv=False)
    return {
        "decay": ("decay", etas),
        "flow": {
            "commutator": ("decay draw time", found.commutator[:, :, at]),
            "asymmetry": ("decay draw time", found.asymmetry[:, :, at]),
            "end": ("draw value", values),
        },
        "rate": ("rate", config.descent.rates),
        "gap": ("rate", gaps),
        "moment": ("moment", sampled.ts),
        "sampled": ("moment", dict(zip(("commutator", "asymmetry"), sampled.ys, strict=True))),
        "p_plus": p_plus,
        "direct": {
            name: {
                "running": ("step", given["running"][index]),
                "batch": ("step", given["batch"][index]),
                "s": ("moment value", given["s"][index]),
            }
            for index, name in enumerate(DIRECT)
        },
    }


def run(config: Config, context: Context) -> dict:
    """The isotropic flow in all settings, and flows and networks without its assumptions."""
    first, second = jax.random.split(jax.random.key(context.seed))
    context.progress("the isotropic flow", 0.0)
    theorem = _theorem(config, first)
    context.progress("flows of matrices and networks", 0.4)
    return {
        "setting": ("setting", list(SETTINGS)),
        "time": ("time", config.times),
        "theorem": theorem,
        **_beside(config, second),
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """The equation of the commutator and what it needs, alignment without its assumptions, and DirectPred."""
    yield _of_equation(saved)
    yield _of_theorem(config, saved)
    yield _of_rates(saved)
    yield _of_symmetry(saved)
    yield _of_networks(saved)
    yield _of_set_predictors(saved)
    yield _of_no_collapse(config, saved)


def _by_setting(saved: Saved, path: str) -> dict[str, np.ndarray]:
    return dict(zip(SETTINGS, np.asarray(saved[f"theorem/{path}"]), strict=True))


def _of_equation(saved: Saved) -> Claim:
    label = "gradients of a network's own loss: derivative of [F, W_p] less -(LK + KL), over it"
    return qualified(
        "equation",
        "L = F W_p - W_p F moves by L' = -(L K + K L), K = (1 + sigma^2) (alpha_p F / 2 + W_p^2) - tau W_p + "
        "(3 / 2) eta",
        f"{THEOREM} (its dynamics)",
        condition="the predictor is symmetric, and its gradient is made so",
        inside=[at_most(label, largest(saved["theorem/miss/symmetrized"]), 1e-12, why=ROUNDING)],
        outside=[
            at_least(
                "the gradient as it is: the same, least of all settings",
                np.min(saved["theorem/miss/as_it_is"]),
                0.01,
                why="the antisymmetric part moves L too",
            )
        ],
    )


BOUND = "all times: |L| / |L(0)| less exp(-2 lambda_0 t)"
ALIGNS = "largest |L| / (|F| |W_p|) at the end"


def _of_theorem(config: Config, saved: Saved) -> Claim:
    return qualified(
        "theorem",
        "F W_p - W_p F goes to zero, and the eigenspaces align",
        THEOREM,
        condition="the least eigenvalue of K(t) is at least some lambda_0 > 0; it also does so without that",
        inside=_where_positive(config, saved),
        outside=_where_not(saved),
    )


def _least(saved: Saved) -> dict[str, np.ndarray]:
    """The lambda_0 of every start, by setting: the least eigenvalue of K at all times."""
    return {name: np.min(values, axis=-1) for name, values in _by_setting(saved, "lowest").items()}


def _over_bound(saved: Saved, names: Iterable[str]) -> float:
    """The largest excess of the commutator over its bound exp(-2 lambda_0 t) |L(0)|, over |L(0)|."""
    commutator, least, time = _by_setting(saved, "commutator"), _least(saved), np.asarray(saved["time"])
    excess = [
        commutator[name] / commutator[name][:, :1] - np.exp(-2 * least[name][:, None] * time)
        for name in names
    ]
    return float(np.max(excess))


def _where_positive(config: Config, saved: Saved) -> list[Check]:
    least, end, strong = _least(saved), _by_setting(saved, "aligned"), SETTINGS["strong_decay"]
    floor = 1.5 * strong.weight_decay - strong.tau**2 / (4 * (1 + config.augmentation_variance))
    return [
        at_least(
            "starts near the end of modes: lambda_0",
            np.min(least["near"]),
            0.01,
            why="K is positive there",
        ),
        at_least(
            "weight decay above 2/3 of the critical one: lambda_0",
            np.min(least["strong_decay"]),
            floor,
            1e-9,
            why="no p makes (1 + sigma^2) p^2 - tau p lower than -tau^2 / (4 (1 + sigma^2))",
        ),
        at_most(BOUND, _over_bound(saved, INSIDE), 0, 1e-9, why="the equation gives it; the solver's error"),
        at_most(
            ALIGNS,
            largest([end[name] for name in INSIDE]),
            FALLEN,
            why="exponential decay over the time",
        ),
    ]


def _where_not(saved: Saved) -> list[Check]:
    least, end = _least(saved), _by_setting(saved, "aligned")
    decaying = [name for name in OUTSIDE if name not in ("no_decay", "small_target")]
    return [
        every(
            "tau = 1 and eta = 0.04: starts with lambda_0 < 0",
            np.concatenate([least[name] < 0 for name in decaying]),
        ),
        *(
            at_most(
                f"{words}: least lambda_0",
                np.min(least[name]),
                -1e-3,
                why="it is negative, but for few starts",
            )
            for name, words in (("no_decay", "eta = 0"), ("small_target", "tau = 0.6"))
        ),
        at_most(BOUND, _over_bound(saved, OUTSIDE), 0, 1e-9, why="it holds, and allows growth"),
        at_most(
            f"tau = 1 and weight decay: {ALIGNS}",
            largest([end[name] for name in decaying]),
            FALLEN,
            why="K is positive once modes have grown",
        ),
        at_most(
            f"no weight decay, and tau = 0.6: {ALIGNS}",
            largest([end[name] for name in ("no_decay", "small_target")]),
            1e-3,
            why="the same, but slower",
        ),
    ]


def _falls(saved: Saved) -> dict[str, np.ndarray]:
    """The time at which the commutator is a millionth of its start, by draw; infinite where it never is."""
    time, found = np.asarray(saved["time"]), {}
    for name, values in _by_setting(saved, "commutator").items():
        share = values / values[:, :1]
        below = share <= FALLEN
        found[name] = np.where(np.any(below, axis=1), time[np.argmax(below, axis=1)], np.inf)
        found[name] = np.where(np.isfinite(share).all(axis=1), found[name], np.nan)
    return found


def _of_rates(saved: Saved) -> Claim:
    falls = _falls(saved)
    sooner, later = falls["plain"] < falls["no_decay"], falls["no_decay"] < falls["plain"]
    stronger = falls["strong_decay"] < falls["plain"]
    most = "more weight decay is faster in the end, and not all along"
    return qualified(
        "rates",
        "Eigenspaces align faster with a faster predictor, and with more weight decay",
        f"{THEOREM} (by its matrix K)",
        condition="for weight decay most starts are meant: some align later with more of it",
        inside=[
            every(
                "alpha_p 1 / 2, 1: starts that align sooner with the larger",
                falls["slow_predictor"] > falls["plain"],
            ),
            every("alpha_p 1, 2: the same", falls["plain"] > falls["fast_predictor"]),
            every("eta 0, 0.04: the same", sooner, (sooner.size - 1) // 2, why=most),
            every("eta 0.04, 0.15: the same", stronger, (stronger.size - 1) // 2, why=most),
        ],
        outside=[
            at_least("eta 0, 0.04: starts that align later with the larger", np.sum(later), 1, why=most)
        ],
    )


def _of_symmetry(saved: Saved) -> Claim:
    time = np.asarray(saved["time"])
    at = np.searchsorted(time, (0, 10, 20, 40, 80))
    commutator, asymmetry = (
        np.asarray(saved[f"flow/{name}"])[:, :, at] for name in ("commutator", "asymmetry")
    )
    left = np.exp(-np.max(saved["decay"]) * 80)
    alone = "exp(-eta t), what weight decay alone leaves"
    values = np.asarray(saved["flow/end"])
    return qualified(
        "symmetry",
        "W_p becomes symmetric, and its eigenspaces those of F",
        f"{THEOREM} (its assumption of symmetry)",
        condition="there is weight decay; without it most starts take longer, and some far longer",
        inside=[
            every(
                "asymmetry of all starts: t = 0, 10, 20, 40, 80 with less than before",
                np.diff(asymmetry[0]) < 0,
            ),
            every("commutator: the same", np.diff(commutator[0]) < 0),
            at_most(
                "asymmetry at 80 over that at 0",
                largest(asymmetry[0, :, -1] / asymmetry[0, :, 0]),
                left,
                why=alone,
            ),
            at_most(
                "commutator at 80 over that at 0",
                largest(commutator[0, :, -1] / commutator[0, :, 0]),
                left,
                why=alone,
            ),
            at_most(
                "singular values of W_p at 80: distance from p+, or from 0 where that is nearer",
                largest(np.minimum(values, np.abs(values - np.asarray(saved["p_plus"])))),
                left,
                why="these are where modes end; " + alone,
            ),
        ],
        outside=[
            at_least(
                "no weight decay: asymmetry at 80 over that at 0, of the start that keeps most",
                np.max(asymmetry[1, :, -1] / asymmetry[0, :, 0]),
                left,
                why="what is out of balance stays so",
            ),
            every(
                "no weight decay: starts with more asymmetry at 80 than with it",
                asymmetry[1, :, -1] > asymmetry[0, :, -1],
                (asymmetry.shape[1] - 1) // 2,
                why="most starts are meant",
            ),
        ],
    )


def _of_networks(saved: Saved) -> Claim:
    sampled = {name: np.asarray(saved[f"sampled/{name}"]) for name in ("commutator", "asymmetry")}
    return stated(
        "networks",
        "Networks with a trained predictor align: as the flow of matrices on exact moments, and on batches",
        f"{THEOREM} (in networks)",
        *first_order(saved["rate"], saved["gap"]),
        *(
            at_most(
                f"batches, momentum and an averaged target: {name} at the end over that at the start",
                values[-1] / values[0],
                0.1,
                why="the flow leaves less than 0.001; what is left is of the sampling",
            )
            for name, values in sampled.items()
        ),
    )


def _of_set_predictors(saved: Saved) -> Claim:
    words = {
        "paper": "the slide's form",
        "scaled": "the public code's, outputs normalized",
        "scaled_plain": "the public code's, outputs as they are",
    }
    label = "|F W_p - W_p F| / (|F| |W_p|)"
    return qualified(
        "directpred",
        "A predictor that is set from the eigenvectors of the estimate of F is guaranteed to be aligned",
        SLIDE,
        condition="F is the running estimate; that of a batch is not the same",
        inside=[
            at_most(
                f"{text}: largest {label} of all steps",
                largest(saved[f"direct/{name}/running"]),
                1e-12,
                why=ROUNDING,
            )
            for name, text in words.items()
        ],
        outside=[
            at_least(
                f"{text}, with the batch's F: least of all steps but the first",
                np.min(np.asarray(saved[f"direct/{name}/batch"])[1:]),
                1e-6,
                why="the estimate lags, and batches differ; rounding is far below",
            )
            for name, text in words.items()
        ],
    )


def _of_no_collapse(config: Config, saved: Saved) -> Claim:
    paper, scaled, plain = (np.asarray(saved[f"direct/{name}/s"]) for name in DIRECT)
    s = (1 + config.augmentation_variance) * paper[-1]
    p, p_plus = np.sqrt(s) + config.epsilon * np.max(s), np.asarray(saved["p_plus"])
    return qualified(
        "set-no-collapse",
        "Linear BYOL does not collapse with a predictor that is set, and not trained",
        SLIDE,
        condition="the predictor has the slide's form, or, in the public code's, outputs are normalized",
        inside=[
            at_most(
                "the slide's form: p_j at the end over p+, less one",
                largest(p / p_plus - 1),
                0.05,
                why="batches differ by a few percent",
            ),
            at_least(
                "the public code's, outputs normalized: least s_j over the largest",
                np.min(scaled[-1]) / np.max(scaled[-1]),
                0.1,
                why="all modes are kept alike",
            ),
        ],
        outside=[
            at_most(
                "the public code's, outputs as they are: largest s_j at the end over that at the start",
                np.max(plain[-1]) / np.max(plain[0]),
                0.01,
                why="the largest p is above 1 / (1 + sigma^2) however small F is",
            )
        ],
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Commutators and K in the isotropic flow, what has no symmetry at first, and predictors that are set."""
    drawn, ((commutators, eigenvalues, free), (gaps, direct, features)) = plotting.new_figure(2, 3, width=4.4)
    _isotropic_panels(commutators, eigenvalues, saved)
    _free_panel(free, saved)
    gap = {"flow": np.asarray(saved["gap/right"]), "2 % off": np.asarray(saved["gap/wrong"])}
    rate = np.asarray(saved["rate"])
    plotting.gap_panel(
        gaps, rate, gap, "learning rate", "largest gap", "Alignment and asymmetry: gap to the flow"
    )
    plotting.make_room(gaps, above=0.2)
    _direct_panels(direct, features, config, saved)
    return drawn


WORDS = {
    "plain": "plain",
    "fast_predictor": "predictor twice as fast",
    "slow_predictor": "half as fast",
    "no_decay": "no weight decay",
    "small_target": "target 0.6 of W",
    "near": "start near the end",
    "strong_decay": "strong weight decay",
}
TIME = "time = learning rate × step"


def _isotropic_panels(commutators: Axes, eigenvalues: Axes, saved: Saved) -> None:
    time = np.asarray(saved["time"])
    share, lowest = (_by_setting(saved, path) for path in ("commutator", "lowest"))
    for index, (name, text) in enumerate(WORDS.items()):
        style = "-" if name in INSIDE else "--"
        values = share[name][0] / share[name][0, 0]
        commutators.semilogy(time, np.maximum(values, 1e-15), style, color=f"C{index}", label=text)
        eigenvalues.plot(time, lowest[name][0], style, color=f"C{index}")
    eigenvalues.axhline(0, color="grey", lw=0.8)
    plotting.make_room(commutators, above=0.75)
    commutators.set_yticks([1e-15, 1e-10, 1e-5, 1])
    legend = {"loc": "upper right", "ncols": 2, "fontsize": "small"}
    plotting.finish(commutators, "Isotropic flow: commutator", "time", "|L| over its start", legend)
    plotting.finish(eigenvalues, "The same: is K positive?", "time", "least eigenvalue of K", xlim=(0, 30))


def _free_panel(ax: Axes, saved: Saved) -> None:
    time, moment = np.asarray(saved["time"]), np.asarray(saved["moment"])
    for index, name in enumerate(("commutator", "asymmetry")):
        with_decay, without = np.asarray(saved[f"flow/{name}"])[:, 0]
        ax.semilogy(time, with_decay, color=f"C{index}", label=f"{name}, flow")
        ax.semilogy(time, without, "--", color=f"C{index}", label="no weight decay")
        ax.semilogy(moment, np.asarray(saved[f"sampled/{name}"]), ":", color=f"C{index}", label="on batches")
    plotting.make_room(ax, above=0.45)
    plotting.finish(
        ax,
        "No symmetry at the start",
        TIME,
        "relative size",
        {"loc": "upper right", "ncols": 2, "fontsize": "small"},
    )


def _direct_panels(direct: Axes, features: Axes, config: Config, saved: Saved) -> None:
    moment = np.asarray(saved["moment"])
    for index, (name, text) in enumerate((("paper", "slide"), ("scaled", "code"))):
        for part, style in (("running", "-"), ("batch", "--")):
            values = np.asarray(saved[f"direct/{name}/{part}"])[:: config.every]
            label = f"{text}, {'running' if part == 'running' else 'batch'} F"
            direct.semilogy(moment, np.maximum(values, 1e-17), style, color=f"C{index}", label=label)
    for index, (name, text) in enumerate(
        (("paper", "slide"), ("scaled", "code, normalized"), ("scaled_plain", "code"))
    ):
        lines = features.semilogy(moment, np.asarray(saved[f"direct/{name}/s"]), color=f"C{index}")
        lines[0].set_label(text)
    plotting.make_room(direct, above=0.45)
    legend = {"loc": "upper right", "ncols": 2, "fontsize": "small"}
    plotting.finish(direct, "DirectPred: alignment", TIME, "|F W_p - W_p F| / (|F| |W_p|)", legend)
    plotting.make_room(features, below=0.1)
    plotting.finish(features, "DirectPred: features", TIME, "eigenvalues of F", "lower left")
