"""Use a trained model: tell it a story of any length, ask, and see what its memory did.

    python sample.py                                   # chat: type facts and questions, /help
    python sample.py --story="Mary went to the garden." --far=4000 --ask="Where is Mary?"
    python sample.py --story=story.txt --far=4000 --noise=book.txt --ask="Where is Mary?"
    python sample.py --read=book.txt --save_memory=book.pt              # read once ...
    python sample.py --load_memory=book.pt --ask="Where is Mary?"       # ... ask often
    python sample.py --story=story.txt --ask="Where is Mary?" --show --html=memory.html
    python sample.py --prompt="Once upon a time" --temperature=0.8 --top_k=50

A text is read segment by segment; what the model knows of it is its memory, which does not grow.
With an answer stands what the same model says when its bank is wiped before the question.
"""
import codecs
import contextlib
import copy
import hashlib
import html
import itertools
import json
import os
import random
import re
import sys
import time
from dataclasses import dataclass

import torch

import babilong_tiny as babi
from babilong_tiny import flag, printable
from lm2 import LM2, BadInput, Memory, check_tensors, load_checkpoint, load_data, normed


@dataclass
class Flags:
    ckpt: str = flag("", "checkpoint of train.py (out/ckpt.pt, else the one in results/)")
    # what to read, in this order
    load_memory: str = flag("", "begin with this saved memory instead of a fresh one")
    story: str = flag("", "a story, or a file that holds one")
    read: str = flag("", "a text of any size to read in a stream; - for standard input")
    far: int = flag(0, "tokens of noise to read after that, before the question", 0)
    noise: str = flag("", "texts to take them from, instead of the built-in noise: a.txt,b.txt")
    save_memory: babi.new_file = flag("", "save the memory here after reading")
    # what to do then
    ask: str = flag(None, "a question; without it facts and questions come from the terminal")
    prompt: str = flag(None, "a text to continue instead")
    max_new_tokens: int = flag(100, "tokens to continue the text by", 1)
    temperature: float = flag(0.8, "randomness of the continuation, 0 = always the likeliest token",
                              0, 1e6)
    top_k: int = flag(50, "choose among the k likeliest tokens only, 0 = among all", 0)
    seed: int = flag(0, "seed of the continuation and of the noise", 0, 2**63 - 1)
    # what to see
    show: bool = flag(False, "print what the slots wrote and, for the answer, read")
    html: babi.new_file = flag("", "write the same as a page for a browser to this file")
    device: str = flag("cpu", "auto, cpu, cuda or mps")


# --------------------------------------------------------------------------------------------
# Reading

PEOPLE = {*babi.PEOPLE, *babi.GIVERS, *babi.GUESSED}
PLACES = {*babi.PLACES, *babi.TOWN}
NAMES = {*PEOPLE, *PLACES, *babi.OBJECTS}
NAME = re.compile(rf"\b({'|'.join(sorted(NAMES))})\b")


class Reader:
    """A document as far as it was read.

    memory    the `Memory` behind its full segments
    rest      the tokens since then, fewer than block_size
    count     how many tokens there were in all
    names     which of NAMES it named; None: unknown
    recorder  a `Recorder` that looks on, or None
    """

    def __init__(self, model, recorder=None):
        self.model, self.memory, self.recorder = model, model.fresh_memory(1), recorder
        self.rest, self.count, self.names = [], 0, frozenset()

    @torch.no_grad()
    def read(self, tokens):
        rest, size = self.rest + tokens, self.model.config.block_size
        full = len(rest) // size * size
        if full:
            with self.recorder or contextlib.nullcontext():
                segments = torch.tensor([rest[:full]], device=self.model.device)
                self.memory = self.model.hidden_states(segments, self.memory, last=1)[1]
        self.rest, self.count = rest[full:], self.count + len(tokens)

    def generate(self, tokens, *args, **kwargs):
        """What the model says after all it read and these tokens; it is none the wiser after."""
        prompt = torch.tensor([self.rest + tokens], device=self.model.device)
        said = self.model.generate(prompt, *args, memory=self.memory, **kwargs)
        return said[0, prompt.size(1):].tolist()


