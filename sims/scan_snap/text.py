"""Sequence classes of English text: is attention a TF-IDF that is learned? Real text beside shuffled text.

A class is a next word with the word that most often goes before it, its query; P(l | n) is how often word l
occurs in a window before the two. Theory and network run on these classes. What attention learns, z of the
query and word l, is set beside TF-IDF: log P(l | n) plus the log of an inverse class frequency. The classes
are estimated from one half of the text, in alternating blocks, so that the other half can tell what of it
belongs to the language and what to the sample. Two controls go through the same: windows of shuffled text
put before the very same queries, and a shuffled text from which the classes themselves are taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dynamics import scan_snap
from dynamics.flow import Trajectory
from dynamics.scan_snap import SequenceClasses, rank_correlation
from models.attention import ScanSnapAttention
from models.data.text import (
    TextClasses,
    next_token_classes,
    python_corpus,
    select_windows,
    wikitext2,
    words,
)
from models.data.tokens import Contexts, population_contexts
from models.functional import as_function
from models.losses import bind, cross_entropy, on_batches
from models.training import Descent, scale_by_name, sgd_until, train
from sims import plotting
from sims.claims import SECOND_ORDER, Claim, Preset, at_least, at_most, every, qualified, slope, stated
from sims.compare import compare, convergence_order, lane, named_lanes, require_ok
from sims.ranges import Count, Length, Positive, Range
from sims.results import Context, Saved

SOURCES = {"real": "real text", "windows": "shuffled windows", "shuffled": "shuffled text"}
SOURCES |= {"short": "short contexts"}
WEIGHTED = "TF-IDF, weighted"
SCORES = ("term frequency", "inverse class frequency, counted", "TF-IDF, counted", WEIGHTED)


@dataclass(frozen=True)
class Config:
    """Text, classes and training."""

    corpus: Literal["python", "wikitext-2"] = "python"
    """Text: the reference that comes with Python, or WikiText-2 from --data-dir."""
    num_classes: Annotated[int, Range(at_least=2)] = 24
    """Number of classes K: the most frequent pairs of words."""
    vocab_size: Annotated[int, Range(at_least=2)] = 256
    """Size of the vocabulary M: the most frequent words."""
    window: Count = 32
    """Words of context before the query."""
    max_windows: Count = 400
    """The most windows per class, evenly spaced over the text."""
    block: Count = 500
    """Words per block: the classes come from every other block, the rest is held out."""
    rate_ratio: Positive = 0.1
    """Learning rate of attention over that of the decoder, which is K per unit of time."""
    descent: Descent = Descent(horizon=30.0, points=30, substeps=(10, 20))
    """Gradient descent: scanning ends after about log M + 1; substeps are multiples of the first."""
    pooled: Annotated[tuple[Count, ...], Length(1)] = (1, 4, 16, 64)
    """Windows per context where the network is trained on real ones: 1 is the text as it is."""
    batch: Count = 32
    """Contexts per step there."""

    @property
    def rates(self) -> dict[str, float]:
        """Learning rates of decoder and attention."""
        return {"Y": float(self.num_classes), "Z": self.num_classes * self.rate_ratio}


_DESCENT = replace(Config().descent, substeps=(10, 20, 40))
PRESETS: dict[Preset, Config] = {
    "quick": Config(pooled=(1, 32)),
    "standard": Config(num_classes=40, vocab_size=400, descent=_DESCENT),
    "paper": Config("wikitext-2", num_classes=40, vocab_size=800, descent=_DESCENT),
}


def _halves(tokens: list[str], config: Config, seed: int) -> dict[str, tuple[TextClasses, TextClasses]]:
    """Classes of the text and of its two controls, from every other block of it and from the rest."""
    shuffled = np.random.default_rng(seed).permutation(tokens).tolist()
    sizes = (config.num_classes, config.vocab_size, config.window)
    halves = {}
    for name, text, contexts in (
        ("real", tokens, None),
        ("windows", tokens, shuffled),
        ("shuffled", shuffled, None),
    ):
        whole = next_token_classes(text, *sizes, max_windows=config.max_windows, context_tokens=contexts)
        out = whole.position // config.block % 2 == 1
        halves[name] = (select_windows(whole, ~out), select_windows(whole, out))
    return halves


def _theory(classes: SequenceClasses, config: Config) -> list[Trajectory]:
    """Attention logits of each class's query along the full flow and the fast-decoder flow, (T, K, M)."""
    # The gaps to be told apart are a hundred times larger than what these tolerances leave.
    options = {"rtol": 1e-6, "atol": 1e-8, "solver": diffrax.Tsit5()}
    options |= {f"learning_rate_{name}": rate for name, rate in config.rates.items()}
    ts, query = config.descent.times, np.asarray(classes.query)
    flows = (scan_snap.population_flow, scan_snap.fast_decoder_flow)
    paths = [flow(classes, ts, **options) for flow in flows]
    return [Trajectory(ts, np.asarray(path.ys.Z)[:, query], path.ok) for path in paths]


