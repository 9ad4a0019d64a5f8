"""The encoder against other formulations; every way in which weights or embeddings can be wrong.

The golden files hold what sentence-transformers 6.2.0 (transformers 5.23.0, tokenizers 0.23.3) makes
of 44 texts, chosen to be nasty, with the weights that embed.py fetches:
    model = SentenceTransformer("weights/all-MiniLM-L6-v2")
    ids = [model.preprocess([text])["input_ids"][0].tolist() for text in texts]   -> golden_tokens.json
    vectors = model.encode(texts)                                         -> golden_minilm.safetensors
Two of the texts have characters that Unicode added or put into another category after version 8, at
which the tokenizers library stays; these two are not compared.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import embed
import sae
from conftest import SMALL
from saerec import load_artifact, load_dataset

HERE = Path(__file__).resolve().parent
GOLDEN = json.loads((HERE / "golden_tokens.json").read_text("utf-8"))
ADDED_SINCE_UNICODE_8 = "\u0890\u1abf\u2e43\U00010d24"
CHANGED_SINCE_UNICODE_8 = "\u166d\u1734\U000111c9\U0001171e"
SINCE_UNICODE_8 = {*ADDED_SINCE_UNICODE_8, *CHANGED_SINCE_UNICODE_8}
COMPARED = [n for n, row in enumerate(GOLDEN) if not SINCE_UNICODE_8 & set(row["text"])]
absent = not all((embed.MINILM / file).is_file() for file in embed.FILES)
needs_weights = pytest.mark.skipif(absent, reason="the weights are absent: `make test` fetches them")
VOCAB = """[PAD] [UNK] [CLS] [SEP] the play ##er ##s e c ##afe . [ ] sep 中 a thing about space planet
    rocket number i""".split()
CONFIG = dict(
    model_type="bert", hidden_act="gelu", hidden_size=8, num_hidden_layers=2, num_attention_heads=2,
    type_vocab_size=2, intermediate_size=12, vocab_size=len(VOCAB), max_position_embeddings=16,
    layer_norm_eps=1e-5,
)  # fmt: skip


def torch_encoder(random):
    """torch's own encoder of CONFIG's shape with random weights."""
    E = CONFIG["hidden_size"]
    sizes = (CONFIG["num_attention_heads"], CONFIG["intermediate_size"])
    options = dict(dropout=0.0, activation="gelu", layer_norm_eps=1e-5, batch_first=True)
    layer = torch.nn.TransformerEncoderLayer(E, *sizes, **options)
    layers = CONFIG["num_hidden_layers"]
    encoder = torch.nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=random)
    return encoder


def bert_names(encoder):
    """The tensors of torch's encoder under BERT's names -> dict."""
    named = {}
    for number, layer in enumerate(encoder.layers):
        at = f"encoder.layer.{number}."
        parts = {
            "attention.output.dense": layer.self_attn.out_proj,
            "attention.output.LayerNorm": layer.norm1,
            "intermediate.dense": layer.linear1,
            "output.dense": layer.linear2,
            "output.LayerNorm": layer.norm2,
        }
        for kind in ("weight", "bias"):
            named |= {f"{at}{name}.{kind}": getattr(part, kind) for name, part in parts.items()}
            thirds = getattr(layer.self_attn, f"in_proj_{kind}").chunk(3)
            for role, third in zip(("query", "key", "value"), thirds):
                named[f"{at}attention.self.{role}.{kind}"] = third
    return named


def write_weights(folder, config=CONFIG, vocab=VOCAB, prefix="", old=False, drop=(), **tensors):
    """A tiny encoder with random weights -> (its folder, torch's encoder, embedding tensors)."""
    E = CONFIG["hidden_size"]
    random = torch.Generator().manual_seed(3)
    embedding = {}
    for part in ("weight", "bias"):
        embedding[f"embeddings.LayerNorm.{part}"] = torch.rand(E, generator=random) + 0.5
    for name, rows in (("word", len(VOCAB)), ("position", 16), ("token_type", 2)):
        tensor = torch.randn(rows, E, generator=random)
        embedding[f"embeddings.{name}_embeddings.weight"] = tensor
    encoder = torch_encoder(random)
    saved = embedding | bert_names(encoder) | tensors
    saved = {prefix + name: t.detach().clone() for name, t in saved.items() if name not in drop}
    if old:
        new = {"Norm.weight": "Norm.gamma", "Norm.bias": "Norm.beta"}
        for name in list(saved):
            for ours, theirs in new.items():
                if ours in name:
                    saved[name.replace(ours, theirs)] = saved.pop(name)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(vocab) + "\n", "utf-8")
    safetensors.torch.save_file(saved, folder / "model.safetensors")
    return folder, encoder, embedding


