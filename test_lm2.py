"""What must always hold. Each name is a sentence that is true; run with `pytest -q`.

A falling loss proves nothing about a memory: what leaks past it helps the loss as well.

    pytest -q -k assignment_read             # one assignment's tests alone, see ASSIGNMENTS
    python test_lm2.py --blank=FOLDER        # a copy of the project with the assignments to solve
"""
import ast
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import runpy
import shutil
import signal
import subprocess
import sys
import types
import warnings
from functools import partial
from pathlib import Path
from unittest.mock import DEFAULT, Mock

os.environ["OMP_NUM_THREADS"] = "1"  # models are tiny

import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

import babilong_tiny as babi
import sample
from lm2 import (LM2, BadInput, FeedForward, Gate, LM2Config, MemoryWrite, Muon, load_checkpoint,
                 normed)

HERE = os.path.dirname(os.path.abspath(__file__))
SEED = 0    # of all random numbers that oracles are given
BYTES = [chr(byte) for byte in range(256)]
TWO = ("qa1", "qa6")
TINY = ["--n_embd=16", "--n_head=2", "--n_kv_head=1", "--context=128", "--batch_size=4",
        "--log_every=5", "--device=cpu", "--proof=0"]
STORY = "Mary went to the kitchen. John moved to the office. "


def random_model(dtype=torch.float64, **changes):
    """A small model all of whose weights are random, so that nothing is hidden behind a zero."""
    sizes = dict(vocab_size=11, block_size=4, n_layer=2, n_head=2, n_kv_head=1, n_embd=8, conv=3,
                 memory_slots=3)
    torch.manual_seed(SEED)
    model = LM2(LM2Config(**sizes | changes)).to(dtype).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


def random_tokens(B=2, T=18, vocab=11, seed=0):
    return torch.randint(vocab, (B, T), generator=torch.Generator().manual_seed(SEED + seed))


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(SEED + seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def close(found, expected):
    """Whether two tensors are alike; pytest shows what is printed where a test fails."""
    error = (found - expected).abs().max().item() if found.shape == expected.shape else math.nan
    print(f"found {tuple(found.shape)}, expected {tuple(expected.shape)}, differ by {error:.1e}")
    return error < 1e-9


# --------------------------------------------------------------------------------------------
# The parts that are assignments: each without the others, against the equations once more, in slow
# loops over rows, segments, tokens and slots

ASSIGNMENTS = {"attention": ("Attention.forward",), "gate": ("Gate.forward",),
               "read": ("MemoryRead.attention", "MemoryRead.forward"),
               "write": ("MemoryWrite.attention", "MemoryWrite.forward"),
               "block": ("Block.forward",)}
rms = partial(F.rms_norm, normalized_shape=(8,))


def hard(x):
    return (1.2 / (1 + torch.exp(-x)) - 0.1).clamp(0, 1)


def part(name, **changes):
    """A block's attention, read or write, with random weights and a gate that is not lm2.py's."""
    module = getattr(random_model(**changes).blocks[0], name)
    if name != "attention":
        module.gate.forward = hard
    return module


def loop(function, *tensors, depth=2):
    """A function of one segment of each tensor (B, S, ...), for all rows and segments."""
    return torch.stack([loop(function, *each, depth=depth - 1) if depth > 1 else function(*each)
                        for each in zip(*tensors, strict=True)])


def alike(module, found, expected):
    """Close, and so are the gradients of a module's weights."""
    gradients = [torch.autograd.grad(y.cos().sum(), [*module.parameters()], allow_unused=True,
                                     materialize_grads=True) for y in (found, expected)]
    return close(found, expected) and all(map(close, *gradients))


def turned(v, t, base):
    """A head's vector at position t: pairs of channels as complex numbers, times e^(i angle)."""
    pairs = torch.complex(*v.chunk(2))
    angle = t * base ** (-torch.arange(len(pairs), dtype=v.dtype) / len(pairs))
    return torch.view_as_real(pairs * torch.polar(angle ** 0, angle)).T.flatten()


def slow_attention(layer, e, turn=lambda v, t: v):
    """One segment e (T, d), token by token and head by head; q and k are turned."""
    q, kv = (part(e).unflatten(-1, (-1, layer.head_dim)) for part in (layer.query, layer.key_value))
    out = torch.zeros_like(q)
    for t, i in itertools.product(range(len(e)), range(layer.n_head)):
        k = i // (layer.n_head // layer.n_kv_head)
        scores = torch.stack([turn(q[t, i], t) @ turn(kv[s, k], s) for s in range(t + 1)])
        shares = (scores / math.sqrt(layer.head_dim)).softmax(0)
        out[t, i] = sum(a * v[layer.n_kv_head + k] for a, v in zip(shares, kv))
    return layer.output(out.flatten(1))


def test_assignment_attention_without_positions_equals_slow_loops():
    layer, x = part("attention", n_embd=16, n_head=4, n_kv_head=2), randn(2, 2, 4, 16)
    layer.rotary = lambda x, first: x
    assert close(layer(x), loop(partial(slow_attention, layer), x))


def test_assignment_attention_equals_slow_loops():
    for base in (10000.0, 100.0):
        layer = part("attention", n_embd=16, n_head=4, n_kv_head=2, rope_base=base)
        x, slow = randn(2, 2, 4, 16), partial(slow_attention, turn=partial(turned, base=base))
        assert alike(layer, layer(x), loop(partial(slow, layer), x)), base


def test_assignment_attention_goes_on_from_its_cache():
    layer, x, cache = part("attention"), randn(2, 1, 4, 8), {}
    parts = [layer(x[:, :, start:stop], cache) for start, stop in ((0, 2), (2, 3), (3, 4))]
    assert close(torch.cat(parts, dim=2), layer(x)) and not close(parts[-1], layer(x[:, :, 3:]))


def test_assignment_attention_obeys_a_mask():
    layer, x, everyone = part("attention"), randn(2, 1, 4, 8), torch.ones(4, 4).bool()
    assert close(layer(x, mask=everyone.tril()), layer(x))
    assert not close(layer(x, mask=everyone)[:, :, :1], layer(x[:, :, :1]))
    layer.rotary = lambda x, first: x
    assert close(layer(x.flip(2), mask=everyone), layer(x, mask=everyone).flip(2))


def test_assignment_gate_equals_its_formula():
    x = 3 * randn(50)
    assert close(Gate(False)(x), 1 / (1 + torch.exp(-x))) and close(Gate(True)(x), hard(x))


def test_assignment_gate_has_the_right_gradient():
    x = torch.linspace(-4, 4, 9).double().requires_grad_()
    plain = x.detach().sigmoid()
    slope, inside = plain * (1 - plain), (plain - 0.5).abs() < 0.5 / 1.2
    assert close(torch.autograd.grad(Gate(False)(x).sum(), x)[0], slope)
    assert close(torch.autograd.grad(Gate(True)(x).sum(), x)[0], slope * inside * 6 / 5)


def slow_read_shares(read, x, slots):
    """Eq. 1: how each token attends to the slots of one segment, both normed."""
    keys = [read.key(slot) for slot in slots + read.address]
    return torch.stack([torch.stack([read.query(token) @ key / math.sqrt(8) for key in keys])
                        .softmax(0) for token in x])


def slow_read(read, bank, shares):
    """Eqs. 2 and 3 for one segment."""
    recalled = [sum(a * read.value(rms(slot)) for a, slot in zip(row, bank)) for row in shares]
    return torch.stack([hard(read.output_gate(found)) * found for found in recalled])


def test_assignment_read_finds_a_slot_for_each_token():
    for address in (True, False):
        read, x, slots = part("read", address=address), randn(2, 2, 4, 8), randn(2, 2, 3, 8, seed=1)
        expected = loop(partial(slow_read_shares, read), x, slots)
        assert torch.is_tensor(read.address) == address
        assert alike(read, read.attention(x, slots), expected), address


def test_assignment_read_gates_what_was_recalled():
    """The shares are given here, if they are asked for rightly, so that this part counts alone."""
    read, tokens, banks = part("read"), randn(2, 2, 4, 8), 5 * randn(2, 2, 3, 8, seed=1)
    shares = randn(2, 2, 4, 3, seed=2).softmax(-1)
    read.attention = lambda e, slots: shares * (close(e, tokens) and close(slots, rms(banks)))
    assert alike(read, read(tokens, banks), loop(partial(slow_read, read), banks, shares))


def slow_write_shares(write, x):
    """How each slot attends to the tokens of one segment, normed, or to the empty key, whose score
    is 0; an unfinished segment stands at the end of a whole one."""
    return torch.stack([torch.stack([10 * query @ token / math.sqrt(8) + place for token, place in
                                     zip([*x, 0 * x[0]], [*position[-len(x):], 0.0])])
                        .softmax(0)[:-1] for query, position in zip(write.query, write.position)])


def slow_write(write, x, bank, shares):
    """Eqs. 4 to 6 for one row: the banks that each segment finds, and the one behind them."""
    banks = [bank]
    for tokens, by_slot in zip(x, shares):
        slots = []
        for old, bias, row in zip(banks[-1], write.gate_bias, by_slot):
            news = write.value(sum(a * rms(token) for a, token in zip(row, tokens)))
            memory = write.gate_bank(torch.tanh(old)) if write.gate_bank else 0
            gates = hard(write.gate_news(news) + memory + bias)
            slots.append(gates[:8] * torch.tanh(news) + gates[8:] * old)
        banks.append(torch.stack(slots))
    return torch.stack(banks)


def test_assignment_write_finds_its_tokens_or_nothing():
    write = part("write")
    for T in (4, 3, 1):     # a whole segment and unfinished ones
        x = randn(2, 3, T, 8)
        assert close(write.attention(x), loop(partial(slow_write_shares, write), x)), T
    torch.nn.init.constant_(write.position, -1e4)
    assert write.attention(x).eq(0).all()


def test_assignment_write_is_a_cell_that_runs_over_segments():
    """The shares are given here, if they are asked for rightly, so that this part counts alone."""
    shares = randn(2, 3, 3, 4, seed=2).softmax(-1)
    for sees in (True, False):
        write, e, bank = part("write", gates_see_bank=sees), 5 * randn(2, 3, 4, 8), randn(2, 3, 8)
        write.attention = lambda x, e=e: shares * close(x, rms(e))
        banks, last = write(e, bank)
        assert alike(write, torch.cat((banks, last[:, None]), dim=1),
                     loop(partial(slow_write, write), e, bank, shares, depth=1)), sees


def block_of_stubs(memory="lm2", cache=None, mask=None):
    """What a block of simple functions gives and each of them was given, and what they should."""
    x, bank, given = randn(2, 1, 4, 8), randn(2, 3, 8, seed=1), {}
    block = random_model(memory=memory).blocks[0]
    stubs = {"attention": lambda x, cache=None, mask=None: x.cos(),
             "feed_forward": lambda x: x.tanh()}
    if memory == "lm2":
        stubs |= {"write": lambda x, bank: (bank[:, None] + 1, bank + 2),
                  "read": lambda e, banks: e.sin() * banks.mean(2, keepdim=True)}
    for name, stub in stubs.items():
        getattr(block, name).forward = lambda *args, name=name, stub=stub, **more: \
            given.update({name: [*args, *more.values()]}) or stub(*args, **more)
    found, e = block(x, bank, cache, mask), rms(x) * block.attention_norm.weight
    banks, left = bank[:, None] + (cache is None), x + e.cos()
    y = left + stubs["read"](e, banks) if memory == "lm2" else left
    y = y + torch.tanh(rms(y) * block.feed_forward_norm.weight)
    return *found, given, types.SimpleNamespace(e=e, left=left, y=y, bank=bank, banks=banks)


def test_assignment_block_without_memory_adds_attention_and_then_feed_forward():
    y, _, given, expected = block_of_stubs("none")
    assert close(given["attention"][0], expected.e) and close(y, expected.y)


def test_assignment_block_writes_what_attention_left_and_returns_the_bank_behind_it():
    _, behind, given, expected = block_of_stubs()
    assert close(given["write"][0], expected.left) and close(given["write"][1], expected.bank)
    assert close(behind, expected.bank + 2)


def test_assignment_block_reads_by_its_norm_the_banks_that_segments_find():
    y, _, given, expected = block_of_stubs()
    assert close(given["read"][0], expected.e) and close(given["read"][1], expected.banks)
    assert close(y, expected.y)


def test_assignment_block_with_a_cache_reads_the_bank_and_leaves_it():
    cache, mask = {}, torch.ones(4, 4).bool()
    y, behind, given, expected = block_of_stubs(cache=cache, mask=mask)
    assert close(y, expected.y) and close(behind, expected.bank) and "write" not in given
    assert all(any(x is wanted for x in given["attention"]) for wanted in (cache, mask))


def blanked(source, keep=(), body='raise NotImplementedError("assignment: {part}")'):
    """lm2.py's text, of which the assignments' functions, but for those to keep, have this body."""
    wanted = {name: part for part in ASSIGNMENTS.keys() - keep for name in ASSIGNMENTS[part]}
    lines = source.splitlines(keepends=True)
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    for owner, function in [(owner, node) for owner in classes for node in owner.body][::-1]:
        if part := wanted.pop(f"{owner.name}.{getattr(function, 'name', '')}", None):
            first = function.body[0]    # its docstring stays
            start = first.end_lineno if ast.get_docstring(function) else first.lineno - 1
            lines[start:function.end_lineno] = [f"        {body.format(part=part)}\n"]
    assert not wanted, wanted
    return "".join(lines)


def write_assignments(folder):
    """A copy of the project in a new or empty folder, with the assignments to solve."""
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        sys.exit(print(f"error: {folder} is there and not empty", file=sys.stderr) or 2)
    wanted = re.compile(r".*\.py|README\.md|requirements\.txt|LICENSE|results").fullmatch
    shutil.copytree(HERE, folder, dirs_exist_ok=True, ignore=lambda place, names: [
        name for name in names if name == "__pycache__" or place == HERE and not wanted(name)])
    path = Path(folder, "lm2.py")
    path.write_text(blanked(path.read_text("utf-8")), "utf-8")
    print(f"{folder}/lm2.py has the assignments: {', '.join(ASSIGNMENTS)}. To test one, there:\n"
          "    pytest -q -k assignment_read")


def test_blanked_every_assignment_fails_by_its_name_and_solved_alone_it_passes(monkeypatch):
    """Nor does it pass when it gives back what it was given."""
    source = Path(HERE, "lm2.py").read_text("utf-8")
    if 'NotImplementedError("assignment' in source:
        pytest.skip("these are the assignments themselves")
    for part, text, error in [(part, *version) for part in ASSIGNMENTS for version in (
            (blanked(source), pytest.raises(NotImplementedError, match=f"^assignment: {part}$")),
            (blanked(source, body="return x"), pytest.raises(Exception)),
            (blanked(source, {part}), contextlib.nullcontext()))]:
        module = types.ModuleType("lm2")
        exec(text, module.__dict__)
        for name in ("LM2", "LM2Config", "Gate"):
            monkeypatch.setitem(globals(), name, getattr(module, name))
        tests = [f for name, f in globals().items() if name.startswith(f"test_assignment_{part}_")]
        assert len(tests) >= 2
        for test in tests:
            with error:
                test()


def test_assignments_are_written_to_an_empty_folder_alone(tmp_path):
    flag, folder = f"--blank={tmp_path}/new", tmp_path / "new"
    assert "assignment_read" in run("test_lm2.py", flag) and "empty" in refused("test_lm2.py", flag)
    assert {"lm2.py", "train.py", "test_lm2.py", "README.md"} <= set(os.listdir(folder))
    new, old = ((place / "lm2.py").read_text("utf-8") for place in (folder, Path(HERE)))
    bodies = sum(map(len, ASSIGNMENTS.values()))
    assert new.count('NotImplementedError("assignment: ') == bodies and len(new) < len(old)
    assert new.count('"""') == old.count('"""')             # docstrings stay


# --------------------------------------------------------------------------------------------
# The model

def test_the_feed_forward_is_swiglu_eight_thirds_wide():
    layer, x = random_model(n_embd=24, n_head=2).blocks[0].feed_forward, randn(2, 24)
    gate = layer.gate(x)
    assert close(layer(x), layer.down(gate / (1 + torch.exp(-gate)) * layer.up(x)))
    widths = [FeedForward(LM2Config(9, n_embd=d)).up.out_features for d in (8, 24, 64)]
    assert widths == [16, 64, 168] and FeedForward(LM2Config(9, n_hidden=5)).up.out_features == 5


def test_the_model_is_embedding_mixer_blocks_norm_and_tied_head():
    model, tokens = random_model(), random_tokens(T=8)
    weight, kernel = model.embedding.weight, model.mixer.weight[:, 0]
    rows = F.pad(weight[tokens], (0, 0, 2, 0))
    x = sum(kernel[:, i] * rows[:, i:i + 8] for i in range(3)).view(2, 2, 4, 8)
    for block in model.blocks:
        x = block(x, torch.eye(3, 8, dtype=torch.float64).expand(2, 3, 8))[0]      # M_0
    assert close(model(tokens)[0], rms(x.flatten(1, 2)) * model.norm.weight @ weight.T)


def test_the_loss_is_the_mean_over_what_is_scored_of_the_positions_wanted():
    model, tokens, targets = random_model(), random_tokens(), random_tokens(seed=1)
    targets[:, ::3] = -1
    whole = model(tokens)[0]
    for last in (5, 18, 99):
        logits, loss, _ = model(tokens, targets, last=last)
        wanted = [row.log_softmax(-1)[target] for row, target in zip(
            logits.flatten(0, 1), targets[:, -last:].flatten()) if target >= 0]
        assert close(logits, whole[:, -last:]) and close(loss, -sum(wanted) / len(wanted))
    assert close(model(tokens, last=1)[0], whole[:, -1:]) and loss.dtype == torch.float64


@pytest.mark.parametrize("changes", [{}, {"memory": "rmt"}, {"output_gate": False},
                                     {"input_gate": False}, {"forget_gate": False}])
def test_every_initial_value_is_as_the_docstring_says(changes):
    """A gate that is switched off is wide open: its bias is 1000."""
    torch.manual_seed(0)
    wanted = {  # the first of these ends counts: mean, standard deviation
        "norm.weight": (1, 0), "output_gate.bias": (0, 0), "input_gate": (0, 0),
        "forget_gate": (2, 0), "output.weight": (0, 0), "read.value.weight": (0, 0), "self": (1, 0),
        "down.weight": (0, 0), "position": (0, 0), "others": (0, 0.3), "weight": (0, 1 / 8),
        "": (0, 0.1)} | {name + ".bias" * (name == "output_gate"): (1000, 0) for name in changes}
    for name, p in LM2(LM2Config(500, **changes)).named_parameters():
        parts = {"input_gate": p[:, :64], "forget_gate": p[:, 64:]} if "gate_bias" in name else \
            {"others": p[..., :-1], "self": p[..., -1]} if "mixer" in name else {name: p}
        for name, p in parts.items():
            mean, std = next(wanted[end] for end in wanted if name.endswith(end))
            assert abs(p.std() - std) <= 0.1 * std and abs(p.mean() - mean) <= 0.1 * std, name


@pytest.mark.parametrize("banks, changes", [
    (2, {}), (1, {"memory": "rmt"}), (0, {"memory": "none"}), (2, {"n_embd": 12, "conv": 0}),
    (1, {"memory_slots": 20, "memory_layers": 1}), (0, {"memory_slots": 1, "memory_layers": 0})])
def test_no_position_sees_the_future_and_the_memory_alone_carries_the_past(banks, changes):
    model, tokens, at = random_model(**changes), random_tokens(), torch.arange(18)
    logits, _, memory = model(tokens)
    for prefix in (1, 3, 4, 5, 7, 8, 11, 12, 15, 17):
        moved = (model((tokens + (at >= prefix)) % 11)[0] - logits).abs()
        assert moved[:, :prefix].max() < 1e-12 and moved[:, prefix:].max() > 1e-6, prefix
    crossed = (model((tokens + (at < 1)) % 11)[0] - logits)[:, 16:].abs().max() > 1e-6
    assert crossed == (banks > 0) and memory.banks.size(1) == banks


def test_memory_tokens_equal_one_sequence_with_a_mask():
    """RMT's segment is one sequence, memory + tokens + memory, of which the last part sees all."""
    model, tokens, bank = random_model(memory="rmt"), random_tokens(T=4), randn(2, 3, 8)
    memory, names = model.fresh_memory(2)._replace(banks=bank[:, None]), model.memory_tokens
    x = model.mixer(model.embedding(tokens), memory.tail)[0]
    x = torch.cat((bank + names.before, x, bank + names.behind), dim=1)[:, None]
    sees = torch.ones(10, 10).tril().bool()
    sees[7:] = True
    for block in model.blocks:
        x = block(x, None, mask=sees)[0]
    logits, _, after = model(tokens, memory=memory)
    assert close(logits, model.head(x[:, 0, 3:7])) and close(after.banks, rms(x[:, :, 7:]))


def test_normed_is_pytorchs_rms_norm_forward_and_backward():
    for scale in (1.0, 1e-8):       # beside which epsilon counts
        x, y = ((scale * randn(3, 5, 8)).float().requires_grad_() for _ in range(2))
        ours, theirs = normed(x), F.rms_norm(y, (8,))
        (ours.cos() + theirs.cos()).sum().backward()
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=0)
        assert torch.allclose(x.grad, y.grad, rtol=1e-3, atol=1e-6)
    assert normed(torch.zeros(2, 8)).eq(0).all()
    for size in (40, 400, 40000):   # whose squares are beyond float16
        assert (normed(torch.full((2, 8), float(size)).half()) - 1).abs().max() < 1e-2


