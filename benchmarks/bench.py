"""How fast every stage is, beside the obvious way to write it, and how time and memory grow.

    python benchmarks/bench.py --run runs/beauty             all of it, some 15 minutes for Amazon Beauty on 2 cores
    python benchmarks/bench.py --run runs/ml-100k --quick    under 2 minutes
    python benchmarks/bench.py --only sae,growth             some parts

Prints a table and writes benchmarks/results.json. Each part runs in a process of its own, so that its peak memory is its
own. Two things that are compared take turns in one process, and the ratio is that of their medians. The run folder must
hold what embed.py and sae.py make.
"""

import argparse
import csv
import dataclasses
import json
import math
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import embed  # noqa: E402
import model  # noqa: E402
import sae  # noqa: E402
import saerec  # noqa: E402

RELEASE = 490.0  # seconds an epoch of Amazon Beauty takes the authors' code on 2 AVX2 cores


def medians(repeats, *functions):
    """Median seconds of each function; they take turns, after a turn to warm up."""
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


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def row(name, value, unit, against="", ratio=None):
    return dict(name=name, value=round(value, 4), unit=unit, against=against, ratio=None if ratio is None else round(ratio, 3))


def gemm_rate(device, m=2048, n=2048, k=2048):
    """FLOP/s of a float32 product [m, k] x [k, n] and of the two that its gradient takes; a multiply-add counts two."""
    a, b, c = torch.randn(m, k, device=device), torch.randn(k, n, device=device), torch.randn(m, n, device=device)
    return 3 * 2 * m * n * k / medians(7, lambda: (a @ b, c @ b.T, a.T @ c))[0]


