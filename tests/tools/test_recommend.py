"""Asking for recommendations with reasons, and steering them."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch

import embed
import model as recommender
import saerec
import sae as autoencoder
from conftest import SMALL, copy_run, make_run
from eval import history_state, load_model, read_intents, recommend
from model import MODELS, Reasons, model_scores
from sae import SparseRows, load_intents
from sources import bert
from test_embed import needs_weights, write_weights
from tools import asked
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
    """Item 1's code 2 is two steps old, worth .5 by now; item 2's is 1; item 3 has none.

    With less than half of the strongest, an item is not named beside it.
    """
    titles = ["", "one", "two", "three"]
    history = np.array([1, 3, 2], np.int32)
    assert tool.evoked_by(0, history, CODES, titles, 0.5) == ["two", "one"]
    assert tool.evoked_by(0, history, CODES, titles, 0.49) == ["two"]
    assert tool.evoked_by(0, history, CODES, titles, 1.0) == ["one", "two"]
    assert tool.evoked_by(1, history, CODES, titles, 1.0) == ["two"]
    assert tool.evoked_by(0, history[1:2], CODES, titles, 1.0) == []
    assert tool.evoked_by(0, np.array([1, 1], np.int32), CODES, titles, 1.0) == ["one"]
    repeated = np.array([2, 2, 1], np.int32)  # item 2 has .9 + .81, more than half of item 1's 2
    assert tool.evoked_by(0, repeated, CODES, titles, 0.9) == ["one", "two"]


def test_the_largest_terms_by_hand():
    reasons = Reasons({"id": 1.0}, torch.tensor([7, 3, 5]), torch.tensor([0.5, 0.25, -2.0]))
    assert tool.split_terms(reasons, 2) == ([(5, -2.0), (7, 0.5)], 0.25)
    assert tool.split_terms(reasons, 3)[1] == 0


LABELS = ["alien, ridley scott", "romance", "robots", "trains"]


def sentence(parts, terms, evoked):
    """`why` of an item with these parts and terms, {intent: value}."""
    intents = torch.tensor([*terms], dtype=torch.int64)
    reasons = Reasons(parts, intents, torch.tensor([*terms.values()]))
    score = sum(parts.values()) + sum(terms.values())
    return tool.why(tool.Listed(1, 1, score, score, 1, reasons, evoked), LABELS)


def test_reasons_in_a_sentence_by_hand():
    """What brings a tenth of the gain, 4 here, is told: .3 of robots is not, nor is any loss."""
    evoked = {0: ["Alien", "Blade Runner"], 1: ["Titanic"], 2: ["Wall-E"], 3: []}
    told = sentence({"id": 1.5}, {0: 1.2, 1: 1.0, 2: 0.3}, evoked)
    both = 'Because you took Alien and Blade Runner, which share "alien, ridley scott"; '
    assert told == both + 'because you took Titanic, which shares "romance"; its own pull (id)'
    told = sentence({"id": -1.0}, {2: 0.5, 1: -2.0}, evoked)
    assert told == 'Because you took Wall-E, which shares "robots"; but more speaks against it'
    same = {1: ["Titanic"], 2: ["Titanic"], 3: ["Titanic"]}
    assert sentence({"id": 0.0}, {1: 1.0, 2: 1.0, 3: 1.0}, same) == (
        'Because you took Titanic, which shares "romance", "robots" and "trains"'
    )


def test_a_sentence_says_no_because_where_nothing_evoked_an_intent():
    told = sentence({"id": 1.5}, {3: 1.0}, {3: []})
    assert told == 'For "trains", which nothing that you took lately has; mostly its own pull (id)'
    assert sentence({"id": 2.0}, {}, {}) == "Mostly its own pull (id)"
    nothing = "Nothing in particular speaks for it"
    assert sentence({"id": -2.0}, {3: -1.0}, {}) == nothing
    assert sentence({"id": 0.0}, {}, {}) == nothing


def test_sentences_on_saerec_and_sasrec():
    parts = {"history": 1.0, "personal": 0.1, "public": 2.0}
    assert sentence(parts, {}, {}) == "Mostly the public intents; your history as a whole"
    assert sentence({"history": 1.0}, {}, {}) == ""  # SASRec's only part is no reason


def test_names_hold_marks_themselves_and_the_longest_goes_first():
    known = {"steins; gate": 1, "steins": 2, "a; b; c": 3, "a": 4, "b": 5}
    for words, found in {
        "Steins;Gate": [1],
        "a; Steins; Gate ;b": [4, 1, 5],
        "a; b; c; a; b": [3, 4, 5],
        "Steins; b; gate": [2, 5, None],
        "c;a": [None, 4],
    }.items():
        assert [value for _, value in asked.cut_names(words, ";", known)] == found
    assert asked.cut_names("a; x", ";", known) == [("a", 4), ("x", None)]


def test_names_are_compared_without_case_accents_and_turned_articles():
    for one, other in {
        "Am\u00e9lie": "AMELIE",
        "The Matrix (1999)": "matrix, the (1999)",
        "L\u00e9on;  a film": "leon; A film",
        "Stra\u00dfe": "STRASSE",
        "L'Enfer (1994)": "Enfer, L' (1994)",
    }.items():
        assert asked.fold(one) == asked.fold(other)
    assert asked.fold("\u304c") != asked.fold("\u304b")  # the marks of kana make other letters


def test_intents_are_found_by_number_label_and_keyword():
    rows = [
        dict(intent=0, label="Space, orbit", keywords=["space", "orbit"]),
        dict(intent=1, label="recipes", keywords=["space", "oven"]),
    ]
    assert asked.find_intents(rows, "1") == [1]
    assert asked.find_intents(rows, "oven, orbit") == [1, 0]
    assert asked.find_intents(rows, "oven; orbit; ") == [1, 0]
    assert asked.find_intents(rows, "space") == [0]  # in a label, which goes before keywords
    assert asked.find_intents(rows, "space, orbit;RECIPES") == [0, 1]
    assert asked.find_intents(rows, "oven,space,orbit") == [1, 0]  # the label as a whole
    rows.append(dict(intent=2, label="space film", keywords=["oven"]))
    assert asked.find_intents(rows, "space") == [0, 2]  # also a word of a label's part
    assert asked.find_intents(rows, "space film") == [2]
    rows[0]["is_intent"] = False  # it has no items any more that could be asked for
    assert asked.find_intents(rows, "space") == [2]
    assert asked.find_intents(rows, "oven") == [1, 2]  # a keyword, which no label has
    for name in ("0", "SPACE, orbit"):
        with pytest.raises(saerec.UserError, match=f"'{name}' was judged to be no intent: leave it"):
            asked.find_intents(rows, f"2; {name}")
    with pytest.raises(saerec.UserError, match="no intent 'orbi'; the nearest are: none is near"):
        asked.find_intents(rows, "orbi")


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
            enough = max(faded[largest[0]] / 2, 1e-9)
            said = [title for title in largest if faded[title] >= enough]
            # SAERec asks by the last item's vector alone, so that nothing can be said to evoke it
            assert one["evoked_by"] == (said if name == "grounded" else [])
            strength = state.r[0, one["intent"]].item() if name == "grounded" else None
            assert one["strength"] == pytest.approx(strength)
            met += len(one["evoked_by"])
    assert bool(met) == (name == "grounded")


def test_a_user_a_history_and_titles_ask_the_same(ask, tiny_run):
    data = saerec.run_dataset(tiny_run)
    items = data.flat[data.start[3] : data.start[4]].tolist()
    by_user = ask("--user", data.users[3])
    assert by_user == ask("--user", f" {data.users[3]} ")
    assert by_user == ask("--history", " ".join(data.items[v] for v in items))
    assert by_user == ask("--history-titles", "; ".join(data.titles[v].upper() for v in items))
    listed = {one["item"] for one in by_user["recommendations"]}
    assert not listed & {one["item"] for one in by_user["history"]}


def test_titles_are_found_without_their_year_and_the_first_of_equal_ones():
    class Films:
        titles = [
            "", "Solaris (1972)", "Solaris (2002)", "2001", "Steins;Gate (2011)", "Th\u00e9", "The",
            "Gate",
        ]  # fmt: skip

    assert asked.find_titles(Films, "solaris; SOLARIS (2002); 2001") == [1, 2, 3]
    assert asked.find_titles(Films, "Gate; steins; gate; 2001;Steins;Gate (2011)") == [7, 4, 3, 4]
    assert asked.find_titles(Films, "th\u00e9;the") == [5, 6]  # an accent is heeded if it decides
    assert asked.find_titles(Films, "solaris; 2001; ;") == [1, 3]


def test_titles_are_found_without_their_article():
    class Films:
        titles = [
            "", "The Matrix (1999)", "Matrix (1993)", "Full Monty, The (1997)", "Les Miserables",
            "L' Enfer (1994)",
        ]  # fmt: skip

    assert asked.find_titles(Films, "matrix; the matrix; Matrix, The (1999)") == [2, 1, 1]
    assert asked.find_titles(Films, "full monty; Full Monty (1997); miserables") == [3, 3, 4]
    assert asked.find_titles(Films, "enfer; L'Enfer; l' enfer; L'Enfer (1994)") == [5, 5, 5, 5]


def test_an_item_whose_title_others_share_is_shown_with_its_id(tiny_run, monkeypatch, capsys):
    data = saerec.run_dataset(tiny_run)
    titles = [*data.titles[:-1], data.titles[1]]
    monkeypatch.setattr(tool, "run_dataset", lambda *_: dataclasses.replace(data, titles=titles))
    command = ["--run", str(tiny_run), "--device", "cpu"]
    asking = ["--history-titles", f"{titles[2]}; {titles[1]}"]
    assert tool.main([*command, *asking]) == 0
    first = f"{titles[1]} (id {data.items[1]}, one of 2 so titled)"
    assert f"history: {titles[2]}; {first}\n" in capsys.readouterr().out
    assert tool.main([*command, "--history", data.items[-1]]) == 0
    assert f"history: {titles[1]} (id {data.items[-1]}, one of 2" in capsys.readouterr().out


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
    assert whole["cost"] == 0  # the whole list: only its order changed
    few = ask("--user", "u3", "--top", 3, "--more", intent, "--strength", 50)
    mean = np.mean([one["score"] for one in few["recommendations"]])
    best = sorted(scores.values(), reverse=True)[:3]
    assert few["cost"] == pytest.approx(np.mean(best) - mean) and few["cost"] >= 0


def test_what_blocking_costs(ask, tiny_run):
    """Ranks before are of all items, the blocked ones too, and the cost is what the list loses."""
    plain = ask("--user", "u3", "--top", 30)["recommendations"]
    order = [one["item"] for one in plain]
    best = plain[0]["terms"][0]["intent"]
    kept = ask("--user", "u3", "--top", 3, "--block", best)
    for one in kept["recommendations"]:
        assert order[one["rank_before"] - 1] == one["item"]
    assert kept["recommendations"][0]["rank_before"] > 1
    mean = np.mean([one["score"] for one in kept["recommendations"]])
    assert kept["cost"] == pytest.approx(np.mean([one["score"] for one in plain[:3]]) - mean)
    assert kept["cost"] > 0
    fewer = ask("--user", "u3", "--top", 30, "--block", best)
    scores = [one["score"] for one in fewer["recommendations"]]
    could = [one["score"] for one in plain[: len(scores)]]  # as many as are left
    assert len(scores) < len(plain)
    assert fewer["cost"] == pytest.approx(np.mean(could) - np.mean(scores)) and fewer["cost"] >= 0


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
    assert "       Because you took Thing" in out
    assert tool.main([*common, "--less", str(intent), "--block", str(intent)]) == 0
    out = capsys.readouterr().out
    assert f"less of: {label}" in out and f"without: {label}" in out
    assert tool.main([*common, "--model", "saerec"]) == 0
    out = capsys.readouterr().out
    assert " = history " in out and "  personal " in out and "  public intents (what most" in out
    assert "steering" not in out and "(was " not in out
    assert "your history as a whole" in out
    for user in range(12):
        assert tool.main([*common[:2], "--user", f"u{user}", "--model", "saerec"]) == 0
    assert "  attends to  " in capsys.readouterr().out
    assert tool.main([*common, "--model", "sasrec", "--top", "2"]) == 0
    out = capsys.readouterr().out
    assert "intent" not in out and out.count("no reasons") == 1
    data = saerec.run_dataset(tiny_run)
    assert tool.main([*common[:2], "--history", " ".join(data.items[1:])]) == 0
    out = capsys.readouterr().out
    assert "nothing is left to recommend" in out
    last = "; ".join(data.titles[-8:])
    assert f"history: {len(data.titles) - 9} earlier; {last}\n" in out


def test_reasons_name_what_carries_the_intent(ask, tiny_run):
    """Each title in `why` is of the history and has the intent that it is said to share."""
    data = saerec.run_dataset(tiny_run)
    codes = dense_codes(tiny_run)
    met = 0
    for user in data.users[:6]:
        got = ask("--user", user)
        titles = {one["title"] for one in got["history"]}
        for one in got["recommendations"]:
            for term in one["terms"]:
                evoking = [title for title in term["evoked_by"] if f"took {title}" in one["why"]]
                assert set(term["evoked_by"]) <= titles
                for title in evoking:
                    assert codes[data.titles.index(title), term["intent"]] > 0
                met += bool(evoking)
            assert one["why"]
    assert met


def test_json_is_one_line_of_ascii(tiny_run, monkeypatch, capsys):
    """So that a pipe with any encoding can carry it."""
    data = saerec.run_dataset(tiny_run)
    titles = [f"{title} \u4e03\u4eba" for title in data.titles]
    monkeypatch.setattr(tool, "run_dataset", lambda *_: dataclasses.replace(data, titles=titles))
    assert tool.main(["--run", str(tiny_run), "--user", "u3", "--json"]) == 0
    out = capsys.readouterr().out
    assert out.isascii() and out.count("\n") == 1
    assert json.loads(out)["history"][0]["title"].endswith("\u4e03\u4eba")


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


def test_data_that_moved(tiny_data, tiny_run, tmp_path, ask, fails):
    moved = tmp_path / "moved"
    shutil.copytree(tiny_data, moved)
    assert ask("--user", "u3", "--data", moved) == ask("--user", "u3")
    command = ["--run", tiny_run, "--user", "u3", "--data", tmp_path / "nowhere"]
    fails(tool.main, command, "which is not there", "--data FOLDER")


def test_what_was_judged_no_intent_can_still_be_asked_around(tmp_path, tiny_run, fails):
    """A row that a language model judged to be no intent is named by nothing."""
    run = copy_run(tiny_run, tmp_path / "run")
    rows = read_intents(run)
    rows[0]["is_intent"] = False
    saerec.write_rows(run / "intents.jsonl", rows)
    fails(tool.main, ["--run", run, "--user", "u3", "--more", "0"], "'0' was judged to be no intent")


# A new text


@pytest.fixture(scope="module")
def encoded_run(tiny_data, tmp_path_factory):
    """A run of the tiny dataset whose texts a tiny encoder embedded."""
    folder = tmp_path_factory.mktemp("encoded")
    weights = write_weights(folder / "weights")[0]
    run = folder / "run"
    command = ["--data", tiny_data, "--run", run, "--weights", weights, "--max-tokens", 16]
    assert bert.main([str(word) for word in [*command, "--device", "cpu"]]) == 0
    common = ["--run", str(run), "--device", "cpu"]
    assert autoencoder.main([*common, *SMALL["sae"].split()]) == 0
    assert recommender.main([*common, *SMALL["model"].split()]) == 0
    return run


def items_with_intents(run, data):
    """Items that carry intents -> list of 1..V; each item of the tiny dataset has one text."""
    return [v for v in range(1, len(data.items)) if dense_codes(run)[v].any()]


def test_a_text_has_the_intents_of_the_item_that_it_is_the_text_of(encoded_run, ask, capsys):
    data = saerec.run_dataset(encoded_run)
    codes = dense_codes(encoded_run)
    for item in items_with_intents(encoded_run, data)[:5]:
        text = data.texts[data.text_item.tolist().index(item)]
        got = ask("--text", text, run=encoded_run)["text"]
        assert {one["intent"] for one in got} == set(codes[item].nonzero()[:, 0].tolist())
        for one in got:
            assert one["activation"] == pytest.approx(codes[item, one["intent"]].item(), abs=1e-5)
            assert one["label"] == read_intents(encoded_run)[one["intent"]]["label"]
        activations = [one["activation"] for one in got]
        assert activations == sorted(activations, reverse=True)
    assert tool.main(["--run", str(encoded_run), "--text", text, "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "the text's intents" in out and f"{got[0]['activation']:.2f}  {got[0]['label']}" in out


def test_a_new_item_scores_as_one_with_its_text_does_without_its_id(encoded_run, ask, capsys):
    data = saerec.run_dataset(encoded_run)
    model = load_model(encoded_run, "grounded", data)
    history = data.flat[data.start[3] : data.start[4]]
    state = history_state(model, history)
    scores = model.scores(state, model.item_table())[0].detach()
    for item in items_with_intents(encoded_run, data)[:5]:
        text = data.texts[data.text_item.tolist().index(item)]
        got = ask("--text", text, "--user", data.users[3], "--top", 2, run=encoded_run)
        new = [one for one in got["recommendations"] if one["title"] == "the new item"]
        [new] = new
        expected = (scores[item] - model.item.weight[item] @ state.u[0]).item()
        assert new["item"] is None and new["score"] == pytest.approx(expected, abs=1e-4)
        others = [v for v in range(1, len(data.items)) if v not in history]
        assert new["rank"] == 1 + sum(scores[v].item() > expected for v in others)
        assert new["parts"] == {"id": 0.0}
        value = sum(term["value"] for term in new["terms"]) + new["rest"]
        assert value == pytest.approx(expected, abs=1e-4)
        plain = ask("--user", data.users[3], "--top", 2, run=encoded_run)["recommendations"]
        listed = [one["item"] for one in got["recommendations"] if one["item"]]
        assert listed == [one["item"] for one in plain][: len(listed)] and len(listed) in (1, 2)
    arguments = ["--run", encoded_run, "--text", text, "--user", "u3", "--device", "cpu"]
    assert tool.main([str(word) for word in arguments]) == 0
    out = capsys.readouterr().out
    assert "the text's intents" in out and f"{new['rank']:4} the new item" in out


def test_a_new_item_is_steered_as_the_others_are(encoded_run, ask, capsys):
    data = saerec.run_dataset(encoded_run)
    item = items_with_intents(encoded_run, data)[0]
    text = data.texts[data.text_item.tolist().index(item)]
    intent = ask("--text", text, run=encoded_run)["text"][0]["intent"]
    common = ("--text", text, "--user", "u3", "--top", 1)
    found = {}
    for wish in ("--more", "--less", "--block"):
        got = ask(*common, wish, intent, run=encoded_run)["recommendations"]
        found[wish] = [one for one in got if one["item"] is None]
    assert found["--block"] == []
    command = ["--run", encoded_run, *common, "--block", intent]
    assert tool.main([str(word) for word in command]) == 0
    assert "the new item is left out: it has an intent of --block\n" in capsys.readouterr().out
    assert found["--more"][0]["steered"] > found["--more"][0]["score"]
    assert found["--less"][0]["steered"] < found["--less"][0]["score"]


def test_a_history_never_holds_the_new_item(encoded_run, fails):
    text = ["--run", encoded_run, "--text", "a thing", "--device", "cpu"]
    fails(tool.main, [*text, "--history", "i1 bogus"], "no item 'bogus'")
    titles = ["--history-titles", "the new item; Thing 1"]
    fails(tool.main, [*text, *titles], "no item titled 'the new item'")


def test_what_was_judged_no_intent_is_none_of_a_text(encoded_run, tmp_path, ask):
    data = saerec.run_dataset(encoded_run)
    item = items_with_intents(encoded_run, data)[0]
    text = data.texts[data.text_item.tolist().index(item)]
    found = [one["intent"] for one in ask("--text", text, run=encoded_run)["text"]]
    run = copy_run(encoded_run, tmp_path / "run")
    for judged in (found[:1], range(len(read_intents(run)))):
        tensors, meta = saerec.load_artifact(run / "intents.safetensors", "")
        tensors["is_intent"][[*judged]] = False
        saerec.write_artifact(run / "intents.safetensors", tensors, meta)
        got = ask("--text", text, run=run)["text"]
        assert [one["intent"] for one in got] == [j for j in found if j not in judged]
    assert list(tool.text_lines(got)) == ["the text has none of the intents"]


def test_fetching_the_encoder_leaves_stdout_alone(encoded_run, tmp_path, monkeypatch, capsys):
    """Its notes go to stderr: stdout may be read by a program."""
    run = copy_run(encoded_run, tmp_path / "run", "embeddings.safetensors")
    tensors, meta = saerec.load_artifact(run / "embeddings.safetensors", "")
    weights = meta["settings"]["weights"]
    meta["settings"]["weights"] = ""  # the encoder that is fetched
    saerec.write_artifact(run / "embeddings.safetensors", tensors, meta)

    def fetch():
        print("fetching")
        return saerec.Path(weights)

    monkeypatch.setattr(asked, "fetch_weights", fetch)
    data = saerec.run_dataset(run)
    assert asked.run_encoder(run, data, "cpu")[0].most == 16
    got = capsys.readouterr()
    assert got.out == "" and "fetching" in got.err


@needs_weights
def test_a_text_is_embedded_as_the_run_was(encoded_run, tiny_data, tmp_path):
    """By embed.py's encoder, by another, and by another in a run of an earlier version."""
    assert embed.main(["--data", str(tiny_data), "--run", str(tmp_path / "minilm")]) == 0
    older = copy_run(encoded_run, tmp_path / "older", "embeddings.safetensors")
    tensors, meta = saerec.load_artifact(older / "embeddings.safetensors", "")
    meta["settings"] |= dict(embeddings="", max_tokens=0)
    saerec.write_artifact(older / "embeddings.safetensors", tensors, meta)
    for run in (tmp_path / "minilm", encoded_run, older):
        data = saerec.run_dataset(run)
        stored = saerec.load_artifact(run / "embeddings.safetensors", "")[0]["embeddings"]
        encoder = asked.run_encoder(run, data, "cpu")
        torch.testing.assert_close(embed.encode(data.texts[:3], *encoder), stored[:3])