def test_a_model_that_was_moved_without_its_values_is_whole_when_they_are_loaded():
    model, tokens = random_model(), random_tokens()
    with torch.device("meta"):
        moved = LM2(model.config).double()
    moved.to_empty(device="cpu").load_state_dict(model.state_dict())
    assert not list(moved.buffers()) and close(moved(tokens)[0], model(tokens)[0])


def test_the_residual_stream_stays_in_float32_in_mixed_precision():
    """Or the models of a comparison would differ in precision as well."""
    for memory, conv in itertools.product(("lm2", "rmt", "none"), (0, 3)):
        model, seen = random_model(torch.float32, memory=memory, conv=conv), []
        model.blocks[-1].register_forward_hook(lambda *args: seen.append(args[2][0].dtype))
        with torch.autocast("cpu", torch.bfloat16):
            model(random_tokens())
        assert set(seen) == {torch.float32}, (memory, conv)


@pytest.mark.parametrize("kind", ["lm2", "rmt"])
def test_many_calls_equal_one_call_and_pass_the_gradient_on(kind):
    model, tokens, parts = random_model(memory=kind), random_tokens(B=3), []
    whole, _, final = model(tokens)
    first = memory = model.fresh_memory(3)
    first.banks.requires_grad_()
    for start, stop in ((0, 4), (4, 12), (12, 18)):
        logits, _, memory = model(tokens[:, start:stop], memory=memory)
        parts.append(logits)
    assert close(torch.cat(parts, 1), whole) and torch.equal(memory.tail, final.tail)
    assert close(memory.banks, final.banks)
    logits.sum().backward()
    assert first.banks.grad.abs().max() > 0
    for row in range(3):    # of a batch: they are independent, and nothing is kept between calls
        alone = model(tokens[row:row + 1])
        assert close(alone[0][0], whole[row]) and close(alone[2].banks[0], final.banks[row])


def test_a_long_text_is_taken_in_pieces_and_gives_the_same():
    """A piece is 2**13 tokens, so that long texts need no more room."""
    model, tokens, seen = random_model(n_layer=1, block_size=256), random_tokens(T=5000), []
    with torch.no_grad():
        early = model(tokens[:, :1024], last=1)[2]
        expected = model(tokens[:, 1024:], memory=early)
        model.blocks[0].register_forward_hook(lambda *args: seen.append(args[2][0][..., 0].numel()))
        logits, _, memory = model(tokens, last=2500)
    assert close(logits, expected[0][:, -2500:]) and close(memory.banks, expected[2].banks)
    assert sum(seen) == 2 * 5000 and max(seen) == 2**13


@pytest.mark.parametrize("memory", ["lm2", "rmt", "none"])
@pytest.mark.parametrize("prompt", [1, 3, 4, 5, 8, 13])
def test_generating_equals_the_full_forward(memory, prompt):
    model, tokens = random_model(memory=memory), random_tokens(T=prompt)
    text = model.generate(tokens, 15, temperature=0)
    assert text.shape == (2, prompt + 15) and torch.equal(text[:, :prompt], tokens)
    assert torch.equal(model(text)[0][:, prompt - 1:-1].argmax(-1), text[:, prompt:])
    before = model(text[:, :4])[2]
    assert torch.equal(model.generate(text[:, 4:-4], 4, 0, memory=before), text[:, 4:])


@pytest.mark.parametrize("temperature, top_k, choices", [
    (1.0, None, 11), (1.0, 0, 11), (0.3, None, 11), (3.0, 4, 4), (1.0, 10, 10), (1.0, 99, 11),
    (1.0, 1, 1)])
def test_sampling_follows_the_logits_temperature_and_top_k(temperature, top_k, choices):
    model, token = random_model(), torch.tensor([[3]])
    highest, tokens = model(token)[0][0, -1].topk(choices)
    said = model.generate(token.expand(4000, 1), 1, temperature, top_k)[:, 1]
    found = (said[:, None] == tokens).double().mean(0)
    assert (found - (highest / temperature).softmax(-1)).abs().max() < 0.03
    assert set(said.tolist()) <= set(tokens.tolist())


def test_no_tokens_and_negative_numbers_are_refused():
    model, some, none = random_model(), random_tokens(T=5), random_tokens(T=0)
    calls = [partial(model.generate, some, 2, **flags) for flags in (
        {"temperature": -1.0}, {"temperature": math.nan}, {"top_k": -1})]
    for bad in (*calls, partial(model.generate, none, 2, top_k=1), partial(model, none),
                partial(model, some, last=-1), partial(model, some, last=0)):
        with pytest.raises(ValueError, match="tokens"):
            bad()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has none")
def test_muon_is_torchs_muon_in_the_weights_own_precision_and_takes_a_closure():
    trained = []
    for kind in (Muon, torch.optim.Muon):
        torch.manual_seed(1)
        weights = [torch.randn(*s, requires_grad=True) for s in ((6, 6), (6, 6), (4, 10), (10, 4))]
        optimizer = kind(weights, lr=0.1, weight_decay=0.5)

        def closure():
            optimizer.zero_grad()
            loss = sum((p * torch.randn_like(p)).sum() for p in weights)
            loss.backward()
            return loss

        losses = [optimizer.step(closure) for _ in range(3)]
        trained.append([*weights, losses[0]])
    for ours, theirs in zip(*trained):
        assert (ours - theirs).norm() <= 0.02 * theirs.norm()  # torch's is in bfloat16


