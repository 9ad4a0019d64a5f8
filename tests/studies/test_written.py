"""What users wrote: where each review stands, what a position may read of it, and the study."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model
import sae
import saerec
from conftest import SMALL, TOPICS, make_run, text, write_folder
from studies import significance, variants, written

J = 7
E = 6
BASE = model.ModelSettings(
    width=8, layers=1, heads=2, dropout=0.0, history=4, personal=3, public=2, match=0.7
)
BOTH = (written.WrittenGrounded, written.WrittenSAERec)


def write_reviews(folder, users=20, items=12):
    """Users who review all items but every fifth of theirs, in words of a topic of their own."""
    lines = []
    texts = []
    for u in range(users):
        row = [(u * 5 + step * (1 + u % 3)) % items for step in range(6 + u % 4)]
        row = list(dict.fromkeys(row))
        lines.append(f"u{u} " + " ".join(f"i{item}" for item in row))
        words = TOPICS[list(TOPICS)[u % 3]].split()
        for step, item in enumerate(row):
            said = f"{words[step % 4]} {words[(step + u) % 4]} {words[item % 4]}"
            if (step + u) % 5:
                texts.append(json.dumps({"item": f"i{item}", "text": said, "user": f"u{u}"}))
    return write_folder(folder, "\n".join(lines) + "\n", "\n".join(texts) + "\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return saerec.load_dataset(write_reviews(tmp_path_factory.mktemp("data") / "reviews"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run that has its intents, on the reviews."""
    return make_run(data.folder, tmp_path_factory.mktemp("runs") / "reviews", stages="embed sae")


def random_rows(rows, seed, share=0.4):
    """A SparseRows [rows, J] with an empty row 0, and the same matrix dense."""
    g = torch.Generator().manual_seed(seed)
    dense = torch.rand(rows, J, generator=g) * (torch.rand(rows, J, generator=g) < share)
    dense[0] = 0
    bounds = sae.cell_bounds((dense > 0).sum(1))
    return sae.SparseRows(bounds, dense.nonzero()[:, 1].int(), dense[dense > 0], J), dense


def sparse(dense):
    """The SparseRows of a dense matrix."""
    bounds = sae.cell_bounds((dense > 0).sum(1))
    return sae.SparseRows(bounds, dense.nonzero()[:, 1].int(), dense[dense > 0], dense.shape[1])


def build(Model, data, read, like=None):
    """A model that reads SparseRows `read` of interactions; like: whose parameters it takes."""
    g = torch.Generator().manual_seed(5)
    vectors = F.normalize(torch.randn(J, E, generator=g), dim=1)
    codes, _ = random_rows(len(data.items), seed=1)
    torch.manual_seed(0)
    net = Model(BASE, data, written.WrittenIntents(vectors, codes, read))
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn(p.shape)
        net.item.weight[0] = 0
    if like is not None:
        net.load_state_dict(like.state_dict())
    return net.eval()


@torch.no_grad()
def scores_by_place(net, data):
    """Scores of each position that is trained on, by its place in flat -> {place: [V+1]}."""
    rows = model.training_rows(data, BASE.history)
    flat = torch.from_numpy(data.flat).long()
    with written.places_told(net):
        batch = model.make_batch(rows, torch.arange(len(rows.length)), flat, "cpu")
        table = net.item_table()
        state = net(batch.items, F.embedding(batch.items, table), batch.real)
    places = (net.places.flatten()[batch.real] - 1).tolist()
    return dict(zip(places, net.scores(state, table), strict=True))


@torch.no_grad()
def ranking_scores(net, data, part):
    """What users' held-out items are ranked by -> [users, V+1]."""
    with written.places_told(net):
        return model.model_scores(net, data, part)(torch.arange(len(data.users)))


# Where reviews stand


SEQUENCES = "ann a b c d e\nbob a b c d\ncy a b\ndee a b a c d\n"


def review(item, user, **more):
    return text(item, user=user, **more)


