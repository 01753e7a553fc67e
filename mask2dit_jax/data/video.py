"""Video files: probe, read, scale and crop; write mp4, gif and png."""

import contextlib
import dataclasses
import errno
import fractions
import os
import pathlib
from collections.abc import Sequence

import av
import numpy as np
from absl import logging
from PIL import Image, ImageOps

from mask2dit_jax import paths, storage

# Errors of this process, which say nothing about the file that it tried to open.
EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def to_uint8(frames) -> np.ndarray:
    """Converts float pixels in [0, 1] to uint8 by rounding, clipped; uint8 passes unchanged.

    Raises:
      ValueError: for integers other than uint8, and for NaN.
    """
    frames = np.asarray(frames)
    if frames.dtype == np.uint8:
        return frames
    if frames.dtype.kind in 'biu':
        raise ValueError(f'Pixels have dtype {frames.dtype}: pass uint8, or floats in [0, 1].')

    frames = frames.astype(np.float32)  # also from bfloat16
    if np.isnan(frames).any():
        raise ValueError(
            'Pixels contain NaN: check the model output before it is written as a picture.'
        )
    return np.round(np.clip(frames, 0, 1) * 255).astype(np.uint8)


def checked_frames(frames) -> np.ndarray:
    """Frames of a video as uint8 [F, H, W, 3].

    Raises:
      ValueError: for a wrong shape or dtype, and for NaN.
    """
    frames = to_uint8(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(
            f'A video has shape {frames.shape}: pass [F, H, W, 3] with at least one frame.'
        )
    return frames


def upscale(frames: np.ndarray, scale: int) -> np.ndarray:
    """Enlarges [F, H, W, 3] by an integer factor, nearest neighbour: pixels stay sharp squares.

    Raises:
      ValueError: for a factor below 1.
    """
    if scale < 1:
        raise ValueError(f'scale is {scale}: pass an integer of at least 1.')
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)


def scale_and_crop(image: Image.Image, height_px: int, width_px: int) -> np.ndarray:
    """Scales an image until it just covers a size, then crops the centre.

    Returns:
      uint8 [H, W, 3]. PIL's bilinear filter antialiases.
    """
    return np.asarray(ImageOps.fit(image, (width_px, height_px), Image.Resampling.BILINEAR))


@dataclasses.dataclass(frozen=True)
class Info:
    """What a video file really holds, whatever a manifest says about it.

    Attributes:
      times: presentation times of the frames in seconds, ascending.
      fps: frames per second, on average.
      height_px, width_px: size as shown, after the rotation.
      rotation_deg: rotation that the file asks for, counter-clockwise.
      variable_rate: whether frames last for different times.
    """

    times: np.ndarray
    fps: float
    height_px: int
    width_px: int
    rotation_deg: int
    variable_rate: bool

    @property
    def timeline(self) -> np.ndarray:
        """The frame shown at each tick of a constant rate, int [frames].

        It is 0, 1, 2, ... unless the rate is variable.
        """
        num_frames = len(self.times)
        if not self.variable_rate:
            return np.arange(num_frames)
        ticks = self.times[0] + np.arange(num_frames) / self.fps
        shown = np.searchsorted(self.times, ticks + 1e-6, 'right') - 1
        return np.maximum(shown, 0)


def _url(path) -> str:
    """The name by which FFmpeg opens a file; without `file:` it takes what stands before a colon
    for a protocol."""
    return f'file:{os.fspath(path)}'


@contextlib.contextmanager
def _opened(path):
    """Container and stream of a video; damage that FFmpeg would conceal is an error.

    Raises:
      FileNotFoundError, ValueError: as read_video.
      OSError: with an errno of EXHAUSTED.
    """
    paths.check_local(video=path)
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f'{path} is not a file: check the path of the video.')

    try:
        with av.open(_url(path)) as container:
            if not container.streams.video:
                raise ValueError(
                    f'{path} has no video stream: pass a video file such as mp4 or gif.'
                )
            stream = container.streams.video[0]
            # Without this option H.264 replaces what it cannot read by copies of its neighbours.
            stream.codec_context.options = {'err_detect': 'explode'}
            # With threads the decoder drops the error.
            stream.thread_type = 'NONE'
            stream.codec_context.thread_count = 1
            yield container, stream
    except av.FFmpegError as error:
        if error.errno in EXHAUSTED:
            raise
        raise ValueError(
            f'{path} cannot be decoded ({error.strerror}): replace or re-encode the file.'
        ) from error


