"""Clocks, interleaved rounds, and peak memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Run = Callable[[], object]

# Larger than the last-level cache of any GPU on sale, so that zeroing it leaves nothing of the logits behind.
FLUSH_BYTES = 512 << 20


Clock = Callable[[Run], float]


def cpu_clock(run: Run) -> float:
    """Wall time of one call, in seconds; the result is freed after the clock has stopped.

    No cache is flushed: the logits of every named shape are larger than it.
    """
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    del result
    return seconds


def cuda_clock(device: torch.device) -> Clock:
    """A clock of the time between two events on the device, with a cold L2.

    The flush also keeps the device busy while the host enqueues the run, as a training step's preceding work does:
    launch overhead shows only where it exceeds that.
    """
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def clock(run: Run) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        result = run()
        end.record()
        end.synchronize()
        del result
        return float(start.elapsed_time(end)) / 1e3

    return clock


def clock_for(device: torch.device) -> Clock:
    """The clock of ``device``."""
    return cuda_clock(device) if device.type == "cuda" else cpu_clock


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Task:
    """Something to time; ``before`` is called ahead of each run and not timed."""

    run: Run
    before: Callable[[], object] = lambda: None


def captured(task: Task) -> Task:
    """The task with its run, forward included, in a CUDA graph, of which the timed run is a replay; on CUDA only.

    Three runs before, on a stream of their own: allocator and libraries set themselves up there, which must not be
    captured. The result of a run lives as long as the graph. One that waits for the device raises before the capture,
    which would end in an error that says less, if in one at all.
    """
    stream, mode = torch.cuda.Stream(), torch.cuda.get_sync_debug_mode()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            task.before()
            torch.cuda.set_sync_debug_mode("error")
            try:
                task.run()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.current_stream().wait_stream(stream)
    task.before()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = task.run()

    def replay() -> object:
        graph.replay()
        return result

    return Task(replay, task.before)


def rounds(
    tasks: Mapping[str, Task], clock: Clock, repeats: int, budget: float, minimum: int = 3
) -> Iterator[dict[str, float | Exception]]:
    """Time every task once per round, in an order that rotates from round to round; yields the seconds by name.

    A disturbance (of the clock rate, by neighbours) then disturbs all tasks alike, none always runs behind the same
    other one, and a ratio can be taken within a round. A task that raises has its error in the place of the seconds,
    and is dropped; its round is completed by the others. There are ``repeats`` rounds at most, and none starts after
    ``budget`` seconds once ``minimum`` are done.
    """
    alive = dict(tasks)
    deadline = time.monotonic() + budget
    for index in range(repeats):
        if index >= minimum and time.monotonic() > deadline:
            return
        names = list(alive)
        shift = index % max(len(names), 1)
        seconds: dict[str, float | Exception] = {}
        for name in names[shift:] + names[:shift]:
            try:
                alive[name].before()
                seconds[name] = clock(alive[name].run)
            except Exception as error:  # a provider's code: anything can come
                del alive[name]
                # Its frames hold memory that the provider had allocated, which the others of this round may need.
                error.__cause__ = error.__context__ = None
                seconds[name] = error.with_traceback(None)
        yield seconds


def _cpu_peak(run: Run) -> int | None:
    """Peak of PyTorch's CPU allocator during ``run``, from the profiler's record of every allocation and release.

    Resident memory would also count, or miss, memory that the C library keeps and returns when it likes. Memory
    allocated before is not in the record; scratch that a kernel gets from the C library by itself is not either.
    """
    # The profiler announces itself on stderr; its logger reads this when it first starts.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        result = run()
    del result
    record: Any = profile.profiler
    if record is None or record.kineto_results is None:
        return None
    events = [event for event in record.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peak_extra_bytes(run: Run, device: torch.device) -> int | None:
    """Peak memory of one call of ``run`` beyond the memory allocated now, its result included; None: unknown."""
    if device.type != "cuda":
        return _cpu_peak(run)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = run()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return peak


def available_bytes() -> int | None:
    """Main memory that can still be had, or None where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            fields = dict(line.split(":", 1) for line in lines)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is an allocator's refusal: CUDA's has a class, the CPU's only a message."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
