"""What all stages share: the dataset folder, the leave-one-out split, ranking, artifacts, settings, progress.

    python saerec.py prepare ml-100k                                                   make a dataset folder: MovieLens 100K,
    python saerec.py prepare amazon --category Beauty --release 2014 --text both       Amazon reviews, downloaded
    python saerec.py prepare amazon --reviews FILE --meta FILE --out data/mine         or already here,
    python saerec.py prepare csv --interactions FILE --items FILE --out data/mine      tables of your own,
    python saerec.py prepare planted                                                   or a world whose intents are known
    python saerec.py check data/ml-100k                                                say what is in a folder, and what is wrong

A dataset folder holds two plain files, each may be gzipped (.gz):
    sequences.txt   a line a user:  user item item item ...      oldest first; ids are tokens without white space
    texts.jsonl     a line a text:  {"item": "...", "text": "...", "user": "..."?, "title": "..."?}

Letters used in shape comments everywhere:
    N texts, E embedding width | M latents, K active latents | J intents, k personal and g public intents a position
    B histories in a batch, T positions, P real (unpadded) positions, D width of the recommender, V items
Item 0 is padding everywhere; real items are 1..V, so an array with a row per item has V+1 rows.
"""

import argparse
import atexit
import array
import ast
import csv
import dataclasses
import difflib
import gzip
import hashlib
import html
import http.client
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
import time
import urllib.request
import zipfile
import zlib
from datetime import datetime, timezone
from pathlib import Path

# Idle OpenMP threads spin before they sleep; spinning long on a core that another process needs makes training stand still.
# GNU's OpenMP reads this when torch loads it, so it stands before that import; a value of the user's own stays.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np  # noqa: E402
import safetensors  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

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

    commands: name, a word or more -> (Settings, function(settings)); the first is the default when argv starts with an option.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    script = Path(sys.argv[0]).name
    words = next((name.split() for name in commands if argv[: len(name.split())] == name.split()), [])
    if not words and argv and not argv[0].startswith("-"):
        print(f"{script}: there is no {' '.join(argv[:2])!r}; choose one of: {', '.join(commands)}", file=sys.stderr)
        return 2
    name, argv = " ".join(words) or next(iter(commands)), argv[len(words) :]
    Settings, function = commands[name]
    about = doc if len(commands) == 1 else f"{doc}\nCommands: {', '.join(commands)}. These are the settings of {name}."
    try:
        started = time.perf_counter()
        settings = parse(Settings, argv, about)
        function(settings)
        if not getattr(settings, "json", False):  # which is for programs
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


