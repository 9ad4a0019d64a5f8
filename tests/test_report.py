"""The report page: self-contained, harmless whatever the data say, and complete."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

import eval
from saerec import UserError

TEMPLATE = Path(eval.__file__).resolve().parent / "docs" / "report.html"
HTML = TEMPLATE.read_text(encoding="utf-8")
VOID = {"meta", "link", "input", "br", "img", "hr"}
HOSTILE = "</script><script>alert(1)</script><!-- <img src=x onerror=alert(1)> --> & \" ' \\ /*DATA*/ \u2028 \u2029 \x00 \ud800 \U0001f600"


class Page(HTMLParser):
    """The elements of a page, [(tag, attributes)], and what stands in each script; refuses tags that do not match."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.scripts, self.open = [], [], []
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


def example(text="a, b"):
    """Data with every key, where all texts are the given one."""
    intents = [
        dict(intent=j, latent=2 * j, label=text, keywords=[text], texts=[text], items=[text], density=0.01, detection_auroc=[0.9, None][j],
             detection_texts=3, is_intent=True, x=0.5, y=-1.0, neighbours=[[1 - j, 0.5]])
        for j in range(2)
    ]  # fmt: skip
    item = dict(rank=1, title=text, score=1.5, id_part=1.0, terms=[[0, 0.75]], rest=-0.25, held_out=True)
    return dict(
        title=text, dataset={"name": text, "users": 3}, protocol=text, made=text,
        models=[{"name": text, "metrics": {"HR@10": 0.2, "NDCG@10": 0.1}, "error": {"NDCG@10": 0.01}}],
        training={text: [{"epoch": 1, "seconds": 0.5, "loss_item": 3.0, "valid_NDCG@10": 0.1}]},
        sae=[dict(step=1, loss=1.0, train_fvu=0.5, fvu=0.6, l0=8, dead=0.0)], intents=intents,
        users=[dict(user=text, history=[text], personal=[[0, 2.0]], public=[1], recommendations=[item])],
        ablation=dict(metric="NDCG@10", rows=[dict(name=text, mean=0.1, std=0.01, params=10, seconds=1.0)], verdict=text),
        recovery=[dict(method=text, K=8, M=64, recovered=0.5, mean_cosine=0.5, auroc=0.9, isolation=0.5)],
        steering=[dict(strength=0, share=0.1, ndcg=0.1)], explain={"density": text},
    )  # fmt: skip


def data_of(page):
    """What stands in the data element, character for character."""
    return page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]


@pytest.mark.parametrize("text", ["a, b", HOSTILE])
def test_data_survive_byte_for_byte(text):
    data = example(text)
    page = eval.build_report(data, TEMPLATE)
    inside = data_of(page)
    assert json.loads(inside) == data and list(json.loads(inside)) == list(data)
    assert len(page) == len(HTML) + len(inside) - len("/*DATA*/")
    assert Page(page).scripts[0] == inside  # html.parser ends the element where we do
    page.encode()  # no lone surrogate is left


def test_hostile_texts_are_never_raw():
    page, inside = Page(eval.build_report(example(HOSTILE), TEMPLATE)), data_of(eval.build_report(example(HOSTILE), TEMPLATE))
    assert not set(inside) & set("<>&\u2028\u2029\x00\ud800") and "\U0001f600" in inside
    assert page.elements == Page(HTML).elements and len(page.scripts) == 2


def test_the_marker_is_filled():
    assert HTML.count("/*DATA*/") == 1
    assert "/*DATA*/" not in eval.build_report(example(), TEMPLATE)


@pytest.mark.parametrize("html", ["", "/*DATA*/ /*DATA*/"])
def test_a_template_without_its_marker(tmp_path, html):
    (tmp_path / "report.html").write_text(html)
    with pytest.raises(UserError, match="report.html must hold /\\*DATA\\*/ exactly once"):
        eval.build_report({}, tmp_path / "report.html")


def test_too_large_a_report_is_refused():
    data = example()
    data["intents"] *= 2500
    assert len(eval.build_report(data, TEMPLATE)) < 5e6
    data["intents"].append(dict(data["intents"][0], texts=["ä" * 2_200_000]))  # bytes count, not characters
    with pytest.raises(UserError, match=r"the report would be 5\.\d MB, over the limit of 5 MB: shorten its intents, 5\.\d MB of it"):
        eval.build_report(data, TEMPLATE)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_json_cannot_hold(number):
    with pytest.raises(UserError, match="NaN or infinite"):
        eval.build_report({"sae": [{"fvu": number}]}, TEMPLATE)


def test_the_page_fetches_nothing():
    for tag, attributes in Page(HTML).elements:
        assert not {"src", "srcset", "action", "data", "poster", "background"} & set(attributes), (tag, attributes)
        assert attributes.get("href", "#").startswith(("#", "data:,")), (tag, attributes)
    for word in ("http:", "https:", "@import", "url(", "fetch(", "XMLHttpRequest", "WebSocket", "EventSource", "sendBeacon", "import(", "Worker("):
        assert word not in HTML, word
    policy = next(a["content"] for tag, a in Page(HTML).elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and len(HTML.encode()) < 100_000


def test_the_page_never_makes_markup_of_data():
    for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser", "srcdoc", "javascript:",
                 "createContextualFragment"):  # fmt: skip
        assert word not in HTML, word
    assert not [attributes for _, attributes in Page(HTML).elements if any(name.startswith("on") for name in attributes)]


def test_every_key_has_its_place():
    page = Page(HTML)
    ids = page.ids()
    assert len(ids) == len(set(ids))
    drawn = re.search(r"^const sections = \{\n(.*?)^\};", HTML, re.M | re.S)[1]
    drawn = re.findall(r"^  (\w+)\(.*\{", drawn, re.M)
    assert sorted(drawn) == sorted(attributes["id"] for tag, attributes in page.elements if tag == "section")
    explained = set(re.findall(r"\n  (\w+(?:, \w+)*)   ", HTML.partition("-->")[0]))
    for key in example():
        assert key in ids or key == "explain"
        assert key in ", ".join(explained).split(", "), f"{key} is not described at the top of the template"
    for name in re.findall(r'\$\("([\w-]+)"\)', HTML):
        assert name in ids, name


def test_the_page_can_be_used_without_a_mouse():
    page = Page(HTML)
    ids, tags = page.ids(), page.elements
    assert tags[0] == ("html", {"lang": "en"})
    assert [tag for tag, _ in tags if tag in ("h1", "main", "nav", "header", "footer")] == ["header", "h1", "nav", "main", "footer"]
    for tag, attributes in tags:
        assert tag != "button" or attributes["type"] == "button"
        assert tag != "section" or attributes["aria-labelledby"] in ids and "hidden" in attributes
        assert int(attributes.get("tabindex", 0)) <= 0
    assert next(attributes for tag, attributes in tags if tag == "a") == {"class": "skip", "href": "#main"}
    assert len(re.findall(r"<label[^>]*>(?:(?!</label>).)*<input", HTML, re.S)) == len([1 for tag, _ in tags if tag == "input"])
    for word in ("prefers-color-scheme: dark", "prefers-reduced-motion", "@media print", ":focus-visible", "aria-sort", "aria-expanded"):
        assert word in HTML


def test_lines_are_short():
    assert max(map(len, HTML.splitlines())) <= 140
