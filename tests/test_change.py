"""What README's "Change it" shows: a few lines each, and every stage still runs."""

import json

import pytest
import safetensors.torch
import torch

import embed
import eval as evaluation
import model
import sae
import saerec
from conftest import copy_run, make_run


def metrics_of(run, stages="sae sasrec saerec grounded eval"):
    make_run(None, run, stages=stages)
    metrics = json.loads((run / "metrics.json").read_text())["models"]
    assert 0 < metrics["grounded"]["NDCG@20"] <= 1
    return metrics


def test_another_encoder(tmp_path, tiny_data):
    """Vectors from anywhere: here the counts of ten words."""
    words = "space rocket planet cooking recipe oven music guitar melody concert".split()
    texts = saerec.load_dataset(tiny_data).texts
    counts = [[text.lower().count(word) for word in words] for text in texts]
    file = tmp_path / "mine.safetensors"
    safetensors.torch.save_file({"embeddings": torch.tensor(counts).float()}, file)
    run = tmp_path / "run"
    argv = ["--data", tiny_data, "--run", run, "--embeddings", file]
    assert embed.main(list(map(str, argv))) == 0
    metrics_of(run)


class BatchTopK(sae.SAE):
    """BatchTopK (Bussmann et al. 2024): a text may have more latents than another.

    In training the K x B largest of a batch stay, and the smallest of them moves a threshold; at
    inference the threshold decides, so that a code does not depend on batch mates. A text has 4 K
    latents at most.
    """

    def __init__(self, latents, active, width, seed=0):
        super().__init__(latents, active, width, seed)
        self.register_buffer("threshold", torch.zeros(()))

    def encode(self, x):
        K = int(self.active)
        pre = ((x - self.b_dec) @ self.W_enc.T + self.b_enc).relu()  # (B, M)
        values, latents = pre.topk(min(4 * K, pre.shape[1]))  # (B, at most 4 K)
        if self.training:
            smallest = values.detach().flatten().topk(min(len(x) * K, values.numel())).values[-1]
            self.threshold.lerp_(smallest, 0.1)
            return sae.Codes(values * (values >= smallest), latents)
        return sae.Codes(values * (values >= self.threshold), latents)


def test_another_sae(tmp_path, tiny_run):
    run = copy_run(tiny_run, tmp_path / "run", "embeddings.safetensors")
    small = dict(latents=16, active=3, steps=50, batch=16, members=2, min_items=2)
    sae.train(sae.SaeSettings(run=str(run), device="cpu", **small), BatchTopK)
    metrics_of(run, "sasrec saerec grounded eval")
    tensors = saerec.load_artifact(run / "sae.safetensors", "")[0]
    assert tensors["threshold"] > 0  # the file says how to encode


def test_batch_topk_encodes_a_text_alike_whatever_its_batch_mates():
    torch.manual_seed(0)
    x = torch.randn(50, 6)
    net = BatchTopK(16, 3, 6)
    for _ in range(50):
        in_training = net.encode(x)
    net.eval()
    together = net.encode(x)
    alone = [net.encode(row[None]) for row in x]
    torch.testing.assert_close(together.values, torch.cat([codes.values for codes in alone]))
    count = (together.values > 0).sum(1)
    assert count.min() < count.max() and 1 < count.float().mean() < 6  # about K = 3, and not each
    assert (in_training.values > 0).sum() == 50 * 3


