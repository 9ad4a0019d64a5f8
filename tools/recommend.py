"""Ask a run for recommendations with reasons, and steer them by intents.

    python tools/recommend.py --run runs/ml-100k --user 42
    python tools/recommend.py --run runs/ml-100k --history-titles "Star Wars; Alien" --top 3
    python tools/recommend.py --run runs/ml-100k --user 42 --more romance --less sci-fi
    python tools/recommend.py --run runs/ml-100k --user 42 --model saerec --json

A score is taken apart as its model allows: Grounded's into the item's id and a term per intent,
SAERec's into what the history, the personal and the public intents bring, SASRec's not at all.
Steering adds to the score of item v, for a set S of intents,
    strength * sd(scores) * w_v / max w        w_v = sum_(j in S) code_vj / max code_j
with a minus for --less: the item that has most of what is asked for moves by `strength` standard
deviations. That needs the items' codes alone, so every model of a run with intents can be steered.
"""

import dataclasses
import difflib
import json
import re
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import (  # noqa: E402
    UserError, pick_device, run_command, run_dataset, setting,
)  # fmt: skip

import numpy as np  # noqa: E402
import torch  # noqa: E402

from eval import history_state, load_model, read_intents, reason_words  # noqa: E402
from model import MODELS, Reasons  # noqa: E402
from sae import load_intents  # noqa: E402


@dataclasses.dataclass(frozen=True)
class RecommendSettings:
    run: str = setting("", "run folder", unit="path", example="runs/ml-100k")
    model: str = setting("grounded", "which of its models to ask", choices=tuple(MODELS))
    user: str = setting("", "id of a user in the data, all of whose items are taken as known")
    history: str = setting("", "or the ids of items, oldest first, as in 'i1 i7'")
    history_titles: str = setting("", "or their titles, as in 'Toy Story; GoldenEye'")
    top: int = setting(10, "items to recommend", low=1)
    more: str = setting(
        "", "intents to see more of: numbers, keywords or labels, between commas or semicolons"
    )
    less: str = setting("", "intents to see less of")
    block: str = setting("", "intents whose items are left out")
    strength: float = setting(
        1.0, "how far the item with most of --more or --less moves", unit="deviations", low=0
    )
    json: bool = setting(False, "print JSON for programs")
    device: str = setting("auto", "auto: a GPU if it is there", choices=("auto", "cpu", "cuda"))


# What is asked


def find_intents(rows, names):
    """Numbers of the intents that names mean: a number, a label, a part of labels, or a keyword.

    rows: of intents.jsonl; names: parted by semicolons, or by commas if there is none. What a
    language model judged to be no intent is not among them. Raises UserError with the nearest.
    """
    rows = [row for row in rows if row.get("is_intent", True)]
    separator = ";" if ";" in names else ","
    found = []
    for name in names.split(separator):
        name = name.strip().lower()
        hits = [row for row in rows if name in (str(row["intent"]), row["label"].lower())]
        hits = hits or [row for row in rows if name in row["label"].lower().split(", ")]
        hits = hits or [row for row in rows if name in map(str.lower, row["keywords"])]
        if not hits:
            raise UserError(f"there is no intent {name!r}; the nearest are: {near(name, rows)}")
        found += [row["intent"] for row in hits]
    return list(dict.fromkeys(found))


def near(name, rows):
    """The labels and keywords of intents that are nearest to a name -> str."""
    known = set()
    for row in rows:
        known.update([row["label"].lower(), *row["keywords"]])
    found = difflib.get_close_matches(name, sorted(known), 5, 0.5)
    return ", ".join(found) or "none is near; see intents.jsonl"


def items_by_title(data):
    """{title in lower case, with its year and without: item}; of equal titles the first counts."""
    known = {}
    for item, title in enumerate(data.titles[1:], 1):
        known.setdefault(title.lower(), item)
        known.setdefault(re.sub(r"\s*\(\d{4}\)$", "", title.lower()), item)
    return known


def find_titles(data, titles):
    """Numbers of the items with these titles -> list of 1..V. Raises UserError with the nearest."""
    known = items_by_title(data)
    found = []
    for title in titles:
        if title.lower() not in known:
            names = difflib.get_close_matches(title.lower(), known, 5, 0.4)
            shown = dict.fromkeys(data.titles[known[name]] for name in names)
            nearest = "; ".join(shown) or "none is near"
            raise UserError(f"there is no item titled {title!r}; the nearest are: {nearest}")
        found.append(known[title.lower()])
    return found


def find_ids(data, ids):
    """Numbers of the items with these ids -> list of 1..V. Raises UserError with the nearest."""
    known = {name: item for item, name in enumerate(data.items[1:], 1)}
    for name in ids:
        if name not in known:
            nearest = "; ".join(difflib.get_close_matches(name, known, 5, 0.4)) or "none is near"
            raise UserError(f"there is no item {name!r}; the nearest are: {nearest}")
    return [known[name] for name in ids]


