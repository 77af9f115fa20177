"""BABILong in miniature: bAbI stories hidden in noise, made on the fly, and a table of scores.

    python babilong_tiny.py                                  # print samples a person can read
    python babilong_tiny.py --task=qa2 --length=256 --samples=1 --noise=book.txt
    python babilong_tiny.py --babi_dir=tasks_1-20_v1-2/en    # stories from the real bAbI files
    python babilong_tiny.py --stats                          # generated stories beside real ones
    python babilong_tiny.py --ckpt=out/ckpt.pt --tasks=all --lengths=0,1k,4k --noise=book.txt
    python babilong_tiny.py --ckpt=out/ckpt.pt --retrieve=5  # shown five sentences of the context

What is here, in the order of the file
    the world        people, places, objects, and the sentences the released bAbI v1.2 files use
    the tasks        qa1 to qa10: what may happen, and what may be asked about it
    the real files   a reader for bAbI's own text format
    the haystack     noise sentences, or books, and BABILong's way to hide facts among them
    the tokenizer    a tiktoken encoding of whole words, made at run time: nothing is downloaded
    the scores       exact match, retrieval, the shortcuts a model must beat, and their table

Stories follow the *released* bAbI v1.2 files (Weston et al. 2015, arXiv 1502.05698), so a model
trained only on samples from here can be tested on the real files. Hiding follows BABILong
(Kuratov et al. 2024, arXiv 2406.10149): noise in natural order, fact positions drawn uniformly
and sorted, the question last, the total length exact.

Every function draws from the `random.Random` it is given and from nothing else.
"""
import argparse
import base64
import codecs
import contextlib
import csv
import itertools
import math
import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, field, fields
from functools import lru_cache, partial
from typing import Callable

import numpy as np
import tiktoken
import torch

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
    "relation": ("The {person} is {other} of the {thing}.",),
}
MOVES, TOUCHES = ("move", "is", "not", "either"), ("get", "drop", "give")
NUMBERS = ("none", "one", "two", "three")
WINDOW = 5  # bAbI asks about a statement among the last five


@dataclass(frozen=True)
class Fact:
    """One statement: `person` did `action`, a key of SENTENCES, to `thing` (a place or an object).

    `other` is the second place of an "either" and the receiver of a "give". A "relation" says that
    place `person` lies in direction `other` of place `thing`.
    """
    action: str
    person: str
    thing: str
    other: str
    text: str


@dataclass(frozen=True)
class Question:
    """A question about a story; `support` holds the indices of the facts that answer it."""
    text: str
    answer: str
    support: tuple


@dataclass(frozen=True)
class Sample:
    """Facts as plain sentences and the questions to ask after them."""
    facts: tuple
    questions: tuple


class World:
    """Who is where and who holds what. Where all starts is random and hidden from the reader."""

    def __init__(self, task, rng):
        self.rng, self.task = rng, task
        self.place = {name: rng.choice(task.places) for name in task.people + OBJECTS}
        self.holder = {thing: None for thing in OBJECTS}

    def step(self):
        """Draw person, action and argument until one is possible; do it and return the `Fact`."""
        while True:
            person, action = self.rng.choice(self.task.people), self.rng.choice(self.task.actions)
            fact = (self.move if action in MOVES else self.touch)(person, action)
            if fact:
                return fact

    def move(self, person, action):
        """Go to another place, told in one of four ways: to it, in it, not in the old, either."""
        old, new = self.place[person], self.rng.choice(self.task.places)
        if new == old:
            return None  # nobody moves to where he is
        self.place[person] = new
        if action == "either":
            pair = [new, self.rng.choice(self.task.places)]  # now and then the same place twice
            self.rng.shuffle(pair)
            return self.fact(action, person, *pair)
        return self.fact(action, person, old if action == "not" else new)

    def touch(self, person, action):
        """Get an object that lies here, drop one, or give one to somebody here."""
        here = self.place[person]
        if action == "get":
            things = [t for t in OBJECTS if not self.holder[t] and self.place[t] == here]
        else:
            things = [t for t in OBJECTS if self.holder[t] == person]
        others = [p for p in self.task.people if p != person and self.place[p] == here]
        if not things or action == "give" and not others:
            return None
        thing = self.rng.choice(things)
        receiver = self.rng.choice(others) if action == "give" else ""
        self.holder[thing] = {"get": person, "drop": None, "give": receiver}[action]
        self.place[thing] = here  # while carried this grows stale, and nobody looks
        return self.fact(action, person, thing, receiver)

    def fact(self, action, person, thing, other=""):
        there = action in ("get", "drop") and self.rng.random() < (
            self.task.there if action == "get" else 0.2)
        text = self.rng.choice(SENTENCES[action])
        return Fact(action, person, thing, other, text.format(
            person=person, thing=thing, other=other, there=" there" if there else ""))


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


def carried(facts, person):
    """What he carries now, in the order of his first-ever pick-ups, and the facts that tell."""
    first, holder, support = [], {}, []
    for i, fact in enumerate(facts):
        if fact.action in TOUCHES and person in (fact.person, fact.other):
            receiver = {"get": fact.person, "drop": "", "give": fact.other}[fact.action]
            holder[fact.thing] = receiver
            support.append(i)
            if receiver == person and fact.thing not in first:
                first.append(fact.thing)
    return [thing for thing in first if holder[thing] == person], tuple(support)


