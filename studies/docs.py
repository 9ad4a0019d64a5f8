"""Write what is generated in the documentation from the committed results.

    python studies/docs.py            docs/results.md, docs/speed.md and README's table of results
    python studies/docs.py --check    write nothing; status 2 if any of them is out of date

studies/results/ holds what was measured: table_NAME.json, ablation_NAME.json and
interpret_NAME.json of a data set, by studies/ablate.py and interpret.py, choice_NAME.json,
grid_NAME.json and match_NAME.json by studies/choose.py, reasons_NAME.json by studies/reasons.py,
cold_NAME.json by studies/cold.py, written_NAME.json by studies/written.py, intents_ml-100k.json by
studies/sample.py, speed*.json by studies/speed.py. By hand are intents_goals.json and
goals_speed.json: before, goal and now; and judged_ml-100k.json: a reader's verdicts. The text
around the numbers is in this file.
"""

import dataclasses
import json
import sys
import textwrap
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import UserError, run_command, setting, write_lines  # noqa: E402

from studies.choose import standard_error  # noqa: E402
from studies.interpret import COMPARED  # noqa: E402
from studies.significance import LEVEL, outcome, with_spread  # noqa: E402

BEGIN = "<!-- results -->"
END = "<!-- /results -->"
GENERATED = "<!-- Written by `python studies/docs.py` from studies/results; don't edit. -->"
# The paper's data sets and one with long texts: NDCG@10 and HR@10 that was hoped for of Grounded
HOPED = {
    "beauty": (0.0632, 0.1066, "what was ours before there were three models, commit 30121ef"),
    "toys": (0.0657, 0.1055, "ICSRec"),
    "sports": (0.0367, 0.0631, "WEARec"),
    "scientific": None,  # 1.15 times its control
}
WIDE = ("item kNN by texts", "SASRec", "SASRec + text", "SAERec", "Grounded")
PUBLISHED = {
    "beauty": (
        "PixelRec (images and an 8B vision-language model) .0703 / .1194; repLLaMA4Rec "
        "(unreviewed) .0631 / .1119; WEARec .0614 / .1041; BSARec .0611 / .1008; TV-Rec .0608 / "
        ".1017; ELECRec .0587 / .0964; ICSRec .0578 / .0959; SASRec+SS .0531 / .0921; eSASRec "
        ".0523 / .0928; the SAERec paper's HR@10 .1055"
    ),
    "toys": (
        "PixelRec .0746 / .1274; ICSRec .0657 / .1055; ELECRec .0634 / .0997; SASRec+SS .0580 / "
        ".0970; BSARec's HR@5 .0805; the SAERec paper's HR@10 .1147"
    ),
    "sports": (
        "WEARec .0367 / .0631; TV-Rec .0363 / .0635; ICSRec .0335 / .0565; eSASRec .0323 / .0560; "
        "BSARec's HR@10 .0612; the SAERec paper's .0611"
    ),
}
DIFFERENCES = (
    "Published figures are of other people's code; they were not measured again here, and are "
    "compared by no test. They share the files, full ranking, leave-one-out and masked histories; "
    "tuning, seeds and what chose the epoch may differ. The SAERec paper's own come second-hand; "
    "most folders of its released code choose the epoch on the test item, which flatters. The "
    "papers are WEARec arXiv 2511.07028, TV-Rec 2510.25259, eSASRec 2508.06450, BSARec 2312.10325, "
    "ICSRec 2310.14318, ELECRec 2204.02011; those of PixelRec, repLLaMA4Rec and SASRec+SS were not "
    "found again, so their figures rest on a note alone."
)

# What an ablation asks, of which reference, and the rows that answer
QUESTIONS = (
    ("Does SAERec gain by its intents?", "SAERec", ("SASRec",)),
    (
        "Do SAERec's branches, its fusion and its retrieval matter?",
        "SAERec",
        (
            "SAERec with personal branch only", "SAERec with public branch only",
            "SAERec with fusion by sum", "SAERec with fusion by concatenation",
            "SAERec with retrieval from the trunk", "SAERec with retrieval by activation",
        ),
    ),
    (
        "Does SAERec need the directions that the SAE finds?",
        "SAERec",
        ("SAERec with random vectors", "SAERec with k-means"),
    ),
    (
        "Does Grounded gain by its intents, and by what they are used for?",
        "Grounded",
        ("SASRec", "Grounded without match", "match alone"),
    ),
    ("Does Grounded have more than texts give?", "Grounded", ("SASRec + text",)),
    ("Must the codes be those of the item itself?", "Grounded", ("shuffled codes",)),
    (
        "Would intents of another kind do as well for Grounded?",
        "Grounded",
        ("k-means", "k-means with K codes", "PCA", "dense autoencoder", "L1 instead of TopK"),
    ),
    (
        "Would intents of another kind do as well, all without the match?",
        "Grounded without match",
        (
            "SASRec + text", "k-means without match", "k-means with K codes without match",
            "PCA without match",
            "dense autoencoder without match", "L1 instead of TopK without match",
            "shuffled codes without match",
        ),
    ),
    (
        "Do the size of the library and its seed matter for Grounded?",
        "Grounded",
        ("half of K", "twice K", "half of M", "twice M", "another seed of the SAE"),
    ),
    (
        "Do the size and the seed matter without the match?",
        "Grounded without match",
        (
            "half of K without match", "twice K without match", "half of M without match",
            "twice M without match", "another seed of the SAE without match",
        ),
    ),
    (
        "Does Grounded lack a part?",
        "Grounded",
        (
            "Grounded + P d", "Grounded + next intent", "Grounded + P d + next intent",
            "Grounded + branches", "Grounded + P d + next intent + branches", "Grounded with a GRU",
        ),
    ),
    (
        "Does what P projects have to be the SAE's directions?",
        "Grounded + P d",
        ("Grounded + P d with random vectors",),
    ),
    (
        "What do neighbours reach, trained with nothing or added to a trained model?",
        "Grounded",
        (
            "item kNN by users", "item kNN by texts", "item kNN by intents",
            "SASRec + item kNN by users", "SASRec + item kNN by texts",
            "SASRec + item kNN by intents", "Grounded + item kNN by users",
        ),
    ),
    ("How do other models compare?", "Grounded", ("SAERec", "GRU4Rec", "BPR-MF", "popularity")),
)  # fmt: skip
TUNED = {  # a row, and what is said of how it was tuned
    "GRU4Rec": (
        "GRU4Rec and BPR-MF, which the defaults don't suit, have the best settings of a small grid "
        "on scientific's validation with seed 0, of earlier versions of them; its figures were not "
        "kept. "
    ),
    "item kNN by users": (
        "Item kNN's decay and its weight beside a model are chosen on validation, for each seed, "
        "and since commit d676db4 the shrinkage of likeness by users (0, 10 or 100); the weight of "
        "Grounded's match is its default. "
    ),
    "k-means": (
        "The weight of the match, .5, was chosen on validation for the SAE's codes, of an earlier "
        "library, and is that of all rows of which nothing else is said, which it may suit less: "
        "so mind the rows without the match. K-means gives a text one code, the SAE K. "
    ),
    "k-means with K codes": (
        "Here k-means has a weight of .12, the best of a grid on scientific's validation with seed "
        "0, with one code and with the K nearest centroids. "
    ),
    "dense autoencoder": (
        "The dense autoencoder is a single one, of 20 passes without noise, and all its latents "
        "are kept. "
    ),
    "Grounded with a GRU": "Grounded with a GRU has the settings of GRU4Rec. ",
    "Grounded": "All else has the defaults, but for what the command says.",
}


