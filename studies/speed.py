"""How fast every stage is, beside the obvious way to write it, and how time and memory grow.

    python studies/speed.py --run runs/beauty             all of it, some 15 minutes for beauty
    python studies/speed.py --run runs/ml-100k --quick    under two minutes
    python studies/speed.py --only sae,growth             some parts
    python studies/speed.py --only peers,embed --peers PYTHON,PYTHON    beside other libraries

Prints a table and writes studies/results/speed.json. Each part runs in a process of its own, so
that its peak memory is its own. Two things that are compared take turns in one process, and the
ratio is that of their medians. The run folder must hold what embed.py and sae.py make.

Other libraries lie in environments of their own, whose Pythons --peers names: RecTools and RecBole,
whose SASRecs take turns with ours and with the loop over prefixes on the CPU, each in a process of
its own (studies/peer.py), and sentence-transformers, which embeds the same texts.
"""

import concurrent.futures
import contextlib
import csv
import dataclasses
import functools
import io
import json
import math
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import (  # noqa: E402
    Dataset, UserError, generator, pick_device, rank_users, ranking_metrics, run_command,
    run_dataset, setting, write_lines,
)  # fmt: skip

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import embed  # noqa: E402
from model import (  # noqa: E402
    CHUNK, MODELS, ModelSettings, catalogue_loss, make_batch, model_scores, new_model,
    shuffled_batches, train_model, train_step, training_rows,
)  # fmt: skip
from sae import SAE, Intents, SaeSettings, SparseRows, load_intents, train_sae  # noqa: E402
from studies.sampled import SampledLoss  # noqa: E402
from studies.significance import current_commit  # noqa: E402

RELEASE = 490.0  # seconds per epoch of Amazon Beauty of the authors' code, on 2 AVX2 cores
NEGATIVES = 256
SPINS = (0, 300, 1000, 3000, 10_000, 300_000)  # of idle threads; the last is GNU OpenMP's default
PEER = Path(__file__).resolve().with_name("peer.py")
STEPS = {"ours": 20, "loop": 2}  # at a turn, else one; ours are quick, and of many lengths


@dataclasses.dataclass(frozen=True)
class SpeedSettings:
    """Measure how fast every stage is, and how time and memory grow."""

    run: str = setting("runs/ml-100k", "run folder with embeddings and intents", unit="path")
    data: str = setting("", "dataset folder, if it moved since embed.py read it", unit="path")
    only: str = setting("", "parts to measure, parted by commas; all if not given")
    quick: bool = setting(False, "fewer sizes and repetitions, no whole training")
    peers: str = setting("", "Pythons of environments with other libraries", unit="paths,paths")
    budget: int = setting(300, "of training to the goal of part peers", unit="s", low=1)
    out: str = setting("studies/results/speed.json", "file to write", unit="path")
    device: str = setting("auto", "auto: a GPU if it is there", choices=("auto", "cpu", "cuda"))


def synchronize():
    """Wait for the GPU, which computes behind the program's back."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def medians(repeats, *functions):
    """Median seconds of each function -> list; they take turns, after a turn to warm up."""
    taken = [[] for _ in functions]
    for turn in range(repeats + 1):
        for function, times in zip(functions, taken):
            synchronize()
            started = time.perf_counter()
            function()
            synchronize()
            if turn:
                times.append(time.perf_counter() - started)
    return [statistics.median(times) for times in taken]


def peak_memory(device):
    """The most memory that this process has held so far, of the GPU if that computes, in GiB.

    None on Windows, whose Python does not tell.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":  # which counts bytes
        return peak / 2**30
    return peak / 2**20


def row(name, value, unit, against="", ratio=None):
    """One measured value -> dict."""
    if ratio is not None:
        ratio = round(ratio, 3)
    return dict(name=name, value=round(value, 4), unit=unit, against=against, ratio=ratio)


def product_flops(function):
    """FLOPs of the matrix products of a function. A multiply-add counts two."""

    def added_product(_, a, b, **__):  # a product added in place, which torch does not count
        return 2 * a[0] * a[1] * b[1]

    also = {torch.ops.aten.addmm_: added_product}
    with FlopCounterMode(display=False, custom_mapping=also) as counter:
        function()
    return counter.get_total_flops()


