"""Text: readers of corpora, and sequence classes estimated from words that go together."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from dynamics.arguments import require_dtype, require_integer, require_shape
from dynamics.scan_snap import SequenceClasses
from models.data.tokens import Contexts

_TOKEN = re.compile(r"\w+(?:'\w+)*|[^\w\s]")
_WORD = re.compile(r"[^\W\d]\w*(?:'\w+)*")
# Lines of interactive sessions and of grammars are code, not English.
_NO_PROSE = re.compile(r"^\s*(?:>>>|\.\.\.|\||.*::=).*$", re.MULTILINE)


def words(tokens: Iterable[str]) -> list[str]:
    """Lower-case words of a sequence of tokens; punctuation is dropped.

    Numbers, clitics and markers such as `<unk>` become the empty string, which is no word: what stood on
    both sides of them does not become neighbours.

    Example:
        >>> words(["The", "year", ",", "1999", "<unk>"])
        ['the', 'year', '', '']
    """
    spoken = (token.lower() for token in tokens if any(map(str.isalnum, token)))
    return [token if _WORD.fullmatch(token) else "" for token in spoken]


def python_corpus() -> list[str]:
    """English that ships with Python: the language reference behind `help`, as `words`.

    The topics come in alphabetical order; lines of code and of grammar are left out. How many words there
    are depends on the version of Python: about 65,000.

    Raises:
        FileNotFoundError: this Python comes without `pydoc_data`.

    Example:
        >>> "assignment" in python_corpus()
        True
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise FileNotFoundError(
            "pydoc_data is missing from this Python: install the full standard library, or use another corpus"
        ) from None
    text = "\n".join(topics[name] for name in sorted(topics))
    return words(_TOKEN.findall(_NO_PROSE.sub("", text)))


def wikitext2(data_dir: str | Path | None, split: Literal["train", "valid", "test"] = "train") -> list[str]:
    """WikiText-2 as it is written, word by word, with `<eos>` at the end of every line.

    The set is that of Merity et al. (2017), word level, in its first version.

    Args:
        data_dir: folder that holds `wikitext-2/wiki.train.tokens` and its like.
        split: which part.

    Returns:
        The tokens: 2,088,628 of 33,278 types for `train`.

    Raises:
        FileNotFoundError: there is no such file, or no folder was given.

    Example:
        >>> tokens = wikitext2("data")  # doctest: +SKIP
        >>> len(tokens)  # doctest: +SKIP
        2088628
    """
    path = None if data_dir is None else Path(data_dir) / "wikitext-2" / f"wiki.{split}.tokens"
    if path is None or not path.is_file():
        missing = "no data folder was given" if path is None else f"{path} is missing"
        raise FileNotFoundError(
            f"{missing}: pass --data-dir DIR, a folder with wikitext-2/wiki.{split}.tokens"
        )
    with path.open(encoding="utf-8") as lines:
        return [token for line in lines for token in (*line.split(), "<eos>")]


class TextClasses(NamedTuple):
    """Sequence classes of a text, and the windows of text that they were estimated from.

    Attributes:
        classes: the sequence classes, K of them over M words, in order of falling frequency.
        words: the vocabulary, M words in order of falling frequency.
        contexts: the N windows, sorted by class and then by position: counts (N, M) and queries (N,).
        next_token: the word that follows each window's query, (N,).
        label: class of each window, (N,).
        position: index of each window's query in the text, (N,).
    """

    classes: SequenceClasses
    words: list[str]
    contexts: Contexts
    next_token: np.ndarray
    label: np.ndarray
    position: np.ndarray