@dataclasses.dataclass(frozen=True)
class DocsSettings:
    """Write what is generated in the documentation."""

    results: str = setting("studies/results", "folder of committed results", unit="path")
    docs: str = setting("docs", "folder of results.md and speed.md", unit="path")
    readme: str = setting("README.md", "file with the two markers", unit="path")
    check: bool = setting(False, "only say what is out of date")


# Reading


def read_report(path, keys):
    """A JSON file of results with these keys at least -> dict. Raises UserError."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        remedy = "restore it with git, or measure again"
        raise UserError(f"{path} cannot be read ({error}): {remedy}") from error
    if not isinstance(report, dict) or not keys <= report.keys():
        wanted = ", ".join(sorted(keys))
        raise UserError(f"{path} lacks some of {wanted}: restore it with git, or measure again")
    return report


def read_ablations(folder):
    """Reports of ablation_*.json, the one of most rows first -> list of dicts. Raises UserError."""
    keys = {"dataset", "users", "protocol", "seeds", "rows", "tests", "command", "commit"}
    reports = [read_report(path, keys) for path in sorted(folder.glob("ablation_*.json"))]
    if not reports:
        raise UserError(f"{folder} has no ablation_*.json: make one with `studies/ablate.py --out`")
    return sorted(reports, key=lambda report: -len(report["rows"]))


# Markdown


def paragraph(text, begin=""):
    """Text in lines of at most 100 columns; begin: the mark of a point in a list."""
    inset = " " * len(begin)
    layout = dict(initial_indent=begin, subsequent_indent=inset, break_long_words=False)
    return textwrap.fill(text, 100, break_on_hyphens=False, **layout)


def bullets(sentences):
    """A list of sentences, a point each."""
    return "\n".join(paragraph(sentence, "- ") for sentence in sentences)


def table(header, rows):
    """A table of strings."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def means(report, metric="NDCG@10"):
    """Name of each row -> its mean."""
    return {row["name"]: row[metric]["mean"] for row in report["rows"]}


def in_decimals(values, name):
    """The value of a row, to four decimals."""
    return f"{values[name]:.4f}"


def share(values, name, reference):
    """How much more a row has than another, in percent."""
    return f"{values[name] / values[reference] - 1:+.1%}"


# The ablation


def tested(report, name):
    """Difference and p of a row's paired tests; against what, if references differ."""
    references = {test["a"] for test in report["tests"]}
    cells = []
    for test in report["tests"]:
        if test["b"] == name:
            cell = f"{-test['difference']:+.4f}, {test['p_holm']:.2g}"
            if len(references) > 1:
                cell += f" against {test['a']}"
            cells.append(cell)
    return "; ".join(cells)


def ablation_table(report):
    """A row per configuration, the highest NDCG@10 first."""
    groups = list(report["rows"][0]["groups"])
    header = ["", "NDCG@10", "HR@10", "validation NDCG@10", "difference, p (Holm)"]
    header += [*groups, "parameters", "seconds"]
    lines = []
    for row in sorted(report["rows"], key=lambda row: -row["NDCG@10"]["mean"]):
        valid = row["valid NDCG@10"]
        valid = "" if valid is None else f"{valid:.4f}"
        cells = [row["name"], with_spread(row["NDCG@10"]), with_spread(row["HR@10"]), valid]
        cells.append(tested(report, row["name"]))
        cells += [f"{row['groups'][group]:.4f}" for group in groups]
        lines.append([*cells, f"{row['params']:,}", f"{row['seconds']:.0f}"])
    return table(header, lines)


def answers(report):
    """What an ablation says to each of QUESTIONS that its rows can answer, in sentences."""
    mean = means(report)
    tests = {(test["a"], test["b"]): test for test in report["tests"]}
    for question, reference, names in QUESTIONS:
        found = [tests[reference, name] for name in names if (reference, name) in tests]
        if not found:
            continue
        said = [f"{question} {reference} has {mean[reference]:.4f}"]
        for kind in ("worse than", "better than", "not told apart from"):
            cells = []
            for test in found:
                if outcome(test) == kind:
                    cells.append(f"{test['b']} {mean[test['b']]:.4f} (p = {test['p_holm']:.2g})")
            if cells:
                said.append(f"{kind} it: {', '.join(cells)}")
        yield "; ".join(said) + "."
    rare = {row["name"]: row["groups"]["rare targets"] for row in report["rows"]}
    best = max(rare, key=rare.get)
    known = [name for name in ("Grounded", "SASRec") if name in rare and name != best]
    others = [f"{name} {rare[name]:.4f}" for name in known]
    said = "; ".join([*others, "no test"])
    yield f"On rare targets {best} is highest with {rare[best]:.4f} ({said})."


def commits_of(report):
    """The commit that a report was written at, and others that rows were trained at -> str."""
    others = [commit for commit in report.get("trained at", []) if commit != report["commit"]]
    rows = f" (rows trained at {', '.join(others)})" if others else ""
    return report["commit"] + rows


def ablation_section(report):
    """Everything on one data set's ablation -> list of blocks."""
    said = (
        f"{report['users']:,} users, mean ± standard deviation over {len(report['seeds'])} seed(s)."
        " *Difference* is a row's NDCG@10 less that of the row's reference, with p of the paired "
        f"test; told apart means p < {LEVEL} after Holm's correction. Groups are NDCG@10; seconds "
        "are of training and ranking, per seed, on one thread of a busy machine. By "
        f"`{report['command']}` at commit {commits_of(report)}."
    )
    names = means(report)
    tuned = "".join(said for name, said in TUNED.items() if name in names)
    title = f"## Ablation: {report['dataset']}, {len(report['seeds'])} seed(s)"
    blocks = [title, paragraph(said), paragraph(tuned)]
    return [*blocks, bullets(answers(report)), ablation_table(report)]


# The paper's data


def read_tables(folder):
    """Reports of table_*.json, those of HOPED first, in its order -> list of dicts; UserError."""
    keys = {"dataset", "users", "seeds", "rows", "tests", "verdict", "command", "commit"}
    reports = {}
    for path in folder.glob("table_*.json"):
        report = read_report(path, keys)
        reports[report["dataset"]] = report
    names = [*HOPED, *sorted(reports.keys() - HOPED)]
    return [reports[name] for name in names if name in reports]


def wide_table(reports):
    """A row per data set, a column per model: NDCG@10, and how much Grounded has over SASRec."""
    rows = []
    for report in reports:
        mean = means(report)
        cell = {row["name"]: with_spread(row["NDCG@10"]) for row in report["rows"]}
        cell["item kNN by texts"] = in_decimals(mean, "item kNN by texts")  # no seed moves it
        gain = share(mean, "Grounded", "SASRec")
        name = report["dataset"] + (" (one seed)" if len(report["seeds"]) == 1 else "")
        rows.append([name, *(cell[model] for model in WIDE), gain])
    return table(["data", *WIDE, "over SASRec"], rows)