class Trainer:
    """Training steps of one model, to be timed."""

    def __init__(self, data, library, flags, device):
        s = self.settings = model.resolve(model.ModelSettings(**flags))
        library = None if s.intents == "none" else library
        frequency = model.intent_frequency(data, library) if library else None
        self.net = model.Recommender(s, len(data.items) - 1, library, frequency).to(device)
        self.personal = model.personal_intents(data, library, s)
        self.rows, self.flat = model.training_rows(data, s.history), torch.from_numpy(data.flat).long()
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr=s.lr, fused=True)
        self.sampler = model.negative_sampler(data, s.negatives, saerec.generator(0, "negatives")) if s.negatives else None
        self.parts, self.at, self.device = model.batches(self.rows, s.batch, saerec.generator(0, "bench")), 0, device

    def update(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def step(self):
        chosen = self.parts[self.at % len(self.parts)]
        self.at += 1
        batch = model.make_batch(self.rows, chosen, self.flat, self.personal, self.sampler)
        self.update(model.batch_loss(self.net, batch.to(self.device))[0])

    def epoch_flops(self):
        """FLOPs of the matrix products of an epoch, from a tenth of its steps, spread evenly."""
        steps = range(0, len(self.parts), 10)
        with FlopCounterMode(display=False) as counter:
            for self.at in steps:
                self.step()
        return counter.get_total_flops() * len(self.parts) / len(steps)


class PrefixTrainer(Trainer):
    """The obvious loop: each prefix a row padded to the longest history, every position through every branch, then plain
    cross entropy at the last position over all items. Batches of 256 rows, as in the authors' code."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.prefixes = [(b, n) for b, length in zip(*map(torch.Tensor.tolist, self.rows)) for n in range(1, length + 1)]
        order = torch.randperm(len(self.prefixes), generator=saerec.generator(0, "bench")).split(256)
        self.parts = [torch.tensor([self.prefixes[i] for i in part.tolist()]) for part in order]

    def step(self):
        begin, length = self.parts[self.at % len(self.parts)].T
        self.at += 1
        T = self.settings.history
        real = torch.arange(T) < length[:, None]
        items = torch.where(real, self.flat[torch.where(real, begin[:, None] + torch.arange(T), 0)], 0).to(self.device)
        table = self.net.item_table()
        u = self.net(items, torch.arange(items.numel(), device=self.device), None, table).view(*items.shape, -1)
        u = u[torch.arange(len(u)), length - 1]
        self.update(F.cross_entropy(u @ table[1:].T, self.flat[begin + length].to(self.device) - 1))


def bench_recommender(options, device):
    """Seconds an epoch against the loop over prefixes and the floor; seconds to a validation NDCG@10; users ranked a second."""
    data = saerec.run_dataset(options.run)
    library, repeats = model.load_library(Path(options.run), data), 3 if options.quick else 7
    trainers = {
        "SASRec": Trainer(data, library, dict(intents="none"), device),
        "SAERec": Trainer(data, library, {}, device),
        "SAERec --negatives 256": Trainer(data, library, dict(negatives=256), device),
        "SAERec --paper": Trainer(data, library, dict(paper=True), device),
    }
    loop, steps = PrefixTrainer(data, library, dict(paper=True), device), 4 if options.quick else 20

    def several(trainer, steps):
        return lambda: [trainer.step() for _ in range(steps)]

    *ours, theirs = medians(repeats, *(several(t, steps) for t in trainers.values()), several(loop, 1))
    slow, rate, of = theirs * len(loop.parts), gemm_rate(device), data.folder.name
    narrow = gemm_rate(device, 1024, len(data.items) - 1, trainers["SASRec"].settings.width)
    yield row("matrix products, square 2048", rate / 1e9, "GFLOP/s")
    yield row("matrix products of the catalogue's scores", narrow / 1e9, "GFLOP/s", "square", narrow / rate)
    yield row(f"{of}: loop over prefixes", slow, "s an epoch")
    for (name, trainer), taken in zip(trainers.items(), ours):
        seconds = taken / steps * len(trainer.parts)
        yield row(f"{of}: {name}", seconds, "s an epoch", "loop over prefixes", slow / seconds)
        flops = trainer.epoch_flops()
        yield row(f"{of}: {name}, floor by the square products", flops / rate, "s an epoch", "time / floor", seconds * rate / flops)
        if of == "beauty":
            yield row(f"{of}: {name}", seconds, "s an epoch", f"authors' code, {RELEASE:.0f} s on AVX2", RELEASE / seconds)
    for name in ("SASRec", "SAERec"):
        t = trainers[name]
        score = lambda: model.model_scores(t.net.eval(), data, t.personal, "test")  # noqa: B023, E731
        (seconds,) = medians(repeats, lambda: model.rank_users(score(), data, "test"))
        yield row(f"{of}: full ranking of {len(data.users):,} users, {name}", seconds, "s", f"{len(data.users) / seconds:,.0f} users/s")


def bench_training(options, device):
    """Seconds to 95% of SASRec's best validation NDCG@10, from the logs of the run's trainings, where it has both."""
    data, logs = saerec.run_dataset(options.run), {}
    for name, intents in (("SASRec", "none"), ("SAERec", "sae")):
        path = Path(options.run) / model.file_names(intents)[1]
        if not path.is_file():
            return
        with open(path, newline="") as file:
            logs[name] = [{key: float(value) for key, value in line.items()} for line in csv.DictReader(file)]
    target = 0.95 * max(line["valid_NDCG@10"] for line in logs["SASRec"])
    for name, log in logs.items():
        reached = next((n for n, line in enumerate(log, 1) if line["valid_NDCG@10"] >= target), None)
        if reached:
            seconds = sum(line["seconds"] for line in log[:reached])
            yield row(f"{data.folder.name}: {name} to validation NDCG@10 {target:.4f}", seconds, "s", f"epoch {reached} of {len(log)}")


def bench_negatives(options, device):
    """What sampled softmax gains and loses: validation NDCG@10 of SASRec and the seconds it took, after the same epochs."""
    data, epochs = saerec.run_dataset(options.run), 2 if options.quick else 12
    for negatives in (0, 256) if options.quick else (0, 256, 1024, 4096):
        settings = model.resolve(model.ModelSettings(intents="none", negatives=negatives, epochs=epochs, device=str(device)))
        log = model.train_model(data, None, settings)[1]
        name = f"{data.folder.name}: SASRec, {negatives or 'all'} negatives, {epochs} epochs"
        seconds = sum(line["seconds"] for line in log)
        yield row(name, max(line["valid_NDCG@10"] for line in log), "NDCG@10", f"{seconds:.0f} s")


def bench_sae(options, device):
    """Steps of 1,024 texts, K = 16, against the dense formulation: all pre-activations with a gradient, TopK, dense decoder."""
    sizes = [(1024, 384), (4096, 384)] if options.quick else [(M, E) for E in (384, 768) for M in (1024, 4096, 16384)]
    for M, E in sizes:
        x = torch.randn(1024, E, device=device)
        x /= x.square().sum(1).mean().sqrt()
        nets = [sae.SAE(M, 16, E).to(device) for _ in range(2)]
        optimizers = [torch.optim.Adam(net.parameters(), fused=True) for net in nets]

        def ours():
            sae.reconstruction_loss(x, nets[0].decode(nets[0].encode(x))).backward()

        def dense():
            pre = (x - nets[1].b_dec) @ nets[1].W_enc.T + nets[1].b_enc
            top = pre.topk(16)
            z = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
            sae.reconstruction_loss(x, z @ nets[1].W_dec + nets[1].b_dec).backward()

        def whole(net, optimizer, backward):
            def step():
                optimizer.zero_grad()
                backward()
                net.project_decoder_gradient()
                optimizer.step()
                net.normalize_decoder()

            return step

        repeats = 3 if options.quick else 7
        fast, slow = medians(repeats, ours, dense)
        yield row(f"SAE M={M} E={E}, forward and backward", 1 / fast, "steps/s", "dense", slow / fast)
        fast, slow = medians(repeats, *(whole(*parts) for parts in zip(nets, optimizers, (ours, dense))))
        yield row(f"SAE M={M} E={E}, whole step", 1 / fast, "steps/s", "dense", slow / fast)


def bench_embed(options, device):
    """Texts a second of the sentence encoder, beside sentence-transformers where that is installed."""
    texts = saerec.run_dataset(options.run).texts[: 300 if options.quick else 2000]
    tokenizer, bert = embed.load_encoder(embed.fetch_weights(), device=device)
    functions = [lambda: embed.encode(texts, tokenizer, bert)]
    try:
        from sentence_transformers import SentenceTransformer

        theirs = SentenceTransformer(str(embed.MINILM), device=str(device))
        functions.append(lambda: theirs.encode(texts, batch_size=32, show_progress_bar=False))
    except ImportError:
        pass
    ours, *others = medians(1 if options.quick else 3, *functions)
    against = ("sentence-transformers", others[0] / ours) if others else ()
    yield row("MiniLM", len(texts) / ours, "texts/s", *against)


def synthetic(users, items, length=10, intents=1000, codes=8):
    """A random dataset and library of the given size."""
    random, numbers = np.random.default_rng(0), np.arange(items + 1)
    start = np.arange(0, users * length + 1, length)
    flat = 1 + (items * random.random(start[-1]) ** 2).astype(np.int32)
    names = list(map(str, numbers))
    data = saerec.Dataset(Path("synthetic"), "", list(range(users)), names, start, flat, [], np.zeros(0, np.int32), names, ())
    indptr = torch.from_numpy(np.concatenate([[0], numbers * codes]))
    indices = torch.from_numpy(random.integers(0, intents, items * codes, dtype=np.int32))
    return data, model.Library(torch.randn(intents, 384), indptr, indices, torch.rand(items * codes))


def bench_growth(options, device):
    """Slope of log time over log size, when one of users, items and texts grows tenfold: 1 is linear."""
    few = 1 if options.quick else 10

    def epoch(users, items):
        trainer = Trainer(*synthetic(users, items), {}, device)
        (seconds,) = medians(2, trainer.step)
        return seconds * len(trainer.parts)

    base = epoch(500 * few, 500 * few)
    yield row("growth of an epoch with users", math.log10(epoch(5000 * few, 500 * few) / base), "slope")
    yield row("growth of an epoch with items", math.log10(epoch(500 * few, 5000 * few) / base), "slope")
    x = F.normalize(torch.randn(20000 * few, 384), dim=1)
    settings, taken = sae.SaeSettings(run="x", latents=256, device=str(device)), []
    for texts in (2000 * few, 20000 * few):
        started = time.perf_counter()
        sae.train_sae(x[:texts], dataclasses.replace(settings, steps=texts // 256))
        taken.append(time.perf_counter() - started)
    yield row("growth of a pass of the SAE with texts", math.log10(taken[1] / taken[0]), "slope")


def bench_million(options, device):
    """A catalogue of a million items, 8 codes each: training steps with 256 negatives, and full ranking."""
    if options.quick:
        return
    data, library = synthetic(4_000, 1_000_000)
    trainer = Trainer(data, library, dict(negatives=256), device)
    (step,) = medians(5, trainer.step)
    yield row("a million items: SAERec --negatives 256", step * len(trainer.parts), "s an epoch", f"{len(trainer.flat):,} interactions")
    started = time.perf_counter()
    model.rank_users(model.model_scores(trainer.net.eval(), data, trainer.personal, "test"), data, "test")
    yield row("a million items: full ranking", len(data.users) / (time.perf_counter() - started), "users/s")


PARTS = {name.removeprefix("bench_"): function for name, function in list(globals().items()) if name.startswith("bench_")}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/ml-100k", help="run folder with embeddings and intents (default %(default)s)")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repetitions, no whole training")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    device = saerec.pick_device(options.device)
    if options.part:  # in a process of its own: rows on the last line
        rows = list(PARTS[options.part](options, device))
        peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else saerec.peak_memory()
        measured = rows and options.part != "training"  # which only reads logs
        print("\n" + json.dumps([*rows, row(f"peak memory of {options.part}", peak, "GiB")] if measured else rows))
        return
    rows, common = [], ["--run", options.run, "--device", options.device, *["--quick"] * options.quick]
    for part in options.only.split(","):
        done = subprocess.run([sys.executable, __file__, *common, "--part", part], stdout=subprocess.PIPE, text=True, check=True)
        rows += (found := json.loads(done.stdout.splitlines()[-1]))
        for one in found:
            beside = "" if not one["against"] else f"   {one['against']}" + ("" if one["ratio"] is None else f": {one['ratio']:.2f}")
            print(f"{one['name']:58}{one['value']:>12,.4g} {one['unit']:12}{beside}", flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    cores = f"{torch.get_num_threads()} threads, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    machine = torch.cuda.get_device_name() if device.type == "cuda" else cores
    command = " ".join(["python benchmarks/bench.py", *sys.argv[1:]])
    report = dict(machine=machine, torch=torch.__version__, commit=commit, command=command, rows=rows)
    saerec.write_lines(ROOT / "benchmarks" / "results.json", [json.dumps(report, indent=1)])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (saerec.UserError, subprocess.CalledProcessError) as error:  # the latter: a part that has said why
        print(error if isinstance(error, saerec.UserError) else "a part failed", file=sys.stderr)
        sys.exit(2)
