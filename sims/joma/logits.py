"""Real attention logits against those estimated from the hidden weights: direction, size, and both terms.

The setting of the source's Figure 2: one query, twenty classes with one context each, softmax attention with
temperature 0.5, hidden nodes that are the class logits. Ten tokens are common to all classes; ten distinct
ones have weights that move along the classes as a Gaussian ("gaussian") or are drawn like those of the common
ones ("random"). Beside it, a query whose samples all share one context, for which the theory is exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics import joma
from dynamics.flow import Trajectory
from models.attention import JomaBlock, JomaInputs, JomaState, joma_observer
from models.functional import as_function
from models.losses import bind, cross_entropy
from models.training import Descent, train
from sims import plotting
from sims.claims import SECOND_ORDER, Claim, Preset, at_least, at_most, equals, qualified, slope, stated
from sims.compare import compare, convergence_order, named_lanes, require_ok
from sims.ranges import Count, Positive, check_ranges
from sims.results import Context, Saved

COMMON, DISTINCT, CLASSES, DIM = 10, 10, 20, 30
TOKENS = COMMON + DISTINCT
CONTEXTS = ("gaussian", "random")
EARLY = 100  # steps after which the estimate is still right in size
# By what each estimate of the logits is compared with the real ones.
MEASURES = {
    "estimate": ("correlation", "relative_l2", "amplitude_ratio"),
    "first": ("correlation",),
    "second": ("correlation",),
    "moving": ("relative_l2",),
}


@dataclass(frozen=True)
class Config:
    """Training, with the numbers of the source's Figure 2."""

    seeds: Count = 32
    """Runs with their own contexts and initial weights."""
    steps: Count = 2000
    """Steps of training."""
    every: Count = 10
    """Steps between two records."""
    learning_rate: Positive = 0.1
    """Learning rate of all weights, gradient descent without momentum."""
    temperature: Positive = 0.5
    """Divides the attention logits."""
    scale: Positive = 0.01
    """Standard deviation of all weights at the start."""
    descent: Descent = Descent(horizon=100.0, points=1000, substeps=(1, 2, 4))
    """Gradient descent on one context at several learning rates."""

    def __post_init__(self):
        check_ranges(self)
        if self.steps < EARLY or (self.every > 0 and EARLY % self.every):
            raise ValueError(
                f"every must divide {EARLY} and steps be at least that, got {self.every}, {self.steps}"
            )


_QUICK = Config()
PRESETS: dict[Preset, Config] = {
    "quick": _QUICK,
    "standard": replace(_QUICK, seeds=128, descent=replace(_QUICK.descent, substeps=(1, 2, 5, 10))),
    "paper": replace(_QUICK, seeds=1000, descent=replace(_QUICK.descent, substeps=(1, 2, 5, 10, 20))),
}


def _contexts(key: jax.Array) -> dict[str, jax.Array]:
    """The context of every class, distinct tokens first, (CLASSES, TOKENS)."""
    random = jax.random.uniform(key, (CLASSES, TOKENS), maxval=0.5)
    place = jnp.arange(CLASSES)[:, None] * (DISTINCT / CLASSES)
    moving = jnp.exp(-((jnp.arange(DISTINCT)[None] - place) ** 2) / 30)
    both = {"gaussian": random.at[:, :DISTINCT].set(moving), "random": random}
    return {name: x / jnp.sum(x, axis=1, keepdims=True) for name, x in both.items()}


def _problem(key: jax.Array, x: jax.Array, labels: jax.Array, config: Config):
    """Loss, parameters and observer of a block trained on contexts x of one query."""
    key_W, key_z = jax.random.split(key)
    U = jnp.eye(DIM)
    block = JomaBlock(
        U[:, :TOKENS],
        U[:, TOKENS : TOKENS + 1],
        config.scale * jax.random.normal(key_W, (DIM, CLASSES)),
        config.scale * jax.random.normal(key_z, (1, TOKENS)),
        kind="softmax",
        activation=jax.nn.identity,
        temperature=config.temperature,
    )
    predict, params = as_function(block)
    inputs = JomaInputs(x, jnp.zeros(len(x), int))
    return bind(cross_entropy, (predict, inputs, labels)), params, joma_observer(block)


def _estimates(seen: JomaState, x: jax.Array, config: Config) -> dict[str, jax.Array]:
    """Real logits along a path, and those estimated from its hidden weights, (T, M) each."""
    V, z = seen.V, seen.z[:, 0]
    # The temperature divides the gradient in z as it does the logits.
    rate = 1 / config.temperature
    mean = jax.vmap(lambda z: jnp.mean(joma.attend(z, x, "softmax", config.temperature), axis=0))(z)
    invariant = partial(joma.invariant, kind="softmax", learning_rate_z=rate, mean_attention=mean[0])
    kept = jax.vmap(invariant)(V, z)
    half_square = rate * jnp.sum(V**2, axis=2) / 2
    return {
        "real": z,
        "estimate": z - rate * (kept - kept[:1]),
        "first": half_square,
        "second": -jnp.sum(half_square, axis=1, keepdims=True) * mean[:1],
        "moving": joma.softmax_logits(V, mean, z[0], rate),
    }


