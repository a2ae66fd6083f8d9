"""The integrator: exact solutions, an independent solver, and every way to fail."""

import json
import os
import re
import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from dynamics.flow import Trajectory, all_finite, gradient_flow, integrate, integrate_until
from tests.helpers import compiled, count_compilations

TIMES = [0.0, 0.5, 1.0, 2.0]


def decay(t, y, rate):
    return -rate * y


def square(t, y, args):
    return y**2


def network(t, y, args):
    weights, force = args
    return jnp.tanh(weights @ y) - 0.1 * y**3 + force * jnp.sin(t)


def test_exact_solutions_of_a_pytree():
    def field(t, y, args):
        position, velocity = y["oscillator"]
        return {
            "decay": -y["decay"],
            "oscillator": (velocity, -(args["frequency"] ** 2) * position),
            "logistic": args["growth"] * y["logistic"] * (1 - y["logistic"]),
        }

    y0 = {"decay": [1.0, 2.0], "oscillator": (1.0, 0.0), "logistic": np.array([[0.1], [0.9]])}
    y0["decay"] = np.array(y0["decay"])
    path = integrate(field, y0, [0, 1, 2, 5], {"frequency": 3.0, "growth": 2.0})
    assert bool(path.ok)
    ts = np.array([0.0, 1.0, 2.0, 5.0])
    np.testing.assert_array_equal(path.ts, ts)
    exact = {
        "decay": np.exp(-ts)[:, None] * [[1.0, 2.0]],
        "oscillator": (np.cos(3 * ts), -3 * np.sin(3 * ts)),
        "logistic": 1 / (1 + np.array([[9.0], [1 / 9]]) * np.exp(-2 * ts)[:, None, None]),
    }
    assert jax.tree.structure(path.ys) == jax.tree.structure(y0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3e-7), path.ys, exact)


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_scipy_on_a_nonlinear_field(seed):
    random = np.random.default_rng(seed)
    weights, y0, force = random.normal(size=(4, 4)), random.normal(size=4), random.normal()
    ts = np.linspace(0.5, 6.0, 7)
    path = integrate(network, y0, ts, (weights, force), rtol=1e-11, atol=1e-12)
    oracle = solve_ivp(
        lambda t, y: np.tanh(weights @ y) - 0.1 * y**3 + force * np.sin(t),
        (ts[0], ts[-1]),
        y0,
        method="DOP853",
        t_eval=ts,
        rtol=1e-12,
        atol=1e-13,
    )
    np.testing.assert_allclose(path.ys, oracle.y.T, rtol=0, atol=1e-9)


def test_float32_is_kept_and_the_default_tolerances_can_be_met():
    path = integrate(decay, np.ones(2, np.float32), TIMES, 2.0)
    assert path.ys.dtype == path.ts.dtype == np.float32
    np.testing.assert_allclose(path.ys[:, 0], np.exp(-2 * np.array(TIMES)), rtol=2e-5)


def test_gradients_in_both_modes():
    def last(rate, adjoint):
        return integrate(decay, 1.0, [0.0, 2.0], rate, adjoint=adjoint).ys[-1]

    rate = jnp.array(0.7)
    exact = -2 * np.exp(-1.4)
    reverse = jax.grad(last)(rate, diffrax.RecursiveCheckpointAdjoint())
    _, forward = jax.jvp(lambda rate: last(rate, diffrax.ForwardMode()), (rate,), (jnp.ones(()),))
    np.testing.assert_allclose([reverse, forward], exact, rtol=5e-8)


def test_too_few_steps():
    with pytest.raises(RuntimeError, match=r"^integrate: the solver gave up after t = 1 \(limit: 6") as error:
        integrate(decay, 1.0, [0.0, 0.5, 1.0, 500.0], 2.0, max_steps=6)
    assert "\n" not in str(error.value)
    path = integrate(decay, 1.0, [0.0, 0.5, 1.0, 500.0], 2.0, max_steps=6, throw=False)
    assert not bool(path.ok)
    np.testing.assert_array_equal(np.isnan(path.ys), [False, False, False, True])


