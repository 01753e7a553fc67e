"""Exact scores of generated stories: what a scene shows is measured in its pixels and compared with
the story.

Nothing is learnt: background and colour are nearest palette entries; shape and action are those of
the rendering that fits best among all shapes, actions and starts.
"""

import functools
import itertools

import numpy as np

from mask2dit_jax.stories import world

BACKGROUND_RADIUS = 0.3  # largest RGB distance to the palette that still counts
COLOR_RADIUS = 0.9
LEAST_CONTRAST = 0.35  # RGB distance from the background below which there is no character
LARGEST_ERROR = 0.7  # part of a scene's energy that its best rendering may leave over; more, and nothing is seen
START_GRID = np.arange(
    -2.0, 2.1
)  # tried middles of the path, from the centre, in 1/16 of the frame
FAINTEST = 0.8  # a rendering may be this faint in the fit: else a mottled ball fits a ring, and fainter, a ring a ball
BORDER_PX = 1


def measure(clips: np.ndarray) -> dict[str, np.ndarray]:
    """What scenes of equal length show, whatever they were meant to show.

    Args:
        clips: [N, F, H, W, 3] float in [0, 1], one scene each, H = W.

    Returns:
        Indices 'background', 'color', 'shape', 'action' into the tuples of world.py, int [N], -1
        where the scene shows none of them, and 'residual' float [N]: root of the squared error
        between the scene and its best rendering (the measured palette colours, shape and frames;
        centre and scale fitted per frame) over the root of the squared contrast of that rendering
        with its background. 0 is perfect, 1 as bad as showing no character; 1 where no character is
        found.
    """
    clips = np.asarray(clips, np.float32)
    border = np.ones(clips.shape[2:4], bool)
    border[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX] = False
    ground = np.median(clips[:, :, border], axis=(1, 2))  # [N, 3]
    paint = _character_color(clips, ground)
    direction = paint - ground
    contrast = np.linalg.norm(direction, axis=-1)
    found = contrast > LEAST_CONTRAST
    change = np.einsum('nfhwc,nc->nfhw', clips - ground[:, None, None, None], direction)
    alpha = np.clip(change / np.maximum(contrast, LEAST_CONTRAST)[:, None, None, None] ** 2, 0, 1)
    shape, action, drawn = _recognise(alpha)
    found &= np.sum((alpha - drawn) ** 2, axis=(1, 2, 3)) < LARGEST_ERROR * np.sum(
        alpha**2, axis=(1, 2, 3)
    )
    out = {
        'background': _nearest(ground, world.BACKGROUND_RGB, BACKGROUND_RADIUS),
        'color': np.where(found, _nearest(paint, world.COLOR_RGB, COLOR_RADIUS), -1),
        'shape': np.where(found, shape, -1),
        'action': np.where(found, action, -1),
    }
    return out | {'residual': np.where(found, _residual(clips, drawn, ground, paint), 1.0)}


def _character_color(clips, ground):
    """[N, 3] median colour of the pixels that deviate most from the background."""
    n, frames, height, _, _ = clips.shape
    pixels = clips.reshape(n, -1, 3)
    deviation = np.linalg.norm(pixels - ground[:, None], axis=-1)
    count = max(
        1, int(5 * frames * (height / 16) ** 2)
    )  # fewer than any character covers fully, even a blinking one
    most = np.argpartition(-deviation, count, axis=1)[:, :count]
    return np.median(np.take_along_axis(pixels, most[..., None], 1), axis=1)


def _nearest(rgb, palette, radius):
    """[N] index of the nearest palette colour, -1 beyond `radius`."""
    distance = np.linalg.norm(rgb[:, None] - np.array(list(palette.values())), axis=-1)
    return np.where(distance.min(1) <= radius, distance.argmin(1), -1)


