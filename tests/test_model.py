"""The recommender: layers against torch's own, properties of the whole model, training."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model
import saerec
from conftest import copy_run, make_run, write_dataset

V, J, E = 30, 7, 6
BASE = model.ModelSettings(width=8, layers=2, heads=2, dropout=0.5, history=12, personal=3, public=2, epochs=3, batch=8)
VARIANTS = {
    "default": {},
    "similarity": dict(retrieval="similarity"),
    "paper": dict(paper=True),
    "personal only": dict(public=0),
    "public only": dict(personal=0),
    "no branches": dict(personal=0, public=0),
    "neither": dict(personal=0, public=0, match=0.0),
    "sasrec": dict(intents="none", personal=5, public=5),
    "gru": dict(trunk="gru"),
    "from the trunk": dict(retrieval="trunk"),
    "sum": dict(fusion="sum"),
    "concat": dict(fusion="concat"),
    "no match": dict(match=0.0),
}


def random_library(seed=0):
    g = np.random.default_rng(seed)
    codes = g.random((V + 1, J)).astype(np.float32) * (g.random((V + 1, J)) < 0.4)
    codes[[0, 5]] = 0  # padding, and an item without text
    indptr = np.concatenate([[0], np.cumsum((codes > 0).sum(1))])
    vectors = F.normalize(torch.randn(J, E, generator=torch.Generator().manual_seed(seed)), dim=1)
    return model.Library(vectors, torch.from_numpy(indptr), torch.from_numpy(np.nonzero(codes)[1].astype(np.int32)), torch.from_numpy(codes[codes > 0])), codes  # fmt: skip


LIBRARY, CODES = random_library()
FREQUENCY = (torch.tensor([5.0, 9, 1, 30, 2, 8, 4]), 60)


def build(seed=0, **changes):
    settings = model.resolve(dataclasses.replace(BASE, **changes))
    torch.manual_seed(seed)
    needs = settings.intents != "none"
    net = model.Recommender(settings, V, LIBRARY if needs else None, FREQUENCY if needs else None)
    with torch.no_grad():
        for p in net.parameters():  # large enough that everything matters
            p += 0.3 * torch.randn(p.shape)
        net.item.weight[0] = 0
        if needs and settings.retrieval == "similarity":
            net.df.copy_(FREQUENCY[0])
            net.n.fill_(FREQUENCY[1])
    return net.eval()


def histories(lengths, seed=0):
    """Histories in Dataset's form, and their personal intents -> (start, flat, (strength, intents) [interactions, k])."""
    g = np.random.default_rng(seed)
    start = np.concatenate([[0], np.cumsum(lengths)])
    flat = g.integers(1, V + 1, start[-1]).astype(np.int32)
    idf = model.inverse_frequency(*FREQUENCY)
    return start, flat, model.activation_retrieval(start, flat, LIBRARY, idf, 3, 0.9)


def batch_of(net, start, flat, personal, rows=None):
    """Padded (items, personal or None, target, real) of whole histories, the last item of each being only a target."""
    rows = rows or model.Rows(torch.from_numpy(start[:-1]), torch.from_numpy(np.diff(start) - 1))
    where, items, real = model.gather(rows, torch.arange(len(rows.length)), torch.from_numpy(flat).long())
    needs = net.has_intents and (net.settings.match or (net.settings.personal and net.settings.retrieval == "activation"))
    return items, [column[where] for column in personal] if needs else None, torch.from_numpy(flat).long()[where + 1], real


def states(net, items, personal, wanted):
    """User states [P, D] at the wanted positions, bool [B, T]."""
    with torch.no_grad():
        return net(items, places(wanted), None if personal is None else personal[1][wanted], net.item_table())


def places(wanted):
    return wanted.flatten().nonzero()[:, 0]


def as_batch(items, target, personal, wanted):
    """A Batch in which the wanted positions, bool [B, T], count alike."""
    weight = torch.full((int(wanted.sum()),), 1 / int(wanted.sum()))
    strength, intents = (None, None) if personal is None else (column[wanted] for column in personal)
    return model.Batch(items, places(wanted), target[wanted], weight, strength, intents)


