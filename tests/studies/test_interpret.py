"""Interpretability scores against planted truths, brute force and what scores are made of."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import saerec
from conftest import copy_run, make_run
from sae import Codes, SaeSettings, build_library, encode_all
from sources import planted
from studies import interpret
from studies.rivals import load_run


def test_a_name_is_told_if_two_top_texts_say_each_of_its_words():
    texts = ["the sea and a boat", "boats on the sea", "a boat"]
    rows = [dict(label=label, texts=texts) for label in ("sea, boat", "boats", "sea (7)", "wind")]
    assert interpret.told_names(rows) == 0.5
    by_a_model = [row | dict(label="Film", offline_label="sea") for row in rows]
    assert interpret.told_names(by_a_model) == 1


def test_firing_auroc_by_pairs():
    random = torch.Generator().manual_seed(0)
    fires = torch.rand(40, 5, generator=random) < 0.4
    activation = torch.rand(40, 5, generator=random) * fires
    truth = torch.rand(40, 3, generator=random) < 0.3
    got = interpret.firing_auroc(activation, truth)
    for j in range(3):
        for m in range(5):
            yes = activation[truth[:, j], m]
            no = activation[~truth[:, j], m]
            pairs = (yes[:, None] > no).double() + 0.5 * (yes[:, None] == no)
            assert got[j, m].item() == pytest.approx(pairs.mean().item())


def test_firing_auroc_without_a_positive():
    got = interpret.firing_auroc(torch.rand(4, 2), torch.zeros(4, 1, dtype=torch.bool))
    assert got.isnan().all()


def factors(texts=800, count=6, width=32):
    """True directions, which texts tell of them, and the texts they make."""
    torch.manual_seed(0)
    true = F.normalize(torch.randn(count, width), dim=1)
    told = torch.rand(texts, count) < 0.3
    return true, told, told.float() @ true + 0.01 * torch.randn(texts, width)


def test_recovery_is_perfect_for_the_truth_and_poor_for_noise():
    true, told, x = factors()
    torch.testing.assert_close(interpret.true_directions(x, told), true, atol=0.02, rtol=0)
    codes = told.float() * torch.rand(len(x), 6).add(0.5)
    exact = interpret.recovery(true, Codes(*codes.topk(6)), x, told)
    assert exact["recovered"] == 1 and exact["mean_cosine"] > 0.99
    assert exact["auroc"] == 1 and exact["isolation"] > 0.3
    noise = Codes(*torch.rand(len(x), 6).topk(3))
    poor = interpret.recovery(torch.randn(6, 32), noise, x, told)
    assert poor["recovered"] == 0 and poor["auroc"] < 0.65 and poor["isolation"] < 0.1
    # One latent for two intents tells neither apart
    both = codes.clone()
    both[:, :2] = torch.maximum(codes[:, :1], codes[:, 1:2])
    mixed = interpret.recovery(true, Codes(*both.topk(6)), x, told)
    assert mixed["isolation"] < exact["isolation"] - 0.05 and mixed["auroc"] < 1


def test_stability_of_a_permuted_and_of_a_random_library():
    torch.manual_seed(0)
    vectors = F.normalize(torch.randn(20, 16), dim=1)
    same = interpret.stability(vectors, 3 * vectors[torch.randperm(20)])
    assert same["above_09"] == same["above_07"] == 1
    assert same["mean_cosine"] == pytest.approx(1)
    random = F.normalize(torch.randn(20, 16), dim=1)
    other = interpret.stability(vectors, random)
    assert other["above_09"] < 0.2
    best = [max(float(v @ w) for w in random) for v in vectors]
    assert other["mean_cosine"] == pytest.approx(np.mean(best))
    assert other["above_07"] == np.mean([cosine > 0.7 for cosine in best])


def test_assignment_is_that_of_brute_force():
    torch.manual_seed(1)
    for n, m in ((1, 1), (3, 3), (4, 6), (6, 4), (6, 6)):
        gain = torch.randn(n, m).double().numpy()
        rows, columns = interpret.assignment(gain)
        assert len(set(rows.tolist())) == len(set(columns.tolist())) == min(n, m)
        small = gain if n <= m else gain.T
        choices = itertools.permutations(range(max(n, m)), min(n, m))
        best = max(sum(small[i, j] for i, j in enumerate(one)) for one in choices)
        assert gain[rows, columns].sum() == pytest.approx(best)


def test_stability_finds_permuted_noisy_copies():
    """One to one, the permutation is found; two copies of one direction can't both be matched."""
    torch.manual_seed(0)
    vectors = F.normalize(torch.randn(20, 32), dim=1)
    order = torch.randperm(20)
    noisy = F.normalize(vectors[order] + 0.3 * torch.randn(20, 32) / 32**0.5, dim=1)
    rows, columns = interpret.assignment((vectors @ noisy.T).double().numpy())
    assert torch.equal(order[columns], rows)
    found = interpret.stability(vectors, noisy)
    own = (vectors[order] * noisy).sum(1).mean().item()
    assert found["matched_cosine"] == pytest.approx(own, abs=1e-6)
    twice = torch.cat([vectors[:1], vectors])
    fewer = interpret.stability(twice, torch.cat([noisy, torch.eye(1, 32)]))
    assert fewer["mean_cosine"] > fewer["matched_cosine"] + 0.02


