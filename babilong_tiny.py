"""BABILong in miniature: bAbI stories hidden in noise, made on the fly.

    python babilong_tiny.py                                  # print samples a person can read
    python babilong_tiny.py --task=qa2 --length=256 --samples=1
    python babilong_tiny.py --babi_dir=tasks_1-20_v1-2/en    # stories from the real bAbI files

What is here, in the order of the file
    the world        people, places, objects, and the sentences the released bAbI v1.2 files use
    the tasks        qa1 (one supporting fact) and qa2 (two): how a story goes on, what may be asked
    the real files   a reader for bAbI's own text format
    the haystack     noise sentences, and BABILong's way to hide facts among them
    the tokenizer    a tiktoken encoding of whole words, made at run time: nothing is downloaded
    the scores       exact match, and the shortcuts a model must beat

Stories follow the *released* bAbI v1.2 files (Weston et al. 2015, arXiv 1502.05698), so a model
trained only on samples from here can be tested on the real files. Hiding follows BABILong
(Kuratov et al. 2024, arXiv 2406.10149): noise in natural order, fact positions drawn uniformly
and sorted, the question last, the total length exact.

Every function draws from the `random.Random` it is given and from nothing else.
"""
import argparse
import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, field, fields
from functools import lru_cache

import tiktoken
import torch

# --------------------------------------------------------------------------------------------
# The world

PEOPLE = ("Mary", "John", "Daniel", "Sandra")
PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("football", "apple", "milk")
VERBS = {
    "move": ("moved to", "went to", "journeyed to", "travelled to", "went back to"),
    "get": ("picked up", "got", "grabbed", "took"),
    "drop": ("dropped", "left", "discarded", "put down"),
}
ACTIONS = {"qa1": ("move",), "qa2": ("move", "get", "drop")}  # what may happen, each as likely
TASKS = tuple(ACTIONS)
WINDOW = 5  # bAbI asks about a statement among the last five


@dataclass(frozen=True)
class Fact:
    """One statement: `person` did `action` ("move", "get", "drop") to `thing` (place or object)."""
    action: str
    person: str
    thing: str
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

    def __init__(self, rng):
        self.rng = rng
        self.place = {name: rng.choice(PLACES) for name in PEOPLE + OBJECTS}
        self.holder = {thing: None for thing in OBJECTS}

    def step(self, actions):
        """Draw person, action and argument until one is possible; do it and return the `Fact`."""
        rng = self.rng
        while True:
            person, action = rng.choice(PEOPLE), rng.choice(actions)
            if action == "move":
                thing = rng.choice(PLACES)
                if thing == self.place[person]:
                    continue  # nobody moves to where he is
                self.place[person] = thing
                return Fact(action, person, thing,
                            f"{person} {rng.choice(VERBS[action])} the {thing}.")
            if action == "get":
                things = [t for t in OBJECTS if not self.holder[t]
                          and self.place[t] == self.place[person]]
            else:
                things = [t for t in OBJECTS if self.holder[t] == person]
            if not things:
                continue
            thing = rng.choice(things)
            self.holder[thing] = person if action == "get" else None
            self.place[thing] = self.place[person]
            there = " there" if action == "get" or rng.random() < 0.2 else ""
            return Fact(action, person, thing,
                        f"{person} {rng.choice(VERBS[action])} the {thing}{there}.")


# --------------------------------------------------------------------------------------------
# The tasks: `ask_*` gives (statement asked about, question) for whatever a reader can answer

def ask_qa1(facts):
    """Where is P? The place of P's last move."""
    moves = [(i, fact) for i, fact in enumerate(facts) if fact.action == "move"]
    last = {fact.person: (i, fact.thing) for i, fact in moves}
    return [(i, Question(f"Where is {fact.person}?", last[fact.person][1], (last[fact.person][0],)))
            for i, fact in moves]


def ask_qa2(facts):
    """Where is the O? Where its holder went after the get, or was when he dropped it."""
    touched, moved, questions = {}, {}, []
    for i, fact in enumerate(facts):
        if fact.action == "move":
            moved.setdefault(fact.person, []).append(i)
        else:
            touched[fact.thing] = i
    for thing, i in touched.items():
        # the last move that tells: before a drop, after a get
        moves = [m for m in moved.get(facts[i].person, [])
                 if (m < i if facts[i].action == "drop" else m > i)]
        if moves:
            questions.append((i, Question(f"Where is the {thing}?", facts[moves[-1]].thing,
                                          (i, moves[-1]))))
    return questions


ASK = {"qa1": ask_qa1, "qa2": ask_qa2}
ALONG = {"qa1": (), "qa2": ("qa1",)}  # steps on the way, asked along with it in training
EXAMPLES = {  # a pattern of every question of the task, and one of them
    "qa1": (rf"Where is ({'|'.join(PEOPLE)})\?", "Where is Mary?"),
    "qa2": (rf"Where is the ({'|'.join(OBJECTS)})\?", "Where is the milk?"),
}


