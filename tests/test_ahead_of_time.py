"""Every Triton configuration that can be launched compiles for two generations of GPUs and spills no register, or a few
where it is held to fewer than the compiler would take.

What the compiler said is on record (ahead_of_time.json); what is not is compiled, and so are a few of the others, drawn
anew each time, for which it must say the same. It needs no GPU.
"""

import random

import pytest
from ahead_of_time import (
    SHARED_BYTES,
    TABLES,
    Resources,
    compiling,
    complaints,
    key,
    key_of,
    measure,
    read_records,
    runs_on,
)
from triton import language as tl

from fastrank.kernels.configuration import Configuration, Table, kernel

NUM_CHECKED = 12  # of those on record


@pytest.fixture(scope="module")
def compiled(request):
    """What the compiler says of the selected configurations: a function of operation, name and compute capability."""
    wanted = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    wanted = [(one["op"], one["name"], one["capability"]) for one in wanted if {"op", "name", "capability"} <= set(one)]
    records = read_records()
    on_record = {one: records[key_of(one)] for one in wanted if key_of(one) in records}
    checked = random.sample(list(on_record), min(NUM_CHECKED, len(on_record)))
    with compiling(one for one in wanted if one not in on_record or one in checked) as running:

        def find(*one: str | int) -> Resources:
            if one in running:
                assert on_record.setdefault(one, running[one].result()) == running[one].result(), "the record is wrong"
            return on_record[one]

        yield find


@pytest.mark.parametrize(
    ("op", "name", "capability"),
    [
        (op, name, capability)
        for op, table in TABLES.items()
        for name in table
        for capability in SHARED_BYTES
        if runs_on(table[name], capability)
    ],
)
def test_a_configuration_compiles_without_spills(op, name, capability, compiled):
    resources = compiled(op, name, capability)
    is_held = "maxnreg" in TABLES[op][name].options(divmod(capability, 10))
    assert complaints(resources, capability, is_held=is_held) == []
    if capability == 90 and op == "attention":
        constants = TABLES[op][name].constants
        # Matrix units of this generation take 64 rows at once, from 4 warps.
        rows = constants["BLOCK_KEYS" if name.startswith("dkdv") else "BLOCK_QUERIES"]
        assert resources.uses_wgmma == (rows >= 64 and "float32" not in name), name


@kernel
def greedy_kernel(values_ptr, count, SIZE: tl.constexpr):
    """Holds more numbers at once than a thread has registers."""
    values = tl.load(values_ptr + tl.arange(0, SIZE))
    total = tl.zeros((SIZE,), tl.float32)
    for step in range(count):
        total += tl.sin(values * step) * tl.load(values_ptr + step)
        values += total
    tl.store(values_ptr + tl.arange(0, SIZE), total + values)


def test_the_gate_sees_spills():
    def resources(size: int) -> Resources:
        return measure(Configuration(greedy_kernel, {"values_ptr": "*fp32", "count": "i32"}, {"SIZE": size}, 1), 90)

    assert complaints(resources(32), 90) == []
    assert "registers are spilled" in complaints(resources(2048), 90)[0]
    assert "registers are spilled" in complaints(resources(8192), 90, is_held=True)[0]


def test_the_gate_knows_how_much_shared_memory_there_is():
    resources = Resources(registers=32, stack_bytes=0, shared_bytes=200 * 1024)
    assert complaints(resources, 90) == []
    assert "204800 bytes of shared memory; there are 166912" in complaints(resources, 80)[0]


def test_the_cache_knows_kernels_and_configurations_apart():
    table = TABLES["listwise"]
    keys = [key(configuration, capability) for configuration in table.values() for capability in SHARED_BYTES]
    assert len(set(keys)) == len(keys)


def test_a_configuration_outside_the_table_cannot_be_launched():
    table = Table({"small": Configuration(greedy_kernel, {"values_ptr": "*fp32", "count": "i32"}, {"SIZE": 32})})
    with pytest.raises(KeyError, match="large"):
        table.launch("large", 1, 0, 0)
    with pytest.raises(TypeError, match=r"small: values_ptr must be \*fp32, not i32"):
        table.launch("small", 1, 0, 0)
    with pytest.raises(ValueError):
        table.launch("small", 1)
