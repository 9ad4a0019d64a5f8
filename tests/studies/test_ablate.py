"""The ablation: its rows, what it resumes from, whom it compares, and what it says."""

import json
import sys

import numpy as np
import pytest
import torch

import eval as evaluation
import sae
import saerec
from conftest import SMALL, copy_run
from studies import ablate, baselines, rivals, significance

FLAGS = ["--device", "cpu", "--model-flags", f"{SMALL['model']} {SMALL['saerec']} --epochs 1"]


def command_of(run, only, seeds=1):
    return ["--run", str(run), "--seeds", str(seeds), *FLAGS, "--only", only]


@pytest.fixture(scope="module")
def everything(tiny_run, tmp_path_factory):
    """All rows in one ablation -> (run, report, the scores that each ranked the test items by)."""
    run = copy_run(tiny_run, tmp_path_factory.mktemp("ablate") / "run")
    scores = []

    def note(score, data, part):
        if part == "test":
            with torch.no_grad():
                scores.append(score(torch.arange(len(data.users))))
        return saerec.rank_users(score, data, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablate, "rank_users", note)
        patch.setattr(baselines, "rank_users", note)
        assert ablate.main(["--run", str(run), "--seeds", "1", *FLAGS]) == 0
    report = json.loads((run / "ablation.json").read_text())
    names = [row["name"] for row in report["rows"]]
    return run, report, dict(zip(names, scores, strict=True))


def test_every_row_is_there_and_test_was_ranked_once_each(everything):
    _, report, scores = everything
    assert scores.keys() == ablate.ROWS.keys()
    for row in report["rows"]:
        name = row["name"]
        trained = not name.startswith(("popularity", "item kNN"))
        assert (row["params"] > 0) == trained and 0 <= row["NDCG@10"]["mean"] <= 1, name
        assert (row["valid NDCG@10"] is None) == (name == "popularity")
        assert row["against"] == ablate.ROWS[name].against
    sizes = {row["name"]: row["params"] for row in report["rows"]}
    assert sizes["Grounded + item kNN by users"] == sizes["Grounded"]
    assert sizes["SASRec + item kNN by texts"] == sizes["SASRec"] == sizes["match alone"]


def test_every_row_ranks_in_another_way(everything):
    """Than its reference, and than every other row."""
    _, _, scores = everything
    for name, own in scores.items():
        assert [other for other in scores if torch.allclose(scores[other], own)] == [name]


CHANGED = (
    "personal branch only", "public branch only", "fusion by sum", "fusion by concatenation",
    "retrieval from the trunk", "retrieval by activation", "random vectors", "k-means",
)  # fmt: skip
OTHER_INTENTS = (
    "shuffled codes", "k-means", "k-means with K codes", "PCA", "dense autoencoder",
    "L1 instead of TopK", "half of K", "twice K", "half of M", "twice M", "another seed of the SAE",
)  # fmt: skip
AGAINST = {  # the reference of each row for which that is not Grounded
    "SASRec + text": "Grounded without match",
    "Grounded + P d with random vectors": "Grounded + P d",
    **{f"{kind} without match": "Grounded without match" for kind in OTHER_INTENTS},
    **{f"SAERec with {part}": "SAERec" for part in CHANGED},
}


def test_like_is_compared_with_like(everything):
    _, report, _ = everything
    p_values = {(test["a"], test["b"]): test["p_holm"] for test in report["tests"]}
    pairs = [(AGAINST.get(name, "Grounded"), name) for name in ablate.ROWS if name != "Grounded"]
    assert sorted(p_values) == sorted([*pairs, *ablate.ALSO])
    assert len(report["tests"]) == len(p_values)
    p_of_row = {row["name"]: row["p"] for row in report["rows"]}
    assert p_of_row == {"Grounded": None} | {name: p_values[a, name] for a, name in pairs}
    for kind in OTHER_INTENTS:
        assert ablate.ROWS[kind].rival == ablate.ROWS[f"{kind} without match"].rival


def test_rivals_are_made_once_and_used_twice(everything):
    run, _, _ = everything
    made = {path.name for path in (run / "rivals").iterdir()}
    assert made == {f"{row.rival}-0" for row in ablate.ROWS.values() if row.rival}
    meta = saerec.artifact_meta(run / "rivals" / "half-k-0" / "intents.safetensors", "")
    own = saerec.file_hash(run / "intents.safetensors")
    code = [saerec.file_hash(path)[:8] for path in (rivals.__file__, sae.__file__)]
    known = dict(kind="half-k", seed=0, changes=dict(active=0.5), code=code, of=own)
    assert meta["rival"] == known


