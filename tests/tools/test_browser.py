"""The report page in a real browser: what opens, fits, is found, and where Back leads.

One headless Chromium asks a server here for a page, shows it in a frame that can have any width,
posts what a script at the page's end has found, and asks for the next.
"""

import csv
import http.server
import io
import json
import queue
import shutil
import subprocess
import threading

import pytest

from conftest import copy_run
from tools import report

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    not CHROMIUM, reason="no Chromium here: install one, as with `apt install chromium`"
)
FLAGS = "--headless=new --no-sandbox --disable-gpu --hide-scrollbars --force-prefers-reduced-motion"
FLAGS += " --no-first-run --window-size=2000,1200"
OUTER = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">
<iframe id="frame" src="page" style="width: 1100px; height: 1000px; border: 0"></iframe>
<script>
async function finish(result) {
  await fetch("result", {method: "POST", body: JSON.stringify(result)});
  location.reload();
}
</script>
"""
TRY = """<script>
const failures = [];
addEventListener("error", event => {
  if (!event.message.startsWith("ResizeObserver loop")) failures.push(event.message); // no fault
});
addEventListener("securitypolicyviolation", event => failures.push(event.violatedDirective));
const frame = () => new Promise(done => requestAnimationFrame(done));
const pause = async () => { // for timers, and for the events of a frame, such as resize
  await new Promise(done => setTimeout(done, 150));
  for (let i = 0; i < 3; i++) await frame();
};
const widen = async width => {
  parent.document.getElementById("frame").style.width = `${width}px`;
  await pause();
};
const all = selector => [...document.querySelectorAll(selector)];
const wide = node => node.getBoundingClientRect().width;
const search = async text => {
  $("query").value = text;
  $("query").dispatchEvent(new Event("input"));
  await pause();
};
addEventListener("load", async () => {
  await pause();
  const found = await (async () => { TRIED })().catch(error => failures.push(String(error)));
  parent.finish({found, failures});
});
</script>
"""


@pytest.fixture(scope="module")
def content(tiny_run, tmp_path_factory):
    """What the report of the tiny run shows, as if all its intents could be judged -> JSON."""
    run = copy_run(tiny_run, tmp_path_factory.mktemp("browser") / "run")
    settings = report.ReportSettings(run=str(run), device="cpu")
    content = report.run_content(run, settings)
    for row in content["intents"]:
        row |= dict(detection_auroc=0.9, permuted_auroc=0.5, detection_texts=4)
    content["library"] |= dict(measured=16, detection_auroc=0.9, permuted_auroc=0.5)
    return json.dumps(content)


class Pages(http.server.BaseHTTPRequestHandler):
    """Gives out the next page of a queue, and takes what was found on it."""

    waiting = queue.Queue()  # of pages
    results = queue.Queue()  # of dicts
    page = ""

    def do_GET(self):
        if self.path == "/":
            Pages.page = self.waiting.get()
        content = OUTER if self.path == "/" else Pages.page
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.end_headers()
        self.wfile.write(content.encode())

    def do_POST(self):
        found = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()
        self.results.put(json.loads(found))

    def log_message(self, *words):
        """Nothing."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser that shows pages as they come."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    profile = f"--user-data-dir={tmp_path_factory.mktemp('profile')}"
    address = f"http://127.0.0.1:{server.server_port}/"
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = subprocess.Popen([CHROMIUM, *FLAGS.split(), profile, address], **quiet)
    yield process
    process.terminate()
    process.wait()
    server.shutdown()


@pytest.fixture
def browse(browser):
    """browse(content, script): what the script, a function's body, returns on the page."""

    def run(content, script):
        page = report.build_report(content)
        Pages.waiting.put(page + TRY.replace("TRIED", script))
        result = Pages.results.get(timeout=30)
        assert result["failures"] == [], result
        return result["found"]

    return run


