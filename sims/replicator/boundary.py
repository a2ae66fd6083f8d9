"""Prompt attention with a teacher near the simplex boundary: gradient descent slows down, Adam much less.

A teacher of a prescribed mean ratio of largest to smallest attention labels random tokens. With fewer
dimensions than samples a student must find the teacher's ratio, and the Gauss-Newton matrix at the teacher
sets the speed of gradient descent; with more dimensions it fits at a linear rate and stays far from the
boundary, as the over-parametrized theorem has it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import gmean

from models.attention.students import (
    LOCAL,
    STANDARD,
    Lanes,
    Task,
    condition_number,
    condition_numbers,
    make_tasks,
    train_lanes,
    train_small,
    train_wide,
)
from models.optimizers import adam, descent, normalized_descent, sign_descent
from models.training import record_steps
from sims import plotting
from sims.claims import Check, Claim, Preset
from sims.compare import convergence_order, fit_line
from sims.results import Context, Result, Saved


@dataclass(frozen=True)
class Config:
    """Data, optimizers and sizes of the runs."""

    samples: int = 100
    """Number of samples N."""
    dim: int = 20
    """Token dimension d and tokens per sample of the under-parametrized runs."""
    ratios: tuple[float, float] = (10.0, 1e25)
    """The teachers' mean ratio of largest to smallest attention: far from the boundary and near it."""
    noise: float = 0.1
    """Relative size of the noise that the local initialization adds to the teacher."""
    seeds: int = 1
    """Seeds of the runs with a frozen value, and of the over-parametrized ones."""
    target: float = 1e-10
    """Relative loss up to which iterations are counted."""
    every: int = 20
    """Steps between two records."""
    steps: int = 8000
    """Steps of gradient descent."""
    fast_steps: int = 3000
    """Steps of the other optimizers."""
    rate_multiples: tuple[float, ...] = (0.5, 1.0)
    """Gradient descent: rates in units of 2 / (smallest + largest Gauss-Newton eigenvalue at the teacher)."""
    momentum: float = 0.9
    """Momentum of the heavy ball."""
    momentum_multiples: tuple[float, ...] = (0.2, 0.4)
    """Heavy ball: rates in the same units."""
    adam_rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    """Learning rates of Adam."""
    normalized_rates: tuple[float, ...] = (3e-3,)
    """Constant learning rates of normalized gradient descent."""
    sign_rates: tuple[float, ...] = (5e-4, 1e-3, 2e-3, 4e-3)
    """Constant learning rates of sign descent."""
    decaying_rates: tuple[float, ...] = (0.1, 0.3)
    """First learning rates of normalized and sign descent where the rate decays."""
    decay: float = 1e-8
    """Last over first of the decaying learning rates."""
    joint_seeds: int = 4
    """Seeds of the runs that also train the value."""
    joint_steps: int = 2000
    """Steps of the runs that also train the value."""
    joint_multiple: float = 0.5
    """Learning rate of gradient descent there, in its units."""
    joint_adam_rate: float = 0.03
    """Learning rate of Adam there."""
    wide_dims: tuple[int, ...] = (150,)
    """Token dimensions d, also tokens per sample, of the over-parametrized runs; more than samples. The
    first one is drawn."""
    wide_ratios: tuple[float, ...] = (1e25,)
    """Ratios of the over-parametrized runs' teachers; the claims are about the last."""
    wide_rates: tuple[float, ...] = (0.15,)
    """Learning rates of the over-parametrized runs, one for each dimension."""
    wide_steps: int = 750
    """Steps of the over-parametrized runs."""
    wide_dtype: str = "float32"
    """Floating dtype of the over-parametrized runs."""
    small_seeds: int = 32
    """Instances to which the over-parametrized theorem applies."""
    small_steps: int = 1000
    """Steps of the runs on them."""

    def __post_init__(self):
        if len(set(self.sign_rates)) < 2:
            raise ValueError(f"sign_rates must be at least two different rates, got {self.sign_rates}")
        if len(self.wide_rates) != len(self.wide_dims):
            raise ValueError(
                f"wide_rates must be as many as wide_dims, {len(self.wide_dims)}, got {self.wide_rates}"
            )