# WordPiece


@needs_weights
def test_token_ids_equal_those_of_the_tokenizers_library():
    tokenizer = embed.WordPiece(embed.MINILM)
    compared = [GOLDEN[n] for n in COMPARED]
    wrong = [row["text"] for row in compared if tokenizer(row["text"]) != row["ids"]]
    assert not wrong and len(GOLDEN) == 44 and len(compared) == 42


def test_wordpiece_by_hand(tmp_path):
    folder = write_weights(tmp_path)[0]

    def pieces(text, most=16):
        return " ".join(VOCAB[i] for i in embed.WordPiece(folder, most)(text)[1:-1])

    assert pieces("The PLAYERS.") == "the play ##er ##s ."
    assert pieces("play\u200bers\ttheers") == "play ##er ##s the ##er ##s"  # format characters vanish, a tab is white space
    assert pieces("Café cafe\u0301") == "c ##afe c ##afe"
    assert pieces("c中a") == "c 中 a" and pieces("the[SEP]") == "the [ sep ]"  # special tokens are plain text
    assert pieces("playerz " + "e" * 101 + " e") == "[UNK] [UNK] e"  # one unknown piece makes the word unknown
    assert pieces("the " * 50, most=5) == "the the the" and embed.WordPiece(folder)("") == [2, 3]
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert pieces("The the café") == "[UNK] the [UNK]"
    (folder / "tokenizer_config.json").write_text('{"strip_accents": false, "tokenize_chinese_chars": false}')
    assert pieces("The café c中") == "the [UNK] [UNK]"


# BERT


@needs_weights
def test_vectors_equal_those_of_sentence_transformers():
    golden = safetensors.torch.load_file(HERE / "golden_minilm.safetensors")["embeddings"]
    golden = golden[COMPARED]
    texts = [GOLDEN[n]["text"] for n in COMPARED]
    vectors = embed.encode(texts, *embed.load_encoder(embed.MINILM))
    assert vectors.dtype == torch.float32 and (vectors - golden).abs().max() < 1e-5
    assert ((vectors * golden).sum(1) > 0.99999).all()


def token_vectors(ids, torch_encoder, embedding):
    """What torch's encoder makes of token ids -> [S, E]."""
    words, places, kinds = (embedding[f"embeddings.{name}_embeddings.weight"] for name in ("word", "position", "token_type"))
    weight, bias = (embedding[f"embeddings.LayerNorm.{part}"] for part in ("weight", "bias"))
    x = torch.nn.functional.layer_norm(words[ids] + places[: len(ids)] + kinds[0], (8,), weight, bias, 1e-5)
    return torch_encoder(x[None])[0].detach()


@pytest.mark.parametrize("names", [{}, {"prefix": "bert."}, {"prefix": "bert.", "old": True}])
def test_encoder_equals_torch_transformer(tmp_path, names):
    folder, torch_encoder, embedding = write_weights(tmp_path, **names)
    tokenizer, bert = embed.load_encoder(folder)
    for text in ("", "the", "A thing about players.", "the players " * 9):
        mean = token_vectors(tokenizer(text), torch_encoder, embedding).mean(0)
        torch.testing.assert_close(embed.encode([text], tokenizer, bert)[0], mean / mean.norm(), atol=1e-5, rtol=0)