def _attention_rows(query: jax.Array, params: Any) -> jax.Array:
    """Attention logits z of each class's query, (K, M)."""
    return params["Z"][...][query]


@eqx.filter_jit
def _train_on_population(lanes: dict[str, tuple], config: Config) -> dict[str, Trajectory]:
    """Gradient descent on infinitely long contexts; lanes are of classes and of substeps."""
    descent, coarsest = config.descent, min(config.descent.substeps)
    predict, params = as_function(ScanSnapAttention.zeros(config.vocab_size))

    def one(lane):
        classes, count = lane
        step = descent.horizon / (descent.points * count)
        _, path = train(
            bind(cross_entropy, (predict, *population_contexts(classes))),
            params,
            optax.chain(scale_by_name(**config.rates), sgd_until(step, descent.points * count)),
            steps=descent.points * max(descent.substeps),
            every=coarsest,
            observe=Partial(_attention_rows, classes.query),
            time_step=step,
        )
        keep = jnp.arange(descent.points + 1) * count // coarsest
        return Trajectory(path.ts[keep], path.ys[keep], path.ok)

    return named_lanes(one, **lanes)


def _draw_contexts(windows, pooled, most: int, batch: int, key) -> tuple[Contexts, jax.Array]:
    """A batch of contexts, each made of `pooled` <= `most` windows of one class; all draws are uniform."""
    contexts, next_token, first, sizes = windows
    key_class, key_window = jax.random.split(key)
    label = jax.random.randint(key_class, (batch,), 0, len(sizes))
    drawn = jax.random.randint(key_window, (batch, most), 0, sizes[label][:, None]) + first[label][:, None]
    counts = jnp.sum(contexts.counts[drawn] * (jnp.arange(most) < pooled)[None, :, None], axis=1)
    return Contexts(counts, contexts.query[drawn[:, 0]]), next_token[drawn[:, 0]]


@eqx.filter_jit
def _train_on_windows(windows: tuple, query: jax.Array, config: Config, key: jax.Array) -> Trajectory:
    """Gradient descent on batches of windows, one lane per number of windows pooled in a context."""
    descent, substeps = config.descent, min(config.descent.substeps)
    predict, params = as_function(ScanSnapAttention.zeros(config.vocab_size))
    step = descent.horizon / (descent.points * substeps)

    def one(count):
        _, path = train(
            on_batches(cross_entropy, predict),
            params,
            optax.chain(scale_by_name(**config.rates), optax.sgd(step)),
            steps=descent.points * substeps,
            every=substeps,
            observe=Partial(_attention_rows, query),
            batches=Partial(_draw_contexts, windows, count, max(config.pooled), config.batch),
            key=key,
            time_step=step,
        )
        return path

    return jax.vmap(one)(jnp.asarray(config.pooled))


def _scanning_form(classes: SequenceClasses) -> np.ndarray:
    """Leading order of z in time up to a factor, (K, M): f_n * (f_n <f_n, S> - S), S = sum_n f_n.

    It is summed over the classes of a query; NaN where P is zero.
    """
    P, query = np.asarray(classes.P), np.asarray(classes.query)
    f = P / np.linalg.norm(P, axis=1, keepdims=True)
    total = f.sum(axis=0, keepdims=True)
    rows = np.zeros((query.max() + 1, P.shape[1]))
    np.add.at(rows, query, f * (f * np.sum(f * total, axis=1, keepdims=True) - total))
    return np.where(P > 0, rows[query], np.nan)


