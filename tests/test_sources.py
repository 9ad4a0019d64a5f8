"""The sources of dataset folders: Amazon reviews of three generations, downloads that fail, tables of one's own."""

import gzip
import itertools
import json
import random
import socket
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import safetensors.torch

import saerec
from conftest import TOPICS, make_run


def write(path, lines):
    """Write lines (dicts become JSON) as a text file, gzipped if its name says so."""
    data = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines).encode()
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def review(user, item, when, text="", **more):
    return {"reviewerID": user, "asin": item, "unixReviewTime": when, "reviewText": text, **more}


def review_2023(user, item, when, text="", title=""):
    return {"user_id": user, "parent_asin": item, "asin": "variant of " + item, "timestamp": when, "text": text, "title": title}


def command(reviews, out, options="--text reviews --core 0"):
    return ["prepare", "amazon", "--reviews", str(reviews), "--out", str(out), *options.split()]


def prepare(tmp_path, *options, reviews=(), meta=(), suffix=""):
    """Run `prepare amazon` on these lines -> the lines of sequences.txt and the rows of texts.jsonl."""
    files = ["--reviews", write(tmp_path / f"reviews.json{suffix}", reviews)]
    files += ["--meta", write(tmp_path / f"meta.json{suffix}", meta)] if meta else []
    assert saerec.main([str(a) for a in ["prepare", "amazon", *files, "--out", tmp_path / "out", *options]]) == 0
    return outcome(tmp_path / "out")


def outcome(out):
    texts = (out / "texts.jsonl").read_text().splitlines()
    return (out / "sequences.txt").read_text().splitlines(), [json.loads(line) for line in texts]