def test_every_parameter_has_one_optimizer_with_its_rate_and_only_matrices_decay():
    model = LM2(LM2Config(16))
    muon, adamw = model.optimizer(lr=0.003, muon_lr=0.04, weight_decay=0.1)
    groups = muon.param_groups + adamw.param_groups
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, model.parameters()))
    decays = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    by_muon = {id(p) for g in muon.param_groups for p in g["params"]}
    for name, p in model.named_parameters():
        matrix = name.startswith("blocks") and name.endswith("weight") and p.dim() == 2
        gate = "output_gate" in name or "gate_news" in name or "gate_bank" in name
        assert (id(p) in by_muon) == matrix and (id(p) in decays) == (matrix and not gate), name
    assert {g["lr"] for g in muon.param_groups} == {0.04} and muon.defaults["momentum"] == 0.95
    assert [(g["lr"], g["betas"]) for g in adamw.param_groups] == [(0.003, (0.9, 0.95))]
    assert [optimizer.defaults["lr"] for optimizer in model.optimizer()] == [1e-2, 2e-3]


@pytest.mark.parametrize("name, value", [
    ("vocab_size", 0), ("block_size", 2**24), ("rope_base", math.nan), ("rope_base", 0.5),
    ("n_embd", "64"), ("n_layer", True), ("n_head", 3), ("n_kv_head", 3), ("memory", "lstm"),
    ("memory_slots", 0), ("memory_layers", 3), ("memory_layers", -2), ("conv", -1),
    ("output_gate", 1), ("n_embd", 2**24)])
def test_sizes_that_do_not_fit_are_refused_by_name(name, value):
    with pytest.raises(BadInput, match=name):
        LM2Config(**{"vocab_size": 11, name: value})


@pytest.fixture(scope="module")
def checkpoint():
    """A small one, as train.py makes them."""
    model = random_model(torch.float32, vocab_size=256)
    return {"config": dataclasses.asdict(model.config), "model": model.state_dict(),
            "tokenizer": {"pattern": r"\s*\w+|[\s\S]", "tokens": BYTES}, "train": {}}


@pytest.mark.parametrize("place, key, value", [(place, *case) for place, cases in {
    "tokenizer": ((None, []), ("tokens", BYTES[1:]), ("tokens", BYTES[1:] + ["a"]),
                  ("tokens", BYTES[1:] + ["ab"]), ("pattern", 3), ("pattern", ""), ("pattern", "("),
                  ("pattern", r"\w+"), ("pattern", "(?:" * 9000)),
    "config": ((None, 3), ("n_layer", 9), ("vocab_size", 255), ("more", 1), ("block_size", 2**24)),
    "model": ((None, None), ("x", torch.ones(8)), *(("norm.weight", value) for value in (
        torch.full((8,), math.nan), [1.0] * 8, torch.ones(9), torch.ones(8).long(),
        torch.ones(8).to_sparse(), torch.ones(8, device="meta"))))}.items() for case in cases])
def test_a_forged_checkpoint_is_refused_in_one_line(place, key, value, checkpoint, tmp_path):
    torch.save(checkpoint | {place: checkpoint[place] | {key: value} if key else value},
               tmp_path / "ckpt.pt")
    with pytest.raises(BadInput, match=r"\A[^\n]*ckpt\.pt[^\n]*\Z"):
        LM2.load(tmp_path / "ckpt.pt")


def test_a_checkpoint_gives_the_model_back_also_in_bfloat16(checkpoint, tmp_path):
    path, tokens = tmp_path / "ckpt.pt", random_tokens(vocab=256)
    torch.save(checkpoint, path)
    original = random_model(torch.float32, vocab_size=256)
    for model, encoding in (LM2.load(path), LM2.load(load_checkpoint(path))):
        assert torch.equal(model(tokens)[0], original(tokens)[0]) and not model.training
        assert encoding.encode_ordinary("Mary?") == list(b"Mary?")
    weights = {name: weight.bfloat16() for name, weight in checkpoint["model"].items()}
    torch.save(checkpoint | {"model": weights}, path)
    assert LM2.load(path)[0].embedding.weight.dtype == torch.float32


# --------------------------------------------------------------------------------------------
# The stories

NAMES = "Mary John Daniel Sandra Bill Fred Jeff Julie".split()
WAYS = {"north": 1j, "south": -1j, "east": 1, "west": -1}
FACTS = {
    "place": r"The (\w+) is (\w+) of the (\w+)\.",
    "either": r"(\w+) is either in the (\w+) or the (\w+)\.",
    "not": r"(\w+) is (?:not|no longer) in the (\w+)\.",
    "go": r"(\w+) (?:(?:moved|went|went back|journeyed|travelled) to|is in) the (\w+)\.",
    "get": r"(\w+) (?:picked up|got|grabbed|took) the (\w+)(?: there)?\.",
    "drop": r"(\w+) (?:dropped|left|discarded|put down) the (\w+)(?: there)?\.",
    "give": r"(\w+) (?:passed|gave|handed) the (\w+) to (\w+)\."}
GIFTS = {
    r"What did (?P<who>\w+) give to (?P<whom>\w+)\?": "what",
    r"Who gave the (?P<what>\w+)\?": "who",
    r"Who gave the (?P<what>\w+) to (?P<whom>\w+)\?": "who",
    r"Who received the (?P<what>\w+)\?": "whom",
    r"Who did (?P<who>\w+) give the (?P<what>\w+) to\?": "whom"}


def read_story(facts):
    """Yields (kind, who, what, whom) from the text alone, by rules of its own."""
    for fact in facts:
        yield next((kind, *found.groups(), "")[:4] for kind, form in FACTS.items()
                   if (found := re.fullmatch(form, fact)))


def solve(facts, question):
    """The answer to any question, written apart from the generator: it replays the story once,
    forwards, and keeps a diary of everybody and everything."""
    place, maybe, gifts, at = {}, {}, [], {}
    hands, order, diary = ({name: [] for name in NAMES} for _ in range(3))
    for kind, who, what, whom in read_story(facts):
        if kind in ("go", "either", "not"):
            assert kind != "go" or place.get(who) != what  # nobody moves to where he is
            place[who] = what if kind == "go" else ""
            maybe[who] = (what, whom) if kind == "either" else ()
            for walker in (who, *hands[who]):
                diary.setdefault(walker, []).append(what)
        elif kind == "place":  # `what` is the way here
            if who in at:
                at[whom] = at[who] - WAYS[what]
            else:
                at[who] = at.setdefault(whom, 0) + WAYS[what]
        else:
            if what in hands[who]:
                hands[who].remove(what)
            if kind == "drop":
                place[what] = place.get(who)
                continue
            hands[whom or who].append(what)
            order[whom or who].append(what)
            if kind == "get":
                diary[what] = []
            else:
                gifts.append({"who": who, "what": what, "whom": whom})
    w = question.rstrip("?").split()
    for form, answer in GIFTS.items():
        if found := re.fullmatch(form, question):
            known = found.groupdict().items()
            return next(gift[answer] for gift in gifts[::-1] if known <= gift.items())
    if w[0] == "Is":
        return "maybe" if w[-1] in maybe.get(w[1], ()) else \
            "yes" if place.get(w[1]) == w[-1] else "no"
    if w[1] == "was":
        path = diary[w[-4]]
        return path[len(path) - 2 - path[::-1].index(w[-1])]
    if w[0] == "Where":
        return place.get(next((who for who in NAMES if w[-1] in hands[who]), w[-1]))
    if w[0] == "How":
        return ("none", "one", "two", "three")[len(hands[w[4]])]
    if w[-1] == "carrying":
        return ",".join(o for o in dict.fromkeys(order[w[2]]) if o in hands[w[2]]) or "nothing"
    spot = at[w[3]] - WAYS[w[4]] if w[-1] == "of" else at[w[-1]] + WAYS[w[2]]
    return next(name for name in at if at[name] == spot)


@pytest.mark.parametrize("task", babi.TASKS)
def test_a_separate_solver_agrees_with_every_answer(task):
    """Told the whole story, or the support alone; and in the real files, where they are at hand."""
    rng, folder = random.Random(0), os.path.join(HERE, "..", "shared", "data", "babi")
    for _ in range(1000):
        story = babi.make_sample(task, rng, rng.choice((1, 8)), window=rng.choice((5, None)))
        for question in story.questions:
            assert solve(story.facts, question.text) == question.answer, story
            if "was the" not in question.text:  # where it was got is no part of the support
                support = [story.facts[i] for i in sorted(question.support)]
                assert solve(support, question.text) == question.answer, story
    if os.path.isdir(folder):
        right = [solve(story.facts, story.questions[0].text) == story.questions[0].answer
                 for story in babi.read_babi(babi.find_babi(folder, task))]
        assert sum(right) >= (0.997 if task == "qa5" else 1.0) * len(right)


@pytest.mark.parametrize("task, mean, longest, shares", [
    ("qa1", 6.0, 10, {}), ("qa2", 15.6, 88, {}), ("qa3", 50.0, 320, {}), ("qa4", 2.0, 2, {}),
    ("qa5", 20.1, 126, {"Mary": .185, "apple": .137}), ("qa6", 6.3, 26, {"yes": .501}),
    ("qa7", 8.7, 52, {"one": .487, "none": .470, "two": .041}), ("qa8", 8.8, 50, {"nothing": .362}),
    ("qa9", 6.0, 10, {"no": .625}), ("qa10", 6.0, 10, {"no": .475, "yes": .377, "maybe": .147})])
def test_stories_have_the_statistics_of_the_released_files(task, mean, longest, shares):
    """Facts per question and answers; where all answers are places, each is as likely."""
    rng = random.Random(0)
    samples = [babi.make_sample(task, rng) for _ in range(2000)]
    lengths = [len(story.facts) for story in samples]
    assert min(lengths) >= 2 and max(lengths) < 1.5 * longest
    assert abs(sum(lengths) / 2000 - mean) < 0.08 * mean
    answers = [story.questions[0].answer for story in samples]
    for answer, share in (shares or dict.fromkeys(babi.PLACES, 1 / 6)).items():
        assert abs(answers.count(answer) / 2000 - share) < 0.035, (answer, share)
    assert task != "qa1" or 0.49 < babi.shortcuts("qa1", samples)["last mentioned"] < 0.58


def test_half_of_several_questions_are_steps_on_the_way():
    rng, asked, own = random.Random(0), set(), "Where was the O before the L?"
    for _ in range(50):
        questions = babi.make_sample("qa3", rng, 4, window=None).questions
        shapes = [babi.shape(question.text, "qa3") for question in questions]
        assert 1 <= shapes.count(own) <= 2 and len(set(questions)) == len(questions) <= 4
        asked |= {*shapes}
    assert asked == {own, "Where is P?", "Where is the O?", "Where was P before the L?"}


@pytest.mark.parametrize("task", ["qa1", "qa2", "qa3"])
def test_questions_by_the_way_are_right_then_and_scored_but_not_answered(task):
    rng, n_asides = random.Random(0), 0
    for _ in range(50):
        story = babi.make_sample(task, rng, 8, 40, rng.choice((5, None)), asides=1.0)
        for i, answer in story.asides.items():
            told = [fact for k, fact in enumerate(story.facts[:i]) if k not in story.asides]
            assert solve(told, story.facts[i]) == answer, story
        tokens, targets = babi.to_tokens(story, WORDS, 2048, NOISE, rng)
        end = 2048 - len(babi.encode_questions(story, WORDS)[0])
        at = [i for i in range(end) if targets[i] >= 0]
        assert [WORDS.decode([targets[i]]) for i in at] == [f" {a}" for a in story.asides.values()]
        for i, question in zip(at, [f" {story.facts[n]}" for n in story.asides]):
            assert WORDS.decode(tokens[:i + 1]).endswith(question) and tokens[i + 1] != targets[i]
        n_asides += len(at)
        assert not babi.make_sample(task, rng, 8).asides
    assert n_asides > 100 if task != "qa1" else n_asides == 0


# Texts and noise

WORDS = babi.word_encoding()
NOISE = babi.make_noise(WORDS, 0, 2000)
BOOK = "The wind rose in the night, and no naïve \u6f22 on board slept at all. Ha! " \
    "“Then came a morning that no sailor forgets as long as he lives.” " \
    "Mary went to the kitchen of the ship to fetch some bread and water. " \
    "The bedroom was north of the hallway, as the captain had told us.\n"


@pytest.fixture
def book(tmp_path):
    """A text of 600 sentences: two good ones, a short one, and two that look like facts."""
    (tmp_path / "book.txt").write_text(BOOK * 120, encoding="utf-8")
    return str(tmp_path / "book.txt")


def test_a_book_is_read_from_any_byte_on_and_every_sentence_comes_out_whole(book):
    found, text = list(re.finditer(r"\S[^.!]*[.!]”?", BOOK * 120)), BOOK * 120
    starts = [len(text[:sentence.start()].encode()) for sentence in found]
    for start, size in ((0, 30), (0, 7000), *((start, 30) for start in range(30, 100))):
        left = [sentence[0] for at, sentence in zip(starts, found) if at > start + 1 or not start]
        assert list(babi.read_sentences(book, start, size)) == left[:-1]  # the last may be cut


def test_a_text_is_in_utf_8_with_or_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "book.txt"
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_bytes(BOOK.replace("\n", "\r\n").encode(encoding))
        assert babi.read_text(path) == BOOK
        assert next(babi.read_sentences(path)) == BOOK[:BOOK.index(" Ha!")]
    for code in ("utf-16", "utf-16-le", "utf-16-be", "latin-1", "utf-8"):
        raw = "So \u00e9 ends in \u00e9".encode(code)
        path.write_bytes(raw[:-1] if code == "utf-8" else raw)      # cut short
        for read in (babi.read_text, babi.read_babi, lambda path: [*babi.read_sentences(path)]):
            with pytest.raises(BadInput, match=f"book.txt is .*in UTF-{16 if '16' in code else 8}"):
                read(path)