@partial(jax.jit, static_argnames="config")
def _figure_2(keys: jax.Array, config: Config) -> dict[str, Trajectory]:
    """Logits (seed, T, M) by context, over steps times learning rate."""

    def one(key, x):
        loss, params, observe = _problem(key, x, jnp.arange(CLASSES), config)
        rate = config.learning_rate
        options = {"steps": config.steps, "every": config.every, "observe": observe, "time_step": rate}
        _, path = train(loss, params, optax.sgd(rate), **options)
        return Trajectory(path.ts, _estimates(path.ys, x, config), path.ok)

    contexts = jax.vmap(lambda key: _contexts(jax.random.fold_in(key, 1)))(keys)
    return named_lanes(lambda x: jax.vmap(one)(keys, x), **contexts)


@partial(jax.jit, static_argnames="config")
def _one_context(key: jax.Array, config: Config) -> Trajectory:
    """Logits (L, T, M) at every learning rate, where all samples share a context."""
    key_x, key_labels, key_block = jax.random.split(key, 3)
    x = jnp.broadcast_to(_contexts(key_x)["random"][:1], (CLASSES, TOKENS))
    labels = jax.random.randint(key_labels, (CLASSES,), 0, CLASSES)
    loss, params, observe = _problem(key_block, x, labels, config)
    _, path = config.descent.train(loss, params, observe=observe)
    return Trajectory(path.ts, jax.vmap(lambda seen: _estimates(seen, x, config))(path.ys), path.ok)


def _medians(path: Trajectory) -> dict[str, dict[str, np.ndarray]]:
    """How each estimate compares with the real logits, relative to these: medians over the seeds, (T,)."""
    found = {}
    for name, measures in MEASURES.items():
        pairs = zip(path.ts, path.ys["real"], path.ys[name], strict=True)
        seeds = [compare(Trajectory(ts, real, True), Trajectory(ts, of, True)) for ts, real, of in pairs]
        found[name] = {what: np.median([getattr(seed, what) for seed in seeds], axis=0) for what in measures}
    return found


def run(config: Config, context: Context) -> dict:
    """Train the block, estimate its logits from its hidden weights, and compare over time."""
    key_figure, key_one = jax.random.split(jax.random.key(context.seed))
    context.progress("training on the figure's contexts", 0.0)
    paths = jax.device_get(_figure_2(jax.random.split(key_figure, config.seeds), config))
    context.progress("training on one context", 0.6)
    path = jax.device_get(_one_context(key_one, config))
    require_ok("training at these learning rates", *paths.values(), path)

    context.progress("comparing", 0.9)
    one, first = path.ys, jax.tree.map(lambda leaf: leaf[0], paths["gaussian"])
    change = np.max(np.abs(one["real"] - one["real"][:, :1]), axis=(1, 2))
    errors = {
        name: np.max(np.abs(one[name] - one["real"]), axis=(1, 2)) / change for name in ("estimate", "moving")
    }
    return {
        "step": ("step", first.ts / config.learning_rate),
        "logit": ("step token", {name: first.ys[name] for name in ("real", "estimate")}),
        **{name: ("step", _medians(path)) for name, path in paths.items()},
        "rate": ("rate", config.descent.rates),
        "error": ("rate", errors),
        "amplitude": np.linalg.norm(one["moving"][-1, -1]) / np.linalg.norm(one["real"][-1, -1]),
    }


