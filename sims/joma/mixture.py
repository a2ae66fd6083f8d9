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

from dynamics import joma
from dynamics.flow import Trajectory, integrate
from models.losses import bind
from models.training import Descent, map_lanes, train
from sims import plotting
from sims.claims import SECOND_ORDER, Claim, Preset, at_least, at_most, equals, qualified, slope, stated
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
FINE = 3  # times of a flow per record of training
# What the nodes are called that are trained to the end.
ENDS = {"relu": "ReLU, one pulls", "linear": "linear, one pulls", "two_pull": "ReLU, two pull"}
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
    """Time at which its direction is taken."""


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
    return map_lanes(lambda lane: integrate(_field, lane[1], lane[2], lane[0], **options), lanes)


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
    noise = jax.random.normal(key, (samples, *node.centers.shape))
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
        x = node.centers[:, None, :] + SCALE * jax.random.normal(key, (3, count, 2))
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
    noise = jax.random.normal(key, (DIM, 500, DIM))

    def end(node):
        loss = bind(_node_loss, (node.centers[:, None, :] + noise, jnp.full(500, 1 / 500), node))
        return jax.vmap(lambda v0: train(loss, v0, optax.sgd(1.0), steps=1000, every=1000)[0])(starts)

    return named_lanes(end, **nodes)


def _followed_to_the_end(key: Array, starts: np.ndarray, flows: dict[str, Trajectory]) -> dict:
    """Cosines to the nearest center along the averaged flows and at the end of training, from many starts."""
    nodes = _at_right_angles()
    by_two = {name: nodes[name]._replace(mix=nodes[name].mix[:2]) for name in ENDS}  # none of them is a GELU
    trained = jax.device_get(_train_to_the_end(key, by_two, starts))

    def cosine(v):  # the centers lie on the axes
        return np.max(v, axis=-1) / np.linalg.norm(v, axis=-1)

    return {
        "time": ("time", flows["relu"].ts[0]),
        "cosine": ("start time", {name: cosine(flows[name].ys) for name in nodes}),
        "trained_cosine": ("start", {name: cosine(v) for name, v in trained.items()}),
    }


def run(config: Config, context: Context) -> dict:
    """Compare the field with samples, train a node, and follow many starts to where they end."""
    keys = jax.random.split(jax.random.key(context.seed), 5)
    starts = np.asarray(jax.random.normal(keys[3], (config.starts, DIM)))
    starts = 0.1 * starts / np.linalg.norm(starts, axis=1, keepdims=True)
    context.progress("sampling the field", 0.0)
    measured = _sampled_field(keys[1], jax.random.normal(keys[0], (PROBES, 3)), config.samples)
    context.progress("integrating the averaged flows", 0.2)
    flows = _averaged_flows(config, starts)
    context.progress("training nodes", 0.7)
    measured |= _trained_in_the_plane(keys[2], config, flows)
    return measured | _followed_to_the_end(keys[4], starts, flows)


def _final_cosine(separation: float) -> float:
    r"""Cosine to its center where a ReLU node ends that one cluster pulls and DIM - 1 others push.

    The direction (c, -s, ..., -s) does not turn where s Phi(R c) = c Phi(-R s): what pulls along v itself
    drops out.
    """

    def turn(s):
        c = np.sqrt(1 - (DIM - 1) * s**2)
        return s * ndtr(separation * c) - c * ndtr(-separation * s)

    s = float(brentq(turn, 0.0, 1 / np.sqrt(DIM)))  # pyright: ignore[reportArgumentType]
    return float(np.sqrt(1 - (DIM - 1) * s**2))


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


def _cluster_center(saved: Saved) -> Claim:
    relu, linear, two, close = (saved[f"cosine/{name}"][:, -1] for name in (*ENDS, "close"))
    predicted, median = _final_cosine(SEPARATION), np.median(saved["trained_cosine/relu"])
    gap = np.max(np.abs(relu - predicted))
    angle = "the angle is of the order of width over separation"
    power = "the angle closes as a power of time, 10,000 here"
    off = "centers of 500 samples are off by 0.04 widths of 8"
    constant = "v' is constant, along the sum of the centers; 1e-5 of the start is left"
    return qualified(
        "cluster-center",
        "Owing to the nonlinearity the hidden weight ends at one of the cluster centers",
        "tian2024joma, section 4 (mu ~ a cluster center); where it ends is derived here",
        condition="the node is a ReLU, one cluster alone pulls and the others push, and all lie far out",
        inside=[
            at_least("ReLU, one pulls: lowest cosine to a center", relu.min(), 0.95, why=f"{angle}: 1/8"),
            at_most("largest difference to s Phi(R c) = c Phi(-R s)", gap, 1e-3, why=power),
            equals("trained on samples, median over starts", median, predicted, 0.01, why=off),
        ],
        outside=[
            equals("linear: cosine to the nearest center, largest", linear.max(), 0.5, 1e-3, why=constant),
            at_most("ReLU, two pull: largest cosine to a center", two.max(), 2**-0.5, 1e-3, why="their sum"),
            at_most("ReLU, centers two widths out: largest cosine", close.max(), 0.9, why=f"{angle}: 1/2"),
        ],
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Moments over r, gaps over learning rate and samples, and cosines to the nearest center."""
    drawn, axes = plotting.new_figure(2, 3, width=4.2, height=3.5)
    (gain, stretch, over_rate), (paths, ends, over_size) = axes
    _draw_moment(gain, "gain", "Pull along a center: E[φ′(r + |v| u)]", saved)
    _draw_moment(stretch, "stretch", "Pull along v: E[u φ′(r + |v| u)] / |v|", saved)
    _draw_ends(paths, ends, saved)

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


def _draw_ends(paths: Axes, ends: Axes, saved: Saved) -> None:
    bins = np.arange(-1.025, 1.05, 0.05).tolist()
    for index, (name, label) in enumerate(ENDS.items()):
        cosine, trained = saved[f"cosine/{name}"], saved[f"trained_cosine/{name}"]
        color, once = f"C{index}", None if index else "trained"
        paths.plot(saved["time"][1:], cosine[:, 1:].T, color=color, alpha=0.4, linewidth=0.8)
        paths.plot([], [], color=color, label=label)
        ends.hist(cosine[:, -1], bins, color=color, alpha=0.8, label=label)
        ends.hist(trained, bins, color="black", histtype="step", label=once)
    angle, legend = "cosine of v to the nearest center", {"loc": "lower right", "fontsize": 7}
    plotting.finish(paths, "From many starts", "time", angle, legend, xscale="log", ylim=(-1.05, 1.05))
    ends.set_xticks([-1, -0.5, 0, 0.5, 1])
    plotting.finish(ends, "Where they end", angle, "starts", {"loc": "upper left", "fontsize": 7})