def test_vectors_do_not_depend_on_batch_mates(tmp_path):
    tokenizer, bert = embed.load_encoder(write_weights(tmp_path)[0])
    texts = ["the player.", "", "space " * 30, "a thing", "about planet rocket number", "i"] * 3
    alone = torch.cat([embed.encode([text], tokenizer, bert) for text in texts])
    sizes = []
    for batch_tokens in (1, 20, 40, 10000):
        sizes.append([])
        spy = lambda ids, lengths: sizes[-1].append(ids.numel()) or bert(ids, lengths)  # noqa: E731
        spy.words = bert.words
        torch.testing.assert_close(embed.encode(texts, tokenizer, spy, batch_tokens), alone, atol=1e-6, rtol=0)
    assert [len(batches) for batches in sizes] == sorted({len(batches) for batches in sizes}, reverse=True)
    assert max(sizes[2]) <= 40 and max(sizes[0]) == 16  # a text longer than a batch goes alone
    short = embed.encode(texts, *embed.load_encoder(tmp_path, max_tokens=8))
    assert not torch.allclose(short[2], alone[2])  # cut at 8 tokens


# What the files of a folder ask for

OLD = "sentence_transformers.models."
TEXTS = ["", "the planet", "A thing about players.", "the players " * 9]


def write_json(path, content):
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def write_published(folder, *modules, pooling=None, at="", start=OLD):
    """A tiny encoder as sentence-transformers lays it out -> as `write_weights` does.

    modules: those after Pooling; pooling: its config.json; at: the path of the Transformer.
    """
    written = write_weights(folder / at)
    rows = [("Transformer", at), ("Pooling", "1_Pooling"), *((name, f"2_{name}") for name in modules)]
    write_json(folder / "modules.json", [{"idx": n, "type": start + kind, "path": path} for n, (kind, path) in enumerate(rows)])
    write_json(folder / "1_Pooling" / "config.json", pooling or {"pooling_mode_mean_tokens": True})
    return folder, *written[1:]


def vectors_of(folder, texts=TEXTS, **options):
    return embed.encode(texts, *embed.load_encoder(folder, **options))


POOLINGS = [  # as old and new releases write it, and what it means
    ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}, "mean"),
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": False}, "cls"),
    ({"word_embedding_dimension": 8, "pooling_mode": "mean", "include_prompt": True}, "mean"),
    ({"word_embedding_dimension": 8, "pooling_mode": "cls", "include_prompt": False}, "cls"),
]


@pytest.mark.parametrize("start", [OLD, "sentence_transformers.base.modules.transformer."])
@pytest.mark.parametrize("pooling, mode", POOLINGS)
def test_pooling_and_norm_by_hand(tmp_path, pooling, mode, start):
    for modules in ([], ["Normalize"]):
        folder, torch_encoder, embedding = write_published(tmp_path, *modules, pooling=pooling, start=start)
        tokenizer, bert = embed.load_encoder(folder)
        for text, vector in zip(TEXTS, vectors_of(folder)):  # of all texts in one batch, with padding
            tokens = token_vectors(tokenizer(text), torch_encoder, embedding)
            expected = tokens[0] if mode == "cls" else tokens.mean(0)
            expected = expected / expected.norm() if modules else expected
            torch.testing.assert_close(vector, expected, atol=1e-5, rtol=0)


def test_a_folder_without_modules_is_a_bare_bert(tmp_path):
    """The mean and the norm, which is how MiniLM's own modules.json has it."""
    bare = vectors_of(write_weights(tmp_path / "bare")[0])
    assert torch.equal(bare, vectors_of(write_published(tmp_path / "full", "Normalize")[0]))
    torch.testing.assert_close(bare.norm(dim=1), torch.ones(len(TEXTS)))


