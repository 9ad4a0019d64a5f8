"""The method in numbers small enough to check on paper. Read this first; the order is that of the stages.

Users ann and bob have five and three items; intents and vectors have two or three dimensions. What
is here by hand is in test_2_invariants.py by a second formulation, on larger random input.
"""

import hashlib
import math
import types
import unicodedata

import numpy as np
import pytest
import torch

import embed
import eval as evaluation
import model
import sae
import saerec
from conftest import text, write_folder


# The split


def test_split_leaves_the_last_two_items_out(tmp_path):
    sequences = "ann a b c d e\nbob b a c\ncid a b\n"
    texts = text("a") + text("b") + text("c") + text("d")
    data = saerec.load_dataset(write_folder(tmp_path / "d", sequences, texts))
    assert data.users == ["ann", "bob"]  # cid has too few items
    assert data.items == ["", "a", "b", "c", "d", "e"]  # number 0 is padding
    assert data.history(0, "valid").tolist() == [1, 2, 3]  # ann: a b c, then d is held out
    assert data.history(0, "test").tolist() == [1, 2, 3, 4]  # then e
    assert data.history(1, "valid").tolist() == [2]
    assert data.targets("valid").tolist() == [4, 1]
    assert data.targets("test").tolist() == [5, 3]
    assert data.training_items().tolist() == [1, 2, 3, 2]
    with pytest.raises(KeyError):
        data.history(0, "tset")
    assert data.notes == [
        "1 user(s) with fewer than 3 items left out",
        "1 item(s) without text kept, with no intents: e",
    ]


def test_a_text_written_in_a_held_out_interaction_is_left_out(tmp_path):
    """ann's own words about c and d would tell what she took; bob's about d are legitimate."""
    texts = text("a", user="ann") + text("c", user="ann") + text("d", user="ann")
    texts += text("d", user="bob") + text("b")
    data = saerec.load_dataset(write_folder(tmp_path / "d", "ann a b c d\nbob d a b c\n", texts))
    assert [data.items[item] for item in data.text_item] == ["a", "d", "b"]
    assert "2 text(s) written in held-out interactions left out" in data.notes


def test_a_user_with_too_few_items_has_nothing_held_out(tmp_path):
    """cid is not ranked, so what he wrote about his two items may be read."""
    folder = write_folder(tmp_path / "d", "ann a b c d\ncid a b\n", text("a", user="cid"))
    data = saerec.load_dataset(folder)
    assert [data.items[item] for item in data.text_item] == ["a"]


def test_training_rows_end_before_what_is_held_out(tmp_path):
    """ann's training items are a b c: inputs a and b, whose targets are b and c."""
    folder = write_folder(tmp_path / "d", "ann a b c d e\n", text("a"))
    data = saerec.load_dataset(folder)
    rows = model.training_rows(data, history=50)
    flat = torch.from_numpy(data.flat).long()
    batch = model.make_batch(rows, torch.tensor([0]), flat, torch.device("cpu"))
    assert batch.items.tolist() == [[1, 2]] and batch.target.tolist() == [2, 3]
    assert batch.real.tolist() == [0, 1] and batch.weight.tolist() == [0.5, 0.5]
    cut = model.training_rows(data, history=1)  # from the end, each position once
    assert cut.begin.tolist() == [1, 0] and cut.length.tolist() == [1, 1]


# Ranking


def test_rank_leaves_out_the_history_and_counts_ties_against_the_target():
    scores = torch.tensor([[9.0, 0.5, 0.9, 0.5, 0.1]])  # of padding and items 1 to 4
    nothing = torch.zeros(1, 1, dtype=torch.int64)

    def rank(target, seen):
        return saerec.target_ranks(scores, torch.tensor([target]), seen).item()

    assert rank(2, nothing) == 1  # padding's 9.0 does not count
    assert rank(1, nothing) == 3  # item 3 ties and counts as ahead
    assert rank(1, torch.tensor([[2, 0]])) == 2  # item 2 is in the history
    assert rank(1, torch.tensor([[1, 0]])) == math.inf  # a target already seen is a miss
    assert saerec.target_ranks(0 * scores, torch.tensor([4]), nothing).item() == 4  # all tie: last
    with pytest.raises(FloatingPointError, match="diverged"):
        saerec.target_ranks(torch.nan * scores, torch.tensor([4]), nothing)


