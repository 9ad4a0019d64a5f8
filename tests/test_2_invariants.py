"""What must hold whatever the numbers: second formulations, causality, padding, no leak, repeatability."""

import dataclasses
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import embed
import eval as evaluation
import model
import sae
import saerec
from conftest import TOPICS, copy_run, make_run, write_dataset

V, J, E = 30, 7, 6
MODELS = [model.SASRec, model.SAERec, model.Grounded]
SETTINGS = model.ModelSettings(run="x", width=8, history=12, personal=3, public=2, device="cpu")
SAE_SETTINGS = sae.SaeSettings(run="x", latents=32, active=4, steps=200, batch=64, lr=3e-3)


def held_out(texts):
    """Every tenth text."""
    return torch.arange(texts) % 10 == 0


def random_intents(seed=0):
    g = np.random.default_rng(seed)
    dense = g.random((V + 1, J)).astype(np.float32) * (g.random((V + 1, J)) < 0.4)
    dense[[0, 5]] = 0  # padding, and an item without text
    vectors = F.normalize(torch.randn(J, E, generator=torch.Generator().manual_seed(seed)), dim=1)
    return sae.Intents(vectors, sparse(torch.from_numpy(dense))), torch.from_numpy(dense)


def sparse(dense):
    bounds = sae.cell_bounds((dense != 0).sum(1))
    row, column = dense.nonzero(as_tuple=True)
    return sae.SparseRows(bounds, column.int(), dense[row, column], dense.shape[1])


INTENTS, CODES = random_intents()


class Data:
    """As much of a Dataset as a model asks for."""

    items = [""] * (V + 1)

    def training_items(self):
        return np.random.default_rng(1).integers(1, V + 1, 60).astype(np.int32)


def build(Model, seed=0, intents=INTENTS, **changes):
    """A model whose parameters are large enough that everything matters."""
    torch.manual_seed(seed)
    net = Model(dataclasses.replace(SETTINGS, **changes), Data(), intents)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn(p.shape)
        net.item.weight[0] = 0
        if Model is model.SAERec:
            net.df.copy_(torch.tensor([5.0, 9, 1, 30, 2, 8, 4]))
            net.n.fill_(60)
    return net.eval()


def histories(lengths, seed=0):
    """Histories in Dataset's form -> (start, flat)."""
    start = np.concatenate([[0], np.cumsum(lengths)])
    return start, np.random.default_rng(seed).integers(1, V + 1, start[-1])


def padded(start, flat, rows=None):
    """(items, target, real) of whole histories, of which the last item is only a target."""
    begin = torch.from_numpy(start[:-1])
    rows = rows or model.Rows(begin, torch.from_numpy(np.diff(start) - 1))
    flat = torch.from_numpy(flat)
    place, items, real = model.pad_rows(rows, torch.arange(len(rows.length)), flat)
    return items, flat[place + 1], real


def places(wanted):
    return wanted.flatten().nonzero()[:, 0]


@torch.no_grad()
def all_scores(net, items, wanted):
    """Scores [P, V+1] at the wanted positions, bool [B, T]."""
    table = net.item_table()
    return net.scores(net(items, F.embedding(items, table), places(wanted)), table)


def as_batch(items, target, wanted):
    """A Batch in which the wanted positions, bool [B, T], count alike."""
    count = int(wanted.sum())
    return model.Batch(items, places(wanted), target[wanted], torch.full((count,), 1 / count))


# Second formulations


def test_rank_equals_brute_force_with_ties():
    g = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 6, (200, 31), generator=g).float()
    targets = torch.randint(1, 31, (200,), generator=g)
    seen = torch.randint(0, 31, (200, 5), generator=g)
    for user, rank in enumerate(saerec.target_ranks(scores, targets, seen).tolist()):
        masked = set(seen[user].tolist())
        target = int(targets[user])
        others = [v for v in range(1, 31) if v != target and v not in masked]
        ahead = sum(bool(scores[user, v] >= scores[user, target]) for v in others)
        assert rank == (math.inf if target in masked else 1 + ahead)


def test_ranking_in_chunks_is_ranking_in_one_go(tiny_data):
    data = saerec.load_dataset(tiny_data)
    random = torch.Generator().manual_seed(0)
    scores = torch.randn(len(data.users), len(data.items), generator=random)
    whole = saerec.rank_users(lambda users: scores[users], data, "test")
    for cells in (1, 100, 300):
        assert torch.equal(saerec.rank_users(lambda u: scores[u], data, "test", cells), whole)


def test_long_histories_are_scored_a_few_at_a_time(tiny_run, monkeypatch):
    """As many as attention's T x T weights of each leave room for, and one at least."""
    data = saerec.run_dataset(tiny_run)
    settings = model.ModelSettings(run=str(tiny_run), width=8, device="cpu")
    net = model.new_model(model.Grounded, settings, data).eval()
    users = torch.arange(len(data.users))
    whole = model.model_scores(net, data, "test")(users)
    batches = []
    net.trunk.register_forward_hook(lambda trunk, h, out: batches.append(tuple(h[0].shape[:2])))
    for pairs in (1, 300):
        batches.clear()
        monkeypatch.setattr(model, "PAIRS", pairs)
        torch.testing.assert_close(model.model_scores(net, data, "test")(users), whole)
        assert sum(B for B, _ in batches) == len(users)
        assert all(B * T**2 <= pairs or B == 1 for B, T in batches)
        assert len(batches) > 2


def test_sparse_rows_do_what_dense_ones_do():
    codes = INTENTS.codes
    rows = torch.tensor([7, 0, 5, 2, 7])
    torch.testing.assert_close(codes.dense(), CODES)
    torch.testing.assert_close(codes.transposed.dense(), CODES.T)
    torch.testing.assert_close(codes.gather(rows).dense(), CODES[rows])
    table = torch.randn(J, 8, requires_grad=True)
    grad = torch.randn(V + 1, 8)
    torch.testing.assert_close(codes.mix(table), CODES @ table)
    expected = torch.autograd.grad(CODES @ table, table, grad)[0]
    torch.testing.assert_close(torch.autograd.grad(codes.mix(table), table, grad)[0], expected)


def test_item_codes_by_brute_force():
    g = np.random.default_rng(0)
    latents = torch.from_numpy(np.stack([g.permutation(8)[:3] for _ in range(40)]))
    values = torch.from_numpy(g.random((40, 3)).astype(np.float32) * (g.random((40, 3)) > 0.2))
    text_item = torch.from_numpy(g.integers(1, 12, 40))
    number = torch.tensor([0, -1, 1, 2, -1, 3, 4, 5])
    expected = torch.zeros(13, 6)
    for text, item in enumerate(text_item.tolist()):
        for latent, value in zip(latents[text].tolist(), values[text].tolist()):
            if number[latent] >= 0:
                share = value / int((text_item == item).sum())
                expected[item, number[latent]] += share
    codes = sae.item_codes(sae.Codes(values, latents), text_item, 12, number)
    torch.testing.assert_close(codes.dense(), expected)


