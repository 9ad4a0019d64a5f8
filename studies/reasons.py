"""Are the reasons true? Take away what is shown as a reason: does what it explains go with it?

    python studies/reasons.py --run runs/ml-100k          -> runs/ml-100k/reasons.json

The TOP best items of users drawn by the seed, after validation histories: test is scored once.
Of Grounded, whose scores are sums of a term per intent,
deletion    an item's score without its largest terms, beside as many random ones of its own, and
            those whose intents matter most to the most popular item
insertion   the id's part and the largest terms alone, beside random ones
back        how many terms it takes until the item is back where it was
history     "because you took X": the history without the item that evokes an item's largest term,
            beside a random one that lacks the intent, and the one that lacks it nearest to X; in
            equation (11) the others keep their age
older       the same where X is older than that
of SAERec, whose scores are sums of three parts,
parts       u without a part, beside u without a random direction as long
replaced    both branches attend to the absent intent in place of theirs, or to random ones: b and
            c are made of h_t too, so that a part is not what the intents alone bring
history     whether the first personal intent stays without the item that evokes it, as above
and of both
steering    "more of an intent", as tools/recommend.py's --more at strength 1: the shares of the
            list that carry the other intents, beside asking for as many random items as strongly
"""

import dataclasses
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import (  # noqa: E402
    Progress, UserError, generator, run_command, run_dataset, setting, target_ranks,
)  # fmt: skip

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch.nn.utils.rnn import pad_sequence  # noqa: E402

from eval import load_model  # noqa: E402
from model import SAERec, SASRec, State, states_after  # noqa: E402
from sae import SparseRows, load_intents  # noqa: E402
from studies.significance import permutation_test, write_result  # noqa: E402

TOP = 10  # items of a list
STEPS = (1, 2, 3, 5)  # terms taken out, or kept
CELLS = 2**22  # scores of listed items at a time
DELETED = ("largest", "random", "most popular item's")
INSERTED = DELETED[:2]
REPLACED = ("no intents", "random intents")
TAKEN = ("the item that evokes it", "a random item without it", "the nearest without it")


@dataclasses.dataclass(frozen=True)
class ReasonsSettings:
    """Measure whether the reasons that a run's models give are true."""

    run: str = setting("", "run folder", unit="path", example="runs/ml-100k")
    users: int = setting(500, "users whose lists are taken apart, drawn by the seed", low=2)
    seed: int = setting(0, "seed of every random choice", low=0, high=2**31 - 1)
    data: str = setting("", "dataset folder, if it moved since embed.py read it", unit="path")
    out: str = setting("", "where to write a copy of RUN/reasons.json", unit="path")


# What is recommended


class Asked(NamedTuple):
    """A model, and what is the same for all users."""

    model: SASRec
    codes: SparseRows  # [V+1, J]
    table: torch.Tensor  # float32 [V+1, D]
    popular: int  # the item of most training interactions


class Lists(NamedTuple):
    """What is recommended to B users: n = B x TOP listed items."""

    histories: list  # of int32 [any], oldest first
    seen: torch.Tensor  # int64 [B, any], padded with 0 at least once
    state: State  # P = B
    scores: torch.Tensor  # float32 [B, V+1]
    user: torch.Tensor  # int64 [n], 0..B-1
    item: torch.Tensor  # int64 [n]

    def unseen(self, scores):
        """Scores [B, V+1], those of padding and of the histories' items -inf."""
        return scores.scatter(1, self.seen, -torch.inf)

    def ranks(self, scores):
        """Ranks of the listed items by each user's scores [B, V+1] -> float64 [n]; 1 is best."""
        return target_ranks(scores[self.user], self.item, self.seen[self.user])


def state_after(asked, histories):
    """The State after each history, int32 [any], of which the model reads the end."""
    longest = asked.model.settings.history
    read = [torch.from_numpy(history[-longest:]).long() for history in histories]
    length = torch.tensor([len(items) for items in read])
    return states_after(asked.model, asked.table, pad_sequence(read, batch_first=True), length)