def askable(task, facts, window=WINDOW):
    """Questions about the last `window` statements (None: all), one for each statement."""
    first = 0 if window is None else len(facts) - window
    return [question for i, question in ASK[task](facts) if i >= first]


def tell(task, rng, max_facts=1000):
    """A story as bAbI makes it: statements in pairs, and after a pair a question where possible.

    Returns the facts up to one of its five questions, at most `max_facts` (>= 2) of them.
    """
    while True:
        world, facts, asked, wanted = World(rng), [], 0, rng.randint(1, 5)
        while len(facts) + 2 <= max_facts and asked < wanted:
            facts += [world.step(ACTIONS[task]), world.step(ACTIONS[task])]
            asked += bool(askable(task, facts))
        if asked == wanted:
            return facts


def make_sample(task, rng, n_questions=1, max_facts=1000):
    """A `Sample`. One question follows bAbI's rule; several ask about anything in the story.

    For qa2 the several include qa1's: who follows an object must follow its holder first.
    """
    facts = tell(task, rng, max_facts)
    if n_questions == 1:
        questions = [rng.choice(askable(task, facts))]
    else:
        questions = list({question.text: question for kind in (task, *ALONG[task])
                          for question in askable(kind, facts, window=None)}.values())
        questions = rng.sample(questions, min(n_questions, len(questions)))
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
    """A 'book' of noise: a list of tokenised sentences. Another seed gives another book."""
    rng = random.Random(f"noise {seed}")
    return [encoding.encode_ordinary(" " + noise_sentence(rng)) for _ in range(n_sentences)]


def hide(facts, length, noise, rng, facts_in=(0.0, 1.0)):
    """Hide facts (lists of tokens) in noise, as BABILong does: exactly `length` tokens.

    Noise runs in natural order from a random sentence, its last sentence cut to fit; none is
    skipped for being short, as BABILong does with books. Facts keep their order, never split a
    sentence and lie within the part `facts_in` of the context.
    Raises ValueError if they do not fit there.
    """
    fact_length = sum(map(len, facts))
    if fact_length > (facts_in[1] - facts_in[0]) * length:
        raise ValueError(f"{fact_length} tokens of facts do not fit into the part "
                         f"{facts_in[0]:g} to {facts_in[1]:g} of {length} tokens of context")
    sentences, offsets = [], [0]
    i = rng.randrange(len(noise))
    while offsets[-1] < length - fact_length:
        sentences.append(noise[i % len(noise)][:length - fact_length - offsets[-1]])
        offsets.append(offsets[-1] + len(sentences[-1]))
        i += 1
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


def word_encoding(text="", most=2000):
    """The built-in tokenizer: 256 bytes and, as one token each, every word the generator says.

    The `most` frequent words of a `text` join them. tiktoken looks a whole piece up before it
    merges bytes, so a listed word is one token and any other text falls back to bytes: encoding
    and decoding give the text back exactly.
    """
    phrases = PEOPLE + PLACES + OBJECTS + tuple(p for verbs in VERBS.values() for p in verbs)
    phrases += tuple(p for choices in NOISE.values() for p in choices)
    words = {word for phrase in phrases for word in phrase.split()}
    words |= set("The the Where is there".split())
    frequent = Counter(re.findall(r"(?<= )[A-Za-z]+", text)).most_common(most)
    words = sorted(words) + [word for word, _ in frequent if word not in words]
    return make_encoding([bytes([b]) for b in range(256)] + [f" {word}".encode() for word in words])


def make_encoding(tokens, pattern=PATTERN):
    """A `tiktoken.Encoding` whose token number i is the byte string `tokens[i]`."""
    return tiktoken.Encoding("lm2", pat_str=pattern, special_tokens={},
                             mergeable_ranks={token: i for i, token in enumerate(tokens)})


def load_encoding(name, text=""):
    """"words" (built in), a name tiktoken knows ("gpt2": it downloads once) or a tiktoken file.

    Raises ValueError, in one line, if there is no such tokenizer or it cannot be had.
    """
    if name == "words":
        return word_encoding(text)
    if os.path.isfile(name):
        from tiktoken.load import load_tiktoken_bpe
        ranks = load_tiktoken_bpe(name)
        if sorted(ranks.values()) != list(range(len(ranks))) or len(ranks) < 256:
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


def to_tokens(sample, encoding, length=None, noise=None, rng=None, facts_in=(0.0, 1.0)):
    """(tokens, targets) of one sample: context, then questions with their answers.

    `targets` holds the next token where it belongs to an answer, -1 everywhere else. With a
    `length` the facts are hidden in noise and there are exactly `length` tokens in all; without
    one there is no noise (BABILong's 0K). Raises ValueError if the facts do not fit.
    """
    end, scored = [], []
    for question in sample.questions:
        asked = encode(encoding, f" {question.text}")
        answer = encode(encoding, answer_text(question.answer))
        end += asked + answer
        scored += [False] * len(asked) + [True] * len(answer)
    facts = [encode(encoding, f" {fact}") for fact in sample.facts]
    if length is None:
        context = [token for fact in facts for token in fact]
    else:
        context = hide(facts, length - len(end), noise, rng, facts_in)
    tokens = context + end
    targets = [-1] * len(context) + [t if s else -1 for t, s in zip(end, scored)]
    return tokens, targets[1:] + [-1]


