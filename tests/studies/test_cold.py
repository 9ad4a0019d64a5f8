"""Cold items: what of them the models may see, who ranks them, and against what."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import torch

import model
import sae
import saerec
from conftest import TOPICS, embed_words, text, write_folder
from studies import baselines, cold, significance

SHARE = 0.2  # 18 of 90 items, of three topics
SAE_FLAGS = "--latents 16 --active 3 --members 2 --steps 60 --batch 16 --min-items 2"
MODEL_FLAGS = "--epochs 6 --width 16 --batch 200 --history 8 --personal 3 --public 2 --lr 0.02"


def planted_sequences(users=240, items=90, length=8):
    """Users keep to one of three topics, of item i the i-th mod 3 -> {user: [item, ...]}."""
    random = np.random.default_rng(0)
    sequences = {}
    for user in range(users):
        own = np.arange(user % 3, items, 3)
        sequences[f"u{user}"] = [f"i{item}" for item in random.permutation(own)[:length]]
    return sequences


def write_planted(folder, sequences):
    """A dataset folder in which an item's text tells its topic."""
    texts = ""
    for item, topic in zip(range(90), itertools.cycle(TOPICS)):
        words = TOPICS[topic].split()
        said = f"{topic} {words[item % 4]} and {words[item // 3 % 4]} number {item}"
        texts += json.dumps({"item": f"i{item}", "text": said}) + "\n"
    lines = (" ".join([user, *row]) + "\n" for user, row in sequences.items())
    return write_folder(folder, "".join(lines), texts)


def command_of(run, seeds=1, share=SHARE):
    flags = ["--share", str(share), "--seeds", str(seeds), "--device", "cpu"]
    return ["--run", str(run), *flags, "--sae-flags", SAE_FLAGS, "--model-flags", MODEL_FLAGS]


def make_planted(folder, sequences):
    """A run, embedded, on planted items -> its folder."""
    folder.mkdir()
    assert embed_words(write_planted(folder / "data", sequences), folder / "run") == 0
    return folder / "run"


