"""Draws a story: which part of every pixel the character covers, and the frames in colour."""

from typing import NamedTuple

import numpy as np

from mask2dit_jax.stories import world


class SceneMask(NamedTuple):
    """The character of one scene without its colours.

    Attributes:
        coverage: [..., F, size, size] float32, the part of each pixel that is covered.
        centers: [..., F, 2] float32, centre (y, x) in px at each frame.
        scales: [F] float32, scale of the shape at each frame.
    """

    coverage: np.ndarray
    centers: np.ndarray
    scales: np.ndarray


def render(story: world.AnyStory) -> np.ndarray:
    """Draws the story.

    Args:
        story: the story.

    Returns:
        uint8 [F, size, size, 3], the scenes one after the other.
    """
    scenes = []
    looks = zip(story.shapes, story.colors, story.backgrounds)
    for (shape, color, background), action, frames, start in zip(
        looks, story.actions, story.frames, story.starts
    ):
        mask = scene_coverage(shape, action, frames, start, story.size_px)
        ground = np.array(world.BACKGROUND_RGB[background], np.float32) * 255
        change = np.array(world.COLOR_RGB[color], np.float32) * 255 - ground
        scenes.append(ground + mask.coverage[..., None] * change)  # [F, H, W, 3]
    return (np.concatenate(scenes) + 0.5).astype(np.uint8)


def scene_coverage(
    shape: str, action: str, frames: int, start: np.ndarray, size_px: int
) -> SceneMask:
    """Draws one scene's character without its colours.

    Args:
        shape: one of SHAPES.
        action: one of ACTIONS.
        frames: F, the frames of the scene.
        start: [..., 2] start centres (y, x) in px.
        size_px: height and width of the frame.

    Returns:
        The SceneMask, with the leading axes of `start`.
    """
    motion = world.MOTIONS[action]
    time = np.linspace(0, 1, frames, dtype=np.float32)  # [F], 0 at the first, 1 at the last frame

    path = time[:, None] * np.array(motion.travel, np.float32) * size_px / world.UNITS  # [F, 2]
    centers = np.asarray(start, np.float32)[..., None, :] + path  # [..., F, 2]

    first, last = motion.scales
    scales = (first + time * (last - first)).astype(np.float32)  # [F]

    shown = visible_frames(action, frames)[:, None, None]  # [F, 1, 1]
    alpha = coverage(shape, centers, scales, size_px) * shown
    return SceneMask(alpha, centers, scales)


def visible_frames(action: str, frames: int) -> np.ndarray:
    """The frames of a scene in which the character is shown.

    Args:
        action: one of ACTIONS.
        frames: F, the frames of the scene.

    Returns:
        [F] bool. A blink alternates by pairs (on, on, off, off, on, on, ...), by single frames in
        scenes of 2 or 3 frames; everything else is always shown.
    """
    if action != 'blinks':
        return np.ones(frames, bool)

    # A codec of patches of 2 frames needs no extra component for a blink by pairs.
    pair = min(2, frames // 2)
    return np.arange(frames) // pair % 2 == 0


def coverage(shape: str, center: np.ndarray, scale: np.ndarray, size_px: int) -> np.ndarray:
    """The part of each pixel that the shape covers, with soft edges.

    Args:
        shape: one of SHAPES.
        center: [..., 2] centres (y, x) in px; pixel i spans i to i + 1.
        scale: [...] scale of the shape.
        size_px: height and width of the frame.

    Returns:
        [..., size_px, size_px] in [0, 1], of the dtype of `center`.
    """
    # Distance of each pixel's middle from the centre, in units, along y and along x.
    unit_px = size_px / world.UNITS
    middles = (np.arange(size_px) + 0.5).astype(center.dtype)
    offset = np.abs(middles - center[..., None]) / unit_px  # [..., 2, size]
    scale = scale.astype(center.dtype)[..., None, None]

    if shape in ('bar', 'tower'):
        half = np.array(world.EXTENTS[shape], center.dtype)[:, None] * scale  # [..., 2, 1]
        along = _ramp(half - offset) - _ramp(-half - offset)  # [..., 2, size]
        return along[..., 0, :, None] * along[..., 1, None, :]

    distance = np.sqrt(offset[..., 0, :, None] ** 2 + offset[..., 1, None, :] ** 2)
    radius, _ = world.EXTENTS[shape]
    disc = _ramp(radius * scale - distance)
    if shape == 'ball':
        return disc
    return disc - _ramp(world.HOLE * scale - distance)


def _ramp(inside):
    """Coverage at a signed distance inside an edge, in units."""
    return np.clip(inside / world.EDGE + 0.5, 0, 1)
