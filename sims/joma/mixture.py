"""Hidden weights on a mixture of isotropic clusters: the averaged field, a trained node, and where it ends.

Attention is uniform, so the node sees the samples themselves: h = phi(v . x + bias), and the upstream
gradient is constant within a cluster.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.figure import Figure
from scipy.optimize import brentq
from scipy.special import ndtr
from scipy.stats import norm

from dynamics.flow import Trajectory, integrate
from dynamics.joma import Moments, gaussian_moments, isotropic_mixture_field, isotropic_moments
from models.losses import bind
from models.training import train, train_at_rates
from sims import plotting
from sims.claims import Check, Claim, Preset
from sims.compare import convergence_order, lane, lane_gaps, require_sweeps
from sims.results import Context, Result, Saved

ACTIVATIONS = {
    "ReLU": jax.nn.relu,
    "identity": lambda s: s,
    "square / 2": lambda s: s**2 / 2,
    "tanh": jnp.tanh,
    "GELU": jax.nn.gelu,
}
# Shares of ReLU, identity and GELU in an activation.
RELU, LINEAR, GELU = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)
PROBES = 4  # hidden weights at which the field is compared with samples
NORM, SCALE = 1.3, 0.8  # |v| and width of the clusters where moments are compared and drawn
WRONG_FACTOR = 1.2
DIM = 4  # of the clusters at right angles, one per dimension
SEPARATION, CLOSE = 8.0, 2.0  # norms of their centers, in widths
CASES = ("ReLU", "linear", "two pull", "close")


@dataclass(frozen=True)
class Config:
    """Samples, sweeps and starts."""

    samples: int = 100_000
    """Samples per cluster of the Monte Carlo checks."""
    horizon: float = 2.0
    """Time at which the node is compared with the field."""
    points: int = 20
    """Records along those runs."""
    substeps: tuple[int, ...] = (1, 3, 10, 30)
    """Steps between two records, one per learning rate: the rate is horizon / (points * substeps)."""
    sizes: tuple[int, ...] = (100, 400, 1600, 6400)
    """Samples per cluster of the runs on samples."""
    size_substeps: int = 10
    """Steps between two records of those runs."""
    seeds: int = 16
    """Draws of the samples."""
    starts: int = 32
    """Starts of the node that is followed to the end."""
    end: float = 1e4
    """Time at which its direction is taken."""

    def __post_init__(self):
        require_sweeps(self, "substeps", "sizes")
        if min(self.sizes) < 2 or self.samples < 100:
            raise ValueError(f"samples must be at least 100, sizes 2, got {self.samples} and {self.sizes}")


_QUICK = Config()
_STANDARD = replace(
    _QUICK,
    samples=1_000_000,
    substeps=(1, 3, 10, 30, 100),
    sizes=(100, 400, 1600, 6400, 25_600),
    size_substeps=40,
    starts=200,
)
PRESETS: dict[Preset, Config] = {"quick": _QUICK, "standard": _STANDARD, "paper": _STANDARD}


class Mixture(NamedTuple):
    """A Gaussian mixture: centers (C, d), weights a_c and biases (C,), one width."""

    centers: Array | Any
    weights: Array | Any
    bias: Array | Any
    scale: Array | Any


def _plane() -> Mixture:
    """Three clusters in the plane, of both signs, near enough to overlap."""
    centers = np.array([[2.0, 0.0], [-1.0, 1.5], [-0.5, -1.8]])
    return Mixture(centers, np.array([0.5, -0.35, -0.15]), np.array([0.3, 0.2, 0.4]), SCALE)


def _plane_quadrature():
    """The same as data of `_node_loss`: Gauss-Hermite nodes around every center."""
    nodes, mass = np.polynomial.hermite_e.hermegauss(64)
    grid = np.stack(np.meshgrid(nodes, nodes), axis=-1).reshape(-1, 2)
    mixture = _plane()
    share = np.outer(mass, mass).reshape(-1) / mass.sum() ** 2
    return mixture.centers[:, None, :] + SCALE * grid[None], share, mixture, np.array(GELU)


def _blend(mix: Array, s: Array) -> Array:
    """ReLU, identity and GELU mixed: the activation as a number, so that all are one compiled program."""
    return mix[0] * jax.nn.relu(s) + mix[1] * s + mix[2] * jax.nn.gelu(s)


def _node_loss(v: Array, data) -> Array:
    """-sum_c a_c E_c[h]: its negative gradient by h is a_c. Samples are (C, n, d), their shares (n,)."""
    x, share, mixture, mix = data
    hidden = _blend(mix, x @ v + mixture.bias[:, None])
    return -jnp.sum(mixture.weights * (hidden @ share))


def _field(t, v, args) -> Array:
    mixture, mix = args
    return isotropic_mixture_field(
        v, mixture.centers, mixture.weights, mixture.bias, Partial(_blend, mix), mixture.scale
    )


@jax.jit
def _flows(v0: Array, ts: Array, mixtures: Mixture, mixes: Array) -> Trajectory:
    """The averaged flow of every mixture and activation, (L, ...), from every start, (L, S, d)."""

    def one(v0, mixture, mix):
        return integrate(_field, v0, ts, (mixture, mix), solver=diffrax.Tsit5(), throw=False)

    return jax.vmap(jax.vmap(one, in_axes=(0, None, None)))(v0, mixtures, mixes)


@partial(jax.jit, static_argnames="config")
def _draw(key: Array, config: Config):
    """Keys of the samples; hidden weights at which the field is compared; starts in each of `CASES`."""
    keys = jax.random.split(key, 5)
    vs = jax.random.normal(keys[0], (PROBES, 3))
    starts = jax.random.normal(keys[3], (config.starts, DIM))
    starts = 0.1 * starts / jnp.linalg.norm(starts, axis=1, keepdims=True)
    samples = keys[1], jax.random.split(keys[2], config.seeds), keys[4]
    return samples, vs, jnp.broadcast_to(starts, (len(CASES), *starts.shape))


@partial(jax.jit, static_argnames="samples")
def _monte_carlo(key: Array, vs: Array, r: Array, samples: int):
    """Averages over samples, with standard errors for the fields: Gaussian, on a sphere, and the moments."""
    mixture = _solid()
    noise = jax.random.normal(key, (samples, *mixture.centers.shape))
    laws = {"gaussian": SCALE * noise, "sphere": noise / jnp.linalg.norm(noise, axis=-1, keepdims=True)}

    def field(slope, centred, v):
        x = mixture.centers[None] + centred
        pull = mixture.weights[None, :, None] * slope(x @ v + mixture.bias[None])[..., None] * x
        error = jnp.sqrt(jnp.sum(jnp.var(pull, axis=0), axis=0) / samples)
        return jnp.sum(jnp.mean(pull, axis=0), axis=0), error

    def moments(slope, u, r):
        slopes = slope(r + NORM * u)
        return Moments(jnp.mean(slopes), jnp.mean(u * slopes) / NORM)

    fields, drawn = {}, {}
    for name, phi in ACTIVATIONS.items():
        slope = jnp.vectorize(jax.grad(phi))
        for law, centred in laws.items():
            fields[f"{name}, {law}"] = jax.lax.map(partial(field, slope, centred), vs)
        drawn[name] = jax.lax.map(partial(moments, slope, laws["gaussian"][:, 0, 0]), r)
    return fields, drawn


@jax.jit
def _quadrature(vs: Array, r: Array):
    """What theory says to `_monte_carlo`, and the moments over r."""
    mixture = _solid()

    def on_sphere(phi, v):
        # In three dimensions the projection of a sphere on a line is flat.
        flat = partial(isotropic_moments, norm=jnp.linalg.norm(v), activation=phi, density=_flat, width=1.0)
        gain, stretch = jax.vmap(flat)(mixture.centers @ v + mixture.bias)
        return (mixture.weights * gain) @ mixture.centers + jnp.sum(mixture.weights * stretch) * v

    def gaussian(phi, v):
        return isotropic_mixture_field(v, mixture.centers, mixture.weights, mixture.bias, phi, mixture.scale)

    fields, drawn = {}, {}
    for name, phi in ACTIVATIONS.items():
        fields[f"{name}, gaussian"] = jax.vmap(partial(gaussian, phi))(vs)
        fields[f"{name}, sphere"] = jax.vmap(partial(on_sphere, phi))(vs)
        drawn[name] = jax.vmap(lambda r, phi=phi: gaussian_moments(r, NORM, phi, SCALE))(r)
    return fields, drawn


def _flat(u: Array) -> Array:
    return jnp.full_like(u, 0.5)


def _solid() -> Mixture:
    """Three clusters in three dimensions, of both signs."""
    centers = np.array([[1.0, 0.5, -0.5], [-1.0, 0.8, 0.2], [0.3, -1.2, 0.9]])
    return Mixture(centers, np.array([0.5, -0.3, 0.2]), np.array([0.2, -0.4, 0.6]), SCALE)


@partial(jax.jit, static_argnames="config")
def _train_on_samples(keys: Array, v0: Array, config: Config) -> Trajectory:
    """A ReLU node trained on samples: every size and draw, (sizes, seeds, ...)."""
    mixture, count = _plane(), max(config.sizes)
    steps = config.points * config.size_substeps
    rate = config.horizon / steps

    def one(size, key):
        x = mixture.centers[:, None, :] + SCALE * jax.random.normal(key, (3, count, 2))
        share = jnp.where(jnp.arange(count) < size, 1 / size, 0)
        loss = bind(_node_loss, (x, share, mixture, jnp.array(RELU)))
        return train(loss, v0, optax.sgd(rate), steps=steps, every=config.size_substeps, time_step=rate)[1]

    sizes = jnp.asarray(config.sizes)
    return jax.vmap(lambda size: jax.vmap(lambda key: one(size, key))(keys))(sizes)


@jax.jit
def _train_to_the_end(key: Array, v0: Array, mixtures: Mixture, mixes: Array) -> Array:
    """Last weights of nodes trained on 500 samples per cluster with 1000 large steps."""
    noise = jax.random.normal(key, (DIM, 500, DIM))

    def one(v0, mixture, mix):
        data = (mixture.centers[:, None, :] + noise, jnp.full(500, 1 / 500), mixture, mix)
        return train(bind(_node_loss, data), v0, optax.sgd(1.0), steps=1000, every=1000)[0]

    return jax.vmap(jax.vmap(one, in_axes=(0, None, None)))(v0, mixtures, mixes)


def _at_right_angles() -> tuple[Mixture, np.ndarray]:
    """For each of `CASES` the clusters, of width one, and the activation."""
    one = np.array([1.0, -1.0, -1.0, -1.0]) / DIM
    two = np.array([1.0, 1.0, -1.0, -1.0]) / DIM
    separations = np.array([SEPARATION, SEPARATION, SEPARATION, CLOSE])
    mixtures = Mixture(
        separations[:, None, None] * np.eye(DIM)[None],
        np.stack([one, one, two, one]),
        np.zeros((len(CASES), DIM)),
        np.ones(len(CASES)),
    )
    return mixtures, np.array([RELU, LINEAR, RELU, RELU])


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


def _cosines(v: np.ndarray) -> np.ndarray:
    """Cosine to the nearest center, the centers lying on the axes."""
    return np.max(v, axis=-1) / np.linalg.norm(v, axis=-1)


def run(config: Config, context: Context) -> Result:
    """Compare the field with samples, train a node, and follow many starts to where they end."""
    (key, run_keys, end_key), vs, starts = _draw(jax.random.key(context.seed), config)

    context.progress("sampling the field", 0.0)
    r, r_sampled = np.linspace(-3.0, 3.0, 61), np.linspace(-3.0, 3.0, 9)
    sampled, drawn = jax.tree.map(np.asarray, _monte_carlo(key, vs, r_sampled, config.samples))
    fields, moments = jax.tree.map(np.asarray, _quadrature(vs, r))

    context.progress("integrating the field", 0.25)
    ts = np.linspace(0.0, config.horizon, config.points + 1)
    v0 = np.array([0.3, 0.6])
    # Every second lane is wrong: its clusters are too wide.
    plane = jax.tree.map(lambda leaf: np.stack([leaf] * 4), _plane())
    plane = plane._replace(scale=plane.scale * np.array([1.0, WRONG_FACTOR, 1.0, WRONG_FACTOR]))
    flows = _flows(np.broadcast_to(v0, (4, 1, 2)), ts, plane, np.array([GELU, GELU, RELU, RELU]))
    smooth, smooth_wrong, kinked, kinked_wrong = (lane(lane(flows, index), 0) for index in range(4))

    context.progress("training on the mixture", 0.4)
    descent = train_at_rates(
        bind(_node_loss, _plane_quadrature()),
        v0,
        config.substeps,
        horizon=config.horizon,
        points=config.points,
    )
    rates, at_rates = jax.tree.map(np.asarray, descent)
    rate_gaps = {"flow": lane_gaps(smooth, at_rates), "wrong": lane_gaps(smooth_wrong, at_rates)}
    on_samples = jax.tree.map(np.asarray, _train_on_samples(run_keys, v0, config))
    flat = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), on_samples)
    size_gaps = {
        name: lane_gaps(flow, flat).reshape(len(config.sizes), config.seeds).mean(axis=1)
        for name, flow in (("flow", kinked), ("wrong", kinked_wrong))
    }

    context.progress("following many starts to the end", 0.6)
    mixtures, mixes = _at_right_angles()
    times = np.append(0.0, np.geomspace(1e-3, config.end, 60))
    paths = _flows(starts, times, mixtures, mixes).ys
    ends = _train_to_the_end(end_key, starts, mixtures, mixes)
    cosines, trained = (dict(zip(CASES, _cosines(np.asarray(v)), strict=True)) for v in (paths, ends))

    data = {
        "r": r,
        "moments": {name: values._asdict() for name, values in moments.items()},
        "sampled": {"r": r_sampled, **{name: values._asdict() for name, values in drawn.items()}},
        "rates": rates,
        "rate_gap": rate_gaps,
        "sizes": np.asarray(config.sizes),
        "size_gap": size_gaps,
        "ts": times,
        "cosine": cosines,
        "trained_cosine": trained,
    }
    claims = (
        _field_claim(sampled, fields, r, moments),
        _network(rates, rate_gaps, config.sizes, size_gaps),
        _cluster_center(cosines, trained),
    )
    dims = {"rates": ("rate",), "sizes": ("size",)}
    dims |= {f"cosine/{name}": ("start", "time") for name in CASES}
    dims |= {f"trained_cosine/{name}": ("start",) for name in CASES}
    return Result(data, claims, dims)


def _field_claim(sampled, fields, r, moments) -> Claim:
    def deviation(law):
        """Largest difference of a component in standard errors, over activations and probes."""
        return max(
            np.max(np.abs(mean - fields[name]) / error)
            for name, (mean, error) in sampled.items()
            if name.endswith(law)
        )

    at = r / (SCALE * NORM)
    closed = {
        "ReLU": (norm.cdf(at), SCALE * norm.pdf(at) / NORM),
        "square / 2": (r, np.full_like(r, SCALE**2)),
    }
    errors = {
        name: max(np.max(np.abs(a - b)) for a, b in zip(moments[name], closed[name], strict=True))
        for name in closed
    }
    return Claim(
        "joma.mixture/field",
        "Averaged over isotropic clusters, training pulls a hidden weight along their centers and itself",
        "tian2024joma, Theorem 3 (theta_1 and theta_2 depend on |v| as well)",
        "stated",
        [
            # 60 components each: five standard errors happen once in 30,000 runs.
            Check(
                "Gaussian clusters: difference to samples [standard errors]",
                "at most",
                5,
                deviation("gaussian"),
            ),
            Check("spheres: difference to samples [standard errors]", "at most", 5, deviation("sphere")),
            # Quadrature of numbers of order one.
            *[
                Check(f"{name}: difference to its closed form", "at most", 1e-10, e)
                for name, e in errors.items()
            ],
        ],
    )


def _network(rates, rate_gaps, sizes, size_gaps) -> Claim:
    inverse = 1 / np.asarray(sizes, float)
    return Claim(
        "joma.mixture/network",
        "A hidden node trained on the mixture follows the averaged field",
        "tian2024joma, Theorem 3; the orders are derived here",
        "stated",
        [
            # The second order bends the line by the largest rate, at its end.
            Check(
                "GELU: order of the gap in the learning rate",
                "slope",
                1.0,
                convergence_order(rates, rate_gaps["flow"]).slope,
                0.1,
            ),
            Check(
                "order with clusters 20 % too wide",
                "at most",
                0.5,
                convergence_order(rates, rate_gaps["wrong"]).slope,
            ),
            # Means over 16 draws scatter by an eighth each, and the learning rate adds its own gap.
            Check(
                "ReLU: order of the gap in 1 / samples",
                "slope",
                0.5,
                convergence_order(inverse, size_gaps["flow"]).slope,
                0.1,
            ),
            Check(
                "order with clusters 20 % too wide",
                "at most",
                0.3,
                convergence_order(inverse, size_gaps["wrong"]).slope,
            ),
        ],
    )


def _cluster_center(cosines, trained) -> Claim:
    final = {name: values[:, -1] for name, values in cosines.items()}
    predicted = _final_cosine(SEPARATION)
    return Claim(
        "joma.mixture/cluster-center",
        "Owing to the nonlinearity the hidden weight ends at one of the cluster centers",
        "tian2024joma, section 4 (mu ~ a cluster center); where it ends is derived here",
        "qualified",
        [
            # The angle is of the order of width over separation, 1/8 here, and cos(1/4) = 0.97.
            Check("ReLU, one pulls: lowest cosine to a center", "at least", 0.95, final["ReLU"].min()),
            # The angle closes as a power of time, 10,000 here.
            Check(
                "largest difference to s Phi(R c) = c Phi(-R s)",
                "at most",
                1e-3,
                np.abs(final["ReLU"] - predicted).max(),
            ),
            # 500 samples per cluster: their centers are off by 0.04 widths of 8.
            Check(
                "trained on samples, median over starts",
                "equals",
                predicted,
                np.median(trained["ReLU"]),
                0.01,
            ),
            # v' is constant: it ends at the weighted sum of the centers. What is left of the start is 1e-5.
            Check(
                "linear: cosine to the nearest center, largest", "equals", 0.5, final["linear"].max(), 1e-3
            ),
            # The sum of two, at right angles.
            Check(
                "ReLU, two pull: largest cosine to a center",
                "at most",
                2**-0.5,
                final["two pull"].max(),
                1e-3,
            ),
            # As above, with angles of 1/2 and more: cos(1/2) = 0.88.
            Check("ReLU, centers two widths out: largest cosine", "at most", 0.9, final["close"].max()),
        ],
        condition="the node is a ReLU, one cluster alone pulls and the others push, and all lie far out",
    )


def figure(saved: Saved) -> Figure:
    """Moments over r, gaps over learning rate and samples, and cosines to the nearest center."""
    drawn, ((gain, stretch, over_rate), (paths, ends, over_size)) = plotting.new_figure(
        2, 3, width=4.2, height=3.5
    )
    for ax, moment, title in (
        (gain, "gain", "Pull along a center: E[φ′(r + |v| u)]"),
        (stretch, "stretch", "Pull along v: E[u φ′(r + |v| u)] / |v|"),
    ):
        for index, name in enumerate(ACTIVATIONS):
            ax.plot(saved["r"], saved[f"moments/{name}/{moment}"], color=f"C{index}", label=name)
            ax.plot(
                saved["sampled/r"],
                saved[f"sampled/{name}/{moment}"],
                "o",
                ms=4,
                mfc="white",
                color=f"C{index}",
            )
        ax.plot([], [], "o", ms=4, mfc="white", color="0.3", label="samples")
        ax.set(xlabel="mean pre-activation r", ylabel=moment)
        ax.set_title(title)
        ax.legend(fontsize=7)

    gaps = {"averaged field": saved["rate_gap/flow"], "clusters 20 % too wide": saved["rate_gap/wrong"]}
    plotting.gap_panel(over_rate, saved["rates"], gaps, "learning rate", "largest gap of v")
    over_rate.set_title("A GELU node, infinitely many samples")

    sizes = saved["sizes"]
    for index, (name, label) in enumerate(
        {"flow": "averaged field", "wrong": "clusters 20 % too wide"}.items()
    ):
        over_size.loglog(sizes, saved[f"size_gap/{name}"], "os"[index], color=f"C{2 * index}", label=label)
    plotting.reference_slope(over_size, sizes, saved["size_gap/flow"], -0.5, "slope −1/2")
    over_size.set(xlabel="samples per cluster", ylabel="largest gap of v, mean over draws")
    over_size.set_title("A ReLU node trained on samples")
    over_size.legend()

    ts = saved["ts"][1:]
    shown = {"ReLU": "ReLU, one pulls", "linear": "linear, one pulls", "two pull": "ReLU, two pull"}
    bins = np.arange(-1.025, 1.05, 0.05)
    for index, (name, label) in enumerate(shown.items()):
        color = f"C{index}"
        paths.plot(ts, saved[f"cosine/{name}"][:, 1:].T, color=color, alpha=0.4, linewidth=0.8)
        paths.plot([], [], color=color, label=label)
        ends.hist(saved[f"cosine/{name}"][:, -1], bins, color=color, alpha=0.8, label=label)
        ends.hist(
            saved[f"trained_cosine/{name}"],
            bins,
            color="black",
            histtype="step",
            label=None if index else "trained",
        )
    paths.set(xscale="log", xlabel="time", ylabel="cosine of v to the nearest center")
    paths.set_ylim(-1.05, 1.05)
    paths.set_title("From many starts")
    paths.legend(loc="lower right", fontsize=7)
    ends.set_xticks([-1, -0.5, 0, 0.5, 1])
    ends.set(xlabel="cosine of v to the nearest center", ylabel="starts")
    ends.set_title("Where they end")
    ends.legend(loc="upper left", fontsize=7)
    return drawn
