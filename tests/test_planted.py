"""The planted world: its truth, its users, its settings."""

import json

import numpy as np
import pytest
import torch

import embed
import sae
import saerec


def make_planted(folder, *flags):
    assert saerec.main(["prepare", "planted", "--out", str(folder), "--users", "150", "--items", "80", "--intents", "12", *flags]) == 0
    truth = saerec.load_artifact(folder / "truth.safetensors", "")[0]
    return saerec.load_dataset(folder), truth, [json.loads(line) for line in (folder / "truth.jsonl").read_text().splitlines()]


def test_planted_truth_lies_beside_the_data(tmp_path):
    data, truth, about = make_planted(tmp_path / "a")
    V = len(data.items) - 1
    assert truth["item_intents"].shape == (V + 1, 12) and truth["text_intents"].shape == (len(data.texts), 12)
    assert truth["user_intents"].shape == (len(data.users), 12) and truth["user_intents"].sum(1).max() <= 3
    assert [row["public"] for row in about] == [j in truth["public"].tolist() for j in range(12)]
    carried = (truth["item_intents"] > 0).sum(1)
    assert carried[0] == 0 and set(carried[1:].tolist()) == {1, 2, 3}
    for text, item, told in zip(data.texts, data.text_item, truth["text_intents"]):
        words = set(text.lower().replace(",", " ").replace(".", " ").replace(":", " ").split())
        assert told.tolist() == [bool(words & set(row["words"])) for row in about]  # an intent is told in its own words alone
        assert (truth["item_intents"][item][told] > 0).all()
        assert data.titles[item].startswith(" and ".join(row["name"] for row, has in zip(about, truth["item_intents"][item]) if has))


def test_planted_users_choose_by_their_intents_and_by_the_public_ones(tmp_path):
    """Chosen items carry more of the user's last personal intents, and more public ones, than items drawn blindly."""
    data, truth, _ = make_planted(tmp_path / "a", "--drift", "0")
    items, public = truth["item_intents"], truth["public"]
    mine = [items[data.flat[a:b].astype(int)][:, taste].sum(1).mean() for a, b, taste in zip(data.start, data.start[1:], truth["user_intents"])]
    blind = [items[1:][:, taste].sum(1).mean() for taste in truth["user_intents"]]
    assert np.mean(mine) > 2 * np.mean(blind)
    assert items[data.flat.astype(int)][:, public].sum(1).mean() > 1.3 * items[1:][:, public].sum(1).mean()


def test_planted_is_repeatable_and_every_setting_counts(tmp_path):
    def files(name, *flags):
        make_planted(tmp_path / name, *flags)
        return [(tmp_path / name / file).read_bytes() for file in ("sequences.txt", "texts.jsonl", "truth.jsonl")]

    base = files("a")
    assert files("b") == base
    for flags in ("--seed 1", "--users 140", "--items 70", "--intents 14", "--texts 2", "--length 9", "--drift 0.5"):
        assert files(flags.replace(" ", ""), *flags.split()) != base, flags


def test_more_intents_than_themes_get_words_of_their_own(tmp_path):
    _, _, about = make_planted(tmp_path / "a", "--intents", "60")
    words = [word for row in about for word in row["words"]]
    assert len(about) == 60 and len(words) == len(set(words))


def test_planted_intents_are_recovered(tmp_path):
    """LSA and the SAE find most of the planted intents: some latent tells the texts that speak of one from the others."""
    data, truth, _ = make_planted(tmp_path / "a", "--users", "400", "--texts", "6")
    run = tmp_path / "run"
    common = ["--run", str(run), "--device", "cpu"]
    assert embed.main(["--data", str(tmp_path / "a"), "--encoder", "lsa", "--lsa-width", "32", *common]) == 0
    assert sae.main(["--latents", "64", "--active", "4", *common]) == 0
    tensors = saerec.load_artifact(run / "sae.safetensors", "")[0]
    net = sae.SAE(64, 4, 32)
    net.load_state_dict(tensors)
    codes = sae.encode_all(net, saerec.load_artifact(run / "embeddings.safetensors", "")[0]["embeddings"])
    dense = torch.zeros(len(data.texts), 64).scatter_(1, codes.latents, codes.values).numpy()
    best = [max(sae.auroc(dense[:, m], told) for m in range(64)) for told in truth["text_intents"].numpy().T]
    assert np.median(best) > 0.8, best


@pytest.mark.parametrize("flags, words", [
    ("--users 0", ["--users", "at least"]), ("--intents 3", ["--intents", "4 to 2000"]), ("--length 4", ["--length", "at least"]),
    ("--drift 2", ["--drift", "0 to 1"]), ("--items 9", ["--items", "at least 10"]),
])  # fmt: skip
def test_impossible_worlds(fails, tmp_path, flags, words):
    fails(saerec.main, ["prepare", "planted", "--out", tmp_path / "a", *flags.split()], *words)
    assert not (tmp_path / "a").exists()