def test_texts_that_cannot_be_read(encoded_run, tiny_run, tmp_path, fails):
    text = ["--text", "a thing", "--device", "cpu"]
    fails(tool.main, ["--run", tiny_run, *text], "embeddings from provided", "an encoder embedded")
    for name in ("saerec", "sasrec"):
        command = ["--run", tiny_run, *text, "--user", "u3", "--model", name]
        fails(tool.main, command, f"--model grounded alone, not {name}")
    run = copy_run(encoded_run, tmp_path / "run")
    (run / "sae.safetensors").unlink()
    fails(tool.main, ["--run", run, *text], "sae.safetensors is missing", "sae.py --run")
    run = copy_run(encoded_run, tmp_path / "new", "[es]*")
    tensors, meta = saerec.load_artifact(run / "sae.safetensors", "")
    saerec.write_artifact(run / "sae.safetensors", tensors | {"gate": torch.ones(1)}, meta)
    fails(tool.main, ["--run", run, *text], "sae.safetensors is not of the SAE of sae.py", "make it again")
    del tensors["active"]
    saerec.write_artifact(run / "sae.safetensors", tensors, meta)
    fails(tool.main, ["--run", run, *text], "sae.safetensors is not of the SAE of sae.py")
    run = copy_run(encoded_run, tmp_path / "other")
    tensors, meta = saerec.load_artifact(run / "embeddings.safetensors", "")
    meta["settings"]["weights"] = str(write_weights(tmp_path / "weights", old=True)[0])
    saerec.write_artifact(run / "embeddings.safetensors", tensors, meta)
    wrong = "model.safetensors is not there, or not what"
    fails(tool.main, ["--run", run, *text], wrong, "was embedded with", "run all stages again")
    (tmp_path / "weights" / "model.safetensors").unlink()
    fails(tool.main, ["--run", run, *text], wrong)