def test_label_scores_by_hand():
    rows = []
    for texts, score in ((3, 0.9), (5, 0.7), (9, 0.85), (2, 1.0), (4, None)):
        rows.append(dict(detection_texts=texts, detection_auroc=score, permuted_auroc=0.5))
    got = interpret.label_scores(rows)
    assert got == dict(intents=3, of=5, median=0.85, above_08=pytest.approx(2 / 3))
    assert interpret.label_scores(rows, "permuted_auroc")["above_08"] == 0
    assert interpret.label_scores(rows[3:]) == dict(intents=0, of=2)


def test_labels_of_clusters_are_made_as_labels_of_intents(tiny_run):
    """Clusters in the place of latents: codes and texts tell a name, whatever the directions are."""
    run = load_run(tiny_run, saerec.run_dataset(tiny_run))
    codes = encode_all(run.sae, run.embeddings)
    support = torch.full((len(run.sae.W_dec),), 3)
    directions = run.sae.W_dec.detach()
    own = build_library(directions, codes, support, run.corpus, run.settings)[1]
    assert build_library(directions.flip(0), codes, support, run.corpus, run.settings)[1] == own
    rows = interpret.cluster_labels(run, 4, seed=0)
    assert 0 < len(rows) <= 4
    assert sum(row["density"] for row in rows) <= 1  # a text is in one cluster


def test_clusters_as_large_as_intents(tiny_run, monkeypatch):
    """Intents fire on a quarter of the texts, so there are four clusters as large."""
    asked = []

    def clusters(run, count, seed):
        asked.append(count)
        return []

    monkeypatch.setattr(interpret, "cluster_labels", clusters)
    row = dict(density=0.25, detection_texts=3, detection_auroc=0.9, permuted_auroc=0.5)
    row["meaning_auroc"] = None
    interpret.measure_labels(None, [row] * 7, seed=0)
    assert asked == [7, 4]