def world_of(run):
    settings = cold.ColdSettings(run=str(run), share=SHARE, device="cpu", sae_flags=SAE_FLAGS)
    return cold.prepare(settings, saerec.run_dataset(run))


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The study on planted items -> (run, its World, cold.json); tests must not write into it."""
    run = make_planted(tmp_path_factory.mktemp("cold") / "planted", planted_sequences())
    assert cold.main(command_of(run, seeds=2)) == 0
    return run, world_of(run), json.loads((run / "cold.json").read_text())


def model_settings(run, **more):
    sizes = dict(width=8, epochs=1, batch=200, personal=3, public=2, device="cpu")
    return model.ModelSettings(run=str(run / "cold"), **sizes, **more)


def train_warm(Model, run, world):
    """A Model of the warm world alone, trained for one epoch."""
    intents = cold.intents_for(Model, world.warm, "cpu")
    net = model.new_model(Model, model_settings(run), world.warm.data, intents)
    return model.train_model(net, world.warm.data)[0]


# The two worlds


def test_cold_items_depend_on_ids_alone(planted):
    _, world, _ = planted
    data = world.whole.data
    few, many = (cold.cold_items(data, share) for share in (0.1, 0.3))
    assert len(few) == 9 and len(many) == 27 and few < many
    turned = dataclasses.replace(data, items=["", *data.items[:0:-1]])
    assert cold.cold_items(turned, 0.1) == few
    assert len(cold.cold_items(data, 0.001)) == 1


SEQUENCES = "u1 a b c d x\nu2 a x b c d\nu3 x a b\nu4 x y x\nu5 d c b a\n"
DESCRIBED = "".join(text(item, title=item.upper()) for item in "abcdxy")
REVIEWS = (
    ("b", "u1", "of a training interaction"),
    ("c", "u1", "of one that is held out once x is gone"),
    ("x", "u1", "of a cold item, held out anyway"),
    ("x", "u2", "of a cold item, a training interaction"),
    ("b", "u3", "held out by the run; without x its user has too few items to be split"),
)


@pytest.fixture
def by_hand(tmp_path):
    """(Dataset, the one without its cold items x and y)."""
    rows = [dict(item=item, user=user, text=said) for item, user, said in REVIEWS]
    reviews = "".join(json.dumps(row) + "\n" for row in rows)
    data = saerec.load_dataset(write_folder(tmp_path / "data", SEQUENCES, DESCRIBED + reviews))
    cold.write_warm_data(tmp_path / "warm", data, {"x", "y"})
    return data, saerec.load_dataset(tmp_path / "warm")


def test_the_world_without_cold_items_by_hand(by_hand, tmp_path):
    data, warm = by_hand
    lines = (tmp_path / "warm" / "sequences.txt").read_text()
    assert lines == "u1 a b c d\nu2 a b c d\nu3 a b\nu5 d c b a\n"
    assert warm.users == ["u1", "u2", "u5"] and warm.items == ["", "a", "b", "c", "d"]
    assert len(data.texts) == 6 + 3  # of the reviews, two are held out by the run itself
    described = [f"text of {item}" for item in "abcd"]
    assert warm.texts == [*described, "of a training interaction"]
    assert warm.text_item.tolist() == [1, 2, 3, 4, 2]


def test_the_world_with_them_by_hand(by_hand):
    data, warm = by_hand
    rows = cold.cold_texts(data, {"x", "y"})
    assert [data.texts[row] for row in rows] == ["text of x", "text of y"]  # and no review
    whole = cold.whole_data(warm, data, {"x", "y"}, rows)
    assert whole.items == ["", "a", "b", "c", "d", "x", "y"]
    assert whole.titles[1:] == ["A", "B", "C", "D", "X", "Y"]
    assert whole.users == ["u1"]  # u4 has no warm item, u2's last one is warm
    assert whole.history(0, "test").tolist() == [1, 2, 3, 4]
    assert whole.targets("test").tolist() == [5]
    assert whole.texts == [*warm.texts, "text of x", "text of y"]
    assert whole.text_item.tolist() == [1, 2, 3, 4, 2, 5, 6]


def test_no_cold_item_is_among_what_training_reads(planted):
    run, world, report = planted
    data = saerec.run_dataset(run)
    gone = cold.cold_items(data, SHARE)
    warm = world.warm.data
    assert len(gone) == report["cold_items"] == 18 and report["warm_items"] == 72
    assert not gone & set(warm.items) and gone == set(world.whole.data.items[len(warm.items) :])
    for name in ("sequences.txt", "texts.jsonl"):
        written = (run / "cold" / "data" / name).read_text().replace('"', " ").split()
        assert not gone & set(written)
    assert len(world.warm.embeddings) == 72
    expected = []
    for user, row in planted_sequences().items():
        if row[-1] in gone and len(set(row) - gone) >= 3:
            expected.append(user)
    assert world.whole.data.users == expected and report["users"] == len(expected) > 30


def test_texts_keep_their_embeddings(planted):
    run, world, _ = planted
    data = saerec.run_dataset(run)
    own = saerec.load_artifact(run / "embeddings.safetensors", "")[0]["embeddings"]
    vector = dict(zip(data.texts, own))
    for one in (world.warm, world.whole):
        expected = torch.stack([vector[said] for said in one.data.texts])
        assert torch.equal(one.embeddings, expected)


def test_warm_items_have_the_same_codes_in_both_worlds(planted):
    _, world, _ = planted
    codes = [cold.intents_for(model.Grounded, one, "cpu").codes.dense() for one in world]
    torch.testing.assert_close(codes[1][: len(codes[0])], codes[0])
    loaded = sae.load_intents(world.warm.settings.run, world.warm.data).codes.dense()
    assert torch.equal(codes[0], loaded)
    assert (codes[1][len(codes[0]) :].sum(1) > 0).all()  # a text alone gives an item its intents


@pytest.mark.parametrize(
    "Model", [model.SASRec, model.SAERec, model.Grounded, baselines.SASRecWithText]
)
def test_other_cold_interactions_train_the_same_model(planted, tmp_path, Model):
    """Each cold item becomes another one, and more of them come in."""
    run, world, _ = planted
    gone = sorted(cold.cold_items(saerec.run_dataset(run), SHARE))
    other = dict(zip(gone, [*gone[1:], gone[0]]))
    sequences = planted_sequences()
    for user, row in sequences.items():
        sequences[user] = [other.get(item, item) for item in row]
    for user, item in zip(list(sequences)[:60], itertools.cycle(gone)):
        sequences[user].insert(2, item)
        sequences[user].append(item)
    changed = make_planted(tmp_path / "changed", sequences)
    one = train_warm(Model, run, world).state_dict()
    two = train_warm(Model, changed, world_of(changed)).state_dict()
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


# Models that get to know them


@pytest.mark.parametrize(
    "Model", [model.SASRec, model.SAERec, model.Grounded, baselines.SASRecWithText]
)
def test_a_model_with_cold_items_is_the_same_for_warm_ones(planted, Model):
    run, world, _ = planted
    net = train_warm(Model, run, world)
    V = len(world.warm.data.items)
    assert len(net.item.weight) == V  # the softmax of training had no cold item
    larger = cold.with_cold_items(net, world)
    assert len(larger.item.weight) == len(world.whole.data.items)
    wide = dataclasses.replace(world.warm.data, items=world.whole.data.items)
    users = torch.arange(len(wide.users))
    with torch.no_grad():
        torch.testing.assert_close(larger.item_table()[:V], net.item_table())
        before = model.model_scores(net, world.warm.data, "test")(users)
        after = model.model_scores(larger, wide, "test")(users)
    torch.testing.assert_close(after[:, :V], before)
    unseen = larger.item.weight[V:]
    if Model in (model.Grounded, baselines.SASRecWithText):
        assert not unseen.any() and larger.item_table()[V:].any(1).all()
    else:
        assert unseen.std().item() == pytest.approx(0.02, rel=0.3)  # as training starts from


def test_text_ranks_cold_items_and_ids_do_not(planted):
    """Of 18 cold items 6 are of a user's topic: mean 1/rank by it is (1 + .. + 1/6) / 6 = .41."""
    _, _, report = planted
    level = report["chance"]["cold"]["MRR"]
    assert level == pytest.approx(sum(1 / rank for rank in range(1, 19)) / 18)  # .19
    reached = {row["name"]: row["cold"]["MRR"]["mean"] for row in report["rows"]}
    for name in ("Grounded", "SASRec + text", "item kNN by texts"):
        assert reached[name] > 0.33, reached
        assert max(reached["SASRec"], reached["SAERec"]) < 0.27, reached
    assert reached["popularity"] == pytest.approx(1 / 18)  # all tie, which counts against it
    whole = {row["name"]: row["all"]["MRR"]["mean"] for row in report["rows"]}
    assert whole["item kNN by texts"] > 2 * report["chance"]["all"]["MRR"]
    assert whole["popularity"] < report["chance"]["all"]["MRR"] < whole["Grounded"]