def _tf_idf(classes: SequenceClasses) -> np.ndarray:
    """The scores of `SCORES`, stacked, (4, K, M); NaN where P is zero.

    The inverse class frequency is counted, K over the number of classes that use the word at all, or
    weighted, one over the mean of P(l | n) over the classes: TF-IDF is then pointwise mutual information.
    """
    P = np.asarray(classes.P)
    used = P > 0
    term = np.log(P, out=np.full_like(P, np.nan), where=used)
    counted = np.log(len(P) / np.maximum(used.sum(axis=0), 1))[None]
    weighted = -np.log(np.where(used.any(axis=0), P.mean(axis=0), 1))[None]
    return np.stack([term, counted + 0 * term, term + counted, term + weighted])


def _alone(classes: SequenceClasses) -> np.ndarray:
    """Which classes have a query of their own, (K,)."""
    query = np.asarray(classes.query)
    return np.bincount(query)[query] == 1


def _correlations(z: np.ndarray, fitted: TextClasses, unseen: TextClasses) -> dict[str, dict[str, Any]]:
    """Rank correlations of z with each score, over words that the fitted half uses; and numbers of pairs.

    They are over queries of one class alone, with scores of either half, or over queries that classes share.
    """
    alone, scores = _alone(fitted.classes)[:, None], _tf_idf(fitted.classes)
    held_out = np.where(fitted.classes.P > 0, _tf_idf(unseen.classes), np.nan)
    kept = {
        "fitted_alone": np.where(alone, scores, np.nan),
        "fitted_shared": np.where(alone, np.nan, scores),
        "unseen_alone": np.where(alone, held_out, np.nan),
    }
    return {
        "correlation": {name: np.array([rank_correlation(z, each) for each in kept[name]]) for name in kept},
        "pairs": {name: np.count_nonzero(np.isfinite(each[0])) for name, each in kept.items()},
    }


def _words(text: TextClasses, paths: dict[str, np.ndarray]) -> dict:
    """Logits over time for words of the class whose attention moved most; words that gain and lose."""
    classes, names, end = text.classes, np.array(text.words), paths["trained"][-1]
    pairs = np.stack([names[classes.query], names[classes.next_token]], axis=1)
    # Of classes with a query of their own, how far attention has moved towards what is their own.
    moved = np.where(_alone(classes), np.nansum(end * _tf_idf(classes)[-1], axis=1), -np.inf)
    shown = np.argmax(moved)
    by_z = np.argsort(-end[shown])
    some = np.concatenate([by_z[:4], by_z[-2:]])
    P = np.asarray(classes.P)
    after = P * np.exp(end)
    order = np.argsort(P - after / after.sum(axis=1, keepdims=True), axis=1)
    table = [
        (" ".join(pairs[n]), ", ".join(names[order[n, :3]]), ", ".join(names[order[n, :-4:-1]]))
        for n in np.argsort(-moved)[:7]
        if np.isfinite(moved[n])
    ]
    return {
        "shown": " ".join(pairs[shown]),
        "shown_word": ("shown_word", names[some]),
        "z": ("time shown_word", {name: path[:, shown, some] for name, path in paths.items()}),
        "table": ("row column", np.array(table).reshape(-1, 3)),
    }


