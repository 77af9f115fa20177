"""BABILong in miniature: bAbI stories hidden in noise, made on the fly, and a table of scores.

    python babilong_tiny.py                                  # print samples a person can read
    python babilong_tiny.py --task=qa2 --length=256 --samples=1 --noise=book.txt
    python babilong_tiny.py --babi_dir=tasks_1-20_v1-2/en    # stories from the real bAbI files
    python babilong_tiny.py --score                          # score out/ckpt.pt, or what ships here
    python babilong_tiny.py --ckpt=out/ckpt.pt --tasks=all --lengths=0,1k,4k --noise=book.txt
    python babilong_tiny.py --ckpt=out/ckpt.pt --retrieve=5  # shown five sentences of the context

Stories follow the *released* bAbI v1.2 files (Weston et al. 2015, arXiv 1502.05698), so a model
trained only on samples from here can be tested on the real files. Hiding follows BABILong
(Kuratov et al. 2024, arXiv 2406.10149): noise in natural order, fact positions drawn uniformly
and sorted, the question last, the total length exact.

Every function draws from the `random.Random` it is given and from nothing else. What is wrong with
a flag or a file is said by a `BadInput`.
"""
import argparse
import codecs
import contextlib
import csv
import io
import itertools
import math
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter, namedtuple
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache, partial
from typing import Callable

import numpy as np
import tiktoken
import torch

from lm2 import LM2, BadInput, load_checkpoint, make_encoding

# --------------------------------------------------------------------------------------------
# The world

PEOPLE = ("Mary", "John", "Daniel", "Sandra")
GIVERS = ("Mary", "Bill", "Fred", "Jeff")       # the people of qa5
GUESSED = ("Mary", "Bill", "Fred", "Julie")     # the people of qa10
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
TOWN = ("bedroom", "cinema", "kitchen", "office", "park", "school")  # the places of qa10
OBJECTS = ("football", "apple", "milk")
OPPOSITE = {"north": "south", "south": "north", "east": "west", "west": "east"}
SENTENCES = {  # how an action is told, each way as likely
    "move": ("{person} moved to the {thing}.", "{person} went to the {thing}.",
             "{person} journeyed to the {thing}.", "{person} travelled to the {thing}.",
             "{person} went back to the {thing}."),
    "is": ("{person} is in the {thing}.",),
    "not": ("{person} is no longer in the {thing}.", "{person} is not in the {thing}."),
    "either": ("{person} is either in the {thing} or the {other}.",),
    "get": ("{person} picked up the {thing}{there}.", "{person} got the {thing}{there}.",
            "{person} grabbed the {thing}{there}.", "{person} took the {thing}{there}."),
    "drop": ("{person} dropped the {thing}{there}.", "{person} left the {thing}{there}.",
             "{person} discarded the {thing}{there}.", "{person} put down the {thing}{there}."),
    "give": ("{person} passed the {thing} to {other}.", "{person} gave the {thing} to {other}.",
             "{person} handed the {thing} to {other}."),
}
MOVES, TOUCHES = ("move", "is", "not", "either"), ("get", "drop", "give")
NUMBERS = ("none", "one", "two", "three")
WINDOW = 5  # bAbI asks about a statement among the last five


# One statement: `person` did `action`, a key of SENTENCES, to `thing` (a place or an object).
# `other` is the second place of an "either" and the receiver of a "give". A "relation" says that
# place `person` lies in direction `other` of place `thing`.
Fact = namedtuple("Fact", "action person thing other text")
# A question about a story; `support` holds the indices of the facts that answer it
Question = namedtuple("Question", "text answer support")
# Facts as plain sentences and the questions to ask after them. For training, some `facts` may be
# questions by the way, which the text leaves without an answer: {number of the fact: the answer}
Sample = namedtuple("Sample", "facts questions asides", defaults=({},))


def step(task, place, rng):
    """Draw person, action and argument until one is possible; do it and return the `Fact`.

    `place` is where people and objects are, an object that is held with the name of who holds it.
    """
    while True:
        person, action = rng.choice(task.people), rng.choice(task.actions)
        here, other = place[person], ""
        if action in MOVES:
            thing = rng.choice(task.places)
            if thing == here:
                continue  # nobody moves to where he is
            place[person] = thing
            if action == "either":
                pair = [thing, rng.choice(task.places)]  # now and then the same place twice
                rng.shuffle(pair)
                thing, other = pair
            elif action == "not":
                thing = here
        else:  # get an object that lies here, drop one, or give one to somebody here
            things = [t for t in OBJECTS if place[t] == (here if action == "get" else person)]
            others = [p for p in task.people if p != person and place[p] == here]
            if not things or action == "give" and not others:
                continue
            thing = rng.choice(things)
            other = rng.choice(others) if action == "give" else ""
            place[thing] = {"get": person, "drop": here, "give": other}[action]
        there = {"get": task.there, "drop": 0.2}.get(action)    # how often it ends so
        there = " there" if there and rng.random() < there else ""
        text = rng.choice(SENTENCES[action])
        return Fact(action, person, thing, other, text.format(
            person=person, thing=thing, other=other, there=there))


# --------------------------------------------------------------------------------------------
# The tasks: `ask_*` gives the `Question` about statement i of a story, or None if there is none

def latest(facts, actions, **what):
    """Index of the last fact whose action and fields are these; None if there is none."""
    for i in range(len(facts) - 1, -1, -1):
        if facts[i].action in actions and all(getattr(facts[i], k) == v for k, v in what.items()):
            return i


def ask_person(facts, i, rng):
    """Where is P? Where the last move took him."""
    if facts[i].action in MOVES:
        move = latest(facts, MOVES, person=facts[i].person)
        return Question(f"Where is {facts[i].person}?", facts[move].thing, (move,))


def last_touch(facts, i):
    """Whether statement i is the last get, drop or give of its object."""
    return facts[i].action in TOUCHES and latest(facts, TOUCHES, thing=facts[i].thing) == i


def ask_object(facts, i, rng):
    """Where is the O? Where its holder went after the get, or was when he dropped it."""
    if last_touch(facts, i):
        dropped = facts[i].action == "drop"
        move = latest(facts[:i] if dropped else facts, MOVES, person=facts[i].person)
        if move is not None and (dropped or move > i):
            return Question(f"Where is the {facts[i].thing}?", facts[move].thing, (i, move))


def ask_before(facts, i, rng):
    """Where was the O before the L? Where its holder, carrying it, was before he came to L."""
    if last_touch(facts, i):
        person, thing = facts[i].person, facts[i].thing
        got = latest(facts[:i + 1], ("get",), person=person, thing=thing)
        moves = [m for m in range(got, i if facts[i].action == "drop" else len(facts))
                 if facts[m].action == "move" and facts[m].person == person]
        if len(moves) >= 2:
            place = facts[rng.choice(moves[1:])].thing
            k = max(k for k in range(len(moves)) if facts[moves[k]].thing == place)
            return Question(f"Where was the {thing} before the {place}?",
                            facts[moves[k - 1]].thing, (i, moves[k], moves[k - 1]))