def test_metrics_of_four_users():
    got = saerec.ranking_metrics(torch.tensor([1.0, 3.0, 11.0, torch.inf], dtype=torch.float64))
    assert got["HR@5"] == got["HR@10"] == 2 / 4 and got["HR@20"] == 3 / 4
    assert got["NDCG@5"] == pytest.approx((1 + 1 / 2) / 4)  # log2(1 + 1) = 1, log2(3 + 1) = 2
    assert got["NDCG@20"] == pytest.approx((1 + 1 / 2 + 1 / math.log2(12)) / 4)
    assert got["MRR"] == pytest.approx((1 + 1 / 3 + 1 / 11) / 4)


# The sparse autoencoder


def small_sae(active=1):
    """Three latents in two dimensions: right, up, and left."""
    net = sae.SAE(3, active, 2)
    rows = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    with torch.no_grad():
        net.W_enc.copy_(rows)
        net.W_dec.copy_(rows)
        net.b_enc.copy_(torch.tensor([0.0, 0.5, 0]))
    return net


def test_topk_code_keeps_the_largest_latent_alone():
    codes = small_sae().encode(torch.tensor([[3.0, 2.0], [-1.0, -4.0]]))
    assert codes.latents.tolist() == [[0], [2]]  # 3 beats 2 + .5; left has 1, the others less
    assert codes.values.tolist() == [[3.0], [1.0]]
    both = small_sae(active=2).encode(torch.tensor([[3.0, 2.0]]))
    assert both.latents.tolist() == [[0, 1]] and both.values.tolist() == [[3.0, 2.5]]
    assert small_sae(active=2).decode(both).tolist() == [[3.0, 2.5]]


def test_the_loss_is_the_squared_error_and_auxk_is_its_share_that_dead_latents_leave():
    net = small_sae()
    x = torch.tensor([[3.0, 2.0]])
    codes = net.encode(x)  # right, 3: x_hat = (3, 0), the residual is (0, 2)
    settings = types.SimpleNamespace(auxk=1, auxk_weight=0.25)
    dead = torch.tensor([1])  # up: 2 + .5 = 2.5 of the residual's 2, so .5 is left
    loss, reconstruction = net.loss(x, codes, dead, settings)
    assert reconstruction.item() == 4.0
    assert sae.auxk_loss(net, x, net.decode(codes), dead, 1).item() == 0.5**2 / 2**2
    assert loss.item() == 4.0 + 0.25 * 0.0625
    alone, _ = net.loss(x, codes, torch.tensor([]).long(), settings)
    assert alone.item() == 4.0  # none dead, no auxk


def test_a_latent_is_dead_after_so_many_texts_without_it():
    net = small_sae()
    net.last_active.copy_(torch.tensor([20, 40, 39]))  # texts seen when it last fired
    net.fired(sae.Codes(torch.tensor([[0.5], [0.0]]), torch.tensor([[0], [1]])), seen=100)
    assert net.last_active.tolist() == [100, 40, 39]  # a code of 0 is no firing
    assert net.dead(seen=100, patience=60).tolist() == [False, False, True]


def test_codes_are_scaled_to_rebuild_best():
    """Two rows that are the same overshoot by two: 3 + 3 for a text that is 3."""
    net = sae.SAE(2, 2, 2)
    rows = torch.tensor([[1.0, 0], [1.0, 0]])
    net.W_enc.data = rows.clone()
    net.W_dec.data = rows.clone()
    x = torch.tensor([[3.0, 4.0], [1.0, 0]])
    net.fit_gain(x)
    assert net.W_enc.tolist() == [[0.5, 0], [0.5, 0]] and net.W_dec.tolist() == rows.tolist()
    assert net.decode(net.encode(x)).tolist() == [[3.0, 0], [1.0, 0]]
    net.fit_gain(x)  # which is the best already
    assert net.W_enc.tolist() == [[0.5, 0], [0.5, 0]]


