"""The world of stories: a character (shape, colour) on a background does one action in every scene.

A Story has one character on one background in all scenes. A CastStory has a few characters and a
few places, which have names, leave, and come back: it asks for memory. Both kinds say per scene
what it shows (`who`, `where`, `shapes`, `colors`, `backgrounds`, `actions`), and everything that
draws, tells or scores stories reads only that.

This file has the world's constants, the stories and their captions; cast.py draws a CastStory's
content at random, rendering.py its pictures. The world is analytic and so small that a model learns
it in minutes and that a picture can be scored exactly (scores.py).

Lengths are in units of 1/16 of the frame (UNITS), so that a larger frame shows the same story with
more pixels. Pairs of lengths are (y, x).
"""

import dataclasses
import hashlib
import itertools
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

# Words for the characters and the places of a CastStory. They mean nothing by themselves: each
# story gives them other looks.
NAMES = ('ann', 'bob', 'eve', 'joe')
PLACES = ('home', 'park', 'shop', 'lake')

GRAMMAR = (
    "'<color> <shape> on <background> <action>' or 'it <action>', in a story with a cast "
    "'<name> <color> <shape> at <place> <background> <action>', or without what was said before "
    "'<name> at <place> <action>', with "
    f'color {"|".join(COLORS)}, '
    f'shape {"|".join(SHAPES)}, '
    f'background {"|".join(BACKGROUNDS)}, '
    f'name {"|".join(NAMES)}, '
    f'place {"|".join(PLACES)}, '
    f'action {"|".join(ACTIONS)}'
)
PAD = '<pad>'
_ACTION_WORDS = ' '.join(ACTIONS).split()
_NOUNS = {*COLORS, *SHAPES, *BACKGROUNDS, *NAMES, *PLACES}
VOCABULARY = tuple(sorted({'it', 'on', 'at', *_NOUNS, *_ACTION_WORDS}))

# Runs of so many scenes of a CastStory are held out for the test split.
HELD_OUT_SCENES = 4

# The name of a Story's only character, and of its place.
IT = 'it'


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
        _check_scenes(self)

    @property
    def who(self) -> tuple[str, ...]:
        """Name of the character of each scene."""
        return (IT,) * len(self.actions)

    @property
    def where(self) -> tuple[str, ...]:
        """Name of the place of each scene."""
        return (IT,) * len(self.actions)

    @property
    def shapes(self) -> tuple[str, ...]:
        """Shape of the character of each scene."""
        return (self.shape,) * len(self.actions)

    @property
    def colors(self) -> tuple[str, ...]:
        """Colour of the character of each scene."""
        return (self.color,) * len(self.actions)

    @property
    def backgrounds(self) -> tuple[str, ...]:
        """Background of each scene."""
        return (self.background,) * len(self.actions)


class Character(NamedTuple):
    """Someone in a CastStory."""

    name: str  # of NAMES
    shape: str
    color: str


class Place(NamedTuple):
    """Somewhere in a CastStory."""

    name: str  # of PLACES
    background: str


@dataclasses.dataclass(frozen=True)
class CastStory:
    """One story with a cast: every scene shows one of its characters at one of its places.

    Attributes:
        characters: the cast; names differ.
        places: names differ.
        who: name of the character of each scene.
        where: name of the place of each scene.
        actions, frames, starts, size_px: as in Story.
    """

    characters: tuple[Character, ...]
    places: tuple[Place, ...]
    who: tuple[str, ...]
    where: tuple[str, ...]
    actions: tuple[str, ...]
    frames: tuple[int, ...]
    starts: tuple[tuple[float, float], ...]
    size_px: int = 16

    def __post_init__(self):
        """Refuses names outside the world or the story, and tuples of unequal length."""
        for character in self.characters:
            _check_known(character.name, NAMES)
            _check_known(character.shape, SHAPES)
            _check_known(character.color, COLORS)
        for place in self.places:
            _check_known(place.name, PLACES)
            _check_known(place.background, BACKGROUNDS)

        for known, used in ((self.characters, self.who), (self.places, self.where)):
            names = [entry.name for entry in known]
            if len(set(names)) < len(names):
                raise ValueError(f'names {names} repeat: give each character and place its own.')
            for name in used:
                if name not in names:
                    raise ValueError(f'{name!r} has no look in this story: use {", ".join(names)}.')
            if len(used) != len(self.actions):
                raise ValueError(
                    f'a story of {len(self.actions)} actions needs as many characters and places, '
                    f'not {used}.'
                )
        _check_scenes(self)

    @property
    def shapes(self) -> tuple[str, ...]:
        """Shape of the character of each scene."""
        looks = {character.name: character.shape for character in self.characters}
        return tuple(looks[name] for name in self.who)

    @property
    def colors(self) -> tuple[str, ...]:
        """Colour of the character of each scene."""
        looks = {character.name: character.color for character in self.characters}
        return tuple(looks[name] for name in self.who)

    @property
    def backgrounds(self) -> tuple[str, ...]:
        """Background of each scene."""
        looks = {place.name: place.background for place in self.places}
        return tuple(looks[name] for name in self.where)


