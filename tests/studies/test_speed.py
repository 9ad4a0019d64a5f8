"""The speed study runs and writes what it says; its figures are not judged here."""

import concurrent.futures
import contextlib
import dataclasses
import json
import math
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import model
import saerec
from conftest import copy_run
from sae import load_intents
from studies import speed
from studies.sampled import SampledLoss

CPU = torch.device("cpu")
KEYS = {"name", "value", "unit", "against", "ratio"}


def settings_of(run):
    return speed.SpeedSettings(run=str(run), quick=True, device="cpu")


def make_small(patch):
    """Models and products of a size for tests; patch: a MonkeyPatch."""
    made = model.ModelSettings

    def small_settings(**flags):
        return made(**dict(width=8, history=6, batch=24) | flags)

    patch.setattr(speed, "ModelSettings", small_settings)
    real = speed.product_rate
    patch.setattr(speed, "product_rate", lambda device, *size: real(device, 32, 32, 32))


@pytest.fixture
def small(monkeypatch):
    make_small(monkeypatch)


@pytest.fixture(scope="module")
def recommender(tiny_run):
    """Rows of this part on the tiny run."""
    with pytest.MonkeyPatch.context() as patch:
        make_small(patch)
        return speed.measure("recommender", settings_of(tiny_run))


def test_negatives_stand_beside_all(tiny_run, small):
    *rows, peak = speed.measure("negatives", settings_of(tiny_run))
    names = [f"tiny: SASRec, {negatives} negatives, 2 epochs" for negatives in ("all", 256)]
    assert [row["name"] for row in rows] == names
    assert all(0 < row["value"] <= 1 and row["unit"] == "NDCG@10" for row in rows)
    assert peak["name"] == "peak memory of negatives"


def test_all_models_stand_beside_the_loop(recommender):
    *rows, peak = recommender
    assert all(row.keys() == KEYS and row["value"] >= 0 for row in recommender)
    assert peak["name"] == "peak memory of recommender" and 0.05 < peak["value"] < 10
    value = {row["name"]: row["value"] for row in rows if row["against"] != "time / floor"}
    assert "tiny: loop over prefixes, SAERec" in value
    for name in ("SASRec", "SAERec", "Grounded", "Grounded, 256 negatives"):
        assert f"tiny: {name}" in value
        floor = f"tiny: {name}, floor by the catalogue's products"
        [ratio] = [row["ratio"] for row in rows if row["name"] == floor]
        assert ratio > 0
    for name in ("SASRec", "SAERec", "Grounded"):
        assert f"tiny: full ranking of 24 users, {name}" in value


@pytest.mark.parametrize("matched", [False, True], ids=["alone", "with the match"])
def test_all_products_of_the_loss_are_counted(matched, monkeypatch):
    """Scores, and the gradients of both sides: three products of P x V x D."""
    u, table, target = torch.randn(70, 4), torch.randn(11, 4), torch.randint(0, 11, (70,))
    monkeypatch.setattr(model, "CHUNK", 33)  # in three chunks
    match = (torch.zeros(70, 2), lambda rows: torch.zeros(len(rows), 12)) if matched else ()

    def loss():
        model.CrossEntropy.apply(u, table, target, torch.ones(70), *match)

    assert speed.product_flops(loss) == 3 * 2 * 70 * 11 * 4


def test_the_authors_figure_stands_beside_their_data_alone(
    recommender, tiny_run, small, monkeypatch
):
    authors = "authors' SAERec, 490 s on AVX2"
    assert not any(row["against"] == authors for row in recommender)
    data = dataclasses.replace(saerec.run_dataset(tiny_run), folder=Path("data/beauty"))
    monkeypatch.setattr(speed, "run_dataset", lambda *_: data)
    rows = speed.measure("recommender", settings_of(tiny_run))
    assert sum(row["against"] == authors for row in rows) == 4
    for row in rows:
        if row["against"] == authors:
            assert row["ratio"] == pytest.approx(490 / row["value"], rel=0.2)  # rounded for people