def test_names_are_there_where_intents_have_some(everything):
    run, _, _ = everything
    data = saerec.run_dataset(run)
    for kind in rivals.KINDS:
        made = run / "rivals" / f"{kind}-0"
        assert (made / "intents.jsonl").is_file() == (kind in ("random", *rivals.SAE_CHANGES))
        if kind == "random":
            assert evaluation.read_intents(made) == evaluation.read_intents(run)
        elif kind in rivals.SAE_CHANGES:
            count = len(sae.load_intents(made, data).vectors)
            assert len(evaluation.read_intents(made)) == count


def test_rows_read_the_data_where_they_are_now(tiny_run, tiny_data, monkeypatch):
    class Asked(Exception):
        pass

    def finish(name, data, settings):
        raise Asked(settings.data, settings.seed)

    monkeypatch.setattr(ablate, "finish", finish)
    flags = ["--run", str(tiny_run), "--data", str(tiny_data), "--only", "SASRec", "--seed", "7"]
    with pytest.raises(Asked) as asked:
        ablate.main(flags)
    assert asked.value.args == (str(tiny_data), 7)


def test_ablation_resumes_and_its_numbers_are_those_of_the_ranks(tmp_path, tiny_run, capsys):
    run = copy_run(tiny_run, tmp_path / "run")
    out = tmp_path / "ablation.json"
    command = [*command_of(run, "popularity,SASRec", seeds=2), "--out", str(out)]
    assert ablate.main(command) == 0
    first = json.loads(out.read_text())
    assert first == json.loads((run / "ablation.json").read_text())
    assert [row["name"] for row in first["rows"]] == ["Grounded", "popularity", "SASRec"]
    assert capsys.readouterr().out.count(", seed ") == 6
    assert first["trained at"] == [commit for commit in [first["commit"]] if commit]
    stamps = {path: path.stat().st_mtime_ns for path in run.glob("ablation-*")}
    assert len(stamps) == 6
    interrupted = next(iter(stamps))
    interrupted.unlink()
    assert ablate.main(command) == 0
    assert capsys.readouterr().out.count(", seed ") == 1
    for path, stamp in stamps.items():
        assert (path.stat().st_mtime_ns == stamp) == (path != interrupted)
    again = json.loads(out.read_text())
    for row in [*first["rows"], *again["rows"]]:
        row.pop("seconds")
    assert first == again

    paths = [run / f"ablation-sasrec-{seed}.safetensors" for seed in (0, 1)]
    ranks = [saerec.load_artifact(path, "")[0]["ranks"] for path in paths]
    row = again["rows"][2]
    values = [saerec.ranking_metrics(one)["NDCG@10"] for one in ranks]
    assert row["NDCG@10"]["per_seed"] == values
    assert row["NDCG@10"]["mean"] == pytest.approx(np.mean(values))
    assert row["NDCG@10"]["std"] == pytest.approx(np.std(values, ddof=1))
    means = significance.user_means(ranks)
    groups = significance.user_groups(saerec.run_dataset(run))
    expected = {name: means[mask].mean() for name, mask in groups.items()}
    assert row["groups"] == pytest.approx(expected)
    test = next(test for test in again["tests"] if test["b"] == "SASRec")
    reference = again["rows"][0]["NDCG@10"]["mean"]
    assert test["difference"] == pytest.approx(reference - np.mean(values))
    assert row["p"] == test["p_holm"]
    assert "Taking the intents of the SAE away from Grounded" in again["verdict"]
    assert "popularity" in again["verdict"] and again["seeds"] == [0, 1]


def test_a_changed_row_is_trained_again(tmp_path, tiny_run, capsys, monkeypatch):
    run = copy_run(tiny_run, tmp_path / "run")
    row = ablate.ROWS["SASRec"]
    for changed, trained in (
        (row, 2), (row, 0), (row._replace(changes=dict(lr=0.01)), 1), (row, 1),
        (row._replace(Model=baselines.GRU4Rec), 1),
    ):  # fmt: skip
        monkeypatch.setitem(ablate.ROWS, "SASRec", changed)
        assert ablate.main(command_of(run, "SASRec")) == 0
        assert capsys.readouterr().out.count(", seed ") == trained
    assert ablate.main([*command_of(run, "SASRec"), "--seed", "1"]) == 0  # another seed
    assert capsys.readouterr().out.count(", seed 1") == 2
    moved = tmp_path / "moved"
    run.rename(moved)
    assert ablate.main(command_of(moved, "SASRec")) == 0
    assert capsys.readouterr().out.count(", seed ") == 0