def ask_number(facts, i, rng):
    """How many objects is P carrying?"""
    if facts[i].action in TOUCHES:
        things, support = carried(facts, facts[i].person)
        return Question(f"How many objects is {facts[i].person} carrying?",
                        NUMBERS[len(things)], support)


def ask_list(facts, i, rng):
    """What is P carrying?"""
    if facts[i].action in TOUCHES:
        things, support = carried(facts, facts[i].person)
        return Question(f"What is {facts[i].person} carrying?", ",".join(things) or "nothing",
                        support)


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
    along: tuple = ()           # tasks on the way to it, asked along with it in training


HANDLE = ("move", "get", "drop")
TASKS = {
    "qa1": Task(ask_person, ("move",), ("Where is Mary?",)),
    "qa2": Task(ask_object, HANDLE, ("Where is the milk?",), along=("qa1",)),
    "qa3": Task(ask_before, HANDLE, ("Where was the milk before the office?",), there=0.2,
                along=("qa1", "qa2")),
    "qa4": Task(ask_relation, ("relation",), ("What is north of the office?",
                                              "What is the office north of?"), people=()),
    "qa5": Task(ask_gift, HANDLE + 4 * ("give",),
                ("What did Fred give to Bill?", "Who gave the milk?", "Who gave the milk to Bill?",
                 "Who received the milk?", "Who did Fred give the milk to?"),
                people=GIVERS, n_answers=7),
    "qa6": Task(ask_whether, HANDLE, ("Is Mary in the office?",), n_answers=2),
    "qa7": Task(ask_number, HANDLE + 4 * ("give",), ("How many objects is Mary carrying?",),
                n_answers=4),
    "qa8": Task(ask_list, HANDLE, ("What is Mary carrying?",), n_answers=16),
    "qa9": Task(ask_whether, ("move", "move", "is", "not"), ("Is Mary in the office?",),
                n_answers=2),
    "qa10": Task(partial(ask_whether, places=TOWN), ("move", "move", "is", "either"),
                 ("Is Bill in the park?",), people=GUESSED, places=TOWN,
                 n_answers=3),
}


def shape(question, task):
    """The question with P, L, O, D for the task's people, places, objects and directions."""
    kinds = (("P", TASKS[task].people), ("L", TASKS[task].places), ("O", OBJECTS), ("D", OPPOSITE))
    for kind, names in kinds:
        question = re.sub(rf"\b({'|'.join(names) or '-'})\b", kind, question)
    return question


def parse_tasks(names):
    """"all", or names like "qa1,qa6", as a tuple of tasks. ValueError if there is no such task."""
    chosen = tuple(TASKS) if names == "all" else tuple(dict.fromkeys(names.split(",")))
    for name in chosen:
        if name not in TASKS:
            raise ValueError(f"no task {name!r}; there are {', '.join(TASKS)}, and all")
    return chosen


def relations(rng):
    """The two facts of qa4: three places in a line, told from either side, in any order."""
    line, direction = rng.sample(PLACES, 3), rng.choice(sorted(OPPOSITE))
    facts = []
    for a, b in (line[:2], line[1:]):
        told = (a, b, direction) if rng.random() < 0.5 else (b, a, OPPOSITE[direction])
        facts.append(Fact("relation", *told, SENTENCES["relation"][0].format(
            person=told[0], thing=told[1], other=told[2])))
    rng.shuffle(facts)
    return facts


def askable(task, facts, rng, window=WINDOW):
    """Yields a question about each of the last `window` statements (None: all) that allows one."""
    first = 0 if window is None else max(0, len(facts) - window)
    questions = (TASKS[task].ask(facts, i, rng) for i in range(first, len(facts)))
    return filter(None, questions)


def tell(task, rng, max_facts=1000):
    """A story as bAbI makes it: statements in pairs, and after a pair a question where possible.

    Returns the facts up to one of its five questions, or the first `max_facts` (>= 2) of them.
    """
    if task == "qa4":
        return relations(rng)
    world, facts, asked, wanted = World(TASKS[task], rng), [], 0, rng.randint(1, 5)
    while len(facts) + 2 <= max_facts and asked < wanted:
        facts += [world.step(), world.step()]
        asked += any(askable(task, facts, rng))
    return facts


def make_sample(task, rng, n_questions=1, max_facts=1000, window=WINDOW):
    """A `Sample`, whose questions are about the last `window` statements: bAbI's rule; None: any.

    Several include questions of the tasks `along` the way, about anything in the story: who
    follows an object, for one, must follow its holder first.
    """
    while True:
        facts = tell(task, rng, max_facts)
        questions = list(askable(task, facts, rng, window))
        if questions:
            break
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
    return Sample(tuple(fact.text for fact in facts), tuple(questions))


# --------------------------------------------------------------------------------------------
# The real files

