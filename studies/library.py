"""What makes a library of intents that another seed finds again, and what it costs.

    python studies/library.py --run runs/scientific                 -> runs/scientific/library.json

Libraries of seeds 0, 1, 2, trained in several ways on the run's embeddings, one change at a time:
    random rows      as Gao et al. 2024: lr 1e-3, 50 passes, one SAE
    k-means rows     starts at centroids of its own, lr 3e-4, 100 passes
    + noise          and reads x with noise
    + average        and is the average of four: the default
and the default with less noise, another learning rate, twice the steps, weights of the encoder that
decay, or fewer active latents. FVU and the names' AUROCs are on held-out texts; agreement is that
of the kept intents of each pair of seeds, beside random directions.
"""

import dataclasses
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import StageSettings, generator, run_command, setting  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

from sae import (  # noqa: E402
    SAE, SaeSettings, build_library, encode_all, load_corpus, measure, resolve, train_sae,
)  # fmt: skip
from studies.interpret import label_scores, stability  # noqa: E402
from studies.significance import write_result  # noqa: E402


class RandomStart(SAE):
    """Keeps the random rows that it was made with."""

    def start(self, x, random):
        """Nothing."""


class Decaying(SAE):
    """Pulls the encoder's rows towards nothing."""

    def loss(self, x, codes, dead, settings):
        loss, reconstruction = super().loss(x, codes, dead, settings)
        return loss + 0.1 * self.W_enc.square().sum(1).mean(), reconstruction


ALONE = dict(members=1, noise=0.0)
WAYS = {  # the SAE, how many times the default's steps, other settings
    "random rows": (RandomStart, 0.5, ALONE | dict(lr=1e-3)),
    "k-means rows": (SAE, 1, ALONE),
    "+ noise": (SAE, 1, dict(members=1)),
    "+ average (default)": (SAE, 1, {}),
    "default, noise 0.75": (SAE, 1, dict(noise=0.75)),
    "default, noise 0": (SAE, 1, dict(noise=0.0)),
    "default, lr 0.001": (SAE, 1, dict(lr=1e-3)),
    "default, lr 0.0001": (SAE, 1, dict(lr=1e-4)),
    "default, twice the steps": (SAE, 2, {}),
    "default, encoder L2 0.1": (Decaying, 1, {}),
    "default, K 6": (SAE, 1, dict(active=6)),
    "default, K 4": (SAE, 1, dict(active=4)),
}


@dataclasses.dataclass(frozen=True)
class LibrarySettings(StageSettings):
    """Compare ways to train the SAE."""

    latents: int = setting(0, "latents M; 0: as sae.py chooses", low=0)
    out: str = setting("", "where to write a copy of RUN/library.json", unit="path")


def train_library(corpus, settings, Model):
    """Train and name a library -> (vectors [J, E], dict of its scores)."""
    sae, support, _ = train_sae(corpus.embeddings, corpus.held_out, settings, Model)
    codes = encode_all(sae, corpus.embeddings)
    tensors, rows = build_library(sae.W_dec.detach(), codes, support, corpus, settings)
    scores = dict(fvu=measure(sae, corpus.embeddings[corpus.held_out])[0], kept=len(rows))
    for key in ("detection_auroc", "permuted_auroc", "meaning_auroc"):
        found = label_scores(rows, key)
        if "median" in found:
            scores |= {f"{key}_median": found["median"], f"{key}_above_08": found["above_08"]}
    return tensors["vectors"], scores


def mean_of(dicts):
    """The means of dicts of floats, of the keys that all have -> dict."""
    keys = [key for key in dicts[0] if all(key in one for one in dicts)]
    return {key: float(np.mean([one[key] for one in dicts])) for key in keys}


def compare(settings):
    """Train libraries in all WAYS by three seeds and write what they are worth."""
    folder = Path(settings.run)
    same = {name: getattr(settings, name) for name in ("run", "data", "device", "latents")}
    base = SaeSettings(**same)
    corpus = load_corpus(folder, base)
    full = resolve(base, corpus)
    rows = []
    for way, (Model, times, changes) in WAYS.items():
        own = dataclasses.replace(full, steps=int(full.steps * times), **changes)
        seeds = [dataclasses.replace(own, seed=settings.seed + n) for n in range(3)]
        vectors, scores = zip(*(train_library(corpus, one, Model) for one in seeds))
        row = dict(way=way, latents=full.latents) | mean_of(scores)
        row |= mean_of([stability(a, b) for a, b in itertools.permutations(vectors, 2)])
        random = generator(settings.seed, "random directions")
        drawn = torch.randn(vectors[0].shape, generator=random)
        row |= {f"floor_{key}": value for key, value in stability(vectors[0], drawn).items()}
        print("  ".join(f"{k} {v:.3f}" if isinstance(v, float) else str(v) for k, v in row.items()))
        rows.append(row)
    write_result(folder, "library", dict(dataset=corpus.data.folder.name, rows=rows), settings.out)


def main(argv=None):
    return run_command(argv, __doc__, library=(LibrarySettings, compare))


if __name__ == "__main__":
    sys.exit(main())
