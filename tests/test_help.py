"""Every script of the project runs from anywhere and says how it is called."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from saerec import HERE as ROOT

FOLDERS = ("", "sources", "studies", "tools")
FOUND = [path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.py"))]
SOURCES = {path: path.read_text(encoding="utf-8") for path in FOUND}
SCRIPTS = [path for path, code in SOURCES.items() if "run_command" in code and "__main__" in code]
# Each script runs in a child of one process: torch, which all want, is then imported once
FORK = """
import os, runpy, sys
import torch
for number, script in enumerate(sys.argv[1:]):
    child = os.fork()
    if not child:
        for pipe in (1, 2):
            os.dup2(os.open(f"{number}.{pipe}", os.O_WRONLY | os.O_CREAT), pipe)
        sys.argv = [script, "--help"]
        sys.path[0] = os.path.dirname(script)  # as if it were called by name
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            sys.stdout.flush()
            os._exit(end.code or 0)  # at once: to take torch down takes half a second
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def helped(tmp_path_factory):
    """What `--help` of each script prints, and its exit status, in a folder that is not theirs."""
    folder = tmp_path_factory.mktemp("elsewhere")
    command = [sys.executable, "-c", FORK, *map(str, SCRIPTS)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    status = map(int, done.stdout.split())
    pipes = [[(folder / f"{n}.{pipe}").read_text() for pipe in (1, 2)] for n in range(len(SCRIPTS))]
    return {
        script: SimpleNamespace(code=code, out=out, err=err)
        for script, code, (out, err) in zip(SCRIPTS, status, pipes, strict=True)
    }


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_help_from_anywhere(script, helped):
    done = helped[script]
    assert (done.code, done.err) == (0, "")
    assert f"python {script.relative_to(ROOT)}" in done.out and "-h, --help" in done.out


def test_all_scripts_are_found():
    """Of a copy without the other folders, the five."""
    found = {folder: sum(path.parent == ROOT / folder for path in SCRIPTS) for folder in FOLDERS}
    assert found[""] == 5
    for folder, least in {"sources": 6, "studies": 14, "tools": 4}.items():
        assert found[folder] >= least or not (ROOT / folder).is_dir()
