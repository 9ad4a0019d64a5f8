"""What the sources share: clean texts, times, interactions in order, writing a dataset folder."""

import hashlib
import random
import time

import numpy as np
import pytest

import saerec
from conftest import text, write_folder
from sources import common

DAY = 86400


@pytest.mark.parametrize("start", common.NOT_PLAIN)
def test_what_is_no_plain_file_is_named_before_long_work(tmp_path, start):
    """An archive, a spreadsheet, Parquet, and what some programs save as "Unicode"."""
    path = tmp_path / "reviews.csv"
    path.write_bytes(start + b"rest")
    with pytest.raises(saerec.UserError, match="reviews.csv is an archive, a spr.*unpack it"):
        common.check_input(path)
    path.write_bytes(b"ann,a\n" + start)
    common.check_input(path)


@pytest.mark.parametrize(
    "text, lines",
    [
        ("  plain \t text ", ["plain text"]),
        ("AT&amp;T says &amp;quot;hi&amp;quot;&nbsp;&#39;now&#39;", ["AT&T says \"hi\" 'now'"]),
        ("one<br />two<BR>three\n\nfour", ["one", "two", "three", "four"]),
        ("a <b>bold</b>, <a href='x'>link</a>ed <i>word</i>", ["a bold, linked word"]),
        (
            "<p>para</p><ul><li>x</li></ul><!-- no --> <script>var a = '<b>';</script>end",
            ["para", "x", "end"],
        ),
        ("I <3 this, 2 < 3 and 5 > 4", ["I <3 this, 2 < 3 and 5 > 4"]),
        ("I rate it a<b then c>d ok", ["I rate it a<b then c>d ok"]),
        ("from <ann@x.org>, <https://x.org>", ["from <ann@x.org>, <https://x.org>"]),
        ("<h1 class='x'>One</h1 ><o:p>two</o:p>three<br / >four", ["One", "two", "three", "four"]),
        ("the <script> tag, never closed", ["the", "tag, never closed"]),
        ('<!DOCTYPE html><?xml:namespace prefix = o ns = "x" />Soap', ["Soap"]),
        ("[[VIDEOID:7c9fa0d0bc6e]] See [[it]]", ["See [[it]]"]),
        ("half a pair \ud83d here", ["half a pair here"]),
        ("", []),
    ],
)
def test_clean(text, lines):
    assert common.clean(text) == lines


@pytest.mark.parametrize("begin", ["<!-- ", "<script ", "<style>", "<b ", "<a =", "</script "])
def test_clean_takes_a_time_linear_in_the_text(begin):
    """What is quadratic would take minutes."""
    started = time.perf_counter()
    common.clean(begin * 40_000)
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize(
    "parts, text",
    [
        (["Soap", "Clean", "fresh"], "Soap. Clean. fresh"),
        (["Soap!", "", "So: clean,", "fresh", ""], "Soap! So: clean, fresh"),
        (["Soap"], "Soap"),
        (["", ""], ""),
        ([], ""),
    ],
)
def test_join_sentences(parts, text):
    assert common.join_sentences(parts) == text


# Times


@pytest.mark.parametrize(
    "value, seconds",
    [
        ("12.5", 12.5),
        (12.5, 12.5),
        ("1E3", 1000),
        ("-1", -1),
        ("1970-01-02", DAY),  # UTC unless it says otherwise
        ("1970-01-01T02:00+02:00", 0),
        ("1970-01-02T00:00:01Z", DAY + 1),
        ("1970-01-02 00:00:01Z", DAY + 1),
        ("1970-01-02 00:00:01.25", DAY + 1.25),
        ("1970-01-02T00:00:00.500000000Z", DAY + 0.5),
    ],
)
def test_parse_time(value, seconds):
    assert common.parse_time(value) == seconds


WRONG_TIMES = ("soon", "", "1.2.3", "31.05.2024", None)
NOT_FINITE = ("nan", "inf", "-Infinity", "1e999", float("nan"), float("inf"))


@pytest.mark.parametrize("value", [*WRONG_TIMES, *NOT_FINITE])
def test_what_is_no_time_is_named(value):
    with pytest.raises(ValueError) as error:
        common.parse_time(value)
    assert repr(str(value)) in str(error.value) and "2024-05-31" in str(error.value)


OF_2024 = {  # the same moment
    "a date": "2024-05-31",
    "a date with time": "2024-05-31T00:00",
    "a date with time and zone": "2024-05-31T02:00+02:00",
    "seconds": 1717113600,
    "milliseconds": 1717113600000,
    "microseconds": "1717113600000000",
    "nanoseconds": 1.7171136e18,
}


KINDS = list(OF_2024)


@pytest.mark.parametrize("first, second", list(zip(KINDS, KINDS[1:] + KINDS[:1])))
def test_times_of_two_kinds(first, second):
    """Each kind beside the next."""
    kinds = {}
    for line in (2, 3):
        common.check_kind(kinds, OF_2024[first], "log.csv", line)
    with pytest.raises(saerec.UserError) as error:
        common.check_kind(kinds, OF_2024[second], "log.csv", 4)
    for line, kind in ((2, first), (4, second)):
        assert f"line {line} has {OF_2024[kind]} ({kind})" in str(error.value)