def test_kmeans_of_two_pairs_and_of_two_texts():
    x = torch.tensor([[0.0, 0], [0, 2.0], [8.0, 0], [8.0, 2.0]])
    centroids = sae.kmeans(x, 2, torch.Generator().manual_seed(1))
    assert sorted(centroids.tolist()) == [[0, 1.0], [8.0, 1.0]]
    few = sae.kmeans(x[:2], 3, torch.Generator().manual_seed(0))
    assert sorted(few.tolist()) == [[0, 0], [0, 2.0]]  # no more centroids than texts


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_starts_at_distinct_texts(seed):
    """Of a thousand copies, equal up to rounding, one may start: else two would share them."""
    one = torch.tensor([[1.0, 1.0]]) + 1e-7 * torch.arange(1000)[:, None]
    x = torch.cat([one, torch.tensor([[5.0, 0.0], [0.0, 5.0]])])
    centroids = sae.kmeans(x, 4, torch.Generator().manual_seed(seed), rounds=0)
    assert sorted(centroids.round().tolist()) == [[0.0, 5.0], [1.0, 1.0], [5.0, 0.0]]


def test_saes_are_averaged_where_they_agree():
    """In the other SAE, right has turned a little and is number 1; up and left have no match."""
    first = small_sae()
    other = small_sae()
    rows = torch.tensor([[0.0, -1.0], [0.96, 0.28], [0.6, -0.8]])
    other.W_dec.data = rows.clone()
    other.W_enc.data = 3 * rows
    other.b_enc.data = torch.tensor([7.0, 1.0, 7.0])
    other.b_dec.data = torch.tensor([0.2, 0])
    net, support = sae.consensus([first, other])
    assert support.tolist() == [1, 0, 0]
    between = torch.tensor([1 + 0.96, 0.28])
    torch.testing.assert_close(net.W_dec.data[0], between / between.norm())
    torch.testing.assert_close(net.W_enc.data[0], torch.tensor([(1 + 2.88) / 2, 0.84 / 2]))
    assert net.b_enc.tolist() == [0.5, 0.5, 0] and net.b_dec.tolist() == pytest.approx([0.1, 0])
    assert net.W_dec.tolist()[1:] == net.W_enc.tolist()[1:] == [[0, 1], [-1, 0]]  # as they were
    assert first.b_enc.tolist() == [0, 0.5, 0]  # and so is the first


def test_one_sae_is_its_own_consensus():
    net, support = sae.consensus([small_sae()])
    assert support.tolist() == [0, 0, 0]
    assert net.W_enc.tolist() == small_sae().W_enc.tolist()


def test_copies_of_a_text_are_held_out_together():
    texts = ["a", "b", "a", "c", "d", "a"]
    digests = {text: hashlib.sha256(text.encode()).digest() for text in "abcd"}
    first, second, *_ = sorted("abcd", key=digests.get)
    assert sae.held_out_texts(texts, 0.25).tolist() == [text == first for text in texts]
    assert sae.held_out_texts(texts, 0.5).tolist() == [text in (first, second) for text in texts]


# The library


def test_an_items_code_is_the_mean_of_its_texts_codes():
    """Item 1 has two texts, item 2 one, item 3 none; latent 1 is no intent."""
    values = torch.tensor([[4.0, 1.0], [2.0, 0.0], [5.0, 3.0]])
    latents = torch.tensor([[0, 2], [2, 0], [1, 2]])
    number = torch.tensor([0, -1, 1])  # latent -> intent
    codes = sae.item_codes(sae.Codes(values, latents), torch.tensor([1, 1, 2]), 3, number)
    assert codes.dense().tolist() == [[0, 0], [2.0, 1.5], [0, 3.0], [0, 0]]  # row 0 is padding
    assert codes.row(1)[0].tolist() == [0, 1] and len(codes.row(3)[0]) == 0


def test_terms_are_words_and_phrases_within_punctuation():
    found = embed.terms_of("The Dark-Blue sky, and Bob's red car")
    words = {"dark-blue", "sky", "bob", "red", "car"}
    assert found == words | {"dark-blue sky", "bob red", "red car"}  # none across "," or "and"


