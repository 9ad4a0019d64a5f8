"""A sparse autoencoder over text embeddings, and the library of named intents that it makes.

    python sae.py --run runs/ml-100k

embeddings.safetensors [N, E] -> sae.safetensors, intents.safetensors, intents.jsonl, sae_log.csv

The SAE is the TopK one of Gao et al. 2024 (arXiv 2406.04093), on x centred and scaled to mean
squared norm 1, so that Var(x) = 1:
    z = TopK(relu(W_enc (x - b_dec) + b_enc), K)                    SAE.encode                (S1)
    x_hat = W_dec^T z + b_dec                                       SAE.decode                (S2)
    loss = |x - x_hat|^2 / Var(x) + 1/32 auxk                       SAE.loss                  (S3)
    auxk = |res - res_hat|^2 / |res|^2                              auxk_loss                 (S4)
where res = x - x_hat is detached and res_hat what the dead latents most active on x give for it.
Rows of W_dec have unit norm after every step. So that another seed finds the same intents (D11):
    1. an SAE starts at k-means centroids of the texts              SAE.start, kmeans
    2. it reads x with noise and rebuilds x without                 train_step
    3. several, each from centroids and batches of its own,
       are averaged where they agree, and trained a little more     consensus
An intent is a latent that at least half of the other SAEs find too, that fires on at least 5 items
and on at most half of the texts. Its vector is its decoder row, its name words that many of
its texts say and whose embeddings best tell these from the others.

Simplified against the paper (SAERec, arXiv 2606.18897): sentence embeddings, not the hidden states
of every token (D1); names from words and their embeddings, not from a language model (D2).
"""

import collections
import copy
import dataclasses
import functools
import hashlib
import itertools
import sys
from pathlib import Path
from typing import NamedTuple

from saerec import (
    Dataset, Progress, StageSettings, UserError, claim, generator, join_processes, load_artifact,
    pick_device, run_command, run_dataset, save_artifact, setting, write_rows, write_table,
)  # fmt: skip  # before torch, see GOMP_SPINCOUNT there

import numpy as np
import torch
import torch.nn.functional as F

from embed import distinct, is_phrase, terms_of, whole_phrases

SMALL = 64  # up to so many latents per active one the dense gradient is the cheaper
MOST_TEXTS = 0.5  # what more texts say is boilerplate, and names nothing
SAID_BY = 0.25  # share of an intent's texts, by codes squared, that say a word of its name
ALSO_SAID = 0.1  # ... or a word that tells it from another of the same name


@dataclasses.dataclass(frozen=True)
class SaeSettings(StageSettings):
    latents: int = setting(0, "latents M; 0: a power of two, see resolve, 64 to 16384", low=0)
    active: int = setting(8, "active latents K of a text", low=1)
    members: int = setting(4, "SAEs to train, each from a start of its own, and average", low=1)
    steps: int = setting(0, "optimiser steps of each; 0: 100 N / batch, 300 to 5000", low=0)
    batch: int = setting(256, "texts per step", low=1)
    lr: float = setting(3e-4, "Adam's learning rate, falling to 0 over the last fifth", low=0)
    noise: float = setting(1.0, "norm of the noise on x in training; that of x is 1", low=0)
    auxk: int = setting(64, "dead latents that rebuild the residual; 0: none", low=0)
    auxk_weight: float = setting(1 / 32, "weight of auxk", origin="Gao et al. 2024", low=0)
    dead_after: float = setting(2.0, "a latent is dead if silent so long", unit="passes", low=0)
    held_out: float = setting(0.1, "share of texts to measure on only", low=0.01, high=0.5)
    min_items: int = setting(5, "an intent fires on at least so many items", low=1)
    max_density: float = setting(0.5, "... and on at most this share of texts", low=0, high=1)
    keywords: int = setting(5, "keywords of an intent", low=1)


def resolve(settings, corpus):
    """Fill in the sizes that follow from the texts of a Corpus. Raises UserError.

    M near N/4 gives each latent 4K texts to fire on, on average: enough to name it, few enough to
    be fine-grained. And an intent needs words of its own: M is at most near a third of the words.
    """
    N = len(corpus.data.texts)
    words = sum(not is_phrase(name) for name in corpus.terms[0])
    power = np.clip(np.rint(np.log2(max(min(N / 4, words / 3), 1))), 6, 14)
    latents = settings.latents or 2 ** int(power)
    steps = settings.steps or int(np.clip(100 * N / settings.batch, 300, 5000))
    if settings.active > latents:
        problem = f"--active {settings.active} is more than the {latents} latents"
        raise UserError(f"{problem}: lower it, or raise --latents")
    return dataclasses.replace(settings, latents=latents, steps=steps)


# The autoencoder


class Codes(NamedTuple):
    values: torch.Tensor  # float32 [B, K], >= 0
    latents: torch.Tensor  # int64 [B, K]


