"""The world of stories: a character (shape, colour) on a background does one action in every scene.

This file has the world's constants, the Story and its captions; rendering.py draws a Story. The
world is analytic and so small that a model learns it in minutes and that a picture can be scored
exactly (scores.py).

Lengths are in units of 1/16 of the frame (UNITS), so that a larger frame shows the same story with
more pixels. Pairs of lengths are (y, x).
"""

import dataclasses
import hashlib
import json
from typing import NamedTuple

import numpy as np

# The height and the width of the frame, in units.
UNITS = 16

# Half height and half width at scale 1. The shapes differ at low spatial frequency: a model learns
# these far sooner than circle, square, triangle and cross.
EXTENTS = {
    'ball': (3.2, 3.2),
    'bar': (1.8, 4.0),
    'tower': (4.0, 1.8),
    'ring': (4.0, 4.0),
}
SHAPES = tuple(EXTENTS)

# Inner radius of the ring at scale 1.
HOLE = 1.8

# Width of the ramp from full coverage to none. The linear codec loses half as much of such a soft
# edge as of a hard one.
EDGE = 2.0

# Distance that a shape keeps from the frame's border, so that its soft edge stays inside too.
MARGIN = EDGE / 2

# Red, green and blue in [0, 1].
COLOR_RGB = {
    'red': (1.0, 0.0, 0.0),
    'green': (0.0, 1.0, 0.0),
    'blue': (0.0, 0.0, 1.0),
    'yellow': (1.0, 1.0, 0.0),
    'magenta': (1.0, 0.0, 1.0),
    'cyan': (0.0, 1.0, 1.0),
}
COLORS = tuple(COLOR_RGB)

BACKGROUND_RGB = {
    'black': (0.0, 0.0, 0.0),
    'gray': (0.5, 0.5, 0.5),
    'white': (1.0, 1.0, 1.0),
    'brown': (0.4, 0.2, 0.0),
}
BACKGROUNDS = tuple(BACKGROUND_RGB)

# Largest distance between the middle of a character's path and the centre of the frame, per axis.
# With a wider spread a model learns the stories much later.
JITTER = 0.6

# Displacement of a character that moves, from its first to its last frame.
TRAVEL = 5.0

# First and last scale of a character that grows.
SMALL = 0.75
LARGE = 1.25


class Motion(NamedTuple):
    """What an action changes between the first and the last frame, whatever the scene's length.

    Attributes:
        travel: displacement (y, x) in units.
        scales: first and last scale of the shape.
    """

    travel: tuple[float, float] = (0.0, 0.0)
    scales: tuple[float, float] = (1.0, 1.0)


MOTIONS = {
    'moves left': Motion(travel=(0.0, -TRAVEL)),
    'moves right': Motion(travel=(0.0, TRAVEL)),
    'moves up': Motion(travel=(-TRAVEL, 0.0)),
    'moves down': Motion(travel=(TRAVEL, 0.0)),
    'grows': Motion(scales=(SMALL, LARGE)),
    'shrinks': Motion(scales=(LARGE, SMALL)),
    'blinks': Motion(),
    'stays': Motion(),
}
ACTIONS = tuple(MOTIONS)

GRAMMAR = (
    "'<color> <shape> on <background> <action>' or 'it <action>' with "
    f'color {"|".join(COLORS)}, '
    f'shape {"|".join(SHAPES)}, '
    f'background {"|".join(BACKGROUNDS)}, '
    f'action {"|".join(ACTIONS)}'
)
PAD = '<pad>'
_ACTION_WORDS = ' '.join(ACTIONS).split()
VOCABULARY = tuple(sorted({'it', 'on', *COLORS, *SHAPES, *BACKGROUNDS, *_ACTION_WORDS}))