AnyStory = Story | CastStory


def _check_scenes(story):
    """Raises ValueError for scenes that no story can have."""
    for action in story.actions:
        _check_known(action, ACTIONS)

    if not len(story.actions) == len(story.frames) == len(story.starts) > 0:
        raise ValueError(
            f'a story needs as many actions ({len(story.actions)}) as frame counts '
            f'({len(story.frames)}) and starts ({len(story.starts)}), and at least one.'
        )

    if min(story.frames) < 2:
        raise ValueError(
            f'frames {story.frames}: a scene needs at least 2 frames to show an action.'
        )


def _check_known(name, known):
    """Raises ValueError if `name` is not among the known names."""
    if name not in known:
        raise ValueError(
            f'{name!r} is not in the world of stories; choose from {", ".join(known)}.'
        )


def story_to_json(story: AnyStory) -> str:
    """The story as JSON text; `story_from_json` returns an equal story."""
    return json.dumps(dataclasses.asdict(story))


def story_from_json(text: str) -> AnyStory:
    """The story of a text that `story_to_json` wrote."""
    fields = json.loads(text)

    # JSON has lists only; a story is hashable and compares equal only with tuples.
    fields['actions'] = tuple(fields['actions'])
    fields['frames'] = tuple(fields['frames'])
    fields['starts'] = tuple(tuple(start) for start in fields['starts'])
    if 'characters' not in fields:
        return Story(**fields)

    fields['characters'] = tuple(Character(*entry) for entry in fields['characters'])
    fields['places'] = tuple(Place(*entry) for entry in fields['places'])
    fields['who'] = tuple(fields['who'])
    fields['where'] = tuple(fields['where'])
    return CastStory(**fields)


def is_test(shape: str, color: str, background: str, actions: tuple[str, ...]) -> bool:
    """True for the combinations that are held out for the test split, an eighth of all.

    A hash decides, so that the answer is the same on every machine and in every version.
    """
    text = '|'.join((shape, color, background, *actions))
    return hashlib.sha256(text.encode()).digest()[0] % 8 == 0


def held_out_action(looks: list[tuple[str, ...]], actions: tuple[str, ...]) -> str:
    """The last action with which a run of scenes of a CastStory is held out.

    A hash decides, as in `is_test`: whatever else a run shows, one of its eight last actions is for
    the test split. Names do not count, so that other names make no other run of it.

    Args:
        looks: (shape, color, background) of each scene of the run.
        actions: of the scenes before the last one.
    """
    text = '|'.join((*itertools.chain(*looks), *actions))
    return ACTIONS[hashlib.sha256(text.encode()).digest()[0] % len(ACTIONS)]


