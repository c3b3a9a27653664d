"""The terms in which a block speaks: the step it is asked about, and what it answers with, without torch.

Conventions. A multiply-add counts as two FLOPs. `Op.flops` counts matrix products and convolutions only, as torch's
counter does; elementwise work is paid in bytes. Attention counts the query-key pairs it may see, so a causal prompt costs
about half its square. Training counts forward and backward, three times the forward.

Records that are made by the thousand are named tuples, which come into being sooner than dataclasses.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from archcompass.blocks.precision import BF16, DTYPE_BYTES, Precision
from archcompass.kernels.cost import Cost

OpKind = Literal[
    "gemm",
    "grouped_gemm",
    "attention",
    "scan",
    "delta_rule",
    "selective_scan",
    "conv",
    "pointwise",
    "gather",
    "collective",
]

Role = Literal["mixer", "channel", "norm", "embedding", "head", "model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One forward call of a model, as far as its cost goes.

    A prefill is `new_tokens = prompt, past_tokens = 0`; a decode step is `new_tokens = 1, past_tokens = context`.

    Attributes:
        batch: sequences computed together.
        new_tokens: tokens per sequence that enter.
        past_tokens: tokens per sequence that the state already holds.
        training: forward and backward, no state kept.
        precision: storage of weight matrices. Norms, biases, routers, decays and the embedding stay in `activations`.
        cache_precision: storage of caches that grow with context. Recurrent state is float32 whatever this says.
        activations: dtype of activations and of weights that are not quantised.
        logits_to_keep: positions whose logits are computed; 0 means all of them.
        fused: our operations run as Triton kernels, which keep intermediates on the chip; False is torch on a processor.
    """

    batch: int = 1
    new_tokens: int = 1
    past_tokens: int = 0
    training: bool = False
    precision: Precision = BF16
    cache_precision: Precision = BF16
    activations: Literal["fp32", "bf16", "fp16"] = "bf16"
    logits_to_keep: int = 1
    fused: bool = True

    @property
    def tokens(self) -> int:
        """Tokens that enter in the whole batch."""
        return self.batch * self.new_tokens

    @property
    def context(self) -> int:
        """Tokens per sequence that the state holds after the step."""
        return self.past_tokens + self.new_tokens

    @property
    def element_bytes(self) -> int:
        """Bytes of one activation."""
        return DTYPE_BYTES[self.activations]

    def cached_bytes(self, activation_bytes: float) -> float:
        """What takes `activation_bytes` as activations, stored in the cache's precision."""
        return self.cache_precision.bytes(activation_bytes / self.element_bytes)