def hopes(report):
    """Grounded against its control, what was hoped for and what is published, in sentences."""
    mean = means(report)
    hits = means(report, "HR@10")
    ours = f"{mean['Grounded']:.4f} / {hits['Grounded']:.4f}"
    [test] = [test for test in report["tests"] if (test["a"], test["b"]) == ("Grounded", "SASRec")]
    gain = mean["Grounded"] / mean["SASRec"]
    yield f"Grounded has {gain:.2f} times SASRec's NDCG@10 (p = {test['p_holm']:.2g})."
    if report["dataset"] not in HOPED:
        return
    if not HOPED[report["dataset"]]:
        reached = "was reached" if gain >= 1.15 else "was not reached"
        yield f"1.15 times was hoped for, which {reached}."
        return
    ndcg, hit, whose = HOPED[report["dataset"]]
    reached = "was reached"
    if mean["Grounded"] < ndcg or hits["Grounded"] < hit:
        reached = "was not reached"
    yield (
        f"NDCG@10 / HR@10 of {ndcg:.4f} / {hit:.4f} ({whose}) was hoped for and {reached}: {ours}."
    )
    yield f"Published on the same file: {PUBLISHED[report['dataset']]}."


def paper_section(folder):
    """The table on the paper's data -> list of blocks. Raises UserError."""
    reports = read_tables(folder)
    if not reports:
        return []
    said = (
        "NDCG@10, mean ± standard deviation over seeds. Beauty, toys and sports are files that the "
        "paper and many others use, whose texts are short; scientific (Amazon 2018) has long ones. "
        "SAERec is our implementation, with departures D1 to D11 of method.md. Training stops "
        "after 5 epochs without a better validation NDCG@10."
    )
    blocks = ["## The three models on the paper's data", paragraph(said), wide_table(reports)]
    blocks.append(paragraph(DIFFERENCES))
    for report in reports:
        count = len(report["seeds"])
        said = (
            f"{report['users']:,} users, {count} seed(s). *Difference* is a row's NDCG@10 less "
            "that of its reference, with p of the paired test. Groups are NDCG@10; seconds are of "
            "training and ranking, per seed, on one thread of a busy machine. By "
            f"`{report['command']}` at commit {commits_of(report)}."
        )
        blocks += [f"### {report['dataset']}", paragraph(said), ablation_table(report)]
        blocks.append(bullets(hopes(report)))
        blocks.append(paragraph(f"The verdict, made from these numbers: *{report['verdict']}*"))
    return blocks


# Cold items


def cold_outcomes(report, ranking):
    """What the paired tests say of one ranking of cold items."""
    mean = {row["name"]: row[ranking]["NDCG@10"]["mean"] for row in report["rows"]}
    tests = [test for test in report["tests"] if test["ranking"] == ranking]
    first = tests[0]["a"]
    said = [f"{first} has an NDCG@10 of {in_decimals(mean, first)}"]
    for test in tests:
        turned = outcome(test | dict(difference=-test["difference"]))  # of a against b
        said.append(
            f"{turned} {test['b']} at {in_decimals(mean, test['b'])} (p = {test['p_holm']:.2g})"
        )
    return f"{', '.join(said)}; chance is {report['chance'][ranking]['NDCG@10']:.4f}."


def cold_findings(report):
    """What studies/cold.py measured on one data set, in sentences."""
    yield f"Among the cold items alone, {cold_outcomes(report, 'cold')}"
    yield f"Among all items, {cold_outcomes(report, 'all')}"
    changes = []
    for row in report["rows"]:
        before, after = (row[ranking]["NDCG@10"]["mean"] for ranking in ("warm", "warm in all"))
        changes.append(f"{row['name']} {after / before - 1:+.1%}")
    yield f"Once the cold items are in, NDCG@10 of warm ones changes: {', '.join(changes)}."


def cold_table(report):
    """A row for chance and each that ranks; three metrics of cold items, one of warm ones."""
    names = ("NDCG@10", "HR@10", "MRR")
    header = ["", *(f"{ranking}: {name}" for ranking in ("cold", "all") for name in names)]
    header += ["warm: NDCG@10", "warm in all: NDCG@10"]
    level = report["chance"]
    chance = [f"{level[ranking][name]:.4f}" for ranking in ("cold", "all") for name in names]
    rows = [["chance, expected", *chance, "", ""]]
    for row in report["rows"]:
        cells = [row[ranking][name] for ranking in ("cold", "all") for name in names]
        cells += [row[ranking]["NDCG@10"] for ranking in ("warm", "warm in all")]
        rows.append([row["name"], *map(with_spread, cells)])
    return table(header, rows)


def cold_section(folder):
    """What studies/cold.py measured -> list of blocks. Raises UserError."""
    keys = {"dataset", "users", "seeds", "chance", "rows", "tests", "protocol", "command", "commit"}
    blocks = []
    for path in sorted(folder.glob("cold_*.json")):
        report = read_report(path, keys)
        share = f"{report['share']:.0%} of the items of {report['dataset']}"
        said = (
            f"{share}, {report['cold_items']:,} chosen by a hash of their id, are cold: no one "
            f"bought them in the world that the SAE and all models are trained in, with its "
            f"{report['warm_items']:,} other items. Then they are put in with their texts. *cold* "
            f"ranks the last item of the {report['users']:,} users of whom it is cold among the "
            "cold items, *all* among all; *warm* ranks the last warm item of "
            f"{report['warm_users']:,} users among the warm items, *warm in all* among all. Mean ± "
            f"standard deviation over {len(report['seeds'])} seed(s). What has ids alone draws "
            "those of cold items at random; by popularity all cold items tie, which counts against "
            "it."
        )
        blocks += [paragraph(said), paragraph(f"Protocol: {report['protocol']}.")]
        blocks.append(paragraph(f"By `{report['command']}` at commit {commits_of(report)}."))
        blocks += [bullets(cold_findings(report)), cold_table(report)]
    if blocks:
        blocks.insert(0, "## Items that no one has bought yet")
    return blocks


# Intents from what users wrote


def written_section(folder):
    """Whether personal intents from users' own reviews pay -> list of blocks. Raises UserError."""
    keys = {"dataset", "seeds", "rows", "valid tests", "test tests", "command", "commit"}
    reports = [read_report(path, keys) for path in sorted(folder.glob("written_*.json"))]
    if not reports:
        return []
    said = (
        "In data whose texts are reviews with their user, what a position adds to equation (11) "
        "can be the codes of its item, of what this user wrote about it, both summed, or, as a "
        "control, of what one other user wrote about the same item. Grounded matches with (11); "
        "SAERec has its k largest as personal intents, but the row *SAERec*, which is the paper's. "
        "A review is read from its own position on. Reviews of held-out interactions are not in "
        "the corpus, so the last item of a test history has none: validation shows more of what "
        "own reviews are worth, though the epoch was chosen on it; epochs are those chosen, a seed "
        "each. Differences are of NDCG@10, with p of the paired test after Holm's correction over "
        "all of a column. The test is over users and takes the seeds as they are: a difference "
        "smaller than what seeds differ by (±) may be gone with other seeds, whatever its p. Of "
        "steam_reviews the default makes some 12,500 intents of 4,555 games, and models take long: "
        "with that library there is one seed, with a smaller one (`sae.py --latents 2048 --steps "
        "2000`) there are three."
    )
    blocks = ["## Intents from what users wrote", paragraph(said)]
    for report in reports:
        blocks += written_tables(report)
    return blocks


