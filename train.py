"""Teach an LM2 to use its memory, and prove that it does.

    python train.py                          # some minutes on a CPU core; ends in the proof table
    python train.py --task=qa1,qa2 --n_layer=3 --questions=8 --out=out-qa2
    python train.py --data=book.txt --out=out-book      # any text instead of stories
    python train.py --task=all --n_layer=4 --n_embd=96 --memory_slots=32 --out=out-all
    python train.py --resume                 # go on exactly where a stopped run was
    python train.py --resume --steps=5000    # the same, but to another end
    python train.py --compare=memory         # LM2 against its rivals; also: parts, text
    python train.py --bench                  # what the memory costs in time and space

The file reads from top to bottom: flags, set-up, comparisons, data, model, the benchmark, the
loop, the proof. Ctrl-C saves and ends; everything a run writes lies in the folder `--out`.
"""
import csv
import itertools
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import time
import zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F

import babilong_tiny as babi
from babilong_tiny import die, flag, or_die, parse_flags
from lm2 import LM2, LM2Config, load_checkpoint


@dataclass
class Flags:
    # what to learn
    task: str = flag("qa1", "bAbI task to learn, several (qa1,qa6), or all")
    noise: str = flag("", "texts to hide the facts in, instead of the built-in noise: a.txt,b.txt")
    data: str = flag("", "a text file to learn instead of a task")
    tokenizer: str = flag("words", "words, a name tiktoken knows such as gpt2, or a tiktoken file")
    out: str = flag("out", "folder for the checkpoint and the log")
    resume: bool = flag(False, "go on from the checkpoint in the folder --out")
    # the model, see LM2Config
    block_size: int = flag(64, "tokens in a segment", 1, 10**6)
    n_layer: int = flag(2, "blocks")
    n_head: int = flag(4, "attention heads")
    n_kv_head: int = flag(2, "key/value heads")
    n_embd: int = flag(64, "width")
    conv: int = flag(7, "tokens the local mixer sees, 0 for none")
    memory: str = flag("lm2", "kind of memory", choices=("lm2", "rmt", "none"))
    memory_slots: int = flag(16, "slots of a memory bank")
    memory_layers: int = flag(-1, "the first k blocks have memory, -1 for all")
    output_gate: bool = flag(True, "gate what is read")
    input_gate: bool = flag(True, "gate what is written")
    forget_gate: bool = flag(True, "gate what is kept")
    address: bool = flag(True, "give every slot a learned name")
    full_window: bool = flag(False, "with --memory=none: attention over all segments at once")
    # training
    steps: int = flag(3000, "training steps", 1)
    batch_size: int = flag(32, "samples in a step while contexts are short", 1)
    batch_tokens: int = flag(8192, "most tokens in a step: long contexts, small batches", 1)
    segments: int = flag(64, "segments of the longest training context", 2, 10**6)
    window: int = flag(8, "segments of a training window, with --data", 1)
    questions: int = flag(4, "questions at the end of a training sample", 1)
    threshold: float = flag(0.9, "way from chance to all right that moves a task on", 0, 1)
    lr: float = flag(2e-3, "AdamW learning rate (all but the matrices inside blocks)", 0, 100)
    muon_lr: float = flag(1e-2, "Muon learning rate (matrices inside blocks)", 0, 100)
    weight_decay: float = flag(0.1, "decay of the matrices inside blocks, but the gates'", 0, 100)
    warmup: int = flag(50, "steps until the learning rate is whole", 0)
    cooldown: float = flag(0.6, "part of the steps, the last, in which it falls", 0, 1)
    grad_clip: float = flag(1.0, "largest norm of the gradient", 1e-9, 1e9)
    seed: int = flag(0, "seed of weights and data", 0, 2**63 - 1)
    # the machine and the log
    device: str = flag("auto", "auto, cpu, cuda or mps")
    log_every: int = flag(50, "steps between log lines", 1)
    save_every: int = flag(500, "steps between checkpoints", 1)
    # the proof
    eval_samples: int = flag(500, "most samples in a row of the proof table", 2)
    eval_times: int = flag(16, "longest row of the proof, in longest contexts; 0 for no proof", 0)
    babi_dir: str = flag("", "folder of real bAbI files to test on as well; never trained on")
    # comparisons and the benchmark
    bench: bool = flag(False, "measure speed and memory beside RMT and the vanilla decoder")
    compare: str = flag("", "train and score several models in turn: memory, parts or text",
                        choices=("", "memory", "parts", "text"))
    seeds: babi.token_counts = flag((0, 1, 2), "seeds that every model of a comparison gets")
    lengths: babi.token_counts = flag(tuple(1024 * n for n in (0, 1, 2, 4, 8, 16, 32, 64, 128)),
                                      "tokens of context that they are scored at: 0,1k,4k")
    samples: babi.token_counts = flag((500, 200, 200, 200, 100, 100, 50),
                                      "how many questions at each of the lengths")


# flags that change nothing in what is learned, or its end alone: a resumed run may have others
FREE = {"resume", "out", "device", "steps", "log_every", "save_every", "eval_samples",
        "eval_times", "babi_dir", "bench", "compare", "seeds", "lengths", "samples"}
DIVERGED = 3  # exit status of a run whose loss is no longer a number

# --------------------------------------------------------------------------------------------
# Set-up: whatever can be wrong is found here, before anything is written

signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the set-up without further words
babi.calm_streams()
flags = parse_flags(Flags, __doc__)
# under torchrun this is one of `world` processes, each with its share of every batch
world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
if rank:
    sys.stdout = open(os.devnull, "w")  # the first process speaks and writes for all
ckpt_path, checkpoint = os.path.join(flags.out, "ckpt.pt"), None


def refuse_other_flags(out, saved, now, free=FREE):
    """One line and exit 2 if the run in `out` had other flags (`saved`) than now, but free ones."""
    for name, value in asdict(now).items():
        if name not in free and saved.get(name) != value:
            die(f"{out} was trained with --{name}={saved.get(name)}, not {value}; give it the same "
                "flags, or choose another --out")


if flags.resume:
    try:
        checkpoint = load_checkpoint(ckpt_path)
        saved = Flags(**checkpoint["train"]["flags"])
    except (ValueError, TypeError, KeyError) as error:
        die(f"--resume: {error}")
    # the run's own flags, then those of the command line
    argv = [*babi.as_flags(saved), *sys.argv[1:], f"--out={flags.out}"]
    flags = parse_flags(Flags, __doc__, argv)
    moved = {name for name in ("data", "noise") if getattr(flags, name) and getattr(saved, name)}
    refuse_other_flags(flags.out, asdict(saved), flags, FREE | moved)  # texts are compared below

if not flags.data and flags.block_size < 32:
    die(f"--block_size={flags.block_size}: questions and answers need segments of at least 32")
if os.path.exists(ckpt_path) and not (checkpoint or flags.bench or flags.compare):
    die(f"{ckpt_path} is there from an earlier run; --resume it, choose another --out or remove it")
books = babi.book_names(flags.noise)
if flags.data and (books or flags.babi_dir or flags.task != Flags.task):
    die("--data learns a text: leave --task, --noise and --babi_dir away")

with or_die():
    device = babi.find_device(flags.device)
    tasks = () if flags.data else babi.parse_tasks(flags.task)
    real = babi.test_samples(tasks, 0, flags.babi_dir) if flags.babi_dir else {}
