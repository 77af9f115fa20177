"""What must always hold. Each name is a sentence that is true; run with `pytest -q`.

A falling loss proves nothing about a memory: most public memory transformers carried a silent bug
in the way information flows. The tests of the first part would each have caught one of them.
"""
import csv
import dataclasses
import io
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
import warnings
from functools import partial

os.environ["OMP_NUM_THREADS"] = "1"  # models are tiny, and the other core has the long run

import pytest
import torch

import babilong_tiny as babi
import sample
from lm2 import LM2, LM2Config, Memory, Muon, load_checkpoint, normed

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


# --------------------------------------------------------------------------------------------
# The model

def test_the_decoder_is_untouched_by_a_memory_that_adds_nothing():
    with_memory, without = random_model(), random_model(memory="none")
    without.load_state_dict(with_memory.state_dict(), strict=False)
    tokens = random_tokens()
    assert not torch.allclose(with_memory(tokens)[0], without(tokens)[0])
    for block in with_memory.blocks:
        torch.nn.init.zeros_(block.read.output.weight)
    assert torch.equal(with_memory(tokens)[0], without(tokens)[0])


@pytest.mark.parametrize("memory", ["lm2", "rmt", "none"])
def test_no_position_sees_the_future(memory):
    model, tokens = random_model(memory=memory), random_tokens(T=18)
    logits = model(tokens)[0]
    for prefix in (1, 3, 4, 5, 7, 8, 11, 12, 15, 17):
        changed = tokens.clone()
        changed[:, prefix:] = (changed[:, prefix:] + 1) % 11
        assert torch.equal(model(changed)[0][:, :prefix], logits[:, :prefix]), prefix


def test_the_first_segment_reaches_the_last_only_through_the_memory():
    tokens = random_tokens(T=20)
    changed = tokens.clone()
    changed[:, 1] = (changed[:, 1] + 1) % 11
    for memory, moved in (("lm2", True), ("rmt", True), ("none", False)):
        model = random_model(memory=memory)
        difference = (model(tokens)[0] - model(changed)[0])[:, 16:].abs().max()
        assert (difference > 1e-6) == moved


def test_the_local_mixer_crosses_a_border_by_its_own_width_and_no_further():
    model, tokens = random_model(memory="none", conv=3), random_tokens(T=8)
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 11               # the last token of the first segment
    logits, moved = model(tokens)[0], model(changed)[0]
    assert not torch.equal(logits[:, 4:6], moved[:, 4:6])
    tokens[:, :2], changed[:, :2] = 0, 1                   # more than two tokens back
    changed[:, 2:] = tokens[:, 2:]
    assert torch.equal(model(tokens)[0][:, 4:], model(changed)[0][:, 4:])


