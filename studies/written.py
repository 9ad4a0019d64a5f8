"""Personal intents from what the user wrote: do they pay where a history's item codes do not?

    python studies/written.py --run runs/rt_critics        -> runs/rt_critics/written.json

For data whose texts are reviews with their user. What a position adds to equation (11) comes from
    item codes         the mean over all reviews of its item, as model.py has it
    own reviews        the codes of what this user wrote about it; nothing where they wrote nothing
    both               the sum of the two
    others' reviews    a control: what one other user wrote about the same item
in Grounded, where (11) is what is matched, and in SAERec, where its k largest are the personal
intents. All else stays, idf too, so rows differ in whose words are read.

A review is read from its own position on and never before: it was written when the item was taken.
Reviews of held-out interactions are not in the corpus at all, so when test items are ranked, the
last item of a history, which is the validation item, has no own review. What is finished stays in
RUN/written-*.safetensors, so the same command goes on where it stopped.
"""

import contextlib
import dataclasses
import hashlib
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import (  # noqa: E402
    StageSettings, UserError, dataset_file, generator, pick_device, rank_users,
    ranking_metrics, read_texts, run_command, run_dataset, save_artifact, setting,
)  # fmt: skip

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from eval import PROTOCOL  # noqa: E402
from model import (  # noqa: E402
    Grounded, SAERec, SASRec, model_scores, new_model, pad_rows, train_model,
)  # fmt: skip
from sae import Codes, SparseRows, cell_bounds, encode_all, item_codes, load_intents  # noqa: E402
from studies import significance  # noqa: E402
from studies.ablate import base_settings, finished, mean_and_spread  # noqa: E402
from studies.baselines import parameters_of  # noqa: E402
from studies.rivals import load_run  # noqa: E402
from studies.variants import PublicOnly, RetrievalByActivation, WithoutMatch  # noqa: E402

PARTS = ("valid", "test")
KINDS = ("item codes", "own reviews", "both", "others' reviews")


# The models


class WrittenIntents(NamedTuple):
    """`Intents`, and what each interaction adds to equation (11)."""

    vectors: torch.Tensor  # float32 [J, E]
    codes: SparseRows  # [V+1, J]
    written: SparseRows  # [interactions+1, J], row i + 1 of Dataset.flat's place i; row 0 is empty


class ReadsPlaces:
    """Equation (11) over what stands at each interaction, in place of its item's codes."""

    def add_parameters(self, data, intents):
        super().add_parameters(data, intents)
        self.written = intents.written
        self.register_buffer("taken", items_by_place(data), persistent=False)

    def history_intents(self, items, wanted):
        """r [P, J]; where the items stand is in `places`, see `places_told`."""
        places = self.places.to(items.device)
        if not torch.equal(self.taken[places], items):
            raise RuntimeError("places are those of another batch")
        reader = SimpleNamespace(codes=self.written, idf=self.idf, settings=self.settings)
        reader.matched = self.matched
        return Grounded.history_intents(reader, places, wanted)


class WrittenGrounded(ReadsPlaces, Grounded):
    """The match is with what the user wrote."""


class WrittenSAERec(ReadsPlaces, RetrievalByActivation):
    """Personal intents are those of what the user wrote."""


class WithoutPersonal(PublicOnly, RetrievalByActivation):
    """The public branch alone, of the most frequent intents."""


def items_by_place(data):
    """Item of each place in flat, counted from 1 -> int64 [interactions+1]; 0, padding, has 0."""
    return F.pad(torch.from_numpy(data.flat).long(), (1, 0))


@contextlib.contextmanager
def places_told(net):
    """While it lasts, net.places are the places in flat of the batch at hand, counted from 1.

    int64 [B, T], 0 for padding. A model is given items alone; model.py asks `pad_rows` for them,
    training and ranking, before each batch that the model reads.
    """

    def pad_and_tell(rows, chosen, flat):
        place, items, real = pad_rows(rows, chosen, flat)
        net.places = torch.where(real, place + 1, 0)
        return place, items, real

    with mock.patch("model.pad_rows", pad_and_tell):
        yield