def written_tables(report):
    """Means of a report of studies/written.py, and its paired tests -> list of blocks."""
    covered = f"{report['reviewed']:,} of {report['training']:,} training interactions"
    library = f", {report['library']:,} intents" if "library" in report else ""
    said = (
        f"{report['users']:,} users, {len(report['seeds'])} seed(s){library}; {covered} have a "
        f"review of their user. By `{report['command']}` at commit {commits_of(report)}."
    )
    columns = [f"{part} {metric}" for part in ("valid", "test") for metric in ("NDCG@10", "HR@10")]
    rows = []
    for row in report["rows"]:
        cells = [with_spread(row[column]) for column in columns]
        epochs = ", ".join(map(str, row["epochs"]))
        rows.append([row["name"], *cells, epochs, f"{row['params']:,}", f"{row['seconds']:.0f}"])
    means_table = table(["", *columns, "epochs", "parameters", "seconds"], rows)
    differences = []
    for pair in zip(report["valid tests"], report["test tests"], strict=True):
        cells = [f"{-test['difference']:+.4f}, {test['p_holm']:.2g}" for test in pair]
        differences.append([pair[0]["b"], pair[0]["a"], *cells])
    tests_table = table(["row", "less", "valid: difference, p", "test: difference, p"], differences)
    return [f"### {report['dataset']}", paragraph(said), means_table, tests_table]


# Interpretability


def label_cell(one):
    """Median AUROC of labels and the share above 0.8, in a cell; one: of a report, or None."""
    if not one:
        return ""
    of = f"{one['intents']} judged"
    if "of" in one:
        of += f" of {one['of']:,}"
    if not one["intents"]:
        return of
    return f"{one['median']:.2f}, {one['above_08']:.0%}; {of}"


def same_cell(one):
    """How alike two libraries are, in a cell; one: of a report, or None."""
    if not one:
        return ""
    said = f"{one['mean_cosine']:.2f}, {one['above_07']:.0%}"
    if "matched_cosine" in one:
        said += f"; one to one {one['matched_cosine']:.2f}"
    return said


def interpret_table(reports):
    """A column per data set, a row per measure."""
    names = dict.fromkeys(name for report in reports for name in report["labels"])
    rows = []
    for name in names:
        cells = [report["labels"].get(name) for report in reports]
        judged = "labels" if name.endswith("by meaning") else "keywords"
        rows.append([f"{judged} of {name}", *map(label_cell, cells)])
    for key, name in COMPARED.items():
        found = [report.get(key) for report in reports]
        if any(found):
            rows.append([name, *map(same_cell, found)])
    return table(["", *(report["dataset"] for report in reports)], rows)


def interpret_findings(report):
    """What interpret measured on one data set, in sentences, disappointing results first."""
    of = report["dataset"]
    same = report["stability"]
    others = dict(kmeans="of k-means' centroids", texts="among random texts")
    others |= dict(floor="among random directions")
    floors = [f"{report[key]['mean_cosine']:.2f} {others[key]}" for key in others if key in report]
    yield (
        f"{of}: another seed's SAE has a direction with a cosine above .7 for "
        f"{same['above_07']:.0%} of the intents; the mean best cosine is "
        f"{same['mean_cosine']:.2f} ({', '.join(floors)})."
    )
    if "told" in report:
        yield (
            f"{of}: for {report['told']:.0%} of the intents each word of the name is said by two "
            "of the five top texts or more."
        )
    own = report["labels"]["SAE"]
    clusters = report["labels"].get("k-means, clusters as large")
    if clusters is None:
        few = report["labels"]["k-means"]["intents"]
        yield (
            f"{of}: only {few} of k-means' clusters fire on 3 held-out texts, since there are as "
            "many clusters as intents and a text is in one alone; their row says little."
        )
    elif own["intents"] and clusters["intents"]:
        yield (
            f"{of}: keywords of k-means' clusters that are as large as intents have a median AUROC "
            f"of {clusters['median']:.2f}, the SAE's {own['median']:.2f}."
        )


def row_name(row):
    """A row of the recovery table in words."""
    if row["K"] is None:
        return f"{row['method']} (M = {row['M']:,})"
    return f"{row['method']} (K = {row['K']}, M = {row['M']:,})"


def recovery_rows(report):
    """Rows of the recovery table of one planted world."""
    for row in report["recovery"]:
        K = "" if row["K"] is None else str(row["K"])
        cells = [row["method"], K, f"{row['M']:,}", f"{row['recovered']:.0%}"]
        yield [*cells, *(f"{row[key]:.2f}" for key in ("mean_cosine", "auroc", "isolation"))]


def interpret_section(folder):
    """Everything that studies/interpret.py measured -> list of blocks. Raises UserError."""
    keys = {"dataset", "labels", "stability"}
    reports = [read_report(path, keys) for path in sorted(folder.glob("interpret_*.json"))]
    if not reports:
        return []
    reports.sort(key=lambda report: "recovery" in report)
    blocks = ["## Can the intents be understood?"]
    for report in reports:
        if "commit" in report:
            said = f"{report['dataset']}: by `{report['command']}` at commit {report['commit']}."
            blocks.append(paragraph(said))
    blocks.append(
        paragraph(
            "AUROC with which an intent's keywords, or its label by its meaning, tell held-out "
            "texts that it fires on, in the median, and the share above 0.8; judged are those with "
            "3 such texts or more. Intents among others: mean best cosine, share above 0.7."
        )
    )
    if any("matched_cosine" in report["stability"] for report in reports):
        said = (
            "One to one: mean cosine of pairs in which no intent has another's partner, those of "
            "largest total cosine."
        )
        blocks.append(paragraph(said))
    blocks.append(bullets(said for report in reports for said in interpret_findings(report)))
    blocks.append(interpret_table(reports))
    for report in reports:
        if "recovery" in report:
            blocks += recovery_section(report)
    return blocks


def recovery_section(report):
    """How well methods find the true intents of a planted world -> list of blocks."""
    highest = []
    columns = dict(mean_cosine="cosine", auroc="AUROC")  # others are named by their keys
    for key in ("recovered", "mean_cosine", "auroc", "isolation"):
        name = columns.get(key, key)
        best = max(report["recovery"], key=lambda row: row[key])
        highest.append(f"{name} {row_name(best)}")
    said = (
        f"The highest of each column: {', '.join(highest)}. Recovered: true directions with a "
        "cosine above 0.9. AUROC: of the latent that tells a true intent's texts best, chosen on "
        "one half of the texts, on the other half. Isolation: by how much that latent tells its "
        "intent better than any other."
    )
    header = ["method", "K", "M", "recovered", "mean best cosine", "AUROC", "isolation"]
    title = f"### Recovery of the true intents: {report['dataset']}"
    return [title, paragraph(said), table(header, recovery_rows(report))]