def is_held_out(story: AnyStory, start: int, stop: int) -> bool:
    """Whether scenes of a story show what is held out for the test split.

    Of a Story, `is_test` decides. Of a CastStory, a run of HELD_OUT_SCENES scenes (fewer if `start`
    to `stop` are fewer) is held out as `held_out_action` says, and more scenes are if any such run
    among them is. Training stories of cast.py have no such run, test stories none other: no window
    of HELD_OUT_SCENES or more scenes of (character, place, action) is seen in training and in
    tests, however long the stories are.

    Args:
        story: the story.
        start: the first of the scenes.
        stop: the scene after the last one.
    """
    if isinstance(story, Story):
        return is_test(story.shape, story.color, story.background, story.actions[start:stop])

    looks = list(zip(story.shapes, story.colors, story.backgrounds))
    length = min(HELD_OUT_SCENES, stop - start)
    for last in range(start + length - 1, stop):
        first = last - length + 1
        held_out = held_out_action(looks[first : last + 1], story.actions[first:last])
        if story.actions[last] == held_out:
            return True
    return False


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
    check_split(split)

    # Draw until the combination belongs to the split.
    while True:
        shape = SHAPES[rng.integers(len(SHAPES))]
        color = COLORS[rng.integers(len(COLORS))]
        background = BACKGROUNDS[rng.integers(len(BACKGROUNDS))]
        actions = tuple(ACTIONS[i] for i in rng.integers(len(ACTIONS), size=len(frames)))
        if is_test(shape, color, background, actions) == (split == 'test'):
            break

    starts = tuple(sample_start(rng, shape, action, size_px) for action in actions)
    return Story(shape, color, background, actions, tuple(frames), starts, size_px)


def check_split(split: str) -> None:
    """Raises ValueError for anything but 'train' and 'test'."""
    if split not in ('train', 'test'):
        raise ValueError(f"split {split!r} is unknown; use 'train' or 'test'.")


def sample_start(
    rng: np.random.Generator, shape: str, action: str, size_px: int
) -> tuple[float, float]:
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


def captions(story: AnyStory, style: str = 'first', given: int = 0) -> list[str]:
    """One caption per scene.

    Args:
        story: the story.
        style: 'first' describes a look once, at the scene that shows it first ('red ring on gray
            moves left', then 'it grows'; with a cast 'ann red ring at home gray moves left', then
            'ann at home grows' and 'ann at park white grows'), 'every' in every scene, 'never'
            nowhere but, with a cast, where a scene shows what no given scene has shown.
        given: leading scenes whose video is given, for the style 'never'.

    Returns:
        S captions, words of VOCABULARY.

    Raises:
        ValueError: for another style.
    """
    if style not in ('first', 'every', 'never'):
        raise ValueError(f"caption style {style!r} is unknown; use 'first', 'every' or 'never'.")

    # Names whose look needs no words any more.
    known = {IT, *story.who[:given], *story.where[:given]} if style == 'never' else set()

    texts = []
    scenes = zip(story.who, story.where, story.shapes, story.colors, story.backgrounds)
    for (who, where, shape, color, background), action in zip(scenes, story.actions):
        if who == IT:
            start = 'it' if IT in known else f'{color} {shape} on {background}'
        else:
            character = who if who in known else f'{who} {color} {shape}'
            place = where if where in known else f'{where} {background}'
            start = f'{character} at {place}'
        texts.append(f'{start} {action}')
        if style != 'every':
            known |= {who, where}
    return texts


def described(caption: str) -> set[str]:
    """Names of what a caption of `captions` describes: character and place, IT, or nothing."""
    words = caption.split()
    if words[0] in COLORS:
        return {IT}

    # The look follows the name.
    found = set()
    for name, following in itertools.pairwise(words):
        is_look = (name in NAMES and following in COLORS) or (
            name in PLACES and following in BACKGROUNDS
        )
        if is_look:
            found.add(name)
    return found


def parse_captions(texts: list[str]) -> tuple[str, str, str, tuple[str, ...]]:
    """Inverse of `captions` for stories of one character; cast.py has that for others.

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
        raise grammar_error(text)
    return identity, action


def grammar_error(text: str) -> ValueError:
    """The error that says what is wrong with a caption, and shows the grammar."""
    strange = [word for word in text.split() if word not in VOCABULARY]
    reason = 'does not follow the grammar'
    if strange:
        reason = f'contains the unknown word {strange[0]!r}'
    return ValueError(f'caption {text!r} {reason}; write {GRAMMAR}.')


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
