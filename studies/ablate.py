"""Is it the intents? Every rival, variant and baseline, trained with the same seeds and compared.

    python studies/ablate.py --run runs/scientific          -> runs/scientific/ablation.json
    python studies/ablate.py --run runs/scientific --only "SASRec,Grounded without match"

A row is a model class, its loss, changes of model.py's settings, and intents that studies/rivals.py
makes. The test items are ranked once per trained model; what is finished stays in
RUN/ablation-*.safetensors, so the same command goes on where it stopped. Differences are tested
over users, see studies/significance.py.

Like is compared with like: a row has a reference that differs from it in what the row is about. For
other intents that is Grounded, and where they do without the match it is Grounded without match;
for variants of the paper it is SAERec. Grounded reads codes alone and SAERec directions alone, so
there is no row for what they would not see: shuffled codes in SAERec, random vectors in Grounded.
"""

import dataclasses
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import (  # noqa: E402
    StageSettings, UserError, load_artifact, parse, rank_users, ranking_metrics, run_command,
    run_dataset, save_artifact, setting,
)  # fmt: skip

import numpy as np  # noqa: E402

from eval import PROTOCOL  # noqa: E402
from model import (  # noqa: E402
    Grounded, ModelSettings, SAERec, SASRec, catalogue_loss, check_model, model_scores, new_model,
    train_model,
)  # fmt: skip
from studies import baselines, rivals, significance, variants  # noqa: E402

FIRST = "Grounded"
UNMATCHED = "Grounded without match"
ALSO = (  # compared besides, where both are trained
    ("SAERec", "SASRec"),  # what the paper claims
    ("Grounded", "SASRec + text"),  # whether intents are more than texts
)


class Row(NamedTuple):
    """A configuration: a model to train, or a function that ranks."""

    Model: type | None = None
    against: str = FIRST  # its reference
    loss: Callable = catalogue_loss
    changes: dict = {}  # of ModelSettings
    rival: str = ""  # a kind of studies/rivals.py; "": the run's own intents
    ranks: Callable | None = None  # (Dataset, ModelSettings) -> Outcome, in place of a model

    def variant(self):
        """What is not among the settings of a model, to know a finished row again -> dict."""
        Model = self.Model and self.Model.__name__
        library = rivals.SAE_CHANGES.get(self.rival)
        return dict(model=Model, loss=self.loss.__name__, rival=self.rival, library=library)

    def settings(self, base, flags):
        """The ModelSettings base with this row's changes, less what flags for all rows have set."""
        given = {word.split("=")[0] for word in flags.split()}
        own = {name: value for name, value in self.changes.items() if f"--{name}" not in given}
        return dataclasses.replace(base, **own)


def baseline_rows():
    """Rows without intents of an SAE, and what neighbours add to a model."""
    gru = dict(dropout=0.2, lr=3e-3)  # the best of a grid on validation
    rows = {
        "SASRec": Row(SASRec),
        "SASRec + text": Row(baselines.SASRecWithText, UNMATCHED, rival="text"),
        "GRU4Rec": Row(baselines.GRU4Rec, changes=gru),
        "popularity": Row(ranks=baselines.popularity_ranks),
        "BPR-MF": Row(ranks=baselines.bpr_ranks),
    }
    near = baselines.neighbour_ranks
    for kind in baselines.LIKENESS:
        rows[f"item kNN by {kind}"] = Row(ranks=partial(near, kind=kind))
    for kind in baselines.LIKENESS:
        rows[f"SASRec + item kNN by {kind}"] = Row(ranks=partial(near, kind=kind, Model=SASRec))
    beside = partial(near, kind="users", Model=Grounded)
    return rows | {"Grounded + item kNN by users": Row(ranks=beside)}


def paper_rows():
    """SAERec, and with one part changed."""
    changed = {
        "personal branch only": variants.PersonalOnly,
        "public branch only": variants.PublicOnly,
        "fusion by sum": variants.FusionBySum,
        "fusion by concatenation": variants.FusionByConcatenation,
        "retrieval from the trunk": variants.RetrievalFromTrunk,
        "retrieval by activation": variants.RetrievalByActivation,
    }
    rows = {"SAERec": Row(SAERec)}
    rows |= {f"SAERec with {name}": Row(Model, "SAERec") for name, Model in changed.items()}
    rows["SAERec with random vectors"] = Row(SAERec, "SAERec", rival="random")
    rows["SAERec with k-means"] = Row(SAERec, "SAERec", rival="kmeans")
    return rows