def read_babi(path):
    """Samples of a bAbI file: for each question the statements before it, other questions dropped.

    Raises ValueError with the line's number where the file is not in bAbI's format.
    """
    samples, facts, line_ids = [], [], {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            match = re.fullmatch(r"(\d+) ([^\t]+)(?:\t([^\t]+)\t([\d ]*))?", line.rstrip("\r\n"))
            if not match:
                raise ValueError(f"{path}, line {number}: not a line of a bAbI file "
                                 "('ID text' or 'ID question<tab>answer<tab>support')")
            line_id, text, answer, support = match.groups()
            if line_id == "1":
                facts, line_ids = [], {}
            if answer is None:
                line_ids[line_id] = len(facts)
                facts.append(text.strip())
                continue
            if not re.search(r"\w", text):
                raise ValueError(f"{path}, line {number}: a question without a word")
            if not facts or not all(s in line_ids for s in support.split()):
                raise ValueError(f"{path}, line {number}: its supporting facts ({support}) are not "
                                 "all earlier statements of this story")
            question = Question(text.strip(), answer, tuple(line_ids[s] for s in support.split()))
            samples.append(Sample(tuple(facts), (question,)))
    if not samples:
        raise ValueError(f"{path}: no question in this file")
    return samples


def find_babi(folder, task):
    """The path of the task's file in `folder` (test file first); FileNotFoundError if none."""
    names = sorted(os.listdir(folder), key=lambda name: "_test" not in name)
    for name in names:
        if re.fullmatch(rf"{task}_.*\.txt", name):
            return os.path.join(folder, name)
    raise FileNotFoundError(f"no file {task}_*.txt in {folder}")


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


def noise_sentence(rng):
    """A sentence like "The old sailor waited near the harbour at dawn." """
    words = {kind: rng.choice(choices) for kind, choices in NOISE.items()}
    end = " {ending}" if rng.random() < 0.4 else ""
    return ("The {adjective} {noun} {verb} {preposition} the {scene}" + end + ".").format(**words)


def make_noise(encoding, seed, n_sentences=20000):
    """A 'book' of noise made by a grammar. Another seed gives another book.

    Returns a function of a `random.Random` that yields tokenised sentences without end, in
    natural order from a random one on.
    """
    rng = random.Random(f"noise {seed}")
    book = [encoding.encode_ordinary(" " + noise_sentence(rng)) for _ in range(n_sentences)]

    def sentences(rng):
        for i in itertools.count(rng.randrange(len(book))):
            yield book[i % len(book)]
    return sentences


FACTLIKE = re.compile(rf"\b({'|'.join({*PEOPLE, *GIVERS, *GUESSED})})\b"
                      rf"|\b({'|'.join({*PLACES, *TOWN})})\b.*\b({'|'.join({*PLACES, *TOWN})})\b")


SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"'”’)]))\s+(?=[\"'“‘(]*[A-Z0-9])")


def read_sentences(path, start=0, size=2**12):
    """Sentences of a UTF-8 text from byte `start` on; a file of any size is read in pieces.

    A sentence ends at . ! or ? before a space and what may begin another one. The first is left
    out, as it may have begun before `start`.
    Raises ValueError where the file is not UTF-8.
    """
    decode = codecs.getincrementaldecoder("utf-8")("strict" if start == 0 else "ignore").decode
    rest, first = "", start > 0
    with open(path, "rb") as file:
        file.seek(start)
        while piece := file.read(size):
            try:
                rest += decode(piece)
            except UnicodeDecodeError:
                raise ValueError(f"{path} is not a text in UTF-8; convert it first: "
                                 f"iconv -f LATIN1 -t UTF-8") from None
            *done, rest = SENTENCE_END.split(rest)
            if len(rest) > 4 * size:  # no sentence is that long
                done, rest = [*done, rest], ""
            yield from (" ".join(sentence.split()) for sentence in done[first:])
            first = first and not done


