"""What the encoders beside embed.py refuse alike."""

import pytest

from conftest import copy_run, write_dataset
from sources import bert, lsa


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
