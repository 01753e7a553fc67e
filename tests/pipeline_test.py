"""Generation: guidance, noise per story, given scenes; wrong inputs are named."""

import functools

import jax
import numpy as np
import pytest

from mask2dit_jax import config as config_lib
from mask2dit_jax import pipeline
from mask2dit_jax.data import latent_codec
from mask2dit_jax.models import dit
from mask2dit_jax.pretrained import names

MODEL = dit.DiTConfig(
    num_layers=1,
    num_attention_heads=1,
    attention_head_dim=16,
    in_channels=8,
    out_channels=8,
    text_embed_dim=16,
    time_embed_dim=8,
    max_text_seq_length=6,
    patch_size=1,
    sample_height=4,
    sample_width=4,
    sample_frames=4,
    dtype='float32',
    attention_backend='dense',
)
CONFIG = config_lib.Config(
    model=MODEL,
    data=config_lib.DataConfig(codec_components=8),
    sample=config_lib.SampleConfig(steps=3),
)
FRAMES = 4, 8
STORIES = [
    ['red ring on gray moves left', 'it grows'],
    ['blue ball on white stays', 'it moves up'],
    ['red ball on gray blinks', 'it stays'],
]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """generate() of a random model."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: rng.normal(0, 0.5, p.shape).astype(np.float32), names.abstract_params(MODEL)
    )
    codec = latent_codec.StoriesCodec(CONFIG, tmp_path_factory.mktemp('run'))
    return functools.partial(pipeline.generate, CONFIG, params, codec, frames=FRAMES, seed=1)


def test_guidance_one_follows_the_caption_and_zero_ignores_it(run):
    by_caption = [[run(STORIES[i : i + 2], guidance=g) for i in (0, 1)] for g in (0.0, 1.0)]
    np.testing.assert_array_equal(*by_caption[0])
    assert np.abs(by_caption[1][0] - by_caption[1][1]).max() > 0.01


def test_guidance_per_scene(run):
    one, scenes = (run(STORIES[:2], steps=1, guidance=g) for g in (1.0, [1.0, 3.0]))
    np.testing.assert_array_equal(
        scenes[:, :4], one[:, :4]
    )  # a single step: nothing has reached scene 1 yet
    assert np.abs(one - scenes)[:, 4:].max() > 0.01


def test_noise_belongs_to_the_story_not_to_the_batch(run):
    whole, later = run(STORIES[:2]), run(STORIES[1:], first_index=1)
    np.testing.assert_allclose(later[0], whole[1], atol=1e-5)
    assert np.abs(run(STORIES[1:])[0] - later[0]).max() > 0.01
    assert np.abs(run(STORIES[:2], seed=2) - whole).max() > 0.01


def test_given_scenes_come_back_through_the_codec_and_change_the_others(run):
    rng = np.random.default_rng(0)
    clips = np.broadcast_to(rng.random((2, 1, 1, 1, 3), np.float32), (2, 4, 16, 16, 3))
    out, free = run(STORIES[:2], given_videos=clips), run(STORIES[:2])
    codec = run.args[2]
    np.testing.assert_allclose(
        out[:, :4], codec.decode_video(codec.encode_video(clips, (4,)), (1,)), atol=1e-5
    )
    assert np.abs(out[:, 4:] - free[:, 4:]).max() > 0.01


def test_errors_name_the_input(run):
    with pytest.raises(ValueError, match='one caption for each of its 2 scenes'):
        run([['it grows']])
    with pytest.raises(ValueError, match=r'one per scene \(2\), got'):
        run(STORIES[:2], guidance=[1, 2, 3])
    for frames in (6, 12):
        with pytest.raises(ValueError, match=f'Given clips have {frames} frames in all'):
            run(STORIES[:2], given_videos=np.zeros((2, frames, 16, 16, 3), np.float32))
