"""A tiny dataset whose items have two kinds of text, and its run through every stage, shared by the tests."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import saerec  # noqa: E402, F401  before torch, as in the scripts

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

TOPICS = {"space": "rocket planet orbit astronaut", "cooking": "recipe oven butter kitchen", "music": "guitar melody concert singer"}


def write_dataset(folder, users=24, items=30):
    """Users who stay within a topic mostly; item i's text has three of its topic's words."""
    topics, known = list(TOPICS), set()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "sequences.txt", "w") as f:
        for u in range(users):
            row = [(u + 3 * step * (1 + u % 4)) % items if step % 5 else (u * 7 + step) % items for step in range(5 + u % 7)]
            f.write(f"u{u} " + " ".join(f"i{i}" for i in dict.fromkeys(row)) + "\n")
            known.update(row)
    with open(folder / "texts.jsonl", "w") as f:
        for i in sorted(known):
            words = TOPICS[topics[i % 3]].split()
            text = f"A thing about {topics[i % 3]}: {words[i % 4]} and {words[(i + 1) % 4]}, {words[(i // 3) % 4]}, number {i // 6}"
            f.write(json.dumps({"item": f"i{i}", "text": text, "title": f"Thing {i}"}) + "\n")
    return folder


SMALL = {
    "embed": "--encoder lsa --lsa-width 8",
    "sae": "--latents 16 --active 3 --steps 150 --batch 16 --min-items 2 --held-out 0.2",
    "model": "--epochs 3 --width 8 --batch 24 --history 6",
}


def make_run(data, run, sae="", model="", stages="embed sae sasrec model eval", seed=0):
    """Run the stages on a dataset folder with settings for seconds; every stage must succeed."""
    import embed, eval, model as recommender, sae as autoencoder

    common = ["--run", str(run), "--seed", str(seed), "--device", "cpu"]
    command = {
        "embed": (embed.main, ["--data", str(data), *SMALL["embed"].split()]),
        "sae": (autoencoder.main, [*SMALL["sae"].split(), *sae.split()]),
        "sasrec": (recommender.main, ["--intents", "none", *SMALL["model"].split()]),
        "model": (recommender.main, [*SMALL["model"].split(), *model.split()]),
        "eval": (eval.main, []),
    }
    for stage in stages.split():
        main, arguments = command[stage]
        assert main([*arguments, *common]) == 0, stage
    return run


def copy_run(run, to, names="*"):
    """A copy of a finished run, or of some of its files, to write into."""
    to.mkdir(parents=True)
    for path in run.glob(names):
        (to / path.name).write_bytes(path.read_bytes())
    return to


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny")


@pytest.fixture(scope="session")
def tiny_run(tiny_data, tmp_path_factory):
    """A finished run on the tiny dataset; tests must not write into it."""
    return make_run(tiny_data, tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def fails(capsys):
    """fails(main, argv, *words): the command ends with status 2 and one sentence on stderr that holds every word."""

    def check(main, argv, *words):
        capsys.readouterr()
        assert main([str(a) for a in argv]) == 2
        error = capsys.readouterr().err.strip()
        assert error.count("\n") == 0 and "Traceback" not in error, error
        for word in words:
            assert str(word) in error, (word, error)
        return error

    return check
