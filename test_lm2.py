"""What must always hold. Each name is a sentence that is true; run with `pytest -q`.

A falling loss proves nothing about a memory: most public memory transformers carried a silent bug
in the way information flows. The tests of the first two parts would each have caught one of them.

    pytest -q -k assignment_read             # one assignment's tests alone, see ASSIGNMENTS
    python test_lm2.py --blank=FOLDER        # a copy of the project with the assignments to solve
"""
import ast
import csv
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

os.environ["OMP_NUM_THREADS"] = "1"  # models are tiny, and the other core has the long run

import pytest
import torch
import torch.nn.functional as F
from torch.optim.optimizer import register_optimizer_step_pre_hook

import babilong_tiny as babi
import sample
from lm2 import (LM2, BadInput, FeedForward, Gate, LM2Config, Memory, Muon, load_checkpoint,
                 normed)

HERE = os.path.dirname(os.path.abspath(__file__))


def random_model(dtype=torch.float64, **changes):
    """A small model all of whose weights are random, so that nothing is hidden behind a zero."""
    sizes = dict(vocab_size=11, block_size=4, n_layer=2, n_head=2, n_kv_head=1, n_embd=8, conv=3,
                 memory_slots=3)
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        model = LM2(LM2Config(**sizes | changes)).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return model


def random_tokens(B=2, T=18, vocab=11, seed=0):
    return torch.randint(vocab, (B, T), generator=torch.Generator().manual_seed(seed))


def changed_at(tokens, where):
    """The same tokens, but for those at `where`, an index or a slice of positions."""
    tokens = tokens.clone()
    tokens[:, where] = (tokens[:, where] + 1) % 11
    return tokens


