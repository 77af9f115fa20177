"""Use a trained model: tell it a story of any length, ask, and see what its memory did.

    python sample.py                                   # chat: type facts and questions, /help
    python sample.py --story="Mary went to the kitchen. John got up." --ask="Where is Mary?"
    python sample.py --read=book.txt --save_memory=book.pt              # read once ...
    python sample.py --load_memory=book.pt --ask="Where is Mary?"       # ... ask often
    python sample.py --story=story.txt --ask="Where is Mary?" --show --html=memory.html
    python sample.py --study                           # how an update moves the attention
    python sample.py --bench                           # constant memory, constant time: measure it
    python sample.py --prompt="Once upon a time" --temperature=0.8 --top_k=50

A text is read segment by segment; what the model knows of it is its memory, which does not grow.
"""
import codecs
import contextlib
import hashlib
import io
import json
import os
import random
import re
import sys
import time
from collections import deque
from dataclasses import dataclass, replace

import torch

import babilong_tiny as babi
from babilong_tiny import die, die_unless_new, flag, or_die, parse_flags
from lm2 import LM2, Memory, load_checkpoint, normed


@dataclass
class Flags:
    ckpt: str = flag("out/ckpt.pt", "checkpoint written by train.py")
    # what to read
    story: str = flag("", "a story, or a file that holds one")
    read: str = flag("", "a text of any size to read in a stream; - for standard input")
    load_memory: str = flag("", "begin with this saved memory instead of a fresh one")
    save_memory: str = flag("", "save the memory here after reading")
    # what to do then
    ask: str = flag(None, "a question; without it facts and questions come from the terminal")
    prompt: str = flag(None, "a text to continue instead")
    max_new_tokens: int = flag(100, "tokens to continue the text by", 1)
    temperature: float = flag(0.8, "randomness of the continuation, 0 = always the likeliest token")
    top_k: int = flag(50, "choose among the k likeliest tokens only, 0 = among all", 0)
    seed: int = flag(0, "seed of the continuation", 0, 2**63 - 1)
    # what to see
    show: bool = flag(False, "print what the slots wrote and, for the answer, read")
    html: str = flag("", "write the same as a page for a browser to this file")
    study: bool = flag(False, "show how an update of the bank moves the attention (qa1)")
    bench: bool = flag(False, "measure memory and time over 1,000,000 tokens")
    device: str = flag("cpu", "auto, cpu, cuda or mps")


# --------------------------------------------------------------------------------------------
# Reading

def tidy(text):
    """The text as the generator writes it: one space between words and one before the first."""
    return " " + " ".join(text.split()) if text.strip() else ""


class Reader:
    """A document as far as it was read: the memory after its full segments, the tokens since."""

    def __init__(self, model, memory=None, rest=(), count=0):
        self.model = model
        self.memory = model.fresh_memory(1) if memory is None else memory
        self.rest, self.count = list(rest), count

    @torch.no_grad()
    def read(self, tokens):
        self.rest += tokens
        self.count += len(tokens)
        size = self.model.config.block_size
        full = len(self.rest) // size * size
        if full:
            segments = torch.tensor([self.rest[:full]], device=self.model.device)
            self.memory = self.model.read(segments, self.memory, last=1)[1]
            del self.rest[:full]

    def generate(self, tokens, *args, **kwargs):
        """What the model says after all it read and these tokens; it is none the wiser after."""
        prompt = torch.tensor([self.rest + tokens], device=self.model.device)
        said = self.model.generate(prompt, *args, memory=self.memory, **kwargs)
        return said[0, prompt.size(1):].tolist()


