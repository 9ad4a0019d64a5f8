"""The report page: self-contained, harmless whatever the data say, complete, and a run's own."""

import csv
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import safetensors.torch
import torch

import saerec
from conftest import copy_run, make_run
from eval import load_model, read_intents
from model import MODELS, model_scores
from sae import SparseRows, load_intents
from saerec import UserError
from tools import report, steer

HTML = report.TEMPLATE.read_text(encoding="utf-8")
VOID = {"meta", "link", "input", "br", "img", "hr"}
HOSTILE = (
    "</script><script>alert(1)</script><!-- <img src=x onerror=alert(1)> --> & \" ' \\ /*DATA*/ "
    "\u2028 \u2029 \x00 \ud800 \U0001f600"
)


class Page(HTMLParser):
    """The elements of a page, [(tag, attributes)], and what stands in each script.

    Refuses tags that do not match.
    """

    def __init__(self, html):
        super().__init__()
        self.elements = []
        self.scripts = []
        self.open = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag == "script":
            self.scripts.append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, (tag, self.getpos())

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data

    def ids(self):
        return [attributes["id"] for _, attributes in self.elements if "id" in attributes]


def example_intent(number, text):
    auroc = 0.9 if number == 0 else None
    row = dict(intent=number, latent=2 * number, label=text, keywords=[text], texts=[[text, 1.5]])
    row |= dict(items=[[text, 0.5]], density=0.01, detection_auroc=auroc, detection_texts=3)
    row |= dict(weak=[[text, 0.1]], histogram=[1.5, [1, 0, 2]], users=[[text, 2.5]], item_count=1)
    return row | dict(is_intent=True, x=0.5, y=-1.0, neighbours=[[1 - number, 0.5]])


def example_users(text):
    beside = dict(rank=2, score=1.0, parts=[["history", 1.0]])
    item = dict(rank=1, title=text, score=1.5, parts=[["id", 1.0]], rest=-0.25)
    item |= dict(terms=[[0, 0.5, [text]], [1, 0.25, []]], held_out=True, beside=beside)
    user = dict(user=text, history=[text], personal=[[0, 2.0]], public=[1])
    user |= dict(target=dict(title=text, rank=1), recommendations=[item])
    return dict(model=text, beside=text, rows=[user])


def example(text="a, b"):
    """Data with every key, where all texts are the given one."""
    epoch = {"epoch": 1, "seconds": 0.5, "loss": 3.0, "valid_NDCG@10": 0.1}
    variant = dict(name=text, mean=0.1, std=0.01, params=10, seconds=1.0)
    found = dict(method=text, K=8, M=64, recovered=0.5, mean_cosine=0.5, auroc=0.9, isolation=0.5)
    metrics = {"HR@10": 0.2, "NDCG@10": 0.1}
    return dict(
        title=text,
        dataset={"name": text, "users": 3},
        protocol=text,
        made=text,
        models=[{"name": text, "metrics": metrics, "error": {"NDCG@10": 0.01}}],
        compared=dict(
            control=text, users=3, rows=[dict(name=text, differences={"NDCG@10": [0.1, -0.1, 0.3]})]
        ),
        training={text: [epoch]},
        sae=[dict(step=1, loss=1.0, train_fvu=0.5, fvu=0.6, l0=8, dead=0.0)],
        intents=[example_intent(0, text), example_intent(1, text)],
        items=[[text, [0, 1]]],
        library=dict(intents=1, none=1, measured=1, detection_auroc=0.9, permuted_auroc=None),
        names={"0": text},
        users=example_users(text),
        ablation=dict(metric="NDCG@10", rows=[variant], verdict=text),
        recovery=[found],
        steering=dict(model=text, rows=[dict(strength=0, share=0.1, ndcg=0.1)]),
        explain={"density": text},
    )


def data_of(page):
    """What stands in the data element, character for character."""
    return page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]


# The page


@pytest.mark.parametrize("text", ["a, b", HOSTILE])
def test_data_survive_byte_for_byte(text):
    data = example(text)
    page = report.build_report(data)
    inside = data_of(page)
    assert json.loads(inside) == data and list(json.loads(inside)) == list(data)
    assert len(page) == len(HTML) + len(inside) - len(report.MARKER)
    assert Page(page).scripts[0] == inside  # html.parser ends the element where we do
    page.encode()  # no lone surrogate is left


def test_hostile_texts_are_never_raw():
    html = report.build_report(example(HOSTILE))
    page = Page(html)
    inside = data_of(html)
    assert not set(inside) & set("<>&\u2028\u2029\x00\ud800") and "\U0001f600" in inside
    assert page.elements == Page(HTML).elements and len(page.scripts) == 2


def test_the_marker_is_filled():
    assert HTML.count("/*DATA*/") == 1
    assert "/*DATA*/" not in report.build_report(example())


@pytest.mark.parametrize("html", ["", "/*DATA*/ /*DATA*/"])
def test_a_template_without_its_marker(tmp_path, html):
    (tmp_path / "report.html").write_text(html)
    with pytest.raises(UserError, match="report.html must hold /\\*DATA\\*/ exactly once"):
        report.build_report({}, tmp_path / "report.html")


