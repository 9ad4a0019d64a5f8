"""Make a dataset folder of Amazon reviews, downloaded or already here.

    python sources/amazon.py --category Beauty --release 2014
    python sources/amazon.py --reviews FILE --meta FILE --out data/mine
    python sources/amazon.py --reviews FILE --text reviews --sentences --out data/mine

The files of three releases are read as published, gzipped (.gz) or not: 2014 (McAuley et al. 2015,
He & McAuley 2016), 2018 (Ni et al. 2019) and 2023 (Hou et al. 2024). Of the reviews that a user
wrote about an item the first counts. Users and items with fewer than --core interactions leave,
again and again until none is left. Ratings are not looked at: what has one star was had as what
has five. A user's items are ordered by time; ties, by a hash of the ids of user and item, since the
order of lines may be a signal. How many there are is said.

Reviews are read once for ids and times, and again for the texts that stay: these are written one by
one, and held in memory only at the end, when the new folder is checked.
"""

import ast
import contextlib
import dataclasses
import difflib
import gzip
import http.client
import itertools
import json
import os
import re
import sys
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import (  # noqa: E402
    HERE, MISSING, Progress, UserError, check_id, open_plain, run_command, setting,
)  # fmt: skip
from sources.common import (  # noqa: E402
    ROUNDED, check_input, check_kind, check_rounded, claimed, clean, index_interactions,
    join_sentences, parse_time, tell_span, write_dataset,
)  # fmt: skip

import numpy as np  # noqa: E402


class Release(NamedTuple):
    """Where the files of a release lie; {} stands for the category."""

    address: str
    reviews: str  # all of a category
    core: str  # their 5-core, "" if it is not published
    meta: str
    categories: list


IN_ALL_RELEASES = """
    Automotive Books CDs_and_Vinyl Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry
    Digital_Music Electronics Grocery_and_Gourmet_Food Home_and_Kitchen Kindle_Store Movies_and_TV
    Musical_Instruments Office_Products Patio_Lawn_and_Garden Pet_Supplies Sports_and_Outdoors
    Tools_and_Home_Improvement Toys_and_Games Video_Games
""".split()
IN_2014 = "Amazon_Instant_Video Apps_for_Android Baby Beauty Health_and_Personal_Care".split()
IN_2018 = """
    AMAZON_FASHION All_Beauty Appliances Arts_Crafts_and_Sewing Gift_Cards Industrial_and_Scientific
    Luxury_Beauty Magazine_Subscriptions Prime_Pantry Software
""".split()
IN_2023 = """
    All_Beauty Amazon_Fashion Appliances Arts_Crafts_and_Sewing Baby_Products
    Beauty_and_Personal_Care Gift_Cards Handmade_Products Health_and_Household
    Health_and_Personal_Care Industrial_and_Scientific Magazine_Subscriptions Software
    Subscription_Boxes Unknown
""".split()
RELEASES = {
    "2014": Release(
        address="http://snap.stanford.edu/data/amazon/productGraph/categoryFiles/",
        reviews="reviews_{}.json.gz",
        core="reviews_{}_5.json.gz",
        meta="meta_{}.json.gz",
        categories=IN_ALL_RELEASES + IN_2014,
    ),
    "2018": Release(
        address="https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/",
        reviews="categoryFiles/{}.json.gz",
        core="categoryFilesSmall/{}_5.json.gz",
        meta="metaFiles2/meta_{}.json.gz",
        categories=IN_ALL_RELEASES + IN_2018,
    ),
    "2023": Release(
        address="https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw/",
        reviews="review_categories/{}.jsonl.gz",
        core="",
        meta="meta_categories/meta_{}.jsonl.gz",
        categories=IN_ALL_RELEASES + IN_2023,
    ),
}


@dataclasses.dataclass(frozen=True)
class AmazonSettings:
    """Make a dataset folder of Amazon reviews."""

    reviews: str = setting("", "reviews of any release, a line each, gzipped or not", unit="path")
    meta: str = setting(
        "", "metadata of the items, likewise; only --text reviews does without", unit="path"
    )
    category: str = setting(
        "", "category to download; Beauty of 2014 has 22,363 users, 12,101 items"
    )
    release: str = setting("", f"release of --category: {', '.join(RELEASES)}")
    out: str = setting(
        "",
        "dataset folder to write; if not given, data/CATEGORY in small letters, or data/amazon",
        unit="path",
    )
    core: int = setting(
        5, "drop users and items with fewer interactions, until none is left; 0 drops none", low=0
    )
    text: str = setting(
        "item",
        "texts of an item: its metadata, its reviews, or both",
        choices=("item", "reviews", "both"),
    )
    sentences: bool = setting(
        False,
        "cut reviews into sentences, less those of under 4 words and those an item has already",
    )


