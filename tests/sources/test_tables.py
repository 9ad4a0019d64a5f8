"""Tables of one's own: by hand, other ways to write them, and tables that are damaged."""

import gzip
import json

import pytest

from sources import tables

LOG = "user,item,time\nann,i3,30\nann,i1,10\nbob,i1,5\nann,i2,20\nann,i1,40\n"
ITEMS = (
    "item,title,description\n"
    'i1,Soap,"Clean, fresh"\n'
    'i2,"A ""big"" towel",\n'
    "i3,Brush & Co.,<b>Hard</b> hair\n"
    "i9,Not sold,x\n"
)


def write_tables(tmp_path, interactions, items, *options, suffix=""):
    """Write the two tables, str or bytes -> the command line that reads them."""
    argv = ["--out", str(tmp_path / "out")]
    for name, content in (("interactions", interactions), ("items", items)):
        if isinstance(content, str):
            content = content.encode()
        if suffix:
            content = gzip.compress(content)
        path = tmp_path / f"{name}.csv{suffix}"
        path.write_bytes(content)
        argv += [f"--{name}", str(path)]
    return [*argv, *options]


def outcome(tmp_path, *arguments, **more):
    """Run the script on two tables -> the lines of sequences.txt, the rows of texts.jsonl."""
    assert tables.main(write_tables(tmp_path, *arguments, **more)) == 0
    sequences = (tmp_path / "out" / "sequences.txt").read_text().splitlines()
    texts = (tmp_path / "out" / "texts.jsonl").read_text().splitlines()
    return sequences, [json.loads(line) for line in texts]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_tables_by_hand(tmp_path, capsys, suffix):
    sequences, texts = outcome(tmp_path, LOG, ITEMS, suffix=suffix)
    assert sequences == ["ann i1 i2 i3 i1", "bob i1"]  # repeats stay: this may be a log of plays
    assert texts == [
        {"item": "i1", "title": "Soap", "text": "Soap. Clean, fresh"},
        {"item": "i2", "title": 'A "big" towel', "text": 'A "big" towel'},
        {"item": "i3", "title": "Brush & Co.", "text": "Brush & Co. Hard hair"},
    ]
    said = f"items.csv{suffix}: 1 line(s) of items without interactions left out"
    assert said in capsys.readouterr().out


SPREADSHEET = [
    ("user,item", "\ufeffuser,item"),
    ("item,title", "\ufeffitem,title"),
    ("\n", "\r\n"),
]
OTHER_NAMES = [("user", "who"), ("item,", "what,"), ("time", "when"), ("title", "name")]
OTHER_COLUMNS = (
    "--user-column who --item-column what --time-column when --text-columns name,description"
)


@pytest.mark.parametrize(
    "changes, options",
    [
        ([(",", ";"), ("Clean;", "Clean,")], ""),
        ([(",", "\t")], ""),
        ([(",", "\t")], r"--delimiter \t"),
        ([(",", "|")], ""),
        ([(",", "^")], "--delimiter ^"),
        (SPREADSHEET, ""),
        ([("\n", "\n\n")], ""),
        ([(",", ", ")], ""),
        (OTHER_NAMES, OTHER_COLUMNS),
    ],
)
def test_other_ways_to_write_the_same_tables(tmp_path, changes, options):
    def changed(text):
        for old, new in changes:
            text = text.replace(old, new)
        return text

    sequences, texts = outcome(tmp_path, LOG, ITEMS)
    again, also = outcome(tmp_path, changed(LOG), changed(ITEMS), *options.split())
    assert again == sequences and len(also) == 3
    assert [row["title"] for row in also] == [row["title"] for row in texts]


@pytest.mark.parametrize(
    "times, order",
    [
        (["2024-05-31", "2023-01-01", "2024-05-30T23:59:59", "2024-05-31 00:00:01"], "1 2 0 3"),
        (
            [
                "2024-05-31T00:00+00:00",
                "2024-05-31T01:00+02:00",
                "2024-05-31T01:00Z",
                "2024-05-31T00:30",
            ],
            "1 0 3 2",
        ),
        (["1e3", "-5", "12.5", "0"], "1 3 2 0"),
    ],
)
def test_times(tmp_path, times, order):
    log = "user,item,time\n" + "".join(f"u,{n},{when}\n" for n, when in enumerate(times))
    items = "item,title,description\n" + "".join(f"{n},t{n},\n" for n in range(4))
    assert outcome(tmp_path, log, items)[0] == ["u " + order]


def test_lines_in_order_need_no_times(tmp_path):
    log = "user,item,time\nu,i1,x\nu,i3,y\nu,i1,\nu,i2,z\n"
    assert outcome(tmp_path, log, ITEMS, "--time-column", "")[0] == ["u i1 i3 i1 i2"]


NEVER_CLOSED = ITEMS + 'i4,"never closed,x\n' + "y\n" * 100_000


@pytest.mark.parametrize(
    "interactions, items, options, words",
    [
        (
            "who,item,time\na,i1,1\n",
            ITEMS,
            "",
            ["interactions.csv has no column 'user'", "['who', 'item', 'time']"],
        ),
        (LOG, "item,name\ni1,x\n", "", ["items.csv has no column 'title'", "['item', 'name']"]),
        (LOG, ITEMS, "--time-column date", ["no column 'date'"]),
        (
            LOG,
            ITEMS,
            "--delimiter ;",
            ["no column 'user'", "['user,item,time']", "--delimiter"],
        ),
        (LOG, ITEMS, "--delimiter ::", ["--delimiter is '::'", "one character"]),
        (LOG + "ann,i1\n", ITEMS, "", ["interactions.csv line 7", "cell"]),
        (LOG + "ann,i1,5,6\n", ITEMS, "", ["interactions.csv line 7", "cell"]),
        (LOG, NEVER_CLOSED, "", ["items.csv line", "field larger than field limit"]),
        (LOG + "ann,i1,soon\n", ITEMS, "", ["interactions.csv line 7", "'soon'", "2024-05-31"]),
        (LOG + "ann,i1,nan\n", ITEMS, "", ["interactions.csv line 7", "'nan'"]),
        (LOG + "ann b,i1,5\n", ITEMS, "", ["interactions.csv line 7", "'ann b'", "white space"]),
        (LOG + "ann,,5\n", ITEMS, "", ["interactions.csv line 7", "''", "empty"]),
        (LOG.encode() + b"caf\xe9,i1,5\n", ITEMS, "", ["interactions.csv line 7", "UTF-8"]),
        ("", ITEMS, "", ["interactions.csv has no column 'user'"]),
        ("user,item,time\n", ITEMS, "", ["no user with 3 items"]),
        (LOG, "item,title,description\nz,z,z\n", "", ["no text to learn intents from"]),
    ],
)
def test_wrong_tables(tmp_path, fails, interactions, items, options, words):
    argv = write_tables(tmp_path, interactions, items, *options.split())
    fails(tables.main, argv, *words)


def test_tables_that_are_not_there(tmp_path, fails):
    argv = write_tables(tmp_path, LOG, ITEMS)
    fails(tables.main, argv[:4], "--interactions FILE and --items FILE")
    fails(tables.main, [*argv, "--items", tmp_path / "none"], "No such file", "none")
    fails(tables.main, [*argv, "--interactions", tmp_path / "nothing"], "No such file", "nothing")
    packed = gzip.compress(LOG.encode())
    (tmp_path / "x.gz").write_bytes(packed[:-12])
    fails(tables.main, [*argv, "--interactions", tmp_path / "x.gz"], "x.gz", "ended before")