# Lists of all users


def read_lists(path):
    """The lists of a file -> {user: items}; the first line is on what they are made from."""
    rows = [json.loads(line) for line in path.read_text("ascii").splitlines()]
    assert "made_from" in rows[0]
    return {row["user"]: row["items"] for row in rows[1:]}


@pytest.mark.parametrize("name", MODELS)
def test_lists_of_all_users_are_those_of_each(name, ask, tiny_run, tmp_path, capsys):
    data = saerec.run_dataset(tiny_run)
    intents = sorted(row["intent"] for row in read_intents(tiny_run))
    wishes = ["--more", f"{intents[0]}", "--block", f"{intents[1]}", "--strength", "3"]
    for number, flags in enumerate(([], wishes)):
        path = tmp_path / "new" / f"{number}.jsonl"
        common = ["--model", name, "--top", "4", *flags]
        command = ["--run", str(tiny_run), *common, "--all-users", "--out", str(path)]
        assert tool.main([*command, "--device", "cpu"]) == 0
        out = capsys.readouterr().out
        assert "users 24/24" in out and f"{path}: 24 users" in out
        lists = read_lists(path)
        assert list(lists) == data.users
        for user in data.users[:8]:
            expected = ask("--user", user, *common)["recommendations"]
            assert [one["item"] for one in lists[user]] == [one["item"] for one in expected]
            for one, single in zip(lists[user], expected, strict=True):
                assert one["score"] == pytest.approx(single["score"], abs=1e-4)
                assert one["parts"] == pytest.approx(single["parts"], abs=1e-4)
                assert one["rest"] == pytest.approx(single["rest"], abs=1e-4)
                for term, told in zip(one["terms"], single["terms"], strict=True):
                    assert term == pytest.approx({key: told[key] for key in term}, abs=1e-4)


