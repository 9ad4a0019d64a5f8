"""Evaluation, and all stages together."""

import json

import numpy as np
import pytest
import torch

import eval
import model
import saerec
from conftest import copy_run, make_run


def test_all_stages_write_a_report(tiny_data, tiny_run):
    report = json.loads((tiny_run / "metrics.json").read_text())
    assert set(report["models"]) == {"popularity", "sasrec", "saerec"}
    assert (report["users"], report["items"], report["dataset"]) == (24, 30, "tiny") and "full ranking" in report["protocol"]
    for metrics in report["models"].values():
        assert set(metrics) == {*(f"{m}@{n}" for m in ("HR", "NDCG") for n in (5, 10, 20)), "MRR"}
        assert all(0 <= value <= 1 for value in metrics.values())
    expected = {"embeddings.safetensors", "sae.safetensors", "intents.safetensors", "intents.jsonl", "sae_log.csv", "model.safetensors",
                "log.csv", "sasrec.safetensors", "sasrec_log.csv", "metrics.json"}  # fmt: skip
    assert {path.name for path in tiny_run.iterdir()} == expected


def test_popularity_by_brute_force(tiny_data, tiny_run):
    data = saerec.load_dataset(tiny_data)
    counts = np.bincount(np.concatenate([data.history(u, "valid") for u in range(len(data.users))]), minlength=len(data.items))
    hits = 0
    for user, target in enumerate(data.targets("test")):
        seen = set(data.history(user, "test").tolist())
        ahead = sum(counts[v] >= counts[target] for v in range(1, len(data.items)) if v != target and v not in seen)
        hits += ahead < 10 and target not in seen
    assert json.loads((tiny_run / "metrics.json").read_text())["models"]["popularity"]["HR@10"] == pytest.approx(hits / len(data.users))


def test_saerec_metrics_by_a_loop_over_users(tiny_data, tiny_run):
    data = saerec.load_dataset(tiny_data)
    library = model.load_library(tiny_run, data)
    net = model.load_model(tiny_run, "sae", data, library)
    personal = model.personal_intents(data, library, net.settings)
    reciprocal = []
    for user, target in enumerate(data.targets("test")):
        stop = data.start[user + 1] - 1
        where = np.arange(max(data.start[user], stop - net.settings.history), stop)
        items = torch.from_numpy(data.flat[where]).long()[None]
        last = torch.tensor([items.shape[1] - 1])
        with torch.no_grad():
            scores = (net.item_table() @ net(items, last, personal[1][where[-1:]], net.item_table())[0]).numpy()
        for strength, intent in zip(*(column[where[-1]].tolist() for column in personal)):
            if intent < len(library.vectors):
                scores += net.settings.match * strength * np.array([library.code(v, intent) for v in range(len(scores))], np.float32)
        seen = set(data.history(user, "test").tolist())
        ahead = sum(scores[v] >= scores[target] for v in range(1, len(data.items)) if v != target and v not in seen)
        reciprocal.append(0.0 if target in seen else 1 / (1 + ahead))
    got = json.loads((tiny_run / "metrics.json").read_text())["models"]["saerec"]["MRR"]
    assert got == pytest.approx(np.mean(reciprocal), rel=1e-6)


def test_same_seed_gives_the_same_metrics_byte_for_byte(tmp_path, tiny_data, tiny_run):
    again = make_run(tiny_data, tmp_path / "again")
    assert (again / "metrics.json").read_bytes() == (tiny_run / "metrics.json").read_bytes()
    other = make_run(tiny_data, tmp_path / "other", seed=1)
    assert (other / "metrics.json").read_bytes() != (tiny_run / "metrics.json").read_bytes()


@pytest.mark.parametrize("variant", ["", "--paper", "--personal 0", "--public 0"])
def test_the_report_shows_users_and_intents_in_words(tmp_path, tiny_data, tiny_run, capsys, variant):
    run = copy_run(tiny_run, tmp_path / "run")
    make_run(tiny_data, run, model=variant, stages="model")
    capsys.readouterr()
    assert eval.main(["--run", str(run), "--users", "2", "--top", "4", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n{name}" in out for name in ("popularity", "sasrec", "saerec")) and "NDCG@10" in out and "AUROC" in out
    assert out.count("recommended:") == 2 and "Thing " in out
    assert out.count("personal intents:") == (0 if variant == "--personal 0" else 2)
    assert out.count("public intents:") == (0 if variant == "--public 0" else 2)
    shown = [line for line in out.splitlines() if " Thing " in line and line.split()[0].strip("->").isdigit() or "->" in line]
    assert len(shown) == 8


def test_recommendations_leave_out_the_history(tiny_data, tiny_run):
    data = saerec.load_dataset(tiny_data)
    library = model.load_library(tiny_run, data)
    net = model.load_model(tiny_run, "sae", data, library)
    lines = list(eval.show_user(3, net, data, library, eval.read_intents(tiny_run), 40))
    listed = [line.replace("->", "").split(maxsplit=1)[1] for line in lines[lines.index("  recommended:") + 1 :]]
    history = {data.titles[item] for item in data.history(3, "test")}
    assert len(listed) == 30 - len(history) and not history & set(listed)


def test_missing_and_mixed_up_artifacts(fails, tmp_path, tiny_run):
    fails(eval.main, [], "--run is missing")
    run = copy_run(tiny_run, tmp_path / "run")
    lines = (run / "intents.jsonl").read_text().splitlines(keepends=True)
    (run / "intents.jsonl").write_text("".join(lines[:-1]))
    fails(eval.main, ["--run", run], "intents.jsonl does not belong", "sae.py")
    (run / "intents.jsonl").write_text("".join(lines)[:-9])
    fails(eval.main, ["--run", run], "intents.jsonl cannot be read", "sae.py")
    (run / "intents.jsonl").write_text("".join(lines))
    (run / "sasrec.safetensors").unlink()
    fails(eval.main, ["--run", run], "sasrec.safetensors is missing", "--intents none")
    (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:-20])
    (run / "sasrec.safetensors").write_bytes((tiny_run / "sasrec.safetensors").read_bytes())
    fails(eval.main, ["--run", run], "model.safetensors is corrupt or truncated")


def test_a_model_of_another_shape(fails, tmp_path, tiny_data, tiny_run):
    run = copy_run(tiny_run, tmp_path / "run")
    tensors, _ = saerec.load_artifact(run / "model.safetensors", "")
    tensors["item.weight"] = tensors["item.weight"][:-1]
    saerec.save_artifact(run / "model.safetensors", tensors, model.load_model(tiny_run, "sae", *loaded(tiny_run)).settings, loaded(run)[0].hash)
    fails(eval.main, ["--run", run], "model.safetensors does not fit")


def loaded(run):
    data = saerec.run_dataset(run)
    return data, model.load_library(run, data)
