"""Sequence classes of English text: is attention a TF-IDF that is learned? Real text beside shuffled text.

A class is a next word with the word that most often goes before it, its query; P(l | n) is how often word l
occurs in a window before the two. Theory and network run on these classes. What attention learns, z of the
query and word l, is set beside TF-IDF: log P(l | n) plus the log of an inverse class frequency. The classes
are estimated from one half of the text, in alternating blocks, so that the other half can tell what of it
belongs to the language and what to the sample. Two controls go through the same: windows of shuffled text
put before the very same queries, and a shuffled text from which the classes themselves are taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import spearmanr

from dynamics import scan_snap
from dynamics.flow import Trajectory
from models.attention import ScanSnapAttention
from models.data.text import next_token_classes, python_corpus, select_windows, wikitext2, words
from models.data.tokens import Contexts, population_contexts
from models.functional import as_function
from models.losses import bind, cross_entropy, on_batches
from models.training import scale_by_name, sgd_until, train
from sims import plotting
from sims.claims import Check, Claim, Preset
from sims.compare import Comparison, compare, convergence_order, lane, lane_gaps, require_sweeps
from sims.results import Context, Result, Saved

SOURCES = ("real text", "shuffled windows", "shuffled text", "short contexts")
SCORES = ("term frequency", "inverse class frequency, counted", "TF-IDF, counted", "TF-IDF, weighted")


@dataclass(frozen=True)
class Config:
    """Text, classes and training."""

    def __post_init__(self):
        require_sweeps(self, "substeps")

    corpus: Literal["python", "wikitext-2"] = "python"
    """Text: the reference that comes with Python, or WikiText-2 from --data-dir."""
    num_classes: int = 24
    """Number of classes K: the most frequent pairs of words."""
    vocab_size: int = 256
    """Size of the vocabulary M: the most frequent words."""
    window: int = 32
    """Words of context before the query."""
    max_windows: int = 400
    """The most windows per class, evenly spaced over the text."""
    block: int = 500
    """Words per block: the classes come from every other block, the rest is held out."""
    rate_ratio: float = 0.1
    """Learning rate of attention over that of the decoder, which is K per unit of time."""
    horizon: float = 30.0
    """Time at which the runs end; scanning ends after about log M + 1."""
    points: int = 30
    """Records along a run."""
    substeps: tuple[int, ...] = (10, 20)
    """Steps between two records, one per learning rate, multiples of the first."""
    pooled: tuple[int, ...] = (1, 4, 16, 64)
    """Windows per context where the network is trained on real ones: 1 is the text as it is."""
    batch: int = 32
    """Contexts per step there."""


PRESETS: dict[Preset, Config] = {
    "quick": Config(pooled=(1, 32)),
    "standard": Config(num_classes=40, vocab_size=400, substeps=(10, 20, 40)),
    "paper": Config("wikitext-2", num_classes=40, vocab_size=800, substeps=(10, 20, 40)),
}


def read(config: Config, context: Context) -> list[str]:
    """The words of the corpus."""
    return python_corpus() if config.corpus == "python" else words(wikitext2(context.data_dir))


def attention_rows(query: jax.Array, params: Any) -> jax.Array:
    """Attention logits z of each class's query, (K, M)."""
    return params["Z"][...][query]


@eqx.filter_jit
def train_on_population(predict, params, classes, rates, which, substeps, points, horizon) -> Trajectory:
    """Gradient descent on infinitely long contexts, one lane per pair of classes and substeps."""
    finest, coarsest = max(substeps), min(substeps)
    scale = scale_by_name(Y=rates[0], Z=rates[1])

    def one(index, count):
        chosen = jax.tree.map(lambda leaf: leaf[index], classes)
        contexts, next_token = population_contexts(chosen)
        loss = bind(cross_entropy, (predict, contexts, next_token))
        step = horizon / (points * count)
        _, path = train(
            loss,
            params,
            optax.chain(scale, sgd_until(step, points * count)),
            steps=points * finest,
            every=coarsest,
            observe=Partial(attention_rows, chosen.query),
            time_step=step,
        )
        keep = jnp.arange(points + 1) * count // coarsest
        return Trajectory(path.ts[keep], path.ys[keep], path.ok)

    return jax.vmap(one)(which, jnp.asarray(substeps))


