"""Ask a run for recommendations with reasons, and steer them by intents.

    python tools/recommend.py --run runs/ml-100k --user 42
    python tools/recommend.py --run runs/ml-100k --history-titles "Star Wars; Alien" --top 3
    python tools/recommend.py --run runs/ml-100k --user 42 --more romance --less sci-fi
    python tools/recommend.py --run runs/ml-100k --user 42 --model saerec --json
    python tools/recommend.py --run runs/ml-100k --text "A comedy about robots" --user 42
    python tools/recommend.py --run runs/ml-100k --all-users --out lists.jsonl

A score is taken apart as its model allows: Grounded's into the item's id and a term per intent,
SAERec's into what the history, the personal and the public intents bring, SASRec's not at all.
Steering adds to the score of item v, for a set S of intents,
    strength * sd(scores) * w_v / max w        w_v = sum_(j in S) code_vj / max code_j
with a minus for --less: the item that has most of what is asked for moves by `strength` standard
deviations. That needs the items' codes alone, so every model of a run with intents can be steered.
A new text becomes an item of Grounded that has intents, but no id.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import (  # noqa: E402
    Progress, UserError, file_hash, option_name, pick_device, run_command, run_dataset, setting,
)  # fmt: skip

import numpy as np  # noqa: E402
import torch  # noqa: E402

from eval import history_state, load_model, read_intents, reason_words  # noqa: E402
from model import MODELS, Reasons, Rows, SASRec, State, pad_rows, states_after  # noqa: E402
from sae import load_intents  # noqa: E402
from tools.asked import (  # noqa: E402
    add_item, find_ids, find_intents, find_titles, text_code, text_rows, user_items,
)  # fmt: skip

TERMS = 3  # of a score that are shown, the largest
PARTS = {  # how a sentence calls the parts of scores
    "id": "its own pull (id)",
    "history": "your history as a whole",
    "personal": "the personal intents",
    "public": "the public intents",
}


@dataclasses.dataclass(frozen=True)
class RecommendSettings:
    run: str = setting("", "run folder", unit="path", example="runs/ml-100k")
    model: str = setting("grounded", "which of its models to ask", choices=tuple(MODELS))
    user: str = setting("", "id of a user in the data, all of whose items are taken as known")
    history: str = setting("", "or the ids of items, oldest first, as in 'i1 i7'")
    history_titles: str = setting("", "or their titles, as in 'Toy Story; GoldenEye'")
    text: str = setting("", "a text: which intents it has, and its place after a history")
    all_users: bool = setting(False, "ask for every user, into --out")
    out: str = setting(
        "", "file of --all-users, JSON lines: one on itself, then one per user; it is continued"
    )
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
    data: str = setting("", "dataset folder, if it moved since embed.py read it", unit="path")


def given_histories(s):
    """The options that were given and say what the history is -> list of str."""
    return [words for words in (s.user, s.history, s.history_titles) if words.strip()]


def check_options(s):
    """Refuse RecommendSettings that don't go together. Raises UserError."""
    count = len(given_histories(s)) + s.all_users
    if count > 1 or not (count or s.text.strip()):
        known = "--user, --history and --history-titles, or --all-users or --text"
        raise UserError(f"give one of {known}" + (f", not {count}" if count else ""))
    if s.all_users and not s.out:
        raise UserError("--out is missing: name a file for the lists, as in --out lists.jsonl")
    idle = {"out": "without --all-users"}
    if s.all_users:
        idle = dict.fromkeys(("text", "json"), "with --all-users")
    if not count:
        idle |= dict.fromkeys(("model", "top", "more", "less", "block"), "without a history")
    if not (s.more or s.less):
        idle["strength"] = "without --more or --less"
    for field in dataclasses.fields(s):
        if field.name in idle and getattr(s, field.name) != field.default:
            where = f"{option_name(field)} changes nothing {idle[field.name]}"
            raise UserError(f"{where}: leave it out")
    if s.text.strip() and s.model != "grounded":
        problem = f"--text is ranked by --model grounded alone, not {s.model}"
        raise UserError(f"{problem}, whose items are ids that a new one lacks")


