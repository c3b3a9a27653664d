"""What RMS normalisation keeps in memory beside its input. Torch-free; see `archcompass.kernels.held`."""

from typing import Literal

from archcompass.kernels.held import Held

# Elements that a thread of the torch form computes at once in inference: a float32 temporary of so many is still in a
# core's cache for the next pass.
PIECE_ELEMENTS = 1 << 18


def rms_norm_held(
    *,
    rows: int,
    width: int,
    element_bytes: int,
    gate: Literal["silu", "sigmoid"] | None = None,
    weight: bool = True,
    fused: bool = True,
) -> Held:
    """Of [rows, width] numbers; `gate` is its activation where there is one, `fused` when a Triton kernel does it all.

    What a backward pass needs includes the input here (not the gate), which the Triton kernel keeps as it is. The torch form
    keeps it in float32, beside what comes of it, and with a gate both sides of the last product and the gate's own slope. On
    their way back are the gradients of the result, the input and the gate.
    """
    elements = rows * width
    output = float(elements * element_bytes)
    if fused:
        return Held(output, output, output * (2 if gate else 1))
    kept = 2 if gate is None else 3 + (gate == "silu") + weight - (element_bytes == 4)
    # What the gate lets through, and in half types x and the gate widened; float32 is computed in the output itself.
    wide = element_bytes < 4
    piece = min(elements, PIECE_ELEMENTS) * 4 * ((1 + 2 * wide) if gate else wide)
    # With a SiLU one side of the product goes as its gradient comes.
    flowing = 4.0 * elements * (3 if gate == "sigmoid" else 2)
    return Held(output + piece, 4.0 * elements * kept, flowing)
