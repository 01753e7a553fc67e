"""Exact scores of generated stories: what a scene shows is measured in its pixels and compared with
the story.

Nothing is learnt. `measure` takes background and colour from the pixels, as the nearest entries of
the palettes; shape and action are those of the rendering that fits best among all shapes, actions
and starts. `score` compares them with the stories, `summarize` takes means, and `by_gap` takes them
by the number of scenes since a character or a place was last shown.

Shapes: B clips of one length, K candidate renderings, n stories of S scenes.
"""

import functools
from typing import NamedTuple

import numpy as np

from mask2dit_jax.stories import cast, rendering, world

# Distances between colours are Euclidean, of RGB in [0, 1]; black and white are 1.73 apart.

# Largest distance at which a background counts as an entry of the palette, whose nearest two (black
# and brown) are 0.45 apart.
BACKGROUND_RADIUS = 0.3

# Largest distance at which a colour counts as an entry of the palette, whose entries are 1 apart or
# more. It is wide, as blur and noise mix the character's colour with that of the background.
COLOR_RADIUS = 0.9

# Least distance between a character and its background; below it, no character is seen.
LEAST_CONTRAST = 0.35

# Largest part of a scene's energy (its squared coverage, summed) that the best rendering may leave
# over; beyond it, no character of this world is seen.
LARGEST_ERROR = 0.7

# Middles of the path that are tried along each axis, from the centre of the frame, in units (1/16
# of the frame). True stories stay within world.JITTER, generated ones may not.
START_GRID = np.arange(-2.0, 2.1)

# Smallest factor by which a rendering may be faded to fit a scene. If it is 1, a mottled ball fits
# a ring; if it is much smaller, a ring fits a ball.
FAINTEST = 0.8

# Width in px of the frame's border, which shows the background.
BORDER_PX = 1

# Pixels per frame, at 16 px, whose median is the character's colour. Every character covers more
# pixels fully, even one that blinks.
COLOR_PIXELS = 5

# The Gauss-Newton steps of `_refine`, which fit centre and scale.
REFINE_STEPS = 4
CENTER_STEP = 0.2  # half width of the difference quotients along y and x, in units
SCALE_STEP = 0.05  # half width of the difference quotient along the scale
LARGEST_MOVE = 4  # in half widths: one step moves no further
DAMPING = 1e-2  # on the diagonal: frames that hide the character have no slopes at all
SCALE_RANGE = (0.3, 2.0)

# What a scene shows, and the names that it can have. Stories have a tuple of each: actions, ...
KNOWN = {
    'action': world.ACTIONS,
    'color': world.COLORS,
    'shape': world.SHAPES,
    'background': world.BACKGROUNDS,
}


