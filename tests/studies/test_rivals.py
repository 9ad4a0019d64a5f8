"""Rivals of the SAE's intents: what they keep, what they change, and that model.py takes them."""

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
import model
import sae
import saerec
from conftest import SMALL, copy_run
from studies import rivals


@pytest.fixture(scope="module")
def run(tiny_run):
    return rivals.load_run(tiny_run, saerec.run_dataset(tiny_run))


def codes_of(tensors):
    parts = (tensors[name] for name in ("indptr", "indices", "values"))
    return sae.SparseRows(*parts, len(tensors["vectors"])).dense()


def test_random_keeps_the_codes_and_shuffled_keeps_the_vectors(run):
    own = run.intents
    random = rivals.random_library(run, seed=1)
    assert all(torch.equal(random[name], own[name]) for name in own if name != "vectors")
    torch.testing.assert_close(random["vectors"].norm(dim=1), torch.ones(len(own["vectors"])))
    assert (random["vectors"] - own["vectors"]).abs().max() > 0.1
    assert random["vectors"].shape == own["vectors"].shape
    shuffled = rivals.shuffled_library(run, seed=1)
    assert torch.equal(shuffled["vectors"], own["vectors"])
    before = codes_of(own)
    after = codes_of(shuffled)
    assert not torch.equal(before, after) and after[0].sum() == 0
    assert sorted(map(tuple, before.tolist())) == sorted(map(tuple, after.tolist()))
    for make in (rivals.random_library, rivals.shuffled_library):
        one, same, other = (make(run, seed) for seed in (1, 1, 2))
        assert all(torch.equal(one[name], same[name]) for name in own)
        assert any(not torch.equal(one[name], other[name]) for name in own)


def test_text_is_the_mean_embedding_of_an_item(run):
    text = rivals.text_library(run, seed=0)
    x = run.sae.standardize(run.embeddings)
    mixed = codes_of(text) @ text["vectors"]
    for item in range(len(run.data.items)):
        own = x[torch.from_numpy(run.data.text_item == item)]
        expected = own.mean(0) if len(own) else torch.zeros(x.shape[1])
        torch.testing.assert_close(mixed[item], expected)
    assert codes_of(text).sum(0).eq(1).all()  # an intent has one item


def test_the_first_of_many_centroids_is_the_nearest():
    """`kmeans-k` has the centroids of `kmeans`; of 6 planted clusters a text's own comes first."""
    torch.manual_seed(0)
    centers = F.normalize(torch.randn(6, 16), dim=1)
    x = centers[torch.arange(600) % 6] + 0.05 * torch.randn(600, 16)
    settings = sae.SaeSettings(latents=6, active=4, device="cpu")
    vectors, one = rivals.rival("kmeans", x, settings)
    same, many = rivals.rival("kmeans-k", x, settings)
    assert torch.equal(vectors, same) and many.values.shape == (600, 4)
    assert torch.equal(many.latents[:, :1], one.latents)
    assert torch.equal(many.values[:, :1], one.values)
    assert (many.values[:, :-1] >= many.values[:, 1:]).all()


@pytest.mark.parametrize("kind", ["kmeans", "pca", "dense"])
def test_rivals_have_unit_vectors_and_codes_that_rebuild(kind):
    torch.manual_seed(0)
    centers = F.normalize(torch.randn(6, 16), dim=1)
    x = centers[torch.arange(600) % 6] + 0.05 * torch.randn(600, 16)
    settings = sae.SaeSettings(latents=12, active=4, device="cpu")
    vectors, codes = rivals.rival(kind, x, settings)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(vectors)))
    active = dict(kmeans=1, pca=4, dense=4)[kind]
    assert codes.values.min() >= 0 and codes.values.shape == (600, active)
    rebuilt = sae.weighted_rows(vectors, codes)
    if kind != "kmeans":
        rebuilt = rebuilt + x.mean(0)
    assert F.cosine_similarity(rebuilt, x).mean() > 0.8
    assert torch.equal(vectors, rivals.rival(kind, x, settings)[0])