def pieces(file, size=2**16):
    """The text of a binary file in pieces that end before a space. UnicodeDecodeError if it is
    not UTF-8. However long the file, only one piece is held."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    decode, rest = io.IncrementalNewlineDecoder(decoder, translate=True).decode, ""
    while chunk := file.read(size):
        rest += decode(chunk)
        cut = len(rest) if len(rest) > 16 * size else max(rest.rfind(" "), rest.rfind("\n"), 0)
        if rest[:cut]:
            yield rest[:cut]
        rest = rest[cut:]
    if rest + decode(b"", final=True):
        yield rest


def read_stream(reader, encoding, name, clean):
    """Let the reader read a file, or standard input for "-"; progress goes to a terminal."""
    size = 0 if name == "-" else os.path.getsize(name)
    start = shown = time.time()
    done, before = 0, reader.count
    with contextlib.nullcontext(sys.stdin.buffer) if name == "-" else open(name, "rb") as file:
        for text in pieces(file):
            reader.read(encoding.encode_ordinary(clean(text)))
            done += len(text.encode())
            if sys.stderr.isatty() and time.time() - shown > 0.5:
                shown = time.time()
                speed = (reader.count - before) / (shown - start)
                left = f", {(size / done - 1) * (shown - start):.0f} s left" if size else ""
                print(f"\r\033[K{reader.count - before:,} tokens, {speed:,.0f} tokens/s{left}",
                      end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    seconds = time.time() - start
    return f"read {reader.count - before:,} tokens in {seconds:.1f} s"


def fingerprint(model):
    """A name for these very weights: a memory is of use to the model that wrote it alone."""
    digest = hashlib.sha256()
    for name, weight in model.state_dict().items():
        digest.update(name.encode() + weight.cpu().numpy().tobytes())
    return digest.hexdigest()


def save_memory(reader, path):
    """Write what the reader knows, to the side first and then into place."""
    with babi.replaced(path, "wb") as file:
        torch.save({"banks": reader.memory.banks, "tail": reader.memory.tail, "rest": reader.rest,
                    "count": reader.count, "model": fingerprint(reader.model)}, file)


def load_memory(model, path):
    """A `Reader` that goes on where the saved one stood. ValueError, in one line, if it cannot."""
    if not os.path.isfile(path):
        raise ValueError(f"no memory {path}; save one with --read and --save_memory")
    try:
        saved = torch.load(path, map_location=model.device, weights_only=True)
        memory = Memory(saved["banks"], saved["tail"])
        reader = Reader(model, memory, saved["rest"], saved["count"])
        owner = saved["model"]
    except Exception:  # torch and pickle raise a dozen kinds
        raise ValueError(f"{path} is no memory that sample.py saved, or it was cut short") from None
    if owner != fingerprint(model) or [m.shape for m in memory] != \
            [m.shape for m in model.fresh_memory(1)]:
        raise ValueError(f"{path} belongs to another model; read the text anew with this one")
    return reader


# --------------------------------------------------------------------------------------------
# Seeing

class Recorder:
    """Watches a model read and write its banks, document by document; changes nothing.

    `segments` gets a dictionary for each segment (the last `keep` of them), with its "number",
    "tokens" (T) and, as a list over blocks with memory,
        "read"    (T, N)  attention of its tokens to the slots, as they were before it
        "again"   (T, N)  attention of the same tokens to the slots as they are after it
        "joined"  (T)     length of what so came to each token
        "write"   (N, T)  attention of the slots to its tokens, times the mean input gate
        "input", "forget" (N), "output" (T): mean openness of the gates
    `source`, of each block (N, tokens of the segments kept), traces what the slots hold to the
    tokens it was written from, with what was forgotten taken away.
    """

    def __init__(self, model, keep=64):
        self.model, self.keep = model, keep
        self.blocks = [block for block in model.blocks if block.read]
        self.forget()

    def __enter__(self):
        self.watch()
        return self

    def __exit__(self, *_):
        self.look_away()

    def look_away(self):
        for hook in self.hooks:
            hook.remove()

    def forget(self):
        """Begin a new document."""
        slots = self.model.config.memory_slots
        self.segments, self.count = deque(maxlen=self.keep), 0
        self.source = [torch.zeros(slots, 0) for _ in self.blocks]

    def watch(self):
        self.found = [{} for _ in self.blocks]      # what each block did last
        self.done = [deque() for _ in self.blocks]  # and its segments that others have yet to see
        self.hooks = [self.model.embedding.register_forward_hook(self.saw_tokens)]
        for i, block in enumerate(self.blocks):
            self.hooks += [block.read.register_forward_hook(self.saw_read(i)),
                           block.write.register_forward_hook(self.saw_write(i))]
            gates = {"output": block.read.output_gate, "input": block.write.input_gate,
                     "forget": block.write.forget_gate}
            self.hooks += [gate.register_forward_hook(self.saw_gate(i, name))
                           for name, gate in gates.items() if gate]

    def saw_tokens(self, module, args, output):
        self.tokens = args[0][0].tolist()

    def saw_gate(self, i, name):
        def hook(module, args, output):  # its mean, of each token or each slot
            self.found[i][name] = output[0].mean(-1).float().cpu()
        return hook

    def saw_read(self, i):
        def hook(module, args, output):
            self.found[i] |= {"x": args[0], "joined": output[0].norm(dim=-1).float().cpu()}
        return hook

    def saw_write(self, i):
        def hook(module, args, new):
            x, (y, bank), read = self.found[i]["x"], args, self.blocks[i].read
            attention = module.attention(module.norm(y), bank)[0].float().cpu()     # (N, T)
            found = {"input": torch.ones(bank.size(1)), "forget": torch.ones(bank.size(1)),
                     "output": torch.ones(x.size(1))} | self.found[i]
            self.done[i].append({name: found[name] for name in ("joined", "input", "forget",
                                                                "output")} | {
                "read": read.attention(x, normed(bank))[0].float().cpu(),
                "again": read.attention(x, normed(new))[0].float().cpu(),
                "write": attention * found["input"][:, None]})
            if i == len(self.blocks) - 1:
                self.end_segment([done.popleft() for done in self.done])
        return hook

    def end_segment(self, found):
        self.count += 1
        n_new = len(found[0]["joined"])
        self.segments.append({"number": self.count, "tokens": self.tokens[:n_new]}
                             | {name: [block[name] for block in found] for name in found[0]})
        del self.tokens[:n_new]
        n_kept = len(self.text())  # the oldest segment may be gone
        self.before = [source[:, max(0, source.size(1) + n_new - n_kept):]
                       for source in self.source]
        self.source = [torch.cat((source * block["forget"][:, None], block["write"]), dim=1)
                       for source, block in zip(self.before, found)]

    def text(self):
        """Tokens of the segments kept, in the order of the columns of `source`."""
        return [token for segment in self.segments for token in segment["tokens"]]

    def traced(self, row=-1):
        """(tokens before the last segment): where what the row's token read came from, sum 1.

        Over all blocks, each weighted with the length of what it joined to the decoder.
        """
        last, total = self.segments[-1], 0.0
        for i, source in enumerate(self.before):
            total = total + last["joined"][i][row] * (last["read"][i][row] @ source)
        return total / total.sum().clamp(min=1e-9)


def phrase(encoding, tokens, at, words=6):
    """The token at a place and a few before it, back to the sentence's beginning, as text."""
    text = encoding.decode(tokens[max(0, at - words):at + 1])
    return re.split(r"[.?!] ", text)[-1].strip() or text.strip()


