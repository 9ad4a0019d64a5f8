"""What a run is worth: full ranking of the test items, baselines, ablations, interpretability, and the report.

    python eval.py --run runs/ml-100k                            popularity, SASRec and SAERec -> metrics.json, and a few users
    python eval.py ablate --run runs/ml-100k --only SASRec       train rivals and variants, test what differs -> ablation.json
    python eval.py interpret --run runs/ml-100k                  can the intents be understood? -> interpret.json
    python eval.py steer --run runs/ml-100k                      what steering moves, and what it costs -> steering.json
    python eval.py report --run runs/ml-100k                     all of these as a page -> report.html
    python eval.py rate --run runs/ml-100k --out sheet.csv       a blind sheet for human raters,
    python eval.py kappa a.csv b.csv --key sheet_key.csv         and how well they agree

Leave-one-out, every item of the catalogue ranked for every user, epochs chosen on validation, test scored once. One
relevant item a user, so with its rank r (1 is best):
    HR@n = mean [r <= n]      NDCG@n = mean [r <= n] / log2(r + 1)      MRR = mean 1 / r                    (11)
Metrics are shared with training, which needs them to choose its epoch: `target_ranks` and `ranking_metrics` in saerec.py.
"""

import csv
import dataclasses
import functools
import io
import itertools
import json
import math
import re
import sys
import time
from pathlib import Path

import saerec  # noqa: F401  before torch, see GOMP_SPINCOUNT there
import numpy as np
import torch
import torch.nn.functional as F

from model import (Library, ModelSettings, evaluation_rows, explain, gather, intent_frequency, intent_shift, intent_terms, inverse_frequency,
                   load_library, load_model, model_scores, personal_intents, rank_users, resolve, steer, train_model, transpose, user_states,
                   weighted_bags)  # fmt: skip
from sae import (SaeSettings, build_library, describe_library, encode_all, held_out_texts, judged_intents, load_embeddings, load_sae,
                 read_intents, rival, standardized_texts, train_sae)  # fmt: skip
from saerec import (HERE, UserError, common_settings, generator, load_artifact, parse, pick_device, ranking_metrics, run, run_dataset,
                    save_artifact, setting, target_ranks, user_metrics, write_lines)  # fmt: skip

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


def metrics_table(models):
    """Lines of a table: a model a row, a metric a column."""
    names = list(next(iter(models.values())))
    yield f"{'model':<12}" + "".join(f"{name:>9}" for name in names)
    for model, metrics in models.items():
        yield f"{model:<12}" + "".join(f"{metrics[name]:>9.4f}" for name in names)


def show_user(user, model, data, library, rows, top):
    """Lines on one user: history, personal and public intents in words, recommendations; -> marks the held-out item."""
    history, target = data.history(user, "test"), data.items[data.targets("test")[user]]
    one = explain(model, data, library, rows, history, top)
    yield f"user {data.users[user]}, {len(history)} items, the last ones:"
    yield from (f"      {item['title']}" for item in one["history"][-top:])
    if one["personal"]:
        yield "  personal intents: " + "; ".join(f"{p['label']} {p['strength']:.2f}" for p in one["personal"])
    if one["public"]:
        yield "  public intents:   " + "; ".join(p["label"] for p in one["public"])
    yield "  recommended:"
    yield from (f"   {'->' if item['item'] == target else '  '} {item['rank']} {item['title']}" for item in one["recommendations"])


def rank(settings):
    """Score every model of a run on its test items once, write metrics.json and print the report."""
    folder, device = Path(settings.run), pick_device(settings.device)
    data = run_dataset(settings.run)
    library = load_library(folder, data)
    rows = read_intents(folder)
    sasrec, saerec = load_model(folder, "none", data, None).to(device), load_model(folder, "sae", data, library).to(device)
    personal = personal_intents(data, library, saerec.settings)
    scores = {"popularity": popularity_scores(data), "sasrec": model_scores(sasrec, data, None, "test"),
              "saerec": model_scores(saerec, data, personal, "test")}  # fmt: skip
    ranks = {name: rank_users(one, data, "test") for name, one in scores.items()}
    models = {name: ranking_metrics(one) for name, one in ranks.items()}
    errors = {name: {m: float(v.std() / len(v) ** 0.5) for m, v in user_metrics(one).items()} for name, one in ranks.items()}
    users, items, targets = len(data.users), len(data.items) - 1, data.targets("test")
    repeats = sum(targets[user] in data.history(user, "test") for user in range(users))
    report = dict(dataset=data.folder.name, users=users, items=items, protocol=PROTOCOL, targets_in_history=repeats)
    report |= dict(seed=saerec.settings.seed, models=models, standard_errors=errors)
    write_lines(folder / "metrics.json", [json.dumps(report, indent=2, sort_keys=True)])
    print(f"{data.folder}: {users:,} users, {items:,} items, {repeats} targets already in the history")
    print(f"protocol: {PROTOCOL}\n")
    print(*metrics_table(models), "", *describe_library(rows, settings.top), "", sep="\n")
    chosen = torch.randperm(users, generator=generator(settings.seed, "users shown"))[: settings.users].tolist()
    for user in chosen:
        print(*show_user(user, saerec, data, library, rows, settings.top), "", sep="\n")


# Baselines, ablations, significance

