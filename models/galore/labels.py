"""Which parameters `galore` projects where it is not told."""

from __future__ import annotations

import re
from typing import Any

# Words of a parameter's path, lower case, numbers dropped.
_LOOKUPS = {"emb", "wte", "wpe", "logits", "classifier"}
_NORMS = {"ln", "bn", "scale", "gamma", "beta"}
_BIASES = {"bias", "b"}


def is_hidden_kernel(name: str, leaf: Any) -> bool:
    """Whether a path names none of: an embedding, a head, a norm, a bias.

    An embedding has a word "emb", or one that begins with "embed" or "unembed"; a head is a key that ends
    with the word "head" ("lm_head", not "MultiHeadAttention"), and no other name of an output is known; a
    norm has a word that ends with "norm", or is called "ln"; biases and scales are last keys.
    """
    del leaf
    keys = [words for key in name.split("/") if key != "value" and (words := _words(key))]
    every = {word for words in keys for word in words}
    return not (
        any(word.startswith(("embed", "unembed")) or word.endswith(("norm", "embedding")) for word in every)
        or any(words[-1] == "head" for words in keys)
        or every & _LOOKUPS
        or any(words[0] in ("ln", "bn") for words in keys)
        or (keys and keys[-1][-1] in _NORMS | _BIASES)
    )


def _words(key: str) -> list[str]:
    """The words of "layer_norm", "LayerNorm_0" and "lm.head", lower case."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", key)]