def test_kmeans_finds_planted_clusters_and_is_a_fixed_point():
    torch.manual_seed(0)
    truth = 5 * torch.randn(4, 8)
    x = truth[torch.arange(400) % 4] + 0.1 * torch.randn(400, 8)

    def distance(centroids):
        return torch.cdist(x, centroids).min(1).values.sum()

    drawn = (saerec.generator(seed, "k-means") for seed in range(5))
    found = min((sae.kmeans(x, 4, random, rounds=25) for random in drawn), key=distance)
    assert torch.cdist(truth, found).min(1).values.max() < 0.1
    nearest = torch.cdist(x, found).argmin(1)
    means = torch.stack([x[nearest == cluster].mean(0) for cluster in range(4)])
    torch.testing.assert_close(found, means)


def test_pca_axes_by_covariance():
    x = torch.randn(200, 6) * torch.tensor([3.0, 2, 1, 0.5, 0.2, 0.1])
    vectors, codes = rivals.rival("pca", x, sae.SaeSettings(latents=4, active=2))
    _, axes = torch.linalg.eigh(torch.cov(x.T))
    assert (vectors[:2] @ axes[:, [-1, -2]]).abs().diagonal().min() > 0.999
    assert torch.equal(vectors[2:], -vectors[:2])
    best = ((x - x.mean(0)) @ vectors.T).topk(2)
    assert torch.equal(best.indices, codes.latents)
    torch.testing.assert_close(best.values.clamp_min(0), codes.values)


def test_l1_by_equation_and_it_makes_codes_sparse():
    torch.manual_seed(0)
    net = rivals.L1SAE(9, 2, 5)
    with torch.no_grad():
        net.b_enc.normal_()
        net.b_dec.normal_()
    x = torch.randn(7, 5)
    codes = net.encode(x)
    z = ((x - net.b_dec) @ net.W_enc.T + net.b_enc).clamp_min(0)
    torch.testing.assert_close(torch.zeros(7, 9).scatter(1, codes.latents, codes.values), z)
    torch.testing.assert_close(net.decode(codes), z @ net.W_dec + net.b_dec)
    error = (x - z @ net.W_dec - net.b_dec).square().sum(1).mean()
    dead = torch.tensor([3])
    loss, reconstruction = net.loss(x, codes, dead, sae.SaeSettings())
    torch.testing.assert_close(loss, error + 0.2 * z.sum(1).mean())
    torch.testing.assert_close(reconstruction, error)
    dense = rivals.DenseAutoencoder(9, 2, 5)
    loss, reconstruction = dense.loss(x, dense.encode(x), dead, sae.SaeSettings())
    assert loss == reconstruction


def test_all_of_an_l1_sae_is_active_and_few_latents_fire(run):
    fires = {}
    for Model in (rivals.L1SAE, rivals.DenseAutoencoder):
        net, _, settings = rivals.train_other(run, {}, 0, Model)
        codes = sae.encode_all(net, run.embeddings)
        assert int(net.active) == settings.latents == codes.values.shape[1]
        fires[Model] = (codes.values > 0).sum(1).double().mean()
        plain = sae.SAE(settings.latents, settings.latents, run.embeddings.shape[1])
        plain.load_state_dict(net.state_dict())  # its file gives the same codes to any SAE
        again = sae.encode_all(plain, run.embeddings)
        shape = codes.values.shape
        one, other = (torch.zeros(shape).scatter(1, c.latents, c.values) for c in (codes, again))
        torch.testing.assert_close(one, other)
    assert fires[rivals.L1SAE] < fires[rivals.DenseAutoencoder]


def test_other_saes_have_other_sizes(run):
    own = run.settings
    for kind, latents, active in (
        ("half-m", 8, 3), ("twice-m", 32, 3), ("half-k", 16, 1), ("twice-k", 16, 6),
    ):  # fmt: skip
        net, held_out, settings = rivals.train_other(run, rivals.SAE_CHANGES[kind], 0)
        assert (settings.latents, settings.active) == (latents, active)
        assert (len(net.W_dec), int(net.active)) == (latents, active)
        assert dataclasses.replace(settings, latents=16, active=3) == own
        fires = (sae.encode_all(net, run.embeddings).values > 0).sum(1)
        assert 0 < fires.max() <= active
    assert (own.latents, own.active) == (16, 3)
    tensors, _ = rivals.sae_library("half-m", run, seed=0)
    assert len(tensors["vectors"]) <= 8 < len(run.intents["vectors"])


