"""How fast every stage is, beside the obvious way to write it, and how time and memory grow.

    python studies/speed.py --run runs/beauty             all of it, some 15 minutes for beauty
    python studies/speed.py --run runs/ml-100k --quick    under two minutes
    python studies/speed.py --only sae,growth             some parts

Prints a table and writes studies/results/speed.json. Each part runs in a process of its own, so
that its peak memory is its own. Two things that are compared take turns in one process, and the
ratio is that of their medians. The run folder must hold what embed.py and sae.py make.
"""

import concurrent.futures
import contextlib
import csv
import dataclasses
import io
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import (  # noqa: E402
    Dataset, UserError, generator, pick_device, rank_users, run_command, run_dataset, setting,
    write_lines,
)  # fmt: skip

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

import embed  # noqa: E402
from model import (  # noqa: E402
    MODELS, ModelSettings, catalogue_loss, make_batch, model_scores, new_model, shuffled_batches,
    train_model, train_step, training_rows,
)  # fmt: skip
from sae import SAE, Intents, SaeSettings, SparseRows, load_intents, train_sae  # noqa: E402
from studies.sampled import SampledLoss  # noqa: E402
from studies.significance import current_commit  # noqa: E402

RELEASE = 490.0  # seconds per epoch of Amazon Beauty of the authors' code, on 2 AVX2 cores
NEGATIVES = 256
SCORES = 2**21  # that model.CrossEntropy makes at a time on a CPU
SPINS = (0, 300, 1000, 3000, 10_000, 300_000)  # of idle threads; the last is GNU OpenMP's default


@dataclasses.dataclass(frozen=True)
class SpeedSettings:
    """Measure how fast every stage is, and how time and memory grow."""

    run: str = setting("runs/ml-100k", "run folder with embeddings and intents", unit="path")
    data: str = setting("", "dataset folder, if it moved since embed.py read it", unit="path")
    only: str = setting("", "parts to measure, parted by commas; all if not given")
    quick: bool = setting(False, "fewer sizes and repetitions, no whole training")
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
        self.parts = shuffled_batches(self.rows, self.settings.batch, generator(0, "speed"))
        self.at = 0

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
    all items. Batches have 256 rows, as in the authors' code.
    """

    def __init__(self, name, data, intents, device, **flags):
        super().__init__(name, data, intents, device, **flags)
        prefixes = []
        for begin, length in zip(self.rows.begin.tolist(), self.rows.length.tolist()):
            prefixes += [(begin, n) for n in range(1, length + 1)]
        order = torch.randperm(len(prefixes), generator=generator(0, "speed"))
        self.parts = torch.tensor(prefixes)[order].split(256)

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
    narrow = product_rate(device, min(SCORES // items, 1024), items, width)
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
        yield row(f"{of}: {name}", seconds, "s per epoch", "loop over prefixes", slow / seconds)
        said = f"{of}: {name}, floor by the catalogue's products"
        yield row(said, floor, "s per epoch", "time / floor", seconds / floor)
        if of == "beauty":
            against = f"authors' code, {RELEASE:.0f} s on AVX2"
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
    target = 0.95 * max(line["valid_NDCG@10"] for line in logs["SASRec"])
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
        return self.sae.loss(self.x, codes, (), len(self.x), self.settings)[0]

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


def measure_embed(settings, device):
    """Texts per second of MiniLM, beside sentence-transformers where that is installed."""
    count = 300 if settings.quick else 2000
    texts = run_dataset(settings.run, settings.data).texts[:count]
    weights = embed.fetch_weights()
    tokenizer, bert = embed.load_encoder(weights, device=device)

    def ours():
        embed.encode(texts, tokenizer, bert)

    functions = [ours]
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        pass
    else:
        encoder = SentenceTransformer(str(weights), device=str(device))

        def theirs():
            encoder.encode(texts, batch_size=32, show_progress_bar=False)

        functions.append(theirs)
    repeats = 1 if settings.quick else 3
    seconds, *others = medians(repeats, *functions)
    against = ""
    ratio = None
    if others:
        against = "sentence-transformers"
        ratio = others[0] / seconds
    yield row("MiniLM", len(texts) / seconds, "texts/s", against, ratio)


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

    Idle and busy take turns, so that what else the machine does falls on both.
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

    def several():
        for _ in range(20):
            sae.step()

    taken = []
    for _ in range(1 if settings.quick else 3):
        idle = medians(3, model.steps(steps), several)
        with busy_neighbour():
            taken.append(idle + medians(3, model.steps(steps), several))
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
    tried = {f"{spins:,} spins": dict(GOMP_SPINCOUNT=str(spins)) for spins in SPINS}
    usual = os.environ["GOMP_SPINCOUNT"]
    new = multiprocessing.get_context("spawn")
    for name, environment in {**tried, "one thread": {}}.items():
        os.environ.update(dict(GOMP_SPINCOUNT=usual) | environment)
        threads = 0 if environment else 1
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
}


# All of it


def measure(part, settings):
    """Rows of one part, and the peak memory of this process. Raises UserError."""
    device = pick_device(settings.device)
    with contextlib.redirect_stdout(io.StringIO()):  # where what is measured shows its progress
        rows = list(PARTS[part](settings, device))
    if not rows or part == "training":  # which reads logs alone
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


def speed(settings):
    """Measure the parts, print them and write them with what they were measured on."""
    parts = list(PARTS)
    if settings.only:
        parts = settings.only.split(",")
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        problem = f"--only: there is no part {unknown[0]!r}"
        raise UserError(f"{problem}; choose among {', '.join(PARTS)}")
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