def many_intents(count, text):
    """Rows of so many intents, each denser than the one before, whose texts are the given one."""
    rows = []
    for number in range(count):
        row = example_intent(number, f"intent {number}") | dict(density=(number + 1) / count)
        rows.append(row | dict(texts=[[text, 1.0]] * 5, weak=[[text, 0.1]] * 3, neighbours=[]))
    return rows


def test_a_page_that_fits_is_not_shortened():
    data = example() | dict(intents=many_intents(500, "a text"))
    page, shortened = report.fit_report(data)
    assert page == report.build_report(data) and shortened == []


def test_2001_intents_in_hindi_fit():
    """Bytes count, not characters: a letter of Devanagari has three."""
    text = "यह फ़िल्म बहुत अच्छी है और कहानी दिल को छू लेती है। " * 3
    data = example() | dict(intents=many_intents(2001, text[:160]))
    assert len(report.build_report(data).encode()) > report.REPORT_LIMIT
    page, shortened = report.fit_report(data)
    assert len(page.encode()) <= report.REPORT_LIMIT
    assert shortened == ["texts to 80 characters"]
    shown = json.loads(data_of(page))["intents"]
    assert len(shown) == 2001 and max(len(text) for text, _ in shown[0]["texts"]) == 80


def test_the_least_dense_intents_go_first():
    """Texts and examples before intents, and of these the densest stay."""
    data = example() | dict(intents=many_intents(800, "a long text " * 20))
    data["items"] = [[f"title {n}", [0]] for n in range(5000)]
    page, shortened = report.fit_report(data, limit=200_000)
    shown = json.loads(data_of(page))
    assert len(page.encode()) <= 200_000
    kept = [row["intent"] for row in shown["intents"]]
    assert kept == list(range(800))[-len(kept) :] and len(kept) < 800
    assert [said.split()[0] for said in shortened] == ["texts", "examples", "titles", "intents"]
    assert shortened[-1] == f"intents to the {len(kept)} densest"
    assert shown["items"][0] == ["title 0", [0]] and 0 < len(shown["items"]) <= 1000
    assert all(len(row["texts"]) == 2 and len(row["weak"]) == 1 for row in shown["intents"])


def test_neighbours_that_are_left_out_are_not_mentioned():
    intents = many_intents(100, "a text")
    for row in intents:
        row["neighbours"] = [[99 - row["intent"], 0.5], [99, 0.25]]
    for _, _, data in report.shorter(dict(intents=intents)):
        shown = {row["intent"] for row in data["intents"]}
        assert all(pair[0] in shown for row in data["intents"] for pair in row["neighbours"])
    assert [row["neighbours"] for row in data["intents"]] == [[[99, 0.25]]]


def test_what_cannot_fit_is_shown_all_the_same():
    data = example("long " * 1000)
    data["users"]["rows"] *= 40
    page, shortened = report.fit_report(data, limit=10)
    assert shortened[2:] == ["users to 5", "intents to the 1 densest"]
    shown = json.loads(data_of(page))
    assert len(shown["users"]["rows"]) == 5 and len(shown["intents"]) == 1


def test_excerpts_are_around_the_words():
    text = "one two three four five six seven eight nine ten"
    assert report.excerpt(text, ["absent"], 48) == text
    assert report.excerpt(text, ["absent"], 10) == "one two t\u2026"
    assert report.excerpt(text, ["eight", "six"], 16) == "\u2026ve six seven e\u2026"
    assert report.excerpt(text, ["Ten"], 10) == "\u2026 nine ten"
    for length in range(3, 60):
        for word in ("one", "six", "ten", "none"):
            assert len(report.excerpt(text, [word], length)) == min(length, len(text))


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_json_cannot_hold(number):
    with pytest.raises(UserError, match="NaN or infinite"):
        report.build_report({"sae": [{"fvu": number}]})


def test_the_page_fetches_nothing():
    elements = Page(HTML).elements
    for tag, attributes in elements:
        fetching = {"src", "srcset", "action", "data", "poster", "background"}
        assert not fetching & set(attributes), (tag, attributes)
        assert attributes.get("href", "#").startswith(("#", "data:,")), (tag, attributes)
    words = "http: https: @import url( fetch( XMLHttpRequest WebSocket EventSource sendBeacon"
    for word in f"{words} import( Worker(".split():
        assert word not in HTML, word
    policies = [a["content"] for _, a in elements if a.get("http-equiv")]
    assert len(policies) == 1 and "default-src 'none'" in policies[0]
    assert len(HTML.encode()) < 100_000


def test_the_page_never_makes_markup_of_data():
    words = "innerHTML outerHTML insertAdjacentHTML document.write eval( Function( DOMParser"
    for word in f"{words} srcdoc javascript: createContextualFragment".split():
        assert word not in HTML, word
    for _, attributes in Page(HTML).elements:
        assert not any(name.startswith("on") for name in attributes)


def test_the_page_copies_no_list_to_add_to_it():
    """Which takes a popular intent's time squared."""
    assert not re.search(r"\.set\([^;]*\[\.\.\.", HTML)


