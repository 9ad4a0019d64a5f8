"""Is a difference more than chance? Paired tests, Holm's correction, groups of users, a verdict.

The file is not named after Python's own module `statistics`: a script in this folder would hand it
to torch, which imports that one.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

from saerec import HERE, file_hash, user_metrics, write_lines

import numpy as np

METRIC = "NDCG@10"
LEVEL = 0.01
TESTED = (
    f"paired sign-flip permutation test over users of {METRIC} averaged over seeds, Holm's "
    "correction over all comparisons"
)


def permutation_test(difference, seed, rounds=10_000):
    """Two-sided p-value of the mean being 0, by random flips of signs -> float.

    difference: float64 [users], paired. Fisher 1935; counting what was observed keeps p above 0.
    """
    random = np.random.default_rng(seed)
    observed = abs(difference.mean())
    beyond = 0
    for _ in range(rounds // 100):
        signs = random.integers(0, 2, (100, len(difference)), dtype=np.int8) * 2.0 - 1
        means = abs(signs @ difference) / len(difference)
        beyond += int((means >= observed - 1e-12).sum())
    return (beyond + 1) / (rounds + 1)


def holm(p_values):
    """Holm's correction for many comparisons (1979), in the order given -> list of floats."""
    adjusted = np.empty(len(p_values))
    highest = 0.0
    for place, at in enumerate(np.argsort(p_values, kind="stable")):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[at]))
        adjusted[at] = highest
    return adjusted.tolist()


def lowest_third(values):
    """The third of users with the lowest values [users] -> bool [users].

    Exactly a third, rounded down: equal values are told apart by the user's number. Cut at a
    quantile, a third would hold everybody who shares the value that the cut falls on.
    """
    lowest = np.argsort(values, kind="stable")[: len(values) // 3]
    mask = np.zeros(len(values), bool)
    mask[lowest] = True
    return mask


def user_groups(data):
    """The thirds of users with the shortest histories and the rarest targets -> {name: bool}.

    Rare in the training interactions of a Dataset; thirds as in `lowest_third`.
    """
    popularity = np.bincount(data.training_items(), minlength=len(data.items))
    rarity = popularity[data.targets("test")]
    groups = {"short histories": np.diff(data.start), "rare targets": rarity}
    return {name: lowest_third(values) for name, values in groups.items()}


def user_means(ranks):
    """The metric that is tested, per user and averaged over seeds -> float64 [users].

    ranks: float64 [users] of each seed.
    """
    return np.mean([user_metrics(one)[METRIC].numpy() for one in ranks], 0)


def paired_tests(means, pairs, seed):
    """Test pairs of names (a, b) -> rows {a, b, metric, difference of a over b, p, p_holm}.

    means: name -> float64 [users], as `user_means` gives them.
    """
    tests = []
    for a, b in pairs:
        difference = means[a] - means[b]
        p = permutation_test(difference, seed)
        tests.append(dict(a=a, b=b, metric=METRIC, difference=float(difference.mean()), p=p))
    for test, adjusted in zip(tests, holm([test["p"] for test in tests])):
        test["p_holm"] = adjusted
    return tests


def outcome(test):
    """What a test says of its b against its a."""
    if test["p_holm"] >= LEVEL:
        return "not told apart from"
    return "worse than" if test["difference"] > 0 else "better than"


def without_intents(test, mean):
    """What a test of a model against SASRec, which is that model without intents, says."""
    model = test["a"]
    effect = "lowers it" if test["difference"] > 0 else "raises it"
    if test["p_holm"] >= LEVEL:
        effect = "makes no difference that the test can tell"
    both = f"{METRIC} {mean[model]:.4f} with, {mean['SASRec']:.4f} without"
    both += f" (p = {test['p_holm']:.2g})"
    return f"Taking the intents of the SAE away from {model} {effect}: {both}."


def verdict(rows, tests):
    """What the paired tests say, in sentences made from their numbers, a reference at a time."""
    mean = {row["name"]: row[METRIC]["mean"] for row in rows}
    said = [without_intents(test, mean) for test in tests if test["b"] == "SASRec"]
    for reference in dict.fromkeys(test["a"] for test in tests):
        own = [test for test in tests if test["a"] == reference]
        for kind in ("worse than", "better than", "not told apart from"):
            names = [test["b"] for test in own if outcome(test) == kind]
            shares = [f"{name} ({mean[name] / mean[reference] - 1:+.1%})" for name in names]
            if names:
                against = f"{kind.capitalize()} {reference} at {mean[reference]:.4f}"
                said.append(f"{against}: {', '.join(shares)}.")
    said.append(f"Told apart means p < {LEVEL} after Holm's correction.")
    return " ".join(said)


def with_spread(cell):
    """A mean and its standard deviation over seeds, if there are several, as text."""
    if cell["std"] is None:
        return f"{cell['mean']:.4f}"
    return f"{cell['mean']:.4f} ±{cell['std']:.4f}"


def report_table(rows):
    """Lines of a table of what an ablation's rows hold."""
    groups = list(rows[0]["groups"])
    head = f"{'':38}{METRIC:>16}{'HR@10':>16}{'p':>8}"
    head += "".join(f"{group:>17}" for group in groups)
    yield head + f"{'parameters':>12}{'seconds':>9}"
    for row in rows:
        p = "" if row["p"] is None else f"{row['p']:.2g}"
        line = f"{row['name']:38}{with_spread(row[METRIC]):>16}{with_spread(row['HR@10']):>16}"
        line += f"{p:>8}" + "".join(f"{row['groups'][group]:>17.4f}" for group in groups)
        yield line + f"{row['params']:>12,}{row['seconds']:>9.0f}"


def current_commit():
    """Short hash of the commit that is checked out, "" where there is none."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        return ""


def trained_at(results):
    """Commits at which rows were finished, perhaps by an earlier call -> list of str.

    results: {name: [(ranks, dict of what it took) of each seed]}.
    """
    took = [more for seeds in results.values() for _, more in seeds]
    return sorted({more["commit"] for more in took if more.get("commit")})


def write_result(folder, name, report, copy=""):
    """Write what was measured as FOLDER/NAME.json, and as the file `copy` too if one is named.

    The commit and the command that made it are added, and the hash of the intents that FOLDER has,
    by which tools/report.py knows what it does not belong to.
    """
    command = " ".join(["python", *map(shlex.quote, sys.argv)])
    report = report | dict(commit=current_commit(), command=command)
    intents = Path(folder) / "intents.safetensors"
    if intents.is_file():
        report["intents"] = file_hash(intents)
    paths = [Path(folder) / f"{name}.json"]
    if copy:
        paths.append(Path(copy))
    for path in paths:
        write_lines(path, [json.dumps(report, indent=1)])
        print(f"written to {path}")