# Reasons


def rows_where(rows, **wanted):
    """The rows that have these values, in their order."""
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def spread_cell(cell, form):
    """A mean and its standard error over users."""
    return f"{cell['mean']:{form}} ±{cell['error']:{form.lstrip('+')}}"


def rank_cell(row):
    """How many ranks down, and the mean reciprocal rank."""
    return f"{spread_cell(row['fall'], '+.1f')} ({row['reciprocal']['mean']:.3f})"


def deletion_table(reports):
    """Grounded's items without some terms, and with some alone; a row per number of terms."""
    lines = []
    for report in reports:
        kinds = report["grounded"]
        for terms in dict.fromkeys(row["terms"] for row in kinds["deletion"]):
            found = rows_where(kinds["deletion"], terms=terms)
            found += rows_where(kinds["insertion"], terms=terms)
            counted = [report["dataset"], str(terms), f"{found[0]['items']:,}"]
            lines.append([*counted, *map(rank_cell, found)])
    header = ["data", "terms", "items", "largest out", "random out", "most popular item's out"]
    return table([*header, "largest alone", "random alone"], lines)


def taken_table(reports):
    """Reasons without an item of the history; a row per data set, model and item."""
    lines = []
    for report in reports:
        for model, name in (("grounded", "Grounded"), ("saerec", "SAERec")):
            for kind, which in (("history", "all"), ("older", "X is older")):
                for row in report.get(model, {}).get(kind, []):
                    cells = [report["dataset"], name, which, row["name"], str(row["users"])]
                    for key, form in (("shrinks", ".0%"), ("change", "+.0%"), ("stays", ".0%")):
                        cells.append(spread_cell(row[key], form) if key in row else "")
                    cells += [spread_cell(row["kept"], ".2f"), rank_cell(row)]
                    lines.append([*cells, f"{row['steps']['mean']:.1f}"])
    header = ["data", "model", "cases", "without", "users", "term shrinks", "its change"]
    return table([*header, "intent stays", "kept", "rank", "steps back"], lines)


def parts_table(reports):
    """SAERec's lists without a part, and without a random direction; a row per part."""
    lines = []
    for report in reports:
        rows = report.get("saerec", {}).get("parts", [])
        for part, random in zip(rows_where(rows, name="part"), rows_where(rows, name="random")):
            cells = [report["dataset"], part["part"]]
            cells += [f"{part[key]['mean']:.2f}" for key in ("length", "cosine")]
            cells += [spread_cell(row["kept"], ".2f") for row in (part, random)]
            cells += [rank_cell(row) for row in (part, random)]
            lines.append([*cells, f"{random['kept']['p']:.2g}"])
    header = ["data", "part", "length", "cosine", "kept without it", "without a random one"]
    return table([*header, "rank without it", "without a random one", "p of kept"], lines)


def steering_table(reports):
    """What asking for more of an intent changes; a row per data set, model and wish."""
    lines = []
    for report in reports:
        for model, name in (("grounded", "Grounded"), ("saerec", "SAERec")):
            for row in report.get(model, {}).get("steering", []):
                cells = [report["dataset"], name, row["name"]]
                asked = [f"{row[f'asked {when}']['mean']:.1%}" for when in ("before", "after")]
                cells += [", ".join(asked), f"{row['kept']['mean']:.2f}"]
                for key in ("others", "largest other"):
                    p = row[key]["p"]
                    said = "" if p is None else f" (p = {p:.2g})"
                    cells.append(spread_cell(row[key], ".2%") + said)
                lines.append(cells)
    header = ["data", "model", "more of", "asked before, after", "kept", "others change"]
    return table([*header, "at most"], lines)


def beside(control, own, measure):
    """How a measure stands to its control, whose test it is."""
    if control[measure]["p"] >= LEVEL:
        return "not told apart from"
    return "more than" if own[measure]["mean"] > control[measure]["mean"] else "less than"


def fall_clause(kinds):
    """How far an item falls without its largest term, and how many bring it back."""
    largest, random, _ = rows_where(kinds["deletion"], terms=1)
    needed = kinds["back"][0]
    return (
        f"it falls by {largest['fall']['mean']:.1f} ranks, without a random one by "
        f"{random['fall']['mean']:.1f}, and needs {needed['needed']['mean']:.1f} of its "
        f"{needed['of']['mean']:.1f} terms beside its id, the largest first, to be back"
    )


def taken_clause(kinds):
    """What becomes of a term and its item without the X that evokes it."""
    evoking, _, nearest = kinds["history"]
    said = (
        f"{kinds['evoked'][0]['evoked']['mean']:.0%} of the largest terms have an X in the history;"
        f" without it the term changes by {evoking['change']['mean']:+.0%} and "
        f"{evoking['kept']['mean']:.0%} of the items stay in the list, without the nearest item "
        f"that lacks the intent {nearest['change']['mean']:+.0%} and {nearest['kept']['mean']:.0%}"
    )
    if kinds["older"]:
        evoking, _, nearest = kinds["older"]
        said += (
            f"; where X is the older of the two, {evoking['change']['mean']:+.0%} against "
            f"{nearest['change']['mean']:+.0%}, and the {evoking['kept']['mean']:.0%} that stay are"
            f" {beside(nearest, evoking, 'kept')} {nearest['kept']['mean']:.0%}"
        )
    return said


def parts_clause(kinds):
    """Which of SAERec's parts matter more to the list than a random direction."""
    said = {}
    parts = rows_where(kinds["parts"], name="part")
    for part, random in zip(parts, rows_where(kinds["parts"], name="random")):
        cell = f"{part['part']} ({part['kept']['mean']:.2f}, {random['kept']['mean']:.2f})"
        said.setdefault(beside(random, part, "kept"), []).append(cell)
    return ", ".join(f"{word} it for {', '.join(cells)}" for word, cells in said.items())


def replaced_clause(kinds):
    """What SAERec's list keeps with other intents in place of its own."""
    absent, random = kinds["replaced"]
    return f"{absent['kept']['mean']:.1%} and {random['kept']['mean']:.1%}"


def stays_clause(kinds):
    """Whether SAERec's first personal intent needs the item that carries it most."""
    evoking, _, nearest = kinds["history"]
    return (
        f"{kinds['evoked'][0]['evoked']['mean']:.0%} of the users have an item that carries their "
        f"first one; of {evoking['users']} it stays for {evoking['stays']['mean']:.0%} without "
        f"that item, {beside(nearest, evoking, 'stays')} the {nearest['stays']['mean']:.0%} "
        "without the nearest other"
    )


def steering_clause(kinds):
    """What steering does to what was asked for, and to the rest."""
    own, random = kinds["steering"]
    return (
        f"its share goes from {own['asked before']['mean']:.1%} to "
        f"{own['asked after']['mean']:.1%} of the list, and that of each other intent changes by "
        f"{own['others']['mean']:.2%}, {beside(random, own, 'others')} the "
        f"{random['others']['mean']:.2%} of random items"
    )


