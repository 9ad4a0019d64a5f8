"""What the sources share: ties in time, and writing a dataset folder."""

import hashlib

import pytest

import saerec
from conftest import text, write_folder
from sources import common

# An accident of file order must not become a signal


def test_ties_are_ordered_by_a_hash_by_hand():
    digest = hashlib.blake2b(b"ann i7", digest_size=8).hexdigest()
    assert common.hash_order("ann", "i7") == int(digest, 16)


def test_the_share_of_ties_is_kept_and_shown(tmp_path, capsys, fails):
    sequences = [("ann", ["a", "b", "c"]), ("bob", ["b", "c", "a"])]
    rows = [dict(item="a", text="text")]
    common.write_dataset(tmp_path / "d", sequences, rows, dict(ties=1, pairs=4))
    assert "25.0% of neighbouring interactions have the same time" in capsys.readouterr().out
    assert saerec.main(["check", str(tmp_path / "d")]) == 0
    assert "25.0% of neighbouring" in capsys.readouterr().out
    common.write_dataset(tmp_path / "d", sequences, rows)  # from a source without times
    assert "neighbouring" not in capsys.readouterr().out
    (tmp_path / "d" / "ties.json").write_text("[]")
    fails(saerec.main, ["check", tmp_path / "d"], "ties.json", "delete it")


def test_a_dataset_that_cannot_be_is_not_written(tmp_path):
    """What lay there stays, byte for byte."""
    folder = write_folder(tmp_path / "d", "ann a b c\n", text("a"))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(saerec.UserError, match=f"{folder}/texts.jsonl line 1.*'zoo'"):
        common.write_dataset(folder, [("bob", ["a", "b", "c"])], [dict(item="zoo", text="x")])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_separators_that_are_no_line_ends_stay_in_their_text(tmp_path):
    """str.splitlines would cut at each of them, the files are cut at line feeds alone."""
    odd = "one\x85two\u2028three\x1cfour\x0bfive"
    rows = [{"item": "a", "text": odd}, {"item": "b", "text": "plain"}]
    sequences = [("ann", ["a", "b", "c"])]
    data = common.write_dataset(tmp_path / "d", sequences, rows)
    assert data.texts == [odd, "plain"]
