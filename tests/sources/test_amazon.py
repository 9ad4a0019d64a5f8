"""Amazon reviews of three releases: by hand, broken lines, nothing leaks, downloads that fail."""

import gzip
import itertools
import json
import os
import random
import socket
import struct
import tarfile
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import safetensors.torch

import sae
import saerec
from conftest import TOPICS
from sources import amazon, lsa
from sources.common import hash_order, index_interactions


def write(path, lines):
    """Write lines (dicts become JSON) as a text file, gzipped if its name says so."""
    content = b""
    for line in lines:
        if not isinstance(line, str):
            line = json.dumps(line)
        content += line.encode() + b"\n"
    if path.suffix == ".gz":
        content = gzip.compress(content)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    return path


def review(user, item, when, text="", **more):
    """A review as of 2014 and 2018."""
    row = {"reviewerID": user, "asin": item, "unixReviewTime": when, "reviewText": text}
    return row | more


def review_2023(user, item, when, text="", title=""):
    ids = {"user_id": user, "parent_asin": item, "asin": "variant of " + item}
    return ids | {"timestamp": when, "text": text, "title": title}


def command(reviews, out, options="--text reviews --core 0"):
    return ["--reviews", str(reviews), "--out", str(out), *options.split()]


def prepare(tmp_path, *options, reviews=(), meta=(), suffix=""):
    """Run the script on these lines -> the lines of sequences.txt and the rows of texts.jsonl."""
    argv = ["--reviews", write(tmp_path / f"reviews.json{suffix}", reviews)]
    if meta:
        argv += ["--meta", write(tmp_path / f"meta.json{suffix}", meta)]
    argv += ["--out", tmp_path / "out", *options]
    assert amazon.main([str(word) for word in argv]) == 0
    return outcome(tmp_path / "out")


def outcome(out):
    texts = (out / "texts.jsonl").read_text().splitlines()
    sequences = (out / "sequences.txt").read_text().splitlines()
    return sequences, [json.loads(line) for line in texts]


# Each release, worked by hand


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_release_of_2014(tmp_path, suffix):
    shiny = dict(summary="Five Stars", helpful=[0, 0], overall=5.0, reviewTime="01 1, 1970")
    reviews = [
        review("ann", "B1", 50, "Shiny.", **shiny),
        review("bob", "B1", 10, "Dries my hair", summary="Dry"),
        review("ann", "B2", 20, "Smells of roses."),
        review("ann", "B3", 30, ""),
        review("bob", "B2", 40),
    ]
    meta = [  # Python literals: single quotes, None, a quote within quotes
        "{'asin': 'B1', 'title': \"Ann's Shampoo\", 'brand': 'Suds', 'price': 3.5,"
        " 'salesRank': {'Beauty': 7}, 'imUrl': None,"
        " 'categories': [['Beauty', 'Hair Care'], ['Beauty', 'Gifts']],"
        " 'description': 'Washes &amp;quot;hair&amp;quot;.<br />Gently.'}",
        "{'asin': 'B2', 'categories': [['Beauty']]}",
        "{'asin': 'B3', 'title': 'Never &amp; Ever!', 'brand': 'Suds'}",
        "{'asin': 'B9', 'title': 'Not sold here'}",
    ]
    title = "Ann's Shampoo"
    about = title + '. Suds. Beauty, Hair Care, Gifts. Washes "hair". Gently.'
    items = [
        {"item": "B1", "title": title, "text": about},
        {"item": "B2", "text": "Beauty"},
        {"item": "B3", "title": "Never & Ever!", "text": "Never & Ever! Suds"},
    ]
    written = [
        {"item": "B1", "user": "ann", "title": title, "text": "Five Stars. Shiny."},
        {"item": "B1", "user": "bob", "title": title, "text": "Dry. Dries my hair"},
        {"item": "B2", "user": "ann", "text": "Smells of roses."},
    ]

    def texts(*options, meta=meta):
        return prepare(tmp_path, "--core", 0, *options, reviews=reviews, meta=meta, suffix=suffix)

    assert texts() == (["ann B2 B3 B1", "bob B1 B2"], items)
    assert texts("--text", "both")[1] == items + written
    assert texts("--text", "reviews")[1] == written
    for row in written:
        row.pop("title", None)
    assert texts("--text", "reviews", meta=())[1] == written


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_release_of_2018(tmp_path, suffix):
    fits = dict(summary="Fits. Looks ...", vote="3", style={"Size:": " L"})
    reviews = [
        review("ann", "B1", 1393372800, "Fits.\n\nLooks good", **fits),
        review("ann", "B2", 1058227200, "Tore", summary="Bad"),
        review("ann", "B3", 1401580800, "No headline, a <b>bold</b> &#34;word&#34;."),
        # Some have no text at all
        {"reviewerID": "bob", "asin": "B1", "unixReviewTime": 1, "overall": 5.0},
    ]
    boots = {
        "asin": "B1",
        "title": "Boots",
        "brand": "Walker",
        "category": ["Shoes", "Boots", "</span></span>"],
        "description": ["Warm.", "", "<p>Dry</p>"],
        "feature": ["not used"],
        "also_buy": ["B2"],
        "rank": ">#1",
    }
    script = {
        "asin": "B2",
        "title": "var aPageStart = (new Date()).getTime();",
        "brand": "",
        "category": [],
        "description": [],
        "feature": ["Soft"],
    }
    meta = [boots, script, {"asin": "B1", "title": "A second line of the same item"}]
    options = ["--text", "both", "--core", 1]
    sequences, texts = prepare(tmp_path, *options, reviews=reviews, meta=meta, suffix=suffix)
    assert sequences == ["ann B2 B1 B3", "bob B1"]
    assert texts == [
        {"item": "B1", "title": "Boots", "text": "Boots. Walker. Shoes, Boots. Warm. Dry"},
        {"item": "B2", "text": "Soft"},
        # This headline was made of the text
        {"item": "B1", "user": "ann", "title": "Boots", "text": "Fits. Looks good"},
        {"item": "B2", "user": "ann", "text": "Bad. Tore"},
        {"item": "B3", "user": "ann", "text": 'No headline, a bold "word".'},
    ]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_release_of_2023(tmp_path, suffix):
    reviews = [
        review_2023("ann", "B1", 1588687728923, "Works.<br />Really", "Great"),
        review_2023("ann", "B2", 1588687728922, "", "Only a headline"),
        review_2023("ann", "B3", 1588687728924, "Meh"),
    ]
    lamp = {
        "parent_asin": "B1",
        "title": "Lamp",
        "store": "Lumen",
        "categories": ["Home", "Light"],
        "description": ["Bright."],
        "features": ["LED"],
    }
    bulb = {
        "parent_asin": "B2",
        "title": "Bulb",
        "store": None,
        "categories": [],
        "description": [],
        "features": ["E27", "Warm white"],
        "price": None,
    }
    half = {"parent_asin": "B3", "title": "Half a pair: \ud83d", "main_category": "Home"}
    options = ["--text", "both", "--core", 0]
    meta = [lamp, bulb, half]
    sequences, texts = prepare(tmp_path, *options, reviews=reviews, meta=meta, suffix=suffix)
    assert sequences == ["ann B2 B1 B3"]
    assert texts == [
        {"item": "B1", "title": "Lamp", "text": "Lamp. Lumen. Home, Light. Bright."},
        {"item": "B2", "title": "Bulb", "text": "Bulb. E27 Warm white"},
        {"item": "B3", "title": "Half a pair:", "text": "Half a pair:"},
        {"item": "B1", "user": "ann", "title": "Lamp", "text": "Great. Works. Really"},
        {"item": "B2", "user": "ann", "title": "Bulb", "text": "Only a headline"},
        {"item": "B3", "user": "ann", "title": "Half a pair:", "text": "Meh"},
    ]


