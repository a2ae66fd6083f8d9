"""Gradient flow of networks that depend on products of weights, beta = u v, from tiny starts.

The network is any smooth function h(x; beta) of the p products; the theory needs of it nothing but the
negative gradient g(beta) = -d/dbeta E l(y, h(x; beta)).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float

from dynamics.arguments import (
    ArrayLike,
    as_real,
    brief,
    cast,
    is_traced,
    nan_unless,
    require_every,
    require_finite,
    require_positive,
    require_shapes,
    require_times,
)
from dynamics.derivatives import nan_derivatives
from dynamics.flow import Trajectory, integrate

NegGradient = Callable[[Any], Any]

# Exponents above this number are clipped: a step that is tried and rejected must not overflow. Products
# that large (e^20 / 4, above 1e8) are flagged.
_CLIP = 20.0
# From this log(1 / alpha) on active products make the flow too stiff for an explicit solver.
_STIFF = 40.0


class Products(NamedTuple):
    """The weights of `raw_flow`: beta = u v.

    Attributes:
        u: first factors, (..., p).
        v: second factors, (..., p).
    """

    u: Array | Any
    v: Array | Any


class LogProducts(NamedTuple):
    """The state of `log_flow`.

    Attributes:
        beta: the products u v, (T, p).
        b: log scale -log(u + v) / log(1 / alpha), (T, p): near 0 where the product is active and positive,
            near 2 where it is active and negative, in between where it is negligible.
    """

    beta: Array
    b: Array


def negative_gradient(loss: Callable[..., Array], *data: Any) -> Partial:
    r"""The negative gradient g(beta) = -d loss(beta, *data) / d beta that this module's functions take.

    Source: boixadsera2023, Equation 4.

    Args:
        loss: scalar function `loss(beta, *data)` of the p products.
        data: what else the loss takes; traced, so that other data of the same shapes compile nothing anew.

    Returns:
        A function of beta (p,) that gives g (p,).

    Example:
        >>> loss = lambda beta, target: 0.5 * jnp.sum((beta - target) ** 2)
        >>> negative_gradient(loss, jnp.array([1.0, 2.0]))(jnp.zeros(2)).tolist()
        [1.0, 2.0]
    """
    return Partial(_negative_gradient, Partial(loss), data)


def _negative_gradient(loss, data, beta):
    return -jax.grad(loss)(beta, *data)


def conserved_quantity(u: ArrayLike, v: ArrayLike) -> Array:
    r"""u^2 - v^2 of every coordinate, which gradient flow conserves.

    Source: boixadsera2023, Lemma 4.1. In finite precision its drift says nothing relative to alpha^2 where
    products are active: their squares cancel.

    Example:
        >>> conserved_quantity([2.0], [1.0]).tolist()
        [3.0]
    """
    u, v = as_real("u", u), as_real("v", v)
    return (u - v) * (u + v)


def canonical_start(u0: ArrayLike, v0: ArrayLike) -> tuple[Float[Array, " p"], Float[Array, " p"]]:
    r"""Sum w0 and difference z0 of the factors, after the exchange and sign flips that make both positive.

    Exchanging u_i with v_i, or flipping both signs, changes neither beta nor its flow: u_i > |v_i| may be
    assumed. Then w = u + v and z = u - v stay positive, with dw/dt = w g, dz/dt = -z g and w z constant.

    Source: boixadsera2023, Equation 6 and Appendix C.3.

    Args:
        u0: first factors, (p,), of any sign and order.
        v0: second factors, (p,).

    Returns:
        w0 and z0, (p,) each; one of them is zero where the magnitudes are equal.

    Raises:
        ValueError: the shapes are not one shape (p,), or a number is not finite.

    Example:
        >>> [x.tolist() for x in canonical_start([1.0, -1.0], [-2.0, 0.5])]
        [[1.0, 0.5], [3.0, 1.5]]
    """
    return _canonical(*require_factors(u0, v0))


@jax.jit
def _canonical(u0, v0):
    large = jnp.maximum(jnp.abs(u0), jnp.abs(v0))
    small = jnp.minimum(jnp.abs(u0), jnp.abs(v0)) * jnp.sign(u0) * jnp.sign(v0)
    return large + small, large - small


def raw_flow(
    neg_gradient: NegGradient,
    u0: ArrayLike,
    v0: ArrayLike,
    ts: ArrayLike,
    *,
    solver: diffrax.AbstractSolver | None = None,
    rtol: ArrayLike = 1e-8,
    atol: ArrayLike = 1e-10,
    max_steps: int = 100_000,
    throw: bool = True,
    adjoint: diffrax.AbstractAdjoint | None = None,
) -> Trajectory:
    r"""The flow of both factors, du/dt = v g(u v), dv/dt = u g(u v), from starts of order one.

    From a tiny start it loses u + v to cancellation without a sign of it: where a product becomes active
    with the other sign after its u + v has sunk below machine precision, this flow has it stay negligible for
    ever. `log_flow` does not.

    Source: boixadsera2023, Equation 4.

    Args:
        neg_gradient: g, a function of beta (p,), for instance from `negative_gradient`.
        u0: first factors at ts[0], (p,).
        v0: second factors, (p,).
        ts: times, (T,), increasing.
        solver: a diffrax solver; Dopri8 where None.
        rtol: relative tolerance.
        atol: absolute tolerance; it must be far below the start.
        max_steps: the most steps the solver may take.
        throw: raise when the solve fails; with False it is `ok=False`.
        adjoint: how the solve is differentiated, as for `dynamics.flow.integrate`.

    Returns:
        A `Trajectory` whose `ys` are `Products`, (T, p) each.

    Raises:
        ValueError: a shape, a number, a time or a tolerance is bad.
        RuntimeError: the solve failed and `throw` is true.

    Example:
        >>> g = negative_gradient(lambda beta: 0.5 * jnp.sum((beta - 2.0) ** 2))
        >>> [round(float(x[-1, 0]), 6) for x in raw_flow(g, [1.0], [0.5], [0.0, 20.0]).ys]  # u v = 2
        [1.55237, 1.288353]
    """
    u0, v0 = require_factors(u0, v0)
    neg_gradient = require_gradient(neg_gradient, u0.size, u0.dtype)
    return integrate(
        _raw_field,
        Products(u0, v0),
        ts,
        neg_gradient,
        solver=solver,
        rtol=rtol,
        atol=atol,
        max_steps=max_steps,
        throw=throw,
        adjoint=adjoint,
    )


def _raw_field(t, weights, neg_gradient):
    g = neg_gradient(weights.u * weights.v)
    return Products(weights.v * g, weights.u * g)


def log_flow(
    neg_gradient: NegGradient,
    u0: ArrayLike,
    v0: ArrayLike,
    log_inv_alpha: ArrayLike,
    taus: ArrayLike,
    *,
    solver: diffrax.AbstractSolver | None = None,
    rtol: ArrayLike | None = None,
    atol: ArrayLike | None = None,
    max_steps: int = 100_000,
    throw: bool = True,
    adjoint: diffrax.AbstractAdjoint | None = None,
) -> Trajectory:
    r"""The exact gradient flow from (alpha u0, alpha v0), for any alpha, in rescaled time tau = t / lam.

    lam = log(1 / alpha) enters, never alpha. With w = u + v = exp(-lam b) the conservation law leaves one
    number per product,

        db/dtau = -g(beta),   beta = (exp(-2 lam b) - (w0 z0)^2 exp(-2 lam (2 - b))) / 4,

    b(0) = 1 - log(w0) / lam, where w0, z0 are those of `canonical_start`. All that is integrated is of order
    one, so that alpha = 1e-1000 is as good as any.

    Source: boixadsera2023, Equations 6, 12 and 13 (the reduction is derived here).

    Args:
        neg_gradient: g, a function of beta (p,), for instance from `negative_gradient`.
        u0: first factors over alpha, (p,), of order one, of any sign and order.
        v0: second factors over alpha, (p,).
        log_inv_alpha: lam = log(1 / alpha), positive; may be traced.
        taus: rescaled times, (T,), increasing and not negative. The flow starts at zero; taus[0] may be
            later.
        solver: a diffrax solver. Where None: Dopri8 if lam is known to be below 40, or in 32-bit, else
            Kvaerno5, since active products decay at rates that grow with lam.
        rtol: relative tolerance; 1e-7 where None, 1e-4 in 32-bit.
        atol: absolute tolerance; 1e-9 where None, 1e-6 in 32-bit.
        max_steps: the most steps the solver may take.
        throw: raise when the solve fails; with False it is `ok=False`, per lane under `vmap`.
        adjoint: how the solve is differentiated, as for `dynamics.flow.integrate`.

    Returns:
        A `Trajectory` with `ts` = taus whose `ys` are `LogProducts`, (T, p) each. Where it is not `ok`, all
        their derivatives are NaN.

    Raises:
        ValueError: u0 and v0 have equal magnitude in a coordinate (the product could never take one of its
            two signs), a shape, a time or a tolerance is bad, or `log_inv_alpha` is not positive.
        RuntimeError: the solve failed, or a product grew above 1e8, and `throw` is true.

    Example:
        >>> g = negative_gradient(lambda beta: 0.5 * jnp.sum((beta - 2.0) ** 2))
        >>> path = log_flow(g, [1.0], [0.5], 1000 * jnp.log(10.0), [0.4, 0.6])  # alpha = 1e-1000
        >>> path.ys.beta[:, 0].round(6).tolist()  # active from 1 / g(0) = 0.5 on
        [0.0, 2.0]
    """
    w0, z0 = require_start(u0, v0)
    dtype = w0.dtype
    lam = require_positive("log_inv_alpha", log_inv_alpha, dtype)
    neg_gradient = require_gradient(neg_gradient, w0.size, dtype)
    taus = require_times(taus, dtype, "taus")
    taus = require_every("taus", taus, lambda tau: tau >= 0, ">= 0")

    double = jnp.finfo(dtype).bits >= 64
    if solver is None:
        explicit = not double or (not is_traced(lam) and float(lam) < _STIFF)
        solver = diffrax.Dopri8() if explicit else diffrax.Kvaerno5()
    rtol = (1e-7 if double else 1e-4) if rtol is None else rtol
    atol = (1e-9 if double else 1e-6) if atol is None else atol

    b0, times, constants = _log_problem(w0, z0, lam, taus)
    path = integrate(
        _log_field,
        b0,
        times,
        (neg_gradient, *constants),
        solver=solver,
        rtol=rtol,
        atol=atol,
        max_steps=max_steps,
        throw=throw,
        adjoint=adjoint,
    )
    products, within = _log_products(path.ys, *constants)
    ok = path.ok & within
    if throw:
        message = "log_flow: a product grew above 1e8, the most there may be; has the loss no minimum?"
        if not is_traced(ok) and not bool(ok):
            raise RuntimeError(message)
        if is_traced(ok):
            # As `integrate` does: derivatives need the states no more, but this choice.
            ok = eqx.error_if(ok, ~ok, message, on_error="raise")
            products = jax.tree.map(lambda leaf: nan_unless(ok, leaf), products)
    return Trajectory(taus, nan_derivatives(~ok, products, (neg_gradient, b0, times, constants)), ok)


@jax.jit
def _log_problem(w0, z0, lam, taus):
    """Start, times and constants of the flow. The start is NaN where an argument is."""
    b0 = 1 - jnp.log(w0) / lam
    # The flow starts a hair before zero, so that taus[0] = 0 can be asked for.
    start = jnp.full(1, -1e-30, w0.dtype)
    # Implicit solvers differentiate all lanes alike: where one has NaN inside of them, all derivatives are.
    good = jnp.all(jnp.isfinite(b0))
    constants = jnp.where(good, lam, 1), jnp.where(good, jnp.log(w0 * z0), 0)
    return b0, jnp.concatenate([start, taus]), constants


@jax.jit
def _log_products(bs, lam, log_c):
    """What is returned of the log scales, the first of which was not asked for; and whether it is bounded."""
    b = bs[1:]
    beta = jax.vmap(_beta, in_axes=(0, None, None))(b, lam, log_c)
    return LogProducts(beta, b), jnp.all(jnp.abs(beta) < np.exp(_CLIP) / 4)


def _beta(b, lam, log_c):
    """The products at log scale b, where log_c = log(w0 z0)."""
    clip = jnp.asarray(_CLIP, b.dtype)
    plus = jnp.exp(jnp.minimum(-2 * lam * b, clip))
    minus = jnp.exp(jnp.minimum(2 * log_c - 2 * lam * (2 - b), clip))
    return (plus - minus) / 4


def _log_field(tau, b, args):
    neg_gradient, lam, log_c = args
    return -neg_gradient(_beta(b, lam, log_c))


def require_factors(u0: ArrayLike, v0: ArrayLike) -> tuple[Array, Array]:
    """First and second factors, which are finite, of one shape (p,) and of one dtype."""
    u0, v0 = as_real("u0", u0), as_real("v0", v0)
    require_shapes(u0=(u0, "p"), v0=(v0, "p"))
    dtype = jnp.promote_types(u0.dtype, v0.dtype)
    return cast(require_finite("u0", u0), dtype), cast(require_finite("v0", v0), dtype)


def require_start(u0: ArrayLike, v0: ArrayLike, dtype: Any = None) -> tuple[Array, Array]:
    """`canonical_start` of factors that differ in magnitude, both of which are then positive."""
    u0, v0 = require_factors(u0, v0)
    if not is_traced(u0, v0):
        equal = np.flatnonzero(np.abs(np.asarray(u0)) == np.abs(np.asarray(v0)))
        if equal.size:
            raise ValueError(
                f"u0 and v0 must differ in magnitude, got equal ones in coordinate {equal[0]}: "
                "its product can take one sign only"
            )
    w0, z0 = _canonical(u0, v0)
    good = jnp.minimum(w0, z0) > 0
    return nan_unless(good, w0), nan_unless(good, z0)


def require_gradient(neg_gradient: Any, size: int, dtype: Any) -> NegGradient:
    """The negative gradient, a function from (p,) to (p,), with the tracers in it as leaves of a pytree.

    What a function closes over is hidden from the rules of differentiation for failures.
    """
    if not callable(neg_gradient):
        raise ValueError(f"neg_gradient must be a function of beta, got {brief(neg_gradient)}")
    beta = jax.ShapeDtypeStruct((size,), dtype)
    converted = eqx.filter_closure_convert(neg_gradient, beta)
    found = eqx.filter_eval_shape(converted, beta)
    if getattr(found, "shape", None) != (size,) or found.dtype != dtype:
        raise ValueError(
            f"neg_gradient must map beta of shape ({size},) and {jnp.dtype(dtype)} to the same, got {found}"
        )
    # A function without tracers stays the object that it is, so that nothing is compiled anew.
    return converted if is_traced(eqx.filter(converted, eqx.is_array)) else neg_gradient