def test_real_babi_files_are_found_and_read_and_broken_lines_named(tmp_path):
    lines = ("1 Mary moved to the bathroom.", "2 John went to the hallway.",
             "3 Where is Mary? \tbathroom\t1", "4 Mary went to the office.",
             "5 Where is Mary? \toffice\t4", "1 John went to the garden.",
             "2 Where is John? \tgarden\t1")
    for name, end in (("qa10_a_test", ""), ("qa1_b_train", "\n"), ("qa1_c_test", "\r\n\r\n")):
        (tmp_path / f"{name}.txt").write_bytes("".join(line + end for line in lines).encode())
        if end:  # the train file is read only where there is no test file
            assert babi.find_babi(tmp_path, "qa1") == str(path := tmp_path / f"{name}.txt")
            first, second, third = babi.read_babi(path)
            assert second == babi.Sample(tuple(lines[i][2:] for i in (0, 1, 3)), (
                babi.Question("Where is Mary?", "office", (2,)),))
            assert first.facts == second.facts[:2] and third.facts == (lines[5][2:],)
    with pytest.raises(BadInput, match="qa2_"):
        babi.find_babi(tmp_path, "qa2")
    for broken in ("1 Mary ran.\nnonsense\n", "1 Mary ran.\n2 Where?\toffice\t7\n", "1 Mary.\n"):
        path.write_text(broken)
        with pytest.raises(BadInput, match="line 2|no question"):
            babi.read_babi(path)


def test_noise_depends_on_its_seed_and_on_nothing_else():
    said = [[next(babi.make_noise(WORDS, seed, 300)(random.Random(0))) for _ in range(2)]
            for seed in (0, 0, "proof 0", "score 0")]
    assert said[0][0] == said[0][1] and said[1] == said[0] != said[2] != said[3] != said[0]


def test_two_noise_sentences_in_five_are_of_words_nobody_knows_and_none_is_of_a_story():
    book = babi.make_noise(WORDS, 0)(random.Random(0))
    sentences = [WORDS.decode(next(book)) for _ in range(5000)]
    assert not {*NAMES, *babi.PLACES, *babi.TOWN, *babi.OBJECTS} & {
        *re.findall(r"\w+", "".join(sentences))}
    grammar = re.compile(r" The \w+ \w+ \w+ \w+ the \w+( [a-z ]+)?\.")
    unknown = [text for text in sentences if not grammar.fullmatch(text)]
    assert abs(len(unknown) / 5000 - 0.4) < 0.03
    assert all(3 <= len(text.split()) <= 16 for text in unknown)
    said = "".join(unknown)
    assert len(WORDS.encode_ordinary(said)) > 2 * len(said.split())  # bytes are as common as words
    assert all(mark in said for mark in ",;:!?'\"“") and re.search(r" \d+ ", said)


def test_a_sentence_that_could_be_a_fact_is_no_noise():
    texts = ["so _Mary_ went", "MARY went", "Mary's hat", "kitchens and offices",
             "a Kitchen, an OFFICE", "one _kitchen_, one garden",       # and none of these:
             "the bill", "Marylebone", "the kitchen", "officers in gardens"]
    assert [*filter(babi.FACTLIKE.search, texts)] == texts[:6]


def test_a_book_is_noise_in_order_from_anywhere_without_short_sentences_and_lookalikes(book):
    encoding, rng = babi.word_encoding([BOOK]), random.Random(0)
    noise = babi.book_noise(encoding, [book])
    assert len(encoding.encode_ordinary(" bread")) == 1  # as each word that was counted
    assert len({tuple(next(noise(rng))) for _ in range(40)}) == 2  # it has two good sentences
    said = encoding.decode(sum(babi.cut_noise(300, noise, rng), []))
    assert len(encoding.encode_ordinary(said)) == 300
    assert not re.search("Ha!|Mary|bedroom", said)
    assert re.search(r"slept at all\. “Then came .* lives\.” The wind rose", said)


@pytest.mark.parametrize("facts_in, behind", [
    ((0.0, 1.0), 0), ((0.0, 0.5), 1), ((0.5, 1.0), 29), ((0.25, 0.75), 0)])
def test_facts_lie_where_they_should_and_so_do_questions_targets_and_noise(facts_in, behind):
    rng, encode = random.Random(0), WORDS.encode_ordinary
    for _ in range(100):
        story = babi.make_sample("qa1", rng, 3, max_facts=6)
        end, scored = [], []
        for question in story.questions:
            asked, answer = encode(f" {question.text}"), encode(f" {question.answer}.")
            end, scored = end + asked + answer, scored + [-1] * len(asked) + answer
        n, position = 256 - behind - len(end), 0
        tokens, targets = babi.to_tokens(story, WORDS, 256, NOISE, rng, facts_in, behind)
        assert len(tokens) == 256 and tokens[n:n + len(end)] == end
        assert targets == [-1] * (n - 1) + scored + [-1] * (behind + 1)
        for fact in map(encode, (f" {fact}" for fact in story.facts)):  # in order, and whole
            position = next(i for i in range(position, n) if tokens[i:i + len(fact)] == fact)
            assert facts_in[0] * n <= position <= facts_in[1] * n - len(fact)
            position += len(fact)


def hidden(n_facts, length, part=1.0):
    """Pieces of a context that ends in a question of 6 tokens, as long as `length` besides."""
    story = babi.Sample(("Mary went back to the kitchen.",) * n_facts,      # 7 tokens each
                        (babi.Question("Where is Mary?", "kitchen", (0,)),))
    return babi.hide_facts(story, WORDS, length + 6, NOISE, random.Random(length), (0, part))


def test_facts_that_fit_exactly_fit_and_others_are_refused():
    """Whatever the rounding: 7 / 86 * 86 is a little less than 7."""
    for n_facts, length in itertools.product(range(1, 4), range(21, 200)):
        pieces = hidden(n_facts, length, part=7 * n_facts / length)
        assert [i for i, _ in pieces[:n_facts]] == list(range(n_facts))
        assert sum(len(tokens) for _, tokens in pieces) == length
        with pytest.raises(babi.TooLong, match="do not fit"):
            hidden(n_facts, length, part=7 * n_facts / length - 0.01)


def test_facts_lie_anywhere_in_their_part_and_each_gap_is_as_likely():
    """Where a fact's sentence comes, as a share of the context: uniform to within noise."""
    found = [[i for i, _ in hidden(1, length)] for length in range(700, 1300)]
    at = [order.index(0) / (len(order) - 1) for order in found]
    assert abs(sum(at) / 600 - 0.5) < 0.05 and min(at) == 0 and max(at) == 1
    assert abs(sum(share > 0.75 for share in at) / 600 - 0.25) < 0.06


# The curriculum

def curriculum(tasks, encoding=WORDS, processes=1, **changes):
    flags = dict(seed=0, steps=100, context=1024, batch_size=8, batch_tokens=4096, questions=4,
                 threshold=0.9, asides=0.0) | changes
    return babi.Curriculum(tasks, encoding, NOISE, types.SimpleNamespace(**flags), processes)


def test_a_batch_is_a_function_of_seed_step_and_stages():
    a, b, other = curriculum(TWO), curriculum(TWO), curriculum(TWO, seed=1)
    for step in (5, 3, 5):
        assert all(map(torch.equal, a.batch(step), b.batch(step)))
    assert not torch.equal(a.batch(4)[0], a.batch(6)[0])
    assert not torch.equal(other.batch(3)[0], a.batch(3)[0])
    a.stage["qa1"], b.running["qa1"] = 8, 1.0
    assert any(not torch.equal(a.batch(s)[0], b.batch(s)[0]) for s in range(5))