def test_places_by_hand(tmp_path):
    """flat is ann's a b c d e, bob's a b c d, dee's a b a c d; two each are held out."""
    texts = [
        (review("a", "ann"), 0),
        (text("b"), -1),  # the item's own
        (review("b", "bob"), 6),
        (review("d", "ann"), None),  # held out: validation
        (review("e", "ann"), None),  # held out: test
        (review("a", "cy"), -1),  # left out with 2 items, the text is kept
        (review("a", "dee"), 11),  # the later of two: never before it was written
        (json.dumps({"item": "c", "text": "  ", "user": "ann"}) + "\n", None),
        (review("c", "ann", title="The C"), 2),
        (review("e", "bob"), -1),  # which bob never had
        (review("a", "ann"), 0),  # another one
    ]
    folder = write_folder(tmp_path / "data", SEQUENCES, "".join(line for line, _ in texts))
    data = saerec.load_dataset(folder)
    expected = [place for _, place in texts if place is not None]
    assert written.reviewed_places(data).tolist() == expected
    assert written.coverage(data, torch.tensor(expected)) == dict(training=8, reviewed=4)


def test_every_review_stands_at_its_item_and_none_is_held_out(data):
    places = written.reviewed_places(data)
    assert (places >= 0).all()
    assert np.array_equal(data.flat[places], data.text_item)
    held_out = [data.held_out(part) for part in written.PARTS]
    assert not np.isin(places, held_out).any()


def test_what_cannot_be_read(tmp_path, data, fails, tiny_run):
    other = dataclasses.replace(data, texts=[*data.texts[:-1], "another"])
    with pytest.raises(saerec.UserError, match="texts.jsonl has changed"):
        written.reviewed_places(other)
    fails(written.main, ["--run", tiny_run], "texts.jsonl", 'no text by a "user"', "bring reviews")


# What stands there


def test_own_codes_by_hand(monkeypatch):
    """Three places; latents 4, 5, 6 are intents 0, 1, 2, but 5 was judged to be none."""
    values = torch.tensor([[2.0, 1], [4, 0], [1, 3], [5, 7]])
    latents = torch.tensor([[4, 6], [4, 6], [5, 1], [4, 6]])
    monkeypatch.setattr(written, "encode_all", lambda *_: sae.Codes(values, latents))
    tensors = dict(latent=torch.tensor([4, 5, 6]), is_intent=torch.tensor([True, False, True]))
    data = SimpleNamespace(flat=np.array([1, 2, 3]))
    run = SimpleNamespace(
        data=data, intents=tensors, sae=SimpleNamespace(W_dec=torch.zeros(8, 2)), embeddings=None
    )
    own = written.own_codes(run, torch.tensor([2, 2, 0, -1]))
    expected = [
        [0, 0, 0],  # padding
        [0, 0, 0],  # place 0: no intent in its review
        [0, 0, 0],  # place 1: no review
        [3, 0, 0.5],  # place 2: the mean of two reviews
    ]
    assert own.dense().tolist() == expected


def test_own_codes_of_a_run_are_nothing_where_nothing_may_be_read(data, run):
    places = written.reviewed_places(data)
    own = written.own_codes(written.load_run(run, data), places)
    count = own.indptr.diff()
    assert len(count) == len(data.flat) + 1 and own.columns == len(sae.load_intents(run, data)[0])
    reviewed = torch.zeros(len(count), dtype=torch.bool)
    reviewed[places + 1] = True
    assert not count[~reviewed].any() and count[reviewed].float().mean() > 0.5
    for part in written.PARTS:
        assert not reviewed[data.held_out(part) + 1].any()


def test_both_is_the_sum():
    a, dense_a = random_rows(9, seed=1)
    b, dense_b = random_rows(9, seed=2)
    total = written.summed(a, b)
    torch.testing.assert_close(total.dense(), dense_a + dense_b)
    cells = total.rows_of_cells() * J + total.indices
    assert len(cells.unique()) == len(cells) == int(((dense_a + dense_b) > 0).sum())


def test_control_deals_among_the_same_item_alone(data):
    """Reviews are told apart by their place, which is their code here."""
    places = written.reviewed_places(data)
    own = sparse(torch.arange(len(data.flat) + 1).float()[:, None])
    dealt = written.dealt_out(own, places, data, seed=1).dense()[:, 0].long().tolist()
    user = np.searchsorted(data.start, np.arange(len(data.flat)), side="right")
    reviewed = places.unique().tolist()
    items = data.flat[reviewed].tolist()
    for place in range(len(data.flat)):
        source = dealt[place + 1] - 1
        if place not in reviewed or items.count(data.flat[place]) == 1:
            assert source == -1
            continue
        assert source in reviewed and data.flat[source] == data.flat[place]
        assert user[source] != user[place]
    given = [one for one in dealt if one]
    assert len(given) == len(set(given)) > 50 and dealt[0] == 0
    again, other = (written.dealt_out(own, places, data, seed).dense()[:, 0] for seed in (1, 2))
    assert again.long().tolist() == dealt != other.long().tolist()


