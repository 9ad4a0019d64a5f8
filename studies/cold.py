"""Items that no one has bought yet: who can rank them, and what that costs the others.

    python studies/cold.py --run runs/scientific          -> runs/scientific/cold.json

A share of the items, those of smallest hash of their id, is cold. RUN/cold is a run of the world
before they were there, made by the stages as any other:
    1. RUN/cold/data lacks them: their interactions and texts, and with the interactions the reviews
       of what this world's own leave-one-out holds out. The SAE learns from its texts alone.
    2. Models are trained on it. Its catalogue has no cold item, since a full softmax over them
       would push down what is never a target; its validation items, which choose the epoch, are
       warm, as all its items are.
    3. The cold items are put in, each with its texts that name no `user` (who reviews an item has
       bought it): its codes are those of the trained SAE, its id is what training starts from, 0
       in Grounded and SASRec + text, random in SASRec and SAERec.
Then users whose last item is cold are ranked after all their warm items: `cold` among the cold
items alone, `all` among all. And each user's last warm item, which training and validation have not
seen: `warm` among the warm items, `warm in all` among all. What is finished stays in
RUN/cold/cold-*.safetensors, so the same command goes on where it stopped.
"""

import dataclasses
import hashlib
import re
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import (  # noqa: E402
    Progress, StageSettings, UserError, artifact_meta, dataset_file, file_hash, load_artifact,
    load_dataset, parse, pick_device, rank_users, ranking_metrics, read_sequences, read_texts,
    run_command, run_dataset, save_artifact, setting, write_lines, write_rows,
)  # fmt: skip

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import sae as autoencoder  # noqa: E402
from embed import EmbedSettings  # noqa: E402
from model import Grounded, SAERec, SASRec, model_scores, new_model, train_model  # noqa: E402
from sae import Intents, SaeSettings, SparseRows, encode_all, item_codes  # noqa: E402
from studies import baselines, significance, variants  # noqa: E402
from studies.ablate import base_settings, mean_and_spread  # noqa: E402
from studies.rivals import Run, load_run, mean_texts, text_library  # noqa: E402

FIRST = "Grounded"
CONTROLS = ("SASRec + text", "item kNN by texts")  # what else reads texts: compared with FIRST
COLD = ("cold", "all")  # rankings of cold items
WARM = ("warm", "warm in all")
METRICS = ("HR@10", "NDCG@10", "MRR")
PROTOCOL = (
    "the last item of users where it is cold, after all their warm items; no model, SAE or choice "
    "of an epoch saw a cold item, its interactions or its texts; items of the history leave the "
    "ranking; ties count against the model; models are trained without cold items in the softmax"
)


@dataclasses.dataclass(frozen=True)
class ColdSettings(StageSettings):
    """Take items out of a run's world, train, and rank them when they come."""

    share: float = setting(0.1, "share of the items that are cold", low=0.001, high=0.5)
    seeds: int = setting(3, "seeds, counted from --seed, that each model is trained with", low=1)
    model_flags: str = setting("", "flags of model.py for all models, as in '--patience 5'")
    sae_flags: str = setting("", "flags of sae.py, as in '--active 16'")
    out: str = setting("", "where to write a copy of RUN/cold.json", unit="path")


# Two worlds


class World(NamedTuple):
    """Before the cold items came, and after."""

    warm: Run  # its users, items and texts
    whole: Run  # all items, the warm ones with the same numbers; users whose last item is cold


def cold_items(data, share):
    """The ids of that share of a Dataset's items, by a hash of the id -> set of str.

    So they are the same for every seed, and a larger share holds those of a smaller one.
    """
    by_hash = sorted(data.items[1:], key=lambda item: hashlib.sha256(item.encode()).digest())
    return set(by_hash[: max(round(share * len(by_hash)), 1)])


def text_rows(data):
    """The lines of a Dataset's texts.jsonl, all of them -> list of dicts. Raises UserError."""
    path = dataset_file(data.folder, "texts.jsonl")
    rows = []
    for _, item, text, user, title, _ in read_texts(path, hashlib.sha256(), set(data.items)):
        text, title = (one.encode("utf-8", "ignore").decode() for one in (text, title))
        rows.append(dict(item=item, text=text, user=user, title=title))
    return rows


def text_keys(data):
    """What tells the texts of a Dataset apart -> list of (id of the item, text)."""
    return [(data.items[item], text) for item, text in zip(data.text_item.tolist(), data.texts)]