@pytest.mark.parametrize("word", [None, float("nan"), 7, "NULL", " n/a", "nan", ""])
def test_what_says_nothing_is_no_text(tmp_path, word):
    reviews = [review("ann", f"B{i}", i, word, summary=word) for i in range(3)]
    reviews[0]["reviewText"] = "Shiny"
    meta = [{"asin": "B1", "title": word, "brand": word, "description": [word, "Soft", word]}]
    options = ["--text", "both", "--core", 0]
    _, texts = prepare(tmp_path, *options, reviews=reviews, meta=meta)
    assert texts == [
        {"item": "B1", "text": "Soft"},
        {"item": "B0", "user": "ann", "text": "Shiny"},
    ]


@pytest.mark.parametrize("nothing", ["", " ", ".", ["", "<br>"], [["-"]], "null"])
def test_a_field_that_says_nothing_hides_no_other(nothing):
    record = {"title": "Lamp", "brand": nothing, "store": "Lumen", "description": nothing}
    record |= {"categories": nothing, "category": ["Home"], "features": nothing, "feature": "LED"}
    assert amazon.describe_item(record) == ("Lamp", "Lamp. Lumen. Home. LED")


# Duplicates, ties, cores


def test_the_first_of_a_pair_stays_and_ties_are_ordered_by_a_hash(tmp_path, capsys):
    reviews = [
        review("ann", "B1", 9, "later"),
        review("ann", "B3", 5, "x"),
        review("ann", "B2", 5, "x"),
        review("ann", "B1", 2, "earlier"),
        review("ann", "B4", 5, "first of two at once"),
        review("ann", "B4", 5, "second of two at once"),
        review("ann", "B5", 7, "x"),
        review("ann", "B6", 8, "x"),
    ]
    tied = sorted(["B2", "B3", "B4"], key=lambda item: hash_order("ann", item))
    for rows in (reviews, reviews[3:] + reviews[:3]):
        sequences, texts = prepare(tmp_path, "--text", "reviews", "--core", 0, reviews=rows)
        assert sequences == ["ann B1 " + " ".join(tied) + " B5 B6"]
        said = {row["item"]: row["text"] for row in texts}
        assert said["B1"] == "earlier" and said["B4"] == "first of two at once"
        assert "40.0% of neighbouring interactions" in capsys.readouterr().out  # 2 of 5


def test_core_by_hand():
    """Item 2 has one interaction, without it user 1 has one, and the rest is a 2-core."""
    user = np.array([0, 0, 1, 1, 2, 2])
    item = np.array([0, 1, 1, 2, 0, 1])
    assert amazon.k_core(user, item, 2).tolist() == [0, 1, 4, 5]
    assert amazon.k_core(user, item, 1).tolist() == amazon.k_core(user, item, 0).tolist()
    assert amazon.k_core(user, item, 3).tolist() == []


