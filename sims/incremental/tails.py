"""A loss with an exponential tail: products that never stop growing, and what a ridge changes.

The logistic loss of labels that a linear function separates has no minimum. Its flow enters the first stage
when the theory says, but later no stationary point is left to come to: at a fixed rescaled time the products
are the larger the smaller alpha is. With a small ridge on the products, (r / 2) |u v|^2, there is a minimum,
and the flow tends to the staircase of the greedy algorithm as it does for squared losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics import incremental
from dynamics.flow import Trajectory
from models.losses import bind
from models.training import Descent, map_lanes
from sims import plotting
from sims.claims import Claim, Preset, at_least, at_most, every, qualified, slope, stated
from sims.compare import SOLVE, WRONG_FACTOR, convergence_order, first_order, lane, lane_gaps, require_ok
from sims.ranges import Count, Length, Positive, Range, check_ranges
from sims.results import Context, Saved

LOG10 = float(np.log(10))
SIZE, STAGES = 6, 14  # products; stages that there is room for
FIRST, SECOND = 1.0, 0.5  # the factors at the start, over alpha
SEEN = 0.1  # a product of this size is active


@dataclass(frozen=True)
class Config:
    """Problems, starts and learning rates."""

    instances: Annotated[int, Range(at_least=2)] = 8
    """Random problems; the one with the earliest last jump is drawn and trained."""
    samples: Annotated[int, Range(at_least=SIZE)] = 40
    """Samples of each."""
    ridge: Positive = 0.03
    """The ridge r on the products."""
    powers: Annotated[tuple[Count, ...], Length(3)] = (4, 8, 16, 32)
    """Starts alpha = 10^-power, each the square of the one before."""
    end: Positive = 60.0
    """Rescaled time at which the flows end."""
    points: Annotated[int, Range(at_least=50)] = 1500
    """Times of the flow, equally spaced in their logarithm."""
    power: Count = 2
    """Start of the network that is trained."""
    records: Count = 60
    """Records along a training."""
    substeps: Annotated[tuple[Count, ...], Length(2)] = (20, 40, 80, 160)
    """Steps between two records, one per learning rate."""

    def __post_init__(self):
        check_ranges(self)
        if any(2 * one != other for one, other in zip(self.powers, self.powers[1:], strict=False)):
            raise ValueError(f"powers must double from one to the next, got {self.powers}")


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(Config(), instances=12, powers=(4, 8, 16, 32, 64, 128), points=4000),
    "paper": replace(Config(), instances=40, powers=(4, 8, 16, 32, 64, 128, 256, 512), points=4000),
}


def _loss(beta: Array, data: tuple[Any, Any, Any]) -> Array:
    """Logistic loss of margins Z beta with a ridge on beta, times a factor."""
    Z, ridge, factor = data
    return factor * (jnp.mean(jax.nn.softplus(-Z @ beta)) + ridge / 2 * jnp.sum(beta**2))


def _loss_of_factors(params: dict[str, Array], data: tuple[Any, Any, Any]) -> Array:
    return _loss(_products(params), data)


def _products(params: dict[str, Array]) -> Array:
    return params["u"] * params["v"]


def _margins(seed: int, config: Config) -> np.ndarray:
    """Gaussian inputs times labels in {-1, 1} that a Gaussian teacher gives them, (instance, N, p)."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(config.instances, config.samples, SIZE))
    teachers = rng.normal(size=(config.instances, SIZE, 1))
    return X * np.sign(X @ teachers)


def _flow(data: Any, lam: Any, taus: Any) -> Trajectory:
    u0, v0, g = jnp.full(SIZE, FIRST), jnp.full(SIZE, SECOND), incremental.negative_gradient(_loss, data)
    path = incremental.log_flow(g, u0, v0, lam, taus, solver=diffrax.Dopri8(), rtol=1e-9, atol=1e-11, **SOLVE)
    return Trajectory(taus, path.ys.beta, path.ok)


@eqx.filter_jit
def _flows(Z: Array, ridges: Array, lams: Array, taus: Array) -> Trajectory:
    """The products along the flows, (instance, ridge, alpha, time, product)."""

    def over_alphas(Z, ridge):
        return map_lanes(lambda lam: _flow((Z, ridge, 1.0), lam, taus), lams, at_once=1)

    def over_ridges(Z):
        return map_lanes(partial(over_alphas, Z), ridges, at_once=1)

    # One after the other, which compiles more quickly than all side by side.
    return map_lanes(over_ridges, Z, at_once=1)


@jax.jit
def _distances(path: Any, taus: Array, beta: Array) -> Array:
    return jax.vmap(lambda one: incremental.staircase_distance(path, taus, one))(beta)


