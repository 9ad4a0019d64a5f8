"""The statistics of the studies, against enumeration and numbers worked by hand."""

import itertools
import json

import numpy as np
import pytest
import torch

import saerec
from studies import significance


def test_permutation_test_by_enumeration():
    difference = np.array([0.3, -0.1, 0.4, 0.2, 0.0, 0.25, -0.05, 0.3])
    flips = itertools.product([1, -1], repeat=8)
    means = [abs(np.mean(np.array(signs) * difference)) for signs in flips]
    exact = np.mean([mean >= abs(difference.mean()) - 1e-12 for mean in means])
    assert significance.permutation_test(difference, seed=0) == pytest.approx(exact, abs=0.01)
    assert significance.permutation_test(np.full(40, 0.1), seed=0) == pytest.approx(1 / 10001)
    assert significance.permutation_test(np.zeros(5), seed=0) == 1


def test_holm_by_hand():
    adjusted = significance.holm([0.01, 0.04, 0.03, 0.005])
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert significance.holm([0.6, 0.5]) == [1, 1]


def test_a_third_is_a_third_and_ties_go_by_number():
    assert significance.lowest_third(np.array([2, 1, 1, 1, 3, 1, 0])).tolist() == [
        False, True, False, False, False, False, True,
    ]  # fmt: skip
    assert significance.lowest_third(np.ones(10)).tolist() == [True] * 3 + [False] * 7


def test_groups_are_short_histories_and_rare_targets(tiny_run):
    data = saerec.run_dataset(tiny_run)
    groups = significance.user_groups(data)
    counts = [(data.training_items() == target).sum() for target in data.targets("test")]
    measured = {"short histories": np.diff(data.start), "rare targets": np.array(counts)}
    assert groups.keys() == measured.keys()
    for name, values in measured.items():
        mask = groups[name]
        assert mask.sum() == len(data.users) // 3
        pairs = [(value, user) for user, value in enumerate(values)]
        inside = [pair for pair, low in zip(pairs, mask) if low]
        outside = [pair for pair, low in zip(pairs, mask) if not low]
        assert max(inside) < min(outside)


def test_means_over_seeds_by_hand():
    ranks = [torch.tensor([1.0, 2.0, 11.0]).double(), torch.tensor([3.0, 1.0, torch.inf]).double()]
    expected = [(1 + 0.5) / 2, (1 / np.log2(3) + 1) / 2, 0]
    np.testing.assert_allclose(significance.user_means(ranks), expected)


def test_tests_are_of_the_pairs_and_corrected_together():
    random = np.random.default_rng(0)
    means = {name: random.random(200) + more for name, more in (("a", 0.1), ("b", 0), ("c", 0.1))}
    pairs = [("a", "b"), ("a", "c"), ("c", "b")]
    tests = significance.paired_tests(means, pairs, seed=3)
    assert [(test["a"], test["b"]) for test in tests] == pairs
    p_values = []
    for test in tests:
        difference = means[test["a"]] - means[test["b"]]
        assert test["difference"] == pytest.approx(difference.mean())
        p_values.append(significance.permutation_test(difference, 3))
    assert [test["p"] for test in tests] == p_values
    assert [test["p_holm"] for test in tests] == significance.holm(p_values)
    assert tests[0]["p_holm"] < 0.01 < tests[1]["p_holm"]


def row_of(name, mean, std=None, p=None):
    cell = dict(mean=mean, std=std)
    row = {"name": name, "NDCG@10": cell, "HR@10": cell, "p": p, "groups": {"short": mean / 2}}
    return row | dict(params=1234, seconds=56.7)


def test_verdict_follows_the_numbers():
    means = dict(Grounded=0.08, SASRec=0.06, PCA=0.081)
    rows = [row_of(name, mean) for name, mean in (means | {"k-means": 0.1}).items()]
    tests = [
        dict(a="Grounded", b="SASRec", difference=0.02, p_holm=0.001),
        dict(a="Grounded", b="k-means", difference=-0.02, p_holm=0.002),
        dict(a="Grounded", b="PCA", difference=-0.001, p_holm=0.5),
    ]
    said = significance.verdict(rows, tests)
    taken = "NDCG@10 0.0800 with, 0.0600 without (p = 0.001)"
    assert f"away from Grounded lowers it: {taken}" in said
    assert "Worse than Grounded at 0.0800: SASRec (-25.0%)." in said
    assert "Better than Grounded at 0.0800: k-means (+25.0%)." in said
    assert "Not told apart from Grounded at 0.0800: PCA (+1.2%)." in said
    assert said.endswith("Told apart means p < 0.01 after Holm's correction.")
    tests[0] |= dict(difference=-0.02)
    assert "raises it" in significance.verdict(rows, tests)
    tests[0] |= dict(p_holm=0.3)
    said = significance.verdict(rows, tests)
    assert "makes no difference that the test can tell" in said


def test_verdict_names_the_reference_of_each_row():
    """A rival without the match is compared with Grounded without the match, and that is said."""
    without = "Grounded without match"
    means = {"Grounded": 0.08, without: 0.05, "k-means": 0.06, "k-means without match": 0.04}
    means |= dict(SAERec=0.07, SASRec=0.065)
    rows = [row_of(name, mean) for name, mean in means.items()]
    tests = [
        dict(a="Grounded", b="k-means", difference=0.02, p_holm=0.001),
        dict(a=without, b="k-means without match", difference=0.01, p_holm=0.001),
        dict(a="SAERec", b="SASRec", difference=0.005, p_holm=0.001),
    ]
    said = significance.verdict(rows, tests)
    assert "Worse than Grounded at 0.0800: k-means (-25.0%)." in said
    assert f"Worse than {without} at 0.0500: k-means without match (-20.0%)." in said
    assert "away from SAERec lowers it: NDCG@10 0.0700 with, 0.0650 without" in said


def test_table():
    rows = [row_of("Grounded", 0.08, std=0.001), row_of("SASRec", 0.06, p=0.0023)]
    head, first, second = significance.report_table(rows)
    assert head.split() == ["NDCG@10", "HR@10", "p", "short", "parameters", "seconds"]
    assert first.split() == ["Grounded", *["0.0800", "±0.0010"] * 2, "0.0400", "1,234", "57"]
    assert second.split() == ["SASRec", "0.0600", "0.0600", "0.0023", "0.0300", "1,234", "57"]
    assert len(head) == len(first) == len(second)


def test_results_are_written_twice(tmp_path):
    significance.write_result(tmp_path, "found", dict(a=[1, 2]), str(tmp_path / "more" / "x.json"))
    for path in ("found.json", "more/x.json"):
        report = json.loads((tmp_path / path).read_text())
        assert report["a"] == [1, 2] and set(report) == {"a", "commit", "command"}
    significance.write_result(tmp_path, "alone", {})
    assert len(list(tmp_path.iterdir())) == 3


def test_commits_that_rows_were_trained_at():
    """Each once, of all rows and seeds; rows of a copy without git have none."""
    rows = {"a": [(None, dict(commit="b2")), (None, dict(commit="a1"))]}
    rows["b"] = [(None, dict(commit="")), (None, {}), (None, dict(commit="b2"))]
    assert significance.trained_at(rows) == ["a1", "b2"]