CONFIGURATIONS = {  # of the ablation: changes to model.py's settings, and to sae.py's under "library"; all are compared with the first
    "SAERec": {},
    "SASRec": dict(intents="none"),
    "SASRec + text": dict(intents="text", personal=0, public=0, match=0.0, next_intent=0.0, residual=False),
    "GRU4Rec": dict(intents="none", trunk="gru", dropout=0.2, lr=3e-3),
    "random vectors": dict(intents="random"),
    "shuffled codes": dict(intents="shuffled"),
    "k-means": dict(intents="kmeans", match=0.0),  # on validation better than with the match, as PCA is
    "PCA": dict(intents="pca", match=0.0),
    "dense autoencoder": dict(intents="dense"),
    "L1 instead of TopK": dict(library=dict(sparsity="l1")),
    "half of K": dict(library=dict(active=0.5)),
    "twice K": dict(library=dict(active=2)),
    "half of M": dict(library=dict(latents=0.5)),
    "twice M": dict(library=dict(latents=2)),
    "paper's parts alone": dict(paper=True),
    "no match": dict(match=0.0),
    "no branches": dict(personal=0, public=0),
    "neither match nor branches": dict(match=0.0, personal=0, public=0),
    "match alone": dict(personal=0, public=0, grounded=False, next_intent=0.0),
    "personal branch only": dict(public=0),
    "public branch only": dict(personal=0),
    "fusion by sum": dict(fusion="sum"),
    "fusion by concatenation": dict(fusion="concat"),
    "retrieval by similarity": dict(retrieval="similarity"),
    "retrieval from the trunk": dict(retrieval="trunk"),
    "items not grounded": dict(grounded=False),
    "items grounded by P alone": dict(residual=False),
    "no next-intent loss": dict(next_intent=0.0),
}


@dataclasses.dataclass(frozen=True)
class AblateSettings:
    run: str = setting("", "run folder with embeddings and intents", unit="path")
    only: str = setting("", "names of configurations, comma-separated; all if not given")
    seeds: int = setting(3, "seeds, counted from --seed, that each configuration is trained with", low=1)
    model_flags: str = setting("", "settings of model.py for all configurations, as in '--width 128'")
    out: str = setting("", "where to write a copy of RUN/ablation.json", unit="path")
    seed: int = common_settings()[0]
    device: str = common_settings()[1]


def popularity_ranks(data, settings):
    """Baseline: the most frequent training items for everybody -> ranks, and no parameters."""
    return rank_users(popularity_scores(data), data, "test"), 0, None


def bpr_ranks(data, settings, factors=64, epochs=100, patience=10, batch=1024):
    """Baseline: matrix factorization by Bayesian personalized ranking (Rendle et al. 2009), its epoch chosen on validation."""
    torch.manual_seed(settings.seed)
    random, users, items = generator(settings.seed, "bpr"), len(data.users), len(data.items)
    held_in = np.diff(data.start) - 2
    pairs = torch.stack([torch.arange(users).repeat_interleave(torch.from_numpy(held_in)), torch.from_numpy(data.training_items()).long()])
    tables = [torch.nn.Parameter(0.1 * torch.randn(rows, factors)) for rows in (users, items)]
    bias, best = torch.nn.Parameter(torch.zeros(items)), (-1.0, None, 0)
    optimizer = torch.optim.Adam([*tables, bias], lr=3e-3, weight_decay=1e-5, fused=True)
    for epoch in range(1, epochs + 1):
        for user, item in (pairs[:, part] for part in torch.randperm(pairs.shape[1], generator=random).split(batch)):
            other = torch.randint(1, items, item.shape, generator=random)
            difference = (tables[0][user] * (tables[1][item] - tables[1][other])).sum(1) + bias[item] - bias[other]
            optimizer.zero_grad()
            (-F.logsigmoid(difference).mean()).backward()
            optimizer.step()
        score = (lambda U, V, b: lambda chosen: U[chosen] @ V.T + b)(*(t.detach().clone() for t in (*tables, bias)))
        valid = ranking_metrics(rank_users(score, data, "valid"))["NDCG@10"]
        best = max(best, (valid, score, epoch), key=lambda one: one[0])
        if epoch - best[2] >= patience:
            break
    return rank_users(best[1], data, "test"), sum(t.numel() for t in (*tables, bias)), best[0]


def likeness(data, folder, kind):
    """How alike items are by the users, texts or intents they share -> a function that mixes it: [V+1, B] -> [V+1, B]."""
    if kind == "texts":
        library = load_library(folder, data, "text")
        x = torch.zeros(len(data.items), library.vectors.shape[1])
        x[library.indptr.diff() > 0] = F.normalize(library.vectors, dim=1)
        return lambda weight: x @ (x.T @ weight)
    if kind == "users":  # cosine of the items' columns in the matrix of training interactions
        items, start = torch.from_numpy(data.training_items()), F.pad(torch.from_numpy(np.diff(data.start) - 2).cumsum(0), (1, 0))
        back = start, items, torch.bincount(items)[items].rsqrt()
        csr = transpose(*back, len(data.items))
    else:  # as in the match
        library = load_library(folder, data)
        idf = inverse_frequency(*intent_frequency(data, library))
        csr = library.indptr, library.indices, library.values * idf[library.indices].sqrt()
        back = transpose(*csr, len(library.vectors))
    return lambda weight: weighted_bags(weighted_bags(weight, *back), *csr)


def neighbour_ranks(data, settings, kind, beside=None):
    """Baseline that isn't trained (Dacrema et al. 2019): items like those of the history, alone or added to a trained model's scores.

    s_v = sum_t decay^age_t <x_t, x_v>, where `likeness` gives the products. beside: the model's --intents, "none" or "sae". The
    decay, and the weight beside a model in standard deviations of its scores, are chosen on validation.
    """
    alike, flat = likeness(data, Path(settings.run), kind), torch.from_numpy(data.flat).long()
    if beside:
        settings = dataclasses.replace(settings, intents=beside)
        library = load_library(Path(settings.run), data, beside)
        model, personal = train_model(data, library, settings)[0], personal_intents(data, library, settings)
        own = {part: model_scores(model, data, personal, part) for part in ("valid", "test")}

    def scores(part, decay, weight):
        rows = evaluation_rows(data, part, settings.history)

        def score(users):
            _, items, real = gather(rows, users, flat)  # (B, T)
            recent = decay ** (rows.length[users][:, None] - 1 - torch.arange(items.shape[1])) * real
            near = alike(torch.zeros(len(data.items), len(users)).scatter_add_(0, items.T, recent.T)).T  # (B, V+1)
            return steer(own[part](users).cpu(), weight * near / near[:, 1:].std(1, keepdim=True).clamp_min(1e-12)) if beside else near

        return score

    grid = itertools.product((1.0, 0.9, 0.7, 0.5), (0.1, 0.25, 0.5, 1.0) if beside else (1.0,))
    valid, chosen = max((ranking_metrics(rank_users(scores("valid", *one), data, "valid"))["NDCG@10"], one) for one in grid)
    print(f"chosen on validation: decay, weight {chosen}")
    return rank_users(scores("test", *chosen), data, "test"), sum(p.numel() for p in model.parameters()) if beside else 0, valid


