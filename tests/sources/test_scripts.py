"""Each source is a script to run from the repository's root, or from anywhere."""

import subprocess
import sys

import pytest

from saerec import HERE


@pytest.mark.parametrize("name", ["amazon", "movielens", "tables", "planted", "lsa", "bert"])
def test_script(name, tmp_path):
    script = HERE / "sources" / f"{name}.py"
    help = subprocess.run(
        [sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert help.returncode == 0, help.stderr
    assert f"python sources/{name}.py" in help.stdout and "--" in help.stdout