def test_the_default_prompt_stands_before_every_text(tmp_path):
    folder = write_published(tmp_path, pooling={"pooling_mode": "cls", "include_prompt": False})[0]
    plain, asked = vectors_of(folder), vectors_of(folder, ["about: " + text for text in TEXTS])
    config = {"prompts": {"query": "about: ", "document": ""}, "default_prompt_name": None}
    for name, expected in ((None, plain), ("document", plain), ("query", asked)):
        write_json(folder / "config_sentence_transformers.json", config | {"default_prompt_name": name})
        assert torch.equal(vectors_of(folder), expected)
    assert not torch.equal(plain, asked)


def test_the_length_is_the_users_or_the_folders_or_256(tmp_path):
    folder = write_weights(tmp_path, CONFIG | {"max_position_embeddings": 300}, **{"embeddings.position_embeddings.weight": torch.randn(300, 8)})[0]

    def length(**options):
        return len(embed.load_encoder(folder, **options)[0]("the " * 999))

    assert length() == 256
    write_json(folder / "tokenizer_config.json", {"model_max_length": 10**30})  # which says "no limit"
    assert length() == 300  # the positions
    write_json(folder / "tokenizer_config.json", {"model_max_length": 128})
    assert length() == 128
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 200, "do_lower_case": False})
    assert length() == 200 and length(max_tokens=250) == 250 and length(max_tokens=3) == 3


def test_the_transformer_may_lie_in_a_folder_of_its_own(tiny_data, tmp_path):
    flat, nested = (write_published(tmp_path / at, at=at)[0] for at in ("", "0_Transformer"))
    assert torch.equal(vectors_of(flat), vectors_of(nested))
    metas = []
    for _ in range(2):
        argv = ["--data", str(tiny_data), "--run", str(tmp_path / "run"), "--weights", str(nested)]
        assert embed.main(argv) == 0
        metas.append(load_artifact(tmp_path / "run" / "embeddings.safetensors", "")[1]["encoder"])
        (nested / "1_Pooling/config.json").write_text('{"pooling_mode": "cls"}')
    files = ["modules.json", "1_Pooling/config.json", *(f"0_Transformer/{file}" for file in embed.FILES)]
    assert {*files, "name", "pooling", "normalized", "prompt", "max_tokens"} == set(metas[0]) == set(metas[1])
    differ = {key for key in metas[0] if metas[0][key] != metas[1][key]}
    assert differ == {"1_Pooling/config.json", "pooling"} and metas[1]["pooling"] == "cls"
    assert metas[0]["normalized"] is False and metas[0]["max_tokens"] == 16


def test_lower_case_before_the_tokenizer(tmp_path):
    """A whole word: its last sigma has a form of its own, and the accents of a cased tokenizer stay."""
    vocab = [*VOCAB[:-3], "όδος", "οδοσ", "οδος"]
    folder = write_weights(tmp_path, vocab=vocab)[0]

    def pieces(text):
        return " ".join(vocab[i] for i in embed.WordPiece(folder)(text)[1:-1])

    assert pieces("ΟΔΟΣ ΌΔΟΣ The") == "οδοσ οδοσ the"
    write_json(folder / "sentence_bert_config.json", {"do_lower_case": True})
    assert pieces("ΟΔΟΣ ΌΔΟΣ The") == "οδος οδος the"
    write_json(folder / "tokenizer_config.json", {"do_lower_case": False})
    assert pieces("ΟΔΟΣ ΌΔΟΣ The") == "οδος όδος the"


# The command


