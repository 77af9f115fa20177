"""LM2, the Large Memory Model (Kang et al. 2025, arXiv 2502.06049), in one file.

A Llama-style decoder that reads long text in short segments. Attention sees its own segment
only. What must cross a segment border goes through memory banks: every block reads its bank by
cross-attention, and each segment updates it through LSTM-like gates. (The local mixer, for its
part, carries the last few token embeddings over the border.)

Glossary (B batch, L tokens of a text, in S segments of T, N memory slots, d width)
    in the code     in the paper     shape          what it is
    bank            M_t              B x N x d      a block's memory bank; starts as eye(N, d)
    banks           M_0 .. M_S-1     B x S x N x d  the bank as each segment finds it
    Memory.banks    -                B x K x N x d  the banks of all K blocks that have one
    e               E_t              B x S x T x d  the normed input of a block's attention and read
    x               E_attn, E_next   B x S x T x d  the tokens on their way through the blocks
    recalled        E_mem            B x S x T x d  what the tokens read from the bank
    output_gate     g_out            B x S x T x d  how much of it joins the decoder
    news            E_t, E_mem       B x S x N x d  what the slots find in a segment
    input_gate      g_in             B x N x d      how much of that is written
    forget_gate     g_forget         B x N x d      how much of the old slot stays
    address         -                N x d          learned names of the slots to be read by (ours)
    shares          softmax(...)     B x S x T x N  attention weights (a write's: B x S x N x T)

Where this departs from the paper, and why
    * The paper's eqs. 3-6 mix T-row gates with N-row memory and only type-check for T = N. Here the
      output gate multiplies what was read, and slots collect their news by cross-attention over
      the segment's tokens, so T, N and d are free.
    * No token may see a later one. A segment reads the bank as the *previous* ones left it, so
      causality holds by construction.
    * Every block has a bank of its own; in the paper the blocks write one in turn, M_t -> M_{t+1}.
      So none overwrites what another took up, and a block takes up all segments at once, in few
      large products: only the gates' small cell runs segment by segment.
    * What a slot looks for is learned and does not depend on what it holds, so that can be found
      for all segments at once. The gates see both, as in an LSTM: W news + U tanh(bank) + b.
    * Gates can shut and open wholly: see `Gate`.
    * Also ours: the bank is normed to be read, its slots have addresses and gate biases of their
      own, a slot may find nothing (the empty key), the local mixer, blocks that start as identity.
    * The banks are an argument and a return value, and each document starts afresh. Nothing is kept
      between calls, and gradient flows through every segment.
"""
import math
import os
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F


class BadInput(ValueError):
    """What a user gave cannot be used; the message says what is wrong and what to do."""


@dataclass
class LM2Config:
    """Sizes and switches of a model. Raises BadInput where they cannot go together."""
    vocab_size: int
    block_size: int = 64        # tokens in a segment
    n_layer: int = 2
    n_head: int = 4             # query heads
    n_kv_head: int = 2          # key/value heads, each shared by n_head / n_kv_head query heads
    n_embd: int = 64            # width d
    n_hidden: int = 0           # width of the feed-forward; 0 = 8/3 n_embd, as in Llama
    conv: int = 7               # tokens the local mixer sees; 0 = no mixer
    memory: str = "lm2"         # "lm2"; "rmt", the rival; or "none" for the decoder alone
    memory_slots: int = 16      # N
    memory_layers: int = -1     # lm2: the first k blocks carry the memory; -1 = all
    output_gate: bool = True    # False: everything that was read joins the decoder
    input_gate: bool = True     # False: always 1
    forget_gate: bool = True    # False: always 1
    gates_see_bank: bool = True  # False: input and forget gate see the news alone
    hard_gates: bool = True     # False: plain sigmoids, which never shut or open wholly
    address: bool = True        # False: slots have no learned names
    rope_base: float = 10000.0  # base of the rotary wavelengths

    def __post_init__(self):
        for field in fields(self):
            name, value = field.name, getattr(self, field.name)
            least = {"conv": 0, "n_hidden": 0, "memory_layers": -1}.get(name, 1)
            most = {"n_layer": 1000, "memory_layers": self.n_layer}.get(name, 2**20)
            if type(value) is not field.type or \
                    field.type in (int, float) and not least <= value <= most:
                limits = f" from {least} to {most}" if field.type in (int, float) else ""
                raise BadInput(f"{name} is {value!r}; it must be {field.type.__name__}{limits}")
        if self.n_embd % (2 * self.n_head):
            raise BadInput(f"n_embd ({self.n_embd}) must be a multiple of 2 * n_head "
                           f"({2 * self.n_head}): rotary positions turn pairs of channels")
        if self.n_head % self.n_kv_head:
            raise BadInput(f"n_head ({self.n_head}) must be a multiple of n_kv_head "
                           f"({self.n_kv_head}): query heads share key/value heads evenly")
        if self.memory not in ("lm2", "rmt", "none"):
            raise BadInput(f"memory is {self.memory!r}; use 'lm2', 'rmt' or 'none'")


