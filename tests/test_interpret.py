"""Interpretability scores against planted truths, brute force and published examples of kappa."""

import csv
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval
import model
import sae
import saerec
from conftest import copy_run, make_run


def test_firing_auroc_by_pairs():
    random = torch.Generator().manual_seed(0)
    activation = torch.rand(40, 5, generator=random) * (torch.rand(40, 5, generator=random) < 0.4)
    truth = torch.rand(40, 3, generator=random) < 0.3
    got = eval.firing_auroc(activation, truth)
    for j in range(3):
        for m in range(5):
            yes, no = activation[truth[:, j], m], activation[~truth[:, j], m]
            pairs = (yes[:, None] > no).double() + 0.5 * (yes[:, None] == no)
            assert got[j, m].item() == pytest.approx(pairs.mean().item())


def planted(texts=800, factors=6, width=32):
    torch.manual_seed(0)
    true = F.normalize(torch.randn(factors, width), dim=1)
    told = torch.rand(texts, factors) < 0.3
    return true, told, told.float() @ true + 0.01 * torch.randn(texts, width)


def test_recovery_is_perfect_for_the_truth_and_poor_for_noise():
    true, told, x = planted()
    codes = told.float() * torch.rand(len(x), 6).add(0.5)
    exact = eval.recovery(true, sae.Codes(*codes.topk(6)), x, told)
    assert exact["recovered"] == 1 and exact["mean_cosine"] > 0.99 and exact["auroc"] == 1 and exact["isolation"] > 0.3
    noise = eval.recovery(torch.randn(6, 32), sae.Codes(*torch.rand(len(x), 6).topk(3)), x, told)
    assert noise["recovered"] == 0 and noise["auroc"] < 0.65 and noise["isolation"] < 0.1
    both = codes.clone()
    both[:, 0] = both[:, 1] = torch.maximum(codes[:, 0], codes[:, 1])  # one latent for two intents tells neither apart
    mixed = eval.recovery(true, sae.Codes(*both.topk(6)), x, told)
    assert mixed["isolation"] < exact["isolation"] - 0.05 and mixed["auroc"] < 1


def test_stability_of_a_permuted_and_of_a_random_library():
    vectors = F.normalize(torch.randn(20, 16), dim=1)
    assert eval.stability(vectors, vectors[torch.randperm(20)])["above_09"] == 1
    assert eval.stability(vectors, F.normalize(torch.randn(20, 16), dim=1))["above_09"] < 0.2


def test_score_is_the_id_part_and_its_intent_terms(tiny_run):
    data = saerec.run_dataset(tiny_run)
    net = model.load_model(tiny_run, "sae", data, model.load_library(tiny_run, data))
    u, table, J = torch.randn(8), net.item_table().detach(), len(net.df)
    for strength, chosen in (([], []), ([2.0, 1.0, 0.0], [J - 1, 0, J])):
        personal = torch.tensor(strength), torch.tensor(chosen, dtype=torch.int32)
        scores = u @ table.T + net.match(*(column[None] for column in personal))[0]
        for item in range(1, len(data.items)):
            intents, terms = model.intent_terms(net, u, item, personal)
            assert len(intents) == len(set(intents.tolist())) and terms.tolist() == sorted(terms.tolist(), reverse=True)
            torch.testing.assert_close(u @ net.item.weight[item] + terms.sum(), scores[item])


def test_interpret_writes_what_it_measured(tmp_path, tiny_run, capsys):
    run = copy_run(tiny_run, tmp_path / "run")
    assert eval.main(["interpret", "--run", str(run), "--users", "9", "--device", "cpu"]) == 0
    report = json.loads((run / "interpret.json").read_text())
    rows = [r for r in map(json.loads, (run / "intents.jsonl").read_text().splitlines()) if r["detection_texts"] >= 3]
    rows = [r for r in rows if r["detection_auroc"] is not None]
    assert report["labels"]["SAE"]["median"] == pytest.approx(np.median([r["detection_auroc"] for r in rows]))
    assert report["labels"]["SAE, labels permuted"]["median"] == pytest.approx(np.median([r["permuted_auroc"] for r in rows]))
    assert 0 < report["stability"]["mean_cosine"] <= 1 and report["deletion"]["rank_without_largest"] >= 1
    assert "deletion test" in capsys.readouterr().out and "recovery" not in report


def test_deletion_test_by_hand(tiny_run):
    data = saerec.run_dataset(tiny_run)
    net = model.load_model(tiny_run, "sae", data, model.load_library(tiny_run, data))
    personal = model.personal_intents(data, model.load_library(tiny_run, data), net.settings)
    got = eval.deletion_test(net, data, personal, range(10), seed=0)
    states, ranks = model.user_states(net, data, personal, "test"), []
    for user in range(10):
        scores = model.model_scores(net, data, personal, "test")(torch.tensor([user]))[0].numpy()
        scores[[0, *data.history(user, "test")]] = -np.inf
        best = scores.argmax()
        _, terms = model.intent_terms(net, states[user], int(best), [column[data.start[user + 1] - 2] for column in personal])
        if len(terms) > 1:
            lowered = scores[best] - terms[0].item()
            ranks.append(1 + sum(s > lowered for v, s in enumerate(scores) if v != best))
    assert got["users"] == len(ranks) and got["rank_without_largest"] == pytest.approx(np.mean(ranks))


