"""What all stages share: the dataset folder, the leave-one-out split, ranking, artifacts, settings, progress.

    python saerec.py prepare ml-100k                        make a dataset folder from a public source: MovieLens 100K,
    python saerec.py prepare amazon --reviews FILE --meta FILE --out data/mine      Amazon reviews of 2014, 2018 or 2023,
    python saerec.py prepare amazon --category Beauty --release 2014                downloaded if a category is named,
    python saerec.py prepare csv --interactions FILE --items FILE --out data/mine   or from tables of your own
    python saerec.py check data/ml-100k                     say what is in a folder, and what is wrong with it

A dataset folder holds two plain files, each may be gzipped (.gz):
    sequences.txt   a line a user:  user item item item ...      oldest first; ids are tokens without white space
    texts.jsonl     a line a text:  {"item": "...", "text": "...", "user": "..."?, "title": "..."?}

Letters used in shape comments everywhere:
    N texts, E embedding width | M latents, K active latents | J intents, k personal and g public intents a position
    B histories in a batch, T positions, P real (unpadded) positions, D width of the recommender, V items
Item 0 is padding everywhere; real items are 1..V, so an array with a row per item has V+1 rows.
"""

import argparse
import array
import ast
import csv
import dataclasses
import datetime
import difflib
import gzip
import hashlib
import html
import http.client
import itertools
import json
import math
import os
import re
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """A mistake that the user can mend: one sentence saying what, where, and what to do."""


# Settings and command line


def setting(default, help, unit="", origin="ours", choices=None, low=None, high=None, positional=False):
    """A field of a settings dataclass: its default, and what --help and the checks need to know of it."""
    meta = dict(help=help, unit=unit, origin=origin, choices=choices, low=low, high=high, positional=positional)
    return dataclasses.field(default=default, metadata=meta)


def common_settings():
    """The two settings that every stage has: (seed, device)."""
    seed = setting(0, "seed of every random choice", low=0, high=2**31 - 1)
    return seed, setting("auto", "where to compute: auto takes a GPU if there is one", choices=("auto", "cpu", "cuda"))


def check_settings(settings):
    """Refuse a value out of its range or choices, naming the allowed ones. Raises UserError."""
    for f in dataclasses.fields(settings):
        value, m = getattr(settings, f.name), f.metadata
        option = f.name if m["positional"] else "--" + f.name.replace("_", "-")
        if m["choices"] and value not in m["choices"]:
            raise UserError(f"{option} is {value!r}; choose one of {', '.join(m['choices'])}")
        low, high = m["low"], m["high"]
        if (low is not None and not value >= low) or (high is not None and not value <= high):
            allowed = f"at least {low}" if high is None else f"at most {high}" if low is None else f"{low} to {high}"
            raise UserError(f"{option} is {value}; it must be {allowed}")
    return settings


class Parser(argparse.ArgumentParser):
    """argparse with one-sentence errors and the nearest known option for a mistyped one."""

    def error(self, message):
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1) if unknown else []
        hint = f"did you mean {near[0]}?" if near else "see --help for what is allowed"
        raise UserError(f"{message}; {hint}")


def run(argv, doc, **commands):
    """Run one command of a script and return its exit status: 0, or 2 after one sentence on stderr.

    commands: name, of one word or more -> (Settings, function(settings)); the first is the default when argv starts
    with no word, and a word that starts no name is refused.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    script = Path(sys.argv[0]).name
    named = [name for name in commands if argv[: len(name.split())] == name.split()]
    if not named and argv and not argv[0].startswith("-"):
        tried = " ".join(argv[:2] if any(name.startswith(argv[0] + " ") for name in commands) else argv[:1])
        print(f"{script}: {tried} is not known; choose one of: {', '.join(commands)}", file=sys.stderr)
        return 2
    name = (named or list(commands))[0]
    argv = argv[len(name.split()) :] if named else argv
    Settings, function = commands[name]
    about = doc if len(commands) == 1 else f"{doc}\nCommands: {', '.join(commands)}. These are the settings of {name}."
    parser = Parser(description=about, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(Settings):
        m = f.metadata
        notes = [f"default {f.default}" if f.default not in ("", None) else "", m["unit"], m["origin"]]
        options = {"default": f.default, "help": f"{m['help']} ({'; '.join(n for n in notes if n)})".replace("%", "%%")}
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": f.type, "metavar": "|".join(m["choices"]) if m["choices"] else f.type.__name__.upper()}
        if m["positional"]:
            parser.add_argument(f.name, help=options["help"], type=f.type)
        else:
            parser.add_argument("--" + f.name.replace("_", "-"), **options)
    try:
        started = time.perf_counter()
        function(check_settings(Settings(**vars(parser.parse_args(argv)))))
        print(f"{name}: done in {time.perf_counter() - started:.1f} s, peak memory {peak_memory():.2f} GiB")
        return 0
    except (UserError, FloatingPointError) as error:  # the latter: training diverged
        problem = str(error)
    except OSError as error:
        problem = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}; free or correct it and run again"
    except KeyboardInterrupt:
        problem = "interrupted; what was finished before stays valid, run the same command again for the rest"
    print(f"\r{script}: {problem}", file=sys.stderr)
    return 2


def peak_memory():
    """The most memory this process has held so far, in GiB."""
    import resource  # not on Windows, where everything else works

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def pick_device(name):
    """torch.device for auto|cpu|cuda; refuses a GPU that is not there rather than falling back silently."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu, or install a CUDA build of torch")
    return torch.device("cuda" if name == "auto" and torch.cuda.is_available() else name.replace("auto", "cpu"))


