"""Reasons put to the test on models whose truth is known, and counted by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
import saerec
from conftest import copy_run, write_folder
from eval import load_model
from model import State
from sae import SparseRows, load_intents
from studies import reasons
from tools import recommend


def sparse(rows, columns):
    """SparseRows of a list of {column: value}, a row each."""
    bounds = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
    columns_of = torch.tensor([one for row in rows for one in row], dtype=torch.int32)
    values = torch.tensor([float(row[one]) for row in rows for one in row])
    return SparseRows(bounds, columns_of, values, columns)


def sum_model(ids, codes, worth, match=0.0):
    """A model of width 1 whose score is its item's id and code x worth of each of its intents."""
    weight = torch.tensor([0.0, *ids])[:, None]
    return SimpleNamespace(
        codes=sparse([{}, *codes], len(worth)),
        item=SimpleNamespace(weight=weight),
        intent_table=lambda: torch.tensor(worth)[:, None],
        match_weights=lambda r: match * r,
        settings=SimpleNamespace(match=match, history=50, decay=0.5),
    )


def sum_lists(model, items, history=(), users=1):
    """Lists of users whose u is 1, with these listed items for each."""
    scores = model.item.weight[:, 0] + model.codes.dense() @ model.intent_table()[:, 0]
    state = State(torch.ones(users, 1), None, r=torch.zeros(users, model.codes.columns))
    return reasons.Lists(
        histories=[np.array(history, np.int32)] * users,
        seen=torch.tensor([[*history, 0]]).repeat(users, 1),
        state=state,
        scores=scores.repeat(users, 1),
        user=torch.arange(users).repeat_interleave(len(items)),
        item=torch.tensor(items * users),
    )


IDS = [1.0, 6.0, 5.2, 3.0, 2.0, 0.5]
CODES = [{0: 2, 1: 1, 2: 0.5}, {}, {}, {1: 3}, {}, {}]
WORTH = [2.0, 2.0, 0.5]  # item 1 has 1 + 4 + 2 + .25; 4 has 3 + 6, and item 1's second intent


def term_ranks(lists, model, popular=4):
    random = torch.Generator().manual_seed(0)
    asked = reasons.Asked(model, model.codes, model.item.weight, popular)
    return reasons.term_ranks(asked, lists, random)["terms"]


def test_deletion_counted_by_hand():
    """Item 1 has 7.25 beside 6, 5.2, 9, 2, .5 and is second; without 4 it has 3.25, then 1.25."""
    model = sum_model(IDS, CODES, WORTH)
    got = term_ranks(sum_lists(model, [1]), model)
    assert got["before"].tolist() == [2] and got["count"].tolist() == [3]
    assert got["deletion", "largest"][0, :3].tolist() == [2, 4, 5]
    assert got["removed", "largest"][0, :4].tolist() == [0, 1, 2, 3]
    # The most popular item's intent is worth 2 to item 1: 5.25 is above 5.2, below 6 and 9
    assert got["deletion", "most popular item's"][0, :4].tolist() == [2, 3, 3, 3]
    assert got["removed", "most popular item's"][0, :4].tolist() == [0, 1, 1, 1]


def test_items_of_the_history_are_no_rivals():
    model = sum_model(IDS, CODES, WORTH)
    got = term_ranks(sum_lists(model, [1], history=(4, 2)), model)
    assert got["deletion", "largest"][0, :3].tolist() == [1, 2, 3]


def test_insertion_counted_by_hand():
    """The id alone has 1: above .5. With 4 it has 5, with 6 it has 7 and is back at its place."""
    model = sum_model(IDS, CODES, WORTH)
    got = term_ranks(sum_lists(model, [1]), model)
    assert got["insertion", "largest"][0, :4].tolist() == [5, 4, 2, 2]
    assert got["back", "largest"].tolist() == [2]
    assert got["insertion", "random"][0, [0, 3]].tolist() == [5, 2]
    assert 2 <= got["back", "random"].item() <= 3
    # An item whose id is enough needs no term
    model = sum_model([9.5, *IDS[1:]], CODES, WORTH)
    assert term_ranks(sum_lists(model, [1]), model)["back", "largest"].tolist() == [0]