def test_contexts_are_whole_units_of_few_lengths_and_each_row_knows_its_task():
    made = curriculum(TWO, context=4096, batch_size=7, batch_tokens=8192, processes=2)
    lengths, ends, tasks = set(), set(), set()
    for step in range(75):
        made.stage = dict.fromkeys(TWO, (1, 4, 30)[step % 3])
        batch = made.batch(step)
        n, T = batch[0].shape
        assert n == max(1, min(7, 8192 // T) // 2) * 2
        lengths.add(T / 64)
        for tokens, targets, task in zip(*batch):
            at = (targets >= 0).nonzero()[:, 0]
            assert torch.equal(targets[at], tokens[at + 1])
            said = WORDS.decode(targets[at].tolist())
            assert ("yes" in said or "no" in said) == bool(task)
            ends.add(int(at[-1]) % 64)
            tasks.add(int(task))
    assert lengths <= {*range(1, 9), 16, 24} and {1, 2, 3, 4, 8} <= lengths
    assert len(ends) > 50 and tasks == {0, 1}  # questions end anywhere in the last unit


@pytest.mark.parametrize("tasks, bare_share", [(("qa1",), 0.0), (TWO, 0.4)])
def test_steps_are_bare_and_rows_end_in_noise_or_begin_with_facts(tasks, bare_share, monkeypatch):
    made, rows, bare = curriculum(tasks, batch_size=1), [], 0
    made.stage = dict.fromkeys(tasks, 4)
    monkeypatch.setattr(babi, "to_tokens", lambda *args, real=babi.to_tokens, **behind: (
        rows.append(args[5:]) if len(args) > 5 else None, real(*args, **behind))[1])
    for step in range(500):
        before = len(rows)
        made.batch(step)
        bare += len(rows) == before
    untils = [until for (_, until), _ in rows]
    for count, share in ((bare / 500, bare_share), (untils.count(1.0) / len(rows), 0.5),
                         (sum(behind == 0 for _, behind in rows) / len(rows), 0.31)):
        assert abs(count - share) < 0.06
    assert 0.4 <= min(untils) < 0.45


def test_bare_rows_are_whole_stories_of_like_lengths_with_noise_behind():
    for seed in range(10):
        rows = curriculum(("qa1", "qa6", "qa8")).bare_rows(random.Random(seed))
        used = [max(i for i, t in enumerate(targets) if t >= 0) + 2 for _, (_, targets) in rows]
        assert len({len(tokens) for _, (tokens, _) in rows}) == 1 and len(rows) == 8
        assert used == sorted(used) and 0 <= len(rows[0][1][0]) - used[-1] < 64
        for _, (tokens, _) in rows:  # nothing but facts before the question
            told = re.split(r"(?<=\.) ", WORDS.decode(tokens).partition("?")[0].strip())[:-1]
            assert len(list(read_story(told))) >= 2


def test_a_task_that_is_answered_moves_on_to_longer_contexts_and_another_does_not():
    made, stages = curriculum(TWO, context=12 * 64, steps=800), []
    for step in range(800):
        made.note(step, {"qa1": 8, "qa6": 6}, {"qa1": 8, "qa6": 8}, {"qa1": 2, "qa6": 2})
        stages.append(made.stage["qa1"])
    made.note(800, {}, {}, {})          # a step without answers changes nothing
    assert list(dict.fromkeys(stages)) == [1, 2, 3, 4, 6, 9, 12]
    assert made.stage == {"qa1": 12, "qa6": 1}  # this is half of the way from chance, 0.5
    assert abs(made.running["qa6"] - 0.75) < 0.01


@pytest.mark.parametrize("tasks, running, share", [
    (TWO, (0.9, 0.1), 0.15 / 1.1), (("qa1", "qa2"), (0.5, 0.5), 0.55 / 1.6)])
def test_the_task_with_more_wrong_answers_gets_more_rows(tasks, running, share):
    """And twice as many for a task half of whose questions are easier ones."""
    made, rng = curriculum(tasks), random.Random(0)
    made.running = dict(zip(tasks, running))
    drawn = [made.draw(rng, tasks)[0] for _ in range(1000)]
    assert abs(drawn.count("qa1") / 1000 - share) < 0.05


def test_stories_that_never_fit_are_refused_before_training():
    letters = babi.make_encoding([bytes([b]) for b in range(256)], babi.PATTERN)
    with pytest.raises(BadInput, match="--questions=4: the stories of qa1 do not fit"):
        curriculum(TWO, encoding=letters)
    curriculum(tuple(babi.TASKS))


# Scores

def fixed_answers(right):
    """A model whose row i is answered right if right[i]; its logits are those of the next token."""
    def model(tokens, last, right=iter(right)):
        said = tokens.roll(-1, dims=1)[:, -last:] * torch.tensor([[next(right)] for _ in tokens])
        return (F.one_hot(said).float(),)
    model.n_banks, model.device = 1, "cpu"
    return model


def test_scores_have_their_standard_error_and_shortcuts_at_each_length(capsys):
    samples = {"qa1": [babi.make_sample("qa1", random.Random(i), max_facts=6) for i in range(25)]}
    model = fixed_answers([True] * 20 + [False] * 5 + [True] * 25)
    cells = babi.score_table(model, WORDS, samples, {256: 25, 512: 25}, NOISE)
    assert [cell["accuracy"] for cell in cells] == [0.8, 1.0]
    assert [cell["standard_error"] for cell in cells] == pytest.approx([0.08, 0])
    out = capsys.readouterr().out
    assert re.search(r"(?s)0\.800 ±0\.080.*last mentioned\nqa1 ( +0\.\d{3} /0\.\d{3}){2}", out), out


@pytest.mark.parametrize("task, facts, question, guess", [
    ("qa1", "Mary is in the office. John is in the garden.", "Where is Mary?", "garden"),
    ("qa3", "He is in the office. He is in the park.", "Where was he before the park?", "office"),
    ("qa4", "The office is west of the park.", "What is west of the park?", "office"),
    ("qa5", "Fred gave the milk to Bill. Jeff got the apple.", "What did Jeff give?", "apple"),
    ("qa5", "Fred gave the milk to Bill. Jeff got the apple.", "Who gave the milk?", "Jeff"),
    ("qa6", "Mary is in the office.", "Is John in the office?", "yes"),
    ("qa7", "Mary got the apple.", "How many objects is Mary carrying?", "one"),
    ("qa8", "Mary got the apple in the office.", "What is John carrying?", "apple")])
def test_the_last_that_was_mentioned_is_guessed(task, facts, question, guess):
    for answer, right in ((guess, 1.0), ("nothing", 0.0)):
        story = babi.Sample((facts,), (babi.Question(question, answer, (0,)),))
        assert babi.shortcuts(task, [story])["last mentioned"] == right


def test_retrieval_finds_the_whole_sentences_that_name_what_is_asked(monkeypatch):
    facts, taken = ("Mary went to the kitchen.", "The old fox slept.", "John took the milk there.",
                    "Mary moved to the garden.", "A ship sank, and all were lost."), []
    story = babi.Sample(facts, (babi.Question("Where is Mary?", "garden", (3,)),))
    for n_best, found in ((1, [3]), (2, [0, 3]), (9, range(5))):
        assert babi.retrieve(facts, story, n_best).facts == tuple(facts[i] for i in found)
    # by hand: one of three texts of two words holds the word, once
    assert babi.bm25(["a b", "c d", "e f"], "a") == pytest.approx([math.log(1 + 2.5 / 1.5), 0, 0])
    assert babi.bm25(["...", "!"], "Where?") == [0, 0]      # no word in any
    monkeypatch.setattr(babi, "retrieve", lambda sentences, *args, real=babi.retrieve: (
        taken.extend(sentences), real(sentences, *args))[1])
    quotes = WORDS.encode_ordinary(" \u201c")     # a space and three bytes: a cut leaves the space
    for length in range(100, 104):
        babi.score(fixed_answers([True]), WORDS, [story], length,
                   lambda rng: itertools.repeat(quotes), random.Random(0), n_best=5)
    assert all(taken) and all(taken.count(fact) == 4 for fact in facts)


def test_the_proof_has_its_facts_in_the_first_half_and_one_story_has_no_other_bank(monkeypatch):
    """That train.py gives it noise of another seed is tested there."""
    model, seen = random_model(torch.float32, vocab_size=WORDS.n_vocab, block_size=64), []
    monkeypatch.setattr(babi, "answered_by_bank", lambda *args, real=babi.answered_by_bank: (
        seen.extend(args[1].tolist()), real(*args))[1])
    for n in (30, 1):
        row, = babi.proof_table(model, WORDS, ("qa1",), {512: n}, NOISE)
        assert row["samples"] == n and row["wiped"] >= 0 and math.isnan(row["swapped"]) == (n == 1)
    assert len(seen) == 31
    assert not any(re.search("Mary|John|Daniel|Sandra", WORDS.decode(row[264:-6])) for row in seen)


# What the scripts share

def test_printed_samples_have_marks_but_no_empty_lines_or_control_characters(tmp_path, capsys):
    story = "1 Mary \x1b[2J went home.\n2 Where is Mary?\t\u6f22\x07\t1\n"
    (tmp_path / "qa3_x.txt").write_text(60 * story, encoding="utf-8")
    for task, length, support, folder in (("qa1", 128, 1, ""), ("qa2", 512, 2, ""),
                                          ("qa1", 0, 1, ""), ("qa3", 64, 1, str(tmp_path))):
        babi.print_samples(babi.Flags(task=task, length=length, samples=(60,), babi_dir=folder))
        out = capsys.readouterr().out.rpartition("\n\n")[0]
        assert out.replace("\n", "").isprintable()
        for head, *lines in map(str.splitlines, re.split("(?m)^--- ", out)[1:]):
            marks = [line[:2] for line in lines]
            assert marks.count(">>") == support and all(map(str.strip, lines))
            assert f" {support + marks.count(' >')} facts" in head
            assert not length or f" {length} tokens" in head
    assert r"Mary \x1b[2J went home." in out and "->  漢\\x07\n" in out


@pytest.mark.parametrize("error, status, said", [
    (BadInput("no \x1b[2J " + "x" * 9000), 2, r"error: no \\x1b\[2J x+ \.\.\. x+\n"),
    (FileNotFoundError(2, "No such file", "/no\x07"), 2, r"error: /no\\x07: No such file\n"),
    (babi.TooLong("two\nlines"), 2, r"error: two\\nlines\n"), (KeyboardInterrupt(), 130, ""),
    (BrokenPipeError(), 141, ""), (ValueError("a bug"), None, r"[\s\S]*ValueError: a bug\n"),
    (OSError("no source"), None, r"[\s\S]*OSError: no source\n")])
def test_bad_input_ends_in_one_line_and_a_bug_in_its_traceback(error, status, said, monkeypatch):
    """Also where streams are missing, or can do as little as a notebook's."""
    printed = []
    for name, stream in (("excepthook", None), ("stdin", None), ("stdout", None),
                         ("stderr", types.SimpleNamespace(write=printed.append))):
        monkeypatch.setattr(sys, name, stream)
    monkeypatch.setattr(os, "_exit", sys.exit)
    babi.install_error_hook()
    with sys.stdin, sys.stdout:
        print(sys.stdin.read())
    with pytest.raises(SystemExit, match=f"^{status}$") if status else contextlib.nullcontext():
        sys.excepthook(type(error), error, None)
    printed = "".join(printed)
    assert re.fullmatch(said, printed) and len(printed) < 1000, printed


def test_a_file_is_replaced_whole_and_its_neighbours_are_left_alone(tmp_path, monkeypatch):
    path, other = tmp_path / "a.csv", tmp_path / "a.csv.new"
    path.write_text("old")
    other.write_text("mine")
    with pytest.raises(ZeroDivisionError), babi.replaced(path, "w") as file:
        file.write("half")
        1 / 0
    assert path.read_text() == "old"
    denied = PermissionError(13, "Permission denied", "new")    # a virus scanner reads it so often
    replace = Mock(side_effect=[denied, denied, DEFAULT], wraps=os.replace)
    monkeypatch.setattr(babi.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, "replace", replace)
    babi.write_csv(path, [{"a": 1, "b": 2}], ["a"])
    assert babi.read_csv(path, ["a"]) == [{"a": "1"}] and replace.call_count == 3
    monkeypatch.setattr(os, "replace", Mock(side_effect=denied))
    with pytest.raises(BadInput, match="a.csv cannot be written .*another program"):
        babi.write_csv(path, [], ["a"])
    assert other.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["a.csv", "a.csv.new"]


def test_a_device_that_cannot_compute_is_not_trusted(monkeypatch, capsys):
    def ones(*size, device, real=torch.ones):
        if device.startswith("cuda"):
            raise RuntimeError("CUDA error: no kernel image is available\nmore lines")
        return real(*size, device=device)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch, "ones", ones)
    assert babi.find_device("auto") == "cpu"
    assert re.search("cuda is there .* no kernel image", capsys.readouterr().out)
    for name, why in (("cuda:0", ".*no kernel image is available$"), ("tpu", ""), ("meta", ""),
                      ("cuda:-1", ""), ("", ""), ("\x1b", ""), ("cpu:x", "")):
        with pytest.raises(BadInput, match=f"--device={name}{why}"):
            babi.find_device(name)


def test_flags_are_those_given_and_else_the_defaults():
    switch = dataclasses.make_dataclass("Switch", [("on", bool, babi.flag(True, "a switch"))])
    many = babi.Flags(task="qa2", samples=(5, 3), lengths=(0, 1024, 4096), score=True, length=0)
    given = ["--task=qa2", "--samples=5,3", "--score", "--length=0"]
    assert babi.parse_flags(babi.Flags(), "", given) == babi.parse_flags(many, "", []) == many
    assert babi.parse_flags(many, "", ["--length=9"]) == dataclasses.replace(many, length=9)
    assert babi.parse_flags(switch(), "", ["--no-on"]) == switch(False)
    with pytest.raises(SystemExit):     # a name with a % breaks no help
        babi.parse_flags(dataclasses.replace(many, noise="50%.txt"), "", ["--help"])


def test_the_checkpoint_is_the_one_named_or_the_last_or_the_one_that_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(babi, "SHIPPED", "ten-tasks.pt")
    os.mkdir("out")
    for name in ("", "nowhere.pt"):
        with pytest.raises(BadInput, match=f"no checkpoint .*{name}; train one first"):
            babi.find_checkpoint(name)
    for path in ("ten-tasks.pt", os.path.join("out", "ckpt.pt")):  # the second before the first
        Path(path).write_text("")
        assert babi.find_checkpoint() == path


# --------------------------------------------------------------------------------------------
# The scripts

def call(script, *flags, input="", into=None):
    """Run a script here, which saves the start of a process: (exit status, what it printed, what it
    complained of). Its globals go `into` a dictionary. A warning is an error, and a bug raises."""
    streams = [io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8") for text in (input, "", "")]
    handler, status = signal.getsignal(signal.SIGINT), 0
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, value in zip(("argv", "excepthook", "stdin", "stdout", "stderr"),
                               ([script, *flags], sys.excepthook, *streams)):
            patch.setattr(sys, name, value)
        try:
            try:
                names = runpy.run_path(os.path.join(HERE, script), run_name="__main__")
                ({} if into is None else into).update(names)
            except Exception:
                sys.excepthook(*sys.exc_info())
                raise
        except SystemExit as stop:
            status = stop.code or 0
        finally:
            signal.signal(signal.SIGINT, handler)
    return status, *(stream.detach().getvalue().decode() for stream in streams[1:])


def run(script, *flags, **more):
    """What a script prints that has nothing to complain about."""
    status, out, errors = call(script, *flags, **more)
    assert status == 0 and not errors, errors + out
    return out


def refused(script, *flags):
    """The one line of complaint of a script that must not run."""
    status, _, errors = call(script, *flags)
    assert status == 2 and errors.count("\n") == 1 and errors.startswith("error: "), errors
    return errors


@pytest.fixture(scope="session", autouse=True)
def long_run(request, tmp_path_factory):
    """The one long training run, begun first: it has the second core while the others run."""
    if not any("learned" in test.fixturenames for test in request.session.items):
        yield
        return
    out = tmp_path_factory.mktemp("learned")
    warn = ["-W", "error", "-W", "ignore::ResourceWarning"]  # some PyTorch leaves a folder open
    with subprocess.Popen([sys.executable, *warn, "train.py", "--context=128", "--steps=700",
                           f"--out={out}", "--proof=1", "--device=cpu"], cwd=HERE, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield process, out
        process.kill()


@pytest.fixture(scope="session")
def learned(long_run):
    """The long run at its end: what it printed, and its folder."""
    process, folder = long_run
    printed, errors = process.communicate()
    assert process.returncode == 0 and not errors, errors
    return printed, folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a run of ten steps."""
    out = tmp_path_factory.mktemp("tiny")
    run("train.py", *TINY, "--steps=10", f"--out={out}")
    return out


# Training: what the loop does, seen from the optimizers and from train.py's own names

def trained(folder, *flags):
    """train.py's globals, and of each step of an optimizer its kind, rates and gradient's norm."""
    names, steps = {}, []
    with register_optimizer_step_pre_hook(lambda optimizer, *_: steps.append((
            type(optimizer), [group["lr"] for group in optimizer.param_groups],
            math.hypot(*(p.grad.norm() for group in optimizer.param_groups for p in group["params"]
                         if p.grad is not None))))):
        run("train.py", *TINY, *flags, f"--out={folder}", into=names)
    return names, steps


# a question a task, as bAbI's train files (Weston et al. 2015, CC BY 3.0) have them
REAL = """
qa1: Mary moved to the bathroom. John went to the hallway. Where is Mary? bathroom
qa2: Mary went to the kitchen. Sandra journeyed to the office. Mary got the football there. Mary \
travelled to the garden. Where is the football? garden
qa3: Mary picked up the apple. John went to the office. Mary journeyed to the garden. Mary went \
to the bedroom. Where was the apple before the bedroom? garden
qa4: The garden is west of the office. The bedroom is west of the garden. What is west of the \
office? garden
qa5: Fred took the football there. Fred passed the football to Jeff. Who did Fred give the \
football to? Jeff
qa6: Sandra moved to the office. John went back to the garden. Is Sandra in the office? yes
qa7: Mary moved to the bathroom. Sandra journeyed to the bedroom. John went to the kitchen. Mary \
took the football there. How many objects is Mary carrying? one
qa8: Sandra journeyed to the hallway. John moved to the kitchen. Sandra moved to the bathroom. \
Daniel picked up the football there. What is Daniel carrying? football
qa9: John went to the kitchen. Sandra went back to the bedroom. Is John in the kitchen? yes
qa10: Fred is either in the school or the park. Mary went back to the office. Is Mary in the \
office? yes"""


def test_the_model_that_ships_answers_ten_real_questions_by_its_bank():
    model, encoding = LM2.load(babi.SHIPPED)
    noise = babi.make_noise(encoding, "far", 1000)
    lines = [re.fullmatch(r"(qa\d+): (.*\.) (.*\?) (.*)", line) for line in REAL.splitlines()[1:]]
    assert [line[1] for line in lines] == [*babi.TASKS]
    for number, (_, story, question, answer) in enumerate(line.groups() for line in lines):
        asked = babi.Sample((story,), (babi.Question(question, answer, ()),))
        pair = babi.to_tokens(asked, encoding, 35 * 64, noise, random.Random(number), (0.0, 0.04))
        right = babi.answered_by_bank(model, *babi.stack([pair]))
        assert (bool(right["memory"]), bool(right["wiped"])) == (True, False), (question, right)


def test_both_optimizers_warm_up_cool_down_and_take_no_gradient_longer_than_the_longest(tmp_path):
    _, steps = trained(tmp_path, "--steps=12", "--warmup=3", "--cooldown=0.5", "--lr=0.001",
                       "--muon_lr=0.02", "--grad_clip=0.01")
    shares = [1/3, 2/3, 1, 1, 1, 1, 1, 5/6, 4/6, 3/6, 2/6, 1/6]
    for kind, lr, groups in ((Muon, 0.02, 2), (torch.optim.AdamW, 0.001, 1)):
        rates = [rates for its_kind, rates, _ in steps if its_kind is kind]
        assert rates == [pytest.approx([lr * share] * groups) for share in shares]
    for (_, _, one), (_, _, other) in zip(steps[::2], steps[1::2], strict=True):
        assert math.hypot(one, other) == pytest.approx(0.01, rel=1e-3)


def test_the_change_of_the_banks_joins_the_loss_while_it_cools_down(tmp_path):
    flags = ["--steps=6", "--warmup=1", "--cooldown=0.5", "--grad_clip=1e9"]
    names, with_it = trained(tmp_path / "with", *flags, "--keep=100")
    without = trained(tmp_path / "without", *flags, "--keep=0")[1]
    same = [a[2] == pytest.approx(b[2], rel=1e-4) for a, b in zip(with_it, without, strict=True)]
    assert same == [True] * 8 + [False] * 4
    model, tokens, expected, memory = names["model"], random_tokens(T=192), 0.0, None
    for segment in tokens.split(64, dim=1):
        before = (memory or model.fresh_memory(2)).banks
        memory = model(segment, memory=memory)[2]
        expected += (memory.banks - before).abs().mean().item() * model.n_banks / 3
    change = names["scorer"](tokens, torch.tensor([0]))[1]
    assert change.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("tasks, power", [("qa1,qa8", 0.5), ("qa1", 1.0)])
def test_rows_of_a_mixture_weigh_by_the_root_of_what_they_ask(tasks, power, tmp_path):
    batch = trained(tmp_path, f"--task={tasks}", "--steps=1", "--batch_size=8")[0]["prepare"](1)[0]
    rows = (batch["at"] // batch["tokens"].size(1)).tolist()
    counts = [rows.count(row) for row in rows]
    assert len(set(counts)) > 1 or power == 1
    total = sum(rows.count(row) ** power for row in set(rows))
    assert batch["weights"].tolist() == pytest.approx([n ** (power - 1) / total for n in counts])


def test_a_text_is_learned_from_its_first_nine_tenths_and_scored_on_the_rest(tmp_path):
    cats, path, names = "the cat sat on the mat. ", tmp_path / "a,b=c.txt", {}
    path.write_text(cats * 450 + "the dog sat on the mat. " + cats * 49)
    flags = [f"--data={path}", "--steps=80", "--window=128", f"--out={tmp_path}"]
    out = run("train.py", *TINY, *flags, into=names)
    decode, held_out, seen = names["encoding"].decode, names["held_out"], ""
    for tokens, targets, _ in map(names["text_batch"], range(60)):
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
        seen += decode(tokens.flatten().tolist()) + decode(targets[:, -1].tolist())
    assert "cat" in seen and "dog" not in seen and decode(held_out.tolist()).startswith("the dog")
    tokens, targets = held_out[:256].view(2, 128), held_out[1:257].view(2, 128)
    nats, n_bytes = names["model"](tokens, targets)[1].item(), len(decode(held_out[1:257].tolist()))
    bits = float(re.search(r"bits_per_byte: ([\d.]+)", out)[1])
    assert bits < 1 and bits == pytest.approx(nats / math.log(2) * 256 / n_bytes, abs=1e-3)
    said = run("sample.py", f"--ckpt={tmp_path}/ckpt.pt", "--prompt=the cat", "--temperature=0")
    assert said.startswith("the cat ") and "sat on the mat." in said
    path.write_text(cats * 500)
    assert "another text" in refused("train.py", "--resume", f"--out={tmp_path}")


def test_the_proof_is_in_noise_that_was_not_trained_on(tmp_path, monkeypatch):
    made, load, prove = [], babi.load_noise, babi.proof_table
    monkeypatch.setattr(babi, "load_noise", lambda *args: made.append(load(*args)) or made[-1])
    monkeypatch.setattr(babi, "proof_table", lambda *args: made.append(args[4]) or prove(*args))
    run("train.py", *TINY, "--steps=1", "--proof=1", f"--out={tmp_path}")
    assert next(made[0](random.Random(0))) != next(made[-1](random.Random(0)))


def test_several_tasks_are_learned_and_scored_together(tmp_path, book, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = run("train.py", *TINY, "--task=qa1,qa8", f"--noise={book}", "--steps=10", "--proof=1")
    assert re.search(r"\| forget 0\.\d\d \|[\s\S]* qa8 1:0\.[\s\S]*\nmemory_qa8: ", out)
    scoring = ["--score", "--lengths=0,1k,2k", "--samples=5,3,3", f"--noise={book}"]
    out = run("babilong_tiny.py", *scoring)
    assert re.search(r"qa8 +0\.\d{3} ±0\.\d{3} ", out) and "last mentioned" in out
    assert run("babilong_tiny.py", *scoring, "--csv=scores.csv") == out
    assert sorted(os.listdir()) == ["book.txt", "out", "scores.csv"]
    assert [" ".join(list(cell.values())[:3]) for cell in babi.read_csv("scores.csv", [])] == [
        f"{task} {cell}" for task in ("qa1", "qa8") for cell in ("0 5", "1024 3", "2048 3")]


# Runs that end early, and many processes

def ended(folder, steps):
    """The weights that a run ends with, and its log but for the times."""
    saved = load_checkpoint(folder / "ckpt.pt")
    assert saved["train"]["step"] == steps
    return {name: weight.tolist() for name, weight in saved["model"].items()}, [
        (row["step"], row["loss"]) for row in babi.read_csv(folder / "log.csv", [])]


def test_ctrl_c_ends_a_run_after_this_step_and_resuming_is_exact(tiny, tmp_path, monkeypatch):
    def interrupted(self, *args, hidden_states=LM2.hidden_states, calls=itertools.count(1)):
        if next(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return hidden_states(self, *args)

    monkeypatch.setattr(LM2, "hidden_states", interrupted)
    assert "stopped after step 5" in run("train.py", *TINY, "--steps=10", f"--out={tmp_path}")
    run("train.py", "--resume", f"--out={tmp_path}")
    assert ended(tiny, 10) == ended(tmp_path, 10)


def test_segments_are_half_as_long_from_where_halve_says(tmp_path, monkeypatch):
    def noted(write, x, attention=MemoryWrite.attention):
        sizes.append(x.size(-2))
        return attention(write, x)

    sizes, names = [], {}
    flags = [*TINY, "--n_layer=1", "--steps=4", "--halve=0.5", f"--out={tmp_path}"]
    monkeypatch.setattr(MemoryWrite, "attention", noted)
    assert "after step 2 half of it" in run("train.py", *flags, into=names)
    model = LM2.load(tmp_path / "ckpt.pt")[0]
    assert sizes == [64, 64, 32, 32] and model.config.block_size == 32
    saved, learned = (m.blocks[0].write.position for m in (model, names["model"]))
    assert torch.equal(saved, learned[:, 32:]) and saved.abs().min() > 0
    run("train.py", "--resume", "--proof=1", f"--out={tmp_path}")
    assert len(sizes) > 4 and max(sizes[4:]) == 32


KILLER = """
import lm2, os, random, runpy, signal, sys, time, babilong_tiny, torch._dynamo  # loaded once
*flags, out = sys.argv[1:]
path, rng, kills = out + "/ckpt.pt", random.Random(0), 0
saved = lambda: os.path.exists(path) and os.stat(path).st_mtime_ns
while True:
    before, child = saved(), os.fork()
    if not child:
        sys.argv[1:] = [*(["--resume"] if before else flags), "--out=" + out]
        runpy.run_path("train.py", run_name="__main__")
        os._exit(0)
    done, moment = 0, None  # some time after the next checkpoint
    while not done and (kills == 10 or moment is None or time.time() < moment):
        if moment is None and saved() != before:
            moment = time.time() + rng.uniform(0, 0.05)
        time.sleep(0.001)
        done, status = os.waitpid(child, os.WNOHANG)
    if done:
        sys.exit(status or -kills)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
"""
spawn = partial(subprocess.run, cwd=HERE, text=True, capture_output=True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_killed_again_and_again_a_run_ends_with_the_very_same_weights(tmp_path):
    flags = [*TINY, "--task=qa1,qa7", "--steps=120", "--save_every=3", "--halve=0.1"]
    run("train.py", *flags, f"--out={tmp_path}/whole")
    done = spawn([sys.executable, "-c", KILLER, *flags, f"{tmp_path}/killed"])
    assert 246 <= done.returncode <= 252, done.stderr   # killed ten times, or four at least
    (whole, log), (weights, rows) = (ended(tmp_path / name, 120) for name in ("whole", "killed"))
    assert weights == whole and rows[-3:] == log[-3:]


@pytest.mark.parametrize("place, name, broken, status, said", [
    (torch, "save", lambda data, file: file.write(b"half") and os.close(-1), 2,
     r"error: .*ckpt\.pt cannot be written .*\n"),
    (LM2, "head", lambda self, x, head=LM2.head: head(self, x) * math.nan, 3,
     r"\nstep 10: the loss is nan.*\n"),
    (torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(math.inf), 3,
     r"\nstep 11: the gradient's norm is inf.*\n")], ids=["disk", "loss", "gradient"])
def test_a_run_that_cannot_go_on_says_so_and_leaves_the_older_checkpoint_whole(
        place, name, broken, status, said, tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny, tmp_path / "o")
    monkeypatch.setattr(place, name, broken)
    found = call("train.py", "--resume", "--steps=11", f"--out={tmp_path}/o")
    assert found[0] == status and re.fullmatch(said, found[2]), found
    assert sorted(os.listdir(tmp_path / "o")) == sorted(os.listdir(tiny))
    assert (tmp_path / "o" / "ckpt.pt").read_bytes() == (tiny / "ckpt.pt").read_bytes()


def test_two_processes_learn_what_one_does_with_the_whole_batch(tmp_path):
    flags = [*TINY, "--task=qa1,qa7", "--steps=20", "--threshold=0.01", "--halve=0.5"]
    run("train.py", *flags, f"--out={tmp_path}/one")
    done = spawn([sys.executable, "-m", "torch.distributed.run", "--standalone",
                  "--nproc_per_node=2", "train.py", *flags, f"--out={tmp_path}/two"])
    assert done.returncode == 0 and LM2.load(tmp_path / "two" / "ckpt.pt"), done.stderr
    one, two = (babi.read_csv(tmp_path / name / "log.csv", []) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["qa1_stage"] == b["qa1_stage"] and a["accuracy"] == b["accuracy"]
        assert abs(float(a["loss"]) - float(b["loss"])) < 2e-3


# Hostile input

BAD = {     # what the complaint names, where it is not the last flag; %20 stands for a space
    "train.py": """
--stepz=3; --n_lay=3; --steps=many; --steps=-1; --lr=nan; --lr=1e308; --seed=99999999999999999999
--n_embd=100000000 -> n_embd; --memory=lstm; --device=tpu; --task=qa1,qa99 -> qa99
--data=nowhere.txt -> nowhere.txt; --data={bad} -> irectory; --data={bad}/noise.bin -> UTF-8
--data={bad}/short.txt -> short.txt; --task=qa2 --data={bad}/facts.txt; --tokenizer=nope -> nope
--noise={bad}/short.txt -> 0 sentences; --tokenizer={bad}/noise.bin -> noise.bin
--out={bad}/short.txt -> short.txt; --out={bad}/log -> log.csv; --out={bad}/cut -> --resume
--resume --out={bad} -> no checkpoint; --resume --out={bad}/cut -> cut short
-x; --no-steps; --steps=--; --lr=1e999; --out={tiny} --resume --n_layer=3
WORLD_SIZE=; WORLD_SIZE=x; WORLD_SIZE=99 -> 99; RANK=x""",
    "babilong_tiny.py": """
--task=qa99; --length=12; --babi_dir={bad} -> line 2; --babi_dir=no -> no
--noise={bad}/facts.txt -> 0 sentences; --ckpt={bad}/cut/ckpt.pt -> cut short
--ckpt={tiny}/ckpt.pt --lengths=12 -> 12 tokens; --ckpt={tiny}/ckpt.pt --lengths=1q -> 1q
--ckpt={tiny}/ckpt.pt --tasks=qa0 -> qa0; --ckpt={tiny}/ckpt.pt --samples=0; --retrieve=-1
--ckpt={bad}/flags.pt -> --tasks; --ckpt={tiny}/ckpt.pt --csv={bad}/short.txt -> already""",
    "sample.py": """
--ckpt={bad}/no.pt -> no.pt; --ckpt={bad}/task.pt -> task.pt; --ckpt={bad}/flags.pt -> flags.pt
--ask=%20; --ask=; --ask=?; --prompt=; --ask=x --prompt=x; --prompt=x --temperature=nan
--temperature=-1; --prompt=x --temperature=1e-40; --temperature=inf; --top_k=-1; --max_new_tokens=0
--story=nowhere.txt -> nowhere.txt; --story={bad} -> irectory; --story={bad}/noise.bin -> UTF-8
--read={bad}/no.txt -> no.txt; --read={bad}/noise.bin -> UTF-8; --far=-1
--far=9 --noise={bad}/short.txt -> 0 sentences; --load_memory={bad}/no.pt -> no.pt
--load_memory={bad}/noise.bin -> noise.bin; --save_memory={bad}/short.txt -> already
--save_memory={bad}/no/x -> no/x; --ckpt={bad}/vanilla.pt --ask=x --show; --show -> --ask
--ask=x --save_memory={bad}/same --html={bad}/same -> same file"""}


@pytest.fixture(scope="session")
def bad(tiny, tmp_path_factory):
    """A folder of files that no script can use."""
    folder = tmp_path_factory.mktemp("bad")
    for name, content in {
            "short.txt": b"too short", "log/log.csv": b"a,b\n1,2", "noise.bin": bytes(range(256)),
            "facts.txt": b"Mary went with all the others to the old office. " * 200,
            "qa1_x.txt": b"1 Mary went to the office.\n2 Where is Mary? x\t",
            "cut/ckpt.pt": (tiny / "ckpt.pt").read_bytes()[:5000]}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    data = torch.load(tiny / "ckpt.pt", weights_only=True)
    config = data["config"] | {"memory": "none"}
    torch.save(data | {"train": {"flags": {"data": "", "task": ["qa1"]}}}, folder / "task.pt")
    torch.save(data | {"train": {"flags": 3}}, folder / "flags.pt")
    torch.save(data | {"config": config, "model": LM2(LM2Config(**config)).state_dict()},
               folder / "vanilla.pt")
    return folder


@pytest.mark.parametrize("script, case", [(script, case.strip()) for script, cases in BAD.items()
                                          for case in re.split("[;\n]", cases.strip())])
def test_bad_input_gets_one_clear_line_and_changes_no_file(script, case, bad, tiny, monkeypatch):
    given, _, names = case.format(bad=bad, tiny=tiny).partition(" -> ")
    flags = [flag.replace("%20", " ") for flag in given.split()]
    names = names or flags[-1].split("=")[0]
    if not given.startswith("-"):
        monkeypatch.setenv(*flags.pop().split("="))
    if script == "sample.py":
        flags.insert(0, f"--ckpt={tiny}/ckpt.pt")
    elif script == "train.py" and "--resume" not in given:
        flags = [f"--out={bad}/out", *TINY, "--steps=1", *flags]    # soon done, if not refused
    before = {path: path.is_file() and path.read_bytes() for path in bad.rglob("*")}
    assert names in refused(script, *flags)
    assert before == {path: path.is_file() and path.read_bytes() for path in bad.rglob("*")}


def test_hostile_files_run_no_code_and_are_refused_or_can_be_used(tiny, tmp_path, monkeypatch):
    def ask(path):
        model, encoding = LM2.load(path)
        said = model.generate(torch.tensor([encoding.encode_ordinary("Where?")]), 3)[0].tolist()
        assert encoding.decode(said).startswith("Where?")

    monkeypatch.chdir(tmp_path)
    Bomb = type("Bomb", (), {"__reduce__": lambda self: (os.mkdir, ("exploded",))})
    rng, used, story = random.Random(3), set(), b"1 Mary went home.\n2 Who?\tx\t1\n"
    readers = [(ask, (tiny / "ckpt.pt").read_bytes()), (babi.read_babi, story),
               (babi.load_encoding, story), (lambda path: list(babi.read_sentences(path)), story)]
    for trial in range(480):
        reader, good = readers[trial % 4]
        data = bytearray(good)
        for at in rng.sample(range(len(good)), rng.randint(1, 6)):
            data[at:at + rng.randint(0, 2)] = rng.choice((
                rng.randbytes(1), b"\t", b"\n", b"\0", b"9" * 5000, b"\xc3\xa9", b"x" * 10000))
        Path("file").write_bytes(rng.choice((
            data, data, good[:rng.randrange(len(good))], rng.randbytes(300),
            pickle.dumps(Bomb(), 2), pickle.dumps({"config": Bomb()}, 2))))
        try:
            reader("file")
            used.add(reader)
        except BadInput as error:
            assert "\n" not in str(error) and "file" in str(error), error
    assert ask in used and os.listdir() == ["file"]


# Asking: sample.py

@pytest.fixture(scope="session")
def ckpt(tiny):
    """As a flag, a checkpoint of random weights: what it says depends on all that it read."""
    data = torch.load(tiny / "ckpt.pt", weights_only=True)
    torch.manual_seed(0)
    weights = {name: torch.randn_like(weight) / 2 for name, weight in data["model"].items()}
    torch.save(data | {"model": weights}, tiny / "random.pt")
    return f"--ckpt={tiny}/random.pt"


@pytest.fixture
def loaded(ckpt):
    return LM2.load(ckpt[7:])


# The recorder

def test_the_recorder_changes_nothing_and_records_what_was_computed():
    model, tokens, gates = random_model(torch.float32), random_tokens(B=1, T=11), []
    expected, block = model(tokens)[0], model.blocks[0]
    with torch.no_grad(), sample.Recorder(model) as recorder:
        with block.write.gate.register_forward_hook(lambda *a: gates.append(a[2][0].chunk(2, -1))):
            assert torch.equal(model(tokens)[0], expected)
        assert torch.equal(model.generate(tokens, 5, temperature=0)[:, :11], tokens)
    assert not any(module._forward_hooks for module in model.modules())
    assert [len(s["tokens"]) for s in recorder.segments] == [4, 4, 3, 4, 4, 4]
    assert recorder.kept()[:11] == tokens[0].tolist() and recorder.source(0).shape == (3, 1 + 23)
    memory = model.fresh_memory(1)
    x = model.mixer(model.embedding(tokens[:, :4]), memory.tail)[0][:, None]
    e, bank = block.attention_norm(x), memory.banks[:, 0]
    x = x + block.attention(e)
    first, after, (opened, kept) = recorder.segments[0], block.write(x, bank)[1], gates[0]
    for name, wanted in {
            "read": block.read.attention(e, normed(bank[:, None]))[0, 0], "input": opened,
            "again": block.read.attention(e, normed(after[:, None]))[0, 0], "forget": kept,
            "joined": block.read(e, bank[:, None])[0, 0].norm(dim=-1),
            "write": block.write.attention(normed(x))[0, 0] * opened.mean(-1)[:, None]}.items():
        assert torch.allclose(first[name][0], wanted), name


@pytest.mark.parametrize("resumed", [False, True])
def test_what_leaves_the_recorder_is_counted_in_the_first_column(resumed):
    model, tokens = random_model(torch.float32), random_tokens(B=1, T=38)
    few, all_ = (sample.Recorder(model, keep, resumed) for keep in (12, 256))
    with torch.no_grad(), few, all_:
        model(tokens)
    assert [s["number"] for s in few.segments] == [8, 9, 10]
    assert few.kept() == tokens[0, 28:].tolist() and few.source(0, until=-1).shape == (3, 1 + 8)
    for i in range(2):
        short, whole, left, columns = few.source(i), all_.source(i), torch.ones(3, 8), []
        for segment in all_.segments[::-1]:     # channel by channel, as they forget
            shares, opened = segment["found"][i].T, (segment["input"][i] * left).mean(-1)
            columns += [shares * opened]
            left = left * segment["forget"][i]
        assert torch.allclose(whole[:, 1:], torch.cat(columns[::-1]).T)
        assert torch.allclose(whole[:, 0], left.mean(-1) * resumed)
        assert torch.allclose(short[:, 1:], whole[:, -10:])
        assert torch.allclose(short[:, 0], whole[:, :-10].sum(1))


def test_the_answer_is_shown_with_what_it_was_read_from(ckpt, tmp_path):
    page, word = tmp_path / "page.html", "Na\u00efve \u65e5\u672c \N{FOX FACE}"
    out = run("sample.py", ckpt, f"--story={STORY}" + f"{word} <b>&amp; " * 15, "--show",
              "--ask=Where is Mary?", f"--html={page}")
    assert "segment 2 | mean gates input" in out and "was read from" in out
    read, text = out[out.index("segment 1"):], page.read_text("utf-8")
    assert read.count("\N{FOX FACE}") >= 14 and read.count("\u65e5") >= 14 and "\ufffd" not in read
    assert "http" not in text and "DATA" not in text and "<b>" not in text
    data = json.loads(re.search(r"const data = (.*);", text)[1])
    tokens = "".join(token for segment in data for token in segment["tokens"])
    assert "kitchen" in tokens and "&lt;b&gt;&amp;amp;" in tokens and word in tokens
    assert [segment["number"] for segment in data] == list(range(1, len(data) + 1))
    assert len(data[0]["tokens"]) == 64
    for segment, kind in itertools.product(data, ("read", "write", "again")):
        for block in segment["blocks"]:
            assert [len(slot) for slot in block[kind]] == [len(segment["tokens"])] * 16


def test_a_fact_of_long_ago_is_shown_where_it_was_written_and_where_it_is_read():
    out = run("sample.py", f"--ckpt={babi.SHIPPED}", "--story=Mary went to the garden.",
              "--far=2500", "--ask=Where is Mary?", "--show")
    story, read = out.split("segment 2 |")[0], out.rpartition("was read from")[2]
    assert re.search(r" garden\[0\.\d\]", story) and re.search("0.* Mary went to the garden", read)


def test_control_characters_of_a_text_never_reach_the_terminal(ckpt, tmp_path):
    bad = "\x1b]0;title\x07\x1b[2J\x9b31m"
    (tmp_path / "bad.txt").write_text((STORY + bad) * 20, encoding="utf-8")
    typed = f"/load {tmp_path}/bad.txt\n/memory\n{bad} Mary\n/memory\n/{bad}\n/load {bad}\n" \
        f"Where is {bad}?\n/load x\0y\n"
    for flags, input in (([], typed), ([f"--story={bad} x", f"--ask={bad}", "--show"], ""),
                         ([f"--story={tmp_path}/bad.txt", "--ask=x", "--show"], ""),
                         ([f"--prompt={bad}"], ""), ([f"--read={bad}"], "")):
        status, out, errors = call("sample.py", ckpt, *flags, input=input)
        assert status in (0, 2) and not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", out + errors)
    assert "\\x1b" in out + errors


@pytest.mark.parametrize("typed, meant", [
    ("Where is Mary", "Where is Mary?"), ("iPhones went to the PARK", "iPhones went to the park."),
    ("is mary in the Kitchen", "Is Mary in the kitchen?"), ("WHERE IS mary ??", "Where is Mary?"),
    ("how many objects is john carrying", "How many objects is John carrying?"), (" ? ", ""),
    ("The office is north of the hallway", "The office is north of the hallway."), ("...", ""),
    ("John went to the office. mary moved to the kitchen. Where is Mary?",
     "John went to the office.|Mary moved to the kitchen.|Where is Mary?"),
    ("Where is the McMilk?", "Where is the McMilk?"), ("John got up!", "John got up!"), ("", "")])
def test_what_is_typed_becomes_facts_and_questions_as_the_stories_spell_them(typed, meant):
    assert "|".join(sample.sentences(typed)) == meant


@pytest.mark.parametrize("question, answers, others", [
    ("Where is Mary?", "kitchen, garden", "yes,kitchen kitchen to,milk,"),
    ("Who gave the milk?", "Fred", "milk"), ("Is Mary in the park?", "maybe", "park"),
    ("How many objects is Mary carrying?", "two", "milk"), ("Why did Mary go?", "", "kitchen"),
    ("What is Mary carrying?", "milk,milk;apple,nothing", "milk;,two"),
    ("What is north of the office?", "garden", "Mary")])
def test_an_answer_is_one_that_the_tasks_have_or_is_said_to_be_none(question, answers, others):
    for words, known in ((answers, True), (others, False)):
        for word in (word.strip().replace(";", ",") for word in words.split(",") if words):
            said = WORDS.encode_ordinary(f" {word}. Then")
            reader = types.SimpleNamespace(generate=lambda *_, **__: said)
            told = sample.answer(reader, WORDS, ["qa1"], question)
            no_answer = f'the model has no answer to that (it says "{word}")'
            assert told == (word if known else no_answer)
            assert sample.answer(reader, WORDS, [], question) == word


def test_lines_files_flags_and_pipes_are_the_same_story(ckpt, tmp_path):
    ask, story, path = "--ask=where is MARY", STORY * 20, tmp_path / "story.txt"
    said = run("sample.py", ckpt, f"--story={story}", "--ask=Where is Mary?")
    told, wiped = said.splitlines()
    assert wiped.startswith("bank wiped: ") and wiped != f"bank wiped: {told}"
    path.write_text(story)
    assert run("sample.py", ckpt, f"--story={path}", ask) == said
    lines = "Mary went to the kitchen.\n\nJohn  moved to\tthe office\n" * 20
    one_line = "\ufeff" + "mary went to the Kitchen. John moved to the office. " * 20
    for typed in (lines + "Where is Mary?\n", lines + "where is mary", one_line + "Where is Mary?"):
        assert run("sample.py", ckpt, input=typed) == said
    out = run("sample.py", ckpt, "--read=-", ask, input=story)
    assert out.startswith("read 240 tokens in") and out.endswith(said)
    near, far, further = (run("sample.py", ckpt, f"--story={STORY}", f"--far={n}", ask)
                          for n in (0, 300, 400))
    assert near.endswith("no memory needed: all that was read is in the current segment\n")
    assert "\nbank wiped: " in far and far != further


def test_a_chat_has_commands_and_a_question_or_a_failed_load_leaves_no_trace(ckpt, tmp_path):
    (tmp_path / "good").write_text("Mary went to the kitchen. " * 15)
    (tmp_path / "bad").write_bytes((STORY * 3000).encode() + b"na\xefve")   # found in the middle
    typed = f"/load {tmp_path}/good;/memory;Where is Mary?;/load {tmp_path}/bad;/load {tmp_path};" \
        f"/load {tmp_path}/no;/memory;/x;/reset;/memory;/far x;/far 100;/memory;/quit;/x"
    out = run("sample.py", ckpt, input=typed.replace(";", "\n"))
    first, second, empty, noise = re.findall(r"(?:^  .*\n)+", out, flags=re.M)
    assert "read 90 tokens" in out and "not yet written: kitchen. Mary" in first and second == first
    assert "nothing to trace" in empty and "nothing to trace" not in noise
    assert "not yet written" in noise and "Mary" not in noise and out.count("no command /x") == 1
    assert "no command /far x" in out and len(re.findall(f"(?m)^error: {tmp_path}", out)) == 3


@pytest.mark.parametrize("task, question, names, said", [
    ("qa6", "Is Mary in the office?", {"Mary"}, ""), ("qa1", "Is Mary?", None, "never"),
    ("qa6", "Is Mary in the office?", set(), "Mary"),
    ("qa4", "What is north of the office?", set(), "office"),
    ("qa4", "What is north of the office?", {"office"}, ""), ("qa1", "Why did Zoe?", None, "Zoe"),
    ("qa2", "Where is the milk?", {"Mary"}, "milk"), ("qa2", "Where is the milk?", None, ""),
    ("qa5", "Who gave the milk to Bill?", {"milk", "Fred"}, "Bill")])
def test_a_hint_names_what_the_model_never_read_or_learned(task, question, names, said, capsys):
    sample.hint(babi.word_encoding(), [task], question, names)
    told = capsys.readouterr().err
    assert re.fullmatch(f"hint: .*{said}.*\n" if said else "", told)


def test_a_saved_memory_knows_its_model_whom_it_named_and_that_it_is_old(ckpt, tiny, tmp_path):
    memory, ask, other = f"{tmp_path}/memory.pt", "--ask=Where is Mary?", "--ask=Where is Sandra?"
    told = run("sample.py", ckpt, f"--story={STORY * 20}", f"--save_memory={memory}", ask)
    load = ckpt, f"--load_memory={memory}"
    again = run("sample.py", *load, ask, "--show")
    assert again.startswith(told) and "an earlier session" in again and "of any word" not in again
    assert "an earlier session" in run("sample.py", *load, input="Where is John?\n/memory\n")
    assert call("sample.py", *load, other)[2] == "hint: nothing that was read names Sandra\n"
    assert "another model" in refused("sample.py", f"--ckpt={tiny}/ckpt.pt", load[1], other)
    saved = torch.load(memory, weights_only=True)
    assert saved.pop("names") == ["John", "Mary", "kitchen", "office"]
    torch.save(saved, memory)           # of whom it speaks is unknown
    assert run("sample.py", *load, other)


def test_noise_is_of_its_seed_and_as_long_as_is_said(loaded):
    reader, flags = sample.Reader(loaded[0]), sample.Flags(seed=3)
    sample.read_noise(reader, loaded[1], flags, 50)
    noise = babi.make_noise(loaded[1], 3)(random.Random("3 0"))
    assert reader.rest == [token for _ in range(20) for token in next(noise)][:50]
    sample.read_noise(reader, loaded[1], flags, 20000)
    assert reader.count == 20050


@pytest.mark.parametrize("n_rest, kept", [(10, True), (60, True), (61, False)])
def test_a_wiped_bank_leaves_what_is_in_the_current_segment(loaded, monkeypatch, n_rest, kept):
    model, encoding = loaded
    reader, asked = sample.Reader(model), []
    reader.read([65] * (64 + n_rest))
    monkeypatch.setattr(sample, "answer", lambda reader, *_: asked.append(reader) or "")
    sample.reply(reader, encoding, ["qa1"], "Where is Mary?")   # of four tokens
    whole, wiped = asked
    assert whole is reader and torch.equal(wiped.memory.banks, model.fresh_memory(1).banks)
    assert not torch.equal(reader.memory.banks, wiped.memory.banks)
    assert wiped.rest == ([65] * n_rest if kept else [])


def test_a_text_is_read_and_recorded_in_pieces_as_at_once(loaded, tmp_path, monkeypatch):
    model, encoding = loaded
    text = "Mary went to the kitchen, and na\u00efve\nJohn slept.  " * 200
    monkeypatch.setattr(babi, "text_pieces", partial(babi.text_pieces, size=37))
    small = list(babi.text_pieces(io.BytesIO(text.encode()), "book"))
    assert "".join(small) == text and len(small) > 100
    tokens = encoding.encode_ordinary(sample.tidy(text))
    (tmp_path / "book").write_text(text, encoding="utf-8")
    reader, other = (sample.Reader(model, sample.Recorder(model)) for _ in range(2))
    sample.read_stream(reader, encoding, str(tmp_path / "book"), sample.tidy)
    other.read(tokens)
    assert reader.rest == other.rest == tokens[len(tokens) // 64 * 64:]
    assert reader.count == len(tokens) and reader.recorder.kept() == other.recorder.kept()
    for i in range(2):
        a, b = (one.recorder.source(i) for one in (reader, other))
        assert torch.allclose(a, b, atol=1e-6)
    whole = model.generate(torch.tensor([tokens]), 70, temperature=0)[0, len(tokens):].tolist()
    assert [reader.generate([], 70, temperature=0) for _ in range(2)] == [whole, whole]


@pytest.mark.parametrize("key, value", [(key, value) for key, values in {
    "banks": (torch.Tensor.double, torch.Tensor.int, torch.Tensor.to_sparse, torch.Tensor.tolist,
              lambda t: t.to(torch.complex64), lambda t: t.to("meta"), lambda t: t[:, :1],
              lambda t: t * math.nan),
    "tail": (torch.Tensor.half, lambda t: t + math.inf, lambda t: t + 1e38),
    "rest": (["Mary"], "Mary", [-1], [1.5], [10**6], [True], [2**70], [[1]], [1] * 64, None,
             torch.ones(3)), "count": ("1", -1, 2**64, 99.5), "model": (torch.ones(2),),
    "names": (["\x1b[2J"], [["Mary"]], "Mary")}.items() for value in values])
def test_a_forged_memory_gets_one_line(loaded, tmp_path, key, value):
    path, reader = str(tmp_path / "memory.pt"), sample.Reader(loaded[0])
    reader.read([65] * 70)
    sample.save_memory(reader, path)
    again, saved = sample.load_memory(loaded[0], path), torch.load(path, weights_only=True)
    assert again.rest == reader.rest and again.count == 70 and again.names == frozenset()
    torch.save(saved | {key: value(saved[key]) if callable(value) else value}, path)
    with pytest.raises(BadInput, match=r"^[^\n]*memory\.pt[^\n]*$"):
        sample.load_memory(loaded[0], path)


def test_a_text_is_continued_as_flags_say(ckpt):
    flags = [ckpt, "--prompt=the\tcat\nsat", "--max_new_tokens=12"]
    greedy = run("sample.py", *flags, "--temperature=0")
    assert greedy.startswith("the\\tcat\nsat") and run("sample.py", *flags, "--top_k=1") == greedy
    first, again, other = (run("sample.py", *flags, "--temperature=5", "--top_k=0", f"--seed={n}")
                           for n in (1, 1, 2))
    assert first == again != other and first != greedy


# Results

def test_a_comparison_counts_weights_as_train_py_makes_them():
    from results import compare
    assert compare.settings(["--data=a=b.txt", "--address"]) == {"data": "a=b.txt", "address": True}
    model = LM2(LM2Config(WORDS.n_vocab, address=False, n_embd=32))
    flags, wanted = ["--no-address", "--n_embd=32"], sum(p.numel() for p in model.parameters())
    assert compare.count(flags) == wanted
    for kind in ("--memory=rmt", "--memory=none"):
        found = compare.count(flags + compare.matched([kind], flags))
        assert found == pytest.approx(wanted, rel=0.01)


def test_a_comparison_runs_every_arm_once_and_leaves_out_what_diverges(tmp_path, monkeypatch):
    flags = ["memory", "--seeds=7", "--score=--lengths=0,256 --samples=4,4 --device=cpu",
             f"--out={tmp_path}", " ".join(["--train=--steps=3 --n_layer=1", *TINY])]
    ran, lost, real = [], "no arm", subprocess.run

    def process(command, **kwargs):
        if kwargs:      # matplotlib's, which looks for fonts the first time it is there
            return real(command, **kwargs)
        ran.append(command[1:])
        status = 3 if f"--out={lost}" in command else call(*command[1:])[0]
        return types.SimpleNamespace(returncode=status)

    monkeypatch.setattr(subprocess, "run", process)
    out = run("results/compare.py", *flags)
    assert len(ran) == 6 + 7 and len(re.findall("(?m)^[LRv].* 1  [01]", out)) == 7
    rows = babi.read_csv(tmp_path / "memory.csv", [])
    cells = {row["arm"]: int(row["parameters"]) for row in rows}
    for arm in ("RMT, as many weights", "vanilla, as many weights"):
        assert cells[arm] == pytest.approx(cells["LM2"], rel=0.03)
    before, lost = {path: path.read_bytes() for path in tmp_path.glob("*/*.pt")}, tmp_path / "RMT-7"
    out = run("results/compare.py", *flags)
    assert len(ran) == 13 + 6 and all("--resume" in command for command in ran[13:])
    assert "no longer a number: RMT, seed 7" in out and not re.search("(?m)^RMT  ", out)
    assert len(before) == 6 and before == {path: path.read_bytes() for path in before}


def test_the_study_moves_with_the_bank_alone(loaded, ckpt, tmp_path):
    """A bank frozen before the update is read as before it; the news is read after it alone."""
    from results import study
    loaded[0].mixer.weight.data[:, :, :-1] = 0  # or its tail would tell of the segment before
    shares = study.study(*loaded)[0]
    for question in study.QUESTIONS:
        before, after, frozen = torch.tensor([[shares[question, bank, fact] for fact in study.ROWS]
                                              for bank in study.BANKS])
        assert torch.allclose(before, frozen, atol=1e-5) and before[2] == frozen[2] == 0 < after[2]
        assert min(row.min() for row in (before, after, frozen)) > -1e-5
    out = run("results/study.py", ckpt, f"--out={tmp_path}/s.png")
    assert len(re.findall(r"(?m)^  \S.*?  +[\d.]+ +[\d.]+ +[\d.]+$", out)) == 8
    assert "pip install matplotlib" in out or (tmp_path / "s.png").stat().st_size > 1000


def test_the_benchmark_runs_and_counts_kernels():
    from results import bench
    with bench.Kernels() as kernels:
        y = (torch.ones(4, 4).view(2, 8)[:, 1:].mT.reshape(-1, 1)[0] + 1).unsqueeze(0)
        y.add_(1)
    assert 3 <= kernels.count <= 4          # ones, clone of the reshape, add, add_
    out = call("results/bench.py", "--quick")[1]
    rows = re.findall(r"(?m)^(vanilla|RMT|LM2) +[\d,]+ ", out)
    assert rows == ["LM2"] + 2 * ["vanilla", "RMT", "LM2"] and "kernels" in out and "ratio" in out


# What the long run has learned: last, as it takes its time

def test_the_memory_is_learned_and_nothing_else_does_it(learned):
    """Facts in the first segment, questions in the second: right with the bank, chance without."""
    accuracy = {key: float(value) for key, value in re.findall(r"(\w+_1x): ([\d.]+)", learned[0])}
    assert accuracy["memory_1x"] > 0.8, learned[0]
    assert accuracy["wiped_1x"] < 0.35 and accuracy["swapped_1x"] < 0.45, learned[0]


def test_scores_are_what_generation_says(learned):
    """The table's exact match, of stories it has learned to answer and of others."""
    model, encoding = LM2.load(learned[1] / "ckpt.pt")
    rng, seen = random.Random(0), set()
    samples = [babi.make_sample(task, rng) for task in ("qa1", "qa8") for _ in range(20)]
    for sample, right in babi.score(model, encoding, samples, 0, None, rng):
        question = sample.questions[0]
        prompt = encoding.encode_ordinary(" " + " ".join((*sample.facts, question.text)))
        said = model.generate(torch.tensor([prompt]), 8, temperature=0)[0, len(prompt):].tolist()
        answer = encoding.encode_ordinary(f" {question.answer}.")
        assert right == (said[:len(answer)] == answer)
        seen.add(right)
    assert seen == {True, False}


def test_without_a_memory_the_model_is_shown_what_its_window_holds():
    model, tokens = random_model(memory="none"), random_tokens(B=20, T=18)
    for span in (1, 3, 4, 7):
        targets = torch.full_like(tokens, -1)
        guess = model(tokens[:, -max(4, span):])[0].argmax(-1)[:, -span:]
        targets[:10, -span:], targets[10:, -span:] = guess[:10], (guess[10:] + 1) % 11
        assert babi.answered(model, tokens, targets).tolist() == [True] * 10 + [False] * 10


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].startswith("--blank=") or not sys.argv[1][8:]:
        sys.exit(print("error: usage: python test_lm2.py --blank=FOLDER", file=sys.stderr) or 2)
    write_assignments(sys.argv[1][8:])
