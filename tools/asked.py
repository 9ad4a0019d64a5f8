"""What the words of a question mean, for tools/recommend.py.

Titles and ids are items, names are intents, and a new text is an item that has intents but no id.
"""

import contextlib
import dataclasses
import difflib
import re
import sys
import unicodedata
from pathlib import Path

from saerec import UserError, artifact_meta, file_hash, load_artifact

import torch
import torch.nn.functional as F

from embed import fetch_weights, load_encoder
from sae import SAE, SparseRows, encode_all, item_codes

ARTICLE = r"(the|an?|l[aeo]s?|l'|il|el|d[aei][rse]|une?)"
TURNED = re.compile(rf"^(.*?), {ARTICLE}(?= \(|$)")  # Matrix, The
ELIDED = re.compile(r"^l'\s*")  # L'Enfer, or L' Enfer
LEADING = re.compile(rf"^{ARTICLE} (?=.)")

# Names


def fold(name):
    """A name for comparison -> str: case, accents, spaces and a turned article don't count."""
    name = ELIDED.sub("l' ", TURNED.sub(r"\2 \1", name.casefold()))
    plain = re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFKD", name))
    spaced = re.sub(r"\s*([;,])\s*|\s+", r"\1 ", plain).strip()
    return unicodedata.normalize("NFC", spaced)


def cut_names(words, marks, known):
    """Cut words at marks, but not within a known name that holds one: the longest goes first.

    known: {name in lower case or as `fold` has it: value} -> list of (name, value or None)
    """
    most = max((sum(map(name.count, marks)) for name in known), default=0)
    pieces = re.split(f"([{marks}])", words)  # a name, a mark, a name, ...
    found = []
    begin = 0
    while begin < len(pieces):
        for stop in range(min(begin + 2 * most + 1, len(pieces)), begin, -2):
            name = "".join(pieces[begin:stop]).strip()
            value = known.get(name.lower(), known.get(fold(name)))
            if value is not None:
                break
        found.append((name, value))
        begin = stop + 1
    return found


def intents_by_name(rows):
    """{name: intents}, of rows of intents.jsonl; [] of what is judged to be no intent.

    A number or a label goes before a part or a word of labels, and that before a keyword.
    """
    none = {}
    exact = {}
    parts = {}
    keywords = {}
    for row in rows:
        label = row["label"]
        if not row.get("is_intent", True):
            none |= {str(row["intent"]): [], fold(label): []}
            continue
        for name in (str(row["intent"]), label):
            exact.setdefault(fold(name), []).append(row["intent"])
        for name in label.split(", "):
            for part in dict.fromkeys([name, *name.split()]):
                parts.setdefault(fold(part), []).append(row["intent"])
        for name in row["keywords"]:
            keywords.setdefault(fold(name), []).append(row["intent"])
    return none | keywords | parts | exact


def find_intents(rows, names):
    """Numbers of the intents that names mean: numbers, labels, parts or words of them, keywords.

    rows: of intents.jsonl; names: parted by semicolons or commas, which labels may hold too. Raises
    UserError with the nearest.
    """
    known = intents_by_name(rows)
    found = []
    for name, intents in cut_names(names.rstrip(" ;,"), ";,", known):
        if intents == []:
            raise UserError(f"{name!r} was judged to be no intent: leave it out")
        if intents is None:
            kept = sorted(one for one, numbers in known.items() if numbers)
            near = difflib.get_close_matches(fold(name), kept, 5, 0.5)
            nearest = "; ".join(near) or "none is near; see intents.jsonl"
            raise UserError(f"there is no intent {name!r}; the nearest are: {nearest}")
        found += intents
    return list(dict.fromkeys(found))


def items_by_title(data):
    """{title in lower case, then folded, with its year or article and without: item}.

    Of several the first counts.
    """
    known = {}
    titles = list(enumerate(data.titles[1:], 1))
    for item, title in titles:
        known.setdefault(title.lower(), item)
    for item, title in titles:
        known.setdefault(fold(title), item)
    for item, title in titles:
        known.setdefault(fold(re.sub(r"\s*\(\d{4}\)$", "", title)), item)
    for title, item in list(known.items()):
        known.setdefault(LEADING.sub("", title), item)
    return known


def find_titles(data, words):
    """Numbers of the items with titles parted by semicolons -> list of 1..V.

    Raises UserError with the nearest.
    """
    known = items_by_title(data)
    found = cut_names(words.rstrip(" ;"), ";", known)
    for title, item in found:
        if item is None:
            names = difflib.get_close_matches(fold(title), known, 5, 0.4)
            shown = dict.fromkeys(data.titles[known[name]] for name in names)
            nearest = "; ".join(shown) or "none is near"
            problem = f"there is no item titled {title!r} (titles are parted by semicolons)"
            raise UserError(f"{problem}; the nearest are: {nearest}")
    return [item for _, item in found]


