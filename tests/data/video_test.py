"""Video files keep frames, sizes and colours; errors name the file."""

import os
import pathlib

import av
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mask2dit_jax.data import video


def _frames(count=6, height=24, width=32):
    """Smooth colours that move, so that no two frames are equal and chroma subsampling costs
    little."""
    y, x = np.mgrid[:height, :width]
    frames = [
        np.stack([x / width, y / height, np.full(x.shape, i / count)], -1) for i in range(count)
    ]
    return np.stack(frames).astype(np.float32)  # [F, H, W, 3]


@pytest.mark.parametrize('dtype', [np.float32, jnp.bfloat16])
def test_to_uint8_rounds_and_clips(dtype):
    pixels = np.array([-0.5, 126.6 / 255, 128.4 / 255, 1.5], dtype)
    np.testing.assert_array_equal(video.to_uint8(pixels), [0, 127, 128, 255])


def test_to_uint8_keeps_uint8_and_refuses_others():
    np.testing.assert_array_equal(video.to_uint8(np.array([0, 200], np.uint8)), [0, 200])
    with pytest.raises(ValueError, match='int64'):
        video.to_uint8(np.array([0, 200], np.int64))
    with pytest.raises(ValueError, match='NaN'):
        video.to_uint8(np.array([0.5, np.nan]))


@pytest.mark.parametrize('write, suffix', [(video.write_mp4, 'mp4'), (video.write_gif, 'gif')])
@pytest.mark.parametrize('scale', [1, 3])
def test_round_trip(tmp_path, write, suffix, scale):
    frames = _frames()
    path = tmp_path / 'new_folder' / f'clip.{suffix}'
    write(path, frames, 10, scale=scale)
    read, fps = video.read_video(path)
    assert read.dtype == np.uint8
    assert read.shape == (6, 24 * scale, 32 * scale, 3)
    assert fps == pytest.approx(10)
    wanted = video.to_uint8(frames).repeat(scale, 1).repeat(scale, 2).astype(float)
    assert np.abs(read - wanted).mean() < 4  # of 255: lossy


@pytest.mark.parametrize(
    'codec, options', [('libx264', {'crf': '16'}), ('mpeg4', {'qmin': '1', 'qmax': '4'})]
)
def test_both_mp4_codecs_keep_colours_and_rate(tmp_path, codec, options):
    if codec not in av.codecs_available:
        pytest.fail(f'PyAV is built without {codec}.')
    frames = video.to_uint8(_frames())
    video._encode(str(tmp_path / 'clip.mp4'), frames, 24000 / 1001, codec, options)
    read, fps = video.read_video(tmp_path / 'clip.mp4')
    assert fps == pytest.approx(24000 / 1001, rel=1e-6)
    assert np.abs(read.astype(float) - frames).mean() < 4


@pytest.mark.parametrize('height, width', [(1, 1), (16, 16), (15, 33), (17, 20)])
def test_odd_and_tiny_mp4_is_padded_to_even(tmp_path, height, width):
    frames = _frames(3, height, width)
    video.write_mp4(tmp_path / 'clip.mp4', frames, 8)
    read, _ = video.read_video(tmp_path / 'clip.mp4')
    assert read.shape == (3, height + height % 2, width + width % 2, 3)
    assert np.abs(read[:, :height, :width] - video.to_uint8(frames).astype(float)).mean() < 6


def test_mp4_is_yuv420p_h264(tmp_path):
    video.write_mp4(tmp_path / 'clip.mp4', _frames(), 8)
    with av.open(str(tmp_path / 'clip.mp4')) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ('h264', 'yuv420p')


def test_files_are_the_same_on_any_number_of_processors(tmp_path):
    """x264 takes its number of threads from that of processors, and other threads write other
    bytes."""
    frames = _frames(12, 128, 128)
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 2:
        pytest.skip('needs two processors')
    video.write_mp4(tmp_path / 'all.mp4', frames, 8, scale=2)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        video.write_mp4(tmp_path / 'one.mp4', frames, 8, scale=2)
    finally:
        os.sched_setaffinity(0, allowed)
    assert (tmp_path / 'all.mp4').read_bytes() == (tmp_path / 'one.mp4').read_bytes()


@pytest.mark.parametrize('name', ['2026-11-27T10:30', 'a b%d', 'gs:x', 'file:x', 'é'])
def test_any_name_of_a_folder_and_file(tmp_path, monkeypatch, name):
    """FFmpeg takes what stands before a colon for a protocol."""
    monkeypatch.chdir(tmp_path)
    for path in pathlib.Path(name) / f'{name}.mp4', pathlib.Path(f'{name}.mp4'):
        video.write_mp4(path, _frames(), 8)
        assert len(video.read_video(path)[0]) == len(video.probe(path).times) == 6
        video.write_gif(path.with_suffix('.gif'), _frames(), 8)
        assert len(video.read_video(path.with_suffix('.gif'))[0]) == 6


