"""Teach an LM2 to use its memory, and prove that it does.

    python train.py                          # some minutes on a CPU core; ends in the proof
    python train.py --task=qa1,qa2 --n_layer=3 --questions=8 --keep=0.1 --halve=0.5 --out=out-qa2
    python train.py --data=book.txt --out=out-book      # any text instead of stories
    python train.py --resume                 # exactly on; with --steps=5000 to another end
    torchrun --nproc_per_node=2 train.py     # each batch shared by two processes

The file reads from top to bottom: flags, set-up, data, model, the loop, the proof. Ctrl-C saves
and ends; everything a run writes lies in the folder `--out`.
"""
import csv
import math
import os
import random
import signal
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
from babilong_tiny import flag
from lm2 import LM2, BadInput, LM2Config, load_checkpoint


@dataclass
class Flags:
    # what to learn
    task: str = flag("qa1", "bAbI task to learn, several (qa1,qa6), or all")
    noise: str = flag("", "texts to hide the facts in, instead of the built-in noise: a.txt,b.txt")
    data: str = flag("", "a text file to learn instead of a task")
    tokenizer: str = flag("words", "words, or a name tiktoken knows such as gpt2")
    out: str = flag("out", "folder for the checkpoint and the log")
    resume: bool = flag(False, "go on from the checkpoint in the folder --out, with its flags")
    # the model, see LM2Config
    block_size: int = flag(64, "tokens in a segment", 1, 2**20)
    n_layer: int = flag(2, "blocks")
    n_head: int = flag(4, "attention heads")
    n_kv_head: int = flag(2, "key/value heads")
    n_embd: int = flag(64, "width")
    n_hidden: int = flag(0, "width of the feed-forward, 0 for 8/3 n_embd")
    conv: int = flag(7, "tokens the local mixer sees, 0 for none")
    memory: str = flag("lm2", "kind of memory", choices=("lm2", "rmt", "none"))
    memory_slots: int = flag(16, "slots of a memory bank")
    memory_layers: int = flag(-1, "the first k blocks have memory, -1 for all")
    output_gate: bool = flag(True, "gate what is read")
    input_gate: bool = flag(True, "gate what is written")
    forget_gate: bool = flag(True, "gate what is kept")
    gates_see_bank: bool = flag(True, "gates that see what the bank holds, not the news alone")
    hard_gates: bool = flag(True, "gates that can shut and open wholly")
    address: bool = flag(True, "give every slot a learned name")
    # training
    steps: int = flag(3000, "training steps", 1)
    batch_size: int = flag(32, "samples in a step while contexts are short", 1)
    batch_tokens: int = flag(8192, "most tokens in a step: long contexts, small batches", 1)
    context: int = flag(4096, "tokens of the longest training context", 64, 2**24)
    window: int = flag(512, "tokens of a training window, with --data", 1, 2**24)
    questions: int = flag(4, "questions at the end of a training sample", 1)
    asides: float = flag(1.0, "largest share of a story's facts with a question by the way", 0, 1)
    threshold: float = flag(0.9, "way from chance to all right that moves a task on", 0, 1)
    halve: float = flag(1.0, "part of the steps after which segments are half as long", 0, 1)
    keep: float = flag(1.0, "weight of the banks' mean change in the loss, while it cools down", 0)
    lr: float = flag(2e-3, "AdamW learning rate (all but the matrices inside blocks)", 0, 100)
    muon_lr: float = flag(1e-2, "Muon learning rate (matrices inside blocks)", 0, 100)
    weight_decay: float = flag(0.1, "decay of the matrices inside blocks, but the gates'", 0, 100)
    warmup: int = flag(50, "steps until the learning rate is whole", 0)
    cooldown: float = flag(0.6, "part of the steps, the last, in which it falls", 0, 1)
    grad_clip: float = flag(1.0, "largest norm of the gradient", 1e-9, 1e9)
    seed: int = flag(0, "seed of weights and data", 0, 2**63 - 1)
    # the machine, the log and the proof
    device: str = flag("auto", "auto, cpu, cuda or mps")
    log_every: int = flag(100, "steps between log lines", 1)
    save_every: int = flag(500, "steps between checkpoints", 1)
    proof: int = flag(16, "longest row of the proof, in longest contexts; 0 for no proof", 0)


# a resumed run takes its flags from the checkpoint, but for these
FREE = ("resume", "out", "device", "steps", "log_every", "save_every", "proof")
DIVERGED = 3  # exit status of a run whose loss is no longer a number