KINDS = ("users", "texts", "intents")
BASELINES = {"popularity": popularity_ranks, "BPR-MF": bpr_ranks}
BASELINES |= {f"item kNN by {kind}": functools.partial(neighbour_ranks, kind=kind) for kind in KINDS}
BASELINES |= {f"SASRec + item kNN by {kind}": functools.partial(neighbour_ranks, kind=kind, beside="none") for kind in KINDS}
BASELINES |= {"SAERec + item kNN by users": functools.partial(neighbour_ranks, kind="users", beside="sae")}


def train_variant(folder, data, changes, seed):
    """Another SAE on a run's texts: a number in changes is a factor on the run's own setting -> (SAE, its settings, embeddings)."""
    embeddings, (_, own) = load_embeddings(folder, data), load_sae(folder, data)
    if "sparsity" in changes:
        changes = changes | {"active": SaeSettings.active, "l1": SaeSettings.l1}
    else:
        changes = {name: max(1, int(getattr(own, name) * factor)) for name, factor in changes.items()}
    settings = dataclasses.replace(own, **changes, seed=seed)
    return train_sae(embeddings, settings)[0].cpu(), settings, embeddings


def variant_library(folder, data, changes, seed):
    """The intents of `train_variant` -> Library."""
    net, settings, embeddings = train_variant(folder, data, changes, seed)
    codes, held_out = encode_all(net, embeddings), held_out_texts(len(embeddings), settings)
    latent, csr, _ = build_library(codes, held_out.numpy(), data, settings)
    return Library(net.W_dec.detach()[torch.from_numpy(latent).long()], *map(torch.from_numpy, csr))


def model_ranks(data, folder, changes, settings):
    """Train one configuration and rank the test items once -> (ranks float64 [users], number of parameters, validation NDCG@10)."""
    if "library" in changes:
        library = variant_library(folder, data, changes["library"], settings.seed)
    else:
        library = load_library(folder, data, settings.intents, settings.seed)
    model, log = train_model(data, library, settings)
    ranks = rank_users(model_scores(model, data, personal_intents(data, library, settings), "test"), data, "test")
    return ranks, sum(p.numel() for p in model.parameters()), max(line["valid_NDCG@10"] for line in log)


def permutation_test(difference, seed, rounds=10_000):
    """Two-sided p-value that a mean is 0, by flipping the signs of paired differences float64 [users] at random."""
    random, observed, beyond = np.random.default_rng(seed), abs(difference.mean()), 0
    for _ in range(rounds // 100):
        signs = random.integers(0, 2, (100, len(difference)), dtype=np.int8) * 2.0 - 1
        beyond += int((abs(signs @ difference) / len(difference) >= observed - 1e-12).sum())
    return (beyond + 1) / (rounds + 1)


def holm(p_values):
    """Holm's correction for many comparisons, in the order given."""
    order, adjusted, highest = np.argsort(p_values), np.empty(len(p_values)), 0.0
    for place, at in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[at]))
        adjusted[at] = highest
    return adjusted.tolist()


def user_groups(data):
    """Masks over users: the third with the shortest histories, and the third whose target is rarest in training."""
    known, popularity = np.diff(data.start), np.bincount(data.training_items(), minlength=len(data.items))[data.targets("test")]
    return {"short histories": known <= np.quantile(known, 1 / 3), "rare targets": popularity <= np.quantile(popularity, 1 / 3)}


def ablate(settings):
    """Train every configuration with every seed, resuming where an earlier run stopped, and say what the numbers say."""
    folder, data = Path(settings.run), run_dataset(settings.run)
    known = CONFIGURATIONS | BASELINES
    names = [name.strip() for name in settings.only.split(",")] if settings.only else list(known)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--only: there is no configuration {unknown[0]!r}; choose among {', '.join(known)}")
    names = ["SAERec", *(name for name in names if name != "SAERec")]
    base = dataclasses.asdict(parse(ModelSettings, settings.model_flags.split()))
    made_by = f"rm {folder}/ablation-*.safetensors; eval.py ablate --run {folder}"
    results = {name: [] for name in names}
    for seed in range(settings.seed, settings.seed + settings.seeds):  # a seed for all, then the next: partial results compare
        for name in names:
            changes = known[name] if name in CONFIGURATIONS else {}
            wanted = base | {k: v for k, v in changes.items() if k != "library"} | dict(run=str(folder), seed=seed, device=settings.device)
            one = resolve(ModelSettings(**wanted))
            path = folder / f"ablation-{re.sub('[^a-z0-9]+', '-', name.lower())}-{seed}.safetensors"
            if path.is_file():
                tensors, meta = load_artifact(path, made_by, data)
                if meta["settings"] == dataclasses.asdict(one) and meta.get("library") == changes.get("library"):
                    results[name].append((tensors["ranks"], meta))
                    continue
            print(f"{name}, seed {seed}")
            started = time.perf_counter()
            ranks, parameters, valid = known[name](data, one) if callable(known[name]) else model_ranks(data, folder, changes, one)
            more = dict(parameters=parameters, seconds=round(time.perf_counter() - started, 1), valid=valid, library=changes.get("library"))
            save_artifact(path, {"ranks": ranks}, one, data.hash, [folder / "intents.safetensors"], **more)
            results[name].append((ranks, more))
    report = ablation_report(data, results, settings)
    print(*ablation_table(report), "", report["verdict"], sep="\n")
    write_result(folder, "ablation", report, settings.out)


def write_result(folder, name, report, copy):
    """Write what was measured as RUN/NAME.json, where the report finds it, and as the file `copy` too if one is named."""
    for path in [folder / f"{name}.json", *([Path(copy)] if copy else [])]:
        write_lines(path, [json.dumps(report, indent=1)])
        print(f"written to {path}")


