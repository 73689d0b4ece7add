"""What the layer computes, in plain PyTorch: the specification that every op and kernel is tested against.

Two independent forms of the bounded layer: ``bounded_attention`` reads token by token and keeps its memory as a Python
object; ``bank_scan`` with ``bounded_attention_chunks`` is the chunk-parallel form that the ops implement. Any float dtype;
arithmetic in float64 for float64 inputs, else in float32. Differentiable by autograd, selection being a constant. Slow.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Optional

import torch
from torch import Tensor

from .config import CodaConfig
from .state import State


def _wide(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def rotate(x: Tensor, angle: Tensor, pairs: str = "half") -> Tensor:
    """Turns each plane of x (..., D) by angle (..., D/2), in the dtype of x."""
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, -1) if pairs == "half" else (x[..., 0::2], x[..., 1::2])
    turned = a * cos - b * sin, a * sin + b * cos
    return torch.cat(turned, -1) if pairs == "half" else torch.stack(turned, -1).flatten(-2)


def apply_rope(x: Tensor, positions: Tensor, inv_freq: Tensor, *, attention_scaling: float = 1.0, pairs: str = "half",
               inverse: bool = False) -> Tensor:
    """x (..., heads, D), positions (...): R(position) x, or R(-position) x. Phases in float64, rounded to x's dtype once."""
    phase = positions.double()[..., None, None] * inv_freq.double() * (-1.0 if inverse else 1.0)
    return (rotate(_wide(x), phase, pairs) * attention_scaling).to(x.dtype)


def _softmax(logits: Tensor) -> Tensor:
    """Softmax over the last dimension in which a row of nothing but -inf gives 0."""
    peak = logits.amax(-1, keepdim=True).clamp(min=torch.finfo(logits.dtype).min) if logits.shape[-1] else 0.0
    p = (logits - peak).exp()
    total = p.sum(-1, keepdim=True)
    return p / torch.where(total > 0, total, torch.ones_like(total))


def _finish(streams: list[Tensor], lam: Optional[Tensor], norm_weight: Optional[Tensor], eps: float) -> Tensor:
    """Norm(o1 - lam o2) with streams (..., H, D) and lam (..., H)."""
    y = streams[0] if lam is None else streams[0] - _wide(lam)[..., None] * streams[1]
    if norm_weight is not None:
        y = y * (y.square().mean(-1, keepdim=True) + eps).rsqrt() * _wide(norm_weight)
    return y


