"""A valid call of every public function of `dynamics` and `models`, in `CALLS` or in `NO_NUMBERS`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

from dynamics.collapse import Moments, VaeWeights
from dynamics.incremental import GreedyPath
from dynamics.noncontrastive import ByolWeights
from dynamics.scan_snap import SequenceClasses, Weights
from models.attention.joma import JomaInputs
from models.collapse import Noisy
from models.data.tokens import Contexts
from models.lowrank import Factors, LoraParams
from models.self_supervised import Views, spectral_contrastive
from models.vae import VaeInputs, VaeOutputs

# Half precision is no fault of networks, whose own dtype it may be.
HALF = "float16 bfloat16"


@dataclass(frozen=True)
class Real:
    """Real numbers that are an argument.

    Attributes:
        value: a valid one.
        bad: others of its shape that are out of range.
        fine: kinds of `tests.test_public_functions.KINDS` that this argument takes.
    """

    value: Any
    bad: tuple[Any, ...] = ()
    fine: str = ""


@dataclass(frozen=True)
class Index:
    """Integers from 0 to size - 1 that are an argument, such as tokens."""

    value: Any
    size: int
    fine: str = ""


@dataclass(frozen=True)
class Call:
    """How to call a function.

    Attributes:
        arguments: by name; what is neither `Real` nor `Index` stays as it is.
        through: called with the function and the arguments, where they do not go to it as they are.
        host: the function looks at its numbers and cannot be traced, which it says.
    """

    arguments: dict[str, Any]
    through: Callable[..., Any] | None = None
    host: bool = False


def call(through: Callable[..., Any] | None = None, *, host: bool = False, **arguments: Any) -> Call:
    return Call(arguments, through, host)


# What x y is, with its probabilities.
LAW: dict[str, Any] = {
    "values": Real(np.array([1.0, -1.0])),
    "probabilities": Real(np.array([0.6, 0.4]), (np.array([0.6, 0.6]), np.array([1.4, -0.4]))),
}
# A solver that is quick to trace.
SOLVE = {"solver": diffrax.Heun(), "throw": False}


def solve(function: Callable[..., Any], rtol: Any = 1e-4, **arguments: Any) -> Any:
    """A simulation that tells by `ok` whether it succeeded."""
    return function(**arguments, rtol=rtol, atol=1e-6, **SOLVE)


def in_steps(function: Callable[..., Any], **arguments: Any) -> Any:
    """A simulation in steps, alike."""
    return function(**arguments, throw=False)


def of_one_matrix(function: Callable[..., Any], weights: Any, **arguments: Any) -> Any:
    return function([weights], **arguments)


def of_one_matrix_twice(function: Callable[..., Any], weights: Any) -> Any:
    return function([weights, weights])


def of_all_regularizers(
    function: Callable[..., Any], row_sums: Any, gamma: Any, power: Any, **arguments: Any
) -> list[Any]:
    hyper = {"entropy": {"row_sums": row_sums}, "inverse": {"gamma": gamma}, "direct": {"power": power}}
    return [
        function(name, **arguments, **hyper.get(name, {}))
        for name in ("entropy", "inverse", "square", "direct")
    ]


def of_some_losses(
    function: Callable[..., Any], temperature: Any, epsilon: Any, scale: Any, **arguments: Any
) -> list[Any]:
    return [
        function("infonce", **arguments, temperature=temperature, epsilon=epsilon),
        function("triplet", **arguments),
        function("soft_triplet", **arguments, temperature=temperature),
        function("coria", **arguments, scale=scale),
        function("ji", **arguments),
    ]


def decay(t, y, rate):
    return -rate * y


def slope(x):
    return x - 0.2


def number(value: float, *bad: float) -> Real:
    return Real(value, bad)


TWO_VIEWS: dict[str, Any] = {
    "f": Real(np.array([[0.3, 1.0], [0.5, -0.2], [0.1, 0.4]])),
    "f_aug": Real(np.array([[0.4, 0.9], [0.5, -0.1], [0.3, 0.4]])),
}
PAIR_ROW = Real(np.array([[0.3, -0.2]]))
IMPORTANCE = Real(np.array([[0.0, 0.2, 0.3], [0.1, 0.0, 0.4], [0.5, 0.6, 0.0]]))
POSITIVE, RATE = number(0.7, 0.0, -1.0), number(0.7, -1.0)
TIMES = Real(np.array([0.0, 0.3]), (np.array([0.3, 0.0]), np.array([0.3, 0.3])), "shorter")
HALF_HALF = Real(np.array([0.6, 0.4]), (np.array([0.6, 0.6]), np.array([1.4, -0.4])))
PAYOFF = Real(np.array([[0.0, 2.0], [1.0, 0.5]]))
VECTOR = Real(np.array([0.3, 0.8]))
GAME: dict[str, Any] = {
    "payoff": Real(np.array([[-1.0, 2.0], [0.0, 1.0]])),
    "x": Real(np.array([0.5, 0.5]), (np.array([0.6, 0.6]), np.array([1.4, -0.4]))),
}
HESSIAN = Real(np.array([[2.0, 0.5], [0.5, 1.0]]), (np.array([[2.0, 0.5], [-0.5, 1.0]]),))
BATCH = "deeper"
ANY = "deeper scalar shorter empty"

SYMMETRIC = Real(np.array([[2.0, 0.5], [0.5, 1.0]]), (np.array([[2.0, 0.5], [-0.5, 1.0]]),))
FOUR = np.diag([1.0, 0.5, 0.25, 2.0])
SKEW = FOUR + np.triu(np.ones((4, 4)), 1)
LINEAR: dict[str, Any] = {"G0": Real(np.array([[1.0, 2.0], [0.5, -1.0]])), "S": Real(FOUR, (SKEW,))}
STEPS = Real(np.array([0.0, 2.0]), (np.array([-1.0, -2.0]), np.array([0.5, 1.5])), ANY)
PAIR = np.array([[[2.0, 0.5], [0.5, 1.0]]])
BENT = np.array([[[2.0, 1.5], [0.5, 1.0]]])
COLUMN = Real(np.array([[0.6], [0.8]]), (np.array([[0.7], [0.8]]),))
FACTORS: dict[str, Any] = {"u0": Real(np.array([1.0, 1.0])), "v0": Real(np.array([0.5, -0.5]))}


def pull(beta):
    return jnp.array([2.0, -1.0]) - beta


PULL = Partial(pull)
SECOND_MOMENTS: dict[str, Any] = {
    "A": Real(np.array([[1.0, 0.2], [0.2, 0.5]]), (np.diag([1.0, -0.5]), np.array([[1.0, 0.4], [0.2, 0.5]]))),
    "c": Real(np.array([1.2, 0.9])),
    "y2": number(4.0, -1.0),
}
STRENGTHS = Real(np.array([0.1, 0.2, 0.1]), (np.array([0.1, -0.2, 0.1]),))


def of_second_moments(function: Callable[..., Any], A: Any, c: Any, y2: Any, **others: Any) -> Any:
    """A function of the moments of data."""
    return function(moments=Moments(A, c, y2), **others)


def of_vae_weights(function: Callable[..., Any], U: Any, W: Any, log_variance: Any, **others: Any) -> Any:
    """A flow from the weights of an autoencoder, on data."""
    weights = VaeWeights(U, W, log_variance)
    return of_second_moments(partial(solve, partial(function, weights)), **others)


def of_two_layers(function: Callable[..., Any], params: Any, **others: Any) -> Any:
    """A function of a network, whose first matrix is an argument, and of data."""
    return of_second_moments(partial(function, params=[params, np.array([[0.5]])]), **others)


SQUARE = Real(np.array([[0.5, 0.1], [-0.2, 0.4]]))
COVARIANCE = Real(SYMMETRIC.value, (*SYMMETRIC.bad, np.diag([1.0, -0.5])))
LINEAR_BYOL: dict[str, Any] = {"W0": SQUARE, "Wp0": SQUARE, "X": COVARIANCE, "X_aug_cov": COVARIANCE}
# A rate may be infinite, for no moving average.
EMA_RATE = Real(0.7, (-1.0,), "infinite")


def of_online(function: Callable[..., Any], **arguments: Any) -> Any:
    """The first update of what trains an online network, a predictor and a target."""
    params = {name: np.array([0.3, -0.8]) for name in ("online", "predictor", "target")}
    return moved(function(**arguments), params)


ISOTROPIC: dict[str, Any] = {"augmentation_variance": RATE, "predictor_rate": RATE, "weight_decay": RATE}
ELEMENTWISE: dict[str, Any] = {
    name: Real(value, (-value,), ANY)
    for name, value in (("augmentation_variance", 0.25), ("predictor_rate", 0.7), ("weight_decay", 0.04))
}

PATH = GreedyPath(
    times=np.array([0.5, 1.0]),
    beta=np.array([[0.0, 0.0], [2.0, 0.0], [2.0, -1.0]]),
    order=np.array([0, 1]),
    log_scale=np.ones((3, 2)),
    tied=np.zeros(2, bool),
    converged=np.ones(2, bool),
    complete=np.array(True),
)
FLOW: dict[str, Any] = {
    "taus": Real(np.array([0.0, 0.6, 1.2]), (np.array([0.0, 1.2, 0.6]),)),
    "beta": Real(np.array([[0.0, 0.0], [1.5, 0.1], [2.0, -0.9]])),
}

P = np.array([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]])
CLASSES: dict[str, Any] = {
    "P": Real(P, (P + 0.1, np.array([[1.5, -0.5, 0.0], [1.5, -0.5, 0.0]]))),
    "query": Index(np.array([0, 2]), 3),
    "next_token": Index(np.array([1, 2]), 3),
}
# A logit of minus infinity is a probability of zero.
ZERO = "infinite-one"
LOGITS = Real(np.arange(9.0).reshape(3, 3) / 10, fine=ZERO)
DECODER = Real(np.eye(3), fine=ZERO)
SETTING: dict[str, Any] = {
    "learning_rate_Y": POSITIVE,
    "num_classes": number(2.0, 0.5),
    "vocab_size": number(5.0, 1.0),
}
# A decoder may stand still.
AT_REST: dict[str, Any] = {"learning_rate_Y": RATE}
GROWTH: dict[str, Any] = {
    "t": Real(np.array([0.5, 2.0]), (np.array([-1.0, -2.0]),), ANY),
    **SETTING,
    "learning_rate_Z": RATE,
    "C0": POSITIVE,
}


def of_classes(function, P, query, next_token, **arguments):
    return function(classes=SequenceClasses(P, query, next_token), **arguments)


def of_weights(function, Y, Z, **classes):
    return function(Weights(Y, Z), *([SequenceClasses(**classes)] if classes else []))


def quiet_of_classes(function, **arguments):
    return of_classes(partial(solve, function), **arguments)


TWO_CLASSES = SequenceClasses(P, np.array([0, 2]), np.array([1, 2]))
COUNTS = np.array([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]])
CONTEXTS: dict[str, Any] = {"counts": Real(COUNTS, (-1 - COUNTS,)), "query": Index(np.array([0, 2]), 3)}
TOKENS = Index(np.array([[0, 1, 1, 2]]), 3)

X = np.array([[[0.3, -0.2], [0.5, 0.1], [-0.4, 0.7]]])
# Other tokens may pay no attention to one that is infinite.
TOKENS_OF_HEADS = Real(X, fine="deeper infinite-one")
HEAD: dict[str, Any] = {
    name: Real(np.array([[0.5, 0.1], [-0.2, 0.4]]), fine=BATCH)
    for name in ("key", "query", "value", "output")
}
DIAGONAL: dict[str, Any] = {name: Real(np.array([0.5, -0.2])) for name in ("key", "query", "value", "output")}
STACK: dict[str, Any] = {
    name: Real(np.array([[[0.5, -0.2]]])) for name in ("key", "query", "value", "output")
}
KEY = jax.random.key(0)


def of_params(function, **params):
    return function(params)


def moved(optimizer, params=None):
    """The first update of an optimizer."""
    params = np.array([0.3, -0.8]) if params is None else params
    return optimizer.update(params, optimizer.init(params), params)[0]


def update(function, *fixed, **arguments):
    return moved(function(*fixed, **arguments))


def of_matrix(function, **options):
    """The first update of an optimizer of matrices."""
    return moved(function(**options), {"hidden": {"kernel": np.array([[1.0, -0.5], [0.3, 0.8]])}})


ADAM: dict[str, Any] = {
    "b1": Real(0.9, (1.0, -0.1), HALF),
    "b2": Real(0.99, (1.0, -0.1), HALF),
    "eps": Real(1e-3, (-1e-3,), HALF),
}


def lora():
    """Adaptors that do something."""
    return LoraParams(Factors(jnp.ones((2, 1)), jnp.full((1, 2), 0.5)), jnp.eye(2))


def latents(params, inputs):
    return VaeOutputs(params * inputs, inputs, -inputs)


def outputs(params, inputs):
    return params * inputs


def of_data(function, params, inputs, targets):
    return function(params, (outputs, inputs, targets))


# What a network is given is for the network to look at, but for numbers that are not finite.
NETWORKS_OWN = f"{ANY} {HALF} complex bool masked none string strings object empty"
PREDICTION: dict[str, Any] = {
    "params": Real(2.0, fine=NETWORKS_OWN),
    "inputs": Real(np.ones((4, 2)), fine=NETWORKS_OWN),
    "targets": Real(np.full((4, 2), 0.5), fine=HALF),
}
J = Real(np.ones((3, 2, 2)), fine=HALF)
# ReLU of minus infinity is zero.
BLOCK: dict[str, Any] = {
    "embedding": Real(np.eye(3)[:, :2], fine="infinite-one"),
    "query_embedding": Real(np.eye(3)[:, 2:], fine="infinite-one"),
    "W": Real(np.ones((3, 1)), fine="infinite-one"),
    "z": Real(np.full((1, 2), 0.5), fine=ZERO),
}

EMBEDDINGS: dict[str, Any] = {
    "first": Real(np.array([[0.3, -0.8], [0.5, 0.2]])),
    "second": Real(np.array([[0.4, -0.6], [0.6, 0.1]])),
}

CALLS: dict[str, Call] = {
    # dynamics.flow
    "dynamics.flow.integrate": call(
        lambda f, **a: f(decay, **a, **SOLVE),
        y0=Real(np.array([1.0, 2.0]), fine="deeper scalar shorter"),
        ts=TIMES,
        args=Real(0.5, fine=f"{HALF} complex bool none string strings object empty deeper scalar shorter"),
        rtol=number(1e-6, -1.0, 1e30),
        atol=number(1e-9, -1.0, 1e30),
    ),
    # dynamics.spectra
    "dynamics.spectra.stable_rank": call(A=Real(np.array([[2.0, 1.0], [0.5, 1.0]]), fine="deeper shorter")),
    "dynamics.spectra.numerical_rank": call(
        A=Real(np.array([[2.0, 1.0], [0.5, 1.0]]), fine="deeper shorter"), rtol=RATE, atol=RATE
    ),
    "dynamics.spectra.effective_rank": call(
        A=Real(np.array([[2.0, 1.0], [0.5, 1.0]]), fine="deeper shorter")
    ),
    "dynamics.spectra.entropy": call(
        p=Real(np.array([0.6, 0.4]), (np.array([-0.6, -0.4]),), "deeper shorter")
    ),
    "dynamics.spectra.alignment": call(
        A=Real(np.array([[2.0, 1.0], [0.5, 1.0]]), fine=BATCH), B=Real(np.eye(2), fine=BATCH)
    ),
    "dynamics.spectra.captured_energy": call(
        P=Real(COLUMN.value, COLUMN.bad, BATCH),
        G=Real(np.array([[2.0, 1.0], [0.5, 1.0]]), fine="deeper shorter"),
    ),
    "dynamics.spectra.principal_angles": call(
        P=Real(COLUMN.value, COLUMN.bad, BATCH),
        Q=Real(np.array([[0.0], [1.0]]), (np.array([[0.0], [2.0]]),), BATCH),
    ),
    "dynamics.spectra.norm": call(x=Real(np.array([0.6, 0.4]), fine="deeper shorter")),
    "dynamics.spectra.neural_collapse": call(
        features=Real(np.array([[2.0, 1.0], [0.5, 1.0], [0.1, -1.0]])),
        labels=Index(np.array([0, 1, 1]), 2),
        weights=Real(np.array([[0.5, 0.3], [0.1, -0.4]])),
        bias=Real(np.array([0.1, 0.2]), fine="none"),
    ),
    # dynamics.galore
    "dynamics.galore.gradient_iterates": call(**LINEAR, learning_rate=RATE, steps=STEPS),
    "dynamics.galore.gradient_operator": call(B=Real(PAIR), C=Real(PAIR)),
    "dynamics.galore.reversible_gradient": call(A=Real(PAIR), B=Real(PAIR), C=Real(PAIR), W=Real(np.eye(2))),
    "dynamics.galore.reversible_terms": call(
        J=Real(PAIR, fine="shorter"),
        f=Real(np.ones((1, 2)), fine="shorter"),
        y=Real(np.ones((1, 2))),
        loss="softmax",
    ),
    "dynamics.galore.contraction_factor": call(
        lambda f, lipschitz, **a: f(form="valid", lipschitz=(0.1, lipschitz, 0.2), **a),
        B_hat=Real(PAIR, (BENT,), BATCH),
        C_hat=Real(PAIR, (BENT,), BATCH),
        learning_rate=RATE,
        lipschitz=RATE,
        weight_bound=RATE,
        sup_B=RATE,
        sup_C=RATE,
    ),
    "dynamics.galore.projected_coefficients": call(B=Real(PAIR, fine=BATCH), P=COLUMN),
    "dynamics.galore.projected_descent": call(
        G0=LINEAR["G0"],
        B=Real(PAIR, (BENT,)),
        C=Real(PAIR, (BENT,)),
        P=COLUMN,
        Q=COLUMN,
        learning_rate=RATE,
        steps=STEPS,
    ),
    "dynamics.galore.slow_split": call(**LINEAR, form="valid"),
    "dynamics.galore.stable_rank_bound": call(**LINEAR, learning_rate=RATE, steps=STEPS, form="valid"),
    # dynamics.incremental
    "dynamics.incremental.canonical_start": call(**FACTORS),
    "dynamics.incremental.conserved_quantity": call(
        u=Real(np.array([1.0, 2.0]), fine=ANY), v=Real(np.array([0.5, 1.0]), fine=ANY)
    ),
    "dynamics.incremental.raw_flow": call(solve, neg_gradient=PULL, **FACTORS, ts=TIMES),
    "dynamics.incremental.log_flow": call(
        solve,
        neg_gradient=PULL,
        u0=Real(FACTORS["u0"].value, (np.array([0.5, -0.5]),)),
        v0=FACTORS["v0"],
        log_inv_alpha=POSITIVE,
        taus=Real(TIMES.value, (*TIMES.bad, np.array([-0.2, 0.3])), "shorter"),
    ),
    "dynamics.incremental.greedy": call(
        lambda f, u0, v0: f(PULL, 2, max_stages=2, u0=u0, v0=v0),
        u0=Real(FACTORS["u0"].value, (np.array([0.5, -0.5]),)),
        v0=FACTORS["v0"],
    ),
    "dynamics.incremental.time_until_active": call(
        b=Real(np.array([1.0, 0.5]), (np.array([-1.0, -1.0]), np.array([3.0, 3.0]))),
        gradient=Real(np.array([2.0, -1.0])),
    ),
    "dynamics.incremental.staircase": call(
        path=PATH, tau=Real(np.array([0.2, 0.7]), (np.array([-1.0, -2.0]),), ANY)
    ),
    "dynamics.incremental.staircase_distance": call(path=PATH, **FLOW),
    "dynamics.incremental.jump_times": call(path=PATH, **FLOW),
    # dynamics.replicator
    "dynamics.replicator.attention_field": call(x=HALF_HALF, gradient=VECTOR, key_scale=number(1.0, -1.0)),
    "dynamics.replicator.attention_lipschitz": call(tokens=Real(X), keys=Real(X)),
    "dynamics.replicator.coupled_flow": call(
        solve,
        gradient=slope,
        z0=Real(np.array([[0.1, 0.2]])),
        gram=Real(np.eye(2).reshape(1, 2, 1, 2)),
        ts=TIMES,
    ),
    "dynamics.replicator.natural_gradient_flow": call(
        solve,
        gradient=slope,
        z0=Real(np.array([0.3, 0.8]), fine="shorter"),
        ts=TIMES,
        scale=number(1.0, -1.0),
    ),
    "dynamics.replicator.softmax_flow": call(
        solve,
        gradient=slope,
        z0=Real(np.array([0.3, 0.8]), fine="shorter"),
        ts=TIMES,
        key_scale=number(1.0, -1.0),
    ),
    "dynamics.replicator.overparametrized_rate": call(
        sigma=Real(1.0, (0.0, -1.0), ANY),
        lipschitz=Real(0.5, (0.0, -1.0), ANY),
        residual=Real(0.25, (-1.0,), ANY),
    ),
    "dynamics.replicator.softmax_jacobian": call(x=Real(np.array([0.3, 0.8]), fine="shorter")),
    "dynamics.replicator.softmax_jacobian_product": call(
        x=Real(np.array([[0.6, 0.4]]), fine=ANY), g=Real(np.array([[0.5, -0.1]]), fine=ANY)
    ),
    "dynamics.replicator.squared_error_gradient": call(
        values=Real(np.array([[0.6, 0.4]]), fine=ANY),
        targets=Real(np.array([0.5]), fine=ANY),
        x=Real(np.array([[0.5, 0.5]]), fine=ANY),
    ),
    "dynamics.replicator.two_token_solution": call(
        ts=Real(np.array([0.0, 0.3]), fine="empty shorter"),
        gap=number(1.0),
        key_scale=number(1.0, -1.0),
        u0=number(0.2),
    ),
    "dynamics.replicator.condition_bounds": call(x=HALF_HALF, hessian=HESSIAN),
    "dynamics.replicator.condition_number": call(x=HALF_HALF, hessian=HESSIAN),
    "dynamics.replicator.local_matrix": call(x=HALF_HALF, hessian=HESSIAN),
    "dynamics.replicator.random_minima": call(
        host=True,
        rng=np.random.default_rng(0),
        n=3,
        count=2,
        log10_ratio=number(1.0, -1.0, 301.0),
        log10_spread=number(1.0, -1.0, 301.0),
    ),
    "dynamics.replicator.corollary_bound": call(x=HALF_HALF, hessian=HESSIAN),
    "dynamics.replicator.conserved_quantity": call(
        x_star=HALF_HALF, log_x=Real(np.log([0.3, 0.7]), fine="deeper infinite")
    ),
    "dynamics.replicator.coordination": call(
        rewards=Real(np.array([1.0, 2.0]), (np.array([0.0, -1.0]),), "shorter")
    ),
    "dynamics.replicator.eigenvalues": call(
        host=True, payoff=Real(GAME["payoff"].value, fine=BATCH), x=Real(np.array([0.5, 0.5]), fine=BATCH)
    ),
    "dynamics.replicator.hawk_dove": call(value=POSITIVE, cost=POSITIVE),
    "dynamics.replicator.hawk_dove_bourgeois": call(value=POSITIVE, cost=POSITIVE),
    "dynamics.replicator.is_ess": call(host=True, **GAME, atol=number(1e-6, -1.0)),
    "dynamics.replicator.is_nash": call(host=True, **GAME, atol=number(1e-6, -1.0)),
    "dynamics.replicator.kl_divergence": call(
        x_star=HALF_HALF, log_x=Real(np.log([0.3, 0.7]), fine="deeper infinite")
    ),
    "dynamics.replicator.linearize": call(lambda f, x: f(lambda x: x * (x - jnp.sum(x * x)), x), x=HALF_HALF),
    "dynamics.replicator.mean_fitness": call(payoff=PAYOFF, x=Real(np.array([0.6, 0.4]), fine=BATCH)),
    "dynamics.replicator.prisoners_dilemma": call(
        temptation=number(5.0, 1.0),
        reward=number(3.0, 9.0),
        punishment=number(1.0, 9.0),
        sucker=number(0.0, 9.0),
    ),
    "dynamics.replicator.rest_points": call(host=True, payoff=GAME["payoff"], atol=RATE),
    "dynamics.replicator.rock_paper_scissors": call(win=number(1.0, -5.0), loss=number(2.0, -5.0)),
    "dynamics.replicator.stability": call(host=True, **GAME, atol=number(1e-6, -1.0)),
    "dynamics.replicator.stag_hunt": call(stag=number(4.0, 1.0), hare=number(3.0, 5.0, 0.0)),
    "dynamics.replicator.constant_fitness_solution": call(
        fitness=VECTOR, x0=HALF_HALF, ts=Real(np.array([0.0, 0.3]), fine="empty shorter")
    ),
    "dynamics.replicator.exponentiated_gradient": call(
        in_steps, fitness=PAYOFF, x0=HALF_HALF, steps=2, learning_rate=number(0.5, -0.5)
    ),
    "dynamics.replicator.kkt_residual": call(x=HALF_HALF, gradient=VECTOR, support_above=number(0.0)),
    "dynamics.replicator.replicator_field": call(x=Real(np.array([0.6, 0.4])), fitness=VECTOR),
    "dynamics.replicator.simulate": call(solve, fitness=PAYOFF, x0=HALF_HALF, ts=TIMES),
    "dynamics.replicator.simulate_discrete": call(
        in_steps, fitness=PAYOFF, x0=HALF_HALF, steps=2, background=number(1.0, -5.0)
    ),
    "dynamics.replicator.simulate_mutator": call(
        solve,
        fitness=PAYOFF,
        mutation=Real(
            np.array([[0.9, 0.1], [0.2, 0.8]]),
            (np.array([[0.9, 0.2], [0.2, 0.8]]), np.array([[1.2, -0.2], [0.2, 0.8]])),
        ),
        x0=HALF_HALF,
        ts=TIMES,
    ),
    "dynamics.replicator.simulate_two_populations": call(
        solve, row_payoff=PAYOFF, column_payoff=PAYOFF, x0=HALF_HALF, y0=HALF_HALF, ts=TIMES
    ),
    # dynamics.joma
    "dynamics.joma.attend": call(
        z=Real(np.array([0.1, 0.2]), fine=ZERO),
        x=Real(np.array([1.0, 2.0]), (np.array([-1.0, -2.0]),), BATCH),
        kind="softmax",
        temperature=POSITIVE,
    ),
    "dynamics.joma.invariant": call(
        V=Real(np.array([[2.0], [1.0]])),
        z=VECTOR,
        kind="softmax",
        learning_rate_w=POSITIVE,
        learning_rate_z=POSITIVE,
        mean_attention=VECTOR,
    ),
    "dynamics.joma.saliency": call(
        gradient=Real(np.array([1.0, -1.0])), x=Real(np.array([[0.5, 0.5], [1.0, 0.0]]), fine="shorter")
    ),
    "dynamics.joma.softmax_logits": call(
        V=Real(np.ones((2, 2, 1)) * np.arange(1.0, 3.0)[:, None, None]),
        mean_attention=Real(np.full((2, 2), 0.5)),
        z0=VECTOR,
        rate_ratio=number(1.0),
    ),
    "dynamics.joma.gaussian_moments": call(
        r=number(0.3), norm=number(2.0, -1.0), activation=jax.nn.relu, scale=POSITIVE
    ),
    "dynamics.joma.isotropic_mixture_field": call(
        v=VECTOR,
        centers=Real(np.array([[0.0, 2.0]])),
        weights=Real(np.array([0.5])),
        bias=Real(0.1),
        activation=jax.nn.relu,
        scale=POSITIVE,
    ),
    "dynamics.joma.isotropic_moments": call(
        lambda f, **a: f(activation=jax.nn.relu, density=lambda u: 0.5 + 0 * u, **a),
        r=number(0.3),
        norm=number(2.0, -1.0),
        width=POSITIVE,
    ),
    "dynamics.joma.blow_up_time": call(delta=Real(VECTOR.value, fine="shorter")),
    "dynamics.joma.modified_mlp_flow": call(solve, V0=VECTOR, delta=VECTOR, ts=TIMES),
    "dynamics.joma.modified_mlp_solution": call(
        t=Real(0.3, fine=f"{ANY} infinite"), delta=Real(VECTOR.value, fine="shorter")
    ),
    "dynamics.joma.rescaled_mlp_flow": call(solve, V0=VECTOR, delta=VECTOR, taus=TIMES),
    "dynamics.joma.log_residual_flow": call(solve, mu=Real(VECTOR.value, fine="shorter"), ts=TIMES),
    "dynamics.joma.onset_delay": call(mu=Real(np.array([0.5, 1.0]), fine=ANY)),
    "dynamics.joma.rate_ratio": call(mu=Real(np.array([0.5, 1.0]), fine=ANY), reference=Real(0.2, fine=ANY)),
    "dynamics.joma.saturating_flow": call(solve, v0=VECTOR, mu=VECTOR, ts=TIMES),
    # dynamics.collapse
    "dynamics.collapse.moments": call(
        x=Real(np.array([[0.3, 1.0], [0.5, -0.2]]), fine="shorter"), y=Real(np.array([0.5, 0.2]))
    ),
    "dynamics.collapse.ridge_minimum": call(of_second_moments, **SECOND_MOMENTS, gamma=RATE),
    "dynamics.collapse.two_layer_minimum": call(
        of_second_moments, **SECOND_MOMENTS, gamma_u=RATE, gamma_w=RATE, noise_variance=RATE, width=2
    ),
    "dynamics.collapse.deep_minimum": call(
        of_second_moments, **SECOND_MOMENTS, gammas=STRENGTHS, noise_variance=RATE, widths=(2, 1)
    ),
    "dynamics.collapse.nuclear_minimum": call(
        of_second_moments, **SECOND_MOMENTS, gamma_u=RATE, gamma_w=RATE
    ),
    "dynamics.collapse.critical_gamma": call(
        of_second_moments, **SECOND_MOMENTS, noise_variance=RATE, widths=(2, 1)
    ),
    "dynamics.collapse.metastable_gamma": call(
        of_second_moments, **SECOND_MOMENTS, noise_variance=RATE, widths=(2, 1)
    ),
    "dynamics.collapse.effective_landscape": call(
        of_second_moments,
        **SECOND_MOMENTS,
        b=Real(0.4, fine=ANY),
        gamma=POSITIVE,
        noise_variance=RATE,
        width=2,
        depth=2,
    ),
    "dynamics.collapse.linear_vae_loss": call(
        U=Real(np.array([[0.5, 0.1], [0.2, 0.3]])),
        V=Real(np.array([[0.4, 0.2], [0.1, 0.3]])),
        scale=Real(np.array([0.5, 0.8])),
        Z=PAYOFF,
        beta=RATE,
        eta_dec=POSITIVE,
        eta_enc=POSITIVE,
    ),
    "dynamics.collapse.linear_vae_flow": call(
        of_vae_weights,
        A=SECOND_MOMENTS["A"],
        c=Real(np.array([[1.2, 0.3], [0.9, -0.2]])),
        y2=SECOND_MOMENTS["y2"],
        U=Real(np.array([[0.5], [0.2]])),
        W=Real(np.array([[0.3], [0.4]])),
        log_variance=Real(np.array([-0.5])),
        beta=RATE,
        eta_dec=POSITIVE,
        eta_enc=POSITIVE,
        ts=TIMES,
    ),
    "dynamics.collapse.vae_minimum": call(
        Z=Real(PAYOFF.value, fine="shorter"), latents=2, beta=RATE, eta_dec=POSITIVE, eta_enc=POSITIVE
    ),
    "dynamics.collapse.vae_modes": call(
        x=Real(np.array([[0.3, 1.0], [0.5, -0.2], [0.1, 0.4]]), fine="shorter"),
        y=Real(np.array([[0.3], [0.5], [-0.1]]), fine="none"),
    ),
    "dynamics.collapse.infonce_loss": call(
        W=Real(np.array([[0.5, 0.1]])), A=SYMMETRIC, C=SYMMETRIC, attraction=RATE
    ),
    "dynamics.collapse.infonce_encoder": call(
        A=Real(SYMMETRIC.value, (*SYMMETRIC.bad, np.diag([1.0, -0.5]))),
        C=Real(SYMMETRIC.value / 4, (*SYMMETRIC.bad, np.diag([1.0, -0.5]))),
        width=1,
        attraction=POSITIVE,
    ),
    "dynamics.collapse.infonce_minimum": call(
        variances=Real(np.array([1.0, 0.5]), (np.array([1.0, -0.5]),), "shorter"),
        augmentation_variance=Real(0.2, (-0.2,)),
        attraction=RATE,
    ),
    "dynamics.collapse.landau_loss": call(
        W=Real(np.array([[0.5, 0.1]])), B=SYMMETRIC, Sigma=SYMMETRIC, quartic=POSITIVE
    ),
    "dynamics.collapse.landau_minimum": call(
        B=SYMMETRIC,
        Sigma=Real(SYMMETRIC.value, (*SYMMETRIC.bad, np.diag([1.0, -0.5]))),
        width=1,
        quartic=POSITIVE,
    ),
    "dynamics.collapse.hessian_index": call(
        loss=lambda p: jnp.sum(p**4 - p**2), params=Real(VECTOR.value, fine=ANY), rtol=RATE
    ),
    "dynamics.collapse.taylor_coefficients": call(
        loss=lambda p: jnp.sum(p**4 - p**2),
        params=Real(VECTOR.value, fine="deeper scalar shorter"),
        order=2,
        at=number(0.5),
    ),
    "dynamics.collapse.rescaled_loss": call(
        # A pytree may be empty, and then the loss is that of nothing.
        loss=lambda p: jnp.sum(p**2),
        params=Real(VECTOR.value, fine=f"{ANY} none"),
        scales=Real(0.4, fine=ANY),
    ),
    "dynamics.collapse.rescaled_curvature": call(
        loss=lambda p: jnp.sum(p**2), params=Real(VECTOR.value, fine=f"{ANY} none"), step=POSITIVE
    ),
    "dynamics.collapse.where": call(
        host=True,
        kind="ssl",
        x=Real(np.array([[0.3, 1.0], [0.5, -0.2], [0.1, 0.4]]), fine="shorter"),
        value=Real(0.2, (-0.2,), "none"),
        attraction=Real(2.0, (-1.0,)),
    ),
    "dynamics.contrastive.contrastive_pairs": call(**TWO_VIEWS),
    "dynamics.contrastive.pairwise_importance": call(
        of_some_losses, **TWO_VIEWS, temperature=POSITIVE, epsilon=RATE, scale=POSITIVE
    ),
    "dynamics.contrastive.contrastive_covariance": call(
        alpha=IMPORTANCE, x=TWO_VIEWS["f"], x_aug=TWO_VIEWS["f_aug"]
    ),
    "dynamics.contrastive.contrastive_energy": call(**TWO_VIEWS, alpha=IMPORTANCE),
    "dynamics.contrastive.min_player": call(
        of_all_regularizers,
        **TWO_VIEWS,
        temperature=POSITIVE,
        row_sums=Real(np.array([0.4, 1.0, 0.7]), (np.array([-0.4, 1.0, 0.7]),), "scalar"),
        gamma=number(2.0, 1.0, 0.5),
        power=POSITIVE,
    ),
    "dynamics.contrastive.deep_linear_energy": call(of_one_matrix, weights=PAIR_ROW, X=SYMMETRIC),
    "dynamics.contrastive.deep_linear_maximum": call(X=SYMMETRIC),
    "dynamics.contrastive.deep_linear_flow": call(
        partial(of_one_matrix, **SOLVE, rtol=1e-4, atol=1e-6),
        weights=Real(np.array([[0.6, 0.8]]), (np.array([[0.6, 0.9]]),)),
        X=SYMMETRIC,
        ts=TIMES,
    ),
    "dynamics.contrastive.encoder_flow": call(
        partial(of_one_matrix, **SOLVE, rtol=1e-4, atol=1e-6), weights=PAIR_ROW, X=SYMMETRIC, ts=TIMES
    ),
    "dynamics.contrastive.aligned_flow": call(
        solve, values=Real(np.array([[0.5, 0.2], [0.3, 0.4]])), gain=VECTOR, ts=TIMES
    ),
    "dynamics.contrastive.balance": call(
        of_one_matrix_twice, weights=Real(np.array([[0.3, 0.2], [0.1, 0.5]]), fine=BATCH)
    ),
    "dynamics.contrastive.gated_covariance": call(
        w=VECTOR, x=TWO_VIEWS["f"], x_aug=TWO_VIEWS["f_aug"], alpha=IMPORTANCE, activation=jnp.tanh
    ),
    "dynamics.contrastive.power_flow": call(
        w0=Real(np.array([0.6, 0.8]), (np.array([0.6, 0.9]),), "deeper"),
        x=TWO_VIEWS["f"],
        x_aug=TWO_VIEWS["f_aug"],
        alpha=IMPORTANCE,
        activation=jnp.tanh,
        ts=TIMES,
        steps=20,
    ),
    "dynamics.contrastive.pattern_coverage": call(
        shares=Real(np.array([0.3, 0.5]), (np.array([0.3, 1.5]),), "shorter"), nodes=3
    ),
    "dynamics.noncontrastive.byol_flow": call(
        solve, **LINEAR_BYOL, Wa0=SQUARE, ts=TIMES, predictor_rate=RATE, ema_rate=EMA_RATE, weight_decay=RATE
    ),
    "dynamics.noncontrastive.no_predictor_flow": call(
        W0=SQUARE, X_aug_cov=COVARIANCE, ts=TIMES, weight_decay=RATE
    ),
    "dynamics.noncontrastive.no_stop_gradient_flow": call(
        W0=SQUARE, Wp=SQUARE, X=COVARIANCE, X_aug_cov=COVARIANCE, ts=TIMES, weight_decay=RATE
    ),
    "dynamics.noncontrastive.balance": call(
        W=Real(SQUARE.value, fine=f"{BATCH} shorter"),
        Wp=Real(SQUARE.value, fine=BATCH),
        predictor_rate=POSITIVE,
    ),
    "dynamics.noncontrastive.predictor_measures": call(
        W=Real(SQUARE.value, fine=f"{BATCH} shorter"), Wp=Real(SQUARE.value, fine=BATCH)
    ),
    "dynamics.noncontrastive.isotropic_flow": call(
        solve, F0=SYMMETRIC, Wp0=SYMMETRIC, tau=number(0.7), ts=TIMES, **ISOTROPIC
    ),
    "dynamics.noncontrastive.alignment_matrix": call(
        F=Real(SYMMETRIC.value, SYMMETRIC.bad, BATCH),
        Wp=Real(SYMMETRIC.value, SYMMETRIC.bad, BATCH),
        tau=number(0.7),
        **ISOTROPIC,
    ),
    "dynamics.noncontrastive.decoupled_flow": call(
        solve,
        p0=Real(0.3, fine=ANY),
        s0=Real(0.4, (-0.4,), ANY),
        tau0=Real(1.2, fine=ANY),
        ts=TIMES,
        ema_rate=0.5,
        **ELEMENTWISE,
    ),
    "dynamics.noncontrastive.phase_velocity": call(
        p=Real(0.3, fine=ANY),
        tau=Real(1.2, fine=ANY),
        imbalance=Real(0.1, fine=ANY),
        **ELEMENTWISE,
    ),
    "dynamics.noncontrastive.fixed_points": call(
        tau=Real(1.2, fine=ANY),
        augmentation_variance=ELEMENTWISE["augmentation_variance"],
        weight_decay=ELEMENTWISE["weight_decay"],
    ),
    "dynamics.noncontrastive.collapse_threshold": call(
        tau=Real(1.2, (0.0, -1.0), ANY),
        imbalance=Real(0.1, fine=ANY),
        duration=number(5.0, 0.0, -1.0),
        **ELEMENTWISE,
    ),
    "models.predictors.directpred": call(F=SYMMETRIC, epsilon=RATE),
    "models.predictors.running_correlation": call(
        F=SYMMETRIC, z=Real(np.array([[0.3, -0.8], [0.5, 0.2]]), fine="shorter"), rate=number(0.7, -0.1, 1.1)
    ),
    "models.byol.exact_views": call(X=COVARIANCE, X_aug_cov=COVARIANCE),
    "models.byol.flow_gradient": call(
        of_online, predictor_rate=RATE, ema_rate=number(0.7, -1.0, np.inf), weight_decay=RATE
    ),
    "models.byol.with_average": call(of_online, optimizer=optax.sgd(0.1), momentum=number(0.7, -0.1, 1.1)),
    "models.byol.LinearByol": call(
        lambda f, W, Wp, Wa, first, second: f(ByolWeights(W, Wp, Wa))(Views(first, second)),
        W=SQUARE,
        Wp=Real(SQUARE.value, fine="none"),
        Wa=Real(SQUARE.value, fine="none"),
        **EMBEDDINGS,
    ),
    "models.losses.contrastive_loss": call(
        of_some_losses, **TWO_VIEWS, temperature=POSITIVE, epsilon=RATE, scale=POSITIVE
    ),
    "models.losses.alpha_cl_loss": call(**TWO_VIEWS, alpha=IMPORTANCE),
    "dynamics.collapse.critical_amplitude": call(
        of_second_moments,
        **SECOND_MOMENTS,
        ts=Real(np.array([0.5, 2.0]), (np.array([-0.5, 2.0]),), ANY),
        q0=number(0.3),
        gamma=RATE,
        noise_variance=RATE,
        width=2,
    ),
    "dynamics.collapse.gibbs_mean": call(
        loss=lambda p: p @ p + p[0] * p[1],
        observe=lambda p: p[0] ** 2 + p[1],
        temperature=POSITIVE,
        box=Real(np.array([[-5.0, 5.0], [-4.0, 6.0]]), (np.array([[5.0, -5.0], [-4.0, 6.0]]),)),
        points=9,
    ),
    "dynamics.collapse.escape_rate": call(
        loss=lambda p: jnp.sum(p**4 - p**2),
        minimum=Real(np.full(2, 0.5**0.5), (np.zeros(2), np.ones(2)), "shorter"),
        saddle=Real(np.array([0.0, 0.5**0.5]), (np.zeros(2), np.array([0.1, 0.7])), "shorter"),
        temperature=POSITIVE,
        saddles=RATE,
    ),
    "dynamics.collapse.features_minimum": call(classes=2, per_class=3, gamma_w=RATE, gamma_h=RATE, bias=True),
    "dynamics.collapse.relu_critical_gamma": call(
        x=Real(np.array([[0.3, 1.0], [0.5, -0.2], [-0.1, 0.4]]), fine="shorter"),
        y=Real(np.array([0.4, -0.3, 0.8])),
        key=jax.random.key(0),
        starts=3,
    ),
    "dynamics.collapse.sgd_lyapunov": call(learning_rate=RATE, **LAW, batch_size=2),
    "dynamics.collapse.sampled_sgd_lyapunov": call(
        learning_rate=RATE, **LAW, batch_size=2, key=jax.random.key(0), samples=10
    ),
    "dynamics.collapse.sgd_collapse_windows": call(host=True, **LAW, batch_size=2, largest=POSITIVE),
    "dynamics.collapse.transition_order": call(
        order_parameter=lambda gamma: max(1.0 - gamma, 0.0),
        gamma_c=Real(1.0, (0.0, -1.0), "infinite"),
        host=True,
    ),
    "dynamics.collapse.stochastic_linear_loss": call(
        of_two_layers,
        **SECOND_MOMENTS,
        params=Real(np.array([[0.3, -0.2]])),
        noise_variance=RATE,
        gammas=Real(np.array([0.1, 0.2]), (np.array([0.1, -0.2]),)),
    ),
    "dynamics.collapse.stochastic_linear_flow": call(
        partial(of_two_layers, **SOLVE, rtol=1e-4, atol=1e-6),
        **SECOND_MOMENTS,
        params=Real(np.array([[0.3, -0.2]])),
        noise_variance=RATE,
        gammas=Real(np.array([0.1, 0.2]), (np.array([0.1, -0.2]),)),
        ts=TIMES,
    ),
    "dynamics.collapse.imbalance": call(
        lambda f, params: f([params, np.ones((2, 1))]),
        params=Real(np.array([[0.3, -0.2]]), fine="shorter deeper"),
    ),
    "dynamics.collapse.hysteresis_sweep": call(
        of_two_layers,
        **SECOND_MOMENTS,
        params=Real(np.array([[0.3, -0.2]])),
        noise_variance=RATE,
        path=Real(np.array([0.2, 0.4]), (np.array([0.2, -0.4]),), "shorter"),
        key=jax.random.key(0),
        kick=RATE,
        horizon=POSITIVE,
    ),
    # dynamics.scan_snap
    "dynamics.scan_snap.SequenceClasses": call(lambda f, **a: f(**a).P, **CLASSES),
    "dynamics.scan_snap.context_distribution": call(of_classes, **CLASSES, Z=LOGITS),
    # A token that is common has no say.
    "dynamics.scan_snap.distinct_entropy": call(
        of_classes, **CLASSES, Z=Real(LOGITS.value, fine="nan-one infinite-one")
    ),
    "dynamics.scan_snap.log_context_weights": call(
        lambda f, **a: jnp.exp(of_classes(f, **a)), **CLASSES, Z=LOGITS
    ),
    "dynamics.scan_snap.attention_growth": call(**GROWTH | AT_REST),
    "dynamics.scan_snap.attention_growth_printed": call(**GROWTH),
    "dynamics.scan_snap.attention_growth_scanning": call(**GROWTH | AT_REST),
    "dynamics.scan_snap.attention_growth_snapping": call(**GROWTH),
    "dynamics.scan_snap.crossover_time": call(**SETTING),
    "dynamics.scan_snap.decoder_margin": call(t=GROWTH["t"], **SETTING | AT_REST),
    "dynamics.scan_snap.log_relative_gain": call(
        of_classes,
        **CLASSES,
        Z=LOGITS,
        token=Index(np.array([0, 0]), 3, "scalar"),
        reference=Index(np.array([1, 2]), 3, "scalar"),
    ),
    "dynamics.scan_snap.log_relative_gain_closed_form": call(
        of_classes,
        **CLASSES,
        Z=LOGITS,
        token=Index(np.array([0, 0]), 3, "scalar"),
        reference=Index(np.array([1, 2]), 3, "scalar"),
        Z0=Real(np.zeros((3, 3))),
    ),
    "dynamics.scan_snap.attended_features": call(Z=LOGITS, **CONTEXTS),
    "dynamics.scan_snap.class_overlap": call(of_classes, **CLASSES, Z=LOGITS),
    "dynamics.scan_snap.fast_decoder_flow": call(
        quiet_of_classes, **CLASSES, ts=TIMES, learning_rate_Y=RATE, learning_rate_Z=RATE, Z0=LOGITS
    ),
    "dynamics.scan_snap.growth_rate": call(of_weights, Y=DECODER, Z=LOGITS, **CLASSES),
    "dynamics.scan_snap.loss_gradient": call(
        Y=DECODER, Z=LOGITS, **CONTEXTS, next_token=Index(np.array([1, 0]), 3)
    ),
    "dynamics.scan_snap.population_field": call(of_weights, Y=DECODER, Z=LOGITS, **CLASSES),
    "dynamics.scan_snap.population_flow": call(
        quiet_of_classes,
        **CLASSES,
        ts=TIMES,
        learning_rate_Y=RATE,
        learning_rate_Z=RATE,
        Y0=DECODER,
        Z0=LOGITS,
    ),
    "dynamics.scan_snap.row_sums": call(
        of_weights, Y=Real(np.eye(3), fine=BATCH), Z=Real(np.eye(3), fine=BATCH)
    ),
    "dynamics.scan_snap.weak_correlation_flow": call(
        quiet_of_classes, **CLASSES, ts=TIMES, learning_rate_Y=RATE, learning_rate_Z=RATE, Z0=LOGITS
    ),
    "dynamics.scan_snap.weak_growth_rate": call(
        of_classes, **CLASSES, Z=LOGITS, t=number(0.5, -1.0), learning_rate_Y=RATE
    ),
    "dynamics.scan_snap.attention_error": call(
        host=True, Z=Real(np.eye(2), fine=BATCH), theory=Real(2 * np.eye(2), fine=BATCH)
    ),
    "dynamics.scan_snap.growth_along": call(
        host=True,
        growth_rate=Real(np.array([[0.0], [2.0], [4.0]]), fine=BATCH),
        ts=Real(np.array([0.0, 1.0, 2.0]), TIMES.bad and (np.array([0.0, 2.0, 1.0]),)),
        learning_rate_Z=Real(0.5, (-1.0,), BATCH),
    ),
    "dynamics.scan_snap.rank_correlation": call(
        host=True,
        z=Real(np.array([1.0, 2.0, 9.0, 3.0]), fine="deeper infinite"),
        score=Real(np.array([0.1, 0.2, 0.3, 0.25]), fine="deeper nan-one infinite"),
    ),
    # models.attention
    "models.attention.AttentionHead": call(lambda f, X, **a: f(**a)(X), **DIAGONAL, X=TOKENS_OF_HEADS),
    "models.attention.AttentionStack": call(lambda f, X, **a: f(**a)(X), **STACK, X=TOKENS_OF_HEADS),
    "models.attention.diagonal_head": call(
        kq=Real(np.array([0.5, -0.2])), vo=Real(np.array([0.5, 0.2])), X=TOKENS_OF_HEADS
    ),
    "models.attention.diagonal_head_loss": call(
        beta=Real(np.array([0.5, -0.2, 0.3, 0.1])), X=Real(X), Y=Real(X)
    ),
    "models.attention.diagonal_stack": call(
        kq=Real(np.array([[[0.5, -0.2]]])), vo=Real(np.array([[[0.5, 0.2]]])), X=TOKENS_OF_HEADS
    ),
    "models.attention.observe_products": call(of_params, **DIAGONAL),
    "models.attention.product_coordinates": call(of_params, **DIAGONAL),
    "models.attention.split_products": call(beta=Real(np.array([0.5, -0.2, 0.3, 0.1])), dim=2),
    "models.attention.JomaBlock": call(
        lambda f, x, query, **a: f(**a, kind="softmax")(JomaInputs(x, query)),
        **BLOCK,
        x=Real(np.array([[1.0, 3.0]]), (np.array([[-1.0, -3.0]]),)),
        query=Index(np.array([0]), 1),
        temperature=POSITIVE,
    ),
    "models.attention.head_products": call(of_params, **HEAD),
    "models.attention.thin_products": call(of_params, **HEAD),
    "models.attention.PromptAttention": call(
        lambda f, tokens, **a: f(**a)(tokens),
        prompt=VECTOR,
        value=VECTOR,
        tokens=Real(X, fine=BATCH),
        key_weights=Real(np.eye(2)),
    ),
    "models.attention.attention_log_ratio": call(prompt=VECTOR, keys=Real(X, fine=BATCH)),
    "models.attention.attention_logits": call(
        prompt=VECTOR, tokens=Real(X, fine=BATCH), key_weights=Real(np.eye(2))
    ),
    "models.attention.log_mean_ratio": call(
        log_ratios=Real(np.array([0.5, 2.0]), fine="deeper shorter infinite-one")
    ),
    "models.attention.prompt_attention": call(
        prompt=VECTOR, value=VECTOR, tokens=Real(X, fine=BATCH), key_weights=Real(np.eye(2))
    ),
    "models.attention.ScanSnapAttention": call(
        lambda f, Y, Z, counts, query: f(Y, Z)(Contexts(counts, query)), Y=DECODER, Z=LOGITS, **CONTEXTS
    ),
    # models.data
    "models.data.images.patches": call(images=Real(np.ones((2, 4, 4)), fine=BATCH), shape=(2, 2)),
    "models.data.teachers.teacher_with_ratio": call(
        lambda f, **a: f(KEY, **a), keys=Real(X, fine="shorter"), ratio=number(5.0, 0.5)
    ),
    "models.data.teachers.orthogonal_keys": call(lambda f, scale: f(KEY, 1, 2, 3, scale), scale=POSITIVE),
    "models.data.teachers.nearly_orthogonal_keys": call(
        lambda f, scale, eps: f(KEY, 1, 2, 3, scale, eps), scale=POSITIVE, eps=number(0.1, 1.5)
    ),
    "models.data.teachers.diagonal_teacher": call(
        lambda f, **a: f(KEY, 2, 2, 2, **a), kq_scale=RATE, vo_scale=RATE
    ),
    "models.data.tokens.one_common_token": call(host=True, overlap=number(0.3, -0.1, 1.0), num_classes=2),
    "models.data.tokens.count_tokens": call(lambda f, tokens: f(tokens, 3).counts, tokens=TOKENS),
    # other models
    "models.layer.layer_outputs": call(
        lambda f, W, J, F: f(W, (J, F)),
        W=Real(np.eye(2), fine=HALF),
        J=J,
        F=Real(np.ones((3, 2)), fine=f"{HALF} deeper"),
    ),
    "models.layer.leaky_relu": call(
        z=Real(np.array([-1.0, 2.0]), fine=f"{ANY} {HALF}"), slope=Real(0.5, fine=f"{ANY} {HALF}")
    ),
    "models.collapse.StochasticLinear": call(
        # Inputs of another length tell of x, so that matrices may be of any.
        lambda f, matrices, x: f([matrices, np.array([[0.5]])])(Noisy(x)),
        matrices=Real(np.array([[0.3, -0.2]]), fine="shorter"),
        x=Real(np.array([[1.0, 2.0]])),
    ),
    "models.collapse.random_weights": call(key=jax.random.key(0), sizes=(2, 1), scale=RATE),
    "models.collapse.multiplicative_noise": call(
        key=jax.random.key(0), shape=(3,), variance=RATE, law="normal"
    ),
    "models.collapse.noisy_batch": call(
        key=jax.random.key(0),
        x=Real(np.array([[1.0, 2.0]]), fine="shorter"),
        y=Real(np.array([[0.5]])),
        size=2,
        widths=(2,),
        variance=RATE,
    ),
    "models.self_supervised.infonce": call(**EMBEDDINGS, attraction=RATE, temperature=POSITIVE),
    "models.self_supervised.spectral_contrastive": call(**EMBEDDINGS),
    "models.self_supervised.soft_triplet": call(**EMBEDDINGS, attraction=RATE),
    "models.self_supervised.on_views": call(
        lambda f, first, second: f(spectral_contrastive, lambda params, x: x)(None, Views(first, second)),
        **EMBEDDINGS,
    ),
    "models.self_supervised.covariance_root": call(name="C", C=Real(COVARIANCE.value, COVARIANCE.bad)),
    "models.self_supervised.Encoder": call(
        lambda f, matrices, x: f([matrices, np.array([[0.5]])])(x),
        # ReLU of minus infinity is zero; inputs of another length tell of x, so that matrices may be of any.
        matrices=Real(np.array([[0.3, -0.2]]), fine="shorter infinite infinite-one"),
        x=Real(np.array([[1.0, 2.0]]), fine="deeper infinite infinite-one"),
    ),
    "models.self_supervised.Nodes": call(
        lambda f, weights, x: f(weights, jnp.tanh)(x),
        # Inputs of another length tell of x, so that weights may be of any.
        weights=Real(np.array([[0.3, -0.2]]), fine="shorter"),
        x=Real(np.array([[1.0, 2.0]]), fine="infinite infinite-one"),
    ),
    "models.locations.LocalNet": call(
        lambda f, filters, head, x: f(filters, head, jnp.tanh)(x),
        # Inputs of another length tell of x, so that filters may be of any.
        filters=Real(np.array([[[0.3, -0.2]], [[0.1, 0.4]]]), fine="shorter"),
        head=Real(np.array([[0.5, 1.0]])),
        x=Real(np.array([[[1.0, 2.0], [0.5, 0.1]], [[0.2, 1.0], [0.3, 2.0]]]), fine="infinite infinite-one"),
    ),
    "models.locations.token_overlaps": call(filters=Real(np.array([[[0.3, -0.2]], [[0.1, 0.4]]]), fine=ANY)),
    "models.self_supervised.ConvEncoder": call(
        lambda f, x: f(KEY, (2, 2), 1, (2,))(x),
        x=Real(np.array([[[1.0, 2.0], [0.5, -1.0]]]), fine="infinite infinite-one"),
    ),
    "models.self_supervised.scale_embedding": call(
        lambda f, scales: f({"layers": [np.ones((2, 2))]}, scales),
        scales=Real(np.array([0.5, 2.0]), fine="scalar"),
    ),
    "models.self_supervised.two_views": call(
        key=KEY, x=Real(np.array([[1.0, 2.0]])), augmentation=Real(SYMMETRIC.value, SYMMETRIC.bad, "scalar")
    ),
    "models.self_supervised.batch_of_views": call(
        key=KEY, x=Real(np.array([[1.0, 2.0]]), fine=ANY), size=2, augmentation=Real(0.3, (-0.3,))
    ),
    "models.vae.LinearVae": call(
        lambda f, U, W, log_variance, x, noise: f(VaeWeights(U, W, log_variance))(VaeInputs(x, noise)),
        U=Real(np.array([[0.5], [0.2]]), fine="shorter"),
        W=Real(np.array([[0.3], [0.4]])),
        log_variance=Real(np.array([-0.5])),
        x=Real(np.array([[1.0, 2.0]])),
        noise=Real(np.array([[0.4]]), fine="none"),
    ),
    "models.vae.AmortizedVae": call(
        lambda f, x, noise: f(jax.random.key(0), 2, 4, 1, 2)(VaeInputs(x, noise)),
        x=Real(np.array([[1.0, 2.0]])),
        noise=Real(np.array([[0.4]]), fine="none"),
    ),
    "models.vae.negative_elbo": call(
        lambda f, targets, beta, eta_dec, eta_enc: f(
            np.array([0.3, 0.5]), (latents, np.array([[1.0, 2.0]]), targets, (beta, eta_dec, eta_enc))
        ),
        targets=Real(np.array([[0.2, 0.1]])),
        beta=RATE,
        eta_dec=POSITIVE,
        eta_enc=POSITIVE,
    ),
    "models.vae.vae_batch": call(
        key=jax.random.key(0),
        x=Real(np.array([[1.0, 2.0]]), fine="shorter"),
        y=Real(np.array([[0.5]])),
        size=2,
        latents=1,
    ),
    "dynamics.spectra.active_units": call(
        mean=Real(np.array([[1.0, 0.1], [-1.0, 0.1]]), fine="shorter"), threshold=RATE
    ),
    "models.losses.squared_error": call(of_data, **PREDICTION),
    "models.losses.mean_squared_error": call(of_data, **PREDICTION),
    "models.losses.upstream_product": call(
        lambda f, params, inputs, gradients: of_data(f, params, inputs, gradients),
        params=PREDICTION["params"],
        inputs=PREDICTION["inputs"],
        gradients=PREDICTION["targets"],
    ),
    "models.losses.total_squared_error": call(
        lambda f, weights, params, inputs, targets: f(params, (weights, (outputs, inputs, targets))),
        weights=Real(np.array([1.0, 2.0])),
        params=Real(np.array([2.0, 1.0]), fine=NETWORKS_OWN),
        inputs=PREDICTION["inputs"],
        targets=PREDICTION["targets"],
    ),
    "models.losses.cross_entropy": call(
        lambda f, params, labels: f(params, (lambda params, _: params, None, labels)),
        params=Real(np.eye(3), fine=f"{HALF} shorter"),  # a label is what is out of range then
        labels=Index(np.array([0, 2, 1]), 3),
    ),
    # optimizers, and what numbers they take
    "models.optimizers.adam": call(lambda f, rate: update(f, rate, 0.0, 5), rate=RATE),
    "models.optimizers.descent": call(
        lambda f, rate, momentum: update(f, rate, momentum, 5), rate=RATE, momentum=RATE
    ),
    "models.optimizers.langevin": call(
        lambda f, **numbers: update(f, **numbers, key=KEY), time_step=RATE, temperature=RATE
    ),
    "models.optimizers.decaying": call(update, rate=RATE, decay=POSITIVE, steps=number(5.0, 0.0, -1.0)),
    "models.optimizers.normalized_descent": call(
        update, rate=RATE, decay=POSITIVE, steps=number(5.0, 0.0, -1.0)
    ),
    "models.optimizers.sign_descent": call(update, rate=RATE, decay=POSITIVE, steps=number(5.0, 0.0, -1.0)),
    "models.galore.scale_by_adam_8bit": call(
        update,
        **ADAM,
    ),
    "models.galore.scale_by_galore": call(of_matrix, rank=1, **ADAM, scale=Real(0.5, (-0.5,), HALF)),
    "models.galore.galore": call(
        of_matrix,
        rank=1,
        **ADAM,
        learning_rate=Real(0.1, (-0.1,), HALF),
        scale=Real(0.5, (-0.5,), HALF),
        weight_decay=Real(0.1, (-0.1,), HALF),
    ),
    "models.training.train_in_chunks": call(
        lambda f, time_step: f(jnp.square, 1.0, optax.sgd(0.25), steps=2, chunk=1, time_step=time_step)[1],
        time_step=POSITIVE,
        host=True,
    ),
    "models.training.scale_by_name": call(
        lambda f, alpha: moved(f(alpha=alpha), {"alpha": np.array([0.3, -0.8])}), alpha=number(2.0)
    ),
    "models.training.sgd_until": call(update, learning_rate=RATE, steps=number(5.0, -1.0)),
    "models.training.train": call(
        lambda f, time_step: f(jnp.square, 1.0, optax.sgd(0.25), steps=2, time_step=time_step)[1],
        time_step=POSITIVE,
    ),
    "models.lowrank.merge": call(lambda f, scale: f(lora(), scale), scale=number(0.5)),
    "models.lowrank.on_factors": call(
        lambda f, scale: f(lambda params, x: x @ params, scale)(lora(), np.ones((1, 2))), scale=number(0.5)
    ),
    "models.lowrank.relora": call(
        lambda f, scale: moved(f(optax.sgd(0.1), 1, KEY, scale=scale), lora()).frozen, scale=number(0.5)
    ),
    "models.vit.scale_initial": call(
        lambda f, **a: f({"embedder": np.ones(2), "norm": {"scale": np.ones(2), "bias": np.ones(2)}}, **a),
        scale=RATE,
        gain_scale=RATE,
    ),
    "models.data.tokens.sample_long_contexts": call(
        lambda f, length: f(KEY, TWO_CLASSES, length, 2)[0].counts,
        length=Index(np.array(7), 7, "beyond"),
    ),
    "models.losses.gauss_newton_spectrum": call(
        lambda f, params, tokens: f(lambda p, x: x @ p, params, tokens),
        params=Real(np.array([0.3, 0.8]), fine="none scalar deeper shorter empty"),
        tokens=Real(np.array([[1.0, 0.0], [0.5, 2.0]]), fine="deeper shorter"),
    ),
}

# Public functions that take sizes, files, words, functions, modules or pytrees of parameters (which their
# networks look at). Where they take a number as well, the tests of their own module look at it.
NO_NUMBERS = {
    "models.byol.byol_loss",
    "models.byol.byol_weights",
    "models.optimizers.along_spheres",
    "dynamics.derivatives.nan_derivatives",
    "dynamics.derivatives.only_in_reverse",
    "models.classifier.Classifier",
    "models.classifier.is_hidden",
    "models.collapse.linear_layers",
    "models.collapse.weights",
    "dynamics.flow.all_finite",
    "dynamics.flow.gradient_flow",
    "dynamics.flow.integrate_until",
    "dynamics.contrastive.homogeneous_activation",
    "dynamics.galore.bound_counterexample",
    "dynamics.incremental.negative_gradient",
    "dynamics.replicator.matching_pennies",
    "dynamics.replicator.tangent_basis",
    "dynamics.replicator.zeeman",
    "dynamics.scan_snap.common_tokens",
    "dynamics.scan_snap.distinct_tokens",
    "dynamics.spectra.after",
    "dynamics.steps.guarded",
    "dynamics.workarounds.apply",
    "models.attention.attention_function",
    "models.attention.joma_observer",
    "models.attention.observe_weights",
    "models.attention.population_loss",
    "models.checkpoints.hash_arrays",
    "models.checkpoints.hash_program",
    "models.checkpoints.open_checkpoints",
    "models.data.images.cifar10",
    "models.data.images.cifar100",
    "models.data.images.digits",
    "models.data.images.mnist",
    "models.data.images.shuffled",
    "models.data.patterns.located_patterns",
    "models.data.patterns.pattern_views",
    "models.data.patterns.tokens_of_patterns",
    "models.data.recorded.figure_6",
    "models.data.text.next_token_classes",
    "models.data.text.python_corpus",
    "models.data.text.select_windows",
    "models.data.text.wikitext2",
    "models.data.text.words",
    "models.data.tokens.population_contexts",
    "models.data.tokens.sample_contexts",
    "models.data.tokens.sample_tokens",
    "models.data.tokens.synthetic_classes",
    "models.draws.normal",
    "models.draws.uniform",
    "models.functional.as_function",
    "models.galore.flax_axes",
    "models.galore.layerwise",
    "models.galore.report",
    "models.galore.state_bytes",
    "models.layer.counterexample_network",
    "models.layer.mlp_outputs",
    "models.layer.mlp_tail",
    "models.llama.block",
    "models.llama.embed",
    "models.llama.joint_step",
    "models.llama.next_token_loss",
    "models.llama.param_shapes",
    "models.losses.bind",
    "models.losses.on_batches",
    "models.lowrank.lora_params",
    "models.lowrank.low_rank_params",
    "models.lowrank.on_trained",
    "models.memory.compiled_bytes",
    "models.memory.full_rank_memory",
    "models.memory.galore_memory",
    "models.memory.lora_memory",
    "models.memory.nbytes",
    "models.optimizers.one_of",
    "models.training.map_lanes",
    "models.training.record_steps",
    "models.vae.vae_weights",
    "models.vit.Block",
    "models.vit.VisionTransformer",
    "models.vit.head_weights",
}
