"""Train on a catalogue too large for the whole softmax: its sum is estimated from a few items.

    python studies/sampled.py --run runs/ml-100k --negatives 256 [settings of model.py]

Writes what model.py writes. Half of the negatives are drawn uniformly over items, and half over
training interactions: these find the items that take most of the softmax, those reach all. Taking
log(expected count) from a score makes the estimated sum unbiased (Bengio & Senecal 2008).
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import generator, join_processes, run_command, run_dataset, setting  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from model import (  # noqa: E402
    MODELS, Grounded, ModelSettings, check_model, new_model, read_histories, save_model,
    train_model,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class SampledSettings(ModelSettings):
    negatives: int = setting(256, "items drawn in a step to estimate the softmax's sum", low=1)


def some_vectors(model, ids):
    """Y_v of some items, int64 [U] -> [U, D]: rows of model.item_table()."""
    vectors = F.embedding(ids, model.item.weight)
    if isinstance(model, Grounded):
        vectors = vectors + model.codes.gather(ids).mix(model.intent_table())
    return vectors


def some_scores(model, state, vectors, ids):
    """Scores of some items, int64 [U], of vectors [U, D] -> [P, U]: columns of model.scores."""
    scores = state.u @ vectors.T
    if isinstance(model, Grounded):
        scores = scores + model.settings.match * model.codes.gather(ids).mix(state.r.T).T
    return scores


def target_scores(model, state, vectors, target):
    """Scores of one item per position, int64 [P], of vectors [P, D] -> [P]."""
    scores = (state.u * vectors).sum(1)
    if isinstance(model, Grounded):
        shared = (model.codes.gather(target).dense() * state.r).sum(1)
        scores = scores + model.settings.match * shared
    return scores


class SampledLoss:
    """`catalogue_loss` with a sampled sum; only the items of a step are embedded."""

    def __init__(self, data, negatives, seed):
        self.items = torch.from_numpy(data.training_items()).long()
        self.uniform = negatives - negatives // 2
        self.popular = negatives // 2
        self.random = generator(seed, "negatives")
        V = len(data.items) - 1
        frequency = torch.bincount(self.items, minlength=V + 1).double() / len(self.items)
        self.log_expected = (self.uniform / V + self.popular * frequency).log().float()  # (V+1,)

    def draw(self):
        """Item numbers int64 [negatives], a number as often as it is drawn."""
        uniform = torch.randint(1, len(self.log_expected), (self.uniform,), generator=self.random)
        place = torch.randint(len(self.items), (self.popular,), generator=self.random)
        return torch.cat([uniform, self.items[place]])

    def __call__(self, model, batch):
        """Loss of a Batch -> scalar; a negative that is a position's target counts not for it."""
        negatives = self.draw()
        expected = self.log_expected[negatives].to(batch.target.device)
        negatives = negatives.to(batch.target.device)
        wanted = [batch.items.flatten(), batch.target, negatives]
        ids, row = torch.cat(wanted).unique(return_inverse=True)
        table = some_vectors(model, ids)  # (U, D)
        row_items, row_target, row_negatives = row.split([len(part) for part in wanted])
        vectors = F.embedding(row_items.view_as(batch.items), table)  # (B, T, D)
        state = read_histories(model, batch, vectors)
        scores = some_scores(model, state, F.embedding(row_negatives, table), negatives)
        scores = scores - expected  # (P, negatives)
        scores = scores.masked_fill(negatives == batch.target[:, None], -torch.inf)
        own = target_scores(model, state, F.embedding(row_target, table), batch.target)  # (P,)
        log_sum = torch.cat([own[:, None], scores], 1).logsumexp(1)
        return batch.weight @ (log_sum - own)


def train(settings):
    """Train a recommender of a run with a sampled softmax and write it with its log."""
    join_processes()
    check_model(settings)
    data = run_dataset(settings.run, settings.data)
    names = [field.name for field in dataclasses.fields(ModelSettings)]
    plain = ModelSettings(**{name: getattr(settings, name) for name in names})
    model = new_model(MODELS[settings.model], plain, data)
    print(f"{type(model).__name__} on {data.folder}: {settings.negatives} negatives per step")
    loss = SampledLoss(data, settings.negatives, settings.seed)
    save_model(*train_model(model, data, loss), data)


def main(argv=None):
    return run_command(argv, __doc__, train=(SampledSettings, train))


if __name__ == "__main__":
    sys.exit(main())
