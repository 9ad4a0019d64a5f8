"""Asking for recommendations with reasons, and steering them."""

import json

import numpy as np
import pytest
import torch

import saerec
from conftest import copy_run, make_run
from eval import history_state, load_model, read_intents, recommend
from model import MODELS, Reasons, model_scores
from sae import SparseRows, load_intents
from tools import recommend as tool

# Item 1 carries intent 0, item 2 both, item 3 none
CODES = SparseRows(
    torch.tensor([0, 0, 1, 3, 3]), torch.tensor([0, 0, 1]).int(), torch.tensor([2.0, 1.0, 4.0]), 2
)


@pytest.fixture
def ask(tiny_run, capsys):
    """ask(*arguments): what `recommend --json` prints, parsed."""

    def run(*arguments, run=tiny_run):
        capsys.readouterr()
        command = ["--run", run, "--json", "--device", "cpu", *arguments]
        assert tool.main([str(word) for word in command]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def dense_codes(run):
    """The codes of a run's items -> float32 [V+1, J]."""
    return load_intents(run, saerec.run_dataset(run)).codes.dense()


# By hand


def test_the_shift_by_hand():
    """Item 1 has all that there is of intent 0; item 2 half of it, and all of intent 1."""
    one = tool.intent_shift(CODES, torch.tensor([1.0, 0.0]))
    assert one.tolist() == pytest.approx([0, 1, 0.5, 0])
    both = tool.intent_shift(CODES, torch.tensor([1.0, -2.0]))
    assert both.tolist() == pytest.approx([0, 1, 0.5 - 2, 0])


def test_steering_by_hand():
    """The scores 1, 3 and 5 deviate by 2; that of the padding item does not count."""
    scores = torch.tensor([[99.0, 1.0, 3.0, 5.0]])
    steered = tool.steer(scores, torch.tensor([0.0, 1.0, 0.5, 0.0]))
    assert steered.tolist() == [[99, 3, 4, 5]]


def test_wishes_by_hand():
    """Of intents 0 and 1 item 2 has most, 1.5: it moves by the strength, item 1 by its share."""
    more = tool.wished_shift(CODES, tool.Wishes([0, 1], [], []), 3.0)
    assert more.tolist() == pytest.approx([0, 2, 3, 0])
    both = tool.wished_shift(CODES, tool.Wishes([1], [0], []), 1.0)
    assert both.tolist() == pytest.approx([0, -1, 0.5, 0])
    assert tool.blocked_items(CODES, tool.Wishes([], [], [0])).tolist() == [1, 2]
    assert tool.blocked_items(CODES, tool.Wishes([], [], [1])).tolist() == [2]


def test_what_evokes_an_intent_by_hand():
    """Item 1's code 2 is two steps old, worth .5 by now; item 2's is 1; item 3 has none."""
    titles = ["", "one", "two", "three"]
    history = np.array([1, 3, 2], np.int32)
    assert tool.evoked_by(0, history, CODES, titles, 0.5) == ["two", "one"]
    assert tool.evoked_by(0, history, CODES, titles, 1.0) == ["one", "two"]
    assert tool.evoked_by(1, history, CODES, titles, 1.0) == ["two"]
    assert tool.evoked_by(0, history[1:2], CODES, titles, 1.0) == []


def test_the_largest_terms_by_hand():
    reasons = Reasons({"id": 1.0}, torch.tensor([7, 3, 5]), torch.tensor([0.5, 0.25, -2.0]))
    assert tool.split_terms(reasons, 2) == ([(5, -2.0), (7, 0.5)], 0.25)
    assert tool.split_terms(reasons, 3)[1] == 0


def test_intents_are_found_by_number_label_and_keyword():
    rows = [
        dict(intent=0, label="Space, orbit", keywords=["space", "orbit"]),
        dict(intent=1, label="recipes", keywords=["space", "oven"]),
    ]
    assert tool.find_intents(rows, "1") == [1]
    assert tool.find_intents(rows, "oven, orbit") == [1, 0]
    assert tool.find_intents(rows, "space") == [0]  # in a label, which goes before keywords
    assert tool.find_intents(rows, "space, orbit;RECIPES") == [0, 1]
    rows[0]["is_intent"] = False  # it has no items any more that could be asked for
    assert tool.find_intents(rows, "space") == [1]
    with pytest.raises(saerec.UserError, match="no intent '0'"):
        tool.find_intents(rows, "0")


# On a run


@pytest.mark.parametrize("name", MODELS)
def test_scores_are_the_models_and_split_exactly(name, ask, tiny_run):
    """The list after a user's whole history is what the model ranks; reasons add up to scores."""
    data = saerec.run_dataset(tiny_run)
    model = load_model(tiny_run, name, data)
    user = 5
    history = data.history(user, "test")
    scores = model_scores(model, data, "test")(torch.tensor([user]))[0].detach()
    scores[[0, *history.tolist()]] = -torch.inf
    best = scores.argsort(descending=True)[:6].tolist()
    ids = " ".join(data.items[v] for v in history)
    got = ask("--history", ids, "--top", 6, "--model", name)["recommendations"]
    assert [one["item"] for one in got] == [data.items[v] for v in best]
    assert [one["rank"] for one in got] == [one["rank_before"] for one in got] == [*range(1, 7)]
    told = recommend(model, history_state(model, history), history, 6)
    for one, item, (_, _, reasons) in zip(got, best, told, strict=True):
        assert one["score"] == one["steered"] == pytest.approx(scores[item].item(), abs=1e-5)
        whole = sum(one["parts"].values()) + sum(term["value"] for term in one["terms"])
        assert whole + one["rest"] == pytest.approx(one["score"], abs=1e-5)
        assert one["parts"] == reasons.parts
        assert {term["intent"] for term in one["terms"]} <= set(reasons.intents.tolist())
        sizes = [abs(term["value"]) for term in one["terms"]]
        assert sizes == sorted(sizes, reverse=True) and len(sizes) <= 3


def test_each_model_gives_the_reasons_that_it_has(ask):
    parts = {
        "grounded": ["id"], "saerec": ["history", "personal", "public"], "sasrec": ["history"]
    }  # fmt: skip
    for name, expected in parts.items():
        got = ask("--user", "u3", "--model", name)
        assert all(list(one["parts"]) == expected for one in got["recommendations"])
        assert any(one["terms"] for one in got["recommendations"]) == (name == "grounded")
        assert bool(got["public"]) == (name == "saerec")
        assert name != "sasrec" or not got["personal"]


@pytest.mark.parametrize("name", ["grounded", "saerec"])
def test_intents_shown_are_the_models(name, ask, tiny_run):
    """What evokes an intent is what carries it most, among the items that the model read."""
    data = saerec.run_dataset(tiny_run)
    labels = [row["label"] for row in read_intents(tiny_run)]
    codes = dense_codes(tiny_run)
    model = load_model(tiny_run, name, data)
    met = 0
    for user in range(3, 9):
        history = data.flat[data.start[user] : data.start[user + 1]]
        read = [data.titles[item] for item in history[-model.settings.history :]]
        state = history_state(model, history)
        shown = model.intents_shown(state)
        got = ask("--user", data.users[user], "--model", name)
        assert [one["intent"] for one in got["personal"]] == shown["personal"].tolist()
        assert [one["intent"] for one in got["public"]] == list(shown.get("public", []))
        for one in got["personal"] + got["public"]:
            assert one["label"] == labels[one["intent"]]
        for one in got["personal"]:
            decay = 0.9 if name == "grounded" else 1.0
            faded = {}
            for age, title in enumerate(reversed(read)):
                faded[title] = codes[data.titles.index(title), one["intent"]] * decay**age
            largest = sorted(faded, key=faded.get, reverse=True)[:2]  # the later of equal ones
            assert one["evoked_by"] == [title for title in largest if faded[title] > 0]
            strength = state.r[0, one["intent"]].item() if name == "grounded" else None
            assert one["strength"] == pytest.approx(strength)
            met += len(one["evoked_by"])
    assert met


def test_a_user_a_history_and_titles_ask_the_same(ask, tiny_run):
    data = saerec.run_dataset(tiny_run)
    items = data.flat[data.start[3] : data.start[4]].tolist()
    by_user = ask("--user", data.users[3])
    assert by_user == ask("--history", " ".join(data.items[v] for v in items))
    assert by_user == ask("--history-titles", "; ".join(data.titles[v].upper() for v in items))
    listed = {one["item"] for one in by_user["recommendations"]}
    assert not listed & {one["item"] for one in by_user["history"]}


def test_titles_are_found_without_their_year_and_the_first_of_equal_ones(tiny_run):
    class Two:
        titles = ["", "Solaris (1972)", "Solaris (2002)", "2001"]

    assert tool.find_titles(Two, ["solaris", "SOLARIS (2002)", "2001"]) == [1, 2, 3]


def densest(run):
    """The intent of a run that fires on most texts."""
    return max(read_intents(run), key=lambda row: row["density"])["intent"]


@pytest.mark.parametrize("name", MODELS)
def test_more_less_and_block(name, ask, tiny_run):
    intent = densest(tiny_run)
    data = saerec.run_dataset(tiny_run)
    having = {data.items[v] for v in dense_codes(tiny_run)[:, intent].nonzero()[:, 0]}
    share = {}
    for wish in ("", "--more", "--less", "--block"):
        flags = [wish, intent] if wish else []
        if wish in ("--more", "--less"):
            flags += ["--strength", 50]
        got = ask("--user", "u3", "--top", 5, "--model", name, *flags)["recommendations"]
        share[wish] = np.mean([one["item"] in having for one in got])
    assert share["--more"] >= share[""] >= share["--less"] and share["--block"] == 0
    assert share["--more"] > share["--less"]


def test_steered_scores_and_what_they_cost(ask, tiny_run):
    intent = densest(tiny_run)
    plain = ask("--user", "u3", "--top", 30)["recommendations"]
    order = [one["item"] for one in plain]
    scores = {one["item"]: one["score"] for one in plain}
    whole = ask("--user", "u3", "--top", 30, "--more", intent)
    for one in whole["recommendations"]:
        assert order[one["rank_before"] - 1] == one["item"]
        assert one["score"] == pytest.approx(scores[one["item"]])
    assert whole["cost"] == pytest.approx(0, abs=1e-6)  # the whole list: only its order changed
    few = ask("--user", "u3", "--top", 3, "--more", intent, "--strength", 50)
    mean = np.mean([one["score"] for one in few["recommendations"]])
    best = sorted(scores.values(), reverse=True)[:3]
    assert few["cost"] == pytest.approx(np.mean(best) - mean) and few["cost"] >= 0


def test_the_item_with_most_of_several_intents_moves_by_the_strength(ask, tiny_run):
    data = saerec.run_dataset(tiny_run)
    codes = dense_codes(tiny_run)
    first, second = [row["intent"] for row in read_intents(tiny_run)[:2]]
    wished = codes[:, [first, second]] / codes[:, [first, second]].amax(0)
    shift = wished.sum(1) / wished.sum(1).max()
    flags = ("--more", f"{first}, {second}", "--strength", 2)
    got = ask("--user", "u3", "--top", 30, *flags)["recommendations"]
    model = load_model(tiny_run, "grounded", data)
    history = data.flat[data.start[3] : data.start[4]]
    own = model.scores(history_state(model, history), model.item_table())[0]
    for one in got:
        moved = 2 * own[1:].std() * shift[data.items.index(one["item"])]
        assert one["steered"] - one["score"] == pytest.approx(moved.item(), abs=1e-4)


def test_what_people_read(tiny_run, capsys):
    intent = densest(tiny_run)
    label = read_intents(tiny_run)[intent]["label"]
    common = ["--run", str(tiny_run), "--user", "u3", "--device", "cpu"]
    assert tool.main([*common, "--more", str(intent), "--strength", "50"]) == 0
    out = capsys.readouterr().out
    assert f"more of: {label}" in out and "(was " in out and "steering costs" in out
    assert " = id " in out and "history: Thing" in out and "(from Thing" in out
    assert tool.main([*common, "--less", str(intent), "--block", str(intent)]) == 0
    out = capsys.readouterr().out
    assert f"less of: {label}" in out and f"without: {label}" in out
    assert tool.main([*common, "--model", "saerec"]) == 0
    out = capsys.readouterr().out
    assert " = history " in out and "  personal " in out and "  public intents (what most" in out
    assert "steering" not in out and "(was " not in out
    assert tool.main([*common, "--model", "sasrec", "--top", "2"]) == 0
    assert "intent" not in capsys.readouterr().out


def test_many_intents_of_a_word_are_counted():
    labels = list("abcdefg")
    lines = list(tool.wish_lines(tool.Wishes([0, 1], [], [*range(7)]), labels))
    assert lines == ["  more of: a; b", "  without: a; b; c; d; e and 2 more"]


def test_a_run_without_intents_can_be_asked_but_not_steered(tiny_data, tmp_path, ask, fails):
    run = make_run(tiny_data, tmp_path / "bare", stages="embed sasrec")
    assert ask("--user", "u3", "--model", "sasrec", run=run)["recommendations"]
    arguments = ["--run", run, "--user", "u3", "--model", "sasrec", "--more", "space"]
    fails(tool.main, arguments, "intents.safetensors is missing", "sae.py --run")
    fails(tool.main, ["--run", run, "--user", "u3"], "grounded.safetensors is missing", "model.py")


def test_what_was_judged_no_intent_can_still_be_asked_around(tmp_path, tiny_run, fails):
    """A row that a language model judged to be no intent is named by nothing."""
    run = copy_run(tiny_run, tmp_path / "run")
    rows = read_intents(run)
    rows[0]["is_intent"] = False
    saerec.write_rows(run / "intents.jsonl", rows)
    fails(tool.main, ["--run", run, "--user", "u3", "--more", "0"], "there is no intent '0'")


def test_questions_that_cannot_be_answered(fails, tiny_run):
    def refuses(arguments, *words):
        fails(tool.main, ["--run", tiny_run, "--device", "cpu", *arguments], *words)

    refuses([], "give one of --user, --history and --history-titles")
    refuses(["--history", " "], "give one of --user, --history and --history-titles")
    refuses(["--user", "u1", "--history", "i1"], "give one of", "not 2")
    refuses(["--user", "u99"], "no user 'u99'", "u9")
    refuses(["--user", "~"], "no user '~'", "u0, u1, u2")
    refuses(["--history", "i1 i999"], "no item 'i999'", "i9")
    refuses(["--history", "i1 ~"], "no item '~'", "none is near")
    refuses(["--history-titles", "Thing 1; Thong 2"], "no item titled 'Thong 2'", "Thing 2")
    refuses(["--history-titles", "~"], "no item titled '~'", "none is near")
    refuses(["--user", "u1", "--more", "spacee"], "no intent 'spacee'", "space")
    refuses(["--user", "u1", "--block", "zzzzzzzz"], "no intent 'zzzzzzzz'", "intents.jsonl")
    refuses(["--user", "u1", "--strength", "2"], "--strength changes nothing")
    refuses(["--user", "u1", "--model", "other"], "--model is 'other'", "grounded")
    fails(tool.main, ["--user", "u1"], "--run is missing", "runs/ml-100k")
