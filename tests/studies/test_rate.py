"""Rating sheets against the library they ask about, and published examples of kappa."""

import csv

import numpy as np
import pytest

import saerec
from conftest import copy_run
from eval import read_intents
from studies import rate

HEADER = "question,task,asked,answer\n"


def read(path):
    with open(path, newline="", encoding="utf-8-sig") as file:  # as spreadsheets want it
        return list(csv.DictReader(file))


def make_sheet(run, folder, *more):
    """Rows of a sheet, and of its key by question."""
    out = folder / "sheet.csv"
    assert rate.main(["sheet", "--run", str(run), "--out", str(out), *more]) == 0
    key = read(folder / "sheet_key.csv")
    return read(out), {row["question"]: row for row in key}


def test_sheet_is_blind_and_its_key_is_right(tmp_path, tiny_run):
    sheet, key = make_sheet(tiny_run, tmp_path, "--intents", "8")
    rows = read_intents(tiny_run)
    asked = min(8, sum(len(row["texts"]) >= 4 for row in rows))
    assert len(sheet) == len(key) == 2 * asked
    assert list(sheet[0]) == list(rate.HEADER)  # nothing in it tells what is right
    assert all(row["answer"] == "" for row in sheet)
    for row in sheet:
        texts = [row[f"text {n}"] for n in range(1, 6)]
        right = int(key[row["question"]]["right"])
        assert key[row["question"]]["task"] == row["task"]
        if row["task"] == "intruder":
            assert len(set(texts)) == 5
            odd = texts.pop(right - 1)
            having = [intent["texts"] for intent in rows if set(texts) <= set(intent["texts"])]
            assert any(odd not in own for own in having)
        else:
            own = [intent for intent in rows if intent["texts"][:4] == texts[:4]]
            assert texts[4] == ""
            assert right == any(repr(intent["label"]) in row["asked"] for intent in own)
    assert {row["task"] for row in sheet[:8]} == {"intruder", "label"}  # shuffled


def test_the_seed_draws_the_sheet(tmp_path, tiny_run):
    first = make_sheet(tiny_run, tmp_path)
    assert make_sheet(tiny_run, tmp_path) == first
    assert make_sheet(tiny_run, tmp_path, "--seed", "1") != first


def write_intents(run, texts):
    """Give a run's intents other texts; texts: a function of the intent's number."""
    rows = read_intents(run)
    others = [row | dict(texts=texts(n)) for n, row in enumerate(rows)]
    saerec.write_rows(run / "intents.jsonl", others)


@pytest.fixture
def long_cells():
    usual = csv.field_size_limit(2**31 - 1)
    yield
    csv.field_size_limit(usual)


