"""Prompt attention with a teacher near the simplex boundary: gradient descent slows down, Adam much less.

A teacher of a prescribed mean ratio of largest to smallest attention labels random tokens. With fewer
dimensions than samples a student must find the teacher's ratio, and the Gauss-Newton matrix at the teacher
sets the speed of gradient descent; with more dimensions it fits at a linear rate and stays far from the
boundary, as the over-parametrized theorem has it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.stats import gmean

from models.attention import students
from models.attention.students import LOCAL, Runs, Task
from models.optimizers import adam, descent, normalized_descent, sign_descent
from models.training import record_steps
from sims import plotting
from sims.claims import Claim, Preset, at_least, at_most, every, qualified, quoted, slope, stated
from sims.compare import Fit, convergence_order, fit_line, largest
from sims.ranges import Count, Length, Positive, Range, Share, check_ranges
from sims.results import Context, Saved

Ratio = Annotated[float, Range(above=1)]
Rates = Annotated[tuple[Positive, ...], Length(1)]
# The runs whose iterations count, from the standard start and from near the teacher.
COUNTED = ("gd", "gd_local", "adam", "adam_local")


@dataclass(frozen=True)
class Config:
    """Data, optimizers and sizes of the runs."""

    samples: Count = 100
    """Number of samples N."""
    dim: Count = 20
    """Token dimension d and tokens per sample of the under-parametrized runs."""
    ratios: tuple[Ratio, Ratio] = (10.0, 1e25)
    """The teachers' mean ratio of largest to smallest attention: far from the boundary and near it."""
    noise: Positive = 0.1
    """Relative size of the noise that the local initialization adds to the teacher."""
    seeds: Count = 1
    """Seeds of the runs with a frozen value, and of the over-parametrized ones."""
    target: Share = 1e-10
    """Relative loss up to which iterations are counted."""
    every: Count = 20
    """Steps between two records."""
    steps: Count = 8000
    """Steps of gradient descent."""
    fast_steps: Count = 3000
    """Steps of the other optimizers."""
    rate_multiples: Rates = (0.5, 1.0)
    """Gradient descent: rates in units of 2 / (smallest + largest Gauss-Newton eigenvalue at the teacher)."""
    momentum: Annotated[float, Range(at_least=0, below=1)] = 0.9
    """Momentum of the heavy ball."""
    momentum_multiples: Rates = (0.2, 0.4)
    """Heavy ball: rates in the same units."""
    adam_rates: Rates = (0.03, 0.1, 0.3)
    """Learning rates of Adam."""
    normalized_rates: Rates = (3e-3,)
    """Constant learning rates of normalized gradient descent."""
    sign_rates: Rates = (5e-4, 1e-3, 2e-3, 4e-3)
    """Constant learning rates of sign descent."""
    decaying_rates: Rates = (0.1, 0.3)
    """First learning rates of normalized and sign descent where the rate decays."""
    decay: Share = 1e-8
    """Last over first of the decaying learning rates."""
    joint_seeds: Count = 4
    """Seeds of the runs that also train the value."""
    joint_steps: Count = 2000
    """Steps of the runs that also train the value."""
    joint_multiple: Positive = 0.5
    """Learning rate of gradient descent there, in its units."""
    joint_adam_rate: Positive = 0.03
    """Learning rate of Adam there."""
    wide_dims: Annotated[tuple[Count, ...], Length(1)] = (150,)
    """Token dimensions d, also tokens per sample, of the over-parametrized runs; more than samples."""
    wide_ratios: Annotated[tuple[Ratio, ...], Length(1)] = (1e25,)
    """Ratios of the over-parametrized runs' teachers; the claims are about the last."""
    wide_rates: Rates = (0.15,)
    """Learning rates of the over-parametrized runs, one for each dimension."""
    wide_steps: Count = 750
    """Steps of the over-parametrized runs."""
    wide_dtype: Literal["float32", "float64"] = "float32"
    """Floating dtype of the over-parametrized runs."""
    small_seeds: Count = 32
    """Instances to which the over-parametrized theorem applies."""
    small_steps: Count = 1000
    """Steps of the runs on them."""

    def __post_init__(self):
        check_ranges(self)
        if len(set(self.sign_rates)) < 2:
            raise ValueError(f"sign_rates must be at least two different rates, got {self.sign_rates}")
        if len(self.wide_rates) != len(self.wide_dims):
            raise ValueError(
                f"wide_rates must be as many as wide_dims, {len(self.wide_dims)}, got {self.wide_rates}"
            )


