"""Tables of Triton kernel configurations: the one way to launch a kernel.

A table says of each configuration what triton compiles: kernel, types of the arguments, compile-time values, warps,
stages. Kernels are not specialised on values, and on alignment only where they say so and a launch demands it, so what
the ahead-of-time gate compiles from a table (tests/ahead_of_time.py) is what a launch runs, and nothing else can be
launched.
"""

import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor
from triton import language as tl
from triton.compiler import CompiledKernel

POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
NUMBERS = {int: "i32", float: "fp32"}
FP8_CAPABILITY = 8, 9  # the least compute capability that rounds to fp8 and multiplies it


ALIGNMENT = 16  # bytes: the widest load of a thread
STEP = tl.constexpr(8)  # rows are counted in steps of 8 numbers, so that the compiler knows them to be aligned
HALF = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, *HALF)  # what kernels that take hidden states are made for


def name_of(dtype: torch.dtype) -> str:
    """As it stands in the names of configurations."""
    return str(dtype).removeprefix("torch.")


def kernel(function: Callable | None = None, *, aligned: Collection[str] = ()) -> Callable:
    """triton.jit without specialisation on run-time arguments but for this: the pointers of `aligned`, named without
    their _ptr, are multiples of ALIGNMENT."""
    if function is None:
        return functools.partial(kernel, aligned=aligned)
    parameters = inspect.signature(function).parameters
    arguments = [name for name, parameter in parameters.items() if parameter.annotation is not tl.constexpr]
    known = frozenset(name for name in arguments if name.removesuffix("_ptr") in aligned)
    rest = [name for name in arguments if name not in known]
    made = triton.jit(function, do_not_specialize=rest, do_not_specialize_on_alignment=rest)
    made.aligned = known
    return made


def align(tensor: Tensor) -> Tensor:
    """The tensor, or a copy: contiguous, and begins at a multiple of ALIGNMENT."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


@dataclass(frozen=True)
class Configuration:
    """A kernel as triton compiles it.

    Attributes:
        kernel: What `kernel` made.
        types: Of each run-time argument, in order, such as {"scores_ptr": "*fp32", "num_lists": "i32"}.
        constants: The compile-time values.
        num_warps: Warps of 32 threads a program.
        num_stages: Depth of software pipelining.
        max_registers: The most that a thread may take on GPUs of compute capability 9, where the compiler would take
            more: matrix units read from shared memory there, and more programs at a time hide more waiting. Elsewhere
            products hold what they multiply in registers, and would spill.
    """

    kernel: Callable
    types: Mapping[str, str]
    constants: Mapping[str, object] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 1
    max_registers: int | None = None

    def run(self, num_programs: int, arguments: Sequence[Tensor | int | float]) -> CompiledKernel | None:
        """Launches it through triton, on the current device, with arguments that have been checked; returns what was
        compiled, which is nothing in triton's interpreter."""
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (0, 0)
        return self.kernel[(num_programs,)](*arguments, **self.keywords(capability))

    def run_compiled(self, num_programs: int, device: int, values: Sequence[int | float]) -> bool:
        """Launches it on the current device, whose index `device` is, with addresses in place of tensors; False where
        it has not been run there before. Triton looks at every argument to find what it has compiled, which takes
        longer than most kernels do; here there is only one thing to find. Hooks of triton's profiler are not called."""
        compiled = self.compiled.get(device)
        if compiled is None:
            return False
        stream = torch._C._cuda_getCurrentRawStream(device)
        function, metadata = compiled.function, compiled.packed_metadata
        compiled.run(num_programs, 1, 1, stream, function, metadata, None, None, None, *values, *self.last_arguments)
        return True

    @functools.cached_property
    def compiled(self) -> dict[int, CompiledKernel]:
        """By the index of the device."""
        return {}

    @functools.cached_property
    def places(self) -> dict[str, int]:
        """Where each run-time argument stands, by its name without _ptr."""
        return {name.removesuffix("_ptr"): place for place, name in enumerate(self.types)}

    @functools.cached_property
    def aligned_names(self) -> frozenset[str]:
        """`aligned` without _ptr."""
        return frozenset(name.removesuffix("_ptr") for name in self.aligned)

    @functools.cached_property
    def last_arguments(self) -> tuple[object, ...]:
        """The compile-time values, which stand behind the run-time arguments."""
        return tuple(self.constants[name] for name in self.kernel.arg_names[len(self.types) :])

    def keywords(self, capability: tuple[int, int]) -> dict[str, object]:
        """Compile-time values and options, as a launch on a GPU of this compute capability passes them."""
        return {**self.constants, **self.options(capability)}

    @functools.cached_property
    def checks(self) -> tuple[tuple[str, torch.dtype | type, bool], ...]:
        """Of each run-time argument: its name, its dtype (a tensor's) or type (a number's), whether it is aligned."""
        known = {name: kind for kinds in (POINTERS, NUMBERS) for kind, name in kinds.items()}
        return tuple((name, known[expected], name in self.aligned) for name, expected in self.types.items())

    @property
    def least_capability(self) -> tuple[int, int]:
        """Of the devices that it can be compiled for."""
        return FP8_CAPABILITY if POINTERS[torch.float8_e4m3fn] in self.types.values() else (8, 0)

    @property
    def aligned(self) -> frozenset[str]:
        """Arguments that are multiples of ALIGNMENT."""
        return self.kernel.aligned

    def options(self, capability: tuple[int, int]) -> dict[str, object]:
        """The compiler's, for a GPU of this compute capability."""
        # Fusing is asked for: triton 3.10 no longer does it by itself.
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options | {"maxnreg": self.max_registers} if self.max_registers and capability[0] == 9 else options