def test_an_item_that_nobody_else_reviewed_has_no_control(tmp_path):
    texts = review("a", "ann") + review("a", "bob") + review("b", "bob")
    data = saerec.load_dataset(write_folder(tmp_path / "data", SEQUENCES, texts))
    places = written.reviewed_places(data)
    assert places.tolist() == [0, 5, 6]
    own = sparse(torch.arange(len(data.flat) + 1).float()[:, None])
    dealt = written.dealt_out(own, places, data, seed=0).dense()[:, 0]
    assert dealt.nonzero()[:, 0].tolist() == [1, 6] and dealt[[1, 6]].tolist() == [6, 1]


# What a model reads


@pytest.mark.parametrize(
    ("Model", "Known"),
    [
        (written.WrittenGrounded, model.Grounded),
        (written.WrittenSAERec, variants.RetrievalByActivation),
    ],
)
def test_item_codes_by_places_are_the_model_as_it_is(data, Model, Known):
    """In training, where a history is cut into rows, and in ranking."""
    codes, _ = random_rows(len(data.items), seed=1)
    net = build(Model, data, codes.gather(written.items_by_place(data)))
    known = build(Known, data, None, like=net)
    by_place = scores_by_place(net, data)
    expected = scores_by_place(known, data)
    assert by_place.keys() == expected.keys() and len(by_place) > 50
    for place, scores in by_place.items():
        torch.testing.assert_close(scores, expected[place])
    for part in written.PARTS:
        ranked = (ranking_scores(one, data, part) for one in (net, known))
        torch.testing.assert_close(*ranked)


def test_r_of_own_reviews_by_hand(data):
    """Equation (11) over the user's rows, whose windows have 4 items."""
    read, dense = random_rows(len(data.flat) + 1, seed=3)
    net = build(written.WrittenGrounded, data, read)
    users = torch.arange(len(data.users))
    with written.places_told(net):
        rows = model.evaluation_rows(data, "test", BASE.history)
        flat = torch.from_numpy(data.flat).long()
        _, items, _ = model.pad_rows(rows, users, flat)
    last = users * items.shape[1] + rows.length - 1
    r = net.history_intents(items, last)
    for user in users.tolist():
        end = data.start[user + 1] - 1  # the place of the test item
        window = range(max(data.start[user], end - 4), end)
        expected = sum(0.9 ** (end - 1 - place) * dense[place + 1] for place in window) * net.idf
        torch.testing.assert_close(r[user], expected)


def test_r_of_both_is_the_sum_of_each(data):
    item, _ = random_rows(len(data.items), seed=1)
    item = item.gather(written.items_by_place(data))
    own, _ = random_rows(len(data.flat) + 1, seed=3)
    r = []
    for read in (item, own, written.summed(own, item)):
        net = build(written.WrittenGrounded, data, read)
        with written.places_told(net):
            rows = model.training_rows(data, BASE.history)
            flat = torch.from_numpy(data.flat).long()
            batch = model.make_batch(rows, torch.arange(len(rows.length)), flat, "cpu")
            r.append(net.history_intents(batch.items, batch.real))
    torch.testing.assert_close(r[0] + r[1], r[2])
    assert r[0].any() and r[1].any()


@pytest.mark.parametrize("Model", BOTH)
def test_a_later_review_moves_nothing_earlier(data, Model):
    """Another review at a place moves positions from there on, of its row, and no other."""
    read, dense = random_rows(len(data.flat) + 1, seed=3, share=0.6)
    net = build(Model, data, read)
    before = scores_by_place(net, data)
    rows = model.training_rows(data, BASE.history)
    moved_any = 0
    for begin, length in list(zip(*(part.tolist() for part in rows)))[:12]:
        place = begin + length // 2
        changed = dense.clone()
        changed[place + 1] = 5 * changed[place + 1].flip(0)
        after = scores_by_place(build(Model, data, sparse(changed), like=net), data)
        may_move = range(place, begin + length)
        for other, scores in before.items():
            if other not in may_move:
                torch.testing.assert_close(after[other], scores)
        moved_any += any((after[here] - before[here]).abs().max() > 1e-3 for here in may_move)
    assert moved_any > 6