def _nominal_fps(stream) -> float:
    """Frames per second that the file states or FFmpeg guesses, or 0."""
    return float(stream.average_rate or stream.guessed_rate or 0)


def _check_complete(path, num_frames: int, stream) -> None:
    """Raises ValueError if the file holds fewer frames than its index lists."""
    if num_frames < stream.frames:
        raise ValueError(
            f'{path} is cut off: it has {num_frames} of the {stream.frames} frames that its index '
            'lists; replace or re-encode the file.'
        )


def probe(path) -> Info:
    """Reads a file's index and its first frame, without decoding the rest.

    Raises:
      FileNotFoundError, ValueError: as read_video.
    """
    with _opened(path) as (container, stream):
        # Presentation times of the packets that hold a picture to show, in ticks.
        ticks = [p.pts for p in container.demux(stream) if p.size and not p.is_discard]
        rate = _nominal_fps(stream)
        if not ticks or not rate:
            raise ValueError(
                f'{path} has {len(ticks)} frames at {rate:g} fps: replace or re-encode the file.'
            )
        _check_complete(path, len(ticks), stream)
        if None in ticks:
            times = np.arange(len(ticks)) / rate
        else:
            times = np.sort(np.array(ticks, np.float64)) * float(stream.time_base)

    # Demuxing has used the file up: it is opened anew for the first frame.
    with _opened(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise ValueError(
                f'{path} has no frame that can be decoded: replace or re-encode the file.'
            )
        height, width = frame.height, frame.width
        rotation = int(frame.rotation)
        tick = float(stream.time_base or 0)
    if rotation % 180:
        height, width = width, height

    uneven = _is_uneven(times, tick)
    fps = rate
    if uneven and times[-1] > times[0]:
        fps = float((len(times) - 1) / (times[-1] - times[0]))
    return Info(times, fps, height, width, rotation, uneven)


def _is_uneven(times: np.ndarray, tick: float) -> bool:
    """Whether frames last for different times; `tick` is the unit of the file's times, in s."""
    steps = np.diff(times)
    if len(steps) < 2:
        return False
    # A rate that is not a whole number of ticks makes steps differ by one tick.
    tolerance = max(2.5 * tick, 0.1 * np.median(steps))
    return bool(np.ptp(steps) > tolerance)


def _upright(path, frame, height_px: int | None, width_px: int | None) -> np.ndarray:
    """Pixels of a decoded frame, uint8 [H, W, 3], as it is to be shown.

    Raises:
      ValueError: if the decoder had to guess some of them.
    """
    if frame.is_corrupt:
        at = '' if frame.time is None else f' at {frame.time:.2f} s'
        raise ValueError(f'{path} is damaged{at}: replace or re-encode the file.')
    image = frame.to_image()
    if frame.rotation:
        image = image.rotate(frame.rotation, expand=True)
    if height_px is None:
        return np.asarray(image)
    return scale_and_crop(image, height_px, width_px)


def read_frames(
    path, info: Info, indices: Sequence[int], *, height_px: int, width_px: int
) -> np.ndarray:
    """Reads some frames of a video, decoding from the last key frame before the first of them.

    Args:
      path: the file.
      info: what probe said about the file.
      indices: ascending positions in info.timeline.
      height_px, width_px: as in read_video.

    Returns:
      uint8 [len(indices), H, W, 3].

    Raises:
      FileNotFoundError, ValueError: as read_video, and for a frame that is damaged or missing.
    """
    wanted = info.timeline[np.asarray(indices)].tolist()
    missing = set(wanted)
    found = {}
    with _opened(path) as (container, stream):
        tick = float(stream.time_base)
        if wanted[0]:
            container.seek(round(info.times[wanted[0]] / tick), stream=stream)

        for count, frame in enumerate(container.decode(stream)):
            # After a seek only the time of a frame tells its position.
            index = count
            if frame.pts is not None:
                index = int(np.searchsorted(info.times, frame.pts * tick - 1e-6))
            if index in missing:
                found[index] = _upright(path, frame, height_px, width_px)
                missing.remove(index)
            if index >= wanted[-1]:
                break

    if missing:
        raise ValueError(
            f'{path}: frame {min(missing)} of {len(info.times)} is missing: replace or re-encode '
            'the file.'
        )
    return np.stack([found[index] for index in wanted])


def read_video(
    path, *, height_px: int | None = None, width_px: int | None = None
) -> tuple[np.ndarray, float]:
    """Decodes all frames of a video file: mp4, gif and whatever else FFmpeg reads.

    Frames are turned as the file asks.

    Args:
      path: the file.
      height_px, width_px: size wanted, both or neither. A frame is scaled (antialiased bilinear,
        down or up) until it just covers this size, then the centre is cropped.

    Returns:
      uint8 frames [F, H, W, 3] and the frames per second.

    Raises:
      FileNotFoundError: if the file does not exist.
      ValueError: if FFmpeg cannot decode the file, or it has no video stream, no frame or no frame
        rate.
    """
    if (height_px is None) != (width_px is None):
        raise ValueError(f'height_px={height_px} and width_px={width_px}: give both or neither.')

    with _opened(path) as (container, stream):
        frames = [_upright(path, frame, height_px, width_px) for frame in container.decode(stream)]
        _check_complete(path, len(frames), stream)
        fps = _nominal_fps(stream)
    if not frames or not fps:
        raise ValueError(
            f'{path} has {len(frames)} frames at {fps} fps: replace or re-encode the file.'
        )
    return np.stack(frames), fps


@contextlib.contextmanager
def _new_file(path):
    """Yields a name to write to, which becomes `path` when it is whole; its folder is made if
    needed."""
    paths.check_local(file=path)
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    with storage.whole_file(path) as temporary:
        yield temporary


def _encode(path, frames: np.ndarray, fps: float, codec: str, options: dict[str, str]) -> None:
    """Encodes frames uint8 [F, H, W, 3] as yuv420p, to the same bytes every time."""
    # The halved chroma of yuv420p needs even sizes: the last row and column are repeated.
    height, width = frames.shape[1:3]
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode='edge')

    rate = fractions.Fraction(fps).limit_denominator(1001)
    # By default the encoder takes as many threads as the process may use processors, and what it
    # writes depends on their number.
    options = {'threads': '1'} | options
    with av.open(_url(path), 'w', format='mp4', options={'movflags': '+faststart'}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = 'yuv420p'
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format='rgb24')
            container.mux(stream.encode(frame))
        container.mux(stream.encode())  # what the encoder still holds back


