"""DeepSeek-V3.2's lightning indexer: a few cheap heads that say which earlier tokens a query should attend to.

It learns from one loss only, the divergence between its scores and the attention they stand for (DeepSeek-V3.2-Exp,
section 2.1); what it reads is cut off from the rest of the network.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archcompass.blocks.mla.spec import MLA
from archcompass.blocks.norm.module import LayerNormModule
from archcompass.blocks.norm.spec import LayerNorm
from archcompass.blocks.rotary import turn
from archcompass.blocks.runtime import Context, Linear

SCORED_ELEMENTS = 2**24
"""Scores of all heads held at a time: 64 MiB in float32."""


class LightningIndexer(nn.Module):
    """Scores of earlier tokens, and the best of them."""

    def __init__(self, spec: MLA, width: int) -> None:
        super().__init__()
        assert spec.indexer is not None
        assert spec.q_lora_rank is not None
        self.index, self.turning = spec.indexer, spec.qk_rope_head_dim
        self.rope = None if spec.rope is None else spec.rope.model_copy(update={"interleaved": False})
        self.query = Linear(spec.q_lora_rank, self.index.n_heads * self.index.head_dim)
        self.key = Linear(width, self.index.head_dim)
        self.key_norm = LayerNormModule(LayerNorm(eps=1e-6), self.index.head_dim)
        self.weights = Linear(width, self.index.n_heads)

    def keys(self, x: Tensor, context: Context) -> Tensor:
        """x [batch, time, width] -> the keys to be cached [batch, time, head_dim]."""
        return self._turn(self.key_norm.normalise(self.key(x)).unsqueeze(2), context).squeeze(2)

    def forward(
        self, x: Tensor, query_latent: Tensor, seen: dict[str, Tensor], context: Context
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, positions and validity of each query's best keys, [batch, time, slots] each, best first.

        Args:
            x: [batch, time, width].
            query_latent: [batch, time, q_lora_rank].
            seen: holds index_key [batch, keys, head_dim].
        """
        keys = seen["index_key"]
        query = self.query(query_latent).unflatten(-1, (self.index.n_heads, -1))
        query = self._turn(query, context) * self.index.head_dim**-0.5
        weights = self.weights(x) * self.index.n_heads**-0.5
        block = max(1, SCORED_ELEMENTS // (keys.shape[0] * keys.shape[1] * self.index.n_heads))
        first = keys.shape[1] - x.shape[1]
        picked = []
        for start in range(0, x.shape[1], block):
            part = slice(start, start + block)
            scores = self._scores(query[:, part], weights[:, part], keys)
            visible = _visible(first + start, scores, context.padding)
            best = scores.masked_fill(~visible, float("-inf")).topk(min(self.index.topk, keys.shape[1]), dim=-1)
            picked.append((best.values, best.indices))
        values, indices = (torch.cat(parts, dim=1) for parts in zip(*picked, strict=True))
        return values, indices, values > float("-inf")

    def learn(self, scores: Tensor, counts: Tensor, attention: Tensor, context: Context) -> None:
        """Notes KL(attention ‖ softmax(scores)), its mean over the queries, among the context's losses.

        Args:
            scores, counts: [batch, time, slots].
            attention: [batch, time, slots] summed over heads, without gradient.
        """
        wide = torch.promote_types(scores.dtype, torch.float32)
        target = attention.to(wide)
        target = target / target.sum(-1, keepdim=True).clamp(min=1e-20)
        lowest = torch.finfo(wide).min
        guess = scores.to(wide).masked_fill(~counts, lowest).log_softmax(-1).masked_fill(~counts, 0.0)
        divergence = (torch.special.xlogy(target, target) - target * guess).sum(-1)
        real = context.real(scores.shape[1], scores.device)
        mean = divergence.mean() if real is None else (divergence * real[..., 0]).sum() / real.sum()
        context.losses.setdefault("indexer", []).append(self.index.loss_coef * mean)

    def _scores(self, query: Tensor, weights: Tensor, keys: Tensor) -> Tensor:
        """Σ_j w_j relu(q_j · k): [batch, time, keys]."""
        each = torch.unflatten(F.relu(query.flatten(1, 2) @ keys.mT), 1, (-1, self.index.n_heads))
        return torch.squeeze(weights.unsqueeze(-2) @ each, -2)

    def _turn(self, heads: Tensor, context: Context) -> Tensor:
        """The first channels of [batch, time, heads, head_dim] turned, by halves, unlike the attention's own."""
        if self.rope is None:
            return heads
        turned, plain = heads.split([self.turning, heads.shape[-1] - self.turning], dim=-1)
        return torch.cat([turn(turned, self.rope, context), plain], dim=-1)


def selected_weights(query: Tensor, rows: Tensor, index: Tensor, counts: Tensor, lse: Tensor, scale: float) -> Tensor:
    """The attention of all heads, summed, on each query's selected keys: [batch, time, slots].

    Args:
        query: [batch, time, heads, width]; rows: [batch, keys, width].
        index, counts: [batch, time, slots].
        lse: [batch, time, heads] log-sum-exp over the selected keys.
    """
    parts = zip(*(tensor.split(64, dim=1) for tensor in (query, index, counts, lse)), strict=True)
    batch = torch.arange(rows.shape[0], device=rows.device)[:, None, None]
    summed = []
    for one, chosen, real, total in parts:
        logits = (one @ rows[batch, chosen].mT).to(total.dtype) * scale
        weights = torch.exp(logits - total.unsqueeze(-1)).masked_fill(~real.unsqueeze(2), 0.0)
        summed.append(weights.sum(dim=2))
    return torch.cat(summed, dim=1)


def _visible(first: int, scores: Tensor, padding: Tensor | None) -> Tensor:
    """[1 or batch, time, keys] True where a query, the first of which stands at `first`, may look."""
    key = torch.arange(scores.shape[-1], device=scores.device)
    query = torch.arange(first, first + scores.shape[1], device=scores.device)[:, None]
    causal = (key <= query)[None]
    return causal if padding is None else causal & (key >= padding[:, None, None])
