"""Sheets: pictures that show the scenes of stories as film strips, with their captions."""

import textwrap
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mask2dit_jax.data import video

MAX_ROWS = 12  # of a contact sheet

_MARGIN_PX = 20  # around a sheet and between its rows
_SCENE_GAP_PX = 24  # between scenes in one row
_FRAME_GAP_PX = 3  # between frames of one scene
_MIN_SCENE_PX = 240  # a caption stays readable over a scene of one small frame
_FONT_PX = 15
_LINE_PX = 20
_CAPTION_GAP_PX = 4  # between a caption and its frames
_MAX_CAPTION_LINES = 6
_CAPTION_INK = (40, 40, 40)
_GIVEN_INK = (20, 90, 170)


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
      frame_height_px: height of the frames shown. A smaller frame is enlarged by the largest
        integer that fits, a larger one is shrunk to it.

    Returns:
      uint8 image [H, W, 3] on white.

    Raises:
      ValueError: without a scene, for wrong shapes or unequal numbers of scenes, captions and
        given.
    """
    if given is None:
        given = [[False] * len(story) for story in stories]
    _check_structure(stories, captions, given)

    strips = [
        [_film_strip(scene, max_frames, frame_height_px) for scene in story] for story in stories
    ]
    widths = _column_widths(strips)
    rows = []
    for story_strips, story_captions, marks in zip(strips, captions, given):
        story_widths = widths[: len(story_strips)]
        rows.append(_draw_row(story_strips, story_captions, marks, story_widths))

    width = max(row.width for row in rows) + 2 * _MARGIN_PX
    height = sum(row.height + _MARGIN_PX for row in rows) + _MARGIN_PX
    sheet = Image.new('RGB', (width, height), 'white')
    y = _MARGIN_PX
    for row in rows:
        sheet.paste(row, (_MARGIN_PX, y))
        y += row.height + _MARGIN_PX
    return np.asarray(sheet)


def contact_sheet(
    scenes, captions, *, given=None, max_frames: int = 8, frame_height_px: int = 128
) -> np.ndarray:
    """Draws one story with a row per scene; a long one with several scenes in a row, in the order
    of reading, so that it has at most MAX_ROWS.

    Args:
      scenes: a list of scenes [F, H, W, 3].
      captions: one string per scene.
      given: one bool per scene, or None.
      max_frames, frame_height_px: as in story_grid.

    Returns:
      uint8 image [H, W, 3] on white.

    Raises:
      ValueError: as story_grid.
    """
    if given is None:
        given = [False] * len(scenes)
    columns = max(1, -(-len(scenes) // MAX_ROWS))

    def in_rows(items):
        return [items[i : i + columns] for i in range(0, len(items), columns)]

    # A story for every row.
    return story_grid(
        in_rows(scenes),
        in_rows(captions),
        given=in_rows(given),
        max_frames=max_frames,
        frame_height_px=frame_height_px,
    )


def _check_structure(stories, captions, given) -> None:
    """Raises ValueError unless every scene has one caption and one mark."""
    scenes = [len(items) for items in stories]
    texts = [len(items) for items in captions]
    marks = [len(items) for items in given]
    if not scenes or 0 in scenes or not scenes == texts == marks:
        raise ValueError(
            f'Stories of {scenes} scenes have {texts} captions and {marks} given marks: '
            'pass at least one scene per story, with one caption and one mark each.'
        )


def thumbnails(frames, max_frames: int = 4, frame_height_px: int = 128) -> np.ndarray:
    """What `story_grid` shows of a scene: it draws these frames as it draws the whole scene.

    Args:
      frames: a scene [F, H, W, 3], uint8 or float in [0, 1].
      max_frames, frame_height_px: as in story_grid.

    Returns:
      Evenly chosen frames, uint8 [n, h, w, 3], shrunk to `frame_height_px` if they are larger.
    """
    frames = video.checked_frames(frames)
    count = min(len(frames), max_frames)
    shown = np.linspace(0, len(frames) - 1, count).round().astype(int)
    frames = frames[shown]

    height, width = frames.shape[1:3]
    if height > frame_height_px:
        width = max(1, round(width * frame_height_px / height))
        images = [Image.fromarray(frame) for frame in frames]
        frames = np.stack([video.scale_and_crop(i, frame_height_px, width) for i in images])
    return frames


def _film_strip(frames, max_frames: int, frame_height_px: int) -> np.ndarray:
    """Evenly chosen frames side by side, uint8 [h, w, 3] with h near `frame_height_px`."""
    frames = thumbnails(frames, max_frames, frame_height_px)
    frames = video.upscale(frames, max(1, frame_height_px // frames.shape[1]))

    # A white gap after every frame; the last one is cut off.
    frames = np.pad(frames, ((0, 0), (0, 0), (0, _FRAME_GAP_PX), (0, 0)), constant_values=255)
    return np.concatenate(frames, axis=1)[:, :-_FRAME_GAP_PX]


def _column_widths(strips: list[list[np.ndarray]]) -> list[int]:
    """Width in px of each column of scenes; stories may differ in their number of scenes."""
    num_columns = max(len(row) for row in strips)
    widths = []
    for column in range(num_columns):
        present = [row[column].shape[1] for row in strips if column < len(row)]
        widths.append(max(_MIN_SCENE_PX, *present))
    return widths


def _draw_row(strips, captions, given, widths: Sequence[int]) -> Image.Image:
    """One row of scenes: captions on a common base line above the frames."""
    font = ImageFont.load_default(size=_FONT_PX)
    captions_lines = []
    for caption, is_given, width in zip(captions, given, widths, strict=True):
        marked = f'(given) {caption}' if is_given else caption
        captions_lines.append(_wrap(marked, font, width))

    text_px = _LINE_PX * max(len(lines) for lines in captions_lines) + _CAPTION_GAP_PX
    row_height = text_px + max(strip.shape[0] for strip in strips)
    row_width = sum(widths) + _SCENE_GAP_PX * (len(widths) - 1)
    row = Image.new('RGB', (row_width, row_height), 'white')
    draw = ImageDraw.Draw(row)

    x = 0
    for strip, lines, is_given, width in zip(strips, captions_lines, given, widths):
        y = text_px - _CAPTION_GAP_PX - _LINE_PX * len(lines)
        ink = _GIVEN_INK if is_given else _CAPTION_INK
        for line in lines:
            draw.text((x, y), line, fill=ink, font=font)
            y += _LINE_PX
        row.paste(Image.fromarray(strip), (x, text_px))
        x += width + _SCENE_GAP_PX
    return row


def _wrap(caption: str, font: ImageFont.FreeTypeFont, width_px: int) -> list[str]:
    """The widest wrapping whose lines fit in `width_px`; a caption too long ends in an ellipsis."""
    widest = width_px // 3  # no mix of letters is narrower than 3 px on average
    for characters in range(widest, 0, -1):
        lines = textwrap.wrap(caption, characters, max_lines=_MAX_CAPTION_LINES, placeholder=' …')
        if all(font.getlength(line) <= width_px for line in lines):
            break
    return lines