def write_mp4(path, frames, fps: float, scale: int = 1) -> None:
    """Writes an mp4 with H.264, or with MPEG-4 part 2 when this PyAV is built without libx264.

    The log says so in the second case.

    Args:
      path: the file to write; its folder is made if needed.
      frames: [F, H, W, 3], uint8 or float in [0, 1]. An odd height or width is padded to the next
        even one.
      fps: frames per second.
      scale: integer nearest-neighbour upscale, so that small videos are watchable.

    Raises:
      ValueError: for a wrong shape, dtype, fps or scale.
    """
    if fps <= 0:
        raise ValueError(f'fps is {fps}: pass a positive number of frames per second.')
    frames = upscale(checked_frames(frames), scale)
    codec = 'libx264'
    options = {'crf': '16'}
    if codec not in av.codecs_available:
        logging.warning('This PyAV has no libx264: %s is written with the mpeg4 codec.', path)
        codec = 'mpeg4'
        options = {'qmin': '1', 'qmax': '4'}
    with _new_file(path) as temporary:
        _encode(temporary, frames, fps, codec, options)


def write_gif(path, frames, fps: float, scale: int = 1) -> None:
    """Writes a gif that loops forever.

    Equal frames in a row are stored as one frame that is shown for longer.

    Args:
      path: the file to write; its folder is made if needed.
      frames: [F, H, W, 3], uint8 or float in [0, 1].
      fps: frames per second, at most 50, because browsers slow down faster gifs.
      scale: integer nearest-neighbour upscale.

    Raises:
      ValueError: for a wrong shape, dtype, fps or scale.
    """
    if not 0 < fps <= 50:
        raise ValueError(f'fps is {fps}: a gif needs more than 0 and at most 50.')
    images = [Image.fromarray(frame) for frame in upscale(checked_frames(frames), scale)]

    # Gif counts in hundredths of a second. Rounding the end times, not the durations, keeps the
    # mean rate.
    ends = np.round(np.arange(len(images) + 1) * 100 / fps)
    durations_ms = 10 * np.diff(ends).astype(int)
    with _new_file(path) as temporary:
        images[0].save(
            temporary,
            format='GIF',
            save_all=True,
            append_images=images[1:],
            loop=0,
            duration=durations_ms.tolist(),
        )


def write_png(path, image) -> None:
    """Writes an image as png.

    Args:
      path: the file to write; its folder is made if needed.
      image: [H, W, 3], uint8 or float in [0, 1].
    """
    with _new_file(path) as temporary:
        Image.fromarray(to_uint8(image)).save(temporary, format='PNG')
