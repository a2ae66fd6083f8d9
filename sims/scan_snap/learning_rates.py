"""Entropy of attention over learning rates, trained and recorded: sparse by momentum, not by the flow.

Networks are trained on sampled sequences over a grid of learning rates, vocabularies and seeds, and compared
with the recorded grid of the source's Figure 6. The same networks on infinitely long contexts, with momentum
and without, and the population flow at the same times tell where the dependence on the rates comes from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from matplotlib.figure import Figure

from dynamics import scan_snap
from dynamics.flow import Trajectory
from models.attention import ScanSnapAttention
from models.data.recorded import FIGURE_6_QUERIES, FIGURE_6_RATES, FIGURE_6_RATIOS, figure_6
from models.data.tokens import population_contexts, sample_contexts, synthetic_classes
from models.functional import as_function
from models.losses import cross_entropy, on_batches
from models.training import map_lanes, scale_by_name, train
from sims import plotting
from sims.claims import Claim, Preset, at_least, at_most, equals, every, qualified, stated
from sims.compare import SOLVE, named_lanes, require_ok
from sims.ranges import Count, Length, Range
from sims.results import Context, Saved

NEXT_PER_QUERY = 2


@dataclass(frozen=True)
class Config:
    """Vocabularies and training; the learning rates are those of the recorded grid."""

    queries: Annotated[tuple[Literal[1, 3, 5, 10], ...], Length(1)] = (3, 5)
    """Numbers of last tokens, each of 1, 3, 5 and 10: what was recorded. Every one is a vocabulary."""
    seeds: Annotated[int, Range(at_least=2)] = 4
    """Runs per cell of the grid, with their own starts and samples."""
    length: Annotated[int, Range(at_least=2)] = 128
    """Tokens per sequence T, the last token included."""
    batch: Count = 128
    """Sequences per step."""
    steps: Count = 100
    """Steps of training."""
    momentum: Annotated[float, Range(at_least=0, below=1)] = 0.9
    """Momentum of gradient descent (heavy ball)."""


_QUICK = Config()
_FULL = replace(_QUICK, queries=FIGURE_6_QUERIES, seeds=10)
# The source's own setting takes half a minute on two cores.
PRESETS: dict[Preset, Config] = {"quick": _QUICK, "standard": _FULL, "paper": replace(_FULL, seeds=100)}


def _entropy(Z, classes):
    return jnp.mean(scan_snap.distinct_entropy(Z, classes))


@partial(jax.jit, static_argnames=("queries", "config"))
def _trained(keys: jax.Array, queries: int, config: Config) -> dict[str, jax.Array]:
    """Mean entropies after training in one vocabulary, (seed, rate, ratio), over contexts and momentum."""
    # As recorded, training is in 32-bit.
    classes = synthetic_classes(queries, NEXT_PER_QUERY, dtype=jnp.float32)
    finite = Partial(partial(sample_contexts, length=config.length, batch=config.batch), classes=classes)
    infinite = population_contexts(classes)
    rates, ratios = (jnp.asarray(values, jnp.float32) for values in (FIGURE_6_RATES, FIGURE_6_RATIOS))

    def grid(batches, momentum, faster, key):
        key_start, key_data = jax.random.split(key)
        model = ScanSnapAttention.uniform(key_start, classes.vocab_size, jnp.float32)
        predict, params = as_function(model)

        def cell(rate, ratio):
            scale = scale_by_name(Y=faster * ratio * rate, Z=faster * rate)
            # The key is the same in all cells: so are the samples.
            last, _ = train(
                on_batches(cross_entropy, predict),
                params,
                optax.chain(scale, optax.sgd(1.0, momentum=momentum)),
                steps=config.steps,
                every=config.steps,
                batches=batches,
                key=key_data,
                observe=lambda params: jnp.zeros(()),
            )
            return _entropy(last["Z"][...], classes)

        return jax.vmap(jax.vmap(cell, (None, 0)), (0, None))(rates, ratios)

    def on_infinite(pace):
        return jax.vmap(partial(grid, lambda _: infinite, *pace))(keys)

    # Without momentum the same time takes a learning rate that is larger by 1 / (1 - momentum).
    paces = {"infinite": (config.momentum, 1.0), "no_momentum": (0.0, 1 / (1 - config.momentum))}
    paces = {name: tuple(map(jnp.float32, pace)) for name, pace in paces.items()}
    trained = jax.vmap(partial(grid, finite, config.momentum, 1.0))(keys)
    return {"trained": trained, **named_lanes(on_infinite, **paces)}


@partial(jax.jit, static_argnames=("queries", "config"))
def _flow(queries: int, config: Config) -> Trajectory:
    """Mean entropies along the population flow of one vocabulary, (ratio, rate): rates are times here.

    The flow depends on the rates through their ratio alone, up to its time: one lane per ratio.
    """
    classes = synthetic_classes(queries, NEXT_PER_QUERY)
    ts = jnp.asarray([0.0, *FIGURE_6_RATES]) * config.steps / (1 - config.momentum)

    def along(ratio):
        rates = {"learning_rate_Y": ratio, "learning_rate_Z": 1.0}
        path = scan_snap.population_flow(classes, ts, **rates, rtol=1e-6, atol=1e-8, **SOLVE)
        return Trajectory(ts[1:], jax.vmap(_entropy, (0, None))(path.ys.Z[1:], classes), path.ok)

    # One after the other, which compiles more quickly than all side by side.
    return map_lanes(along, jnp.asarray(FIGURE_6_RATIOS), at_once=1)


def run(config: Config, context: Context) -> dict:
    """Train the grid of every vocabulary and integrate its flow."""
    keys = jax.random.split(jax.random.key(context.seed), (len(config.queries), config.seeds))
    trained, flows = [], []
    for index, queries in enumerate(config.queries):
        context.progress(f"training with {queries} last tokens", index / len(config.queries))
        trained.append(jax.device_get(_trained(keys[index], queries, config)))
        flows.append(jax.device_get(_flow(queries, config)))
    require_ok("a population flow", *flows)
    mean, std = figure_6(config.queries)
    return {
        "query": ("query", np.array(config.queries)),
        "rate": ("rate", np.array(FIGURE_6_RATES)),
        "ratio": ("ratio", np.array(FIGURE_6_RATIOS)),
        "entropy": ("query seed rate ratio", jax.tree.map(lambda *grids: np.stack(grids), *trained)),
        "flow": ("query rate ratio", np.stack([path.ys.T for path in flows])),
        "recorded": ("query rate ratio", {"mean": mean, "std": std}),
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """The recorded grid, and what either learning rate does."""
    trained = saved["entropy/trained"].mean(axis=1)
    spread = saved["entropy/trained"].std(axis=1, ddof=1)
    difference = trained - saved["recorded/mean"]
    combined = np.sqrt(saved["recorded/std"] ** 2 + spread**2)
    near, size = np.abs(difference) < 2 * combined + 0.02, np.mean(np.abs(difference) / combined)
    yield stated(
        "recorded",
        "Entropies of attention over the distinct tokens, over learning rates and vocabularies",
        "tian2023scan, Figure 6, with the recorded means and deviations of luckmatters",
        every("cells within two combined deviations + 0.02", near, why="single runs differ by no more"),
        at_most("mean |difference| in combined standard deviations", size, 1.0, why="means differ by less"),
        equals("mean difference in nats", difference.mean(), 0.0, 0.05, why="means differ by less"),
    )
    # Falls of the entropy from the smallest rates to the largest, means over all the rest.
    grids = {**saved["entropy"], "flow": saved["flow"]}
    fall = {name: np.mean(grid[..., 0, :] - grid[..., -1, :]) for name, grid in grids.items()}
    falls, size = np.diff(trained, axis=1) < 0, "of the order of what the figure is about"
    yield qualified(
        "sparser",
        "With both learning rates larger at a fixed ratio, attention is sparser after as many steps",
        "tian2023scan, remark (1) after Theorem 4; Figure 6",
        condition="momentum overshoots with large steps; in the flow only the ratio counts",
        inside=[
            every("falls of the trained entropy with learning_rate_Z", falls),
            at_least(
                "mean fall from the smallest rates to the largest, trained", fall["trained"], 0.1, why=size
            ),
            at_least("the same with infinitely long contexts", fall["infinite"], 0.05, why=size),
        ],
        outside=[
            # As long steps, and over the same time: what is left is theirs alone.
            at_most(
                "the same, then without momentum", fall["no_momentum"], 0.02, why="the steps' length alone"
            ),
            at_most("the same in the population flow", fall["flow"], 0.02, why="late growth is like ln ln t"),
        ],
    )
    several = trained[saved["query"] >= 3]
    rises, dips = trained[..., -1] > trained[..., 1], several[..., 1] < several[..., 0]
    yield qualified(
        "denser",
        "At a fixed learning_rate_Z, attention is denser with a larger learning_rate_Y",
        "tian2023scan, remark (2) after Theorem 4; Figure 6",
        condition="learning_rate_Y >= 2 learning_rate_Z",
        inside=[every("rises from ratio 2 to ratio 10", rises)],
        outside=[every("several queries: falls from ratio 1 to ratio 2", dips)],
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Entropy over the ratio of the learning rates, a panel per vocabulary."""
    columns = 1 if len(config.queries) == 1 else 2
    drawn, axes = plotting.new_figure(-(-len(config.queries) // columns), columns, width=4.8, height=3.8)
    rates, ratios, trained = saved["rate"], saved["ratio"], saved["entropy/trained"].mean(axis=1)
    # Error bars are drawn whole.
    bars = saved["recorded/mean"] - saved["recorded/std"], saved["recorded/mean"] + saved["recorded/std"]
    low, high = min(bars[0].min(), trained.min()) - 0.05, max(bars[1].max(), trained.max()) + 0.05
    panels = axes.ravel()
    for ax in panels[len(config.queries) :]:
        ax.axis("off")
    for index, (ax, queries) in enumerate(zip(panels, config.queries, strict=False)):
        mean, std = saved["recorded/mean"][index], saved["recorded/std"][index]
        recorded = {"fmt": "o", "ms": 4, "mfc": "white"}
        for row, rate in enumerate(rates):
            color, nudge = f"C{row}", 1.03 ** (row - 1.5)
            label = f"trained, learning rate of Z {rate:g}"
            ax.plot(ratios, trained[index, row], color=color, label=label, **plotting.TRAINED)
            style = {**recorded, "color": color, "lw": 1, "capsize": 2, "zorder": 4}
            ax.errorbar(ratios * nudge, mean[row], std[row], **style)
        ax.errorbar([], [], [], color="0.4", label="recorded, mean ± std", **recorded)
        lines = ax.plot(ratios, saved["flow"][index].T, **plotting.THEORY)
        lines[0].set_label("population flow, all rates")
        ax.set(xscale="log", ylim=(low, high), xlabel="learning rate of Y / learning rate of Z")
        ax.set_xticks(ratios, [f"{ratio:g}" for ratio in ratios])
        ax.minorticks_off()
        ax.set_ylabel("entropy over distinct tokens [nats]")
        ax.set_title(f"{queries} last, {NEXT_PER_QUERY * queries} next tokens")
    # It is the same for all panels, and there is no room for it within one.
    drawn.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return drawn
