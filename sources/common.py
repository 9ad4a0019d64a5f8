"""What the sources share: clean texts, times, interactions in order, writing a dataset folder.

    from sources.common import clean, index_interactions, write_dataset
"""

import array
import contextlib
import dataclasses
import hashlib
import html
import itertools
import math
import os
import re
import tempfile
from datetime import datetime, timezone
from pathlib import Path

from saerec import UserError, claim, describe, load_dataset, write_lines, write_rows

import numpy as np

# Attributes have an "=", else "a<b then c>d" would be a tag. A script or comment holds no other's
# begin, else many that never end would take a time that is quadratic in their number
ATTRIBUTES = r"(?:[\s/]*|\s[^<>=]*=[^<>]*)"
TAG = re.compile(
    r"<(script|style)\b(?:(?!<\1\b).)*?</\1\s*>|<!--(?:(?!<!--).)*?-->"
    rf"|</?[a-z][\w:-]*{ATTRIBUTES}>"
    r"|<!doctype\b[^<>]*>|<\?xml\b[^<>]*>|\[\[VIDEOID:[^][]*\]\]",  # the last is Amazon's own
    re.I | re.S,
)
INLINE = "a|b|em|font|i|small|span|strong|sub|sup|u"
TAG_IN_LINE = re.compile(rf"</?(?:{INLINE}){ATTRIBUTES}>", re.I)


def clean(text):
    """Lines of a text without HTML tags, entities and superfluous white space -> list of str."""
    while (plain := html.unescape(text)) != text:  # some are escaped twice
        text = plain
    text = TAG_IN_LINE.sub("", text)
    text = TAG.sub("\n", text)
    text = text.encode("utf-8", "ignore").decode()  # JSON may hold half a surrogate pair
    lines = (" ".join(line.split()) for line in text.split("\n"))
    return [line for line in lines if line]


def end_sentence(text):
    """A text with a full stop, unless it ends in such a mark."""
    return text if text[-1] in ".!?:;," else text + "."


def join_sentences(parts):
    """Join texts to one, each but the last ended by a mark -> str; empty ones are left out."""
    parts = [part for part in parts if part]
    if not parts:
        return ""
    return " ".join([*map(end_sentence, parts[:-1]), parts[-1]])


# Times

NUMBER = re.compile(r"[-+]?[\d.]+(e[-+]?\d+)?", re.I)
ROUNDED = re.compile(r"\d([.,]\d{1,6})?E\+\d{2,}", re.I)  # a time such as 1.70407E+12
UNITS = {"seconds": 1, "milliseconds": 1e3, "microseconds": 1e6, "nanoseconds": 1e9}  # of a second
LATEST = 1e11  # seconds, in the year 5138; as many milliseconds are in 1973, and so on


def parse_time(value):
    """A number, or an ISO date or time (UTC unless it says otherwise) -> float, in seconds.

    Raises ValueError, saying what the value was, also for an infinite one.
    """
    value = str(value)
    try:
        if not NUMBER.fullmatch(value):
            when = datetime.fromisoformat(value)
            return when.replace(tzinfo=when.tzinfo or timezone.utc).timestamp()
        if math.isfinite(float(value)):
            return float(value)
    except ValueError:
        pass  # which would not say it for every value
    raise ValueError(f"{value!r} is no finite number or date like 2024-05-31 or 2024-05-31T23:59")


def check_rounded(value, path, line):
    """Refuse a time that a spreadsheet rounded: it would tie with most others. UserError.

    value: as it is written; a float is let through, for Python itself writes 1.5e+18.
    """
    if isinstance(value, str) and ROUNDED.fullmatch(value):
        problem = f"time {value!r} was rounded by a spreadsheet"
        raise UserError(f"{path} line {line}: {problem}: export times as text")


