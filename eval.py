"""What a run is worth: full ranking of popularity, SASRec and SAERec on the test items, and its intents in words.

    python eval.py --run runs/ml-100k

data + intents + both models -> metrics.json, and a report on the terminal.

Leave-one-out, every item of the catalogue ranked for every user, epochs chosen on validation, test scored once. One
relevant item a user, so with its rank r (1 is best):
    HR@n = mean [r <= n]      NDCG@n = mean [r <= n] / log2(r + 1)      MRR = mean 1 / r                    (10)
Metrics are shared with training, which needs them to choose its epoch: `target_ranks` and `ranking_metrics` in saerec.py.
"""

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import torch

from model import load_library, load_model, model_scores, personal_intents, rank_users, user_intents
from sae import describe_library
from saerec import (UserError, common_settings, generator, load_artifact, pick_device, ranking_metrics, run, run_dataset, setting,
                    write_lines)  # fmt: skip

PROTOCOL = (
    "leave-one-out, last item of each user; full ranking over the catalogue; items of the history leave the ranking, a target among "
    "them is a miss; ties count against the model; epoch chosen on the last but one item; no statistic sees either"
)


@dataclasses.dataclass(frozen=True)
class EvalSettings:
    run: str = setting("", "run folder", unit="path")
    users: int = setting(3, "users to show, drawn by the seed", low=0)
    top: int = setting(5, "intents and recommendations to show", low=1)
    seed: int = common_settings()[0]
    device: str = common_settings()[1]


def popularity_scores(data):
    """Number of training interactions of each item, the same for everybody: the `score` of `rank_users`."""
    counts = torch.bincount(torch.from_numpy(data.training_items()), minlength=len(data.items)).float()
    return lambda users: counts.expand(len(users), -1).clone()


def read_intents(folder):
    """Rows of intents.jsonl, in the order of the intents. Raises UserError if they are not those of intents.safetensors."""
    path, made_by = folder / "intents.jsonl", f"sae.py --run {folder}"
    latents = load_artifact(folder / "intents.safetensors", made_by)[0]["latent"].tolist()
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): make it again with `{made_by}`") from error
    if [row.get("latent") for row in rows] != latents:
        raise UserError(f"{path} does not belong to {folder / 'intents.safetensors'}: make both again with `{made_by}`")
    return rows


def metrics_table(models):
    """Lines of a table: a model a row, a metric a column."""
    names = list(next(iter(models.values())))
    yield f"{'model':<12}" + "".join(f"{name:>9}" for name in names)
    for model, metrics in models.items():
        yield f"{model:<12}" + "".join(f"{metrics[name]:>9.4f}" for name in names)


@torch.no_grad()
def show_user(user, model, data, personal, rows, score, top):
    """Lines on one user: history, personal and public intents in words, recommendations; -> marks the held-out item."""
    history, target = data.history(user, "test"), data.targets("test")[user]
    yield f"user {data.users[user]}, {len(history)} items, the last ones:"
    yield from (f"      {data.titles[item]}" for item in history[-top:])
    if model.settings.personal:
        strength, intent = (column[0].tolist() for column in user_intents(model, data, personal, "test", [user]))
        yield "  personal intents: " + "; ".join(f"{rows[j]['label']} {s:.2f}" for s, j in zip(strength, intent) if j < len(rows))
    if model.settings.public:
        yield "  public intents:   " + "; ".join(rows[j]["label"] for j in model.public_intents().tolist())
    scores = score(torch.tensor([user]))[0].cpu()
    fresh = np.setdiff1d(np.arange(1, len(scores)), history)
    yield "  recommended:"
    for place, item in enumerate(fresh[scores[fresh].argsort(descending=True, stable=True)[:top]], 1):
        yield f"   {'->' if item == target else '  '} {place} {data.titles[item]}"


def rank(settings):
    """Score every model of a run on its test items once, write metrics.json and print the report."""
    folder, device = Path(settings.run), pick_device(settings.device)
    data = run_dataset(settings.run)
    library = load_library(folder, data)
    rows = read_intents(folder)
    sasrec, saerec = load_model(folder, "none", data, None).to(device), load_model(folder, "sae", data, library).to(device)
    personal = personal_intents(data, library, saerec.settings)
    score = model_scores(saerec, data, personal, "test")
    scores = {"popularity": popularity_scores(data), "sasrec": model_scores(sasrec, data, None, "test"), "saerec": score}
    models = {name: ranking_metrics(rank_users(one, data, "test")) for name, one in scores.items()}
    users, items, targets = len(data.users), len(data.items) - 1, data.targets("test")
    repeats = sum(targets[user] in data.history(user, "test") for user in range(users))
    report = dict(dataset=data.folder.name, users=users, items=items, protocol=PROTOCOL, targets_in_history=repeats)
    report |= dict(seed=saerec.settings.seed, models=models)
    write_lines(folder / "metrics.json", [json.dumps(report, indent=2, sort_keys=True)])
    print(f"{data.folder}: {users:,} users, {items:,} items, {repeats} targets already in the history")
    print(f"protocol: {PROTOCOL}\n")
    print(*metrics_table(models), "", *describe_library(rows, settings.top), "", sep="\n")
    chosen = torch.randperm(users, generator=generator(settings.seed, "users shown"))[: settings.users].tolist()
    for user in chosen:
        print(*show_user(user, saerec, data, personal, rows, score, settings.top), "", sep="\n")


def main(argv=None):
    return run(argv, __doc__, rank=(EvalSettings, rank))


if __name__ == "__main__":
    sys.exit(main())