def run(config: Config, context: Context) -> dict:
    """Estimate the classes, integrate the theory, train the network, and correlate z with TF-IDF."""
    context.progress("estimating sequence classes", 0.0)
    tokens = python_corpus() if config.corpus == "python" else words(wikitext2(context.data_dir))
    halves = _halves(tokens, config, context.seed)
    real = halves["real"][0]
    context.progress("integrating the theory", 0.1)
    theory, fast = _theory(real.classes, config)
    context.progress("training on infinitely long contexts", 0.4)
    # Real text at every learning rate, and the two controls at the largest.
    descent, substeps = config.descent, sorted(config.descent.substeps)
    lanes = {f"real {count}": (real.classes, np.asarray(count)) for count in substeps}
    lanes |= {name: (halves[name][0].classes, np.asarray(substeps[0])) for name in ("windows", "shuffled")}
    trained = jax.device_get(_train_on_population(lanes, config))

    context.progress("training on windows of the text", 0.7)
    per_class = np.bincount(real.label)
    windows = (real.contexts, real.next_token, np.cumsum(per_class) - per_class, per_class)
    key = jax.random.key(context.seed)
    pooled = jax.device_get(_train_on_windows(windows, real.classes.query, config, key))
    require_ok("training on text", *trained.values(), pooled)

    context.progress("measuring", 0.9)
    learned = trained[f"real {substeps[-1]}"].ys
    ends = {"real": learned[-1], "short": pooled.ys[0, -1]}
    ends |= {name: trained[name].ys[-1] for name in ("windows", "shuffled")}
    halves["short"] = halves["real"]
    found = [_correlations(ends[name], *halves[name]) for name in SOURCES]
    found = jax.tree.map(lambda *values: np.stack(values), *found)
    on_windows = [compare(theory, lane(pooled, index)) for index in range(len(config.pooled))]
    gaps = np.array([compare(theory, trained[f"real {count}"]).gap for count in substeps])
    words_per_window = np.mean(np.sum(np.asarray(real.contexts.counts), axis=1))
    drawn = {name: halves[name][0].classes for name in ("real", "windows")}
    return {
        "time": ("time", theory.ts),
        "rate": ("rate", descent.horizon / (descent.points * np.array(substeps))),
        "source": ("source", np.array([*SOURCES])),
        "score": ("score", np.array(SCORES)),
        "word": ("word", np.array(real.words)),
        "pooled": ("pooled", np.array(config.pooled)),
        "gap": ("rate", gaps),
        "fast_error": scan_snap.attention_error(fast.ys[-1], theory.ys[-1]),
        "scanning": rank_correlation(learned[1], _scanning_form(real.classes)),
        "correlation": ("source score", found["correlation"]),
        "pairs": ("source", {name: found["pairs"][name] for name in ("fitted_alone", "unseen_alone")}),
        "shuffled_query": ("class", np.asarray(halves["shuffled"][0].classes.query)),
        "length": ("pooled", np.array(config.pooled) * words_per_window),
        "on_windows": {
            name: ("pooled", np.array([getattr(each, name)[-1] for each in on_windows]))
            for name in ("relative_l2", "correlation")
        },
        "alone": ("class", _alone(real.classes)),
        "tf_idf": ("class word", {name: _tf_idf(classes)[-1] for name, classes in drawn.items()}),
        "learned": ("class word", {name: ends[name] for name in drawn}),
        "num_tokens": len(tokens),
        "num_windows": len(real.label),
        **_words(real, {"trained": learned, "theory": theory.ys, "fast": fast.ys}),
    }


def _at(saved: Saved, path: str, *names: str) -> float:
    """A number by the names of its source and its score."""
    places = [saved[key].tolist().index(name) for key, name in zip(("source", "score"), names, strict=False)]
    return saved[path][tuple(places)]


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """What attention learns while it scans, whether it is TF-IDF, and how far the flows follow it."""
    yield stated(
        "scanning",
        "While attention scans, a word gains where a class uses it more than the classes do on average: z "
        "grows like f_nl (f_nl <f_n, S> - S_l), S the sum of all f_n, summed over the classes of a query",
        "tian2023scan, Lemma 2 (its leading order in time, derived here)",
        at_least(
            "rank correlation of z with it at the first record",
            saved["scanning"],
            0.98,
            why="the next order is down by t / (ln M + 1), 0.15: it swaps close ranks",
        ),
    )
    yield _tf_idf_claim(saved)
    yield _language(saved)
    order, z = convergence_order(saved["rate"], saved["gap"]).slope, saved["on_windows/correlation"]
    noise, pull = "noise is a tenth of the variance of z, at most", "a class's windows pull M times as hard"
    yield qualified(
        "network",
        "The network trained on the text follows the full population flow",
        "tian2023scan, Lemma 2",
        condition="contexts hold several times as many words as the vocabulary",
        inside=[
            slope(
                "infinite contexts: order of the gap in the learning rate", order, 1.0, 0.1, why=SECOND_ORDER
            ),
            at_least("longest contexts: correlation of z at the end", z[-1], 0.95, why=noise),
        ],
        # A class's own windows, which differ, pull M times as hard as those of the other classes do.
        outside=[at_most("windows as they are: correlation of z at the end", z[0], 0.5, why=pull)],
    )
    # What tells the classes apart is learned later by one over one minus their mean overlap, 0.7 on text.
    later = "first order in the ratio, 0.1, over 1 - 0.7"
    yield stated(
        "fast-decoder",
        "On the text the fast-decoder flow follows the full flow up to a few times the ratio of the rates",
        "tian2023scan, section 4",
        at_most("relative error of z at the end", saved["fast_error"], 0.5, why=later),
    )


