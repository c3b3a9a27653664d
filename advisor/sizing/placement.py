"""Where a model lies: how several cards share it, and which part of its experts waits in system memory.

Cards share a model by tensor parallelism, where each computes a part of every product, or by data parallelism, where each has
its own sequences and only the routed experts are shared out. The first is usual and shortens every user's wait. The second is
looked at where the first is poor: a cache with fewer heads than cards is copied, and slow links are used in every layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import ceil

from archcompass.advisor.sizing.ask import Ask
from archcompass.blocks.model.spec import ModelSpec
from archcompass.profiles.ledger import FRAGMENTATION, Memory, shards
from archcompass.profiles.request import Request

ROUNDED = 1000
"""Parts in which the share of experts in system memory is counted."""


FAST_LINK = 1e11
"""Bytes per second from card to card, one way, above which tensor parallelism costs little: NVLink 150 and more, PCIe 5 50."""


def layouts(ask: Ask) -> list[Ask]:
    """The same question for each way several cards may share a model, the usual way first.

    Training splits its sequences, and its weights too; fewer sequences than cards leave cards idle under data parallelism.
    """
    cards, work = ask.hardware.count, ask.reading.workload
    if cards == 1 or work.mode == "finetuning":
        return [ask]
    if not ask.serves:
        return [replace(ask, parallel="data")]
    return [ask, replace(ask, parallel="data")] if work.concurrency >= cards else [ask]


def is_worth(spec: ModelSpec, ask: Ask) -> bool:
    """Whether the way in which `ask` shares a model out is worth its trouble for this one."""
    if ask.parallel == "tensor" or not ask.serves or ask.hardware.link_bytes_per_second < FAST_LINK:
        return True
    tensors = [tensor for _, _, tensors in spec.state(1) for tensor in tensors]
    return any(shards(tensor, ask.hardware.count) < ask.hardware.count for tensor in tensors)


def placed(spec: ModelSpec, ask: Ask, precision: str, held: Callable[[Request], Memory]) -> Request:
    """The load, with as many experts in system memory as the cards cannot hold and the user has given room for.

    Args:
        held: the ledger of `spec` under a request.
    """
    request, routed = ask.request(precision), spec.parameters().routed
    if not ask.ram_for_experts or not routed:
        return request
    over = held(request).per_card_bytes - ask.capacity_bytes
    if over <= 0 and not ask.slow:
        return request
    weights = request.weight_precision.bytes(routed)
    needed = 1.0 if ask.slow else over * ask.hardware.count / (1.0 + FRAGMENTATION) / weights
    most = int(ROUNDED * min(1.0, ask.ram_for_experts / weights))
    share = min(ceil(ROUNDED * needed), most) / ROUNDED
    return replace(request, offload=share, ram_bytes_per_second=ask.ram_bytes_per_second)


def first_token(load: Request) -> Request:
    """One prompt alone on what carries the whole load: what the first token of a request waits for."""
    return replace(load, batch=1, generate=0)