def tidy(text):
    """The text as the generator writes it: one space between words and one before the first."""
    return " " + " ".join(text.split()) if text.strip() else ""


def read_text(reader, encoding, text):
    reader.read(encoding.encode_ordinary(text))
    if reader.names is not None:
        reader.names |= {*NAME.findall(text)}


def read_noise(reader, encoding, flags, count):
    """Let the reader read so many tokens of noise."""
    noise = babi.load_noise(flags.noise, encoding, flags.seed)
    tokens = itertools.chain.from_iterable(noise(random.Random(f"{flags.seed} {reader.count}")))
    while part := list(itertools.islice(tokens, min(count, 2**13))):
        reader.read(part)
        count -= len(part)


def read_stream(reader, encoding, name, clean):
    """Let the reader read a file, or standard input for "-"; progress goes to a terminal."""
    start, before, terminal = time.time(), reader.count, sys.stderr.isatty()
    with contextlib.nullcontext(sys.stdin.buffer) if name == "-" else open(name, "rb") as file:
        for text in babi.text_pieces(file, name):
            read_text(reader, encoding, clean(text))
            if terminal:
                print(f"{reader.count - before:,} tokens\r", end="", file=sys.stderr, flush=True)
    return f"read {reader.count - before:,} tokens in {time.time() - start:.1f} s"


