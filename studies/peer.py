"""A library's SASRec or sentence encoder at work, for studies/speed.py, which times it.

    PYTHON studies/peer.py    where PYTHON has numpy, torch and the library, and nothing of ours

Reads lines of JSON such as {"do": "steps", "count": 4} and answers each with one. Each library has
a process of its own, with its own peak memory, and ours and the loop over prefixes are asked in the
same way. Batches, loss and optimizer are a library's own, its batch size by default too; what it
wraps around them (Lightning's loop, RecBole's Trainer) is left out, in its favour. All train on the
same interactions with the width, blocks, heads, dropout, history and learning rate of model.py.
"""

import importlib.metadata
import importlib.util
import itertools
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).resolve().parent


def libraries():
    """The libraries that this Python can import -> {name: version}."""
    names = [name for name in PEERS if importlib.util.find_spec(name)]
    return {name: importlib.metadata.version(name.replace("_", "-")) for name in names}


def memory():
    """The most memory that this process has held, in GiB; None if the system does not tell."""
    status = Path("/proc/self/status")  # since on Linux getrusage counts what the parent held
    for line in status.read_text().splitlines() if status.is_file() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    try:
        import resource
    except ImportError:
        return None
    unit = 2**30 if sys.platform == "darwin" else 2**20  # bytes there, else KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class Recommender:
    """A SASRec that is trained and whose vectors are written.

    A subclass has `read`, which prepares the data once, `restart`, which makes `model` anew,
    `batches` of an epoch, a training `step` on one of them, and for scoring `states` and `items`.
    """

    def __init__(self, folder, threads, settings, items, dataset):
        """folder: it holds training.txt, a line per user: numbers of items 1..V, oldest first.

        threads: int; settings: dict, as of model.py; items: V; dataset: folder, for ours alone.
        """
        torch.set_num_threads(threads)
        self.folder = Path(folder)
        self.settings = settings
        self.count = items
        self.dataset = dataset
        lines = (self.folder / "training.txt").read_text().splitlines()
        self.sequences = [[int(word) for word in line.split()] for line in lines]
        self.read()
        self.anew()

    def anew(self):
        """Forget what was learned."""
        torch.manual_seed(0)
        self.restart()
        self.coming = self.endless()

    def counted(self, batches, positions, size):
        """What an epoch has, and how many rows, sessions or positions a batch -> dict."""
        return dict(batches=len(batches), positions=positions, size=size, unit=self.unit)

    def endless(self):
        """The batches of one epoch after the other."""
        while True:
            yield from self.batches()

    def steps(self, count):
        """Make so many training steps."""
        self.model.train()
        for batch in itertools.islice(self.coming, count):
            self.step(batch)

    def epoch(self):
        """Train on every batch once."""
        self.model.train()
        for batch in self.batches():
            self.step(batch)

    def padded(self, rows, left):
        """The last items of rows of numbers -> int64 [B, T], padded with 0, T is the history."""
        history = self.settings["history"]
        padded = torch.zeros(len(rows), history, dtype=torch.int64)
        for at, row in enumerate(rows):
            row = torch.tensor(row[-history:])
            if left:
                padded[at, -len(row) :] = row
            else:
                padded[at, : len(row)] = row
        return padded

    def lengths(self, rows):
        """How many items of each row `padded` keeps -> int64 [B]."""
        return torch.tensor([min(len(row), self.settings["history"]) for row in rows])

    def internal(self):
        """A library's own number of each of our items -> int64 [V+1]; for none 0, its padding's.

        It counts from 1, in the order of `external`.
        """
        external = self.external()
        internal = torch.zeros(self.count + 1, dtype=torch.int64)
        internal[external] = torch.arange(1, len(external) + 1)
        return internal

    @torch.no_grad()
    def vectors(self):
        """Write `states` after the users' training items, float32 [users, D], and `table` [V+1, D].

        <state, row of the table> is an item's score; the row of an unknown item is NaN.
        """
        self.model.eval()
        users = range(0, len(self.sequences), 256)
        states = torch.cat([self.states(self.sequences[at : at + 256]) for at in users])
        known, found = self.items()
        if not (states.isfinite().all() and found.isfinite().all()):
            raise FloatingPointError("a vector is not finite: training diverged")
        table = torch.full((self.count + 1, states.shape[1]), math.nan)
        table[known] = found
        states.numpy().tofile(self.folder / "states")
        table.numpy().tofile(self.folder / "table")