def parse(Settings, argv, about=""):
    """The words of a command line -> checked settings. Raises UserError."""
    parser = Parser(description=about, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(Settings):
        m = f.metadata
        notes = [m["unit"]] if f.default == "" else [f"default {f.default}", m["unit"], m["origin"]]
        options = {"default": f.default, "help": f"{m['help']} ({'; '.join(n for n in notes if n)})".replace("%", "%%")}
        if f.type is bool:
            options["action"] = argparse.BooleanOptionalAction
        else:
            options |= {"type": f.type, "metavar": "|".join(m["choices"]) if m["choices"] else f.type.__name__.upper()}
        if m["positional"]:
            many = {"nargs": "+"} if f.type is list else {"type": f.type}
            parser.add_argument(f.name, help=options["help"], **many)
        else:
            parser.add_argument("--" + f.name.replace("_", "-"), **options)
    return check_settings(Settings(**vars(parser.parse_args(argv))))


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


def join_processes():
    """Under torchrun, join the other processes; of all of them only the first prints and writes files."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.distributed.init_process_group()
        atexit.register(torch.distributed.destroy_process_group)
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if process_of()[0]:
            sys.stdout = open(os.devnull, "w")


def process_of():
    """(number of this process, how many there are): (0, 1) without torchrun."""
    on = torch.distributed.is_available() and torch.distributed.is_initialized()
    return (torch.distributed.get_rank(), torch.distributed.get_world_size()) if on else (0, 1)


def sum_over_processes(tensor):
    """Add up a tensor over all processes, in place -> the tensor."""
    if process_of()[1] > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


class Progress:
    """One self-updating line on a terminal, a plain line now and then otherwise; both with the time left."""

    def __init__(self, total, label, left="s left"):
        self.total, self.label, self.left, self.start, self.shown = total, label, left, time.perf_counter(), 0.0
        self.live = sys.stdout.isatty()

    def show(self, done, info="", keep=False):
        """Report `done` of `total` units; keep=True prints a lasting line whatever the time."""
        now = time.perf_counter()
        last = done >= self.total
        if not (keep or last) and now - (self.shown or self.start) < (0.2 if self.live else 10):
            return
        self.shown = now
        left = (now - self.start) * (self.total - done) / max(done, 1)
        when = f"{now - self.start:.0f} s" if last else f"{left:.0f} {self.left}"
        line = f"{self.label} {done:g}/{self.total}  {info}{'  ' * bool(info)}{when}"
        print(f"\r\033[K{line}" if self.live else line, end="\n" if keep or last or not self.live else "", flush=True)


# Files and artifacts


def write_atomically(path, write):
    """Call write(temporary path), then rename it to path: a reader never sees half a file, whatever interrupts."""
    if process_of()[0]:
        return
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
    cells = ([f"{value:.6g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows)
    write_lines(path, map(",".join, [list(rows[0]), *cells]))


def file_hash(path):
    """First 16 hex digits of a file's SHA-256: enough to tell artifacts apart."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def save_artifact(path, tensors, settings, dataset_hash, made_from=(), **more):
    """Write a dict of tensors as safetensors whose metadata say how, from what and with what they were made.

    made_from: paths of the artifacts read to make this one; their hashes let `load_artifact` refuse a mix-up.
    """
    meta = dict(
        settings=dataclasses.asdict(settings), dataset=dataset_hash, made_from={Path(p).name: file_hash(p) for p in made_from},
        versions={"python": sys.version.split()[0]} | {package.__name__: package.__version__ for package in (np, torch, safetensors)}, **more,
    )  # fmt: skip
    write_artifact(path, tensors, meta)


def write_artifact(path, tensors, meta):
    """Write tensors with a dict of metadata, as one JSON string: safetensors keeps several keys in no fixed order."""
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


def raw_lines(path, show=False):
    """Yield (number, bytes) of each line of a plain or gzipped file; show=True tells how far it is. Raises UserError."""
    number = 0
    try:
        with open(path, "rb") as file:
            progress = Progress(os.fstat(file.fileno()).st_size // 10**6 + 1, f"{path.name}, MB read")
            for number, raw in enumerate(gzip.open(file) if path.suffix == ".gz" else file, 1):
                yield number, raw
                if show and number % 2**16 == 0:
                    progress.show(file.tell() // 10**6)
            if progress.shown:
                progress.show(progress.total)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path} is corrupt or truncated after line {number} ({error}): copy or make it again") from error


def read_lines(path, digest):
    """Yield (number, line) of a plain or gzipped UTF-8 file and feed its bytes to a hashlib digest. Raises UserError."""
    for number, raw in raw_lines(path):
        digest.update(raw)
        try:
            yield number, raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path} line {number}: not valid UTF-8 (byte {error.start + 1}): save the file as UTF-8") from error


def dataset_file(folder, name):
    """The plain or the gzipped file of that name. Raises UserError if there is neither, or both."""
    found = [p for p in (folder / name, folder / (name + ".gz")) if p.is_file()]
    if len(found) != 1:
        remedy = "make it with `saerec.py prepare`"
        if not folder.is_dir():
            raise UserError(f"the dataset folder {folder} does not exist: {remedy}")
        if found:
            raise UserError(f"{folder} has both {name} and {name}.gz: remove one")
        raise UserError(f"{folder} has neither {name} nor {name}.gz: {remedy}")
    return found[0]


def load_dataset(folder):
    """Read and check a dataset folder -> Dataset. Raises UserError with file, line and remedy.

    Users with fewer than 3 items are left out and counted; so is every text that a user wrote about one of their two
    held-out items, since the split must not leak. Items are numbered by sorted id, which the split cannot influence.
    """
    folder = Path(folder)
    digest, sequences, known = hashlib.sha256(), {}, {}
    path = dataset_file(folder, "sequences.txt")
    for number, line in read_lines(path, digest):
        user, *items = line.split() or [""]
        if not items:
            raise UserError(f"{path} line {number}: {f'user {user!r} has no items' if user else 'the line is empty'}: remove the line")
        if user in sequences:
            raise UserError(f"{path} line {number}: user {user!r} has a line already: merge the two")
        sequences[user] = [known.setdefault(item, item) for item in items]  # each id is kept once, however often it occurs
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
            titles[index[item]] = title or textwrap.shorten(text, 70, placeholder=" ...")
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


def user_metrics(ranks):
    """HR@5/10/20, NDCG@5/10/20 and MRR of each user, from float64 ranks [users] -> dict of float64 [users].

    There is one relevant item a user, so IDCG is 1.
    """
    cut = {n: (ranks <= n).double() for n in (5, 10, 20)}
    metrics = {f"HR@{n}": hit for n, hit in cut.items()}
    metrics |= {f"NDCG@{n}": hit / torch.log2(ranks + 1) for n, hit in cut.items()}
    return metrics | {"MRR": 1 / ranks}


def ranking_metrics(ranks):
    """The means of `user_metrics` over users -> dict of floats."""
    return {name: value.mean().item() for name, value in user_metrics(ranks).items()}


# Sources: what they share

TAG = re.compile(r"<(script|style)\b.*?</\1\s*>|<!--.*?-->|</?[a-z][^<>]*>", re.I | re.S)
TAG_IN_LINE = re.compile(r"</?(?:a|b|em|font|i|small|span|strong|sub|sup|u)\b[^<>]*>", re.I)
SENTENCE_END = re.compile(r"""(?<=[.!?"'”’)\]])(?<![^.!?]["'”’)\]])\s+(?=["'“‘(\[]*[A-Z0-9À-Þ])""")


def clean(text):
    """The lines of a text without HTML tags and entities (some are escaped twice) and superfluous white space."""
    while (plain := html.unescape(text)) != text:
        text = plain
    text = TAG.sub("\n", TAG_IN_LINE.sub("", text)).encode("utf-8", "ignore").decode()  # JSON may hold half a surrogate pair
    return [line for line in (" ".join(line.split()) for line in text.split("\n")) if line]


def join_sentences(parts):
    """Join texts, with a full stop after each but the last that has no such mark; empty ones are left out."""
    *parts, last = [part for part in parts if part] or [""]
    return " ".join([*(part if part[-1] in ".!?:;," else part + "." for part in parts), last])


def parse_time(value):
    """Seconds of a number, or of an ISO date or time (UTC unless it says otherwise). Raises ValueError."""
    if re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", str(value), re.I):
        return float(value)
    when = datetime.fromisoformat(str(value))
    return (when if when.tzinfo else when.replace(tzinfo=timezone.utc)).timestamp()


def index_interactions(rows):
    """Number the users and items of (user, item, time, line of the file) rows -> (user ids, item ids, log).

    log: int32 [3, interactions], user, item and line, sorted by user, then time; ties in time keep the order of rows.
    """
    users, items, log, times = {}, {}, array.array("i"), array.array("d")  # 20 bytes an interaction
    for user, item, when, line in rows:
        log.extend((users.setdefault(user, len(users)), items.setdefault(item, len(items)), line))
        times.append(when)
    log = np.asarray(log).reshape(-1, 3).T
    return list(users), list(items), log[:, np.lexsort((times, log[0]))]


def user_bounds(log):
    """Where each user's interactions begin in a log as of `index_interactions`, and where the last one's end -> int [users+1]."""
    return np.flatnonzero(np.diff(log[0], prepend=-1, append=-1))


def k_core(user, item, core):
    """Which interactions stay once users and items with fewer than `core` of them are gone -> indices, ascending.

    user, item: int [interactions]. A user's leaving may cost an item its place and so on, hence the loop.
    """
    kept = np.arange(len(user))
    while True:
        stays = (np.bincount(user[kept])[user[kept]] >= core) & (np.bincount(item[kept])[item[kept]] >= core)
        if stays.all():
            return kept
        kept = kept[stays]


def write_dataset(out, users, items, log, rows):
    """Write a dataset folder and say what is in it -> Dataset. users, items, log: as of `index_interactions`; rows: of texts.jsonl.

    Rows without text, and what is empty in the others, are left out. Raises UserError as `load_dataset` does.
    """
    rows = ({name: value for name, value in row.items() if value} for row in rows if row["text"])
    write_lines(Path(out) / "texts.jsonl", (json.dumps(row, ensure_ascii=False) for row in rows))
    parts = ((users[log[0, a]], log[1, a:b].tolist()) for a, b in itertools.pairwise(user_bounds(log)))
    write_lines(Path(out) / "sequences.txt", (" ".join([user, *(items[i] for i in part)]) for user, part in parts))
    data = load_dataset(out)
    print(*describe(data), sep="\n")
    return data


def fetch(url, part, timeout):
    """Download url into `part` once, going on after what is there. Raises what urllib does; ConnectionError on a short body."""
    with open(part, "ab") as f:
        request = urllib.request.Request(url, headers={"User-Agent": "saerec", "Range": f"bytes={f.tell()}-"})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            have = f.tell() if response.status == 206 else f.truncate(0)  # the server knows no ranges: start over
            total = have + int(response.headers.get("Content-Length") or 0)
            progress = Progress(total // 10**6 + 1, f"{part.name}, MB")
            while block := response.read1(2**16):  # read() would lose what came just before a connection breaks
                have += f.write(block)
                if have < total:
                    progress.show(have // 10**6)
            if have < max(total, 1):
                raise ConnectionError(f"the connection ended after {have:,} of {total:,} bytes")
            progress.show(progress.total)


def download(url, path, tries=5, wait=2.0, timeout=60.0):
    """Fetch a gzip file unless it is there already -> path. Raises UserError; what came so far stays for the next run.

    wait: seconds before the second try, doubled for each more; a refusal such as 404 is final. timeout: seconds of silence.
    """
    part = path.with_suffix(".part" + path.suffix)
    path.parent.mkdir(parents=True, exist_ok=True)
    while not path.is_file():
        try:
            fetch(url, part, timeout)
            for _ in raw_lines(part, show=True):  # to its end: is it whole?
                pass
            os.replace(part, path)
        except (OSError, http.client.HTTPException, UserError) as error:
            code, corrupt, tries = getattr(error, "code", 0), isinstance(error, UserError), tries - 1
            if corrupt or code == 416:  # 416: the server has nothing that could follow what is here
                part.unlink()
            problem = f"{url}: {str(error.__cause__ or error).strip('<>')}"
            if corrupt or not tries or (400 <= code < 500 and code not in (408, 416, 429)):
                raise UserError(f"{problem}; run again to go on, or get it by hand: to {path} or as --reviews, --meta") from error
            print(f"{problem}; trying again in {wait:g} s")
            time.sleep(wait)
            wait *= 2
    return path


# Source: MovieLens 100K


def read_movielens(folder):
    """Read ml-100k.inter and ml-100k.item -> (rows for `index_interactions`, rows of texts.jsonl)."""
    with open(folder / "ml-100k.inter", encoding="utf-8") as f:
        ratings = [line.split("\t") for line in f.read().splitlines()[1:]]  # user, item, rating, timestamp
    interactions = [(user, item, float(when), 0) for user, item, _, when in sorted(ratings, key=lambda r: int(r[0]))]
    rows = []
    with open(folder / "ml-100k.item", encoding="utf-8") as f:
        for line in f.read().splitlines()[1:]:
            item, title, year, genres = line.split("\t")
            title = re.sub(r"^(.*), (The|A|An|Le|La|Les|Il|Das|Der|Die|El|L')(?= \(|$)", r"\2 \1", title)
            title = f"{title} ({year})" if year else title
            rows.append({"item": item, "title": title, "text": f"{title}. {', '.join(genres.split())}."})
    return interactions, rows


@dataclasses.dataclass(frozen=True)
class MovieLensSettings:
    out: str = setting("data/ml-100k", "dataset folder to write", unit="path")


def prepare_movielens(settings):
    """Write a dataset folder from MovieLens 100K (Harper & Konstan 2015) as bundled with RecBole 1.2.1."""
    with tempfile.TemporaryDirectory() as scratch:
        files = ("ml-100k.inter", "ml-100k.item")
        sha256 = "9c9948202011f37eb0a7c6768129313f00d6403ad221ec940d5e2d5d5f33a407"
        unpack_wheel("recbole==1.2.1", sha256, {f"recbole/dataset_example/ml-100k/{file}": file for file in files}, scratch)
        interactions, rows = read_movielens(Path(scratch))
    write_dataset(settings.out, *index_interactions(interactions), rows)


# Source: Amazon reviews of 2014 (McAuley et al. 2015, He & McAuley 2016), 2018 (Ni et al. 2019) and 2023 (Hou et al. 2024)

ALWAYS = """Automotive Books CDs_and_Vinyl Cell_Phones_and_Accessories Clothing_Shoes_and_Jewelry Digital_Music Electronics
    Grocery_and_Gourmet_Food Home_and_Kitchen Kindle_Store Movies_and_TV Musical_Instruments Office_Products Patio_Lawn_and_Garden
    Pet_Supplies Sports_and_Outdoors Tools_and_Home_Improvement Toys_and_Games Video_Games """
AMAZON = {  # release: (address, all reviews there, their 5-core, metadata, categories)
    "2014": ("http://snap.stanford.edu/data/amazon/productGraph/categoryFiles/", "reviews_{}.json.gz", "reviews_{}_5.json.gz",
        "meta_{}.json.gz", ALWAYS + "Amazon_Instant_Video Apps_for_Android Baby Beauty Health_and_Personal_Care"),
    "2018": ("https://mcauleylab.ucsd.edu/public_datasets/data/amazon_v2/", "categoryFiles/{}.json.gz",
        "categoryFilesSmall/{}_5.json.gz", "metaFiles2/meta_{}.json.gz", ALWAYS + "AMAZON_FASHION All_Beauty Appliances "
        "Arts_Crafts_and_Sewing Gift_Cards Industrial_and_Scientific Luxury_Beauty Magazine_Subscriptions Prime_Pantry Software"),
    "2023": ("https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw/", "review_categories/{}.jsonl.gz", "",
        "meta_categories/meta_{}.jsonl.gz", ALWAYS + "All_Beauty Amazon_Fashion Appliances Arts_Crafts_and_Sewing Baby_Products "
        "Beauty_and_Personal_Care Gift_Cards Handmade_Products Health_and_Household Health_and_Personal_Care "
        "Industrial_and_Scientific Magazine_Subscriptions Software Subscription_Boxes Unknown"),
}  # fmt: skip
REVIEW_FIELDS = {  # of a line that has the first: user, item, time, headline, text
    "reviewerID": ("reviewerID", "asin", "unixReviewTime", "summary", "reviewText"),  # 2014 and 2018
    "user_id": ("user_id", "parent_asin", "timestamp", "title", "text"),  # 2023
}
# The first of each that a line has
ITEM_FIELDS = (("title",), ("brand", "store"), ("categories", "category"), ("description", "features", "feature"))


@dataclasses.dataclass(frozen=True)
class AmazonSettings:
    reviews: str = setting("", "reviews of any release, a line each, gzipped or not", unit="path")
    meta: str = setting("", "metadata of the items, likewise; only --text reviews does without", unit="path")
    category: str = setting("", "category to download; Beauty of 2014: 22,363 users, 12,101 items, 198,502 interactions")
    release: str = setting("", f"release of --category: {', '.join(AMAZON)}")
    out: str = setting("", "dataset folder to write; data/CATEGORY in small letters, or data/amazon, if not given", unit="path")
    core: int = setting(5, "drop users and items with fewer interactions, until none is left; 0 drops none", low=0)
    text: str = setting("item", "texts of an item: its metadata, its reviews, or both", choices=("item", "reviews", "both"))
    sentences: bool = setting(False, "cut reviews into sentences, less those of under 4 words and those an item has already")


def amazon_files(settings):
    """Paths of the reviews and, if there are any, of the metadata, downloaded if need be -> list. Raises UserError."""
    s = settings
    for wrong, problem in (
        (s.sentences and s.text == "item", "--sentences cuts reviews, and --text item has none: add --text reviews or both"),
        (s.category and (s.reviews or s.meta), "--category downloads what --reviews and --meta name: give the one or the others"),
        (s.category and s.release not in AMAZON, f"--release is {s.release!r}; choose one of {', '.join(AMAZON)}"),
        (s.release and not s.category, "--release goes with --category; that of your files shows in their lines: leave it out"),
        (not (s.category or s.reviews), "no reviews: give --reviews FILE --meta FILE, or --category Beauty --release 2014"),
        (not (s.category or s.meta or s.text == "reviews"), f"--text {s.text} needs --meta FILE; --text reviews does without"),
    ):
        if wrong:
            raise UserError(problem)
    if not s.category:
        return [Path(file) for file in (s.reviews, s.meta) if file and os.stat(file)]  # stat misses a file now, not in an hour
    address, reviews, core, meta, categories = AMAZON[s.release]
    if s.category not in categories.split():
        near = difflib.get_close_matches(s.category, categories.split(), 5, 0.4) or categories.split()
        raise UserError(f"--category {s.category!r} is not in release {s.release}; choose one of {', '.join(near)}")
    # Peeling a 5-core again gives the core of all reviews, since the largest core is unique, from a tenth of the download
    names = [name.format(s.category) for name in (core if core and s.core >= 5 else reviews, meta)]
    return [download(address + name, HERE / "downloads" / f"amazon-{s.release}" / Path(name).name) for name in names]


def parse_line(raw):
    """One raw line -> dict. Metadata of 2014 are Python literals; literal_eval runs no code. Raises ValueError."""
    try:
        return {**(ast.literal_eval if raw.startswith(b"{'") else json.loads)(raw.decode())}
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError) as error:
        raise ValueError("not a JSON object in UTF-8, nor a Python dict") from error


def parse_review(raw):
    """(user, item, time, headline, text) of a raw line. Raises ValueError; only the texts may be lacking."""
    record = parse_line(raw)
    user, item, when, headline, text = map(record.get, REVIEW_FIELDS["user_id" if "user_id" in record else "reviewerID"])
    if when is None or not all(isinstance(token, str) and re.fullmatch("[!-~]+", token) for token in (user, item)):
        raise ValueError(f"user {user!r}, item {item!r}, time {when!r}")
    return user, item, parse_time(when), str(headline or ""), str(text or "")


def read_records(path, parse):
    """Yield (line number, parse(raw line)). A broken line is left out, and said.

    Raises UserError if there is no line, if all are broken, or if more than one and more than 1% of them are.
    """
    total, broken, examples = 0, 0, ""
    for total, raw in raw_lines(path, show=True):
        try:
            row = parse(raw)
        except ValueError as error:
            broken += 1
            examples += f", line {total} ({error})" if broken <= 3 else ""
        else:
            yield total, row
    report = f"{path}: {broken:,} of {total:,} lines broken{examples}"
    if broken == total or broken > max(1, total / 100):
        raise UserError(f"{report}; see that it is the right file, copy or download it again")
    if broken:
        print(f"{report}; left out")


def describe_item(record):
    """(title, text) of an item's metadata: "title. brand. categories. description", less what is absent."""

    def lines(value):  # a string, a list, or a list of lists
        return [line for part in value for line in lines(part)] if isinstance(value, list) else clean(str(value))

    title, brand, categories, description = (lines(next(filter(None, map(record.get, names)), "")) for names in ITEM_FIELDS)
    title = " ".join(line for line in title if "getTime" not in line)  # 2018 took a script for the title here and there
    return title, join_sentences([title, " ".join(brand), ", ".join(dict.fromkeys(categories)), " ".join(description)])


def review_rows(reviews, log, about, sentences):
    """Read the reviews in the log again and yield rows of texts.jsonl, one a review or one a sentence."""
    ends, lines, seen = user_bounds(log)[1:], np.zeros(log[2].max() + 1, np.uint8), set()
    lines[log[2]] = 1
    lines[log[2, ends - 1]] = lines[log[2, ends - 2]] = 2  # held out
    use = lines.tobytes()
    for number, raw in raw_lines(reviews, show=True):
        if number >= len(use) or not use[number]:
            continue
        user, item, _, headline, text = parse_review(raw)
        texts, headline = clean(text), " ".join(clean(headline))
        if not " ".join(texts).startswith(headline.rstrip(" .…")):  # Amazon makes a lacking headline of the first words
            texts.insert(0, headline)
        if sentences:
            texts = [part for text in texts for part in SENTENCE_END.split(text) if len(part.split()) >= 4]
            # 64 bits tell sentences apart in little room; with `use`, since a held-out one must not push out another's
            keys = {hash((item, use[number], text.lower())): text for text in texts}
            texts = [text for key, text in keys.items() if key not in seen]
            seen.update(keys)
        for text in texts if sentences else [join_sentences(texts)]:
            yield {"item": item, "user": user, "title": about[item][0], "text": text}


def prepare_amazon(settings):
    """Write a dataset folder from Amazon reviews: first review of a user-item pair, iterated core, oldest first.

    The reviews are read once for ids and times, and again for the texts that stay: none is held in memory.
    """
    s = settings
    reviews, *meta = amazon_files(s)
    users, items, log = index_interactions((*review[:3], line) for line, review in read_records(reviews, parse_review))
    pairs = np.unique(log[0].astype(np.int64) * len(items) + log[1], return_index=True)[1]  # where each pair comes first
    pairs.sort()
    kept = pairs[k_core(log[0, pairs], log[1, pairs], s.core)]
    print(f"{reviews}: {log.shape[1]:,} reviews by {len(users):,} users of {len(items):,} items")
    print(f"  {len(pairs):,} of them without those that repeat a user and an item, {len(kept):,} of these in the {s.core}-core")
    if not len(kept):
        raise UserError(f"{reviews}: no users and items have {s.core} interactions with one another: lower --core")
    log = log[:, kept]
    about = dict.fromkeys((items[i] for i in np.unique(log[1])), ("", ""))  # item: (title, text)
    for file in meta:
        for _, record in read_records(file, parse_line):
            item = str(record.get("parent_asin") or record.get("asin"))
            if about.get(item) == ("", ""):
                about[item] = describe_item(record)
        if not any(map(any, about.values())):
            raise UserError(f"{file} has none of the items of {reviews}: bring that of the same category and release")
    rows = ({"item": item, "title": title, "text": text} for item, (title, text) in about.items() if s.text != "reviews")
    if s.text != "item":
        rows = itertools.chain(rows, review_rows(reviews, log, about, s.sentences))
    write_dataset(s.out or f"data/{s.category.lower() or 'amazon'}", users, items, log, rows)


# Source: a planted world, whose true intents are known

THEMES = """space: rocket orbit planet astronaut galaxy | cooking: recipe oven butter kitchen spice
music: guitar melody concert singer drum | gardening: soil seeds greenhouse compost tulip
sailing: anchor harbour mast sail regatta | chess: gambit checkmate pawn endgame rook
medicine: surgeon clinic vaccine nurse diagnosis | crime: detective murder alibi heist suspect
war: soldier battle trench general siege | romance: wedding kiss sweetheart courtship bouquet
winter: snow sledge glacier blizzard icicle | desert: dune camel oasis cactus mirage
horses: saddle stallion gallop stable jockey | trains: locomotive railway carriage platform conductor
law: judge verdict courtroom lawyer jury | magic: wizard spell wand potion sorcerer
pirates: treasure buccaneer cutlass galleon parrot | robots: android circuit sensor automaton servo
school: teacher classroom pupil homework exam | football: goal striker referee stadium penalty
painting: canvas brush portrait easel palette | history: empire throne dynasty medieval castle
ocean: coral whale reef dolphin submarine | mountains: summit climber ridge avalanche cliff
dogs: puppy kennel leash terrier bark | cats: kitten whiskers purr tabby paw
fashion: dress runway tailor silk couture | money: bank loan investor market dividend
politics: senate election minister campaign ballot | theatre: stage actor curtain rehearsal playwright
camping: tent campfire lantern hiker backpack | baking: dough yeast pastry loaf croissant
coffee: espresso roast barista latte beans | photography: camera lens shutter tripod darkroom
astronomy: telescope comet nebula eclipse meteor | dinosaurs: fossil raptor jurassic triceratops extinct
ghosts: haunted phantom seance spirit crypt | cycling: bicycle pedal helmet peloton gears
farming: tractor harvest barn wheat cattle | dance: ballet tango waltz choreographer rhythm"""
NOISE = "thing story piece work item kind sort part set version edition series line style form way side place time day year people world life"
TEMPLATES = ("a {} about {} and {}", "{} meets {} in this {}", "with {}, {} and a {}", "the {} of {} and {}", "for {} or {} lovers: a {}")


def planted_world(settings):
    """A world whose intents are known -> (sequences, rows of texts.jsonl, truth tensors, rows of truth.jsonl).

    1. There are J true intents; each has a name and a handful of words of its own, its synonyms.
    2. An item carries one to three intents, some intents being in fashion more than others, each with a strength in [0.5, 1].
    3. A text of an item draws sentences from templates: now a sentence on one of its intents, in that intent's words, now a
       sentence of noise words that all items share. So no single word is an intent, and no text has all of its item's words.
    4. A few public intents please everybody. Each user has three personal intents besides.
    5. Personal intents drift: at each step one of them may turn into the intent that follows it in a fixed cycle, so what a
       user is after now says more than what they were after long ago, and where they are heading can be learned.
    6. A step picks an item the user has not had, with probability softmax(weight of personal + weight of public intents in it),
       or, one time in ten, any item at all.
    """
    g = np.random.default_rng(settings.seed)
    V, J = settings.items, settings.intents
    themes = [theme.split(":") for theme in re.split(r" \| |\n", THEMES)]
    syllables = [a + b for a in "bdfgklmnprstvz" for b in "aeiou"]  # beyond the themes above, words are made up
    made_up = iter(["".join(syllables[n // 70**i % 70] for i in range(3)) for n in g.permutation(70**3)[: 6 * J]])
    themes += [[next(made_up), " ".join(itertools.islice(made_up, 5))] for _ in range(J - len(themes))]
    names, words = zip(*((name, [name, *own.split()]) for name, own in themes[:J]))

    fashion = 1 / np.arange(1, J + 1) ** 0.5
    strength = np.zeros((V, J), np.float32)  # (V, J)
    for item in range(V):
        carried = g.choice(J, g.integers(1, 4), replace=False, p=fashion / fashion.sum())
        strength[item, carried] = g.uniform(0.5, 1, len(carried))

    noise, rows, text_intents = NOISE.split(), [], np.zeros((V * settings.texts, J), bool)
    for item in range(V):
        carried = np.nonzero(strength[item])[0]
        for _ in range(settings.texts):
            sentences = []
            for j in g.choice(carried, g.integers(2, 5), p=strength[item, carried] / strength[item].sum()):
                a, b = g.choice(words[j], 2, replace=False)
                text_intents[len(rows), j] = True
                sentences += [str(g.choice(TEMPLATES)).format(a, b, g.choice(noise)), " ".join(g.choice(noise, g.integers(2, 6)))]
            title = " and ".join(names[j] for j in carried) + f" no. {item + 1}"
            rows.append({"item": f"i{item + 1}", "title": title, "text": ". ".join(sentences).capitalize() + "."})

    public = g.choice(J, 3, replace=False)  # (3,)
    common = strength[:, public].sum(1)
    sequences, taste = {}, np.zeros((settings.users, J), bool)
    for user in range(settings.users):
        personal, seen = g.choice(J, 3, replace=False), []
        for _ in range(min(5 + g.poisson(settings.length - 5), V // 2)):
            if g.random() < settings.drift:
                personal[g.integers(3)] += 1
                personal %= J
            score = 6 * strength[:, personal].sum(1) + 2 * common
            chance = np.exp(score - score.max()) if g.random() > 0.1 else np.ones(V)
            chance[seen] = 0
            seen.append(int(g.choice(V, p=chance / chance.sum())))
        sequences[f"u{user + 1}"] = [f"i{item + 1}" for item in seen]
        taste[user, personal] = True
    known = sorted({int(item[1:]) for items in sequences.values() for item in items})  # load_dataset numbers items likewise
    told = text_intents.reshape(V, -1, J)[np.array(known) - 1].reshape(-1, J)  # (N, J)
    carried = np.concatenate([np.zeros((1, J), np.float32), strength[np.array(known) - 1]])  # (V+1, J)
    truth = dict(item_intents=carried, text_intents=told, user_intents=taste, public=public)
    about = [dict(intent=j, name=names[j], words=words[j], public=j in public, items=int((carried[:, j] > 0).sum())) for j in range(J)]
    return sequences, [row for row in rows if int(row["item"][1:]) in known], truth, about


@dataclasses.dataclass(frozen=True)
class PlantedSettings:
    out: str = setting("data/planted", "dataset folder to write, with truth.safetensors and truth.jsonl", unit="path")
    users: int = setting(2000, "users", low=1)
    items: int = setting(600, "items", low=10)
    intents: int = setting(40, "true intents J", low=4, high=2000)
    texts: int = setting(3, "texts of an item", low=1)
    length: float = setting(12.0, "mean length of a history", unit="items", low=5)
    drift: float = setting(0.1, "chance that a personal intent moves on, at each step", low=0, high=1)
    seed: int = common_settings()[0]


def prepare_planted(settings):
    """Write a planted world as a dataset folder, and its truth beside it, in the numbering of `load_dataset`."""
    out = Path(settings.out)
    sequences, rows, truth, about = planted_world(settings)
    interactions = ((user, item, when, 0) for user, items in sequences.items() for when, item in enumerate(items))
    data = write_dataset(out, *index_interactions(interactions), rows)
    truth = {name: torch.from_numpy(value) for name, value in truth.items()}
    save_artifact(out / "truth.safetensors", truth, settings, data.hash)
    write_lines(out / "truth.jsonl", (json.dumps(row) for row in about))
    print(f"the truth: {settings.intents} intents, {len(truth['public'])} of them public, in {out / 'truth.jsonl'}")


# Source: tables of your own


@dataclasses.dataclass(frozen=True)
class CsvSettings:
    interactions: str = setting("", "table with a line an interaction, the first names the columns; gzipped or not", unit="path")
    items: str = setting("", "table with a line, or more, an item", unit="path")
    out: str = setting("data/csv", "dataset folder to write", unit="path")
    user_column: str = setting("user", "column of user ids")
    item_column: str = setting("item", "column of item ids, in both tables")
    time_column: str = setting("time", 'column of times, numbers or ISO dates; "" if the lines are in order')
    text_columns: str = setting("title,description", "columns that make an item's text; the first is also its title")
    delimiter: str = setting("", "what parts the cells, \\t is a tab; found in the first line if not given")


def read_table(path, columns, delimiter):
    """Yield (line number, cells of those columns) of a table whose first line names them. Raises UserError."""
    lines = (line.lstrip("\ufeff") for _, line in read_lines(Path(path), hashlib.sha256()))
    first = next(lines, "")
    delimiter = delimiter.replace("\\t", "\t") or max(",;|\t", key=first.count)
    if len(delimiter) != 1:
        raise UserError(f"--delimiter is {delimiter!r}; it must be one character, or \\t")
    reader = csv.DictReader(itertools.chain([first], lines), delimiter=delimiter, skipinitialspace=True)
    try:
        if lacking := [name for name in columns if name not in (reader.fieldnames or ())]:
            raise UserError(f"{path} has no column {lacking[0]!r} among {reader.fieldnames}: see --...-column(s) and --delimiter")
        for row in reader:
            if None in row or None in row.values():
                raise UserError(f"{path} line {reader.line_num}: not a cell for each column: quote the cells with {delimiter!r}")
            yield reader.line_num, [row[name].strip() for name in columns]
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: {error}: correct its quotes, or give --delimiter") from error


def read_interactions(settings):
    """Yield the rows for `index_interactions` of a table of interactions. Raises UserError with file and line."""
    s, columns = settings, [settings.user_column, settings.item_column, settings.time_column or settings.item_column]
    for line, (user, item, when) in read_table(s.interactions, columns, s.delimiter):
        if len(user.split()) != 1 or len(item.split()) != 1:
            raise UserError(f"{s.interactions} line {line}: ids {user!r}, {item!r}: one is empty or has white space: put _ there")
        try:
            yield user, item, parse_time(when) if s.time_column else line, line
        except ValueError as error:
            raise UserError(f"{s.interactions} line {line}: {when!r} is no number or date like 2024-05-31: mend it") from error


def read_items(settings, known):
    """Yield the rows of texts.jsonl of a table of items; those without interactions are left out, and said."""
    s, left_out = settings, 0
    for _, (item, *texts) in read_table(s.items, [s.item_column, *s.text_columns.split(",")], s.delimiter):
        if item in known:
            texts = [" ".join(clean(text)) for text in texts]
            yield {"item": item, "title": texts[0], "text": join_sentences(texts)}
        left_out += item not in known
    print(f"{s.items}: {left_out:,} line(s) of items without interactions left out")


def prepare_csv(settings):
    """Write a dataset folder from a table of interactions, repeats and all, and a table of items."""
    if not (settings.interactions and settings.items and os.stat(settings.items)):
        raise UserError("a table is missing: give --interactions FILE and --items FILE")
    users, items, log = index_interactions(read_interactions(settings))
    write_dataset(settings.out, users, items, log, read_items(settings, set(items)))


@dataclasses.dataclass(frozen=True)
class CheckSettings:
    folder: str = setting("", "dataset folder", unit="path", positional=True)


def check(settings):
    """Print what is in a dataset folder; a fault raises UserError."""
    print(*describe(load_dataset(settings.folder)), sep="\n")


def main(argv=None):
    sources = {
        "ml-100k": (MovieLensSettings, prepare_movielens),
        "amazon": (AmazonSettings, prepare_amazon),
        "planted": (PlantedSettings, prepare_planted),
        "csv": (CsvSettings, prepare_csv),
    }
    prepare = {f"prepare {source}": command for source, command in sources.items()}
    return run(argv, __doc__, check=(CheckSettings, check), **prepare)  # check first: nothing is fetched unasked


if __name__ == "__main__":
    sys.exit(main())