@pytest.mark.parametrize("Model", [model.SASRec, model.SAERec])
def test_untrained_ids_are_at_chance(planted, Model):
    """A draw of them ranks all users much alike; the mean of many is what chance expects."""
    run, world, report = planted
    net = train_warm(Model, run, world)
    reached = []
    for seed in range(40):
        net.settings = dataclasses.replace(net.settings, seed=seed)
        larger = cold.with_cold_items(net, world)
        score = model.model_scores(larger, world.whole.data, "test")
        only = cold.among(score, len(world.warm.data.items), len(world.whole.data.items))
        ranks = saerec.rank_users(only, world.whole.data, "test")
        reached.append(saerec.ranking_metrics(ranks)["MRR"])
    assert np.mean(reached) == pytest.approx(report["chance"]["cold"]["MRR"], abs=0.03)


# Ranking


def test_four_rankings_by_brute_force(planted):
    _, world, _ = planted
    warm, whole = world.warm.data, world.whole.data
    V = len(warm.items)
    table = torch.randn(len(warm.users), len(whole.items), generator=torch.manual_seed(0))
    ranks = cold.four_rankings(lambda data: lambda users: table[users], world)
    every = set(range(1, len(whole.items)))
    new = set(range(V, len(whole.items)))
    cases = [("cold", whole, new), ("all", whole, every), ("warm in all", warm, every)]
    for name, data, items in [*cases, ("warm", warm, every - new)]:
        assert len(ranks[name]) == len(data.users)
        for user, target in enumerate(data.targets("test").tolist()):
            others = items - {target} - set(data.history(user, "test").tolist())
            ahead = sum(bool(table[user, item] >= table[user, target]) for item in others)
            assert ranks[name][user] == 1 + ahead, name


