"""What README and docs/ say holds of the code: their commands parse, what they name exists."""

import dataclasses
import importlib
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

import saerec

ROOT = Path(__file__).resolve().parent.parent
FIVE = [importlib.import_module(name) for name in ("saerec", "embed", "sae", "model", "eval")]
GENERATED = "<!-- Written by `python studies/docs.py`"  # their commands are of older commits
CHECKS = ("check_model", "check_embed", "check_options")  # of settings that don't go together


def read_pages():
    """README and the pages of docs/ that are written by hand -> {file name: text}."""
    paths = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    pages = {path.name: path.read_text("utf-8") for path in paths}
    return {name: text for name, text in pages.items() if GENERATED not in text}


PAGES = read_pages()
START = r"^ +(?:torchrun [^\n]* -- |python )"  # of an indented line
COMMANDS = [
    pytest.param(command, id=f"{name}: {command[:60]}")
    for name, text in PAGES.items()
    for command in dict.fromkeys(re.findall(START + r"((?:\w+/)?\w+\.py\b.*)$", text, re.M))
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_names_a_script_and_settings_that_are_allowed(command, monkeypatch):
    script, *words = shlex.split(command, comments=True)
    folder = (ROOT / script).parent
    if not folder.is_dir():
        pytest.skip(f"no {folder.name}/")
    assert (ROOT / script).is_file()
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))

    def only_parse(argv, doc, **commands):
        return saerec.parse(argv, doc, commands)

    monkeypatch.setattr(module, "run_command", only_parse)
    settings, function = module.main(words)
    assert dataclasses.is_dataclass(settings) and callable(function)
    for check in CHECKS:
        if hasattr(module, check):
            getattr(module, check)(settings)


def exists(name):
    """Whether one of the five scripts has this function, class, or Class.method."""
    owner, _, method = name.partition(".")
    found = [getattr(module, owner) for module in FIVE if hasattr(module, owner)]
    return any(not method or hasattr(one, method) for one in found)


def test_the_equations_of_readme_name_what_exists():
    named = re.findall(r"^ +\(S?\d+\) .*  (\S+(?:, \S+)*)$", PAGES["README.md"], re.M)
    assert len(named) >= 12
    for name in ", ".join(named).split(", "):
        assert exists(name), name


def test_the_lines_that_matter_of_the_class_exist():
    """The first column of the table in docs/class.md."""
    named = re.findall(r"^\| `([\w.]+)` \| \w+\.py \|", PAGES.get("class.md", ""), re.M)
    assert len(named) >= 12 or "class.md" not in PAGES
    for name in named:
        assert exists(name), name


def test_the_makefile_calls_scripts_with_settings_that_they_have(monkeypatch):
    """Every target's commands, as make would run them, parse."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    environment["OMP_NUM_THREADS"] = "1"  # else make asks torch, which takes a while
    targets = ["all", "planted", "ablate", "interpret", "steer", "speed", "report", "docs"]
    command = ["make", "-n", "--always-make", *targets]
    out = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True).stdout
    called = set(re.findall(r"^\S*python ((?:\w+/)?\w+\.py .*)$", out, re.M))
    assert len(called) >= 8
    for line in called:
        script, *words = shlex.split(line)
        if not (ROOT / script).is_file():
            continue  # a copy without sources/, studies/ and tools/
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        parse = lambda argv, doc, **commands: saerec.parse(argv, doc, commands)  # noqa: E731
        monkeypatch.setattr(module, "run_command", parse)
        assert dataclasses.is_dataclass(module.main(words)[0]), line