@pytest.mark.parametrize(
    "value, second, read",
    [
        ("1717113600", 1, "seconds"),
        (1717113600000, 1e3, "milliseconds"),
        (1.7171136e18, 1e9, "nanoseconds"),
        ("2024-05-31", 1, "a date"),
        ("2024-05-31 00:00", 1, "a date with time"),
    ],
)
def test_the_span_of_times_is_said(capsys, value, second, read):
    kinds = {}
    common.check_kind(kinds, value, "log.csv", 2)
    common.tell_span(np.array([1717113600, -1, 1e9]) * second, kinds, "log.csv")
    said = capsys.readouterr().out
    assert said == f"log.csv: times from 1969-12-31 to 2024-05-31, read as {read}\n"


def test_times_with_zones_are_of_one_kind():
    kinds = {}
    times = ["2024-05-31T00:00Z", "2024-05-31 00:00:01.5-05:00", "20240531T10Z"]
    for line, when in enumerate(times):
        common.check_kind(kinds, when, "log.csv", line)
    assert list(kinds) == ["a date with time and zone"]


ODD_TIMES = [[0], [-1e300, 0], [20240531, 20231231], [1052020, 5], [2023, 2022], [2023.9, 2101]]


@pytest.mark.parametrize("times", ODD_TIMES)
def test_odd_times_have_a_span(capsys, times):
    common.tell_span(np.array(times, float), {"seconds": ""}, "log.csv")
    assert "times from" in capsys.readouterr().out


@pytest.mark.parametrize("times", [[31052024, 1012024], [5312024, 12311999]])
def test_dates_that_begin_with_the_day_or_month(times):
    with pytest.raises(saerec.UserError, match=f"log.csv.* {times[0]:08}.*2024-05-31"):
        common.tell_span(np.array(times, float), {"seconds": ""}, "log.csv")


def test_months_after_a_point():
    """2023.10 is the same number as 2023.1."""
    words = "log.csv: times such as 2023.9 look like a year and a month: write dates as 2024-05-31"
    with pytest.raises(saerec.UserError, match=words):
        common.tell_span(np.array([2022, 2023.9, 2023.10]), {"seconds": ""}, "log.csv")


@pytest.mark.parametrize(
    "time, kind, said",
    [
        (31012023101010, "milliseconds", "31012023101010, read as milliseconds,"),  # day first
        (1e300, "nanoseconds", "0, read as nanoseconds,"),
        (133 * 365.2425 * DAY, "a date with time", "2103-01-01, read as a date with time,"),
    ],
)
def test_times_that_are_yet_to_come(time, kind, said):
    with pytest.raises(saerec.UserError) as error:
        common.tell_span(np.array([0, time]), {kind: ""}, "log.csv")
    assert f"{said} are after the year 2100: write dates as 2024-05-31" in str(error.value)


def test_the_last_day_of_2100(capsys):
    last = common.parse_time("2100-12-31T23:59:59")
    common.tell_span(np.array([0, last]), {"seconds": ""}, "log.csv")
    assert "to 2100-12-31" in capsys.readouterr().out
    with pytest.raises(saerec.UserError, match="after the year 2100"):
        common.tell_span(np.array([0, last + 1]), {"seconds": ""}, "log.csv")


# Interactions


def test_interactions_by_hand():
    """Users are sorted by id, items numbered as they turn up; bob's two at 5 are tied."""
    rows = [("bob", "x", 5, 1), ("ann", "y", 9, 2), ("bob", "z", 1, 3), ("bob", "y", 5, 4)]
    rows += [("al", "x", 7, 5), ("bob", "x", 5, 6)]
    log = common.index_interactions(rows)
    assert log.user_ids == ["al", "ann", "bob"] and log.item_ids == ["x", "y", "z"]
    assert log.user.tolist() == [0, 1, 2, 2, 2, 2]
    assert log.time.tolist() == [7, 9, 1, 5, 5, 5]
    lines = {"x": [1, 6], "y": [4]}  # what differs in nothing else stays as in the file
    x_or_y = sorted("xy", key=lambda item: common.hash_order("bob", item))
    assert log.line.tolist() == [5, 2, 3, *lines[x_or_y[0]], *lines[x_or_y[1]]]
    assert log.user_bounds().tolist() == [0, 1, 2, 6]
    assert log.ties() == dict(ties=2, pairs=3)
    kept = log.select([0, 2, 5])
    assert list(kept.sequences()) == [("al", ["x"]), ("bob", ["z", x_or_y[1]])]
    assert kept.ties() == dict(ties=0, pairs=1)


def test_no_interactions():
    log = common.index_interactions([])
    assert list(log.sequences()) == [] and log.ties() == dict(ties=0, pairs=0)


