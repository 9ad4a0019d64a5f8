"""Other intents as data: what the SAE's are compared with, each a folder that model.py can run on.

    python studies/rivals.py --run runs/scientific --kind kmeans --out runs/scientific-kmeans
    python model.py --run runs/scientific-kmeans

A folder holds the run's embeddings.safetensors and another intents.safetensors made from it, with
intents.jsonl where its intents have names. From the run's own intents, some of it changed:
    random      random directions, the SAE's codes
    shuffled    the SAE's directions, each item with the codes of another
from the texts, as many intents, and as many to a text but for kmeans:
    kmeans      centroids; a text has its nearest one alone
    kmeans-k    the same centroids; a text has the K nearest
    pca         both signs of the principal axes
    dense       latents of an autoencoder whose codes nothing makes sparse
    text        an item's one intent is its mean text, which no other item has
and other sparse autoencoders, trained and named as sae.py does:
    l1          sparse by a penalty on codes, not by TopK
    half-k, twice-k, half-m, twice-m      other K or M than the run's
    seed        another seed than the run's
What reads codes alone (Grounded) cannot tell `random` from the SAE, and what reads directions alone
(SAERec) cannot tell `shuffled`.
"""

import dataclasses
import os
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import (  # noqa: E402
    HERE, StageSettings, UserError, artifact_meta, file_hash, generator, load_artifact, run_command,
    run_dataset, save_artifact, setting, write_rows,
)  # fmt: skip

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from eval import read_intents  # noqa: E402
from sae import (  # noqa: E402
    SAE, Codes, Corpus, SaeSettings, SparseRows, build_library, cell_bounds, encode_all, item_codes,
    kmeans, load_corpus, resolve, train_sae,
)  # fmt: skip

# Other sparse autoencoders; a number is a factor on the run's own setting
SAE_CHANGES = {
    "l1": {},
    "half-k": dict(active=0.5),
    "twice-k": dict(active=2),
    "half-m": dict(latents=0.5),
    "twice-m": dict(latents=2),
    "seed": {},
}
CODE = (Path(__file__), HERE / "sae.py")  # which say what a kind is
KINDS = ("random", "shuffled", "kmeans", "kmeans-k", "pca", "dense", "text", *SAE_CHANGES)


@dataclasses.dataclass(frozen=True)
class RivalSettings(StageSettings):
    """Write other intents than a run's into a folder of their own."""

    kind: str = setting("", "what the intents are", choices=KINDS, example="kmeans")
    out: str = setting("", "folder to write", unit="path", example="runs/scientific-kmeans")


class Run(NamedTuple):
    """What rivals are made from."""

    corpus: Corpus
    sae: SAE
    settings: SaeSettings  # of the run's SAE
    intents: dict  # tensors of intents.safetensors

    @property
    def data(self):
        """The Dataset of the run."""
        return self.corpus.data

    @property
    def embeddings(self):
        """Of its texts, float32 [N, E]."""
        return self.corpus.embeddings


def load_run(folder, data, device="cpu"):
    """Read a run's embeddings, SAE and intents -> Run; others train on the device.

    Raises UserError.
    """
    folder = Path(folder)
    made_by = f"sae.py --run {folder}"
    tensors, meta = load_artifact(folder / "sae.safetensors", made_by, data)
    intents, _ = load_artifact(folder / "intents.safetensors", made_by, data)
    try:
        here = dict(run=str(folder), data=str(data.folder), device=device)
        settings = SaeSettings(**meta["settings"] | here)
        corpus = load_corpus(folder, settings)
        sae = SAE(settings.latents, settings.active, corpus.embeddings.shape[1])
        sae.load_state_dict(tensors)
    except (TypeError, RuntimeError) as error:  # other settings, other parameters
        problem = f"{folder / 'sae.safetensors'} does not fit this version of sae.py"
        raise UserError(f"{problem}: make it again with `{made_by}`") from error
    return Run(corpus, sae, settings, intents)


# Other autoencoders


class L1SAE(SAE):
    """Sparse by a penalty on the sum of codes (Bricken et al. 2023), all M latents of it active."""

    l1 = 0.2  # rebuilds texts about as well as K = 8

    def __init__(self, latents, active, width, seed=0):
        super().__init__(latents, latents, width, seed)

    def encode(self, x):
        """As (S1) without TopK, x [B, E] -> Codes [B, M]."""
        values = F.relu((x - self.b_dec) @ self.W_enc.T + self.b_enc)
        return Codes(values, torch.arange(len(self.W_enc), device=x.device).expand_as(values))

    def decode(self, codes):
        return codes.values @ self.W_dec + self.b_dec

    def loss(self, x, codes, dead, settings):
        """(S3) with the penalty in place of auxk, which is for latents that TopK leaves out."""
        reconstruction = (x - self.decode(codes)).square().sum() / len(x)
        return reconstruction + self.l1 * codes.values.sum() / len(x), reconstruction