def test_what_ties_counts_against_the_item():
    model = sum_model([1.0, 3.0], [{0: 4, 1: 2}, {}], [1.0, 1.0])
    got = term_ranks(sum_lists(model, [1]), model, popular=2)
    assert got["deletion", "largest"][0, :3].tolist() == [1, 2, 2]  # 7, 3, 1 beside 3


def test_random_terms_are_drawn_evenly():
    """Of four terms one lifts the item: one drawn at random is it in a quarter of the cases."""
    model = sum_model([0.0, 1.0], [{0: 9, 1: 1, 2: 1, 3: 1}, {}], [1.0, 0.0, 0.0, 0.0])
    got = term_ranks(sum_lists(model, [1], users=2000), model, popular=2)
    assert (got["deletion", "largest"][:, 1] == 2).all()
    drawn = got["deletion", "random"]
    assert (drawn[:, 1] == 2).double().mean().item() == pytest.approx(1 / 4, abs=0.04)
    assert (drawn[:, 2] == 2).double().mean().item() == pytest.approx(2 / 4, abs=0.04)
    # Terms of no worth: a control that does nothing
    assert (got["deletion", "most popular item's"] == 1).all()
    model = sum_model([2.0, 1.0], [{0: 9, 1: 1}, {}], [0.0, 0.0])
    got = term_ranks(sum_lists(model, [1], users=9), model, popular=2)
    for name in reasons.DELETED:
        assert (got["deletion", name] == 1).all()


def asked_of(run, name="grounded"):
    """(Asked, Dataset) of a finished run."""
    data = saerec.run_dataset(run)
    model = load_model(run, name, data)
    return reasons.Asked(model, load_intents(run, data).codes, model.item_table(), 1), data


@torch.no_grad()
def test_the_score_is_the_id_part_and_its_intent_terms(tiny_run):
    """And terms of many items at once are those that a user is shown of each."""
    asked, data = asked_of(tiny_run)
    model = asked.model
    for user in range(5):
        state = evaluation.history_state(model, data.history(user, "test"))
        scores = model.scores(state, asked.table)[0]
        every = torch.arange(len(data.items))
        r = state.r.repeat(len(every), 1)
        terms, carried = reasons.score_terms(model, state.u.repeat(len(every), 1), r, every)
        for item in every[1:].tolist():
            shown = model.reasons(state, item)
            intents = shown.intents.tolist()
            assert sorted(set(intents)) == carried[item].nonzero()[:, 0].tolist()
            assert shown.terms.tolist() == sorted(shown.terms.tolist(), reverse=True)
            total = sum(shown.parts.values()) + float(shown.terms.sum())
            assert total == pytest.approx(float(scores[item]), abs=1e-5)
            torch.testing.assert_close(terms[item, shown.intents], shown.terms)
            assert terms[item].sum().item() == pytest.approx(shown.terms.sum().item(), abs=1e-5)


@torch.no_grad()
def test_lists_and_deletion_are_those_of_one_user_at_a_time(tiny_run):
    asked, data = asked_of(tiny_run)
    model = asked.model
    histories = [data.history(user, "valid") for user in range(6)]
    lists = reasons.recommended(asked, histories)
    got = reasons.term_ranks(asked, lists, torch.Generator().manual_seed(0))["terms"]
    for user, history in enumerate(histories):
        state = evaluation.history_state(model, history)
        listed = evaluation.recommend(model, state, history, reasons.TOP)
        mine = lists.user == user
        assert lists.item[mine].tolist() == [item for item, _, _ in listed]
        scores = model.scores(state, asked.table)[0]
        scores[[0, *history]] = -torch.inf
        for place, (item, score, shown) in zip(mine.nonzero()[:, 0].tolist(), listed):
            if len(shown.terms) > 1:
                lowered = score - float(shown.terms[0])
                ahead = [v for v, s in enumerate(scores.tolist()) if s > lowered and v != item]
                assert got["deletion", "largest"][place, 1] == 1 + len(ahead)


