"""Tables of one's own: by hand, other ways to write them, and tables that are damaged."""

import gzip
import json
import os
import random
import re
import tarfile

import pytest

import saerec
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
    sequences = (tmp_path / "out" / "sequences.txt").read_text().split("\n")[:-1]
    texts = (tmp_path / "out" / "texts.jsonl").read_text().split("\n")[:-1]
    return sequences, [json.loads(line) for line in texts]


def refused(tmp_path, fails, interactions, items, *words, options=()):
    """Run the script on two tables -> its error, which holds the words; nothing is written."""
    error = fails(tables.main, write_tables(tmp_path, interactions, items, *options), *words)
    assert not list(tmp_path.glob("out/*"))
    return error


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_tables_by_hand(tmp_path, capsys, suffix):
    sequences, texts = outcome(tmp_path, LOG, ITEMS, suffix=suffix)
    assert sequences == ["ann i1 i2 i3 i1", "bob i1"]  # repeats stay: this may be a log of plays
    assert texts == [
        {"item": "i1", "title": "Soap", "text": "Soap. Clean, fresh"},
        {"item": "i2", "title": 'A "big" towel', "text": 'A "big" towel'},
        {"item": "i3", "title": "Brush & Co.", "text": "Brush & Co. Hard hair"},
    ]
    said = capsys.readouterr().out
    assert f"items.csv{suffix}: 1 line(s) of items without interactions left out" in said
    assert f"items.csv{suffix}: 0 of 3 items with interactions have no line" in said


def test_items_without_a_line(tmp_path, capsys):
    outcome(tmp_path, LOG, ITEMS.replace("i2,", "i7,"))
    said = capsys.readouterr().out
    assert "2 line(s) of items without" in said
    assert "1 of 3 items with interactions have no line" in said


def test_one_table_of_reviews(tmp_path):
    """What its users wrote of what is held out stays out, and titles are no reviewer's headline."""
    reviews = "user,item,time,title,words\n"
    for user in ("ann", "bob", "eve"):
        for time, item in enumerate(("i1", "i2", "i3", "i4")):
            reviews += f"{user},{item},{time},Great {item},says {user}\n"
    _, texts = outcome(tmp_path, reviews, reviews, "--text-columns", "title,words")
    assert texts[0] == {"item": "i1", "text": "Great i1. says ann", "user": "ann"}
    data = saerec.load_dataset(tmp_path / "out")
    assert data.texts[:3] == ["Great i1. says ann", "Great i2. says ann", "Great i1. says bob"]
    assert len(data.texts) == 6
    assert data.titles[1:] == ["item i1", "item i2", "item i3", "item i4"]
    assert "6 text(s) written in held-out interactions left out" in data.notes


REVIEWS = LOG.replace("time", "time,title").replace("0\n", "0,Good\n").replace("5\n", "5,Good\n")


def test_which_way_the_items_are_read_is_said(tmp_path, capsys):
    options = ("--text-columns", "title")
    _, texts = outcome(tmp_path, LOG, ITEMS, *options)
    said = capsys.readouterr().out
    assert "items.csv has no column 'user': every line is taken for a description\n" in said
    assert "is who wrote" not in said and "user" not in texts[0]
    _, texts = outcome(tmp_path, LOG, REVIEWS, *options)
    said = capsys.readouterr().out
    assert "items.csv has column 'user': every line is taken for what that user wrote" in said
    assert texts[0]["user"] == "ann"


NAMES = ["user_id", "userId", "reviewer", "reviewerID", "author", "User Name", "author.steamid"]
NAMES += ["review_profilename", "reviewed_by", "verfasser", "critic_2"]


@pytest.mark.parametrize("name", NAMES)
def test_a_column_that_may_be_of_authors(tmp_path, capsys, name):
    """It is read as before, with a hint: a book has an author too."""
    reviews = REVIEWS.replace("user", name).replace("ann", "Ann A.").replace("bob", "Bob B.")
    _, texts = outcome(tmp_path, LOG, reviews, "--text-columns", "title")
    said = capsys.readouterr().out
    assert f"if {name!r} is who wrote a line, call it 'user'" in said
    assert "user" not in texts[0]