REASONS_SAID = (  # what, of which model, its rows, and what is said of each data set
    ("Grounded's item without its largest term", "grounded", "back", fall_clause),
    ('Grounded, "because you took X"', "grounded", "history", taken_clause),
    (
        "What SAERec's list keeps without a part, beside without a random direction as long",
        "saerec",
        "parts",
        parts_clause,
    ),
    (
        "SAERec's branches read the last item's vector too. What its list keeps where "
        "they attend to no intents at all, and to random ones, in place of theirs",
        "saerec",
        "replaced",
        replaced_clause,
    ),
    (
        "SAERec finds personal intents by the vector of the last item, not by codes, so an item "
        "that carries one need not evoke it",
        "saerec",
        "history",
        stays_clause,
    ),
    ("Grounded, asked for more of an intent", "grounded", "steering", steering_clause),
)


def reasons_findings(reports):
    """What the rows of reports say -> sentences."""
    for what, model, kind, clause in REASONS_SAID:
        said = []
        for report in reports:
            if report.get(model, {}).get(kind):
                said.append(f"on {report['dataset']} {clause(report[model])}")
        if said:
            yield f"{what}: {'; '.join(said)}."


def reasons_section(folder):
    """Whether reasons are true, by studies/reasons.py -> list of blocks. Raises UserError."""
    keys = {"dataset", "users", "grounded", "command", "commit"}
    reports = [read_report(path, keys) for path in sorted(folder.glob("reasons_*.json"))]
    if not reports:
        return []
    blocks = ["## Are the reasons true?"]
    for report in reports:
        said = f"{report['dataset']}: {report['users']} users drawn by the seed, by "
        said += f"`{report['command']}` at commit {report['commit']}."
        blocks.append(paragraph(said))
    said = (
        "The ten best items after validation histories. Means over users ± standard error; p of "
        f"paired tests, not corrected for their number, told apart where p < {LEVEL}. Ranks: how "
        "far down, with the mean reciprocal rank in brackets; it is .293 for a list as it is. Mean "
        "ranks are ruled by the few items that fall furthest; reciprocal ranks, and the share of "
        "the list that is kept, are not."
    )
    blocks += [paragraph(said), bullets(reasons_findings(reports))]
    said = (
        "Grounded's score is a sum of terms, so that the largest ones matter most to it is how "
        "sums work; how far an item falls, and how far it comes back by them alone, is measured. "
        "Of the most popular item's largest terms an item has few. A row is of the items that have "
        "more terms than it takes; a random one may be the largest itself."
    )
    blocks += [paragraph(said), deletion_table(reports)]
    said = (
        "Because you took X: the history without the item that carries the intent of an item's "
        "largest term most, its age counted; of SAERec, that of its first personal intent. What is "
        "left keeps its age in the match. Steps back: how long ago that item was taken. The last "
        "items of a history matter much to a model, whatever they carry: so mind the cases where X "
        "is older than the nearest without it."
    )
    blocks += [paragraph(said), taken_table(reports)]
    if any("saerec" in report for report in reports):
        said = (
            "SAERec without a part of u. Length: of the part, u's being 1; cosine: of both. A part "
            "along u leaves the order as it is, and a random direction as long turns u more: that "
            "a list keeps more without the part than without it says nothing against the part "
            "where the cosine is high."
        )
        blocks += [paragraph(said), parts_table(reports)]
    said = (
        "Steering at strength 1. Asked: the share of the list that carries the intent. Others: "
        "mean change, up or down, of the shares of the other intents that either list has, and the "
        "largest of them. Random items: as many as carry the intent, moved as far."
    )
    return [*blocks, paragraph(said), steering_table(reports)]


# How the library is trained


def library_section(folder):
    """What each way to train the SAE is worth, by studies/library.py -> list of blocks."""
    paths = sorted(folder.glob("library_*.json"))
    if not paths:
        return []
    said = (
        "Means of three seeds. FVU, words (AUROC of keywords, median and share above .8) and "
        "meaning (the same of labels) are on held-out texts; kept are the intents that at least "
        "half of the other SAEs find. Agreement: best cosine of each kept intent among those of "
        "another seed, share above .7; one to one; floor: the best cosine among random directions. "
        "A single SAE has no others, so none is left out for them: part of what the average gains "
        "is that latents which do not come back are left out. With fewer active latents K only a "
        "text's strongest codes count, which raises words and meaning whatever the names: these "
        "are no truer (docs/method.md)."
    )
    blocks = ["## How the library is trained", paragraph(said)]
    header = [
        "data", "way", "FVU", "kept", "words", "meaning", "agreement", "one to one", "floor",
    ]  # fmt: skip
    rows = []
    for path in paths:
        report = read_report(path, {"dataset", "rows", "command", "commit"})
        blocks.append(paragraph(f"By `{report['command']}` at commit {report['commit']}."))
        rows += [[report["dataset"], *library_cells(row)] for row in report["rows"]]
    return [*blocks, table(header, rows)]


def library_cells(row):
    """A row of studies/library.py in cells."""
    scores = []
    for key in ("detection_auroc", "meaning_auroc"):
        known = f"{key}_median" in row
        pair = f"{row.get(f'{key}_median', 0):.2f}, {row.get(f'{key}_above_08', 0):.0%}"
        scores.append(pair if known else "")
    agreement = f"{row['mean_cosine']:.2f}, {row['above_07']:.0%}"
    cosines = [agreement, f"{row['matched_cosine']:.2f}", f"{row['floor_mean_cosine']:.2f}"]
    return [row["way"], f"{row['fvu']:.3f}", f"{row['kept']:.0f}", *scores, *cosines]


# Intents to look at


def score_cell(score):
    """An AUROC, or None, in a cell."""
    return "" if score is None else f"{score:.2f}"


def in_cell(text):
    """Text that a cell of a table can hold."""
    return text.replace("|", "\\|")


def sample_section(folder):
    """The intents that studies/sample.py drew -> list of blocks. Raises UserError."""
    path = folder / "intents_ml-100k.json"
    if not path.is_file():
        return []
    report = read_report(path, {"command", "commit", "of", "drawn"})
    drawn = report["drawn"]
    count = "Thirty" if len(drawn) == 30 else f"{len(drawn):,}"
    said = (
        f"By `{report['command']}` at commit {report['commit']}, of {report['of']:,} intents, none "
        "left out. Support: other SAEs that found the intent too. Words and meaning: AUROC with "
        "which its keywords, and the meaning of its label, tell held-out texts that it fires on, if"
        " these are 3 or more."
    )
    rows = []
    for row in drawn:
        cells = [in_cell(row["label"]), in_cell("; ".join(row["items"])), str(row["support"])]
        scores = ["", ""]
        if row["detection_texts"] >= 3:
            scores = map(score_cell, (row["detection_auroc"], row["meaning_auroc"]))
        rows.append([*cells, *scores])
    header = ["label", "top items", "support", "words", "meaning"]
    title = f"## {count} intents of MovieLens 100K, drawn by a fixed seed"
    verdicts, by = read_verdicts(folder, [row["label"] for row in drawn])
    if verdicts:
        header.append("true of the items")
        rows = [[*row, verdict] for row, verdict in zip(rows, verdicts)]
    return [title, paragraph(f"{said} {by}".strip()), table(header, rows)]


