"""A sparse autoencoder over text embeddings, and the library of named intents that it makes.

    python sae.py --run runs/ml-100k

embeddings.safetensors [N, E] -> sae.safetensors, intents.safetensors, intents.jsonl, sae_log.csv

The SAE is the TopK one of Gao et al. 2024 (arXiv 2406.04093), on x centred and scaled to mean
squared norm 1, so that Var(x) = 1:
    z = TopK(relu(W_enc (x - b_dec) + b_enc), K)                    SAE.encode                (S1)
    x_hat = W_dec^T z + b_dec                                       SAE.decode                (S2)
    loss = |x - x_hat|^2 / Var(x) + 1/32 auxk                       SAE.loss                  (S3)
    auxk = |r - r_hat|^2 / |r|^2                                    auxk_loss                 (S4)
where r = x - x_hat is detached and r_hat what the most active dead latents make of it. Rows of
W_dec have unit norm after every step. An intent is a latent that fires on a few items at least and
on at most half of the texts; its vector is its decoder row, its name the words that tell its texts
from the others.

Simplified against the paper (SAERec, arXiv 2606.18897): sentence embeddings, not the hidden states
of every token (D1); labels from mutual information of words, not from a language model (D2).
"""

import collections
import dataclasses
import functools
import math
import re
import sys
from pathlib import Path
from typing import NamedTuple

from saerec import (
    Progress, StageSettings, UserError, generator, join_processes, load_artifact, pick_device,
    process_of, run_command, run_dataset, save_artifact, setting, sum_over_processes, write_rows,
    write_table,
)  # fmt: skip  # before torch, see GOMP_SPINCOUNT there

import numpy as np
import torch
import torch.nn.functional as F

GAO = "Gao et al. 2024"


@dataclasses.dataclass(frozen=True)
class SaeSettings(StageSettings):
    latents: int = setting(0, "latents M; 0: the power of two nearest N/4, 64 to 16384", low=0)
    active: int = setting(8, "active latents K of a text", low=1)
    steps: int = setting(0, "optimiser steps; 0: 50 passes, 300 to 20000", low=0)
    batch: int = setting(256, "texts per step", low=1)
    lr: float = setting(1e-3, "Adam's learning rate, falling to 0 over the last fifth", low=0)
    auxk: int = setting(64, "dead latents that rebuild the residual; 0: none", low=0)
    auxk_weight: float = setting(1 / 32, "weight of auxk", origin=GAO, low=0)
    dead_after: float = setting(2.0, "a latent is dead if silent so long", unit="passes", low=0)
    held_out: float = setting(0.1, "share of texts to measure on only", low=0.01, high=0.5)
    min_items: int = setting(5, "an intent fires on at least so many items", low=1)
    max_density: float = setting(0.5, "... and on at most this share of texts", low=0, high=1)
    keywords: int = setting(5, "keywords of an intent", low=1)


def resolve(settings, texts):
    """Fill in the sizes that follow from the number of texts N. Raises UserError.

    M near N/4 gives each latent 4K texts to fire on, on average: enough to name it, few enough to
    be fine-grained.
    """
    power = np.clip(np.rint(np.log2(max(texts, 1) / 4)), 6, 14)
    latents = settings.latents or 2 ** int(power)
    steps = settings.steps or int(np.clip(50 * texts / settings.batch, 300, 20000))
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
        sums = (part.sum(0, dtype=torch.float64) for part in slices(embeddings, rows))
        self.mean.copy_(sum(sums) / len(rows))
        norms = ((part - self.mean).square().double().sum() for part in slices(embeddings, rows))
        self.scale.copy_((sum(norms) / len(rows)).sqrt())

    def standardize(self, embeddings):
        return (embeddings - self.mean) / self.scale

    def encode(self, x):
        """(S1) of standardized x [B, E] -> Codes; only the chosen latents have a gradient.

        The product with all M rows serves to choose, so backward costs K/M of the dense one.
        """
        x = x - self.b_dec
        with torch.no_grad():
            chosen = (x @ self.W_enc.T + self.b_enc).topk(int(self.active)).indices  # (B, K)
        rows = F.embedding(chosen, self.W_enc)  # (B, K, E)
        bias = F.embedding(chosen, self.b_enc[:, None])[:, :, 0]  # (B, K)
        values = torch.bmm(rows, x[:, :, None])[:, :, 0] + bias
        return Codes(values.relu(), chosen)

    def decode(self, codes):
        """(S2): x_hat [B, E], a weighted sum of K decoder rows."""
        return weighted_rows(self.W_dec, codes) + self.b_dec

    def loss(self, x, codes, dead, texts, settings):
        """(S3) of x [B, E] -> (loss, its reconstruction term).

        dead: int64 [any]; texts: how many all processes together have in this step.
        """
        x_hat = self.decode(codes)
        reconstruction = (x - x_hat).square().sum() / texts
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

    def dead(self, seen, patience):
        """Which latents have not fired in the last `patience` of `seen` texts -> bool [M]."""
        return seen - self.last_active > patience