def test_apostrophes_and_hyphens_stand_within_words_alone():
    """So that a word in quotes is the word, and of several dogs."""
    found = embed.terms_of("'Alien' dogs' x-ray, well- made; great--really, -a rock'n'roll-")
    words = {"alien", "dogs", "x-ray", "well", "made", "great", "really", "rock'n'roll"}
    pairs = {"alien dogs", "dogs x-ray", "well made", "great really"}
    assert found == words | pairs


def test_particles_stand_within_a_phrase_but_not_at_its_end():
    phrases = {"de niro", "robert de niro"}
    assert embed.terms_of("Robert de Niro") == {"robert", "de", "niro"} | phrases
    phrases = {"maria de la cruz", "de la cruz", "cruz drama"}
    assert embed.terms_of("Maria de la Cruz drama") == {*"maria de la cruz drama".split()} | phrases
    assert embed.terms_of("la vita, casa de") == {"la", "vita", "la vita", "casa", "de"}
    assert embed.terms_of("北 de 京") == {"北", "de", "京", "de 京", "北 de 京"}
    names = ["robert de niro", "brian de palma", "de niro"]
    assert embed.distinct(names, 3) == names[:2]  # alike by niro, not by de


def test_a_phrase_is_of_two_words_and_each_ideograph_is_one():
    phrases = ["space war", "\u5317\u4eac", "\u4eac 2008"]
    words = ["space", "film-noir", "\u5317", "\u0939\u093f\u0928\u094d\u0926\u0940", "\u30ab\u30ca"]
    assert all(map(embed.is_phrase, phrases)) and not any(map(embed.is_phrase, words))


def test_keywords_are_more_frequent_in_an_intents_texts():
    """Of 8 training texts an intent has 4. "space war" is in 3 of them and no other, "film" in all,
    "war" in 3 of its 4 and one more, which is half of all, and "shot" in most texts."""
    names = ["film", "space war", "war", "sea", "shot"]
    counts = [np.array(one) for one in ([4, 3, 3, 1, 4], [8, 3, 4, 2, 5])]
    found = sae.find_keywords(names, *counts, active=4, total=8, count=5)
    assert list(found) == ["space war"]
    inside, outside = 3.5 / 5, 0.5 / 5
    assert found["space war"] == pytest.approx(math.log(inside / outside))


def test_keywords_come_in_the_order_of_what_they_tell_and_share_no_word():
    """Of 16 training texts an intent has 4: "war" is in these alone, "boat" in two of them alone,
    "sea" in three and three others; "space war", in three, has the word of "war"."""
    names = ["sea", "space war", "war", "boat"]
    counts = np.array([3, 3, 4, 2]), np.array([6, 3, 4, 2])
    found = sae.find_keywords(names, *counts, active=4, total=16, count=3)
    assert list(found) == ["war", "boat", "sea"]


def test_a_word_means_an_intent_by_what_its_texts_are_beyond_all():
    """The intent's texts have the mean (4, 1), all texts (2, 1.5): less that it is (2, -.5)."""
    x = torch.tensor([[4.0, 0.0], [4.0, 2.0], [0.0, 1.0], [0.0, 3.0]])
    none_held_out = torch.zeros(4, dtype=torch.bool)
    corpus = sae.Corpus(None, x, none_held_out, {"right": 0, "up": 1}, torch.eye(2))
    scores, numbers = sae.meanings(corpus, [torch.tensor([0, 1])], ["right", "up"])
    assert numbers.tolist() == [[0, 1]] and scores[0, 0] > 0 > scores[0, 1]


def test_marks_stay_with_their_letters_and_ideographs_are_words():
    assert embed.terms_of("देखकर बहुत अच्छा") == {
        "देखकर", "बहुत", "अच्छा", "देखकर बहुत", "बहुत अच्छा",
    }  # fmt: skip
    decomposed = unicodedata.normalize("NFD", "médecin hôpital")
    assert embed.terms_of(decomposed) == {"médecin", "hôpital", "médecin hôpital"}
    assert embed.terms_of("می‌خواهم") == {"می‌خواهم"}  # a joiner is no gap
    assert embed.terms_of("北京 2008, 大") == {"北", "京", "北京", "2008", "京 2008", "大"}


