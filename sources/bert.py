"""Turn the texts of a dataset into vectors by a BERT of your own, in place of embed.py's MiniLM.

    python sources/bert.py --weights FOLDER --data data/NAME --run runs/NAME
    make all DATA=data/NAME EMBED=sources/bert.py EMBED_FLAGS="--weights FOLDER"

texts [N] -> embeddings.safetensors, vocabulary.safetensors, as embed.py writes them

What a FOLDER as sentence-transformers writes it asks for is done (the vector of [CLS] in place of
the mean, no norm, a prompt, a length) or refused by name; a bare BERT gets the mean and the norm.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import (  # noqa: E402
    UserError, file_hash, join_processes, pick_device, run_command, setting,
)  # fmt: skip
from embed import (  # noqa: E402
    FILES, IDEOGRAPHS, Bert, Characters, WordPiece, claim_run, encode_run, mean_over, read_tensors,
    strip_accents,
)  # fmt: skip

import torch.nn.functional as F  # noqa: E402


@dataclasses.dataclass(frozen=True)
class BertSettings:
    """Those of embed.py, but the weights are given and say themselves how long a text may be."""

    weights: str = setting("", "encoder's folder", unit="path", example="FOLDER")
    run: str = setting("", "run folder", unit="path", example="runs/ml-100k")
    device: str = setting("auto", "auto: a GPU if it is there", choices=("auto", "cpu", "cuda"))
    data: str = setting("", "dataset folder", unit="path", example="data/ml-100k")
    max_tokens: int = setting(0, "cut longer texts; 0: as the encoder says", unit="tokens", low=0)
    batch_tokens: int = setting(1024, "a batch; a GPU may want more", unit="tokens", low=1)


# What an encoder's files ask for

SIZES = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
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


def value_of(path, asked, key, default):
    """What a file's dict says for a key, or the default where that is absent or null.

    Raises UserError if it is not of the default's type.
    """
    found = asked.get(key)
    if found is None:
        return default
    if type(found) is not type(default):
        kind = type(default).__name__
        raise UserError(f"{path}: {key} is {found!r}, not of type {kind}: copy it again")
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
    name = value_of(path, asked, "default_prompt_name", "")
    prompt = {"": "", **value_of(path, asked, "prompts", {})}.get(name)
    if type(prompt) is not str:
        raise UserError(f"{path}: `prompts` lacks {name!r}, the default: add it, or make that null")
    done = dict(prompt=prompt, pooling="mean", normalized=True)
    path = folder / "modules.json"
    if not path.is_file():
        parts = sorted(folder.glob("[0-9]_*"))
        if parts:
            raise UserError(f"{parts[0]} is there, but no modules.json beside it: copy it, too")
        return folder, done
    modules = [m for m in read_json(path, list) if type(m) is dict]
    modules = [m for m in modules if type(m.get("type")) is type(m.get("path")) is str]
    kinds = [module["type"].split(".")[-1] for module in modules]
    if kinds not in (MODULES[:2], MODULES):
        asked_for = ", ".join(kinds) or "nothing"
        problem = f"{path} asks for {asked_for}; done is {', '.join(MODULES)} at most"
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


# The tokenizer and the encoder


class FolderCharacters(Characters):
    """Characters as tokenizers of BERTs treat them; strip: None for what `lower` is."""

    def __init__(self, lower, strip, split_ideographs):
        self.lower = lower
        self.strip = lower if strip is None else strip
        self.split_ideographs = split_ideographs

    def fold(self, text):
        if self.strip:
            text = strip_accents(text)
        return text.lower() if self.lower else text

    def is_apart(self, character):
        kept = not self.split_ideographs and IDEOGRAPHS.match(character)
        return not kept and super().is_apart(character)


class FolderWordPiece(WordPiece):
    """WordPiece as the files of a folder ask for it."""

    def __init__(self, folder, most=256, prompt=""):
        """Read vocab.txt, a token per line, and what other files there say. Raises UserError.

        A text, behind the prompt, is cut at the most tokens, [CLS] and [SEP] included.
        """
        path = folder / "vocab.txt"
        try:
            super().__init__(path.read_text("utf-8").removesuffix("\n").split("\n"), most)
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not valid UTF-8 ({error}): copy it again") from error
        except KeyError as error:
            raise UserError(f"{path} lacks the token {error}: give a BERT encoder") from error
        self.prompt = prompt
        path = folder / "sentence_bert_config.json"
        self.lower_first = value_of(path, read_json(path), "do_lower_case", False)
        path = folder / "tokenizer_config.json"
        options = read_json(path)
        lower = value_of(path, options, "do_lower_case", True)
        strip = value_of(path, options, "strip_accents", lower)
        ideographs = value_of(path, options, "tokenize_chinese_chars", True)
        self.characters = FolderCharacters(lower, strip, ideographs)
        added = value_of(path, options, "added_tokens_decoder", {})
        self.check(folder / "tokenizer.json", [*added.values()])

    def check(self, path, added):
        """Refuse a tokenizer.json that says otherwise, and added tokens. Raises UserError."""
        asked = read_json(path)
        own = self.characters
        steps = dict(
            normalizer=dict(
                type=["BertNormalizer"], clean_text=[True], lowercase=[own.lower],
                strip_accents=[own.strip], handle_chinese_chars=[own.split_ideographs],
            ),
            pre_tokenizer=dict(type=["BertPreTokenizer"]),
            model=dict(type=["WordPiece"], continuing_subword_prefix=["##"], unk_token=["[UNK]"]),
        )  # fmt: skip
        for step, done in steps.items():
            check_asked(f"{path}: {step}", value_of(path, asked, step, {}), done)
        if asked and value_of(path, asked, "model", {}).get("vocab") != self.vocab:
            raise UserError(f"{path} has other tokens than vocab.txt: give files of one encoder")
        rows = [*added, *value_of(path, asked, "added_tokens", [])]
        tokens = [row.get("content") if type(row) is dict else row for row in rows]
        for token in [*tokens, *read_json(path.with_name("added_tokens.json"))]:
            if token not in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"):
                problem = f"the tokenizer in {path.parent} adds the token {token!r}"
                raise UserError(f"{problem}: give another encoder")

    def __call__(self, text):
        text = self.prompt + text
        # Here it is a whole text, of which lower() knows each word's last sigma
        return super().__call__(text.lower() if self.lower_first else text)


class FolderBert(Bert):
    """BERT whose vectors are those of [CLS] or the mean, at norm 1 or not, as a folder asks."""

    def __init__(self, folder, device="cpu", pooling="mean", normalized=True):
        """Read config.json and model.safetensors of a folder. Raises UserError."""
        self.pooling = pooling
        self.normalized = normalized
        config = read_config(folder / "config.json")
        tensors = read_weights(folder / "model.safetensors", config)
        eps = value_of(folder / "config.json", config, "layer_norm_eps", 1e-12)
        super().__init__(tensors, config["num_attention_heads"], eps, device)

    def pool(self, x, real):
        pooled = x[:, 0] if self.pooling == "cls" else mean_over(x, real)
        return F.normalize(pooled, dim=1) if self.normalized else pooled  # (B, E)


def read_config(path):
    """A BERT's config.json -> dict. Raises UserError."""
    config = read_json(path)
    for key in SIZES:
        size = config.get(key)
        if type(size) is not int or size < 1:
            raise UserError(f"{path}: {key} is {size!r}, not 1 or more: give a BERT encoder")
    if config["hidden_size"] % config["num_attention_heads"]:
        raise UserError(f"{path}: hidden_size is no multiple of num_attention_heads: copy it again")
    return config | dict(type_vocab_size=value_of(path, config, "type_vocab_size", 2))