@pytest.mark.parametrize("name", ["authors", "user_score", "metacritic", "members", "directed_by"])
def test_a_column_that_only_looks_like_authors(tmp_path, capsys, name):
    items = ITEMS.replace("description", name)
    outcome(tmp_path, LOG, items, "--text-columns", "title")
    assert "is who wrote" not in capsys.readouterr().out


@pytest.mark.parametrize("users, after, hinted", [(501, "zoe", True), (500, "ann", False)])
def test_a_column_of_users_by_its_cells(tmp_path, capsys, users, after, hinted):
    """Over half of the first 1,000 that are filled, whatever comes after; zoe is no user."""
    cells = [""] * 1000 + ["zoe"] * (1000 - users) + ["ann"] * users + [after] * 600
    items = "item,by,title\n" + "".join(f"i1,{cell},Soap\n" for cell in cells)
    outcome(tmp_path, LOG, items, "--text-columns", "title")
    assert ("if 'by' is who wrote a line, call it" in capsys.readouterr().out) is hinted


def test_items_with_the_ids_of_users_are_no_authors(tmp_path, capsys):
    """Both may be numbered from 1."""
    log = "user,item,time\n1,1,5\n1,2,6\n1,3,7\n2,1,5\n3,1,5\n"
    outcome(tmp_path, log, "item,title\n1,Soap\n2,Towel\n3,Brush\n", "--text-columns", "title")
    assert "is who wrote" not in capsys.readouterr().out


def test_a_column_of_users_but_for_case(tmp_path, fails):
    words = ["items.csv has column 'User' in place of 'user'", "alike in both"]
    options = ("--text-columns", "title")
    refused(tmp_path, fails, LOG, REVIEWS.replace("user", "User"), *words, options=options)


@pytest.mark.parametrize("time", ["1.70407E+12", "1,7E+09", "2E+10", "1.70407e+12"])
def test_rounded_times(tmp_path, fails, time):
    """A spreadsheet's short form: their order would mostly be that of a hash."""
    log = LOG.replace("user,item,time", "user;item;time").replace(",", ";").replace("30", time)
    words = ["interactions.csv line 2", repr(time), "export times as text"]
    refused(tmp_path, fails, log, ITEMS, *words)


@pytest.mark.parametrize("time", ["1E3", "1.704067200000000000e+18", "1e3"])
def test_times_that_only_look_rounded(tmp_path, time):
    log = "".join(f"{user},i{item},{time}\n" for user in ("ann", "bob") for item in (1, 2, 3))
    sequences, _ = outcome(tmp_path, "user,item,time\n" + log, ITEMS)
    assert len(sequences) == 2


SPREADSHEET = [
    ("user,item", "\ufeffuser,item"),
    ("item,title", "\ufeffitem,title"),
    ("\n", "\r\n"),
]
# Tables parted by tabs have no quotes
TABS = [('"Clean, fresh"', "Clean, fresh"), ('"A ""big"" towel"', 'A "big" towel')]
TABS += [(", fresh", "; fresh"), (",", "\t")]
OTHER_NAMES = [("user", "who"), ("item,", "what,"), ("time", "when"), ("title", "name")]
OTHER_COLUMNS = (
    "--user-column who --item-column what --time-column when --text-columns name,description"
)


