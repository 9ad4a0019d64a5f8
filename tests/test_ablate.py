"""Rivals of the SAE's intents, baselines, and the statistics of the ablation."""

import dataclasses
import itertools
import json
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval
import model
import sae
import saerec
from conftest import SMALL, copy_run, write_dataset

FLAGS = ["--model-flags", SMALL["model"], "--device", "cpu"]


@pytest.fixture
def tiny(tiny_run):
    data = saerec.run_dataset(tiny_run)
    return data, tiny_run, model.load_library(tiny_run, data)


def dense_codes(library):
    rows = len(library.indptr) - 1
    codes = torch.zeros(rows, len(library.vectors))
    codes[torch.arange(rows).repeat_interleave(library.indptr.diff()), library.indices.long()] = library.values
    return codes


def test_random_keeps_the_codes_and_shuffled_keeps_the_vectors(tiny):
    data, run, own = tiny
    random, shuffled = (model.load_library(run, data, kind, seed=1) for kind in ("random", "shuffled"))
    assert all(torch.equal(a, b) for a, b in zip(random[1:], own[1:])) and random.vectors.shape == own.vectors.shape
    torch.testing.assert_close(random.vectors.norm(dim=1), torch.ones(len(own.vectors)))
    assert (random.vectors - own.vectors).abs().max() > 0.1
    assert torch.equal(shuffled.vectors, own.vectors)
    before, after = dense_codes(own), dense_codes(shuffled)
    assert not torch.equal(before, after) and after[0].sum() == 0
    assert sorted(map(tuple, before.tolist())) == sorted(map(tuple, after.tolist()))
    assert all(not torch.equal(a, b) for a, b in zip(shuffled[1:], model.load_library(run, data, "shuffled", seed=2)[1:3]))


def test_text_is_the_mean_embedding_of_an_item(tiny):
    data, run, _ = tiny
    text, x = model.load_library(run, data, "text"), sae.standardized_texts(run, data)
    mixed = dense_codes(text) @ text.vectors
    for item in range(1, len(data.items)):
        own = x[torch.from_numpy(data.text_item == item)]
        torch.testing.assert_close(mixed[item], own.mean(0) if len(own) else torch.zeros(x.shape[1]))


@pytest.mark.parametrize("kind", ["kmeans", "pca", "dense"])
def test_rivals_have_unit_vectors_and_codes_that_rebuild(kind):
    torch.manual_seed(0)
    centers = F.normalize(torch.randn(6, 16), dim=1)
    x = centers[torch.arange(600) % 6] + 0.05 * torch.randn(600, 16)
    vectors, codes = sae.rival(kind, x, 12, 4, seed=0)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
    assert codes.values.min() >= 0 and codes.values.shape == (600, 1 if kind == "kmeans" else 4)
    rebuilt = F.embedding_bag(codes.latents, vectors, per_sample_weights=codes.values, mode="sum")
    assert F.cosine_similarity(rebuilt + (x.mean(0) if kind != "kmeans" else 0), x).mean() > 0.8
    assert torch.equal(vectors, sae.rival(kind, x, 12, 4, seed=0)[0])


def test_kmeans_finds_planted_clusters_and_is_a_fixed_point():
    torch.manual_seed(0)
    truth = 5 * torch.randn(4, 8)
    x = truth[torch.arange(400) % 4] + 0.1 * torch.randn(400, 8)
    found = min((sae.kmeans(x, 4, seed) for seed in range(5)), key=lambda c: torch.cdist(x, c).min(1).values.sum())
    assert torch.cdist(truth, found).min(1).values.max() < 0.1
    nearest = torch.cdist(x, found).argmin(1)
    torch.testing.assert_close(found, torch.stack([x[nearest == c].mean(0) for c in range(4)]))


def test_pca_axes_by_covariance():
    x = torch.randn(200, 6) * torch.tensor([3.0, 2, 1, 0.5, 0.2, 0.1])
    vectors, codes = sae.rival("pca", x, 4, 2, seed=0)
    _, axes = torch.linalg.eigh(torch.cov(x.T))
    assert (vectors[:2] @ axes[:, [-1, -2]]).abs().diagonal().min() > 0.999 and torch.equal(vectors[2:], -vectors[:2])
    best = ((x - x.mean(0)) @ vectors.T).topk(2)
    assert torch.equal(best.indices, codes.latents)


