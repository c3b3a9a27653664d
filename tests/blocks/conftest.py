"""Counting with fvcore, exactly.

fvcore's own handles are wrong under broadcasting and blind to fused operations, so every handle that can occur is given
here. It reads a graph of torch.jit, whose tracer turns sizes into tensors that ordinary code trips over; so the module is
first flattened by torch.fx into single aten operations with plain numbers for sizes. fvcore counts a multiply-add as one;
`fvcore_flops` converts, in this one place.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import flop_registry

Handle = Callable[[list[Any], list[Any]], int]

_NAMES = """
isneginf
__and__ __or__ _safe_softmax _softmax _to_copy _unsafe_view abs add add_ addcmul addcmul_ alias all any arange
argmax batch_norm bitwise_and bitwise_not bitwise_or broadcast_to bucketize cat ceil chunk clamp clamp_
clamp_max clamp_max_ clamp_min clone constant_pad_nd contiguous copy_ cos cummax cumprod cumsum detach
diag_embed diagonal diff div div_ dropout elu embedding empty empty_like eq erf exp exp_ expand expm1 fill_
flatten flip floor floor_ floor_divide full full_like gather ge gelu group_norm gt index index_add index_add_
index_copy index_fill index_put_ index_select layer_norm le leaky_relu lerp lift_fresh linalg_vector_norm
linspace log log10 log1p log2 log_sigmoid log_sigmoid_forward logaddexp logical_and logical_and_ logical_not
logical_or logsigmoid logsumexp lt mT masked_fill masked_fill_ masked_scatter max maximum mean min minimum mul
mul_ narrow native_group_norm native_layer_norm ne neg new_empty new_full new_ones new_zeros norm ones ones_like
outer pad permute pow prod reciprocal relu remainder repeat repeat_interleave reshape rms_norm roll rsqrt rsub
scalar_tensor scatter scatter_ scatter_add scatter_add_ searchsorted select select_scatter sigmoid sigmoid_ sign
silu silu_ sin slice slice_scatter softmax softplus sort split sqrt square squeeze stack sub sub_ sum swapaxes t
tan tanh tensor_split threshold to topk transpose tril triu type_as unbind unflatten unfold unsqueeze var view
view_as where zero_ zeros zeros_like
"""

ELEMENTWISE = frozenset(_NAMES.split())
"""Operations without matrix products: the contract pays them in bytes."""


def _matmul(inputs: list[Any], outputs: list[Any]) -> int:
    return math.prod(get_shape(outputs[0])) * get_shape(inputs[0])[-1]


def _addmm(inputs: list[Any], outputs: list[Any]) -> int:
    return math.prod(get_shape(outputs[0])) * get_shape(inputs[1])[-1]


def _nothing(inputs: list[Any], outputs: list[Any]) -> int:
    return 0


def _custom(name: str) -> Handle:
    """Our own operators: the formula that torch's counter uses, in multiply-adds."""
    packet = getattr(torch.ops.archcompass, name)

    def handle(inputs: list[Any], outputs: list[Any]) -> int:
        arguments = [get_shape(value) if value.isCompleteTensor() else value.toIValue() for value in inputs]
        flops = flop_registry[packet](*arguments, out_val=get_shape(outputs[0]))
        assert flops % 2 == 0
        return flops // 2

    return handle


def _handles() -> dict[str, Handle]:
    handles: dict[str, Handle] = {f"aten::{name}": _nothing for name in ELEMENTWISE}
    handles |= {"aten::mm": _matmul, "aten::bmm": _matmul, "aten::addmm": _addmm, "aten::baddbmm": _addmm}
    ours = [packet for packet in flop_registry if str(packet).startswith("archcompass.")]
    return handles | {f"archcompass::{packet.__name__}": _custom(packet.__name__) for packet in ours}


def _flat(module: nn.Module, inputs: tuple[Tensor, ...]) -> GraphModule:
    """The module as single aten operations."""
    graph = make_fx(module)(*inputs)
    for node in graph.graph.nodes:
        if node.target is torch.ops.aten.scatter.value:  # torch.jit knows no scatter of a bool
            node.args = tuple(int(arg) if isinstance(arg, bool) else arg for arg in node.args)
    graph.recompile()
    return graph


@pytest.fixture(scope="session")
def fvcore_flops() -> Callable[[nn.Module, tuple[Tensor, ...]], int]:
    """Counts the matrix products and convolutions of a module's call; fails on an operation nobody has judged."""

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> int:
        analysis = FlopCountAnalysis(_flat(module, inputs), inputs).set_op_handle(**_handles())
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        multiply_adds = int(analysis.total())
        assert not analysis.unsupported_ops(), "give these operations a handle in tests/blocks/conftest.py"
        return 2 * multiply_adds

    return count