def user_items(data, name):
    """All items of the user with that id, held-out ones too -> int32 [T]. Raises UserError."""
    if name not in data.users:
        found = difflib.get_close_matches(name, data.users, 5, 0.4) or data.users[:3]
        problem = f"there is no user {name!r} in {data.folder}"
        raise UserError(f"{problem}; the nearest are: {', '.join(found)}")
    user = data.users.index(name)
    return data.flat[data.start[user] : data.start[user + 1]]


def asked_history(settings, data):
    """The items that are taken as known, oldest first -> int32 [T]. Raises UserError."""
    options = (settings.user, settings.history, settings.history_titles)
    given = [value for value in options if value.strip()]
    if len(given) != 1:
        count = f", not {len(given)}" if given else ""
        raise UserError(f"give one of --user, --history and --history-titles{count}")
    if settings.user.strip():
        return user_items(data, settings.user)
    if settings.history.strip():
        items = find_ids(data, settings.history.split())
    else:
        titles = settings.history_titles.split(";")
        items = find_titles(data, [title.strip() for title in titles])
    return np.array(items, np.int32)


class Wishes(NamedTuple):
    """Numbers of the intents that the list is steered by."""

    more: list
    less: list
    block: list


def asked_wishes(settings, rows):
    """The intents that --more, --less and --block mean -> Wishes. Raises UserError."""
    wishes = []
    for names in (settings.more, settings.less, settings.block):
        found = find_intents(rows, names) if names else []
        wishes.append(found)
    return Wishes(*wishes)


# Steering


def intent_shift(codes, weight):
    """sum_j weight_j code_vj / max code_j -> float [V+1].

    codes: SparseRows [V+1, J]; weight: float [J], such as 1 for an intent that is asked for.
    """
    largest = torch.zeros_like(weight)
    largest.scatter_reduce_(0, codes.indices.long(), codes.values, "amax")
    return codes.weighted_sums((weight / largest.clamp_min(1e-12))[:, None])[:, 0]


def steer(scores, shift):
    """Scores [B, V+1] moved by shift [V+1] or [B, V+1] of their standard deviations -> [B, V+1].

    The padding item is left out of the deviation.
    """
    return scores + scores[:, 1:].std(1, keepdim=True) * shift


def wished_shift(codes, wishes, strength):
    """The shift of `steer` for --more and --less -> float [V+1].

    However many intents a word means, the item with most of them moves by `strength`.
    """
    shift = codes.values.new_zeros(len(codes.indptr) - 1)
    for intents, sign in ((wishes.more, 1), (wishes.less, -1)):
        weight = torch.zeros(codes.columns)
        weight[intents] = 1.0
        towards = intent_shift(codes, weight)
        shift += sign * strength * towards / towards.max().clamp_min(1e-12)
    return shift


def blocked_items(codes, wishes):
    """Items that carry an intent of --block -> int64 [any]."""
    rows = codes.transposed.gather(torch.tensor(wishes.block, dtype=torch.int64))
    return rows.indices.long()


# The answer


class Listed(NamedTuple):
    """A recommended item."""

    item: int  # 1..V
    score: float  # the model's own, which the reasons add up to
    steered: float  # what the list is ranked by
    rank_before: int  # its rank by the model's own score
    reasons: Reasons


class Answer(NamedTuple):
    history: np.ndarray  # int32 [T]
    personal: list  # of (intent, its strength or None, titles that evoke it), weightiest first
    public: list  # of intents
    listed: list  # of Listed
    cost: float  # what steering takes from the list's mean score


def best_first(scores, left_out):
    """Items in the order of their scores [V+1], without those left out, bool [V+1] -> list."""
    order = scores.argsort(descending=True, stable=True)
    return order[~left_out[order]].tolist()


def evoked_by(intent, history, codes, titles, decay):
    """Titles of the two items of a history, int32 [T], that carry an intent most -> list.

    decay: what a step back in time leaves of an item's code.
    """
    items, values = codes.transposed.row(intent)
    code = dict(zip(items.tolist(), values.tolist()))
    weights = []
    for age, item in enumerate(reversed(history.tolist())):
        weights.append((code.get(item, 0.0) * decay**age, -age, item))
    strongest = sorted(weights, reverse=True)[:2]
    return [titles[item] for weight, _, item in strongest if weight > 0]


def personal_intents(model, state, history, codes, titles):
    """The personal intents that a model shows -> list of (intent, strength or None, titles)."""
    read = history[-model.settings.history :]
    decay = 1.0  # of a model that attends to the whole history alike
    if state.r is not None:
        decay = model.settings.decay
    personal = []
    for intent in model.intents_shown(state).get("personal", torch.zeros(0)).tolist():
        strength = None if state.r is None else float(state.r[0, intent])
        personal.append((intent, strength, evoked_by(intent, read, codes, titles, decay)))
    return personal