def test_another_seed_is_never_the_runs_own(run):
    tensors, _ = rivals.sae_library("seed", run, seed=0)
    net, _, settings = rivals.train_other(run, {}, 1)
    assert settings.seed == 1 and run.settings.seed == 0
    assert torch.equal(tensors["vectors"], net.W_dec[tensors["latent"].long()])


@pytest.mark.parametrize("kind", ["random", "text", "half-m"])
def test_a_folder_is_a_run_for_the_stages_after(kind, tiny_run, tmp_path):
    """As many intents, more and fewer; test_ablate trains on all kinds."""
    out = tmp_path / kind
    command = ["--run", str(tiny_run), "--kind", kind, "--out", str(out)]
    assert rivals.main([*command, "--device", "cpu"]) == 0
    data = saerec.run_dataset(out)
    own = sae.load_intents(tiny_run, data)
    other = sae.load_intents(out, data)
    same = torch.equal(own.vectors, other.vectors)
    assert not same or not torch.equal(own.codes.dense(), other.codes.dense())
    flags = f"--run {out} --device cpu {SMALL['model']}"
    assert model.main(["--model", "grounded", *flags.split()]) == 0
    few = f"--personal {min(3, len(other.vectors))} --public 2"
    assert model.main(["--model", "saerec", *flags.split(), *few.split()]) == 0
    assert evaluation.main(["--run", str(out), "--users", "0"]) == 0  # whose words have no names
    assert {"grounded", "saerec"} <= json.loads((out / "metrics.json").read_text())["models"].keys()


def test_a_folder_is_bound_to_its_embeddings(fails, tiny_run, tmp_path):
    out = tmp_path / "out"
    assert rivals.main(["--run", str(tiny_run), "--kind", "pca", "--out", str(out)]) == 0
    meta = saerec.artifact_meta(out / "intents.safetensors", "")
    assert meta["made_from"].keys() == {"embeddings.safetensors"}
    tensors, made = saerec.load_artifact(tiny_run / "embeddings.safetensors", "")
    changed = {name: -tensor for name, tensor in tensors.items()}
    (out / "embeddings.safetensors").unlink()
    saerec.write_artifact(out / "embeddings.safetensors", changed, made)
    fails(model.main, ["--run", out], "intents.safetensors was made from another", "embeddings")


def test_where_links_cannot_be_there_is_a_copy(tiny_run, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("no links here")

    monkeypatch.setattr(rivals.os, "link", refuse)
    out = tmp_path / "out"
    assert rivals.main(["--run", str(tiny_run), "--kind", "random", "--out", str(out)]) == 0
    name = "embeddings.safetensors"
    assert (out / name).read_bytes() == (tiny_run / name).read_bytes()
    assert (out / name).stat().st_nlink == 1


def test_other_folders_are_left_alone(fails, tiny_run, tmp_path):
    run = copy_run(tiny_run, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    make = ["--run", run, "--kind", "pca", "--out"]
    fails(rivals.main, [*make, run], f"{run} is a run of its own", "--out")
    only = copy_run(tiny_run, tmp_path / "only", "embeddings*")
    fails(rivals.main, [*make, only], f"{only} is a run of its own", "--out")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert rivals.main([str(word) for word in (*make, tmp_path / "pca")]) == 0
    fails(rivals.main, ["--run", run, "--kind", "text", "--out", tmp_path / "pca"], "--kind pca")
    assert rivals.main([str(word) for word in (*make, tmp_path / "pca")]) == 0  # again


def test_wrong_flags(fails, tiny_run, tmp_path):
    fails(rivals.main, ["--run", tiny_run, "--kind", "pca"], "--out is missing")
    out = ["--out", tmp_path / "out"]
    fails(rivals.main, ["--run", tiny_run, *out], "--kind is missing")
    fails(rivals.main, ["--run", tiny_run, "--kind", "magic", *out], "magic", "random, shuffled")
    fails(rivals.main, ["--kind", "pca", *out], "--run is missing")
    pca = ["--kind", "pca", *out]
    fails(rivals.main, ["--run", tmp_path, *pca], "embeddings.safetensors is missing")
    run = copy_run(tiny_run, tmp_path / "run", "[!i]*")
    fails(rivals.main, ["--run", run, *pca], "intents.safetensors is missing")
    assert not (tmp_path / "out").exists()