def product_rate(device, m=2048, n=2048, k=2048):
    """FLOP/s of a float32 product [m, k] x [k, n] and of the two that its gradient takes."""
    a = torch.randn(m, k, device=device)
    b = torch.randn(k, n, device=device)
    c = a @ b
    da = torch.empty_like(a)
    db = torch.empty_like(b)

    def products():
        torch.mm(a, b, out=c)
        torch.mm(c, b.T, out=da)
        torch.mm(a.T, c, out=db)

    [seconds] = medians(7, products)
    return 3 * 2 * m * n * k / seconds


# The recommenders


class Trainer:
    """Training steps of one model, to be timed."""

    def __init__(self, name, data, intents, device, negatives=0, **flags):
        """name: of --model; negatives: of a sampled softmax; flags: settings of model.py."""
        self.settings = ModelSettings(model=name, device=device.type, **flags)
        self.device = device
        if not MODELS[name].needs_intents:
            intents = None
        self.model = new_model(MODELS[name], self.settings, data, intents)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.settings.lr, fused=True)
        self.loss = catalogue_loss
        if negatives:
            self.loss = SampledLoss(data, negatives, seed=0)
        self.flat = torch.from_numpy(data.flat).long()
        self.rows = training_rows(data, self.settings.history)
        self.shuffle(generator(0, "speed"))

    def shuffle(self, random):
        """Make the batches of an epoch anew, in the order that a generator draws."""
        self.parts = shuffled_batches(self.rows, self.settings.batch, random)
        self.at = 0

    def batch_size(self):
        """About how many positions are in a batch -> int."""
        return self.settings.batch

    def next_part(self):
        """The rows of the next batch, pass after pass -> int64 [any]."""
        part = self.parts[self.at % len(self.parts)]
        self.at += 1
        return part

    def step(self):
        batch = make_batch(self.rows, self.next_part(), self.flat, self.device)
        train_step(self.model, self.optimizer, self.loss, batch)

    def steps(self, count):
        """A function that makes so many steps."""

        def several():
            for _ in range(count):
                self.step()

        return several

    def epoch_flops(self):
        """FLOPs of the matrix products of an epoch, from a tenth of its steps, spread evenly."""
        steps = range(0, len(self.parts), 10)

        def some():
            for at in steps:
                self.at = at
                self.step()

        return product_flops(some) * len(self.parts) / len(steps)