def configure(
    kernel: Callable,
    types: Mapping[str, str],
    constants: Mapping[str, object],
    num_warps: int = 4,
    num_stages: int = 1,
    max_registers: int | None = None,
) -> Configuration:
    """The configuration of a kernel whose arguments have these types, by name without _ptr; numbers that have none are
    i32. KeyError for a pointer that has none."""
    known = {}
    for name in kernel.arg_names:
        if name not in constants:
            what = name.removesuffix("_ptr")
            known[name] = types[what] if what in types or what != name else "i32"
    return Configuration(kernel, known, constants, num_warps, num_stages, max_registers)


class Launch:
    """A launch whose arguments have been checked. Called, it runs; called with tensors by name (without _ptr), it runs
    with these in place of the first ones, which must have had their dtypes and shapes. So a batch that goes through the
    same kernel layer by layer is looked at once."""

    __slots__ = ("arguments", "configuration", "device", "num_programs", "values")

    def __init__(
        self,
        configuration: Configuration,
        num_programs: int,
        arguments: Sequence[Tensor | int | float | None],
        values: list[int | float],
        device: int,
    ) -> None:
        self.configuration, self.num_programs, self.arguments = configuration, num_programs, arguments
        self.values = values  # the arguments with addresses in place of tensors
        self.device = device  # its index; -1 for tensors on a CPU, in triton's interpreter

    @property
    def places(self) -> Mapping[str, int]:
        """Where each argument stands, by name."""
        return self.configuration.places

    def forget(self, names: Collection[str]) -> None:
        """Lets go of these tensors: every call will be given others."""
        self.arguments = [
            None if name in names else argument for name, argument in zip(self.places, self.arguments, strict=True)
        ]

    def __call__(self, **tensors: Tensor) -> None:
        if not self.num_programs:
            return
        configuration, device = self.configuration, self.device
        for name, tensor in tensors.items():
            if name in configuration.aligned_names and tensor.data_ptr() % ALIGNMENT:
                raise ValueError(f"{name} must begin at a multiple of {ALIGNMENT} bytes.")
        if device < 0:
            configuration.run(self.num_programs, self._arguments(tensors))
        elif device == torch.cuda.current_device():
            values = self.values
            if tensors:
                values = values.copy()
                for name, tensor in tensors.items():
                    values[configuration.places[name]] = tensor.data_ptr()
            if not configuration.run_compiled(self.num_programs, device, values):
                configuration.compiled[device] = configuration.run(self.num_programs, self._arguments(tensors))
        else:  # triton launches on the current device, which need not be the tensors'
            with torch.cuda.device(device):
                self(**tensors)

    def _arguments(self, tensors: Mapping[str, Tensor]) -> list[Tensor | int | float]:
        arguments = list(self.arguments)
        for name, tensor in tensors.items():
            arguments[self.configuration.places[name]] = tensor
        return arguments


def run_together(launches: Sequence[Callable[[], None]]) -> None:
    """Runs launches of which none reads what another writes. In a CUDA graph that is being recorded each has a branch
    of its own: in a small batch none fills the GPU, and one after another would take as long as all of them."""
    records = torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
    if len(launches) < 2 or not records:
        for launch in launches:
            launch()
        return
    stream = torch.cuda.current_stream()
    begun = stream.record_event()
    first, *others = launches
    ends = []
    for launch, side in zip(others, _side_streams(len(others), stream.device_index), strict=True):
        side.wait_event(begun)
        with torch.cuda.stream(side):
            launch()
            ends.append(side.record_event())
    first()
    for end in ends:
        stream.wait_event(end)


@functools.cache
def _side_streams(count: int, device: int) -> list[torch.cuda.Stream]:
    return [torch.cuda.Stream(device) for _ in range(count)]


class Table(dict[str, Configuration]):
    """Configurations by name."""

    def launch(self, name: str, num_programs: int, *arguments: Tensor | int | float) -> None:
        """Runs the configuration `name` in a grid of num_programs. Raises as prepare() does."""
        self.prepare(name, num_programs, *arguments)()

    def prepare(self, name: str, num_programs: int, *arguments: Tensor | int | float) -> Launch:
        """A launch of the configuration `name` in a grid of num_programs; tensors must lie as the kernel reads them.
        KeyError for a name that is not in the table, TypeError for an argument of another type than the table says,
        ValueError for one that is not aligned as the kernel demands."""
        configuration = self[name]
        tensor, values = None, []
        for (parameter, expected, is_aligned), argument in zip(configuration.checks, arguments, strict=True):
            if isinstance(argument, Tensor):
                tensor, given, value = argument, argument.dtype, argument.data_ptr()
                if is_aligned and value % ALIGNMENT:
                    raise ValueError(f"{name}: {parameter} must begin at a multiple of {ALIGNMENT} bytes.")
            else:
                given, value = type(argument), argument
            if given is not expected:
                wanted, found = (POINTERS.get(one) or NUMBERS.get(one) for one in (expected, given))
                raise TypeError(f"{name}: {parameter} must be {wanted}, not {found}.")
            values.append(value)
        device = tensor.get_device() if tensor.is_cuda else -1
        return Launch(configuration, num_programs, arguments, values, device)
