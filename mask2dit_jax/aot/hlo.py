"""What a compiled TPU program does, read from its text: FLOPs, collectives and estimated cycles,
loops counted in full.

The compiler's own cost analysis counts the body of a loop once.
"""

import collections
import dataclasses
import math
import re

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
    name: str
    shape: str
    opcode: str
    rest: str  # operands and attributes

    def attribute(self, key: str) -> str | None:
        found = re.search(rf'\b{key}=%?([\w.\-]+)', self.rest)
        return found.group(1) if found else None


@dataclasses.dataclass
class Program:
    """Totals per device and run.

    Attributes:
      flops: of matrix products outside kernels.
      kernels: times each kernel runs, by (name, shape of its first result).
      collectives: kind to [times, bytes that enter or leave this device].
      loop_all_reduces: (bytes, name of the operation) of all-reduces in loops, not those fused with
        the slicing of their result, which the TPU runs as reduce-scatters.
      cycles: estimated by the compiler, 'dense' (with matrix products) and 'rest'; kernels and
        collectives have none.
    """

    flops: float = 0.0
    kernels: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    collectives: dict[str, list] = dataclasses.field(default_factory=dict)
    loop_all_reduces: list[tuple[int, str]] = dataclasses.field(default_factory=list)
    cycles: dict[str, float] = dataclasses.field(
        default_factory=lambda: {'dense': 0.0, 'rest': 0.0}
    )


def shape_dims(shape: str) -> list[tuple[str, tuple[int, ...]]]:
    """Every array in a shape's text: dtype and dimensions."""
    return [
        (dtype, tuple(int(d) for d in dims.split(',') if d))
        for dtype, dims in re.findall(r'\b([a-z]+\d*)\[([\d,]*)\]', shape)
        if dtype in _BYTES
    ]


def shape_bytes(shape: str) -> int:
    """Bytes of all arrays in a shape's text."""
    return sum(_BYTES[dtype] * math.prod(dims) for dtype, dims in shape_dims(shape))


def _parse(text: str):
    """Computations as lists of instructions, and the name of the entry."""
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        header = re.match(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$', line)
        if header:
            current = computations[header.group(2)] = []
            entry = header.group(2) if header.group(1) else entry
        elif (found := _INSTRUCTION.match(line)) and current is not None:
            current.append(_Instruction(*found.groups()))
    if entry is None:
        raise ValueError('The text holds no ENTRY computation: it is no compiled HLO module.')
    return computations, entry


def _trip_count(condition: list[_Instruction]) -> int:
    """Iterations of a counted loop, the only kind that lax.scan makes."""
    constants = [
        int(m.group(1))
        for i in condition
        if i.opcode == 'constant'
        and i.shape.startswith('s32[]')
        and (m := re.match(r'(\d+)\)', i.rest))
    ]
    if len(constants) != 1:
        raise ValueError(f'A loop without a plain trip count: {[i.name for i in condition]}.')
    return constants[0]


def _matmul_flops(instruction: _Instruction, shapes: dict[str, str]) -> float:
    """2 x outputs x contracted size; products are convolutions on TPU."""
    out = math.prod(shape_dims(instruction.shape)[0][1])
    lhs, rhs = (
        shape_dims(shapes[name])[0][1] for name in re.findall(r'%([\w.\-]+)', instruction.rest)[:2]
    )
    labels = re.search(r'dim_labels=(\w+)_(\w+)->(\w+)', instruction.rest)
    if labels is None:
        axes = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', instruction.rest).group(1)
        return 2.0 * out * math.prod(lhs[int(a)] for a in axes.split(',') if a)
    window = re.search(r'window=\{([^}]*)\}', instruction.rest)
    contracted = rhs[labels.group(2).index('i')]
    if window and 'pad' not in window.group(1):
        contracted *= math.prod(
            int(n) for n in re.search(r'size=([\dx]+)', window.group(1)).group(1).split('x')
        )
    return 2.0 * out * contracted


def analyze(text: str) -> Program:
    """Totals of a compiled module's text (`compiled.as_text()`).

    Raises:
      ValueError: for text or loops of another kind.
    """
    computations, entry = _parse(text)
    shapes = {i.name: i.shape for body in computations.values() for i in body}
    program = Program()

    def visit(name, times, fused, in_loop):
        has_product = False
        for i in computations[name]:
            kind = i.opcode.removesuffix('-start')
            if kind == 'while':
                trips = _trip_count(computations[i.attribute('condition')])
                visit(i.attribute('body'), times * trips, False, True)
                continue
            inner = False
            if i.attribute('calls') in computations:
                inner = visit(i.attribute('calls'), times, True, in_loop)
            if kind in ('convolution', 'dot'):
                program.flops += times * _matmul_flops(i, shapes)
                inner = True
            if kind in _COLLECTIVES:
                _count_collective(program, i, kind, name, times, in_loop, shapes)
            if kind == 'custom-call' and 'tpu_custom_call' in i.rest:
                program.kernels[re.sub(r'\.\d+$', '', i.name), shape_dims(i.shape)[0][1]] += times
            cycles = re.search(r'"estimated_cycles":"(\d+)"', i.rest)
            if cycles and not fused:
                program.cycles['dense' if inner else 'rest'] += times * int(cycles.group(1))
            has_product |= inner
        return has_product

    visit(entry, 1, False, False)
    program.loop_all_reduces.sort(reverse=True)
    return program


def _count_collective(program, i, kind, computation, times, in_loop, shapes):
    scattered = computation.startswith('all-reduce-scatter')
    kind = 'reduce-scatter' if scattered else kind
    operands = re.findall(r'%([\w.\-]+)', i.rest.split('), ')[0])
    size = (
        shape_bytes(i.shape)
        if kind == 'all-gather'
        else sum(shape_bytes(shapes.get(o, '')) for o in operands)
    )
    entry = program.collectives.setdefault(kind, [0, 0])
    entry[0] += times
    entry[1] += times * size
    if kind == 'all-reduce' and in_loop:
        where = re.search(r'op_name="([^"]*)"', i.rest)
        program.loop_all_reduces.append((size, where.group(1) if where else i.name))
