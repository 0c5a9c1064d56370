"""The one accuracy rule: a kernel may be at most twice as wrong as the reference rounded to the same dtype.

error(actual, exact) <= 2 * error(rounded, exact) + tiny, for outputs and every gradient, where exact is the reference
in float64, rounded the reference in the dtype, actual the backend under test in the dtype, with uninitialised memory
filled with NaN.
"""

import contextlib
import ctypes
import math
import mmap
from collections.abc import Callable, Iterator, Mapping

import pytest
import torch
from torch import Tensor

from fastrank import backend as backends

Outputs = Tensor | tuple[Tensor, ...]


def skip_unless_runs(op: str, backend: str, tensor: Tensor) -> None:
    """Skips the test with the backend's own sentences where it cannot run `op` on `tensor`."""
    if sentences := backends.refusals(op, backend, tensor):
        pytest.skip(" ".join(sentences))


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside it torch.empty and its kin are full of NaN, so that a forgotten element is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def before_a_wall(tensor: Tensor) -> Tensor:
    """A contiguous copy whose last byte is followed by memory that no one may read: a kernel that does is killed."""
    if not tensor.numel():
        return tensor.clone()
    size = tensor.numel() * tensor.element_size()
    room = math.ceil(size / mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, room + mmap.PAGESIZE)
    wall = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + room
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    copy = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=room - size)
    return copy.reshape(tensor.shape).copy_(tensor)


def outputs_and_gradients(
    run: Callable[..., Outputs],
    inputs: Mapping[str, Tensor | None],
    dtype: torch.dtype,
    seed: int = 0,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """The outputs of run(**inputs) in `dtype` and the gradient of every floating input, for a random upstream gradient.

    On a CPU the inputs lie before a wall, so that reading past the end of one does not go unseen.
    """
    place = before_a_wall if device == "cpu" else lambda tensor: tensor.to(device, copy=True)
    leaves = {
        name: place(value.detach().to(dtype)).requires_grad_()
        for name, value in inputs.items()
        if value is not None and value.is_floating_point()
    }
    outputs = run(**{**inputs, **leaves})
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    generator = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(output.shape, generator=generator).to(output) for output in outputs]
    needed = [(output, gradient) for output, gradient in zip(outputs, upstream, strict=True) if output.requires_grad]
    gradients = torch.autograd.grad(
        [output for output, _ in needed], list(leaves.values()), [gradient for _, gradient in needed]
    )
    results = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    return results | {f"gradient of {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def difference(values: Tensor, exact: Tensor) -> Tensor:
    """|values - exact| in float64; equal infinities differ by 0, NaN against anything by infinity."""
    values = values.double()
    apart = torch.where(values == exact, 0.0, (values - exact).abs())
    return torch.nan_to_num(apart, nan=torch.inf)


def error(values: Tensor, exact: Tensor) -> float:
    """The largest difference."""
    return difference(values, exact).max().item() if exact.numel() else 0.0


def assert_accurate(
    run: Callable[..., Outputs],
    inputs: Mapping[str, Tensor | None],
    *,
    backend: str,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str = "cpu",
) -> None:
    """Holds `backend` to the rule.

    run: called as run(backend=name, **inputs), returns a tensor or a tuple of tensors. inputs: by name; floating
    tensors are cast to float64 or `dtype` and differentiated, everything else is passed on as it is. Their values
    should be exact in `dtype`.
    """
    exact = outputs_and_gradients(
        lambda **given: run(backend="reference", **given), inputs, torch.float64, seed, device
    )
    rounded = outputs_and_gradients(lambda **given: run(backend="reference", **given), inputs, dtype, seed, device)
    with poisoned_memory():
        actual = outputs_and_gradients(lambda **given: run(backend=backend, **given), inputs, dtype, seed, device)
    hold_to_the_rule(exact, rounded, actual, backend=backend, dtype=dtype)


def hold_to_the_rule(
    exact: Mapping[str, Tensor],
    rounded: Mapping[str, Tensor],
    actual: Mapping[str, Tensor],
    *,
    backend: str,
    dtype: torch.dtype = torch.float32,
) -> None:
    """The rule itself, for tensors by name."""
    complaints = []
    for name, truth in exact.items():
        value = actual[name]
        assert value.shape == truth.shape, f"{name} has shape {tuple(value.shape)}, the reference {tuple(truth.shape)}"
        assert value.dtype == rounded[name].dtype, f"{name} is {value.dtype}, the reference {rounded[name].dtype}"
        finite = truth[truth.isfinite()]
        largest = finite.abs().max().item() if finite.numel() else 0.0
        allowed = 2 * error(rounded[name], truth) + 4 * torch.finfo(dtype).eps * largest + torch.finfo(dtype).tiny
        if error(value, truth) <= allowed:
            continue
        apart = difference(value, truth)
        worst = torch.unravel_index(apart.argmax(), apart.shape)
        complaints.append(
            f"{name}{[int(index) for index in worst]}: {backend} {value[worst].item():.9g}, "
            f"exact {truth[worst].item():.9g}, "
            f"reference in {dtype} {rounded[name][worst].item():.9g}; largest error {error(value, truth):.3g}, "
            f"allowed {allowed:.3g}, wrong elements {(apart > allowed).sum().item()} of {apart.numel()}"
        )
    assert not complaints, "\n".join(complaints)