def test_read_gates_and_write_equal_a_slow_loop():
    """The equations once more, one number at a time, from plain lists."""
    model = random_model(memory_slots=3, n_embd=8, block_size=5)
    x, memory = torch.randn(5, 8, dtype=torch.float64), torch.randn(3, 8, dtype=torch.float64)
    N, T, d = 3, 5, 8
    M, E = memory.tolist(), x.tolist()

    def linear(layer, v):
        bias = layer.bias.tolist() if layer.bias is not None else [0.0] * layer.out_features
        return [sum(w * a for w, a in zip(row, v)) + b
                for row, b in zip(layer.weight.tolist(), bias)]

    def rms(v, weight=None, eps=torch.finfo(torch.float64).eps):
        scale = math.sqrt(sum(a * a for a in v) / len(v) + eps)
        return [a / scale * w for a, w in zip(v, weight or [1.0] * len(v))]

    def add(u, v):
        return [a + b for a, b in zip(u, v)]

    def gate(layer, v, slot=...):
        z = add(linear(layer.linear, v), layer.bias[slot].tolist())
        return [min(1.0, max(0.0, 1.2 / (1 + math.exp(-a)) - 0.1)) for a in z]

    def attend(q, keys, values, nothing=0.0):
        scores = [math.exp(sum(a * b for a, b in zip(q, k)) / math.sqrt(d)) for k in keys]
        total = sum(scores) + nothing
        return [sum(s * v[i] for s, v in zip(scores, values)) / total for i in range(d)]

    def rotated(v, position):
        out = list(v)
        for i in range(d // 2):
            angle = position * 10000 ** (-2 * i / d)
            a, b = v[i], v[i + d // 2]
            out[i] = a * math.cos(angle) - b * math.sin(angle)
            out[i + d // 2] = a * math.sin(angle) + b * math.cos(angle)
        return out

    read, write = model.blocks[0].read, model.blocks[0].write
    slots = [rms(M[r]) for r in range(N)]
    keys = [linear(read.key, add(slots[r], read.address[r].tolist())) for r in range(N)]
    values = [linear(read.value, slots[r]) for r in range(N)]
    expected = []
    for t in range(T):
        recalled = attend(linear(read.query, E[t]), keys, values)
        g_out = gate(read.output_gate, recalled)
        expected.append(linear(read.output, [g * a for g, a in zip(g_out, recalled)]))
    got = read(x[None], memory[None])[0]
    assert (got - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-9

    tokens = [rms(E[t], write.norm.weight.tolist()) for t in range(T)]
    keys = [rotated(linear(write.key, tokens[t]), t) for t in range(T)]
    values = [linear(write.value, tokens[t]) for t in range(T)]
    expected = []
    for r in range(N):
        q = rotated(linear(write.query, add(slots[r], write.address[r].tolist())), T)
        C = attend(q, keys, values, nothing=1.0)  # exp(0) for the empty key
        seen = C + [math.tanh(m) for m in M[r]]
        g_in, g_forget = gate(write.input_gate, seen, r), gate(write.forget_gate, seen, r)
        expected.append([i * math.tanh(c) + f * m for i, c, f, m in zip(g_in, C, g_forget, M[r])])
    got = write(x[None], memory[None])[0]
    assert (got - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-9


def test_memory_tokens_equal_one_sequence_with_a_mask():
    """RMT's segment is one sequence, memory + tokens + memory, of which the last part sees all."""
    model, T, N = random_model(memory="rmt"), 4, 3
    tokens, bank = random_tokens(T=T), torch.randn(2, N, 8, dtype=torch.float64)
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
    assert torch.allclose(model.head(x[:, N:N + T]), logits, atol=1e-12)
    assert torch.allclose(torch.nn.functional.rms_norm(x[:, N + T:], (8,)), after.banks[:, 0],
                          atol=1e-12)


def test_normed_is_pytorchs_rms_norm_forward_and_backward():
    x, y = (torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
            for _ in range(2))
    ours, theirs = normed(x), torch.nn.functional.rms_norm(y, (8,))
    assert torch.allclose(ours, theirs, atol=1e-6)
    ours.cos().sum().backward()
    theirs.cos().sum().backward()
    assert torch.allclose(x.grad, y.grad, atol=1e-6)


@pytest.mark.parametrize("conv", [0, 3])
@pytest.mark.parametrize("memory", ["lm2", "rmt", "none"])
def test_the_residual_stream_stays_in_float32_in_mixed_precision(memory, conv):
    """Or the models of a comparison would differ in precision as well."""
    model, seen = random_model(torch.float32, memory=memory, conv=conv), []
    model.blocks[-1].register_forward_hook(lambda *args: seen.append(args[2][0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(random_tokens())
    assert set(seen) == {torch.float32}


def test_gates_can_keep_the_bank_whole_or_replace_it():
    write = random_model().blocks[0].write
    x, memory = torch.randn(2, 4, 8).double(), torch.randn(2, 3, 8).double()
    torch.nn.init.zeros_(write.input_gate.linear.weight)
    torch.nn.init.zeros_(write.forget_gate.linear.weight)
    write.input_gate.bias.data.fill_(-9.0)
    write.forget_gate.bias.data.fill_(9.0)
    assert torch.equal(write(x, memory), memory)            # exactly, however often
    write.input_gate.bias.data.fill_(9.0)
    write.forget_gate.bias.data.fill_(-9.0)
    other_bank = torch.randn(2, 3, 8).double()
    assert write(x, memory).abs().max() <= 1                # tanh of the news and nothing else
    write.query.weight.data.zero_()                         # a query that does not look at the bank
    assert torch.equal(write(x, memory), write(x, other_bank))


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
def test_rows_of_a_batch_are_independent(kind):
    model, tokens = random_model(memory=kind), random_tokens(B=3)
    logits, _, memory = model(tokens)
    for row in range(3):
        alone = model(tokens[row:row + 1])
        assert torch.allclose(alone[0][0], logits[row], atol=1e-12)
        assert torch.allclose(alone[2].banks[0], memory.banks[row], atol=1e-12)


@pytest.mark.parametrize("kind", ["lm2", "rmt"])
def test_the_module_keeps_nothing_between_calls(kind):
    model, tokens = random_model(memory=kind), random_tokens()
    first = model(tokens)[0]
    model(random_tokens(seed=1))
    assert torch.equal(model(tokens)[0], first)


@pytest.mark.parametrize("kind", ["lm2", "rmt"])
def test_many_calls_equal_one_call(kind):
    model, tokens = random_model(memory=kind), random_tokens(T=18)
    whole, _, final = model(tokens)
    memory, parts = None, []
    for start, stop in ((0, 4), (4, 12), (12, 18)):
        logits, _, memory = model(tokens[:, start:stop], memory=memory)
        parts.append(logits)
    assert torch.equal(torch.cat(parts, 1), whole)
    assert torch.equal(memory.banks, final.banks) and torch.equal(memory.tail, final.tail)


@pytest.mark.parametrize("kind", ["lm2", "rmt"])
def test_the_last_logits_alone_are_the_same(kind):
    model, tokens = random_model(memory=kind), random_tokens(T=18)
    targets = tokens.roll(-1, 1)
    targets[:, :13] = -1
    whole, loss, _ = model(tokens, targets)
    for last in (1, 2, 5, 18, 99):
        assert torch.equal(model(tokens, last=last)[0], whole[:, -last:])
        if last >= 5:
            assert torch.allclose(model(tokens, targets, last=last)[1], loss)


@pytest.mark.parametrize("memory", ["lm2", "rmt", "none"])
@pytest.mark.parametrize("prompt", [1, 3, 4, 5, 8, 13])
def test_generating_equals_the_full_forward(memory, prompt):
    model, tokens = random_model(memory=memory), random_tokens(T=prompt)
    text = model.generate(tokens, 15, temperature=0)
    assert text.shape == (2, prompt + 15) and torch.equal(text[:, :prompt], tokens)
    assert torch.equal(model(text)[0][:, prompt - 1:-1].argmax(-1), text[:, prompt:])


@pytest.mark.parametrize("T", [1, 3, 4, 9])
@pytest.mark.parametrize("N, d", [(1, 8), (3, 8), (20, 8), (5, 12)])
@pytest.mark.parametrize("layers", [0, 1, 2])
def test_any_lengths_slots_and_widths_fit(T, N, d, layers):
    model = random_model(memory_slots=N, n_embd=d, memory_layers=layers)
    logits, loss, memory = model(random_tokens(T=T), random_tokens(T=T, seed=1))
    assert logits.shape == (2, T, 11) and loss.ndim == 0
    assert memory.banks.shape == (2, layers, N, d) and memory.tail.shape == (2, 2, d)


@pytest.mark.parametrize("switch", ["output_gate", "input_gate", "forget_gate", "address"])
def test_a_gate_switched_off_is_a_gate_wide_open_and_no_address_is_a_zero(switch):
    without, model, tokens = random_model(**{switch: False}), random_model(), random_tokens()
    assert not any(switch in name for name, _ in without.named_parameters())
    model.load_state_dict(without.state_dict(), strict=False)
    assert not torch.allclose(model(tokens)[0], without(tokens)[0])
    for name, p in model.named_parameters():
        if switch in name:
            p.data.fill_(9.0 if name.endswith("bias") else 0.0)
    assert torch.allclose(model(tokens)[0], without(tokens)[0], atol=1e-12)


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


def test_every_parameter_has_one_optimizer_and_only_matrices_decay():
    model = LM2(LM2Config(16))
    groups = [g for o in model.optimizer(weight_decay=0.1) for g in o.param_groups]
    assert sorted(id(p) for g in groups for p in g["params"]) == sorted(map(id, model.parameters()))
    decays = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    for name, p in model.named_parameters():
        spared = "_gate." in name or p.dim() != 2 or name.endswith("address") \
            or name.startswith("embedding")
        assert (id(p) in decays) == (not spared), name


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


def test_noise_from_a_book_comes_in_order_without_short_sentences_and_lookalikes(book):
    encoding, rng = babi.word_encoding(babi.count_words([BOOK])), random.Random(0)
    noise = babi.book_noise(encoding, [book])
    said = encoding.decode(babi.hide([], 300, noise, rng))
    assert "Ha!" not in said and "Mary" not in said and "bedroom" not in said
    assert re.search(r"slept at all\. Then came .* lives\. The wind rose", said)
    sample = babi.make_sample("qa1", rng)
    assert len(babi.to_tokens(sample, encoding, 777, noise, rng)[0]) == 777


def test_a_bare_sample_has_its_noise_behind_the_questions():
    encoding, rng = babi.word_encoding(), random.Random(0)
    noise = babi.make_noise(encoding, 0)
    for n_questions in (1, 4):
        sample = babi.make_sample("qa1", rng, n_questions)
        story, _ = babi.to_tokens(sample, encoding)
        tokens, targets = babi.to_tokens(sample, encoding, len(story) + 30, noise, rng, bare=True)
        assert tokens[:len(story)] == story and len(tokens) == len(targets) == len(story) + 30
        assert all(target in (-1, after) for target, after in zip(targets, tokens[1:]))
        assert max(i for i, target in enumerate(targets) if target >= 0) == len(story) - 2
        with pytest.raises(ValueError):
            babi.to_tokens(sample, encoding, len(story) - 1, noise, rng, bare=True)


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


# --------------------------------------------------------------------------------------------
# The scripts

def call(script, *flags, input=""):
    """Run a script here, which saves the start of a process: (exit status, what it printed, and
    on standard error). Warnings are errors."""
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
            runpy.run_path(os.path.join(HERE, script), run_name="__main__")
        except SystemExit as stop:
            status = stop.code or 0
        finally:
            signal.signal(signal.SIGINT, handler)
    return status, *(streams[name].detach().getvalue().decode() for name in ("stdout", "stderr"))


def run(script, *flags, input=""):
    """What a script prints that has nothing to complain about."""
    status, out, errors = call(script, *flags, input=input)
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
    with subprocess.Popen([sys.executable, *warn, "train.py", "--segments=2", "--steps=700",
                           f"--out={out}", "--eval_samples=200", "--log_every=100",
                           "--device=cpu"], cwd=HERE, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield process, out
        process.kill()


@pytest.fixture(scope="session")
def learned(long_run):
    """The long run at its end: what it printed, and its folder."""
    process, folder = long_run
    printed, errors = process.communicate(timeout=280)
    assert process.returncode == 0 and not errors, errors
    return printed, folder


TINY = ["--n_embd=16", "--n_head=2", "--n_kv_head=1", "--segments=2", "--eval_samples=4",
        "--batch_size=4", "--log_every=5", "--device=cpu"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """The folder of a run of ten steps."""
    out = tmp_path_factory.mktemp("tiny")
    assert "memory_16x" in run("train.py", *TINY, "--steps=10", f"--out={out}")
    return out


def test_resuming_is_exact(tiny, tmp_path, monkeypatch):
    read, calls = LM2.read, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return read(self, *args, **kwargs)

    monkeypatch.setattr(LM2, "read", interrupted)
    flags = [*TINY, "--steps=10", f"--out={tmp_path}"]
    assert "stopped after step 5" in run("train.py", *flags)
    run("train.py", "--resume", f"--out={tmp_path}")
    whole, resumed = (load_checkpoint(f"{folder}/ckpt.pt") for folder in (tiny, tmp_path))
    assert whole["train"]["step"] == resumed["train"]["step"] == 10
    for name, weight in whole["model"].items():
        assert torch.equal(weight, resumed["model"][name]), name
    with open(tmp_path / "log.csv") as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["5", "10"]


KILLER = """
import lm2, os, random, runpy, signal, sys, time, babilong_tiny, torch._dynamo  # loaded once
rng, kills, sys.argv = random.Random(0), 0, sys.argv[1:]
saved = lambda: os.path.exists(path) and os.stat(path).st_mtime_ns
path = sys.argv[-1] + "/ckpt.pt"
while True:
    before, child = saved(), os.fork()
    if not child:
        if before:
            sys.argv.insert(1, "--resume")
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
    flags = [*TINY, "--task=qa1,qa7", "--steps=240", "--save_every=3", "--eval_times=0"]
    run("train.py", *flags, f"--out={tmp_path}/whole")
    done = subprocess.run([sys.executable, "-c", KILLER, "train.py", *flags, f"{tmp_path}/killed"],
                          cwd=HERE, text=True, capture_output=True, timeout=280)
    assert done.stderr == "after 20 kills, status 0\n", done.stderr
    whole, killed = (load_checkpoint(tmp_path / name / "ckpt.pt") for name in ("whole", "killed"))
    assert whole["train"]["step"] == killed["train"]["step"] == 240
    assert all(torch.equal(weight, killed["model"][name]) for name, weight in
               whole["model"].items())
    logs = [list(csv.DictReader(open(tmp_path / name / "log.csv"))) for name in ("whole", "killed")]
    assert [(row["step"], row["loss"]) for row in logs[0]][-5:] == \
        [(row["step"], row["loss"]) for row in logs[1]][-5:]


def test_a_full_disk_leaves_the_older_checkpoint_whole(tiny, tmp_path):
    """No file may grow beyond 100 kB, which is more than the log and less than a checkpoint."""
    resource = pytest.importorskip("resource")
    shutil.copytree(tiny, tmp_path / "o")
    longer = torch.load(tmp_path / "o" / "ckpt.pt", weights_only=True)
    longer["train"]["flags"]["steps"] = 20
    torch.save(longer, tmp_path / "o" / "ckpt.pt")
    before = (tmp_path / "o" / "ckpt.pt").read_bytes()
    done = subprocess.run(
        [sys.executable, "train.py", "--resume", f"--out={tmp_path}/o"], cwd=HERE, text=True,
        capture_output=True, timeout=280,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "make room" in done.stderr
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
    flags = [*TINY, "--task=qa1,qa7", "--steps=20", "--threshold=0.01", "--eval_samples=2"]
    run("train.py", *flags, f"--out={tmp_path}/one")
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc_per_node=2", "train.py", *flags, f"--out={tmp_path}/two"],
                          cwd=HERE, text=True, capture_output=True, timeout=280)
    assert done.returncode == 0, done.stderr
    one, two = (list(csv.DictReader(open(tmp_path / name / "log.csv"))) for name in ("one", "two"))
    assert len(one) == len(two) == 4
    for a, b in zip(one, two):
        assert a["qa1_stage"] == b["qa1_stage"]
        assert abs(float(a["loss"]) - float(b["loss"])) < 2e-3
    assert LM2.load(tmp_path / "two" / "ckpt.pt")


def test_a_checkpoint_is_plain_data_and_loads_with_its_tokenizer(tiny):
    torch.load(tiny / "ckpt.pt", weights_only=True)
    model, encoding = LM2.load(tiny / "ckpt.pt")
    assert encoding.decode(encoding.encode_ordinary(" Mary?")) == " Mary?"
    assert model.config.vocab_size == encoding.n_vocab


def test_an_earlier_run_is_never_overwritten(tmp_path):
    (tmp_path / "ckpt.pt").write_text("precious")
    assert "--resume" in refused("train.py", *TINY, "--steps=1", f"--out={tmp_path}")
    assert (tmp_path / "ckpt.pt").read_text() == "precious" and len(os.listdir(tmp_path)) == 1


def test_any_text_can_be_learned(tmp_path):
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 400)
    out = run("train.py", *TINY, f"--data={tmp_path}/text.txt", "--steps=80", "--window=2",
              f"--out={tmp_path}/o",
              "--log_every=30")
    assert float(re.search(r"bits_per_byte: ([\d.]+)", out)[1]) < 1.0
    text = run("sample.py", f"--ckpt={tmp_path}/o/ckpt.pt", "--prompt=the cat", "--temperature=0",
               "--max_new_tokens=12")
    assert text.startswith("the cat ") and "sat on the mat." in text


def test_sample_answers_from_flags_files_pipes_lines_and_a_saved_memory(tiny, tmp_path):
    ckpt, ask = f"--ckpt={tiny}/ckpt.pt", "--ask=Where is Mary?"
    story = "Mary went to the kitchen. John moved to the office. " * 20
    said = run("sample.py", ckpt, f"--story={story}", ask)
    (tmp_path / "story.txt").write_text(story)
    assert run("sample.py", ckpt, f"--story={tmp_path}/story.txt", "--ask=Where is Mary") == said
    typed = "Mary went to the kitchen.\n\nJohn moved to the office\n" * 20 + "Where is Mary?\n"
    assert run("sample.py", ckpt, input=typed) == said
    memory = f"{tmp_path}/memory.pt"
    out = run("sample.py", ckpt, "--read=-", f"--save_memory={memory}", ask, input=story)
    assert re.match("read 240 tokens in", out) and out.endswith(said)
    assert run("sample.py", ckpt, f"--load_memory={memory}", ask) == said
    torch.load(memory, weights_only=True)


def test_a_chat_has_commands_and_a_question_leaves_no_trace(tiny, tmp_path):
    (tmp_path / "story.txt").write_text("Mary went to the kitchen. " * 15)
    typed = f"/load {tmp_path}/story.txt\n/memory\nWhere is Mary?\n/memory\n/reset\n/memory\n/x\n"
    out = run("sample.py", f"--ckpt={tiny}/ckpt.pt", input=typed)
    first, second = re.findall(r"(?:^  .*\n)+", out, flags=re.M)[:2]
    assert "read 90 tokens" in out and "block 1, slot" in first and second.startswith(first)
    assert "nothing to trace" in out and "no command /x" in out


def test_a_text_is_read_in_pieces_as_it_would_be_at_once(tiny):
    model, encoding = LM2.load(tiny / "ckpt.pt")
    text = BOOK * 4 + "na\u00efve end"
    read = list(sample.pieces(io.BytesIO(text.encode()), size=50))
    assert "".join(read) == text and len(read) > 10
    tokens = encoding.encode_ordinary(sample.tidy(text))
    assert [t for piece in read for t in encoding.encode_ordinary(sample.tidy(piece))] == tokens
    reader = sample.Reader(model)
    for start in range(0, len(tokens), 37):
        reader.read(tokens[start:start + 37])
    assert len(reader.rest) < 64 and reader.count == len(tokens)
    whole = model.generate(torch.tensor([tokens]), 70, temperature=0)[0, len(tokens):].tolist()
    assert reader.generate([], 70, temperature=0) == whole
    assert reader.generate([], 70, temperature=0) == whole


def test_the_recorder_changes_nothing_and_records_what_was_computed():
    model, tokens = random_model(), random_tokens(B=1, T=11)
    expected = model(tokens)[0]
    with torch.no_grad(), sample.Recorder(model) as recorder:
        assert torch.equal(model(tokens)[0], expected)
        assert torch.equal(model.generate(tokens, 5, temperature=0)[:, :11], tokens)
    assert not any(module._forward_hooks for module in model.modules())
    assert [len(s["tokens"]) for s in recorder.segments] == [4, 4, 3, 4, 4, 4]
    first, block = recorder.segments[0], model.blocks[0]
    memory = model.fresh_memory(1)
    x = block.attention_norm(model.mixer(model.embedding(tokens[:, :4]), memory.tail)[0])
    read = block.read.attention(x, normed(memory.banks[:, 0]))[0]
    assert torch.allclose(first["read"][0].double(), read)
    assert first["write"][1].shape == (3, 4) and recorder.source[0].shape == (3, 23)
    assert torch.allclose(recorder.source[0][:, -4:], recorder.segments[-1]["write"][0])


def test_what_the_recorder_traces_stays_in_step_with_the_segments_it_keeps():
    model, tokens = random_model(), random_tokens(B=1, T=38)
    with torch.no_grad(), sample.Recorder(model, keep=3) as recorder:
        model(tokens)
    assert [s["number"] for s in recorder.segments] == [8, 9, 10]
    assert recorder.text() == tokens[0, 28:].tolist() and recorder.source[0].shape == (3, 10)
    assert recorder.before[0].shape == (3, 8) and len(recorder.traced()) == 8


def test_the_answer_is_shown_with_what_it_was_read_from(tiny, tmp_path):
    out = run("sample.py", f"--ckpt={tiny}/ckpt.pt", "--story=" + "Mary went to the kitchen. " * 15,
              "--ask=Where is Mary?", "--show", f"--html={tmp_path}/page.html")
    assert "segment 2 | mean gates input" in out and "was read from" in out
    page = (tmp_path / "page.html").read_text()
    assert "http" not in page and "kitchen" in page and "DATA" not in page
    segments = json.loads(re.search(r"const data = (.*);", page)[1])
    assert [segment["number"] for segment in segments] == [1, 2]
    assert len(segments[0]["tokens"]) == 64
    for segment in segments:
        for block in segment["blocks"]:
            for kind in ("read", "write", "again"):
                assert len(block[kind]) == 16
                assert all(len(slot) == len(segment["tokens"]) for slot in block[kind])


def test_a_question_never_seen_is_answered_with_a_hint(tiny):
    status, _, errors = call("sample.py", f"--ckpt={tiny}/ckpt.pt", "--story=Mary ate.",
                             "--ask=Why did Zoe sing?")
    assert status == 0 and errors.startswith("hint: ") and "Zoe" in errors


def test_several_tasks_are_learned_and_scored_together(tiny, tmp_path, book):
    out = run("train.py", *TINY, "--task=qa1,qa8", f"--noise={book}", "--steps=10",
              f"--out={tmp_path}/o")
    assert "qa1 1:0." in out and "memory_qa8: " in out
    with open(tmp_path / "o" / "log.csv") as file:
        assert {"qa1", "qa8_stage"} <= set(file.readline().strip().split(","))
    out = run("babilong_tiny.py", f"--ckpt={tmp_path}/o/ckpt.pt", "--lengths=0,1k,2k",
              "--samples=5,3,3", f"--noise={book}")
    assert re.search(r"qa8 +0\.\d{3} ±0\.\d{3} ", out) and "last mentioned" in out
    with open(tmp_path / "o" / "babilong.csv") as file:
        cells = list(csv.DictReader(file))
    assert [(c["task"], c["tokens"], c["samples"]) for c in cells] == [
        (task, length, samples) for task in ("qa1", "qa8")
        for length, samples in (("0", "5"), ("1024", "3"), ("2048", "3"))]


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


def test_retrieval_finds_the_sentences_that_name_what_is_asked():
    facts = ["Mary went to the kitchen.", "The old fox slept.", "John took the milk there.",
             "Mary moved to the garden.", "A ship sank near the bridge, and all were lost."]
    sample = babi.Sample(tuple(facts), (babi.Question("Where is Mary?", "garden", (3,)),))
    assert babi.retrieve(" ".join(facts), sample, 1).facts == (facts[3],)
    assert babi.retrieve(" ".join(facts), sample, 2).facts == (facts[0], facts[3])
    assert babi.retrieve(" ".join(facts), sample, 9).facts == tuple(facts)
    # by hand: one of three texts of two words holds the word, once
    rare = math.log(1 + 2.5 / 1.5)
    assert babi.bm25(["a b", "c d", "e f"], "a") == pytest.approx([rare * 2.5 / 2.5, 0, 0])


def test_statistics_are_printed_for_every_task():
    out = run("babilong_tiny.py", "--stats")
    assert out.count("released") == out.count("generated") == 10


def test_a_reader_that_goes_away_sees_no_traceback():
    printing = subprocess.Popen([sys.executable, "babilong_tiny.py", "--samples=2000"], cwd=HERE,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert printing.stdout.readline().startswith("---")
    printing.stdout.close()
    assert printing.stderr.read() == "" and printing.wait() == 141


def test_samples_are_printed_with_their_support_marked():
    out = run("babilong_tiny.py", "--samples=2", "--task=qa2", "--length=512")
    assert out.count("->") == 2 and ">> " in out and "512 tokens" in out


@pytest.mark.parametrize("script, flags, names", [
    ("train.py", ["--stepz=3"], "--stepz"),
    ("train.py", ["--n_lay=3"], "--n_lay"),
    ("train.py", ["--steps=many"], "--steps"),
    ("train.py", ["--steps=-1"], "--steps"),
    ("train.py", ["--lr=nan"], "--lr"),
    ("train.py", ["--lr=1e308"], "--lr"),
    ("train.py", ["--seed=99999999999999999999999"], "--seed"),
    ("train.py", ["--block_size=16"], "--block_size"),
    ("train.py", ["--n_embd=100000000"], "memory"),
    ("train.py", ["--n_head=3", "--n_kv_head=1"], "n_embd"),
    ("train.py", ["--n_kv_head=3"], "n_kv_head"),
    ("train.py", ["--memory_slots=0"], "memory_slots"),
    ("train.py", ["--n_embd=-64"], "n_embd"),
    ("train.py", ["--device=tpu"], "--device"),
    ("train.py", ["--data=nowhere.txt"], "nowhere.txt"),
    ("train.py", ["--data={tmp}/empty.txt"], "empty"),
    ("train.py", ["--data={tmp}/short.txt"], "short.txt"),
    ("train.py", ["--data={tmp}/noise.bin"], "UTF-8"),
    ("train.py", ["--data={tmp}"], "--data"),
    ("train.py", ["--tokenizer=nope"], "nope"),
    ("train.py", ["--tokenizer={tmp}/noise.bin"], "noise.bin"),
    ("train.py", ["--babi_dir={tmp}"], "qa1"),
    ("train.py", ["--out={tmp}/short.txt"], "--out"),
    ("train.py", ["--resume", "--out={tmp}"], "no checkpoint"),
    ("train.py", ["--resume", "--out={cut}"], "cut short"),
    ("train.py", ["--resume", "--out={tiny}", "--n_layer=3"], "--n_layer"),
    ("sample.py", ["--ckpt={tmp}/nowhere.pt", "--ask=x"], "nowhere.pt"),
    ("sample.py", ["--ckpt={tmp}/noise.bin", "--ask=x"], "noise.bin"),
    ("sample.py", ["--ckpt={cut}/ckpt.pt", "--ask=x"], "cut short"),
    ("sample.py", ["--ckpt={tiny}/ckpt.pt", "--ask= "], "--ask"),
    ("sample.py", ["--ckpt={tiny}/ckpt.pt", "--ask="], "--ask"),
    ("sample.py", ["--ckpt={tiny}/ckpt.pt", "--prompt="], "--prompt"),
    ("sample.py", ["--ckpt={tiny}/ckpt.pt", "--prompt=x", "--temperature=nan"], "--temperature"),
    ("sample.py", ["--ckpt={tiny}/ckpt.pt", "--story=nowhere.txt", "--ask=x"], "nowhere.txt"),
    ("sample.py", ["--ckpt={tiny}/ckpt.pt", "--story={tmp}", "--ask=x"], "--story"),
    ("sample.py", ["--ckpt={tiny}/ckpt.pt", "--read={tmp}/nowhere.txt"], "nowhere.txt"),
    ("sample.py", ["--ckpt={tiny}/ckpt.pt", "--read={tmp}/noise.bin"], "UTF-8"),
    ("sample.py", ["--ckpt={tiny}/ckpt.pt", "--load_memory={tmp}/nowhere.pt"], "nowhere.pt"),
    ("sample.py", ["--ckpt={tiny}/ckpt.pt", "--load_memory={tmp}/noise.bin"], "noise.bin"),
    ("sample.py", ["--ckpt={tiny}/ckpt.pt", "--load_memory={other}"], "another model"),
    ("sample.py", ["--ckpt={tiny}/ckpt.pt", "--story=x y", "--save_memory={tmp}/short.txt"],
     "already"),
    ("sample.py", ["--ckpt={tiny}/ckpt.pt", "--story=x y", "--save_memory={tmp}/no/x"], "folder"),
    ("sample.py", ["--ckpt={tiny}/ckpt.pt", "--story=x y", "--show"], "--ask"),
    ("sample.py", ["--ckpt={shape}", "--ask=x"], "fits"),
    ("sample.py", ["--ckpt={tiny}/ckpt.pt", "--ask=x", "--device=cuda:99"], "--device"),
    ("sample.py", ["--ckpt={tiny}/ckpt.pt", "--story={tmp}/noise.bin", "--ask=x"], "UTF-8"),
    ("train.py", ["--task=qa1,qa99"], "qa99"),
    ("train.py", ["--noise={tmp}/short.txt"], "0 sentences"),
    ("train.py", ["--noise={tmp}/noise.bin"], "UTF-8"),
    ("train.py", ["--noise={tmp}/nowhere.txt"], "nowhere.txt"),
    ("train.py", ["--memory=rmt", "--full_window"], "--full_window"),
    ("train.py", ["--compare=text"], "--data"),
    ("train.py", ["--compare=parts", "--memory=rmt"], "--memory"),
    ("train.py", ["--compare=memory", "--samples=0"], "--samples"),
    ("train.py", ["--compare=memory", "--bench"], "--bench"),
    ("train.py", ["--out={tmp}/log"], "log.csv"),
    ("sample.py", ["--ckpt={tiny}/ckpt.pt", "--prompt=x", "--temperature=1e-40"], "--temperature"),
    ("sample.py", ["--ckpt={tiny}/ckpt.pt", "--story=x y", "--ask=x", "--save_memory={tmp}/same",
                   "--html={tmp}/same"], "same file"),
    ("train.py", ["--compare=memory", "--lengths=0,9"], "--lengths"),
    ("train.py", ["--compare=memory", "--babi_dir={tmp}/babi"], "line 2"),
    ("babilong_tiny.py", ["--task=qa99"], "qa99"),
    ("babilong_tiny.py", ["--noise={tmp}/noise.bin"], "UTF-8"),
    ("babilong_tiny.py", ["--babi_dir={tmp}/babi"], "line 2"),
    ("babilong_tiny.py", ["--ckpt={tiny}/ckpt.pt", "--lengths=12"], "12 tokens"),
    ("babilong_tiny.py", ["--ckpt={tiny}/ckpt.pt", "--lengths=1q"], "1q"),
    ("babilong_tiny.py", ["--ckpt={tiny}/ckpt.pt", "--tasks=qa0"], "qa0"),
    ("babilong_tiny.py", ["--ckpt={tmp}/noise.bin"], "noise.bin"),
    ("babilong_tiny.py", ["--ckpt={tiny}/ckpt.pt", "--samples=0"], "--samples"),
    ("babilong_tiny.py", ["--ckpt={tiny}/ckpt.pt", "--retrieve=-1"], "--retrieve"),
    ("babilong_tiny.py", ["--ckpt={tiny}/ckpt.pt", "--csv={tmp}/short.txt"], "already"),
    ("babilong_tiny.py", ["--noise={tmp}/facts.txt"], "0 sentences"),
    ("babilong_tiny.py", ["--length=12"], "--length"),
    ("babilong_tiny.py", ["--facts_in=0.5,0.1"], "--facts_in"),
    ("babilong_tiny.py", ["--babi_dir={tmp}/nowhere"], "--babi_dir"),
])
def test_bad_input_gets_one_clear_line(script, flags, names, tiny, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short")
    (tmp_path / "facts.txt").write_text("Mary went with all the others to the old office. " * 200)
    (tmp_path / "log").mkdir()
    (tmp_path / "log" / "log.csv").write_text("a log,of my own\n1,2\n")
    (tmp_path / "babi").mkdir()
    (tmp_path / "babi" / "qa1_x.txt").write_text("1 Mary went to the office.\n2 Where is Mary? x\t")
    (tmp_path / "noise.bin").write_bytes(bytes(range(256)) * 9)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "ckpt.pt").write_bytes((tiny / "ckpt.pt").read_bytes()[:5000])
    other = torch.load(tiny / "ckpt.pt", weights_only=True)
    other["config"]["n_embd"] = 32
    torch.save(other, tmp_path / "shape.pt")
    model = LM2.load(tiny / "ckpt.pt")[0]
    torch.nn.init.normal_(model.embedding.weight)
    sample.save_memory(sample.Reader(model), str(tmp_path / "other.pt"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    flags = [f.format(tmp=tmp_path, tiny=tiny, cut=tmp_path / "cut", shape=tmp_path / "shape.pt",
                      other=tmp_path / "other.pt") for f in flags]
    if script == "train.py" and not any(f.startswith("--out") for f in flags):
        flags.append(f"--out={tmp_path}/out")
    assert names in refused(script, *flags)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


JUNK = ("", " ", "-1", "0", "nan", "inf", "-inf", "1e999", "9" * 5000, "x" * 20000, "0x10",
        "\n\r\t\x1b[31m", "\udcff\udc80", "\N{FOX FACE}" * 50, "../../x", "/dev/null", "%s%n{0}",
        "1,2,,3", "0.5,0.1", "True", "--", "-", "=", "qa1,qa1,", "1k,2k,", "1_000", "None", "[]",
        "all,all", "cuda:-1")


def hostile_flags(rng, names):
    names = [f"--{name}" for name in names] + ["--no-such", "-x", "--out-"]
    return [rng.choice((f"{rng.choice(names)}={rng.choice(JUNK)}", rng.choice(JUNK),
                        rng.choice(names), f"--no-{rng.choice(names)[2:]}"))
            for _ in range(rng.randint(1, 4))]


def test_hostile_flags_get_one_line(tmp_path, monkeypatch, capsys):
    rng = random.Random(1)
    monkeypatch.chdir(tmp_path)
    for config in (babi.Flags, sample.Flags):
        names = [f.name for f in dataclasses.fields(config)]
        for _ in range(500):
            try:
                assert isinstance(babi.parse_flags(config, "", hostile_flags(rng, names)), config)
            except SystemExit as stop:
                said = capsys.readouterr().err
                assert stop.code == 2 and said.count("\n") == 1 and len(said) < 1000, said
    names = set(re.findall(r"--(\w+)", call("train.py", "--help")[1])) - {"help"}
    names = sorted(name for name in names if not name.startswith("no_"))
    for _ in range(100):  # the whole script; the last flag is never right
        refused("train.py", *hostile_flags(rng, names), "--steps=0")
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
        except ValueError as error:
            assert "\n" not in str(error) and str(path) in str(error), error
        text = "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0xD800),
                                       rng.randrange(0xE000, 0x110000)))) for _ in range(200))
        assert encoding.decode(encoding.encode_ordinary(text)) == text


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_hostile_checkpoints_get_one_line_and_run_no_code(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rng, good = random.Random(3), (tiny / "ckpt.pt").read_bytes()
    data = torch.load(tiny / "ckpt.pt", weights_only=True)
    model = LM2.load(tiny / "ckpt.pt")[0]
    sample.save_memory(sample.Reader(model), "memory.pt")
    memory = (tmp_path / "memory.pt").read_bytes()

    def forged(trial):
        if trial % 4 == 0:
            whole = rng.choice((good, memory))
            return whole[:rng.randrange(len(whole))]                    # cut at any byte
        if trial % 4 == 1:
            broken = bytearray(rng.choice((good, memory)))
            for _ in range(rng.randint(1, 50)):
                broken[rng.randrange(len(broken))] = rng.randrange(256)
            return bytes(broken)
        if trial % 4 == 2:
            return rng.choice((pickle.dumps(Bomb(), 2), pickle.dumps({"config": Bomb()}, 2),
                               rng.randbytes(100), b"PK\3\4" + rng.randbytes(100), b""))
        changed, file = {**data, "config": dict(data["config"])}, io.BytesIO()
        part = rng.choice(("config", "model", "tokenizer"))
        value = rng.choice((None, -1, 10**6, 10**15, 1e300, "x", [], {}, [[]], True))
        changed[part] = value if rng.random() < 0.1 else {
            **changed[part], rng.choice(list(changed[part])): value}
        torch.save(changed, file)
        return file.getvalue()

    for trial in range(200):
        (tmp_path / "forged.pt").write_bytes(forged(trial))
        for load in (LM2.load, partial(sample.load_memory, model)):
            try:
                load("forged.pt")
            except ValueError as error:
                assert "\n" not in str(error) and "forged.pt" in str(error), error
    assert sorted(os.listdir(tmp_path)) == ["forged.pt", "memory.pt"]


def call_command(command):
    """subprocess.run without a process, for a script of ours."""
    return subprocess.CompletedProcess(command, call(*command[1:])[0])


def test_a_comparison_trains_every_arm_once_and_goes_on_where_it_was(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(subprocess, "run", lambda command: commands.append(
        os.path.basename(command[1])) or call_command(command))
    out = ["train.py", "--compare=memory", *TINY, "--steps=3", "--seeds=7", "--lengths=0,256",
           "--samples=6", f"--out={tmp_path}/c"]
    first = run(*out)
    arms = ("LM2", "RMT", "vanilla", "vanilla, retrieval", "vanilla, full window")
    assert all(re.search(rf"(?m)^{arm} +[\d,]+ +\d+  \d", first) for arm in arms)
    assert commands.count("train.py") == 4 and commands.count("babilong_tiny.py") == 5
    with open(tmp_path / "c" / "memory.csv") as file:
        cells = list(csv.DictReader(file))
    assert len(cells) == len(arms) * 2 and "best constant" in cells[0]
    for path in (tmp_path / "c" / "RMT-7").glob("scores-*.csv"):
        path.unlink()
    commands.clear()
    again = run(*out)
    assert commands == ["babilong_tiny.py"]
    assert again[again.index("\nqa1, accuracy"):] == first[first.index("\nqa1, accuracy"):]
    other = [flag for flag in out if not flag.startswith("--steps")]
    assert "--steps=3, not 9" in refused(*other, "--steps=9")
    assert "--lr=0.002, not 0.005" in refused(*out, "--lr=0.005")


def test_texts_are_compared_at_equal_parameters_too(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", call_command)
    text = tmp_path / "book.txt"
    text.write_text("It was a dark and stormy night; the rain fell in torrents. " * 200)
    told = run("train.py", "--compare=text", *TINY, f"--data={text}", "--steps=3", "--seeds=0",
               "--block_size=16", "--n_layer=1", f"--out={tmp_path}/t")
    parameters = dict(re.findall(r"(?m)^(\w.*?)  +([\d,]+) +\d+  \d", told))
    count = {name: int(number.replace(",", "")) for name, number in parameters.items()}
    assert list(count) == ["memory in all blocks", "vanilla", "vanilla, as many parameters"]
    assert count["vanilla"] < 0.8 * count["memory in all blocks"]
    assert 0.9 < count["vanilla, as many parameters"] / count["memory in all blocks"] < 1.1


def test_a_comparison_names_arms_that_diverged_and_shows_its_table_when_stopped(tmp_path,
                                                                             monkeypatch):
    head = LM2.head

    def broken(self, x):
        return head(self, x) * (math.nan if self.config.memory == "rmt" else 1.0)

    def stopped_at_vanilla(command):
        return subprocess.CompletedProcess(command, 130) if "--memory=none" in command \
            else call_command(command)

    monkeypatch.setattr(LM2, "head", broken)
    monkeypatch.setattr(subprocess, "run", stopped_at_vanilla)
    told = run("train.py", "--compare=memory", *TINY, "--steps=1", "--seeds=0", "--lengths=0",
               "--samples=2", f"--out={tmp_path}")
    assert told.endswith("stopped; the same command goes on from here\n")
    assert "no longer a number: RMT, seed 0\n" in told
    assert re.search(r"(?m)^LM2 +[\d,]+ ", told) and not re.search(r"(?m)^RMT +[\d,]+ ", told)


def test_the_memory_is_learned_and_nothing_else_does_it(learned):
    """Facts in the first segment, questions in the second: right with the bank, chance without."""
    out, _ = learned
    accuracy = {key: float(value) for key, value in re.findall(r"(\w+_1x): ([\d.]+)", out)}
    assert accuracy["memory_1x"] > 0.8, out
    assert accuracy["wiped_1x"] < 0.35 and accuracy["swapped_1x"] < 0.45, out


def test_the_study_shows_that_the_write_moves_the_attention(learned, tmp_path):
    """A bank frozen before the update is read as before it; the news is read after it alone."""
    shutil.copy(learned[1] / "ckpt.pt", tmp_path)
    out = run("sample.py", f"--ckpt={tmp_path}/ckpt.pt", "--study")
    rows = re.findall(r"(?m)^  (\S.*?)  +([\d.]+) +([\d.]+) +([\d.]+)$", out)
    assert len(rows) == 8
    for fact, *shares in rows:
        before, after, frozen = map(float, shares)
        assert abs(before - frozen) < 0.05 and (fact != "Mary moved to the garden."
                                                or before == frozen == 0 < after), out
    assert re.search(r"answer +kitchen +\w+ +kitchen\n", out), out


def test_scores_are_what_generation_says(learned):
    """The table's exact match, of stories it has learned to answer and of others."""
    model, encoding = LM2.load(learned[1] / "ckpt.pt")
    rng, seen = random.Random(0), set()
    samples = [babi.make_sample(task, rng) for task in ("qa1", "qa8") for _ in range(20)]
    for sample, right in babi.score(model, encoding, samples, 0, None, rng):
        question = sample.questions[0]
        prompt = encoding.encode_ordinary(" " + " ".join((*sample.facts, question.text)))
        said = model.generate(torch.tensor([prompt]), 8, temperature=0)[0, len(prompt):].tolist()
        answer = encoding.encode_ordinary(babi.answer_text(question.answer))
        assert right == (said[:len(answer)] == answer)
        seen.add(right)
    assert seen == {True, False}