def stack(pairs):
    """Lists of (tokens, targets), all of one length T, as two int64 tensors (B, T)."""
    tokens, targets = zip(*pairs)
    return torch.tensor(tokens), torch.tensor(targets)


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
    logits = model(tokens.to(model.device), last=span)[0]
    return hits(logits.cpu(), targets[:, -span:])


@torch.no_grad()
def answered_by_bank(model, tokens, targets):
    """The proof that the memory does it: which rows (B, T) are answered right with the bank

    "kept" as it is; "wiped" at every segment, so that only the last segment is seen; "swapped"
    with the previous row's just before the last segment. The question must lie in the last segment.
    Returns a dictionary of three (B,) bool.
    """
    border = (tokens.size(1) - 1) // model.config.block_size * model.config.block_size
    tokens, targets = tokens.to(model.device), targets[:, border:]
    memory = model(tokens[:, :border], last=1)[2]
    banks = {"kept": memory.banks, "wiped": model.fresh_memory(len(tokens)).banks,
             "swapped": memory.banks.roll(1, dims=0)}
    return {name: hits(model(tokens[:, border:], memory=memory._replace(banks=bank))[0].cpu(),
                       targets) for name, bank in banks.items()}


def shortcuts(task, samples):
    """Accuracies without any understanding on these very samples (one question each).

    {"chance", "best constant", "last-mentioned place"}: a uniform guess among the task's answers,
    the commonest answer always, the place named last in the facts.
    """
    answers = [sample.questions[0].answer for sample in samples] or [""]
    last = [next((word for word in re.findall(r"\w+", " ".join(sample.facts))[::-1]
                  if word in PLACES), None) for sample in samples]
    return {"chance": 1 / len(PLACES),
            "best constant": max(map(answers.count, set(answers))) / len(answers),
            "last-mentioned place": sum(map(str.__eq__, answers, map(str, last))) / len(answers)}


# --------------------------------------------------------------------------------------------
# Flags: the fields of a dataclass are the flags of a script

def die(message):
    """One clear line on stderr and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


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


def flag(default, help, choices=None):
    """A dataclass field that `parse_flags` turns into a command-line flag."""
    return field(default=default, metadata={"help": help, "choices": choices})


def span(text):
    """"0.0,0.5" as (0.0, 0.5)."""
    low, high = (float(part) for part in text.split(","))
    if not 0 <= low < high <= 1:
        raise ValueError
    return low, high


def parse_flags(config_class, description, argv=None):
    """Read `--name=value` flags into a dataclass. Unknown or shortened flags: one line, exit 2."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            die(f"{message} (see {self.prog} --help)")

    parser = Parser(description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(config_class):
        shown = f"{f.metadata['help']} ({f.default})" if f.default not in ("", False) \
            else f.metadata["help"]
        if f.type is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction,
                                default=f.default, help=shown)
        else:
            parser.add_argument(f"--{f.name}", type=span if f.type is tuple else f.type,
                                default=f.default, choices=f.metadata["choices"], help=shown,
                                metavar=f.name.upper() if not f.metadata["choices"] else None)
    return config_class(**vars(parser.parse_args(argv)))


# --------------------------------------------------------------------------------------------
# Print samples

@dataclass
class Flags:
    task: str = flag("qa1", "which task", choices=TASKS)
    samples: int = flag(3, "how many samples to print")
    length: int = flag(128, "tokens in all, question and answer included; 0 = facts without noise")
    facts_in: tuple = flag((0.0, 1.0), "the part of the context that holds the facts: 0.0,0.5")
    babi_dir: str = flag("", "folder of real bAbI files to take the stories from")
    seed: int = flag(0, "seed of stories, noise and mixing")


def load_babi(folder, task):
    """All samples of the real file of `task` in `folder`; one clear line if that cannot be."""
    try:
        return read_babi(find_babi(folder, task))
    except (OSError, ValueError) as error:
        die(f"--babi_dir: {error}")


def main():
    flags = parse_flags(Flags, __doc__)
    if flags.samples < 1 or flags.length < 0:
        die("--samples must be at least 1 and --length at least 0")
    rng = random.Random(flags.seed)
    encoding = word_encoding()
    noise = make_noise(encoding, flags.seed)
    real = load_babi(flags.babi_dir, flags.task) if flags.babi_dir else None
    for number in range(1, flags.samples + 1):
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
        for sentence in re.findall(r"[^.?]*[.?]|[^.?]+$", text[:text.rindex(question.text)]):
            mark = ">>" if sentence.strip() in support else \
                " >" if sentence.strip() in sample.facts else "  "
            print(mark, sentence.strip())
        print(f"   {question.text}  ->  {question.answer}")
    print("\n>> supporting fact   > other fact   the rest is noise")


if __name__ == "__main__":
    main()