def test_every_key_has_its_place():
    page = Page(HTML)
    ids = page.ids()
    assert len(ids) == len(set(ids))
    drawn = re.search(r"^const sections = \{\n(.*?)^\};", HTML, re.M | re.S)[1]
    drawn = re.findall(r"^  (\w+)\(.*\{", drawn, re.M)
    assert sorted(drawn) == sorted(a["id"] for tag, a in page.elements if tag == "section")
    explained = set(re.findall(r"\n  (\w+(?:, \w+)*)   ", HTML.partition("-->")[0]))
    for key in example():
        assert key in ids or key in ("compared", "items", "library", "names", "explain")
        assert key in ", ".join(explained).split(", "), f"{key} is not at the template's top"
    for name in re.findall(r'\$\("([\w-]+)"\)', HTML):
        assert name in ids, name


def test_the_page_can_be_used_without_a_mouse():
    page = Page(HTML)
    ids = page.ids()
    tags = page.elements
    assert tags[0] == ("html", {"lang": "en"})
    landmarks = ["header", "h1", "nav", "main", "footer"]
    assert [tag for tag, _ in tags if tag in landmarks] == landmarks
    for tag, attributes in tags:
        assert tag != "button" or attributes["type"] == "button"
        labelled = attributes.get("aria-labelledby") in ids and "hidden" in attributes
        assert tag != "section" or labelled
        assert int(attributes.get("tabindex", 0)) <= 0
    links = [attributes for tag, attributes in tags if tag == "a"]
    assert links[0] == {"class": "skip", "href": "#main"}
    inputs = re.findall(r"<label[^>]*>(?:(?!</label>).)*<input", HTML, re.S)
    assert len(inputs) == len([tag for tag, _ in tags if tag == "input"])
    words = "prefers-color-scheme: dark|prefers-reduced-motion|@media print|:focus-visible"
    for word in f"{words}|aria-sort|aria-expanded".split("|"):
        assert word in HTML


