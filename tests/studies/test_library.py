"""The studies of the library: every way trains, and what is drawn is the run's own."""

import json

import pytest
import torch

import sae
import saerec
from conftest import copy_run
from eval import read_intents
from studies import library, sample


def test_every_way_is_compared_with_three_seeds(tmp_path, tiny_run, monkeypatch):
    run = copy_run(tiny_run, tmp_path / "run", "embeddings.safetensors")
    small = dict(steps=20, batch=16, active=3, members=2, min_items=2, held_out=0.2)
    small = sae.SaeSettings(run=str(run), **small)
    monkeypatch.setattr(library, "SaeSettings", lambda **more: small)
    assert library.main(["--run", str(run)]) == 0
    report = json.loads((run / "library.json").read_text())
    assert [row["way"] for row in report["rows"]] == list(library.WAYS)
    for row in report["rows"]:
        assert 0 < row["fvu"] < 2 and 0 < row["kept"] <= 64
        assert row["mean_cosine"] >= row["matched_cosine"] - 1e-6 > -1


def test_random_start_keeps_its_rows():
    net = library.RandomStart(8, 2, 6)
    before = net.W_enc.detach().clone()
    net.start(torch.randn(30, 6), torch.Generator())
    assert torch.equal(net.W_enc, before)


def test_decay_pulls_every_row_of_the_encoder():
    """d/dW of .1 mean_j |W_j|^2 is .2 W / M, for latents that don't fire too."""
    grads = []
    for Model in (sae.SAE, library.Decaying):
        net = Model(8, 2, 6)
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
        net.loss(x, net.encode(x), torch.zeros(0).long(), sae.SaeSettings(auxk=0))[0].backward()
        grads.append(net.W_enc.grad)
    torch.testing.assert_close(grads[1] - grads[0], 0.2 * net.W_enc.detach() / 8)


@pytest.mark.parametrize("count", [3, 1000])
def test_intents_are_drawn_once_each(tmp_path, tiny_run, count):
    run = copy_run(tiny_run, tmp_path / "run")
    out = tmp_path / "copy.json"
    assert sample.main(["--run", str(run), "--count", str(count), "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    rows = {row["label"]: row for row in read_intents(run)}
    labels = [row["label"] for row in report["drawn"]]
    assert len(labels) == len(set(labels)) == min(count, len(rows))
    titles = saerec.run_dataset(run).titles
    for row in report["drawn"]:
        assert row["keywords"] == rows[row["label"]]["keywords"]
        assert set(row["items"]) <= set(titles)