def write_warm_data(folder, data, cold):
    """Write the dataset folder of the world without the cold items, a set of ids. UserError.

    Texts that the run has no embedding of stay out: they were written in interactions that it holds
    out, or are empty.
    """
    sequences = read_sequences(dataset_file(data.folder, "sequences.txt"), hashlib.sha256())
    lines = []
    for user, items in sequences.items():
        warm = [item for item in items if item not in cold]
        if warm:
            lines.append(" ".join([user, *warm]))
    known = set(text_keys(data))
    rows = []
    for row in text_rows(data):
        if row["item"] not in cold and (row["item"], row["text"]) in known:
            rows.append(row)
    write_lines(folder / "sequences.txt", lines)
    write_rows(folder / "texts.jsonl", rows)


def write_warm_run(folder, data, embeddings, cold, made_by):
    """Write RUN/cold/data, and embeddings.safetensors of its texts.

    embeddings: of the run's texts, float32 [N, E]; made_by: what the folder is made by, a dict.
    """
    write_warm_data(folder / "data", data, cold)
    warm = load_dataset(folder / "data")
    row_of = {key: row for row, key in enumerate(text_keys(data))}
    rows = [row_of[key] for key in text_keys(warm)]
    settings = EmbedSettings(data=str(warm.folder), run=str(folder))
    tensors = dict(embeddings=embeddings[rows], item=torch.from_numpy(warm.text_item))
    save_artifact(folder / "embeddings.safetensors", tensors, settings, warm.hash, cold=made_by)


def sae_settings(folder, settings):
    """SaeSettings of the SAE of RUN/cold. Raises UserError."""
    words = ["--run", str(folder), *settings.sae_flags.split()]
    base, _ = parse(words, __doc__, dict(train=(SaeSettings, None)))
    for name in ("run", "data", "seed", "device"):
        if getattr(base, name) != getattr(SaeSettings(run=str(folder)), name):
            problem = f"--sae-flags: --{name} is set by studies/cold.py itself"
            raise UserError(f"{problem}: leave it out")
    own = dict(data=str(folder / "data"), seed=settings.seed, device=settings.device)
    return dataclasses.replace(base, **own)


def cold_texts(data, cold):
    """The rows of a Dataset's texts that come with cold items: no reviews -> list. UserError."""
    reviews = {(row["item"], row["text"]) for row in text_rows(data) if row["user"]}
    keys = text_keys(data)
    rows = [row for row, key in enumerate(keys) if key[0] in cold and key not in reviews]
    if not rows:
        problem = f"{data.folder} has no text of the {len(cold)} cold items but reviews"
        raise UserError(f"{problem}: bring descriptions, or raise --share")
    return rows


def whole_data(warm, data, cold, rows):
    """All items, and the users of warm whose last item in data is cold -> Dataset. UserError.

    warm, data: Datasets; rows: of data's texts, those of the cold items. A user's last item comes
    after all the warm ones.
    """
    items = [*warm.items, *(item for item in data.items if item in cold)]
    number = {item: n for n, item in enumerate(items)}
    last = {user: data.items[item] for user, item in zip(data.users, data.targets("test"))}
    users = []
    histories = []
    for user, begin, end in zip(warm.users, warm.start, warm.start[1:]):
        if last[user] in cold:
            users.append(user)
            histories.append([*warm.flat[begin:end], number[last[user]]])
    if not users:
        problem = f"none of the {len(cold)} cold items is the last of a user with 3 others"
        raise UserError(f"{problem}: raise --share")
    start = np.cumsum([0, *map(len, histories)])
    texts = [*warm.texts, *(data.texts[row] for row in rows)]
    text_item = [*warm.text_item, *(number[data.items[data.text_item[row]]] for row in rows)]
    title = dict(zip(data.items, data.titles))
    return dataclasses.replace(
        warm, users=users, items=items, start=start,
        flat=np.concatenate(histories).astype(np.int32), texts=texts,
        text_item=np.array(text_item, np.int32), titles=[title[item] for item in items],
    )  # fmt: skip