def next_token_classes(
    tokens: Sequence[str],
    num_classes: int,
    vocab_size: int,
    window: int,
    *,
    max_windows: int | None = None,
    context_tokens: Sequence[str] | None = None,
    dtype: Any = None,
) -> TextClasses:
    r"""Sequence classes of a text: a word n, the word psi(n) most often before it, and what goes before both.

    The vocabulary is the most frequent words. Class n is made of the places where n follows psi(n), and
    P(l | n) is the relative frequency of l among the `window` tokens before psi(n) in all those places;
    words outside of the vocabulary are left out. The classes are the most frequent pairs (psi(n), n).
    Several classes may share a query; no two share a next token.

    Source: tian2023scan, section 2 (its data law, with psi many-to-one).

    Args:
        tokens: the words of the text; the empty string is no word.
        num_classes: number of classes K.
        vocab_size: size of the vocabulary M.
        window: tokens of context before the query.
        max_windows: the most windows per class, evenly spaced over its places; all where None.
        context_tokens: another text of the same length to take the windows from, in the same places: a
            control, where it is the text in random order.
        dtype: floating dtype; JAX's default where None.

    Returns:
        The classes with their windows.

    Raises:
        ValueError: a size is out of range or more than the text has; a class has no known word before it.

    Example:
        >>> text = next_token_classes("a b c a b d a b c".split(), 1, 4, window=2)
        >>> text.words[text.classes.query[0]], text.words[text.classes.next_token[0]]
        ('a', 'b')
        >>> text.words, text.classes.P.tolist()  # before the two places of "a b" that count: "b c" and "b d"
        (['a', 'b', 'c', 'd'], [[0.0, 0.5, 0.25, 0.25]])
    """
    sizes = {"num_classes": num_classes, "vocab_size": vocab_size, "window": window}
    for name, size in (sizes | ({} if max_windows is None else {"max_windows": max_windows})).items():
        require_integer(name, size, at_least=2 if name == "vocab_size" else 1)
    frequency = Counter(token for token in tokens if token)
    if vocab_size > len(frequency):
        raise ValueError(
            f"vocab_size must be at most {len(frequency)}, the words there are, got {vocab_size}"
        )
    if window > len(tokens) - 2:
        raise ValueError(f"window must be at most {len(tokens) - 2} for {len(tokens)} tokens, got {window}")
    if context_tokens is not None and len(context_tokens) != len(tokens):
        raise ValueError(f"context_tokens must have length {len(tokens)}, got {len(context_tokens)}")
    vocabulary = [word for word, _ in frequency.most_common(vocab_size)]
    index = {word: i for i, word in enumerate(vocabulary)}

    def encode(tokens):
        return np.fromiter((index.get(token, vocab_size) for token in tokens), np.int32, len(tokens))

    ids = encode(tokens)
    before = ids if context_tokens is None else encode(context_tokens)
    # The last id stands for words that are not known. Only places with a whole window before them count.
    query, following = ids[window:-1], ids[window + 1 :]
    pairs = np.zeros((vocab_size + 1, vocab_size + 1), int)
    np.add.at(pairs, (query, following), 1)
    pairs = pairs[:-1, :-1]
    psi, often = np.argmax(pairs, axis=0), np.max(pairs, axis=0)
    if num_classes > np.count_nonzero(often):
        raise ValueError(
            f"num_classes must be at most {np.count_nonzero(often)}, the pairs there are, got {num_classes}"
        )
    next_token = np.argsort(-often, kind="stable")[:num_classes]

    label, places = [], []
    for n, word in enumerate(next_token):
        here = np.flatnonzero((following == word) & (query == psi[word]))
        if max_windows is not None and len(here) > max_windows:
            here = here[np.linspace(0, len(here) - 1, max_windows).round().astype(int)]
        places.append(here)
        label.append(np.full(len(here), n))
    label, places = np.concatenate(label), np.concatenate(places)
    counts = np.zeros((len(places), vocab_size + 1), require_dtype(dtype))
    windows = np.lib.stride_tricks.sliding_window_view(before, window)[places]
    np.add.at(counts, (np.arange(len(places))[:, None], windows), 1)
    counts = counts[:, :-1]
    P = _context_law(counts, label, [vocabulary[word] for word in next_token])
    classes = SequenceClasses(P, psi[next_token], next_token)
    contexts = Contexts(jnp.asarray(counts), jnp.asarray(psi[next_token][label]))
    return TextClasses(classes, vocabulary, contexts, next_token[label], label, places + window)


def select_windows(text: TextClasses, keep: np.ndarray) -> TextClasses:
    """The same classes, estimated from some of their windows alone.

    Args:
        text: classes and their windows.
        keep: which windows, booleans (N,).

    Returns:
        Classes with P estimated anew, and the windows that were kept.

    Raises:
        ValueError: `keep` has the wrong shape, or leaves nothing of a class.

    Example:
        >>> text = next_token_classes("a b c a b d a b c".split(), 1, 4, window=2)
        >>> select_windows(text, text.position > 5).classes.P.tolist()
        [[0.0, 0.5, 0.0, 0.5]]
    """
    keep = np.asarray(keep)
    require_shape("keep", keep, text.label.shape)
    if keep.dtype != bool:
        raise ValueError(f"keep must hold booleans, got dtype {keep.dtype}")
    counts = np.asarray(text.contexts.counts)[keep]
    names = [text.words[word] for word in np.asarray(text.classes.next_token)]
    P = _context_law(counts, text.label[keep], names)
    contexts = Contexts(jnp.asarray(counts), jnp.asarray(np.asarray(text.contexts.query)[keep]))
    classes = SequenceClasses(P, text.classes.query, text.classes.next_token)
    parts = (part[keep] for part in (text.next_token, text.label, text.position))
    return TextClasses(classes, text.words, contexts, *parts)


def _context_law(counts: np.ndarray, label: np.ndarray, names: list[str]) -> np.ndarray:
    """P(l | n), (K, M), of windows whose class is given."""
    total = np.zeros((len(names), counts.shape[1]))
    np.add.at(total, label, counts)
    size = total.sum(axis=1, keepdims=True)
    if np.any(size == 0):
        name = names[int(np.argmin(size))]
        raise ValueError(f"every class must have known words before it, got none for the next word {name!r}")
    return (total / size).astype(counts.dtype)