def copy_into_torch(ours):
    """torch.nn.MultiheadAttention with the weights of one of our blocks."""
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([m.weight for m in (ours.query, ours.key, ours.value)]))
        theirs.in_proj_bias.copy_(torch.cat([m.bias for m in (ours.query, ours.key, ours.value)]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    return theirs


def finish(ours, x, attended):
    x = ours.attention_norm(x + attended)
    return ours.forward_norm(x + ours.contract(F.gelu(ours.expand(x))))


def test_self_attention_is_torchs_own():
    block, x = model.SelfAttention(8, 2, 0.3).eval(), torch.randn(4, 9, 8)
    mask = torch.triu(torch.ones(9, 9, dtype=torch.bool), 1)
    attended, _ = copy_into_torch(block)(x, x, x, attn_mask=mask)
    torch.testing.assert_close(block(x), finish(block, x, attended))


@pytest.mark.parametrize("shared", [False, True])
def test_cross_attention_is_torchs_own(shared):
    block, x, z = model.CrossAttention(8, 2, 0.3).eval(), torch.randn(11, 8), torch.randn(J + 1, 8)
    chosen = torch.tensor([4, 0, 7]) if shared else torch.randint(0, J + 1, (11, 3))
    keys = z[chosen].expand(11, 3, 8)
    attended, _ = copy_into_torch(block)(x[:, None], keys, keys)
    torch.testing.assert_close(block(x, z, chosen), finish(block, x, attended[:, 0]))


def test_fusion_by_hand():
    a = torch.tensor([[1.0, 0, 0, 0]])
    branches = torch.tensor([[[2.0, 0, 0, 0], [0, 4.0, 0, 0]]])  # <a, b> / sqrt(4) = 1 and 0
    w = np.exp(1) / (np.exp(1) + 1)
    torch.testing.assert_close(model.fuse(a, branches), torch.tensor([[1 + 2 * w, 4 * (1 - w), 0, 0]], dtype=torch.float32))


def test_grounded_items_by_equation():
    net = build()
    P, codes = net.ground.weight.T, torch.from_numpy(CODES)  # (E, D), (V+1, J)
    expected = net.item.weight + codes @ (LIBRARY.vectors @ P + net.residual[:-1])
    torch.testing.assert_close(net.item_table(), expected)
    torch.testing.assert_close(net.item_table()[5], net.item.weight[5])  # no text: its id alone
    assert net.item_table()[0].abs().sum() == 0


def test_ids_beside_intents_start_at_nothing_and_learn(tiny_run):
    """Before training items of equal codes are one, and the control's are not; both parts of equation (1) that start at 0 move."""
    data = saerec.run_dataset(tiny_run)
    library = model.load_library(tiny_run, data)
    items, frequency = len(data.items) - 1, model.intent_frequency(data, library)
    new = model.Recommender(BASE, items, library, frequency)
    assert not new.item.weight.any() and not new.residual.any() and new.item_table()[1:].any(1).sum() > items // 2
    for settings in (dataclasses.replace(BASE, intents="none"), dataclasses.replace(BASE, grounded=False)):
        assert model.Recommender(settings, items, library, frequency).item.weight[1:].any(1).all()
    trained = model.load_model(tiny_run, "sae", data, library)
    assert trained.item.weight[1:].any() and trained.residual.any() and not trained.item.weight[0].any()


def test_next_intent_loss_by_equation():
    net, u, target = build(), torch.randn(20, 8), torch.randint(1, V + 1, (20,))
    target[3] = 5  # without codes, left out
    log_q = (u @ (LIBRARY.vectors @ net.predict.weight.T).T).log_softmax(1)
    codes = torch.from_numpy(CODES)[target]
    has = codes.sum(1) > 0
    weight = torch.rand(20)
    expected = -(weight[has] * (codes[has] / codes[has].sum(1, keepdim=True) * log_q[has]).sum(1)).sum()
    torch.testing.assert_close(model.next_intent_loss(net, u, target, weight), expected)
    ids, places_in_ids = target.unique(return_inverse=True)
    torch.testing.assert_close(model.next_intent_loss(net, u, places_in_ids, weight, ids), expected)


@pytest.mark.parametrize("cells", [1, 100, 10**6])
def test_fused_logsumexp_is_torchs_own(cells):
    u, table, weight = torch.randn(23, 8, requires_grad=True), torch.randn(V, 8, requires_grad=True), torch.rand(23)
    extra = torch.randn(23, V)
    for more, scores in ((None, u @ table.T), (lambda at: extra[at], u @ table.T + extra)):
        expected, loss = weight @ scores.logsumexp(1), model.LogSumExp.apply(u, table, weight, more, cells)
        torch.testing.assert_close(loss, expected)
        for got, want in zip(torch.autograd.grad(3 * loss, (u, table)), torch.autograd.grad(3 * expected, (u, table))):
            torch.testing.assert_close(got, want)


def test_catalogue_loss_is_torchs_own():
    u, table, target = torch.randn(23, 8), torch.randn(V + 1, 8), torch.randint(1, V + 1, (23,))
    weight = torch.full((23,), 1 / 23)
    torch.testing.assert_close(model.catalogue_loss(u, table, target, weight), F.cross_entropy(u @ table[1:].T, target - 1))
    dense = torch.randn(23, V + 1)
    match = dense[torch.arange(23), target], lambda at: dense[at]
    torch.testing.assert_close(model.catalogue_loss(u, table, target, weight, match), F.cross_entropy((u @ table.T + dense)[:, 1:], target - 1))


def test_match_by_a_dense_product():
    """Second term of equation (9): r, as a dense matrix, times the codes; for all items, for some, and for one a position."""
    net = build(match=0.7)
    strength, intents = torch.rand(40, 3), torch.stack([torch.randperm(J + 1)[:3] for _ in range(40)]).int()
    strength[intents == J] = 0  # the absent intent
    r = torch.zeros(40, J + 1).scatter_(1, intents.long(), strength)
    expected = 0.7 * r[:, :J] @ torch.from_numpy(CODES).T  # (P, V+1)
    ids, item = torch.tensor([7, 0, 5, 2, 7]), torch.randint(1, V + 1, (40,))
    torch.testing.assert_close(net.match(strength, intents), expected)
    torch.testing.assert_close(net.match(strength, intents, ids), expected[:, ids])
    torch.testing.assert_close(net.match_one(strength, intents, item), expected[torch.arange(40), item])


def test_scores_are_the_states_product_and_the_match(tiny_run):
    """Equation (9) written out for every user: state times item, and what the item has of each personal intent."""
    data = saerec.run_dataset(tiny_run)
    library, net = model.load_library(tiny_run, data), model.load_model(tiny_run, "sae", data, model.load_library(tiny_run, data))
    personal = model.personal_intents(data, library, net.settings)
    scores = model.model_scores(net, data, personal, "test")(torch.arange(len(data.users)))
    without = model.user_states(net, data, personal, "test") @ net.item_table().T.detach()
    changed = 0
    for user in range(len(data.users)):
        strength, intents = (column[data.start[user + 1] - 2] for column in personal)  # of the last item before the one held out
        for item in range(1, len(data.items)):
            match = sum(r * library.code(item, j) for r, j in zip(strength.tolist(), intents.tolist()) if j < len(library.vectors))
            assert scores[user, item].item() == pytest.approx(without[user, item].item() + net.settings.match * match, abs=1e-5)
            changed += match > 0
    assert changed > len(data.users)


def test_sampled_loss_with_every_item_once_is_the_full_one():
    """Each of V items drawn once of one expected: the estimate is the sum itself, and its gradient too."""
    u, table, target = torch.randn(23, 8), torch.randn(V + 1, 8, requires_grad=True), torch.randint(1, V + 1, (23,))
    weight, negatives = torch.rand(23), torch.randperm(V) + 1
    dense = torch.randn(23, V + 1)
    for extra in (0 * dense, dense):
        own = extra[torch.arange(23), target]
        sampled = model.sampled_loss(u, table, target, weight, negatives, torch.zeros(V), (own, extra[:, negatives]))
        full = model.catalogue_loss(u, table, target, weight, (own, lambda at: extra[at]))  # noqa: B023
        torch.testing.assert_close(sampled, full)
        torch.testing.assert_close(*(torch.autograd.grad(loss, table)[0] for loss in (sampled, full)))


def test_negatives_estimate_the_sum_over_the_catalogue_without_bias(tmp_path):
    """What an item is expected to be drawn is what it is drawn on average, and the estimated sum has the true mean."""
    data = saerec.load_dataset(write_dataset(tmp_path / "d"))
    draw = model.negative_sampler(data, 40, saerec.generator(0, "x"))
    drawn, log_count = (torch.stack(column) for column in zip(*(draw() for _ in range(4000))))
    items = len(data.items) - 1
    counts = torch.bincount(drawn.flatten(), minlength=items + 1) / 4000
    popularity = np.bincount(data.training_items(), minlength=items + 1) / len(data.training_items())
    expected = 20 / items + 20 * torch.from_numpy(popularity[1:])
    assert (counts[1:] / expected - 1).abs().max() < 0.1 and counts[0] == 0
    assert torch.allclose(log_count, expected.log().float()[drawn - 1])
    scores = torch.linspace(-2, 2, items)
    estimates = (scores[drawn - 1] - log_count).exp().sum(1)
    assert estimates.mean() == pytest.approx(scores.exp().sum().item(), rel=0.01)


@pytest.mark.parametrize("name", ["default", "sasrec"])
def test_a_batch_of_sampled_items_has_the_loss_of_the_whole_table(name, tmp_path):
    """Only the items of a batch are embedded: with each item a negative once, loss and gradient are those of the full softmax."""
    data = saerec.load_dataset(write_dataset(tmp_path / "d"))
    net, items = build(**VARIANTS[name]), len(data.items) - 1
    personal = model.activation_retrieval(data.start, data.flat, LIBRARY, model.inverse_frequency(*FREQUENCY), 3, 0.9)
    rows, flat = model.training_rows(data, 12), torch.from_numpy(data.flat).long()
    wanted, results = model.batches(rows, 40)[1], []
    every_item = lambda: (torch.randperm(items) + 1, torch.zeros(items))  # noqa: E731
    for sampler in (None, every_item):
        batch = model.make_batch(rows, wanted, flat, personal if net.has_intents else None, sampler)
        loss, _ = model.batch_loss(net, batch)
        net.zero_grad()
        loss.backward()
        results.append((loss.detach(), {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[0], results[1], atol=2e-6, rtol=1e-4)


def test_mixed_codes_and_their_gradient_by_a_dense_product():
    net, table, grad = build(), torch.randn(J + 1, 8, requires_grad=True), torch.randn(V + 1, 8)
    codes = torch.from_numpy(CODES)
    share = codes / codes.sum(1, keepdim=True).clamp_min(1e-9)
    ids = torch.tensor([7, 0, 5, 2, 7])
    for name, dense in (("codes", codes), ("shares", share)):
        expected = dense @ table[:-1]
        torch.testing.assert_close(net.mix(name, table), expected)
        torch.testing.assert_close(net.mix(name, table, ids), expected[ids])
        wanted = torch.autograd.grad(expected, table, grad)[0]
        torch.testing.assert_close(torch.autograd.grad(net.mix(name, table), table, grad)[0], wanted)


def test_dropout_keeps_the_mean_and_drops_its_share():
    x = torch.full((400, 500), 3.0)
    dropped = model.dropout(x, 0.3, training=True)
    assert set(dropped.unique().tolist()) == {0.0, torch.tensor(3.0).div(torch.tensor(0.7)).item()}
    assert (dropped == 0).float().mean() == pytest.approx(0.3, abs=0.01)
    assert model.dropout(x, 0.3, training=False) is x


def test_bfloat16_changes_the_loss_by_little(monkeypatch):
    """What a GPU computes in half precision, here on the CPU: the same code, about the same loss, float32 gradients."""
    net = build()
    start, flat, personal = histories([3, 12, 7, 5, 2])
    batch = as_batch(*(batch_of(net, start, flat, personal)[i] for i in (0, 2, 1, 3)))
    exact, _ = model.batch_loss(net, batch)
    real = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, enabled: real(device, dtype, enabled=True))
    half, _ = model.batch_loss(net, batch)
    half.backward()
    assert half.dtype == torch.float32 and half != exact and half.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(p.grad.dtype == torch.float32 for p in net.parameters() if p.grad is not None)


@pytest.mark.parametrize("cells", [J, 3 * J, 10**6])
def test_activation_retrieval_by_brute_force(cells):
    start, flat, _ = histories([4, 9, 1, 6])
    idf = model.inverse_frequency(*FREQUENCY)
    strength, intent = model.activation_retrieval(start, flat, LIBRARY, idf, 3, 0.9, cells)
    for user in range(4):
        for t in range(start[user], start[user + 1]):
            tf = sum(0.9 ** (t - i) * CODES[flat[i]] for i in range(start[user], t + 1))
            r = tf * idf.numpy()
            best = sorted(range(J), key=lambda j: -r[j])[:3]
            expected = [j if r[j] > 0 else J for j in best]
            assert intent[t].tolist() == expected
            np.testing.assert_allclose(strength[t], [r[j] for j in best], rtol=1e-4, atol=1e-6)


def test_a_user_without_any_intent_gets_the_absent_one():
    start, flat = np.array([0, 3]), np.array([5, 5, 5], np.int32)  # item 5 has no text
    strength, intent = model.activation_retrieval(start, flat, LIBRARY, model.inverse_frequency(*FREQUENCY), 3, 0.9)
    assert (intent == J).all() and (strength == 0).all()
    net = build()
    items, intents, _, real = batch_of(net, start, flat, (strength, intent))
    assert torch.isfinite(states(net, items, intents, real)).all()


def test_similarity_retrieval_by_equation_and_its_moving_averages():
    net, h = build(retrieval="similarity"), torch.randn(10, 8)
    z = net.intent(net.vectors)
    df, n = net.df.clone(), net.n.clone()
    cosine = torch.stack([F.cosine_similarity(h, z[j][None], dim=1) for j in range(J)], 1).clamp_min(0)
    strength, chosen = net.retrieve(h, z)
    torch.testing.assert_close(strength, (cosine * torch.log((1 + n) / (1 + df))).topk(3).values)
    assert torch.equal(net.df, df) and torch.equal(net.n, n)  # evaluation moves nothing
    net.train().retrieve(h, z)
    counts = torch.zeros(J)
    for row in cosine.tolist():
        for j in sorted(range(J), key=lambda j: -row[j])[:3]:
            counts[j] += row[j] > 0
    torch.testing.assert_close(net.df, 0.9 * df + 0.1 * counts)
    torch.testing.assert_close(net.n, 0.9 * n + 0.1 * 10)


def test_document_frequency_counts_training_interactions(tmp_path):
    data = saerec.load_dataset(write_dataset(tmp_path / "d"))
    df, n = model.intent_frequency(data, LIBRARY)
    expected, count = np.zeros(J), 0
    for user in range(len(data.users)):
        for item in data.history(user, "valid"):
            expected += CODES[item] > 0
            count += 1
    assert df.tolist() == expected.tolist() and n == count


@pytest.mark.parametrize("name", VARIANTS)
def test_causality(name):
    """Changing the items after position t moves no state up to t."""
    net = build(**VARIANTS[name])
    start, flat, personal = histories([12] * 3)
    items, intents, _, real = batch_of(net, start, flat, personal)
    before = states(net, items, intents, real).view(3, 11, -1)
    for t in (0, 4, 9):
        changed = flat.copy().reshape(3, 12)
        changed[:, t + 1 :] = changed[:, t + 1 :] % V + 1
        changed = changed.flatten()
        idf = model.inverse_frequency(*FREQUENCY)
        items, intents, _, real = batch_of(net, start, changed, model.activation_retrieval(start, changed, LIBRARY, idf, 3, 0.9))
        after = states(net, items, intents, real).view(3, 11, -1)
        torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], atol=1e-6, rtol=1e-5)
        assert (after[:, t + 1 :] - before[:, t + 1 :]).abs().max() > 1e-3


@pytest.mark.parametrize("name", VARIANTS)
def test_padding_and_batch_mates_change_nothing(name):
    net = build(**VARIANTS[name])
    start, flat, personal = histories([3, 12, 7, 5])
    items, intents, _, real = batch_of(net, start, flat, personal)
    together = states(net, items, intents, real).split(real.sum(1).tolist())
    order = torch.tensor([2, 0, 3, 1])
    shuffled = states(net, items[order], None if intents is None else [column[order] for column in intents], real[order]).split(real.sum(1)[order].tolist())
    for user in range(4):
        n = int(real[user].sum())
        mine = None if intents is None else [column[user : user + 1, :n] for column in intents]
        alone = states(net, items[user : user + 1, :n], mine, real[user : user + 1, :n])
        torch.testing.assert_close(together[user], alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(shuffled[order.tolist().index(user)], alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_one_pass_equals_a_row_for_every_prefix(name):
    """The same loss and gradient as feeding every prefix as a padded row of its own, of which only the last position counts."""
    net = build(**VARIANTS[name])
    start, flat, personal = histories([3, 12, 7, 5, 2])
    items, intents, target, real = batch_of(net, start, flat, personal)
    loss, _ = model.batch_loss(net, as_batch(items, target, intents, real))
    loss.backward()
    expected = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    prefixes = [(b, n) for b, end in itertools.pairwise(start.tolist()) for n in range(1, end - b)]
    begin, length = (torch.tensor(column) for column in zip(*prefixes))
    items, intents, target, real = batch_of(net, start, flat, personal, model.Rows(begin, length))
    last = real & (torch.arange(real.shape[1]) == length[:, None] - 1)
    loss_rows, _ = model.batch_loss(net, as_batch(items, target, intents, last))
    loss_rows.backward()
    torch.testing.assert_close(loss_rows, loss)
    got = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys()
    for n in got:
        torch.testing.assert_close(got[n], expected[n], atol=2e-6, rtol=1e-4)


def test_each_branch_changes_the_output_and_none_is_the_trunk():
    start, flat, personal = histories([6, 6])
    whole = build()
    items, intents, _, real = batch_of(whole, start, flat, personal)
    outputs = {}
    for name, off in dict(whole={}, personal=dict(personal=0), public=dict(public=0), both=dict(personal=0, public=0)).items():
        settings = model.resolve(dataclasses.replace(BASE, **off))
        net = model.Recommender(settings, V, LIBRARY, FREQUENCY).eval()
        missing = net.load_state_dict(whole.state_dict(), strict=False).missing_keys
        assert not missing
        outputs[name] = states(net, items, intents, real)
    for a, b in itertools.combinations(outputs.values(), 2):
        assert (a - b).abs().max() > 1e-3
    trunk = model.Recommender(model.resolve(dataclasses.replace(BASE, **VARIANTS["sasrec"])), V).eval()
    trunk.load_state_dict(whole.state_dict(), strict=False)
    table = whole.item_table().detach()
    torch.testing.assert_close(trunk(items, places(real), None, table).detach(), outputs["both"])


def test_public_intents_are_the_most_frequent():
    assert build().public_intents().tolist() == [3, 1]


def test_rows_cover_every_training_position_once(tmp_path):
    data = saerec.load_dataset(write_dataset(tmp_path / "d"))
    for history in (1, 3, 4, 50):
        rows, seen = model.training_rows(data, history), []
        for begin, length in zip(rows.begin.tolist(), rows.length.tolist()):
            assert 1 <= length <= history
            seen += range(begin, begin + length)
        allowed = [i for u in range(len(data.users)) for i in range(data.start[u], data.start[u + 1] - 3)]
        assert sorted(seen) == allowed
    chosen = torch.cat(model.batches(rows, 7, saerec.generator(0, "x")))
    assert sorted(chosen.tolist()) == list(range(len(rows.length)))


def test_eight_users_overfit(tmp_path):
    """On 8 users the model learns by heart what each consumed next."""
    data = saerec.load_dataset(write_dataset(tmp_path / "d", users=8))
    net = build(width=32, dropout=0.0)
    personal = model.activation_retrieval(data.start, data.flat, LIBRARY, model.inverse_frequency(*FREQUENCY), 3, 0.9)
    rows, flat = model.training_rows(data, 12), torch.from_numpy(data.flat).long()
    optimizer = torch.optim.Adam(net.train().parameters(), lr=0.01)
    everything = torch.arange(len(rows.length))
    where, items, real = model.gather(rows, everything, flat)
    for _ in range(150):
        loss, terms = model.batch_loss(net, model.make_batch(rows, everything, flat, personal))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert terms["item"].item() < 0.1
    chosen = [column[where] for column in personal]
    scores = states(net.eval(), items, chosen, real) @ net.item_table().T
    scores = scores + net.match(*(column[real] for column in chosen))
    assert scores[:, 1:].argmax(1).add(1).eq(flat[where + 1][real]).float().mean() == 1


def test_save_and_load_give_the_same_scores(tiny_run):
    data = saerec.run_dataset(tiny_run)
    library = model.load_library(tiny_run, data)
    scores = []
    for _ in range(2):
        net = model.load_model(tiny_run, "sae", data, library)
        personal = model.personal_intents(data, library, net.settings)
        scores.append(model.model_scores(net, data, personal, "test")(torch.arange(5)))
    assert torch.equal(*scores) and torch.isfinite(scores[0]).all()
    stored = saerec.load_artifact(tiny_run / "model.safetensors", "")[0]
    assert all(torch.equal(stored[name], value) for name, value in net.state_dict().items())


def test_models_of_another_version_are_refused(fails, tmp_path, tiny_run):
    """A model trained before a setting existed, or with other parameters."""
    tensors, meta = saerec.load_artifact(tiny_run / "model.safetensors", "")
    older = meta | {"settings": {name: value for name, value in meta["settings"].items() if name != "match"}}
    for changed in ((tensors, older), ({name: t for name, t in tensors.items() if name != "residual"}, meta)):
        run = copy_run(tiny_run, tmp_path / f"run{len(changed[0])}")
        saerec.write_artifact(run / "model.safetensors", *changed)
        fails(model.main, ["recommend", "--run", run, "--user", "u3"], "model.safetensors does not fit this version", "model.py --run")


def test_moving_averages_are_saved(tmp_path, tiny_data, tiny_run):
    run = copy_run(tiny_run, tmp_path / "run")
    make_run(tiny_data, run, model="--paper", stages="model")
    stored = saerec.load_artifact(run / "model.safetensors", "")[0]
    assert stored["n"] > 0 and stored["df"].sum() > 0


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--width 9 --heads 2", ["--width 9", "--heads 2"]),
        ("--intents none --personal 3", ["--personal", "changes nothing", "--intents none"]),
        ("--intents none --no-residual", ["--residual", "changes nothing", "--intents none"]),
        ("--no-grounded --no-residual", ["--residual", "changes nothing", "--no-grounded"]),
        ("--paper --no-residual", ["--residual", "changes nothing", "--paper"]),
        ("--paper --retrieval similarity", ["--retrieval", "changes nothing", "--paper"]),
        ("--df-decay 0.5", ["--df-decay", "--retrieval activation"]),
        ("--retrieval similarity --match 0 --decay 0.5", ["--decay", "--retrieval similarity --personal 5 --match 0"]),
        ("--personal 0 --match 0 --decay 0.5", ["--decay", "--personal 0 --match 0"]),
        ("--personal 0 --retrieval trunk", ["--retrieval", "--personal 0"]),
        ("--personal 0 --public 0 --fusion sum", ["--fusion", "changes nothing"]),
        ("--paper --match 1", ["--match", "changes nothing", "--paper"]),
        ("--intents none --match 1", ["--match", "changes nothing", "--intents none"]),
        ("--match -1", ["--match", "at least 0"]),
        ("--match 0 --matched 3", ["--matched", "changes nothing", "--match 0"]),
        ("--paper --matched 3", ["--matched", "changes nothing"]),
        ("--intents none --trunk gru --heads 1", ["--heads", "--trunk gru"]),
        ("--personal 99", ["--personal 99", "more than the", "intents"]),
        ("--public 99", ["--public 99", "more than the", "intents"]),
        ("--intents some", ["some", "sae, none"]),
        ("--dropout 1", ["--dropout", "0 to 0.99"]),
        ("--history 0", ["--history", "at least 1"]),
        ("--lr 1e30", ["lower --lr"]),
        ("--colour red", ["--colour"]),
    ],
)
def test_impossible_settings(fails, tmp_path, tiny_run, flags, words):
    run = copy_run(tiny_run, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    fails(model.main, ["--run", run, "--epochs", "2", "--batch", "8", "--device", "cpu", *flags.split()], *words)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_artifacts_that_do_not_belong_together(fails, tmp_path, tiny_run, tiny_data):
    fails(model.main, ["--run", tmp_path], "embeddings.safetensors is missing", "embed.py")
    run = copy_run(tiny_run, tmp_path / "run")
    (run / "intents.safetensors").unlink()
    fails(model.main, ["--run", run], "intents.safetensors is missing", "sae.py")
    other = write_dataset(tmp_path / "other", users=25)
    other_run = make_run(other, tmp_path / "other_run", stages="embed sae")
    (run / "intents.safetensors").write_bytes((other_run / "intents.safetensors").read_bytes())
    fails(model.main, ["--run", run], "intents.safetensors was made from another", "sae.safetensors")
    (run / "sae.safetensors").unlink()
    fails(model.main, ["--run", run], "intents.safetensors was made from another dataset", str(tiny_data))
    fails(model.main, ["--run", tiny_run, "--data", other], "another dataset", str(other))


def test_a_dataset_that_changed_after_embedding(fails, tmp_path):
    folder = write_dataset(tmp_path / "d")
    run = make_run(folder, tmp_path / "run", stages="embed sae")
    write_dataset(folder, users=26)
    fails(model.main, ["--run", run], "has changed since", "embeddings.safetensors")


def test_histories_too_short_to_train_on(fails, tmp_path):
    folder = write_dataset(tmp_path / "d")
    (folder / "sequences.txt").write_text("".join(f"u{u} i{u} i{u + 10} i{u + 20}\n" for u in range(10)))
    fails(model.main, ["--run", tmp_path / "run", "--data", folder, "--intents", "none"], "4 items", "longer histories")


# A setting that changes nothing is a bug: each of these must change the trained model.
@pytest.mark.parametrize("flags", ["--intents none", "--paper", "--retrieval similarity", "--retrieval similarity --df-decay 0.5", "--retrieval trunk",
                                   "--fusion sum", "--fusion concat", "--match 0", "--match 1", "--matched 1", "--trunk gru", "--intents text", "--intents random", "--intents shuffled",
                                   "--intents kmeans", "--intents pca", "--intents dense", "--personal 2",
                                   "--personal 0", "--public 2", "--public 0", "--decay 0.1", "--no-grounded", "--no-residual", "--next-intent 1", "--width 12",
                                   "--layers 1", "--heads 1", "--dropout 0.1", "--history 3", "--epochs 1", "--batch 9", "--negatives 8", "--lr 0.01", "--seed 4",
                                   "--patience 1 --epochs 40"])  # fmt: skip
def test_every_setting_changes_the_model(tmp_path, tiny_data, tiny_run, flags):
    base = {"--retrieval similarity --df-decay 0.5": "--retrieval similarity", "--patience 1 --epochs 40": "--epochs 40"}.get(flags, "")
    written = []
    for more in (base, flags):
        run = copy_run(tiny_run, tmp_path / f"run{len(written)}")
        assert model.main(["--run", str(run), "--epochs", "3", "--width", "8", "--batch", "24", "--history", "6", "--device", "cpu", *more.split()]) == 0
        name = model.file_names(more.split()[1] if "--intents" in more else "sae")
        tensors = saerec.load_artifact(run / name[0], "")[0]
        log = [line.split(",")[2:] for line in (run / name[1]).read_text().splitlines()]
        written.append(({name: t.tolist() for name, t in tensors.items()}, log))
    assert written[0] != written[1]
