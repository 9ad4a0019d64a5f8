"""What people really bring: files, folders and streams as they are. Said or refused, never silent."""

import bz2
import gzip
import io
import itertools
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

import embed
import eval as evaluation
import model
import sae
import saerec
from conftest import SMALL, copy_run, make_run, text, write_dataset, write_folder

ROOT = Path(saerec.__file__).parent
BOM = "\ufeff"


def review(item, user, words="fine"):
    return json.dumps({"item": item, "text": f"{words} {item}", "user": user}) + "\n"


# Two files joined by id: a failed join must not pass for "nothing to hide"


def test_a_byte_order_mark_hides_no_review(tmp_path):
    """The first user's review of her test item stays out, whichever file has the mark."""
    texts = text("a") + review("c", "ann") + review("a", "ann")
    for first, second in ((BOM, ""), ("", BOM), (BOM, BOM)):
        folder = write_folder(tmp_path / "d", first + "ann a b c\nbob a b c\n", second + texts)
        data = saerec.load_dataset(folder)
        assert data.users == ["ann", "bob"] and data.texts == ["text of a", "fine a"]
        assert "1 text(s) written in held-out interactions left out" in data.notes


def test_reviews_that_are_of_no_interaction_are_counted(tmp_path):
    """Those by users with a line and those by others, each."""
    reviews = review("a", "ann") + review("d", "ann") + review("a", "zoe") + review("b", "zoe")
    data = saerec.load_dataset(write_folder(tmp_path / "d", "ann a b c\nbob b c d\n", reviews))
    assert "1 review(s) of what their user has not in sequences.txt kept" in data.notes
    assert "2 review(s) by users without a line in sequences.txt kept" in data.notes
    assert len(data.texts) == 4


def test_reviews_of_users_without_a_line_may_be_most(tmp_path):
    """As of a core, beside all reviews of its items: no item of theirs is held out."""
    reviews = review("a", "ann") + review("d", "ann") + review("z", "ann")
    reviews = reviews.replace('"z"', '"c"') + "".join(review("d", f"z{n}") for n in range(9))
    data = saerec.load_dataset(write_folder(tmp_path / "d", "ann a b c d\n", reviews))
    assert "9 review(s) by users without a line in sequences.txt kept" in data.notes
    assert "2 text(s) written in held-out interactions left out" in data.notes
    assert len(data.texts) == 10


def test_user_ids_written_otherwise_are_refused(tmp_path, fails):
    """Else every held-out review would stay, without a word."""
    sequences = "".join(f"{user} a b c d\n" for user in range(1, 6))
    reviews = "".join(review("d", f"u{user}") for user in range(1, 6))
    folder = write_folder(tmp_path / "d", sequences, reviews)
    fails(saerec.main, ["check", folder], "only 0 of 5 reviews are of what", "line 1: 'u1'", "same ids")


@pytest.mark.parametrize("other", ["7.0", "07", "ANN", " ann", "ann ", "Ann", "Jose\u0301"])
def test_one_user_id_written_otherwise_is_refused(tmp_path, fails, other):
    """Though all others are right: the review of a held-out item would stay."""
    sequences = "7 a b c d\nann a b c d\nJos\u00e9 a b c d\n"
    reviews = review("a", "ann") + review("a", "7") + review("a", "zoe") + review("d", other)
    folder = write_folder(tmp_path / "d", sequences, reviews)
    known = {"7": "'7'", "j": "'Jos\u00e9'"}.get(other.lstrip("0").lower()[0], "'ann'")
    words = ["texts.jsonl line 4", repr(other), f"{known} has: write the same ids in both"]
    fails(saerec.main, ["check", folder], *words)


@pytest.mark.parametrize("user", [0, 5, False, [], {}])
def test_a_user_that_is_no_string_is_refused(tmp_path, fails, user):
    """0 is a user as 5 is, not nobody."""
    folder = write_folder(tmp_path / "d", "0 a b c d\n", review("d", user))
    fails(saerec.main, ["check", folder], "texts.jsonl line 1", "strings", '"user"')


def test_a_user_and_a_title_that_are_null_are_none(tmp_path):
    line = '{"item": "a", "text": "one", "user": null, "title": null}\n'
    data = saerec.load_dataset(write_folder(tmp_path / "d", "ann a b c\n", line))
    assert data.texts == ["one"] and data.titles[1] == "one"


def test_user_ids_renumbered_in_one_file_are_refused(tmp_path, fails):
    """All of them are users in both files, but not of these items."""
    sequences = "".join(f"{user} {user}a {user}b {user}c\n" for user in range(5))
    reviews = "".join(review(f"{user}c", str((user + 1) % 5)) for user in range(5))
    folder = write_folder(tmp_path / "d", sequences, reviews)
    fails(saerec.main, ["check", folder], "only 0 of 5 reviews", "'1' about '0c'", "same ids in both")


