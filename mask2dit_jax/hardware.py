"""The TPU chips and slices that the package knows: what each can do, and what suits it.

This file imports nothing of the package, so that any layer can read the table.
"""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of TPU chip.

    Attributes:
      device_kind: JAX's name of the chip.
      hbm_gib: memory that the compiler may use, in GiB; the compiler's own error messages tell it.
      peak_flops: peak bf16 FLOP/s.
      splash_block: tokens per block (of queries and of keys) of the splash attention kernels.
      topology_options: what the compiler must be told when it compiles for absent chips.
    """

    device_kind: str
    hbm_gib: float
    peak_flops: float
    splash_block: int
    topology_options: tuple = ()


# Splash blocks: v5p and v6e have the largest block that compiles with the default VMEM, and v5e has
# one that compiles. The block of v4 has not been tried.
CHIPS = {
    'v4': Chip(
        'TPU v4',
        hbm_gib=30.75,
        peak_flops=275e12,
        splash_block=1024,
        # The chip has two cores that show as one device; the compiler must be told.
        topology_options=(
            ('chip_config_name', 'megacore'),
            ('chips_per_host_bounds', (2, 2, 1)),
        ),
    ),
    'v5e': Chip('TPU v5 lite', hbm_gib=15.75, peak_flops=197e12, splash_block=1024),
    'v5p': Chip('TPU v5', hbm_gib=95.74, peak_flops=459e12, splash_block=1280),
    'v6e': Chip('TPU v6 lite', hbm_gib=31.25, peak_flops=918e12, splash_block=1536),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """A TPU slice.

    Attributes:
      topology: generation of the chips and shape of their torus, as libtpu names them.
      context: size of the mesh axis context, i.e. chips that share the tokens of an example, where
        the number of heads allows. It is made of whole axes of the torus for 48 heads.
    """

    topology: str
    context: int

    @property
    def chips(self) -> int:
        shape = self.topology.split(':')[1]
        return math.prod(int(size) for size in shape.split('x'))


# By accelerator type. Its number counts chips for v5e and v6e, but cores, two per chip, for v4 and
# v5p.
SLICES = {
    'v4-8': Slice('v4:2x2x1', 2),
    'v4-128': Slice('v4:4x4x4', 4),
    'v4-256': Slice('v4:4x4x8', 8),
    'v4-512': Slice('v4:4x8x8', 8),
    'v5p-8': Slice('v5p:2x2x1', 2),
    'v5p-128': Slice('v5p:4x4x4', 4),
    'v5p-256': Slice('v5p:4x4x8', 8),
    'v5p-512': Slice('v5p:4x8x8', 8),
    'v5e-8': Slice('v5e:2x4', 4),
    'v5e-64': Slice('v5e:8x8', 8),
    'v5e-128': Slice('v5e:8x16', 8),
    'v5e-256': Slice('v5e:16x16', 16),
    'v6e-8': Slice('v6e:2x4', 4),
    'v6e-64': Slice('v6e:8x8', 8),
    'v6e-128': Slice('v6e:8x16', 8),
    'v6e-256': Slice('v6e:16x16', 16),
}