class SAE(torch.nn.Module):
    """Equations (S1)-(S3). All that encoding needs is saved: a file gives the same codes again."""

    def __init__(self, latents, active, width, seed=0):
        super().__init__()
        random = generator(seed, "sae init")
        rows = F.normalize(torch.randn(latents, width, generator=random), dim=1)
        self.W_dec = torch.nn.Parameter(rows)  # (M, E)
        self.W_enc = torch.nn.Parameter(rows.clone())  # (M, E), as the decoder: few are born dead
        self.b_enc = torch.nn.Parameter(torch.zeros(latents))
        self.b_dec = torch.nn.Parameter(torch.zeros(width))
        self.register_buffer("active", torch.tensor(active))  # K
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))
        # How many texts were seen when a latent last fired
        self.register_buffer("last_active", torch.zeros(latents, dtype=torch.int64))

    def fit_scale(self, embeddings, rows):
        """Centre the rows, int64 [n], of embeddings [N, E], and scale to mean squared norm 1."""
        parts = rows.split(4096)  # a batch at a time: they are read from a mapped file
        total = sum(embeddings[part].sum(0, dtype=torch.float64) for part in parts)
        self.mean.copy_(total / len(rows))
        norms = sum((embeddings[part] - self.mean).square().double().sum() for part in parts)
        self.scale.copy_((norms / len(rows)).sqrt())

    @torch.no_grad()
    def start(self, x, random):
        """Begin at k-means centroids of standardized x [n, E]; random: torch.Generator."""
        centroids = kmeans(x, len(self.W_dec), random)
        # Of fewer texts there are fewer. Other rows are drawn for each SAE: those that all had in
        # common would be found again, and pass for intents
        drawn = torch.randn(len(self.W_dec) - len(centroids), x.shape[1], generator=random)
        self.W_dec.copy_(F.normalize(torch.cat([centroids, drawn.to(x.device)]), dim=1))
        self.W_enc.copy_(self.W_dec)
        self.fit_gain(x)

    @torch.no_grad()
    def fit_gain(self, x):
        """Scale the codes so that they rebuild x [n, E] best: K similar rows together overshoot."""
        x = x[:: max(len(x) // 4096, 1)]
        x_hat = self.decode(self.encode(x)) - self.b_dec
        gain = ((x - self.b_dec) * x_hat).sum() / x_hat.square().sum().clamp_min(1e-12)
        self.W_enc *= gain
        self.b_enc *= gain

    def standardize(self, embeddings):
        return (embeddings - self.mean) / self.scale

    def encode(self, x):
        """(S1) of standardized x [B, E] -> Codes; only the chosen latents have a gradient.

        Unless M is small, the product with all M rows only chooses, and the K chosen are computed
        again with a gradient, so that backward costs K/M of the dense one.
        """
        x = x - self.b_dec
        K = int(self.active)
        graded = torch.is_grad_enabled()
        small = len(self.W_enc) <= SMALL * K
        with torch.set_grad_enabled(graded and small):
            values, chosen = (x @ self.W_enc.T + self.b_enc).topk(K)  # (B, K) each
        if graded and not small:
            rows = F.embedding(chosen, self.W_enc)  # (B, K, E)
            bias = F.embedding(chosen, self.b_enc[:, None])[:, :, 0]  # (B, K)
            values = torch.bmm(rows, x[:, :, None])[:, :, 0] + bias
        return Codes(values.relu(), chosen)

    def decode(self, codes):
        """(S2): x_hat [B, E], a weighted sum of K decoder rows."""
        return weighted_rows(self.W_dec, codes) + self.b_dec

    def loss(self, x, codes, dead, settings):
        """(S3) of x [B, E] and the dead latents, int64 [any] -> (loss, its reconstruction term)."""
        x_hat = self.decode(codes)
        reconstruction = (x - x_hat).square().sum() / len(x)
        if not settings.auxk or not len(dead):
            return reconstruction, reconstruction
        auxk = auxk_loss(self, x, x_hat, dead, settings.auxk)
        return reconstruction + settings.auxk_weight * auxk, reconstruction

    @torch.no_grad()
    def project_decoder_gradient(self):
        """Drop what lies along each unit row: normalizing would undo it, Adam would remember it."""
        self.W_dec.grad -= (self.W_dec.grad * self.W_dec).sum(1, keepdim=True) * self.W_dec

    @torch.no_grad()
    def normalize_decoder(self):
        self.W_dec.copy_(F.normalize(self.W_dec, dim=1))

    def fired(self, codes, seen):
        """Note which latents fired on the last of `seen` texts."""
        when = (codes.values > 0).long() * seen
        self.last_active.scatter_reduce_(0, codes.latents.flatten(), when.flatten(), "amax")

    def dead(self, seen, patience):
        """Which latents have not fired in the last `patience` of `seen` texts -> bool [M]."""
        return seen - self.last_active > patience


def weighted_rows(table, codes):
    """Sum of the rows of table [any, E] that codes name, by their values -> [B, E]."""
    return F.embedding_bag(codes.latents, table, per_sample_weights=codes.values, mode="sum")


def auxk_loss(sae, x, x_hat, dead, k):
    """(S4): the k most active dead latents rebuild the residual; those above 0 learn again.

    x, x_hat: [B, E]; dead: int64 [any]. The residual is detached, so living latents don't feel
    this. Gao et al. 2024, A.2.
    """
    residual = (x - x_hat).detach()
    pre = (x - sae.b_dec).detach() @ sae.W_enc[dead].T + sae.b_enc[dead]  # (B, dead)
    codes = Codes(*pre.relu().topk(min(k, len(dead))))
    rebuilt = weighted_rows(sae.W_dec[dead], codes)  # (B, E)
    return (residual - rebuilt).square().sum() / residual.square().sum().clamp_min(1e-12)


def kmeans(x, clusters, random, rounds=5):
    """Lloyd's algorithm from random distinct rows of x [n, E] -> centroids [clusters, E].

    Embeddings of equal texts differ in the last bits: rows that are equal to two decimals count as
    one. A cluster that runs empty stays where it was; of fewer distinct rows come fewer centroids.
    """
    first = {}  # of rows that are equal
    for row in torch.randperm(len(x), generator=random).tolist():
        first.setdefault((x[row].cpu().numpy().round(2) + 0.0).tobytes(), row)  # -0.0 is 0.0
        if len(first) == clusters:
            break
    centroids = x[list(first.values())]
    for _ in range(rounds):
        nearest = torch.cat([torch.cdist(part, centroids).argmin(1) for part in x.split(4096)])
        sums = torch.zeros_like(centroids).index_add_(0, nearest, x)
        count = torch.bincount(nearest, minlength=len(centroids))[:, None]
        centroids = torch.where(count > 0, sums / count.clamp_min(1), centroids)
    return centroids


@torch.no_grad()
def consensus(members, least=0.6):
    """Average SAEs where they agree -> (SAE, support int64 [M]).

    A latent of the first is averaged with the one of each other whose decoder row is nearest, if
    their cosine is above `least`; support counts how many others have such a one, which two latents
    that are alike may share.
    """
    first, *others = members
    sae = copy.deepcopy(first)
    support = torch.zeros(len(first.W_dec), dtype=torch.int64, device=first.mean.device)
    for other in others:
        cosine, nearest = (first.W_dec @ other.W_dec.T).max(1)  # (M,) each
        found = cosine > least
        support += found
        for name in ("W_enc", "b_enc", "W_dec"):
            getattr(sae, name)[found] += getattr(other, name)[nearest[found]]
        sae.b_dec += other.b_dec
    sae.W_enc /= 1 + support[:, None]
    sae.b_enc /= 1 + support
    sae.b_dec /= len(members)
    sae.normalize_decoder()
    return sae, support


@torch.no_grad()
def encode_all(sae, embeddings):
    """Codes of all embeddings [N, E]."""
    sae.eval()
    device = sae.mean.device
    parts = [sae.encode(sae.standardize(part.to(device))) for part in embeddings.split(4096)]
    return Codes(*(torch.cat(column).cpu() for column in zip(*parts)))


@torch.no_grad()
def measure(sae, embeddings):
    """(FVU, L0) over embeddings [n, E].

    FVU, the fraction of variance unexplained, is |x - x_hat|^2 / |x - mean(x)|^2, NaN where all
    texts are equal; L0 the mean number of positive codes.
    """
    codes = encode_all(sae, embeddings)
    x = sae.standardize(embeddings.to(sae.mean.device))
    x_hat = sae.decode(Codes(*(part.to(x.device) for part in codes)))
    variance = (x - x.mean(0)).square().sum()
    variance[variance < 1e-9 * len(x)] = torch.nan  # of equal texts rounding is left
    fvu = (x - x_hat).square().sum() / variance
    return fvu.item(), (codes.values > 0).sum().item() / len(x)


def held_out_texts(texts, share):
    """Which texts, list of str [N], are kept from training -> bool [N]: those of smallest hash.

    So they are the same for every seed, and copies of a text are on one side.
    """
    digests = [hashlib.sha256(text.encode()).digest() for text in texts]
    distinct_texts = sorted(set(digests))
    chosen = set(distinct_texts[: round(share * len(distinct_texts))])
    return torch.tensor([digest in chosen for digest in digests])


def text_batches(texts, settings, random):
    """Which of so many texts each step reads, pass after pass -> int64 [batch] for each."""
    batch = min(settings.batch, texts)
    passes = settings.steps * batch // texts + 1
    order = torch.cat([torch.randperm(texts, generator=random) for _ in range(passes)])
    return order.split(batch)[: settings.steps]


def train_step(sae, optimizer, x, noise, dead, settings):
    """One step on x [B, E] -> (loss, its reconstruction term, Codes)."""
    codes = sae.train().encode(x + noise)
    loss, reconstruction = sae.loss(x, codes, dead, settings)
    optimizer.zero_grad()
    loss.backward()
    sae.project_decoder_gradient()
    optimizer.step()
    sae.normalize_decoder()
    return loss.detach(), reconstruction.detach(), codes


def fit(sae, embeddings, train, test, settings, member, progress, before):
    """Train an SAE on embeddings [N, E], of rows train int64 [n], in place -> rows of the log.

    test: embeddings to measure on; member: number of the SAE from 1, or 0 for the average, which
    seeds its noise and batches; before: steps already done. Raises FloatingPointError if the loss
    is not finite.
    """
    s = settings
    device = sae.mean.device
    optimizer = torch.optim.Adam(sae.parameters(), lr=s.lr, fused=True)
    random = generator(s.seed, f"sae noise {member}")
    patience = s.dead_after * len(train)
    E = embeddings.shape[1]
    sae.last_active.zero_()
    seen = 0
    log = []
    name = f"SAE {member}" if member else "average"
    said = name  # until it is measured
    batches = text_batches(len(train), s, generator(s.seed, f"sae batches {member}"))
    for step, chosen in enumerate(batches, 1):
        if step % 10 == 1:  # not in every step, since to count them a GPU must be waited for
            dead = sae.dead(seen, patience).nonzero()[:, 0]
        optimizer.param_groups[0]["lr"] = s.lr * min(1.0, 5 * (1 - (step - 1) / s.steps))
        noise = torch.randn(len(chosen), E, generator=random) * s.noise / E**0.5
        x = sae.standardize(embeddings[train[chosen]].to(device))
        loss, reconstruction, codes = train_step(sae, optimizer, x, noise.to(device), dead, s)
        seen += len(chosen)
        sae.fired(codes, seen)
        if step % max(s.steps // 20, 1) == 0 or step == s.steps:
            if not loss.isfinite():
                raise FloatingPointError(f"the loss of SAE step {step} is {loss}: lower --lr")
            fvu, l0 = measure(sae, test)
            silent = sae.dead(seen, patience).float().mean().item()
            line = dict(member=member, step=before + step, loss=loss.item())
            log.append(line | dict(train_fvu=reconstruction.item(), fvu=fvu, l0=l0, dead=silent))
            said = f"{name}: FVU {fvu:.3f} (noisy train {reconstruction:.3f})"
            said += f"  L0 {l0:.1f}  dead {silent:.1%}"
        progress.show(before + step, said, keep=step == s.steps)
    return log


def train_sae(embeddings, held_out, settings, Model=SAE):
    """Train on embeddings [N, E], less the held-out ones, bool [N] -> (SAE, support, log).

    support: int64 [M], how many of the other members have a latent too; log: list of dicts. Raises
    UserError if there are too few texts, FloatingPointError if a loss is not finite.
    """
    s = settings
    train = (~held_out).nonzero()[:, 0]
    test = held_out.nonzero()[:, 0]
    test = embeddings[test[:: max(len(test) // 10_000, 1)]]  # of a corpus beyond memory, a part
    if min(len(train), len(test)) < 2:
        raise UserError(f"{len(embeddings)} texts are too few to hold some out: bring more")
    more = dataclasses.replace(s, steps=max(s.steps // 4, 1))
    total = s.members * s.steps + (more.steps if s.members > 1 else 0)
    untrained = Model(s.latents, s.active, embeddings.shape[1], s.seed)
    untrained.fit_scale(embeddings, train)
    if not untrained.scale > 1e-5 * untrained.mean.norm():  # equal texts differ by rounding
        raise UserError("all texts have the same embedding: embed them again, or bring others")
    progress = Progress(total, "sae step")
    members = []
    log = []
    for member in range(1, s.members + 1):
        random = generator(s.seed, f"k-means {member}")
        some = train[torch.randperm(len(train), generator=random)[: 16 * s.latents]]
        x = untrained.standardize(embeddings[some]).to(pick_device(s.device))
        sae = copy.deepcopy(untrained).to(x.device)
        sae.start(x, random)
        log += fit(sae, embeddings, train, test, s, member, progress, len(members) * s.steps)
        members.append(sae)
    sae, support = consensus(members)
    if len(members) > 1:
        sae.fit_gain(x)  # by the texts that the last one started from
        log += fit(sae, embeddings, train, test, more, 0, progress, len(members) * s.steps)
    return sae.cpu().eval(), support.cpu(), log


# Item codes


@dataclasses.dataclass(frozen=True, eq=False)
class SparseRows:
    """A sparse matrix by rows (CSR): row i has the cells indptr[i] to indptr[i + 1] - 1.

    Item codes are one, a row per item and a column per intent: `gather` takes some items, `mix`
    sums their intents' vectors, `transposed` has a row per intent, of the items that carry it.
    """

    indptr: torch.Tensor  # int64 [rows+1]
    indices: torch.Tensor  # int32 [cells], the column of a cell
    values: torch.Tensor  # float32 [cells]
    columns: int

    def to(self, device):
        parts = (part.to(device) for part in (self.indptr, self.indices, self.values))
        return SparseRows(*parts, self.columns)

    def rows_of_cells(self):
        """The row of each cell -> int64 [cells]."""
        return torch.repeat_interleave(self.indptr.diff())

    @functools.cached_property
    def transposed(self):
        """The same matrix by columns -> SparseRows [columns, rows]."""
        order = self.indices.argsort(stable=True)
        count = self.column_counts()
        row = self.rows_of_cells()[order].int()
        return SparseRows(cell_bounds(count), row, self.values[order], len(self.indptr) - 1)

    def column_counts(self):
        """How many cells each column has -> int64 [columns]."""
        return torch.bincount(self.indices, minlength=self.columns)

    def row(self, i):
        """(columns int64, values) of the cells of one row."""
        cells = slice(int(self.indptr[i]), int(self.indptr[i + 1]))
        return self.indices[cells].long(), self.values[cells]

    def gather(self, rows):
        """The given rows, int64 [n], one after the other -> SparseRows [n, columns]."""
        count = self.indptr.diff()[rows]
        bounds = cell_bounds(count)
        back = (self.indptr[rows] - bounds[:-1]).repeat_interleave(count)  # from new place to old
        cells = torch.arange(len(back), device=back.device) + back
        return SparseRows(bounds, self.indices[cells], self.values[cells], self.columns)

    def dense(self):
        """[rows, columns], zeros where there is no cell."""
        matrix = self.values.new_zeros(len(self.indptr) - 1, self.columns)
        matrix[self.rows_of_cells(), self.indices.long()] = self.values
        return matrix

    def mix(self, table):
        """Matrix product: row i is sum_j value_ij table_j; table [columns, D] -> [rows, D]."""
        return MixRows.apply(table, self)


def cell_bounds(count):
    """Where the cells of each row begin and end, from how many it has, [n] -> int64 [n+1]."""
    return F.pad(count.cumsum(0), (1, 0))


class MixRows(torch.autograd.Function):
    """`SparseRows.mix`. Its gradient is the product with the transposed matrix.

    embedding_bag's own backward is much slower: it sorts the indices in every step.
    """

    @staticmethod
    def forward(ctx, table, matrix):
        ctx.matrix = matrix
        start = matrix.indptr[:-1].to(matrix.indices.dtype)
        options = dict(per_sample_weights=matrix.values, mode="sum")
        return F.embedding_bag(matrix.indices, table, start, **options)

    @staticmethod
    def backward(ctx, grad):
        return ctx.matrix.transposed.mix(grad.contiguous()), None


def item_codes(codes, text_item, items, intent_of_latent):
    """Average the codes of each item's texts -> SparseRows [V+1, J].

    codes: of N texts; text_item: int64 [N], 1..V; items: V; intent_of_latent: int64 [M], -1 for a
    latent that is no intent.
    """
    intents = int(intent_of_latent.max()) + 1
    intent = intent_of_latent[codes.latents]  # (N, K)
    carried = (intent >= 0) & (codes.values > 0)  # (N, K)
    item = text_item[carried.nonzero()[:, 0]]  # (carried,)
    # A cell is item * J + intent; several texts of an item may fall in one
    cell, place = (item * intents + intent[carried]).unique(return_inverse=True)
    sums = torch.bincount(place, codes.values[carried].double(), len(cell))  # (cells,)
    row = cell // intents
    values = (sums / torch.bincount(text_item)[row]).float()
    bounds = cell_bounds(torch.bincount(row, minlength=items + 1))
    return SparseRows(bounds, (cell % intents).int(), values, intents)


# Names


def count_terms(texts, least=3):
    """Terms of at least `least` texts -> ({term: its number}, SparseRows [N, terms] of ones)."""
    once = {}  # each term is kept once, however many texts say it
    found = [[once.setdefault(term, term) for term in sorted(terms_of(text))] for text in texts]
    count = collections.Counter(term for terms in found for term in terms)
    common = [term for term, texts in count.items() if texts >= least]
    number = {term: n for n, term in enumerate(common)}
    found = [[number[term] for term in terms if term in number] for terms in found]
    indices = torch.tensor([term for terms in found for term in terms], dtype=torch.int32)
    bounds = cell_bounds(torch.tensor([len(terms) for terms in found]))
    return number, SparseRows(bounds, indices, torch.ones(len(indices)), len(number))


def mutual_information(both, term, active, total):
    """MI in nats of a term's presence and an intent's activity, from counts of texts.

    both: with term and intent, [terms]; term: with the term, [terms]; active: with the intent.
    """
    joint = np.stack([both, term - both, active - both, total - term - active + both])
    has_term = np.stack([term, term, total - term, total - term])
    has_intent = np.array([active, total - active, active, total - active])[:, None]
    ratio = np.where(joint > 0, joint * total / (has_term * has_intent), 1.0)
    return (joint / total * np.log(ratio)).sum(0)


def find_keywords(names, both, frequency, active, total, count):
    """The terms that best tell an intent's texts from the others -> {term: log odds}.

    both: int64 [terms], its training texts with each term; frequency: the same of all `total`;
    active: how many are its. Only terms more frequent in its texts count, none that most texts
    have, and of terms that are alike the best. Words give way to `whole_phrases`.
    """
    telling = (both * total > frequency * active) & (frequency < MOST_TEXTS * total)
    candidates = np.nonzero((both >= 2) & telling)[0]
    mi = mutual_information(both[candidates], frequency[candidates], active, total)
    best = candidates[np.argsort(-mi, kind="stable")][: 20 * count]
    inside = (both[best] + 0.5) / (active + 1)
    outside = (frequency[best] - both[best] + 0.5) / (total - active + 1)
    terms = [names[n] for n in best]
    odds = dict(zip(terms, np.log(inside / outside).tolist()))
    times = dict(zip(terms, both[best]))
    return {term: odds[term] for term in distinct(whole_phrases(terms, times), count)}


def auroc(scores, positive):
    """Chance that a positive scores above a negative, ties half -> float, or None without both.

    scores: [n]; positive: bool [n].
    """
    own = scores[positive]
    others = np.sort(scores[~positive])
    if not len(own) or not len(others):
        return None
    twice = np.searchsorted(others, own, "left") + np.searchsorted(others, own, "right")
    return float(twice.sum() / (2 * len(own) * len(others)))


def label_of(words, others, taken, latent):
    """A label of the words, and of as many of the others as make it differ from those taken.

    taken: set of frozensets of words, which the label joins: in another order they would be the
    same. A label has three words at most, and then the latent's number. Without words, the first of
    the others is the label.
    """
    least = max(len(words), 1)
    words = distinct(itertools.chain(words, others), 3) or [f"latent {latent}"]
    for count in range(least, len(words) + 1):
        if frozenset(words[:count]) not in taken:
            taken.add(frozenset(words[:count]))
            return ", ".join(words[:count])
    return f"{', '.join(words)} ({latent})"


def words_by_meaning(centers, spread, vectors, most=200):
    """The words that best tell each intent's texts from the others -> (scores, numbers) [J, most].

    centers: mean of each intent's texts, less that of all, [J, E]; spread: covariance of the texts
    [E, E]; vectors: of the words, [words, E]. A word scores by how much nearer it is to the
    intent's texts than to all, in standard deviations, less half of its best score for any other
    intent, so that neighbours get different names.
    """
    scores = []
    for part in vectors.split(4096):
        deviation = ((part @ spread) * part).sum(1).clamp_min(1e-12).sqrt()
        score = centers @ part.T / deviation  # (J, part)
        first, second = F.pad(score, (0, 0, 0, 1)).topk(2, dim=0).values  # beside a row of 0: none
        rival = torch.where(score == first, second, first)  # (J, part)
        scores.append((score - rival / 2).half())  # there are J x words
    values, numbers = torch.cat(scores, 1).topk(min(most, len(vectors)))
    return values.float(), numbers


def name_words(scores, shares):
    """Order the words that may name an intent, the best first -> list of str.

    scores: {word: what it says of the meaning}; shares: {word: (share of the intent's training
    texts that say it, share of all)}. A word counts for more, the more of its texts say it beyond
    the others, and not at all if others say it as often, or if most do.
    """
    weighted = {}
    for word, (own, all_texts) in shares.items():
        if own > all_texts and all_texts < MOST_TEXTS and scores[word] > 0:
            # Beside .1, so that of two rare words the meaning decides
            weighted[word] = scores[word] * (0.1 + own - all_texts)
    return sorted(weighted, key=weighted.get, reverse=True)


# The library


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """What a library is made from, besides an SAE."""

    data: Dataset
    embeddings: torch.Tensor  # float32 [N, E]
    held_out: torch.Tensor  # bool [N], texts that no SAE trains on and no name is chosen by
    words: dict  # {what intents may be called: its row in word_vectors}
    word_vectors: torch.Tensor  # float32 [words, E], none where the encoder cannot embed words

    @functools.cached_property
    def terms(self):
        """Terms of 3 texts at least -> ({term: its number}, SparseRows [N, terms] of ones)."""
        return count_terms(self.data.texts)

    def meaning_auroc(self, label, x, fires):
        """How well the cosine with a label tells texts that fire, bool [n], from others -> AUROC.

        x: the texts' embeddings of norm 1, [n, E]. None if none of the label's words has a vector,
        or without both.
        """
        words = label.split(" (")[0].split(", ")  # without what tells equal labels apart
        known = [self.words[word] for word in words if word in self.words]
        if not known:
            return None
        return auroc((x @ self.word_vectors[known].mean(0)).numpy(), fires)


class Intents(NamedTuple):
    """What model.py knows of the intents."""

    vectors: torch.Tensor  # float32 [J, E]
    codes: SparseRows  # [V+1, J]


def build_library(vectors, codes, support, corpus, settings):
    """Select intents among the latents, name and measure them.

    vectors: of the latents, [M, E]; codes: of N texts; support: int64 [M], see `consensus`.
    -> (tensors of intents.safetensors, rows of intents.jsonl). Raises UserError if no latent is an
    intent.
    """
    every = torch.arange(len(vectors))
    texts = torch.arange(len(codes.values))  # each as an item of its own, from 0: V + 1 is N
    by_latent = item_codes(codes, texts, len(texts) - 1, every).transposed  # (M, N)
    text_item = torch.from_numpy(corpus.data.text_item).long()
    items = item_codes(codes, text_item, len(corpus.data.items) - 1, every).transposed  # (M, V+1)
    kept = by_latent.indptr.diff() <= settings.max_density * len(texts)
    kept &= items.indptr.diff() >= settings.min_items
    kept &= 2 * support >= settings.members - 1
    kept = kept.nonzero()[:, 0]
    if not len(kept):
        problem = f"no latent that other SAEs find fires on {settings.min_items} items"
        raise UserError(f"{problem} and few enough texts: lower --min-items, or train longer")
    item_code = items.gather(kept).transposed  # (V+1, J)
    rows = describe_intents(kept, by_latent, item_code, corpus, settings)
    support = support[kept].int()
    rows = [row | dict(support=others) for row, others in zip(rows, support.tolist())]
    tensors = dict(vectors=vectors[kept], latent=kept.int(), support=support)
    tensors["is_intent"] = torch.ones(len(kept), dtype=torch.bool)
    cells = dict(indptr=item_code.indptr, indices=item_code.indices, values=item_code.values)
    return tensors | cells, rows


def describe_intents(latents, by_latent, item_code, corpus, settings):
    """Name the intents and measure their names -> rows of intents.jsonl.

    latents: int64 [J]; by_latent: SparseRows [M, N], where each fires. Scores are AUROCs on the
    held-out texts that an intent fires on against the others: `detection_auroc` of its keywords'
    log odds, `permuted_auroc` of those of the intent before, which is what names reach that don't
    belong, `meaning_auroc` of the cosine of its label and the texts.
    """
    data = corpus.data
    test = corpus.held_out.nonzero()[:, 0]
    number, terms = corpus.terms
    test_terms = terms.gather(test)
    x = F.normalize(corpus.embeddings[test], dim=1)
    previous = None  # the scores of the intent before
    rows = []
    named = name_intents(latents, by_latent, corpus, settings.keywords)
    for intent, (label, odds) in enumerate(named):
        latent = int(latents[intent])
        texts, strength = by_latent.row(latent)
        strongest = dict.fromkeys(data.texts[t] for t in sort_by(texts, strength))  # each once
        items = sort_by(*item_code.transposed.row(intent))
        row = dict(intent=intent, latent=latent, label=label, keywords=list(odds))
        row |= dict(texts=list(strongest)[:5], items=[data.items[v] for v in items[:5]])
        fires = torch.isin(test, texts).numpy()
        row |= dict(density=len(texts) / len(data.texts), detection_texts=int(fires.sum()))
        weight = torch.zeros(len(number), 1)
        weight[[number[term] for term in odds], 0] = torch.tensor(list(odds.values()))
        score = test_terms.mix(weight)[:, 0].numpy()
        row["detection_auroc"] = auroc(score, fires)
        row["permuted_auroc"] = None if previous is None else auroc(previous, fires)
        row["meaning_auroc"] = corpus.meaning_auroc(label, x, fires)
        rows.append(row)
        previous = score
    return rows


def name_intents(latents, by_latent, corpus, count):
    """Yield each intent's label and keywords: (str, {term: log odds}).

    latents: int64 [J]; by_latent: SparseRows [M, N]; count: keywords at most. Which terms there are
    is told by all texts, which ones name an intent by training texts alone.
    """
    train = ~corpus.held_out
    fired = [by_latent.row(latent) for latent in latents.tolist()]
    fired = [(texts[train[texts]], codes[train[texts]]) for texts, codes in fired]
    number, terms = corpus.terms
    names = list(number)
    frequency = terms.gather(train.nonzero()[:, 0]).column_counts().numpy()
    total = int(train.sum())
    known = [word for word in corpus.words if word in number]
    scores, words = meanings(corpus, [own for own, _ in fired], known)  # (J, most) each
    taken = set()
    progress = Progress(len(latents), "naming intents")
    for intent, (own, codes) in enumerate(fired):
        cells = terms.gather(own)
        both = cells.column_counts().numpy()
        odds = find_keywords(names, both, frequency, len(own), total, count)
        share = weighted_share(cells, codes.square()).numpy()
        near = [known[row] for row in words[intent].tolist()]
        times = {term: share[number[term]] for term in [*near, *odds]}
        shares = {word: (times[word], frequency[number[word]] / total) for word in near}
        ranked = name_words(dict(zip(near, scores[intent].tolist())), shares) or list(odds)
        common = [word for word in ranked if times[word] >= SAID_BY]
        common = distinct(whole_phrases(common, times), 2)
        some = [word for word in [*ranked, *odds] if times[word] >= ALSO_SAID]
        others = whole_phrases(some or [*ranked, *odds], times)
        yield label_of(common, others, taken, int(latents[intent])), odds
        progress.show(intent + 1)


def weighted_share(cells, weight):
    """Share of the rows that have each column, by weight [rows] -> float64 [columns].

    cells: SparseRows of ones.
    """
    weight = (weight / weight.sum().clamp_min(1e-12))[cells.rows_of_cells()].double()
    return torch.bincount(cells.indices, weight, cells.columns)


def meanings(corpus, own_texts, words):
    """`words_by_meaning` of intents, from the training texts of each, int64 [any] -> as it does."""
    train = (~corpus.held_out).nonzero()[:, 0]
    x = corpus.embeddings[train[:: max(len(train) // 50_000, 1)]]
    centers = torch.stack([corpus.embeddings[own].mean(0) for own in own_texts]) - x.mean(0)
    vectors = corpus.word_vectors[[corpus.words[word] for word in words]]
    return words_by_meaning(centers.nan_to_num(), x.T.cov(), vectors)


def sort_by(numbers, values):
    """Numbers int64 [n] in the order of their values, largest first -> list."""
    return numbers[values.argsort(descending=True, stable=True)].tolist()


def load_intents(folder, data, device="cpu"):
    """The intents of a run, as its recommenders see them -> Intents. Raises UserError.

    What a language model judged to be no intent loses its codes and its vector: it is never met,
    and the others keep their numbers.
    """
    path = Path(folder) / "intents.safetensors"
    tensors, _ = load_artifact(path, f"sae.py --run {folder}", data)
    kept = tensors["is_intent"][tensors["indices"].long()]
    bounds = cell_bounds(kept.long())[tensors["indptr"]]  # cells kept before each old bound
    vectors = tensors["vectors"] * tensors["is_intent"][:, None]
    codes = SparseRows(bounds, tensors["indices"][kept], tensors["values"][kept], len(vectors))
    return Intents(vectors.to(device), codes.to(device))


def load_corpus(folder, settings):
    """The texts of a run and what may name them -> Corpus. Raises UserError."""
    data = run_dataset(folder, settings.data)
    made_by = f"embed.py --run {folder}"
    embeddings = load_artifact(folder / "embeddings.safetensors", made_by, data)[0]["embeddings"]
    words = {}
    vectors = torch.zeros(0, embeddings.shape[1])
    vocabulary = folder / "vocabulary.safetensors"
    if vocabulary.is_file():  # not of vectors made elsewhere, nor of LSA
        tensors, meta = load_artifact(vocabulary, made_by, data)
        words = {word: row for row, word in enumerate(meta["words"])}
        vectors = tensors["vectors"]
    held_out = held_out_texts(data.texts, settings.held_out)
    return Corpus(data, embeddings, held_out, words, vectors)


def train(settings, Model=SAE):
    """Train the SAE of a run and write it with its intent library."""
    join_processes()
    folder = Path(settings.run)
    corpus = load_corpus(folder, settings)
    settings = resolve(settings, corpus)
    claim(folder)
    texts = f"{len(corpus.embeddings):,} texts of width {corpus.embeddings.shape[1]}"
    print(f"{texts}, {settings.latents} latents, {settings.members} x {settings.steps} steps")
    sae, support, log = train_sae(corpus.embeddings, corpus.held_out, settings, Model)
    codes = encode_all(sae, corpus.embeddings)
    tensors, rows = build_library(sae.W_dec.detach(), codes, support, corpus, settings)
    source = folder / "embeddings.safetensors"
    path = folder / "sae.safetensors"
    save_artifact(path, sae.state_dict(), settings, corpus.data.hash, [source])
    save_artifact(folder / "intents.safetensors", tensors, settings, corpus.data.hash, [path])
    write_rows(folder / "intents.jsonl", rows)
    write_table(folder / "sae_log.csv", log)
    some = "; ".join(row["label"] for row in rows[:5])
    print(f"{len(rows)} intents of {settings.latents} latents: {some}; ...")


def main(argv=None):
    return run_command(argv, __doc__, train=(SaeSettings, train))


if __name__ == "__main__":
    sys.exit(main())
