"""Embeddings of words alone, against a dense SVD written another way."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from saerec import UserError, load_artifact, load_dataset
from sources import lsa

WORDS = "space planet rocket orbit oven recipe butter guitar melody singer".split()


def random_texts(number, seed=0):
    """Texts of 1 to 8 words, the first ones more often than the last."""
    draw = np.random.default_rng(seed)
    chance = np.arange(10, 0, -1) / 55
    texts = []
    for _ in range(number):
        texts.append(" ".join(draw.choice(WORDS, draw.integers(1, 9), p=chance)))
    return texts


def test_word_matrix_by_hand():
    """Two texts share `oven`, two `café`; `the` is in one alone, marks are no words."""
    texts = ["Oven, oven!", "the OVEN cafe", "... café", "?"]
    A = lsa.word_matrix(texts).to_dense()  # columns: cafe, oven
    assert A.shape == (4, 2) and A.dtype == torch.float64
    root = math.sqrt(0.5)  # both words have the same df, and so the same weight
    assert A.flatten().tolist() == pytest.approx([0, 1, root, root, 1, 0, 0, 0])


def dense_tf_idf(texts):
    """What `word_matrix` should be, but for the order of its columns, word by word."""
    counts = []
    for text in texts:
        plain = text.lower().replace("é", "e").replace(",", "").strip("!.")
        counts.append(Counter(plain.split()))
    words = {word for count in counts for word in count}
    columns = []
    for word in words:
        df = sum(word in count for count in counts)
        if df > 1:
            idf = math.log((1 + len(texts)) / (1 + df)) + 1
            tf = np.array([count[word] for count in counts])
            columns.append(np.where(tf > 0, (1 + np.log(np.maximum(tf, 1))) * idf, 0))
    A = np.array(columns).T
    return A / np.maximum(np.linalg.norm(A, axis=1, keepdims=True), 1e-9)


@pytest.mark.parametrize("width", [2, 6])
def test_lsa_equals_a_dense_svd(width):
    texts = random_texts(40)
    texts += ["Café, café and a CAFE!", "café and a", "unique gibberish", "..."]
    U, S, _ = np.linalg.svd(dense_tf_idf(texts))
    expected = U[:, :width] * S[:width]
    norm = np.linalg.norm(expected, axis=1, keepdims=True)
    expected = np.where(norm > 1e-3, expected / np.maximum(norm, 1e-3), 0)
    assert not expected[-2:].any()  # no word that another text has
    vectors = lsa.lsa(texts, width)
    assert vectors.shape == (44, width) and vectors.dtype == torch.float32
    # Equal but for the signs, which no product depends on
    np.testing.assert_allclose(vectors.abs().numpy(), np.abs(expected), atol=1e-5)
    np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=1e-5)


def test_lsa_is_near_the_best_approximation_when_it_must_sketch():
    """200 texts on 8 topics, some rare, of 40 words each, and words common to all.

    The rank is far above the 20 that are sketched.
    """
    draw = np.random.default_rng(1)
    topics = draw.choice(8, 200, p=2.0 ** -np.arange(8) / (2 - 2.0**-7))
    texts = []
    for topic in topics:
        words = [f"t{topic}w{word}" for word in draw.integers(0, 40, 60)]
        texts.append(" ".join(words) + " all the same")
    near = lsa.lsa(texts, 4)
    other = lsa.lsa(texts, 4, seed=1)
    assert torch.equal(near, lsa.lsa(texts, 4)) and not torch.equal(near, other)
    torch.testing.assert_close(near, other, atol=5e-3, rtol=0)  # signs agree whatever the seed
    whole = lsa.lsa(texts, 200)  # nothing is left out of this sketch
    best = torch.nn.functional.normalize(whole[:, :4], dim=1)
    torch.testing.assert_close(near, best, atol=5e-3, rtol=0)


def test_lsa_says_when_the_texts_allow_less(capsys):
    assert lsa.lsa(random_texts(30), 128).shape == (30, len(WORDS))
    assert "10 dimensions (128 are more than the texts allow)" in capsys.readouterr().out


def test_lsa_says_which_texts_get_zeros(capsys):
    vectors = lsa.lsa([*random_texts(30), "gibberish"], 4)
    assert not vectors[-1].any() and vectors[:-1].any(1).all()
    assert "1 text(s) have no word that these dimensions know" in capsys.readouterr().out


@pytest.mark.parametrize("texts", [["one", "two"], ["same words", "same words"], ["?", "!"]])
def test_texts_with_too_few_words_in_common(texts):
    with pytest.raises(UserError, match="2 text.s. have too few words in common.*embed.py"):
        lsa.lsa(texts)


# The command


def test_artifact(tiny_data, tmp_path):
    data = load_dataset(tiny_data)

    def make(name, *options):
        folder = tmp_path / name
        argv = ["--data", tiny_data, "--run", folder, "--device", "cpu", *options]
        assert lsa.main([str(word) for word in argv]) == 0
        tensors, meta = load_artifact(folder / "embeddings.safetensors", "lsa.py", data)
        assert torch.equal(tensors["item"], torch.from_numpy(data.text_item))
        assert tensors["item"].dtype == torch.int32
        return tensors["embeddings"], meta

    vectors, meta = make("one", "--width", 5)
    assert vectors.shape == (len(data.texts), 5) and vectors.dtype == torch.float32
    assert torch.equal(vectors, lsa.lsa(data.texts, 5))
    assert meta["encoder"] == {"name": "lsa"} and meta["dataset"] == data.hash
    settings = dict(data=str(tiny_data), run=str(tmp_path / "one"), width=5, seed=0, device="cpu")
    assert meta["settings"] == settings
    assert torch.equal(vectors, make("again", "--width", 5)[0])
    assert make("narrow", "--width", 3)[0].shape[1] == 3


def test_wrong_settings(fails, tiny_data, tmp_path):
    run = ["--run", tmp_path / "run"]
    fails(lsa.main, run, "--data is missing", "data/ml-100k")
    fails(lsa.main, ["--data", tiny_data], "--run is missing", "runs/ml-100k")
    fails(lsa.main, ["--data", tmp_path / "none", *run], "none has 0 of sequences.txt")
    fails(lsa.main, ["--data", tiny_data, *run, "--width", 1], "--width is 1", "at least 2")
    fails(lsa.main, ["--data", tiny_data, *run, "--widht", 8], "did you mean --width")
    assert not (tmp_path / "run").exists()
