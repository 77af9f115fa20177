"""LM2, the Large Memory Model (Kang et al. 2025, arXiv 2502.06049), in one file.

A Llama-style decoder that reads long text in short segments. Attention sees its own segment
only. What must cross a segment border goes through memory banks: every block reads its bank by
cross-attention, and after the segment updates it through LSTM-like gates. (The local mixer, for
its part, carries the last few token embeddings over the border.)

Here are the decoder (RMSNorm, rotary positions, grouped-query attention, SwiGLU, no biases, tied
head), the memory with a switch for each gate, the rivals memory="rmt" (Recurrent Memory
Transformer) and memory="none", a local mixer (a short causal convolution over the embeddings),
generation, Muon and loading. Not here: dropout, pretrained weights, several processes.

Glossary (B batch, S segments, T tokens of a segment, N memory slots, d width, V vocabulary)
    in the code     in the paper     shape      what it is
    bank            M_t              B x N x d  a block's memory bank; starts as eye(N, d)
    x               E_t, E_attn      B x T x d  token embeddings on their way through the blocks
    recalled        E_mem            B x T x d  what the tokens read from the bank
    output_gate     g_out            B x T x d  how much of it joins the decoder
    candidate       (E_mem in 4-6)   B x N x d  what the slots would take up from the segment
    input_gate      g_in             B x N x d  how much of that is written
    forget_gate     g_forget         B x N x d  how much of the old slot stays
    address         -                N x d      learned names of the slots, one to be read by, one
                                                to write by (ours)

Where this departs from the paper, and why
    * The paper's eqs. 3-6 mix T-row gates with N-row memory and only type-check for T = N. Here the
      output gate multiplies what was read, and slots collect their news by cross-attention over
      the segment's tokens, so T, N and d are free.
    * No token may see a later one. A block reads its bank as the *previous* segments left it and
      writes it after the segment, so causality holds by construction.
    * Every block has a bank of its own; in the paper the blocks write one in turn, M_t -> M_{t+1}.
      So none overwrites what another took up, and a block can take up many segments before the
      next block does: attention works on all of them at once, in few large products.
    * Gates can shut and open wholly, and each slot has its own gate biases: see `Gate`.
    * The banks are an argument and a return value, and each document starts afresh. Nothing is kept
      between calls, and gradient flows through every segment.
"""
import math
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class LM2Config:
    """Sizes and switches of a model. Raises ValueError where they cannot go together."""
    vocab_size: int
    block_size: int = 64        # tokens in a segment
    n_layer: int = 2
    n_head: int = 4             # query heads
    n_kv_head: int = 2          # key/value heads, each shared by n_head / n_kv_head query heads
    n_embd: int = 64            # width d
    conv: int = 7               # tokens the local mixer sees; 0 = no mixer
    memory: str = "lm2"         # "lm2"; "rmt", the rival; or "none" for the decoder alone
    memory_slots: int = 16      # N
    memory_layers: int = -1     # lm2: the first k blocks carry the memory; -1 = all
    output_gate: bool = True    # False: everything that was read joins the decoder
    input_gate: bool = True     # False: always 1
    forget_gate: bool = True    # False: always 1
    address: bool = True        # False: slots have no learned names
    rope_base: float = 10000.0  # base of the rotary wavelengths

    def __post_init__(self):
        limits = {name: (1, 2**31) for name in ("vocab_size", "n_head", "n_kv_head", "n_embd")} | {
            "n_layer": (1, 1000), "block_size": (1, 2**24), "memory_slots": (1, 2**16),
            "conv": (0, 2**31), "memory_layers": (-1, self.n_layer)}
        for name, (least, most) in limits.items():
            if not least <= (value := getattr(self, name)) <= most:
                raise ValueError(f"{name} is {value}; it must be from {least} to {most}")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd ({self.n_embd}) must be a multiple of 2 * n_head "
                             f"({2 * self.n_head}): rotary positions turn pairs of channels")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head ({self.n_head}) must be a multiple of n_kv_head "
                             f"({self.n_kv_head}): query heads share key/value heads evenly")
        if self.memory not in ("lm2", "rmt", "none"):
            raise ValueError(f"memory is {self.memory!r}; use 'lm2', 'rmt' or 'none'")


# --------------------------------------------------------------------------------------------
# Small helpers

