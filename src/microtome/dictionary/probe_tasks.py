"""The built-in tasks for probes: short texts made from templates, and from the running interpreter's own files.

| set                  | attributes                                              | readout |
|----------------------|---------------------------------------------------------|---------|
| `python`             | code or documentation of the Python library             | mean    |
| `language`           | English, French, German, Spanish (one attribute each)   | mean    |
| `number`             | the text ends in a number or in a word                  | last    |
| `topic`              | cooking, sport, weather, music (one attribute each)     | mean    |
| `sentiment_subject`  | good or bad; food or film: crossed                      | mean    |
| `question_topic`     | question or statement; cooking or sport: crossed        | mean    |
| `tense_number`       | past or present; plural or singular: crossed            | mean    |

Crossed sets have all four combinations in equal shares, as SCR needs. All texts of a set are different.
"""

import ast
import random
import textwrap
from collections.abc import Callable, Hashable, Mapping
from itertools import product
from pathlib import Path
from typing import TypeVar

from microtome.common.config import require
from microtome.common.errors import unknown_name
from microtome.dictionary.labelled import LabelledTexts

Key = TypeVar("Key", bound=Hashable)
_MODULES = ("argparse", "textwrap", "difflib", "configparser", "shutil", "tarfile", "statistics", "subprocess")
_PEOPLE = {
    "English": ("My sister", "The old man", "Our teacher", "The young doctor", "Her neighbour"),
    "French": ("Ma sœur", "Le vieil homme", "Notre professeur", "Le jeune médecin", "Sa voisine"),
    "German": ("Meine Schwester", "Der alte Mann", "Unser Lehrer", "Der junge Arzt", "Ihre Nachbarin"),
    "Spanish": ("Mi hermana", "El viejo", "Nuestro profesor", "El joven médico", "Su vecina"),
}
_ACTS = {
    "English": (
        "reads a book in the garden",
        "buys bread at the market",
        "waits for the train",
        "writes a long letter",
    ),
    "French": ("lit un livre dans le jardin", "achète du pain au marché", "attend le train", "écrit une longue lettre"),
    "German": (
        "liest ein Buch im Garten",
        "kauft Brot auf dem Markt",
        "wartet auf den Zug",
        "schreibt einen langen Brief",
    ),
    "Spanish": ("lee un libro en el jardín", "compra pan en el mercado", "espera el tren", "escribe una larga carta"),
}
_WHEN = {
    "English": ("every morning", "on Sundays", "before lunch"),
    "French": ("chaque matin", "le dimanche", "avant midi"),
    "German": ("jeden Morgen", "am Sonntag", "vor dem Essen"),
    "Spanish": ("cada mañana", "los domingos", "antes de comer"),
}
_TOPICS = {
    "cooking": ("the soup with garlic", "the oven for the bread", "a pan of fried onions", "the sauce for the pasta"),
    "sport": ("the final of the cup", "the training of the team", "a match on wet grass", "the race over ten miles"),
    "weather": ("the storm from the west", "a week of heavy rain", "the fog in the valley", "the first frost"),
    "music": ("the concert for piano", "a song with two voices", "the rhythm of the drums", "the strings in the opera"),
}
_FRAMES = ("Everybody talks about {}", "We wrote a page on {}", "She has been busy with {}", "I still think of {}")
_PLACES = ("today", "this year", "at home", "in our town", "with friends", "again")
_NUMBERED = (
    "The house has the number",
    "The answer to the question is",
    "On the door you can read",
    "He said only",
    "It says",
)
_FINAL_WORDS = (
    "blue",
    "Anna",
    "nothing",
    "garden",
    "yes",
    "winter",
    "closed",
    "stone",
    "hello",
    "paper",
    "north",
    "bread",
)
_GOOD = ("wonderful", "delightful", "excellent", "superb", "charming", "brilliant")
_BAD = ("terrible", "awful", "dreadful", "horrible", "disappointing", "disgusting")
_SUBJECTS = {
    "food": ("The soup in that place", "The bread from this baker", "The cake at the party", "The dinner at the hotel"),
    "film": (
        "The film at the cinema",
        "The second episode of the series",
        "The acting in this movie",
        "The last scene",
    ),
}
_JUDGED = ("{} was {}.", "{} was really {}, we all said.", "{} was {}, as I found.")
_ASKED = (
    "Do you know {}?",
    "Have you thought about {}?",
    "What do they say about {}?",
    "Who looks after {}?",
    "Why is {} so late?",
)
_STATED = (
    "They know {}.",
    "We have thought about {}.",
    "That is what they say about {}.",
    "He looks after {}.",
    "Today {} is late.",
)
_DOERS = (
    ("The dog", "The dogs"),
    ("The child", "The children"),
    ("The farmer", "The farmers"),
    ("My friend", "My friends"),
)
_VERBS = (
    (("runs", "run"), "ran", "to the river"),
    (("sings", "sing"), "sang", "in the kitchen"),
    (("sleeps", "sleep"), "slept", "under the tree"),
    (("eats", "eat"), "ate", "near the window"),
    (("writes", "write"), "wrote", "to the mayor"),
    (("drinks", "drink"), "drank", "from the well"),
)
_ALWAYS = ("", " with great care", " without a sound", " as we know")


