"""How preparing Amazon reviews scales: lines per second and peak memory, on generated files.

    python studies/prepare.py                       200,000 and 1,000,000 reviews
    python studies/prepare.py --lines 50000         other numbers of reviews, as in 50000,100000

The files have 2018's format, some users and items in them far more active than others. Each
`sources/amazon.py` is a process of its own, so that peaks of memory don't mix.
"""

import dataclasses
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import HERE, UserError, run_command, setting  # noqa: E402

WORDS = (
    "great magazine love the it my read every month good articles was very disappointed recipe "
    "price for not gift year"
).split()
OPTIONS = ("--text item", "--text reviews", "--text reviews --sentences")


@dataclasses.dataclass(frozen=True)
class PrepareSettings:
    """Measure how preparing Amazon reviews scales."""

    lines: str = setting("200000,1000000", "numbers of reviews, parted by commas")


def review(user, item, draw):
    """A review of 50 words on average, every field of 2018's format in it -> dict."""
    text = " ".join(draw.choices(WORDS, k=draw.randrange(5, 95)))
    return {
        "overall": 5.0,
        "vote": "3",
        "verified": True,
        "reviewTime": "02 26, 2014",
        "style": {"Format:": " Print"},
        "reviewerID": f"A{user:013d}",
        "asin": f"B{item:09d}",
        "summary": "Four Stars",
        "reviewText": f"{text}. And {text[:60]}!",
        "unixReviewTime": 1300000000 + 86400 * draw.randrange(3000),
    }


def metadata(item, draw):
    """The metadata of an item with a description of 60 words -> dict."""
    about = {"asin": f"B{item:09d}", "title": "A magazine", "brand": "X", "category": ["Food"]}
    return about | {"description": [" ".join(draw.choices(WORDS, k=60))]}


def write_files(folder, lines):
    """Write reviews.json, of lines / 9 users and lines / 30 items, and meta.json into a folder."""
    draw = random.Random(0)
    users = lines // 9
    items = lines // 30
    with open(folder / "reviews.json", "w") as file:
        for _ in range(lines):
            user = int(users * draw.random() ** 1.5)  # low numbers are more active
            item = int(items * draw.random() ** 2)
            file.write(json.dumps(review(user, item, draw)) + "\n")
    with open(folder / "meta.json", "w") as file:
        for item in range(items):
            file.write(json.dumps(metadata(item, draw)) + "\n")


def measure(folder, options):
    """Prepare the files of a folder -> (seconds, peak memory in GiB or None); UserError."""
    script = HERE / "sources" / "amazon.py"
    files = ["--reviews", folder / "reviews.json", "--meta", folder / "meta.json"]
    command = [sys.executable, script, *files, "--out", folder / "out", *options.split()]
    started = time.perf_counter()
    job = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    problem = job.stderr.read()
    peak = None
    if hasattr(os, "wait4"):  # not on Windows
        _, status, usage = os.wait4(job.pid, 0)  # the peak of this process alone
        peak = usage.ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)
    else:
        status = job.wait()
    seconds = time.perf_counter() - started
    if status:
        raise UserError(f"`sources/amazon.py {options}` failed: {problem.strip()}")
    return seconds, peak


def run(settings):
    """Print a row per number of reviews and way to use them. Raises UserError."""
    if not re.fullmatch(r"\d+(,\d+)*", settings.lines):
        raise UserError(f"--lines is {settings.lines!r}; give numbers, as in 50000,100000")
    print(f"{'lines':>10} {'MB':>6}  {'options':26} {'seconds':>8} {'lines/s':>9} {'peak GiB':>9}")
    for lines in map(int, settings.lines.split(",")):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            write_files(folder, lines)
            size = (folder / "reviews.json").stat().st_size / 1e6
            for options in OPTIONS:
                seconds, peak = measure(folder, options)
                said = "unknown" if peak is None else f"{peak:.2f}"
                speed = f"{seconds:8.1f} {lines / seconds:9,.0f} {said:>9}"
                print(f"{lines:10,} {size:6.0f}  {options:26} {speed}", flush=True)


def main(argv=None):
    return run_command(argv, __doc__, prepare=(PrepareSettings, run))


if __name__ == "__main__":
    sys.exit(main())
