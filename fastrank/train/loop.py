"""One training run: TrainConfig in, a checkpoint folder out; what is done when, and what lies in the folder.

Order, sampling and dropout follow from (seed, step) alone, so a run that was killed at any moment and resumed takes
the same steps as one that never stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import shutil
import time
from pathlib import Path

import torch

from fastrank.checkpoint import save_model
from fastrank.data.files import write_aside

from .config import TrainConfig, read_yaml, to_yaml
from .feed import Ahead, EvaluationSet, Feed
from .processes import Processes
from .report import LOG_FILE, NoReport, Report
from .selection import FILE as SELECTION_FILE
from .selection import num_selected, select_lists
from .state import STATE_FILE, Progress, load_state, save_state
from .trainer import Trainer

__all__ = ["learning_rate_factor", "train"]

CONFIG_FILE = "training.yaml"
# What a run leaves beside the checkpoint's own files, which a new checkpoint replaces.
RUN_FILES = (CONFIG_FILE, LOG_FILE, SELECTION_FILE, STATE_FILE, STATE_FILE + ".writing", ".partial", "tensorboard",
             "curves.png", "config.json", "model.safetensors")  # fmt: skip


def train(config: TrainConfig, *, quiet: bool = False) -> Path:
    """Trains a cross-encoder and returns its checkpoint folder, config.output_dir.

    The folder opens in fastrank, transformers and sentence-transformers. It holds the weights with the best nDCG@10
    on eval_data of all that were measured after a step, or the last ones where there is no eval_data.

    Args:
        config: The run; see TrainConfig.
        quiet: Print nothing; log.jsonl is written all the same.

    Raises:
        ValueError: An unusable key, file, folder or checkpoint, or a loss that is no longer finite; the message says
            which.
        OSError: A model that is not there.
    """
    folder = Path(config.output_dir)
    feed = Feed(config.train_data, lists_per_step=config.lists_per_step, seed=config.seed)
    processes = Processes(config.device)
    if config.dry_run:
        if config.select_by is not None:  # which lists is not known yet, only how many
            feed.choose(list(range(num_selected(config, feed))))
        if processes.is_first:
            _print_plan(config, feed, _num_steps(config, feed))
        return folder
    with _claimed(folder, config) if processes.is_first else contextlib.nullcontext():
        trainer = Trainer(config)
        evaluation = None if config.eval_data is None else EvaluationSet(config.eval_data, seed=config.seed)
        fingerprint = feed.fingerprint
        if config.select_by is not None:
            feed.choose(select_lists(trainer, feed, folder))
        num_steps = _num_steps(config, feed)
        progress = load_state(folder, trainer.model, trainer.optimizer) if config.resume else None
        # A run that was killed before its first state begins anew, and so does its log.
        logged_until = -1 if progress is None else progress.step
        progress = progress or Progress(data_fingerprint=fingerprint)
        if progress.data_fingerprint != fingerprint:
            raise ValueError(
                f"The training data differ from those that {folder} was trained on: start anew with --overwrite."
            )
        processes.agree({"their data": fingerprint, "the step they begin with": progress.step, "steps": num_steps})
        if processes.is_first:
            if config.overwrite:  # only now that everything has been read, and nothing can be wrong with it any more
                for entry in _left_in(folder):
                    if entry.name in RUN_FILES and not (entry.name == SELECTION_FILE and config.select_by):
                        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
            with write_aside(folder / CONFIG_FILE) as file:
                file.write(to_yaml(config))
            report = Report(folder, num_steps, logged_until, quiet=quiet)
        else:
            report = NoReport()
        try:
            _announce(report, trainer, feed, num_steps, progress)
            _run(trainer, feed, evaluation, num_steps, progress, report)
        finally:
            report.close()
        processes.wait()  # until the checkpoint is whole: the next stage begins with it in every process
    return folder


def _run(
    trainer: Trainer, feed: Feed, evaluation: EvaluationSet | None, num_steps: int, progress: Progress, report: Report
) -> None:
    config, folder = trainer.config, Path(trainer.config.output_dir)
    eval_steps, save_steps = _interval(config.eval_steps, num_steps), _interval(config.save_steps, num_steps)
    if evaluation and progress.step == 0:
        report.record({"step": 0, "ndcg_at_10": evaluation.ndcg_at_10(trainer.scores(evaluation.lists))})
    trainer.num_lists_without_terms = progress.lists_without_terms
    writes = trainer.processes.is_first
    trainer.num_truncated = progress.pairs_truncated if writes else 0
    waiting: list[_Late] = []  # losses that are not read yet
    with Ahead(lambda number: trainer.prepare(feed.step(number)), range(progress.step, num_steps)) as ahead:
        while progress.step < num_steps:
            started = time.perf_counter()
            prepared = next(ahead)
            factor = learning_rate_factor(config, progress.step, num_steps)
            loss = trainer.step(prepared, progress.step, rate_factor=factor)
            progress.step += 1
            progress.lists_without_terms = trainer.num_lists_without_terms
            last = progress.step == num_steps
            record: dict = {"step": progress.step}
            measures = evaluation and (last or progress.step % eval_steps == 0)
            logs = last or measures or progress.step % config.logging_steps == 0
            saves = last or progress.step % save_steps == 0
            waiting.append(_Late(loss))
            known = [waiting.pop(0).read() for _ in range(len(waiting) - (0 if logs or saves else 1))]
            pairs = sum(len(one.documents) for one in prepared.lists)
            progress.add(known, pairs=pairs, seconds=time.perf_counter() - started)
            if logs:
                record |= progress.take_means()
                record["learning_rate"] = config.learning_rate * factor
                if not math.isfinite(record["loss"]):
                    raise ValueError(
                        f"The loss is {record['loss']} in the steps up to {progress.step}: lower the learning rate, or "
                        "look for labels that are not finite."
                    )
            if known:
                report.advance(progress.step, known[-1])
            if measures:
                ahead.settle()  # there is one tokenizer
                record["ndcg_at_10"] = measure = evaluation.ndcg_at_10(trainer.scores(evaluation.lists))
                if progress.best_measure is None or measure > progress.best_measure:
                    progress.best_measure, progress.best_step = measure, progress.step
                    if writes:
                        save_model(folder, trainer.model, trainer.tokenizer)
            if last and not evaluation and writes:
                save_model(folder, trainer.model, trainer.tokenizer)
            if len(record) > 1:
                report.record(record)
            if saves:
                progress.pairs_truncated = _in_all_processes(trainer)
            if writes and saves and math.isfinite(progress.loss_sum):
                save_state(folder, trainer.model, trainer.optimizer, progress)
    if trainer.num_lists_without_terms:
        count = trainer.num_lists_without_terms
        report.line(f"lists that gave the loss no term (no positive, or all labels equal): {count}")
    if count := _in_all_processes(trainer):
        report.line(f"pairs cut to {trainer.tokenizer.limits}, counted each time they were seen: {count}")
    if progress.best_step is not None:
        report.line(f"best nDCG@10 {progress.best_measure:.4f} at step {progress.best_step}")
    report.line(f"checkpoint: {folder}")


def _in_all_processes(trainer: Trainer) -> int:
    """Pairs that were cut."""
    return int(trainer.processes.sum(torch.tensor(trainer.num_truncated, device=trainer.device)))


class _Late:
    """A number that a GPU is still computing: read() waits for it, and for nothing that was queued after it."""

    def __init__(self, value: torch.Tensor) -> None:
        self._value, self._event = value, None
        if value.is_cuda:
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(value.device))

    def read(self) -> float:
        if self._event is not None:
            self._event.synchronize()
        return float(self._value)


def learning_rate_factor(config: TrainConfig, step: int, num_steps: int) -> float:
    """The share of the peak rate in the step with index `step` (0-based): warm-up reaches 1, then the schedule falls
    to 0."""
    warmup = config.warmup_steps * num_steps if config.warmup_steps < 1 else config.warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1.0, num_steps - warmup)
    if config.lr_scheduler_type == "linear":
        return max(0.0, 1 - done)
    if config.lr_scheduler_type == "cosine":
        return 0.5 * (1 + math.cos(math.pi * done))
    return 1.0


def _num_steps(config: TrainConfig, feed: Feed) -> int:
    return config.max_steps or max(1, math.ceil(feed.steps_per_epoch * config.num_train_epochs))


def _interval(steps: float, num_steps: int) -> int:
    return max(1, round(steps * num_steps if 0 < steps < 1 else steps or num_steps))


def _announce(report: Report, trainer: Trainer, feed: Feed, num_steps: int, progress: Progress) -> None:
    config = trainer.config
    report.line(
        f"{config.lists_per_step} lists a step, {num_steps} steps; loss {config.loss}; {_device(trainer)}, "
        f"{torch.get_num_threads()} threads, {trainer.precision}"
    )
    report.line(feed.summary)
    if trainer.model.initialised:
        report.line(f"drawn from seed {config.seed}: {', '.join(trainer.model.initialised)}")
    if progress.step:
        report.line(f"resumed after step {progress.step}")


def _device(trainer: Trainer) -> str:
    count = trainer.processes.count
    return str(trainer.device) if count == 1 else f"{count} processes on {trainer.device.type}"


def _print_plan(config: TrainConfig, feed: Feed, num_steps: int) -> None:
    trainer, lists = Trainer(config), feed.step(0)
    pairs = sum(len(one.documents) for one in lists)
    tokens = sum(len(ids) for one in trainer.tokenize(lists) for ids, _ in one)
    print(f"{feed.num_lists} lists, {config.lists_per_step} a step, {num_steps} steps")
    print(
        f"first step: {pairs} pairs, {tokens} tokens; "
        f"the whole run about {pairs * num_steps} pairs, {tokens * num_steps} tokens"
    )
    timed, seconds = trainer.time_a_pass(lists)
    hours = tokens * num_steps * seconds / timed / 3600
    print(
        f"here ({trainer.device}, {trainer.precision}) about {hours:.2g} hours, by one pass of {timed} tokens in "
        f"{seconds:.2f} s, and {trainer.peak_memory() / 2**30:.1f} GiB of memory"
    )


def check_folder(config: TrainConfig) -> None:
    """Refuses an output folder that holds other files, or another run's where they are to stay.

    Raises:
        ValueError: What lies there, and what to do.
    """
    folder = Path(config.output_dir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; output_dir must name a folder.")
    left = _left_in(folder)
    if left and Path(config.model).is_dir() and folder.samefile(config.model):
        raise ValueError(f"{folder} holds the model to start from; name another output_dir.")
    if left and config.overwrite:
        if not (folder / CONFIG_FILE).exists():
            raise ValueError(
                f"{folder} holds files that no training run left ({left[0].name}): --overwrite would delete them."
            )
    elif left and not config.resume:
        raise ValueError(
            f"{folder} is not empty: go on with --resume, start anew with --overwrite, or name another folder."
        )
    elif (folder / CONFIG_FILE).exists():
        different = config.differences(read_yaml(folder / CONFIG_FILE))
        if different:
            raise ValueError(
                f"{folder} was trained with another {', '.join(different)} ({CONFIG_FILE} there says which): "
                "give the same, or start anew with --overwrite."
            )


def _left_in(folder: Path) -> list[Path]:
    # The lock file stays: unlinking it would let two later runs lock two different files of that name.
    return sorted(entry for entry in folder.iterdir() if entry.name != ".lock") if folder.exists() else []


@contextlib.contextmanager
def _claimed(folder: Path, config: TrainConfig):
    """Holds the folder against a second run."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{folder} is in use by another training run that is still going.") from None
        check_folder(config)
        yield