def _of_contexts(saved: Saved, name: str) -> np.ndarray:
    """A median over time on both of `CONTEXTS`, (2, T)."""
    return np.stack([saved[f"{context}/{name}"] for context in CONTEXTS])


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """The estimate's direction and size, its terms, the mean attention that moves, and one context."""
    yield _correlation(config, saved)
    first, second = (_of_contexts(saved, f"{name}/correlation") for name in ("first", "second"))
    at_early, at_end, never = first[:, EARLY // config.every].max(), first[:, -1].min(), second.max()
    recorded, larger = "a recorded run has", "larger correlation"
    yield stated(
        "terms",
        "Of the estimate's terms the squared weights find the direction late, the mean attention never",
        "tian2024joma, Figure 2",
        at_most(f"squared weights: {larger} at step {EARLY}", at_early, 0.5, why=f"{recorded} -0.33 to 0.41"),
        at_least("squared weights: smaller correlation at the end", at_end, 0.9, why=f"{recorded} 0.97"),
        at_most(f"mean attention: {larger} over the run", never, 0.6, why=f"{recorded} 0.0 to 0.3"),
    )
    moving, constant = (_of_contexts(saved, f"{name}/relative_l2")[:, -1] for name in ("moving", "estimate"))
    of_the_end, most = "error left where the mean moves, of the error at the end", "most is above two thirds"
    yield stated(
        "moving-mean",
        "The estimate's size is wrong because the mean attention is taken to be constant",
        "tian2024joma, proof of Theorem 1 (derived here from it)",
        *(
            at_most(f"{name}: {of_the_end}", left, 1 / 3, why=most)
            for name, left in zip(CONTEXTS, moving / constant, strict=True)
        ),
    )
    yield _one_context_claim(saved)


def _correlation(config: Config, saved: Saved) -> Claim:
    early = EARLY // config.every
    correlation, error, amplitude = (_of_contexts(saved, f"estimate/{what}") for what in MEASURES["estimate"])
    gaussian, random = correlation.min(axis=1)
    error_early, error_late = error[:, early].max(), error[:, -1].min()
    over_real = "estimated over real amplitude"
    young = "logits of a tenth: their squares have not grown yet"
    single = "single runs end on both sides of 0.95"
    return qualified(
        "correlation",
        "The logits estimated from the hidden weights are those of softmax attention",
        "tian2024joma, Theorem 1 and Figure 2",
        condition="their direction is meant; their size is right early in training only",
        inside=[
            at_least("gaussian: smallest correlation over the run", gaussian, 0.95, why="the recorded line"),
            at_least("random: smallest correlation over the run", random, 0.9, why=single),
            at_most(f"larger relative L2 error at step {EARLY}", error_early, 0.1, why=young),
        ],
        outside=[
            at_least("smaller relative L2 error at the end", error_late, 0.5, why="a correlation hides it"),
            *(
                at_least(
                    f"{name}: {over_real} at the end", ratio, 2, why="twice the size is no estimate of it"
                )
                for name, ratio in zip(CONTEXTS, amplitude[:, -1], strict=True)
            ),
        ],
    )


def _one_context_claim(saved: Saved) -> Claim:
    order = {name: convergence_order(saved["rate"], error).slope for name, error in saved["error"].items()}
    left, size = saved["error/estimate"][-1], saved["amplitude"]
    tenth = "the mean moves by a tenth where the logits do"
    of_error = "order of the error in the learning rate"
    none = "what is left at a rate of zero has order 0"
    return qualified(
        "one-context",
        "Where all samples share one context, the estimate is right in size as well",
        "tian2024joma, Theorem 1 and its proof",
        condition="the mean attention is followed as it moves",
        inside=[
            slope(f"moving mean: {of_error}", order["moving"], 1, 0.1, why=SECOND_ORDER),
            equals("moving mean: estimated over real amplitude", size, 1, 0.01, why="its error is smaller"),
        ],
        outside=[
            at_most("constant mean: order of the error", order["estimate"], 0.1, why=none),
            at_least("constant mean: error over change of z", left, 0.01, why=tenth),
        ],
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Estimated over real logits; how good the estimate is over time; both terms; one context."""
    drawn, ((scatter, quality), (terms, rate)) = plotting.new_figure(2, 2, width=5.0, height=3.6)
    steps, real, estimate = saved["step"], saved["logit/real"], saved["logit/estimate"]
    for index, part in enumerate((0.05, 0.25, 0.5, 1.0)):
        at = round(part * (len(steps) - 1))
        scatter.plot(real[at], estimate[at], "o", color=f"C{index}", label=f"step {steps[at]:.0f}")
    ends = np.array([real.min(), real.max()])
    scatter.plot(ends, ends, label="equal", **plotting.THEORY)
    scatter.set(xlabel="real logit z", ylabel="estimated logit")
    scatter.set_title("Token by token, gaussian contexts, one run")
    scatter.legend()

    shown = {
        "estimate/correlation": "correlation",
        "estimate/relative_l2": "relative L2 error",
        "estimate/amplitude_ratio": "estimated / real amplitude",
        "moving/relative_l2": "relative L2 error, moving mean attention",
    }
    _draw_contexts(quality, saved, shown, start=1)  # errors are zero at the start
    quality.plot([], [], color="0.3", label="gaussian contexts")
    quality.plot([], [], color="0.3", linestyle=":", label="random contexts")
    quality.set(xscale="log", yscale="log", xlabel="step", ylabel="median over the runs")
    quality.set_title("Right in direction, not in size")
    quality.legend(fontsize=7.5)

    shown = {
        "estimate/correlation": "both terms",
        "first/correlation": "½ Σ v² alone",
        "second/correlation": "−½ |V|² mean attention alone",
    }
    _draw_contexts(terms, saved, shown)
    terms.set(xlabel="step", ylabel="correlation with z", ylim=(-0.6, 1.05))
    terms.set_title("The estimate's two terms (dotted: random contexts)")
    terms.legend()

    errors = {"moving mean attention": saved["error/moving"], "constant one": saved["error/estimate"]}
    plotting.gap_panel(rate, saved["rate"], errors, "learning rate", "largest error / change of z")
    rate.set_title("All samples share one context")
    return drawn


def _draw_contexts(ax: Axes, saved: Saved, shown: dict[str, str], start: int = 0) -> None:
    """Medians over time with their labels, solid on gaussian contexts and dotted on random ones."""
    for index, (name, label) in enumerate(shown.items()):
        gaussian, random = _of_contexts(saved, name)[:, start:]
        ax.plot(saved["step"][start:], gaussian, color=f"C{index}", label=label)
        ax.plot(saved["step"][start:], random, color=f"C{index}", linestyle=":")
