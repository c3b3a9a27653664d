"""Counting with fvcore, exactly.

fvcore's own handles are wrong under broadcasting and blind to fused operations, so every handle that can occur is given
here. It reads a graph of torch.jit, whose tracer turns sizes into tensors that ordinary code trips over; so a call is
first recorded as single aten operations with plain numbers for sizes, and fvcore traces the replay. It counts a multiply-add
as one; `fvcore_flops` converts, in this one place.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

Handle = Callable[[list[Any], list[Any]], int]

_NAMES = """
isneginf
__and__ __or__ _safe_softmax _softmax _to_copy _unsafe_view abs add add_ addcmul addcmul_ alias all any arange
argmax batch_norm bitwise_and bitwise_not bitwise_or broadcast_to bucketize cat ceil chunk clamp clamp_
clamp_max clamp_max_ clamp_min clone constant_pad_nd contiguous copy_ cos cummax cumprod cumsum detach
diag_embed diagonal diff div div_ dropout elu embedding empty empty_like eq erf exp exp2 exp_ expand expm1 fill_
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


class Recorder(TorchDispatchMode):
    """Notes every aten operation of a call, with its arguments and results."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.scatter.value:  # torch.jit knows no scatter of a bool
            args = tuple(int(arg) if isinstance(arg, bool) else arg for arg in args)
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


class Replay(nn.Module):
    """The recorded operations of one call of a module, once more, on other inputs."""

    def __init__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.inputs = inputs
        with Recorder() as recorder:
            self.results = module(*inputs)
        self.calls = recorder.calls
        # What came from outside (weights, states) must belong to the module: torch.jit would copy it, and meta has no data.
        made = {id(tensor) for *_, results in self.calls for tensor in tree_leaves(results)} | {id(x) for x in inputs}
        used = {
            id(x): x for _, args, kwargs, _ in self.calls for x in tree_leaves((args, kwargs)) if torch.is_tensor(x)
        }
        for number, outside in enumerate(x for key, x in used.items() if key not in made):
            self.register_buffer(f"outside{number}", outside)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        known = {id(recorded): given for recorded, given in zip(self.inputs, inputs, strict=True)}

        def now(value: Any) -> Any:
            return known.get(id(value), value)

        for func, args, kwargs, recorded in self.calls:
            given = func(*tree_map(now, args), **tree_map(now, kwargs))
            known |= {id(a): b for a, b in zip(tree_leaves(recorded), tree_leaves(given), strict=True)}
        return [now(result) for result in self.results]


@pytest.fixture(scope="session")
def fvcore_flops() -> Callable[[nn.Module, tuple[Tensor, ...]], int]:
    """Counts the matrix products and convolutions of a module's call; fails on an operation nobody has judged."""

    def count(module: nn.Module, inputs: tuple[Tensor, ...]) -> int:
        analysis = FlopCountAnalysis(Replay(module, inputs), inputs).set_op_handle(**_handles())
        analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
        multiply_adds = int(analysis.total())
        assert not analysis.unsupported_ops(), "give these operations a handle in tests/blocks/conftest.py"
        return 2 * multiply_adds

    return count