def dense_sae(net, x):
    """(S1), (S2) with all M latents and a gradient, then everything but the K largest set to 0."""
    z = (x - net.b_dec) @ net.W_enc.T + net.b_enc
    threshold = z.topk(int(net.active)).values[:, -1:]
    z = torch.where(z >= threshold, z, 0).relu()
    return z, z @ net.W_dec + net.b_dec


def planted(texts=2000, factors=12, width=24, seed=0):
    """Texts that are sums of two of `factors` random unit directions -> (embeddings, directions)."""
    g = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(factors, width, generator=g), dim=1)
    which = torch.rand(texts, factors, generator=g).topk(2).indices
    amounts = 0.5 + torch.rand(texts, 2, generator=g)
    return torch.einsum("nk,nke->ne", amounts, directions[which]), directions


def random_sae(latents=32, active=4, width=24):
    net = sae.SAE(latents, active, width)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (net.W_enc, net.b_enc, net.b_dec):
            p += 0.1 * torch.randn(p.shape, generator=g)
    return net


@pytest.mark.parametrize("small", [0, 64], ids=["many latents", "few latents"])
def test_sparse_sae_equals_the_dense_one_in_loss_and_gradient(small, monkeypatch):
    monkeypatch.setattr(sae, "SMALL", small)
    net = random_sae()
    x, _ = planted(100)
    gradients = []
    for dense in (True, False):
        net.zero_grad()
        x_hat = dense_sae(net, x)[1] if dense else net.decode(net.encode(x))
        loss = (x - x_hat).square().sum(1).mean()
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in net.parameters())])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with torch.no_grad():  # without its detour for a gradient
        without = net.encode(x)
    assert (without.latents == net.encode(x).latents).all()
    torch.testing.assert_close(without.values, net.encode(x).values.detach())


def test_auxk_by_its_definition_and_only_for_dead_latents():
    net = random_sae()
    x, _ = planted(40)
    dead = torch.zeros(32, dtype=torch.bool)
    dead[[3, 8, 20]] = True
    x_hat = net.decode(net.encode(x))
    loss = sae.auxk_loss(net, x, x_hat, dead.nonzero()[:, 0], 2)
    loss.backward()
    expected = 0.0
    norm = 0.0
    with torch.no_grad():
        for residual, row in zip(x - x_hat, x - net.b_dec):
            active = {j: max(0.0, float(net.W_enc[j] @ row + net.b_enc[j])) for j in (3, 8, 20)}
            best = sorted(active, key=active.get)[-2:]
            rebuilt = sum(active[j] * net.W_dec[j] for j in best)
            expected += float((residual - rebuilt).square().sum())
            norm += float(residual.square().sum())
    assert loss.item() == pytest.approx(expected / norm, rel=1e-4)
    for gradient in (net.W_enc.grad, net.W_dec.grad, net.b_enc.grad):
        assert gradient[dead].abs().sum() > 0 and gradient[~dead].abs().sum() == 0
    assert net.b_dec.grad is None or net.b_dec.grad.abs().sum() == 0


def test_fvu_is_measured_as_before_scaling():
    x, _ = planted(300)
    net = random_sae()
    net.fit_scale(x, torch.arange(300))
    with torch.no_grad():
        codes = net.encode(net.standardize(x))
        x_hat = net.decode(codes) * net.scale + net.mean  # FVU is the same before scaling
        expected = ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()
    measured, l0 = sae.measure(net, x)
    assert measured == pytest.approx(expected, rel=1e-4)
    assert l0 == pytest.approx((codes.values > 0).sum().item() / 300)


def test_mutual_information_by_its_definition():
    word = np.array([1, 1, 1, 0, 0, 0, 1, 0], bool)
    fires = np.array([1, 1, 0, 0, 0, 1, 0, 0], bool)
    expected = 0.0
    for w, f in itertools.product((0, 1), (0, 1)):
        joint = ((word == w) & (fires == f)).mean()
        if joint:
            expected += joint * math.log(joint / ((word == w).mean() * (fires == f).mean()))
    counts = [np.array([int(x)]) for x in ((word & fires).sum(), word.sum())]
    assert sae.mutual_information(*counts, fires.sum(), 8)[0] == pytest.approx(expected)


def test_auroc_by_pairs():
    g = np.random.default_rng(0)
    scores = g.integers(0, 5, 60).astype(float)
    positive = g.random(60) < 0.3
    pairs = itertools.product(scores[positive], scores[~positive])
    won = [(p > n) + 0.5 * (p == n) for p, n in pairs]
    assert sae.auroc(scores, positive) == pytest.approx(np.mean(won))


def copy_into_torch(ours):
    """torch.nn.MultiheadAttention with the weights of one of our blocks."""
    theirs = torch.nn.MultiheadAttention(8, 2, batch_first=True)
    roles = (ours.query, ours.key, ours.value)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([role.weight for role in roles]))
        theirs.in_proj_bias.copy_(torch.cat([role.bias for role in roles]))
        theirs.out_proj.load_state_dict(ours.out.state_dict())
    return theirs


def finish(ours, x, attended):
    x = ours.attention_norm(x + attended)
    return ours.forward_norm(x + ours.contract(F.gelu(ours.expand(x))))


def test_self_attention_is_torchs_own():
    block = model.SelfAttention(8, 2, 0.3).eval()
    x = torch.randn(4, 9, 8)
    mask = torch.triu(torch.ones(9, 9, dtype=torch.bool), 1)
    attended, _ = copy_into_torch(block)(x, x, x, attn_mask=mask)
    torch.testing.assert_close(block(x), finish(block, x, attended))


def test_cross_attention_is_torchs_own():
    block = model.CrossAttention(8, 2, 0.3).eval()
    x, z = torch.randn(11, 8), torch.randn(J + 1, 8)
    chosen = torch.randint(0, J + 1, (11, 3))
    attended, _ = copy_into_torch(block)(x[:, None], z[chosen], z[chosen])
    torch.testing.assert_close(block(x, z, chosen), finish(block, x, attended[:, 0]))


def test_similarity_retrieval_by_equation():
    net = build(model.SAERec)
    h = torch.randn(10, 8)
    z = net.project(net.d)
    cosines = [F.cosine_similarity(h, z[j][None], dim=1) for j in range(J)]
    r = torch.stack(cosines, 1).clamp_min(0) * torch.log((1 + net.n) / (1 + net.df))
    best = r.topk(3)
    expected = torch.where(best.values > 0, best.indices, J)
    assert torch.equal(net.personal_intents(h, z), expected)