def test_artifact_of_each_source(tiny_data, tmp_path):
    data, weights = load_dataset(tiny_data), write_weights(tmp_path / "tiny encoder")[0]

    def make(name, *arguments):
        assert embed.main(["--data", str(tiny_data), "--run", str(tmp_path / name), *map(str, arguments)]) == 0
        tensors, meta = load_artifact(tmp_path / name / "embeddings.safetensors", "embed.py", data)
        assert torch.equal(tensors["item"], torch.from_numpy(data.text_item)) and tensors["item"].dtype == torch.int32
        assert tensors["embeddings"].shape[0] == len(data.texts) and tensors["embeddings"].dtype == torch.float32
        return tensors["embeddings"], meta["encoder"]

    vectors, encoder = make("bert", "--weights", weights, "--max-tokens", 16)
    done = dict(name="tiny encoder", pooling="mean", normalized=True, prompt="", max_tokens=16)
    assert done.items() <= encoder.items() and set(encoder) == {*done, *embed.FILES}
    assert torch.equal(vectors, make("again", "--weights", weights, "--max-tokens", 16)[0])
    assert not torch.equal(vectors, make("short", "--weights", weights, "--max-tokens", 4)[0])
    given = torch.randn(len(data.texts), 3).double()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        file = tmp_path / "given.safetensors"
        safetensors.torch.save_file({"embeddings": given.to(dtype), "item": torch.from_numpy(data.text_item).long()}, file)
        assert torch.equal(make("given", "--embeddings", file)[0], given.to(dtype).float())
    assert not (tmp_path / "given" / "vocabulary.safetensors").exists()
    again = make("copy", "--embeddings", tmp_path / "bert/embeddings.safetensors")[0]
    assert torch.equal(again, vectors)  # another run's artifact will do


def test_words_that_may_name_an_intent():
    """Terms of 3 texts, the most frequent first; in one order in every process, whatever its order
    of sets."""
    texts = ["sea boats", "sea boats", "the sea boats in space", "sea wind", "wind, wind"]
    assert embed.name_candidates(texts) == ["sea", "boats", "sea boats"]
    assert embed.name_candidates(texts, most=1) == ["sea"]


def test_words_lie_beside_the_embeddings_that_they_belong_to(tiny_data, tmp_path):
    weights, run = write_weights(tmp_path / "weights")[0], tmp_path / "run"
    argv = ["--data", str(tiny_data), "--run", str(run)]
    assert embed.main([*argv, "--weights", str(weights), "--max-tokens", "16"]) == 0
    tensors, meta = load_artifact(run / "vocabulary.safetensors", "embed.py", load_dataset(tiny_data))
    words = meta["words"]
    assert {"planet", "astronaut"} < {*words} and set(meta["made_from"]) == {"embeddings.safetensors"}
    expected = embed.encode(words, *embed.load_encoder(weights, 16))
    torch.testing.assert_close(tensors["vectors"], expected)
    corpus = sae.load_corpus(run, sae.SaeSettings(run=str(run)))
    assert list(corpus.words) == words and torch.equal(corpus.word_vectors, tensors["vectors"])
    assert sae.main(["--run", str(run), "--device", "cpu", *SMALL["sae"].split()]) == 0
    rows = [json.loads(line) for line in (run / "intents.jsonl").read_text().splitlines()]
    assert all(row["label"].split(", ")[0] in words for row in rows)
    assert any(row["meaning_auroc"] is not None for row in rows)
    given = tmp_path / "given.safetensors"
    safetensors.torch.save_file({"embeddings": torch.randn(len(corpus.embeddings), 3)}, given)
    assert embed.main([*argv, "--embeddings", str(given)]) == 0
    assert not (run / "vocabulary.safetensors").exists()  # of vectors that are no longer there
    assert sae.load_corpus(run, sae.SaeSettings(run=str(run))).words == {}


@pytest.fixture
def refuses(fails, tiny_data, tmp_path):
    """refuses(arguments, *words): the command fails with one sentence and leaves nothing in the run folder."""

    def check(arguments, *words):
        fails(embed.main, ["--data", tiny_data, "--run", tmp_path / "run", *arguments], *words)
        assert not list(tmp_path.glob("run/*")) and not list(tmp_path.rglob("*.tmp"))

    return check


def test_settings_that_do_not_belong_together(refuses):
    for option, value in (("--weights", "x"), ("--max-tokens", 9), ("--batch-tokens", 9)):
        words = f"{option} changes nothing with --embeddings"
        refuses(["--embeddings", "x", option, value], words, "leave one")
    refuses(["--max-tokens", -1], "--max-tokens is -1", "at least 0")