def randn(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------
# The parts that are assignments: each against the equations once more, one number at a time, from
# plain lists, and each without the others

ASSIGNMENTS = {"attention": ("Attention.forward",), "gate": ("Gate.forward",),
               "read": ("MemoryRead.attention", "MemoryRead.forward"),
               "write": ("MemoryWrite.attention", "MemoryWrite.forward"),
               "block": ("Block.forward",)}


class Stub(torch.nn.Module):
    """A function in place of a part."""

    def __init__(self, function):
        super().__init__()
        self.forward = function


def part(name, gate=lambda x: (1.2 * torch.sigmoid(x) - 0.1).clamp(0, 1), **changes):
    """A block's attention, read or write, with random weights and a gate that is not lm2.py's."""
    module = getattr(random_model(**changes).blocks[0], name)
    module.gate = Stub(gate)
    return module


def close(found, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    return found.shape == expected.shape and (found - expected).abs().max() < 1e-9


def dot(u, v):
    return sum(a * b for a, b in zip(u, v, strict=True))


def product(layer, v):
    """A linear layer's, of a list."""
    bias = layer.bias.tolist() if layer.bias is not None else [0.0] * layer.out_features
    return [dot(row, v) + b for row, b in zip(layer.weight.tolist(), bias)]


def mix(shares, rows):
    return [dot(shares, column) for column in zip(*rows)]


def add(u, v):
    return [a + b for a, b in zip(u, v, strict=True)]


def softmax(scores):
    powers = [math.exp(score) for score in scores]
    return [power / sum(powers) for power in powers]


def rms(v):
    return [a / math.sqrt(dot(v, v) / len(v) + 2.0**-52) for a in v]


def hard(v):
    return [min(1.0, max(0.0, 1.2 / (1 + math.exp(-a)) - 0.1)) for a in v]


def rotated(v, position, base):
    """Pairs of channels turned; base None turns nothing."""
    if base is None:
        return v
    out, half = list(v), len(v) // 2
    for i in range(half):
        angle = position * base ** (-i / half)
        out[i] = v[i] * math.cos(angle) - v[i + half] * math.sin(angle)
        out[i + half] = v[i] * math.sin(angle) + v[i + half] * math.cos(angle)
    return out


def slow_attention(layer, e, base):
    """One segment e, T rows, through a module Attention."""
    h, out = layer.head_dim, [[] for _ in e]
    q, kv = ([product(linear, row) for row in e] for linear in (layer.query, layer.key_value))
    for i in range(layer.n_head):
        group = i // (layer.n_head // layer.n_kv_head)
        queries, keys, values = ([row[j * h:j * h + h] for row in rows] for rows, j in (
            (q, i), (kv, group), (kv, layer.n_kv_head + group)))
        keys = [rotated(key, t, base) for t, key in enumerate(keys)]
        for t, query in enumerate(queries):
            query = rotated(query, t, base)
            shares = softmax([dot(query, key) / math.sqrt(h) for key in keys[:t + 1]])
            out[t] += mix(shares, values[:t + 1])
    return [product(layer.output, row) for row in out]


def test_assignment_attention_looks_back_and_not_ahead_within_a_segment():
    layer, x = part("attention"), randn(2, 3, 4, 8)
    other = x.clone()
    other[:, 1, 2] += 1
    y, moved = layer(x), layer(other)
    assert y.shape == x.shape
    changed = (y - moved).abs().amax(-1) > 1e-9
    assert changed[:, 1].tolist() == [[False, False, True, True]] * 2
    assert not changed[:, [0, 2]].any()


def test_assignment_attention_of_one_token_gives_its_value():
    layer, x = part("attention", n_embd=16, n_head=4, n_kv_head=2), randn(2, 1, 1, 16)
    values = layer.key_value(x)[..., -8:].view(2, 1, 1, 2, 4)       # two heads of width four
    shared = values.repeat_interleave(2, dim=3).view(x.shape)       # two query heads have each
    assert close(layer(x), layer.output(shared))


def test_assignment_attention_without_positions_equals_slow_loops():
    layer, x = part("attention", n_embd=16, n_head=4, n_kv_head=2), randn(2, 2, 4, 16)
    layer.rotary = Stub(lambda x, first=0: x)
    assert close(layer(x), [[slow_attention(layer, e, None) for e in row] for row in x.tolist()])


def test_assignment_attention_equals_slow_loops():
    for base in (10000.0, 100.0):
        layer = part("attention", n_embd=16, n_head=4, n_kv_head=2, rope_base=base)
        x = randn(2, 2, 4, 16)
        expected = [[slow_attention(layer, e, base) for e in row] for row in x.tolist()]
        assert close(layer(x), expected), base


def test_assignment_attention_goes_on_from_its_cache():
    layer, x, cache = part("attention"), randn(2, 1, 4, 8), {}
    parts = [layer(x[:, :, start:stop], cache) for start, stop in ((0, 2), (2, 3), (3, 4))]
    assert close(torch.cat(parts, dim=2), layer(x).tolist())


def test_assignment_attention_obeys_a_mask():
    layer, x = part("attention"), randn(2, 1, 4, 8)
    layer.rotary = Stub(lambda x, first=0: x)
    everyone, causal = torch.ones(4, 4).bool(), torch.ones(4, 4).tril().bool()
    assert close(layer(x.flip(2), mask=everyone), layer(x, mask=everyone).flip(2).tolist())
    assert close(layer(x, mask=causal), layer(x).tolist())


def test_assignment_attention_has_the_right_gradient():
    assert torch.autograd.gradcheck(part("attention"), randn(1, 2, 4, 8).requires_grad_(),
                                    fast_mode=True)


def test_assignment_gate_equals_its_formula():
    x = randn(50) * 3
    assert close(Gate(True)(x), hard(x.tolist()))
    assert close(Gate(False)(x), [1 / (1 + math.exp(-a)) for a in x.tolist()])


def test_assignment_gate_shuts_and_opens_wholly_if_it_is_hard():
    shut, wide = torch.tensor([-3.0, -9.0, -1000.0]), torch.tensor([3.0, 9.0, 1000.0])
    assert Gate(True)(shut).eq(0).all() and Gate(True)(wide).eq(1).all()
    assert Gate(False)(shut[:2]).gt(0).all() and Gate(False)(wide[:2]).lt(1).all()


def test_assignment_gate_has_the_right_gradient():
    for gate in (Gate(True), Gate(False)):
        assert torch.autograd.gradcheck(gate, torch.linspace(-4, 4, 9).double().requires_grad_())


def slow_read_shares(read, tokens, slots):
    """Eq. 1: how each token, a list, attends to the slots of one segment, normed."""
    names = read.address.tolist() if torch.is_tensor(read.address) else [[0.0] * 8] * len(slots)
    keys = [product(read.key, add(slot, name)) for slot, name in zip(slots, names)]
    queries = [product(read.query, token) for token in tokens]
    return [softmax([dot(query, key) / math.sqrt(8) for key in keys]) for query in queries]


def slow_read(read, tokens, bank, shares):
    """Eqs. 2 and 3."""
    values, out = [product(read.value, rms(slot)) for slot in bank], []
    for row in shares:
        recalled = mix(row, values)
        gate = hard(product(read.output_gate, recalled))
        out.append([g * a for g, a in zip(gate, recalled)])
    return out


def test_assignment_read_finds_a_slot_for_each_token():
    for address in (True, False):
        read, x, slots = part("read", address=address), randn(2, 2, 4, 8), randn(2, 2, 3, 8, seed=1)
        expected = [[slow_read_shares(read, *pair) for pair in zip(*row)]
                    for row in zip(x.tolist(), slots.tolist())]
        assert close(read.attention(x, slots), expected)


def test_assignment_read_gates_what_was_recalled():
    """The shares are given here, so that this part counts alone."""
    read, x, banks = part("read"), randn(2, 2, 4, 8), 5 * randn(2, 2, 3, 8, seed=1)
    shares = randn(2, 2, 4, 3, seed=2).softmax(-1)
    read.attention = lambda tokens, slots: shares
    expected = [[slow_read(read, *segment) for segment in zip(*row)]
                for row in zip(x.tolist(), banks.tolist(), shares.tolist())]
    assert close(read(x, banks), expected)


def test_assignment_read_equals_slow_loops():
    read, x, banks = part("read"), randn(2, 2, 4, 8), 5 * randn(2, 2, 3, 8, seed=1)
    expected = [[slow_read(read, tokens, bank, slow_read_shares(read, tokens, map(rms, bank)))
                 for tokens, bank in zip(*row)] for row in zip(x.tolist(), banks.tolist())]
    assert close(read(x, banks), expected)


def test_assignment_read_adds_nothing_where_values_are_zero_or_the_gate_is_shut():
    read, x, banks = part("read"), randn(2, 2, 4, 8), randn(2, 2, 3, 8, seed=1)
    torch.nn.init.constant_(read.output_gate.bias, -1000.0)
    assert close(read(x, banks), torch.zeros_like(x).tolist())
    torch.nn.init.constant_(read.output_gate.bias, 1000.0)
    torch.nn.init.zeros_(read.value.weight)
    assert close(read(x, banks), torch.zeros_like(x).tolist())


def test_assignment_read_has_the_right_gradient():
    read = part("read", torch.sigmoid)
    inputs = randn(1, 2, 4, 8).requires_grad_(), randn(1, 2, 3, 8, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(read, inputs, fast_mode=True)
    read(*inputs).sum().backward()
    assert all(p.grad.abs().max() > 0 for p in read.parameters())


def slow_write_shares(write, tokens):
    """How each slot attends to the tokens of one segment, normed lists; the empty key has the
    score 0, and an unfinished segment stands at the end of a whole one."""
    shares = []
    for query, position in zip(write.query.tolist(), write.position.tolist()):
        scores = [10 * dot(query, token) / math.sqrt(8) + place
                  for token, place in zip(tokens, position[-len(tokens):], strict=True)]
        shares.append(softmax([*scores, 0.0])[:-1])
    return shares


def slow_write(write, segments, bank, shares):
    """Eqs. 4 to 6 for one row: the banks that each segment finds, and the one behind them."""
    banks = [bank]
    for tokens, by_slot in zip(segments, shares, strict=True):
        bank = []
        for old, bias, row in zip(banks[-1], write.gate_bias.tolist(), by_slot):
            news = product(write.value, mix(row, map(rms, tokens)))
            seen = add(product(write.gate_news, news), bias)
            if write.gate_bank:
                seen = add(seen, product(write.gate_bank, [math.tanh(a) for a in old]))
            gates = hard(seen)
            bank.append([g_in * math.tanh(a) + g_forget * b for g_in, g_forget, a, b
                         in zip(gates[:8], gates[8:], news, old)])
        banks.append(bank)
    return banks


def test_assignment_write_gives_the_bank_each_segment_finds_and_the_one_they_leave():
    write, x, bank = part("write"), randn(2, 3, 4, 8), randn(2, 3, 8, seed=1)
    banks, last = write(x, bank)
    assert banks.shape == (2, 3, 3, 8) and last.shape == (2, 3, 8)
    assert torch.equal(banks[:, 0], bank) and not torch.allclose(last, banks[:, -1])


def test_assignment_write_finds_its_tokens_or_nothing():
    write = part("write")
    for T in (4, 3, 1):     # a whole segment and unfinished ones
        x = randn(2, 3, T, 8)
        expected = [[slow_write_shares(write, tokens) for tokens in row] for row in x.tolist()]
        assert close(write.attention(x), expected), T
    torch.nn.init.constant_(write.position, -1e4)
    assert close(write.attention(x), torch.zeros(2, 3, 3, 1).tolist())


def test_assignment_write_is_a_cell_that_runs_over_segments():
    """The shares are given here, so that this part counts alone."""
    write, x, bank = part("write"), 5 * randn(2, 3, 4, 8), randn(2, 3, 8, seed=1)
    shares = randn(2, 3, 3, 4, seed=2).softmax(-1)
    write.attention = lambda tokens: shares
    expected = [slow_write(write, *row) for row in zip(x.tolist(), bank.tolist(), shares.tolist())]
    banks, last = write(x, bank)
    assert close(torch.cat((banks, last[:, None]), dim=1), expected)


def test_assignment_write_equals_slow_loops():
    for T, sees in ((4, True), (3, True), (4, False)):
        write = part("write", gates_see_bank=sees)
        x, bank = 5 * randn(2, 3, T, 8), randn(2, 3, 8, seed=1)
        expected = [slow_write(write, row, its_bank, [
            slow_write_shares(write, [rms(token) for token in tokens]) for tokens in row])
            for row, its_bank in zip(x.tolist(), bank.tolist())]
        banks, last = write(x, bank)
        assert close(torch.cat((banks, last[:, None]), dim=1), expected), (T, sees)


def test_assignment_write_can_keep_the_bank_whole_or_replace_it():
    write, x, bank = part("write"), randn(2, 3, 4, 8), randn(2, 3, 8, seed=1)
    for p in (write.gate_news.weight, write.gate_bank.weight):
        torch.nn.init.zeros_(p)
    write.gate_bias.data[:, :8], write.gate_bias.data[:, 8:] = -9.0, 9.0
    assert torch.equal(write(x, bank)[1], bank)             # exactly, however often
    write.gate_bias.data.neg_()
    assert torch.equal(write(x, bank)[1], write(x, 9 * bank)[1])
    assert write(x, bank)[1].abs().max() <= 1               # tanh of the news and nothing else


def test_assignment_write_has_the_right_gradient():
    write = part("write", torch.sigmoid)
    inputs = randn(1, 3, 4, 8).requires_grad_(), randn(1, 3, 8, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(write, inputs, fast_mode=True)
    write(*inputs)[1].sum().backward()
    assert all(p.grad.abs().max() > 0 for p in write.parameters())


def stubbed_block(has_memory=True):
    """A block of simple functions, and a dictionary that gets what each was given."""
    block, given = random_model(memory="lm2" if has_memory else "none").blocks[0], {}

    def stub(name, function):
        def noted(*args, **more):
            given[name] = [*args, *more.values()]
            return function(*args)
        setattr(block, name, Stub(noted))

    stub("attention", lambda e, *_: e.cos())
    stub("feed_forward", torch.tanh)
    if has_memory:
        stub("write", lambda x, bank: (torch.stack((bank, bank + 1), dim=1), bank + 2))
        stub("read", lambda e, banks: e.sin() * banks.mean(2, keepdim=True))
    return block, given


def slow_block(block, x, banks=None):
    """e, E_attn and the block's output, if it reads these banks."""
    e, weight = F.rms_norm(x, (8,)) * block.attention_norm.weight, block.feed_forward_norm.weight
    left = x + e.cos()
    following = left if banks is None else left + e.sin() * banks.mean(2, keepdim=True)
    return e, left, following + torch.tanh(F.rms_norm(following, (8,)) * weight)


def test_assignment_block_without_memory_adds_attention_and_then_feed_forward():
    (block, given), x = stubbed_block(False), randn(2, 2, 4, 8)
    e, _, expected = slow_block(block, x)
    y, bank = block(x, None)
    assert close(given["attention"][0], e.tolist()) and close(y, expected.tolist())
    assert bank is None


def test_assignment_block_writes_what_attention_left_and_returns_the_bank_behind_it():
    (block, given), x, bank = stubbed_block(), randn(2, 2, 4, 8), randn(2, 3, 8, seed=1)
    behind = block(x, bank)[1]
    assert close(given["write"][0], slow_block(block, x)[1].tolist())
    assert torch.equal(given["write"][1], bank) and torch.equal(behind, bank + 2)


def test_assignment_block_reads_by_its_norm_the_banks_that_segments_find():
    (block, given), x, bank = stubbed_block(), randn(2, 2, 4, 8), randn(2, 3, 8, seed=1)
    block(x, bank)
    assert close(given["read"][0], slow_block(block, x)[0].tolist())
    assert torch.equal(given["read"][1], torch.stack((bank, bank + 1), dim=1))


def test_assignment_block_equals_the_equations():
    (block, _), x, bank = stubbed_block(), randn(2, 2, 4, 8), randn(2, 3, 8, seed=1)
    expected = slow_block(block, x, torch.stack((bank, bank + 1), dim=1))[2]
    assert close(block(x, bank)[0], expected.tolist())


def test_assignment_block_with_a_cache_reads_the_bank_and_leaves_it():
    (block, given), x, bank = stubbed_block(), randn(2, 1, 3, 8), randn(2, 3, 8, seed=1)
    cache = {}
    y, behind = block(x, bank, cache)
    assert close(y, slow_block(block, x, bank[:, None])[2].tolist()) and torch.equal(behind, bank)
    assert "write" not in given and any(given_to is cache for given_to in given["attention"])
    mask = torch.ones(3, 3).bool()
    block(x, bank, None, mask)
    assert any(given_to is mask for given_to in given["attention"])


def blanked(source, keep=()):
    """lm2.py's text, of which the assignments' functions, but for those to keep, say so instead."""
    wanted = {name: part for part in ASSIGNMENTS.keys() - keep for name in ASSIGNMENTS[part]}
    lines = source.splitlines(keepends=True)
    for owner in ast.parse(source).body[::-1]:
        for function in getattr(owner, "body", [])[::-1] if isinstance(owner, ast.ClassDef) else ():
            part = wanted.pop(f"{owner.name}.{getattr(function, 'name', '')}", None)
            if part:
                first = function.body[0]    # its docstring stays
                start = first.end_lineno if ast.get_docstring(function) else first.lineno - 1
                lines[start:function.end_lineno] = [
                    f'        raise NotImplementedError("assignment: {part}")\n']
    assert not wanted, wanted
    return "".join(lines)


def write_assignments(folder):
    """A copy of the project in a new or empty folder, with the assignments to solve."""
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        sys.exit(print(f"error: {folder} is there and not empty", file=sys.stderr) or 2)
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(HERE):
        path = os.path.join(HERE, name)
        if name.endswith(".py") or name in ("README.md", "requirements.txt", "LICENSE"):
            shutil.copy(path, folder)
        elif name == "results":
            shutil.copytree(path, os.path.join(folder, name),
                            ignore=shutil.ignore_patterns("__pycache__"))
    with open(os.path.join(HERE, "lm2.py"), encoding="utf-8") as file:
        text = blanked(file.read())
    with open(os.path.join(folder, "lm2.py"), "w", encoding="utf-8") as file:
        file.write(text)
    print(f"{folder}/lm2.py has the assignments: {', '.join(ASSIGNMENTS)}. To test one, there:\n"
          "    pytest -q -k assignment_read")


def its_tests(part):
    return [test for name, test in globals().items() if name.startswith(f"test_assignment_{part}_")]


def test_blanked_every_assignment_fails_by_its_name_and_solved_alone_it_passes(monkeypatch):
    with open(os.path.join(HERE, "lm2.py"), encoding="utf-8") as file:
        source = file.read()
    if 'NotImplementedError("assignment' in source:
        pytest.skip("these are the assignments themselves")

    def use(text):
        module = types.ModuleType("lm2")
        exec(compile(text, "lm2.py", "exec"), module.__dict__)
        for name in ("LM2", "LM2Config", "Gate"):
            monkeypatch.setitem(globals(), name, getattr(module, name))

    for part in ASSIGNMENTS:
        assert len(its_tests(part)) >= 3
        use(blanked(source))
        for test in its_tests(part):
            with pytest.raises(NotImplementedError, match=f"^assignment: {part}$"):
                test()
        use(blanked(source, keep={part}))
        for test in its_tests(part):
            test()


def test_assignments_are_written_to_an_empty_folder_alone(tmp_path):
    flag = f"--blank={tmp_path}/new"
    assert "assignment_read" in run("test_lm2.py", flag)
    assert {"lm2.py", "train.py", "test_lm2.py", "README.md"} <= set(os.listdir(tmp_path / "new"))
    new, old = ((folder / "lm2.py").read_text("utf-8") for folder in (tmp_path / "new", Path(HERE)))
    assert new.count('NotImplementedError("assignment: ') == 7 and len(new) < len(old)
    assert new.count('"""') == old.count('"""')             # docstrings stay
    assert "empty" in refused("test_lm2.py", flag)


# --------------------------------------------------------------------------------------------
# The model

def test_the_feed_forward_is_swiglu_eight_thirds_wide():
    layer, x = random_model(n_embd=24, n_head=2).blocks[0].feed_forward, randn(2, 24)
    expected = []
    for v in x.tolist():
        gates = [a / (1 + math.exp(-a)) for a in product(layer.gate, v)]
        expected.append(product(layer.down, [g * a for g, a in zip(gates, product(layer.up, v))]))
    assert close(layer(x), expected)
    widths = [FeedForward(LM2Config(9, n_embd=d)).up.out_features for d in (8, 24, 64)]
    assert widths == [16, 64, 168] and FeedForward(LM2Config(9, n_hidden=5)).up.out_features == 5


def test_the_model_is_embedding_mixer_blocks_norm_and_tied_head():
    model, tokens, x = random_model(), random_tokens(T=8), []
    weight, kernel = model.embedding.weight, model.mixer.weight[:, 0].tolist()
    for row in tokens:
        rows = [[0.0] * 8] * 2 + weight[row].tolist()
        x.append([[dot(kernel[i], [before[i] for before in rows[t:t + 3]]) for i in range(8)]
                  for t in range(8)])
    x = torch.tensor(x, dtype=torch.float64).view(2, 2, 4, 8)
    for block in model.blocks:
        x = block(x, torch.eye(3, 8, dtype=torch.float64).expand(2, 3, 8))[0]      # M_0
    x = F.rms_norm(x.flatten(1, 2), (8,)) * model.norm.weight
    assert close(model(tokens)[0], (x @ weight.T).tolist())


def test_the_loss_is_the_mean_over_what_is_scored_in_the_weights_own_precision():
    model, tokens, targets = random_model(), random_tokens(), random_tokens(seed=1)
    targets[:, ::3] = -1
    logits, loss, _ = model(tokens, targets)
    expected = -sum(row.log_softmax(-1)[target] for row, target in
                    zip(logits.flatten(0, 1), targets.flatten()) if target >= 0) / 24
    assert loss.dtype == torch.float64 and abs(loss - expected) < 1e-12


def test_every_initial_value_is_as_the_docstring_says():
    torch.manual_seed(0)
    weights = dict.fromkeys(
        ("embedding", "attention.query", "attention.key_value", "read.query", "read.key",
         "read.output_gate", "write.value", "write.gate_news", "write.gate_bank",
         "feed_forward.gate", "feed_forward.up"), 1 / 8)
    weights |= dict.fromkeys(("attention.output", "read.value", "feed_forward.down"), 0.0)
    spread = {f"{name}.weight": std for name, std in weights.items()}
    spread |= {"read.output_gate.bias": 0.0, "read.address": 0.1, "write.query": 0.1,
               "write.position": 0.0, "memory_tokens.before": 0.1, "memory_tokens.behind": 0.1}
    for memory in ("lm2", "rmt"):
        for name, p in LM2(LM2Config(500, memory=memory)).named_parameters():
            name = re.sub(r"blocks\.\d\.", "", name)
            if name.endswith("norm.weight"):
                assert p.eq(1).all()
            elif name == "write.gate_bias":
                assert p[:, :64].eq(0).all() and p[:, 64:].eq(2).all()
            elif name == "mixer.weight":
                assert p[:, :, -1].eq(1).all() and 0.25 < p[:, :, :-1].std() < 0.35
            else:
                assert abs(p.std() - spread[name]) <= 0.1 * spread[name], name
                assert abs(p.mean()) <= 0.1 * spread[name], name


def test_the_decoder_is_untouched_by_a_memory_that_adds_nothing():
    with_memory, without = random_model(), random_model(memory="none")
    without.load_state_dict(with_memory.state_dict(), strict=False)
    tokens = random_tokens()
    assert not torch.allclose(with_memory(tokens)[0], without(tokens)[0])
    for block in with_memory.blocks:
        torch.nn.init.zeros_(block.read.value.weight)
    assert torch.equal(with_memory(tokens)[0], without(tokens)[0])


@pytest.mark.parametrize("memory", ["lm2", "rmt", "none"])
def test_no_position_sees_the_future(memory):
    model, tokens = random_model(memory=memory), random_tokens(T=18)
    logits = model(tokens)[0]
    for prefix in (1, 3, 4, 5, 7, 8, 11, 12, 15, 17):
        moved = model(changed_at(tokens, slice(prefix, None)))[0]
        assert (moved - logits)[:, :prefix].abs().max() < 1e-12, prefix
        assert (moved - logits)[:, prefix:].abs().max() > 1e-6, prefix


def test_the_first_segment_reaches_the_last_only_through_the_memory():
    tokens = random_tokens(T=20)
    for memory, moved in (("lm2", True), ("rmt", True), ("none", False)):
        model = random_model(memory=memory)
        difference = (model(tokens)[0] - model(changed_at(tokens, 1))[0])[:, 16:].abs().max()
        assert (difference > 1e-6) == moved


def test_the_local_mixer_crosses_a_border_by_its_own_width_and_no_further():
    model, tokens = random_model(memory="none", conv=3), random_tokens(T=8)
    logits = model(tokens)[0][:, 4:]
    assert not torch.allclose(model(changed_at(tokens, 3))[0][:, 4:], logits)
    assert torch.equal(model(changed_at(tokens, slice(2)))[0][:, 4:], logits)


def test_memory_tokens_equal_one_sequence_with_a_mask():
    """RMT's segment is one sequence, memory + tokens + memory, of which the last part sees all."""
    model, T, N = random_model(memory="rmt"), 4, 3
    tokens, bank = random_tokens(T=T), randn(2, N, 8)
    memory = model.fresh_memory(2)._replace(banks=bank[:, None])
    names = model.memory_tokens
    x = model.mixer(model.embedding(tokens), memory.tail)[0]
    x = torch.cat((bank + names.before, x, bank + names.behind), dim=1)
    sees = torch.ones(N + T + N, N + T + N).tril().bool()
    sees[N + T:] = True
    for block in model.blocks:
        a, e = block.attention, block.attention_norm(x)
        q = a.rotary(a.query(e).view(2, -1, 2, 4).transpose(1, 2))
        k, v = a.key_value(e).view(2, -1, 2, 4).transpose(1, 2).chunk(2, dim=1)
        scores = (q @ a.rotary(k).transpose(2, 3) / 2).masked_fill(~sees, -math.inf)
        x = x + a.output((scores.softmax(-1) @ v).transpose(1, 2).reshape(2, -1, 8))
        x = x + block.feed_forward(block.feed_forward_norm(x))
    logits, _, after = model(tokens, memory=memory)
    assert close(model.head(x[:, N:N + T]), logits.tolist())
    assert close(F.rms_norm(x[:, N + T:], (8,)), after.banks[:, 0].tolist())


def test_normed_is_pytorchs_rms_norm_forward_and_backward():
    for scale in (1.0, 1e-8):       # beside which epsilon counts
        x, y = ((scale * randn(3, 5, 8)).float().requires_grad_() for _ in range(2))
        ours, theirs = normed(x), F.rms_norm(y, (8,))
        ours.cos().sum().backward()
        theirs.cos().sum().backward()
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=0)
        assert torch.allclose(x.grad, y.grad, rtol=1e-3, atol=1e-6)
    assert normed(torch.zeros(2, 8)).eq(0).all()
    for size in (40, 400, 40000):   # whose squares are beyond float16
        assert (normed(torch.full((2, 8), float(size)).half()) - 1).abs().max() < 1e-2


@pytest.mark.parametrize("conv", [0, 3])
@pytest.mark.parametrize("memory", ["lm2", "rmt", "none"])
def test_the_residual_stream_stays_in_float32_in_mixed_precision(memory, conv):
    """Or the models of a comparison would differ in precision as well."""
    model, seen = random_model(torch.float32, memory=memory, conv=conv), []
    model.blocks[-1].register_forward_hook(lambda *args: seen.append(args[2][0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(random_tokens())
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("kind", ["lm2", "rmt"])
def test_gradient_reaches_the_first_segment_unless_it_is_cut(kind):
    model, tokens = random_model(memory=kind), random_tokens(T=12)
    for cut in (False, True):
        first = model.fresh_memory(2)
        first.banks.requires_grad_()
        memory = model(tokens[:, :8], memory=first)[2]
        memory = Memory(*(part.detach() for part in memory)) if cut else memory
        model(tokens[:, 8:], memory=memory)[0].sum().backward()
        assert (first.banks.grad is None) == cut
        if not cut:
            assert first.banks.grad.abs().max() > 0


@pytest.mark.parametrize("kind", ["lm2", "rmt"])
def test_rows_of_a_batch_are_independent_and_nothing_is_kept_between_calls(kind):
    model, tokens = random_model(memory=kind), random_tokens(B=3)
    logits, _, memory = model(tokens)
    for row in range(3):
        alone = model(tokens[row:row + 1])
        assert close(alone[0][0], logits[row].tolist())
        assert close(alone[2].banks[0], memory.banks[row].tolist())
    assert torch.equal(model(tokens)[0], logits)


@pytest.mark.parametrize("kind", ["lm2", "rmt"])
def test_many_calls_equal_one_call(kind):
    model, tokens = random_model(memory=kind), random_tokens(T=18)
    whole, _, final = model(tokens)
    memory, parts = None, []
    for start, stop in ((0, 4), (4, 12), (12, 18)):
        logits, _, memory = model(tokens[:, start:stop], memory=memory)
        parts.append(logits)
    assert close(torch.cat(parts, 1), whole.tolist())
    assert close(memory.banks, final.banks.tolist()) and torch.equal(memory.tail, final.tail)


def test_a_long_text_is_taken_in_pieces_and_gives_the_same():
    """A piece is 2**13 tokens, so that long texts need no more room."""
    model, tokens, seen = random_model(n_layer=1, block_size=256), random_tokens(T=5000), []
    with torch.no_grad():
        _, _, early = model(tokens[:, :1024], last=1)
        expected = model(tokens[:, 1024:], memory=early)
        model.blocks[0].register_forward_hook(lambda *args: seen.append(args[2][0][..., 0].numel()))
        logits, _, memory = model(tokens, last=2500)
    assert close(logits, expected[0][:, -2500:].tolist()) and sum(seen) == 2 * 5000
    assert close(memory.banks, expected[2].banks.tolist()) and max(seen) == 2**13


@pytest.mark.parametrize("kind", ["lm2", "rmt"])
def test_the_last_logits_alone_are_the_same(kind):
    model, tokens = random_model(memory=kind), random_tokens(T=18)
    targets = tokens.roll(-1, 1)
    targets[:, :13] = -1
    whole, loss, _ = model(tokens, targets)
    for last in (1, 2, 5, 18, 99):
        assert close(model(tokens, last=last)[0], whole[:, -last:].tolist())
        if last >= 5:
            assert torch.allclose(model(tokens, targets, last=last)[1], loss)


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
    shares = (highest / temperature).softmax(-1)
    said = model.generate(token.expand(4000, 1), 1, temperature, top_k)[:, 1]
    for share, wanted in zip(shares, tokens):
        assert abs((said == wanted).double().mean() - share) < 0.03
    assert set(said.tolist()) <= set(tokens.tolist())


def test_no_tokens_and_negative_numbers_are_refused():
    model, tokens = random_model(), random_tokens(T=5)
    for flags in ({"temperature": -1.0}, {"temperature": math.nan}, {"top_k": -1}):
        with pytest.raises(ValueError):
            model.generate(tokens, 2, **flags)
    for call_it in (partial(model, tokens[:, :0]), partial(model.generate, tokens[:, :0], 2),
                    partial(model, tokens, last=-1), partial(model, tokens, last=0)):
        with pytest.raises(ValueError):
            call_it()


@pytest.mark.parametrize("T", [1, 3, 4, 9])
@pytest.mark.parametrize("N, d", [(1, 8), (3, 8), (20, 8), (5, 12)])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_any_lengths_slots_and_widths_fit(T, N, d, layers):
    model = random_model(memory_slots=N, n_embd=d, memory_layers=layers)
    logits, loss, memory = model(random_tokens(T=T), random_tokens(T=T, seed=1))
    assert logits.shape == (2, T, 11) and loss.ndim == 0
    assert memory.banks.shape == (2, layers, N, d) and memory.tail.shape == (2, 2, d)


@pytest.mark.parametrize("hard_gates", [True, False])
def test_a_gate_switched_off_is_wide_open_and_stays_so(hard_gates):
    text, seen = random_tokens(vocab=16), {}
    for off in ("output_gate", "input_gate", "forget_gate"):
        model = LM2(LM2Config(16, block_size=4, hard_gates=hard_gates, **{off: False}))
        block = model.blocks[0]
        for name, part in (("read", block.read), ("write", block.write)):
            part.gate.register_forward_hook(lambda *args, name=name: seen.update({name: args[2]}))
        fit(model, [(text[:, :-1], text[:, 1:])] * 3)
        gates = dict(zip(("input_gate", "forget_gate"), seen["write"].chunk(2, dim=-1)),
                     output_gate=seen["read"])
        assert [name for name, gate in gates.items() if gate.eq(1).all()] == [off]


def test_slots_without_an_address_are_read_by_what_they_say_alone():
    without, model, tokens = random_model(address=False), random_model(), random_tokens()
    assert not any("address" in name for name, _ in without.named_parameters())
    model.load_state_dict(without.state_dict(), strict=False)
    assert not torch.allclose(model(tokens)[0], without(tokens)[0])
    for block in model.blocks:
        torch.nn.init.zeros_(block.read.address)
    assert close(model(tokens)[0], without(tokens)[0].tolist())


def test_a_model_that_was_moved_without_its_values_is_whole_when_they_are_loaded():
    model, tokens = random_model(), random_tokens()
    with torch.device("meta"):
        moved = LM2(model.config).double()
    moved.to_empty(device="cpu")
    for buffer in moved.buffers():
        buffer.fill_(math.nan)          # what was there before
    moved.load_state_dict(model.state_dict())
    assert close(moved(tokens)[0], model(tokens)[0].tolist())


def fit(model, batches, lr=1e-2):
    """Train on the batches in turn; the loss of each step."""
    optimizers, losses = model.optimizer(lr), []
    for tokens, targets in batches:
        loss = model(tokens, targets)[1]
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_loss_on_random_tokens_stays_at_ln_v():
    """No causal model can guess fresh random tokens; one that sees the future soon does."""
    torch.manual_seed(0)
    model = LM2(LM2Config(8, block_size=8, n_embd=32, n_head=2, n_kv_head=2, memory_slots=8))
    batches = []
    for step in range(200):
        text = random_tokens(16, 33, vocab=8, seed=step)
        batches.append((text[:, :-1], text[:, 1:]))
    assert sum(fit(model, batches)[-50:]) / 50 > math.log(8) - 0.01


def test_one_batch_is_overfitted():
    torch.manual_seed(0)
    model = LM2(LM2Config(16, block_size=8, n_embd=32, n_head=2, n_kv_head=2))
    text = random_tokens(4, 33, vocab=16)
    assert min(fit(model, [(text[:, :-1], text[:, 1:])] * 150)) < 0.05


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has none")
def test_muon_is_torchs_muon_in_the_weights_own_precision():
    """And its updates are orthogonal, nearly: all their singular values are about 1."""
    shapes, ours, theirs = ((6, 6), (6, 6), (4, 10), (10, 4)), [], []
    for weights in (ours, theirs):
        torch.manual_seed(1)
        weights += [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    before = [p.detach().clone() for p in ours]
    optimizers = (Muon(ours, lr=0.1, weight_decay=0.5),
                  torch.optim.Muon(theirs, lr=0.1, weight_decay=0.5))
    for step in range(3):
        for weights, optimizer in zip((ours, theirs), optimizers):
            torch.manual_seed(step)
            for p in weights:
                p.grad = torch.randn_like(p)
            optimizer.step()
        if step == 0:
            moved = [(p.detach() - b * 0.95) / 0.1 / max(1, p.size(0) / p.size(1)) ** 0.5
                     for p, b in zip(ours, before)]
            assert all(0.5 < s < 1.3 for m in moved for s in torch.linalg.svdvals(m))
    for p, q in zip(ours, theirs):
        assert (p - q).norm() < 0.02 * q.norm()  # torch's is in bfloat16


def test_muon_takes_a_closure_and_gives_its_loss():
    p, losses = torch.nn.Parameter(torch.eye(3)), []
    optimizer = Muon([p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        losses.append(p.square().sum())
        losses[-1].backward()
        return losses[-1]

    assert optimizer.step(closure) is losses[0] and optimizer.step() is None
    assert p.square().sum() < losses[0]


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
    muon, adamw = model.optimizer()
    assert muon.defaults["lr"] == 1e-2 and adamw.defaults["lr"] == 2e-3


@pytest.mark.parametrize("name, value", [
    ("vocab_size", 0), ("block_size", 2**24), ("rope_base", math.nan), ("rope_base", 0.5),
    ("n_embd", "64"), ("n_layer", True), ("n_head", 3), ("n_kv_head", 3), ("memory", "lstm"),
    ("memory_slots", 0), ("memory_layers", 3), ("memory_layers", -2), ("conv", -1),
    ("output_gate", 1), ("n_embd", 2**24)])
def test_sizes_that_do_not_fit_are_refused_by_name(name, value):
    with pytest.raises(BadInput, match=name):
        LM2Config(**{"vocab_size": 11, name: value})


BYTES = [chr(byte) for byte in range(256)]
FORGED = [
    ("tokenizer", None, []), ("tokenizer", "tokens", BYTES[1:]), ("tokenizer", "tokens", None),
    ("tokenizer", "tokens", BYTES[1:] + ["a"]), ("tokenizer", "tokens", BYTES[1:] + ["ab"]),
    ("tokenizer", "tokens", BYTES[1:] + ["\u6f22"]), ("tokenizer", "tokens", list(range(256))),
    ("tokenizer", "pattern", ""), ("tokenizer", "pattern", "("), ("tokenizer", "pattern", r"\w+"),
    ("tokenizer", "pattern", "(?:" * 9000), ("tokenizer", "pattern", 3), ("model", None, None),
    ("model", "norm.weight", torch.full((8,), math.nan)), ("model", "norm.weight", [1.0] * 8),
    ("model", "norm.weight", torch.ones(9)), ("model", "norm.weight", torch.ones(8).long()),
    ("model", "norm.weight", torch.ones(8).to_sparse()), ("model", "more", torch.ones(8)),
    ("model", "norm.weight", torch.ones(8, device="meta")), ("config", None, 3),
    ("config", "rope_base", math.nan), ("config", "block_size", 2**24), ("config", "n_layer", 9),
    ("config", "n_embd", "8"), ("config", "vocab_size", 255), ("config", "more", 1)]


@pytest.fixture(scope="module")
def checkpoint():
    """A small one, as train.py makes them."""
    model = random_model(torch.float32, vocab_size=256)
    return {"config": dataclasses.asdict(model.config), "model": model.state_dict(),
            "tokenizer": {"pattern": r"\s*\w+|[\s\S]", "tokens": BYTES}, "train": {}}


@pytest.mark.parametrize("place, key, value", FORGED)
def test_a_forged_checkpoint_is_refused_in_one_line(place, key, value, checkpoint, tmp_path):
    torch.save(checkpoint | {place: checkpoint[place] | {key: value} if key else value},
               tmp_path / "ckpt.pt")
    with pytest.raises(BadInput, match=r"ckpt\.pt") as error:
        LM2.load(tmp_path / "ckpt.pt")
    assert "\n" not in str(error.value)


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
GET, DROP = ("picked up", "got", "grabbed", "took"), ("dropped", "left", "discarded", "put down")
WAYS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}


def read_story(facts):
    """A log of [(kind, who, what, whom)], from the text alone, by rules of its own."""
    log = []
    for fact in facts:
        w = fact.rstrip(".").split()
        rest = " ".join(w[1:])
        if w[0] == "The":
            log.append(("relation", w[1], w[-1], w[3]))
        elif "either" in w:
            log.append(("either", w[0], w[-4], w[-1]))
        elif " not in " in fact or "no longer" in fact:
            log.append(("not", w[0], w[-1], ""))
        elif w[-2] == "to" and w[-1] in NAMES:
            log.append(("give", w[0], w[-3], w[-1]))
        elif rest.startswith(GET):
            log.append(("get", w[0], w[-2] if w[-1] == "there" else w[-1], ""))
        elif rest.startswith(DROP):
            log.append(("drop", w[0], w[-2] if w[-1] == "there" else w[-1], ""))
        else:
            log.append(("go", w[0], w[-1], ""))
    return log


def solve(facts, question):
    """The answer to any question of qa1 to qa10, written apart from the generator: it replays the
    story once, forwards, and keeps a diary of everybody and everything."""
    place, maybe, hands, diary, gifts, order = {}, {}, {}, {}, [], {}
    position = {}
    for kind, who, what, whom in read_story(facts):
        if kind in ("go", "either", "not"):
            place[who] = what if kind == "go" else ""
            maybe[who] = (what, whom) if kind == "either" else ()
            for thing in hands.get(who, ()):
                diary.setdefault(thing, []).append(what)
        elif kind == "get":
            hands.setdefault(who, []).append(what)
            order.setdefault(who, {}).setdefault(what, len(order.get(who, {})))
            diary[what] = []
        elif kind == "drop":
            hands[who].remove(what)
            place[what] = place.get(who)
        elif kind == "give":
            hands.setdefault(who, [])
            if what in hands[who]:
                hands[who].remove(what)
            hands.setdefault(whom, []).append(what)
            order.setdefault(whom, {}).setdefault(what, len(order.get(whom, {})))
            gifts.append((who, what, whom))
        else:  # places on a map
            dx, dy = WAYS[whom]
            if not position:
                position[what] = (0, 0)
            if what in position:
                position[who] = (position[what][0] + dx, position[what][1] + dy)
            else:
                position[what] = (position[who][0] - dx, position[who][1] - dy)
    q = question.rstrip("?").split()
    if q[0] == "Is":
        if q[-1] in maybe.get(q[1], ()):
            return "maybe"
        return "yes" if place.get(q[1]) == q[-1] else "no"
    if q[:2] == ["Where", "was"]:
        path = diary[q[3]]
        return path[len(path) - 2 - path[::-1].index(q[-1])]
    if q[0] == "Where":
        holder = [who for who in hands if q[-1] in hands[who]]
        return place.get(holder[0] if holder else q[-1])
    if q[0] == "How":
        return ("none", "one", "two", "three")[len(hands.get(q[4], ()))]
    if q[-1] == "carrying":
        things = sorted(hands.get(q[2], ()), key=lambda thing: order[q[2]][thing])
        return ",".join(things) or "nothing"
    if q[:2] == ["What", "is"]:
        word = next(word for word in q if word in WAYS)
        dx, dy = WAYS[word]
        if q[2] == word:    # What is north of the B?
            x, y = position[q[-1]]
        else:               # What is the A north of?
            x, y = position[q[3]]
            dx, dy = -dx, -dy
        return next(name for name, at in position.items() if at == (x + dx, y + dy))
    named = [word for word in q if word in NAMES + ["football", "apple", "milk"]]
    for gift in reversed(gifts):
        if all(word in gift for word in named):
            who, what, whom = gift
            if "did" not in q and q[0] == "Who" and len(named) == 2 and named[1] != whom:
                continue
            if q[1] == "did" and named[0] != who:
                continue
            return what if q[0] == "What" else who if q[1] == "gave" else whom
    return None


@pytest.mark.parametrize("task", babi.TASKS)
def test_a_separate_solver_agrees_with_every_answer(task):
    rng = random.Random(0)
    for _ in range(1000):
        sample = babi.make_sample(task, rng, n_questions=rng.choice((1, 4)))
        for question in sample.questions:
            assert solve(sample.facts, question.text) == question.answer, sample
            assert question.support and max(question.support) < len(sample.facts)


@pytest.mark.parametrize("task, mean, longest, shares", [
    ("qa1", 6.0, 10, {}), ("qa2", 15.6, 88, {}), ("qa3", 50.0, 320, {}), ("qa4", 2.0, 2, {}),
    ("qa5", 20.1, 126, {"Mary": .185, "apple": .137}), ("qa6", 6.3, 26, {"yes": .501}),
    ("qa7", 8.7, 52, {"one": .487, "none": .470, "two": .041}), ("qa8", 8.8, 50, {"nothing": .362}),
    ("qa9", 6.0, 10, {"no": .625}), ("qa10", 6.0, 10, {"no": .475, "yes": .377, "maybe": .147})])
def test_stories_have_the_statistics_of_the_released_files(task, mean, longest, shares):
    """Facts per question and answers; where all answers are places, each is as likely."""
    rng = random.Random(0)
    samples = [babi.make_sample(task, rng) for _ in range(2000)]
    lengths = [len(sample.facts) for sample in samples]
    assert min(lengths) >= 2 and max(lengths) < 1.5 * longest
    assert abs(sum(lengths) / 2000 - mean) < 0.08 * mean
    answers = [sample.questions[0].answer for sample in samples]
    for answer, share in (shares or dict.fromkeys(babi.PLACES, 1 / 6)).items():
        assert abs(answers.count(answer) / 2000 - share) < 0.035, (answer, share)
    if task == "qa1":
        assert 0.49 < babi.shortcuts("qa1", samples)["last mentioned"] < 0.58


def test_nobody_moves_to_where_he_is_known_to_be():
    rng = random.Random(0)
    for _ in range(500):
        at = {}
        for fact in babi.tell("qa1", rng):
            assert at.get(fact.person) != fact.thing
            at[fact.person] = fact.thing


@pytest.mark.parametrize("facts_in", [(0.0, 1.0), (0.0, 0.5), (0.5, 1.0), (0.25, 0.75)])
def test_facts_lie_where_they_should_and_the_length_is_exact(facts_in):
    encoding, rng = babi.word_encoding(), random.Random(0)
    noise = babi.make_noise(encoding, 0, 500)
    for _ in range(200):
        sample = babi.make_sample("qa1", rng, max_facts=6)
        tokens, targets = babi.to_tokens(sample, encoding, 256, noise, rng, facts_in)
        assert len(tokens) == len(targets) == 256
        question = sample.questions[0]
        end = encoding.encode_ordinary(f" {question.text} {question.answer}.")
        assert tokens[-len(end):] == end
        assert [t for t in targets if t >= 0] == encoding.encode_ordinary(f" {question.answer}.")
        context = 256 - len(end)
        position = 0
        for fact in sample.facts:  # in order, whole, and inside the allowed part
            fact = encoding.encode_ordinary(f" {fact}")
            position = next(i for i in range(position, context)
                            if tokens[i:i + len(fact)] == fact)
            assert facts_in[0] * context <= position
            assert position + len(fact) <= facts_in[1] * context
            position += len(fact)


def test_facts_that_do_not_fit_are_refused():
    encoding, rng = babi.word_encoding(), random.Random(0)
    noise = babi.make_noise(encoding, 0, 50)
    with pytest.raises(ValueError, match="do not fit"):
        babi.to_tokens(babi.make_sample("qa1", rng), encoding, 16, noise, rng)


def test_noise_names_nothing_from_the_stories():
    encoding = babi.word_encoding()
    book = babi.make_noise(encoding, 0)(random.Random(0))
    noise = " ".join(encoding.decode(next(book)) for _ in range(3000))
    assert not set(re.findall(r"\w+", noise)) & {
        *babi.PEOPLE, *babi.GIVERS, *babi.GUESSED, *babi.PLACES, *babi.TOWN, *babi.OBJECTS}


BOOK = "The wind rose in the night, and nobody on board slept at all. Ha! " \
    "Then came a morning that no sailor forgets as long as he lives. " \
    "Mary went to the kitchen of the ship to fetch some bread and water. " \
    "The bedroom was north of the hallway, as the captain had told us.\n"


@pytest.fixture
def book(tmp_path):
    """A text of 600 sentences: two good ones, a short one, and two that look like facts."""
    path = tmp_path / "book.txt"
    path.write_text(BOOK * 120, encoding="utf-8")
    return str(path)


def test_a_book_is_read_piece_by_piece_and_every_sentence_comes_out_whole(book):
    sentences = list(babi.read_sentences(book))
    assert len(sentences) == 5 * 120 - 1  # the last may be cut short, and is left out
    assert set(sentences) == set(re.findall(r"\S[^.!]*[.!]", BOOK))
    assert sentences == list(babi.read_sentences(book, size=7000))
    assert list(babi.read_sentences(book, start=30))[0] == "Ha!"


def test_the_tokenizer_gives_any_text_back():
    encoding = babi.word_encoding(babi.count_words(["Call me Ishmael. Call me again."]))
    for text in (" Mary went home.", "na\u00efve \u6f22\u5b57 \U0001f600\r\n\t", "", "a  b"):
        assert encoding.decode(encoding.encode_ordinary(text)) == text
    assert len(encoding.encode_ordinary(" Mary went back to the kitchen.")) == 7
    assert len(encoding.encode_ordinary(" Ishmael")) == 1


def test_real_babi_files_are_read_and_broken_lines_named(tmp_path):
    path = tmp_path / "qa1_single-supporting-fact_train.txt"
    path.write_text("1 Mary moved to the bathroom.\n2 John went to the hallway.\n"
                    "3 Where is Mary? \tbathroom\t1\n4 Mary went to the office.\n"
                    "5 Where is Mary? \toffice\t4\n1 John went to the garden.\n"
                    "2 Where is John? \tgarden\t1\n")
    first, second, third = babi.read_babi(babi.find_babi(tmp_path, "qa1"))
    assert second.facts == ("Mary moved to the bathroom.", "John went to the hallway.",
                            "Mary went to the office.")
    assert second.questions[0] == babi.Question("Where is Mary?", "office", (2,))
    assert third.facts == ("John went to the garden.",)
    for broken in ("1 Mary ran.\nnonsense\n", "1 Mary ran.\n2 Where?\toffice\t7\n", "1 Mary.\n"):
        path.write_text(broken)
        with pytest.raises(ValueError, match="line 2|no question"):
            babi.read_babi(path)


@pytest.mark.parametrize("task", babi.TASKS)
def test_real_babi_files_agree_with_the_solver(task):
    folder = os.path.join(HERE, "..", "shared", "data", "babi")
    if not os.path.isdir(folder):
        pytest.skip("the real bAbI files are not here")
    samples = babi.read_babi(babi.find_babi(folder, task))
    right = sum(solve(sample.facts, sample.questions[0].text) == sample.questions[0].answer
                for sample in samples)
    assert right >= (0.997 if task == "qa5" else 1.0) * len(samples)


@pytest.fixture(scope="module")
def words():
    return babi.word_encoding()


@pytest.fixture(scope="module")
def noise(words):
    return babi.make_noise(words, 0, 2000)


# Texts

def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    path = tmp_path / "qa1_x.txt"
    path.write_bytes(b"\xef\xbb\xbf1 Mary went home.\r\n2 Where is Mary?\thome\t1\r\n\r\n")
    sample, = babi.read_babi(path)      # it ends in an empty line, too
    assert sample == babi.Sample(("Mary went home.",),
                                 (babi.Question("Where is Mary?", "home", (0,)),))
    path.write_bytes(b"\xef\xbb\xbf" + BOOK.encode())
    assert babi.read_text(path) == BOOK
    assert next(babi.read_sentences(path)) == BOOK[:BOOK.index(" Ha!")]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be"])
def test_a_text_in_utf_16_is_named(encoding, tmp_path):
    path = tmp_path / "book.txt"
    path.write_bytes(BOOK.encode(encoding))
    for read in (babi.read_text, babi.read_babi, lambda path: next(babi.read_sentences(path))):
        with pytest.raises(BadInput, match="book.txt.*UTF-16"):
            read(path)


def test_a_text_comes_in_pieces_and_whole_from_any_byte_on(tmp_path):
    text, path = "na\u00efve \u6f22\u5b57 \U0001f600\r\n" * 50, tmp_path / "text"
    path.write_bytes(text.encode())
    for start in range(20):
        with open(path, "rb") as file:
            file.seek(start)
            pieces = list(babi.text_pieces(file, path, start > 0, size=7))
        left = text.encode()[start:].decode("utf-8", "ignore").replace("\r\n", "\n")
        assert "".join(pieces) == left and max(map(len, pieces)) <= 7
    path.write_bytes(text.encode()[:3])
    with pytest.raises(BadInput, match="UTF-8"):
        babi.read_text(path)


def test_train_files_are_used_only_where_there_is_no_test_file(tmp_path):
    for name in ("qa1_a_train.txt", "qa10_a_test.txt"):
        (tmp_path / name).write_text("")
    assert babi.find_babi(tmp_path, "qa1").endswith("qa1_a_train.txt")
    (tmp_path / "qa1_b_test.txt").write_text("")
    assert babi.find_babi(tmp_path, "qa1").endswith("qa1_b_test.txt")
    with pytest.raises(BadInput, match="qa2_"):
        babi.find_babi(tmp_path, "qa2")


# Noise and hiding

def test_noise_depends_on_its_seed_and_on_nothing_else(words):
    said = [[next(babi.make_noise(words, seed, 300)(random.Random(0))) for _ in range(2)]
            for seed in (0, 0, "proof 0", "score 0")]
    assert said[0] == said[1] and said[0][0] == said[0][1]
    assert said[0] != said[2] != said[3] != said[0]


def test_two_noise_sentences_in_five_are_of_words_nobody_knows(words):
    book = babi.make_noise(words, 0)(random.Random(0))
    sentences = [words.decode(next(book)) for _ in range(5000)]
    grammar = re.compile(r" The \w+ \w+ \w+ \w+ the \w+( [a-z ]+)?\.")
    unknown = [text for text in sentences if not grammar.fullmatch(text)]
    assert abs(len(unknown) / 5000 - 0.4) < 0.03
    assert all(3 <= len(text.split()) <= 16 for text in unknown)
    pieces = sum(len(words.encode_ordinary(text)) for text in unknown)
    assert pieces > 2 * sum(len(text.split()) for text in unknown)  # bytes are as common as words
    said = "".join(unknown)
    assert all(mark in said for mark in ",;:!?'\"“") and re.search(r" \d+ ", said)


@pytest.mark.parametrize("text, is_like", [
    ("so _Mary_ went", True), ("MARY went", True), ("Mary's hat", True), ("the bill", False),
    ("Marylebone", False), ("kitchens and offices", True), ("a Kitchen, an OFFICE", True),
    ("one _kitchen_, one garden", True), ("the kitchen", False), ("officers in gardens", False)])
def test_a_sentence_that_could_be_a_fact_is_no_noise(text, is_like):
    assert bool(babi.FACTLIKE.search(text)) == is_like


def test_a_book_is_read_from_a_random_place_on(book, words):
    noise, rng = babi.book_noise(words, [book]), random.Random(0)
    first = [tuple(next(noise(rng))) for _ in range(40)]
    assert len(set(first)) == 2     # of its two sentences that can be noise


def test_noise_from_a_book_comes_in_order_without_short_sentences_and_lookalikes(book):
    encoding, rng = babi.word_encoding(babi.count_words([BOOK])), random.Random(0)
    noise = babi.book_noise(encoding, [book])
    said = encoding.decode(sum(babi.cut_noise(300, noise, rng), []))
    assert len(encoding.encode_ordinary(said)) == 300
    assert "Ha!" not in said and "Mary" not in said and "bedroom" not in said
    assert re.search(r"slept at all\. Then came .* lives\. The wind rose", said)
    sample = babi.make_sample("qa1", rng)
    assert len(babi.to_tokens(sample, encoding, 777, noise, rng)[0]) == 777


def story_of(n_facts):
    """A sample of facts of 7 tokens, "Mary went back to the kitchen.", and a question of 6."""
    return babi.Sample(("Mary went back to the kitchen.",) * n_facts,
                       (babi.Question("Where is Mary?", "kitchen", (0,)),))


def test_facts_that_fit_exactly_fit(words, noise):
    """Whatever the rounding: 7 / 86 * 86 is a little less than 7."""
    rng, below = random.Random(0), 0
    for n_facts in range(1, 4):
        for length in range(7 * n_facts, 200, 2):
            part = 7 * n_facts / length
            below += part * length < 7 * n_facts
            pieces = babi.hide_facts(story_of(n_facts), words, length + 6, noise, rng, (0, part))
            assert [i for i, _ in pieces[:n_facts]] == list(range(n_facts))
            assert sum(len(tokens) for _, tokens in pieces) == length
            with pytest.raises(babi.TooLong):
                babi.hide_facts(story_of(n_facts), words, length + 6, noise, rng, (0, part - .01))
    assert below


def test_facts_lie_anywhere_in_their_part_and_each_gap_is_as_likely(words, noise):
    """Where a fact's sentence comes, as a share of the context: uniform to within noise."""
    rng, at = random.Random(0), []
    for _ in range(600):
        pieces = babi.hide_facts(story_of(1), words, 1006, noise, rng)
        at.append(next(k for k, (i, _) in enumerate(pieces) if i == 0) / (len(pieces) - 1))
    assert abs(sum(at) / 600 - 0.5) < 0.05 and min(at) == 0 and max(at) == 1
    assert abs(sum(share > 0.75 for share in at) / 600 - 0.25) < 0.06


def test_noise_can_stand_behind_the_questions_and_is_never_scored(words, noise):
    rng = random.Random(0)
    for behind in (0, 1, 29):
        sample = babi.make_sample("qa1", rng, n_questions=3, max_facts=6)
        questions, answers = babi.encode_questions(sample, words)
        tokens, targets = babi.to_tokens(sample, words, 200, noise, rng, behind=behind)
        assert len(tokens) == len(targets) == 200
        end = 200 - behind
        assert tokens[end - len(questions):end] == questions
        assert targets[end - len(questions) - 1:end - 1] == answers
        assert set(targets[end - 1:] + targets[:end - len(questions) - 1]) == {-1}
        story, _ = babi.to_tokens(sample, words)     # and a bare story begins at once
        tokens, _ = babi.to_tokens(sample, words, len(story) + 30, noise, rng, behind=30)
        assert tokens[:len(story)] == story and len(tokens) == len(story) + 30


# Questions on the way

def test_questions_on_the_way_are_answered_from_the_story_alone():
    rng, seen = random.Random(0), 0
    for _ in range(300):
        facts = babi.tell("qa3", rng)
        for question in babi.askable("getter", facts, rng, window=None):
            thing = question.text.split()[-1].rstrip("?")
            getters = [f.person for f in facts if f.action == "get" and f.thing == thing]
            assert question.answer == getters[-1]
        for question in babi.askable("before", facts, rng, window=None):
            _, _, person, _, _, place = question.text.rstrip("?").split()
            path = [f.thing for f in facts if f.action == "move" and f.person == person]
            last = len(path) - 1 - path[::-1].index(place)
            assert question.answer == path[last - 1] and last > 0
            came, before = question.support
            assert (facts[came].thing, facts[before].thing) == (place, question.answer)
            seen += 1
    assert seen > 300
    assert babi.shape("Where was Mary before the office?", "before") == "Where was P before the L?"


def test_steps_can_be_asked_along_and_change_no_other_story(monkeypatch):
    def samples():
        rng = random.Random(0)
        return [babi.make_sample("qa3", rng, 8, window=None) for _ in range(20)]

    before = samples()
    changed = babi.TASKS["qa3"].__class__(**vars(babi.TASKS["qa3"])
                                          | {"along": ("qa1", "qa2", "getter", "before")})
    monkeypatch.setitem(babi.TASKS, "qa3", changed)
    monkeypatch.setitem(babi.QUESTIONS, "qa3", changed)
    asked = {babi.shape(q.text, "qa3") for s in samples() for q in s.questions}
    assert {"Who got the O?", "Where was P before the L?", "Where is P?"} <= asked
    assert before[0].facts == samples()[0].facts


# The curriculum

def curriculum(words, noise, tasks=("qa1",), **changes):
    return babi.Curriculum(tasks, words, noise, **dict(
        seed=0, steps=100, block_size=64, segments=16, batch_size=8, batch_tokens=4096,
        questions=4, threshold=0.9) | changes)


def test_a_batch_is_a_function_of_seed_step_and_stages(words, noise):
    a, b = (curriculum(words, noise, ("qa1", "qa6")) for _ in range(2))
    for step in (5, 3, 5):
        first, second = a.batch(step), b.batch(step)
        assert all(map(torch.equal, first, second)) and first[0].dtype == torch.int64
    assert not torch.equal(a.batch(4)[0], a.batch(6)[0])
    assert not torch.equal(curriculum(words, noise, ("qa1", "qa6"), seed=1).batch(3)[0],
                           a.batch(3)[0])
    a.stage["qa1"], b.running["qa1"] = 8, 1.0
    assert any(not torch.equal(a.batch(s)[0], b.batch(s)[0]) for s in range(5))


def test_contexts_are_whole_segments_of_few_lengths(words, noise):
    made = curriculum(words, noise, ("qa1", "qa6"), segments=64, batch_tokens=8192)
    lengths, ends, rows = set(), [], []
    for stage in (1, 4, 30):
        made.stage = dict.fromkeys(made.tasks, stage)
        for step in range(25):
            tokens, targets, task_of = made.batch(step)
            assert tokens.shape == targets.shape and len(task_of) == len(tokens)
            assert len(tokens) == min(8, 8192 // tokens.size(1))
            lengths.add(tokens.size(1) / 64)
            ends += [int(row.nonzero()[-1]) % 64 for row in targets >= 0]
            rows += task_of.tolist()
            for i, j in (targets >= 0).nonzero()[:, :].tolist():
                assert targets[i, j] == tokens[i, j + 1]
    assert lengths <= {*range(1, 9), 16, 24} and {1, 2, 3, 4, 8} <= lengths
    assert len(set(ends)) > 50          # questions end anywhere in the last segment
    assert set(rows) == {0, 1}


def test_seven_rows_in_ten_end_in_noise_behind_the_questions(words, noise):
    made, at_end = curriculum(words, noise, segments=8), []
    made.stage["qa1"] = 4
    for step in range(60):
        at_end += (made.batch(step)[1][:, -2] >= 0).tolist()
    assert abs(sum(at_end) / len(at_end) - 0.31) < 0.08


def test_two_steps_in_five_of_a_mixture_are_bare_stories(words, noise, monkeypatch):
    for tasks, share in ((("qa1", "qa6"), 0.4), (("qa1",), 0.0)):
        made, kinds = curriculum(words, noise, tasks, batch_size=1), []
        rows = [("qa1", ([0], [-1]))]
        monkeypatch.setattr(made, "bare_rows", lambda rng: kinds.append("bare") or rows)
        monkeypatch.setattr(made, "noisy_rows", lambda rng: kinds.append("noisy") or rows)
        for step in range(500):
            made.batch(step)
        assert abs(kinds.count("bare") / 500 - share) < 0.06


def test_bare_rows_are_whole_stories_of_like_lengths_with_noise_behind(words, noise):
    made = curriculum(words, noise, ("qa1", "qa6", "qa8"))
    for seed in range(10):
        rows = made.bare_rows(random.Random(seed))
        assert len({len(tokens) for _, (tokens, _) in rows}) == 1 and len(rows) == 8
        assert all(re.match(r" [A-Z]\w+ \w", words.decode(tokens[:2])) for _, (tokens, _) in rows)
        used = [max(i for i, t in enumerate(targets) if t >= 0) + 2 for _, (_, targets) in rows]
        assert used == sorted(used) and 0 <= len(rows[0][1][0]) - used[-1] < 64


def test_half_the_contexts_have_their_facts_in_the_first_part_alone(words, noise, monkeypatch):
    made, parts = curriculum(words, noise), []
    monkeypatch.setattr(babi, "to_tokens", lambda *args, real=babi.to_tokens, **kwargs: (
        parts.append(args[5]) if len(args) > 5 else None, real(*args, **kwargs))[1])
    made.stage["qa1"] = 4
    for step in range(60):
        made.batch(step)
    early = [high for low, high in parts if high < 1]
    assert abs(len(early) / len(parts) - 0.5) < 0.08 and 0.4 <= min(early) < 0.5


def test_a_task_that_is_answered_moves_on_to_longer_contexts_and_another_does_not(words, noise):
    made, stages = curriculum(words, noise, ("qa1", "qa6"), segments=12, steps=800), []
    for step in range(800):
        made.note(step, {"qa1": 8, "qa6": 6}, {"qa1": 8, "qa6": 8}, {"qa1": 2, "qa6": 2})
        stages.append(made.stage["qa1"])
    assert list(dict.fromkeys(stages)) == [1, 2, 3, 4, 6, 9, 12]
    assert made.stage["qa6"] == 1       # it is half of the way from chance, which is 0.5
    assert abs(made.running["qa6"] - 0.75) < 0.01
    made.note(800, {}, {}, {})          # a step without answers changes nothing
    assert made.stage["qa1"] == 12


def test_the_task_with_more_wrong_answers_gets_more_rows(words, noise):
    made = curriculum(words, noise, ("qa1", "qa6"))
    made.running = {"qa1": 0.9, "qa6": 0.1}
    rows = torch.cat([made.batch(step)[2] for step in range(40)])
    assert abs((rows == 0).float().mean() - 0.15 / 1.1) < 0.08


def test_stories_that_never_fit_are_refused_before_training(words, noise):
    with pytest.raises(BadInput, match="block_size=32.*qa4"):
        curriculum(words, noise, ("qa4",), block_size=32)
    curriculum(words, noise, ("qa4",), block_size=32, questions=1)
    curriculum(words, noise, tuple(babi.TASKS))


# Scores

class FixedAnswers:
    """A model that gives the answers in `right`, of rows by their number of calls, and else none.

    Its logits are those of the next token itself.
    """
    n_banks, device = 1, "cpu"

    def __init__(self, vocab, right):
        self.vocab, self.right = vocab, iter(right)

    def __call__(self, tokens, last):
        said = tokens.roll(-1, dims=1)[:, -last:]
        said = torch.stack([row if next(self.right) else row * 0 for row in said])
        return F.one_hot(said, self.vocab).float(), None, None


def test_scores_have_their_standard_error_and_shortcuts_at_each_length(words, noise, capsys):
    samples = {"qa1": [babi.make_sample("qa1", random.Random(i), max_facts=6) for i in range(25)]}
    model = FixedAnswers(words.n_vocab, [True] * 20 + [False] * 5 + [True] * 25)
    cells = babi.score_table(model, words, samples, {256: 25, 512: 25}, noise)
    assert [cell["accuracy"] for cell in cells] == [0.8, 1.0]
    assert cells[0]["standard_error"] == pytest.approx(0.08) and cells[1]["standard_error"] == 0
    out = capsys.readouterr().out
    assert "0.800 ±0.080" in out
    pattern = r"last mentioned\nqa1 " + r" +0\.\d{3} /0\.\d{3}" * 2
    assert re.search(pattern, out), out


@pytest.mark.parametrize("task, facts, question, guess", [
    ("qa1", "Mary went to the office. John went to the garden.", "Where is Mary?", "garden"),
    ("qa3", "Mary went to the office. Mary went to the garden.",
     "Where was the milk before the garden?", "office"),
    ("qa4", "The office is north of the garden. The garden is north of the kitchen.",
     "What is north of the garden?", "kitchen"),
    ("qa5", "Fred gave the milk to Bill. Mary took the apple there.",
     "What did Fred give to Bill?", "apple"),
    ("qa5", "Fred gave the milk to Bill. Jeff took the apple there.",
     "Who gave the milk?", "Jeff"),
    ("qa6", "Mary went to the office.", "Is John in the office?", "yes"),
    ("qa7", "Mary took the apple there.", "How many objects is Mary carrying?", "one"),
    ("qa8", "Mary took the apple there. John went to the office.", "What is John carrying?",
     "apple")])
def test_the_last_that_was_mentioned_is_guessed(task, facts, question, guess):
    for answer, right in ((guess, 1.0), ("nothing", 0.0)):
        sample = babi.Sample((facts,), (babi.Question(question, answer, (0,)),))
        assert babi.shortcuts(task, [sample])["last mentioned"] == right


def test_retrieval_finds_the_sentences_that_name_what_is_asked(words, noise):
    facts = ["Mary went to the kitchen.", "The old fox slept.", "John took the milk there.",
             "Mary moved to the garden.", "A ship sank near the bridge, and all were lost."]
    sample = babi.Sample(tuple(facts), (babi.Question("Where is Mary?", "garden", (3,)),))
    assert babi.retrieve(facts, sample, 1).facts == (facts[3],)
    assert babi.retrieve(facts, sample, 2).facts == (facts[0], facts[3])
    assert babi.retrieve(facts, sample, 9).facts == tuple(facts)
    # by hand: one of three texts of two words holds the word, once
    rare = math.log(1 + 2.5 / 1.5)
    assert babi.bm25(["a b", "c d", "e f"], "a") == pytest.approx([rare * 2.5 / 2.5, 0, 0])
    assert babi.bm25(["...", "!"], "Where?") == [0, 0]      # no word in any


def test_retrieval_takes_whole_sentences_and_never_an_empty_one(words, noise, monkeypatch):
    taken = []
    monkeypatch.setattr(babi, "retrieve", lambda sentences, sample, n, real=babi.retrieve: (
        taken.extend(sentences), real(sentences, sample, n))[1])
    samples = [babi.make_sample("qa1", random.Random(i)) for i in range(20)]
    model = FixedAnswers(words.n_vocab, iter([True] * 20))
    assert len(babi.score(model, words, samples, 512, noise, random.Random(0), n_best=5)) == 20
    facts = [fact for sample in samples for fact in sample.facts]
    assert all(taken) and all(fact in taken for fact in facts)
    quotes = words.encode_ordinary(" \u201c")     # a space and three bytes: a cut leaves the space
    for length in range(100, 104):
        babi.score(FixedAnswers(words.n_vocab, [True]), words, [story_of(1)], length,
                   lambda rng: itertools.repeat(quotes), random.Random(0), n_best=5)
    assert all(taken)


# The script, and what all share

def test_samples_are_marked_by_position_without_empty_lines(monkeypatch, capsys):
    for task, length in (("qa1", 128), ("qa2", 512), ("qa1", 0)):
        babi.print_samples(babi.Flags(task=task, length=length, samples=(60,)))
        for block in capsys.readouterr().out.split("---")[1:]:
            lines = block.split("\n")
            n_facts = int(re.search(r"(\d+) facts", lines[0])[1])
            assert f"{length} tokens" in lines[0] or not length
            told = [line for line in lines if re.match(">> | > ", line)]
            told = [line for line in told if "supporting fact" not in line]
            assert len(told) == n_facts
            support = [line for line in told if line.startswith(">> ")]
            assert len(support) == (1 if task == "qa1" else 2)
            question = next(i for i, line in enumerate(lines) if "  ->  " in line)
            assert all(line.strip() for line in lines[:question])


def test_control_characters_reach_no_terminal(tmp_path, capsys, words):
    assert babi.printable("a\x1b]0;x\x07\r\nb \u00e9\u6f22") == r"a\x1b]0;x\x07\r\nb é漢"
    (tmp_path / "qa1_x.txt").write_text("1 Mary \x1b[2J went home.\n2 Where is Mary?\tho\x07me\t1\n")
    babi.print_samples(babi.Flags(babi_dir=str(tmp_path), samples=(1,)))
    out = capsys.readouterr().out
    assert out.count(r"\x1b[2J") == 1 and not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", out)


@pytest.mark.parametrize("error, status, said", [
    (BadInput("no \x1b[2J " + "x" * 9000), 2, r"error: no \\x1b\[2J x+ \.\.\. x+\n"),
    (FileNotFoundError(2, "No such file", "/no\x07"), 2, r"error: /no\\x07: No such file\n"),
    (babi.TooLong("two\nlines"), 2, r"error: two\\nlines\n"),
    (KeyboardInterrupt(), 130, ""), (BrokenPipeError(), 141, ""),
    (ValueError("a bug"), None, r"[\s\S]*ValueError: a bug\n"),
    (OSError("no source"), None, r"[\s\S]*OSError: no source\n")])
def test_bad_input_ends_in_one_line_and_a_bug_in_its_traceback(error, status, said, monkeypatch,
                                                               capsys):
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(os, "_exit", sys.exit)
    babi.install_error_hook()
    left = None
    try:
        sys.excepthook(type(error), error, None)
    except SystemExit as stop:
        left = stop.code
    printed = capsys.readouterr().err
    assert left == status and re.fullmatch(said, printed) and len(printed) < 1000, printed


def test_streams_may_be_missing_or_strange(monkeypatch):
    class Stream:           # a notebook's can do little
        def write(self, text):
            self.text = text
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr(sys, "stderr", Stream())
    babi.install_error_hook()
    print("nowhere")
    assert sys.stdin.read() == ""
    sys.stdout.close()
    sys.stdin.close()


def test_a_file_is_replaced_whole_and_its_neighbours_are_left_alone(tmp_path, monkeypatch):
    path, other, refused = tmp_path / "a.csv", tmp_path / "a.csv.new", []
    path.write_text("old")
    other.write_text("mine")
    with pytest.raises(ZeroDivisionError):
        with babi.replaced(path, "w") as file:
            file.write("half")
            1 / 0
    assert path.read_text() == "old"

    def replace(source, target, real=os.replace):       # a virus scanner reads it twice
        refused.append(target)
        if len(refused) < 3:
            raise PermissionError(13, "Permission denied", str(source))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(babi.time, "sleep", lambda seconds: None)
    babi.write_csv(path, [{"a": 1, "b": 2}], ["a"])
    assert babi.read_csv(path, ["a"]) == [{"a": "1"}] and len(refused) == 3
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(PermissionError(13, "no")))
    with pytest.raises(PermissionError, match="another program") as found:
        babi.write_csv(path, [], ["a"])
    assert found.value.filename == path and other.read_text() == "mine"
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
    assert "cuda is there" in (out := capsys.readouterr().out) and "no kernel image" in out
    with pytest.raises(BadInput, match="--device=cuda:0.*no kernel image is available$"):
        babi.find_device("cuda:0")
    for name in ("tpu", "meta", "cuda:-1", "", "\x1b", "cpu:x"):
        with pytest.raises(BadInput, match="--device="):
            babi.find_device(name)


def test_flags_survive_the_way_through_the_command_line():
    @dataclasses.dataclass
    class Switch:
        on: bool = babi.flag(True, "a switch")
    assert babi.parse_flags(Switch, "", babi.as_flags(Switch(False))) == Switch(False)
    flags = babi.Flags(task="qa2", samples=(5, 3), facts_in=(0.0, 0.5), stats=True, length=0)
    assert babi.parse_flags(babi.Flags, "", babi.as_flags(flags)) == flags
    assert babi.as_flags(babi.Flags()) == []
    for wrong in ("--leng=3", "--length=-1", "--facts_in=0.5,0.1", "--lengths=1q", "--task=qa99"):
        with pytest.raises(BadInput, match="--"):
            babi.parse_flags(babi.Flags, "", [wrong])


def test_the_checkpoint_is_the_one_named_or_the_last_or_the_one_that_ships(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(babi, "SHIPPED", str(tmp_path / "ten-tasks.pt"))
    with pytest.raises(BadInput, match="no checkpoint .*train one first"):
        babi.find_checkpoint()
    (tmp_path / "ten-tasks.pt").write_text("")
    assert babi.find_checkpoint() == babi.SHIPPED
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ckpt.pt").write_text("")
    assert babi.find_checkpoint() == os.path.join("out", "ckpt.pt")
    with pytest.raises(BadInput, match="nowhere.pt"):
        babi.find_checkpoint("nowhere.pt")


def test_the_proof_is_in_noise_of_its_own_and_facts_lie_in_the_first_half(words, monkeypatch):
    """What the model of the proof sees; that train.py gives it another seed is tested there."""
    seen = []
    monkeypatch.setattr(babi, "answered_by_bank", lambda model, tokens, targets: (
        seen.append(tokens), {bank: targets[:, 0] < 0 for bank in ("memory", "wiped", "swapped")}
    )[1])
    babi.proof_table(None, words, ["qa1"], {512: 30}, babi.make_noise(words, "proof 0", 500), 0)
    for row in torch.cat(seen).tolist():
        second = words.decode(row[264:-6])
        assert not re.search(r"\b(Mary|John|Daniel|Sandra) \w", second), second


# --------------------------------------------------------------------------------------------
# The scripts

def call(script, *flags, input="", into=None):
    """Run a script here, which saves the start of a process: (exit status, what it printed, and
    on standard error). Its globals go `into` a dictionary. Warnings are errors; so is what its
    hook does not know as bad input."""
    streams = {name: io.TextIOWrapper(io.BytesIO(text.encode()), "utf-8")
               for name, text in (("stdin", input), ("stdout", ""), ("stderr", ""))}
    handler, status = signal.getsignal(signal.SIGINT), 0
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("error")
        patch.setattr(sys, "argv", [script, *flags])
        patch.setattr(sys, "excepthook", sys.excepthook)
        for name, stream in streams.items():
            patch.setattr(sys, name, stream)
        try:
            try:
                names = runpy.run_path(os.path.join(HERE, script), run_name="__main__")
                (into if into is not None else {}).update(names)
            except Exception:
                sys.excepthook(*sys.exc_info())
                raise
        except SystemExit as stop:
            status = stop.code or 0
        finally:
            signal.signal(signal.SIGINT, handler)
    return status, *(streams[name].detach().getvalue().decode() for name in ("stdout", "stderr"))


def run(script, *flags, input="", into=None):
    """What a script prints that has nothing to complain about."""
    status, out, errors = call(script, *flags, input=input, into=into)
    assert status == 0 and not errors, errors + out
    return out


def refused(script, *flags):
    """The one line of complaint of a script that must not run."""
    status, _, errors = call(script, *flags)
    assert status == 2 and errors.count("\n") == 1 and errors.startswith("error: "), errors
    return errors


def read_log(folder):
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="session", autouse=True)
def long_run(request, tmp_path_factory):
    """The one long training run, begun first: it has the second core while the others run."""
    if not any("learned" in test.fixturenames for test in request.session.items):
        yield
        return
    out = tmp_path_factory.mktemp("learned")
    warn = ["-W", "error", "-W", "ignore::ResourceWarning"]  # some PyTorch leaves a folder open
    with subprocess.Popen([sys.executable, *warn, "train.py", "--context=128", "--steps=700",
                           f"--out={out}", "--proof=1", "--log_every=100", "--device=cpu"],
                          cwd=HERE, text=True,
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


TINY = ["--n_embd=16", "--n_head=2", "--n_kv_head=1", "--context=128", "--batch_size=4",
        "--log_every=5", "--device=cpu", "--proof=0"]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a run of ten steps."""
    out = tmp_path_factory.mktemp("tiny")
    run("train.py", *TINY, "--steps=10", f"--out={out}")
    return out


# Training: what the loop does, seen from the optimizers and from train.py's own names

def trained(folder, *flags):
    """Train for a few steps: train.py's globals, and of each step of an optimizer its name, its
    rates and the norm of its gradient."""
    names, steps = {}, []

    def note(optimizer, *_):
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norm = torch.stack([grad.norm() for grad in grads if grad is not None]).norm().item()
        steps.append((type(optimizer), [g["lr"] for g in optimizer.param_groups], norm))

    hook = register_optimizer_step_pre_hook(note)
    try:
        run("train.py", *TINY, *flags, f"--out={folder}", into=names)
    finally:
        hook.remove()
    return names, steps


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
    for _ in range(3):      # segments
        before = (memory or model.fresh_memory(2)).banks
        memory = model(tokens[:, :64], memory=memory)[2]
        expected += (memory.banks - before).abs().mean().item() * model.n_banks / 3
        tokens = tokens[:, 64:]
    change = names["scorer"](random_tokens(T=192), torch.tensor([0]))[1]
    assert change.item() == pytest.approx(expected, rel=1e-4)


def test_rows_of_a_mixture_weigh_by_the_root_of_what_they_ask(tmp_path):
    for tasks, power in (("qa1,qa8", 0.5), ("qa1", 1.0)):
        names, _ = trained(tmp_path / tasks, f"--task={tasks}", "--steps=1", "--batch_size=8")
        batch = names["prepare"](1)[0]
        rows = (batch["at"] // batch["tokens"].size(1)).tolist()
        counts = [rows.count(row) for row in rows]
        assert len(set(counts)) > 1 or power == 1
        total = sum(rows.count(row) ** power for row in set(rows))
        expected = [n ** (power - 1) / total for n in counts]
        assert batch["weights"].tolist() == pytest.approx(expected)


@pytest.fixture
def text(tmp_path):
    """One whose last tenth, and nothing before it, speaks of a dog."""
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on the mat. " * 450 + "the dog sat on a mat. " * 50)
    return str(path)


def test_training_windows_never_reach_the_held_out_text_and_bits_are_no_nats(text, tmp_path,
                                                                          monkeypatch):
    monkeypatch.setattr(LM2, "head", lambda self, x, head=LM2.head: 0 * head(self, x))
    names, _ = trained(tmp_path, f"--data={text}", "--steps=1", "--window=16")
    decode, seen = names["encoding"].decode, ""
    for step in range(60):
        tokens, targets, _ = names["text_batch"](step)
        assert torch.equal(tokens[:, 1:], targets[:, :-1])
        seen += decode(tokens.flatten().tolist()) + decode(targets[:, -1].tolist())
    assert "cat" in seen and "dog" not in seen and "dog" in decode(names["held_out"].tolist())
    nats, bits = names["text_loss"]()   # of a model to which all tokens are alike
    ids = names["held_out"].tolist()
    assert nats == pytest.approx(math.log(names["config"].vocab_size))
    assert bits == pytest.approx(nats / math.log(2) * len(ids) / len(decode(ids)), rel=0.05)


def test_the_proof_is_in_noise_that_was_not_trained_on(tmp_path, monkeypatch):
    made, used = [], []
    monkeypatch.setattr(babi, "load_noise", lambda *args, load=babi.load_noise: (
        made.append(load(*args)), made[-1])[1])
    monkeypatch.setattr(babi, "proof_table", lambda model, encoding, tasks, lengths, noise, seed: (
        used.append(noise), [])[1])
    trained(tmp_path, "--steps=1", "--proof=1")
    assert len(made) == 2 and used == [made[1]]
    first, second = (next(noise(random.Random(0))) for noise in made)
    assert first != second


def test_any_text_can_be_learned(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 400)
    out = run("train.py", *TINY, f"--data={tmp_path}/text.txt", "--steps=80", "--window=128",
              f"--out={tmp_path}/o", "--log_every=30")
    assert float(re.search(r"bits_per_byte: ([\d.]+)", out)[1]) < 1
    said = run("sample.py", f"--ckpt={tmp_path}/o/ckpt.pt", "--prompt=the cat", "--temperature=0",
               "--max_new_tokens=12")
    assert said.startswith("the cat ") and "sat on the mat." in said


def test_several_tasks_are_learned_and_scored_together(tmp_path, book):
    out = run("train.py", *TINY, "--task=qa1,qa8", f"--noise={book}", "--steps=10", "--proof=1",
              f"--out={tmp_path}/o")
    assert "qa1 1:0." in out and "memory_qa8: " in out
    assert {"qa1", "qa8_stage"} <= set(read_log(tmp_path / "o")[0])
    out = run("babilong_tiny.py", f"--ckpt={tmp_path}/o/ckpt.pt", "--lengths=0,1k,2k",
              "--samples=5,3,3", f"--noise={book}")
    assert re.search(r"qa8 +0\.\d{3} ±0\.\d{3} ", out) and "last mentioned" in out
    with open(tmp_path / "o" / "babilong.csv") as file:
        cells = list(csv.DictReader(file))
    assert [(c["task"], c["tokens"], c["samples"]) for c in cells] == [
        (task, length, samples) for task in ("qa1", "qa8")
        for length, samples in (("0", "5"), ("1024", "3"), ("2048", "3"))]


# Runs that end early, and many processes

def test_resuming_is_exact(tiny, tmp_path, monkeypatch):
    hidden_states, calls = LM2.hidden_states, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            signal.raise_signal(signal.SIGINT)
        return hidden_states(self, *args, **kwargs)

    monkeypatch.setattr(LM2, "hidden_states", interrupted)
    assert "stopped after step 5" in run("train.py", *TINY, "--steps=10", f"--out={tmp_path}")
    run("train.py", "--resume", f"--out={tmp_path}")
    whole, resumed = (load_checkpoint(folder / "ckpt.pt") for folder in (tiny, tmp_path))
    assert whole["train"]["step"] == resumed["train"]["step"] == 10
    for name, weight in whole["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name
    assert [row["step"] for row in read_log(tmp_path)] == ["5", "10"]


KILLER = """
import lm2, os, random, runpy, signal, sys, time, babilong_tiny, torch._dynamo  # loaded once
rng, kills, sys.argv = random.Random(0), 0, sys.argv[1:]
saved = lambda: os.path.exists(path) and os.stat(path).st_mtime_ns
path = sys.argv[-1] + "/ckpt.pt"
while True:
    before, child = saved(), os.fork()
    if not child:
        if before:
            sys.argv[1:-1] = ["--resume"]
        sys.argv[-1] = "--out=" + sys.argv[-1]
        runpy.run_path("train.py", run_name="__main__")
        os._exit(0)
    done, moment = 0, None  # some time after the next checkpoint
    while not done and (kills == 20 or moment is None or time.time() < moment):
        if moment is None and saved() != before:
            moment = time.time() + rng.uniform(0, 0.1)
        time.sleep(0.001)
        done, status = os.waitpid(child, os.WNOHANG)
    if done:
        sys.exit(f"after {kills} kills, status {status}")
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    kills += 1
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="Windows has no fork")
def test_killed_twenty_times_a_run_ends_with_the_very_same_weights(tmp_path):
    flags = [*TINY, "--task=qa1,qa7", "--steps=240", "--save_every=3"]
    run("train.py", *flags, f"--out={tmp_path}/whole")
    done = subprocess.run([sys.executable, "-c", KILLER, "train.py", *flags, f"{tmp_path}/killed"],
                          cwd=HERE, text=True, capture_output=True)
    assert done.stderr == "after 20 kills, status 0\n", done.stderr
    whole, killed = (load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "killed"))
    assert whole["train"]["step"] == killed["train"]["step"] == 240
    assert all(torch.equal(weight, killed["model"][name]) for name, weight in
               whole["model"].items())
    logs = [[(row["step"], row["loss"]) for row in read_log(tmp_path / name)][-5:]
            for name in ("whole", "killed")]
    assert logs[0] == logs[1]


def test_a_full_disk_leaves_the_older_checkpoint_whole(tiny, tmp_path):
    """No file may grow beyond 100 kB, which is more than the log and less than a checkpoint."""
    resource = pytest.importorskip("resource")
    shutil.copytree(tiny, tmp_path / "o")
    before = (tmp_path / "o" / "ckpt.pt").read_bytes()
    done = subprocess.run(
        [sys.executable, "train.py", "--resume", "--steps=20", f"--out={tmp_path}/o"], cwd=HERE,
        text=True, capture_output=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "ckpt.pt" in done.stderr
    assert (tmp_path / "o" / "ckpt.pt").read_bytes() == before
    assert sorted(os.listdir(tmp_path / "o")) == sorted(os.listdir(tiny))


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_run_that_diverges_says_so_and_saves_nothing_of_it(broken, tmp_path, monkeypatch):
    head, clip = LM2.head, torch.nn.utils.clip_grad_norm_
    if broken == "loss":
        monkeypatch.setattr(LM2, "head", lambda self, x: head(self, x) * math.nan)
    else:
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *args: clip(*args) * math.nan)
    status, _, errors = call("train.py", *TINY, "--steps=1", f"--out={tmp_path}")
    assert status == 3 and errors.count("\n") == 2 and f"the {broken}" in errors
    assert os.listdir(tmp_path) == ["log.csv"]


def test_two_processes_learn_what_one_does_with_the_whole_batch(tmp_path):
    flags = [*TINY, "--task=qa1,qa7", "--steps=20", "--threshold=0.01"]
    run("train.py", *flags, f"--out={tmp_path}/one")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node=2", "train.py", *flags, f"--out={tmp_path}/two"],
                          cwd=HERE, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr
    one, two = (read_log(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        assert a["qa1_stage"] == b["qa1_stage"]
        assert abs(float(a["loss"]) - float(b["loss"])) < 2e-3
    assert LM2.load(tmp_path / "two" / "ckpt.pt")


def test_an_earlier_run_is_never_overwritten(tmp_path):
    (tmp_path / "ckpt.pt").write_text("precious")
    assert "--resume" in refused("train.py", *TINY, "--steps=1", f"--out={tmp_path}")
    assert (tmp_path / "ckpt.pt").read_text() == "precious" and len(os.listdir(tmp_path)) == 1


def test_a_reader_that_goes_away_sees_no_traceback():
    printing = subprocess.Popen([sys.executable, "babilong_tiny.py", "--samples=2000"], cwd=HERE,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert printing.stdout.readline().startswith("---")
    printing.stdout.close()
    assert printing.stderr.read() == "" and printing.wait() == 141


def test_statistics_are_printed_for_every_task():
    out = run("babilong_tiny.py", "--stats")
    assert out.count("released") == out.count("generated") == 10


# Hostile input

BAD = """
train --stepz=3 -> --stepz
train --n_lay=3 -> --n_lay
train --steps=many -> --steps
train --steps=-1 -> --steps
train --lr=nan -> --lr
train --lr=1e308 -> --lr
train --seed=99999999999999999999999 -> --seed
train --block_size=16 -> --block_size
train --n_embd=100000000 -> n_embd
train --n_head=3 --n_kv_head=1 -> n_embd
train --n_kv_head=3 -> n_kv_head
train --memory_slots=0 -> memory_slots
train --n_embd=-64 -> n_embd
train --device=tpu -> --device
train --data=nowhere.txt -> nowhere.txt
train --data={tmp}/short.txt -> short.txt
train --data={tmp}/noise.bin -> UTF-8
train --data={tmp} -> irectory
train --data={tmp}/facts.txt --task=qa2 -> --data
train --tokenizer=nope -> nope
train --tokenizer={tmp}/noise.bin -> noise.bin
train --task=qa1,qa99 -> qa99
train --noise={tmp}/short.txt -> 0 sentences
train --noise={tmp}/noise.bin -> UTF-8
train --noise={tmp}/nowhere.txt -> nowhere.txt
train --memory=lstm -> --memory
train --out={tmp}/short.txt -> short.txt
train --out={tmp}/log -> log.csv
train --resume --out={tmp} -> no checkpoint
train --resume --out={tmp}/cut -> cut short
train --resume --out={tiny} --n_layer=3 -> --n_layer
babilong_tiny --task=qa99 -> qa99
babilong_tiny --noise={tmp}/noise.bin -> UTF-8
babilong_tiny --noise={tmp}/facts.txt -> 0 sentences
babilong_tiny --babi_dir={tmp}/babi -> line 2
babilong_tiny --babi_dir={tmp}/nowhere -> nowhere
babilong_tiny --length=12 -> --length
babilong_tiny --facts_in=0.5,0.1 -> --facts_in
babilong_tiny --ckpt={tiny}/ckpt.pt --lengths=12 -> 12 tokens
babilong_tiny --ckpt={tiny}/ckpt.pt --lengths=1q -> 1q
babilong_tiny --ckpt={tiny}/ckpt.pt --tasks=qa0 -> qa0
babilong_tiny --ckpt={tmp}/noise.bin -> noise.bin
babilong_tiny --ckpt={tmp}/cut/ckpt.pt -> cut short
babilong_tiny --ckpt={tiny}/ckpt.pt --samples=0 -> --samples
babilong_tiny --ckpt={tiny}/ckpt.pt --retrieve=-1 -> --retrieve
babilong_tiny --ckpt={tiny}/ckpt.pt --csv={tmp}/short.txt -> already
"""


@pytest.mark.parametrize("case", BAD.strip().splitlines())
def test_bad_input_gets_one_clear_line(case, tiny, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "facts.txt").write_text("Mary went with all the others to the old office. " * 200)
    (tmp_path / "noise.bin").write_bytes(bytes(range(256)) * 9)
    for folder in ("log", "babi", "cut"):
        (tmp_path / folder).mkdir()
    (tmp_path / "log" / "log.csv").write_text("a log,of my own\n1,2\n")
    (tmp_path / "babi" / "qa1_x.txt").write_text("1 Mary went to the office.\n2 Where is Mary? x\t")
    (tmp_path / "cut" / "ckpt.pt").write_bytes((tiny / "ckpt.pt").read_bytes()[:5000])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    command, names = case.format(tmp=tmp_path, tiny=tiny).split(" -> ")
    script, *flags = command.split()
    if script == "train" and "--out" not in command:
        flags.append(f"--out={tmp_path}/out")
    assert names in refused(f"{script}.py", *flags)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name, value", [("WORLD_SIZE", ""), ("WORLD_SIZE", "x"), ("RANK", "x")])
def test_a_strange_number_of_processes_gets_one_line(name, value, tmp_path, monkeypatch):
    monkeypatch.setenv(name, value)
    assert name in refused("train.py", f"--out={tmp_path}/o")


JUNK = ("", " ", "-1", "0", "nan", "inf", "-inf", "1e999", "9" * 5000, "x" * 20000, "0x10",
        "\n\r\t\x1b[31m", "\udcff\udc80", "\N{FOX FACE}" * 50, "../../x", "/dev/null", "%s%n{0}",
        "1,2,,3", "0.5,0.1", "True", "--", "-", "=", "qa1,qa1,", "1k,2k,", "1_000", "None", "[]",
        "all,all", "cuda:-1")


def hostile_flags(rng, names):
    names = [f"--{name}" for name in names] + ["--no-such", "-x", "--out-"]
    return [rng.choice((f"{rng.choice(names)}={rng.choice(JUNK)}", rng.choice(JUNK),
                        rng.choice(names), f"--no-{rng.choice(names)[2:]}"))
            for _ in range(rng.randint(1, 4))]


def test_hostile_flags_get_one_line(tmp_path, monkeypatch):
    rng = random.Random(1)
    monkeypatch.chdir(tmp_path)
    for config in (babi.Flags, sample.Flags):
        names = [f.name for f in dataclasses.fields(config)]
        for _ in range(500):
            try:
                assert isinstance(babi.parse_flags(config, "", hostile_flags(rng, names)), config)
            except BadInput:
                pass
    names = set(re.findall(r"--(\w+)", call("train.py", "--help")[1])) - {"help"}
    names = sorted(name for name in names if not name.startswith("no_"))
    for _ in range(50):  # the whole script; the last flag is never right
        assert len(refused("train.py", *hostile_flags(rng, names), "--steps=0")) < 1000
    assert not os.listdir(tmp_path)


def test_hostile_files_get_one_line(tmp_path):
    """Random bytes for a bAbI file, a tokenizer or a book; and any text is encoded and decoded."""
    rng, path, good = random.Random(2), tmp_path / "file", b"1 Mary went home.\n2 Who?\tx\t1\n"
    encoding = babi.word_encoding()
    readers = (babi.read_babi, babi.load_encoding, lambda path: babi.book_noise(encoding, [path]),
               lambda path: list(babi.read_sentences(path)))
    for trial in range(700):
        mutated = bytearray(good * rng.randint(1, 3))
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(mutated))
            mutated[at:at + rng.randint(0, 2)] = rng.choice((
                rng.randbytes(3), b"\t", b"\n", b"\0", b"9" * 5000, b"\xc3\xa9", b"x" * 10000))
        path.write_bytes(rng.choice((mutated, rng.randbytes(rng.randint(0, 300)))))
        try:
            readers[trial % 4](str(path))
        except BadInput as error:
            assert "\n" not in str(error) and str(path) in str(error), error
        text = "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0xD800),
                                       rng.randrange(0xE000, 0x110000)))) for _ in range(200))
        assert encoding.decode(encoding.encode_ordinary(text)) == text


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_hostile_checkpoints_run_no_code_and_what_loads_can_be_asked(checkpoint, tmp_path,
                                                                    monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, file, loaded = random.Random(3), io.BytesIO(), 0
    torch.save(checkpoint, file)
    good = file.getvalue()

    def forged(trial):
        if trial % 4 == 0:
            return good[:rng.randrange(len(good))]                      # cut at any byte
        if trial % 4 == 1:
            broken = bytearray(good)
            for _ in range(rng.randint(1, 50)):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            return bytes(broken)
        if trial % 4 == 2:
            return rng.choice((pickle.dumps(Bomb(), 2), pickle.dumps({"config": Bomb()}, 2),
                               rng.randbytes(100), b"PK\3\4" + rng.randbytes(100), b""))
        part, file = rng.choice(("config", "model", "tokenizer")), io.BytesIO()
        value = rng.choice((None, -1, 10**6, 10**15, 1e300, "x", [], {}, [[]], True))
        torch.save(checkpoint | {part: value if rng.random() < 0.1 else checkpoint[part] | {
            rng.choice(list(checkpoint[part])): value}}, file)
        return file.getvalue()

    for trial in range(200):
        Path("forged.pt").write_bytes(forged(trial))
        try:
            model, encoding = LM2.load("forged.pt")
        except BadInput as error:
            assert "\n" not in str(error) and "forged.pt" in str(error), error
        else:
            loaded += 1
            question = torch.tensor([encoding.encode_ordinary("Where is Mary?")])
            said = model.generate(question, 3, temperature=0)[0].tolist()
            assert encoding.decode(said).startswith("Where is Mary?")
    assert loaded and os.listdir() == ["forged.pt"]


# What a run has learned

def test_the_memory_is_learned_and_nothing_else_does_it(learned):
    """Facts in the first segment, questions in the second: right with the bank, chance without."""
    out, _ = learned
    accuracy = {key: float(value) for key, value in re.findall(r"(\w+_1x): ([\d.]+)", out)}
    assert accuracy["memory_1x"] > 0.8, out
    assert accuracy["wiped_1x"] < 0.35 and accuracy["swapped_1x"] < 0.45, out


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


@pytest.mark.parametrize("memory", ["lm2", "rmt"])
def test_answers_are_scored_as_generation_gives_them(memory):
    """Exact match, taken from one forward, is what greedy generation would give."""
    model, tokens = random_model(memory=memory), random_tokens(B=20, T=14)
    text = model.generate(tokens, 3, temperature=0)
    targets = torch.full((20, 17), -1)
    targets[:, -4:-1] = text[:, -3:]
    targets[10:, -2] = (targets[10:, -2] + 1) % 11
    assert babi.answered(model, text, targets).tolist() == [True] * 10 + [False] * 10


def test_without_a_memory_the_model_is_shown_what_its_window_holds():
    model, tokens = random_model(memory="none"), random_tokens(B=20, T=18)
    for span in (1, 3, 4, 7):
        targets = torch.full_like(tokens, -1)
        guess = model(tokens[:, -max(4, span):])[0].argmax(-1)[:, -span:]
        targets[:10, -span:], targets[10:, -span:] = guess[:10], (guess[10:] + 1) % 11
        assert babi.answered(model, tokens, targets).tolist() == [True] * 10 + [False] * 10


# Asking: sample.py and what lies in results/

@pytest.fixture(scope="module")
def loaded(tiny):
    return LM2.load(tiny / "ckpt.pt")


STORY = "Mary went to the kitchen. John moved to the office. "

# The recorder


def test_the_recorder_changes_nothing_and_records_what_was_computed():
    model, tokens = random_model(torch.float32), random_tokens(B=1, T=11)
    expected = model(tokens)[0]
    with torch.no_grad(), sample.Recorder(model) as recorder:
        assert torch.equal(model(tokens)[0], expected)
        assert torch.equal(model.generate(tokens, 5, temperature=0)[:, :11], tokens)
    assert not any(module._forward_hooks for module in model.modules())
    assert [len(s["tokens"]) for s in recorder.segments] == [4, 4, 3, 4, 4, 4]
    assert recorder.text()[:11] == tokens[0].tolist() and recorder.source[0].shape == (3, 1 + 23)
    first, block = recorder.segments[0], model.blocks[0]
    memory = model.fresh_memory(1)
    x = model.mixer(model.embedding(tokens[:, :4]), memory.tail)[0][:, None]
    e, bank = block.attention_norm(x), memory.banks[:, 0]
    x = x + block.attention(e)
    new = block.write(x, bank)[1]
    read = block.read.attention(e, normed(bank[:, None]))[0, 0]
    again = block.read.attention(e, normed(new[:, None]))[0, 0]
    assert torch.allclose(first["read"][0], read) and torch.allclose(first["again"][0], again)
    assert not torch.allclose(read, again)
    joined = block.read(e, bank[:, None])[0, 0].norm(dim=-1)
    assert torch.allclose(first["joined"][0], joined)
    write = block.write.attention(normed(x))[0, 0] * first["input"][0][:, None]
    assert torch.allclose(first["write"][0], write) and torch.all(first["forget"][0] <= 1)


def test_the_gates_that_are_recorded_make_the_bank_that_is_left():
    """One channel, so that the mean of a gate is the gate: M' = g_in tanh(C) + g_forget M."""
    model = random_model(torch.float32, n_layer=1, n_embd=4, n_head=1)
    tokens, block = random_tokens(B=1, T=8), model.blocks[0]
    with torch.no_grad(), sample.Recorder(model) as recorder:
        gates = []
        hook = block.write.gate.register_forward_hook(lambda *a: gates.append(a[2][0]))
        model(tokens)
        hook.remove()
    for segment, gate in zip(recorder.segments, gates, strict=True):
        input_gate, forget_gate = gate.chunk(2, dim=-1)
        assert torch.allclose(segment["input"][0], input_gate.mean(-1))
        assert torch.allclose(segment["forget"][0], forget_gate.mean(-1))


@pytest.mark.parametrize("resumed", [False, True])
def test_what_leaves_the_recorder_is_counted_in_the_first_column(resumed):
    model, tokens = random_model(torch.float32), random_tokens(B=1, T=38)
    recorders = [sample.Recorder(model, keep, resumed) for keep in (3, 64)]
    for recorder in recorders:
        with torch.no_grad(), recorder:
            model(tokens)
    few, all_ = recorders
    assert [s["number"] for s in few.segments] == [8, 9, 10]
    assert few.text() == tokens[0, 28:].tolist() and few.source[0].shape == (3, 1 + 10)
    assert few.before[0].shape == (3, 1 + 8)
    for i, (short, whole) in enumerate(zip(few.source, all_.source)):
        kept = torch.stack([segment["forget"][i] for segment in all_.segments]).prod(0)
        assert torch.allclose(whole[:, 0], kept * resumed)
        assert torch.allclose(short[:, 1:], whole[:, -10:])
        assert torch.allclose(short[:, 0], whole[:, :-10].sum(1))


def test_many_calls_are_recorded_as_one():
    model, tokens = random_model(torch.float32), random_tokens(B=1, T=20)
    one, many = (sample.Reader(model, sample.Recorder(model)) for _ in range(2))
    one.read(tokens[0].tolist())
    for start in range(0, 20, 3):
        many.read(tokens[0, start:start + 3].tolist())
    assert one.recorder.text() == many.recorder.text() == tokens[0].tolist()
    for a, b in zip(one.recorder.source, many.recorder.source):
        assert torch.allclose(a, b, atol=1e-6)


# Seeing


def test_letters_of_several_tokens_are_shown_whole():
    encoding = babi.word_encoding()
    text = " Mary said: na\u00efve \u65e5\u672c \N{FOX FACE}."
    texts = sample.texts_of(encoding, encoding.encode_ordinary(text))
    assert "".join(texts) == text and "\ufffd" not in text
    texts = sample.texts_of(encoding, encoding.encode_ordinary(" a\x1b\n"))
    assert "".join(texts) == " a\\x1b\\n"


def test_the_answer_is_shown_with_what_it_was_read_from(tiny, tmp_path):
    page = tmp_path / "page.html"
    story = STORY + "Na\u00efve <b>&amp; " * 15
    out = run("sample.py", f"--ckpt={tiny}/ckpt.pt", f"--story={story}", "--ask=Where is Mary?",
              "--show", f"--html={page}")
    assert "segment 2 | mean gates input" in out and "was read from" in out
    shown = out[out.index("segment 1"):]
    assert shown.count("\u00ef") >= 14 and "\ufffd" not in shown
    text = page.read_text("utf-8")
    assert "http" not in text and "kitchen" in text and "DATA" not in text and "<b>" not in text
    data = json.loads(re.search(r"const data = (.*);", text)[1])
    assert [segment["number"] for segment in data] == list(range(1, len(data) + 1))
    assert len(data[0]["tokens"]) == 64 and "&lt;" in "".join(data[0]["tokens"])
    for segment in data:
        for block in segment["blocks"]:
            for kind in ("read", "write", "again"):
                assert len(block[kind]) == 16
                assert all(len(slot) == len(segment["tokens"]) for slot in block[kind])


def test_slots_hold_text_of_an_earlier_session_when_a_memory_was_loaded(tiny, tmp_path):
    ckpt, memory = f"--ckpt={tiny}/ckpt.pt", f"{tmp_path}/memory.pt"
    run("sample.py", ckpt, "--story=" + STORY * 20, f"--save_memory={memory}")
    out = run("sample.py", ckpt, f"--load_memory={memory}", "--ask=Where is Mary?", "--show")
    assert "an earlier session" in out and "nothing yet" not in out
    assert "an earlier session" in run("sample.py", ckpt, f"--load_memory={memory}",
                                       input="/memory\n")


def test_control_characters_of_a_text_never_reach_the_terminal(tiny, tmp_path):
    bad = "\x1b]0;title\x07\x1b[2J\x9b31m"
    (tmp_path / "bad.txt").write_text((STORY + bad) * 20, encoding="utf-8")
    typed = f"/load {tmp_path}/bad.txt\n/memory\n{bad} Mary\n/memory\n/{bad}\n/load {bad}\n" \
        f"Where is {bad}?\n/load x\0y\n"
    ckpt = f"--ckpt={tiny}/ckpt.pt"
    for flags, input in (([ckpt], typed), ([ckpt, f"--story={bad} x", f"--ask={bad}", "--show"], ""),
                         ([ckpt, f"--story={tmp_path}/bad.txt", "--ask=x", "--show"], ""),
                         ([ckpt, f"--prompt={bad}"], ""), ([ckpt, f"--read={bad}"], "")):
        status, out, errors = call("sample.py", *flags, input=input)
        assert status in (0, 2) and re.sub(r"[^\x00-\x09\x0b-\x1f\x7f-\x9f]", "", out + errors) == ""
    assert "\\x1b" in out + errors


# Asking


@pytest.mark.parametrize("typed, meant", [
    ("Where is Mary?", ["Where is Mary?"]),
    ("Where is Mary", ["Where is Mary?"]),
    ("where is mary?", ["Where is Mary?"]),
    ("WHERE IS MARY ??", ["Where is Mary?"]),
    ("is mary in the Kitchen", ["Is Mary in the kitchen?"]),
    ("how many objects is john carrying", ["How many objects is John carrying?"]),
    ("mary went to the kitchen", ["Mary went to the kitchen."]),
    ("John went to the office. mary moved to the kitchen. Where is Mary?",
     ["John went to the office.", "Mary moved to the kitchen.", "Where is Mary?"]),
    ("Where is Mary? John got up! where is John",
     ["Where is Mary?", "John got up!", "Where is John?"]),
    ("The office is north of the hallway", ["The office is north of the hallway."]),
    ("iPhones went to the PARK", ["iPhones went to the park."]),
    ("Where is the McMilk?", ["Where is the McMilk?"]),
    (" ? ", []), ("...", []), ("", []),
])
def test_what_is_typed_becomes_facts_and_questions(typed, meant):
    assert sample.sentences(typed) == meant


class Parrot:
    """A reader that answers with these words."""
    def __init__(self, encoding, said):
        self.said = encoding.encode_ordinary(said)

    def generate(self, tokens, *args, **kwargs):
        return self.said


@pytest.mark.parametrize("question, said, known", [
    ("Where is Mary?", " kitchen. Then", True), ("Where is Mary?", " yes.", False),
    ("Where is Mary?", " kitchen kitchen to.", False), ("Where is Mary?", ".", False),
    ("Who gave the milk?", " Fred.", True), ("Who gave the milk?", " milk.", False),
    ("Is Mary in the park?", " maybe.", True), ("Is Mary in the park?", " park.", False),
    ("How many objects is Mary carrying?", " two.", True),
    ("What is Mary carrying?", " milk,apple.", True),
    ("What is Mary carrying?", " nothing.", True),
    ("What is Mary carrying?", " milk,.", False),
    ("What is north of the office?", " garden.", True),
    ("Why did Mary go?", " kitchen.", False),
])
def test_an_answer_is_one_that_the_tasks_have_or_it_is_said_that_there_is_none(question, said,
                                                                               known):
    encoding = babi.word_encoding()
    told = sample.answer(Parrot(encoding, said), encoding, ["qa1"], question)
    word = said.split(".")[0].strip()
    assert told == (word if known else f'the model has no answer to that (it says "{word}")')
    assert sample.answer(Parrot(encoding, said), encoding, [], question) == word


def test_lines_files_flags_and_pipes_are_the_same_story(tiny, tmp_path):
    ckpt, ask, story = f"--ckpt={tiny}/ckpt.pt", "--ask=Where is Mary?", STORY * 20
    said = run("sample.py", ckpt, f"--story={story}", ask)
    assert said.count("\n") == 2 and "\nbank wiped: " in said
    (tmp_path / "story.txt").write_text(story)
    assert run("sample.py", ckpt, f"--story={tmp_path}/story.txt", "--ask=where is MARY") == said
    lines = "Mary went to the kitchen.\n\nJohn moved to the office\n" * 20
    one_line = "\ufeff" + "mary went to the Kitchen. John moved to the office. " * 20
    for typed in (lines + "Where is Mary?\n", lines + "where is mary\n", one_line + "Where is Mary?"):
        assert run("sample.py", ckpt, input=typed) == said
    memory = f"{tmp_path}/memory.pt"
    out = run("sample.py", ckpt, "--read=-", f"--save_memory={memory}", ask, input=story)
    assert re.match("read 240 tokens in", out) and out.endswith(said)
    assert run("sample.py", ckpt, f"--load_memory={memory}", ask) == said


def test_a_chat_has_commands_and_a_question_leaves_no_trace(tiny, tmp_path):
    (tmp_path / "story.txt").write_text("Mary went to the kitchen. " * 15)
    typed = f"/load {tmp_path}/story.txt\n/memory\nWhere is Mary?\n/memory\n/x\n/reset\n/memory\n" \
        "/far x\n/far 100\n/memory\n/quit\n/x\n"
    out = run("sample.py", f"--ckpt={tiny}/ckpt.pt", input=typed)
    first, second, empty, noise = re.findall(r"(?:^  .*\n)+", out, flags=re.M)
    assert "read 90 tokens" in out and "not yet written: kitchen. Mary" in first and second == first
    assert "nothing to trace" in empty and "nothing to trace" not in noise
    assert "not yet written" in noise and "Mary" not in noise
    assert out.count("no command /x") == 1 and "no command /far x" in out


@pytest.mark.parametrize("bad", ["utf16", "latin", "missing", "folder"])
def test_a_file_that_fails_to_load_leaves_the_chat_as_it_was(tiny, tmp_path, bad):
    half = (STORY * 3000).encode()      # so much is read before the fault is found
    {"utf16": lambda p: p.write_bytes(STORY.encode("utf-16")), "missing": lambda p: None,
     "latin": lambda p: p.write_bytes(half + "na\u00efve".encode("latin-1")),
     "folder": lambda p: p.mkdir()}[bad](tmp_path / "bad")
    typed = STORY * 12 + "\n/memory\n{}/memory\nWhere is Mary?\n"
    ckpt = f"--ckpt={tiny}/ckpt.pt"
    out = run("sample.py", ckpt, input=typed.format(f"/load {tmp_path}/bad\n"))
    error, = re.findall("error: .*\n", out)
    assert "bad" in error
    assert out.replace(error, "") == run("sample.py", ckpt, input=typed.format(""))


def test_who_was_never_named_is_hinted_at(tiny, tmp_path):
    ckpt, memory = f"--ckpt={tiny}/ckpt.pt", tmp_path / "memory.pt"

    def hints(*flags, input=""):
        status, _, errors = call("sample.py", ckpt, *flags, input=input)
        assert status == 0
        return errors
    assert hints("--story=" + STORY, "--ask=Where is Sandra?").startswith(
        "hint: nothing that was read names Sandra")
    assert not hints("--story=" + STORY, "--ask=Where is Mary?")
    assert hints(input="Where is Mary?\nMary went to the office.\nWhere is Mary?\n").count("\n") == 1
    hints("--story=" + STORY, f"--save_memory={memory}")
    assert "Sandra" in hints(f"--load_memory={memory}", "--ask=Where is Sandra?")
    assert not hints(f"--load_memory={memory}", "--ask=Where is John?")
    saved = torch.load(memory, weights_only=True)
    assert saved.pop("names") == ["John", "Mary", "kitchen", "office"]
    torch.save(saved, memory)           # of whom it speaks is unknown
    assert not hints(f"--load_memory={memory}", "--ask=Where is Sandra?")
    assert "Zoe" in hints("--story=x y", "--ask=Why did Zoe sing?")
    assert "never saw such a question" in hints("--story=" + STORY, "--ask=Is Mary in the office?")


@pytest.mark.parametrize("task, question, names, missing", [
    ("qa6", "Is Mary in the garden?", {"Mary"}, ""), ("qa6", "Is Mary in the garden?", set(), "Mary"),
    ("qa4", "What is north of the office?", set(), "office"),
    ("qa4", "What is north of the office?", {"office"}, ""),
    ("qa2", "Where is the milk?", {"Mary"}, "milk"), ("qa2", "Where is the milk?", None, ""),
    ("qa5", "Who gave the milk to Bill?", {"milk", "Fred"}, "Bill"),
])
def test_a_hint_asks_for_persons_and_objects_and_for_places_where_they_alone_are_asked_for(
        task, question, names, missing, capsys):
    sample.hint(babi.word_encoding(), [task], question, names)
    told = f"hint: nothing that was read names {missing}\n" if missing else ""
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("typed", ["\ufeffmary went to the Kitchen", "Mary  went to\tthe kitchen."])
def test_what_is_typed_is_read_as_the_stories_spell_it(tiny, typed):
    out = run("sample.py", f"--ckpt={tiny}/ckpt.pt", input=f"{typed}\n/memory\n")
    assert out.endswith("not yet written: Mary went to the kitchen.\n")


def test_far_reads_so_many_tokens_of_noise_between_story_and_question(loaded, tiny):
    model, encoding = loaded
    reader, flags = sample.Reader(model), sample.Flags(seed=3)
    sample.read_noise(reader, encoding, flags, 50)
    noise = babi.make_noise(encoding, 3)(random.Random("3 0"))
    assert reader.rest == [token for _ in range(20) for token in next(noise)][:50]
    sample.read_noise(reader, encoding, flags, 20000)
    assert reader.count == 20050
    ckpt, ask = f"--ckpt={tiny}/ckpt.pt", "--ask=Where is Mary?"
    near = run("sample.py", ckpt, f"--story={STORY}", ask)
    assert near.endswith("no memory needed: all that was read is in the current segment\n")
    far = run("sample.py", ckpt, f"--story={STORY}", "--far=300", ask)
    assert re.search("^bank wiped: ", far, flags=re.M) and far.count("\n") == 2


@pytest.mark.parametrize("n_rest, kept", [(10, True), (60, True), (61, False)])
def test_a_wiped_bank_leaves_what_is_in_the_current_segment_alone(loaded, monkeypatch, n_rest, kept):
    model, encoding = loaded
    reader, asked = sample.Reader(model), []
    reader.read([65] * (64 + n_rest))
    monkeypatch.setattr(sample, "answer", lambda reader, *_: asked.append(reader) or "")
    sample.reply(reader, encoding, ["qa1"], "Where is Mary?")   # of four tokens
    whole, wiped = asked
    assert whole is reader and torch.equal(wiped.memory.banks, model.fresh_memory(1).banks)
    assert not torch.equal(reader.memory.banks, wiped.memory.banks)
    assert wiped.rest == ([65] * n_rest if kept else [])


def test_a_text_is_read_in_pieces_as_it_would_be_at_once(loaded, tmp_path, monkeypatch):
    model, encoding = LM2(loaded[0].config).eval(), loaded[1]
    for p in model.parameters():    # what ten steps taught says the same after any text
        torch.nn.init.normal_(p, std=0.5)
    text = "Mary went to the kitchen, and na\u00efve\nJohn slept.  " * 200
    pieces, small = babi.text_pieces, []
    monkeypatch.setattr(babi, "text_pieces", lambda file, name: pieces(file, name, size=37))
    small = list(sample.pieces(io.BytesIO(text.encode()), "book"))
    assert "".join(small) == text and len(small) > 100
    tokens = encoding.encode_ordinary(sample.tidy(text))
    assert [t for p in small for t in encoding.encode_ordinary(sample.tidy(p))] == tokens
    (tmp_path / "book").write_text(text, encoding="utf-8")
    reader = sample.Reader(model)
    sample.read_stream(reader, encoding, str(tmp_path / "book"), sample.tidy)
    assert reader.rest == tokens[len(tokens) // 64 * 64:] and reader.count == len(tokens)
    whole = model.generate(torch.tensor([tokens]), 70, temperature=0)[0, len(tokens):].tolist()
    assert reader.generate([], 70, temperature=0) == whole
    assert reader.generate([], 70, temperature=0) == whole


# Files and flags


MEMORIES = {
    "another dtype": lambda s: {"banks": s["banks"].double()},
    "half": lambda s: {"tail": s["tail"].half()},
    "integers": lambda s: {"banks": s["banks"].int()},
    "complex": lambda s: {"banks": s["banks"].to(torch.complex64)},
    "another device": lambda s: {"banks": s["banks"].to("meta")},
    "sparse": lambda s: {"banks": s["banks"].to_sparse()},
    "a list": lambda s: {"banks": s["banks"].tolist()},
    "another shape": lambda s: {"banks": s["banks"][:, :1]},
    "NaN": lambda s: {"banks": s["banks"] * float("nan")},
    "infinite": lambda s: {"tail": s["tail"] + float("inf")},
    "huge": lambda s: {"tail": s["tail"] + 1e38},
    "text": lambda s: {"rest": ["Mary"]}, "a text": lambda s: {"rest": "Mary"},
    "negative": lambda s: {"rest": [-1]}, "fractional": lambda s: {"rest": [1.5]},
    "beyond the vocabulary": lambda s: {"rest": [10**6]}, "truth": lambda s: {"rest": [True]},
    "beyond 64 bits": lambda s: {"rest": [2**70]}, "nested": lambda s: {"rest": [[1]]},
    "too many": lambda s: {"rest": [1] * 64, "count": 64}, "none": lambda s: {"rest": None},
    "a tensor": lambda s: {"rest": torch.ones(3)},
    "count of text": lambda s: {"count": "1"}, "fewer than there are": lambda s: {"count": -1},
    "count beyond": lambda s: {"count": 2**64}, "half a count": lambda s: {"count": 9.5},
    "other names": lambda s: {"names": ["\x1b[2J"]}, "nested names": lambda s: {"names": [["Mary"]]},
    "a name": lambda s: {"names": "Mary"}, "a tensor for a model": lambda s: {"model": torch.ones(2)},
}


@pytest.mark.parametrize("kind", MEMORIES)
def test_a_forged_memory_gets_one_line(loaded, tmp_path, kind):
    model, path = loaded[0], str(tmp_path / "memory.pt")
    reader = sample.Reader(model)
    reader.read([65] * 70)
    sample.save_memory(reader, path)
    again = sample.load_memory(model, path)
    assert again.rest == reader.rest and again.count == 70 and again.names == frozenset()
    saved = torch.load(path, weights_only=True)
    torch.save(saved | MEMORIES[kind](saved), path)
    with pytest.raises(BadInput, match="memory.pt") as error:
        sample.load_memory(model, path)
    assert "\n" not in str(error.value)


def test_a_memory_of_another_model_is_refused(loaded, tmp_path):
    path = str(tmp_path / "memory.pt")
    sample.save_memory(sample.Reader(random_model(torch.float32)), path)
    with pytest.raises(BadInput, match="another model"):
        sample.load_memory(loaded[0], path)


@pytest.mark.parametrize("flags, names", [
    (["--ckpt={tmp}/nowhere.pt", "--ask=x"], "nowhere.pt"),
    (["--ask= "], "--ask"), (["--ask="], "--ask"), (["--ask=?"], "--ask"),
    (["--prompt="], "--prompt"), (["--prompt=x", "--ask=x"], "--prompt"),
    (["--prompt=x", "--temperature=nan"], "--temperature"),
    (["--prompt=x", "--temperature=-1"], "--temperature"),
    (["--prompt=x", "--temperature=1e-40"], "--temperature"),
    (["--prompt=x", "--temperature=inf"], "--temperature"),
    (["--prompt=x", "--top_k=-1"], "--top_k"), (["--prompt=x", "--max_new_tokens=0"], "--max_new"),
    (["--story=nowhere.txt", "--ask=x"], "nowhere.txt"), (["--story={tmp}", "--ask=x"], "irectory"),
    (["--read={tmp}/nowhere.txt"], "nowhere.txt"), (["--read={tmp}/noise.bin"], "UTF-8"),
    (["--story=x y", "--far=-1", "--ask=x"], "--far"),
    (["--story=x y", "--far=9", "--noise={tmp}/short.txt", "--ask=x"], "0 sentences"),
    (["--story={tmp}/noise.bin", "--ask=x"], "UTF-8"),
    (["--load_memory={tmp}/nowhere.pt"], "nowhere.pt"), (["--load_memory={tmp}/noise.bin"], "noise"),
    (["--story=x y", "--save_memory={tmp}/short.txt"], "already"),
    (["--story=x y", "--save_memory={tmp}/no/x"], "no/x"), (["--story=x y", "--show"], "--ask"),
    (["--story=x y", "--ask=x", "--save_memory={tmp}/same", "--html={tmp}/same"], "same file"),
    (["--ckpt={tmp}/task.pt", "--ask=x"], "task.pt"), (["--ckpt={tmp}/flags.pt", "--ask=x"], "flags.pt"),
    (["--ckpt={tmp}/vanilla.pt", "--story=x y", "--ask=x", "--show"], "--show"),
])
def test_bad_input_of_sample_gets_one_clear_line(flags, names, tiny, tmp_path):
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "noise.bin").write_bytes(bytes(range(256)) * 9)
    data = torch.load(tiny / "ckpt.pt", weights_only=True)
    for name, train in (("task", {"flags": {"data": "", "task": ["qa1"]}}), ("flags", {"flags": 3})):
        torch.save(data | {"train": train}, tmp_path / f"{name}.pt")
    config = data["config"] | {"memory": "none"}
    torch.save(data | {"config": config, "model": LM2(LM2Config(**config)).state_dict()},
               tmp_path / "vanilla.pt")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    flags = [flag.format(tmp=tmp_path) for flag in flags]
    if not any(flag.startswith("--ckpt") for flag in flags):
        flags.append(f"--ckpt={tiny}/ckpt.pt")
    assert names in refused("sample.py", *flags)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_text_is_continued_as_flags_say(tiny):
    flags = [f"--ckpt={tiny}/ckpt.pt", "--prompt=the\tcat\nsat", "--max_new_tokens=12"]
    greedy = run("sample.py", *flags, "--temperature=0")
    assert greedy.startswith("the\\tcat\nsat") and run("sample.py", *flags, "--top_k=1") == greedy
    hot = [run("sample.py", *flags, "--temperature=5", "--top_k=0", f"--seed={n}") for n in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2] and hot[0] != greedy


# Results


@pytest.mark.parametrize("seed", [0, 1])
def test_the_study_moves_with_the_bank_alone(tiny, seed):
    """A bank frozen before the update is read as before it; the news is read after it alone."""
    from results import study
    model, encoding = LM2.load(tiny / "ckpt.pt")
    torch.manual_seed(seed)
    for part in [part for block in model.blocks for part in (block.write, block.read)]:
        for p in part.parameters():     # ten steps do not teach to write
            torch.nn.init.normal_(p)
    model.mixer.weight.data[:, :, :-1] = 0      # or its tail would tell of the segment before
    shares, answers = study.study(model, encoding)
    for question in study.QUESTIONS:
        row = {bank: [shares[question, bank, fact] for fact in study.ROWS] for bank in study.BANKS}
        before, after, frozen = (torch.tensor(row[bank]) for bank in study.BANKS)
        assert torch.allclose(before, frozen, atol=1e-5) and before[2] == frozen[2] == 0 < after[2]
        assert all(abs(sum(row[bank]) - 1) < 1e-5 for bank in study.BANKS)


def test_the_study_is_printed_and_drawn(tiny, tmp_path):
    flags = f"--ckpt={tiny}/ckpt.pt", f"--out={tmp_path}/s.png"
    status, out, errors = call("results/study.py", *flags)
    rows = re.findall(r"(?m)^  \S.*?  +[\d.]+ +[\d.]+ +[\d.]+$", out)
    assert status == 0 and len(rows) == 8, errors
    assert "pip install matplotlib" in out or (tmp_path / "s.png").stat().st_size > 1000


def test_the_benchmark_runs_and_counts_kernels():
    from results import bench
    with bench.Kernels() as kernels:
        x = torch.ones(4, 4)
        y = (x.view(2, 8)[:, 1:].mT.reshape(-1, 1)[0] + 1).unsqueeze(0)
        y.add_(1)
    assert 3 <= kernels.count <= 4          # ones, clone of the reshape, add, add_
    out = call("results/bench.py", "--quick")[1]
    rows = re.findall(r"(?m)^(vanilla|RMT|LM2) +[\d,]+ ", out)
    assert rows == ["LM2"] + 2 * ["vanilla", "RMT", "LM2"]
    assert "kernels" in out and "ratio" in out


if __name__ == "__main__":
    if len(sys.argv) != 2 or not sys.argv[1].startswith("--blank=") or not sys.argv[1][8:]:
        sys.exit(print("error: usage: python test_lm2.py --blank=FOLDER", file=sys.stderr) or 2)
    write_assignments(sys.argv[1][8:])
