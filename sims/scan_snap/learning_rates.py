"""Entropy of attention over learning rates, trained and recorded: sparse by momentum, not by the flow.

Networks are trained on sampled sequences over a grid of learning rates, vocabularies and seeds, and compared
with the recorded grid of the source's Figure 6. The same networks on infinitely long contexts, with momentum
and without, and the population flow at the same times tell where the dependence on the rates comes from.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from matplotlib.figure import Figure

from dynamics import scan_snap
from models.attention import ScanSnapAttention
from models.data.recorded import FIGURE_6_QUERIES, FIGURE_6_RATES, FIGURE_6_RATIOS, figure_6
from models.data.tokens import population_contexts, sample_contexts, synthetic_classes
from models.functional import as_function
from models.losses import cross_entropy, on_batches
from models.training import scale_by_name, train
from sims import plotting
from sims.claims import Check, Claim, Preset, all_of
from sims.results import Context, Result, Saved

NEXT_PER_QUERY = 2


@dataclass(frozen=True)
class Config:
    """Vocabularies and training; the learning rates are those of the recorded grid."""

    queries: tuple[int, ...] = (3, 5)
    """Numbers of last tokens, each of 1, 3, 5 and 10: what was recorded. Every one is a vocabulary."""
    seeds: int = 4
    """Runs per cell of the grid, with their own starts and samples."""
    length: int = 128
    """Tokens per sequence T, the last token included."""
    batch: int = 128
    """Sequences per step."""
    steps: int = 100
    """Steps of training."""
    momentum: float = 0.9
    """Momentum of gradient descent (heavy ball)."""

    def __post_init__(self):
        unknown = sorted(set(self.queries) - set(FIGURE_6_QUERIES))
        if unknown or not self.queries:
            raise ValueError(f"queries must be of {FIGURE_6_QUERIES}, at least one, got {self.queries}")
        if self.seeds < 2:
            raise ValueError(f"seeds must be at least 2, got {self.seeds}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must be in [0, 1), got {self.momentum}")


_QUICK = Config()
_FULL = replace(_QUICK, queries=FIGURE_6_QUERIES, seeds=10)
# The source's own setting takes half a minute on two cores.
PRESETS: dict[Preset, Config] = {"quick": _QUICK, "standard": _FULL, "paper": replace(_FULL, seeds=100)}


@partial(jax.jit, static_argnames=("queries", "config"))
def _grid(keys: jax.Array, queries: int, config: Config) -> tuple[dict[str, jax.Array], jax.Array]:
    """Mean entropies of one vocabulary in one program: trained ones (seed, 4, 4), the flow's (4, 4)."""
    # As recorded, training is in 32-bit.
    classes = synthetic_classes(queries, NEXT_PER_QUERY, dtype=jnp.float32)
    finite = Partial(partial(sample_contexts, length=config.length, batch=config.batch), classes=classes)

    def entropy(Z, classes=classes):
        return jnp.mean(scan_snap.distinct_entropy(Z, classes))

    def trained(key, batches, momentum, faster=1.0):
        key_start, key_data = jax.random.split(key)
        model = ScanSnapAttention.uniform(key_start, classes.vocab_size, jnp.float32)
        predict, params = as_function(model)

        def cell(rate, ratio):
            optimizer = optax.chain(
                scale_by_name(Y=faster * ratio * rate, Z=faster * rate), optax.sgd(1.0, momentum=momentum)
            )
            # The key is the same in all cells: so are the samples.
            last, _ = train(
                on_batches(cross_entropy, predict),
                params,
                optimizer,
                steps=config.steps,
                every=max(config.steps, 1),
                batches=batches,
                key=key_data,
                observe=lambda params: jnp.zeros(()),
            )
            return entropy(last["Z"][...])

        return _over_grid(cell)

    infinite = population_contexts(classes)

    def on_infinite(momentum, faster):
        return jax.vmap(lambda key: trained(key, lambda _: infinite, momentum, faster))(keys)

    # Without momentum the same time takes a learning rate that is larger by 1 / (1 - momentum).
    momenta = jnp.asarray([config.momentum, 0.0], jnp.float32)
    faster = jnp.asarray([1.0, 1 / (1 - config.momentum)], jnp.float32)
    with_momentum, without = jax.vmap(on_infinite)(momenta, faster)
    entropies = {
        "trained": jax.vmap(lambda key: trained(key, finite, config.momentum))(keys),
        "infinite": with_momentum,
        "no_momentum": without,
    }

    # The flow depends on the rates through their ratio alone, up to its time: one lane per ratio.
    exact = synthetic_classes(queries, NEXT_PER_QUERY)
    ts = jnp.asarray([0.0, *FIGURE_6_RATES]) * config.steps / (1 - config.momentum)

    def flow(ratio):
        return scan_snap.population_flow(
            exact, ts, learning_rate_Y=ratio, learning_rate_Z=1.0, rtol=1e-6, atol=1e-8, throw=False
        )

    path = jax.vmap(flow)(jnp.asarray(FIGURE_6_RATIOS))
    over_time = jax.vmap(jax.vmap(lambda Z: entropy(Z, exact)))(path.ys.Z[:, 1:])
    return {**entropies, "flow": over_time.T}, jnp.all(path.ok)


