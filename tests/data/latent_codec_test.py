"""The codec of the stories, as a run has it: shapes, lengths, its file and its fingerprint."""

import dataclasses
import hashlib

import numpy as np
import pytest

from mask2dit_jax import config as config_lib
from mask2dit_jax.data import latent_codec
from mask2dit_jax.models import dit
from mask2dit_jax.stories import codec as codec_lib

CONFIG = config_lib.Config(
    model=dit.DiTConfig(in_channels=24, out_channels=24),
    data=config_lib.DataConfig(codec_components=24),
)


def with_data(**changes):
    return dataclasses.replace(CONFIG, data=dataclasses.replace(CONFIG.data, **changes))


@pytest.mark.parametrize(
    'changes, frames, latent_frames',
    [
        ({}, (4, 8), (1, 2)),
        ({'codec_patch_frames': 2}, (4, 8), (2, 4)),
        ({'codec_patch_px': 8, 'height_px': 32, 'width_px': 32}, (4, 8), (1, 2)),
        ({'codec_first_frame': True}, (9, 5, 13, 1), (3, 2, 4, 1)),
        ({'codec_first_frame': True, 'codec_patch_frames': 2}, (9, 5), (5, 3)),
    ],
)
def test_shapes_follow_from_the_configuration(tmp_path, changes, frames, latent_frames):
    config = with_data(**changes)
    codec = latent_codec.StoriesCodec(config, tmp_path)
    told, (height, width, channels) = latent_codec.latent_shape(config, frames)
    assert codec.latent_frames(frames) == told == latent_frames
    assert codec.latent_shape == (height, width, channels)

    videos = np.zeros((2, sum(frames), *codec.size_px, 3), np.uint8)
    latents = codec.encode_video(videos, frames)
    assert latents.shape == (2, sum(told), height, width, channels)
    assert codec.decode_video(latents, told).shape == videos.shape


@pytest.mark.parametrize(
    'first_frame, frames, message',
    [
        (False, 6, 'a positive multiple of 4, e.g. 8'),
        (False, 1, 'a positive multiple of 4, e.g. 4'),
        (True, 8, 'one more than a multiple of 4, e.g. 9'),
        (True, 2, 'one more than a multiple of 4, e.g. 1'),
        (True, 0, 'one more than a multiple of 4, e.g. 1'),
    ],
)
def test_a_length_that_does_not_fit_is_told_the_nearest(tmp_path, first_frame, frames, message):
    codec = latent_codec.StoriesCodec(with_data(codec_first_frame=first_frame), tmp_path)
    with pytest.raises(ValueError, match=f'{frames} frames cannot be coded: use {message}'):
        codec.latent_frames((9 if first_frame else 8, frames))


@pytest.mark.parametrize('first_frame', [False, True])
def test_the_nearest_length_can_be_coded_and_none_is_nearer(tmp_path, first_frame):
    codec = latent_codec.StoriesCodec(with_data(codec_first_frame=first_frame), tmp_path)
    lengths = range(1, 25, 4) if first_frame else range(4, 25, 4)
    for asked in np.arange(0, 20, 0.5):
        nearest = codec.nearest_frames(asked)
        codec.scene_latents(nearest)
        assert abs(nearest - asked) == min(abs(length - asked) for length in lengths)


def test_codecs_of_earlier_versions_load_and_keep_their_fingerprint(tmp_path):
    """Stored latents are refused where the fingerprint is another one."""
    codec = codec_lib.default_codec(components=24)
    codec_lib.save_codec(tmp_path / 'codec.safetensors', codec)
    content = hashlib.sha256(b'(4, 4)')
    for array in (codec.mean, codec.basis, codec.scale):
        content.update(np.ascontiguousarray(array).tobytes())
    assert latent_codec.StoriesCodec(CONFIG, tmp_path).fingerprint == content.hexdigest()[:16]


def test_fingerprints_tell_codecs_of_first_frames_apart(tmp_path):
    codec = codec_lib.default_codec(components=24, first_frame=True)
    first = dataclasses.replace(codec.first, scale=codec.first.scale * 2)
    found = set()
    for number, other in enumerate(
        (codec, dataclasses.replace(codec, first=first), dataclasses.replace(codec, first=None))
    ):
        (tmp_path / str(number)).mkdir()
        codec_lib.save_codec(tmp_path / str(number) / 'codec.safetensors', other)
        found.add(latent_codec.StoriesCodec(CONFIG, tmp_path / str(number)).fingerprint)
    assert len(found) == 3
