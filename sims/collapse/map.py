"""Where collapse comes from, read off saved results: zero that turns stable, a jump in deeper networks, SGD.

What the other simulations of this theory have saved is put side by side. Strengths of regularization are
divided by the one at which everything has collapsed. The square of an order parameter vanishes there with
exponent one where zero turns stable at the same strength, and with exponent zero, a jump, where zero is
stable at all strengths. Under SGD networks collapse where the mean loss has a saddle. A result that is
missing is named, and what would be read off it is not judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sims import plotting, results
from sims.claims import Claim, Preset, at_least, at_most, equals, every, quoted, stated
from sims.compare import fit_line
from sims.ranges import check_ranges
from sims.results import Context, Saved

SLIDE = "ziyin2022talk, slide on a unifying picture"
ORIGIN = (
    "Posterior collapse, dimensional collapse and that of models with one hidden layer are a matter of the "
    "origin's stability"
)
DEEPER = (
    "In deeper models factors are global: zero is a minimum at all strengths, a barrier is between it and "
    "the other, and the transition is a jump"
)
SGD = (
    "SGD makes a network collapse at large learning rates and small batches, where the mean loss has a saddle"
)
READS = (
    "collapse.two_layer",
    "collapse.vae",
    "collapse.ssl",
    "collapse.depth",
    "collapse.landscape",
    "collapse.sgd",
)
LANDSCAPE = ("one_hidden_layer", "linear_autoencoder", "contrastive_encoder")
DEEP = ("two_hidden_layers", "three_hidden_layers")
STABLE, JUMP, NOISE = "zero turns stable", "jump over a barrier", "noise of SGD"
KINDS = {  # the simulation of each model, and why it collapses
    "linear_autoencoder": ("vae", STABLE),
    "contrastive_encoder": ("ssl", STABLE),
    "one_hidden_layer": ("two_layer", STABLE),
    "two_hidden_layers": ("depth", JUMP),
    "three_hidden_layers": ("depth", JUMP),
    "one_neuron_under_SGD": ("sgd", NOISE),
}
COLORS, LACKING_COLOR = {STABLE: "#9ecae1", JUMP: "#fdd0a2", NOISE: "#a1d99b"}, "0.9"
LACKING = ("no folder", "missing", "damaged")
NEAR = (0.75, 0.999)  # strengths between which exponents are fitted


@dataclass(frozen=True)
class Config:
    """Where the results lie."""

    results: str = ""
    """Folder of saved results; the one that this result is saved in where empty."""

    def __post_init__(self):
        check_ranges(self)


PRESETS: dict[Preset, Config] = {"quick": Config(), "standard": Config(), "paper": Config()}


def _load(folder: Path | None, name: str, seed: int) -> tuple[Saved | None, str]:
    """A saved result of the same seed, and what is to be said of it."""
    if folder is None:
        return None, LACKING[0]
    try:
        saved = results.load(folder, f"{name}@seed={seed}" if seed else name)
    except FileNotFoundError:
        return None, LACKING[1]
    except (OSError, ValueError):
        return None, LACKING[2]
    return saved, f"{saved.record['preset']}, seed {saved.record['seed']}"


def _curve(strength: np.ndarray, size: np.ndarray, critical: float) -> dict:
    """A squared order parameter over the strength, in units of their own, and its exponent at collapse."""
    share, size = np.asarray(strength) / critical, np.asarray(size)
    size = size / np.max(size[share > 0.2])
    near = (share > NEAR[0]) & (share < NEAR[1]) & (size > 0)
    return {
        "share": share,
        "size": size,
        "exponent": fit_line(np.log(1 - share[near]), np.log(size[near])).slope,
    }


def _of_two_layer(saved: Saved) -> dict:
    return {"one_hidden_layer": _curve(saved["theory/share"], saved["theory/b"] ** 2, 1.0)}


def _of_vae(saved: Saved) -> dict:
    lam = saved["fine/lam"][:, 0]
    return {"linear_autoencoder": _curve(saved["fine/at"], lam**2, saved["threshold"][0])}


def _of_ssl(saved: Saved) -> dict:
    root, strength = saved["theory/two"][:, 0], saved["strength"]
    last = np.flatnonzero(root > 0)[-1]
    return {"contrastive_encoder": _curve(strength, root**2, float(strength[last : last + 2].mean()))}


def _of_depth(saved: Saved) -> dict:
    return {
        name: _curve(saved["ratio"], saved["norm"][depth], 1.0)
        for name, depth in zip(DEEP, (2, 3), strict=True)
    }


CURVES: Mapping[str, Callable[[Saved], dict]] = {
    "two_layer": _of_two_layer,
    "vae": _of_vae,
    "ssl": _of_ssl,
    "depth": _of_depth,
}


def _origins(saved: Saved) -> dict[str, float]:
    """Strengths at which zero becomes stable along trained weights, over those of complete collapse."""

    def crossing(strength, second):
        """Where second differences vanish, which are linear in the strength."""
        return strength[0] + (strength[-1] - strength[0]) * second[0] / (second[0] - second[-1])

    strength, largest = saved["strength"], saved["eigenvalue"][0]
    return {
        "one_hidden_layer": crossing(saved["share"], saved["supervised/second"]),
        "linear_autoencoder": crossing(strength, saved["autoencoder/best"][:, 1]) / largest,
        "contrastive_encoder": crossing(strength, saved["encoder/second"][0, :, 0]) / largest,
    }


def _barriers(saved: Saved) -> dict:
    """Starts that zero keeps at each strength, and how far the other minimum outlives the transition."""
    hidden = [1, 2]  # of the arrays by depth: those of two and three hidden layers
    return {
        "strength": ("trapped_at", saved["strength"]),
        "trapped": ("deep trapped_at", saved["trained/trapped"][hidden]),
        "outlives": ("deep", (saved["gamma_m"] / saved["gamma_c/formula"])[hidden]),
    }


def _of_sgd(saved: Saved) -> dict:
    """Fractions of chains at zero, by learning rate over that at which single samples make it attract."""
    share = saved["share"]
    fractions = saved["map/collapsed"][: share.size]
    return {
        "rate": ("rate", share),
        "batch_1": ("rate", fractions[:, 0]),
        "batch_16": ("rate", fractions[:, -1]),
    }


def run(config: Config, context: Context) -> dict:
    """What the saved results say of each model, and which are missing."""
    folder = Path(config.results) if config.results else context.results
    context.progress("reading results", 0.0)
    loaded = {name: _load(folder, name, context.seed) for name in READS}
    saved = {name.split(".")[1]: result for name, (result, _) in loaded.items() if result is not None}
    found: dict = {
        "simulation": ("simulation", list(READS)),
        "state": ("simulation", [state for _, state in loaded.values()]),
    }
    for name, curves in CURVES.items():
        for model, curve in (curves(saved[name]) if name in saved else {}).items():
            found[model] = {
                key: (f"at_{model}", value) if np.ndim(value) else value for key, value in curve.items()
            }
    if "landscape" in saved:
        found["origin"] = _origins(saved["landscape"])
    if "depth" in saved:
        found["barrier"] = _barriers(saved["depth"])
    if "sgd" in saved:
        found["noise"] = _of_sgd(saved["sgd"])
    return found


def _needs(saved: Saved, *experiments: str) -> str:
    """The results that are not there, of those that a claim is read off."""
    states = dict(zip(saved["simulation"], saved["state"], strict=True))
    names = [f"collapse.{experiment}" for experiment in experiments]
    lacking = [f"{name} ({states[name]})" for name in names if states[name] in LACKING]
    return f"saved results of {', '.join(lacking)}" if lacking else ""


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """The three columns of the slide, as far as there are results."""
    yield _of_the_origin(saved)
    yield _of_deeper_models(saved)
    yield _of_noise(saved)
    yield quoted(
        "any-model",
        "Collapse by SGD should occur in any model, says the slide, with a question mark",
        SLIDE,
        needs="exponents of models other than that of one neuron",
    )


def _of_the_origin(saved: Saved) -> Claim:
    if needs := _needs(saved, "two_layer", "vae", "ssl", "landscape"):
        return quoted("origin", ORIGIN, SLIDE, needs=needs)
    return stated(
        "origin",
        ORIGIN,
        SLIDE,
        *(
            equals(
                f"{model.replace('_', ' ')}: strength at which zero is stable, over that of collapse",
                saved[f"origin/{model}"],
                1,
                0.1,
                why="weights are those of training on drawn samples",
            )
            for model in LANDSCAPE
        ),
        *(
            equals(
                f"{model.replace('_', ' ')}: exponent of the squared order parameter",
                saved[f"{model}/exponent"],
                1,
                0.15,
                why="the law is asymptotic, and read off where up to a quarter of the strength is missing",
            )
            for model in LANDSCAPE
        ),
    )


def _of_deeper_models(saved: Saved) -> Claim:
    if needs := _needs(saved, "depth"):
        return quoted("deeper", DEEPER, SLIDE, needs=needs)
    trapped, below = saved["barrier/trapped"], saved["barrier/strength"] < 1
    return stated(
        "deeper",
        DEEPER,
        SLIDE,
        *(
            at_most(
                f"{model.replace('_', ' ')}: exponent of the squared order parameter",
                abs(saved[f"{model}/exponent"]),
                0.15,
                why="a jump has none, and what is left below it varies smoothly",
            )
            for model in DEEP
        ),
        every(
            "strengths below the critical one at which zero keeps some of the starts", trapped[:, below] > 0
        ),
        every("and the other minimum keeps some", trapped[:, below] < 1),
        at_least(
            "least strength to which the other minimum lasts, over the critical one",
            np.min(saved["barrier/outlives"]),
            1.1,
            why="4^(-D/(D+1)) (D + 1) is 1.19 at two hidden layers",
        ),
    )


def _of_noise(saved: Saved) -> Claim:
    if needs := _needs(saved, "sgd"):
        return quoted("sgd", SGD, SLIDE, needs=needs)
    rate, single, many = (saved[f"noise/{name}"] for name in ("rate", "batch_1", "batch_16"))
    why = "the spread over chains, and passages close to zero"
    return stated(
        "sgd",
        SGD,
        SLIDE,
        at_least(
            "single samples, above their threshold: least fraction", single[rate > 1.1].min(), 0.9, why=why
        ),
        at_most("half of it: fraction", single[rate <= 0.5].max(), 0.05, why=why),
        at_most("batches of 16, at all those rates: largest fraction", many.max(), 0.05, why=why),
    )


def figure(config: Config, saved: Saved) -> Figure:
    """The square of the order parameter by kind of collapse, and which results there are."""
    drawn, ((origin, deep), (sgd, table)) = plotting.new_figure(2, 2, width=4.6)
    _curves(origin, saved, LANDSCAPE, "zero turns stable")
    _curves(deep, saved, DEEP, "more layers: a jump")
    _fractions(sgd, saved)
    _kinds(table, saved)
    return drawn


def _curves(ax: Axes, saved: Saved, models: tuple[str, ...], title: str) -> None:
    """The squared order parameters of some models, over the strength."""
    there = [model for model in models if f"{model}/share" in saved.arrays]
    if not there:
        return _leave_empty(ax, title)
    for model in there:
        label = f"{model.replace('_', ' ')}: {saved[f'{model}/exponent']:.2f}"
        ax.plot(saved[f"{model}/share"], saved[f"{model}/size"], label=label)
    ax.axvline(1, ymax=0.65, color="grey", lw=0.8)
    legend = {"loc": "upper right", "title": "exponent at collapse"}
    labels = "strength over that of collapse", "squared order parameter"
    plotting.finish(ax, title, *labels, legend, xlim=(0, 1.4), ylim=(0, 1.3))


def _leave_empty(ax: Axes, title: str) -> None:
    """A panel for which there are no results."""
    ax.set_axis_off()
    ax.text(0.5, 0.5, f"{title}:\nno results to draw", ha="center", va="center", transform=ax.transAxes)


def _fractions(ax: Axes, saved: Saved) -> None:
    """How many chains of SGD end at zero, by learning rate and batch."""
    title = "SGD: large rates, small batches"
    if "noise/rate" not in saved.arrays:
        return _leave_empty(ax, title)
    for batch in (1, 16):
        ax.plot(saved["noise/rate"], saved[f"noise/batch_{batch}"], "o-", label=f"batches of {batch}")
    ax.axvline(1, color="grey", lw=0.8)
    labels = "learning rate over that of collapse", "fraction of chains at zero"
    plotting.finish(ax, title, *labels, "center right", ylim=(-0.05, 1.05))


def _kinds(ax: Axes, saved: Saved) -> None:
    """The slide's table, by model, with the results that it was read off."""
    states = dict(zip(saved["simulation"], saved["state"], strict=True))
    rows = []
    for model, (experiment, kind) in KINDS.items():
        state = states[f"collapse.{experiment}"]
        text = f"collapse.{experiment}: {state}" if state in LACKING else kind
        rows.append((model.replace("_", " "), LACKING_COLOR if state in LACKING else COLORS[kind], text))
    ax.barh(range(len(rows)), 1, height=0.9, color=[color for _, color, _ in rows])
    for row, (_, _, text) in enumerate(rows):
        ax.text(0.5, row, text, ha="center", va="center")
    ax.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    ax.invert_yaxis()
    read = ", ".join(sorted({state for state in states.values() if state not in LACKING})) or "nothing"
    plotting.finish(ax, "Why zero attracts", f"read: {read}", "model", xticks=[], xlim=(0, 1))
    ax.grid(visible=False)