def luminance(colour):
    """Relative luminance of #rrggbb, by WCAG 2."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(colour, other):
    light, dark = sorted((luminance(colour), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_marks_can_be_seen_in_the_dark():
    """Whatever has a colour of its own, also where it is laid over the background in part."""
    style = "".join(re.findall(r"^@media[^\n]*dark\) \{\n(.*?)^\}", HTML, re.M | re.S))
    colours = dict(re.findall(r"--(bg|ink|soft|accent|grey|mark): (#\w{6})", style))
    marks = dict(re.findall(r"\.q\.(q\d) \{ fill: (#\w{6})", style))
    assert len(colours) == 6 and len(marks) == 5
    marks |= {name: colours[name] for name in ("ink", "soft", "accent", "grey")}
    assert {name for name, one in marks.items() if contrast(one, colours["bg"]) < 4.5} == set()
    assert contrast(colours["ink"], colours["mark"]) >= 4.5
    opacities = [float(one) for one in re.findall(r"\.p\d \{ fill-opacity: ([.\d]+)", style)]
    assert len(opacities) == 4
    for opacity in opacities:
        mixed = "#"
        for at in (1, 3, 5):
            one, two = (int(colours[name][at : at + 2], 16) for name in ("accent", "bg"))
            mixed += f"{round(one * opacity + two * (1 - opacity)):02x}"
        assert contrast(mixed, colours["bg"]) >= 4.5


def test_every_model_has_its_words_on_the_page():
    """Its name where our own is in colour, and a style and a text for each part of its scores."""
    assert re.search(r"ours = name => /\^grounded/i", HTML)
    styles = re.search(r"^const PARTS = \{\n(.*?)^\};", HTML, re.M | re.S)[1]
    parts = re.findall(r"^  (\w+): \{style: \"\w+\", text: \".+\"\},$", styles, re.M)
    assert parts == ["id", "history", "personal", "public"]
    said = re.search(r"^const SAID = \{\n(.*?)^\};", HTML, re.M | re.S)[1]
    assert re.findall(r"^  (\w+): \"The score of an item", said, re.M) == [
        "id", "personal", "history"
    ]  # fmt: skip


# What is on it


def test_most_intents_join_the_places_of_others(monkeypatch):
    """Three clusters, of which t-SNE places a part: the others land among their own."""
    monkeypatch.setattr(report, "LANDMARKS", 60)
    torch.manual_seed(0)
    cluster = torch.arange(240) % 3
    x = torch.randn(3, 10).mul(4)[cluster] + torch.randn(240, 10) * 0.3
    y = report.map_points(x, torch.rand(240))
    centers = torch.stack([y[cluster == one].mean(0) for one in range(3)])
    assert y.isfinite().all()
    assert (torch.cdist(y, centers).argmin(1) == cluster).float().mean() > 0.95


def test_tsne_keeps_clusters_together():
    torch.manual_seed(0)
    cluster = torch.arange(90) % 3
    x = torch.randn(3, 10).mul(4)[cluster] + torch.randn(90, 10) * 0.3
    y = report.tsne(x)
    nearest = torch.cdist(y, y).fill_diagonal_(torch.inf).argmin(1)
    same = cluster[nearest] == cluster
    assert y.isfinite().all() and same.float().mean() > 0.95


def test_neighbours_by_hand():
    """Intents 0 and 1 share one item of one and of four: 1 / sqrt(4); intent 2 shares none."""
    indptr = torch.tensor([0, 0, 2, 3, 4, 5, 6])
    codes = SparseRows(indptr, torch.tensor([0, 1, 1, 1, 1, 2]).int(), torch.ones(6), 3)
    assert report.neighbours(codes) == [[[1, 0.5]], [[0, 0.5]], []]


def test_neighbours_by_brute_force(tiny_run):
    codes = load_intents(tiny_run, saerec.run_dataset(tiny_run)).codes
    on = (codes.dense() > 0).double().numpy()
    cosine = on.T @ on / np.sqrt(np.outer(on.sum(0), on.sum(0)))
    np.fill_diagonal(cosine, 0)
    for j, found in enumerate(report.neighbours(codes, count=3)):
        best = sorted(cosine[j], reverse=True)[: len(found)]
        assert [v for _, v in found] == pytest.approx(best, abs=1e-3)
        assert all(v == pytest.approx(cosine[j, k], abs=1e-3) for k, v in found)


def content_of(run, *more):
    """What the report of a run shows -> dict."""
    assert report.main(["--run", str(run), "--device", "cpu", *more]) == 0
    return json.loads(data_of((run / "report.html").read_text()))


@pytest.fixture
def run(tmp_path, tiny_run):
    return copy_run(tiny_run, tmp_path / "run")


@pytest.fixture(scope="module")
def content(tmp_path_factory, tiny_run):
    """What the report of the tiny run shows; tests must not change it."""
    return content_of(copy_run(tiny_run, tmp_path_factory.mktemp("report") / "run"))


def test_intervals_by_hand():
    """Four differences of mean 1 and standard deviation 2: 1 +- 1.96 * 2 / sqrt(4)."""
    differences = torch.tensor([3.0, 1.0, 1.0, -1.0], dtype=torch.float64)
    deviation = (8 / 3) ** 0.5
    ends = [1.0, 1 - 1.96 * deviation / 2, 1 + 1.96 * deviation / 2]
    assert report.interval(differences) == pytest.approx(ends)
    assert report.interval(differences[:1]) == [3.0, None, None]


def test_differences_are_those_of_the_same_users(content, tiny_run):
    compared = content["compared"]
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    assert compared["control"] == "SASRec" and compared["users"] == metrics["users"]
    assert [row["name"] for row in compared["rows"]] == ["Grounded", "SAERec"]
    for name, row in zip(("grounded", "saerec"), compared["rows"], strict=True):
        for metric, (mean, low, high) in row["differences"].items():
            both = (metrics["models"][one][metric] for one in (name, "sasrec"))
            assert mean == pytest.approx(next(both) - next(both), abs=1e-9)
            assert low <= mean <= high and mean - low == pytest.approx(high - mean)
    data = saerec.run_dataset(tiny_run)
    hits = []
    for name in ("grounded", "sasrec"):
        model = load_model(tiny_run, name, data)
        hits.append([])
        for user in range(len(data.users)):
            best = recommend(model, data, user)[:10]
            hits[-1].append(float(data.targets("test")[user] in best))
    differences = np.subtract(*hits)
    error = differences.std(ddof=1) / len(differences) ** 0.5
    _, low, high = compared["rows"][0]["differences"]["HR@10"]
    assert high - low == pytest.approx(2 * 1.96 * error)


def recommend(model, data, user):
    """All items that are not in a user's history, the best first -> list."""
    history = data.history(user, "test")
    _, scores = report.score_after(model, history)
    order = scores.argsort(descending=True).tolist()
    return [item for item in order if item and item not in history]


@pytest.mark.parametrize(("seed", "said"), [(1, "1"), ([1, 12], "1, 12")])
def test_metrics_of_another_seed_are_refused(run, fails, seed, said):
    path = run / "metrics.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | dict(seed=seed)))
    words = (f"{path} is of seed {said}, but sasrec is of 0 now: make it again", "eval.py --run")
    fails(report.main, ["--run", run, "--device", "cpu"], *words)


def test_every_metric_must_be_that_of_the_models(run, fails):
    """Of few users exactly, but for rounding; also of a model whose reasons are not shown."""
    path = run / "metrics.json"
    metrics = json.loads(path.read_text())
    metrics["models"]["saerec"]["MRR"] += 1e-4
    path.write_text(json.dumps(metrics))
    content_of(run)
    metrics["models"]["saerec"]["MRR"] += 2e-3
    path.write_text(json.dumps(metrics))
    words = (f"{path} says MRR", "of saerec", "eval.py --run")
    fails(report.main, ["--run", run, "--device", "cpu"], *words)


