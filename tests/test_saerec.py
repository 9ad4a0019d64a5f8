"""The dataset folder, the split, ranking, artifacts and settings."""

import ast
import dataclasses
import gzip
import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import model
import saerec
from conftest import copy_run, write_dataset

ROOT = Path(saerec.__file__).parent


def folder_with(path, sequences, texts):
    path.mkdir(exist_ok=True)
    (path / "sequences.txt").write_text(sequences)
    (path / "texts.jsonl").write_text(texts)
    return path


def text(item, **more):
    return json.dumps({"item": item, "text": f"text of {item}", **more}) + "\n"


def test_split_worked_by_hand(tmp_path):
    folder = folder_with(tmp_path / "d", "ann a b c d e\nbob b a c\ncid a b\n", text("a") + text("b") + text("c") + text("d"))
    data = saerec.load_dataset(folder)
    assert data.users == ["ann", "bob"] and data.items == ["", "a", "b", "c", "d", "e"]
    assert [data.history(0, part).tolist() for part in ("valid", "test")] == [[1, 2, 3], [1, 2, 3, 4]]
    assert [data.history(1, part).tolist() for part in ("valid", "test")] == [[2], [2, 1]]
    assert data.targets("valid").tolist() == [4, 1] and data.targets("test").tolist() == [5, 3]
    assert data.training_items().tolist() == [1, 2, 3, 2]
    assert data.notes == ("1 user(s) with fewer than 3 items left out", "1 item(s) without text kept, with no intents")


def test_a_text_written_in_a_held_out_interaction_is_left_out(tmp_path):
    texts = text("a", user="ann") + text("c", user="ann") + text("d", user="ann") + text("d", user="bob") + text("b")
    data = saerec.load_dataset(folder_with(tmp_path / "d", "ann a b c d\nbob d a b c\n", texts))
    assert [data.items[i] for i in data.text_item] == ["a", "d", "b"]  # bob's d is legitimate, ann's c and d are not
    assert "2 text(s) written in held-out interactions left out" in data.notes


def test_gzip_and_plain_are_the_same_dataset(tmp_path):
    plain = write_dataset(tmp_path / "plain")
    packed = tmp_path / "packed"
    packed.mkdir()
    for name in ("sequences.txt", "texts.jsonl"):
        (packed / (name + ".gz")).write_bytes(gzip.compress((plain / name).read_bytes()))
    a, b = saerec.load_dataset(plain), saerec.load_dataset(packed)
    assert a.hash == b.hash and a.texts == b.texts and (a.flat == b.flat).all()