def grounded_rows():
    """Grounded, and with parts taken away or added."""
    gru = dict(dropout=0.2, lr=3e-3)
    both = "Grounded + P d + next intent"
    loss = variants.next_intent_loss
    projected = variants.SharedProjection
    return {
        FIRST: Row(Grounded),
        UNMATCHED: Row(variants.WithoutMatch),
        "match alone": Row(variants.MatchAlone),
        "Grounded + P d": Row(projected),
        "Grounded + P d with random vectors": Row(projected, "Grounded + P d", rival="random"),
        "Grounded + next intent": Row(variants.NextIntent, loss=loss),
        both: Row(variants.SharedProjectionNextIntent, loss=loss),
        "Grounded + branches": Row(variants.GroundedBranches),
        "Grounded + P d + next intent + branches": Row(variants.Everything, loss=loss),
        "Grounded with a GRU": Row(variants.GroundedGRU, changes=gru),
    }


def rival_rows():
    """Grounded on other intents, with the match and without."""
    kinds = {
        "shuffled codes": "shuffled",
        "k-means": "kmeans",
        "k-means with K codes": "kmeans-k",
        "PCA": "pca",
        "dense autoencoder": "dense",
        "L1 instead of TopK": "l1",
        "half of K": "half-k",
        "twice K": "twice-k",
        "half of M": "half-m",
        "twice M": "twice-m",
        "another seed of the SAE": "seed",
    }
    smaller = dict(match=0.12)  # as larger codes want it: the best of a grid on validation
    rows = {}
    for name, kind in kinds.items():
        changes = smaller if kind.startswith("kmeans") else {}
        rows[name] = Row(Grounded, changes=changes, rival=kind)
        rows[f"{name} without match"] = Row(variants.WithoutMatch, UNMATCHED, rival=kind)
    return rows


ROWS = grounded_rows() | baseline_rows() | paper_rows() | rival_rows()


@dataclasses.dataclass(frozen=True)
class AblateSettings(StageSettings):
    """Train every configuration with every seed and say what the numbers say."""

    only: str = setting("", "names of rows, parted by commas; all if not given")
    seeds: int = setting(3, "seeds, counted from --seed, that each row is trained with", low=1)
    model_flags: str = setting("", "flags of model.py for all rows, as in '--patience 5'")
    out: str = setting("", "where to write a copy of RUN/ablation.json", unit="path")


def chosen_rows(only):
    """Names of the rows to train, the references of those asked for first. Raises UserError."""
    asked = list(ROWS)
    if only:
        asked = [name.strip() for name in only.split(",")]
    for name in asked:
        if name not in ROWS:
            known = ", ".join(ROWS)
            raise UserError(f"--only: there is no row {name!r}; choose among {known}")
    references = [ROWS[name].against for name in asked]
    return list(dict.fromkeys([FIRST, *references, *asked]))


def base_settings(settings):
    """ModelSettings that all rows start from. Raises UserError."""
    words = ["--run", settings.run, *settings.model_flags.split()]
    base, _ = parse(words, __doc__, dict(train=(ModelSettings, None)))
    check_model(ModelSettings(width=base.width, heads=base.heads))
    for name in ("run", "data", "model", "seed", "device"):
        if getattr(base, name) != getattr(ModelSettings(run=settings.run), name):
            problem = f"--model-flags: --{name} is set for each row by studies/ablate.py itself"
            raise UserError(f"{problem}: leave it out")
    return base


def rival_folder(kind, settings):
    """The folder of a rival of a run, made if it is not there -> str. Raises UserError."""
    out = Path(settings.run) / "rivals" / f"{kind}-{settings.seed}"
    same = {name: getattr(settings, name) for name in ("run", "data", "seed", "device")}
    wanted = rivals.RivalSettings(kind=kind, out=str(out), **same)
    if rivals.rival_of(out) != rivals.identity(wanted):
        rivals.make_rival(wanted)
    return str(out)


def train_and_rank(row, data, settings):
    """Train the model of a Row and rank the test items with it -> Outcome. Raises UserError."""
    model, log = train_model(new_model(row.Model, settings, data), data, row.loss)
    ranks = rank_users(model_scores(model, data, "test"), data, "test")
    valid = max(line["valid_NDCG@10"] for line in log)
    return baselines.Outcome(ranks, baselines.parameters_of(model), valid)


def finished(path, script, of_row, settings, data):
    """What a row left in an earlier run of a script -> (tensors, metadata), or None.

    of_row: {key of the metadata: what it must be}. Raises UserError if it was made from other
    intents or data than the run has now.
    """
    if not path.is_file():
        return None
    folder = path.parent
    kind = path.name.split("-")[0]
    again = f"rm {folder}/{kind}-*.safetensors; studies/{script} --run {folder}"
    tensors, meta = load_artifact(path, again, data)
    before = meta["settings"] | dict(run=settings.run, data=settings.data)  # both may have moved
    if before != dataclasses.asdict(settings) or not of_row.items() <= meta.items():
        return None
    return tensors, meta