def generator(seed, purpose):
    """A CPU torch.Generator of its own for each purpose, so that drawing more of one thing never shifts another."""
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Progress:
    """One self-updating line on a terminal, a plain line now and then otherwise; both with the time left."""

    def __init__(self, total, label, left="s left"):
        self.total, self.label, self.left, self.start, self.shown = total, label, left, time.perf_counter(), 0.0
        self.live = sys.stdout.isatty()

    def show(self, done, info="", keep=False):
        """Report `done` of `total` units; keep=True prints a lasting line whatever the time."""
        now = time.perf_counter()
        last = done >= self.total
        if not (keep or last) and now - self.shown < (0.2 if self.live else 10):
            return
        self.shown = now
        left = (now - self.start) * (self.total - done) / max(done, 1)
        when = f"{now - self.start:.0f} s" if last else f"{left:.0f} {self.left}"
        line = f"{self.label} {done:g}/{self.total}  {info}{'  ' * bool(info)}{when}"
        print(f"\r\033[K{line}" if self.live else line, end="\n" if keep or last or not self.live else "", flush=True)


# Files and artifacts


def write_atomically(path, write):
    """Call write(temporary path), then rename it to path: a reader never sees half a file, whatever interrupts."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".", suffix=".tmp")
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except safetensors.SafetensorError as error:  # how safetensors reports a full disk
        raise UserError(f"{path} could not be written ({error}); free some disk space and run again") from error
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_lines(path, lines):
    """Write an iterable of strings as the lines of a UTF-8 text file, atomically."""

    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as f:
            f.writelines(line + "\n" for line in lines)

    write_atomically(path, write)


def write_table(path, rows):
    """Write a list of dicts with the same keys as CSV, atomically."""
    lines = [",".join(rows[0]), *(",".join(f"{value:.6g}" if isinstance(value, float) else str(value) for value in row.values()) for row in rows)]
    write_lines(path, lines)


def file_hash(path):
    """First 16 hex digits of a file's SHA-256: enough to tell artifacts apart."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def save_artifact(path, tensors, settings, dataset_hash, made_from=(), **more):
    """Write a dict of tensors as safetensors whose metadata say how, from what and with what they were made.

    made_from: paths of the artifacts read to make this one; their hashes let `load_artifact` refuse a mix-up.
    The metadata is one JSON string, because safetensors keeps several keys in no fixed order, and equal runs
    should give equal bytes.
    """
    meta = dict(
        settings=dataclasses.asdict(settings), dataset=dataset_hash, made_from={Path(p).name: file_hash(p) for p in made_from},
        versions={"python": sys.version.split()[0], "numpy": np.__version__, "torch": torch.__version__, "safetensors": safetensors.__version__},
        **more,
    )  # fmt: skip
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    metadata = {"saerec": json.dumps(meta, sort_keys=True)}
    write_atomically(path, lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata))


