"""Choosing on validation: which rows, the standard error, resuming, and that test is not ranked."""

import json

import pytest

import saerec
from conftest import copy_run
from studies import choose

FLAGS = "--epochs 2 --width 8 --batch 24 --history 6"


def test_standard_error_by_hand():
    assert choose.standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / 3**0.5)  # deviation 1
    assert choose.standard_error([1.0]) is None


def test_rows_are_compared_on_validation_and_resumed(tmp_path, tiny_run, monkeypatch, capsys):
    run = copy_run(tiny_run, tmp_path / "run", "[ei]*")
    (run / "sae.safetensors").write_bytes((tiny_run / "sae.safetensors").read_bytes())
    parts = []
    real = saerec.rank_users

    def spy(score, data, part, **more):
        parts.append(part)
        return real(score, data, part, **more)

    monkeypatch.setattr("model.rank_users", spy)
    argv = ["--run", run, "--only", "Grounded, SASRec", "--seeds", 2, "--model-flags", FLAGS]
    argv = [*map(str, argv), "--out", str(tmp_path / "copy.json"), "--device", "cpu"]
    assert choose.main(argv) == 0
    assert set(parts) == {"valid"} and len(parts) == 2 * 2 * 2
    report = json.loads((run / "choice.json").read_text())
    assert {name: set(one) for name, one in report["valid"].items()} == {
        "Grounded": {"0", "1"},
        "SASRec": {"0", "1"},
    }
    assert (tmp_path / "copy.json").read_bytes() == (run / "choice.json").read_bytes()
    out = capsys.readouterr().out
    mean = sum(report["valid"]["SASRec"].values()) / 2
    assert f"{mean:.4f} ±" in out
    assert choose.main(argv) == 0 and len(parts) == 8  # nothing is trained again
    argv += ["--model-flags", f"{FLAGS} --dropout 0.1"]  # but what other flags gave is not theirs
    assert choose.main(argv) == 0 and len(parts) == 16
    changed = choose.ROWS["GRU4Rec"]._replace(changes=dict(dropout=0.3))
    monkeypatch.setitem(choose.ROWS, "GRU4Rec", changed)  # nor what rows with other changes gave
    assert choose.main(argv) == 0 and len(parts) == 24


def test_means_are_over_the_seeds_that_were_asked_for(tmp_path, tiny_run, monkeypatch, capsys):
    """Though more of one row are there: else rows of different seeds would be compared."""
    run = copy_run(tiny_run, tmp_path / "run")
    monkeypatch.setattr(choose, "validation_score", lambda name, data, one: one.seed / 10)
    argv = ["--run", str(run), "--device", "cpu", "--only"]
    assert choose.main([*argv, "Grounded", "--seeds", "4"]) == 0
    capsys.readouterr()
    assert choose.main([*argv, "Grounded,SASRec", "--seeds", "2"]) == 0
    lines = [one for one in capsys.readouterr().out.splitlines() if "validation NDCG@10" in one]
    assert len(lines) == 2 and all("NDCG@10 0.0500 ± 0.0500 (2 seed(s)" in one for one in lines)


def test_other_intents_are_chosen_too(tmp_path, tiny_run):
    """A rival's model is trained on the rival's intents, which lie in a folder of the run."""
    run = copy_run(tiny_run, tmp_path / "run")
    argv = ["--run", str(run), "--only", "k-means,Grounded", "--seeds", "1", "--device", "cpu"]
    assert choose.main([*argv, "--model-flags", FLAGS]) == 0
    valid = json.loads((run / "choice.json").read_text())["valid"]
    assert (run / "rivals" / "kmeans-0" / "intents.safetensors").is_file()
    assert valid["k-means"]["0"] != valid["Grounded"]["0"]


def test_a_broken_choice_is_refused(fails, tmp_path, tiny_run):
    run = copy_run(tiny_run, tmp_path / "run")
    (run / "choice.json").write_text("{")
    fails(choose.main, ["--run", run, "--only", "SASRec"], "choice.json is not valid JSON", "delete")


def test_rows_that_cannot_be_chosen(fails, tiny_run):
    fails(choose.main, ["--run", tiny_run], "--only is missing")
    fails(choose.main, ["--run", tiny_run, "--only", "Grounded,BPR-MF"], "'BPR-MF'", "choose among")
