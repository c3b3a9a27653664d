"""Block-sparse attention: every query attends to a few blocks of earlier keys.

    blocks(t) = the latest local_blocks  ∪  the first global_blocks  ∪  every stride-th  ∪  the best topk_blocks by q · mean(k)

By content it is MoBA (arXiv 2502.13189); by position it is the strided and fixed patterns of Sparse Transformers (arXiv
1904.10509) and the sinks and window of StreamingLLM (arXiv 2309.17453). With `compressed` and `sliding_window` it is shaped
like NSA (arXiv 2502.11089): three attentions, over block means, chosen blocks and a window, summed by gates

    out = g_c · attend(mean k, mean v) + g_s · attend(chosen) + g_w · attend(window),   g = sigmoid(x W_g) per head

with plain means where NSA learns to compress. Blocks count from the first token; heads of one key-value head share a choice.
"""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from archcompass.blocks.base import (
    Block,
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
from archcompass.kernels.attention.cost import attention_cost, sparse_attention_cost
from archcompass.kernels.cost import ceil_div


class BlockSparseAttention(Block):
    """Grouped-query attention over chosen blocks.

    Attributes:
        num_attention_heads: query heads (H).
        num_key_value_heads: key and value heads; divides the query heads.
        head_dim: channels of a head (D).
        rope: rotary positions, or None.
        block_size: keys per block.
        local_blocks: the block a query stands in and those right before it, so many in all.
        global_blocks: the first blocks of the sequence.
        stride: every so many blocks one more, from the first on; None for no such pattern.
        topk_blocks: complete blocks chosen by content among the rest.
        compressed: a second attention over the means of all complete blocks.
        sliding_window: a third one over the latest keys, so many.
        scale: of the logits; None is head_dim^-0.5.
    """

    label = "block-sparse attention"
    kind: Literal["block_sparse_attention"] = "block_sparse_attention"
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    rope: Rope | None = Field(default_factory=Rope)
    block_size: PositiveInt = 64
    local_blocks: PositiveInt = 1
    global_blocks: NonNegativeInt = 0
    stride: PositiveInt | None = None
    topk_blocks: NonNegativeInt = 0
    compressed: bool = False
    sliding_window: PositiveInt | None = None
    scale: PositiveFloat | None = None

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        must_divide("num_key_value_heads", self.num_key_value_heads, "num_attention_heads", self.num_attention_heads)
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
    def branches(self) -> int:
        """How many attentions are summed; gates weigh them when there are several."""
        return 1 + self.compressed + (self.sliding_window is not None)

    @property
    def keeps_means(self) -> bool:
        """Whether means of complete blocks are needed."""
        return self.compressed or self.topk_blocks > 0

    def slots(self, keys: int) -> int:
        """Blocks per query, unused slots included, when there are `keys` of them."""
        strided = ceil_div(ceil_div(keys, self.block_size), self.stride) if self.stride else 0
        return self.local_blocks + self.global_blocks + strided + min(self.topk_blocks, keys // self.block_size)

    @property
    def traits(self) -> Traits:
        grows = self.stride is not None or self.keeps_means
        return Traits(
            role="mixer",
            mixes_time=True,
            bounded_state=False,
            exact_recall=self.topk_blocks > 0,
            subquadratic=not grows,
        )

    def parameters(self, width: int) -> Parameters:
        gates = self.num_attention_heads * self.branches if self.branches > 1 else 0
        inward = width * (self.query_width + 2 * self.key_width)
        return Parameters(matrix=inward + self.query_width * width, vector=width * gates)

    def state(self, width: int, context: int) -> list[StateTensor]:
        head = (self.num_key_value_heads, self.head_dim)
        rows = [("tokens.key", context), ("tokens.value", context)]
        if complete := context // self.block_size:
            rows += [("means.key", complete)] if self.keeps_means else []
            rows += [("means.value", complete)] if self.compressed else []
        return [StateTensor(name=name, shape=(size, *head), dtype="cache", grows=True) for name, size in rows]

    def work(self, width: int, step: Step) -> list[Op]:
        rows = step.tokens
        keys = step.past_tokens + step.new_tokens
        gates = self.num_attention_heads * self.branches
        return [
            gemm(step, "qkv projection", rows, width, self.query_width + 2 * self.key_width),
            *([pointwise(step, "rotary", rows * (self.query_width + self.key_width))] if self.rope else []),
            *self._mean_work(step, keys),
            self._core(step, keys),
            *([self._window(step)] if self.sliding_window else []),
            *([gemm(step, "gates", rows, width, gates, quantised=False)] if self.branches > 1 else []),
            *([pointwise(step, "sum of branches", rows * self.query_width, reads=4)] if self.branches > 1 else []),
            gemm(step, "output projection", rows, self.query_width, width),
        ]

    def _mean_work(self, step: Step, keys: int) -> list[Op]:
        """Products of every query with the mean of every complete block, and back."""
        complete = keys // self.block_size
        if not self.keeps_means or not complete:
            return []
        rows = step.tokens * self.num_attention_heads
        read = step.cache_precision.bytes(step.batch * complete * self.key_width)
        products = [gemm(step, "block scores", rows, self.head_dim, complete)]
        if self.compressed:
            products.append(gemm(step, "compressed attention", rows, complete, self.head_dim))
        return [op._replace(weight_bytes=0.0, state_bytes=read, compute=step.activations) for op in products]

    def _core(self, step: Step, keys: int) -> Op:
        """Shape is (batch, heads, key heads, new tokens, keys of the slots, key_dim, value_dim)."""
        cost = sparse_attention_cost(
            batch=step.batch,
            new_tokens=step.new_tokens,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            key_dim=self.head_dim,
            value_dim=self.head_dim,
            slots=self.slots(keys),
            block_size=self.block_size,
            element_bytes=step.element_bytes,
        )
        heads = (self.num_attention_heads, self.num_key_value_heads)
        chosen = self.slots(keys) * self.block_size
        shape = (step.batch, *heads, step.new_tokens, chosen, self.head_dim, self.head_dim)
        operation = costed(step, "attention", "block-sparse attention", cost, shape)
        return operation if step.training else operation._replace(state_bytes=step.cached_bytes(cost.state_bytes))

    def _window(self, step: Step) -> Op:
        """Shape is that of attention; the step is handed the whole cache, and reads its window."""
        keys = step.past_tokens + step.new_tokens
        cost = attention_cost(
            batch=step.batch,
            new_tokens=step.new_tokens,
            keys=keys,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            key_dim=self.head_dim,
            value_dim=self.head_dim,
            window=self.sliding_window,
            element_bytes=step.element_bytes,
        )
        heads = (self.num_attention_heads, self.num_key_value_heads)
        shape = (step.batch, *heads, step.new_tokens, keys, self.head_dim, self.head_dim)
        operation = costed(step, "attention", "window attention", cost, shape)
        return operation if step.training else operation._replace(state_bytes=step.cached_bytes(cost.state_bytes))

    def share(self, cards: int) -> Self:
        heads, groups = shared_heads(self.num_attention_heads, self.num_key_value_heads, cards)
        return self.model_copy(update={"num_attention_heads": heads, "num_key_value_heads": groups})

    @classmethod
    def tiny(cls) -> list[Self]:
        base = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "block_size": 4}
        options: list[dict[str, object]] = [
            {"topk_blocks": 2},
            {"local_blocks": 2, "global_blocks": 1, "stride": 2, "rope": None},
            {"topk_blocks": 1, "compressed": True, "sliding_window": 5, "num_key_value_heads": 4, "scale": 0.3},
            {"local_blocks": 2, "global_blocks": 1},
        ]
        return [cls.model_validate(base | option) for option in options]