def fingerprint(model):
    """A name for these very weights: a memory is of use to the model that wrote it alone."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(name.encode() + weight.cpu().numpy().tobytes())
    return digest.hexdigest()


def save_memory(reader, path):
    """Write what the reader knows, to the side first and then into place."""
    with babi.replaced(path, "wb") as file:
        torch.save({**reader.memory._asdict(), "rest": reader.rest, "count": reader.count,
                    "names": None if reader.names is None else sorted(reader.names),
                    "model": fingerprint(reader.model)}, file)


def load_memory(model, path):
    """A `Reader` that goes on where the saved one stood. BadInput if it cannot."""
    what, reader = "memory that sample.py saved", Reader(model)
    saved = load_data(path, ("banks", "tail", "rest", "count", "model"), what)
    if saved["model"] != fingerprint(model):
        raise BadInput(f"{path} belongs to another model; read the text anew with this one")
    rest, count, fresh = saved["rest"], saved["count"], reader.memory
    names = saved.get("names")      # a file that does not name them is as good
    try:
        memory = Memory(saved["banks"], saved["tail"])
        check_tensors(memory._asdict(), fresh._asdict())
        fits = all(m.dtype == fresh.tail.dtype and (m.abs() < 1e6).all() for m in memory) \
            and type(rest) is list and len(rest) < model.config.block_size \
            and all(type(t) is int and 0 <= t < model.config.vocab_size for t in rest) \
            and type(count) is int and len(rest) <= count < 2**63 \
            and (names is None or NAMES.issuperset(names))
    except Exception:   # whatever PyTorch and Python raise for what was forged
        fits = False
    if not fits:
        raise BadInput(f"{path} is no {what}: it holds what no model of this kind writes")
    reader.memory = Memory(*(m.to(model.device) for m in memory))
    reader.rest, reader.count = rest, count
    reader.names = None if names is None else frozenset(names)
    return reader


# --------------------------------------------------------------------------------------------
# Seeing

class Recorder:
    """Looks on, as a context, while a model reads a document in one or many calls; changes nothing.

    `segments` gets a dictionary for each segment (those of the last `keep` tokens), with its
    "number", "tokens" (T) and, as a list over blocks with memory,
        "read"    (T, N)  attention of its tokens to the slots, as they were before it
        "again"   (T, N)  attention of the same tokens to the slots as they are after it
        "joined"  (T)     length of what so came to each token
        "found"   (N, T)  attention of the slots to its tokens
        "write"   (N, T)  the same times the mean input gate
        "input", "forget" (N, d), "output" (T): the gates; the last, its mean
    """

    def __init__(self, model, keep=2**12, resumed=False):
        """resumed: the memory that the model begins with is not a fresh one."""
        self.model, self.resumed = model, resumed
        self.keep = max(1, keep // model.config.block_size)     # segments
        self.blocks = [block for block in model.blocks if block.write]
        self.segments, self.count = [], 0
        size = model.config.memory_slots, model.config.n_embd
        self.gone = [torch.full(size, float(resumed)) for _ in self.blocks]

    def __enter__(self):
        self.hooks = [self.model.embedding.register_forward_hook(self.saw_tokens)]
        for block in self.blocks:
            self.hooks += [part.register_forward_hook(hook) for part, hook in (
                (block.write.gate, self.saw_gate), (block.write, self.saw_write),
                (block.read.gate, self.saw_gate), (block.read, self.saw_read))]
        return self

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()

    def saw_tokens(self, embedding, args, output):
        self.tokens, self.gates, self.written, self.found = args[0][0].tolist(), [], None, []

    def saw_gate(self, gate, args, output):
        self.gates.append(output)       # a write's of one segment (1, N, 2d), a read's (1, S, T, d)

    def saw_write(self, write, args, output):
        attention, (banks, bank) = write.attention(normed(args[0])), output     # (1, S, N, T)
        input_gate, forget_gate = torch.stack(self.gates, dim=1).chunk(2, -1)   # (1, S, N, d) each
        self.written = {"found": attention, "write": attention * input_gate.mean(-1, keepdim=True),
                        "input": input_gate, "forget": forget_gate}
        self.gates, self.after = [], torch.cat((banks[:, 1:], bank[:, None]), dim=1)

    def saw_read(self, read, args, joined):
        if self.written:    # or a token is generated, in a segment that is not full
            x, banks = args
            found = self.written | {
                "read": read.attention(x, normed(banks)),                       # (1, S, T, N)
                "again": read.attention(x, normed(self.after)),
                "output": self.gates[0].mean(-1), "joined": joined.norm(dim=-1)}
            self.found.append({name: value[0].float().cpu() for name, value in found.items()})
            if len(self.found) == len(self.blocks):
                length = joined.size(2)
                for s in range(joined.size(1)):
                    self.add(self.tokens[s * length:(s + 1) * length],
                             {name: [block[name][s] for block in self.found] for name in found})
        self.gates, self.written = [], None

    def add(self, tokens, found):
        self.count += 1
        # new lists, not the old ones changed: /load keeps a shallow copy to go back to
        self.segments = [*self.segments, {"number": self.count, "tokens": tokens} | found]
        if len(self.segments) > self.keep:
            oldest, *self.segments = self.segments
            self.gone = [opened * shares.sum(1, keepdim=True) + kept * gone
                         for opened, shares, kept, gone in zip(
                             oldest["input"], oldest["found"], oldest["forget"], self.gone)]

    def source(self, block, until=None):
        """(N, 1 + tokens): how much a block's slots hold of each token of the segments kept, those
        up to number `until` of them: the share it was found with, times the input gate then and
        all forget gates since, a mean over channels. The first column stands for all that was read
        before. (A row may have a sum above 1, as gates do that add without forgetting.)"""
        left, columns = 1.0, []
        for segment in self.segments[:until][::-1]:
            opened = (segment["input"][block] * left).mean(-1, keepdim=True)    # (N, 1)
            columns.append(segment["found"][block] * opened)
            left = segment["forget"][block] * left
        columns.append((self.gone[block] * left).mean(-1, keepdim=True))
        return torch.cat(columns[::-1], dim=1)

    def kept(self):
        """Tokens of the segments kept, in the order of the columns of `source`."""
        return [token for segment in self.segments for token in segment["tokens"]]


def texts_of(encoding, tokens):
    """The text of each token; a letter of several tokens is the last one's, "" the others'."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode
    return [printable(decode(encoding.decode_single_token_bytes(token))) for token in tokens]


LEAST = 0.05    # what is written, held or read less than this counts as nothing


