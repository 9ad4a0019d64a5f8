"""The benchmark runs and writes what it says; its figures are not judged here."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import model
import saerec

SPEC = importlib.util.spec_from_file_location("bench", Path(__file__).resolve().parent.parent / "benchmarks" / "bench.py")
bench = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(bench)


@pytest.mark.parametrize("part", ["recommender", "training", "negatives"])
def test_parts_print_rows(tiny_run, capsys, part):
    bench.main(["--run", str(tiny_run), "--quick", "--device", "cpu", "--part", part])
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert rows and all(row.keys() == {"name", "value", "unit", "against", "ratio"} and row["value"] >= 0 for row in rows)


def test_the_loop_over_prefixes_does_what_one_pass_does(tiny_run):
    """Both train the same number of targets in an epoch."""
    data, device = saerec.run_dataset(tiny_run), torch.device("cpu")
    library = model.load_library(tiny_run, data)
    flags = dict(paper=True, history=6, dropout=0.0)
    ours, loop = (kind(data, library, flags, device) for kind in (bench.Trainer, bench.PrefixTrainer))
    assert sum(len(part) for part in loop.parts) == int(ours.rows.length.sum())
    before = loop.net.item.weight.clone()
    loop.step()
    assert not torch.equal(before, loop.net.item.weight)