@pytest.mark.parametrize("core", range(2, 7))
def test_core_against_brute_force(core):
    draw = np.random.default_rng(core)
    user = draw.integers(0, 30, 250)
    item = draw.integers(0, 40, 250)
    left = list(zip(user.tolist(), item.tolist(), range(250)))
    while True:
        users = Counter(user for user, _, _ in left)
        items = Counter(item for _, item, _ in left)
        fewer = [row for row in left if users[row[0]] >= core and items[row[1]] >= core]
        if len(fewer) == len(left):
            break
        left = fewer
    assert amazon.k_core(user, item, core).tolist() == [at for _, _, at in left]


def test_core_of_a_whole_file(tmp_path, capsys, fails):
    """Repeats don't count towards a core; peeling it twice, as a published 5-core, is no change."""
    draw = random.Random(0)
    reviews = []
    for _ in range(300):
        user = f"u{draw.randrange(20)}"
        reviews.append(review(user, f"B{draw.randrange(25)}", draw.randrange(1000), "text"))
    sequences, _ = prepare(tmp_path, "--text", "reviews", reviews=reviews)
    pairs = {(row["reviewerID"], row["asin"]) for row in reviews}
    assert f"{len(pairs)} of them without those that repeat" in capsys.readouterr().out
    items = Counter(item for line in sequences for item in line.split()[1:])
    assert min(items.values()) >= 5
    assert min(len(line.split()) - 1 for line in sequences) >= 5

    kept = {(user, item) for user, *rest in map(str.split, sequences) for item in rest}
    published = [row for row in reviews if (row["reviewerID"], row["asin"]) in kept]
    assert prepare(tmp_path, "--text", "reviews", reviews=published)[0] == sequences

    before = (tmp_path / "out" / "sequences.txt").read_bytes()
    argv = command(tmp_path / "reviews.json", tmp_path / "out", "--text reviews --core 50")
    fails(amazon.main, argv, "50 interactions", "lower --core")
    assert (tmp_path / "out" / "sequences.txt").read_bytes() == before


# Sentences


def test_sentences(tmp_path):
    text = (
        'My wife loves reading it. "It is so good!" She said so. '
        "Costs 9.99 dollars a year, e.g. for gifts. Too short.\n"
        "no capital after the stop. so this goes on\n"
        "New line is a new one<br>and so is a break\n"
        "My wife LOVES reading it. Was it 2.5 stars? 5 stars from me."
    )
    reviews = [
        review("ann", "B1", 1, text, summary="A headline of five words"),
        review("ann", "B2", 2, "My wife loves reading it."),
        review("bob", "B1", 1, "MY WIFE loves reading it. A headline of five words"),
    ]
    for user, item in itertools.product(["ann", "bob"], ["B3", "B4"]):
        reviews.append(review(user, item, 3))
    options = ["--text", "reviews", "--sentences", "--core", 0]
    _, texts = prepare(tmp_path, *options, reviews=reviews)
    assert [row["text"] for row in texts if row["item"] == "B1"] == [
        "A headline of five words",
        "My wife LOVES reading it.",
        '"It is so good!"',
        "Costs 9.99 dollars a year, e.g. for gifts.",
        "no capital after the stop. so this goes on",
        "New line is a new one",
        "and so is a break",
        "Was it 2.5 stars?",
        "5 stars from me.",
    ]
    # Repeats count within an item only
    assert {"item": "B2", "user": "ann", "text": "My wife loves reading it."} in texts


def test_a_held_out_sentence_does_not_push_out_the_same_one_of_another_user(tmp_path):
    """It comes first in the file, but never reaches the corpus: the training one must stay."""
    same = "All of us say the same."
    reviews = [review("ann", f"B{step}", step, same) for step in (3, 2, 1)]
    reviews += [review("bob", f"B{step}", step, same) for step in (3, 4, 5)]
    prepare(tmp_path, "--text", "reviews", "--sentences", "--core", 0, reviews=reviews)
    data = saerec.load_dataset(tmp_path / "out")
    assert data.texts == [same, same]  # ann on B1, bob on B3, which is held out for ann
    assert [data.items[item] for item in data.text_item] == ["B1", "B3"]


def test_a_held_out_sentence_does_not_push_out_that_of_a_user_who_holds_nothing_out(tmp_path):
    """Users of fewer than 3 items are left out, but their texts are in the corpus."""
    same = "All of us say the same."
    reviews = [review("ann", f"B{step}", step, same) for step in (3, 2, 1)]
    reviews += [review("bob", "B3", 3, same), review("bob", "B4", 4)]
    prepare(tmp_path, "--text", "reviews", "--sentences", "--core", 0, reviews=reviews)
    data = saerec.load_dataset(tmp_path / "out")
    assert [data.items[item] for item in data.text_item] == ["B1", "B3"]


