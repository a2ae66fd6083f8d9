"""Hidden weights on a mixture of isotropic clusters: the averaged field, a trained node, and where it ends.

Attention is uniform, so the node sees the samples themselves: h = phi(v . x + bias), and the upstream
gradient is constant within a cluster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array, PyTree
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import brentq
from scipy.special import ndtr
from scipy.stats import norm

from dynamics import joma
from dynamics.flow import Trajectory, integrate
from models.draws import normal
from models.losses import bind
from models.training import Descent, map_lanes, train
from sims import plotting
from sims.claims import (
    SECOND_ORDER,
    Claim,
    Preset,
    at_least,
    at_most,
    corrected,
    every,
    qualified,
    slope,
    stated,
)
from sims.compare import SOLVE, lane_gaps, named_groups, named_lanes, orders, percent, require_ok
from sims.ranges import Count, Length, Range
from sims.results import Context, Saved

ACTIVATIONS = {
    "ReLU": jax.nn.relu,
    "identity": lambda s: s,
    "square / 2": lambda s: s**2 / 2,
    "tanh": jnp.tanh,
    "GELU": jax.nn.gelu,
}
# The activations that are mixed, and the shares of one alone.
BLENDED = (ACTIVATIONS["ReLU"], ACTIVATIONS["identity"], ACTIVATIONS["GELU"])
RELU, LINEAR, GELU = np.eye(3)
PROBES = 4  # hidden weights at which the field is compared with samples
NORM, SCALE = 1.3, 0.8  # |v| and width of the clusters where moments are compared and drawn
WRONG_FACTOR = 1.2
DIM = 4  # of the clusters at right angles, one per dimension
SEPARATION, CLOSE = 8.0, 2.0  # norms of their centers, in widths
START = np.array([0.3, 0.6])  # of the nodes in the plane
SMALL = 0.1  # norm of the starts that are followed to the end
FINE = 3  # times of a flow per record of training
# What the nodes are called that are trained to the end.
ENDS = {"relu": "ReLU, one pulls", "linear": "linear, one pulls", "two_pull": "ReLU, two pull"}
ANGLE = "the angle is of the order of width over separation"
TOO_WIDE = f"clusters {percent(WRONG_FACTOR)} too wide"


@dataclass(frozen=True)
class Config:
    """Samples, sweeps and starts."""

    samples: Annotated[int, Range(at_least=100)] = 100_000
    """Samples per cluster of the Monte Carlo checks."""
    descent: Descent = Descent(horizon=2.0, points=20, substeps=(1, 3, 10, 30))
    """Gradient descent on infinitely many samples at several learning rates."""
    sizes: Annotated[tuple[int, ...], Range(at_least=2), Length(2)] = (100, 400, 1600, 6400)
    """Samples per cluster of the runs on samples."""
    size_substeps: Count = 10
    """Steps between two records of those runs."""
    seeds: Count = 16
    """Draws of the samples."""
    starts: Count = 32
    """Starts of the node that is followed to the end."""
    end: Annotated[float, Range(above=1e-3)] = 1e4
    """Time at which its direction and its norm are taken."""


_QUICK = Config()
_STANDARD = replace(
    _QUICK,
    samples=1_000_000,
    descent=replace(_QUICK.descent, substeps=(1, 3, 10, 30, 100)),
    sizes=(100, 400, 1600, 6400, 25_600),
    size_substeps=40,
    starts=200,
)
PRESETS: dict[Preset, Config] = {"quick": _QUICK, "standard": _STANDARD, "paper": _STANDARD}


class Node(NamedTuple):
    """A hidden node on a Gaussian mixture: centers (C, d), weights a_c and biases (C,), width, activation."""

    centers: Array | Any
    weights: Array | Any
    bias: Array | Any
    scale: Array | Any = SCALE
    mix: Array | Any = RELU


def _plane(mix: Any) -> Node:
    """Three clusters in the plane, of both signs, near enough to overlap."""
    centers = np.array([[2.0, 0.0], [-1.0, 1.5], [-0.5, -1.8]])
    return Node(centers, np.array([0.5, -0.35, -0.15]), np.array([0.3, 0.2, 0.4]), mix=mix)


def _solid() -> Node:
    """Three clusters in three dimensions, of both signs."""
    centers = np.array([[1.0, 0.5, -0.5], [-1.0, 0.8, 0.2], [0.3, -1.2, 0.9]])
    return Node(centers, np.array([0.5, -0.3, 0.2]), np.array([0.2, -0.4, 0.6]))


def _at_right_angles() -> dict[str, Node]:
    """Nodes on clusters of width one along the axes, one or two of which pull."""

    def node(mix, separation=SEPARATION, pulling=1):
        weights = np.where(np.arange(DIM) < pulling, 1.0, -1.0) / DIM
        return Node(separation * np.eye(DIM), weights, np.zeros(DIM), 1.0, mix)

    ends = {"relu": node(RELU), "linear": node(LINEAR), "two_pull": node(RELU, pulling=2)}
    return {**ends, "close": node(RELU, separation=CLOSE)}


def _blend(mix: Array, s: Array) -> Array:
    """ReLU, identity and GELU mixed: the activation as a number, so that all are one compiled program.

    What is at the end of a shorter mix has no share, and takes no time.
    """
    parts = [share * phi(s) for share, phi in zip(mix, BLENDED, strict=False)]
    return sum(parts[1:], start=parts[0])


def _node_loss(v: Array, data) -> Array:
    """-sum_c a_c E_c[h]: its negative gradient by h is a_c. Samples are (C, n, d), their shares (n,)."""
    x, share, node = data
    hidden = _blend(node.mix, x @ v + node.bias[:, None])
    return -jnp.sum(node.weights * (hidden @ share))


def _field(t, v, node: Node) -> Array:
    activation = Partial(_blend, node.mix)
    return joma.isotropic_mixture_field(v, node.centers, node.weights, node.bias, activation, node.scale)


@jax.jit
def _flows(lanes: tuple[Node, Array, Array]) -> Trajectory:
    """The averaged flows of nodes from starts (L, d) at times (L, T)."""
    options: dict[str, Any] = {"solver": diffrax.Tsit5(), **SOLVE}
    # One after the other: side by side they would wait for each other's steps, and compile more slowly.
    return map_lanes(lambda lane: integrate(_field, lane[1], lane[2], lane[0], **options), lanes, at_once=1)


def _averaged_flows(config: Config, starts: np.ndarray) -> dict[str, Trajectory]:
    """Flows from all starts at right angles, and those in the plane: right, and wrong of wider clusters."""
    count = FINE * config.descent.points
    ts = np.append(0.0, np.geomspace(1e-3, config.end, count))
    lanes = {name: [(node, v0, ts) for v0 in starts] for name, node in _at_right_angles().items()}
    ts = np.linspace(0.0, config.descent.horizon, count + 1)
    for name, node in {"gelu": _plane(GELU), "relu": _plane(RELU)}.items():
        # With zeros for more dimensions and one cluster more, they share the program.
        *law, v0 = (np.pad(x, [(0, DIM - size) for size in x.shape]) for x in (*node[:3], START))
        for of, factor in {"right": 1.0, "wrong": WRONG_FACTOR}.items():
            lanes[f"{name}/{of}"] = [(Node(*law, scale=factor * SCALE, mix=node.mix), v0, ts)]
    paths = named_groups(_flows, lanes)
    require_ok("an averaged flow", *paths.values())
    return paths


def _by_activation(f: Callable[[Callable], PyTree]) -> PyTree:
    """`f` of every activation, along a leading axis."""
    every = list(ACTIVATIONS.values())
    return jax.lax.map(lambda i: f(lambda s: jax.lax.switch(i, every, s)), jnp.arange(len(every)))


@partial(jax.jit, static_argnames="samples")
def _monte_carlo(key: Array, vs: Array, r: Array, samples: int):
    """Averages over samples: fields with their standard errors on Gaussians and spheres, and moments."""
    node = _solid()
    noise = normal(key, (samples, *node.centers.shape))
    laws = {"gaussian": SCALE * noise, "sphere": noise / jnp.linalg.norm(noise, axis=-1, keepdims=True)}
    u = laws["gaussian"][:, 0, 0]

    def field(slope, centred, v):
        x = node.centers[None] + centred
        pull = node.weights[None, :, None] * slope(x @ v + node.bias[None])[..., None] * x
        error = jnp.sqrt(jnp.sum(jnp.var(pull, axis=0), axis=0) / samples)
        return jnp.sum(jnp.mean(pull, axis=0), axis=0), error

    def moments(slope, r):
        slopes = slope(r + NORM * u)
        return joma.Moments(jnp.mean(slopes), jnp.mean(u * slopes) / NORM)

    def of(phi):
        slope = jnp.vectorize(jax.grad(phi))
        fields = {law: jax.lax.map(partial(field, slope, centred), vs) for law, centred in laws.items()}
        return fields, jax.lax.map(partial(moments, slope), r)

    return _by_activation(of)


@jax.jit
def _quadrature(vs: Array, r: Array):
    """What theory says to `_monte_carlo`, and the moments over r."""
    centers, weights, bias, scale, _ = _solid()

    def gaussian(phi, v):
        return joma.isotropic_mixture_field(v, centers, weights, bias, phi, scale)

    def sphere(phi, v):
        # In three dimensions the projection of a sphere on a line is flat.
        law = (jnp.linalg.norm(v), phi, lambda u: jnp.full_like(u, 0.5), 1.0)
        gain, stretch = jax.vmap(lambda r: joma.isotropic_moments(r, *law))(centers @ v + bias)
        return (weights * gain) @ centers + jnp.sum(weights * stretch) * v

    def of(phi):
        fields = {field.__name__: jax.vmap(partial(field, phi))(vs) for field in (gaussian, sphere)}
        return fields, jax.vmap(lambda r: joma.gaussian_moments(r, NORM, phi, SCALE))(r)

    return _by_activation(of)


def _sampled_field(key: Array, vs: Array, samples: int) -> dict:
    """The field beside samples, in standard errors, and the moments beside theirs."""
    r, sampled_r = np.linspace(-3.0, 3.0, 61), np.linspace(-3.0, 3.0, 9)
    fields, sampled = _monte_carlo(key, vs, sampled_r, samples)
    theory, moments = _quadrature(vs, r)
    off = {law: np.abs(mean - theory[law]) / error for law, (mean, error) in fields.items()}
    return {
        "activation": ("activation", list(ACTIVATIONS)),
        "deviation": ("activation", {law: np.max(values, axis=(1, 2)) for law, values in off.items()}),
        "r": ("r", r),
        "moment": ("activation r", moments),
        "sampled_r": ("sampled_r", sampled_r),
        "sampled": ("activation sampled_r", sampled),
    }


@partial(jax.jit, static_argnames="config")
def _train_on_samples(key: Array, config: Config) -> Trajectory:
    """A ReLU node trained in the plane on samples: every draw of one size after the other."""
    node, count, every = _plane(RELU[:1]), max(config.sizes), config.size_substeps
    steps = config.descent.points * every
    rate = config.descent.horizon / steps

    def one(size, key):
        x = node.centers[:, None, :] + SCALE * normal(key, (3, count, 2))
        loss = bind(_node_loss, (x, jnp.where(jnp.arange(count) < size, 1 / size, 0), node))
        return train(loss, START, optax.sgd(rate), steps=steps, every=every, time_step=rate)[1]

    keys = jnp.tile(jax.random.split(key, config.seeds), len(config.sizes))
    return jax.vmap(one)(jnp.repeat(jnp.asarray(config.sizes), config.seeds), keys)


def _trained_in_the_plane(key: Array, config: Config, flows: dict[str, Trajectory]) -> dict:
    """Gaps of a trained node to the averaged flow, over the learning rate and over the samples."""
    descent, node = config.descent, _plane(GELU)
    # Infinitely many samples are Gauss-Hermite nodes around every center.
    nodes, mass = np.polynomial.hermite_e.hermegauss(64)
    grid = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
    share = np.outer(mass, mass).reshape(-1) / mass.sum() ** 2
    loss = bind(_node_loss, (node.centers[:, None, :] + SCALE * grid[None], share, node))
    trained = {"gelu": descent.train(loss, START)[1], "relu": _train_on_samples(key, config)}

    def gaps(name):
        paths = {of: flows[f"{name}/{of}"].ys[0, ::FINE, :2] for of in ("right", "wrong")}
        return {
            of: lane_gaps(Trajectory(descent.times, path, True), trained[name]) for of, path in paths.items()
        }

    shape = (len(config.sizes), config.seeds)
    return {
        "rate": ("rate", descent.rates),
        "rate_gap": ("rate", gaps("gelu")),
        "size": ("size", np.array(config.sizes)),
        "size_gap": ("size", {of: gap.reshape(shape).mean(axis=1) for of, gap in gaps("relu").items()}),
    }


@jax.jit
def _train_to_the_end(key: Array, nodes: dict[str, Node], starts: Array) -> dict[str, Array]:
    """Last weights of nodes trained on 500 samples per cluster with 1000 large steps."""
    noise = normal(key, (DIM, 500, DIM))

    def end(node):
        loss = bind(_node_loss, (node.centers[:, None, :] + noise, jnp.full(500, 1 / 500), node))
        return jax.vmap(lambda v0: train(loss, v0, optax.sgd(1.0), steps=1000, every=1000)[0])(starts)

    return named_lanes(end, **nodes)


def _followed_to_the_end(key: Array, starts: np.ndarray, flows: dict[str, Trajectory]) -> dict:
    """Norms, and cosines to the nearest center, along averaged flows and after training, from many starts."""
    nodes = _at_right_angles()
    by_two = {name: nodes[name]._replace(mix=nodes[name].mix[:2]) for name in ENDS}  # none of them is a GELU
    trained = jax.device_get(_train_to_the_end(key, by_two, starts))

    def polar(v):  # the centers lie on the axes
        norm = np.linalg.norm(v, axis=-1)
        return {"norm": norm, "cosine": np.max(v, axis=-1) / norm}

    return {
        "time": ("time", flows["relu"].ts[0]),
        "flow": ("start time", {name: polar(flows[name].ys) for name in nodes}),
        "trained": ("start", {name: polar(v) for name, v in trained.items()}),
    }


def run(config: Config, context: Context) -> dict:
    """Compare the field with samples, train a node, and follow many starts to where they end."""
    keys = jax.random.split(jax.random.key(context.seed), 5)
    starts = np.asarray(normal(keys[3], (config.starts, DIM)))
    starts = SMALL * starts / np.linalg.norm(starts, axis=1, keepdims=True)
    context.progress("sampling the field", 0.0)
    measured = _sampled_field(keys[1], normal(keys[0], (PROBES, 3)), config.samples)
    context.progress("integrating the averaged flows", 0.2)
    flows = _averaged_flows(config, starts)
    context.progress("training nodes", 0.7)
    measured |= _trained_in_the_plane(keys[2], config, flows)
    return measured | _followed_to_the_end(keys[4], starts, flows)


def _end(separation: float) -> tuple[float, float]:
    r"""Where a ReLU node ends that one cluster pulls and DIM - 1 others push: cosine to its center, and |v|'.

    The direction (c, -s, ..., -s) does not turn where s Phi(R c) = c Phi(-R s): what pulls along v itself
    drops out. With phi the normal density the norm grows by

        |v|' = (R c Phi(R c) + phi(R c) + (DIM - 1) (R s Phi(-R s) - phi(R s))) / DIM.
    """

    def turn(s):
        c = np.sqrt(1 - (DIM - 1) * s**2)
        return s * ndtr(separation * c) - c * ndtr(-separation * s)

    s = float(brentq(turn, 0.0, 1 / np.sqrt(DIM)))  # pyright: ignore[reportArgumentType]
    c = float(np.sqrt(1 - (DIM - 1) * s**2))
    at, (pulls, pushes) = separation * np.array([c, s]), norm.pdf(separation * np.array([c, s]))
    growth = at[0] * ndtr(at[0]) + pulls + (DIM - 1) * (at[1] * ndtr(-at[1]) - pushes)
    return c, float(growth) / DIM


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """The averaged field, a node that follows it, and where it ends."""
    r, names = saved["r"], saved["activation"]
    at = r / (SCALE * NORM)
    closed = {
        "ReLU": (ndtr(at), SCALE * np.exp(-(at**2) / 2) / (2 * np.pi) ** 0.5 / NORM),
        "square / 2": (r, np.full_like(r, SCALE**2)),
    }
    moments = {name: (saved["moment/gain"][i], saved["moment/stretch"][i]) for i, name in enumerate(names)}
    errors = {name: np.max(np.abs(np.subtract(moments[name], form))) for name, form in closed.items()}
    gaussian, sphere = (saved[f"deviation/{law}"].max() for law in ("gaussian", "sphere"))
    rare, order_one = (
        "of 60 components one is so far off in 30,000 runs",
        "quadrature of numbers of order one",
    )
    yield stated(
        "field",
        "Averaged over isotropic clusters, training pulls a hidden weight along their centers and itself",
        "tian2024joma, Theorem 3 (theta_1 and theta_2 depend on |v| as well)",
        at_most("Gaussian clusters: difference to samples [standard errors]", gaussian, 5, why=rare),
        at_most("spheres: difference to samples [standard errors]", sphere, 5, why=rare),
        *(
            at_most(f"{name}: difference to its closed form", error, 1e-10, why=order_one)
            for name, error in errors.items()
        ),
    )
    over_rate = orders(saved["rate"], saved["rate_gap"])
    over_size = orders(1 / saved["size"], saved["size_gap"])
    scatter = "means over 16 draws scatter by an eighth, and the rate adds its own gap"
    closes_not = "a gap that does not close has order 0"
    yield stated(
        "network",
        "A hidden node trained on the mixture follows the averaged field",
        "tian2024joma, Theorem 3; the orders are derived here",
        slope("GELU: order of the gap in the learning rate", over_rate["right"], 1, 0.1, why=SECOND_ORDER),
        at_most(f"order with {TOO_WIDE}", over_rate["wrong"], 0.5, why=closes_not),
        slope("ReLU: order of the gap in 1 / samples", over_size["right"], 0.5, 0.1, why=scatter),
        at_most(f"order with {TOO_WIDE}", over_size["wrong"], 0.3, why=closes_not),
    )
    yield _cluster_center(saved)
    yield _direction(saved)


def _cluster_center(saved: Saved) -> Claim:
    ts, sizes, cosine = saved["time"], saved["flow/relu/norm"], saved["flow/relu/cosine"][:, -1]
    # By the law of cosines, from every start.
    distance = np.sqrt(sizes[:, -1] ** 2 + SEPARATION**2 - 2 * SEPARATION * sizes[:, -1] * cosine)
    rate = np.diff(sizes[:, -2:]) / np.diff(ts[-2:])
    direction, derived = _end(SEPARATION)
    gap, worst = np.max(np.abs(cosine - direction)), np.max(np.abs(rate / derived - 1))
    power = "the angle closes as a power of time, 10,000 here"
    return corrected(
        "cluster-center",
        "With a constant upstream gradient the hidden weight ends at a cluster center in direction alone: "
        "its norm grows without bound",
        "tian2024joma, section 4 (mu ~ a cluster center); where it ends and how it grows is derived here",
        printed=[
            at_most(
                "least distance to a center over the center's norm, all starts",
                distance.min() / SEPARATION,
                0.5,
                why="a critical point near a center is nearer to it than to zero",
            )
        ],
        mended=[
            at_least("lowest cosine to a center, all starts", cosine.min(), 0.95, why=f"{ANGLE}: 1/8"),
            at_most("largest difference to s Phi(R c) = c Phi(-R s)", gap, 1e-3, why=power),
            at_most("|v|' at the end over the derived one, largest |ratio - 1|", worst, 1e-3, why=power),
        ],
    )


def _direction(saved: Saved) -> Claim:
    linear, two, close = (saved[f"flow/{name}/cosine"][:, -1] for name in ("linear", "two_pull", "close"))
    trained = {of: saved[f"trained/relu/{of}"] for of in ("norm", "cosine")}
    arrived = saved["flow/relu/cosine"][:, -1] >= 0.95
    ended, dead = trained["cosine"] >= 0.95, _dead(trained["norm"])
    (predicted, _), off = _end(SEPARATION), "centers of 500 samples are off by 0.04 widths of 8"
    gap = np.max(np.abs(trained["cosine"][ended] - predicted), initial=0)
    opposite = "dead are starts that all four centers are opposite of: fewer than one in 2^4"
    constant = "v' is constant, along the sum of the centers; 1e-5 of the start is left"
    return qualified(
        "direction",
        "Owing to the nonlinearity the hidden weight turns to one of the cluster centers",
        "tian2024joma, section 4 (mu ~ a cluster center); from every start",
        condition="the node is a ReLU, one cluster alone pulls and the others push, and all lie far out",
        inside=[
            every("averaged flow: starts that end with a cosine of 0.95 or more", arrived),
            at_least("trained on samples: share of such starts", ended.mean(), 15 / 16, why=opposite),
            every("trained: starts that end so, or dead where they began", ended | dead),
            at_most("trained: difference to s Phi(R c) = c Phi(-R s) of those", gap, 0.01, why=off),
        ],
        outside=[
            at_most(
                "linear: cosine to the nearest center, largest |difference| to 1/2",
                np.max(np.abs(linear - 0.5)),
                1e-3,
                why=constant,
            ),
            at_most("ReLU, two pull: largest cosine to a center", two.max(), 2**-0.5, 1e-3, why="their sum"),
            at_most("ReLU, centers two widths out: largest cosine", close.max(), 0.9, why=f"{ANGLE}: 1/2"),
        ],
    )


def _dead(norms: np.ndarray) -> np.ndarray:
    """Nodes that no sample reaches any more stay near their small start."""
    return norms < 2 * SMALL


def figure(config: Config, saved: Saved) -> Figure:
    """Moments over r, gaps over learning rate and samples, and where nodes end from many starts."""
    drawn, axes = plotting.new_figure(2, 3, width=4.2, height=3.5)
    (gain, stretch, over_rate), (arrivals, ends, over_size) = axes
    _draw_moment(gain, "gain", "Pull along a center: E[φ′(r + |v| u)]", saved)
    _draw_moment(stretch, "stretch", "Pull along v: E[u φ′(r + |v| u)] / |v|", saved)
    _draw_arrivals(arrivals, saved)
    _draw_ends(ends, saved)

    gaps = {"averaged field": saved["rate_gap/right"], TOO_WIDE: saved["rate_gap/wrong"]}
    title = "A GELU node, infinitely many samples"
    plotting.gap_panel(over_rate, saved["rate"], gaps, "learning rate", "largest gap of v", title)

    sizes, right = saved["size"], saved["size_gap/right"]
    over_size.loglog(sizes, right, "o", color="C0", label="averaged field")
    over_size.loglog(sizes, saved["size_gap/wrong"], "s", color="C2", label=TOO_WIDE)
    plotting.reference_slope(over_size, sizes, right, -0.5, "slope −1/2")
    labels = ("A ReLU node trained on samples", "samples per cluster", "largest gap of v, mean over draws")
    plotting.finish(over_size, *labels, legend="best")
    return drawn


def _draw_moment(ax: Axes, moment: str, title: str, saved: Saved) -> None:
    circles: Any = {"marker": "o", "linestyle": "", "ms": 4, "mfc": "white"}
    for index, name in enumerate(saved["activation"]):
        ax.plot(saved["r"], saved[f"moment/{moment}"][index], color=f"C{index}", label=name)
        ax.plot(saved["sampled_r"], saved[f"sampled/{moment}"][index], color=f"C{index}", **circles)
    ax.plot([], [], color="0.3", label="samples", **circles)
    plotting.finish(ax, title, "mean pre-activation r", moment, {"fontsize": 7})


def _draw_arrivals(ax: Axes, saved: Saved) -> None:
    """The share of starts whose direction has come, to stay, within 0.05 of its last cosine."""
    for index, (name, label) in enumerate(ENDS.items()):
        cosine = saved[f"flow/{name}/cosine"]
        near = np.abs(cosine - cosine[:, -1:]) < 0.05
        stays = np.logical_and.accumulate(near[:, ::-1], axis=1)[:, ::-1]
        ax.plot(saved["time"][1:], stays.mean(axis=0)[1:], color=f"C{index}", label=label)
    title, share = "When they turn there, averaged flow", "share of starts"
    plotting.finish(ax, title, "time", share, "lower right", xscale="log", ylim=(-0.03, 1.05))


def _draw_ends(ax: Axes, saved: Saved) -> None:
    """Norm and cosine at the end, of every start."""
    for index, (name, label) in enumerate({**ENDS, "close": "ReLU, one pulls, close"}.items()):
        sizes, cosine = (saved[f"flow/{name}/{of}"][:, -1] for of in ("norm", "cosine"))
        ax.plot(sizes, cosine, "o", color=f"C{index}", label=label)
        if name not in ENDS:
            continue
        trained = {of: saved[f"trained/{name}/{of}"] for of in ("norm", "cosine")}
        ax.plot(trained["norm"], trained["cosine"], "s", color=f"C{index}", mfc="white")
        alive = ~_dead(trained["norm"])
        count = f"{alive.sum()} of {alive.size}"
        place: dict[str, Any] = {"xytext": (-6, 0), "textcoords": "offset points", "ha": "right"}
        at = (trained["norm"][alive].mean(), trained["cosine"][alive].mean())
        ax.annotate(count, at, color=f"C{index}", fontsize=8, va="center", **place)
        if name == "relu" and not alive.all():
            at = (trained["norm"][~alive].mean(), trained["cosine"][~alive].mean())
            ax.annotate(
                "dead: no sample\nreaches them",
                at,
                fontsize=8,
                va="top",
                xytext=(0, -8),
                textcoords="offset points",
            )
    ax.plot([], [], "s", color="0.3", mfc="white", label="trained on samples")
    ax.axvline(SEPARATION, **plotting.PRINTED)
    ax.annotate(
        "norm of the centers", (0.85 * SEPARATION, 0.05), rotation=90, fontsize=8, color="0.45", ha="right"
    )
    labels = ("Where they end, all starts", "norm |v| at the end", "cosine of v to the nearest center")
    options: dict[str, Any] = {"xscale": "log", "xlim": (0.03, 3e5), "ylim": (-1.05, 1.05)}
    plotting.finish(ax, *labels, {"loc": "lower right", "fontsize": 7}, **options)
