"""Can the intents be understood? Labels, stability and, where it is known, the truth.

    python studies/interpret.py --run runs/ml-100k          -> runs/ml-100k/interpret.json

labels      how well an intent's keywords alone tell held-out texts that it fires on
            (AUROC), beside the keywords of other intents, and those of k-means' clusters
stability   how much of the library another seed of the SAE finds again, beside what two runs of
            k-means share, and how much of it random texts and random directions have
recovery    of a planted world (sources/planted.py): how well directions and codes find the true
            intents, beside SAEs of other sizes, an L1 penalty, PCA, k-means, a dense autoencoder
            and random directions

Whether reasons are true is asked by studies/reasons.py. Nobody is asked here; for people's
judgement see studies/rate.py. J* are the true intents.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import (  # noqa: E402
    StageSettings, generator, load_artifact, run_command, run_dataset, setting,
)  # fmt: skip

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from embed import terms_of  # noqa: E402
from eval import judged_intents, read_intents  # noqa: E402
from sae import SAE, build_library, encode_all  # noqa: E402
from studies.rivals import (  # noqa: E402
    L1SAE, load_run, rival, sae_library, strongest, train_other,
)  # fmt: skip
from studies.significance import write_result  # noqa: E402

COMPARED = {  # of `measure_stability`
    "stability": "intents among another seed's",
    "kmeans": "k-means' centroids among another seed's",
    "texts": "intents among random texts",
    "floor": "intents among random directions",
}
DIRECTIONS = {
    "pca": "PCA",
    "kmeans": "k-means",
    "kmeans-k": "k-means, K codes",
    "dense": "dense autoencoder",
}


@dataclasses.dataclass(frozen=True)
class InterpretSettings(StageSettings):
    """Measure how well a run's intents can be understood."""

    out: str = setting("", "where to write a copy of RUN/interpret.json", unit="path")


# Labels


def label_scores(rows, key="detection_auroc"):
    """Median and share above 0.8 of an AUROC over the judged rows of intents.jsonl -> dict.

    An intent is judged if it fires on 3 held-out texts or more; `of` counts them all. The first
    intent has no permuted score.
    """
    scores = [row[key] for row in judged_intents(rows)]
    scores = np.array([score for score in scores if score is not None])
    counts = dict(intents=len(scores), of=len(rows))
    if not len(scores):
        return counts
    return counts | dict(median=float(np.median(scores)), above_08=float((scores > 0.8).mean()))


def told_names(rows):
    """Share of the rows of intents.jsonl whose top texts tell their name, that of sae.py.

    Two of them at least say each of its words.
    """
    told = []
    for row in rows:
        said = [terms_of(text) for text in row["texts"]]
        name = row.get("offline_label", row["label"])
        words = name.split(" (")[0].split(", ")
        told.append(all(sum(word in terms for terms in said) >= 2 for word in words))
    return float(np.mean(told))


def cluster_labels(run, clusters, seed):
    """Name k-means' clusters of a Run's texts as sae.py names intents -> rows of intents.jsonl."""
    x = run.sae.standardize(run.embeddings)
    train = x[~run.corpus.held_out]
    settings = dataclasses.replace(run.settings, latents=min(clusters, len(train)), seed=seed)
    vectors, _ = rival("kmeans", train, settings)
    codes = strongest(x @ vectors.T, 1)
    all_others = torch.full((len(vectors),), settings.members)
    return build_library(vectors, codes, all_others, run.corpus, settings)[1]


def measure_labels(run, rows, seed):
    """`label_scores` of a Run's intents, rows of intents.jsonl, and of what they compare with.

    As many clusters as intents are far smaller, since a text is in one of them but has K intents:
    few clusters can be judged. So there are also clusters as large as intents are on average.
    """
    size = np.mean([row["density"] for row in rows])  # of the texts
    as_large = max(round(1 / size), 2)
    return {
        "SAE": label_scores(rows),
        "SAE, labels permuted": label_scores(rows, "permuted_auroc"),
        "SAE, by meaning": label_scores(rows, "meaning_auroc"),
        "k-means, as many clusters": label_scores(cluster_labels(run, len(rows), seed)),
        "k-means, clusters as large": label_scores(cluster_labels(run, as_large, seed)),
    }


# Stability


def stability(vectors, others):
    """How much of a library another has, from cosines of vectors [J, E] and others [J', E] -> dict.

    mean_cosine: of each with its best; matched_cosine: one to one, the pairs of largest total
    cosine, over the smaller library.
    """
    cosine = F.normalize(vectors, dim=1) @ F.normalize(others, dim=1).T
    best = cosine.max(1).values.double()
    above = {f"above_0{tenth}": float((best > tenth / 10).double().mean()) for tenth in (9, 7)}
    pairs = assignment(cosine.double().numpy())
    matched = float(cosine[pairs].double().mean())
    return dict(mean_cosine=float(best.mean())) | above | dict(matched_cosine=matched)