def trainers(run, *kinds, **flags):
    """A trainer of SAERec of each kind, on a run's data."""
    data = saerec.run_dataset(run)
    intents = load_intents(run, data)
    flags = dict(history=6, width=8, dropout=0.0) | flags
    return [kind("saerec", data, intents, CPU, **flags) for kind in kinds]


def test_the_loop_over_prefixes_does_what_one_pass_does(tiny_run):
    """An epoch in one batch has the same gradients, and both learn by them."""
    ours, loop = both = trainers(tiny_run, speed.Trainer, speed.PrefixTrainer)
    for trainer in both:
        assert len(trainer.parts) == 1
        before = trainer.model.item.weight.clone()
        trainer.step()
        assert not torch.equal(before, trainer.model.item.weight)
    for p, q in zip(ours.model.parameters(), loop.model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_a_prefix_is_what_the_pass_sees_at_its_end(tiny_run):
    """All prefixes, cut out as the loop pads them, against positions of one pass."""
    ours, loop = trainers(tiny_run, speed.Trainer, speed.PrefixTrainer)
    table = loop.model.eval().item_table()
    found = []
    for part in loop.parts:
        items = loop.padded(part)
        for (begin, length), row in zip(part.tolist(), items):
            wanted = loop.flat[begin : begin + length]
            assert torch.equal(row[:length], wanted) and not row[length:].any()
            found.append((begin, length))
    wanted = []
    for begin, length in zip(ours.rows.begin.tolist(), ours.rows.length.tolist()):
        wanted += [(begin, n) for n in range(1, length + 1)]
    assert sorted(found) == sorted(wanted)
    begin = int(ours.rows.begin[0])
    length = int(ours.rows.length[0])
    whole = ours.flat[begin : begin + length][None]
    one_pass = loop.model(whole, F.embedding(whole, table), torch.arange(length)).u
    for n in range(1, length + 1):
        row = loop.padded(torch.tensor([[begin, n]]))
        state = loop.model(row, F.embedding(row, table), torch.tensor([n - 1]))
        torch.testing.assert_close(state.u[0], one_pass[n - 1])


def test_sampled_softmax_is_timed_where_it_is_asked_for(tiny_run):
    [whole] = trainers(tiny_run, speed.Trainer)
    [sampled] = trainers(tiny_run, speed.Trainer, negatives=5)
    assert whole.loss is model.catalogue_loss
    assert isinstance(sampled.loss, SampledLoss) and len(sampled.loss.draw()) == 5


def test_each_way_of_waiting_has_a_row_idle_and_beside_a_neighbour(tiny_run, monkeypatch):
    """Each in a process that got its own value, and one on one thread."""
    monkeypatch.setattr(speed, "SPINS", (7,))
    monkeypatch.setattr(speed.concurrent.futures, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(speed, "idle_and_busy", lambda _, threads: {"work": spins_and(threads)})
    monkeypatch.setenv("GOMP_SPINCOUNT", "1000")
    rows = [tuple(row.values()) for row in speed.measure_busy(settings_of(tiny_run), CPU)]
    assert rows == [
        ("work, 7 spins", 7.0, "s", "", None),
        ("work, 7 spins, a busy neighbour", 14.0, "s", "idle", 2.0),
        ("work, one thread", 1001.0, "s", "", None),
        ("work, one thread, a busy neighbour", 2002.0, "s", "idle", 2.0),
    ]
    assert not list(speed.measure_busy(settings_of(tiny_run), torch.device("cuda")))


def spins_and(threads):
    told = threads + int(os.environ["GOMP_SPINCOUNT"])
    return told, 2 * told


class InThisProcess(contextlib.nullcontext):
    """Stands for a pool of processes."""

    def __init__(self, *_, **__):
        super().__init__(self)

    def submit(self, function, *arguments):
        future = concurrent.futures.Future()
        future.set_result(function(*arguments))
        return future


def test_a_busy_neighbour_computes_and_ends_with_the_measurement():
    with speed.busy_neighbour() as neighbour:
        assert neighbour.poll() is None
    assert neighbour.poll() is not None
    with pytest.raises(KeyError):
        with speed.busy_neighbour() as neighbour:
            raise KeyError
    assert neighbour.poll() is not None


def test_an_epoch_and_the_sae_are_timed_idle_and_busy(tiny_run, small):
    measured = speed.idle_and_busy(settings_of(tiny_run), 0)
    assert list(measured) == ["tiny: an epoch of SASRec", "100 steps of the SAE, M=1024"]
    assert all(seconds > 0 for both in measured.values() for seconds in both)


@pytest.mark.parametrize("latents", [16, 256], ids=["few latents", "many latents"])
def test_the_dense_formulation_is_the_same_autoencoder(latents):
    """Equal losses and gradients, so that only the way there is timed."""
    x = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    ours = speed.SaeTrainer(latents, 3, x)
    dense = speed.DenseTrainer(latents, 3, x)
    torch.testing.assert_close(ours.loss(), dense.loss())
    ours.backward()
    dense.backward()
    for p, q in zip(ours.sae.parameters(), dense.sae.parameters()):
        torch.testing.assert_close(p.grad, q.grad)
    before = ours.sae.W_dec.clone()
    ours.step()
    assert not torch.equal(before, ours.sae.W_dec)
    torch.testing.assert_close(ours.sae.W_dec.norm(dim=1), torch.ones(latents))


def test_flops_of_an_epoch_are_those_of_its_products(tiny_run):
    """SASRec without layers' products would have the scores' alone: here, at least these."""
    data = saerec.run_dataset(tiny_run)
    trainer = speed.Trainer("sasrec", data, None, CPU, width=8, history=6, batch=10_000)
    assert len(trainer.parts) == 1
    positions = int(trainer.rows.length.sum())
    scores = 3 * 2 * positions * (len(data.items) - 1) * 8  # and both gradients
    assert scores < trainer.epoch_flops() < 100 * scores


def test_medians_take_turns():
    said = []
    taken = speed.medians(3, lambda: said.append("a"), lambda: said.append("b"))
    assert said == ["a", "b"] * 4 and len(taken) == 2 and min(taken) >= 0


def test_product_rate_counts_the_gradients_products(monkeypatch):
    monkeypatch.setattr(speed, "medians", lambda repeats, function: [function() or 2.0])
    assert speed.product_rate(CPU, 2, 3, 5) == 3 * 2 * 2 * 3 * 5 / 2


def test_synthetic_data_is_of_the_size_asked_for():
    data, intents = speed.synthetic(7, 5, length=4, intents=6, codes=2)
    assert len(data.users) == 7 and len(data.flat) == 28
    assert 1 <= data.flat.min() and data.flat.max() <= 5
    assert data.held_out("test").tolist() == list(range(3, 28, 4))
    assert intents.codes.indptr.tolist() == [0, 0, 2, 4, 6, 8, 10]
    assert intents.codes.columns == len(intents.vectors) == 6


def test_growth_is_a_slope(monkeypatch):
    """An epoch whose time is users times the root of items."""
    monkeypatch.setattr(speed, "epoch_seconds", lambda users, items, device: users * items**0.5)
    monkeypatch.setattr(speed, "train_sae", lambda x, held_out, settings: None)
    users, items, texts = speed.measure_growth(settings_of("none"), CPU)
    assert (users["value"], items["value"]) == (1.0, 0.5)
    assert math.isfinite(texts["value"])


def test_seconds_to_a_goal_are_read_from_the_logs(tmp_path, tiny_run):
    run = copy_run(tiny_run, tmp_path / "run")
    curves = {"sasrec": (0.05, 0.10, 0.09), "saerec": (0.02, 0.03, 0.04), "grounded": (0.096, 0.2)}
    for name, curve in curves.items():
        lines = [{"epoch": n, "seconds": 2.5, "valid_NDCG@10": v} for n, v in enumerate(curve, 1)]
        saerec.write_table(run / f"{name}_log.csv", lines)
    rows = list(speed.measure_training(settings_of(run), CPU))
    said = {row["name"]: (row["value"], row["against"]) for row in rows}
    goal = "to validation NDCG@10 0.0950"
    assert said == {
        f"tiny: SASRec {goal}": (5.0, "epoch 2 of 3"),
        f"tiny: Grounded {goal}": (2.5, "epoch 1 of 2"),
    }
    (run / "sasrec_log.csv").unlink()
    assert not list(speed.measure_training(settings_of(run), CPU))


def test_command_without_defaults():
    settings = speed.SpeedSettings(run="runs/beauty", only="sae,growth", quick=True, out="o")
    said = "python studies/speed.py --run runs/beauty --only sae,growth --quick"
    assert speed.command_of(settings) == said
    assert speed.command_of(speed.SpeedSettings()) == "python studies/speed.py"


def test_a_system_that_does_not_tell_how_much_memory(tiny_run, small, monkeypatch, capsys):
    """Windows has no module resource: the other rows are there, and that one is missed aloud."""
    monkeypatch.setitem(sys.modules, "resource", None)
    rows = speed.measure("negatives", settings_of(tiny_run))
    assert rows and not any("peak memory" in row["name"] for row in rows)
    assert "peak memory of negatives: not measured" in capsys.readouterr().err


def test_what_is_written(tmp_path, tiny_run, capsys, monkeypatch):
    """Of a part that only reads logs, and so has no memory of its own."""
    monkeypatch.setattr(speed.concurrent.futures, "ProcessPoolExecutor", InThisProcess)
    out = tmp_path / "results" / "speed.json"
    flags = ["--only", "training", "--device", "cpu", "--out", str(out)]
    assert speed.main(["--run", str(tiny_run), *flags]) == 0
    report = json.loads(out.read_text())
    assert report.keys() == {"machine", "torch", "commit", "command", "rows"}
    assert report["rows"] == speed.measure("training", settings_of(tiny_run))
    assert not any("peak memory" in row["name"] for row in report["rows"])
    said = capsys.readouterr().out
    for row in report["rows"]:
        assert row["name"] in said and row["against"] in said


def test_parts_that_cannot_be_measured(tmp_path, tiny_run, fails, monkeypatch):
    out = ["--out", tmp_path / "speed.json"]
    known = ", ".join(speed.PARTS)
    fails(speed.main, ["--run", tiny_run, "--only", "sae,speed", *out], "no part 'speed'", known)
    missing = ["--run", tmp_path / "none", "--only", "training", *out]
    fails(speed.main, missing, "embeddings.safetensors is missing")  # said by the other process

    def killed(*arguments):
        raise concurrent.futures.process.BrokenProcessPool

    monkeypatch.setattr(concurrent.futures.ProcessPoolExecutor, "submit", killed)
    fails(speed.main, ["--run", tiny_run, "--only", "sae", *out], "--only sae", "memory runs out")
    assert not (tmp_path / "speed.json").exists()


def test_a_machine_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert speed.current_commit() == ""


def test_rows_in_words():
    said = speed.in_words(speed.row("steps", 1234.5678, "steps/s", "dense", 2.34567))
    assert said.split() == ["steps", "1,235", "steps/s", "dense:", "2.35"]
    assert speed.in_words(speed.row("peak", 0.5, "GiB")).split() == ["peak", "0.5", "GiB"]


def test_a_million_items_in_small(monkeypatch, small):
    real = speed.synthetic
    monkeypatch.setattr(speed, "synthetic", lambda users, items: real(20, 30, intents=6))
    assert speed.epoch_seconds(500, 500, CPU) > 0
    epoch, ranking = speed.measure_million(speed.SpeedSettings(), CPU)
    assert epoch["against"] == "200 interactions" and epoch["unit"] == "s per epoch"
    assert ranking["unit"] == "users/s" and min(epoch["value"], ranking["value"]) > 0
    assert not list(speed.measure_million(settings_of("none"), CPU))