text, texts = "", 0  # and a number that tells texts apart: a resumed run must have the same
with or_die(f"--data={flags.data}: " if flags.data else "--noise: "):
    if flags.data:
        with open(flags.data, encoding="utf-8") as file:
            text = file.read()
    for path in [flags.data] if flags.data else books:
        with open(path, "rb") as file:
            for line in file:
                texts = zlib.crc32(line, texts)
    words = Counter() if checkpoint else babi.count_words(
        [text[:len(text) * 9 // 10]] if text else
        (sentence for book in books for sentence in babi.read_sentences(book)))
with or_die():
    encoding = LM2.load(ckpt_path)[1] if checkpoint else babi.load_encoding(flags.tokenizer, words)
noise = None if flags.data else babi.load_noise(flags.noise, encoding, flags.seed)
with or_die("this model cannot be built: "):
    sizes = {f.name: getattr(flags, f.name) for f in fields(LM2Config) if hasattr(flags, f.name)}
    if flags.full_window:
        sizes["block_size"] *= flags.window if flags.data else flags.segments
        if flags.memory != "none":
            raise ValueError("--full_window is for --memory=none: it leaves nothing to remember")
    config = LM2Config(encoding.n_vocab, **sizes)

device_type = device.split(":")[0]
if world > flags.batch_size:
    die(f"torchrun: {world} processes need a --batch_size of at least as much")
if world > 1 and (device_type == "mps" or
                  device_type == "cuda" and torch.cuda.device_count() < world):
    die(f"torchrun: {world} processes need as many CUDA devices, or --device=cpu")
if world > 1 and device_type == "cuda":
    device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
if device.startswith("cuda:"):
    torch.cuda.set_device(device)
if world > 1:
    try:
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    except (ValueError, RuntimeError):
        die("WORLD_SIZE is set, but the processes do not find each other; begin them with torchrun")
# bfloat16 where a GPU computes in it, float32 elsewhere
native = device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
dtype = torch.bfloat16 if native else torch.float32
autocast = torch.autocast(device_type, dtype, enabled=native)


def rows_of(length):
    """How many contexts of so many tokens are in a batch; each process has as many."""
    return max(1, min(flags.batch_size, flags.batch_tokens // length) // world) * world

# --------------------------------------------------------------------------------------------
# Comparisons: several runs of this script that differ in a flag or two, and one table

def arms():
    """{name: flags that differ} of the models of a comparison."""
    vanilla, layers = {"memory": "none"}, flags.n_layer
    depths = {"memory in all blocks": {}} | {
        f"memory in the first {k}": {"memory_layers": k}
        for k in dict.fromkeys((layers // 2, 1)) if 0 < k < layers}
    if flags.compare == "memory":
        return {"LM2": {}, "RMT": {"memory": "rmt"}, "vanilla": vanilla,
                "vanilla, full window": vanilla | {"full_window": True}}
    if flags.compare == "parts":
        return depths | {
            "memory in no block": vanilla, "no output gate": {"output_gate": False},
            "no input gate": {"input_gate": False}, "no forget gate": {"forget_gate": False},
            "no slot addresses": {"address": False}, "no local mixer": {"conv": 0},
            **{f"{n} slots": {"memory_slots": n} for n in (1, 4, 16, 64)
               if n != flags.memory_slots}}

    def count(**changes):
        with torch.device("meta"):
            return sum(p.numel() for p in LM2(replace(config, **changes)).parameters())

    widths = range(flags.n_embd, 3 * flags.n_embd, 2 * flags.n_head)
    width = min(widths, key=lambda width: abs(count(**vanilla, n_embd=width) - count()))
    return depths | {"vanilla": vanilla,
                     "vanilla, as many parameters": vanilla | {"n_embd": width}}


def compare():
    """Train and score every arm with every seed. What is done already is not done again."""
    for name in ("memory", "memory_layers", "full_window", "output_gate", "input_gate",
                 "forget_gate", "address", "seed", "resume", "bench"):
        if getattr(flags, name) != getattr(Flags, name):
            die(f"--{name} cannot be given: --compare sets it")
    if world > 1 or bool(text) != (flags.compare == "text"):
        die("--compare runs in one process, text with --data=book.txt and the others without")
    if min(flags.samples) < 1:
        die("--samples must be at least 1")
    samples = {} if text else real or babi.test_samples(tasks, max(flags.samples))
    for task, made in samples.items():  # found now, not after hours of training
        least = min(len(babi.to_tokens(sample, encoding)[0]) for sample in made)
        if not least <= min(n or least for n in flags.lengths):
            die(f"--lengths: the shortest sample of {task} has {least} tokens (0 = no noise)")
    cells, lost = [], []
    models = arms()
    jobs = list(itertools.product(dict.fromkeys(flags.seeds), models.items()))
    try:
        for number, (seed, (name, changes)) in enumerate(jobs, 1):
            print(f"\n[{number}/{len(jobs)}] {name}, seed {seed}", flush=True)
            out = os.path.join(flags.out, f"{name.replace(', ', '-').replace(' ', '-')}-{seed}")
            found = run_arm(name, replace(flags, compare="", babi_dir="", eval_times=0, seed=seed,
                                          out=out, **changes))
            cells += found
            lost += [] if found else [f"{name}, seed {seed}"]
            if number % len(models) == 0:
                report(cells, lost)
    except KeyboardInterrupt:
        report(cells, lost)
        print("\nstopped; the same command goes on from here")


def call(script, *arguments):
    """Run another script of ours to its end; its exit status. Ctrl-C is for it alone."""
    signal.signal(signal.SIGINT, lambda *_: None)
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), script)
    code = subprocess.run([sys.executable, script, *arguments]).returncode
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if code < 0 or code == 130:  # killed, or stopped by Ctrl-C
        raise KeyboardInterrupt
    return code


def run_arm(name, arm):
    """Train and score one arm, unless that is done; returns its cells of the table.

    There are none if its loss was no longer a number.
    """
    ckpt = os.path.join(arm.out, "ckpt.pt")
    if os.path.exists(ckpt):  # begun earlier
        arm.resume, trained = True, load_checkpoint(ckpt)
        refuse_other_flags(arm.out, trained["train"]["flags"], arm, FREE - {"steps"})
        if trained["train"]["text"] != texts:
            die(f"{arm.out} was trained on another text; choose another --out")
    if not arm.resume or trained["train"]["step"] < arm.steps:
        code = call("train.py", *babi.as_flags(arm))
        if code == DIVERGED:
            return []
        if code:
            sys.exit(code)
        trained = load_checkpoint(ckpt)
        if trained["train"]["step"] < arm.steps:
            raise KeyboardInterrupt
    saved, parameters = trained["train"], sum(p.numel() for p in trained["model"].values())
    about = {"seed": arm.seed, "seconds": round(saved["seconds"]), "parameters": parameters}
    if text:
        window = flags.window * flags.block_size
        per_step = rows_of(window) * window
        rows = babi.read_csv(os.path.join(arm.out, "log.csv"), ("step", "bits_per_byte"))
        return [about | {"arm": name, "task": "text", "tokens": int(row["step"]) * per_step,
                         "bits_per_byte": float(row["bits_per_byte"])} for row in rows]
    about["stages"] = "/".join(str(stage) for stage in saved["stage"].values())
    cells = []
    for n_best in (0, 5) if name == "vanilla" else (0,):  # with retrieval: the paper's RAG row
        asked = (flags.lengths, flags.samples, flags.babi_dir, flags.noise, n_best,
                 saved["seconds"])
        path = os.path.join(arm.out, f"scores-{zlib.crc32(repr(asked).encode()):08x}.csv")
        if not os.path.exists(path):
            code = call("babilong_tiny.py", *babi.as_flags(babi.Flags(
                ckpt=ckpt, lengths=flags.lengths, samples=flags.samples, babi_dir=flags.babi_dir,
                noise=flags.noise, retrieve=n_best, csv=path, device=flags.device)))
            if code:
                sys.exit(code)
        cells += [about | {"arm": name + ", retrieval" * bool(n_best)}
                  | {key: value if key == "task" else float(value) for key, value in row.items()}
                  for row in babi.read_csv(path, ("task", "tokens", "accuracy", "last mentioned"))]
    return cells


def report(cells, lost):
    """Print means over the seeds and their standard deviation; write a CSV and a picture."""
    if lost:
        print("\nleft out, as their loss was no longer a number: " + "; ".join(lost))
    if not cells:
        return
    metric = "bits_per_byte" if text else "accuracy"
    spread = {}  # {task: {arm: {tokens: [a value for each seed]}}}
    for cell in cells:
        row = spread.setdefault(cell["task"], {}).setdefault(cell["arm"], {})
        row.setdefault(int(cell["tokens"]), []).append(cell[metric])
    lengths = sorted({int(cell["tokens"]) for cell in cells})
    shown = lengths[-1:] if text else lengths
    seeds = list(dict.fromkeys(cell["seed"] for cell in cells))
    for task, rows in spread.items():
        print(f"\n{task}, {metric.replace('_', ' ')}: mean of seeds {', '.join(map(str, seeds))}"
              f" ± standard deviation\n{'':33}parameters  seconds"
              + "".join(f"{babi.shorten(n):>14}" for n in shown))
        for name, row in rows.items():
            own = [cell for cell in cells if cell["arm"] == name]
            n_seeds = len(row[shown[-1]])
            print(f"{name + f' (seeds: {n_seeds})' * (n_seeds < len(seeds)):33}"
                  f"{own[0]['parameters']:>10,} {statistics.mean(c['seconds'] for c in own):8.0f}"
                  + "".join(f"  {statistics.mean(row[n]):.3f}" + (
                      f" ±{statistics.stdev(row[n]):.3f}" if n_seeds > 1 else " " * 7)
                      for n in shown))
        for name in ("best constant", "last mentioned") if not text else ():
            found = {int(cell["tokens"]): cell[name] for cell in cells if cell["task"] == task}
            print(f"{name:52}" + "".join(f"  {found[n]:.3f}       " for n in shown))
            if name == "last mentioned":
                rows[name] = {n: [value] for n, value in found.items()}
    name = os.path.join(flags.out, flags.compare)
    babi.write_csv(f"{name}.csv", cells, cells[0])
    print(f"\nwritten to {name}.csv", flush=True)
    babi.draw(f"{name}.png", spread, "tokens of training" if text else "tokens of context",
              "bits per byte of held-out text" if text else "accuracy")


if flags.compare:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with or_die():
        compare()
    sys.exit(0)

# --------------------------------------------------------------------------------------------
# Data: every batch is a function of the seed, the step and where the tasks stand, so that a
# resumed run sees the same ones

if flags.data:
    ids = torch.tensor(encoding.encode_ordinary(text))
    window = flags.window * flags.block_size
    split = int(0.9 * len(ids))
    if len(ids) - split <= window:
        die(f"--data={flags.data}: {len(ids)} tokens; the last tenth is held out and must be "
            f"longer than a window of {window}; use a longer text or a smaller --window")


def story_batch(step, stages, running):
    """(tokens, targets, task of each row), from where each task stands: {task: segments}, and
    {task: mean accuracy}, the lower the more of its rows.

    A step's contexts are as long as one task's stage allows, and its rows are of all tasks that
    have come so far. At first they are up to four segments, dense with facts. Beyond the fourth
    stage seven steps in ten still are; in the others, of 4 to `stage` segments, the bank must hold
    the facts for long.
    Lengths are mostly no multiple of a segment, as in life. Half the samples spread their facts
    over the whole context, half put them in its first part, so that the bank must hold them while
    noise alone goes by. Of several tasks, two steps in five are bare stories, as at 0K: a mixture
    does not learn those along.
    """
    rng = random.Random(f"{flags.seed} {step}")
    if len(tasks) > 1 and rng.random() < 0.4:
        return bare_batch(rng, stages, running)
    stage = stages[rng.choice(tasks)]
    segments = rng.randint(min(2, stage), min(stage, 4))
    if stage > 4 and rng.random() < 0.3:
        segments = rng.randint(4, stage)
    length = segments * flags.block_size
    if rng.random() < 0.7:
        length = rng.randint(min(length, max(40, length - 2 * flags.block_size)), length)
    ready = [task for task in tasks if stages[task] >= segments]
    pairs, names, refused = [], [], Counter()
    while len(pairs) < rows_of(length):
        task, sample = draw(rng, ready, stages, running, max(4, length // 8))
        until = 1.0 if rng.random() < 0.5 else rng.uniform(0.4, 1.0)
        try:
            pairs.append(babi.to_tokens(sample, encoding, length, noise, rng, (0.0, until)))
            names.append(task)
        except ValueError:  # this story does not fit here; the next may
            refused[task] += 1
            if refused[task] > 50000:
                die(f"stories of {task} do not fit into {length} tokens; use a larger --block_size")
    return *babi.stack(pairs), names


def draw(rng, names, stages, running, most):
    """(a task, the likelier the more of its answers are wrong; its story of at most so many facts,
    few in the first stages, with several questions)."""
    task = rng.choices(names, [1.05 - running[name] for name in names])[0]
    if stages[task] < 4:
        most = min(most, 4 * max(1, stages[task] - 1))
    window = rng.choice((babi.WINDOW, None))  # bAbI's own rule, or about anything
    return task, babi.make_sample(task, rng, flags.questions, most, window)


def bare_batch(rng, stages, running):
    """A batch as at 0K: whole stories without noise, of all tasks, each about as long as the next.

    Of three times as many stories, in the order of their lengths, it takes a part at random. Behind
    the shorter ones there is noise, where it hides nothing.
    """
    pool = []
    for _ in range(3 * flags.batch_size):
        task, sample = draw(rng, tasks, stages, running, 1000)
        pool.append((len(babi.to_tokens(sample, encoding)[0]), task, sample))
    pool.sort(key=lambda entry: entry[0])
    start = rng.randrange(len(pool) - flags.batch_size + 1)
    pool = pool[start:start + flags.batch_size]
    length = pool[-1][0]
    pool = pool[-rows_of(length):]
    pairs = [babi.to_tokens(sample, encoding, length, noise, rng, bare=True)
             for _, _, sample in pool]
    return *babi.stack(pairs), [task for _, task, _ in pool]


def text_batch(step, *_):
    """(tokens, targets, no tasks) of random windows of the text; targets are the next tokens."""
    rng = random.Random(f"{flags.seed} {step}")
    starts = [rng.randrange(split - window) for _ in range(rows_of(window))]
    return (torch.stack([ids[i:i + window] for i in starts]),
            torch.stack([ids[i + 1:i + window + 1] for i in starts]), [])


@torch.no_grad()
def text_loss(most=200):
    """Mean loss in nats per token and in bits per byte over windows of the held-out tail."""
    pieces, total = ids[split:].unfold(0, window + 1, window)[:most], 0.0
    for piece in pieces.to(device).split(rows_of(window)):
        with autocast:
            total += model(piece[:, :-1], piece[:, 1:])[1].item() * len(piece)
    n_bytes = len(encoding.decode_bytes(pieces[:, 1:].flatten().tolist()))
    return total / len(pieces), total * window / math.log(2) / n_bytes


def prepare(step, stages, running):
    """The batch of a step, made ahead in a thread. First this process's share of its rows:

    tokens (b, T); of its b * T positions the n scored ones, `at`, what to say there, `answers`, and
    their `weights` in the loss; which of these n begin an answer, `first`, and the task of each of
    those, `task_of`. Then, of all rows: the sum of weights, the number of tokens, and how many rows
    and how many answers each task has, as Counters.
    """
    tokens, targets, names = (text_batch if flags.data else story_batch)(step, stages, running)
    scored, rows, asked = targets >= 0, slice(rank, None, world), Counter()
    begins = scored & (targets.roll(1, dims=1) < 0)
    for name, count in zip(names, begins.sum(1).tolist()):
        asked[name] += count
    # tasks differ in how many questions a story allows: in a mixture each of a row's n targets
    # weighs n ** -0.5, or the tasks with many would have nearly all of the gradient
    power = 0.5 if len(tasks) > 1 else 0.0
    weights = scored * scored.sum(1, keepdim=True).clamp(min=1) ** -power
    mine, task_of = scored[rows], torch.tensor([tasks.index(name) for name in names]).long()
    share = {"tokens": tokens[rows], "at": mine.flatten().nonzero()[:, 0],
             "answers": targets[rows][mine], "weights": weights[rows][mine],
             "first": begins[rows][mine].nonzero()[:, 0],
             "task_of": task_of[rows][begins[rows].nonzero()[:, 0]]}
    return share, weights.sum().item(), tokens.numel(), Counter(names), asked


# --------------------------------------------------------------------------------------------
# Model, optimizers, schedule

torch.manual_seed(flags.seed)
try:
    model = LM2(config).to(device)
except (RuntimeError, MemoryError):
    die("this model does not fit into the machine's memory; make it smaller")
optimizers = model.optimizer(flags.lr, flags.muon_lr, flags.weight_decay)


class Answers(torch.nn.Module):
    """Logits (n, vocab) at the positions `at` (n,) among all B * T of tokens (B, T)."""

    def __init__(self):
        super().__init__()
        self.model = model

    def forward(self, tokens, at):
        return self.model.head(self.model.read(tokens)[0].flatten(0, 1)[at])


compute = Answers()
if world > 1:  # averages the gradients of all processes; in a single segment no write is used
    compute = torch.nn.parallel.DistributedDataParallel(
        compute, broadcast_buffers=False,
        find_unused_parameters=not flags.data or flags.window == 1)
# as the flags say: a checkpoint's optimizers bring the rates that they had last
rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
# where the run stands; for each task, `stage` is the longest context, `running` the mean accuracy
state = {"step": 0, "stage": dict.fromkeys(tasks, 1), "running": dict.fromkeys(tasks, 0.0),
         "seconds": 0.0, "flags": asdict(flags), "text": texts}
if checkpoint:
    saved = checkpoint["train"]
    try:
        if saved["text"] != texts:
            die(f"--resume: the run in {flags.out} began with another text than "
                f"{flags.data or flags.noise}")
        model.load_state_dict(checkpoint["model"])
        for optimizer, its_state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)
        state |= {"step": int(saved["step"]), "seconds": float(saved["seconds"]),
                  "stage": {task: int(saved["stage"][task]) for task in tasks},
                  "running": {task: float(saved["running"][task]) for task in tasks}}
    except (KeyError, RuntimeError, TypeError, ValueError):
        die(f"--resume: {ckpt_path} belongs to another model or version of this code")


def rate(step):
    """Share of the learning rate at this step: linear up, flat, linear down to a fiftieth."""
    left = (flags.steps - step) / flags.steps
    return min(1.0, (step + 1) / max(1, flags.warmup),
               max(0.02, left / flags.cooldown if flags.cooldown else 1.0))


def die_to_resume(path, reason):
    die(f"{path} cannot be written ({reason}); the checkpoint from before, if there is one, is "
        f"whole: make room and go on with: python train.py --resume --out={flags.out}")


def save():
    """Write the checkpoint to the side and move it into place: a crash leaves the old one whole."""
    if rank:
        return
    data = {"config": asdict(config), "model": model.state_dict(),
            "tokenizer": {"pattern": encoding._pat_str,
                          "tokens": [encoding.decode_single_token_bytes(i).decode("latin-1")
                                     for i in range(encoding.n_vocab)]},
            "train": state | {"optimizers": [o.state_dict() for o in optimizers]}}
    try:
        with babi.replaced(ckpt_path, "wb") as file:
            torch.save(data, file)
    except (OSError, RuntimeError) as error:
        die_to_resume(ckpt_path, str(error).splitlines()[0])


# --------------------------------------------------------------------------------------------
# The benchmark: ratios taken in one run

def timed(work, *args):
    """Seconds that `work` takes, on whatever device."""
    start = time.perf_counter()
    work(*args)
    synchronize()
    return time.perf_counter() - start


def synchronize():
    """Wait until the device has done all that it was told to do."""
    if device_type != "cpu":
        getattr(torch, device_type).synchronize()


def stopwatch(model, optimizers):
    """{part: seconds}, filled by hooks as the parts run forward and backward."""
    spent = Counter()

    def start(part, *_):
        synchronize()
        part.clock = time.perf_counter()

    def stop(name):
        def hook(part, *_):
            synchronize()
            spent[name] += time.perf_counter() - part.clock
        return hook

    for optimizer in optimizers:
        optimizer.register_step_pre_hook(start)
        optimizer.register_step_post_hook(stop("optimizers"))
    for block, part in itertools.product(model.blocks, ("attention", "read", "write",
                                                        "feed_forward")):
        if module := getattr(block, part):
            module.register_forward_pre_hook(start)
            module.register_forward_hook(stop(part))
            module.register_full_backward_pre_hook(start)
            module.register_full_backward_hook(stop(part))
    return spent


def bench_training(segments, rounds=8):
    """Print tokens/s of vanilla, RMT and LM2 in turn, what they keep, and where LM2's time goes.

    Every token is scored, or vanilla would have a gradient in the last segment only.
    """
    length = segments * config.block_size
    tokens = torch.randint(config.vocab_size, (rows_of(length), length), device=device)

    def step(model, optimizers):
        with autocast:
            loss = model(tokens, tokens)[1]
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    print(f"\ntraining on {len(tokens)} contexts of {segments} segments: median of {rounds} rounds")
    print(f"{'':10}parameters  tokens/s  of vanilla (lowest to highest)  kept for backward")
    arms, speeds = {}, {"vanilla": [], "RMT": [], "LM2": []}
    for name, memory in zip(speeds, ("none", "rmt", "lm2")):
        model, kept = LM2(replace(config, memory=memory)).to(device), {}
        optimizers = model.optimizer()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            step(model, optimizers)
        arms[name] = model, optimizers, sum(kept.values()) / 2**20
    for _ in range(rounds):
        for name, arm in arms.items():
            speeds[name].append(tokens.numel() / timed(step, *arm[:2]))
    for name, (model, _, kept) in arms.items():
        ratios = sorted(own / base for own, base in zip(speeds[name], speeds["vanilla"]))
        print(f"{name:10}{sum(p.numel() for p in model.parameters()):10,}"
              f"{statistics.median(speeds[name]):10,.0f}{statistics.median(ratios):12.2f} "
              f"({ratios[0]:.2f} to {ratios[-1]:.2f}){kept:18.0f} MiB")
    spent = stopwatch(*arms["LM2"][:2])
    whole = timed(step, *arms["LM2"][:2])
    spent["embedding, head and rest"] = whole - sum(spent.values())
    print("LM2's time: " + ", ".join(f"{part.replace('_', ' ')} {share / whole:.0%}"
                                     for part, share in spent.items()))
    seconds, made = 0.0, 0
    for number in range(10):
        start = time.perf_counter()
        made += prepare(number, dict.fromkeys(tasks, segments), state["running"])[2]
        seconds += time.perf_counter() - start
    print(f"making the samples: {seconds / made * tokens.numel() / whole:.1%} of that, done ahead "
          "while gradients are computed")


@torch.no_grad()
def bench_generation(positions=(100, 10_000, 100_000), count=100):
    """Print tokens/s of LM2, which has read so many tokens, and of attention over all of them."""
    print("\ngeneration, tokens/s after so many tokens" + "".join(f"{n:>12,}" for n in positions))
    speeds = {"LM2": [], "full window": []}
    model = LM2(replace(config, memory="lm2")).to(device).eval()
    whole = LM2(replace(config, memory="none", block_size=positions[-1] + count)).to(device).eval()
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    for position in positions:
        memory = model.read(token.expand(1, position), last=1)[1]
        speeds["LM2"].append(count / timed(lambda: model.generate(token, count, memory=memory)))
        attention = whole.blocks[0].attention
        shape = (1, attention.n_kv_head, position, attention.head_dim)
        # reading so much would take minutes: its keys and values are made up
        cache = [{name: torch.randn(shape, device=device) for name in ("key", "value")}
                 for _ in whole.blocks]

        def generate():
            for _ in range(count):
                output, _ = whole.run(token, whole.fresh_memory(1), cache)
                torch.multinomial(whole.head(output[:, -1]).softmax(-1), 1)
        speeds["full window"].append(count / timed(generate))
    for name, row in speeds.items():
        print(f"{name:41}" + "".join(f"{speed:12,.0f}" for speed in row))
    print(f"{'LM2 over full window':41}" + "".join(
        f"{own / other:12.2f}" for own, other in zip(*speeds.values())))


if flags.bench:
    if flags.full_window or flags.data:
        die("--bench measures with segments of stories: leave --full_window and --data away")
    print(f"device {device}, {torch.get_num_threads()} threads, {str(dtype)[6:]}; ratios count: "
          "they were taken in turn, in this one run")
    for segments in sorted({min(4, flags.segments), flags.segments}):
        bench_training(segments)
    bench_generation()
    if device_type == "cuda":
        print(f"\npeak memory of the device: {torch.cuda.max_memory_allocated() / 2**20:,.0f} MiB")
    sys.exit(0)

# --------------------------------------------------------------------------------------------
# The loop

log_path = os.devnull if rank else os.path.join(flags.out, "log.csv")
columns = ["step", "loss", "accuracy", "bits_per_byte", "tokens_per_second", "input_gate",
           "forget_gate", "output_gate", "seconds", *tasks, *(f"{task}_stage" for task in tasks)]
if not rank:
    try:
        os.makedirs(flags.out, exist_ok=True)
        rows = babi.read_csv(log_path, columns) if os.path.exists(log_path) else []
        rows = [row for row in rows if int(row["step"]) <= state["step"]]  # a crash may leave more
        babi.write_csv(log_path, rows, columns)
    except OSError as error:
        die(f"--out={flags.out}: cannot write there ({error.strerror})")
    except (ValueError, csv.Error):
        die(f"{log_path} is no log of such a run; move it away first")

n_params = sum(p.numel() for p in model.parameters())
print(f"device {device}, {torch.get_num_threads()} threads, {str(dtype)[6:]}")
print(f"model: {n_params:,} parameters, vocabulary {config.vocab_size}, memory {config.memory}")
print(f"{flags.data or flags.task}: {flags.steps} steps, contexts of up to "
      f"{flags.window if flags.data else flags.segments} segments of {flags.block_size} tokens")

stop = []
signal.signal(signal.SIGINT, lambda *_: stop.append(True))  # Ctrl-C: end after this step
gates = {"input": [], "forget": [], "output": []}  # how open they were since the last log line


def noting(means):
    """A forward hook that notes a gate's mean; it returns nothing, for that would be the gate."""
    def hook(module, args, gate):
        if torch.is_grad_enabled():
            means.append(gate.detach().float().mean())
    return hook


for name, module in model.named_modules():
    if name.endswith("_gate"):
        module.register_forward_hook(noting(gates[name.split(".")[-1].removesuffix("_gate")]))
losses, right, asked, n_tokens, clock, stopped = [], Counter(), Counter(), 0, time.time(), 0
live = sys.stdout.isatty()  # on a terminal the log line is rewritten in place

maker = ThreadPoolExecutor(1)  # makes the next batch while gradients of this one are computed


def order_batch(step):
    return maker.submit(prepare, step, dict(state["stage"]), dict(state["running"]))


def move_on(task, accuracy, share_of_rows):
    """Note a task's accuracy in this step; let it go on to longer contexts when it is ready."""
    # a mean of about the last 33 steps, of a mixture's more as it has fewer of the rows
    weight = min(0.1, 0.03 * len(tasks) * share_of_rows)
    state["running"][task] += weight * (accuracy - state["running"][task])
    stage, chance = state["stage"][task], 1 / babi.TASKS[task].n_answers
    bar = flags.threshold * (1 - state["step"] / flags.steps / 3)  # a hard task moves on at last
    if state["running"][task] - chance > bar * (1 - chance) and stage < flags.segments:
        state["stage"][task] = min(flags.segments, stage + max(1, stage // 2))
        state["running"][task] = 0.0


def end_diverged(what):
    """End the run without saving, and say why."""
    print(f"\nstep {state['step']}: the {what}. Stopped; the checkpoint from before, if there is "
          "one, is untouched. Try a smaller --lr and --muon_lr.", file=sys.stderr)
    sys.exit(DIVERGED)


def log(seconds):
    """Count the seconds since the last row of the log, write another; returns the line to print."""
    state["seconds"] += seconds
    openness = {gate: sum(map(float, means)) / len(means) if means else math.nan
                for gate, means in gates.items()}
    accuracy = {task: right[task] / asked[task] if asked[task] else math.nan for task in tasks}
    row = {"step": state["step"], "loss": statistics.mean(losses),
           "accuracy": "" if flags.data else right.total() / asked.total(),
           "tokens_per_second": n_tokens / seconds, "seconds": state["seconds"]}
    row |= {f"{gate}_gate": mean for gate, mean in openness.items()}
    if flags.data:
        row["bits_per_byte"] = text_loss()[1]
    row |= accuracy | {f"{task}_stage": stage for task, stage in state["stage"].items()}
    try:
        with open(log_path, "a", newline="") as file:
            csv.DictWriter(file, columns).writerow(
                {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
    except OSError as error:
        die_to_resume(log_path, error.strerror)
    left = round((flags.steps - state["step"]) * state["seconds"] / state["step"])
    learned = f"{row['bits_per_byte']:.3f} bits/byte held out" if flags.data else \
        f"up to {max(state['stage'].values())} segments | accuracy {row['accuracy']:.3f}"
    shown = " ".join(f"{gate} {mean:.2f}" for gate, mean in openness.items() if mean == mean)
    said = (f"step {state['step']:5d}/{flags.steps} | {learned} | loss {row['loss']:.3f} | "
            f"{row['tokens_per_second'] / 1000:.0f}k tokens/s | gates {shown} | "
            f"{left // 60}:{left % 60:02} left")
    if len(tasks) > 1:
        said += "\n    stage and accuracy: " + " ".join(
            f"{task} {state['stage'][task]}:{value:.2f}" for task, value in accuracy.items())
    return said


coming = order_batch(state["step"])

while state["step"] < flags.steps and not stopped:
    step = state["step"]
    batch, total, count, rows_in, asked_in = coming.result()
    n_tokens += count
    tokens, at, answers, weights, first, task_of = (x.to(device) for x in batch.values())
    for optimizer, base in zip(optimizers, rates):
        for group, lr in zip(optimizer.param_groups, base):
            group["lr"] = lr * rate(step)
    with autocast:
        logits = compute(tokens, at)
    loss = F.cross_entropy(logits.float(), answers, reduction="none")
    loss = (loss * weights).sum() * world / total  # all processes' mean is that of the whole batch

    # what all processes must agree on: whether to stop, the loss, and each task's right answers
    sums = torch.zeros(2 + len(tasks), device=device)
    sums[0], sums[1] = len(stop), loss.detach() / world
    sums[2:].index_add_(0, task_of, (logits.argmax(-1) == answers)[first].float())
    if world > 1:
        dist.all_reduce(sums)
    stopped, mean_loss, *counts = sums.tolist()
    losses.append(mean_loss)
    if not math.isfinite(mean_loss):
        end_diverged(f"loss is {mean_loss}")
    asked += asked_in
    for task, n_right in zip(tasks, counts):
        right[task] += n_right
        if asked_in[task]:
            move_on(task, n_right / asked_in[task], rows_in[task] / rows_in.total())
    coming = order_batch(step + 1)

    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), flags.grad_clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    state["step"] += 1

    last, said = state["step"] == flags.steps or stopped, ""
    if state["step"] % flags.log_every == 0 or last:
        said = log(time.time() - clock)
        losses, right, asked, n_tokens, clock = [], Counter(), Counter(), 0, time.time()
        for means in gates.values():
            means.clear()
    if state["step"] % flags.save_every == 0 or last:
        if not math.isfinite(norm):  # what it did to the weights must not be saved
            end_diverged(f"gradient's norm is {norm.item()}")
        save()
    if said:  # after saving: who reads it may be gone
        rewritten = live and not last and "\n" not in said
        print("\r\033[K" * live + said, end="" if rewritten else "\n", flush=True)

signal.signal(signal.SIGINT, signal.SIG_DFL)
if dist.is_initialized():
    dist.destroy_process_group()
if stopped:
    print(f"stopped after step {state['step']}; go on with: "
          f"python train.py --resume --out={flags.out}")
if stopped or rank:
    sys.exit(0)

# --------------------------------------------------------------------------------------------
# The proof

model.eval()
summary = {"steps": state["step"], "train_seconds": round(state["seconds"])}
if flags.data:
    nats, bits = text_loss(most=2000)
    summary |= {"held_out_loss": round(nats, 4), "bits_per_byte": round(bits, 4)}


if tasks and flags.eval_times:
    # built-in noise is of another seed, a book never trained on; given texts are the same
    proof_noise = babi.load_noise(flags.noise, encoding, f"proof {flags.seed}")
    trained = flags.segments * flags.block_size
    clock = time.time()
    # times the trained length: number of samples
    counts = {1: 500, 2: 200, 4: 100, 16: 50, 64: 20} if len(tasks) == 1 else {1: 100}
    lengths = {trained * times: min(count, flags.eval_samples) for times, count in counts.items()
               if times <= flags.eval_times}
    rows = babi.proof_table(model, encoding, tasks, lengths, proof_noise, flags.seed)
    if len(tasks) == 1:
        lines = {"memory": "LM2 with its memory", "wiped": "bank wiped at every segment",
                 "swapped": "bank of another story", "chance": "chance"}
        babi.draw(os.path.join(flags.out, "proof.png"), {flags.task: {
            label: {row["tokens"]: [row[name]] for row in rows} for name, label in lines.items()}},
            f"tokens ({babi.shorten(trained)}: longest trained), facts in the first half", "accuracy")
    for row in rows:
        name = f"{row['tokens'] // trained}x" if len(tasks) == 1 else row["task"]
        summary |= {f"{bank}_{name}": row[bank] for bank in ("memory", "wiped", "swapped")}
    if real:
        print(f"\nThe real bAbI files in {flags.babi_dir}, facts anywhere")
        counts = {length: -(-count // len(tasks)) for length, count in
                  {0: 1000, 1024: 500, 4096: 200, 16384: 100}.items()}
        try:
            cells = babi.score_table(model, encoding, real, counts, proof_noise, flags.seed)
            summary |= {f"real_{cell['task']}_{cell['tokens']}": cell["accuracy"] for cell in cells}
        except ValueError as error:
            print(f"not scored: {error}")
    summary["proof_seconds"] = round(time.time() - clock)

print()
for key, value in summary.items():
    print(f"{key}: {value:.3f}" if isinstance(value, float) else f"{key}: {value}")