def _lengths(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    ends = cu_seqlens.tolist()
    return list(zip(ends[:-1], ends[1:]))


def diff_attention(q: Tensor, k: Tensor, v: Tensor, lam: Optional[Tensor] = None, theta: Optional[Tensor] = None, *,
                   causal: bool = True, scale: Optional[float] = None, theta_pairs: str = "half",
                   norm_weight: Optional[Tensor] = None, norm_eps: float = 1e-6, cu_seqlens_q: Optional[Tensor] = None,
                   cu_seqlens_k: Optional[Tensor] = None) -> Tensor:
    """Section 2 of the semantics; arguments as ``coda_attn.functional.diff_attention``."""
    if cu_seqlens_q is not None:
        rows = [diff_attention(q[a:b][None], k[c:d][None], v[c:d][None], None if lam is None else lam[a:b][None], theta,
                               causal=causal, scale=scale, theta_pairs=theta_pairs, norm_weight=norm_weight, norm_eps=norm_eps)[0]
                for (a, b), (c, d) in zip(_lengths(cu_seqlens_q), _lengths(cu_seqlens_k))]
        return torch.cat(rows)
    (_, lq, heads, dim), lk = q.shape, k.shape[1]
    group = heads // k.shape[2]
    scale = dim ** -0.5 if scale is None else scale
    queries = [_wide(q)] if theta is None else [_wide(q), rotate(_wide(q), _wide(theta), theta_pairs)]
    keys, values = (_wide(t).repeat_interleave(group, 2) for t in (k, v))
    visible = torch.ones(lq, lk, dtype=torch.bool, device=q.device)
    if causal:
        visible = visible.tril(lk - lq)
    streams = []
    for query in queries:
        logits = torch.einsum("bqhd,bkhd->bhqk", query, keys) * scale
        streams.append(torch.einsum("bhqk,bkhd->bqhd", _softmax(logits.masked_fill(~visible, -math.inf)), values))
    return _finish(streams, lam, norm_weight, norm_eps).to(q.dtype)


# --- the bounded memory, token by token ---------------------------------------------------------------------------------


@dataclasses.dataclass
class _Token:
    """A token of one gate group: k, v (heads of the group, D), gate logit z, position. In the ring k is rotated, in the
    exact bank it is what the bank holds (semantics 3.7)."""

    k: Tensor
    v: Tensor
    z: Tensor
    pos: int


class _Memory:
    """The memory of one sequence; slots are list entries, None where free."""

    def __init__(self, state: State, n: int, config: CodaConfig, inv_freq: Tensor, eta_logit: Optional[Tensor]):
        self.config, self.inv_freq = config, inv_freq
        self.eta = None if eta_logit is None else _wide(eta_logit).sigmoid()
        self.seen = int(state.tokens_seen[n])
        self.heads = [[h] for h in range(state.k.shape[1])] if config.gates == "per_head" else [list(range(state.k.shape[1]))]
        self.initial, self.n = state, n
        w = config.window

        def token(group: int, slot: int, pos: int) -> _Token:
            heads = self.heads[group]
            return _Token(state.k[n, heads, slot], state.v[n, heads, slot], state.gate[n, group, slot], pos)

        groups = range(len(self.heads))
        start = max(self.seen - 1, 0) // config.chunk * config.chunk
        ring = {p % w: p for p in range(max(0, start - w + config.chunk), self.seen)}
        self.ring = [[token(r, s, ring[s]) if s in ring else None for s in range(w)] for r in groups]
        self.exact = [[token(r, w + j, pos) if pos >= 0 else None for j, pos in enumerate(state.exact_pos[n, r].tolist())]
                      for r in groups]
        self.last_touch = state.last_touch[n].tolist()
        self.inserts, self.hits = state.counts[n].tolist()
        self.summary = [[state.summary_k[n, :, j], state.summary_v[n, :, j], m] if m > 0 else None
                        for j, m in enumerate(state.summary_mass[n])]

    def begin_chunk(self, b: int) -> None:
        """The oldest C tokens leave a full ring and are offered to the banks."""
        c = self.config
        if b < c.window:
            return
        for r, ring in enumerate(self.ring):
            evicted = []
            for p in range(b - c.window, b - c.window + c.chunk):
                token, ring[p % c.window] = ring[p % c.window], None
                evicted.append(dataclasses.replace(token, k=self._bank_key(token)))
            for token in evicted[:max(0, c.num_sinks - evicted[0].pos)]:
                self.exact[r][token.pos] = token
                self.inserts += 1
                if c.policy == "novelty_lru":
                    self.last_touch[token.pos] = token.pos
            candidates = [t for t in evicted if t.pos >= c.num_sinks]
            if c.policy == "retention":
                self._retain(self.exact[r], candidates)
            else:
                self._route(self.exact[r], candidates)
            if self.summary:
                self._summarise(candidates)

    def _bank_key(self, token: _Token) -> Tensor:
        if self.config.bank_distance is None:
            return token.k
        return apply_rope(token.k, torch.tensor(token.pos), self.inv_freq, pairs=self.config.rope_pairs, inverse=True)

    def _retain(self, slots: list, candidates: list[_Token]) -> None:
        """3.3: the largest keys among what is held and what comes; ties to the later position."""
        c = self.config
        pool = [t for t in slots[c.num_sinks:] if t is not None] + candidates
        pool.sort(key=lambda t: (float(t.z.detach()) + c.age_decay * t.pos, t.pos), reverse=True)
        kept = {t.pos: t for t in pool[:c.exact_slots - c.num_sinks]}
        for j in range(c.num_sinks, c.exact_slots):
            if slots[j] is not None and kept.pop(slots[j].pos, None) is None:
                slots[j] = None
        arrivals = sorted(kept.values(), key=lambda t: t.pos)
        free = (j for j in range(c.num_sinks, c.exact_slots) if slots[j] is None)
        for token in arrivals:
            slots[next(free)] = token
        self.inserts += len(arrivals)

    def _route(self, slots: list, candidates: list[_Token]) -> None:
        """3.4: novel values enter a free slot or the least recently touched one; known ones touch their slot."""
        c = self.config
        keep = [t for t in candidates if float(t.z.detach()) >= logit(c.tau_exact)]
        keep = sorted(sorted(keep, key=lambda t: (-float(t.z.detach()), t.pos))[:c.exact_candidates], key=lambda t: t.pos)
        if c.exact_slots == c.num_sinks:
            return
        for token in keep:
            used = [j for j, slot in enumerate(slots) if slot is not None]
            score = {j: _cosine(token.v, slots[j].v) for j in used}
            best = max(used, key=lambda j: (score[j], -j), default=None)
            if best is None or score[best] < c.tau_novel:
                free = [j for j in range(c.num_sinks, c.exact_slots) if slots[j] is None]
                j = free[0] if free else min(range(c.num_sinks, c.exact_slots), key=lambda i: (self.last_touch[i], i))
                slots[j] = token
                self.inserts += 1
            else:
                j = best
                self.hits += 1
                if c.refresh_on_hit and score[best] >= c.tau_match and best >= c.num_sinks:
                    slots[j] = token
            self.last_touch[j] = token.pos

    def _summarise(self, candidates: list[_Token]) -> None:
        """3.5: EMA prototypes; scored against the bank at b and the claims made within this chunk."""
        c, before, claims, members = self.config, list(self.summary), {}, {}
        low = low_freq_mask(candidates[0].k.shape[-1], c.rope_pairs) if candidates else None

        def feature(k: Tensor, v: Tensor) -> Tensor:
            return v if c.summary_routing == "value" else k[..., low]

        for token in candidates:
            if float(token.z.detach()) < logit(c.tau_summary):
                continue
            mine = feature(token.k, token.v)
            score = {j: _cosine(mine, feature(s[0], s[1])) for j, s in enumerate(before) if s is not None}
            score.update({j: _cosine(mine, feature(t.k, t.v)) for j, t in claims.items()})
            best = max(score, key=lambda j: (score[j], -j), default=None)
            free = next((j for j in range(len(before)) if j not in score), None)
            if free is not None and (best is None or score[best] < c.tau_spawn):
                claims[free], best = token, free
            members.setdefault(best, []).append(token)
        for j, tokens in members.items():
            g = torch.stack([t.z for t in tokens]).sigmoid()
            mass = g.sum()
            kbar, vbar = ((g[:, None, None] * torch.stack([_wide(x) for x in xs])).sum(0) / mass
                          for xs in ([t.k for t in tokens], [t.v for t in tokens]))
            if c.summary_routing == "low_freq_key":
                kbar = kbar * low * math.sqrt(low.numel() / low.sum().item())
            if self.summary[j] is None:
                self.summary[j] = [kbar, vbar, mass]
            else:
                k, v, m = self.summary[j]
                rate = (1 - (1 - self.eta) ** mass)[:, None]
                self.summary[j] = [k + rate * (kbar - k), v + rate * (vbar - v), m + mass]

    def write(self, k: Tensor, v: Tensor, z: Tensor) -> None:
        """The token at position ``seen`` enters the ring: k, v (Hkv, D), z (R)."""
        for r, heads in enumerate(self.heads):
            self.ring[r][self.seen % self.config.window] = _Token(k[heads], v[heads], z[r], self.seen)
        self.seen += 1

    def read(self, q: Tensor, theta: Optional[Tensor], scale: float, theta_pairs: str) -> list[Tensor]:
        """One token's query (H, D) against all slots: o1, o2 (H, D), or o1 alone."""
        c, t = self.config, self.seen - 1
        queries = {"ring": _wide(q)}
        queries["bank"] = queries["ring"]
        if c.bank_distance is not None:
            turn = torch.tensor(c.bank_distance - t // c.chunk * c.chunk)
            queries["bank"] = apply_rope(queries["ring"], turn, self.inv_freq, pairs=c.rope_pairs)
        hkv = sum(len(heads) for heads in self.heads)
        group = q.shape[0] // hkv
        streams = []
        for second in ([False] if theta is None else [False, True]):
            turned = {name: rotate(x, _wide(theta), theta_pairs) if second else x for name, x in queries.items()}
            out = []
            for r, heads in enumerate(self.heads):
                slots = [("ring", s.k, s.v, 0.0) for s in self.ring[r] if s is not None]
                slots += [("bank", s.k, s.v, torch.nn.functional.logsigmoid(s.z) if c.gate_bias and j >= c.num_sinks else 0.0)
                          for j, s in enumerate(self.exact[r]) if s is not None]
                slots += [("bank", s[0], s[1], s[2].log() if c.mass_bias else 0.0) for s in self.summary if s is not None]
                for i, h in enumerate(heads):
                    rows = slice(h * group, (h + 1) * group)
                    logits = [turned[name][rows] @ _wide(k[i]) * scale + bias for name, k, _, bias in slots]
                    out.append(_softmax(torch.stack(logits, -1)) @ torch.stack([_wide(v[i]) for _, _, v, _ in slots]))
            streams.append(torch.cat(out))
        return streams

    def export(self) -> list[Tensor]:
        """The state's tensors of this sequence; slots never written keep what they held."""
        start, n, w = self.initial, self.n, self.config.window
        k, v, gate = (list(t.unbind(1)) for t in (start.k[n], start.v[n], start.gate[n]))
        k, v = ([list(x.unbind(0)) for x in column] for column in (k, v))
        gate = [list(x.unbind(0)) for x in gate]
        for r, heads in enumerate(self.heads):
            for slot, token in enumerate(self.ring[r] + self.exact[r]):
                if token is None:
                    continue
                gate[slot][r] = token.z
                for i, h in enumerate(heads):
                    k[slot][h], v[slot][h] = token.k[i], token.v[i]
        stack = lambda columns: torch.stack([torch.stack(c) for c in columns], 1) if columns else None
        pos = torch.tensor([[-1 if t is None else t.pos for t in group] for group in self.exact], dtype=torch.int64)
        summary = [start.summary_k[n], start.summary_v[n], start.summary_mass[n]]
        if self.summary:
            zero = (torch.zeros_like(summary[0][:, 0]), torch.zeros_like(summary[0][:, 0]), torch.zeros_like(summary[2][0]))
            held = [zero if s is None else s for s in self.summary]
            summary = [torch.stack([s[0] for s in held], 1), torch.stack([s[1] for s in held], 1), torch.stack([s[2] for s in held])]
        return [stack(k), stack(v), stack(gate), pos.view(start.exact_pos[n].shape), torch.tensor(self.seen),
                torch.tensor(self.last_touch, dtype=torch.int64), torch.tensor([self.inserts, self.hits]), *summary]


def logit(gate: float) -> float:
    """The gate logit at which sigmoid equals ``gate``."""
    return -math.inf if gate <= 0 else math.log(gate / (1 - gate))


def low_freq_mask(dim: int, pairs: str) -> Tensor:
    """Which of D dimensions belong to the slower half of the RoPE pairs, (D,) bool."""
    slow = torch.arange(dim // 2) >= dim // 4
    return slow.repeat(2) if pairs == "half" else slow.repeat_interleave(2)


def _cosine(a: Tensor, b: Tensor) -> float:
    """Mean over KV heads of cos(a, b), (Hkv, D) each; norms clamped at 1e-6."""
    a, b = _wide(a).detach(), _wide(b).detach()
    a, b = a.to(torch.promote_types(a.dtype, b.dtype)), b.to(torch.promote_types(a.dtype, b.dtype))
    return float(((a * b).sum(-1) / (a.norm(dim=-1).clamp(min=1e-6) * b.norm(dim=-1).clamp(min=1e-6))).mean())


def bounded_attention(q: Tensor, k: Tensor, v: Tensor, lam: Optional[Tensor], theta: Optional[Tensor], gate: Tensor,
                      state: State, *, inv_freq: Tensor, config: CodaConfig = CodaConfig(),
                      norm_weight: Optional[Tensor] = None, eta_logit: Optional[Tensor] = None,
                      cu_seqlens: Optional[Tensor] = None, scale: Optional[float] = None) -> tuple[Tensor, State]:
    """Section 3 of the semantics, token by token; arguments as ``coda_attn.functional.bounded_attention``."""
    if cu_seqlens is None:
        flat = [None if t is None else t.flatten(0, 1) for t in (q, k, v, lam, gate)]
        cu = torch.arange(q.shape[0] + 1) * q.shape[1]
        y, new = bounded_attention(*flat[:4], theta, flat[4], state, inv_freq=inv_freq, config=config, norm_weight=norm_weight,
                                   eta_logit=eta_logit, cu_seqlens=cu, scale=scale)
        return y.view(q.shape), new
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    gate = gate.to(state.gate.dtype)
    rows, exported = [], []
    for n, (a, b) in enumerate(_lengths(cu_seqlens)):
        memory = _Memory(state, n, config, inv_freq, eta_logit)
        for i in range(a, b):
            if memory.seen % config.chunk == 0:
                memory.begin_chunk(memory.seen)
            memory.write(k[i], v[i], gate[i])
            streams = memory.read(q[i], theta, scale, config.theta_pairs)
            rows.append(_finish(streams, None if lam is None else lam[i], norm_weight, config.norm_eps))
        exported.append(memory.export())
    y = torch.stack(rows).to(q.dtype) if rows else torch.zeros_like(q)
    return y, State(*(torch.stack(column) for column in zip(*exported)))


# --- the same, chunk-parallel -------------------------------------------------------------------------------------------


def bank_scan(k: Tensor, v: Tensor, gate: Tensor, cu_seqlens: Tensor, state: State, eta_logit: Optional[Tensor],
              inv_freq: Tensor, config: CodaConfig) -> tuple[Tensor, Tensor, Tensor, Tensor, State]:
    """What each query chunk reads from the banks: index (NC, R, Me), summary k, v (NC, Hkv, Ms, D), mass (NC, Ms), new state.

    Row ``cu_seqlens[n] // C + 2 n + i`` is the i-th chunk that sequence n touches; NC = T // C + 2 N. An index below W + Me is
    a slot of the carried state, W + Me + j the j-th new token, -1 a free slot.
    """
    c, sequences = config, state.sequences
    w, me, groups = c.window, c.exact_slots, state.exact_pos.shape[1]
    count = k.shape[0] // c.chunk + 2 * sequences
    index = torch.full((count, groups, me), -1, dtype=torch.int32)
    blank = [torch.zeros(count, *t.shape[1:], dtype=t.dtype) for t in (state.summary_k, state.summary_v, state.summary_mass)]
    snapshots = [list(t.unbind(0)) for t in blank]
    exported = []
    for n, (a, b) in enumerate(_lengths(cu_seqlens)):
        memory = _Memory(state, n, config, inv_freq, eta_logit)
        first = memory.seen
        row = a // c.chunk + 2 * n
        where = [{t.pos: w + j for j, t in enumerate(group) if t is not None} for group in memory.exact]

        def flat(group: int, pos: int) -> int:
            return w + me + pos - first if pos >= first else where[group].get(pos, pos % w)

        for i in range(a, b):
            opens = memory.seen % c.chunk == 0
            if opens:
                memory.begin_chunk(memory.seen)
            memory.write(k[i], v[i], gate[i].to(state.gate.dtype))
            if opens or i == a:
                for r, group in enumerate(memory.exact):
                    index[row, r] = torch.tensor([-1 if t is None else flat(r, t.pos) for t in group], dtype=torch.int32)
                for j, s in enumerate(memory.summary):
                    if s is not None:
                        for column, value in zip(snapshots, s):
                            dim = 1 if value.dim() else 0
                            column[row] = column[row].index_copy(dim, torch.tensor([j]), value.unsqueeze(dim))
                row += 1
        exported.append(memory.export())
    return (index, *(torch.stack(column) for column in snapshots), State(*(torch.stack(column) for column in zip(*exported))))


def bounded_attention_chunks(q: Tensor, k: Tensor, v: Tensor, lam: Optional[Tensor], theta: Optional[Tensor], gate: Tensor,
                             cu_seqlens: Tensor, state: State, snapshots: tuple[Tensor, Tensor, Tensor, Tensor],
                             inv_freq: Tensor, config: CodaConfig, *, norm_weight: Optional[Tensor] = None,
                             scale: Optional[float] = None) -> Tensor:
    """Section 4 (2) of the semantics: every chunk's queries against its snapshot and its slice of the flat keys."""
    c, (index, summary_k, summary_v, summary_mass) = config, snapshots
    w, me, hkv = c.window, c.exact_slots, k.shape[1]
    group, scale = q.shape[1] // hkv, q.shape[-1] ** -0.5 if scale is None else scale
    out = []
    for n, (a, b) in enumerate(_lengths(cu_seqlens)):
        first = int(state.tokens_seen[n])
        slots = torch.arange(w)
        ring_pos = first - 1 - (first - 1 - slots) % w  # the last position before `first` in each ring slot
        pos = torch.cat([ring_pos, torch.full((me,), -1), torch.arange(first, first + b - a)])
        flat_k, flat_v = torch.cat([state.k[n].transpose(0, 1), k[a:b]]), torch.cat([state.v[n].transpose(0, 1), v[a:b]])
        flat_z = torch.cat([state.gate[n].transpose(0, 1), gate[a:b].to(state.gate.dtype)])
        flat_kbar = flat_k
        if c.bank_distance is not None:
            kbar = apply_rope(flat_k, pos.clamp(min=0), inv_freq, pairs=c.rope_pairs, inverse=True)
            held = (torch.arange(len(pos)) >= w) & (torch.arange(len(pos)) < w + me)
            flat_kbar = torch.where(held[:, None, None], flat_k, kbar)
        i, row = a, a // c.chunk + 2 * n
        while i < b:
            t0 = first + i - a
            start = t0 // c.chunk * c.chunk
            size = min(start + c.chunk - t0, b - i)
            t = torch.arange(t0, t0 + size)
            seen = (pos >= max(0, start - (w - c.chunk))) & (pos[None] <= t[:, None])  # (size, flat)
            chosen = index[row].long()  # (R, Me)
            per_head = chosen.expand(hkv, me) if chosen.shape[0] != hkv else chosen
            heads = torch.arange(hkv)[:, None]
            exact_k, exact_v = (x[per_head.clamp(min=0), heads] for x in (flat_kbar, flat_v))  # (Hkv, Me, D)
            z = flat_z[chosen.clamp(min=0), torch.arange(chosen.shape[0])[:, None]]  # (R, Me)
            bias = torch.zeros_like(z)
            if c.gate_bias:
                bias = torch.where(torch.arange(me) >= c.num_sinks, torch.nn.functional.logsigmoid(z), bias)
            bias = bias.masked_fill(chosen < 0, -math.inf).expand(hkv, me)
            mass = summary_mass[row]
            safe = torch.where(mass > 0, mass, torch.ones_like(mass))
            mass_bias = (safe.log() if c.mass_bias else torch.zeros_like(mass)).masked_fill(mass <= 0, -math.inf)
            bank_k = torch.cat([_wide(exact_k), summary_k[row]], 1)
            bank_v = torch.cat([_wide(exact_v), summary_v[row]], 1)
            bank_bias = torch.cat([bias, mass_bias.expand(hkv, -1)], 1)
            query = _wide(q[i:i + size])
            banked = query
            if c.bank_distance is not None:
                banked = apply_rope(query, torch.full((size,), c.bank_distance - start), inv_freq, pairs=c.rope_pairs)
            streams = []
            for second in ([False] if theta is None else [False, True]):
                x, xb = (rotate(x, _wide(theta), c.theta_pairs) if second else x for x in (query, banked))
                x, xb = (x.unflatten(1, (hkv, group)) for x in (x, xb))
                ring = torch.einsum("thgd,fhd->hgtf", x, _wide(flat_k)) * scale
                bank = torch.einsum("thgd,hmd->hgtm", xb, bank_k) * scale + bank_bias[:, None, None]
                p = _softmax(torch.cat([ring.masked_fill(~seen, -math.inf), bank], -1))
                p_ring, p_bank = p.split([ring.shape[-1], bank.shape[-1]], -1)
                o = torch.einsum("hgtf,fhd->thgd", p_ring, _wide(flat_v)) + torch.einsum("hgtm,hmd->thgd", p_bank, bank_v)
                streams.append(o.flatten(1, 2))
            out.append(_finish(streams, None if lam is None else lam[i:i + size], norm_weight, c.norm_eps))
            i, row = i + size, row + 1
    return torch.cat(out).to(q.dtype) if out else torch.zeros_like(q)


def retention_bank(gate: Tensor, evicted: int, config: CodaConfig) -> list[int]:
    """Positions in the retention bank of one gate group after its first ``evicted`` tokens left the ring, from scratch: the
    sinks and the largest keys. gate (L,) logits."""
    c = config
    keys = [(float(z) + c.age_decay * p, p) for p, z in enumerate(gate[:evicted].tolist())]
    best = sorted(keys[c.num_sinks:], reverse=True)[:c.exact_slots - c.num_sinks]
    return sorted([p for _, p in keys[:c.num_sinks]] + [p for _, p in best])