class PrefixTrainer(Trainer):
    """The obvious loop: each prefix is a row, padded to the longest history.

    Every position goes through every branch, then comes plain cross entropy at the last one over
    all items.
    """

    def shuffle(self, random):
        prefixes = []
        for begin, length in zip(self.rows.begin.tolist(), self.rows.length.tolist()):
            prefixes += [(begin, n) for n in range(1, length + 1)]
        order = torch.randperm(len(prefixes), generator=random)
        self.parts = torch.tensor(prefixes)[order].split(self.batch_size())
        self.at = 0

    def batch_size(self):
        """How many rows are in a batch -> int; as in the authors' code."""
        return 256

    def padded(self, part):
        """Items of prefixes (begin, length), int64 [B, 2] -> int64 [B, T], T is --history."""
        begin, length = part.T
        step = torch.arange(self.settings.history)
        real = step < length[:, None]
        place = torch.where(real, begin[:, None] + step, 0)
        return torch.where(real, self.flat[place], 0).to(self.device)

    def step(self):
        part = self.next_part()
        begin, length = part.T
        items = self.padded(part)  # (B, T)
        table = self.model.item_table()
        everywhere = torch.arange(items.numel(), device=self.device)
        state = self.model(items, F.embedding(items, table), everywhere)
        u = state.u.view(*items.shape, -1)[torch.arange(len(items)), length - 1]  # (B, D)
        target = self.flat[begin + length].to(self.device)
        loss = F.cross_entropy(u @ table[1:].T, target - 1)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def measure_products(data, width, device):
    """(FLOP/s of the products of the catalogue's scores, rows on these and on square ones)."""
    rate = product_rate(device)
    items = len(data.items) - 1
    positions = min(32 * max(CHUNK // items // 32, 1), 1024)  # as in CrossEntropy
    narrow = product_rate(device, items, positions, width)
    name = "matrix products of the catalogue's scores"
    rows = [row("matrix products, square 2048", rate / 1e9, "GFLOP/s")]
    rows.append(row(name, narrow / 1e9, "GFLOP/s", "square", narrow / rate))
    return narrow, rows


def measure_ranking(trainer, name, data, repeats):
    """Seconds of a full ranking of all users -> row."""
    model = trainer.model.eval()

    def rank():
        rank_users(model_scores(model, data, "test"), data, "test")

    [seconds] = medians(repeats, rank)
    users = len(data.users)
    said = f"{data.folder.name}: full ranking of {users:,} users, {name}"
    return row(said, seconds, "s", f"{users / seconds:,.0f} users/s")


def measure_recommender(settings, device):
    """Seconds per epoch against the loop over prefixes and the floor, and of full ranking."""
    data = run_dataset(settings.run, settings.data)
    intents = load_intents(settings.run, data, device)
    repeats = 3 if settings.quick else 7
    steps = 4 if settings.quick else 20
    trainers = {}
    for name, Model in MODELS.items():
        trainers[Model.__name__] = Trainer(name, data, intents, device)
    sampled = Trainer("grounded", data, intents, device, negatives=NEGATIVES)
    trainers[f"Grounded, {NEGATIVES} negatives"] = sampled
    loop = PrefixTrainer("saerec", data, intents, device)
    timed = [trainer.steps(steps) for trainer in trainers.values()]
    *ours, theirs = medians(repeats, *timed, loop.step)
    slow = theirs * len(loop.parts)
    of = data.folder.name
    rate, rows = measure_products(data, loop.settings.width, device)
    yield from rows
    yield row(f"{of}: loop over prefixes, SAERec", slow, "s per epoch")
    for (name, trainer), taken in zip(trainers.items(), ours):
        seconds = taken / steps * len(trainer.parts)
        floor = trainer.epoch_flops() / rate
        against = "SAERec's loop over prefixes"
        yield row(f"{of}: {name}", seconds, "s per epoch", against, slow / seconds)
        said = f"{of}: {name}, floor by the catalogue's products"
        yield row(said, floor, "s per epoch", "time / floor", seconds / floor)
        if of == "beauty":
            against = f"authors' SAERec, {RELEASE:.0f} s on AVX2"
            yield row(f"{of}: {name}", seconds, "s per epoch", against, RELEASE / seconds)
    for Model in MODELS.values():
        name = Model.__name__
        yield measure_ranking(trainers[name], name, data, repeats)


def read_log(path):
    """A training curve -> list of dicts of floats; empty if the run has none."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in line.items()} for line in csv.DictReader(file)]


def goal_of(log):
    """95% of the best validation NDCG@10 of a training curve, as `read_log` gives it -> float."""
    return 0.95 * max(line["valid_NDCG@10"] for line in log)


def measure_training(settings, device):
    """Seconds to 95% of SASRec's best validation NDCG@10, from the logs that the run has."""
    data = run_dataset(settings.run, settings.data)
    logs = {}
    for name, Model in MODELS.items():
        log = read_log(Path(settings.run) / f"{name}_log.csv")
        if log:
            logs[Model.__name__] = log
    if "SASRec" not in logs:
        return
    target = goal_of(logs["SASRec"])
    for name, log in logs.items():
        epochs = [n for n, line in enumerate(log, 1) if line["valid_NDCG@10"] >= target]
        if epochs:
            seconds = sum(line["seconds"] for line in log[: epochs[0]])
            said = f"{data.folder.name}: {name} to validation NDCG@10 {target:.4f}"
            yield row(said, seconds, "s", f"epoch {epochs[0]} of {len(log)}")


def measure_negatives(settings, device):
    """What sampled softmax gains and loses: validation NDCG@10 and seconds, after equal epochs."""
    data = run_dataset(settings.run, settings.data)
    epochs = 2 if settings.quick else 12
    tried = (0, 256) if settings.quick else (0, 256, 1024, 4096)
    for negatives in tried:
        trainer = Trainer("sasrec", data, None, device, negatives=negatives, epochs=epochs)
        log = train_model(trainer.model, data, trainer.loss)[1]
        name = f"{data.folder.name}: SASRec, {negatives or 'all'} negatives, {epochs} epochs"
        best = max(line["valid_NDCG@10"] for line in log)
        seconds = sum(line["seconds"] for line in log)
        yield row(name, best, "NDCG@10", f"{seconds:.0f} s")


# The sparse autoencoder, the encoder


class SaeTrainer:
    """Steps of a TopK SAE on texts x [B, E], to be timed."""

    def __init__(self, latents, active, x):
        self.x = x
        self.settings = SaeSettings(auxk=0)
        self.sae = SAE(latents, active, x.shape[1]).to(x.device)
        self.optimizer = torch.optim.Adam(self.sae.parameters(), fused=True)

    def loss(self):
        codes = self.sae.encode(self.x)
        return self.sae.loss(self.x, codes, (), self.settings)[0]

    def backward(self):
        self.loss().backward()

    def step(self):
        self.optimizer.zero_grad()
        self.backward()
        self.sae.project_decoder_gradient()
        self.optimizer.step()
        self.sae.normalize_decoder()


class DenseTrainer(SaeTrainer):
    """The same, densely: all pre-activations have a gradient, and so has every decoder row."""

    def loss(self):
        sae = self.sae
        pre = (self.x - sae.b_dec) @ sae.W_enc.T + sae.b_enc  # (B, M)
        top = pre.topk(int(sae.active))
        z = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        x_hat = z @ sae.W_dec + sae.b_dec
        return (self.x - x_hat).square().sum() / len(self.x)


def measure_sae(settings, device):
    """Steps per second as sae.py makes them by default, against the dense formulation."""
    default = SaeSettings()
    sizes = [(M, E) for E in (384, 768) for M in (256, 1024, 4096, 16384)]
    repeats = 15
    if settings.quick:
        sizes = [(256, 384), (4096, 384)]
        repeats = 3
    for M, E in sizes:
        x = torch.randn(default.batch, E, device=device)
        x /= x.square().sum(1).mean().sqrt()
        ours = SaeTrainer(M, default.active, x)
        dense = DenseTrainer(M, default.active, x)
        fast, slow = medians(repeats, ours.backward, dense.backward)
        name = f"SAE M={M} E={E}, forward and backward"
        yield row(name, 1 / fast, "steps/s", "dense", slow / fast)
        fast, slow = medians(repeats, ours.step, dense.step)
        yield row(f"SAE M={M} E={E}, whole step", 1 / fast, "steps/s", "dense", slow / fast)


def encoder_products(bert, shapes):
    """A function that computes an encoder's matrix products alone, for batches of shapes [B, S]."""
    E = bert.words.shape[1]
    device = bert.words.device
    cells = max(B * S * max(4 * E, bert.heads * S) for B, S in shapes)
    rooms = [torch.rand(cells, dtype=bert.words.dtype, device=device) for _ in range(4)]

    def part(room, *shape):
        return rooms[room][: math.prod(shape)].view(shape)

    def layer(B, S, qkv, mix, norm, widen, narrow, last_norm):
        for weight, _ in (qkv, mix, widen, narrow):
            wide, deep = weight.shape
            torch.mm(part(0, B * S, deep), weight.T, out=part(1, B * S, wide))
        heads = (B * bert.heads, S, E // bert.heads)
        similarity = part(2, B * bert.heads, S, S)
        torch.bmm(part(0, *heads), part(1, *heads).mT, out=similarity)
        torch.bmm(similarity, part(0, *heads), out=part(3, *heads))

    def products():
        for B, S in shapes:
            for parameters in bert.layers:
                layer(B, S, *parameters)

    return products


class Shapes:
    """An encoder that also notes the shapes [B, S] of its batches."""

    def __init__(self, bert):
        self.words = bert.words
        self.bert = bert
        self.seen = []

    def __call__(self, ids, lengths):
        self.seen.append(tuple(ids.shape))
        return self.bert(ids, lengths)


def measure_texts(name, texts, encoder, repeats, peer):
    """Texts per second of an encoder (WordPiece, Bert) beside its products and a Worker, or None.

    Both vectors have norm 1; the largest difference of a value of theirs says whether they agree.
    """
    shapes = Shapes(encoder[1])
    vectors = embed.encode(texts, encoder[0], shapes)
    functions = [functools.partial(embed.encode, texts, *encoder)]
    functions.append(encoder_products(encoder[1], shapes.seen))
    if peer:
        functions.append(functools.partial(peer.ask, "encode", texts=texts))
    seconds, floor, *others = medians(repeats, *functions)
    said = f"{name}, matrix products alone"
    yield row(said, len(texts) / floor, "texts/s", "time / floor", seconds / floor)
    if not peer:
        yield row(name, len(texts) / seconds, "texts/s")
        return
    yield row(name, len(texts) / seconds, "texts/s", peer.name, others[0] / seconds)
    largest = (vectors - peer.read("vectors", len(texts))).abs().max().item()
    yield row(f"{name}, largest difference", 1e6 * largest, "millionths", peer.name)


def measure_embed(settings, device):
    """Texts per second of MiniLM, on the texts as they are and on their first twelve words."""
    count = 200 if settings.quick else 500
    repeats = 1 if settings.quick else 3
    texts = run_dataset(settings.run, settings.data).texts[:count]
    short = [" ".join(text.split()[:12]) for text in texts]
    weights = embed.fetch_weights()
    encoder = embed.load_encoder(weights, device=device)
    with contextlib.ExitStack() as stack:
        peer = None
        found = find_peers(settings.peers)
        if "sentence_transformers" in found:
            python, version = found["sentence_transformers"]
            peer = Worker(python, f"sentence-transformers {version}")
            stack.enter_context(peer)
            facts = dict(weights=str(weights), tokens=encoder[0].most, device=device.type)
            peer.start("sentence_transformers", **facts)
        yield from measure_texts("MiniLM, whole texts", texts, encoder, repeats, peer)
        yield from measure_texts("MiniLM, first 12 words", short, encoder, repeats, peer)


# Other libraries


class Worker(contextlib.AbstractContextManager):
    """A process of studies/peer.py under some Python, asked and answering by lines of JSON."""

    def __init__(self, python, name):
        """python: path; name: what it measures, for people. Raises UserError."""
        self.python = python
        self.name = name
        self.folder = tempfile.TemporaryDirectory()
        self.errors = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors)
        try:
            command = [python, str(PEER)]
            self.process = subprocess.Popen(command, cwd=self.folder.name, text=True, **pipes)
        except OSError as error:
            self.errors.close()
            self.folder.cleanup()
            raise UserError(f"--peers {python} does not run ({error}): name a Python") from error

    def __exit__(self, *problem):
        self.process.kill()
        self.process.communicate()
        self.errors.close()
        self.folder.cleanup()

    def ask(self, what, **more):
        """The answer to a question. Raises UserError if the process ends over it."""
        with contextlib.suppress(BrokenPipeError):  # the answer will be lacking
            self.process.stdin.write(json.dumps(dict(do=what, **more)) + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        try:
            return json.loads(answer)
        except ValueError as error:
            self.process.kill()
            self.process.wait()
            self.errors.seek(0)
            said = [line.strip() for line in self.errors if line.strip()]
            why = (said or [answer.strip() or "killed, as when memory runs out"])[-1]
            problem = f"{self.python}: {self.name} ended at {what!r} ({why})"
            raise UserError(f"{problem}: mend that environment, or leave it out") from error

    def start(self, kind, **more):
        """Make a recommender or an encoder of studies/peer.py, with as many threads as here."""
        self.kind = kind
        told = dict(kind=kind, folder=self.folder.name, threads=torch.get_num_threads())
        self.facts = self.ask("start", **told, **more)

    def read(self, name, rows):
        """A float32 matrix that the process wrote -> tensor [rows, any]."""
        path = Path(self.folder.name) / name
        return torch.from_numpy(np.fromfile(path, np.float32).reshape(rows, -1))


def find_peers(pythons):
    """Libraries that the Pythons, parted by commas, can import -> {library: (Python, version)}.

    The first Python that has a library is taken. Raises UserError.
    """
    found = {}
    for named in filter(None, pythons.split(",")):
        python = shutil.which(named)
        if not python:
            raise UserError(f"--peers {named} is no program: name the Python of an environment")
        python = os.path.abspath(python)
        with Worker(python, "this program, asked for its libraries,") as worker:
            held = worker.ask("libraries")
        if not held:
            problem = f"--peers {named} has no RecTools, RecBole or sentence-transformers"
            raise UserError(f"{problem}: install one there, or leave it out")
        for library, version in held.items():
            found.setdefault(library, (python, version))
    return found


def start_recommenders(settings, data, stack):
    """Start ours, the loop over prefixes and the peers, each in a process of its own -> Workers.

    Each has `facts`: batches and positions of an epoch, size of a batch and its unit.
    """
    ways = [("ours", sys.executable, "SASRec"), ("loop", sys.executable, "loop over prefixes")]
    found = find_peers(settings.peers)
    for library, name in (("rectools", "RecTools"), ("recbole", "RecBole")):
        if library in found:
            python, version = found[library]
            ways.append((library, python, f"SASRec of {name} {version}"))
    histories = [data.history(user, "valid").tolist() for user in range(len(data.users))]
    lines = [" ".join(map(str, history)) for history in histories]
    made = dataclasses.asdict(ModelSettings())
    wanted = ("width", "layers", "heads", "dropout", "history", "lr")
    told = dict(settings={name: made[name] for name in wanted}, items=len(data.items) - 1)
    told["dataset"] = str(data.folder.resolve())
    workers = []
    for kind, python, name in ways:
        worker = stack.enter_context(Worker(python, name))
        write_lines(Path(worker.folder.name) / "training.txt", lines)
        worker.start(kind, **told)
        workers.append(worker)
    return workers


def validation_ndcg(worker, data):
    """NDCG@10 of a recommender on the validation items, by our ranking -> float.

    Items that it has not seen in training come last.
    """
    worker.ask("vectors")
    states = worker.read("states", len(data.users))
    table = worker.read("table", len(data.items))
    unknown = table.isnan().any(1)
    table = table.nan_to_num()

    def score(users):
        return (states[users] @ table.T).masked_fill(unknown, -torch.inf)

    return ranking_metrics(rank_users(score, data, "valid"))["NDCG@10"]


def measure_goal(worker, epoch, goal, budget, data):
    """Seconds that a recommender trains to a validation NDCG@10 -> row.

    Only training is timed, and an epoch is begun only if it will end within the budget; epoch: its
    seconds, as measured.
    """
    name = f"{data.folder.name}: {worker.name} to validation NDCG@10 {goal:.4f}"
    if epoch > budget:
        return row(name, epoch, "s", f"not tried: one epoch, --budget {budget}")
    worker.ask("anew")
    seconds = 0.0
    curve = []
    while max(curve, default=-1) < goal and seconds + epoch <= budget:
        started = time.perf_counter()
        worker.ask("epoch")
        seconds += time.perf_counter() - started
        curve.append(validation_ndcg(worker, data))
    against = f"epoch {len(curve)}"
    if max(curve) < goal:
        against = f"not reached in {len(curve)} epochs: {max(curve):.4f}, --budget {budget}"
    return row(name, seconds, "s", against)


def measure_peers(settings, device):
    """Seconds per epoch, peak memory and seconds to a goal: our SASRec, the loop, the libraries'.

    On the CPU, whatever the device, with as many threads each.
    """
    data = run_dataset(settings.run, settings.data)
    of = data.folder.name
    with contextlib.ExitStack() as stack:
        workers = start_recommenders(settings, data, stack)
        counts = [STEPS.get(worker.kind, 1) for worker in workers]
        turns = [functools.partial(w.ask, "steps", count=n) for w, n in zip(workers, counts)]
        taken = medians(3 if settings.quick else 7, *turns)
        epochs = [t / n * w.facts["batches"] for t, n, w in zip(taken, counts, workers)]
        for worker, seconds in zip(workers, epochs):
            facts = worker.facts
            name = f"{of}: {worker.name}, batches of {facts['size']:,} {facts['unit']}"
            against = f"{facts['positions']:,} positions; times ours"
            yield row(name, seconds, "s per epoch", against, seconds / epochs[0])
        peaks = [worker.ask("memory") for worker in workers]
        if None in peaks:
            print("peak memory of peers: this system does not tell", file=sys.stderr)
            peaks = []
        for worker, peak in zip(workers, peaks):
            name = f"{of}: {worker.name}, peak memory"
            yield row(name, peak, "GiB", "times ours", peak / peaks[0])
        log = read_log(Path(settings.run) / "sasrec_log.csv")
        if not log:
            problem = f"{settings.run} has no sasrec_log.csv: no seconds to its validation NDCG@10"
            print(f"{problem}; make it by model.py --model sasrec", file=sys.stderr)
            return
        for worker, seconds in zip(workers, epochs):
            yield measure_goal(worker, seconds, goal_of(log), settings.budget, data)


# A busy neighbour


@contextlib.contextmanager
def busy_neighbour():
    """A process that computes without end, which takes a core of those that we use."""
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield process
        finally:
            process.kill()


def idle_and_busy(settings, threads):
    """Seconds of an epoch of SASRec and of 100 steps of the SAE -> {name: (idle, beside another)}.

    threads: int, 0 for as many as there are. Idle and busy take turns, so that what else the
    machine does falls on both.
    """
    if threads:
        torch.set_num_threads(threads)
    device = pick_device("cpu")
    data = run_dataset(settings.run, settings.data)
    model = Trainer("sasrec", data, None, device)
    default = SaeSettings()
    x = torch.randn(default.batch, 384)
    sae = SaeTrainer(1024, default.active, x / x.square().sum(1).mean().sqrt())
    steps = min(8, len(model.parts))
    share = len(model.parts) / steps

    def some_batches():
        model.at = 0  # the same ones in every turn
        for _ in range(steps):
            model.step()

    def some_texts():
        for _ in range(20):
            sae.step()

    taken = []
    for _ in range(1 if settings.quick else 3):
        idle = medians(3, some_batches, some_texts)
        with busy_neighbour():
            taken.append(idle + medians(3, some_batches, some_texts))
    middle = [statistics.median(times) for times in zip(*taken)]
    name = f"{data.folder.name}: an epoch of SASRec"
    return {
        name: (middle[0] * share, middle[2] * share),
        "100 steps of the SAE, M=1024": (middle[1] * 5, middle[3] * 5),
    }


def measure_busy(settings, device):
    """What another busy process costs, by how long idle threads spin, and on one thread.

    GNU's OpenMP reads that once, so each value has a process of its own.
    """
    if device.type != "cpu":
        return
    tried = [(f"{spins:,} spins", spins, 0) for spins in SPINS]
    new = multiprocessing.get_context("spawn")
    for name, spins, threads in [*tried, ("one thread", 1000, 1)]:
        os.environ["GOMP_SPINCOUNT"] = str(spins)
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=new) as process:
            measured = process.submit(idle_and_busy, settings, threads).result()
        for work, (idle, busy) in measured.items():
            yield row(f"{work}, {name}", idle, "s")
            yield row(f"{work}, {name}, a busy neighbour", busy, "s", "idle", busy / idle)


# Growth


def synthetic(users, items, length=10, intents=1000, codes=8):
    """A random dataset and its intents, of the given size -> (Dataset, Intents)."""
    random = np.random.default_rng(0)
    numbers = np.arange(items + 1)
    names = list(map(str, numbers))
    start = np.arange(0, users * length + 1, length)
    flat = 1 + (items * random.random(start[-1]) ** 2).astype(np.int32)
    none = np.zeros(0, np.int32)
    people = list(range(users))
    data = Dataset(Path("synthetic"), "", people, names, start, flat, [], none, names, ())
    indptr = torch.from_numpy(np.concatenate([[0], numbers * codes]))
    indices = torch.from_numpy(random.integers(0, intents, items * codes, dtype=np.int32))
    cells = SparseRows(indptr, indices, torch.rand(items * codes), intents)
    return data, Intents(torch.randn(intents, 384), cells)


def epoch_seconds(users, items, device):
    """Seconds of an epoch of Grounded on synthetic data."""
    data, intents = synthetic(users, items)
    trainer = Trainer("grounded", data, Intents(*(part.to(device) for part in intents)), device)
    [seconds] = medians(2, trainer.step)
    return seconds * len(trainer.parts)


def measure_growth(settings, device):
    """Slope of log time over log size, where one of users, items, texts grows tenfold.

    1 is linear.
    """
    few = 1 if settings.quick else 10
    base = epoch_seconds(500 * few, 500 * few, device)
    more_users = epoch_seconds(5000 * few, 500 * few, device)
    more_items = epoch_seconds(500 * few, 5000 * few, device)
    yield row("growth of an epoch with users", math.log10(more_users / base), "slope")
    yield row("growth of an epoch with items", math.log10(more_items / base), "slope")
    x = F.normalize(torch.randn(20000 * few, 384), dim=1)
    taken = []
    for texts in (2000 * few, 20000 * few):
        sizes = dict(latents=256, steps=texts // 256, members=1)
        held_out = torch.arange(texts) % 10 == 0
        started = time.perf_counter()
        train_sae(x[:texts], held_out, SaeSettings(**sizes, device=device.type))
        taken.append(time.perf_counter() - started)
    slope = math.log10(taken[1] / taken[0])
    yield row("growth of a pass of the SAE with texts", slope, "slope")


def measure_million(settings, device):
    """A catalogue of a million items, 8 codes each: training with 256 negatives, full ranking."""
    if settings.quick:
        return
    data, intents = synthetic(4_000, 1_000_000)
    intents = Intents(*(part.to(device) for part in intents))
    trainer = Trainer("grounded", data, intents, device, negatives=NEGATIVES)
    [seconds] = medians(5, trainer.step)
    name = f"a million items: Grounded, {NEGATIVES} negatives"
    against = f"{len(trainer.flat):,} interactions"
    yield row(name, seconds * len(trainer.parts), "s per epoch", against)
    started = time.perf_counter()
    rank_users(model_scores(trainer.model.eval(), data, "test"), data, "test")
    users = len(data.users) / (time.perf_counter() - started)
    yield row("a million items: full ranking", users, "users/s")


PARTS = {
    "recommender": measure_recommender,
    "training": measure_training,
    "negatives": measure_negatives,
    "sae": measure_sae,
    "embed": measure_embed,
    "busy": measure_busy,
    "growth": measure_growth,
    "million": measure_million,
    "peers": measure_peers,
}


# All of it


def measure(part, settings):
    """Rows of one part, and the peak memory of this process. Raises UserError."""
    device = pick_device(settings.device)
    with contextlib.redirect_stdout(io.StringIO()):  # where what is measured shows its progress
        rows = list(PARTS[part](settings, device))
    if not rows or part in ("training", "peers"):  # which work in no process, or in others
        return rows
    peak = peak_memory(device)
    if peak is None:
        print(f"peak memory of {part}: not measured, this system does not tell", file=sys.stderr)
        return rows
    return [*rows, row(f"peak memory of {part}", peak, "GiB")]


def measure_apart(part, settings):
    """`measure` in a new process. Raises UserError, also if that process is killed."""
    new = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=new) as process:
            return process.submit(measure, part, settings).result()
    except concurrent.futures.process.BrokenProcessPool as error:
        problem = f"--only {part}: its process was ended from outside, as when memory runs out"
        raise UserError(f"{problem}: free some memory, or leave the part out") from error


def command_of(settings):
    """The command line that these settings come from, without defaults and --out -> str."""
    words = ["python studies/speed.py"]
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if value is True:
            words.append(f"--{field.name}")
        elif value != field.default and field.name != "out":
            words.append(f"--{field.name} {value}")
    return " ".join(words)


def in_words(one):
    """A row for people."""
    said = f"{one['name']:60}{one['value']:>12,.4g} {one['unit']:12}"
    if one["against"]:
        said += f"   {one['against']}"
    if one["ratio"] is not None:
        said += f": {one['ratio']:.2f}"
    return said


def chosen_parts(settings):
    """The parts to measure -> list of str. Raises UserError."""
    parts = [part for part in PARTS if part != "peers" or settings.peers]
    if settings.only:
        parts = settings.only.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        problem = f"--only: there is no part {unknown[0]!r}"
        raise UserError(f"{problem}; choose among {', '.join(PARTS)}")
    if "peers" in parts and not settings.peers:
        raise UserError("--only peers measures nothing without --peers: name Pythons")
    if settings.peers and not {"peers", "embed"} & {*parts}:
        raise UserError("--peers changes nothing without parts peers and embed: leave it out")
    if settings.budget != SpeedSettings.budget and "peers" not in parts:
        raise UserError("--budget changes nothing without part peers: leave it out")
    find_peers(settings.peers)  # what is wrong with them is said before all the work
    return parts


def speed(settings):
    """Measure the parts, print them and write them with what they were measured on."""
    parts = chosen_parts(settings)
    commit = current_commit()
    rows = []
    for part in parts:
        found = measure_apart(part, settings)
        for one in found:
            print(in_words(one), flush=True)
        rows += found
    threads = torch.get_num_threads()
    machine = f"{threads} threads, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    if pick_device(settings.device).type == "cuda":
        machine = torch.cuda.get_device_name()
    report = dict(machine=machine, torch=torch.__version__, commit=commit)
    report |= dict(command=command_of(settings), rows=rows)
    write_lines(settings.out, [json.dumps(report, indent=1)])
    print(f"written to {settings.out}")


def main(argv=None):
    return run_command(argv, __doc__, speed=(SpeedSettings, speed))


if __name__ == "__main__":
    sys.exit(main())