@pytest.mark.parametrize("Model", BOTH)
def test_no_held_out_review_is_read_even_if_there_were_one(data, Model):
    """The target's own place is never read; a validation item's is before the test item."""
    dense = random_rows(len(data.flat) + 1, seed=3)[1]
    net = build(Model, data, sparse(dense))
    for part in written.PARTS:
        before = ranking_scores(net, data, part)
        changed = dense.clone()
        for user, held_out in enumerate(data.held_out(part)):
            changed[held_out + 1 : data.start[user + 1] + 1] = 9.0
        after = ranking_scores(build(Model, data, sparse(changed), like=net), data, part)
        torch.testing.assert_close(after, before)
        changed[data.held_out(part)] = 9.0  # the last item of the history, which is read
        after = ranking_scores(build(Model, data, sparse(changed), like=net), data, part)
        assert (after - before).abs().max() > 1e-3


def test_places_are_told_for_each_batch_and_no_longer(data):
    read, _ = random_rows(len(data.flat) + 1, seed=3)
    net = build(written.WrittenGrounded, data, read)
    original = model.pad_rows
    flat = torch.from_numpy(data.flat).long()
    rows = model.training_rows(data, BASE.history)
    with written.places_told(net):
        first, second = (
            model.make_batch(rows, torch.tensor(chosen), flat, "cpu") for chosen in ([3, 0], [1, 2])
        )
    assert model.pad_rows is original
    real = net.places > 0
    assert torch.equal(flat[net.places[real] - 1], second.items[real])
    assert torch.equal(real, second.items > 0)
    net.history_intents(second.items, second.real)
    with pytest.raises(RuntimeError, match="another batch"):
        net.history_intents(first.items, first.real)


def test_public_branch_alone_ignores_what_is_personal(data):
    read, _ = random_rows(len(data.flat) + 1, seed=3)
    whole = build(variants.RetrievalByActivation, data, read)
    alone = build(written.WithoutPersonal, data, read)
    left = {name for name, _ in alone.named_parameters()}
    gone = {name for name, _ in whole.named_parameters()} - left
    assert {name.split(".")[0] for name in gone} == {"personal_branch"}
    assert torch.equal(alone.public_intents(), whole.public_intents())


# The study


@pytest.fixture(scope="module")
def study(run):
    """The study of two seeds on the tiny run -> (command, report, test scores of each training)."""
    command = ["--run", str(run), "--seeds", "2", "--device", "cpu"]
    command += ["--model-flags", f"{SMALL['model']} {SMALL['saerec']}"]
    scores = []

    def note(score, data, part):
        if part == "test":
            with torch.no_grad():
                scores.append(score(torch.arange(len(data.users))))
        return saerec.rank_users(score, data, part)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(written, "rank_users", note)
        assert written.main(command) == 0
    return command, json.loads((run / "written.json").read_text()), scores


def ranks_of(run, name, seed):
    slug = "".join(c if c.isalpha() else " " for c in name.lower()).split()
    path = run / f"written-{'-'.join(slug)}-{seed}.safetensors"
    return saerec.load_artifact(path, "")[0]


def test_every_row_scores_in_another_way(study):
    _, report, scores = study
    assert [row["name"] for row in report["rows"]] == list(written.ROWS)
    assert len(scores) == 2 * len(written.ROWS)
    for number, own in enumerate(scores):
        alike = [other for other, one in enumerate(scores) if torch.equal(one, own)]
        assert alike == [number]
    params = {row["name"]: row["params"] for row in report["rows"]}
    for kind in written.KINDS:
        assert params[f"SAERec, {kind}"] == params["SAERec"]
        assert params[f"Grounded, {kind}"] == params["Grounded without match"]


def test_numbers_are_those_of_the_ranks(study, run, data):
    _, report, _ = study
    places = written.reviewed_places(data)
    assert report["reviewed"] == len(places) and report["users"] == len(data.users)
    assert report["library"] == len(sae.load_intents(run, data).vectors)
    assert report["training"] == len(data.training_items()) > report["reviewed"]
    means = {}
    for row in report["rows"]:
        for part in written.PARTS:
            ranks = [ranks_of(run, row["name"], seed)[part] for seed in (0, 1)]
            values = [saerec.ranking_metrics(one)["NDCG@10"] for one in ranks]
            assert row[f"{part} NDCG@10"]["per_seed"] == values
            means[row["name"], part] = significance.user_means(ranks).mean()
        assert len(row["epochs"]) == 2 and set(row["epochs"]) <= {1, 2, 3}
    for part in written.PARTS:
        tests = report[f"{part} tests"]
        assert [(test["a"], test["b"]) for test in tests] == written.compared()
        for test in tests:
            difference = means[test["a"], part] - means[test["b"], part]
            assert test["difference"] == pytest.approx(difference, abs=1e-12)


