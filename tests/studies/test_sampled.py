"""The sampled softmax: unbiased, and equal to the whole one where every item is drawn once."""

import dataclasses

import numpy as np
import pytest
import torch

import eval as evaluation
import model
import saerec
from conftest import SMALL, copy_run, write_dataset
from studies import sampled


@pytest.fixture
def batch_and_models(tiny_run):
    """A training batch of the tiny data and its three trained models."""
    data = saerec.run_dataset(tiny_run)
    models = [evaluation.load_model(tiny_run, name, data) for name in model.MODELS]
    rows = model.training_rows(data, 6)
    flat = torch.from_numpy(data.flat).long()
    chosen = torch.arange(0, len(rows.length), 3)
    return data, model.make_batch(rows, chosen, flat, torch.device("cpu")), models


def test_with_every_item_once_loss_and_gradient_are_those_of_the_whole_softmax(batch_and_models):
    """Each of V items drawn once of one expected: the estimated sum is the sum itself."""
    data, batch, models = batch_and_models
    loss = sampled.SampledLoss(data, 10, seed=0)
    loss.draw = lambda: torch.randperm(len(data.items) - 1) + 1
    loss.log_expected = torch.zeros(len(data.items))
    for net in models:
        results = []
        for function in (loss, model.catalogue_loss):
            net.zero_grad()
            value = function(net, batch)
            value.backward()
            gradients = {n: p.grad.clone() for n, p in net.named_parameters()}
            results.append((value.detach(), gradients))
        torch.testing.assert_close(results[0], results[1], atol=2e-6, rtol=1e-4)


def test_some_vectors_and_scores_are_rows_and_columns_of_all(batch_and_models):
    data, batch, models = batch_and_models
    ids = torch.tensor([7, 1, 5, 2, 7])
    for net in models:
        table = net.item_table()
        vectors = sampled.some_vectors(net, ids)
        torch.testing.assert_close(vectors, table[ids])
        state = model.read_histories(net, batch, table[batch.items])
        some = sampled.some_scores(net, state, vectors, ids)
        scores = net.scores(state, table)
        torch.testing.assert_close(some, scores[:, ids], atol=1e-5, rtol=1e-4)
        own = sampled.target_scores(net, state, table[batch.target], batch.target)
        expected = scores.gather(1, batch.target[:, None])[:, 0]
        torch.testing.assert_close(own, expected, atol=1e-5, rtol=1e-4)


def test_negatives_estimate_the_sum_over_the_catalogue_without_bias(tmp_path):
    """An item is drawn as often as expected, and the estimated sum has the true mean."""
    data = saerec.load_dataset(write_dataset(tmp_path / "d"))
    loss = sampled.SampledLoss(data, 40, seed=0)
    drawn = torch.stack([loss.draw() for _ in range(4000)])  # (4000, 40)
    V = len(data.items) - 1
    counts = torch.bincount(drawn.flatten(), minlength=V + 1) / 4000
    frequency = np.bincount(data.training_items(), minlength=V + 1) / len(data.training_items())
    expected = 20 / V + 20 * torch.from_numpy(frequency)
    assert (counts[1:] / expected[1:] - 1).abs().max() < 0.1 and counts[0] == 0
    torch.testing.assert_close(loss.log_expected[1:], expected[1:].log().float())
    scores = torch.linspace(-2, 2, V + 1)
    estimates = (scores[drawn] - loss.log_expected[drawn]).exp().sum(1)
    assert estimates.mean() == pytest.approx(scores[1:].exp().sum().item(), rel=0.01)


def test_a_target_among_the_negatives_counts_once(batch_and_models):
    """With its target as only negative nothing is left to compare a position with: loss 0."""
    data, batch, models = batch_and_models
    loss = sampled.SampledLoss(data, 3, seed=0)
    one = model.Batch(batch.items[:1], batch.real[:1], batch.target[:1], torch.ones(1))
    loss.draw = lambda: batch.target[:1].repeat(3)
    assert loss(models[0], one).item() == pytest.approx(0, abs=1e-6)


def test_the_command_writes_what_model_py_writes(tmp_path, tiny_run):
    flags = [*SMALL["model"].split(), "--device", "cpu"]
    tensors = []
    for negatives in (8, 16):
        run = copy_run(tiny_run, tmp_path / str(negatives))
        argv = ["--run", str(run), *flags, "--negatives", str(negatives)]
        assert sampled.main(argv) == 0
        data = saerec.run_dataset(run)
        net = evaluation.load_model(run, "grounded", data)
        tensors.append(net.item.weight)
        assert "negatives" not in {f.name for f in dataclasses.fields(net.settings)}
    assert not torch.equal(*tensors)


def test_mistakes(fails, tiny_run):
    fails(sampled.main, ["--run", tiny_run, "--negatives", 0], "--negatives", "at least 1")
    fails(sampled.main, ["--run", tiny_run, "--public", 3], "--public", "changes nothing")
