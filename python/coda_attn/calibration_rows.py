"""Rows to calibrate gates on: prose with a few facts inside, and questions about all of them at the end.

A gate learns to keep what the model looks back at. Prose alone hardly looks back; questions do (semantics 3.9).
"""

from __future__ import annotations

import random
import re
from typing import Any, Callable, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from .evaluation.corpus import library_docs, wiki_summaries


class Wording(NamedTuple):
    """One way to state a fact and to ask for it."""

    subject: str  #: which list of subjects fills {s}
    answer: str  #: which kind of value fills {a}
    statement: str
    question: str


# Pass keys, needles, magic or secret words and numbers, things "to remember", and orders to keep something in mind are left out
# on purpose: they are what retrieval is tested with.
WORDINGS = (
    Wording("person", "number", "The locker of {s} has the number {a}.", "What is the number of the locker of {s}?"),
    Wording("person", "number", "{s} can be reached under extension {a}.", "Under which extension can {s} be reached?"),
    Wording("person", "name", "The doctor who looked after {s} was called {a}.", "Who looked after {s}?"),
    Wording("person", "place", "Since last spring {s} has been living in {a}.", "Where does {s} live?"),
    Wording("person", "trade", "{s} earns a living as a {a}.", "What does {s} do for a living?"),
    Wording("person", "colour", "For the wedding, {s} chose a {a} coat.", "Which colour was the coat that {s} chose?"),
    Wording("person", "date", "The birthday of {s} falls on {a}.", "On which day is the birthday of {s}?"),
    Wording("person", "animal", "It is well known that {s} keeps a {a} at home.", "Which animal does {s} keep?"),
    Wording("place", "number", "Exactly {a} people were counted in {s}.", "How many people were counted in {s}?"),
    Wording("place", "name", "The mayor of {s} is {a}.", "Who is the mayor of {s}?"),
    Wording("place", "time", "The last train to {s} leaves at {a}.", "When does the last train to {s} leave?"),
    Wording("place", "number", "In {s} the postcode is {a}.", "What is the postcode in {s}?"),
    Wording("place", "animal", "The coat of arms of {s} shows a {a}.", "What does the coat of arms of {s} show?"),
    Wording("thing", "code", "The serial number printed on the {s} reads {a}.", "What does the serial number on the {s} read?"),
    Wording("thing", "price", "At the auction the {s} was sold for {a}.", "For how much was the {s} sold?"),
    Wording("thing", "word", "To unlock the {s}, say the word {a}.", "Which word unlocks the {s}?"),
    Wording("thing", "number", "The combination that opens the {s} is {a}.", "Which combination opens the {s}?"),
    Wording("thing", "place", "They hid the {s} in a cellar in {a}.", "In which town is the {s} hidden?"),
    Wording("thing", "colour", "Somebody painted the {s} {a}.", "What colour is the {s}?"),
    Wording("thing", "code", "Note for the storekeeper: the {s} belongs on shelf {a}.", "On which shelf does the {s} belong?"),
    Wording("ship", "number", "The ship {s} carried {a} crates of oranges.", "How many crates did the ship {s} carry?"),
    Wording("ship", "name", "{a} was captain of the ship {s}.", "Who was captain of the ship {s}?"),
    Wording("project", "word", "Inside the company, project {s} went by the name {a}.", "By which name did project {s} go?"),
    Wording("project", "date", "Project {s} has to be finished by {a}.", "By when has project {s} to be finished?"),
)

# How a row puts its questions: before a question, between question and answer, after the answer.
_STYLES = (
    ("\nQuestion: ", "\nAnswer: ", "\n"),
    ("\nQ: ", "\nA: ", "\n"),
    ("\n- ", " ", ""),
    ("\n\n", "\n", ""),
)

_FIRST = ("Anna Bram Clara Daniel Edith Felix Greta Henry Irene Jonas Karin Leon Maria Nils Olga Peter Quentin Rosa Simon Teresa Ulric "
          "Vera Walter Yvonne Zora").split()
_LAST = ("Abbott Barlow Castle Dorsey Eastman Farrow Gilmore Hadley Ingram Jasper Keller Lowell Mercer Norwood Osborn Parrish "
         "Quimby Radford Sawyer Thorne Underhill Vance Whitlock Yardley Zeller").split()
_PLACES = ("Ashford Brinmore Calder Dunmere Elmhurst Fairhaven Glenrock Harlow Inverness Kingsley Lindale Marlow Northwick Oakham "
           "Pembroke Ravenna Silverton Tilbury Upton Verona Westbrook Yarrow").split()
_TRADES = "baker carpenter dentist fisherman gardener lawyer miller nurse painter pilot plumber tailor teacher weaver".split()
_COLOURS = "black blue brown crimson golden green grey orange pink purple red silver white yellow".split()
_ANIMALS = "badger bear crane deer eagle falcon fox goat heron horse lion otter owl parrot rabbit swan tortoise wolf".split()
_THINGS = ("blue bicycle|brass clock|cedar chest|copper kettle|garden gate|glass cabinet|grand piano|iron safe|leather suitcase|"
           "marble statue|oak wardrobe|old radio|red toolbox|sewing machine|silver lantern|stone chapel|wooden boat|workshop door").split("|")