def test_of_many_users_rounding_may_move_one(tiny_run):
    """A metric of 10,000 may differ by 2 in 10,000."""
    models = dict(sasrec=load_model(tiny_run, "sasrec", saerec.run_dataset(tiny_run)))
    ranks = torch.arange(1, 10_001).double()
    found = dict(sasrec=saerec.user_metrics(ranks))
    measured = saerec.ranking_metrics(ranks)
    metrics = dict(seeds=[0], measured=dict(sasrec=measured))
    measured["HR@10"] += 1.9e-4
    report.check_measured(models, found, metrics, tiny_run)
    measured["HR@10"] += 0.2e-4
    with pytest.raises(UserError, match="says HR@10 0.00121 of sasrec, which has 0.00100 now"):
        report.check_measured(models, found, metrics, tiny_run)


def test_what_was_measured_with_other_intents_is_left_out(run, capsys):
    """As after the same run was made again with other settings."""
    found = dict(recovery=[dict(method="SAE", recovered=0.5)])
    for intents, shown in ((saerec.file_hash(run / "intents.safetensors"), True), ("0" * 64, False)):
        (run / "interpret.json").write_text(json.dumps(found | dict(intents=intents)))
        assert ("recovery" in content_of(run)) == shown
    said = f"interpret.json was measured with another {run / 'intents.safetensors'}"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("name", ["grounded.safetensors", "intents.safetensors"])
def test_what_was_measured_with_another_model_is_left_out(run, capsys, name):
    assert steer.main(["--run", str(run), "--strengths", "1", "--device", "cpu"]) == 0
    assert "steering" in content_of(run)
    tensors, meta = saerec.load_artifact(run / name, "")
    saerec.write_artifact(run / name, tensors, meta | dict(remark="another file"))
    if name == "intents.safetensors":  # which models refuse that were made from another
        for model in ("grounded", "saerec"):
            (run / f"{model}.safetensors").unlink()
    shown = content_of(run, "--model", "sasrec")
    assert "steering" not in shown
    assert f"steering.json was measured with another {run / name}" in capsys.readouterr().out


def test_a_model_trained_after_the_ranking_is_refused(run, fails):
    path = run / "metrics.json"
    metrics = json.loads(path.read_text())
    del metrics["models"]["grounded"]
    path.write_text(json.dumps(metrics))
    words = ("metrics.json is older than the run's grounded", "eval.py --run")
    fails(report.main, ["--run", run, "--device", "cpu"], *words)


def test_only_models_that_are_there_are_compared(run):
    (run / "sasrec.safetensors").unlink()
    compared = content_of(run)["compared"]
    assert compared["control"] == "popularity"
    assert [row["name"] for row in compared["rows"]] == ["Grounded", "SAERec"]
    (run / "saerec.safetensors").unlink()
    content = content_of(run)
    assert [row["name"] for row in content["compared"]["rows"]] == ["Grounded"]
    assert content["users"]["beside"] is None
    assert content["users"]["rows"][0]["recommendations"][0]["beside"] is None


def test_what_was_not_measured_is_none(run):
    """NaN in a log, and None in metrics.json, are no numbers, and no failure."""
    lines = (run / "sae_log.csv").read_text().splitlines()
    place = lines[0].split(",").index("fvu")
    cells = lines[-1].split(",")
    cells[place] = "nan"
    (run / "sae_log.csv").write_text("\n".join([*lines[:-1], ",".join(cells)]) + "\n")
    metrics = json.loads((run / "metrics.json").read_text())
    metrics["models"]["grounded"] = dict.fromkeys(metrics["models"]["grounded"])
    metrics["standard_errors"]["grounded"] = dict.fromkeys(metrics["standard_errors"]["grounded"])
    metrics["seed"] = [0, 1]
    (run / "metrics.json").write_text(json.dumps(metrics))
    ablation = dict(rows=[{"name": "a", "params": 1, "seconds": 1.0, "NDCG@10": None}])
    (run / "ablation.json").write_text(json.dumps(ablation | dict(tests=[], verdict="")))
    content = content_of(run)
    assert content["sae"][-1]["fvu"] is None and content["sae"][-1]["loss"] > 0
    assert set(content["models"][-1]["metrics"].values()) == {None}
    assert content["ablation"]["rows"][0]["mean"] is None
    assert content["made"].endswith("seed 0, 1")


def test_results_and_curves_of_every_model(content, tiny_run):
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    names = {"popularity": "popularity", "sasrec": "SASRec", "saerec": "SAERec"}
    names |= {"grounded": "Grounded"}
    assert [one["name"] for one in content["models"]] == list(names.values())
    for name, one in zip(names, content["models"], strict=True):
        assert one["metrics"] == metrics["models"][name]
        assert one["error"] == metrics["standard_errors"][name]
    assert list(content["training"]) == ["Grounded", "SAERec", "SASRec"]
    for name in MODELS:
        with open(tiny_run / f"{name}_log.csv") as file:
            logged = [float(row["valid_NDCG@10"]) for row in csv.DictReader(file)]
        curve = content["training"][names[name]]
        assert [row["valid_NDCG@10"] for row in curve] == logged
        assert all({"epoch", "loss", "seconds"} <= row.keys() for row in curve)
    assert content["sae"] == report.read_log(tiny_run / "sae_log.csv")
    assert content["protocol"] == metrics["protocol"]
    assert "seed 0" in content["made"] and content["dataset"]["users"] == 24
    for absent in ("ablation", "recovery", "steering"):
        assert absent not in content