def held(recorder, texts, source):
    """{phrase: share} of the two tokens that a slot holds most of.

    A phrase is a token and those before it in its sentence, at most seven. `source` (1 + tokens) is
    the slot's row, `texts` are those of the recorder's tokens.
    """
    found, earlier = {}, "an earlier session" if recorder.resumed else "far back"
    for column in source.topk(min(2, len(source))).indices.tolist():
        text = "".join(texts[max(0, column - 7):column])
        phrase = re.split(r"[.?!] ", text)[-1].strip() or text.strip()
        if source[column] > LEAST:
            found[phrase if column else f"(text of {earlier})"] = float(source[column])
    return found


def mean_gates(segment, blocks=slice(None)):
    return " ".join(f"{name} {torch.stack(segment[name])[blocks].mean():.2f}"
                    for name in ("input", "forget", "output"))


def show(encoding, recorder):
    """Print the segments, their tokens marked by how strongly a slot wrote them, beside the
    strongest of all, and what the last token read."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    shades = (None, 254, 153, 117, 75, 33)  # light to dark: told apart without colour vision
    texts = texts_of(encoding, recorder.kept())
    rest, written = iter(texts), [torch.stack(segment["write"]).amax(dim=(0, 1))
                                  for segment in recorder.segments]
    strongest = torch.cat(written).max().clamp(min=LEAST)
    for segment, strengths in zip(recorder.segments, written):
        line, most = "", 0.0
        for strength in strengths.tolist():
            text, most = next(rest), max(strength, most)
            level = min(5, int(6 * most / strongest))
            if text and colour and level:
                text = f"\033[48;5;{shades[level]}m\033[30m{text}\033[0m"
            elif text and level > 2:
                text = f"{text}[{most:.1f}]"
            line, most = line + text, 0.0 if text else most
        print(f"segment {segment['number']} | mean gates {mean_gates(segment)}\n {line.strip()}")
    print("\nthe answer was read from (block, slot, attention, what the slot holds)")
    for i, read in enumerate(recorder.segments[-1]["read"]):
        sources = recorder.source(i, until=-1)      # as the last segment found it
        for slot in read[-1].topk(min(3, read.size(1))).indices.tolist():
            if read[-1][slot] > LEAST:
                words = held(recorder, texts, sources[slot]) or ["little of any word"]
                print(f"  {i + 1}  {slot:2}  {read[-1][slot]:.2f}  {' | '.join(words)}")


def show_memory(encoding, reader):
    """A line for each slot that holds something: block, slot, and the words it goes back to."""
    texts, lines = texts_of(encoding, reader.recorder.kept()), []
    for i in range(len(reader.recorder.blocks)):
        for slot, row in enumerate(reader.recorder.source(i)):
            if words := held(reader.recorder, texts, row):
                lines.append(f"  block {i + 1}, slot {slot:2}: " + " | ".join(
                    f"{text} ({share:.2f})" for text, share in words.items()))
    print("\n".join(lines) or (
        "  no slot holds much of any one word" if reader.recorder.segments else
        "  nothing to trace: an LM2's bank is written when a segment is full"))
    if reader.rest:
        print(f"  not yet written: {printable(encoding.decode(reader.rest).strip())}")


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>What the memory did</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 1em auto; max-width: 75em; padding: 0 .7em }
h1 { font-size: 1.3em } h2 { font-size: 1em; margin: .6em 0 .2em }
#controls { position: sticky; top: 0; background: #fff; padding: .4em 0 }
#segment { width: min(28em, 90%) } #value { font-weight: 600; height: 1.4em }
#maps { display: flex; flex-wrap: wrap; gap: 1.5em }
table { border-collapse: collapse; font-size: 12px } td { width: 14px; height: 15px; padding: 0 }
th { font-weight: normal; text-align: right; padding: 0 .2em; white-space: pre }
td:hover { outline: 2px solid #000 }
</style>
<h1>What the memory did</h1>
<p>Rows are the tokens of a segment, columns the slots of a block's bank. Darker is more; point at
or touch a cell for its number.</p>
<div id="controls">
<label>segment <input id="segment" type="range" min="0" value="0" oninput="draw()"></label>
<label>block <select id="block" oninput="draw()"></select></label>
<div id="gates"></div><div id="value"></div></div>
<div id="maps"></div>
<script>
const data = DATA;
const $ = id => document.getElementById(id);
const names = {read: "Read before the update: each token's attention to the slots",
  write: "Written: each slot's attention to the tokens, times its input gate",
  again: "Read after the update: the same tokens, the new bank"};
function cell(token, slot, v) {  // one hue, light to dark: seen without colour vision, and in grey
  const colour = `rgb(${255 - 247 * v}, ${255 - 207 * v}, ${255 - 148 * v})`;
  return `<td style="background: ${colour}" title="${token}, slot ${slot}: ${v.toFixed(2)}"></td>`;
}
function draw() {
  const s = data[$("segment").value], block = s.blocks[$("block").value];
  $("gates").textContent = `segment ${s.number}, mean gates: ${block.gates}`;
  $("maps").innerHTML = Object.keys(names).map(kind => `<div><h2>${names[kind]}</h2><table>
    <tr><th></th>${block[kind].map((_, slot) => `<th>${slot}</th>`).join("")}</tr>` +
    s.tokens.map((token, t) => `<tr><th>${token}</th>` + block[kind].map((column, slot) =>
      cell(token, slot, column[t] / 100)).join("")).join("") +
    "</table></div>").join("");
}
$("maps").onmouseover = $("maps").onclick = e => $("value").textContent = e.target.title;
$("segment").max = data.length - 1;
data[0].blocks.forEach((_, b) => $("block").add(new Option(b + 1, b)));
draw();
</script></html>
"""


