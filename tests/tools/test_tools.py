"""docs/tools.md, and what the tools say of themselves, is true of the tools."""

import dataclasses
import importlib
import re
import shlex

import pytest

from saerec import HERE
from tools import label, report, steer

NAMES = ("recommend", "steer", "label", "report")
DOC = HERE / "docs" / "tools.md"
TEXT = DOC.read_text(encoding="utf-8")
SCRIPTS = [(HERE / "tools" / f"{name}.py").read_text(encoding="utf-8") for name in NAMES]
FOUND = [re.findall(r"^ +python (tools/\w+\.py .*)", text, re.M) for text in SCRIPTS]
COMMANDS = sorted({re.split(r"  +", command)[0] for found in FOUND for command in found})


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_ones_the_scripts_know(command, monkeypatch):
    """Every command in a docstring parses; test_docs_commands has those of docs/tools.md."""
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
        assert f"python tools/{name}.py --run" in TEXT


def test_the_messages_in_the_docs_are_those_of_label_py():
    table = TEXT.partition("| message |")[2].partition("\n\n")[0]
    messages = re.findall(r"^\| ([^|]+?) \|", table, re.M)
    source = (HERE / "tools" / "label.py").read_text(encoding="utf-8")
    assert len(messages) > 5
    assert all(part in source for message in messages for part in message.split("; "))
    assert "`LABEL_PROMPT`" in TEXT and label.LABEL_PROMPT


def test_the_figures_in_the_docs_are_those_of_the_tools():
    assert f"the densest {report.ReportSettings.intents:,} intents" in TEXT
    assert f"more than two answers, and more than {label.MOST_ALIKE:.0%}, give one name" in TEXT
    assert f"{steer.SteerSettings.users:,} users (or all)" in TEXT


def test_the_docs_are_short():
    lines = TEXT.splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 100
