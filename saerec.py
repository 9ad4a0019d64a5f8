"""What all stages share: the dataset folder, its split, ranking, artifacts, settings, progress.

    python saerec.py prepare ml-100k --out data/ml-100k     make the folder of MovieLens 100K
    python saerec.py check data/ml-100k                     what is in a folder, and what is wrong

A dataset folder holds two plain files, each may be gzipped (.gz):
    sequences.txt   a line per user:  user item item item ...    oldest first, no space in ids
    texts.jsonl     a line per text:  {"item": "x", "text": "y", "user": "z"?, "title": "t"?}

Letters used in shape comments everywhere:
    N texts, E embedding width | M latents, K active latents
    J intents, k personal and g public intents | V items, D width of the recommender
    B rows of a batch (texts, histories or users), T positions, P wanted positions (in training all
    that are no padding)
Item 0 is padding; real items are 1..V, so an array with a row per item has V+1 rows.

What is not the method lies beside these five scripts: sources/ makes dataset folders, and vectors
by other means, studies/ are experiments on the method, tools/ asks and shows a trained run.
"""

import argparse
import collections
import contextlib
import dataclasses
import difflib
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import unicodedata
import zlib
from pathlib import Path

# Idle OpenMP threads spin before they sleep; spinning long on a core that another process needs
# makes training stand still. GNU's OpenMP reads this when torch loads it, so it stands before that
# import; what the user has set stays, OMP_WAIT_POLICY too, which a number of spins would overrule.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import numpy as np  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402

HERE = Path(__file__).resolve().parent


class UserError(Exception):
    """A mistake that the user can mend: one sentence saying what, where, and what to do."""


# Settings and command line


def setting(default, help, **more):
    """A field of a settings dataclass.

    more, where they apply: unit, origin ("ours" if not given), choices, low, high, positional, and
    example, without which the command makes no sense.
    """
    return dataclasses.field(default=default, metadata=dict(help=help, **more))


@dataclasses.dataclass(frozen=True)
class StageSettings:
    """The settings that all stages of a run have."""

    run: str = setting("", "run folder", unit="path", example="runs/ml-100k")
    seed: int = setting(0, "seed of every random choice", low=0, high=2**31 - 1)
    device: str = setting("auto", "auto: a GPU if it is there", choices=("auto", "cpu", "cuda"))
    data: str = setting("", "dataset folder, if it moved since embed.py read it", unit="path")


def option_name(field):
    """How a field is written on the command line."""
    return field.name if "positional" in field.metadata else "--" + field.name.replace("_", "-")


