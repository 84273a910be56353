"""The text the embedded base is pretrained on: every domain's surface under other rules, and patterns.

The base has to bring what a pretrained model brings (copying, looking back, aligning, digits, words that mean
much the same) and must not know any domain's rule. So the formats here are the domains' own while the answers
follow rules that no domain has, several a format, or are drawn at random.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import domains as d

Text = tuple[str, str]

NUM_OTHER_CODEBOOKS = 6
OTHER_STARTS = (20, 35, 50)
MONTH_SHIFTS = (2, 3, 5, 7, 8, 10)


def other_codebooks() -> tuple[str, ...]:
    """The plain alphabet and six shuffled ones, none of which agrees with the domain's own on any letter."""
    rng, found = random.Random("other code-books"), [d.LETTERS]
    while len(found) <= NUM_OTHER_CODEBOOKS:
        letters = "".join(rng.sample(d.LETTERS, len(d.LETTERS)))
        if all(ours != theirs for ours, theirs in zip(d.CODEBOOK, letters, strict=True)):
            found.append(letters)
    return tuple(found)


CODEBOOKS = other_codebooks()


def running(operands: list[int], step: Callable[[int, int], int], start: int | None = None) -> list[int]:
    """Folds ``step`` over the operands and returns each value from the second operand on."""
    value = operands[0] if start is None else step(start, operands[0])
    values = []
    for operand in operands[1:]:
        value = step(value, operand)
        values.append(value)
    return values


def draw_number_text(rng: random.Random) -> Text:
    """Operands, then running extremes, neighbours, echoes, or totals up or down from another start."""
    operands = d.draw_operands(rng)
    pairs = list(itertools.pairwise(operands))
    start = rng.choice(OTHER_STARTS)
    answers: tuple[Callable[[], list[int]], ...] = (
        lambda: running(operands, max),
        lambda: running(operands, min),
        lambda: operands[1:],
        lambda: [left + right for left, right in pairs],
        lambda: [abs(left - right) for left, right in pairs],
        lambda: running(operands, lambda total, operand: total + operand, start),
        lambda: running(operands, lambda total, operand: total - operand, 50),
    )
    return d.format_operands(operands), "".join(f" {value}" for value in rng.choice(answers)())


def draw_word_text(rng: random.Random) -> Text:
    """A word, then a change of it that keeps the direction of reading."""
    word = d.draw_word(rng)
    half = len(word) // 2
    changes = (
        word,
        "".join(letter * 2 for letter in word),
        "".join(word[i : i + 2][::-1] for i in range(0, len(word), 2)),
        "".join(letter for letter in word if letter not in d.VOWELS),
        word[2:] + word[:2],
        word[half:] + word[:half],
        word[::2],
    )
    return f'"{word}" ~>', f' "{rng.choice(changes)}"'


def draw_bracket_text(rng: random.Random) -> Text:
    """Open brackets, then closers in the order of opening, or openers again in either order."""
    text, stack = d.draw_open_brackets(rng)
    answers = (
        "".join(d.CLOSERS[kind] for kind in stack),
        "".join(d.OPENERS[kind] for kind in stack),
        "".join(d.OPENERS[kind] for kind in reversed(stack)),
        "".join(d.CLOSERS[rng.randrange(4)] for _ in stack),
    )
    return f"{text}|", rng.choice(answers)


def draw_code_text(rng: random.Random) -> Text:
    """A message under one of the other code-books."""
    message = d.draw_message(rng)
    return f"{message} /", f" {d.encode(message, rng.choice(CODEBOOKS))}"


def draw_date_text(rng: random.Random) -> Text:
    """A date in another order of words, whose month is named in a calendar that starts some months later."""
    year, month, day = d.draw_day(rng)
    shifted = (month + rng.choice(MONTH_SHIFTS) - 1) % 12 + 1
    name, quarter = d.MONTHS[shifted - 1], f"Q{(shifted + 2) // 3}"
    answers = (f" {name} {day}, {quarter}", f" {quarter}, {day} {name}", f" {quarter}, {name} {day}")
    return f"{year}-{month:02}-{day:02} is", rng.choice(answers)


def draw_review_text(rng: random.Random) -> Text:
    """Two opinions with verdicts, first one first, by "not" alone or by lot; or words that agree."""
    if rng.random() < 0.4:
        words = rng.sample(rng.choice((d.GOOD, d.BAD)), 4)
        return f"{rng.choice(d.THINGS)} {words[0]},", f" {words[1]}, {words[2]}, {words[3]}."
    prompt = str(d.draw_reviews(rng)["prompt"])
    verdicts = []
    for clause in prompt.removesuffix(".").split(", "):
        by_lot = rng.random() < 0.3
        verdict = rng.choice(d.VERDICTS) if by_lot else d.VERDICTS["not" not in clause.split()]
        verdicts.append(f" {clause.split()[0]} {verdict}")
    return prompt, ",".join(verdicts)


def draw_pattern_text(rng: random.Random) -> Text:
    """A random piece of printable characters, repeated."""
    piece = "".join(chr(rng.randint(33, 126)) for _ in range(rng.randint(2, 9)))
    return piece, piece * rng.randint(1, 3)


SOURCES: tuple[Callable[[random.Random], Text], ...] = (
    draw_number_text,
    draw_word_text,
    draw_bracket_text,
    draw_code_text,
    draw_date_text,
    draw_review_text,
    draw_pattern_text,
)
WEIGHTS = (5, 4, 3, 5, 3, 3, 1)


def draw_text(rng: random.Random) -> Text:
    """One (prompt, completion) of the pretraining text."""
    return rng.choices(SOURCES, WEIGHTS)[0](rng)