@functools.cache
def _candidates(frames: int, size: int):
    """Every shape doing every action from a grid of starts: what a scene is compared with.

    Returns:
        Shapes [K] and actions [K] as indices, masks [K, F, size, size], centres [K, F, 2] and
        scales [K, F].
    """
    offsets = np.stack(np.meshgrid(START_GRID, START_GRID, indexing='ij'), -1).reshape(-1, 2)
    kinds = list(itertools.product(range(len(world.SHAPES)), range(len(world.ACTIONS))))
    masks, centers, scales = [], [], []
    for shape, action in kinds:
        middle = np.array(world.MOTIONS[world.ACTIONS[action]][0]) / 2
        mask, center, scale = world.scene_coverage(
            world.SHAPES[shape],
            world.ACTIONS[action],
            frames,
            (8 + offsets - middle) * size / 16,
            size,
        )
        masks.append(mask)
        centers.append(center)
        scales.append(np.broadcast_to(scale, center.shape[:-1]))
    shape, action = np.repeat(kinds, len(offsets), axis=0).T
    return shape, action, *(np.concatenate(x) for x in (masks, centers, scales))


def _recognise(alpha):
    """Shape and action [N] whose rendering is nearest to the masks [N, F, H, W], and that
    rendering, refined."""
    shape, action, masks, centers, scales = _candidates(alpha.shape[1], alpha.shape[2])
    flat, tried = alpha.reshape(len(alpha), -1), masks.reshape(len(masks), -1)
    overlap, energy = flat @ tried.T, np.sum(tried**2, axis=1)  # [N, K], [K]
    strength = np.clip(overlap / energy, FAINTEST, 1)
    best = np.argmin(
        strength**2 * energy - 2 * strength * overlap, axis=1
    )  # squared error, but for a constant
    drawn = np.empty_like(alpha)
    for i, name in enumerate(world.SHAPES):
        own = shape[best] == i
        frames = alpha[own].reshape(-1, *alpha.shape[2:])
        drawn[own] = _refine(
            frames, centers[best[own]].reshape(-1, 2), scales[best[own]].reshape(-1), name
        ).reshape(alpha[own].shape)
    shown = masks[best].any((2, 3))
    return shape[best], action[best], drawn * shown[:, :, None, None]


def _refine(alpha, center, scale, shape, steps=4):
    """Rendering [K, H, W] of the shape after Gauss-Newton steps on centre and scale."""
    size = alpha.shape[-1]
    state = np.concatenate([center, scale[:, None]], 1).astype(np.float32)  # [K, 3]

    def draw(state):
        return world.coverage(shape, state[:, :2], state[:, 2], size).reshape(-1, size * size)

    width = np.diag([0.2 * size / 16, 0.2 * size / 16, 0.05]).astype(np.float32)
    for _ in range(steps):
        slopes = np.stack(
            [(draw(state + w) - draw(state - w)) / (2 * w.sum()) for w in width], 1
        )  # [K, 3, H W]
        error = alpha.reshape(-1, size * size) - draw(state)
        normal = slopes @ slopes.transpose(0, 2, 1) + 1e-2 * np.eye(3, dtype=np.float32)
        change = np.linalg.solve(normal, slopes @ error[..., None])[..., 0]
        limit = width.sum(0) * 4
        state = np.clip(
            state + np.clip(change, -limit, limit), [0, 0, 0.3], [size, size, 2]
        ).astype(np.float32)
    return draw(state).reshape(alpha.shape)


def _residual(clips, drawn, ground, paint):
    """[N] relative error against the rendering with the nearest palette colours."""
    palettes = [
        np.array(list(rgb.values()), np.float32) for rgb in (world.BACKGROUND_RGB, world.COLOR_RGB)
    ]
    ground, paint = (
        p[_nearest(rgb, dict(enumerate(p)), np.inf)][:, None, None, None]
        for rgb, p in zip((ground, paint), palettes)
    )
    contrast = drawn[..., None] * (paint - ground)
    error = np.sum((clips - ground - contrast) ** 2, axis=(1, 2, 3, 4))
    return np.sqrt(error / np.maximum(np.sum(contrast**2, axis=(1, 2, 3, 4)), 1e-6))