# What is asked


def asked_history(settings, data):
    """The items that are taken as known, oldest first -> int32 [T]. Raises UserError."""
    if settings.user.strip():
        return user_items(data, settings.user.strip())
    if settings.history.strip():
        items = find_ids(data, settings.history.split())
    else:
        items = find_titles(data, settings.history_titles)
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
    return codes.mix((weight / largest.clamp_min(1e-12))[:, None])[:, 0]


def steer(scores, shift):
    """Scores [B, V+1] moved by shift [V+1] or [B, V+1] of their standard deviations -> [B, V+1].

    The padding item is left out of the deviation.
    """
    items = scores[:, 1:]
    return scores + items.std(1, correction=min(1, items.shape[1] - 1), keepdim=True) * shift


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
    rank: int
    score: float  # the model's own, which the reasons add up to
    steered: float  # what the list is ranked by
    rank_before: int  # its rank by the model's own score
    reasons: Reasons
    evoked: dict  # {intent: titles that evoke it}, of the terms that are shown or told


class Answer(NamedTuple):
    history: np.ndarray  # int32 [T]
    personal: list  # of (intent, its strength or None, titles that evoke it), weightiest first
    public: list  # of intents
    listed: list  # of Listed
    cost: float  # what steering takes from the list's mean score, 0 or more


def best_first(scores, left_out):
    """Items in the order of their scores [V+1], without those left out, bool [V+1] -> list."""
    order = scores.argsort(descending=True, stable=True)
    return order[~left_out[order]].tolist()


def evoked_by(intent, history, codes, titles, decay):
    """Titles of the items of a history, int32 [T], that carry an intent most -> list.

    They are two at most, the second if it has at least half of what the first has; a repeated item
    has the sum, as in equation (11). decay: what a step back in time leaves of an item's code.
    """
    items, values = codes.transposed.row(intent)
    code = dict(zip(items.tolist(), values.tolist()))
    weights = {}  # of items, the latest first
    for age, item in enumerate(reversed(history.tolist())):
        weights[item] = weights.get(item, 0.0) + code.get(item, 0.0) * decay**age
    strongest = sorted(weights, key=weights.get, reverse=True)[:2]
    enough = max(weights[strongest[0]] / 2, 1e-12)
    return list(dict.fromkeys(titles[item] for item in strongest if weights[item] >= enough))


@torch.no_grad()
def answer(model, codes, data, history, top, shift=0.0, left_out=(), always=()):
    """Recommend after a history, int32 [T] -> Answer.

    codes: SparseRows [V+1, J], or None for a model without intents; shift: as `steer` takes it, on
    the CPU; left_out: numbers of items besides those of the history; always: of items that are
    listed whatever their rank.
    """
    state = history_state(model, history)
    own = model.scores(state, model.item_table())[0].cpu()  # (V+1,)
    steered = steer(own[None], shift)[0]
    out = torch.zeros(len(own), dtype=torch.bool)
    out[[0, *history.tolist()]] = True
    before = best_first(own, out)
    rank_before = {item: place for place, item in enumerate(before, 1)}
    out[list(left_out)] = True
    read = history[-model.settings.history :]
    # A model that attends to the whole history alike fades nothing
    decay = 1.0 if state.r is None else model.settings.decay

    def sources(intent):
        return evoked_by(intent, read, codes, data.titles, decay)

    listed = []
    for rank, item in enumerate(best_first(steered, out), 1):
        if rank <= top or item in always:
            scores = float(own[item]), float(steered[item])
            reasons = model.reasons(state, item)
            told = [*split_terms(reasons, TERMS)[0], *gains(reasons)]
            evoked = {intent: sources(intent) for intent, _ in told}
            listed.append(Listed(item, rank, *scores, rank_before[item], reasons, evoked))
    best = [one.score for one in listed[:top]]
    could = own[before[: len(best)]].tolist()  # as many, unsteered
    cost = (math.fsum(could) - math.fsum(best)) / max(len(best), 1)
    shown = model.intents_shown(state)
    personal = []
    for intent in shown.get("personal", torch.zeros(0)).tolist():
        if state.r is None:  # SAERec asks by the last item's vector, whatever the history carries
            personal.append((intent, None, []))
        else:
            personal.append((intent, float(state.r[0, intent]), sources(intent)))
    public = shown.get("public", torch.zeros(0)).tolist()
    return Answer(history, personal, public, listed, cost)


