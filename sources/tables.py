"""Make a dataset folder from two tables: who had what and when, and what the items' texts are.

    python sources/tables.py --interactions ratings.csv --items items.csv --out data/mine \\
        --text-columns title,description

The first line of a table names its columns. Cells are parted by the commonest of , ; | and tab in
that line, or by --delimiter; quotes are those of CSV; either file may be gzipped (.gz). An item may
have several lines, each of which is a text. Interactions stay as they are, repeats and all.
"""

import csv
import dataclasses
import hashlib
import itertools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import UserError, read_lines, run_command, setting  # noqa: E402
from sources.common import (  # noqa: E402
    clean, index_interactions, join_sentences, parse_time, write_dataset,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TablesSettings:
    """Make a dataset folder from a table of interactions and a table of items."""

    interactions: str = setting("", "table with a line per interaction", unit="path")
    items: str = setting("", "table with a line, or more, per item", unit="path")
    out: str = setting("data/csv", "dataset folder to write", unit="path")
    user_column: str = setting("user", "column of user ids")
    item_column: str = setting("item", "column of item ids, in both tables")
    time_column: str = setting(
        "time", 'column of times, numbers or ISO dates; "" if the lines are in order'
    )
    text_columns: str = setting(
        "title,description", "columns that make an item's text; the first is also its title"
    )
    delimiter: str = setting("", "what parts the cells, \\t is a tab; found if not given")


def find_delimiter(given, first_line):
    """What parts the cells of a table -> one character. Raises UserError."""
    delimiter = given.replace("\\t", "\t") or max(",;|\t", key=first_line.count)
    if len(delimiter) != 1:
        raise UserError(f"--delimiter is {delimiter!r}; it must be one character, or \\t")
    return delimiter


def read_table(path, columns, delimiter):
    """Yield (line number, cells of these columns) of a table. Raises UserError with the line."""
    numbered = read_lines(Path(path), hashlib.sha256())  # the digest is of no use here
    lines = (line.lstrip("\ufeff") for _, line in numbered)  # a spreadsheet's byte order mark
    first = next(lines, "")
    delimiter = find_delimiter(delimiter, first)
    lines = itertools.chain([first], lines)
    reader = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True)
    try:
        for name in columns:
            if name not in (reader.fieldnames or ()):
                problem = f"has no column {name!r} among {reader.fieldnames}"
                raise UserError(f"{path} {problem}: see --...-column(s) and --delimiter")
        for row in reader:
            if None in row or None in row.values():  # how DictReader marks too many, too few
                problem = f"not a cell for each column: quote the cells with {delimiter!r}"
                raise UserError(f"{path} line {reader.line_num}: {problem}")
            yield reader.line_num, [row[name].strip() for name in columns]
    except csv.Error as error:
        problem = f"{error}: correct its quotes, or give --delimiter"
        raise UserError(f"{path} line {reader.line_num}: {problem}") from error


def read_interactions(settings):
    """Yield the rows for `index_interactions` of the table. Raises UserError with the line."""
    path = settings.interactions
    columns = [settings.user_column, settings.item_column]
    if settings.time_column:
        columns.append(settings.time_column)
    for line, (user, item, *time_cell) in read_table(path, columns, settings.delimiter):
        if len(user.split()) != 1 or len(item.split()) != 1:
            problem = f"ids {user!r}, {item!r}: one is empty or has white space: put _ there"
            raise UserError(f"{path} line {line}: {problem}")
        when = line
        if time_cell:
            try:
                when = parse_time(time_cell[0])
            except ValueError as error:
                problem = f"{time_cell[0]!r} is no number or date like 2024-05-31: mend it"
                raise UserError(f"{path} line {line}: {problem}") from error
        yield user, item, when, line


def read_items(settings, known):
    """Yield the rows of texts.jsonl of the table of items. Raises UserError with the line.

    known: the set of item ids that have interactions; other items are left out, and counted.
    """
    columns = [settings.item_column, *settings.text_columns.split(",")]
    left_out = 0
    for _, (item, *cells) in read_table(settings.items, columns, settings.delimiter):
        if item not in known:
            left_out += 1
            continue
        texts = [" ".join(clean(cell)) for cell in cells]
        yield {"item": item, "title": texts[0], "text": join_sentences(texts)}
    print(f"{settings.items}: {left_out:,} line(s) of items without interactions left out")


def prepare(settings):
    """Write the dataset folder of two tables. Raises UserError, or OSError for a missing file."""
    if not (settings.interactions and settings.items):
        raise UserError("a table is missing: give --interactions FILE and --items FILE")
    os.stat(settings.items)  # miss it now, not after the other table was read
    log = index_interactions(read_interactions(settings))
    write_dataset(settings.out, log.sequences(), read_items(settings, set(log.item_ids)))


def main(argv=None):
    return run_command(argv, __doc__, tables=(TablesSettings, prepare))


if __name__ == "__main__":
    sys.exit(main())