def test_what_a_history_is_about_by_brute_force():
    net = build(model.Grounded, decay=0.8)
    start, flat = histories([4, 9, 2, 6])
    items, _, real = padded(start, flat)
    got = iter(net.history_intents(items, places(real)))
    for user in range(4):
        for t in range(start[user], start[user + 1] - 1):
            past = range(start[user], t + 1)
            tf = sum(0.8 ** (t - i) * CODES[flat[i]] for i in past)
            torch.testing.assert_close(next(got), tf * net.idf)


def test_only_the_strongest_intents_are_matched():
    net = build(model.Grounded)
    start, flat = histories([9])
    items, _, real = padded(start, flat)
    every = net.history_intents(items, places(real))
    net.matched = 2
    strongest = net.history_intents(items, places(real))
    kept = every >= every.topk(2).values[:, 1:]
    torch.testing.assert_close(strongest, every * kept)


def test_document_frequency_counts_training_interactions():
    items = Data().training_items()
    carried = (CODES[items] > 0).sum(0)
    expected = torch.log((1 + len(items)) / (1 + carried))
    torch.testing.assert_close(build(model.Grounded).idf, expected)


def test_grounded_scores_by_dense_products():
    net = build(model.Grounded, match=0.7)
    u = torch.randn(40, 8)
    r = torch.rand(40, J) * (torch.rand(40, J) < 0.4)
    table = net.item.weight + CODES @ net.intent_vectors
    torch.testing.assert_close(net.item_table(), table)
    torch.testing.assert_close(table[5], net.item.weight[5])  # no text: its id alone
    state = model.State(u, u[None], r=r)
    expected = u @ table.T + 0.7 * r @ CODES.T
    torch.testing.assert_close(net.scores(state, table), expected)


@pytest.mark.parametrize("cells", [1, 2000, 10**6])
@pytest.mark.parametrize("matched", [False, True])
def test_fused_cross_entropy_is_torchs_own(cells, matched, monkeypatch):
    monkeypatch.setattr(model, "CHUNK", cells)
    u = torch.randn(70, 8, requires_grad=True)  # in chunks of 32, of 64, or all at once
    table = torch.randn(V, 8, requires_grad=True)
    target = torch.randint(0, V, (70,))
    weight = torch.rand(70)
    r = torch.randn(70, 5) * matched
    to_items = torch.randn(5, V + 1)
    more = (r, lambda rows: rows @ to_items) if matched else ()
    scores = u @ table.T + (r @ to_items)[:, 1:]
    expected = weight @ F.cross_entropy(scores, target, reduction="none")
    loss = model.CrossEntropy.apply(u, table, target, weight, *more)
    torch.testing.assert_close(loss, expected)
    got = torch.autograd.grad(3 * loss, (u, table))
    wanted = torch.autograd.grad(3 * expected, (u, table))
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("Model", MODELS)
def test_loss_is_the_cross_entropy_of_the_scores(Model):
    net = build(Model)
    items, target, real = padded(*histories([3, 12, 7, 5, 2]))
    scores = all_scores(net, items, real)
    expected = F.cross_entropy(scores[:, 1:], target[real] - 1)
    torch.testing.assert_close(model.catalogue_loss(net, as_batch(items, target, real)), expected)


def test_dropout_keeps_the_type():
    """On a GPU activations are bfloat16, and should stay so."""
    x = torch.ones(6, dtype=torch.bfloat16)
    assert model.dropout(x, 0.5, training=True).dtype == x.dtype


def test_dropout_keeps_the_mean_and_drops_its_share():
    x = torch.full((400, 500), 3.0)
    dropped = model.dropout(x, 0.3, training=True)
    kept = torch.tensor(3.0).div(torch.tensor(0.7)).item()
    assert set(dropped.unique().tolist()) == {0.0, kept}
    assert (dropped == 0).float().mean() == pytest.approx(0.3, abs=0.01)
    assert model.dropout(x, 0.3, training=False) is x


# Properties


@pytest.mark.parametrize("Model", MODELS)
def test_causality(Model):
    """Changing the items after position t moves no score up to t, and moves all after."""
    net = build(Model)
    start, flat = histories([12] * 3)
    items, _, real = padded(start, flat)
    before = all_scores(net, items, real).view(3, 11, -1)
    for t in (0, 4, 9):
        changed = flat.reshape(3, 12).copy()
        changed[:, t + 1 :] = changed[:, t + 1 :] % V + 1
        items, _, real = padded(start, changed.flatten())
        after = all_scores(net, items, real).view(3, 11, -1)
        torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], atol=1e-5, rtol=1e-5)
        moved = (after[:, t + 1 :] - before[:, t + 1 :]).abs().amax(2)
        assert moved.min() > 1e-3


