"""A folder (or a hub name) -> a model, and a model -> a folder.

The folder is the hub's usual one: config.json, model.safetensors and the tokenizer's files. What save_model writes
opens in transformers and sentence-transformers too, with the same scores. Files are written aside, flushed to disk
and renamed, so that a process killed at any moment leaves no half file under a final name.
"""

import contextlib
import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastrank.model import CrossEncoder
from fastrank.model.settings import count_labels
from fastrank.model.weights import from_hub, to_hub

if TYPE_CHECKING:
    from fastrank.tokens import PairTokenizer

# Weight files in order of preference; an index lists the files that the weights are spread over.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
ACTIVATIONS = {
    "torch.nn.Identity": "none",
    "torch.nn.modules.linear.Identity": "none",
    "torch.nn.Sigmoid": "sigmoid",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
}
# Keys of config.json that describe the files a model was loaded from, not the ones that are written.
STALE_KEYS = ("_name_or_path", "auto_map", "dtype", "torch_dtype")
LOCAL_PATH_HINT = "give the path of a folder that holds config.json, model.safetensors and the tokenizer's files"


def load_model(
    name_or_path: str | os.PathLike,
    *,
    head: Literal["required", "initialise"] = "required",
    seed: int = 0,
    dropout: float | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> CrossEncoder:
    """The re-ranker of a local folder or of a name on the Hugging Face hub, in float32, on the CPU, in eval mode.

    head: "required" refuses a checkpoint without a classification head; "initialise" draws the missing weights from
    `seed` and names them in `model.initialised`. dropout: replaces the config's shares in training. revision, token,
    local_files_only: as in huggingface_hub. Raises FileNotFoundError if there is no such folder or name, ValueError
    for files that cannot be read and for weights that are missing, unexpected or of a wrong shape.
    """
    if head not in ("required", "initialise"):
        raise ValueError(f"head must be 'required' or 'initialise', not {head!r}.")
    find = find_files(name_or_path, revision=revision, token=token, local_files_only=local_files_only)
    with naming(name_or_path):
        config = read_config(name_or_path, find)
        weights = _read_weights(name_or_path, find)
        model = from_hub(config, weights, may_initialise=head == "initialise", seed=seed, dropout=dropout)
    return model.eval()


@contextlib.contextmanager
def naming(name_or_path: str | os.PathLike) -> Iterator[None]:
    """Turns what reading a checkpoint's config and weights raises into ValueErrors that name it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name_or_path}: {error}") from error
    except (TypeError, AttributeError, LookupError, ArithmeticError, RuntimeError, struct.error) as error:
        # A config or a weight file of a form that nobody would write on purpose.
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(f"{name_or_path}: config.json or the weights are not as they should be ({reason})") from error


def save_model(folder: str | os.PathLike, model: CrossEncoder, tokenizer: "PairTokenizer") -> None:
    """Write config.json, model.safetensors and the tokenizer's files; a plain ELECTRA head becomes a usual one.

    folder: made if it does not exist; files of the same names are replaced, others are left alone.
    """
    folder = Path(folder).absolute()
    # On the same file system as its destination, or it could not be renamed: an existing folder may be a mount point.
    aside = folder / ".partial" if folder.exists() else folder.parent / f".{folder.name}.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    tokenizer.save(aside)
    config = {
        **{key: value for key, value in model.config.items() if key not in STALE_KEYS},
        "architectures": [model.family.architecture],
        "dtype": "float32",
    }
    (aside / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    save_file(to_hub(model), aside / "model.safetensors", metadata={"format": "pt"})
    shutil.copymode(aside / "config.json", aside / "model.safetensors")  # which comes readable by its owner alone
    for path in aside.iterdir():
        flush(path)
    if folder.exists():
        for path in list(aside.iterdir()):
            path.replace(folder / path.name)
        aside.rmdir()
        flush(folder)
    else:
        aside.rename(folder)
    flush(folder.parent)


def score_activation(config: Mapping[str, Any]) -> Literal["none", "sigmoid"]:
    """What a checkpoint's config.json wants done to a raw score, looked up as sentence-transformers does.

    config: the parsed file (`model.config`). One label without an entry means sigmoid. Raises ValueError for any other
    function.
    """
    entry = config.get("sentence_transformers")
    path = entry.get("activation_fn") if isinstance(entry, Mapping) else None
    path = path or config.get("sbert_ce_default_activation_function")
    if path is None:
        return "sigmoid" if count_labels(config) == 1 else "none"
    if path not in ACTIVATIONS:
        raise ValueError(
            f"The checkpoint's config names the score activation {path!r}; only torch.nn's Identity and Sigmoid are "
            "known. Choose one yourself: activation='none' or activation='sigmoid'."
        )
    return ACTIVATIONS[path]


def read_config(name_or_path: str | os.PathLike, find: Callable[[str], Path | None]) -> dict[str, Any]:
    """The checkpoint's config.json, with what other files of the folder add to it. find: from find_files."""
    path = find("config.json")
    if path is None:
        raise FileNotFoundError(f"{name_or_path} has no config.json: {LOCAL_PATH_HINT}.")
    config = _read_json(path)
    # A folder saved by sentence-transformers keeps the activation in a file of its own, which goes first.
    beside = find("config_sentence_transformers.json") if find("modules.json") is not None else None
    if beside is not None and (activation := _read_json(beside).get("activation_fn")):
        config["sentence_transformers"] = {**config.get("sentence_transformers", {}), "activation_fn": activation}
    if "backbone_model_type" in config:
        config = _from_lightning_ir(config)
    return config


def _from_lightning_ir(config: dict[str, Any]) -> dict[str, Any]:
    """Lightning-IR's own config of a pointwise cross-encoder, as one of the encoder family it was built from."""
    supported = {"model_type": "mono", "pooling_strategy": "first", "linear_bias": False}
    for key, value in supported.items():
        if config.get(key, value) != value:
            raise ValueError(f"The Lightning-IR checkpoint has {key} {config[key]!r}; only {value!r} is supported.")
    own = {"backbone_model_type", "query_length", "doc_length", "pooling_strategy", "linear_bias", "scoring_strategy"}
    labels = range(2 if config.get("scoring_strategy") == "mono" else 1)
    return {
        **{key: value for key, value in config.items() if key not in own},
        "model_type": config["backbone_model_type"],
        "id2label": {str(i): f"LABEL_{i}" for i in labels},
        "label2id": {f"LABEL_{i}": i for i in labels},
        "sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"},
    }


