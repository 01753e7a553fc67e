"""The world of stories: a character (shape, colour) on a background does one action in every scene.

All of it is analytic and small enough that a model learns it in minutes and that a picture can be
scored exactly (scores.py). Lengths are in units of 1/16 of the frame, so that a larger frame shows
the same story with more pixels.
"""

import dataclasses
import hashlib
import json

import numpy as np

# Half height and half width at scale 1. Shapes differ at low spatial frequency: these are learnt
# far sooner than circle / square / triangle / cross.
EXTENTS = {'ball': (3.2, 3.2), 'bar': (1.8, 4.0), 'tower': (4.0, 1.8), 'ring': (4.0, 4.0)}
HOLE = 1.8  # inner radius of the ring at scale 1
EDGE = 2.0  # width of the ramp from full coverage to none: soft edges lose half as much in the linear codec
SHAPES = tuple(EXTENTS)
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
# Total displacement (y, x) and scale at the first and the last frame; a scene of any length shows
# the whole action.
TRAVEL = 5.0
SMALL, LARGE = 0.75, 1.25
JITTER = 0.6  # how far the middle of the path lies from the centre of the frame, at most; wider is learnt much later
MOTIONS = {
    'moves left': ((0.0, -TRAVEL), (1.0, 1.0)),
    'moves right': ((0.0, TRAVEL), (1.0, 1.0)),
    'moves up': ((-TRAVEL, 0.0), (1.0, 1.0)),
    'moves down': ((TRAVEL, 0.0), (1.0, 1.0)),
    'grows': ((0.0, 0.0), (SMALL, LARGE)),
    'shrinks': ((0.0, 0.0), (LARGE, SMALL)),
    'blinks': ((0.0, 0.0), (1.0, 1.0)),
    'stays': ((0.0, 0.0), (1.0, 1.0)),
}
ACTIONS = tuple(MOTIONS)
MARGIN = EDGE / 2  # keeps the soft edge inside the frame too
GRAMMAR = f"""'<color> <shape> on <background> <action>' or 'it <action>' with color {'|'.join(COLORS)}, \
shape {'|'.join(SHAPES)}, background {'|'.join(BACKGROUNDS)}, action {'|'.join(ACTIONS)}"""
PAD = '<pad>'
VOCABULARY = tuple(sorted({'it', 'on', *COLORS, *SHAPES, *BACKGROUNDS, *' '.join(ACTIONS).split()}))


@dataclasses.dataclass(frozen=True)
class Story:
    """One story; everything that its video depends on.

    Attributes:
        shape, color, background: what persists through all scenes.
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
        named = [(self.shape, SHAPES), (self.color, COLORS), (self.background, BACKGROUNDS)]
        for name, known in named + [(action, ACTIONS) for action in self.actions]:
            if name not in known:
                raise ValueError(
                    f'{name!r} is not in the world of stories; choose from {", ".join(known)}.'
                )
        if not len(self.actions) == len(self.frames) == len(self.starts) > 0:
            raise ValueError(
                f'a story needs as many actions ({len(self.actions)}) as frame counts '
                f'({len(self.frames)}) and starts ({len(self.starts)}), and at least one.'
            )
        if min(self.frames) < 2:
            raise ValueError(
                f'frames {self.frames}: a scene needs at least 2 frames to show an action.'
            )


def is_test(shape: str, color: str, background: str, actions: tuple[str, ...]) -> bool:
    """True for the eighth of all combinations that is held out for the test split (a stable hash
    decides)."""
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

    Raises:
        ValueError: for another split, or frames that a Story refuses.
    """
    if split not in ('train', 'test'):
        raise ValueError(f"split {split!r} is unknown; use 'train' or 'test'.")
    while True:
        shape, color, background = (
            names[rng.integers(len(names))] for names in (SHAPES, COLORS, BACKGROUNDS)
        )
        actions = tuple(ACTIONS[i] for i in rng.integers(len(ACTIONS), size=len(frames)))
        if is_test(shape, color, background, actions) == (split == 'test'):
            break
    starts = tuple(_sample_start(rng, shape, action, size_px) for action in actions)
    return Story(shape, color, background, actions, tuple(frames), starts, size_px)