def test_check_counts(tmp_path, capsys):
    folder = folder_with(tmp_path / "d", "ann a b a c\nbob b a c\n", text("a") + text("b"))
    assert saerec.main(["check", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "2 users, 3 items, 7 interactions" in out and "mean 3.5, median 4, longest 4" in out
    assert f"{7 / 6:.4%}" in out and "1 interactions with an item the user had before" in out and "66.67% of the items have text" in out


@pytest.mark.parametrize(
    "sequences, texts, words",
    [
        ("ann a b c\nbob\n", text("a"), ["sequences.txt line 2", "'bob' has no items", "remove"]),
        ("ann a b c\n\n", text("a"), ["sequences.txt line 2", "empty"]),
        ("ann a b c\nann c b a\n", text("a"), ["sequences.txt line 2", "'ann'", "merge"]),
        ("ann a b\n", text("a"), ["sequences.txt", "3 or more items"]),
        ("ann a b c\n", text("a") + text("zoo"), ["texts.jsonl line 2", "'zoo'", "no sequence"]),
        ("ann a b c\n", text("a") + '{"item": "b", "text"\n', ["texts.jsonl line 2", "not a JSON object"]),
        ("ann a b c\n", '["a"]\n', ["texts.jsonl line 1", "not a JSON object"]),
        ("ann a b c\n", '{"item": "a"}\n', ["texts.jsonl line 1", "'text'"]),
        ("ann a b c\n", '{"item": "a", "text": 5}\n', ["texts.jsonl line 1", "strings"]),
        ("ann a b c\n", '{"item": "a", "text": "  "}\n', ["texts.jsonl", "no text"]),
    ],
)
def test_malformed_dataset(tmp_path, fails, sequences, texts, words):
    fails(saerec.main, ["check", folder_with(tmp_path / "d", sequences, texts)], *words)


def test_malformed_files(tmp_path, fails):
    fails(saerec.main, ["check", tmp_path / "none"], "does not exist", "prepare")
    folder = tmp_path / "d"
    folder.mkdir()
    fails(saerec.main, ["check", folder], "neither sequences.txt nor sequences.txt.gz")
    folder_with(folder, "ann a b c\n", text("a"))
    (folder / "texts.jsonl").write_bytes(text("a").encode() + b'{"item": "b", "text": "caf\xe9"}\n')
    fails(saerec.main, ["check", folder], "texts.jsonl line 2", "UTF-8")
    (folder / "texts.jsonl").unlink()
    packed = gzip.compress((text("a") * 1000).encode())
    (folder / "texts.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    fails(saerec.main, ["check", folder], "texts.jsonl.gz", "truncated")
    (folder / "texts.jsonl.gz").write_bytes(b"not gzip")
    fails(saerec.main, ["check", folder], "texts.jsonl.gz", "corrupt")
    (folder / "texts.jsonl").write_text(text("a"))
    fails(saerec.main, ["check", folder], "both texts.jsonl and texts.jsonl.gz")


def test_changing_held_out_items_changes_no_training_batch_and_no_statistic(tmp_path):
    """Swap every user's last two items for others: what training reads must stay equal, bit for bit."""
    one, other = write_dataset(tmp_path / "one"), write_dataset(tmp_path / "other")
    lines = [line.split() for line in (one / "sequences.txt").read_text().splitlines()]
    swapped = [[*line[:-2], f"i{(int(line[-2][1:]) + 7) % 30}", f"i{(int(line[-1][1:]) + 11) % 30}"] for line in lines]
    (other / "sequences.txt").write_text("".join(" ".join(line) + "\n" for line in swapped))
    a, b = saerec.load_dataset(one), saerec.load_dataset(other)
    assert not (a.flat == b.flat).all() and a.items == b.items
    assert (a.training_items() == b.training_items()).all() and a.texts == b.texts
    library = model.Library(torch.eye(3, 4), *(torch.from_numpy(x) for x in (
        np.concatenate([[0], np.arange(31)]), np.arange(30, dtype=np.int32) % 3, np.ones(30, np.float32))))  # fmt: skip
    (df_a, n_a), (df_b, n_b) = model.intent_frequency(a, library), model.intent_frequency(b, library)
    assert n_a == n_b and torch.equal(df_a, df_b)
    idf = model.inverse_frequency(df_a, n_a)
    rows_a, rows_b = model.training_rows(a, 4), model.training_rows(b, 4)
    for chosen in model.batches(rows_a, 8, saerec.generator(0, "x")):
        batch = []
        for data, rows in ((a, rows_a), (b, rows_b)):
            flat = torch.from_numpy(data.flat).long()
            personal = model.activation_retrieval(data.start, data.flat, library, idf, 2, 0.9)
            sampler = model.negative_sampler(data, 10, saerec.generator(0, "y"))
            batch.append(model.make_batch(rows, chosen, flat, personal, sampler))
        assert len(batch[0]) == 9 and all(torch.equal(x, y) for x, y in zip(*batch))


def test_metrics_by_hand():
    got = saerec.ranking_metrics(torch.tensor([1.0, 3.0, 11.0, torch.inf], dtype=torch.float64))
    assert got["HR@5"] == got["HR@10"] == 2 / 4 and got["HR@20"] == 3 / 4
    assert got["NDCG@5"] == pytest.approx((1 + 1 / 2) / 4)
    assert got["NDCG@20"] == pytest.approx((1 + 1 / 2 + 1 / math.log2(12)) / 4)
    assert got["MRR"] == pytest.approx((1 + 1 / 3 + 1 / 11) / 4)


def test_rank_equals_brute_force_with_ties():
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (200, 31), generator=g).float()
    targets = torch.randint(1, 31, (200,), generator=g)
    seen = torch.randint(0, 31, (200, 5), generator=g)
    for user, rank in enumerate(saerec.target_ranks(scores, targets, seen).tolist()):
        masked, target = set(seen[user].tolist()), int(targets[user])
        ahead = [v for v in range(1, 31) if v != target and v not in masked and scores[user, v] >= scores[user, target]]
        assert rank == (math.inf if target in masked else 1 + len(ahead))


def test_rank_of_constant_and_of_broken_scores():
    seen = torch.zeros(1, 1, dtype=torch.int64)
    assert saerec.target_ranks(torch.zeros(1, 11), torch.tensor([4]), seen).tolist() == [10]  # last of 10: ties count against
    with pytest.raises(FloatingPointError):
        saerec.target_ranks(torch.full((1, 11), torch.nan), torch.tensor([4]), seen)


def test_generators_are_separate_and_repeatable():
    draws = [torch.rand(3, generator=saerec.generator(*key)).tolist() for key in ((0, "a"), (0, "b"), (1, "a"), (0, "a"))]
    assert draws[0] == draws[3] and len({tuple(d) for d in draws}) == 3


@dataclasses.dataclass(frozen=True)
class Nothing:
    size: int = saerec.setting(3, "a size")


def test_artifact_round_trip_and_lineage(tmp_path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    saerec.save_artifact(a, {"x": torch.arange(3)}, Nothing(), "hash")
    saerec.save_artifact(b, {"x": torch.ones(2)}, Nothing(4), "hash", [a])
    tensors, meta = saerec.load_artifact(b, "make b")
    assert tensors["x"].tolist() == [1, 1] and meta["settings"] == {"size": 4} and set(meta["made_from"]) == {"a.safetensors"}
    first = a.read_bytes()
    saerec.save_artifact(a, {"x": torch.arange(3)}, Nothing(), "hash")
    assert a.read_bytes() == first  # equal runs, equal bytes
    saerec.save_artifact(a, {"x": torch.arange(4)}, Nothing(), "hash")
    with pytest.raises(saerec.UserError, match="b.safetensors was made from another .*a.safetensors .*make b"):
        saerec.load_artifact(b, "make b")
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("damage", [lambda b: b[:-5], lambda b: b[:4], lambda b: b"junk" * 50, lambda b: b""])
def test_corrupt_artifact(tmp_path, damage):
    path = tmp_path / "a.safetensors"
    saerec.save_artifact(path, {"x": torch.arange(30)}, Nothing(), "hash")
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(saerec.UserError, match="a.safetensors is corrupt or truncated .*make a"):
        saerec.load_artifact(path, "make a")


def test_foreign_and_missing_artifacts(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(saerec.UserError, match="is missing: make it with `make a`"):
        saerec.load_artifact(path, "make a")
    saerec.safetensors.torch.save_file({"x": torch.ones(1)}, path)
    with pytest.raises(saerec.UserError, match="was not written by saerec"):
        saerec.load_artifact(path, "make a")


def test_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, capsys):
    def full(settings):
        def write(temporary):
            Path(temporary).write_text("half")
            raise OSError(28, "No space left on device", str(tmp_path / "a"))

        saerec.write_atomically(tmp_path / "a", write)

    assert saerec.run([], "", full=(Nothing, full)) == 2
    assert "No space left on device" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_while_a_model_is_written(tmp_path, tiny_run):
    """A limit on the size of files stands for the full disk: the old model stays, nothing half-written lies about."""
    run = copy_run(tiny_run, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    command = [sys.executable, str(ROOT / "model.py"), "--run", str(run), "--epochs", "1", "--width", "64", "--device", "cpu"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # noqa: E731
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.strip().count("\n") == 0 and "model.safetensors" in done.stderr and "free" in done.stderr
    after = {path.name: path.read_bytes() for path in run.iterdir()}
    assert after.pop("log.csv") and before.pop("log.csv") and after == before


@pytest.mark.parametrize(
    "argv, words",
    [
        (["prepare", "ml-1m"], ["ml-1m", "ml-100k"]),
        (["prepare", "ml-100k", "--aut", "x"], ["--aut", "did you mean --out"]),
        (["check"], ["folder"]),
        ([], ["folder"]),
    ],
)
def test_bad_command_lines(fails, argv, words):
    fails(saerec.main, argv, *words)


def test_a_device_that_is_not_there(fails, tiny_run):
    if not torch.cuda.is_available():
        fails(model.main, ["--run", tiny_run, "--device", "cuda"], "no GPU", "--device cpu")


def test_wheel_with_other_content_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(saerec, "HERE", tmp_path)
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "some_thing-1.0-py3-none-any.whl").write_bytes(b"not it")
    with pytest.raises(saerec.UserError, match="SHA-256 differs.*delete it"):
        saerec.unpack_wheel("some-thing==1.0", "00", {}, tmp_path / "out")


def test_download_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(saerec, "HERE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(saerec.UserError, match="could not download some-thing==1.0 .*check the network"):
        saerec.unpack_wheel("some-thing==1.0", "00", {}, tmp_path / "out")
    assert not list((tmp_path / "downloads").iterdir())


def test_interrupt_leaves_what_was_finished(tmp_path, tiny_data, tiny_run):
    """Ctrl-C during training: one sentence, status 2, and the artifacts that were there are whole."""
    run = copy_run(tiny_run, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    command = [sys.executable, str(ROOT / "model.py"), "--run", str(run), "--epochs", "1000000", "--patience", "1000000", "--device", "cpu"]
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  a job in the background is born deaf to Ctrl-C
    job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    for line in job.stdout:
        if line.startswith("epoch"):
            break
    time.sleep(0.2)
    job.send_signal(signal.SIGINT)
    _, error = job.communicate(timeout=60)
    assert job.returncode == 2 and "interrupted" in error and "Traceback" not in error
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_no_pickle_and_no_bare_except():
    for path in ROOT.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            where = f"{path.name} line {getattr(node, 'lineno', '')}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                assert "pickle" not in ast.unparse(node), where
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, where
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in ("torch.save", "torch.load", "np.load", "eval", "exec"), where


def test_help_names_default_unit_and_origin(capsys):
    with pytest.raises(SystemExit):
        model.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "default 50; items; SAERec's code" in out


@pytest.mark.parametrize("script", ["saerec", "embed", "sae", "model", "eval"])
@pytest.mark.parametrize("given, expected", [(None, "1000"), ("7", "7")])
def test_how_idle_threads_wait_is_set_before_torch_is_loaded(script, given, expected):
    """A module finder sees the environment at the moment when torch is first looked for."""
    program = f"""
import os, sys
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"))
            sys.exit()
sys.meta_path.insert(0, Finder())
import {script}"""
    own = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    environment = own | ({"GOMP_SPINCOUNT": given} if given else {})
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr
