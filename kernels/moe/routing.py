"""Routers: from one logit per expert to the chosen experts and their weights.

One function for the families in use. Scores are computed in float32 (float64 stays):

| model                   | score   | choice                                       | weights                        |
|-------------------------|---------|----------------------------------------------|--------------------------------|
| Mixtral, Qwen3          | softmax | top k                                        | normalised over the chosen     |
| Jamba                   | softmax | top k                                        | as they are                    |
| gpt-oss, Granite        | softmax | top k of the logits, softmax after           | sum to 1 by themselves         |
| DeepSeek-V3, GLM, K2    | sigmoid | score + bias, best groups, top k             | unbiased, normalised, scaled   |
| Llama 4                 | sigmoid | top 1                                        | as they are, on expert's input |
"""

from collections.abc import Callable

import torch
from torch import Tensor

from archcompass.errors import InputError

SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: logits.softmax(-1),
    "sigmoid": torch.sigmoid,
}


def route(
    logits: Tensor,
    top_k: int,
    *,
    score: str = "softmax",
    normalize: bool = True,
    selection_bias: Tensor | None = None,
    groups: int | None = None,
    groups_kept: int | None = None,
    scaling: float = 1.0,
    softmax_after_top_k: bool = False,
) -> tuple[Tensor, Tensor]:
    """Picks `top_k` experts for every token.

    Args:
        logits: [tokens, E].
        top_k: experts per token, 1 to E.
        score: "softmax" or "sigmoid".
        normalize: divide the chosen scores by their sum.
        selection_bias: [E], added to the scores for the choice alone, not to the weights (DeepSeek-V3, arXiv
            2412.19437, section 2.1.2).
        groups, groups_kept: experts come in `groups` equal groups, of which the `groups_kept` with the largest sum of
            two best scores stay eligible (the same paper's node-limited routing).
        scaling: factor on the weights.
        softmax_after_top_k: choose by the logits, then softmax over the chosen; `score` and `normalize` do not apply.

    Returns:
        weights [tokens, top_k], float32 (float64 for float64 logits), and experts [tokens, top_k], int64, best first.

    Raises:
        InputError: a top_k, score or grouping that cannot be.
    """
    _check(logits, top_k, score, groups, groups_kept)
    logits = logits.to(dtype=torch.promote_types(logits.dtype, torch.float32))
    # A softmax over all, normalised over the chosen, is a softmax over the chosen.
    over_chosen = score == "softmax" and normalize and selection_bias is None and groups is None
    over_chosen = over_chosen or softmax_after_top_k
    scores = logits if over_chosen else SCORES[score](logits)
    ranking = scores if selection_bias is None else scores + selection_bias.to(scores.dtype)
    if groups is not None and groups_kept is not None and groups_kept < groups:
        ranking = _best_groups_only(ranking, groups, groups_kept)
    experts = ranking.topk(top_k, dim=-1).indices
    weights = scores.gather(-1, experts)
    if over_chosen:
        weights = weights.softmax(-1)
    elif normalize:
        # 1e-20: DeepSeek's guard; sigmoid scores may all underflow.
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return (weights if scaling == 1.0 else weights * scaling), experts


def load_balance_loss(probabilities: Tensor, experts: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """The auxiliary loss that keeps experts evenly used: E Σ_e f_e P_e, 1 for an even router.

    f_e is the share of the (token, choice) pairs that go to expert e, without gradient, and P_e the mean router
    probability of e. Source: Switch Transformer (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6), with GShard's
    (arXiv 2006.16668, section 2.2) top-k choices counted as k shares, so that the loss does not grow with k.

    Args:
        probabilities: [tokens, E] router probabilities, each row summing to 1.
        experts: [tokens, k] chosen experts.
        mask: [tokens] booleans, False for tokens that do not count (padding).

    Returns:
        A scalar; 0 when no token counts.
    """
    tokens, count = probabilities.shape
    kept = probabilities.new_ones(tokens) if mask is None else mask.to(probabilities.dtype)
    total = kept.sum().clamp(min=1.0)
    chosen = probabilities.new_zeros(tokens, count).scatter_add_(
        -1, experts, torch.ones_like(experts, dtype=kept.dtype)
    )
    share = (chosen * kept[:, None]).sum(0) / (total * experts.shape[-1])
    mean_probability = (probabilities * kept[:, None]).sum(0) / total
    return count * (share.detach() * mean_probability).sum()


def _best_groups_only(ranking: Tensor, groups: int, groups_kept: int) -> Tensor:
    by_group = torch.unflatten(ranking, -1, (groups, -1))
    strength = by_group.topk(min(2, by_group.shape[-1]), dim=-1).values.sum(-1)
    best = strength.topk(groups_kept, dim=-1).indices
    kept = torch.zeros_like(strength, dtype=torch.bool).scatter(-1, best, True)
    return by_group.masked_fill(~kept.unsqueeze(-1), float("-inf")).flatten(-2)


def _check(logits: Tensor, top_k: int, score: str, groups: int | None, groups_kept: int | None) -> None:
    if logits.ndim != 2:
        raise InputError(f"logits has shape {list(logits.shape)}; route takes [tokens, experts]")
    experts = logits.shape[-1]
    if not 1 <= top_k <= experts:
        raise InputError(f"top_k is {top_k} of {experts} experts; it must lie between 1 and {experts}")
    if score not in SCORES:
        raise InputError(f"score is {score!r}; choose {' or '.join(SCORES)}")
    if (groups is None) != (groups_kept is None):
        raise InputError(f"groups is {groups} and groups_kept {groups_kept}; give both or neither")
    if groups is None or groups_kept is None:
        return
    if groups < 1 or experts % groups or not 1 <= groups_kept <= groups:
        raise InputError(
            f"groups is {groups}, groups_kept {groups_kept}: equal groups of {experts} experts, 1 or more kept"
        )
    if groups_kept * (experts // groups) < top_k:
        raise InputError(f"top_k is {top_k}, but {groups_kept} groups of {experts // groups} experts hold fewer")