@pytest.mark.parametrize("Model", MODELS)
def test_padding_and_batch_mates_change_nothing(Model):
    net = build(Model)
    items, _, real = padded(*histories([3, 12, 7, 5]))
    together = all_scores(net, items, real).split(real.sum(1).tolist())
    order = torch.tensor([2, 0, 3, 1])
    shuffled = all_scores(net, items[order], real[order]).split(real.sum(1)[order].tolist())
    for user in range(4):
        n = int(real[user].sum())
        alone = all_scores(net, items[user : user + 1, :n], real[user : user + 1, :n])
        torch.testing.assert_close(together[user], alone, atol=1e-5, rtol=1e-4)
        again = shuffled[order.tolist().index(user)]
        torch.testing.assert_close(again, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("Model", MODELS)
def test_one_pass_equals_a_row_for_every_prefix(Model):
    """The loss and gradient are those of every prefix as a padded row, of which the last counts."""
    net = build(Model)
    start, flat = histories([3, 12, 7, 5, 2])
    items, target, real = padded(start, flat)
    loss = model.catalogue_loss(net, as_batch(items, target, real))
    loss.backward()
    expected = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    ends = itertools.pairwise(start.tolist())
    prefixes = [(b, n) for b, end in ends for n in range(1, end - b)]
    begin, length = (torch.tensor(column) for column in zip(*prefixes))
    items, target, real = padded(start, flat, model.Rows(begin, length))
    last = real & (torch.arange(real.shape[1]) == length[:, None] - 1)
    loss_rows = model.catalogue_loss(net, as_batch(items, target, last))
    loss_rows.backward()
    torch.testing.assert_close(loss_rows, loss)
    got = {n: p.grad for n, p in net.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys() and len(got) > 10
    for n in got:
        torch.testing.assert_close(got[n], expected[n], atol=2e-6, rtol=1e-4)


def test_saerecs_branches_change_the_scores_and_its_parts_are_the_state():
    net = build(model.SAERec)
    items, _, real = padded(*histories([6, 6]))
    table = net.item_table()
    state = net(items, F.embedding(items, table), places(real))
    torch.testing.assert_close(state.parts.sum(0), state.u)
    history = state.parts[0]
    trunk = model.SASRec(net.settings, Data())
    trunk.load_state_dict(net.state_dict(), strict=False)
    alone = trunk.eval()(items, F.embedding(items, table), places(real)).u
    torch.testing.assert_close(history, alone)
    assert (state.parts[1:].abs().amax((1, 2)) > 1e-2).all()


@pytest.mark.parametrize("Model", MODELS)
def test_reasons_add_up_to_every_score(Model):
    net = build(Model)
    items, _, real = padded(*histories([7]))
    table = net.item_table()
    last = torch.tensor([int(real.sum()) - 1])
    with torch.no_grad():
        state = net(items, F.embedding(items, table), last)
        scores = net.scores(state, table)[0]
        for item in range(1, V + 1):
            reasons = net.reasons(state, item)
            total = sum(reasons.parts.values()) + reasons.terms.sum().item()
            assert total == pytest.approx(scores[item].item(), abs=1e-5)
    if Model is model.Grounded:
        assert reasons.parts["id"] == pytest.approx((state.u[0] @ net.item.weight[V]).item())


@pytest.mark.parametrize("Model", MODELS)
def test_bfloat16_changes_the_loss_by_little(Model, monkeypatch):
    """What a GPU computes in half precision, on the CPU: the same code, about the same loss."""
    net = build(Model)
    batch = as_batch(*padded(*histories([3, 12, 7, 5, 2])))
    exact = model.catalogue_loss(net, batch)
    real = torch.autocast
    on = lambda device, dtype, enabled: real(device, dtype, enabled=True)  # noqa: E731
    monkeypatch.setattr(torch, "autocast", on)
    half = model.catalogue_loss(net, batch)
    half.backward()
    assert half.dtype == torch.float32 and half != exact
    assert half.item() == pytest.approx(exact.item(), rel=0.02)
    assert all(p.grad.dtype == torch.float32 for p in net.parameters() if p.grad is not None)


def test_a_text_is_encoded_alike_whatever_its_batch_mates():
    net = random_sae()
    x, _ = planted(50)
    with torch.no_grad():
        together = net.encode(x)
        alone = [net.encode(row[None]) for row in x]
    torch.testing.assert_close(together.values, torch.cat([codes.values for codes in alone]))
    assert torch.equal(together.latents, torch.cat([codes.latents for codes in alone]))


def test_codes_are_k_sparse_and_not_negative():
    net = random_sae()
    x, _ = planted(50)
    codes = net.encode(x)
    assert codes.values.shape == (50, 4) and (codes.values >= 0).all()
    assert all(len(set(row)) == 4 for row in codes.latents.tolist())
    z, _ = dense_sae(net, x)
    torch.testing.assert_close(codes.values.sort().values, z.topk(4).values.sort().values)


def test_an_saes_file_holds_all_that_encoding_needs():
    """K too: the file loaded into an SAE built with another K gives the same codes."""
    net = random_sae()
    x, _ = planted(50)
    other = sae.SAE(32, 9, 24)
    other.load_state_dict(net.state_dict())
    for a, b in zip(net.encode(x), other.encode(x)):
        assert torch.equal(a, b)


def test_project_then_step_then_normalize():
    net = random_sae()
    x, _ = planted(60)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        (x - net.decode(net.encode(x))).square().sum().backward()
        net.project_decoder_gradient()
        assert (net.W_dec.grad * net.W_dec).sum(1).abs().max() < 1e-3
        optimizer.step()
        net.normalize_decoder()
        torch.testing.assert_close(net.W_dec.norm(dim=1), torch.ones(32))


def test_a_step_reads_noise_rebuilds_x_and_leaves_unit_rows():
    """Two steps of the SAE against the same written out."""
    one = random_sae()
    two = random_sae()
    x, _ = planted(60)
    noise = torch.randn(60, 24, generator=torch.Generator().manual_seed(3))
    settings = sae.SaeSettings(auxk=0)
    optimizers = [torch.optim.Adam(net.parameters(), lr=0.01) for net in (one, two)]
    for net in (one, two):
        net.normalize_decoder()
    for _ in range(2):
        sae.train_step(one, optimizers[0], x, noise, torch.zeros(0).long(), settings)
        optimizers[1].zero_grad()
        ((x - two.decode(two.encode(x + noise))).square().sum() / 60).backward()
        with torch.no_grad():
            along = (two.W_dec.grad * two.W_dec).sum(1, keepdim=True)
            two.W_dec.grad -= along * two.W_dec
            optimizers[1].step()
            two.W_dec /= two.W_dec.norm(dim=1, keepdim=True)
    for p, q in zip(one.parameters(), two.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_the_learning_rate_falls_over_the_last_fifth(monkeypatch):
    step = sae.train_step
    rates = []

    def noted(net, optimizer, *more):
        rates.append(optimizer.param_groups[0]["lr"])
        return step(net, optimizer, *more)

    monkeypatch.setattr(sae, "train_step", noted)
    sizes = dict(latents=8, active=2, steps=10, batch=16, members=1)
    x, _ = planted(60)
    sae.train_sae(x, held_out(60), sae.SaeSettings(run="x", lr=0.5, **sizes))
    assert rates == pytest.approx([0.5] * 9 + [0.25])


def test_scaling_makes_the_variance_one():
    """Of the chosen rows, more than are read at a time."""
    x = 7 * planted(10_000)[0] + 3
    rows = torch.arange(0, 10_000, 2)
    x[1::2] = torch.nan
    net = sae.SAE(8, 2, 24)
    net.fit_scale(x, rows)
    standard = net.standardize(x[rows])
    assert standard.mean(0).abs().max() < 1e-5
    assert standard.square().sum(1).mean().item() == pytest.approx(1, rel=1e-4)


def test_sizes_follow_the_texts_and_the_words():
    def sizes(texts, words, **more):
        """Of so many texts, each with one of so many words and a word of its own."""
        data = SimpleNamespace(texts=[f"common{n % words} own{n}" for n in range(texts)])
        corpus = sae.Corpus(data, None, None, {}, None)
        settings = sae.resolve(sae.SaeSettings(run="x", **more), corpus)
        return settings.latents, settings.steps

    assert sizes(1_700, words=500) == (128, 664)  # a third of the words
    assert sizes(4_344, words=1_440) == (512, 1696)
    assert sizes(1_700, words=566, latents=100, steps=7) == (100, 7)
    assert sizes(50, words=5) == (64, 300)  # the least
    assert sizes(20_000, words=6_600)[1] == 5000  # the most steps


def test_generators_are_separate_and_repeatable():
    keys = ((0, "a"), (0, "b"), (1, "a"), (0, "a"))
    draws = [torch.rand(3, generator=saerec.generator(*key)).tolist() for key in keys]
    assert draws[0] == draws[3] and len({tuple(draw) for draw in draws}) == 3


def test_rows_cover_every_training_position_once(tmp_path):
    data = saerec.load_dataset(write_dataset(tmp_path / "d"))
    for history in (1, 3, 4, 50):
        rows = model.training_rows(data, history)
        seen = []
        for begin, length in zip(rows.begin.tolist(), rows.length.tolist()):
            assert 1 <= length <= history
            seen += range(begin, begin + length)
        allowed = []
        for first, end in itertools.pairwise(data.start.tolist()):
            allowed += range(first, end - 3)
        assert sorted(seen) == allowed
    chosen = torch.cat(model.shuffled_batches(rows, 7, saerec.generator(0, "x")))
    assert sorted(chosen.tolist()) == list(range(len(rows.length)))


# No leak


def test_changing_held_out_items_changes_no_training_batch_and_no_statistic(tmp_path):
    """Swap every user's last two items: what training reads must stay equal, bit for bit."""
    one = write_dataset(tmp_path / "one")
    other = write_dataset(tmp_path / "other")
    lines = [line.split() for line in (one / "sequences.txt").read_text().splitlines()]
    with open(other / "sequences.txt", "w") as file:
        for *line, valid, test in lines:
            swapped = f"i{(int(valid[1:]) + 7) % 30} i{(int(test[1:]) + 11) % 30}"
            file.write(" ".join([*line, swapped]) + "\n")
    a, b = saerec.load_dataset(one), saerec.load_dataset(other)
    assert not (a.flat == b.flat).all() and a.items == b.items
    assert (a.training_items() == b.training_items()).all() and a.texts == b.texts
    popular = [evaluation.popularity_scores(data)(torch.arange(3)) for data in (a, b)]
    assert torch.equal(*popular)
    idf = [model.inverse_frequency(data.training_items(), INTENTS.codes) for data in (a, b)]
    assert torch.equal(*idf)
    rows_a, rows_b = model.training_rows(a, 4), model.training_rows(b, 4)
    for chosen in model.shuffled_batches(rows_a, 8, saerec.generator(0, "x")):
        batches = []
        for data, rows in ((a, rows_a), (b, rows_b)):
            flat = torch.from_numpy(data.flat).long()
            batches.append(model.make_batch(rows, chosen, flat, torch.device("cpu")))
        assert all(torch.equal(x, y) for x, y in zip(*batches, strict=True))


def test_changing_test_items_changes_no_trained_model(tmp_path, tiny_data, tiny_run):
    """Perturb every test item alone: all that training writes stays as it was, test metrics move."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "texts.jsonl").write_bytes((tiny_data / "texts.jsonl").read_bytes())
    with open(folder / "sequences.txt", "w") as file:
        for line in (tiny_data / "sequences.txt").read_text().splitlines():
            *known, test = line.split()
            file.write(" ".join([*known, f"i{(int(test[1:]) + 13) % 30}"]) + "\n")
    run = make_run(folder, tmp_path / "run")
    for name in ("sae", "sasrec", "saerec", "grounded"):
        before = saerec.load_artifact(tiny_run / f"{name}.safetensors", "")[0]
        after = saerec.load_artifact(run / f"{name}.safetensors", "")[0]
        assert all(torch.equal(before[key], after[key]) for key in before)
    metrics = [json.loads((one / "metrics.json").read_text())["models"] for one in (tiny_run, run)]
    assert metrics[0] != metrics[1]


def test_an_sae_does_not_see_held_out_texts():
    x, _ = planted(200)
    settings = dataclasses.replace(SAE_SETTINGS, steps=10, members=2)
    changed = torch.where(held_out(200)[:, None], x + 5, x)
    (one, a, log), (two, b, other) = (sae.train_sae(e, held_out(200), settings) for e in (x, changed))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters()))
    assert torch.equal(a, b) and log[-1]["loss"] == other[-1]["loss"]
    assert log[-1]["fvu"] != other[-1]["fvu"]  # on which it is measured


# Learning


def test_planted_dictionary_is_recovered():
    x, directions = planted(6000)
    settings = dataclasses.replace(SAE_SETTINGS, latents=24, active=2, steps=300, members=3)
    net, support, log = sae.train_sae(x, held_out(len(x)), settings)
    best = (F.normalize(directions, dim=1) @ net.W_dec.detach().T).max(1).values
    assert (best > 0.9).float().mean() >= 0.9, best
    assert log[-1]["fvu"] < 0.1 and (support >= 2).float().mean() > 0.7


def test_dead_latents_get_a_gradient_through_auxk_alone_and_revive(monkeypatch):
    """Latents pushed below all others never fire without auxk, and do with it."""
    x, _ = planted()

    def handicapped(net, x, random):
        with torch.no_grad():
            net.b_enc[4:] = -0.5

    monkeypatch.setattr(sae.SAE, "start", handicapped)
    alive = {}
    for auxk in (0, 16):
        more = dict(auxk=auxk, auxk_weight=1.0, steps=600, dead_after=0.5, members=1, noise=0.0)
        log = sae.train_sae(x, held_out(len(x)), dataclasses.replace(SAE_SETTINGS, **more))[2]
        alive[auxk] = 1 - log[-1]["dead"]
    assert alive[16] > alive[0] + 0.1, alive


def library_parts(run):
    """A Corpus of the tiny run whose topic words have vectors, and the codes of its texts."""
    corpus = sae.load_corpus(run, sae.SaeSettings(run=str(run), held_out=0.2))
    words = " ".join(TOPICS.values()).split()
    centred = corpus.embeddings - corpus.embeddings.mean(0)
    vectors = []
    for word in words:
        said = torch.tensor([word in one for one in corpus.data.texts])
        vectors.append(centred[said].mean(0))
    known = {word: n for n, word in enumerate(words)}
    corpus = dataclasses.replace(corpus, words=known, word_vectors=torch.stack(vectors))
    net = sae.SAE(16, 3, 8)
    net.load_state_dict(saerec.load_artifact(run / "sae.safetensors", "")[0])
    return corpus, sae.encode_all(net, corpus.embeddings)


def names_of(corpus, codes):
    """Label and keywords of all 16 latents."""
    fires = codes.values > 0
    bounds = sae.cell_bounds(fires.sum(1))
    by_text = sae.SparseRows(bounds, codes.latents[fires], codes.values[fires], 16)
    return list(sae.name_intents(torch.arange(16), by_text.transposed, corpus, 5))


def test_names_do_not_see_held_out_texts(tiny_run):
    """Other words, codes and embeddings of theirs: every label and keyword stays."""
    corpus, codes = library_parts(tiny_run)
    held_out = corpus.held_out[:, None]
    texts = ["other words" if out else said for out, said in zip(held_out, corpus.data.texts)]
    data = dataclasses.replace(corpus.data, texts=texts)
    embeddings = torch.where(held_out, corpus.embeddings.flip(0) + 5, corpus.embeddings)
    other = dataclasses.replace(corpus, data=data, embeddings=embeddings)
    latents = torch.where(held_out, (codes.latents + 5) % 16, codes.latents)
    assert names_of(other, codes._replace(latents=latents)) == names_of(corpus, codes)


def test_names_are_judged_on_held_out_texts_pair_by_pair(tiny_run):
    """Both AUROCs of keywords, by all pairs of a text that fires and one that doesn't."""
    corpus, codes = library_parts(tiny_run)
    corpus = dataclasses.replace(corpus, words={}, word_vectors=torch.zeros(0, 8))
    settings = sae.SaeSettings(run=str(tiny_run), members=2, min_items=2, held_out=0.2)
    _, rows = sae.build_library(torch.eye(16, 8), codes, torch.ones(16), corpus, settings)
    test = corpus.held_out.nonzero()[:, 0].tolist()
    said = [embed.terms_of(corpus.data.texts[t]) for t in test]
    before = None
    judged = 0
    for row, (_, odds) in zip(rows, names_of(corpus, codes), strict=True):
        fires = [bool(codes.values[t][codes.latents[t] == row["latent"]].sum() > 0) for t in test]
        score = [sum(value for term, value in odds.items() if term in terms) for terms in said]
        for name, given in (("detection_auroc", score), ("permuted_auroc", before)):
            if given is None or len(set(fires)) < 2:
                assert row[name] is None
                continue
            own = [one for one, fired in zip(given, fires) if fired]
            others = [one for one, fired in zip(given, fires) if not fired]
            won = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(own, others)]
            assert row[name] == pytest.approx(np.mean(won))
            judged += 1
        before = score
    assert judged > 10


def test_library_names_what_it_found(tiny_run):
    rows = evaluation.read_intents(tiny_run)
    assert [row["intent"] for row in rows] == list(range(len(rows)))
    assert len({row["label"] for row in rows}) == len(rows)
    topics = ["space rocket planet orbit astronaut", "cooking recipe oven butter kitchen"]
    topics.append("music guitar melody concert singer")
    firsts = [row["keywords"][0].split()[0] for row in rows]
    assert sum(any(word in topic for topic in topics) for word in firsts) >= 0.7 * len(rows)
    said = {"intent", "latent", "label", "keywords", "texts", "items", "density", "support"}
    scores = {"detection_auroc", "detection_texts", "permuted_auroc", "meaning_auroc"}
    assert set(rows[0]) == said | scores
    assert all(row["support"] == 1 for row in rows)  # the one other SAE has them, too
    assert all(row["meaning_auroc"] is None for row in rows)  # word_vectors is no encoder
    tensors = saerec.load_artifact(tiny_run / "intents.safetensors", "")[0]
    assert tensors["support"].tolist() == [row["support"] for row in rows]
    assert tensors["latent"].tolist() == [row["latent"] for row in rows]


def test_the_model_kept_is_that_of_the_best_epoch(tiny_run, monkeypatch):
    """And training stops when as many epochs as --patience says were no better."""
    data = saerec.run_dataset(tiny_run)
    ndcg = iter([0.1, 0.3, 0.2, 0.25, 0.9])
    parameters = []

    def validate(net, data):
        parameters.append({name: t.clone() for name, t in net.state_dict().items()})
        return {"NDCG@10": next(ndcg), "HR@10": 0.5}

    monkeypatch.setattr(model, "validate", validate)
    flags = dict(width=8, epochs=9, patience=2, device="cpu")
    settings = model.ModelSettings(run=str(tiny_run), **flags)
    net, log = model.train_model(model.new_model(model.SASRec, settings, data), data)
    assert [line["valid_NDCG@10"] for line in log] == [0.1, 0.3, 0.2, 0.25]
    kept = net.state_dict()
    assert all(torch.equal(kept[name], t) for name, t in parameters[1].items())
    assert not torch.equal(kept["item.weight"], parameters[3]["item.weight"])


def test_models_train_with_dropout_and_rank_without(tiny_run, monkeypatch):
    data = saerec.run_dataset(tiny_run)
    settings = model.ModelSettings(run=str(tiny_run), width=8, epochs=2, device="cpu")
    net = model.new_model(model.SASRec, settings, data)
    when = []
    rank_users = saerec.rank_users

    def loss(net, batch):
        when.append(("loss", net.training))
        return model.catalogue_loss(net, batch)

    def ranks(*arguments):
        when.append(("ranks", net.training))
        return rank_users(*arguments)

    monkeypatch.setattr(model, "rank_users", ranks)
    model.train_model(net, data, loss)
    assert set(when) == {("loss", True), ("ranks", False)}
    assert when.count(("ranks", False)) == 2 and when[-1][0] == "ranks"


@pytest.mark.parametrize("Model, times", [*zip(MODELS, (7, 19, 7))])
def test_dropout_is_everywhere(Model, times, monkeypatch):
    """Once on the input, and thrice in each block: weights, attended, feed-forward."""
    net = build(Model).train()
    dropout = model.dropout
    seen = []

    def counted(x, p, training):
        seen.append((p, training))
        return dropout(x, p, training)

    monkeypatch.setattr(model, "dropout", counted)
    items, _, real = padded(*histories([6, 6]))
    net(items, F.embedding(items, net.item_table()), places(real))
    assert seen == [(0.5, True)] * times


def test_batches_are_drawn_anew():
    """Which rows go together, where lengths tie, and in what order batches come."""
    random = saerec.generator(0, "x")
    alike = model.Rows(torch.arange(60), torch.full((60,), 3))
    passes = []
    for _ in range(2):
        batches = model.shuffled_batches(alike, 30, random)
        passes.append({tuple(sorted(batch.tolist())) for batch in batches})
    assert passes[0] != passes[1]
    longer = model.Rows(torch.arange(60), torch.arange(60) // 10 + 1)
    batches = model.shuffled_batches(longer, 30, random)
    lengths = [float(longer.length[batch].float().mean()) for batch in batches]
    assert lengths != sorted(lengths)


@pytest.mark.parametrize("Model", MODELS)
def test_eight_users_overfit(tmp_path, Model):
    """On 8 users a model learns by heart what each took next."""
    data = saerec.load_dataset(write_dataset(tmp_path / "d", users=8))
    net = build(Model, width=32, dropout=0.0).train()
    rows = model.training_rows(data, 12)
    flat = torch.from_numpy(data.flat).long()
    batch = model.make_batch(rows, torch.arange(len(rows.length)), flat, torch.device("cpu"))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(40):
        loss = model.train_step(net, optimizer, model.catalogue_loss, batch)
    assert loss < 0.1


def test_ids_beside_intents_start_at_nothing_and_learn(tiny_run):
    data = saerec.run_dataset(tiny_run)
    settings = dataclasses.replace(SETTINGS, run=str(tiny_run))
    new = model.new_model(model.Grounded, settings, data)
    assert not new.item.weight.any() and new.item_table()[1:].any(1).sum() > 15
    assert model.new_model(model.SASRec, settings, data).item.weight[1:].any(1).all()
    trained = evaluation.load_model(tiny_run, "grounded", data)
    assert trained.item.weight[1:].any() and not trained.item.weight[0].any()


# A library that another seed finds again


def noisy_copies(copies, noise=0.3):
    """SAEs whose rows are those of one dictionary, noisy and in another order each."""
    random = torch.Generator().manual_seed(5)
    truth = F.normalize(torch.randn(12, 24, generator=random), dim=1)
    found = []
    for _ in range(copies):
        order = torch.randperm(12, generator=random)
        net = sae.SAE(12, 2, 24)
        noisy = truth[order] + noise * torch.randn(12, 24, generator=random) / 24**0.5
        net.W_dec.data = F.normalize(noisy, dim=1)
        net.W_enc.data = 2 * net.W_dec.data
        net.b_enc.data = order.float()
        found.append((net, order))
    return truth, found


def test_consensus_averages_permuted_noisy_copies():
    truth, found = noisy_copies(4)
    net, support = sae.consensus([one for one, _ in found])
    first, order = found[0]
    assert support.tolist() == [3] * 12
    assert torch.equal(net.b_enc.data, order.float())  # each was averaged with its own copies
    nearer = (net.W_dec * truth[order]).sum(1) > (first.W_dec * truth[order]).sum(1)
    assert nearer.float().mean() > 0.9
    torch.testing.assert_close(net.W_dec.norm(dim=1), torch.ones(12))


def test_what_only_the_first_has_stays_as_it_is():
    _, found = noisy_copies(3)
    first, *others = (one for one, _ in found)
    alone = torch.zeros(24)
    alone[0] = 1
    first.W_dec.data[5] = alone
    for other in others:
        other.W_dec.data[:, 0] = 0
    net, support = sae.consensus([first, *others])
    assert support[5] == 0 and torch.equal(net.W_dec.data[5], alone)
    assert torch.equal(net.W_enc.data[5], first.W_enc.data[5])
    assert (support > 0).sum() >= 9


def test_an_intent_is_found_by_half_of_the_others(tiny_run):
    """Of 3 others two are enough, one is not; the only SAE there is needs none."""
    settings = sae.SaeSettings(run=str(tiny_run), members=4, min_items=2, held_out=0.2)
    corpus = sae.load_corpus(tiny_run, settings)
    net = sae.SAE(16, 3, 8)
    net.load_state_dict(saerec.load_artifact(tiny_run / "sae.safetensors", "")[0])
    codes = sae.encode_all(net, corpus.embeddings)

    def found(support, **more):
        changed = dataclasses.replace(settings, **more)
        vectors = net.W_dec.detach()
        return sae.build_library(vectors, codes, support, corpus, changed)[0]["latent"].tolist()

    everyone = found(torch.full((16,), 3))
    support = torch.arange(16) % 4
    assert found(support) == [latent for latent in everyone if latent % 4 >= 2]
    assert found(0 * support, members=1) == everyone
    with pytest.raises(saerec.UserError, match="no latent that other SAEs find"):
        found(0 * support + 1)


def test_words_of_the_encoder_name_intents(tiny_run):
    """An encoder's vector of a word is here the mean of the texts that say it."""
    settings = sae.SaeSettings(run=str(tiny_run), members=2, min_items=2, held_out=0.2)
    corpus = sae.load_corpus(tiny_run, settings)
    assert corpus.words == {} and corpus.word_vectors.shape == (0, 8)
    words = " ".join(TOPICS.values()).split()
    centred = corpus.embeddings - corpus.embeddings.mean(0)
    said = [torch.tensor([word in text for text in corpus.data.texts]) for word in words]
    vectors = torch.stack([centred[texts].mean(0) for texts in said])
    rows = {word: row for row, word in enumerate(words)}
    corpus = dataclasses.replace(corpus, words=rows, word_vectors=vectors)
    net = sae.SAE(16, 3, 8)
    net.load_state_dict(saerec.load_artifact(tiny_run / "sae.safetensors", "")[0])
    codes = sae.encode_all(net, corpus.embeddings)
    rows = sae.build_library(net.W_dec.detach(), codes, torch.ones(16), corpus, settings)[1]
    assert len({row["label"] for row in rows}) == len(rows) > 3
    labels = [set(row["label"].split(" (")[0].split(", ")) for row in rows]
    assert all(label <= {*words, *row["keywords"]} for label, row in zip(labels, rows))
    spoken = [any(word in row["texts"][0] for word in one) for one, row in zip(labels, rows)]
    assert np.mean(spoken) > 0.8
    measured = [row["meaning_auroc"] for row in rows if row["detection_texts"]]
    assert len(measured) > 3 and np.mean(measured) > 0.7, measured


def test_averaged_saes_of_two_seeds_find_the_same():
    """Of more latents than there are factors: the share that another seed has, too."""
    x, _ = planted(2000, factors=40)
    base = dataclasses.replace(SAE_SETTINGS, latents=64, lr=1e-3)

    def shared(members):
        settings = (dataclasses.replace(base, members=members, seed=seed) for seed in (0, 1))
        one, two = (sae.train_sae(x, held_out(len(x)), s)[0].W_dec.detach() for s in settings)
        return ((one @ two.T).max(1).values > 0.8).float().mean()

    assert shared(members=4) > max(shared(members=1) + 0.03, 0.9)


def test_held_out_texts_know_no_seed_and_part_no_copies():
    texts = [f"text {n}" for n in range(1000)]
    chosen = sae.held_out_texts(texts + texts, 0.1)
    assert chosen[:1000].sum() == 100 and torch.equal(chosen[:1000], chosen[1000:])
    backwards = sae.held_out_texts(texts[::-1], 0.1).flip(0)
    assert torch.equal(backwards, chosen[:1000])


def test_start_at_centroids_and_the_least_squares_gain():
    """Three tight clusters: a row each; and scaling the codes again changes nothing."""
    random = torch.Generator().manual_seed(0)
    centers = F.normalize(torch.randn(3, 24, generator=random) + 1, dim=1)  # alike: they overlap
    x = centers.repeat(50, 1) + 0.01 * torch.randn(150, 24, generator=random)
    for seed in range(20):  # Lloyd's algorithm may begin with two rows of one cluster
        net = sae.SAE(3, 2, 24)
        net.start(x, torch.Generator().manual_seed(seed))
        if (net.W_dec @ centers.T).max(0).values.min() > 0.99:
            break
    assert (net.W_dec @ centers.T).max(0).values.min() > 0.99
    gain = net.W_enc[0].norm().item()
    net.fit_gain(x)
    assert net.W_enc[0].norm().item() == pytest.approx(gain, rel=1e-5) and gain < 0.9


def test_fewer_texts_than_latents_leave_the_other_rows_at_random():
    """And not the same at random, which the average would take for what all of them found."""
    x = planted(10)[0]
    members = [sae.SAE(32, 2, 24) for _ in range(3)]
    for seed, member in enumerate(members):
        member.start(x, torch.Generator().manual_seed(seed))
    texts = F.normalize(x, dim=1)
    for member in members:
        cosine = member.W_dec @ texts.T
        assert (cosine[:10].max(1).values > 1 - 1e-5).all() and (cosine[10:].max(1).values < 0.9).all()
        assert member.W_dec.norm(dim=1).tolist() == pytest.approx([1] * 32, abs=1e-5)
    _, support = sae.consensus(members)
    assert support[:10].tolist() == [2] * 10 and support[10:].sum() < 5  # a few by chance


# Repeatable


def test_same_seed_gives_the_same_metrics_byte_for_byte(tmp_path, tiny_data, tiny_run):
    again = make_run(tiny_data, tmp_path / "again")
    for name in ("metrics.json", "intents.jsonl"):
        assert (again / name).read_bytes() == (tiny_run / name).read_bytes()


def test_metrics_name_the_seeds_of_their_models(tmp_path, tiny_data, tiny_run):
    run = copy_run(tiny_run, tmp_path / "run")
    for seed, said in ((0, 0), (1, [0, 1])):
        make_run(tiny_data, run, stages="sasrec", seed=seed)
        make_run(tiny_data, run, stages="eval", seed=2)  # of the users shown
        assert json.loads((run / "metrics.json").read_text())["seed"] == said


@pytest.mark.parametrize("name", ["sasrec", "saerec", "grounded"])
def test_a_saved_model_validates_as_its_log_says(tiny_run, name):
    """It is read from its file, and is that of the best epoch."""
    data = saerec.run_dataset(tiny_run)
    net = evaluation.load_model(tiny_run, name, data)
    lines = (tiny_run / f"{name}_log.csv").read_text().splitlines()
    best = max(float(line.split(",")[-1]) for line in lines[1:])
    assert lines[0].endswith(",valid_NDCG@10")
    assert model.validate(net, data)["NDCG@10"] == pytest.approx(best, rel=1e-4)
    stored = saerec.load_artifact(tiny_run / f"{name}.safetensors", "")[0]
    if name == "saerec":
        assert stored["n"] > 0 and stored["df"].sum() > 0  # the moving averages are saved


def test_saved_sae_has_unit_rows_and_gives_the_librarys_codes_bit_for_bit(tiny_run):
    tensors, _ = saerec.load_artifact(tiny_run / "sae.safetensors", "sae.py")
    path = tiny_run / "embeddings.safetensors"
    embeddings = saerec.load_artifact(path, "embed.py")[0]["embeddings"]
    torch.testing.assert_close(tensors["W_dec"].norm(dim=1), torch.ones(16))
    net = sae.SAE(16, 9, embeddings.shape[1], seed=9)
    net.load_state_dict(tensors)
    library = saerec.load_artifact(tiny_run / "intents.safetensors", "sae.py")[0]
    data = saerec.run_dataset(tiny_run)
    number = torch.full((16,), -1)
    number[library["latent"].long()] = torch.arange(len(library["latent"]))
    text_item = torch.from_numpy(data.text_item).long()
    codes = sae.item_codes(sae.encode_all(net, embeddings), text_item, 30, number)
    for name in ("indptr", "indices", "values"):
        assert torch.equal(getattr(codes, name), library[name])
    torch.testing.assert_close(library["vectors"], tensors["W_dec"][library["latent"].long()])


def test_what_was_judged_no_intent_has_no_codes(tmp_path, tiny_run):
    """tools/label.py marks intents; the others keep their numbers."""
    run = copy_run(tiny_run, tmp_path / "run")
    tensors, meta = saerec.load_artifact(run / "intents.safetensors", "")
    tensors["is_intent"][2] = False
    saerec.write_artifact(run / "intents.safetensors", tensors, meta)
    data = saerec.run_dataset(run)
    assert not sae.load_intents(run, data).vectors[2].any()
    before = sae.load_intents(tiny_run, data).codes.dense()
    after = sae.load_intents(run, data).codes.dense()
    assert before[:, 2].any() and not after[:, 2].any()
    before[:, 2] = 0
    assert torch.equal(before, after)


def test_what_was_judged_no_intent_is_not_attended_to():
    """SAERec without the vectors of some intents: they are neither personal nor public."""
    h = torch.randn(50, 8)
    before = build(model.SAERec)
    chosen = before.personal_intents(h, before.project(before.d))
    assert before.public_intents().tolist() == [3, 1] and (chosen == 5).any()

    vectors = INTENTS.vectors.clone()
    vectors[[3, 5]] = 0
    intents = INTENTS._replace(vectors=vectors)
    after = build(model.SAERec, intents=intents).train()
    chosen = after.personal_intents(h, after.project(after.d))
    assert not torch.isin(chosen, torch.tensor([3, 5])).any() and (chosen < J).any()
    assert after.df[3] == pytest.approx(0.9 * 30) and after.df[5] == pytest.approx(0.9 * 8)
    assert after.df.argmax() == 3 and not {3, 5} & set(after.public_intents().tolist())
    with pytest.raises(saerec.UserError, match="above 5 intents: lower it"):
        build(model.SAERec, intents=intents, public=6)
