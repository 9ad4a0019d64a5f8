"""Intents drawn by a seed: the run's own rows, told with titles, the same ones every time."""

import json

import eval as evaluation
import saerec
from conftest import copy_run
from studies import sample


def test_the_sample_is_of_the_runs_own_rows(tmp_path, tiny_run, capsys):
    run = copy_run(tiny_run, tmp_path / "run")
    out = tmp_path / "intents_tiny.json"
    assert sample.main(["--run", str(run), "--count", "4", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report == json.loads((run / "sample.json").read_text())
    data = saerec.run_dataset(run)
    rows = evaluation.read_intents(run)
    assert report["dataset"] == "tiny" and report["of"] == len(rows) and len(report["drawn"]) == 4
    assert report["command"] and report["commit"] is not None
    title = dict(zip(data.items, data.titles))
    for one in report["drawn"]:
        own = rows[one["intent"]]
        assert one["items"] == [title[item] for item in own["items"][:5]]
        assert all(one[name] == own[name] for name in sample.TOLD)
        assert one["label"] in said and "; ".join(one["items"]) in said


def test_the_seed_draws_and_few_intents_are_all_there(tiny_run):
    data = saerec.run_dataset(tiny_run)
    rows = evaluation.read_intents(tiny_run)

    def drawn(count, seed):
        return [row["intent"] for row in sample.draw_rows(rows, data, count, seed)]

    assert drawn(5, 0) == drawn(5, 0) == drawn(99, 0)[:5]
    assert any(drawn(5, 0) != drawn(5, seed) for seed in (1, 2, 3))
    assert sorted(drawn(99, 0)) == list(range(len(rows)))


def test_lines_say_what_was_not_measured():
    row = dict(label="war", keywords=["war", "army"], support=3, density=0.02, detection_texts=0)
    row |= dict(detection_auroc=None, meaning_auroc=0.876, items=["Alien", "Heat"])
    assert list(sample.sample_lines([row])) == [
        "war  (2.0% of texts, found by 3 other SAEs)",
        "    AUROC over 0 held-out texts: words unknown, meaning 0.88",
        "    keywords: war, army",
        "    items: Alien; Heat",
    ]


def test_runs_without_intents(fails, tmp_path, tiny_run):
    fails(sample.main, [], "--run is missing")
    run = copy_run(tiny_run, tmp_path / "run", "e*")
    fails(sample.main, ["--run", run], "intents.safetensors is missing")