def test_the_item_that_evokes_an_intent_is_the_one_that_people_are_told(tiny_run):
    asked, data = asked_of(tiny_run)
    random = torch.Generator().manual_seed(0)
    titles = [str(item) for item in range(len(data.items))]
    told = 0
    for user in range(len(data.users)):
        history = data.history(user, "valid")
        newest_first = history[::-1].copy()
        for intent in range(asked.codes.columns):
            named = recommend.evoked_by(intent, history, asked.codes, titles, 0.9)
            got = reasons.evoking_places(intent, newest_first, asked.codes, 0.9, random)
            assert bool(named) == bool(got)
            if named:
                told += 1
                assert titles[newest_first[got[0]]] == named[0]
    assert told > 50


def test_who_evokes_and_who_lacks_by_hand():
    """Newest first, items 1 2 3 1 4 5: 2 carries most, but what 1 has is fresher."""
    codes = sparse([{}, {0: 0.8}, {0: 1.0}, {1: 1.0}, {1: 2.0}, {}], 2)
    random = torch.Generator().manual_seed(0)
    read = np.array([1, 2, 3, 1, 4, 5], np.int32)
    assert reasons.evoking_places(0, read, codes, 0.5, random)[0] == 0
    drawn = set()
    for _ in range(50):
        evoking, lacking, nearest = reasons.evoking_places(0, read, codes, 1.0, random)
        assert evoking == 1 and nearest == 2
        drawn.add(lacking)
    assert drawn == {2, 4, 5}
    assert reasons.evoking_places(1, read[:2].copy(), codes, 0.5, random) == []
    assert reasons.evoking_places(0, read[:2].copy(), codes, 0.5, random) == [0]


@pytest.fixture
def alone(tiny_run):
    """A Grounded of whose items 3 and 7 carry intent 0, and 1, 2, 8 and, a little, 7 intent 1."""
    asked, data = asked_of(tiny_run)
    rows = [{} for _ in data.items]
    rows[3] = {0: 1.0}
    rows[7] = {0: 1.0, 1: 0.1}
    rows[8] = {1: 0.2}
    rows[1] = rows[2] = {1: 1.0}
    codes = sparse(rows, asked.codes.columns)
    asked.model.codes = codes
    asked.model.idf.fill_(1.0)
    return asked._replace(codes=codes, table=asked.model.item_table().detach())


@torch.no_grad()
def test_without_the_item_that_alone_evokes_an_intent(alone):
    history = np.array([1, 3, 2, 3], np.int32)
    lists = reasons.recommended(alone, [history])
    assert lists.state.r[0, 0] > 0
    lists = lists._replace(user=torch.zeros(1).long(), item=torch.tensor([7]))
    place = torch.tensor([0])
    state, rank = reasons.without_items(alone, lists, place, torch.tensor([3]))
    assert state.r[0, 0] == 0 and state.r[0, 1] > 0
    shorter = evaluation.history_state(alone.model, np.array([1, 2], np.int32))
    torch.testing.assert_close(state.u, shorter.u)
    scores = alone.model.scores(shorter, alone.table)[0]
    scores[[0, 1, 2, 3]] = -torch.inf  # 3 left the history, but is not recommended again
    assert rank.tolist() == [1 + int((scores > scores[7]).sum())]
    # The control: another item leaves, and what the intent has is as it was
    kept, _ = reasons.without_items(alone, lists, place, torch.tensor([2]))
    assert kept.r[0, 0] > 0 and kept.r[0, 1] < lists.state.r[0, 1]


@torch.no_grad()
def test_reasons_shrink_where_scores_are_the_match_alone(alone):
    """Without trained vectors a term is m r_j code_vj: it ends with the one item that evokes it."""
    for vectors in (alone.model.item.weight, alone.model.intent_vectors):
        vectors.zero_()
    alone = alone._replace(table=alone.model.item_table())
    histories = [np.array([1, 3, 2], np.int32), np.array([1, 2], np.int32)]
    lists = reasons.recommended(alone, histories)
    assert lists.item[:2].tolist() == [7, 8]  # nothing else has a score
    found = reasons.history_changes(alone, lists, torch.Generator().manual_seed(0))
    assert found["pointed"]["user"].tolist() == [0, 0, 1, 1] and found["pointed"]["evoked"].all()
    changes = found["history"]
    assert changes["user"].tolist() == [0, 0]  # all of the other history carries the intent
    carrier, drawn, nearest = reasons.TAKEN
    # 7 is listed for .5 x .9 of intent 0 and .5 x 1.81 x .1 of intent 1, 8 for .5 x 1.81 x .2.
    # Without 3 they have .5 x 1.81 x .1 and .5 x 1.81 x .2; without 2, the newest, 7's largest is
    # what it was, for 3 is still a step back
    assert changes[carrier, "shrinks"].tolist() == [True, True]
    assert changes[carrier, "change"][0] == -1 and changes[carrier, "fall"].tolist() == [1, 0]
    assert changes[carrier, "steps"].tolist() == [1, 0]  # 2 is the newest that has intent 1
    assert changes[nearest, "steps"].tolist() == [0, 1]
    assert changes[nearest, "change"].tolist() == [0, 0]
    assert not changes[nearest, "shrinks"].any() and not changes[drawn, "shrinks"].any()
    assert changes[nearest, "fall"].tolist() == [0, -1]  # without 3, 8 is before 7