def test_lanes_fail_alone():
    """A NaN start, a blow-up at t = 0.25, bad times and tolerances leave the other lanes as they are."""
    starts = jnp.array([0.2, jnp.nan, 0.4, 4.0, 0.2, 0.2, 0.2, 0.2])
    ts = jnp.array([*[TIMES] * 4, TIMES[::-1], [0.0, jnp.nan, 1.0, 2.0], *[TIMES] * 2])
    rtol = jnp.full(8, 1e-8).at[6].set(jnp.nan)
    atol = jnp.full(8, 1e-10).at[7].set(-1.0)

    def run(y0, ts, rtol, atol):
        return integrate(square, y0, ts, rtol=rtol, atol=atol, throw=False)

    path = jax.vmap(run)(starts, ts, rtol, atol)
    assert path.ok.tolist() == [True, False, True, *[False] * 5]
    np.testing.assert_array_equal(np.isnan(path.ys[3]), [False, True, True, True])
    np.testing.assert_array_equal(np.isnan(path.ys[jnp.array([1, 4, 5, 6, 7])]), True)
    for lane in (0, 2):
        alone = integrate(square, starts[lane], TIMES)
        np.testing.assert_allclose(path.ys[lane], alone.ys, rtol=1e-10)
        np.testing.assert_allclose(alone.ys, 1 / (1 / starts[lane] - np.array(TIMES)), rtol=1e-7)
    with pytest.raises(
        RuntimeError, match=r"^integrate: the solution blows up near t = 0\.25, leaving every"
    ):
        integrate(square, starts[3], TIMES)


def test_a_field_that_turns_nan_ends():
    def field(t, y, args):
        return jnp.where(t > 0.7, jnp.nan, -y)

    path = integrate(field, 1.0, TIMES, throw=False)
    assert not bool(path.ok)
    np.testing.assert_allclose(path.ys[:2], np.exp([-0.0, -0.5]), rtol=1e-10)
    np.testing.assert_array_equal(np.isnan(path.ys[2:]), True)


# Every way to fail under every transformation, and one solve that succeeds; prints what is raised.
FAILURES = """
import json, logging, sys
from sims.startup import configure_jax
configure_jax(x64=True)
import diffrax, jax, jax.numpy as jnp, numpy as np
from dynamics.flow import integrate

hits = []

class Hits(logging.Handler):
    def emit(self, record):
        hits.append("cache hit for 'jit__solve'" in record.getMessage())

logger = logging.getLogger("jax._src.compiler")
logger.setLevel(logging.DEBUG)
logger.addHandler(Hits())

def field(t, y, args):
    turns_nan, blows_up, frequency = args
    return jnp.where(t > turns_nan, jnp.nan, blows_up * y**2 + frequency * jnp.cos(frequency * t))

def last(y, args):
    return integrate(field, y, [0.0, 2.0], args, solver=diffrax.Heun(), rtol=1e-3, max_steps=5000).ys[-1]

KINDS = {
    "none": (9.0, 0.0, 1.0),
    "steps": (9.0, 0.0, 1e6),
    "nan": (0.7, 0.0, 1.0),
    "blow-up": (9.0, 1.0, 0.0),
}
numbers = {kind: np.array(args) for kind, args in KINDS.items()}
WAYS = {"eager": last, "jit, vmap": jax.jit(jax.vmap(last, in_axes=(0, None))), "grad": jax.grad(last)}
found = {}
for way in sys.argv[1:]:
    solve = WAYS[way]
    start = np.ones(2) if "vmap" in way else np.ones(())
    for kind, args in numbers.items():
        if (way, kind) == ("grad", "none"):
            continue  # takes as long as all others together; test_gradients_in_both_modes has it
        try:
            jax.block_until_ready(solve(start, tuple(args)))
            found[f"{way}, {kind}"] = ""
        except (RuntimeError, ValueError) as error:
            found[f"{way}, {kind}"] = str(error)
print(json.dumps({"hits": sum(hits), "found": found}))
"""