def split_terms(reasons, count):
    """The `count` largest terms of a score -> ([(intent, value), ...], sum of the others)."""
    pairs = zip(reasons.intents.tolist(), reasons.terms.tolist())
    pairs = sorted(pairs, key=lambda pair: -abs(pair[1]))
    return pairs[:count], sum(value for _, value in pairs[count:])


def gains(reasons):
    """The largest terms that are positive, at most TERMS -> list of (intent, value)."""
    pairs = zip(reasons.intents.tolist(), reasons.terms.tolist())
    return sorted((pair for pair in pairs if pair[1] > 0), key=lambda pair: -pair[1])[:TERMS]


# In JSON


def reasons_json(reasons, labels):
    """What a score is made of, as a dict: it is the sum of its parts, its terms and the rest."""
    largest, rest = split_terms(reasons, TERMS)
    terms = [dict(intent=j, label=labels[j], value=value) for j, value in largest]
    return dict(parts=reasons.parts, terms=terms, rest=rest)


def answer_json(told, data, labels):
    """An Answer as `--json` prints it -> dict."""
    listed = []
    for one in told.listed:
        row = dict(rank=one.rank, item=data.items[one.item], title=data.titles[one.item])
        row |= dict(why=why(one, labels), score=one.score, **reasons_json(one.reasons, labels))
        for term in row["terms"]:
            term["evoked_by"] = one.evoked[term["intent"]]
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


# In sentences


def why(one, labels):
    """What brings at least a tenth of what speaks for a Listed item, as a sentence -> str.

    Of intents the largest ones, TERMS at most; first those that items of the history evoke. "" for
    a model that knows no reasons.
    """
    parts = one.reasons.parts
    if tuple(parts) == SASRec.part_names:
        return ""
    gain = sum(max(value, 0) for value in [*parts.values(), *one.reasons.terms.tolist()])
    shared = {}  # the titles that evoke intents -> their labels
    for intent, value in gains(one.reasons):
        if value >= gain / 10:
            shared.setdefault(tuple(one.evoked[intent]), []).append(f'"{labels[intent]}"')
    foreign = shared.pop((), [])
    said = []
    for titles, names in shared.items():
        share = "shares" if len(titles) == 1 else "share"
        said.append(f"because you took {listing(titles)}, which {share} {listing(names)}")
    if foreign:
        said.append(f"for {listing(foreign)}, which nothing that you took lately has")
    for name, value in sorted(parts.items(), key=lambda part: -part[1]):
        if value >= gain / 10 > 0:
            mostly = "mostly " if value >= gain / 2 else ""
            said.append(mostly + PARTS[name])
    if not said:
        return "Nothing in particular speaks for it"
    if one.score < 0:
        said.append("but more speaks against it")
    sentence = "; ".join(said)
    return sentence[0].upper() + sentence[1:]


def listing(names):
    """Names with commas and an `and` -> str."""
    *some, last = names
    return f"{', '.join(some)} and {last}" if some else last


def text_lines(rows):
    """Which intents a text has, in lines for people."""
    yield "the text's intents, by activation:" if rows else "the text has none of the intents"
    for row in rows:
        yield f"  {row['activation']:5.2f}  {row['label']}"


def wish_lines(wishes, labels):
    """Lines that say which intents the words of --more, --less and --block were taken for."""
    for words, intents in zip(("more of", "less of", "without"), wishes):
        if intents:
            said = "; ".join(labels[intent] for intent in intents[:5])
            others = f" and {len(intents) - 5} more" if len(intents) > 5 else ""
            yield f"  {words}: {said}{others}"


def clear_title(item, data):
    """An item's title -> str; with its id if others have the same."""
    title = data.titles[item]
    count = data.titles.count(title)
    return title if count == 1 else f"{title} (id {data.items[item]}, one of {count} so titled)"