def _tf_idf_claim(saved: Saved) -> Claim:
    alone = "correlation/fitted_alone"
    weighted, counted = _at(saved, alone, "real", WEIGHTED), _at(saved, alone, "real", "TF-IDF, counted")
    shared = _at(saved, "correlation/fitted_shared", "real", WEIGHTED)
    short = _at(saved, alone, "short", WEIGHTED)
    half, everywhere = "one is a monotone relation, zero none", "nearly every class uses a frequent word"
    differ, vary = "one row of Z serves classes that differ", "windows vary more than classes do"
    return qualified(
        "tf-idf",
        "Attention is a TF-IDF that is learned: z of a query and a word is ranked as log P(l | n) plus the "
        "logarithm of the inverse class frequency",
        "tian2023scan, Theorem 2 (attention to discriminative tokens that co-occur with the query)",
        condition="a class counts by how often it uses the word, the query has one class, contexts are long",
        inside=[at_least("weighted class frequency, queries of one class", weighted, 0.5, why=half)],
        outside=[
            at_most("counted class frequency, queries of one class", counted, 0.5, why=everywhere),
            at_most("weighted, queries of several classes", shared, 0.5, why=differ),
            at_most("weighted, queries of one class, windows as they are", short, 0.5, why=vary),
        ],
    )


def _language(saved: Saved) -> Claim:
    def excess(half):
        real, control = (_at(saved, f"correlation/{half}", name, WEIGHTED) for name in ("real", "windows"))
        pairs = np.array([_at(saved, f"pairs/{half}", name) for name in ("real", "windows")])
        return real - control, 2 * np.sqrt(np.sum(1 / pairs))

    (fitted, fitted_error), (unseen, unseen_error) = excess("fitted_alone"), excess("unseen_alone")
    often = saved["shuffled_query"] == 0
    tenth, chance = len(often) // 10, "a tenth, for another word by chance"
    errors, noise = "two standard errors of the difference", "z follows the noise of a sample, too"
    return qualified(
        "language",
        "What attention finds belongs to the language: the rank correlation with TF-IDF, weighted, exceeds "
        "that on windows of shuffled text before the same queries",
        "tian2023scan, section 1 (attention to tokens that co-occur with the query; the test is made here)",
        condition="TF-IDF is taken from windows that were held out",
        inside=[at_least("excess on windows held out", unseen, unseen_error, why=errors)],
        outside=[
            at_most("excess on the windows that it was trained on", fitted, fitted_error, why=noise),
            # Why the windows are shuffled: in a shuffled text the word before any other is the most frequent
            # one, but for chance, which a tenth allows for; no query is left that has one class.
            every("shuffled text: classes whose query is the most frequent word", often, tenth, why=chance),
        ],
    )


CORPORA = {"python": "The reference that comes with Python", "wikitext-2": "WikiText-2"}