def artifact_meta(path, made_by):
    """Metadata of an artifact -> dict; made_by is the command to name when something is wrong with the file.

    Refuses (UserError) a missing, corrupt or foreign file, and one made from another version of a file beside it.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing: make it with `{made_by}`")
    try:
        with safetensors.safe_open(path, "pt") as f:
            meta = json.loads((f.metadata() or {}).get("saerec", "null"))
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(f"{path} is corrupt or truncated ({error}): delete it and make it again with `{made_by}`") from error
    if meta is None:
        raise UserError(f"{path} was not written by saerec: make it with `{made_by}`")
    for name, digest in meta["made_from"].items():
        source = path.parent / name
        if source.is_file():  # a run may be passed on without what it was made from
            if file_hash(source) != digest:
                raise UserError(f"{path} was made from another {source} than the one there now: make it again with `{made_by}`")
            artifact_meta(source, made_by)
    return meta


def load_artifact(path, made_by, data=None):
    """Read an artifact -> (tensors, metadata dict); refuses what `artifact_meta` does, and one of another Dataset than `data`."""
    meta = artifact_meta(path, made_by)
    if data and meta["dataset"] != data.hash:
        raise UserError(f"{path} was made from another dataset than the one in {data.folder} now: make it again with `{made_by}`")
    return safetensors.torch.load_file(path), meta


def unpack_wheel(requirement, sha256, members, folder):
    """Fetch a wheel with pip, check its SHA-256, and write some of its members into a folder; nothing is installed.

    members: path inside the wheel -> file name in the folder. Returns the folder. Raises UserError.
    """
    folder, downloads = Path(folder), HERE / "downloads"
    name, version = requirement.split("==")
    wheel = downloads / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not wheel.is_file():
        downloads.mkdir(exist_ok=True)
        print(f"fetching {requirement}")
        with tempfile.TemporaryDirectory(dir=downloads) as scratch:
            pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps", "--no-cache-dir"]
            done = subprocess.run([*pip, "--dest", scratch, requirement], stderr=subprocess.PIPE, text=True)
            if done.returncode:
                reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
                raise UserError(f"pip could not download {requirement} ({reason}): check the network and run again")
            os.replace(Path(scratch) / wheel.name, wheel)
    with open(wheel, "rb") as f:
        if hashlib.file_digest(f, "sha256").hexdigest() != sha256:
            raise UserError(f"{wheel} is not the file that was published as {requirement} (its SHA-256 differs): delete it and run again")
    with zipfile.ZipFile(wheel) as z:
        for member, file in members.items():
            write_atomically(folder / file, lambda temporary: Path(temporary).write_bytes(z.read(member)))
    return folder


# The dataset folder


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A dataset folder in memory. User u's items, oldest first, are flat[start[u]:start[u + 1]]."""

    folder: Path
    hash: str  # of the contents, compressed or not
    users: list  # of ids; only users with at least 3 items
    items: list  # of ids, [V+1]; items[0] is padding
    start: np.ndarray  # int64 [users+1]
    flat: np.ndarray  # int32 [interactions], 1..V
    texts: list  # of str, [N]; those of held-out interactions are left out
    text_item: np.ndarray  # int32 [N], 1..V
    titles: list  # of str, [V+1]; how an item is shown to people
    notes: tuple  # sentences on what was left out or is lacking

    def history(self, user, part):
        """Leave-one-out: what is known before the held-out item of "valid" or "test"; "train" is the valid history."""
        return self.flat[self.start[user] : self.start[user + 1] - (1 if part == "test" else 2)]

    def targets(self, part):
        """The held-out item of each user -> int32 [users]: the last one for "test", the last but one for "valid"."""
        return self.flat[self.start[1:] - (1 if part == "test" else 2)]

    def training_items(self):
        """All interactions that training and statistics may see, user after user -> int32."""
        held_out = np.zeros(len(self.flat), bool)
        held_out[self.start[1:] - 1] = held_out[self.start[1:] - 2] = True
        return self.flat[~held_out]


def raw_lines(path):
    """Yield (number, bytes, bytes read of the file) of each line of a plain or gzipped file. Raises UserError."""
    number = 0
    try:
        with open(path, "rb") as file:
            for number, raw in enumerate(gzip.open(file) if path.suffix == ".gz" else file, 1):
                yield number, raw, file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is corrupt or truncated after line {number} ({error}): copy or make it again") from error


def read_lines(path, digest=None):
    """Yield (number, line) of a plain or gzipped UTF-8 file and feed its bytes to a hashlib digest. Raises UserError."""
    for number, raw, _ in raw_lines(path):
        if digest:
            digest.update(raw)
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} line {number}: not valid UTF-8 (byte {error.start + 1}): save the file as UTF-8") from error