def _over_grid(cell):
    rates, ratios = (jnp.asarray(values, jnp.float32) for values in (FIGURE_6_RATES, FIGURE_6_RATIOS))
    return jax.vmap(jax.vmap(cell, (None, 0)), (0, None))(rates, ratios)


def run(config: Config, context: Context) -> Result:
    """Train the grid of every vocabulary and integrate its flow."""
    keys = jax.random.split(jax.random.key(context.seed), (len(config.queries), config.seeds))
    grids = []
    for index, queries in enumerate(config.queries):
        context.progress(f"training with {queries} last tokens", index / len(config.queries))
        grid, ok = _grid(keys[index], queries, config)
        if not bool(ok):
            raise RuntimeError(f"the population flow with {queries} last tokens failed")
        grids.append(jax.tree.map(np.asarray, grid))
    entropy = {name: np.stack([grid[name] for grid in grids]) for name in grids[0]}
    mean, std = figure_6(config.queries)
    data = {
        "entropy": entropy,
        "recorded": {"mean": mean, "std": std},
        "queries": np.asarray(config.queries),
        "rates": np.asarray(FIGURE_6_RATES),
        "ratios": np.asarray(FIGURE_6_RATIOS),
    }
    claims = (_recorded_grid(entropy, mean, std), _sparser(entropy), _denser(entropy, config.queries))
    cell = ("query", "rate", "ratio")
    dims = {
        "entropy/trained": ("query", "seed", "rate", "ratio"),
        "entropy/infinite": ("query", "seed", "rate", "ratio"),
        "entropy/no_momentum": ("query", "seed", "rate", "ratio"),
        "entropy/flow": cell,
        "recorded/mean": cell,
        "recorded/std": cell,
        "queries": ("query",),
        "rates": ("rate",),
        "ratios": ("ratio",),
    }
    return Result(data, claims, dims)


def _recorded_grid(entropy, mean, std) -> Claim:
    difference = entropy["trained"].mean(axis=1) - mean
    combined = np.sqrt(std**2 + entropy["trained"].std(axis=1, ddof=1) ** 2)
    inside = np.abs(difference) < 2 * combined + 0.02
    return Claim(
        "scan_snap.learning_rates/recorded",
        "Entropies of attention over the distinct tokens, over learning rates and vocabularies",
        "tian2023scan, Figure 6, with the recorded means and deviations of luckmatters",
        "stated",
        [
            # Two deviations of a single run on both sides, and the third digit of a few seeds.
            all_of("cells within two combined deviations + 0.02", inside),
            # Means over seeds of the same distribution differ by less than what a single run does.
            Check(
                "mean |difference| in combined standard deviations",
                "at most",
                1.0,
                np.mean(np.abs(difference) / combined),
            ),
            Check("mean difference in nats", "equals", 0.0, np.mean(difference), 0.05),
        ],
    )


