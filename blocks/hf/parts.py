"""Name tables of the parts that most families share: the two ends, attention, MLPs and experts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from archcompass.blocks.attention.spec import Attention
from archcompass.blocks.gated_mlp.spec import GatedMLP
from archcompass.blocks.hf.weights import Form, Reshaped, Rows, Same, Stacked, Weight, same
from archcompass.blocks.mamba.spec import Mamba
from archcompass.blocks.mamba2.spec import Mamba2
from archcompass.blocks.mla.spec import MLA
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.moe.spec import MoE


def ends(
    spec: ModelSpec,
    embedding: str = "model.embed_tokens.weight",
    norm: str = "model.norm.weight",
    head: str = "lm_head.weight",
) -> Iterator[Weight]:
    """Embedding table, final norm and, unless it is tied, the head."""
    yield same("embedding.weight", embedding)
    if spec.norm is not None:
        yield same("norm.weight", norm)
    if not spec.tie_word_embeddings:
        yield same("head.weight", head)


def joined(ours: str, theirs: Iterable[str], sizes: Iterable[int], bias: bool = False) -> Iterator[Weight]:
    """Several projections of the checkpoint as the rows of one of ours."""
    names, rows = tuple(theirs), tuple(sizes)
    yield Weight(f"{ours}.weight", tuple(f"{name}.weight" for name in names), Rows(rows))
    if bias:
        yield Weight(f"{ours}.bias", tuple(f"{name}.bias" for name in names), Rows(rows))


def linear(ours: str, theirs: str, bias: bool = False) -> Iterator[Weight]:
    """One projection."""
    yield same(f"{ours}.weight", f"{theirs}.weight")
    if bias:
        yield same(f"{ours}.bias", f"{theirs}.bias")


def attention(
    ours: str,
    theirs: str,
    block: Attention,
    projections: tuple[str, str, str, str] = ("q_proj", "k_proj", "v_proj", "o_proj"),
    norms: tuple[str, str] = ("q_norm", "k_norm"),
) -> Iterator[Weight]:
    """Softmax attention whose checkpoint keeps queries, keys and values apart."""
    query, key, value, output = (f"{theirs}.{name}" for name in projections)
    gate = block.query_width if block.output_gate else 0
    rows = (block.query_width + gate, block.key_width, block.key_width)
    yield from joined(f"{ours}.qkv", (query, key, value), rows, block.qkv_bias)
    yield from linear(f"{ours}.output", output, block.output_bias)
    if block.qk_norm != "none" and block.qk_norm_weight:
        yield same(f"{ours}.query_norm.weight", f"{theirs}.{norms[0]}.weight")
        yield same(f"{ours}.key_norm.weight", f"{theirs}.{norms[1]}.weight")
    if block.sinks:
        yield same(f"{ours}.sinks", f"{theirs}.sinks")


def mlp(
    ours: str,
    theirs: str,
    block: GatedMLP,
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Iterator[Weight]:
    """A dense MLP, gated or plain."""
    gate, up, down = (f"{theirs}.{name}" for name in projections)
    if block.gated:
        size = block.intermediate_size
        yield from joined(f"{ours}.inward", (gate, up), (size, size), block.bias)
    else:
        yield from linear(f"{ours}.inward", up, block.bias)
    yield from linear(f"{ours}.down", down, block.bias)


def experts(
    ours: str,
    theirs: str,
    block: MoE,
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    router: str = "gate",
    shared: str = "shared_expert",
    selection: str = "gate.e_score_correction_bias",
) -> Iterator[Weight]:
    """Routed experts that the checkpoint keeps one by one, under `theirs.experts.N`, and what stands beside them."""
    gate, up, down = projections
    count, size = block.num_experts, block.moe_intermediate_size
    inward = (gate, up) if block.gated else (up,)
    form: Form = Rows((size, size)) if block.gated else Same()
    each = [f"{theirs}.experts.{expert}" for expert in range(count)]
    yield Weight(
        f"{ours}.gate_up", tuple(f"{one}.{name}.weight" for one in each for name in inward), Stacked(count, form)
    )
    yield Weight(f"{ours}.down", tuple(f"{one}.{down}.weight" for one in each), Stacked(count))
    yield from linear(f"{ours}.router", f"{theirs}.{router}", block.router_bias)
    if block.selection_bias:
        yield same(f"{ours}.selection_bias", f"{theirs}.{selection}")
    if block.shared is not None:
        yield from mlp(f"{ours}.shared", f"{theirs}.{shared}", block.shared)
    if block.shared_expert_gate:
        yield same(f"{ours}.shared_gate.weight", f"{theirs}.{shared}_gate.weight")


def mamba2(ours: str, theirs: str, block: Mamba2) -> Iterator[Weight]:
    """A Mamba-2 mixer, which is called the same everywhere."""
    channels, taps = block.conv_channels, block.conv_kernel
    yield from linear(f"{ours}.input", f"{theirs}.in_proj", block.use_bias)
    yield Weight(f"{ours}.conv_weight", (f"{theirs}.conv1d.weight",), Reshaped((channels, taps), (channels, 1, taps)))
    if block.use_conv_bias:
        yield same(f"{ours}.conv_bias", f"{theirs}.conv1d.bias")
    yield same(f"{ours}.dt_bias", f"{theirs}.dt_bias")
    yield same(f"{ours}.a_log", f"{theirs}.A_log")
    yield same(f"{ours}.d", f"{theirs}.D")
    if block.norm != "none":
        yield same(f"{ours}.norm_weight", f"{theirs}.norm.weight")
    yield from linear(f"{ours}.output", f"{theirs}.out_proj", block.use_bias)


def mamba(ours: str, theirs: str, block: Mamba) -> Iterator[Weight]:
    """A Mamba-1 mixer, which is called the same everywhere."""
    channels, taps = block.intermediate_size, block.conv_kernel
    yield from linear(f"{ours}.input", f"{theirs}.in_proj", block.use_bias)
    yield Weight(f"{ours}.conv_weight", (f"{theirs}.conv1d.weight",), Reshaped((channels, taps), (channels, 1, taps)))
    if block.use_conv_bias:
        yield same(f"{ours}.conv_bias", f"{theirs}.conv1d.bias")
    yield from linear(f"{ours}.select", f"{theirs}.x_proj")
    yield from linear(f"{ours}.dt", f"{theirs}.dt_proj", bias=True)
    yield same(f"{ours}.a_log", f"{theirs}.A_log")
    yield same(f"{ours}.d", f"{theirs}.D")
    if block.inner_norms and block.inner_norm_weight:
        for index, name in enumerate(("dt", "b", "c")):
            yield same(f"{ours}.norms.{index}.weight", f"{theirs}.{name}_layernorm.weight")
    yield from linear(f"{ours}.output", f"{theirs}.out_proj", block.use_bias)


def latent_attention(ours: str, theirs: str, block: MLA) -> Iterator[Weight]:
    """Latent attention, with the indexer's tensors where there is one."""
    queries, latent, shared = block.sections
    query = "q_a_proj" if block.q_lora_rank else "q_proj"
    names = (f"{theirs}.{query}", f"{theirs}.kv_a_proj_with_mqa")
    yield from joined(f"{ours}.inward", names, (queries, latent + shared), block.bias)
    if block.q_lora_rank:
        yield same(f"{ours}.query_norm.weight", f"{theirs}.q_a_layernorm.weight")
        yield from linear(f"{ours}.query", f"{theirs}.q_b_proj")
    yield same(f"{ours}.latent_norm.weight", f"{theirs}.kv_a_layernorm.weight")
    yield from linear(f"{ours}.expand", f"{theirs}.kv_b_proj")
    yield from linear(f"{ours}.output", f"{theirs}.o_proj", block.bias)
    if block.indexer is not None:
        yield from linear(f"{ours}.indexer.query", f"{theirs}.indexer.wq_b")
        yield from linear(f"{ours}.indexer.key", f"{theirs}.indexer.wk")
        yield from linear(f"{ours}.indexer.key_norm", f"{theirs}.indexer.k_norm", bias=True)
        yield from linear(f"{ours}.indexer.weights", f"{theirs}.indexer.weights_proj")