def test_item_ids_written_otherwise_are_shown_beside_each_other(tmp_path, fails):
    folder = write_folder(tmp_path / "d", "ann 1.0 2.0 3.0\n", text("1"))
    fails(saerec.main, ["check", folder], "texts.jsonl line 1", "item '1'", "1.0, 2.0, 3.0")


# Ids and texts that are damaged


@pytest.mark.parametrize("name", [*"NA nan NaT NULL None N/A \\N (null) 9.78E+12 1,2E+10 5E+09".split()])
def test_damaged_ids(tmp_path, fails, name):
    remedy = "spreadsheet" if "E+" in name else "remove the line"
    folder = write_folder(tmp_path / "user", f"ann a b c\n{name} a b c\n", text("a"))
    fails(saerec.main, ["check", folder], "sequences.txt line 2", repr(name), remedy)
    folder = write_folder(tmp_path / "item", f"ann a b {name}\n", text("a"))
    fails(saerec.main, ["check", folder], "sequences.txt line 1", repr(name), remedy)


@pytest.mark.parametrize("hidden", ["\xa0", "\u3000", "\u2028", "\x1f", "\x00", "\u200b", "\ufeff"])
def test_ids_that_hold_what_nobody_sees(tmp_path, fails, hidden):
    """Such an id would be cut in two, or be another than it looks."""
    folder = write_folder(tmp_path / "d", f"ann a b c\nbob a{hidden}x b c\n", text("b"))
    words = ["sequences.txt line 2", repr(f"a{hidden}x"), "white space, or what nobody sees"]
    fails(saerec.main, ["check", folder], *words)


@pytest.mark.parametrize("name", ["Nanette", "1E5", "B00E+", "null_1", "12", "-"])
def test_ids_that_only_look_damaged(tmp_path, name):
    folder = write_folder(tmp_path / "d", f"{name} {name} b c\n", text("b"))
    assert saerec.load_dataset(folder).users == [name]


def test_line_ends_of_old_macs(tmp_path, fails):
    """Else the file is one user, whose items are the others."""
    folder = write_folder(tmp_path / "d", "ann a b c\rbob a b c\r", text("a"))
    fails(saerec.main, ["check", folder], "sequences.txt line 1", r"'c\rbob'", "white space")
    folder = write_folder(tmp_path / "two", "ann a b c\r\r\nbob a b c\r\n", text("a"))
    assert saerec.load_dataset(folder).users == ["ann", "bob"]


@pytest.mark.parametrize("key", ["user_id", "author", "User", "rating"])
def test_keys_that_are_not_read_are_named(tmp_path, key):
    """One may be the user's, whose reviews of held-out items would stay."""
    lines = text("a") + json.dumps({"item": "c", "text": "fine", key: "ann"}) + "\n"
    data = saerec.load_dataset(write_folder(tmp_path / "d", "ann a b c\n", lines))
    assert f"1 text(s) with {key!r}, which is not read" in data.notes


def test_half_a_character_is_cut_out_of_texts(tmp_path):
    """JSON can hold half of a surrogate pair, UTF-8 cannot: it would be found when writing."""
    lines = r'{"item": "a", "text": "good \ud83d", "title": "\ude00 A"}' + "\n"
    lines += r'{"item": "b", "text": "fine \ud83d\ude00"}' + "\n"
    data = saerec.load_dataset(write_folder(tmp_path / "d", "ann a b c\n", lines))
    assert data.texts == ["good ", "fine \U0001f600"] and data.titles[1] == " A"
    assert "1 text(s) freed of half a character (a lone surrogate)" in data.notes
    "".join(data.texts + data.titles).encode()


# Files judged by what they hold


def test_compression_is_judged_by_content(tmp_path):
    sequences, texts = b"ann a b c\n", text("a").encode()
    folder = tmp_path / "d"
    folder.mkdir()
    (folder / "sequences.txt.gz").write_bytes(sequences)
    (folder / "texts.jsonl").write_bytes(gzip.compress(texts))
    assert saerec.load_dataset(folder).texts == ["text of a"]


@pytest.mark.parametrize("packed", [bz2.compress(b"x"), lzma.compress(b"x"), b"\x28\xb5\x2f\xfd\x24"])
def test_other_archives_are_refused(tmp_path, fails, packed):
    folder = write_folder(tmp_path / "d", "ann a b c\n", text("a"))
    (folder / "texts.jsonl").write_bytes(packed)
    fails(saerec.main, ["check", folder], "texts.jsonl line 1 cannot be read", "unpack")