_QUICK = Config()
_STANDARD = replace(
    _QUICK,
    seeds=3,
    steps=16000,
    fast_steps=6000,
    momentum_multiples=(0.1, 0.2, 0.4, 0.8),
    adam_rates=(0.003, 0.01, 0.03, 0.1, 0.3),
    normalized_rates=(3e-4, 1e-3, 3e-3, 1e-2),
    decaying_rates=(0.03, 0.1, 0.3, 1.0),
    joint_seeds=6,
    joint_steps=6000,
    wide_ratios=(10.0, 1e25),
)
PRESETS: dict[Preset, Config] = {
    "quick": _QUICK,
    "standard": _STANDARD,
    "paper": replace(
        _STANDARD,
        seeds=10,
        steps=50000,
        fast_steps=10000,
        joint_seeds=10,
        wide_dims=(150, 400),
        wide_rates=(0.15, 0.1),
    ),
}


def _run_lanes(config: Config, task: Task, table, steps, joint=False) -> dict[str, dict[str, np.ndarray]]:
    """Train a table of (name, optimizer, rates, second number, starts) at every ratio, in one program.

    The rates have shape (rate,), or (seed, ratio, rate). By name come the records, of shape
    (seed, ratio, start, rate, record, ...), and the rates.
    """
    families = tuple(dict.fromkeys(family for _, family, *_ in table))
    parts, grids = [], {}
    for name, family, rates, second, starts in table:
        rates = np.asarray(rates, float)
        shape = (len(task.value), len(config.ratios), len(starts), rates.shape[-1])
        grid = np.broadcast_to(rates[:, :, None] if rates.ndim == 3 else rates, shape)
        _, ratio, start, _ = np.indices(shape)
        optimizer, second = np.full(shape, families.index(family)), np.full(shape, float(second))
        part = Lanes(optimizer, ratio, np.asarray(starts)[start], grid, second)
        parts.append(jax.tree.map(lambda leaf: leaf.reshape(len(leaf), -1), part))
        grids[name] = grid
    lanes = jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *parts)
    # Only the rates differ between seeds.
    lanes = Lanes(lanes.optimizer[0], lanes.ratio[0], lanes.start[0], lanes.rate, lanes.second[0])
    ys = jax.tree.map(np.asarray, train_lanes(task, lanes, families, joint, steps, config.every))
    ends = np.cumsum([grid[0].size for grid in grids.values()])
    pieces = {key: np.split(leaf, ends[:-1], axis=1) for key, leaf in ys.items()}
    return {
        name: {
            **{key: piece[i].reshape(*grid.shape, *piece[i].shape[2:]) for key, piece in pieces.items()},
            "rate": grid,
        }
        for i, (name, grid) in enumerate(grids.items())
    }


def _run_narrow(config: Config, context: Context, key):
    """All runs with fewer dimensions than samples: tasks, spectra at the teachers, runs by name."""
    context.progress("teachers", 0.0)
    all_seeds, size = max(config.seeds, config.joint_seeds), (config.samples, config.dim)
    made = make_tasks(key, all_seeds, np.asarray(config.ratios), *size, config.noise)
    tasks, spectra = jax.tree.map(np.asarray, made)
    task, spectrum = jax.tree.map(lambda leaf: leaf[: config.seeds], (tasks, spectra["frozen"]))

    def fastest(spectrum, multiples):
        """Multiples of the rate at which gradient descent is fastest on a quadratic with this spectrum."""
        return np.multiply.outer(2 / (spectrum[..., 0] + spectrum[..., -1]), np.asarray(multiples))

    context.progress("gradient descent", 0.2)
    both = (STANDARD, LOCAL)
    table = [("gd", descent, fastest(spectrum, config.rate_multiples), 0.0, both)]
    runs = _run_lanes(config, task, table, config.steps)
    context.progress("other optimizers", 0.35)
    momentum_rates = fastest(spectrum, config.momentum_multiples)
    table = [
        ("heavy_ball", descent, momentum_rates, config.momentum, (STANDARD,)),
        ("adam", adam, config.adam_rates, 0.0, both),
        ("normalized", normalized_descent, config.normalized_rates, 1.0, (STANDARD,)),
        ("normalized_decaying", normalized_descent, config.decaying_rates, config.decay, (STANDARD,)),
        ("sign", sign_descent, config.sign_rates, 1.0, (STANDARD,)),
        ("sign_decaying", sign_descent, config.decaying_rates, config.decay, (STANDARD,)),
    ]
    runs |= _run_lanes(config, task, table, config.fast_steps)
    context.progress("training the value too", 0.5)
    table = [
        ("gd", descent, fastest(spectra["joint"], (config.joint_multiple,)), 0.0, both),
        ("adam", adam, (config.joint_adam_rate,), 0.0, both),
    ]
    joint_runs = _run_lanes(config, tasks, table, config.joint_steps, joint=True)
    return task, spectra, runs, joint_runs