def normed(x):
    """x scaled to a root mean square of 1 over its last dimension (RMSNorm without weights)."""
    if x.device.type != "cpu":
        return F.rms_norm(x, x.shape[-1:])
    # the same: on a CPU PyTorch's takes four times as long in the backward pass
    square = torch.linalg.vecdot(x, x)[..., None] / x.size(-1)
    return x * (square + torch.finfo(x.dtype).eps).rsqrt()


class RMSNorm(nn.RMSNorm):
    """PyTorch's, with learned weights, computed by `normed`."""

    def forward(self, x):
        return normed(x) * self.weight


def attend(q, k, or_nothing=False):
    """softmax(q k^T / sqrt(d)) with one head, as in eq. 1. q (B, Q, d), k (B, K, d) -> (B, Q, K).

    With `or_nothing` there is one key more, all zero, for a query to attend to nothing.
    """
    scores = q @ (k / k.size(-1) ** 0.5).mT
    return F.pad(scores, (0, 1)).softmax(-1)[..., :-1] if or_nothing else scores.softmax(-1)


# --------------------------------------------------------------------------------------------
# The decoder

class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021) first .. first + length - 1, for `dim` channels."""

    def __init__(self, length, dim, base, first=0):
        super().__init__()
        frequency = base ** (-torch.arange(0, dim, 2) / dim)                # (dim / 2)
        angle = torch.arange(first, first + length)[:, None] * frequency    # (length, dim / 2)
        self.register_buffer("cos", torch.cat((angle.cos(), angle.cos()), -1), persistent=False)
        self.register_buffer("sin", torch.cat((-angle.sin(), angle.sin()), -1), persistent=False)

    def forward(self, x, start=0):
        """Turn the channel pairs of x (..., T, dim), whose first row is number `start`."""
        rows = slice(start, start + x.size(-2) or None)                 # from the end if start < 0
        other = x.roll(x.size(-1) // 2, dims=-1)                        # of each pair
        return (x * self.cos[rows] + other * self.sin[rows]).type_as(x)


class Attention(nn.Module):
    """Grouped-query self-attention within one segment."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.n_embd // config.n_head
        self.query = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.key_value = nn.Linear(config.n_embd, 2 * self.n_kv_head * self.head_dim, bias=False)
        self.output = nn.Linear(config.n_embd, config.n_embd, bias=False)
        extra = 2 * config.memory_slots if config.memory == "rmt" else 0
        self.rotary = Rotary(config.block_size + extra, self.head_dim, config.rope_base)

    def forward(self, x, cache=None, mask=None):
        """x (B, T, d) -> (B, T, d), causal unless a mask (T, T) says which positions see which.

        With a cache (a dictionary) x goes on where it ends; it gets x's keys and values.
        """
        B, T, d = x.shape
        q = self.query(x).view(B, T, self.n_head, self.head_dim).transpose(1, 2)   # (B, H, T, h)
        kv = self.key_value(x).view(B, T, 2 * self.n_kv_head, self.head_dim)
        k, v = kv.transpose(1, 2).chunk(2, dim=1)                                  # (B, KV, T, h)
        start = cache["key"].size(2) if cache else 0
        q, k = self.rotary(q, start), self.rotary(k, start)
        if cache:
            k, v = torch.cat((cache["key"], k), 2), torch.cat((cache["value"], v), 2)
        if cache is not None:
            cache |= {"key": k, "value": v}
        # one token of a cached segment sees all before it: that needs no mask
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1,
                                           enable_gqa=self.n_head != self.n_kv_head)
        return self.output(y.transpose(1, 2).reshape(B, T, d))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020), 8/3 d wide as in Llama."""

    def __init__(self, config):
        super().__init__()
        hidden = max(8, 8 * config.n_embd // 3 // 8 * 8)
        self.gate_up = nn.Linear(config.n_embd, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, config.n_embd, bias=False)

    def forward(self, x):
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class LocalMixer(nn.Module):
    """Causal depthwise convolution: each token sees its own embedding and those of the few before.

    Without it a tiny decoder spends thousands of steps learning to bind a name to what follows. It
    runs on over segment borders, which would else tear "Mary went to the" from "kitchen."
    """

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_embd, 1, config.conv))

    def forward(self, x, tail):
        """x (B, T, d), tail (B, width - 1, d) what stood before it -> (B, T, d), the new tail."""
        x = torch.cat((tail, x), dim=1)                                 # (B, width - 1 + T, d)
        mixed = F.conv1d(x.transpose(1, 2), self.weight, groups=x.size(-1)).transpose(1, 2)
        return mixed.type_as(x), x[:, x.size(1) - tail.size(1):]


# --------------------------------------------------------------------------------------------
# The memory

class Gate(nn.Module):
    """sigmoid(W x + b), stretched to -0.1 .. 1.1 and cut at 0 and 1: it can shut and open wholly.

    A plain sigmoid never does either, and what leaks at every segment drowns a fact after a few
    hundred. With `slots`, b has a row for each of them: a slot can be a latch or a scratch pad.
    """

    def __init__(self, width_in, width, slots=None):
        super().__init__()
        self.linear = nn.Linear(width_in, width, bias=False)
        self.bias = nn.Parameter(torch.empty((slots, width) if slots else (width,)))

    def forward(self, x, attention=None):
        """x (B, N, width_in) -> (B, N, width), from 0 to 1; with attention (B, T, N) the gates of
        what T tokens read of x: its rows sum to 1, so W can go first, as slots are fewer."""
        x = self.linear(x) + self.bias
        x = torch.sigmoid(x if attention is None else attention @ x)
        return F.hardtanh(1.2 * x - 0.1, 0.0, 1.0)


class MemoryRead(nn.Module):
    """Tokens read the bank by cross-attention with one head (paper eqs. 1-3)."""

    def __init__(self, config):
        super().__init__()
        d = config.n_embd
        self.query = nn.Linear(d, d, bias=False)
        self.key = nn.Linear(d, d, bias=False)
        self.value = nn.Linear(d, d, bias=False)
        self.output = nn.Linear(d, d, bias=False)
        self.output_gate = Gate(d, d) if config.output_gate else None
        self.address = nn.Parameter(torch.empty(config.memory_slots, d)) if config.address else 0.0

    def attention(self, x, slots):
        """How the tokens attend to the slots (B, N, d), normed: (B, T, N)."""
        # (E W_Q) K^T = E (K W_Q^T)^T, and there are fewer slots than tokens
        return attend(x, self.key(slots + self.address) @ self.query.weight)    # eq. 1

    def forward(self, x, bank):
        """x (B, T, d) normed, bank (B, N, d) -> what joins the attention's output, (B, T, d)."""
        slots = normed(bank)
        attention, values = self.attention(x, slots), self.value(slots)
        recalled = attention @ values                                           # eq. 2  (B, T, d)
        if self.output_gate:
            recalled = self.output_gate(values, attention) * recalled           # eq. 3
        return self.output(recalled)