# Each generation, worked by hand


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_release_of_2014(tmp_path, suffix):
    reviews = [
        review("ann", "B1", 50, "Shiny.", summary="Five Stars", helpful=[0, 0], overall=5.0, reviewTime="01 1, 1970"),
        review("bob", "B1", 10, "Dries my hair", summary="Dry"),
        review("ann", "B2", 20, "Smells of roses."),
        review("ann", "B3", 30, ""),
        review("bob", "B2", 40),
    ]
    meta = [  # Python literals: single quotes, None, a quote within quotes
        "{'asin': 'B1', 'title': \"Ann's Shampoo\", 'brand': 'Suds', 'price': 3.5, 'salesRank': {'Beauty': 7}, 'imUrl': None,"
        " 'categories': [['Beauty', 'Hair Care'], ['Beauty', 'Gifts']],"
        " 'description': 'Washes &amp;quot;hair&amp;quot;.<br />Gently.'}",
        "{'asin': 'B2', 'categories': [['Beauty']]}",
        "{'asin': 'B3', 'title': 'Never &amp; Ever!', 'brand': 'Suds'}",
        "{'asin': 'B9', 'title': 'Not sold here'}",
    ]
    sequences, texts = prepare(tmp_path, "--core", 0, reviews=reviews, meta=meta, suffix=suffix)
    assert sequences == ["ann B2 B3 B1", "bob B1 B2"]
    title = "Ann's Shampoo"
    items = [
        {"item": "B1", "title": title, "text": title + '. Suds. Beauty, Hair Care, Gifts. Washes "hair". Gently.'},
        {"item": "B2", "text": "Beauty"},
        {"item": "B3", "title": "Never & Ever!", "text": "Never & Ever! Suds"},
    ]
    assert texts == items
    written = [
        {"item": "B1", "user": "ann", "title": "Ann's Shampoo", "text": "Five Stars. Shiny."},
        {"item": "B1", "user": "bob", "title": "Ann's Shampoo", "text": "Dry. Dries my hair"},
        {"item": "B2", "user": "ann", "text": "Smells of roses."},
    ]
    assert prepare(tmp_path, "--core", 0, "--text", "both", reviews=reviews, meta=meta, suffix=suffix)[1] == items + written
    assert prepare(tmp_path, "--core", 0, "--text", "reviews", reviews=reviews, meta=meta, suffix=suffix)[1] == written
    for row in written:
        row.pop("title", None)
    assert prepare(tmp_path, "--core", 0, "--text", "reviews", reviews=reviews, suffix=suffix)[1] == written


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_release_of_2018(tmp_path, suffix):
    reviews = [
        review("ann", "B1", 1393372800, "Fits.\n\nLooks good", summary="Fits. Looks ...", vote="3", style={"Size:": " L"}),
        review("ann", "B2", 1058227200, "Tore", summary="Bad"),
        review("ann", "B3", 1401580800, "No headline, a <b>bold</b> &#34;word&#34;."),
        {"reviewerID": "bob", "asin": "B1", "unixReviewTime": 1, "overall": 5.0},  # some have no text at all
    ]
    meta = [
        {"asin": "B1", "title": "Boots", "brand": "Walker", "category": ["Shoes", "Boots", "</span></span>"],
         "description": ["Warm.", "", "<p>Dry</p>"], "feature": ["not used"], "also_buy": ["B2"], "rank": ">#1"},
        {"asin": "B2", "title": "var aPageStart = (new Date()).getTime();", "brand": "", "category": [], "description": [],
         "feature": ["Soft"]},
        {"asin": "B1", "title": "A second line of the same item"},
    ]  # fmt: skip
    sequences, texts = prepare(tmp_path, "--text", "both", "--core", 1, reviews=reviews, meta=meta, suffix=suffix)
    assert sequences == ["ann B2 B1 B3", "bob B1"]
    assert texts == [
        {"item": "B1", "title": "Boots", "text": "Boots. Walker. Shoes, Boots. Warm. Dry"},
        {"item": "B2", "text": "Soft"},
        {"item": "B1", "user": "ann", "title": "Boots", "text": "Fits. Looks good"},  # the headline was made of the text
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
    meta = [
        {"parent_asin": "B1", "title": "Lamp", "store": "Lumen", "categories": ["Home", "Light"], "description": ["Bright."],
         "features": ["LED"]},
        {"parent_asin": "B2", "title": "Bulb", "store": None, "categories": [], "description": [],
         "features": ["E27", "Warm white"], "price": None},
        {"parent_asin": "B3", "title": "Half a pair: \ud83d", "main_category": "Home"},
    ]  # fmt: skip
    sequences, texts = prepare(tmp_path, "--text", "both", "--core", 0, reviews=reviews, meta=meta, suffix=suffix)
    assert sequences == ["ann B2 B1 B3"]
    assert texts == [
        {"item": "B1", "title": "Lamp", "text": "Lamp. Lumen. Home, Light. Bright."},
        {"item": "B2", "title": "Bulb", "text": "Bulb. E27 Warm white"},
        {"item": "B3", "title": "Half a pair:", "text": "Half a pair:"},
        {"item": "B1", "user": "ann", "title": "Lamp", "text": "Great. Works. Really"},
        {"item": "B2", "user": "ann", "title": "Bulb", "text": "Only a headline"},
        {"item": "B3", "user": "ann", "title": "Half a pair:", "text": "Meh"},
    ]


# Duplicates, ties, cores


def test_the_first_of_a_pair_stays_and_ties_keep_the_order_of_the_file(tmp_path):
    reviews = [
        review("ann", "B1", 9, "later"), review("ann", "B3", 5, "x"), review("ann", "B2", 5, "x"),
        review("ann", "B1", 2, "earlier"),
        review("ann", "B4", 5, "first of two at once"), review("ann", "B4", 5, "second of two at once"),
    ]  # fmt: skip
    sequences, texts = prepare(tmp_path, "--text", "reviews", "--core", 0, reviews=reviews)
    assert sequences == ["ann B1 B3 B2 B4"]
    assert {row["item"]: row["text"] for row in texts} == {"B1": "earlier", "B2": "x", "B3": "x", "B4": "first of two at once"}


@pytest.mark.parametrize("seed", range(20))
def test_core_against_brute_force(seed):
    rng = np.random.default_rng(seed)
    user, item = rng.integers(0, 30, 250), rng.integers(0, 40, 250)
    core, left = 2 + seed % 5, list(zip(user.tolist(), item.tolist(), range(250)))
    while True:
        users, items = Counter(u for u, _, _ in left), Counter(i for _, i, _ in left)
        fewer = [row for row in left if users[row[0]] >= core and items[row[1]] >= core]
        if len(fewer) == len(left):
            break
        left = fewer
    assert saerec.k_core(user, item, core).tolist() == [at for _, _, at in left]


def test_core_of_a_whole_file(tmp_path, capsys, fails):
    """Repeats don't count towards a core; peeling it twice, as with a published 5-core, changes nothing."""
    rng = random.Random(0)
    reviews = [review(f"u{rng.randrange(20)}", f"B{rng.randrange(25)}", rng.randrange(1000), "text") for _ in range(300)]
    sequences, _ = prepare(tmp_path, "--text", "reviews", reviews=reviews)
    assert f"{len({(r['reviewerID'], r['asin']) for r in reviews})} of them without those that repeat" in capsys.readouterr().out
    items = Counter(item for line in sequences for item in line.split()[1:])
    assert min(items.values()) >= 5 and min(len(line.split()) - 1 for line in sequences) >= 5
    kept = {(user, item) for user, *rest in map(str.split, sequences) for item in rest}
    published = [row for row in reviews if (row["reviewerID"], row["asin"]) in kept]
    assert prepare(tmp_path, "--text", "reviews", reviews=published)[0] == sequences
    before = (tmp_path / "out" / "sequences.txt").read_bytes()
    argv = command(tmp_path / "reviews.json", tmp_path / "out", "--text reviews --core 50")
    fails(saerec.main, argv, "50 interactions", "lower --core")
    assert (tmp_path / "out" / "sequences.txt").read_bytes() == before


# Text


@pytest.mark.parametrize(
    "text, lines",
    [
        ("  plain \t text ", ["plain text"]),
        ("AT&amp;T says &amp;quot;hi&amp;quot;&nbsp;&#39;now&#39;", ["AT&T says \"hi\" 'now'"]),
        ("one<br />two<BR>three\n\nfour", ["one", "two", "three", "four"]),
        ("a <b>bold</b>, <a href='x'>link</a>ed <i>word</i>", ["a bold, linked word"]),
        ("<p>para</p><ul><li>x</li></ul><!-- no --> <script>var a = '<b>';</script>end", ["para", "x", "end"]),
        ("I <3 this, 2 < 3 and 5 > 4", ["I <3 this, 2 < 3 and 5 > 4"]),
        ("half a pair \ud83d here", ["half a pair here"]),
        ("", []),
    ],
)
def test_clean(text, lines):
    assert saerec.clean(text) == lines


def test_sentences(tmp_path):
    text = (
        'My wife loves reading it. "It is so good!" She said so. Costs 9.99 dollars a year, e.g. for gifts. Too short.\n'
        "no capital after the stop. so this goes on\nNew line is a new one<br>and so is a break\n"
        "My wife LOVES reading it. Was it 2.5 stars? 5 stars from me."
    )
    reviews = [review("ann", "B1", 1, text, summary="A headline of five words"),
               review("ann", "B2", 2, "My wife loves reading it."),
               review("bob", "B1", 1, "MY WIFE loves reading it. A headline of five words")]  # fmt: skip
    reviews += [review(user, item, 3) for user in ("ann", "bob") for item in ("B3", "B4")]
    _, texts = prepare(tmp_path, "--text", "reviews", "--sentences", "--core", 0, reviews=reviews)
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
    assert {"item": "B2", "user": "ann", "text": "My wife loves reading it."} in texts  # repeats count within an item only


# Broken lines and files


GOOD = [review("ann", f"B{i}", i, "text") for i in range(200)]
BROKEN = {
    '{"reviewerID": "ann", "asin": "B1"': "not a JSON object",
    "[1, 2]": "not a JSON object",
    "": "not a JSON object",
    "{'asin': __import__('os')}": "nor a Python dict",
    '{"asin": "B1", "unixReviewTime": 5}': "user None",
    '{"reviewerID": "ann", "unixReviewTime": 5}': "item None",
    '{"reviewerID": "ann", "asin": "B1"}': "time None",
    '{"reviewerID": "ann b", "asin": "B1", "unixReviewTime": 5}': "user 'ann b'",
    '{"reviewerID": "", "asin": "B1", "unixReviewTime": 5}': "user ''",
    '{"reviewerID": 7, "asin": "B1", "unixReviewTime": 5}': "user 7",
    '{"reviewerID": "ann", "asin": "B1", "unixReviewTime": "soon"}': "soon",
    '{"reviewerID": "ann", "asin": "B1", "unixReviewTime": NaN}': "nan",
    "[" * 100_000: "not a JSON object",
}


@pytest.mark.parametrize("line", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_line_is_said_and_left_out(tmp_path, capsys, line):
    sequences, _ = prepare(tmp_path, "--text", "reviews", "--core", 0, reviews=[*GOOD[:150], line, *GOOD[150:]])
    assert sequences == ["ann " + " ".join(f"B{i}" for i in range(200))]
    out = capsys.readouterr().out
    assert "reviews.json: 1 of 201 lines broken, line 151 (" in out and BROKEN[line] in out and "left out" in out


def test_wrong_bytes_in_a_line_cost_that_line(tmp_path, capsys):
    path = write(tmp_path / "reviews.json", GOOD)
    path.write_bytes(path.read_bytes().replace(b'"B7"', b'"B\xe9"'))
    assert saerec.main(command(path, tmp_path / "out")) == 0
    assert "1 of 200 lines broken, line 8 (not a JSON object in UTF-8" in capsys.readouterr().out


@pytest.mark.parametrize("broken, total, allowed", [(2, 200, 1), (3, 200, 0), (1, 4, 1), (2, 5, 0), (1, 1, 0), (5, 5, 0)])
def test_more_than_one_in_a_hundred_is_an_error(tmp_path, capsys, fails, broken, total, allowed):
    lines = GOOD[: total - broken] + ["not json"] * broken
    argv = command(write(tmp_path / "reviews.json", lines), tmp_path / "out")
    if allowed:
        assert saerec.main(argv) == 0
        assert f"{broken} of {total} lines broken" in capsys.readouterr().out
    else:
        where = f"reviews.json: {broken} of {total} lines broken, line {total - broken + 1} (not a JSON object"
        error = fails(saerec.main, argv, where, "right file")
        assert error.count("(not a JSON") == min(broken, 3) and not (tmp_path / "out").exists()


def test_broken_metadata(tmp_path, capsys, fails):
    meta = [f"{{'asin': 'B{i}', 'title': 'Thing {i}'}}" for i in range(200)]
    _, texts = prepare(tmp_path, "--core", 0, reviews=GOOD, meta=[*meta[:50], "{'asin': open('x')}", *meta[51:]])
    assert "meta.json: 1 of 200 lines broken, line 51 (" in capsys.readouterr().out and len(texts) == 199
    argv = [*command(tmp_path / "reviews.json", tmp_path / "new", "--core 0"), "--meta", tmp_path / "meta.json"]
    write(tmp_path / "meta.json", ["{'asin': "] * 5 + meta)
    fails(saerec.main, argv, "meta.json", "5 of 205 lines broken")
    write(tmp_path / "meta.json", [{"asin": "other", "title": "x"}, {"no": "id"}])
    fails(saerec.main, argv, "meta.json has none of the items", "same category and release")
    assert not (tmp_path / "new").exists()


def test_broken_files(tmp_path, fails):
    out, path = tmp_path / "out", tmp_path / "reviews.json.gz"
    argv = command(path, out)
    fails(saerec.main, argv, "No such file", path)
    fails(saerec.main, [*command(write(tmp_path / "r", GOOD), out), "--meta", tmp_path / "none"], "No such file", "none")
    packed = write(path, GOOD).read_bytes()
    path.write_bytes(packed[: len(packed) // 2])
    fails(saerec.main, argv, path, "truncated after line")
    path.write_bytes(b"not gzip")
    fails(saerec.main, argv, path, "corrupt", "Not a gzipped file")
    path.write_bytes(gzip.compress(b""))
    fails(saerec.main, argv, path, "0 of 0 lines", "right file")
    assert not out.exists()
    write(path, GOOD[:2])
    fails(saerec.main, argv, "no user with 3 or more items")
    write(path, [review("ann", f"B{i}", i) for i in range(5)])
    fails(saerec.main, argv, "no text to learn intents from")


@pytest.mark.parametrize(
    "options, words",
    [
        ([], ["--reviews FILE --meta FILE", "--category Beauty --release 2014"]),
        (["--reviews", "x"], ["--text item needs --meta", "--text reviews"]),
        (["--reviews", "x", "--meta", "y", "--sentences"], ["--sentences", "--text item", "--text reviews"]),
        (["--reviews", "x", "--meta", "y", "--release", "2014"], ["--release goes with --category"]),
        (["--reviews", "x", "--category", "Beauty", "--release", "2014"], ["give the one or the others"]),
        (["--category", "Beauty"], ["--release is ''", "2014, 2018, 2023"]),
        (["--category", "Beauty", "--release", "2020"], ["'2020'", "2014, 2018, 2023"]),
        (["--category", "Beauty", "--release", "2018"], ["'Beauty' is not in release 2018", "All_Beauty", "Luxury_Beauty"]),
        (["--category", "qqq", "--release", "2014"], ["'qqq'", "Amazon_Instant_Video", "Video_Games"]),
        (["--text", "both of them"], ["item, reviews, both"]),
        (["--core", "-1"], ["--core is -1", "at least 0"]),
        (["--coer", "5"], ["did you mean --core"]),
    ],
)
def test_bad_options(fails, options, words):
    fails(saerec.main, ["prepare", "amazon", *options], *words)


def test_unknown_sources(fails):
    for argv in (["prepare"], ["prepare", "amazn"], ["prepare", "--help"], ["prepair"]):
        fails(saerec.main, argv, argv[-1], "prepare ml-100k", "prepare amazon", "prepare csv", "check")


# Nothing held out leaks


def planted_reviews(word):
    """24 users with 8 reviews on 3 topics each; the reviews of their last two items hold a word of their own."""
    topics = list(TOPICS.values())
    for u, step in itertools.product(range(24), range(8)):
        item = (u + 3 * step * (1 + u % 4) + step // 4) % 30
        words = topics[item % 3].split()
        said = f"The {words[step % 4]} beside the {words[(u + step) % 4]}, said reader number {u}."
        held_out = step >= 6
        text = f"{said} {word(u, step) if held_out else 'It was'} what we had all wanted."
        yield review(f"u{u}", f"B{item}", 1000 * u + step, text, summary=said)


@pytest.mark.parametrize("sentences", [[], ["--sentences"]])
def test_held_out_reviews_reach_no_artifact(tmp_path, sentences, capsys):
    def run(name, word):
        out, where = tmp_path / name / "data", tmp_path / name / "run"
        assert saerec.main([*command(write(tmp_path / name / "reviews.json", planted_reviews(word)), out), *sentences]) == 0
        return out, make_run(out, where, stages="embed sae")

    data, made = run("one", lambda u, step: f"Zqxj{u}k{step}")
    assert "zqxj" in (data / "texts.jsonl").read_text().lower()  # it was planted, with its user
    assert "written in held-out interactions left out" in capsys.readouterr().out
    files = {path.name: path.read_bytes().lower() for path in made.iterdir()}
    assert {"embeddings.safetensors", "sae.safetensors", "intents.safetensors", "intents.jsonl"} <= set(files)
    assert not [name for name, content in files.items() if b"zqxj" in content]
    assert any(word in files["intents.jsonl"].decode() for word in ("guitar", "rocket", "oven"))  # what was not held out is there

    # Whatever the held-out reviews say, even what others say too, every artifact comes out the same
    _, other = run("other", lambda u, step: "It was")
    assert (other / "intents.jsonl").read_bytes() == (made / "intents.jsonl").read_bytes()
    for name in ("embeddings", "sae", "intents"):
        a, b = (safetensors.torch.load_file(folder / f"{name}.safetensors") for folder in (made, other))
        assert all((a[key] == b[key]).all() for key in a), name


# Download, from a server that fails in every way


BODY = gzip.compress(random.Random(0).randbytes(300_000) + b"\n")


class Flaky(BaseHTTPRequestHandler):
    """Answers each request as the next word of `script` says, then properly; `asked` keeps what was asked."""

    def do_GET(self):
        server = self.server
        how = server.script.pop(0) if server.script else "ok"
        name, start = self.path.rsplit("/", 1)[-1], int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
        server.asked.append((name, start))
        body = server.files.get(name, BODY)
        if how.isdigit():
            return self.send_error(int(how))
        if how == "html":
            body, start = b"<html>Please fill in this form</html>", 0
        if start and start >= len(body):
            return self.send_error(416)
        start = 0 if how == "ignore" else start
        half = len(body[start:]) // 2 if how in ("reset", "short", "stall", "unsaid short") else len(body)
        self.send_response(206 if start else 200)
        if not how.startswith("unsaid"):
            self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if how != "empty":
            self.wfile.write(body[start : start + half])
        if how == "stall":
            server.released.wait(5)
        if how == "reset":
            server.released.wait(0.1)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(saerec, "HERE", tmp_path)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Flaky)
    server.handle_error = lambda *_: None  # a reset connection is what was wanted
    server.script, server.asked, server.files, server.released = [], [], {}, threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/"
    threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


def fetch(server, path, script, **options):
    server.script[:] = script
    return saerec.download(server.url + "x.json.gz", path, **{"wait": 0.001, "timeout": 0.3} | options)


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
    assert path.read_bytes() == BODY and [p.name for p in path.parent.iterdir()] == ["x.json.gz"]
    starts = [start for _, start in server.asked]
    assert len(starts) == tries and capsys.readouterr().out.count("trying again in") == tries - 1
    if script and script[0] in ("reset", "short", "stall"):
        assert 0 < starts[1] < len(BODY)  # it goes on where the last one stopped
    if script == ["short", "416"]:
        assert starts[2] == 0
    assert fetch(server, path, ["404"]) == path and len(server.asked) == tries  # there already: nothing is asked


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
    kept = sum(p.stat().st_size for p in tmp_path.glob("*.part.gz"))
    assert 0 < kept < len(BODY) if script[0] in ("reset", "short", "stall") else not kept
    assert fetch(server, path, []).read_bytes() == BODY  # and the next run mends it
    assert server.asked[-1][1] == kept


def test_a_damaged_beginning_is_not_kept(server, tmp_path):
    (tmp_path / "x.json.part.gz").write_bytes(b"an older version" * 100)
    with pytest.raises(saerec.UserError, match="Not a gzipped file"):
        fetch(server, tmp_path / "x.json.gz", [])
    assert not list(tmp_path.iterdir())


def test_no_server(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # bound, but nobody listens
        with pytest.raises(saerec.UserError, match="refused"):
            saerec.download(f"http://127.0.0.1:{free.getsockname()[1]}/x.json.gz", tmp_path / "x.json.gz", tries=2, wait=0.001)


def test_prepare_a_category(server, tmp_path, monkeypatch, fails):
    """The published 5-core is asked for if it will do, all reviews if not; a second run asks for nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(saerec, "AMAZON", {release: (server.url, *more) for release, (_, *more) in saerec.AMAZON.items()})
    rows = [review(f"u{u}", f"B{i}", u + i, "good") for u in range(6) for i in range(6)]
    packed = gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode())
    server.files |= {"reviews_Beauty_5.json.gz": packed, "reviews_Beauty.json.gz": packed, "All_Beauty.jsonl.gz": packed}
    meta = gzip.compress(b"{'asin': 'B1', 'title': 'Soap'}\n")
    server.files |= {"meta_Beauty.json.gz": meta, "meta_All_Beauty.jsonl.gz": meta}
    argv = ["prepare", "amazon", "--category", "Beauty", "--release", "2014"]
    assert saerec.main(argv) == saerec.main(argv) == 0
    sequences, texts = outcome(tmp_path / "data" / "beauty")
    assert len(sequences) == 6 and texts == [{"item": "B1", "title": "Soap", "text": "Soap"}]
    assert saerec.main([*argv, "--core", "2"]) == 0
    assert saerec.main(["prepare", "amazon", "--category", "All_Beauty", "--release", "2023", "--out", "elsewhere"]) == 0
    names = ["reviews_Beauty_5.json.gz", "meta_Beauty.json.gz", "reviews_Beauty.json.gz"]
    names += ["All_Beauty.jsonl.gz", "meta_All_Beauty.jsonl.gz"]
    assert [name for name, _ in server.asked] == names and outcome(tmp_path / "elsewhere")[0] == sequences
    server.script[:] = ["404"]
    fails(saerec.main, ["prepare", "amazon", "--category", "Books", "--release", "2018"], "Books_5.json.gz", "404", "--reviews")


def test_table_of_categories():
    for release, count in (("2014", 24), ("2018", 29), ("2023", 34)):
        categories = saerec.AMAZON[release][-1].split()
        assert len(categories) == len(set(categories)) == count and {"Books", "Video_Games"} <= set(categories)


# Tables of one's own


def csv_argv(tmp_path, interactions, items, *options, suffix=""):
    paths = [tmp_path / f"{name}.csv{suffix}" for name in ("interactions", "items")]
    for path, content in zip(paths, (interactions, items)):
        content = content if isinstance(content, bytes) else content.encode()
        path.write_bytes(gzip.compress(content) if suffix else content)
    return ["prepare", "csv", "--interactions", str(paths[0]), "--items", str(paths[1]), "--out", str(tmp_path / "out"), *options]


LOG = "user,item,time\nann,i3,30\nann,i1,10\nbob,i1,5\nann,i2,20\nann,i1,40\n"
ITEMS = 'item,title,description\ni1,Soap,"Clean, fresh"\ni2,"A ""big"" towel",\ni3,Brush & Co.,<b>Hard</b> hair\ni9,Not sold,x\n'


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_csv_by_hand(tmp_path, capsys, suffix):
    assert saerec.main(csv_argv(tmp_path, LOG, ITEMS, suffix=suffix)) == 0
    sequences, texts = outcome(tmp_path / "out")
    assert sequences == ["ann i1 i2 i3 i1", "bob i1"]  # repeats stay: this may be a log of plays
    assert texts == [
        {"item": "i1", "title": "Soap", "text": "Soap. Clean, fresh"},
        {"item": "i2", "title": 'A "big" towel', "text": 'A "big" towel'},
        {"item": "i3", "title": "Brush & Co.", "text": "Brush & Co. Hard hair"},
    ]
    assert f"items.csv{suffix}: 1 line(s) of items without interactions left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, options",
    [
        (lambda t: t.replace(",", ";").replace("Clean;", "Clean,"), []),
        (lambda t: t.replace(",", "\t"), []),
        (lambda t: t.replace(",", "\t"), ["--delimiter", r"\t"]),
        (lambda t: t.replace(",", "|"), []),
        (lambda t: t.replace(",", "^"), ["--delimiter", "^"]),
        (lambda t: ("\ufeff" + t).replace("\n", "\r\n"), []),  # as a spreadsheet writes it
        (lambda t: t.rstrip("\n").replace("\n", "\n\n"), []),
        (lambda t: t.replace(",", ", "), []),
        (lambda t: t.replace("user", "who").replace("item,", "what,").replace("time", "when").replace("title", "name"),
         ["--user-column", "who", "--item-column", "what", "--time-column", "when", "--text-columns", "name,description"]),
    ],
)  # fmt: skip
def test_csv_variants(tmp_path, change, options):
    assert saerec.main(csv_argv(tmp_path, LOG, ITEMS)) == 0
    sequences, texts = outcome(tmp_path / "out")
    assert saerec.main(csv_argv(tmp_path, change(LOG), change(ITEMS), *options)) == 0
    again, also = outcome(tmp_path / "out")
    assert again == sequences and [row["title"] for row in also] == [row["title"] for row in texts] and len(also) == 3


def test_csv_times(tmp_path):
    def order(times, *options):
        log = "user,item,time\n" + "".join(f"u,i{n},{when}\n" for n, when in enumerate(times))
        items = "item,title,description\n" + "".join(f"i{n},t{n},\n" for n in range(4))
        assert saerec.main(csv_argv(tmp_path, log, items, *options)) == 0
        return outcome(tmp_path / "out")[0][0]

    assert order(["2024-05-31", "2023-01-01", "2024-05-30T23:59:59", "2024-05-31 00:00:01"]) == "u i1 i2 i0 i3"
    assert order(["2024-05-31T00:00+00:00", "2024-05-31T01:00+02:00", "2024-05-31T01:00Z", "2024-05-31T00:30"]) == "u i1 i0 i3 i2"
    assert order(["1e3", "-5", "12.5", "0"]) == "u i1 i3 i2 i0"
    assert order(["x", "y", "", "z"], "--time-column", "") == "u i0 i1 i2 i3"


@pytest.mark.parametrize(
    "interactions, items, options, words",
    [
        ("who,item,time\na,i1,1\n", ITEMS, [], ["interactions.csv has no column 'user'", "['who', 'item', 'time']"]),
        (LOG, "item,name\ni1,x\n", [], ["items.csv has no column 'title'", "['item', 'name']"]),
        (LOG, ITEMS, ["--time-column", "date"], ["no column 'date'"]),
        (LOG, ITEMS, ["--delimiter", ";"], ["no column 'user'", "['user,item,time']", "--delimiter"]),
        (LOG, ITEMS, ["--delimiter", "::"], ["--delimiter is '::'", "one character"]),
        (LOG + "ann,i1\n", ITEMS, [], ["interactions.csv line 7", "cell"]),
        (LOG + "ann,i1,5,6\n", ITEMS, [], ["interactions.csv line 7", "cell"]),
        (LOG, ITEMS + 'i4,"never closed,x\n' + "y\n" * 100_000, [], ["items.csv line", "field larger than field limit"]),
        (LOG + "ann,i1,soon\n", ITEMS, [], ["interactions.csv line 7", "'soon'", "2024-05-31"]),
        (LOG + "ann,i1,nan\n", ITEMS, [], ["interactions.csv line 7", "'nan'"]),
        (LOG + "ann b,i1,5\n", ITEMS, [], ["interactions.csv line 7", "'ann b'", "white space"]),
        (LOG + "ann,,5\n", ITEMS, [], ["interactions.csv line 7", "''", "empty"]),
        (LOG.encode() + b"caf\xe9,i1,5\n", ITEMS, [], ["interactions.csv line 7", "UTF-8"]),
        ("", ITEMS, [], ["interactions.csv has no column 'user'"]),
        ("user,item,time\n", ITEMS, [], ["no user with 3 or more items"]),
        (LOG, "item,title,description\nz,z,z\n", [], ["no text to learn intents from"]),
    ],
)
def test_csv_errors(tmp_path, fails, interactions, items, options, words):
    fails(saerec.main, csv_argv(tmp_path, interactions, items, *options), *words)


def test_csv_files_that_are_not_there(tmp_path, fails):
    argv = csv_argv(tmp_path, LOG, ITEMS)
    fails(saerec.main, argv[:4], "--interactions FILE and --items FILE")
    fails(saerec.main, [*argv, "--items", tmp_path / "none"], "No such file", "none")
    fails(saerec.main, [*argv, "--interactions", tmp_path / "nothing"], "No such file", "nothing")
    packed = gzip.compress(LOG.encode())
    (tmp_path / "x.gz").write_bytes(packed[:-12])
    fails(saerec.main, [*argv, "--interactions", tmp_path / "x.gz"], "x.gz", "truncated")
