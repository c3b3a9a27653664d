"""What the causal convolution keeps in memory beside its input. Torch-free; see `archcompass.kernels.held`."""

from archcompass.kernels.held import Held


def causal_conv_held(*, rows: int, channels: int, element_bytes: int, fused: bool = True) -> Held:
    """Of [rows, channels] numbers; `fused` when a Triton kernel does it all.

    Backward, the torch form has its input again, what enters the activation and the gate made of it, two gradients of the
    input and a product for the taps in float32 at once, beside the gradient of its result.
    """
    output = float(rows * channels * element_bytes)
    return Held(output, 0.0, 2 * output if fused else output + 24.0 * rows * channels)