def check_settings(settings):
    """Refuse what is missing or out of its range or choices, naming what is allowed. UserError."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        example, choices, low, high = map(field.metadata.get, ("example", "choices", "low", "high"))
        name = option_name(field)
        if example and not value:
            raise UserError(f"{name} is missing: name it, as in {name} {example}")
        inside = (low is None or value >= low) and (high is None or value <= high)
        if not inside or value == float("inf") or (choices and value not in choices):
            finite = " and finite" if isinstance(value, float) else ""
            allowed = f"at least {low}{finite}" if high is None else f"{low} to {high}"
            allowed = f"one of {', '.join(choices)}" if choices else allowed
            raise UserError(f"{name} is {value!r}; it must be {allowed}")
    return settings


class Parser(argparse.ArgumentParser):
    """argparse with an option for each setting, and one-sentence errors."""

    def add_settings(self, Settings):
        """An option for each field of a settings dataclass."""
        for field in dataclasses.fields(Settings):
            m = field.metadata
            notes = [m.get("unit"), f"default {field.default}", m.get("origin", "ours")]
            known = "; ".join(note for note in notes if note and note != "default ")
            options = dict(help=f"{m['help']} ({known})".replace("%", "%%"))
            if "positional" in m:
                options |= dict(nargs="+") if field.type is list else {}
            elif field.type is bool:
                options |= dict(default=field.default, action=argparse.BooleanOptionalAction)
            else:
                words = m.get("choices", [field.type.__name__.upper()])
                options |= dict(default=field.default, type=field.type, metavar="|".join(words))
            self.add_argument(option_name(field), **options)

    def error(self, message):
        raise UserError(f"{message}; see --help for what is allowed")


def parse(argv, doc, commands):
    """The words of a command line -> (settings, the function that takes them). Raises UserError."""
    layout = dict(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser = Parser(description=doc, **layout)
    if len(commands) == 1:
        parser.add_settings(*(Settings for Settings, _ in commands.values()))
        parser.set_defaults(command=next(iter(commands)))
    else:
        several = parser.add_subparsers(dest="command", required=True, metavar="|".join(commands))
        for command, (Settings, _) in commands.items():
            one = several.add_parser(command, description=Settings.__doc__, **layout)
            one.add_settings(Settings)
    values, unknown = parser.parse_known_args(argv)
    Settings, function = commands[vars(values).pop("command")]
    if unknown:
        known = map(option_name, dataclasses.fields(Settings))
        near = difflib.get_close_matches(unknown[0], known, 1) or ["--help"]
        raise UserError(f"there is no setting {unknown[0]}: did you mean {near[0]}?")
    return check_settings(Settings(**vars(values))), function


def run_command(argv, doc, **commands):
    """Run one command of a script -> exit status: 0, 2 after one sentence on stderr, 141 of a pipe.

    commands: name -> (settings dataclass, function of the settings); a single one needs no name.
    """
    started = time.perf_counter()
    with contextlib.suppress(AttributeError):  # a stream that some program put in its place
        sys.stdout.reconfigure(errors="backslashreplace")  # of what a console cannot show
    try:
        settings, function = parse(sys.argv[1:] if argv is None else list(argv), doc, commands)
        function(settings)
        if not getattr(settings, "json", False):  # whose output is for programs
            print(f"done in {time.perf_counter() - started:.1f} s")
        sys.stdout.flush()  # here, where what a pipe or a disk refuses is heeded
        return leave(0)
    except (UserError, FloatingPointError) as error:  # the latter: training diverged
        problem = str(error)
    except BrokenPipeError:  # of `| head`: who reads no more wants no more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return leave(141)  # as shells have it
    except OSError as error:
        problem = f"{error}; free or correct it and run again"
    except (MemoryError, RuntimeError) as error:
        if not re.search("MemoryError|out of memory|allocate memory", repr(error)):
            raise
        problem = "there is not enough memory: lower sizes such as --batch, see --help"
    except KeyboardInterrupt:
        problem = "interrupted: what was finished before stays valid; run it again"
    print(f"\r{Path(sys.argv[0]).name}: {problem}", file=sys.stderr)
    return leave(2)


def leave(status):
    """The exit status; under torchrun the process ends here.

    Its way through the interpreter's own end is aborted now and then: threads of the process group
    (gloo) may still run.
    """
    if process_of()[1] > 1:
        sys.stdout.flush()
        os._exit(status)
    return status


def pick_device(name):
    """torch.device for auto, cpu or cuda. Raises UserError for a GPU that is not there."""
    has_gpu = torch.cuda.is_available()
    if name == "cuda" and not has_gpu:
        raise UserError("--device cuda: torch sees no GPU; use --device cpu, or a CUDA build of it")
    return torch.device("cuda" if has_gpu and name != "cpu" else "cpu")


def generator(seed, purpose):
    """A CPU torch.Generator of its own per purpose: drawing more of one thing shifts no other."""
    digest = hashlib.sha256(f"{seed} {purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class Progress:
    """One self-updating line on a terminal, else a plain line now and then; both with time left."""

    def __init__(self, total, label, stops_early=False):
        """total: units of work; stops_early: it may end before, so that the time is at most so."""
        self.total = total
        self.label = label
        self.bound = "at most " if stops_early else ""
        self.start = self.shown = time.perf_counter()
        self.live = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"

    def show(self, done, info="", keep=False):
        """Report `done` of `total` units; keep=True prints a lasting line whatever the time."""
        now = time.perf_counter()
        last = done >= self.total
        if not (keep or last) and now - self.shown < (0.2 if self.live else 10):
            return
        self.shown = now
        elapsed = now - self.start
        when = f"{elapsed:.0f} s"
        if done and not last:
            when = f"{self.bound}{elapsed * (self.total - done) / done:.0f} s left"
        line = "  ".join(filter(None, [f"{self.label} {done:,}/{self.total:,}", info, when]))
        start = "\r\033[K" if self.live else ""
        print(start + line, end="\n" if keep or last or not self.live else "", flush=True)


# Several processes, under torchrun: the stages know of them by these three functions alone


def join_processes():
    """Under torchrun, join the other processes; only the first prints and writes files."""
    if process_of()[1] > 1:
        torch.distributed.init_process_group()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        if process_of()[0]:
            sys.stdout = open(os.devnull, "w")


def process_of():
    """(number of this process, how many there are): (0, 1) without torchrun."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def sum_over_processes(tensor):
    """Add up a tensor over all processes, in place -> the tensor."""
    if process_of()[1] > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