def test_contractions_of_stop_words_are_stop_words():
    said = "It's Bob's boat; they're here, he isn't, I didn't, we can\u2019t. The O'Brien clock won't"
    assert embed.terms_of(said) == {
        "bob", "boat", "bob boat", "here", "o'brien", "clock", "o'brien clock",
    }  # fmt: skip


def test_terms_alike_share_a_word_or_a_stem():
    assert embed.alike("bird", "birds") and embed.alike("west", "western")
    assert embed.alike("space war", "war film") and not embed.alike("france", "french")
    assert not embed.alike("car", "care") and not embed.alike("sea", "season film")
    assert embed.alike("北京", "京") and not embed.alike("北京", "大")
    terms = ["1992", "birds", "bird", "sea birds", "sea", "42 21", "seas"]
    assert embed.distinct(terms, 3) == ["birds", "sea"]
    assert embed.distinct(["a1", "b2", "c3"], 2) == ["a1", "b2"]


def test_a_word_that_is_always_said_within_a_phrase_gives_way_to_it():
    times = {"hong": 10, "kong": 11, "hong kong": 10, "lee": 9, "ang lee": 4, "film": 2}
    found = list(embed.whole_phrases(["kong", "lee", "hong kong", "film"], times))
    assert found == ["hong kong", "lee", "hong kong", "film"]  # 10 / 11 is .9 and more
    assert embed.distinct(embed.whole_phrases(["hong", "kong"], times), 2) == ["hong kong"]
    assert list(embed.whole_phrases(["香"], {"香": 10, "港": 10, "香港": 10})) == ["香港"]


def test_names_are_what_the_texts_say_and_others_do_not():
    """By hand: (share of the intent's texts, of all texts) weigh what a word's meaning scores."""
    shares = {"sea": (0.8, 0.1), "boat": (0.1, 0.2), "film": (1.0, 0.9), "ocean": (0.2, 0.1)}
    shares["land"] = (0.9, 0.1)
    names = sae.name_words(dict(film=5.0, boat=4.0, ocean=7.9, sea=2.0, land=-1.0), shares)
    # sea 2 (.1 + .7) = 1.6; ocean 7.9 (.1 + .1) = 1.58; others say boat as often; most say film;
    # land means something else
    assert names == ["sea", "ocean"]
    assert sae.name_words(dict(sea=1.0), {"sea": (0.9, 0.5)}) == []  # half of all texts say it


def named(texts, codes, vectors, intents=1):
    """The labels of intents whose codes fire on the first of the texts, by sae.py's rules.

    texts: list of str; codes: of the first ones; vectors: {word: its vector}. Texts on which they
    fire have the embedding (1, 0), the others (0, 1), and all are training texts.
    """
    x = torch.tensor([[1.0, 0.0]] * len(codes) + [[0.0, 1.0]] * (len(texts) - len(codes)))
    words = {word: row for row, word in enumerate(vectors)}
    words_of = torch.tensor(list(vectors.values())).view(-1, 2)
    data = types.SimpleNamespace(texts=texts)
    corpus = sae.Corpus(data, x, torch.zeros(len(texts), dtype=torch.bool), words, words_of)
    bounds = torch.arange(intents + 1) * len(codes)
    cells = torch.arange(len(codes), dtype=torch.int32).repeat(intents)
    fires = sae.SparseRows(bounds, cells, torch.tensor(codes * intents), columns=len(texts))
    return [label for label, _ in sae.name_intents(torch.arange(intents), fires, corpus, 5)]


def test_a_name_is_what_the_strongest_texts_say():
    """Of five texts with codes 3, 1, 1, 1, 1 the first has 9 / 13 of the squares, the others 4."""
    texts = ["sail wind", "calm", "calm", "calm", "calm", *["sail wind"] * 2, *["land"] * 12]
    vectors = dict(sail=[1.0, 0.0], calm=[0.9, 0.0], land=[0.0, 1.0]) | {"sail wind": [0.8, 0.0]}
    # sail, never without wind, means more and is in 9 / 13; calm is in 4 / 13, so both stand
    assert named(texts, [3.0, 1.0, 1.0, 1.0, 1.0], vectors) == ["sail wind, calm"]
    # with codes 1.1 it has 1.21 / 5.21 of the squares and 1.1 / 5.1 of the codes: below a quarter
    assert named(texts, [1.1, 1.0, 1.0, 1.0, 1.0], vectors) == ["calm"]
    # with 1.2 it is 1.44 / 5.44 of the squares, more than a quarter, and 1.2 / 5.2 of the codes
    assert named(texts, [1.2, 1.0, 1.0, 1.0, 1.0], vectors) == ["calm, sail wind"]
    # no word has a vector: keywords alone
    assert named(texts, [3.0, 1.0, 1.0, 1.0, 1.0], {}) == ["calm"]