def ablation_report(data, results, settings):
    """Means, deviations and paired tests of {name: [(ranks, {parameters, seconds, valid}), ...]} -> what ablate writes."""
    groups, rows, gains = user_groups(data), [], {}
    for name, runs in results.items():
        metrics = [ranking_metrics(ranks) for ranks, _ in runs]
        gains[name] = np.mean([user_metrics(ranks)["NDCG@10"].numpy() for ranks, _ in runs], 0)  # (users)
        row = dict(name=name, params=runs[0][1]["parameters"], seconds=float(np.mean([more["seconds"] for _, more in runs])))
        row["valid NDCG@10"] = None if runs[0][1]["valid"] is None else float(np.mean([more["valid"] for _, more in runs]))
        for metric in metrics[0]:
            values = [one[metric] for one in metrics]
            row[metric] = dict(mean=float(np.mean(values)), std=float(np.std(values, ddof=1)) if len(values) > 1 else None, per_seed=values)
        rows.append(row | {"groups": {group: float(gains[name][mask].mean()) for group, mask in groups.items()}})
    first, *others = results
    p_values = [permutation_test(gains[first] - gains[name], settings.seed) for name in others]
    tests = [
        dict(a=first, b=name, metric="NDCG@10", difference=float((gains[first] - gains[name]).mean()), p=p, p_holm=adjusted)
        for name, p, adjusted in zip(others, p_values, holm(p_values))
    ]
    protocol = f"{PROTOCOL}; paired sign-flip permutation test over users of NDCG@10 averaged over seeds, Holm's correction"
    seeds = list(range(settings.seed, settings.seed + settings.seeds))
    report = dict(dataset=data.folder.name, users=len(data.users), protocol=protocol, seeds=seeds, rows=rows, tests=tests)
    return report | {"verdict": verdict(rows, tests)}


def verdict(rows, tests, level=0.01):
    """What the paired tests say, in sentences made from their numbers."""
    mean = {row["name"]: row["NDCG@10"]["mean"] for row in rows}
    first, said = rows[0]["name"], []
    for test in tests:
        if test["b"] == "SASRec":
            outcome = "lowers it" if test["difference"] > 0 else "raises it"
            if test["p_holm"] >= level:
                outcome = "makes no difference that the test can tell"
            both = f"NDCG@10 {mean[first]:.4f} with, {mean['SASRec']:.4f} without (p = {test['p_holm']:.2g})"
            said.append(f"Taking the intents of the SAE away from {first} {outcome}: {both}.")
    for outcome, belongs in (
        ("worse than", lambda t: t["p_holm"] < level and t["difference"] > 0),
        ("better than", lambda t: t["p_holm"] < level and t["difference"] < 0),
        ("not told apart from", lambda t: t["p_holm"] >= level),
    ):
        names = [f"{t['b']} ({mean[t['b']] / mean[first] - 1:+.1%})" for t in tests if belongs(t)]
        if names:
            said.append(f"{outcome.capitalize()} {first} at {mean[first]:.4f}: {', '.join(names)}.")
    return " ".join(said) + f" Told apart means p < {level} after Holm's correction."


def ablation_table(report):
    """Lines of a table of what ablate writes."""
    tests = {test["b"]: test["p_holm"] for test in report["tests"]}
    groups = list(report["rows"][0]["groups"])
    yield f"{'':26}{'NDCG@10':>16}{'HR@10':>16}{'p':>8}" + "".join(f"{group:>17}" for group in groups) + f"{'parameters':>12}{'seconds':>9}"
    for row in report["rows"]:
        cells = [f"{row[m]['mean']:.4f}" + (f" ±{row[m]['std']:.4f}" if row[m]["std"] is not None else "") for m in ("NDCG@10", "HR@10")]
        p = f"{tests[row['name']]:.2g}" if row["name"] in tests else ""
        counts = "".join(f"{row['groups'][group]:>17.4f}" for group in groups) + f"{row['params']:>12,}{row['seconds']:>9.0f}"
        yield f"{row['name']:26}{cells[0]:>16}{cells[1]:>16}{p:>8}{counts}"


# Interpretability


@dataclasses.dataclass(frozen=True)
class InterpretSettings:
    run: str = setting("", "run folder of finished stages", unit="path")
    users: int = setting(500, "users whose best recommendation is taken apart in the deletion test", low=1)
    out: str = setting("", "where to write a copy of RUN/interpret.json", unit="path")
    seed: int = common_settings()[0]
    device: str = common_settings()[1]


def firing_auroc(activation, truth):
    """AUROC of every latent at telling every true intent -> float64 [J*, J]; activation [N, J] >= 0, truth bool [N, J*].

    Both columns have positives and negatives, or the cell is nan. Zeros tie, positive activations are taken to differ.
    """
    a, t = activation.double(), truth.double()
    rank = a.argsort(dim=0, stable=True).argsort(dim=0, stable=True) + 1.0
    rank = torch.where(a > 0, rank.double(), ((a <= 0).sum(0).double() + 1) / 2)  # tied ones share their mean rank
    positives = t.sum(0)[:, None]  # (J*, 1)
    return (t.T @ rank - positives * (positives + 1) / 2) / (positives * (len(t) - positives))


def recovery(vectors, codes, x, truth):
    """How well learned directions [J, E] and codes of texts x [N, E] recover the intents that texts were written about, bool [N, J*].

    recovered and mean_cosine: the best cosine of each true direction, which is the least-squares part of an intent in x;
    auroc: its best latent, chosen on half of the texts, tells the other half's; isolation: by how much it tells them better
    than it tells any other true intent.
    """
    design = torch.cat([truth.float(), torch.ones(len(x), 1)], 1)
    directions = F.normalize(torch.linalg.lstsq(design, x).solution[:-1], dim=1)  # (J*, E)
    cosine = (directions @ F.normalize(vectors, dim=1).T).max(1).values
    activation = torch.zeros(len(x), len(vectors)).scatter_(1, codes.latents, codes.values)
    chosen = firing_auroc(activation[::2], truth[::2]).nan_to_num(0).argmax(1)  # (J*,)
    told = firing_auroc(activation[1::2][:, chosen], truth[1::2])  # (J*, J*): true intent, latent chosen for one
    own, others = told.diagonal(), told.masked_fill(torch.eye(len(told), dtype=torch.bool), -1).nan_to_num(-1)
    scores = dict(recovered=(cosine > 0.9).double().mean(), mean_cosine=cosine.mean(), auroc=own.nanmean())
    return {name: float(value) for name, value in scores.items()} | {"isolation": float((own - others.max(0).values).nanmean())}


