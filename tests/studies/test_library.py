"""The study of the library: each kind of SAE trains in its way, and every way can be set."""

import json

import torch

import sae
from conftest import copy_run
from studies import library


def test_ways_are_compared_with_three_seeds(tmp_path, tiny_run, monkeypatch):
    """One of each kind of SAE: the other ways differ from these in settings alone."""
    names = ("random rows", "+ average (default)", "default, encoder L2 0.1")
    some = {name: library.WAYS[name] for name in names}
    assert {way[0] for way in some.values()} == {way[0] for way in library.WAYS.values()}
    monkeypatch.setattr(library, "WAYS", some)
    run = copy_run(tiny_run, tmp_path / "run", "embeddings.safetensors")
    small = dict(steps=20, batch=16, active=3, members=2, min_items=2, held_out=0.2)
    small = sae.SaeSettings(run=str(run), **small)
    monkeypatch.setattr(library, "SaeSettings", lambda **more: small)
    assert library.main(["--run", str(run)]) == 0
    report = json.loads((run / "library.json").read_text())
    assert [row["way"] for row in report["rows"]] == list(names)
    for row in report["rows"]:
        assert 0 < row["fvu"] < 2 and 0 < row["kept"] <= 64
        assert 0.99 > row["mean_cosine"] >= row["matched_cosine"] - 1e-6 > -1  # of other seeds


def test_every_way_changes_settings_that_there_are():
    """Others are a TypeError."""
    for _, times, changes in library.WAYS.values():
        assert times > 0 and sae.SaeSettings(**changes)


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