def read_weights(path, config):
    """The tensors of a BERT's model.safetensors by their present names -> dict.

    Raises UserError for one that is missing, not finite, or not what config.json says.
    """
    found = {}
    for name, tensor in read_tensors(path).items():
        name = name.removeprefix("bert.")
        name = name.replace("Norm.gamma", "Norm.weight")  # as old files have it
        name = name.replace("Norm.beta", "Norm.bias")
        found[name] = tensor
    shapes = tensor_shapes(config)
    for name, shape in shapes.items():
        where = f"{path}: tensor {name}"
        has = list(found[name].shape) if name in found else "missing"
        if has != shape:
            problem = f"{where} is {has}, config.json asks for {shape}"
            raise UserError(f"{problem}: give files that belong together")
        if not found[name].isfinite().all():
            raise UserError(f"{where} has values that are not finite: copy the file again")
    return {name: found[name] for name in shapes}


def tensor_shapes(config):
    """What a BERT of that config.json consists of -> {name: shape}."""
    E, layers, _, wide, tokens, positions = (config[key] for key in SIZES)
    shapes = {
        "embeddings.word_embeddings.weight": [tokens, E],
        "embeddings.token_type_embeddings.weight": [config["type_vocab_size"], E],
        "embeddings.position_embeddings.weight": [positions, E],
    }
    norms = ["embeddings.LayerNorm"]
    products = {}
    for at in (f"encoder.layer.{n}." for n in range(layers)):
        norms += [at + "attention.output.LayerNorm", at + "output.LayerNorm"]
        products |= {f"{at}attention.self.{role}": [E, E] for role in ("query", "key", "value")}
        products[at + "attention.output.dense"] = [E, E]
        products[at + "intermediate.dense"] = [wide, E]
        products[at + "output.dense"] = [E, wide]
    for name, shape in products.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": [E], f"{name}.bias": [E]}
    return shapes


def load_encoder(folder, max_tokens=0, device="cpu"):
    """The encoder of a folder, as its files say -> (FolderWordPiece, FolderBert); UserError."""
    folder, done = read_layout(Path(folder))
    check_files(folder)
    bert = FolderBert(folder, device, done["pooling"], done["normalized"])
    places = len(bert.places)
    path = folder / "sentence_bert_config.json"
    most = value_of(path, read_json(path), "max_seq_length", 0)
    path = folder / "tokenizer_config.json"
    most = most or value_of(path, read_json(path), "model_max_length", 256)
    most = max_tokens or min(most, places)
    if not 3 <= most <= places:
        problem = f"{folder} takes texts of 3 to {places} tokens, but they would be cut at {most}"
        raise UserError(f"{problem}: give another --max-tokens")
    tokenizer = FolderWordPiece(folder, most, done["prompt"])
    if max(tokenizer.vocab.values()) >= len(bert.words):
        raise UserError(f"{folder}/vocab.txt has more tokens than config.json: copy both again")
    return tokenizer, bert


# The command


def embed(settings):
    """Write RUN/embeddings.safetensors and vocabulary.safetensors. Raises UserError."""
    join_processes()
    data = claim_run(settings, "sources/bert.py")
    folder = Path(settings.weights)
    tokenizer, bert = load_encoder(folder, settings.max_tokens, pick_device(settings.device))
    files = [file for file in folder.rglob("*") if file.suffix == ".json" or file.name in FILES]
    made_by = {file.relative_to(folder).as_posix(): file_hash(file) for file in files}
    made_by |= dict(name=folder.resolve().name, prompt=tokenizer.prompt)
    made_by |= dict(pooling=bert.pooling, normalized=bert.normalized)
    encode_run(settings, data, tokenizer, bert, made_by)


def main(argv=None):
    return run_command(argv, __doc__, embed=(BertSettings, embed))


if __name__ == "__main__":
    sys.exit(main())