def recovery_table(folder, data, seed):
    """`recovery` of the run's SAE, of others by K and M, and of their rivals, where the dataset folder knows the truth -> rows."""
    truth = load_artifact(data.folder / "truth.safetensors", "saerec.py prepare planted", data)[0]["text_intents"].bool()
    x, (_, own), rows = standardized_texts(folder, data), load_sae(folder, data), []
    changes = [{}, *({"active": f} for f in (0.25, 0.5, 2, 4)), *({"latents": f} for f in (0.25, 0.5, 2)), {"sparsity": "l1"}]
    for change in changes:
        net, settings, embeddings = train_variant(folder, data, change, seed)
        kind = "L1-SAE" if settings.sparsity == "l1" else "SAE"
        K = None if settings.sparsity == "l1" else settings.active
        scores = recovery(net.W_dec.detach(), encode_all(net, embeddings), x, truth)
        rows.append(dict(method=kind, K=K, M=settings.latents) | scores)
    for kind, name in (("pca", "PCA"), ("kmeans", "k-means"), ("dense", "dense autoencoder")):
        vectors, codes = rival(kind, x, own.latents, own.active, seed)
        rows.append(dict(method=name, K=codes.values.shape[1], M=len(vectors)) | recovery(vectors, codes, x, truth))
    return rows


def label_scores(rows, key="detection_auroc"):
    """Median and share above 0.8 of an AUROC over the judged rows of intents.jsonl -> dict."""
    scores = np.array([row[key] for row in judged_intents(rows)])
    if not len(scores):
        return dict(intents=0)
    return dict(intents=len(scores), median=float(np.median(scores)), above_08=float((scores > 0.8).mean()))


def stability(vectors, others):
    """How much of a library another seed finds again: best cosines of vectors [J, E] among others [J', E] -> dict."""
    best = (F.normalize(vectors, dim=1) @ F.normalize(others, dim=1).T).max(1).values
    return dict(mean_cosine=float(best.mean()), above_09=float((best > 0.9).double().mean()), above_07=float((best > 0.7).double().mean()))


@torch.no_grad()
def deletion_test(model, data, personal, users, seed):
    """Rank of users' best recommendation once its largest intent term is taken from its score, and once a random one is -> dict."""
    random, after = generator(seed, "deletion test"), []
    states, score = user_states(model, data, personal, "test"), model_scores(model, data, personal, "test")
    for user in users:
        scores = score(torch.tensor([user]))[0]
        scores[[0, *data.history(user, "test").tolist()]] = -torch.inf
        item, last = int(scores.argmax()), data.start[user + 1] - 2
        own = None if personal is None else [column[last].to(states.device) for column in personal]
        intents, terms = intent_terms(model, states[user], item, own)
        if len(terms) > 1:
            largest, other = int(terms.argmax()), int(torch.randint(len(terms), (), generator=random))
            after.append([float((scores > scores[item] - terms[at]).sum() + (terms[at] <= 0)) for at in (largest, other)])
    largest, other = np.array(after).T if after else (np.zeros(1), np.zeros(1))
    return dict(users=len(after), rank_without_largest=float(largest.mean()), rank_without_random=float(other.mean()),
                p=permutation_test(largest - other, seed))  # fmt: skip


def interpret(settings):
    """Measure how well a run's intents can be understood, and write it."""
    folder, device = Path(settings.run), pick_device(settings.device)
    data = run_dataset(settings.run)
    library = load_library(folder, data)
    rows, x = read_intents(folder), standardized_texts(folder, data)
    _, own = load_sae(folder, data)
    report = dict(dataset=data.folder.name, labels={"SAE": label_scores(rows), "SAE, labels permuted": label_scores(rows, "permuted_auroc")})
    _, codes = rival("kmeans", x, len(rows), own.active, settings.seed)
    clusters = dataclasses.replace(own, latents=len(rows))
    report["labels"]["k-means"] = label_scores(build_library(codes, held_out_texts(len(x), own).numpy(), data, clusters)[2])
    report["stability"] = stability(library.vectors, variant_library(folder, data, {}, own.seed + 1).vectors)
    model = load_model(folder, "sae", data, library).to(device)
    if model.settings.grounded:
        users = torch.randperm(len(data.users), generator=generator(settings.seed, "deletion users"))[: settings.users].tolist()
        report["deletion"] = deletion_test(model, data, personal_intents(data, library, model.settings), users, settings.seed)
    if (data.folder / "truth.safetensors").is_file():
        report["recovery"] = recovery_table(folder, data, own.seed)
    print(*interpret_lines(report), sep="\n")
    write_result(folder, "interpret", report, settings.out)


