"""Cost and state of the operations that recurrent blocks share, torch-free: the kernels' own formulas, as `Op`s.

Shapes of the operations: a convolution's is (batch, new tokens, channels, taps); a recurrence's is (batch, new tokens, key
heads, heads, key_dim, value_dim); an elementwise recurrence's is (batch, new tokens, channels).
"""

from typing import Literal

from archcompass.blocks.base import Live, Op, StateTensor, Step, costed
from archcompass.kernels.conv.cost import causal_conv_cost
from archcompass.kernels.conv.memory import causal_conv_held
from archcompass.kernels.delta_rule.cost import delta_rule_cost, dplr_cost
from archcompass.kernels.delta_rule.memory import delta_rule_held, dplr_held
from archcompass.kernels.diagonal_scan.cost import diagonal_scan_cost
from archcompass.kernels.diagonal_scan.memory import diagonal_scan_held
from archcompass.kernels.held import Held
from archcompass.kernels.linear_attention.cost import Decay, linear_attention_cost
from archcompass.kernels.linear_attention.memory import linear_attention_held
from archcompass.kernels.norm.memory import rms_norm_held


def matrix_state(heads: int, key_dim: int, value_dim: int) -> StateTensor:
    """One matrix per head, what keys are associated with."""
    return StateTensor(name="recurrent", shape=(heads, key_dim, value_dim), dtype="fp32", grows=False)


def conv_state(channels: int, taps: int) -> StateTensor:
    """The last inputs of a short convolution."""
    return StateTensor(name="conv", shape=(taps - 1, channels), dtype="activations", grows=False)


def shift_state(width: int) -> StateTensor:
    """The last token a token shift has seen."""
    return StateTensor(name="shift", shape=(width,), dtype="activations", grows=False)


def convolution(step: Step, channels: int, taps: int, *, bias: bool = False) -> Op:
    """A causal depthwise convolution."""
    cost = causal_conv_cost(
        batch=step.batch, new_tokens=step.new_tokens, channels=channels, width=taps, element_bytes=step.element_bytes
    )
    shape = (step.batch, step.new_tokens, channels, taps)
    return costed(step, "conv", "convolution", cost, shape, weights=channels * (taps + bias))


def linear_recurrence(
    step: Step, name: str, *, heads: int, key_dim: int, value_dim: int, decay: Decay, bonus: bool = False
) -> Op:
    """Decayed linear attention."""
    cost = linear_attention_cost(
        batch=step.batch,
        new_tokens=step.new_tokens,
        key_groups=heads,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        decay=decay,
        element_bytes=step.element_bytes,
        bonus=bonus,
    )
    return costed(step, "scan", name, cost, (step.batch, step.new_tokens, heads, heads, key_dim, value_dim))


def delta_recurrence(
    step: Step,
    name: str,
    *,
    key_heads: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    decay: Literal["none", "scalar", "vector"],
) -> Op:
    """The delta rule."""
    cost = delta_rule_cost(
        batch=step.batch,
        new_tokens=step.new_tokens,
        key_heads=key_heads,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        decay=decay,
        element_bytes=step.element_bytes,
    )
    return costed(step, "delta_rule", name, cost, (step.batch, step.new_tokens, key_heads, heads, key_dim, value_dim))


def low_rank_recurrence(step: Step, name: str, *, heads: int, head_dim: int) -> Op:
    """The delta rule with a diagonal-plus-low-rank transition."""
    cost = dplr_cost(
        batch=step.batch,
        new_tokens=step.new_tokens,
        heads=heads,
        key_dim=head_dim,
        value_dim=head_dim,
        element_bytes=step.element_bytes,
    )
    return costed(step, "delta_rule", name, cost, (step.batch, step.new_tokens, heads, heads, head_dim, head_dim))


def diagonal_recurrence(step: Step, name: str, channels: int, rows: int = 1) -> Op:
    """An elementwise recurrence over `channels`, `rows` of which share a decay."""
    cost = diagonal_scan_cost(batch=step.batch, new_tokens=step.new_tokens, channels=channels, rows=rows)
    return costed(step, "selective_scan", name, cost, (step.batch, step.new_tokens, channels))


def channels_alive(step: Step, narrow: float, wide: float = 0.0) -> float:
    """Bytes of so many channels a token in the activations' dtype, and so many in float32."""
    return step.tokens * (narrow * step.element_bytes + wide * 4)


def linear_held(
    step: Step,
    *,
    heads: int,
    key_dim: int,
    value_dim: int,
    decay: Decay,
    groups: int | None = None,
    chunk: int | None = None,
) -> Held:
    """What decayed linear attention keeps; `groups` of shared queries and keys, as many as heads when None."""
    return linear_attention_held(
        batch=step.batch,
        new_tokens=step.new_tokens,
        key_groups=groups or heads,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        decay=decay,
        element_bytes=step.element_bytes,
        chunk_size=chunk,
        fused=step.fused,
    )


def delta_held(
    step: Step,
    *,
    key_heads: int,
    heads: int,
    key_dim: int,
    value_dim: int,
    decay: Literal["none", "scalar", "vector"],
) -> Held:
    """What the delta rule keeps."""
    return delta_rule_held(
        batch=step.batch,
        new_tokens=step.new_tokens,
        key_heads=key_heads,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        decay=decay,
        element_bytes=step.element_bytes,
        fused=step.fused,
    )


def low_rank_held(step: Step, *, heads: int, head_dim: int) -> Held:
    """What the delta rule with a diagonal-plus-low-rank transition keeps."""
    return dplr_held(
        batch=step.batch,
        new_tokens=step.new_tokens,
        heads=heads,
        key_dim=head_dim,
        value_dim=head_dim,
        element_bytes=step.element_bytes,
        fused=step.fused,
    )


def diagonal_held(step: Step, channels: int, rows: int = 1) -> Held:
    """What an elementwise recurrence keeps."""
    return diagonal_scan_held(
        batch=step.batch, new_tokens=step.new_tokens, channels=channels, rows=rows, fused=step.fused
    )


def norm_held(step: Step, width: int, gate: Literal["silu", "sigmoid"] | None = "silu", *, weight: bool = True) -> Held:
    """What a norm over `width` channels keeps, its input included."""
    return rms_norm_held(
        rows=step.tokens,
        width=width,
        element_bytes=step.element_bytes,
        gate=gate,
        weight=weight,
        fused=step.fused,
    )


def recurrent_live(
    step: Step, before: float, core: Held, norm: Held, output: float, saved: float, conved: int = 0
) -> Live:
    """A mixer of the usual order: what is made before the recurrence, the recurrence, a norm, the output projection.

    Args:
        before: bytes alive while the recurrence runs, beside what it makes.
        output: channels that enter the output projection.
        saved: bytes that autograd keeps of what comes before the recurrence.
        conved: channels of a short convolution before the recurrence; when its gradients are made, what comes after it is
            kept no more.
    """
    entering = channels_alive(step, output)
    conv = causal_conv_held(
        rows=step.tokens, channels=conved, element_bytes=step.element_bytes, fused=step.fused
    ).backward_bytes
    after = core.saved_bytes + norm.saved_bytes + entering
    return Live(
        peak_bytes=before + max(core.peak_bytes, entering + norm.peak_bytes),
        saved_bytes=(saved + after) * step.training,
        backward_bytes=max(core.backward_bytes, norm.backward_bytes, conv - after) * step.training,
    )
