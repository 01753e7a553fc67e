"""Draws the two masks of Mask²DiT from the code that applies them.

Required flag: --out, the picture to write.

  python -m mask2dit_jax.tools.figures --out=masks.png

The upper half shows which token may attend to which, under every pattern of the symmetric attention
mask. Rows are queries and columns are keys, in the order of the model's sequence: the captions of
the three scenes first, then their videos. The lower half shows the segment-level conditional mask:
which latent frames are given and which the loss counts, in training and when a story is extended
scene by scene.
"""

import pathlib
from typing import NamedTuple

import numpy as np
from absl import app, flags
from matplotlib import colors, figure, patches

from mask2dit_jax import paths
from mask2dit_jax.attention import masks
from mask2dit_jax.layout import TEXT, SceneLayout, frame_scenes, token_scenes

LAYOUT = SceneLayout(frames=(3, 5, 4), height=1, width=2, text_tokens=4)
# Titles of the attention patterns.
PATTERNS = {
    'dual': 'dual: the symmetric attention mask',
    'full': 'full: no mask',
    'isolated': 'isolated',
}


class Step(NamedTuple):
    """A row of the lower half.

    Attributes:
      label: what is done.
      scenes: for every scene, whether it is 'given' or 'made'.
    """

    label: str
    scenes: tuple[str, ...]


STEPS = (
    Step('training: all scenes', ('made', 'made', 'made')),
    Step('training: scenes given', ('given', 'given', 'made')),
    Step('generate a story', ('made', 'made', 'made')),
    Step('extend it', ('given', 'given', 'given', 'made')),
    Step('and again', ('given', 'given', 'given', 'given', 'made')),
)
_STEP_FRAMES = (3, 5, 4, 4, 3)  # latent frames of the scenes of all steps

_BACKGROUND = '#ffffff'
_GIVEN = '#1f5fa8'
_MADE = '#d9822b'
# Colours of what two tokens are to each other.
_KINDS = {
    'caption and its own scene': '#2f6f4f',
    'video and video of one scene': '#1f5fa8',
    'video of different scenes': '#8fbce6',
    'caption of another scene': '#d9822b',
    'masked': '#eceff2',
}
_OWN_CAPTION, _SAME_SCENE, _OTHER_SCENE, _OTHER_CAPTION, _MASKED = range(len(_KINDS))


def attention_kinds(layout: SceneLayout, pattern: str) -> np.ndarray:
    """Tells what every pair of tokens is to each other.

    Returns:
      int [L, L], indices into _KINDS; rows are queries, columns are keys.
    """
    scene, kind = token_scenes(layout.segments)  # [L], [L]
    same_scene = scene[:, None] == scene[None]
    is_text = kind == TEXT
    any_text = is_text[:, None] | is_text[None]

    with_text = np.where(same_scene, _OWN_CAPTION, _OTHER_CAPTION)
    without_text = np.where(same_scene, _SAME_SCENE, _OTHER_SCENE)
    kinds = np.where(any_text, with_text, without_text)
    return np.where(masks.dense_mask(layout, pattern), kinds, _MASKED)


def _hide_frame(axes) -> None:
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _draw_attention(axes, layout: SceneLayout, pattern: str) -> None:
    """Draws the attention of one pattern, with a line between any two segments."""
    axes.imshow(
        attention_kinds(layout, pattern),
        cmap=colors.ListedColormap(list(_KINDS.values())),
        vmin=0,
        vmax=len(_KINDS) - 1,
        interpolation='nearest',
    )

    scenes = range(layout.num_scenes)
    text_ranges = [layout.text_range(scene) for scene in scenes]
    video_ranges = [layout.video_range(scene) for scene in scenes]
    ranges = text_ranges + video_ranges
    for _, end in ranges[:-1]:
        axes.axhline(end - 0.5, color=_BACKGROUND, lw=1.5)
        axes.axvline(end - 0.5, color=_BACKGROUND, lw=1.5)

    labels = [f'caption {scene + 1}' for scene in scenes]
    labels += [f'scene {scene + 1}' for scene in scenes]
    middles = [(start + end - 1) / 2 for start, end in ranges]
    axes.set_xticks(middles, labels, rotation=60, ha='right', rotation_mode='anchor')
    # The three patterns stand side by side: only the first has labels of rows.
    axes.set_yticks(middles, labels if pattern == 'dual' else [])
    axes.set_title(PATTERNS[pattern])
    _hide_frame(axes)


def _draw_segments(axes) -> None:
    """Draws a row of latent frames for every step."""
    for row, step in enumerate(STEPS):
        layout = SceneLayout(_STEP_FRAMES[: len(step.scenes)], height=1, width=1, text_tokens=1)
        given = np.array([scene == 'given' for scene in step.scenes])  # [S]
        scene_of_frame = frame_scenes(layout.frames)  # [T]

        for frame in range(layout.total_frames):
            color, timestep = (_GIVEN, '0') if given[scene_of_frame[frame]] else (_MADE, 't')
            left = frame + 0.7 * scene_of_frame[frame]  # a gap between scenes
            axes.add_patch(patches.Rectangle((left, row), 0.94, 0.66, color=color))
            axes.text(
                left + 0.47, row + 0.33, timestep, ha='center', va='center', color=_BACKGROUND
            )

    axes.set_yticks(np.arange(len(STEPS)) + 0.33, [step.label for step in STEPS])
    axes.set(
        xlim=(-0.2, 22.5),
        ylim=(len(STEPS), -0.2),
        xticks=[],
        title='The segment-level conditional mask: latent frames of given scenes stay clean, at '
        'timestep 0',
    )
    _hide_frame(axes)
    axes.legend(
        handles=[
            patches.Patch(color=_GIVEN, label='given: clean, timestep 0, not in the loss'),
            patches.Patch(
                color=_MADE, label='denoised from timestep t; in training the loss counts it'
            ),
        ],
        loc='upper center',
        bbox_to_anchor=(0.45, 0.0),
        ncols=2,
        frameon=False,
    )


def draw(path) -> None:
    """Writes the picture; the suffix decides its form: .png, .svg or .pdf."""
    canvas = figure.Figure(figsize=(13, 8.6), facecolor=_BACKGROUND, layout='constrained')
    above, below = canvas.subfigures(2, 1, height_ratios=(1.7, 1))

    for axes, pattern in zip(above.subplots(1, len(PATTERNS)), PATTERNS):
        _draw_attention(axes, LAYOUT, pattern)
    above.legend(
        handles=[patches.Patch(color=color, label=kind) for kind, color in _KINDS.items()],
        loc='outside lower center',
        ncols=len(_KINDS),
        frameon=False,
    )

    _draw_segments(below.subplots())
    canvas.savefig(path, dpi=110)


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'Unknown arguments {" ".join(argv[1:])}: see --help.')

    path = pathlib.Path(flags.FLAGS.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(path)
    print(f'Wrote {path}.')


if __name__ == '__main__':
    flags.DEFINE_string('out', None, 'Picture to write: .png, .svg or .pdf.', required=True)
    paths.check_flags_local('out')
    app.run(main)
