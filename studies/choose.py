"""Choose between variants on validation alone, over several seeds; test items are never ranked.

    python studies/choose.py --run runs/scientific --only "Grounded,Grounded + P d"

Writes RUN/choice.json, and a copy at --out; goes on where it was interrupted. This is how it was
settled what Grounded holds: docs/results.md has the outcome.
"""

import dataclasses
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import (  # noqa: E402
    UserError, file_hash, run_command, run_dataset, setting, write_lines,
)  # fmt: skip

from model import new_model, train_model  # noqa: E402
from studies.ablate import ROWS, AblateSettings, base_settings, rival_folder  # noqa: E402
from studies.significance import write_result  # noqa: E402

WITH_A_MODEL = [name for name, row in ROWS.items() if row.Model]


@dataclasses.dataclass(frozen=True)
class ChooseSettings(AblateSettings):
    """Train rows of studies/ablate.py and compare them on validation."""

    only: str = setting("", "names of rows, parted by commas", example='"Grounded,SASRec"')
    out: str = setting("", "where to write a copy of RUN/choice.json", unit="path")


def validation_score(name, data, settings):
    """Train a row with ModelSettings -> its best validation NDCG@10."""
    row = ROWS[name]
    if row.rival:
        settings = dataclasses.replace(settings, run=rival_folder(row.rival, settings))
    _, log = train_model(new_model(row.Model, settings, data), data, row.loss)
    return max(line["valid_NDCG@10"] for line in log)


def standard_error(values):
    """Standard error of the mean over seeds, or None of a single one."""
    if len(values) < 2:
        return None
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return (variance / len(values)) ** 0.5


def read_before(path, made_with):
    """{row: {seed: NDCG@10}} of an interrupted run on the same data, intents and settings, or {}.

    Raises UserError if the file is broken.
    """
    if not path.is_file():
        return {}
    try:
        report = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error}): delete it") from error
    return report["valid"] if made_with.items() <= report.items() else {}


def choose(settings):
    """Train what is asked for with every seed, and print means and standard errors. UserError."""
    names = [name.strip() for name in settings.only.split(",")]
    for name in names:
        if name not in WITH_A_MODEL:
            known = ", ".join(WITH_A_MODEL)
            raise UserError(f"--only: there is no row {name!r}; choose among {known}")
    data = run_dataset(settings.run, settings.data)
    base = dataclasses.replace(base_settings(settings), device=settings.device, data=settings.data)
    path = Path(settings.run) / "choice.json"
    made_with = dict(hash=data.hash, model_flags=settings.model_flags)
    made_with["intents"] = file_hash(path.with_name("intents.safetensors"))
    made_with["changes"] = {name: row.changes for name, row in ROWS.items() if row.changes}
    valid = read_before(path, made_with)
    seeds = range(settings.seed, settings.seed + settings.seeds)
    report = dict(dataset=data.folder.name, users=len(data.users), valid=valid) | made_with
    for seed in seeds:
        for name in names:
            scores = valid.setdefault(name, {})
            if str(seed) not in scores:
                print(f"{name}, seed {seed}")
                one = dataclasses.replace(base, seed=seed)
                own = ROWS[name].settings(one, settings.model_flags)
                scores[str(seed)] = validation_score(name, data, own)
                write_lines(path, [json.dumps(report, indent=1)])
    for name in names:
        values = [valid[name][str(seed)] for seed in seeds]
        mean = sum(values) / len(values)
        error = standard_error(values)
        spread = f" ± {error:.4f}" if error is not None else ""
        said = f"{len(values)} seed(s), ± standard error"
        print(f"{name:30} validation NDCG@10 {mean:.4f}{spread} ({said})")
    write_result(settings.run, "choice", report, settings.out)


def main(argv=None):
    return run_command(argv, __doc__, choose=(ChooseSettings, choose))


if __name__ == "__main__":
    sys.exit(main())