# Files and artifacts


def write_atomically(path, write):
    """Call write(temporary path), then rename it to path: a reader never sees half a file."""
    if process_of()[0]:
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error}): free some space") from error
    finally:
        temporary.unlink(missing_ok=True)


def claim(folder):
    """See before long work that its results can be written. Raises OSError."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def write_lines(path, lines):
    """Write an iterable of strings as the lines of a UTF-8 text file, atomically."""

    def write(temporary):
        with open(temporary, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(line + "\n" for line in lines)

    write_atomically(path, write)


def write_rows(path, rows):
    """Write dicts as the lines of a JSON lines file, atomically."""
    write_lines(path, (json.dumps(row, ensure_ascii=False) for row in rows))


def write_table(path, rows):
    """Write a list of dicts with the same keys as CSV, atomically."""
    lines = [rows[0], *(row.values() for row in rows)]
    write_lines(path, (",".join(map(str, line)) for line in lines))


def file_hash(path):
    """SHA-256 of a file's content, in hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_artifact(path, tensors, settings, dataset_hash, made_from=(), **more):
    """Write a dict of tensors whose metadata say how, from what and with what they were made.

    made_from: the artifacts that were read; their hashes let `load_artifact` refuse a mix-up.
    """
    meta = dict(settings=dataclasses.asdict(settings), dataset=dataset_hash, **more)
    # Only the first process has written the files
    meta["made_from"] = {one.name: file_hash(one) for one in made_from if not process_of()[0]}
    meta["versions"] = {one.__name__: one.__version__ for one in (np, torch, safetensors)}
    write_artifact(path, tensors, meta)


