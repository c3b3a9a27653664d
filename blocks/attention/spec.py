"""Softmax attention: multi-head, grouped-query (Ainslie et al., arXiv 2305.13245) and multi-query, full or windowed.

    out = softmax(q kᵀ · scale) v,   q, k turned by position,   every group of heads shares one key and value head.

The state is keys and values of every token a later query may see.
"""

from typing import Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from archcompass.blocks.base import (
    Block,
    Live,
    Op,
    Parameters,
    StateTensor,
    Step,
    Traits,
    costed,
    gemm,
    must_divide,
    pointwise,
    shared_heads,
)
from archcompass.blocks.rope import Rope
from archcompass.errors import SpecError
from archcompass.kernels.attention.cost import attention_cost
from archcompass.kernels.attention.memory import prompt_bytes


class Attention(Block):
    """Grouped-query attention.

    Attributes:
        num_attention_heads: query heads (H).
        num_key_value_heads: key and value heads; divides the query heads.
        head_dim: channels of a head (D); not tied to hidden_size.
        rope: rotary positions, or None for no position at all (NoPE).
        sliding_window: a query sees this many keys back, itself included; None sees all.
        attention_chunk_size: a query sees its own absolute block of this many positions only (Llama 4).
        qk_norm: RMSNorm on queries and keys, over each head or over all heads together.
        qk_norm_eps: its epsilon.
        qk_norm_unit_offset: its weight is stored as the distance from one.
        qk_norm_weight: whether it has a weight at all (Llama 4 has none).
        qk_norm_after_rope: queries and keys are normed once they are turned (Llama 4), not before.
        qkv_bias, output_bias: biases of the projections.
        sinks: a learned logit per head that joins the softmax and is dropped (gpt-oss).
        logit_soft_cap: cap · tanh(logit / cap) before the softmax (Gemma 2).
        scale: of the logits; None is head_dim^-0.5.
        output_gate: output · sigmoid(gate), the gate projected beside the queries (Qwen3-Next).
        temperature_floor_scale, temperature_attn_scale: queries at position p are multiplied by
            log(1 + floor((p + 1) / floor_scale)) · attn_scale + 1; None for the first is no such thing (Llama 4's NoPE layers).
        in_multiplier, key_multiplier, out_multiplier: constants on the block's input, its keys and its output (Falcon-H1).
    """

    label = "attention"
    kind: Literal["attention"] = "attention"
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    rope: Rope | None = Field(default_factory=Rope)
    sliding_window: PositiveInt | None = None
    attention_chunk_size: PositiveInt | None = None
    qk_norm: Literal["none", "head", "all"] = "none"
    qk_norm_eps: PositiveFloat = 1e-6
    qk_norm_unit_offset: bool = False
    qk_norm_weight: bool = True
    qk_norm_after_rope: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    sinks: bool = False
    logit_soft_cap: PositiveFloat | None = None
    scale: PositiveFloat | None = None
    output_gate: bool = False
    temperature_floor_scale: PositiveFloat | None = None
    temperature_attn_scale: PositiveFloat = 0.1
    in_multiplier: float = 1.0
    key_multiplier: float = 1.0
    out_multiplier: float = 1.0

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        must_divide("num_key_value_heads", self.num_key_value_heads, "num_attention_heads", self.num_attention_heads)
        if self.sliding_window and self.attention_chunk_size:
            raise SpecError("sliding_window and attention_chunk_size exclude each other; keep one")
        if self.qk_norm == "all" and self.qk_norm_after_rope:
            raise SpecError("qk_norm_after_rope norms each head; use qk_norm: head")
        if self.rope is not None:
            self.rope.rotary_dim(self.head_dim)
        return self

    @property
    def query_width(self) -> int:
        """Channels of all query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Channels of all key heads."""
        return self.num_key_value_heads * self.head_dim

    @property
    def _norm_weights(self) -> int:
        if not self.qk_norm_weight:
            return 0
        return {"none": 0, "head": 2 * self.head_dim, "all": self.query_width + self.key_width}[self.qk_norm]

    @property
    def traits(self) -> Traits:
        window = self.sliding_window or self.attention_chunk_size
        return Traits(
            role="mixer",
            mixes_time=True,
            bounded_state=window is not None,
            exact_recall=window is None,
            window=window,
            subquadratic=window is not None,
        )

    def parameters(self, width: int) -> Parameters:
        gate = self.query_width if self.output_gate else 0
        inward = width * (self.query_width + gate + 2 * self.key_width)
        vector = self.num_attention_heads if self.sinks else 0
        vector += self.query_width + gate + 2 * self.key_width if self.qkv_bias else 0
        vector += width if self.output_bias else 0
        vector += self._norm_weights
        return Parameters(matrix=inward + self.query_width * width, vector=vector)

    def state(self, width: int, context: int) -> list[StateTensor]:
        kept = self._visible(context)
        shape = (kept, self.num_key_value_heads, self.head_dim)
        grows = self.sliding_window is None and self.attention_chunk_size is None
        held = 1.0 if grows else min(context, 2 * kept) / max(kept, 1)
        return [StateTensor(name=name, shape=shape, dtype="cache", grows=grows, held=held) for name in ("key", "value")]

    def work(self, width: int, step: Step) -> list[Op]:
        rows, gate = step.tokens, self.query_width if self.output_gate else 0
        turned = rows * (self.query_width + self.key_width)
        return [
            gemm(step, "qkv projection", rows, width, self.query_width + gate + 2 * self.key_width),
            *([pointwise(step, "rotary", turned)] if self.rope else []),
            *([pointwise(step, "query-key norm", turned)] if self.qk_norm != "none" else []),
            self._core(step),
            *([pointwise(step, "output gate", rows * gate, reads=2)] if gate else []),
            gemm(step, "output projection", rows, self.query_width, width),
        ]

    def live(self, width: int, step: Step) -> Live:
        queries, keys = self.query_width, self.key_width
        projected = queries * (2 if self.output_gate else 1) + 2 * keys
        turned = queries if self.rope or self.qk_norm != "none" else 0
        gated = 2 * queries if self.output_gate else 0
        peak = projected + turned + queries
        saved = projected + queries + (turned and turned + keys) + gated
        then = float(step.tokens * max(width, gated) * step.element_bytes)
        normed = 8 * (queries + keys) if self.qk_norm != "none" else 0
        return Live(
            peak_bytes=step.tokens * peak * step.element_bytes + max(then, self._in_float32(step)),
            saved_bytes=float(step.tokens * (saved * step.element_bytes + normed) * step.training),
            # Gradients of the result, the queries, the keys and the values.
            backward_bytes=2.0 * step.tokens * (queries + keys) * step.element_bytes * step.training,
        )

    def _in_float32(self, step: Step) -> float:
        """Bytes that a processor's attention makes for itself: a step's keys and values, unless several query heads share
        them, and what a prompt takes that sees all of itself."""
        group = self.num_attention_heads // self.num_key_value_heads
        if step.fused or step.training:
            return 0.0
        if step.new_tokens == 1:
            alone = group == 1 and step.element_bytes < 4
            return alone * 8.0 * step.batch * self._visible(step.context) * self.key_width
        if step.past_tokens or self.sinks or self.logit_soft_cap or self._visible(step.context) < step.context:
            return 0.0
        return prompt_bytes(tokens=step.new_tokens, group=group, key_dim=self.head_dim, value_dim=self.head_dim)

    def _visible(self, context: int) -> int:
        """Keys kept once `context` tokens were seen."""
        if self.sliding_window is not None:
            return min(context, self.sliding_window)
        if self.attention_chunk_size is not None:
            return min(context, self.attention_chunk_size)
        return context

    def _core(self, step: Step) -> Op:
        """Scores, softmax and the weighted sum.

        Shape is (batch, heads, key heads, new tokens, keys, key_dim, value_dim).
        """
        past = self._visible(step.past_tokens)
        keys = past + step.new_tokens
        cost = attention_cost(
            batch=step.batch,
            new_tokens=step.new_tokens,
            keys=keys,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            key_dim=self.head_dim,
            value_dim=self.head_dim,
            window=self.sliding_window,
            chunk=self.attention_chunk_size,
            key_offset=step.past_tokens - past,
            element_bytes=step.element_bytes,
        )
        heads = (self.num_attention_heads, self.num_key_value_heads)
        shape = (step.batch, *heads, step.new_tokens, keys, self.head_dim, self.head_dim)
        operation = costed(step, "attention", "attention", cost, shape)
        return operation if step.training else operation._replace(state_bytes=step.cached_bytes(cost.state_bytes))

    def share(self, cards: int) -> Self:
        heads, groups = shared_heads(self.num_attention_heads, self.num_key_value_heads, cards)
        return self.model_copy(update={"num_attention_heads": heads, "num_key_value_heads": groups})

    @classmethod
    def tiny(cls) -> list[Self]:
        base: dict[str, object] = {"num_attention_heads": 4, "head_dim": 16}
        options: list[dict[str, object]] = [
            {"num_key_value_heads": 4},
            {"num_key_value_heads": 1, "qk_norm": "head", "qkv_bias": True, "output_bias": True},
            {"num_key_value_heads": 2, "sliding_window": 5, "rope": Rope(partial_rotary_factor=0.5), "sinks": True},
            {"num_key_value_heads": 2, "attention_chunk_size": 4, "qk_norm": "all", "rope": Rope(interleaved=True)},
            {"num_key_value_heads": 4, "rope": None, "logit_soft_cap": 5.0, "output_gate": True, "scale": 0.5},
            {"num_key_value_heads": 2, "rope": None, "temperature_floor_scale": 4.0, "temperature_attn_scale": 0.3},
            {"num_key_value_heads": 2, "qk_norm": "head", "qk_norm_weight": False, "qk_norm_after_rope": True}
            | {"in_multiplier": 0.5, "key_multiplier": 1.5, "out_multiplier": 2.0},
        ]
        return [cls.model_validate(base | option) for option in options]

    @classmethod
    def typical(cls) -> tuple[Self, int]:
        return cls(num_attention_heads=16, num_key_value_heads=4, head_dim=64), 1024