def recommended(asked, histories):
    """The Lists after some histories, int32 [any]; each leaves TOP items or more."""
    seen = [torch.from_numpy(history).long() for history in histories]
    seen = F.pad(pad_sequence(seen, batch_first=True), (0, 1))
    state = state_after(asked, histories)
    scores = asked.model.scores(state, asked.table)
    best = scores.scatter(1, seen, -torch.inf).topk(TOP).indices
    user = torch.arange(len(best)).repeat_interleave(TOP)
    return Lists(histories, seen, state, scores, user, best.flatten())


# Grounded: deletion and insertion


def score_terms(model, u, r, item):
    """What intents bring to the scores of items, int64 [n], after states u [n, D], r [n, J].

    -> (terms float32 [n, J], 0 where an item lacks the intent; carried, bool [n, J])
    """
    code = model.codes.gather(item).dense()
    return code * (u @ model.intent_table().T + model.match_weights(r)), code > 0


def running_sums(terms, key):
    """Sums of no term, of the first, of the first two, ... -> [n, J+1].

    terms: [n, J], of each item; key: [n, J], highest first; -inf for what is never summed.
    """
    order = key.argsort(dim=1, descending=True, stable=True)
    summed = terms.masked_fill(key == -torch.inf, 0)
    return F.pad(summed.gather(1, order).cumsum(1), (1, 0))


def changed_ranks(lists, changed):
    """Rank of each listed item among its user's scores, were its own changed [n, S] -> [n, S].

    As in `target_ranks`, ties count against the item; float64.
    """
    scores = lists.unseen(lists.scores)
    ordered = scores.sort(1).values[lists.user]  # (n, V+1)
    ahead = ordered.shape[1] - torch.searchsorted(ordered, changed.contiguous())
    itself = scores[lists.user, lists.item][:, None] >= changed
    return (1 + ahead - itself.long()).double()


def terms_needed(lists, sums, count):
    """How many terms bring each listed item back to its rank -> float64 [n].

    sums: [n, J+1], the score with so many terms; count: int64 [n], with all, which is its own.
    """
    scores = lists.unseen(lists.scores)
    own = scores[lists.user, lists.item][:, None]
    ordered = scores.sort(1).values[lists.user]  # (n, V+1)
    below = ordered.gather(1, torch.searchsorted(ordered, own) - 1)  # the next lower score
    all_there = torch.arange(sums.shape[1]) >= count[:, None]  # whatever rounding says
    return ((sums > below) | all_there).int().argmax(1).double()


def term_ranks(asked, lists, random):
    """Deletion and insertion -> {"terms": dict of tensors over the n listed items}.

    In it, ("deletion" or "insertion", name): ranks [n, 1 + len(STEPS)], with 0 and STEPS terms
    taken out or kept; ("removed", name): how many of them the item has; ("back", name): the terms
    needed [n].
    """
    u = lists.state.u[lists.user]
    r = lists.state.r[lists.user]
    terms, carried = score_terms(asked.model, u, r, lists.item)
    popular = torch.full_like(lists.item, asked.popular)
    theirs, they_carry = score_terms(asked.model, u, r, popular)
    drawn = torch.rand(terms.shape, generator=random)
    keys = [one.masked_fill(~carried, -torch.inf) for one in (terms, drawn)]
    keys.append(theirs.masked_fill(~they_carry, -torch.inf))
    own = lists.scores[lists.user, lists.item][:, None]
    only_id = (asked.model.item.weight[lists.item] * u).sum(1, keepdim=True)
    steps = torch.tensor((0, *STEPS)).clamp(max=terms.shape[1])
    count = carried.sum(1)
    found = dict(user=lists.user, count=count, before=lists.ranks(lists.scores))
    for name, key in zip(DELETED, keys):
        sums = running_sums(terms, key)
        found["removed", name] = running_sums(carried.float(), key)[:, steps]
        found["deletion", name] = changed_ranks(lists, own - sums[:, steps])
        if name in INSERTED:
            found["insertion", name] = changed_ranks(lists, only_id + sums[:, steps])
            found["back", name] = terms_needed(lists, only_id + sums, count)
    return dict(terms=found)


# Grounded: because you took X


