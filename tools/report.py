"""Put everything that was measured in a run on one page.

    python tools/report.py --run runs/ml-100k       -> report.html, in the run folder

The page holds its data and draws itself: no network, no other file. It shows the models of
metrics.json, a few users with the reasons of one model, the intents, the training curves, and what
ablation.json, interpret.json and steering.json hold, if the run has them.
"""

import csv
import dataclasses
import json
import math
import re
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import (  # noqa: E402
    StageSettings, UserError, generator, pick_device, run_command, run_dataset, setting,
    write_lines,
)  # fmt: skip

import torch  # noqa: E402

from eval import load_model, read_intents  # noqa: E402
from model import MODELS  # noqa: E402
from sae import load_intents  # noqa: E402
from tools.recommend import answer, split_terms  # noqa: E402

TEMPLATE = Path(__file__).with_suffix(".html")
MARKER = "/*DATA*/"
REPORT_LIMIT = 5_000_000  # bytes; a larger page opens slowly and is too much for a mail
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
    size = len(page.encode())
    if size > REPORT_LIMIT:
        sizes = {key: len(to_script_json(part).encode()) for key, part in data.items()}
        largest = max(sizes, key=sizes.get)
        limit = f"over the limit of {REPORT_LIMIT / 1e6:.0f} MB"
        remedy = f"shorten its {largest}, {sizes[largest] / 1e6:.1f} MB of it"
        raise UserError(
            f"the report would be {size / 1e6:.1f} MB, {limit}: {remedy}, by fewer rows or "
            "shorter texts"
        )
    return page


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
    both = torch.zeros(J, J)
    for items in torch.arange(len(codes.indptr) - 1).split(4096):
        on = (codes.gather(items).dense() > 0).float()
        both += on.T @ on
    size = both.diagonal().clamp_min(1).sqrt()
    best = (both / size / size[:, None]).fill_diagonal_(0).topk(min(count, J))
    found = []
    for cosines, intents in zip(best.values.tolist(), best.indices.tolist()):
        found.append([[j, round(v, 3)] for v, j in zip(cosines, intents) if v > 0])
    return found


def intents_section(intents, rows, data, settings):
    """The densest intents with their places on the map -> list of dict."""
    densest = sorted(rows, key=lambda row: -row["density"])[: settings.intents]
    listed = sorted(row["intent"] for row in densest)
    shown = set(listed)
    place = {}
    if len(listed) > 3:  # fewer make no map
        points = tsne(intents.vectors[listed], seed=settings.seed).tolist()
        place = dict(zip(listed, points))
    beside = neighbours(intents.codes)
    titles = dict(zip(data.items, data.titles))
    section = []
    for intent in listed:
        row = dict(rows[intent])
        if place:
            row |= dict(x=round(place[intent][0], 3), y=round(place[intent][1], 3))
        row["texts"] = [text[:160] for text in row["texts"]]
        row["items"] = [titles[item] for item in row["items"]]
        row["neighbours"] = [pair for pair in beside[intent] if pair[0] in shown]
        section.append(row)
    return section


# The other sections


