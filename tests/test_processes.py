"""Two processes, as torchrun starts them, give what one process gives for the same global batch."""

import json
import re

import pytest
import torch

import embed
import model
import sae
import saerec
from conftest import SMALL, copy_run, two_processes

# Commands one after the other: to start a process takes longer than they do
RUNS = """
import importlib, json, sys
sys.path.insert(0, "")
import saerec, torch
leave = saerec.leave
saerec.leave = int  # which would end the process after the first
torch.distributed.init_process_group()
torch.distributed.init_process_group = int  # once
for script, *words in json.loads(sys.argv[1]):
    assert importlib.import_module(script).main(words) == 0
leave(0)
"""
MODEL = f"model {SMALL['model']} --dropout 0"  # since processes draw units of their own
CASES = {
    "grounded": f"{MODEL} --seed 3",
    "saerec": f"{MODEL} --model saerec {SMALL['saerec']} --seed 3",
    "one row": f"{MODEL} --batch 1 --epochs 1",
    "sae": f"sae {SMALL['sae']} --steps 60 --dead-after 0.3 --batch 15",
}


def compare(one, two, name):
    a, b = (saerec.load_artifact(run / name, "")[0] for run in (one, two))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(b[key], a[key], atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_run):
    """What one process trained and two, by torchrun -> {case: (run, run, what the two printed)}."""
    folder = tmp_path_factory.mktemp("processes")
    runs = {}
    commands = []
    for case, flags in CASES.items():
        runs[case] = [copy_run(tiny_run, folder / case / n) for n in ("one", "two")]
        script, *words = f"{flags} --device cpu --run".split()
        main = dict(model=model, sae=sae)[script].main
        assert main([*words, str(runs[case][0])]) == 0
        commands.append([script, *words, str(runs[case][1])])
    (folder / "runs.py").write_text(RUNS)
    out = two_processes(folder / "runs.py", json.dumps(commands), torchrun=True)
    printed = re.split("(?<=done in )", out)
    return {case: (*runs[case], said) for case, said in zip(CASES, printed)}


@pytest.mark.parametrize("name", ["grounded", "saerec"])
def test_model(trained, name):
    """SAERec's moving averages are summed too."""
    one, two, out = trained[name]
    assert len(re.findall(r"best \w+ epoch", out)) == 1  # the second process is silent
    compare(one, two, f"{name}.safetensors")
    logs = ((run / f"{name}_log.csv").read_text().splitlines()[1:] for run in (one, two))
    for a, b in zip(*logs, strict=True):
        numbers = [[float(x) for x in line.split(",")[2:]] for line in (a, b)]
        assert numbers[0] == pytest.approx(numbers[1], rel=1e-3)


def test_sae(trained):
    """Each process trains the same SAE; the first writes it."""
    one, two, _ = trained["sae"]
    compare(one, two, "sae.safetensors")
    compare(one, two, "intents.safetensors")
    log = (two / "sae_log.csv").read_text().splitlines()
    assert any(float(line.split(",")[-1]) > 0 for line in log[1:])  # auxk had latents to revive


def test_more_processes_than_rows(trained):
    """A batch of one row leaves a process idle, which takes part with no position."""
    one, two, _ = trained["one row"]
    compare(one, two, "grounded.safetensors")


def test_a_late_process_leaves_what_the_first_has_written(tmp_path, tiny_run, monkeypatch):
    run = copy_run(tiny_run, tmp_path / "run")
    data = saerec.run_dataset(run)
    (run / "vocabulary.safetensors").write_bytes(b"words")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    monkeypatch.setenv("RANK", "1")
    settings = embed.EmbedSettings(run=str(run))
    embed.save_embeddings(settings, data, torch.zeros(len(data.texts), 8), {"name": "late"})
    assert before == {path.name: path.read_bytes() for path in run.iterdir()}
