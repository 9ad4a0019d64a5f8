"""How `prepare amazon` scales: review lines per second and peak memory on generated files of 2018's format.

python benchmarks/prepare.py             200,000 and 1,000,000 lines
python benchmarks/prepare.py 50000       other numbers of lines
"""

import json
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = Path(__file__).resolve().parent.parent / "saerec.py"
WORDS = (
    "great magazine love the it my read every month good articles was very disappointed recipe price for not gift year".split()
)


def write_files(folder, lines):
    """Reviews of lines / 9 users and lines / 30 items, some of each far more active, 50 words on average; and metadata."""
    draw = random.Random(0)
    users, items = lines // 9, lines // 30
    with open(folder / "reviews.json", "w") as f:
        for _ in range(lines):
            text = " ".join(draw.choices(WORDS, k=draw.randrange(5, 95)))
            row = {"overall": 5.0, "vote": "3", "verified": True, "reviewTime": "02 26, 2014", "style": {"Format:": " Print"},
                   "reviewerID": f"A{int(users * draw.random() ** 1.5):013d}", "asin": f"B{int(items * draw.random() ** 2):09d}",
                   "summary": "Four Stars", "reviewText": f"{text}. And {text[:60]}!",
                   "unixReviewTime": 1300000000 + 86400 * draw.randrange(3000)}  # fmt: skip
            f.write(json.dumps(row) + "\n")
    with open(folder / "meta.json", "w") as f:
        for item in range(items):
            row = {"asin": f"B{item:09d}", "title": "A magazine", "brand": "X", "category": ["Food"]}
            f.write(json.dumps(row | {"description": [" ".join(draw.choices(WORDS, k=60))]}) + "\n")


def main(argv):
    print(f"{'lines':>10} {'MB':>6}  {'options':26} {'seconds':>8} {'lines/s':>9} {'peak GiB':>9}")
    for lines in map(int, argv or ("200000", "1000000")):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            write_files(folder, lines)
            for options in ("--text item", "--text reviews", "--text reviews --sentences"):
                files = ["--reviews", folder / "reviews.json", "--meta", folder / "meta.json", "--out", folder / "out"]
                command = [sys.executable, SCRIPT, "prepare", "amazon", *files, *options.split()]
                started = time.perf_counter()
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                seconds, size = time.perf_counter() - started, (folder / "reviews.json").stat().st_size / 1e6
                peak = re.search(r"peak memory ([\d.]+) GiB", out)[1]
                print(f"{lines:10,} {size:6.0f}  {options:26} {seconds:8.1f} {lines / seconds:9,.0f} {peak:>9}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