def test_what_tells_equal_names_apart_is_said_by_a_tenth():
    """Others say squid less, but so does all but one text of twenty; three say gull.

    Both mean as much. Squid has .05 here and .03 in all: .1 + .02; gull .15 and .14: .1 + .01.
    """
    own = ["sail squid", *["sail gull"] * 3, *["sail"] * 16]
    texts = [*own, *["land squid"] * 2, *["land gull"] * 11, *["land"] * 67]
    vectors = {word: [1.0, 0.0] for word in ("sail", "squid", "gull")} | {"land": [0.0, 1.0]}
    assert named(texts, [1.0] * 20, vectors, intents=2) == ["sail", "sail, gull"]
    # if nothing else is, the number of the latent tells them apart
    assert named(own[:1] + own[4:] + texts[20:], [1.0] * 17, vectors, intents=2) == ["sail", "sail (1)"]


def test_neighbours_get_different_names():
    """Both intents are nearest to the first word; only the first intent may have it."""
    vectors = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    centers = torch.tensor([[1.0, 0.1], [0.9, 0.3]])
    scores, words = sae.words_by_meaning(centers, torch.eye(2), vectors)
    assert words[:, 0].tolist() == [0, 1]
    # 1 less half of .9 for the first; .6 x .9 + .8 x .3 = .78 less half of .68 for the second
    assert scores[:, 0].tolist() == pytest.approx([0.55, 0.44], abs=1e-2)
    scores, _ = sae.words_by_meaning(centers[:1], torch.eye(2), vectors)
    assert scores[0, 0].item() == pytest.approx(1, abs=1e-2)  # one intent has no rival


def test_what_a_language_model_judged_to_be_none_is_not_counted():
    row = dict(label="sea", texts=["a sea"], density=0.1, detection_auroc=0.9, detection_texts=3)
    others = (dict(is_intent=True), dict(is_intent=False), dict(detection_auroc=None))
    rows = [row, *(row | other for other in others)]
    said = list(evaluation.describe_library(rows, top=5))
    assert said[0].startswith("3 intents; 2 fire on 3 held-out texts or more") and "0.90" in said[0]
    assert len(said) == 1 + 2 * 2  # of each judged one its label and a text


def test_labels_differ():
    taken = set()
    for expected in ("sea, boat", "sea, boat, sand", "sea, boat, sand (7)"):
        label = sae.label_of(["sea", "boat"], ["boat", "sand", "wind"], taken, 7)
        assert label == expected
    # The same words in another order would be the same name
    assert sae.label_of(["boat", "sea"], ["wind"], taken, 7) == "boat, sea, wind"
    assert sae.label_of([], ["sand", "wind"], taken, 7) == "sand"
    assert sae.label_of([], [], taken, 7) == "latent 7"


def test_the_texts_that_an_intent_explains_most_tell_its_name():
    """Of three texts with codes 2, 1 and 1, the first says sea, the others boat: 4 / 6 and 2 / 6."""
    cells = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 1], dtype=torch.int32)
    terms = sae.SparseRows(*cells, torch.ones(3), columns=3)
    share = sae.weighted_share(terms, torch.tensor([2.0, 1.0, 1.0]).square())
    assert share.tolist() == pytest.approx([4 / 6, 2 / 6, 0])
    nothing = terms.gather(torch.tensor([], dtype=torch.int64))  # fires on held-out texts alone
    assert sae.weighted_share(nothing, torch.tensor([])).tolist() == [0, 0, 0]


