"""Put everything that was measured in a run on one page.

    python tools/report.py --run runs/ml-100k       -> report.html, in the run folder

The page holds its data and draws itself: no network, no other file. It shows the models of
metrics.json and whether they differ by more than chance, a few users with the reasons of one model,
the intents with the texts, items and users behind them, the training curves, and, if the run has
them, what ablation.json and steering.json hold and interpret.json says of planted intents. What is
too much for one page is left out, and said.
"""

import contextlib
import csv
import dataclasses
import json
import math
import re
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import (  # noqa: E402
    StageSettings, UserError, file_hash, generator, load_artifact, pick_device, rank_users,
    run_command, run_dataset, setting, target_ranks, user_metrics, write_lines,
)  # fmt: skip

import numpy as np  # noqa: E402
import torch  # noqa: E402

from eval import (  # noqa: E402
    history_state, judged_intents, load_model, popularity_scores, read_intents,
)  # fmt: skip
from model import MODELS, evaluation_rows, model_scores, pad_rows  # noqa: E402
from sae import SparseRows, cell_bounds, encode_all, load_intents  # noqa: E402
from tools.asked import load_sae  # noqa: E402
from tools.recommend import answer, evoked_by, split_terms  # noqa: E402

TEMPLATE = Path(__file__).with_suffix(".html")
MARKER = "/*DATA*/"
REPORT_LIMIT = 5_000_000  # bytes; a larger page opens slowly and is too much for a mail
TEXT = 160  # characters of a text that are shown
STRONG = 5  # texts of an intent that are shown, the strongest
WEAK = 3  # and the weakest
BINS = 12  # of a histogram
ENCODED = 20_000  # texts, drawn by the seed, whose activations are looked at
USERS_READ = 2000  # users, likewise, among whom those with most of an intent are found
TITLES = 20_000  # items that can be searched, the most popular
LANDMARKS = 1200  # intents that t-SNE places on the map; the others join them
# How models are called on the page, in its order
NAMES = {"popularity": "popularity"} | {name: Model.__name__ for name, Model in MODELS.items()}


@dataclasses.dataclass(frozen=True)
class ReportSettings(StageSettings):
    model: str = setting("grounded", "whose reasons to show", choices=tuple(MODELS))
    users: int = setting(5, "users to show, drawn by the seed", low=0)
    top: int = setting(8, "recommendations to show of each", low=1)
    intents: int = setting(4000, "intents to list, those of the highest density first", low=1)


# The page