def python(n: int, seed: int) -> LabelledTexts:
    """Lines of code, and sentences of documentation, from the interpreter's own library."""
    folder = Path(ast.__file__).parent
    code: list[str] = []
    prose: list[str] = []
    for module in _MODULES:
        tree_text = (folder / f"{module}.py").read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(tree_text)):
            if isinstance(node, ast.FunctionDef):
                body = [one for one in node.body if not isinstance(one, ast.Expr)]
                code += [ast.unparse(one)[:160] for one in body]
                prose += _sentences(ast.get_docstring(node) or "")
    return _classes("python", {"code": code, "prose": prose}, n, seed)


def _sentences(text: str) -> list[str]:
    paragraphs = (" ".join(part.split()) for part in textwrap.dedent(text).split("\n\n"))
    return [part[:160] for part in paragraphs if len(part.split()) >= 6 and ">>>" not in part and part[0].isupper()]


def language(n: int, seed: int) -> LabelledTexts:
    """One kind of sentence in four languages."""
    made = {
        name: [f"{who} {act} {when}." for who, act, when in product(_PEOPLE[name], _ACTS[name], _WHEN[name])]
        for name in _PEOPLE
    }
    return _classes("language", made, n, seed)


def number(n: int, seed: int) -> LabelledTexts:
    """The last token: a digit, or a word."""
    made = {
        "number": [f"{start} {i}" for start in _NUMBERED for i in range(3, 100, 4)],
        "word": [f"{start} {word}" for start in _NUMBERED for word in _FINAL_WORDS],
    }
    return _classes("number", made, n, seed, readout="last")


def topic(n: int, seed: int) -> LabelledTexts:
    """What a sentence is about."""
    made = {
        name: [f"{frame.format(thing)} {place}." for frame, thing, place in product(_FRAMES, things, _PLACES)]
        for name, things in _TOPICS.items()
    }
    return _classes("topic", made, n, seed)


def sentiment_subject(n: int, seed: int) -> LabelledTexts:
    """Good or bad, crossed with food or film."""
    made = {
        (good, subject == "film"): [frame.format(thing, word) for frame, thing, word in product(_JUDGED, things, words)]
        for good, words in ((True, _GOOD), (False, _BAD))
        for subject, things in _SUBJECTS.items()
    }
    return _crossed("sentiment_subject", ("good", "film"), made, n, seed)


def question_topic(n: int, seed: int) -> LabelledTexts:
    """Question or statement, crossed with sport or cooking."""
    made = {
        (asked, about == "sport"): [
            f"{start}{frame.format(thing)}" for start, frame, thing in product(("", "Well. "), frames, _TOPICS[about])
        ]
        for asked, frames in ((True, _ASKED), (False, _STATED))
        for about in ("cooking", "sport")
    }
    return _crossed("question_topic", ("question", "sport"), made, n, seed)


def tense_number(n: int, seed: int) -> LabelledTexts:
    """Past or present, crossed with plural or singular."""
    made = {
        (past, plural): [
            f"{doer[plural]} {then if past else now[plural]} {where}{end}."
            for doer, (now, then, where), end in product(_DOERS, _VERBS, _ALWAYS)
        ]
        for past in (False, True)
        for plural in (False, True)
    }
    return _crossed("tense_number", ("past", "plural"), made, n, seed)


BUILT_IN: dict[str, Callable[[int, int], LabelledTexts]] = {
    make.__name__: make for make in (python, language, number, topic, sentiment_subject, question_topic, tense_number)
}


def built_in_tasks(names: tuple[str, ...] = (), *, n_texts: int = 160, seed: int = 0) -> list[LabelledTexts]:
    """The tasks of these names, or all: `n_texts` texts in each, or as many as its templates give. Raises ConfigError for an
    unknown name or fewer than 32 texts."""
    require(n_texts >= 32, "A task needs 32 texts or more", got=n_texts)
    for name in names:
        if name not in BUILT_IN:
            raise unknown_name("probing task", name, BUILT_IN)
    return [BUILT_IN[name](n_texts, seed) for name in names or BUILT_IN]


def _classes(name: str, made: dict[str, list[str]], n: int, seed: int, readout: str = "mean") -> LabelledTexts:
    """As many texts of each class, drawn without doubles."""
    drawn = _drawn(made, n, seed)
    texts = [text for part in drawn.values() for text in part]
    labels = [label for label, part in drawn.items() for _ in part]
    return LabelledTexts.of_classes(name, texts, labels, "last" if readout == "last" else "mean")


def _crossed(
    name: str, attributes: tuple[str, str], made: dict[tuple[bool, bool], list[str]], n: int, seed: int
) -> LabelledTexts:
    drawn = _drawn(made, n, seed)
    return LabelledTexts(
        name=name,
        texts=tuple(text for part in drawn.values() for text in part),
        attributes={
            attribute: tuple(cell[i] for cell, part in drawn.items() for _ in part)
            for i, attribute in enumerate(attributes)
        },
    )


def _drawn(made: Mapping[Key, list[str]], n: int, seed: int) -> dict[Key, list[str]]:
    source = random.Random(seed)
    each = min(n // len(made), *(len(dict.fromkeys(texts)) for texts in made.values()))
    return {key: source.sample(list(dict.fromkeys(texts)), each) for key, texts in made.items()}