def test_chance_by_hand(planted):
    level = cold.chance(20 * [20])
    assert level["HR@10"] == pytest.approx(0.5)
    assert level["MRR"] == pytest.approx(sum(1 / rank for rank in range(1, 21)) / 20)
    mixed = cold.chance([1, 20])  # a sole candidate is always first
    assert mixed == pytest.approx({name: (1 + level[name]) / 2 for name in cold.METRICS})
    _, world, report = planted
    assert report["chance"]["cold"]["HR@10"] == pytest.approx(10 / 18)
    whole = world.whole.data
    histories = [whole.history(user, "test").tolist() for user in range(len(whole.users))]
    expected = np.mean([10 / (90 - len(set(history))) for history in histories])
    assert report["chance"]["all"]["HR@10"] == pytest.approx(expected)


def test_the_decay_of_neighbours_is_chosen_on_warm_validation(planted, monkeypatch):
    run, world, _ = planted
    asked = []

    def note(score, data, part):
        asked.append((part, len(data.items)))
        return saerec.rank_users(score, data, part)

    monkeypatch.setattr(cold, "rank_users", note)
    ranker = cold.neighbours(world, model_settings(run))
    assert asked == [("valid", 73)] * 4 and 0 < ranker.valid < 1


# The study


def test_numbers_are_those_of_the_ranks(planted):
    run, _, report = planted
    assert report["seeds"] == [0, 1] and report["dataset"] == "data"
    means = {}
    for row in report["rows"]:
        slug = row["name"].lower().replace(" + ", " ").replace(" ", "-")
        paths = [run / "cold" / f"cold-{slug}-{seed}.safetensors" for seed in (0, 1)]
        ranks = [saerec.load_artifact(path, "")[0] for path in paths]
        for ranking in (*cold.COLD, *cold.WARM):
            values = [saerec.ranking_metrics(one[ranking])["MRR"] for one in ranks]
            cell = row[ranking]["MRR"]
            assert cell["per_seed"] == values and cell["mean"] == pytest.approx(np.mean(values))
            assert cell["std"] == pytest.approx(np.std(values, ddof=1))
            means[row["name"], ranking] = significance.user_means([one[ranking] for one in ranks])
    compared = [(test["ranking"], test["a"], test["b"]) for test in report["tests"]]
    controls = ("SASRec + text", "item kNN by texts")
    assert compared == [(one, "Grounded", name) for one in ("cold", "all") for name in controls]
    for test in report["tests"]:
        a, b = (means[test[side], test["ranking"]] for side in "ab")
        assert test["difference"] == pytest.approx((a - b).mean())
        assert test["p_holm"] >= test["p"] > 0


