"""The picture of the masks shows what the masks are."""

import itertools

import numpy as np
import PIL.Image
import pytest

from mask2dit_jax.layout import SceneLayout, token_scenes
from mask2dit_jax.tools import figures


@pytest.mark.parametrize('pattern', figures.PATTERNS)
def test_kinds_by_definition(pattern):
    layout = SceneLayout((1, 2, 3), 1, 2, 2)
    kinds, names = figures.attention_kinds(layout, pattern), list(figures._KINDS)
    scene, is_text = token_scenes(layout)
    for i, j in itertools.product(range(layout.num_tokens), repeat=2):
        same, text = scene[i] == scene[j], is_text[i] or is_text[j]
        seen = pattern == 'full' or same or (pattern == 'dual' and not text)
        right = (
            'masked'
            if not seen
            else 'caption of another scene'
            if text and not same
            else 'caption and its own scene'
            if text
            else 'video and video of one scene'
            if same
            else 'video of different scenes'
        )
        assert names[kinds[i, j]] == right


def test_the_picture_has_every_color_of_its_legend(tmp_path):
    figures.draw(tmp_path / 'masks.png')
    pixels = np.asarray(PIL.Image.open(tmp_path / 'masks.png').convert('RGB')).reshape(-1, 3)
    drawn = {'#{:02x}{:02x}{:02x}'.format(*rgb) for rgb in np.unique(pixels, axis=0)}
    assert set(figures._KINDS.values()) <= drawn