def test_permutation_test_by_enumeration():
    difference = np.array([0.3, -0.1, 0.4, 0.2, 0.0, 0.25, -0.05, 0.3])
    means = [abs(np.mean(np.array(signs) * difference)) for signs in itertools.product([1, -1], repeat=8)]
    exact = np.mean([mean >= abs(difference.mean()) - 1e-12 for mean in means])
    assert eval.permutation_test(difference, seed=0) == pytest.approx(exact, abs=0.01)
    assert eval.permutation_test(np.full(40, 0.1), seed=0) == pytest.approx(1 / 10001)
    assert eval.permutation_test(np.zeros(5), seed=0) == 1


def test_holm_by_hand():
    assert eval.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert eval.holm([0.6, 0.5]) == [1, 1]


def test_groups_are_short_histories_and_rare_targets(tiny):
    data, groups = tiny[0], eval.user_groups(tiny[0])
    counts = [(data.training_items() == target).sum() for target in data.targets("test")]
    rare, short = groups["rare targets"], groups["short histories"]
    assert max(c for c, r in zip(counts, rare) if r) < min(c for c, r in zip(counts, rare) if not r)
    lengths = np.diff(data.start)
    assert lengths[short].max() < lengths[~short].min() and 0 < short.sum() < len(short)


def test_bpr_beats_popularity_where_users_keep_to_a_topic(tmp_path):
    """Users draw from one of two halves of the catalogue: what others like helps, what is popular doesn't."""
    random, folder = np.random.default_rng(0), tmp_path / "d"
    folder.mkdir()
    rows = [(random.permutation(20)[:12] + 20 * (user % 2)) for user in range(200)]
    (folder / "sequences.txt").write_text("".join(f"u{u} " + " ".join(f"i{i}" for i in row) + "\n" for u, row in enumerate(rows)))
    (folder / "texts.jsonl").write_text("".join(json.dumps({"item": f"i{i}", "text": "x"}) + "\n" for i in range(40)))
    data, settings = saerec.load_dataset(folder), model.ModelSettings()
    popular, bpr = (saerec.ranking_metrics(f(data, settings)[0])["HR@10"] for f in (eval.popularity_ranks, partial(eval.bpr_ranks, batch=32)))
    assert bpr > popular + 0.2, (bpr, popular)


@pytest.fixture
def ranked(monkeypatch):
    """What eval.py ranks: (part, scores of all users, ranks) of each call."""
    calls = []

    def note(score, data, part):
        ranks = model.rank_users(score, data, part)
        calls.append((part, score(torch.arange(len(data.users))), ranks))
        return ranks

    monkeypatch.setattr(eval, "rank_users", note)
    return calls