@pytest.mark.parametrize(
    "changes, options",
    [
        ([(",", ";"), ("Clean;", "Clean,")], ""),
        (TABS, ""),
        (TABS, r"--delimiter \t"),
        ([(",", "|")], ""),
        ([(",", "^")], "--delimiter ^"),
        (SPREADSHEET, ""),
        ([("\n", "\n\n")], ""),
        ([("\n", "\n,,\n")], ""),  # empty rows of a spreadsheet
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


def test_what_parts_cells_is_not_looked_for_within_quotes(tmp_path):
    log = LOG.replace("time", '"seconds, since, 1970, UTC"').replace("user,item,", "user;item;")
    log = re.sub(r"(?m)^(\w+),(\w+),(\d+)$", r"\1;\2;\3", log)
    sequences, _ = outcome(tmp_path, log, ITEMS, "--time-column", "seconds, since, 1970, UTC")
    assert sequences[0] == "ann i1 i2 i3 i1"


def test_lone_quotes_in_a_table_parted_by_tabs(tmp_path):
    """Inches open no cell: each item keeps its text."""
    items = 'item\ttitle\tdescription\ni1\t"Big\t5" wide\ni2\t12"\t"\ni3\tBrush\tx, y\n'
    _, texts = outcome(tmp_path, LOG, items)
    assert [row["text"] for row in texts] == ['"Big. 5" wide', '12". "', "Brush. x, y"]


def test_quotes_around_a_whole_cell_of_a_table_parted_by_tabs(tmp_path):
    """As pandas and Excel write them: only cells that need it are quoted, and all of the names."""
    log = LOG.replace(",", "\t").replace("i3", '"i3"')
    items = '"item"\t"title"\t"description"\n'
    items += 'i1\t"A ""big"" towel"\t5" wide\n"i3"\t""\t"a" and "b"\n'
    sequences, texts = outcome(tmp_path, log, items)
    assert sequences[0] == "ann i1 i2 i3 i1"
    assert texts == [
        {"item": "i1", "title": 'A "big" towel', "text": 'A "big" towel. 5" wide'},
        {"item": "i3", "text": '"a" and "b"'},
    ]


def test_a_lone_column_of_texts_is_no_title(tmp_path):
    """An item is shown by the first 70 characters of its text then."""
    long = "It is hard to say in few words what this brush can do for you, and for your hair."
    items = ITEMS.replace("<b>Hard</b> hair", f'"{long}"')
    _, texts = outcome(tmp_path, LOG, items, "--text-columns", "description")
    assert texts[-1] == {"item": "i3", "text": long}
    assert saerec.load_dataset(tmp_path / "out").titles[3] == long[:70]


def test_a_cell_may_be_long(tmp_path):
    long = "word " * 28_600  # above the limit of Python's csv, 131,072 characters
    _, texts = outcome(tmp_path, LOG, ITEMS.replace("Hard", long))
    assert len(long) == 143_000 and len(texts[2]["text"]) > 142_000


def test_lines_end_at_line_feeds_alone(tmp_path):
    """Other characters at which str.splitlines() cuts are white space within a cell."""
    odd = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"
    items = ITEMS.replace("Clean, fresh", f"Clean,{odd}fresh").replace("Hard", f"Ha{odd}rd")
    _, texts = outcome(tmp_path, LOG, items)
    assert [row["text"] for row in texts] == [
        "Soap. Clean, fresh",
        'A "big" towel',
        "Brush & Co. Ha rd hair",
    ]


def test_line_breaks_within_quotes(tmp_path):
    _, texts = outcome(tmp_path, LOG, ITEMS.replace("Clean, fresh", "Clean\nand\r\nfresh"))
    assert texts[0]["text"] == "Soap. Clean and fresh"


@pytest.mark.parametrize("word", ["", "NA", "N/A", "nan", "NULL", "null", "None", "<NA>"])
def test_missing_texts(tmp_path, word):
    items = f"item,title,description\ni1,{word},Clean\ni2,Towel,{word}\ni3,{word},{word}\n"
    _, texts = outcome(tmp_path, LOG, items)
    assert texts == [
        {"item": "i1", "text": "Clean"},
        {"item": "i2", "title": "Towel", "text": "Towel"},
    ]


@pytest.mark.parametrize(
    "times, order",
    [
        (["2024-05-31", "2023-01-01", "2024-05-30", "2024-06-01"], "1 2 0 3"),
        (["2024-05-31T00:00:00.5", "2023-01-01T09:00", "2024-05-30 23:59:59"], "1 2 0"),
        (["2024-05-31T00:00+00:00", "2024-05-31T01:00+02:00", "2024-05-31T01:00Z"], "1 0 2"),
        (["1e3", "-5", "12.5", "0"], "1 3 2 0"),
    ],
)
def test_times(tmp_path, times, order):
    log = "user,item,time\n" + "".join(f"u,{n},{when}\n" for n, when in enumerate(times))
    items = "item,title,description\n" + "".join(f"{n},t{n},\n" for n in range(len(times)))
    assert outcome(tmp_path, log, items)[0] == ["u " + order]


def test_the_span_of_times_is_said(tmp_path, capsys):
    outcome(tmp_path, LOG, ITEMS)
    said = capsys.readouterr().out
    assert "interactions.csv: times from 1970-01-01 to 1970-01-01, read as seconds" in said


def test_times_that_begin_with_the_day(tmp_path, fails):
    """As all times that cannot be, they are refused before anything is written."""
    log = "user,item,time\nann,i1,31052024\nann,i2,01062024\nann,i3,02072023\n"
    refused(tmp_path, fails, log, ITEMS, "interactions.csv", "begin with the day", "2024-05-31")


def test_lines_in_order_need_no_times(tmp_path, capsys):
    log = "user,item,time\nu,i1,x\nu,i3,y\nu,i1,\nu,i2,z\n"
    assert outcome(tmp_path, log, ITEMS, "--time-column", "")[0] == ["u i1 i3 i1 i2"]
    said = capsys.readouterr().out
    assert "same time" not in said and "times from" not in said


def test_order_of_lines_is_no_signal(tmp_path, capsys):
    """Shuffling a log with times of whole days changes no byte; the share of ties is said."""
    draw = random.Random(0)
    head = "user,item,time\n"
    lines = []
    for user in range(20):
        for item in draw.sample(range(9), 5):
            lines.append(f"u{user},i{item},2024-05-{draw.randint(10, 13)}\n")
    items = "item,title\n" + "".join(f"i{item},Thing {item}\n" for item in range(9))
    options = ("--text-columns", "title")
    by_item = head + "".join(sorted(lines, key=lambda line: line.split(",")[1]))
    outcome(tmp_path, by_item, items, *options)
    written = (tmp_path / "out" / "sequences.txt").read_bytes()
    assert "have the same time" in capsys.readouterr().out
    for _ in range(3):
        draw.shuffle(lines)
        outcome(tmp_path, head + "".join(lines), items, *options)
        assert (tmp_path / "out" / "sequences.txt").read_bytes() == written


# Tables that are damaged: one sentence, nothing written


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
        (LOG, ITEMS, '--delimiter "', ["""--delimiter is '"'""", "one character"]),
        (LOG, ITEMS, "--text-columns title,", ["--text-columns holds an empty name", "items.csv"]),
        (LOG, ITEMS.replace("title", ""), "--text-columns ,", ["--text-columns holds an empty"]),
        (LOG, ITEMS, "--item-column=", ["--item-column holds an empty name", "interactions.csv"]),
        (
            LOG.replace("time", "timestamp"),
            ITEMS,
            "",
            ["no column 'time'", "--time-column, perhaps 'timestamp'", '--time-column "" if'],
        ),
        (LOG, ITEMS.replace("tion", ""), "", ["--text-columns, perhaps 'descrip'"]),
        ("sep=;\n" + LOG.replace(",", ";"), ITEMS, "", ["'sep='", "Excel", "remove it"]),
        (
            LOG.replace(",time", ",user"),
            ITEMS,
            "--time-column item",
            ["interactions.csv has several columns 'user'", "rename"],
        ),
        (
            LOG,
            ITEMS.replace("description", "title"),
            "--text-columns title",
            ["items.csv has several columns 'title'", "rename"],
        ),
        ("", ITEMS, "", ["interactions.csv is empty", "column names"]),
        ("\n" + LOG, ITEMS, "", ["interactions.csv is empty, or its first line is"]),
        (LOG, "", "", ["items.csv is empty"]),
        ("user,item,time\n\n,,\n", ITEMS, "", ["interactions.csv has a line of column names"]),
        (LOG, "item,title,description", "", ["items.csv has a line of column names and no other"]),
    ],
)
def test_wrong_columns(tmp_path, fails, interactions, items, options, words):
    refused(tmp_path, fails, interactions, items, *words, options=options.split())