def draw_contexts(contexts, next_token, first, sizes, pooled, most, batch, key) -> tuple[Contexts, jax.Array]:
    """A batch of contexts, each made of `pooled` <= `most` windows of one class; all draws are uniform."""
    key_class, key_window = jax.random.split(key)
    label = jax.random.randint(key_class, (batch,), 0, len(sizes))
    drawn = jax.random.randint(key_window, (batch, most), 0, sizes[label][:, None]) + first[label][:, None]
    counts = jnp.sum(contexts.counts[drawn] * (jnp.arange(most) < pooled)[None, :, None], axis=1)
    return Contexts(counts, contexts.query[drawn[:, 0]]), next_token[drawn[:, 0]]


@eqx.filter_jit
def train_on_windows(
    predict, params, contexts, arrays, query, rates, pooled, batch, points, substeps, step, key
):
    """Gradient descent on batches of windows, one lane per number of windows pooled in a context."""
    optimizer = optax.chain(scale_by_name(Y=rates[0], Z=rates[1]), optax.sgd(step))

    def one(count):
        _, path = train(
            on_batches(cross_entropy, predict),
            params,
            optimizer,
            steps=points * substeps,
            every=substeps,
            observe=Partial(attention_rows, query),
            batches=Partial(draw_contexts, contexts, *arrays, count, max(pooled), batch),
            key=key,
            time_step=step,
        )
        return path

    return jax.vmap(one)(jnp.asarray(pooled))


