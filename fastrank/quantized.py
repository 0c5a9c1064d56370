"""model.int8.safetensors: a checkpoint's weights as int8 inference wants them, written once, read in place of others.

The file stands beside the float32 weights or in their place; a quarter of their size but for the embeddings, which stay
float32. It names the SHA-256 of the weights it was made from, so that a folder trained again is quantised again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastrank import ops
from fastrank.checkpoint import find_files, find_weights, flush, load_model, naming, read_config
from fastrank.command_line import OneSentenceParser
from fastrank.model import CrossEncoder
from fastrank.model.electra import PlainHead
from fastrank.model.linear import Linear, linears

FILE = "model.int8.safetensors"
FORMAT = "1"


def save_int8(folder: str | os.PathLike) -> Path:
    """Quantises the checkpoint of a folder and writes FILE into it; returns its path.

    Raises what fastrank.checkpoint.load_model raises, ValueError for weights that are not finite, and OSError where
    the folder cannot be written.
    """
    folder = Path(folder).expanduser()
    model = load_model(folder, local_files_only=True)
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(f"{folder}: {name} holds NaN or infinite values.")
    frozen = {}
    tensors = {name: parameter.detach() for name, parameter in model.named_parameters()}
    model.freeze("int8")
    for name, module in _encoder_linears(model):
        frozen[f"{name}.weight"] = module.frozen.weight
        frozen[f"{name}.scales"] = module.frozen.scales
    metadata = {
        "fastrank": FORMAT,
        "source": _fingerprint(find_files(folder)),
        "has_plain_head": str(isinstance(model.head, PlainHead)),
    }
    path = folder / FILE
    aside = folder / f".{FILE}.{os.getpid()}.partial"
    try:
        save_file({name: tensor.contiguous() for name, tensor in (tensors | frozen).items()}, aside, metadata)
        shutil.copymode(folder / "config.json", aside)  # it comes readable by its owner alone
        flush(aside)
        aside.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    finally:
        aside.unlink(missing_ok=True)
    flush(folder)
    return path


def load_int8(name_or_path: str | os.PathLike, **hub) -> CrossEncoder | None:
    """The checkpoint's int8 model for inference on a CPU, its encoder frozen; None where FILE is missing.

    hub: revision, token, local_files_only as in fastrank.checkpoint.load_model. A FILE that was made from other weights
    than those beside it is passed over with a warning. Raises ValueError for one that cannot be read.
    """
    find = find_files(name_or_path, **hub)
    path = find(FILE)
    if path is None:
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("fastrank") != FORMAT:
                raise ValueError(f"its format is {metadata.get('fastrank')}, not {FORMAT}")
            source = _fingerprint(find)
            if source not in ("", metadata.get("source")):
                warnings.warn(
                    f"{path} was made from other weights than those beside it and is not used: run `python -m fastrank "
                    "quantize` again.",
                    stacklevel=2,
                )
                return None
            has_plain_head = metadata.get("has_plain_head") == "True"
    except (SafetensorError, ValueError) as error:
        raise _unusable(path, error) from error
    with naming(name_or_path):
        model = CrossEncoder(read_config(name_or_path, find), has_plain_head=has_plain_head)
    try:
        with safe_open(path, "pt") as file:
            _fill(model, file)
    except (SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise _unusable(path, error) from error
    return model.eval().requires_grad_(False)


def _unusable(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path} cannot be used: {' '.join(str(error).split()).rstrip('.')}. Delete or rewrite it.")


def _fill(model: CrossEncoder, file) -> None:
    quantised = dict(_encoder_linears(model))
    state = {}
    for name, parameter in model.named_parameters():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module in quantised:
            state[name] = torch.empty(parameter.shape, device="meta")
            continue
        state[name] = file.get_tensor(name).clone()  # the file's memory is given back
        if state[name].shape != parameter.shape or state[name].dtype != torch.float32:
            raise ValueError(f"{name} is not {tuple(parameter.shape)} float32")
    model.load_state_dict(state, assign=True)
    for name, module in quantised.items():
        weight, scales = file.get_tensor(f"{name}.weight").clone(), file.get_tensor(f"{name}.scales").clone()
        module.frozen = ops.restore_linear(weight, module.bias.detach(), scales, module.in_features)
        ops.release_linear(module.frozen)


def _encoder_linears(model: CrossEncoder) -> list[tuple[str, Linear]]:
    return [(f"encoder.{name}", module) for name, module in linears(model.encoder)]


def _fingerprint(find: Callable[[str], Path | None]) -> str:
    """The SHA-256 of the float32 weight files, "" where there are none."""
    paths = find_weights(find)
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while part := file.read(1 << 20):
                digest.update(part)
    return digest.hexdigest() if paths else ""


def quantize_command(argv: Sequence[str]) -> int:
    """Runs `fastrank quantize`; returns the exit status, 2 after one sentence on stderr for what cannot be done."""
    parser = OneSentenceParser(
        prog="fastrank quantize",
        description=f"Writes {FILE} into a checkpoint's folder; Reranker(folder, dtype='int8') then reads it, and "
        "needs no other weights.",
    )
    parser.add_argument("folder")
    try:
        options = parser.parse_args(argv)
    except SystemExit as stop:
        return int(stop.code or 0)
    try:
        path = save_int8(options.folder)
    except (ValueError, OSError) as error:
        print(f"fastrank quantize: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
    return 0