@pytest.mark.parametrize(
    ("on_error", "ways", "processes"),
    [
        (None, ("jit, vmap", "grad"), 1),
        ("nan", ("eager", "jit, vmap", "grad"), 2),
    ],
)
def test_no_failure_is_silent(on_error, ways, processes, tmp_path):
    """What Equinox is told to do about errors changes nothing, nor does a program from the cache."""
    # Little is computed: compiling is quicker where nothing is optimized.
    environment = {
        **os.environ,
        "DYNASCOPE_CACHE": str(tmp_path),
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    environment.pop("EQX_ON_ERROR", None)
    if on_error is not None:
        environment["EQX_ON_ERROR"] = on_error
    command = [sys.executable, "-c", FAILURES, *ways]
    for process in range(processes):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        told = json.loads(done.stdout)
        assert len(told["found"]) == 4 * len(ways) - 1
        for case, message in told["found"].items():
            assert ("integrate: " in message) == (not case.endswith("none")), (case, message)
        assert (told["hits"] > 0) == (process == 1)


@pytest.mark.parametrize("throw", [True, False])
@pytest.mark.parametrize("solver", [diffrax.Dopri8, diffrax.Kvaerno5])
def test_only_a_program_that_raises_calls_the_host(solver, throw):
    """So do derivatives, which need no state; and what calls the host is never cached."""

    def last(y0):
        return integrate(decay, y0, TIMES, 2.0, solver=solver(), throw=throw).ys[-1]

    function = last if solver is diffrax.Kvaerno5 else jax.grad(last)
    assert ("callback" in jax.jit(function).lower(1.0).as_text()) == throw


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ts": 1.0}, r"^ts must have shape \(T,\) with T >= 1, got shape \(\)$"),
        ({"ts": []}, r"^ts must have shape \(T,\) with T >= 1, got shape \(0,\)$"),
        ({"ts": [[0.0, 1.0]]}, r"^ts must have shape \(T,\) with T >= 1, got shape \(1, 2\)$"),
        ({"ts": [0.0, 2.0, 1.0]}, r"^ts must increase strictly \(in float64\), got \[0\. 2\. 1\.\]$"),
        ({"ts": [0.0, 1.0, 1.0]}, r"^ts must increase strictly"),
        ({"ts": [0.0, 1.0, 1.0 + 1e-9], "y0": np.float32(1)}, r"^ts must increase strictly \(in float32\)"),
        ({"ts": [0.0, np.nan]}, r"^ts must be finite, got NaN or infinity$"),
        ({"y0": {}}, r"^y0 must hold at least one number, got none$"),
        ({"y0": np.zeros((0, 3))}, r"^y0 must hold at least one number, got none$"),
        ({"y0": (1.0, np.array([0.0, np.inf]))}, r"^y0 must be finite, got NaN or infinity$"),
        ({"rtol": -1e-6}, r"^rtol must be a finite number >= 0 and <= 1, got -1e-06$"),
        (
            {"rtol": [1e-6, 1e-6]},
            r"^rtol must be a finite number >= 0 and <= 1, got \[1e-06, 1e-06\]; jax.vmap",
        ),
        ({"rtol": 1e30}, r"^rtol must be a finite number >= 0 and <= 1, got 1e\+30$"),
        ({"atol": 1e30}, r"^atol must be at most 1, or the largest number of y0 .*, got 1e\+30$"),
        ({"atol": np.nan}, r"^atol must be a finite number >= 0, got nan$"),
        ({"max_steps": 0}, r"^max_steps must be a positive integer, got 0$"),
        ({"adjoint": diffrax.BacksolveAdjoint()}, r"^adjoint must be one of .*\(\), got Backsolve.*$"),
        ({"adjoint": diffrax.ImplicitAdjoint()}, r"^adjoint must be one of .*\(\), got Implicit.*$"),
        ({"solver": diffrax.Euler()}, r"^solver must estimate its error .*, got Euler.*$"),
        ({"solver": diffrax.KenCarp4()}, r"^solver must estimate its error .*, got KenCarp4.*$"),
    ],
)
def test_bad_input_is_named(change, message):
    arguments = {"y0": 1.0, "ts": TIMES, **change}
    with pytest.raises(ValueError, match=message):
        integrate(decay, arguments.pop("y0"), arguments.pop("ts"), 2.0, **arguments)


def test_other_numbers_compile_nothing():
    integrate(decay, 1.0, TIMES, 2.0)
    with count_compilations() as names:
        integrate(decay, 3.0, [1, 2.5, 3, 4], 0.5, rtol=1e-5, atol=1e-6)
    assert names == []
    growth = partial(lambda sign, t, y, rate: sign * rate * y, jnp.array(1.0))
    with count_compilations() as names:
        for rate in (2.0, 1.0):
            integrate(growth, 1.0, TIMES, rate)
    assert names == ["jit(_solve)"]


def test_one_time_gives_the_start():
    path = integrate(decay, 3, [1.5], 2.0)
    assert bool(path.ok)
    assert path.ys.tolist() == [3.0]


def test_gradient_flow_is_the_hand_written_field():
    A = np.array([[2.0, 0.5], [0.5, 1.0]])
    field = gradient_flow(lambda y, A: 0.5 * y @ A @ y)
    y = jnp.array([1.0, -2.0])
    np.testing.assert_allclose(field(0.0, y, A), -A @ y, rtol=1e-15)
    values, vectors = np.linalg.eigh(A)
    exact = vectors @ (np.exp(-2 * values) * (vectors.T @ y))
    np.testing.assert_allclose(integrate(field, y, TIMES, A).ys[-1], exact, rtol=5e-9)
    quartic = gradient_flow(lambda y: jnp.sum(y["a"] ** 4))
    np.testing.assert_allclose(quartic(0.0, {"a": y}, None)["a"], -4 * y**3, rtol=1e-15)