def evoking_places(intent, read, codes, decay, random):
    """Places in a history of the item that evokes an intent, and of two items that lack it.

    read: int32 [T], newest first; decay: what a step back leaves of a code. -> [the strongest
    carrier, a random item that lacks it, the one nearest to the carrier]; [] where no item carries
    the intent, the carrier alone where every one does.
    """
    carriers, values = codes.transposed.row(intent)
    code = torch.zeros(len(codes.indptr) - 1)
    code[carriers] = values
    code = code[torch.from_numpy(read).long()]  # (T,)
    if not code.any():
        return []
    evoking = int((code * decay ** torch.arange(len(code))).argmax())
    lacking = (code == 0).nonzero()[:, 0]
    if not len(lacking):
        return [evoking]
    drawn = lacking[torch.randint(len(lacking), (), generator=random)]
    nearest = lacking[(lacking - evoking).abs().argmin()]
    return [evoking, int(drawn), int(nearest)]


def items_to_take(asked, lists, place, intent, decay, random):
    """Items of the history of listed items, int64 [m] of n, that show what evokes an intent each.

    intent: int64 [m]; decay as above. -> (evoked, bool [m]: whether the history has a carrier;
    tested, int64 [t] of m: those that have all of TAKEN; items and their steps back, [3, t] each)
    """
    found = []
    for one, wanted in zip(place.tolist(), intent.tolist()):
        history = lists.histories[lists.user[one]]
        read = history[-asked.model.settings.history :][::-1].copy()
        places = evoking_places(wanted, read, asked.codes, decay, random)
        found.append((places, read[places].tolist()))
    evoked = torch.tensor([len(places) > 0 for places, _ in found], dtype=torch.bool)
    tested = [one for one, (places, _) in enumerate(found) if len(places) == len(TAKEN)]
    steps, items = (torch.tensor([found[one][at] for one in tested]) for at in (0, 1))
    columns = (cells.view(-1, len(TAKEN)).T for cells in (items, steps))
    return evoked, torch.tensor(tested, dtype=torch.int64), *columns


def without_items(asked, lists, place, items):
    """(State, ranks) of listed items, int64 [m] of n, once an item each leaves the history.

    items: int64 [m]. They leave it wherever it has them, and stay out of the ranking. Where a state
    has r, what is older does not move up in it: else an item that lacks an intent would raise the
    intent's term by leaving, if it is newer than those that carry it.
    """
    user = lists.user[place]
    pairs = [(lists.histories[one], item) for one, item in zip(user.tolist(), items.tolist())]
    state = state_after(asked, [history[history != item] for history, item in pairs])
    if state.r is not None:
        blank = [np.where(history == item, 0, history) for history, item in pairs]
        state = state._replace(r=state_after(asked, blank).r)
    scores = asked.model.scores(state, asked.table)
    return state, target_ranks(scores, lists.item[place], lists.seen[user])


def changes_without(asked, lists, shown, wanted, decay, random, measure):
    """What becomes of listed items without an item of the history that evokes an intent -> dict.

    shown: int64 [m] of n, the listed items; wanted: int64 [m], an intent of each; measure: a
    function of the State without the item, and of places int64 [t] of n -> {measure: [t]}.
    {"pointed": of each listed item shown, whether the history evokes its intent; "history": of
    those that can be tested, if there are any, a dict of (name, measure): [t]}
    """
    evoked, tested, taken, steps = items_to_take(asked, lists, shown, wanted, decay, random)
    pointed = dict(user=lists.user[shown], evoked=evoked)
    if not len(tested):
        return dict(pointed=pointed)
    place = shown[tested]
    rank_before = lists.ranks(lists.scores)[place]
    changes = dict(user=lists.user[place])
    for name, items, age in zip(TAKEN, taken, steps):
        state, rank = without_items(asked, lists, place, items)
        measures = measure(state, place) | dict(steps=age) | rank_measures(rank, rank_before)
        for what, values in measures.items():
            changes[name, what] = values
    return dict(pointed=pointed, history=changes)


def history_changes(asked, lists, random):
    """What becomes of a listed item and its largest term, see `changes_without`."""
    model = asked.model
    terms, _ = score_terms(model, lists.state.u[lists.user], lists.state.r[lists.user], lists.item)
    largest, intent = terms.max(1)
    shown = (largest > 0).nonzero()[:, 0]

    def measure(state, place):
        terms, _ = score_terms(model, state.u, state.r, lists.item[place])
        change = terms.gather(1, intent[place, None])[:, 0] / largest[place] - 1
        return dict(shrinks=change < 0, change=change)

    decay = model.settings.decay
    return changes_without(asked, lists, shown, intent[shown], decay, random, measure)


