"""What a run tells: a progress bar and lines on stderr, JSON lines on stdout and in log.jsonl; curves for the demo."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fastrank.data.files import write_aside

__all__ = ["NoReport", "Report", "plot_curves", "read_log"]

LOG_FILE = "log.jsonl"


def read_log(folder: Path) -> list[dict]:
    """The log's records; a last line cut off by a kill is left out."""
    records = []
    path = folder / LOG_FILE
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


class Report:
    """Prints and stores a run's records; a resumed run first drops those of steps after `logged_until`."""

    def __init__(self, folder: Path, num_steps: int, logged_until: int, *, quiet: bool = False):
        records = [record for record in read_log(folder) if record["step"] <= logged_until]
        with write_aside(folder / LOG_FILE) as file:
            file.writelines(json.dumps(record) + "\n" for record in records)
        self._file = open(folder / LOG_FILE, "a", encoding="utf-8")
        self._width = len(str(num_steps))
        self._num_steps = num_steps
        self._quiet = quiet
        self._progress = None
        self._tensorboard = None
        if not quiet:
            self._progress = _progress_bar(num_steps, max(0, logged_until))
            self._tensorboard = _tensorboard(folder)

    def line(self, text: str) -> None:
        if self._quiet:
            return
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)

    def advance(self, step: int, loss: float) -> None:
        if self._progress is not None:
            self._progress.update(0, completed=step, description=f"loss {loss:.4f}")

    def record(self, record: dict) -> None:
        """One human line, one JSON line."""
        text = f"step {record['step']:>{self._width}}/{self._num_steps}"
        for key, form in (
            ("loss", "loss {:.4f}"),
            ("learning_rate", "rate {:.2e}"),
            ("pairs_per_second", "{:.0f} pairs/s"),
        ):
            if key in record:
                text += "  " + form.format(record[key])
        if "ndcg_at_10" in record:
            text += f"  nDCG@10 {record['ndcg_at_10']:.4f}"
        self.line(text)
        line = json.dumps(record)
        self._file.write(line + "\n")
        self._file.flush()
        if not self._quiet:
            print(line, flush=True)
        if self._tensorboard is not None:
            for key, value in record.items():
                if key != "step":
                    self._tensorboard.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self._file.close()
        if self._progress is not None:
            self._progress.stop()
        if self._tensorboard is not None:
            self._tensorboard.close()


class NoReport:
    """The report of a process that is not the one that tells."""

    def line(self, text: str) -> None: ...

    def advance(self, step: int, loss: float) -> None: ...

    def record(self, record: dict) -> None: ...

    def close(self) -> None: ...


def _progress_bar(num_steps: int, first_step: int):
    if not sys.stderr.isatty():
        return None
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    except ImportError:  # a bare GPU machine trains without rich
        return None
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    progress = Progress(*columns, console=Console(stderr=True))
    progress.add_task("", total=num_steps, completed=first_step)
    progress.start()
    return progress


def _tensorboard(folder: Path):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder / "tensorboard"))


def plot_curves(records: list[dict], path: Path) -> None:
    """Draws loss and development nDCG@10 over the steps of a log's records; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for axis, key, label in zip(axes, ("loss", "ndcg_at_10"), ("training loss", "development nDCG@10"), strict=True):
        points = [(record["step"], record[key]) for record in records if key in record]
        axis.plot([step for step, _ in points], [value for _, value in points], "o-", markersize=3)
        axis.set(xlabel="step", ylabel=label)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