def _sample_start(rng, shape, action, size_px):
    """A start centre (y, x) in px from which the whole action stays inside the frame."""
    travel, scales = MOTIONS[action]
    start = []
    for half, way, chance in zip(EXTENTS[shape], travel, rng.random(2)):
        reach = half * max(scales) + MARGIN
        middle = 8 + np.array((-JITTER, JITTER)) - way / 2
        low, high = np.clip(middle, reach - min(way, 0), 16 - reach - max(way, 0))
        start.append(round(float(low + chance * (high - low)) * size_px / 16, 3))
    return tuple(start)


def coverage(shape: str, center: np.ndarray, scale: np.ndarray, size_px: int) -> np.ndarray:
    """Fraction of each pixel that the shape covers, with soft edges.

    Args:
        shape: one of SHAPES.
        center: [..., 2] centres (y, x) in px; pixel i spans i to i + 1.
        scale: [...] scale of the shape.
        size_px: height and width of the frame.

    Returns:
        [..., size_px, size_px] in [0, 1], of the dtype of `center`.
    """
    unit = size_px / 16
    offset = (
        np.abs((np.arange(size_px) + 0.5).astype(center.dtype) - center[..., None]) / unit
    )  # [..., 2, size]
    scale = scale.astype(center.dtype)[..., None, None]
    if shape in ('bar', 'tower'):
        half = np.array(EXTENTS[shape], center.dtype)[:, None] * scale  # [..., 2, 1]
        along = _ramp(half - offset) - _ramp(-half - offset)
        return along[..., 0, :, None] * along[..., 1, None, :]
    distance = np.sqrt(offset[..., 0, :, None] ** 2 + offset[..., 1, None, :] ** 2)
    outer = _ramp(EXTENTS[shape][0] * scale - distance)
    return outer if shape == 'ball' else outer - _ramp(HOLE * scale - distance)


def _ramp(inside):
    """Coverage at a signed distance inside an edge."""
    return np.clip(inside / EDGE + 0.5, 0, 1)