def write_artifact(path, tensors, meta):
    """Write tensors with a dict of metadata, as one JSON string since keys have no fixed order."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    said = json.dumps(meta, sort_keys=True)
    content = safetensors.torch.save(tensors, {"saerec": said})
    write_atomically(path, lambda to: to.write_bytes(content))


def artifact_meta(path, made_by, data=None):
    """Metadata of an artifact -> dict; made_by is the command to name if the file is not right.

    Raises UserError for a missing, corrupt or foreign file, for one made from another version of a
    file beside it, and, if a Dataset is given, for one made from another dataset.
    """
    again = f"make it again with `{made_by}`"
    if not path.is_file():
        raise UserError(f"{path} is missing: make it with `{made_by}`")
    try:
        with safetensors.safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {})["saerec"])
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        problem = f"{path} is corrupt or truncated, or not written by saerec ({error!r})"
        raise UserError(f"{problem}: delete it, {again}") from error
    if data and meta["dataset"] != data.hash:
        raise UserError(f"{path} was made from another dataset than {data.folder} is now: {again}")
    for name, digest in meta["made_from"].items():
        source = path.parent / name
        if source.is_file():  # a run may be passed on without what it was made from
            if file_hash(source) != digest:
                raise UserError(f"{path} was made from another {source} than is there now: {again}")
            artifact_meta(source, f"sae.py --run {path.parent}")
    return meta


def load_artifact(path, made_by, data=None):
    """Read an artifact -> (tensors, metadata). Raises UserError as `artifact_meta` does."""
    meta = artifact_meta(path, made_by, data)
    return safetensors.torch.load_file(path), meta


# The dataset folder

HELD_BACK = {"test": 1, "valid": 2}  # which item of a user, counted from the last


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
    notes: list  # of sentences on what was left out or is lacking

    def held_out(self, part):
        """Leave-one-out: each user's place in flat of the item held out -> int64 [users].

        The last item for part "test", the last but one for "valid"; KeyError for any other part.
        """
        return self.start[1:] - HELD_BACK[part]

    def targets(self, part):
        """The held-out item of each user -> int32 [users]."""
        return self.flat[self.held_out(part)]

    def history(self, user, part):
        """What a user had before the held-out item, oldest first -> int32 [any]."""
        return self.flat[self.start[user] : self.start[user + 1] - HELD_BACK[part]]

    def training_items(self):
        """All interactions that training and statistics may see, user after user -> int32 [any]."""
        return np.delete(self.flat, [self.held_out("valid"), self.held_out("test")])


def open_plain(path):
    """Open a plain or gzipped file for its bytes, judged by the first two."""
    file = open(path, "rb")
    if not file.peek(2).startswith(b"\x1f\x8b"):
        return file
    file.close()
    return gzip.open(path)


def read_lines(path, digest):
    """Yield (number, line) of a plain or gzipped UTF-8 file, feeding its bytes to a hashlib digest.

    A byte-order mark at the start of a line is left out. Raises UserError.
    """
    number = 1
    try:
        with open_plain(path) as file:
            for raw in file:
                digest.update(raw)
                yield number, raw.decode("utf-8").removeprefix("\ufeff")
                number += 1
    except (EOFError, gzip.BadGzipFile, zlib.error, UnicodeDecodeError) as error:
        remedy = "copy or unpack the file again, or save it as plain text in UTF-8"
        raise UserError(f"{path} line {number} cannot be read ({error}): {remedy}") from error


MISSING = frozenset(["", *r"na n/a <na> #n/a nan nat null (null) \n none".split(" ")])


def check_id(name):
    """Raises ValueError for what cannot be the id of a user or an item, with the remedy."""
    if name.strip().lower() in MISSING:
        raise ValueError(f"id {name!r} is a missing value: remove the line")
    if name.split() != [name] or not name.isprintable():
        raise ValueError(f"id {name!r} holds white space, or what nobody sees: write it without")
    if re.fullmatch(r"\d+([.,]\d+)?E\+\d+|\d+[.,]\d+E\d+", name, re.I):
        raise ValueError(f"id {name!r} was rounded by a spreadsheet: export ids as text")


def dataset_file(folder, name):
    """The plain or the gzipped file of that name. Raises UserError if there is neither, or both."""
    found = [path for path in (folder / name, folder / (name + ".gz")) if path.is_file()]
    if len(found) != 1:
        remedy = "remove one" if found else "make it with `saerec.py prepare` or sources/"
        raise UserError(f"{folder} has {len(found)} of {name} and {name}.gz, not one: {remedy}")
    return found[0]


def read_sequences(path, digest):
    """Read sequences.txt -> {user: [item, ...]}. Raises UserError with the line."""
    sequences = {}
    known = {}  # each id is kept once, however often it occurs
    for number, line in read_lines(path, digest):
        user, *items = re.split("[ \t]+", line.strip(" \t\r\n"))
        where = f"{path} line {number}"
        if not items:
            raise UserError(f"{where}: no items: part them by spaces, or remove the line")
        if user in sequences:
            problem = f"user {user!r} has a line already"
            raise UserError(f"{where}: {problem}: merge them, as sources/tables.py does")
        try:
            for name in sorted({user, *items}.difference(known)):
                check_id(name)  # in order, so that the same one is named every time
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
        sequences[user] = [known.setdefault(item, item) for item in items]
    return sequences


def read_texts(path, digest, known):
    """Yield (line, item, text, user or "", title or "", other keys) of texts.jsonl.

    known: the ids of items. Raises UserError with the line.
    """
    for number, line in read_lines(path, digest):
        where = f"{path} line {number}"
        try:
            row = {name: one for name, one in json.loads(line).items() if one is not None}
            values = row["item"], row["text"], row.get("user", ""), row.get("title", "")
            "".join(values)  # a TypeError says which is no string
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            problem = f'not a JSON object with strings "item", "text" ("user", "title"): {error!r}'
            raise UserError(f"{where}: {problem}: correct the line") from error
        if values[0] not in known:
            some = ", ".join(list(known)[:3])
            problem = f"item {values[0]!r} is in no sequence, where items are {some}"
            raise UserError(f"{where}: {problem}, ...: remove the line, or correct the id")
        yield number, *values, row.keys() - {"item", "text", "user", "title"}


def keep_texts(path, digest, sequences, held_out, index):
    """Read texts.jsonl, less what the split forbids -> (texts, their items, titles, counts).

    sequences, held_out: {user: items}; index: {item: 1..V}; counts: {what: how many}. Raises
    UserError, also if most reviews don't fit the sequences: leaks can't be found then.
    """
    texts = []
    text_item = []
    shown = {}  # the title of an item, or else the begin of its first text
    counts = collections.Counter()
    near = {plain_id(name): name for name in sequences}
    had = {}  # {user: items} of those who wrote and have a line
    fitting = 0
    misfits = []  # reviews of what their users don't have, or by users without a line
    for line, item, given, user, title, others in read_texts(path, digest, index):
        counts.update(f"text(s) with {key!r}, which is not read" for key in sorted(others))
        text, title = (one.encode("utf-8", "ignore").decode() for one in (given, title))
        counts["text(s) freed of half a character (a lone surrogate)"] += text != given
        if title:
            shown[item] = title
        elif text.strip() and not user:
            shown.setdefault(item, " ".join(text.split())[:70])
        if user in sequences and user not in had:
            had[user] = {*sequences[user]}
        if user and item in had.get(user, ()):
            fitting += 1
        elif user:
            misfits.append((line, user, item))
            if user not in had and plain_id(user) in near:
                problem = f"{user!r} has no line in sequences.txt, {near[plain_id(user)]!r} has"
                raise UserError(f"{path} line {line}: user {problem}: write the same ids in both")
        if not text.strip():
            counts["empty text(s) left out"] += 1
        elif item in held_out.get(user, ()):
            counts["text(s) written in held-out interactions left out"] += 1
        else:
            texts.append(text)
            text_item.append(index[item])
    strange = sum(user in had for _, user, _ in misfits)
    if strange > fitting or (misfits and not fitting):
        said = f"{fitting:,} of {fitting + len(misfits):,} reviews are of what their users had"
        problem = "{} by sequences.txt (line {}: {!r} about {!r}, ...)".format(said, *misfits[0])
        remedy = 'write the same ids in both, or leave "user" out where it is not the author'
        raise UserError(f"{path}: only {problem}: {remedy}")
    counts["review(s) of what their user has not in sequences.txt kept"] = strange
    counts["review(s) by users without a line in sequences.txt kept"] = len(misfits) - strange
    titles = ["", *(shown.get(item, f"item {item}") for item in index)]
    return texts, text_item, titles, counts


def plain_id(name):
    """An id less what programs change: Unicode form, case, outer space, leading zeros, final .0."""
    return unicodedata.normalize("NFKC", name).strip().casefold().removesuffix(".0").lstrip("0")


def load_dataset(folder):
    """Read and check a dataset folder -> Dataset. Raises UserError with file, line and remedy.

    Users with fewer than 3 items are left out and counted; so is every text that a user wrote about
    one of their two held-out items, since the split must not leak. Items are numbered by sorted id,
    which the split cannot influence.
    """
    folder = Path(folder)
    digest = hashlib.sha256()
    path = dataset_file(folder, "sequences.txt")
    sequences = read_sequences(path, digest)
    kept = [user for user, items in sequences.items() if len(items) >= 3]
    if not kept:
        raise UserError(f"{path} has no user with 3 items, which leave-one-out needs: bring more")
    ids = {item for items in sequences.values() for item in items}
    items = ["", *sorted(ids, key=lambda item: (len(item), item))]
    index = {item: number for number, item in enumerate(items) if number}
    start = np.cumsum([0] + [len(sequences[user]) for user in kept])
    flat = np.array([index[item] for user in kept for item in sequences[user]], np.int32)

    digest.update(b"\0")
    held_out = {user: sequences[user][-2:] for user in kept}
    path = dataset_file(folder, "texts.jsonl")
    texts, text_item, titles, counts = keep_texts(path, digest, sequences, held_out, index)
    if not texts:
        raise UserError(f"{path} has no text to learn intents from: bring texts of the items")
    again = sum(sequences[user][-1] in sequences[user][:-1] for user in kept)
    counts["user(s) with fewer than 3 items left out"] = len(sequences) - len(kept)
    with_text = set(text_item)
    bare = [item for item, number in index.items() if number not in with_text]
    counts[f"item(s) without text kept, with no intents: {', '.join(bare[:3])}"] = len(bare)
    counts["user(s) had their last item before, a miss for every model"] = again
    notes = [f"{number:,} {what}" for what, number in counts.items() if number]
    ties = folder / "ties.txt"  # what the maker of the folder knew of ties in time
    if ties.is_file():
        notes += ties.read_text("utf-8", "replace").splitlines()
    of_texts = (texts, np.array(text_item, np.int32), titles, notes)
    return Dataset(folder, digest.hexdigest()[:16], kept, items, start, flat, *of_texts)


def data_of_run(run, made_by):
    """The dataset folder that a run's embeddings were made from -> Path. Raises UserError."""
    meta = artifact_meta(Path(run) / "embeddings.safetensors", made_by)
    given = Path(meta["settings"]["data"])
    there = Path(meta.get("folder", given))  # the same, absolute: for who stands elsewhere now
    return given if given.is_dir() else there


