"""Attention backends against each other: time and memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from mask2dit_jax.attention import attend as attend_lib
from mask2dit_jax.attention import splash
from mask2dit_jax.benchmark import timing
from mask2dit_jax.layout import SceneLayout

HEADS, HEAD_DIM, TEXT_TOKENS, GRID, SCENES = 2, 64, 32, 8, 3


def attention_layout(tokens: int, scale: int) -> SceneLayout:
    """Equal scenes: about `tokens` video tokens in all, times scale."""
    return SceneLayout(
        (scale * round(tokens / (SCENES * GRID**2)),) * SCENES, GRID, GRID, TEXT_TOKENS
    )


def repeated(q, k, v, layout: SceneLayout, pattern: str):
    """The reference's dual mask for scenes of equal length: captions with their scene, scenes with
    all video."""
    assert pattern == 'dual'
    b, _, n, d = q.shape

    def by_scene(x):
        return x.reshape(b * layout.num_scenes, -1, n, d)

    captions, video = (
        [x[:, a:z] for x in (q, k, v)]
        for a, z in ((0, layout.num_text), (layout.num_text, layout.num_tokens))
    )
    captions = [by_scene(x) for x in captions]
    copies = [jnp.repeat(x, layout.num_scenes, axis=0) for x in video[1:]]
    video = [by_scene(x) for x in video]

    def attend(query, *pairs):
        return jax.nn.dot_product_attention(
            query, *(jnp.concatenate(p, axis=1) for p in pairs)
        ).reshape(b, -1, n, d)

    return jnp.concatenate(
        [
            attend(captions[0], *zip(captions[1:], video[1:])),
            attend(video[0], *zip(captions[1:], copies)),
        ],
        axis=1,
    )


def attention_formulations() -> dict:
    """Functions of (q, k, v, layout, pattern) by name: what this device can run."""
    names = {
        'cpu': ('dense', 'blockwise'),
        'gpu': ('dense', 'blockwise', 'cudnn'),
        'tpu': ('dense', 'blockwise', 'splash', 'jax_splash'),
    }[jax.default_backend()]
    formulations = {name: functools.partial(attend_lib.attend, backend=name) for name in names} | {
        'repeated': repeated
    }
    if jax.default_backend() == 'cpu':
        formulations['splash (interpreted)'] = functools.partial(
            splash.attend, block=128, interpret=True
        )
    return formulations


def compile_attention(function, layout: SceneLayout):
    """The compiled forward and backward pass, and its q, k, v, d_out, float32 [1, L, N, D]."""

    @jax.jit
    def run(q, k, v, d_out):
        out, vjp = jax.vjp(functools.partial(function, layout=layout, pattern='dual'), q, k, v)
        return out, *vjp(d_out)

    shape = 1, layout.num_tokens, HEADS, HEAD_DIM
    args = [
        jax.random.normal(key, shape, jnp.float32) for key in jax.random.split(jax.random.key(0), 4)
    ]
    return run.lower(*args).compile(), args


def memory_bytes(compiled) -> int:
    """Peak that the compiler plans: arguments, outputs and temporaries."""
    m = compiled.memory_analysis()
    return m.argument_size_in_bytes + m.output_size_in_bytes + m.temp_size_in_bytes


def bench_attention(tokens: int, dense_tokens: int, runs: int) -> list[dict]:
    """One row per formulation and length.

    Args:
      tokens: L; lengths are L, 2L and 4L.
      dense_tokens: 'dense' and 'repeated' are left out of longer videos.
      runs: timed runs, after one that is not.
    """
    rows, formulations = [], attention_formulations()
    for scale in tqdm.tqdm((1, 2, 4), desc='attention', unit='length'):
        layout = attention_layout(tokens, scale)
        names = [
            n
            for n in formulations
            if not (n in ('dense', 'repeated') and layout.num_video > dense_tokens)
            and not (n == 'splash (interpreted)' and scale > 1)
        ]
        compiled = {n: compile_attention(formulations[n], layout) for n in names}
        times = [{n: 1e3 * timing.seconds(*compiled[n]) for n in names} for _ in range(runs + 1)][
            1:
        ]
        base = np.median([t['blockwise'] for t in times])
        for n in names:
            timed = timing.spread([t[n] for t in times])
            rows.append(
                {
                    'formulation': n,
                    'video tokens': layout.num_video,
                    **timed,
                    'time ratio': timed['ms'] / base,
                    'MB': memory_bytes(compiled[n][0]) / 1e6,
                }
            )
    for row in rows:
        first = next(r for r in rows if r['formulation'] == row['formulation'])
        row['MB growth'] = row['MB'] / first['MB']
    return sorted(rows, key=lambda r: (r['formulation'], r['video tokens']))