class Ours(Recommender):
    """SASRec of model.py, trained as it trains: an epoch gives what the first of its log says."""

    unit = "positions"

    def read(self):
        sys.path.insert(0, str(HERE.parent))
        from saerec import load_dataset

        self.data = load_dataset(self.dataset)

    def trainer_class(self):
        from studies.speed import Trainer

        return Trainer

    def restart(self):
        from saerec import generator

        device = torch.device("cpu")
        self.trainer = self.trainer_class()("sasrec", self.data, None, device, **self.settings)
        self.model = self.trainer.model
        self.random = generator(0, "model batches")
        torch.manual_seed(generator(0, "dropout 0").initial_seed())

    def facts(self):
        positions = int(self.trainer.rows.length.sum())
        size = self.trainer.batch_size()
        return self.counted(self.trainer.parts, positions, size)

    def batches(self):
        self.trainer.shuffle(self.random)
        return self.trainer.parts

    def step(self, part):
        self.trainer.step()  # which takes the parts one after the other

    def states(self, rows):
        from model import states_after

        table = self.model.item_table()
        items = self.padded(rows, left=False)
        return states_after(self.model, table, items, self.lengths(rows)).u

    def items(self):
        known = torch.arange(1, self.count + 1)
        return known, self.model.item_table()[known]


class Loop(Ours):
    """The obvious loop around the same model: a row per prefix, padded."""

    unit = "rows"

    def trainer_class(self):
        from studies.speed import PrefixTrainer

        return PrefixTrainer


class RecTools(Recommender):
    """SASRecModel of RecTools. It reads but the last T + 1 training items of a user."""

    unit = "sessions"

    def read(self):
        import pandas as pd
        from rectools.dataset import Dataset

        users = [user for user, row in enumerate(self.sequences) for _ in row]
        items = [item for row in self.sequences for item in row]
        frame = pd.DataFrame(dict(user_id=users, item_id=items, weight=1.0))
        frame["datetime"] = pd.to_datetime(np.arange(len(frame)), unit="s")  # keeps the order
        self.data = Dataset.construct(frame)

    def restart(self):
        from rectools.models import SASRecModel

        s = self.settings
        sizes = dict(n_factors=s["width"], n_blocks=s["layers"], n_heads=s["heads"])
        sizes.update(dropout_rate=s["dropout"], session_max_len=s["history"], lr=s["lr"])
        whole = SASRecModel(loss="softmax", **sizes)
        whole._build_model_from_dataset(self.data)  # as its fit does
        self.preparator = whole.data_preparator
        self.loader = self.preparator.get_dataloader_train()
        self.module = whole.lightning_model
        self.module.log = lambda *value, **options: None  # there is no Lightning Trainer to log to
        self.module.on_train_start()  # which draws the initial parameters
        self.model = self.module.torch_model
        self.optimizer = self.module.configure_optimizers()

    def facts(self):
        positions = sum(len(session) - 1 for session in self.loader.dataset.sessions)
        return self.counted(self.loader, positions, self.loader.batch_size)

    def batches(self):
        return self.loader

    def step(self, batch):
        loss = self.module.training_step(batch, 0)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def external(self):
        """Our numbers of its items -> int64 [items in training]; its own begin with PAD."""
        names = self.preparator.item_id_map.get_external_sorted_by_internal()
        return torch.from_numpy(names[1:].astype(np.int64))

    def states(self, rows):
        batch = {"x": self.internal()[self.padded(rows, left=True)]}
        table = self.model.item_model.get_all_embeddings()
        return self.model.encode_sessions(batch, table)[:, -1]

    def items(self):
        return self.external(), self.model.item_model.get_all_embeddings()[1:]


