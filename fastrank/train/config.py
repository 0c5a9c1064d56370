"""The keys of a training run, from YAML, flags or Python. Names are Hugging Face's where they exist.

A run is this dataclass and nothing else; it is written beside the checkpoint, and --resume refuses one that differs.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.resources
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fastrank.command_line import MAX_THREADS

__all__ = ["TrainConfig", "read_yaml", "recipe_names", "resolve_recipe"]

SELECTIONS = ("gap", "difficulty", "energy")
SCHEDULES = ("linear", "constant", "cosine")
PRECISIONS = {"auto": "auto", "float32": "float32", "fp32": "float32", "bf16": "bf16", "bfloat16": "bf16"}
BY_DEVICE = ("max_batch_tokens", "precision")  # keys whose default the device decides
# Keys that may change between a run and its resumption: none of them changes a weight.
RESUMABLE = ("resume", "overwrite", "dry_run", "save_steps", "logging_steps", "num_threads", "output_dir",
             "gradient_checkpointing", "cuda_graphs")  # fmt: skip


@dataclass
class TrainConfig:
    """Everything that decides a training run.

    Args:
        model: Checkpoint folder or hub name of the encoder; a missing classification head is drawn from the seed.
        train_data: What to train on: a lists .jsonl, a mapping of fastrank.data.DataSource's fields, a list of those,
            or rows {query, documents, labels}.
        output_dir: Folder that receives the best checkpoint, log.jsonl and the state to resume from.
        eval_data: What to measure nDCG@10 on every eval_steps steps, in the same forms; none: the last weights are
            kept.
        loss: Name in fastrank.losses.LOSSES, or a weight for each of several, such as {ranknet: 1, mse: 0.1}, or the
            dotted path of a function with the same signature (from Python also the function itself).
        loss_options: Keyword arguments of the loss, such as {temperature: 2}; of several by name, {mse: {temperature:
            2}}.
        learning_rate: Peak rate of AdamW.
        head_learning_rate: Peak rate of the classification head (pooler included); default: learning_rate.
        lr_scheduler_type: linear, constant or cosine, each after the warm-up.
        warmup_steps: Steps of linear warm-up; below 1 it is a share of all steps.
        weight_decay: AdamW's decay, not applied to biases and LayerNorm.
        adam_beta1: AdamW's first beta.
        adam_beta2: AdamW's second beta.
        adam_epsilon: AdamW's epsilon.
        max_grad_norm: Gradients are scaled down to this norm; 0 leaves them.
        num_train_epochs: Passes over the queries, unless max_steps is set.
        max_steps: Optimizer steps; 0 or -1: num_train_epochs decides.
        per_device_train_batch_size: Lists (queries) a step.
        gradient_accumulation_steps: Multiplies the lists of a step; the loss is normalised over all of them at once.
        max_batch_tokens: Tokens of one forward and backward pass; default: 8,192 on a CPU and 16,384 in bf16, on a GPU
            what a third of its memory takes, up to 131,072. Cuts a step for memory and never changes its gradient;
            dropout's masks follow the cut, so give it where a run is to be repeated on another GPU.
        gradient_checkpointing: Keep only what goes into each layer, and compute it again in the backward pass: a third
            more work, far less memory, the same gradients.
        cuda_graphs: On a GPU, record the passes of a bucket of like batches when it comes the third time, and replay
            them: a small model's kernels run faster than Python starts them. Graphs keep the memory of the largest
            pass that they hold.
        max_length: Tokens of a pair, special tokens included; default: what model and tokenizer allow.
        max_query_tokens: Query tokens kept, before the pair is truncated.
        max_document_tokens: Document tokens kept, before the pair is truncated.
        dropout: Overrides the model's hidden dropout.
        freeze_layers: Embeddings and the first N layers keep their weights; -1 freezes nothing, 0 the embeddings alone.
        precision: float32, or bf16 for matrix products (and on a GPU hidden states and kernels) in bf16 around float32
            weights; auto: bf16 on a GPU, float32 on a CPU.
        device: cpu, cuda, or auto.
        select_by: Train only on the lists from which the model that the run starts from can learn most: gap (it
            orders them unlike the labels), difficulty (the query's text helps it little) or energy (they are unlike
            what it has learned); see fastrank.train.selection. Default: all lists.
        select_share: Share of the lists that select_by keeps.
        num_threads: CPU threads; default: torch's.
        seed: Decides head, order, sampling and dropout.
        eval_steps: Steps between evaluations; below 1 a share of all steps; 0: at the end only.
        save_steps: Steps between resumable states; below 1 a share of all steps; 0: at the end only.
        logging_steps: Steps between log lines.
        resume: Go on from the last state in output_dir, if there is one.
        overwrite: Delete what an earlier run left in output_dir.
        dry_run: Print the plan (lists, pairs, tokens, steps) and stop.
    """

    model: str
    train_data: Any
    output_dir: str
    eval_data: Any = None
    loss: str | dict[str, float] = "ranknet"
    loss_options: dict[str, Any] = field(default_factory=dict)
    learning_rate: float = 1e-5
    head_learning_rate: float | None = None
    lr_scheduler_type: str = "linear"
    warmup_steps: float = 0
    weight_decay: float = 0.01
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    num_train_epochs: float = 1
    max_steps: int = 0
    per_device_train_batch_size: int = 32
    gradient_accumulation_steps: int = 1
    max_batch_tokens: int | None = None
    gradient_checkpointing: bool = False
    cuda_graphs: bool = True
    max_length: int | None = None
    max_query_tokens: int | None = None
    max_document_tokens: int | None = None
    dropout: float | None = None
    freeze_layers: int = -1
    precision: str = "auto"
    device: str = "auto"
    select_by: str | None = None
    select_share: float = 0.5
    num_threads: int | None = None
    seed: int = 42
    eval_steps: float = 0
    save_steps: float = 0
    logging_steps: int = 10
    resume: bool = False
    overwrite: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            setattr(self, each.name, _typed(each.name, each.type, getattr(self, each.name)))
        for name in ("train_data", "eval_data"):
            if isinstance(getattr(self, name), Iterator):  # it is read more than once
                setattr(self, name, list(getattr(self, name)))
        if self.max_steps == -1:  # Hugging Face's default
            self.max_steps = 0
        if self.num_threads is not None and self.num_threads > MAX_THREADS:
            raise ValueError(f"num_threads={self.num_threads}: must be at most {MAX_THREADS}.")
        if self.resume and self.overwrite:
            raise ValueError("resume keeps what lies in output_dir and overwrite deletes it: give one of them.")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}: training knows {', '.join(PRECISIONS)}.")
        self.precision = PRECISIONS[self.precision]
        if self.lr_scheduler_type not in SCHEDULES:
            raise ValueError(f"lr_scheduler_type={self.lr_scheduler_type!r}: choose one of {', '.join(SCHEDULES)}.")
        for name in (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "max_batch_tokens",
            "logging_steps",
            "num_threads",
        ):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: must be at least 1.")
        for name in (
            "learning_rate",
            "head_learning_rate",
            "warmup_steps",
            "weight_decay",
            "max_grad_norm",
            "max_steps",
            "eval_steps",
            "save_steps",
        ):
            if getattr(self, name) is not None and not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: must not be negative.")
        if self.max_steps == 0 and not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs={self.num_train_epochs}: must be above 0 where max_steps is not set.")
        if self.select_by not in (None, *SELECTIONS):
            raise ValueError(f"select_by={self.select_by!r}: choose one of {', '.join(SELECTIONS)}.")
        if not 0 < self.select_share <= 1:
            raise ValueError(f"select_share={self.select_share}: must lie above 0 and at most at 1.")
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must lie in [0, 1).")

    @property
    def lists_per_step(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @classmethod
    def from_mapping(cls, mapping: dict[str, Any], where: str = "the configuration") -> TrainConfig:
        """Builds the config from plain keys; unknown and missing ones are ValueErrors that name the nearest known
        key."""
        mapping = dict(mapping)
        if "warmup_ratio" in mapping:
            mapping.setdefault("warmup_steps", mapping.pop("warmup_ratio"))
        check_keys(mapping, where)
        required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
        missing = [name for name in required if mapping.get(name) is None]
        if missing:
            raise ValueError(f"{where} lacks {', '.join(missing)}: give --{missing[0]} or the key in the YAML file.")
        return cls(**mapping)

    def differences(self, other: dict[str, Any]) -> list[str]:
        """Keys in which a stored run differs from this one and that would change the weights."""
        mine = yaml.safe_load(to_yaml(self))
        compared = [key for key in mine if key not in RESUMABLE and mine[key] != other.get(key, mine[key])]
        # What the device decides may be written down by one of the two.
        return [key for key in compared if key not in BY_DEVICE or not {None, "auto"} & {mine[key], other[key]}]


def _typed(name: str, kind: str, value: Any) -> Any:
    """The value as what its key holds: YAML reads 1e-4 as a text, and a path from Python is a Path."""
    wanted, _, optional = kind.partition(" | ")
    if value is None and optional == "None":
        return None
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if wanted in ("int", "float"):
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if isinstance(value, bool) or not math.isfinite(number) or (wanted == "int" and number % 1):
            raise ValueError(f"{name}={value!r}: must be a {'whole ' if wanted == 'int' else 'finite '}number.")
        return int(number) if wanted == "int" else number
    if wanted == "bool" and not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: must be true or false.")
    if wanted == "str" and not (isinstance(value, str) or (name == "loss" and isinstance(value, dict | Callable))):
        raise ValueError(f"{name}={value!r}: must be a text.")
    if wanted.startswith("dict"):
        if not isinstance(value, dict):
            raise ValueError(f"{name}={value!r}: must be keys and values.")
        return {key: one.item() if hasattr(one, "item") else one for key, one in value.items()}  # NumPy's numbers
    return value


def to_yaml(config: TrainConfig) -> str:
    mapping = dict(vars(config))
    if callable(config.loss):
        mapping["loss"] = f"{config.loss.__module__}.{config.loss.__qualname__}"
    for key in ("train_data", "eval_data"):
        mapping[key] = _plain(mapping[key])
    return yaml.safe_dump(mapping, sort_keys=False, allow_unicode=True)


def _plain(data: Any) -> Any:
    """Python rows are described, not written out: a config file holds paths, not documents."""
    if isinstance(data, str | type(None)):
        return data
    if isinstance(data, Path):
        return str(data)
    if isinstance(data, dict) and not {"query", "documents"} <= data.keys():
        return {key: _plain_value(value) for key, value in data.items()}
    if dataclasses.is_dataclass(data) and not hasattr(data, "query"):
        return {key: _plain_value(value) for key, value in vars(data).items()}
    rows = list(data)
    if (rows and isinstance(rows[0], str | Path)) or (rows and isinstance(rows[0], dict) and "query" not in rows[0]):
        return [_plain(row) for row in rows]
    return f"{len(rows)} rows given in Python"


def _plain_value(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return [_plain_value(v) for v in value] if isinstance(value, list | tuple) else value


def check_keys(mapping: dict[str, Any], where: str) -> None:
    known = [f.name for f in dataclasses.fields(TrainConfig)] + ["warmup_ratio"]
    for key in mapping:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.0)
            raise ValueError(f"{where}: unknown key {key!r}; the nearest known one is {near[0]!r}.")


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(mapping, dict):
        raise ValueError(f"{path} must hold keys and values, one training run; it holds {type(mapping).__name__}.")
    check_keys({key: value for key, value in mapping.items() if key != "stages"}, str(path))
    return mapping


def recipe_names() -> list[str]:
    folder = importlib.resources.files("fastrank") / "recipes"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def resolve_recipe(name: str) -> Path:
    """The YAML file itself, or the ready recipe of that name."""
    if os.path.exists(name):
        return Path(name)
    if name in recipe_names():
        return Path(str(importlib.resources.files("fastrank") / "recipes" / f"{name}.yaml"))
    raise ValueError(f"{name!r} is neither a YAML file nor a recipe; the recipes are {', '.join(recipe_names())}.")