def test_only_models_that_were_measured_are_shown(tiny_data, tmp_path):
    run = make_run(tiny_data, tmp_path / "bare", stages="embed sasrec eval")
    content = content_of(run, "--model", "sasrec")
    assert [one["name"] for one in content["models"]] == ["popularity", "SASRec"]
    assert list(content["training"]) == ["SASRec"]
    assert "intents" not in content and "sae" not in content


def test_intents_are_shown_with_titles_and_neighbours(content, run):
    rows = read_intents(run)
    assert len(content["intents"]) == len(rows)
    titles = set(saerec.run_dataset(run).titles)
    for shown, row in zip(content["intents"], rows):
        same = ("intent", "latent", "label", "keywords", "density", "detection_auroc")
        assert all(shown[name] == row[name] for name in same)
        assert len(shown["items"]) == len(row["items"])
        assert {title for title, _ in shown["items"]} <= titles
        codes = [code for _, code in shown["items"]]
        assert codes == sorted(codes, reverse=True) and codes[-1] > 0
        assert math.isfinite(shown["x"]) and math.isfinite(shown["y"])
    carriers = (load_intents(run, saerec.run_dataset(run)).codes.dense() > 0).sum(0)
    assert [shown["item_count"] for shown in content["intents"]] == carriers.tolist()
    few = content_of(run, "--intents", "4")["intents"]
    densities = sorted((row["density"] for row in rows), reverse=True)
    assert sorted((row["density"] for row in few), reverse=True) == densities[:4]
    listed = {row["intent"] for row in few}
    assert all({other for other, _ in row["neighbours"]} <= listed for row in few)
    assert all("x" not in row for row in content_of(run, "--intents", "3")["intents"])


def test_figures_on_intents_are_of_all_whatever_is_listed(run):
    rows = read_intents(run)
    for number, row in enumerate(rows):
        row |= dict(detection_auroc=number / 100, permuted_auroc=None, detection_texts=3)
    rows[0] |= dict(detection_texts=2)  # too few to be judged by
    rows[1]["is_intent"] = False  # and none of what is measured, whatever its texts
    saerec.write_rows(run / "intents.jsonl", rows)
    library = content_of(run, "--intents", "4")["library"]
    counts = dict(intents=len(rows) - 1, none=1, measured=len(rows) - 2)
    assert library == counts | dict(
        detection_auroc=pytest.approx((len(rows) + 1) / 200), permuted_auroc=None
    )


def activations(run):
    """The activation of each latent on each text, by the formula of (S1) -> [N, M]."""
    tensors = safetensors.torch.load_file(run / "sae.safetensors")
    x = safetensors.torch.load_file(run / "embeddings.safetensors")["embeddings"]
    x = (x - tensors["mean"]) / tensors["scale"] - tensors["b_dec"]
    z = (x @ tensors["W_enc"].T + tensors["b_enc"]).relu()
    least = z.topk(int(tensors["active"])).values[:, -1:]
    return torch.where(z >= least, z, 0)


def test_texts_of_an_intent_are_shown_with_activations(content, tiny_run):
    z = activations(tiny_run)
    texts = saerec.run_dataset(tiny_run).texts
    for shown, row in zip(content["intents"], read_intents(tiny_run), strict=True):
        own = {text: float(v) for text, v in zip(texts, z[:, row["latent"]]) if v > 0}
        assert [text for text, _ in shown["texts"]] == row["texts"]
        for text, activation in shown["texts"] + shown["weak"]:
            assert activation == pytest.approx(own[text], abs=1e-3)
        ordered = sorted(own.values())
        assert [v for _, v in shown["weak"]] == pytest.approx(
            ordered[: len(shown["weak"])], abs=1e-3
        )
        assert len(shown["weak"]) == min(max(len(own) - 5, 0), 3)
        largest, counts = shown["histogram"]
        on = z[:, row["latent"]]
        assert largest == pytest.approx(ordered[-1]) and sum(counts) == int((on > 0).sum())


def test_of_many_texts_a_sample_is_read(content, run, monkeypatch):
    """The strongest are shown all the same; the histogram is of the sample alone."""
    monkeypatch.setattr(report, "ENCODED", 6)
    part = content_of(run)["intents"]
    assert [row["texts"] for row in part] == [row["texts"] for row in content["intents"]]
    in_sample = [sum(row.get("histogram", [0, []])[1]) for row in part]
    assert max(in_sample) <= 6 and sum(in_sample) == 6 * 3  # three latents fire on each text


def test_a_run_without_its_sae_has_no_activations(run):
    (run / "sae.safetensors").unlink()
    for shown, row in zip(content_of(run)["intents"], read_intents(run), strict=True):
        assert shown["texts"] == [[text, None] for text in row["texts"]]
        assert "weak" not in shown and "histogram" not in shown


