"""Turn the texts of a dataset into vectors by their words alone: nothing to download.

    python sources/lsa.py --data data/NAME --run runs/NAME      in place of embed.py

texts [N] -> embeddings.safetensors: embeddings (float32 [N, E]), item (int32 [N], 1..V)

TF-IDF and a truncated SVD (latent semantic analysis, Deerwester et al. 1990) by a randomized range
finder (Halko, Martinsson & Tropp 2011). A word's count in a text becomes
    (1 + log tf) * (log((1 + N) / (1 + df)) + 1)        df: the texts that have the word
and the counts of each text are scaled to norm 1 before the SVD.

Letters besides those in saerec.py: W words.
"""

import dataclasses
import sys
import warnings
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import (  # noqa: E402
    StageSettings, UserError, generator, pick_device, run_command, setting,
)  # fmt: skip
from embed import Characters, claim_run, save_embeddings  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

POWER_ITERATIONS = 6
OVERSAMPLING = 16


@dataclasses.dataclass(frozen=True)
class LsaSettings(StageSettings):
    """Write embeddings of words alone into a run folder."""

    data: str = setting("", "dataset folder", unit="path", example="data/ml-100k")
    width: int = setting(128, "width E of the vectors, less if the texts do not allow it", low=2)


def count_words(texts):
    """How often each text has each of its words -> list of Counter [N]; marks are no words."""
    characters = Characters()
    counts = []
    for text in texts:
        tokens = text.translate(characters).split()
        counts.append(Counter(token for token in tokens if token[0].isalnum()))
    return counts


def word_matrix(texts):
    """Weighted counts of words, as this file's docstring says -> sparse COO float64 [N, W].

    Rows have unit norm, or are empty. A word of a single text relates it to no other and is left
    out.
    """
    counts = count_words(texts)
    texts_with = Counter(word for count in counts for word in count)
    words = sorted(word for word, df in texts_with.items() if df > 1)
    index = {word: number for number, word in enumerate(words)}
    rows = []
    columns = []
    frequencies = []
    for row, count in enumerate(counts):
        for word, tf in count.items():
            if word in index:
                rows.append(row)
                columns.append(index[word])
                frequencies.append(tf)
    row = torch.tensor(rows, dtype=torch.int64)
    column = torch.tensor(columns, dtype=torch.int64)
    tf = torch.tensor(frequencies, dtype=torch.float64)
    N = len(texts)
    W = len(words)
    df = torch.bincount(column, minlength=W)
    idf = torch.log((1 + N) / (1 + df)) + 1  # [W]
    value = (1 + tf.log()) * idf[column]
    squares = torch.zeros(N, dtype=torch.float64).index_add(0, row, value.square())
    value /= squares.sqrt()[row]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse ")  # torch trusts our indices, and says so
        return torch.sparse_coo_tensor(torch.stack([row, column]), value, (N, W))


def largest_singular(A, A_t, width, seed):
    """Right singular vectors of the largest singular values, by a sketch of the range of A^T.

    A: sparse CSR float64 [N, W]; A_t: its transpose, likewise -> (V float64 [W, E], S float64 [E]).
    E is width, or less if A has a lower rank.
    """
    N, W = A.shape
    sketch = min(width + OVERSAMPLING, N, W)
    Q = torch.randn(W, sketch, dtype=torch.float64, generator=generator(seed, "lsa")).to(A.device)
    for _ in range(POWER_ITERATIONS):
        # Orthonormal in between, else all columns turn to the first singular vector
        Q = torch.linalg.qr(A_t @ (A @ Q)).Q  # (W, sketch)
    _, S, V_t = torch.linalg.svd(A @ Q, full_matrices=False)
    rank = int((S > 1e-9 * S[:1]).sum())
    rank = min(width, rank)
    return Q @ V_t[:rank].T, S[:rank]


def lsa(texts, width=128, seed=0, device="cpu"):
    """Latent semantic analysis of texts -> float32 [N, E] on the CPU, rows of unit norm.

    E is width, or less if the texts have a lower rank. A text that has nothing in the dimensions
    kept gets zeros. Raises UserError if E would be below 2.
    """
    counts = word_matrix(texts).to(device)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse ")  # torch calls CSR beta
        A = counts.to_sparse_csr()  # (N, W)
        A_t = counts.t().to_sparse_csr()
    N, W = A.shape
    V, S = largest_singular(A, A_t, width, seed)
    rank = len(S)
    if rank < 2:
        problem = f"the {N} text(s) have too few words in common for LSA"
        raise UserError(f"{problem}: bring more, or embed them with embed.py")
    # An SVD leaves signs open: let the weightier words of each dimension be positive
    V *= torch.where(V.pow(3).sum(0) < 0, -1.0, 1.0)
    vectors = A @ V  # (N, E)
    bare = vectors.norm(dim=1) < 1e-3  # of 1 before
    kept = S.square().sum() / A.values().square().sum()
    capped = ""
    if rank < width:
        capped = f" ({width} are more than the texts allow)"
    print(f"lsa: {rank} dimensions{capped} keep {kept:.0%} of the variance of {W:,} words")
    if bare.any():
        print(f"lsa: {int(bare.sum())} text(s) have no word that these dimensions know, get zeros")
    return F.normalize(vectors).masked_fill(bare[:, None], 0).float().cpu()


def embed(settings):
    """Write RUN/embeddings.safetensors. Raises UserError."""
    device = pick_device(settings.device)
    data = claim_run(settings, "sources/lsa.py")
    vectors = lsa(data.texts, settings.width, settings.seed, device)
    save_embeddings(settings, data, vectors, {"name": "lsa"})


def main(argv=None):
    return run_command(argv, __doc__, lsa=(LsaSettings, embed))


if __name__ == "__main__":
    sys.exit(main())