@torch.no_grad()
def test_saerecs_first_personal_intent_without_an_item(tiny_run):
    """All of it again, a user and an item at a time, by eval.py's own functions."""
    asked, data = asked_of(tiny_run, "saerec")
    histories = [data.history(user, "valid") for user in range(len(data.users))]
    lists = reasons.recommended(asked, histories)
    found = reasons.personal_changes(asked, lists, torch.Generator().manual_seed(0))
    changes = found["history"]
    decided = 0
    for user in sorted(set(changes["user"].tolist())):
        history = histories[user]
        first = int(evaluation.history_state(asked.model, history).personal[0, 0])
        read = history[-asked.model.settings.history :]
        weights = dict(zip(*(cells.tolist() for cells in asked.codes.transposed.row(first))))
        carrier = max(read[::-1], key=lambda item: weights.get(int(item), 0.0))
        state = evaluation.history_state(asked.model, history[history != carrier])
        stays = bool((state.personal[0] == first).any())
        mine = changes["user"] == user
        name = reasons.TAKEN[0]
        assert changes[name, "stays"][mine].tolist() == [stays] * reasons.TOP
        scores = asked.model.scores(state, asked.table)[0]
        scores[[0, *history]] = -torch.inf
        items = lists.item[lists.user == user]
        ranks = [1 + int((scores > scores[item]).sum()) for item in items]
        fall = [rank - place for place, rank in enumerate(ranks, 1)]
        assert changes[name, "fall"][mine].tolist() == fall
        decided += 1
    assert decided > 3


def test_parts_that_do_nothing_and_that_do_all():
    """Of a u of (2, 0): nothing, all of it, and what decides between two items."""
    table = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.5, 0.0], [0.2, 0.0]])
    parts = torch.tensor([[[0.0, 0.0]], [[2.0, 0.0]], [[1.0, 0.0]]])
    model = SimpleNamespace(
        part_names=("nothing", "all", "half"), scores=lambda state, table: state.u @ table.T
    )
    u = torch.tensor([[2.0, 0.0]])
    lists = reasons.Lists(
        histories=None,
        seen=torch.tensor([[0]]),
        state=State(u, parts),
        scores=u @ table.T,
        user=torch.zeros(2).long(),
        item=torch.tensor([1, 2]),
    )
    asked = reasons.Asked(model, None, table, 1)
    got = reasons.part_ranks(asked, lists, torch.Generator().manual_seed(0))["parts"]
    assert got["before"].tolist() == [1, 2]
    for kind in ("part", "random"):
        assert got["nothing", kind].tolist() == [1, 2]  # a random direction without length
    assert got["all", "part"].tolist() == [3, 3]  # all tie at 0, which counts against
    assert got["half", "part"].tolist() == [1, 2]  # along u: shorter, in the same order
    lengths = [got[name, "length"][0].item() for name in model.part_names]
    assert lengths == pytest.approx([0, 1, 0.5])
    assert got["half", "cosine"].tolist() == pytest.approx([1, 1])