def to_script_json(part):
    """JSON that may stand inside a <script> element -> str.

    Nothing in it ends the element, and UTF-8 holds all of it. Raises ValueError for NaN.
    """
    text = json.dumps(part, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return re.sub("[<>&\u2028\u2029\ud800-\udfff]", escape, text)


def escape(found):
    """A match of one character -> its JSON escape."""
    return f"\\u{ord(found[0]):04x}"


def build_report(data, template_path=TEMPLATE):
    """Put the data of a report into its template -> the page, self-contained HTML.

    data: a dict with a key per section; what each holds is listed at the top of the template.
    Raises UserError.
    """
    template = Path(template_path).read_text(encoding="utf-8")
    if template.count(MARKER) != 1:
        problem = f"{template_path} must hold {MARKER} exactly once, where the data go"
        raise UserError(f"{problem}: restore it with git")
    try:
        page = template.replace(MARKER, to_script_json(data))
    except ValueError as error:  # JSON has no word for them
        problem = f"a number in the report is NaN or infinite ({error})"
        raise UserError(f"{problem}: give None for what was not measured") from error
    return page


def fit_report(data, limit=REPORT_LIMIT):
    """Build the page, shorter where it would be over `limit` bytes -> (page, what was shortened).

    What was shortened is a list of str. Only a page whose other sections alone are over the limit
    stays so.
    """
    page = build_report(data)
    said = {}
    for what, sentence, data in shorter(data):
        if len(page.encode()) <= limit:
            break
        said[what] = sentence
        page = build_report(data)
    return page, list(said.values())


def shorter(data):
    """Yield (what is shortened, how, the data), each with less than the one before.

    First the texts, then examples, users, titles that can be searched, and at last intents, the
    least dense first.
    """
    intents = data.get("intents", [])
    for length in (80, 40):
        intents = [shorten_texts(row, length) for row in intents]
        data = data | dict(intents=intents)
        yield "texts", f"texts to {length} characters", data
    fewer = dict(texts=2, weak=1, items=2, users=1, neighbours=2)
    intents = [row | {key: row.get(key, [])[:n] for key, n in fewer.items()} for row in intents]
    data = data | dict(intents=intents)
    yield "examples", "examples to 2 texts and items of an intent", data
    users = data.get("users", dict(rows=[]))
    kept = len(users["rows"])
    while kept > ReportSettings.users:
        kept = max(kept // 2, ReportSettings.users)
        data = data | dict(users=users | dict(rows=users["rows"][:kept]))
        yield "users", f"users to {kept}", data
    kept = len(data.get("items", []))
    while kept > 1000:
        kept //= 2
        data = data | dict(items=data["items"][:kept])
        yield "items", f"titles that can be searched to the {kept:,} most popular", data
    kept = len(intents)
    while kept > 1:
        kept = kept * 4 // 5
        listed = densest(intents, kept)
        shown = {row["intent"] for row in listed}
        listed = [row | dict(neighbours=among(shown, row["neighbours"])) for row in listed]
        data = data | dict(intents=listed)
        yield "intents", f"intents to the {kept:,} densest", data


def shorten_texts(row, length):
    """A row of intents whose texts have at most so many characters -> dict."""
    words = names_of(row)
    cut = {}
    for key in ("texts", "weak"):
        cut[key] = [[excerpt(text, words, length), z] for text, z in row.get(key, [])]
    return row | cut


def names_of(row):
    """The words that an intent is named by -> list of str."""
    return [*row["label"].split(", "), *row["keywords"]]


def excerpt(text, words, length):
    """At most `length` characters of a text, around the place where words begin in it -> str."""
    text = " ".join(text.split())
    if len(text) <= length:
        return text
    places = [text.lower().find(word.lower()) for word in words]
    first = min((place for place in places if place >= 0), default=0)
    start = max(0, min(first - length // 4, len(text) - length))
    before = "\u2026" if start else ""
    after = "\u2026" if start + length < len(text) else ""
    return before + text[start : start + length][len(before) : length - len(after)] + after


def densest(rows, count):
    """The rows of the highest density, at most `count`, in their order -> list of dict."""
    first = sorted(rows, key=lambda row: -row["density"])[:count]
    return sorted(first, key=lambda row: row["intent"])


def among(shown, pairs):
    """Those of pairs [[intent, cosine], ...] whose intent is in the set `shown` -> list."""
    return [pair for pair in pairs if pair[0] in shown]


# The map of intents


def tsne(x, perplexity=30.0, steps=300, seed=0):
    """A map of points x [J, E] in which near ones stay near -> [J, 2].

    t-SNE (van der Maaten & Hinton 2008), started from PCA.
    """
    J = len(x)
    near = neighbour_shares(x, min(perplexity, (J - 1) / 3))
    P = ((near + near.T) / (2 * J)).clamp_min(1e-12)
    axes = torch.linalg.svd(x - x.mean(0), full_matrices=False)[0][:, :2]
    y = 1e-2 * axes / axes.std(0)
    y += 1e-4 * torch.randn(J, 2, generator=generator(seed, "map"))
    speed = torch.zeros(J, 2)
    for step in range(steps):
        early = step < 100
        exaggeration = 12 if early else 1  # which makes clusters
        momentum = 0.5 if early else 0.8
        pull = 1 / (1 + torch.cdist(y, y).square())
        pull.fill_diagonal_(0)
        force = (exaggeration * P - pull / pull.sum()) * pull
        gradient = 4 * (force.sum(1, keepdim=True) * y - force @ y)
        speed = momentum * speed - max(J / 12, 50) * gradient
        y = y + speed
    return y - y.mean(0)


def map_points(x, weight, seed=0):
    """Places of points x [J, E] on a map -> [J, 2].

    Of very many, t-SNE places those of largest weight, [J]; each other one joins the three that are
    nearest to it.
    """
    order = weight.argsort(descending=True, stable=True)
    placed = order[:LANDMARKS]
    others = order[LANDMARKS:]
    y = torch.zeros(len(x), 2)
    y[placed] = tsne(x[placed], seed=seed)
    for part in others.split(4096):
        square, nearest = torch.cdist(x[part], x[placed]).square().topk(3, largest=False)
        share = 1 / square.clamp_min(1e-6)
        share /= share.sum(1, keepdim=True)
        y[part] = (share[:, :, None] * y[placed[nearest]]).sum(1)
    return y


def neighbour_shares(x, perplexity):
    """How much each point x [J, E] takes each other one for its neighbour -> [J, J], rows sum to 1.

    The widths are found by bisection, so that each has as many neighbours as the perplexity says.
    """
    square = torch.cdist(x, x).square().fill_diagonal_(torch.inf)
    precision = torch.ones(len(x), 1)
    low = torch.zeros(len(x), 1)
    high = torch.full((len(x), 1), torch.inf)
    for _ in range(40):
        near = (-square * precision).softmax(1)
        entropy = torch.special.entr(near).sum(1, keepdim=True)
        flat = entropy > math.log(perplexity)
        low = torch.where(flat, precision, low)
        high = torch.where(flat, high, precision)
        precision = torch.where(high.isinf(), 2 * precision, (low + high) / 2)
    return near


def neighbours(codes, count=5):
    """The intents that share most items with each -> per intent, [[intent, cosine], ...].

    codes: SparseRows [V+1, J]; the cosine is that of the two sets of items.
    """
    J = codes.columns
    on = SparseRows(codes.indptr, codes.indices, (codes.values > 0).float(), J)
    carriers = on.transposed
    both = torch.empty(J, J)
    for part in torch.arange(J).split(512):
        both[:, part] = carriers.mix(carriers.gather(part).dense().T.contiguous())
    size = both.diagonal().clamp_min(1).sqrt()
    best = (both / size / size[:, None]).fill_diagonal_(0).topk(min(count, J))
    found = []
    for cosines, intents in zip(best.values.tolist(), best.indices.tolist()):
        found.append([[j, round(v, 3)] for v, j in zip(cosines, intents) if v > 0])
    return found


# What is behind an intent


class Firing(NamedTuple):
    """Where the latents of a run's SAE fire, on some of its texts."""

    texts: torch.Tensor  # int64 [n], numbers of texts
    sample: int  # so many of them, the first, were drawn at random
    by_latent: SparseRows  # [M, n]


def read_firing(folder, data, rows, seed):
    """Encode a sample of a run's texts, and those in rows of intents.jsonl -> Firing.

    None for a run without its SAE. Raises UserError.
    """
    path = folder / "sae.safetensors"
    if not path.is_file():
        return None
    sae, _ = load_sae(folder, data)
    embeddings = load_artifact(folder / "embeddings.safetensors", "embed.py", data)[0]["embeddings"]
    sample = torch.randperm(len(data.texts), generator=generator(seed, "texts encoded"))[:ENCODED]
    number = {text: n for n, text in enumerate(data.texts)}
    shown = {number[text] for row in rows for text in row["texts"]}
    more = sorted(shown.difference(sample.tolist()))
    texts = torch.cat([sample, torch.tensor(more, dtype=torch.int64)])
    codes = encode_all(sae, embeddings[texts])
    fires = codes.values > 0  # (n, K)
    cells = codes.latents[fires].int(), codes.values[fires]
    by_text = SparseRows(cell_bounds(fires.sum(1)), *cells, len(sae.W_dec))
    return Firing(texts, len(sample), by_text.transposed)


def text_examples(row, firing, data):
    """Texts of a row of intents.jsonl with activations, and their histogram -> dict.

    texts: the strongest, [[text, activation], ...]; weak: the weakest that it fires on, likewise;
    histogram: [largest activation, [texts in each of the bins from 0 to it]], of the sample alone.
    """
    words = names_of(row)
    if firing is None:
        return dict(texts=[[excerpt(text, words, TEXT), None] for text in row["texts"]])
    places, strength = firing.by_latent.row(row["latent"])
    activation = {}  # of each text, the strongest first; copies count once
    for at in strength.argsort(descending=True, stable=True).tolist():
        text = data.texts[firing.texts[places[at]]]
        activation.setdefault(text, round(float(strength[at]), 3))
    pairs = [[text, z] for text, z in activation.items()]
    strong = pairs[:STRONG]
    weak = pairs[STRONG:][-WEAK:]
    examples = dict(texts=[[excerpt(text, words, TEXT), z] for text, z in strong])
    examples["weak"] = [[excerpt(text, words, TEXT), z] for text, z in reversed(weak)]
    drawn = strength[places < firing.sample]
    if len(drawn):
        largest = float(drawn.max())
        examples["histogram"] = [largest, drawn.histc(BINS, 0, largest).int().tolist()]
    return examples


def strongest_users(model, data, seed, count=3):
    """The users with most of each intent, by r of equation (11) -> per intent, [[user, r], ...].

    model: Grounded, whose match moves their scores by it. Of at most USERS_READ users.
    """
    rows = evaluation_rows(data, "test", model.settings.history)
    flat = torch.from_numpy(data.flat).long()
    order = torch.randperm(len(data.users), generator=generator(seed, "users read"))
    users = order[:USERS_READ]
    r = []
    for part in users.split(256):
        _, items, _ = pad_rows(rows, part, flat)  # (B, T)
        last = torch.arange(len(items)) * items.shape[1] + rows.length[part] - 1
        device = model.item.weight.device
        r.append(model.history_intents(items.to(device), last.to(device)).cpu())
    best = torch.cat(r).topk(min(count, len(users)), dim=0)  # (count, J)
    found = []
    for values, places in zip(best.values.T.tolist(), best.indices.T.tolist()):
        found.append([[data.users[users[at]], round(v, 2)] for v, at in zip(values, places) if v])
    return found


def intents_section(folder, intents, data, users, settings):
    """The densest intents with what is behind them, and their places on the map -> list of dict.

    users: as `strongest_users` gives them, or None.
    """
    rows = read_intents(folder)
    listed = densest(rows, settings.intents)
    numbers = [row["intent"] for row in listed]
    shown = set(numbers)
    firing = read_firing(folder, data, listed, settings.seed)
    place = {}
    if len(listed) > 3:  # fewer make no map
        weight = torch.tensor([row["density"] for row in listed])
        library, _ = load_artifact(folder / "intents.safetensors", "sae.py", data)
        vectors = library["vectors"][numbers]  # `intents` has none of what was judged no intent
        points = map_points(vectors, weight, settings.seed)
        place = dict(zip(numbers, points.tolist()))
    beside = neighbours(intents.codes)
    number_of = {item: number for number, item in enumerate(data.items)}
    carried = intents.codes.column_counts().tolist()
    section = []
    for row in listed:
        intent = row["intent"]
        row = row | text_examples(row, firing, data)
        if place:
            row |= dict(x=round(place[intent][0], 3), y=round(place[intent][1], 3))
        code = dict(zip(*(part.tolist() for part in intents.codes.transposed.row(intent))))
        items = [number_of[item] for item in row["items"]]
        row["items"] = [[data.titles[v], round(code[v], 3) if v in code else None] for v in items]
        row["item_count"] = carried[intent] or None  # what was judged to be no intent lost them
        row["neighbours"] = among(shown, beside[intent])
        if users is not None:
            row["users"] = users[intent]
        section.append(row)
    return section


def library_section(rows):
    """Figures on all rows of intents.jsonl, listed or not -> dict; no median of nothing: None."""
    kept = [row for row in rows if row.get("is_intent", True)]
    measured = judged_intents(kept)
    none = len(rows) - len(kept)
    section = dict(intents=len(kept), none=none, measured=len(measured))
    for key in ("detection_auroc", "permuted_auroc"):
        found = [row[key] for row in measured if row[key] is not None]
        section[key] = statistics.median(found) if found else None
    return section


def items_section(codes, data):
    """Titles of the most popular items with their intents -> [[title, [intent, ...]], ...].

    codes: SparseRows [V+1, J]; the largest come first.
    """
    taken = np.bincount(data.training_items(), minlength=len(data.items))[1:]
    section = []
    for item in (np.argsort(-taken, kind="stable")[:TITLES] + 1).tolist():
        intents, code = codes.row(item)
        section.append([data.titles[item], intents[code.argsort(descending=True)].tolist()])
    return section


# The other sections


@contextlib.contextmanager
def of_this_version(path):
    """Refuse a file whose content turns out not to be what is written now. Raises UserError."""
    try:
        yield
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        problem = f"{path} is not as this version writes it ({type(error).__name__}: {error})"
        raise UserError(f"{problem}: delete it and make it again") from error


def read_number(cell):
    """A cell of a CSV -> float, or None for what was not measured."""
    return None if cell == "nan" else float(cell)


def read_log(path):
    """A CSV of numbers that training wrote -> list of dict; None if there is none.

    A number that could not be measured is None. Raises UserError.
    """
    if not path.is_file():
        return None
    rows = []
    with of_this_version(path), open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows.append({name: read_number(cell) for name, cell in row.items()})
    return rows


def read_result(folder, name, section):
    """What the function `section` makes of a JSON file of the run, parsed.

    {} if there is none, or it was measured with other intents or another model than the run has
    now. Raises UserError if it cannot be read.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        return {}
    with of_this_version(path):
        found = json.loads(path.read_text(encoding="utf-8"))
        made_from = {"intents.safetensors": found.get("intents")} | found.get("made_from", {})
        for file, digest in made_from.items():
            source = folder / file
            if digest and source.is_file() and file_hash(source) != digest:
                print(f"{path} was measured with another {source} than is there now: left out")
                return {}
        return section(found)


def metrics_section(metrics):
    """What metrics.json says -> dict; `models` are rows of the page, `measured` is by model."""
    said = dict(protocol=metrics["protocol"])
    seed = metrics["seed"]  # one, or a list of those that the models have
    said["seeds"] = seed if isinstance(seed, list) else [seed]
    said["measured"] = {name: dict(one) for name, one in metrics["models"].items()}
    return said | dict(models=models_section(metrics))


def models_section(metrics):
    """The models of metrics.json with their standard errors -> list of dict."""
    section = []
    for name, shown in NAMES.items():
        if name in metrics["models"]:
            row = dict(name=shown, metrics=metrics["models"][name])
            section.append(row | dict(error=metrics["standard_errors"][name]))
    return section


def interval(differences):
    """The mean of float64 [users] and its normal 95% interval -> [mean, low, high].

    Of a single user there is no interval, and both ends are None.
    """
    mean = float(differences.mean())
    if len(differences) < 2:
        return [mean, None, None]
    error = float(differences.std()) / len(differences) ** 0.5
    return [mean, mean - 1.96 * error, mean + 1.96 * error]


def check_measured(models, found, metrics, folder):
    """Refuse a metrics.json that is not of these models: raises UserError.

    models: {name: model}; found: {name: its `user_metrics` now}; metrics: of `metrics_section`.
    """
    path = folder / "metrics.json"
    remedy = f"make it again with `eval.py --run {folder}`"
    for name, model in models.items():
        seed = model.settings.seed
        if seed not in metrics["seeds"]:
            seeds = ", ".join(map(str, metrics["seeds"]))
            raise UserError(f"{path} is of seed {seeds}, but {name} is of {seed} now: {remedy}")
        for metric, values in found[name].items():
            mean = metrics["measured"][name].get(metric)
            now = float(values.mean())
            # Machines round differently, which may move a rank of many users, hardly of few
            if mean is not None and abs(mean - now) > min(2 / len(values), 1e-3):
                problem = f"{path} says {metric} {mean:.5f} of {name}, which has {now:.5f} now"
                raise UserError(f"{problem}: {remedy}")


def compared_section(models, data, metrics, folder):
    """How models differ from SASRec, or else from popularity, user by user -> dict.

    Test users are ranked again, since metrics.json holds means alone. models: {name: model};
    metrics: of `metrics_section`. Raises UserError if metrics.json is not of these models.
    """
    score = {name: model_scores(model, data, "test") for name, model in models.items()}
    control = "sasrec"
    if len(models) == 1 or control not in models:
        control = "popularity"
        score[control] = popularity_scores(data)
    found = {name: user_metrics(rank_users(one, data, "test")) for name, one in score.items()}
    check_measured(models, found, metrics, folder)
    rows = []
    for name in reversed([name for name in models if name != control]):
        differences = {key: interval(v - found[control][key]) for key, v in found[name].items()}
        rows.append(dict(name=NAMES[name], differences=differences))
    return dict(control=NAMES[control], users=len(data.users), rows=rows)


def training_section(folder):
    """The training curves of a run -> {model: rows of its log}, ours first."""
    section = {}
    for name in reversed(MODELS):
        log = read_log(folder / f"{name}_log.csv")
        if log:
            section[NAMES[name]] = log
    return section


def ablation_section(report):
    """What ablation.json says of NDCG@10, tested against its first row -> dict."""
    first = report["rows"][0]["name"]
    p_values = {test["b"]: test["p_holm"] for test in report["tests"] if test["a"] == first}
    rows = []
    for row in report["rows"]:
        metric = row["NDCG@10"] or dict(mean=None, std=None)
        line = dict(name=row["name"], params=row["params"], seconds=row["seconds"])
        line |= dict(mean=metric["mean"], std=metric["std"], p=p_values.get(row["name"]))
        rows.append(line)
    return dict(metric="NDCG@10", rows=rows, verdict=report["verdict"])


def steering_section(report):
    """What steering.json says -> dict."""
    return dict(model=NAMES[report["model"]], rows=report["rows"])


def recovery_section(report):
    """What interpret.json says of a planted world's intents -> list; None of any other data."""
    return report.get("recovery")


@torch.no_grad()
def score_after(model, history):
    """(the State after a history, int32 [T], scores of all items [V+1])."""
    state = history_state(model, history)
    return state, model.scores(state, model.item_table())[0].cpu()


def places(scores, items, history):
    """Ranks of items among all that are not in the history, as eval.py counts them -> list.

    scores: [V+1]; items, history: numbers. None for an item of the history.
    """
    seen = torch.from_numpy(history).long().expand(len(items), -1)
    ranks = target_ranks(scores.expand(len(items), -1), torch.tensor(items), seen)
    return [None if math.isinf(rank) else int(rank) for rank in ranks.tolist()]


@torch.no_grad()
def beside_rows(model, history, items):
    """What another model says of the same items, numbers -> list of dict(rank, score, parts)."""
    state, scores = score_after(model, history)
    rows = []
    for item, rank in zip(items, places(scores, items, history)):
        reasons = model.reasons(state, item)
        parts = list(reasons.parts.items())
        if len(reasons.terms):
            parts.append(("intents", float(reasons.terms.sum())))
        rows.append(dict(rank=rank, score=float(scores[item]), parts=parts))
    return rows


def user_row(model, beside, codes, data, user, top):
    """A user's history, intents and recommendations with their reasons -> dict.

    beside: another model, or None.
    """
    history = data.history(user, "test")
    target = int(data.targets("test")[user])
    told = answer(model, codes, data, history, top)
    read = history[-model.settings.history :]
    others = [None] * len(told.listed)
    if beside is not None:
        others = beside_rows(beside, history, [one.item for one in told.listed])
    recommended = []
    for rank, (one, other) in enumerate(zip(told.listed, others), 1):
        largest, rest = split_terms(one.reasons, 5)
        terms = []
        for intent, value in largest:
            evoked = evoked_by(intent, read, codes, data.titles, model.settings.decay)
            terms.append([intent, value, evoked])
        row = dict(rank=rank, title=data.titles[one.item], score=one.score)
        row |= dict(parts=list(one.reasons.parts.items()), terms=terms, rest=rest)
        recommended.append(row | dict(held_out=one.item == target, beside=other))
    _, scores = score_after(model, history)
    return dict(
        user=data.users[user],
        history=[data.titles[item] for item in told.history],
        target=dict(title=data.titles[target], rank=places(scores, [target], history)[0]),
        personal=[(intent, strength) for intent, strength, _ in told.personal],
        public=told.public,
        recommendations=recommended,
    )


def users_section(models, codes, data, settings):
    """A few users, drawn by the seed -> dict, {} if none is asked for.

    models: {name: model}, of which Grounded and SAERec are shown beside each other.
    """
    order = torch.randperm(len(data.users), generator=generator(settings.seed, "users shown"))
    users = order[: settings.users].tolist()
    if not users:
        return {}
    other = dict(grounded="saerec", saerec="grounded").get(settings.model)
    beside = models.get(other)
    model = models[settings.model]
    rows = [user_row(model, beside, codes, data, user, settings.top) for user in users]
    name = None if beside is None else NAMES[other]
    return dict(model=NAMES[settings.model], beside=name, rows=rows)


def mentioned(users):
    """Numbers of the intents that the rows of users mention -> set."""
    found = set()
    for user in users.get("rows", []):
        found.update(intent for intent, _ in user["personal"])
        found.update(user["public"])
        for item in user["recommendations"]:
            found.update(intent for intent, _, _ in item["terms"])
    return found


def load_models(folder, metrics, data, settings):
    """The trained models of a run that metrics.json knows, and the one to show -> {name: model}.

    metrics: of `metrics_section`. Raises UserError.
    """
    models = {}
    for name in MODELS:
        there = name in metrics["measured"] and (folder / f"{name}.safetensors").is_file()
        if there or name == settings.model:
            models[name] = load_model(folder, name, data, pick_device(settings.device))
    if settings.model not in metrics["measured"]:
        problem = f"{folder / 'metrics.json'} is older than the run's {settings.model}"
        raise UserError(f"{problem}: make it again with `eval.py --run {folder}`")
    return models


def run_content(folder, settings):
    """All that the page shows of a run -> dict with a key per section. Raises UserError."""
    data = run_dataset(folder, settings.data)
    metrics = read_result(folder, "metrics", metrics_section)
    if not metrics:
        path = folder / "metrics.json"
        raise UserError(f"{path} is missing: make it with `eval.py --run {folder}`")
    models = load_models(folder, metrics, data, settings)
    codes = None
    behind = {}
    if (folder / "intents.safetensors").is_file():  # a run of SASRec alone has none
        intents = load_intents(folder, data)
        codes = intents.codes
        most = None
        if "grounded" in models:
            most = strongest_users(models["grounded"], data, settings.seed)
        behind["intents"] = intents_section(folder, intents, data, most, settings)
        behind["items"] = items_section(codes, data)
        rows = read_intents(folder)
        behind["library"] = library_section(rows)
    users = users_section(models, codes, data, settings)
    if codes is not None:
        labels = [row["label"] for row in rows]
        behind["names"] = {str(intent): labels[intent] for intent in sorted(mentioned(users))}
    counts = dict(users=len(data.users), items=len(data.items) - 1)
    counts |= dict(interactions=len(data.flat), texts=len(data.texts))
    version = torch.__version__.split("+")[0]
    seeds = ", ".join(map(str, metrics["seeds"]))
    content = dict(
        title=f"{data.folder.name}: what the intents found, and what they are worth",
        dataset=dict(name=data.folder.name) | counts,
        protocol=metrics["protocol"],
        made=f"{time.strftime('%Y-%m-%d')}, torch {version}, seed {seeds}",
        models=metrics["models"],
        compared=compared_section(models, data, metrics, folder),
        ablation=read_result(folder, "ablation", ablation_section),
        users=users,
        steering=read_result(folder, "steering", steering_section),
        recovery=read_result(folder, "interpret", recovery_section),
        sae=read_log(folder / "sae_log.csv"),
        training=training_section(folder),
    )
    content |= behind
    return {key: value for key, value in content.items() if value}


def report(settings):
    """Write RUN/report.html, a self-contained page on everything that was measured in a run."""
    folder = Path(settings.run)
    page, shortened = fit_report(run_content(folder, settings))
    write_lines(folder / "report.html", [page.removesuffix("\n")])
    size = len(page.encode()) / 1e6
    if shortened:
        print(f"shortened to fit {REPORT_LIMIT / 1e6:.0f} MB: {'; '.join(shortened)}")
    print(f"{folder / 'report.html'}: {size:.1f} MB, open it in a browser")


def main(argv=None):
    return run_command(argv, __doc__, report=(ReportSettings, report))


if __name__ == "__main__":
    sys.exit(main())
