"""Other libraries beside ours: the protocol, the numbers of items, refusals. None is installed."""

import contextlib
import io
import json
import os
import stat
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import embed
import model
import saerec
from conftest import copy_run
from studies import peer, speed

CPU = torch.device("cpu")
SIZES = dict(width=8, history=6)
FAKES = {  # a sentence encoder that counts letters, and a library that is broken
    "sentence_transformers/__init__.py": """
import numpy as np
class SentenceTransformer:
    def __init__(self, folder, device):
        print("loaded from", folder)
    def encode(self, texts, show_progress_bar, normalize_embeddings):
        counts = np.array([[text.count(letter) for letter in "aeio"] for text in texts], float)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)
""",
    "sentence_transformers-1.2.dist-info/METADATA": "Name: sentence-transformers\nVersion: 1.2\n",
    "recbole/__init__.py": "raise RuntimeError('no compiler for recbole')",
    "recbole-0.1.dist-info/METADATA": "Name: recbole\nVersion: 0.1\n",
}


def settings_of(run, **more):
    return speed.SpeedSettings(run=str(run), quick=True, device="cpu", **more)


@pytest.fixture(scope="module")
def recommenders(tiny_run):
    """Ours and the loop over prefixes on the tiny run, each in its process, small."""
    made = model.ModelSettings
    data = saerec.run_dataset(tiny_run)
    with contextlib.ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(speed, "ModelSettings", lambda: made(**SIZES))
            workers = speed.start_recommenders(settings_of(tiny_run), data, stack)
        yield workers


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    """PYTHONPATH leads processes to the fake libraries."""
    for name, content in FAKES.items():
        path = tmp_path / "fakes" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fakes"), prepend=os.pathsep)


def test_both_loops_see_the_same_positions(recommenders, tiny_run):
    """All training interactions of a user but the first are a target, once."""
    ours, loop = recommenders
    data = saerec.run_dataset(tiny_run)
    targets = len(data.training_items()) - len(data.users)
    assert ours.facts["positions"] == loop.facts["positions"] == targets
    assert ours.facts["unit"] == "positions"
    assert loop.facts["unit"] == "rows" and loop.facts["size"] == 256
    assert ours.process.pid != loop.process.pid


def test_ours_in_its_process_learns_what_it_learns_here(recommenders, tiny_run):
    """Epoch after epoch the same validation NDCG@10 as model.py logs, also from the start again."""
    ours = recommenders[0]
    data = saerec.run_dataset(tiny_run)
    settings = model.ModelSettings(run=str(tiny_run), model="sasrec", epochs=2, **SIZES)
    trained, log = model.train_model(model.new_model(model.SASRec, settings, data), data)
    for _ in range(2):
        ours.ask("steps", count=3)
        ours.ask("anew")
        for line in log:
            ours.ask("epoch")
            assert speed.validation_ndcg(ours, data) == pytest.approx(line["valid_NDCG@10"])


def test_vectors_rank_as_the_model_does(recommenders, tiny_run):
    ours = recommenders[0]
    data = saerec.run_dataset(tiny_run)
    ours.ask("anew")
    settings = model.ModelSettings(run=str(tiny_run), model="sasrec", device="cpu", **SIZES)
    fresh = model.new_model(model.SASRec, settings, data).eval()
    wanted = saerec.rank_users(model.model_scores(fresh, data, "valid"), data, "valid")
    ours.ask("vectors")
    states = ours.read("states", len(data.users))
    table = ours.read("table", len(data.items))
    assert table[0].isnan().all() and table[1:].isfinite().all()
    scores = states @ table.nan_to_num().T
    found = saerec.rank_users(lambda users: scores[users], data, "valid")
    assert torch.equal(found, wanted)


def test_what_is_measured(recommenders, tiny_run, monkeypatch, capsys):
    """Seconds and memory of each, beside ours; a goal only where the run has a training curve."""
    monkeypatch.setattr(speed, "start_recommenders", lambda *_: recommenders)
    rows = speed.measure("peers", settings_of(tiny_run))
    ours, loop, our_memory, loop_memory, *goals = rows
    assert ours["name"].startswith("tiny: SASRec, ") and ours["ratio"] == 1
    assert "loop over prefixes" in loop["name"] and "batches of 256 rows" in loop["name"]
    assert ours["against"] == loop["against"]  # which has the positions of an epoch
    assert our_memory["unit"] == loop_memory["unit"] == "GiB"
    assert 0.05 < our_memory["value"] < 3
    assert [row["unit"] for row in goals] == ["s", "s"]
    assert not any("peak memory of peers" in row["name"] for row in rows)


def test_no_goal_without_a_training_curve(recommenders, tiny_run, tmp_path, monkeypatch, capsys):
    run = copy_run(tiny_run, tmp_path / "run")
    (run / "sasrec_log.csv").unlink()
    monkeypatch.setattr(speed, "start_recommenders", lambda *_: recommenders)
    monkeypatch.setattr(speed.Worker, "ask", lambda self, what, **more: None)  # no memory either
    rows = list(speed.measure_peers(settings_of(run), CPU))
    assert [row["unit"] for row in rows] == ["s per epoch", "s per epoch"]
    said = capsys.readouterr().err
    assert "no sasrec_log.csv" in said and "does not tell" in said


