"""Use a trained model: ask about a story, or let it continue a text.

    python sample.py --story="Mary went to the kitchen. John got up." --ask="Where is Mary?"
    python sample.py --story=story.txt                # asks you for questions
    python sample.py                                  # type facts and questions, line by line
    python sample.py --prompt="Once upon a time" --temperature=0.8 --top_k=50

A story may be of any length: the model reads it segment by segment through its memory bank.
"""
import os
import re
import sys
from dataclasses import dataclass

import torch

import babilong_tiny as babi
from babilong_tiny import die, flag, parse_flags
from lm2 import LM2, load_checkpoint


@dataclass
class Flags:
    ckpt: str = flag("out/ckpt.pt", "checkpoint written by train.py")
    story: str = flag("", "a story, or a file that holds one")
    ask: str = flag(None, "a question about the story; without it you are asked for some")
    prompt: str = flag(None, "a text to continue instead")
    max_new_tokens: int = flag(100, "tokens to continue the text by")
    temperature: float = flag(0.8, "randomness of the continuation, 0 = always the likeliest token")
    top_k: int = flag(50, "choose among the k likeliest tokens only, 0 = among all")
    seed: int = flag(0, "seed of the continuation")
    device: str = flag("cpu", "cpu, cuda or mps")


def tidy(text):
    """The text as the generator writes it: one space between words and one before the first."""
    return " " + " ".join(text.split())


def answer(model, encoding, story, question):
    """What the model says after story and question, up to its full stop."""
    tokens = encoding.encode_ordinary(tidy(f"{story} {question}"))
    tokens = torch.tensor([tokens], device=model.device)
    said = encoding.decode(model.generate(tokens, 16, temperature=0)[0, tokens.size(1):].tolist())
    return said.split(".")[0].strip()


def hint(encoding, task, story, question):
    """A line that says what the model cannot know about this story and question; "" if nothing."""
    words = set(re.findall(r"[A-Za-z]+", f"{story} {question}"))
    unknown = sorted(word for word in words if len(encoding.encode_ordinary(f" {word}")) > 1)
    if unknown:
        return f"the model never saw the words: {', '.join(unknown)}"
    example = babi.EXAMPLES.get(task)
    if example and not re.fullmatch(example[0], question):
        return f"the model never saw such a question; it learned {example[1]!r}"
    return ""


def reply(model, encoding, task, story, question):
    """Print the answer, and a hint where there is one. A question may come without its mark."""
    question = question.strip().rstrip("?").rstrip() + "?"
    print(answer(model, encoding, story, question))
    if note := hint(encoding, task, story, question):
        print(f"hint: {note}", file=sys.stderr)


def main():
    flags = parse_flags(Flags, __doc__)
    if flags.ask is not None and not flags.ask.strip(" ?\t\n"):
        die("--ask is empty; ask something like --ask=\"Where is Mary?\"")
    if flags.prompt is not None and not flags.prompt:
        die("--prompt is empty; give the beginning of a text")
    if flags.prompt is not None and flags.ask is not None:
        die("--prompt continues a text and --ask answers a question: give one of them")
    if not 0 <= flags.temperature < 1e6 or flags.top_k < 0 or flags.max_new_tokens < 1:
        die("--temperature and --top_k must not be negative and --max_new_tokens at least 1")
    if not 0 <= flags.seed < 2**63:
        die(f"--seed={flags.seed}: it must be a number from 0 to 2**63 - 1")
    try:
        if os.path.exists(flags.story):
            with open(flags.story, encoding="utf-8") as file:
                flags.story = file.read()
        elif flags.story and len(flags.story.split()) == 1:
            die(f"--story={flags.story}: no such file")
    except (OSError, UnicodeDecodeError):
        die(f"--story={flags.story}: not a file of text in UTF-8")
    try:
        device = babi.find_device(flags.device)
        model, encoding = LM2.load(flags.ckpt, device)
        trained = load_checkpoint(flags.ckpt)["train"]["flags"]
        task = "" if trained["data"] else trained["task"]
    except ValueError as error:
        die(error)
    except (KeyError, TypeError):
        die(f"{flags.ckpt} does not say what it was trained on; train it anew")

    torch.manual_seed(flags.seed)
    if flags.prompt is not None:
        tokens = torch.tensor([encoding.encode_ordinary(flags.prompt)], device=device)
        text = model.generate(tokens, flags.max_new_tokens, flags.temperature, flags.top_k or None)
        print(encoding.decode(text[0].tolist()))
        return
    story = flags.story
    if flags.ask is not None:
        reply(model, encoding, task, story, flags.ask)
        return
    terminal = sys.stdin.isatty()
    if terminal:
        print("Type facts and questions (a question ends with ?). An empty line or Ctrl-D ends.")
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        except UnicodeDecodeError:
            die("standard input is not a text in UTF-8")
        if not line:
            break
        if line.endswith("?"):
            if line.strip("? "):
                reply(model, encoding, task, story, line)
        else:
            story += f" {line}" if line.endswith((".", "!")) else f" {line}."


if __name__ == "__main__":
    main()
