"""The machine we run on, as a `Hardware` that predictions can use: a known card, or figures probed on the spot."""

from __future__ import annotations

from dataclasses import replace

import torch

from archcompass.errors import UnknownNameError
from archcompass.profiles.hardware import Hardware, describe, find
from archcompass.profiles.measure.build import device_of
from archcompass.profiles.measure.probe import peaks, probed
from archcompass.profiles.tables import efficiency_of


def this_machine(device: str = "cpu") -> Hardware:
    """The processor or card that `device` names here.

    Raises:
        InputError: no such device.
    """
    place = device_of(device)
    if place.type == "cpu":
        cpu = find("cpu")
        return cpu if efficiency_of(cpu).source == "calibrated" else probed(cpu)
    name, total = torch.cuda.get_device_name(place), torch.cuda.mem_get_info(place)[1]
    try:
        return replace(find(name), memory_bytes=int(total))
    except UnknownNameError:
        seen = peaks(device)
        found = describe(
            vram=int(total), bandwidth=seen["bandwidth"] / 1e9, tflops=max(seen["bf16"], seen["fp32"]) / 1e12, name=name
        )
        return replace(found, source="probed here, since the card is in no table")