def interpret_lines(report):
    """What interpret measured, for people."""
    for name, one in report["labels"].items():
        if one["intents"]:
            spread = f"median {one['median']:.2f}, above 0.8 for {one['above_08']:.0%} of {one['intents']} intents"
            yield f"labels of {name:22} detection AUROC {spread}"
    same = report["stability"]
    yield f"another seed finds intents again: mean best cosine {same['mean_cosine']:.2f}, above 0.9 for {same['above_09']:.0%}"
    if one := report.get("deletion"):
        yield (f"deletion test, {one['users']} users: without its largest intent term the best item falls to rank "
               f"{one['rank_without_largest']:.1f}, without a random one to {one['rank_without_random']:.1f} (p = {one['p']:.2g})")  # fmt: skip
    for number, row in enumerate(report.get("recovery", [])):
        if not number:
            yield f"{'recovery of the true intents':30}{'K':>4}{'M':>6}{'recovered':>11}{'cosine':>8}{'AUROC':>7}{'isolation':>11}"
        yield (f"  {row['method']:28}{row['K'] or '':>4}{row['M']:>6}{row['recovered']:>11.0%}{row['mean_cosine']:>8.2f}{row['auroc']:>7.2f}"
               f"{row['isolation']:>11.2f}")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RateSettings:
    run: str = setting("", "run folder with intents", unit="path")
    out: str = setting("sheet.csv", "sheet to fill in; the right answers go beside it, into the same name with _key", unit="path")
    intents: int = setting(30, "intents to ask about, drawn by the seed", low=1)
    seed: int = common_settings()[0]


def rate(settings):
    """Write a blind, shuffled sheet for human raters: which of five texts doesn't belong, and how well does a label fit (1-5)?"""
    rows = [row for row in read_intents(Path(settings.run)) if len(row["texts"]) >= 4]
    if len(rows) < 2:
        raise UserError(f"{settings.run} has {len(rows)} intents with 4 top texts: two are needed to find intruders")
    random, questions = np.random.default_rng(settings.seed), []
    for at in random.permutation(len(rows))[: settings.intents]:
        own = rows[at]["texts"][:4]
        strangers = [text for row in rows if row is not rows[at] for text in row["texts"][:1] if text not in rows[at]["texts"]]
        order = random.permutation(5)
        texts = [[*own, strangers[random.integers(len(strangers))]][place] for place in order]
        questions.append(("intruder", "which text does not belong? 1-5", texts, int(np.argmax(order)) + 1))
        fits = random.random() < 0.5  # half of the labels are another intent's
        label = rows[at if fits else (at + random.integers(1, len(rows))) % len(rows)]["label"]
        questions.append(("label", f"how well does {label!r} fit these texts? 1 (not at all) - 5 (perfectly)", [*own, ""], int(fits)))
    order, out = random.permutation(len(questions)), Path(settings.out)
    sheet = [[n, *questions[at][:2], *questions[at][2], ""] for n, at in enumerate(order, 1)]
    write_csv(out, ["question", "task", "asked", *(f"text {n}" for n in range(1, 6)), "answer"], sheet)
    key = [[n, questions[at][0], questions[at][3]] for n, at in enumerate(order, 1)]
    write_csv(out.with_stem(out.stem + "_key"), ["question", "task", "right"], key)
    print(f"{out}: {len(sheet)} questions; fill in the column answer, then `python eval.py kappa` with each rater's file")


def write_csv(path, header, rows):
    """Write a CSV file for spreadsheets, atomically."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_lines(path, text.getvalue().splitlines())


@dataclasses.dataclass(frozen=True)
class KappaSettings:
    sheets: list = setting(None, "filled sheets, one a rater", unit="paths", positional=True)
    key: str = setting("", "the sheet's _key file; accuracy is left out without it", unit="path")


def read_sheet(path, column):
    """A column of a rating sheet -> {question: (task, whole number)}. Raises UserError with file and line."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}): give a sheet that `eval.py rate` wrote") from error
    answers = {}
    for line, row in enumerate(rows, 2):
        value, allowed = (row.get(column) or "").strip(), "01" if column == "right" and row.get("task") == "label" else "12345"
        if not row.get("question") or len(value) != 1 or value not in allowed:
            raise UserError(f"{path} row {line}: {column} is {value!r}, not one of {', '.join(allowed)}: fill it in")
        answers[row["question"]] = row["task"], int(value)
    return answers


def cohen_kappa(a, b):
    """Agreement of two raters beyond chance (Cohen 1960); a, b int [questions]."""
    agree, chance = np.mean(a == b), sum(np.mean(a == c) * np.mean(b == c) for c in np.union1d(a, b))
    return float((agree - chance) / (1 - chance)) if chance < 1 else 1.0


def fleiss_kappa(answers):
    """Agreement of many raters beyond chance (Fleiss 1971); answers int [raters, questions]."""
    count = np.stack([(answers == c).sum(0) for c in np.unique(answers)], 1)  # (questions, categories)
    raters = len(answers)
    agree, chance = ((count**2).sum(1) - raters) / (raters * (raters - 1)), ((count.sum(0) / count.sum()) ** 2).sum()
    return float((agree.mean() - chance) / (1 - chance)) if chance < 1 else 1.0


def kappa(settings):
    """Score filled sheets: accuracy against the key, and agreement of the raters."""
    sheets = [read_sheet(path, "answer") for path in settings.sheets]
    key = read_sheet(settings.key, "right") if settings.key else {}
    for path, sheet in zip(settings.sheets, sheets):
        if sheet.keys() != sheets[0].keys() or (key and sheet.keys() != key.keys()):
            raise UserError(f"{path} has other questions than {settings.sheets[0]} or the key: give copies of one sheet")
    for task in ("intruder", "label"):
        asked = [question for question, (kind, _) in sheets[0].items() if kind == task]
        answers = np.array([[sheet[question][1] for question in asked] for sheet in sheets])  # (raters, questions)
        if not len(asked):
            continue
        said = [f"{task}: {len(asked)} questions, {len(sheets)} raters"]
        right = np.array([key[question][1] for question in asked]) if key else None
        if task == "intruder" and key:
            said.append(f"accuracy {(answers == right).mean():.2f} (chance 0.20)")
        elif key:
            own, other = (answers[:, right == side].mean() if (right == side).any() else np.nan for side in (1, 0))
            said.append(f"mean fit {own:.2f} of own labels, {other:.2f} of other intents' labels")
        if len(sheets) > 1:
            pairs = [cohen_kappa(a, b) for a, b in itertools.combinations(answers, 2)]
            said.append(f"Cohen's kappa {np.mean(pairs):.2f}{' (mean of pairs)' * (len(pairs) > 1)}, Fleiss' kappa {fleiss_kappa(answers):.2f}")
        print("; ".join(said))


