"""The measurement of preparing reviews: its files are what it says, its table has their numbers."""

import json
import re

import pytest

from studies import prepare


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files(tmp_path):
    prepare.write_files(tmp_path, 900)
    reviews = rows_of(tmp_path / "reviews.json")
    users = [int(row["reviewerID"][1:]) for row in reviews]
    items = [int(row["asin"][1:]) for row in reviews]
    assert len(reviews) == 900 and max(users) < 100 and max(items) < 30
    assert sum(user < 50 for user in users) > 500  # low numbers are more active
    meta = rows_of(tmp_path / "meta.json")
    assert [row["asin"] for row in meta] == [f"B{item:09d}" for item in range(30)]
    before = (tmp_path / "reviews.json").read_bytes()
    prepare.write_files(tmp_path, 900)
    assert (tmp_path / "reviews.json").read_bytes() == before


def test_table(monkeypatch, capsys):
    monkeypatch.setattr(prepare, "OPTIONS", ("--text reviews",))
    assert prepare.main(["--lines", "900"]) == 0
    row = capsys.readouterr().out.splitlines()[1]
    assert re.fullmatch(r" +900 +\d+  --text reviews +\d+\.\d +[\d,]+ +\d\.\d\d", row)


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """stub(code): a program in the place of sources/amazon.py, which takes a while to start."""

    def write(code):
        (tmp_path / "sources").mkdir()
        (tmp_path / "sources" / "amazon.py").write_text(code)

    monkeypatch.setattr(prepare, "HERE", tmp_path)
    return write


def test_a_system_that_does_not_tell_how_much_memory(monkeypatch, capsys, stub):
    """Windows: the rest of the row is there."""
    stub("")
    monkeypatch.setattr(prepare, "OPTIONS", ("--text reviews",))
    monkeypatch.delattr(prepare.os, "wait4")
    assert prepare.main(["--lines", "900"]) == 0
    assert capsys.readouterr().out.split("\n")[1].endswith(" unknown")


def test_wrong_lines(fails, stub):
    fails(prepare.main, ["--lines", "many"], "--lines is 'many'", "50000,100000")
    stub("import sys; sys.exit('too few users: lower --core')")
    said = "`sources/amazon.py --text item` failed: too few users: lower --core"
    fails(prepare.main, ["--lines", "9"], said)
