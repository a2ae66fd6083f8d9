"""Close to the critical point training slows down, and is alike in all networks; noise lets it escape.

In a linear network with one hidden layer the mode that becomes unstable, u_j = w_j c / |c| = q with c =
E[x y], obeys dq/dt = -m q - k q^3 with m = 2 (gamma - gamma_c) and k = 2 (width + s) c^T A c / |c|^2. It
relaxes at the rates m above the critical strength and -2 m below, and at it falls as (2 k t)^{-1/2}. Under
gradient descent with Gaussian noise of temperature T its mean square is that of the density exp(-L / T), and
goes as T^{1/2} at the critical strength. With two hidden layers zero stays a minimum, from which noise
escapes in a time that grows as exp(barrier / T). Networks are trained; theory is closed, or a quadrature.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from jaxtyping import Array
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import brentq

from dynamics import collapse
from dynamics.collapse import Moments
from models.draws import normal
from models.optimizers import langevin
from models.training import record_steps, train
from sims import plotting
from sims.claims import Claim, Preset, at_least, at_most, equals, qualified, slope, stated
from sims.compare import SOLVE, WRONG_FACTOR, fit_line, largest, named_groups, percent
from sims.ranges import Count, Length, Positive, Range, Share, check_ranges
from sims.results import Context, Saved

TALK = "ziyin2022talk"
CRITICAL, ESCAPING = f"{TALK}, slide on critical dynamics", f"{TALK}, slide on escaping"
STRENGTHS = (0.9, 1.0, 1.1)  # over the critical one, at which there is noise
WARM = 1.1  # the factor of a temperature that is wrong on purpose
VARIANTS = ((2.0, 0.5, 1.0, 0.002), (0.5, 1.0, 2.0, 0.004), (1.0, 2.0, 0.5, 0.0005))  # a, s, c, T of others
LATE = 1e3  # from when on the power law is looked at, in units of 1 / |c|
ABOVE, BELOW = (5.0, 8.0), (4.0, 5.5)  # when rates are looked at, in units of 1 / |m|
START = 0.5  # of the amplitude, in its own unit
REST = 30.0  # when the network is at rest, in the same
ROOT = 0.6759782400673283  # 2 Gamma(3/4) / Gamma(1/4): of the density exp(-q^4 / 4) the mean of q^2
COLD, HOT = 0.36, 0.25  # strengths of networks with two hidden layers, of which the first has a high barrier
PASSABLE = 2.4  # the barrier over the temperature, from which on escape takes the time it should


Distance = Annotated[float, Range(at_least=0.005, at_most=0.3)]


@dataclass(frozen=True)
class Config:
    """The networks, how long they are trained, and the noise."""

    inputs: Annotated[int, Range(at_least=2)] = 4
    """Dimension of the inputs."""
    samples: Annotated[int, Range(at_least=10)] = 40
    """Examples in each data set."""
    widths: Annotated[tuple[Count, ...], Length(2)] = (3, 1, 2, 4)
    """Hidden units of networks at the critical strength, each with a data set of its own."""
    noises: Annotated[tuple[Positive, ...], Length(2)] = (0.7, 0.2, 2.0, 0.4)
    """Variances of the noise on their hidden units."""
    distances: Annotated[tuple[Distance, ...], Length(2)] = (0.02, 0.05, 0.1, 0.2)
    """Relative distances to the critical strength at which the first network relaxes, on both sides."""
    horizon: Annotated[float, Range(at_least=5 * LATE)] = 1e4
    """Time of training at the critical strength, in units of 1 / |c|."""
    rate: Annotated[float, Range(above=0, at_most=0.25)] = 0.2
    """Learning rate in the same units."""
    starts: Annotated[int, Range(at_least=2)] = 3
    """Random starts in which hidden units differ."""
    implicit: bool = False
    """Whether the gradient flow is solved beside descent; its solver compiles for longer than all else."""
    temperatures: Annotated[tuple[Positive, ...], Length(3)] = (0.001, 0.004, 0.016)
    """Temperatures of one neuron, lowest first."""
    chains: Annotated[int, Range(at_least=10)] = 192
    """Chains at each temperature and strength."""
    steps: Annotated[int, Range(at_least=1000)] = 8000
    """Steps of each, the first quarter of which is left out."""
    time_step: Share = 0.06
    """Time step of chains at rest, at the highest temperature and the critical strength."""
    cold: Annotated[tuple[Positive, ...], Length(3)] = (0.01, 0.012, 0.0145, 0.0175)
    """Temperatures at which a network with two hidden layers escapes, well below the barrier."""
    hot: Annotated[tuple[Positive, ...], Length(2)] = (0.02, 0.05)
    """Temperatures above it, at a strength with a lower barrier."""
    escapers: Annotated[int, Range(at_least=10)] = 1000
    """Chains that escape, at each temperature."""
    escape_step: Share = 0.2
    """Their time step."""
    patience: Positive = 800.0
    """Time after which those that have not are given up."""

    def __post_init__(self):
        check_ranges(self)
        if len(self.widths) != len(self.noises):
            raise ValueError(
                f"noises must be one per width, got {len(self.noises)} and {len(self.widths)} widths"
            )
        for name in ("distances", "temperatures", "cold", "hot"):
            values = getattr(self, name)
            if list(values) != sorted(set(values)):
                raise ValueError(f"{name} must increase, got {values}")


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(
        Config(),
        widths=(3, 1, 2, 4, 6, 8),
        noises=(0.7, 0.2, 2.0, 0.4, 1.0, 5.0),
        distances=(0.01, 0.02, 0.05, 0.1, 0.2, 0.3),
        rate=0.1,
        starts=8,
        implicit=True,
        temperatures=(0.001, 0.002, 0.004, 0.008, 0.016),
        chains=512,
        steps=20_000,
        time_step=0.03,
        cold=(0.01, 0.011, 0.0125, 0.0145, 0.017, 0.02),
        hot=(0.02, 0.03, 0.05),
        escapers=2000,
        escape_step=0.1,
        patience=1500.0,
    ),
    "paper": replace(Config(), inputs=20, widths=(10, 3, 1), noises=(0.7, 0.2, 2.0), samples=400),
}


class Network(NamedTuple):
    """A network with one hidden layer and equal units at the start, on its data.

    Hidden units beyond its width are zero and stay so: networks of several widths are lanes of one program.
    """

    moments: Moments
    noise: Any
    gamma: Any
    width: Any
    W: Any
    U: Any


@partial(jax.jit, static_argnames="config")
def _draw(config: Config, key: Array) -> tuple[Moments, Array, Array]:
    """Moments of a data set for each network, the first layer of equal units, and units that differ."""
    data, row, units = jax.random.split(key, 3)

    def moments(key):
        """Inputs of unequal variances, and targets that are linear in them but for a noise."""
        keys = jax.random.split(key, 3)
        x = normal(keys[0], (config.samples, config.inputs)) * jnp.geomspace(1.6, 0.4, config.inputs)[None]
        y = x @ normal(keys[1], (config.inputs,)) + 0.4 * normal(keys[2], (config.samples,))
        return collapse.moments(x, y)

    sets = jax.vmap(moments)(jax.random.split(data, len(config.widths)))
    shape = (config.starts, max(config.widths), config.inputs + 1)
    return sets, normal(row, (config.inputs,)) / 2, normal(units, shape)


def _network(config: Config, moments: Moments, index: int, share: float, start: np.ndarray) -> Network:
    """The network of that width and noise, at a share of its critical strength.

    `start` holds the first layer's rows in units of the common amplitude, without their part along c.
    """
    width, most = config.widths[index], max(config.widths)
    size = np.linalg.norm(moments.c)
    rows = start + (1 - start @ moments.c / size)[:, None] * moments.c / size
    active = np.arange(most) < width
    q = START * active / np.sqrt(_coefficient(moments, width, config.noises[index]))
    return Network(moments, config.noises[index], share * size, width, q[:, None] * rows, q[None])


def _with_signal(moments: Moments, signal: float) -> Moments:
    """The moments of targets in other units, in which |E[x y]| is as given."""
    scale = signal / np.linalg.norm(moments.c)
    return Moments(moments.A, moments.c * scale, moments.y2 * scale**2)


def _coefficient(moments: Moments, width: int, noise: float) -> float:
    """2 k / |c|, which makes the square of the amplitude and the time of all networks alike."""
    A, c, _ = moments
    return 4 * (width + noise) * (c @ A @ c) / np.linalg.norm(c) ** 3


def _lanes(config: Config, key: Array) -> dict[str, list[Network]]:
    """Networks at the critical strength, the first of them on both sides, and with units that differ."""
    drawn, row, different = jax.device_get(_draw(config, key))
    count, rows = len(config.widths), np.tile(row, (max(config.widths), 1))
    sets = [_with_signal(jax.tree.map(lambda leaf, i=i: leaf[i], drawn), 1.5**-i) for i in range(count)]
    groups = {"critical": [_network(config, sets[i], i, 1.0, rows) for i in range(count)]}
    for name, sign in (("above", 1), ("below", -1)):
        groups[name] = [_network(config, sets[0], 0, 1 + sign * d, rows) for d in config.distances]
    same = groups["critical"][0]
    groups["unequal"] = [
        same._replace(W=same.U.T * draw[:, :-1], U=same.U * draw[:, -1]) for draw in different
    ]
    return groups


def _amplitude(network: Network, params: list[Array]) -> Array:
    """The slow mode, root mean square over hidden units."""
    W, U = params
    modes = (U[..., 0, :] + W @ (network.moments.c / jnp.linalg.norm(network.moments.c))) / 2
    return jnp.sqrt(jnp.sum(modes**2, axis=-1) / network.width)


def _law(network: Network, ts: np.ndarray, factor: float) -> np.ndarray:
    """The closed form of the slow mode, with its coefficient k times a factor."""
    q0 = _amplitude(network, [network.W, network.U])
    # A network of width one has the coefficient of any other width for some noise: one program for all.
    noise = factor * (network.width + network.noise) - 1
    return np.asarray(collapse.critical_amplitude(ts, q0, network.gamma, network.moments, noise, 1))


def _exact_loss(data: tuple, params: list[Array]) -> Array:
    """The loss of a network, with the noise on its hidden units integrated."""
    return collapse.stochastic_linear_loss(params, *data)


def _trained(network: Network, steps: int, every: int, rate: float) -> Array:
    """The slow mode under gradient descent."""
    gammas = jnp.stack([network.gamma, network.gamma])
    _, path = train(
        Partial(_exact_loss, (network.moments, network.noise, gammas)),
        [network.W, network.U],
        optax.sgd(rate / jnp.linalg.norm(network.moments.c)),
        steps=steps,
        every=every,
        observe=Partial(_amplitude, network),
    )
    return path.ys


def _slowing(config: Config, key: Array) -> dict:
    """The slow mode under descent, at the critical strength and beside it, and its closed form."""
    groups = _lanes(config, key)
    steps, every = round(config.horizon / config.rate), max(1, round(1 / config.rate))
    descend = jax.jit(jax.vmap(partial(_trained, steps=steps, every=every, rate=config.rate)))
    paths, time = named_groups(descend, groups), config.rate * record_steps(steps, every)
    kept = np.unique(np.geomspace(1, time.size - 1, 60).round().astype(int))
    networks = groups["critical"]
    sizes = [np.linalg.norm(one.moments.c) for one in networks]

    def law(factor):
        laws = [_law(one, time[kept] / size, factor) for one, size in zip(networks, sizes, strict=True)]
        return "network time", np.array(laws)

    def side(name):
        rates = [
            _rate(2 * d * time, q, name, 2 * d * config.rate)
            for d, q in zip(config.distances, paths[name], strict=True)
        ]
        return {"rate": ("distance", np.array(rates)), "path": ("time", paths[name][0, kept])}

    found = {
        "time": ("time", time[kept]),
        "scale": ("network", np.array([_coefficient(*one[:1], one.width, one.noise) for one in networks])),
        "amplitude": ("network time", paths["critical"][:, kept]),
        "law": {"right": law(1.0), "wrong": law(WRONG_FACTOR)},
        "unequal": ("start time", paths["unequal"][:, kept]),
        "distance": ("distance", np.asarray(config.distances)),
        "above": side("above"),
        "below": side("below"),
    }
    return found | ({"flow": _flows(config, groups, time[kept])} if config.implicit else {})


def _rate(s: np.ndarray, path: np.ndarray, side: str, step: float = 0.0) -> float:
    """The rate at which a path goes to rest, in units of |m|, from times s in units of 1 / |m|.

    A step of descent multiplies what is left by 1 - rate step.
    """
    (start, end), rest = (ABOVE, 0.0) if side == "above" else (BELOW, path[-1])
    at = (s >= start - 1e-9) & (s <= end + 1e-9)
    fall = -fit_line(s[at], np.log(np.abs(path[at] - rest))).slope
    return -np.expm1(-fall * step) / step if step else fall


def _flows(config: Config, groups: dict[str, list[Network]], time: np.ndarray) -> dict:
    """The slow mode along the gradient flow, at these times, and its rates beside the critical strength."""
    later = np.append(np.linspace(0, ABOVE[1], time.size), REST)

    def timed(name, index, network):
        size = np.linalg.norm(network.moments.c)
        critical = name in ("critical", "unequal")
        return network, np.r_[0, time] / size if critical else later / (2 * config.distances[index] * size)

    timed_groups = {
        name: [timed(name, index, one) for index, one in enumerate(networks)]
        for name, networks in groups.items()
    }
    found = named_groups(jax.jit(jax.vmap(_flow)), timed_groups)
    if not all(np.all(ok) for _, ok in found.values()):
        raise RuntimeError("the flow: the solver gave up, or the numbers are not finite")
    rates = {
        name: ("distance", np.array([_rate(later, q, name) for q in found[name][0]]))
        for name in ("above", "below")
    }
    return {"amplitude": ("network time", found["critical"][0][:, 1:]), **rates}


def _flow(timed: tuple[Network, Array]) -> tuple[Array, Array]:
    """The slow mode along the flow, solved implicitly since it lasts long, and whether it is."""
    network, ts = timed
    path = collapse.stochastic_linear_flow(
        [network.W, network.U],
        network.moments,
        network.noise,
        jnp.stack([network.gamma, network.gamma]),
        ts,
        solver=diffrax.Kvaerno5(),
        **({"rtol": 1e-9, "atol": 1e-12} if ts.dtype == jnp.float64 else {"rtol": 1e-5, "atol": 1e-7}),
        **SOLVE,
    )
    return _amplitude(network, path.ys), path.ok


class Neuron(NamedTuple):
    """A network of one unit, L = stretch u^2 w^2 - 2 c u w + gamma (u^2 + w^2), and noise in time steps.

    The stretch is a (1 + s), for an input of variance a and noise of variance s on the unit.
    """

    stretch: Any
    c: Any
    gamma: Any
    temperature: Any
    step: Any


def _neuron_loss(neuron: Neuron, params: Array) -> Array:
    """The sum of the losses of many neurons u, w."""
    u, w = params
    return jnp.sum(neuron.stretch * (u * w) ** 2 - 2 * neuron.c * u * w + neuron.gamma * (u**2 + w**2))


def _square(params: Array) -> Array:
    """The square of the slow mode (u + w) / sqrt(2)."""
    return (params[0] + params[1]) ** 2 / 2


def _in_steps(neuron: Neuron, params: Array) -> Array:
    """The loss whose density finite steps of a chain have, up to their square."""
    loss = Partial(_neuron_loss, neuron)
    slopes, bends = jax.grad(loss)(params), jnp.trace(jax.hessian(loss)(params))
    return loss(params) + neuron.step * (neuron.temperature * bends / 2 - (slopes @ slopes) / 4)


def _moment(neuron: Neuron) -> Array:
    """The mean square of the slow mode by quadrature, for chains with these steps."""
    depth = jnp.maximum(neuron.c - neuron.gamma, 0) / neuron.stretch
    half = (40 * neuron.temperature / neuron.stretch) ** 0.25 + 1.2 * jnp.sqrt(depth)
    box = half * jnp.array([[-1.0, 1.0], [-1.0, 1.0]])
    return collapse.gibbs_mean(Partial(_in_steps, neuron), _square, neuron.temperature, box)


@partial(jax.jit, static_argnames="config")
def _chains(config: Config, neurons: Neuron, keys: Array) -> Array:
    """Means over time of the square of the slow mode, of every chain at rest, (lanes, chains)."""

    def trained(neuron, key):
        optimizer = langevin(neuron.step, neuron.temperature, key)
        start = jnp.full((2, config.chains), 0.1)
        loss = Partial(_neuron_loss, neuron)
        _, path = train(loss, start, optimizer, steps=config.steps, every=10, observe=_square)
        return jnp.mean(path.ys[path.ys.shape[0] // 4 :], axis=0)

    return jax.vmap(trained)(neurons, keys)


def _steps(config: Config, stretch: Any, c: Any, gamma: Any, temperature: Any) -> np.ndarray:
    """Time steps of chains: at the critical strength the colder a neuron is, the slower; else it is quick."""
    slowness = np.sqrt(max(config.temperatures) * c**2 / (stretch * temperature))
    steps = np.where(gamma == c, slowness, 0.3) * config.time_step
    return np.minimum(steps, 0.25) / c  # 4 c is the largest curvature there is at rest


def _noisy(config: Config, key: Array) -> dict:
    """The slow mode of one neuron with noise: chains, and quadrature right, wrong and for finite steps."""
    temperatures, strengths = np.asarray(config.temperatures), np.asarray(STRENGTHS)
    T, share = (part.ravel() for part in np.meshgrid(temperatures, strengths, indexing="ij"))
    base = np.broadcast_arrays(1.0, 1.0, share, T)
    stretch, c, other = np.array([(a * (1 + s), c, t) for a, s, c, t in VARIANTS]).T
    stretch, c, gamma, T = map(np.append, base, (stretch, c, c, other))
    neurons = Neuron(stretch, c, gamma, T, _steps(config, stretch, c, gamma, T))
    count = neurons.c.size
    found = np.asarray(_chains(config, neurons, jax.random.split(key, count)))
    fine = np.geomspace(1e-4, temperatures[-1], 13)
    exact = neurons._replace(step=0 * neurons.step)
    lines = Neuron(*(part.ravel() for part in np.broadcast_arrays(1.0, 1.0, strengths[:, None], fine, 0.0)))
    sets = exact, exact._replace(temperature=WARM * neurons.temperature), neurons, lines
    lanes = Neuron(*(np.concatenate(parts) for parts in zip(*sets, strict=True)))
    moments = np.asarray(jax.jit(lambda lanes: jax.lax.map(_moment, lanes))(lanes))
    right, warmer, in_steps, curves = np.split(moments, np.cumsum([count] * 3))
    shape = temperatures.size, strengths.size
    inner = slice(0, temperatures.size * strengths.size)
    return {
        "temperature": ("temperature", temperatures),
        "strength": ("strength", strengths),
        "chains": ("temperature strength chain", found[inner].reshape(*shape, -1)),
        "exact": ("temperature strength", right[inner].reshape(shape)),
        "warm": ("temperature strength", warmer[inner].reshape(shape)),
        "in_steps": ("temperature strength", in_steps[inner].reshape(shape)),
        "fine": ("fine", fine),
        "curve": ("strength fine", curves.reshape(strengths.size, -1)),
        "other": {
            "unit": ("other", np.sqrt(T / stretch)[inner.stop :]),
            "chains": ("other chain", found[inner.stop :]),
        },
    }


class Deep(NamedTuple):
    """Two hidden layers of one unit, L = (u v w)^2 - 2 u v w + gamma (u^2 + v^2 + w^2), with noise."""

    gamma: Any
    level: Any
    temperature: Any


def _deep_loss(gamma: Any, params: Array) -> Array:
    product = params[0] * params[1] * params[2]
    return jnp.sum(product**2 - 2 * product) + gamma * jnp.sum(params**2)


@partial(jax.jit, static_argnames="config")
def _passages(config: Config, deep: Deep, keys: Array) -> Array:
    """Times at which chains from zero pass over the saddle, infinite where they have not, (lanes, chains)."""

    def trained(deep, key):
        optimizer = langevin(config.escape_step, deep.temperature, key)
        _, path = train(
            Partial(_deep_loss, deep.gamma),
            jnp.zeros((3, config.escapers)),
            optimizer,
            steps=round(config.patience / config.escape_step),
            every=2,
            observe=lambda params: params[0] * params[1] * params[2] > deep.level,
        )
        # Between two records they pass in the middle of them.
        first = 2 * config.escape_step * (jnp.argmax(path.ys, axis=0) - 0.5)
        return jnp.where(jnp.any(path.ys, axis=0), first, jnp.inf)

    return jax.vmap(trained)(deep, keys)


def _escape(config: Config, key: Array) -> dict:
    """Chains that escape from zero, at temperatures well below a barrier, and at those above another."""
    cases = {"cold": (COLD, config.cold), "hot": (HOT, config.hot)}
    ends = {name: _saddle_and_minimum(gamma) for name, (gamma, _) in cases.items()}
    lanes = [Deep(gamma, np.mean(ends[name]) ** 3, T) for name, (gamma, Ts) in cases.items() for T in Ts]
    deep = Deep(*(jnp.asarray(part) for part in zip(*lanes, strict=True)))
    times = np.asarray(_passages(config, deep, jax.random.split(key, len(lanes))))
    saddles = jnp.asarray([ends[name][0] for name, (_, Ts) in cases.items() for _ in Ts])
    rates = np.asarray(jax.jit(jax.vmap(_rate_over))(deep, saddles))
    parts = {"cold": slice(0, len(config.cold)), "hot": slice(len(config.cold), None)}

    def entries(name):
        (gamma, Ts), part = cases[name], parts[name]
        b = jnp.array([0.0, ends[name][0]])
        loss = collapse.effective_landscape(b, Moments(np.eye(1), np.ones(1), 1.0), gamma, 0.0, 1, 2)
        return {
            "temperature": (name, np.asarray(Ts)),
            "passage": (f"{name} escaper", times[part]),
            "rate": (name, rates[part]),
            "barrier": float(loss[1] - loss[0]),
        }

    return {name: entries(name) for name in cases}


def _saddle_and_minimum(gamma: float) -> tuple[float, float]:
    """The weights b, all three equal, of the saddle around zero and of the minimum behind it."""
    top = 0.25 ** (1 / 3)

    def slope(b: float) -> float:
        return b**4 - b + gamma

    saddle: Any = brentq(slope, 0.0, top)
    minimum: Any = brentq(slope, top, 1.0)
    return saddle, minimum


def _rate_over(deep: Deep, saddle: Array) -> Array:
    """The rate of Eyring and Kramers over the four saddles that signs of the weights make of one."""
    loss = Partial(_deep_loss, deep.gamma)
    return collapse.escape_rate(loss, jnp.zeros(3), saddle * jnp.ones(3), deep.temperature, 4)


def run(config: Config, context: Context) -> dict:
    """Train networks at the critical strength and beside it, and with noise at rest and in escape."""
    slow, noisy, escape = jax.random.split(jax.random.key(context.seed), 3)
    context.progress("slowing down", 0.0)
    found: dict[str, Any] = {"slow": _slowing(config, slow)}
    context.progress("chains at rest", 0.4)
    found["noise"] = _noisy(config, noisy)
    context.progress("escape", 0.6)
    return found | {"escape": _escape(config, escape)}


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """What is universal in the dynamics near the critical point, with its exponents, and escape."""
    yield _relaxation_rates(saved["slow"])
    yield _power_law(saved["slow"])
    yield _universal(saved["slow"])
    yield _at_rest(saved["noise"])
    yield _root_of_temperature(saved["noise"])
    yield _escape_times(config, saved["escape/cold"], saved["escape/hot"])


RATES = {
    "descent above": "above/rate",
    "descent below": "below/rate",
    "flow above": "flow/above",
    "flow below": "flow/below",
}


def _relaxation_rates(slow: Any) -> Claim:
    at = int(np.argmin(np.abs(np.asarray(slow["distance"]) - 0.02)))
    why = "the next order in the distance, which is two percent of the critical strength"
    return stated(
        "slowing",
        "Close to the critical strength training slows down: the slow mode relaxes at 2 (gamma - gamma_c) "
        "above, and at 4 (gamma_c - gamma) below",
        f"{CRITICAL} (the rates are derived)",
        *(
            equals(
                f"{name}: rate over its law", slow[path][at] / (2 if "below" in name else 1), 1, 0.02, why=why
            )
            for name, path in RATES.items()
            if path in slow
        ),
    )


def _late(time: Any) -> np.ndarray:
    return np.asarray(time) >= LATE


def _slopes(time: Any, amplitudes: Any) -> np.ndarray:
    """The log-log slope of each amplitude at late times."""
    at = _late(time)
    return np.array([fit_line(np.log(time[at]), np.log(q[at])).slope for q in np.asarray(amplitudes)])


def _amplitudes(slow: Any) -> dict[str, np.ndarray]:
    """The slow mode at the critical strength, under descent and along the flow where that is solved."""
    paths = {"descent": "amplitude", "flow": "flow/amplitude"}
    return {name: np.asarray(slow[path]) for name, path in paths.items() if path in slow}


def _power_law(slow: Any) -> Claim:
    time, scale = np.asarray(slow["time"]), np.asarray(slow["scale"])
    found = _amplitudes(slow)
    ends = {name: q[:, -1] * np.sqrt(scale * time[-1]) for name, q in found.items()}
    why = "the next order, which falls as log(t) / t"
    return stated(
        "power-law",
        "At the critical strength the slow mode falls as (4 (width + s) c^T A c / |c|^2 t)^{-1/2}",
        f"{CRITICAL} (the law is derived)",
        *(
            at_most(
                f"{name}: slope from t = 1000 / |c| on, plus 1/2: largest",
                largest(_slopes(time, q) + 0.5),
                0.01,
                why=why,
            )
            for name, q in found.items()
        ),
        *(
            at_most(
                f"{name}: amplitude at the end over its law, less 1: largest",
                largest(end - 1),
                2e-3,
                why=why,
            )
            for name, end in ends.items()
        ),
    )


def _universal(slow: Any) -> Claim:
    time, at, found = np.asarray(slow["time"]), _late(slow["time"]), _amplitudes(slow)
    right, wrong = (np.asarray(slow[f"law/{law}"])[:, at] for law in ("right", "wrong"))
    unequal = np.asarray(slow["unequal"])
    ends = unequal[:, -1] * np.sqrt(slow["scale"][0] * time[-1])
    why = "the next order, which falls as log(t) / t"
    memory = "units that differ approach each other as t^(-s / (width + s)) alone"
    return qualified(
        "universal",
        "Training near the critical point is universal: one curve for all widths, noises and data, in which "
        "these only set the unit of the amplitude",
        CRITICAL,
        condition="hidden units start alike; else the exponent is the same, and the factor is not",
        inside=[
            *(
                at_most(
                    f"{name}: amplitude over the curve, less 1: largest of all networks",
                    largest(q[:, at] / right - 1),
                    2e-3,
                    why=why,
                )
                for name, q in found.items()
            ),
            at_least(
                f"descent: the least, with a coefficient that is {percent(WRONG_FACTOR)} too large",
                np.min(np.abs(found["descent"][:, at] / wrong - 1)),
                8e-3,
                why="the amplitude goes with its root",
            ),
        ],
        outside=[
            at_least(
                "units that differ: largest amplitude over the curve's end, less 1",
                largest(ends - 1),
                0.01,
                why=memory,
            ),
            at_most(
                "units that differ: slope plus 1/2: largest",
                largest(_slopes(time, unequal) + 0.5),
                0.05,
                why=memory,
            ),
        ],
    )


def _mean_and_error(chains: Any) -> tuple[np.ndarray, np.ndarray]:
    """Mean over independent chains, and its standard error."""
    chains = np.asarray(chains)
    return chains.mean(axis=-1), chains.std(axis=-1, ddof=1) / chains.shape[-1] ** 0.5


def _at_rest(noise: Any) -> Claim:
    mean, error = _mean_and_error(noise["chains"])
    exact, warm, in_steps = (np.asarray(noise[name]) for name in ("exact", "warm", "in_steps"))
    return stated(
        "moments",
        "Gradient descent with Gaussian noise comes to rest with the density exp(-L / T), below, at and "
        "above the critical strength",
        f"{CRITICAL} (the density is that of Langevin's equation)",
        at_most(
            "mean square of the slow mode less its quadrature, in standard errors: largest",
            largest((mean - exact) / error),
            3,
            why="chance takes a few runs in a hundred beyond that",
        ),
        at_most(
            "what finite steps add to it, in standard errors: largest",
            largest((in_steps - exact) / error),
            0.5,
            why="steps are small enough where chance hides them",
        ),
        at_least(
            f"a temperature {percent(WARM)} too large, in standard errors: largest",
            largest((mean - warm) / error),
            4,
            why="a wrong temperature would be seen",
        ),
    )


def _root_of_temperature(noise: Any) -> Claim:
    T, fine = np.asarray(noise["temperature"]), np.asarray(noise["fine"])
    mean, _ = _mean_and_error(noise["chains"])
    curve = np.asarray(noise["curve"])
    cold = fine <= 2e-3
    above = 1 - 2 * (STRENGTHS[2] - 1) * curve[2] / fine
    other = _mean_and_error(noise["other/chains"])[0] / np.asarray(noise["other/unit"])
    why = "the next order in the root of T, and the chains' chance"
    return stated(
        "noise-exponent",
        "With noise the mean square of the slow mode goes as T^{1/2} at the critical strength, and as T "
        "above it",
        f"{CRITICAL} (the exponents are derived)",
        slope(
            "chains: exponent of T at the critical strength",
            fit_line(np.log(T), np.log(mean[:, 1])).slope,
            0.5,
            0.025,
            why=why,
        ),
        slope(
            "quadrature: exponent for T up to 0.002",
            fit_line(np.log(fine[cold]), np.log(curve[1, cold])).slope,
            0.5,
            0.005,
            why="the next order in the root of T",
        ),
        at_most(
            "other data and noise: mean square over 0.676 (T / (a (1 + s)))^{1/2}, less 1: largest",
            largest(other / ROOT - 1),
            0.05,
            why=why,
        ),
        slope(
            "above: order in T of what is missing to T / (2 (gamma - gamma_c))",
            fit_line(np.log(fine[cold]), np.log(above[cold])).slope,
            1,
            0.2,
            why="the next order in T",
        ),
        at_most("the same at the lowest T", above[0], 0.02, why="the next order in T"),
    )


def _mean_passage(passages: Any, patience: float) -> np.ndarray:
    """Mean times of rare events, some of which are still to come: the whole time waited over their number."""
    passages = np.asarray(passages)
    waited = np.minimum(passages, patience).sum(axis=-1)
    return waited / np.isfinite(passages).sum(axis=-1)


def _over_barrier(part: Any, patience: float) -> tuple[float, float]:
    """The slope of the log of the mean time over 1 / T, and that time times the rate at the lowest T."""
    mean = _mean_passage(part["passage"], patience)
    return fit_line(1 / np.asarray(part["temperature"]), np.log(mean)).slope, mean[0] * part["rate"][0]


def _escape_times(config: Config, cold: Any, hot: Any) -> Claim:
    (found, product), (outside, _) = (_over_barrier(part, config.patience) for part in (cold, hot))
    ratio = cold["barrier"] / np.asarray(cold["temperature"])
    return qualified(
        "escape",
        "Networks with two hidden layers have to escape from zero: over the barrier of the effective "
        "landscape, in a time that grows as exp(barrier / T)",
        f"{ESCAPING} (the barrier's law is that of Eyring and Kramers)",
        condition=f"T is at most the barrier over {PASSABLE:g}",
        inside=[
            at_least("least barrier over T", ratio.min(), PASSABLE, why="the condition"),
            equals(
                "slope of log time over 1 / T, over the barrier",
                found / cold["barrier"],
                1,
                0.1,
                why="a chance of three percent, and the next order in T",
            ),
            equals(
                "mean time at the lowest T times the rate of Eyring and Kramers",
                product,
                1,
                0.4,
                why="the next order, T over the barrier, is a fifth there",
            ),
        ],
        outside=[
            at_least(
                "T above the barrier: the same slope over the barrier, off one by",
                abs(outside / hot["barrier"] - 1),
                0.2,
                why="hot chains walk at random, in a time that goes as 1 / T",
            )
        ],
    )


def figure(config: Config, saved: Saved) -> Figure:
    """The slow mode over time, its rates over the strength, its square over temperature, and escape."""
    drawn, ((decay, rates), (moments, escape)) = plotting.new_figure(2, 2)
    _decay_panel(decay, config, saved)
    _rate_panel(rates, saved)
    _moment_panel(moments, saved)
    _escape_panel(escape, config, saved)
    return drawn


def _decay_panel(ax: Axes, config: Config, saved: Saved) -> None:
    unit, time = np.sqrt(saved["slow/scale"]), np.asarray(saved["slow/time"])
    count = len(config.widths)
    for index, (width, s) in enumerate(zip(config.widths, config.noises, strict=True)):
        q = np.asarray(saved["slow/amplitude"])[index] * unit[index]
        every = slice(index, None, count)
        ax.loglog(time[every], q[every], "osDvP^"[index % 6], ms=5, label=f"width {width}, s = {s:g}")
    for index, q in enumerate(np.asarray(saved["slow/unequal"])):
        label = "units that differ" if index == 0 else None
        ax.loglog(time, q * unit[0], color="0.7", linewidth=1, zorder=1, label=label)
    for name, style in (("above", "--"), ("below", ":")):
        label = f"{100 * config.distances[0]:g} % {name} it"
        ax.loglog(
            time, np.asarray(saved[f"slow/{name}/path"]) * unit[0], style, color="C5", zorder=1, label=label
        )
    ax.loglog(time, np.asarray(saved["slow/law/right"])[0] * unit[0], label="closed form", **plotting.THEORY)
    plotting.finish(
        ax,
        "Slow mode at the critical strength",
        "|c| × time",
        "amplitude in its own unit",
        {"loc": "upper center", "ncols": 2, "fontsize": "small", "columnspacing": 1},
        ylim=(4e-3, 30),
    )


def _rate_panel(ax: Axes, saved: Saved) -> None:
    distance = np.asarray(saved["slow/distance"])
    for index, (name, sign, factor) in enumerate((("below", -1, 2), ("above", 1, 1))):
        rate = 2 * distance * np.asarray(saved[f"slow/{name}/rate"])
        ax.plot(1 + sign * distance, rate, "o", color=f"C{index}", label=f"descent {name}")
        line = np.linspace(0, distance[-1], 2)
        ax.plot(1 + sign * line, 2 * factor * line, label="its law" if index else None, **plotting.THEORY)
    plotting.make_room(ax, above=0.05)
    plotting.finish(ax, "Rate of relaxation", "γ / critical γ", "rate / |c|", "upper right")


def _moment_panel(ax: Axes, saved: Saved) -> None:
    mean, error = _mean_and_error(saved["noise/chains"])
    for index, share in enumerate(saved["noise/strength"]):
        ax.errorbar(
            saved["noise/temperature"],
            mean[:, index],
            3 * error[:, index],
            fmt="o",
            color=f"C{index}",
            label=f"{share:g}",
        )
        label = "quadrature" if index == 2 else None
        ax.plot(saved["noise/fine"], np.asarray(saved["noise/curve"])[index], label=label, **plotting.THEORY)
    ax.set(xscale="log", yscale="log")
    plotting.finish(
        ax,
        "Noise: slow mode at rest",
        "temperature T",
        "mean square",
        {"loc": "lower right", "title": "γ / critical γ"},
    )


def _escape_panel(ax: Axes, config: Config, saved: Saved) -> None:
    for index, name in enumerate(("cold", "hot")):
        part = saved[f"escape/{name}"]
        inverse = 1 / np.asarray(part["temperature"])
        time = _mean_passage(part["passage"], config.patience)
        barrier = float(part["barrier"])
        gamma = COLD if name == "cold" else HOT
        ax.semilogy(inverse, time, "o", color=f"C{index}", label=f"chains, γ = {gamma:g}")
        ax.semilogy(
            inverse, 1 / np.asarray(saved[f"escape/{name}/rate"]), color=f"C{index}", label="Eyring–Kramers"
        )
        law = time[0] * np.exp(barrier * (inverse - inverse[0]))
        ax.semilogy(inverse, law, label="slope: the barrier" if index else None, **plotting.THEORY)
    plotting.make_room(ax, above=0.3)
    plotting.finish(ax, "Escape from zero, two hidden layers", "1 / T", "mean time", "upper left")