@pytest.mark.parametrize("kind", ["users", "texts", "intents"])
def test_item_knn_by_brute_force(tiny, ranked, kind):
    """Each pair of items on its own, each user's score as a sum over the history; the best decay on validation is scored on test."""
    data, run, library = tiny
    items, users, texts, x = len(data.items), len(data.users), torch.from_numpy(data.text_item), sae.standardized_texts(run, data)
    if kind == "users":
        bought = np.array([np.bincount(data.history(user, "valid"), minlength=items) for user in range(users)])
        parts = bought / np.sqrt(bought.sum(0)).clip(1)
    elif kind == "texts":
        parts = np.stack([F.normalize(x[texts == item].sum(0), dim=0) for item in range(items)], 1)
    else:
        parts = (dense_codes(library) * model.inverse_frequency(*model.intent_frequency(data, library)).sqrt()).numpy().T
    ranks, parameters, valid = eval.neighbour_ranks(data, model.ModelSettings(run=str(run)), kind)
    *tried, (part, score, last) = ranked
    decays, reached = (1.0, 0.9, 0.7, 0.5), [saerec.ranking_metrics(one)["NDCG@10"] for _, _, one in tried]
    chosen = max(range(4), key=lambda at: (reached[at], decays[at]))
    assert parameters == 0 and valid == max(reached) and part == "test" and ranks is last
    for part, score, decay in [*((part, score, decay) for (part, score, _), decay in zip(tried, decays)), (part, score, decays[chosen])]:
        for user in range(users):
            expected = sum(decay**age * parts[:, item] @ parts for age, item in enumerate(data.history(user, part)[::-1]))
            np.testing.assert_allclose(score[user].numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beside", ["none", "sae"])
def test_item_knn_beside_a_model_adds_to_its_scores(tiny, ranked, beside):
    data, run, _ = tiny
    settings = model.ModelSettings(run=str(run), epochs=1, width=8, device="cpu", intents=beside)
    library = model.load_library(run, data, beside)
    net, users = model.train_model(data, library, settings)[0], torch.arange(len(data.users))
    eval.neighbour_ranks(data, settings, "users")
    alone = [score for part, score, _ in ranked if part == "valid"]
    ranked.clear()
    parameters = eval.neighbour_ranks(data, dataclasses.replace(settings, intents="sae"), "users", beside)[1]
    assert parameters == sum(p.numel() for p in net.parameters())
    assert [part for part, _, _ in ranked] == ["valid"] * 16 + ["test"]
    own = model.model_scores(net, data, model.personal_intents(data, library, settings), "valid")(users)
    for (_, both, _), (near, weight) in zip(ranked, itertools.product(alone, (0.1, 0.25, 0.5, 1.0))):
        expected = own + weight * near * own[:, 1:].std(1, keepdim=True) / near[:, 1:].std(1, keepdim=True)
        torch.testing.assert_close(both, expected)


def test_ablation_resumes_and_its_numbers_are_those_of_the_ranks(tmp_path, tiny_run, capsys, monkeypatch):
    run, out = copy_run(tiny_run, tmp_path / "run"), tmp_path / "ablation.json"
    command = ["ablate", "--run", str(run), "--seeds", "2", "--out", str(out), *FLAGS, "--only"]
    assert eval.main([*command, "popularity,SASRec"]) == 0
    first = json.loads(out.read_text())
    assert [row["name"] for row in first["rows"]] == ["SAERec", "popularity", "SASRec"]
    assert capsys.readouterr().out.count(", seed ") == 6
    stamps = {path: path.stat().st_mtime_ns for path in run.glob("ablation-*")}
    assert len(stamps) == 6
    next(iter(stamps)).unlink()  # as if interrupted
    assert eval.main([*command, "popularity,SASRec"]) == 0
    assert capsys.readouterr().out.count(", seed ") == 1
    again = json.loads(out.read_text())
    for row in [*first["rows"], *again["rows"]]:
        row.pop("seconds")
    assert first == again

    ranks = [saerec.load_artifact(run / f"ablation-sasrec-{seed}.safetensors", "")[0]["ranks"] for seed in (0, 1)]
    row = again["rows"][2]
    values = [saerec.ranking_metrics(r)["NDCG@10"] for r in ranks]
    assert row["NDCG@10"]["per_seed"] == values and row["NDCG@10"]["mean"] == pytest.approx(np.mean(values))
    assert row["NDCG@10"]["std"] == pytest.approx(np.std(values, ddof=1))
    test = next(t for t in again["tests"] if t["b"] == "SASRec")
    assert test["difference"] == pytest.approx(again["rows"][0]["NDCG@10"]["mean"] - np.mean(values))
    assert "Taking the intents of the SAE away" in again["verdict"] and "popularity" in again["verdict"]
    monkeypatch.setattr(eval, "CONFIGURATIONS", eval.CONFIGURATIONS | {"SASRec": dict(intents="none", width=4)})
    assert eval.main([*command, "popularity,SASRec"]) == 0  # other settings: done again
    assert capsys.readouterr().out.count(", seed ") == 2


def test_every_baseline_has_its_row(tmp_path, tiny_run):
    run = copy_run(tiny_run, tmp_path / "run")
    assert eval.main(["ablate", "--run", str(run), "--seeds", "1", *FLAGS, "--only", ",".join(eval.BASELINES)]) == 0
    rows = {row["name"]: row for row in json.loads((run / "ablation.json").read_text())["rows"]}
    assert list(rows) == ["SAERec", *eval.BASELINES]
    for name, row in rows.items():
        trained = name == "BPR-MF" or name.startswith(("SASRec", "SAERec"))
        assert (row["params"] > 0) == trained and 0 <= row["NDCG@10"]["mean"] <= 1, name
    assert rows["SAERec + item kNN by users"]["params"] == rows["SAERec"]["params"] > rows["SASRec + item kNN by users"]["params"]


def test_a_changed_variant_of_the_sae_is_trained_again(tmp_path, tiny_run, capsys, monkeypatch):
    command = ["ablate", "--run", str(copy_run(tiny_run, tmp_path / "run")), "--seeds", "1", *FLAGS, "--only", "half of K"]
    for factor, trained in ((0.5, 2), (0.5, 0), (0.7, 1)):
        monkeypatch.setitem(eval.CONFIGURATIONS, "half of K", dict(library=dict(active=factor)))
        capsys.readouterr()
        assert eval.main(command) == 0
        assert capsys.readouterr().out.count(", seed ") == trained


@pytest.mark.parametrize("name", [name for name in eval.CONFIGURATIONS if name != "SAERec"])
def test_every_configuration_trains_another_model_than_saerec(tmp_path, tiny_run, name):
    run = copy_run(tiny_run, tmp_path / "run")
    assert eval.main(["ablate", "--run", str(run), "--seeds", "1", *FLAGS, "--only", name]) == 0
    rows = json.loads((run / "ablation.json").read_text())["rows"]
    assert rows[0]["name"] == "SAERec" and rows[1]["params"] > 0 and 0 <= rows[1]["NDCG@10"]["mean"] <= 1
    settings = [saerec.load_artifact(path, "")[1]["settings"] for path in sorted(run.glob("ablation-*"))]
    assert settings[0] != settings[1] or "library" in eval.CONFIGURATIONS[name]


def test_unknown_configurations(fails, tiny_run):
    fails(eval.main, ["ablate", "--run", tiny_run, "--only", "magic"], "no configuration 'magic'", "SASRec")
    fails(eval.main, ["ablate", "--run", tiny_run, "--model-flags", "--widht 9"], "did you mean --width?")


def test_results_of_another_library_are_not_mixed_in(fails, tmp_path, tiny_run):
    run = copy_run(tiny_run, tmp_path / "run")
    command = ["ablate", "--run", str(run), "--seeds", "1", *FLAGS, "--only", "SASRec"]
    assert eval.main(command) == 0
    assert sae.main(["--run", str(run), *SMALL["sae"].split(), "--seed", "5"]) == 0
    fails(eval.main, command, "made from another", "intents.safetensors", "rm ", "ablation-*")


def test_other_saes_have_other_sizes(tiny):
    data, run, own = tiny
    half = eval.variant_library(run, data, dict(latents=0.5), seed=0)
    assert len(half.vectors) <= 8 < len(own.vectors)
    net, settings, embeddings = eval.train_variant(run, data, dict(active=2), seed=0)
    _, before = sae.load_sae(run, data)
    most = int((sae.encode_all(net, embeddings).values > 0).sum(1).max())
    assert settings.active == 2 * before.active and before.active < most <= settings.active


def test_recurrent_trunk_is_torchs_gru():
    torch.manual_seed(0)
    block, x = model.Recurrent(8, 2, 0.5).eval(), torch.randn(3, 5, 8)
    assert torch.equal(block(x), block.gru(x)[0])


def test_verdict_follows_the_numbers():
    rows = [dict(name=name, **{"NDCG@10": {"mean": mean}}) for name, mean in (("SAERec", 0.08), ("SASRec", 0.06), ("k-means", 0.1), ("PCA", 0.081))]
    tests = [dict(b="SASRec", difference=0.02, p_holm=0.001), dict(b="k-means", difference=-0.02, p_holm=0.002), dict(b="PCA", difference=-0.001, p_holm=0.5)]
    said = eval.verdict(rows, tests)
    assert "away from SAERec lowers it: NDCG@10 0.0800 with, 0.0600 without (p = 0.001)" in said
    assert "Worse than SAERec at 0.0800: SASRec (-25.0%)." in said and "Better than SAERec at 0.0800: k-means (+25.0%)." in said
    assert "Not told apart from SAERec at 0.0800: PCA (+1.2%)." in said
    tests[0] |= dict(difference=-0.02)
    assert "raises it" in eval.verdict(rows, tests)
    tests[0] |= dict(p_holm=0.3)
    assert "makes no difference that the test can tell" in eval.verdict(rows, tests)
