"""Variants of the models: each by its equation, and what holds for every model holds for them."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model
import sae
from studies import baselines, variants

V = 30
J = 7
E = 6
BASE = model.ModelSettings(
    width=8, layers=2, heads=2, dropout=0.5, history=12, personal=3, public=2, match=0.7
)
OF_GROUNDED = (
    variants.WithoutMatch, variants.MatchAlone, variants.SharedProjection, variants.NextIntent,
    variants.SharedProjectionNextIntent, variants.GroundedGRU, variants.GroundedBranches,
    variants.Everything,
)  # fmt: skip
OF_SAEREC = (
    variants.PersonalOnly, variants.PublicOnly, variants.FusionBySum,
    variants.FusionByConcatenation, variants.RetrievalFromTrunk, variants.RetrievalByActivation,
)  # fmt: skip
OTHERS = (baselines.GRU4Rec, baselines.SASRecWithText)
ALL = (*OF_GROUNDED, *OF_SAEREC, *OTHERS)
WITH_LOSS = (variants.NextIntent, variants.SharedProjectionNextIntent, variants.Everything)


def random_intents(seed=0):
    """Intents of which padding and item 5 have none -> (Intents, dense codes [V+1, J])."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.rand(V + 1, J, generator=g) * (torch.rand(V + 1, J, generator=g) < 0.4)
    codes[[0, 5]] = 0
    bounds = sae.cell_bounds((codes > 0).sum(1))
    sparse = sae.SparseRows(bounds, codes.nonzero()[:, 1].int(), codes[codes > 0], J)
    vectors = F.normalize(torch.randn(J, E, generator=g), dim=1)
    return sae.Intents(vectors, sparse), codes


INTENTS, CODES = random_intents()
TRAINING = np.random.default_rng(1).integers(1, V + 1, 60).astype(np.int32)


class Data:
    """What models read of a Dataset."""

    items = [""] * (V + 1)

    def training_items(self):
        return TRAINING


DATA = Data()


def build(Model, seed=0, **changes):
    """A model whose parameters are large enough that everything matters."""
    torch.manual_seed(seed)
    net = Model(dataclasses.replace(BASE, **changes), DATA, INTENTS)
    with torch.no_grad():
        for p in net.parameters():
            p += 0.3 * torch.randn(p.shape)
        net.item.weight[0] = 0
        if isinstance(net, model.SAERec):
            net.df.copy_(torch.tensor([5.0, 9, 1, 30, 2, 8, 4]))
            net.n.fill_(60)
    return net.eval()


def like(net, Model):
    """A model of another class with the parameters that both have."""
    other = build(Model, seed=1)
    other.load_state_dict(net.state_dict(), strict=False)
    return other


def histories(lengths, seed=0):
    """Items of histories after one another, and where each begins -> (flat int64, start)."""
    g = torch.Generator().manual_seed(seed)
    start = np.cumsum([0, *lengths])
    return torch.randint(1, V + 1, (int(start[-1]),), generator=g), start


def rows_of(start):
    """Whole histories, the last item of each being a target alone -> Rows."""
    return model.Rows(torch.from_numpy(start[:-1]), torch.from_numpy(np.diff(start) - 1))


def batch_of(rows, flat, last_alone=False):
    """The Batch of all rows, whose wanted positions, all or the last of each, count alike."""
    place, items, wanted = model.pad_rows(rows, torch.arange(len(rows.length)), flat)
    if last_alone:
        wanted = wanted & (torch.arange(wanted.shape[1]) == rows.length[:, None] - 1)
    count = int(wanted.sum())
    real = wanted.flatten().nonzero()[:, 0]
    return model.Batch(items, real, flat[place[wanted] + 1], torch.full((count,), 1 / count))


@torch.no_grad()
def scores_of(net, items, wanted):
    """Scores [P, V+1] at places int64 [P] of items [B, T]."""
    table = net.item_table()
    return net.scores(net(items, F.embedding(items, table), wanted), table)


