"""What steering moves, and what it costs."""

import json
import math

import pytest
import torch

import saerec
from conftest import copy_run, make_run, write_dataset
from eval import load_model
from model import MODELS, model_scores
from sae import SparseRows, load_intents
from tools import recommend, steer


# Item 1 carries intent 0, item 2 intent 1, item 3 both and item 4 none; nothing carries intent 2
CODES = SparseRows(
    torch.tensor([0, 0, 1, 2, 4, 4]), torch.tensor([0, 1, 0, 1]).int(), torch.ones(4), 3
)


def test_the_shares_of_the_top_by_hand(monkeypatch):
    """Of the two best unseen items of each user; item 0 is padding, whatever its score."""
    monkeypatch.setattr(steer, "TOP", 2)
    scores = torch.tensor([[9.0, 1.0, 2.0, 3.0, 0.5], [9.0, 1.0, 2.0, 3.0, 0.5]])
    seen = torch.tensor([[3, 0], [1, 2]])
    assert steer.shares_of_top(scores, CODES, seen).tolist() == [[0.5, 0.5, 0], [0.5, 0.5, 0]]
    seen = torch.tensor([[4, 1], [0, 0]])
    assert steer.shares_of_top(scores, CODES, seen).tolist() == [[0.5, 1, 0], [0.5, 1, 0]]


def test_a_list_is_as_long_as_there_are_items():
    """The share is of three items, then of one, then of none."""
    scores = torch.tensor([[9.0, 1.0, 2.0, 3.0, 0.5]]).repeat(3, 1)
    seen = torch.tensor([[1, 0, 0, 0], [1, 2, 4, 0], [1, 2, 3, 4]])
    shares = steer.shares_of_top(scores, CODES, seen)
    assert shares.flatten().tolist() == pytest.approx([1 / 3, 2 / 3, 0, 1, 1, 0, 0, 0, 0])


def test_the_change_off_target_by_hand():
    """The first user asks for intent 0, the second for 1; nothing carries intent 2."""
    before = torch.tensor([[0.5, 0.25, 0.0], [0.5, 0.25, 0.0]])
    after = torch.tensor([[1.0, 0.0, 0.0], [0.25, 0.75, 0.0]])
    asked = torch.tensor([0, 1])
    assert steer.carried_intents(CODES).tolist() == [0, 1]
    change = steer.off_target(after, before, asked, steer.carried_intents(CODES))
    assert change.tolist() == [0.25, 0.25]
    only = steer.off_target(after, before, torch.tensor([0, 0]), torch.tensor([0]))
    assert only.tolist() == [0, 0]  # there is no other intent


def test_only_intents_with_items_are_asked_for():
    codes = SparseRows(torch.tensor([0, 0, 2]), torch.tensor([1, 3]).int(), torch.ones(2), 5)
    assert set(steer.draw_intents(codes, 100, 0).tolist()) == {1, 3}
    none = SparseRows(torch.tensor([0, 0, 0]), torch.zeros(0).int(), torch.zeros(0), 5)
    with pytest.raises(saerec.UserError, match="no item carries an intent"):
        steer.draw_intents(none, 100, 0)


@pytest.mark.parametrize("name", MODELS)
def test_steering_curve(name, tiny_run, tmp_path, capsys):
    """Unsteered it is the model's validation; a strong push fills the list with what is asked."""
    run = copy_run(tiny_run, tmp_path / "run")
    command = ["--run", str(run), "--strengths", "0 1 30 1", "--model", name, "--device", "cpu"]
    assert steer.main(command) == 0
    report = json.loads((run / "steering.json").read_text())
    assert (report["dataset"], report["model"], report["users"]) == ("tiny", name, 24)
    made_from = {one: saerec.file_hash(run / one) for one in report["made_from"]}
    assert report["made_from"] == made_from
    assert made_from.keys() == {f"{name}.safetensors", "intents.safetensors"}
    rows = report["rows"]
    assert [row["strength"] for row in rows] == [0, 1, 30]
    assert rows[0]["share"] <= rows[1]["share"] < rows[2]["share"]
    assert rows[0]["off_target"] == 0 < rows[2]["off_target"] < 1
    data = saerec.run_dataset(run)
    model = load_model(run, name, data)
    ranks = saerec.rank_users(model_scores(model, data, "valid"), data, "valid")
    assert rows[0]["ndcg"] == pytest.approx(saerec.ranking_metrics(ranks)["NDCG@10"])
    out = capsys.readouterr().out
    assert f"{rows[2]['share']:.1%}" in out and f"{rows[2]['off_target']:.2%}" in out
    assert str(run / "steering.json") in out


