"""What TPU chips can do, and what the model asks of them."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """JAX's name, what the compiler may use of memory (GiB, from its own error messages), and peak
    bf16 FLOP/s."""

    device_kind: str
    hbm_gib: float
    peak_flops: float
    topology_options: tuple = ()


CHIPS = {
    # v4 has two cores that show as one device; the compiler must be told.
    'v4': Chip(
        'TPU v4',
        30.75,
        275e12,
        (('chip_config_name', 'megacore'), ('chips_per_host_bounds', (2, 2, 1))),
    ),
    'v5e': Chip('TPU v5 lite', 15.75, 197e12),
    'v5p': Chip('TPU v5', 95.74, 459e12),
    'v6e': Chip('TPU v6 lite', 31.25, 918e12),
}