def figure(config: Config, saved: Saved) -> Figure:
    """Learned z against TF-IDF, real and shuffled; words over time; attention gained; long contexts."""
    drawn, axes = plotting.new_figure(2, 3, width=4.6, height=3.7)
    (real, control, bars), (over_time, table, long) = axes
    drawn.suptitle(
        f"{CORPORA[config.corpus]}: {saved['num_tokens']:,} words; K = {config.num_classes} classes, "
        f"M = {config.vocab_size} words, {saved['num_windows']:,} windows of {config.window} words",
        fontsize=11,
    )
    _scatter(real, saved, "real")
    real.set_title("Real text")
    _scatter(control, saved, "windows")
    control.set_title("Shuffled windows, same queries")
    _bars(bars, saved)

    ts, labels = saved["time"], saved["shown_word"].tolist()
    plotting.theory_and_trained(over_time, ts, saved["z/theory"], saved["z/trained"], labels)
    over_time.plot(ts, saved["z/fast"], **plotting.PRINTED)
    over_time.plot([], [], label="fast decoder", **plotting.PRINTED)
    low, high = over_time.get_ylim()
    over_time.set(xlabel="time = learning rate × step", ylabel="attention logit z")
    over_time.set_ylim(low, high + 0.3 * (high - low))
    over_time.set_title(f"Words before “{saved['shown']}”")
    over_time.legend(loc="upper left", ncols=3)
    _table(table, saved["table"])

    length, error = saved["length"], saved["on_windows/relative_l2"]
    long.loglog(length, error, "o", color="C0", label="network on windows of the text")
    plotting.reference_slope(long, length[::-1], error[::-1], -1, "slope -1")
    for x, y, correlation in zip(length, error, saved["on_windows/correlation"], strict=True):
        long.annotate(f"{correlation:.2f}", (x, y), (-5, -13), textcoords="offset points", fontsize=8.5)
    long.plot([], [], " ", label="numbers: correlation of z with the flow")
    label = "as many words as the vocabulary"
    long.axvline(config.vocab_size, ymin=0.4, label=label, **plotting.PRINTED)
    long.set_xticks(length, labels=[f"{x:.0f}" for x in length])
    long.minorticks_off()
    long.set(xlabel="known words per context", ylabel="relative error of z at the end")
    long.set_ylim(error.min() / 15, 2 * max(error.max(), error[-1] * length[-1] / length[0]))
    long.set_title("Windows pooled into longer contexts")
    long.legend(loc="lower left")
    return drawn


def _scatter(ax: Axes, saved: Saved, source: str) -> None:
    z, score, alone = saved[f"learned/{source}"], saved[f"tf_idf/{source}"], saved["alone"]
    for name, rows, kind, color, size in (
        ("several classes", ~alone, "shared", "0.7", 3),
        ("one class", alone, "alone", "C0", 5),
    ):
        used = np.isfinite(score[rows])
        found = _at(saved, f"correlation/fitted_{kind}", source, WEIGHTED)
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


def _bars(ax: Axes, saved: Saved) -> None:
    """Rank correlations of z with each score, for queries of one class."""
    rows = [*SCORES, "TF-IDF, weighted, held out"]
    # A shuffled text has no query of one class.
    for offset, (source, color) in enumerate((("real", "C0"), ("windows", "C1"), ("short", "0.6"))):
        values = [_at(saved, "correlation/fitted_alone", source, score) for score in SCORES]
        values.append(_at(saved, "correlation/unseen_alone", source, WEIGHTED))
        place = np.arange(len(rows)) + 0.26 * (offset - 1)
        bars = ax.barh(place, values, 0.24, color=color, label=SOURCES[source])
        ax.bar_label(bars, fmt="%.2f", padding=2, fontsize=7.5)
    ax.axvline(0, ymax=0.86, color="black", linewidth=0.8)  # below the legend
    ax.set_yticks(range(len(rows)), labels=[row.replace(", ", ",\n", 1) for row in rows])
    ax.set(xlabel="rank correlation with z", xlim=(-0.75, 1.15), ylim=(len(rows) - 0.5, -1.5))
    ax.set(title="Scores of words, queries of one class", ylabel="score")
    ax.legend(loc="upper left", ncols=3, columnspacing=1, handlelength=1, borderaxespad=0)


def _table(ax: Axes, rows: np.ndarray) -> None:
    """Words that gain and lose most attention, for the classes whose attention moved most."""
    ax.set_axis_off()
    ax.set_title("Words whose attention changes most")

    def write(height, cells, **text):
        for x, cell in zip((0.0, 0.32, 0.74), cells, strict=True):
            ax.text(x, height, cell, transform=ax.transAxes, in_layout=False, **text)

    write(0.92, ("query, next", "gain", "lose"), fontweight="bold", fontsize=9)
    for index, cells in enumerate(rows):
        write(0.80 - 0.12 * index, cells, fontsize=8.5)
