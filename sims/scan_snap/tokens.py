"""What attention does with common and distinct tokens: trained on sampled sequences, recorded, and in theory.

The setting of the source's Figure 4: two classes with ten common and ten distinct tokens each, gradient
descent with momentum and large steps. The theory is a flow, so the network is also trained with small steps,
where the two must agree.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from dynamics import scan_snap
from dynamics.flow import Trajectory
from models.attention import ScanSnapAttention, population_loss
from models.data.recorded import FIGURE_4_EVERY, FIGURE_4_LOSSES
from models.data.tokens import sample_contexts, synthetic_classes
from models.functional import as_function
from models.losses import cross_entropy, on_batches
from models.training import train
from sims import plotting
from sims.claims import ROUNDING, Claim, Preset, at_least, at_most, equals, every, qualified, stated
from sims.compare import require_ok
from sims.ranges import Count, Positive, Range
from sims.results import Context, Saved

COMMON, DISTINCT = 10, 10
ROWS = (0, 2, 4, 6, 8, 10)  # iterations of the source's figure, before the last one
ORDER_TIMES = (1.0, 20.0, 140.0)


@dataclass(frozen=True)
class Config:
    """Training; the classes are those of the source's Figure 4."""

    seeds: Annotated[int, Range(at_least=2)] = 8
    """Runs with their own samples."""
    length: Annotated[int, Range(at_least=2)] = 128
    """Tokens per sequence T, the last token included."""
    batch: Count = 128
    """Sequences per step."""
    steps: Annotated[int, Range(at_least=12)] = 100
    """Steps of training."""
    learning_rate: Positive = 1.0
    """Learning rate of decoder and attention."""
    momentum: Annotated[float, Range(at_least=0, below=1)] = 0.9
    """Momentum of gradient descent (heavy ball)."""
    horizon: Positive = 140.0
    """Time at which the run with small steps ends."""
    points: Count = 70
    """Records along the run with small steps."""
    substeps: Count = 20
    """Small steps between two records: the learning rate is horizon / (points * substeps)."""

    @property
    def time_step(self) -> float:
        """Time that a step with momentum stands for."""
        return self.learning_rate / (1 - self.momentum)

    @property
    def rows(self) -> np.ndarray:
        """The iterations at which attention is shown."""
        return np.array([*ROWS, self.steps])


PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": replace(Config(), seeds=64, substeps=100),
    "paper": replace(Config(), seeds=1000, substeps=100),
}


@partial(jax.jit, static_argnames="config")
def _train_sampled(key: jax.Array, config: Config) -> tuple[jax.Array, Trajectory]:
    """Loss of each batch before its step, (seed, steps), and attention logits at the shown steps."""
    classes = synthetic_classes(2)
    predict, params = as_function(ScanSnapAttention.zeros(classes.vocab_size))
    loss = on_batches(cross_entropy, predict)
    draw = partial(sample_contexts, classes=classes, length=config.length, batch=config.batch)
    heavy_ball = optax.sgd(config.learning_rate, momentum=config.momentum)

    def one(key):
        # Drawn once, for training and for what is told of it; one at a time, the draws compile quickly.
        drawn = jax.lax.map(lambda step: draw(jax.random.fold_in(key, step)), jnp.arange(config.steps))
        _, path = train(loss, params, heavy_ball, steps=config.steps, batches=drawn)
        before = jax.tree.map(lambda leaf: leaf[:-1], path.ys)
        shown = Trajectory(config.rows * config.time_step, path.ys["Z"][...][config.rows], path.ok)
        return jax.vmap(loss)(before, drawn), shown

    return jax.lax.map(one, jax.random.split(key, config.seeds))


