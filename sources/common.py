"""What the sources share: clean texts, times, interactions in order, writing a dataset folder.

    from sources.common import clean, index_interactions, write_dataset
"""

import array
import dataclasses
import hashlib
import html
import itertools
import os
import re
import tempfile
from datetime import datetime, timezone
from pathlib import Path

from saerec import UserError, claim, describe, load_dataset, write_lines, write_rows

import numpy as np

TAG = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->|</?[a-z][^<>]*>", re.I | re.S)
TAG_IN_LINE = re.compile(r"</?(?:a|b|em|font|i|small|span|strong|sub|sup|u)\b[^<>]*>", re.I)


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


def parse_time(value):
    """A number, or an ISO date or time (UTC unless it says otherwise) -> float, in seconds.

    Raises ValueError.
    """
    value = str(value)
    if re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", value, re.I):
        return float(value)
    when = datetime.fromisoformat(value)
    if not when.tzinfo:
        when = when.replace(tzinfo=timezone.utc)
    return when.timestamp()


@dataclasses.dataclass(frozen=True)
class Interactions:
    """Who had what, sorted by user, then time. Ids are kept once; users and items are numbers."""

    user_ids: list  # of str
    item_ids: list  # of str
    user: np.ndarray  # int32 [interactions], a place in user_ids
    item: np.ndarray  # int32 [interactions], a place in item_ids
    line: np.ndarray  # int32 [interactions], where the file has it

    def select(self, kept):
        """Some of the interactions -> Interactions; kept: int [any], ascending places."""
        columns = dict(user=self.user[kept], item=self.item[kept], line=self.line[kept])
        return dataclasses.replace(self, **columns)

    def user_bounds(self):
        """Where each user's interactions begin, and where the last one's end -> int [users+1]."""
        return np.flatnonzero(np.diff(self.user, prepend=-1, append=-1))

    def sequences(self):
        """Yield (user id, item ids oldest first) for each user."""
        for begin, end in itertools.pairwise(self.user_bounds()):
            items = self.item[begin:end].tolist()
            yield self.user_ids[self.user[begin]], [self.item_ids[item] for item in items]


def index_interactions(rows):
    """Number and sort (user id, item id, time, line of the file) rows -> Interactions.

    Ties in time keep the order of rows.
    """
    users = {}
    items = {}
    log = array.array("i")  # with the times 20 bytes per interaction, which lists would multiply
    times = array.array("d")
    for user, item, when, line in rows:
        user_number = users.setdefault(user, len(users))
        item_number = items.setdefault(item, len(items))
        log.extend((user_number, item_number, line))
        times.append(when)
    user, item, line = np.asarray(log).reshape(-1, 3).T
    order = np.lexsort((times, user))  # stable; the last key is the first to sort by
    return Interactions(list(users), list(items), user[order], item[order], line[order])


def hash_order(user, item):
    """A number that has nothing to do with the order of a file, to order ties in time by."""
    digest = hashlib.blake2b(f"{user} {item}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def write_dataset(out, sequences, rows, ties=None):
    """Write a dataset folder and say what is in it -> Dataset. Raises UserError, writing nothing.

    sequences: iterable of (user, items oldest first); rows: iterable of dicts for texts.jsonl, of
    which those without text, and what is empty in the others, are left out; ties: the dict that
    `tie_notes` reads, None where there are no times.
    """
    out = Path(out)
    claim(out)
    rows = ({name: value for name, value in row.items() if value} for row in rows if row["text"])
    with tempfile.TemporaryDirectory(dir=out) as temporary:
        new = Path(temporary)
        write_rows(new / "texts.jsonl", rows)
        write_lines(new / "sequences.txt", (" ".join([user, *row]) for user, row in sequences))
        if ties:
            write_rows(new / "ties.json", [ties])
        try:
            data = load_dataset(new)
        except UserError as error:
            raise UserError(str(error).replace(temporary, str(out))) from error
        for old in ("sequences.txt.gz", "texts.jsonl.gz", "ties.json"):  # of another version
            (out / old).unlink(missing_ok=True)
        for path in new.iterdir():
            os.replace(path, out / path.name)
    data = dataclasses.replace(data, folder=out)
    print(*describe(data), sep="\n")
    return data