def test_study_resumes(planted, tmp_path, capsys):
    """What was removed is made again, and the run may have moved."""
    run, _, _ = planted
    first = json.loads((run / "cold.json").read_text())
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    (moved / "cold" / "cold-sasrec-text-0.safetensors").unlink()
    capsys.readouterr()
    out = tmp_path / "copy.json"
    assert cold.main([*command_of(moved, seeds=2), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert said.count(", seed ") == 1 and "SASRec + text, seed 0" in said
    assert "average: FVU" not in said and "rankers 1/1" in said
    again = json.loads(out.read_text())
    assert (moved / "cold.json").read_bytes() == out.read_bytes()
    for row in [*first["rows"], *again["rows"]]:
        row.pop("seconds")
    assert first == again


def test_changed_model_flags_train_again_and_other_worlds_are_refused(tmp_path, fails):
    run = make_planted(tmp_path / "planted", planted_sequences())
    settings = dict(run=str(run), device="cpu", sae_flags=SAE_FLAGS)
    data = saerec.run_dataset(run)
    world = cold.prepare(cold.ColdSettings(**settings, share=SHARE), data)
    path = run / "cold" / "cold-popularity-0.safetensors"
    one = model_settings(run)
    cold.finish("popularity", world, one, path)
    ranks, meta = cold.finished(path, one, world.warm.data)
    assert ranks.keys() == {*cold.COLD, *cold.WARM} and meta["parameters"] == 0
    assert cold.finished(path, dataclasses.replace(one, width=4), world.warm.data) is None
    assert cold.finished(path.with_name("cold-none-0.safetensors"), one, world.warm.data) is None
    words = (run / "cold", "--share, --seed or --sae-flags", "move the folder away")
    fails(cold.main, command_of(run, share=0.3), *words)
    fails(cold.main, [*command_of(run), "--seed", 1], *words)
    fails(cold.main, [*command_of(run), "--sae-flags", f"{SAE_FLAGS} --keywords 2"], *words)
    again = ["--run", run / "cold", "--data", run / "cold" / "data", "--seed", 3]
    assert sae.main([*map(str, again), *SAE_FLAGS.split()]) == 0
    words = ("made from another", "intents.safetensors", "rm ", "cold-*")
    fails(cold.main, [*command_of(run)], *words)


def test_wrong_flags(fails, planted):
    run = ["--run", planted[0]]
    fails(cold.main, [*run, "--share", 0.7], "--share is 0.7", "0.001 to 0.5")
    fails(cold.main, [*run, "--model-flags", "--widht 9"], "did you mean --width?")
    fails(cold.main, [*run, "--model-flags", "--seed 3"], "--model-flags: --seed", "leave it out")
    fails(cold.main, [*run, "--sae-flags", "--latent 9"], "did you mean --latents?")
    for flag in ("--seed 3", "--device cpu", "--run elsewhere", "--data elsewhere"):
        name = flag.split()[0]
        fails(cold.main, [*run, "--sae-flags", flag], f"--sae-flags: {name}", "leave it out")
    fails(cold.main, ["--share", "0.1"], "--run is missing")


def test_worlds_without_a_question(by_hand):
    data, warm = by_hand
    with pytest.raises(saerec.UserError, match="is the last of a user with 3 others: raise"):
        cold.whole_data(warm, data, {"y"}, [])
    only_reviews = dataclasses.replace(data, texts=data.texts[6:], text_item=data.text_item[6:])
    with pytest.raises(saerec.UserError, match="no text of the 2 cold items but reviews"):
        cold.cold_texts(only_reviews, {"x", "y"})


def test_a_world_without_a_question_is_refused_before_long_work(tmp_path, fails):
    """And what is left behind does not stand in the way of another --share."""
    ids = "abcdefghij"
    folder = write_folder(tmp_path / "data", f"u {' '.join(ids)}\n", "".join(map(text, ids)))
    gone = cold.cold_items(saerec.load_dataset(folder), 0.2)
    first = sorted(ids, key=lambda item: item not in gone)
    (folder / "sequences.txt").write_text(f"u {' '.join(first)}\n")
    run = tmp_path / "run"
    assert embed_words(folder, run) == 0
    for share in (0.1, 0.2):
        fails(cold.main, command_of(run, share=share), f"none of the {10 * share:.0f} cold items")
    assert not (run / "cold" / "sae.safetensors").exists()
    reviews = "".join(text(item, user="u") for item in ids)
    assert embed_words(write_folder(folder, f"u {' '.join(ids)}\n", reviews), run) == 0
    fails(cold.main, command_of(run), "has no text of the 2 cold items but reviews")
