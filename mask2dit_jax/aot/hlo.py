"""The work of a compiled TPU program, read from its text: FLOPs, collectives, estimated cycles.

Loops count in full. The compiler's own cost analysis counts the body of a loop once, however often
the loop runs it.
"""

import collections
import dataclasses
import math
import re
from typing import NamedTuple

_BYTES = {
    'pred': 1,
    's8': 1,
    'u8': 1,
    's16': 2,
    'u16': 2,
    'bf16': 2,
    'f16': 2,
    's32': 4,
    'u32': 4,
    'f32': 4,
    's64': 8,
    'u64': 8,
    'f64': 8,
}
_COLLECTIVES = ('all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all', 'collective-permute')
_INSTRUCTION = re.compile(r'^\s+(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$')


@dataclasses.dataclass(frozen=True)
class _Instruction:
    """One line of a computation; `rest` has the operands and the attributes."""

    name: str
    shape: str
    opcode: str
    rest: str

    def attribute(self, key: str) -> str | None:
        found = re.search(rf'\b{key}=%?([\w.\-]+)', self.rest)
        return found.group(1) if found else None


@dataclasses.dataclass
class Collective:
    """How often collectives of one kind run, and the bytes that enter or leave this device."""

    times: int = 0
    bytes: int = 0


class AllReduce(NamedTuple):
    """An all-reduce: its size, and the operation in the source that it belongs to."""

    bytes: int
    operation: str


@dataclasses.dataclass
class Program:
    """Totals per device and run.

    Attributes:
      flops: FLOPs of matrix products outside kernels.
      kernels: how often each kernel runs, by (name, shape of its first result).
      collectives: totals by kind of collective.
      loop_all_reduces: all-reduces inside loops, the largest first. Those that are fused with the
        slicing of their result are not among them: the TPU runs them as reduce-scatters.
      cycles: the compiler's estimates, 'dense' for instructions with matrix products and 'rest' for
        the others; it has no estimates for kernels and collectives.
    """

    flops: float = 0.0
    kernels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    collectives: dict[str, Collective] = dataclasses.field(default_factory=dict)
    loop_all_reduces: list[AllReduce] = dataclasses.field(default_factory=list)
    cycles: dict[str, float] = dataclasses.field(
        default_factory=lambda: {'dense': 0.0, 'rest': 0.0}
    )


def shape_dims(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Returns dtype and dimensions of every array in a shape's text."""
    arrays = []
    for dtype, dims in re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', shape):
        if dtype in _BYTES:
            arrays.append((dtype, tuple(int(d) for d in dims.split(',') if d)))
    return arrays


def shape_bytes(shape: str) -> int:
    """Returns the bytes of all arrays in a shape's text."""
    return sum(_BYTES[dtype] * math.prod(dims) for dtype, dims in shape_dims(shape))


def _first_dims(shape: str) -> tuple[int, ...]:
    """Dimensions of the first array in a shape's text."""
    return shape_dims(shape)[0][1]


def _operands(text: str) -> list[str]:
    """Names of the instructions that a text refers to."""
    return re.findall(r'%([\w.\-]+)', text)


def _parse(text: str):
    """Computations as lists of instructions, and the name of the entry."""
    computations = {}
    entry = None
    current = None
    for line in text.splitlines():
        header = re.match(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$', line)
        if header:
            is_entry, name = header.groups()
            current = computations[name] = []
            if is_entry:
                entry = name
            continue

        instruction = _INSTRUCTION.match(line)
        if instruction and current is not None:
            current.append(_Instruction(*instruction.groups()))

    if entry is None:
        raise ValueError(
            'The text holds no ENTRY computation: it is not the text of a compiled HLO module.'
        )
    return computations, entry


def _trip_count(condition: list[_Instruction]) -> int:
    """Iterations of a counted loop, the only kind that lax.scan makes."""
    constants = []
    for instruction in condition:
        if instruction.opcode == 'constant' and instruction.shape.startswith('s32[]'):
            value = re.match(r'(\d+)\)', instruction.rest)
            if value:
                constants.append(int(value.group(1)))

    if len(constants) != 1:
        names = [instruction.name for instruction in condition]
        raise ValueError(f'A loop without a plain trip count: {names}.')
    return constants[0]


def _matmul_flops(instruction: _Instruction, shapes: dict[str, str]) -> float:
    """2 x outputs x contracted size; on TPU matrix products are convolutions."""
    outputs = math.prod(_first_dims(instruction.shape))
    lhs, rhs = (_first_dims(shapes[name]) for name in _operands(instruction.rest)[:2])

    labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.rest)
    if labels is None:  # a dot
        axes = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.rest).group(1)
        return 2.0 * outputs * math.prod(lhs[int(axis)] for axis in axes.split(',') if axis)

    contracted = rhs[labels.group(2).index('i')]
    window = re.search(r'window=\{([^}]*)\}', instruction.rest)
    # A window is contracted, too, unless it has padding: then it stands for a batch axis.
    if window and 'pad' not in window.group(1):
        sizes = re.search(r'size=([\dx]+)', window.group(1)).group(1)
        contracted *= math.prod(int(size) for size in sizes.split('x'))
    return 2.0 * outputs * contracted