def assignment(gain):
    """Rows and columns of the one-to-one pairs of largest total gain, float64 [n, m].

    -> (int64 [min(n, m)], int64 [min(n, m)]). The Hungarian method by shortest augmenting paths
    (Jonker & Volgenant 1987).
    """
    if gain.shape[0] > gain.shape[1]:
        columns, rows = assignment(gain.T)
        return rows, columns
    n, m = gain.shape
    row_price = np.zeros(n + 1)
    column_price = np.zeros(m + 1)
    row_of = np.full(m + 1, n)  # of each column; row n is nobody, column m where a path begins
    for row in range(n):
        row_of[m] = row
        column = m
        shortest = np.full(m, np.inf)
        before = np.full(m, m)
        done = np.zeros(m + 1, bool)
        while row_of[column] != n:
            done[column] = True
            here = row_of[column]
            cost = -gain[here] - row_price[here] - column_price[:m]
            nearer = ~done[:m] & (cost < shortest)
            shortest[nearer] = cost[nearer]
            before[nearer] = column
            step_to = int(np.where(done[:m], np.inf, shortest).argmin())
            step = shortest[step_to]
            row_price[row_of[done]] += step
            column_price[done] -= step
            shortest[~done[:m]] -= step
            column = step_to
        while column != m:
            row_of[column] = row_of[before[column]]
            column = before[column]
    columns = np.flatnonzero(row_of[:m] != n)
    return torch.from_numpy(row_of[columns]), torch.from_numpy(columns)


def measure_stability(run, seed):
    """`stability` against the library of another seed, and what it has to be compared with -> dict.

    "kmeans": of the centroids of two seeds, as many as there are latents; "texts", "floor": of the
    library against as many random training texts, and random directions, as the other has intents.
    """
    vectors = run.intents["vectors"]
    others = sae_library("seed", run, 0)[0]["vectors"]
    random = generator(seed, "random directions")
    directions = torch.randn(others.shape, generator=random)
    x = run.sae.standardize(run.embeddings[~run.corpus.held_out])
    texts = x[torch.randperm(len(x), generator=random)[: len(others)]]
    seeds = [dataclasses.replace(run.settings, seed=seed + n) for n in range(2)]
    one, another = (rival("kmeans", x, each)[0] for each in seeds)
    return dict(
        stability=stability(vectors, others),
        kmeans=stability(one, another),
        texts=stability(vectors, texts),
        floor=stability(vectors, directions),
    )


# Recovery of a planted truth


def firing_auroc(activation, truth):
    """AUROC of every latent at telling every true intent -> float64 [J*, J], nan without both.

    activation: [N, J], >= 0; truth: bool [N, J*]. Zeros tie, positive activations are taken to
    differ.
    """
    a = activation.double()
    t = truth.double()
    rank = a.argsort(dim=0, stable=True).argsort(dim=0, stable=True) + 1.0
    zeros = (a <= 0).sum(0).double()
    rank = torch.where(a > 0, rank.double(), (zeros + 1) / 2)  # tied ones share their mean rank
    positives = t.sum(0)[:, None]  # (J*, 1)
    above = t.T @ rank - positives * (positives + 1) / 2
    return above / (positives * (len(t) - positives))


def true_directions(x, truth):
    """What each true intent adds to texts x [N, E], by least squares -> unit rows [J*, E]."""
    design = torch.cat([truth.float(), torch.ones(len(x), 1)], 1)
    return F.normalize(torch.linalg.lstsq(design, x).solution[:-1], dim=1)


def recovery(vectors, codes, x, truth):
    """How well directions [J, E] and codes of texts x [N, E] find the truth, bool [N, J*] -> dict.

    recovered: share of true directions with a cosine above 0.9 among them; mean_cosine: the mean of
    these best cosines; auroc: of the best latent of a true intent, chosen on half of the texts, at
    telling the other half's; isolation: by how much it tells them better than it tells any other
    true intent.
    """
    cosine = true_directions(x, truth) @ F.normalize(vectors, dim=1).T
    best = cosine.max(1).values.double()
    activation = torch.zeros(len(x), len(vectors)).scatter_(1, codes.latents, codes.values)
    chosen = firing_auroc(activation[::2], truth[::2]).nan_to_num(0).argmax(1)  # (J*,)
    told = firing_auroc(activation[1::2][:, chosen], truth[1::2])  # (J*, J*)
    own = told.diagonal()
    itself = torch.eye(len(told), dtype=torch.bool)
    others = told.masked_fill(itself, -1).nan_to_num(-1).max(0).values
    return dict(
        recovered=float((best > 0.9).double().mean()),
        mean_cosine=float(best.mean()),
        auroc=float(own.nanmean()),
        isolation=float((own - others).nanmean()),
    )


