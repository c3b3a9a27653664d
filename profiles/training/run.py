"""A training run from its first step, or its last checkpoint, to its last step. Started by torchrun it shares the work."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from archcompass.blocks.model.files import parse, read_mapping
from archcompass.blocks.model.spec import ModelSpec
from archcompass.errors import DoesNotFitError, InputError
from archcompass.profiles.measure.build import available_bytes, device_of
from archcompass.profiles.measure.clock import synchronise
from archcompass.profiles.measure.peak import process_peak_bytes, reset_process_peak
from archcompass.profiles.training import checkpoint, data
from archcompass.profiles.training.optimize import Learner
from archcompass.profiles.training.plan import Plan, Point, TrainingReport

Progress = Callable[[float, str], None]

HELD_OUT_BATCHES = 8
"""At most so many batches are looked at for a held-out loss."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process stands among those of a run."""

    device: torch.device
    rank: int = 0
    world: int = 1


@dataclass(slots=True)
class Record:
    """What a run has seen so far."""

    step: int = 0
    resumed_from: int | None = None
    losses: list[Point] = field(default_factory=list)
    held_out: list[Point] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    checkpoint: Path | None = None


def train(
    spec: ModelSpec,
    file: Path,
    plan: Plan,
    *,
    device: str = "cpu",
    tokenizer: Path | None = None,
    folder: Path | None = None,
    resume: bool = False,
    reduced_from: int | None = None,
    progress: Progress = lambda _share, _text: None,
    stopped: Callable[[], bool] = lambda: False,
) -> TrainingReport:
    """Trains `spec` on the text of `file`.

    Args:
        spec: the model.
        file: text; of JSON lines the texts under "text".
        plan: how.
        device: "cpu" or "cuda".
        tokenizer: a tokenizer.json; without it a token is a byte.
        folder: for checkpoints; None keeps nothing.
        resume: continue the folder's last checkpoint, if there is one.
        reduced_from: parameters of the design that `spec` stands for, for the report.
        progress: told the share done (0..1) and the loss.
        stopped: asked after every step; True ends the run there, with a checkpoint.

    Raises:
        InputError: data, plan or checkpoint do not suit one another; names the field.
        FileFormatError: a file that is not what it should be, or cannot be written.
        DoesNotFitError: weights, gradients and moments are more than this machine has.
        MeasurementError: the loss is no longer a number.
    """
    with _processes(device) as place, torch.random.fork_rng(), _owned(folder, place):
        tokens = data.read(file, tokenizer)
        _check(spec, tokens, plan, place, folder, resume)
        torch.manual_seed(plan.seed)
        run = Run(spec, tokens, plan, place, folder)
        if resume:
            run.resume()
        run.go(progress, stopped)
        return run.report(reduced_from)


class Run:
    """One process of a run.

    Args:
        spec, tokens, plan: what is trained, on what, how.
        place: where.
        folder: for checkpoints, or None.
    """

    def __init__(self, spec: ModelSpec, tokens: data.Tokens, plan: Plan, place: Place, folder: Path | None) -> None:
        self.spec, self.tokens, self.plan, self.place, self.folder = spec, tokens, plan, place, folder
        self.learner = Learner(spec, plan, place.device)
        self.training, self.held_out = data.split(tokens, plan)
        self.record = Record()

    def resume(self) -> None:
        """Goes back to the folder's last checkpoint; without one, to the start.

        Raises:
            InputError: it is of another model, plan or data; names the difference.
        """
        last = None if self.folder is None else checkpoint.latest(self.folder)
        if last is None:
            return
        state = checkpoint.read_state(last)
        _same(last, state, self.spec, self.plan, self.tokens)
        checkpoint.restore(last, state, self.learner.kept, self.learner.optimizer, self.learner.schedule)
        self.learner.load()
        self.record = Record(
            step=state["step"],
            resumed_from=state["step"],
            losses=[Point(**point) for point in state["losses"]],
            held_out=[Point(**point) for point in state["held_out"]],
            checkpoint=last,
        )

    def go(self, progress: Progress, stopped: Callable[[], bool]) -> None:
        """All steps that are left."""
        record, plan, place = self.record, self.plan, self.place
        wrapped = self._wrapped()
        if not record.held_out:
            record.held_out.append(Point(step=0, loss=self._held_out_loss()))
        _reset_peak(place.device)
        stream = iter(data.batches(self.training, plan, record.step, place.rank, place.world))
        while record.step < plan.steps:
            loss = self._step(wrapped, *next(stream))
            ends = _any(stopped(), place)
            if plan.is_told(record.step) or ends:
                record.losses.append(Point(step=record.step, loss=loss))
            if plan.is_evaluated(record.step) or ends:
                record.held_out.append(Point(step=record.step, loss=self._held_out_loss()))
            if plan.is_kept(record.step) or ends:
                self._keep()
            progress(record.step / plan.steps, f"step {record.step}/{plan.steps}  loss {loss:.3f}")
            if ends:
                break

    def _step(self, wrapped: nn.Module, ids: Tensor, targets: Tensor) -> float:
        device = self.place.device
        start = time.perf_counter()
        loss = self.learner.step(wrapped, ids.to(device), targets.to(device))
        synchronise(device)
        self.record.seconds.append(time.perf_counter() - start)
        self.record.step += 1
        return _mean(loss, self.place)

    def _wrapped(self) -> nn.Module:
        if self.place.world == 1:
            return self.learner.model
        return DistributedDataParallel(self.learner.model)

    @torch.no_grad()
    def _held_out_loss(self) -> float:
        model, device = self.learner.model.eval(), self.place.device
        try:
            batches = torch.utils.data.DataLoader(self.held_out, batch_size=self.plan.batch)
            sums, count = 0.0, 0
            for ids, targets in islice(batches, HELD_OUT_BATCHES):
                sums += float(model(ids.to(device), labels=targets.to(device)).loss) * len(ids)
                count += len(ids)
            return sums / count
        finally:
            model.train()

    def _keep(self) -> None:
        if self.folder is None or self.place.rank:
            return
        record, learner = self.record, self.learner
        state = {
            "step": record.step,
            "plan": self.plan.model_dump(mode="json"),
            "data": _identity(self.tokens),
            "losses": [point.model_dump() for point in record.losses],
            "held_out": [point.model_dump() for point in record.held_out],
        }
        record.checkpoint = checkpoint.save(
            self.folder, self.spec, learner.kept, learner.optimizer, learner.schedule, state
        )

    def report(self, reduced_from: int | None) -> TrainingReport:
        """What was done."""
        record, plan, place = self.record, self.plan, self.place
        seconds = record.seconds[1:] or record.seconds
        last = record.held_out[-1].loss
        return TrainingReport(
            model=self.spec.name,
            parameters=self.spec.parameters().total,
            reduced_from=reduced_from,
            steps=record.step,
            resumed_from=record.resumed_from,
            device=_name(place.device),
            precision=plan.precision,
            processes=place.world,
            tokens_per_step=plan.batch * plan.sequence,
            data={
                "file": self.tokens.name,
                "kind": self.tokens.kind,
                "training_tokens": len(self.training.values),
                "held_out_tokens": len(self.held_out.values),
            },
            losses=tuple(record.losses),
            held_out=tuple(record.held_out),
            bits_per_byte=None if self.tokens.kind == "tokens" else last / math.log(2),
            tokens_per_second=plan.batch * plan.sequence * len(seconds) / sum(seconds) if seconds else None,
            peak_memory_bytes=_peak(place.device),
            checkpoint=None if record.checkpoint is None else str(record.checkpoint),
            notes=_notes(self.spec, self.tokens, reduced_from),
        )