def visible_frames(action: str, frames: int) -> np.ndarray:
    """[frames] bool: where the character is shown. A blink alternates by pairs: on, on, off, off,
    on, on, ..."""
    # by pairs, so that patches of 2 frames need no component for it; by single frames in scenes of
    # 2 or 3
    pair = min(2, frames // 2)
    return (np.arange(frames) // pair % 2 == 0) | (action != 'blinks')


def scene_coverage(shape: str, action: str, frames: int, start: np.ndarray, size_px: int):
    """One scene's character without its colours.

    Args:
        shape: one of SHAPES.
        action: one of ACTIONS.
        frames: F.
        start: [..., 2] start centres (y, x) in px.
        size_px: height and width of the frame.

    Returns:
        Coverage [..., F, size, size], centres [..., F, 2] and scales [F], float32.
    """
    travel, (first, last) = MOTIONS[action]
    time = np.linspace(0, 1, frames, dtype=np.float32)
    path = time[:, None] * np.array(travel, np.float32) * size_px / 16
    centers = np.asarray(start, np.float32)[..., None, :] + path
    scales = (first + time * (last - first)).astype(np.float32)
    alpha = (
        coverage(shape, centers, scales, size_px) * visible_frames(action, frames)[:, None, None]
    )
    return alpha, centers, scales


def render(story: Story) -> np.ndarray:
    """Draws the story: uint8 [F, size, size, 3], scenes one after the other."""
    background = np.array(BACKGROUND_RGB[story.background], np.float32) * 255
    change = np.array(COLOR_RGB[story.color], np.float32) * 255 - background
    alpha = np.concatenate(
        [
            scene_coverage(story.shape, action, frames, start, story.size_px)[0]
            for action, frames, start in zip(story.actions, story.frames, story.starts)
        ]
    )
    video = background + alpha[..., None] * change  # [F, H, W, 3]
    return (video + 0.5).astype(np.uint8)


def captions(story: Story, style: str = 'first') -> list[str]:
    """One caption per scene.

    Args:
        story: the story.
        style: 'first' names the identity in scene 1 only ('red ring on gray moves left', then 'it
            grows'), 'every' in every scene.

    Raises:
        ValueError: for another style.
    """
    if style not in ('first', 'every'):
        raise ValueError(f"caption style {style!r} is unknown; use 'first' or 'every'.")
    identity = f'{story.color} {story.shape} on {story.background}'
    return [
        f'{identity if i == 0 or style == "every" else "it"} {action}'
        for i, action in enumerate(story.actions)
    ]


def parse_captions(texts: list[str]) -> tuple[str, str, str, tuple[str, ...]]:
    """Inverse of `captions`: (shape, color, background, actions).

    Raises:
        ValueError: for a caption outside the grammar, for two captions that name different
            identities and when none names one; the message shows the grammar.
    """
    parsed = [_parse_caption(text) for text in texts]
    identities = dict.fromkeys(
        identity for identity, _ in parsed if identity
    )  # ordered, without repeats
    if len(identities) != 1:
        raise ValueError(
            f'captions {texts} name {len(identities)} identities instead of one; write {GRAMMAR}.'
        )
    return *next(iter(identities)), tuple(action for _, action in parsed)


def _parse_caption(text):
    """(identity or None, action) of one caption, identity = (shape, color, background)."""
    words = text.split()
    identity = None if words[:1] == ['it'] else (*words[1:2], *words[:1], *words[3:4])
    action = ' '.join(words[1:] if identity is None else words[4:])
    known = identity is None or (
        len(words) > 4
        and words[2] == 'on'
        and all(word in names for word, names in zip(identity, (SHAPES, COLORS, BACKGROUNDS)))
    )
    if not known or action not in ACTIONS:
        strange = [word for word in words if word not in VOCABULARY]
        reason = (
            f'contains the unknown word {strange[0]!r}'
            if strange
            else 'does not follow the grammar'
        )
        raise ValueError(f'caption {text!r} {reason}; write {GRAMMAR}.')
    return identity, action


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
    for text in texts:
        for word in text.split():
            if word not in VOCABULARY:
                raise ValueError(
                    f'caption {text!r} contains the unknown word {word!r}; known are '
                    f'{", ".join(VOCABULARY)}.'
                )
        if len(text.split()) > tokens:
            raise ValueError(
                f'caption {text!r} has {len(text.split())} words, more than {tokens} tokens; write '
                f'{GRAMMAR} with words from {", ".join(VOCABULARY)}.'
            )
    padded = [(text.split() + [PAD] * tokens)[:tokens] for text in texts]
    return np.array([[_word_vector(word, dim) for word in words] for words in padded], np.float32)


def _word_vector(word, dim):
    """[dim] uniform on ±sqrt(3), straight from the hash: the same on every platform and numpy
    version."""
    bits = np.frombuffer(hashlib.shake_256(word.encode()).digest(4 * dim), '<u4')
    return (bits / 2**32 * 2 - 1) * np.sqrt(3)


def story_to_json(story: Story) -> str:
    """The story as JSON text; `story_from_json` returns an equal Story."""
    return json.dumps(dataclasses.asdict(story))


def story_from_json(text: str) -> Story:
    """The story of a text written by `story_to_json`."""
    fields = json.loads(text)
    fields['starts'] = tuple(tuple(start) for start in fields['starts'])
    return Story(**fields | {name: tuple(fields[name]) for name in ('actions', 'frames')})