def run_dataset(run, folder=""):
    """The dataset of a run -> Dataset; folder: where it lies now, if it moved. Raises UserError."""
    made_by = f"embed.py --data {folder or 'DATA'} --run {run}"
    folder = Path(folder or data_of_run(run, made_by))
    if not folder.is_dir():
        problem = f"{run} was made from {folder}, which is not there"
        raise UserError(f"{problem}: say where it is now by --data FOLDER")
    data = load_dataset(folder)
    artifact_meta(Path(run) / "embeddings.safetensors", made_by, data)  # it may be another
    return data


def describe(data):
    """The statistics of a dataset in lines for people."""
    users, items, total = map(len, (data.users, data.items[1:], data.flat))
    sizes = np.diff(data.start)
    distinct = sum(len(np.unique(one)) for one in np.split(data.flat, data.start[1:-1]))
    covered = f"{len(np.unique(data.text_item)) / items:.2%} of the items have text"
    yield f"{data.folder}: {users:,} users, {items:,} items, {total:,} interactions"
    yield f"  per user  mean {sizes.mean():.1f}, median {np.median(sizes):g}, most {sizes.max()}"
    yield f"  density   {total / users / items:.4%}; {total - distinct:,} repeats"
    letters = sum(map(len, data.texts)) // len(data.texts)
    yield f"  texts     {len(data.texts):,}, mean {letters} characters; {covered}"
    yield from (f"  {note}" for note in data.notes)


