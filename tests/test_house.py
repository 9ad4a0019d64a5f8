"""The house: who may import whom, what no file may do, and that the five scripts stand alone."""

import ast
import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch

import saerec
from conftest import word_vectors, write_dataset

ROOT = Path(__file__).resolve().parent.parent
FIVE = ("saerec", "embed", "sae", "model", "eval")
FOLDERS = ("sources", "studies", "tools")
MAY_IMPORT = {  # besides the standard library, numpy, torch and safetensors
    "saerec": set(),
    "embed": {"saerec"},
    "sae": {"saerec", "embed"},
    "model": {"saerec", "sae"},
    "eval": {"saerec", "sae", "model"},
    "sources": {*FIVE, "sources"},
    "studies": {*FIVE, "studies", "sources.planted"},
    "tools": {*FIVE, "tools", "sources.bert"},
}
PACKAGES = {"numpy", "torch", "safetensors"}
MEASURED_AGAINST = {"peer": {"rectools", "pandas", "recbole", "sentence_transformers"}}  # elsewhere
FILES = [*(ROOT / f"{name}.py" for name in FIVE), *(p for f in FOLDERS for p in (ROOT / f).glob("*.py"))]


@functools.cache
def tree_of(path):
    """A file's syntax tree, which tests must not change."""
    return ast.parse(path.read_text())


def imported(path):
    """The modules that a file imports, wherever in it -> set of str."""
    found = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, path
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_import_graph(path):
    """saerec <- embed <- sae <- model <- eval; the folders look at the five, never back."""
    owner = path.stem if path.parent == ROOT else path.parent.name
    allowed = MAY_IMPORT[owner]
    for name in imported(path):
        top = name.split(".")[0]
        if top in FIVE:
            assert top in allowed, (path, name)
        elif top in FOLDERS and name != top:
            module = ".".join(name.split(".")[:2])
            assert top in allowed or module in allowed, (path, name)
        else:
            known = PACKAGES | sys.stdlib_module_names | MEASURED_AGAINST.get(path.stem, set())
            assert top in known | set(FOLDERS), (path, name)
            assert top != "sources" or owner in FOLDERS, (path, name)


@pytest.mark.parametrize("path", [*(ROOT / "tools").glob("*.py")], ids=lambda path: path.stem)
def test_tools_run_without_sources(path):
    """A tool imports from there within the function that cannot do without, never at its start."""
    for node in tree_of(path).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert "sources" not in ast.unparse(node)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_pickle_no_eval_and_no_bare_except(path):
    forbidden = ("torch.save", "torch.load", "np.load", "numpy.load", "eval", "exec")
    for node in ast.walk(tree_of(path)):
        where = f"{path.name} line {getattr(node, 'lineno', '')}"
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert "pickle" not in ast.unparse(node), where
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, where
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in forbidden, where


def test_the_five_scripts_stand_alone(tmp_path):
    """A copy without sources/, studies/ and tools/ runs `make all`, less its report, and core tests."""
    copy = tmp_path / "copy"
    copy.mkdir()
    for name in (*(f"{name}.py" for name in FIVE), "Makefile", "README.md", "requirements.txt"):
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "tests", copy / "tests", ignore=shutil.ignore_patterns(*FOLDERS, "__pycache__"))
    (copy / ".venv" / "bin").mkdir(parents=True)
    (copy / ".venv" / "bin" / "python").symlink_to(sys.executable)
    (copy / ".venv" / "ready").touch()
    write_dataset(copy / "data" / "tiny", users=40)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    ours = (ROOT, ROOT / "tests")  # of which the copy must take nothing
    packages = [path for path in sys.path if path and Path(path).resolve() not in ours]
    environment |= {"PYTHONPATH": os.pathsep.join(packages), "OMP_NUM_THREADS": "1"}
    pipes = dict(cwd=copy, env=environment, capture_output=True, text=True)
    vectors = copy / "vectors.safetensors"
    texts = saerec.load_dataset(copy / "data" / "tiny").texts
    safetensors.torch.save_file({"embeddings": word_vectors(texts)}, vectors)
    flags = ["SAE_FLAGS=--latents 16 --active 3 --members 2 --steps 50 --min-items 2 --batch 16"]
    flags += ["MODEL_FLAGS=--epochs 1 --width 8", f"EMBED_FLAGS=--embeddings {vectors}"]
    flags += ["SAEREC_FLAGS=--personal 3 --public 2"]
    done = subprocess.run(["make", "all", "DATA=data/tiny", *flags], **pipes)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (copy / "runs" / "tiny" / "metrics.json").is_file()
    assert not (copy / "runs" / "tiny" / "report.html").exists()
    # Every core test is imported, which shows what it needs of the project; a few quick ones run
    quick = ["-k", "causality or padding", "--assert=plain"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "tests", *quick]
    done = subprocess.run(command, **pipes)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout
