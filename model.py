"""The multi-branch recommender: causal self-attention over the history, guided by personal and public intents.

    python model.py --run runs/ml-100k                       SAERec -> model.safetensors, log.csv
    python model.py --run runs/ml-100k --intents none        SASRec, the control -> sasrec.safetensors, sasrec_log.csv
    python model.py recommend --run runs/ml-100k --user 42   a list with reasons; --more "space" --less "romance" steers it

data + intents.safetensors (vectors [J, E], item codes [V, J] as CSR) -> parameters that map a history [T] to scores [V].

    E_v = e_v + sum_j code_vj (P d_j + p_j)                       item embedding, grounded in its intents      (1)
    h   = Dropout(LayerNorm(E[item] + pos))                       (B, T, D)                                    (2)
    a   = self-attention blocks(h)                                temporal branch, causal                      (3)
    Z   = W d + bias                                              (J, D), intent vectors d are frozen          (4)
    r   = tf_tj * idf_j, the k largest a position                 personal intents, two retrievals             (5)
    b   = cross-attention blocks(h; Z[personal])                  personal branch                              (6)
    c   = cross-attention blocks(h; Z[public])                    public branch: the g intents of highest df   (7)
    u   = a + sum_i softmax_i(<a, f_i> / sqrt(D)) f_i             adaptive fusion of f = [b, c]                (8)
    s_v = <u, E_v> + m sum_j r_j code_vj                          score; r_j: how much the history is about j    (9)
    loss = CE(s) + w CE(softmax_j(<u, Q d_j>), code_v)            next item, and the intents of the next item  (10)

SAERec (arXiv 2606.18897) is (2)-(8) with the first terms of (9) and (10) and similarity retrieval: `--paper`. The P, p, m and Q
terms are ours (D4, D5, D10). With P, e_v and p_j start at 0: what P d_j, the words, say of an item comes first, and they learn the rest.
Positions count from the start of a history and everything but (3) works on one position alone, so a single
pass over a user trains every prefix (D3).
"""

import contextlib
import dataclasses
import difflib
import io
import json
import math
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import saerec  # noqa: F401  before torch, see GOMP_SPINCOUNT there
import numpy as np
import torch
import torch.nn.functional as F

from sae import SaeSettings, item_codes, read_intents, rival, standardized_texts
from saerec import (Progress, UserError, common_settings, generator, join_processes, load_artifact, load_dataset, pick_device, process_of,
                    ranking_metrics, run, run_dataset, save_artifact, setting, sum_over_processes, target_ranks, write_table)  # fmt: skip


INTENTS = ("sae", "none", "text", "random", "shuffled", "kmeans", "pca", "dense")


@dataclasses.dataclass(frozen=True)
class ModelSettings:
    run: str = setting("", "run folder", unit="path")
    data: str = setting("", "dataset folder; the one that embed.py read if not given", unit="path")
    intents: str = setting("sae", "what guides the model; none is SASRec, the control, the others are rivals of the SAE", choices=INTENTS)
    paper: bool = setting(False, "the paper's parts alone: --retrieval similarity --no-grounded --match 0 --next-intent 0", origin="SAERec")
    retrieval: str = setting("activation", "how personal intents are found", choices=("activation", "similarity", "trunk"))
    personal: int = setting(5, "personal intents k of a position; 0 removes the branch", origin="SAERec's code", low=0)
    public: int = setting(5, "public intents g; 0 removes the branch", origin="SAERec's code", low=0)
    fusion: str = setting("adaptive", "how branches join the trunk", choices=("adaptive", "sum", "concat"), origin="SAERec")
    trunk: str = setting("attention", "what reads the history: SASRec's blocks, or GRU4Rec's recurrent layers", choices=("attention", "gru"))
    match: float = setting(0.5, "weight m of the second term of equation (9), intents that an item shares with the history; 0 removes it", low=0)
    matched: int = setting(20, "most intents of a history that are matched, the strongest ones", low=1)
    decay: float = setting(0.9, "what a step back in time leaves of an item's codes, in the activation retrieval and the match", low=0, high=1)
    df_decay: float = setting(0.9, "decay of the moving averages df and n, with --retrieval similarity", origin="SAERec's code", low=0, high=1)
    grounded: bool = setting(True, "items are embedded as id plus intents, equation (1)")
    residual: bool = setting(True, "the trained part p_j of an intent's vector in equation (1)")
    next_intent: float = setting(0.3, "weight w of the next-intent loss; 0 removes it", low=0)
    width: int = setting(64, "width D", origin="SAERec's code", low=1)
    layers: int = setting(2, "blocks of each branch", origin="SAERec's code", low=1)
    heads: int = setting(2, "attention heads", origin="SAERec's code", low=1)
    dropout: float = setting(0.5, "dropout of embeddings, attention and feed-forward", origin="SAERec's code", low=0, high=0.99)
    history: int = setting(50, "most recent items that are looked at", unit="items", origin="SAERec's code", low=1)
    epochs: int = setting(100, "most passes over the training data", low=1)
    patience: int = setting(10, "epochs without a better validation NDCG@10 before training stops", low=1)
    negatives: int = setting(0, "items that estimate the softmax over the catalogue in a step; 0 takes the whole catalogue", low=0)
    batch: int = setting(1024, "training positions a step; short histories come many at a time", unit="positions", low=1)
    lr: float = setting(1e-3, "Adam's learning rate", origin="SAERec's code", low=0)
    seed: int = common_settings()[0]
    device: str = common_settings()[1]


def resolve(settings):
    """Apply --paper and refuse settings that would change nothing or cannot be. Raises UserError."""
    default = {f.name: f.default for f in dataclasses.fields(settings)}
    if settings.width % settings.heads:
        raise UserError(f"--width {settings.width} cannot be split among --heads {settings.heads}: make it a multiple")
    by_text = settings.match or (settings.personal and settings.retrieval == "activation")
    without = {
        f"--intents {settings.intents}": "paper retrieval personal public fusion match matched decay df_decay grounded residual next_intent"
        * (settings.intents == "none"),
        "--paper": "retrieval grounded residual match matched next_intent decay" * settings.paper,
        "--no-grounded": "residual" * (not settings.grounded),
        "--match 0": "matched" * (not settings.match),
        "--personal 0": "retrieval df_decay" * (settings.personal == 0),
        "--personal 0 --public 0": "fusion" * (settings.personal == settings.public == 0),
        "--trunk gru": "heads" * (settings.trunk == "gru" and not has_branches(settings)),
        "--retrieval activation": "df_decay" * (settings.retrieval == "activation" and not settings.paper),
        f"--retrieval {settings.retrieval} --personal {settings.personal} --match 0": "decay" * (not by_text),
    }
    for cause, names in without.items():
        for name in names.split():
            if getattr(settings, name) != default[name]:
                raise UserError(f"--{name.replace('_', '-')} changes nothing with {cause}: leave one of them out")
    if settings.paper:
        settings = dataclasses.replace(settings, retrieval="similarity", grounded=False, match=0.0, next_intent=0.0)
    return settings