def read_verdicts(folder, labels):
    """How a reader judged each label -> (list of str, what was asked); empty if nobody did.

    Raises UserError if the verdicts are of other labels.
    """
    path = folder / "judged_ml-100k.json"
    if not path.is_file():
        return [], ""
    report = read_report(path, {"verdicts", "by"})
    strange = [label for label in labels if label not in report["verdicts"]]
    if strange:
        raise UserError(f"{path} has no verdict on {strange[0]!r}: judge again, or delete it")
    return [report["verdicts"][label] for label in labels], report["by"]


def goals_section(path, what):
    """What something was, should be and is, by a JSON file -> list of blocks. Raises UserError."""
    if not path.is_file():
        return []
    report = read_report(path, {"command", "commit", "rows"})
    header = ["what", "before", "goal", "now", "reached"]
    rows = [[in_cell(row[name]) for name in header] for row in report["rows"]]
    said = f"By `{report['command']}` at commit {report['commit']}."
    return [f"## {what}: before, goal, now", paragraph(said), table(header, rows)]


def choice_row(report, name):
    """A row of the table of a choice: mean over seeds, and against the first row, seed by seed."""
    first = next(iter(report["valid"].values()))
    values = report["valid"][name]
    mean = sum(values.values()) / len(values)
    cells = [report["dataset"], name, str(len(values))]
    cells.append(f"{mean:.4f}{spread_of(list(values.values()))}")
    differences = [value - first[seed] for seed, value in values.items() if seed in first]
    if any(differences):
        gain = sum(differences) / len(differences)
        return [*cells, f"{gain:+.4f}{spread_of(differences)}"]
    return [*cells, ""]


def spread_of(values):
    """The standard error of a mean in words, "" of a single value."""
    error = standard_error(values)
    return "" if error is None else f" ±{error:.4f}"


def choice_section(folder, ablations):
    """What was chosen on validation by studies/choose.py -> list of blocks. Raises UserError.

    ablations: reports that have the same rows of a later library.
    """
    keys = {"dataset", "valid", "model_flags"}
    reports = [read_report(path, keys) for path in sorted(folder.glob("choice_*.json"))]
    if not reports:
        return []
    said = (
        "Validation NDCG@10 of Grounded, of it with parts that an earlier model had, and of its "
        "control; mean ± standard error over seeds, by `studies/choose.py` with "
        f"`--model-flags '{reports[0]['model_flags']}'`; test items were not ranked. The "
        "difference is taken seed by seed. A part was to stay if it earns more than one standard "
        "error on either data set. Mind the seeds: after the first three of rt_critics both parts "
        "would have stayed (+0.0029 ±0.0027 and +0.0022 ±0.0011); three more took that back."
    )
    rows = [choice_row(report, name) for report in reports for name in report["valid"]]
    header = ["data", "row", "seeds", "validation NDCG@10", "against Grounded"]
    blocks = ["## What Grounded holds", paragraph(said), table(header, rows)]
    return [*blocks, *(paragraph(said) for report in ablations for said in choice_later(report))]


def choice_later(report):
    """What an ablation says of the parts that Grounded went without -> at most one sentence."""
    names = ("Grounded", "Grounded + P d", "Grounded + next intent", "Grounded + P d + next intent")
    valid = {row["name"]: row["valid NDCG@10"] for row in report["rows"]}
    test = means(report)
    apart = [one["b"] for one in report["tests"] if one["a"] == names[0] and one["p_holm"] < LEVEL]
    told = ", ".join(name for name in names if name in apart) or "none"
    if valid.keys() >= set(names):
        pairs = [f"{name} {valid[name]:.4f} / {test[name]:.4f}" for name in names]
        yield (
            "The library was then that of a single SAE from random rows (commit 6ee0749), and the "
            f"choice was not made again. With four that are averaged (commit {report['commit']}), "
            f"validation / test NDCG@10 on {report['dataset']} are: {'; '.join(pairs)} (the "
            f"ablation below); told apart from Grounded on test: {told}."
        )


def grid_section(folder):
    """The small grid that the control was tuned by, too -> list of blocks. Raises UserError."""
    keys = {"dataset", "valid", "model_flags", "command", "commit"}
    reports = [read_report(path, keys) for path in sorted(folder.glob("grid_*.json"))]
    if not reports:
        return []
    names = list(reports[0]["valid"])
    seeds = len(reports[0]["valid"][names[0]])
    said = (
        f"Validation NDCG@10 of {seeds} seed(s), of the same small grid for the control and for "
        f"Grounded, by `{reports[0]['command']}` and so on at commit {reports[0]['commit']}; test "
        "items were not ranked. What no flag names has its default. Beyond this grid the weight of "
        "Grounded's match was chosen on validation, which its control does not have. The defaults "
        "stay: what another dropout gains, it gains both."
    )
    grid = table(["data", "flags", *names], choice_rows(reports, names))
    return ["## Is the control tuned as well?", paragraph(said), grid]


def choice_rows(reports, names):
    """Validation NDCG@10 of rows of these names, in the mean of their seeds; a report a row."""
    rows = []
    for report in reports:
        cells = [report["dataset"], f"`{report['model_flags']}`"]
        for name in names:
            values = report["valid"].get(name, {}).values()
            cells.append(f"{sum(values) / len(values):.4f}" if values else "")
        rows.append(cells)
    return rows


def match_section(folder):
    """The weight of the match for codes of several kinds -> list of blocks. Raises UserError."""
    keys = {"dataset", "valid", "model_flags", "command", "commit"}
    reports = [read_report(path, keys) for path in sorted(folder.glob("match_*.json"))]
    if not reports:
        return []
    said = (
        "Larger codes want a smaller weight of the match, so that one weight for all kinds of "
        "codes would not be fair. Grounded's default, .5, was chosen for an earlier library. With "
        "this one 1 is better on scientific, but on beauty, whose texts are thin, .0751 (one seed) "
        "in place of .0770 to .0772 (three; `model.py --run runs/beauty --patience 5 --match 1`, "
        "one thread, commit f1c8f65): so .5 stays. Validation NDCG@10, of as many seeds as is "
        "said; test items were not ranked. By "
        f"`{reports[0]['command']}` and so on at commit {reports[0]['commit']}."
    )
    names = list(dict.fromkeys(name for report in reports for name in report["valid"]))
    rows = choice_rows(reports, names)
    for row, report in zip(rows, reports):
        row.insert(2, str(max(map(len, report["valid"].values()))))
    grid = table(["data", "flags", "seeds", *names], rows)
    return ["## Which weight of the match suits which codes?", paragraph(said), grid]


