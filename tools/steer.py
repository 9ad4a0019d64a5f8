"""Measure what steering moves and what it costs: users who ask for more of an intent.

    python tools/steer.py --run runs/ml-100k        -> steering.json

Each user asks for an intent drawn at random, as with `tools/recommend.py --more`. For each
strength: the share of the ten best items that carry the intent, and NDCG@10 of the ranking. On
validation items, since test is scored once.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import (  # noqa: E402
    StageSettings, UserError, generator, pick_device, ranking_metrics, run_command, run_dataset,
    setting, target_ranks, write_lines,
)  # fmt: skip

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from eval import load_model  # noqa: E402
from model import MODELS, model_scores  # noqa: E402
from sae import load_intents  # noqa: E402
from tools.recommend import intent_shift, steer  # noqa: E402

TOP = 10  # items of a list


@dataclasses.dataclass(frozen=True)
class SteerSettings(StageSettings):
    model: str = setting("grounded", "which model to steer", choices=tuple(MODELS))
    users: int = setting(1000, "users, each asking for more of an intent drawn at random", low=1)
    strengths: str = setting(
        "0 0.25 0.5 1 2 4", "strengths to try", unit="standard deviations of the scores"
    )


def draw_intents(codes, users, seed):
    """An intent for each of so many users, among those that any item carries -> int64 [users]."""
    carried = codes.transposed.indptr.diff().nonzero()[:, 0].cpu()
    return carried[torch.randint(len(carried), (users,), generator=generator(seed, "steering"))]


def share_of_top(scores, wanted, seen):
    """The share of each user's TOP best items that are wanted -> float [B].

    scores: [B, V+1]; wanted: bool [B, V+1]; seen: int64 [B, any], padded with 0, are left out.
    """
    scores = scores.scatter(1, seen, -torch.inf)
    scores[:, 0] = -torch.inf
    best = scores.topk(TOP).indices
    return wanted.gather(1, best).float().mean(1)


@torch.no_grad()
def steering_curve(model, codes, data, users, strengths, seed):
    """What `--more` of one intent per user does, at each strength -> rows of steering.json.

    codes: SparseRows [V+1, J], on the device of the model; users: int64 [U].
    """
    device = model.item.weight.device
    score = model_scores(model, data, "valid")
    asked = draw_intents(codes, len(users), seed)
    targets = torch.from_numpy(data.targets("valid")).long()
    ranks = [[] for _ in strengths]
    shares = [[] for _ in strengths]
    for chunk in torch.arange(len(users)).split(max(2**22 // len(data.items), 1)):
        weights = [F.one_hot(intent, codes.columns).float() for intent in asked[chunk]]
        shift = torch.stack([intent_shift(codes, weight.to(device)) for weight in weights])
        seen = [torch.from_numpy(data.history(u, "valid")).long() for u in users[chunk].tolist()]
        seen = torch.nn.utils.rnn.pad_sequence(seen, batch_first=True).to(device)
        own = score(users[chunk])  # (B, V+1), as shift is
        target = targets[users[chunk]].to(device)
        for strength, rank, share in zip(strengths, ranks, shares):
            scores = steer(own, strength * shift)
            rank.append(target_ranks(scores, target, seen))
            share.append(share_of_top(scores, shift > 0, seen))
    rows = []
    for strength, rank, share in zip(strengths, ranks, shares):
        ndcg = ranking_metrics(torch.cat(rank))["NDCG@10"]
        rows.append(dict(strength=strength, share=torch.cat(share).mean().item(), ndcg=ndcg))
    return rows


def read_strengths(words):
    """The numbers of --strengths -> list of float. Raises UserError."""
    try:
        strengths = [float(word) for word in words.split()]
    except ValueError:
        strengths = []
    if not strengths or not all(map(math.isfinite, strengths)):
        remedy = "give numbers, as in --strengths '0 0.5 1'"
        raise UserError(f"--strengths is {words!r}, which is no list of numbers: {remedy}")
    return strengths


def measure(settings):
    """Measure how far lists move towards an intent that users ask for, and what it costs."""
    folder = Path(settings.run)
    device = pick_device(settings.device)
    data = run_dataset(settings.run)
    strengths = read_strengths(settings.strengths)
    codes = load_intents(folder, data, device).codes
    model = load_model(folder, settings.model, data, device)
    order = torch.randperm(len(data.users), generator=generator(settings.seed, "steered users"))
    users = order[: settings.users]
    rows = steering_curve(model, codes, data, users, strengths, settings.seed)
    print(f"{'strength':>8}{'share of top 10 with the intent':>34}{'validation NDCG@10':>20}")
    for row in rows:
        print(f"{row['strength']:>8g}{row['share']:>34.1%}{row['ndcg']:>20.4f}")
    report = dict(dataset=data.folder.name, model=settings.model, users=len(users), rows=rows)
    write_lines(folder / "steering.json", [json.dumps(report, indent=1)])
    print(f"written to {folder / 'steering.json'}")


def main(argv=None):
    return run_command(argv, __doc__, steer=(SteerSettings, measure))


if __name__ == "__main__":
    sys.exit(main())