@torch.no_grad()
def test_saerec_with_other_intents_is_its_own_guide_with_them(tiny_run):
    """The branches are called by hand; to attend to no intents is to attend to vectors of zeros."""
    data = saerec.run_dataset(tiny_run)
    net = load_model(tiny_run, "saerec", data)
    codes = load_intents(tiny_run, data).codes
    asked = reasons.Asked(net, codes, net.item_table(), 1)
    histories = [data.history(user, "valid") for user in range(6)]
    lists = reasons.recommended(asked, histories)
    found = reasons.replaced_ranks(asked, lists, torch.Generator().manual_seed(0))["replaced"]
    random = torch.Generator().manual_seed(0)
    s = net.settings
    sizes = ((6, s.personal), (s.public,))
    drawn = [torch.randint(codes.columns, size, generator=random) for size in sizes]
    for user, history in enumerate(histories):
        items = torch.from_numpy(history[-s.history :]).long()[None]
        h = net.embed(net.item_table()[items])[0]
        a = net.trunk(h[None])[0, -1:]
        z = net.project(net.d)
        nothing = z[-1:].expand(len(z), -1)
        some = torch.tensor([[0]])
        for name, vectors, personal, public in (
            ("no intents", nothing, some, some),
            ("random intents", z, drawn[0][user : user + 1], drawn[1][None]),
        ):
            b = net.personal_branch(h[-1:], vectors, personal)
            c = net.public_branch(h[-1:], vectors, public)
            scores = net.fuse(a, b, c).sum(0) @ asked.table.T
            own = lists.user == user
            seen = torch.from_numpy(history).long()[None]
            expected = [
                float(saerec.target_ranks(scores, lists.item[place, None], seen))
                for place in own.nonzero()[:, 0].tolist()
            ]
            got = found[name, "fall"][own] + lists.ranks(lists.scores)[own]
            assert got.tolist() == expected
            assert found[name, "kept"][own].tolist() == [rank <= reasons.TOP for rank in expected]


@torch.no_grad()
def test_steering_is_what_people_ask_for(tiny_run):
    """The shares after a wish are those of the list that tools/recommend.py makes of it."""
    asked, data = asked_of(tiny_run)
    histories = [data.history(user, "valid") for user in range(6)]
    lists = reasons.recommended(asked, histories)
    found = reasons.steering_changes(asked, lists, torch.Generator().manual_seed(0))["steering"]
    random = torch.Generator().manual_seed(0)
    carried = [j for j in range(asked.codes.columns) if len(asked.codes.transposed.row(j)[0])]
    asked_for = torch.tensor(carried)[torch.randint(len(carried), (6,), generator=random)]
    carries = asked.codes.dense() > 0  # (V+1, J)
    for user, intent in enumerate(asked_for.tolist()):
        weight = torch.zeros(asked.codes.columns)
        weight[intent] = 1.0
        shift = recommend.intent_shift(asked.codes, weight)
        lists_of = []
        for strength in (0.0, 1.0):
            history = histories[user]
            told = recommend.answer(
                asked.model, asked.codes, data, history, reasons.TOP, strength * shift
            )
            lists_of.append([one.item for one in told.listed])
        before, after = (carries[items].float().mean(0) for items in lists_of)
        change = (after - before).abs()
        others = [j for j in range(len(change)) if j != intent and before[j] + after[j] > 0]
        assert found["an intent", "asked before"][user] == before[intent]
        assert found["an intent", "asked after"][user] == after[intent]
        same = len(set(lists_of[0]) & set(lists_of[1])) / reasons.TOP
        assert found["an intent", "kept"][user].item() == pytest.approx(same)
        mean = change[others].mean().item()
        assert found["an intent", "others"][user].item() == pytest.approx(mean, abs=1e-6)
        largest = change[others].max().item()
        assert found["an intent", "largest other"][user].item() == pytest.approx(largest)


def test_random_items_move_as_far_as_the_carriers():
    """Intent 0 is all that there is: its two carriers move by 1 and .5, and so do two at random."""
    codes = sparse([{}, *[{}] * 10, {0: 2.0}, {0: 1.0}], 1)
    state = State(torch.zeros(400, 1), None)
    lists = reasons.Lists(
        histories=None,
        seen=torch.zeros(400, 1).long(),
        state=state,
        scores=torch.tensor([0.0, *range(12, 0, -1)]).repeat(400, 1),
        user=torch.arange(400).repeat_interleave(10),
        item=torch.arange(1, 11).repeat(400),
    )
    asked = reasons.Asked(None, codes, None, 1)
    got = reasons.steering_changes(asked, lists, torch.Generator().manual_seed(0))["steering"]
    assert (got["an intent", "asked before"] == 0).all()
    # A standard deviation is 3.6: item 11 has 2 + 3.6 and enters, 12 has 1 + 1.8, below 10's 3
    assert got["an intent", "asked after"].tolist() == pytest.approx([0.1] * 400)
    # Of items drawn at random it is 11 or 12 now and then: 12 must be drawn to move by 1
    entered = got["random items", "asked after"].mean().item()
    assert 0 < entered < 0.05
    assert (got["an intent", "others"] == 0).all()  # there is no other intent


