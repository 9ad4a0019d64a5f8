"""The Makefile: run folders, and what is made again when flags or data change."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {
    name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "OMP_", "JOBS"))
}
# Stands for every stage: writes what it is asked for, with the words of its command, and says so
STAGE = """#!/bin/sh
words="$*"; script=$1; shift
[ "$script" = -c ] && echo "$1" | grep -q torch.get_num_threads && { echo $THREADS; exit; }
case "$*" in *"--model "*) model=$(echo "$*" | sed -E 's/.*--model ([a-z]+).*/\\1/');; esac
while [ $# -gt 0 ]; do case $1 in --run) run=$2;; esac; shift; done
case $script in
  embed.py | sources/bert.py) file=embeddings.safetensors;;
  sae.py) file=intents.jsonl;;
  model.py) file=$model.safetensors;;
  eval.py) file=metrics.json;;
  tools/report.py) file=report.html;;
esac
mkdir -p $run; echo "$words" > $run/$file; echo "MADE $run/$file"
"""


@pytest.fixture
def project(tmp_path):
    """A copy of the Makefile beside scripts that only say what they would make."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    (tmp_path / "tools").mkdir()
    for name in ("saerec.py", "embed.py", "sae.py", "model.py", "eval.py", "tools/report.py"):
        (tmp_path / name).touch()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(STAGE)
    python.chmod(0o755)
    (tmp_path / ".venv" / "ready").touch()
    for shop in ("shopA", "shopB"):
        (tmp_path / "data" / shop).mkdir(parents=True)
        (tmp_path / "data" / shop / "sequences.txt").write_text(f"ann {shop} b c\n")
        (tmp_path / "data" / shop / "texts.jsonl").write_text("{}\n")

    def make(*words):
        pipes = dict(cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)
        done = subprocess.run(["make", "all", *words], **pipes)
        assert done.returncode == 0, done.stderr
        return re.findall("^MADE (.*)$", done.stdout, re.M)

    make.folder = tmp_path
    return make


NAMES = ["embeddings.safetensors", "intents.jsonl", "sasrec.safetensors", "saerec.safetensors"]
NAMES += ["grounded.safetensors", "metrics.json", "report.html"]


def test_every_stage_is_made_once(project):
    assert sorted(project("DATA=data/shopA/")) == sorted(f"runs/shopA/{name}" for name in NAMES)
    assert project("DATA=data/shopA/") == []
    assert len(project("DATA=data/shopB/")) == 7  # a run of its own, whatever the slash
    assert project("DATA=data/shopB") == []
    assert project("DATA=data/shopA/") == []
    assert len(project("DATA=data/shopA", "SEED=1")) == 7
    assert (project.folder / "runs" / "shopA-seed1" / "report.html").is_file()


def test_two_stages_at_a_time_share_the_threads(project, monkeypatch):
    """SASRec needs no intents: it is trained beside the SAE. What the user sets stays."""
    meet = """
case "$words" in *sasrec*) me=a; other=b;; sae.py*) me=b; other=a;; *) me=;; esac
if [ "$me" ]; then
  touch $run/$me; n=0
  while [ ! -e $run/$other ] && [ $n -lt 100 ]; do sleep .1; n=$((n + 1)); done
  [ $n -lt 100 ] && echo "MADE $me beside $other with $OMP_NUM_THREADS threads"
fi
"""
    python = project.folder / ".venv" / "bin" / "python"
    python.write_text(STAGE.replace("mkdir -p $run;", f"mkdir -p $run\n{meet}\n"))
    monkeypatch.setitem(ENVIRONMENT, "THREADS", "8")
    met = {f"{a} beside {b} with 8 threads" for a, b in ("ab", "ba")}
    assert met < set(project("DATA=data/shopA"))
    monkeypatch.setitem(ENVIRONMENT, "OMP_NUM_THREADS", "3,2")
    assert {line.replace("8", "3,2") for line in met} < set(project("DATA=data/shopB"))


@pytest.mark.parametrize("jobs, alone, beside", [(2, "unset xterm", "8 dumb"), (1,) + ("unset xterm",) * 2])
def test_only_stages_side_by_side_share_threads_and_screen(project, monkeypatch, jobs, alone, beside):
    """embed.py comes first, and has all."""
    monkeypatch.setitem(ENVIRONMENT, "THREADS", "8")
    monkeypatch.setitem(ENVIRONMENT, "TERM", "xterm")
    python = project.folder / ".venv" / "bin" / "python"
    python.write_text(STAGE.replace("MADE $run/$file", "MADE ${OMP_NUM_THREADS-unset} $TERM"))
    assert project("DATA=data/shopA", f"JOBS={jobs}") == [alone] + [beside] * (len(NAMES) - 1)


@pytest.mark.parametrize("jobs, threads, share", [(2, 1, 1), (2, 3, 1), (3, 16, 5)])
def test_the_share_of_a_stage(jobs, threads, share):
    said = re.search(r"^SHARE += (.*)$", (ROOT / "Makefile").read_text(), re.M)[1]
    said = said.replace("torch.get_num_threads()", str(threads)).replace("$(JOBS)", str(jobs))
    assert eval(said) == share