def answer_lines(told, wishes, data, labels):
    """An Answer in lines for people."""
    steered = any(wishes)
    earlier = len(told.history[:-8])
    shown = "; ".join(clear_title(item, data) for item in told.history[-8:])
    yield "history: " + (f"{earlier} earlier; " if earlier else "") + shown
    for intent, strength, titles in told.personal:
        kind = "attends to" if strength is None else f"personal intent {strength:.2f}"
        source = f"  (from {'; '.join(titles)})" if titles else ""
        yield f"  {kind}  {labels[intent]}{source}"
    if told.public:
        public = "; ".join(labels[intent] for intent in told.public)
        yield f"  public intents (what most histories come near to): {public}"
    yield from wish_lines(wishes, labels)
    sentences = [why(one, labels) for one in told.listed]
    if not sentences:
        yield "nothing is left to recommend"
    elif not sentences[0]:
        yield "  no reasons: all that this model knows is the history as a whole"
    for one, sentence in zip(told.listed, sentences):
        moved = steered and one.rank_before != one.rank
        was = f" (was {one.rank_before})" if moved else ""
        yield f"{one.rank:4} {data.titles[one.item]}{was}"
        if sentence:
            yield f"       {sentence}"
        yield f"       {one.score:.2f} = {reason_words(one.reasons, labels, TERMS)}"
    if steered:
        yield f"steering costs {told.cost:.3f} of the list's mean score by the user's own scores"


# Lists of all users


def lists_header(settings, data):
    """The first line of a file of lists: what they are made from -> bytes.

    Lists of anything else have another, so that no file is gone on with that holds them.
    """
    folder = Path(settings.run)
    wishes = ("model", "top", "more", "less", "block", "strength")
    header = dict(dataset=data.hash) | {name: getattr(settings, name) for name in wishes}
    paths = [folder / f"{settings.model}.safetensors", folder / "intents.jsonl"]
    header["made_from"] = {path.name: file_hash(path) for path in paths if path.is_file()}
    return json.dumps(header).encode() + b"\n"


def open_lists(path, header, users):
    """Open a file of lists to go on with it -> (file, users whose list it has).

    users: the ids of all. A last line that was half written when the disk or the user stopped it
    goes. Raises UserError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = open(path, "a+b")
    file.seek(0)
    if not header.startswith(file.readline(len(header))):
        file.close()
        problem = f"{path} holds something else than lists of this model, data, --top and wishes"
        raise UserError(f"{problem}: name another --out, or delete it")
    file.seek(0)
    lines = size = 0
    for line in file:
        if line.endswith(b"\n"):
            last = line
            lines += 1
            size += len(line)
    done = max(lines - 1, 0)
    if done > len(users) or (done and not last.startswith(list_start(users[done - 1]))):
        file.close()
        problem = f"{path} does not have one list of each user, in the order of the data"
        raise UserError(f"{problem}: name another --out, or delete it")
    file.truncate(size)
    if not lines:
        file.write(header)
    return file, done


@torch.no_grad()
def best_of_users(model, table, data, users, top, shift, left_out):
    """The best items after the whole history of each user -> lists of (item, score, Reasons).

    table: the model's items [V+1, D]; users: int64 [B]; shift, left_out: as for `answer`.
    """
    start = torch.from_numpy(data.start)
    end = start[users + 1]
    begin = torch.maximum(start[users], end - model.settings.history)
    rows = Rows(begin, end - begin)
    flat = torch.from_numpy(data.flat)
    _, items, _ = pad_rows(rows, torch.arange(len(users)), flat)  # (B, T)
    state = states_after(model, table, items.long(), rows.length)
    own = model.scores(state, table)  # (B, V+1)
    steered = steer(own, torch.as_tensor(shift, device=own.device))
    seen = [flat[start[user] : start[user + 1]].long() for user in users]
    seen = torch.nn.utils.rnn.pad_sequence(seen, batch_first=True).to(own.device)
    steered.scatter_(1, seen, -torch.inf)
    steered[:, [0, *left_out]] = -torch.inf
    best = steered.topk(min(top, steered.shape[1]))
    for row in range(len(users)):
        one = one_state(state, row)
        kept = best.indices[row, best.values[row] > -torch.inf]
        scores = own[row, kept].tolist()
        yield [(v, score, model.reasons(one, v)) for v, score in zip(kept.tolist(), scores)]


def one_state(state, row):
    """One position of a State, P = 1."""
    at = slice(row, row + 1)
    personal = None if state.personal is None else state.personal[at]
    r = None if state.r is None else state.r[at]
    return State(state.u[at], state.parts[:, at], personal, r)


def list_start(user):
    """How the line of a user's list begins -> bytes; user: the id."""
    return json.dumps(dict(user=user)).encode()[:-1]