def loss_of(net):
    if isinstance(net, WITH_LOSS):
        return variants.next_intent_loss
    return model.catalogue_loss


def state_of(net, lengths=(6, 9, 3)):
    """The State at all real positions of some histories -> (items, wanted, State)."""
    flat, start = histories(lengths)
    batch = batch_of(rows_of(start), flat)
    with torch.no_grad():
        vectors = F.embedding(batch.items, net.item_table())
        return batch.items, batch.real, net(batch.items, vectors, batch.real)


# What holds for all


@pytest.mark.parametrize("Model", ALL)
def test_causality(Model):
    """Changing the items after position t moves no score up to t, and all after it."""
    net = build(Model)
    items = histories([12] * 3)[0].view(3, 12)[:, :11]
    wanted = torch.arange(items.numel())
    before = scores_of(net, items, wanted).view(3, 11, -1)
    for t in (0, 4, 9):
        changed = items.clone()
        changed[:, t + 1 :] = changed[:, t + 1 :] % V + 1
        after = scores_of(net, changed, wanted).view(3, 11, -1)
        torch.testing.assert_close(after[:, : t + 1], before[:, : t + 1], atol=1e-5, rtol=1e-4)
        assert (after[:, t + 1 :] - before[:, t + 1 :]).abs().amax(2).min() > 1e-3


@pytest.mark.parametrize("Model", ALL)
def test_padding_and_batch_mates_change_nothing(Model):
    net = build(Model)
    flat, start = histories([3, 12, 7, 5])
    rows = rows_of(start)
    batch = batch_of(rows, flat)
    lengths = rows.length.tolist()
    together = scores_of(net, batch.items, batch.real).split(lengths)
    order = torch.tensor([2, 0, 3, 1])
    other = batch_of(model.Rows(rows.begin[order], rows.length[order]), flat)
    parts = scores_of(net, other.items, other.real).split(rows.length[order].tolist())
    for user, n in enumerate(lengths):
        alone = scores_of(net, batch.items[user : user + 1, :n], torch.arange(n))
        shuffled = parts[order.tolist().index(user)]
        torch.testing.assert_close(together[user], alone, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(shuffled, alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("Model", ALL)
def test_one_pass_equals_a_row_for_every_prefix(Model):
    """Loss and gradient of every prefix as a padded row of which only the last position counts."""
    net = build(Model)
    loss = loss_of(net)
    flat, start = histories([3, 12, 7, 5, 2])
    value = loss(net, batch_of(rows_of(start), flat))
    value.backward()
    expected = {n: p.grad.clone() for n, p in net.named_parameters() if p.grad is not None}
    assert expected.keys() == dict(net.named_parameters()).keys()  # nothing lies idle
    net.zero_grad()
    begins = []
    lengths = []
    for begin, end in itertools.pairwise(start.tolist()):
        begins += [begin] * (end - begin - 1)
        lengths += range(1, end - begin)
    prefixes = model.Rows(torch.tensor(begins), torch.tensor(lengths))
    again = loss(net, batch_of(prefixes, flat, last_alone=True))
    again.backward()
    torch.testing.assert_close(again, value)
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], atol=3e-6, rtol=1e-3)


@pytest.mark.parametrize("Model", ALL)
@torch.no_grad()
def test_reasons_add_up_to_the_score(Model):
    net = build(Model)
    items = histories([9])[0][None]
    last = torch.tensor([8])
    state = net(items, F.embedding(items, net.item_table()), last)
    scores = scores_of(net, items, last)[0]
    for item in (1, 5, 9):
        reasons = net.reasons(state, item)
        total = sum(reasons.parts.values()) + float(reasons.terms.sum())
        assert total == pytest.approx(scores[item].item(), abs=1e-4)
    for intents in net.intents_shown(state).values():
        assert intents.dtype == torch.int64 and (intents < J).all()


# Of Grounded


