"""The TPU's compiler takes the very training step and sampling loop, here for a small model on a
slice of four chips."""

import dataclasses

import pytest

from mask2dit_jax import config as config_lib
from mask2dit_jax.aot import compiler, kernel_schedules
from mask2dit_jax.aot import report as report_lib
from mask2dit_jax.aot import topology as topology_lib
from mask2dit_jax.attention import splash
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.models import dit

pytest.importorskip('libtpu')

# So many layers that their saved activations outweigh the differences between versions of the
# compiler.
MODEL = dit.DiTConfig(
    num_layers=12,
    num_attention_heads=8,
    text_embed_dim=64,
    time_embed_dim=64,
    max_text_seq_length=32,
    sample_height=16,
    sample_width=16,
    sample_frames=5,
    attention_backend='splash',
    remat='save_attention',
)
CONFIG = config_lib.Config(
    model=MODEL,
    data=config_lib.DataConfig(codec='vae', layouts=((5, 5, 5),), height_px=128, width_px=128),
    train=config_lib.TrainConfig(batch_size=2),
    sample=config_lib.SampleConfig(steps=4),
    mesh=mesh_lib.MeshConfig(fsdp=2, context=2),
)
FRAMES = CONFIG.data.layouts[0]


def report(what, **model):
    """The report for a model that differs from MODEL in some settings."""
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, **model))
    return compiler.compile_report(config, what, 'v5p:2x2x1', 1, FRAMES, 'quick')


@pytest.fixture(scope='module')
def train():
    return report('train')


def test_train_step(train):
    assert train['fits']
    assert train['gib']['total'] < 0.5
    assert train['collectives']['all-to-all']['times'] > 0
    assert train['collectives']['reduce-scatter']['times'] > 0

    # No gradient of a layer is reduced in full size: the smallest kernel of a layer has 512 x 512
    # values, in bfloat16.
    assert all(reduced['mb'] < 0.5 for reduced in train['largest_loop_all_reduces'])

    # The EMA and Adam's two moments are as large as the parameters.
    arguments = train['arguments_gib']
    state = arguments['parameters'] + arguments['EMA'] + arguments['optimizer']
    assert arguments['parameters'] == pytest.approx(state / 4, rel=1e-3)


def test_a_report_as_markdown_says_that_it_fits(train):
    text = report_lib.to_markdown(train)
    assert '## train on v5p:2x2x1' in text
    assert f'Fits: {train["gib"]["total"]:.2f} of 95.74 GiB.' in text
    assert 'quick schedules' in text


def test_saved_attention_is_not_computed_again(train):
    again = report('train', remat='full')

    # Two of seven products are the forward pass's, which now runs twice.
    saved_flops = train['flops_per_chip']['attention kernels']
    again_flops = again['flops_per_chip']['attention kernels']
    assert again_flops == pytest.approx(saved_flops * 9 / 7, rel=1e-6)
    assert again['gib']['temporaries'] < train['gib']['temporaries']


def test_work_of_kernels_by_hand():
    """12 blocks of 256 queries and two heads. The forward pass is in two parts, each of which runs
    three times; the backward pass runs once."""
    kernels = {
        ('splash_mha_fwd', (2, 1024, 64)): 3,
        ('splash_mha_fwd', (2, 2048, 64)): 3,
        ('splash_mha_dkv', (3, 2, 3072, 64)): 1,
    }
    bundles = {'forward': (100, 200), 'backward': (300, 500)}
    visited = splash.VisitedBlocks(256, 10.0, 1.5)
    blocks = {1024: visited, 2048: visited, 3072: visited}
    flops, cycles = report_lib.kernel_work(kernels, blocks, bundles)

    pairs = 12 * 11.5 * 256**2
    assert flops == 2 * pairs * 2 * 64 * (3 * 2 + 5)
    assert cycles == 2 * 12 * (3 * (10 * 100 + 1.5 * 200) + (10 * 300 + 1.5 * 500))


def test_offloaded_layers_are_in_host_memory():
    offloaded = report('train', remat='offload_layer')
    assert offloaded['gib']['host'] > 0


def test_sampling_loop():
    sample = report('sample')
    assert sample['fits']
    assert 'reduce-scatter' not in sample['collectives']


def test_extension_with_a_cache():
    """It computes the tokens of one scene of three, and those of the other two once."""
    extended, sampled = report('extend', pattern='causal'), report('sample', pattern='causal')
    assert extended['tokens'] == sampled['tokens'] / 3
    ours, whole = (each['flops_per_chip'] for each in (extended, sampled))
    steps = CONFIG.sample.steps
    dense = [each['executed'] - each['attention kernels'] for each in (ours, whole)]
    assert dense[0] / dense[1] == pytest.approx((2 + steps) / (3 * steps), rel=0.02)

    # Here the 480 keys fill a block of 512, whatever the queries are; two scenes fill one of 384.
    expected = whole['attention kernels'] * (1 + 0.75**2 / steps)
    assert ours['attention kernels'] == pytest.approx(expected, rel=1e-6)


def test_what_cannot_be_extended_with_a_cache():
    with pytest.raises(ValueError, match=r"extend: .* not under 'dual'"):
        report('extend')
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, pattern='causal'))
    with pytest.raises(ValueError, match='needs at least two scenes'):
        compiler.compile_report(config, 'extend', 'v5p:2x2x1', 1, (5,), 'quick')


# Bundles of a wholly visible block of 1024, forward and backward: those of a prototype whose
# schedules were read by hand. A change of libtpu, or of how the kernel is called, may lose 3 %.
@pytest.mark.parametrize(
    'topology, forward, backward',
    [('v6e:2x2', 2769, 5466), pytest.param('v5p:2x2x1', 4742, 9300, marks=pytest.mark.slow)],
)
def test_splash_kernels_at_production_block_size(topology, forward, backward):
    bundles = kernel_schedules.kernel_bundles(topology, 64, 'tokamax')
    assert bundles['forward'].visible <= 1.03 * forward
    assert bundles['backward'].visible <= 1.03 * backward
    assert all(each.visible < each.masked for each in bundles.values())


def test_what_does_not_fit_is_said():
    result = report('train', num_layers=30_000, attention_backend='blockwise')
    assert not result['fits']
    assert 'DOES NOT FIT' in report_lib.to_markdown(result)


def test_wrong_topologies_are_named():
    message = "'v9:2x2' is not a topology: write one of v4, v5e, v5p, v6e"
    with pytest.raises(ValueError, match=message):
        topology_lib.topology_devices('v9:2x2')
    with pytest.raises(ValueError, match="libtpu does not know the topology 'v5p:17x3'"):
        topology_lib.topology_devices('v5p:17x3')