# Files, downloaded if need be


def raw_lines(path):
    """Yield (number, bytes) of each line of a plain or gzipped file, telling how far it is.

    Raises UserError.
    """
    number = 0
    try:
        with open_plain(path) as file:
            on_disk = getattr(file, "fileobj", file)  # what a gzip file reads from
            megabytes = os.fstat(file.fileno()).st_size // 10**6 + 1
            progress = Progress(megabytes, f"{path.name}, MB read")
            for number, raw in enumerate(file, 1):
                yield number, raw
                if number % 2**16 == 0:
                    progress.show(on_disk.tell() // 10**6)
            if progress.shown > progress.start:  # a short file needs no last line either
                progress.show(progress.total)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        problem = f"corrupt or truncated after line {number} ({error})"
        raise UserError(f"{path} is {problem}: copy or make it again") from error


def fetch(url, part, timeout):
    """Download url into the file `part` once, going on after what is there.

    Raises what urllib does; ConnectionError on a short body.
    """
    with open(part, "ab") as file:
        headers = {"User-Agent": "saerec", "Range": f"bytes={file.tell()}-"}
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.urlopen(request, timeout=timeout) as response:
            if response.status != 206:  # the server knows no ranges: start over
                file.truncate(0)
            have = file.seek(0, os.SEEK_END)
            total = have + int(response.headers.get("Content-Length") or 0)
            progress = Progress(total // 10**6 + 1, f"{part.name}, MB")
            # read() would lose what came just before a connection breaks
            while block := response.read1(2**16):
                have += file.write(block)
                if have < total:
                    progress.show(have // 10**6)
            if have < max(total, 1):
                short = f"the connection ended after {have:,} of {total:,} bytes"
                raise ConnectionError(short)
            progress.show(progress.total)


def check_whole(path):
    """Read a gzip file to its end, where its checksum is. Raises UserError."""
    with open(path, "rb") as file:
        if file.read(2) != b"\x1f\x8b":  # a page that asks to log in, say
            raise UserError("Not a gzipped file")
    for _ in raw_lines(path):
        pass


def fetch_whole(url, part, timeout):
    """`fetch`, and check what is there then. Raises what these two do."""
    try:
        fetch(url, part, timeout)
    except urllib.error.HTTPError as error:
        if error.code != 416:
            raise
        # The server has nothing that could follow this part: it is whole, or of another file
        with contextlib.suppress(UserError):
            check_whole(part)
            return
        raise
    check_whole(part)


def download(url, path, tries=5, wait=2.0, timeout=60.0):
    """Fetch a gzip file unless it is there already -> path.

    wait: seconds before the second try, doubled for each more; a refusal such as 404 is final.
    timeout: seconds of silence. Raises UserError; what came so far stays for the next run.
    """
    part = path.with_suffix(".part" + path.suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    while not path.is_file():
        try:
            fetch_whole(url, part, timeout)
            os.replace(part, path)
        except (OSError, http.client.HTTPException, UserError) as error:
            tries -= 1
            code = getattr(error, "code", 0)
            corrupt = isinstance(error, UserError)
            refused = 400 <= code < 500 and code not in (408, 416, 429)
            if corrupt or code == 416:
                part.unlink()
            reason = str(error.__cause__ or error).strip("<>")
            if corrupt or refused or not tries:
                by_hand = f"get it by hand: to {path} or as --reviews, --meta"
                raise UserError(f"{url}: {reason}; run again to go on, or {by_hand}") from error
            print(f"{url}: {reason}; trying again in {wait:g} s")
            time.sleep(wait)
            wait *= 2
    return path


def check_options(settings):
    """Refuse options that don't go together. Raises UserError."""
    s = settings
    if s.sentences and s.text == "item":
        problem = "--sentences cuts reviews, and --text item has none"
        raise UserError(f"{problem}: add --text reviews or both")
    if s.category and (s.reviews or s.meta):
        problem = "--category downloads what --reviews and --meta name"
        raise UserError(f"{problem}: give the one or the others")
    if s.category and s.release not in RELEASES:
        raise UserError(f"--release is {s.release!r}; choose one of {', '.join(RELEASES)}")
    if s.release and not s.category:
        problem = "--release goes with --category; that of your files shows in their lines"
        raise UserError(f"{problem}: leave it out")
    if not (s.category or s.reviews):
        files = "--reviews FILE --meta FILE"
        raise UserError(f"no reviews: give {files}, or --category Beauty --release 2014")
    if not (s.category or s.meta or s.text == "reviews"):
        raise UserError(f"--text {s.text} needs --meta FILE; --text reviews does without")


def download_category(settings):
    """Download the reviews and metadata of a category -> their paths. Raises UserError."""
    category = settings.category
    release = RELEASES[settings.release]
    if category not in release.categories:
        near = difflib.get_close_matches(category, release.categories, 5, 0.4)
        allowed = ", ".join(near or release.categories)
        problem = f"--category {category!r} is not in release {settings.release}"
        raise UserError(f"{problem}; choose one of {allowed}")
    reviews = release.reviews
    if release.core and settings.core >= 5:
        # A tenth of the download. Peeled again it gives the core of all reviews if that is in it,
        # which nobody promises: in the one of magazines (2018) items have 1 review, a user has 3
        reviews = release.core
    folder = HERE / "downloads" / f"amazon-{settings.release}"
    paths = []
    for pattern in (reviews, release.meta):
        name = pattern.format(category)
        paths.append(download(release.address + name, folder / Path(name).name))
    return paths


def input_files(settings):
    """Paths of the reviews and of the metadata, None without -> two. Raises UserError, OSError."""
    if settings.category:
        return download_category(settings)
    check_input(settings.reviews)
    if not settings.meta:
        return Path(settings.reviews), None
    check_input(settings.meta)
    return Path(settings.reviews), Path(settings.meta)


# Lines


class Review(NamedTuple):
    """What is used of a review."""

    user: str
    item: str
    written: object  # the time as it stands there: text or a number
    time: float  # seconds, or milliseconds in 2023
    headline: str
    text: str


REVIEW_OF_2014 = ("reviewerID", "asin", "unixReviewTime", "summary", "reviewText")  # and of 2018
REVIEW_OF_2023 = ("user_id", "parent_asin", "timestamp", "title", "text")


def as_written(number):
    """A JSON number -> float, or str if a spreadsheet rounded it, which `check_rounded` refuses."""
    return number if ROUNDED.fullmatch(number) else float(number)


JSON = json.JSONDecoder(parse_float=as_written)


def parse_line(raw):
    """One raw line -> dict. Raises ValueError."""
    if raw.lstrip().startswith(b"["):
        raise ValueError("a JSON array: an object a line is wanted")
    try:
        text = raw.decode("utf-8-sig").strip()
        try:
            record = JSON.decode(text)
        except ValueError:
            record = ast.literal_eval(text)  # metadata of 2014 are Python literals; runs no code
        return {**record}  # a TypeError unless it is a dict
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError("not a JSON object in UTF-8, nor a Python dict") from error


def said(value):
    """A string as it is, "" for a word such as NULL and for all that is no string."""
    return value if isinstance(value, str) and value.strip().lower() not in MISSING else ""


def is_id(value):
    """Whether a value can stand for a user or an item: a string of visible ASCII characters."""
    return isinstance(value, str) and bool(re.fullmatch("[!-~]+", value))


def parse_review(raw):
    """One raw line -> Review. Raises ValueError; only the texts may be lacking."""
    record = parse_line(raw)
    names = REVIEW_OF_2023 if "user_id" in record else REVIEW_OF_2014
    user, item, when, headline, text = map(record.get, names)
    if when is None or not is_id(user) or not is_id(item):
        raise ValueError(f"user {user!r}, item {item!r}, time {when!r}")
    check_id(user)
    check_id(item)
    return Review(user, item, when, parse_time(when), said(headline), said(text))


def read_records(path, parse):
    """Yield (line number, parse(raw line)). Broken lines are said and left out, blank ones skipped.

    Raises UserError if there is no line, if half of them are broken, or more than one and than 1%.
    """
    total = 0
    broken = 0
    examples = ""
    for line, raw in raw_lines(path):
        if b"\0ustar" in raw:
            raise UserError(f"{path} is a tar archive: unpack it")
        if not raw.strip():
            continue
        total += 1
        try:
            record = parse(raw)
        except ValueError as error:
            broken += 1
            if broken <= 3:
                examples += f", line {line} ({error})"
        else:
            yield line, record
    if not total:
        raise UserError(f"{path} has no line: copy or download it again")
    report = f"{path}: {broken:,} of {total:,} lines broken{examples}"
    if 2 * broken >= total or broken > max(1, total / 100):
        remedy = "see that it is the right file, copy or download it again"
        raise UserError(f"{report}; {remedy}")
    if broken:
        print(f"{report}; left out")


# Interactions


def read_log(reviews):
    """Who reviewed what and when -> Interactions, repeats and all. Raises UserError."""

    kinds = {}

    def rows():
        for line, review in read_records(reviews, parse_review):
            check_rounded(review.written, reviews, line)
            check_kind(kinds, review.written, reviews, line)
            yield review.user, review.item, review.time, line

    log = index_interactions(rows())
    tell_span(log.time, kinds, reviews)
    return log


def first_of_pairs(log):
    """Where in Interactions each pair of user and item comes first -> int64 [pairs], ascending."""
    pair = log.user.astype(np.int64) * len(log.item_ids) + log.item
    _, first = np.unique(pair, return_index=True)
    return np.sort(first)


def k_core(user, item, core):
    """Which interactions stay once users and items with fewer than `core` of them are gone.

    user, item: int [interactions] -> int64 [any], places, ascending. A user's leaving may cost an
    item its place and so on, hence the loop.
    """
    kept = np.arange(len(user))
    while True:
        of_user = np.bincount(user[kept])[user[kept]]  # [kept], how many that user has
        of_item = np.bincount(item[kept])[item[kept]]
        stays = (of_user >= core) & (of_item >= core)
        if stays.all():
            return kept
        kept = kept[stays]


def core_log(reviews, core):
    """The first interaction of each pair, in the core -> Interactions. Raises UserError."""
    log = read_log(reviews)
    pairs = log.select(first_of_pairs(log))
    kept = pairs.select(k_core(pairs.user, pairs.item, core))
    users = f"{len(log.user_ids):,} users of {len(log.item_ids):,} items"
    print(f"{reviews}: {len(log.line):,} reviews by {users}")
    once = f"{len(pairs.line):,} of them without those that repeat a user and an item"
    print(f"  {once}, {len(kept.line):,} of these in the {core}-core")
    if not len(kept.line):
        problem = f"no users and items have {core} interactions with one another"
        raise UserError(f"{reviews}: {problem}: lower --core")
    return kept


# Texts


class About(NamedTuple):
    """What the metadata say of an item."""

    title: str = ""
    text: str = ""


def lines_of(value):
    """The clean lines of a string, a list, or a list of lists -> list of str."""
    if not isinstance(value, list):
        return clean(said(value))
    lines = []
    for part in value:
        lines += lines_of(part)
    return lines


def first_field(record, *names):
    """The clean lines of the first of these fields with a letter or digit -> list of str."""
    for name in names:
        lines = lines_of(record.get(name))
        if any(map(str.isalnum, "".join(lines))):
            return lines
    return []


def describe_item(record):
    """An item's metadata -> About, text "title. brand. categories. description" as far as there."""
    title = first_field(record, "title")
    title = " ".join(line for line in title if "getTime" not in line)  # a script, here and there
    brand = first_field(record, "brand", "store")
    categories = first_field(record, "categories", "category")
    categories = dict.fromkeys(categories)  # each once
    description = first_field(record, "description", "features", "feature")
    parts = [title, " ".join(brand), ", ".join(categories), " ".join(description)]
    return About(title, join_sentences(parts))


def read_about(meta, log, reviews):
    """What is known of the items of a log -> {item id: About}. Raises UserError.

    meta: path of the metadata, or None.
    """
    items = np.unique(log.item).tolist()
    about = {log.item_ids[item]: About() for item in items}
    if not meta:
        return about
    matched = False
    for line, record in read_records(meta, parse_line):
        if "user_id" in record or "reviewerID" in record:  # whose headline would be a title
            problem = "a review, not what an item is"
            raise UserError(f"{meta} line {line} is {problem}: give the metadata as --meta")
        item = str(record.get("parent_asin") or record.get("asin"))
        matched |= item in about
        if about.get(item) == About():  # the first line that says something counts
            about[item] = describe_item(record)
    if not matched:
        problem = f"{meta} has none of the items of {reviews}"
        examples = f"{meta.name}: {item!r}, {reviews.name}: {next(iter(about))!r}"
        raise UserError(f"{problem} ({examples}): bring that of the same category and release")
    return about


def item_rows(about):
    """Yield the rows of texts.jsonl of the items' metadata."""
    for item, (title, text) in about.items():
        yield {"item": item, "title": title, "text": text}


UNUSED = 0
TRAINING = 1
HELD_OUT = 2


def use_of_lines(log):
    """What each line of the reviews' file is for -> bytes [lines + 1], UNUSED, TRAINING, HELD_OUT.

    Held out are the last two interactions of a user with 3 or more, as in `load_dataset`.
    """
    bounds = log.user_bounds()
    sizes = np.diff(bounds)
    ends = np.repeat(bounds[1:], sizes)  # [interactions], where the user's end
    to_end = ends - np.arange(len(log.line))  # 1 for a user's last
    held_out = (to_end <= 2) & (np.repeat(sizes, sizes) >= 3)
    use = np.full(log.line.max() + 1, UNUSED, np.uint8)
    use[log.line] = np.where(held_out, HELD_OUT, TRAINING)
    return use.tobytes()


def review_lines(review):
    """The clean lines of a review, its headline first -> list of str."""
    lines = clean(review.text)
    headline = " ".join(clean(review.headline))
    # Amazon makes a lacking headline of the first words, and then it says nothing new
    if not " ".join(lines).startswith(headline.rstrip(" .…")):
        lines.insert(0, headline)
    return lines


SMALL = "".join(filter(str.islower, map(chr, range(2**16))))  # letters that begin no sentence
# White space after a stop and before a digit or a letter that is not small, of any script, either
# of them perhaps quoted; or what follows a stop of Chinese or Japanese, white space or none
SENTENCE_END = re.compile(
    rf"""(?<=[.!?"'”’»)\]])(?<![^.!?]["'”’»)\]])\s+(?=["'“‘„«(\[]*[^\W_{SMALL}])"""
    r"|(?:(?<=[。！？])|(?<=[。！？][”’」』）]))\s*(?=[^\s。！？”’」』）])"
)
CJK = "\u3040-\u30ff\u3400-\u9fff"  # kana and ideographs: no spaces part them, each is a word
WORD = re.compile(f"[{CJK}]|[^\\s{CJK}]+")


def cut_sentences(lines):
    """The sentences of the lines of a text -> list of str."""
    return [sentence for line in lines for sentence in SENTENCE_END.split(line)]


def new_sentences(sentences, key, seen):
    """Those sentences of a review that are not in `seen` yet -> list of str; they are added to it.

    seen: a set of hashes of key and sentence in small letters, since 64 bits tell sentences apart
    in little room. Of those that differ in nothing else, the last way to write it stays.
    """
    found = {}
    for sentence in sentences:
        digest = hash((key, sentence.lower()))
        if digest not in seen:
            found[digest] = sentence
    seen.update(found)
    return list(found.values())


def read_again(reviews, log, about):
    """Yield (use, Review) of the reviews in the log. Raises UserError unless all are there."""
    use = use_of_lines(log)
    left = len(log.line)
    for number, raw in raw_lines(reviews):
        if number >= len(use) or use[number] == UNUSED:
            continue
        try:
            review = parse_review(raw)
        except ValueError:  # a review no more
            break
        if review.item in about:
            left -= 1
            yield use[number], review
    if left:
        raise UserError(f"{reviews} has changed since its first reading: run again")


def review_rows(reviews, log, about, sentences):
    """Read the reviews in the log again and yield the rows of texts.jsonl.

    A row is a review, or if `sentences` one of its sentences of 4 words and more. Raises UserError.
    """
    seen = set()
    short = 0
    for use, review in read_again(reviews, log, about):
        lines = review_lines(review)
        if sentences:
            cut = cut_sentences(lines)
            long = [sentence for sentence in cut if len(WORD.findall(sentence)) >= 4]
            short += len(cut) - len(long)
            # With its use, since a held-out sentence must not push out the same one of another
            texts = new_sentences(long, (review.item, use), seen)
        else:
            texts = [join_sentences(lines)]
        title = about[review.item].title
        for text in texts:
            yield {"item": review.item, "user": review.user, "title": title, "text": text}
    if sentences:
        print(f"{reviews}: {short:,} sentence(s) of under 4 words left out")


def prepare(settings):
    """Write the dataset folder of some Amazon reviews. Raises UserError, OSError."""
    check_options(settings)
    name = settings.category.lower() or "amazon"
    out = settings.out or f"data/{name}"
    with claimed(out):
        reviews, meta = input_files(settings)
        log = core_log(reviews, settings.core)
        about = read_about(meta, log, reviews)
        rows = []
        if settings.text != "reviews":
            rows.append(item_rows(about))
        if settings.text != "item":
            rows.append(review_rows(reviews, log, about, settings.sentences))
        write_dataset(out, log.sequences(), itertools.chain(*rows), log.ties())


def main(argv=None):
    return run_command(argv, __doc__, amazon=(AmazonSettings, prepare))


if __name__ == "__main__":
    sys.exit(main())