def find_weights(find: Callable[[str], Path | None]) -> list[Path]:
    """The files that hold the checkpoint's weights, none where it has none. find: from find_files.

    Raises ValueError where one is missing that the index lists.
    """
    for name in WEIGHT_FILES:
        path = find(name)
        if path is None:
            continue
        if not name.endswith(".index.json"):
            return [path]
        shards = {shard: find(shard) for shard in sorted(set(_read_json(path)["weight_map"].values()))}
        for shard, shard_path in shards.items():
            if shard_path is None:
                raise ValueError(f"{shard} is missing, which {name} lists: download or copy it again.")
        return list(shards.values())
    return []


def _read_weights(name_or_path: str | os.PathLike, find: Callable[[str], Path | None]) -> dict[str, Tensor]:
    paths = find_weights(find)
    if not paths:
        raise FileNotFoundError(f"{name_or_path} has none of {', '.join(WEIGHT_FILES)}: {LOCAL_PATH_HINT}.")
    weights = {}
    for path in paths:
        weights.update(_read_tensors(path))
    return weights


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path.name} is not a whole weight file; it may be cut off or a Git LFS pointer. Download or copy it "
            f"again. ({error})"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is not valid JSON: {error}.") from error


def find_files(
    name_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    local_files_only: bool = False,
) -> Callable[[str], Path | None]:
    """A function from a file's name to its path on this machine, None if the checkpoint has no such file."""
    folder = Path(name_or_path).expanduser()
    if folder.is_dir():
        return lambda name: folder / name if (folder / name).is_file() else None
    if folder.exists():
        raise FileNotFoundError(f"{name_or_path} is a file, not a folder: {LOCAL_PATH_HINT}.")
    name = os.fspath(name_or_path)
    if folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or "\\" in name:
        raise FileNotFoundError(f"There is no folder {name_or_path}: {LOCAL_PATH_HINT}.")
    return _hub_finder(name, revision=revision, token=token, local_files_only=local_files_only)


def _hub_finder(
    name: str, *, revision: str | None, token: str | bool | None, local_files_only: bool
) -> Callable[[str], Path | None]:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    options = {"revision": revision, "token": token, "local_files_only": local_files_only}

    def find(file: str) -> Path | None:
        try:
            path = Path(hf_hub_download(name, file, **options))
        except LocalEntryNotFoundError as error:
            # Unreachable once, the hub would be waited for again with every file.
            options["local_files_only"] = True
            if file != "config.json":
                return None
            reason, cause = "it is not in the local cache and the hub cannot be reached", error
        except EntryNotFoundError:
            return None
        except HFValidationError as error:
            reason, cause = "that is neither a folder here nor a valid name on the hub", error
        except (HfHubHTTPError, OSError) as error:
            reason, cause = str(error).strip().splitlines()[0], error
        else:
            options["revision"] = path.parent.name  # the commit, so that all files are of one version
            return path
        message = f"Cannot load the model {name!r}: {reason}. Check the name, or {LOCAL_PATH_HINT}."
        raise FileNotFoundError(message) from cause

    return find


def flush(path: Path) -> None:
    """Have the operating system write a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