def test_inside_jit():
    @eqx.filter_jit
    def last(ts):
        return integrate(decay, 1.0, ts, 2.0, max_steps=8).ys[-1]

    np.testing.assert_allclose(last(jnp.array([0.0, 0.1])), np.exp(-0.2), rtol=1e-8)
    with pytest.raises(
        RuntimeError, match=r"integrate: the solver gave up \(limit: 8 steps\); raise max_steps"
    ):
        last(jnp.array([0.0, 500.0]))
    with pytest.raises(RuntimeError, match="integrate: y0, ts, rtol or atol is bad; throw=False tells where"):
        last(jnp.array([0.0, jnp.nan]))


FIELDS = {
    "blows up near t = 1": lambda t, y: y**2,
    "blows up near t = 1.0": lambda t, y: jnp.exp(y - 1) / 1.05,  # whose states stay small
    "blows up near t = 8": lambda t, y: y,  # where a number of 32 bits overflows
    "field is not finite near t = 0.7": lambda t, y: jnp.where(t > 0.7, jnp.nan, -y),
    "field is not finite near t = 2": lambda t, y: -jnp.sqrt(y),  # beyond zero
    "field is not finite near t = 0: ": lambda t, y: jnp.nan * y,
    "gave up after t = 0 (limit: 40000 steps); raise max_steps": lambda t, y: -1e4 * (y - jnp.cos(1e3 * t)),
}


def one_of_fields(t, y, which):
    return jax.lax.switch(which, list(FIELDS.values()), t, y)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_advice_fits_the_cause(dtype):
    for which, words in enumerate(FIELDS):
        end = 800.0 if "= 8" in words else 90.0
        words = words.replace("= 8", "= 70") if dtype == np.float64 else words
        with pytest.raises(RuntimeError, match=re.escape(words)) as error:
            integrate(
                one_of_fields,
                dtype(1),
                [0.0, end],
                np.array(which),
                solver=diffrax.Tsit5(),
                max_steps=40_000,
                rtol=1e-4,
                atol=1e-6,
            )
        assert "\n" not in str(error.value)


def test_a_derivative_in_the_other_mode_is_refused_with_the_remedy():
    def last(rate, adjoint=None):
        return integrate(decay, 1.0, [0.0, 1.0], rate, adjoint=adjoint).ys[-1]

    forward = partial(last, adjoint=diffrax.ForwardMode())
    for derivative in (jax.jacfwd(last), jax.jacfwd(jax.jit(last)), jax.hessian(last)):
        with pytest.raises(ValueError, match=r"forward mode .* pass adjoint=diffrax\.ForwardMode\(\)"):
            derivative(0.5)
    for derivative in (jax.grad(forward), jax.grad(jax.jit(forward))):
        with pytest.raises(
            RuntimeError, match=r"reverse mode .* leave adjoint out, or differentiate with jax\.jvp"
        ):
            derivative(0.5)
    np.testing.assert_allclose(jax.jacfwd(jax.jit(forward))(0.5), -np.exp(-0.5), rtol=1e-7)


def test_pieces():
    for ts, ys in ((np.arange(3), np.ones((2, 2))), (np.ones((2, 3)), {"y": np.ones(3)})):
        with pytest.raises(ValueError, match=r"^ys must have the axes of ts, \(.*3,?\), first, got shape"):
            Trajectory(ts, ys)
    assert jax.vmap(Trajectory)(np.ones((2, 3)), np.ones((2, 3, 1))).ok.tolist() == [True, True]
    path = Trajectory(jnp.zeros(3), (jnp.ones((3, 2)),), jnp.array(True))
    assert [leaf.shape for leaf in jax.tree.leaves(path)] == [(3,), (3, 2), ()]
    assert bool(all_finite({}))
    assert not bool(all_finite((jnp.ones(2), jnp.array([0.0, jnp.inf]))))


class Squares:
    """Fields y' = c y^2 that hold c in an object: in a call of it, or in a method."""

    def __init__(self, c):
        self.c = c

    def __call__(self, t, y, args):
        return self.c * y**2

    def method(self, t, y, args):
        return self(t, y, args)


# A field of the number c, by where it holds it.
HOLDERS = {
    "closure": lambda c: lambda t, y, args: c * y**2,
    "closure over an object": lambda c: partial(lambda held, t, y, args: held.c * y**2, SimpleNamespace(c=c)),
    "default": lambda c: lambda t, y, args, c=c: c * y**2,
    "partial": lambda c: partial(lambda c, t, y, args: c * y**2, c),
    "pytree": lambda c: jax.tree_util.Partial(lambda c, t, y, args: c * y**2, c),
    "compiled": lambda c: jax.jit(lambda t, y, args: c * y**2),
    "callable object": Squares,
    "bound method": lambda c: Squares(c).method,
}


