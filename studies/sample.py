"""Look at intents as they come: some of a run's, drawn by a fixed seed, not the best.

    python studies/sample.py --run runs/ml-100k            -> runs/ml-100k/sample.json
    python studies/sample.py --run runs/ml-100k --out studies/results/intents_ml-100k.json

Each with its label, its keywords, how many other SAEs found it, how well words and meaning tell
held-out texts that it fires on, and the items that carry it most.
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import StageSettings, generator, run_command, run_dataset, setting  # noqa: E402

import torch  # noqa: E402

from eval import read_intents  # noqa: E402
from studies.significance import write_result  # noqa: E402

TOLD = (
    "intent", "label", "keywords", "support", "density", "detection_auroc", "meaning_auroc",
    "detection_texts",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SampleSettings(StageSettings):
    """Draw intents of a run, to look at."""

    count: int = setting(30, "intents to draw, or all if there are fewer", low=1)
    out: str = setting("", "where to write a copy of RUN/sample.json", unit="path")


def draw_rows(rows, data, count, seed):
    """Rows of intents.jsonl as they are drawn, with titles of their top items -> list of dict."""
    titles = dict(zip(data.items, data.titles))
    order = torch.randperm(len(rows), generator=generator(seed, "intents drawn"))
    drawn = []
    for intent in order[:count].tolist():
        row = rows[intent]
        told = {name: row[name] for name in TOLD}
        drawn.append(told | dict(items=[titles[item] for item in row["items"][:5]]))
    return drawn


def in_words(score):
    """An AUROC, or None, for people."""
    return "unknown" if score is None else f"{score:.2f}"


def sample_lines(rows):
    """Drawn intents in lines for people."""
    for row in rows:
        found = f"{row['density']:.1%} of texts, found by {row['support']} other SAEs"
        yield f"{row['label']}  ({found})"
        scores = f"words {in_words(row['detection_auroc'])}, "
        scores += f"meaning {in_words(row['meaning_auroc'])}"
        yield f"    AUROC over {row['detection_texts']} held-out texts: {scores}"
        yield f"    keywords: {', '.join(row['keywords'])}"
        yield f"    items: {'; '.join(row['items'])}"


def sample(settings):
    """Draw intents of a run, print them and write them. Raises UserError."""
    data = run_dataset(settings.run, settings.data)
    rows = read_intents(settings.run)
    drawn = draw_rows(rows, data, settings.count, settings.seed)
    print(*sample_lines(drawn), sep="\n")
    report = dict(dataset=data.folder.name, of=len(rows), seed=settings.seed, drawn=drawn)
    write_result(settings.run, "sample", report, settings.out)


def main(argv=None):
    return run_command(argv, __doc__, sample=(SampleSettings, sample))


if __name__ == "__main__":
    sys.exit(main())
