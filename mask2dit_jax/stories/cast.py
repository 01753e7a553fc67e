"""Stories with a cast: who is where in which scene, so that recall can be measured.

Characters and places follow each other independently. At each cut either one persists or changes,
so that cuts are of four kinds: the character persists, the place persists, both, or neither. In
every story one character and one place leave for a known number of scenes and come back.
"""

import re

import numpy as np

from mask2dit_jax.stories import world

# Fewest and most characters, and places, of a story.
LEAST_CAST = 2
LARGEST_CAST = 3

# Probability that the character of a scene stays for the next one, and that the place does.
PERSISTENCE = 0.5


def sample_cast_story(
    rng: np.random.Generator, frames: tuple[int, ...], *, split: str, size_px: int = 16
) -> world.CastStory:
    """Draws a story with a cast, with one scene per entry of `frames`.

    Looks are drawn anew for every story, so that a name says nothing by itself; no two characters
    of a story share a shape or a colour, and no two places a background.

    Args:
        rng: the source of all randomness.
        frames: video frames per scene.
        split: 'train' or 'test'. Training stories show nothing that world.is_held_out; in test
            stories every run of world.HELD_OUT_SCENES scenes (or all scenes, if there are fewer)
            is held out.
        size_px: height and width of the frame.

    Returns:
        The story; the order of the draws is part of the data set.

    Raises:
        ValueError: for another split, or frames that a CastStory refuses.
    """
    world.check_split(split)
    scenes = len(frames)

    count = rng.integers(LEAST_CAST, LARGEST_CAST + 1)
    looks = zip(*(_shuffled(rng, known) for known in (world.NAMES, world.SHAPES, world.COLORS)))
    characters = tuple(world.Character(*look) for look in list(looks)[:count])
    who = _sample_turns(rng, count, scenes)

    count = rng.integers(LEAST_CAST, LARGEST_CAST + 1)
    looks = zip(*(_shuffled(rng, known) for known in (world.PLACES, world.BACKGROUNDS)))
    places = tuple(world.Place(*look) for look in list(looks)[:count])
    where = _sample_turns(rng, count, scenes)

    shown = [
        (characters[one].shape, characters[one].color, places[other].background)
        for one, other in zip(who, where)
    ]
    actions = _sample_actions(rng, shown, split)
    starts = tuple(
        world.sample_start(rng, shape, action, size_px)
        for (shape, _, _), action in zip(shown, actions)
    )
    return world.CastStory(
        characters,
        places,
        tuple(characters[one].name for one in who),
        tuple(places[one].name for one in where),
        actions,
        tuple(frames),
        starts,
        size_px,
    )


def gaps(names: tuple[str, ...]) -> tuple[int, ...]:
    """How long ago each scene's character, or place, was shown.

    Args:
        names: `who` or `where` of a story.

    Returns:
        Scenes since the last one with the same name: 1 if it was the scene before, 0 if there is
        none.
    """
    last = {}
    found = []
    for scene, name in enumerate(names):
        found.append(scene - last.get(name, scene))
        last[name] = scene
    return tuple(found)


def parse_cast_captions(
    texts: list[str],
) -> tuple[
    tuple[world.Character, ...],
    tuple[world.Place, ...],
    tuple[str, ...],
    tuple[str, ...],
    tuple[str, ...],
]:
    """Inverse of `world.captions` for stories with a cast.

    Args:
        texts: one caption per scene, of the style 'first' or 'every'.

    Returns:
        (characters, places, who, where, actions) as in world.CastStory; characters and places in
        the order of the captions, and only those that captions name.

    Raises:
        ValueError: for a caption outside the grammar, for a name whose look no caption says, and
            for one that has two looks.
    """
    characters, places, who, where, actions = {}, {}, [], [], []
    for text in texts:
        parts = _CAPTION.fullmatch(text)
        if not parts:
            raise world.grammar_error(text)

        look = parts['color'] and world.Character(parts['name'], parts['shape'], parts['color'])
        ground = parts['background'] and world.Place(parts['place'], parts['background'])
        for known, name, new in (
            (characters, parts['name'], look),
            (places, parts['place'], ground),
        ):
            told = known.setdefault(name, new)
            if told is None:
                raise ValueError(f'captions {texts} use {name!r} before they describe it.')
            if new and new != told:
                raise ValueError(f'captions {texts} describe {name!r} in two ways.')
        who.append(parts['name'])
        where.append(parts['place'])
        actions.append(parts['action'])
    return (
        tuple(characters.values()),
        tuple(places.values()),
        tuple(who),
        tuple(where),
        tuple(actions),
    )


def _one_of(group, known):
    """A group of a regular expression that matches one of the known words."""
    return f'(?P<{group}>{"|".join(known)})'


_CAPTION = re.compile(
    f'{_one_of("name", world.NAMES)}'
    f'( {_one_of("color", world.COLORS)} {_one_of("shape", world.SHAPES)})?'
    f' at {_one_of("place", world.PLACES)}'
    f'( {_one_of("background", world.BACKGROUNDS)})?'
    f' {_one_of("action", world.ACTIONS)}'
)


def _shuffled(rng, known):
    """The entries of a tuple in random order."""
    return [known[i] for i in rng.permutation(len(known))]


def _sample_turns(rng, count, scenes):
    """Whose turn it is in each scene: indices below `count`; 0 leaves, and comes back later."""
    gap, leaves = _sample_absence(rng, scenes)
    turns = []
    for scene in range(scenes):
        allowed = set(range(count))
        if scene in (leaves, leaves + gap):
            allowed = {0}
        elif leaves < scene < leaves + gap:
            allowed -= {0}

        before = turns[-1] if turns else None
        persists = before in allowed and rng.random() < PERSISTENCE
        others = sorted(allowed - {before}) or sorted(allowed)
        turns.append(before if persists else others[rng.integers(len(others))])
    return turns


def _sample_absence(rng, scenes):
    """(gap, the last scene before it): from one octave of gaps, each as likely as any other."""
    longest = scenes - 1
    if longest < 2:
        return 0, 0  # too short to leave and return

    # Whole numbers only: no machine rounds them differently.
    octave = rng.integers(1, int(longest).bit_length())
    gap = int(rng.integers(2**octave, min(2 ** (octave + 1), scenes)))
    return gap, int(rng.integers(scenes - gap))


def _sample_actions(rng, shown, split):
    """An action per scene, so that the runs of scenes belong to the split."""
    length = min(world.HELD_OUT_SCENES, len(shown))
    actions = ()
    for scene in range(len(shown)):
        first = scene - length + 1
        allowed = list(world.ACTIONS)
        if first >= 0:
            held_out = world.held_out_action(shown[first : scene + 1], actions[first:])
            allowed.remove(held_out)
            if split == 'test':
                allowed = [held_out]
        actions += (allowed[rng.integers(len(allowed))],)
    return actions