def test_two_processes_embed_what_one_does(tmp_path, tiny_data):
    weights = write_weights(tmp_path)[0]
    flags = ["--data", tiny_data, "--weights", weights, "--device", "cpu", "--max-tokens", "16"]
    script = HERE.parent / "embed.py"
    vectors = []
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"]
    for number, launcher in enumerate([[], torchrun]):
        run = tmp_path / f"run{number}"
        command = [sys.executable, *launcher, script, *flags, "--run", run]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(list(map(str, command)), env=environment, check=True, capture_output=True)
        found, (words, meta) = (load_artifact(run / f"{name}.safetensors", "") for name in ("embeddings", "vocabulary"))
        vectors.append((found[0]["embeddings"], words["vectors"], meta["words"]))
    assert vectors[0][2] == vectors[1][2]
    for one, two in zip(vectors[0][:2], vectors[1][:2]):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0)


WRONG_CONFIGS = [
    ({"model_type": "gpt2"}, "model_type is 'gpt2'"),
    ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ({"position_embedding_type": "relative_key"}, "position_embedding_type"),
    ({"hidden_size": None}, "hidden_size is None"),
    ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
    ({"num_attention_heads": 3}, "no multiple of num_attention_heads"),
    ({"hidden_size": 16}, f"word_embeddings.weight is [{len(VOCAB)}, 8], config.json asks for [{len(VOCAB)}, 16]"),
    ({"num_hidden_layers": 3}, "encoder.layer.2.attention.self.query.weight is missing"),
]


def test_wrong_weights(refuses, tmp_path):
    weights, arguments = tmp_path / "weights", ["--max-tokens", 16, "--weights", tmp_path / "weights"]
    refuses(arguments, weights, "has no model.safetensors")
    for file in embed.FILES:
        write_weights(weights)
        (weights / file).unlink()
        refuses(arguments, f"{weights} has no {file}", "give one with")
    for change, words in WRONG_CONFIGS:
        write_weights(weights, CONFIG | change)
        refuses(arguments, words, weights)
    write_weights(weights)
    for text, words in (("{", "is not JSON"), ("[1]", "is not a JSON object")):
        (weights / "config.json").write_text(text)
        refuses(arguments, weights / "config.json", words)
    for token in VOCAB[:4]:
        write_weights(weights, vocab=[t for t in VOCAB if t != token])
        refuses(arguments, weights / "vocab.txt", f"lacks the token '{token}'")
    write_weights(weights, vocab=[*VOCAB, "more"])
    refuses(arguments, "vocab.txt has more tokens than")
    (weights / "vocab.txt").write_bytes(b"caf\xe9")
    refuses(arguments, "vocab.txt is not valid UTF-8", "position 3")
    write_weights(weights, drop=["embeddings.LayerNorm.bias"])
    refuses(arguments, "embeddings.LayerNorm.bias is missing")
    write_weights(weights, **{"embeddings.LayerNorm.bias": torch.full((8,), torch.nan)})
    refuses(arguments, "embeddings.LayerNorm.bias has values that are not finite")
    write_weights(weights)
    for wrong in (1, 2, 17):
        refuses([*arguments, "--max-tokens", wrong], f"3 to 16 tokens, but they would be cut at {wrong}")
    for size in (0, 5, 2000):
        (weights / "model.safetensors").write_bytes((weights / "model.safetensors").read_bytes()[:size])
        refuses(arguments, "model.safetensors is truncated or no safetensors file")
        write_weights(weights)