def _trained_in_numpy(seed: int, config: Config) -> np.ndarray:
    """Attention on common tokens under Lemma 1's gradient with momentum, (seed, row), with draws of NumPy."""
    draw = np.random.default_rng(seed)
    classes = synthetic_classes(2)  # each has a query of its own
    P, next_token = np.asarray(classes.P), np.asarray(classes.next_token)
    M, batch, shape = P.shape[1], config.batch, (config.seeds, *P.shape)
    Y, Z = np.zeros((config.seeds, M, M)), np.zeros(shape)  # attention logits of each class's query
    speed_Y, speed_Z = np.zeros_like(Y), np.zeros_like(Z)
    runs, common = np.arange(config.seeds)[:, None], []
    for _ in range(config.steps + 1):
        share = P * np.exp(Z)
        common.append(np.mean(share[..., :COMMON].sum(axis=-1) / share.sum(axis=-1), axis=-1))
        which = draw.integers(len(P), size=(config.seeds, batch))
        counts = draw.multinomial(config.length - 1, P[which] / P[which].sum(axis=-1, keepdims=True))
        f = counts * np.exp(Z[runs, which])
        f /= np.linalg.norm(f, axis=-1, keepdims=True)
        logits = f @ Y
        odds = np.exp(logits - logits.max(axis=-1, keepdims=True))
        g = np.eye(M)[next_token[which]] - odds / odds.sum(axis=-1, keepdims=True)
        pull = g @ Y.transpose(0, 2, 1)
        pull = f * (pull - f * np.sum(f * pull, axis=-1, keepdims=True))
        of_class = np.eye(len(P))[which].transpose(0, 2, 1)
        speed_Y = config.momentum * speed_Y + f.transpose(0, 2, 1) @ g / batch
        speed_Z = config.momentum * speed_Z + of_class @ pull / batch
        Y, Z = Y + config.learning_rate * speed_Y, Z + config.learning_rate * speed_Z
    return np.stack(common, axis=1)[:, config.rows]


@partial(jax.jit, static_argnames="config")
def _train_small_steps(config: Config) -> Trajectory:
    """Attention logits of a network on infinitely long contexts."""
    loss, params = population_loss(synthetic_classes(2))
    steps = config.points * config.substeps
    rate = config.horizon / steps
    _, path = train(
        loss,
        params,
        optax.sgd(rate),
        steps=steps,
        observe=lambda params: params["Z"][...],
        every=config.substeps,
        time_step=rate,
    )
    return path


@jax.jit
def _attention(Z: jax.Array) -> jax.Array:
    """Attention over the tokens of each class, (..., K, M), for logits (..., M, M)."""
    share = partial(scan_snap.context_distribution, classes=synthetic_classes(2))
    return jnp.vectorize(share, signature="(m,m)->(k,m)")(Z)


def _order(Z: np.ndarray, classes: scan_snap.SequenceClasses) -> np.ndarray:
    """Smallest rank correlation of z with P over the distinct tokens of a class, for each of many Z."""
    scores = np.where(scan_snap.distinct_tokens(classes), classes.P, np.nan)
    by_class = [[scan_snap.rank_correlation(*pair) for pair in zip(z, scores, strict=True)] for z in Z]
    return np.min(by_class, axis=1)


def run(config: Config, context: Context) -> dict:
    """Train on samples and with small steps, and integrate the flow and its reduction at the same times."""
    classes = synthetic_classes(2)
    query = np.asarray(classes.query)
    context.progress("training on sampled sequences", 0.0)
    losses, sampled = jax.device_get(_train_sampled(jax.random.key(context.seed), config))
    context.progress("training with small steps", 0.4)
    small = jax.device_get(_train_small_steps(config))
    require_ok("training", sampled, small)

    context.progress("integrating the flows", 0.7)
    # One solve of each flow serves the large steps, the small ones, and the times of the order.
    times = {"large": sampled.ts[0], "small": small.ts, "order": np.array(ORDER_TIMES)}
    marks = np.unique(np.concatenate([*times.values()]))
    at = {name: np.searchsorted(marks, ts) for name, ts in times.items()}
    flow, reduced = (
        np.asarray(solve(classes, marks, learning_rate_Y=1.0, learning_rate_Z=1.0).ys.Z)
        for solve in (scan_snap.population_flow, scan_snap.fast_decoder_flow)
    )
    trained, along_flow = jax.device_get((_attention(sampled.ys), _attention(flow[at["large"]])))
    context.progress("training in NumPy", 0.9)
    in_numpy = _trained_in_numpy(context.seed, config)

    # Of the first class, distinct tokens from the likeliest on, and a common one.
    tokens = np.array([*range(COMMON + DISTINCT - 1, COMMON - 1, -3), 0])
    z = {"trained": small.ys, "flow": flow[at["small"]], "reduced": reduced[at["small"]]}
    return {
        "time": ("time", small.ts),
        "row": ("row", config.rows),
        "order_time": ("order_time", times["order"]),
        "loss": ("seed step", losses),
        "common": (
            "seed row",
            {"trained": trained[..., :COMMON].sum(axis=-1).mean(axis=-1), "in_numpy": in_numpy},
        ),
        "attention": {
            name: ("row token", c[:, 0, : COMMON + DISTINCT])
            for name, c in (("trained", trained.mean(axis=0)), ("flow", along_flow))
        },
        "order": {
            "flow": ("order_time", _order(flow[at["order"]][:, query], classes)),
            "trained": ("seed", _order(sampled.ys[:, -1, query], classes)),
        },
        "error": {
            "small": scan_snap.attention_error(small.ys[-1], flow[at["small"]][-1]),
            "large": scan_snap.attention_error(sampled.ys[:, -1].mean(axis=0), flow[at["large"]][-1]),
        },
        "P": ("drawn_token", np.asarray(classes.P)[0, tokens]),
        "z": ("time drawn_token", {name: Z[:, query[0], tokens] for name, Z in z.items()}),
    }