def has_branches(settings):
    """Whether a model has a personal or a public branch beside its trunk -> bool."""
    return settings.intents != "none" and settings.personal + settings.public > 0


class Library(NamedTuple):
    """The intents as model.py uses them."""

    vectors: torch.Tensor  # float32 [J, E]
    indptr: torch.Tensor  # int64 [V+2]
    indices: torch.Tensor  # int32 [codes]
    values: torch.Tensor  # float32 [codes]

    def code(self, item, intent):
        """code_vj of one item, 1..V, and intent -> float."""
        cells = slice(int(self.indptr[item]), int(self.indptr[item + 1]))
        return float(self.values[cells][self.indices[cells] == intent].sum())


# Intents of positions, from the text of the history


def intent_frequency(data, library):
    """Document frequency: how many training interactions are with an item that carries the intent -> (df float32 [J], n)."""
    items = data.training_items()
    popularity = np.bincount(items, minlength=len(data.items))
    item = np.repeat(np.arange(len(data.items)), np.diff(library.indptr))
    df = np.bincount(library.indices, weights=popularity[item], minlength=len(library.vectors))
    return torch.from_numpy(df).float(), len(items)


def inverse_frequency(df, n):
    """idf_j = log((1 + n) / (1 + df_j)), as in equation (5)."""
    return torch.log((1 + n) / (1 + df))