def test_training_to_a_goal_keeps_to_the_budget(tiny_run, monkeypatch):
    data = saerec.run_dataset(tiny_run)
    asked = []
    worker = SimpleNamespace(name="SASRec of X", ask=asked.append)

    def measured(curve, epoch=1.0, budget=3):
        left = iter(curve)
        asked.clear()
        monkeypatch.setattr(speed, "validation_ndcg", lambda worker, data: next(left))
        return speed.measure_goal(worker, epoch, 0.5, budget, data)

    reached = measured([0.1, 0.6, 0.7])
    assert reached["against"] == "epoch 2" and asked == ["anew", "epoch", "epoch"]
    assert reached["name"] == "tiny: SASRec of X to validation NDCG@10 0.5000"
    monkeypatch.setattr(speed.time, "perf_counter", iter(range(100)).__next__)  # 1 s per epoch
    given_up = measured([0.1, 0.3, 0.2, 0.9])
    assert given_up["against"] == "not reached in 3 epochs: 0.3000, --budget 3"
    assert given_up["value"] == 3
    untried = measured([], epoch=7.0)
    assert untried["against"] == "not tried: one epoch, --budget 3"
    assert untried["value"] == 7 and not asked


class Stub(peer.Recommender):
    """Three batches an epoch; an item's vector is a one-hot row, a state that of the last item."""

    unit = "rows"

    def read(self):
        self.done = []

    def restart(self):
        self.done.clear()
        names = np.array(["PAD", 4, 1, 3], dtype=object)  # its items 1 to 3; it has not seen 2
        of_rectools = SimpleNamespace(get_external_sorted_by_internal=lambda: names)
        self.preparator = SimpleNamespace(item_id_map=of_rectools)
        self.data = SimpleNamespace(field2id_token={"item_id": names.astype(str)})
        one_hot = torch.eye(4)
        self.model = self.Model(one_hot)

    class Model(torch.nn.Module):
        def __init__(self, table):
            super().__init__()
            self.item_embedding = SimpleNamespace(weight=table)
            self.item_model = SimpleNamespace(get_all_embeddings=lambda: table)

        def encode_sessions(self, batch, table):
            return table[batch["x"]]

        def forward(self, items, length):
            return self.item_embedding.weight[items[torch.arange(len(items)), length - 1]]

    def facts(self):
        return self.counted(list(self.batches()), 5, 2)

    def batches(self):
        return iter("abc")

    def step(self, batch):
        self.done.append(batch)


@pytest.fixture
def stub(tmp_path):
    (tmp_path / "training.txt").write_text("1 3\n4\n1 4 1 3 4\n")
    return dict(folder=str(tmp_path), threads=1, settings=dict(history=3), items=4, dataset="")


@pytest.mark.parametrize("Library", [peer.RecTools, peer.RecBole])
def test_a_librarys_own_numbers_become_ours(stub, tmp_path, Library):
    """Whose state is that of the last item scores that item highest, in our numbers."""
    borrowed = dict(states=Library.states, items=Library.items, external=Library.external)
    made = type("Stubbed", (Stub,), borrowed)(**stub)
    assert made.internal().tolist() == [0, 2, 0, 3, 1]
    made.vectors()
    states = np.fromfile(tmp_path / "states", np.float32).reshape(3, 4)
    table = np.fromfile(tmp_path / "table", np.float32).reshape(5, 4)
    assert np.isnan(table).all(1).tolist() == [True, False, True, False, False]
    assert np.nan_to_num(states @ np.nan_to_num(table).T).argmax(1).tolist() == [3, 4, 4]
    made.model.item_embedding.weight[2, 0] = torch.inf
    with pytest.raises(FloatingPointError, match="diverged"):
        made.vectors()


def test_histories_are_padded_on_the_side_asked_for(stub):
    made = Stub(**stub)
    rows = [[1, 2], [5, 6, 7, 8]]
    assert made.padded(rows, left=False).tolist() == [[1, 2, 0], [6, 7, 8]]
    assert made.padded(rows, left=True).tolist() == [[0, 1, 2], [6, 7, 8]]
    assert made.lengths(rows).tolist() == [2, 3]


def test_questions_and_answers(stub, monkeypatch):
    """Steps go on from epoch to epoch; an epoch has every batch once; anew starts again."""
    monkeypatch.setitem(peer.KINDS, "stub", Stub)
    asked = [dict(do="start", kind="stub", **stub), dict(do="steps", count=4), dict(do="memory")]
    answers = io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "set_num_threads", lambda count: None)
        peer.serve(map(json.dumps, asked), answers)
    facts, none, memory = map(json.loads, answers.getvalue().splitlines())
    assert facts == dict(batches=3, positions=5, size=2, unit="rows")
    assert none is None and memory > 0.05
    made = Stub(**stub)
    made.steps(4)
    made.steps(1)
    assert made.done == ["a", "b", "c", "a", "b"]
    made.anew()
    made.steps(1)
    made.epoch()
    assert made.done == ["a", "a", "b", "c"]