def test_an_sae_of_another_version_is_refused(run, fails):
    path = run / "sae.safetensors"
    tensors, meta = saerec.load_artifact(path, "sae.py")
    del tensors["b_enc"]
    saerec.write_artifact(path, tensors, meta)
    intents = run / "intents.safetensors"
    with safetensors.safe_open(intents, "pt") as file:
        meta = json.loads(file.metadata()["saerec"])
    meta["made_from"] = {path.name: saerec.file_hash(path)}
    saerec.write_artifact(intents, safetensors.torch.load_file(intents), meta)
    for name in ("saerec", "grounded"):  # which were made from the former intents
        (run / f"{name}.safetensors").unlink()
    words = ("sae.safetensors is not of the SAE of sae.py as it is now", "sae.py --run")
    fails(report.main, ["--run", run, "--model", "sasrec"], *words)


def test_users_with_most_of_an_intent(tiny_run):
    """By equation (11), worked item by item."""
    data = saerec.run_dataset(tiny_run)
    model = load_model(tiny_run, "grounded", data)
    codes = model.codes.dense()
    r = torch.zeros(len(data.users), codes.shape[1])
    for user in range(len(data.users)):
        for item in data.history(user, "test")[-model.settings.history :]:
            r[user] = model.settings.decay * r[user] + codes[item]
    r *= model.idf
    r = torch.where(r >= r.topk(min(model.matched, r.shape[1])).values[:, -1:], r, 0)
    for intent, found in enumerate(report.strongest_users(model, data, seed=0)):
        best = r[:, intent].sort(descending=True).values[: len(found)].tolist()
        assert [v for _, v in found] == pytest.approx(best, abs=0.01)
        own = [float(r[data.users.index(user), intent]) for user, _ in found]
        assert own == pytest.approx(best, abs=0.01)


def test_titles_lead_to_intents(content, tiny_run):
    data = saerec.run_dataset(tiny_run)
    codes = load_intents(tiny_run, data).codes.dense()
    assert sorted(title for title, _ in content["items"]) == sorted(data.titles[1:])
    numbers = [data.titles.index(title) for title, _ in content["items"]]
    taken = [(data.training_items() == number).sum() for number in numbers]
    assert taken == sorted(taken, reverse=True)
    for title, intents in content["items"]:
        code = codes[data.titles.index(title)]
        best = code.sort(descending=True).values[: len(intents)]
        assert code[intents].tolist() == pytest.approx(best.tolist())
        assert len(intents) == min(5, int((code > 0).sum()))


def test_what_is_no_intent_has_its_texts_its_place_and_no_items(content, run):
    """A language model's verdict takes an intent's codes away; what it fires on stays to be seen."""
    places = [(row["x"], row["y"]) for row in content["intents"]]
    rows = read_intents(run)
    rows[0]["is_intent"] = False
    saerec.write_rows(run / "intents.jsonl", rows)
    tensors, meta = saerec.load_artifact(run / "intents.safetensors", "sae.py")
    tensors["is_intent"][0] = False
    saerec.write_artifact(run / "intents.safetensors", tensors, meta)
    for name in ("saerec", "grounded"):  # made from the former intents
        (run / f"{name}.safetensors").unlink()
    shown = content_of(run, "--model", "sasrec")["intents"]
    assert [(row["x"], row["y"]) for row in shown] == places
    first = shown[0]
    assert [text for text, _ in first["texts"]] == rows[0]["texts"]
    assert first["item_count"] is None and {code for _, code in first["items"]} == {None}
    assert "users" not in first and first["neighbours"] == []


@pytest.mark.parametrize("name", MODELS)
def test_reasons_add_up_to_scores(name, run):
    content = content_of(run, "--model", name, "--top", "4", "--users", "3")
    assert content["users"]["model"] == report.NAMES[name] and len(content["users"]["rows"]) == 3
    parts = {"grounded": ["id"], "sasrec": ["history"]}
    for user in content["users"]["rows"]:
        assert len(user["recommendations"]) == 4 and user["target"]["title"].startswith("Thing")
        for one in user["recommendations"]:
            assert [part for part, _ in one["parts"]] == parts.get(
                name, ["history", "personal", "public"]
            )
            assert bool(one["terms"]) <= (name == "grounded")
            values = [value for _, value in one["parts"]] + [value for _, value, _ in one["terms"]]
            whole = sum(values) + one["rest"]
            assert whole == pytest.approx(one["score"], abs=1e-5)
            assert one["held_out"] == (one["title"] == user["target"]["title"])
        strengths = [strength for _, strength in user["personal"]]
        assert all((strength is None) == (name == "saerec") for strength in strengths)
        assert bool(user["public"]) == (name == "saerec")


def test_the_held_out_item_has_its_rank(run):
    data = saerec.run_dataset(run)
    for name in MODELS:
        model = load_model(run, name, data)
        ranks = saerec.rank_users(model_scores(model, data, "test"), data, "test")
        for shown in content_of(run, "--model", name)["users"]["rows"]:
            rank = float(ranks[data.users.index(shown["user"])])
            assert shown["target"]["rank"] == (None if math.isinf(rank) else rank)


def test_an_item_that_was_taken_before_has_no_rank():
    scores = torch.tensor([9.0, 3.0, 5.0, 4.0])
    history = np.array([2], np.int32)
    assert report.places(scores, [1, 2, 3], history) == [2, None, 1]