def test_gif_loops_forever_at_the_mean_rate(tmp_path):
    # 62.5 ms per frame is not a multiple of the gif's 10 ms.
    video.write_gif(tmp_path / 'clip.gif', _frames(16), 16)
    with Image.open(tmp_path / 'clip.gif') as image:
        assert image.info['loop'] == 0
        durations_ms = []
        for i in range(image.n_frames):
            image.seek(i)
            durations_ms.append(image.info['duration'])
    assert sum(durations_ms) == 1000
    assert set(durations_ms) == {60, 70}


@pytest.mark.parametrize('height_px, width_px', [(12, 16), (12, 12), (8, 30), (48, 64)])
def test_read_covers_the_size_and_crops_the_centre(tmp_path, height_px, width_px):
    frames = np.zeros((2, 24, 32, 3), np.uint8)
    frames[:, 10:14, 14:18] = 255  # a centred square stays centred
    video.write_mp4(tmp_path / 'clip.mp4', frames, 8)
    read, _ = video.read_video(tmp_path / 'clip.mp4', height_px=height_px, width_px=width_px)
    assert read.shape == (2, height_px, width_px, 3)
    light = read[0].mean(-1)
    y, x = np.mgrid[:height_px, :width_px] + 0.5
    assert (light * y).sum() / light.sum() == pytest.approx(height_px / 2, abs=0.25)
    assert (light * x).sum() / light.sum() == pytest.approx(width_px / 2, abs=0.25)
    zoom = max(height_px / 24, width_px / 32)
    assert light.sum() / 255 == pytest.approx(16 * zoom**2, rel=0.15)  # one zoom for both axes


def test_read_antialiases(tmp_path):
    board = np.indices((64, 64)).sum(0) % 2 * 255
    frames = np.repeat(board[None, :, :, None], 3, axis=-1).astype(np.uint8)  # [1, H, W, 3]
    video.write_gif(tmp_path / 'clip.gif', frames, 8)
    read, _ = video.read_video(tmp_path / 'clip.gif', height_px=16, width_px=16)
    assert np.abs(read.astype(float) - 127.5).max() < 30


def _write_audio(path):
    with av.open(str(path), 'w', format='wav') as container:
        stream = container.add_stream('pcm_s16le', rate=8000, layout='mono')
        frame = av.AudioFrame.from_ndarray(
            np.zeros((1, 800), np.int16), format='s16', layout='mono'
        )
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_read_errors_name_the_path(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'missing\.mp4'):
        video.read_video(tmp_path / 'missing.mp4')

    (tmp_path / 'text.mp4').write_text('this is no video')
    with pytest.raises(ValueError, match=r'text\.mp4 cannot be decoded'):
        video.read_video(tmp_path / 'text.mp4')

    _write_audio(tmp_path / 'sound.wav')
    with pytest.raises(ValueError, match=r'sound\.wav has no video stream'):
        video.read_video(tmp_path / 'sound.wav')


def test_a_cut_off_file_is_an_error(tmp_path):
    video.write_mp4(tmp_path / 'clip.mp4', _frames(), 8)
    content = (tmp_path / 'clip.mp4').read_bytes()

    (tmp_path / 'cut.mp4').write_bytes(content[:-20])
    with pytest.raises(ValueError, match=r'cut\.mp4 cannot be decoded'):
        video.read_video(tmp_path / 'cut.mp4')

    # The header comes first: without the pictures it is still whole.
    (tmp_path / 'empty.mp4').write_bytes(content[: content.index(b'mdat') + 4])
    with pytest.raises(ValueError, match=r'empty\.mp4 is cut off: it has 0 of the 6 frames'):
        video.read_video(tmp_path / 'empty.mp4')


def test_wrong_arguments(tmp_path):
    path = tmp_path / 'clip.mp4'
    with pytest.raises(ValueError, match='width_px=None'):
        video.read_video(path, height_px=8)
    with pytest.raises(ValueError, match='fps is 0'):
        video.write_mp4(path, _frames(), 0)
    with pytest.raises(ValueError, match='fps is 60'):
        video.write_gif(path, _frames(), 60)
    with pytest.raises(ValueError, match='scale is 0'):
        video.write_mp4(path, _frames(), 8, scale=0)
    with pytest.raises(ValueError, match=r'\(6, 24, 32\)'):
        video.write_mp4(path, _frames()[..., 0], 8)
    with pytest.raises(ValueError, match=r'\(0, 24, 32, 3\)'):
        video.write_gif(path, _frames()[:0], 8)
    assert not path.exists()


def test_png_round_trip(tmp_path):
    image = _frames()[0]
    video.write_png(tmp_path / 'sheets' / 'image.png', image)
    with Image.open(tmp_path / 'sheets' / 'image.png') as read:
        np.testing.assert_array_equal(np.asarray(read), video.to_uint8(image))