def activation_retrieval(start, flat, library, idf, k, decay, cells=2**25):
    """Personal intents grounded in text (D6), equation (5) with tf the decayed running sum of the history's item codes.

    start [users+1], flat [interactions]: histories as in Dataset -> (strength float32, intent int32), both [interactions,
    k], largest first; intent J, the absent one, where fewer than k have any strength. Row i looks at nothing after
    interaction i. A slab of users advances in step, at most `cells` running sums at a time.
    """
    J = len(library.vectors)
    strength, intent = torch.zeros(len(flat), k), torch.full((len(flat), k), J, dtype=torch.int32)
    indptr, indices, values = (getattr(library, name).numpy() for name in ("indptr", "indices", "values"))
    lengths = np.diff(start)
    by_length = np.argsort(-lengths, kind="stable")
    for slab in np.split(by_length, range(max(cells // J, 1), len(by_length), max(cells // J, 1))):
        tf = torch.zeros(len(slab), J)
        for t in range(lengths[slab[0]]):
            alive = int((lengths[slab] > t).sum())
            row = start[slab[:alive]] + t
            begin, codes = indptr[flat[row]], np.diff(indptr)[flat[row]]  # of each user's item in the CSR
            cell = np.repeat(begin - np.cumsum(codes) + codes, codes) + np.arange(codes.sum())
            user = np.repeat(np.arange(alive), codes)
            tf[:alive] *= decay
            tf[user, indices[cell]] += torch.from_numpy(values[cell])  # an item holds an intent once: no cell twice
            largest, chosen = (tf[:alive] * idf).topk(k)
            strength[row] = largest
            intent[row] = torch.where(largest > 0, chosen, J).int()
    return strength, intent


# Layers


class MixCodes(torch.autograd.Function):
    """sum_j code_vj table_j for every item: table [J+1, D] -> [V+1, D], zeros where an item has no codes.

    Its gradient is the same sum over the transposed codes, twenty times as fast as embedding_bag's own backward, which
    sorts the indices in every step. codes and transposed are (indptr, indices, values).
    """

    @staticmethod
    def forward(ctx, table, codes, transposed):
        ctx.transposed = transposed
        return weighted_bags(table, *codes)

    @staticmethod
    def backward(ctx, grad):
        return weighted_bags(grad.contiguous(), *ctx.transposed), None, None


def weighted_bags(table, indptr, indices, values):
    """For each row of a CSR matrix, the sum of the rows of table [any, D] that it names, weighted by its values -> [rows, D]."""
    return F.embedding_bag(indices, table, indptr[:-1], per_sample_weights=values, mode="sum")


def transpose(indptr, indices, values, columns):
    """CSR over rows -> CSR over columns, as (indptr, indices, values)."""
    row = torch.arange(len(indptr) - 1).repeat_interleave(indptr.diff())
    order = indices.argsort(stable=True)
    start = F.pad(torch.bincount(indices, minlength=columns).cumsum(0), (1, 0))
    return start.to(indptr.dtype), row[order].to(indices.dtype), values[order]


def csr_cells(indptr, rows):
    """The cells of rows [n] of a CSR matrix, one row after the other -> (place of a cell, which of the n its row is), both int64 [cells]."""
    count = indptr[rows + 1] - indptr[rows]
    which = torch.arange(len(rows), device=rows.device).repeat_interleave(count)
    return torch.arange(len(which), device=rows.device) + (indptr[rows] - count.cumsum(0) + count)[which], which


def dropout(x, p, training):
    """Inverted dropout. Four times as fast on a CPU as F.dropout, whose Bernoulli draws took a sixth of a training step."""
    return x * (torch.rand_like(x) >= p).div(1 - p) if training and p else x


class Attention(torch.nn.Module):
    """Multi-head attention and feed-forward, each with a residual and LayerNorm after (Vaswani et al. 2017)."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query, self.key, self.value, self.out = (torch.nn.Linear(width, width) for _ in range(4))
        self.attention_norm, self.forward_norm = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.expand, self.contract = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def drop(self, x):
        return dropout(x, self.dropout, self.training)

    def split(self, x):
        return x.unflatten(-1, (self.heads, -1))  # (..., H, D/H)

    def finish(self, x, attended):
        x = self.attention_norm(x + self.drop(self.out(attended)))
        return self.forward_norm(x + self.drop(self.contract(F.gelu(self.expand(x)))))


class SelfAttention(Attention):
    def forward(self, x):
        """x [B, T, D] -> [B, T, D]; position t sees positions up to t."""
        q, k, v = (self.split(project(x)).transpose(1, 2) for project in (self.query, self.key, self.value))  # (B, H, T, D/H)
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout * self.training, is_causal=True)
        return self.finish(x, mixed.transpose(1, 2).flatten(2))


class CrossAttention(Attention):
    def forward(self, x, z, chosen):
        """x [P, D] attends to rows of z [J+1, D]: chosen int64 [P, k], or [k] for the same ones everywhere -> [P, D].

        Keys and values are projected once for the J+1 intents and then gathered, not once for each of P x k.
        """
        q = self.split(self.query(x))  # (P, H, D/H)
        k, v = (self.split(F.embedding(chosen, project(z))) for project in (self.key, self.value))  # (P, k, H, D/H) or (k, H, D/H)
        positions = "pkhd" if chosen.dim() == 2 else "khd"
        weight = (torch.einsum(f"phd,{positions}->phk", q, k) / q.shape[-1] ** 0.5).softmax(-1)
        mixed = torch.einsum(f"phk,{positions}->phd", self.drop(weight), v)
        return self.finish(x, mixed.flatten(1))


class Recurrent(torch.nn.Module):
    """A gated recurrent layer in place of a self-attention block (GRU4Rec, Hidasi et al. 2016)."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.gru, self.dropout = torch.nn.GRU(width, width, batch_first=True), dropout

    def forward(self, x):
        """x [B, T, D] -> [B, T, D]; position t sees positions up to t."""
        return dropout(self.gru(x)[0], self.dropout, self.training)


class Recommender(torch.nn.Module):
    """Equations (1)-(8). Without a library it is the trunk alone: SASRec (Kang & McAuley 2018)."""

    def __init__(self, settings, items, library=None, frequency=None):
        """items: V. library and frequency (df [J], n) are those of the intents, needed unless settings.intents is none."""
        super().__init__()
        s = self.settings = settings
        block = (s.width, s.heads, s.dropout)
        self.item = torch.nn.Embedding(items + 1, s.width, padding_idx=0)
        self.position = torch.nn.Embedding(s.history, s.width)
        self.input_norm = torch.nn.LayerNorm(s.width)
        self.trunk = torch.nn.ModuleList((Recurrent if s.trunk == "gru" else SelfAttention)(*block) for _ in range(s.layers))
        self.has_intents = s.intents != "none"
        if self.has_intents:
            J, E = library.vectors.shape
            # Row J is the absent intent (D7): a position with fewer than k intents attends to it, so no mask is needed.
            self.register_buffer("vectors", F.pad(library.vectors, (0, 0, 0, 1)), persistent=False)  # (J+1, E)
            codes = library.indptr.int(), library.indices, library.values
            mass = torch.segment_reduce(library.values, "sum", offsets=library.indptr)  # (V+1)
            shares = *codes[:2], library.values / mass.repeat_interleave(library.indptr.diff())  # each item's sum to 1
            for name, csr in (("codes", codes), ("shares", shares)):
                for part, tensor in enumerate((*csr, *transpose(*csr, J + 1))):
                    self.register_buffer(f"{name}{part}", tensor, persistent=False)
            self.register_buffer("covered", mass > 0, persistent=False)
            self.register_buffer("df", frequency[0].clone() if s.retrieval == "activation" else torch.zeros(J))
            self.register_buffer("n", torch.tensor(float(frequency[1] if s.retrieval == "activation" else 0)))
            self.personal = torch.nn.ModuleList(CrossAttention(*block) for _ in range(s.layers * (s.personal > 0)))
            self.public = torch.nn.ModuleList(CrossAttention(*block) for _ in range(s.layers * (s.public > 0)))
            if has_branches(s):
                self.intent = torch.nn.Linear(E, s.width)
            if s.fusion == "concat":
                self.join = torch.nn.Linear((1 + (s.personal > 0) + (s.public > 0)) * s.width, s.width)
            if s.grounded:
                self.ground = torch.nn.Linear(E, s.width, bias=False)  # P
            if s.grounded and s.residual:
                self.residual = torch.nn.Parameter(torch.zeros(J + 1, s.width))  # p
            if s.next_intent:
                self.predict = torch.nn.Linear(E, s.width, bias=False)  # Q
        for name, p in self.named_parameters():
            if p.dim() == 2 and name != "residual" and ".gru." not in name:  # whose own scale is larger
                torch.nn.init.normal_(p, std=0.02)
        with torch.no_grad():  # beside intents, an id starts as nothing and learns what they don't say
            self.item.weight[: None if self.has_intents and s.grounded else 1] = 0

    def mix(self, name, table, ids=None):
        """sum_j weight_vj table_j by the items' "codes" or "shares", of all items or of ids [U]; table [J+1, D] -> [V+1 or U, D]."""
        csr = [getattr(self, f"{name}{part}") for part in range(6)]
        if ids is None:
            return MixCodes.apply(table, csr[:3], csr[3:])
        indptr, indices, values = csr[:3]
        cells, _ = csr_cells(indptr, ids)
        end = (indptr[ids + 1] - indptr[ids]).cumsum(0, dtype=torch.int32)
        return weighted_bags(table, F.pad(end, (1, 0)), indices[cells], values[cells])

    def intent_parts(self):
        """What an intent adds to the items that have it, P d_j + p_j -> [J+1, D]."""
        parts = self.ground(self.vectors)
        return parts + self.residual if self.settings.residual else parts

    def item_table(self, ids=None):
        """Equation (1) for all items -> [V+1, D], or for ids int64 [U] -> [U, D]."""
        table = self.item.weight if ids is None else F.embedding(ids, self.item.weight)
        if not (self.has_intents and self.settings.grounded):
            return table
        return table + self.mix("codes", self.intent_parts(), ids)

    def match(self, strength, intents, ids=None):
        """Second term of equation (9), m sum_j r_j code_vj, for all items -> [P, V+1], or for ids int64 [U] -> [P, U].

        strength float32, intents int, both [P, n], from `activation_retrieval`: the r_j that are not 0.
        """
        r = strength.new_zeros(len(self.vectors), len(strength)).scatter_(0, intents.long().T, self.settings.match * strength.T)
        return self.mix("codes", r, ids).T

    def match_one(self, strength, intents, item):
        """The same for one item a position, int64 [P] -> [P]."""
        cells, position = csr_cells(self.codes0, item)
        r = (strength[position] * (intents[position] == self.codes1[cells, None])).sum(1)
        return strength.new_zeros(len(item)).index_add_(0, position, self.settings.match * r * self.codes2[cells])

    def retrieve(self, h, z):
        """Personal intents by similarity, equation (5): tf is the rectified cosine of h [P, D] and z [J+1, D].

        Returns (strength float32, intent int64), both [P, k]; intent J, the absent one, where the strength is 0.

        df counts the positions where an intent is among the k most similar; both averages move in training only (D8).
        """
        with torch.no_grad():
            tf = (F.normalize(h, dim=1) @ F.normalize(z[:-1], dim=1).T).relu()  # (P, J)
            k = self.settings.personal
            strength, chosen = (tf * inverse_frequency(self.df, self.n)).topk(k)
            if self.training:
                top, keep = tf.topk(k), self.settings.df_decay
                found = torch.zeros(len(self.df) + 1, device=h.device)  # and the number of positions
                found.index_add_(0, top.indices.flatten(), (top.values > 0).float().flatten())
                found[-1] = len(h)
                sum_over_processes(found)
                self.df.mul_(keep).add_(found[:-1], alpha=1 - keep)
                self.n.mul_(keep).add_(found[-1], alpha=1 - keep)
            return strength, torch.where(strength > 0, chosen, len(self.df))

    def public_intents(self):
        """The g intents of the highest document frequency -> int64 [g]."""
        return self.df.topk(self.settings.public).indices

    def embed(self, items, table):
        """Equation (2): items int64 [B, T] -> h [B, T, D]."""
        h = self.input_norm(F.embedding(items, table) + self.position.weight[: items.shape[1]])
        return dropout(h, self.settings.dropout, self.training)

    def forward(self, items, wanted, personal, table):
        """User states u at the wanted positions -> [P, D].

        items: int64 [B, T], rows of table, padded at the end with 0; table: [any, D] from `item_table`; wanted: int64 [P],
        places in the flattened items, only these reach the branches; personal: int [P, k or more] from
        `activation_retrieval`, if that is how the branch finds them.
        """
        a = h = self.embed(items, table)  # (B, T, D)
        for block in self.trunk:
            a = block(a)
        a, h = (x.flatten(0, 1).index_select(0, wanted) for x in (a, h))  # (P, D)
        if not has_branches(self.settings):
            return a
        z, branches = self.intent(self.vectors), []  # (J+1, D)
        if len(self.personal):
            query = a if self.settings.retrieval == "trunk" else h
            b, chosen = h, personal[:, : self.settings.personal].long() if self.settings.retrieval == "activation" else self.retrieve(query, z)[1]
            for block in self.personal:
                b = block(b, z, chosen)
            branches.append(b)
        if len(self.public):
            c, chosen = h, self.public_intents()  # (g,)
            for block in self.public:
                c = block(c, z, chosen)
            branches.append(c)
        if self.settings.fusion == "concat":
            return self.join(torch.cat([a, *branches], 1))
        return a + sum(branches) if self.settings.fusion == "sum" else fuse(a, torch.stack(branches, 1))


def fuse(a, branches):
    """Adaptive fusion, equation (8): a [P, D], branches [P, 2, D] -> [P, D]."""
    weight = (torch.einsum("pd,pid->pi", a, branches) / a.shape[1] ** 0.5).softmax(1)
    return a + torch.einsum("pi,pid->pd", weight, branches)


# Losses


class LogSumExp(torch.autograd.Function):
    """sum_p weight_p log sum_v exp(<u_p, E_v> + extra_pv), the costly part of a softmax over a catalogue (fused linear cross entropy).

    The P x V scores never exist at once: a chunk of positions is scored, reduced to its share of the loss and of both
    gradients on the way forward, and forgotten. The chunk fits the cache of a CPU; a GPU wants few, large kernels.
    """

    @staticmethod
    def forward(ctx, u, table, weight, extra=None, cells=None):
        """u [P, D], table [V, D], weight [P]; extra: a function of a slice of positions, constants [rows, V]; cells: most scores at
        a time -> scalar."""
        cells = cells or (2**21 if u.device.type == "cpu" else 2**27)
        loss, du, dtable = u.new_zeros(()), torch.empty_like(u), torch.zeros_like(table)
        rows = max(min(cells // len(table), len(u)), 1)
        room = u.new_empty(2, rows, len(table))  # used again by every chunk: fresh memory costs as much as the arithmetic
        for begin in range(0, len(u), rows):
            at = slice(begin, begin + rows)
            part, w = u[at], weight[at]
            scores = torch.mm(part, table.T, out=room[0, : len(part)])  # (rows, V)
            if extra is not None:
                scores += extra(at)
            log_share = torch.log_softmax(scores, 1, out=room[1, : len(part)])
            loss += w @ (scores[:, 0] - log_share[:, 0])
            share = log_share.exp_()
            torch.mm(share, table, out=du[at])
            dtable.addmm_(share.T, part * w[:, None])
        ctx.save_for_backward(du * weight[:, None], dtable)
        return loss

    @staticmethod
    def backward(ctx, grad):
        du, dtable = ctx.saved_tensors
        return grad * du, grad * dtable, None, None, None


def catalogue_loss(u, table, target, weight, match=None):
    """First term of equation (10), over all real items: u [P, D], table [V+1, D], target int64 [P], weight [P] -> scalar.

    match: the scores' second term, for the targets [P] and as a function of a slice of positions [rows, V+1]; None if there is none.
    """
    own, others = (0, None) if match is None else (match[0], lambda at: match[1](at)[:, 1:])
    return LogSumExp.apply(u, table[1:], weight, others) - weight @ ((u * F.embedding(target, table)).sum(1) + own)


def sampled_loss(u, table, target, weight, negatives, log_count, match=(0, 0)):
    """The same with the sum over the catalogue estimated from N items drawn for the whole batch (Bengio & Senecal 2008).

    negatives: rows of table, int64 [N]; log_count: float [N], log of how often each was expected among the N. Taking it from
    the score makes the estimated sum unbiased. A negative that is a position's target is not counted for it. match: the scores'
    second term for the targets [P] and the negatives [P, N].
    """
    positive = (u * F.embedding(target, table)).sum(1) + match[0]  # (P,)
    scores = u @ F.embedding(negatives, table).T + match[1] - log_count  # (P, N)
    scores = scores.masked_fill(negatives == target[:, None], -torch.inf)
    return weight @ (torch.cat([positive[:, None], scores], 1).logsumexp(1) - positive)


def next_intent_loss(model, u, target, weight, ids=None):
    """Second term of equation (10): cross entropy of softmax_j(<u, Q d_j>) against the target's codes, scaled to sum 1.

    u [P, D], weight [P]; target int64 [P]: items, or places in ids [U]. Targets without codes count 0. Returns a scalar.
    """
    table = model.predict(model.vectors)  # (J+1, D)
    weight = weight * model.covered[target if ids is None else ids[target]]
    # sum_j share_vj <u, Q d_j> is one product with the item's mixed vector, so no P x J target is built
    mixed = F.embedding(target, model.mix("shares", table, ids))  # (P, D)
    return LogSumExp.apply(u, table[:-1], weight) - weight @ (u * mixed).sum(1)


# Batches


class Rows(NamedTuple):
    """Slices of Dataset.flat: row i is flat[begin[i] : begin[i] + length[i]]."""

    begin: torch.Tensor  # int64
    length: torch.Tensor  # int64


def training_rows(data, history):
    """Cut the inputs of all training histories into rows of at most `history`, from the end; each position is in one row.

    The target of a position is the interaction after it, still a training one: the last two of a user are held out.
    """
    begins, lengths = [], []
    for first, end in zip(data.start[:-1], data.start[1:] - 3):  # the last training item is only a target
        for stop in range(end, first, -history):
            begins.append(max(first, stop - history))
            lengths.append(stop - begins[-1])
    return Rows(torch.tensor(begins, dtype=torch.int64), torch.tensor(lengths, dtype=torch.int64))


def evaluation_rows(data, part, history):
    """The last `history` items before each user's held-out item of "valid" or "test"."""
    end = torch.from_numpy(data.start[1:] - (1 if part == "test" else 2))
    begin = torch.maximum(torch.from_numpy(data.start[:-1]), end - history)
    return Rows(begin, end - begin)


def batches(rows, positions, shuffle=None):
    """Numbers of the rows of each batch -> list of int64; about so many positions a batch, but one row at least.

    Rows of similar lengths go together, so that little is padded; a generator shuffles equal lengths and the batches.
    """
    noise = torch.rand(len(rows.length), generator=shuffle) if shuffle else 0
    order = (rows.length + noise).argsort(stable=True)
    batch = (rows.length[order].cumsum(0) - 1) // positions
    parts = order.split(torch.unique_consecutive(batch, return_counts=True)[1].tolist())
    return [parts[i] for i in torch.randperm(len(parts), generator=shuffle)] if shuffle else parts


class Batch(NamedTuple):
    """What a training step needs. Items are rows of a table: of all items, or of `ids` with sampled negatives."""

    items: torch.Tensor  # int64 [B, T], padded at the end with 0
    real: torch.Tensor  # int64 [P], places of real positions in the flattened items
    target: torch.Tensor  # int64 [P]
    weight: torch.Tensor  # float32 [P], of a position in the loss; they sum to 1 over all processes
    strength: torch.Tensor | None  # float32 [P, n], of the strongest intents in the texts of the history
    personal: torch.Tensor | None  # int32 [P, n], those intents
    ids: torch.Tensor | None = None  # int64 [U], items of the table
    negatives: torch.Tensor | None = None  # int64 [N]
    log_count: torch.Tensor | None = None  # float32 [N]

    def to(self, device):
        """Copy to a device; from pinned memory, so that a GPU needs not be waited for."""
        if device.type == "cpu":
            return self
        return Batch(*(t if t is None else t.pin_memory().to(device, non_blocking=True) for t in self))


def gather(rows, chosen, flat):
    """Pad the chosen rows -> (position in flat int64 [B, T], items int64 [B, T], real bool [B, T])."""
    begin, length = rows.begin[chosen], rows.length[chosen]
    step = torch.arange(int(length.max()))
    real = step < length[:, None]
    where = torch.where(real, begin[:, None] + step, 0)
    return where, torch.where(real, flat[where], 0), real


def make_batch(rows, chosen, flat, personal=None, sampler=None):
    """The training batch of the chosen rows; of this process's share of them under torchrun. personal: as `personal_intents` gives it."""
    process, processes = process_of()
    positions = int(rows.length[chosen].sum())
    mine = chosen[process::processes]
    where, items, real = gather(rows, mine if len(mine) else chosen[:1], flat)
    real &= len(mine) > 0  # fewer rows than processes: take part with no position
    place = where[real]
    weight = torch.full((len(place),), 1 / positions)
    strength, intents = (None, None) if personal is None else (column[place] for column in personal)
    batch = Batch(items, real.flatten().nonzero()[:, 0], flat[place + 1], weight, strength, intents)
    if sampler is None:
        return batch
    negatives, log_count = sampler()
    ids, row = torch.cat([torch.zeros(1, dtype=torch.int64), items.flatten(), batch.target, negatives]).unique(return_inverse=True)
    _, items, target, negatives = row.split([1, items.numel(), len(place), len(negatives)])
    return batch._replace(items=items.view_as(batch.items), target=target, ids=ids, negatives=negatives, log_count=log_count)


def negative_sampler(data, count, random):
    """Draws `count` negatives, half of them uniform over items and half over training interactions -> (ids int64, log_count).

    The popular half finds the items that take most of the softmax, the uniform half reaches all.
    """
    items = torch.from_numpy(data.training_items()).long()
    share = 0.5 / (len(data.items) - 1) + 0.5 * torch.bincount(items, minlength=len(data.items)) / len(items)  # (V+1)
    log_expected = (share * count).log()

    def draw():
        uniform = torch.randint(1, len(data.items), (count - count // 2,), generator=random)
        popular = items[torch.randint(len(items), (count // 2,), generator=random)]
        drawn = torch.cat([uniform, popular])
        return drawn, log_expected[drawn].float()

    return draw


# Training and scoring


def load_library(folder, data, intents="sae", seed=0):
    """Read a run's intents, or make a rival of as many -> Library; None for "none". Raises UserError.

    text: an item has one "intent" alone, its mean text embedding; random: the SAE's codes over random unit vectors;
    shuffled: the codes of another item; kmeans, pca, dense: `rival`.
    """
    if intents == "none":
        return None
    tensors, meta = load_artifact(folder / "intents.safetensors", f"sae.py --run {folder}", data)
    # What a labeler judged to be no intent loses its codes: it is never retrieved, and the others keep their numbers
    cells = tensors["is_intent"][tensors["indices"].long()]
    indptr = F.pad(cells.cumsum(0), (1, 0))[tensors["indptr"]]
    library = Library(tensors["vectors"], indptr, tensors["indices"][cells], tensors["values"][cells])
    J, V, random = len(library.vectors), len(data.items) - 1, generator(seed, f"{intents} intents")
    if intents == "random":
        return library._replace(vectors=F.normalize(torch.randn(library.vectors.shape, generator=random), dim=1))
    if intents == "shuffled":
        count, order = library.indptr.diff(), torch.cat([torch.zeros(1, dtype=torch.int64), torch.randperm(V, generator=random) + 1])
        cells = torch.cat([torch.arange(library.indptr[v], library.indptr[v + 1]) for v in order])
        indptr = F.pad(count[order].cumsum(0), (1, 0))
        return library._replace(indptr=indptr, indices=library.indices[cells], values=library.values[cells])
    if intents == "sae":
        return library
    x, settings = standardized_texts(folder, data), SaeSettings(**meta["settings"])
    if intents == "text":
        sums = torch.zeros(V + 1, x.shape[1]).index_add_(0, torch.from_numpy(data.text_item).long(), x)
        texts = torch.from_numpy(np.bincount(data.text_item, minlength=V + 1))
        covered = texts > 0
        indptr = F.pad(covered.cumsum(0), (1, 0))
        return Library((sums / texts.clamp_min(1)[:, None])[covered], indptr, torch.arange(covered.sum()).int(), torch.ones(covered.sum()))
    vectors, codes = rival(intents, x, J, settings.active, seed)
    csr = item_codes(codes, data.text_item, V, np.arange(len(vectors)))
    return Library(vectors, *map(torch.from_numpy, csr))


def personal_intents(data, library, settings, histories=None):
    """(strength, intent) of every interaction by `activation_retrieval`, or None if the model doesn't use them.

    histories: (start, flat) of others than those in data, which gives the document frequency all the same.
    """
    count = max(settings.matched * (settings.match > 0), settings.personal * (settings.retrieval == "activation"))
    if settings.intents == "none" or not count:
        return None
    idf = inverse_frequency(*intent_frequency(data, library))
    return activation_retrieval(*(histories or (data.start, data.flat)), library, idf, min(count, len(library.vectors)), settings.decay)


@torch.no_grad()
def user_states(model, data, personal, part, positions=2**15):
    """State u of each user before their held-out item of "valid" or "test" -> float32 [users, D] on the model's device."""
    was_training, device = model.training, model.item.weight.device
    model.eval()
    flat, table = torch.from_numpy(data.flat).long(), model.item_table()
    rows = evaluation_rows(data, part, model.settings.history)
    states = torch.empty(len(rows.length), table.shape[1], device=device)
    for chosen in batches(rows, positions):
        where, items, real = gather(rows, chosen, flat)
        last = torch.arange(len(chosen)) * items.shape[1] + rows.length[chosen] - 1
        intents = None if personal is None else personal[1][where.flatten()[last]].to(device)
        states[chosen.to(device)] = model(items.to(device), last.to(device), intents, table)
    model.train(was_training)
    return states


@torch.no_grad()
def rank_users(score, data, part, cells=2**23):
    """Full ranking of every user's held-out item of "valid" or "test" -> ranks float64 [users].

    score: maps user numbers int64 [B] to scores [B, V+1], at most `cells` of them at a time, so that memory grows with
    neither users nor items. Items of the history leave the ranking.
    """
    targets, ranks = torch.from_numpy(data.targets(part)).long(), []
    for users in torch.arange(len(data.users)).split(max(cells // len(data.items), 1)):
        seen = [torch.from_numpy(data.history(user, part)).long() for user in users.tolist()]
        scores = score(users)
        seen = torch.nn.utils.rnn.pad_sequence(seen, batch_first=True).to(scores.device)
        ranks.append(target_ranks(scores, targets[users].to(scores.device), seen))
    return torch.cat(ranks)


def model_scores(model, data, personal, part):
    """The `score` of `rank_users` for a trained model, equation (9)."""
    states, table = user_states(model, data, personal, part), model.item_table().detach()
    rows, device = evaluation_rows(data, part, model.settings.history), states.device

    def score(users):
        scores = states[users.to(device)] @ table.T
        if personal is None or not model.settings.match:
            return scores
        last = (rows.begin + rows.length)[users] - 1
        return scores + model.match(*(column[last].to(device) for column in personal))

    return score


def batch_loss(model, batch):
    """Equation (10) on a Batch -> (total, {"item": ..., "intent": ...}); sums weighted by the batch's weights.

    On a GPU the network computes in bfloat16 where autocast deems it safe; tables, scores and losses stay float32.
    """
    table = model.item_table(batch.ids)
    with torch.autocast(table.device.type, torch.bfloat16, enabled=table.is_cuda):
        u = model(batch.items, batch.real, batch.personal, table)  # (P, D)
    u = u.float()
    match = None
    if batch.personal is not None and model.settings.match:
        r, target = (batch.strength, batch.personal), batch.target if batch.ids is None else batch.ids[batch.target]
        some = (lambda at: model.match(*(column[at] for column in r))) if batch.ids is None else model.match(*r, batch.ids[batch.negatives])
        match = model.match_one(*r, target), some
    if batch.negatives is None:
        terms = {"item": catalogue_loss(u, table, batch.target, batch.weight, match)}
    else:
        terms = {"item": sampled_loss(u, table, batch.target, batch.weight, batch.negatives, batch.log_count, match or (0, 0))}
    loss = terms["item"]
    if model.has_intents and model.settings.next_intent:
        terms["intent"] = next_intent_loss(model, u, batch.target, batch.weight, batch.ids)
        loss = loss + model.settings.next_intent * terms["intent"]
    return loss, terms


def train_model(data, library, settings):
    """Train with the epoch chosen on validation NDCG@10 -> (model, rows of the log). Test items are never looked at.

    Raises FloatingPointError if the loss is not finite, UserError if no history is long enough to train on.
    """
    device = pick_device(settings.device)
    torch.manual_seed(settings.seed)  # initial parameters, the same in all processes
    frequency = intent_frequency(data, library) if library else None
    model = Recommender(settings, len(data.items) - 1, library, frequency).to(device)
    personal = personal_intents(data, library, settings)
    rows, flat = training_rows(data, settings.history), torch.from_numpy(data.flat).long()
    if not len(rows.length):
        raise UserError(f"{data.folder}: no user has the 4 items that training and two held-out items need: bring longer histories")
    torch.manual_seed(generator(settings.seed, f"dropout {process_of()[0]}").initial_seed())  # each process drops other units
    sampler = negative_sampler(data, settings.negatives, generator(settings.seed, "negatives")) if settings.negatives else None
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, fused=True)
    shuffle, progress = generator(settings.seed, "model batches"), Progress(settings.epochs, "epoch", "s left at most")
    positions = int(rows.length.sum())
    best, best_state, best_epoch, log = -1.0, None, 0, []
    for epoch in range(1, settings.epochs + 1):
        model.train()
        started, sums = time.perf_counter(), {}
        parts = batches(rows, settings.batch, shuffle)
        for step, chosen in enumerate(parts, 1):
            loss, terms = batch_loss(model, make_batch(rows, chosen, flat, personal, sampler).to(device))
            optimizer.zero_grad()
            loss.backward()
            for p in model.parameters():
                sum_over_processes(p.grad)
            optimizer.step()
            share = int(rows.length[chosen].sum()) / positions
            for name, term in terms.items():  # summed on the device: reading a value would make a GPU wait
                sums[name] = sums.get(name, 0) + term.detach() * share
            progress.show(round(epoch - 1 + step / (len(parts) + 1), 2))
        means = {f"loss_{name}": sum_over_processes(value).item() for name, value in sums.items()}
        if not all(map(math.isfinite, means.values())):
            raise FloatingPointError(f"the loss in epoch {epoch} is not finite: lower --lr")
        seconds = time.perf_counter() - started
        valid = ranking_metrics(rank_users(model_scores(model, data, personal, "valid"), data, "valid"))
        shared = sum_over_processes(torch.tensor(list(valid.values()), dtype=torch.float64, device=device)) / process_of()[1]
        valid = dict(zip(valid, shared.tolist()))  # the same in all processes, so that they stop together
        log.append(dict(epoch=epoch, seconds=round(seconds, 2), **means, **{f"valid_{n}": valid[n] for n in ("HR@10", "NDCG@10")}))
        if valid["NDCG@10"] > best:
            best, best_epoch = valid["NDCG@10"], epoch
            best_state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        losses = "  ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in means.items())
        progress.show(epoch, f"{losses}  valid NDCG@10 {valid['NDCG@10']:.4f} (best {best:.4f})  {seconds:.1f} s", keep=True)
        if epoch - best_epoch >= settings.patience:
            break
    print(f"best epoch {best_epoch}, chosen on validation: NDCG@10 {best:.4f}")
    model.load_state_dict(best_state)
    return model.eval(), log


def file_names(intents):
    """Where a model and its log lie in the run folder."""
    name = {"sae": "", "none": "sasrec"}.get(intents, intents)
    return f"{name or 'model'}.safetensors", f"{name}{'_' * bool(name)}log.csv"


def load_model(folder, intents, data, library):
    """Read a trained model of a run -> Recommender in eval mode; intents is "none" for the control. Raises UserError."""
    made_by = f"model.py --run {folder}" + " --intents none" * (intents == "none")
    path = folder / file_names(intents)[0]
    tensors, meta = load_artifact(path, made_by, data)
    stale = UserError(f"{path} does not fit this version of model.py: make it again with `{made_by}`")
    if meta["settings"].keys() != {field.name for field in dataclasses.fields(ModelSettings)}:
        raise stale  # a setting that the model was not trained with would change its scores
    frequency = None if library is None else intent_frequency(data, library)
    model = Recommender(ModelSettings(**meta["settings"]), len(data.items) - 1, library, frequency)
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        raise stale from error
    return model.eval()


def train(settings):
    """Train the recommender of a run, or its control, and write it with its log."""
    join_processes()
    settings, folder = resolve(settings), Path(settings.run)
    data = load_dataset(settings.data) if settings.data else run_dataset(settings.run)
    library = load_library(folder, data, settings.intents, settings.seed)
    for name in ("personal", "public") if library else ():
        if getattr(settings, name) > len(library.vectors):
            raise UserError(f"--{name} {getattr(settings, name)} is more than the {len(library.vectors)} intents of {folder}: lower it")
    kind = "SASRec" if library is None else f"SAERec with {len(library.vectors)} intents"
    print(f"{kind} on {data.folder}: {len(data.users):,} users, {len(data.items) - 1:,} items")
    model, log = train_model(data, library, settings)
    name, log_name = file_names(settings.intents)
    write_table(folder / log_name, log)
    save_artifact(folder / name, model.state_dict(), settings, data.hash, [folder / "intents.safetensors"] if library else [])


# Asking and steering


@dataclasses.dataclass(frozen=True)
class RecommendSettings:
    run: str = setting("", "run folder with a trained model", unit="path")
    user: str = setting("", "id of a user in the data, all of whose items are taken as known")
    history: str = setting("", "or the ids of items, oldest first, as in 'i1 i7'")
    history_titles: str = setting("", "or their titles, as in 'Toy Story; GoldenEye'")
    top: int = setting(10, "items to recommend", low=1)
    more: str = setting("", "intents to see more of: numbers, keywords or labels, between commas, or semicolons if labels hold commas")
    less: str = setting("", "intents to see less of")
    block: str = setting("", "intents whose items are left out")
    strength: float = setting(1.0, "how far --more and --less move the item that has most of it", unit="deviations of the scores", low=0)
    json: bool = setting(False, "print JSON for programs")
    device: str = common_settings()[1]


@torch.no_grad()
def intent_terms(model, u, item, personal=None):
    """The intent terms of a score, largest first -> (intent int64 [n], value float32 [n]); the id's part is the rest.

    u: [D], item: 1..V; personal: (strength [n], intent [n]) of the user's history. By equations (1) and (9) the score is <u, e_v> plus a term
    code_vj (<u, P d_j + p_j> + m r_j) an intent; r_j is 0 where j is not among them.
    """
    cells = slice(int(model.codes0[item]), int(model.codes0[item + 1]))
    intents, share = model.codes1[cells].long(), torch.zeros(len(model.vectors), device=u.device)
    if model.settings.grounded:
        share[intents] = model.intent_parts()[intents] @ u
    if personal is not None and model.settings.match:
        share.index_add_(0, personal[1].long(), model.settings.match * personal[0])
    elif not model.settings.grounded:
        return intents[:0], share[:0]
    values, order = (model.codes2[cells] * share[intents]).sort(descending=True)
    return intents[order], values


def intent_shift(model, weight):
    """What steering adds to scores, in standard deviations of a user's scores: sum_j weight_j code_vj / max_v code_vj.

    weight: float [J], such as the strength for --more and minus it for --less -> float [V+1].
    """
    indptr, indices, values = model.codes0, model.codes1.long(), model.codes2
    largest = torch.zeros(len(weight), device=values.device).scatter_reduce(0, indices, values, "amax")
    return weighted_bags(F.pad(weight / largest.clamp_min(1e-12), (0, 1))[:, None], indptr, model.codes1, values)[:, 0]


def steer(scores, shift):
    """Steered scores [B, V+1] of a shift [V+1] or [B, V+1]; the padding item's are left out of the deviation."""
    return scores + scores[:, 1:].std(1, keepdim=True) * shift


def find_intents(rows, names):
    """Numbers of the intents that comma-separated names mean: a number, a label, or all with that part of a label, or that keyword.

    What a labeler judged to be no intent is not among them. Raises UserError with the nearest labels and keywords.
    """
    found, rows = [], [row for row in rows if row.get("is_intent", True)]
    for name in (name.strip().lower() for name in names.split(";" if ";" in names else ",")):
        hits = [row["intent"] for row in rows if name in (str(row["intent"]), row["label"].lower())]
        hits = hits or [row["intent"] for row in rows if name in row["label"].lower().split(", ")]
        hits = hits or [row["intent"] for row in rows if name in (word.lower() for word in row["keywords"])]
        if not hits:
            known = sorted({word for row in rows for word in (row["label"].lower(), *row["keywords"])})
            near = ", ".join(difflib.get_close_matches(name, known, 5, 0.5)) or "none is near; see intents.jsonl"
            raise UserError(f"there is no intent {name!r}; the nearest are: {near}")
        found += hits
    return list(dict.fromkeys(found))


def find_items(data, names, titles):
    """Numbers of the items with the given ids, or titles -> list of 1..V. Raises UserError with the nearest matches."""
    known = {}
    for item in range(len(data.items) - 1, 0, -1):  # of equal titles the first counts
        for name in (data.titles[item], re.sub(r"\s*\(\d{4}\)$", "", data.titles[item])) if titles else [data.items[item]]:
            known[name.lower() if titles else name] = item
    found = []
    for name in names:
        item = known.get(name.lower() if titles else name)
        if item is None:
            near = difflib.get_close_matches(name.lower() if titles else name, known, 5, 0.4)
            shown = "; ".join(data.titles[known[n]] if titles else n for n in near) or "none is near"
            raise UserError(f"there is no item {'titled ' * titles}{name!r}; the nearest are: {shown}")
        found.append(item)
    return found


def asked_history(settings, data):
    """The items that recommend is asked about, oldest first -> int32 [T]. Raises UserError."""
    given = [name for name in ("user", "history", "history_titles") if getattr(settings, name)]
    if len(given) != 1:
        raise UserError("give one of --user, --history and --history-titles" + f", not {len(given)}" * bool(given))
    if not settings.user:
        names = settings.history.split() or [title.strip() for title in settings.history_titles.split(";")]
        return np.array(find_items(data, names, bool(settings.history_titles)), np.int32)
    if settings.user not in data.users:
        near = ", ".join(difflib.get_close_matches(settings.user, data.users, 5, 0.4)) or ", ".join(data.users[:3])
        raise UserError(f"there is no user {settings.user!r} in {data.folder}; the nearest are: {near}")
    user = data.users.index(settings.user)
    return data.flat[data.start[user] : data.start[user + 1]]


@torch.no_grad()
def explain(model, data, library, rows, history, top, steering=None, blocked=(), terms=3):
    """Recommendations after a history int32 [T], with what they are made of -> dict for `recommend --json`.

    steering: float [J] as in `intent_shift`; blocked: intents whose items are left out. A score is id_part + terms + rest, exactly.
    """
    device, s, J = model.item.weight.device, model.settings, len(library.vectors)
    items = torch.from_numpy(history[-s.history :]).long()[None]
    personal = personal_intents(data, library, s, (np.array([0, len(history)]), history))
    if personal is not None:
        personal = tuple(column[-1:].to(device) for column in personal)  # (1, n)
    last, table = torch.tensor([items.shape[1] - 1], device=device), model.item_table()
    u = model(items.to(device), last, None if personal is None else personal[1], table)
    own, matched = u @ table.T, personal if s.match else None  # (1, V+1)
    if matched is not None:
        own = own + model.match(*matched)
    if len(model.personal) and s.retrieval != "activation":  # those that the branch attends to are shown
        h = model.embed(items.to(device), table)
        for block in model.trunk if s.retrieval == "trunk" else ():
            h = block(h)
        personal = model.retrieve(h[:, -1], model.intent(model.vectors))
    strength, chosen = (torch.zeros(0),) * 2 if personal is None else (column[0, : s.personal].cpu() for column in personal)
    scores = own if steering is None else steer(own, intent_shift(model, steering))
    allowed = torch.ones(len(data.items), dtype=torch.bool, device=device)
    allowed[0] = False
    allowed[torch.from_numpy(history).long().to(device)] = False
    for intent in blocked:
        allowed[model.codes4[model.codes3[intent] : model.codes3[intent + 1]].long()] = False  # its items, from the transposed codes
    before, after = (x[0].masked_fill(~allowed, -torch.inf) for x in (own, scores))
    best = after.argsort(descending=True, stable=True)[: min(top, int(allowed.sum()))]
    rank_before = {int(v): n for n, v in enumerate(before.argsort(descending=True, stable=True).tolist(), 1)}

    def evoked_by(intent):
        weight = [(s.decay ** (len(history) - 1 - t) * library.code(int(v), intent), t) for t, v in enumerate(history)]
        return [data.titles[history[t]] for value, t in sorted(weight, reverse=True)[:2] if value > 0]

    listed = []
    for rank, item in enumerate(best.tolist(), 1):
        number, value = (x.tolist() for x in intent_terms(model, u[0], item, matched and [column[0] for column in matched]))
        shown = sorted(zip(number, value), key=lambda one: -abs(one[1]))[:terms]
        score, kept = float(own[0, item]), sum(v for _, v in shown)
        listed.append(dict(
            rank=rank, item=data.items[item], title=data.titles[item], score=score, id_part=score - sum(value), rest=sum(value) - kept,
            terms=[dict(intent=j, label=rows[j]["label"], value=v) for j, v in shown], rank_before=rank_before[item], steered=float(after[item]),
        ))  # fmt: skip
    unsteered = before.sort(descending=True).values[: len(listed)]
    public = model.public_intents().tolist() if s.public else []
    return dict(
        history=[dict(item=data.items[v], title=data.titles[v]) for v in history.tolist()],
        personal=[dict(intent=j, label=rows[j]["label"], strength=w, evoked_by=evoked_by(j))
                  for j, w in zip(chosen.int().tolist(), strength.tolist()) if j < J],
        public=[dict(intent=j, label=rows[j]["label"]) for j in public], recommendations=listed,
        cost=float(unsteered.mean() - np.mean([one["score"] for one in listed])) if listed else 0.0,
    )  # fmt: skip


def recommend(settings):
    """Recommend to a user, or after any history, with reasons; steer by intents."""
    folder, device = Path(settings.run), pick_device(settings.device)
    with contextlib.redirect_stdout(io.StringIO()) if settings.json else contextlib.nullcontext():
        data = run_dataset(settings.run)
        library, rows = load_library(folder, data), read_intents(folder)
        model, history = load_model(folder, "sae", data, library).to(device), asked_history(settings, data)
    if settings.strength != RecommendSettings.strength and not (settings.more or settings.less):
        raise UserError("--strength changes nothing without --more or --less: leave it out")
    more, less, blocked = (find_intents(rows, names) if names else [] for names in (settings.more, settings.less, settings.block))
    weight = torch.zeros(len(rows), device=device)
    for chosen, sign in ((more, 1), (less, -1)):
        if chosen:
            one = torch.zeros_like(weight).index_fill(0, torch.tensor(chosen, device=device), 1.0)
            weight += sign * settings.strength * one / intent_shift(model, one).max()  # however many intents a word means
    result = explain(model, data, library, rows, history, settings.top, weight if more or less else None, blocked)
    if settings.json:
        print(json.dumps(result, ensure_ascii=False))
        return
    print("history: " + "; ".join(one["title"] for one in result["history"][-8:]))
    for one in result["personal"]:
        print(f"  personal intent {one['strength']:.2f}  {one['label']}  (from {'; '.join(one['evoked_by'])})")
    print("  public intents: " + "; ".join(one["label"] for one in result["public"]) if result["public"] else "  no public intents")
    for word, chosen in (("more of", more), ("less of", less), ("without", blocked)):
        if chosen:
            print(f"  {word}: " + "; ".join(rows[j]["label"] for j in chosen[:5]) + f" and {len(chosen) - 5} more" * (len(chosen) > 5))
    steered = bool(more or less)
    for one in result["recommendations"]:
        moved = f" (was {one['rank_before']})" if steered and one["rank_before"] != one["rank"] else ""
        parts = [f"id {one['id_part']:+.2f}", *(f"{t['label']} {t['value']:+.2f}" for t in one["terms"]), f"rest {one['rest']:+.2f}"]
        print(f"{one['rank']:4} {one['title']}{moved}\n       {one['score']:.2f} = {'  '.join(parts)}")
    if steered:
        print(f"steering costs {result['cost']:.3f} of the mean score of the list by the user's own scores")


def main(argv=None):
    return run(argv, __doc__, train=(ModelSettings, train), recommend=(RecommendSettings, recommend))


if __name__ == "__main__":
    sys.exit(main())
