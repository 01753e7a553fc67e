"""The TPU chips that the package knows: what each can do, and what suits it.

This file imports nothing of the package, so that any layer can read the table.
"""

import dataclasses


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