# Steering, and the report


@dataclasses.dataclass(frozen=True)
class SteerSettings:
    run: str = setting("", "run folder with a trained model", unit="path")
    users: int = setting(1000, "users, each asking for more of an intent drawn at random", low=1)
    strengths: str = setting("0 0.25 0.5 1 2 4", "strengths to try", unit="standard deviations of the scores")
    out: str = setting("", "where to write a copy of RUN/steering.json", unit="path")
    seed: int = common_settings()[0]
    device: str = common_settings()[1]


@torch.no_grad()
def steering_curve(model, data, personal, users, strengths, seed, top=10):
    """What `--more` of one intent does to users' lists: the share of the top items that carry it, against NDCG@10 on validation.

    users: int64 [U]; returns rows of {strength, share, ndcg}. Validation, because test is scored once.
    """
    J, device, score = len(model.df), model.df.device, model_scores(model, data, personal, "valid")
    asked = torch.randint(J, (len(users),), generator=generator(seed, "steering"))
    targets, ranks, share = torch.from_numpy(data.targets("valid")).long().to(device), [[] for _ in strengths], np.zeros(len(strengths))
    for chunk in torch.arange(len(users)).split(max(2**22 // len(data.items), 1)):
        shift = torch.stack([intent_shift(model, F.one_hot(j, J).float().to(device)) for j in asked[chunk]])  # (B, V+1)
        seen = [torch.from_numpy(data.history(u, "valid")).long() for u in users[chunk].tolist()]
        seen, own = torch.nn.utils.rnn.pad_sequence(seen, batch_first=True).to(device), score(users[chunk])
        for at, strength in enumerate(strengths):
            scores = steer(own, strength * shift)
            ranks[at].append(target_ranks(scores, targets[users[chunk].to(device)], seen))
            scores[:, 0] = -torch.inf
            best = scores.scatter(1, seen, -torch.inf).topk(top).indices
            share[at] += float((shift.gather(1, best) > 0).float().mean(1).sum()) / len(users)
    return [dict(strength=s, share=c, ndcg=ranking_metrics(torch.cat(r))["NDCG@10"]) for s, c, r in zip(strengths, share.tolist(), ranks)]


def steering(settings):
    """Measure how far lists move towards an intent that users ask for, and what it costs."""
    folder, device = Path(settings.run), pick_device(settings.device)
    data = run_dataset(settings.run)
    library = load_library(folder, data)
    try:
        strengths = [float(word) for word in settings.strengths.split()]
    except ValueError as error:
        raise UserError(f"--strengths: {error}; give numbers, as in --strengths '0 0.5 1'") from error
    model = load_model(folder, "sae", data, library).to(device)
    users = torch.randperm(len(data.users), generator=generator(settings.seed, "steered users"))[: settings.users]
    rows = steering_curve(model, data, personal_intents(data, library, model.settings), users, strengths, settings.seed)
    print(f"{'strength':>8}{'share of top 10 with the intent':>34}{'validation NDCG@10':>20}")
    print(*(f"{row['strength']:>8g}{row['share']:>34.1%}{row['ndcg']:>20.4f}" for row in rows), sep="\n")
    write_result(folder, "steering", dict(dataset=data.folder.name, users=len(users), rows=rows), settings.out)


# The report

TEMPLATE = HERE / "docs" / "report.html"
REPORT_LIMIT = 5_000_000  # bytes; a larger page opens slowly and is too much for a mail


def to_script_json(part):
    """JSON that may stand inside a <script> element: nothing in it ends the element, and UTF-8 holds all of it."""
    text = json.dumps(part, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}", text)


def build_report(data, template_path=TEMPLATE):
    """Put the data of a report into its template -> the page, self-contained HTML. Raises UserError.

    data: a dict, a key a section; what each holds is listed at the top of the template.
    """
    marker, template = "/*DATA*/", Path(template_path).read_text(encoding="utf-8")
    if template.count(marker) != 1:
        raise UserError(f"{template_path} must hold {marker} exactly once, where the data go: restore it with git")
    try:
        page = template.replace(marker, to_script_json(data))
    except ValueError as error:  # JSON has no word for them
        raise UserError(f"a number in the report is NaN or infinite ({error}): give None for what was not measured") from error
    size = len(page.encode())
    if size > REPORT_LIMIT:
        sizes = {key: len(to_script_json(part).encode()) for key, part in data.items()}
        largest = max(sizes, key=sizes.get)
        raise UserError(
            f"the report would be {size / 1e6:.1f} MB, over the limit of {REPORT_LIMIT / 1e6:.0f} MB: shorten its {largest}, "
            f"{sizes[largest] / 1e6:.1f} MB of it, by fewer rows or shorter texts"
        )
    return page


def tsne(x, perplexity=30.0, steps=300, seed=0):
    """A map of points x [J, E] in which near ones stay near, by t-SNE (van der Maaten & Hinton 2008) -> [J, 2], started from PCA."""
    J = len(x)
    square = torch.cdist(x, x).square().fill_diagonal_(torch.inf)
    precision, low, high = torch.ones(J, 1), torch.zeros(J, 1), torch.full((J, 1), torch.inf)
    target = math.log(min(perplexity, (J - 1) / 3))
    for _ in range(40):  # bisection: each point gets as many neighbours as the perplexity says
        near = (-square * precision).softmax(1)
        flat = torch.special.entr(near).sum(1, keepdim=True) > target
        low, high = torch.where(flat, precision, low), torch.where(flat, high, precision)
        precision = torch.where(high.isinf(), 2 * precision, (low + high) / 2)
    P = ((near + near.T) / (2 * J)).clamp_min(1e-12)
    axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)[0][:, :2]
    y = 1e-2 * axes / axes.std(0)
    y, speed = y + 1e-4 * torch.randn(J, 2, generator=generator(seed, "map")), torch.zeros(J, 2)
    for step in range(steps):
        pull = 1 / (1 + torch.cdist(y, y).square())
        pull.fill_diagonal_(0)
        force = ((12 if step < 100 else 1) * P - pull / pull.sum()) * pull  # exaggerated at first, which makes clusters
        gradient = 4 * (force.sum(1, keepdim=True) * y - force @ y)
        speed = (0.5 if step < 100 else 0.8) * speed - max(J / 12, 50) * gradient
        y = y + speed
    return y - y.mean(0)


def neighbours(library, items, count=5):
    """The intents that fire on the same items most: cosine of their item sets -> per intent, [[intent, cosine], ...]."""
    J = len(library.vectors)
    both, row = torch.zeros(J, J), torch.arange(items + 1).repeat_interleave(library.indptr.diff())
    for first in range(0, items + 1, 4096):
        part = (row >= first) & (row < first + 4096)
        on = torch.zeros(4096, J)
        on[row[part] - first, library.indices[part].long()] = 1
        both += on.T @ on
    size = both.diagonal().clamp_min(1).sqrt()
    best = (both / size / size[:, None]).fill_diagonal_(0).topk(min(count, J))
    return [[[j, round(v, 3)] for v, j in zip(*pair) if v > 0] for pair in zip(best.values.tolist(), best.indices.tolist())]


def read_log(path):
    """A CSV of numbers that training wrote -> list of dicts; None if there is none."""
    if not path.is_file():
        return None
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def read_result(folder, name):
    """A JSON file of the run, or {} if that measurement was not made. Raises UserError if it cannot be read."""
    path = folder / f"{name}.json"
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): delete it and make it again") from error