def finish(name, data, settings):
    """Train the row of that name, unless an earlier run has -> (ranks, dict of what it took)."""
    row = ROWS[name]
    folder = Path(settings.run)
    slug = re.sub("[^a-z0-9]+", "-", name.lower())
    path = folder / f"ablation-{slug}-{settings.seed}.safetensors"
    done = finished(path, "ablate.py", dict(variant=row.variant()), settings, data)
    if done:
        return done[0]["ranks"], done[1]
    print(f"{name}, seed {settings.seed}")
    run = settings.run
    if row.rival:
        run = rival_folder(row.rival, settings)
    started = time.perf_counter()
    rank = row.ranks or partial(train_and_rank, row)
    ranks, parameters, valid = rank(data, dataclasses.replace(settings, run=run))
    seconds = round(time.perf_counter() - started, 1)
    more = dict(parameters=parameters, seconds=seconds, valid=valid, variant=row.variant())
    more["commit"] = significance.current_commit()
    made_from = [folder / "intents.safetensors"]
    save_artifact(path, {"ranks": ranks}, settings, data.hash, made_from, **more)
    return ranks, more


def mean_and_spread(values):
    """Of a metric over seeds -> dict."""
    std = None
    if len(values) > 1:
        std = float(np.std(values, ddof=1))
    return dict(mean=float(np.mean(values)), std=std, per_seed=values)


def summary(name, seeds, means, groups):
    """The row of a report: seeds: (ranks, what it took) of each; means, groups: over users."""
    took = [more for _, more in seeds]
    row = dict(name=name, against=ROWS[name].against, params=took[0]["parameters"])
    row["seconds"] = float(np.mean([more["seconds"] for more in took]))
    row["valid NDCG@10"] = None
    if took[0]["valid"] is not None:
        row["valid NDCG@10"] = float(np.mean([more["valid"] for more in took]))
    metrics = [ranking_metrics(ranks) for ranks, _ in seeds]
    row |= {metric: mean_and_spread([one[metric] for one in metrics]) for metric in metrics[0]}
    return row | dict(groups={group: float(means[mask].mean()) for group, mask in groups.items()})


def ablation_report(data, results, settings):
    """What ablation.json holds, from {name: [(ranks, what it took) of each seed]} -> dict.

    Rows that an earlier call finished may be of other commits: all that they are of are named.
    """
    groups = significance.user_groups(data)
    means = {}
    rows = []
    for name, seeds in results.items():
        means[name] = significance.user_means([ranks for ranks, _ in seeds])
        rows.append(summary(name, seeds, means[name], groups))
    pairs = [(row["against"], row["name"]) for row in rows if row["name"] != FIRST]
    pairs += [pair for pair in ALSO if results.keys() >= set(pair)]
    tests = significance.paired_tests(means, pairs, settings.seed)
    p_values = {(test["a"], test["b"]): test["p_holm"] for test in tests}
    for row in rows:
        row["p"] = p_values.get((row["against"], row["name"]))
    report = dict(dataset=data.folder.name, users=len(data.users))
    report["protocol"] = f"{PROTOCOL}; {significance.TESTED}"
    report["seeds"] = list(range(settings.seed, settings.seed + settings.seeds))
    report["trained at"] = significance.trained_at(results)
    return report | dict(rows=rows, tests=tests, verdict=significance.verdict(rows, tests))


def ablate(settings):
    """Train every row with every seed, going on where an earlier run stopped, and compare."""
    names = chosen_rows(settings.only)
    base = base_settings(settings)
    data = run_dataset(settings.run, settings.data)
    results = {name: [] for name in names}
    # A seed for all rows, then the next: what is there when it is interrupted can be compared
    for seed in range(settings.seed, settings.seed + settings.seeds):
        one = dataclasses.replace(base, seed=seed, device=settings.device, data=settings.data)
        for name in names:
            own = ROWS[name].settings(one, settings.model_flags)
            results[name].append(finish(name, data, own))
    report = ablation_report(data, results, settings)
    print(*significance.report_table(report["rows"]), "", report["verdict"], sep="\n")
    significance.write_result(settings.run, "ablation", report, settings.out)


def main(argv=None):
    return run_command(argv, __doc__, ablate=(AblateSettings, ablate))


if __name__ == "__main__":
    sys.exit(main())