# SAERec: parts


def part_ranks(asked, lists, random):
    """Ranks of listed items where u lacks a part, or a random direction as long -> dict.

    {"parts": of (part, "part" or "random"): ranks [n]; of (part, "length"): |part| / |u|, [n]; of
    (part, "cosine"): that of part and u. A part along u leaves the order of the items as it is.}
    """
    u = lists.state.u
    found = dict(user=lists.user, before=lists.ranks(lists.scores))
    for name, part in zip(asked.model.part_names, lists.state.parts):
        direction = F.normalize(torch.randn(part.shape, generator=random), dim=1)
        length = part.norm(dim=1, keepdim=True)
        for kind, taken in (("part", part), ("random", length * direction)):
            scores = asked.model.scores(lists.state._replace(u=u - taken), asked.table)
            found[name, kind] = lists.ranks(scores)
        found[name, "length"] = (length / u.norm(dim=1, keepdim=True))[lists.user, 0]
        found[name, "cosine"] = F.cosine_similarity(part, u)[lists.user]
    return dict(parts=found)


def replaced_ranks(asked, lists, random):
    """Ranks of listed items where other intents stand in place of SAERec's own -> dict.

    {"replaced": of (one of REPLACED, measure): as of `rank_measures`, [n].}
    """
    absent = asked.codes.columns  # J, see SAERec.add_parameters
    s = asked.model.settings
    personal = (len(lists.histories), s.personal)
    chosen = {
        REPLACED[0]: (torch.full(personal, absent), torch.full((s.public,), absent)),
        REPLACED[1]: (
            torch.randint(absent, personal, generator=random),
            torch.randint(absent, (s.public,), generator=random),
        ),
    }
    before = lists.ranks(lists.scores)
    found = dict(user=lists.user)
    for name, (own, of_all) in chosen.items():
        with (
            mock.patch.object(asked.model, "personal_intents", return_value=own),
            mock.patch.object(asked.model, "public_intents", return_value=of_all),
        ):
            state = state_after(asked, lists.histories)
        ranks = lists.ranks(asked.model.scores(state, asked.table))
        measures = rank_measures(ranks, before)
        found |= {(name, measure): values for measure, values in measures.items()}
    return dict(replaced=found)


def personal_changes(asked, lists, random):
    """What becomes of SAERec's first personal intent, see `changes_without`; no code fades."""
    first = lists.state.personal[lists.user, 0]
    shown = (first < asked.codes.columns).nonzero()[:, 0]

    def measure(state, place):
        return dict(stays=(state.personal == first[place, None]).any(1))

    return changes_without(asked, lists, shown, first[shown], 1.0, random, measure)


# Both: steering


def shares(codes, scores):
    """The share of each user's list that carries each intent -> float [B, J].

    scores: [B, V+1], -inf for what can't be listed.
    """
    best = scores.topk(TOP).indices
    carried = codes.gather(best.flatten()).dense() > 0
    return carried.view(*best.shape, -1).float().mean(1)


def steering_changes(asked, lists, random):
    """What a list is made of once more of an intent is asked for -> {"steering": dict of [B]}.

    Each user asks for an intent drawn among those that any item carries; beside that, items drawn
    at random move as far as its carriers do.
    """
    users = torch.arange(len(lists.scores))
    carried = asked.codes.column_counts().nonzero()[:, 0]
    intent = carried[torch.randint(len(carried), (len(users),), generator=random)]
    towards = asked.codes.transposed.gather(intent).dense()  # (B, V+1)
    towards /= towards.max(1, keepdim=True).values
    elsewhere = torch.rand(len(users), towards.shape[1] - 1, generator=random).argsort(1) + 1
    wishes = {
        "an intent": towards,
        "random items": F.pad(towards[:, 1:], (1, 0)).scatter(1, elsewhere, towards[:, 1:]),
    }
    spread = lists.scores[:, 1:].std(1, keepdim=True)
    before = shares(asked.codes, lists.unseen(lists.scores))
    others = torch.ones_like(before).scatter(1, intent[:, None], 0)
    found = dict(user=users)
    for name, shift in wishes.items():
        scores = lists.scores + spread * shift
        after = shares(asked.codes, lists.unseen(scores))
        change = (after - before).abs() * others
        there = (torch.maximum(before, after) * others > 0).sum(1)
        kept = (lists.ranks(scores) <= TOP).view(-1, TOP).double().mean(1)
        found[name, "asked before"] = before[users, intent]
        found[name, "asked after"] = after[users, intent]
        found[name, "kept"] = kept
        found[name, "others"] = change.sum(1) / there.clamp(min=1)
        found[name, "largest other"] = change.max(1).values
    return dict(steering=found)