def test_an_open_row_leaves_names_their_room(content, browse):
    """At every width, also when it changes with a row open, and nothing reaches out of the page."""
    measured = browse(
        json.loads(content),
        """
        const rows = [];
        for (const width of [320, 360, 400, 760, 768, 1100, 1920, 360]) {
          const name = () => wide(all("#list tr.row td")[0]);
          const right = node => node.getBoundingClientRect().right;
          await widen(width); // with a row open, but the first time
          const open = name(), row = all("#list tr.row")[0];
          if (rows.length) toggle(row);
          const closed = name();
          toggle(row);
          const metric = all("#models-table th").find(head => head.textContent === "NDCG@10");
          rows.push({width: innerWidth, open, closed, again: name(), list: wide($("list")),
            detail: wide(all("tr.detail td")[0]), page: document.documentElement.scrollWidth,
            metric: right(metric), table: right(all("#models-table .scroll")[0])});
        }
        return rows;
        """,
    )
    assert [row["width"] for row in measured] == [320, 360, 400, 760, 768, 1100, 1920, 360]
    for row in measured:
        assert row["open"] == row["again"] == pytest.approx(row["closed"], abs=1), row
        assert row["open"] > 80 and row["detail"] == pytest.approx(row["list"], abs=1), row
        assert row["page"] <= row["width"] and row["metric"] <= row["table"] + 1, row


def test_the_first_sentence_says_whether_it_is_chance(content, browse):
    """Nothing is bold or in colour unless it is better by more than chance."""
    content = json.loads(content)
    rows = content["compared"]["rows"]
    metrics = list(rows[0]["differences"])
    rows[0]["differences"] = dict.fromkeys(metrics, [0.0053, 0.0011, 0.0095])
    rows[1]["differences"] = dict.fromkeys(metrics, [0.0053, -0.0042, 0.0148])
    found = browse(
        content,
        """
        const bold = all("#models-table tr:has(strong) th").map(one => one.textContent);
        const colour = all("#models-charts .bar.ours").length;
        return {said: $("finding").textContent, bold, colour};
        """,
    )
    first, second, third = found["said"].split(". ")
    interval = "paired 95% interval +0.0011 to +0.0095, 24 users"
    end = "better by more than chance"
    assert first == f"Grounded +0.0053 NDCG@10 against SASRec ({interval}): {end}"
    interval = "paired 95% interval \u22120.0042 to +0.0148"
    assert second == f"SAERec +0.0053 against SASRec ({interval}): not distinguishable"
    assert third.endswith("AUROC 0.90 in the median; keywords of another intent reach 0.50.")
    assert found["bold"] == ["Grounded"] and found["colour"] == 2  # of the charts of two metrics


def test_the_glance_counts_all_intents_and_none_that_is_none(content, browse):
    """Whatever the list holds of them."""
    content = json.loads(content)
    content["library"] = dict(
        intents=5000, none=12, measured=4321, detection_auroc=0.8, permuted_auroc=None
    )
    listed = len(content["intents"])
    texts = browse(content, "return all('#glance div').map(one => one.textContent);")
    assert texts[1] == (
        "intents5,000found in the texts, each with a name; 12 more were judged to be none; "
        f"the {listed} densest are listed"
    )
    assert "0.80of the 4,321 intents that fire on three held-out texts or more; 0.5" in texts[2]


def test_what_was_not_measured_is_said_so(content, browse):
    content = json.loads(content)
    for model in content["models"]:
        model["metrics"] = dict.fromkeys(model["metrics"])
        model["error"] = dict.fromkeys(model["error"])
    for row in content["compared"]["rows"]:
        row["differences"] = {name: [0.0, None, None] for name in row["differences"]}
    for row in content["sae"]:
        row |= dict.fromkeys(["fvu", "train_fvu", "l0", "dead"])
    for row in content["intents"]:
        row |= dict.fromkeys(["detection_auroc", "permuted_auroc", "support"])
    content["library"] |= dict(measured=0, detection_auroc=None, permuted_auroc=None)
    found = browse(
        content,
        """
        toggle(all("#list tr.row")[0]);
        const places = ["finding", "glance", "models-table", "sae-table"].map(id => $(id));
        const texts = [...places, all("tr.detail")[0]].map(place => place.textContent);
        return {texts, rows: all("#list tr.row").length};
        """,
    )
    assert found["rows"] == len(content["intents"])  # the filter hides nothing where all is unknown
    for text in found["texts"]:
        assert "not measured" in text and "NaN" not in text, text


def test_a_page_with_little_on_it(content, browse):
    """Nothing at all, and a run without intents: what is not there stays hidden."""
    shown = "return all('main > section:not([hidden])').map(one => one.id);"
    assert browse({}, shown) == []
    content = json.loads(content)
    for key in ("intents", "items", "library", "names", "compared", "sae"):
        del content[key]
    for item in content["users"]["rows"][0]["recommendations"]:
        item |= dict(terms=[], beside=None)
    assert browse(content, shown) == ["models", "users", "training"]