@dataclasses.dataclass(frozen=True)
class Story:
    """One story; everything that its video depends on.

    Attributes:
        shape: one of SHAPES, the same in all scenes.
        color: one of COLORS, the same in all scenes.
        background: one of BACKGROUNDS, the same in all scenes.
        actions: one action per scene.
        frames: video frames per scene, each at least 2.
        starts: centre (y, x) of the character at the first frame of each scene, in px.
        size_px: height and width of the frame.
    """

    shape: str
    color: str
    background: str
    actions: tuple[str, ...]
    frames: tuple[int, ...]
    starts: tuple[tuple[float, float], ...]
    size_px: int = 16

    def __post_init__(self):
        """Refuses names outside the world and tuples of unequal length."""
        _check_known(self.shape, SHAPES)
        _check_known(self.color, COLORS)
        _check_known(self.background, BACKGROUNDS)
        for action in self.actions:
            _check_known(action, ACTIONS)

        if not len(self.actions) == len(self.frames) == len(self.starts) > 0:
            raise ValueError(
                f'a story needs as many actions ({len(self.actions)}) as frame counts '
                f'({len(self.frames)}) and starts ({len(self.starts)}), and at least one.'
            )

        if min(self.frames) < 2:
            raise ValueError(
                f'frames {self.frames}: a scene needs at least 2 frames to show an action.'
            )


def _check_known(name, known):
    """Raises ValueError if `name` is not among the known names."""
    if name not in known:
        raise ValueError(
            f'{name!r} is not in the world of stories; choose from {", ".join(known)}.'
        )


def story_to_json(story: Story) -> str:
    """The story as JSON text; `story_from_json` returns an equal Story."""
    return json.dumps(dataclasses.asdict(story))


def story_from_json(text: str) -> Story:
    """The story of a text that `story_to_json` wrote."""
    fields = json.loads(text)

    # JSON has lists only; a Story is hashable and compares equal only with tuples.
    fields['actions'] = tuple(fields['actions'])
    fields['frames'] = tuple(fields['frames'])
    fields['starts'] = tuple(tuple(start) for start in fields['starts'])
    return Story(**fields)


def is_test(shape: str, color: str, background: str, actions: tuple[str, ...]) -> bool:
    """True for the combinations that are held out for the test split, an eighth of all.

    A hash decides, so that the answer is the same on every machine and in every version.
    """
    text = '|'.join((shape, color, background, *actions))
    return hashlib.sha256(text.encode()).digest()[0] % 8 == 0


def sample_story(
    rng: np.random.Generator, frames: tuple[int, ...], *, split: str, size_px: int = 16
) -> Story:
    """Draws a story with one scene per entry of `frames`.

    Args:
        rng: the source of all randomness.
        frames: video frames per scene.
        split: 'train' or 'test'; no combination (shape, color, background, actions) is in both.
        size_px: height and width of the frame.

    Returns:
        The story; the order of the draws is part of the data set.

    Raises:
        ValueError: for another split, or frames that a Story refuses.
    """
    if split not in ('train', 'test'):
        raise ValueError(f"split {split!r} is unknown; use 'train' or 'test'.")

    # Draw until the combination belongs to the split.
    while True:
        shape = SHAPES[rng.integers(len(SHAPES))]
        color = COLORS[rng.integers(len(COLORS))]
        background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
        actions = tuple(ACTIONS[i] for i in rng.integers(len(ACTIONS), size=len(frames)))
        if is_test(shape, color, background, actions) == (split == 'test'):
            break

    starts = tuple(_sample_start(rng, shape, action, size_px) for action in actions)
    return Story(shape, color, background, actions, tuple(frames), starts, size_px)


def _sample_start(rng, shape, action, size_px):
    """A start centre (y, x) in px from which the whole action stays inside the frame."""
    motion = MOTIONS[action]
    start = []
    for half, way, chance in zip(EXTENTS[shape], motion.travel, rng.random(2)):
        # The middle of the path lies near the centre of the frame.
        middle = UNITS / 2 + np.array((-JITTER, JITTER))
        low_high = middle - way / 2

        # Both ends of the path keep the largest scale inside the frame.
        reach = half * max(motion.scales) + MARGIN
        low, high = np.clip(low_high, reach - min(way, 0), UNITS - reach - max(way, 0))

        # Rounded, so that the JSON text is short and has the same number.
        position = float(low + chance * (high - low)) * size_px / UNITS
        start.append(round(position, 3))
    return tuple(start)


