"""Exact scores of generated stories: what a scene shows is measured in its pixels and compared with the story.

Nothing is learnt: background and colour are nearest palette entries, the action is read from the path and the area of
the character and the frames in which it is shown, the shape is the one whose rendering fits best.
"""
import numpy as np

from mask2dit_jax.datasets.stories import world

BACKGROUND_RADIUS = 0.3  # largest RGB distance to the palette that still counts
COLOR_RADIUS = 0.9
LEAST_CONTRAST = 0.35  # RGB distance from the background below which there is no character
ACTION_RADIUS = 0.6  # in units of the whole action; another action is at least 1 away
SHOWN = 0.22  # a frame shows the character if its area exceeds this part of the scene's largest
SCALES = np.linspace(0.5, 1.35, 12)  # tried for the shape, then refined
FAINTEST = 0.8  # a rendering may be this faint in the fit: else a mottled ball fits a ring, and fainter, a ring a ball
CHUNK_FRAMES = 512  # bounds the memory of the rendered candidates
BORDER_PX = 1


def measure(clips: np.ndarray) -> dict[str, np.ndarray]:
    """What scenes of equal length show, whatever they were meant to show.

    Args:
        clips: [N, F, H, W, 3] float in [0, 1], one scene each, H = W.

    Returns:
        Indices 'background', 'color', 'shape', 'action' into the tuples of world.py, int [N], -1 where the scene shows
        none of them, and 'residual' float [N]: root of the squared error between the scene and its best rendering
        (the measured palette colours, shape and frames; centre and scale fitted per frame) over the root of the
        squared contrast of that rendering with its background. 0 is perfect, 1 as bad as showing no character;
        1 where no character is found.
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
    area, center = _moments(alpha)
    shown = (area > SHOWN * area.max(1, keepdims=True)) & found[:, None]  # [N, F]
    shape, drawn = _best_rendering(alpha, center, shown)
    out = {
        'background': _nearest(ground, world.BACKGROUND_RGB, BACKGROUND_RADIUS),
        'color': np.where(found, _nearest(paint, world.COLOR_RGB, COLOR_RADIUS), -1),
        'shape': np.where(found, shape, -1),
        'action': _action(area, center / (clips.shape[2] / 16), shown),
    }
    return out | {'residual': np.where(found, _residual(clips, drawn, ground, paint), 1.0)}


def _character_color(clips, ground):
    """[N, 3] median colour of the pixels that deviate most from the background."""
    n, frames, height, _, _ = clips.shape
    pixels = clips.reshape(n, -1, 3)
    deviation = np.linalg.norm(pixels - ground[:, None], axis=-1)
    count = max(1, int(5 * frames * (height / 16) ** 2))  # fewer than any character covers fully, even a blinking one
    most = np.argpartition(-deviation, count, axis=1)[:, :count]
    return np.median(np.take_along_axis(pixels, most[..., None], 1), axis=1)


def _nearest(rgb, palette, radius):
    """[N] index of the nearest palette colour, -1 beyond `radius`."""
    distance = np.linalg.norm(rgb[:, None] - np.array(list(palette.values())), axis=-1)
    return np.where(distance.min(1) <= radius, distance.argmin(1), -1)


def _moments(alpha):
    """Area [N, F] in px² and centroid [N, F, 2] in px of the mask; weak pixels are left out as noise."""
    mask = np.where(alpha > 0.4, alpha, 0)
    area = mask.sum((2, 3))
    place = np.arange(alpha.shape[-1], dtype=np.float32) + 0.5
    total = np.stack([mask.sum(3) @ place, mask.sum(2) @ place], -1)
    return area, total / np.maximum(area, 1e-6)[..., None]


def _action(area, center, shown):
    """[N] index of the action; `center` in 1/16 of the frame."""
    frames = area.shape[1]
    features = np.concatenate([center / world.TRAVEL, _log_area(area)[..., None]], -1)  # [N, F, 3]
    time = np.linspace(-0.5, 0.5, frames)
    change = np.einsum('f,nfk->nk', time / np.sum(time**2), features)  # slope: change from first to last frame
    names = [name for name in world.ACTIONS if name != 'blinks']
    targets = np.array([[*np.divide(travel, world.TRAVEL), np.log(last / first) / np.log(world.LARGE / world.SMALL)]
                        for travel, (first, last) in map(world.MOTIONS.get, names)])
    distance = np.linalg.norm(change[:, None] - targets, axis=-1)
    index = np.array([world.ACTIONS.index(name) for name in names])[distance.argmin(1)]
    index = np.where((distance.min(1) <= ACTION_RADIUS) & shown.all(1), index, -1)
    blinks = (shown == world.visible_frames('blinks', frames)).all(1)
    return np.where(blinks, world.ACTIONS.index('blinks'), index)


def _log_area(area):
    """Logarithm of the area, 1 apart between the smallest and the largest character."""
    return np.log(np.maximum(area, 1e-6)) / (2 * np.log(world.LARGE / world.SMALL))


def _best_rendering(alpha, center, shown):
    """Shape [N] whose renderings fit best over the shown frames, and these renderings [N, F, H, W]."""
    n, frames, size, _ = alpha.shape
    alpha, center = alpha.reshape(-1, size, size), center.reshape(-1, 2)
    error, scale = np.empty((2, len(world.SHAPES), n * frames), np.float32)
    for start in range(0, n * frames, CHUNK_FRAMES):
        part = slice(start, start + CHUNK_FRAMES)
        for i, shape in enumerate(world.SHAPES):
            error[i, part], scale[i, part] = _fit_scale(alpha[part], center[part], shape)
    total = np.where(shown, error.reshape(-1, n, frames), 0).sum(2)  # [shapes, N]
    best = total.argmin(0)
    drawn = np.empty_like(alpha)
    for i, shape in enumerate(world.SHAPES):
        own = np.repeat(best == i, frames)
        drawn[own] = _refine(alpha[own], center[own], scale[i, own], shape)
    return best, drawn.reshape(n, frames, size, size) * shown[:, :, None, None]


def _fit_scale(alpha, center, shape):
    """Squared error and scale, [K] each, of the best of SCALES at the centroids of the masks [K, H, W]."""
    scales = np.broadcast_to(SCALES, (len(alpha), len(SCALES)))
    tried = world.coverage(shape, np.repeat(center[:, None], len(SCALES), 1), scales, alpha.shape[-1])  # [K, 12, H, W]
    overlap, energy = np.sum(tried * alpha[:, None], axis=(2, 3)), np.sum(tried**2, axis=(2, 3))  # [K, 12]
    strength = np.clip(overlap / energy, FAINTEST, 1)
    error = np.sum(alpha**2, axis=(1, 2))[:, None] - 2 * strength * overlap + strength**2 * energy
    best = error.argmin(1)
    return np.take_along_axis(error, best[:, None], 1)[:, 0], SCALES[best]


def _refine(alpha, center, scale, shape, steps=4):
    """Rendering [K, H, W] of the shape after Gauss-Newton steps on centre and scale."""
    size = alpha.shape[-1]
    state = np.concatenate([center, scale[:, None]], 1).astype(np.float32)  # [K, 3]

    def draw(state):
        return world.coverage(shape, state[:, :2], state[:, 2], size).reshape(-1, size * size)

    width = np.diag([0.2 * size / 16, 0.2 * size / 16, 0.05]).astype(np.float32)
    for _ in range(steps):
        slopes = np.stack([(draw(state + w) - draw(state - w)) / (2 * w.sum()) for w in width], 1)  # [K, 3, H W]
        error = alpha.reshape(-1, size * size) - draw(state)
        normal = slopes @ slopes.transpose(0, 2, 1) + 1e-2 * np.eye(3, dtype=np.float32)
        change = np.linalg.solve(normal, slopes @ error[..., None])[..., 0]
        limit = width.sum(0) * 4
        state = np.clip(state + np.clip(change, -limit, limit), [0, 0, 0.3], [size, size, 2]).astype(np.float32)
    return draw(state).reshape(alpha.shape)


def _residual(clips, drawn, ground, paint):
    """[N] relative error against the rendering with the nearest palette colours."""
    palettes = [np.array(list(rgb.values()), np.float32) for rgb in (world.BACKGROUND_RGB, world.COLOR_RGB)]
    ground, paint = (p[_nearest(rgb, dict(enumerate(p)), np.inf)][:, None, None, None]
                     for rgb, p in zip((ground, paint), palettes))
    contrast = drawn[..., None] * (paint - ground)
    error = np.sum((clips - ground - contrast) ** 2, axis=(1, 2, 3, 4))
    return np.sqrt(error / np.maximum(np.sum(contrast**2, axis=(1, 2, 3, 4)), 1e-6))


def score(videos, stories: list[world.Story], scenes: tuple[int, ...] | None = None) -> dict[str, np.ndarray]:
    """Compares videos with the stories that they should show.

    Args:
        videos: float in [0, 1] or uint8, [n, F, H, W, 3] or a list of [F, H, W, 3] if lengths differ.
        stories: n stories of S scenes each.
        scenes: indices of the scenes to score, all if None; columns are in this order.

    Returns:
        'action', 'color', 'shape', 'background', 'identity' (color and shape): bool [n, S], right or wrong.
        'leak': bool [n, S], the action is wrong and is that of another scene of the story.
        'residual': float [n, S], see `measure`.
        'story': bool [n], action, identity and background right in all scored scenes.
        'consistency': bool [n], the same colour, shape and background in all scenes (also those not scored), whatever
        the story says.

    Raises:
        ValueError: if counts of videos, frames or scenes do not match the stories.
    """
    seen = _measure_all(videos, stories)
    picked = list(range(len(stories[0].actions)) if scenes is None else scenes)
    persistent = {'color': world.COLORS, 'shape': world.SHAPES, 'background': world.BACKGROUNDS}
    out = {name: (seen[name] == np.array([[known.index(getattr(story, name))] for story in stories]))[:, picked]
           for name, known in persistent.items()}
    told = np.array([[world.ACTIONS.index(action) for action in story.actions] for story in stories])  # [n, S]
    out['action'] = (seen['action'] == told)[:, picked]
    # a wrong action cannot equal its own scene's, so any match is with another scene
    out['leak'] = ~out['action'] & (seen['action'][:, :, None] == told[:, None]).any(2)[:, picked]
    out['identity'] = out['color'] & out['shape']
    out['story'] = (out['action'] & out['identity'] & out['background']).all(1)
    out['consistency'] = np.all([(seen[name] == seen[name][:, :1]) & (seen[name] >= 0) for name in persistent], (0, 2))
    return out | {'residual': seen['residual'][:, picked]}


def _measure_all(videos, stories):
    """`measure` of every scene as [n, S] arrays; scenes of equal length are measured together."""
    if len(videos) != len(stories) or len({len(story.actions) for story in stories}) != 1:
        raise ValueError(f'{len(videos)} videos for {len(stories)} stories with '
                         f'{sorted({len(s.actions) for s in stories})} scenes; give one video per story and stories '
                         f'with equal numbers of scenes.')
    groups = {}
    for n, (video, story) in enumerate(zip(videos, stories)):
        if len(video) != sum(story.frames):
            raise ValueError(f'video {n} has {len(video)} frames, its story {sum(story.frames)}; they must agree.')
        video = np.asarray(video, np.float32) / (255 if video.dtype == np.uint8 else 1)
        for s, clip in enumerate(np.split(video, np.cumsum(story.frames)[:-1])):
            groups.setdefault(clip.shape, []).append((n, s, clip))
    names = ('action', 'color', 'shape', 'background', 'residual')
    out = {name: np.empty((len(stories), len(stories[0].actions)), float if name == 'residual' else int)
           for name in names}
    for group in groups.values():
        rows, columns, clips = zip(*group)
        for name, values in measure(np.stack(clips)).items():
            out[name][rows, columns] = values
    return out


def summarize(scores: dict[str, np.ndarray], scenes: tuple[int, ...] | None = None) -> dict[str, float]:
    """Means over the stories, and per scene under 'action/1', 'action/2', ... for all scores that have scenes.

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