@pytest.mark.parametrize("first", ["196\t242\t881250949", "ann,i1,2024-05-31", "ann;B1;5.0"])
def test_no_line_of_column_names(tmp_path, fails, first):
    words = ["interactions.csv has no column 'user'", "looks like data", "add a line"]
    refused(tmp_path, fails, f"{first}\n{first}\n", ITEMS, *words)


@pytest.mark.parametrize(
    "line, words",
    [
        ("ann,i1", ["2 cell(s), the first line has 3", "complete the line"]),
        ("ann,i1,5,6", ["4 cell(s), the first line has 3", "quote cells that hold ','"]),
        ("ann,i1,soon", ["'soon' is no", "2024-05-31"]),
        ("ann,i1,31.05.2024", ["'31.05.2024' is no", "like 2024-05-31 or 2024-", "write it so"]),
        ("ann,i1,", ["'' is no", "2024-05-31"]),
        ("ann,i1,nan", ["'nan' is no"]),
        ("ann,i1,-inf", ["'-inf' is no finite"]),
        ("ann,i1,1e999", ["'1e999' is no finite"]),
        ("ann b,i1,5", ["id 'ann b'", "white space"]),
        ("ann,i\u20281,5", [r"id 'i\u20281'", "white space"]),
        ("\x1cann,i1,5", [r"id '\x1cann'", "white space"]),
        ("ann,i1\x85,5", [r"id 'i1\x85'", "white space"]),
        ("ann,,5", ["id ''", "missing value", "remove the line"]),
        ("Null,i1,5", ["id 'Null'", "missing value", "remove the line"]),
        ("ann,9.78E+12,5", ["id '9.78E+12'", "spreadsheet"]),
        ("user,item,time", ["column names once more", "remove the line"]),
        ("ann,i1,5\rann,i2,5", ["carriage return", "Unix or Windows"]),
    ],
)
def test_wrong_lines(tmp_path, fails, line, words):
    refused(tmp_path, fails, f"{LOG}{line}\n", ITEMS, "interactions.csv line 7: ", *words)


