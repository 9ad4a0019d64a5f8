"""A setting that changes nothing is a bug: each must change what is written."""

import json

import pytest
import torch

import eval as evaluation
import model
import sae
import saerec
from conftest import SMALL, copy_run

# Few steps, and batches so small that some latents are dead, else --auxk would change nothing
SAE = SMALL["sae"] + " --steps 60 --batch 8 --lr 0.003 --auxk 8 --dead-after 0.2 --device cpu"


@pytest.fixture(scope="module")
def library_of(tmp_path_factory, tiny_run):
    """library_of(flags): what sae.py writes with these flags; each is made once."""
    made = {}

    def make(flags):
        if flags not in made:
            run = tmp_path_factory.mktemp("sae") / "run"
            copy_run(tiny_run, run, "embeddings.safetensors")
            assert sae.main(["--run", str(run), *SAE.split(), *flags.split()]) == 0
            tensors, _ = saerec.load_artifact(run / "sae.safetensors", "")
            weights = {name: tensor.tolist() for name, tensor in tensors.items()}
            made[flags] = weights, (run / "intents.jsonl").read_text()
        return made[flags]

    return make


@pytest.mark.parametrize(
    "flags",
    [
        "--latents 12", "--active 2", "--members 1", "--noise 0", "--steps 50", "--batch 12",
        "--lr 0.01", "--auxk 1", "--auxk-weight 1", "--dead-after 3", "--held-out 0.3",
        "--min-items 6", "--max-density 0.2", "--keywords 2", "--seed 5",
    ],
)  # fmt: skip
def test_every_setting_of_the_sae_changes_the_library(library_of, flags):
    assert library_of(flags) != library_of("")


@pytest.fixture(scope="module")
def model_of(tmp_path_factory, tiny_run):
    """model_of(flags): parameters and log that model.py writes with these flags; each made once."""
    made = {}

    def make(flags):
        if flags not in made:
            run = copy_run(tiny_run, tmp_path_factory.mktemp("model") / "run", "[eis]*")
            words = ["--run", str(run), *SMALL["model"].split(), "--device", "cpu", *flags.split()]
            assert model.main(words) == 0
            name = flags.split()[1] if flags.startswith("--model") else "grounded"
            tensors, _ = saerec.load_artifact(run / f"{name}.safetensors", "")
            log = (run / f"{name}_log.csv").read_text().splitlines()
            log = [line.split(",")[2:] for line in log]  # without seconds
            made[flags] = {name: tensor.tolist() for name, tensor in tensors.items()}, log
        return made[flags]

    return make


@pytest.mark.parametrize(
    "flags",
    [
        "--match 1", "--decay 0.1", "--width 12", "--layers 1", "--heads 1", "--dropout 0.1",
        "--history 3", "--epochs 1", "--batch 9", "--lr 0.01", "--seed 4", "--model sasrec",
        "--model saerec --personal 3 --public 2",
    ],
)  # fmt: skip
def test_every_setting_of_a_model_changes_it(model_of, flags):
    assert model_of(flags) != model_of("")


@pytest.mark.parametrize("flags", ["--personal 2 --public 2", "--personal 3 --public 3"])
def test_every_setting_of_saerec_changes_it(model_of, flags):
    base = model_of("--model saerec --personal 3 --public 2")
    assert model_of(f"--model saerec {flags}") != base


def test_users_and_top_change_what_is_shown(tiny_run, tmp_path, capsys):
    run = copy_run(tiny_run, tmp_path / "run")
    argv = ["--run", str(run), "--device", "cpu"]
    capsys.readouterr()
    assert evaluation.main([*argv, "--users", "2", "--top", "4"]) == 0
    out = capsys.readouterr().out
    assert out.count("recommended:") == 2 and out.count(" personal intents:") == 2
    shown = [line for line in out.splitlines() if " = id " in line]
    assert len(shown) == 2 * 4
    assert evaluation.main([*argv, "--users", "0"]) == 0
    assert "recommended:" not in capsys.readouterr().out


