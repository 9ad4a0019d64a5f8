"""Each source is a script to run from the repository's root, or from anywhere."""

import subprocess
import sys

import pytest

from conftest import copy_run, write_dataset
from saerec import HERE
from sources import bert, lsa


@pytest.mark.parametrize("name", ["amazon", "movielens", "tables", "planted", "lsa", "bert"])
def test_script(name, tmp_path):
    script = HERE / "sources" / f"{name}.py"
    help = subprocess.run(
        [sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert help.returncode == 0, help.stderr
    assert f"python sources/{name}.py" in help.stdout and "--" in help.stdout


@pytest.mark.parametrize("module", [bert, lsa])
def test_the_run_of_another_dataset_is_refused(module, fails, tiny_data, tiny_run, tmp_path):
    """Nor is a file taken for a run's that cannot be read; the script is named that makes it."""
    name = f"sources/{module.__name__.split('.')[-1]}.py"
    run = copy_run(tiny_run, tmp_path / "run")
    more = ["--weights", "FOLDER"] if module is bert else []
    other = write_dataset(tmp_path / "other", users=25)
    argv = ["--run", run, *more]
    fails(module.main, ["--data", other, *argv], f"{run} is the run of {tiny_data}", "RUN=")
    path = run / "embeddings.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    fails(module.main, ["--data", tiny_data, *argv], f"{path} is corrupt", name)
