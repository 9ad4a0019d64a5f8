"""The sparse autoencoder and the intent library."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import sae
import saerec
from conftest import copy_run, make_run

SETTINGS = sae.SaeSettings(latents=32, active=4, steps=200, batch=64, lr=3e-3)


def planted(texts=2000, factors=12, width=24, seed=0):
    """Texts that are sums of two of `factors` random unit directions -> (embeddings, directions)."""
    g = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(factors, width, generator=g), dim=1)
    which = torch.rand(texts, factors, generator=g).topk(2).indices
    amounts = 0.5 + torch.rand(texts, 2, generator=g)
    return torch.einsum("nk,nke->ne", amounts, directions[which]), directions


def random_sae(latents=32, active=4, width=24):
    net = sae.SAE(latents, active, width)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in (net.W_enc, net.b_enc, net.b_dec):
            p += 0.1 * torch.randn(p.shape, generator=g)
    return net


def dense_forward(net, x):
    """The plain formulation of equation (S1): all M latents with a gradient, then everything but the K largest set to 0."""
    z = (x - net.b_dec) @ net.W_enc.T + net.b_enc
    threshold = z.topk(net.active).values[:, -1:]
    z = torch.where(z >= threshold, z, 0).relu()
    return z, z @ net.W_dec + net.b_dec


@pytest.mark.parametrize("active", [4, None])  # None: all latents, as with L1
def test_sparse_formulation_equals_the_dense_one_in_loss_and_gradient(active):
    net, (x, _) = random_sae(), planted(100)
    net.active = active or len(net.W_enc)
    gradients = []
    for dense in (True, False):
        net.zero_grad()
        x_hat = dense_forward(net, x)[1] if dense else net.decode(net.encode(x))
        loss = sae.reconstruction_loss(x, x_hat)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in net.parameters())])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_codes_are_k_sparse_and_not_negative():
    net, (x, _) = random_sae(), planted(50)
    codes = net.encode(x)
    assert codes.values.shape == (50, 4) and (codes.values >= 0).all()
    assert all(len(set(row)) == 4 for row in codes.latents.tolist())
    z, _ = dense_forward(net, x)
    torch.testing.assert_close(codes.values.sort().values, z.topk(4).values.sort().values)


def test_a_text_is_encoded_alike_whatever_its_batch_mates():
    net, (x, _) = random_sae(), planted(50)
    with torch.no_grad():
        together, alone = net.encode(x), [net.encode(row[None]) for row in x]
    torch.testing.assert_close(together.values, torch.cat([c.values for c in alone]))
    assert torch.equal(together.latents, torch.cat([c.latents for c in alone]))


def test_auxk_by_its_definition_and_only_for_dead_latents():
    net, (x, _) = random_sae(), planted(40)
    dead = torch.zeros(32, dtype=torch.bool)
    dead[[3, 8, 20]] = True
    x_hat = net.decode(net.encode(x))
    loss = sae.auxk_loss(net, x, x_hat, dead.nonzero()[:, 0], 2)
    loss.backward()
    expected = residual_norm = 0.0
    with torch.no_grad():
        for row, row_hat in zip(x, x_hat):
            residual = row - row_hat
            active = {j: max(0.0, float(net.W_enc[j] @ (row - net.b_dec) + net.b_enc[j])) for j in (3, 8, 20)}
            best = sorted(active, key=active.get)[-2:]
            expected += float((residual - sum(active[j] * net.W_dec[j] for j in best)).square().sum())
            residual_norm += float(residual.square().sum())
    assert loss.item() == pytest.approx(expected / residual_norm, rel=1e-4)
    for p in (net.W_enc.grad, net.W_dec.grad, net.b_enc.grad):
        assert p[dead].abs().sum() > 0 and p[~dead].abs().sum() == 0
    assert net.b_dec.grad is None or net.b_dec.grad.abs().sum() == 0


def test_dead_latents_get_a_gradient_through_auxk_alone_and_revive():
    """Latents pushed below all others never fire without auxk, and do with it."""
    x, _ = planted()
    alive = {}
    for auxk in (0, 16):
        settings = dataclasses.replace(SETTINGS, auxk=auxk, auxk_weight=1.0, steps=300, dead_after=0.5)
        original = sae.SAE.fit_scale

        def handicapped(net, embeddings, rows):
            original(net, embeddings, rows)
            with torch.no_grad():
                net.b_enc[4:] = -0.5

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sae.SAE, "fit_scale", handicapped)
            net, _, log = sae.train_sae(x, settings)
        alive[auxk] = 1 - log[-1]["dead"]
    assert alive[16] > alive[0] + 0.1, alive


def test_project_then_step_then_normalize():
    net, (x, _) = random_sae(), planted(60)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        sae.reconstruction_loss(x, net.decode(net.encode(x))).backward()
        net.project_decoder_gradient()
        assert (net.W_dec.grad * net.W_dec).sum(1).abs().max() < 1e-5
        optimizer.step()
        net.normalize_decoder()
        torch.testing.assert_close(net.W_dec.norm(dim=1), torch.ones(32))


def test_scaling_makes_the_variance_one():
    x, _ = planted()
    net = sae.SAE(8, 2, 24)
    net.fit_scale(7 * x + 3, torch.arange(len(x)))
    assert net.standardize(7 * x + 3).square().sum(1).mean().item() == pytest.approx(1, rel=1e-4)


def test_fvu_measured_in_slices_is_fvu():
    x, _ = planted(300)
    net = random_sae()
    net.fit_scale(x, torch.arange(300))
    with torch.no_grad():
        codes = net.encode(net.standardize(x))
        x_hat = net.decode(codes) * net.scale + net.mean  # FVU is the same before scaling
        expected = ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()
    measured, l0 = sae.measure(net, x, torch.arange(300), batch=70)
    assert measured == pytest.approx(expected, rel=1e-4) and l0 == pytest.approx((codes.values > 0).sum().item() / 300)


def test_planted_dictionary_is_recovered():
    x, directions = planted(6000)
    net, _, log = sae.train_sae(x, dataclasses.replace(SETTINGS, latents=24, active=2, steps=1500))
    x_mean = x.mean(0)  # the SAE sees centred texts, so compare with what centring leaves
    best = (F.normalize(directions, dim=1) @ net.W_dec.detach().T).max(1).values
    assert (best > 0.9).float().mean() >= 0.9, best
    assert log[-1]["fvu"] < 0.1 and torch.allclose(net.mean, x_mean, atol=0.1)


def test_l1_variant_trains_and_its_weight_controls_l0():
    x, _ = planted()
    l0 = [sae.train_sae(x, dataclasses.replace(SETTINGS, sparsity="l1", l1=weight, active=16))[2][-1]["l0"] for weight in (0.01, 0.2)]
    assert l0[0] > 1.5 * l0[1] > 0


def test_sizes_follow_the_corpus():
    def sizes(n, **more):
        s = sae.resolve(sae.SaeSettings(**more), n)
        return s.latents, s.steps

    assert sizes(1_700) == (512, 332) and sizes(4_344) == (1024, 848) and sizes(500_000)[0] == 16384
    assert sizes(500_000)[1] == 20000 and sizes(50)[0] == 64 and sizes(1_700, latents=100, steps=7) == (100, 7)


def test_saved_sae_is_unit_norm_and_gives_the_same_codes_bit_for_bit(tiny_run):
    tensors, meta = saerec.load_artifact(tiny_run / "sae.safetensors", "sae.py")
    embeddings = saerec.load_artifact(tiny_run / "embeddings.safetensors", "embed.py")[0]["embeddings"]
    torch.testing.assert_close(tensors["W_dec"].norm(dim=1), torch.ones(16))
    net = sae.SAE(16, 3, embeddings.shape[1], seed=9)
    net.load_state_dict(tensors)
    codes = sae.encode_all(net, embeddings)
    library = saerec.load_artifact(tiny_run / "intents.safetensors", "sae.py")[0]
    data = saerec.load_dataset(meta_data(tiny_run))
    number = np.full(16, -1)
    number[library["latent"].numpy()] = np.arange(len(library["latent"]))
    indptr, indices, values = sae.item_codes(codes, data.text_item, len(data.items) - 1, number)
    assert (indptr == library["indptr"].numpy()).all() and (indices == library["indices"].numpy()).all()
    assert values.tobytes() == library["values"].numpy().tobytes()
    torch.testing.assert_close(library["vectors"], tensors["W_dec"][library["latent"].long()])


def meta_data(run):
    return saerec.artifact_meta(run / "embeddings.safetensors", "embed.py")["settings"]["data"]


def test_item_codes_by_brute_force():
    g = np.random.default_rng(0)
    latents = torch.from_numpy(np.stack([g.permutation(8)[:3] for _ in range(40)]))
    values = torch.from_numpy(g.random((40, 3)).astype(np.float32)) * (torch.rand(40, 3, generator=torch.Generator().manual_seed(0)) > 0.2)
    text_item = g.integers(1, 12, 40)
    number = np.array([0, -1, 1, 2, -1, 3, 4, 5])
    indptr, indices, weights = sae.item_codes(sae.Codes(values, latents), text_item, 12, number)
    dense = np.zeros((13, 6))
    for item in range(13):
        for j in range(indptr[item], indptr[item + 1]):
            dense[item, indices[j]] = weights[j]
    expected = np.zeros((13, 6))
    for text in range(40):
        for slot in range(3):
            if number[latents[text, slot]] >= 0:
                expected[text_item[text], number[latents[text, slot]]] += values[text, slot] / (text_item == text_item[text]).sum()
    np.testing.assert_allclose(dense, expected, atol=1e-6)
    assert len(indptr) == 14 and indptr[1] == 0  # padding has no codes


def test_mutual_information_by_its_definition():
    word = np.array([1, 1, 1, 0, 0, 0, 1, 0], bool)
    fires = np.array([1, 1, 0, 0, 0, 1, 0, 0], bool)
    expected = 0.0
    for w in (0, 1):
        for f in (0, 1):
            joint = ((word == w) & (fires == f)).mean()
            expected += joint * math.log(joint / ((word == w).mean() * (fires == f).mean())) if joint else 0
    counts = [np.array([int(x)]) for x in ((word & fires).sum(), word.sum())]
    assert sae.mutual_information(*counts, fires.sum(), 8)[0] == pytest.approx(expected)


def test_terms_are_words_and_phrases_within_punctuation():
    assert sae.terms_of("The Dark-Blue sky, and Bob's red car") == {"dark-blue", "sky", "dark-blue sky", "bob", "red", "car", "bob red", "red car"}


def test_auroc_by_pairs():
    g = np.random.default_rng(0)
    scores, positive = g.integers(0, 5, 60).astype(float), g.random(60) < 0.3
    pairs = [(p > n) + 0.5 * (p == n) for p in scores[positive] for n in scores[~positive]]
    assert sae.auroc(scores, positive) == pytest.approx(np.mean(pairs))
    assert sae.auroc(scores, np.zeros(60, bool)) is None


def test_library_names_what_it_found(tiny_run):
    rows = [json.loads(line) for line in (tiny_run / "intents.jsonl").read_text().splitlines()]
    assert [row["intent"] for row in rows] == list(range(len(rows))) and len({row["label"] for row in rows}) == len(rows)
    topics = {"space": "space rocket planet orbit astronaut", "cooking": "cooking recipe oven butter kitchen", "music": "music guitar melody concert singer"}
    named = sum(any(word in topic for topic in topics.values() for word in row["keywords"][0].split()) for row in rows)
    assert named >= 0.7 * len(rows)
    assert {"intent", "latent", "label", "keywords", "texts", "items", "density", "detection_auroc", "detection_texts",
            "permuted_auroc"} == set(rows[0])  # fmt: skip


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--active 99 --latents 16", ["--active 99", "16 latents"]),
        ("--sparsity l1 --active 3", ["--active", "changes nothing"]),
        ("--l1 0.5", ["--l1", "changes nothing"]),
        ("--sparsity tonk", ["tonk", "topk, l1"]),
        ("--held-out 0.9", ["--held-out", "0.01 to 0.5"]),
        ("--batch 0", ["--batch", "at least 1"]),
        ("--latents ten", ["--latents", "ten"]),
        ("--step 5", ["did you mean --steps"]),
        ("--min-items 1000", ["fires on at least 1000 items"]),
        ("--lr 1e30", ["--lr"]),
    ],
)
def test_impossible_settings(fails, tmp_path, tiny_data, tiny_run, flags, words):
    run = copy_run(tiny_run, tmp_path / "run", "embeddings.safetensors")
    fails(sae.main, ["--run", run, "--steps", "20", "--latents", "16", "--active", "3", "--device", "cpu", *flags.split()], *words)
    assert [path.name for path in run.iterdir()] == ["embeddings.safetensors"]


def test_missing_run(fails, tmp_path):
    fails(sae.main, [], "--run is missing")
    fails(sae.main, ["--run", tmp_path], "embeddings.safetensors is missing", "embed.py")


# A setting that changes nothing is a bug: each of these must change what is written.
@pytest.mark.parametrize("flags", ["--latents 12", "--active 2", "--sparsity l1", "--steps 140", "--batch 8", "--lr 0.01", "--auxk 1",
                                   "--auxk-weight 1", "--dead-after 3", "--held-out 0.3", "--min-items 6", "--max-density 0.2",
                                   "--keywords 2", "--seed 5"])  # fmt: skip
def test_every_setting_changes_the_library(tmp_path, tiny_run, flags):
    written = []
    for more in ("", flags):
        run = copy_run(tiny_run, tmp_path / f"run{len(written)}", "embeddings.safetensors")
        base = "--latents 16 --active 3 --steps 150 --batch 16 --min-items 2 --held-out 0.2 --lr 0.003 --auxk 8 --dead-after 0.5 --device cpu"
        base = base.replace("--active 3 ", "") if "l1" in flags and more else base
        assert sae.main(["--run", str(run), *base.split(), *more.split()]) == 0
        tensors = saerec.load_artifact(run / "sae.safetensors", "sae.py")[0]
        written.append(({name: t.tolist() for name, t in tensors.items()}, (run / "intents.jsonl").read_text()))
    assert written[0] != written[1]


def test_same_seed_same_library(tmp_path, tiny_data):
    runs = [make_run(tiny_data, tmp_path / name, stages="embed sae") for name in "ab"]
    assert (runs[0] / "intents.jsonl").read_bytes() == (runs[1] / "intents.jsonl").read_bytes()
    a, b = (saerec.load_artifact(run / "sae.safetensors", "sae.py")[0] for run in runs)
    assert all(torch.equal(a[name], b[name]) for name in a)
