"""A tiny dataset whose items have three kinds of text, and its run through every stage."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import saerec  # noqa: E402  before torch, as in the scripts

import pytest  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)  # on tensors this small, threads only wait for each other

TOPICS = {
    "space": "rocket planet orbit astronaut",
    "cooking": "recipe oven butter kitchen",
    "music": "guitar melody concert singer",
}
SMALL = {
    "sae": "--latents 16 --active 3 --members 2 --steps 150 --batch 16 --min-items 2 --held-out 0.2",
    "model": "--epochs 3 --width 8 --batch 24 --history 6",
    "saerec": "--personal 3 --public 2",
}


def write_dataset(folder, users=24, items=30):
    """Users who stay within a topic mostly; item i's text has three of its topic's words."""
    topics = list(TOPICS)
    known = set()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "sequences.txt", "w") as f:
        for u in range(users):
            row = []
            for step in range(5 + u % 7):
                other = (u * 7 + step) % items
                row.append((u + 3 * step * (1 + u % 4)) % items if step % 5 else other)
            f.write(f"u{u} " + " ".join(f"i{i}" for i in dict.fromkeys(row)) + "\n")
            known.update(row)
    with open(folder / "texts.jsonl", "w") as f:
        for i in sorted(known):
            topic = topics[i % 3]
            words = TOPICS[topic].split()
            three = f"{words[i % 4]} and {words[(i + 1) % 4]}, {words[(i // 3) % 4]}"
            row = {"item": f"i{i}", "text": f"A thing about {topic}: {three}, number {i // 6}"}
            f.write(json.dumps(row | {"title": f"Thing {i}"}) + "\n")
    return folder


def write_folder(folder, sequences, texts):
    """A dataset folder of these two files' contents."""
    folder.mkdir(exist_ok=True)
    (folder / "sequences.txt").write_text(sequences)
    (folder / "texts.jsonl").write_text(texts)
    return folder


def text(item, **more):
    """A line of texts.jsonl."""
    return json.dumps({"item": item, "text": f"text of {item}", **more}) + "\n"


def word_vectors(texts, width=8):
    """Embeddings without an encoder: counts of words, projected at random -> [N, width]."""
    words = sorted({word for text in texts for word in text.lower().split()})
    counts = torch.tensor([[text.lower().split().count(word) for word in words] for text in texts])
    random = torch.Generator().manual_seed(0)
    return counts.float() @ torch.randn(len(words), width, generator=random)


def embed_words(data, run):
    """Write a run's embeddings, made of `word_vectors`, by embed.py's --embeddings."""
    import embed

    run.mkdir(parents=True, exist_ok=True)
    file = run.parent / f"{run.name}-vectors.safetensors"
    vectors = word_vectors(saerec.load_dataset(data).texts)
    safetensors.torch.save_file({"embeddings": vectors}, file)
    return embed.main(["--data", str(data), "--run", str(run), "--embeddings", str(file)])


def make_run(data, run, sae="", model="", stages="embed sae sasrec saerec grounded eval", seed=0):
    """Run the stages on a dataset folder with settings for seconds; every stage must succeed.

    sae, model: more flags of sae.py, and of model.py for every model that is trained.
    """
    import eval as evaluation
    import model as recommender
    import sae as autoencoder

    common = ["--run", str(run), "--seed", str(seed), "--device", "cpu"]
    for stage in stages.split():
        if stage == "embed":
            status = embed_words(data, run)
        elif stage == "sae":
            status = autoencoder.main([*common, *SMALL["sae"].split(), *sae.split()])
        elif stage == "eval":
            status = evaluation.main(common)
        else:
            flags = f"--model {stage} {SMALL['model']} {SMALL.get(stage, '')} {model}"
            status = recommender.main([*common, *flags.split()])
        assert status == 0, stage
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
    """A finished run on the tiny dataset, all three models; tests must not write into it."""
    return make_run(tiny_data, tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def fails(capsys):
    """fails(main, argv, *words): status 2 and one sentence on stderr that holds every word."""

    def check(main, argv, *words):
        capsys.readouterr()
        assert main([str(a) for a in argv]) == 2
        error = capsys.readouterr().err.strip()
        assert error.count("\n") == 0 and "Traceback" not in error, error
        for word in words:
            assert str(word) in error, (word, error)
        return error

    return check


def two_processes(script, *arguments, torchrun=False):
    """Run a script in two processes over gloo, by torchrun or as it starts them -> what they print.

    script: its path, from the root if it is not absolute.
    """
    command = [script, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    if torchrun:
        launcher = "-m torch.distributed.run --standalone --nproc-per-node 2 --".split()
        starts = [([*launcher, *command], {})]
    else:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        environment |= {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        starts = [(command, {"RANK": str(n), "LOCAL_RANK": str(n)}) for n in range(2)]
    pipes = dict(cwd=saerec.HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    jobs = [
        subprocess.Popen([sys.executable, *map(str, words)], env=environment | own, **pipes)
        for words, own in starts
    ]
    printed = []
    try:
        printed += [job.communicate(timeout=300) for job in reversed(jobs)]
    finally:  # if one broke, the other waits for it
        for job in jobs:
            job.kill()
    assert not any(job.returncode for job in jobs), printed
    return "".join(out for out, _ in printed)