def held(encoding, tokens, source, least):
    """[(phrase, share)] of the two tokens a slot holds most of, those of at least a share."""
    return [(phrase(encoding, tokens, at), float(source[at]))
            for at in source.topk(min(2, len(source))).indices.tolist() if source[at] > least]


def show(encoding, recorder):
    """Print the segments, tokens marked by how strongly a slot wrote them, and the last read."""
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    shades = (None, 254, 153, 117, 75, 33)  # light to dark: told apart without colour vision
    for segment in recorder.segments:
        strength = torch.stack(segment["write"]).amax(dim=(0, 1)).tolist()
        line = ""
        for token, s in zip(segment["tokens"], strength):
            text = encoding.decode([token])
            level = min(5, int(6 * s))
            if colour and level:
                text = f"\033[48;5;{shades[level]}m\033[30m{text}\033[0m"
            elif level > 2:
                text = f"{text}[{s:.1f}]"
            line += text
        gates = " ".join(f"{name} {torch.stack(segment[name]).mean():.2f}"
                         for name in ("input", "forget", "output"))
        print(f"segment {segment['number']} | mean gates {gates}\n {line.strip()}")
    last = recorder.segments[-1]
    tokens = recorder.text()
    print("\nthe answer was read from (block, slot, attention, what the slot holds)")
    for i, read in enumerate(last["read"]):
        for slot in read[-1].topk(min(3, read.size(1))).indices.tolist():
            words = dict(held(encoding, tokens, recorder.before[i][slot], least=0.05))
            if read[-1][slot] > 0.05:
                print(f"  {i + 1}  {slot:2}  {read[-1][slot]:.2f}  "
                      + (" | ".join(words) or "nothing yet"))


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>What the memory did</title>
<style>
body { font: 15px/1.4 system-ui, sans-serif; margin: 1em auto; max-width: 75em; padding: 0 .7em }
h1 { font-size: 1.3em } h2 { font-size: 1em; margin: .6em 0 .2em }
#controls { position: sticky; top: 0; background: #fff; padding: .4em 0; z-index: 1 }
#segment { width: min(28em, 90%) } #value { font-weight: 600; min-height: 1.4em }
#maps { display: flex; flex-wrap: wrap; gap: 1.5em }
table { border-collapse: collapse; font-size: 12px } td { width: 14px; height: 15px; padding: 0 }
th { font-weight: normal; text-align: right; padding-right: .4em; white-space: pre }
thead th { text-align: center; padding: 0 } td:hover { outline: 2px solid #000 }
</style>
<h1>What the memory did</h1>
<p>Rows are the tokens of a segment, columns the slots of a block's bank. Darker is more; point at
or touch a cell for its number.</p>
<div id="controls">
<label>segment <input id="segment" type="range" min="0" value="0"></label> <b id="where"></b>
<label>block <select id="block"></select></label>
<div id="gates"></div><div id="value"></div></div>
<div id="maps"></div>
<script>
const data = DATA;
const $ = id => document.getElementById(id);
const names = {read: "Read before the update: each token's attention to the slots",
  write: "Written: each slot's attention to the tokens, times its input gate",
  again: "Read after the update: the same tokens, the new bank"};
const level = c => parseInt(c, 36) / 35;
function shade(v) {  // one hue, light to dark: told apart without colour vision, and in grey
  return `rgb(${255 - 247 * v}, ${255 - 207 * v}, ${255 - 148 * v})`;
}
function draw() {
  const s = data[$("segment").value], b = +$("block").value, block = s.blocks[b];
  $("where").textContent = `${s.number} of ${data[data.length - 1].number}`;
  $("gates").textContent = "mean gates: " + block.gates;
  $("value").textContent = "";
  $("maps").replaceChildren(...Object.entries(names).map(([kind, title]) => {
    const box = document.createElement("div"), table = document.createElement("table");
    const heading = document.createElement("h2");
    heading.textContent = title;
    const head = table.createTHead().insertRow(), body = table.createTBody();
    head.append(document.createElement("th"));
    block[kind].forEach((_, slot) => {
      const cell = document.createElement("th");
      cell.textContent = slot;
      head.append(cell);
    });
    s.tokens.forEach((token, t) => {
      const row = body.insertRow(), label = document.createElement("th");
      label.textContent = token;
      row.append(label);
      block[kind].forEach((column, slot) => {
        const cell = row.insertCell(), v = level(column[t]);
        cell.style.background = shade(v);
        cell.title = `"${token}", slot ${slot}: ${v.toFixed(2)}`;
        cell.onclick = cell.onmouseenter = () => $("value").textContent = cell.title;
      });
    });
    box.append(heading, table);
    return box;
  }));
}
$("segment").max = data.length - 1;
data[0].blocks.forEach((_, b) => $("block").add(new Option(b + 1, b)));
$("segment").oninput = $("block").onchange = draw;
draw();
</script></html>
"""


def write_html(encoding, recorder, path):
    """A page of heat maps, tokens by slots, for every segment and block; needs nothing else."""
    digits = "0123456789abcdefghijklmnopqrstuvwxyz"

    def columns(weights):  # (T, N) -> for each slot a string, a digit to base 36 for each token
        return ["".join(digits[min(35, round(35 * w))] for w in slot)
                for slot in weights.T.tolist()]

    data = []
    for segment in recorder.segments:
        blocks = [{"read": columns(segment["read"][i]), "again": columns(segment["again"][i]),
                   "write": columns(segment["write"][i].T),
                   "gates": ", ".join(f"{name} {segment[name][i].mean():.2f}"
                                      for name in ("input", "forget", "output"))}
                  for i in range(len(recorder.blocks))]
        data.append({"number": segment["number"], "blocks": blocks,
                     "tokens": [encoding.decode([t]) for t in segment["tokens"]]})
    text = json.dumps(data).replace("<", "\\u003c")
    with open(path, "w", encoding="utf-8") as file:
        file.write(PAGE.replace("DATA", text, 1))


# --------------------------------------------------------------------------------------------
# The paper's study (its Figure 6) in miniature

def study(model, encoding, picture):
    """What the "?" of a question reads before and after an update of the bank, and without one.

    Segment 1 tells where Mary and John are, segment 2 that Mary moved; the rest is noise. In the
    third the same question is asked of three banks: as segment 1 left it, as segment 2 did, and
    one frozen after segment 1 while segment 2 went by.
    """
    size, noise = model.config.block_size, babi.make_noise(encoding, 0)(random.Random(0))

    def segment(*facts):
        tokens = encoding.encode_ordinary(" " + " ".join(facts)) if facts else []
        while len(tokens) < size:
            tokens += next(noise)
        return tokens[:size]

    old, other, new = ("Mary went to the kitchen.", "John travelled to the office.",
                       "Mary moved to the garden.")
    first, second, third = segment(old, other), segment(new), segment()
    length = {fact: len(encoding.encode_ordinary(f" {fact}")) for fact in (old, other, new)}
    facts = {old: 0, other: length[old], new: size}  # where each begins
    questions = ("Where is Mary?", "Where is John?")
    banks = ("before the update", "after the update", "bank frozen")
    shares, answers = {}, {}
    for question in questions:
        asked = encoding.encode_ordinary(f" {question}")
        for bank in banks:
            with torch.no_grad(), Recorder(model) as recorder:
                reader = Reader(model)
                reader.read(list(first))
                if bank != "before the update":
                    frozen = reader.memory.banks
                    reader.read(list(second))
                    if bank == "bank frozen":
                        reader.memory = reader.memory._replace(banks=frozen)
                        recorder.source = recorder.before
                prompt = third[:size - len(asked)] + asked
                model(torch.tensor([prompt], device=model.device), memory=reader.memory)
                traced = recorder.traced()
                answers[question, bank] = encoding.decode(
                    reader.generate(prompt, 2, temperature=0)).split(".")[0].strip()
            for fact, start in facts.items():
                shares[question, bank, fact] = float(traced[start:start + length[fact]].sum())
            shares[question, bank, "noise"] = 1 - sum(shares[question, bank, f] for f in facts)
    for question in questions:
        print(f"\n{question:32}" + "".join(f"{bank:>19}" for bank in banks))
        for fact in (*facts, "noise"):
            row = [shares[question, bank, fact] for bank in banks]
            print(f"  {fact:30}" + "".join(f"{share:19.2f}" for share in row))
        print(f"  {'answer':30}" + "".join(f"{answers[question, bank]:>19}" for bank in banks))
    print("\nof what the question's last token reads, the share written at each fact's words"
          "\n(at noise: a later word of its segment, where attention had gathered the fact)")
    plt = babi.matplotlib()
    if not plt:
        return
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), layout="constrained", sharey=True)
    for axis, question in zip(axes, questions):
        for i, (bank, hatch) in enumerate(zip(banks, ("", "//", ".."))):
            heights = [shares[question, bank, fact] for fact in (*facts, "noise")]
            axis.bar([x + 0.27 * i for x in range(4)], heights, 0.25, label=bank, hatch=hatch)
        axis.set(title=question, ylim=(0, 1), xticks=[0.27, 1.27, 2.27, 3.27])
        axis.set_xticklabels([fact.replace(" to the ", "\nto the ") for fact in (*facts, "noise")])
    axes[0].set_ylabel("share of the read attention")
    axes[1].legend(loc="upper right")
    with or_die(f"{picture}: "):
        figure.savefig(picture, dpi=130)
    print(f"picture: {picture}")


# --------------------------------------------------------------------------------------------
# Constant memory, constant time

def bench(model, encoding, n_read=1_000_000, n_generate=4096):
    """Read and generate at length, and print ratios taken in this one run."""
    try:
        import resource
    except ImportError:
        die("--bench measures memory with Python's resource module, which Windows does not have")
    noise, reader, times = babi.make_noise(encoding, 0)(random.Random(0)), Reader(model), []

    def peak():
        unit = 1 if sys.platform == "darwin" else 1024  # bytes on a Mac, KiB elsewhere
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20

    def read_to(count):
        while reader.count < count:
            tokens = []
            while len(tokens) < 1000:
                tokens += next(noise)
            reader.read(tokens)

    read_to(10_000)
    small = peak()
    for tenth in range(1, 11):
        start, before = time.time(), reader.count
        read_to(10_000 + tenth * n_read // 10)
        times.append((reader.count - before) / (time.time() - start))
        print(f"read {reader.count:,} tokens, {times[-1]:,.0f} tokens/s", flush=True)
    print(f"peak memory after 10,000 tokens {small:.0f} MiB, after all {peak():.0f} MiB: "
          f"ratio {peak() / small:.3f}")
    print(f"tokens/s in the last tenth over the first: {times[-1] / times[0]:.3f}")

    whole = replace(model.config, memory="none", block_size=n_generate + 1)
    for name, decoder in (("LM2", model), ("full window", LM2(whole).to(model.device).eval())):
        tokens, ticks = torch.zeros(1, 1, dtype=torch.long, device=model.device), []
        hook = decoder.norm.register_forward_hook(lambda *_: ticks.append(time.time()))
        decoder.generate(tokens, n_generate, temperature=0)
        hook.remove()
        tenth = n_generate // 10
        first, last = ticks[tenth] - ticks[0], ticks[-1] - ticks[-1 - tenth]
        print(f"{name}: generated {n_generate} tokens, first tenth {1e3 * first / tenth:.2f} ms a "
              f"token, last {1e3 * last / tenth:.2f}: ratio {last / first:.3f}")


# --------------------------------------------------------------------------------------------
# Asking

def answer(reader, encoding, question):
    """What the model says to the question, up to its full stop."""
    said = reader.generate(encoding.encode_ordinary(tidy(question)), 16, temperature=0)
    return encoding.decode(said).split(".")[0].strip()


def hint(encoding, tasks, text):
    """A line on what the model cannot know: words, or a question's form; "" if there is nothing."""
    words = set(re.findall(r"[A-Za-z]+", text))
    unknown = sorted(word for word in words if len(encoding.encode_ordinary(f" {word}")) > 1)
    if unknown and tasks:
        return f"not among the words of the model's stories: {', '.join(unknown)}"
    tasks = [name for task in tasks for name in (task, *babi.TASKS[task].along)]
    known = {babi.shape(example, task) for task in tasks for example in babi.TASKS[task].examples}
    if text.endswith("?") and tasks and not any(babi.shape(text, task) in known for task in tasks):
        return "the model never saw such a question; it learned " + ", ".join(dict.fromkeys(
            repr(babi.TASKS[task].examples[0]) for task in tasks))
    return ""


def reply(reader, encoding, tasks, question, recorder=None, flags=None):
    """Print the answer, and a hint where there is one. A question may come without its mark."""
    question = question.strip().rstrip("?").rstrip() + "?"
    if recorder:
        recorder.look_away()  # what is generated leaves no trace
    print(answer(reader, encoding, question))
    if recorder:
        recorder.watch()
    if recorder and flags:  # once more in one piece, for the record
        tokens = reader.rest + encoding.encode_ordinary(tidy(question))
        reader.model(torch.tensor([tokens], device=reader.model.device), memory=reader.memory)
        if flags.show:
            show(encoding, recorder)
        if flags.html:
            with or_die(f"--html={flags.html}: "):
                write_html(encoding, recorder, flags.html)
            print(f"page: {flags.html}")
    if note := hint(encoding, tasks, question):
        print(f"hint: {note}", file=sys.stderr)


HELP = """type facts, and questions that end with ?; and
  /memory      what the slots hold
  /reset       forget all
  /load FILE   read a text
  /quit        leave, as Ctrl-C and Ctrl-D do"""


def show_memory(encoding, recorder):
    """A line for each slot that holds something: block, slot, and the words it goes back to."""
    tokens, lines = recorder.text(), 0
    for i, source in enumerate(recorder.source):
        for slot, row in enumerate(source):
            words = [f"{text} ({share:.2f})"
                     for text, share in held(encoding, tokens, row, least=0.1)]
            if words:
                lines += 1
                print(f"  block {i + 1}, slot {slot:2}: {' | '.join(words)}")
    if not lines:
        print("  nothing to trace: an LM2's bank is written when a segment is full")


def chat(reader, encoding, tasks, clean, recorder):
    """Facts, questions and commands, line by line, until the end of the input."""
    terminal = sys.stdin.isatty()
    if terminal:
        print("Type facts and questions, or /help.")
    with torch.no_grad():
        while True:
            try:
                line = input("> " if terminal else "").strip()
            except (EOFError, KeyboardInterrupt):
                if terminal:
                    print()
                break
            except UnicodeDecodeError:
                die("standard input is not a text in UTF-8")
            command, _, rest = line.partition(" ")
            if command == "/quit":
                break
            elif command == "/help":
                print(HELP)
            elif command == "/memory":
                show_memory(encoding, recorder)
                if reader.rest:
                    print(f"  not yet written: {encoding.decode(reader.rest).strip()}")
            elif command == "/reset":
                reader = Reader(reader.model)
                recorder.forget()
            elif command == "/load":
                before = Reader(reader.model, reader.memory, reader.rest, reader.count)
                try:
                    print(read_stream(reader, encoding, rest.strip(), clean))
                except (OSError, ValueError) as error:
                    reader = before
                    recorder.forget()
                    reason = getattr(error, "strerror", None) or "not a text in UTF-8"
                    print(f"error: {rest.strip()}: {reason}")
            elif command.startswith("/"):
                print(f"error: no command {command}; /help lists them")
            elif line.endswith("?") and line.strip("? "):
                reply(reader, encoding, tasks, line, recorder)
            elif line.strip("? "):
                line += "" if line.endswith((".", "!")) else "."
                reader.read(encoding.encode_ordinary(tidy(line)))
                if note := hint(encoding, tasks, line):
                    print(f"hint: {note}", file=sys.stderr)


def main():
    babi.calm_streams()
    flags = parse_flags(Flags, __doc__)
    if flags.ask is not None and not flags.ask.strip(" ?\t\n"):
        die("--ask is empty; ask something like --ask=\"Where is Mary?\"")
    if flags.prompt is not None and not flags.prompt:
        die("--prompt is empty; give the beginning of a text")
    if flags.prompt is not None and flags.ask is not None:
        die("--prompt continues a text and --ask answers a question: give one of them")
    if (flags.show or flags.html) and flags.ask is None:
        die("--show and --html look at an answer; give a question with --ask")
    if flags.temperature != 0 and not 1e-6 < flags.temperature < 1e6:
        die(f"--temperature={flags.temperature}: it must be 0 or a number from 1e-6 to 1e6")
    for name in ("story", "read", "load_memory", "save_memory", "ask", "prompt", "show", "html"):
        if (flags.study or flags.bench) and getattr(flags, name):
            die(f"--study and --bench have texts of their own: leave --{name} away")
    for name in ("html", "save_memory"):
        if path := getattr(flags, name):
            die_unless_new(name, path)
    if flags.html and os.path.realpath(flags.html) == os.path.realpath(flags.save_memory or "."):
        die("--html and --save_memory name the same file")
    story = flags.story
    if story and not os.path.exists(story) and len(story.split()) == 1:
        die(f"--story={story}: no such file")
    if flags.read and flags.read != "-" and not os.path.exists(flags.read):
        die(f"--read={flags.read}: no such file")
    try:
        device = babi.find_device(flags.device)
        model, encoding = LM2.load(flags.ckpt, device)
        trained = load_checkpoint(flags.ckpt)["train"]["flags"]
        tasks = () if trained["data"] else babi.parse_tasks(trained["task"])
        reader = load_memory(model, flags.load_memory) if flags.load_memory else Reader(model)
    except ValueError as error:
        die(error)
    except (KeyError, TypeError):
        die(f"{flags.ckpt} does not say what it was trained on; train it anew")
    if (flags.show or flags.html or flags.study) and not any(block.read for block in model.blocks):
        die(f"{flags.ckpt} has no memory to look at: an LM2's banks can be traced")
    clean = tidy if tasks else str

    torch.manual_seed(flags.seed)
    if flags.bench:
        bench(model, encoding)
        return
    if flags.study:
        study(model, encoding, os.path.join(os.path.dirname(flags.ckpt), "study.png"))
        return
    asks = flags.prompt is None and flags.ask is None and not flags.save_memory
    recorder = Recorder(model) if flags.show or flags.html or asks else None
    if recorder:
        recorder.watch()
    for name, given in (("story", story if os.path.exists(story) else ""), ("read", flags.read)):
        if given:
            with or_die(f"--{name}={given}: "):
                note = read_stream(reader, encoding, given, clean)
            if name == "read":
                print(note)
    if story and not os.path.exists(story):
        reader.read(encoding.encode_ordinary(clean(story)))
    if flags.save_memory:
        try:
            save_memory(reader, flags.save_memory)
        except (OSError, RuntimeError):
            die(f"--save_memory={flags.save_memory}: cannot write there")
    if flags.prompt is not None:
        said = reader.generate(encoding.encode_ordinary(flags.prompt), flags.max_new_tokens,
                               flags.temperature, flags.top_k)
        print(flags.prompt + encoding.decode(said))
    elif flags.ask is not None:
        with torch.no_grad():
            reply(reader, encoding, tasks, flags.ask, recorder, flags)
    elif asks:
        chat(reader, encoding, tasks, clean, recorder)


if __name__ == "__main__":
    main()
