"""What steering moves, and what it costs."""

import json
import math

import pytest
import torch

import saerec
from conftest import copy_run
from eval import load_model
from model import MODELS, model_scores
from sae import SparseRows, load_intents
from tools import steer


def test_the_share_of_the_top_by_hand(monkeypatch):
    """Of the two best unseen items of each user; item 0 is padding, whatever its score."""
    monkeypatch.setattr(steer, "TOP", 2)
    scores = torch.tensor([[9.0, 1.0, 2.0, 3.0], [9.0, 4.0, 3.0, 2.0]])
    wanted = torch.tensor([[False, True, False, False], [False, False, True, True]])
    seen = torch.tensor([[3], [1]])
    assert steer.share_of_top(scores, wanted, seen).tolist() == [0.5, 1.0]


def test_only_intents_with_items_are_asked_for():
    codes = SparseRows(torch.tensor([0, 0, 2]), torch.tensor([1, 3]).int(), torch.ones(2), 5)
    assert set(steer.draw_intents(codes, 100, 0).tolist()) == {1, 3}


@pytest.mark.parametrize("name", MODELS)
def test_steering_curve(name, tiny_run, tmp_path, capsys):
    """Unsteered it is the model's validation; a strong push fills the list with what is asked."""
    run = copy_run(tiny_run, tmp_path / "run")
    command = ["--run", str(run), "--strengths", "0 1 30", "--model", name, "--device", "cpu"]
    assert steer.main(command) == 0
    report = json.loads((run / "steering.json").read_text())
    assert (report["dataset"], report["model"], report["users"]) == ("tiny", name, 24)
    rows = report["rows"]
    assert [row["strength"] for row in rows] == [0, 1, 30]
    assert rows[0]["share"] <= rows[1]["share"] < rows[2]["share"]
    data = saerec.run_dataset(run)
    model = load_model(run, name, data)
    ranks = saerec.rank_users(model_scores(model, data, "valid"), data, "valid")
    assert rows[0]["ndcg"] == pytest.approx(saerec.ranking_metrics(ranks)["NDCG@10"])
    out = capsys.readouterr().out
    assert f"{rows[2]['share']:.1%}" in out and str(run / "steering.json") in out


def test_steering_curve_by_a_loop_over_users(tiny_run):
    data = saerec.run_dataset(tiny_run)
    codes = load_intents(tiny_run, data).codes
    model = load_model(tiny_run, "grounded", data)
    users = torch.tensor([7, 2, 11, 5])
    [row] = steer.steering_curve(model, codes, data, users, [1.5], seed=3)
    share = gain = 0
    for user, intent in zip(users.tolist(), steer.draw_intents(codes, 4, 3).tolist()):
        scores = model_scores(model, data, "valid")(torch.tensor([user]))[0].detach()
        code = codes.dense()[:, intent]
        scores = scores + 1.5 * scores[1:].std() * code / code.max()
        seen = {0, *data.history(user, "valid").tolist()}
        ranking = [v for v in scores.argsort(descending=True).tolist() if v not in seen]
        share += sum(code[v] > 0 for v in ranking[:10]) / 10
        target = data.targets("valid")[user]
        rank = ranking.index(target) + 1 if target in ranking else math.inf
        if rank <= 10:
            gain += 1 / math.log2(rank + 1)
    assert row["share"] == pytest.approx(float(share) / 4)
    assert row["ndcg"] == pytest.approx(gain / 4)


@pytest.mark.parametrize("strengths", ["a lot", "1 x", "nan", "inf 1", " "])
def test_strengths_that_are_no_numbers(strengths, tiny_run, fails):
    error = fails(steer.main, ["--run", tiny_run, "--strengths", strengths], "'0 0.5 1'")
    assert f"--strengths is {strengths!r}" in error


def test_a_run_that_cannot_be_steered(tiny_run, tmp_path, fails):
    fails(steer.main, [], "--run is missing")
    run = copy_run(tiny_run, tmp_path / "run", "embeddings.*")
    fails(steer.main, ["--run", run], "intents.safetensors is missing", "sae.py --run")