def whole_run(warm, whole, embeddings):
    """The Run of all items, whose texts the SAE of the Run warm encodes.

    whole: Dataset of all items; embeddings: of the texts of the cold ones, float32 [n, E].
    """
    held_out = F.pad(warm.corpus.held_out, (0, len(embeddings)), value=True)
    embeddings = torch.cat([warm.embeddings, embeddings])
    new = dict(data=whole, embeddings=embeddings, held_out=held_out)
    corpus = dataclasses.replace(warm.corpus, **new)
    latent = warm.intents["latent"].long()
    intent_of_latent = torch.full((warm.settings.latents,), -1)
    intent_of_latent[latent] = torch.arange(len(latent))
    text_item = torch.from_numpy(whole.text_item).long()
    codes = encode_all(warm.sae, embeddings)
    codes = item_codes(codes, text_item, len(whole.items) - 1, intent_of_latent)
    cells = dict(indptr=codes.indptr, indices=codes.indices, values=codes.values)
    return warm._replace(corpus=corpus, intents=warm.intents | cells)


def prepare(settings, data):
    """Make RUN/cold, its data, embeddings and SAE, unless an earlier run has -> World. UserError.

    data: Dataset of the run.
    """
    source = Path(settings.run) / "embeddings.safetensors"
    embeddings = load_artifact(source, f"embed.py --run {settings.run}", data)[0]["embeddings"]
    folder = Path(settings.run) / "cold"
    cold = cold_items(data, settings.share)
    rows = cold_texts(data, cold)
    wanted = sae_settings(folder, settings)
    identity = dataclasses.asdict(wanted) | dict(run="", data="", device="")
    made_by = dict(share=settings.share, of=file_hash(source), sae=identity)
    path = folder / "embeddings.safetensors"
    there = path.is_file() and path.with_name("intents.safetensors").is_file()
    if not there:
        write_warm_run(folder, data, embeddings, cold, made_by)
    if artifact_meta(path, f"studies/cold.py --run {settings.run}").get("cold") != made_by:
        problem = f"{folder} was made with other --share, --seed or --sae-flags, or of other texts"
        raise UserError(f"{problem}: give the same again, or move the folder away to start anew")
    warm = run_dataset(folder, folder / "data")
    whole = whole_data(warm, data, cold, rows)
    if not there:
        autoencoder.train(wanted)
    run = load_run(folder, warm, settings.device)
    return World(run, whole_run(run, whole, embeddings[rows]))


# Who ranks


class Ranker(NamedTuple):
    """What was made from the warm world to rank the items of both."""

    scores: Callable  # of a Dataset with all items: the `score` of `rank_users` for its last ones
    parameters: int
    valid: float | None  # NDCG@10 on validation, which chose epoch or settings


def popularity(world, settings):
    """The most frequent training items, which no cold item is -> Ranker."""
    items = torch.from_numpy(world.warm.data.training_items())
    counts = torch.bincount(items, minlength=len(world.whole.data.items)).float()

    def score(users):
        return counts.expand(len(users), -1)

    def scores(data):
        return score

    return Ranker(scores, 0, None)


def neighbours(world, settings):
    """Items whose mean texts are like those of the history; decay by validation -> Ranker."""
    warm = world.warm.data
    x = world.whole.sae.standardize(world.whole.embeddings)
    x = F.normalize(mean_texts(x, world.whole.data), dim=1)  # (V+1, E)

    def scores(data, part, decay):
        alike = baselines.DenseLikeness(x[: len(data.items)])
        return baselines.neighbour_scores(alike, data, part, settings.history, decay)

    tried = {}
    for decay in (1.0, 0.9, 0.7, 0.5):
        ranks = rank_users(scores(warm, "valid", decay), warm, "valid")
        tried[decay] = ranking_metrics(ranks)["NDCG@10"]
    best = max(tried, key=tried.get)
    return Ranker(partial(scores, part="test", decay=best), 0, tried[best])


def intents_for(Model, run, device):
    """What a Model knows of the items of a Run -> Intents; mean texts for SASRec + text."""
    tensors = run.intents
    if Model is baselines.SASRecWithText:
        tensors = text_library(run, 0)
    vectors = tensors["vectors"]
    cells = (tensors[name] for name in ("indptr", "indices", "values"))
    return Intents(vectors.to(device), SparseRows(*cells, len(vectors)).to(device))


