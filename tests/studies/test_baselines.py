"""Baselines, against brute force and torch's own."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model
import sae
import saerec
from studies import baselines, rivals

SETTINGS = model.ModelSettings(epochs=1, width=8, device="cpu")


@pytest.fixture
def tiny(tiny_run):
    return saerec.run_dataset(tiny_run), dataclasses.replace(SETTINGS, run=str(tiny_run))


def write_halves(folder):
    """Users draw from one of two halves of the catalogue: what is popular says nothing."""
    folder.mkdir()
    random = np.random.default_rng(0)
    with open(folder / "sequences.txt", "w") as file:
        for user in range(200):
            row = random.permutation(20)[:12] + 20 * (user % 2)
            file.write(f"u{user} " + " ".join(f"i{item}" for item in row) + "\n")
    with open(folder / "texts.jsonl", "w") as file:
        for item in range(40):
            file.write(json.dumps({"item": f"i{item}", "text": "x"}) + "\n")
    return saerec.load_dataset(folder)


def test_bpr_beats_popularity_where_users_keep_to_a_topic(tmp_path):
    data = write_halves(tmp_path / "d")
    popular = baselines.popularity_ranks(data, SETTINGS)
    bpr = baselines.bpr_ranks(data, SETTINGS, baselines.BPRSettings(batch=32))
    popular_hits, hits = (saerec.ranking_metrics(one.ranks)["HR@10"] for one in (popular, bpr))
    assert hits > popular_hits + 0.2, (hits, popular_hits)
    assert bpr.parameters == 200 * 64 + 41 * 65
    again = baselines.bpr_ranks(data, SETTINGS, baselines.BPRSettings(batch=32))
    assert torch.equal(again.ranks, bpr.ranks) and again.valid == bpr.valid


def test_bpr_by_equation():
    torch.manual_seed(0)
    net = baselines.BPR(5, 7, 3)
    with torch.no_grad():
        net.bias.normal_()
    scores = net.scores(torch.arange(5))
    for user, item in itertools.product(range(5), range(8)):
        product = sum(a * b for a, b in zip(net.user[user].tolist(), net.item[item].tolist()))
        assert scores[user, item].item() == pytest.approx(product + net.bias[item].item(), abs=1e-6)
    users = torch.randint(5, (9,))
    items, others = torch.randint(8, (2, 9))
    expected = -(scores[users, items] - scores[users, others]).sigmoid().log().mean()
    torch.testing.assert_close(net.loss(users, items, others), expected)


def test_pairs_are_the_training_interactions(tiny):
    data, _ = tiny
    expected = []
    for user in range(len(data.users)):
        expected += [[user, item] for item in data.history(user, "valid").tolist()]
    assert baselines.training_pairs(data).tolist() == expected


def test_popularity_ranks_by_counting(tiny):
    data, settings = tiny
    counts = np.bincount(data.training_items(), minlength=len(data.items))
    ranks, parameters, valid = baselines.popularity_ranks(data, settings)
    assert parameters == 0 and valid is None
    for user, target in enumerate(data.targets("test")):
        seen = set(data.history(user, "test").tolist())
        ahead = [v for v in range(1, len(data.items)) if counts[v] >= counts[target]]
        rank = len([v for v in ahead if v not in seen])
        if target in seen:
            rank = torch.inf
        assert ranks[user] == rank


@pytest.fixture
def ranked(monkeypatch):
    """What is ranked: (part, scores of all users, ranks) of each call."""
    calls = []

    def note(score, data, part):
        ranks = saerec.rank_users(score, data, part)
        with torch.no_grad():
            calls.append((part, score(torch.arange(len(data.users))), ranks))
        return ranks

    monkeypatch.setattr(baselines, "rank_users", note)
    return calls


def likenesses_of(kind, data, run):
    """How much alike items are, by each of what can be chosen -> list of [V+1, V+1]."""
    if kind == "users":
        users = range(len(data.users))
        bought = [data.history(user, "valid") for user in users]
        bought = np.array([np.bincount(items, minlength=len(data.items)) for items in bought])
        norm = np.sqrt(np.outer(bought.sum(0), bought.sum(0))).clip(1)
        return [bought.T @ bought / (norm + shrink) for shrink in (0, 10, 100)]
    x = parts_of_items(kind, data, run)
    return [x.T @ x]


def parts_of_items(kind, data, run):
    """x_v of each item, in columns, so that likeness is their inner product -> [any, V+1]."""
    items = len(data.items)
    own = rivals.load_run(run, data)
    if kind == "texts":
        x = own.sae.standardize(own.embeddings)
        sums = [x[torch.from_numpy(data.text_item == item)].sum(0) for item in range(items)]
        return np.stack([F.normalize(one, dim=0) for one in sums], 1)
    codes = sae.load_intents(run, data).codes.dense().numpy()
    training = data.training_items()
    df = (codes[training] > 0).sum(0)
    return (codes * np.sqrt(np.log((1 + len(training)) / (1 + df)))).T


@pytest.mark.parametrize("kind", ["users", "texts", "intents"])
def test_item_knn_by_brute_force(tiny, ranked, kind):
    """A user's score is a sum over the history; the best on validation is scored on test."""
    data, settings = tiny
    alike = likenesses_of(kind, data, settings.run)
    outcome = baselines.neighbour_ranks(data, settings, kind)
    *tried, (part, _, last) = ranked
    ways = [*itertools.product(range(len(alike)), (1.0, 0.9, 0.7, 0.5))]
    reached = [saerec.ranking_metrics(ranks)["NDCG@10"] for _, _, ranks in tried]
    chosen = max(range(len(ways)), key=lambda at: (reached[at], ways[at]))
    assert [part for part, _, _ in tried] == ["valid"] * len(ways) and part == "test"
    assert outcome.parameters == 0 and outcome.valid == max(reached) and outcome.ranks is last
    for (part, score, _), (number, decay) in zip(ranked, [*ways, ways[chosen]]):
        for user in range(len(data.users)):
            backwards = enumerate(data.history(user, part)[::-1])
            expected = sum(decay**age * alike[number][item] for age, item in backwards)
            np.testing.assert_allclose(score[user].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_only_the_most_recent_items_count(tiny):
    data, _ = tiny
    alike = baselines.DenseLikeness(torch.eye(len(data.items)))
    score = baselines.neighbour_scores(alike, data, "test", 3, 1.0)(torch.arange(len(data.users)))
    for user in range(len(data.users)):
        recent = data.history(user, "test")[-3:]
        assert score[user].tolist() == np.bincount(recent, minlength=len(data.items)).tolist()


@pytest.mark.parametrize("Model", [model.SASRec, model.Grounded])
def test_item_knn_beside_a_model_adds_to_its_scores(tiny, ranked, Model):
    data, settings = tiny
    net, _ = model.train_model(model.new_model(Model, settings, data), data)
    baselines.neighbour_ranks(data, settings, "users")
    alone = [score for part, score, _ in ranked if part == "valid"]
    ranked.clear()
    outcome = baselines.neighbour_ranks(data, settings, "users", Model)
    assert outcome.parameters == sum(p.numel() for p in net.parameters())
    assert [part for part, _, _ in ranked] == ["valid"] * 48 + ["test"]
    with torch.no_grad():
        own = model.model_scores(net, data, "valid")(torch.arange(len(data.users)))
    weights = (0.1, 0.25, 0.5, 1.0)
    for (_, both, _), (near, weight) in zip(ranked, itertools.product(alone, weights)):
        spread = own[:, 1:].std(1, keepdim=True) / near[:, 1:].std(1, keepdim=True)
        torch.testing.assert_close(both, own + weight * near * spread)
    reached = [saerec.ranking_metrics(ranks)["NDCG@10"] for _, _, ranks in ranked[:-1]]
    assert outcome.valid == max(reached)


def test_recurrent_trunk_is_torchs_gru():
    torch.manual_seed(0)
    block = baselines.Recurrent(8, 2, 0.5)
    x = torch.randn(3, 5, 8)
    own = torch.nn.GRU(8, 8, batch_first=True)
    own.load_state_dict(block.gru.state_dict())
    assert torch.equal(block.eval()(x), own(x)[0])
    dropped = block.train()(x)
    assert 0.2 < (dropped == 0).float().mean() < 0.8


def test_gru4rec_starts_as_torch_starts_a_gru(tiny):
    data, settings = tiny
    settings = dataclasses.replace(settings, width=64)
    net = model.new_model(baselines.GRU4Rec, settings, data)
    assert len(net.trunk) == settings.layers
    for block in net.trunk:
        assert isinstance(block, baselines.Recurrent)
        # Uniform within 1 / sqrt(D) = 1/8, of deviation 1/8/sqrt(3) = .072; attention's is .02
        assert block.gru.weight_hh_l0.std().item() == pytest.approx(0.072, abs=0.003)
        assert block.gru.weight_hh_l0.abs().max() <= 1 / 8
    assert net.item.weight[1:].std().item() == pytest.approx(0.02, abs=0.003)
    assert not net.item.weight[0].any()


def test_items_of_sasrec_with_text_by_equation(tiny, tmp_path):
    data, settings = tiny
    command = ["--run", settings.run, "--kind", "text", "--out", str(tmp_path / "text")]
    assert rivals.main(command) == 0
    settings = dataclasses.replace(settings, run=str(tmp_path / "text"))
    net = model.new_model(baselines.SASRecWithText, settings, data)
    assert not net.item.weight.any()
    own = rivals.load_run(command[1], data)
    mean = rivals.mean_texts(own.sae.standardize(own.embeddings), data)
    torch.testing.assert_close(net.item_table(), mean @ net.project.weight.T)
    trained, _ = model.train_model(net, data)
    assert trained.item.weight[1:].any() and not trained.item.weight[0].any()
    expected = trained.item.weight + mean @ trained.project.weight.T
    torch.testing.assert_close(trained.item_table(), expected)
