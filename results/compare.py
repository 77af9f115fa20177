"""Train several models alike and score them side by side: one table, one CSV, one picture.

    python -m results.compare memory                            # LM2, its rivals, rivals as large
    python -m results.compare parts --train="--task=qa1,qa2 --n_layer=3"    # LM2 without a part
    python -m results.compare text --train="--data=book.txt"    # bits per byte of plain text

Every arm is a run of train.py with the flags --train, then of babilong_tiny.py with --score; both
are printed. What is done already is not done again, so a stopped comparison goes on where it was;
an arm whose loss is no longer a number is left out and named. All lies in the folder --out.
"""
import os
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass, fields

import torch

import babilong_tiny as babi
from babilong_tiny import flag
from lm2 import LM2, BadInput, LM2Config, load_checkpoint

DIVERGED = 3  # train.py's exit status


def words(text):
    return tuple(shlex.split(text))


@dataclass
class Flags:
    train: words = flag("", "flags of train.py for every arm")
    score: words = flag("--lengths=0,1k,4k,16k,64k --samples=500,200,200,100,50",
                        "flags of babilong_tiny.py for every arm")
    seeds: babi.token_counts = flag("0,1,2", "seeds that every arm gets")
    out: str = flag("", "folder of the runs (out-STUDY)")


def settings(flags):
    """{name: value, a string or for a switch a bool} of flags of train.py."""
    return dict(f[2:].split("=", 1) if "=" in f else (f[2:].removeprefix("no-"), f[:5] != "--no-")
                for f in flags)


def count(flags):
    """How many parameters a model has that train.py makes with these flags."""
    given = settings(flags)
    sizes = {f.name: f.type(given[f.name]) for f in fields(LM2Config) if f.name in given}
    with torch.device("meta"):
        model = LM2(LM2Config(babi.word_encoding().n_vocab, **sizes))
    return sum(p.numel() for p in model.parameters())


def matched(changes, flags):
    """The changes, with a feed-forward so wide that there are as many weights as in LM2."""
    least, next_, wanted = (count([*flags, *more]) for more in (
        [*changes, "--n_hidden=1"], [*changes, "--n_hidden=2"], []))
    return [*changes, f"--n_hidden={1 + round((wanted - least) / (next_ - least))}"]