def test_wrong_embeddings(refuses, tiny_data, tmp_path):
    data, path = load_dataset(tiny_data), tmp_path / "given.safetensors"
    N, item = len(data.texts), torch.from_numpy(data.text_item)
    good = torch.randn(N, 4)

    def given(words, **tensors):
        safetensors.torch.save_file(tensors, path)
        refuses(["--embeddings", path], path, *words)

    def changed(tensor, row, value):
        tensor = tensor.clone()
        tensor[row] = value
        return tensor

    name = repr(data.items[item[2]])
    refuses(["--embeddings", path], path, "is not a file")
    given(["has no tensor `embeddings`, but item, vectors"], vectors=good, item=item)
    given([f"has {N - 1} rows, but {data.folder} {N} texts"], embeddings=good[1:].clone())
    given([f"[{4 * N}]"], embeddings=good.flatten())
    given(["width 2 or more"], embeddings=good[:, :1].clone())
    given(["torch.int64"], embeddings=good.long())
    broken = changed(changed(good, 2, torch.nan), 5, torch.inf)
    given([f"row 3 (item {name}) holds", "not finite", "2 row(s)"], embeddings=broken)
    given(["row 3", "not finite"], embeddings=changed(good.double(), 2, 1e300))  # beyond float32
    for other in (changed(item, 2, 999), item.flip(0), torch.arange(N + 1)):
        given([f"`item` is not what the texts of {data.folder} are about"], embeddings=good, item=other)
    for size in (0, 5, 100):
        safetensors.torch.save_file({"embeddings": good}, path)
        path.write_bytes(path.read_bytes()[:size])
        refuses(["--embeddings", path], path, "truncated or no safetensors file")


PIPELINE = {
    "normalizer": {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None, "lowercase": True},
    "pre_tokenizer": {"type": "BertPreTokenizer"},
    "model": {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##", "vocab": {t: n for n, t in enumerate(VOCAB)}},
    "added_tokens": [{"id": 0, "content": "[PAD]"}, {"id": 2, "content": "[CLS]"}],
}


def pipeline(step, **changed):
    return PIPELINE | {step: PIPELINE[step] | changed}


QUERY = {"prompts": {"query": "about: "}, "default_prompt_name": "query"}
NOT_DONE = [  # a file of the folder, what it holds, words of the refusal
    ("modules.json", {}, ["not a JSON list"]),
    ("modules.json", [{"type": OLD + "Transformer", "path": ""}, {"type": OLD + "Pooling"}], ["asks for Transformer;"]),
    ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False}, ["pooling_mode is ''"]),
    ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False, "pooling_mode_max_tokens": True}, ["pooling_mode is 'max'"]),
    ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False, "pooling_mode_mean_sqrt_len_tokens": True}, ["'mean_sqrt_len'"]),
    ("1_Pooling/config.json", {"pooling_mode_mean_tokens": False, "pooling_mode_weightedmean_tokens": True}, ["'weightedmean'"]),
    ("1_Pooling/config.json", {"pooling_mode_cls_token": True}, ["pooling_mode is 'mean + cls'"]),  # the mean is on by default
    ("1_Pooling/config.json", {"pooling_mode": "lasttoken"}, ["pooling_mode is 'lasttoken'"]),
    ("config_sentence_transformers.json", {"prompts": {"a": "b"}, "default_prompt_name": "query"}, ["lacks 'query'"]),
    ("config_sentence_transformers.json", {"prompts": {"query": 1}, "default_prompt_name": "query"}, ["lacks 'query'"]),
    ("config.json", CONFIG | {"is_decoder": True}, ["is_decoder is True"]),
    ("sentence_bert_config.json", {"model_args": {"torch_dtype": "float16"}}, ["model_args is {'torch_dtype'"]),
    ("tokenizer_config.json", {"tokenizer_class": "BertJapaneseTokenizer"}, ["tokenizer_class is 'BertJapaneseTokenizer'"]),
    ("tokenizer_config.json", {"tokenizer_class": "MPNetTokenizer"}, ["tokenizer_class is 'MPNetTokenizer'"]),
    ("tokenizer_config.json", {"do_basic_tokenize": False}, ["do_basic_tokenize is False"]),
    ("tokenizer_config.json", {"never_split": ["c++"]}, ["never_split is ['c++'], not empty"]),
    ("tokenizer_config.json", {"padding_side": "left"}, ["padding_side is 'left'"]),
    ("tokenizer_config.json", {"unk_token": "<unk>"}, ["unk_token is '<unk>'"]),
    ("special_tokens_map.json", {"cls_token": {"content": "<s>", "lstrip": False}}, ["cls_token is '<s>', not '[CLS]'"]),
    ("tokenizer_config.json", {"added_tokens_decoder": {"30": {"content": "[Q]"}}}, ["adds the token '[Q]'"]),
    ("added_tokens.json", {"[ENT]": 30}, ["adds the token '[ENT]'"]),
    ("tokenizer.json", PIPELINE | {"added_tokens": [{"content": "[D]"}]}, ["adds the token '[D]'"]),
    ("tokenizer.json", pipeline("normalizer", lowercase=False), ["normalizer: lowercase is False, not True"]),
    ("tokenizer.json", pipeline("normalizer", strip_accents=False), ["normalizer: strip_accents is False, not True"]),
    ("tokenizer.json", pipeline("normalizer", handle_chinese_chars=False), ["handle_chinese_chars is False, not True"]),
    ("tokenizer.json", pipeline("normalizer", type="Lowercase"), ["normalizer: type is 'Lowercase'"]),
    ("tokenizer.json", pipeline("pre_tokenizer", type="Metaspace"), ["pre_tokenizer: type is 'Metaspace'"]),
    ("tokenizer.json", pipeline("model", continuing_subword_prefix="@@"), ["continuing_subword_prefix is '@@'"]),
    ("tokenizer.json", pipeline("model", vocab={"[PAD]": 0}), ["has other tokens than vocab.txt"]),
    ("adapter_config.json", {"peft_type": "LORA"}, ["asks for an adapter", "merge it"]),
]


