"""Sheets show every scene with its caption."""

import numpy as np
import pytest
from PIL import ImageFont

from mask2dit_jax.data import sheets

_COLOURS = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200]], np.uint8)


def _plain(colour, count, height=16, width=16):
    return np.broadcast_to(_COLOURS[colour], (count, height, width, 3))


def _pixels_of(image, colour):
    return int((image == _COLOURS[colour]).all(-1).sum())


def test_contact_sheet_shows_at_most_eight_frames_per_scene():
    image = sheets.contact_sheet(
        [_plain(0, 3), _plain(1, 20), _plain(2, 1)], ['one', 'two', 'three']
    )
    assert image.dtype == np.uint8
    tile_px = 128 * 128  # 16 px enlarged eight times
    assert [_pixels_of(image, c) // tile_px for c in range(3)] == [3, 8, 1]
    assert image.shape[1] == 8 * 128 + 7 * 3 + 2 * 20
    np.testing.assert_array_equal(image[:20], 255)
    np.testing.assert_array_equal(image[:, -20:], 255)


def test_frames_shown_run_from_the_first_to_the_last():
    grey = np.arange(100, 110, dtype=np.uint8)[:, None, None, None]
    image = sheets.contact_sheet([np.broadcast_to(grey, (10, 16, 16, 3))], [''], max_frames=4)
    shown = [value for value in range(100, 110) if (image == value).all(-1).sum() >= 128 * 128]
    assert shown == [100, 103, 106, 109]


@pytest.mark.parametrize('height, shown_px', [(16, 128), (40, 120), (100, 100), (256, 128)])
def test_frame_height_on_the_sheet(height, shown_px):
    image = sheets.contact_sheet([_plain(0, 1, height, height)], [''])
    rows = (image == _COLOURS[0]).all(-1).any(1).sum()
    assert rows == shown_px


def _ink(image):
    """Caption pixels: neither white nor one of the scene colours."""
    return ~((image == 255).all(-1) | (image[..., None, :] == _COLOURS).all(-1).any(-1))


def test_captions_are_drawn_above_their_scene():
    silent = sheets.contact_sheet([_plain(0, 4), _plain(1, 4)], ['', ''])
    image = sheets.contact_sheet([_plain(0, 4), _plain(1, 4)], ['', 'a green square'])
    assert not _ink(silent).any()
    lines = np.flatnonzero(_ink(image).any(1))
    red, green = (np.flatnonzero((image == _COLOURS[c]).all(-1).any(1)) for c in range(2))
    assert len(lines) >= 8
    assert red.max() < lines.min() and lines.max() < green.min()


def test_long_captions_wrap_inside_the_sheet_and_end_in_an_ellipsis():
    font = ImageFont.load_default(size=15)
    words = 'a red ball rolls over the lawn ' * 4
    lines = sheets._wrap(words, font, 300)
    assert ' '.join(lines) == words.strip()
    assert max(map(font.getlength, lines)) <= 300
    assert len(lines) <= font.getlength(words) / 300 * 1.3 + 1  # lines are well filled
    lines = sheets._wrap(words * 20 + 'x' * 500, font, 300)
    assert len(lines) == 6 and lines[-1].endswith('…')
    assert max(map(font.getlength, sheets._wrap('x' * 100, font, 300))) <= 300
    image = sheets.contact_sheet([_plain(0, 2)], [words * 20])
    assert not _ink(image)[:, -20:].any()


def test_a_long_story_has_several_scenes_in_a_row():
    """In the order of reading: sheets of these rows, one below the other."""
    scenes = [np.full((2, 16, 16, 3), 10 * number, np.uint8) for number in range(14)]
    captions = [f'scene {number}' for number in range(14)]
    given = [number < 3 for number in range(14)]
    rows = [slice(start, start + 2) for start in range(0, 14, 2)]
    expected = sheets.story_grid(
        [scenes[row] for row in rows],
        [captions[row] for row in rows],
        given=[given[row] for row in rows],
        max_frames=8,
    )
    np.testing.assert_array_equal(sheets.contact_sheet(scenes, captions, given=given), expected)


def test_given_scenes_are_marked():
    scenes, captions = [_plain(0, 4), _plain(1, 4)], ['same', 'same']
    plain = sheets.contact_sheet(scenes, captions)
    image = sheets.contact_sheet(scenes, captions, given=(True, False))
    red = np.flatnonzero((image == _COLOURS[0]).all(-1).any(1))
    assert _ink(image)[: red.min()].sum() > 2 * _ink(plain)[: red.min()].sum()
    np.testing.assert_array_equal(image[red.max() :], plain[red.max() :])


def test_story_grid_puts_scenes_side_by_side():
    image = sheets.story_grid(
        [[_plain(0, 9), _plain(1, 2)], [_plain(2, 9)]],
        [['one', 'two'], ['three']],
        given=[(True, False), (False,)],
    )
    tiles = [_pixels_of(image, c) / 128**2 for c in range(3)]
    assert tiles == [4, 2, 4]
    red, green, blue = (np.argwhere((image == _COLOURS[c]).all(-1)) for c in range(3))
    assert red[:, 0].min() == green[:, 0].min() and red[:, 1].max() + 20 < green[:, 1].min()
    assert red[:, 1].min() == blue[:, 1].min() and red[:, 0].max() < blue[:, 0].min()


def test_sheet_refuses_unequal_numbers():
    with pytest.raises(ValueError, match=r'\[1, 1\]'):
        sheets.contact_sheet([_plain(0, 2), _plain(1, 2)], ['one'])
    with pytest.raises(ValueError, match='given'):
        sheets.story_grid([[_plain(0, 2)]], [['one']], given=[(True, False)])
    with pytest.raises(ValueError, match='at least one scene'):
        sheets.contact_sheet([], [])