# --------------------------------------------------------------------------------------------
# Small helpers

def normed(x):
    """x scaled to a root mean square of 1 over its last dimension (RMSNorm without weights)."""
    if x.device.type != "cpu" or x.element_size() < 4:
        return F.rms_norm(x, x.shape[-1:])
    # the same: on a CPU PyTorch's takes four times as long in the backward pass
    square = torch.linalg.vecdot(x, x)[..., None] / x.size(-1)
    return x * (square + torch.finfo(x.dtype).eps).rsqrt()


class RMSNorm(nn.RMSNorm):
    """PyTorch's, with learned weights, computed by `normed`."""

    def forward(self, x):
        return normed(x) * self.weight


# --------------------------------------------------------------------------------------------
# The decoder

@lru_cache(maxsize=64)
@torch.inference_mode(False)
def rotary_tables(length, dim, base, dtype, device):
    """Cosines and sines (length, dim) of the angles that channel pairs turn by at each position."""
    frequency = base ** (-torch.arange(0, dim, 2, dtype=dtype, device=device) / dim)
    angle = torch.arange(length, device=device)[:, None] * frequency        # (length, dim / 2)
    return torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)


class Attention(nn.Module):
    """Grouped-query self-attention within each segment."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.n_kv_head = config.n_head, config.n_kv_head
        self.head_dim = config.n_embd // config.n_head
        self.query = nn.Linear(config.n_embd, config.n_embd, bias=False)
        self.key_value = nn.Linear(config.n_embd, 2 * self.n_kv_head * self.head_dim, bias=False)
        self.output = nn.Linear(config.n_embd, config.n_embd, bias=False)
        extra = 2 * config.memory_slots if config.memory == "rmt" else 0
        self.turns = config.block_size + extra, self.head_dim, config.rope_base

    def rotary(self, x, first):
        """Turn the channel pairs of x (..., T, h) by their positions, first, first + 1, ...: rotary
        positions (Su et al. 2021)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = (table[first:first + x.size(-2)]
                    for table in rotary_tables(*self.turns, dtype, x.device))
        other = x.roll(x.size(-1) // 2, dims=-1)                            # of each pair
        return (x * cos + other * sin).type_as(x)

    def forward(self, x, cache=None, mask=None):
        """x (B, S, T, d) -> (B, S, T, d), causal unless a mask (T, T) says who sees whom (True).

        Each head is softmax(q k^T / sqrt(h)) v of the slice of the width that is its own, q and k
        turned by `rotary`. `key_value` gives all heads' keys, then all heads' values; query head i
        attends with key and value head i // (n_head / n_kv_head). With a cache, a dictionary to be
        filled in place, x goes on behind the tokens it holds: while it is empty any number of
        them, then one at a time, which sees all before it.
        """
        T = x.size(-2)
        q = self.query(x).view(-1, T, self.n_head, self.head_dim).transpose(1, 2)  # (B S, H, T, h)
        kv = self.key_value(x).view(-1, T, 2 * self.n_kv_head, self.head_dim)
        k, v = kv.transpose(1, 2).chunk(2, dim=1)                                  # (B S, KV, T, h)
        first = cache["key"].size(2) if cache else 0
        q, k = self.rotary(q, first), self.rotary(k, first)
        if cache:
            k, v = torch.cat((cache["key"], k), 2), torch.cat((cache["value"], v), 2)
        if cache is not None:
            cache |= {"key": k, "value": v}
        shared = self.n_head // self.n_kv_head
        k, v = k.repeat_interleave(shared, dim=1), v.repeat_interleave(shared, dim=1)
        # one token of a cached segment sees all before it: that needs no mask
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1)
        return self.output(y.transpose(1, 2).reshape(x.shape))


class FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020)."""

    def __init__(self, config):
        super().__init__()
        hidden = config.n_hidden or max(8, 8 * config.n_embd // 3 // 8 * 8)
        self.gate = nn.Linear(config.n_embd, hidden, bias=False)
        self.up = nn.Linear(config.n_embd, hidden, bias=False)
        self.down = nn.Linear(hidden, config.n_embd, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class LocalMixer(nn.Module):
    """Causal depthwise convolution: each token sees its own embedding and those of the few before.

    Without it a tiny decoder spends thousands of steps learning to bind a name to what follows. It
    runs on over segment borders, which would else tear "Mary went to the" from "kitchen."
    """

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_embd, 1, config.conv))

    def forward(self, x, tail):
        """x (B, L, d), tail (B, conv - 1, d) what stood before it -> (B, L, d), the new tail."""
        x = torch.cat((tail, x), dim=1)                                 # (B, conv - 1 + L, d)
        mixed = F.conv1d(x.mT.contiguous(), self.weight, groups=x.size(-1))
        if mixed.requires_grad:  # MPS before PyTorch 2.6 needs it to be contiguous as well
            mixed.register_hook(torch.Tensor.contiguous)
        return mixed.mT.type_as(x), x[:, x.size(1) - tail.size(1):]


# --------------------------------------------------------------------------------------------
# The memory

class Gate(nn.Module):
    """sigmoid(x), stretched to -0.1 .. 1.1 and cut at 0 and 1: it can shut and open wholly.

    A plain sigmoid (hard=False) never does either, and what leaks at every segment drowns a fact in
    the end.
    """

    def __init__(self, hard):
        super().__init__()
        self.hard = hard

    def forward(self, x):
        x = torch.sigmoid(x)
        return F.hardtanh(1.2 * x - 0.1, 0.0, 1.0) if self.hard else x


class MemoryRead(nn.Module):
    """Tokens read the bank by cross-attention with one head (paper eqs. 1-3)."""

    def __init__(self, config):
        super().__init__()
        d = config.n_embd
        self.query = nn.Linear(d, d, bias=False)
        self.key = nn.Linear(d, d, bias=False)
        self.value = nn.Linear(d, d, bias=False)
        self.output_gate = nn.Linear(d, d)
        self.gate = Gate(config.hard_gates)
        self.address = nn.Parameter(torch.empty(config.memory_slots, d)) if config.address else 0.0

    def attention(self, e, slots):
        """Shares (B, S, T, N) by which tokens e (B, S, T, d) attend to slots (B, S, N, d), both of
        them normed already."""
        scores = self.query(e) @ self.key(slots + self.address).mT
        return (scores / e.size(-1) ** 0.5).softmax(-1)                             # eq. 1

    def forward(self, e, banks):
        """e (B, S, T, d) normed, banks (B, S, N, d) not yet -> what is to be added to x,
        (B, S, T, d). The shares are those of `self.attention`."""
        slots = normed(banks)
        recalled = self.attention(e, slots) @ self.value(slots)                     # eq. 2
        output_gate = self.gate(self.output_gate(recalled))                         # eq. 3
        return output_gate * recalled


class MemoryWrite(nn.Module):
    """Each slot is an LSTM-like cell that runs over segments (paper eqs. 4-6).

    Its input is what it finds in a segment, by a learned query of its own: one row of `query` for
    what to look for, one of `position` for where in the segment, such as near its end.
    """

    def __init__(self, config):
        super().__init__()
        d, slots = config.n_embd, config.memory_slots
        self.query = nn.Parameter(torch.empty(slots, d))
        self.position = nn.Parameter(torch.empty(slots, config.block_size))
        self.value = nn.Linear(d, d, bias=False)
        self.gate_news = nn.Linear(d, 2 * d, bias=False)        # W of eqs. 4 and 5, one product
        self.gate_bank = nn.Linear(d, 2 * d, bias=False) if config.gates_see_bank else None  # U
        self.gate_bias = nn.Parameter(torch.empty(slots, 2 * d))
        self.gate = Gate(config.hard_gates)

    def attention(self, x):
        """Shares (B, S, N, T) by which the slots attend to tokens x (B, S, T, d), normed already.

        The softmax, over tokens, of 10 query x^T / sqrt(d) + position and of one key more, whose
        score is 0 and whose share is left out: so a slot can attend to nothing. An unfinished
        segment takes the last T columns of `position`: its end counts as the end of a whole one.
        (Ten times as large as usual: queries start small, and learn soon.)
        """
        scores = 10 * (x @ self.query.T).mT / x.size(-1) ** 0.5                 # (B, S, N, T)
        scores = scores + self.position[:, -x.size(-2):]
        return F.pad(scores, (0, 1)).softmax(-1)[..., :-1]

    def forward(self, x, bank):
        """x (B, S, T, d) E_attn, not yet normed, bank (B, N, d) before the first of these segments
        -> the banks (B, S, N, d) that the segments find, and the bank (B, N, d) behind them.

        The shares are those of `self.attention`. The gates see the news as they were found, the
        slots take up their tanh; of a product of width 2d the first half is the input gate's.
        """
        x = normed(x)
        news = self.value(self.attention(x) @ x)                                # (B, S, N, d)
        seen = self.gate_news(news) + self.gate_bias                            # (B, S, N, 2d)
        banks = []
        for content, seen in zip(torch.tanh(news).unbind(1), seen.unbind(1)):   # by segment
            banks.append(bank)
            if self.gate_bank:
                seen = seen + self.gate_bank(torch.tanh(bank))
            gates = self.gate(seen)                                             # (B, N, 2d)
            input_gate, forget_gate = gates.chunk(2, dim=-1)                    # eqs. 4 and 5
            bank = input_gate * content + forget_gate * bank                    # eq. 6
        return torch.stack(banks, dim=1), bank


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
        """One segment x (B, 1, T, d) through the blocks, bank (B, N, d) -> x, the new bank.

        With caches, see `LM2.run`, the segment goes on, and the bank stays as it is.
        """
        T, N, mask, whole = x.size(2), bank.size(1), None, caches[0] is None
        if not caches[0]:                                                   # the segment's start
            x = torch.cat(((bank + self.before)[:, None], x), dim=2)        # (B, 1, N + T, d)
        if whole:
            x = torch.cat((x, (bank + self.behind)[:, None]), dim=2)        # (B, 1, N + T + N, d)
            mask = torch.ones(x.size(2), x.size(2), dtype=torch.bool, device=x.device).tril()
            mask[N + T:] = True
        for block, cache in zip(blocks, caches):
            x, _ = block(x, None, cache, mask)
        if not whole:
            return x[:, :, -T:], bank
        return x[:, :, N:N + T], normed(x[:, 0, N + T:])


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
    alone: on a CPU that has no bfloat16 PyTorch's takes longer than all the rest of a step.
    """

    def __init__(self, params, lr, momentum=0.95, weight_decay=0.0):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        loss = torch.enable_grad()(closure)() if closure else None
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
        return loss