def with_cold_items(model, world):
    """A trained model with the cold items in its catalogue, untrained -> a model of its class."""
    intents = intents_for(type(model), world.whole, model.item.weight.device)
    larger = new_model(type(model), model.settings, world.whole.data, intents)
    ids = larger.item.weight.detach().clone()
    ids[: len(model.item.weight)] = model.item.weight.detach()
    larger.load_state_dict(model.state_dict() | {"item.weight": ids})
    return larger.eval()


def trained(Model, world, settings):
    """A Model of the warm world, and then with the cold items -> Ranker. Raises UserError."""
    warm = world.warm.data
    intents = intents_for(Model, world.warm, pick_device(settings.device))
    model, log = train_model(new_model(Model, settings, warm, intents), warm)
    larger = with_cold_items(model, world)
    valid = max(line["valid_NDCG@10"] for line in log)
    scores = partial(model_scores, larger, part="test")
    return Ranker(scores, baselines.parameters_of(model), valid)


RANKERS = {
    FIRST: partial(trained, Grounded),
    "Grounded without match": partial(trained, variants.WithoutMatch),
    "SASRec + text": partial(trained, baselines.SASRecWithText),
    "item kNN by texts": neighbours,
    "SAERec": partial(trained, SAERec),
    "SASRec": partial(trained, SASRec),
    "popularity": popularity,
}


def among(score, begin, end):
    """The `score` of `rank_users` with all items but begin to end - 1 put last."""

    def only(users):
        scores = score(users)
        kept = torch.full_like(scores, -torch.inf)
        kept[:, begin:end] = scores[:, begin:end]
        return kept

    return only


def four_rankings(scores, world):
    """Ranks of last items -> {name of COLD or WARM: float64 [users]}; scores: of a Ranker."""
    warm = world.warm.data
    whole = world.whole.data
    V = len(warm.items)  # padding included: the first cold item's number
    larger = dataclasses.replace(warm, items=whole.items)
    return {
        "cold": rank_users(among(scores(whole), V, len(whole.items)), whole, "test"),
        "all": rank_users(scores(whole), whole, "test"),
        "warm": rank_users(among(scores(larger), 1, V), larger, "test"),
        "warm in all": rank_users(scores(larger), larger, "test"),
    }


def chance(candidates):
    """What an order drawn at random is expected to reach -> dict of floats.

    candidates: int [users], how many items are ranked for each; their target has each rank from 1
    to that as often.
    """
    expected = {n: ranking_metrics(torch.arange(1, n + 1).double()) for n in set(candidates)}
    return {name: np.mean([expected[n][name] for n in candidates]).item() for name in METRICS}


def chance_levels(world):
    """`chance` in the rankings of COLD -> {name: dict of floats}."""
    whole = world.whole.data
    cold = len(whole.items) - len(world.warm.data.items)
    users = range(len(whole.users))
    left = [len(whole.items) - 1 - len(np.unique(whole.history(user, "test"))) for user in users]
    return {"cold": chance([cold] * len(left)), "all": chance(left)}


# The study


def finished(path, settings, data):
    """What an earlier run left of a ranker -> (ranks, metadata), or None. Raises UserError."""
    if not path.is_file():
        return None
    again = f"rm {path.parent}/cold-*.safetensors; studies/cold.py --run {path.parent.parent}"
    ranks, meta = load_artifact(path, again, data)
    before = meta["settings"] | dict(run=settings.run)  # it may have moved
    return (ranks, meta) if before == dataclasses.asdict(settings) else None


def finish(name, world, settings, path):
    """Make a ranker and rank with it -> (ranks, dict of what it took)."""
    started = time.perf_counter()
    ranker = RANKERS[name](world, settings)
    ranks = four_rankings(ranker.scores, world)
    seconds = round(time.perf_counter() - started, 1)
    more = dict(parameters=ranker.parameters, valid=ranker.valid, seconds=seconds)
    more["commit"] = significance.current_commit()
    made_from = [path.with_name("intents.safetensors")]
    save_artifact(path, ranks, settings, world.warm.data.hash, made_from, **more)
    return ranks, more


