"""What a run is worth: every model of it ranked on the test items, and a few users with reasons.

    python eval.py --run runs/ml-100k          -> metrics.json

Leave-one-out; every item of the catalogue is ranked for every user; the epoch was chosen on
validation, test is scored once. There is one relevant item per user, so with its rank (1 is best)
    HR@n = mean [rank <= n]     NDCG@n = mean [rank <= n] / log2(rank + 1)     MRR = mean 1 / rank
Training needs the same to choose its epoch: `target_ranks` and `ranking_metrics` in saerec.py.
"""

import dataclasses
import json
import sys
from pathlib import Path
from statistics import median

from saerec import (
    StageSettings, UserError, claim, generator, load_artifact, pick_device, rank_users,
    ranking_metrics, run_command, run_dataset, setting, user_metrics, write_lines,
)  # fmt: skip  # before torch, see GOMP_SPINCOUNT there

import torch

from model import MODELS, ModelSettings, model_scores, new_model, states_after

PROTOCOL = (
    "leave-one-out, last item of each user; full ranking over the catalogue; items of the history "
    "leave the ranking, a target among them is a miss; ties count against the model; epoch chosen "
    "on the last but one item; no statistic sees either"
)


@dataclasses.dataclass(frozen=True)
class EvalSettings(StageSettings):
    users: int = setting(3, "users to show, drawn by the seed", low=0)
    top: int = setting(5, "intents and recommendations to show", low=1)


# Reading a finished run


def load_model(folder, name, data, device="cpu"):
    """Read a trained model of a run -> SASRec, SAERec or Grounded, to evaluate; UserError."""
    path = Path(folder) / f"{name}.safetensors"
    made_by = f"model.py --run {folder} --model {name}"
    tensors, meta = load_artifact(path, made_by, data)
    try:
        here = dict(run=str(folder), device=torch.device(device).type)
        model = new_model(MODELS[name], ModelSettings(**meta["settings"] | here), data)
        model.load_state_dict(tensors)
    except (TypeError, RuntimeError) as error:  # other settings, other parameters
        problem = f"{path} does not fit this version of model.py"
        raise UserError(f"{problem}: make it again with `{made_by}`") from error
    return model.eval()