def find_ids(data, ids):
    """Numbers of the items with these ids -> list of 1..V. Raises UserError with the nearest."""
    known = {name: item for item, name in enumerate(data.items[1:], 1)}
    for name in ids:
        if name not in known:
            nearest = "; ".join(difflib.get_close_matches(name, known, 5, 0.4)) or "none is near"
            problem = f"there is no item {name!r} (ids are parted by spaces)"
            raise UserError(f"{problem}; the nearest are: {nearest}")
    return [known[name] for name in ids]


def user_items(data, name):
    """All items of the user with that id, held-out ones too -> int32 [T]. Raises UserError."""
    if name not in data.users:
        found = difflib.get_close_matches(name, data.users, 5, 0.4) or data.users[:3]
        problem = f"there is no user {name!r} with 3 items or more in {data.folder}"
        nearest = f"the nearest are: {', '.join(found)}"
        raise UserError(f"{problem}; {nearest}; give the items of one with fewer by --history")
    user = data.users.index(name)
    return data.flat[data.start[user] : data.start[user + 1]]


# Texts


def load_sae(folder, data=None):
    """The SAE of a run -> (SAE, metadata of its file). Raises UserError."""
    path = folder / "sae.safetensors"
    made_by = f"sae.py --run {folder}"
    tensors, meta = load_artifact(path, made_by, data)
    try:
        sae = SAE(len(tensors["W_dec"]), int(tensors["active"]), len(tensors["mean"]))
        sae.load_state_dict(tensors)
    except (KeyError, RuntimeError) as error:  # other tensors, or of other shapes
        problem = f"{path} is not of the SAE of sae.py as it is now"
        raise UserError(f"{problem}: make it again with `{made_by}`") from error
    return sae.eval(), meta


def run_encoder(folder, data, device):
    """What a run's texts were embedded with -> (WordPiece, Bert). Raises UserError."""
    meta = artifact_meta(folder / "embeddings.safetensors", f"embed.py --run {folder}", data)
    made_by = meta["encoder"]
    files = [name for name in made_by if Path(name).suffix in (".json", ".safetensors", ".txt")]
    if not files:
        problem = f"{folder} has embeddings from {made_by['name']}, which embeds no new text"
        raise UserError(f"{problem}: bring a run whose texts an encoder embedded")
    given = meta["settings"].get("weights")  # to sources/bert.py, or embed.py as it was once
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the answer
        weights = Path(given) if given else fetch_weights()
    for name in files:
        path = weights / name
        if not path.is_file() or file_hash(path) != made_by[name]:
            problem = f"{path} is not there, or not what {folder} was embedded with"
            raise UserError(f"{problem}: bring that back, or run all stages again")
    load = load_encoder
    if given:
        from sources.bert import load_encoder as load  # tools/ does without sources/ otherwise
    return load(weights, made_by["max_tokens"], device)


@torch.inference_mode()
def text_code(folder, text, data, device):
    """What a run's SAE finds in a new text -> SparseRows [2, J], of which row 1 is the text's.

    Raises UserError.
    """
    tokenizer, bert = run_encoder(folder, data, device)
    ids = tokenizer(text)
    embedding = bert(torch.tensor([ids]), torch.tensor([len(ids)])).cpu()  # (1, E)
    sae, _ = load_sae(folder, data)
    library, _ = load_artifact(folder / "intents.safetensors", f"sae.py --run {folder}", data)
    number = torch.full((len(sae.W_dec),), -1)  # of each latent's intent
    kept = library["is_intent"].nonzero()[:, 0]
    number[library["latent"].long()[kept]] = kept
    return item_codes(encode_all(sae, embedding), torch.tensor([1]), 1, number)


def text_rows(code, rows):
    """The intents of a text's code, the strongest first -> list of dict for `--json`."""
    found = []
    for intent, value in zip(*(part.tolist() for part in code.row(1))):
        found.append(dict(intent=intent, label=rows[intent]["label"], activation=value))
    return sorted(found, key=lambda row: -row["activation"])


def add_item(model, code, data):
    """Give Grounded an item V+1 that has intents, but no id -> the Dataset with it.

    code: SparseRows [2, any], of which row 1 is the item's.
    """
    codes = model.codes
    intents, values = code.row(1)
    indptr = torch.cat([codes.indptr, codes.indptr[-1:] + len(intents)])
    indices = torch.cat([codes.indices, intents.to(codes.indices)])
    values = torch.cat([codes.values, values.to(codes.values)])
    model.codes = SparseRows(indptr, indices, values, codes.columns)
    ids = F.pad(model.item.weight.detach(), (0, 0, 0, 1))
    model.item = torch.nn.Embedding.from_pretrained(ids, padding_idx=0)
    titles = [*data.titles, "the new item"]
    return dataclasses.replace(data, items=[*data.items, None], titles=titles)
