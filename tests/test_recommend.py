"""Asking for recommendations with reasons, steering them, and the report of a run."""

import csv
import json
import re

import numpy as np
import pytest
import torch

import eval
import model
import sae
import saerec
from conftest import copy_run, make_run


@pytest.fixture
def ask(tiny_run, capsys):
    """ask(*arguments): what `recommend --json` prints, parsed."""

    def run(*arguments, run=tiny_run):
        capsys.readouterr()
        assert model.main(["recommend", "--run", str(run), "--json", "--device", "cpu", *map(str, arguments)]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_scores_are_the_models_and_split_exactly(ask, tiny_run):
    """The list of a user whose whole history is given is what the model ranks, and parts add up to each score."""
    data = saerec.run_dataset(tiny_run)
    library = model.load_library(tiny_run, data)
    net, personal = model.load_model(tiny_run, "sae", data, library), None
    personal = model.personal_intents(data, library, net.settings)
    user = 5
    history = data.history(user, "test")
    scores = model.model_scores(net, data, personal, "test")(torch.tensor([user]))[0]
    scores[[0, *history.tolist()]] = -torch.inf
    got = ask("--history", " ".join(data.items[v] for v in history), "--top", 6)
    best = scores.argsort(descending=True)[:6].tolist()
    assert [one["item"] for one in got["recommendations"]] == [data.items[v] for v in best]
    for one, item in zip(got["recommendations"], best):
        assert one["score"] == pytest.approx(scores[item].item(), abs=1e-5)
        assert one["id_part"] + sum(t["value"] for t in one["terms"]) + one["rest"] == pytest.approx(one["score"], abs=1e-6)
        own = [column[data.start[user + 1] - 2] for column in personal]
        number, value = model.intent_terms(net, model.user_states(net, data, personal, "test")[user], item, own)
        assert {t["intent"] for t in one["terms"]} <= set(number.tolist()) and one["rank"] == one["rank_before"]
    strength, intent = (column[data.start[user + 1] - 2] for column in personal)  # of the last item that is known
    assert [p["intent"] for p in got["personal"]] == intent[: net.settings.personal].tolist()
    assert [p["strength"] for p in got["personal"]] == pytest.approx(strength[: net.settings.personal].tolist(), rel=1e-5)
    for one in got["personal"]:  # what evokes an intent carries it
        for title in one["evoked_by"]:
            assert library.code(data.titles.index(title), one["intent"]) > 0


def test_a_user_a_history_and_titles_ask_the_same(ask, tiny_run):
    data = saerec.run_dataset(tiny_run)
    items = data.flat[data.start[3] : data.start[4]].tolist()
    by_user = ask("--user", data.users[3])
    assert by_user == ask("--history", " ".join(data.items[v] for v in items))
    assert by_user == ask("--history-titles", "; ".join(data.titles[v].upper() for v in items))
    assert not {one["item"] for one in by_user["recommendations"]} & {one["item"] for one in by_user["history"]}


@pytest.mark.parametrize("flags", ["--paper", "--retrieval trunk", "--retrieval similarity", "--personal 0", "--public 0", "--match 0",
                                   "--no-grounded"])  # fmt: skip
def test_other_models_explain_what_they_can(tmp_path, tiny_data, tiny_run, ask, flags):
    run = make_run(tiny_data, copy_run(tiny_run, tmp_path / "run"), model=flags, stages="model")
    got = ask("--user", "u3", run=run)
    assert bool(got["personal"]) <= (flags != "--personal 0") and bool(got["public"]) == (flags != "--public 0")
    data = saerec.run_dataset(run)
    library = model.load_library(run, data)
    net, user = model.load_model(run, "sae", data, library), data.users.index("u3")
    asked = model.explain(net, data, library, sae.read_intents(run), data.history(user, "test"), 5)["recommendations"]
    scores = model.model_scores(net, data, model.personal_intents(data, library, net.settings), "test")(torch.tensor([user]))[0]
    assert [one["score"] for one in asked] == pytest.approx([scores[data.items.index(one["item"])].item() for one in asked], abs=1e-5)
    for one in got["recommendations"]:
        assert one["id_part"] + sum(t["value"] for t in one["terms"]) + one["rest"] == pytest.approx(one["score"], abs=1e-6)
        assert bool(one["terms"]) <= (flags != "--paper")


def carriers(run, intent):
    data = saerec.run_dataset(run)
    library = model.load_library(run, data)
    return {data.items[v] for v in range(1, len(data.items)) if library.code(v, intent) > 0}


def test_more_less_and_block(ask, tiny_run, capsys):
    rows = sae.read_intents(tiny_run)
    intent = max(rows, key=lambda row: row["density"])["intent"]
    name, having = rows[intent]["label"], carriers(tiny_run, intent)
    share = {}
    for flags in ((), ("--more", intent, "--strength", 50), ("--less", intent, "--strength", 50), ("--block", intent)):
        got = ask("--user", "u3", "--top", 5, *flags)["recommendations"]
        share[flags[:1]] = np.mean([one["item"] in having for one in got])
    assert share[("--more",)] >= share[()] >= share[("--less",)] and share[("--more",)] > share[("--less",)] and share[("--block",)] == 0
    plain, steered = (ask("--user", "u3", "--top", 30, *flags) for flags in ((), ("--more", intent)))
    order = [one["item"] for one in plain["recommendations"]]
    scores = {one["item"]: one["score"] for one in plain["recommendations"]}
    for one in steered["recommendations"]:
        assert order[one["rank_before"] - 1] == one["item"] and one["score"] == pytest.approx(scores[one["item"]])
    assert steered["cost"] == pytest.approx(0, abs=1e-6)  # the whole catalogue: only its order changed
    several = ask("--user", "u3", "--top", 30, "--more", f"{intent}, {(intent + 1) % len(rows)}", "--strength", 2)["recommendations"]
    data, library = saerec.run_dataset(tiny_run), model.load_library(tiny_run, saerec.run_dataset(tiny_run))
    net = model.load_model(tiny_run, "sae", data, library)
    both = model.intent_shift(net, torch.eye(len(rows))[[intent, (intent + 1) % len(rows)]].sum(0))
    moved = {one["item"]: one["steered"] - one["score"] for one in several}
    shifts = {item: both[data.items.index(item)].item() / both.max().item() for item in moved}
    deviation = max(moved.values()) / (2 * max(shifts.values()))  # the item that has most of them moves by two deviations
    assert all(moved[item] == pytest.approx(2 * deviation * shifts[item], abs=1e-4) for item in moved)
    few = ask("--user", "u3", "--top", 3, "--more", intent, "--strength", 50)
    best = sorted(scores.values(), reverse=True)[:3]
    assert few["cost"] == pytest.approx(np.mean(best) - np.mean([one["score"] for one in few["recommendations"]])) and few["cost"] >= 0
    assert model.main(["recommend", "--run", str(tiny_run), "--user", "u3", "--more", str(intent), "--strength", "50"]) == 0
    out = capsys.readouterr().out
    assert f"more of: {name}" in out and "(was " in out and "steering costs" in out and " = id " in out


def test_the_shift_by_its_definition(tiny_run):
    data = saerec.run_dataset(tiny_run)
    library = model.load_library(tiny_run, data)
    net, weight = model.load_model(tiny_run, "sae", data, library), torch.randn(len(library.vectors))
    codes = np.array([[library.code(v, j) for j in range(len(weight))] for v in range(len(data.items))])
    expected = (codes / codes.max(0)) @ weight.numpy()
    torch.testing.assert_close(model.intent_shift(net, weight).double(), torch.from_numpy(expected), atol=1e-5, rtol=1e-4)
    scores = torch.randn(2, len(data.items))
    steered = model.steer(scores, torch.from_numpy(expected).float())
    torch.testing.assert_close((steered - scores)[1], scores[1, 1:].std() * torch.from_numpy(expected).float(), atol=1e-5, rtol=1e-4)


def test_intents_are_found_by_number_label_and_keyword():
    rows = [dict(intent=0, label="Space, orbit", keywords=["space", "orbit"]), dict(intent=1, label="recipes", keywords=["space", "oven"])]
    assert model.find_intents(rows, "1") == [1] and model.find_intents(rows, "oven, orbit") == [1, 0]
    assert model.find_intents(rows, "space") == [0]  # in a label, which goes before keywords
    assert model.find_intents(rows, "space, orbit;RECIPES") == [0, 1]
    rows[0]["is_intent"] = False  # it has no items any more that could be asked for
    assert model.find_intents(rows, "space") == [1]
    with pytest.raises(saerec.UserError, match="no intent '0'"):
        model.find_intents(rows, "0")


def test_questions_that_cannot_be_answered(fails, tiny_run):
    def refuses(arguments, *words):
        fails(model.main, ["recommend", "--run", tiny_run, "--device", "cpu", *arguments], *words)

    refuses([], "give one of --user, --history and --history-titles")
    refuses(["--user", "u1", "--history", "i1"], "give one of", "not 2")
    refuses(["--user", "u99"], "no user 'u99'", "u9")
    refuses(["--history", "i1 i999"], "no item 'i999'", "i9")
    refuses(["--history-titles", "Thing 1; Thong 2"], "no item titled 'Thong 2'", "Thing 2")
    refuses(["--user", "u1", "--more", "spacee"], "no intent 'spacee'", "space")
    refuses(["--user", "u1", "--block", "zzzzzzzz"], "no intent 'zzzzzzzz'", "intents.jsonl")
    refuses(["--user", "u1", "--strength", "2"], "--strength changes nothing")
    fails(model.main, ["recommend", "--user", "u1"], "--run is missing")


def test_steering_curve_by_hand(tiny_run, tmp_path, fails):
    run = copy_run(tiny_run, tmp_path / "run")
    assert eval.main(["steer", "--run", str(run), "--strengths", "0 1 30", "--out", str(tmp_path / "copy.json"), "--device", "cpu"]) == 0
    assert (tmp_path / "copy.json").read_bytes() == (run / "steering.json").read_bytes()
    rows = json.loads((run / "steering.json").read_text())["rows"]
    assert [row["strength"] for row in rows] == [0, 1, 30] and rows[0]["share"] <= rows[1]["share"] < rows[2]["share"]
    data = saerec.run_dataset(run)
    library = model.load_library(run, data)
    net = model.load_model(run, "sae", data, library)
    ranks = model.rank_users(model.model_scores(net, data, model.personal_intents(data, library, net.settings), "valid"), data, "valid")
    assert rows[0]["ndcg"] == pytest.approx(saerec.ranking_metrics(ranks)["NDCG@10"])
    fails(eval.main, ["steer", "--run", run, "--strengths", "a lot"], "--strengths", "'0 0.5 1'")


def test_tsne_keeps_clusters_together():
    torch.manual_seed(0)
    x = torch.randn(3, 10).mul(4)[torch.arange(90) % 3] + torch.randn(90, 10) * 0.3
    y = eval.tsne(x)
    nearest = torch.cdist(y, y).fill_diagonal_(torch.inf).argmin(1)
    assert y.isfinite().all() and (nearest % 3 == torch.arange(90) % 3).float().mean() > 0.95


def test_neighbours_by_brute_force(tiny_run):
    data = saerec.run_dataset(tiny_run)
    library = model.load_library(tiny_run, data)
    on = np.array([[library.code(v, j) > 0 for j in range(len(library.vectors))] for v in range(len(data.items))], float)
    cosine = on.T @ on / np.sqrt(np.outer(on.sum(0), on.sum(0)))
    np.fill_diagonal(cosine, 0)
    for j, found in enumerate(eval.neighbours(library, len(data.items) - 1, count=3)):
        assert [v for _, v in found] == pytest.approx(sorted(cosine[j], reverse=True)[: len(found)], abs=1e-3)
        assert all(v == pytest.approx(cosine[j, k], abs=1e-3) for k, v in found)


def test_report_of_a_run(tmp_path, tiny_run, fails):
    run = copy_run(tiny_run, tmp_path / "run")
    for command in ("steer", "interpret", "report"):
        assert eval.main([command, "--run", str(run), "--device", "cpu"]) == 0
    page = (run / "report.html").read_text()
    content = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    metrics = json.loads((run / "metrics.json").read_text())
    assert {one["name"]: one["metrics"] for one in content["models"]} == {
        {"saerec": "SAERec", "sasrec": "SASRec"}.get(name, name): m for name, m in metrics["models"].items()
    }
    assert len(content["intents"]) == len(sae.read_intents(run)) and len(content["users"]) == 5
    with open(run / "log.csv") as file:
        assert [float(row["valid_NDCG@10"]) for row in csv.DictReader(file)] == [row["valid_NDCG@10"] for row in content["training"]["SAERec"]]
    for user in content["users"]:
        for one in user["recommendations"]:
            assert one["id_part"] + sum(value for _, value in one["terms"]) + one["rest"] == pytest.approx(one["score"], abs=1e-6)
    assert "ablation" not in content and content["steering"] and "recovery" not in content
    (run / "interpret.json").write_text("{")
    fails(eval.main, ["report", "--run", run], "interpret.json is not valid JSON")
    (run / "metrics.json").unlink()
    fails(eval.main, ["report", "--run", run], "metrics.json is missing", "eval.py --run")


def test_standard_errors_by_hand(tiny_run):
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    share, users = metrics["models"]["saerec"]["HR@10"], metrics["users"]
    assert metrics["standard_errors"]["saerec"]["HR@10"] == pytest.approx((share * (1 - share) / (users - 1)) ** 0.5)