def read_intents(folder):
    """Rows of intents.jsonl, in the order of the intents. Raises UserError if they are others."""
    path = Path(folder) / "intents.jsonl"
    made_by = f"sae.py --run {folder}"
    latents = load_artifact(path.with_suffix(".safetensors"), made_by)[0]["latent"].tolist()
    if not path.is_file():
        raise UserError(f"{path} is missing, so the intents have no names: bring it")
    try:
        with open(path, encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        if [row["latent"] for row in rows] != latents:
            raise ValueError("it does not belong to intents.safetensors")
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{path} cannot be read ({error!r})"
        raise UserError(f"{problem}: make both again with `{made_by}`") from error
    return rows


def judged_intents(rows):
    """The rows of intents.jsonl that fire on enough held-out texts for their AUROC to say much.

    Not those that tools/label.py found to be no intents.
    """
    rows = [row for row in rows if row.get("is_intent", True)]
    rows = [row for row in rows if row.get("detection_auroc") is not None]
    return [row for row in rows if row["detection_texts"] >= 3]


def describe_library(rows, top):
    """Lines on the rows of intents.jsonl: how well keywords detect them, and the best ones."""
    judged = judged_intents(rows)
    intents = sum(row.get("is_intent", True) for row in rows)
    said = f"{intents} intents; {len(judged)} fire on 3 held-out texts or more"
    if judged:
        auroc = median(row["detection_auroc"] for row in judged)
        said += f", and their keywords detect these with AUROC {auroc:.2f} in the median"
    yield said
    best = sorted(judged, key=lambda row: (-row["detection_auroc"], -row["detection_texts"]))
    for row in best[:top]:
        detected = f"keywords' AUROC {row['detection_auroc']:.2f} over {row['detection_texts']}"
        yield f"  {row['label']}  ({detected}, {row['density']:.1%} of texts)"
        yield from (f"      {text[:100]}" for text in row["texts"][:3])


# Ranking and reasons


def popularity_scores(data):
    """Training interactions of each item, the same for everybody: the `score` of `rank_users`."""
    items = torch.from_numpy(data.training_items())
    counts = torch.bincount(items, minlength=len(data.items)).float()

    def score(users):
        return counts.expand(len(users), -1)

    return score


class Unnamed(dict):
    """Labels of a run whose intents have no names, as some that studies/rivals.py makes."""

    def __missing__(self, intent):
        return f"intent {intent}"


@torch.no_grad()
def history_state(model, history):
    """The State after a whole history, int32 [any], P = 1."""
    items = torch.from_numpy(history[-model.settings.history :]).long()[None]  # (1, T)
    return states_after(model, model.item_table(), items, torch.tensor([items.shape[1]]))


@torch.no_grad()
def recommend(model, state, history, top):
    """The best items not in the history, int32 [any] -> at most `top` of (item, score, Reasons)."""
    scores = model.scores(state, model.item_table())[0].cpu()  # (V+1,)
    scores[[0, *history.tolist()]] = -torch.inf
    best = scores.argsort(descending=True, stable=True)[: min(top, int(scores.isfinite().sum()))]
    return [(item, float(scores[item]), model.reasons(state, item)) for item in best.tolist()]


def reason_words(reasons, labels, terms=3):
    """Parts and largest terms of a score in words, the rest of the terms as one -> str."""
    words = [f"{name} {value:+.2f}" for name, value in reasons.parts.items()]
    largest = reasons.terms.abs().argsort(descending=True, stable=True)
    for place in largest[:terms].tolist():
        words.append(f"{labels[int(reasons.intents[place])]} {reasons.terms[place]:+.2f}")
    if len(largest) > terms:
        words.append(f"rest {reasons.terms[largest[terms:]].sum():+.2f}")
    return "  ".join(words)


def show_user(model, user, data, labels, top):
    """Lines on one user: history, intents, recommendations; an arrow marks the held-out item."""
    history = data.history(user, "test")
    state = history_state(model, history)
    yield f"user {data.users[user]}, {len(history)} items, the last ones:"
    yield from (f"      {data.titles[item]}" for item in history[-top:])
    for name, intents in model.intents_shown(state).items():
        what = " (what most histories come near to)" if name == "public" else ""
        yield f"  {name} intents{what}: " + "; ".join(labels[one] for one in intents.tolist())
    yield "  recommended:"
    for rank, (item, score, reasons) in enumerate(recommend(model, state, history, top), 1):
        mark = "->" if item == data.targets("test")[user] else "  "
        yield f"   {mark} {rank} {data.titles[item]}"
        yield f"          {score:.2f} = {reason_words(reasons, labels)}"


def standard_errors(ranks):
    """Standard error over users of each metric, from float64 ranks [users] -> dict of floats."""
    spread = {name: v.std(correction=min(1, len(v) - 1)) for name, v in user_metrics(ranks).items()}
    return {name: float(deviation / len(ranks) ** 0.5) for name, deviation in spread.items()}


def metrics_table(models):
    """Lines of a table: a model per row, a metric per column."""
    names = list(next(iter(models.values())))
    yield f"{'model':<12}" + "".join(f"{name:>9}" for name in names)
    for model, metrics in models.items():
        yield f"{model:<12}" + "".join(f"{metrics[name]:>9.4f}" for name in names)


def evaluate(settings):
    """Rank the test items by popularity and every model of a run; write metrics.json."""
    folder = Path(settings.run)
    device = pick_device(settings.device)
    data = run_dataset(settings.run, settings.data)
    found = [name for name in MODELS if (folder / f"{name}.safetensors").is_file()]
    if not found:
        raise UserError(f"{folder} has no trained model: make one with `model.py --run {folder}`")
    models = {name: load_model(folder, name, data, device) for name in found}
    claim(folder)
    shown = models[found[-1]]  # of those that there are, the last in MODELS
    scores = {"popularity": popularity_scores(data)}
    scores |= {name: model_scores(model, data, "test") for name, model in models.items()}
    ranks = {name: rank_users(score, data, "test") for name, score in scores.items()}
    repeats = int(ranks["popularity"].isinf().sum())  # a target in the history has rank inf
    report = dict(dataset=data.folder.name, users=len(data.users), items=len(data.items) - 1)
    report |= dict(protocol=PROTOCOL, targets_in_history=repeats)
    seeds = sorted({model.settings.seed for model in models.values()})
    report["seed"] = seeds[0] if len(seeds) == 1 else seeds
    report["models"] = {name: ranking_metrics(one) for name, one in ranks.items()}
    report["standard_errors"] = {name: standard_errors(one) for name, one in ranks.items()}
    write_lines(folder / "metrics.json", [json.dumps(report, indent=2, sort_keys=True)])
    print(f"{data.folder}: {report['users']:,} users, {report['items']:,} items")
    if 10 * repeats > report["users"]:
        share = f"{repeats / report['users']:.0%} OF THE USERS HAD THE TEST ITEM BEFORE"
        print(f"{share}, a miss for every model: remove repeated rows, if they are")
    print(f"{repeats} test items are in the history already; protocol: {PROTOCOL}\n")
    print(*metrics_table(report["models"]), "", sep="\n")
    labels = Unnamed()
    if (folder / "intents.jsonl").is_file():
        rows = read_intents(folder)
        labels = {row["intent"]: row["label"] for row in rows}
        print(*describe_library(rows, settings.top), "", sep="\n")
    order = torch.randperm(len(data.users), generator=generator(settings.seed, "users shown"))
    for user in order[: settings.users].tolist():
        print(*show_user(shown, user, data, labels, settings.top), "", sep="\n")


def main(argv=None):
    return run_command(argv, __doc__, evaluate=(EvalSettings, evaluate))


if __name__ == "__main__":
    sys.exit(main())
