import os
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.data.text import next_token_classes, python_corpus, select_windows, wikitext2, words

WIKITEXT = Path(os.environ.get("DYNASCOPE_DATA", "/nonexistent"))
ALPHABET = "abcde"
TEXTS = st.lists(st.sampled_from([*ALPHABET, ""]), min_size=30, max_size=80)


@given(TEXTS, st.integers(1, 6), st.randoms(use_true_random=False))
def test_classes_are_those_of_the_definition(tokens, window, random):
    tokens = [*tokens, *ALPHABET, *ALPHABET]
    before = [token or "a" for token in random.sample(tokens, len(tokens))]
    places = range(window, len(tokens) - 1)
    pairs = Counter((tokens[i], tokens[i + 1]) for i in places if tokens[i] and tokens[i + 1])
    most = {n: max(count for (_, other), count in pairs.items() if other == n) for _, n in pairs}
    K = len(most) - 1
    text = next_token_classes(tokens, K, len(ALPHABET), window, context_tokens=before)
    assert sorted(text.words) == sorted(ALPHABET)
    counted = Counter(filter(None, tokens))
    assert [counted[word] for word in text.words] == sorted(counted.values(), reverse=True)
    query, following = (
        [text.words[i] for i in np.asarray(ids)] for ids in (text.classes.query, text.classes.next_token)
    )
    assert len(set(following)) == K
    assert [most[n] for n in following] == sorted(most.values(), reverse=True)[:K]
    for n in range(K):
        assert pairs[query[n], following[n]] == most[following[n]]
        here = [i for i in places if (tokens[i], tokens[i + 1]) == (query[n], following[n])]
        mine = text.label == n
        assert text.position[mine].tolist() == here
        counts = np.array([[before[i - window : i].count(word) for word in text.words] for i in here])
        np.testing.assert_array_equal(text.contexts.counts[mine], counts)
        np.testing.assert_allclose(text.classes.P[n], counts.sum(axis=0) / counts.sum(), rtol=1e-14)
    np.testing.assert_array_equal(text.contexts.query, np.asarray(text.classes.query)[text.label])
    np.testing.assert_array_equal(text.next_token, np.asarray(text.classes.next_token)[text.label])
    assert np.all(np.diff(text.label) >= 0)


def test_words_out_of_the_vocabulary_are_left_out():
    tokens = list("abxabyabaab")
    text = next_token_classes(tokens, 1, 2, window=3)
    assert text.words == ["a", "b"]
    # Windows before "a b" at 3, 6 and 9: "a b x", "a b y" and "a b a".
    assert text.position.tolist() == [3, 6, 9]
    assert np.asarray(text.contexts.counts).tolist() == [[1, 1], [1, 1], [2, 1]]
    assert np.asarray(text.classes.P).ravel() == pytest.approx([4 / 7, 3 / 7])


def test_windows_are_spread_over_the_text_and_can_be_selected():
    tokens = ["a", "b", "c"] * 100
    whole = next_token_classes(tokens, 2, 3, window=4, dtype="float32")
    few = next_token_classes(tokens, 2, 3, window=4, max_windows=5, dtype="float32")
    assert np.bincount(few.label).tolist() == [5, 5]
    for n in range(2):
        all_positions, positions = whole.position[whole.label == n], few.position[few.label == n]
        assert set(positions) <= set(all_positions)
        assert {all_positions[0], all_positions[-1]} <= set(positions)
    assert few.classes.P.dtype == few.contexts.counts.dtype == np.float32
    late = select_windows(whole, whole.position > 150)
    assert late.position.min() > 150
    assert late.contexts.counts.shape == (len(late.position), 3)
    kept = select_windows(whole, np.full(len(whole.label), True))
    np.testing.assert_array_equal(kept.classes.P, whole.classes.P)


def test_what_is_no_word_separates():
    assert words(["A", "year", ",", "1999", "it", "'s", "don't", "__init__", "<unk>", "…"]) == [
        *("a", "year", "", "it", "", "don't", "__init__", ""),
    ]
    text = next_token_classes(words("a1babcabc"), 1, 3, window=1)
    # "a" stands before "b" at 3 and 6 alone.
    assert text.position.tolist() == [3, 6]


def test_python_corpus_is_english():
    corpus = python_corpus()
    assert 40_000 < len(corpus) < 100_000
    assert Counter(filter(None, corpus)).most_common(1)[0][0] == "the"
    assert all(word == word.lower() and " " not in word for word in corpus)
    assert not {">", "::", "="} & set(corpus)


def test_python_without_its_reference(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(FileNotFoundError, match=r"^pydoc_data is missing from this Python: .* corpus$"):
        python_corpus()


def test_wikitext_reader(tmp_path):
    folder = tmp_path / "wikitext-2"
    folder.mkdir()
    (folder / "wiki.valid.tokens").write_text(" \n = Café = \n a <unk>\n", encoding="utf-8")
    assert wikitext2(tmp_path, "valid") == ["<eos>", "=", "Café", "=", "<eos>", "a", "<unk>", "<eos>"]
    with pytest.raises(FileNotFoundError, match=r"wiki\.train\.tokens is missing: pass --data-dir DIR"):
        wikitext2(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"^no data folder was given: pass --data-dir DIR"):
        wikitext2(None)


@pytest.mark.skipif(not (WIKITEXT / "wikitext-2").is_dir(), reason="DYNASCOPE_DATA has no wikitext-2")
@pytest.mark.parametrize(("split", "count"), [("train", 2_088_628), ("valid", 217_646), ("test", 245_569)])
def test_wikitext_has_its_published_size(split, count):
    tokens = wikitext2(WIKITEXT, split)
    assert len(tokens) == count
    if split == "train":
        assert len(set(tokens)) == 33_278


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 3, 2), "num_classes must be an integer >= 1"),
        ((1, 1, 2), "vocab_size must be an integer >= 2"),
        ((1, 3, 0), "window must be an integer >= 1"),
        ((1, 4, 2), "vocab_size must be at most 3"),
        ((4, 3, 2), "num_classes must be at most 3"),
        ((1, 3, 99), "window must be at most 7"),
    ],
)
def test_bad_sizes(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        next_token_classes(list("abcabcabc"), *arguments)


def test_bad_controls():
    tokens = list("abcabcabc")
    with pytest.raises(ValueError, match=r"^max_windows must be an integer >= 1, got 0"):
        next_token_classes(tokens, 1, 3, 2, max_windows=0)
    with pytest.raises(ValueError, match=r"^context_tokens must have length 9, got 2"):
        next_token_classes(tokens, 1, 3, 2, context_tokens=["a", "b"])
    with pytest.raises(ValueError, match=r"^every class must have known words .* for the next word '\w'$"):
        next_token_classes(tokens, 1, 3, 2, context_tokens=["x"] * 9)
    text = next_token_classes(tokens, 1, 3, 2)
    with pytest.raises(ValueError, match=r"^keep must have shape \(2,\), got shape \(3,\)"):
        select_windows(text, np.ones(3, bool))
    with pytest.raises(ValueError, match=r"^keep must hold booleans, got dtype int64"):
        select_windows(text, np.array([0, 1]))
    with pytest.raises(ValueError, match=r"^every class must have known words"):
        select_windows(text, np.zeros(2, bool))