# --------------------------------------------------------------------------------------------
# The whole

class Block(nn.Module):
    """A Llama block with a memory pathway beside its attention."""

    def __init__(self, config, has_memory):
        super().__init__()
        self.attention_norm = RMSNorm(config.n_embd)
        self.attention = Attention(config)
        self.write = MemoryWrite(config) if has_memory else None
        self.read = MemoryRead(config) if has_memory else None
        self.feed_forward_norm = RMSNorm(config.n_embd)
        self.feed_forward = FeedForward(config)

    def forward(self, x, bank, cache=None, mask=None):
        """x (B, S, T, d), bank (B, N, d) before the first segment or None -> x, the bank behind.

        Mask and cache are attention's. With a cache, be it empty, S is 1, and the bank is read but
        not written; without a memory the bank is given back as it came.
        """
        e = self.attention_norm(x)
        x = x + self.attention(e, cache, mask)          # E_attn: the original path, untouched
        if self.write:
            banks = bank[:, None]
            if cache is None:
                banks, bank = self.write(x, bank)
            x = x + self.read(e, banks)                 # E_next = E_attn + gated memory
        return x + self.feed_forward(self.feed_forward_norm(x)), bank


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
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Every initial value.

        matrices        normal, std 1 / sqrt(fan_in): variance 1 in, variance 1 out
        into the stream 0 for the matrices whose products join the residual stream (attention's
                        output, what is read, feed-forward): every block starts as the identity,
                        and the first block's memory is learned in far fewer steps
        embedding       normal, std 1 / sqrt(d): the tied head's logits start with variance 1
        norms           1
        gate biases     0, the forget gate 2: a bank that keeps most at first gets its gradient far;
                        1000 where a gate is switched off, which holds it wide open for good
        addresses       normal, std 0.1 (RMT's as well): small beside the slots' norm of sqrt(d), or
                        the tokens learn to read by slot number instead of by what a slot says
        slots' queries  normal, std 0.1; the bias for positions 0
        local mixer     the token itself 1, those before it normal with std 0.3
        """
        for name, p in self.named_parameters():
            if name.endswith("norm.weight"):
                p.fill_(1.0)
            elif name.endswith("write.gate_bias"):
                input_gate, forget_gate = p.chunk(2, dim=-1)
                input_gate.fill_(0.0 if self.config.input_gate else 1000.0)
                forget_gate.fill_(2.0 if self.config.forget_gate else 1000.0)
            elif name.endswith("output_gate.bias"):
                p.fill_(0.0 if self.config.output_gate else 1000.0)
            elif name.endswith(("output.weight", "read.value.weight", "down.weight", "position")):
                p.zero_()
            elif name.endswith(("address", "before", "behind", "write.query")):
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
        N, d, like = self.config.memory_slots, self.config.n_embd, self.embedding.weight
        bank = torch.eye(N, d, dtype=like.dtype, device=like.device)            # M_0
        return Memory(bank.expand(batch_size, self.n_banks, N, d),
                      bank.new_zeros(batch_size, max(self.config.conv - 1, 0), d))

    def run(self, tokens, memory, caches=None):
        """All blocks: tokens (B, L) -> hidden states (B, L, d) and the memory.

        tokens are S whole segments (one for memory="rmt"), or one segment that ends early. With
        caches, a list with a dictionary for each block, they go on in a segment, and no bank is
        written: empty dictionaries at its start, then one token at a time.
        """
        (B, L), caches = tokens.shape, caches or [None] * len(self.blocks)
        x, tail = self.embedding(tokens), memory.tail
        if self.mixer:
            x, tail = self.mixer(x, tail)
        x = x.reshape(B, -1, min(L, self.config.block_size), x.size(-1))        # (B, S, T, d)
        banks = [*memory.banks.unbind(1)] + [None] * (len(self.blocks) - self.n_banks)
        if self.memory_tokens:
            x, banks[0] = self.memory_tokens(x, banks[0], self.blocks, caches)
        else:
            for i, block in enumerate(self.blocks):
                x, banks[i] = block(x, banks[i], caches[i])
        banks = torch.stack(banks[:self.n_banks], dim=1) if self.n_banks else memory.banks
        return x.reshape(B, L, -1), Memory(banks, tail)

    def hidden_states(self, tokens, memory=None, last=None):
        """Tokens (B, L >= 1) -> hidden states (B, L or last, d) of the last positions, the memory.

        Cutting a long input at multiples of block_size and passing the memory on gives the same as
        one call; any other cut ends a segment there, which changes the result. Without gradients
        and with `last`, a long context needs no more working memory than a short one.
        """
        B, L = tokens.shape
        if not L or last is not None and last < 1:
            raise ValueError(f"{L} tokens, last={last}: there must be at least one of each")
        first, size, done, hidden = L - min(last or L, L), self.config.block_size, 0, []
        memory = self.fresh_memory(B) if memory is None else memory
        # segments at once: for large matrix products, and for bounded working memory
        many = 1 if self.memory_tokens else max(1, 2**13 // (B * size))
        while done < L:
            length = min(many, (L - done) // size) * size or L - done
            x, memory = self.run(tokens[:, done:done + length], memory)
            if done + length > first:
                hidden.append(x[:, max(first - done, 0):])
            done += length
        return torch.cat(hidden, dim=1), memory                         # (B, L - first, d)

    def forward(self, tokens, targets=None, memory=None, last=None):
        """Read tokens (B, L) int64, see `hidden_states`, and predict the next ones.

        targets  (B, L) int64: the next tokens, -1 where nothing is scored
        memory   the `Memory` that an earlier call returned; None: a fresh one
        last     return and score only the last so many positions
        Returns logits (B, L or last, vocab), the mean cross-entropy in nats (None without targets)
        and the memory.
        """
        hidden, memory = self.hidden_states(tokens, memory, last)
        logits, loss = self.head(hidden), None                          # (B, L or last, vocab)
        if targets is not None:
            targets = targets[:, -logits.size(1):]
            scores = logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(scores, targets.flatten(), ignore_index=-1)
        return logits, loss, memory

    def head(self, x):
        """Hidden states (B, L, d) -> logits (B, L, vocab); the weights are the embedding's."""
        return F.linear(self.norm(x), self.embedding.weight)

    @torch.no_grad()
    def generate(self, tokens, max_new_tokens, temperature=1.0, top_k=None, memory=None):
        """Continue tokens (B, L >= 1) by max_new_tokens; returns both, (B, L + max_new_tokens).

        temperature 0 takes the likeliest token, top_k 0 or None chooses among all. The current
        segment's keys and values are kept; the banks are written when it is full, as in `forward`.
        Raises ValueError for a negative temperature or top_k, and for no token at all.
        """
        if not tokens.size(1) or not temperature >= 0 or (top_k or 0) < 0:
            raise ValueError(f"{tokens.size(1)} tokens, temperature={temperature}, top_k={top_k}")
        size, done, end = self.config.block_size, 0, tokens.size(1) + max_new_tokens
        memory = self.fresh_memory(tokens.size(0)) if memory is None else memory
        while tokens.size(1) < end:
            full = (tokens.size(1) - 1) // size * size      # the last token is still to be read
            if full > done:
                memory = self.hidden_states(tokens[:, done:full], memory, last=1)[1]
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
        """[Muon for the linear maps inside blocks, AdamW for all else]; step both. Weights decay
        with Muon alone, and there not those of the memory's gates."""
        groups = {"matrix": [], "gate": [], "rest": []}
        for name, p in self.named_parameters():
            matrix = name.startswith("blocks.") and name.endswith("weight") and p.dim() == 2
            gates = "read.output_gate" in name or "write.gate" in name
            groups["rest" if not matrix else "gate" if gates else "matrix"].append(p)
        return [Muon([{"params": groups["matrix"], "weight_decay": weight_decay},
                      {"params": groups["gate"], "weight_decay": 0.0}], lr=muon_lr),
                torch.optim.AdamW(groups["rest"], lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]

    @staticmethod
    def load(checkpoint, device="cpu"):
        """(model, tiktoken encoding) from a checkpoint: its path, or what `load_checkpoint` gave.

        Raises BadInput if it is not one that fits this code.
        """
        checkpoint = checkpoint if isinstance(checkpoint, dict) else load_checkpoint(checkpoint)
        try:
            config = LM2Config(**checkpoint["config"])
            with torch.device("meta"):  # a forged width or depth is found before it takes memory
                check_tensors(checkpoint["model"], LM2(config).state_dict())
            tokens = [token.encode("latin-1") for token in checkpoint["tokenizer"]["tokens"]]
            if len(tokens) != config.vocab_size:
                raise BadInput("its tokenizer has another number of tokens")
            encoding = make_encoding(tokens, checkpoint["tokenizer"]["pattern"])
        except Exception as error:
            why = (str(error) or type(error).__name__).splitlines()[-1].strip()
            raise BadInput(f"{checkpoint['path']} holds no model that fits this code: {why}"
                           ) from None
        model = LM2(config)
        model.load_state_dict(checkpoint["model"])
        return model.to(device).eval(), encoding


# --------------------------------------------------------------------------------------------
# Files: only data is loaded, no code, and nothing is believed that was not looked at

def load_data(path, keys, what):
    """The dictionary in a file, with at least these keys; BadInput, with `what` it should be."""
    if not os.path.isfile(path):
        raise BadInput(f"there is no {what} {path}")
    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
        return {key: data[key] for key in (*keys, *data)} | {"path": str(path)}
    except Exception:  # torch and pickle raise a dozen kinds
        raise BadInput(f"{path} is no {what}, or it was cut short") from None


def load_checkpoint(path):
    """The dictionary in a checkpoint of train.py, and its "path". BadInput if it is not one."""
    return load_data(path, ("config", "model", "tokenizer", "train"), "checkpoint of train.py")


def check_tensors(found, wanted):
    """BadInput unless two dictionaries have tensors of the same names, shapes and kinds, and those
    in `found` are numbers throughout."""
    if not isinstance(found, dict) or found.keys() != wanted.keys():
        raise BadInput("its tensors have other names than this code's")
    for name, tensor in found.items():
        if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided \
                or tensor.shape != wanted[name].shape or not tensor.is_floating_point():
            raise BadInput(f"{name} is no tensor of shape {tuple(wanted[name].shape)}")
        if not tensor.isfinite().all():
            raise BadInput(f"{name} has values that are no numbers")


def make_encoding(tokens, pattern):
    """The tiktoken encoding whose token number i is tokens[i], bytes, in texts that the regular
    expression cuts first. BadInput unless it gives every text back."""
    import tiktoken
    if len(set(tokens)) != len(tokens) or not {bytes([i]) for i in range(256)} <= set(tokens):
        raise BadInput("its tokenizer has doubled or missing tokens")
    probe = "Mary's 12 words, and\n\t " + "".join(map(chr, range(32, 600)))
    try:
        encoding = tiktoken.Encoding("lm2", pat_str=pattern, special_tokens={},
                                     mergeable_ranks={t: i for i, t in enumerate(tokens)})
        whole = encoding.decode(encoding.encode_ordinary(probe)) == probe
    except KeyboardInterrupt:
        raise
    except BaseException:  # a panic in Rust is no Exception
        whole = False
    if not whole:
        raise BadInput("its tokenizer's pattern does not give texts back")
    return encoding