def other_sizes(settings):
    """Factors on K or M of SaeSettings, none of which leaves fewer latents than are active."""
    changes = [{}]
    changes += [dict(active=factor) for factor in (0.25, 0.5, 2, 4)]
    changes += [dict(latents=factor) for factor in (0.25, 0.5, 2)]
    for change in changes:
        K = settings.active * change.get("active", 1)
        M = settings.latents * change.get("latents", 1)
        if K <= M:
            yield change


def autoencoder_rows(run, x, truth):
    """`recovery` of the Run's SAE, trained anew, of other K and M, and of an L1 penalty -> rows."""
    rows = []
    for change in other_sizes(run.settings):
        sae, _, settings = train_other(run, change, run.settings.seed, SAE)
        scores = recovery(sae.W_dec.detach(), encode_all(sae, run.embeddings), x, truth)
        rows.append(dict(method="SAE", K=settings.active, M=settings.latents) | scores)
    sae, _, settings = train_other(run, {}, run.settings.seed, L1SAE)
    scores = recovery(sae.W_dec.detach(), encode_all(sae, run.embeddings), x, truth)
    return [*rows, dict(method="L1-SAE", K=None, M=settings.latents) | scores]


def direction_rows(run, x, truth, seed):
    """`recovery` of PCA, k-means, a dense autoencoder and random directions -> rows."""
    settings = dataclasses.replace(run.settings, seed=seed)
    M = settings.latents
    K = settings.active
    rows = []
    for kind, name in DIRECTIONS.items():
        vectors, codes = rival(kind, x, settings)
        count = dict(K=codes.values.shape[1], M=len(vectors))
        rows.append(dict(method=name) | count | recovery(vectors, codes, x, truth))
    drawn = torch.randn(M, x.shape[1], generator=generator(seed, "random directions"))
    vectors = F.normalize(drawn, dim=1)
    scores = recovery(vectors, strongest(x @ vectors.T, K), x, truth)
    return [*rows, dict(method="random directions", K=K, M=M) | scores]


def recovery_table(run, seed):
    """Rows of `recovery` on a Run of a planted world. Raises UserError without its truth."""
    path = run.data.folder / "truth.safetensors"
    made_by = f"sources/planted.py --out {run.data.folder}"
    truth = load_artifact(path, made_by, run.data)[0]["text_intents"].bool()  # (N, J*)
    x = run.sae.standardize(run.embeddings)
    return [*autoencoder_rows(run, x, truth), *direction_rows(run, x, truth, seed)]


# The report


def interpret(settings):
    """Measure how well a run's intents can be understood, and write it. Raises UserError."""
    folder = Path(settings.run)
    data = run_dataset(settings.run, settings.data)
    run = load_run(folder, data, settings.device)
    rows = read_intents(folder)
    report = dict(dataset=data.folder.name, labels=measure_labels(run, rows, settings.seed))
    report |= dict(told=told_names(rows)) | measure_stability(run, settings.seed)
    if (data.folder / "truth.safetensors").is_file():
        report["recovery"] = recovery_table(run, settings.seed)
    print(*interpret_lines(report), sep="\n")
    write_result(folder, "interpret", report, settings.out)


def recovery_lines(rows):
    """Lines of a table of what `recovery_table` returns."""
    head = f"{'recovery of the true intents':30}{'K':>4}{'M':>6}"
    yield f"{head}{'recovered':>11}{'cosine':>8}{'AUROC':>7}{'isolation':>11}"
    for row in rows:
        line = f"  {row['method']:28}{row['K'] or '':>4}{row['M']:>6}{row['recovered']:>11.0%}"
        yield f"{line}{row['mean_cosine']:>8.2f}{row['auroc']:>7.2f}{row['isolation']:>11.2f}"


def interpret_lines(report):
    """What interpret measured, for people."""
    for name, one in report["labels"].items():
        said = f"{one['intents']} of {one['of']} judged"
        if one["intents"]:
            said = f"median {one['median']:.2f}, above 0.8 for {one['above_08']:.0%} of {said}"
        judged = "labels of" if name.endswith("by meaning") else "keywords of"
        yield f"{judged:11} {name:27}AUROC: {said}"
    yield f"two of the five top texts or more say each word of {report['told']:.0%} of the names"
    for key, name in COMPARED.items():
        same = report[key]
        said = f"mean best cosine {same['mean_cosine']:.2f}, above 0.7 for {same['above_07']:.0%}"
        said += f", one to one {same['matched_cosine']:.2f}"
        yield f"{name:41} {said}"
    if "recovery" in report:
        yield from recovery_lines(report["recovery"])


def main(argv=None):
    return run_command(argv, __doc__, interpret=(InterpretSettings, interpret))


if __name__ == "__main__":
    sys.exit(main())