def ask_person_before(facts, i, rng):
    """Where was P before the L? A step on the way to `ask_before`, and no bAbI task."""
    if facts[i].action == "move":
        person, place = facts[i].person, facts[i].thing
        came = latest(facts, ("move",), person=person, thing=place)
        before = latest(facts[:came], ("move",), person=person)
        if before is not None:
            return Question(f"Where was {person} before the {place}?", facts[before].thing,
                            (came, before))


def ask_relation(facts, i, rng):
    """What is D of the B? What is the A D of? Each of the three places is the answer as often."""
    fact = facts[i]
    a, b = fact.person, fact.thing
    middle, end = (a, b) if a in (facts[1 - i].person, facts[1 - i].thing) else (b, a)
    asked, answer = (end, middle) if rng.random() < 1 / 3 else (middle, end)
    direction = fact.other if asked == a else OPPOSITE[fact.other]
    return Question(rng.choice((f"What is the {asked} {direction} of?",
                                f"What is {OPPOSITE[direction]} of the {asked}?")), answer, (i,))


def ask_gift(facts, i, rng):
    """What did P give to Q? Who gave the O (to Q)? Who received it? The last such gift counts."""
    fact = facts[i]
    if fact.action != "give":
        return None
    p, o, q = fact.person, fact.thing, fact.other
    what = (f"What did {p} give to {q}?", "thing", dict(person=p, other=q))
    text, answer, known = rng.choice((
        what, what, (f"Who gave the {o}?", "person", dict(thing=o)),
        (f"Who gave the {o} to {q}?", "person", dict(thing=o, other=q)),
        (f"Who received the {o}?", "other", dict(thing=o)),
        (f"Who did {p} give the {o} to?", "other", dict(person=p, thing=o))))
    gift = latest(facts, ("give",), **known)
    return Question(text, getattr(facts[gift], answer), (gift,))


def ask_whether(facts, i, rng, places=PLACES):
    """Is P in the L? Yes, no or maybe; every other time L is where the last statement put him."""
    if facts[i].action in MOVES:
        move = latest(facts, MOVES, person=facts[i].person)
        fact = facts[move]
        told = (fact.thing, fact.other or fact.thing)
        place = rng.choice(told)
        if fact.action != "not" and rng.random() < 0.5:
            place = rng.choice([p for p in places if p != place])
        answer = {"not": "no", "either": "maybe"}.get(fact.action, "yes")
        return Question(f"Is {fact.person} in the {place}?", answer if place in told else "no",
                        (move,))


def ask_carried(facts, i, rng, number=False):
    """What is P carrying, in the order of his first-ever pick-ups? Or: how many objects?"""
    if facts[i].action in TOUCHES:
        person, holds, support = facts[i].person, {}, []
        for k, fact in enumerate(facts):
            if fact.action in TOUCHES and person in (fact.person, fact.other):
                holds[fact.thing] = fact.action == "get" or fact.other == person
                support.append(k)
        things = [thing for thing in holds if holds[thing]]
        text, answer = (f"How many objects is {person} carrying?", NUMBERS[len(things)]) \
            if number else (f"What is {person} carrying?", ",".join(things) or "nothing")
        return Question(text, answer, tuple(support))


@dataclass(frozen=True)
class Task:
    """A bAbI task: what is asked, what may happen (each as likely), and in which world."""
    ask: Callable
    actions: tuple
    examples: tuple             # a question of every form
    people: tuple = PEOPLE
    places: tuple = PLACES
    there: float = 1.0          # how often a "get" ends in "there"
    n_answers: int = 6          # how many different answers there are
    along: tuple = ()           # QUESTIONS on the way to it, asked along with it in training


HANDLE = ("move", "get", "drop")
TASKS = {
    "qa1": Task(ask_person, ("move",), ("Where is Mary?",)),
    "qa2": Task(ask_object, HANDLE, ("Where is the milk?",), along=("qa1",)),
    "qa3": Task(ask_before, HANDLE, ("Where was the milk before the office?",), there=0.2,
                along=("qa1", "qa2", "before")),
    "qa4": Task(ask_relation, ("relation",), ("What is north of the office?",
                                              "What is the office north of?"), people=()),
    "qa5": Task(ask_gift, HANDLE + 4 * ("give",),
                ("What did Fred give to Bill?", "Who gave the milk?", "Who gave the milk to Bill?",
                 "Who received the milk?", "Who did Fred give the milk to?"),
                people=GIVERS, n_answers=7),
    "qa6": Task(ask_whether, HANDLE, ("Is Mary in the office?",), n_answers=2),
    "qa7": Task(partial(ask_carried, number=True), HANDLE + 4 * ("give",),
                ("How many objects is Mary carrying?",), n_answers=4),
    "qa8": Task(ask_carried, HANDLE, ("What is Mary carrying?",), n_answers=16),
    "qa9": Task(ask_whether, ("move", "move", "is", "not"), ("Is Mary in the office?",),
                n_answers=2),
    "qa10": Task(partial(ask_whether, places=TOWN), ("move", "move", "is", "either"),
                 ("Is Bill in the park?",), people=GUESSED, places=TOWN,
                 n_answers=3),
}
# what is no task of its own, and is asked along with one
QUESTIONS = TASKS | {
    "before": Task(ask_person_before, HANDLE, ("Where was Mary before the office?",))}


def shape(question, task):
    """The question with P, L, O, D for the task's people, places, objects and directions."""
    world = QUESTIONS[task]
    for kind, names in (("P", world.people), ("L", world.places), ("O", OBJECTS), ("D", OPPOSITE)):
        question = re.sub(rf"\b({'|'.join(names) or '-'})\b", kind, question)
    return question


def parse_tasks(names):
    """"all", or names like "qa1,qa6", as a tuple of tasks. BadInput if there is no such task."""
    chosen = tuple(TASKS) if names == "all" else tuple(dict.fromkeys(names.split(",")))
    for name in chosen:
        if name not in TASKS:
            raise BadInput(f"no task {name!r}; there are {', '.join(TASKS)}, and all")
    return chosen


def relations(rng):
    """The two facts of qa4: three places in a line, told from either side, in any order."""
    line, direction = rng.sample(PLACES, 3), rng.choice(sorted(OPPOSITE))
    facts = []
    for a, b in (line[:2], line[1:]):
        told = (a, b, direction) if rng.random() < 0.5 else (b, a, OPPOSITE[direction])
        facts.append(Fact("relation", *told, "The {0} is {2} of the {1}.".format(*told)))
    rng.shuffle(facts)
    return facts


def askable(task, facts, rng, window=WINDOW):
    """Yields a question about each of the last `window` statements (None: all) that allows one."""
    first = max(0, len(facts) - (window or len(facts)))
    return filter(None, (QUESTIONS[task].ask(facts, i, rng) for i in range(first, len(facts))))


