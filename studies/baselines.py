"""What any recommender should be compared with: counting, factorizing, neighbours, other trunks.

Popularity, BPR-MF and item kNN, alone or added to a trained model's scores, are functions that rank
a run's users; GRU4Rec and SASRec + text are models that train as SASRec does. `studies/ablate.py`
runs them all.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import NamedTuple

from saerec import generator, rank_users, ranking_metrics

import numpy as np
import torch
import torch.nn.functional as F

from eval import popularity_scores
from model import (
    SASRec, dropout, evaluation_rows, inverse_frequency, model_scores, new_model, pad_rows,
    train_model,
)  # fmt: skip
from sae import SparseRows, cell_bounds, load_intents
from studies.rivals import load_run, mean_texts


class Outcome(NamedTuple):
    """What became of a configuration."""

    ranks: torch.Tensor  # float64 [users], of the test items
    parameters: int
    valid: float | None  # NDCG@10 on validation, which chose epoch or settings


def parameters_of(model):
    """How many numbers a model learns -> int."""
    return sum(p.numel() for p in model.parameters())


def popularity_ranks(data, settings):
    """The most frequent training items for everybody -> Outcome."""
    return Outcome(rank_users(popularity_scores(data), data, "test"), 0, None)


# Matrix factorization


@dataclasses.dataclass(frozen=True)
class BPRSettings:
    """Of `bpr_ranks`."""

    factors: int = 64
    epochs: int = 100
    patience: int = 10
    batch: int = 1024
    lr: float = 3e-3
    weight_decay: float = 1e-5


class BPR(torch.nn.Module):
    """A vector for each user and item, a bias for each item."""

    def __init__(self, users, items, factors):
        """users: how many; items: V."""
        super().__init__()
        self.user = torch.nn.Parameter(0.1 * torch.randn(users, factors))
        self.item = torch.nn.Parameter(0.1 * torch.randn(items + 1, factors))
        self.bias = torch.nn.Parameter(torch.zeros(items + 1))

    def scores(self, users):
        """Of all items for users int64 [B] -> [B, V+1]."""
        return self.user[users] @ self.item.T + self.bias

    def loss(self, users, items, others):
        """How little items are preferred to others, int64 [B] each -> scalar."""
        difference = self.item[items] - self.item[others]
        preferred = (self.user[users] * difference).sum(1) + self.bias[items] - self.bias[others]
        return -F.logsigmoid(preferred).mean()


def training_pairs(data):
    """(user, item) of each training interaction -> int64 [interactions, 2]."""
    count = torch.from_numpy(np.diff(data.start) - 2)  # all but the two held out
    users = torch.arange(len(count)).repeat_interleave(count)
    return torch.stack([users, torch.from_numpy(data.training_items()).long()], 1)


def bpr_ranks(data, settings, bpr=BPRSettings()):
    """Matrix factorization by Bayesian personalized ranking (Rendle et al. 2009) -> Outcome.

    settings: ModelSettings, of which the seed is read. The epoch is chosen on validation.
    """
    torch.manual_seed(settings.seed)
    random = generator(settings.seed, "bpr")
    model = BPR(len(data.users), len(data.items) - 1, bpr.factors)
    rates = dict(lr=bpr.lr, weight_decay=bpr.weight_decay)
    optimizer = torch.optim.Adam(model.parameters(), **rates, fused=True)
    pairs = training_pairs(data)
    best = dict(epoch=0, valid=-1.0)
    for epoch in range(1, bpr.epochs + 1):
        for part in torch.randperm(len(pairs), generator=random).split(bpr.batch):
            users, items = pairs[part].T
            others = torch.randint(1, len(data.items), items.shape, generator=random)
            optimizer.zero_grad()
            model.loss(users, items, others).backward()
            optimizer.step()
        valid = ranking_metrics(rank_users(model.scores, data, "valid"))["NDCG@10"]
        if valid > best["valid"]:
            parameters = {name: t.detach().clone() for name, t in model.state_dict().items()}
            best = dict(epoch=epoch, valid=valid, parameters=parameters)
        if epoch - best["epoch"] >= bpr.patience:
            break
    model.load_state_dict(best["parameters"])
    ranks = rank_users(model.scores, data, "test")
    return Outcome(ranks, parameters_of(model), best["valid"])


# Neighbours

SHRINKS = (0, 10, 100)  # to choose among, see `users_likeness`


class Alike(NamedTuple):
    """How much alike items are, symmetric and sparse: [V+1, V+1]."""

    likeness: SparseRows

    def sum(self, weights):
        """sum_t weight_tb likeness_tv for all v: weights [V+1, B] -> [V+1, B]."""
        return self.likeness.mix(weights)


class Likeness(NamedTuple):
    """Inner products of items x_v [V+1, any], sparse: by which items are alike."""

    rows: SparseRows

    def sum(self, weights):
        """sum_t weight_tb <x_t, x_v> for all v: weights [V+1, B] -> [V+1, B]."""
        return self.rows.mix(self.rows.transposed.mix(weights))


class DenseLikeness(NamedTuple):
    """The same of dense x [V+1, any]."""

    x: torch.Tensor

    def sum(self, weights):
        return self.x @ (self.x.T @ weights)


def bought_together(data):
    """How many pairs of interactions of one user are of each two items -> SparseRows [V+1, V+1]."""
    user, item = training_pairs(data).T
    bounds = cell_bounds(torch.bincount(user, minlength=len(data.users)))
    by_user = SparseRows(bounds, item.int(), torch.ones(len(item)), len(data.items))
    beside = by_user.gather(user)  # of each interaction, all items of its user
    cells = item[beside.rows_of_cells()] * len(data.items) + beside.indices
    cells, count = cells.unique(return_counts=True)
    bounds = cell_bounds(torch.bincount(cells // len(data.items), minlength=len(data.items)))
    return SparseRows(bounds, (cells % len(data.items)).int(), count.float(), len(data.items))


def users_likeness(data, run):
    """Items are alike that the same users had: cosine of columns of the training interactions.

    -> an Alike for each shrinkage s: both_tv / (sqrt(n_t n_v) + s), so that few say little.
    """
    both = bought_together(data)
    n = torch.bincount(torch.from_numpy(data.training_items()), minlength=len(data.items)).float()
    norm = (n[both.rows_of_cells()] * n[both.indices]).sqrt()  # (cells,)
    values = [both.values / (norm + shrink) for shrink in SHRINKS]
    return [Alike(dataclasses.replace(both, values=one)) for one in values]


def texts_likeness(data, run):
    """Items are alike whose mean texts are: their cosine, of texts as the SAE reads them."""
    own = load_run(run, data)
    mean = mean_texts(own.sae.standardize(own.embeddings), data)
    return [DenseLikeness(F.normalize(mean, dim=1))]


def intents_likeness(data, run):
    """Items are alike that share intents: sum_j code_tj idf_j code_vj, as in the match."""
    codes = load_intents(run, data).codes
    idf = inverse_frequency(data.training_items(), codes)
    values = codes.values * idf[codes.indices].sqrt()
    return [Likeness(SparseRows(codes.indptr, codes.indices, values, codes.columns))]


LIKENESS = {"users": users_likeness, "texts": texts_likeness, "intents": intents_likeness}


def neighbour_scores(alike, data, part, history, decay):
    """The `score` of `rank_users`: s_v = sum_t decay^age_t <x_t, x_v> over a history.

    alike: has `sum`, as Likeness; history: how many of the most recent items count.
    """
    rows = evaluation_rows(data, part, history)
    flat = torch.from_numpy(data.flat).long()

    def score(users):
        _, items, real = pad_rows(rows, users, flat)  # (B, T)
        age = rows.length[users][:, None] - 1 - torch.arange(items.shape[1])
        recent = torch.where(real, decay ** age.clamp_min(0).float(), 0.0)
        weights = torch.zeros(len(data.items), len(users)).scatter_add_(0, items.T, recent.T)
        return alike.sum(weights).T  # (B, V+1)

    return score


def added(own, near, weight):
    """The `score` of a model's scores and weighted ones of neighbours, each scaled to own's spread.

    own, near: functions as `rank_users` takes them.
    """

    def score(users):
        base = own(users).cpu()
        more = near(users)
        scale = base[:, 1:].std(1, keepdim=True) / more[:, 1:].std(1, keepdim=True).clamp_min(1e-12)
        return base + weight * scale * more

    return score


def neighbour_ranks(data, settings, kind, Model=None):
    """Items like those of the history (Dacrema et al. 2019), alone or beside a model -> Outcome.

    settings: ModelSettings; kind: users, texts or intents; Model: a class to train, to whose scores
    those of the neighbours are added. The shrinkage, the decay, and the weight beside a model are
    chosen on validation.
    """
    likenesses = LIKENESS[kind](data, Path(settings.run))
    weights = (1.0,)
    parameters = 0
    if Model:
        model, _ = train_model(new_model(Model, settings, data), data)
        weights = (0.1, 0.25, 0.5, 1.0)
        parameters = parameters_of(model)

    def scores(part, number, decay, weight):
        near = neighbour_scores(likenesses[number], data, part, settings.history, decay)
        if not Model:
            return near
        return added(model_scores(model, data, part), near, weight)

    tried = {}
    for one in itertools.product(range(len(likenesses)), (1.0, 0.9, 0.7, 0.5), weights):
        tried[one] = ranking_metrics(rank_users(scores("valid", *one), data, "valid"))["NDCG@10"]
    chosen = max(tried, key=lambda one: (tried[one], one))
    print(f"chosen on validation: likeness, decay, weight {chosen}")
    ranks = rank_users(scores("test", *chosen), data, "test")
    return Outcome(ranks, parameters, tried[chosen])


# Other models


class Recurrent(torch.nn.Module):
    """A gated recurrent layer in place of a self-attention block."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.gru = torch.nn.GRU(width, width, batch_first=True)
        self.dropout = dropout

    def forward(self, x):
        """x [B, T, D] -> [B, T, D]; position t sees positions up to t."""
        return dropout(self.gru(x)[0], self.dropout, self.training)


class GRU4Rec(SASRec):
    """Recurrent layers read the history (Hidasi et al. 2016), all else as in SASRec."""

    def new_blocks(self, Block):
        return super().new_blocks(Recurrent)

    def start_ids(self):
        """Besides, undo the initialisation that attention takes: a GRU's own is larger."""
        super().start_ids()
        for block in self.trunk:
            block.gru.reset_parameters()


class SASRecWithText(SASRec):
    """Y_v = e_v + P x_v with x_v an item's mean text and e_v from 0: text without intents.

    Its intents are those of `text` in studies/rivals.py, one per item with texts.
    """

    needs_intents = True

    def add_parameters(self, data, intents):
        self.texts = intents.codes.mix(intents.vectors)  # (V+1, E)
        self.project = torch.nn.Linear(self.texts.shape[1], self.settings.width, bias=False)  # P

    def start_ids(self):
        torch.nn.init.zeros_(self.item.weight)

    def item_table(self):
        return self.item.weight + self.project(self.texts)