def scanning_form(P: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Leading order of z in time up to a factor, (K, M): f_n * (f_n <f_n, S> - S), S = sum_n f_n.

    It is summed over the classes of a query.
    """
    f = P / np.linalg.norm(P, axis=1, keepdims=True)
    total = f.sum(axis=0, keepdims=True)
    gain = f * (f * np.sum(f * total, axis=1, keepdims=True) - total)
    rows = np.zeros((query.max() + 1, P.shape[1]))
    np.add.at(rows, query, gain)
    return rows[query]


def tf_idf(P: np.ndarray) -> np.ndarray:
    """The scores of `SCORES`, stacked, (4, K, M); NaN where P is zero.

    The inverse class frequency is counted, K over the number of classes that use the word at all, or
    weighted, one over the mean of P(l | n) over the classes: TF-IDF is then pointwise mutual information.
    """
    used = P > 0
    term = np.log(P, out=np.full_like(P, np.nan), where=used)
    counted = np.log(len(P) / np.maximum(used.sum(axis=0), 1))[None]
    weighted = -np.log(np.where(used.any(axis=0), P.mean(axis=0), 1))[None]
    return np.stack([term, counted + 0 * term, term + counted, term + weighted])


def rank_correlations(z: np.ndarray, scores: np.ndarray, among: np.ndarray) -> tuple[np.ndarray, int]:
    """Spearman's correlation of z with each score over pairs of a class and a word, and how many they are."""
    pairs = among & np.isfinite(scores[0])
    if np.count_nonzero(pairs) < 3:
        return np.full(len(scores), np.nan), 0
    found: list[Any] = [spearmanr(z[pairs], score[pairs]) for score in scores]
    return np.array([one.statistic for one in found]), int(np.count_nonzero(pairs))


def run(config: Config, context: Context) -> Result:
    """Estimate the classes, integrate the theory, train the network, and correlate z with TF-IDF."""
    context.progress("estimating sequence classes", 0.0)
    tokens = read(config, context)
    shuffled = np.random.default_rng(context.seed).permutation(tokens).tolist()
    sizes = (config.num_classes, config.vocab_size, config.window)
    texts = (
        next_token_classes(tokens, *sizes, max_windows=config.max_windows),
        next_token_classes(tokens, *sizes, max_windows=config.max_windows, context_tokens=shuffled),
        next_token_classes(shuffled, *sizes, max_windows=config.max_windows),
    )
    held_out = [text.position // config.block % 2 == 1 for text in texts]
    fitted = [select_windows(text, ~out) for text, out in zip(texts, held_out, strict=True)]
    unseen = [select_windows(text, out) for text, out in zip(texts, held_out, strict=True)]
    real = fitted[0]
    rates = (float(config.num_classes), config.num_classes * config.rate_ratio)
    ts = np.linspace(0.0, config.horizon, config.points + 1)

    def flow_rows(flow):
        # The gaps to be told apart are a hundred times larger than what these tolerances leave.
        options = {"rtol": 1e-6, "atol": 1e-8, "solver": diffrax.Tsit5()}
        path = flow(real.classes, ts, learning_rate_Y=rates[0], learning_rate_Z=rates[1], **options)
        return Trajectory(ts, np.asarray(path.ys.Z)[:, np.asarray(real.classes.query)], path.ok)

    context.progress("integrating the theory", 0.1)
    theory, fast = flow_rows(scan_snap.population_flow), flow_rows(scan_snap.fast_decoder_flow)

    context.progress("training on infinitely long contexts", 0.4)
    predict, params = as_function(ScanSnapAttention.zeros(config.vocab_size))
    # Real text at every learning rate, and the two controls at the largest.
    substeps = tuple(sorted(config.substeps))
    lanes = (0,) * len(substeps) + (1, 2)
    trained = train_on_population(
        predict,
        params,
        jax.tree.map(lambda *leaves: np.stack(leaves), *(text.classes for text in fitted)),
        rates,
        np.array(lanes),
        (*substeps, substeps[0], substeps[0]),
        config.points,
        config.horizon,
    )
    learning_rates = config.horizon / (config.points * np.array(substeps))

    context.progress("training on windows of the text", 0.7)
    per_class = np.bincount(real.label)
    arrays = (real.next_token, np.cumsum(per_class) - per_class, per_class)
    on_windows = train_on_windows(
        predict,
        params,
        real.contexts,
        arrays,
        real.classes.query,
        rates,
        config.pooled,
        config.batch,
        config.points,
        substeps[0],
        learning_rates[0],
        jax.random.key(context.seed),
    )

    context.progress("measuring", 0.9)
    trained, on_windows = jax.tree.map(np.asarray, (trained, on_windows))
    # The smallest learning rate on real text, the controls, and windows as they are.
    learned = np.concatenate([trained.ys[[len(substeps) - 1, -2, -1]], on_windows.ys[:1]])
    order = [0, 1, 2, 0]
    queries = np.stack([fitted[index].classes.query for index in order])
    P, P_unseen = (np.stack([half[index].classes.P for index in order]) for half in (fitted, unseen))
    alone = np.stack([np.bincount(query)[query] == 1 for query in queries])[:, :, None]
    scores = np.stack([tf_idf(P_one) for P_one in P])
    # Words that the fitted half does not use are not learned about.
    scores_unseen = np.where(P[:, None] > 0, np.stack([tf_idf(P_one) for P_one in P_unseen]), np.nan)
    kinds = {"alone": alone, "shared": ~alone, "all": np.full_like(alone, True)}
    correlation, pairs = {}, {}
    for kind, among in kinds.items():
        for half, values in (("fitted", scores), ("unseen", scores_unseen)):
            cases = zip(learned[:, -1], values, among & (P > 0), strict=True)
            found = [rank_correlations(*case) for case in cases]
            correlation[f"{half}_{kind}"] = np.stack([values for values, _ in found])
            pairs[f"{half}_{kind}"] = np.array([number for _, number in found])
    form = scanning_form(P[0], queries[0])
    scanning, _ = rank_correlations(learned[0, 1], form[None], P[0] > 0)
    windows = [compare(theory, lane(on_windows, index)) for index in range(len(config.pooled))]
    overlap = np.asarray(jax.jit(scan_snap.class_overlap)(np.zeros((config.vocab_size,) * 2), real.classes))
    mean_overlap = float(np.mean(overlap[~np.eye(config.num_classes, dtype=bool)]))
    # The class with a query of its own whose attention has moved most towards what is its own.
    moved = np.where(alone[0, :, 0], np.nansum(learned[0, -1] * scores[0, -1], axis=1), -np.inf)
    shown = int(np.argmax(moved))

    data = {
        "words": np.array(real.words),
        "P": P[0],
        "query": queries[0],
        "next_token": np.asarray(real.classes.next_token),
        "alone": alone[:2, :, 0],
        "moved": moved,
        "scores": scores[:2, -1],
        "learned": learned[:2, -1],
        "correlation": correlation,
        "pairs": pairs,
        "shown": shown,
        "theory": Trajectory(ts, theory.ys[:, shown], theory.ok),
        "fast": Trajectory(ts, fast.ys[:, shown], fast.ok),
        "trained": Trajectory(ts, learned[0][:, shown], np.all(trained.ok)),
        "rates": learning_rates,
        "gap": lane_gaps(theory, jax.tree.map(lambda leaf: leaf[: len(substeps)], trained)),
        "windows": {
            "length": np.array(config.pooled) * np.mean(np.sum(np.asarray(real.contexts.counts), axis=1)),
            "relative_l2": np.array([found.relative_l2[-1] for found in windows]),
            "correlation": np.array([found.correlation[-1] for found in windows]),
        },
        "num_tokens": len(tokens),
        "num_windows": np.array([len(text.label) for text in fitted]),
        "overlap": mean_overlap,
    }
    claims = (
        _scanning(float(scanning[0])),
        _tf_idf(correlation["fitted_alone"][:, 2:], correlation["fitted_shared"][0, 3]),
        _language(correlation, pairs, queries[2]),
        _network(data),
        _fast_decoder(compare(theory, fast)),
    )
    pair = ("class", "word")
    dims = {"P": pair, "words": ("word",), "query": ("class",), "next_token": ("class",), "rates": ("rate",)}
    return Result(data, claims, dims)


def _scanning(correlation: float) -> Claim:
    return Claim(
        "scan_snap.text/scanning",
        "While attention scans, a word gains where a class uses it more than the classes do on average: z "
        "grows like f_nl (f_nl <f_n, S> - S_l), S the sum of all f_n, summed over the classes of a query",
        "tian2023scan, Lemma 2 (its leading order in time, derived here)",
        "stated",
        [
            # At the first record the next order is down by t / (ln M + 1), 0.15: it swaps close ranks only.
            Check("rank correlation of z with it at the first record", "at least", 0.98, correlation),
        ],
    )


def _tf_idf(alone: np.ndarray, shared: float) -> Claim:
    return Claim(
        "scan_snap.text/tf-idf",
        "Attention is a TF-IDF that is learned: z of a query and a word is ranked as log P(l | n) plus the "
        "logarithm of the inverse class frequency",
        "tian2023scan, Theorem 2 (attention to discriminative tokens that co-occur with the query)",
        "qualified",
        [
            # One is a monotone relation, zero is none: more than half of the way, or less.
            Check("weighted class frequency, queries of one class", "at least", 0.5, alone[0, 1]),
            # Nearly every frequent word of a text occurs in nearly every class: counting them tells little.
            Check("counted class frequency, queries of one class", "at most", 0.5, alone[0, 0]),
            # One row of Z serves all classes of a query, whose wishes differ.
            Check("weighted, queries of several classes", "at most", 0.5, shared),
            # Short contexts: what varies from window to window outweighs what varies from class to class.
            Check("weighted, queries of one class, windows as they are", "at most", 0.5, alone[3, 1]),
        ],
        condition="a class counts by how often it uses the word, the query has one class, contexts are long",
    )


def _language(correlation: dict[str, np.ndarray], pairs: dict[str, np.ndarray], queries: np.ndarray) -> Claim:
    def excess(half):
        real, control = correlation[f"{half}_alone"][:2, 3]
        # Two standard errors of a difference of two rank correlations, of so many pairs.
        return real - control, 2 * np.sqrt(np.sum(1 / pairs[f"{half}_alone"][:2]))

    fitted, fitted_error = excess("fitted")
    unseen, unseen_error = excess("unseen")
    K = len(queries)
    return Claim(
        "scan_snap.text/language",
        "What attention finds belongs to the language: the rank correlation with TF-IDF, weighted, exceeds "
        "that on windows of shuffled text before the same queries",
        "tian2023scan, section 1 (attention to tokens that co-occur with the query; the test is made here)",
        "qualified",
        [
            Check("excess on windows held out", "at least", unseen_error, unseen),
            # z is a function of P, and follows the noise of a sample as it follows a language.
            Check("excess on the windows that it was trained on", "at most", fitted_error, fitted),
            # Why the windows are shuffled: in a shuffled text the word before any other is the most frequent
            # one, but for chance, which a tenth allows for; no query is left that has one class.
            Check(
                "shuffled text: classes whose query is the most frequent word",
                "all of",
                K,
                np.sum(queries == 0),
                K // 10,
            ),
        ],
        condition="TF-IDF is taken from windows that were held out",
    )


def _network(data: dict[str, Any]) -> Claim:
    order = convergence_order(data["rates"], data["gap"])
    correlation = data["windows"]["correlation"]
    return Claim(
        "scan_snap.text/network",
        "The network trained on the text follows the full population flow",
        "tian2023scan, Lemma 2",
        "qualified",
        [
            # First-order method.
            Check("infinite contexts: order of the gap in the learning rate", "slope", 1.0, order.slope, 0.1),
            # Counts of a word are then known well enough: noise is a tenth of the variance of z, no more.
            Check("longest contexts: correlation of z at the end", "at least", 0.95, correlation[-1]),
            # A class's own windows, which differ, pull M times as hard as those of the other classes do.
            Check("windows as they are: correlation of z at the end", "at most", 0.5, correlation[0]),
        ],
        condition="contexts hold several times as many words as the vocabulary",
    )


def _fast_decoder(comparison: Comparison) -> Claim:
    return Claim(
        "scan_snap.text/fast-decoder",
        "On the text the fast-decoder flow follows the full flow up to a few times the ratio of the rates",
        "tian2023scan, section 4",
        "stated",
        [
            # First order in the ratio, 0.1, over one minus the mean overlap of the classes, 0.7 on text: what
            # tells them apart is learned that much later.
            Check("relative error of z at the end", "at most", 0.5, comparison.relative_l2[-1]),
        ],
    )


CORPORA = {"python": "The reference that comes with Python", "wikitext-2": "WikiText-2"}


def figure(saved: Saved) -> Figure:
    """Learned z against TF-IDF, real and shuffled; words over time; attention gained; long contexts."""
    drawn, axes = plotting.new_figure(2, 3, width=4.6, height=3.7)
    config = saved.config
    (real, control, bars), (over_time, table, long) = axes
    drawn.suptitle(
        f"{CORPORA[config['corpus']]}: {saved['num_tokens']:,} words; K = {config['num_classes']} classes, "
        f"M = {config['vocab_size']} words, {saved['num_windows'][0]:,} windows of {config['window']} words",
        fontsize=11,
    )
    for index, (ax, title) in enumerate(((real, "Real text"), (control, "Shuffled windows, same queries"))):
        _scatter(ax, saved, index)
        ax.set_title(title)
    _bars(bars, saved)

    words = saved["words"]
    trained, theory = saved["trained/ys"], saved["theory/ys"]
    by_z = np.argsort(-trained[-1])
    some = np.concatenate([by_z[:4], by_z[-2:]])
    ts, labels = saved["theory/ts"], [str(word) for word in words[some]]
    plotting.theory_and_trained(over_time, ts, theory[:, some], trained[:, some], labels)
    over_time.plot(saved["fast/ts"], saved["fast/ys"][:, some], **plotting.PRINTED)
    over_time.plot([], [], label="fast decoder", **plotting.PRINTED)
    low, high = over_time.get_ylim()
    over_time.set(xlabel="time = learning rate × step", ylabel="attention logit z")
    over_time.set_ylim(low, high + 0.3 * (high - low))
    over_time.set_title(f"Words before “{_name(saved, int(saved['shown']))}”")
    over_time.legend(loc="upper left", ncols=3)

    _table(table, saved)

    length, error = saved["windows/length"], saved["windows/relative_l2"]
    long.loglog(length, error, "o", color="C0", label="network on windows of the text")
    plotting.reference_slope(long, length[::-1], error[::-1], -1, "slope -1")
    for x, y, correlation in zip(length, error, saved["windows/correlation"], strict=True):
        long.annotate(f"{correlation:.2f}", (x, y), (-5, -13), textcoords="offset points", fontsize=8.5)
    long.plot([], [], " ", label="numbers: correlation of z with the flow")
    label = "as many words as the vocabulary"
    long.axvline(config["vocab_size"], ymin=0.4, label=label, **plotting.PRINTED)
    long.set_xticks(length, labels=[f"{x:.0f}" for x in length])
    long.minorticks_off()
    long.set(xlabel="known words per context", ylabel="relative error of z at the end")
    long.set_ylim(error.min() / 15, 2 * max(error.max(), error[-1] * length[-1] / length[0]))
    long.set_title("Windows pooled into longer contexts")
    long.legend(loc="lower left")
    return drawn


def _name(saved: Saved, n: int) -> str:
    return " ".join(saved["words"][[saved["query"][n], saved["next_token"][n]]])


def _scatter(ax: Axes, saved: Saved, index: int) -> Axes:
    z, score, alone = saved["learned"][index], saved["scores"][index], saved["alone"][index]
    for name, rows, kind, color, size in (
        ("several classes", ~alone, "shared", "0.7", 3),
        ("one class", alone, "alone", "C0", 5),
    ):
        used = np.isfinite(score[rows])
        found = saved[f"correlation/fitted_{kind}"][index, 3]
        label = f"query of {name}: rank correlation {found:.2f}"
        # Some thousand points are all that can be told apart.
        points = [values[rows][used][:: 1 + np.count_nonzero(used) // 1500] for values in (score, z)]
        ax.plot(*points, ".", color=color, markersize=size, markeredgewidth=0, label=label)
    ax.set_yscale("symlog", linthresh=1e-2)
    ax.set(xlabel="TF-IDF, weighted: log of P(l | n) over its mean", ylabel="attention logit z at the end")
    ticks = (-1, -0.1, -0.01, 0, 0.01, 0.1, 1)
    ax.set_yticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    ax.set_ylim(-9, 30)
    ax.legend(loc="upper left", markerscale=2)
    return ax


def _bars(ax: Axes, saved: Saved) -> Axes:
    """Rank correlations of z with each score, for queries of one class."""
    fitted, unseen = saved["correlation/fitted_alone"], saved["correlation/unseen_alone"]
    rows = [*SCORES, "TF-IDF, weighted, held out"]
    values = np.concatenate([fitted, unseen[:, 3:]], axis=1)
    # A shuffled text has no query of one class.
    for offset, (source, color) in enumerate(((0, "C0"), (1, "C1"), (3, "0.6"))):
        place = np.arange(len(rows)) + 0.26 * (offset - 1)
        bars = ax.barh(place, values[source], 0.24, color=color, label=SOURCES[source])
        ax.bar_label(bars, fmt="%.2f", padding=2, fontsize=7.5)
    ax.axvline(0, ymax=0.86, color="black", linewidth=0.8)  # below the legend
    ax.set_yticks(range(len(rows)), labels=[row.replace(", ", ",\n", 1) for row in rows])
    ax.set(xlabel="rank correlation with z", xlim=(-0.75, 1.15), ylim=(len(rows) - 0.5, -1.5))
    ax.set_title("Scores of words, queries of one class")
    ax.legend(loc="upper left", ncols=3, columnspacing=1, handlelength=1, borderaxespad=0)
    return ax


def _table(ax: Axes, saved: Saved) -> Axes:
    """Words that gain and lose most attention, for the classes whose attention moved most."""
    words, P = saved["words"], saved["P"]
    classes = [n for n in np.argsort(-saved["moved"])[:7] if np.isfinite(saved["moved"][n])]
    after = P * np.exp(saved["learned"][0])
    gain = after / after.sum(axis=1, keepdims=True) - P
    ax.set_axis_off()
    ax.set_title("Words whose attention changes most")

    def write(height, cells, **text):
        for x, cell in zip((0.0, 0.32, 0.74), cells, strict=True):
            ax.text(x, height, cell, transform=ax.transAxes, in_layout=False, **text)

    write(0.92, ("query, next", "gain", "lose"), fontweight="bold", fontsize=9)
    for row, n in enumerate(classes):
        order = np.argsort(-gain[n])
        cells = (_name(saved, n), *(", ".join(words[some]) for some in (order[:3], order[:-4:-1])))
        write(0.80 - 0.12 * row, cells, fontsize=8.5)
    return ax