def write_html(encoding, recorder, path):
    """A page of heat maps, tokens by slots, for every segment and block; needs nothing else."""
    texts = iter(texts_of(encoding, recorder.kept()))
    data = [{"number": segment["number"],
             "tokens": [html.escape(next(texts)) for _ in segment["tokens"]],
             "blocks": [{"gates": mean_gates(segment, i)} | {    # in hundredths, slots by tokens
                 kind: (100 * (block[i] if kind == "write" else block[i].T)).round().int().tolist()
                 for kind, block in segment.items() if kind in ("read", "again", "write")}
                 for i in range(len(recorder.blocks))]} for segment in recorder.segments]
    with open(path, "w", encoding="utf-8") as file:
        file.write(PAGE.replace("DATA", json.dumps(data), 1))


# --------------------------------------------------------------------------------------------
# Asking

EXAMPLES = [example for task in babi.QUESTIONS.values() for example in task.examples]
ASKING = {example.split()[0] for example in EXAMPLES}       # Where, What, Who, Is, How
# {in small letters: as the stories spell it}
SPELLING = {word.lower(): word.lower()
            for text in itertools.chain(EXAMPLES, *babi.SENTENCES.values())
            for word in re.findall(r"(?<![{\w])[A-Za-z]+", text)} | {n.lower(): n for n in NAMES}


def sentences(typed):
    """What a person typed, as sentences that the stories could have: facts with a full stop,
    questions, with or without it, with their mark, and known words in their spelling."""
    found = []
    for text in re.split(r"(?<=[.?!])\s+", typed.strip()):
        words = re.sub(r"[A-Za-z]+", lambda word: SPELLING.get(word[0].lower(), word[0]),
                       text.rstrip(" .?!"))
        if words:
            first = words.split()[0]
            if first in SPELLING:
                words = words[0].upper() + words[1:]
            asks = text.endswith("?") or first.capitalize() in ASKING
            found.append(words + ("?" if asks else "!" if text.endswith("!") else "."))
    return found