class SmallBert:
    """One layer, vectors that count letters as the fake library does."""

    heads = 2
    words = torch.zeros(5, 4)

    def __init__(self):
        sizes = [(12, 4), (4, 4), (16, 4), (4, 16)]
        qkv, mix, widen, narrow = ((torch.ones(*size), None) for size in sizes)
        self.layers = [(qkv, mix, None, widen, narrow, None)]

    def __call__(self, ids, lengths):
        counts = torch.stack([(ids == letter).sum(1) for letter in (1, 2, 3, 4)], 1)
        return torch.nn.functional.normalize(counts.float(), dim=1)


class Letters:
    """Tokens of a text: its a, e, i and o."""

    pad = 0
    most = 100

    def __call__(self, text):
        return ["aeio".index(letter) + 1 for letter in text if letter in "aeio"]


def test_the_encoder_beside_another_in_its_own_environment(tiny_run, fakes, monkeypatch):
    """Found by its Python; that it makes the same vectors is measured."""
    monkeypatch.setattr(embed, "fetch_weights", lambda: "weights")
    monkeypatch.setattr(embed, "load_encoder", lambda weights, device: (Letters(), SmallBert()))
    settings = settings_of(tiny_run, peers=sys.executable)
    rows = list(speed.measure_embed(settings, CPU))
    assert [row["unit"] for row in rows] == ["texts/s", "texts/s", "millionths"] * 2
    for floor, ours, difference in (rows[:3], rows[3:]):
        assert floor["against"] == "time / floor" and floor["ratio"] > 0
        assert ours["against"] == "sentence-transformers 1.2" and ours["ratio"] > 0
        assert difference["value"] < 1
    alone = list(speed.measure_embed(settings_of(tiny_run), CPU))
    assert [row["unit"] for row in alone] == ["texts/s"] * 4


def test_the_floor_has_the_products_of_a_forward_pass(monkeypatch):
    """FLOPs worked by hand, of batches [2, 3] and [1, 5], E = 4, wide 16, 2 heads."""
    products = speed.encoder_products(SmallBert(), [(2, 3), (1, 5)])
    with speed.FlopCounterMode(display=False) as counter:
        products()
    tokens = 2 * 3 + 5
    linear = 2 * tokens * (4 * 12 + 4 * 4 + 4 * 16 + 16 * 4)
    attention = 2 * 2 * 4 * (2 * 3 * 3 + 5 * 5)  # similarities, then the mix; both of width 4
    assert counter.get_total_flops() == linear + attention


def test_libraries_are_told_before_one_that_breaks_is_imported(fakes, stub, tmp_path, monkeypatch):
    """What it raises ends the process, and so comes last on its stderr."""
    monkeypatch.syspath_prepend(tmp_path / "fakes")
    asked = [dict(do="libraries"), dict(do="start", kind="recbole", **stub)]
    answers = io.StringIO()
    with pytest.raises(RuntimeError, match="no compiler for recbole"):
        peer.serve(map(json.dumps, asked), answers)
    assert json.loads(answers.getvalue()) == dict(recbole="0.1", sentence_transformers="1.2")


def write_program(path, line):
    """A program of one line of the shell, in place of a Python -> its path."""
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_a_library_that_breaks_is_one_sentence(tmp_path):
    line = "printf 'Traceback:\\n  in read\\nRuntimeError: no compiler for recbole\\n' >&2"
    broken = str(write_program(tmp_path / "python", line))
    with speed.Worker(broken, "SASRec of RecBole 0.1") as worker:
        with pytest.raises(saerec.UserError) as raised:
            worker.start("recbole", settings={}, items=2, dataset="")
    said = str(raised.value)
    assert "RecBole 0.1 ended at 'start' (RuntimeError: no compiler for recbole)" in said
    assert broken in said and "\n" not in said


def test_peers_that_cannot_be_measured(tmp_path, tiny_run, fails):
    own = ["--run", tiny_run, "--only", "peers", "--out", tmp_path / "speed.json"]
    fails(speed.main, own, "--only peers", "without --peers")
    lost = tmp_path / "no" / "python"
    fails(speed.main, [*own, "--peers", lost], f"--peers {lost} is no program")
    script = write_program(tmp_path / "script", "echo not JSON")
    fails(speed.main, [*own, "--peers", script], script, "not JSON", "leave it out")
    script.write_text("#!/no/such/interpreter\n")
    fails(speed.main, [*own, "--peers", script], f"--peers {script} does not run")
    write_program(script, "echo '{}'")
    fails(speed.main, [*own, "--peers", script], script, "has no RecTools")
    other = ["--run", tiny_run, "--only", "sae", "--out", tmp_path / "speed.json"]
    fails(speed.main, [*other, "--peers", sys.executable], "--peers changes nothing")
    fails(speed.main, [*other, "--budget", "60"], "--budget changes nothing")
    assert not (tmp_path / "speed.json").exists()


def test_peers_are_measured_where_they_are_named():
    assert "peers" not in speed.chosen_parts(speed.SpeedSettings())