def test_lists_are_as_long_as_what_is_left(tiny_run, tmp_path):
    data = saerec.run_dataset(tiny_run)
    path = tmp_path / "lists.jsonl"
    command = ["--run", tiny_run, "--all-users", "--out", path, "--top", 1000, "--device", "cpu"]
    assert tool.main([str(word) for word in command]) == 0
    for user, items in enumerate(read_lists(path).values()):
        seen = {data.items[v] for v in data.flat[data.start[user] : data.start[user + 1]]}
        assert {one["item"] for one in items} == set(data.items[1:]) - seen


def test_lists_that_were_interrupted_are_gone_on_with(tiny_run, tmp_path, capsys, monkeypatch):
    """Wherever the file ends, the same lists come of it; a finished one stays untouched."""
    path = tmp_path / "lists.jsonl"
    common = ["--run", tiny_run, "--all-users", "--top", 2, "--device", "cpu"]
    command = [str(word) for word in [*common, "--out", path]]
    assert tool.main(command) == 0
    whole = path.read_bytes()
    ends = [number + 1 for number, byte in enumerate(whole) if byte == ord("\n")]
    for size in (0, 10, ends[0] - 1, ends[0], ends[0] + 5, ends[7], ends[7] + 30, ends[-1] - 1):
        path.write_bytes(whole[:size])
        capsys.readouterr()
        assert tool.main(command) == 0
        out = capsys.readouterr().out
        assert read_lists(path).keys() == {f"u{user}" for user in range(24)}
        assert path.read_bytes().splitlines()[0] == whole.splitlines()[0]
        done = max(sum(end <= size for end in ends) - 1, 0)
        assert (f"going on after {done} users" in out) == bool(done)
        assert f"users {24 - done}/{24 - done}" in out
        lists = read_lists(path)
        assert [len(items) for items in lists.values()] == [2] * 24
    before = path.read_bytes()
    assert tool.main(command) == 0
    assert f"{path} is finished: 24 users" in capsys.readouterr().out
    assert path.read_bytes() == before