def _sparser(entropy) -> Claim:
    trained = entropy["trained"].mean(axis=1)
    falls = np.diff(trained, axis=1) < 0
    fall = {name: _fall(entropy[name]) for name in ("trained", "infinite", "no_momentum", "flow")}
    return Claim(
        "scan_snap.learning_rates/sparser",
        "With both learning rates larger at a fixed ratio, attention is sparser after as many steps",
        "tian2023scan, remark (1) after Theorem 4; Figure 6",
        "qualified",
        [
            all_of("falls of the trained entropy with learning_rate_Z", falls),
            # Of the order of what the figure is about; whether contexts are finite changes less than this.
            Check(
                "mean fall from the smallest rates to the largest, trained", "at least", 0.1, fall["trained"]
            ),
            Check("the same with infinitely long contexts", "at least", 0.05, fall["infinite"]),
            # As long steps, and over the same time: what is left is theirs alone.
            Check("the same, then without momentum", "at most", 0.02, fall["no_momentum"]),
            # By the theorem the late growth depends on the ratio, and on time only like ln ln t.
            Check("the same in the population flow", "at most", 0.02, fall["flow"]),
        ],
        condition="momentum overshoots with large steps; in the flow only the ratio counts",
    )


def _fall(entropy: np.ndarray) -> float:
    """Fall of the entropy from the smallest rates to the largest, mean over all the rest."""
    return float(np.mean(entropy[..., 0, :] - entropy[..., -1, :]))


def _denser(entropy, queries) -> Claim:
    trained = entropy["trained"].mean(axis=1)
    rises = trained[..., -1] > trained[..., 1]
    several = np.asarray(queries) >= 3
    dips = trained[several, :, 1] < trained[several, :, 0]
    return Claim(
        "scan_snap.learning_rates/denser",
        "At a fixed learning_rate_Z, attention is denser with a larger learning_rate_Y",
        "tian2023scan, remark (2) after Theorem 4; Figure 6",
        "qualified",
        [
            all_of("rises from ratio 2 to ratio 10", rises),
            all_of("several queries: falls from ratio 1 to ratio 2", dips),
        ],
        condition="learning_rate_Y >= 2 learning_rate_Z",
    )


def figure(saved: Saved) -> Figure:
    """Entropy over the ratio of the learning rates, a panel per vocabulary."""
    queries, rates, ratios = saved["queries"], saved["rates"], saved["ratios"]
    columns = 1 if len(queries) == 1 else 2
    drawn, axes = plotting.new_figure(-(-len(queries) // columns), columns, width=4.8, height=3.8)
    panels = axes.ravel()
    low = min(saved["recorded/mean"].min(), saved["entropy/trained"].mean(axis=1).min()) - 0.1
    for index, ax in enumerate(panels):
        if index >= len(queries):
            ax.axis("off")
            continue
        trained, flow = saved["entropy/trained"][index], saved["entropy/flow"][index]
        mean, std = saved["recorded/mean"][index], saved["recorded/std"][index]
        for row, rate in enumerate(rates):
            color, nudge = f"C{row}", 1.03 ** (row - 1.5)
            label = f"trained, learning rate of Z {rate:g}"
            ax.plot(ratios, trained[:, row].mean(axis=0), color=color, label=label, **plotting.TRAINED)
            recorded = {"fmt": "o", "ms": 4, "mfc": "white", "lw": 1, "capsize": 2, "color": color}
            ax.errorbar(ratios * nudge, mean[row], std[row], zorder=4, **recorded)
        ax.errorbar([], [], [], fmt="o", ms=4, mfc="white", color="0.4", label="recorded, mean ± std")
        lines = ax.plot(ratios, flow.T, **plotting.THEORY)
        lines[0].set_label("population flow, all rates")
        ax.set(xscale="log", ylim=(low, 2.2), xlabel="learning rate of Y / learning rate of Z")
        ax.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
        ax.minorticks_off()
        ax.set_ylabel("entropy over distinct tokens [nats]")
        ax.set_title(f"{queries[index]} last, {NEXT_PER_QUERY * queries[index]} next tokens")
    panels[len(queries) - 1].legend(loc="lower right", fontsize=8)
    return drawn