def time_kind(value):
    """How a time is written that `parse_time` takes -> str; a number's unit shows in its size."""
    value = str(value)
    if NUMBER.fullmatch(value):
        size = abs(float(value))
        return next((u for u, parts in UNITS.items() if size < LATEST * parts), "nanoseconds")
    if len(value) <= 10:  # as 2024-05-31, or 2024-W22-5
        return "a date"
    zone = datetime.fromisoformat(value).tzinfo
    return "a date with time and zone" if zone else "a date with time"


def check_kind(kinds, value, path, line):
    """Refuse a time written otherwise than those before: their order would be wrong. UserError.

    value: as it is written; kinds: dict of an example of each kind, {} before the first time.
    """
    kind = time_kind(value)
    if kind not in kinds:
        kinds[kind] = f"line {line} has {value} ({kind})"
    if len(kinds) > 1:
        problem = f"times of two kinds, {' and '.join(kinds.values())}"
        raise UserError(f"{path}: {problem}: write all of them alike")


def tell_span(time, kinds, path):
    """Say from when to when times are: nothing else shows a unit read wrongly. Raises UserError.

    time: float [any], as `parse_time` reads them; kinds: that of `check_kind`. Refused are times
    that cannot be, and numbers that are dates with the day first, or a month after a point, where
    2023.10 would stand before 2023.9.
    """
    kind = next(iter(kinds))
    days = np.clip(time / UNITS.get(kind, 1) / 86400, -1e6, 1e7)  # what numpy can show
    begin, end = (np.datetime64(int(day // 1), "D") for day in (days.min(), days.max()))
    year = time % 10**4
    problem = ""
    if ((10**6 < time) & (time < 10**8) & (1900 <= year) & (year <= 2100)).all():
        problem = f"times such as {time[0]:08.0f} begin with the day or month"
    elif ((1900 <= time) & (time < 2101)).all() and (time % 1).any():
        problem = f"times such as {time[time % 1 > 0].max()} look like a year and a month"
    elif end >= np.datetime64("2101"):
        latest = f"{time.max():.0f}" if kind in UNITS else end
        problem = f"times such as {latest}, read as {kind}, are after the year 2100"
    if problem:
        raise UserError(f"{path}: {problem}: write dates as 2024-05-31")
    print(f"{path}: times from {begin} to {end}, read as {kind}")


# Interactions


def hash_order(user, item):
    """A number that has nothing to do with the order of a file, to order ties in time by."""
    digest = hashlib.blake2b(f"{user} {item}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


@dataclasses.dataclass(frozen=True)
class Interactions:
    """Who had what, by user, then time. Ids are kept once; users and items are numbers."""

    user_ids: list  # of str, sorted as `load_dataset` sorts items
    item_ids: list  # of str
    user: np.ndarray  # int32 [interactions], a place in user_ids
    item: np.ndarray  # int32 [interactions], a place in item_ids
    time: np.ndarray  # float64 [interactions]
    line: np.ndarray  # int32 [interactions], where the file has it

    def select(self, kept):
        """Some of the interactions -> Interactions; kept: int [any], ascending places."""
        names = ("user", "item", "time", "line")
        return dataclasses.replace(self, **{name: getattr(self, name)[kept] for name in names})

    def user_bounds(self):
        """Where each user's interactions begin, and where the last one's end -> int [users+1]."""
        return np.flatnonzero(np.diff(self.user, prepend=-1, append=-1))

    def ties(self):
        """How many pairs of neighbours the users have, and how many of one time -> dict."""
        pairs = np.diff(self.user) == 0
        tied = pairs & (np.diff(self.time) == 0)
        return dict(ties=int(tied.sum()), pairs=int(pairs.sum()))

    def sequences(self):
        """Yield (user id, item ids oldest first) for each user."""
        for begin, end in itertools.pairwise(self.user_bounds()):
            items = self.item[begin:end].tolist()
            yield self.user_ids[self.user[begin]], [self.item_ids[item] for item in items]


def index_interactions(rows):
    """Number and sort (user id, item id, time, line of the file) rows -> Interactions.

    Ties in time are ordered by `hash_order`, since the order of lines (of a file sorted by item,
    say) would be a signal; only lines that differ in nothing else keep it.
    """
    users = {}
    items = {}
    log = array.array("i")  # with the two below 28 bytes per interaction; lists would multiply it
    times = array.array("d")
    hashes = array.array("Q")
    for user, item, when, line in rows:
        user_number = users.setdefault(user, len(users))
        item_number = items.setdefault(item, len(items))
        log.extend((user_number, item_number, line))
        times.append(when)
        hashes.append(hash_order(user, item))
    user, item, line = np.asarray(log).reshape(-1, 3).T
    time = np.asarray(times)
    user_ids = sorted(users, key=lambda name: (len(name), name))
    place = np.argsort([users[name] for name in user_ids]).astype(np.int32)
    user = place[user]
    order = np.lexsort((hashes, time, user))  # stable; the last key is the first to sort by
    columns = (column[order] for column in (user, item, time, line))
    return Interactions(user_ids, list(items), *columns)


# Files


NOT_PLAIN = (  # how files begin that are zip or xlsx, bz2, xz, zst; xls, Parquet; UTF-16
    *(b"PK\3\4", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"),
    *(b"\xd0\xcf\x11\xe0", b"PAR1", b"\xff\xfe", b"\xfe\xff"),
)


def check_input(path):
    """Refuse before long work what cannot be read, or not twice. Raises UserError, OSError."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path} is no plain file, but is read twice: save it as one and name that")
    with open(path, "rb") as file:
        if file.read(8).startswith(NOT_PLAIN):
            problem = "an archive, a spreadsheet, a Parquet file or UTF-16"
            raise UserError(f"{path} is {problem}: unpack it, or save it as plain text in UTF-8")


@contextlib.contextmanager
def claimed(out):
    """See before long work that a dataset folder can be written -> its path. UserError, OSError.

    It is there within the `with`, and gone after it if nothing has come into it.
    """
    if not str(out):
        raise UserError("--out is empty: name the folder to write, as in --out data/mine")
    claim(out)
    try:
        yield Path(out)
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(out)  # if nothing is there


def write_dataset(out, sequences, rows, ties=None):
    """Write a dataset folder and say what is in it -> Dataset. Raises UserError, writing nothing.

    sequences: iterable of (user, items oldest first); rows: iterable of dicts for texts.jsonl, of
    which those without text, and what is empty in the others, are left out; ties: a dict as
    `Interactions.ties` gives it, None where there are no times.
    """
    rows = ({name: value for name, value in row.items() if value} for row in rows if row["text"])
    with claimed(out) as out, tempfile.TemporaryDirectory(dir=out) as temporary:
        new = Path(temporary)
        try:
            write_rows(new / "texts.jsonl", rows)
            write_lines(new / "sequences.txt", (" ".join([user, *row]) for user, row in sequences))
            if ties:
                share = ties["ties"] / max(ties["pairs"], 1)
                said = f"{share:.1%} of neighbouring interactions have the same time"
                said += "; a hash of user and item put these in order"
                write_lines(new / "ties.txt", [said])
            data = load_dataset(new)
        except UserError as error:
            if temporary not in str(error):  # of the file that the rows come from
                raise
            problem = str(error).replace(temporary, str(out))
            raise UserError(f"nothing was written: the new {problem}") from error
        for old in ("sequences.txt.gz", "texts.jsonl.gz", "ties.txt"):  # of another version
            (out / old).unlink(missing_ok=True)
        for path in new.iterdir():
            os.replace(path, out / path.name)
    data = dataclasses.replace(data, folder=out)
    print(*describe(data), sep="\n")
    if ties and 10 * ties["ties"] > 9 * ties["pairs"]:
        problem = "NEARLY ALL NEIGHBOURS HAVE THE SAME TIME, so that their order is chance"
        print(f"  {problem}: bring exact times")
    return data