def results_document(folder, ablations):
    """docs/results.md -> str. Raises UserError."""
    protocol = [
        f"Protocol, the same for all: {ablations[0]['protocol']}.",
        "A run's test items are ranked once per seed. All rows of a table have the same data and "
        "seeds. The test makes 10,000 permutations, so among n comparisons no p can be under n / "
        "10,001. Holm's correction is over the comparisons of one section: where two sections have "
        "the same pair, as they do on scientific, p is smaller in the one that compares less.",
        "The tests are over users, with the seeds that were drawn: other seeds, or another "
        "library, may move a mean by more than ± says. Rows of one data set share its library of "
        "intents; intents of another kind are made anew for each seed.",
    ]
    blocks = ["# Results", GENERATED, "## What was measured", *map(paragraph, protocol)]
    blocks += paper_section(folder)
    blocks += choice_section(folder, ablations)
    blocks += grid_section(folder)
    blocks += match_section(folder)
    for report in ablations:
        blocks += ablation_section(report)
    blocks += cold_section(folder)
    blocks += written_section(folder)
    blocks += interpret_section(folder)
    blocks += reasons_section(folder)
    blocks += library_section(folder)
    blocks += goals_section(folder / "intents_goals.json", "The library of intents")
    blocks += sample_section(folder)
    return "\n\n".join(blocks) + "\n"


# Speed

SPEED_NOTES = (
    "Other libraries' SASRec has the width, blocks, heads, dropout, history and learning rate of "
    "ours, a softmax over all items, the same interactions and threads; batches, loss and "
    "optimizer are the library's own, and what it wraps around them is left out. They were "
    "installed by `pip install torch==2.13.0 'rectools[torch]==0.19.0' "
    "sentence-transformers==6.2.0` in one environment and `pip install torch==2.13.0 "
    "recbole==1.2.1 'numpy<2' 'pandas<2.3' 'scipy<1.12'` in another, whose Pythons `--peers` "
    "names.",
    "Idle threads spin 1,000 times by default: idle that costs 7% and 34% (ml-100k, two runs), 14% "
    "(beauty), 19% and 21% (the SAE) over GNU OpenMP's own 300,000, and beside a busy process on "
    "one of two cores training takes 1.8 to 2.3 times as long in place of 3.2 to 4.8. One thread "
    "(`OMP_NUM_THREADS=1`) does not feel a neighbour, and where the work is small it is then the "
    "fastest. So `make all` runs two stages at a time, each with half of the threads: on two "
    "cores, idle, all after embed.py took 4 min 11 s in place of 7 min 18 s (commit 0bad533, "
    "ml-100k). Intel's OpenMP, loaded in place of GNU's, waits by KMP_BLOCKTIME: 1 ms did as well "
    "as its default of 200 (busy 2.5 to 2.8 times idle), 0 made idle 1.4 to 1.7 times as slow "
    "(commit 1ce5f9f, ml-100k), so it is left alone.",
    "The floor is the time of the matrix products alone, at the rate that products of the "
    "catalogue's own shape reach: their inner size is 64, the width, so they are slower than "
    "square ones.",
    "Sampled softmax (studies/sampled.py) is quicker per epoch but learned less in the same epochs "
    "(commit 99713b1, Intel Xeon): validation NDCG@10 of SASRec on beauty after 12 epochs .0648 "
    "with all items, .0509 with 256 negatives, .0605 with 1,024, .0638 with 4,096. So the full "
    "softmax is the default.",
    "A corpus larger than memory trains: with 1.43 GiB of embeddings under a limit of 1 GiB sae.py "
    "took 1.8 s per step on one thread, because rows are read at random from the disk; it was "
    "stopped after 225 of 300 steps.",
    "An epoch of Beauty takes the authors' SAERec 490 s on 2 cores with AVX2, half as wide as "
    "AVX-512. All models stand beside it, and beside SAERec's loop over prefixes, but SAERec's row "
    "alone compares like with like; SASRec's own loop is in speed_peers_beauty.",
    "No GPU was at hand: nothing is claimed of one.",
)


def speed_rows(report):
    """Rows of the table of a report of studies/speed.py."""
    for row in report["rows"]:
        value = f"{row['value']:,.0f}" if row["value"] >= 100 else f"{row['value']:.3g}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f}"
        yield [row["name"], value, row["unit"], row["against"], ratio]


def speed_document(folder):
    """docs/speed.md -> str. Raises UserError."""
    paths = sorted(folder.glob("speed*.json"))
    if not paths:
        raise UserError(f"{folder} has no speed*.json: make one with `studies/speed.py`")
    said = (
        "What is compared took turns on the same machine, and ratios are of medians: times as fast "
        "as *against*, but times as slow for *times ours*, *time / floor* and *idle*. Of the SAE, "
        "*dense* gives every pre-activation and decoder row a gradient (K = 8). A *slope* is the "
        "power of ten that ten times as many users, items or texts cost: 1 is linear."
    )
    blocks = ["# Speed", GENERATED, paragraph(said), bullets(SPEED_NOTES)]
    blocks += goals_section(folder / "goals_speed.json", "Goals")
    for path in paths:
        report = read_report(path, {"machine", "torch", "commit", "command", "rows"})
        said = f"On {report['machine']}, torch {report['torch']}, commit {report['commit']}, by"
        blocks += [f"## {path.stem}", paragraph(f"{said} `{report['command']}`.")]
        header = ["what", "value", "unit", "against", "ratio"]
        blocks.append(table(header, list(speed_rows(report))))
    return "\n\n".join(blocks) + "\n"


# README


def readme_table(folder):
    """README's table of results -> str. Raises UserError."""
    return wide_table(read_tables(folder))


def read_exactly(path):
    """A text file with its line ends as they are -> str."""
    return path.read_bytes().decode("utf-8")


def with_table(path, text):
    """The file with a text between its two markers -> str. Raises UserError if it lacks them."""
    content = read_exactly(path)
    once = content.count(BEGIN) == content.count(END) == 1
    before, begin, rest = content.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    if not (once and begin and end):
        problem = f"{path} lacks the lines {BEGIN} and {END}, once each"
        raise UserError(f"{problem}: put both back where the table of results belongs")
    return f"{before}{begin}\n{text}\n\n{end}{after}"


# All of it


def generated(settings):
    """What each generated file should hold: {path: str}. Raises UserError."""
    results = Path(settings.results)
    docs = Path(settings.docs)
    readme = Path(settings.readme)
    ablations = read_ablations(results)
    return {
        docs / "results.md": results_document(results, ablations),
        docs / "speed.md": speed_document(results),
        readme: with_table(readme, readme_table(results)),
    }


def write_docs(settings):
    """Write what is generated, or say what is out of date. Raises UserError."""
    outdated = []
    for path, content in generated(settings).items():
        if not path.is_file() or read_exactly(path) != content:
            outdated.append((path, content))
    names = ", ".join(str(path) for path, _ in outdated)
    if settings.check and outdated:
        raise UserError(f"{names}: not what {settings.results} says; run `python studies/docs.py`")
    for path, content in outdated:
        write_lines(path, [content.removesuffix("\n")])
    print(f"written: {names or 'nothing, all is up to date'}")


def main(argv=None):
    return run_command(argv, __doc__, docs=(DocsSettings, write_docs))


if __name__ == "__main__":
    sys.exit(main())