def weighted_rows(table, codes):
    """Sum of the rows of table [any, E] that codes name, by their values -> [B, E]."""
    return F.embedding_bag(codes.latents, table, per_sample_weights=codes.values, mode="sum")


def auxk_loss(sae, x, x_hat, dead, k):
    """(S4): the k most active dead latents rebuild the residual, which gives them a gradient again.

    x, x_hat: [B, E]; dead: int64 [any]. The residual is detached, so living latents don't feel
    this. Gao et al. 2024, A.2.
    """
    residual = (x - x_hat).detach()
    pre = (x - sae.b_dec).detach() @ sae.W_enc[dead].T + sae.b_enc[dead]  # (B, dead)
    codes = Codes(*pre.relu().topk(min(k, len(dead))))
    rebuilt = weighted_rows(sae.W_dec[dead], codes)  # (B, E)
    norm = sum_over_processes(residual.square().sum()).clamp_min(1e-12)
    return (residual - rebuilt).square().sum() / norm


def slices(embeddings, rows, batch=4096):
    """The rows, int64 [n], of embeddings, a batch at a time: they are read from a mapped file."""
    return (embeddings[part] for part in rows.split(batch))


@torch.no_grad()
def encode_all(sae, embeddings):
    """Codes of all embeddings [N, E]."""
    sae.eval()
    device = sae.mean.device
    parts = [sae.encode(sae.standardize(part.to(device))) for part in embeddings.split(4096)]
    return Codes(*(torch.cat(column).cpu() for column in zip(*parts)))


@torch.no_grad()
def measure(sae, embeddings, rows, batch=4096):
    """(FVU, L0) over the rows, int64 [n], of embeddings [N, E].

    FVU, the fraction of variance unexplained, is |x - x_hat|^2 / |x - mean(x)|^2; L0 the mean
    number of positive codes.
    """
    sae.eval()
    device = sae.mean.device
    mean = sum(part.sum(0) for part in slices(embeddings, rows, batch)).to(device) / len(rows)
    center = sae.standardize(mean)
    error, total, positive = torch.zeros(3, dtype=torch.float64, device=device)
    for part in slices(embeddings, rows, batch):
        x = sae.standardize(part.to(device))
        codes = sae.encode(x)
        error += (x - sae.decode(codes)).square().sum()
        total += (x - center).square().sum()
        positive += (codes.values > 0).sum()
    return (error / total).item(), positive.item() / len(rows)


def held_out_texts(texts, settings):
    """Which of N texts are kept from training -> bool [N]."""
    held_out = torch.zeros(texts, dtype=torch.bool)
    order = torch.randperm(texts, generator=generator(settings.seed, "held-out texts"))
    held_out[order[: round(texts * settings.held_out)]] = True
    return held_out


def text_batches(train, settings):
    """Yield the texts of each step, int64 [batch], of train, int64 [any], pass after pass."""
    random = generator(settings.seed, "sae batches")
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(settings.steps):
        if len(order) < settings.batch:
            order = torch.cat([order, torch.randperm(len(train), generator=random)])
        yield train[order[: settings.batch]]
        order = order[settings.batch :]