class MemoryWrite(nn.Module):
    """After a segment the slots collect its news and the gates mix them in (paper eqs. 4-6)."""

    def __init__(self, config):
        super().__init__()
        d, slots = config.n_embd, config.memory_slots
        self.norm = RMSNorm(d)
        self.query = nn.Linear(d, d, bias=False)
        self.key = nn.Linear(d, d, bias=False)
        self.value = nn.Linear(d, d, bias=False)
        self.input_gate = Gate(2 * d, d, slots) if config.input_gate else None
        self.forget_gate = Gate(2 * d, d, slots) if config.forget_gate else None
        self.address = nn.Parameter(torch.empty(slots, d)) if config.address else 0.0
        # queries stand at 0, behind the segment, keys at -T .. -1: slots can prefer the latest
        self.rotary = Rotary(config.block_size, d, config.rope_base, first=-config.block_size)

    def attention(self, x, bank):
        """How the slots attend to the tokens x (B, T, d), normed: (B, N, T); to nothing as well."""
        keys = self.rotary(self.key(x), start=-x.size(1))
        return attend(self.query(normed(bank) + self.address), keys, or_nothing=True)

    def forward(self, x, bank):
        """x (B, T, d) the block's output, bank (B, N, d) -> the new bank (B, N, d)."""
        x = self.norm(x)
        # A (X W_V) = (A X) W_V, and there are fewer slots than tokens
        candidate = self.value(self.attention(x, bank) @ x)                          # (B, N, d)
        seen = torch.cat((candidate, torch.tanh(bank)), dim=-1)                      # (B, N, 2d)
        input_gate = self.input_gate(seen) if self.input_gate else 1.0                     # eq. 4
        forget_gate = self.forget_gate(seen) if self.forget_gate else 1.0                  # eq. 5
        return input_gate * torch.tanh(candidate) + forget_gate * bank                     # eq. 6