def test_labels_are_judged_by_their_meaning():
    """By cosine, "boat" and "nautical" tell texts 0 and 1 from 2 to 4, "sand" does not."""
    texts = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9], [0.2, 0.8]])
    x = torch.nn.functional.normalize(texts, dim=1)
    words = {"boat": 0, "nautical": 1, "sand": 2}
    vectors = torch.tensor([[1.0, 0.0], [0.9, -0.1], [0.0, 1.0]])
    held_out = torch.zeros(5, dtype=torch.bool)
    corpus = sae.Corpus(None, texts, held_out, words, vectors)
    fires = np.array([True, True, False, False, False])
    assert corpus.meaning_auroc("boat", x, fires) == 1
    assert corpus.meaning_auroc("sand (7)", x, fires) == 0
    assert corpus.meaning_auroc("unknown", x, fires) is None


def test_auroc_of_six_texts():
    scores = torch.tensor([3.0, 2.0, 2.0, 1.0, 0.0, 0.0]).numpy()
    positive = torch.tensor([1, 1, 0, 0, 1, 0]).bool().numpy()
    # Pairs won by the positives: 3 beats all 3; 2 ties with one, beats two; 0 ties with one
    assert sae.auroc(scores, positive) == pytest.approx((3 + 2.5 + 0.5) / 9)
    assert sae.auroc(scores, positive & False) is None


# SAERec: retrieval and fusion


def tiny_settings(**changes):
    return model.ModelSettings(run="x", width=2, layers=1, heads=1, dropout=0.0, **changes)


def tiny_intents():
    """Two intents over three items: item 1 has intent 0, item 2 both, item 3 none."""
    dense = torch.tensor([[0, 0], [2.0, 0], [1.0, 1.0], [0, 0]])
    indptr = torch.tensor([0, 0, 1, 3, 3])
    codes = sae.SparseRows(indptr, torch.tensor([0, 0, 1]).int(), dense[dense > 0], 2)
    return sae.Intents(torch.eye(2, 4), codes)


def tiny_model(Model, training=(1, 2, 3), **changes):
    """Three items; the interactions that statistics see are `training`."""
    items = torch.tensor(training).int().numpy()
    data = types.SimpleNamespace(items=["", "a", "b", "c"], training_items=lambda: items)
    return Model(tiny_settings(**changes), data, tiny_intents()).eval()