def run(config: Config, context: Context) -> Result:
    """Train everything, pick the best learning rates, and check the talk's statements."""
    k_tasks, k_wide, k_small = jax.random.split(jax.random.key(context.seed), 3)
    # Half of the time goes into compiling: programs that wait for no other compile and run beside them.
    with ThreadPoolExecutor(1) as aside:
        wide = [
            aside.submit(
                train_wide,
                k_wide,
                config.seeds,
                np.asarray(config.wide_ratios),
                np.asarray(rate, config.wide_dtype),
                config.samples,
                dim,
                config.wide_dtype,
                config.wide_steps,
                config.every,
            )
            for dim, rate in zip(config.wide_dims, config.wide_rates, strict=True)
        ]
        small = aside.submit(train_small, k_small, config.small_seeds, config.small_steps)
        task, spectra, runs, joint_runs = _run_narrow(config, context, k_tasks)
        context.progress("over-parametrized", 0.8)
        wide = jax.tree.map(lambda *leaves: np.stack(leaves), *(lane.result() for lane in wide))
        small = jax.tree.map(np.asarray, small.result())

    best, joint = ({name: _best(config, ys) for name, ys in part.items()} for part in (runs, joint_runs))
    iterations = {
        "gd": record_steps(config.steps, config.every),
        "fast": record_steps(config.fast_steps, config.every),
        "joint": record_steps(config.joint_steps, config.every),
        "wide": record_steps(config.wide_steps, config.every),
    }
    at_teacher = {name: condition_number(spectrum) for name, spectrum in spectra.items()}
    # Geometric mean of the loss in the last quarter: sign descent runs in a cycle there.
    cycle = runs["sign"]["loss"][:, :, STANDARD, :, -len(iterations["fast"]) // 4 :]
    floors = np.exp(np.mean(np.log(cycle), axis=-1))
    data = {
        "iterations": iterations,
        "under": {name: _without_prompt(ys) for name, ys in best.items()},
        "joint": {name: _without_prompt(ys) for name, ys in joint.items()},
        "wide": wide,
        "small": small,
        "condition": _conditions_on_the_way(task, iterations, best),
        "condition_at_teacher": at_teacher,
        "sign_floor": floors,
    }
    claims = (
        _wide_claim(iterations["wide"], wide),
        _same_ratio_claim(config, best, joint),
        _slow_claim(config, best),
        _adam_claim(config, best),
        _late_rate_claim(iterations["gd"], best["gd"], spectra["frozen"]),
        _condition_claim(config, at_teacher),
        _sign_claim(config, best, floors),
        _small_claim(small),
        Claim(
            "replicator.boundary/background",
            "SGD trains real Transformers poorly beside Adam: on language and images, and with full batches",
            "softmax2025talk, introduction",
            "quoted",
        ),
    )
    grid = ("seed", "ratio", "start", "iteration")
    dims = {
        f"{part}/{name}/{what}": grid
        for part in ("under", "joint")
        for name in data[part]
        for what in ("loss", "log10_ratio")
    }
    return Result(
        data,
        claims,
        {**dims, "sign_floor": ("seed", "ratio", "rate"), "wide/loss": ("dim", *grid[:2], grid[3])},
    )


def _without_prompt(ys: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key: leaf for key, leaf in ys.items() if key != "prompt"}


def _iterations(config: Config, losses: np.ndarray) -> np.ndarray:
    """Iterations until the relative loss is at the target; infinity where it never is."""
    reached = losses <= config.target * losses[..., :1]
    return np.where(reached.any(axis=-1), config.every * reached.argmax(axis=-1), np.inf)


def _best(config: Config, ys: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The runs at the best learning rate: fewest iterations to the target, or else the lowest last loss."""
    losses, iterations = ys["loss"], _iterations(config, ys["loss"])
    last = np.nan_to_num(losses[..., -1] / losses[..., 0], nan=np.inf)
    # Negative, and so ahead of every loss, where the target was reached.
    index = np.argmin(np.where(np.isfinite(iterations), -1 / (1 + iterations), last), axis=3)

    def pick(leaf):
        chosen = np.expand_dims(index, tuple(range(3, leaf.ndim)))
        return np.take_along_axis(leaf, chosen, axis=3).squeeze(3)

    return {key: pick(leaf) for key, leaf in ys.items()}


def _conditions_on_the_way(task: Task, iterations, best) -> dict[str, dict[str, np.ndarray]]:
    """Condition numbers of the Gauss-Newton matrix in p along the runs from the standard start."""
    marks = {
        # About 25 records, evenly spaced in the logarithm.
        name: np.unique(np.append(0, np.geomspace(1, len(iterations[key]) - 1, 25).astype(int)))
        for name, key in (("gd", "gd"), ("adam", "fast"))
    }
    prompts = [best[name]["prompt"][:, :, STANDARD, mark] for name, mark in marks.items()]
    values = np.asarray(condition_numbers(task.tokens, task.value, np.concatenate(prompts, axis=2)))
    gd, adam = np.split(values, [len(marks["gd"])], axis=2)
    return {
        "gd": {"iterations": iterations["gd"][marks["gd"]], "value": gd},
        "adam": {"iterations": iterations["fast"][marks["adam"]], "value": adam},
    }


def _wide_claim(steps: np.ndarray, wide: dict[str, np.ndarray]) -> Claim:
    # The last ratio alone, over (dimension, seed).
    losses = wide["loss"][:, :, -1]
    straight = []
    for loss in losses.reshape(-1, len(steps)):
        # From a tenth of the first loss on: before, the attention itself still moves.
        late = slice(np.argmax(loss < 0.1 * loss[0]), None)
        straight.append(fit_line(steps[late], np.log(loss[late])).r2)
    return Claim(
        "replicator.boundary/over-parametrized",
        "Over-parametrized, the loss falls at a linear rate, the prompt stays bounded, and the ratio ends "
        "far below the teacher's",
        "softmax2025talk, experiments",
        "stated",
        [
            # Several directions take part at first, which bends the line a little.
            Check("R^2 of a straight line through the log loss", "at least", 0.98, min(straight)),
            Check("fall of the loss", "at least", 1e4, np.min(losses[..., 0] / losses[..., -1])),
            # The start has length one, the teacher nine.
            Check("longest prompt on the way", "at most", 4, np.max(wide["prompt"][:, :, -1])),
            # A third of the teacher's decades.
            Check("log10 of the ratio at the end", "at most", 8, np.max(wide["log10_ratio"][:, :, -1, -1])),
        ],
    )


def _same_ratio_claim(config: Config, best, joint) -> Claim:
    def off(ys, start):
        """Decades between the ratio at the end and the teacher's, (seed, ratio)."""
        return np.abs(ys["log10_ratio"][:, :, start, -1] - np.log10(config.ratios))

    frozen, local = off(best["gd"], STANDARD), off(joint["adam"], LOCAL)[:, -1]
    gd, adam = (off(joint[name], STANDARD)[:, -1] for name in ("gd", "adam"))
    # The same order of magnitude: half a decade. Another one: a whole decade.
    same, other = 0.5, 1.0
    return Claim(
        "replicator.boundary/same-ratio",
        "Under-parametrized, training ends at a ratio of the teacher's order of magnitude, if the value is "
        "frozen or the start is near the teacher",
        "softmax2025talk, experiments",
        "qualified",
        [
            Check("decades off, value frozen, small ratio", "at most", same, np.max(frozen[:, 0])),
            Check("decades off, value frozen, large ratio", "at most", same, np.max(frozen[:, -1])),
            Check(
                "decades off, value trained, local start, large ratio, Adam", "at most", same, np.max(local)
            ),
            Check("decades off, value trained, standard start, large ratio", "at least", other, np.max(gd)),
            Check("the same with Adam", "at least", other, np.max(adam)),
        ],
        condition="the value is frozen or the start is local",
    )


def _slow_claim(config: Config, best) -> Claim:
    # A run that never reaches the target counts with all its steps, which understates the slowdown.
    iterations = np.minimum(_iterations(config, best["gd"]["loss"][:, :, LOCAL]), config.steps)
    small, large = gmean(iterations, axis=0)
    return Claim(
        "replicator.boundary/gd-slow",
        "Gradient descent does well for a small ratio and struggles for a large one",
        "softmax2025talk, experiments",
        "stated",
        [
            Check(f"iterations to {config.target:g}, small ratio", "at most", config.steps / 8, small),
            # Even the best first-order method slows down by the root of the growth in conditioning, about 7.
            Check("large ratio over small ratio", "at least", 8, large / small),
        ],
    )


def _adam_claim(config: Config, best) -> Claim:
    adam, gd = (_iterations(config, best[name]["loss"][:, :, LOCAL]) for name in ("adam", "gd"))
    # A run of gradient descent that never reaches the target counts with all its steps.
    gd = np.minimum(gd, config.steps)
    slowdown = {name: gmean(lanes[:, -1] / lanes[:, 0]) for name, lanes in (("adam", adam), ("gd", gd))}
    return Claim(
        "replicator.boundary/adam",
        "Adam is less affected by a large ratio",
        "softmax2025talk, introduction and questions",
        "stated",
        [
            Check(
                f"iterations to {config.target:g}, large ratio",
                "at most",
                config.fast_steps,
                gmean(adam[:, -1]),
            ),
            Check("the same over gradient descent's", "at most", 0.5, gmean(adam[:, -1] / gd[:, -1])),
            # Less affected means exactly this: the large ratio slows Adam down by a smaller factor.
            Check(
                "slowdown from the small to the large ratio over gradient descent's",
                "at most",
                1,
                slowdown["adam"] / slowdown["gd"],
            ),
        ],
    )


def _late_rate_claim(steps: np.ndarray, gd, spectrum) -> Claim:
    losses = gd["loss"][:, :, LOCAL]
    predicted = 1 - np.max((1 - gd["rate"][:, :, LOCAL, None] * spectrum[: len(losses)]) ** 2, axis=-1)
    measured = np.zeros(predicted.shape)
    for lane in np.ndindex(*measured.shape):
        loss = losses[lane]
        # The last third of the way to 1e-22 of the first loss, where rounding is still far off.
        end = np.argmax(np.append(loss, 0) < 1e-22 * loss[0])
        late = slice(2 * end // 3, end)
        measured[lane] = 1 - np.exp(fit_line(steps[late], np.log(loss[late])).slope)
    off = np.max(np.abs(measured / predicted - 1), axis=0)
    return Claim(
        "replicator.boundary/late-rate",
        "The conditioning at the solution sets the speed of gradient descent: in the end a step multiplies "
        "the loss by max (1 - rate * eigenvalue)^2 over the Gauss-Newton spectrum",
        "softmax2025talk, experiments (derived here: the rate in numbers)",
        "stated",
        [
            # The second slowest direction is not quite gone by then.
            Check(
                "loss lost per step, relative error of the prediction, small ratio", "at most", 0.01, off[0]
            ),
            Check("the same, large ratio", "at most", 0.01, off[-1]),
        ],
    )


def _condition_claim(config: Config, at_teacher) -> Claim:
    # Decades from the small to the large ratio, mean over seeds.
    frozen, joint = (
        np.mean(np.log10(at_teacher[name][:, -1] / at_teacher[name][:, 0])) for name in ("frozen", "joint")
    )
    square = 2 * np.log10(config.ratios[-1] / config.ratios[0])
    # Worse by more than the spread between seeds, a factor of 3, and by nothing like a power of the ratio.
    least, most = np.log10(5), 4.0
    return Claim(
        "replicator.boundary/conditioning",
        "The conditioning gets worse with the ratio, but by a factor of tens to hundreds in this model and "
        "not with the square of the ratio",
        "softmax2025talk, theorem on local analysis and experiments (derived here: the growth in numbers)",
        "corrected",
        [
            Check("decades of condition number, value frozen, as the square", "at least", square, frozen),
            Check("decades of condition number, value trained, as the square", "at least", square, joint),
            Check("decades of condition number, value frozen", "at least", least, frozen),
            Check("decades of condition number, value frozen", "at most", most, frozen),
            Check("decades of condition number, value trained", "at least", least, joint),
            Check("decades of condition number, value trained", "at most", most, joint),
        ],
        printed=2,
    )


def _sign_claim(config: Config, best, floors) -> Claim:
    slopes = [convergence_order(config.sign_rates, floor).slope for floor in floors[:, 0]]
    decayed = best["sign_decaying"]["loss"][:, 0, STANDARD, -1] / np.min(floors[:, 0], axis=-1)
    return Claim(
        "replicator.boundary/sign-descent",
        "Sign descent, to which the talk likens Adam, converges for a small ratio if its rate decays; at a "
        "constant rate it stalls at a floor that falls like the square of the rate",
        "softmax2025talk, questions (derived here: the floor and its order)",
        "qualified",
        [
            # A step is as long as the rate in every coordinate, and the loss is quadratic in them. The cycle
            # it ends in scatters the floor by a factor of two: over rates a factor of 8 apart, the slope by
            # a third.
            Check("order of the floor in a constant rate", "slope", 2.0, float(np.mean(slopes)), 0.5),
            # The rate decays by eight orders: a hundredth is far above what its square allows.
            Check("last loss with a decaying rate over the lowest floor", "at most", 1e-2, np.max(decayed)),
        ],
        condition="its learning rate decays",
    )


def _small_claim(small: dict[str, np.ndarray]) -> Claim:
    loss = small["loss"] / small["loss_bound"]
    moved = np.max(small["displacement"], axis=1) / small["displacement_bound"]
    return Claim(
        "replicator.boundary/theorem",
        "Where d >= N and the first residual is small, the loss stays below exp(-2 mu t) of the first, and "
        "the parameters stay in a ball; the instances satisfy the hypothesis by construction",
        "softmax2025talk, over-parametrized theorem (constants derived anew)",
        "stated",
        [
            # A theorem leaves no tolerance. It is about gradient flow; the runs are gradient descent at a
            # small rate h, which is no slower: a step takes (1 - h k)^2 <= exp(-2 h k) where the flow takes
            # exp(-2 h k), up to the curvature of the path within a step.
            Check(
                f"largest loss over its bound, after the start, {len(loss)} instances",
                "at most",
                1,
                np.max(loss[:, 1:]),
            ),
            Check("largest displacement over its bound", "at most", 1, np.max(moved)),
            Check("smallest singular value over its first", "at least", 0.5, np.min(small["sigma"])),
        ],
    )


_LOOKS: dict[str, tuple[str, dict[str, Any]]] = {
    "gd": ("gradient descent", {"color": "C0", "linewidth": 2.2}),
    "heavy_ball": ("heavy ball", {"color": "C5"}),
    "adam": ("Adam", {"color": "C1", "linewidth": 2.2, "zorder": 1.8}),
    "normalized": ("normalized, constant rate", {"color": "C2", "linestyle": ":"}),
    "normalized_decaying": ("normalized, decaying rate", {"color": "C2"}),
    "sign": ("sign, constant rate", {"color": "C3", "linestyle": ":"}),
    "sign_decaying": ("sign, decaying rate", {"color": "C3"}),
}


def figure(saved: Saved) -> Figure:
    """The talk's figure, loss and ratio over iterations; with it the condition number and the theorem."""
    drawn, axes = plotting.new_figure(2, 3, width=4.4, height=3.4)
    (few, many, wide), (ratios, condition, theorem) = axes
    config = saved.config
    iterations = {name: saved[f"iterations/{'gd' if name == 'gd' else 'fast'}"] for name in _LOOKS}

    for ax, index in ((few, 0), (many, -1)):
        for name, (label, look) in _LOOKS.items():
            losses = saved[f"under/{name}/loss"][0, index, STANDARD]
            ax.loglog(iterations[name][1:], losses[1:], label=label, **look)
        ax.set(xlabel="iterations", ylabel="loss", ylim=(1e-34, 10))
        ax.set_title(f"d = {config['dim']} < N, v frozen: teacher's ratio {_power(config['ratios'][index])}")
    many.legend(loc="lower left")

    steps = saved["iterations/wide"]
    for index, (ratio, color) in enumerate(zip(config["wide_ratios"][::-1], ("C4", "C5"), strict=False)):
        losses = saved["wide/loss"][0, 0, -1 - index]
        label = f"teacher's ratio {_power(ratio)}"
        wide.semilogy(steps, losses, color=color, label=label, **plotting.TRAINED)
    losses = saved["wide/loss"][0, 0, -1]
    late = losses < 0.1 * losses[0]
    line = fit_line(steps[late], np.log(losses[late]))
    straight = np.exp(line.intercept + line.slope * steps)
    wide.semilogy(steps, straight, label="straight line", **plotting.THEORY)
    wide.set(xlabel="iterations", ylabel="loss")
    wide.set_title(f"d = {config['wide_dims'][0]} > N: gradient descent on p and v")
    wide.legend(loc="upper right")

    for index in (0, -1):
        for name in ("gd", "adam"):
            label, look = _LOOKS[name]
            ys = saved[f"under/{name}/log10_ratio"][0, index, STANDARD]
            ratios.semilogx(
                iterations[name][1:], ys[1:], label=f"{label}, v frozen" if index else None, **look
            )
            look = {**look, "linestyle": "-" if index else (0, (1, 1))}
            condition.loglog(
                saved[f"condition/{name}/iterations"][1:],
                saved[f"condition/{name}/value"][0, index, 1:],
                label=f"{label}, teacher's ratio {_power(config['ratios'][index])}",
                **look,
            )
        ratios.axhline(np.log10(config["ratios"][index]), **plotting.THEORY)
        condition.axhline(saved["condition_at_teacher/frozen"][0, index], **plotting.THEORY)
    for name in ("gd", "adam"):
        label, look = _LOOKS[name]
        ys = saved[f"joint/{name}/log10_ratio"][0, -1, STANDARD]
        look = {**look, "linestyle": (0, (1, 1))}
        ratios.semilogx(saved["iterations/joint"][1:], ys[1:], label=f"{label}, v trained", **look)
    ys = saved["wide/log10_ratio"][0, 0, -1]
    ratios.semilogx(steps[1:], ys[1:], color="C4", label=f"gradient descent, d = {config['wide_dims'][0]}")
    ratios.plot([], [], label="teacher", **plotting.THEORY)
    condition.plot([], [], label="at the teacher", **plotting.THEORY)
    ratios.set(xlabel="iterations", ylabel="log10 of mean max / min attention", ylim=(0, 62))
    ratios.set_title("Ratio: the teacher's, if v is frozen")
    ratios.legend(loc="upper left")
    condition.set(xlabel="iterations", ylabel="condition number", ylim=(10, 3e5))
    condition.set_title("Gauss-Newton matrix of p, v frozen")
    condition.legend(loc="upper right")

    mu_t, losses = saved["small/mu_t"][0], saved["small/loss"][0]
    moved = np.max(saved["small/displacement"][0]) / saved["small/displacement_bound"][0]
    theorem.semilogy(mu_t, losses, color="C4", label="gradient descent", **plotting.TRAINED)
    theorem.semilogy(mu_t, saved["small/loss_bound"][0], label="bound exp(-2 mu t)", **plotting.THEORY)
    theorem.set(xlabel="mu × time", ylabel="loss over its first value")
    theorem.set_title(f"N = n = 3, d = 12: moves {moved:.2f} of its bound")
    theorem.legend(loc="upper right")
    return drawn


def _power(ratio: float) -> str:
    return f"$10^{{{np.log10(ratio):.0f}}}$" if ratio > 100 else f"{ratio:g}"