@pytest.mark.parametrize("mode", ["reverse", "forward", "until"])
def test_a_failure_is_seen_in_derivatives_in_what_is_closed_over(mode):
    """y' = c y^2 blows up at 1 / c: in a lane that does, no derivative in c is a number."""
    options: dict = {"solver": diffrax.Heun(), "rtol": 1e-4, "atol": 1e-6}

    def reached(cs):
        fields = [hold(c) for hold, c in zip(HOLDERS.values(), cs[:-1], strict=True)]
        args = partial(lambda c, t, y, args: c * y**2, cs[-1])

        def field(t, y, args, fields=tuple(fields)):
            return jnp.stack([own(t, y, None) for own, y in zip([*fields, args], y, strict=True)])

        y0 = jnp.ones_like(cs)
        if mode == "until":
            return integrate_until(field, y0, 0.5, args, lambda t, y, args: jnp.array(False), **options)[
                0
            ].sum()
        adjoint = diffrax.ForwardMode() if mode == "forward" else None
        return (
            integrate(field, y0, [0.0, 0.5, 2.0], args, throw=False, adjoint=adjoint, **options).ys[1].sum()
        )

    derivative = jax.grad(reached) if mode == "reverse" else jax.jacfwd(reached)
    numbers = jnp.stack([jnp.full(len(HOLDERS) + 1, c) for c in (0.1, 1.0)])
    found = compiled(jax.vmap(derivative))(numbers)
    np.testing.assert_allclose(found[0], 0.5 / (1 - 0.5 * 0.1) ** 2, rtol=1e-3)
    assert mode == "until" or np.isnan(found[1]).all()


@pytest.mark.parametrize(("solver", "dtype"), [(diffrax.Tsit5, np.float32), (diffrax.Kvaerno3, np.float64)])
def test_derivatives_are_those_of_the_steps_that_are_kept(solver, dtype):
    """y' = -a sinh(y): trial steps overflow far up, to infinity too; at 800 all do, and the solve fails."""

    def last(rate, y0):
        return integrate(
            pull, y0, dtype([0, 1]), rate, solver=solver(), rtol=1e-4, atol=1e-4, throw=False
        ).ys[1]

    def pull(t, y, rate):
        return -rate * jnp.sinh(y)

    starts = dtype([*np.linspace(1, 0.45 * np.log(np.finfo(dtype).max), 50), 800])
    ys, slopes = jax.vmap(jax.value_and_grad(last), in_axes=(None, 0))(dtype(1), starts)
    exact = 2 * np.arctanh(np.exp(-1) * np.tanh(starts[:-1] / 2))
    np.testing.assert_allclose(ys[:-1], exact, rtol=3e-3)
    np.testing.assert_allclose(slopes[:-1], -np.sinh(exact), rtol=1e-2)
    assert np.isnan([ys[-1], slopes[-1]]).all()


def test_a_step_that_is_thrown_away_has_no_part_in_derivatives():
    """y' = -a sqrt(y): beyond zero its slope is infinite, and the steps that go there are thrown away."""

    def pull(t, y, rate):
        return -rate * jnp.sqrt(jnp.maximum(y, 0))

    def last(rate, end):
        options: dict = {"solver": diffrax.Tsit5(), "rtol": 1e-3, "atol": 1e-6, "throw": False}
        return integrate(pull, 1.0, jnp.stack([0.0, end]), rate, **options).ys[1]

    ends = jnp.linspace(1.0, 1.99, 60)
    slopes = jax.vmap(jax.grad(last), in_axes=(None, 0))(1.0, ends)
    np.testing.assert_allclose(slopes, -ends * (1 - ends / 2), rtol=0, atol=0.05)  # and so none is NaN


def test_checks_within_a_field_hold_while_it_is_differentiated():
    """A start far up makes the solver throw steps away."""

    def pull(t, y, rate):
        return -eqx.error_if(rate, rate <= 0, "rate must be positive") * jnp.sinh(y)

    def last(rate):
        options: dict = {"solver": diffrax.HalfSolver(diffrax.Heun(scan_kind="lax")), "rtol": 1e-3}
        return integrate(pull, 20.0, [0.0, 1.0], rate, **options, atol=1e-3, throw=False).ys[1]

    exact = 2 * np.arctanh(np.exp(-1) * np.tanh(10))
    np.testing.assert_allclose(jax.grad(last)(1.0), -np.sinh(exact), rtol=1e-2)