def check_by_a_loop(run, users, strength, seed):
    """One row of steering.json against a loop over users, and over intents one by one."""
    data = saerec.run_dataset(run)
    codes = load_intents(run, data).codes
    model = load_model(run, "grounded", data)
    [row] = steer.steering_curve(model, codes, data, torch.tensor(users), [strength], seed)
    dense = codes.dense()
    carried = [j for j in range(codes.columns) if dense[:, j].any()]
    share = gain = change = 0
    for user, intent in zip(users, steer.draw_intents(codes, len(users), seed).tolist()):
        own = model_scores(model, data, "valid")(torch.tensor([user]))[0].detach()
        code = dense[:, intent]
        scores = own + strength * own[1:].std() * code / code.max()
        seen = {0, *data.history(user, "valid").tolist()}
        lists = []
        for given in (own, scores):
            lists.append([v for v in given.argsort(descending=True).tolist() if v not in seen])
        shares = [(dense[ranking[:10]] > 0).float().mean(0) for ranking in lists]
        share += shares[1][intent]
        others = [j for j in carried if j != intent]
        change += sum(abs(shares[1][j] - shares[0][j]) for j in others) / len(others)
        target = data.targets("valid")[user]
        rank = lists[1].index(target) + 1 if target in lists[1] else math.inf
        if rank <= 10:
            gain += 1 / math.log2(rank + 1)
    assert row["share"] == pytest.approx(float(share) / len(users))
    assert row["off_target"] == pytest.approx(float(change) / len(users), abs=1e-6)
    assert row["ndcg"] == pytest.approx(gain / len(users))


def test_steering_curve_by_a_loop_over_users(tiny_run):
    check_by_a_loop(tiny_run, [7, 2, 11, 5], 1.5, seed=3)


def test_a_catalogue_smaller_than_the_list(tmp_path):
    """Eight items, of which few are left after a history."""
    data = write_dataset(tmp_path / "few", users=12, items=8)
    sae = "--latents 8 --min-items 1"
    run = make_run(data, tmp_path / "run", sae=sae, stages="embed sae grounded")
    assert len(saerec.run_dataset(run).items) == 9
    assert steer.main(["--run", str(run), "--device", "cpu"]) == 0
    assert recommend.main(["--run", str(run), "--user", "u1", "--more", "0"]) == 0
    check_by_a_loop(run, [0, 4, 9], 2.0, seed=0)


def test_the_deviation_of_a_single_item_is_nothing():
    scores = torch.tensor([[5.0, 2.0]])
    assert recommend.steer(scores, torch.tensor([0.0, 1.0])).tolist() == [[5, 2]]


@pytest.mark.parametrize("strengths", ["a lot", "1 x", "nan", "inf 1", " "])
def test_strengths_that_are_no_numbers(strengths, tiny_run, fails):
    error = fails(steer.main, ["--run", tiny_run, "--strengths", strengths], "'0 0.5 1'")
    assert f"--strengths is {strengths!r}" in error


def test_a_run_that_cannot_be_steered(tiny_run, tmp_path, fails):
    fails(steer.main, [], "--run is missing")
    run = copy_run(tiny_run, tmp_path / "run", "embeddings.*")
    fails(steer.main, ["--run", run], "intents.safetensors is missing", "sae.py --run")
    fails(steer.main, ["--run", run, "--data", tmp_path / "x"], "not there", "--data FOLDER")


def test_a_folder_that_cannot_be_written_to_is_refused_at_once(tiny_run, fails, monkeypatch):
    def refuse(folder):
        raise saerec.UserError(f"{folder} cannot be written to")

    monkeypatch.setattr(steer, "claim", refuse)
    monkeypatch.setattr(steer, "steering_curve", None)
    fails(steer.main, ["--run", tiny_run, "--device", "cpu"], f"{tiny_run} cannot be written to")