# What was written where


def reviewed_places(data):
    """Where each text was written -> int64 [N]: a place in flat, or -1 for nowhere in training.

    Dataset keeps no writers, so texts.jsonl is read again, by the rules of load_dataset. If a user
    had an item several times, its reviews stand at the last: too late rather than too early. Raises
    UserError if the texts aren't those of the Dataset, or none has a place.
    """
    place = {}
    held_out = set()
    for user, name in enumerate(data.users):
        begin, end = data.start[user : user + 2].tolist()
        row = data.flat[begin:end].tolist()
        place |= {(name, item): begin + step for step, item in enumerate(row[:-2])}
        held_out |= {(name, item) for item in row[-2:]}
    index = {item: number for number, item in enumerate(data.items) if number}
    path = dataset_file(data.folder, "texts.jsonl")
    texts = []
    places = []
    for _, item, given, user, *_ in read_texts(path, hashlib.sha256(), index):
        text = given.encode("utf-8", "ignore").decode()
        pair = user, index[item]
        if text.strip() and pair not in held_out:
            texts.append(text)
            places.append(place.get(pair, -1))
    if texts != data.texts:
        raise UserError(f"{path} has changed since it was read: start again")
    if max(places) < 0:
        problem = f'{path} has no text by a "user" about what they had in training'
        raise UserError(f"{problem}: bring reviews with their writers")
    return torch.tensor(places)


def own_codes(run, places):
    """Codes of the reviews at each place -> SparseRows [interactions+1, J], row 0 empty.

    run: a Run of studies/rivals.py; places: int64 [N]. Several reviews at a place are averaged, as
    those of an item are; latents that are no intents are left out.
    """
    is_intent = run.intents["is_intent"]
    number = torch.full((len(run.sae.W_dec),), -1)
    number[run.intents["latent"].long()[is_intent]] = is_intent.nonzero()[:, 0]
    mine = places >= 0
    codes = Codes(*(part[mine] for part in encode_all(run.sae, run.embeddings)))
    own = item_codes(codes, places[mine] + 1, len(run.data.flat), number)
    return dataclasses.replace(own, columns=len(is_intent))


def dealt_out(own, places, data, seed):
    """Each reviewed place gets another one's row of own, of the same item -> SparseRows.

    Since a user has one reviewed place per item, it is another user's. A place whose item nobody
    else reviewed gets nothing.
    """
    of_item = {}
    for place in places[places >= 0].unique().tolist():
        of_item.setdefault(int(data.flat[place]), []).append(place + 1)
    source = torch.zeros(len(data.flat) + 1, dtype=torch.int64)
    random = generator(seed, "others' reviews")
    for same in of_item.values():
        here = torch.tensor(same)[torch.randperm(len(same), generator=random)]
        if len(same) > 1:
            source[here] = here.roll(1)
    return own.gather(source)