def test_without_match_is_grounded_with_weight_0():
    net = build(variants.WithoutMatch)
    items, wanted, state = state_of(net)
    assert state.r is None
    grounded = like(net, model.Grounded)
    with_match = scores_of(grounded, items, wanted)
    grounded.settings = dataclasses.replace(BASE, match=0.0)
    scores = scores_of(net, items, wanted)
    torch.testing.assert_close(scores, scores_of(grounded, items, wanted))
    assert (scores - with_match).abs().max() > 0.1


def test_match_alone_is_sasrec_and_the_match():
    """With neither it is SASRec, which is why there is no class of that kind."""
    net = build(variants.MatchAlone)
    items, wanted, state = state_of(net)
    sasrec = like(net, model.SASRec)
    r = like(net, model.Grounded).history_intents(items, wanted)
    expected = scores_of(sasrec, items, wanted) + 0.7 * r @ CODES.T
    torch.testing.assert_close(scores_of(net, items, wanted), expected)
    assert {*dict(net.named_parameters())} == {*dict(sasrec.named_parameters())}
    started = variants.MatchAlone(BASE, DATA, INTENTS).item.weight
    assert started[1:].any(1).all() and not started[0].any()


@pytest.mark.parametrize("Model", [variants.SharedProjection, variants.Everything])
def test_shared_projection_by_equation(Model):
    net = build(Model)
    directions = INTENTS.vectors @ net.shared.weight.T  # (J, D)
    expected = net.item.weight + CODES @ (directions + net.intent_vectors)
    torch.testing.assert_close(net.item_table(), expected)


@pytest.mark.parametrize("Model", WITH_LOSS)
def test_next_intent_loss_by_equation(Model):
    net = build(Model)
    flat, start = histories([9, 12, 4])
    batch = batch_of(rows_of(start), flat)
    target = batch.target.clone()
    target[3] = 5  # without codes, which leaves it out
    batch = batch._replace(target=target, weight=torch.rand(len(target)))
    u = net(batch.items, F.embedding(batch.items, net.item_table()), batch.real).u
    log_q = (u @ (INTENTS.vectors @ net.predict.weight.T).T).log_softmax(1)
    codes = CODES[target]
    has = codes.sum(1) > 0
    assert not has[3] and has.sum() > 15
    shares = codes[has] / codes[has].sum(1, keepdim=True)
    expected = -(batch.weight[has] * (shares * log_q[has]).sum(1)).sum()
    for weight in (0.3, 2.0):
        found = variants.next_intent_loss(net, batch, weight) - model.catalogue_loss(net, batch)
        torch.testing.assert_close(found, weight * expected)


# Of SAERec


def branches_of(net, chosen=None):
    """What SAERec's state is made of, written out -> (a, b, c, personal intents)."""
    flat, start = histories((6, 9, 3))
    batch = batch_of(rows_of(start), flat)
    with torch.no_grad():
        h = net.embed(F.embedding(batch.items, net.item_table()))
        a = net.trunk(h).flatten(0, 1)[batch.real]
        h = h.flatten(0, 1)[batch.real]
        z = net.project(net.d)
        if chosen is None:
            chosen = net.personal_intents(h, z)
        public = net.public_intents().expand(len(h), -1)
        return a, net.personal_branch(h, z, chosen), net.public_branch(h, z, public), chosen


def test_fusions_by_hand():
    whole = build(model.SAERec)
    a, b, c, _ = branches_of(whole)
    joined = build(variants.FusionByConcatenation)
    weight = torch.cat([linear.weight for linear in joined.joined], 1)  # (D, 3 D)
    for Model, expected in (
        (variants.PersonalOnly, a + b), (variants.PublicOnly, a + c),
        (variants.FusionBySum, a + b + c),
    ):  # fmt: skip
        _, _, state = state_of(like(whole, Model))
        torch.testing.assert_close(state.u, expected)
        torch.testing.assert_close(state.parts.sum(0), state.u)
    a, b, c, _ = branches_of(joined)
    _, _, state = state_of(joined)
    expected = torch.cat([a, b, c], 1) @ weight.T + joined.joined[0].bias
    torch.testing.assert_close(state.u, expected)