def answer(reader, encoding, tasks, question):
    """What the model says to the question, up to its full stop, if that is any answer to it."""
    said = reader.generate(encoding.encode_ordinary(tidy(question)), 16, temperature=0)
    said, asked = encoding.decode(said).split(".")[0].strip(), question.split()[0]
    known = {"Where": PLACES, "Who": PEOPLE, "Is": {"yes", "no", "maybe"}, "How": babi.NUMBERS,
             "What": {*PLACES, "nothing"}}.get(asked, ())
    if not tasks or said in known or asked == "What" and {*said.split(",")} <= {*babi.OBJECTS}:
        return printable(said)
    return f'the model has no answer to that (it says "{printable(said)}")'


def hint(encoding, tasks, text, names=None):
    """Print what the model cannot know: words, a question's form, a name that was never read."""
    words, told = {*re.findall(r"[A-Za-z]+", text)}, ""
    unknown = sorted(word for word in words if len(encoding.encode_ordinary(f" {word}")) > 1)
    forms = {babi.shape(form, task) for task in tasks for form in babi.QUESTIONS[task].examples}
    asked = [name for name in NAME.findall(text) if name not in PLACES] or NAME.findall(text)
    missing = [name for name in asked if names is not None and name not in names]
    if unknown:
        told = f"not among the words of the model's stories: {', '.join(unknown)}"
    elif text.endswith("?") and not any(babi.shape(text, task) in forms for task in tasks):
        told = "the model never saw such a question; it learned " + ", ".join(dict.fromkeys(
            repr(babi.QUESTIONS[task].examples[0]) for task in tasks))
    elif text.endswith("?") and missing:
        told = f"nothing that was read names {' or '.join(missing)}"
    if tasks and told:
        print(f"hint: {printable(told)}", file=sys.stderr)


def reply(reader, encoding, tasks, question):
    """Print the answer, what the model says without its bank, and a hint where there is one."""
    print(answer(reader, encoding, tasks, question))
    length = len(reader.rest) + len(encoding.encode_ordinary(tidy(question)))
    fits = length <= reader.model.config.block_size     # into the segment that was begun
    if reader.model.n_banks and fits and reader.count == len(reader.rest):
        print("no memory needed: all that was read is in the current segment")
    elif reader.model.n_banks:
        blank, fresh = copy.copy(reader), reader.model.fresh_memory(1)
        blank.memory = reader.memory._replace(banks=fresh.banks)
        blank.rest = reader.rest if fits else []
        print(f"bank wiped: {answer(blank, encoding, tasks, question)}")
    hint(encoding, tasks, question, reader.names)


def hear(reader, encoding, tasks, line):
    """Read the facts of a line and answer its questions, in order; returns the last sentence."""
    for sentence in sentences(line) if tasks else [line]:
        if sentence.endswith("?"):
            reply(reader, encoding, tasks, sentence)
        else:
            read_text(reader, encoding, tidy(sentence))
            hint(encoding, tasks, sentence)
    return sentence


HELP = """type facts and questions; and
  /memory      what the slots hold
  /far N       read N tokens of noise
  /load FILE   read a text
  /reset       forget all
  /quit        leave, as Ctrl-C and Ctrl-D do"""


def chat(reader, encoding, tasks, flags):
    """Facts, questions and commands, line by line, until the end of the input."""
    terminal = sys.stdin.isatty()
    print("Type facts and questions, or /help.\n" if terminal else "", end="")
    while True:
        try:
            line = input("> " if terminal else "").strip("\ufeff").strip()
        except (EOFError, KeyboardInterrupt):
            print("\n" if terminal else "", end="")
            break
        except UnicodeDecodeError:
            raise BadInput("standard input is not a text in UTF-8") from None
        command, _, rest = line.partition(" ")
        if command == "/quit":
            break
        elif command == "/help":
            print(HELP)
        elif command == "/memory":
            show_memory(encoding, reader)
        elif command == "/reset":
            reader = Reader(reader.model, Recorder(reader.model))
        elif command == "/far" and re.fullmatch(" *[0-9]{1,9}", rest):
            read_noise(reader, encoding, flags, int(rest))
        elif command == "/load":
            further, path = copy.copy(reader), rest.strip()
            further.recorder = copy.copy(reader.recorder)
            try:
                print(read_stream(further, encoding, path, tidy if tasks else str))
                reader = further
            except (OSError, ValueError) as error:  # all is as it was
                why = f"{path}: {error.strerror}" if isinstance(error, OSError) else error
                print(f"error: {printable(why)}")
        elif command.startswith("/"):
            print(f"error: no command {printable(line)}; /help lists them")
        elif sentences(line):
            hear(reader, encoding, tasks, line)