@pytest.mark.parametrize("file, content, words", NOT_DONE)
def test_what_is_asked_for_and_not_done_is_refused_by_name(refuses, tmp_path, file, content, words):
    folder = write_published(tmp_path / "weights", "Normalize")[0]
    write_json(folder / file, content)
    place = folder if "adds the token" in words[0] else folder / file
    refuses(["--weights", folder], place, *words)


def test_what_is_done_is_not_refused(tmp_path):
    """As published folders have it: tokens with their options, null and empty values."""
    folder = write_published(tmp_path, "Normalize")[0]
    vectors = vectors_of(folder)
    token = {"content": "[UNK]", "lstrip": False, "normalized": False}
    config = {"tokenizer_class": "DistilBertTokenizerFast", "never_split": None, "unk_token": token, "strip_accents": None}
    write_json(folder / "tokenizer_config.json", config | {"added_tokens_decoder": {"1": token}})
    write_json(folder / "special_tokens_map.json", {"cls_token": "[CLS]", "mask_token": "[MASK]"})
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": None, "model_args": {}})
    write_json(folder / "tokenizer.json", PIPELINE)
    assert torch.equal(vectors_of(folder), vectors)


def test_modules_that_are_not_done(refuses, tmp_path):
    folder = tmp_path / "weights"
    for module in ("Dense", "LayerNorm", "WordWeights"):
        write_published(folder, module)
        refuses(["--weights", folder], folder / "modules.json", f"asks for Transformer, Pooling, {module}")
    (folder / "modules.json").unlink()
    refuses(["--weights", folder], folder / "1_Pooling", "no modules.json beside it")
    write_published(folder)
    (folder / "1_Pooling" / "config.json").unlink()
    refuses(["--weights", folder], folder / "1_Pooling" / "config.json", "is missing")


def test_a_prompt_that_the_mean_leaves_out(refuses, tmp_path):
    folder = write_published(tmp_path / "weights", pooling={"pooling_mode": "mean", "include_prompt": False})[0]
    vectors_of(folder)  # there is no prompt
    write_json(folder / "config_sentence_transformers.json", QUERY)
    refuses(["--weights", folder], folder / "1_Pooling" / "config.json", "include_prompt is False")


def test_weights_of_another_kind(refuses, tmp_path):
    folder = write_weights(tmp_path / "weights")[0]
    (folder / "model.safetensors").unlink()
    (folder / "onnx").mkdir()
    refuses(["--weights", folder], "has no model.safetensors, but onnx", "convert it")
    for name in ("pytorch_model.bin", "model.safetensors.index.json"):
        (folder / name).touch()
        refuses(["--weights", folder], f"has no model.safetensors, but {name}", "convert it")
