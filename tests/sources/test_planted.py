"""The planted world: its words, its truth, its users, its settings, and whether it is found."""

import json
import re
from itertools import pairwise

import numpy as np
import pytest
import torch

import sae
import saerec
from sources import lsa, planted

SMALL = ["--users", "150", "--items", "80", "--intents", "12"]


def make_planted(folder, *flags):
    """Write a small world -> (Dataset, truth tensors, rows of truth.jsonl)."""
    assert planted.main(["--out", str(folder), *SMALL, *flags]) == 0
    truth, _ = saerec.load_artifact(folder / "truth.safetensors", "planted.py")
    rows = (folder / "truth.jsonl").read_text().splitlines()
    return saerec.load_dataset(folder), truth, [json.loads(row) for row in rows]


def test_words_by_hand():
    assert planted.make_up_word(0) == "bababa"
    assert planted.make_up_word(1) == "bebaba"  # syllables: ba be bi bo bu da ... zu
    assert planted.make_up_word(70**3 - 1) == "zuzuzu"
    intents = planted.intent_words(42, np.random.default_rng(0))
    assert intents[0] == ["space", "rocket", "orbit", "planet", "astronaut", "galaxy"]
    assert len(intents) == 42 and all(len(words) == 6 for words in intents)
    assert re.fullmatch("([bdfgklmnprstvz][aeiou]){3}", intents[40][0])  # after 40 themes


def test_more_intents_than_themes_get_words_of_their_own(tmp_path):
    _, _, about = make_planted(tmp_path / "a", "--intents", "60")
    words = [word for row in about for word in row["words"]]
    assert len(about) == 60 and len(words) == len(set(words))


def test_truth_lies_beside_the_data(tmp_path):
    data, truth, about = make_planted(tmp_path / "a")
    V = len(data.items) - 1
    assert truth["item_intents"].shape == (V + 1, 12)
    assert truth["text_intents"].shape == (len(data.texts), 12)
    assert truth["user_intents"].shape == (len(data.users), 12)
    assert truth["user_intents"].sum(1).max() <= 3
    assert [row["public"] for row in about] == [j in truth["public"].tolist() for j in range(12)]
    carried = truth["item_intents"] > 0
    assert [row["items"] for row in about] == carried.sum(0).tolist()
    assert not carried[0].any() and set(carried[1:].sum(1).tolist()) == {1, 2, 3}
    for text, item, told in zip(data.texts, data.text_item, truth["text_intents"]):
        words = set(re.findall(r"\w+", text.lower()))
        # An intent is told in its own words alone
        assert told.tolist() == [bool(words & set(row["words"])) for row in about]
        assert carried[item][told].all()
        names = [row["name"] for row, has in zip(about, carried[item]) if has]
        assert data.titles[item].startswith(" and ".join(names))


def test_users_choose_by_their_intents_and_by_the_public_ones(tmp_path):
    """They choose more of their own intents, and more public ones, than blindly drawn items have.

    Without drift the intents that a user has in the end are those of the whole history.
    """
    data, truth, _ = make_planted(tmp_path / "a", "--drift", "0")
    strength = truth["item_intents"]
    chosen = strength[data.flat.astype(int)]  # (interactions, J)
    mine = []
    blind = []
    for (begin, end), taste in zip(pairwise(data.start), truth["user_intents"]):
        mine.append(chosen[begin:end, taste].sum(1).mean())
        blind.append(strength[1:, taste].sum(1).mean())
    assert np.mean(mine) > 2 * np.mean(blind)
    public = truth["public"]
    assert chosen[:, public].sum(1).mean() > 1.3 * strength[1:, public].sum(1).mean()


def test_a_world_is_repeatable_and_every_setting_counts(tmp_path):
    def files(name, *flags):
        make_planted(tmp_path / name, *flags)
        names = ("sequences.txt", "texts.jsonl", "truth.jsonl")
        return [(tmp_path / name / file).read_bytes() for file in names]

    base = files("a")
    assert files("b") == base
    changes = ["seed 1", "users 140", "items 70", "intents 14", "texts 2", "length 9", "drift 0.5"]
    for change in changes:
        option, value = change.split()
        assert files(option, f"--{option}", value) != base, change


def test_planted_intents_are_recovered(tmp_path):
    """LSA and the SAE find most of them: some latent tells the texts that speak of one."""
    folder = tmp_path / "a"
    data, truth, _ = make_planted(folder, "--users", "400", "--texts", "6")
    run = tmp_path / "run"
    common = ["--run", str(run), "--device", "cpu"]
    assert lsa.main(["--data", str(folder), "--width", "32", *common]) == 0
    assert sae.main(["--latents", "64", "--active", "4", *common]) == 0
    tensors, _ = saerec.load_artifact(run / "sae.safetensors", "sae.py")
    net = sae.SAE(64, 4, 32)
    net.load_state_dict(tensors)
    embedded, _ = saerec.load_artifact(run / "embeddings.safetensors", "lsa.py")
    codes = sae.encode_all(net, embedded["embeddings"])
    dense = torch.zeros(len(data.texts), 64).scatter_(1, codes.latents, codes.values).numpy()
    best = []
    for told in truth["text_intents"].numpy().T:
        best.append(max(sae.auroc(latent, told) for latent in dense.T))
    assert np.median(best) > 0.8, best


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--users 0", ["--users", "at least"]),
        ("--intents 3", ["--intents", "4 to 2000"]),
        ("--length 4", ["--length", "5 to 1000000"]),
        ("--length 1e19", ["--length", "5 to 1000000"]),
        ("--drift 2", ["--drift", "0 to 1"]),
        ("--items 9", ["--items", "at least 10"]),
        ("--texts 0", ["--texts", "at least 1"]),
        ("--seed -1", ["--seed", "0 to"]),
    ],
)
def test_impossible_worlds(fails, tmp_path, flags, words):
    fails(planted.main, ["--out", tmp_path / "a", *flags.split()], *words)
    assert not (tmp_path / "a").exists()


def test_an_empty_name_is_no_folder(tmp_path, monkeypatch, fails):
    monkeypatch.chdir(tmp_path)
    fails(planted.main, ["--out", "", *SMALL], "--out is empty")
    assert not list(tmp_path.iterdir())
