"""Each tool is a script to run from the repository's root; docs/tools.md says what is true."""

import dataclasses
import importlib
import re
import shlex
import subprocess
import sys

import pytest

from saerec import HERE
from tools import label

NAMES = ("recommend", "steer", "label", "report")
DOC = HERE / "docs" / "tools.md"
TEXT = DOC.read_text(encoding="utf-8")
SCRIPTS = [(HERE / "tools" / f"{name}.py").read_text(encoding="utf-8") for name in NAMES]
FOUND = [re.findall(r"^ +python (tools/\w+\.py .*)", text, re.M) for text in (TEXT, *SCRIPTS)]
COMMANDS = sorted({re.split(r"  +", command)[0] for found in FOUND for command in found})


@pytest.mark.parametrize("name", NAMES)
def test_script(name, tmp_path):
    script = HERE / "tools" / f"{name}.py"
    command = [sys.executable, script, "--help"]
    help = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert help.returncode == 0, help.stderr
    assert f"python tools/{name}.py" in help.stdout and "--run" in help.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_ones_the_scripts_know(command, monkeypatch):
    """Every command in the docs and the docstrings parses, with settings that are allowed."""
    script, *words = shlex.split(command)
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    real = module.run_command
    called = []

    def only_parse(argv, doc, **commands):
        commands = {name: (Settings, called.append) for name, (Settings, _) in commands.items()}
        return real(argv, doc, **commands)

    monkeypatch.setattr(module, "run_command", only_parse)
    assert module.main(words) == 0
    assert len(called) == 1 and dataclasses.is_dataclass(called[0])


def test_every_tool_is_in_the_docs():
    for name in NAMES:
        assert any(command.startswith(f"tools/{name}.py") for command in COMMANDS)
        assert f"python tools/{name}.py --run" in TEXT


def test_the_prompt_in_the_docs_is_the_one_that_is_asked():
    quoted = "\n".join(f"    {line}" for line in label.LABEL_PROMPT.splitlines())
    assert f"\n\n{quoted}\n\n" in TEXT


def test_the_docs_are_short():
    lines = TEXT.splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 100
