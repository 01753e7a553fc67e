"""Stories: a small rendered world with exact scores.

world.py says what there is, cast.py draws stories of several characters and places, rendering.py
makes pictures, codec.py takes the place of a VAE, scores.py measures videos, and builder.py makes a
TFDS data set.
"""

from mask2dit_jax.stories.builder import Stories, StoriesConfig, StorySource, load
from mask2dit_jax.stories.cast import gaps, parse_cast_captions, sample_cast_story
from mask2dit_jax.stories.codec import (
    Codec,
    decode,
    default_codec,
    encode,
    fit_codec,
    load_codec,
    save_codec,
)
from mask2dit_jax.stories.rendering import render
from mask2dit_jax.stories.scores import by_gap, cut_deviation, measure, score, summarize
from mask2dit_jax.stories.world import (
    ACTIONS,
    BACKGROUND_RGB,
    BACKGROUNDS,
    COLOR_RGB,
    COLORS,
    MOTIONS,
    NAMES,
    PLACES,
    SHAPES,
    VOCABULARY,
    CastStory,
    Character,
    Place,
    Story,
    captions,
    embed_captions,
    parse_captions,
    sample_story,
    story_from_json,
    story_to_json,
)

__all__ = [
    'ACTIONS',
    'BACKGROUNDS',
    'BACKGROUND_RGB',
    'COLORS',
    'COLOR_RGB',
    'MOTIONS',
    'NAMES',
    'PLACES',
    'SHAPES',
    'VOCABULARY',
    'CastStory',
    'Character',
    'Codec',
    'Place',
    'Stories',
    'StoriesConfig',
    'Story',
    'StorySource',
    'by_gap',
    'captions',
    'cut_deviation',
    'decode',
    'default_codec',
    'embed_captions',
    'encode',
    'fit_codec',
    'gaps',
    'load',
    'load_codec',
    'measure',
    'parse_captions',
    'parse_cast_captions',
    'render',
    'sample_cast_story',
    'sample_story',
    'save_codec',
    'score',
    'story_from_json',
    'story_to_json',
    'summarize',
]