def list_line(user, best, data, labels):
    """A line of a file of lists -> bytes; user: the id; best: list of (item, score, Reasons)."""
    items = []
    for item, score, reasons in best:
        row = dict(item=data.items[item], score=score)
        items.append(row | reasons_json(reasons, labels))
    return json.dumps(dict(user=user, items=items)).encode() + b"\n"


def write_lists(settings, model, data, labels, shift, left_out):
    """Write or go on with the lists of all users, a JSON line each. Raises UserError."""
    path = Path(settings.out)
    file, done = open_lists(path, lists_header(settings, data), data.users)
    users = torch.arange(done, len(data.users))
    with file:
        if not len(users):
            print(f"{path} is finished: {done:,} users")
            return
        if done:
            print(f"{path}: going on after {done:,} users")
        table = model.item_table().detach()
        progress = Progress(len(users), "users")
        # Few users at a time, so that memory is bounded and little is lost
        for some in users.split(max(min(2**23 // len(data.items), 256), 1)):
            found = best_of_users(model, table, data, some, settings.top, shift, left_out)
            for user, best in zip(some.tolist(), found):
                file.write(list_line(data.users[user], best, data, labels))
            file.flush()
            progress.show(int(some[-1]) + 1 - done)
    print(f"{path}: {len(data.users):,} users")


def say(settings, told, lines):
    """Print an answer: told, a dict, for programs, or lines for people."""
    if settings.json:
        print(json.dumps(told))  # ASCII, which every terminal and pipe can write
    else:
        print(*lines, sep="\n")


def recommend(settings):
    """Recommend to a user, or after any history, with reasons; steer by intents."""
    check_options(settings)
    folder = Path(settings.run)
    data = run_dataset(settings.run, settings.data)
    device = pick_device(settings.device)
    # Before a text becomes an item, which no history can hold
    history = asked_history(settings, data) if given_histories(settings) else None
    text = []
    if settings.text.strip():
        code = text_code(folder, settings.text, data, device)
        text = text_rows(code, read_intents(folder))
        if history is None:
            say(settings, dict(text=text), text_lines(text))
            return
    model = load_model(folder, settings.model, data, device)
    wished = settings.more or settings.less
    rows = []
    codes = None
    if model.needs_intents or wished or settings.block:
        rows = read_intents(folder)
        codes = load_intents(folder, data).codes
    labels = [row["label"] for row in rows]
    always = []
    if settings.text.strip():
        data = add_item(model, code, data)
        codes = model.codes.to("cpu")
        always = [len(data.items) - 1]
    wishes = asked_wishes(settings, rows)
    shift = wished_shift(codes, wishes, settings.strength) if wished else 0.0
    left_out = blocked_items(codes, wishes).tolist() if wishes.block else []
    if settings.all_users:
        write_lists(settings, model, data, labels, shift, left_out)
        return
    told = answer(model, codes, data, history, settings.top, shift, left_out, always)
    lines = list(answer_lines(told, wishes, data, labels))
    row = answer_json(told, data, labels)
    if always:
        lines = [*text_lines(text), *lines]
        row |= dict(text=text)
        if always[0] in left_out:
            lines.append("the new item is left out: it has an intent of --block")
    say(settings, row, lines)


def main(argv=None):
    return run_command(argv, __doc__, recommend=(RecommendSettings, recommend))


if __name__ == "__main__":
    sys.exit(main())