def test_lists_of_other_settings_or_models_are_not_gone_on_with(tiny_run, tmp_path, fails):
    path = tmp_path / "lists.jsonl"
    run = copy_run(tiny_run, tmp_path / "run")
    common = ["--run", run, "--all-users", "--out", path, "--device", "cpu"]
    assert tool.main([str(word) for word in common]) == 0
    whole = path.read_bytes()
    for flags in (["--top", 3], ["--model", "saerec"], ["--more", "0"], ["--block", "0"]):
        other = f"{path} holds something else than lists"
        fails(tool.main, [*common, *flags], other, "name another --out")
    tensors, meta = saerec.load_artifact(run / "grounded.safetensors", "")
    tensors["intent_vectors"] *= 2
    saerec.write_artifact(run / "grounded.safetensors", tensors, meta)
    fails(tool.main, common, f"{path} holds something else")
    assert path.read_bytes() == whole
    path.write_bytes(b"my only copy")  # without a line end, but no half-written line of ours
    fails(tool.main, common, f"{path} holds something else")
    assert path.read_bytes() == b"my only copy"


def test_lists_that_are_not_one_of_each_user_are_not_gone_on_with(tiny_run, tmp_path, fails):
    """Such as of two files, one behind the other: users would be lost, without a word."""
    path = tmp_path / "lists.jsonl"
    common = ["--run", tiny_run, "--all-users", "--out", path, "--top", 2, "--device", "cpu"]
    assert tool.main([str(word) for word in common]) == 0
    header, *lists = path.read_bytes().splitlines(keepends=True)
    for lines in (lists + lists[-1:], lists[:10] * 2, lists[1:4], lists[:3] + [header]):
        path.write_bytes(header + b"".join(lines))
        before = path.read_bytes()
        words = (f"{path} does not have one list of each user", "name another --out")
        fails(tool.main, common, *words)
        assert path.read_bytes() == before


