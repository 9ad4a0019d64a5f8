"""Generated documentation against the committed results, and against small ones by hand."""

import json
import shutil

import pytest

import saerec
from studies import docs
from studies.ablate import ALSO, FIRST, ROWS
from studies.significance import with_spread

RESULTS = saerec.HERE / "studies" / "results"


def row(name, ndcg, **more):
    """A row of an ablation with one seed; everything but NDCG@10 is made up."""
    cell = dict(mean=ndcg, std=None, per_seed=[ndcg])
    groups = {"short histories": ndcg / 2, "rare targets": ndcg / 4}
    one = dict(name=name, params=1234, seconds=5.4, groups=groups)
    one |= {"valid NDCG@10": 2 * ndcg, "NDCG@10": cell, "HR@10": cell | dict(mean=3 * ndcg)}
    return one | more


def ablation(**more):
    """A report as ablate.py writes it, with rows that are compared with different ones."""
    rows = [row("Grounded", 0.09), row("SASRec", 0.08), row("SAERec", 0.075)]
    rows += [row("popularity", 0.01, **{"valid NDCG@10": None}), row("SAERec, random", 0.05)]
    tests = []
    for a, b, p in (("Grounded", "SASRec", 0.002), ("Grounded", "popularity", 0.001)):
        tests.append(dict(a=a, b=b, metric="NDCG@10", difference=0.01, p=p, p_holm=2 * p))
    for a, b in (("SAERec", "SAERec, random"), ("SAERec", "SASRec")):
        tests.append(dict(a=a, b=b, metric="NDCG@10", difference=-0.005, p=0.25, p_holm=0.5))
    report = dict(dataset="scientific", users=9, protocol="P", seeds=[0], rows=rows, tests=tests)
    report |= dict(verdict="Nothing is worse.", command="python x.py", commit="abc")
    return report | more


def write(path, report):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report))


@pytest.fixture
def house(tmp_path):
    """A folder with the committed results and a README with markers -> its flags for docs.py."""
    shutil.copytree(RESULTS, tmp_path / "results")
    (tmp_path / "README.md").write_text(f"before\n{docs.BEGIN}\nold\n{docs.END}\nafter\n")
    flags = ["--results", tmp_path / "results", "--docs", tmp_path / "docs"]
    return [*map(str, flags), "--readme", str(tmp_path / "README.md")]


def test_the_documentation_says_what_was_measured(monkeypatch, capsys):
    monkeypatch.chdir(saerec.HERE)
    assert docs.main(["--check"]) == 0, capsys.readouterr().err


def test_every_number_is_in_the_documents(house, tmp_path):
    assert docs.main(house) == 0
    results = (tmp_path / "docs" / "results.md").read_text()
    ablations = sorted(RESULTS.glob("ablation_*.json"))
    interpreted = sorted(RESULTS.glob("interpret_*.json"))
    assert ablations and interpreted
    for report in docs.read_ablations(RESULTS):
        for one in report["rows"]:
            cells = [one["name"], with_spread(one["NDCG@10"]), with_spread(one["HR@10"])]
            begin = f"| {' | '.join(cells)} |"
            lines = [line for line in results.split("\n") if line.startswith(begin)]
            expected = [f" {value:.4f} |" for value in one["groups"].values()]
            expected.append(f" {one['params']:,} |")
            assert any(all(cell in line for cell in expected) for line in lines), begin
    for path in interpreted:
        report = json.loads(path.read_text())
        for label in filter(lambda one: one["intents"], report["labels"].values()):
            spread = f"{label['median']:.2f}, {label['above_08']:.0%}; {label['intents']} judged"
            assert spread in results
        for one in report.get("recovery", []):
            found = f"{one['recovered']:.0%} | {one['mean_cosine']:.2f} | {one['auroc']:.2f}"
            assert f"| {one['method']} | {one['K'] or ''} | {one['M']:,} | {found} |" in results
    for path in sorted(RESULTS.glob("reasons_*.json")):
        for model in ("grounded", "saerec"):
            kinds = json.loads(path.read_text())[model]
            for row in [*kinds.get("deletion", []), *kinds.get("parts", []), *kinds["history"]]:
                fall = row["fall"]
                assert f"{fall['mean']:+.1f} ±{fall['error']:.1f} (" in results
    speed = (tmp_path / "docs" / "speed.md").read_text()
    rows = 0
    for path in sorted(RESULTS.glob("speed*.json")):
        report = json.loads(path.read_text())
        assert report["commit"] in speed and report["command"] in " ".join(speed.split())
        for one in report["rows"]:
            value = f"{one['value']:,.0f}" if one["value"] >= 100 else f"{one['value']:.3g}"
            assert f" | {value} | " in speed
        rows += 2 + len(report["rows"])
    goals = json.loads((RESULTS / "goals_speed.json").read_text())["rows"]
    assert all(f"| {one['what']} | {one['before']} | {one['goal']} | " in speed for one in goals)
    assert speed.count("\n| ") == rows + 2 + len(goals) > 4


