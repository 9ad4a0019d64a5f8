"""torchrun with two processes gives what one process gives for the same global batch."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import model
import sae
import saerec
from conftest import SMALL, copy_run

ROOT = Path(__file__).resolve().parent.parent


def torchrun(*arguments):
    """Run a script in two processes over gloo on this machine."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def compare(one, two, name, tolerance):
    a, b = (saerec.load_artifact(run / name, "")[0] for run in (one, two))
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(b[key], a[key], atol=tolerance, rtol=1e-3, msg=lambda text: f"{key}: {text}")


@pytest.mark.parametrize("flags", ["", "--paper"])
def test_model(tmp_path, tiny_run, flags):
    """Dropout is off, since processes draw their own; the moving averages of --paper are summed over processes too."""
    one, two = copy_run(tiny_run, tmp_path / "one"), copy_run(tiny_run, tmp_path / "two")
    settings = [*SMALL["model"].split(), "--dropout", "0", "--seed", "3", "--device", "cpu", *flags.split()]
    assert model.main(["--run", str(one), *settings]) == 0
    out = torchrun(ROOT / "model.py", "--run", two, *settings)
    assert len(re.findall("best epoch", out)) == 1  # the second process is silent
    compare(one, two, "model.safetensors", 1e-4)
    first, second = ([line.split(",")[2:] for line in (run / "log.csv").read_text().splitlines()[1:]] for run in (one, two))
    for a, b in zip(first, second, strict=True):
        assert [float(x) for x in a] == pytest.approx([float(x) for x in b], rel=1e-3)


def test_sae(tmp_path, tiny_run):
    one, two = copy_run(tiny_run, tmp_path / "one"), copy_run(tiny_run, tmp_path / "two")
    settings = [*SMALL["sae"].split(), "--steps", "60", "--dead-after", "0.3", "--batch", "15", "--device", "cpu"]
    assert sae.main(["--run", str(one), *settings]) == 0
    torchrun(ROOT / "sae.py", "--run", two, *settings)
    compare(one, two, "sae.safetensors", 1e-4)
    log = (two / "sae_log.csv").read_text().splitlines()
    assert any(float(line.split(",")[-1]) > 0 for line in log[1:])  # auxk had dead latents to revive


def test_more_processes_than_rows(tmp_path, tiny_run):
    """A batch of one row leaves a process idle, which takes part with no position."""
    one, two = copy_run(tiny_run, tmp_path / "one"), copy_run(tiny_run, tmp_path / "two")
    settings = [*SMALL["model"].split(), "--dropout", "0", "--batch", "1", "--epochs", "1", "--negatives", "8", "--device", "cpu"]
    assert model.main(["--run", str(one), *settings]) == 0
    torchrun(ROOT / "model.py", "--run", two, *settings)
    compare(one, two, "model.safetensors", 1e-4)
