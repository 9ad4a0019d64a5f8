"""Let people judge a run's intents blindly, and score how right they are and how well they agree.

    python studies/rate.py sheet --run runs/ml-100k --out sheet.csv
    python studies/rate.py kappa a.csv b.csv --key sheet_key.csv

A sheet asks two things of each intent drawn: which of five texts does not belong to it (word
intrusion, Chang et al. 2009, with texts in place of words), and how well a label, the intent's own
or another's, fits its texts. Raters fill in the column `answer` of copies of the sheet; the right
answers lie beside it, in SHEET_key.csv.
"""

import csv
import dataclasses
import itertools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import UserError, run_command, setting, write_atomically  # noqa: E402

import numpy as np  # noqa: E402

from eval import read_intents  # noqa: E402

SHOWN = 4  # texts of an intent in a question
HEADER = ("question", "task", "asked", *(f"text {n}" for n in range(1, SHOWN + 2)), "answer")
KEY_HEADER = ("question", "task", "right")
INTRUDER = f"which text does not belong? 1-{SHOWN + 1}"
LABEL = "how well does {!r} fit these texts? 1 (not at all) - 5 (perfectly)"


@dataclasses.dataclass(frozen=True)
class SheetSettings:
    """Write a blind, shuffled sheet for human raters, and its key beside it."""

    run: str = setting("", "run folder with intents", unit="path", example="runs/ml-100k")
    out: str = setting("sheet.csv", "sheet to write; its key's name ends in _key", unit="path")
    intents: int = setting(30, "intents to ask about, drawn by the seed", low=1)
    seed: int = setting(0, "seed of every random choice", low=0, high=2**31 - 1)


def intruder_question(rows, at, random):
    """Four texts of intent `at` and a stranger, shuffled -> (task, asked, texts, right answer).

    The stranger is the strongest text of another intent. None if no such text is a stranger.
    """
    own = rows[at]["texts"]
    strangers = [row["texts"][0] for row in rows if row["texts"][0] not in own]
    if not strangers:
        return None
    texts = [*own[:SHOWN], strangers[random.integers(len(strangers))]]
    order = random.permutation(len(texts))
    right = int(order.argmax()) + 1
    return "intruder", INTRUDER, [texts[place] for place in order], right


def label_question(rows, at, random):
    """Texts of intent `at` and, half of the time, its own label, else another's.

    -> (task, asked, texts, 1 for its own label or 0).
    """
    named = at
    if random.random() < 0.5:
        named = (at + random.integers(1, len(rows))) % len(rows)
    asked = LABEL.format(rows[named]["label"])
    return "label", asked, [*rows[at]["texts"][:SHOWN], ""], int(named == at)


def draw_questions(rows, intents, random):
    """Questions on so many intents, drawn and shuffled -> list of (task, asked, texts, right)."""
    questions = []
    for at in random.permutation(len(rows))[:intents].tolist():
        questions.append(intruder_question(rows, at, random))
        questions.append(label_question(rows, at, random))
    questions = [question for question in questions if question]
    return [questions[place] for place in random.permutation(len(questions))]


def write_csv(path, header, rows):
    """Write a CSV file for spreadsheets, atomically; UTF-8, lines end as RFC 4180 says."""

    def write(temporary):
        with open(temporary, "w", encoding="utf-8-sig", newline="") as file:  # for spreadsheets
            csv.writer(file).writerows([header, *rows])

    write_atomically(path, write)


def write_sheet(settings):
    """Write the sheet and its key. Raises UserError if there are too few intents to ask about."""
    rows = [row for row in read_intents(settings.run) if len(row["texts"]) >= SHOWN]
    if len(rows) < 2:
        problem = f"{settings.run} has {len(rows)} intent(s) with {SHOWN} top texts"
        raise UserError(f"{problem}: bring more texts, since two are needed to find intruders")
    random = np.random.default_rng(settings.seed)
    sheet = []
    key = []
    for number, question in enumerate(draw_questions(rows, settings.intents, random), 1):
        task, asked, texts, right = question
        sheet.append([number, task, asked, *texts, ""])
        key.append([number, task, right])
    out = Path(settings.out)
    write_csv(out, HEADER, sheet)
    write_csv(out.with_stem(out.stem + "_key"), KEY_HEADER, key)
    scored = "`python studies/rate.py kappa` scores each rater's copy"
    print(f"{out}: {len(sheet)} questions; fill in the column answer, then {scored}")


@dataclasses.dataclass(frozen=True)
class KappaSettings:
    """Score filled sheets: accuracy against the key, and how well the raters agree."""

    sheets: list = setting(None, "filled copies of one sheet, one per rater", positional=True)
    key: str = setting("", "the sheet's _key file, without which agreement is scored alone")


