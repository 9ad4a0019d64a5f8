"""What README's "Change it" shows: another encoder, SAE, trunk or dataset in a few lines, and every stage still runs."""

import json

import safetensors.torch
import torch

import embed
import eval
import model
import sae
import saerec
from conftest import SMALL, copy_run, make_run


def rest_of_the_run(run, stages="sae sasrec model eval"):
    make_run(None, run, stages=stages)
    metrics = json.loads((run / "metrics.json").read_text())["models"]
    assert 0 < metrics["saerec"]["NDCG@20"] <= 1
    return metrics


def test_another_encoder(tmp_path, tiny_data):
    """Vectors from anywhere: here the counts of ten words."""
    words = "space rocket planet cooking recipe oven music guitar melody concert".split()
    data = saerec.load_dataset(tiny_data)
    vectors = torch.tensor([[text.lower().count(word) for word in words] for text in data.texts]).float()
    safetensors.torch.save_file({"embeddings": vectors}, tmp_path / "mine.safetensors")
    run = tmp_path / "run"
    assert embed.main(["--data", str(tiny_data), "--run", str(run), "--embeddings", str(tmp_path / "mine.safetensors")]) == 0
    rest_of_the_run(run)


def batch_topk(self, x):
    """BatchTopK (Bussmann et al. 2024): the K x B largest of a batch, so that a text may have more latents than another."""
    pre = ((x - self.b_dec) @ self.W_enc.T + self.b_enc).relu()  # (B, M)
    values, latents = pre.topk(min(2 * self.active, pre.shape[1]))
    smallest = values.flatten().topk(min(len(x) * self.active, values.numel())).values[-1]
    return sae.Codes(values * (values >= smallest), latents)


def test_another_sae(tmp_path, tiny_run, monkeypatch):
    monkeypatch.setattr(sae.SAE, "encode", batch_topk)
    run = copy_run(tiny_run, tmp_path / "run", "embeddings.safetensors")
    rest_of_the_run(run)
    assert (run / "sae.safetensors").read_bytes() != (tiny_run / "sae.safetensors").read_bytes()


class Averages(torch.nn.Module):
    """A trunk without attention: each position adds a projection of the mean of all positions up to it."""

    def __init__(self, width, heads, dropout):
        super().__init__()
        self.project = torch.nn.Linear(width, width)

    def forward(self, x):
        count = torch.arange(1, x.shape[1] + 1, device=x.device)[:, None]
        return x + self.project(x.cumsum(1) / count)  # (B, T, D), position t sees positions up to t


def test_another_trunk(tmp_path, tiny_run, monkeypatch):
    monkeypatch.setattr(model, "SelfAttention", Averages)
    run = copy_run(tiny_run, tmp_path / "run", "[eis]*")
    metrics = rest_of_the_run(run, "sasrec model eval")
    assert metrics != json.loads((tiny_run / "metrics.json").read_text())["models"]


def test_other_data(tmp_path):
    """Two plain files are a dataset."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "sequences.txt").write_text("".join(f"reader{u} " + " ".join(f"b{(u + 2 * n) % 20}" for n in range(7)) + "\n" for u in range(20)))
    lines = [{"item": f"b{i}", "text": f"a {'red' if i % 2 else 'blue'} book of {'poems' if i % 3 else 'maps'} no {i % 5}"} for i in range(20)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = make_run(folder, tmp_path / "run", stages="embed")
    rest_of_the_run(run)


def test_other_intents(tmp_path, tiny_run):
    """Any directions and codes make a Library, and a Library is all that the recommender asks of the stage before."""
    run, data = copy_run(tiny_run, tmp_path / "run"), saerec.run_dataset(tiny_run)
    vectors, codes = sae.rival("kmeans", sae.standardized_texts(run, data), 6, 2, seed=0)
    library = model.Library(vectors, *map(torch.from_numpy, sae.item_codes(codes, data.text_item, len(data.items) - 1, torch.arange(6).numpy())))
    flags = dict(zip(*[iter(w.lstrip("-") for w in SMALL["model"].split())] * 2))
    settings = model.resolve(model.ModelSettings(**{name: int(value) for name, value in flags.items()}))
    net, log = model.train_model(data, library, settings)
    assert len(log) == 3 and eval.ranking_metrics(model.rank_users(model.model_scores(net, data, model.personal_intents(data, library, settings), "test"), data, "test"))