@pytest.mark.parametrize("jobs", ["0", "x", "", "4"])
def test_jobs_that_cannot_be(project, jobs):
    pipes = dict(cwd=project.folder, env=ENVIRONMENT, capture_output=True, text=True)
    done = subprocess.run(["make", "all", f"JOBS={jobs}"], **pipes)
    assert done.returncode == 2 and "make it 1, 2 or 3" in done.stderr and not done.stdout


def test_changed_flags_make_again_what_depends_on_them(project):
    project("DATA=data/shopA")
    made = project("DATA=data/shopA", "GROUNDED_FLAGS=--match 1")
    assert made == [f"runs/shopA/{n}" for n in ("grounded.safetensors", "metrics.json", "report.html")]
    assert project("DATA=data/shopA", "GROUNDED_FLAGS=--match 1") == []
    made = project("DATA=data/shopA")  # and back
    assert f"runs/shopA/{NAMES[4]}" in made and len(made) == 3
    made = project("DATA=data/shopA", "SAE_FLAGS=--active 4")
    assert {Path(name).name for name in made} == set(NAMES) - {NAMES[0], NAMES[2]}


def test_changed_data_are_noticed_by_content(project):
    project("DATA=data/shopA")
    file = project.folder / "data" / "shopA" / "sequences.txt"
    os.utime(file)
    assert project("DATA=data/shopA") == []  # touched, not changed
    times = file.stat()
    file.write_text("ann x y z\n")
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert len(project("DATA=data/shopA")) == 7  # changed, not touched


@pytest.mark.parametrize(
    "folder",
    ["a b", "mine(1)", "it's", "a&b", "a;b", "a:b", "50%", "shop//", "a#b", "a$$b", "a`b", "a[1]"],
)
def test_paths_that_make_or_the_shell_would_misread(project, folder):
    """Which otherwise ends in their words, or in a run that other data have."""
    flags = ["make", "all", f"DATA=data/{folder}"]
    pipes = dict(cwd=project.folder, env=ENVIRONMENT, capture_output=True, text=True)
    done = subprocess.run(flags, **pipes)
    assert done.returncode == 2 and "rename the folder, link to it" in done.stderr
    assert not done.stdout and not (project.folder / "runs").exists()


@pytest.mark.parametrize("folder", ["a,b", "a=b", "gr\u00fcn", "a@b.c_d-e+f~g"])
def test_paths_with_other_characters(project, folder):
    shutil.copytree(project.folder / "data" / "shopA", project.folder / "data" / folder)
    assert len(project(f"DATA=data/{folder}")) == 7 and project(f"DATA=data/{folder}") == []


def test_help_lists_every_target_in_a_group():
    out = subprocess.run(["make", "help"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    listed = re.findall(r"^  ([a-z-]+) ", out.stdout, re.M)
    targets = re.findall(r"^([a-z-]+):.*## (?:run|measure|look): ", (ROOT / "Makefile").read_text(), re.M)
    assert set(targets) <= set(listed) and len(targets) >= 10
    groups = [line for line in out.stdout.splitlines() if line in ("run", "measure", "look")]
    assert groups == ["run", "measure", "look"]


@pytest.mark.parametrize("between", [" ", "="])
def test_changed_embeddings_made_elsewhere_are_noticed(project, between):
    (project.folder / "mine.safetensors").write_text("one")
    flags = ["DATA=data/shopA", f"EMBED_FLAGS=--embeddings{between}mine.safetensors"]
    assert len(project(*flags)) == 7 and project(*flags) == []
    (project.folder / "mine.safetensors").write_text("two")
    assert len(project(*flags)) == 7


def test_another_encoder(project):
    """It has no seed, and is noticed wherever in its folder something changes."""
    sources, encoder = project.folder / "sources", project.folder / "mine"
    sources.mkdir()
    (sources / "bert.py").touch()
    files = ["modules.json", "1_Pooling/config.json"]
    files += [f"0_Transformer/{file}" for file in ("model.safetensors", "vocab.txt", "config.json")]
    for file in files:
        (encoder / file).parent.mkdir(parents=True, exist_ok=True)
        (encoder / file).touch()
    flags = ["DATA=data/shopA", "EMBED=sources/bert.py", "EMBED_FLAGS=--weights mine"]
    assert len(project(*flags)) == 7
    said = (project.folder / "runs/shopA/embeddings.safetensors").read_text()
    assert said.startswith("sources/bert.py") and "--weights mine" in said and "--seed" not in said
    for file in files:
        assert project(*flags) == []
        (encoder / file).write_text("changed")
        assert len(project(*flags)) == 7, file
    for script in ("embed.py", "sources/bert.py"):
        (project.folder / script).write_text("# changed")
        os.utime(project.folder / script, (4e9, 4e9))  # later than all that was made
        assert len(set(project(*flags))) == 7, script
        os.utime(project.folder / script, (1e9, 1e9))