def test_bytes_that_are_no_utf8(tmp_path, fails):
    log = LOG.encode() + b"caf\xe9,i1,5\n"
    refused(tmp_path, fails, log, ITEMS, "interactions.csv line 7", "UTF-8")


@pytest.mark.parametrize("odd", ["NA", "9.78E+12", "i 4"])
def test_wrong_ids_of_items(tmp_path, fails, odd):
    refused(tmp_path, fails, LOG, f"{ITEMS}{odd},x,y\n", "items.csv line 6: ")


def test_column_names_once_more(tmp_path, fails):
    """They are meant where a whole line is theirs: an id may be the name of a column."""
    items = ITEMS + "item,title,x\n"
    log = LOG + "user,item,50\n"
    sequences, texts = outcome(tmp_path, log, items)
    assert sequences[1:] == ["bob i1", "user item"]
    assert texts[3] == {"item": "item", "title": "title", "text": "title. x"}
    items = ITEMS + "item , title,description\n"
    fails(tables.main, write_tables(tmp_path, log, items), "items.csv line 6: column names once")


@pytest.mark.parametrize("rows", [1, 100_000])
def test_a_quote_that_is_never_closed(tmp_path, fails, rows):
    """It would swallow all that follows, up to the next quote; the line is that of the quote."""
    items = ITEMS + 'i4,"never closed,x\n' + "i5,y,z\n" * rows
    words = ["items.csv line 6: ", "a line break and ','", "close it", "by spaces"]
    refused(tmp_path, fails, LOG, items, *words)
    refused(tmp_path, fails, LOG, items + 'i6,inches 5",z\n', *words)
    refused(tmp_path, fails, LOG.replace("time", '"time'), ITEMS, "interactions.csv line 1: a cell")


@pytest.mark.parametrize("line", ['i4,x,"never', 'i4,x,"never\n', 'i4,x,"never\nclosed'])
def test_a_quote_that_the_last_line_does_not_close(tmp_path, fails, line):
    refused(tmp_path, fails, LOG, ITEMS + line, "items.csv line 6: a quote is never closed")
    _, texts = outcome(tmp_path, LOG, ITEMS + line.replace("i4", "i1") + '"')  # now it is
    assert len(texts) == 4


