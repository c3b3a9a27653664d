"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): keys and values through one small vector per token.

    c = norm(x W_c),  k_r = rope(x W_r)          the cache: kv_lora_rank + qk_rope_head_dim numbers per token
    k_h = [c W_uk,h , k_r],   v_h = c W_uv,h,   out = softmax(q_h k_hᵀ · scale) v_h

A prompt is cheapest with keys and values expanded; a step with the expansion absorbed into query and output, so that it
attends to the latents themselves: (q W_ukᵀ) cᵀ and (softmax · c) W_uv. Each call takes the cheaper of the two.

With `indexer`, every query attends only to the tokens a small scorer ranks highest (DeepSeek-V3.2's sparse attention):

    I_ts = Σ_j w_tj · relu(q_tj · k_s · d^-0.5) · n_heads^-0.5
"""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from archcompass.blocks.base import Block, Live, Op, Parameters, StateTensor, Step, Traits, costed, gemm, pointwise
from archcompass.blocks.rope import Rope, yarn_scale
from archcompass.errors import SpecError
from archcompass.kernels.attention.cost import attention_cost, sparse_attention_cost
from archcompass.kernels.attention.memory import prompt_bytes


class Indexer(BaseModel):
    """The scorer that picks each query's keys (HF index_n_heads, index_head_dim, index_topk).

    Attributes:
        n_heads: its heads.
        head_dim: channels of its keys; the first qk_rope_head_dim of them turn, by halves.
        topk: keys a query attends to.
        loss_coef: in training, of the divergence between its ranking and the attention it predicts; no other gradient
            reaches it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    n_heads: PositiveInt
    head_dim: PositiveInt
    topk: PositiveInt
    loss_coef: NonNegativeFloat = 1.0


class MLA(Block):
    """Multi-head latent attention.

    Attributes:
        num_attention_heads: heads (H).
        q_lora_rank: channels queries are projected through; None projects them at once.
        kv_lora_rank: channels of the latent (R).
        qk_nope_head_dim, qk_rope_head_dim: channels of a key made from the latent, and of the part shared by all heads
            that turns.
        v_head_dim: channels of a value.
        rope: rotary positions; None leaves the shared part unturned (Kimi Linear).
        norm_eps: of the norms on the two latents.
        bias: biases of the projections into the latents and of the output (HF attention_bias).
        scale: of the logits; None is qk_head_dim^-0.5, times yarn's factor squared where rope has mscale_all_dim.
        indexer: attend only to the keys it picks (DeepSeek-V3.2).
    """

    label = "multi-head latent attention"
    kind: Literal["mla"] = "mla"
    num_attention_heads: PositiveInt
    q_lora_rank: PositiveInt | None = None
    kv_lora_rank: PositiveInt
    qk_nope_head_dim: PositiveInt
    qk_rope_head_dim: PositiveInt
    v_head_dim: PositiveInt
    rope: Rope | None = Field(default_factory=lambda: Rope(interleaved=True))
    norm_eps: PositiveFloat = 1e-6
    bias: bool = False
    scale: PositiveFloat | None = None
    indexer: Indexer | None = None

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.rope is not None:
            self.rope.rotary_dim(self.qk_rope_head_dim)
        if self.bias and self.q_lora_rank is None:
            raise SpecError(
                "bias needs q_lora_rank: without it queries are projected at once, and no model biases those"
            )
        if self.indexer is None:
            return self
        if self.q_lora_rank is None:
            raise SpecError("indexer needs q_lora_rank: it reads the queries' latent")
        if self.indexer.head_dim < self.qk_rope_head_dim:
            raise SpecError(
                f"indexer.head_dim ({self.indexer.head_dim}) must be at least qk_rope_head_dim ({self.qk_rope_head_dim})"
            )
        return self

    @property
    def qk_head_dim(self) -> int:
        """Channels of a query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cached_width(self) -> int:
        """Numbers kept per token: the latent and the shared part of the key."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    @property
    def sections(self) -> tuple[int, int, int]:
        """Columns of the first projection: queries (or their latent), latent, shared part of the key."""
        queries = self.q_lora_rank or self.num_attention_heads * self.qk_head_dim
        return queries, self.kv_lora_rank, self.qk_rope_head_dim

    @property
    def softmax_scale(self) -> float:
        """What the logits are multiplied by."""
        if self.scale is not None:
            return self.scale
        stretched = self.rope is not None and self.rope.mscale_all_dim
        sharper = (
            yarn_scale(self.rope.factor or 1.0, self.rope.mscale_all_dim or 0.0) if stretched and self.rope else 1.0
        )
        return float(self.qk_head_dim**-0.5 * sharper**2)

    def absorbs(self, new_tokens: int, keys: int) -> bool:
        """Whether attending to the latents themselves takes fewer products than expanding all `keys` of them."""
        if self.selects(keys):
            return True
        expanded = keys * self._expansion + new_tokens * keys * (self.qk_head_dim + self.v_head_dim)
        absorbed = new_tokens * self._expansion + new_tokens * keys * (self.cached_width + self.kv_lora_rank)
        return absorbed < expanded

    def selects(self, keys: int) -> bool:
        """Whether there are more keys than the indexer lets through."""
        return self.indexer is not None and keys > self.indexer.topk

    @property
    def _expansion(self) -> int:
        """Weights per head between latent and heads."""
        return self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)

    @property
    def traits(self) -> Traits:
        return Traits(role="mixer", mixes_time=True, bounded_state=False, exact_recall=True, subquadratic=False)

    def parameters(self, width: int) -> Parameters:
        heads, inward = self.num_attention_heads, sum(self.sections)
        matrix = width * inward + heads * (self._expansion + self.v_head_dim * width)
        vector = self.kv_lora_rank + (inward + width if self.bias else 0)
        if self.q_lora_rank is not None:
            matrix += self.q_lora_rank * heads * self.qk_head_dim
            vector += self.q_lora_rank
        if self.indexer is None:
            return Parameters(matrix=matrix, vector=vector)
        index = self.indexer
        matrix += (self.q_lora_rank or 0) * index.n_heads * index.head_dim + width * (index.head_dim + index.n_heads)
        return Parameters(matrix=matrix, vector=vector + 2 * index.head_dim)

    def state(self, width: int, context: int) -> list[StateTensor]:
        rows = [("latent", self.cached_width)]
        rows += [("index_key", self.indexer.head_dim)] if self.indexer else []
        return [StateTensor(name=name, shape=(context, size), dtype="cache", grows=True) for name, size in rows]

    def work(self, width: int, step: Step) -> list[Op]:
        rows, heads = step.tokens, self.num_attention_heads
        keys = step.past_tokens + step.new_tokens
        operations = [gemm(step, "latent projection", rows, width, sum(self.sections))]
        operations.append(pointwise(step, "latent norms", rows * sum(self.sections)))
        if self.q_lora_rank is not None:
            operations.append(gemm(step, "query projection", rows, self.q_lora_rank, heads * self.qk_head_dim))
        if self.rope is not None:
            operations.append(pointwise(step, "rotary", rows * (heads + 1) * self.qk_rope_head_dim))
        operations += self._index_work(width, step, keys)
        operations += self._absorbed(step, keys) if self.absorbs(step.new_tokens, keys) else self._expanded(step, keys)
        return [*operations, gemm(step, "output projection", rows, heads * self.v_head_dim, width)]

    def _expanded(self, step: Step, keys: int) -> list[Op]:
        heads = self.num_attention_heads
        columns = heads * (self.qk_nope_head_dim + self.v_head_dim)
        expand = gemm(step, "key and value expansion", step.batch * keys, self.kv_lora_rank, columns)
        return [expand, self._core(step, keys, heads, self.qk_head_dim, self.v_head_dim)]

    def _absorbed(self, step: Step, keys: int) -> list[Op]:
        """One product per head into the latent space and one out of it."""
        rows, heads, rank = step.tokens, self.num_attention_heads, self.kv_lora_rank
        into = gemm(step, "query absorption", rows, self.qk_nope_head_dim, rank).together(heads)
        back = gemm(step, "value absorption", rows, rank, self.v_head_dim).together(heads)
        if self.selects(keys):
            return [into, self._selected(step), back]
        return [into, self._core(step, keys, 1, self.cached_width, rank), back]

    def _core(self, step: Step, keys: int, kv_heads: int, key_dim: int, value_dim: int) -> Op:
        """Shape is (batch, heads, key heads, new tokens, keys, key_dim, value_dim). The cache is read as it is stored."""
        cost = attention_cost(
            batch=step.batch,
            new_tokens=step.new_tokens,
            keys=keys,
            heads=self.num_attention_heads,
            kv_heads=kv_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            element_bytes=step.element_bytes,
        )
        shape = (step.batch, self.num_attention_heads, kv_heads, step.new_tokens, keys, key_dim, value_dim)
        operation = costed(step, "attention", "attention", cost, shape)
        touched = step.batch * (keys + step.new_tokens) * self.cached_width
        return operation if step.training else operation._replace(state_bytes=step.cache_precision.bytes(touched))

    def _selected(self, step: Step) -> Op:
        """Shape is that of attention, with the slots of the selection for keys."""
        assert self.indexer is not None
        heads, slots = self.num_attention_heads, self.indexer.topk
        cost = sparse_attention_cost(
            batch=step.batch,
            new_tokens=step.new_tokens,
            heads=heads,
            kv_heads=1,
            key_dim=self.cached_width,
            value_dim=self.kv_lora_rank,
            slots=slots,
            block_size=1,
            element_bytes=step.element_bytes,
        )
        shape = (step.batch, heads, 1, step.new_tokens, slots, self.cached_width, self.kv_lora_rank)
        operation = costed(step, "attention", "selected attention", cost, shape)
        return operation if step.training else operation._replace(state_bytes=step.cached_bytes(cost.state_bytes))

    def _index_work(self, width: int, step: Step, keys: int) -> list[Op]:
        """The indexer's keys always, for later; its scores where there is something to leave out."""
        if self.indexer is None:
            return []
        index, rows = self.indexer, step.tokens
        operations = [gemm(step, "index key", rows, width, index.head_dim)]
        if not self.selects(keys):
            return operations
        scores = gemm(step, "index scores", rows * index.n_heads, index.head_dim + 1, keys)
        read = step.cache_precision.bytes(step.batch * keys * index.head_dim)
        return [
            *operations,
            gemm(step, "index query", rows, self.q_lora_rank or 0, index.n_heads * index.head_dim),
            gemm(step, "index weights", rows, width, index.n_heads, quantised=False),
            scores._replace(weight_bytes=0.0, state_bytes=read, compute=step.activations),
        ]

    def live(self, width: int, step: Step) -> Live:
        keys, heads = step.past_tokens + step.new_tokens, self.num_attention_heads
        latents = (self.q_lora_rank or 0) + self.cached_width
        queries, values = heads * self.qk_head_dim, heads * self.v_head_dim
        if self.absorbs(step.new_tokens, keys):
            inner = heads * (2 * self.cached_width + self.kv_lora_rank)
            peak = step.tokens * (sum(self.sections) + latents + queries + inner + values)
            flowing = step.tokens * (inner + values) * step.element_bytes
            return Live(
                peak_bytes=float(peak * step.element_bytes),
                saved_bytes=float(peak * 2 * step.training),
                backward_bytes=float(flowing * step.training),
            )
        wide = self._in_float32(step)
        # On a processor the fused kernel wants keys and values of one width, and gets copies.
        copied = 0 if step.fused or self.qk_head_dim == self.v_head_dim or wide else 1
        expanded = step.batch * keys * (heads * self.qk_nope_head_dim + values + queries * (1 + 2 * copied))
        out = queries if copied else values
        peak = step.tokens * (latents + queries * (1 + copied) + out) + expanded
        normed = 8 * (latents - self.qk_rope_head_dim)
        kept = latents + 4 * queries + values if copied else latents + 2 * queries + 3 * values
        # Gradients of queries, keys, values and the result, which has made room for its own.
        flowing = 4 * queries - values if copied else 2 * queries + 2 * values
        return Live(
            peak_bytes=float(peak * step.element_bytes) + wide,
            saved_bytes=float(step.tokens * (kept * step.element_bytes + normed) * step.training),
            backward_bytes=float(step.tokens * flowing * step.element_bytes * step.training),
        )

    def _in_float32(self, step: Step) -> float:
        """Bytes that a processor's attention makes for itself of a prompt that sees all of itself."""
        if step.fused or step.training or step.past_tokens or self.selects(step.new_tokens):
            return 0.0
        return prompt_bytes(tokens=step.new_tokens, group=1, key_dim=self.qk_head_dim, value_dim=self.v_head_dim)

    def share(self, cards: int) -> Self:
        return self.model_copy(update={"num_attention_heads": -(-self.num_attention_heads // cards)})

    @classmethod
    def tiny(cls) -> list[Self]:
        base = {"num_attention_heads": 4, "kv_lora_rank": 24, "qk_nope_head_dim": 16, "v_head_dim": 12}
        base |= {"qk_rope_head_dim": 8}
        yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "mscale_all_dim": 1.0}
        options: list[dict[str, object]] = [
            {"q_lora_rank": 20},
            {"rope": None},
            {"q_lora_rank": 20, "bias": True, "rope": yarn | {"mscale": 1.0, "interleaved": True}},
            # Sixteen heads: with few of them, scores are often exactly zero, and which of equals is best is nobody's promise.
            {"q_lora_rank": 20, "indexer": {"n_heads": 16, "head_dim": 12, "topk": 5}},
        ]
        return [cls.model_validate(base | option) for option in options]

    @classmethod
    def typical(cls) -> tuple[Self, int]:
        return cls(
            num_attention_heads=16,
            q_lora_rank=384,
            kv_lora_rank=256,
            qk_nope_head_dim=64,
            qk_rope_head_dim=32,
            v_head_dim=64,
        ), 1024