def test_interpret_writes_what_it_measured(tmp_path, tiny_data, capsys):
    half = "--held-out 0.5"  # so that intents fire on enough held-out texts to be judged
    run = make_run(tiny_data, tmp_path / "run", sae=half, stages="embed sae")
    copy = tmp_path / "copy.json"
    flags = ["--device", "cpu", "--out", str(copy)]
    assert interpret.main(["--run", str(run), *flags]) == 0
    out = capsys.readouterr().out
    report = json.loads((run / "interpret.json").read_text())
    assert json.loads(copy.read_text()) == report
    rows = []
    for line in (run / "intents.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["detection_texts"] >= 3 and row["detection_auroc"] is not None:
            rows.append(row)
    assert len(rows) > 1
    median = np.median([row["detection_auroc"] for row in rows])
    others = [row["permuted_auroc"] for row in rows]
    permuted = np.median([score for score in others if score is not None])
    assert report["labels"]["SAE"]["median"] == pytest.approx(median)
    assert report["labels"]["SAE, labels permuted"]["median"] == pytest.approx(permuted)
    for key in interpret.COMPARED:
        assert 0 < report[key]["matched_cosine"] <= 1 + 1e-6
        assert 0 < report[key]["mean_cosine"] <= 1 + 1e-6
    # Of unequal numbers, as intents' are, the matching leaves the worst out
    assert report["kmeans"]["matched_cosine"] <= report["kmeans"]["mean_cosine"] + 1e-6
    assert "SAE, by meaning" in report["labels"]
    assert "recovery" not in report
    assert "intents among random directions" in out
    assert f"{report['floor']['mean_cosine']:.2f}" in out


def test_runs_that_cannot_be_interpreted(tmp_path, tiny_run, fails):
    fails(interpret.main, [], "--run is missing")
    run = copy_run(tiny_run, tmp_path / "run", "e*")
    fails(interpret.main, ["--run", run], "sae.safetensors is missing", f"sae.py --run {run}")


@pytest.fixture(scope="module")
def planted_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    small = ["--users", "60", "--items", "80", "--intents", "8", "--texts", "3"]
    assert planted.main(["--out", str(folder / "planted"), *small]) == 0
    return make_run(folder / "planted", folder / "run", sae="--active 4", stages="embed sae")


def test_recovery_table_on_the_planted_world(planted_run):
    run = load_run(planted_run, saerec.run_dataset(planted_run))
    rows = interpret.recovery_table(run, seed=0)
    known = {"SAE", "L1-SAE", "random directions", *interpret.DIRECTIONS.values()}
    assert {row["method"] for row in rows} == known
    assert [row["K"] for row in rows if row["method"].startswith("k-means")] == [1, 4]
    assert len({(row["method"], row["K"], row["M"]) for row in rows}) == len(rows)
    own = rows[0]
    assert own["K"] == 4 and own["M"] == 16
    assert 0.5 < own["auroc"] <= 1 and 0 < own["mean_cosine"] <= 1
    # Trained anew with the same settings it is the run's own SAE, so the row is about its library
    x = run.sae.standardize(run.embeddings)
    tensors, _ = saerec.load_artifact(run.data.folder / "truth.safetensors", "")
    truth = tensors["text_intents"].bool()
    codes = encode_all(run.sae, run.embeddings)
    expected = interpret.recovery(run.sae.W_dec.detach(), codes, x, truth)
    assert {name: own[name] for name in expected} == pytest.approx(expected)
    lines = list(interpret.recovery_lines(rows))
    assert len(lines) == 1 + len(rows)
    assert lines[1].split()[:3] == ["SAE", "4", "16"]
    assert lines[2 + [row["K"] for row in rows[1:]].index(None)].split()[:2] == ["L1-SAE", "16"]


def test_sizes_that_fit():
    """No more active latents than there are latents."""
    sizes = list(interpret.other_sizes(SaeSettings(latents=16, active=8)))
    wanted = [{}, dict(active=0.25), dict(active=0.5), dict(active=2)]
    assert sizes == [*wanted, dict(latents=0.5), dict(latents=2)]


def test_a_world_that_changed(planted_run, tmp_path, fails):
    """A truth that belongs to other data is refused."""
    data = saerec.run_dataset(planted_run)
    run = load_run(planted_run, data)
    folder = tmp_path / "planted"
    shutil.copytree(data.folder, folder)
    changed = dataclasses.replace(data, folder=folder, hash="another")
    moved = run._replace(corpus=dataclasses.replace(run.corpus, data=changed))
    with pytest.raises(saerec.UserError, match="truth.safetensors was made from another dataset"):
        interpret.recovery_table(moved, seed=0)
    (folder / "truth.safetensors").unlink()
    with pytest.raises(saerec.UserError, match="truth.safetensors is missing.*sources/planted.py"):
        interpret.recovery_table(moved, seed=0)