def dataset_file(folder, name):
    """The plain or the gzipped file of that name. Raises UserError if there is neither, or both."""
    found = [p for p in (folder / name, folder / (name + ".gz")) if p.is_file()]
    if len(found) != 1:
        what = f"has neither {name} nor {name}.gz: make the folder with `saerec.py prepare`" if not found else f"has both {name} and {name}.gz: remove one"
        raise UserError(f"{folder} {what}" if folder.is_dir() else f"the dataset folder {folder} does not exist: make it with `saerec.py prepare`")
    return found[0]


def load_dataset(folder):
    """Read and check a dataset folder -> Dataset. Raises UserError with file, line and remedy.

    Users with fewer than 3 items are left out and counted; so is every text that a user wrote about one of their two
    held-out items, since the split must not leak. Items are numbered by sorted id, which the split cannot influence.
    """
    folder = Path(folder)
    digest, sequences, known = hashlib.sha256(), {}, set()
    path = dataset_file(folder, "sequences.txt")
    for number, line in read_lines(path, digest):
        user, *items = line.split() or [""]
        if not items:
            raise UserError(f"{path} line {number}: {f'user {user!r} has no items' if user else 'the line is empty'}: remove the line")
        if user in sequences:
            raise UserError(f"{path} line {number}: user {user!r} has a line already: merge the two")
        sequences[user] = items
        known.update(items)
    kept = [user for user, items in sequences.items() if len(items) >= 3]
    if not kept:
        raise UserError(f"{path} has no user with 3 or more items, which leave-one-out needs: bring a fuller file")
    items = ["", *sorted(known, key=lambda i: (len(i), i))]
    index = {item: number for number, item in enumerate(items)}
    start = np.cumsum([0] + [len(sequences[user]) for user in kept])
    flat = np.array([index[item] for user in kept for item in sequences[user]], np.int32)

    path = dataset_file(folder, "texts.jsonl")
    texts, text_item, titles, empty, held_out = [], [], [""] + [f"item {item}" for item in items[1:]], 0, 0
    digest.update(b"\0")
    for number, line in read_lines(path, digest):
        try:
            row = json.loads(line)
            item, text, user, title = row["item"], row["text"], row.get("user"), row.get("title")
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(f'{path} line {number}: not a JSON object with "item" and "text" ({error!r}): correct the line') from error
        if not all(isinstance(value, str) for value in (item, text, user or "", title or "")):
            raise UserError(f'{path} line {number}: "item", "text", "user" and "title" must be strings: put them in quotes')
        if item not in index:
            raise UserError(f"{path} line {number}: item {item!r} is in no sequence: remove the line, or correct the id")
        if title or (text and not user):
            titles[index[item]] = title or text[:60]
        if not text.strip():
            empty += 1
        elif user and item in sequences.get(user, ())[-2:]:
            held_out += 1
        else:
            texts.append(text)
            text_item.append(index[item])
    if not texts:
        raise UserError(f"{path} has no text to learn intents from: bring texts of the items")
    bare = len(items) - 1 - len(set(text_item))
    counts = [
        (len(sequences) - len(kept), "user(s) with fewer than 3 items left out"),
        (bare, "item(s) without text kept, with no intents"),
        (empty, "empty text(s) left out"),
        (held_out, "text(s) written in held-out interactions left out"),
    ]
    notes = tuple(f"{count:,} {what}" for count, what in counts if count)
    return Dataset(folder, digest.hexdigest()[:16], kept, items, start, flat, texts, np.array(text_item, np.int32), titles, notes)


def run_dataset(run):
    """The dataset that a run's embeddings were made from -> Dataset. Raises UserError if it is not what it was."""
    if not run:
        raise UserError("--run is missing: name the run folder, as in --run runs/ml-100k")
    path, made_by = Path(run) / "embeddings.safetensors", f"embed.py --data DATA --run {run}"
    meta = artifact_meta(path, made_by)
    data = load_dataset(meta["settings"]["data"])
    if data.hash != meta["dataset"]:
        raise UserError(f"{data.folder} has changed since {path} was made from it: make it again with `{made_by}`")
    return data


def describe(data):
    """The statistics of a dataset in lines for people."""
    users, items, lengths = len(data.users), len(data.items) - 1, np.diff(data.start)
    owner = np.repeat(np.arange(users), lengths)
    repeats = len(data.flat) - len(np.unique(owner * (items + 1) + data.flat))
    covered = len(np.unique(data.text_item)) / items
    yield f"{data.folder}: {users:,} users, {items:,} items, {len(data.flat):,} interactions"
    yield f"  length of a history   mean {lengths.mean():.1f}, median {np.median(lengths):.0f}, longest {lengths.max():,}"
    yield f"  density               {len(data.flat) / users / items:.4%}"
    yield f"  repeats               {repeats:,} interactions with an item the user had before ({repeats / len(data.flat):.2%})"
    yield f"  texts                 {len(data.texts):,}, mean {np.mean([len(t) for t in data.texts]):.0f} characters; {covered:.2%} of the items have text"
    yield from (f"  {note}" for note in data.notes)