# Refusals


def test_questions_that_cannot_be_answered(fails, tiny_run):
    def refuses(arguments, *words):
        fails(tool.main, ["--run", tiny_run, "--device", "cpu", *arguments], *words)

    refuses([], "give one of --user, --history and --history-titles")
    refuses(["--history", " "], "give one of --user, --history and --history-titles")
    refuses(["--user", "u1", "--history", "i1"], "give one of", "not 2")
    refuses(["--user", "u99"], "no user 'u99' with 3 items or more", "u9", "fewer by --history")
    refuses(["--user", "~"], "no user '~'", "u0, u1, u2")
    refuses(["--history", "i1 i999"], "no item 'i999'", "i9")
    refuses(["--history", "i1 ~"], "no item '~'", "none is near")
    refuses(["--history-titles", "Thing 1; Thong 2"], "no item titled 'Thong 2'", "Thing 2")
    refuses(["--history-titles", "Thing 1;; Thing 2"], "no item titled ''")
    refuses(["--history-titles", ";"], "no item titled ''")
    refuses(["--history-titles", "~"], "no item titled '~'", "none is near")
    refuses(["--history", "i1,i7"], "no item 'i1,i7'", "ids are parted by spaces")
    refuses(["--history-titles", "Thing 1, Thing 7"], "titles are parted by semicolons")
    refuses(["--user", "u1", "--more", "spacee"], "no intent 'spacee'", "space")
    refuses(["--user", "u1", "--block", "zzzzzzzz"], "no intent 'zzzzzzzz'", "intents.jsonl")
    refuses(["--user", "u1", "--strength", "2"], "--strength changes nothing without --more")
    refuses(["--user", "u1", "--all-users", "--out", "x"], "give one of", "not 2")
    refuses(["--all-users"], "--out is missing")
    refuses(["--user", "u1", "--out", "x"], "--out changes nothing without --all-users")
    refuses(["--all-users", "--out", "x", "--json"], "--json changes nothing with --all-users")
    refuses(["--all-users", "--out", "x", "--text", "y"], "--text changes nothing with --all-users")
    for flag in (["--model", "saerec"], ["--top", 3], ["--more", "1"], ["--block", "1"]):
        refuses(["--text", "y", *flag], f"{flag[0]} changes nothing without a history")
    refuses(["--user", "u1", "--model", "other"], "--model is 'other'", "grounded")
    fails(tool.main, ["--user", "u1"], "--run is missing", "runs/ml-100k")