def test_users_count_alike_however_many_items_they_have():
    user = np.array([0.0, 0.0, 0.0, 3.0])
    assert reasons.per_user(user, np.array([1.0, 2.0, 6.0, 5.0])).tolist() == [3.0, 5.0]


def test_rows_by_hand():
    first = dict(fall=np.array([1.0, 3.0]))
    second = dict(fall=np.array([1.0, 3.0]))
    one, two = reasons.compared({"a": first, "b": second}, 0, terms=2)
    assert one == dict(name="a", users=2, terms=2, fall=dict(mean=2.0, error=1.0, p=None))
    assert two["fall"] == dict(mean=2.0, error=1.0, p=1.0)  # a control that is the same
    many = reasons.compared({"a": dict(fall=np.ones(50)), "b": dict(fall=np.zeros(50))}, 0)
    assert many[1]["fall"]["p"] < 0.001
    nobody = dict(user=np.zeros(0), evoked=np.zeros(0))
    assert reasons.history_rows(dict(pointed=nobody), 0) == dict(
        evoked=[], history=[], older=[]
    )
    single = reasons.compared({"a": dict(fall=np.ones(1))}, 0)
    assert single[0]["fall"]["error"] == 0
    assert reasons.rank_measures(np.array([20.0]), np.array([2.0])) == dict(
        reciprocal=0.05, fall=18, kept=False
    )


def test_items_that_are_older_than_their_control_are_told_apart():
    """Of three cases the second has its X 4 steps back, and the nearest other item 3."""
    found = dict(user=np.array([0.0, 0.0, 1.0]))
    for name, steps, fall in zip(reasons.TAKEN, ([0, 4, 1], [9, 9, 9], [1, 3, 2]), (5, 6, 7)):
        found[name, "steps"] = np.array(steps, float)
        found[name, "fall"] = fall + np.array([0.0, 10.0, 20.0])
    pointed = dict(user=np.array([0.0, 0.0, 1.0, 1.0]), evoked=np.array([1.0, 1.0, 1.0, 0.0]))
    rows = reasons.history_rows(dict(pointed=pointed, history=found), 0)
    assert rows["evoked"][0]["evoked"]["mean"] == 0.75
    assert [row["fall"]["mean"] for row in rows["history"]] == [17.5, 18.5, 19.5]
    assert [row["fall"]["mean"] for row in rows["older"]] == [15, 16, 17]
    assert {row["items"] for row in rows["older"]} == {1}
    for name in reasons.TAKEN:
        found[name, "steps"][:] = 1.0
    assert reasons.history_rows(dict(pointed=pointed, history=found), 0)["older"] == []


def test_terms_count_for_items_that_have_more_of_them():
    """With three terms there are rows for none, one and two of them."""
    model = sum_model(IDS, CODES, WORTH)
    found = term_ranks(sum_lists(model, [1, 4]), model)  # 4 has a single term
    rows = reasons.term_rows({key: value.double().numpy() for key, value in found.items()}, 0)
    assert [row["terms"] for row in rows["deletion"]] == [0] * 3 + [1] * 3 + [2] * 3
    assert [row["terms"] for row in rows["insertion"]] == [0, 0, 1, 1, 2, 2]
    assert {row["items"] for row in rows["deletion"]} == {1}
    assert [rows["deletion"][at]["fall"]["mean"] for at in (0, 3)] == [0, 2]  # from 2 to 4
    assert [row["needed"]["mean"] for row in rows["back"]][0] == 2
    none = {key: value[1:].double().numpy() for key, value in found.items()}
    assert reasons.term_rows(none, 0) == dict(deletion=[], insertion=[], back=[])