def test_recovery_table_on_the_planted_world(tmp_path):
    folder = tmp_path / "planted"
    small = ["--users", "60", "--items", "80", "--intents", "8", "--texts", "3"]
    assert saerec.main(["prepare", "planted", "--out", str(folder), *small]) == 0
    run = make_run(folder, tmp_path / "run", sae="--active 4", stages="embed sae")
    rows = eval.recovery_table(run, saerec.load_dataset(folder), 0)
    assert {row["method"] for row in rows} == {"SAE", "L1-SAE", "PCA", "k-means", "dense autoencoder"}
    assert len({(row["method"], row["K"], row["M"]) for row in rows}) == len(rows)
    own = rows[0]
    assert own["K"] == 4 and own["M"] == 16 and 0.5 < own["auroc"] <= 1 and 0 < own["mean_cosine"] <= 1


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_rating_sheet_is_blind_and_the_key_is_right(tmp_path, tiny_run, capsys):
    out = tmp_path / "sheet.csv"
    assert eval.main(["rate", "--run", str(tiny_run), "--out", str(out), "--intents", "8"]) == 0
    sheet, key = read(out), {row["question"]: row for row in read(tmp_path / "sheet_key.csv")}
    rows = sae.read_intents(tiny_run)
    assert len(sheet) == len(key) == 16 and all(row["answer"] == "" for row in sheet)
    for row in sheet:
        texts = [row[f"text {n}"] for n in range(1, 6)]
        right = int(key[row["question"]]["right"])
        if row["task"] == "intruder":
            assert len(set(texts)) == 5
            odd = texts.pop(right - 1)
            assert any(set(texts) <= set(intent["texts"]) and odd not in intent["texts"] for intent in rows)
        else:
            own = [intent for intent in rows if intent["texts"][:4] == texts[:4]]
            assert right == any(repr(intent["label"]) in row["asked"] for intent in own)
    assert {row["task"] for row in sheet[:8]} == {"intruder", "label"}  # shuffled

    def fill(name, answer):
        filled = [row | {"answer": answer(row, int(key[row["question"]]["right"]))} for row in sheet]
        with open(tmp_path / name, "w", newline="") as file:
            writer = csv.DictWriter(file, sheet[0])
            writer.writeheader()
            writer.writerows(filled)
        return str(tmp_path / name)

    expert = lambda row, right: right if row["task"] == "intruder" else 1 + 4 * right  # noqa: E731
    a, b, c = (fill(f"{name}.csv", expert) for name in "abc")
    capsys.readouterr()
    assert eval.main(["kappa", a, b, "--key", str(tmp_path / "sheet_key.csv")]) == 0
    out = capsys.readouterr().out
    assert "accuracy 1.00" in out and "mean fit 5.00 of own labels, 1.00 of other" in out and out.count("Cohen's kappa 1.00") == 2
    fill("c.csv", lambda row, right: right % 5 + 1 if row["task"] == "intruder" else 3)
    assert eval.main(["kappa", a, b, c]) == 0
    assert "accuracy" not in capsys.readouterr().out


def test_kappa_of_published_examples():
    """Cohen: 45 yes-yes, 15 yes-no, 25 no-yes, 15 no-no gives 0.1304. Fleiss: the table of 10 subjects and 14 raters gives 0.210."""
    a, b = np.repeat([1, 1, 0, 0], [45, 15, 25, 15]), np.repeat([1, 0, 1, 0], [45, 15, 25, 15])
    assert eval.cohen_kappa(a, b) == pytest.approx(0.1304, abs=1e-4)
    table = [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
             [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]  # fmt: skip
    assert eval.fleiss_kappa(np.stack([np.repeat(range(5), row) for row in table], 1)) == pytest.approx(0.210, abs=1e-3)


def test_sheets_that_cannot_be_scored(fails, tmp_path, tiny_run):
    header = "question,task,asked,answer\n"
    for name, body in (("good", "1,intruder,?,2\n2,label,?,5\n"), ("open", "1,intruder,?,\n"), ("wrong", "1,intruder,?,7\n"), ("less", "1,intruder,?,2\n")):
        (tmp_path / f"{name}.csv").write_text(header + body)
    good = tmp_path / "good.csv"
    assert eval.main(["kappa", str(good)]) == 0
    fails(eval.main, ["kappa", tmp_path / "none.csv"], "none.csv cannot be read", "eval.py rate")
    fails(eval.main, ["kappa", good, tmp_path / "open.csv"], "open.csv row 2", "answer is ''")
    fails(eval.main, ["kappa", good, tmp_path / "wrong.csv"], "wrong.csv row 2", "'7'", "1, 2, 3, 4, 5")
    fails(eval.main, ["kappa", good, tmp_path / "less.csv"], "other questions than")
    fails(eval.main, ["kappa"], "sheets")
    (tmp_path / "key.csv").write_text("question,task,right\n1,intruder,2\n2,label,5\n")
    fails(eval.main, ["kappa", good, "--key", tmp_path / "key.csv"], "key.csv row 3", "right is '5'", "0, 1")