# --------------------------------------------------------------------------------------------
# Set-up: whatever can be wrong is found here, before anything is written

babi.install_error_hook()
flags, checkpoint = babi.parse_flags(Flags(), __doc__), None
ckpt_path = os.path.join(flags.out, "ckpt.pt")
if flags.resume:
    checkpoint = load_checkpoint(ckpt_path)
    try:
        saved = Flags(**checkpoint["train"]["flags"])
        flags = babi.parse_flags(replace(saved, out=flags.out), __doc__)
    except (TypeError, KeyError):
        raise BadInput(f"{ckpt_path} is of another version of this code") from None
    for name, value in asdict(saved).items():
        if name not in FREE and getattr(flags, name) != value:
            raise BadInput(f"{ckpt_path} was trained with --{name}={value}: a resumed run takes "
                           f"its flags from there; leave --{name} away, or choose another --out")
elif os.path.exists(ckpt_path):
    raise BadInput(f"{ckpt_path} is there from an earlier run; --resume it, choose another --out "
                   "or remove it")

# under torchrun this is one of `world` processes, each with its share of every batch
world, rank = os.environ.get("WORLD_SIZE", "1"), os.environ.get("RANK", "0")
if not (world.isdecimal() and rank.isdecimal() and 0 < int(world) <= flags.batch_size):
    raise BadInput(f"WORLD_SIZE={world}, RANK={rank}: unset them, or raise --batch_size")
world, rank = int(world), int(rank)
if rank:
    sys.stdout = open(os.devnull, "w")  # the first process speaks and writes for all
device = babi.find_device(flags.device)
device_type = device.split(":")[0]
if world > 1:
    if device_type == "mps" or device_type == "cuda" and torch.cuda.device_count() < world:
        raise BadInput(f"{world} processes need as many CUDA devices, or --device=cpu")
    if device_type == "cuda":
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    except (ValueError, RuntimeError):
        raise BadInput("WORLD_SIZE is set, but the processes do not find each other; begin them "
                       "with torchrun") from None
# bfloat16 where a GPU computes in it, float32 elsewhere
native = device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
autocast = torch.autocast(device_type, torch.bfloat16, enabled=native)

# --------------------------------------------------------------------------------------------
# Data: every batch is a function of the seed, the step and where the tasks stand, so that a
# resumed run sees the same ones

books = [flags.data] if flags.data else [name for name in flags.noise.split(",") if name]
if flags.data and (flags.noise or flags.task != Flags.task):
    raise BadInput("--data learns a text: leave --task and --noise away")
texts = 0  # a number that tells texts apart: a resumed run must have the same
for book in books:
    with open(book, "rb") as file:
        for line in file:
            texts = zlib.crc32(line, texts)
if checkpoint and checkpoint["train"].get("text") != texts:
    raise BadInput(f"the run in {flags.out} began with another text than {', '.join(books)}")

text = babi.read_text(flags.data) if flags.data else ""
split = len(text) * 9 // 10                             # the last tenth is held out
if checkpoint:
    encoding = LM2.load(checkpoint)[1]
else:
    encoding = babi.load_encoding(flags.tokenizer, [text[:split]] if text else (
        sentence for book in books for sentence in babi.read_sentences(book)))

if flags.data:
    tasks, curriculum = (), None
    train_ids, held_out = (torch.tensor(encoding.encode_ordinary(part))
                           for part in (text[:split], text[split:]))
    if min(len(train_ids), len(held_out)) <= flags.window:
        raise BadInput(f"--data={flags.data}: its last tenth, held out, has {len(held_out)} tokens "
                       f"and must have more than --window={flags.window}: use a longer text")
else:
    tasks = babi.parse_tasks(flags.task)
    noise = babi.load_noise(flags.noise, encoding, flags.seed)
    curriculum = babi.Curriculum(tasks, encoding, noise, flags, world)


def text_batch(step):
    """(tokens, targets, no tasks) of random windows of the text; targets are the next tokens."""
    rng = random.Random(f"{flags.seed} {step}")
    rows = babi.rows_of(flags.window, flags, world)
    starts = [rng.randrange(len(train_ids) - flags.window) for _ in range(rows)]
    windows = torch.stack([train_ids[i:i + flags.window + 1] for i in starts])
    return windows[:, :-1], windows[:, 1:], torch.zeros(rows, dtype=torch.long)