def test_search_finds_titles_whatever_their_accents(content, browse):
    content = json.loads(content)
    content["intents"][3] |= dict(label="amélie, श्रेष्ठ", detection_auroc=0.997, detection_texts=2)
    content["items"][0] = ["Amélie (2001)", [5]]
    found = browse(
        content,
        """
        const shows = async text => {
          await search(text);
          return all("#list tr.row").map(row => Number(row.id.slice(7)));
        };
        const marks = place => all(`${place} mark`).map(one => one.textContent);
        const narrow = await shows("amelie"), title = marks("#found");
        const items = $("found").textContent;
        $("judged-only").checked = false;
        const loose = await shows("AMELIE"), label = marks("#intent-3");
        const area = $("intent-3").cells[3].textContent;
        const hindi = await shows("श्रेष्ठ");
        const nothing = await shows("zzz"), listed = $("listed").textContent;
        await shows("");
        const by = () => all("#list th button")[3].click();
        by();
        const order = all("#list tr.row").map(row => Number(row.id.slice(7)));
        return {narrow, items, title, loose, label, area, hindi, nothing, listed, order};
        """,
    )
    assert found["narrow"] == [5] and sorted(found["loose"]) == [3, 5] and found["hindi"] == [3]
    assert found["items"].startswith("Amélie (2001): ") and found["title"] == ["Amélie"]
    assert found["label"] == ["amélie"] and found["area"] == "> 0.99"
    assert found["nothing"] == [] and found["listed"] == "No intent has \u201czzz\u201d."
    assert found["order"][-1] == 3  # of two held-out texts: it cannot be judged


def test_back_returns_to_where_one_was(content, browse):
    content = json.loads(content)
    content["intents"][2]["detection_texts"] = 1  # which the list leaves out at first
    found = browse(
        content,
        """
        const here = () => ({hash: location.hash, open: all("tr.detail").map(one => one.id),
          y: Math.round(scrollY), query: $("query").value, judged: $("judged-only").checked});
        const steps = [];
        await search("thing");
        scrollTo(0, 700);
        toggle(all("#list tr.row")[1]);
        await pause();
        steps.push(here());
        visit("#intent-2");
        await pause();
        steps.push(here());
        all("tr.detail .valued a")[0].click();
        await pause();
        steps.push(here());
        for (let i = 0; i < 3; i++) {
          history.back();
          await pause();
          steps.push(here());
        }
        return steps;
        """,
    )
    opened, intent, title, *back = found
    assert opened["hash"] == "#" + opened["open"][0].replace("detail", "intent")
    assert intent["hash"] == "#intent-2" and "detail-2" in intent["open"]
    assert intent["query"] == "" and not intent["judged"]
    assert title["hash"].startswith("#find-Thing") and title["query"].startswith("Thing")
    assert back[0] == intent and back[1] == opened
    start = dict(hash="", open=[], y=opened["y"], query="thing", judged=True)
    assert back[2] == start


def test_an_address_that_was_cut_is_searched_for_as_it_is(content, browse):
    found = browse(
        json.loads(content),
        """
        const queries = [];
        for (const hash of ["#find-%", "#find-Am%C3", "#find-Am%C3%A9lie"]) {
          visit(hash);
          await pause();
          queries.push($("query").value);
        }
        return queries;
        """,
    )
    assert found == ["%", "Am%C3", "Am\u00e9lie"]


def test_the_map_has_keys_and_addresses(content, browse):
    found = browse(
        json.loads(content),
        """
        const map = all("#map svg.map")[0];
        const press = key => map.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
        map.focus();
        press("ArrowRight");
        const said = $("map-said").textContent;
        press("Enter");
        await pause();
        const entered = location.hash, focused = document.activeElement.textContent;
        history.back();
        await pause();
        const back = location.hash;
        const [point, {at: [right, down]}] = [...dots].find(([, spot]) => spot.at);
        const {left, top} = map.getBoundingClientRect();
        map.dispatchEvent(new MouseEvent("click", {clientX: left + right, clientY: top + down}));
        await pause();
        return {said, entered, focused, back, clicked: location.hash, point: point.intent};
        """,
    )
    assert found["said"].startswith(found["focused"]) and found["entered"].startswith("#intent-")
    assert found["back"] == "" and found["clicked"] == f"#intent-{found['point']}"