def test_line_breaks_and_tabs_in_a_table_parted_by_tabs(tmp_path, fails):
    items = 'item\ttitle\ni1\t"Soap\nand water"\n'
    words = ["items.csv line 3: 1 cell(s), the first line has 2", "line breaks within cells"]
    refused(tmp_path, fails, LOG, items, *words, options=("--text-columns", "title"))
    items = "item\ttitle\ni1\tSoap\tand water\n"
    words = ["items.csv line 2: 3 cell(s), the first line has 2", "tabs within cells by spaces"]
    refused(tmp_path, fails, LOG, items, *words, options=("--text-columns", "title"))


@pytest.mark.parametrize("table", ["interactions", "items"])
def test_line_ends_of_old_macs(tmp_path, fails, table):
    contents = {"interactions": LOG, "items": ITEMS}
    contents[table] = contents[table].replace("\n", "\r")
    words = [f"{table}.csv line 1: ", "old Macs", "line ends of Unix"]
    refused(tmp_path, fails, *contents.values(), *words)


def test_times_of_two_kinds(tmp_path, fails):
    log = "user,item,time\nann,i1,2020-05-05\nann,i1,1588687728\n"
    words = ["interactions.csv", "line 2 has 2020-05-05", "line 3 has 1588687728", "alike"]
    refused(tmp_path, fails, log, ITEMS, *words)


@pytest.mark.parametrize(
    "in_log, in_items",
    [("1", "1.0"), ("0108775015", "108775015"), ("b1", "B1"), ("1", "#1")],
)
def test_tables_that_do_not_fit_together(tmp_path, fails, in_log, in_items):
    log = f"user,item,time\nann,{in_log},1\nann,2,2\n"
    items = f"item,title,description\n{in_items},Soap,x\n3,Towel,y\n"
    error = refused(tmp_path, fails, log, items, "none of the ids in", "alike in both")
    assert f"interactions.csv: {in_log!r}, " in error and f"items.csv: {in_items!r})" in error


def test_tables_with_too_little(tmp_path, fails):
    refused(tmp_path, fails, "user,item,time\nann,i1,1\n", ITEMS, "no user with 3 items")
    items = "item,title,description\ni1,NA,\n"
    refused(tmp_path, fails, LOG, items, "no text to learn intents from")


def test_tables_that_are_not_there(tmp_path, fails):
    argv = write_tables(tmp_path, LOG, ITEMS)
    fails(tables.main, argv[:4], "--interactions FILE and --items FILE")
    fails(tables.main, [*argv, "--items", tmp_path / "none"], "No such file", "none")
    fails(tables.main, [*argv, "--interactions", tmp_path / "nothing"], "No such file", "nothing")
    packed = gzip.compress(LOG.encode())
    (tmp_path / "x.gz").write_bytes(packed[:-12])
    fails(tables.main, [*argv, "--interactions", tmp_path / "x.gz"], "x.gz", "ended before")


def test_items_from_a_pipe(tmp_path, fails):
    """Its column names are looked at first, and then nothing would be left."""
    argv = write_tables(tmp_path, LOG, ITEMS)
    os.mkfifo(tmp_path / "pipe")
    fails(tables.main, [*argv, "--items", tmp_path / "pipe"], "pipe is no plain file")


def test_what_cannot_be_is_refused_before_the_long_read(tmp_path, fails):
    """The table of interactions, which is not there, is not asked for yet."""
    argv = write_tables(tmp_path, LOG, ITEMS, "--interactions", str(tmp_path / "none"))
    (tmp_path / "packed").write_bytes(b"BZh")
    fails(tables.main, [*argv, "--items", tmp_path / "packed"], "packed is a", "unpack it")
    fails(tables.main, [*argv, "--out", tmp_path / "packed"], "File exists", "packed", "correct it")
    fails(tables.main, [*argv, "--out", ""], "--out is empty")


@pytest.mark.parametrize("option", ["--interactions", "--items"])
def test_a_tar_archive(tmp_path, fails, option):
    """Unzipped it is plain, and its first line has the name of the file within."""
    argv = write_tables(tmp_path, LOG, ITEMS)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / f"{option[2:]}.csv", "x.csv")
    fails(tables.main, [*argv, option, tmp_path / "x.tar.gz"], "x.tar.gz is a tar", "unpack it")