class MemoryTokens(nn.Module):
    """The rival, a Recurrent Memory Transformer's memory (Bulatov et al. 2022, arXiv 2207.06881).

    N more tokens, without gates, stand before a segment, where its tokens attend to them, and again
    behind it, where they attend to all of it; what comes out there goes before the next segment.
    """

    def __init__(self, config):
        super().__init__()
        self.before = nn.Parameter(torch.empty(config.memory_slots, config.n_embd))
        self.behind = nn.Parameter(torch.empty(config.memory_slots, config.n_embd))

    def forward(self, x, bank, blocks, caches):
        """One segment x (B, T, d) through the blocks, bank (B, N, d) -> (B, T, d), the new bank.

        With caches, see `LM2.run`, the segment goes on, and the bank stays as it is.
        """
        T, N, mask, whole = x.size(1), bank.size(1), None, caches[0] is None
        if not caches[0]:                                                   # the segment's start
            x = torch.cat((bank + self.before, x), dim=1)                   # (B, N + T, d)
        if whole:
            x = torch.cat((x, bank + self.behind), dim=1)                   # (B, N + T + N, d)
            mask = torch.ones(x.size(1), x.size(1), dtype=torch.bool, device=x.device).tril()
            mask[N + T:] = True
        for block, cache in zip(blocks, caches):
            x, _ = block(x, None, cache, mask)
        return (x[:, N:N + T], normed(x[:, N + T:])) if whole else (x[:, -T:], bank)


# --------------------------------------------------------------------------------------------
# The optimizer of the matrices

def orthogonalized(x):
    """The orthogonal matrices nearest to x (n, rows, columns), nearly: singular values .7 to 1.2
    (smaller below 0.003 of the norm), by five Newton-Schulz steps as in Jordan et al. 2024."""
    tall = x.size(1) > x.size(2)
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x,
                          beta=3.4445)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum, made orthogonal before it is subtracted.

    The same as torch.optim.Muon, but for all matrices of a shape at once, and in bfloat16 on CUDA
    alone: on a CPU without it PyTorch's takes longer than all the rest of a step.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            lr, momentum, shapes = group["lr"], group["momentum"], {}
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    mean.lerp_(p.grad, 1 - momentum)
                    shapes.setdefault(p.shape, []).append((p, p.grad.lerp(mean, momentum)))
            for (rows, columns), pairs in shapes.items():
                updates = torch.stack([update for _, update in pairs])
                updates = orthogonalized(updates.bfloat16() if updates.is_cuda else updates)
                for (p, _), update in zip(pairs, updates):
                    p.mul_(1 - lr * group["weight_decay"])
                    p.add_(update, alpha=-lr * max(1.0, rows / columns) ** 0.5)


# --------------------------------------------------------------------------------------------
# The whole

def load_checkpoint(path):
    """The dictionary in a checkpoint; only data is loaded, no code. ValueError if it is not one."""
    if not os.path.isfile(path):
        raise ValueError(f"no checkpoint {path}; train one first: python train.py")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return {key: checkpoint[key] for key in ("config", "model", "tokenizer", "train")}
    except Exception:  # torch and pickle raise a dozen kinds
        raise ValueError(f"{path} is no checkpoint of train.py, or it was cut short") from None


class Block(nn.Module):
    """A Llama block with a memory pathway beside its attention."""

    def __init__(self, config, has_memory):
        super().__init__()
        self.attention_norm = RMSNorm(config.n_embd)
        self.attention = Attention(config)
        self.read = MemoryRead(config) if has_memory else None
        self.feed_forward_norm = RMSNorm(config.n_embd)
        self.feed_forward = FeedForward(config)
        self.write = MemoryWrite(config) if has_memory else None

    def forward(self, x, bank, cache=None, mask=None):
        """x (B * S, T, d), bank (B, N, d) before the first segment or None -> x, the bank behind.

        With a cache, see `Attention`, S is 1, and the bank is read but not written.
        """
        e = self.attention_norm(x)
        x = x + self.attention(e, cache, mask)         # E_attn: the original path, untouched
        if not self.write or cache is not None:
            return self.after_attention(x, e, bank), bank
        outputs = []
        segments = (part.unflatten(0, (len(bank), -1)).unbind(1) for part in (x, e))
        for x, e in zip(*segments):                    # (B, T, d) each
            outputs.append(self.after_attention(x, e, bank))
            bank = self.write(outputs[-1], bank)
        return torch.stack(outputs, dim=1).flatten(0, 1), bank

    def after_attention(self, x, e, bank):
        """The rest of the block, for one segment if there is a bank: x, e (B, T, d)."""
        if self.read:
            x = x + self.read(e, bank)                 # E_next = E_attn + gated memory
        return x + self.feed_forward(self.feed_forward_norm(x))