def read_log(path):
    """A CSV of numbers that training wrote -> list of dict; None if there is none."""
    if not path.is_file():
        return None
    rows = []
    with open(path, newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows.append({name: float(value) for name, value in row.items()})
    return rows


def read_result(folder, name):
    """A JSON file of the run, or {} if that measurement was not made -> dict.

    Raises UserError if it cannot be read.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        problem = f"{path} is not valid JSON ({error})"
        raise UserError(f"{problem}: delete it and make it again") from error


def models_section(metrics):
    """The models of metrics.json with their standard errors -> list of dict."""
    section = []
    for name, shown in NAMES.items():
        if name in metrics["models"]:
            row = dict(name=shown, metrics=metrics["models"][name])
            section.append(row | dict(error=metrics["standard_errors"][name]))
    return section


def training_section(folder):
    """The training curves of a run -> {model: rows of its log}, ours first."""
    section = {}
    for name in reversed(MODELS):
        log = read_log(folder / f"{name}_log.csv")
        if log:
            section[NAMES[name]] = log
    return section


def ablation_section(folder):
    """What ablation.json says of NDCG@10, tested against its first row -> dict, {} if none."""
    report = read_result(folder, "ablation")
    if not report:
        return {}
    first = report["rows"][0]["name"]
    p_values = {test["b"]: test["p_holm"] for test in report["tests"] if test["a"] == first}
    rows = []
    for row in report["rows"]:
        metric = row["NDCG@10"]
        line = dict(name=row["name"], params=row["params"], seconds=row["seconds"])
        line |= dict(mean=metric["mean"], std=metric["std"], p=p_values.get(row["name"]))
        rows.append(line)
    return dict(metric="NDCG@10", rows=rows, verdict=report["verdict"])


def steering_section(folder):
    """What steering.json says -> dict, {} if there is none."""
    report = read_result(folder, "steering")
    if not report:
        return {}
    return dict(model=NAMES[report["model"]], rows=report["rows"])


def user_row(model, codes, data, user, top):
    """A user's history, intents and recommendations with their reasons -> dict."""
    target = data.targets("test")[user]
    told = answer(model, codes, data, data.history(user, "test"), top)
    recommended = []
    for rank, one in enumerate(told.listed, 1):
        terms, rest = split_terms(one.reasons, 5)
        row = dict(rank=rank, title=data.titles[one.item], score=one.score)
        row |= dict(parts=list(one.reasons.parts.items()), terms=terms, rest=rest)
        recommended.append(row | dict(held_out=bool(one.item == target)))
    return dict(
        user=data.users[user],
        history=[data.titles[item] for item in told.history],
        target=dict(title=data.titles[target]),
        personal=[(intent, strength) for intent, strength, _ in told.personal],
        public=told.public,
        recommendations=recommended,
    )


def users_section(model, codes, data, settings):
    """A few users, drawn by the seed -> dict, {} if none is asked for."""
    order = torch.randperm(len(data.users), generator=generator(settings.seed, "users shown"))
    users = order[: settings.users].tolist()
    if not users:
        return {}
    rows = [user_row(model, codes, data, user, settings.top) for user in users]
    return dict(model=NAMES[settings.model], rows=rows)


def run_content(folder, settings):
    """All that the page shows of a run -> dict with a key per section. Raises UserError."""
    data = run_dataset(folder)
    metrics = read_result(folder, "metrics")
    if not metrics:
        path = folder / "metrics.json"
        raise UserError(f"{path} is missing: make it with `eval.py --run {folder}`")
    model = load_model(folder, settings.model, data, pick_device(settings.device))
    codes = None
    intents_shown = []
    if (folder / "intents.safetensors").is_file():  # a run of SASRec alone has none
        intents = load_intents(folder, data)
        codes = intents.codes
        intents_shown = intents_section(intents, read_intents(folder), data, settings)
    counts = dict(users=len(data.users), items=len(data.items) - 1)
    counts |= dict(interactions=len(data.flat), texts=len(data.texts))
    version = torch.__version__.split("+")[0]
    content = dict(
        title=f"{data.folder.name}: what the intents found, and what they are worth",
        dataset=dict(name=data.folder.name) | counts,
        protocol=metrics["protocol"],
        made=f"{time.strftime('%Y-%m-%d')}, torch {version}, seed {metrics['seed']}",
        models=models_section(metrics),
        ablation=ablation_section(folder),
        intents=intents_shown,
        users=users_section(model, codes, data, settings),
        steering=steering_section(folder),
        recovery=read_result(folder, "interpret").get("recovery"),
        sae=read_log(folder / "sae_log.csv"),
        training=training_section(folder),
    )
    return {key: value for key, value in content.items() if value}


def report(settings):
    """Write RUN/report.html, a self-contained page on everything that was measured in a run."""
    folder = Path(settings.run)
    page = build_report(run_content(folder, settings))
    write_lines(folder / "report.html", [page.removesuffix("\n")])
    size = len(page.encode()) / 1e6
    print(f"{folder / 'report.html'}: {size:.1f} MB, open it in a browser")


def main(argv=None):
    return run_command(argv, __doc__, report=(ReportSettings, report))


if __name__ == "__main__":
    sys.exit(main())
