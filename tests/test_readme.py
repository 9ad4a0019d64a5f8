"""What README says must be true of the code."""

import dataclasses
import importlib
import io
import json
import re
import shlex
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("saerec", "embed", "sae", "model", "eval")
TEXTS = {path.name: path.read_text() for path in [ROOT / "README.md", *(ROOT / f"{name}.py" for name in SCRIPTS)]}
COMMANDS = sorted({line.strip() for text in TEXTS.values() for line in re.findall(r"^ +python (\w+\.py [^#\n]*)", text, re.M)})


def code_lines(source):
    """Lines that hold code: no blank lines, comments or docstrings."""
    lines, ignored = set(), (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        docstring = token.type == tokenize.STRING and token.line.strip().startswith(('"""', 'r"""'))
        if token.type not in ignored and not docstring:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_are_ones_the_scripts_know(command, monkeypatch):
    """Every command in README and the docstrings parses, with settings that are allowed."""
    script, *words = shlex.split(re.split(r"  +", command)[0])
    module, called = importlib.import_module(script.removesuffix(".py")), []

    def only_parse(argv, doc, **commands):
        return real_run(argv, doc, **{name: (settings, called.append) for name, (settings, _) in commands.items()})

    real_run = module.run
    monkeypatch.setattr(module, "run", only_parse)
    assert module.main(words) == 0
    assert len(called) == 1 and dataclasses.is_dataclass(called[0])


def test_line_counts():
    for name in SCRIPTS:
        stated = int(re.search(rf"\[{name}\.py\]\({name}\.py\) \| (\d+) \|", TEXTS["README.md"])[1])
        assert stated == code_lines(TEXTS[f"{name}.py"]), name


def test_functions_named_in_readme_exist():
    named = re.findall(r"^    \(S?\d+\) .*  ([\w., ]+)$", TEXTS["README.md"], re.M)
    assert len(named) >= 12
    modules = [importlib.import_module(name) for name in SCRIPTS]
    for name in re.split(r", ", ", ".join(named)):
        owner, _, method = name.strip().partition(".")
        found = [getattr(module, owner) for module in modules if hasattr(module, owner)]
        assert found and (not method or hasattr(found[0], method)), name


def test_makefile_targets_are_listed_by_help():
    out = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.M):
        assert re.search(rf"^{target} ", out, re.M)


def test_the_prompt_in_readme_is_the_one_that_is_asked():
    prompt = importlib.import_module("sae").LABEL_PROMPT
    assert "\n".join(f"    {line}" for line in prompt.strip().splitlines()) in TEXTS["README.md"]


def test_committed_results_are_those_of_readme():
    """The tables of ablations and interpretability are those of results/, verdicts too; the bench's table is that of benchmarks/results.json."""
    ablations, interpreted = (sorted((ROOT / "results").glob(f"{kind}_*.json")) for kind in ("ablation", "interpret"))
    assert {path.stem.partition("_")[2] for path in ablations + interpreted} == {"scientific", "beauty", "planted"}
    for path in ablations:
        report = json.loads(path.read_text())
        for row in report["rows"]:
            cell = row["NDCG@10"]
            assert f"| {row['name']} | {cell['mean']:.4f} ± {cell['std']:.4f} |" in TEXTS["README.md"], (path, row["name"])
        assert report["verdict"] in TEXTS["README.md"]
    for path in interpreted:
        report = json.loads(path.read_text())
        for label in report["labels"].values():
            assert f"{label['median']:.2f}, {label['above_08']:.0%} of {label['intents']:,} " in TEXTS["README.md"], path
        for row in report.get("recovery", []):
            assert f"| {row['method']} | {row['K'] or ''} | {row['M']} | {row['recovered']:.0%} | {row['mean_cosine']:.2f} |" in TEXTS["README.md"]
    for row in json.loads((ROOT / "benchmarks" / "results.json").read_text())["rows"]:
        value = f"{row['value']:,.0f}" if row["value"] >= 100 else f"{row['value']:.3g}"
        assert f"| {row['name']} | {value} | {row['unit']} |" in TEXTS["README.md"]