class RecBole(Recommender):
    """SASRec of RecBole, which makes a row of every prefix."""

    unit = "rows"

    def read(self):
        from recbole.config import Config
        from recbole.data import create_dataset
        from recbole.data.dataloader import TrainDataLoader

        self.write_atomic_file()
        s = self.settings
        told = dict(data_path=str(self.folder), checkpoint_dir=str(self.folder), use_gpu=False)
        told["load_col"] = {"inter": ["user_id", "item_id", "timestamp"]}
        told.update(loss_type="CE", train_neg_sample_args=None, MAX_ITEM_LIST_LENGTH=s["history"])
        told.update(n_layers=s["layers"], n_heads=s["heads"], hidden_size=s["width"])
        told.update(inner_size=4 * s["width"], hidden_dropout_prob=s["dropout"])
        told.update(attn_dropout_prob=s["dropout"], learning_rate=s["lr"])
        self.config = Config(model="SASRec", dataset="peer", config_dict=told)
        self.data = create_dataset(self.config)
        self.data._change_feat_format()  # as its build does; there is nothing to split off
        self.loader = TrainDataLoader(self.config, self.data, None, shuffle=True)

    def write_atomic_file(self):
        """peer/peer.inter, a line per interaction, as RecBole reads it."""
        lines = ["user_id:token\titem_id:token\ttimestamp:float"]
        for user, row in enumerate(self.sequences):
            lines += [f"{user}\t{item}\t{at}" for at, item in enumerate(row)]
        path = self.folder / "peer" / "peer.inter"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n")

    def restart(self):
        from recbole.model.sequential_recommender import SASRec

        self.model = SASRec(self.config, self.data)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.settings["lr"])

    def facts(self):
        size = self.config["train_batch_size"]
        return self.counted(self.loader, len(self.data), size)

    def batches(self):
        return self.loader

    def step(self, batch):
        self.optimizer.zero_grad()
        self.model.calculate_loss(batch).backward()
        self.optimizer.step()

    def external(self):
        """Our numbers of its items -> int64 [items in training]; its own begin with [PAD]."""
        tokens = self.data.field2id_token["item_id"][1:]
        return torch.tensor([int(token) for token in tokens])

    def states(self, rows):
        return self.model(self.internal()[self.padded(rows, left=False)], self.lengths(rows))

    def items(self):
        return self.external(), self.model.item_embedding.weight[1:]


class SentenceTransformers:
    """The same encoder by sentence-transformers: the mean over tokens, unit length, same cut."""

    def __init__(self, folder, threads, weights, tokens, device):
        """weights: the encoder's folder; tokens: where a text is cut; device: cpu or cuda."""
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(threads)
        self.folder = Path(folder)
        self.encoder = SentenceTransformer(weights, device=device)
        self.encoder.max_seq_length = tokens

    def facts(self):
        return {}

    def encode(self, texts):
        """Write the `vectors` of texts, float32 [N, E], in batches of its default size."""
        found = self.encoder.encode(texts, show_progress_bar=False, normalize_embeddings=True)
        found.astype(np.float32).tofile(self.folder / "vectors")


PEERS = {"rectools": RecTools, "recbole": RecBole, "sentence_transformers": SentenceTransformers}
KINDS = {"ours": Ours, "loop": Loop, **PEERS}


def serve(questions, answers):
    """Answer lines of JSON; what goes wrong ends the process, whose stderr says why.

    {"do": "libraries"} and {"do": "memory"} are answered by the functions of that name, {"do":
    "start", "kind": ...} by the facts of what is made of the rest, all else by its method.
    """
    peer = None
    for line in questions:
        asked = json.loads(line)
        what = asked.pop("do")
        if what == "libraries":
            answer = libraries()
        elif what == "memory":
            answer = memory()
        elif what == "start":
            peer = KINDS[asked.pop("kind")](**asked)
            answer = peer.facts()
        else:
            answer = getattr(peer, what)(**asked)
        print(json.dumps(answer), file=answers, flush=True)


def main():
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    # Names of ours in this folder, such as docs, could hide a library's
    sys.path[:] = [path for path in sys.path if Path(path) != HERE]
    serve(sys.stdin, answers)


if __name__ == "__main__":
    main()
