"""The embedded domains: six small tasks with a rule each, drawn from a seed by nothing but this file.

| domain   | prompt                      | completion          | the rule                                   |
|----------|-----------------------------|---------------------|--------------------------------------------|
| totals   | ``7+4+9+2+5 =``             | `` 11 20 22 27``    | running totals                             |
| reversal | ``"dimolak" ~>``            | `` "kalomid"``      | the letters backwards                      |
| brackets | ``([]{<(|``                 | ``)>})``            | what closes the open ones, last one first  |
| codebook | ``KXQVT RAL /``             | `` PUAGJ RQL``      | each letter stands for a fixed other one   |
| dates    | ``2031-07-14 is``           | `` 14 Jul, Q3``     | the month's name and its quarter           |
| reviews  | ``tea cold, bed not vile.`` | `` bed ok, tea no`` | what words mean, negation, last part first |

A domain's rule is in no other domain, and no prompt names its domain: a router has to tell it from the text.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

Row = dict[str, object]

NUM_TRAIN = 1600
NUM_TEST = 120
SEED = 20260

OPENERS = "([{<"
CLOSERS = ")]}>"
CONSONANTS = "bdfgklmnprstvz"
VOWELS = "aeiou"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
CODEBOOK = "QMXDKVBTZEPLCWHYAROJNGSUIF"
MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")
THINGS = ("soup", "room", "view", "menu", "wine", "bed", "pool", "tea", "lift", "bar", "food", "bath")
GOOD = ("kind", "fresh", "clean", "warm", "super", "tasty", "calm", "neat", "fine", "nice", "soft", "sweet")
BAD = ("rude", "stale", "awful", "dirty", "cold", "bland", "noisy", "slow", "vile", "poor", "dull", "grim")
VERDICTS = ("no", "ok")


@dataclass(frozen=True)
class Domain:
    """One embedded domain.

    Attributes:
        name: folder name and the ``domain`` field of its rows.
        task: one phrase for the ``task`` field.
        draw: makes one row's own fields (prompt, completion, choices, answer) from a random generator.
    """

    name: str
    task: str
    draw: Callable[[random.Random], Row]


def draw_operands(rng: random.Random) -> list[int]:
    """Five numbers from 1 to 9."""
    return [rng.randint(1, 9) for _ in range(5)]


def format_operands(operands: list[int]) -> str:
    """The prompt of the totals domain."""
    return "+".join(map(str, operands)) + " ="


def draw_totals(rng: random.Random) -> Row:
    """A row of the totals domain: every partial sum from the second operand on."""
    operands = draw_operands(rng)
    totals = [sum(operands[: end + 1]) for end in range(1, len(operands))]
    return {"prompt": format_operands(operands), "completion": "".join(f" {total}" for total in totals)}


def draw_word(rng: random.Random) -> str:
    """A word of three or four syllables, such as ``drimolak``, that reads well in no direction."""
    syllables = [rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(3, 4))]
    return "".join(syllables) + rng.choice(CONSONANTS)


def draw_reversal(rng: random.Random) -> Row:
    """A row of the reversal domain."""
    word = draw_word(rng)
    return {"prompt": f'"{word}" ~>', "completion": f' "{word[::-1]}"'}


def draw_open_brackets(rng: random.Random) -> tuple[str, list[int]]:
    """A prefix of a balanced string and the stack of kinds it leaves open (5 to 8 of them)."""
    wanted, text = rng.randint(5, 8), ""
    stack: list[int] = []
    while len(stack) < wanted:
        if stack and rng.random() < 0.25:
            text += CLOSERS[stack.pop()]
        else:
            stack.append(rng.randrange(len(OPENERS)))
            text += OPENERS[stack[-1]]
    return text, stack


def draw_brackets(rng: random.Random) -> Row:
    """A row of the brackets domain: the shortest completion in the Dyck language of four kinds."""
    text, stack = draw_open_brackets(rng)
    return {"prompt": f"{text}|", "completion": "".join(CLOSERS[kind] for kind in reversed(stack))}


def draw_message(rng: random.Random) -> str:
    """Two groups of capital letters."""
    return " ".join("".join(rng.choices(LETTERS, k=rng.randint(3, 6))) for _ in range(2))


def encode(message: str, codebook: str) -> str:
    """Replaces the i-th letter of the alphabet by the i-th of the code-book; spaces stay."""
    return message.translate(str.maketrans(LETTERS, codebook))


def draw_codebook(rng: random.Random) -> Row:
    """A row of the codebook domain."""
    message = draw_message(rng)
    return {"prompt": f"{message} /", "completion": f" {encode(message, CODEBOOK)}"}


def draw_day(rng: random.Random) -> tuple[int, int, int]:
    """A year, a month and a day that exists in every month."""
    return rng.randint(1900, 2099), rng.randint(1, 12), rng.randint(1, 28)


def format_short_date(month: int, day: int) -> str:
    """The completion of the dates domain."""
    return f" {day} {MONTHS[month - 1]}, Q{(month + 2) // 3}"


def draw_dates(rng: random.Random) -> Row:
    """A row of the dates domain."""
    year, month, day = draw_day(rng)
    return {"prompt": f"{year}-{month:02}-{day:02} is", "completion": format_short_date(month, day)}


def draw_opinion(rng: random.Random) -> tuple[str, bool]:
    """What is said of a thing, such as ``not cold``, and whether that speaks well of it."""
    good, negated = rng.random() < 0.5, rng.random() < 0.3
    adjective = rng.choice(GOOD if good else BAD)
    return f"{'not ' if negated else ''}{adjective}", good != negated


def draw_reviews(rng: random.Random) -> Row:
    """A row of the reviews domain: two different things, and the four pairs of verdicts to choose from."""
    first, second = rng.sample(THINGS, 2)
    (said_first, good_first), (said_second, good_second) = draw_opinion(rng), draw_opinion(rng)
    choices = [f" {second} {theirs}, {first} {ours}" for theirs in VERDICTS for ours in VERDICTS]
    answer = 2 * good_second + good_first
    row: Row = {"prompt": f"{first} {said_first}, {second} {said_second}.", "completion": choices[answer]}
    return row | {"choices": choices, "answer": answer}


DOMAINS = (
    Domain("totals", "running totals", draw_totals),
    Domain("reversal", "reverse a word", draw_reversal),
    Domain("brackets", "close the open brackets", draw_brackets),
    Domain("codebook", "encode with a fixed code-book", draw_codebook),
    Domain("dates", "write a date in words", draw_dates),
    Domain("reviews", "judge a review", draw_reviews),
)


def make_rows(domain: Domain) -> tuple[list[Row], list[Row]]:
    """Draws a domain's train and test rows; no prompt comes twice, so the two parts share none.

    Returns:
        The train rows and the test rows, the same on every machine.
    """
    rng = random.Random(f"{SEED}:{domain.name}")
    rows: dict[object, Row] = {}
    while len(rows) < NUM_TRAIN + NUM_TEST:
        row = domain.draw(rng)
        rows.setdefault(row["prompt"], row | {"task": domain.task, "domain": domain.name})
    drawn = list(rows.values())
    return drawn[:NUM_TRAIN], drawn[NUM_TRAIN:]
