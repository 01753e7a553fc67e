"""The picture of the masks shows what the masks are."""

import itertools

import numpy as np
import PIL.Image
import pytest

from mask2dit_jax.layout import TEXT, SceneLayout, token_scenes
from mask2dit_jax.tools import figures


@pytest.mark.parametrize('pattern', figures.PATTERNS)
def test_kinds_by_definition(pattern):
    layout = SceneLayout((1, 2, 3), 1, 2, 2)
    kinds = figures.attention_kinds(layout, pattern)
    names = list(figures._KINDS)
    scene, kind = token_scenes(layout.segments)
    is_text = kind == TEXT

    for query, key in itertools.product(range(layout.num_tokens), repeat=2):
        same_scene = scene[query] == scene[key]
        any_text = is_text[query] or is_text[key]
        visible = pattern == 'full' or same_scene or (pattern == 'dual' and not any_text)
        if not visible:
            expected = 'masked'
        elif any_text:
            expected = 'caption and its own scene' if same_scene else 'caption of another scene'
        else:
            expected = 'video and video of one scene' if same_scene else 'video of different scenes'
        assert names[kinds[query, key]] == expected


def test_the_picture_has_every_color_of_its_legend(tmp_path):
    figures.draw(tmp_path / 'masks.png')
    picture = PIL.Image.open(tmp_path / 'masks.png').convert('RGB')
    colors = np.unique(np.asarray(picture).reshape(-1, 3), axis=0)
    drawn = {'#{:02x}{:02x}{:02x}'.format(*rgb) for rgb in colors}
    assert set(figures._KINDS.values()) <= drawn