def test_order_of_lines_is_no_signal():
    """However the lines of a log with times of whole days are ordered, its sequences are the same.

    The order of ties is another for every user: that of the ids would be a signal, too.
    """
    draw = random.Random(0)
    rows = []
    for line in range(600):
        user = f"u{draw.randrange(30)}"
        rows.append((user, f"i{draw.randrange(20)}", DAY * draw.randrange(8), line))
    sequences = list(common.index_interactions(rows).sequences())
    ties = common.index_interactions(rows).ties()
    assert 0 < ties["ties"] < ties["pairs"] == 600 - 30
    for key in (lambda row: row[1], lambda row: draw.random()):
        again = common.index_interactions(sorted(rows, key=key))
        assert list(again.sequences()) == sequences
        assert again.ties() == ties

    at_once = [(f"u{user}", item, 0, 0) for user in range(200) for item in ("a", "b")]
    first = [items[0] for _, items in common.index_interactions(at_once).sequences()]
    assert 70 < first.count("a") < 130  # 4 standard deviations


def test_ties_are_ordered_by_a_hash_by_hand():
    digest = hashlib.blake2b(b"ann i7", digest_size=8).hexdigest()
    assert common.hash_order("ann", "i7") == int(digest, 16)


def test_the_share_of_ties_is_kept_and_shown(tmp_path, capsys):
    sequences = [("ann", ["a", "b", "c"]), ("bob", ["b", "c", "a"])]
    rows = [dict(item="a", text="text")]
    common.write_dataset(tmp_path / "d", sequences, rows, dict(ties=1, pairs=4))
    assert "25.0% of neighbouring interactions have the same time" in capsys.readouterr().out
    assert saerec.main(["check", str(tmp_path / "d")]) == 0
    assert "25.0% of neighbouring" in capsys.readouterr().out
    common.write_dataset(tmp_path / "d", sequences, rows)  # from a source without times
    assert "neighbouring" not in capsys.readouterr().out
    (tmp_path / "d" / "ties.txt").write_bytes(b"some, said at a caf\xe9\n")
    assert saerec.main(["check", str(tmp_path / "d")]) == 0
    assert "some, said at a caf" in capsys.readouterr().out


@pytest.mark.parametrize("ties, loud", [(9, False), (10, True)])
def test_times_that_nearly_all_tie_are_said_loudly(tmp_path, capsys, ties, loud):
    sequences = [("ann", ["a", "b", "c"])]
    rows = [dict(item="a", text="text")]
    common.write_dataset(tmp_path / "d", sequences, rows, dict(ties=ties, pairs=10))
    assert ("NEARLY ALL" in capsys.readouterr().out) is loud


def test_a_dataset_that_cannot_be_is_not_written(tmp_path):
    """What lay there stays, byte for byte."""
    folder = write_folder(tmp_path / "d", "ann a b c\n", text("a"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    words = f"nothing was written: the new {folder}/texts.jsonl line 1.*'zoo'"
    with pytest.raises(saerec.UserError, match=words):
        common.write_dataset(folder, [("bob", ["a", "b", "c"])], [dict(item="zoo", text="x")])
    with pytest.raises(saerec.UserError, match="no user with 3 items"):
        common.write_dataset(tmp_path / "new", [("bob", ["a"])], [dict(item="a", text="x")])
    assert not (tmp_path / "new").exists()
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_separators_that_are_no_line_ends_stay_in_their_text(tmp_path):
    """str.splitlines would cut at each of them, the files are cut at line feeds alone."""
    odd = "one\x85two\u2028three\x1cfour\x0bfive"
    rows = [{"item": "a", "text": odd}, {"item": "b", "text": "plain"}]
    sequences = [("ann", ["a", "b", "c"])]
    data = common.write_dataset(tmp_path / "d", sequences, rows)
    assert data.texts == [odd, "plain"]


def test_an_empty_name_is_no_folder(tmp_path, monkeypatch):
    """Path("") is where one stands."""
    monkeypatch.chdir(tmp_path)
    sequences = [("ann", ["a", "b", "c"])]
    with pytest.raises(saerec.UserError, match="--out is empty: name the folder"):
        common.write_dataset("", sequences, [dict(item="a", text="x")])
    assert not list(tmp_path.iterdir())


def test_what_is_wrong_with_the_input_is_not_said_of_the_new_folder(tmp_path):
    def rows():
        yield dict(item="a", text="x")
        raise saerec.UserError("reviews.json has changed: run again")

    with pytest.raises(saerec.UserError, match="^reviews.json has changed"):
        common.write_dataset(tmp_path / "d", [("ann", ["a", "b", "c"])], rows())
    assert not (tmp_path / "d").exists()


def test_a_claimed_folder_goes_unless_something_is_in_it(tmp_path):
    for name in ("empty", "full"):
        with pytest.raises(KeyboardInterrupt), common.claimed(tmp_path / name) as folder:
            assert folder.is_dir()
            if name == "full":
                (folder / "file").touch()
            raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