# Ranking: shared, because training chooses its epoch and evaluation reports with the same code


def target_ranks(scores, targets, seen):
    """Rank of each user's target in a full ranking -> float64 [B], 1 is best; a target already seen is a miss, inf.

    scores: float [B, V+1]; targets: int64 [B]; seen: int64 [B, any], padded with 0. Seen items and padding leave the
    ranking, ties count against the target, and a score that is not a number raises FloatingPointError.
    """
    if torch.isnan(scores).any():
        raise FloatingPointError("a score is not a number: training diverged")
    target_score = scores.gather(1, targets[:, None])
    ahead = scores >= target_score  # (B, V+1), the target itself included
    ahead.scatter_(1, seen, False)
    ahead[:, 0] = False
    miss = (seen == targets[:, None]).any(1)
    return torch.where(miss, torch.inf, ahead.sum(1).double()).cpu()


def ranking_metrics(ranks):
    """HR@5/10/20, NDCG@5/10/20 and MRR of float64 ranks [users] -> dict. One relevant item a user, so IDCG is 1."""
    cut = {n: (ranks <= n).double() for n in (5, 10, 20)}
    metrics = {f"HR@{n}": hit.mean() for n, hit in cut.items()}
    metrics |= {f"NDCG@{n}": (hit / torch.log2(ranks + 1)).mean() for n, hit in cut.items()}
    return {name: value.item() for name, value in (metrics | {"MRR": (1 / ranks).mean()}).items()}


# Sources


def read_movielens(folder):
    """Read ml-100k.inter and ml-100k.item -> (sequences {user: [item]}, rows of texts.jsonl). Ties in time keep file order."""
    with open(folder / "ml-100k.inter", encoding="utf-8") as f:
        ratings = [line.split("\t") for line in f.read().splitlines()[1:]]  # user, item, rating, timestamp
    sequences = {}
    for user, item, _, _ in sorted(ratings, key=lambda r: float(r[3])):
        sequences.setdefault(user, []).append(item)
    rows = []
    with open(folder / "ml-100k.item", encoding="utf-8") as f:
        for line in f.read().splitlines()[1:]:
            item, title, year, genres = line.split("\t")
            title = re.sub(r"^(.*), (The|A|An|Le|La|Les|Il|Das|Der|Die|El|L')(?= \(|$)", r"\2 \1", title)
            title = f"{title} ({year})" if year else title
            rows.append({"item": item, "title": title, "text": f"{title}. {', '.join(genres.split())}."})
    return sequences, rows


@dataclasses.dataclass(frozen=True)
class PrepareSettings:
    source: str = setting("", "where the data come from", choices=("ml-100k",), positional=True)
    out: str = setting("", "dataset folder to write, data/SOURCE if not given", unit="path")


def prepare(settings):
    """Write a dataset folder from a public source: MovieLens 100K (Harper & Konstan 2015) as bundled with RecBole 1.2.1."""
    out = Path(settings.out or f"data/{settings.source}")
    with tempfile.TemporaryDirectory() as scratch:
        files = ("ml-100k.inter", "ml-100k.item")
        sha256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
        unpack_wheel("recbole==1.2.1", sha256, {f"recbole/dataset_example/ml-100k/{file}": file for file in files}, scratch)
        sequences, rows = read_movielens(Path(scratch))
    write_lines(out / "texts.jsonl", (json.dumps(row, ensure_ascii=False) for row in rows))
    write_lines(out / "sequences.txt", (" ".join([user, *sequences[user]]) for user in sorted(sequences, key=int)))
    print(*describe(load_dataset(out)), sep="\n")


@dataclasses.dataclass(frozen=True)
class CheckSettings:
    folder: str = setting("", "dataset folder", unit="path", positional=True)


def check(settings):
    """Print what is in a dataset folder; a fault raises UserError."""
    print(*describe(load_dataset(settings.folder)), sep="\n")


def main(argv=None):
    return run(argv, __doc__, prepare=(PrepareSettings, prepare), check=(CheckSettings, check))


if __name__ == "__main__":
    sys.exit(main())