def test_pairs_are_of_rows_and_ask_what_the_study_asks():
    pairs = written.compared()
    assert len(pairs) == len(set(pairs)) == 15
    assert {name for pair in pairs for name in pair} == set(written.ROWS)
    for name in ("Grounded", "SAERec"):
        assert (f"{name}, others' reviews", f"{name}, own reviews") in pairs
        assert (f"{name}, item codes", f"{name}, both") in pairs
    assert ("SAERec, public branch alone", "SAERec, own reviews") in pairs


def test_it_goes_on_where_it_stopped(study, run, capsys, monkeypatch):
    command, report, _ = study
    path = run / "written-saerec-both-1.safetensors"
    path.unlink()
    capsys.readouterr()
    assert written.main(command) == 0
    said = capsys.readouterr().out
    assert said.count(", seed ") == 1 and "SAERec, both, seed 1" in said
    again = json.loads((run / "written.json").read_text())
    for one in (report, again):
        for row in one["rows"]:
            row.pop("seconds", None)
    assert again == report
    changed = written.Row(written.WrittenSAERec, "own reviews")
    monkeypatch.setitem(written.ROWS, "SAERec, both", changed)
    assert written.main(command) == 0
    assert capsys.readouterr().out.count(", seed ") == 2


def test_rows_that_are_left_out_are_in_no_pair(study, run, tmp_path):
    """The others, and the tests of one another, stay as they are but for Holm's correction."""
    command, report, _ = study
    skipped = ["SASRec", "Grounded, others' reviews"]
    out = tmp_path / "out.json"
    assert written.main([*command, "--skip", "; ".join(skipped), "--out", str(out)]) == 0
    got = json.loads(out.read_text())
    kept = [row for row in report["rows"] if row["name"] not in skipped]
    for row, other in zip(got["rows"], kept, strict=True):
        assert row | dict(seconds=0) == other | dict(seconds=0)

    def told(report):
        tests = [test for part in written.PARTS for test in report[f"{part} tests"]]
        tests = [test for test in tests if not {test["a"], test["b"]} & {*skipped}]
        return [(test["a"], test["b"], test["difference"], test["p"]) for test in tests]

    assert told(got) == told(report) and len(told(got)) < 2 * len(written.compared())


def test_what_was_trained_with_other_settings_is_not_taken(study, run, data):
    path = run / "written-sasrec-0.safetensors"
    kept = ("written.py", dict(row=["SASRec", "item codes"]))
    settings = model.ModelSettings(**saerec.artifact_meta(path, "")["settings"])
    ranks, more = written.finished(path, *kept, settings, data)
    assert torch.equal(ranks["test"], ranks_of(run, "SASRec", 0)["test"]) and more["parameters"]
    moved = dataclasses.replace(settings, run="elsewhere")
    assert written.finished(path, *kept, moved, data)
    wider = dataclasses.replace(settings, width=16)
    assert written.finished(path, *kept, wider, data) is None
    other = dict(row=["SASRec", "both"])
    assert written.finished(path, "written.py", other, settings, data) is None
    assert written.finished(run / "written-none-0.safetensors", *kept, settings, data) is None


def test_results_of_another_library_are_not_mixed_in(fails, study, run, tmp_path):
    command, _, _ = study
    copy = tmp_path / "run"
    copy.mkdir()
    for path in run.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    assert sae.main(["--run", str(copy), *SMALL["sae"].split(), "--seed", "5"]) == 0
    command = ["--run", str(copy), *command[2:]]
    fails(written.main, command, "made from another", "rm ", "written-*", "studies/written.py")


def test_wrong_flags(fails, run):
    fails(written.main, ["--run", run, "--model-flags", "--widht 9"], "did you mean --width?")
    fails(written.main, ["--run", run, "--seeds", "0"], "--seeds")
    fails(written.main, ["--run", run, "--skip", "SAERek"], "no row 'SAERek'", "SAERec, both")
    fails(written.main, ["--run", run, "--skip", "; ".join(written.ROWS)], "leaves no row")