def train_step(sae, optimizer, x, dead, texts, settings):
    """One step on x [B, E] -> (loss, reconstruction, how often each latent fired [M]), summed."""
    codes = sae.train().encode(x)
    loss, reconstruction = sae.loss(x, codes, dead, texts, settings)
    optimizer.zero_grad()
    loss.backward()
    for p in sae.parameters():
        sum_over_processes(p.grad)
    sae.project_decoder_gradient()
    optimizer.step()
    sae.normalize_decoder()
    fired = torch.zeros(len(sae.W_enc), device=x.device)
    fired.index_add_(0, codes.latents.flatten(), (codes.values > 0).float().flatten())
    return [sum_over_processes(value.detach().clone()) for value in (loss, reconstruction, fired)]


def train_sae(embeddings, settings, Model=SAE):
    """Train on embeddings [N, E] -> (SAE, held-out mask bool [N], rows of the log).

    Raises UserError if there are too few texts, FloatingPointError if the loss is not finite.
    """
    s = settings
    held_out = held_out_texts(len(embeddings), s)
    train = (~held_out).nonzero()[:, 0]
    test = held_out.nonzero()[:, 0]
    test = test[:: max(len(test) // 10_000, 1)]  # of a corpus beyond memory, little to read
    if min(len(train), len(test)) < 2:
        raise UserError(f"{len(embeddings)} texts are too few to hold some out: bring more")
    process, processes = process_of()
    if s.batch < processes:
        raise UserError(f"--batch {s.batch} cannot be shared by {processes} processes: raise it")
    device = pick_device(s.device)
    sae = Model(s.latents, s.active, embeddings.shape[1], s.seed)
    sae.fit_scale(embeddings, train)
    if not sae.scale > 0:
        raise UserError("all texts have the same embedding: embed them again, or bring other texts")
    sae.to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=s.lr, fused=True)
    patience = s.dead_after * len(train)
    seen = 0
    log = []
    progress = Progress(s.steps, "sae step")
    for step, chosen in enumerate(text_batches(train, s), 1):
        if step % 10 == 1:  # not in every step, since to count them a GPU must be waited for
            dead = sae.dead(seen, patience).nonzero()[:, 0]
        for group in optimizer.param_groups:
            group["lr"] = s.lr * min(1.0, 5 * (1 - (step - 1) / s.steps))
        x = sae.standardize(embeddings[chosen[process::processes]].to(device))
        loss, reconstruction, fired = train_step(sae, optimizer, x, dead, len(chosen), s)
        seen += len(chosen)
        sae.last_active[fired > 0] = seen
        if step % max(s.steps // 20, 1) == 0 or step == s.steps:
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss of SAE step {step} is {loss}: lower --lr")
            fvu, l0 = measure(sae, embeddings, test)
            silent = sae.dead(seen, patience).float().mean().item()
            line = dict(step=step, loss=loss.item(), train_fvu=reconstruction.item())
            log.append(line | dict(fvu=fvu, l0=l0, dead=silent))
            said = f"FVU {fvu:.3f} (train {reconstruction:.3f})  L0 {l0:.1f}  dead {silent:.1%}"
            progress.show(step, said, keep=True)
    return sae, held_out, log


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
        count = self.indptr.diff()
        return torch.arange(len(count), device=count.device).repeat_interleave(count)

    @functools.cached_property
    def transposed(self):
        """The same matrix by columns -> SparseRows [columns, rows]."""
        order = self.indices.argsort(stable=True)
        count = torch.bincount(self.indices, minlength=self.columns)
        row = self.rows_of_cells()[order].int()
        return SparseRows(cell_bounds(count), row, self.values[order], len(self.indptr) - 1)

    def row(self, i):
        """(columns int64, values) of the cells of one row."""
        cells = slice(int(self.indptr[i]), int(self.indptr[i + 1]))
        return self.indices[cells].long(), self.values[cells]

    def gather(self, rows):
        """The given rows, int64 [n], one after the other -> SparseRows [n, columns]."""
        bounds = cell_bounds(self.indptr.diff()[rows])
        shift = (self.indptr[rows] - bounds[:-1]).repeat_interleave(bounds.diff())
        cells = torch.arange(len(shift), device=shift.device) + shift
        return SparseRows(bounds, self.indices[cells], self.values[cells], self.columns)

    def dense(self):
        """[rows, columns], zeros where there is no cell."""
        matrix = self.values.new_zeros(len(self.indptr) - 1, self.columns)
        matrix[self.rows_of_cells(), self.indices.long()] = self.values
        return matrix

    def mix(self, table):
        """Matrix product: row i is sum_j value_ij table_j; table [columns, D] -> [rows, D]."""
        return MixRows.apply(table, self)

    def weighted_sums(self, table):
        """`mix` without a gradient."""
        start = self.indptr[:-1].to(self.indices.dtype)
        options = dict(per_sample_weights=self.values, mode="sum")
        return F.embedding_bag(self.indices, table, start, **options)


def cell_bounds(count):
    """Where the cells of each row begin and end, from how many it has, [n] -> int64 [n+1]."""
    return F.pad(count.cumsum(0), (1, 0))


class MixRows(torch.autograd.Function):
    """`SparseRows.mix`. Its gradient is the product with the transposed matrix.

    Twenty times as fast as embedding_bag's own backward, which sorts the indices in every step.
    """

    @staticmethod
    def forward(ctx, table, matrix):
        ctx.matrix = matrix
        return matrix.weighted_sums(table)

    @staticmethod
    def backward(ctx, grad):
        return ctx.matrix.transposed.weighted_sums(grad.contiguous()), None


def item_codes(codes, text_item, items, intent_of_latent):
    """Average the codes of each item's texts -> SparseRows [V+1, J].

    codes: of N texts; text_item: int64 [N], 1..V; items: V; intent_of_latent: int64 [M], -1 for a
    latent that is no intent.
    """
    intents = int(intent_of_latent.max()) + 1
    intent = intent_of_latent[codes.latents]  # (N, K)
    carried = (intent >= 0) & (codes.values > 0)
    item = text_item[carried.nonzero()[:, 0]]
    cell, place = (item * intents + intent[carried]).unique(return_inverse=True)
    sums = torch.zeros(len(cell), dtype=torch.float64)
    sums.index_add_(0, place, codes.values[carried].double())
    row = cell // intents
    values = (sums / torch.bincount(text_item)[row]).float()
    bounds = cell_bounds(torch.bincount(row, minlength=items + 1))
    return SparseRows(bounds, (cell % intents).int(), values, intents)


# Names


STOP_WORDS = frozenset(
    """a about after all also am an and any are as at be been but by can do does for from get got
    had has have he her him his how i if in into is it its just me more most my no not of on one
    only or other our out over she so some such than that the their them then there these they this
    to too up us very was we were what when which who will with would you your s t""".split()
)


def terms_of(text):
    """The words and two-word phrases of a text -> set of str.

    Lower-cased; a phrase does not cross punctuation or a stop word.
    """
    terms = set()
    for phrase in re.split(r"[^\w\s'&-]+", text.lower()):
        before = ""
        for word in re.findall(r"\w[\w'-]*", phrase):
            if word in STOP_WORDS or len(word) < 2:
                before = ""
                continue
            word = word.removesuffix("'s")
            terms |= {word, f"{before} {word}".strip()}
            before = word
    return terms


def count_terms(texts, least=3):
    """Terms of at least `least` texts -> (their names, SparseRows [N, terms] of ones)."""
    found = [sorted(terms_of(text)) for text in texts]
    count = collections.Counter(term for terms in found for term in terms)
    names = [term for term, texts in count.items() if texts >= least]
    number = {term: n for n, term in enumerate(names)}
    found = [[number[term] for term in terms if term in number] for terms in found]
    indices = torch.tensor([term for terms in found for term in terms], dtype=torch.int32)
    bounds = cell_bounds(torch.tensor([len(terms) for terms in found]))
    return names, SparseRows(bounds, indices, torch.ones(len(indices)), len(names))


def mutual_information(both, term, active, total):
    """MI in nats of a term's presence and an intent's activity, from counts of texts.

    both: with term and intent, [terms]; term: with the term, [terms]; active: with the intent.
    """
    joint = np.stack([both, term - both, active - both, total - term - active + both])
    has_term = np.stack([term, term, total - term, total - term])
    has_intent = np.array([active, total - active, active, total - active])[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        parts = joint / total * np.log(joint * total / (has_term * has_intent))
    return np.where(joint > 0, parts, 0.0).sum(0)


def find_keywords(names, both, frequency, active, total, count):
    """The terms that best tell an intent's texts from the others -> {term number: log odds}.

    both: int64 [terms], its training texts with each term; frequency: the same of all `total`;
    active: how many are its. Only terms more frequent in its texts count, and none that shares a
    word with a better one.
    """
    candidates = np.nonzero((both >= 2) & (both * total > frequency * active))[0]
    mi = mutual_information(both[candidates], frequency[candidates], active, total)
    chosen = {}
    used = set()
    for term in candidates[np.lexsort((candidates, -mi))].tolist():
        words = set(names[term].split())
        if len(chosen) < count and not words & used:
            used |= words
            inside = (both[term] + 0.5) / (active + 1)
            outside = (frequency[term] - both[term] + 0.5) / (total - active + 1)
            chosen[term] = float(np.log(inside / outside))
    return chosen


def auroc(scores, positive):
    """Chance that a positive scores above a negative, ties half -> float, or None without both.

    scores: [n]; positive: bool [n].
    """
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]  # 1-based, ties share their mean
    n = positive.sum()
    if n == 0 or n == len(positive):
        return None
    return float((rank[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))


def label_of(words, taken, latent):
    """A label of the first two words, or of as many more as make it differ from those taken."""
    for n in range(min(2, len(words)), len(words) + 1):
        label = ", ".join(words[:n])
        if label not in taken:
            return label
    return f"{label} ({latent})"


# The library


class Intents(NamedTuple):
    """What model.py knows of the intents."""

    vectors: torch.Tensor  # float32 [J, E]
    codes: SparseRows  # [V+1, J]


def build_library(sae, codes, held_out, data, settings):
    """Select intents among the latents, name and measure them.

    codes: of N texts; held_out: bool [N], texts that neither the SAE nor the labels saw, on which
    detection is measured. -> (Intents, latent of each int32 [J], rows of intents.jsonl). Raises
    UserError if no latent is an intent.
    """
    M = settings.latents
    fires = codes.values > 0  # (N, K)
    by_text = SparseRows(cell_bounds(fires.sum(1)), codes.latents[fires], codes.values[fires], M)
    by_latent = by_text.transposed  # (M, N)
    text_item = torch.from_numpy(data.text_item).long()
    items = [len(text_item[by_latent.row(latent)[0]].unique()) for latent in range(M)]
    few_enough = by_latent.indptr.diff() <= settings.max_density * len(fires)
    kept = (few_enough & (torch.tensor(items) >= settings.min_items)).nonzero()[:, 0]
    if not len(kept):
        problem = f"no latent fires on {settings.min_items} items and few enough texts"
        raise UserError(f"{problem}: train longer (--steps), or lower --min-items")
    number = torch.full((M,), -1)
    number[kept] = torch.arange(len(kept))
    item_code = item_codes(codes, text_item, len(data.items) - 1, number)
    rows = describe_intents(kept.tolist(), by_latent, item_code, held_out, data, settings)
    return Intents(sae.W_dec.detach()[kept], item_code), kept.int(), rows


def describe_intents(latents, by_latent, item_code, held_out, data, settings):
    """Name the intents and measure their labels -> rows of intents.jsonl.

    by_latent: SparseRows [M, N], where each latent fires. `detection_auroc`: how well the summed
    log odds of an intent's keywords tell the held-out texts that it fires on; `permuted_auroc`: how
    well those of the intent before do, which is what labels reach that don't belong.
    """
    names, terms = count_terms(data.texts)
    training = terms.gather((~held_out).nonzero()[:, 0])
    frequency = torch.bincount(training.indices, minlength=len(names)).numpy()
    test = held_out.nonzero()[:, 0]
    test_terms = terms.gather(test)
    total = int((~held_out).sum())
    others = None  # the scores of the intent before
    taken = set()
    rows = []
    progress = Progress(len(latents), "naming intents")
    for intent, latent in enumerate(latents):
        texts, strength = by_latent.row(latent)
        own = texts[~held_out[texts]]
        both = torch.bincount(terms.gather(own).indices, minlength=len(names)).numpy()
        odds = find_keywords(names, both, frequency, len(own), total, settings.keywords)
        words = [names[term] for term in odds] or [f"latent {latent}"]
        label = label_of(words, taken, latent)
        taken.add(label)
        weight = torch.zeros(len(names), 1)
        weight[list(odds), 0] = torch.tensor(list(odds.values()))
        score = test_terms.weighted_sums(weight)[:, 0].numpy()
        fires = torch.isin(test, texts).numpy()
        strongest = dict.fromkeys(data.texts[t] for t in sort_by(texts, strength))  # each once
        row = dict(intent=intent, latent=latent, label=label, keywords=words)
        row |= dict(texts=list(strongest)[:5], density=len(texts) / len(held_out))
        row["items"] = [data.items[v] for v in sort_by(*item_code.transposed.row(intent))[:5]]
        row |= dict(detection_texts=int(fires.sum()), detection_auroc=auroc(score, fires))
        permuted = None if others is None else auroc(others, fires)
        rows.append(row | dict(permuted_auroc=permuted))
        others = score
        progress.show(intent + 1)
    return rows


def sort_by(numbers, values):
    """Numbers int64 [n] in the order of their values, largest first -> list."""
    return numbers[values.argsort(descending=True, stable=True)].tolist()


def save_intents(folder, intents, latent, settings, data, made_from):
    """Write RUN/intents.safetensors; latent: int32 [J]; made_from: paths of artifacts."""
    codes = intents.codes
    tensors = dict(vectors=intents.vectors, latent=latent, is_intent=torch.ones(len(latent)).bool())
    tensors |= dict(indptr=codes.indptr, indices=codes.indices, values=codes.values)
    save_artifact(folder / "intents.safetensors", tensors, settings, data.hash, made_from)


def load_intents(folder, data, device="cpu"):
    """The intents of a run, as its recommenders see them -> Intents. Raises UserError.

    What a language model judged to be no intent loses its codes: it is never met, and the others
    keep their numbers.
    """
    path = Path(folder) / "intents.safetensors"
    tensors, _ = load_artifact(path, f"sae.py --run {folder}", data)
    kept = tensors["is_intent"][tensors["indices"].long()]
    bounds = cell_bounds(kept.long())[tensors["indptr"]]
    vectors = tensors["vectors"]
    codes = SparseRows(bounds, tensors["indices"][kept], tensors["values"][kept], len(vectors))
    return Intents(vectors.to(device), codes.to(device))


def train(settings):
    """Train the SAE of a run and write it with its intent library."""
    join_processes()
    data = run_dataset(settings.run)
    folder = Path(settings.run)
    source = folder / "embeddings.safetensors"
    embeddings = load_artifact(source, f"embed.py --run {folder}", data)[0]["embeddings"]
    settings = resolve(settings, len(embeddings))
    sizes = f"{settings.latents} latents, {settings.steps} steps"
    print(f"{len(embeddings):,} texts of width {embeddings.shape[1]}, {sizes}")
    sae, held_out, log = train_sae(embeddings, settings)
    sae.cpu()
    codes = encode_all(sae, embeddings)
    intents, latent, rows = build_library(sae, codes, held_out, data, settings)
    save_artifact(folder / "sae.safetensors", sae.state_dict(), settings, data.hash, [source])
    made_from = [folder / "sae.safetensors"]
    save_intents(folder, intents, latent, settings, data, made_from)
    write_table(folder / "sae_log.csv", log)
    write_rows(folder / "intents.jsonl", rows)
    some = "; ".join(row["label"] for row in rows[:5])
    print(f"{len(rows)} intents of {settings.latents} latents: {some}; ...")


def main(argv=None):
    return run_command(argv, __doc__, train=(SaeSettings, train))


if __name__ == "__main__":
    sys.exit(main())