# All users


def per_user(user, values):
    """Mean of the values [n] of each user, by number [n], that has any -> float64 [users]."""
    user = user.astype(np.int64)
    count = np.bincount(user)
    return np.bincount(user, values)[count > 0] / count[count > 0]


def compared(measures, seed, **more):
    """Rows of what is compared, a dict each: its name, `more`, and of each measure a dict.

    measures: name -> measure -> float64 [users], of the same users. Mean, standard error over
    users, and p of the paired test against the first name.
    """
    rows = []
    first = next(iter(measures))
    for name, own in measures.items():
        row = dict(name=name, users=len(next(iter(own.values())))) | more
        for measure, values in own.items():
            error = values.std(ddof=min(1, len(values) - 1)) / len(values) ** 0.5
            row[measure] = dict(mean=float(values.mean()), error=float(error), p=None)
            if name != first:
                row[measure]["p"] = permutation_test(measures[first][measure] - values, seed)
        rows.append(row)
    return rows


def rank_measures(rank, before):
    """Of ranks after a change and before it: reciprocal, how far down, still in the list or not."""
    return dict(reciprocal=1 / rank, fall=rank - before, kept=rank <= TOP)


def of_users(user, measures):
    """`per_user` of each measure -> dict."""
    return {name: per_user(user, values) for name, values in measures.items()}


def term_rows(found, seed):
    """Rows of deletion, insertion and back, of items with more terms than are taken.

    Rows of 0 terms taken out are what is before; of 0 terms kept, the id alone.
    """
    rows = dict(deletion=[], insertion=[], back=[])
    for column, terms in enumerate((0, *STEPS)):
        more = found["count"] > max(terms, 1)
        if not more.any():
            break
        user = found["user"][more]
        for kind, names in (("deletion", DELETED), ("insertion", INSERTED)):
            measures = {}
            for name in names:
                own = rank_measures(found[kind, name][more, column], found["before"][more])
                own["removed"] = found["removed", name][more, column]
                measures[name] = of_users(user, own)
            rows[kind] += compared(measures, seed, terms=terms, items=len(user))
        if not terms:
            measures = {}
            for name in INSERTED:
                needed = dict(needed=found["back", name][more], of=found["count"][more])
                measures[name] = of_users(user, needed)
            rows["back"] = compared(measures, seed, items=len(user))
    return rows


def named_rows(found, seed):
    """Rows of a dict whose keys are (name, measure)."""
    measures = {}
    for name, measure in [key for key in found if key != "user"]:
        own = measures.setdefault(name, {})
        own[measure] = per_user(found["user"], found[name, measure])
    return compared(measures, seed, items=len(found["user"]))


def part_rows(found, seed):
    """Rows of each part of SAERec, and of the random direction beside it."""
    rows = []
    for part in SAERec.part_names:
        measures = {}
        for name in ("part", "random"):
            own = rank_measures(found[part, name], found["before"])
            own |= {measure: found[part, measure] for measure in ("length", "cosine")}
            measures[name] = of_users(found["user"], own)
        rows += compared(measures, seed, part=part)
    return rows


