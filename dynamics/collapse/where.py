"""Where data stand in the phase diagram: which modes collapse, and at which strength of what drives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import jax
import numpy as np

from dynamics.arguments import require_arrays, require_choice, require_concrete, require_shapes
from dynamics.collapse.moments import moments
from dynamics.collapse.nuclear import nuclear_minimum
from dynamics.collapse.vae import vae_minimum, vae_modes
from dynamics.flow import ArrayLike

Kind = Literal["vae", "supervised", "ssl"]
PARAMETERS = {"vae": "beta", "supervised": "gamma", "ssl": "augmentation variance"}
_LEFT_OUT = 1e-10  # of the largest threshold: directions that only rounding tells from constant ones
_ALIVE = 1e-9  # of the norm of E[y x^T]: singular values of the best map that are no rounding
_ACTIVE = 0.01  # variance of the posterior mean from which a unit counts as active, as users of VAEs have it


@dataclass(frozen=True)
class Unit:
    """A latent of a variational autoencoder at the global minimum.

    Attributes:
        variance: of its posterior mean over the data; users call it active above 0.01.
        sigma2: learned variance of its posterior.
        kl: its divergence from the prior, in nats, a mean over the data.
    """

    variance: float
    sigma2: float
    kl: float


@dataclass(frozen=True)
class Where:
    """What theory says of a data matrix.

    Attributes:
        kind: the model, "vae", "supervised" or "ssl".
        parameter: what drives collapse, in words.
        thresholds: its value at which each mode collapses, descending; infinite where a mode never does.
        value: its present value, or None.
        surviving: number of modes that survive there, or None.
        distance: how much larger it must become until the next mode collapses, or None.
        units: the latents of an autoencoder there, the largest mode first.
        notes: what to know about the answer, a sentence each.
    """

    kind: Kind
    parameter: str
    thresholds: tuple[float, ...]
    value: float | None
    surviving: int | None
    distance: float | None
    units: tuple[Unit, ...]
    notes: tuple[str, ...]


def where(
    kind: Kind,
    x: ArrayLike,
    target: ArrayLike | None = None,
    *,
    value: float | None = None,
    attraction: float = 1.0,
) -> Where:
    r"""Where data stand in the phase diagram of a linear model: thresholds of collapse, and what survives.

    - "vae": a linear variational autoencoder with decoder noise and prior of variance one. Mode i collapses
      at beta = zeta_i^2, see `vae_modes`; without a target these are the eigenvalues of the covariance.
    - "supervised": a two-layer linear network with L2 regularization gamma of both layers, on E |f - y|^2.
      All modes are gone at the largest singular value of E[y x^T]; the other ones are thresholds where inputs
      are white, and what survives is computed from the exact minimum.
    - "ssl": a linear encoder under the Gaussian InfoNCE loss with augmentations of one variance in all
      directions. Mode i collapses where that is a_i / (attraction - 1), a_i the eigenvalues of the
      covariance.

    Source: ziyin2022talk, Theorem 1 and Theorem 2 (linear latent variable model), slides on self-supervision.

    Args:
        kind: the model.
        x: data, (N, d), centered here.
        target: what is predicted, (N, k), centered here; supervised models need it, and ssl has none.
        value: beta, gamma or the augmentations' variance, >= 0; thresholds alone where None.
        attraction: weight of the attraction in InfoNCE, >= 0; it is 1 in the usual loss.

    Returns:
        A `Where`, of Python numbers, computed in 64-bit. Thresholds below 1e-10 of the largest are left out.

    Raises:
        ValueError: an argument is out of range, traced, or not for this kind.

    Example:
        >>> x = [[1.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [0.0, -2.0]]
        >>> found = where("vae", x, value=1.0)
        >>> [round(beta, 6) for beta in found.thresholds], found.surviving, round(found.distance, 6)
        ([2.0, 0.5], 1, 1.0)
    """
    # Which modes are rounding is told in 64-bit alone, whatever the caller's setting.
    with jax.enable_x64(True), jax.ensure_compile_time_eval():
        require_choice("kind", kind, get_args(Kind))
        x = require_concrete("x", x)
        y = None if target is None else require_concrete("target", target)
        value = None if value is None else _number("value", value)
        attraction = _number("attraction", attraction)
        if kind != "ssl" and attraction != 1:
            raise ValueError(f"attraction must be left out for kind {kind!r}, got {attraction:g}")
        if (kind == "supervised") != (y is not None) and kind != "vae":
            raise ValueError(f"target must {'be given' if y is None else 'be left out'} for kind {kind!r}")
        arrays = require_arrays(x=np.float64(x), target=np.float64(x if y is None else y))
        require_shapes(x=(arrays[0], "N d"), target=(arrays[1], "N k"))
        x, y = (part - part.mean(axis=0) for part in map(np.asarray, arrays))
        with np.errstate(over="ignore"):
            if not np.isfinite(np.sum(x**2) + np.sum(y**2)):
                raise ValueError(
                    "x and target must have squares that are finite numbers; divide them by their size"
                )
        notes = _about(x)
        if kind == "vae":
            return _vae(np.asarray(vae_modes(x, y)), value, notes)
        if kind == "supervised":
            return _supervised(x, y, value, notes)
        return _ssl(np.asarray(vae_modes(x)) ** 2, value, attraction, notes)


def _number(name: str, value: Any) -> float:
    number = require_concrete(name, value)
    if number.ndim != 0 or not number >= 0:
        raise ValueError(f"{name} must be a finite number >= 0, got {value}")
    return float(number)


def _about(x: np.ndarray) -> list[str]:
    """What makes thresholds of these inputs less than they seem."""
    notes = []
    constant = int(np.sum(np.ptp(x, axis=0) == 0))
    if constant:
        notes.append(f"{constant} of {x.shape[1]} columns are constant: they have no modes")
    if x.shape[0] < x.shape[1]:
        notes.append(f"fewer rows ({x.shape[0]}) than columns ({x.shape[1]}): at most {x.shape[0] - 1} modes")
    return notes


def _placed(kind: Kind, thresholds: np.ndarray, value: float | None, notes: list[str], **known: Any) -> Where:
    finite = thresholds[np.isfinite(thresholds)]
    kept = thresholds[thresholds > _LEFT_OUT * np.max(finite, initial=0.0)]
    surviving = distance = None
    if value is not None:
        surviving = known.pop("surviving", int(np.sum(kept > value)))
        above = kept[kept > value]
        distance = float(above[-1] - value) if above.size else None
    units, every = known.get("units", ()), tuple(map(float, kept))
    return Where(kind, PARAMETERS[kind], every, value, surviving, distance, units, tuple(notes))


def _vae(zeta: np.ndarray, value: float | None, notes: list[str]) -> Where:
    if value is None or not zeta.any():
        return _placed("vae", zeta**2, value, notes)
    kept = zeta[zeta**2 > _LEFT_OUT * zeta[0] ** 2]
    least = vae_minimum(np.diag(kept), kept.size, value, 1.0, 1.0)
    units = []
    for theta, sigma2 in zip(np.asarray(least.theta), np.asarray(least.sigma2), strict=True):
        with np.errstate(divide="ignore"):  # without a prior's weight nothing keeps the variance from zero
            kl = float(theta**2 + sigma2 - 1 - np.log(sigma2)) / 2
        units.append(Unit(float(theta**2), float(sigma2), kl))
    active = sum(unit.variance > _ACTIVE for unit in units)
    surviving = int(np.sum(kept**2 > value))
    if active != surviving:
        notes.append(f"{surviving - active} of the surviving modes have a variance below {_ACTIVE}")
    return _placed("vae", zeta**2, value, notes, units=tuple(units))


def _supervised(x: np.ndarray, y: np.ndarray, value: float | None, notes: list[str]) -> Where:
    data = moments(x, y)
    signal = np.linalg.svd(np.asarray(data.c), compute_uv=False)
    notes.append("thresholds but the largest are exact for white inputs; survivors are exact for these")
    if value is None:
        return _placed("supervised", signal, value, notes)
    best = np.asarray(nuclear_minimum(data, value, value).B)
    values = np.linalg.svd(best, compute_uv=False)
    return _placed("supervised", signal, value, notes, surviving=int(np.sum(values > _ALIVE * signal[0])))


def _ssl(variances: np.ndarray, value: float | None, attraction: float, notes: list[str]) -> Where:
    if attraction <= 1:
        notes.append(
            f"nothing collapses at attraction {attraction:g}: the loss is quadratic with E[x x^T] less "
            "(attraction - 1) times the augmentations' covariance, which is positive whatever they are"
        )
        return _placed("ssl", np.where(variances > _LEFT_OUT * variances[0], np.inf, 0), value, notes)
    if value == 0:
        notes.append("without augmentation the loss has no finite minimum: nothing keeps embeddings small")
    return _placed("ssl", variances / (attraction - 1), value, notes)