UTF_16 = ["\ufeffann a b c\n".encode(f"utf-16-{end}e") for end in "lb"]


@pytest.mark.parametrize("start", [b"PK\x03\x04\x14\x00", b"PAR1\x15\x04", b"\xd0\xcf\x11\xe0", *UTF_16])
def test_files_that_are_no_plain_text_are_refused(tmp_path, fails, start):
    """A zip, Parquet, a spreadsheet, and what some programs save as "Unicode"."""
    folder = write_folder(tmp_path / "d", "ann a b c\n", text("a"))
    (folder / "sequences.txt").write_bytes(start + b" a b c\n")
    fails(saerec.main, ["check", folder], "sequences.txt line 1")


# Statistics that cannot be


def test_fvu_of_texts_that_are_all_equal_is_not_defined(tmp_path, tiny_run):
    tensors, meta = saerec.load_artifact(tiny_run / "sae.safetensors", "")
    one = sae.SAE(meta["settings"]["latents"], meta["settings"]["active"], 8)
    one.load_state_dict(tensors)
    fvu, l0 = sae.measure(one, torch.ones(5, 8))
    assert np.isnan(fvu) and l0 > 0


def test_held_out_texts_that_are_all_equal(tmp_path, tiny_data, capsys):
    """The same run goes on to its end, and says that this could not be measured."""
    data = write_dataset(tmp_path / "data")
    rows = [json.loads(line) for line in (data / "texts.jsonl").read_text().split("\n") if line]
    held_out = sae.held_out_texts([row["text"] for row in rows], 0.2).tolist()
    file = tmp_path / "vectors.safetensors"
    random = torch.Generator().manual_seed(0)
    vectors = torch.randn(len(rows), 8, generator=random)
    vectors[torch.tensor(held_out)] = torch.ones(8)
    safetensors.torch.save_file({"embeddings": vectors}, file)
    import embed

    words = ["--data", data, "--run", tmp_path / "run", "--embeddings", file]
    assert embed.main([str(word) for word in words]) == 0
    make_run(data, tmp_path / "run", stages="sae grounded eval")
    assert "average: FVU nan" in capsys.readouterr().out
    header, *lines = (tmp_path / "run" / "sae_log.csv").read_text().strip().split("\n")
    column = header.split(",").index("fvu")
    assert all(line.split(",")[column] == "nan" for line in lines)


def test_repeated_rows_that_make_every_target_a_miss(tmp_path, capsys, fails):
    """A table that lists each purchase twice: the last item is in the history already."""
    data = write_dataset(tmp_path / "data")
    lines = (data / "sequences.txt").read_text().split("\n")[:-1]

    def repeat(times):
        rows = [[user, *np.repeat(items, times)] for user, *items in map(str.split, lines)]
        (data / "sequences.txt").write_text("".join(" ".join(row) + "\n" for row in rows))

    repeat(2)
    assert saerec.main(["check", str(data)]) == 0
    assert "24 user(s) had their last item before" in capsys.readouterr().out
    make_run(data, tmp_path / "run", stages="embed sasrec eval")
    assert "100% OF THE USERS HAD THE TEST ITEM BEFORE" in capsys.readouterr().out
    repeat(3)  # now the validation item, too
    make_run(data, tmp_path / "other", stages="embed")
    words = ["--run", tmp_path / "other", "--model", "sasrec", "--epochs", "1"]
    fails(model.main, words, "all had the validation item before", "drop repeated rows")


# Paths


@pytest.fixture
def moved(tmp_path, tiny_data, monkeypatch):
    """A run whose data folder was given as seen from tmp_path, which is not where we stand."""
    shutil.copytree(tiny_data, tmp_path / "data")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    make_run(Path("data"), Path("run"), stages="embed")
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "run"


def test_a_run_is_found_from_another_folder(moved):
    make_run(None, moved, stages="sae sasrec eval")


def test_data_that_moved_are_named(moved, fails, tmp_path, tiny_data):
    os.rename(tmp_path / "data", tmp_path / "shop")
    for main in (sae.main, model.main, evaluation.main):
        fails(main, ["--run", moved], f"{moved} was made from {tmp_path}/data", "not there", "--data FOLDER")
    here = ["--run", str(moved), "--data", str(tmp_path / "shop"), "--device", "cpu"]
    assert sae.main([*here, *SMALL["sae"].split()]) == 0
    assert model.main([*here, *SMALL["model"].split(), "--model", "sasrec"]) == 0
    assert evaluation.main(here) == 0
    again = embed.EmbedSettings(run=str(moved), data=str(tmp_path / "shop"))
    assert len(embed.claim_run(again).users) == 24  # no run of others: theirs are not there
    other = write_dataset(tmp_path / "other", users=30)
    fails(sae.main, ["--run", moved, "--data", other], "another dataset than", other, "again")