def test_terms_say_what_evokes_them(content, tiny_run):
    data = saerec.run_dataset(tiny_run)
    codes = load_intents(tiny_run, data).codes.dense()
    personal = 0
    for user in content["users"]["rows"]:
        read = user["history"][-6:]  # what the tiny models read
        for one in user["recommendations"]:
            for intent, _, evoked in one["terms"]:
                carriers = [title for title in read if codes[data.titles.index(title), intent] > 0]
                assert set(evoked) <= set(carriers) and bool(evoked) == bool(carriers)
                assert str(intent) in content["names"]
                personal += bool(evoked)
    assert personal


@pytest.mark.parametrize(("name", "other"), [("grounded", "saerec"), ("saerec", "grounded")])
def test_grounded_and_saerec_are_beside_each_other(name, other, run):
    users = content_of(run, "--model", name)["users"]
    assert users["beside"] == report.NAMES[other]
    data = saerec.run_dataset(run)
    model = load_model(run, other, data)
    parts = dict(grounded=["id", "intents"], saerec=["history", "personal", "public"])[other]
    for shown in users["rows"]:
        ranking = recommend(model, data, data.users.index(shown["user"]))
        for one in shown["recommendations"]:
            beside = one["beside"]
            assert [part for part, _ in beside["parts"]] == parts
            whole = sum(value for _, value in beside["parts"])
            assert whole == pytest.approx(beside["score"], abs=1e-5)
            assert beside["rank"] == 1 + ranking.index(data.titles.index(one["title"]))


def test_no_users_no_section(run):
    assert "users" not in content_of(run, "--users", "0")


def test_what_studies_measured_is_shown(run):
    """p values are those against the first row, not those of other comparisons."""
    assert steer.main(["--run", str(run), "--model", "saerec", "--device", "cpu"]) == 0
    rows = []
    for name in ("Grounded", "no match", "SASRec"):
        metric = dict(mean=0.1, std=None)
        rows.append({"name": name, "params": 10, "seconds": 2.5, "NDCG@10": metric})
    tests = [
        dict(a="Grounded", b="no match", p_holm=0.25),
        dict(a="no match", b="SASRec", p_holm=0.5),
    ]
    ablation = dict(rows=rows, tests=tests, verdict="Nothing differs.")
    (run / "ablation.json").write_text(json.dumps(ablation))
    found = dict(method="SAE", K=8, M=64, recovered=0.5, mean_cosine=0.5, auroc=0.9, isolation=0.5)
    (run / "interpret.json").write_text(json.dumps(dict(recovery=[found])))
    content = content_of(run)
    assert content["recovery"] == [found]
    assert content["ablation"]["verdict"] == "Nothing differs."
    shown = content["ablation"]["rows"]
    assert [row["name"] for row in shown] == ["Grounded", "no match", "SASRec"]
    assert [row["p"] for row in shown] == [None, 0.25, None]
    assert shown[0] | dict(p=0) == dict(
        name="Grounded", params=10, seconds=2.5, mean=0.1, std=None, p=0
    )
    steering = json.loads((run / "steering.json").read_text())
    assert content["steering"] == dict(model="SAERec", rows=steering["rows"])


@pytest.mark.parametrize(
    "name, text, said",
    [
        ("metrics.json", '{"models": {}}', "KeyError: 'protocol'"),
        ("metrics.json", "[]", "AttributeError"),
        (
            "metrics.json",
            '{"protocol": "P", "seed": 0, "models": {"sasrec": {}}}',
            "KeyError: 'standard_errors'",
        ),
        ("interpret.json", "[1]", "AttributeError"),
        ("steering.json", '{"model": "grounded"}', "KeyError: 'rows'"),
        ("steering.json", '{"model": "mine", "rows": []}', "KeyError: 'mine'"),
        ("ablation.json", '{"rows": [], "tests": [], "verdict": ""}', "IndexError"),
        ("ablation.json", '{"rows": ', "JSONDecodeError"),
        ("grounded_log.csv", "epoch,loss\n1,low\n", "ValueError"),
        ("sae_log.csv", "step,loss\n1\n", "TypeError"),
    ],
)
def test_files_of_other_versions(run, fails, name, text, said):
    (run / name).write_text(text)
    words = (f"{run / name} is not as this version writes it", said, "delete it and make it again")
    fails(report.main, ["--run", run, "--device", "cpu"], *words)


def test_a_run_that_cannot_be_shown(run, fails):
    (run / "interpret.json").write_text("{")
    fails(report.main, ["--run", run], "interpret.json is not as this version", "delete it")
    (run / "grounded.safetensors").unlink()
    fails(report.main, ["--run", run], "grounded.safetensors is missing", "model.py --run")
    (run / "metrics.json").unlink()
    fails(report.main, ["--run", run], "metrics.json is missing", "eval.py --run")
    fails(report.main, [], "--run is missing")


def test_standard_errors_by_hand(tiny_run):
    metrics = json.loads((tiny_run / "metrics.json").read_text())
    share = metrics["models"]["grounded"]["HR@10"]
    error = (share * (1 - share) / (metrics["users"] - 1)) ** 0.5
    assert metrics["standard_errors"]["grounded"]["HR@10"] == pytest.approx(error)
