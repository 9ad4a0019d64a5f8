"""Three recommenders: SASRec, the control; SAERec, the paper; Grounded, ours. Losses, training.

    python model.py --run runs/ml-100k                    -> grounded.safetensors, grounded_log.csv
    python model.py --run runs/ml-100k --model saerec     -> saerec.safetensors, saerec_log.csv
    python model.py --run runs/ml-100k --model sasrec     -> sasrec.safetensors, sasrec_log.csv

A model maps a history of items [T] to a score for each item [V]. The intents that guide it, d_j of
d [J, E], and the items' codes, code_vj [V, J], are those of intents.safetensors.

SASRec (Kang & McAuley 2018)
    h   = Dropout(LayerNorm(Y[item] + pos))                     SASRec.embed                  (1)
    u   = causal self-attention blocks(h)                       SelfAttention                 (2)
    s_v = <u, Y_v>                                              SASRec.scores                 (3)
    loss = cross entropy of softmax_v(s_v), the next item       catalogue_loss                (4)
SAERec (arXiv 2606.18897); the u of (2) is now a
    Z   = W d + bias                                            SAERec.forward                (5)
    r_j = relu(cos(h_t, Z_j)) log((1 + n) / (1 + df_j))         SAERec.personal_intents       (6)
    b   = cross-attention blocks(h_t, Z of the k largest r_j)   CrossAttention                (7)
    c   = cross-attention blocks(h_t, Z of the g highest df_j)  SAERec.public_intents         (8)
    u   = a + w_b b + w_c c, w = softmax(<a, [b, c]> / sqrt(D)) SAERec.fuse                   (9)
Grounded (ours; D4 and D5 in docs/method.md)
    Y_v = e_v + sum_j code_vj p_j                               Grounded.item_table          (10)
    r_j = idf_j sum_(i <= t) decay^(t - i) code_(item i) j      Grounded.history_intents     (11)
    s_v = <u, Y_v> + m sum_j r_j code_vj, the 20 largest r_j    Grounded.scores              (12)

(2) and (11) read the past of a position, all else the position alone (and df, a running count over
batches), so one pass over a row of items trains every prefix of it (D3).

From a history to its scores:
    model_scores        pads histories; states_after looks up their items' vectors
      item_table          Y_v: ids, and for Grounded SparseRows.mix of codes and p
      forward             -> State: u, and what made it
        embed, trunk        (1), (2)
        personal_intents, CrossAttention, fuse        SAERec, (6) to (9); see guide
        history_intents     Grounded, (11)
      scores              (3), and for Grounded match, (12)
Letters are those of saerec.py, and H attention heads; Y [V+1, D] the table of item vectors, pos the
learned positions, e_v and p_j learned rows of an item and of an intent; df and n moving averages in
(6) and (8), see personal_intents, counts in (11), see inverse_frequency; m and decay are settings.
D1 to D11 are departures from the paper, see docs/method.md.
"""

import dataclasses
import sys
import time
from pathlib import Path
from typing import NamedTuple

from saerec import (
    Progress, StageSettings, UserError, claim, generator, join_processes, pick_device, process_of,
    rank_users, ranking_metrics, run_command, run_dataset, save_artifact, setting,
    sum_over_processes, write_table,
)  # fmt: skip  # before torch, see GOMP_SPINCOUNT there

import torch
import torch.nn.functional as F

from sae import load_intents

PAPER = "SAERec's code"
PAIRS = 2**25  # of positions at a time, for each of which attention holds a weight per head
CHUNK = 2**20  # scores at a time, of 32 positions at least, which fit the cache of a CPU
MODELS = {}  # the class of each --model: the three below, and what a fork adds


@dataclasses.dataclass(frozen=True)
class ModelSettings(StageSettings):
    model: str = setting("grounded", "what to train", choices=MODELS)
    personal: int = setting(5, "personal intents k", origin=PAPER, low=1, only="saerec")
    public: int = setting(5, "public intents g", origin=PAPER, low=1, only="saerec")
    match: float = setting(0.5, "weight m of the match, equation (12)", low=0, only="grounded")
    decay: float = setting(0.9, "per step back, (11)", low=0, high=1, only="grounded")
    width: int = setting(64, "width D", origin=PAPER, low=1)
    layers: int = setting(2, "blocks of the trunk and of each branch", origin=PAPER, low=1)
    heads: int = setting(2, "attention heads", origin=PAPER, low=1)
    dropout: float = setting(0.5, "dropout everywhere", origin=PAPER, low=0, high=0.99)
    history: int = setting(50, "most recent items read", unit="items", origin=PAPER, low=1)
    epochs: int = setting(100, "most passes over the training data", low=1)
    patience: int = setting(10, "epochs without a better validation NDCG@10 to stop at", low=1)
    batch: int = setting(1024, "training positions per step", unit="positions", low=1)
    lr: float = setting(1e-3, "Adam's learning rate", origin=PAPER, low=0)