# Full ranking: shared, since training chooses its epoch and evaluation reports with the same code


def target_ranks(scores, targets, seen):
    """Rank of each user's target in a full ranking -> float64 [B]; 1 is best, inf is a miss.

    scores: float [B, V+1]; targets: int64 [B]; seen: int64 [B, any], padded with 0. Seen items and
    padding leave the ranking, so a target already seen is a miss; ties count against the target,
    and a score that is not a number raises FloatingPointError.
    """
    if torch.isnan(scores).any():
        raise FloatingPointError("a score is not a number: training diverged")
    target_score = scores.gather(1, targets[:, None])
    ahead = scores >= target_score  # (B, V+1), the target itself included
    ahead.scatter_(1, seen, False)
    ahead[:, 0] = False
    return torch.where((seen == targets[:, None]).any(1), torch.inf, ahead.sum(1).double()).cpu()


@torch.no_grad()
def rank_users(score, data, part, cells=2**23):
    """Full ranking of every user's held-out item of "valid" or "test" -> ranks float64 [users].

    score: maps user numbers int64 [B] to scores [B, V+1], at most `cells` of them at a time, so
    that memory grows with neither users nor items. Items of the history leave the ranking.
    """
    targets = torch.from_numpy(data.targets(part)).long()
    ranks = torch.empty(len(targets), dtype=torch.float64)
    by_length = torch.from_numpy(data.held_out(part) - data.start[:-1]).argsort()
    # Users of similar length share a batch, so that little is padded
    for users in by_length.split(max(min(cells // len(data.items), 256), 1)):
        scores = score(users)
        seen = [torch.from_numpy(data.history(user, part)).long() for user in users.tolist()]
        seen = torch.nn.utils.rnn.pad_sequence(seen, batch_first=True).to(scores.device)
        ranks[users] = target_ranks(scores, targets[users].to(scores.device), seen)
    return ranks


def user_metrics(ranks):
    """HR@5/10/20, NDCG@5/10/20 and MRR of each user, from float64 ranks [users] -> dict of [users].

    There is one relevant item per user, so IDCG is 1.
    """
    cut = {n: (ranks <= n).double() for n in (5, 10, 20)}
    metrics = {f"HR@{n}": hit for n, hit in cut.items()}
    metrics |= {f"NDCG@{n}": hit / torch.log2(ranks + 1) for n, hit in cut.items()}
    return metrics | {"MRR": 1 / ranks}


def ranking_metrics(ranks):
    """The means of `user_metrics` over users -> dict of floats."""
    return {name: value.mean().item() for name, value in user_metrics(ranks).items()}


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Make a dataset folder of bundled data. For other data, see the scripts in sources/."""

    source: str = setting("", "MovieLens 100K", choices=("ml-100k",), positional=True)
    out: str = setting("data/ml-100k", "dataset folder to write", unit="path")


def prepare(settings):
    """Run sources/movielens.py, since the core imports nothing from there."""
    script = HERE / "sources" / "movielens.py"
    sys.exit(subprocess.run([sys.executable, script, "--out", settings.out]).returncode)


@dataclasses.dataclass(frozen=True)
class Check:
    """Say what is in a dataset folder, and what is wrong with it."""

    folder: str = setting("", "dataset folder", unit="path", positional=True)


def check(settings):
    """Print what is in a dataset folder; a fault raises UserError."""
    print(*describe(load_dataset(settings.folder)), sep="\n")


def main(argv=None):
    return run_command(argv, __doc__, prepare=(Prepare, prepare), check=(Check, check))


if __name__ == "__main__":
    sys.exit(main())