def read_csv(text):
    """Rows of what was downloaded -> list of dict."""
    return list(csv.DictReader(io.StringIO(text.removeprefix("\ufeff"))))


def test_details_print_and_download(content, browse):
    content = json.loads(content)
    label, absent = "=1+1, \u201cquoted\u201d", "never said"
    content["intents"][0] |= dict(label=label, keywords=["thing", absent], detection_texts=9)
    found = browse(
        content,
        """
        toggle($("intent-0"));
        const detail = $("detail-0").textContent, bars = all("#detail-0 .histogram rect").length;
        const marks = all("#detail-0 mark").map(one => one.textContent);
        const because = all(".because").map(one => one.textContent);
        dispatchEvent(new Event("beforeprint"));
        const spans = all("tr.detail td").map(one => one.colSpan);
        dispatchEvent(new Event("afterprint"));
        let blob;
        const address = URL.createObjectURL;
        URL.createObjectURL = one => { blob = one; return address(one); };
        $("download").click();
        const after = all("tr.detail").length, csv = await blob.text();
        await search("never said");
        $("download").click();
        const found = await blob.text();
        return {detail, marks, bars, because, spans, after, csv, found};
        """,
    )
    assert f"No text shown here contains \u201c=1+1\u201d" in found["detail"]
    assert f"or \u201c{absent}\u201d." in found["detail"] and set(found["marks"]) == {"thing"}
    for heading in ("fires most", "carry it most", "it moves most", "strongly", "together with"):
        assert heading in found["detail"]
    assert found["bars"] == report.BINS
    assert any(said.startswith("Because you took Thing ") for said in found["because"])
    assert len(found["spans"]) >= 6 and set(found["spans"]) == {5} and found["after"] == 1
    rows = read_csv(found["csv"])
    densities = [float(row["density"]) for row in rows]
    assert densities == sorted(densities, reverse=True)  # as they are listed
    rows.sort(key=lambda row: int(row["intent"]))
    assert read_csv(found["found"]) == rows[:1]
    assert rows[0]["label"] == "'" + label and rows[0]["keywords"] == f"thing; {absent}"
    for row, intent in zip(rows, content["intents"], strict=True):
        assert float(row["density"]) == intent["density"] and row["text"] == intent["texts"][0][0]


def test_it_is_said_whether_the_history_has_an_intent_and_whether_it_speaks_for_the_item(
    content, browse
):
    content = json.loads(content)
    items = content["users"]["rows"][0]["recommendations"]
    terms = ([[0, -1.0, ["Thing 1"]], [1, 0.5, []]], [[0, 1.0, []]], [[0, 1.0, ["Thing 1"]]])
    for item, some in zip(items, terms):
        item["terms"] = some
    said = browse(content, "return all('.because').map(one => one.textContent);")
    last = "in the last items of the history"
    assert said[0] == f"None of its largest intents that are {last} speaks for it."
    assert said[1] == f"None of its largest intents is {last}."
    assert said[2].startswith("Because you took Thing 1, which has ")


def test_a_map_of_4000_intents_is_thinned(content, browse):
    content = json.loads(content)
    one = content["intents"][0] | dict(neighbours=[], detection_texts=5, detection_auroc=0.9)
    many = []
    for number in range(4000):
        place = dict(x=number * 37 % 101, y=number * 61 % 103, density=(number + 1) / 4000)
        many.append(one | place | dict(intent=number, label=f"intent {number}"))
    content["intents"] = many
    found = browse(
        content,
        """
        const seen = dot => dot.getAttribute("visibility") === "visible";
        const drawn = () => all("#map .q").filter(seen).length;
        const said = () => $("map-thinned").textContent;
        const whole = drawn(), before = said(), labels = all("#map .halo").length;
        zoomTo(6, 0.5, 0.5);
        return {whole, before, labels, near: drawn(), after: said()};
        """,
    )
    assert 500 < found["whole"] < 1500 and 5 <= found["labels"] < 25
    assert found["before"].startswith(f"The densest {found['whole']:,} are drawn; zoom in")
    assert 0 < found["near"] < found["whole"] and found["after"] == ""