def check_model(s):
    """Refuse a setting that the model ignores, and widths that heads don't divide. UserError."""
    for field in dataclasses.fields(s):
        only = field.metadata.get("only", s.model)
        changed = getattr(s, field.name) != field.default
        if changed and not issubclass(MODELS[s.model], MODELS[only]):
            raise UserError(f"--{field.name} changes nothing without --model {only}: leave it out")
    if s.width % s.heads:
        raise UserError(f"--width {s.width} is no multiple of --heads {s.heads}: change one")


# Layers


def dropout(x, p, training):
    """Inverted dropout by 16 random bits a unit: on a CPU much faster than F.dropout's draws."""
    if not training or not p:
        return x
    bits = x.new_empty(x.numel() // 4 + 1, dtype=torch.int64).random_(-(2**63), None)
    drawn = bits.view(torch.int16)[: x.numel()].view(x.shape)  # uniform, -2^15 to 2^15 - 1
    return x * (drawn >= round((p - 0.5) * 2**16)).div(1 - p).to(x.dtype)


class Attention(torch.nn.Module):
    """Multi-head attention and feed-forward, LayerNorm after each (Vaswani et al. 2017)."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        square = [torch.nn.Linear(width, width) for _ in range(4)]
        self.query, self.key, self.value, self.out = square
        self.expand = torch.nn.Linear(width, 4 * width)
        self.contract = torch.nn.Linear(4 * width, width)
        self.attention_norm = torch.nn.LayerNorm(width)
        self.forward_norm = torch.nn.LayerNorm(width)

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
        roles = (self.query, self.key, self.value)
        q, k, v = (self.split(role(x)).transpose(1, 2) for role in roles)  # (B, H, T, D/H) each
        future = q.new_full((x.shape[1], x.shape[1]), -torch.inf).triu(1)  # (T, T)
        weight = (q @ k.transpose(2, 3) / q.shape[3] ** 0.5 + future).softmax(3)  # (B, H, T, T)
        mixed = self.drop(weight) @ v  # (B, H, T, D/H)
        return self.finish(x, mixed.transpose(1, 2).flatten(2))


class CrossAttention(Attention):
    def forward(self, x, z, chosen):
        """x [P, D] attends to rows of z [any, D] -> [P, D].

        chosen: their numbers, int64 [P, n], or [1, n], the same for all; n is k or g. Keys and
        values are projected once per row of z and then gathered, not once per P x n. The products
        are written out: bmm is slow for P x H of so small matrices.
        """
        query = self.split(self.query(x))[:, None]  # (P, 1, H, D/H)
        keys = self.split(F.embedding(chosen, self.key(z)))  # (P or 1, n, H, D/H)
        values = self.split(F.embedding(chosen, self.value(z)))  # (P or 1, n, H, D/H)
        weight = ((query * keys).sum(3) / query.shape[-1] ** 0.5).softmax(1)  # (P, n, H)
        mixed = (self.drop(weight)[:, :, :, None] * values).sum(1)  # (P, H, D/H)
        return self.finish(x, mixed.flatten(1))


class Blocks(torch.nn.ModuleList):
    """Attention blocks, one after the other."""

    def forward(self, x, *more):
        for block in self:
            x = block(x, *more)
        return x


# The three models


class State(NamedTuple):
    """What a model makes of the history up to each of P positions."""

    u: torch.Tensor  # float32 [P, D]
    parts: torch.Tensor  # float32 [n, P, D], sum to u: u alone, or SAERec's a, w_b b, w_c c
    personal: torch.Tensor | None = None  # int64 [P, k], SAERec: intents attended to; J for none
    r: torch.Tensor | None = None  # float32 [P, J], Grounded: what the history is about


class Reasons(NamedTuple):
    """What a score is made of: parts and terms add up to it."""

    parts: dict  # name -> float
    intents: torch.Tensor  # int64 [n], of the terms
    terms: torch.Tensor  # float32 [n]


class SASRec(torch.nn.Module):
    """The trunk alone (Kang & McAuley 2018), equations (1)-(3)."""

    needs_intents = False
    part_names = ("history",)

    def __init__(self, settings, data, intents=None):
        """data: Dataset; intents: Intents, as `load_intents` gives them, on the model's device."""
        super().__init__()
        s = self.settings = settings
        self.item = torch.nn.Embedding(len(data.items), s.width, padding_idx=0)
        self.position = torch.nn.Embedding(s.history, s.width)
        self.input_norm = torch.nn.LayerNorm(s.width)
        self.trunk = self.new_blocks(SelfAttention)
        self.add_parameters(data, intents)
        for p in self.parameters():
            if p.dim() == 2:
                torch.nn.init.normal_(p, std=0.02)
        self.start_ids()

    def new_blocks(self, Block):
        s = self.settings
        return Blocks(Block(s.width, s.heads, s.dropout) for _ in range(s.layers))

    def add_parameters(self, data, intents):
        """The parameters and buffers that a subclass has besides."""

    def start_ids(self):
        """Item vectors start at random, but the padding's is nothing."""
        torch.nn.init.zeros_(self.item.weight.data[0])

    def item_table(self):
        """Y_v of all items -> [V+1, D]."""
        return self.item.weight

    def embed(self, vectors):
        """Equation (1) of item vectors [B, T, D] -> h [B, T, D]; positions count from the start."""
        h = self.input_norm(vectors + self.position.weight[: vectors.shape[1]])
        return dropout(h, self.settings.dropout, self.training)

    def forward(self, items, vectors, wanted):
        """The State of the wanted positions.

        items: int64 [B, T], padded at the end with 0; vectors: their Y_v, float32 [B, T, D];
        wanted: int64 [P], places in the flattened items.
        """
        u = self.trunk(self.embed(vectors)).flatten(0, 1)[wanted]  # (P, D)
        return State(u, u[None])

    def scores(self, state, table):
        """Equation (3): scores [P, V+1] by the table of all items."""
        return state.u @ table.T

    def reasons(self, state, item):
        """What the score of one item, 1..V, after one history (P = 1) is made of -> Reasons.

        SAERec's parts are exact since u = a + w_b b + w_c c.
        """
        values = (state.parts[:, 0] @ self.item_table()[item]).tolist()
        return Reasons(dict(zip(self.part_names, values)), torch.zeros(0).long(), torch.zeros(0))

    def intents_shown(self, state):
        """Intents that guide one history (P = 1): {name: int64 [n]}, the weightiest first."""
        return {}


class SAERec(SASRec):
    """The paper (arXiv 2606.18897): personal and public branches, adaptive fusion, (5)-(9)."""

    needs_intents = True
    part_names = ("history", "personal", "public")
    df_decay = 0.9  # of the moving averages df and n, as in SAERec's code

    def add_parameters(self, data, intents):
        J, E = intents.vectors.shape
        is_intent = intents.vectors.any(1)  # bool [J], see load_intents
        if max(self.settings.personal, self.settings.public) > is_intent.sum():
            raise UserError(f"--personal or --public is above {is_intent.sum()} intents: lower it")
        self.register_buffer("is_intent", is_intent, persistent=False)
        # (J+1, E); the last is the absent intent (D7), for a position with fewer than k intents
        self.register_buffer("d", F.pad(intents.vectors, (0, 0, 0, 1)), persistent=False)
        self.project = torch.nn.Linear(E, self.settings.width)  # W and the bias of (5)
        self.personal_branch = self.new_blocks(CrossAttention)
        self.public_branch = self.new_blocks(CrossAttention)
        self.register_buffer("df", torch.zeros(J))
        self.register_buffer("n", torch.zeros(()))

    @torch.no_grad()
    def personal_intents(self, h, z):
        """Equation (6): the k intents of highest similarity x idf -> int64 [P, k]; J where r is 0.

        h: [P, D]; z: [J+1, D]. df counts the positions where an intent is among the k most similar,
        and similar at all; the moving averages of df and n, the positions, move in training only
        (D8).
        """
        cosine = F.normalize(h, dim=1) @ F.normalize(z[:-1], dim=1).T  # (P, J)
        similarity = cosine.relu() * self.is_intent
        idf = torch.log((1 + self.n) / (1 + self.df))
        r, chosen = (similarity * idf).topk(self.settings.personal)  # (P, k)
        if self.training:
            top = similarity.topk(self.settings.personal)
            count = torch.zeros(len(z), device=h.device)  # (J+1,) positions per intent, last all
            count.index_add_(0, top.indices.flatten(), (top.values > 0).float().flatten())
            count[-1] = len(h)
            sum_over_processes(count)
            self.df.lerp_(count[:-1], 1 - self.df_decay)
            self.n.lerp_(count[-1], 1 - self.df_decay)
        return torch.where(r > 0, chosen, len(self.df))

    def public_intents(self):
        """Equation (8): the g intents of highest document frequency -> int64 [g]."""
        return self.df.masked_fill(~self.is_intent, -1).topk(self.settings.public).indices

    def forward(self, items, vectors, wanted):
        h = self.embed(vectors)  # (B, T, D)
        a = self.trunk(h).flatten(0, 1)[wanted]  # (P, D)
        h = h.flatten(0, 1)[wanted]  # (P, D)
        z = self.project(self.d)  # (J+1, D)
        return self.guide(a, h, z, self.personal_intents(h, z))

    def guide(self, a, h, z, personal):
        """Equations (7) to (9) -> State; a, h: [P, D]; z: [J+1, D]; personal: int64 [P, k]."""
        public = self.public_intents()[None]  # (1, g)
        b = self.personal_branch(h, z, personal)  # (P, D)
        c = self.public_branch(h, z, public)  # (P, D)
        parts = self.fuse(a, b, c)  # (3, P, D)
        return State(parts.sum(0), parts, personal)

    @staticmethod
    def fuse(a, b, c):
        """Adaptive fusion, equation (9): [P, D] each -> a, w_b b and w_c c, [3, P, D]."""
        branches = torch.stack([b, c])  # (2, P, D)
        weight = ((a * branches).sum(2) / a.shape[1] ** 0.5).softmax(0)  # (2, P)
        return torch.cat([a[None], weight[:, :, None] * branches])

    def intents_shown(self, state):
        personal = state.personal[0]
        return {"personal": personal[personal < len(self.df)], "public": self.public_intents()}


class Grounded(SASRec):
    """Ours: an item is its id plus its intents, and is matched with the history's, (10)-(12)."""

    needs_intents = True
    matched = 20  # strongest intents of a history, which alone are matched

    def add_parameters(self, data, intents):
        self.codes = intents.codes  # SparseRows [V+1, J], frozen
        p = torch.empty(self.codes.columns, self.settings.width)  # drawn in SASRec.__init__
        self.intent_vectors = torch.nn.Parameter(p)
        self.register_buffer("idf", inverse_frequency(data.training_items(), self.codes))

    def start_ids(self):
        """An id starts as nothing beside its intents, and learns what they don't say."""
        torch.nn.init.zeros_(self.item.weight)

    def intent_table(self):
        """What an intent adds to its items, p_j -> [J, D]."""
        return self.intent_vectors

    def item_table(self):
        """Equation (10)."""
        return self.item.weight + self.codes.mix(self.intent_table())

    @torch.no_grad()
    def history_intents(self, items, wanted):
        """Equation (11): what the history up to each wanted position is about -> r [P, J].

        Only the strongest intents of a position are kept, the others are 0.
        """
        about = self.codes.gather(items.flatten()).dense().view(*items.shape, -1)  # (B, T, J)
        for t in range(1, items.shape[1]):
            about[:, t] += self.settings.decay * about[:, t - 1]
        r = about.flatten(0, 1)[wanted]  # (P, J)
        strongest = (r * self.idf).topk(min(self.matched, r.shape[1]))  # (P, matched) each
        return r.zero_().scatter_(1, strongest.indices, strongest.values)

    def forward(self, items, vectors, wanted):
        state = super().forward(items, vectors, wanted)
        return state._replace(r=self.history_intents(items, wanted))

    def match_weights(self, r):
        """What the match adds to a score per unit of an item's code: m r [P, J]."""
        return self.settings.match * r

    def match(self, r):
        """Second term of equation (12) for r [P, J] -> [P, V+1].

        Summed item by item over its few intents, for all positions at once.
        """
        return self.codes.mix(self.match_weights(r).T.contiguous()).T

    def scores(self, state, table):
        """Equation (12)."""
        # The match lies transposed: to copy it first is faster than to add it so
        return super().scores(state, table) + self.match(state.r).contiguous()

    def reasons(self, state, item):
        """The id's part <u, e_v>, and a term code_vj (<u, p_j> + m r_j) per intent -> Reasons."""
        intents, code = self.codes.row(item)
        value = self.intent_table()[intents] @ state.u[0] + self.match_weights(state.r)[0, intents]
        terms, order = (code * value).sort(descending=True)
        own = (self.item.weight[item] @ state.u[0]).item()
        return Reasons({"id": own}, intents[order], terms)

    def intents_shown(self, state):
        return {"personal": state.r[0].topk(min(5, int((state.r[0] > 0).sum()))).indices}


def inverse_frequency(items, codes):
    """idf_j = log((1 + n) / (1 + df_j)) -> float32 [J]; df_j of the n items carry intent j.

    items: int32 [n], training interactions; codes: SparseRows [V+1, J].
    """
    times = torch.bincount(torch.from_numpy(items), minlength=len(codes.indptr) - 1)  # (V+1,)
    carried = times[codes.rows_of_cells().cpu()].double()  # (cells,)
    df = torch.bincount(codes.indices.cpu(), carried, codes.columns)
    return torch.log((1 + len(items)) / (1 + df)).float()


MODELS.update(sasrec=SASRec, saerec=SAERec, grounded=Grounded)


# Losses


class CrossEntropy(torch.autograd.Function):
    """Weighted sum over p of log sum_v exp(s_pv) - s_(p, target_p), s_pv = <u_p, Y_v> + match_pv.

    The V x P scores never exist at once: those of a chunk of positions are computed, reduced to its
    part of the loss and of both gradients on the way forward, and forgotten. A chunk fits the cache
    of a CPU; a GPU wants few, large kernels.
    """

    @staticmethod
    def forward(ctx, u, table, target, weight, r=None, match=None):
        """u [P, D], table [V, D], target int64 [P] in 0..V-1, weight [P] -> scalar.

        r [P, J] and match, a function of some rows of r -> constants [rows, V+1]: none or both.
        """
        cells = CHUNK if u.device.type == "cpu" else 64 * CHUNK
        rows = 32 * max(cells // len(table) // 32, 1)  # a multiple: a CPU computes many at once
        loss = u.new_zeros(())
        du = torch.empty_like(u)
        dtable = torch.zeros_like(table)
        for begin in range(0, len(u), rows):
            at = slice(begin, begin + rows)
            scores = table @ u[at].T  # (V, rows)
            if r is not None:
                scores += match(r[at]).T[1:]
            own = scores.gather(0, target[None, at])[0]  # (rows,)
            highest = scores.amax(0)  # (rows,)
            exps = scores.sub_(highest).exp_()  # (V, rows); softmax is exps / total
            total = exps.sum(0)  # (rows,)
            loss += weight[at] @ (highest + total.log() - own)
            # d loss / d score is softmax, less 1 for the target; what is narrow is divided: cheaper
            slope = exps.scatter_add_(0, target[None, at], -total[None])  # (V, rows), times total
            du[at] = slope.T @ table / total[:, None]
            dtable.addmm_(slope, u[at] * (weight[at] / total)[:, None])
        ctx.save_for_backward(du * weight[:, None], dtable)
        return loss

    @staticmethod
    def backward(ctx, grad):
        du, dtable = ctx.saved_tensors
        return grad * du, grad * dtable, None, None, None, None


class Batch(NamedTuple):
    """What a training step needs."""

    items: torch.Tensor  # int64 [B, T], padded at the end with 0
    real: torch.Tensor  # int64 [P], where real positions lie in items.flatten()
    target: torch.Tensor  # int64 [P], the item that followed
    weight: torch.Tensor  # float32 [P], of a position in the loss; sum to 1 over all processes


def read_histories(model, batch, vectors):
    """The model's State of a Batch whose items have these vectors [B, T, D].

    On a GPU it computes in bfloat16 where autocast deems it safe, SAERec's similarities among it;
    tables and scores stay float32.
    """
    with torch.autocast(vectors.device.type, torch.bfloat16, enabled=vectors.is_cuda):
        state = model(batch.items, vectors, batch.real)
    return state._replace(u=state.u.float())


def full_softmax(model, state, table, batch):
    """Equation (4) over all real items, of a State and the table [V+1, D] -> scalar."""
    match = None if state.r is None else model.match
    return CrossEntropy.apply(state.u, table[1:], batch.target - 1, batch.weight, state.r, match)


def catalogue_loss(model, batch):
    """Equation (4) of a Batch -> scalar."""
    table = model.item_table()  # (V+1, D)
    state = read_histories(model, batch, F.embedding(batch.items, table))
    return full_softmax(model, state, table, batch)


# Batches


class Rows(NamedTuple):
    """Slices of Dataset.flat: row i is flat[begin[i] : begin[i] + length[i]]."""

    begin: torch.Tensor  # int64
    length: torch.Tensor  # int64


def training_rows(data, history):
    """Cut the inputs of all training histories into Rows of at most `history` items, from the end.

    Each position is in one row, and sees no other row. Its target is the interaction after it,
    still a training one: the last two are held out, so the last training item is only a target.
    """
    begins = []
    lengths = []
    for first, end in zip(data.start[:-1], data.held_out("valid") - 1):
        for stop in range(end, first, -history):
            begins.append(max(first, stop - history))
            lengths.append(stop - begins[-1])
    return Rows(torch.tensor(begins).long(), torch.tensor(lengths).long())


def evaluation_rows(data, part, history):
    """The last `history` items before each user's held-out item of "valid" or "test" -> Rows."""
    end = torch.from_numpy(data.held_out(part))
    begin = torch.maximum(torch.from_numpy(data.start[:-1]), end - history)
    return Rows(begin, end - begin)


def shuffled_batches(rows, positions, random):
    """Numbers of the rows of each batch -> list of int64; about so many positions in a batch.

    Rows of similar lengths go together, so that little is padded.
    """
    order = (rows.length + torch.rand(len(rows.length), generator=random)).argsort()
    number = (rows.length[order].cumsum(0) - 1) // positions  # of each row's batch
    parts = order.split(torch.unique_consecutive(number, return_counts=True)[1].tolist())
    return [parts[i] for i in torch.randperm(len(parts), generator=random)]


def pad_rows(rows, chosen, flat):
    """Chosen rows, padded at the end -> (at_flat int64, items int64, real bool), [B, T] each.

    at_flat: where an item lies in flat.
    """
    length = rows.length[chosen]
    step = torch.arange(int(length.max()))
    real = step < length[:, None]
    at_flat = torch.where(real, rows.begin[chosen][:, None] + step, 0)
    return at_flat, torch.where(real, flat[at_flat], 0), real


def make_batch(rows, chosen, flat, device):
    """The Batch of the chosen rows; of this process's share of them under torchrun."""
    process, processes = process_of()
    mine = chosen[process::processes]
    at_flat, items, real = pad_rows(rows, mine if len(mine) else chosen[:1], flat)
    real &= len(mine) > 0  # fewer rows than processes: take part with no position
    target = flat[at_flat[real] + 1]  # (P,)
    weight = torch.full((len(target),), 1 / int(rows.length[chosen].sum()))  # of all processes
    real = real.flatten().nonzero()[:, 0]  # (P,)
    return Batch(*(part.to(device) for part in (items, real, target, weight)))


# Training


def states_after(model, table, items, length):
    """The State after each whole history; items: int64 [B, T], padded; length: int64 [B]; P = B."""
    last = torch.arange(len(items)) * items.shape[1] + length - 1
    items = items.to(table.device)
    return model(items, F.embedding(items, table), last.to(table.device))


def model_scores(model, data, part):
    """The `score` of `rank_users` for a trained model."""
    rows = evaluation_rows(data, part, model.settings.history)
    flat = torch.from_numpy(data.flat).long()
    table = model.item_table().detach()

    def score(users):
        _, items, _ = pad_rows(rows, users, flat)  # (B, T)
        half = len(users) // 2
        if half and items.numel() * items.shape[1] > PAIRS:
            return torch.cat([score(users[:half]), score(users[half:])])
        return model.scores(states_after(model, table, items, rows.length[users]), table)

    return score


def validate(model, data):
    """Metrics on the validation items -> dict of floats, the same in all processes; UserError."""
    model.eval()
    metrics = ranking_metrics(rank_users(model_scores(model, data, "valid"), data, "valid"))
    if not metrics["MRR"]:  # even the worst rank has some
        raise UserError(f"{data.folder}: all had the validation item before: drop repeated rows")
    values = torch.tensor([*metrics.values()], dtype=torch.float64, device=model.item.weight.device)
    return dict(zip(metrics, (sum_over_processes(values) / process_of()[1]).tolist()))


def new_model(Model, settings, data, intents=None):
    """A Model with initial parameters, the same in all processes; intents: its run's by default."""
    device = pick_device(settings.device)
    if Model.needs_intents and intents is None:
        intents = load_intents(settings.run, data, device)
    torch.manual_seed(settings.seed)
    return Model(settings, data, intents).to(device)


def train_step(model, optimizer, loss, batch):
    """One step on a Batch -> its loss, a tensor: reading it would wait for a GPU."""
    value = loss(model, batch)
    optimizer.zero_grad()
    value.backward()
    for name, p in model.named_parameters():
        if p.grad is None:  # as of one in `match`, which CrossEntropy takes as given
            raise RuntimeError(f"no gradient reaches {name}: train it by a loss of your own")
        sum_over_processes(p.grad)
    optimizer.step()
    return value.detach()


def train_model(model, data, loss=catalogue_loss):
    """Train with the epoch chosen on validation NDCG@10 -> (model, rows of the log).

    Test items are never looked at. loss: a function of (model, Batch). Raises FloatingPointError if
    it is not finite, UserError if no history is long enough to train on.
    """
    s = model.settings
    flat = torch.from_numpy(data.flat).long()
    rows = training_rows(data, s.history)
    if not len(rows.length):
        raise UserError(f"{data.folder}: no user has the 4 items that training needs: bring more")
    optimizer = torch.optim.Adam(model.parameters(), lr=s.lr, fused=True)
    random = generator(s.seed, "model batches")
    # Each process drops other units
    torch.manual_seed(generator(s.seed, f"dropout {process_of()[0]}").initial_seed())
    best = dict(epoch=0, ndcg=-1.0)
    log = []
    progress = Progress(s.epochs, f"{type(model).__name__} epoch", stops_early=True)
    for epoch in range(1, s.epochs + 1):
        started = time.perf_counter()
        model.train()
        losses = []
        parts = shuffled_batches(rows, s.batch, random)
        for step, chosen in enumerate(parts, 1):
            batch = make_batch(rows, chosen, flat, model.item.weight.device)
            losses.append(train_step(model, optimizer, loss, batch))
            progress.show(round(epoch - 1 + step / (len(parts) + 1), 2))
        mean_loss = sum_over_processes(torch.stack(losses).mean()).item()
        if not abs(mean_loss) < torch.inf:  # infinite, or NaN
            raise FloatingPointError(f"the loss in epoch {epoch} is {mean_loss}: lower --lr")
        seconds = time.perf_counter() - started
        valid = validate(model, data)
        line = dict(epoch=epoch, seconds=round(seconds, 2), loss=mean_loss)
        log.append(line | {f"valid_{name}": valid[name] for name in ("HR@10", "NDCG@10")})
        if valid["NDCG@10"] > best["ndcg"]:
            parameters = {name: t.detach().clone() for name, t in model.state_dict().items()}
            best = dict(epoch=epoch, ndcg=valid["NDCG@10"], parameters=parameters)
        said = f"valid NDCG@10 {valid['NDCG@10']:.4f} (best {best['ndcg']:.4f})"
        progress.show(epoch, f"loss {mean_loss:.3f}  {said}  {seconds:.1f} s", keep=True)
        if epoch - best["epoch"] >= s.patience:
            break
    print(f"best {progress.label} {best['epoch']}, by validation NDCG@10 {best['ndcg']:.4f}")
    model.load_state_dict(best["parameters"])
    return model.eval(), log


def save_model(model, log, data):
    """Write a trained model and its log into its run."""
    s = model.settings
    path = Path(s.run) / f"{s.model}.safetensors"
    write_table(path.with_name(f"{s.model}_log.csv"), log)
    made_from = [path.with_name("intents.safetensors")] if model.needs_intents else []
    save_artifact(path, model.state_dict(), s, data.hash, made_from)


def train(settings):
    """Train a recommender of a run and write it with its log."""
    join_processes()
    check_model(settings)
    data = run_dataset(settings.run, settings.data)
    model = new_model(MODELS[settings.model], settings, data)
    claim(settings.run)
    save_model(*train_model(model, data), data)


def main(argv=None):
    return run_command(argv, __doc__, train=(ModelSettings, train))


if __name__ == "__main__":
    sys.exit(main())
