"""One more scene: with a cache of the given ones, or with them in the loop, all or the last two."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from mask2dit_jax import config as config_lib
from mask2dit_jax import generation
from mask2dit_jax.benchmark import worker
from mask2dit_jax.diffusion import samplers
from mask2dit_jax.distributed import mesh as mesh_lib

GIVEN = (2, 4, 8, 16)
# Given scenes that are computed at every step (None for all), and whether they are remembered.
FORMULATIONS = {'all in the loop': (None, False), 'window of 2': (2, False), 'cache': (None, True)}
# Guided steps of the two programs of a case: a step takes half of their difference.
STEPS = (1, 3)
# Guided steps of a scene in the table.
USUAL_STEPS = 50


def compile_extension(given: int, cached: bool, num_steps: int):
    """Compiles the sampling loop of one scene after `given` others, and makes its arguments.

    Returns:
      The compiled loop and its arguments.
    """
    num_scenes = given + 1
    model = worker.model_config('blockwise', '', pattern='causal')
    config = config_lib.Config(model=model)
    params, latents, text, null_text = worker.random_inputs(model, num_scenes)
    params = jax.tree.map(jnp.asarray, params)
    table = samplers.sampler_table('ddim', config.schedule, num_steps)
    steps = samplers.staircase(*table, [0] * num_scenes)
    arguments = (
        params,
        latents,  # the noise
        text,
        null_text,
        latents,  # what is given
        np.arange(num_scenes)[None] < given,
        np.int32(steps.timesteps),
        np.float32(steps.table),
        np.full(num_scenes, worker.GUIDANCE, np.float32),
    )
    run = generation.jit_sample(
        config,
        (worker.FRAMES,) * num_scenes,
        mesh_lib.mesh_of(params),
        remembered=given if cached else 0,
    )
    return run.lower(*arguments).compile(), arguments


def cache_bytes(given: int) -> int:
    """Keys and values of the given scenes' video in all layers, for both halves of guidance."""
    model = worker.model_config('blockwise', '', pattern='causal')
    layout = model.layout((worker.FRAMES,) * given, worker.HEIGHT, worker.WIDTH)
    return 2 * 2 * model.num_layers * layout.num_video * model.width * 4


def _seconds(compiled, arguments) -> float:
    started = time.perf_counter()
    jax.block_until_ready(compiled(*arguments))
    return time.perf_counter() - started


def bench_extend(runs: int, given: tuple[int, ...] = GIVEN) -> list[dict]:
    """Measures all formulations at each number of given scenes.

    Args:
      runs: timed runs of each program, after a first one that is not counted.
      given: numbers of given scenes.

    Returns:
      One row per number and formulation. Ratios are to 'all in the loop' with as many scenes.
    """
    rows = []
    for count in tqdm.tqdm(given, desc='extend', unit='number of scenes'):
        programs = {}
        for name, (window, cached) in FORMULATIONS.items():
            for steps in STEPS:
                programs[name, steps] = compile_extension(window or count, cached, steps)

        # Programs take turns, so that a busy machine slows all of them alike.
        times = {key: [] for key in programs}
        for run in range(runs + 1):
            for key, program in programs.items():
                elapsed = _seconds(*program)
                if run > 0:
                    times[key].append(elapsed)

        few, many = STEPS
        base = None
        for name, (_, cached) in FORMULATIONS.items():
            median = {steps: float(np.median(times[name, steps])) for steps in STEPS}
            step = (median[many] - median[few]) / (many - few)
            base = base or step
            memory = programs[name, many][0].memory_analysis()
            rows.append(
                {
                    'given scenes': count,
                    'formulation': name,
                    'ms/step': 1e3 * step,
                    'step ratio': step / base,
                    'ms before': 1e3 * (median[few] - few * step),
                    's/scene': median[few] + (USUAL_STEPS - few) * step,
                    'MB': (memory.argument_size_in_bytes + memory.temp_size_in_bytes) / 1e6,
                    'cache MB': cache_bytes(count) / 1e6 if cached else '',
                }
            )
    return rows