def _by_last_jump(config: Config, Z: np.ndarray) -> tuple[np.ndarray, list[Any]]:
    """The problems and their greedy paths with the ridge, by the time of the last jump."""
    g = [incremental.negative_gradient(_loss, (margins, config.ridge, 1.0)) for margins in Z]
    paths = [jax.device_get(incremental.greedy(one, SIZE, max_stages=STAGES)) for one in g]
    order = np.argsort([np.max(path.times[np.isfinite(path.times)]) for path in paths])
    return Z[order], [paths[index] for index in order]


def _staircases(paths: list[Any], taus: np.ndarray, beta: np.ndarray) -> dict[str, Any]:
    """Distances of the flows (instance, alpha, ...) with the ridge to the greedy paths."""
    distances = [_distances(path, taus, flows) for path, flows in zip(paths, beta, strict=True)]
    return {
        "complete": ("instance", np.array([path.complete for path in paths])),
        "distance": ("instance power", jax.device_get(distances)),
        "staircase": ("time product", incremental.staircase(paths[0], taus)),
    }


def _active_from(taus: np.ndarray, size: np.ndarray) -> np.ndarray:
    """When products are active, (...), from their sizes (..., time), whose logarithms are linear then."""
    place = np.argmax(size > SEEN, axis=-1)[..., None]
    before, after = (np.log(np.take_along_axis(size, place - late, axis=-1)[..., 0]) for late in (1, 0))
    share = (np.log(SEEN) - before) / (after - before)
    start, end = taus[place[..., 0] - 1], taus[place[..., 0]]
    return start + share * (end - start)


def _network(config: Config, Z: np.ndarray) -> dict[str, Any]:
    """Gradient descent on u and v without the ridge and with it, and its gaps to the flow."""
    lam = LOG10 * config.power
    descent, start = Descent(config.end * lam, config.records, config.substeps), 10.0**-config.power
    params, taus = (
        {"u": np.full(SIZE, FIRST * start), "v": np.full(SIZE, SECOND * start)},
        descent.times / lam,
    )
    trained, gaps = {}, {}
    # As NumPy numbers both are traced, so that the second compiles nothing.
    for name, ridge in zip(("none", "ridge"), np.array([0.0, config.ridge]), strict=True):
        loss = bind(_loss_of_factors, (Z, ridge, 1.0))
        path = jax.device_get(descent.train(loss, params, observe=_products)[1])
        require_ok("training", path)
        trained[name] = np.abs(lane(path, int(np.argmin(descent.rates))).ys).sum(axis=-1)
        if name == "none":
            for flow, factor in zip(("right", "wrong"), np.array([1.0, WRONG_FACTOR]), strict=True):
                theory = jax.device_get(eqx.filter_jit(_flow)((Z, ridge, factor), lam, taus))
                gaps[flow] = lane_gaps(Trajectory(path.ts[0], theory.ys, theory.ok), path)
    return {
        "rate": ("rate", descent.rates),
        "gap": ("rate", gaps),
        "record": ("record", taus),
        "trained": ("record", trained),
    }