@pytest.fixture(scope="module")
def measured(tiny_run, tmp_path_factory):
    """(run, report) of the tiny run."""
    run = copy_run(tiny_run, tmp_path_factory.mktemp("reasons") / "run")
    assert reasons.main(["--run", str(run), "--users", "9"]) == 0
    return run, json.loads((run / "reasons.json").read_text())


def test_reasons_writes_what_it_measured(measured, tmp_path, capsys):
    run, report = measured
    copy = tmp_path / "copy.json"
    assert reasons.main(["--run", str(run), "--users", "9", "--out", str(copy)]) == 0
    out = capsys.readouterr().out
    assert json.loads(copy.read_text()) | dict(command="") == report | dict(command="")
    assert report["dataset"] == "tiny" and report["users"] == 9
    kinds = {"deletion", "insertion", "back", "evoked", "history", "older", "steering"}
    assert set(report["grounded"]) == kinds and set(report["saerec"]) == {
        "parts", "replaced", "evoked", "history", "older", "steering",
    }  # fmt: skip
    for model in ("grounded", "saerec"):
        for kind, rows in report[model].items():
            assert f"{model}, {kind}" in out
            assert rows or kind == "older"
            for row in rows:
                assert 0 < row["users"] <= 9 and row["name"] in out
    deletion = report["grounded"]["deletion"]
    by_terms = {row["name"]: row for row in deletion if row["terms"] == 1}
    assert by_terms["largest"]["fall"]["mean"] >= by_terms["random"]["fall"]["mean"]
    back = {row["name"]: row["needed"]["mean"] for row in report["grounded"]["back"]}
    assert back["largest"] <= back["random"]


@pytest.mark.parametrize("flags", ["--users 8", "--seed 1"])
def test_every_setting_changes_what_is_measured(measured, tmp_path, flags):
    run = copy_run(measured[0], tmp_path / "run")
    assert reasons.main(["--run", str(run), "--users", "9", *flags.split()]) == 0
    report = json.loads((run / "reasons.json").read_text())
    assert report["grounded"] != measured[1]["grounded"]


def test_how_many_users_at_a_time_changes_nothing(measured, tmp_path, monkeypatch):
    run = copy_run(measured[0], tmp_path / "run")
    monkeypatch.setattr(reasons, "CELLS", 2 * reasons.TOP * 31)
    assert reasons.main(["--run", str(run), "--users", "9"]) == 0
    few = json.loads((run / "reasons.json").read_text())
    firsts = dict(deletion="largest", insertion="largest", history=reasons.TAKEN[0])  # undrawn
    for kind, name in firsts.items():
        pairs = zip(few["grounded"][kind], measured[1]["grounded"][kind])
        for one, other in pairs:
            if one["name"] == name:
                assert one["fall"]["mean"] == pytest.approx(other["fall"]["mean"])


def test_data_that_moved(measured, tmp_path):
    run = copy_run(measured[0], tmp_path / "run")
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in saerec.run_dataset(run).folder.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    assert reasons.main(["--run", str(run), "--users", "2", "--data", str(moved)]) == 0
    assert json.loads((run / "reasons.json").read_text())["dataset"] == "moved"


def test_runs_without_models(tiny_run, tmp_path, fails, capsys):
    fails(reasons.main, [], "--run is missing")
    run = copy_run(tiny_run, tmp_path / "none", "[ei]*")
    fails(reasons.main, ["--run", run], "neither grounded nor saerec", f"model.py --run {run}")
    assert not (run / "reasons.json").exists()
    run = copy_run(tiny_run, tmp_path / "grounded", "[eig]*")
    assert reasons.main(["--run", str(run), "--users", "3"]) == 0
    assert "saerec.safetensors is not there" in capsys.readouterr().out
    assert "saerec" not in json.loads((run / "reasons.json").read_text())


def test_a_catalogue_without_ten_items_to_recommend(tmp_path):
    sequences = "".join(f"u{u} a b c d\n" for u in range(3))
    texts = "".join(json.dumps(dict(item=i, text=i)) + "\n" for i in "abcd")
    data = saerec.load_dataset(write_folder(tmp_path / "few", sequences, texts))
    with pytest.raises(saerec.UserError, match="fewer than two users have 10 items left"):
        reasons.drawn_histories(data, 5, 0)