def score(
    videos, stories: list[world.AnyStory], scenes: tuple[int, ...] | None = None
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
        'consistency': bool [n], each character has one colour and shape and each place one
        background in all scenes (also those not scored), whatever the story says.
        'character_kept', 'place_kept': float [n, S], 1 or 0: colour and shape (the background) are
        those of the last scene that showed this character (place), whatever the story says; NaN
        where none did.
        'faithful': bool [n, S], right against the scene's own caption in the style 'first': the
        action, and what the scene shows first.
        'cut_deviation': float [n, S], see `cut_deviation`.

    Raises:
        ValueError: if counts of videos, frames or scenes do not match the stories.
    """
    seen = _measure_all(videos, stories)  # of [n, S]
    told = _told(stories)  # of [n, S]
    picked = list(range(len(stories[0].actions)) if scenes is None else scenes)

    right = {name: seen[name] == told[name] for name in told}
    identity = right['color'] & right['shape']
    background = right['background']
    character_gaps = _gaps([story.who for story in stories])
    place_gaps = _gaps([story.where for story in stories])
    faithful = right['action'] & (identity | (character_gaps > 0)) & (background | (place_gaps > 0))
    character_kept = _kept(character_gaps, seen['color'], seen['shape'])
    place_kept = _kept(place_gaps, seen['background'])
    deviations = [cut_deviation(video, story) for video, story in zip(videos, stories)]

    per_scene = right | {
        'leak': _leaks(seen['action'], told['action']),
        'identity': identity,
        'residual': seen['residual'],
        'character_kept': character_kept,
        'place_kept': place_kept,
        'faithful': faithful,
        'cut_deviation': np.stack(deviations),
    }
    shown = (seen['color'] >= 0) & (seen['shape'] >= 0) & (seen['background'] >= 0)
    changed = (character_kept == 0) | (place_kept == 0)
    return {name: values[:, picked] for name, values in per_scene.items()} | {
        'story': (right['action'] & identity & background)[:, picked].all(1),
        'consistency': (shown & ~changed).all(1),
    }


def _told(stories):
    """What the stories say, as indices [n, S]."""
    told = {}
    for name, known in KNOWN.items():
        told[name] = np.array(
            [[known.index(shown) for shown in getattr(story, f'{name}s')] for story in stories]
        )
    return told


def _gaps(names):
    """[n, S] cast.gaps of each story."""
    return np.array([cast.gaps(story) for story in names])


def _kept(gaps, *looks):
    """[n, S]: 1 where looks [n, S] are those of `gaps` scenes ago, else 0; NaN where gaps are 0."""
    before = np.arange(gaps.shape[1]) - gaps
    same = [(look == np.take_along_axis(look, before, 1)) & (look >= 0) for look in looks]
    return np.where(gaps > 0, np.all(same, axis=0), np.nan)


def _leaks(seen, told):
    """[n, S]: the action is wrong and that of another scene of the story."""
    # A wrong action differs from that of its own scene, so that any match is with another scene.
    wrong = seen != told
    told_anywhere = (seen[:, :, None] == told[:, None]).any(2)
    return wrong & told_anywhere


def summarize(
    scores: dict[str, np.ndarray], scenes: tuple[int, ...] | None = None
) -> dict[str, float]:
    """Means over the stories.

    Args:
        scores: what `score` returned.
        scenes: the scenes given to `score`, so that the numbers (from 1) are those in the story.

    Returns:
        The mean of every score, and of scores [n, S] also the mean of every scene: 'action/1',
        'action/2', ... NaN does not count; what is always NaN is left out.
    """
    means = {name: _mean(values) for name, values in scores.items()}

    for name, values in scores.items():
        if values.ndim < 2:
            continue
        numbers = range(values.shape[1]) if scenes is None else scenes
        for scene, column in zip(numbers, values.T):
            means[f'{name}/{scene + 1}'] = _mean(column)
    return {name: mean for name, mean in means.items() if mean is not None}


def _mean(values):
    """The mean of what is not NaN, None if there is nothing."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if values.size else None


def by_gap(
    scores: dict[str, np.ndarray],
    stories: list[world.AnyStory],
    scenes: tuple[int, ...] | None = None,
) -> dict[str, float]:
    """Recall: scores by the number of scenes since the character, or the place, was last shown.

    Args:
        scores: what `score` returned.
        stories: the stories given to it.
        scenes: the scenes given to it. Scenes that are not among them count as faithful, because
            they were given.

    Returns:
        For every gap G from 1 ('new' for what no earlier scene shows) the mean over all scenes with
        this gap, and the number of these scenes under the same name with '/count':
        'identity/gap G', 'background/gap G': right against the story.
        'character_kept/gap G', 'place_kept/gap G' (none for 'new'): looks as when it was last
        shown, counted only where both scenes are faithful to their captions. Without this gate a
        video that does not follow its captions, as one that stands still, would be consistent. Of
        a whole story, 'consistency' with this gate is the score 'story'.
    """
    n, S = len(stories), len(stories[0].actions)
    picked = list(range(S) if scenes is None else scenes)
    faithful = np.ones((n, S), bool)
    faithful[:, picked] = scores['faithful']

    found = {}
    for right, kept, names in (
        ('identity', 'character_kept', [story.who for story in stories]),
        ('background', 'place_kept', [story.where for story in stories]),
    ):
        gaps = _gaps(names)  # [n, S]
        before = np.take_along_axis(faithful, np.arange(S) - gaps, 1)
        counted = (faithful & before)[:, picked]
        gaps = gaps[:, picked]
        for gap in np.unique(gaps).tolist():
            own = gaps == gap
            bins = {right: scores[right][own]}
            if gap:
                bins[kept] = scores[kept][own & counted]
            for name, values in bins.items():
                key = f'{name}/gap {gap or "new"}'
                found[f'{key}/count'] = len(values)
                if len(values):
                    found[key] = float(values.mean())
    return found


def cut_deviation(video, story: world.AnyStory) -> np.ndarray:
    """How far cuts are from where they should be.

    Each frame near a cut tells by its colours whether it belongs to the scene before or after. The
    cut is where this changes, as well as one cut can explain it.

    Args:
        video: [F, H, W, 3], float in [0, 1] or uint8.
        story: what it should show.

    Returns:
        float [S], frames between the border before each scene and its cut; up to the length of the
        longer one of the two scenes, where no cut is seen. NaN for the first scene, and for scenes
        in the colours of the one before.
    """
    frames = _as_float(video)[:, None]  # [F, 1, H, W, 3], every frame a clip
    ground = _background_color(frames)  # [F, 3]
    paint = _character_color(frames, ground)  # [F, 3]
    is_shown = np.linalg.norm(paint - ground, axis=-1) > LEAST_CONTRAST  # blinks hide the character

    def distance(scene, part):
        """[frames of the part] from the colours of a scene."""
        to_ground = np.array(world.BACKGROUND_RGB[story.backgrounds[scene]]) - ground[part]
        to_paint = np.array(world.COLOR_RGB[story.colors[scene]]) - paint[part]
        far = np.linalg.norm(to_ground, axis=-1)
        return far + is_shown[part] * np.linalg.norm(to_paint, axis=-1)

    deviations = np.full(len(story.actions), np.nan)
    ends = np.cumsum(story.frames)
    looks = list(zip(story.colors, story.backgrounds))
    for scene in range(1, len(looks)):
        if looks[scene] == looks[scene - 1]:
            continue
        border = story.frames[scene - 1]
        part = slice(ends[scene - 1] - border, ends[scene])

        # The error of a cut before each frame, and after the last one.
        before = np.concatenate([[0], np.cumsum(distance(scene - 1, part))])
        after = np.concatenate([[0], np.cumsum(distance(scene, part))])
        error = before + after[-1] - after

        # Frames that tell nothing leave cuts that are as good as each other.
        best = np.flatnonzero(error <= error.min() + 1e-6)
        deviations[scene] = np.abs(best - border).min()
    return deviations


def _measure_all(videos, stories):
    """`measure` of every scene, as arrays [n, S]."""
    scene_counts = {len(story.actions) for story in stories}
    if len(videos) != len(stories) or len(scene_counts) != 1:
        raise ValueError(
            f'{len(videos)} videos for {len(stories)} stories with {sorted(scene_counts)} scenes; '
            'give one video per story and stories with equal numbers of scenes.'
        )

    # Scenes of equal length are measured together.
    groups = {}
    for n, (video, story) in enumerate(zip(videos, stories)):
        if len(video) != sum(story.frames):
            raise ValueError(
                f'video {n} has {len(video)} frames, its story {sum(story.frames)}; they must '
                'agree.'
            )
        for s, clip in enumerate(np.split(_as_float(video), np.cumsum(story.frames)[:-1])):
            groups.setdefault(clip.shape, []).append((n, s, clip))

    shape = (len(stories), *scene_counts)  # [n, S]
    measured = {name: np.empty(shape, int) for name in ('action', 'color', 'shape', 'background')}
    measured['residual'] = np.empty(shape)
    for group in groups.values():
        rows, columns, clips = zip(*group)
        for name, values in measure(np.stack(clips)).items():
            measured[name][rows, columns] = values
    return measured


def _as_float(video):
    """uint8 or float video as float32 in [0, 1]."""
    return np.asarray(video, np.float32) / (255 if video.dtype == np.uint8 else 1)


def measure(clips: np.ndarray) -> dict[str, np.ndarray]:
    """What scenes of equal length show, whatever they were meant to show.

    Args:
        clips: [B, F, H, W, 3] float in [0, 1], one scene each, H = W.

    Returns:
        Indices 'background', 'color', 'shape', 'action' into the tuples of world.py, int [B], -1
        where the scene shows none of them, and 'residual' float [B]: root of the squared error
        between the scene and its best rendering (the measured palette colours, shape and frames;
        centre and scale fitted per frame) over the root of the squared contrast of that rendering
        with its background. 0 is perfect, 1 as bad as showing no character; 1 where no character is
        found.
    """
    clips = np.asarray(clips, np.float32)
    ground = _background_color(clips)  # [B, 3]
    paint = _character_color(clips, ground)  # [B, 3]
    contrast = np.linalg.norm(paint - ground, axis=-1)  # [B]

    alpha = _alpha(clips, ground, paint, contrast)  # [B, F, H, W]
    best = _recognise(alpha)

    found = (contrast > LEAST_CONTRAST) & _explains(best.coverage, alpha)
    return {
        'background': _nearest(ground, world.BACKGROUND_RGB.values(), BACKGROUND_RADIUS),
        'color': np.where(found, _nearest(paint, world.COLOR_RGB.values(), COLOR_RADIUS), -1),
        'shape': np.where(found, best.shape, -1),
        'action': np.where(found, best.action, -1),
        'residual': np.where(found, _residual(clips, best.coverage, ground, paint), 1.0),
    }


def _background_color(clips):
    """[B, 3] median colour of the frame's border."""
    border = np.ones(clips.shape[2:4], bool)
    border[BORDER_PX:-BORDER_PX, BORDER_PX:-BORDER_PX] = False
    return np.median(clips[:, :, border], axis=(1, 2))


def _character_color(clips, ground):
    """[B, 3] median colour of the pixels that deviate most from the background."""
    B, F, height, _, _ = clips.shape
    pixels = clips.reshape(B, -1, 3)
    deviation = np.linalg.norm(pixels - ground[:, None], axis=-1)

    count = max(1, int(COLOR_PIXELS * F * (height / world.UNITS) ** 2))
    most = np.argpartition(-deviation, count, axis=1)[:, :count]
    return np.median(np.take_along_axis(pixels, most[..., None], 1), axis=1)


def _alpha(clips, ground, paint, contrast):
    """[B, F, H, W] in [0, 1]: part of the way from the background's to the character's colour."""
    change = np.einsum('nfhwc,nc->nfhw', clips - ground[:, None, None, None], paint - ground)
    length = np.maximum(contrast, LEAST_CONTRAST)[:, None, None, None]
    return np.clip(change / length**2, 0, 1)


def _explains(drawn, alpha):
    """[B]: the rendering leaves over little enough of the scene."""
    error = np.sum((alpha - drawn) ** 2, axis=(1, 2, 3))
    energy = np.sum(alpha**2, axis=(1, 2, 3))
    return error < LARGEST_ERROR * energy


def _nearest(rgb, palette, radius):
    """[B] index of the nearest palette colour, -1 beyond `radius`."""
    distance = np.linalg.norm(rgb[:, None] - np.array(list(palette)), axis=-1)  # [B, colours]
    return np.where(distance.min(1) <= radius, distance.argmin(1), -1)


def _residual(clips, drawn, ground, paint):
    """[B] relative error against the rendering with the nearest palette colours."""
    ground = _to_palette(ground, world.BACKGROUND_RGB.values())
    paint = _to_palette(paint, world.COLOR_RGB.values())

    contrast = drawn[..., None] * (paint - ground)  # [B, F, H, W, 3]
    error = np.sum((clips - ground - contrast) ** 2, axis=(1, 2, 3, 4))
    energy = np.sum(contrast**2, axis=(1, 2, 3, 4))
    return np.sqrt(error / np.maximum(energy, 1e-6))


def _to_palette(rgb, palette):
    """[B, 1, 1, 1, 3] the nearest palette colours."""
    palette = np.array(list(palette), np.float32)
    return palette[_nearest(rgb, palette, np.inf)][:, None, None, None]


class _Candidates(NamedTuple):
    """Every shape doing every action from a grid of starts: what a scene is compared with.

    Attributes:
        shapes: [K] indices into world.SHAPES.
        actions: [K] indices into world.ACTIONS.
        coverages: [K, F, size, size] float32.
        centers: [K, F, 2] float32, in px.
        scales: [K, F] float32.
    """

    shapes: np.ndarray
    actions: np.ndarray
    coverages: np.ndarray
    centers: np.ndarray
    scales: np.ndarray


class _Recognised(NamedTuple):
    """The rendering that fits each scene best.

    Attributes:
        shape: [B] indices into world.SHAPES.
        action: [B] indices into world.ACTIONS.
        coverage: [B, F, H, W], centre and scale fitted per frame.
    """

    shape: np.ndarray
    action: np.ndarray
    coverage: np.ndarray


@functools.cache
def _candidates(frames: int, size_px: int) -> _Candidates:
    """The candidates for scenes of this length and size."""
    offsets = np.stack(np.meshgrid(START_GRID, START_GRID, indexing='ij'), -1).reshape(-1, 2)

    kinds, coverages, centers, scales = [], [], [], []
    for shape, shape_name in enumerate(world.SHAPES):
        for action, action_name in enumerate(world.ACTIONS):
            middle = np.array(world.MOTIONS[action_name].travel) / 2
            starts = (world.UNITS / 2 + offsets - middle) * size_px / world.UNITS
            mask = rendering.scene_coverage(shape_name, action_name, frames, starts, size_px)

            kinds.append((shape, action))
            coverages.append(mask.coverage)
            centers.append(mask.centers)
            scales.append(np.broadcast_to(mask.scales, mask.centers.shape[:-1]))

    shapes, actions = np.repeat(kinds, len(offsets), axis=0).T
    return _Candidates(
        shapes,
        actions,
        np.concatenate(coverages),
        np.concatenate(centers),
        np.concatenate(scales),
    )


def _recognise(alpha) -> _Recognised:
    """The candidates nearest to the coverages [B, F, H, W], refined."""
    F, H, W = alpha.shape[1:]
    candidates = _candidates(F, H)
    best = _best_candidates(alpha, candidates.coverages)  # [B]
    shape = candidates.shapes[best]
    centers = candidates.centers[best]
    scales = candidates.scales[best]

    # All frames of one shape are refined together, each by itself.
    drawn = np.empty_like(alpha)
    for i, name in enumerate(world.SHAPES):
        own = shape == i
        refined = _refine(
            alpha[own].reshape(-1, H, W),
            centers[own].reshape(-1, 2),
            scales[own].reshape(-1),
            name,
        )
        drawn[own] = refined.reshape(-1, F, H, W)

    # A blink stays a blink: frames without the character have none after the refinement either.
    shown = candidates.coverages[best].any((2, 3))  # [B, F]
    return _Recognised(shape, candidates.actions[best], drawn * shown[:, :, None, None])


def _best_candidates(alpha, coverages):
    """[B] index of the candidate with the least squared error, each faded as suits it best."""
    flat = alpha.reshape(len(alpha), -1)
    tried = coverages.reshape(len(coverages), -1)

    overlap = flat @ tried.T  # [B, K]
    energy = np.sum(tried**2, axis=1)  # [K]
    strength = np.clip(overlap / energy, FAINTEST, 1)

    # The squared error without the energy of the scene, which is the same for all candidates.
    error = strength**2 * energy - 2 * strength * overlap
    return np.argmin(error, axis=1)


def _refine(alpha, center, scale, shape):
    """Rendering [frames, H, W] of the shape after Gauss-Newton steps on centre and scale."""
    size = alpha.shape[-1]
    flat = alpha.reshape(-1, size * size)

    # A state is (y, x, scale): the centre in px, and the scale.
    state = np.concatenate([center, scale[:, None]], 1).astype(np.float32)  # [frames, 3]
    unit_px = size / world.UNITS
    steps = np.array([CENTER_STEP * unit_px, CENTER_STEP * unit_px, SCALE_STEP])
    steps = np.diag(steps).astype(np.float32)  # a row per direction
    limit = steps.sum(0) * LARGEST_MOVE
    lowest = [0, 0, SCALE_RANGE[0]]
    highest = [size, size, SCALE_RANGE[1]]

    def draw(state):
        drawn = rendering.coverage(shape, state[:, :2], state[:, 2], size)
        return drawn.reshape(-1, size * size)

    for _ in range(REFINE_STEPS):
        slopes = [(draw(state + step) - draw(state - step)) / (2 * step.sum()) for step in steps]
        slopes = np.stack(slopes, 1)  # [frames, 3, H W]
        error = flat - draw(state)  # [frames, H W]

        normal = slopes @ slopes.transpose(0, 2, 1) + DAMPING * np.eye(3, dtype=np.float32)
        change = np.linalg.solve(normal, slopes @ error[..., None])[..., 0]  # [frames, 3]

        moved = state + np.clip(change, -limit, limit)
        state = np.clip(moved, lowest, highest).astype(np.float32)

    return draw(state).reshape(alpha.shape)