def run(config: Config, context: Context) -> dict:
    """Integrate the flows without the ridge and with it, find the staircases, and train."""
    powers = np.asarray(config.powers, float)
    context.progress("greedy algorithm", 0.0)
    Z, paths = _by_last_jump(config, _margins(context.seed, config))
    context.progress("flows", 0.3)
    gradient = np.abs(Z.mean(axis=1) / 2)  # at zero it is half the mean margin
    first, leading = 1 / gradient.max(axis=-1), np.argmax(gradient, axis=-1)
    taus = np.append(0.0, np.geomspace(first.min() / 4, config.end, config.points))
    ridges = jnp.asarray([0.0, config.ridge])
    flows = jax.device_get(_flows(jnp.asarray(Z), ridges, jnp.asarray(LOG10 * powers), jnp.asarray(taus)))
    require_ok("flow", flows)
    stairs = _staircases(paths, taus, flows.ys[:, 1])
    entering = np.abs(np.stack([flow[0, ..., i] for flow, i in zip(flows.ys, leading, strict=True)]))
    context.progress("training", 0.7)
    size = np.abs(flows.ys).sum(axis=-1)
    return {
        "power": ("power", powers),
        "time": ("time", taus),
        "first": ("instance", first),
        "active_from": ("instance power", _active_from(taus, entering)),
        "end": ("instance power", size[:, 0, :, -1]),
        "size": ("power time", {"none": size[0, 0], "ridge": size[0, 1]}),
        **stairs,
        **_network(config, Z[0]),
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """Where the flow tends to a staircase, when its first stage ends, and the network."""
    yield _tails(saved)
    lams = LOG10 * saved["power"]
    late = np.abs(saved["active_from"] / saved["first"][:, None] - 1)
    orders = [convergence_order(lams, one).slope for one in late]
    # exp(2 g t) alpha^2 w0^2 / 4 is 0.1 at t = T_1 (lam + log(0.4 / w0^2) / 2), up to what others change.
    bent = "log(0.4 / w0^2) / 2 over log(1/alpha), bent where others come close"
    yield stated(
        "first-activation",
        "With such a loss, too, the first product is active at T_1 = min 1 / |g_i(0)| as alpha goes to zero",
        "boixadsera2023, Equation 8 (with the logistic loss; the order is measured)",
        slope("order of its relative distance in log(1/alpha), median", np.median(orders), -1, 0.1, why=bent),
        at_most("largest relative distance, smallest alpha", late[:, -1].max(), 1 / lams[-1], why=bent),
    )
    yield stated(
        "network",
        "Gradient descent on u and v follows the flow of the logistic loss, without a minimum as well",
        "boixadsera2023, section 6 (exponential tails) and Equation 3",
        *first_order(saved["rate"], saved["gap"]),
    )


def _tails(saved: Saved) -> Claim:
    distance, none = saved["distance"], saved["end"]
    ratios, grown = distance[:, 1:] / distance[:, :-1], none[:, 1:] / none[:, :-1]
    late = saved["trained/none"][-1] / saved["trained/none"][len(saved["record"]) // 2]
    met = abs(saved["trained/ridge"][-1] / np.abs(saved["staircase"][-1]).sum() - 1)
    halves, arrived = "one half, bent by the widths of the jumps", "it has come to the minimum"
    return qualified(
        "exponential-tails",
        "As alpha goes to zero the flow of a loss with an exponential tail tends to the greedy path",
        "boixadsera2023, section 6 (exponential tails), and Theorem 4.5",
        condition="a ridge gives it a minimum: else, at a fixed rescaled time, products grow without end",
        inside=[
            every("ridge: problems whose greedy path ends", saved["complete"]),
            at_most("ridge, distance per squaring of alpha: largest ratio", ratios.max(), 0.65, why=halves),
            at_least("the same: smallest ratio", ratios.min(), 0.4, why=halves),
            at_most("trained network, ridge: size at the end, relative distance", met, 1e-2, why=arrived),
        ],
        outside=[
            every("no ridge: squarings of alpha by which the size at the end grows", grown > 1),
            at_least(
                "the same: median growth, over all squarings",
                np.median(none[:, -1] / none[:, 0]),
                1.2,
                why="with a limit it would be one",
            ),
            at_least(
                "trained network, no ridge: size at the end over that half way",
                late,
                1.05,
                why="the logarithm of time grows by a seventh",
            ),
        ],
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Sizes along the flows without the ridge and with it, and what becomes of them as alpha falls."""
    drawn, ((none, ridge, ends),) = plotting.new_figure(1, 3, width=4.4, height=3.6)
    for ax, name, title in ((none, "none", "Without a minimum"), (ridge, "ridge", "With a ridge")):
        for index, power in enumerate(saved["power"]):
            size = saved[f"size/{name}"][index]
            ax.plot(saved["time"][1:], size[1:], color=f"C{index % 7}", label=f"α = 1e-{power:.0f}")
        circles: Any = {"marker": "o", "linestyle": "", "markersize": 3, "color": "0.2"}
        label = f"trained, α = 1e-{config.power}"
        ax.plot(saved["record"][1:], saved[f"trained/{name}"][1:], label=label, **circles)
        plotting.finish(ax, title, "time / log(1/α)", "sum of |u v|", xscale="log")
    stairs = np.abs(saved["staircase"]).sum(axis=-1)
    ridge.plot(saved["time"][1:], stairs[1:], label="greedy path", **plotting.THEORY)
    for ax in (none, ridge):
        plotting.make_room(ax, above=0.1)
        ax.legend(loc="upper left", fontsize=7.5)
    _draw_ends(ends, saved)
    return drawn


def _draw_ends(ax: Axes, saved: Saved) -> None:
    lams = LOG10 * saved["power"]
    ax.loglog(lams, saved["distance"].T, "o-", color="C0", linewidth=0.8, markersize=3)
    ax.loglog(lams, saved["end"].T, "s-", color="C1", linewidth=0.8, markersize=3)
    ax.plot([], [], "o-", color="C0", label="ridge: distance to the greedy path")
    ax.plot([], [], "s-", color="C1", label="no ridge: size at the end")
    median = np.median(saved["distance"], axis=0)
    plotting.reference_slope(ax, lams, median, -1, "slope −1")
    plotting.label_ticks(ax, lams, "{:.0f}")
    plotting.finish(ax, "All problems, as alpha falls", "log(1/α)", "distance, size")
    plotting.make_room(ax, above=0.45)
    ax.legend(loc="upper left", fontsize=8)
