"""Storage formats of numbers: how many bits one weight really takes, and what a machine computes with.

`bits` counts the scales that travel with a group of weights: GGUF formats by their block layout (llama.cpp, ggml-common.h:
q8_0 is 34 bytes per 32 weights), mxfp4 by the OCP Microscaling specification (one 8-bit scale per 32), nvfp4 by NVIDIA's
(one fp8 scale per 16), int4 as AWQ and GPTQ are published (one fp16 scale and one 4-bit zero point per 128).
"""

from dataclasses import dataclass
from typing import Literal

from archcompass.errors import UnknownNameError

Compute = Literal["fp32", "bf16", "fp16", "fp8", "int8", "fp4"]


@dataclass(frozen=True, slots=True)
class Precision:
    """One storage format.

    Attributes:
        name: as users write it.
        bits: bits per weight, scales included.
        compute: what the tensor cores multiply when weights are stored like this.
        experts_alone: in a model with routed experts these alone are stored like this, as gpt-oss is published (arXiv
            2508.10925, section 2.1); attention, embeddings and routers stay in 16 bits.
    """

    name: str
    bits: float
    compute: Compute
    experts_alone: bool = False

    def bytes(self, elements: float) -> float:
        """Bytes that `elements` numbers take in this format."""
        return elements * self.bits / 8


PRECISIONS: dict[str, Precision] = {
    precision.name: precision
    for precision in (
        Precision("fp32", 32, "fp32"),
        Precision("bf16", 16, "bf16"),
        Precision("fp16", 16, "fp16"),
        Precision("fp8", 8, "fp8"),
        Precision("int8", 8 + 16 / 128, "int8"),
        Precision("int4", 4 + 20 / 128, "bf16"),
        Precision("mxfp4", 4 + 8 / 32, "bf16", experts_alone=True),
        Precision("nvfp4", 4 + 8 / 16, "fp4"),
        Precision("q8_0", 8.5, "fp16"),
        Precision("q6_k", 6.5625, "fp16"),
        Precision("q5_k_m", 5.69, "fp16"),
        Precision("q4_k_m", 4.85, "fp16"),
        Precision("q4_0", 4.5, "fp16"),
    )
}

FP32, BF16 = PRECISIONS["fp32"], PRECISIONS["bf16"]

DTYPE_BYTES: dict[str, int] = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8": 1, "int8": 1}


def precision(name: str) -> Precision:
    """The format called `name`.

    Raises:
        UnknownNameError: no format is called so.
    """
    if name not in PRECISIONS:
        raise UnknownNameError("precision", name, PRECISIONS)
    return PRECISIONS[name]