def read_sheet(path, column):
    """A column of a rating sheet -> {question: (task, whole number)}.

    Raises UserError with file and row; the header is row 1.
    """
    usual = csv.field_size_limit(2**31 - 1)  # a text may be longer than the usual 128 KiB
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            parted_by = max(",;\t", key=file.readline().count)  # a spreadsheet may change it
            file.seek(0)
            rows = list(csv.DictReader(file, delimiter=parted_by))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        remedy = "give one that `studies/rate.py sheet` wrote"
        raise UserError(f"{path} cannot be read ({error}): {remedy}") from error
    finally:
        csv.field_size_limit(usual)
    lacking = {"question", "task", column} - set(rows[0] if rows else ())
    if lacking:
        problem = f"{path} has no column {min(lacking)!r}, or no row"
        raise UserError(f"{problem}: give one that `studies/rate.py sheet` wrote")
    answers = {}
    for number, row in enumerate(rows, 2):
        value = (row.get(column) or "").strip()
        allowed = "12345"
        if column == "right" and row.get("task") == "label":
            allowed = "01"
        if not row.get("question") or len(value) != 1 or value not in allowed:
            problem = f"{column} is {value!r}, not one of {', '.join(allowed)}"
            raise UserError(f"{path} row {number}: {problem}: fill it in")
        answers[row["question"]] = (row["task"], int(value))
    return answers


def cohen_kappa(a, b):
    """Agreement of two raters beyond chance (Cohen 1960); a, b: int [questions]."""
    agree = np.mean(a == b)
    chance = sum(np.mean(a == answer) * np.mean(b == answer) for answer in np.union1d(a, b))
    if chance == 1:
        return 1.0
    return float((agree - chance) / (1 - chance))


def fleiss_kappa(answers):
    """Agreement of several raters beyond chance (Fleiss 1971); answers: int [raters, questions]."""
    count = np.stack([(answers == answer).sum(0) for answer in np.unique(answers)], 1)
    raters = len(answers)
    pairs = raters * (raters - 1)
    agree = ((count**2).sum(1) - raters) / pairs  # (questions,)
    chance = ((count.sum(0) / count.sum()) ** 2).sum()
    if chance == 1:
        return 1.0
    return float((agree.mean() - chance) / (1 - chance))


def correctness(task, answers, right):
    """What the key says of the answers to one task, int [raters, questions], in words."""
    if task == "intruder":
        return f"accuracy {(answers == right).mean():.2f} (chance {1 / (SHOWN + 1):.2f})"
    fit = {}
    for side in (0, 1):
        asked = answers[:, right == side]
        fit[side] = "none asked"
        if asked.size:
            fit[side] = f"{asked.mean():.2f}"
    return f"mean fit {fit[1]} of own labels, {fit[0]} of other intents' labels"


def agreement(answers):
    """How well two raters or more agree, int [raters, questions], in words."""
    pairs = [cohen_kappa(a, b) for a, b in itertools.combinations(answers, 2)]
    several = ""
    if len(pairs) > 1:
        several = " (mean of pairs)"
    return f"Cohen's kappa {np.mean(pairs):.2f}{several}, Fleiss' kappa {fleiss_kappa(answers):.2f}"


def tasks_of(answers):
    """What is asked, of answers as `read_sheet` gives them -> {question: task}."""
    return {question: task for question, (task, _) in answers.items()}


def score_sheets(settings):
    """Print accuracy and agreement of filled sheets. Raises UserError."""
    sheets = [read_sheet(path, "answer") for path in settings.sheets]
    first = sheets[0]
    key = read_sheet(settings.key, "right") if settings.key else {}
    asked = tasks_of(first)
    for path, sheet in zip(settings.sheets, sheets):
        if tasks_of(sheet) != asked or (key and tasks_of(key) != asked):
            problem = f"{path} has other questions than {settings.sheets[0]} or the key"
            raise UserError(f"{problem}: give copies of one sheet")
    for task in ("intruder", "label"):
        asked = [question for question, (kind, _) in first.items() if kind == task]
        if not asked:
            continue
        answers = np.array([[sheet[question][1] for question in asked] for sheet in sheets])
        said = [f"{task}: {len(asked)} questions, {len(sheets)} raters"]
        if key:
            right = np.array([key[question][1] for question in asked])
            said.append(correctness(task, answers, right))
        if len(sheets) > 1:
            said.append(agreement(answers))
        print("; ".join(said))


def main(argv=None):
    commands = dict(sheet=(SheetSettings, write_sheet), kappa=(KappaSettings, score_sheets))
    return run_command(argv, __doc__, **commands)


if __name__ == "__main__":
    sys.exit(main())
