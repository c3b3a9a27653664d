"""Makes Triton's interpreter trustworthy: bfloat16 that computes, scans that are not loops, and no wild pointers.

Besides, it refuses what would go wrong on a machine with two GPUs: a launch outside `kernels.guard.on_its_device`.

Triton 3.9's interpreter keeps bfloat16 as bit patterns and does arithmetic on the patterns, rounds float32 to bfloat16
towards zero, combines scans element by element in Python, and reads whatever lies at an address; that of 3.6 cannot count
to a number it has loaded. `install` mends all five. It must run before the first kernel does, in a process where
TRITON_INTERPRET was set before triton was imported.
"""

import os
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceOps, ScanOps, TensorHandle

Array = np.ndarray[Any, Any]

_patched: set[str] = set()  # modules of the language that are patched for the running kernel
_readable: list[tuple[int, int]] = []  # address ranges of the storages that the running kernel was given
_devices: list[object] = []  # what the host code made the current device, innermost last


def install() -> None:
    """Replaces what is wrong in the interpreter of this process."""
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError("set TRITON_INTERPRET=1 before python starts; tests/triton/README.md says how")
    _mend_casts()
    for name, operands in (("binary_op", 2), ("ternary_op", 3), ("unary_op", 1), ("create_fma", 3), ("create_dot", 2)):
        _widen_operands(name, operands)
    for operation in (ReduceOps, ScanOps):
        _widen_reduction(operation)
    ScanOps.generic_scan = _scan
    ReduceOps.generic_reduce = _reduce
    _mend_index()
    _check_bounds()
    _patch_language_once()
    _watch_devices()


def widen(pattern: Array) -> Array:
    """bfloat16 bit patterns as float32."""
    return (np.ascontiguousarray(pattern).astype(np.uint32) << 16).view(np.float32)


def narrow(values: Array) -> Array:
    """float32 as bfloat16 bit patterns, rounded to nearest, ties to even, as a GPU rounds."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_pattern(handle: Any) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16 and handle.data.dtype == np.uint16


def _widened(handle: Any) -> Any:
    return TensorHandle(widen(handle.data), tl.float32) if _is_pattern(handle) else handle


def _mend_casts() -> None:
    plain_cast, plain_convert = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp

    def cast(source: Any, target: Any, otherwise: Callable[[], Any]) -> Any:
        types = source.dtype.scalar, target.scalar
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle(widen(source.data), tl.float32)
        if types == (tl.float32, tl.bfloat16):
            return TensorHandle(narrow(source.data), tl.bfloat16)
        return otherwise()

    InterpreterBuilder.cast_impl = lambda self, source, target: cast(
        source, target, lambda: plain_cast(self, source, target)
    )
    InterpreterBuilder.create_fp_to_fp = lambda self, source, target, rounding: cast(
        source, target, lambda: plain_convert(self, source, target, rounding)
    )


def _widen_operands(name: str, operands: int) -> None:
    """Computes in float32 where an operand is bfloat16, and rounds a floating result back."""
    plain = getattr(InterpreterBuilder, name)

    def wide(self: Any, *args: Any) -> Any:
        if not any(_is_pattern(arg) for arg in args[:operands]):
            return plain(self, *args)
        result = plain(self, *(_widened(arg) for arg in args[:operands]), *args[operands:])
        if result.data.dtype == np.bool_:
            return TensorHandle(result.data, tl.int1)
        # A product of bfloat16 matrices is accumulated, and stays, in float32.
        return result if name == "create_dot" else TensorHandle(narrow(result.data), tl.bfloat16)

    setattr(InterpreterBuilder, name, wide)


def _widen_reduction(operation: Any) -> None:
    plain = operation.apply_impl

    def wide(self: Any, inputs: Any) -> Any:
        if not any(_is_pattern(x.handle) for x in inputs):
            return plain(self, inputs)
        results = plain(self, tuple(_retyped(x, widen, tl.float32) if _is_pattern(x.handle) else x for x in inputs))
        several = isinstance(results, (list, tuple))
        narrowed = [
            _retyped(x, narrow, tl.bfloat16) if x.dtype.scalar == tl.float32 else x
            for x in (results if several else [results])
        ]
        return tuple(narrowed) if several else narrowed[0]

    operation.apply_impl = wide


def _retyped(x: Any, convert: Callable[[Array], Array], dtype: Any) -> Any:
    data = convert(np.asarray(x.handle.data))
    return tl.core.tensor(TensorHandle(data, dtype), tl.block_type(dtype, list(data.shape)) if data.ndim else dtype)


def _slice(data: Array, axis: int, index: int) -> Array:
    return np.ascontiguousarray(np.take(data, [index], axis=axis))


def _combine(self: Any, left: list[Array], right: list[Array], inputs: Any) -> list[Array]:
    """The user's function on whole slices, instead of on one element at a time."""
    args = [self.to_tensor(data, x.dtype) for side in (left, right) for data, x in zip(side, inputs, strict=True)]
    results = self.combine_fn.fn(*args)
    results = results if isinstance(results, tuple) else (results,)
    return [
        x.handle.data if isinstance(x, tl.core.tensor) else np.full_like(a, x)
        for x, a in zip(results, left, strict=True)
    ]