def all_results(world, settings):
    """What all rankers reach with all seeds -> {name: [(ranks, what it took) of each seed]}."""
    folder = Path(settings.run) / "cold"
    base = dataclasses.replace(base_settings(settings), run=str(folder), device=settings.device)
    results = {}
    # A seed for all, then the next: what is there when it is interrupted can be compared
    for seed in range(settings.seed, settings.seed + settings.seeds):
        for name in RANKERS:
            slug = re.sub("[^a-z0-9]+", "-", name.lower())
            path = folder / f"cold-{slug}-{seed}.safetensors"
            one = dataclasses.replace(base, seed=seed)
            results[name, one] = path, finished(path, one, world.warm.data)
    missing = [key for key, (_, done) in results.items() if done is None]
    progress = Progress(len(missing), "rankers")
    for count, (name, one) in enumerate(missing, 1):
        print(f"{name}, seed {one.seed}")
        path, _ = results[name, one]
        results[name, one] = path, finish(name, world, one, path)
        progress.show(count, keep=True)
    by_name = {name: [] for name in RANKERS}
    for (name, _), (_, done) in results.items():
        by_name[name].append(done)
    return by_name


def summary(name, seeds):
    """The row of a report; seeds: (ranks, what it took) of each."""
    took = [more for _, more in seeds]
    row = dict(name=name, params=took[0]["parameters"], valid=None)
    row["seconds"] = float(np.mean([more["seconds"] for more in took]))
    if took[0]["valid"] is not None:
        row["valid"] = mean_and_spread([more["valid"] for more in took])
    for ranking in (*COLD, *WARM):
        metrics = [ranking_metrics(ranks[ranking]) for ranks, _ in seeds]
        cells = {name: mean_and_spread([one[name] for one in metrics]) for name in METRICS}
        row[ranking] = cells
    return row


def compare(results, seed):
    """Paired tests of FIRST against its CONTROLS, corrected within a ranking -> list of dicts."""
    tests = []
    for ranking in COLD:
        means = {}
        for name in (FIRST, *CONTROLS):
            means[name] = significance.user_means([ranks[ranking] for ranks, _ in results[name]])
        pairs = [(FIRST, name) for name in CONTROLS]
        for test in significance.paired_tests(means, pairs, seed):
            tests.append(dict(ranking=ranking) | test)
    return tests


def cold_report(data, world, results, settings):
    """What cold.json holds -> dict; data: Dataset of the run."""
    warm = world.warm.data
    whole = world.whole.data
    cold = len(whole.items) - len(warm.items)
    described = len(set(whole.text_item[whole.text_item >= len(warm.items)].tolist()))
    report = dict(dataset=data.folder.name, share=settings.share, cold_items=cold)
    report |= dict(cold_items_with_text=described, warm_items=len(warm.items) - 1)
    report |= dict(users=len(whole.users), warm_users=len(warm.users))
    report["protocol"] = f"{PROTOCOL}; {significance.TESTED} of a ranking"
    report["seeds"] = list(range(settings.seed, settings.seed + settings.seeds))
    report["trained at"] = significance.trained_at(results)
    report["chance"] = chance_levels(world)
    rows = [summary(name, seeds) for name, seeds in results.items()]
    return report | dict(rows=rows, tests=compare(results, settings.seed))


def report_lines(report):
    """A report as lines of a table, NDCG@10 of each ranking."""
    yield f"{'NDCG@10':24}" + "".join(f"{ranking:>18}" for ranking in (*COLD, *WARM))
    levels = [f"{report['chance'][ranking]['NDCG@10']:.4f}" for ranking in COLD]
    yield f"{'chance':24}" + "".join(f"{level:>18}" for level in levels)
    for row in report["rows"]:
        cells = [significance.with_spread(row[ranking]["NDCG@10"]) for ranking in (*COLD, *WARM)]
        yield f"{row['name']:24}" + "".join(f"{cell:>18}" for cell in cells)
    for test in report["tests"]:
        said = f"{test['a']} over {test['b']}, {test['ranking']}: {test['difference']:+.4f}"
        yield f"{said} (p = {test['p_holm']:.2g})"


def study(settings):
    """Rank the cold items by everything with every seed, going on where an earlier run stopped."""
    base_settings(settings)  # which refuses wrong flags before long work
    data = run_dataset(settings.run, settings.data)
    world = prepare(settings, data)
    whole = world.whole.data
    print(f"{len(whole.users):,} users whose last item is cold, {len(whole.items) - 1:,} items")
    report = cold_report(data, world, all_results(world, settings), settings)
    print(*report_lines(report), sep="\n")
    significance.write_result(settings.run, "cold", report, settings.out)


def main(argv=None):
    return run_command(argv, __doc__, study=(ColdSettings, study))


if __name__ == "__main__":
    sys.exit(main())
