"""A mixture of experts at work: router, grouped experts, shared expert."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archcompass.blocks.base import Block
from archcompass.blocks.gated_mlp.module import GatedMLPModule
from archcompass.blocks.moe.spec import MoE
from archcompass.blocks.runtime import BlockModule, BlockState, Context, Linear
from archcompass.kernels.moe import load_balance_loss, moe_mlp, route
from archcompass.kernels.moe.activations import Activation


class MoEModule(BlockModule):
    """x [batch, time, width] -> [batch, time, width]; no state.

    Attributes:
        gate_up: [E, 2 I, D], gate first; [E, I, D] without a gate. D is the width, or `latent_size`.
        down: [E, D, I].
        selection_bias: [E] float32 buffer, or None.
        load: [E] tokens each expert was given in training since the last `rebalance`; only with a selection bias.
    """

    spec: MoE
    selection_bias: Tensor | None
    load: Tensor | None

    def __init__(self, spec: MoE, width: int) -> None:
        super().__init__(spec, width)
        experts, inner = spec.num_experts, spec.expert_width(width)
        named = spec.hidden_act if spec.swiglu_alpha is None else "swish"
        self.activation = Activation(named, spec.gated, spec.swiglu_alpha or 1.0, spec.swiglu_limit, spec.up_offset)
        self.router = Linear(width, experts, bias=spec.router_bias)
        self.register_buffer(
            "selection_bias", torch.zeros(experts, dtype=torch.float32) if spec.selection_bias else None
        )
        self.register_buffer("load", torch.zeros(experts) if spec.selection_bias else None, persistent=False)
        self.gate_up = nn.Parameter(torch.empty(experts, spec.inward, inner))
        self.down = nn.Parameter(torch.empty(experts, inner, spec.moe_intermediate_size))
        self.gate_up_bias = nn.Parameter(torch.empty(experts, spec.inward)) if spec.expert_bias else None
        self.down_bias = nn.Parameter(torch.empty(experts, inner)) if spec.expert_bias else None
        self.latent_in = Linear(width, inner) if spec.latent_size else None
        self.latent_out = Linear(inner, width) if spec.latent_size else None
        self.shared = GatedMLPModule(spec.shared, width) if spec.shared else None
        self.shared_gate = Linear(width, 1) if spec.shared_expert_gate else None

    def reset_parameters(self) -> None:
        for weight in (self.gate_up, self.down):
            nn.init.normal_(weight, std=0.02)
        for bias in (self.gate_up_bias, self.down_bias, self.selection_bias, self.load):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(
        self, x: Tensor, state: BlockState | None = None, context: Context | None = None
    ) -> tuple[Tensor, BlockState | None]:
        tokens = x.flatten(0, 1)
        inner = tokens if self.latent_in is None else self.latent_in(tokens)
        if self.training and self.spec.routing == "expert_choice":
            routed = self._chosen_by_experts(tokens, inner, x, context)
        else:
            routed = self._chosen_by_tokens(inner, *self._route(tokens, x, context))
        routed = (routed if self.latent_out is None else self.latent_out(routed)).view_as(x)
        return routed if self.shared is None else routed + self._shared(x), state

    def _route(self, tokens: Tensor, x: Tensor, context: Context | None) -> tuple[Tensor, Tensor]:
        """Weights and experts [tokens, k]; in training the load-balance loss is noted in the context."""
        spec, logits = self.spec, self._logits(tokens)
        weights, experts = route(
            logits,
            spec.num_experts_per_tok,
            score="sigmoid" if spec.scoring_func == "sigmoid" else "softmax",
            normalize=spec.norm_topk_prob,
            selection_bias=self.selection_bias,
            groups=spec.n_group,
            groups_kept=spec.topk_group,
            scaling=spec.routed_scaling_factor,
            softmax_after_top_k=spec.scoring_func == "topk_softmax",
        )
        if self.training and context is not None and spec.router_aux_loss_coef:
            self._balance(logits, experts, x, context)
        if self.training and self.load is not None:
            self.load += experts.flatten().bincount(minlength=spec.num_experts).to(self.load.dtype)
        return weights, experts

    @torch.no_grad()
    def after_step(self) -> None:
        self.rebalance()

    def rebalance(self, rate: float = 1e-3) -> None:
        """Raises the selection bias of experts with too few tokens and lowers that of the others, once per training step.

        DeepSeek-V3's balance without a loss (arXiv 2408.15664, algorithm 1).
        """
        if self.selection_bias is not None and self.load is not None:
            self.selection_bias += rate * torch.sign(self.load.mean() - self.load)
            self.load.zero_()

    def _logits(self, tokens: Tensor) -> Tensor:
        router = self.router
        if not self.spec.router_in_fp32 or tokens.dtype == torch.float64:
            logits: Tensor = router(tokens)
            return logits
        bias = None if router.bias is None else router.bias.float()
        return F.linear(tokens.float(), router.weight.float(), bias)

    def _balance(self, logits: Tensor, experts: Tensor, x: Tensor, context: Context) -> None:
        scores = self._scores(logits)
        probabilities = scores / scores.sum(-1, keepdim=True)
        real = context.real(x.shape[1], x.device)
        loss = load_balance_loss(probabilities, experts, mask=None if real is None else real.flatten())
        context.losses.setdefault("load_balance", []).append(self.spec.router_aux_loss_coef * loss)

    def _scores(self, logits: Tensor) -> Tensor:
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return wide.sigmoid() if self.spec.scoring_func == "sigmoid" else wide.softmax(-1)

    def _chosen_by_tokens(self, inner: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        spec = self.spec
        return moe_mlp(
            inner,
            weights,
            experts,
            self.gate_up,
            self.down,
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
            activation=self.activation.name,
            gated=spec.gated,
            alpha=self.activation.alpha,
            limit=spec.swiglu_limit,
            up_offset=spec.up_offset,
            scale_input=spec.scale_input,
        )

    def _chosen_by_experts(self, tokens: Tensor, inner: Tensor, x: Tensor, context: Context | None) -> Tensor:
        """Every expert takes the tokens that score best with it, the same number for each: [tokens, D]."""
        scores = self._scores(self._logits(tokens))
        real = None if context is None else context.real(x.shape[1], x.device)
        if real is not None:
            scores = scores * real.view(-1, 1)
        share = max(1, round(len(tokens) * self.spec.num_experts_per_tok / self.spec.num_experts))
        weights, chosen = scores.t().topk(min(share, len(tokens)), dim=-1)  # [E, share]
        hidden = inner[chosen] @ self.gate_up.mT
        hidden = hidden if self.gate_up_bias is None else hidden + self.gate_up_bias[:, None]
        out = self.activation(hidden) @ self.down.mT
        out = out if self.down_bias is None else out + self.down_bias[:, None]
        out = out * (weights * self.spec.routed_scaling_factor).to(out.dtype)[..., None]
        return torch.zeros_like(inner).index_add(0, chosen.flatten(), out.flatten(0, 1))

    def _shared(self, x: Tensor) -> Tensor:
        assert self.shared is not None
        y: Tensor = self.shared(x)[0]
        return y if self.shared_gate is None else y * self.shared_gate(x).sigmoid()


def build(spec: Block, width: int, layer: int) -> BlockModule:
    """The module of a mixture of experts."""
    assert isinstance(spec, MoE)
    return MoEModule(spec, width)