class Memory(NamedTuple):
    """All that a document leaves behind for its next segment."""
    banks: torch.Tensor     # (B, K, N, d), for K blocks with memory; K is 1 with memory="rmt"
    tail: torch.Tensor      # (B, conv - 1, d), the last embeddings, for the local mixer alone


class LM2(nn.Module):
    """Decoder and memory. See the module docstring for the idea and the glossary."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        depth = config.n_layer if config.memory_layers < 0 else config.memory_layers
        depth = depth if config.memory == "lm2" else 0              # so many blocks have a memory
        self.embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.mixer = LocalMixer(config) if config.conv else None
        self.blocks = nn.ModuleList(Block(config, i < depth) for i in range(config.n_layer))
        self.memory_tokens = MemoryTokens(config) if config.memory == "rmt" else None
        self.n_banks = 1 if self.memory_tokens else depth
        self.norm = RMSNorm(config.n_embd)
        self.register_buffer("start", torch.eye(config.memory_slots, config.n_embd),
                             persistent=False)                                  # M_0, (N, d)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Every initial value.

        matrices       normal, std 1 / sqrt(fan_in): variance 1 in, variance 1 out
        outputs        0 for the matrices that end in the residual stream: every block starts as the
                       identity, and the memory of the first is learned in far fewer steps
        embedding      normal, std 1 / sqrt(d): the tied head's logits start with variance 1
        norms          1
        gate biases    0, the forget gate 2: a bank that keeps most at first gets its gradient far
        addresses      normal, std 0.1 (RMT's as well): small beside the slots' norm of sqrt(d), or
                       the tokens learn to read by slot number instead of by what a slot says
        local mixer    the token itself 1, those before it normal with std 0.3
        """
        for name, p in self.named_parameters():
            if name.endswith("norm.weight"):
                p.fill_(1.0)
            elif name.endswith("forget_gate.bias"):
                p.fill_(2.0)
            elif name.endswith(("bias", "output.weight", "down.weight")):
                p.zero_()
            elif name.endswith(("address", "before", "behind")):
                p.normal_(std=0.1)
            elif name == "mixer.weight":
                p.normal_(std=0.3)
                p[:, :, -1] = 1.0
            else:
                p.normal_(std=p.size(-1) ** -0.5)

    @property
    def device(self):
        return self.embedding.weight.device

    def fresh_memory(self, batch_size):
        """The `Memory` of a new document: every slot its row of eye(N, d), no token before it."""
        tail = self.start.new_zeros(batch_size, max(self.config.conv - 1, 0), self.config.n_embd)
        return Memory(self.start.expand(batch_size, self.n_banks, -1, -1), tail)

    def run(self, tokens, memory, caches=None):
        """All blocks: tokens (B, T) -> hidden states (B, T, d) and the memory.

        tokens are S whole segments (one for memory="rmt"), or one segment that ends early. With
        caches, a list with a dictionary for each block, they go on in a segment, and no bank is
        written: empty dictionaries at its start, then one token at a time.
        """
        (B, T), caches = tokens.shape, caches or [None] * len(self.blocks)
        x, tail = self.embedding(tokens), memory.tail
        if self.mixer:
            x, tail = self.mixer(x, tail)
        banks = [*memory.banks.unbind(1)] + [None] * (len(self.blocks) - self.n_banks)
        if self.memory_tokens:
            x, banks[0] = self.memory_tokens(x, banks[0], self.blocks, caches)
        else:
            x = x.reshape(-1, min(T, self.config.block_size), x.size(-1))       # (B * S, T, d)
            for i, block in enumerate(self.blocks):
                x, banks[i] = block(x, banks[i], caches[i])
        banks = torch.stack(banks[:self.n_banks], dim=1) if self.n_banks else memory.banks
        return x.reshape(B, T, -1), Memory(banks, tail)

    def read(self, tokens, memory=None, last=None):
        """Tokens (B, T >= 1) -> hidden states (B, T or last, d) of the last positions, the memory.

        Cutting a long input at multiples of block_size and passing the memory on gives the same as
        one call. An unfinished last segment is written as if the text ended there, so a cut
        anywhere else starts a new segment at that place. Without gradients and with `last`, a
        long context needs no more working memory than a short one.
        """
        B, T = tokens.shape
        first, size, start, hidden = T - min(last or T, T), self.config.block_size, 0, []
        memory = self.fresh_memory(B) if memory is None else memory
        # segments at once: for large matrix products, and for bounded working memory
        many = 1 if self.memory_tokens else max(1, 2**13 // (B * size))
        while start < T:
            length = min(many, (T - start) // size) * size or T - start
            output, memory = self.run(tokens[:, start:start + length], memory)
            if start + length > first:
                hidden.append(output[:, max(first - start, 0):])
            start += length
        return torch.cat(hidden, dim=1), memory                         # (B, T - first, d)

    def forward(self, tokens, targets=None, memory=None, last=None):
        """Read tokens (B, T) int64, see `read`, and predict the next ones.

        targets  (B, T) int64: the next tokens, -1 where nothing is scored
        memory   the `Memory` that an earlier call returned; None: a fresh one
        last     return and score only the last so many positions
        Returns logits (B, T or last, vocab), the mean cross-entropy in nats (None without targets)
        and the memory.
        """
        hidden, memory = self.read(tokens, memory, last)
        logits, loss = self.head(hidden), None                          # (B, T or last, vocab)
        if targets is not None:
            targets = targets[:, -logits.size(1):]
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=-1)
        return logits, loss, memory

    def head(self, x):
        """Hidden states (B, T, d) -> logits (B, T, vocab); the weights are the embedding's."""
        return F.linear(self.norm(x), self.embedding.weight)

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=None, memory=None):
        """Continue tokens (B, T >= 1) by max_new_tokens; returns both, (B, T + max_new_tokens).

        temperature 0 takes the likeliest token, top_k 0 or None chooses among all. The current
        segment's keys and values are kept; the banks are written when it is full, as in `forward`.
        """
        size, done, end = self.config.block_size, 0, tokens.size(1) + max_new_tokens
        memory = self.fresh_memory(tokens.size(0)) if memory is None else memory
        while tokens.size(1) < end:
            full = (tokens.size(1) - 1) // size * size      # the last token is still to be read
            if full > done:
                memory = self.read(tokens[:, done:full], memory, last=1)[1]
            new, so_far, caches, done = tokens[:, full:], memory, [{} for _ in self.blocks], full
            while tokens.size(1) < end and tokens.size(1) <= full + size:
                output, so_far = self.run(new, so_far, caches)
                logits = self.head(output[:, -1])                                 # (B, vocab)
                if temperature == 0:
                    new = logits.argmax(-1, keepdim=True)
                else:
                    logits = logits.float() / temperature
                    if top_k:
                        lowest = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
                        logits = logits.masked_fill(logits < lowest, -math.inf)
                    new = torch.multinomial(logits.softmax(-1), 1)                # (B, 1)
                tokens = torch.cat((tokens, new), dim=1)
        return tokens

    def optimizer(self, lr=2e-3, muon_lr=1e-2, weight_decay=0.0):
        """[Muon for the matrices inside blocks, of which all but the gates' decay, AdamW for all
        else, which does not]; step both."""
        groups = {"matrix": [], "gate": [], "rest": []}
        for name, p in self.named_parameters():
            inside = p.dim() == 2 and name.startswith("blocks.") and name.endswith("weight")
            groups["rest" if not inside else "gate" if "_gate." in name else "matrix"].append(p)
        return [Muon([{"params": groups["matrix"], "weight_decay": weight_decay},
                      {"params": groups["gate"], "weight_decay": 0.0}], lr=muon_lr),
                torch.optim.AdamW(groups["rest"], lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]

    @staticmethod
    def load(path, device="cpu"):
        """(model, tiktoken encoding) from a checkpoint. Raises ValueError if it is not one."""
        import tiktoken
        checkpoint = load_checkpoint(path)
        try:
            config, weights = LM2Config(**checkpoint["config"]), checkpoint["model"]
            with torch.device("meta"):  # a forged width or depth is found before it takes memory
                LM2(config).load_state_dict(weights, assign=True)
            model = LM2(config)
            model.load_state_dict(weights)
            tokens = [token.encode("latin-1") for token in checkpoint["tokenizer"]["tokens"]]
            encoding = tiktoken.Encoding("lm2", pat_str=checkpoint["tokenizer"]["pattern"],
                                         mergeable_ranks={t: i for i, t in enumerate(tokens)},
                                         special_tokens={})
        except Exception as error:
            why = (str(error) or type(error).__name__).splitlines()[-1].strip()
            raise ValueError(f"{path} holds no model that fits this code: {why}") from None
        return model.to(device).eval(), encoding