def collect(asked, histories, measures, seed):
    """Measure lists of some users at a time -> {kind: {key: float64 array over all users}}."""
    random = generator(seed, "reasons")
    size = max(CELLS // (TOP * len(asked.table)), 1)
    progress = Progress(len(histories), "user")
    found = {}
    for begin in range(0, len(histories), size):
        lists = recommended(asked, histories[begin : begin + size])
        for measure in measures:
            for kind, values in measure(asked, lists, random).items():
                values["user"] = values["user"] + begin
                found.setdefault(kind, []).append(values)
        progress.show(min(begin + size, len(histories)))
    joined = {}
    for kind, parts in found.items():
        joined[kind] = {}
        for key in parts[0]:
            joined[kind][key] = torch.cat([one[key] for one in parts]).double().numpy()
    return joined


def history_rows(found, seed):
    """Rows on items of the history: the share of reasons that have one, and what they do.

    Of all that can be tested, and of those whose item is older than the nearest that lacks the
    intent: the last items of a history matter much to a model, whatever they carry.
    """
    rows = dict(evoked=[], history=[], older=[])
    pointed = found["pointed"]
    if len(pointed["user"]):
        evoked = {"all": dict(evoked=per_user(pointed["user"], pointed["evoked"]))}
        rows["evoked"] = compared(evoked, seed, items=len(pointed["user"]))
    if "history" in found:
        changes = found["history"]
        rows["history"] = named_rows(changes, seed)
        older = changes[TAKEN[0], "steps"] > changes[TAKEN[2], "steps"]
        if older.any():
            fewer = {key: values[older] for key, values in changes.items()}
            rows["older"] = named_rows(fewer, seed)
    return rows


def grounded_report(asked, histories, seed):
    """Everything about Grounded's reasons -> dict of rows."""
    measures = (term_ranks, history_changes, steering_changes)
    found = collect(asked, histories, measures, seed)
    rows = term_rows(found["terms"], seed) | history_rows(found, seed)
    return rows | dict(steering=named_rows(found["steering"], seed))


def saerec_report(asked, histories, seed):
    """Everything about SAERec's reasons -> dict of rows."""
    measures = (part_ranks, personal_changes, steering_changes, replaced_ranks)
    found = collect(asked, histories, measures, seed)
    rows = dict(parts=part_rows(found["parts"], seed))
    rows |= dict(replaced=named_rows(found["replaced"], seed)) | history_rows(found, seed)
    return rows | dict(steering=named_rows(found["steering"], seed))


REPORTS = {"grounded": grounded_report, "saerec": saerec_report}


# The report


def drawn_histories(data, users, seed):
    """Validation histories of users drawn by the seed that leave TOP items -> list of int32 [any].

    Raises UserError if there are not two.
    """
    found = []
    for user in torch.randperm(len(data.users), generator=generator(seed, "users")).tolist():
        history = data.history(user, "valid")
        if len(data.items) - 1 - len(set(history.tolist())) >= TOP and len(found) < users:
            found.append(history)
    if len(found) < 2:
        problem = f"{data.folder}: fewer than two users have {TOP} items left to recommend"
        raise UserError(f"{problem}: bring more items")
    return found


@torch.no_grad()
def reasons(settings):
    """Measure whether the reasons that a run's models give are true. Raises UserError."""
    folder = Path(settings.run)
    data = run_dataset(folder, settings.data)
    found = [name for name in REPORTS if (folder / f"{name}.safetensors").is_file()]
    if not found:
        problem = f"{folder} has neither {' nor '.join(REPORTS)}"
        raise UserError(f"{problem}: make one with `model.py --run {folder}`")
    codes = load_intents(folder, data).codes
    popular = int(np.bincount(data.training_items()).argmax())
    histories = drawn_histories(data, settings.users, settings.seed)
    report = dict(dataset=data.folder.name, users=len(histories), seed=settings.seed)
    for name in REPORTS:
        if name not in found:
            print(f"{name}.safetensors is not there: {name} is left out")
            continue
        model = load_model(folder, name, data)
        asked = Asked(model, codes, model.item_table(), popular)
        report[name] = REPORTS[name](asked, histories, settings.seed)
        print(*report_lines(name, report[name]), sep="\n")
    write_result(folder, "reasons", report, settings.out)


def report_lines(model, kinds):
    """Rows of a model in lines for people: means, standard errors, p."""
    for kind, rows in kinds.items():
        yield f"{model}, {kind}"
        for row in rows:
            words = []
            for name, value in row.items():
                if isinstance(value, dict):
                    p = "" if value["p"] is None else f" (p = {value['p']:.2g})"
                    words.append(f"{name} {value['mean']:.3f} ±{value['error']:.3f}{p}")
                else:
                    words.append(f"{name} {value}" if name != "name" else f"  {value}:")
            yield "  ".join(words)


def main(argv=None):
    return run_command(argv, __doc__, reasons=(ReasonsSettings, reasons))


if __name__ == "__main__":
    sys.exit(main())
