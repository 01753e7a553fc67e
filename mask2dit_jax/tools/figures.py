"""Draws the two masks of Mask²DiT from the code that applies them.

  python -m mask2dit_jax.tools.figures --out=masks.png

Above, who may attend to whom, by every pattern: rows ask, columns are seen; captions of the three
scenes first, then their video, as in the model's sequence. Below, which latent frames are given and
which the loss counts, in training and when a story is extended again and again.
"""

import pathlib

import numpy as np
from absl import app, flags
from matplotlib import colors, figure, patches

from mask2dit_jax.attention import masks
from mask2dit_jax.diffusion import loss
from mask2dit_jax.layout import SceneLayout, frame_scenes, token_scenes

LAYOUT = SceneLayout(frames=(3, 5, 4), height=1, width=2, text_tokens=4)
PATTERNS = {
    'dual': 'dual: the symmetric attention mask',
    'full': 'full: no mask',
    'isolated': 'isolated',
}
_PAPER = '#ffffff'
_KINDS = {
    'caption and its own scene': '#2f6f4f',
    'video and video of one scene': '#1f5fa8',
    'video of different scenes': '#8fbce6',
    'caption of another scene': '#d9822b',
    'masked': '#eceff2',
}
_GIVEN, _MADE = '#1f5fa8', '#d9822b'
# What is done, and per scene whether it is given or made.
STEPS = (
    ('training: all scenes', ('made', 'made', 'made')),
    ('training: scenes given', ('given', 'given', 'made')),
    ('generate a story', ('made', 'made', 'made')),
    ('extend it', ('given', 'given', 'given', 'made')),
    ('and again', ('given', 'given', 'given', 'given', 'made')),
)


def attention_kinds(layout: SceneLayout, pattern: str) -> np.ndarray:
    """What every pair of tokens is to each other, indices into the legend, int [L, L]; the last:
    masked."""
    scene, is_text = token_scenes(layout)
    same, text = scene[:, None] == scene[None], is_text[:, None] | is_text[None]
    kinds = np.where(text, np.where(same, 0, 3), np.where(same, 1, 2))
    return np.where(masks.dense_mask(layout, pattern), kinds, 4)


def _draw_attention(axes, layout: SceneLayout, pattern: str) -> None:
    axes.imshow(
        attention_kinds(layout, pattern),
        cmap=colors.ListedColormap(list(_KINDS.values())),
        vmin=0,
        vmax=len(_KINDS) - 1,
        interpolation='nearest',
    )
    ranges = [
        f(i) for f in (layout.text_range, layout.video_range) for i in range(layout.num_scenes)
    ]
    names = [f'{kind} {i + 1}' for kind in ('caption', 'scene') for i in range(layout.num_scenes)]
    middles = [(a + b - 1) / 2 for a, b in ranges]
    for _, end in ranges[:-1]:
        axes.axhline(end - 0.5, color=_PAPER, lw=1.5)
        axes.axvline(end - 0.5, color=_PAPER, lw=1.5)
    axes.set_xticks(middles, names, rotation=60, ha='right', rotation_mode='anchor')
    axes.set_yticks(middles, names if pattern == 'dual' else [])
    axes.tick_params(length=0)
    axes.set_title(PATTERNS[pattern])
    axes.spines[:].set_visible(False)


def _draw_segments(axes) -> None:
    lengths = (3, 5, 4, 4, 3)
    for row, (_, kinds) in enumerate(STEPS):
        layout = SceneLayout(lengths[: len(kinds)], 1, 1, 1)
        given = np.array([kind == 'given' for kind in kinds])
        counted, of = loss.loss_mask(layout, given), frame_scenes(layout)
        for frame in range(layout.total_frames):
            left = frame + 0.7 * of[frame]
            axes.add_patch(
                patches.Rectangle(
                    (left, row), 0.94, 0.66, color=_MADE if counted[frame] else _GIVEN
                )
            )
            axes.text(
                left + 0.47,
                row + 0.33,
                't' if counted[frame] else '0',
                ha='center',
                va='center',
                color=_PAPER,
            )
    axes.set_yticks(np.arange(len(STEPS)) + 0.33, [label for label, _ in STEPS])
    axes.set(
        xlim=(-0.2, 22.5),
        ylim=(len(STEPS), -0.2),
        xticks=[],
        title='The segment-level conditional mask: latent frames of given scenes stay clean, at timestep 0',
    )
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
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
    """Writes the picture (png, svg or pdf)."""
    canvas = figure.Figure(figsize=(13, 8.6), facecolor=_PAPER, layout='constrained')
    above, below = canvas.subfigures(2, 1, height_ratios=(1.7, 1))
    for axes, pattern in zip(above.subplots(1, len(PATTERNS)), PATTERNS):
        _draw_attention(axes, LAYOUT, pattern)
    above.legend(
        handles=[patches.Patch(color=color, label=name) for name, color in _KINDS.items()],
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
    app.run(main)