def summed(a, b):
    """a + b of two SparseRows of one shape -> SparseRows."""
    cells = torch.cat([one.rows_of_cells() * one.columns + one.indices for one in (a, b)])
    cell, place = cells.unique(return_inverse=True)
    values = torch.zeros(len(cell)).index_add_(0, place, torch.cat([a.values, b.values]))
    count = torch.bincount(cell // a.columns, minlength=len(a.indptr) - 1)
    return SparseRows(cell_bounds(count), (cell % a.columns).int(), values, a.columns)


class Reviews(NamedTuple):
    """What users wrote."""

    places: torch.Tensor  # int64 [N], see `reviewed_places`
    own: SparseRows  # [interactions+1, J], see `own_codes`


def intents_read(kind, reviews, settings, data):
    """Intents of a run, with what each interaction adds to (11) for a kind of `KINDS`.

    -> WrittenIntents on the settings' device. Raises UserError.
    """
    vectors, codes = load_intents(settings.run, data)
    if kind == "own reviews":
        written = reviews.own
    elif kind == "both":
        written = summed(reviews.own, codes.gather(items_by_place(data)))
    elif kind == "others' reviews":
        written = dealt_out(reviews.own, reviews.places, data, settings.seed)
    else:
        written = codes.gather(items_by_place(data))
    device = pick_device(settings.device)
    return WrittenIntents(*(part.to(device) for part in (vectors, codes, written)))


# What is compared


class Row(NamedTuple):
    """A model, and what it reads of an interaction."""

    Model: type
    reads: str = "item codes"  # of KINDS


ROWS = {
    "SASRec": Row(SASRec),
    "Grounded without match": Row(WithoutMatch),
    "Grounded, item codes": Row(Grounded),
    "Grounded, own reviews": Row(WrittenGrounded, "own reviews"),
    "Grounded, both": Row(WrittenGrounded, "both"),
    "Grounded, others' reviews": Row(WrittenGrounded, "others' reviews"),
    "SAERec": Row(SAERec),
    "SAERec, public branch alone": Row(WithoutPersonal),
    "SAERec, item codes": Row(RetrievalByActivation),
    "SAERec, own reviews": Row(WrittenSAERec, "own reviews"),
    "SAERec, both": Row(WrittenSAERec, "both"),
    "SAERec, others' reviews": Row(WrittenSAERec, "others' reviews"),
}
WITHOUT = {"Grounded": "Grounded without match", "SAERec": "SAERec, public branch alone"}
OF_THE_PAPER = ("SAERec", "SAERec, own reviews", "SAERec, both")


def compared():
    """Pairs of rows that are tested, the reference first -> list."""
    pairs = [("SASRec", name) for name in OF_THE_PAPER]
    for model, without in WITHOUT.items():
        item, own, both, others = (f"{model}, {kind}" for kind in KINDS)
        pairs += [(without, item), (without, own), (without, both)]  # does it pay at all?
        pairs += [(item, own), (item, both)]  # more than item codes do?
        pairs += [(others, own)]  # because of who wrote?
    return pairs


@dataclasses.dataclass(frozen=True)
class WrittenSettings(StageSettings):
    """Train every row with every seed and say whether what users wrote pays."""

    seeds: int = setting(3, "seeds, counted from --seed, that each row is trained with", low=1)
    skip: str = setting("", "names of rows to leave out, parted by semicolons")
    model_flags: str = setting("", "flags of model.py for all rows, as in '--patience 5'")
    out: str = setting("", "where to write a copy of RUN/written.json", unit="path")


def chosen_rows(skip):
    """Names of the rows to train -> list. Raises UserError."""
    skipped = [name.strip() for name in skip.split(";") if name.strip()]
    for name in skipped:
        if name not in ROWS:
            known = "; ".join(ROWS)
            raise UserError(f"--skip: there is no row {name!r}; choose among {known}")
    if not ROWS.keys() - skipped:
        raise UserError("--skip leaves no row to train: name fewer")
    return [name for name in ROWS if name not in skipped]


def train_and_rank(row, data, settings, reviews):
    """Train the model of a Row, rank with it -> ({part: float64 [users]}, what it took dict)."""
    intents = intents_read(row.reads, reviews, settings, data)
    net = new_model(row.Model, settings, data, intents)
    with places_told(net):
        net, log = train_model(net, data)
        ranks = {part: rank_users(model_scores(net, data, part), data, part) for part in PARTS}
    best = max(log, key=lambda line: line["valid_NDCG@10"])
    return ranks, dict(parameters=parameters_of(net), epoch=best["epoch"])


def finish(name, data, settings, reviews):
    """Train the row of that name, unless an earlier run has -> ({part: ranks}, what it took)."""
    row = ROWS[name]
    folder = Path(settings.run)
    slug = re.sub("[^a-z]+", "-", name.lower())
    path = folder / f"written-{slug}-{settings.seed}.safetensors"
    of_row = dict(row=[row.Model.__name__, row.reads])
    done = finished(path, "written.py", of_row, settings, data)
    if done:
        return done
    print(f"{name}, seed {settings.seed}", flush=True)
    started = time.perf_counter()
    ranks, more = train_and_rank(row, data, settings, reviews)
    more["seconds"] = round(time.perf_counter() - started, 1)
    more |= of_row | dict(commit=significance.current_commit())
    made_from = [folder / "intents.safetensors"]
    save_artifact(path, ranks, settings, data.hash, made_from, **more)
    return ranks, more


# The report


def summary(name, seeds):
    """The row of a report; seeds: ({part: ranks}, what it took) of each."""
    took = [more for _, more in seeds]
    row = dict(name=name, params=took[0]["parameters"], epochs=[more["epoch"] for more in took])
    row["seconds"] = sum(more["seconds"] for more in took) / len(took)
    for part in PARTS:
        metrics = [ranking_metrics(ranks[part]) for ranks, _ in seeds]
        for metric in ("NDCG@10", "HR@10"):
            row[f"{part} {metric}"] = mean_and_spread([one[metric] for one in metrics])
    return row


def coverage(data, places):
    """How many training interactions there are, and how many of them have a review -> dict."""
    training = len(data.flat) - 2 * len(data.users)
    return dict(training=training, reviewed=len(places[places >= 0].unique()))


def written_report(data, results, places, settings):
    """What written.json holds -> dict; results: name -> what `finish` gives, for each seed."""
    report = dict(dataset=data.folder.name, users=len(data.users)) | coverage(data, places)
    report["protocol"] = f"{PROTOCOL}; {significance.TESTED}"
    report["seeds"] = list(range(settings.seed, settings.seed + settings.seeds))
    report["trained at"] = significance.trained_at(results)
    report["rows"] = [summary(name, seeds) for name, seeds in results.items()]
    for part in PARTS:
        means = {}
        for name, seeds in results.items():
            means[name] = significance.user_means([ranks[part] for ranks, _ in seeds])
        pairs = [pair for pair in compared() if means.keys() >= set(pair)]
        report[f"{part} tests"] = significance.paired_tests(means, pairs, settings.seed)
    return report


def report_lines(report):
    """Rows and tests of a report, for people."""
    yield f"{'NDCG@10':30}{'valid':>16}{'test':>16}"
    for row in report["rows"]:
        cells = [significance.with_spread(row[f"{part} NDCG@10"]) for part in PARTS]
        yield f"{row['name']:30}" + "".join(f"{cell:>16}" for cell in cells)
    for part in PARTS:
        yield f"\n{part + ', b over a':62}{'difference':>12}{'p (Holm)':>10}"
        for test in report[f"{part} tests"]:
            pair = f"{test['b']} over {test['a']}"
            yield f"{pair:62}{-test['difference']:>+12.4f}{test['p_holm']:>10.2g}"


def written(settings):
    """Train every row with every seed, going on where an earlier run stopped, and compare."""
    names = chosen_rows(settings.skip)
    base = base_settings(settings)
    data = run_dataset(settings.run, settings.data)
    places = reviewed_places(data)
    counts = coverage(data, places)
    print("{reviewed:,} of {training:,} training interactions have a review".format(**counts))
    reviews = Reviews(places, own_codes(load_run(settings.run, data), places))
    results = {name: [] for name in names}
    # A seed for all rows, then the next: what is there when it is interrupted can be compared
    for seed in range(settings.seed, settings.seed + settings.seeds):
        one = dataclasses.replace(base, seed=seed, data=settings.data, device=settings.device)
        for name in names:
            results[name].append(finish(name, data, one, reviews))
    report = written_report(data, results, places, settings) | dict(library=reviews.own.columns)
    print(*report_lines(report), sep="\n")
    significance.write_result(settings.run, "written", report, settings.out)


def main(argv=None):
    return run_command(argv, __doc__, written=(WrittenSettings, written))


if __name__ == "__main__":
    sys.exit(main())