class DenseAutoencoder(L1SAE):
    """Nothing makes its codes sparse."""

    l1 = 0.0


def train_other(run, changes, seed, Model=SAE):
    """Train another SAE on a Run's texts -> (SAE on the CPU, support int64 [M], SaeSettings).

    changes: factors on settings of the run's SAE. Raises UserError if K would be more than M.
    """
    own = run.settings
    sizes = {name: max(1, int(getattr(own, name) * factor)) for name, factor in changes.items()}
    settings = resolve(dataclasses.replace(own, seed=seed, **sizes), run.corpus)
    sae, support, _ = train_sae(run.embeddings, run.corpus.held_out, settings, Model)
    return sae, support, settings


# Other directions


def strongest(scores, count):
    """The `count` largest scores of each text [N, J], where positive -> Codes."""
    values, chosen = scores.topk(min(count, scores.shape[1]))
    return Codes(values.relu(), chosen)


@torch.no_grad()
def kmeans_intents(x, settings, nearest=1):
    """Unit centroids of x [N, E], each text's nearest -> (vectors [J, E], Codes [N, nearest])."""
    random = generator(settings.seed, "k-means")
    vectors = F.normalize(kmeans(x, settings.latents, random, rounds=25), dim=1)
    return vectors, strongest(x @ vectors.T, nearest)


def many_kmeans_intents(x, settings):
    """As `kmeans_intents`, but a text has as many centroids as it has latents."""
    return kmeans_intents(x, settings, settings.active)


