"""Labels that say which parameters `galore` projects: given ones, or those that follow from names."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from .paths import Parameter, teller

# The words of a parameter's path are compared in lower case and without numbers.
_LOOKUPS = {"emb", "wte", "wpe", "pos", "position", "positions", "logits", "classifier"}
# Last words of biases and norms. The second kind names factors as well: "lora_b" and "B" are matrices.
_BIASES, _LETTERS = {"bias", "scale"}, {"b", "ln", "bn", "gamma", "beta"}


def labeller(labels: Any, every: Sequence[Parameter]) -> Callable[[Parameter], str]:
    """Return the function that labels a parameter "galore" or "adam": by `labels`, or by its name."""
    if labels is None:
        return lambda parameter: "galore" if is_hidden_kernel(parameter.name, parameter.leaf) else "adam"
    tell = teller("labels", labels, every)

    def label(parameter: Parameter) -> str:
        told = tell(parameter)
        if told not in ("galore", "adam"):
            raise ValueError(f'labels must be "galore" or "adam", got {told!r} for {parameter.name!r}')
        return told

    return label


def is_hidden_kernel(name: str, leaf: Any) -> bool:
    """Tell whether a path names none of: an embedding, a head, a norm, a bias.

    An embedding has a word "emb", or one that begins with "embed" or "unembed"; a head is a key that ends
    with the word "head" ("lm_head", not "MultiHeadAttention"), and no other name of an output is known; a
    norm has a word that ends with "norm", or is called "ln"; biases and scales are last keys.
    """
    written = [key for key in name.split("/") if key != "value" and _words(key)]
    keys = list(map(_words, written))
    matrix = len(getattr(leaf, "shape", ())) >= 2 and not (written and written[-1] in _LETTERS)
    every = {word for words in keys for word in words}
    return not (
        any(word.startswith(("embed", "unembed")) or word.endswith(("norm", "embedding")) for word in every)
        or any(words[-1] == "head" for words in keys)
        or every & _LOOKUPS
        or any(words[0] in ("ln", "bn") for words in keys)
        or (keys and keys[-1][-1] in (_BIASES if matrix else _BIASES | _LETTERS))
    )


def _words(key: str) -> list[str]:
    """Split a name as "layer_norm", "LayerNorm_0" or "lm.head" is written into words in lower case."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", key)]