def captions(story: Story, style: str = 'first') -> list[str]:
    """One caption per scene.

    Args:
        story: the story.
        style: 'first' names the identity in scene 1 only ('red ring on gray moves left', then 'it
            grows'), 'every' in every scene, 'never' in none.

    Returns:
        S captions, words of VOCABULARY.

    Raises:
        ValueError: for another style.
    """
    if style not in ('first', 'every', 'never'):
        raise ValueError(f"caption style {style!r} is unknown; use 'first', 'every' or 'never'.")

    identity = f'{story.color} {story.shape} on {story.background}'
    texts = []
    for scene, action in enumerate(story.actions):
        named = style == 'every' or (style == 'first' and scene == 0)
        texts.append(f'{identity if named else "it"} {action}')
    return texts


def is_named(caption: str) -> bool:
    """Whether a caption says who and where."""
    return caption.split()[:1] != ['it']


def parse_captions(texts: list[str]) -> tuple[str, str, str, tuple[str, ...]]:
    """Inverse of `captions`.

    Args:
        texts: one caption per scene, of either style.

    Returns:
        (shape, color, background, actions).

    Raises:
        ValueError: for a caption outside the grammar, for two captions that name different
            identities and when none names one; the message shows the grammar.
    """
    parsed = [_parse_caption(text) for text in texts]
    identities = {identity for identity, _ in parsed if identity}
    actions = tuple(action for _, action in parsed)

    if len(identities) != 1:
        raise ValueError(
            f'captions {texts} name {len(identities)} identities instead of one; write {GRAMMAR}.'
        )
    (identity,) = identities
    return *identity, actions


def _parse_caption(text):
    """(identity or None, action) of one caption; identity is (shape, color, background)."""
    words = text.split()

    if words[:1] == ['it']:
        identity = None
        known = True
        action = ' '.join(words[1:])
    else:
        identity = (*words[1:2], *words[:1], *words[3:4])  # slices: the caption may be too short
        known = len(words) > 4 and words[2] == 'on' and _is_identity(*identity)
        action = ' '.join(words[4:])

    if not known or action not in ACTIONS:
        strange = [word for word in words if word not in VOCABULARY]
        reason = 'does not follow the grammar'
        if strange:
            reason = f'contains the unknown word {strange[0]!r}'
        raise ValueError(f'caption {text!r} {reason}; write {GRAMMAR}.')
    return identity, action


def _is_identity(shape, color, background):
    """True if all three names are in the world."""
    return shape in SHAPES and color in COLORS and background in BACKGROUNDS


def embed_captions(texts: list[str], tokens: int = 6, dim: int = 64) -> np.ndarray:
    """The text encoder of this world: a fixed random vector of unit variance per word.

    Args:
        texts: one caption per scene, words of VOCABULARY; '' is a caption of pad words only.
        tokens: tokens per caption; shorter captions are padded with the vector of the pad word.
        dim: size of a word vector.

    Returns:
        [S, tokens, dim] float32.

    Raises:
        ValueError: for a word outside the vocabulary or a caption of more than `tokens` words.
    """
    embedded = []
    for text in texts:
        words = text.split()
        _check_words(text, words, tokens)
        padded = (words + [PAD] * tokens)[:tokens]
        embedded.append([_word_vector(word, dim) for word in padded])
    return np.array(embedded, np.float32)  # [S, tokens, dim]


def _check_words(text, words, tokens):
    """Raises ValueError for a caption that `embed_captions` cannot embed."""
    known = ', '.join(VOCABULARY)
    for word in words:
        if word not in VOCABULARY:
            raise ValueError(
                f'caption {text!r} contains the unknown word {word!r}; known are {known}.'
            )

    if len(words) > tokens:
        raise ValueError(
            f'caption {text!r} has {len(words)} words, more than {tokens} tokens; write {GRAMMAR} '
            f'with words from {known}.'
        )


def _word_vector(word, dim):
    """[dim] values uniform on ±sqrt(3), which has unit variance."""
    # Straight from a hash, so that the values are the same on every platform and numpy version.
    digest = hashlib.shake_256(word.encode()).digest(4 * dim)
    bits = np.frombuffer(digest, '<u4')
    return (bits / 2**32 * 2 - 1) * np.sqrt(3)
