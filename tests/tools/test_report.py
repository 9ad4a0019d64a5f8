"""The report page: self-contained, harmless whatever the data say, complete, and a run's own."""

import csv
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import saerec
from conftest import copy_run, make_run
from eval import read_intents
from model import MODELS
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
    row = dict(intent=number, latent=2 * number, label=text, keywords=[text], texts=[text])
    row |= dict(items=[text], density=0.01, detection_auroc=auroc, detection_texts=3)
    return row | dict(is_intent=True, x=0.5, y=-1.0, neighbours=[[1 - number, 0.5]])


def example_users(text):
    item = dict(rank=1, title=text, score=1.5, parts=[["id", 1.0]], terms=[[0, 0.75]], rest=-0.25)
    user = dict(user=text, history=[text], personal=[[0, 2.0]], public=[1])
    user |= dict(recommendations=[item | dict(held_out=True)])
    return dict(model=text, rows=[user])


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
        training={text: [epoch]},
        sae=[dict(step=1, loss=1.0, train_fvu=0.5, fvu=0.6, l0=8, dead=0.0)],
        intents=[example_intent(0, text), example_intent(1, text)],
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


def test_too_large_a_report_is_refused():
    data = example()
    data["intents"] *= 2500
    assert len(report.build_report(data)) < 5e6
    long = dict(data["intents"][0], texts=["ä" * 2_200_000])  # bytes count, not characters
    data["intents"].append(long)
    limit = r"the report would be 5\.\d MB, over the limit of 5 MB"
    with pytest.raises(UserError, match=rf"{limit}: shorten its intents, 5\.\d MB of it"):
        report.build_report(data)


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


def test_every_key_has_its_place():
    page = Page(HTML)
    ids = page.ids()
    assert len(ids) == len(set(ids))
    drawn = re.search(r"^const sections = \{\n(.*?)^\};", HTML, re.M | re.S)[1]
    drawn = re.findall(r"^  (\w+)\(.*\{", drawn, re.M)
    assert sorted(drawn) == sorted(a["id"] for tag, a in page.elements if tag == "section")
    explained = set(re.findall(r"\n  (\w+(?:, \w+)*)   ", HTML.partition("-->")[0]))
    for key in example():
        assert key in ids or key == "explain"
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


def test_lines_are_short():
    assert max(map(len, HTML.splitlines())) <= 140


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


def test_results_and_curves_of_every_model(run):
    content = content_of(run)
    metrics = json.loads((run / "metrics.json").read_text())
    names = {"popularity": "popularity", "sasrec": "SASRec", "saerec": "SAERec"}
    names |= {"grounded": "Grounded"}
    assert [one["name"] for one in content["models"]] == list(names.values())
    for name, one in zip(names, content["models"], strict=True):
        assert one["metrics"] == metrics["models"][name]
        assert one["error"] == metrics["standard_errors"][name]
    assert list(content["training"]) == ["Grounded", "SAERec", "SASRec"]
    for name in MODELS:
        with open(run / f"{name}_log.csv") as file:
            logged = [float(row["valid_NDCG@10"]) for row in csv.DictReader(file)]
        curve = content["training"][names[name]]
        assert [row["valid_NDCG@10"] for row in curve] == logged
        assert all({"epoch", "loss", "seconds"} <= row.keys() for row in curve)
    assert content["sae"] == report.read_log(run / "sae_log.csv")
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


def test_intents_are_shown_with_titles_and_neighbours(run):
    content = content_of(run)
    rows = read_intents(run)
    assert len(content["intents"]) == len(rows)
    titles = set(saerec.run_dataset(run).titles)
    for shown, row in zip(content["intents"], rows):
        same = ("intent", "latent", "label", "keywords", "density", "detection_auroc")
        assert all(shown[name] == row[name] for name in same)
        assert set(shown["items"]) <= titles and len(shown["items"]) == len(row["items"])
        assert math.isfinite(shown["x"]) and math.isfinite(shown["y"])
    few = content_of(run, "--intents", "4")["intents"]
    densities = sorted((row["density"] for row in rows), reverse=True)
    assert sorted((row["density"] for row in few), reverse=True) == densities[:4]
    listed = {row["intent"] for row in few}
    assert all({other for other, _ in row["neighbours"]} <= listed for row in few)
    assert all("x" not in row for row in content_of(run, "--intents", "3")["intents"])


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
            whole = sum(value for _, value in one["parts"] + one["terms"]) + one["rest"]
            assert whole == pytest.approx(one["score"], abs=1e-5)
            assert one["held_out"] == (one["title"] == user["target"]["title"])
        strengths = [strength for _, strength in user["personal"]]
        assert all((strength is None) == (name == "saerec") for strength in strengths)
        assert bool(user["public"]) == (name == "saerec")


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


def test_a_run_that_cannot_be_shown(run, fails):
    (run / "interpret.json").write_text("{")
    fails(report.main, ["--run", run], "interpret.json is not valid JSON", "delete it")
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
