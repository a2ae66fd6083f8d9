"""Variational autoencoders with a linear decoder, whose latents are really drawn."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PyTree

from dynamics.arguments import (
    ArrayLike,
    as_real,
    cast,
    require_arrays,
    require_integer,
    require_number,
    require_positive,
    require_shapes,
    require_sizes,
)
from dynamics.collapse import VaeWeights
from models.draws import normal


class VaeInputs(NamedTuple):
    """Inputs of an autoencoder, with what its latents are drawn from.

    Attributes:
        x: inputs, (n, dx), centered: there is no bias that could take up their mean.
        noise: standard normal numbers, (n, k); latents have their mean where there are none.
    """

    x: Any
    noise: Any = None


class VaeOutputs(NamedTuple):
    """What an autoencoder makes of its inputs.

    Attributes:
        y: what is decoded from the latents, (n, dy).
        mean: means of the latents, (n, k).
        log_variance: logs of their variances, (n, k).
    """

    y: Array
    mean: Array
    log_variance: Array


class LinearVae(nnx.Module):
    r"""A linear autoencoder, y = U z with z = W^T x + s * noise, and one scale s per latent for all inputs.

    Its layers are `flax.nnx.Linear` without biases; `vae_weights` gives the weights back, the coordinates of
    `dynamics.collapse.linear_vae_flow`.

    Source: ziyin2022talk, Theorem 2 (linear latent variable model) (its model).

    Args:
        weights: the `VaeWeights` to start from, with logs of variances, (k,).

    Raises:
        ValueError: the weights, or the inputs or the noise, do not fit together.

    Example:
        >>> network = LinearVae(VaeWeights([[3.0]], [[2.0]], [0.0]))
        >>> network(VaeInputs(jnp.ones((1, 1)), jnp.full((1, 1), 0.5))).y.tolist()
        [[7.5]]
    """

    def __init__(self, weights: VaeWeights):
        U, W, log_variance = require_arrays(U=weights[0], W=weights[1], log_variance=weights[2])
        require_shapes(U=(U, "dy k"), W=(W, "dx k"), log_variance=(log_variance, "k"))
        self.encoder = _linear(W)
        self.decoder = _linear(U.T)
        self.log_variance = nnx.Param(log_variance)

    def __call__(self, inputs: VaeInputs) -> VaeOutputs:
        """Outputs, latents drawn with the given noise."""
        x = _require_inputs(inputs, self.encoder.in_features)
        mean = self.encoder(x)
        return _decoded(
            self.decoder, inputs.noise, mean, jnp.broadcast_to(self.log_variance[...], mean.shape)
        )


class AmortizedVae(nnx.Module):
    """An autoencoder whose encoder has a hidden layer of ReLU, and a log variance for each input and latent.

    With a linear decoder it has the least loss of the linear one for y = x, or where E[y|x] is linear in x:
    among all laws of latents the best is normal, its mean is linear in E[y|x] and its covariance does not
    depend on x.

    Args:
        key: PRNG key of the first weights.
        inputs: numbers in an input.
        hidden: units of the hidden layer; 2 k can stand for k linear latents.
        latents: k.
        outputs: numbers in an output.
        dtype: floating dtype; JAX's default where None.

    Raises:
        ValueError: a size is not positive, or the inputs or the noise do not fit.

    Example:
        >>> network = AmortizedVae(jax.random.key(0), 3, 8, 2, 3)
        >>> [part.shape for part in network(VaeInputs(jnp.ones((5, 3))))]
        [(5, 3), (5, 2), (5, 2)]
    """

    def __init__(self, key: Array, inputs: int, hidden: int, latents: int, outputs: int, dtype: Any = None):
        require_sizes(inputs=inputs, hidden=hidden, latents=latents, outputs=outputs)
        dtype = jnp.result_type(float) if dtype is None else dtype
        sizes = {"hidden": (inputs, hidden), "mean": (hidden, latents), "decoder": (latents, outputs)}
        kernels = {
            name: normal(k, shape, dtype) / shape[0] ** 0.5
            for (name, shape), k in zip(sizes.items(), jax.random.split(key, len(sizes)), strict=True)
        }
        self.hidden = _linear(kernels["hidden"], bias=True)
        self.mean = _linear(kernels["mean"], bias=True)
        self.log_variance = _linear(jnp.zeros((hidden, latents), dtype), bias=True)
        self.decoder = _linear(kernels["decoder"])

    def __call__(self, inputs: VaeInputs) -> VaeOutputs:
        """Outputs, latents drawn with the given noise."""
        h = nnx.relu(self.hidden(_require_inputs(inputs, self.hidden.in_features)))
        return _decoded(self.decoder, inputs.noise, self.mean(h), self.log_variance(h))


def _linear(kernel: Array, bias: bool = False) -> nnx.Linear:
    options: Any = {"kernel_init": lambda *_: kernel, "param_dtype": kernel.dtype, "rngs": nnx.Rngs(0)}
    return nnx.Linear(*kernel.shape, use_bias=bias, **options)


def _require_inputs(inputs: VaeInputs, size: int) -> Array:
    x = as_real("x", inputs.x)
    if x.ndim != 2 or x.shape[1] != size:
        raise ValueError(f"x must have shape (n, {size}), got shape {x.shape}")
    return x


def _decoded(decoder: nnx.Linear, noise: Any, mean: Array, log_variance: Array) -> VaeOutputs:
    z = mean
    if noise is not None:
        noise = as_real("noise", noise)
        if noise.shape != mean.shape:
            raise ValueError(f"noise must have shape {mean.shape}, that of latents, got shape {noise.shape}")
        z = mean + jnp.exp(log_variance / 2) * noise
    return VaeOutputs(decoder(z), mean, log_variance)


def vae_weights(params: PyTree) -> VaeWeights:
    """The weights in the parameters of a `LinearVae`, leading axes kept: what a theory looks at.

    Raises:
        ValueError: the parameters have other names than those of a `LinearVae`.

    Example:
        >>> from models.functional import as_function
        >>> start = VaeWeights([[3.0], [1.0]], [[2.0]], [0.0])
        >>> [part.shape for part in vae_weights(as_function(LinearVae(start))[1])]
        [(2, 1), (1, 1), (1,)]
    """
    leaves = {
        "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }
    names = ("decoder/kernel", "encoder/kernel", "log_variance")
    if set(leaves) != set(names):
        raise ValueError(f"params must be those of a LinearVae, {', '.join(names)}, got {sorted(leaves)}")
    decoder, encoder, log_variance = (leaves[name] for name in names)
    return VaeWeights(jnp.swapaxes(decoder, -1, -2), encoder, log_variance)


def negative_elbo(params: PyTree, data: Any) -> Float[Array, ""]:
    r"""Minus the evidence bound of a sample, up to constants, for data = (f, X, Y, (beta, eta_dec, eta_enc)).

        (1/N) sum_x [ |f(x).y - y|^2 / (2 eta_dec^2)
            + (beta / 2) sum_i ((m_i^2 + s_i^2) / eta_enc^2 - 1 - log(s_i^2 / eta_enc^2)) ]

    for latents of means m and variances s^2 that the network f(params, X) gives. Its mean over the noise in
    X is `dynamics.collapse.linear_vae_loss` for a linear network, and what no linear map can tell of Y.

    Source: ziyin2022talk, Theorem 2 (linear latent variable model) (its loss).

    Raises:
        ValueError: outputs and targets differ in shape, or a number is out of range and can be looked at.

    Example:
        >>> from models.functional import as_function
        >>> predict, params = as_function(LinearVae(VaeWeights([[1.0]], [[0.5]], [0.0])))
        >>> x = jnp.ones((4, 1))
        >>> float(negative_elbo(params, (predict, VaeInputs(x), x, (1.0, 1.0, 1.0))))
        0.25
    """
    predict, inputs, targets, (beta, eta_dec, eta_enc) = data
    outputs = predict(params, inputs)
    (targets,) = require_arrays(targets=targets)
    if targets.shape != outputs.y.shape:
        raise ValueError(f"targets must have shape {outputs.y.shape}, got shape {targets.shape}")
    dtype = outputs.y.dtype
    beta = require_number("beta", beta, dtype, at_least=0)
    dec, enc = (
        require_positive(name, eta, dtype) ** 2 for name, eta in (("eta_dec", eta_dec), ("eta_enc", eta_enc))
    )
    error = jnp.sum((outputs.y - cast(targets, dtype)) ** 2)
    logs = outputs.log_variance - jnp.log(enc)
    prior = jnp.sum(outputs.mean**2 / enc + jnp.expm1(logs) - logs)
    return (error / (2 * dec) + beta / 2 * prior) / len(targets)


def vae_batch(key: Array, x: ArrayLike, y: ArrayLike, size: int, latents: int) -> tuple[VaeInputs, Array]:
    """A batch of examples, drawn with replacement, and noise of its own for the latents of each.

    Args:
        key: PRNG key.
        x: inputs, (n, dx).
        y: targets, (n, dy).
        size: examples in the batch.
        latents: of the network.

    Returns:
        The inputs with their noise, and the targets (size, dy).

    Raises:
        ValueError: the shapes do not fit, a size is not positive, or a number is not finite.

    Example:
        >>> inputs, y = vae_batch(jax.random.key(0), jnp.ones((5, 2)), jnp.ones((5, 1)), 3, 4)
        >>> inputs.x.shape, inputs.noise.shape, y.shape
        ((3, 2), (3, 4), (3, 1))
    """
    x, y = require_arrays(x=x, y=y)
    require_shapes(x=(x, "n dx"), y=(y, "n dy"))
    size, latents = (
        require_integer(name, n, at_least=1) for name, n in (("size", size), ("latents", latents))
    )
    examples, latent = jax.random.split(key)
    chosen = jax.random.randint(examples, (size,), 0, x.shape[0])
    return VaeInputs(x[chosen], normal(latent, (size, latents), x.dtype)), y[chosen]
