"""Options of GaLore: names, defaults and checks. The docstring of `scale_by_galore` explains each."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, ParamSpec, TypeVar

import optax
from jax.core import Tracer

from .adam import scale_by_adam_uncorrected
from .checks import require_axes, require_choice, require_count, require_number
from .labels import labeller
from .paths import Parameter, is_single
from .projection import Projection
from .refresh import Refresh

Moments = Literal["align", "carry", "transport", "reset"]
EpsConvention = Literal["corrected", "uncorrected"]

# What others call these options.
_CALLED = {
    "update_proj_gap": "update_gap",
    "base_optimizer": "inner",
    "weight_dimension_numbers": "matrix_axes",
    "proj_type": "projection",
}

_Options = TypeVar("_Options")
_Taken = ParamSpec("_Taken")
_Returned = TypeVar("_Returned")

# Each of these options is one value for all leaves, or tells a value for each.
OF_LEAVES: dict[str, Callable[[str, Any], Any]] = {
    "rank": require_count,
    "update_gap": require_count,
    "scale": require_number,
    "projection": partial(require_choice, choices=Projection),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The class holds the arguments of `scale_by_galore`, and checks what needs no parameters."""

    rank: Any = field(kw_only=False)
    update_gap: Any = 200
    scale: Any = 0.25
    projection: Any = "std"
    inner: Any = None
    refresh: Refresh | str = "eigh"
    moments: Moments | str = "align"
    matrix_axes: Any = None
    stagger: bool = False
    drop_noise: bool = True
    b1: Any = 0.9
    b2: Any = 0.999
    eps: Any = 1e-8
    eps_convention: EpsConvention | str = "corrected"

    def __post_init__(self) -> None:
        for argument, require in OF_LEAVES.items():
            option = getattr(self, argument)
            if option is None:
                raise ValueError(f"{argument} must be a number, a pytree of numbers or a function, got None")
            if is_single(option):
                require(argument, option)
        require_choice("refresh", self.refresh, Refresh)
        require_choice("moments", self.moments, Moments)
        require_choice("eps_convention", self.eps_convention, EpsConvention)
        self._require_numbers(b1=1.0, b2=1.0, eps=math.inf)
        if self.matrix_axes is not None and not callable(self.matrix_axes):
            require_axes(self.matrix_axes)
        if self.inner is not None and not isinstance(self.inner, optax.GradientTransformation):
            raise ValueError(
                f"inner must be an Optax transformation such as optax.scale_by_adam(), got {self.inner!r}"
            )

    def _require_numbers(self, **bounds: float) -> None:
        for argument, bound in bounds.items():
            number = require_number(argument, getattr(self, argument), below=bound)
            object.__setattr__(self, argument, number)

    def wanted(self, every: list[Parameter]) -> list[bool]:
        """Tell which parameters are projected if they are matrices."""
        return [True] * len(every)

    def adam(self) -> optax.GradientTransformation:
        """Return Adam with the decays and the epsilon of the options."""
        if self.eps_convention == "uncorrected":
            return scale_by_adam_uncorrected(self.b1, self.b2, self.eps)
        return optax.scale_by_adam(self.b1, self.b2, self.eps)

    def has_default_adam(self) -> bool:
        """Tell whether the options of Adam are the defaults, but for those that are traced."""
        names = ("b1", "b2", "eps", "eps_convention")
        given = [(getattr(self, name), getattr(Options, name)) for name in names]
        return all(isinstance(value, Tracer) or value == default for value, default in given)


@dataclass(frozen=True, kw_only=True)
class _OfGalore:
    learning_rate: Any = field(kw_only=False)
    weight_decay: Any = 0.0
    mask: Any = None
    labels: Any = None
    plain: Any = None


# A dataclass takes the fields of its last base first: `galore` is called with a learning rate, then a rank.
@dataclass(frozen=True, kw_only=True)
class GaloreOptions(Options, _OfGalore):
    """The class holds the arguments of `galore`: its own, and all of `scale_by_galore`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require_numbers(weight_decay=math.inf)
        if not callable(self.learning_rate):
            self._require_numbers(learning_rate=math.inf)

    def wanted(self, every: list[Parameter]) -> list[bool]:
        """Tell which parameters are labelled "galore"."""
        label = labeller(self.labels, every)
        return [label(parameter) == "galore" for parameter in every]


def options_of(
    function: str, options: Callable[..., _Options], arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> _Options:
    """Return the options of a call; what does not fit the signature is told with the function's own name."""
    try:
        inspect.signature(options).bind(*arguments, **keywords)
    except TypeError as error:
        hint = "".join(f"; {old} is called {new} here" for old, new in _CALLED.items() if old in keywords)
        raise TypeError(f"{function}: {error}{hint}") from None
    return options(*arguments, **keywords)


def signature_of(
    options: Callable[_Taken, Any],
) -> Callable[[Callable[..., _Returned]], Callable[_Taken, _Returned]]:
    """Give a function that hands all of its arguments to a class of options the signature of that class.

    So type checkers, editors and `help` show every option with its default, and each stands in one place.
    """

    def sign(function: Callable[..., _Returned]) -> Callable[_Taken, _Returned]:
        returned = inspect.signature(function).return_annotation
        signature = inspect.signature(options).replace(return_annotation=returned)
        function.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
        return function

    return sign
