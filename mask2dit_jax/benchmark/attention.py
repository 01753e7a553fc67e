"""Attention backends beside each other: time and memory."""

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from mask2dit_jax.attention import attend as attend_lib
from mask2dit_jax.attention import splash
from mask2dit_jax.layout import SceneLayout

HEADS = 2
HEAD_DIM = 64
TEXT_TOKENS = 32  # per scene
GRID = 8  # rows and columns of tokens
SCENES = 3


def attention_layout(tokens: int, scale: int) -> SceneLayout:
    """Returns a layout of equal scenes with about `tokens` x `scale` video tokens."""
    frames = scale * round(tokens / (SCENES * GRID**2))
    return SceneLayout((frames,) * SCENES, GRID, GRID, TEXT_TOKENS)


def repeated(q, k, v, layout: SceneLayout, pattern: str):
    """The reference's formulation of the dual mask, for scenes of equal length.

    It takes two dense calls: captions attend to their own scene, and the video of a scene attends
    to its caption and to a copy of all video keys and values.

    Args:
      q, k, v: [B, L, N, D].
      layout: the story's layout.
      pattern: must be 'dual'.

    Returns:
      [B, L, N, D].
    """
    assert pattern == 'dual'
    batch, _, heads, head_dim = q.shape

    def by_scene(x):  # [B, L, N, D] to [B·S, L / S, N, D]
        return x.reshape(batch * layout.num_scenes, -1, heads, head_dim)

    def attend(query, *pairs):
        key, value = (jnp.concatenate(pair, axis=1) for pair in pairs)
        out = jax.nn.dot_product_attention(query, key, value)
        return out.reshape(batch, -1, heads, head_dim)

    text_q, *text_kv = (by_scene(x[:, : layout.num_text]) for x in (q, k, v))
    video = [x[:, layout.num_text : layout.num_tokens] for x in (q, k, v)]
    video_q, *video_kv = (by_scene(x) for x in video)
    copies = [jnp.repeat(x, layout.num_scenes, axis=0) for x in video[1:]]

    text_out = attend(text_q, *zip(text_kv, video_kv))
    video_out = attend(video_q, *zip(text_kv, copies))
    return jnp.concatenate([text_out, video_out], axis=1)


def attention_formulations() -> dict:
    """Returns functions of (q, k, v, layout, pattern) by name: those that this device can run."""
    device = jax.default_backend()
    names = {
        'cpu': ('dense', 'blockwise'),
        'gpu': ('dense', 'blockwise', 'cudnn'),
        'tpu': ('dense', 'blockwise', 'splash', 'jax_splash'),
    }[device]

    formulations = {name: functools.partial(attend_lib.attend, backend=name) for name in names}
    formulations['repeated'] = repeated
    if device == 'cpu':
        formulations['splash (interpreted)'] = functools.partial(
            splash.attend, block=128, interpret=True
        )
    return formulations


def compile_attention(function, layout: SceneLayout):
    """Returns the compiled forward and backward pass, and its arguments q, k, v and d_out, float32
    [1, L, N, D]."""

    @jax.jit
    def run(q, k, v, d_out):
        attend = functools.partial(function, layout=layout, pattern='dual')
        out, vjp = jax.vjp(attend, q, k, v)
        return out, *vjp(d_out)

    shape = (1, layout.num_tokens, HEADS, HEAD_DIM)
    keys = jax.random.split(jax.random.key(0), 4)
    args = [jax.random.normal(key, shape, jnp.float32) for key in keys]
    return run.lower(*args).compile(), args


def _milliseconds(compiled, args) -> float:
    """Time of one run."""
    start = time.perf_counter()
    jax.block_until_ready(compiled(*args))
    return 1e3 * (time.perf_counter() - start)


def _memory_bytes(compiled) -> int:
    """Memory that the compiler plans: arguments, outputs and temporaries."""
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def bench_attention(tokens: int, dense_tokens: int, runs: int) -> list[dict]:
    """Measures every formulation at three lengths.

    Args:
      tokens: video tokens of the shortest video; the others have twice and four times as many.
      dense_tokens: 'dense' and 'repeated' are left out of videos with more tokens.
      runs: timed runs, after a first one that is not counted.

    Returns:
      One row per formulation and length.
    """
    formulations = attention_formulations()
    rows = []
    for scale in tqdm.tqdm((1, 2, 4), desc='attention', unit='length'):
        layout = attention_layout(tokens, scale)
        left_out = set()
        if layout.num_video > dense_tokens:
            left_out |= {'dense', 'repeated'}
        if scale > 1:
            left_out |= {'splash (interpreted)'}
        names = [name for name in formulations if name not in left_out]

        # Formulations take turns, so that a busy machine slows all of them alike.
        compiled = {name: compile_attention(formulations[name], layout) for name in names}
        times = {name: [] for name in names}
        for run in range(runs + 1):
            for name in names:
                elapsed = _milliseconds(*compiled[name])
                if run > 0:
                    times[name].append(elapsed)

        base = np.median(times['blockwise'])
        for name in names:
            median = float(np.median(times[name]))
            program, _ = compiled[name]
            rows.append(
                {
                    'formulation': name,
                    'video tokens': layout.num_video,
                    'ms': median,
                    'spread ms': f'{min(times[name]):.4g}...{max(times[name]):.4g}',
                    'time ratio': median / base,
                    'MB': _memory_bytes(program) / 1e6,
                }
            )

    # Growth is relative to the shortest video, whose row is the first.
    shortest = {}
    for row in rows:
        first = shortest.setdefault(row['formulation'], row)
        row['MB growth'] = row['MB'] / first['MB']
    return sorted(rows, key=lambda row: (row['formulation'], row['video tokens']))