@torch.no_grad()
def pca_intents(x, settings):
    """Both signs of principal axes, and a text's K strongest -> (vectors [J, E], Codes [N, K]).

    J is at most twice the width of x [N, E]; nothing is drawn by the seed.
    """
    centred = x - x.mean(0)
    axes = torch.linalg.svd(centred, full_matrices=False)[2][: max(settings.latents // 2, 1)]
    vectors = torch.cat([axes, -axes])
    return vectors, strongest(centred @ vectors.T, settings.active)


def dense_intents(x, settings):
    """A dense autoencoder of x [N, E], of whose codes the K strongest of a text are kept.

    One alone, without noise: its latents turn freely, so those of several don't agree.
    -> (vectors [J, E], Codes [N, K])
    """
    steps = max(300, 20 * len(x) // settings.batch)  # each costs M/K times as much as the SAE's
    alone = dataclasses.replace(settings, steps=steps, members=1, noise=0.0, lr=1e-3)
    every_tenth = torch.arange(len(x)) % 10 == 0
    sae = train_sae(x, every_tenth, alone, DenseAutoencoder)[0]
    codes = encode_all(sae, x)  # (N, J)
    return sae.W_dec.detach(), strongest(codes.values, settings.active)


RIVALS = {
    "kmeans": kmeans_intents,
    "kmeans-k": many_kmeans_intents,
    "pca": pca_intents,
    "dense": dense_intents,
}


def rival(kind, x, settings):
    """Directions of another kind, and codes of texts on them -> (vectors [J, E], Codes [N, K]).

    kind: one of RIVALS; x: standardized texts float32 [N, E]; settings: SaeSettings, whose
    latents are J. J is less where the texts or their width don't allow so many; K is the settings'
    `active`, for kmeans 1. Vectors have norm 1.
    """
    return RIVALS[kind](x, settings)


def mean_texts(x, data):
    """The mean of the texts x [N, E] of each item -> [V+1, E], zeros where it has none."""
    item = torch.from_numpy(data.text_item).long()
    sums = torch.zeros(len(data.items), x.shape[1]).index_add_(0, item, x)
    return sums / torch.bincount(item, minlength=len(data.items)).clamp_min(1)[:, None]


# Libraries: the tensors of an intents.safetensors


def library(vectors, codes):
    """Tensors of intents.safetensors, from vectors [J, E] and the items' SparseRows [V+1, J]."""
    number = torch.arange(len(vectors))
    tensors = dict(vectors=vectors, latent=number.int(), is_intent=torch.ones_like(number).bool())
    return tensors | dict(indptr=codes.indptr, indices=codes.indices, values=codes.values)


def random_library(run, seed):
    """Random unit vectors in place of a Run's."""
    own = run.intents["vectors"]
    drawn = torch.randn(own.shape, generator=generator(seed, "random intents"))
    return run.intents | dict(vectors=F.normalize(drawn, dim=1))


def shuffled_library(run, seed):
    """Codes of a Run's items dealt out anew; padding keeps none."""
    own = run.intents
    codes = SparseRows(own["indptr"], own["indices"], own["values"], len(own["vectors"]))
    items = len(run.data.items) - 1
    order = torch.randperm(items, generator=generator(seed, "shuffled intents")) + 1
    codes = codes.gather(F.pad(order, (1, 0)))
    return own | dict(indptr=codes.indptr, indices=codes.indices, values=codes.values)


def text_library(run, seed):
    """An intent per item with texts: its mean text, which it has with code 1."""
    mean = mean_texts(run.sae.standardize(run.embeddings), run.data)
    has = torch.zeros(len(mean), dtype=torch.int64)
    has[torch.from_numpy(run.data.text_item).long()] = 1
    count = int(has.sum())
    codes = SparseRows(cell_bounds(has), torch.arange(count).int(), torch.ones(count), count)
    return library(mean[has > 0], codes)


def direction_library(kind, run, seed):
    """The library of a `rival` of a Run's SAE."""
    settings = dataclasses.replace(run.settings, latents=len(run.intents["vectors"]), seed=seed)
    vectors, codes = rival(kind, run.sae.standardize(run.embeddings), settings)
    text_item = torch.from_numpy(run.data.text_item).long()
    number = torch.arange(len(vectors))
    return library(vectors, item_codes(codes, text_item, len(run.data.items) - 1, number))


def sae_library(kind, run, seed):
    """The library of another SAE -> (tensors, rows of intents.jsonl)."""
    if kind == "seed":
        seed += run.settings.seed + 1
    Model = L1SAE if kind == "l1" else SAE
    sae, support, settings = train_other(run, SAE_CHANGES[kind], seed, Model)
    codes = encode_all(sae, run.embeddings)
    return build_library(sae.W_dec.detach(), codes, support, run.corpus, settings)


def build_rival(kind, run, folder, seed):
    """A library of some kind -> (tensors of intents.safetensors, rows of intents.jsonl or [])."""
    if kind in SAE_CHANGES:
        return sae_library(kind, run, seed)
    if kind in RIVALS:
        return direction_library(kind, run, seed), []
    if kind == "random":  # a name says which texts have the intent, which directions don't change
        return random_library(run, seed), read_intents(folder)
    if kind == "shuffled":
        return shuffled_library(run, seed), []
    return text_library(run, seed), []


# Folders


def identity(settings):
    """What a rival is made by, to know it again: kind, seed, factors, code, the run's intents."""
    own = file_hash(Path(settings.run) / "intents.safetensors")
    made = dict(kind=settings.kind, seed=settings.seed, changes=SAE_CHANGES.get(settings.kind))
    return made | dict(code=[file_hash(path)[:8] for path in CODE], of=own)


def rival_of(out):
    """The `identity` of the rival in a folder, {} where there are no files of intents.

    Raises UserError if the folder is another run.
    """
    made_by = f"studies/rivals.py --out {out}"
    names = ("intents.safetensors", "embeddings.safetensors")
    there = [out / name for name in names if (out / name).is_file()]
    made = artifact_meta(there[0], made_by).get("rival") if there else {}
    if made is None:
        raise UserError(f"{out} is a run of its own: name another folder by --out")
    return made


def link(source, target):
    """Make target another name of the file source, or a copy where that cannot be."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def make_rival(settings):
    """Write the folder of a rival. Raises UserError if something else lies there already."""
    folder = Path(settings.run)
    data = run_dataset(settings.run, settings.data)
    out = Path(settings.out)
    there = rival_of(out).get("kind", settings.kind)
    if there != settings.kind:
        raise UserError(f"{out} holds the intents of --kind {there}: name another folder by --out")
    run = load_run(folder, data, settings.device)
    tensors, rows = build_rival(settings.kind, run, folder, settings.seed)
    source = folder / "embeddings.safetensors"
    path = out / "intents.safetensors"
    save_artifact(path, tensors, settings, data.hash, [source], rival=identity(settings))
    link(source, out / source.name)
    if rows:
        write_rows(out / "intents.jsonl", rows)
    print(f"{out}: {len(tensors['vectors']):,} intents, {len(tensors['indices']):,} codes of items")


def main(argv=None):
    return run_command(argv, __doc__, rival=(RivalSettings, make_rival))


if __name__ == "__main__":
    sys.exit(main())
