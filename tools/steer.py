"""Measure what steering moves and what it costs: users who ask for more of an intent.

    python tools/steer.py --run runs/ml-100k        -> steering.json

Each user asks for an intent drawn at random, as with `tools/recommend.py --more`. For each
strength: the share of the ten best items that carry the intent, by how much that share changes for
an intent that was not asked for, and NDCG@10 of the ranking. On validation items, since test is
scored once.
"""

import dataclasses
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import (  # noqa: E402
    StageSettings, UserError, claim, file_hash, generator, pick_device, ranking_metrics,
    run_command, run_dataset, setting, target_ranks, write_lines,
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
    """An intent for each of so many users, among those that any item carries -> int64 [users].

    Raises UserError if there is none.
    """
    carried = carried_intents(codes).cpu()
    if not len(carried):
        raise UserError("no item carries an intent that could be asked for: run sae.py again")
    return carried[torch.randint(len(carried), (users,), generator=generator(seed, "steering"))]


def carried_intents(codes):
    """The intents that any item carries -> int64 [any]."""
    return codes.transposed.indptr.diff().nonzero()[:, 0]


def shares_of_top(scores, codes, seen):
    """The share of each user's TOP best items, or of as many as there are, with each intent.

    scores: [B, V+1]; codes: SparseRows [V+1, J]; seen: int64 [B, any], padded with 0, are left out.
    -> float [B, J]
    """
    scores = scores.scatter(1, seen, -torch.inf)
    scores[:, 0] = -torch.inf
    best = scores.topk(min(TOP, scores.shape[1]))
    listed = best.values > -torch.inf  # (B, TOP)
    carried = codes.gather(best.indices.flatten()).dense() > 0
    carried = carried.view(*listed.shape, -1) & listed[:, :, None]  # (B, TOP, J)
    return carried.sum(1) / listed.sum(1, keepdim=True).clamp_min(1)


def off_target(shares, before, asked, carried):
    """Mean absolute change of the shares of intents that were not asked for -> float [B].

    shares, before: [B, J]; asked: int64 [B]; carried: int64 [any], the intents that are looked at.
    """
    change = (shares - before).abs().scatter(1, asked[:, None], 0)
    return change[:, carried].sum(1) / max(len(carried) - 1, 1)


@torch.no_grad()
def steering_curve(model, codes, data, users, strengths, seed):
    """What `--more` of one intent per user does, at each strength -> rows of steering.json.

    codes: SparseRows [V+1, J], on the device of the model; users: int64 [U].
    """
    device = model.item.weight.device
    score = model_scores(model, data, "valid")
    asked = draw_intents(codes, len(users), seed).to(device)
    carried = carried_intents(codes)
    targets = torch.from_numpy(data.targets("valid")).long().to(device)
    found = {strength: [] for strength in strengths}  # (ranks, shares, changes) of each chunk
    cells = max(len(data.items), TOP * codes.columns)  # of a user
    for chunk in torch.arange(len(users)).split(max(2**22 // cells, 1)):
        wanted = asked[chunk.to(device)]
        weights = F.one_hot(wanted, codes.columns).float()
        shift = torch.stack([intent_shift(codes, weight) for weight in weights])
        seen = [torch.from_numpy(data.history(u, "valid")).long() for u in users[chunk].tolist()]
        seen = torch.nn.utils.rnn.pad_sequence(seen, batch_first=True).to(device)
        own = score(users[chunk])  # (B, V+1), as shift is
        before = shares_of_top(own, codes, seen)
        for strength in strengths:
            scores = steer(own, strength * shift)
            rank = target_ranks(scores, targets[users[chunk].to(device)], seen)
            shares = shares_of_top(scores, codes, seen)
            share = shares.gather(1, wanted[:, None])[:, 0]
            found[strength].append((rank, share, off_target(shares, before, wanted, carried)))
    rows = []
    for strength, chunks in found.items():
        rank, share, change = (torch.cat(parts) for parts in zip(*chunks))
        row = dict(strength=strength, share=share.mean().item(), off_target=change.mean().item())
        rows.append(row | dict(ndcg=ranking_metrics(rank)["NDCG@10"]))
    return rows


def table_lines(rows):
    """The rows of steering.json in lines for people."""
    head = f"{'strength':>8}{'top 10 with the intent':>24}{'change of another':>19}"
    yield head + f"{'validation NDCG@10':>20}"
    for row in rows:
        shares = f"{row['share']:>24.1%}{row['off_target']:>19.2%}"
        yield f"{row['strength']:>8g}{shares}{row['ndcg']:>20.4f}"


def read_strengths(words):
    """The numbers of --strengths, each once -> list of float. Raises UserError."""
    try:
        strengths = [float(word) for word in words.split()]
    except ValueError:
        strengths = []
    if not strengths or not all(map(math.isfinite, strengths)):
        remedy = "give numbers, as in --strengths '0 0.5 1'"
        raise UserError(f"--strengths is {words!r}, which is no list of numbers: {remedy}")
    return list(dict.fromkeys(strengths))


def measure(settings):
    """Measure how far lists move towards an intent that users ask for, and what it costs."""
    folder = Path(settings.run)
    device = pick_device(settings.device)
    data = run_dataset(settings.run, settings.data)
    strengths = read_strengths(settings.strengths)
    codes = load_intents(folder, data, device).codes
    model = load_model(folder, settings.model, data, device)
    claim(folder)
    order = torch.randperm(len(data.users), generator=generator(settings.seed, "steered users"))
    users = order[: settings.users]
    rows = steering_curve(model, codes, data, users, strengths, settings.seed)
    print(*table_lines(rows), sep="\n")
    report = dict(dataset=data.folder.name, model=settings.model, users=len(users), rows=rows)
    made_from = [folder / f"{settings.model}.safetensors", folder / "intents.safetensors"]
    report |= dict(seed=settings.seed, made_from={one.name: file_hash(one) for one in made_from})
    write_lines(folder / "steering.json", [json.dumps(report, indent=1)])
    print(f"written to {folder / 'steering.json'}")


def main(argv=None):
    return run_command(argv, __doc__, steer=(SteerSettings, measure))


if __name__ == "__main__":
    sys.exit(main())
