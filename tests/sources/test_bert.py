"""Another BERT: what its folder asks for is done, or refused by name."""

import json
from pathlib import Path

import pytest
import torch

import embed
from conftest import two_processes
from saerec import load_artifact
from sources import bert
from test_embed import CONFIG, VOCAB, needs_weights, refusal, token_vectors, write_weights

HERE = Path(__file__).resolve().parent


# The same as embed.py where it is asked for no other


@needs_weights
def test_minilm_gives_what_embed_py_makes_of_it():
    texts = ["", "The PLAYERS.", "Café 中a", "a thing about players " * 99]
    own = bert.load_encoder(embed.MINILM)
    assert own[0].most == 256
    expected = embed.encode(texts, *embed.load_encoder(embed.MINILM))
    assert torch.equal(embed.encode(texts, *own), expected)


@pytest.mark.parametrize("names", [{"prefix": "bert."}, {"prefix": "bert.", "old": True}])
def test_old_names_of_tensors(tmp_path, names):
    folders = [write_weights(tmp_path / "new")[0], write_weights(tmp_path / "old", **names)[0]]
    new, old = (embed.encode(["the player."], *bert.load_encoder(folder)) for folder in folders)
    assert torch.equal(new, old)


def test_a_cased_tokenizer(tmp_path):
    folder = write_weights(tmp_path)[0]

    def pieces(text):
        return " ".join(VOCAB[i] for i in bert.FolderWordPiece(folder)(text)[1:-1])

    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert pieces("The the café") == "[UNK] the [UNK]"
    (folder / "tokenizer_config.json").write_text('{"strip_accents": false, "tokenize_chinese_chars": false}')
    assert pieces("The café c中") == "the [UNK] [UNK]"


# What the files of a folder ask for

OLD = "sentence_transformers.models."
NEW = "sentence_transformers.base.modules.transformer."
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
    return embed.encode(texts, *bert.load_encoder(folder, **options))


POOLINGS = [  # as old and new releases write it, and what it means
    ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}, "mean"),
    ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": False}, "cls"),
    ({"word_embedding_dimension": 8, "pooling_mode": "mean", "include_prompt": True}, "mean"),
    ({"word_embedding_dimension": 8, "pooling_mode": "cls", "include_prompt": False}, "cls"),
]


@pytest.mark.parametrize("pooling, mode, start", [(*one, OLD) for one in POOLINGS] + [(*POOLINGS[2], NEW)])
def test_pooling_and_norm_by_hand(tmp_path, pooling, mode, start):
    for modules in ([], ["Normalize"]):
        folder, torch_encoder, embedding = write_published(tmp_path, *modules, pooling=pooling, start=start)
        tokenizer = bert.load_encoder(folder)[0]
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
        return len(bert.load_encoder(folder, **options)[0]("the " * 999))

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
        assert bert.main(argv) == 0
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
        return " ".join(vocab[i] for i in bert.FolderWordPiece(folder)(text)[1:-1])

    assert pieces("ΟΔΟΣ ΌΔΟΣ The") == "οδοσ οδοσ the"
    write_json(folder / "sentence_bert_config.json", {"do_lower_case": True})
    assert pieces("ΟΔΟΣ ΌΔΟΣ The") == "οδος οδος the"
    write_json(folder / "tokenizer_config.json", {"do_lower_case": False})
    assert pieces("ΟΔΟΣ ΌΔΟΣ The") == "οδος όδος the"


# The command


@pytest.fixture
def refuses(fails, tiny_data, tmp_path):
    return refusal(bert.main, fails, tiny_data, tmp_path)


def test_two_processes_embed_what_one_does(tmp_path, tiny_data):
    weights = write_weights(tmp_path)[0]
    flags = ["--data", tiny_data, "--weights", weights, "--device", "cpu", "--max-tokens", "16"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert bert.main([*map(str, flags), "--run", str(one)]) == 0
    two_processes("sources/bert.py", *flags, "--run", two)
    vectors = []
    for run in (one, two):
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
    refuses([], "--weights is missing", "FOLDER")
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
    ("tokenizer.json", {"normalizer": {}}, ["has other tokens than vocab.txt"]),
    ("tokenizer.json", {"model": ["WordPiece"]}, ["model is ['WordPiece'], not of type dict"]),
    ("tokenizer.json", PIPELINE | {"added_tokens": ["[D]"]}, ["adds the token '[D]'"]),
    ("tokenizer_config.json", {"do_lower_case": "no"}, ["do_lower_case is 'no', not of type bool"]),
    ("tokenizer_config.json", {"model_max_length": 12.0}, ["model_max_length is 12.0, not of type int"]),
    ("sentence_bert_config.json", {"max_seq_length": "16"}, ["max_seq_length is '16', not of type int"]),
    ("config.json", CONFIG | {"layer_norm_eps": "small"}, ["layer_norm_eps is 'small', not of type float"]),
    ("config.json", CONFIG | {"type_vocab_size": "2"}, ["type_vocab_size is '2', not of type int"]),
    ("config_sentence_transformers.json", {"prompts": ["a"]}, ["prompts is ['a'], not of type dict"]),
    ("config_sentence_transformers.json", {"default_prompt_name": 1}, ["default_prompt_name is 1"]),
    ("modules.json", [1, {"type": None, "path": ""}], ["asks for nothing"]),
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
    write_json(folder / "tokenizer.json", PIPELINE | {"added_tokens": None})
    write_json(folder / "config.json", CONFIG | {"type_vocab_size": None})
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