def score(
    videos, stories: list[world.Story], scenes: tuple[int, ...] | None = None
) -> dict[str, np.ndarray]:
    """Compares videos with the stories that they should show.

    Args:
        videos: float in [0, 1] or uint8, [n, F, H, W, 3] or a list of [F, H, W, 3] if lengths
          differ.
        stories: n stories of S scenes each.
        scenes: indices of the scenes to score, all if None; columns are in this order.

    Returns:
        'action', 'color', 'shape', 'background', 'identity' (color and shape): bool [n, S], right
        or wrong. 'leak': bool [n, S], the action is wrong and is that of another scene of the
        story. 'residual': float [n, S], see `measure`.
        'story': bool [n], action, identity and background right in all scored scenes.
        'consistency': bool [n], the same colour, shape and background in all scenes (also those not
        scored), whatever the story says.

    Raises:
        ValueError: if counts of videos, frames or scenes do not match the stories.
    """
    seen = _measure_all(videos, stories)
    picked = list(range(len(stories[0].actions)) if scenes is None else scenes)
    persistent = {'color': world.COLORS, 'shape': world.SHAPES, 'background': world.BACKGROUNDS}
    out = {
        name: (seen[name] == np.array([[known.index(getattr(story, name))] for story in stories]))[
            :, picked
        ]
        for name, known in persistent.items()
    }
    told = np.array(
        [[world.ACTIONS.index(action) for action in story.actions] for story in stories]
    )  # [n, S]
    out['action'] = (seen['action'] == told)[:, picked]
    # a wrong action cannot equal its own scene's, so any match is with another scene
    out['leak'] = ~out['action'] & (seen['action'][:, :, None] == told[:, None]).any(2)[:, picked]
    out['identity'] = out['color'] & out['shape']
    out['story'] = (out['action'] & out['identity'] & out['background']).all(1)
    out['consistency'] = np.all(
        [(seen[name] == seen[name][:, :1]) & (seen[name] >= 0) for name in persistent], (0, 2)
    )
    return out | {'residual': seen['residual'][:, picked]}


def _measure_all(videos, stories):
    """`measure` of every scene as [n, S] arrays; scenes of equal length are measured together."""
    if len(videos) != len(stories) or len({len(story.actions) for story in stories}) != 1:
        raise ValueError(
            f'{len(videos)} videos for {len(stories)} stories with '
            f'{sorted({len(s.actions) for s in stories})} scenes; give one video per story and stories '
            f'with equal numbers of scenes.'
        )
    groups = {}
    for n, (video, story) in enumerate(zip(videos, stories)):
        if len(video) != sum(story.frames):
            raise ValueError(
                f'video {n} has {len(video)} frames, its story {sum(story.frames)}; they must agree.'
            )
        video = np.asarray(video, np.float32) / (255 if video.dtype == np.uint8 else 1)
        for s, clip in enumerate(np.split(video, np.cumsum(story.frames)[:-1])):
            groups.setdefault(clip.shape, []).append((n, s, clip))
    names = ('action', 'color', 'shape', 'background', 'residual')
    out = {
        name: np.empty(
            (len(stories), len(stories[0].actions)), float if name == 'residual' else int
        )
        for name in names
    }
    for group in groups.values():
        rows, columns, clips = zip(*group)
        for name, values in measure(np.stack(clips)).items():
            out[name][rows, columns] = values
    return out


def summarize(
    scores: dict[str, np.ndarray], scenes: tuple[int, ...] | None = None
) -> dict[str, float]:
    """Means over the stories, and per scene under 'action/1', 'action/2', ... for all scores that
    have scenes.

    Args:
        scores: what `score` returned.
        scenes: the scenes given to `score`, so that the numbers (from 1) are those in the story.
    """
    out = {name: float(values.mean()) for name, values in scores.items()}
    for name, values in scores.items():
        if values.ndim == 2:
            numbers = range(values.shape[1]) if scenes is None else scenes
            out |= {f'{name}/{s + 1}': float(column.mean()) for s, column in zip(numbers, values.T)}
    return out
