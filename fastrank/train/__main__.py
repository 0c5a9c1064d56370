"""python -m fastrank.train [RECIPE_OR_YAML] [--key value ...]: flags win over the file."""

from __future__ import annotations

import os
import sys

import yaml

from fastrank.command_line import with_underscores

from .config import TrainConfig, check_keys, read_yaml, recipe_names, resolve_recipe, to_yaml


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns 0, or 2 after one sentence on stderr."""
    argv = with_underscores(sys.argv[1:] if argv is None else argv)
    try:
        if "--demo" in argv:
            from .demo import demo_command

            return demo_command([word for word in argv if word != "--demo"])
        configs = _parse(argv)
        if not configs:
            return 0
        from .stages import train_stages

        train_stages(configs)
    except (ValueError, OSError, ImportError) as error:
        print(f"fastrank.train: {error}", file=sys.stderr)
        _tell_torchrun(error)
        return 2
    except KeyboardInterrupt:
        print(
            "fastrank.train: stopped; --resume goes on from the last state, if save_steps had one written.",
            file=sys.stderr,
        )
        return 130
    return 0


def _tell_torchrun(error: Exception) -> None:
    """torchrun ends with a page of its own; this has it end with the error."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _parse(argv: list[str]) -> list[TrainConfig]:
    """The runs that are asked for; none where only something is to be printed."""
    from jsonargparse import ArgumentParser

    from .stages import read_stages

    parser = ArgumentParser(
        prog="python -m fastrank.train",
        description="Trains a cross-encoder on ranking lists. The first argument may be a YAML file or a recipe: "
        f"{', '.join(recipe_names())}; --demo trains on documentation strings.",
        exit_on_error=False,
    )
    parser.add_class_arguments(TrainConfig, fail_untyped=False)
    # What is required may stand in the file; TrainConfig.from_mapping asks for what is in neither.
    parser.set_defaults({"model": "", "train_data": "", "output_dir": ""})
    parser.add_argument("--print_config", action="store_true", help="Print the whole configuration as YAML and stop.")
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        return []
    mapping: dict = {}
    if argv and not argv[0].startswith("-"):
        mapping = read_yaml(resolve_recipe(argv.pop(0)))
    print_config = "--print_config" in argv
    flags = _flags(parser, [word for word in argv if word != "--print_config"])
    configs = read_stages(mapping, flags, "the command line")
    if print_config:
        print("---\n".join(to_yaml(config) for config in configs), end="")
        return []
    return configs


def _flags(parser, argv: list[str]) -> dict:
    """The flags given, and no defaults: each name's value, typed and checked by jsonargparse, and whether it is the
    whole value."""
    from jsonargparse import ArgumentError

    names: dict[str, bool] = {}
    for position, word in enumerate(argv):
        if word.startswith("--"):
            name, _, part = word[2:].split("=")[0].partition(".")
            check_keys({name: None}, f"flag --{name}")
            name = "warmup_steps" if name == "warmup_ratio" else name
            names[name] = names.get(name, False) or not part
        elif position == 0 or not argv[position - 1].startswith("--") or "=" in argv[position - 1]:
            raise ValueError(f"{word!r} follows no --key; flags are written --key value.")
    words = [word.replace("--warmup_ratio", "--warmup_steps") if word.startswith("--") else word for word in argv]
    words = _bare_flags_mean_true(words)
    try:
        parsed = parser.parse_args(words, defaults=True)
    except ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from None
    plain = yaml.safe_load(parser.dump(parsed, skip_validation=True))
    return {name: (plain[name], is_whole) for name, is_whole in names.items()}


def _bare_flags_mean_true(words: list[str]) -> list[str]:
    out = []
    for position, word in enumerate(words):
        ends = position + 1 == len(words) or words[position + 1].startswith("--")
        out.append(f"{word}=true" if word in ("--resume", "--overwrite", "--dry_run") and ends else word)
    return out


if __name__ == "__main__":
    sys.exit(main())