def tell(task, rng, max_facts=1000):
    """A story as bAbI makes it: statements in pairs, and after a pair a question where possible.

    Returns the facts up to one of its five questions, or the first `max_facts` (>= 2) of them.
    """
    if task == "qa4":
        return relations(rng)
    place = {name: rng.choice(TASKS[task].places) for name in TASKS[task].people + OBJECTS}
    facts, asked, wanted = [], 0, rng.randint(1, 5)
    while len(facts) + 2 <= max_facts and asked < wanted:
        facts += [step(TASKS[task], place, rng), step(TASKS[task], place, rng)]
        asked += any(askable(task, facts, rng))
    return facts


def make_sample(task, rng, n_questions=1, max_facts=1000, window=WINDOW, asides=0.0):
    """A `Sample`, whose questions are about the last `window` statements: bAbI's rule; None: any.

    Several include questions of the tasks `along` the way, about anything in the story: who
    follows an object, for one, must follow its holder first. In such stories the task's own
    questions are few; these are asked by the way as well, behind a share of up to `asides` of the
    facts (a question's `support` does not count them).
    """
    questions = []
    while not questions:
        facts = tell(task, rng, max_facts)
        questions = list(askable(task, facts, rng, window))
    if n_questions == 1:
        questions = [rng.choice(questions)]
    else:
        questions = rng.sample(questions, len(questions))
        along = [q for t in TASKS[task].along for q in askable(t, facts, rng, window=None)]
        if along:  # half of the questions are the task's own
            del questions[(n_questions + 1) // 2:]
            questions += rng.sample(along, len(along))
        questions = list({question.text: question for question in questions}.values())
        questions = rng.sample(questions[:n_questions], len(questions[:n_questions]))
    share = rng.uniform(0.0, asides) if asides and TASKS[task].along else 0.0
    told, answers = [], {}
    for i, fact in enumerate(facts, 1):
        told.append(fact.text)
        asked = share and rng.random() < share and [*askable(task, facts[:i], rng, window)]
        if asked:
            question = rng.choice(asked)
            answers[len(told)] = question.answer
            told.append(question.text)
    return Sample(tuple(told), tuple(questions), answers)


# --------------------------------------------------------------------------------------------
# Texts, and the real files

def text_pieces(file, name, inside=False, size=2**16):
    """Yields the text of a binary file from where it stands, and holds one piece of it at a time.

    Pieces end before a space or a line's end, so that no word is torn. A byte order mark is left out, and so is, `inside` of a text, the
    rest of a character that was cut; line ends become "\\n". Raises BadInput where the text is not UTF-8.
    """
    decoder = codecs.getincrementaldecoder("utf-8" if inside else "utf-8-sig")()
    decode = io.IncrementalNewlineDecoder(decoder, translate=True).decode
    chunk, rest = file.read(size), ""
    if inside:
        chunk = re.sub(rb"\A[\x80-\xbf]{1,3}", b"", chunk)
    elif chunk[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in chunk[:2]:
        raise BadInput(f"{name} is a text in UTF-16; convert it first: iconv -f UTF-16 -t UTF-8")
    try:
        while chunk:
            rest += decode(chunk)
            cut = max(rest.rfind(" "), rest.rfind("\n"), 0) if len(rest) < 2**20 else len(rest)
            yield rest[:cut]
            rest, chunk = rest[cut:], file.read(size)
        yield rest + decode(b"", final=True)
    except UnicodeDecodeError:
        raise BadInput(f"{name} is not a text in UTF-8; convert it first, if it is in Latin-1 by "
                       "iconv -f LATIN1 -t UTF-8") from None


def read_text(path):
    """A whole text, see `text_pieces`."""
    with open(path, "rb") as file:
        return "".join(text_pieces(file, path))


SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"'”’)]))\s+(?=[\"'“‘(]*[A-Z0-9])")


def read_sentences(path, start=0, size=2**12):
    """Yields the sentences of a text from byte `start` on, see `text_pieces`.

    A sentence ends at . ! or ? before a space and what may begin another one. The last is left
    out, as it may have no end, and with a `start` the first, as it may have begun before.
    """
    rest, first = "", start > 0
    with open(path, "rb") as file:
        file.seek(start)
        for piece in text_pieces(file, path, start > 0, size):
            *done, rest = SENTENCE_END.split(rest + piece)
            if len(rest) > 4 * size:  # no sentence is that long
                done, rest = [*done, rest], ""
            yield from (" ".join(sentence.split()) for sentence in done[first:])
            first = first and not done


def read_babi(path):
    """Samples of a bAbI file: for each question the statements before it, other questions dropped.

    Raises BadInput with the line's number where the file is not in bAbI's format.
    """
    samples, facts, line_ids = [], [], {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        match = re.fullmatch(r"(\d+) ([^\t\w]*\w[^\t]*)(?:\t([^\t]+)\t([\d ]*))?", line)
        line_id, text, answer, support = match.groups() if match else ("", "", "", "no")
        if line_id == "1":
            facts, line_ids = [], {}
        if answer is None:
            line_ids[line_id] = len(facts)
            facts.append(text.strip())
        elif facts and line_ids.keys() >= {*support.split()}:
            needed = tuple(line_ids[line_id] for line_id in support.split())
            samples.append(Sample(tuple(facts), (Question(text.strip(), answer, needed),)))
        else:
            raise BadInput(f"{path}, line {number}: neither 'ID fact' nor 'ID question<tab>answer"
                           "<tab>IDs of earlier facts', as lines of a bAbI file are")
    if not samples:
        raise BadInput(f"{path}: no question in this file")
    return samples


def find_babi(folder, task):
    """The path of the task's file in `folder`, the test file first. BadInput if there is none."""
    names = [name for name in os.listdir(folder) if re.fullmatch(rf"{task}_.*\.txt", name)]
    if not names:
        raise BadInput(f"no file {task}_*.txt in {folder}")
    return os.path.join(folder, min(names, key=lambda name: ("_test" not in name, name)))


# --------------------------------------------------------------------------------------------
# The haystack: sentences that share no name, place or object with the tasks

NOISE = {
    "adjective": "old young tall quiet busy tired clever hungry gentle lonely brave pale proud "
                 "silent famous lucky".split(),
    "noun": "sailor farmer teacher doctor baker painter soldier miller king fox horse clock ship "
            "train river storm lantern shepherd captain widow".split(),
    "verb": "waited slept walked sang returned stood rested worked vanished turned wandered stayed "
            "laughed moved went travelled".split(),
    "preposition": "near behind under beyond beside towards across to".split(),
    "scene": "harbour forest bridge mountain castle village church market meadow tower valley "
             "lighthouse station island cellar road".split(),
    "ending": ("at dawn", "in winter", "after dark", "for hours", "again", "before the rain",
               "at noon", "without a word"),
}
UNKNOWN = 0.4  # share of noise sentences of words nobody knows
COMMON = "the a of he there yes no maybe went had and to in was it his her that with not".split()
LETTERS = "etaoinshrdlucmfwypvbgkqjxz"
LETTER_WEIGHTS = (12, 9, 8, 8, 7, 7, 6, 6, 6, 4, 4, 3, 3, 2.5, 2.3, 2.2, 2, 2, 1, 1.5, 2,
                  0.8, 0.3, 0.3, 0.3, 0.3)


def noise_sentence(rng):
    """A sentence like "The old sailor waited near the harbour at dawn." """
    words = {kind: rng.choice(choices) for kind, choices in NOISE.items()}
    end = " {ending}" if rng.random() < 0.4 else ""
    return ("The {adjective} {noun} {verb} {preposition} the {scene}" + end + ".").format(**words)


def unknown_sentence(rng):
    """Words nobody knows among a few common ones, as a real book is to a small vocabulary.

    A model that saw known words alone is lost in a book, which to it is mostly bytes.
    """
    words = []
    for _ in range(rng.randint(3, 16)):
        word = rng.choice(COMMON) if rng.random() < 0.5 else \
            "".join(rng.choices(LETTERS, LETTER_WEIGHTS, k=rng.randint(2, 9)))
        kind = rng.random()
        if kind < 0.08:
            word = word.capitalize()
        elif kind < 0.11:
            word = str(rng.randrange(2000))
        elif kind < 0.2:
            word += rng.choice(",;:")
        elif kind < 0.25:
            word = rng.choice(("'", '"', "“", "--")) + word
        words.append(word)
    words[0] = words[0].capitalize()
    return " ".join(words) + rng.choice((".", ".", ".", "!", "?", '."'))


def make_noise(encoding, seed, n_sentences=20000):
    """A 'book' of noise made by a grammar. Another seed gives another book.

    Returns a function of a `random.Random` that yields tokenised sentences without end, in
    natural order from a random one on.
    """
    rng, book = random.Random(f"noise {seed}"), []
    for _ in range(n_sentences):
        sentence = unknown_sentence if rng.random() < UNKNOWN else noise_sentence
        book.append(encoding.encode_ordinary(" " + sentence(rng)))
    return lambda rng: (book[i % len(book)] for i in itertools.count(rng.randrange(len(book))))


WORD = r"(?<![^\W_])(?:%s)(?![^\W_])"   # one of its own, as in "_Mary_" or "Mary's"
PERSON = "|".join(PEOPLE + GIVERS + GUESSED)
ROOM = WORD % f"(?i:(?:{'|'.join(PLACES + TOWN)})s?)"
FACTLIKE = re.compile(WORD % f"{PERSON}|{PERSON.upper()}" + f"|{ROOM}.*{ROOM}")


def book_noise(encoding, paths, shortest=10):
    """The haystack of BABILong: sentences of one or several texts, see `make_noise`.

    They come in natural order from a random place of a random text, and from another place when
    it ends. Sentences of fewer than `shortest` tokens are left out, and so are those which a
    reader could take for facts: they name one of the people, or two of the places.
    Raises OSError or BadInput if a text cannot be used.
    """
    def usable(path, start=0):
        for sentence in read_sentences(path, start):
            if not FACTLIKE.search(sentence):
                tokens = encoding.encode_ordinary(f" {sentence}")
                if len(tokens) >= shortest:
                    yield tokens

    for path in paths:
        found = len(list(itertools.islice(usable(path), 100)))
        if found < 100:
            raise BadInput(f"{path} has {found} sentences that can be noise, and must have 100: "
                           "use a longer text")

    def sentences(rng):
        while True:
            path = rng.choice(paths)
            yield from usable(path, rng.randrange(os.path.getsize(path)))
    return sentences


def load_noise(names, encoding, seed):
    """The noise that `--noise=a.txt,b.txt` names, the built-in one if it names none."""
    paths = [name for name in names.split(",") if name]
    return book_noise(encoding, paths) if paths else make_noise(encoding, seed)


class TooLong(BadInput):
    """Facts and questions that do not fit where they should."""


def cut_noise(length, noise, rng):
    """`length` tokens of noise in natural order from a random sentence on, as a list of sentences,
    the last of which is cut to fit."""
    sentences, book = [], noise(rng) if length > 0 else ()
    while length > 0:
        sentences.append(next(book)[:length])
        length -= len(sentences[-1])
    return sentences


def hide_facts(sample, encoding, length=0, noise=None, rng=None, facts_in=(0.0, 1.0)):
    """A sample's context, as BABILong makes it: `length` tokens with the questions and answers.

    Facts keep their order, never split a sentence of noise and lie within the part `facts_in` of
    the context. Without a length there is no noise (BABILong's 0K).
    Returns pieces in order: (number of the fact, its tokens), or (None, tokens) of noise.
    Raises TooLong if the facts do not fit there.
    """
    facts = [(i, encode(encoding, f" {fact}")) for i, fact in enumerate(sample.facts)]
    if not length:
        return facts
    n_facts = sum(len(tokens) for _, tokens in facts)
    length -= len(encode_questions(sample, encoding)[0])
    low, high = (round(part * length, 6) for part in facts_in)  # 0.7 * 10 is 7 and no bit more
    pieces = [(None, tokens) for tokens in cut_noise(length - n_facts, noise, rng)]
    offsets = itertools.accumulate((len(tokens) for _, tokens in pieces), initial=0)
    gaps = [gap for gap, offset in enumerate(offsets) if low <= offset <= high - n_facts]
    if not gaps:
        raise TooLong(f"{n_facts} tokens of facts do not fit between sentences of the part "
                      f"{facts_in[0]:g} to {facts_in[1]:g} of {length} tokens of context; use a "
                      "larger --length")
    places = sorted(rng.choices(gaps, k=len(facts)))
    for place, fact in zip(reversed(places), reversed(facts)):  # from the end: gaps stay in place
        pieces.insert(place, fact)
    return pieces


# --------------------------------------------------------------------------------------------
# The tokenizer

PATTERN = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+"


def word_encoding(texts=(), most=2000):
    """The built-in tokenizer: 256 bytes and, as one token each, every word the generator says.

    The `most` frequent words behind a space in some texts (any iterable of strings) join them, and
    a quarter as many pieces of up to four letters that their other words are made of. tiktoken
    looks a whole word up before it merges bytes, so a listed word is one token and any other text
    falls back to pieces and bytes: encoding and decoding give the text back exactly.
    """
    counts = Counter(word for text in texts for word in re.findall(r"(?<= )[A-Za-z]+", text))
    phrases = [*PEOPLE, *GIVERS, *GUESSED, *PLACES, *TOWN, *OBJECTS, *OPPOSITE, *NUMBERS]
    phrases += ["there The the Is Where was yes no maybe nothing"]
    phrases += [p for choices in (*NOISE.values(), *SENTENCES.values()) for p in choices]
    phrases += [example for task in TASKS.values() for example in task.examples]
    words = {word for phrase in phrases for word in re.findall(r"(?<![{\w])[A-Za-z]+", phrase)}
    words = dict.fromkeys(sorted(words) + [word for word, _ in counts.most_common(most)])
    pieces = Counter()
    for word, count in counts.items():
        if word not in words:
            for size in (2, 3, 4):
                for i in range(len(word) + 2 - size):
                    pieces[f" {word}"[i:i + size]] += count
    words = [*(f" {word}" for word in words), *OBJECTS,     # in a list objects follow a comma
             *(piece for piece, _ in pieces.most_common(most // 4))]
    return make_encoding([bytes([b]) for b in range(256)] +
                         [word.encode() for word in dict.fromkeys(words)], PATTERN)


def load_encoding(name, texts=()):
    """"words" (built in), or a name tiktoken knows ("gpt2": it downloads once).

    Raises BadInput if there is no such tokenizer or it cannot be had.
    """
    if name == "words":
        return word_encoding(texts)
    try:
        known = tiktoken.get_encoding(name)
    except Exception as error:  # there is no such name, or whatever the network throws
        raise BadInput(f"--tokenizer={name} cannot be had ({type(error).__name__}); use words, or "
                       f"with a network {', '.join(tiktoken.list_encoding_names())}") from None
    # without special tokens, and numbered without holes
    return make_encoding(sorted(known._mergeable_ranks, key=known._mergeable_ranks.get),
                         known._pat_str)


# --------------------------------------------------------------------------------------------
# From samples to tokens, and the curriculum

@lru_cache(maxsize=2**16)
def encode(encoding, text):
    """The tokens of a short text that comes again and again (facts, questions, answers)."""
    return tuple(encoding.encode_ordinary(text))


def encode_questions(sample, encoding):
    """(tokens, answers): all questions with their answers, and the same with -1 where nothing is
    scored. An answer has a space before and a full stop behind."""
    tokens, answers = [], []
    for question in sample.questions:
        asked = encode(encoding, f" {question.text}")
        answer = encode(encoding, f" {question.answer}.")
        tokens += asked + answer
        answers += (-1,) * len(asked) + answer
    return tokens, answers


def to_tokens(sample, encoding, length=0, noise=None, rng=None, facts_in=(0.0, 1.0), behind=0):
    """(tokens, targets) of one sample: context, then questions with their answers.

    `targets` holds the next token where it belongs to an answer, -1 everywhere else; behind a
    question by the way it holds the first token of the answer that would follow. With a
    `length` the facts are hidden in noise, see `hide_facts`, and there are exactly `length` tokens
    in all, the last `behind` of them noise behind the questions. Raises TooLong if nothing fits.
    """
    questions, answers = encode_questions(sample, encoding)
    context = hide_facts(sample, encoding, length and length - behind, noise, rng, facts_in)
    tokens, targets = [], []
    for i, piece in context:
        tokens += piece
        targets += [-1] * len(piece)
        if i in sample.asides:
            targets[-1] = encode(encoding, f" {sample.asides[i]}.")[0]
    rest = [token for piece in cut_noise(behind, noise, rng) for token in piece]
    return tokens + questions + rest, targets + answers[1:] + [-1] * (behind + 1)


def stack(pairs):
    """Lists of (tokens, targets), all of one length T, as two int64 tensors (B, T)."""
    return tuple(torch.from_numpy(np.array(rows, np.int64)) for rows in zip(*pairs))


def rows_of(length, flags, processes=1):
    """How many contexts of so many tokens are in a batch; each process has as many."""
    return max(1, min(flags.batch_size, flags.batch_tokens // length) // processes) * processes


class Curriculum:
    """What each training step shows: short contexts first, and long ones for who is ready.

    Lengths are counted in units of 64 tokens, a segment of the default model. `stage` is, for each
    task, how many units its longest contexts have, and `running` the mean of its accuracy. A task
    begins with one unit, where no memory is needed. When it has come `threshold` of the way from
    chance to all right, its stage grows by half and the mean begins anew. The more of a task's
    answers are wrong, the more rows it gets.

    All contexts of a step are of one length, in noise 1 to 8 units or a multiple of 8: few shapes,
    as a device prepares itself for each. Batches are a function of the seed, the step, `stage` and
    `running`: a resumed run sees the same. `flags` are train.py's.
    Raises BadInput where the stories of a task do not fit into a unit.
    """
    UNIT = 64       # tokens
    BARE = 0.4      # of a mixture's steps, those that show bare stories
    LONG = 0.3      # of the others, those with DENSE units or more, when a stage allows more
    DENSE = 4       # so many units are still dense with facts
    SPREAD = 0.5    # of rows in noise, those whose facts lie anywhere; else in the first part alone
    BEHIND = 0.7    # of the same, those that end in noise: questions end anywhere, as in life

    def __init__(self, tasks, encoding, noise, flags, processes=1):
        self.tasks, self.encoding, self.noise, self.flags = tasks, encoding, noise, flags
        self.stage, self.running = dict.fromkeys(tasks, 1), dict.fromkeys(tasks, 0.0)
        self.processes = processes      # each of them gets as many rows
        for task in tasks:  # found now, not when training is under way
            rng = random.Random(f"{flags.seed} {task}")
            if not any(self.draw(rng, [task])[2] <= self.UNIT for _ in range(50)):
                raise BadInput(f"--questions={flags.questions}: the stories of {task} do not fit "
                               f"with so many into {self.UNIT} tokens, where training begins")

    def batch(self, step):
        """tokens (B, T), targets (B, T), -1 where nothing is scored, and each row's task (B,), as
        its number in `tasks`; all int64."""
        rng = random.Random(f"{self.flags.seed} {step}")
        bare = len(self.tasks) > 1 and rng.random() < self.BARE
        tasks, pairs = zip(*(self.bare_rows if bare else self.noisy_rows)(rng))
        return *stack(pairs), torch.tensor([self.tasks.index(task) for task in tasks])

    def noisy_rows(self, rng):
        """[(task, (tokens, targets))] of stories in noise, as long as one task's stage allows.

        The bank must hold facts for long where they are few, or lie in the first part alone.
        """
        stage = self.stage[rng.choice(self.tasks)]
        units = rng.randint(min(2, stage), min(stage, self.DENSE))
        if stage > self.DENSE and rng.random() < self.LONG:
            units = rng.randint(self.DENSE, stage)
        units -= units % 8 if units > 8 else 0
        length = units * self.UNIT
        ready = [task for task in self.tasks if self.stage[task] >= units]
        rows = []
        while len(rows) < rows_of(length, self.flags, self.processes):
            task, sample, least = self.draw(rng, ready, max(4, length // 8))
            until = 1.0 if rng.random() < self.SPREAD else rng.uniform(0.4, 1.0)
            spare = min(self.UNIT - 1, length - least)
            behind = rng.randint(0, spare) if spare > 0 and rng.random() < self.BEHIND else 0
            with contextlib.suppress(TooLong):  # the next story may fit; __init__ saw some that do
                rows.append((task, to_tokens(sample, self.encoding, length, self.noise, rng,
                                             (0.0, until), behind)))
        return rows

    def bare_rows(self, rng):
        """[(task, (tokens, targets))] as at 0K, which a mixture does not learn along: whole stories
        of all tasks, each about as long as the next, with noise behind, where it hides nothing."""
        drawn = [self.draw(rng, self.tasks) for _ in range(3 * self.flags.batch_size)]
        drawn.sort(key=lambda story: story[2])
        end = rng.randint(self.flags.batch_size, len(drawn))
        length = -(-drawn[end - 1][2] // self.UNIT) * self.UNIT     # that of the longest
        n_rows = rows_of(length, self.flags, self.processes)
        return [(task, to_tokens(sample, self.encoding, length, self.noise, rng,
                                 behind=length - least))
                for task, sample, least in drawn[end - n_rows:end]]

    def draw(self, rng, tasks, most=1000):
        """(a task; a `Sample` of at most so many facts, few in the first stages; its tokens)."""
        # by what it gets wrong; half of its questions may be easier ones, on the way to it
        task = rng.choices(tasks, [0.05 + (1 - self.running[task]) * (2 if TASKS[task].along else 1)
                                   for task in tasks])[0]
        if self.stage[task] < 4:
            most = min(most, 4 * max(1, self.stage[task] - 1))
        window = rng.choice((WINDOW, None))  # bAbI's own rule, or about anything
        sample = make_sample(task, rng, self.flags.questions, most, window, self.flags.asides)
        return task, sample, len(to_tokens(sample, self.encoding)[0])

    def note(self, step, right, asked, rows):
        """Note how many answers were right in a step, how many were asked, and how many rows there
        were, {task: count} each; tasks that are ready go on to longer contexts."""
        for task in filter(asked.get, self.tasks):
            # a mean of about the last 33 steps, of a mixture's more as it has fewer of the rows
            weight = min(0.1, 0.03 * len(self.tasks) * rows[task] / sum(rows.values()))
            self.running[task] += weight * (right[task] / asked[task] - self.running[task])
            chance, stage = 1 / TASKS[task].n_answers, self.stage[task]
            most = self.flags.context // self.UNIT
            # a hard task moves on at last
            bar = self.flags.threshold * (1 - step / self.flags.steps / 3)
            if self.running[task] - chance > bar * (1 - chance) and stage < most:
                self.stage[task] = min(most, stage + max(1, stage // 2))
                self.running[task] = 0.0


# --------------------------------------------------------------------------------------------
# The scores

def hits(logits, targets):
    """(B,) bool: every answer of the row exactly right. logits (B, K, vocab), targets (B, K).

    All tokens of an answer being the most likely ones, given those before, is the same as greedy
    generation saying exactly this answer: an exact match.
    """
    return ((logits.argmax(-1) == targets) | (targets < 0)).all(dim=1)


@torch.no_grad()
def answered(model, tokens, targets):
    """(B,) bool: which rows (B, T) the model answers right."""
    last = tokens.size(1) - int((targets >= 0).any(dim=0).nonzero()[0])  # these hold all answers
    if not model.n_banks:  # without a memory it is shown all that its window can hold
        tokens = tokens[:, -max(model.config.block_size, last):]
    logits = model(tokens.to(model.device), last=last)[0]               # (B, last, vocab)
    return hits(logits.cpu(), targets[:, -last:])


@torch.no_grad()
def answered_by_bank(model, tokens, targets):
    """The proof that the memory does it: which rows (B, T) are answered right with the bank

    "memory" as it is; "wiped" at every segment, so that only the last segment is seen; "swapped"
    with the previous row's just before the last segment. The question must lie in the last segment.
    Returns a dictionary of three (B,) bool.
    """
    border = (tokens.size(1) - 1) // model.config.block_size * model.config.block_size
    tokens, targets = tokens.to(model.device), targets[:, border:]
    fresh = model.fresh_memory(len(tokens))
    memory = model.hidden_states(tokens[:, :border], last=1)[1] if border else fresh
    banks = {"memory": memory.banks, "wiped": fresh.banks,
             "swapped": memory.banks.roll(1, dims=0)}
    return {name: hits(model(tokens[:, border:], memory=memory._replace(banks=bank))[0].cpu(),
                       targets) for name, bank in banks.items()}


def shortcuts(task, samples):
    """Accuracies without any understanding on these very samples (one question each).

    "chance"          a uniform guess among the task's answers
    "best constant"   the commonest answer always
    "last mentioned"  of what could be the answer, that which the facts name last; to "Is P in the
                      L?" yes if L is the place named last; to "How many?" one
    """
    answers = [sample.questions[0].answer for sample in samples] or [""]
    right, n = 0, len(samples) or float("nan")
    for sample, answer in zip(samples, answers):
        words = re.findall(r"\w+", " ".join(sample.facts))[::-1]
        asked = re.findall(r"\w+", sample.questions[0].text)
        names = {"What": OBJECTS, "Who": GIVERS}.get(asked[0], PLACES + TOWN)
        names = PLACES if task == "qa4" else names
        last = next((word for word in words if word in names
                     and (word not in asked or asked[0] == "Is")), "")
        guess = {"Is": "yes" if last == asked[-1] else "no", "How": "one"}.get(asked[0], last)
        right += guess == answer
    return {"chance": 1 / TASKS[task].n_answers,
            "best constant": max(map(answers.count, set(answers))) / n,
            "last mentioned": right / n}


def bm25(sentences, question, k1=1.5, b=0.75):
    """How well each sentence fits the question: Okapi BM25 (Robertson et al. 1994)."""
    bags = [Counter(re.findall(r"\w+", sentence.lower())) for sentence in sentences]
    mean = sum(bag.total() for bag in bags) / len(bags) or 1.0  # there may be no word at all
    scores = [0.0] * len(bags)
    for word in set(re.findall(r"\w+", question.lower())):
        n = sum(word in bag for bag in bags)
        rare = math.log(1 + (len(bags) - n + 0.5) / (n + 0.5))
        for i, bag in enumerate(bags):
            length = 1 - b + b * bag.total() / mean
            scores[i] += rare * bag[word] * (k1 + 1) / (bag[word] + k1 * length)
    return scores


def retrieve(sentences, sample, n_best):
    """The sample, told by those n of its context's sentences that fit its question best.

    They keep their order; of equals the latest are taken.
    """
    scores = bm25(sentences, sample.questions[0].text)
    best = sorted(range(len(scores)), key=lambda i: (scores[i], i))[-n_best:]
    return Sample(tuple(sentences[i] for i in sorted(best)), sample.questions)


def score(model, encoding, samples, length, noise, rng, n_best=0, most=2**17):
    """[(sample, right)] for those samples of one question each that fit into `length` tokens.

    Length 0 is the bare story without noise. With `n_best` the model is shown so many sentences,
    see `retrieve`, and no more. Long contexts come in small batches, so that one of 128k tokens
    needs no more memory than 32 of 4k.
    """
    if not length:  # rows of a batch are as long as one another
        samples = sorted(samples, key=lambda s: len(to_tokens(s, encoding)[0]))

    def told():
        for sample in samples:
            with contextlib.suppress(TooLong):  # BABILong leaves such samples out as well
                if n_best:
                    pieces = hide_facts(sample, encoding, length, noise, rng)
                    sentences = [encoding.decode(tokens).strip() for _, tokens in pieces]
                    found = retrieve([s for s in sentences if s], sample, n_best)
                    yield sample, to_tokens(found, encoding)
                else:
                    yield sample, to_tokens(sample, encoding, length, noise, rng)

    scored = []
    for size, rows in itertools.groupby(told(), lambda row: len(row[1][0])):
        while batch := list(itertools.islice(rows, max(1, most // size))):
            right = answered(model, *stack([pair for _, pair in batch])).tolist()
            scored += zip([sample for sample, _ in batch], right)
    return scored


def shorten(length):
    """1024 as "1k"."""
    return f"{length // 1024}k" if length % 1024 == 0 and length else str(length)


def score_table(model, encoding, samples, lengths, noise, seed=0, n_best=0):
    """Print accuracies, tasks by lengths, and under them the shortcuts; returns the cells.

    samples  {task: list of samples of one question each}
    lengths  {tokens (0: no noise): how many of the samples to take}
    n_best   0, or how many sentences BM25 picks for the model, see `retrieve`
    Cells are dictionaries, one for each task and length.
    Raises BadInput where no sample fits into a length.
    """
    cells, notes = {}, []
    print("\nexact match ± standard error")
    print("length  " + "".join(f"{shorten(length):>14}" for length in lengths))
    print("samples " + "".join(f"{count:14}" for count in lengths.values()), flush=True)
    for task in samples:
        print(f"{task:8}", end="", flush=True)
        for length, count in lengths.items():
            rng, chosen = random.Random(f"score {seed} {task} {length}"), samples[task][:count]
            scored = score(model, encoding, chosen, length, noise, rng, n_best)
            if not scored:
                raise BadInput(f"--lengths: {length} tokens are too few for the facts of {task}")
            n, accuracy = len(scored), sum(right for _, right in scored) / len(scored)
            error = (accuracy * (1 - accuracy) / n) ** 0.5
            cells[task, length] = {"task": task, "tokens": length, "samples": n,
                                   "accuracy": accuracy, "standard_error": error,
                                   **shortcuts(task, [sample for sample, _ in scored])}
            if n < count:
                notes.append(f"{task} at {shorten(length)}: {n} samples"
                             + " (longer stories do not fit)" * (n < len(chosen)))
            print(f"  {accuracy:.3f} ±{error:.3f}", end="", flush=True)
        print()
    means = [sum(cells[task, length]["accuracy"] for task in samples) / len(samples)
             for length in lengths]
    print("mean    " + "".join(f"  {mean:.3f}       " for mean in means))
    print("\n".join(notes))
    print("what shortcuts reach: best constant / last mentioned")
    for task in samples:
        print(f"{task:8}" + "".join(f"  {cell['best constant']:.3f} /{cell['last mentioned']:.3f}"
                                    for cell in (cells[task, length] for length in lengths)))
    return list(cells.values())


def proof_table(model, encoding, tasks, lengths, noise, seed=0):
    """Print and return the proof: answers with the bank, with it wiped and with one swapped.

    The facts lie in the first half of the context. lengths is {tokens: number of samples}; stories
    that do not fit there are left out. Rows are dictionaries, one for each task and length.
    """
    print("\nThe proof: facts in the first half of the context only, question in the last segment")
    columns = ("task", "tokens", "samples", "memory", "wiped", "swapped", "chance",
               "best constant", "last mentioned")
    widths, table = [max(8, len(name) + 2) for name in columns], []
    print("".join(f"{name:>{width}}" for name, width in zip(columns, widths)))
    for task in tasks:
        rng = random.Random(f"proof {seed}")
        samples = [make_sample(task, rng) for _ in range(max(lengths.values()))]
        for length, count in lengths.items():
            rng, fit = random.Random(f"proof {seed} {length}"), []
            for sample in samples[:count]:
                with contextlib.suppress(TooLong):
                    fit.append((sample, to_tokens(sample, encoding, length, noise, rng, (0, 0.5))))
            right = Counter()
            size = 50 + (len(fit) % 50 == 1)  # one alone has nobody to swap banks with
            for i in range(0, len(fit), size):
                found = answered_by_bank(model, *stack([pair for _, pair in fit[i:i + size]]))
                right.update({bank: int(hit.sum()) for bank, hit in found.items()})
            row = {"task": task, "tokens": length, "samples": len(fit)} | {
                bank: right[bank] / len(fit) if len(fit) > (bank == "swapped") else math.nan
                for bank in ("memory", "wiped", "swapped")}     # one alone has no other's bank
            table.append(row | shortcuts(task, [sample for sample, _ in fit]))
            cells = ["-" if v != v else f"{v:.3f}" if isinstance(v, float) else str(v)
                     for v in table[-1].values()]
            print("".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)), flush=True)
    return table


def samples_of(task, count, folder="", seed=0):
    """`count` samples of one question each: new ones, or in any order those of the real file."""
    rng = random.Random(f"score {seed} {task}")
    if not folder:
        return [make_sample(task, rng) for _ in range(count)]
    samples = read_babi(find_babi(folder, task))
    rng.shuffle(samples)
    return samples[:count]


# --------------------------------------------------------------------------------------------
# What the scripts share: errors, files, devices, and flags that are the fields of a dataclass

def printable(text):
    """Text that came from outside, with its control characters escaped: safe for a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def install_error_hook():
    """A script's first call: bad input ends it with one line and status 2, a bug with a traceback.

    No closed stream, strange character, Ctrl-C or reader that goes away ends it in a traceback.
    """
    def hook(kind, error, trace):
        if kind is BrokenPipeError:
            os._exit(141)  # as a shell reports it; flushing the stream would fail once more
        if kind is KeyboardInterrupt:
            sys.exit(130)
        if issubclass(kind, OSError) and error.strerror:
            error = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        elif not issubclass(kind, BadInput):
            return sys.__excepthook__(kind, error, trace)
        line = printable(error)
        line = line if len(line) < 800 else f"{line[:500]} ... {line[-200:]}"
        print("error:", line, file=sys.stderr)
        sys.exit(2)

    sys.excepthook = hook
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode))
        elif mode == "w" and hasattr(stream, "reconfigure"):  # a notebook's has none
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def replaced(path, mode, **kwargs):
    """A file to write beside `path`, which takes its place when all is written, or never."""
    try:
        with tempfile.TemporaryDirectory(prefix=".", dir=os.path.dirname(path) or ".") as folder:
            with open(os.path.join(folder, "new"), mode, **kwargs) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            for wait in (0.1, 0.4, 1.5, 4, 0):  # seconds
                try:
                    return os.replace(file.name, path)
                except PermissionError:  # on Windows, where a virus scanner may read the old one
                    if not wait:
                        raise
                    time.sleep(wait)
    except (OSError, RuntimeError) as error:    # torch.save's, of a full disk
        why = getattr(error, "strerror", None) or str(error).splitlines()[0]
        why += "; maybe another program has it open" * isinstance(error, PermissionError)
        raise BadInput(f"{path} cannot be written ({why}); what was there before, if anything, "
                       "is whole: make room, and --resume a training") from None


def write_csv(path, rows, columns):
    """Dictionaries as a CSV file, whole or not at all; other keys than `columns` are left out."""
    with replaced(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path, columns):
    """The rows of a CSV file; BadInput if it lacks one of the columns."""
    with contextlib.suppress(csv.Error):
        reader = csv.DictReader(read_text(path).splitlines())
        rows = list(reader)
        if set(columns) <= set(reader.fieldnames or ()):
            return rows
    raise BadInput(f"{path} is not as this script wrote it; move it away")


SHIPPED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "results", "ten-tasks.pt")


def find_checkpoint(path=""):
    """The checkpoint named, or else that of the last training here, or else the one that ships."""
    for found in (path,) if path else (os.path.join("out", "ckpt.pt"), SHIPPED):
        if os.path.isfile(found):
            return found
    raise BadInput(f"no checkpoint {found}; train one first: python train.py")


def find_device(name):
    """A device that computes: the one named, or for "auto" cuda, mps or cpu, whichever does first.

    Raises BadInput, and for "auto" prints, why one that is there does not.
    """
    if not re.fullmatch(r"auto|(cpu|cuda|mps)(:\d{1,3})?", name):
        raise BadInput(f"--device={name}: there are auto, cpu, cuda and mps")
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    for device in [kind for kind in there if there[kind]] if name == "auto" else [name]:
        try:  # a card too old for this PyTorch is there, and fails at its first real work
            x = torch.ones(8, 8, device=device)
            (x @ x).sum().item()
            return device
        except (RuntimeError, AssertionError) as error:
            why = (str(error) or type(error).__name__).strip().splitlines()[0]
        if name != "auto":
            raise BadInput(f"--device={name} cannot be used: {why}")
        print(f"{device} is there but cannot be used: {printable(why)}")


def flag(default, help, least=None, most=10**9, choices=None):
    """A dataclass field that `parse_flags` turns into a command-line flag."""
    return field(default=default, metadata={"help": help, "choices": choices,
                                            "limits": None if least is None else (least, most)})


def new_file(path):
    """A file to write, which must not be there, and can be: nothing is overwritten."""
    if os.path.exists(path):
        raise argparse.ArgumentTypeError(f"{path} is there already; remove it or name another")
    if path:
        open(path, "x").close()
        os.remove(path)
    return path


def token_counts(text):
    """"0,1k,4096" as (0, 1024, 4096)."""
    if not re.fullmatch(r"\d{1,9}k?(,\d{1,9}k?)*", text.lower()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 0,1k,4096")
    return tuple(int(part.replace("k", "")) * 1024 ** ("k" in part)
                 for part in text.lower().split(","))


def parse_flags(defaults, description, argv=None):
    """Read `--name=value` flags into a copy of a dataclass.

    Raises BadInput for flags that are unknown, shortened or outside their limits.
    """
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise BadInput(f"{message} (see {self.prog} --help)")

    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(defaults):
        default = "" if f.default in (None, "", (), False) else f" ({f.default})"
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {
            "type": f.type, "choices": f.metadata["choices"]}
        parser.add_argument(f"--{f.name}", default=getattr(defaults, f.name),
                            help=f.metadata["help"] + default, **kind)
    config = replace(defaults, **vars(parser.parse_args(argv)))
    for f in fields(config):
        value, limits = getattr(config, f.name), f.metadata["limits"]
        if isinstance(value, list):  # how argparse reads --name=--
            raise BadInput(f"--{f.name}: expected one argument")
        if limits and not limits[0] <= value <= limits[1]:
            raise BadInput(f"--{f.name}={value}: it must be a number from {limits[0]:g} to "
                           f"{limits[1]:g}")
    return config


# --------------------------------------------------------------------------------------------
# Print samples or scores

@dataclass
class Flags:
    # samples
    task: str = flag("qa1", "which task to print samples of", choices=tuple(TASKS))
    samples: token_counts = flag((), "how many: of the task (3), or for each of --lengths (100)")
    length: int = flag(128, "tokens in all, question and answer included; 0 = no noise", 0)
    babi_dir: str = flag("", "folder of real bAbI files to take the stories from")
    noise: str = flag("", "texts to hide the facts in, instead of the built-in noise: a.txt,b.txt")
    seed: int = flag(0, "seed of stories, noise and mixing")
    # scores
    score: bool = flag(False, "score out/ckpt.pt, or without one results/ten-tasks.pt, instead")
    ckpt: str = flag("", "score this checkpoint of train.py instead")
    tasks: str = flag("", "tasks to score: qa1,qa2 or all (those it was trained on)")
    lengths: token_counts = flag("0,1k,4k", "tokens of context, 0 = no noise")
    retrieve: int = flag(0, "show the model only so many sentences, those BM25 finds best", 0)
    csv: new_file = flag("", "write the scores to this file, too")
    device: str = flag("auto", "auto, cpu, cuda or mps")


def print_samples(flags):
    rng = random.Random(flags.seed)
    encoding = word_encoding()
    noise = load_noise(flags.noise, encoding, flags.seed)
    samples = samples_of(flags.task, flags.samples[0], flags.babi_dir, flags.seed)
    for number, sample in enumerate(samples, 1):
        question = sample.questions[0]
        pieces = hide_facts(sample, encoding, flags.length, noise, rng)
        n_tokens = len(encode_questions(sample, encoding)[0]) + sum(len(t) for _, t in pieces)
        print(f"--- {flags.task}, sample {number}: {n_tokens} tokens, {len(sample.facts)} facts")
        for fact, tokens in pieces:
            mark = "  " if fact is None else ">>" if fact in question.support else " >"
            if sentence := encoding.decode(tokens).strip():  # one that was cut may have no word
                print(mark, printable(sentence))
        print("  ", printable(f"{question.text}  ->  {question.answer}"))
    print("\n>> supporting fact   > other fact   the rest is noise")


def print_scores(flags):
    path = find_checkpoint(flags.ckpt)
    checkpoint = load_checkpoint(path)
    model, encoding = LM2.load(checkpoint, find_device(flags.device))
    try:
        trained = checkpoint["train"]["flags"]
        names = flags.tasks or ("" if trained["data"] else trained["task"])
    except (KeyError, TypeError):
        names = ""
    if not names:
        raise BadInput(f"{path} was trained on no bAbI task; name the --tasks to score it on")
    tasks = parse_tasks(names)
    counts = flags.samples + (flags.samples[-1],) * len(flags.lengths)
    noise = load_noise(flags.noise, encoding, f"score {flags.seed}")
    samples = {task: samples_of(task, max(flags.samples), flags.babi_dir, flags.seed)
               for task in tasks}
    print(f"{path}: stories {flags.babi_dir or 'generated'}, noise {flags.noise or 'built in'}, "
          f"seed {flags.seed}")
    cells = score_table(model, encoding, samples, dict(zip(flags.lengths, counts)), noise,
                        flags.seed, flags.retrieve)
    if flags.csv:
        write_csv(flags.csv, cells, cells[0])


def main():
    install_error_hook()
    flags = parse_flags(Flags(), __doc__)
    scoring = flags.score or flags.ckpt
    flags.samples = flags.samples or ((100,) if scoring else (3,))
    if min(flags.samples) < 1:
        raise BadInput("--samples must be at least 1")
    return print_scores(flags) if scoring else print_samples(flags)


if __name__ == "__main__":
    main()