class Averages(torch.nn.Module):
    """A trunk without attention: a position adds a projection of the mean of all up to it."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.project = torch.nn.Linear(width, width)

    def forward(self, x):
        count = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return x + self.project(x.cumsum(1) / count)  # (B, T, D), position t sees up to t


def test_another_trunk(tmp_path, tiny_run, monkeypatch):
    monkeypatch.setattr(model, "SelfAttention", Averages)
    run = copy_run(tiny_run, tmp_path / "run", "[ei]*")
    (run / "sae.safetensors").write_bytes((tiny_run / "sae.safetensors").read_bytes())
    metrics = metrics_of(run, "sasrec saerec grounded eval")
    assert metrics != json.loads((tiny_run / "metrics.json").read_text())["models"]


class Squared(model.Grounded):
    """A variant of a model is a subclass: here the match takes the square of r."""

    def match_weights(self, r):
        return super().match_weights(r).square()


def test_another_model(tmp_path, tiny_run, monkeypatch):
    """Once in MODELS it is trained, ranked and explained as the others are."""
    monkeypatch.setitem(model.MODELS, "squared", Squared)
    run = copy_run(tiny_run, tmp_path / "run")
    argv = ["--run", run, "--device", "cpu"]
    assert model.main([*map(str, argv), "--model", "squared", "--epochs", "2"]) == 0
    assert evaluation.main([*map(str, argv)]) == 0
    metrics = json.loads((run / "metrics.json").read_text())["models"]
    assert metrics["squared"] != metrics["grounded"]
    data = saerec.run_dataset(run)
    net = evaluation.load_model(run, "squared", data)
    history = data.history(0, "test")
    state = evaluation.history_state(net, history)
    for _, score, reasons in evaluation.recommend(net, state, history, 5):
        assert sum(reasons.parts.values()) + reasons.terms.sum() == pytest.approx(score, abs=1e-4)


class Weighted(model.Grounded):
    """A parameter in the match, which the loss takes as given: it would stay what it was."""

    def add_parameters(self, data, intents):
        super().add_parameters(data, intents)
        self.weight = torch.nn.Parameter(torch.ones(len(intents.vectors)))

    def match_weights(self, r):
        return self.weight * super().match_weights(r)


def test_a_parameter_that_no_gradient_reaches_is_not_passed_over(tiny_run):
    data = saerec.run_dataset(tiny_run)
    settings = model.ModelSettings(run=str(tiny_run), width=8, epochs=1, device="cpu")
    with pytest.raises(RuntimeError, match="no gradient reaches weight: train it by a loss"):
        model.train_model(model.new_model(Weighted, settings, data), data)


def test_another_model_keeps_its_base_settings(monkeypatch):
    """A subclass in MODELS takes what only its base has: --match is Grounded's alone."""
    monkeypatch.setitem(model.MODELS, "squared", Squared)
    model.check_model(model.ModelSettings(model="squared", match=1.0))
    with pytest.raises(saerec.UserError, match="--public changes nothing without --model saerec"):
        model.check_model(model.ModelSettings(model="squared", public=3))


def test_other_data(tmp_path):
    """Two plain files are a dataset."""
    folder = tmp_path / "mine"
    folder.mkdir()
    with open(folder / "sequences.txt", "w") as file:
        for u in range(20):
            file.write(f"reader{u} " + " ".join(f"b{(u + 2 * n) % 20}" for n in range(7)) + "\n")
    with open(folder / "texts.jsonl", "w") as file:
        for i in range(20):
            kind = ["poems", "maps"][i % 3 > 0]
            text = f"a {['blue', 'red'][i % 2]} book of {kind} no {i % 5}"
            file.write(json.dumps({"item": f"b{i}", "text": text}) + "\n")
    run = make_run(folder, tmp_path / "run", stages="embed")
    metrics_of(run, "sae grounded eval")


def test_other_intents(tmp_path, tiny_run):
    """Any vectors and item codes are intents: here a direction and a code for each topic's word."""
    run = copy_run(tiny_run, tmp_path / "run", "embeddings.safetensors")
    data = saerec.run_dataset(run)
    texts = {item: text for item, text in zip(data.text_item.tolist(), data.texts)}
    rows = [[word in texts[item] for word in ("space", "cooking", "music")] for item in range(1, 31)]
    dense = torch.tensor([[False] * 3, *rows])
    item, topic = dense.nonzero(as_tuple=True)
    ones = torch.ones(len(item))
    codes = sae.SparseRows(sae.cell_bounds(dense.sum(1)), topic.int(), ones, 3)
    settings = sae.SaeSettings(run=str(run))
    tensors = dict(vectors=torch.eye(3, 8), latent=torch.arange(3).int())
    tensors |= dict(is_intent=torch.ones(3).bool(), support=torch.zeros(3).int())
    tensors |= dict(indptr=codes.indptr, indices=codes.indices, values=codes.values)
    path, made_from = run / "intents.safetensors", [run / "embeddings.safetensors"]
    saerec.save_artifact(path, tensors, settings, data.hash, made_from)
    metrics_of(run, "sasrec saerec grounded eval")
