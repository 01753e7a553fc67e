"""Video files and pictures of videos: probe, read, resize, crop, write mp4 / gif / png, contact
sheets of scenes."""

import contextlib
import dataclasses
import fractions
import os
import pathlib
import textwrap
from collections.abc import Sequence

import av
import numpy as np
from absl import logging
from PIL import Image, ImageDraw, ImageFont, ImageOps

_MARGIN_PX = 20  # around a sheet and between its rows
_SCENE_GAP_PX = 24  # between scenes in one row
_FRAME_GAP_PX = 3  # between frames of one scene
_MIN_SCENE_PX = 240  # a caption stays readable over a scene of one small frame
_FONT_PX = 15
_LINE_PX = 20
_MAX_CAPTION_LINES = 6
_INK = {False: (40, 40, 40), True: (20, 90, 170)}  # caption colour by given or not


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


def _checked_frames(frames) -> np.ndarray:
    frames = to_uint8(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(
            f'A video has shape {frames.shape}: pass [F, H, W, 3] with at least one frame.'
        )
    return frames


def _upscale(frames: np.ndarray, scale: int) -> np.ndarray:
    """Nearest neighbour by an integer factor: pixels stay sharp squares."""
    if scale < 1:
        raise ValueError(f'scale is {scale}: pass an integer of at least 1.')
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)


def _fit(image: Image.Image, size: tuple[int, int] | None) -> np.ndarray:
    """Scales so that `size` (width, height) is covered, then crops the centre; PIL's bilinear
    filter antialiases."""
    return np.asarray(
        image if size is None else ImageOps.fit(image, size, Image.Resampling.BILINEAR)
    )


@dataclasses.dataclass(frozen=True)
class Info:
    """What a video file really holds, whatever a manifest says of it.

    Attributes:
      times: presentation times of its frames in seconds, ascending.
      fps: frames per second, on average.
      height_px, width_px: as shown, that is after the rotation.
      rotation_deg: counter-clockwise, as the file asks for it.
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
        """The frame shown at each tick of a constant rate, int [frames]; 0, 1, 2, ... unless the
        rate is variable."""
        if not self.variable_rate:
            return np.arange(len(self.times))
        ticks = self.times[0] + np.arange(len(self.times)) / self.fps
        return np.maximum(np.searchsorted(self.times, ticks + 1e-6, 'right') - 1, 0)


@contextlib.contextmanager
def _opened(path):
    """Container and stream of a video; what FFmpeg would paper over is an error.

    Raises:
      FileNotFoundError, ValueError: as read_video.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f'{path} is not a file: check the path of the video.')
    try:
        with av.open(os.fspath(path)) as container:
            if not container.streams.video:
                raise ValueError(
                    f'{path} has no video stream: pass a video file such as mp4 or gif.'
                )
            stream = container.streams.video[0]
            # Without this, H.264 conceals what it cannot read by copying from its neighbours;
            # threads drop the error.
            stream.codec_context.options = {'err_detect': 'explode'}
            stream.thread_type, stream.codec_context.thread_count = 'NONE', 1
            yield container, stream
    except av.FFmpegError as error:
        raise ValueError(
            f'{path} cannot be decoded ({error.strerror}): replace or re-encode the file.'
        ) from error


def _packets(container, stream):
    """Packets that hold a picture to show."""
    return (p for p in container.demux(stream) if p.size and not p.is_discard)