@torch.no_grad()
def text_loss(most=200):
    """Mean loss in nats per token and in bits per byte over windows of the held-out text."""
    pieces, total = held_out.unfold(0, flags.window + 1, flags.window)[:most], 0.0
    for piece in pieces.to(device).split(max(1, flags.batch_tokens // flags.window)):
        with autocast:
            total += model(piece[:, :-1], piece[:, 1:])[1].item() * len(piece)
    n_bytes = len(encoding.decode_bytes(pieces[:, 1:].flatten().tolist()))
    return total / len(pieces), total * flags.window / math.log(2) / n_bytes


def prepare(step):
    """The batch of a step, made ahead in a thread; of its rows this process has every world-th.

    tokens (b, T); of its b * T positions the n scored ones, `at`, what to say there, `answers`, and
    their `weights` in the loss; which of these n begin an answer, `first`, and the task of each of
    those, `task_of`. Then the number of tokens in all rows, and each task's rows and answers there.
    """
    tokens, targets, task_of_row = (curriculum.batch if curriculum else text_batch)(step)
    scored = targets >= 0                                                           # (B, T)
    begins = scored & (targets.roll(1, dims=1) < 0)
    # tasks differ in how many questions a story allows: in a mixture each of a row's n targets
    # weighs n ** -0.5, or the tasks with many would have nearly all of the gradient
    weights = scored / scored.sum(1, keepdim=True).clamp(min=1) ** (0.5 if len(tasks) > 1 else 0.0)
    weights, mine = weights / weights.sum(), slice(rank, None, world)
    names, asked = [tasks[i] for i in task_of_row] if tasks else [], Counter()
    for name, count in zip(names, begins.sum(1).tolist()):
        asked[name] += count
    return {"tokens": tokens[mine], "at": scored[mine].flatten().nonzero()[:, 0],
            "answers": targets[mine][scored[mine]], "weights": weights[mine][scored[mine]],
            "first": begins[mine][scored[mine]].nonzero()[:, 0],
            "task_of": task_of_row[mine][begins[mine].nonzero()[:, 0]],
            }, tokens.numel(), Counter(names), asked


# --------------------------------------------------------------------------------------------
# Model, optimizers, schedule

torch.manual_seed(flags.seed)
sizes = {f.name: getattr(flags, f.name) for f in fields(LM2Config) if hasattr(flags, f.name)}
config = LM2Config(encoding.n_vocab, **sizes)
try:
    model = LM2(config).to(device)
except (MemoryError, RuntimeError) as error:
    raise BadInput(f"this model cannot be built: {str(error).splitlines()[0]}") from None
optimizers = model.optimizer(flags.lr, flags.muon_lr, flags.weight_decay)
state = {"step": 0, "seconds": 0.0, "flags": asdict(flags), "text": texts,  # of the run so far
         "stage": curriculum.stage if curriculum else {},
         "running": curriculum.running if curriculum else {}}
changes, gates = [], {}     # filled by hooks: each bank's in this step; {gate: [means]} to log


def fitted(weights, size):
    """Weights for segments of `size` tokens: `position` keeps its last columns or gets zeros."""
    return {name: F.pad(p, (size - p.size(-1), 0)) if name.endswith("position") else p
            for name, p in weights.items()}


class Scorer(torch.nn.Module):
    """tokens (b, T), positions `at` (n,) among all b * T -> logits (n, V), the banks' change ()."""

    def __init__(self):
        super().__init__()
        self.model = model

    def forward(self, tokens, at):
        changes.clear()
        hidden, _ = self.model.hidden_states(tokens)
        change = torch.stack(changes).sum() if changes else hidden.new_zeros(())
        return self.model.head(hidden.flatten(0, 1)[at]), change


def note_change(write, args, output):
    """Mean of |M' - M| over segments, slots and channels."""
    banks, bank = output
    changes.append(torch.cat((banks, bank[:, None]), 1).diff(dim=1).abs().mean())


def note_gates(module, args, gate):
    if torch.is_grad_enabled() and (state["step"] + 1) % flags.log_every == 0:
        names = ("output",) if gate.dim() == 4 else ("input", "forget")
        for name, part in zip(names, gate.detach().chunk(len(names), dim=-1)):
            gates.setdefault(name, []).append(part.float().mean())


for block in model.blocks:
    if block.write:
        block.write.register_forward_hook(note_change)
        block.write.gate.register_forward_hook(note_gates)
        block.read.gate.register_forward_hook(note_gates)
scorer = Scorer()
if world > 1:  # averages the gradients of all processes
    scorer = torch.nn.parallel.DistributedDataParallel(scorer)

if checkpoint:
    saved = checkpoint["train"]
    config.block_size = checkpoint["config"]["block_size"]
    try:
        model.load_state_dict(fitted(checkpoint["model"], flags.block_size))
        for optimizer, its_state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(its_state)
        state |= {"step": int(saved["step"]), "seconds": float(saved["seconds"])}
        for task in tasks:
            curriculum.stage[task] = int(saved["stage"][task])
            curriculum.running[task] = float(saved["running"][task])
    except (KeyError, RuntimeError, TypeError, ValueError):
        raise BadInput(f"{ckpt_path} belongs to another model or version of this code") from None


def rate(step):
    """Share of the learning rate at this step: linear up, flat, linear down to a fiftieth."""
    left = (flags.steps - step) / flags.steps
    return min(1.0, (step + 1) / max(1, flags.warmup),
               max(0.02, left / flags.cooldown if flags.cooldown else 1.0))


def save():
    """Write the checkpoint to the side and move it into place: a crash leaves the old one whole."""
    tokens = [encoding.decode_single_token_bytes(i).decode("latin-1")
              for i in range(encoding.n_vocab)]
    data = {"config": asdict(config), "model": fitted(model.state_dict(), config.block_size),
            "tokenizer": {"pattern": encoding._pat_str, "tokens": tokens},
            "train": state | {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}}
    with babi.replaced(ckpt_path, "wb") as file:
        torch.save(data, file)


def log(seconds):
    """Add a row to the log and return the line to print."""
    state["seconds"] += seconds
    row = {"step": state["step"], "seconds": state["seconds"], "loss": sum(losses) / len(losses),
           "tokens_per_second": n_tokens / seconds, "change": change.item()}
    row |= {f"{gate}_gate": mean for gate, mean in zip(gates, torch.stack(
        [torch.stack(means).mean() for means in gates.values()]).tolist())} if gates else {}
    if flags.data:
        row["bits_per_byte"] = text_loss()[1]
        said = f"{row['bits_per_byte']:.3f} bits/byte held out"
    else:
        row["accuracy"] = right.total() / asked.total()
        row |= {task: right[task] / asked[task] if asked[task] else math.nan for task in tasks}
        row |= {f"{task}_stage": stage for task, stage in state["stage"].items()}
        longest = max(state["stage"].values()) * curriculum.UNIT
        said = f"up to {longest:4d} tokens | accuracy {row['accuracy']:.3f}"
    with open(log_path, "a", newline="") as file:
        csv.DictWriter(file, columns).writerow(
            {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
    left = round((flags.steps - state["step"]) * state["seconds"] / state["step"])
    said = (f"step {state['step']:5d}/{flags.steps} | {said} | loss {row['loss']:.3f} | "
            f"{row['tokens_per_second'] / 1000:.0f}k tokens/s"
            + "".join(f" | {gate} {row[f'{gate}_gate']:.2f}" for gate in gates)
            + f" | {left // 60}:{left % 60:02} left")
    if len(tasks) > 1:
        said += "\n    stage and accuracy: " + " ".join(
            f"{task} {state['stage'][task]}:{row[task]:.2f}" for task in tasks)
    return said


def diverged(what):
    """End the run without saving, and say why."""
    print(f"\nstep {state['step']}: the {what}. Stopped; the checkpoint from before, if there is "
          "one, is untouched. Try a smaller --lr and --muon_lr.", file=sys.stderr)
    sys.exit(DIVERGED)


# --------------------------------------------------------------------------------------------
# The loop

log_path = os.devnull if rank else os.path.join(flags.out, "log.csv")
columns = ["step", "loss", "accuracy", "bits_per_byte", "tokens_per_second", "input_gate",
           "forget_gate", "output_gate", "change", "seconds", *tasks,
           *(f"{task}_stage" for task in tasks)]
if not rank:
    os.makedirs(flags.out, exist_ok=True)
    rows = babi.read_csv(log_path, columns) if os.path.exists(log_path) else []
    rows = [row for row in rows if int(row["step"]) <= state["step"]]   # a crash may leave more
    babi.write_csv(log_path, rows, columns)
print(f"device {device}, {torch.get_num_threads()} threads, {'bfloat16' if native else 'float32'}")
print(f"model: {sum(p.numel() for p in model.parameters()):,} parameters, vocabulary "
      f"{config.vocab_size}, memory {config.memory}")
print(f"{flags.data or flags.task}: {flags.steps} steps, contexts of up to "
      f"{flags.window if flags.data else flags.context} tokens in segments of {flags.block_size}"
      + (f", after step {flags.halve * flags.steps:.0f} half of it" if flags.halve < 1 else ""))

stop = []
signal.signal(signal.SIGINT, lambda *_: stop.append(True))      # Ctrl-C: end after this step
losses, right, asked, n_tokens, clock, stopped = [], Counter(), Counter(), 0, time.time(), False
maker = ThreadPoolExecutor(1)   # makes the next batch while gradients of this one are computed
coming = maker.submit(prepare, state["step"])

while state["step"] < flags.steps and not stopped:
    batch, count, rows_in, asked_in = coming.result()
    tokens, at, answers, weights, first, task_of = (x.to(device) for x in batch.values())
    if state["step"] >= flags.halve * flags.steps:
        config.block_size = max(1, flags.block_size // 2)
    share = rate(state["step"])
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = optimizer.defaults["lr"] * share
    with autocast:
        logits, change = scorer(tokens, at)
    loss = (F.cross_entropy(logits.float(), answers, reduction="none") * weights).sum() * world
    cooled = 1 - share if state["step"] > flags.warmup else 0.0
    (loss + flags.keep * cooled * change).backward()

    # what all processes must agree on: whether to stop, the loss, and each task's right answers
    sums = torch.zeros(2 + len(tasks), device=device)
    sums[0], sums[1] = len(stop), loss.detach() / world
    if tasks:
        sums[2:].index_add_(0, task_of, (logits.argmax(-1) == answers)[first].float())
    if world > 1:
        dist.all_reduce(sums)
    stopped, mean_loss, *counts = sums.tolist()
    counts = Counter(dict(zip(tasks, counts)))
    if not math.isfinite(mean_loss):
        diverged(f"loss is {mean_loss}")
    losses.append(mean_loss)
    n_tokens, asked, right = n_tokens + count, asked + asked_in, right + counts
    if curriculum:
        curriculum.note(state["step"], counts, asked_in, rows_in)
    coming = maker.submit(prepare, state["step"] + 1)

    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), flags.grad_clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    state["step"] += 1

    stopped = stopped or bool(stop and world == 1)
    last, said = state["step"] == flags.steps or stopped, ""
    if state["step"] % flags.log_every == 0 or last:
        said = log(time.time() - clock)
        losses, right, asked, n_tokens, clock = [], Counter(), Counter(), 0, time.time()
        gates.clear()
    if state["step"] % flags.save_every == 0 or last:
        if not math.isfinite(norm):     # what it did to the weights must not be saved
            diverged(f"gradient's norm is {norm.item()}")
        if not rank:
            save()
    if said:    # after saving: who reads it may be gone
        print(said, flush=True)

signal.signal(signal.SIGINT, signal.SIG_DFL)
if world > 1:
    dist.destroy_process_group()
if stopped:
    print(f"stopped after step {state['step']}; go on with: python train.py --resume "
          f"--out={flags.out}")
if stopped or rank:
    sys.exit(0)

# --------------------------------------------------------------------------------------------
# The proof

model.eval()
summary = {"steps": state["step"], "train_seconds": round(state["seconds"])}
clock = time.time()
if flags.data:
    nats, bits = text_loss(most=2000)
    summary |= {"held_out_loss": round(nats, 4), "bits_per_byte": round(bits, 4)}
elif flags.proof:
    # built-in noise is of another seed, a book never trained on; given texts are the same
    proof_noise = babi.load_noise(flags.noise, encoding, f"proof {flags.seed}")
    # {times the longest context: samples}
    counts = {1: 200, 4: 100, 16: 50, 64: 20, 256: 10} if len(tasks) == 1 else {1: 100}
    lengths = {flags.context * n: count for n, count in counts.items() if n <= flags.proof}
    for row in babi.proof_table(model, encoding, tasks, lengths, proof_noise, flags.seed):
        name = f"{row['tokens'] // flags.context}x" if len(tasks) == 1 else row["task"]
        summary |= {f"{bank}_{name}": row[bank] for bank in ("memory", "wiped", "swapped")}
    summary["proof_seconds"] = round(time.time() - clock)

print()
for key, value in summary.items():
    print(f"{key}: {value:.3f}" if isinstance(value, float) else f"{key}: {value}")
