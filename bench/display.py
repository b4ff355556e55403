"""What a command shows while it works."""

from __future__ import annotations

from time import monotonic

from rich.console import Console
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar


class Display:
    """The progress bar on stderr, or where that is no terminal one line for each stage."""

    def __init__(self, console: Console, cases: int) -> None:
        self.console, self.cases = console, cases
        self.done, self.started, self.title = 0.0, monotonic(), ""
        self.bar: Bar | None = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
        self.bar = None

    def _open(self, animated: bool) -> Bar:
        """A bar that draws itself from a thread, or, as that would disturb a timing, only when told to."""
        self._close()
        columns = (SpinnerColumn(), BarColumn(bar_width=16), TextColumn("{task.description}"), TimeElapsedColumn())
        self.bar = Bar(*columns, console=self.console, transient=True, auto_refresh=animated, get_time=monotonic)
        self.bar.add_task("", total=self.cases)
        self.bar.tasks[0].start_time = self.started
        self.bar.start()
        return self.bar

    def stage(self, text: str, *, timing: bool = False) -> None:
        if self.console.is_terminal:
            fits = self.bar is not None and self.bar.live.auto_refresh is not timing
            bar = self.bar if fits and self.bar is not None else self._open(animated=not timing)
            bar.update(bar.task_ids[0], description=text, completed=self.done, refresh=timing)
            return
        title = text.partition(", round")[0]
        if title != self.title:
            self.console.print(title, highlight=False, soft_wrap=True)
        self.title = title

    def advance(self, cases: float) -> None:
        self.done += cases