def probe(path) -> Info:
    """Reads a file's index and its first frame, without decoding the rest.

    Raises:
      FileNotFoundError, ValueError: as read_video.
    """
    with _opened(path) as (container, stream):
        packets = [(p.pts, p.dts) for p in _packets(container, stream)]
        stamps = [pts for pts, _ in packets]
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        if not packets or not rate:
            raise ValueError(
                f'{path} has {len(packets)} frames at {rate:g} fps: replace or re-encode the file.'
            )
        if len(packets) < stream.frames:
            raise ValueError(
                f'{path} is cut off: it has {len(packets)} of the {stream.frames} frames that its index '
                'lists; replace or re-encode the file.'
            )
        times = (
            np.arange(len(stamps)) / rate
            if None in stamps
            else np.sort(np.array(stamps, np.float64)) * float(stream.time_base)
        )
    with _opened(path) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise ValueError(
                f'{path} has no frame that can be decoded: replace or re-encode the file.'
            )
        height, width = (
            (frame.width, frame.height) if frame.rotation % 180 else (frame.height, frame.width)
        )
        steps = np.diff(times)
        # Rates that are no whole number of ticks make steps differ by one tick.
        uneven = len(steps) > 1 and np.ptp(steps) > max(
            2.5 * float(stream.time_base or 0), 0.1 * np.median(steps)
        )
        fps = (
            (len(times) - 1) / (times[-1] - times[0])
            if len(times) > 1 and times[-1] > times[0]
            else rate
        )
        return Info(
            times, float(fps) if uneven else rate, height, width, int(frame.rotation), bool(uneven)
        )


def _upright(path, frame, size: tuple[int, int] | None) -> np.ndarray:
    """Pixels of a decoded frame as it is to be shown.

    Raises:
      ValueError: if the decoder had to guess at some of it.
    """
    if frame.is_corrupt:
        at = '' if frame.time is None else f' at {frame.time:.2f} s'
        raise ValueError(f'{path} is damaged{at}: replace or re-encode the file.')
    image = frame.to_image()
    if frame.rotation:
        image = image.rotate(frame.rotation, expand=True)
    return _fit(image, size)


def read_frames(path, info: Info, indices, *, height_px: int, width_px: int) -> np.ndarray:
    """Some frames of a video, decoding from the last key frame before the first of them.

    Args:
      path: the file.
      info: of probe.
      indices: ascending positions in info.timeline.
      height_px, width_px: as in read_video.

    Returns:
      uint8 [len(indices), H, W, 3].

    Raises:
      FileNotFoundError, ValueError: as read_video, and for a frame that is damaged or missing.
    """
    wanted = info.timeline[np.asarray(indices)]
    found = {}
    with _opened(path) as (container, stream):
        base = float(stream.time_base)
        if wanted[0]:
            container.seek(round(info.times[wanted[0]] / base), stream=stream)
        for count, frame in enumerate(container.decode(stream)):
            index = (
                count
                if frame.pts is None
                else int(np.searchsorted(info.times, frame.pts * base - 1e-6))
            )
            if index in wanted and index not in found:
                found[index] = _upright(path, frame, (width_px, height_px))
            if index >= wanted[-1]:
                break
    missing = sorted(set(wanted.tolist()) - set(found))
    if missing:
        raise ValueError(
            f'{path}: frame {missing[0]} of {len(info.times)} is missing: replace or re-encode the file.'
        )
    return np.stack([found[i] for i in wanted.tolist()])


def read_video(
    path, *, height_px: int | None = None, width_px: int | None = None
) -> tuple[np.ndarray, float]:
    """Decodes all frames of a video file (mp4, gif and whatever else FFmpeg reads), turned as the
    file asks.

    Args:
      path: the file.
      height_px, width_px: size wanted, both or neither. A frame is scaled (antialiased bilinear,
        down or up) until it just covers this size, then the centre is cropped.

    Returns:
      uint8 frames [F, H, W, 3] and the frames per second.

    Raises:
      FileNotFoundError: without the file.
      ValueError: without a video stream or frame, for a file that FFmpeg cannot decode or without a
        frame rate.
    """
    if (height_px is None) != (width_px is None):
        raise ValueError(f'height_px={height_px} and width_px={width_px}: give both or neither.')
    with _opened(path) as (container, stream):
        size = None if height_px is None else (width_px, height_px)
        frames = [_upright(path, frame, size) for frame in container.decode(stream)]
        if len(frames) < stream.frames:
            raise ValueError(
                f'{path} is cut off: it has {len(frames)} of the {stream.frames} frames that its index '
                'lists; replace or re-encode the file.'
            )
        fps = float(stream.average_rate or stream.guessed_rate or 0)
    if not frames or not fps:
        raise ValueError(
            f'{path} has {len(frames)} frames at {fps} fps: replace or re-encode the file.'
        )
    return np.stack(frames), fps  # uint8 [F, H, W, 3]