def test_use_of_lines():
    """A user's last two are held out if there are three; line 3 is of no use."""
    rows = [("ann", "a", 1, 1), ("ann", "b", 2, 2), ("bob", "a", 3, 4), ("bob", "b", 2, 5)]
    log = index_interactions([*rows, ("bob", "c", 1, 6)])
    use = [amazon.UNUSED, amazon.TRAINING, amazon.TRAINING, amazon.UNUSED]
    assert amazon.use_of_lines(log) == bytes(use + [amazon.HELD_OUT] * 2 + [amazon.TRAINING])


@pytest.mark.parametrize(
    "text, sentences",
    [
        (
            "Отличный товар, рекомендую всем. Ещё раз куплю! «Да», сказала моя жена.",
            ["Отличный товар, рекомендую всем.", "Ещё раз куплю!", "«Да», сказала моя жена."],
        ),
        ("Это т.е. очень хорошо, см. фото.", ["Это т.е. очень хорошо, см. фото."]),
        ("Żona była zła. Ślicznie!", ["Żona była zła.", "Ślicznie!"]),
        ("这个产品非常好用。我会再买的！！真的？", ["这个产品非常好用。", "我会再买的！！", "真的？"]),
        ("他说：“很好用。”我也这样想。 很好", ["他说：“很好用。”", "我也这样想。", "很好"]),
        ("とても良い。また買います。", ["とても良い。", "また買います。"]),
        ("정말 좋아요. 또 살게요.", ["정말 좋아요.", "또 살게요."]),
        ("Fine 。", ["Fine 。"]),
    ],
)
def test_sentences_outside_latin_script(text, sentences):
    assert amazon.cut_sentences([text]) == sentences


def test_words_of_scripts_without_spaces_count(tmp_path, capsys):
    """Each ideograph is one; how many sentences were too short is said."""
    reviews = [review("ann", f"B{i}", i, "这个产品非常好用。很好。Fine.") for i in range(3)]
    reviews += [review("bob", "B3", 1, "Too short. Much too short.")]
    _, texts = prepare(tmp_path, *"--text reviews --sentences --core 0".split(), reviews=reviews)
    assert [row["text"] for row in texts] == ["这个产品非常好用。"] * 3
    assert "reviews.json: 8 sentence(s) of under 4 words left out" in capsys.readouterr().out


# Broken lines and files


GOOD = [review("ann", f"B{i}", i, "text") for i in range(200)]
BROKEN = {
    '{"reviewerID": "ann", "asin": "B1"': "not a JSON object",
    "[1, 2]": "a JSON array: an object a line is wanted",
    "5": "not a JSON object",
    "{'asin': __import__('os')}": "nor a Python dict",
    '{"asin": "B1", "unixReviewTime": 5}': "user None",
    '{"reviewerID": "ann", "unixReviewTime": 5}': "item None",
    '{"reviewerID": "ann", "asin": "B1"}': "time None",
    '{"reviewerID": "ann b", "asin": "B1", "unixReviewTime": 5}': "user 'ann b'",
    '{"reviewerID": "", "asin": "B1", "unixReviewTime": 5}': "user ''",
    '{"reviewerID": 7, "asin": "B1", "unixReviewTime": 5}': "user 7",
    '{"reviewerID": "ann", "asin": "B1", "unixReviewTime": "soon"}': "soon",
    '{"reviewerID": "ann", "asin": "B1", "unixReviewTime": NaN}': "nan",
    '{"reviewerID": "ann", "asin": "B1", "unixReviewTime": 1e999}': "inf",
    '{"reviewerID": "null", "asin": "B1", "unixReviewTime": 5}': "id 'null' is a missing value",
    '{"reviewerID": "ann", "asin": "9.78E+12", "unixReviewTime": 5}': "spreadsheet",
    '{"a":' * 100_000: "not a JSON object",
}