@torch.no_grad()
def answer(model, codes, data, history, top, shift=0.0, left_out=()):
    """Recommend after a history, int32 [T] -> Answer.

    codes: SparseRows [V+1, J], or None for a model without intents; shift: as `steer` takes it, on
    the CPU; left_out: numbers of items besides those of the history.
    """
    state = history_state(model, history)
    own = model.scores(state, model.item_table())[0].cpu()  # (V+1,)
    steered = steer(own[None], shift)[0]
    out = torch.zeros(len(own), dtype=torch.bool)
    out[[0, *history.tolist(), *left_out]] = True
    before = best_first(own, out)
    rank = {item: place for place, item in enumerate(before, 1)}
    listed = []
    for item in best_first(steered, out)[:top]:
        reasons = model.reasons(state, item)
        listed.append(Listed(item, float(own[item]), float(steered[item]), rank[item], reasons))
    cost = sum(float(own[item]) for item in before[:top]) - sum(one.score for one in listed)
    personal = personal_intents(model, state, history, codes, data.titles)
    public = model.intents_shown(state).get("public", torch.zeros(0)).tolist()
    return Answer(history, personal, public, listed, cost / max(len(listed), 1))


def split_terms(reasons, count):
    """The `count` largest terms of a score -> ([(intent, value), ...], sum of the others)."""
    pairs = zip(reasons.intents.tolist(), reasons.terms.tolist())
    pairs = sorted(pairs, key=lambda pair: -abs(pair[1]))
    return pairs[:count], sum(value for _, value in pairs[count:])


def answer_json(told, data, labels, terms=3):
    """An Answer as `--json` prints it -> dict. A score is its parts, its terms and the rest."""
    listed = []
    for rank, one in enumerate(told.listed, 1):
        shown, rest = split_terms(one.reasons, terms)
        shown = [dict(intent=j, label=labels[j], value=value) for j, value in shown]
        row = dict(rank=rank, item=data.items[one.item], title=data.titles[one.item])
        row |= dict(score=one.score, parts=one.reasons.parts, terms=shown, rest=rest)
        listed.append(row | dict(rank_before=one.rank_before, steered=one.steered))
    personal = []
    for intent, strength, titles in told.personal:
        row = dict(intent=intent, label=labels[intent], strength=strength)
        personal.append(row | dict(evoked_by=titles))
    return dict(
        history=[dict(item=data.items[v], title=data.titles[v]) for v in told.history.tolist()],
        personal=personal,
        public=[dict(intent=intent, label=labels[intent]) for intent in told.public],
        recommendations=listed,
        cost=told.cost,
    )


def wish_lines(wishes, labels):
    """Lines that say which intents the words of --more, --less and --block were taken for."""
    for words, intents in zip(("more of", "less of", "without"), wishes):
        if intents:
            said = "; ".join(labels[intent] for intent in intents[:5])
            others = f" and {len(intents) - 5} more" if len(intents) > 5 else ""
            yield f"  {words}: {said}{others}"


def answer_lines(told, wishes, data, labels):
    """An Answer in lines for people."""
    steered = bool(wishes.more or wishes.less)
    yield "history: " + "; ".join(data.titles[item] for item in told.history[-8:])
    for intent, strength, titles in told.personal:
        amount = "" if strength is None else f" {strength:.2f}"
        source = f"  (from {'; '.join(titles)})" if titles else ""
        yield f"  personal intent{amount}  {labels[intent]}{source}"
    if told.public:
        public = "; ".join(labels[intent] for intent in told.public)
        yield f"  public intents (what most people's items share): {public}"
    yield from wish_lines(wishes, labels)
    for rank, one in enumerate(told.listed, 1):
        moved = steered and one.rank_before != rank
        was = f" (was {one.rank_before})" if moved else ""
        yield f"{rank:4} {data.titles[one.item]}{was}"
        yield f"       {one.score:.2f} = {reason_words(one.reasons, labels)}"
    if steered:
        yield f"steering costs {told.cost:.3f} of the list's mean score by the user's own scores"


def recommend(settings):
    """Recommend to a user, or after any history, with reasons; steer by intents."""
    folder = Path(settings.run)
    data = run_dataset(settings.run)
    model = load_model(folder, settings.model, data, pick_device(settings.device))
    history = asked_history(settings, data)
    wished = settings.more or settings.less
    if settings.strength != RecommendSettings.strength and not wished:
        raise UserError("--strength changes nothing without --more or --less: leave it out")
    rows = []
    codes = None
    if model.needs_intents or wished or settings.block:
        rows = read_intents(folder)
        codes = load_intents(folder, data).codes
    labels = [row["label"] for row in rows]
    wishes = asked_wishes(settings, rows)
    shift = wished_shift(codes, wishes, settings.strength) if wished else 0.0
    left_out = blocked_items(codes, wishes).tolist() if wishes.block else ()
    told = answer(model, codes, data, history, settings.top, shift, left_out)
    if settings.json:
        print(json.dumps(answer_json(told, data, labels), ensure_ascii=False))
    else:
        print(*answer_lines(told, wishes, data, labels), sep="\n")


def main(argv=None):
    return run_command(argv, __doc__, recommend=(RecommendSettings, recommend))


if __name__ == "__main__":
    sys.exit(main())