_STANDARD = Config(
    seeds=3,
    steps=16000,
    fast_steps=6000,
    momentum_multiples=(0.1, 0.2, 0.4, 0.8),
    adam_rates=(0.003, 0.01, 0.03, 0.1, 0.3),
    normalized_rates=(3e-4, 1e-3, 3e-3, 1e-2),
    decaying_rates=(0.03, 0.1, 0.3, 1.0),
    joint_seeds=6,
    joint_steps=6000,
    wide_dims=(150, 400),
    wide_rates=(0.15, 0.1),
    wide_ratios=(10.0, 1e25),
)
PRESETS: dict[Preset, Config] = {
    "quick": Config(),
    "standard": _STANDARD,
    "paper": replace(
        _STANDARD,
        seeds=10,
        steps=50000,
        fast_steps=10000,
        joint_seeds=10,
    ),
}


def _fastest(spectrum: np.ndarray, multiples: Rates) -> np.ndarray:
    """Multiples of the rate at which gradient descent is fastest on a quadratic with this spectrum."""
    return np.multiply.outer(2 / (spectrum[..., 0] + spectrum[..., -1]), np.asarray(multiples))


def _narrow(config: Config, context: Context, key: jax.Array) -> dict[str, Any]:
    """All runs with fewer dimensions than samples, and the Gauss-Newton spectra at the teachers."""
    context.progress("teachers", 0.0)
    all_seeds, size, every = max(config.seeds, config.joint_seeds), (config.samples, config.dim), config.every
    made = students.make_tasks(key, all_seeds, np.asarray(config.ratios), *size, config.noise)
    tasks, spectra = jax.device_get(made)
    task, spectrum = jax.tree.map(lambda leaf: leaf[: config.seeds], (tasks, spectra["frozen"]))
    context.progress("gradient descent", 0.2)
    rates = _fastest(spectrum, config.rate_multiples)
    table = {"gd": Runs(descent, rates), "gd_local": Runs(descent, rates, start=LOCAL)}
    runs = students.train_all(task, table, config.steps, every)
    context.progress("other optimizers", 0.35)
    decaying = config.decaying_rates, config.decay
    table = {
        "heavy_ball": Runs(descent, _fastest(spectrum, config.momentum_multiples), config.momentum),
        "adam": Runs(adam, config.adam_rates),
        "adam_local": Runs(adam, config.adam_rates, start=LOCAL),
        "normalized": Runs(normalized_descent, config.normalized_rates, 1.0),
        "normalized_decaying": Runs(normalized_descent, *decaying),
        "sign": Runs(sign_descent, config.sign_rates, 1.0),
        "sign_decaying": Runs(sign_descent, *decaying),
    }
    runs |= students.train_all(task, table, config.fast_steps, every)
    context.progress("training the value too", 0.5)
    table = {
        "gd": Runs(descent, _fastest(spectra["joint"], (config.joint_multiple,))),
        "adam": Runs(adam, (config.joint_adam_rate,)),
        "adam_local": Runs(adam, (config.joint_adam_rate,), start=LOCAL),
    }
    joint = students.train_all(tasks, table, config.joint_steps, every, joint=True)
    best = {name: students.best_rate(ys, config.target, every) for name, ys in runs.items()}
    dims = {name: f"seed ratio {'gd' if 'gd' in name else 'fast'}_step" for name in best}
    # Sign descent runs in a cycle in the last quarter.
    cycle = runs["sign"]["loss"][:, 0, :, -len(record_steps(config.fast_steps, every)) // 4 :]
    return {
        "loss": {name: (dims[name], ys["loss"]) for name, ys in best.items() if name != "adam_local"},
        "log10_ratio": {name: (dims[name], best[name]["log10_ratio"]) for name in ("gd", "adam")},
        "iterations": ("seed ratio", {name: best[name]["iterations"] for name in COUNTED}),
        "local_rate": ("seed ratio", best["gd_local"]["rate"]),
        "joint": {
            name: ("joint_seed ratio joint_step", ys["log10_ratio"][:, :, 0]) for name, ys in joint.items()
        },
        "spectrum": ("seed ratio weight", spectrum),
        "at_teacher": ("joint_seed ratio", {kind: ys[..., 0] / ys[..., -1] for kind, ys in spectra.items()}),
        "sign_floor": ("seed sign_rate", np.exp(np.mean(np.log(cycle), axis=-1))),
        **_conditions(task, best, config),
    }


def _conditions(task: Task, best: dict, config: Config) -> dict[str, Any]:
    """Condition numbers of the Gauss-Newton matrix in p along the runs from the standard start."""
    steps, prompts = {}, []
    for name, count in (("gd", config.steps), ("adam", config.fast_steps)):
        every_step = record_steps(count, config.every)
        # These are about 25 records, evenly spaced in the logarithm.
        marks = np.unique(np.append(0, np.geomspace(1, len(every_step) - 1, 25).astype(int)))
        steps[name] = every_step[marks]
        prompts.append(best[name]["prompt"][:, :, marks])
    prompts = np.concatenate(prompts, axis=2)
    values = np.asarray(students.condition_numbers(task.tokens, task.value, prompts))
    gd, adam = np.split(values, [len(steps["gd"])], axis=2)
    return {
        "gd_mark": ("gd_mark", steps["gd"]),
        "adam_mark": ("adam_mark", steps["adam"]),
        "condition": {"gd": ("seed ratio gd_mark", gd), "adam": ("seed ratio adam_mark", adam)},
    }


def run(config: Config, context: Context) -> dict:
    """Train everything, and pick the best learning rates."""
    k_tasks, k_wide, k_small = jax.random.split(jax.random.key(context.seed), 3)
    ratios, dtype = np.asarray(config.wide_ratios), config.wide_dtype

    def train_wide(dim, rate):
        sizes, length = (config.samples, dim, dtype), (config.wide_steps, config.every)
        return students.train_wide(k_wide, config.seeds, ratios, np.asarray(rate, dtype), *sizes, *length)

    # Half of the time goes into compiling: programs that wait for no other compile and run beside them.
    with ThreadPoolExecutor(1) as aside:
        wide = aside.map(train_wide, config.wide_dims, config.wide_rates)
        small = aside.submit(students.train_small, k_small, config.small_seeds, config.small_steps)
        narrow = _narrow(config, context, k_tasks)
        context.progress("over-parametrized", 0.8)
        wide = jax.tree.map(lambda *leaves: np.stack(leaves), *wide)
        small = jax.device_get(small.result())
    moved = small["displacement"] / small["displacement_bound"][:, None]
    curves = {name: small[name] for name in ("mu_t", "loss", "loss_bound", "sigma")}
    lengths = (config.steps, config.fast_steps, config.joint_steps, config.wide_steps)
    steps = dict(zip(("gd_step", "fast_step", "joint_step", "wide_step"), lengths, strict=True))
    return {
        **{name: (name, record_steps(count, config.every)) for name, count in steps.items()},
        "ratio": ("ratio", np.array(config.ratios)),
        "sign_rate": ("sign_rate", np.array(config.sign_rates)),
        "wide_dim": ("wide_dim", np.array(config.wide_dims)),
        "wide_ratio": ("wide_ratio", ratios),
        **narrow,
        "wide": ("wide_dim seed wide_ratio wide_step", wide),
        "small": ("instance record", curves | {"moved": moved}),
    }


def claims(config: Config, saved: Saved) -> Iterator[Claim]:
    """What the talk's figure shows, and the theorem on over-parametrized attention."""
    yield _wide(saved)
    yield _same_ratio(saved)
    yield from _speeds(config, saved)
    yield _late_rate(saved)
    yield _conditioning(saved)
    yield _sign(saved)
    yield _theorem(saved)
    yield quoted(
        "background",
        "SGD trains real Transformers poorly beside Adam: on language and images, and with full batches",
        "softmax2025talk, introduction",
        needs="Transformers on language and on images, with full batches as well, each with both optimizers",
    )


def _late_line(steps: np.ndarray, losses: np.ndarray) -> Fit:
    """The line through the log loss from a tenth of the first on; before, the attention itself moves."""
    late = slice(np.argmax(losses < 0.1 * losses[0]), None)
    return fit_line(steps[late], np.log(losses[late]))


def _wide(saved: Saved) -> Claim:
    # The claim is about the last ratio, at every dimension and seed.
    losses, prompts, ratios = (saved[f"wide/{name}"][:, :, -1] for name in ("loss", "prompt", "log10_ratio"))
    steps, fall = saved["wide_step"], np.min(losses[..., 0] / losses[..., -1])
    straight = np.min([_late_line(steps, loss).r2 for loss in losses.reshape(-1, len(steps))])
    bends, third = "several directions take part at first", "a third of the teacher's decades"
    dims = " and ".join(str(dim) for dim in saved["wide_dim"])
    return stated(
        "over-parametrized",
        f"Over-parametrized, at d = n = {dims}, the loss falls at a linear rate, the prompt stays bounded, "
        "and the ratio ends far below the teacher's",
        "softmax2025talk, experiments",
        at_least("R^2 of a straight line through the log loss", straight, 0.98, why=bends),
        at_least("fall of the loss", fall, 1e4, why="a rate is seen over four decades"),
        at_most("longest prompt on the way", prompts.max(), 4, why="the start has length 1, the teacher 9"),
        at_most("log10 of the ratio at the end", ratios[..., -1].max(), 8, why=third),
    )


def _same_ratio(saved: Saved) -> Claim:
    decades = np.log10(saved["ratio"])
    small, large = np.max(np.abs(saved["log10_ratio/gd"][..., -1] - decades), axis=0)
    joint = {name: largest(ratios[:, -1, -1] - decades[-1]) for name, ratios in saved["joint"].items()}
    local = "decades off, value trained, local start, large ratio, Adam"
    standard = "decades off, value trained, standard start, large ratio"
    same, other = "the same order of magnitude: half a decade", "another one: a whole decade"
    return qualified(
        "same-ratio",
        "Under-parametrized, training ends at a ratio of the teacher's order of magnitude, if the value is "
        "frozen or the start is near the teacher",
        "softmax2025talk, experiments",
        condition="the value is frozen or the start is local",
        inside=[
            at_most("decades off, value frozen, small ratio", small, 0.5, why=same),
            at_most("decades off, value frozen, large ratio", large, 0.5, why=same),
            at_most(local, joint["adam_local"], 0.5, why=same),
        ],
        outside=[
            at_least(standard, joint["gd"], 1, why=other),
            at_least("the same with Adam", joint["adam"], 1, why=other),
        ],
    )


def _speeds(config: Config, saved: Mapping[str, np.ndarray] | Saved) -> Iterator[Claim]:
    # A run of gradient descent that never reaches the target counts with all its steps, which understates
    # the slowdown.
    counts = {name: saved[f"iterations/{name}"] for name in COUNTED}
    counts |= {name: np.minimum(counts[name], config.steps) for name in ("gd", "gd_local")}
    well, best = "well: an eighth of its steps", "the best first-order method slows down 7 times"
    half, less = "less affected: by half at least", "less affected means exactly this"
    slow, adam = [], []
    for start, suffix in (("standard start", ""), ("local start", "_local")):
        gd, other = counts[f"gd{suffix}"], counts[f"adam{suffix}"]
        (small, large), adam_large = gmean(gd, axis=0), gmean(other[:, -1])
        quotient = gmean(other[:, -1] / gd[:, -1])
        slowdown = gmean(other[:, -1] / other[:, 0]) / gmean(gd[:, -1] / gd[:, 0])
        to_target = f"{start}: iterations to {config.target:g}"
        slow += [
            at_most(f"{to_target}, small ratio", small, config.steps / 8, why=well),
            # That one slows down by the root of the growth in conditioning.
            at_least(f"{start}: large ratio over small ratio", large / small, 8, why=best),
        ]
        label = f"{start}: slowdown from the small to the large ratio over gradient descent's"
        adam += [
            at_most(f"{to_target}, large ratio", adam_large, config.fast_steps, why="the target is reached"),
            at_most(f"{start}: the same over gradient descent's", quotient, 0.5, why=half),
            at_most(label, slowdown, 1, why=less),
        ]
    yield stated(
        "gd-slow",
        "Gradient descent does well for a small ratio and struggles for a large one",
        "softmax2025talk, experiments",
        *slow,
    )
    yield stated(
        "adam",
        "Adam is less affected by a large ratio",
        "softmax2025talk, introduction and questions",
        *adam,
    )


def _late_rate(saved: Saved) -> Claim:
    losses, rates, spectrum = saved["loss/gd_local"], saved["local_rate"], saved["spectrum"]
    predicted = 1 - np.max((1 - rates[..., None] * spectrum) ** 2, axis=-1)
    measured = np.zeros(predicted.shape)
    for lane in np.ndindex(*measured.shape):
        loss = losses[lane]
        # What counts is the last third of the way to 1e-22 of the first loss, where rounding is far off.
        end = np.argmax(np.append(loss, 0) < 1e-22 * loss[0])
        late = slice(2 * end // 3, end)
        measured[lane] = 1 - np.exp(fit_line(saved["gd_step"][late], np.log(loss[late])).slope)
    small, large = np.max(np.abs(measured / predicted - 1), axis=0)
    label = "loss lost per step, relative error of the prediction, small ratio"
    second = "the second slowest direction is not quite gone"
    return stated(
        "late-rate",
        "The conditioning at the solution sets the speed of gradient descent: in the end a step multiplies "
        "the loss by max (1 - rate * eigenvalue)^2 over the Gauss-Newton spectrum",
        "softmax2025talk, experiments (derived here: the rate in numbers)",
        at_most(label, small, 0.01, why=second),
        at_most("the same, large ratio", large, 0.01, why=second),
    )


def _conditioning(saved: Saved) -> Claim:
    decades = {
        kind: np.log10(condition[:, 1] / condition[:, 0])
        for kind in ("frozen", "joint")
        for condition in (saved[f"at_teacher/{kind}"],)
    }
    frozen, joint = (np.mean(grown) for grown in decades.values())
    square, severe = 2 * np.log10(saved["ratio"][1] / saved["ratio"][0]), "an order of magnitude, severe"
    seeds = "seeds where it is worse at the large ratio"
    return stated(
        "conditioning",
        "Near the boundary of the simplex the problem is severely ill-conditioned; here the condition number "
        f"grows by {frozen:.1f} decades with the value frozen and by {joint:.1f} with it trained, where the "
        f"bound of the theorem, which is on the attention of one sample, grows by {square:.0f}",
        "softmax2025talk, theorem (condition number) and experiments (derived here: the growth in numbers)",
        every(f"{seeds}, value frozen", decades["frozen"] > 0),
        every(f"{seeds}, value trained", decades["joint"] > 0),
        at_least("decades of condition number, value frozen", frozen, 1, why=severe),
        at_least("decades of condition number, value trained", joint, 1, why=severe),
    )


def _sign(saved: Saved) -> Claim:
    floors, decayed = saved["sign_floor"], saved["loss/sign_decaying"][:, 0, -1]
    order = np.mean([convergence_order(saved["sign_rate"], floor).slope for floor in floors])
    over_floor, far = np.max(decayed / np.min(floors, axis=-1)), "far above the square of eight orders"
    scatter = "cycles scatter the floor twofold, the slope by a third"
    return qualified(
        "sign-descent",
        "Sign descent, to which the talk likens Adam, converges for a small ratio if its rate decays; at a "
        "constant rate it stalls at a floor that falls like the square of the rate",
        "softmax2025talk, questions (derived here: the floor and its order)",
        condition="its learning rate decays",
        inside=[at_most("last loss with a decaying rate over the lowest floor", over_floor, 1e-2, why=far)],
        # A step is as long as the rate in every coordinate, and the loss is quadratic in them.
        outside=[slope("order of the floor in a constant rate", order, 2, 0.5, why=scatter)],
    )


def _theorem(saved: Saved) -> Claim:
    loss = saved["small/loss"] / saved["small/loss_bound"]
    moved = saved["small/moved"].max()
    label = f"largest loss over its bound, after the start, {len(loss)} instances"
    # The theorem is about gradient flow; the runs are gradient descent at a small rate h, which is no
    # slower: a step takes (1 - h k)^2 <= exp(-2 h k), and the flow exp(-2 h k), up to the path's curvature.
    exact = "a theorem leaves no tolerance"
    return stated(
        "theorem",
        "Where d >= N and the first residual is small, the loss stays below exp(-2 mu t) of the first, and "
        "the parameters stay in a ball; the instances satisfy the hypothesis by construction",
        "softmax2025talk, over-parametrized theorem (constants derived anew)",
        at_most(label, np.max(loss[:, 1:]), 1, why=exact),
        at_most("largest displacement over its bound", moved, 1, why=exact),
        at_least("smallest singular value over its first", saved["small/sigma"].min(), 0.5, why=exact),
    )


LOOKS: dict[str, tuple[str, dict[str, Any]]] = {
    "gd": ("gradient descent", {"color": "C0", "linewidth": 2.2}),
    "heavy_ball": ("heavy ball", {"color": "C5"}),
    "adam": ("Adam", {"color": "C1", "linewidth": 2.2, "zorder": 1.8}),
    "normalized": ("normalized, constant", {"color": "C2", "linestyle": ":"}),
    "normalized_decaying": ("normalized, decaying", {"color": "C2"}),
    "sign": ("sign, constant", {"color": "C3", "linestyle": ":"}),
    "sign_decaying": ("sign, decaying", {"color": "C3"}),
}


def figure(config: Config, saved: Saved) -> Figure:
    """The talk's figure, loss and ratio over iterations; with it the condition number and the theorem."""
    drawn, axes = plotting.new_figure(2, 3, width=3.75, height=3.3)
    (few, many, wide), (ratios, condition, theorem) = axes
    for index, (ax, ratio) in enumerate(zip((few, many), config.ratios, strict=True)):
        for name, (label, look) in LOOKS.items():
            ax.loglog(_steps(saved, name)[1:], saved[f"loss/{name}"][0, index, 1:], label=label, **look)
        title = f"d < N, v frozen, teacher's ratio {_power(ratio)}"
        plotting.finish(ax, title, "iterations", "loss", ylim=(1e-34, 10))
    many.legend(loc="lower left", handlelength=1.4, borderaxespad=0.2)

    _draw_wide(wide, config, saved)
    _ratios(ratios, config, saved)
    _conditions_over_time(condition, config, saved)
    mu_t, losses, bound = (saved[f"small/{name}"][0] for name in ("mu_t", "loss", "loss_bound"))
    theorem.semilogy(mu_t, losses, color="C4", label="gradient descent", **plotting.TRAINED)
    theorem.semilogy(mu_t, bound, label="bound exp(-2 mu t)", **plotting.THEORY)
    title = "The theorem at N = n = 3, d = 12"
    plotting.finish(theorem, title, "mu × time", "loss over its first value", "center right")
    return drawn


def _steps(saved: Saved, name: str) -> np.ndarray:
    return saved["gd_step" if name == "gd" else "fast_step"]


def _draw_wide(ax: Axes, config: Config, saved: Saved) -> None:
    steps, shades = saved["wide_step"], (("C4", "C5"), ("C2", "C6"))
    for dim, losses, colors in zip(config.wide_dims, saved["wide/loss"][:, 0], shades, strict=False):
        for ratio, loss, color in zip(config.wide_ratios[::-1], losses[::-1], colors, strict=False):
            label = f"d = {dim}, teacher's ratio {_power(ratio)}"
            ax.semilogy(steps, loss, color=color, label=label, **plotting.TRAINED)
        line = _late_line(steps, losses[-1])
        ax.semilogy(steps, np.exp(line.intercept + line.slope * steps), **plotting.THEORY)
    ax.plot([], [], label="straight line", **plotting.THEORY)
    plotting.finish(ax, "d > N, v trained too", "iterations", "loss", {"fontsize": 7.5})
    plotting.make_room(ax, above=0.35)


DOTS = (0, (1, 1))
COLUMNS = {"loc": "upper left", "ncols": 2, "columnspacing": 1.0}


def _ratios(ax: Axes, config: Config, saved: Saved) -> None:
    for index, teacher in enumerate(config.ratios):
        for name in ("gd", "adam"):
            label, look = LOOKS[name]
            ratio = saved[f"log10_ratio/{name}"][0, index, 1:]
            ax.semilogx(_steps(saved, name)[1:], ratio, label=label if index else None, **look)
        ax.axhline(np.log10(teacher), **plotting.THEORY)
    for name in ("gd", "adam"):
        ratio, look = saved[f"joint/{name}"][0, -1, 1:], {**LOOKS[name][1], "linestyle": DOTS}
        ax.semilogx(saved["joint_step"][1:], ratio, **look)
    ax.plot([], [], color="0.3", linestyle=DOTS, label="the same, v trained")
    label = f"d = {config.wide_dims[0]}"
    ax.semilogx(saved["wide_step"][1:], saved["wide/log10_ratio"][0, 0, -1, 1:], color="C4", label=label)
    ax.plot([], [], label="teacher", **plotting.THEORY)
    title, ylabel = "Ratio: the teacher's, if v is frozen", "log10 of mean max / min attention"
    plotting.finish(ax, title, "iterations", ylabel)
    plotting.make_room(ax, above=0.35)
    ax.legend(**COLUMNS)


def _conditions_over_time(ax: Axes, config: Config, saved: Saved) -> None:
    for index, teacher in enumerate(config.ratios):
        for name in ("gd", "adam"):
            label, look = LOOKS[name]
            steps, values = saved[f"{name}_mark"][1:], saved[f"condition/{name}"][0, index, 1:]
            ax.loglog(steps, values, label=label if index else None, **look)
        at_teacher = saved["at_teacher/frozen"][0, index]
        ax.axhline(at_teacher, **plotting.THEORY)
        place, corner = (config.steps, 0.85 * at_teacher), {"va": "top", "ha": "right", "fontsize": 8.5}
        ax.text(*place, f"teacher's ratio {_power(teacher)}", **corner)
    ax.plot([], [], label="at the teacher", **plotting.THEORY)
    plotting.finish(ax, "Gauss-Newton matrix of p, v frozen", "iterations", "condition number")
    plotting.make_room(ax, above=0.25, below=0.15)
    ax.legend(**COLUMNS)


def _power(ratio: float) -> str:
    return f"$10^{{{np.log10(ratio):.0f}}}$" if ratio > 100 else f"{ratio:g}"