def _scan(self: Any, inputs: Any) -> list[Any]:
    data, axis = [x.handle.data for x in inputs], self.axis
    columns = [[_slice(x, axis, i) for x in data] for i in range(data[0].shape[axis])]
    for i in range(1, len(columns)):
        columns[i] = _combine(self, columns[i - 1], columns[i], inputs)
    joined = [np.concatenate(parts, axis=axis) for parts in zip(*columns, strict=True)]
    return [self.to_tensor(x, given.dtype) for x, given in zip(joined, inputs, strict=True)]


def _reduce(self: Any, inputs: Any) -> list[Any]:
    inputs, axis = self.unravel(inputs, self.axis)
    data = [x.handle.data for x in inputs]
    total = [_slice(x, axis, 0) for x in data]
    for i in range(1, data[0].shape[axis]):
        total = _combine(self, total, [_slice(x, axis, i) for x in data], inputs)
    if not self.keep_dims:
        total = [x.item() if x.ndim == 1 else np.squeeze(x, axis) for x in total]
    return [self.to_tensor(x, given.dtype) for x, given in zip(total, inputs, strict=True)]


def _mend_index() -> None:
    """A tensor of one element as a Python integer: numpy 2.4 refuses the way Triton 3.6 asks for it."""
    plain = interpreter._patch_lang_tensor

    def patch(tensor: Any, scope: Any) -> None:
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch


def _check_bounds() -> None:
    """Every unmasked lane of a load, store or atomic must hit the storage of an argument of the kernel."""
    plain_argument, plain_run = interpreter._implicit_cvt, interpreter.GridExecutor.__call__

    def argument(arg: Any) -> Any:
        tensor = getattr(arg, "base", arg)
        if hasattr(tensor, "untyped_storage"):
            storage = tensor.untyped_storage()
            _readable.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
        return plain_argument(arg)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _devices:
            raise RuntimeError(f"{self.fn.__name__} is launched on whatever GPU is the current one")
        try:
            return plain_run(self, *args, **kwargs)
        finally:
            _readable.clear()
            _patched.clear()

    interpreter._implicit_cvt = argument
    interpreter.GridExecutor.__call__ = run
    guarded = (("create_masked_load", 0, 1), ("create_masked_store", 0, 2), ("create_atomic_rmw", 1, 3))
    for name, pointer, mask in guarded:
        _guard(name, pointer, mask)


def _watch_devices() -> None:
    """Remembers which tensor's device host code is inside of."""
    plain = torch.cuda.device_of

    class Watched(plain):  # type: ignore[misc, valid-type]
        def __enter__(self) -> None:
            _devices.append(self)
            super().__enter__()

        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            _devices.pop()

    torch.cuda.device_of = Watched


def _patch_language_once() -> None:
    """Once per launch instead of at every call of a helper, which is half of the time."""
    plain = interpreter._patch_lang

    def patch(function: Any) -> Any:
        wanted = _languages(function)
        if wanted <= _patched:
            return interpreter._LangPatchScope()
        _patched.update(wanted)
        return plain(function)

    interpreter._patch_lang = patch


@cache
def _languages(function: Any) -> frozenset[str]:
    """The modules of Triton's language that a function can see."""
    return frozenset(x.__name__ for x in function.__globals__.values() if x is tl or x is tl.core)


def _guard(name: str, pointer: int, mask: int) -> None:
    plain = getattr(InterpreterBuilder, name)

    def checked(self: Any, *args: Any) -> Any:
        _refuse_wild_lanes(name, args[pointer], args[mask], self.grid_idx)
        return plain(self, *args)

    setattr(InterpreterBuilder, name, checked)


def _refuse_wild_lanes(name: str, pointers: Any, mask: Any, program: tuple[int, int, int]) -> None:
    addresses = np.asarray(pointers.data).reshape(-1)
    chosen = np.broadcast_to(np.asarray(mask.data), pointers.data.shape).reshape(-1).astype(bool)
    addresses = addresses if chosen.all() else addresses[chosen]
    if not addresses.size:
        return
    size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
    first, last = int(addresses.min()), int(addresses.max()) + size
    if any(low <= first and last <= high for low, high in _readable):  # nearly always one tensor
        return
    inside = np.zeros(addresses.shape, dtype=bool)
    for low, high in _readable:
        inside |= (addresses >= low) & (addresses + size <= high)
    if not inside.all():
        raise IndexError(f"{name}: {int((~inside).sum())} of {addresses.size} lanes out of bounds, program {program}")