def test_a_run_that_cannot_be_written_is_noticed_before_the_work(tmp_path, tiny_run, fails, monkeypatch):
    run = copy_run(tiny_run, tmp_path / "run")

    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    def work(*_):
        raise AssertionError("the work began")

    monkeypatch.setattr(saerec.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(sae, "train_sae", work)
    monkeypatch.setattr(model, "train_model", work)
    monkeypatch.setattr(evaluation, "rank_users", work)
    for main in (sae.main, model.main, evaluation.main):
        fails(main, ["--run", run], "Permission denied", run, "correct it and run again")


# Streams and platforms


def test_a_reader_who_reads_no_more_ends_it_quietly(tiny_data):
    command = f"{sys.executable} {ROOT / 'saerec.py'} check {tiny_data} | true"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True)
    assert done.returncode == 141 and done.stderr == b""


def test_a_console_that_cannot_show_every_character(tmp_path, monkeypatch):
    folder = write_folder(tmp_path / "книги", "ann a b c\n", text("a"))
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "cp1252"))
    assert saerec.main(["check", str(folder)]) == 0
    assert rb"\u043a" in shown.getvalue()


def test_an_item_keeps_its_title_whatever_comes_after(tmp_path):
    """A title, else the first description, else the id; a review does not name an item."""
    rows = [
        dict(item="a", text="tall", title="Lighthouse"), dict(item="a", text="white"),
        dict(item="b", text=" "), dict(item="b", text="a red  boat"), dict(item="b", text="small"),
        dict(item="c", text="so-so", user="ann"),
    ]  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    data = saerec.load_dataset(write_folder(tmp_path / "d", "ann c a b d e\n", lines))
    assert data.titles[1:] == ["Lighthouse", "a red boat", "item c", "item d", "item e"]


def test_of_several_bad_ids_the_same_one_is_named(tmp_path):
    """Not the one that a set happens to give first, which differs from process to process."""
    missing = sorted(saerec.MISSING - {""})
    for ids in itertools.combinations(missing, 2):
        folder = write_folder(tmp_path, f"ann a {' '.join(ids)}\n", text("a"))
        with pytest.raises(saerec.UserError, match=re.escape(f"id {ids[0]!r} is a missing value")):
            saerec.load_dataset(folder)


@pytest.mark.parametrize("done, shown", [(1_234_567, "1,234,567/2,000,000"), (0.25, "0.25/")])
def test_progress_shows_numbers_that_can_be_read(capsys, done, shown):
    saerec.Progress(2_000_000, "tokens").show(done, keep=True)
    assert f"tokens {shown}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "done, stops_early, said",
    [
        (0.2, False, "0.2/100  4990 s left"),  # within the first unit, too
        (25, True, "25/100  at most 30 s left"),
        (100, True, "100/100  10 s"),
        (0, False, "0/100  10 s"),  # nothing to judge by
    ],
)
def test_the_time_left_is_what_the_work_done_took(monkeypatch, capsys, done, stops_early, said):
    progress = saerec.Progress(100, "epoch", stops_early)
    monkeypatch.setattr(saerec.time, "perf_counter", lambda: progress.start + 10)
    progress.show(done, keep=True)
    assert f"epoch {said}\n" in capsys.readouterr().out


@pytest.mark.parametrize("kind, live", [("xterm", True), ("dumb", False)])
def test_a_line_updates_itself_where_the_terminal_can(monkeypatch, capsys, kind, live):
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setattr(saerec.sys.stdout, "isatty", lambda: True, raising=False)
    saerec.Progress(4, "epoch").show(1, keep=True)
    assert capsys.readouterr().out.startswith("\r\033[K" if live else "epoch 1/4")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes")
def test_who_may_read_a_file_may_read_an_artifact(tmp_path):
    """A class reads the run of its teacher."""
    for mask in (0o022, 0o027):
        before = os.umask(mask)
        try:
            saerec.write_artifact(tmp_path / f"{mask}.safetensors", {"a": torch.ones(2)}, {})
            saerec.write_lines(tmp_path / f"{mask}.txt", ["a"])
        finally:
            os.umask(before)
        made = [tmp_path / f"{mask}.{end}" for end in ("safetensors", "txt")]
        assert [path.stat().st_mode & 0o777 for path in made] == [0o666 & ~mask] * 2