def test_eval_ranks_the_models_that_a_run_holds(tiny_run, tmp_path, capsys):
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    assert set(metrics["models"]) == {"popularity", "sasrec", "saerec", "grounded"}
    assert (metrics["users"], metrics["items"], metrics["dataset"]) == (24, 30, "tiny")
    names = {*(f"{m}@{n}" for m in ("HR", "NDCG") for n in (5, 10, 20)), "MRR"}
    assert all(set(one) == names for one in metrics["models"].values())
    assert "full ranking" in metrics["protocol"]
    run = copy_run(tiny_run, tmp_path / "run", "[eis]*")  # without grounded.safetensors
    assert evaluation.main(["--run", str(run), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "\nsaerec " in out and "\ngrounded " not in out
    assert " = history " in out and "  public " in out  # SAERec's reasons
    assert " public intents (what most histories come near to): " in out
    again = json.loads((run / "metrics.json").read_text())["models"]
    assert again == {name: metrics["models"][name] for name in ("popularity", "sasrec", "saerec")}


def test_a_user_is_shown_with_the_held_out_item_marked(tiny_run):
    """The whole history before the test item, and an arrow at that item's rank."""
    data = saerec.run_dataset(tiny_run)
    net = evaluation.load_model(tiny_run, "grounded", data)
    ranks = saerec.rank_users(model.model_scores(net, data, "test"), data, "test")
    user = int((ranks <= 5).nonzero()[0])
    lines = list(evaluation.show_user(net, user, data, evaluation.Unnamed(), 5))
    count = len(data.history(user, "test"))
    assert lines[0] == f"user {data.users[user]}, {count} items, the last ones:"
    title = data.titles[data.targets("test")[user]]
    marked = [line for line in lines if line.startswith("   ->")]
    assert marked == [f"   -> {int(ranks[user])} {title}"]


def test_reasons_in_words_by_hand():
    """The largest terms of either sign; the others as one."""
    terms = torch.tensor([0.5, 0.25, -2.0])
    reasons = model.Reasons({"id": 1.0}, torch.tensor([7, 3, 5]), terms)
    words = evaluation.reason_words(reasons, evaluation.Unnamed(), 2)
    assert words == "id +1.00  intent 5 -2.00  intent 7 +0.50  rest +0.25"


def test_intents_without_names_are_shown_by_number(tiny_run, tmp_path, capsys):
    run = copy_run(tiny_run, tmp_path / "run")
    (run / "intents.jsonl").unlink()
    assert evaluation.main(["--run", str(run), "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert " personal intents: intent " in out and "AUROC" not in out


def test_recommendations_leave_out_the_history(tiny_run):
    data = saerec.run_dataset(tiny_run)
    for name in ("sasrec", "saerec", "grounded"):
        net = evaluation.load_model(tiny_run, name, data)
        history = data.history(3, "test")
        state = evaluation.history_state(net, history)
        listed = evaluation.recommend(net, state, history, 40)
        assert len(listed) == 30 - len(history)
        assert not {item for item, _, _ in listed} & set(history.tolist())
        scores = [score for _, score, _ in listed]
        assert scores == sorted(scores, reverse=True)


def test_metrics_by_a_loop_over_users(tiny_run):
    """MRR of Grounded from the scores of one history at a time."""
    data = saerec.run_dataset(tiny_run)
    net = evaluation.load_model(tiny_run, "grounded", data)
    reciprocal = 0.0
    for user, target in enumerate(data.targets("test").tolist()):
        history = data.history(user, "test")
        with torch.no_grad():
            scores = net.scores(evaluation.history_state(net, history), net.item_table())[0]
        others = set(range(1, len(data.items))) - {target, *history.tolist()}
        if target not in history:
            reciprocal += 1 / (1 + sum(bool(scores[v] >= scores[target]) for v in others))
    metrics = json.loads((tiny_run / "metrics.json").read_text())["models"]["grounded"]
    assert metrics["MRR"] == pytest.approx(reciprocal / len(data.users), rel=1e-6)


def test_popularity_by_brute_force(tiny_run):
    data = saerec.run_dataset(tiny_run)
    counts = [data.training_items().tolist().count(item) for item in range(len(data.items))]
    hits = 0
    for user, target in enumerate(data.targets("test").tolist()):
        history = set(data.history(user, "test").tolist())
        others = set(range(1, len(data.items))) - {target, *history}
        ahead = sum(counts[v] >= counts[target] for v in others)
        hits += ahead < 10 and target not in history
    metrics = json.loads((tiny_run / "metrics.json").read_text())["models"]["popularity"]
    assert metrics["HR@10"] == pytest.approx(hits / len(data.users))
