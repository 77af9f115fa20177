"""The paper's study (its Figure 6) in miniature: how an update of the bank moves the attention.

    python train.py                                 # a model to look at: one that learned qa1
    python -m results.study                         # out/ckpt.pt, else the model that ships
    python -m results.study --ckpt=out-qa2/ckpt.pt --out=qa2.png

Segment 1 tells where Mary and John are, segment 2 that Mary moved; the rest is noise. In the third
the same question is asked of three banks: as segment 1 left it, as segment 2 did, and one frozen
after segment 1 while segment 2 went by. Printed and drawn is what the question's last token reads:
the share that was written at each fact's words. Noise's share is a later word of a fact's segment,
where attention had gathered the fact.
"""
import random
import sys
from dataclasses import dataclass

import torch

import babilong_tiny as babi
from babilong_tiny import flag
from lm2 import LM2, BadInput
from sample import Reader, Recorder

OLD, OTHER, NEW = ("Mary went to the kitchen.", "John travelled to the office.",
                   "Mary moved to the garden.")
QUESTIONS = ("Where is Mary?", "Where is John?")
BANKS = ("before the update", "after the update", "bank frozen")
ROWS = (OLD, OTHER, NEW, "noise")


@dataclass
class Flags:
    ckpt: str = flag("", "checkpoint of train.py (out/ckpt.pt, else the one in results/)")
    out: str = flag("study.png", "where to draw the picture")
    device: str = flag("cpu", "auto, cpu, cuda or mps")


def traced(recorder):
    """(tokens before the last segment): where what the last token read came from, sum 1.

    Over all blocks, each weighted with the length of what it joined to the decoder.
    """
    last, total = recorder.segments[-1], 0.0
    for i in range(len(recorder.blocks)):
        found = last["read"][i][-1] @ recorder.source(i, until=-1)[:, 1:]
        total = total + last["joined"][i][-1] * found
    return total / total.sum().clamp(min=1e-9)


@torch.no_grad()
def study(model, encoding):
    """({(question, bank, row): share of the read attention}, {(question, bank): answer})."""
    size, noise = model.config.block_size, babi.make_noise(encoding, 0)(random.Random(0))
    length = {fact: len(encoding.encode_ordinary(f" {fact}")) for fact in (OLD, OTHER, NEW)}
    begins = {OLD: 0, OTHER: length[OLD], NEW: size}

    def segment(*facts):
        tokens = encoding.encode_ordinary("".join(f" {fact}" for fact in facts))
        while len(tokens) < size:
            tokens += next(noise)
        return tokens[:size]

    first, second, third = segment(OLD, OTHER), segment(NEW), segment()
    shares, answers = {}, {}
    for question in QUESTIONS:
        asked = encoding.encode_ordinary(f" {question}")
        for bank in BANKS:
            reader = Reader(model, Recorder(model))
            reader.read(first)
            if bank != "before the update":
                frozen = reader.memory.banks
                reader.read(second)
                if bank == "bank frozen":
                    reader.memory = reader.memory._replace(banks=frozen)
                    del reader.recorder.segments[-1]
            prompt = third[:size - len(asked)] + asked
            said = encoding.decode(reader.generate(prompt, 2, temperature=0))
            answers[question, bank] = babi.printable(said.split(".")[0].strip())
            with reader.recorder:
                model(torch.tensor([prompt], device=model.device), memory=reader.memory)
            read = traced(reader.recorder)
            for fact, start in begins.items():
                shares[question, bank, fact] = float(read[start:start + length[fact]].sum())
            shares[question, bank, "noise"] = 1 - sum(shares[question, bank, f] for f in begins)
    return shares, answers


def draw(path, shares):
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("\n(pip install matplotlib, and this ends with a picture)")
    figure = Figure(figsize=(9, 3), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, question in zip(axes, QUESTIONS):
        for i, (bank, hatch) in enumerate(zip(BANKS, ("", "//", ".."))):
            heights = [shares[question, bank, row] for row in ROWS]
            axis.bar([x + 0.27 * i for x in range(4)], heights, 0.25, label=bank, hatch=hatch)
        axis.set(title=question, ylim=(0, 1), xticks=[0.27, 1.27, 2.27, 3.27])
        axis.set_xticklabels([row.replace(" to the ", "\nto the ") for row in ROWS])
    axes[0].set_ylabel("share of the read attention")
    axes[1].legend(loc="upper right")
    figure.savefig(path, dpi=130)
    print(f"picture: {babi.printable(path)}")


def main():
    babi.install_error_hook()
    flags = babi.parse_flags(Flags(), __doc__)
    path = babi.find_checkpoint(flags.ckpt)
    model, encoding = LM2.load(path, babi.find_device(flags.device))
    if not any(block.read for block in model.blocks):
        raise BadInput(f"{path} has no memory to look at: an LM2's banks can be traced")
    if not flags.ckpt:
        print(f"model: {path}", file=sys.stderr)
    shares, answers = study(model, encoding)
    for question in QUESTIONS:
        print(f"\n{question:32}" + "".join(f"{bank:>19}" for bank in BANKS))
        for row in ROWS:
            print(f"  {row:30}" + "".join(f"{shares[question, bank, row]:19.2f}" for bank in BANKS))
        print(f"  {'answer':30}" + "".join(f"{answers[question, bank]:>19}" for bank in BANKS))
    print("\nof what the question's last token reads, the share written at each fact's words"
          "\n(at noise: a later word of its segment, where attention had gathered the fact)")
    draw(flags.out, shares)


if __name__ == "__main__":
    main()