def check(flags):
    """BadInput for flags that do not go together, before anything is loaded or read."""
    ask, prompt, story = flags.ask, flags.prompt, flags.story
    for wrong, why in (
            (ask is not None and not sentences(ask), "--ask is empty; give a question"),
            (prompt == "", "--prompt is empty; give the beginning of a text"),
            (ask and prompt, "--prompt continues a text, --ask answers a question: give one"),
            ((flags.show or flags.html) and not ask,
             "--show and --html look at an answer; give a question with --ask"),
            (0 < flags.temperature < 1e-6, "--temperature must be 0 or at least 1e-6"),
            (len(story.split()) == 1 and not os.path.exists(story), f"--story: no file {story}"),
            (flags.html and os.path.realpath(flags.html) == os.path.realpath(flags.save_memory),
             "--html and --save_memory name the same file")):
        if wrong:
            raise BadInput(why)


def main():
    babi.install_error_hook()
    flags = babi.parse_flags(Flags(), __doc__)
    check(flags)
    checkpoint = load_checkpoint(babi.find_checkpoint(flags.ckpt))
    model, encoding = LM2.load(checkpoint, babi.find_device(flags.device))
    try:
        trained = checkpoint["train"]["flags"]
        tasks = () if trained["data"] else babi.parse_tasks(trained["task"])
    except (AttributeError, KeyError, TypeError):
        raise BadInput(f"{checkpoint['path']} does not say what it was trained on") from None
    if not flags.ckpt:
        print(f"model: {checkpoint['path']}", file=sys.stderr)
    tasks = [name for task in tasks for name in (task, *babi.TASKS[task].along)]
    clean = tidy if tasks else str
    reader = load_memory(model, flags.load_memory) if flags.load_memory else Reader(model)
    chats = flags.prompt is None and flags.ask is None and not flags.save_memory
    if flags.show or flags.html or chats:
        reader.recorder = Recorder(model, resumed=bool(flags.load_memory))
        if not reader.recorder.blocks and not chats:
            raise BadInput("--show and --html look at an LM2's banks; this model has none")

    if os.path.exists(flags.story):
        read_stream(reader, encoding, flags.story, clean)
    elif flags.story:
        story = " ".join(sentences(flags.story)) if tasks else flags.story
        read_text(reader, encoding, clean(story))
    if flags.read:
        print(read_stream(reader, encoding, flags.read, clean))
    if flags.far:
        read_noise(reader, encoding, flags, flags.far)
    if flags.save_memory:
        save_memory(reader, flags.save_memory)

    torch.manual_seed(flags.seed)
    if flags.prompt is not None:
        said = reader.generate(encoding.encode_ordinary(flags.prompt), flags.max_new_tokens,
                               flags.temperature, flags.top_k)
        print(*map(printable, (flags.prompt + encoding.decode(said)).split("\n")), sep="\n")
    elif flags.ask is not None:
        question = hear(reader, encoding, tasks, flags.ask.strip().rstrip("?") + "?")
        if flags.show or flags.html:    # once more in one piece, for the record
            tokens = reader.rest + encoding.encode_ordinary(tidy(question))
            with torch.no_grad(), reader.recorder:
                model(torch.tensor([tokens], device=model.device), memory=reader.memory)
        if flags.show:
            show(encoding, reader.recorder)
        if flags.html:
            write_html(encoding, reader.recorder, flags.html)
            print(f"page: {printable(flags.html)}")
    elif chats:
        chat(reader, encoding, tasks, flags)


if __name__ == "__main__":
    main()