def test_a_changed_variant_of_the_sae_is_trained_again(tmp_path, tiny_run, capsys, monkeypatch):
    command = command_of(copy_run(tiny_run, tmp_path / "run"), "half of K")
    for factor, trained in ((0.5, 2), (0.5, 0), (0.7, 1)):
        monkeypatch.setitem(rivals.SAE_CHANGES, "half-k", dict(active=factor))
        capsys.readouterr()
        assert ablate.main(command) == 0
        said = capsys.readouterr().out
        assert said.count(", seed ") == trained
        assert said.count("average: FVU") == (trained > 0)


def test_flags_for_all_rows_win_over_what_a_row_changes(tiny_run, monkeypatch):
    """Else a grid over them would train the same model at every point."""
    trained = {}
    monkeypatch.setattr(ablate, "finish", lambda name, data, one: trained.update({name: one}))
    monkeypatch.setattr(ablate, "ablation_report", lambda *_: sys.exit(0))
    for flags, match, dropout in (("", 0.12, 0.2), ("--match 0.5 --dropout=0.5", 0.5, 0.5)):
        with pytest.raises(SystemExit):
            command = ["--run", str(tiny_run), "--only", "k-means,GRU4Rec"]
            ablate.main([*command, "--model-flags", flags])
        assert trained["k-means"].match == match and trained["GRU4Rec"].dropout == dropout
        assert trained["GRU4Rec"].lr == 3e-3  # of which the flags say nothing


def test_references_are_trained_too():
    assert ablate.chosen_rows("PCA without match") == [
        "Grounded", "Grounded without match", "PCA without match",
    ]  # fmt: skip
    assert ablate.chosen_rows("SAERec with fusion by sum, Grounded") == [
        "Grounded", "SAERec", "SAERec with fusion by sum",
    ]  # fmt: skip
    assert set(ablate.chosen_rows("")) == set(ablate.ROWS)
    assert not any("," in name for name in ablate.ROWS)


def test_wrong_flags(fails, tiny_run):
    run = ["--run", tiny_run]
    fails(ablate.main, [*run, "--only", "magic"], "no row 'magic'", "SASRec")
    fails(ablate.main, [*run, "--model-flags", "--widht 9"], "did you mean --width?")
    fails(ablate.main, [*run, "--model-flags", "--width 9"], "--width 9", "--heads 2")
    for flag in ("--model sasrec", "--seed 3", "--device cpu", "--run elsewhere"):
        name = flag.split()[0]
        fails(ablate.main, [*run, "--model-flags", flag], f"--model-flags: {name}", "leave it out")
    fails(ablate.main, ["--only", "SASRec"], "--run is missing")


def test_results_of_another_library_are_not_mixed_in(fails, tmp_path, tiny_run):
    run = copy_run(tiny_run, tmp_path / "run")
    command = command_of(run, "SASRec")
    assert ablate.main(command) == 0
    assert sae.main(["--run", str(run), *SMALL["sae"].split(), "--seed", "5"]) == 0
    words = ("made from another", "intents.safetensors", "rm ", "ablation-*")
    fails(ablate.main, command, *words)


def test_a_rival_of_another_library_is_made_again(tmp_path, tiny_run, capsys):
    run = copy_run(tiny_run, tmp_path / "run")
    command = command_of(run, "k-means")
    assert ablate.main(command) == 0
    path = run / "rivals" / "kmeans-0" / "intents.safetensors"
    before = saerec.artifact_meta(path, "")["rival"]
    assert sae.main(["--run", str(run), *SMALL["sae"].split(), "--seed", "5"]) == 0
    for old in run.glob("ablation-*"):
        old.unlink()
    assert ablate.main(command) == 0
    after = saerec.artifact_meta(path, "")["rival"]
    assert before["of"] != after["of"] == saerec.file_hash(run / "intents.safetensors")


def test_no_study_is_named_as_a_module_of_python():
    """A script's folder is searched first, by torch too: studies/statistics.py would be found."""
    names = {path.stem for path in (saerec.HERE / "studies").glob("*.py")}
    assert "ablate" in names and not names & sys.stdlib_module_names