def test_the_absent_intent_is_nothing_and_is_not_counted():
    """D7 and D8: a position that no intent resembles lowers df, .9 of 4, and moves n by itself."""
    net = tiny_model(model.SAERec, personal=1, public=1).train()
    assert not net.d[-1].any()
    net.n.fill_(9)
    net.df.copy_(torch.tensor([4.0, 0.0]))
    z = torch.tensor([[3.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    assert net.personal_intents(torch.tensor([[-1.0, 0.0]]), z).tolist() == [[2]]
    assert net.df.tolist() == pytest.approx([3.6, 0]) and net.n.item() == pytest.approx(8.2)


def test_personal_intents_are_similar_to_the_position_and_rare():
    """h points right. Intent 0 is similar (cosine 1) but in half of the positions; intent 1 at 45
    degrees is rare, and wins: .71 log(10/1) = 1.63 against 1 log(10/5) = .69."""
    net = tiny_model(model.SAERec, personal=1, public=1)
    net.n.fill_(9)
    net.df.copy_(torch.tensor([4.0, 0.0]))
    h = torch.tensor([[2.0, 0]])
    z = torch.tensor([[3.0, 0], [1.0, 1.0], [0, 0]])  # the last row is the absent intent
    assert net.personal_intents(h, z).tolist() == [[1]]
    away = torch.tensor([[-1.0, 0]])  # no cosine is above 0: the absent intent, number J = 2
    assert net.personal_intents(away, z).tolist() == [[2]]
    assert net.public_intents().tolist() == [0]  # the one of the highest df
    assert net.n.item() == 9  # nothing moves in evaluation
    net.train().personal_intents(h, z)  # intent 0 is the most similar in this one position
    assert net.n.item() == pytest.approx(0.9 * 9 + 0.1 * 1)
    assert net.df.tolist() == pytest.approx([0.9 * 4 + 0.1, 0])


def test_fusion_weighs_branches_by_their_product_with_the_trunk():
    a = torch.tensor([[1.0, 0, 0, 0]])
    b = torch.tensor([[2.0, 0, 0, 0]])  # <a, b> / sqrt(4) = 1
    c = torch.tensor([[0, 4.0, 0, 0]])  # <a, c> / sqrt(4) = 0
    w = math.e / (math.e + 1)
    parts = model.SAERec.fuse(a, b, c)
    expected = torch.tensor([[1.0, 0, 0, 0], [2 * w, 0, 0, 0], [0, 4 * (1 - w), 0, 0]])
    torch.testing.assert_close(parts[:, 0], expected)


# Grounded: items, match, reasons


def grounded():
    """p_0 = (1, 0), p_1 = (0, 10); ids are (0, .5). idf: of 3 interactions intent 0 is in 2."""
    net = tiny_model(model.Grounded, match=0.5, decay=0.5)
    with torch.no_grad():
        net.intent_vectors.copy_(torch.tensor([[1.0, 0], [0, 10.0]]))
        net.item.weight[1:] = torch.tensor([0, 0.5])
    return net


def test_an_item_is_its_id_and_its_intents():
    assert grounded().item_table().tolist() == [[0, 0], [2.0, 0.5], [1.0, 10.5], [0, 0.5]]


def test_rare_intents_count_more():
    """log((1 + n) / (1 + df)): intent 0 is carried by items 1 and 2, intent 1 by item 2 alone."""
    idf = grounded().idf.tolist()
    assert idf == pytest.approx([math.log(4 / 3), math.log(4 / 2)])


def test_what_a_history_is_about_fades():
    """Items 1, 2, 3: intent 0 has 2, then 2/2 + 1 = 2, then 1; intent 1 has 0, 1, .5."""
    net = grounded()
    items = torch.tensor([[1, 2, 3, 0]])
    r = net.history_intents(items, torch.tensor([0, 1, 2]))
    tf = torch.tensor([[2.0, 0], [2.0, 1.0], [1.0, 0.5]])
    torch.testing.assert_close(r, tf * net.idf)


def test_a_score_gains_by_what_an_item_shares_with_the_history():
    net = grounded()
    r = torch.tensor([[3.0, 0.2]])
    state = model.State(torch.tensor([[1.0, 0]]), torch.zeros(1, 1, 2), r=r)
    # <u, Y_v> is 0, 2, 1, 0; the match .5 times 0, 2 * 3, 1 * 3 + 1 * .2, 0
    expected = torch.tensor([[0, 2 + 3.0, 1 + 1.6, 0]])
    torch.testing.assert_close(net.scores(state, net.item_table()), expected)


def test_reasons_add_up_to_the_score():
    """Item 2: id part <u, e> = .5 * 1; intent 0: 1 * (<u, p_0> + .5 * 3), intent 1 likewise."""
    net = grounded()
    state = model.State(torch.tensor([[2.0, 1.0]]), torch.zeros(1, 1, 2), r=torch.tensor([[3.0, 0.2]]))
    reasons = net.reasons(state, 2)
    assert reasons.parts == {"id": 0.5}
    terms = dict(zip(reasons.intents.tolist(), reasons.terms.tolist()))
    assert terms == pytest.approx({1: 10 + 0.1, 0: 2 + 1.5})
    total = sum(reasons.parts.values()) + reasons.terms.sum().item()
    assert total == pytest.approx(net.scores(state, net.item_table())[0, 2].item())


def test_the_loss_is_the_cross_entropy_of_the_next_item():
    """Three items with scores 1, 2, 0 at one position whose target is item 2."""
    net = tiny_model(model.SASRec)
    table = torch.tensor([[0, 0], [1.0, 0], [2.0, 0], [0, 0]])
    u = torch.tensor([[1.0, 0]])
    batch = model.Batch(torch.tensor([[1]]), torch.tensor([0]), torch.tensor([2]), torch.ones(1))
    loss = model.full_softmax(net, model.State(u, u[None]), table, batch)
    assert loss.item() == pytest.approx(-math.log(math.exp(2) / (math.e + math.exp(2) + 1)))