def test_one_branch_has_no_parameters_of_the_other():
    both = {name for name, _ in build(model.SAERec).named_parameters()}
    for Model, gone in ((variants.PersonalOnly, "public"), (variants.PublicOnly, "personal")):
        left = {name for name, _ in build(Model).named_parameters()}
        assert left < both and {name.split("_")[0] for name in both - left} == {gone}


def test_retrieval_from_the_trunk_asks_with_its_state():
    net = build(variants.RetrievalFromTrunk)
    a, _, _, _ = branches_of(net)
    _, _, state = state_of(net)
    z = net.project(net.d)
    assert torch.equal(state.personal, net.personal_intents(a, z))
    _, _, by_item = state_of(like(net, model.SAERec))
    assert not torch.equal(state.personal, by_item.personal)
    torch.testing.assert_close(state.u, model.SAERec.fuse(*branches_of(net, state.personal)[:3]).sum(0))


@pytest.mark.parametrize(
    "Model", [variants.RetrievalByActivation, variants.GroundedBranches, variants.Everything]
)
def test_activation_retrieval_by_brute_force(Model):
    net = build(Model)
    items, _, state = state_of(net)
    df = torch.bincount(torch.from_numpy(TRAINING), minlength=V + 1).float() @ (CODES > 0).float()
    idf = torch.log((1 + len(TRAINING)) / (1 + df))
    expected = []
    for row, length in zip(items, (5, 8, 2)):
        for t in range(length):
            tf = sum(BASE.decay ** (t - i) * CODES[row[i]] for i in range(t + 1))
            r = (tf * idf).tolist()
            best = sorted((-value, j) for j, value in enumerate(r) if value > 0)[:3]
            own = [j for _, j in best]
            expected.append(own + [J] * (3 - len(own)))
    assert state.personal.tolist() == expected
    common = sorted((-count, j) for j, count in enumerate(df.tolist()))
    assert net.public_intents().tolist() == [j for _, j in common[:2]]


def test_nothing_in_the_history_is_the_absent_intent():
    net = build(variants.RetrievalByActivation)
    items = torch.full((1, 3), 5)  # without codes
    with torch.no_grad():
        state = net(items, F.embedding(items, net.item_table()), torch.arange(3))
    assert (state.personal == J).all() and torch.isfinite(state.u).all()


# Of both


def test_grounded_branches_are_both():
    net = build(variants.GroundedBranches)
    items, wanted, state = state_of(net)
    chosen = state.personal
    torch.testing.assert_close(state.u, model.SAERec.fuse(*branches_of(net, chosen)[:3]).sum(0))
    r = net.history_intents(items, wanted)
    assert torch.equal(state.r, r)
    table = net.item.weight + CODES @ net.intent_vectors
    expected = state.u @ table.T + 0.7 * r @ CODES.T
    torch.testing.assert_close(scores_of(net, items, wanted), expected)
    started = variants.GroundedBranches(BASE, DATA, INTENTS)
    assert not started.item.weight.any() and started.intent_vectors.any()


def test_everything_has_all_parameters():
    names = {name for name, _ in build(variants.Everything).named_parameters()}
    for Model in (variants.SharedProjectionNextIntent, variants.GroundedBranches):
        assert {name for name, _ in build(Model).named_parameters()} <= names


def test_a_gru_in_grounded_changes_the_trunk_alone():
    net = build(variants.GroundedGRU)
    items, wanted, state = state_of(net)
    recurrent = like(net, baselines.GRU4Rec)
    table = net.item_table()
    with torch.no_grad():
        expected = recurrent(items, F.embedding(items, table), wanted).u
    torch.testing.assert_close(state.u, expected)
    torch.testing.assert_close(table, net.item.weight + CODES @ net.intent_vectors)
