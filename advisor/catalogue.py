"""What `models` and `gpus` know, as data: one mapping an entry, ready for JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from archcompass.blocks.base import Step
from archcompass.blocks.model.spec import ModelSpec
from archcompass.blocks.zoo import entry, names
from archcompass.profiles import hardware

if TYPE_CHECKING:
    from archcompass.advisor.sizing.shapes import Family

LONG = 2**24
"""A context longer than any window, so that what still grows there grows for ever."""


def model_names() -> list[str]:
    """Names of all published models."""
    return list(names())


def family(spec: ModelSpec) -> Family:
    """The corner a model stands in, read off what its blocks keep and say.

    A block that keeps a float32 state of constant size recurs; one whose state follows the cache's precision attends.
    """
    kept = {tensor.dtype for _, _, tensors in spec.state(1) for tensor in tensors}
    if "fp32" in kept:
        return "hybrid" if "cache" in kept else "ssm"
    return "moe" if any(traits.sparse_activation for traits in spec.traits().values()) else "transformer"


def model_facts(name: str) -> dict[str, Any]:
    """One published model.

    Raises:
        UnknownNameError: nobody published it; lists the nearest names.
    """
    found = entry(name)
    spec: ModelSpec = found.spec
    parameters = spec.parameters()
    one, many = spec.state_bytes(Step(past_tokens=LONG - 1)), spec.state_bytes(Step(past_tokens=LONG))
    growth = many - one
    return {
        "name": name,
        "family": family(spec),
        "parameters": {
            "total": parameters.total,
            "active": parameters.active,
            "active_with_table": parameters.active_with_table,
            "active_without_embeddings": parameters.active_without_embeddings,
        },
        "published": {"total": found.published.total, "active": found.published.active},
        "state_bytes_per_token": growth,
        "state_bytes_constant": many - growth * (LONG + 1),
        "hidden_size": spec.hidden_size,
        "layers": spec.layers,
        "max_position_embeddings": spec.max_position_embeddings,
        "licence": found.licence,
        "note": found.note,
        "source": found.source,
    }


def gpu_names() -> list[str]:
    """Ids of all accelerators."""
    return [card.id for card in hardware.known()]


def gpu_facts(name: str) -> dict[str, Any]:
    """One accelerator, or several of a kind.

    Raises:
        UnknownNameError: nobody knows it; lists the nearest ids.
    """
    card = hardware.find(name)
    return {
        "id": card.id,
        "name": card.label,
        "vendor": card.vendor,
        "kind": card.kind,
        "count": card.count,
        "memory_gb": card.memory_gb,
        "memory_bytes": card.memory_bytes,
        "bandwidth_bytes_per_second": card.bandwidth_bytes_per_second,
        "flops": {**card.flops, "16bit": card.rate("bf16")},
        "link_bytes_per_second": card.link_bytes_per_second,
        "architecture": card.architecture,
        "release_year": card.release_year or None,
        "confidence": card.confidence,
        "note": card.note,
        "source": card.source,
    }
