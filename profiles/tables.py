"""Which efficiency table serves a machine: the user's own calibration first, then a shipped one, then that of the nearest
processor, then the literature."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from functools import lru_cache
from math import log
from pathlib import Path

from archcompass.errors import FileFormatError, InputError
from archcompass.profiles.efficiency import ACCELERATOR, PROCESSOR, Efficiency, adapted, from_json, shipped, to_json
from archcompass.profiles.hardware import Hardware
from archcompass.profiles.request import Engine


def cache_directory() -> Path:
    """Where calibrations of this user lie: $XDG_CACHE_HOME/archcompass, or ~/.cache/archcompass."""
    return Path(_base()) / "archcompass"


def _base() -> str:
    """The user's folder of caches. Asked for each prediction: no more than a string."""
    return os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")


def file_name(hardware: Hardware, engine: Engine = "native") -> str:
    """Name of a machine's table, without extension: cards by id, processors by model and threads."""
    if not hardware.is_cpu:
        return f"{hardware.id}-{engine}"
    from archcompass.profiles.cpu import threads

    model = re.sub(r"[^a-z0-9]+", "-", f"{hardware.name} {hardware.architecture}".lower()).strip("-")
    return f"cpu-{model}-{threads()}-threads-{engine}"


def efficiency_of(hardware: Hardware, engine: Engine = "native", *, training: bool = False) -> Efficiency:
    """The best table there is for `hardware` under `engine`, `training` in 16 bits when that is asked.

    Raises:
        InputError: an engine without public figures for cards of this vendor, or one asked to train.
        FileFormatError: the user's calibration is broken.
    """
    if engine != "native" and training:
        raise InputError(
            f"engine is {engine!r}: it is known how fast it serves, not how fast it trains; nearest: native"
        )
    if engine != "native":
        return _fitted(engine, hardware.vendor, hardware.kind, hardware.id)
    if hardware.kind == "described":
        return ACCELERATOR
    found = _load(file_name(hardware, engine), _base())
    if found is not None:
        return found
    if hardware.is_cpu:
        return borrowed(hardware)
    return _trained(hardware.vendor, hardware.kind, hardware.architecture) if training else ACCELERATOR


@lru_cache(maxsize=8)
def borrowed(processor: Hardware) -> Efficiency:
    """What the most similar processor with a shipped table reaches of its peaks, for one that was never measured.

    Similar means the same instruction set; of several, the same vendor, then the nearest number of threads. Peaks are
    this processor's estimates, corrected as measuring corrected those of the other. Nobody measured here, so the source
    stays "roofline" and the range wide.
    """
    from archcompass.profiles.cpu import threads

    found = [table for table in _shipped_processors() if table.made.get("machine") == processor.architecture.split()[0]]
    if not found:
        return PROCESSOR

    def distance(table: Efficiency) -> tuple[bool, float]:
        return table.made["vendor"] != processor.vendor, abs(log(table.made["threads"] / threads()))

    nearest = min(found, key=distance)
    return replace(
        nearest,
        name=f"efficiencies measured on {nearest.name}, scaled to this machine",
        source="roofline",
        peaks={} if processor.confidence == "measured here" else _scaled_peaks(nearest, processor),
        spread=PROCESSOR.spread,
    )


def _scaled_peaks(table: Efficiency, processor: Hardware) -> dict[str, float]:
    estimates = dict(processor.flops) | {"bandwidth": processor.bandwidth_bytes_per_second}
    before = table.made["estimates"]
    return {name: estimates[name] * peak / before[name] for name, peak in table.peaks.items() if name in before}


def _shipped_processors() -> list[Efficiency]:
    names = sorted(path.stem for path in (Path(__file__).parent / "data/efficiency").glob("cpu-*.json"))
    tables = [table for name in names if (table := shipped(name)) is not None]
    return [table for table in tables if "estimates" in table.made]


@lru_cache(maxsize=64)
def _fitted(engine: Engine, vendor: str, kind: str, identifier: str) -> Efficiency:
    """The table of an engine, from data/engines.json: fitted to public figures of cards of this vendor, or refused."""
    source = Path(__file__).parent / "data/engines.json"
    fits = json.loads(source.read_text(encoding="utf-8"))["engines"].get(engine, {})
    if vendor not in fits:
        known = ", ".join(sorted(fits)) or "no card at all"
        raise InputError(
            f"engine is {engine!r}: there are no figures of it to learn from for {vendor or 'such a machine'} "
            f"({identifier}), only for {known}; nearest: native"
        )
    fit = fits[vendor] | fits[vendor]["by_kind"].get(kind, {})
    return adapted(ACCELERATOR, fit, f"{engine} on {vendor} cards, fitted to public figures")


@lru_cache(maxsize=16)
def _trained(vendor: str, kind: str, architecture: str) -> Efficiency:
    """The data sheet with what public figures of fully sharded training say (data/training.json), for cards like those."""
    source = Path(__file__).parent / "data/training.json"
    fit = json.loads(source.read_text(encoding="utf-8"))["fits"].get(vendor, {}).get(kind)
    if fit is None or architecture not in fit["made"]["architectures"]:
        return ACCELERATOR
    return replace(
        ACCELERATOR,
        name="fully sharded training on A100 and H100, fitted to public figures",
        source="calibrated",
        training={f"{op}:bf16": factor for op, factor in fit["factors"].items()},
        spread={**ACCELERATOR.spread, "prefill": (fit["spread"][0], fit["spread"][1])},
        made=fit["made"],
    )


def save(table: Efficiency, hardware: Hardware, engine: Engine = "native") -> Path:
    """Keeps `table` as this user's calibration of `hardware`; written whole or not at all.

    Raises:
        FileFormatError: the cache directory cannot be made or written to.
    """
    from archcompass.blocks.model.files import make_folder, write_text

    make_folder(cache_directory())
    target = cache_directory() / f"{file_name(hardware, engine)}.json"
    write_text(target, json.dumps(to_json(table)))
    forget()
    return target


def forget() -> None:
    """Reads tables anew, after a calibration."""
    _load.cache_clear()
    borrowed.cache_clear()
    shipped.cache_clear()


@lru_cache(maxsize=64)
def _load(name: str, base: str) -> Efficiency | None:
    own = Path(base) / "archcompass" / f"{name}.json"
    if own.is_file():
        try:
            data = json.loads(own.read_text(encoding="utf-8"))
        except ValueError as error:
            raise FileFormatError(f"{own.name} is no JSON ({error}); calibrate again, or delete it") from error
        return from_json(data, where=own.name)
    return shipped(name)
