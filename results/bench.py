"""What the memory costs: speed and working memory, as ratios taken in one run.

    OMP_NUM_THREADS=1 python -m results.bench   # on one CPU core; without it on all
    python -m results.bench --quick             # in seconds, to see whether it runs

It reads 1,000,000 tokens: speed and the process's memory stay as they were. It generates after 100
tokens and many more, with LM2's memory and with attention over all of them. It trains LM2 and the
rival RMT beside vanilla at 4 and 64 segments, in turn, every token scored. The sizes are those of
`python train.py`, the weights random: speed does not depend on them.
"""
import statistics
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import babilong_tiny as babi
from babilong_tiny import flag
from lm2 import LM2, LM2Config


@dataclass
class Flags:
    quick: bool = flag(False, "tiny settings, to see whether it runs")
    device: str = flag("cpu", "auto, cpu, cuda or mps")


def clock(device):
    """The time in seconds when the device has done all that it was told to do."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def timed(device, work, *args):
    """Seconds that the work takes."""
    start = clock(device)
    work(*args)
    return clock(device) - start


class Kernels(TorchDispatchMode):
    """Counts, as a context, the aten calls that compute something: all but views."""
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not (func.is_view or "_unsafe_view" in str(func))
        return func(*args, **(kwargs or {}))


def peak_memory():
    """MiB that this process has held at most; NaN on Windows, which does not say."""
    try:
        import resource
    except ImportError:
        return float("nan")
    unit = 1 if sys.platform == "darwin" else 1024     # bytes on a Mac, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


@torch.no_grad()
def bench_reading(model, count):
    memory, speeds, peaks = model.fresh_memory(1), [], []
    for _ in range(11):     # ten parts, and one before to warm up
        tokens = torch.randint(model.config.vocab_size, (1, count // 10), device=model.device)
        start = clock(model.device)
        memory = model.hidden_states(tokens, memory, last=1)[1]
        speeds.append(tokens.numel() / (clock(model.device) - start))
        peaks.append(peak_memory())
    print(f"\nreading {count:,} tokens: {speeds[1]:,.0f} tokens/s in the first tenth, "
          f"{speeds[-1]:,.0f} in the last, ratio {speeds[-1] / speeds[1]:.2f}\n"
          f"peak memory {peaks[0]:.0f} MiB at first, {peaks[-1]:.0f} after all, ratio "
          f"{peaks[-1] / peaks[0]:.3f}")


@torch.no_grad()
def bench_generation(model, positions, count):
    device, config, speeds = model.device, model.config, {"LM2": [], "full window": []}
    whole = LM2(replace(config, memory="none", block_size=positions[-1] + count)).to(device).eval()
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    for position in positions:
        memory = model.hidden_states(token.expand(1, position), last=1)[1]
        speeds["LM2"].append(
            count / timed(device, lambda: model.generate(token, count, memory=memory)))
        # reading so much would take minutes: its keys and values are made up
        attention = whole.blocks[0].attention
        shape = (1, attention.n_kv_head, position, attention.head_dim)
        cache = [{name: torch.randn(shape, device=device) for name in ("key", "value")}
                 for _ in whole.blocks]

        def generate():
            for _ in range(count):
                x, _ = whole.run(token, whole.fresh_memory(1), cache)
                torch.multinomial(whole.head(x[:, -1]).softmax(-1), 1)
        speeds["full window"].append(count / timed(device, generate))
    print("\ngeneration, tokens/s after so many tokens" + "".join(f"{n:>12,}" for n in positions))
    for name, row in speeds.items():
        print(f"{name:41}" + "".join(f"{speed:12,.0f}" for speed in row))
    print(f"{'LM2 over full window':41}" + "".join(
        f"{own / other:12.2f}" for own, other in zip(*speeds.values())))


def step(model, optimizers, tokens):
    """A step of training, with all tokens scored: else vanilla learns from few segments."""
    model(tokens, tokens)[1].backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def shares_of_parts(model, optimizers, tokens):
    """{part: share of a step's time}, taken by hooks forward and backward."""
    spent = Counter()

    def note(name, sign):
        def hook(*_):
            spent[name] += sign * clock(model.device)
        return hook

    for block in model.blocks:
        for name in ("attention", "read", "write", "feed_forward"):
            part = getattr(block, name)
            part.register_forward_pre_hook(note(name, -1))
            part.register_forward_hook(note(name, 1))
            part.register_full_backward_pre_hook(note(name, -1))
            part.register_full_backward_hook(note(name, 1))
    for optimizer in optimizers:
        optimizer.register_step_pre_hook(note("optimizers", -1))
        optimizer.register_step_post_hook(note("optimizers", 1))
    whole = timed(model.device, step, model, optimizers, tokens)
    spent["the rest"] = whole - sum(spent.values())
    return {name: seconds / whole for name, seconds in spent.items()}


def bench_training(config, device, segments, rounds):
    length = segments * config.block_size
    shape = min(32, 8192 // length), length     # as train.py makes its batches
    tokens = torch.randint(config.vocab_size, shape, device=device)
    arms, kernels, speeds = {}, {}, {"vanilla": [], "RMT": [], "LM2": []}
    for name, memory in zip(speeds, ("none", "rmt", "lm2")):
        model = LM2(replace(config, memory=memory)).to(device)
        arms[name] = model, model.optimizer(), tokens
        step(*arms[name])           # optimizers make their state in the first
        with Kernels() as counted:
            step(*arms[name])
        kernels[name] = counted.count
    for _ in range(rounds):
        for name, arm in arms.items():
            speeds[name].append(tokens.numel() / timed(device, step, *arm))
    print(f"\ntraining on {shape[0]} contexts of {segments} segments, median of {rounds} rounds\n"
          f"{'':8}parameters  tokens/s  of vanilla (lowest to highest)  kernels in a step")
    for name, (model, *_) in arms.items():
        ratios = sorted(own / base for own, base in zip(speeds[name], speeds["vanilla"]))
        print(f"{name:8}{sum(p.numel() for p in model.parameters()):10,}"
              f"{statistics.median(speeds[name]):10,.0f}{statistics.median(ratios):12.2f} "
              f"({ratios[0]:.2f} to {ratios[-1]:.2f}){kernels[name]:22,}")
    print("LM2's time: " + ", ".join(f"{name.replace('_', ' ')} {share:.0%}" for name, share in
                                     shares_of_parts(*arms["LM2"]).items()))


def main():
    babi.install_error_hook()
    flags = babi.parse_flags(Flags(), __doc__)
    device = torch.device(babi.find_device(flags.device))
    torch.manual_seed(0)
    config = LM2Config(babi.word_encoding().n_vocab)
    model = LM2(config).to(device).eval()
    print(f"device {device}, {torch.get_num_threads()} threads; ratios count: they were taken in "
          "turn, in this one run")
    bench_reading(model, 20_000 if flags.quick else 1_000_000)
    bench_generation(model, (10, 300) if flags.quick else (100, 10_000, 100_000),
                     5 if flags.quick else 100)
    for segments in (1, 2) if flags.quick else (4, 64):
        bench_training(config, device, segments, 2 if flags.quick else 9)


if __name__ == "__main__":
    main()