@pytest.mark.parametrize("line", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_line_is_said_and_left_out(tmp_path, capsys, line):
    reviews = [*GOOD[:150], line, *GOOD[150:]]
    sequences, _ = prepare(tmp_path, "--text", "reviews", "--core", 0, reviews=reviews)
    assert sequences == ["ann " + " ".join(f"B{i}" for i in range(200))]
    out = capsys.readouterr().out
    assert "reviews.json: 1 of 201 lines broken, line 151 (" in out
    assert BROKEN[line] in out and "left out" in out


def test_wrong_bytes_in_a_line_cost_that_line(tmp_path, capsys):
    path = write(tmp_path / "reviews.json", GOOD)
    path.write_bytes(path.read_bytes().replace(b'"B7"', b'"B\xe9"'))
    assert amazon.main(command(path, tmp_path / "out")) == 0
    said = "1 of 200 lines broken, line 8 (not a JSON object in UTF-8"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("broken, total", [(2, 200), (1, 4)])
def test_one_in_a_hundred_may_be_broken(tmp_path, capsys, broken, total):
    lines = GOOD[: total - broken] + ["not json"] * broken
    path = write(tmp_path / "reviews.json", lines)
    assert amazon.main(command(path, tmp_path / "out")) == 0
    assert f"{broken} of {total} lines broken" in capsys.readouterr().out


@pytest.mark.parametrize("broken, total", [(3, 200), (2, 5), (1, 1), (1, 2), (5, 5)])
def test_more_than_one_in_a_hundred_is_an_error(tmp_path, fails, broken, total):
    lines = GOOD[: total - broken] + ["not json"] * broken
    argv = command(write(tmp_path / "reviews.json", lines), tmp_path / "out")
    first = f"line {total - broken + 1} (not a JSON object"
    where = f"reviews.json: {broken} of {total} lines broken, {first}"
    error = fails(amazon.main, argv, where, "right file")
    assert error.count("(not a JSON") == min(broken, 3)
    assert not (tmp_path / "out").exists()


def test_blank_lines_are_not_broken(tmp_path, capsys):
    rows = itertools.chain.from_iterable((row, "", " \r") for row in GOOD)
    _, texts = prepare(tmp_path, "--text", "reviews", "--core", 0, reviews=rows)
    assert len(texts) == 200 and "broken" not in capsys.readouterr().out


def test_other_ways_to_write_a_python_dict(tmp_path):
    meta = ["{u'asin': u'B1', u'title': u'Soap'}", " {'asin': 'B2', 'title': 'Towel'}"]
    meta.append('{"asin": "B3", \'title\': None, "brand": "Suds"}')
    _, texts = prepare(tmp_path, "--core", 0, reviews=GOOD, meta=meta)
    assert [row["text"] for row in texts] == ["Soap", "Towel", "Suds"]


def test_a_json_array(tmp_path, fails):
    for lines in ([json.dumps(GOOD)], ["["] + [json.dumps(row) + "," for row in GOOD]):
        argv = command(write(tmp_path / "reviews.json", lines), tmp_path / "out")
        fails(amazon.main, argv, "line 1 (a JSON array: an object a line is wanted)")


def test_broken_metadata(tmp_path, capsys, fails):
    meta = [f"{{'asin': 'B{i}', 'title': 'Thing {i}'}}" for i in range(200)]
    one_broken = [*meta[:50], "{'asin': open('x')}", *meta[51:]]
    _, texts = prepare(tmp_path, "--core", 0, reviews=GOOD, meta=one_broken)
    assert "meta.json: 1 of 200 lines broken, line 51 (" in capsys.readouterr().out
    assert len(texts) == 199
    argv = command(tmp_path / "reviews.json", tmp_path / "new", "--core 0")
    argv += ["--meta", tmp_path / "meta.json"]
    write(tmp_path / "meta.json", ["{'asin': "] * 5 + meta)
    fails(amazon.main, argv, "meta.json", "5 of 205 lines broken")
    write(tmp_path / "meta.json", [{"asin": "other", "title": "x"}, {"no": "id"}])
    examples = "meta.json: 'None', reviews.json: 'B0'"
    fails(amazon.main, argv, "meta.json has none of the items", examples, "category and release")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("rows", [GOOD, [review_2023("ann", f"B{i}", i) for i in range(3)]])
def test_reviews_in_place_of_metadata(tmp_path, fails, rows):
    """Their headlines would be titles of items."""
    path = write(tmp_path / "reviews.json", rows)
    argv = [*command(path, tmp_path / "out"), "--meta", path]
    fails(amazon.main, argv, "reviews.json line 1 is a review", "metadata as --meta")


def test_files_are_judged_by_their_content(tmp_path):
    """Plain lines in a file named .gz, gzipped ones in .json, with a spreadsheet's first mark."""
    rows = [json.dumps(row) for row in GOOD]
    plain = write(tmp_path / "plain", ["\ufeff" + rows[0], *rows[1:]]).read_bytes()
    (tmp_path / "reviews.gz").write_bytes(plain)
    (tmp_path / "reviews.json").write_bytes(gzip.compress(plain))
    for name in ("reviews.gz", "reviews.json"):
        assert amazon.main(command(tmp_path / name, tmp_path / name[-2:])) == 0
        sequences, _ = outcome(tmp_path / name[-2:])
        assert sequences == ["ann " + " ".join(f"B{i}" for i in range(200))]


def test_releases_in_one_file(tmp_path, fails):
    """Those before 2023 have seconds, that has milliseconds: their order would be wrong."""
    rows = [review("ann", "B1", 1588687728), review_2023("ann", "B2", 1588687728923)]
    argv = command(write(tmp_path / "reviews.json", rows), tmp_path / "out")
    fails(amazon.main, argv, "reviews.json: times of two kinds", "line 1 has", "line 2 has")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("when", ['"1.40E+09"', "1.40E+09", "1.4e+09"])
def test_rounded_times(tmp_path, fails, when):
    """A spreadsheet's short form, text or number: nearly all would tie."""
    lines = [json.dumps(review("ann", f"B{i}", "?")).replace('"?"', when) for i in range(3)]
    argv = command(write(tmp_path / "reviews.json", lines), tmp_path / "out")
    fails(amazon.main, argv, "reviews.json line 1: time", "rounded by a spreadsheet")


def test_long_numbers_are_not_rounded(tmp_path, capsys):
    """1500000000000000000.0 is written otherwise by Python, like a number that was rounded."""
    lines = [json.dumps(review("ann", f"B{i}", "?", "text")) for i in range(3)]
    lines = [line.replace('"?"', f"15000000{i}0000000000.0") for i, line in enumerate(lines)]
    sequences, _ = prepare(tmp_path, "--text", "reviews", "--core", 0, reviews=lines)
    assert sequences == ["ann B0 B1 B2"]
    assert "to 2017-07-14, read as nanoseconds" in capsys.readouterr().out


def test_dates_among_numbers(tmp_path, fails):
    rows = [review("ann", "B1", "2020-05-05"), review("ann", "B2", 1588687728)]
    argv = command(write(tmp_path / "reviews.json", rows), tmp_path / "out")
    words = ["line 1 has 2020-05-05 (a date)", "line 2 has 1588687728 (seconds)"]
    fails(amazon.main, argv, "reviews.json: times of two kinds", *words)


def test_the_span_of_times_is_said(tmp_path, capsys):
    reviews = [review_2023("ann", f"B{i}", 1588687728923 + i * 10**10, "text") for i in range(3)]
    prepare(tmp_path, "--text", "reviews", "--core", 0, reviews=reviews)
    said = "reviews.json: times from 2020-05-05 to 2020-12-23, read as milliseconds"
    assert said in capsys.readouterr().out


def test_broken_files(tmp_path, fails):
    out = tmp_path / "out"
    path = tmp_path / "reviews.json.gz"
    argv = command(path, out)
    fails(amazon.main, argv, "No such file", path)
    there = command(write(tmp_path / "r", GOOD), out)
    fails(amazon.main, [*there, "--meta", tmp_path / "none"], "No such file", "none")
    packed = write(path, GOOD).read_bytes()
    path.write_bytes(packed[: len(packed) // 2])
    fails(amazon.main, argv, path, "truncated after line")
    path.write_bytes(b"not gzip")  # then it is plain text
    fails(amazon.main, argv, path, "1 of 1 lines broken, line 1 (not a JSON object")
    path.write_bytes(gzip.compress(b""))
    fails(amazon.main, argv, f"{path} has no line: copy or download it again")
    assert not out.exists()
    write(path, GOOD[:2])
    fails(amazon.main, argv, "no user with 3 items")
    write(path, [review("ann", f"B{i}", i) for i in range(5)])
    fails(amazon.main, argv, "no text to learn intents from")


@pytest.mark.parametrize("option", ["--reviews", "--meta"])
def test_a_tar_archive(tmp_path, fails, option):
    """Unzipped it is plain, and but for its first and last line may be read."""
    path = write(tmp_path / "reviews.json", GOOD)
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(path, "reviews.json")
    argv = [*command(path, tmp_path / "out"), option, tmp_path / "x.tar.gz"]
    fails(amazon.main, argv, "x.tar.gz is a tar archive: unpack it")


@pytest.mark.parametrize("option", ["--reviews", "--meta"])
def test_a_pipe(tmp_path, fails, option):
    """The second reading would find nothing in it."""
    argv = command(write(tmp_path / "reviews.json", GOOD), tmp_path / "out")
    os.mkfifo(tmp_path / "pipe")
    fails(amazon.main, [*argv, option, tmp_path / "pipe"], "pipe is no plain file", "read twice")


def test_what_cannot_be_is_refused_before_the_long_read(tmp_path, fails):
    """Lines that are all broken are not met yet."""
    argv = command(write(tmp_path / "reviews.json", ["broken"]), tmp_path / "out")
    (tmp_path / "packed").write_bytes(b"BZh")
    fails(amazon.main, [*argv, "--meta", tmp_path / "packed"], "packed is a", "unpack it")
    fails(amazon.main, [*argv, "--out", tmp_path / "packed"], "File exists", "packed", "correct it")


OTHER = review("ann", "B99", 9, "text")


@pytest.mark.parametrize("change", [GOOD[:9], GOOD[:9] + ["broken"], GOOD[:9] + [OTHER]])
def test_reviews_that_change_between_two_readings(tmp_path, change):
    path = write(tmp_path / "reviews.json", GOOD[:10])
    log = amazon.read_log(path)
    about = amazon.read_about(None, log, path)
    write(path, change)
    with pytest.raises(saerec.UserError, match="has changed since its first reading"):
        list(amazon.review_rows(path, log, about, False))


BEAUTY = ["--category", "Beauty"]


@pytest.mark.parametrize(
    "options, words",
    [
        ([], ["--reviews FILE --meta FILE", "--category Beauty --release 2014"]),
        (["--reviews", "x"], ["--text item needs --meta", "--text reviews"]),
        (
            ["--reviews", "x", "--meta", "y", "--sentences"],
            ["--sentences", "--text item", "--text reviews"],
        ),
        (
            ["--reviews", "x", "--meta", "y", "--release", "2014"],
            ["--release goes with --category"],
        ),
        (["--reviews", "x", *BEAUTY, "--release", "2014"], ["give the one or the others"]),
        (BEAUTY, ["--release is ''", "2014, 2018, 2023"]),
        ([*BEAUTY, "--release", "2020"], ["'2020'", "2014, 2018, 2023"]),
        (
            [*BEAUTY, "--release", "2018"],
            ["'Beauty' is not in release 2018", "All_Beauty", "Luxury_Beauty"],
        ),
        (
            ["--category", "qqq", "--release", "2014"],
            ["'qqq'", "Amazon_Instant_Video", "Video_Games"],
        ),
        (["--text", "both of them"], ["item, reviews, both"]),
        (["--core", "-1"], ["--core is -1", "at least 0"]),
        (["--coer", "5"], ["did you mean --core"]),
    ],
)
def test_bad_options(fails, options, words):
    fails(amazon.main, options, *words)


# Nothing held out leaks


def planted_reviews(word):
    """24 users with 8 reviews each, on 3 topics; the last two items' reviews hold word(user, step).

    word: a function of user and step -> str.
    """
    topics = list(TOPICS.values())
    for user, step in itertools.product(range(24), range(8)):
        item = (user + 3 * step * (1 + user % 4) + step // 4) % 30
        words = topics[item % 3].split()
        first = words[step % 4]
        second = words[(user + step) % 4]
        said = f"The {first} beside the {second}, said reader number {user}."
        held_out = step >= 6
        begin = word(user, step) if held_out else "It was"
        text = f"{said} {begin} what we had all wanted."
        yield review(f"u{user}", f"B{item}", 1000 * user + step, text, summary=said)


SMALL_SAE = "--latents 16 --active 3 --steps 30 --batch 16 --min-items 2 --held-out 0.2"


def word_of_its_own(user, step):
    return f"Zqxj{user}k{step}"


def word_of_everybody(user, step):
    return "It was"


@pytest.mark.parametrize("sentences", [[], ["--sentences"]])
def test_held_out_reviews_reach_no_artifact(tmp_path, sentences, capsys):
    def run(name, word):
        folder = tmp_path / name
        reviews = write(folder / "reviews.json", planted_reviews(word))
        assert amazon.main([*command(reviews, folder / "data"), *sentences]) == 0
        common = ["--run", str(folder / "run"), "--device", "cpu"]
        assert lsa.main(["--data", str(folder / "data"), "--width", "8", *common]) == 0
        assert sae.main([*SMALL_SAE.split(), *common]) == 0
        return folder / "run"

    made = run("one", word_of_its_own)
    texts = (tmp_path / "one" / "data" / "texts.jsonl").read_text()
    assert "zqxj" in texts.lower()  # it was planted, with its user
    assert "written in held-out interactions left out" in capsys.readouterr().out
    files = {path.name: path.read_bytes().lower() for path in made.iterdir()}
    names = ("embeddings.safetensors", "sae.safetensors", "intents.safetensors", "intents.jsonl")
    assert set(names) <= set(files)
    assert not [name for name, content in files.items() if b"zqxj" in content]
    labels = files["intents.jsonl"].decode()  # what was not held out is there
    assert any(word in labels for word in ("guitar", "rocket", "oven"))

    # Whatever the held-out reviews say, even what others say too, all artifacts come out the same
    other = run("other", word_of_everybody)
    assert (other / "intents.jsonl").read_bytes() == (made / "intents.jsonl").read_bytes()
    for name in names[:3]:
        a = safetensors.torch.load_file(made / name)
        b = safetensors.torch.load_file(other / name)
        assert all((a[key] == b[key]).all() for key in a), name


# Download, from a server that fails in every way


BODY = gzip.compress(random.Random(0).randbytes(300_000) + b"\n")


class Flaky(BaseHTTPRequestHandler):
    """Answers a request as the next word of `script` says, then properly; `asked` keeps them."""

    def do_GET(self):
        server = self.server
        how = server.script.pop(0) if server.script else "ok"
        name = self.path.rsplit("/", 1)[-1]
        start = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        server.asked.append((name, start))
        body = server.files.get(name, BODY)
        if how.isdigit():
            return self.send_error(int(how))
        if how == "html":
            body = b"<html>Please fill in this form</html>"
            start = 0
        if start and start >= len(body):
            return self.send_error(416)
        if how == "ignore":
            start = 0
        status = 206 if start else 200
        self.send_response(status)
        if not how.startswith("unsaid"):
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.send_body(body[start:], how)

    def send_body(self, body, how):
        if how in ("reset", "short", "stall", "unsaid short"):
            body = body[: len(body) // 2]
        if how != "empty":
            self.wfile.write(body)
        if how == "stall":
            self.server.released.wait(5)
        if how == "reset":
            self.server.released.wait(0.1)
            at_once = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
            self.connection.close()

    def log_message(self, *_):
        pass


class FlakyServer(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Flaky)
        self.script = []
        self.asked = []
        self.files = {}
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/"

    def handle_error(self, *_):
        """A reset connection is what was wanted."""


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(amazon, "HERE", tmp_path)
    server = FlakyServer()
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def fetch(server, path, script, tries=5):
    server.script[:] = script
    return amazon.download(server.url + "x.json.gz", path, tries, wait=0.001, timeout=0.3)


@pytest.mark.parametrize(
    "script, tries",
    [
        ([], 1),
        (["500", "503", "429"], 4),
        (["reset", "reset"], 3),
        (["short", "short"], 3),
        (["stall"], 2),
        (["short", "ignore"], 2),
        (["unsaid"], 1),
        (["empty"], 2),
        (["short", "416"], 3),  # what is here is no beginning of what is there: from the start
    ],
)
def test_download_gets_there_in_the_end(server, tmp_path, capsys, script, tries):
    path = tmp_path / "new" / "x.json.gz"
    assert fetch(server, path, script) == path
    assert path.read_bytes() == BODY
    assert [p.name for p in path.parent.iterdir()] == ["x.json.gz"]
    starts = [start for _, start in server.asked]
    assert len(starts) == tries
    assert capsys.readouterr().out.count("trying again in") == tries - 1
    if script and script[0] in ("reset", "short", "stall"):
        assert 0 < starts[1] < len(BODY)  # it goes on where the last one stopped
    if script == ["short", "416"]:
        assert starts[2] == 0
    assert fetch(server, path, ["404"]) == path  # there already: nothing is asked
    assert len(server.asked) == tries


@pytest.mark.parametrize(
    "script, words, asked",
    [
        (["404"], ["HTTP Error 404"], 1),
        (["403"], ["HTTP Error 403"], 1),
        (["500"] * 9, ["HTTP Error 500"], 3),
        (["reset"] * 9, ["reset", "go on"], 3),
        (["short"] * 9, ["the connection ended after", f"of {len(BODY):,} bytes"], 3),
        (["stall"] * 9, ["timed out"], 3),
        (["empty"] * 9, ["the connection ended after 0"], 3),
        (["html"], ["Not a gzipped file"], 1),
        (["unsaid short"], ["Compressed file ended"], 1),
    ],
)
def test_download_that_fails(server, tmp_path, script, words, asked):
    path = tmp_path / "x.json.gz"
    with pytest.raises(saerec.UserError) as error:
        fetch(server, path, script, tries=3)
    for word in [server.url + "x.json.gz", "run again", str(path), "--reviews", *words]:
        assert word in str(error.value)
    assert not path.exists() and len(server.asked) == asked
    kept = sum(part.stat().st_size for part in tmp_path.glob("*.part.gz"))
    if script[0] in ("reset", "short", "stall"):
        assert 0 < kept < len(BODY)
    else:
        assert kept == 0
    assert fetch(server, path, []).read_bytes() == BODY  # and the next run mends it
    assert server.asked[-1][1] == kept


def test_a_damaged_beginning_is_not_kept(server, tmp_path):
    (tmp_path / "x.json.part.gz").write_bytes(b"an older version" * 100)
    with pytest.raises(saerec.UserError, match="Not a gzipped file"):
        fetch(server, tmp_path / "x.json.gz", [])
    assert not list(tmp_path.iterdir())


def test_a_part_that_is_whole_is_kept(server, tmp_path, monkeypatch):
    """Who stopped it while it was checked need not download it again."""
    path = tmp_path / "x.json.gz"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(amazon, "check_whole", interrupt)
        fetch(server, path, [])
    assert (tmp_path / "x.json.part.gz").read_bytes() == BODY
    assert fetch(server, path, []).read_bytes() == BODY
    assert [start for _, start in server.asked] == [0, len(BODY)]


def interrupt(path):
    raise KeyboardInterrupt


def test_no_server(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, but nobody listens
        url = f"http://127.0.0.1:{free.getsockname()[1]}/x.json.gz"
        with pytest.raises(saerec.UserError, match="refused"):
            amazon.download(url, tmp_path / "x.json.gz", tries=2, wait=0.001)


def test_a_category(server, tmp_path, monkeypatch, fails):
    """The published 5-core is asked for if it will do, else all; a second run asks for nothing."""
    monkeypatch.chdir(tmp_path)
    for name, release in amazon.RELEASES.items():
        monkeypatch.setitem(amazon.RELEASES, name, release._replace(address=server.url))
    pairs = itertools.product(range(6), range(6))
    rows = [review(f"u{user}", f"B{item}", user + item, "good") for user, item in pairs]
    packed = write(tmp_path / "packed.gz", rows).read_bytes()
    for name in ("reviews_Beauty_5.json.gz", "reviews_Beauty.json.gz", "All_Beauty.jsonl.gz"):
        server.files[name] = packed
    meta = gzip.compress(b"{'asin': 'B1', 'title': 'Soap'}\n")
    server.files |= {"meta_Beauty.json.gz": meta, "meta_All_Beauty.jsonl.gz": meta}

    argv = [*BEAUTY, "--release", "2014"]
    assert amazon.main(argv) == amazon.main(argv) == 0
    sequences, texts = outcome(tmp_path / "data" / "beauty")
    assert len(sequences) == 6
    assert texts == [{"item": "B1", "title": "Soap", "text": "Soap"}]
    assert amazon.main([*argv, "--core", "2"]) == 0
    argv = ["--category", "All_Beauty", "--release", "2023", "--out", "elsewhere"]
    assert amazon.main(argv) == 0
    names = ["reviews_Beauty_5.json.gz", "meta_Beauty.json.gz", "reviews_Beauty.json.gz"]
    names += ["All_Beauty.jsonl.gz", "meta_All_Beauty.jsonl.gz"]
    assert [name for name, _ in server.asked] == names
    assert outcome(tmp_path / "elsewhere")[0] == sequences
    server.script[:] = ["404"]
    argv = ["--category", "Books", "--release", "2018"]
    (tmp_path / "file").touch()
    fails(amazon.main, [*argv, "--out", "file"], "File exists", "'file'")  # nothing is asked
    fails(amazon.main, argv, "Books_5.json.gz", "404", "--reviews")


@pytest.mark.parametrize("release, count", [("2014", 24), ("2018", 29), ("2023", 34)])
def test_table_of_categories(release, count):
    categories = amazon.RELEASES[release].categories
    assert len(categories) == len(set(categories)) == count
    assert {"Books", "Video_Games"} <= set(categories)