def _losses(losses: np.ndarray) -> Claim:
    recorded = np.array(FIGURE_4_LOSSES)[: -(-losses.shape[1] // FIGURE_4_EVERY)]
    # Losses of a batch are skewed, and the record is of one run: geometric means over the seeds.
    ratio = np.log(losses[:, ::FIGURE_4_EVERY][:, : len(recorded)]).mean(axis=0) - np.log(recorded)
    iterations = FIGURE_4_EVERY * np.arange(len(recorded))
    early, late = np.abs(np.expm1(ratio[iterations <= 10])), ratio[iterations > 10]
    near, mean = np.abs(late) < np.log(1.3), np.exp(late.mean())
    return stated(
        "losses",
        "The recorded losses of 100 steps with momentum, from ln 34 down by five orders of magnitude",
        "luckmatters, figure_4.log (tian2023scan, Figure 4)",
        equals("loss before the first step over ln 34", losses[0, 0] / np.log(34), 1.0, 1e-12, why=ROUNDING),
        at_most(
            "largest relative difference to iteration 10", early.max(), 0.1, why="6 % in the recorded run"
        ),
        # A late loss is a rare event's: single runs, as the recorded one, deviate by 20 to 25 %.
        every(
            "later records within a factor 1.3",
            near,
            0.25 * near.size,
            why="rare events: a run is off by 25 %",
        ),
        equals("geometric mean of trained / recorded after that", mean, 1.0, 0.1, why="25 % over 44 records"),
    )


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """Losses, the fate of common and distinct tokens, and the flow beside small and large steps."""
    yield _losses(saved["loss"])
    yield _common_mass(saved)
    flow, trained = saved["order/flow"].min(), saved["order/trained"].mean()
    # The rarest tokens occur once per sequence: their order may be noise.
    exact, noise = "an order is exact or not", "noise of the rarest tokens"
    yield stated(
        "winners",
        "Among the distinct tokens, attention grows faster for those with the larger P(l | m, n)",
        "tian2023scan, Theorem 3 (winners emerge)",
        at_least("flow: rank correlation of z with P at t = 1, 20, 140", flow, 1.0, 1e-9, why=exact),
        at_least("trained: rank correlation, mean over the seeds", trained, 0.9, why=noise),
    )
    small, large = saved["error/small"], saved["error/large"]
    first, overshoots = "first order in the rate, at most 0.1", "momentum overshoots within its ten steps"
    yield qualified(
        "small-steps",
        "The population flow is what training does to attention",
        "tian2023scan, Lemma 2",
        condition="steps are small and contexts long; with the figure's own steps attention moves further",
        inside=[at_most("relative L2 error of Z at the end, small steps", small, 0.01, why=first)],
        outside=[at_least("the same at the figure's own steps", large, 0.1, why=overshoots)],
    )


def _common_mass(saved: Saved) -> Claim:
    runs, others = saved["common/trained"], saved["common/in_numpy"]
    start, at_10 = runs[:, 0].mean(), list(saved["row"]).index(10)
    error = np.sqrt((runs.var(axis=0, ddof=1) + others.var(axis=0, ddof=1)) / len(runs))[1:]
    off = np.max(np.abs(runs.mean(axis=0) - others.mean(axis=0))[1:] / error)
    rare = "five standard errors of two means, over six rows"
    shown = "a tenth is what can be seen in a figure"
    return stated(
        "common-mass",
        "Common tokens are suppressed: attention on them falls from 0.645, though not to zero",
        "tian2023scan, Theorem 2 and Figure 4",
        equals("attention on common tokens at the start", start, 10 / 15.5, 1e-12, why=ROUNDING),
        at_most(
            "after 10 steps over the start, every run", runs[:, at_10].max() / start, 0.95, why="half of that"
        ),
        at_most("after all steps over the start, every run", runs[:, -1].max() / start, 0.9, why=shown),
        at_least("after all steps, least of a run", runs[:, -1].min(), 0.1, why=shown),
        at_most("difference to Lemma 1 trained in NumPy [standard errors]", off, 5, why=rare),
    )


def figure(config: Config, saved: Saved) -> Figure:
    """Attention over tokens as in Figure 4, trained and theory; losses; logits under small steps."""
    drawn, axes = plotting.new_figure(2, 2, width=5.0, height=3.6)
    loss, logits = axes[1]
    rows, trained, flow = saved["row"], saved["attention/trained"], saved["attention/flow"]
    top = max(trained.max(), flow.max())
    panels = {"trained, mean over seeds": trained, "population flow": flow}
    for ax, (title, attention) in zip(axes[0], panels.items(), strict=True):
        ax.imshow(attention, aspect="auto", cmap="viridis", vmin=0, vmax=top)
        ax.axvline(COMMON - 0.5, color="white", linestyle="--", linewidth=1)
        ax.set_xticks([(COMMON - 1) / 2, COMMON + (DISTINCT - 1) / 2], ["common tokens", "distinct tokens"])
        ax.set_yticks(range(len(rows)), [f"step {row}" for row in rows[:-1]] + [f"last: {rows[-1]}"])
        ax.tick_params(length=0)
        ax.grid(visible=False)
        ax.set(title=f"Attention in one class: {title}", xlabel="token", ylabel="training")
    image = axes[0, 0].images[0]
    drawn.colorbar(image, ax=axes[0].tolist(), label="attention on the token", fraction=0.04, pad=0.02)

    steps, losses = np.arange(config.steps), saved["loss"]
    low, high = np.quantile(losses, [0.1, 0.9], axis=0)
    loss.fill_between(steps, low, high, color="C0", alpha=0.3, linewidth=0, label="80 % of the runs")
    mean = np.exp(np.log(losses).mean(axis=0))
    loss.plot(steps, mean, color="C0", label="trained", **plotting.TRAINED)
    iterations = FIGURE_4_EVERY * np.arange(len(FIGURE_4_LOSSES))
    loss.plot(iterations, FIGURE_4_LOSSES, "o", ms=3, mfc="white", color="black", label="recorded, one run")
    loss.set(yscale="log", xlabel="step", ylabel="cross-entropy of a batch [nats]")
    loss.set_title("Loss at the figure's own steps")
    loss.legend()

    *distinct, common = saved["P"]
    labels = [f"distinct, P = {p:.3f}" for p in distinct] + [f"common, P = {common:.3f}"]
    ts = saved["time"]
    plotting.theory_and_trained(logits, ts, saved["z/flow"], saved["z/trained"], labels)
    for index, z in enumerate(saved["z/reduced"].T):
        logits.plot(ts, z, **{**plotting.PRINTED, "color": f"C{index}", "zorder": 6})
    logits.plot([], [], label="fast decoder, same colours", **plotting.PRINTED)
    logits.lines[len(labels)].set_label("population flow")
    rate = config.horizon / (config.points * config.substeps)
    logits.set(xlabel="time = learning rate × step", ylabel="attention logit z")
    logits.set_title(f"Logits with small steps ({rate:.2g})")
    logits.set_ylim(top=logits.get_ylim()[1] * 1.5)
    logits.legend(loc="upper left", fontsize=7, ncols=2)
    return drawn