def arms(study, flags):
    """Yields (name, flags of train.py that differ) of the models of a study; `flags` all have."""
    yield "LM2", []     # first: train.py says what is wrong with `flags`
    layers = int(settings(flags).get("n_layer", 2))
    if study == "memory":
        yield "RMT", ["--memory=rmt"]
        yield "RMT, as many weights", matched(["--memory=rmt"], flags)
        yield "vanilla, full window", ["--memory=none", "--block_size=4096"]
    if study == "parts":
        for name, change in {
                "no output gate": "--no-output_gate", "no input gate": "--no-input_gate",
                "no forget gate": "--no-forget_gate", "plain sigmoids": "--no-hard_gates",
                "no slot addresses": "--no-address", "banks may change": "--keep=0",
                "gates that see news alone": "--no-gates_see_bank", "no local mixer": "--conv=0",
                **{f"{n} slots": f"--memory_slots={n}" for n in (1, 4, 64)}}.items():
            yield name, [change]
    if study != "memory":
        for k in dict.fromkeys(k for k in (layers // 2, 1) if 0 < k < layers):
            yield f"memory in the first {k}", [f"--memory_layers={k}"]
    yield "vanilla", ["--memory=none"]
    if study != "parts":
        yield "vanilla, as many weights", matched(["--memory=none"], flags)


def call(script, *given):
    """Run a script of ours to its end, said in full; its exit status."""
    print(shlex.join(["python", script, *given]), flush=True)
    code = subprocess.run([sys.executable, script, *given]).returncode
    if code not in (0, DIVERGED):
        sys.exit(code)
    return code


def run_arm(study, name, seed, given, flags):
    """Train and score one arm, unless that is done: its cells of the table, or none if diverged."""
    out = os.path.join(flags.out, f"{name.replace(', ', '-').replace(' ', '-')}-{seed}")
    path = os.path.join(out, "ckpt.pt")
    begun = ["--resume"] * os.path.exists(path)     # which ends at once where all is done
    if call("train.py", *given, "--proof=0", f"--out={out}", *begun) == DIVERGED:
        return []
    trained = load_checkpoint(path)
    about = {"arm": name, "seed": seed, "seconds": round(trained["train"]["seconds"]),
             "parameters": sum(p.numel() for p in trained["model"].values())}
    if study == "text":
        rows = babi.read_csv(os.path.join(out, "log.csv"), ("step", "bits_per_byte"))
        return [about | {"task": "text", "at": int(row["step"]),
                         "value": float(row["bits_per_byte"])} for row in rows]
    cells = []
    retrieves = study == "memory" and name == "vanilla"
    for kind, n in {"": 0, ", retrieval": 5}.items() if retrieves else {"": 0}.items():
        scores = os.path.join(out, f"scores{kind[2:]}.csv")
        if not os.path.exists(scores):
            call("babilong_tiny.py", f"--ckpt={path}", f"--retrieve={n}", f"--csv={scores}",
                 *flags.score)
        cells += [about | {"arm": name + kind, "task": row["task"], "at": int(row["tokens"]),
                           "value": float(row["accuracy"])}
                  for row in babi.read_csv(scores, ("task", "tokens", "accuracy"))]
    return cells


def report(cells, lost, path):
    """Print mean and standard deviation over the seeds; write a CSV and a picture."""
    print("\nleft out, as their loss was no longer a number: " + "; ".join(lost) if lost else "")
    if not cells:
        return
    babi.write_csv(path + ".csv", cells, cells[0])
    spread = {}     # {task: {arm: {tokens or step: [a value for each seed]}}}
    for cell in cells:
        row = spread.setdefault(cell["task"], {}).setdefault(cell["arm"], {})
        row.setdefault(cell["at"], []).append(cell["value"])
    for task, rows in spread.items():
        columns = sorted({at for row in rows.values() for at in row})[-1 if task == "text" else 0:]
        print(f"\n{task:33}parameters  seconds  seeds"
              + "".join(f"{babi.shorten(at):>14}" for at in columns))
        for name, row in rows.items():
            own = [cell for cell in cells if cell["arm"] == name]
            print(f"{name:33}{own[0]['parameters']:>10,}"
                  f"{statistics.mean(cell['seconds'] for cell in own):9.0f}"
                  f"{len({cell['seed'] for cell in own}):7}"
                  + "".join(f"  {statistics.mean(row[at]):.3f} ±{statistics.pstdev(row[at]):.3f}"
                            for at in columns))
    draw(path + ".png", spread)


def draw(path, panels):
    """Draw {title: {label: {x: [one value a seed]}}}: means, and bands to lowest and highest."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return print("\n(pip install matplotlib, and this ends with a picture)")
    figure = Figure(figsize=(5.5 * len(panels) + 1.5, 4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, (title, lines) in zip(axes, panels.items()):
        text = title == "text"
        for i, (label, values) in enumerate(lines.items()):
            axis.plot(list(values), [statistics.mean(v) for v in values.values()],
                      "-" if text else "-" + "os^vDPX*<>hd"[i % 12], label=label)
            axis.fill_between(list(values), [min(v) for v in values.values()],
                              [max(v) for v in values.values()], alpha=0.15)
        axis.set(title=title, xlabel="steps" if text else "tokens of context")
        if not text:
            ticks = sorted({x for values in lines.values() for x in values})
            axis.set_xscale("symlog", base=2, linthresh=1024)
            axis.set(ylim=(0, 1.03), xticks=ticks, xticklabels=[babi.shorten(x) for x in ticks])
            axis.minorticks_off()
    axes[0].set_ylabel("bits per byte of held-out text" if "text" in panels else "accuracy")
    axes[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)
    print(f"\npicture: {path}", flush=True)


def main():
    babi.install_error_hook()
    study = sys.argv.pop(1) if len(sys.argv) > 1 and sys.argv[1][:1] != "-" else ""
    flags, cells, lost = babi.parse_flags(Flags(), __doc__), [], []
    if study not in ("memory", "parts", "text"):
        raise BadInput("say what to compare: memory, parts or text (see --help)")
    if ("data" in settings(flags.train)) != (study == "text"):
        raise BadInput("`text` needs --train=--data=book.txt, and the others have no --data")
    flags.out = flags.out or f"out-{study}"
    for seed in dict.fromkeys(flags.seeds):
        for name, changes in arms(study, flags.train):
            print(f"\n{name}, seed {seed}")
            found = run_arm(study, name, seed, [*flags.train, *changes, f"--seed={seed}"], flags)
            cells += found
            lost += [] if found else [f"{name}, seed {seed}"]
        report(cells, lost, os.path.join(flags.out, study))


if __name__ == "__main__":
    main()