def _new_file(path) -> str:
    pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
    return os.fspath(path)


def _encode(path: str, frames: np.ndarray, fps: float, codec: str, options: dict[str, str]) -> None:
    """Encodes as yuv420p, whose halved chroma needs even sizes: an odd one is padded by repeating
    the last pixel."""
    frames = np.pad(
        frames, ((0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)), mode='edge'
    )
    with av.open(path, 'w', format='mp4', options={'movflags': '+faststart'}) as container:
        stream = container.add_stream(
            codec, rate=fractions.Fraction(fps).limit_denominator(1001), options=options
        )
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], 'yuv420p'
        for frame in frames:
            container.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format='rgb24')
                )
            )
        container.mux(stream.encode())


def write_mp4(path, frames, fps: float, scale: int = 1) -> None:
    """Writes an mp4: H.264, or MPEG-4 part 2 (said in the log) when this PyAV is built without
    libx264.

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
    frames = _upscale(_checked_frames(frames), scale)
    if 'libx264' in av.codecs_available:
        _encode(_new_file(path), frames, fps, 'libx264', {'crf': '16'})
    else:
        logging.warning('This PyAV has no libx264: %s is written with the mpeg4 codec.', path)
        _encode(_new_file(path), frames, fps, 'mpeg4', {'qmin': '1', 'qmax': '4'})


def write_gif(path, frames, fps: float, scale: int = 1) -> None:
    """Writes a gif that loops forever; equal frames in a row are stored as one that is shown for
    longer.

    Args:
      path: the file to write; its folder is made if needed.
      frames: [F, H, W, 3], uint8 or float in [0, 1].
      fps: frames per second, at most 50 (browsers slow down faster gifs).
      scale: integer nearest-neighbour upscale.

    Raises:
      ValueError: for a wrong shape, dtype, fps or scale.
    """
    if not 0 < fps <= 50:
        raise ValueError(f'fps is {fps}: a gif needs more than 0 and at most 50.')
    images = [Image.fromarray(frame) for frame in _upscale(_checked_frames(frames), scale)]
    # Gif counts in hundredths of a second: rounding the end times, not the durations, keeps the
    # mean rate.
    durations_ms = 10 * np.diff(np.round(np.arange(len(images) + 1) * 100 / fps)).astype(int)
    images[0].save(
        _new_file(path),
        format='GIF',
        save_all=True,
        append_images=images[1:],
        loop=0,
        duration=durations_ms.tolist(),
    )


def write_png(path, image) -> None:
    """Writes one image [H, W, 3], uint8 or float in [0, 1], as png; the folder is made if
    needed."""
    Image.fromarray(to_uint8(image)).save(_new_file(path), format='PNG')


def _film_strip(frames, max_frames: int, frame_height_px: int) -> np.ndarray:
    """Evenly chosen frames side by side, uint8 [h, w, 3] with h near `frame_height_px`."""
    frames = _checked_frames(frames)
    frames = frames[
        np.linspace(0, len(frames) - 1, min(len(frames), max_frames)).round().astype(int)
    ]
    height, width = frames.shape[1:3]
    if height > frame_height_px:
        size = max(1, round(width * frame_height_px / height)), frame_height_px
        frames = np.stack([_fit(Image.fromarray(frame), size) for frame in frames])
    frames = _upscale(frames, max(1, frame_height_px // frames.shape[1]))
    frames = np.pad(frames, ((0, 0), (0, 0), (0, _FRAME_GAP_PX), (0, 0)), constant_values=255)
    return np.concatenate(frames, axis=1)[:, :-_FRAME_GAP_PX]


def _wrap(caption: str, font: ImageFont.FreeTypeFont, width_px: int) -> list[str]:
    """The widest wrapping whose lines fit in `width_px`; a caption too long ends in an ellipsis."""
    for characters in range(width_px // 3, 0, -1):  # no letter mix is narrower than 3 px on average
        lines = textwrap.wrap(caption, characters, max_lines=_MAX_CAPTION_LINES, placeholder=' …')
        if all(font.getlength(line) <= width_px for line in lines):
            break
    return lines


def _sheet_row(strips, captions, given, widths: Sequence[int]) -> Image.Image:
    """One row of scenes: captions on a common base line above the frames."""
    font = ImageFont.load_default(size=_FONT_PX)
    marked = [
        '(given) ' * is_given + caption for is_given, caption in zip(given, captions, strict=True)
    ]
    lines = [_wrap(caption, font, width) for caption, width in zip(marked, widths)]
    text_px = _LINE_PX * max(map(len, lines)) + 4
    height = text_px + max(strip.shape[0] for strip in strips)
    row = Image.new('RGB', (sum(widths) + _SCENE_GAP_PX * (len(widths) - 1), height), 'white')
    draw, x = ImageDraw.Draw(row), 0
    for strip, text, is_given, width in zip(strips, lines, given, widths):
        top = text_px - 4 - _LINE_PX * len(text)
        for i, line in enumerate(text):
            draw.text((x, top + _LINE_PX * i), line, fill=_INK[bool(is_given)], font=font)
        row.paste(Image.fromarray(strip), (x, text_px))
        x += width + _SCENE_GAP_PX
    return row


def _column_widths(strips: list[list[np.ndarray]]) -> list[int]:
    """Width in px of each column of scenes; stories may differ in their number of scenes."""
    columns = range(max(map(len, strips)))
    return [
        max(_MIN_SCENE_PX, *(row[i].shape[1] for row in strips if i < len(row))) for i in columns
    ]


def _check_structure(stories, captions, given) -> None:
    scenes, texts, marks = (
        [len(items) for items in nested] for nested in (stories, captions, given)
    )
    if not scenes or 0 in scenes or not scenes == texts == marks:
        raise ValueError(
            f'Stories of {scenes} scenes have {texts} captions and {marks} given marks: '
            'pass at least one scene per story, with one caption and one mark each.'
        )


def story_grid(
    stories, captions, *, given=None, max_frames: int = 4, frame_height_px: int = 128
) -> np.ndarray:
    """Draws one row per story: its scenes side by side, the caption above each scene.

    Args:
      stories: per story a list of scenes [F, H, W, 3], uint8 or float in [0, 1]; lengths and sizes
        may differ.
      captions: per story a list of strings, one per scene.
      given: per story one bool per scene; a given scene (not generated) is marked '(given)'. None
        marks none.
      max_frames: frames shown per scene, evenly chosen from first to last.
      frame_height_px: a smaller frame is enlarged by the largest integer that fits, a larger one
        shrunk to it.

    Returns:
      uint8 image [H, W, 3] on white.

    Raises:
      ValueError: without a scene, for wrong shapes or unequal numbers of scenes, captions and
        given.
    """
    given = [[False] * len(story) for story in stories] if given is None else given
    _check_structure(stories, captions, given)
    strips = [
        [_film_strip(scene, max_frames, frame_height_px) for scene in story] for story in stories
    ]
    widths = _column_widths(strips)
    rows = [_sheet_row(s, c, g, widths[: len(s)]) for s, c, g in zip(strips, captions, given)]
    size = (
        max(row.width for row in rows) + 2 * _MARGIN_PX,
        sum(row.height + _MARGIN_PX for row in rows) + _MARGIN_PX,
    )
    sheet, y = Image.new('RGB', size, 'white'), _MARGIN_PX
    for row in rows:
        sheet.paste(row, (_MARGIN_PX, y))
        y += row.height + _MARGIN_PX
    return np.asarray(sheet)  # uint8 [H, W, 3]


def contact_sheet(
    scenes, captions, *, given=None, max_frames: int = 8, frame_height_px: int = 128
) -> np.ndarray:
    """Draws one story with a row per scene; arguments as in `story_grid`, without the outer
    list."""
    given = [False] * len(scenes) if given is None else given
    stories, captions, given = ([[item] for item in items] for items in (scenes, captions, given))
    return story_grid(
        stories, captions, given=given, max_frames=max_frames, frame_height_px=frame_height_px
    )