def test_readme_changes_between_its_markers_alone(house, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_bytes(f"a\r\n| b |\n\n{docs.BEGIN}\n{docs.END}\nc\u2028d\n".encode())
    assert docs.main(house) == 0
    content = readme.read_bytes().decode()
    before, between, after = content.replace(docs.END, docs.BEGIN).split(docs.BEGIN)
    assert (before, after) == ("a\r\n| b |\n\n", "\nc\u2028d\n")
    assert between.startswith("\n\n| data | item kNN by texts |") and between.endswith("\n\n")
    capsys.readouterr()
    assert docs.main(house) == 0
    assert "nothing, all is up to date" in capsys.readouterr().out
    assert readme.read_bytes().decode() == content


def paper_table(dataset, grounded=0.09, **more):
    """A report of the six rows as ablate.py writes it, and Grounded without match."""
    values = {"Grounded": grounded, "Grounded without match": 0.07, "popularity": 0.01}
    values |= {"item kNN by texts": 0.06, "SASRec": 0.08, "SASRec + text": 0.085, "SAERec": 0.075}
    rows = [row(name, ndcg) for name, ndcg in values.items()]
    rows[3]["NDCG@10"]["std"] = 0.0
    return ablation(**dict(dataset=dataset, rows=rows) | more)


def test_readme_rows_by_hand(tmp_path):
    """In the order of the paper, whatever the files are called."""
    write(tmp_path / "table_a.json", paper_table("scientific"))
    write(tmp_path / "table_b.json", paper_table("beauty", seeds=[0, 1]))
    said = docs.readme_table(tmp_path)
    assert said.split("\n")[2:] == [
        "| beauty | 0.0600 | 0.0800 | 0.0850 | 0.0750 | 0.0900 | +12.5% |",
        "| scientific (one seed) | 0.0600 | 0.0800 | 0.0850 | 0.0750 | 0.0900 | +12.5% |",
    ]


def test_the_papers_data_by_hand(tmp_path):
    """What was hoped for stands beside what came, reached or not."""
    assert docs.paper_section(tmp_path) == []
    cases = (("beauty", 0.0632, "was reached"), ("toys", 0.0656, "was not reached"))
    cases += (("scientific", 0.091, "was not reached"), ("sports", 0.0367, "was reached"))
    for name, grounded, _ in cases:
        write(tmp_path / f"table_{name}.json", paper_table(name, grounded))
    said = " ".join("\n\n".join(docs.paper_section(tmp_path)).split())
    parts = said.split(" ### ")[1:]
    assert [part.split()[0] for part in parts] == ["beauty", "toys", "sports", "scientific"]
    by_name = {part.split()[0]: part for part in parts}
    for name, grounded, reached in cases:
        assert reached in by_name[name]
        assert f"Grounded has {grounded / 0.08:.2f} times SASRec's NDCG@10" in by_name[name]
        assert ("Published on the same file" in by_name[name]) == (name != "scientific")
        assert "By `python x.py` at commit abc." in by_name[name]
        assert f"| Grounded | {grounded:.4f} |" in by_name[name]
    assert "0.0632 / 0.1066 (what was ours" in by_name["beauty"]


def test_a_section_by_hand(tmp_path):
    write(tmp_path / "ablation_scientific.json", ablation())
    [report] = docs.read_ablations(tmp_path)
    _, said, _, points, table = docs.ablation_section(report)
    assert said.startswith("9 users, mean ± standard deviation over 1 seed(s).")
    assert said.endswith("By `python x.py` at commit abc.")
    assert [" ".join(point.split()) for point in points.split("\n- ")] == [
        "- Does SAERec gain by its intents? SAERec has 0.0750; not told apart from it: SASRec 0.0800 "
        "(p = 0.5).",
        "Does Grounded gain by its intents, and by what they are used for? Grounded has 0.0900; "
        "worse than it: SASRec 0.0800 (p = 0.004).",
        "How do other models compare? Grounded has 0.0900; worse than it: popularity 0.0100 (p = 0.002).",
        "On rare targets Grounded is highest with 0.0225 (SASRec 0.0200; no test).",
    ]
    header, _, *lines = table.split("\n")
    assert header.split(" | ")[-4:-2] == ["short histories", "rare targets"]
    assert lines == [
        "| Grounded | 0.0900 | 0.2700 | 0.1800 |  | 0.0450 | 0.0225 | 1,234 | 5 |",
        "| SASRec | 0.0800 | 0.2400 | 0.1600 | -0.0100, 0.004 against Grounded; "
        "+0.0050, 0.5 against SAERec | 0.0400 | 0.0200 | 1,234 | 5 |",
        "| SAERec | 0.0750 | 0.2250 | 0.1500 |  | 0.0375 | 0.0187 | 1,234 | 5 |",
        "| SAERec, random | 0.0500 | 0.1500 | 0.1000 | +0.0050, 0.5 against SAERec | "
        "0.0250 | 0.0125 | 1,234 | 5 |",
        "| popularity | 0.0100 | 0.0300 |  | -0.0100, 0.002 against Grounded | "
        "0.0050 | 0.0025 | 1,234 | 5 |",
    ]


def test_every_row_of_an_ablation_answers_one_question():
    answered = [name for _, _, names in docs.QUESTIONS for name in names]
    assert sorted(answered) == sorted([*(ROWS.keys() - {FIRST}), *(b for a, b in ALSO)])
    for _, reference, names in docs.QUESTIONS:
        for name in names:
            assert ROWS[name].against == reference or (reference, name) in ALSO


def test_a_grid_by_hand(tmp_path):
    assert docs.grid_section(tmp_path) == []
    report = dict(dataset="films", command="python studies/choose.py", commit="abc")
    for name, flags, values in (("a", "--lr 0.01", (0.1, 0.2)), ("b", "--lr 0.1", (0.3, 0.4))):
        valid = {"SASRec": {"0": values[0], "1": values[1]}, "Grounded": {"0": 0.5}}
        write(tmp_path / f"grid_{name}.json", report | dict(valid=valid, model_flags=flags))
    title, said, table = docs.grid_section(tmp_path)
    said = " ".join(said.split())
    assert said.startswith("Validation NDCG@10 of 2 seed(s)")
    assert "by `python studies/choose.py` and so on at commit abc" in said
    assert table.split("\n") == [
        "| data | flags | SASRec | Grounded |",
        "| --- | --- | --- | --- |",
        "| films | `--lr 0.01` | 0.1500 | 0.5000 |",
        "| films | `--lr 0.1` | 0.3500 | 0.5000 |",
    ]


def test_weights_of_the_match_by_hand(tmp_path):
    """Rows that were not trained with a weight are empty; the mean is over the seeds there are."""
    assert docs.match_section(tmp_path) == []
    report = dict(dataset="films", command="python studies/choose.py", commit="abc")
    valid = {"k-means": {"0": 0.1}}
    write(tmp_path / "match_a.json", report | dict(valid=valid, model_flags="--match 0.1"))
    valid = {"k-means": {"0": 0.2, "1": 0.3}, "Grounded": {"0": 0.5, "1": 0.7}}
    write(tmp_path / "match_b.json", report | dict(valid=valid, model_flags="--match 1"))
    _, said, table = docs.match_section(tmp_path)
    assert "By `python studies/choose.py` and so on at commit abc." in " ".join(said.split())
    assert table.split("\n")[2:] == [
        "| films | `--match 0.1` | 1 | 0.1000 |  |",
        "| films | `--match 1` | 2 | 0.2500 | 0.6000 |",
    ]


def cold_row(name, *ndcg):
    """A row as cold.py writes it, with NDCG@10 in its four rankings; HR@10 and MRR are made up."""
    rankings = {}
    for ranking, value in zip(("cold", "all", "warm", "warm in all"), ndcg):
        cell = dict(mean=value, std=0.01, per_seed=[value, value])
        rankings[ranking] = {"NDCG@10": cell, "HR@10": cell, "MRR": cell | dict(mean=value / 2)}
    return dict(name=name) | rankings


def test_cold_items_by_hand(house, tmp_path):
    assert docs.cold_section(tmp_path) == []
    rows = [cold_row("Grounded", 0.2, 0.1, 0.05, 0.04), cold_row("kNN", 0.3, 0.05, 0.04, 0.05)]
    level = {"NDCG@10": 0.0125, "HR@10": 0.25, "MRR": 0.5}
    report = dict(dataset="films", share=0.1, cold_items=12, warm_items=1234, users=99, rows=rows)
    report |= dict(warm_users=2345, seeds=[0, 1], chance=dict(cold=level, all=level))
    report |= dict(protocol="the last item", command="python studies/cold.py", commit="abc")
    same = dict(a="Grounded", b="kNN", metric="NDCG@10", p=0.001)
    tests = [same | dict(ranking="cold", difference=-0.1, p_holm=0.002)]
    report["tests"] = [*tests, same | dict(ranking="all", difference=0.05, p_holm=0.25)]
    write(tmp_path / "cold" / "cold_films.json", report)
    title, said, protocol, made, found, table = docs.cold_section(tmp_path / "cold")
    assert title == "## Items that no one has bought yet"
    assert said.startswith("10% of the items of films, 12 chosen by a hash of their id, are cold")
    assert "1,234 other items" in said and "over 2 seed(s)" in " ".join(said.split())
    assert protocol == "Protocol: the last item."
    assert made == "By `python studies/cold.py` at commit abc."
    found = " ".join(found.split())
    alone = "Grounded has an NDCG@10 of 0.2000, worse than kNN at 0.3000 (p = 0.002)"
    assert f"Among the cold items alone, {alone}; chance is 0.0125." in found
    assert "of 0.1000, not told apart from kNN at 0.0500 (p = 0.25); chance" in found
    assert "changes: Grounded -20.0%, kNN +25.0%." in found
    spread = "0.2000 ±0.0100 | 0.2000 ±0.0100 | 0.1000 ±0.0100"
    assert table.split("\n")[2] == (
        "| chance, expected | 0.0125 | 0.2500 | 0.5000 | 0.0125 | 0.2500 | 0.5000 |  |  |"
    )
    assert table.split("\n")[3].startswith(f"| Grounded | {spread} | 0.1000 ±0.0100 |")
    assert table.split("\n")[3].endswith("| 0.0500 ±0.0100 | 0.0400 ±0.0100 |")
    write(tmp_path / "results" / "cold_films.json", report)
    assert docs.main(house) == 0
    assert table in (tmp_path / "docs" / "results.md").read_text()


def interpreted(**more):
    """A report as interpret.py writes it."""
    own = dict(intents=3, of=5, median=0.8, above_08=0.5)
    labels = {"SAE": own, "k-means, clusters as large": own | dict(median=0.9)}
    same = dict(mean_cosine=0.44, above_07=0.03, above_09=0.0)
    others = dict(kmeans=same | dict(mean_cosine=0.45), texts=same | dict(mean_cosine=0.3))
    others |= dict(floor=dict(mean_cosine=0.17, above_07=0.0, above_09=0.0))
    return dict(dataset="films", labels=labels, told=0.75, stability=same) | others | more


def test_interpretability_by_hand(tmp_path):
    write(tmp_path / "interpret_films.json", interpreted())
    write(tmp_path / "interpret_none.json", interpreted(dataset="none"))
    blocks = docs.interpret_section(tmp_path)
    said = " ".join("\n".join(blocks).split())
    assert "commit" not in said  # which former results lack
    assert "cosine is 0.44 (0.45 of k-means' centroids, 0.30 among random texts, 0.17 among" in said
    assert "median AUROC of 0.90, the SAE's 0.80" in said
    assert "for 75% of the intents each word of the name is said by two of the five" in said
    *_, table = blocks
    assert table.split("\n") == [
        "|  | films | none |",
        "| --- | --- | --- |",
        "| keywords of SAE | 0.80, 50%; 3 judged of 5 | 0.80, 50%; 3 judged of 5 |",
        "| keywords of k-means, clusters as large | 0.90, 50%; 3 judged of 5 "
        "| 0.90, 50%; 3 judged of 5 |",
        "| intents among another seed's | 0.44, 3% | 0.44, 3% |",
        "| k-means' centroids among another seed's | 0.45, 3% | 0.45, 3% |",
        "| intents among random texts | 0.30, 3% | 0.30, 3% |",
        "| intents among random directions | 0.17, 0% | 0.17, 0% |",
    ]


def test_one_to_one_is_told_where_it_was_measured(tmp_path):
    same = dict(mean_cosine=0.9, above_07=0.8, above_09=0.5, matched_cosine=0.856)
    floor = same | dict(mean_cosine=0.2, above_07=0.0, matched_cosine=0.141)
    write(tmp_path / "interpret_films.json", interpreted(stability=same, floor=floor))
    *blocks, table = docs.interpret_section(tmp_path)
    assert "One to one: " in "\n".join(blocks)
    assert "| intents among another seed's | 0.90, 80%; one to one 0.86 |" in table
    assert "| intents among random directions | 0.20, 0%; one to one 0.14 |" in table


def reason(name, p=None, **means):
    """A row of reasons.json; standard errors are a tenth of the means."""
    more = {key: means.pop(key) for key in ("terms", "part") if key in means}
    row = dict(name=name, users=7, items=70) | more
    for measure, mean in means.items():
        row[measure] = dict(mean=mean, error=abs(mean) / 10, p=p)
    return row


def explained(**more):
    """A report as reasons.py writes it, of Grounded alone."""
    deletion = []
    insertion = []
    for terms in (0, 1):
        for name, fall in (("largest", 20), ("random", 5), ("most popular item's", 1)):
            ranks = dict(terms=terms, reciprocal=0.25, kept=0.5)
            deletion.append(reason(name, **ranks, fall=terms * fall))
            if fall > 1:
                insertion.append(reason(name, **ranks, fall=30 - terms * fall))
    back = [reason("largest", needed=2.5, of=6.0), reason("random", 0.001, needed=4.0, of=6.0)]
    taken = dict(reciprocal=0.25, fall=12.0, steps=3.0, shrinks=0.9)
    history = [
        reason("the item that evokes it", change=-0.4, kept=0.3, **taken),
        reason("a random item without it", 0.001, change=0.1, kept=0.9, **taken),
        reason("the nearest without it", 0.001, change=0.2, kept=0.8, **taken),
    ]
    asked = {"asked before": 0.01, "asked after": 0.2, "kept": 0.8, "largest other": 0.3}
    steering = [reason("an intent", others=0.02, **asked)]
    steering.append(reason("random items", 0.5, others=0.03, **asked))
    grounded = dict(deletion=deletion, insertion=insertion, back=back, steering=steering)
    history[0]["kept"]["p"] = 0.5  # as that of a control, in older
    grounded |= dict(evoked=[reason("all", evoked=0.75)], history=history, older=history[::-1])
    report = dict(dataset="films", users=7, command="python studies/reasons.py", commit="abc")
    return report | dict(grounded=grounded) | more


def test_reasons_by_hand(tmp_path):
    assert docs.reasons_section(tmp_path) == []
    write(tmp_path / "reasons_films.json", explained())
    title, of, _, points, *_ = blocks = docs.reasons_section(tmp_path)
    assert title == "## Are the reasons true?"
    assert of.startswith("films: 7 users drawn by the seed, by `python studies/reasons.py`")
    said = " ".join(points.split())
    assert "SAERec" not in said
    assert "falls by 20.0 ranks, without a random one by 5.0, and needs 2.5 of its 6.0" in said
    assert "75% of the largest terms have an X in the history" in said
    assert "the term changes by -40% and 30% of the items stay in the list, without the" in said
    assert "nearest item that lacks the intent +20% and 80%; where X is the older of the" in said
    assert "two, +20% against -40%, and the 80% that stay are not told apart from 30%." in said
    assert "from 1.0% to 20.0% of the list" in said
    assert "changes by 2.00%, not told apart from the 3.00% of random items" in said
    tables = [block.split("\n")[2:] for block in blocks if block.startswith("|")]
    assert tables[0] == [
        "| films | 0 | 70 | +0.0 ±0.0 (0.250) | +0.0 ±0.0 (0.250) | +0.0 ±0.0 (0.250) "
        "| +30.0 ±3.0 (0.250) | +30.0 ±3.0 (0.250) |",
        "| films | 1 | 70 | +20.0 ±2.0 (0.250) | +5.0 ±0.5 (0.250) | +1.0 ±0.1 (0.250) "
        "| +10.0 ±1.0 (0.250) | +25.0 ±2.5 (0.250) |",
    ]
    cells = "| films | Grounded | all | the item that evokes it | 7 | 90% ±9% | -40% ±4% |  "
    assert tables[1][0] == cells + "| 0.30 ±0.03 | +12.0 ±1.2 (0.250) | 3.0 |"
    assert "| X is older | the nearest without it |" in tables[1][3]
    cells = "| films | Grounded | random items | 1.0%, 20.0% | 0.80 | 3.00% ±0.30% (p = 0.5) "
    assert tables[2][1] == cells + "| 30.00% ±3.00% (p = 0.5) |"


def test_reasons_of_saerec_by_hand(tmp_path):
    """What is told apart, and in which direction, is read off the numbers."""
    parts = []
    for part, kept, p in (("history", 0.5, 0.001), ("personal", 0.9, 0.001), ("public", 0.7, 0.2)):
        ranks = dict(part=part, reciprocal=0.25, fall=2.0, length=0.5, cosine=0.75)
        parts += [reason("part", kept=kept, **ranks), reason("random", p, kept=0.7, **ranks)]
    taken = dict(reciprocal=0.25, kept=0.5, steps=3.0, fall=1.0)
    history = [
        reason("the item that evokes it", stays=0.4, **taken),
        reason("a random item without it", 0.001, stays=0.8, **taken),
        reason("the nearest without it", 0.001, stays=0.6, **taken),
    ]
    saerec = dict(parts=parts, evoked=[reason("all", evoked=0.25)], history=history, older=[])
    saerec["steering"] = explained()["grounded"]["steering"]
    write(tmp_path / "reasons_films.json", explained(saerec=saerec))
    blocks = docs.reasons_section(tmp_path)
    said = " ".join("\n".join(blocks).split())
    assert "on films less than it for history (0.50, 0.70), more than it for personal" in said
    assert "not told apart from it for public (0.70, 0.70)." in said
    assert "25% of the users have an item that carries their first one; of 7 it stays" in said
    assert "for 40% without that item, less than the 60% without the nearest other." in said
    tables = [block.split("\n")[2:] for block in blocks if block.startswith("|")]
    cells = "| films | history | 0.50 | 0.75 | 0.50 ±0.05 | 0.70 ±0.07 "
    assert tables[2][0] == cells + "| +2.0 ±0.2 (0.250) | +2.0 ±0.2 (0.250) | 0.001 |"
    assert [row.split(" | ")[1] for row in tables[3]] == ["Grounded"] * 2 + ["SAERec"] * 2
    cells = "| films | SAERec | all | the item that evokes it | 7 |  |  | 40% ±4% "
    assert tables[1][6] == cells + "| 0.50 ±0.05 | +1.0 ±0.1 (0.250) | 3.0 |"
    films = explained()
    films["grounded"]["older"] = []
    assert "X is the older" not in docs.taken_clause(films["grounded"])
    # No item of any history evoked an intent
    write(tmp_path / "reasons_films.json", explained(saerec=saerec | dict(history=[], evoked=[])))
    assert "SAERec finds personal intents" not in "\n".join(docs.reasons_section(tmp_path))


def test_reasons_that_cannot_be_read(house, tmp_path, fails):
    write(tmp_path / "results" / "reasons_films.json", dict(dataset="films"))
    fails(docs.main, house, "reasons_films.json lacks some of", "grounded")


def test_drawn_intents_by_hand(house, tmp_path):
    assert docs.sample_section(tmp_path) == []
    one = dict(label="war, army", items=["Patton (1970)", "A | B"], support=3)
    one |= dict(detection_auroc=0.876, meaning_auroc=None, detection_texts=3)
    few = one | dict(label="birds", meaning_auroc=1.0, detection_texts=2)
    report = dict(command="python studies/sample.py", commit="abc", of=1234, drawn=[one, few])
    write(tmp_path / "results" / "intents_ml-100k.json", report)
    (tmp_path / "results" / "judged_ml-100k.json").unlink(missing_ok=True)
    title, said, table = docs.sample_section(tmp_path / "results")
    assert title == "## 2 intents of MovieLens 100K, drawn by a fixed seed"
    assert said.startswith("By `python studies/sample.py` at commit abc, of 1,234 intents")
    assert table.split("\n") == [
        "| label | top items | support | words | meaning |",
        "| --- | --- | --- | --- | --- |",
        "| war, army | Patton (1970); A \\| B | 3 | 0.88 |  |",
        "| birds | Patton (1970); A \\| B | 3 |  |  |",
    ]
    verdicts = {"war, army": "wholly", "birds": "not"}
    write(tmp_path / "results" / "judged_ml-100k.json", dict(verdicts=verdicts, by="By Ann."))
    _, said, table = docs.sample_section(tmp_path / "results")
    assert said.endswith("By Ann.") and table.startswith("| label | top items | support | words |")
    assert [row.split(" | ")[-1] for row in table.split("\n")[2:]] == ["wholly |", "not |"]
    (tmp_path / "results" / "judged_ml-100k.json").unlink()
    write(tmp_path / "results" / "intents_ml-100k.json", report | dict(drawn=[one] * 30))
    assert docs.main(house) == 0
    results = (tmp_path / "docs" / "results.md").read_text()
    assert "\n## Thirty intents of MovieLens 100K, drawn by a fixed seed\n" in results
    assert results.count("| war, army |") == 30


def test_verdicts_on_other_labels_are_refused(house, tmp_path, fails):
    one = dict(label="war", items=["Patton"], support=3, detection_texts=0)
    report = dict(command="python studies/sample.py", commit="abc", of=9, drawn=[one])
    write(tmp_path / "results" / "intents_ml-100k.json", report)
    write(tmp_path / "results" / "judged_ml-100k.json", dict(verdicts={"birds": "not"}, by="Ann"))
    fails(docs.main, house, "judged_ml-100k.json has no verdict on 'war'", "judge again")


def test_ways_to_train_the_library_by_hand(tmp_path):
    assert docs.library_section(tmp_path) == []
    row = dict(way="random rows", fvu=0.3951, kept=1014.4, mean_cosine=0.45, above_07=0.05)
    row |= dict(detection_auroc_median=0.785, detection_auroc_above_08=0.472)
    row |= dict(matched_cosine=0.42, floor_mean_cosine=0.17)
    report = dict(dataset="here", command="python studies/library.py", commit="abc", rows=[row])
    write(tmp_path / "library_here.json", report)
    *_, said, table = docs.library_section(tmp_path)
    assert said == "By `python studies/library.py` at commit abc."
    cells = "| here | random rows | 0.395 | 1014 | 0.79, 47% |  | 0.45, 5% | 0.42 | 0.17 |"
    assert table.split("\n")[-1].split() == cells.split()


def test_goals_by_hand(house, tmp_path, fails):
    path = tmp_path / "results" / "intents_goals.json"
    assert docs.goals_section(tmp_path / "none.json", "Goals") == []
    row = dict(what="agreement of two seeds", before="0.44", goal="0.80", now="0.79", reached="no")
    write(path, dict(command="python studies/library.py", commit="abc", rows=[row]))
    title, said, table = docs.goals_section(path, "Speed")
    assert title == "## Speed: before, goal, now" and said == "By `python studies/library.py` at commit abc."
    assert table.split("\n") == [
        "| what | before | goal | now | reached |",
        "| --- | --- | --- | --- | --- |",
        "| agreement of two seeds | 0.44 | 0.80 | 0.79 | no |",
    ]
    assert docs.main(house) == 0
    assert f"\n{table}\n" in (tmp_path / "docs" / "results.md").read_text()
    write(path, dict(rows=[row]))
    fails(docs.main, house, "intents_goals.json lacks some of", "command", "commit")


def test_labels_of_which_none_can_be_judged():
    assert docs.label_cell(dict(intents=0, of=4)) == "0 judged of 4"
    assert docs.label_cell(None) == docs.same_cell(None) == ""


def test_recovery_by_hand():
    sae = dict(method="SAE", K=8, M=1024, recovered=0.25)
    sae |= dict(mean_cosine=0.7, auroc=0.9, isolation=0.3)
    l1 = dict(method="L1-SAE", K=None, M=1024, recovered=0.25)
    l1 |= dict(mean_cosine=0.8, auroc=0.8, isolation=0.2)
    rows = [sae, l1]
    title, said, table = docs.recovery_section(dict(dataset="planted", recovery=rows))
    assert title.endswith(": planted")
    highest = "cosine L1-SAE (M = 1,024), AUROC SAE (K = 8, M = 1,024), isolation SAE"
    assert highest in " ".join(said.split())
    assert table.split("\n")[2:] == [
        "| SAE | 8 | 1,024 | 25% | 0.70 | 0.90 | 0.30 |",
        "| L1-SAE |  | 1,024 | 25% | 0.80 | 0.80 | 0.20 |",
    ]


def test_speed_by_hand(tmp_path):
    """A part for each file, with its command, machine and commit."""
    rows = [dict(name="beauty: SAERec", value=12.34, unit="s per epoch", against="loop", ratio=2.5)]
    report = dict(machine="M", torch="2", commit="abc", rows=rows)
    for name in ("b", "a"):
        command = f"python studies/speed.py --only {name}"
        write(tmp_path / f"speed_{name}.json", report | dict(command=command))
    said = docs.speed_document(tmp_path)
    [_, first, second] = said.split("\n## ")
    assert "--only a" in first and "--only b" in second
    assert "| beauty: SAERec | 12.3 | s per epoch | loop | 2.50 |" in first
    assert "On M, torch 2, commit abc" in " ".join(second.split())


def test_check_says_what_is_out_of_date(house, tmp_path, fails, capsys):
    error = fails(docs.main, [*house, "--check"], "results.md", "speed.md", "README.md")
    assert "run `python studies/docs.py`" in error
    assert not (tmp_path / "docs").exists() and "old" in (tmp_path / "README.md").read_text()
    assert docs.main(house) == 0
    assert docs.main([*house, "--check"]) == 0
    path = next((tmp_path / "results").glob("speed*.json"))
    write(path, json.loads(path.read_text()) | dict(commit="another"))
    error = fails(docs.main, [*house, "--check"], "speed.md: not what")
    assert "results.md" not in error and "README.md" not in error


@pytest.mark.parametrize("order", ["", "b", "e", "eb", "bebe", "bbe", "bee"])
def test_readme_without_its_markers(house, tmp_path, fails, order):
    markers = {"b": docs.BEGIN, "e": docs.END}
    (tmp_path / "README.md").write_text("".join(f"{markers[one]}\n" for one in order))
    fails(docs.main, house, "README.md lacks the lines", docs.BEGIN, docs.END, "put both back")
    assert not (tmp_path / "docs").exists()  # nothing is written by halves


def test_results_that_cannot_be_read(house, tmp_path, fails):
    results = tmp_path / "results"
    for path in results.glob("speed*.json"):
        path.unlink()
    fails(docs.main, house, "has no speed*.json", "studies/speed.py")
    (results / "speed_a.json").write_text("{")
    fails(docs.main, house, "speed_a.json cannot be read", "restore it with git")
    (results / "speed_a.json").write_text("[]")
    fails(docs.main, house, "speed_a.json lacks some of", "commit")
    for path in results.glob("ablation_*.json"):
        path.unlink()
    fails(docs.main, house, "has no ablation_*.json", "studies/ablate.py --out")
    fails(docs.main, [*house, "--readme", tmp_path / "none.md"], "has no ablation")


def test_a_choice_is_told_with_differences_taken_seed_by_seed(tmp_path):
    """Means .2 and .3; the differences .1 and .1 have no spread, the values .1."""
    valid = {"Grounded": {"0": 0.1, "1": 0.3}, "other": {"0": 0.2, "1": 0.4}}
    report = dict(dataset="tiny", users=9, hash="x", model_flags="--patience 5", valid=valid)
    (tmp_path / "choice_tiny.json").write_text(json.dumps(report))
    title, said, rows = docs.choice_section(tmp_path, [])
    assert "What Grounded holds" in title and "--patience 5" in said
    assert "| tiny | Grounded | 2 | 0.2000 ±0.1000 |  |" in rows
    assert "| tiny | other | 2 | 0.3000 ±0.1000 | +0.1000 ±0.0000 |" in rows
    assert docs.choice_section(tmp_path / "none", []) == []


def test_a_choice_of_one_seed_and_of_seeds_apart(tmp_path):
    """Then there is no standard error, or no difference."""
    valid = {"Grounded": {"0": 0.1}, "other": {"0": 0.2}, "apart": {"1": 0.3}}
    report = dict(dataset="tiny", users=9, hash="x", model_flags="", valid=valid)
    (tmp_path / "choice_tiny.json").write_text(json.dumps(report))
    rows = docs.choice_section(tmp_path, [])[2]
    assert "| tiny | other | 1 | 0.2000 | +0.1000 |" in rows
    assert "| tiny | apart | 1 | 0.3000 |  |" in rows


def test_a_table_of_other_data_is_shown_too(house, tmp_path):
    report = json.loads((RESULTS / "table_beauty.json").read_text()) | dict(dataset="mine")
    write(tmp_path / "results" / "table_mine.json", report)
    assert docs.main(house) == 0
    results = (tmp_path / "docs" / "results.md").read_text()
    said = results.split("### mine\n")[1].split("\n##")[0]
    assert "times SASRec's NDCG@10" in said and "hoped for" not in said
    lines = (tmp_path / "README.md").read_text().split("\n")
    shown = [line.split(" | ")[0] for line in lines if line.startswith("| ")]
    assert shown == ["| data", "| ---", *(f"| {name}" for name in docs.HOPED), "| mine"]


def test_a_choice_stands_beside_what_a_later_library_says():
    """Which is told where an ablation has all the rows of it."""
    names = ("Grounded", "Grounded + P d", "Grounded + next intent", "Grounded + P d + next intent")
    rows = []
    for number, name in enumerate(names):
        rows.append({"name": name, "valid NDCG@10": 0.1 + number / 100, "NDCG@10": dict(mean=0.09)})
    (said,) = docs.choice_later(dict(dataset="tiny", commit="abc", rows=rows, tests=[]))
    assert said.endswith("told apart from Grounded on test: none.")
    p_values = zip(names[1:], (0.001, 0.5, 0.009))
    tests = [dict(a="Grounded", b=name, p_holm=p) for name, p in p_values]
    (told,) = docs.choice_later(dict(dataset="tiny", commit="abc", rows=rows, tests=tests))
    assert told.endswith(": Grounded + P d, Grounded + P d + next intent.")
    assert "on tiny are: Grounded 0.1000 / 0.0900; Grounded + P d 0.1100 / 0.0900;" in said
    assert not list(docs.choice_later(dict(dataset="tiny", commit="abc", rows=rows[1:], tests=[])))


def test_rows_of_other_commits_are_told():
    assert docs.commits_of({"commit": "abc"}) == "abc"
    assert docs.commits_of({"commit": "abc", "trained at": ["abc"]}) == "abc"
    trained = {"commit": "abc", "trained at": ["0ab", "abc", "fff"]}
    assert docs.commits_of(trained) == "abc (rows trained at 0ab, fff)"


def test_of_tuning_only_what_an_ablation_has_is_told(house, tmp_path):
    whole = docs.read_ablations(tmp_path / "results")[0]
    few = whole | dict(rows=[row for row in whole["rows"] if row["name"] == "Grounded"], tests=[])
    assert docs.ablation_section(few)[2] == docs.TUNED["Grounded"]


def test_what_users_wrote_by_hand(tmp_path, fails, house):
    """Two rows of two seeds; a test's difference is a less b, the table's is b less a."""
    cell = dict(mean=0.25, std=0.01, per_seed=[0.24, 0.26])
    rows = []
    for name, ndcg in (("SAERec, item codes", 0.25), ("SAERec, both", 0.28)):
        one = dict(name=name, params=1234, seconds=5.4, epochs=[7, 12])
        for part, less in (("valid", 0), ("test", 0.05)):
            one[f"{part} NDCG@10"] = cell | dict(mean=ndcg - less)
            one[f"{part} HR@10"] = cell | dict(mean=2 * (ndcg - less))
        rows.append(one)
    report = dict(dataset="tiny", users=1009, training=2000, reviewed=1500, seeds=[0, 1], rows=rows)
    for part, p in (("valid", 0.5), ("test", 0.002)):
        test = dict(a="SAERec, item codes", b="SAERec, both", difference=-0.03, p=p, p_holm=p)
        report[f"{part} tests"] = [test]
    write(tmp_path / "new" / "written_tiny.json", report | dict(command="C", commit="abc", library=7))
    title, _, name, said, means, tests = docs.written_section(tmp_path / "new")
    assert title.startswith("## ") and name == "### tiny"
    assert "1,009 users, 2 seed(s), 7 intents; 1,500 of 2,000 training" in " ".join(said.split())
    expected = "0.2800 ±0.0100 | 0.5600 ±0.0100 | 0.2300 ±0.0100 | 0.4600 ±0.0100 | 7, 12 | 1,234 | 5 |"
    assert f"| SAERec, both | {expected}" in means
    assert "| SAERec, both | SAERec, item codes | +0.0300, 0.5 | +0.0300, 0.002 |" in tests
    assert docs.written_section(tmp_path / "none") == []
    write(tmp_path / "results" / "written_tiny.json", report)
    fails(docs.main, house, "written_tiny.json lacks some of", "command")
