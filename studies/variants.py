"""Variants of the three models: subclasses of a few lines each, and the losses that some need.

What each answers is in docs/results.md; `studies/ablate.py` trains them.
"""

import saerec  # noqa: F401  before torch, see GOMP_SPINCOUNT there

import torch
import torch.nn.functional as F

from model import (
    Blocks, Grounded, SAERec, SASRec, full_softmax, inverse_frequency, read_histories,
)  # fmt: skip
from sae import SparseRows
from studies.baselines import GRU4Rec

# Of Grounded; without match and without intents in its items it is SASRec


class WithoutMatch(Grounded):
    """Equation (12) without its second term: intents say what an item is, and no more."""

    forward = SASRec.forward
    scores = SASRec.scores

    def reasons(self, state, item):
        nothing = state.u.new_zeros(1, self.codes.columns)
        return super().reasons(state._replace(r=nothing), item)

    def intents_shown(self, state):
        return {}


class MatchAlone(Grounded):
    """Equation (10) without its second term: an item is its id, and has intents to match alone."""

    start_ids = SASRec.start_ids
    item_table = SASRec.item_table

    def add_parameters(self, data, intents):
        super().add_parameters(data, intents)
        del self.intent_vectors

    def intent_table(self):
        return self.idf.new_zeros(len(self.idf), self.settings.width)


class SharedProjection(Grounded):
    """An intent adds P d_j + p_j to its items: what its direction says, and what it learned."""

    def add_parameters(self, data, intents):
        super().add_parameters(data, intents)
        self.directions = intents.vectors  # (J, E)
        width = self.directions.shape[1]
        self.shared = torch.nn.Linear(width, self.settings.width, bias=False)  # P

    def intent_table(self):
        return super().intent_table() + self.shared(self.directions)


class NextIntent(Grounded):
    """The state also predicts the next item's intents, softmax_j <u, Q d_j>; see its loss."""

    def add_parameters(self, data, intents):
        super().add_parameters(data, intents)
        self.directions = intents.vectors  # (J, E)
        width = self.directions.shape[1]
        self.predict = torch.nn.Linear(width, self.settings.width, bias=False)  # Q
        mass = self.codes.dense().sum(1)  # (V+1,)
        self.covered = mass > 0
        share = self.codes.values / mass[self.codes.rows_of_cells()]
        self.shares = SparseRows(self.codes.indptr, self.codes.indices, share, self.codes.columns)


class SharedProjectionNextIntent(NextIntent, SharedProjection):
    """Both."""


def next_intent_loss(model, batch, weight=0.3):
    """Equation (4) and, weighted, the cross entropy of NextIntent's softmax and the target's codes.

    The codes are scaled to sum 1; a target without codes counts 0.
    """
    table = model.item_table()  # (V+1, D)
    state = read_histories(model, batch, F.embedding(batch.items, table))
    intents = model.predict(model.directions)  # (J, D)
    counted = batch.weight * model.covered[batch.target]
    # sum_j share_vj <u, Q d_j> is one product with the item's mixed vector: no P x J target exists
    mixed = F.embedding(batch.target, model.shares.mix(intents))  # (P, D)
    log_sum = (state.u @ intents.T).logsumexp(1)
    intent_loss = counted @ (log_sum - (state.u * mixed).sum(1))
    return full_softmax(model, state, table, batch) + weight * intent_loss


class GroundedGRU(GRU4Rec, Grounded):
    """Recurrent layers read the history."""


# Of SAERec


class PersonalOnly(SAERec):
    """u = a + b, since a branch alone has all the weight."""

    def add_parameters(self, data, intents):
        super().add_parameters(data, intents)
        self.public_branch = Blocks()

    def fuse(self, a, b, c):
        return torch.stack([a, b, torch.zeros_like(c)])


class PublicOnly(SAERec):
    """u = a + c."""

    def add_parameters(self, data, intents):
        super().add_parameters(data, intents)
        self.personal_branch = Blocks()

    def fuse(self, a, b, c):
        return torch.stack([a, torch.zeros_like(b), c])


class FusionBySum(SAERec):
    """u = a + b + c."""

    def fuse(self, a, b, c):
        return torch.stack([a, b, c])


class FusionByConcatenation(SAERec):
    """u = A a + B b + C c + bias."""

    def add_parameters(self, data, intents):
        super().add_parameters(data, intents)
        D = self.settings.width
        biases = (True, False, False)
        self.joined = torch.nn.ModuleList(torch.nn.Linear(D, D, bias=bias) for bias in biases)

    def fuse(self, a, b, c):
        return torch.stack([linear(x) for linear, x in zip(self.joined, (a, b, c))])


class Retrieval(SAERec):
    """Personal intents are chosen by a method that knows more than the paper's."""

    def choose(self, a, z, items, wanted):
        """Personal intents of the wanted positions -> int64 [P, k]; a: [P, D]; z: [J+1, D]."""
        raise NotImplementedError

    def forward(self, items, vectors, wanted):
        h = self.embed(vectors)  # (B, T, D)
        a = self.trunk(h).flatten(0, 1)[wanted]  # (P, D)
        h = h.flatten(0, 1)[wanted]  # (P, D)
        z = self.project(self.d)  # (J+1, D)
        return self.guide(a, h, z, self.choose(a, z, items, wanted))


class RetrievalFromTrunk(Retrieval):
    """Equation (6) asks with what the trunk made of the history, not with the last item."""

    def choose(self, a, z, items, wanted):
        return self.personal_intents(a, z)


class RetrievalByActivation(Retrieval):
    """Personal intents are those of the history's texts, the k largest r_j of equation (11).

    Public ones are the most frequent in training, so nothing moves while it trains.
    """

    history_intents = Grounded.history_intents
    matched = Grounded.matched

    def add_parameters(self, data, intents):
        super().add_parameters(data, intents)
        self.codes = intents.codes
        self.register_buffer("idf", inverse_frequency(data.training_items(), self.codes))

    def choose(self, a, z, items, wanted):
        r, chosen = self.history_intents(items, wanted).topk(self.settings.personal)  # (P, k)
        return torch.where(r > 0, chosen, len(self.idf))

    def public_intents(self):
        return self.idf.topk(self.settings.public, largest=False).indices


# Of both


class GroundedBranches(Grounded, RetrievalByActivation):
    """Grounded with the paper's branches on top, which find personal intents by activation."""

    def add_parameters(self, data, intents):
        Grounded.add_parameters(self, data, intents)
        RetrievalByActivation.add_parameters(self, data, intents)


class Everything(SharedProjectionNextIntent, GroundedBranches):
    """Grounded with branches, shared projection and next-intent loss."""
