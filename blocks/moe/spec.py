"""Mixture of experts (Shazeer et al., arXiv 1701.06538): many small MLPs, of which a router gives each token a few.

    y = Σ_{e in chosen(x)} weight_e · expert_e(x) + shared(x)

One block for the routers in use: softmax (Mixtral, Qwen3, Jamba), softmax over the chosen (gpt-oss, Granite), sigmoid with
groups and a selection bias (DeepSeek-V3, arXiv 2412.19437), and sigmoid on the expert's input (Llama 4). The experts are
stacked tensors, so a model of hundreds of experts is a handful of parameters.
"""

from typing import Literal, Self

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from archcompass.blocks.base import Block, Live, Op, Parameters, Step, Traits, gemm, must_divide, pointwise
from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.errors import SpecError
from archcompass.kernels.moe import expected_distinct_experts
from archcompass.kernels.moe.memory import one_by_one


class MoE(Block):
    """A channel mixer with routed experts.

    Attributes:
        num_experts: routed experts (E).
        num_experts_per_tok: experts each token is sent to (k).
        routing: tokens choose experts; or, in training alone, experts choose the tokens that score best with them, each its
            share of the batch (Zhou et al., arXiv 2202.09368). That balances load without a loss, but lets an output depend
            on later tokens, which is why decoding returns to the tokens' own choice.
        moe_intermediate_size: hidden channels of one expert (I).
        hidden_act, gated: what an expert does between its matrices, as in `GatedMLP`.
        swiglu_alpha: gate · sigmoid(alpha · gate) in the place of `hidden_act` (gpt-oss).
        swiglu_limit: gate is clamped to at most this, up to within ± this (gpt-oss).
        up_offset: constant added to up (gpt-oss: 1).
        expert_bias: biases inside the experts.
        scoring_func: softmax over all experts, sigmoid, or softmax over the chosen ones ("topk_softmax").
        norm_topk_prob: the chosen weights are divided by their sum.
        routed_scaling_factor: constant on the weights.
        n_group, topk_group: experts come in n_group groups, of which a token may use topk_group (DeepSeek-V3).
        selection_bias: a bias on the scores for the choice alone. It is set by load, not learned by gradient, so it is a
            buffer and no parameter (DeepSeek-V3's e_score_correction_bias).
        router_bias: a learned bias on the router's logits.
        router_in_fp32: the router's product itself is taken in float32 (DeepSeek-V3, Nemotron 3).
        scale_input: the weight multiplies the expert's input rather than its output (Llama 4).
        shared_expert_intermediate_size: hidden channels of the expert every token uses (DeepSeek: n_shared_experts · I).
        shared_expert_gate: that expert's output is multiplied by sigmoid(x w) (Qwen3-Next).
        latent_size: the experts act on a projection of so many channels, and are projected back (Nemotron 3).
        router_aux_loss_coef: of the load-balance loss in training (Switch Transformer, arXiv 2101.03961).
    """

    label = "mixture of experts"
    kind: Literal["moe"] = "moe"
    num_experts: PositiveInt
    num_experts_per_tok: PositiveInt
    moe_intermediate_size: PositiveInt
    routing: Literal["token_choice", "expert_choice"] = "token_choice"
    hidden_act: Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"] = "silu"
    gated: bool = True
    swiglu_alpha: PositiveFloat | None = None
    swiglu_limit: PositiveFloat | None = None
    up_offset: float = 0.0
    expert_bias: bool = False
    scoring_func: Literal["softmax", "sigmoid", "topk_softmax"] = "softmax"
    norm_topk_prob: bool = True
    routed_scaling_factor: PositiveFloat = 1.0
    n_group: PositiveInt | None = None
    topk_group: PositiveInt | None = None
    selection_bias: bool = False
    router_bias: bool = False
    router_in_fp32: bool = False
    scale_input: bool = False
    shared_expert_intermediate_size: NonNegativeInt = 0
    shared_expert_gate: bool = False
    latent_size: PositiveInt | None = None
    router_aux_loss_coef: NonNegativeFloat = Field(default=0.001)

    @model_validator(mode="after")
    def _choice_is_possible(self) -> Self:
        if self.num_experts_per_tok > self.num_experts:
            raise SpecError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must be at most num_experts ({self.num_experts})"
            )
        if (self.n_group is None) != (self.topk_group is None):
            raise SpecError(f"n_group is {self.n_group} and topk_group {self.topk_group}; give both or neither")
        if self.n_group is not None and self.topk_group is not None:
            self._check_groups(self.n_group, self.topk_group)
        if not self.gated and (self.swiglu_alpha or self.swiglu_limit or self.up_offset):
            raise SpecError("swiglu_alpha, swiglu_limit and up_offset need gated: true")
        if self.routing == "expert_choice" and (self.selection_bias or self.n_group or self.scale_input):
            raise SpecError("routing: expert_choice needs no selection_bias, n_group or scale_input; leave them out")
        if self.routing == "expert_choice" and self.scoring_func == "topk_softmax":
            raise SpecError("routing: expert_choice scores all experts; scoring_func is softmax or sigmoid")
        if self.shared_expert_gate and not self.shared_expert_intermediate_size:
            raise SpecError("shared_expert_gate needs a shared expert; give shared_expert_intermediate_size")
        return self

    def _check_groups(self, groups: int, kept: int) -> None:
        must_divide("n_group", groups, "num_experts", self.num_experts)
        if kept > groups:
            raise SpecError(f"topk_group ({kept}) must be at most n_group ({groups})")
        if kept * (self.num_experts // groups) < self.num_experts_per_tok:
            raise SpecError(
                f"topk_group ({kept}) groups hold {kept * (self.num_experts // groups)} experts, fewer than "
                f"num_experts_per_tok ({self.num_experts_per_tok})"
            )

    @property
    def inward(self) -> int:
        """Columns of an expert's first projection."""
        return self.moe_intermediate_size * (2 if self.gated else 1)

    @property
    def shared(self) -> GatedMLP | None:
        """The expert that every token uses."""
        size = self.shared_expert_intermediate_size
        return GatedMLP(intermediate_size=size, hidden_act=self.hidden_act, gated=self.gated) if size else None

    @property
    def traits(self) -> Traits:
        return Traits(
            role="channel",
            sparse_activation=self.num_experts_per_tok < self.num_experts,
            causal_in_training=self.routing == "token_choice",
        )

    def expert_width(self, width: int) -> int:
        """Channels that go into a routed expert."""
        return self.latent_size or width

    def parameters(self, width: int) -> Parameters:
        inner, experts = self.expert_width(width), self.num_experts
        weights = inner * (self.inward + self.moe_intermediate_size)
        biases = self.inward + inner if self.expert_bias else 0
        routed = Parameters(
            matrix=experts * weights + (2 * width * self.latent_size if self.latent_size else 0),
            vector=experts * (biases + width + self.router_bias),
            idle=(experts - self.num_experts_per_tok) * (weights + biases),
            routed=experts * weights,
        )
        if self.shared is None:
            return routed
        return routed + self.shared.parameters(width) + Parameters(vector=width if self.shared_expert_gate else 0)

    def work(self, width: int, step: Step) -> list[Op]:
        rows, chosen, inner = step.tokens, step.tokens * self.num_experts_per_tok, self.expert_width(width)
        operations = [
            gemm(step, "router", rows, width, self.num_experts, quantised=False),
            pointwise(step, "routing", rows * self.num_experts, reads=2),
            *([gemm(step, "latent projection", rows, width, inner)] if self.latent_size else []),
            pointwise(step, "dispatch", chosen * inner),
            self._grouped(step, "experts in", inner, self.inward),
            pointwise(step, "activation", chosen * self.moe_intermediate_size, reads=2 if self.gated else 1),
            self._grouped(step, "experts out", self.moe_intermediate_size, inner),
            pointwise(step, "combine", rows * inner, reads=self.num_experts_per_tok),
            *([gemm(step, "latent output projection", rows, inner, width)] if self.latent_size else []),
        ]
        return operations + self._shared_work(width, step)

    def _grouped(self, step: Step, name: str, inner: int, columns: int) -> Op:
        """One product per expert; shape is (rows of all experts, inner, columns, experts touched).

        The weights read are those of the experts that the tokens are expected to touch, not of all.
        """
        rows = step.tokens * self.num_experts_per_tok
        touched = expected_distinct_experts(self.num_experts, self.num_experts_per_tok, step.tokens)
        dense = gemm(step, name, rows, inner, columns)
        shape = (rows, inner, columns, max(1, round(touched)))
        return dense._replace(kind="grouped_gemm", weight_bytes=dense.weight_bytes * touched, shape=shape)

    def _shared_work(self, width: int, step: Step) -> list[Op]:
        if self.shared is None:
            return []
        operations = [op._replace(name=f"shared expert {op.name}") for op in self.shared.work(width, step)]
        if self.shared_expert_gate:
            operations.append(gemm(step, "shared expert gate", step.tokens, width, 1, quantised=False))
        return [*operations, pointwise(step, "shared expert sum", step.tokens * width, reads=2)]

    def live(self, width: int, step: Step) -> Live:
        chosen, inner = step.tokens * self.num_experts_per_tok, self.expert_width(width)
        rows = chosen * (self.inward + self.moe_intermediate_size)
        if not (step.fused or step.training) and one_by_one(chosen, inner, step.element_bytes):
            rows = (rows + chosen * inner) // self.num_experts  # those of one expert, as many as the others have
        hidden = (rows + chosen * inner) * step.element_bytes
        routing = step.tokens * 4 * self.num_experts + chosen * 32
        shared = self.shared.live(width, step) if self.shared else Live()
        latent = step.tokens * inner * step.element_bytes if self.latent_size else 0
        stream = step.tokens * width * step.element_bytes
        kept = chosen * self.inward * step.element_bytes + 2 * routing + 2 * latent  # the rest is computed again
        # Gradients of what enters and leaves each product, the pairs' tokens again, and the tokens' own gradient.
        flowing = chosen * (2 * self.inward + self.moe_intermediate_size + 2 * inner) * step.element_bytes + stream
        return Live(
            peak_bytes=max(latent + hidden + routing, stream + shared.peak_bytes),
            saved_bytes=kept * step.training + shared.saved_bytes,
            backward_bytes=max(flowing * step.training, shared.backward_bytes),
        )

    def share(self, cards: int) -> Self:
        sizes = ("moe_intermediate_size", "shared_expert_intermediate_size")
        return self.model_copy(update={size: -(-getattr(self, size) // cards) for size in sizes})

    @classmethod
    def tiny(cls) -> list[Self]:
        base = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
        options: list[dict[str, object]] = [
            {},
            {"norm_topk_prob": False, "shared_expert_intermediate_size": 24, "shared_expert_gate": True},
            {
                "scoring_func": "sigmoid",
                "n_group": 4,
                "topk_group": 2,
                "selection_bias": True,
                "routed_scaling_factor": 2.5,
                "router_in_fp32": True,
                "shared_expert_intermediate_size": 16,
            },
            {
                "scoring_func": "topk_softmax",
                "router_bias": True,
                "expert_bias": True,
                "swiglu_alpha": 1.702,
                "swiglu_limit": 7.0,
                "up_offset": 1.0,
            },
            {"num_experts_per_tok": 1, "scoring_func": "sigmoid", "norm_topk_prob": False, "scale_input": True},
            {"hidden_act": "relu2", "gated": False, "latent_size": 12, "shared_expert_intermediate_size": 16},
            {"routing": "expert_choice", "norm_topk_prob": False, "expert_bias": True},
        ]
        return [cls.model_validate(base | option) for option in options]

    @classmethod
    def typical(cls) -> tuple[Self, int]:
        return cls(num_experts=16, num_experts_per_tok=2, moe_intermediate_size=512), 768