def _check(spec: ModelSpec, tokens: data.Tokens, plan: Plan, place: Place, folder: Path | None, resume: bool) -> None:
    if tokens.vocab_size > spec.vocab_size:
        raise InputError(
            f"vocab_size is {spec.vocab_size}, and {tokens.kind} of {tokens.name} need at least {tokens.vocab_size}"
        )
    limit = spec.max_position_embeddings
    if limit is not None and plan.sequence > limit:
        raise InputError(
            f"sequence is {plan.sequence}; the model is meant for at most {limit} (max_position_embeddings)"
        )
    if plan.batch % place.world:
        nearest = max(plan.batch // place.world, 1) * place.world
        raise InputError(f"batch ({plan.batch}) must divide over {place.world} processes; nearest: {nearest}")
    needed, free = spec.parameters().total * plan.bytes_per_parameter, available_bytes(place.device)
    if needed > free:
        raise DoesNotFitError(
            f"{spec.name} needs at least {needed / 1e9:,.1f} GB for weights, gradients and moments; {place.device.type} has "
            f"{free / 1e9:,.1f} GB free: --scale 1M trains the same design at a million parameters",
            needs_bytes=needed,
            has_bytes=free,
        )
    if folder is not None and not resume and (last := checkpoint.latest(folder)) is not None:
        raise InputError(f"{folder} holds {last.name}; --resume continues it, or give another folder")


def _same(last: Path, state: dict[str, Any], spec: ModelSpec, plan: Plan, tokens: data.Tokens) -> None:
    """Refuses to continue a run as something else.

    Raises:
        InputError: names what differs.
    """
    for key, value in plan.model_dump(mode="json").items():
        if key not in ("keep_every", "evaluations") and state["plan"].get(key) != value:
            raise InputError(f"{key} is {value}, and {last.name} was trained with {state['plan'].get(key)}; keep it")
    if state["data"] != _identity(tokens):
        raise InputError(f"{tokens.name} is not the data that {last.name} was trained on ({state['data'].get('file')})")
    if parse(read_mapping(last / checkpoint.MODEL)) != spec:
        raise InputError(f"{last.name} is of another model; give {last / checkpoint.MODEL} or another folder")


def _identity(tokens: data.Tokens) -> dict[str, str]:
    return {"file": tokens.name, "kind": tokens.kind, "sha256": tokens.digest}


def _notes(spec: ModelSpec, tokens: data.Tokens, reduced_from: int | None) -> tuple[str, ...]:
    notes = []
    if reduced_from is not None:
        total = spec.parameters().total
        notes.append(f"Reduced from {reduced_from:,} to {total:,} parameters; every distinct layer stands once.")
    if tokens.kind != "tokens" and spec.vocab_size > tokens.vocab_size:
        notes.append(
            f"A token is a byte: {tokens.vocab_size} of the {spec.vocab_size:,} entries of the vocabulary are used."
        )
    return tuple(notes)


@contextmanager
def _processes(device: str) -> Iterator[Place]:
    """This process's place: alone, or as torchrun says."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield Place(device_of(device))
        return
    chosen = device_of(device)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(chosen)
    distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Place(chosen, distributed.get_rank(), world)
    finally:
        distributed.destroy_process_group()


def _owned(folder: Path | None, place: Place) -> Any:
    return nullcontext() if folder is None or place.rank else checkpoint.held(folder)


def _mean(value: float, place: Place) -> float:
    if place.world == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64, device=place.device)
    distributed.all_reduce(tensor)
    return float(tensor) / place.world


def _any(value: bool, place: Place) -> bool:
    return value if place.world == 1 else _mean(float(value), place) > 0


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        reset_process_peak()


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_peak_bytes()


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