@dataclasses.dataclass(frozen=True)
class ReportSettings:
    run: str = setting("", "run folder with metrics.json", unit="path")
    users: int = setting(5, "users to show, drawn by the seed", low=0)
    top: int = setting(8, "recommendations to show of each", low=1)
    intents: int = setting(4000, "intents to list, those of the highest density first", low=1)
    seed: int = common_settings()[0]
    device: str = common_settings()[1]


def report(settings):
    """Write RUN/report.html, a self-contained page on everything that was measured in a run."""
    folder, data = Path(settings.run), run_dataset(settings.run)
    library, rows, metrics = load_library(folder, data), read_intents(folder), read_result(folder, "metrics")
    if not metrics:
        raise UserError(f"{folder / 'metrics.json'} is missing: make it with `eval.py --run {folder}`")
    net = load_model(folder, "sae", data, library).to(pick_device(settings.device))
    names, targets = {"sasrec": "SASRec", "saerec": "SAERec"}, data.targets("test")
    listed = sorted(sorted(range(len(rows)), key=lambda j: -rows[j]["density"])[: settings.intents])
    place = dict(zip(listed, tsne(library.vectors[listed], seed=settings.seed).tolist())) if len(listed) > 3 else {}
    beside, known = neighbours(library, len(data.items) - 1), {item: title for item, title in zip(data.items, data.titles)}
    made = [
        rows[j] | dict(texts=[text[:160] for text in rows[j]["texts"]], items=[known[item] for item in rows[j]["items"]],
                       x=round(place[j][0], 3), y=round(place[j][1], 3), neighbours=[pair for pair in beside[j] if pair[0] in place])
        for j in listed if j in place
    ]  # fmt: skip
    users = []
    for user in torch.randperm(len(data.users), generator=generator(settings.seed, "users shown"))[: settings.users].tolist():
        one = explain(net, data, library, rows, data.history(user, "test"), settings.top, terms=5)
        recommended = [
            {key: item[key] for key in ("rank", "title", "score", "id_part", "rest")}
            | dict(terms=[[t["intent"], t["value"]] for t in item["terms"]], held_out=item["item"] == data.items[targets[user]])
            for item in one["recommendations"]
        ]
        users.append(dict(
            user=data.users[user], history=[item["title"] for item in one["history"]], target=dict(title=data.titles[targets[user]]),
            personal=[[p["intent"], p["strength"]] for p in one["personal"]], public=[p["intent"] for p in one["public"]],
            recommendations=recommended,
        ))  # fmt: skip
    content = dict(
        title=f"{data.folder.name}: what the intents found, and what they are worth",
        dataset=dict(name=data.folder.name, users=len(data.users), items=len(data.items) - 1, interactions=len(data.flat),
                     texts=len(data.texts)),
        protocol=metrics["protocol"], made=f"{time.strftime('%Y-%m-%d')}, torch {torch.__version__.split('+')[0]}, seed {metrics['seed']}",
        models=[dict(name=names.get(name, name), metrics=m, error=metrics["standard_errors"][name]) for name, m in metrics["models"].items()],
        intents=made, users=users, sae=read_log(folder / "sae_log.csv"),
        training={names[m]: log for m, f in (("saerec", "log.csv"), ("sasrec", "sasrec_log.csv")) if (log := read_log(folder / f))},
        steering=read_result(folder, "steering").get("rows"), recovery=read_result(folder, "interpret").get("recovery"),
    )  # fmt: skip
    if ablation := read_result(folder, "ablation"):
        p_values = {test["b"]: test["p_holm"] for test in ablation["tests"]}
        summary = [
            dict(name=r["name"], params=r["params"], seconds=r["seconds"], mean=r["NDCG@10"]["mean"], std=r["NDCG@10"]["std"], p=p_values.get(r["name"]))
            for r in ablation["rows"]
        ]
        content["ablation"] = dict(metric="NDCG@10", rows=summary, verdict=ablation["verdict"])
    page = build_report({key: value for key, value in content.items() if value})
    write_lines(folder / "report.html", [page.removesuffix("\n")])
    print(f"{folder / 'report.html'}: {len(page.encode()) / 1e6:.1f} MB, open it in a browser")


def main(argv=None):
    commands = dict(rank=(EvalSettings, rank), ablate=(AblateSettings, ablate), interpret=(InterpretSettings, interpret))
    commands |= dict(steer=(SteerSettings, steering), report=(ReportSettings, report))
    return run(argv, __doc__, **commands, rate=(RateSettings, rate), kappa=(KappaSettings, kappa))


if __name__ == "__main__":
    sys.exit(main())
