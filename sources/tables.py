"""Make a dataset folder from two tables: who had what and when, and what the items' texts are.

    python sources/tables.py --interactions ratings.csv --items items.csv --out data/mine \\
        --text-columns title,description

The first line of a table names its columns. Cells are parted by the commonest of , ; | and tab in
that line outside quotes, or by --delimiter; quotes are those of CSV, but in tables parted by tabs
they count around a whole cell only; either file may be gzipped. An item may have several lines,
each of which is a text. Cells such as NA or NULL are no text. Interactions stay as they are,
repeats and all; those of a user at the same time are ordered by a hash, since the order of lines
may be a signal.

The two may be one table of reviews. Where the table of items has the column of users too, a line is
what that user wrote: no title of the item, and no text of the corpus if the interaction is held
out. Ratings are not looked at: what has one star was had as what has five.
"""

import collections
import contextlib
import csv
import dataclasses
import difflib
import hashlib
import itertools
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import MISSING, UserError, check_id, read_lines, run_command, setting  # noqa: E402
from sources.common import (  # noqa: E402
    check_input, check_kind, check_rounded, claimed, clean, index_interactions, join_sentences,
    parse_time, tell_span, write_dataset,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TablesSettings:
    """Make a dataset folder from a table of interactions and a table of items."""

    interactions: str = setting("", "table with a line per interaction", unit="path")
    items: str = setting("", "table with a line, or more, per item, or of reviews", unit="path")
    out: str = setting("data/csv", "dataset folder to write", unit="path")
    user_column: str = setting("user", "column of user ids; of authors, if --items has it too")
    item_column: str = setting("item", "column of item ids, in both tables")
    time_column: str = setting(
        "time", 'column of times, numbers or ISO dates; "" if the lines are in order'
    )
    text_columns: str = setting(
        "title,description",
        "columns that make an item's text; the first of several is also its title",
    )
    delimiter: str = setting("", "what parts the cells, \\t is a tab; found if not given")


# userId, author.steamid, Reviewer Name, reviewed_by, but neither authors (of a book) nor user_score
AUTHOR = re.compile(
    r"(?<![a-z])(user|reviewer|author|autor|verfasser|customer|critic|member|profile)"
    r"([^a-z]*[a-z]*(id|name))?[^a-z]*$|(?<![a-z])(review|post|rat)ed[^a-z]*by$",
    re.I,
)

QUOTED = re.compile('"[^"]*(""[^"]*)*"')  # a cell, as CSV quotes it

END = "\ud800"  # half a character, which no line of UTF-8 can hold

csv.field_size_limit(2**31 - 1)  # Python's own, 131,072 characters, is low for a description


def open_table(path, delimiter):
    """The csv.reader of a table's lines, and of END, unless a quote is open there. UserError."""
    numbered = read_lines(Path(path), hashlib.sha256())  # the digest is of no use here
    lines = (line for _, line in numbered)
    first = next(lines, "")
    if "\0ustar" in first:
        raise UserError(f"{path} is a tar archive: unpack it")
    bare = re.sub('"[^"]*"', "", first)  # a column's name may hold what parts no cells
    delimiter = delimiter.replace("\\t", "\t") or max(",;|\t", key=bare.count)
    if len(delimiter) != 1 or delimiter in '"\r\n':
        raise UserError(f"--delimiter is {delimiter!r}; it must be one character, or \\t")
    # In tables parted by tabs a quote may be that of inches; `unquote` knows the others
    quoting = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    how = dict(delimiter=delimiter, quoting=quoting, skipinitialspace=True)
    return csv.reader(itertools.chain([first], lines, [END]), **how)


def unquote(cell):
    """A cell without the quotes around all of it, if there are, and those within are doubled."""
    return cell[1:-1].replace('""', '"') if QUOTED.fullmatch(cell) else cell


def plain_rows(reader):
    """Yield the cells of each row of a csv.reader, without outer spaces and quotes."""
    for cells in reader:
        cells = [cell.strip(" \t") for cell in cells]
        if reader.dialect.delimiter == "\t":
            cells = [unquote(cell) for cell in cells]
        yield cells


def column_names(path, delimiter):
    """What the first line of a table says -> list of str; nothing if it cannot be read."""
    with contextlib.suppress(csv.Error):  # which `read_table` tells
        return next(plain_rows(open_table(path, delimiter)), [])
    return []


def columns_of_users(path, delimiter, users):
    """Names of columns of whose first 1,000 filled cells over half are ids of users -> list of str.

    users: set of ids.
    """
    filled = collections.Counter()
    theirs = collections.Counter()
    with contextlib.suppress(csv.Error):
        rows = plain_rows(open_table(path, delimiter))
        names = next(rows)
        for cells in rows:
            for name, cell in zip(names, cells):
                if cell and filled[name] < 1000:
                    filled[name] += 1
                    theirs[name] += cell in users
            if all(filled[name] == 1000 for name in names):
                break
    return [name for name in filled if 2 * theirs[name] > filled[name]]


def find_columns(path, names, wanted):
    """Where the wanted columns are among the names in the first line -> list of int. UserError.

    wanted: {what it is: its column}, where what is "user", "item", "time" or anything for a text.
    """
    if not names:
        raise UserError(f"{path} is empty, or its first line is: bring a line of column names")
    for what, name in wanted.items():
        if name and names.count(name) == 1:
            continue
        option = f"--{what}-column" if what in ("user", "item", "time") else "--text-columns"
        if not name:
            raise UserError(f"{option} holds an empty name: name what {path} has")
        problem = f"has no column {name!r} among {names}"
        near = difflib.get_close_matches(name, names, 1)
        perhaps = f", perhaps {near[0]!r}" if near else ""
        remedy = f"name it by {option}{perhaps}, see also --delimiter"
        if what == "time":
            remedy += ', or give --time-column "" if the lines are in order'
        if names.count(name) > 1:
            problem = f"has several columns {name!r}"
            remedy = "rename all but one"
        elif names[0].startswith("sep="):
            problem = f"begins with {names[0]!r}, a line for Excel alone"
            remedy = "remove it"
        elif any(re.fullmatch(r"[-+.]?\d[-+.:TZ \d]*", one) for one in names):
            problem += ", the first line, which looks like data"
            remedy = "add a line of column names before it"
        raise UserError(f"{path} {problem}: {remedy}")
    return [names.index(name) for name in wanted.values()]


def check_row(cells, names, delimiter):
    """Refuse cells that cannot have been meant as a row. Raises ValueError with the reason."""
    if any("\n" in cell and delimiter in cell for cell in cells):
        problem = f"a cell holds a line break and {delimiter!r}, as after a quote never closed"
        raise ValueError(f"{problem}: close it, or replace line breaks within cells by spaces")
    if any(END in cell for cell in cells):
        raise ValueError("a quote is never closed: close it")
    if len(cells) != len(names):
        remedy = f"quote cells that hold {delimiter!r}, name all columns"
        if len(cells) < len(names):
            remedy = "complete the line, replace line breaks within cells by spaces"
        elif delimiter == "\t":
            remedy = "replace tabs within cells by spaces, name all columns"
        raise ValueError(f"{len(cells)} cell(s), the first line has {len(names)}: {remedy}")


def read_table(path, wanted, delimiter):
    """Yield (line where it begins, cells of some columns) of each row of a table that is not empty.

    wanted: that of `find_columns`. Raises UserError with the line.
    """
    reader = open_table(path, delimiter)
    table = plain_rows(reader)
    ids = [place for place, what in enumerate(wanted) if what in ("user", "item")]
    line = 1
    rows = 0
    try:
        names = next(table, [])
        check_row(names, names, reader.dialect.delimiter)
        places = find_columns(path, names, wanted)
        line = reader.line_num + 1
        for cells in table:
            if any(cells) and cells != [END]:
                check_row(cells, names, reader.dialect.delimiter)
                if cells == names:
                    raise ValueError("column names once more, as of joined files: remove the line")
                cells = [cells[place] for place in places]
                for place in ids:
                    check_id(cells[place])
                rows += 1
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        problem = "a carriage return without a line feed, as on old Macs"
        remedy = "save the table with line ends of Unix or Windows"
        raise UserError(f"{path} line {line}: {problem}: {remedy}") from error
    except ValueError as error:
        raise UserError(f"{path} line {line}: {error}") from error
    if not rows:
        raise UserError(f"{path} has a line of column names and no other: bring the whole table")


def read_interactions(settings, kinds):
    """Yield the rows for `index_interactions` of the table. Raises UserError with the line.

    kinds: {}, for `check_kind` to fill.
    """
    path = settings.interactions
    wanted = {"user": settings.user_column, "item": settings.item_column}
    if settings.time_column:
        wanted["time"] = settings.time_column
    for line, (user, item, *time_cell) in read_table(path, wanted, settings.delimiter):
        when = line
        for cell in time_cell:
            check_rounded(cell, path, line)
            try:
                when = parse_time(cell)
            except ValueError as error:
                raise UserError(f"{path} line {line}: {error}: write it so") from error
            check_kind(kinds, cell, path, line)
        yield user, item, when, line


def reviews_are_told(settings, users):
    """Whether the table of items has the column of users, and say which way it is read. UserError.

    users: set of their ids. Columns that look as if they held who wrote a line are named; one of
    the right name but for case is refused: held-out reviews would be taken for descriptions.
    """
    path = settings.items
    user = settings.user_column
    names = column_names(path, settings.delimiter)
    if user in names:
        print(f"{path} has column {user!r}: every line is taken for what that user wrote")
        return True
    for name in names:
        if name.lower() == user.lower():
            remedy = "write it alike in both tables, or otherwise if it is no author's"
            raise UserError(f"{path} has column {name!r} in place of {user!r}: {remedy}")
    print(f"{path} has no column {user!r}: every line is taken for a description")
    by_value = columns_of_users(path, settings.delimiter, users)
    for name in names:
        if AUTHOR.search(name) or (name in by_value and name != settings.item_column):
            print(f"  if {name!r} is who wrote a line, call it {user!r}, or HELD-OUT REVIEWS LEAK")
    return False


def read_items(settings, log):
    """Read the rows of texts.jsonl of the table of items -> list of dict. Raises UserError.

    log: Interactions; items that have none are left out, and counted.
    """
    path = settings.items
    wanted = {"item": settings.item_column}
    if reviews_are_told(settings, set(log.user_ids)):
        wanted = {"user": settings.user_column} | wanted
    wanted |= enumerate(name.strip() for name in settings.text_columns.split(","))
    known = set(log.item_ids)
    found = set()
    rows = []
    left_out = 0
    other = ""
    for _, cells in read_table(path, wanted, settings.delimiter):
        user = cells.pop(0) if "user" in wanted else ""
        item = cells.pop(0)
        if item not in known:
            left_out += 1
            other = other or item
            continue
        found.add(item)
        texts = ["" if cell.lower() in MISSING else " ".join(clean(cell)) for cell in cells]
        title = "" if user or len(texts) == 1 else texts[0]  # a lone column may hold long texts
        rows.append({"item": item, "title": title, "text": join_sentences(texts), "user": user})
    if not rows:
        problem = f"none of the ids in {path} occur in {settings.interactions}"
        examples = f"{settings.interactions}: {log.item_ids[0]!r}, {path}: {other!r}"
        raise UserError(f"{problem} ({examples}): write them alike in both")
    print(f"{path}: {left_out:,} line(s) of items without interactions left out")
    lacking = len(known) - len(found)
    print(f"{path}: {lacking:,} of {len(known):,} items with interactions have no line")
    return rows


def prepare(settings):
    """Write the dataset folder of two tables. Raises UserError, or OSError for a missing file."""
    if not (settings.interactions and settings.items):
        raise UserError("a table is missing: give --interactions FILE and --items FILE")
    check_input(settings.items)
    with claimed(settings.out):
        kinds = {}
        log = index_interactions(read_interactions(settings, kinds))
        if settings.time_column:
            tell_span(log.time, kinds, settings.interactions)
        rows = read_items(settings, log)
        ties = log.ties() if settings.time_column else None
        write_dataset(settings.out, log.sequences(), rows, ties)


def main(argv=None):
    return run_command(argv, __doc__, tables=(TablesSettings, prepare))


if __name__ == "__main__":
    sys.exit(main())
