"""Make a dataset folder whose true intents are known, to see what a method finds of them.

    python sources/planted.py --out data/planted

Beside the dataset's two files it writes the truth, in the numbering of `load_dataset`:
    truth.safetensors   item_intents (float32 [V+1, J], strength, 0 if not carried),
                        text_intents (bool [N, J]), public (int64 [3]),
                        user_intents (bool [users, J], the personal ones after the last step)
    truth.jsonl         a line per intent: its name, its words, whether it is public

The story, told by `planted_world`:
1. There are J true intents; each has a name and a handful of words of its own, its synonyms.
2. An item carries one to three intents, some intents being in fashion more than others, each with
   a strength in [0.5, 1].
3. A text of an item draws sentences from templates: now a sentence on one of its intents, in that
   intent's words, now a sentence of noise words that all items share. So no single word is an
   intent, and no text has all of its item's words.
4. A few public intents please everybody. Each user has three personal intents besides.
5. Personal intents drift: at each step one of them may turn into the intent that follows it in a
   fixed cycle, so what a user is after now says more than what they were after long ago, and where
   they are heading can be learned.
6. A step picks an item the user has not had, with probability softmax(weight of personal + weight
   of public intents in it), or, one time in ten, any item at all.

Letters besides those in saerec.py: here V counts all items, J the true intents.
"""

import dataclasses
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from saerec import run_command, save_artifact, setting, write_rows  # noqa: E402
from sources.common import write_dataset  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

THEMES = """
space: rocket orbit planet astronaut galaxy
cooking: recipe oven butter kitchen spice
music: guitar melody concert singer drum
gardening: soil seeds greenhouse compost tulip
sailing: anchor harbour mast sail regatta
chess: gambit checkmate pawn endgame rook
medicine: surgeon clinic vaccine nurse diagnosis
crime: detective murder alibi heist suspect
war: soldier battle trench general siege
romance: wedding kiss sweetheart courtship bouquet
winter: snow sledge glacier blizzard icicle
desert: dune camel oasis cactus mirage
horses: saddle stallion gallop stable jockey
trains: locomotive railway carriage platform conductor
law: judge verdict courtroom lawyer jury
magic: wizard spell wand potion sorcerer
pirates: treasure buccaneer cutlass galleon parrot
robots: android circuit sensor automaton servo
school: teacher classroom pupil homework exam
football: goal striker referee stadium penalty
painting: canvas brush portrait easel palette
history: empire throne dynasty medieval castle
ocean: coral whale reef dolphin submarine
mountains: summit climber ridge avalanche cliff
dogs: puppy kennel leash terrier bark
cats: kitten whiskers purr tabby paw
fashion: dress runway tailor silk couture
money: bank loan investor market dividend
politics: senate election minister campaign ballot
theatre: stage actor curtain rehearsal playwright
camping: tent campfire lantern hiker backpack
baking: dough yeast pastry loaf croissant
coffee: espresso roast barista latte beans
photography: camera lens shutter tripod darkroom
astronomy: telescope comet nebula eclipse meteor
dinosaurs: fossil raptor jurassic triceratops extinct
ghosts: haunted phantom seance spirit crypt
cycling: bicycle pedal helmet peloton gears
farming: tractor harvest barn wheat cattle
dance: ballet tango waltz choreographer rhythm
"""
NOISE = (
    "thing story piece work item kind sort part set version edition series line style form "
    "way side place time day year people world life"
).split()
TEMPLATES = (
    "a {} about {} and {}",
    "{} meets {} in this {}",
    "with {}, {} and a {}",
    "the {} of {} and {}",
    "for {} or {} lovers: a {}",
)
SYLLABLES = [first + second for first in "bdfgklmnprstvz" for second in "aeiou"]
PUBLIC = 3
PERSONAL = 3


@dataclasses.dataclass(frozen=True)
class PlantedSettings:
    """Make a dataset folder whose true intents are known, with truth.safetensors and .jsonl."""

    out: str = setting("data/planted", "dataset folder to write, with its truth", unit="path")
    users: int = setting(2000, "users", low=1)
    items: int = setting(600, "items", low=10)
    intents: int = setting(40, "true intents J", low=4, high=2000)
    texts: int = setting(3, "texts of an item", low=1)
    length: float = setting(12.0, "mean length of a history", unit="items", low=5, high=10**6)
    drift: float = setting(
        0.1, "chance that a personal intent moves on, at each step", low=0, high=1
    )
    seed: int = setting(0, "seed of every random choice", low=0, high=2**31 - 1)


def make_up_word(number):
    """The word of three syllables with that number, below 70^3."""
    word = ""
    for _ in range(3):
        number, syllable = divmod(number, len(SYLLABLES))
        word += SYLLABLES[syllable]
    return word


def intent_words(J, draw):
    """The true intents -> list of J lists of words, the first of which is the intent's name.

    After the themes above come intents with made-up words.
    """
    intents = [re.findall(r"\w+", theme) for theme in THEMES.strip().split("\n")]
    numbers = draw.permutation(len(SYLLABLES) ** 3)[: 6 * J]  # all different
    for six in numbers.reshape(J, 6).tolist():
        intents.append([make_up_word(number) for number in six])
    return intents[:J]


