"""A guided mixer (Zamba2, arXiv 2411.15242): a shared transformer block adds to what a mixer reads.

    g = mlp(norm(attention(norm([h, e]))))          e: the token embeddings; attention and MLP are shared between places
    y = mixer(norm(h + g W))                        W and the mixer belong to the place

What is shared is made to fit each place by low-rank adapters on its projections. Stands in a residual without norm of its
own; name it under a model's `shared` to share it.
"""

from typing import Literal, Self

from pydantic import PositiveFloat, PositiveInt, model_validator

from archcompass.blocks.activations import Activation
from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.base import AnyBlock, Block, Live, Op, Parameters, StateTensor, Step, Traits, gemm, pointwise
from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.errors import SpecError


class Guided(Block):
    """A mixer, and the transformer block that guides it.

    Attributes:
        mixer: the block that mixes, such as Mamba-2.
        attention: of the guide; it reads state and embeddings side by side, twice the width, and writes the width.
        intermediate_size, hidden_act, mlp_bias: the guide's gated MLP.
        adapter_rank: rank of the adapters on the MLP's first projection; None has no adapters.
        attention_adapters: adapters of that rank on queries, keys and values too.
        norm_eps: of all norms inside.
    """

    label = "guided mixer"
    kind: Literal["guided"] = "guided"
    mixer: AnyBlock
    attention: Attention
    intermediate_size: PositiveInt
    hidden_act: Activation = "gelu"
    mlp_bias: bool = False
    adapter_rank: PositiveInt | None = None
    attention_adapters: bool = False
    norm_eps: PositiveFloat = 1e-5

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.mixer.traits.role != "mixer":
            raise SpecError(f"mixer is a {self.mixer.traits.role}; it must be a mixer, such as mamba2")
        if self.attention_adapters and self.adapter_rank is None:
            raise SpecError("attention_adapters need adapter_rank")
        if self.attention.output_gate or self.attention.output_bias:
            raise SpecError("attention inside a guided mixer has neither output_gate nor output_bias")
        return self

    @property
    def mlp(self) -> GatedMLP:
        """The guide's MLP."""
        return GatedMLP(intermediate_size=self.intermediate_size, hidden_act=self.hidden_act, bias=self.mlp_bias)

    @property
    def adapted(self) -> tuple[int, ...]:
        """Columns of the projections with adapters: queries, keys and values, if those have any."""
        if not self.attention_adapters:
            return ()
        return self.attention.query_width, self.attention.key_width, self.attention.key_width

    def check(self, width: int) -> None:
        self.mixer.check(width)

    @property
    def traits(self) -> Traits:
        mixer, guide = self.mixer.traits, self.attention.traits
        return Traits(
            role="mixer",
            mixes_time=True,
            bounded_state=mixer.bounded_state and guide.bounded_state,
            exact_recall=mixer.exact_recall or guide.exact_recall,
            subquadratic=mixer.subquadratic and guide.subquadratic,
            sparse_activation=mixer.sparse_activation,
        )

    def parameters(self, width: int) -> Parameters:
        narrower = -self.attention.query_width * width  # the output is `width` wide, the input twice that
        guide = self.attention.parameters(2 * width) + Parameters(matrix=narrower, vector=3 * width)
        return guide + self.mlp.parameters(width) + self.own_parameters(width)

    def own_parameters(self, width: int) -> Parameters:
        rank = self.adapter_rank or 0
        adapters = rank * (width + self.mlp.inward if rank else 0)
        adapters += sum(rank * (2 * width + columns) for columns in self.adapted)
        return self.mixer.parameters(width) + Parameters(matrix=width * width + adapters, vector=width)

    def state(self, width: int, context: int) -> list[StateTensor]:
        parts = (("attention", self.attention.state(2 * width, context)), ("mixer", self.mixer.state(width, context)))
        return [
            StateTensor(name=f"{part}.{tensor.name}", shape=tensor.shape, dtype=tensor.dtype, grows=tensor.grows)
            for part, tensors in parts
            for tensor in tensors
        ]

    def work(self, width: int, step: Step) -> list[Op]:
        rows = step.tokens
        guide = self.attention.work(2 * width, step)[:-1]
        guide += [gemm(step, "output projection", rows, self.attention.query_width, width), *self.mlp.work(width, step)]
        return [
            pointwise(step, "guide norms", rows * 3 * width),
            *(op._replace(name=f"guide: {op.name}") for op in guide),
            *self._adapter_work(width, step),
            gemm(step, "guide projection", rows, width, width),
            pointwise(step, "norm", rows * width, reads=2),
            *self.mixer.work(width, step),
        ]

    def _adapter_work(self, width: int, step: Step) -> list[Op]:
        if self.adapter_rank is None:
            return []
        sizes = [(2 * width, columns) for columns in self.adapted] + [(width, self.mlp.inward)]
        pairs = [((inner, self.adapter_rank), (self.adapter_rank, columns)) for inner, columns in sizes]
        return [gemm(step, "guide adapter", step.tokens, *shape) for pair in pairs for shape in pair]

    def live(self, width: int, step: Step) -> Live:
        parts = [self.attention.live(2 * width, step), self.mlp.live(width, step), self.mixer.live(width, step)]
        stream = 4 * step.tokens * width * step.element_bytes
        return Live(
            peak_bytes=stream + max(part.peak_bytes for part in parts),
            saved_bytes=sum(part.saved_bytes for part in parts) + stream * step.training,
            backward_bytes=max(part.backward_bytes for part in parts),
        )

    @classmethod
    def tiny(cls) -> list[Self]:
        attention = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
        mamba = {"kind": "mamba2", "num_heads": 4, "head_dim": 8, "state_size": 8}
        base: dict[str, object] = {"mixer": mamba, "attention": attention, "intermediate_size": 40}
        return [
            cls.model_validate(base),
            cls.model_validate(base | {"adapter_rank": 3, "attention_adapters": True, "mlp_bias": True}),
        ]
