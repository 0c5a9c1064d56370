"""Several runs in one configuration, each from the checkpoint of the one before: Rank-DistiLLM's two stages.

`stages` is a list of mappings of the usual keys, each perhaps with a `name`; keys beside it hold for every stage. Stage
i writes output_dir/<i>-<name>, a folder like any run's, and the last one's holds the result. With resume a stage that
is done takes no step, so a chain goes on wherever it was killed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .config import TrainConfig, check_keys
from .loop import train

__all__ = ["read_stages", "train_stages"]


def read_stages(
    mapping: Mapping[str, Any], flags: Mapping[str, tuple[Any, bool]] | None = None, where: str = "the configuration"
) -> list[TrainConfig]:
    """The runs of a configuration, in order.

    Arguments:
        mapping: keys of TrainConfig and perhaps `stages`; without them it is one run.
        flags: {key: (value, whether it is the whole value)} that win over the mapping in every stage; `model` is that
            of the first stage alone.
        where: the configuration's name in errors.

    Raises ValueError for stages of another form, two of one name, and unknown or missing keys.
    """
    common = {key: value for key, value in mapping.items() if key != "stages"}
    flags = dict(flags or {})
    if "stages" not in mapping:
        return [TrainConfig.from_mapping(_with_flags(common, flags), where)]
    stages = mapping["stages"]
    if not isinstance(stages, list) or not stages or not all(isinstance(stage, dict) for stage in stages):
        raise ValueError(f"{where}: stages must be a list of mappings, one a run.")
    whole = _with_flags(common, flags)
    if whole.get("output_dir") is None:
        raise ValueError(f"{where} lacks output_dir beside stages: the folder that holds a folder for each stage.")
    configs: list[TrainConfig] = []
    names: set[str] = set()
    for number, stage in enumerate(stages, start=1):
        name = str(stage.get("name", number))
        own = {key: value for key, value in stage.items() if key != "name"}
        check_keys(own, f"{where}, stage {name}")
        if "output_dir" in own:
            raise ValueError(f"{where}, stage {name}: output_dir stands beside stages, not in one.")
        if name in names or "/" in name or name in (".", ".."):
            raise ValueError(f"{where}, stage {name}: names of stages must differ and be names of folders.")
        names.add(name)
        merged = _with_flags(common | own, flags)
        if configs:
            merged["model"] = own.get("model", configs[-1].output_dir)
        merged["output_dir"] = str(Path(whole["output_dir"]) / (name if name == str(number) else f"{number}-{name}"))
        configs.append(TrainConfig.from_mapping(merged, f"{where}, stage {name}"))
    return configs


def train_stages(configs: list[TrainConfig], *, quiet: bool = False) -> Path:
    """Trains one stage after the other; returns the last one's folder. Errors as in train().

    With dry_run every stage's plan is printed, with the first stage's model where it starts from one that is not there.
    """
    for config in configs:
        if config.dry_run and not quiet and len(configs) > 1:
            print(config.output_dir)
        missing = (
            config.dry_run and config.model in [one.output_dir for one in configs] and not Path(config.model).exists()
        )
        planned = dataclasses.replace(config, model=configs[0].model) if missing else config
        folder = train(planned, quiet=quiet)
    return folder


def _with_flags(mapping: dict[str, Any], flags: Mapping[str, tuple[Any, bool]]) -> dict[str, Any]:
    # --loss_options.temperature 2 changes one key of the file's loss_options.
    merged = dict(mapping)
    for name, (value, is_whole) in flags.items():
        merged[name] = value if is_whole or not merged.get(name) else {**merged[name], **value}
    return merged