def draw_items(V, J, draw):
    """What each item carries -> strength float32 [V, J], 0 where an intent is not carried."""
    fashion = 1 / np.arange(1, J + 1) ** 0.5
    fashion /= fashion.sum()
    strength = np.zeros((V, J), np.float32)
    for item in range(V):
        carried = draw.choice(J, draw.integers(1, 4), replace=False, p=fashion)
        strength[item, carried] = draw.uniform(0.5, 1, len(carried))
    return strength


def draw_text(carried, chance, words, draw):
    """One text of an item -> (text, the intents that it tells of, one per sentence).

    carried: int [any], the item's intents; chance: float [any], theirs; words: of all intents.
    """
    sentences = []
    told = draw.choice(carried, draw.integers(2, 5), p=chance)
    for intent in told:
        first, second = draw.choice(words[intent], 2, replace=False)
        template = str(draw.choice(TEMPLATES))
        sentences.append(template.format(first, second, draw.choice(NOISE)))
        sentences.append(" ".join(draw.choice(NOISE, draw.integers(2, 6))))
    return ". ".join(sentences).capitalize() + ".", told


def draw_texts(strength, words, texts, draw):
    """So many texts of each item -> (rows of texts.jsonl, text_intents bool [V, texts, J])."""
    V, J = strength.shape
    rows = []
    text_intents = np.zeros((V, texts, J), bool)
    for item in range(V):
        carried = np.nonzero(strength[item])[0]
        chance = strength[item, carried] / strength[item].sum()
        names = " and ".join(words[intent][0] for intent in carried)
        for number in range(texts):
            text, told = draw_text(carried, chance, words, draw)
            text_intents[item, number, told] = True
            rows.append({"item": f"i{item + 1}", "title": f"{names} no. {item + 1}", "text": text})
    return rows, text_intents


def draw_history(strength, liked_by_all, settings, draw):
    """What one user has, oldest first -> (list of items 0..V-1, the user's last intents int [3]).

    strength: float32 [V, J]; liked_by_all: float32 [V], the public intents in each item.
    """
    V, J = strength.shape
    personal = draw.choice(J, PERSONAL, replace=False)
    seen = []
    length = 5 + draw.poisson(settings.length - 5)
    for _ in range(min(length, V // 2)):
        if draw.random() < settings.drift:
            personal[draw.integers(PERSONAL)] += 1
            personal %= J
        if draw.random() > 0.1:
            score = 6 * strength[:, personal].sum(1) + 2 * liked_by_all
            chance = np.exp(score - score.max())
        else:
            chance = np.ones(V)
        chance[seen] = 0
        seen.append(int(draw.choice(V, p=chance / chance.sum())))
    return seen, personal


def describe_intents(words, public, item_intents):
    """Yield the rows of truth.jsonl, one per intent."""
    carriers = (item_intents > 0).sum(0).tolist()  # [J]
    for intent, (own, items) in enumerate(zip(words, carriers)):
        is_public = intent in public
        yield dict(intent=intent, name=own[0], words=own, public=is_public, items=items)


def planted_world(settings):
    """A world whose intents are known, as this file's docstring tells.

    Returns ({user: items}, rows of texts.jsonl, truth tensors, rows of truth.jsonl); items that no
    user has are in none of them.
    """
    draw = np.random.default_rng(settings.seed)
    J = settings.intents
    words = intent_words(J, draw)
    strength = draw_items(settings.items, J, draw)  # (V, J)
    rows, text_intents = draw_texts(strength, words, settings.texts, draw)
    public = draw.choice(J, PUBLIC, replace=False)
    liked_by_all = strength[:, public].sum(1)  # (V,)

    sequences = {}
    user_intents = np.zeros((settings.users, J), bool)
    had = np.zeros(settings.items, bool)
    for user in range(settings.users):
        items, personal = draw_history(strength, liked_by_all, settings, draw)
        sequences[f"u{user + 1}"] = [f"i{item + 1}" for item in items]
        user_intents[user, personal] = True
        had[items] = True

    padding = np.zeros((1, J), np.float32)
    item_intents = np.concatenate([padding, strength[had]])
    truth = dict(
        item_intents=item_intents,
        text_intents=text_intents[had].reshape(-1, J),
        user_intents=user_intents,
        public=public,
    )
    rows = [row for row, kept in zip(rows, np.repeat(had, settings.texts)) if kept]
    intents = list(describe_intents(words, public, item_intents))
    return sequences, rows, truth, intents


def prepare(settings):
    """Write a planted world as a dataset folder, and its truth beside it."""
    out = Path(settings.out)
    sequences, rows, truth, intents = planted_world(settings)
    data = write_dataset(settings.out, sequences.items(), rows)
    truth = {name: torch.from_numpy(value) for name, value in truth.items()}
    save_artifact(out / "truth.safetensors", truth, settings, data.hash)
    write_rows(out / "truth.jsonl", intents)
    where = out / "truth.jsonl"
    print(f"the truth: {settings.intents} intents, {PUBLIC} of them public, in {where}")


def main(argv=None):
    return run_command(argv, __doc__, planted=(PlantedSettings, prepare))


if __name__ == "__main__":
    sys.exit(main())