class Op(NamedTuple):
    """Work that one kernel does.

    Attributes:
        kind: what a machine runs; efficiencies are measured per kind.
        name: which part of the block this is, for reports.
        flops: floating point operations (see the module's conventions).
        weight_bytes: weights read, as stored.
        state_bytes: caches and recurrent state read and written.
        activation_bytes: activations read and written.
        shape: sizes that decide the efficiency; (rows, inner, columns) of a matrix product, and for the others what their
            cost function documents.
        compute: dtype of the multiplications.
        count: how often it runs, in sequence.
        batched: whether several weights lie side by side in one kernel.
    """

    kind: OpKind
    name: str
    flops: float
    weight_bytes: float = 0
    state_bytes: float = 0
    activation_bytes: float = 0
    shape: tuple[int, ...] = ()
    compute: str = "bf16"
    count: int = 1  # type: ignore[assignment]  # a tuple has a method of that name, which nobody needs here
    batched: bool = False

    @property
    def bytes(self) -> float:
        """All bytes that one run moves."""
        return self.weight_bytes + self.state_bytes + self.activation_bytes

    def times(self, count: int) -> Op:
        """The same work, `count` times as often."""
        return self._replace(count=self.count * count)

    def together(self, count: int) -> Op:
        """`count` products side by side in one kernel (a batched matrix product), each with its own weight."""
        rows, inner, columns = self.shape
        return self._replace(
            flops=self.flops * count,
            weight_bytes=self.weight_bytes * count,
            activation_bytes=self.activation_bytes * count,
            shape=(rows, inner, columns * count),
            batched=True,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """Numbers a block learns, counted so that memory, speed and the labs' figures can all be read off.

    Attributes:
        matrix: elements of weight matrices, which a quantiser may shrink.
        vector: elements that stay in high precision: norms, biases, routers, convolutions, decays.
        idle: elements of `matrix` (and `vector`, for experts with biases) that one token does not touch: its routed
            experts that were not chosen.
        routed: elements of `matrix` in routed experts, which several cards may share out, or system memory may hold.
        table: elements of an input embedding that is not also the head: a lookup, not a product.
        head: elements of the output head.
    """

    matrix: int = 0
    vector: int = 0
    idle: int = 0
    routed: int = 0
    table: int = 0
    head: int = 0

    @property
    def total(self) -> int:
        """All elements. Tied weights count once."""
        return self.matrix + self.vector + self.table + self.head

    @property
    def active(self) -> int:
        """Elements that one token's products touch: total less idle experts, less the untied input table."""
        return self.total - self.idle - self.table

    @property
    def active_with_table(self) -> int:
        """Active elements, the input table included: the convention of Mixtral, Qwen3 and Kimi K2."""
        return self.total - self.idle

    @property
    def active_without_embeddings(self) -> int:
        """Active elements without input table and head: the convention of MiniMax, GLM and Qwen3-Next."""
        return self.active - self.head

    def __add__(self, other: Parameters) -> Parameters:
        return Parameters(
            matrix=self.matrix + other.matrix,
            vector=self.vector + other.vector,
            idle=self.idle + other.idle,
            routed=self.routed + other.routed,
            table=self.table + other.table,
            head=self.head + other.head,
        )

    def __mul__(self, times: int) -> Parameters:
        return Parameters(
            matrix=self.matrix * times,
            vector=self.vector * times,
            idle=self.idle * times,
            routed=self.routed * times,
            table=self.table * times,
            head=self.head * times,
        )

    def bytes(self, precision: Precision, high_bytes: int = 2) -> float:
        """Bytes of the stored weights: matrices in `precision`, the rest in `high_bytes` each.

        The embedding table and the head stay in high precision, as quantised checkpoints are published.
        """
        high = self.vector + self.table + self.head
        return precision.bytes(self.matrix) + high * high_bytes


class StateTensor(NamedTuple):
    """One tensor that lives between steps, for one sequence.

    Attributes:
        name: as the module's state calls it.
        shape: without the batch axis.
        dtype: "cache" for what follows the cache's precision, else a fixed dtype.
        grows: whether it is longer for a longer context.
        held: how many times over our modules hold it: a window that moves has its length again to move in.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Literal["cache", "fp32", "activations"]
    grows: bool
    held: float = 1.0

    @property
    def elements(self) -> int:
        product = 1
        for size in self.shape:
            product *= size
        return product

    def bytes(self, step: Step) -> float:
        """Bytes of this tensor for one sequence, at the precisions of `step`."""
        if self.dtype == "cache":
            return step.cache_precision.bytes(self.elements)
        return self.elements * (4 if self.dtype == "fp32" else step.element_bytes)


class Live(NamedTuple):
    """Activation memory of one forward call.

    Attributes:
        peak_bytes: the most that is alive at once inside the block, its output included, without its input and its state.
        saved_bytes: what autograd keeps for the backward pass, without the block's input. 0 unless training.
        backward_bytes: the most that the backward pass has alive at once beyond `saved_bytes`: gradients on their way, less
            what was kept and is needed no more; without the gradients of weights and of the block's output. 0 unless training.
    """

    peak_bytes: float = 0
    saved_bytes: float = 0
    backward_bytes: float = 0


class Traits(NamedTuple):
    """What rules may ask of a block without knowing its name.

    Attributes:
        role: its place in a layer.
        mixes_time: reads other positions.
        bounded_state: the state stays the same size however long the context.
        exact_recall: can look up any earlier token exactly (what copying needs).
        window: positions it can see back, when that is bounded by construction.
        subquadratic: prefill cost grows slower than the square of the prompt.
        sparse_activation: one token touches a part of the parameters.
        causal_in_training: in training too, no output depends on a later token (expert choice lets experts compare tokens).
    """

    role: Role
    mixes_time: bool = False
    bounded_state: bool = True
    exact_recall: bool = False
    window: int | None = None
    subquadratic: bool = True
    sparse_activation: bool = False
    causal_in_training: bool = True


def shared_heads(heads: int, groups: int, cards: int) -> tuple[int, int]:
    """(heads, groups they come in) on the fullest of `cards`; a group is never cut, but copied."""
    kept = -(-groups // cards)
    return -(-heads // (cards * kept)) * kept, kept


def gemm(step: Step, name: str, rows: int, inner: int, columns: int, *, quantised: bool = True, count: int = 1) -> Op:
    """A matrix product of `rows` activations with a weight [inner, columns]; three products when training."""
    passes = 3 if step.training else 1
    weight_bits = step.precision.bits if quantised else step.element_bytes * 8
    return Op(
        kind="gemm",
        name=name,
        flops=2.0 * rows * inner * columns * passes,
        weight_bytes=inner * columns * weight_bits / 8 * passes,
        activation_bytes=float(rows * (inner + columns) * step.element_bytes * passes),
        shape=(rows, inner, columns),
        compute=step.precision.compute if quantised and step.activations != "fp32" else step.activations,
        count=count,
    )


def pointwise(step: Step, name: str, elements: float, *, reads: int = 1, writes: int = 1, count: int = 1) -> Op:
    """Elementwise work over `elements` numbers: no FLOPs, only bytes."""
    passes = 3 if step.training else 1
    moved = elements * (reads + writes) * step.element_bytes * passes
    return Op(
        "pointwise", name, 0.0, activation_bytes=moved, shape=(int(elements),), compute=step.activations, count=count
    )


def costed(
    step: Step, kind: OpKind, name: str, cost: Cost, shape: tuple[int, ...], *, weights: float = 0, count: int = 1
) -> Op:
    """An operation whose forward cost its kernel states; three times that when training.

    Args:
        weights: elements of its own weights, read once, in the activations' dtype (a convolution's taps).
    """
    passes = 3 if step.training else 1
    return Op(
        kind=kind,
        name=name,
        flops=float(cost.flops * passes),
        weight_bytes=float(weights * step.element_bytes * passes),
        state_bytes=float(cost.state_bytes * passes),
        activation_bytes=float(cost.activation_bytes * passes),
        shape=shape,
        compute=step.activations,
        count=count,
    )