def book_noise(encoding, paths, shortest=10):
    """The haystack of BABILong: sentences of one or several texts, see `make_noise`.

    They come in natural order from a random place of a random text, and from another place when
    it ends. Sentences of fewer than `shortest` tokens are left out, and so are those which a
    reader could take for facts: they name one of the people, or two of the places.
    Raises OSError or ValueError if a text cannot be used.
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
            raise ValueError(f"{path} has {found} sentences that can be noise, and must have 100: "
                             "use a longer text")

    def sentences(rng):
        while True:
            path = rng.choice(paths)
            yield from usable(path, rng.randrange(os.path.getsize(path)))
    return sentences


def hide(facts, length, noise, rng, facts_in=(0.0, 1.0)):
    """Hide facts (lists of tokens) in noise, as BABILong does: exactly `length` tokens.

    Noise runs in natural order from a random sentence, its last sentence cut to fit. Facts keep
    their order, never split a sentence and lie within the part `facts_in` of the context.
    Raises ValueError if they do not fit there.
    """
    fact_length = sum(map(len, facts))
    if fact_length > (facts_in[1] - facts_in[0]) * length:
        raise ValueError(f"{fact_length} tokens of facts do not fit into the part "
                         f"{facts_in[0]:g} to {facts_in[1]:g} of {length} tokens of context")
    sentences, offsets, book = [], [0], noise(rng)
    while offsets[-1] < length - fact_length:
        sentences.append(next(book)[:length - fact_length - offsets[-1]])
        offsets.append(offsets[-1] + len(sentences[-1]))
    low, high = facts_in[0] * length, facts_in[1] * length - fact_length
    gaps = [gap for gap, offset in enumerate(offsets) if low <= offset <= high]
    if not gaps:
        raise ValueError(f"no sentence ends in the part {facts_in[0]:g} to {facts_in[1]:g} of "
                         f"{length} tokens of context")
    places = sorted(rng.choices(gaps, k=len(facts)))
    tokens, placed = [], 0
    for gap in range(len(offsets)):
        while placed < len(facts) and places[placed] == gap:
            tokens += facts[placed]
            placed += 1
        if gap < len(sentences):
            tokens += sentences[gap]
    return tokens


# --------------------------------------------------------------------------------------------
# The tokenizer

PATTERN = r" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+"


def count_words(texts):
    """How often each word stands after a space in some texts (any iterable of strings)."""
    counts = Counter()
    for text in texts:
        counts.update(re.findall(r"(?<= )[A-Za-z]+", text))
    return counts


def word_encoding(counts=None, most=2000):
    """The built-in tokenizer: 256 bytes and, as one token each, every word the generator says.

    The `most` frequent of counted words join them, and a quarter as many pieces of up to four
    letters that the other words are made of. tiktoken looks a whole word up before it merges
    bytes, so a listed word is one token and any other text falls back to pieces and bytes:
    encoding and decoding give the text back exactly.
    """
    phrases = [*PEOPLE, *GIVERS, *GUESSED, *PLACES, *TOWN, *OBJECTS, *OPPOSITE, *NUMBERS]
    phrases += ["there The the Is Where was yes no maybe nothing"]
    phrases += [p for choices in (*NOISE.values(), *SENTENCES.values()) for p in choices]
    phrases += [example for task in TASKS.values() for example in task.examples]
    words = {word for phrase in phrases for word in re.findall(r"(?<![{\w])[A-Za-z]+", phrase)}
    counts = counts or Counter()
    words = sorted(words) + [word for word, _ in counts.most_common(most) if word not in words]
    listed, pieces = set(words), Counter()
    for word, count in counts.items():
        if word not in listed:
            for size in (2, 3, 4):
                for i in range(len(word) + 2 - size):
                    pieces[f" {word}"[i:i + size]] += count
    words = [f" {word}" for word in words] + list(OBJECTS)  # in a list they follow a comma
    listed = set(words)
    words += [piece for piece, _ in pieces.most_common(most // 4) if piece not in listed]
    return make_encoding([bytes([b]) for b in range(256)] + [word.encode() for word in words])


def make_encoding(tokens, pattern=PATTERN):
    """A `tiktoken.Encoding` whose token number i is the byte string `tokens[i]`."""
    return tiktoken.Encoding("lm2", pat_str=pattern, special_tokens={},
                             mergeable_ranks={token: i for i, token in enumerate(tokens)})


def load_encoding(name, counts=None):
    """"words" (built in), a name tiktoken knows ("gpt2": it downloads once) or a tiktoken file.

    Raises ValueError, in one line, if there is no such tokenizer or it cannot be had.
    """
    if name == "words":
        return word_encoding(counts)
    if os.path.isfile(name):
        try:  # not by tiktoken, which would give back an older file of the same name from its cache
            with open(name, "rb") as file:
                ranks = {base64.b64decode(token): int(rank)
                         for token, rank in (line.split() for line in file if line.strip())}
        except ValueError:
            ranks = {}
        if sorted(ranks.values()) != list(range(len(ranks))) or \
                not {bytes([b]) for b in range(256)} <= set(ranks):
            raise ValueError(f"{name} is not a whole tiktoken rank file")
        return make_encoding(sorted(ranks, key=ranks.get))
    if name not in tiktoken.list_encoding_names():
        raise ValueError(f"no tokenizer {name!r}: use words, a tiktoken file, or one of "
                         f"{', '.join(tiktoken.list_encoding_names())}")
    try:
        known = tiktoken.get_encoding(name)
    except Exception as error:  # whatever the network throws
        raise ValueError(f"tiktoken could not download {name} ({type(error).__name__}); "
                         "use --tokenizer=words, which needs no network") from None
    # without special tokens, and numbered without holes
    return make_encoding(sorted(known._mergeable_ranks, key=known._mergeable_ranks.get),
                         known._pat_str)


@lru_cache(maxsize=2**16)
def encode(encoding, text):
    """The tokens of a short text that comes again and again (facts, questions, answers)."""
    return tuple(encoding.encode_ordinary(text))


# --------------------------------------------------------------------------------------------
# From samples to tensors, and the scores

def answer_text(answer):
    """An answer as the model says it: a space before, a full stop behind."""
    return f" {answer}."


def to_tokens(sample, encoding, length=None, noise=None, rng=None, facts_in=(0.0, 1.0),
              bare=False):
    """(tokens, targets) of one sample: context, then questions with their answers.

    `targets` holds the next token where it belongs to an answer, -1 everywhere else. With a
    `length` the facts are hidden in noise and there are exactly `length` tokens in all; without
    one there is no noise (BABILong's 0K). A `bare` sample has its noise behind the questions
    instead, where it hides nothing. Raises ValueError if the facts do not fit.
    """
    end, scored = [], []
    for question in sample.questions:
        asked = encode(encoding, f" {question.text}")
        answer = encode(encoding, answer_text(question.answer))
        end += asked + answer
        scored += [False] * len(asked) + [True] * len(answer)
    facts = [encode(encoding, f" {fact}") for fact in sample.facts]
    story, behind = [token for fact in facts for token in fact], []
    if bare:
        behind = hide([], length - len(story) - len(end), noise, rng)
    elif length is not None:
        story = hide(facts, length - len(end), noise, rng, facts_in)
    targets = [-1] * len(story) + [t if s else -1 for t, s in zip(end, scored)]
    return story + end + behind, targets[1:] + [-1] * (len(behind) + 1)


def stack(pairs):
    """Lists of (tokens, targets), all of one length T, as two int64 tensors (B, T)."""
    return tuple(torch.from_numpy(np.array(rows, np.int64)) for rows in zip(*pairs))


def answer_span(targets):
    """How many positions at the end of targets (B, T) hold all that is scored."""
    return targets.size(1) - int((targets >= 0).any(dim=0).nonzero()[0])


def hits(logits, targets):
    """(B,) bool: every answer of the row exactly right. logits (B, K, vocab), targets (B, K).

    All tokens of an answer being the most likely ones, given those before, is the same as greedy
    generation saying exactly this answer: an exact match.
    """
    return ((logits.argmax(-1) == targets) | (targets < 0)).all(dim=1)


@torch.no_grad()
def answered(model, tokens, targets):
    """(B,) bool: which rows (B, T) the model answers right."""
    span = answer_span(targets)
    if not model.n_banks:  # without a memory it is shown all that its window can hold
        tokens = tokens[:, -max(model.config.block_size, span):]
    logits = model(tokens.to(model.device), last=span)[0]
    return hits(logits.cpu(), targets[:, -span:])


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
    memory = model.read(tokens[:, :border], last=1)[1] if border else fresh
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
        place = next((word for word in words if word in PLACES + TOWN), "")
        if asked[0] == "Is":
            guess = "yes" if place == asked[-1] else "no"
        elif asked[0] == "How":
            guess = "one"
        else:
            names = {"What": OBJECTS, "Who": GIVERS}.get(asked[0], PLACES)
            names = PLACES if task == "qa4" else names
            guess = next((word for word in words if word in names and word not in asked), "")
        right += guess == answer
    return {"chance": 1 / TASKS[task].n_answers,
            "best constant": max(map(answers.count, set(answers))) / n,
            "last mentioned": right / n}


def split(text):
    """The sentences of a context. What was cut short and has no end goes with the next one."""
    return [found.strip() for found in re.findall(r"[^.?!]*[.?!]|[^.?!]+$", text)]


def bm25(sentences, question, k1=1.5, b=0.75):
    """How well each sentence fits the question: Okapi BM25 (Robertson et al. 1994)."""
    bags = [Counter(re.findall(r"\w+", sentence.lower())) for sentence in sentences]
    mean = sum(bag.total() for bag in bags) / len(bags)
    scores = [0.0] * len(bags)
    for word in set(re.findall(r"\w+", question.lower())):
        n = sum(word in bag for bag in bags)
        rare = math.log(1 + (len(bags) - n + 0.5) / (n + 0.5))
        for i, bag in enumerate(bags):
            length = 1 - b + b * bag.total() / mean
            scores[i] += rare * bag[word] * (k1 + 1) / (bag[word] + k1 * length)
    return scores


def retrieve(context, sample, n_best):
    """The sample, told by those n sentences of its context that fit its question best.

    They keep their order; of equals the latest are taken.
    """
    sentences = split(context)
    scores = bm25(sentences, sample.questions[0].text)
    best = sorted(range(len(scores)), key=lambda i: (scores[i], i))[-n_best:]
    return Sample(tuple(sentences[i] for i in sorted(best)), sample.questions)


@torch.no_grad()
def score(model, encoding, samples, length, noise, rng, n_best=0, most=2**17):
    """[(sample, right)] for those samples of one question each that fit into `length` tokens.

    Length 0 is the bare story without noise. With `n_best` the model is shown so many sentences,
    see `retrieve`, and no more. Long contexts come in small batches, so that one of 128k tokens
    needs no more memory than 32 of 4k.
    """
    scored, batch = [], []

    def answer():
        right = answered(model, *stack([pair for _, pair in batch])).tolist()
        scored.extend(zip([sample for sample, _ in batch], right))
        batch.clear()

    if not length:  # rows of a batch are as long as one another
        samples = sorted(samples, key=lambda s: len(to_tokens(s, encoding)[0]))
    for sample in samples:
        try:
            pair = to_tokens(sample, encoding, length or None, noise, rng)
        except ValueError:  # the facts do not fit; BABILong leaves such samples out as well
            continue
        if n_best:
            text = encoding.decode(pair[0])
            text = text[:text.rindex(sample.questions[0].text)]
            pair = to_tokens(retrieve(text, sample, n_best), encoding)
        if batch and (len(batch) * len(pair[0]) >= most or len(batch[0][1][0]) != len(pair[0])):
            answer()
        batch.append((sample, pair))
    if batch:
        answer()
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
    Raises ValueError where no sample fits into a length.
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
                raise ValueError(f"{length} tokens are too few for the facts of {task}")
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
    first = next(iter(lengths))
    print(f"{f'shortcuts at {shorten(first)}':18}" + "".join(f"{task:>7}" for task in samples))
    for name in ("best constant", "last mentioned"):
        print(f"{name:18}" + "".join(f"{cells[task, first][name]:7.3f}" for task in samples))
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
                with contextlib.suppress(ValueError):
                    fit.append((sample, to_tokens(sample, encoding, length, noise, rng, (0, 0.5))))
            right = Counter()
            size = 50 + (len(fit) % 50 == 1)  # one alone has nobody to swap banks with
            for i in range(0, len(fit), size):
                found = answered_by_bank(model, *stack([pair for _, pair in fit[i:i + size]]))
                right.update({bank: int(hit.sum()) for bank, hit in found.items()})
            row = {"task": task, "tokens": length, "samples": len(fit)} | {
                bank: right[bank] / len(fit) if fit else math.nan
                for bank in ("memory", "wiped", "swapped")}
            table.append(row | shortcuts(task, [sample for sample, _ in fit]))
            cells = ["-" if v != v else f"{v:.3f}" if isinstance(v, float) else str(v)
                     for v in table[-1].values()]
            print("".join(f"{cell:>{width}}" for cell, width in zip(cells, widths)), flush=True)
    return table


# --------------------------------------------------------------------------------------------
# Flags: the fields of a dataclass are the flags of a script

def die(message):
    """One clear line on stderr and exit status 2, whatever the input that it quotes."""
    line = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(message))
    print("error:", line if len(line) < 800 else f"{line[:500]} ... {line[-200:]}", file=sys.stderr)
    sys.exit(2)


@contextlib.contextmanager
def or_die(prefix=""):
    """What goes wrong in this context with files or values ends in one line and exit status 2."""
    try:
        yield
    except UnicodeDecodeError:
        die(f"{prefix}not a text in UTF-8")
    except (OSError, ValueError) as error:
        die(f"{prefix}{error}")


def calm_streams():
    """No closed stream, strange character or Ctrl-C may end a script in a traceback."""
    def hook(kind, error, trace):
        if issubclass(kind, (BrokenPipeError, KeyboardInterrupt)):
            os._exit(141 if kind is BrokenPipeError else 130)  # as a shell reports them
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = hook
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
        elif mode == "w":
            getattr(sys, name).reconfigure(errors="backslashreplace")


def die_unless_new(name, path):
    """No file is overwritten: one line and exit 2 if there is one, or none can be written there."""
    if os.path.exists(path):
        die(f"--{name}={path}: is there already; remove it or choose another name")
    if not os.path.isdir(os.path.dirname(path) or "."):
        die(f"--{name}={path}: no such folder")
    try:
        with open(path, "x"):
            pass
        os.remove(path)
    except OSError as error:
        die(f"--{name}={path}: cannot write there ({error.strerror})")


@contextlib.contextmanager
def replaced(path, mode, **kwargs):
    """A file to write beside `path`, which takes its place when all is written, or never."""
    try:
        with open(f"{path}.new", mode, **kwargs) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.new", path)
    finally:
        if os.path.exists(f"{path}.new"):
            os.remove(f"{path}.new")


def write_csv(path, rows, columns):
    """Dictionaries as a CSV file, whole or not at all; other keys than `columns` are left out."""
    with replaced(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path, columns):
    """The rows of a CSV file; ValueError if it lacks one of the columns."""
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if not set(columns) <= set(reader.fieldnames or ()):
        raise ValueError(f"{path} is not as this script wrote it; move it away")
    return rows


def find_device(name):
    """"auto" becomes cuda, mps or cpu, whichever is there first. ValueError if `name` is not."""
    have = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
            "cpu": True}
    if name == "auto":
        return next(kind for kind in have if have[kind])
    if not have.get(name.split(":")[0]):
        there = ", ".join(kind for kind in have if have[kind])
        raise ValueError(f"--device={name}: not on this machine; it has {there}")
    try:
        torch.empty(1, device=name)
    except RuntimeError:
        raise ValueError(f"--device={name}: no such device here") from None
    return name


def flag(default, help, least=None, most=10**9, choices=None):
    """A dataclass field that `parse_flags` turns into a command-line flag."""
    return field(default=default, metadata={"help": help, "choices": choices,
                                            "limits": None if least is None else (least, most)})


def span(text):
    """"0.0,0.5" as (0.0, 0.5)."""
    try:
        low, high = (float(part) for part in text.split(","))
        if 0 <= low < high <= 1:
            return low, high
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a part like 0.0,0.5 between 0 and 1")


def token_counts(text):
    """"0,1k,4096" as (0, 1024, 4096)."""
    if not re.fullmatch(r"\d{1,9}k?(,\d{1,9}k?)*", text.lower()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers like 0,1k,4096")
    return tuple(int(part.rstrip("k")) * (1024 if part[-1] == "k" else 1)
                 for part in text.lower().split(","))


def parse_flags(config_class, description, argv=None):
    """Read `--name=value` flags into a dataclass.

    One line and exit status 2 for flags that are unknown, shortened or outside their limits.
    """
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            die(f"{message} (see {self.prog} --help)")

    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(config_class):
        shown = f.metadata["help"] if f.default in (None, "", ()) or f.default is False else \
            f"{f.metadata['help']} ({f.default})"
        if f.type is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction,
                                default=f.default, help=shown)
        else:
            parser.add_argument(f"--{f.name}", type=f.type,
                                default=f.default, choices=f.metadata["choices"], help=shown,
                                metavar=f.name.upper() if not f.metadata["choices"] else None)
    config = config_class(**vars(parser.parse_args(argv)))
    for f in fields(config_class):
        value, limits = getattr(config, f.name), f.metadata["limits"]
        if isinstance(value, list):  # how argparse reads --name=--
            die(f"--{f.name}: expected one argument")
        if limits and not limits[0] <= value <= limits[1]:
            die(f"--{f.name}={value}: it must be a number from {limits[0]:g} to {limits[1]:g}")
    return config


def as_flags(config):
    """The command-line flags that make `parse_flags` give this dataclass."""
    given = []
    for f in fields(config):
        value = getattr(config, f.name)
        if value != f.default:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else value
            given.append(f"--{f.name}={text}" if not isinstance(value, bool) else
                         f"--{f.name}" if value else f"--no-{f.name}")
    return given


def matplotlib():
    """matplotlib.pyplot to draw files with, or None and a hint: it is no required package."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
        return plt
    except ImportError:
        print("\n(pip install matplotlib, and this ends with a picture)")


def draw(path, panels, xlabel, ylabel):
    """Draw {title: {label: {x: [a value for each seed]}}}: means, and bands to lowest and highest.

    With an `ylabel` "accuracy" x are lengths of contexts. No picture without matplotlib.
    """
    plt = matplotlib()
    if not plt:
        return
    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels) + 1.5, 4), sharey=True,
                                squeeze=False, layout="constrained")
    for axis, (title, lines) in zip(axes[0], panels.items()):
        for i, (label, values) in enumerate(lines.items()):
            style = "k:" if label in ("chance", "last mentioned") else \
                "-" + "os^vDPX*<>hd"[i % 12] * (ylabel == "accuracy")
            axis.plot(list(values), [sum(v) / len(v) for v in values.values()], style, label=label)
            axis.fill_between(list(values), [min(v) for v in values.values()],
                              [max(v) for v in values.values()], alpha=0.15)
        axis.set(title=title, xlabel=xlabel)
        if ylabel == "accuracy":
            ticks = sorted({x for values in lines.values() for x in values})
            axis.set_xscale("symlog", base=2, linthresh=1024)
            axis.set(ylim=(0, 1.03), xticks=ticks, xticklabels=[shorten(x) for x in ticks])
        axis.minorticks_off()
    axes[0, 0].set_ylabel(ylabel)
    axes[0, -1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    try:
        figure.savefig(path, dpi=130)
        print(f"\npicture: {path}", flush=True)
    except OSError as error:  # the numbers are there all the same
        print(f"\nno picture: {path} cannot be written ({error.strerror})", flush=True)
    plt.close(figure)


# --------------------------------------------------------------------------------------------
# Print samples, statistics or scores

@dataclass
class Flags:
    # samples
    task: str = flag("qa1", "which task to print samples of", choices=tuple(TASKS))
    samples: token_counts = flag((), "how many: of the task (3), or for each of --lengths (200,50)")
    length: int = flag(128, "tokens in all, question and answer included; 0 = no noise", 0)
    facts_in: span = flag((0.0, 1.0), "the part of the context that holds the facts: 0.0,0.5")
    babi_dir: str = flag("", "folder of real bAbI files to take the stories from")
    noise: str = flag("", "texts to hide the facts in, instead of the built-in noise: a.txt,b.txt")
    seed: int = flag(0, "seed of stories, noise and mixing")
    # statistics
    stats: bool = flag(False, "compare generated stories with the released files instead")
    # scores
    ckpt: str = flag("", "score this checkpoint of train.py instead")
    tasks: str = flag("", "tasks to score: qa1,qa2 or all (those it was trained on)")
    lengths: token_counts = flag((0, 1024, 4096), "tokens of context: 0,1k,4k (0 = no noise)")
    retrieve: int = flag(0, "show the model only so many sentences, those BM25 finds best", 0)
    csv: str = flag("", "where to write the scores (babilong.csv beside the checkpoint)")
    device: str = flag("auto", "auto, cpu, cuda or mps")


def load_babi(folder, task):
    """All samples of the real file of `task` in `folder`; one clear line if that cannot be."""
    with or_die("--babi_dir: "):
        return read_babi(find_babi(folder, task))


def test_samples(tasks, count, folder="", seed=0):
    """{task: samples of one question each}: all in the real files in `folder`, or `count` new."""
    samples = {}
    for task in tasks:
        rng = random.Random(f"score {seed} {task}")
        if folder:
            samples[task] = load_babi(folder, task)
            rng.shuffle(samples[task])
        else:
            samples[task] = [make_sample(task, rng) for _ in range(count)]
    return samples


def book_names(names):
    """The texts that a flag like `--noise=a.txt,b.txt` names."""
    return [name for name in names.split(",") if name]


def load_noise(names, encoding, seed):
    """The noise that `--noise=a.txt,b.txt` names, the built-in one without names; or one line."""
    books = book_names(names)
    with or_die("--noise: "):
        return book_noise(encoding, books) if books else make_noise(encoding, seed)


def print_samples(flags):
    rng = random.Random(flags.seed)
    encoding = word_encoding()
    noise = load_noise(flags.noise, encoding, flags.seed)
    real = load_babi(flags.babi_dir, flags.task) if flags.babi_dir else None
    for number in range(1, flags.samples[0] + 1):
        sample = rng.choice(real) if real else make_sample(flags.task, rng)
        question = sample.questions[0]
        try:
            tokens, _ = to_tokens(sample, encoding, flags.length or None, noise, rng,
                                  flags.facts_in)
        except ValueError as error:
            die(f"{error}; use a larger --length or a wider --facts_in")
        text = encoding.decode(tokens)
        print(f"--- {flags.task}, sample {number}: {len(tokens)} tokens, {len(sample.facts)} facts")
        support = [sample.facts[i] for i in question.support]
        for sentence in split(text[:text.rindex(question.text)]):
            mark = ">>" if sentence in support else " >" if sentence in sample.facts else "  "
            print(mark, sentence)
        print(f"   {question.text}  ->  {question.answer}")
    print("\n>> supporting fact   > other fact   the rest is noise")


RELEASED = {  # files, 10k train (qa3 1k): mean facts per question, answers in percent
    "qa1": (6.0, "bathroom 17.3, garden 16.6, office 16.6, hallway 16.6, bedroom 16.4"),
    "qa2": (15.6, ""), "qa3": (50.0, ""), "qa4": (2.0, ""),
    "qa5": (20.1, "Mary 18.5, Fred 17.5, Bill 15.9, Jeff 14.5, apple 13.7, football 10.8"),
    "qa6": (6.3, "yes 50.1, no 49.9"), "qa7": (8.7, "one 48.7, none 47.0, two 4.1, three 0.2"),
    "qa8": (8.8, "nothing 36.2"), "qa9": (6.0, "no 62.5, yes 37.5"),
    "qa10": (6.0, "no 47.5, yes 37.7, maybe 14.7")}


def print_statistics(flags, count=2000):
    """Facts per question and shares of answers: generated, as released, and as in --babi_dir."""
    for task in TASKS:
        rng = random.Random(flags.seed)
        made = [make_sample(task, rng) for _ in range(count)]
        mean, shares = RELEASED[task]
        print(f"{task:5} released   {mean:5.1f} facts a question | {shares}")
        real = {"real files": load_babi(flags.babi_dir, task)} if flags.babi_dir else {}
        for name, samples in ({"generated": made} | real).items():
            facts = [len(sample.facts) for sample in samples]
            answers = Counter(sample.questions[0].answer for sample in samples).most_common(7)
            print(f"      {name:10} {sum(facts) / len(facts):5.1f}, {min(facts)} to {max(facts)} | "
                  + ", ".join(f"{answer} {100 * n / len(samples):.1f}" for answer, n in answers))


def print_scores(flags):
    from lm2 import LM2, load_checkpoint
    try:
        device = find_device(flags.device)
        model, encoding = LM2.load(flags.ckpt, device)
        trained = load_checkpoint(flags.ckpt)["train"]["flags"]
        if trained["data"] and not flags.tasks:
            raise ValueError(f"{flags.ckpt} was trained on a text; name the --tasks to score it on")
        tasks = parse_tasks(flags.tasks or trained["task"])
    except ValueError as error:
        die(error)
    except (KeyError, TypeError):
        die(f"{flags.ckpt} does not say what it was trained on; name the --tasks")
    path = flags.csv or os.path.join(os.path.dirname(flags.ckpt), "babilong.csv")
    die_unless_new("csv", path)
    counts = flags.samples + (flags.samples[-1],) * len(flags.lengths)
    noise = load_noise(flags.noise, encoding, f"score {flags.seed}")
    samples = test_samples(tasks, max(flags.samples), flags.babi_dir, flags.seed)
    print(f"{flags.ckpt}: stories {flags.babi_dir or 'generated'}, "
          f"noise {flags.noise or 'built in'}, seed {flags.seed}")
    with or_die("--lengths: "):
        cells = score_table(model, encoding, samples, dict(zip(flags.lengths, counts)), noise,
                            flags.seed, flags.retrieve)
    with or_die(f"--csv={path}: cannot write there: "):
        write_csv(path, cells, cells[0])
    print(f"written to {path}")


def main():
    calm_streams()
    flags = parse_flags(Flags, __doc__)
    flags.samples = flags.samples or ((100,) if flags.ckpt else (3,))
    if min(flags.samples) < 1:
        die("--samples must be at least 1")
    if flags.ckpt:
        print_scores(flags)
    elif flags.stats:
        print_statistics(flags)
    else:
        print_samples(flags)


if __name__ == "__main__":
    main()