_SHIPS = "Albatross Borealis Constance Dauntless Endeavour Fortuna Halcyon Meridian Northern Star Petrel Sirius Tempest".split()
_PROJECTS = "Amber Birch Cobalt Delta Ember Falcon Granite Harbor Indigo Juniper Lotus Mosaic Nimbus Orion".split()
_WORDS = ("anchor blossom candle dolphin ember feather galaxy harvest island jungle kernel lantern meadow nectar orchard pebble quarry "
          "ribbon saddle thunder umbrella velvet willow zephyr").split()
_MONTHS = "January February March April May June July August September October November December".split()
_LETTERS = "ABCDEFGHJKLMNPRSTUVWXYZ"

_SUBJECTS: dict[str, Callable[[random.Random], str]] = {
    "person": lambda r: f"{r.choice(_FIRST)} {r.choice(_LAST)}",
    "place": lambda r: r.choice(_PLACES),
    "thing": lambda r: r.choice(_THINGS),
    "ship": lambda r: r.choice(_SHIPS),
    "project": lambda r: r.choice(_PROJECTS),
}
_ANSWERS: dict[str, Callable[[random.Random], str]] = {
    "number": lambda r: str(r.randrange(10 ** (digits := r.randint(2, 7) - 1), 10 ** (digits + 1))),
    "code": lambda r: f"{r.choice(_LETTERS)}{r.choice(_LETTERS)}-{r.randrange(100, 10000)}",
    "price": lambda r: f"{r.randrange(12, 9900)} dollars",
    "time": lambda r: f"{r.randrange(24)}:{r.randrange(60):02}",
    "date": lambda r: f"{r.choice(_MONTHS)} {r.randint(1, 28)}",
    "name": lambda r: f"{r.choice(_FIRST)} {r.choice(_LAST)}",
    "place": lambda r: r.choice(_PLACES),
    "trade": lambda r: r.choice(_TRADES),
    "colour": lambda r: r.choice(_COLOURS),
    "animal": lambda r: r.choice(_ANIMALS),
    "word": lambda r: r.choice(_WORDS),
}


class Fact(NamedTuple):
    statement: str
    question: str
    answer: str


def make_facts(generator: random.Random, count: int) -> list[Fact]:
    """Facts in ``count`` different wordings, no two about the same subject.

    Raises: ValueError when there are not so many wordings.
    """
    if not 1 <= count <= len(WORDINGS):
        raise ValueError(f"{count} facts in one row were asked; supported are 1 to {len(WORDINGS)}, the number of wordings")
    facts: dict[str, Fact] = {}
    for wording in generator.sample(WORDINGS, count):
        subject = _SUBJECTS[wording.subject](generator)
        while subject in facts:
            subject = _SUBJECTS[wording.subject](generator)
        answer = _ANSWERS[wording.answer](generator)
        facts[subject] = Fact(wording.statement.format(s=subject, a=answer), wording.question.format(s=subject), answer)
    return list(facts.values())


def calibration_rows(tokenizer: Any, rows: int = 64, length: int = 2048, *, seed: int = 0,
                     prose: Optional[Sequence[str]] = None, facts: tuple[int, int] = (5, 9)) -> Tensor:
    """Token ids (rows, length) int64: prose with facts between its sentences, and all of them asked and answered at the end.

    Args:
        tokenizer: a transformers tokenizer. rows: how many. length: tokens each.
        seed: the same seed gives the same rows. prose: passages, each used once at most; by default ``wiki_summaries()`` and
            ``library_docs()``, from which rows take turns: short texts on every subject, and long ones that look back.
        facts: least and greatest number of facts in a row.
    Raises: ValueError when the prose is too short for so many rows, or the rows too short for their facts.
    """
    if rows < 1:
        raise ValueError(f"{rows} calibration rows were asked; give at least 1")
    generator = random.Random(seed)
    sources = [_sentences(passages, generator) for passages in ([wiki_summaries(), library_docs()] if prose is None else [prose])]
    return torch.tensor([_row(tokenizer, sources[i % len(sources)], make_facts(generator, generator.randint(*facts)), length, generator)
                         for i in range(rows)])


def _sentences(passages: Sequence[str], generator: random.Random) -> list[str]:
    """The sentences of shuffled passages, each with the white space before it; to be popped from the end, each once."""
    passages = list(passages)
    generator.shuffle(passages)
    return [("\n\n" if i == 0 else "") + sentence for passage in passages
            for i, sentence in enumerate(re.split(r"(?<=[.!?])(?=\s)", passage.strip()))][::-1]


def _row(tokenizer: Any, sentences: list[str], facts: list[Fact], length: int, generator: random.Random) -> list[int]:
    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    before, between, after = generator.choice(_STYLES)
    asked = generator.sample(facts, len(facts))
    tail = encode("\n" + "".join(f"{before}{fact.question}{between}{fact.answer}{after}" for fact in asked))
    stated = [encode(" " + fact.statement) for fact in facts]
    room = length - len(tail) - sum(map(len, stated))
    if room < 1:
        raise ValueError(f"rows of {length} tokens have no room for {len(facts)} facts and the questions about them, which take "
                         f"{length - room}; give longer rows")
    pieces: list[list[int]] = []
    while room > 0:
        if not sentences:
            raise ValueError(f"the prose is too short for the calibration rows asked (each takes {length} tokens); "
                             "give more prose or ask for fewer rows")
        pieces.append(encode(sentences.pop()))
        room -= len(pieces[-1])
    # The last sentence breaks off where the row is full.
    pieces[-1] = pieces[-1][:len(pieces[-1]) + room]
    for fact in stated:
        pieces.insert(generator.randrange(len(pieces)), fact)
    return [token for piece in pieces for token in piece] + tail