def test_any_text_comes_back_as_it_was(tmp_path, tiny_run, long_cells):
    """Line ends of every kind, commas and quotes are part of a text, not of the sheet."""
    run = copy_run(tiny_run, tmp_path / "run")
    odd = "a\rb\nc\r\nd\u2028e\x85f\x0bg\x1ch"
    write_intents(run, lambda n: [f'{n},{part}" {odd}' for part in range(3)] + ["x" * 200_000])
    sheet, key = make_sheet(run, tmp_path)
    labels = [row for row in sheet if row["task"] == "label"]
    assert labels
    for row in labels:
        number = row["text 1"].split(",")[0]
        assert row["text 2"] == f'{number},1" {odd}'
    for row in sheet:
        row["answer"] = "1"
    for delimiter in ",;\t":  # a spreadsheet writes what its country is used to
        with open(tmp_path / "filled.csv", "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, sheet[0], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(sheet)
        answers = rate.read_sheet(tmp_path / "filled.csv", "answer")
        assert answers.keys() == key.keys()


def test_no_intruder_is_asked_for_where_all_intents_share_their_texts(tmp_path, tiny_run):
    run = copy_run(tiny_run, tmp_path / "run")
    write_intents(run, lambda n: ["a", "b", "c", "d"])
    sheet, _ = make_sheet(run, tmp_path)
    assert {row["task"] for row in sheet} == {"label"}


def test_runs_that_cannot_be_asked_about(tmp_path, tiny_run, fails):
    fails(rate.main, ["sheet"], "--run is missing")
    run = copy_run(tiny_run, tmp_path / "run")
    write_intents(run, lambda n: ["a", "b", "c", "d"][: 3 + (n == 0)])
    error = fails(rate.main, ["sheet", "--run", run], "has 1 intent(s) with 4 top texts")
    assert "bring more texts" in error


def fill(path, sheet, answer):
    """Write a filled copy of a sheet; answer: a function of its row."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, sheet[0])
        writer.writeheader()
        writer.writerows(row | {"answer": answer(row)} for row in sheet)
    return str(path)


def test_experts_and_a_guesser(tmp_path, tiny_run, capsys):
    sheet, key = make_sheet(tiny_run, tmp_path, "--intents", "8")

    def expert(row):
        right = int(key[row["question"]]["right"])
        return right if row["task"] == "intruder" else 1 + 4 * right

    def guesser(row):
        right = int(key[row["question"]]["right"])
        return right % 5 + 1 if row["task"] == "intruder" else 3

    a = fill(tmp_path / "a.csv", sheet, expert)
    b = fill(tmp_path / "b.csv", sheet, expert)
    c = fill(tmp_path / "c.csv", sheet, guesser)
    capsys.readouterr()
    assert rate.main(["kappa", a, b, "--key", str(tmp_path / "sheet_key.csv")]) == 0
    out = capsys.readouterr().out
    assert "accuracy 1.00 (chance 0.20)" in out
    assert "mean fit 5.00 of own labels, 1.00 of other" in out
    assert out.count("Cohen's kappa 1.00, Fleiss' kappa 1.00") == 2
    assert rate.main(["kappa", a, b, c]) == 0
    out = capsys.readouterr().out
    assert "accuracy" not in out and out.count("(mean of pairs)") == 2
    assert rate.main(["kappa", c, "--key", str(tmp_path / "sheet_key.csv")]) == 0
    out = capsys.readouterr().out
    assert "accuracy 0.00" in out and "mean fit 3.00 of own labels, 3.00" in out
    assert "kappa 1" not in out and "Cohen" not in out


def test_kappa_of_published_examples():
    """Cohen's of 45 yes-yes, 15 yes-no, 25 no-yes, 15 no-no; Fleiss' of 10 subjects, 14 raters."""
    a = np.repeat([1, 1, 0, 0], [45, 15, 25, 15])
    b = np.repeat([1, 0, 1, 0], [45, 15, 25, 15])
    assert rate.cohen_kappa(a, b) == pytest.approx(0.1304, abs=1e-4)
    table = [
        [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
        [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
    ]  # fmt: skip
    answers = np.stack([np.repeat(range(5), row) for row in table], 1)
    assert rate.fleiss_kappa(answers) == pytest.approx(0.210, abs=1e-3)


def test_raters_of_one_mind_agree_beyond_any_chance():
    same = np.full((2, 5), 3)
    assert rate.cohen_kappa(*same) == rate.fleiss_kappa(same) == 1


def test_sides_that_were_not_asked():
    answers = np.array([[2, 4]])
    said = rate.correctness("label", answers, np.array([1, 1]))
    assert said == "mean fit 3.00 of own labels, none asked of other intents' labels"


def test_sheets_that_cannot_be_scored(tmp_path, fails):
    bodies = {
        "good": "1,intruder,?,2\n2,label,?,5\n",
        "open": "1,intruder,?,\n",
        "wrong": "1,intruder,?,7\n",
        "less": "1,intruder,?,2\n",
        "blank": ",intruder,?,2\n",
    }
    for name, body in bodies.items():
        (tmp_path / f"{name}.csv").write_text(HEADER + body)
    good = tmp_path / "good.csv"
    assert rate.main(["kappa", str(good)]) == 0
    made_by = "studies/rate.py sheet"
    fails(rate.main, ["kappa", tmp_path / "none.csv"], "none.csv cannot be read", made_by)
    (tmp_path / "latin.csv").write_bytes(HEADER.encode() + b"\xe9")
    fails(rate.main, ["kappa", tmp_path / "latin.csv"], "latin.csv cannot be read", made_by)
    fails(rate.main, ["kappa", good, tmp_path / "open.csv"], "open.csv row 2", "answer is ''")
    wrong = fails(rate.main, ["kappa", good, tmp_path / "wrong.csv"], "wrong.csv row 2", "'7'")
    assert "1, 2, 3, 4, 5" in wrong
    fails(rate.main, ["kappa", good, tmp_path / "blank.csv"], "blank.csv row 2")
    fails(rate.main, ["kappa", good, tmp_path / "less.csv"], "less.csv has other questions than")
    fails(rate.main, ["kappa"], "sheets")
    key = tmp_path / "key.csv"
    key.write_text("question,task,right\n1,intruder,2\n2,label,5\n")
    fails(rate.main, ["kappa", good, "--key", key], "key.csv row 3", "right is '5'", "0, 1")
    key.write_text("question,task,right\n1,intruder,2\n")
    fails(rate.main, ["kappa", good, "--key", key], "good.csv has other questions", "or the key")
    key.write_text("question,right\n1,2\n2,1\n")
    fails(rate.main, ["kappa", good, "--key", key], "key.csv has no column 'task'", "sheet")
    key.write_text("question,task,right\n1,label,1\n2,label,1\n")  # of another sheet
    fails(rate.main, ["kappa", good, "--key", key], "good.csv has other questions", "or the key")


def test_a_sheet_that_a_spreadsheet_saved(tmp_path):
    """With a byte order mark, and lines that end as on Windows."""
    path = tmp_path / "saved.csv"
    path.write_bytes(b"\xef\xbb\xbf" + (HEADER + "1,label,?, 4 \n").replace("\n", "\r\n").encode())
    assert rate.read_sheet(path, "answer") == {"1": ("label", 4)}