def analyze(text: str) -> Program:
    """Adds up the work of a compiled module.

    Args:
      text: the module's text, `compiled.as_text()`.

    Returns:
      Its totals.

    Raises:
      ValueError: if the text is not that of a compiled module, or has loops without a trip count.
    """
    computations, entry = _parse(text)
    shapes = {
        instruction.name: instruction.shape
        for body in computations.values()
        for instruction in body
    }
    program = Program()

    def visit(name, times, fused, in_loop) -> bool:
        """Adds a computation that runs `times` times; returns whether it has a matrix product."""
        has_product = False
        for instruction in computations[name]:
            kind = instruction.opcode.removesuffix('-start')
            if kind == 'while':
                trips = _trip_count(computations[instruction.attribute('condition')])
                visit(instruction.attribute('body'), times * trips, False, True)
                continue

            is_product = False
            called = instruction.attribute('calls')
            if called in computations:
                is_product = visit(called, times, True, in_loop)
            if kind in ('convolution', 'dot'):
                program.flops += times * _matmul_flops(instruction, shapes)
                is_product = True

            if kind in _COLLECTIVES:
                _count_collective(program, instruction, kind, name, times, in_loop, shapes)
            if kind == 'custom-call' and 'tpu_custom_call' in instruction.rest:
                kernel = re.sub(r'\.\d+$', '', instruction.name)
                program.kernels[kernel, _first_dims(instruction.shape)] += times

            # Instructions inside a fusion have no cycles of their own.
            cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.rest)
            if cycles and not fused:
                program.cycles['dense' if is_product else 'rest'] += times * int(cycles.group(1))
            has_product |= is_product
        return has_product

    visit(entry, 1, False, False)
    program.loop_all_reduces.sort(reverse=True)
    return program


def _count_collective(program, instruction, kind, computation, times, in_loop, shapes) -> None:
    """Adds a collective that runs `times` times."""
    # An all-reduce that is fused with the slicing of its result.
    if computation.startswith('all-reduce-scatter'):
        kind = 'reduce-scatter'

    if kind == 'all-gather':
        size = shape_bytes(instruction.shape)
    else:
        operands = _operands(instruction.rest.split('), ')[0])
        size = sum(shape_bytes(shapes.get(operand, '')) for operand in operands)

    total = program.collectives.setdefault(kind, Collective())
    total.times += times
    total.bytes += times * size

    if kind == 'all-reduce' and in_loop:
        operation = re.search(r'op_name="([^"]*)"', instruction.rest)
        name = operation.group(1) if operation else instruction.name
        program.loop_all_reduces.append(AllReduce(size, name))
