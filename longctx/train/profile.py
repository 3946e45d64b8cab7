"""Profiles of chosen steps: a trace of each process, and a page that says where the time went."""

import contextlib
import gzip
import json
from collections.abc import Callable, Iterator
from errno import EIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from longctx.files import write_whole
from longctx.model.decoder import MLP_ONLY, ModelConfig
from longctx.parallel import Mesh
from longctx.sequence.ranges import LAYER, Range, Ranges, Recorded
from longctx.train.metrics import LogConfig, MetricsLog, SilentLog
from longctx.train.profile_summary import PARTS, Profile, device_times, parts_of, summarise
from longctx.train.watchdog import Watchdog

FOLDER = "profile"
SUMMARY = "summary.txt"
MICROSECOND = 1000


class LayerPass(NamedTuple):
    """One way through a layer."""

    layer: int
    kind: str
    backward: bool

    def __str__(self) -> str:
        return f"layer {self.layer}, {self.kind} ({'backward' if self.backward else 'forward'})"


class Profiler:
    """Profiles the steps that `log.profile_steps` names; other steps cost nothing.

    Into `profile/step-N` of the run each process writes `rank-R.json.gz`, which Perfetto and
    chrome://tracing open, and the first one a summary.
    """

    def __init__(self, config: LogConfig, run_path: Path, mesh: Mesh, model: Any):
        self._config, self._folder, self._mesh = config, Path(run_path) / FOLDER, mesh
        self._model = model

    @contextlib.contextmanager
    def step(self, number: int, log: MetricsLog | SilentLog, watchdog: Watchdog) -> Iterator[None]:
        """What is done in this context is step `number`, on all processes alike."""
        if not self._config.profiles(number):
            yield
            return
        ranges, name = self._mesh.ledger.ranges, f"step {number}"
        activities = [ProfilerActivity.CPU]
        if self._mesh.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        with profile(activities=activities, acc_events=True) as traced:
            with watched(self._model, ranges), ranges.record(name) as recorded:
                yield
            if self._mesh.device.type == "cuda":
                torch.cuda.synchronize(self._mesh.device)
        watchdog.beat(number, "profile")
        self._write(number, recorded, traced, log)

    def _write(
        self, number: int, recorded: Recorded, traced: profile, log: MetricsLog | SilentLog
    ) -> None:
        """A disk that cannot be written is a warning."""
        folder, rank = self._folder / f"step-{number}", self._mesh.rank
        parts, traffic = parts_of(recorded), self._mesh.ledger.traffic()
        trace, trouble = {}, ""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            trace = _write_trace(folder / f"rank-{rank}.json.gz", traced, recorded)
        except (OSError, ValueError) as error:
            trouble = getattr(error, "strerror", None) or str(error)
        own = torch.tensor([*(parts[part] for part in PARTS), bool(trouble)], dtype=torch.float64)
        every = [x.tolist() for x in self._mesh.gather(own.to(self._mesh.device))]
        if rank:
            return
        for other, (*_, failed) in enumerate(every):
            if failed:
                reason = trouble if other == 0 else "see its host"
                log.warn(f"{folder}/rank-{other}.json.gz: cannot write: {reason}")
        of_ranks = [dict(zip(PARTS, figures)) for figures in every]
        kinds = layer_kinds(self._model.config)
        found = Profile(number, recorded, of_ranks, traffic, kinds, device_times(trace))
        text = summarise(found)
        try:
            write_whole(folder / SUMMARY, text.encode())
            log.info(f"profile of step {number} in {folder}")
        except OSError as error:
            log.warn(f"{folder / SUMMARY}: cannot write: {error.strerror}")


def layer_kinds(config: ModelConfig) -> list[str]:
    """What each layer mixes with."""
    mixers = config.mixers
    return [mixers[x].kind if x != MLP_ONLY else "no mixer" for x in config.letters]


@contextlib.contextmanager
def watched(model: Any, ranges: Ranges) -> Iterator[None]:
    """While this context is open, ways through the layers of a decoder are ranges.

    That a layer's way back begins is known by the gradient of its output. What it computes once
    more is part of the way back.
    """
    handles: list[Any] = []
    for layer, (block, kind) in enumerate(zip(model.blocks, layer_kinds(model.config))):
        before, after = _hooks(ranges, layer, kind)
        handles.append(block.register_forward_pre_hook(before, prepend=True))
        handles.append(block.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(ranges: Ranges, layer: int, kind: str) -> tuple[Callable, Callable]:
    """What a layer calls before and after its way forward."""
    forward, backward = (LayerPass(layer, kind, is_back) for is_back in (False, True))

    def ends(_gradient: Tensor) -> None:
        ranges.leave(LAYER)

    def begins(_gradient: Tensor) -> None:
        ranges.leave(LAYER)
        ranges.enter(LAYER, backward)

    def before(_block: nn.Module, inputs: tuple[Any, ...]) -> None:
        ranges.enter(LAYER, forward)
        if layer == 0 and inputs[0].requires_grad:
            inputs[0].register_hook(ends)

    def after(_block: nn.Module, _inputs: Any, mixed: Any) -> None:
        ranges.leave(LAYER)
        if mixed[0].requires_grad:
            mixed[0].register_hook(begins)

    return before, after


def _write_trace(path: Path, traced: profile, recorded: Recorded) -> dict[str, Any]:
    """Writes what torch traced with our ranges in rows of their own; returns the trace."""
    with TemporaryDirectory(prefix=".partial-", dir=path.parent) as folder:
        partial = Path(folder, "trace.json")
        traced.export_chrome_trace(str(partial))
        if not partial.exists():
            raise OSError(EIO, "torch could not; is the disk full?")
        trace: dict[str, Any] = json.loads(partial.read_text())
    step = recorded.ranges[-1]
    events = trace["traceEvents"]
    begin = next(
        event["ts"]
        for event in events
        if event.get("cat") == "user_annotation" and event["name"] == str(step.name)
    )
    events += _rows(recorded, begin - step.begin / MICROSECOND)
    write_whole(path, gzip.compress(json.dumps(trace).encode(), compresslevel=5), synced=False)
    return trace


def _rows(recorded: Recorded, shift: float) -> list[dict[str, Any]]:
    """Events of a chrome trace: a row of nested ranges, and rows of exchanges under way."""
    common = {"pid": "longctx", "tid": "ranges"}
    events: list[dict[str, Any]] = [_event(r, shift) | common for r in recorded.ranges]
    for number, flight in enumerate(recorded.flights):
        event = _event(flight, shift)
        end = event["ts"] + event.pop("dur")
        event |= {"pid": "longctx", "tid": "exchanges under way", "id": number}
        events += [event | {"ph": "b"}, event | {"ph": "e", "ts": end}]
    return events


def _event(own: Range, shift: float) -> dict[str, Any]:
    length = (own.end - own.begin) / MICROSECOND
    start = own.begin / MICROSECOND + shift
    return {"ph": "X", "name": str(own.name), "cat": own.kind, "ts": start, "dur": length}
