"""One case of `benchmark train`, `sample` or `scenes`, in a process of its own, so that its peak
memory is its own.

  python -m mask2dit_jax.benchmark.worker CASE

CASE is the JSON that benchmark/model.py sends. The worker first writes one line of JSON with a
number to compare results by, and then answers every line on stdin, 'run' or 'profile', by one line
of JSON.

diffusers runs the same weights under the same mask, by the two dense attention calls of Mask²DiT's
released code: captions attend to their own scene, and the video of a scene attends to its caption
and to a copy of all video keys and values.
"""

import collections
import ctypes
import json
import pathlib
import re
import sys
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from mask2dit_jax import config as config_lib
from mask2dit_jax import generation
from mask2dit_jax.diffusion import samplers
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.models import dit
from mask2dit_jax.pretrained import config_json, export
from mask2dit_jax.pretrained import names as names_lib

# Latents of a scene.
FRAMES = 5
HEIGHT = 16
WIDTH = 24

# The sampling loop.
STEPS = 2
GUIDANCE = 6.0


def model_config(formulation: str, remat: str, pattern: str = 'dual') -> dit.DiTConfig:
    """Returns a model of 8 layers with 8 heads of 64, in float32."""
    return dit.DiTConfig(
        num_layers=8,
        num_attention_heads=8,
        text_embed_dim=256,
        time_embed_dim=256,
        max_text_seq_length=32,
        sample_height=HEIGHT,
        sample_width=WIDTH,
        sample_frames=17,
        dtype='float32',
        remat=remat or 'none',
        attention_backend='blockwise' if formulation == 'diffusers' else formulation,
        pattern=pattern,
    )


def random_inputs(model: dit.DiTConfig, num_scenes: int):
    """Returns parameters, latents [1, T, H, W, C], captions [1, S, M, E] and the empty caption
    [M, E], always the same."""
    rng = np.random.default_rng(0)

    # As after training: no parameter is zero, and activations keep their size from layer to layer.
    def draw(path, shape_of):
        values = rng.standard_normal(shape_of.shape, np.float32)
        kind = path[-1].key
        if kind == 'kernel':
            return values / shape_of.shape[-2] ** 0.5
        return values * 0.1 + (kind == 'scale')

    params = jax.tree_util.tree_map_with_path(draw, names_lib.abstract_params(model))
    latents_shape = (1, num_scenes * FRAMES, HEIGHT, WIDTH, model.in_channels)
    latents = rng.standard_normal(latents_shape, np.float32)
    text_shape = (1, num_scenes, model.max_text_seq_length, model.text_embed_dim)
    text = rng.standard_normal(text_shape, np.float32)
    null_text = np.zeros(text_shape[2:], np.float32)
    return params, latents, text, null_text


def ours(case: dict):
    """Prepares a case of this package.

    Returns:
      A function that runs the case once and waits for the result, and the compiled program's text.
      The function returns another one, which computes the number to compare: the mean square of the
      output, and for 'forward + backward' that plus the norm of the gradients.
    """
    num_scenes = case['scenes']
    what = case['what']
    model_settings = model_config(case['formulation'], case['remat'])
    params, latents, text, null_text = random_inputs(model_settings, num_scenes)
    params = jax.tree.map(jnp.asarray, params)
    frames = (FRAMES,) * num_scenes

    if what == 'sampling':
        config = config_lib.Config(model=model_settings)
        table = samplers.sampler_table('ddim', config.schedule, STEPS)
        steps = samplers.staircase(*table, [0] * num_scenes)
        args = (
            params,
            latents,  # the noise
            text,
            null_text,
            latents,  # given scenes, of which there are none
            np.zeros((1, num_scenes), bool),
            np.int32(steps.timesteps),
            np.float32(steps.table),
            np.full(num_scenes, GUIDANCE, np.float32),
        )
        run = generation.jit_sample(config, frames, mesh_lib.mesh_of(params))
    else:
        model = dit.DiT(model_settings)
        t = jnp.full((1, sum(frames)), 500)

        def loss(params, latents, text):
            out = model.apply({'params': params}, latents, text, t, frames)
            return jnp.mean(out**2)

        args = (params, latents, text)
        run = jax.jit(loss if what == 'forward' else jax.value_and_grad(loss))
    compiled = run.lower(*args).compile()

    def once():
        out = jax.block_until_ready(compiled(*args))
        if what == 'sampling':
            return lambda: float(jnp.mean(out**2))
        if what == 'forward':
            return lambda: float(out)

        def value():
            loss_value, gradients = out
            squares = sum(jnp.sum(g**2) for g in jax.tree.leaves(gradients))
            return float(loss_value) + float(jnp.sqrt(squares))

        return value

    return once, compiled.as_text()


def diffusers_with_two_calls(case: dict):
    """Prepares the case for diffusers' transformer; results as for `ours`, without a text."""
    import torch
    from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
    from diffusers.models.embeddings import apply_rotary_emb, get_3d_rotary_pos_embed

    num_scenes = case['scenes']
    what = case['what']
    model_settings = model_config('diffusers', '')
    params, x, text, _ = random_inputs(model_settings, num_scenes)

    # Only the reference's own class knows attn_msk_version; TwoCalls below does what it means.
    settings = config_json.transformer_json(model_settings)
    del settings['attn_msk_version']
    model = CogVideoXTransformer3DModel.from_config(settings)
    exported = export.export_params('transformer', model_settings, params)
    weights = {name: torch.from_numpy(np.array(w.read())) for name, w in exported.items()}
    model.load_state_dict(weights)

    sdpa = torch.nn.functional.scaled_dot_product_attention

    class TwoCalls:
        """An attention processor of diffusers with the dual mask."""

        def __call__(
            self,
            attn,
            hidden_states,
            encoder_hidden_states,
            attention_mask=None,
            image_rotary_emb=None,
        ):
            num_text = encoder_hidden_states.shape[1]
            h = torch.cat([encoder_hidden_states, hidden_states], 1)  # [B, L, E]
            batch, length, _ = h.shape

            def heads(z):  # [B, L, E] to [B, N, L, D]
                return z.view(batch, length, attn.heads, -1).transpose(1, 2)

            def rotated(z):  # the video tokens only
                video = apply_rotary_emb(z[:, :, num_text:], image_rotary_emb)
                return torch.cat([z[:, :, :num_text], video], 2)

            q, k, v = (heads(project(h)) for project in (attn.to_q, attn.to_k, attn.to_v))
            q = rotated(attn.norm_q(q))
            k = rotated(attn.norm_k(k))

            def by_scene(z):  # [B, N, L, D] to [B·S, N, L / S, D]
                return z.unflatten(2, (num_scenes, -1)).transpose(1, 2).flatten(0, 1)

            def joined(z):  # [B·S, N, L / S, D] to [B, L, N·D]
                return z.unflatten(0, (batch, num_scenes)).transpose(2, 3).flatten(1, 2).flatten(2)

            def attend(query, *pairs):
                key, value = (torch.cat(pair, 2) for pair in pairs)
                return sdpa(query, key, value)

            text_q, *text_kv = (by_scene(z[:, :, :num_text]) for z in (q, k, v))
            video_q, *video_kv = (by_scene(z[:, :, num_text:]) for z in (q, k, v))
            copies = [z[:, :, num_text:].repeat_interleave(num_scenes, 0) for z in (k, v)]
            out_text = attend(text_q, *zip(text_kv, video_kv))
            out_video = attend(video_q, *zip(text_kv, copies))
            return attn.to_out[0](joined(out_video)), attn.to_out[0](joined(out_text))

    model.set_attn_processor(TwoCalls())

    rows = HEIGHT // 2
    columns = WIDTH // 2
    rotary = get_3d_rotary_pos_embed(
        model_settings.attention_head_dim,
        ((0, 0), (rows, columns)),
        (rows, columns),
        x.shape[1],
    )
    x = torch.from_numpy(x).permute(0, 1, 4, 2, 3).contiguous()  # [1, T, C, H, W]
    text = torch.from_numpy(text).flatten(1, 2)

    def forward(x, text, t):
        return model(x, text, torch.full((len(x),), t), image_rotary_emb=rotary).sample

    def sample():
        schedule = config_json.schedule_json(config_lib.Config().schedule)
        scheduler = CogVideoXDDIMScheduler.from_config(schedule)
        scheduler.set_timesteps(STEPS)
        both = torch.cat([torch.zeros_like(text), text])
        latents = x
        with torch.no_grad():
            for t in scheduler.timesteps:
                out = forward(torch.cat([latents, latents]), both, int(t))
                negative, positive = out.chunk(2)
                guided = negative + GUIDANCE * (positive - negative)
                latents = scheduler.step(guided, t, latents).prev_sample
        return latents

    def once():
        if what == 'sampling':
            latents = sample()
            return lambda: float((latents**2).mean())

        if what == 'forward':
            with torch.no_grad():
                loss = (forward(x, text, 500) ** 2).mean()
            return lambda: float(loss)

        model.zero_grad()
        loss = (forward(x, text, 500) ** 2).mean()
        loss.backward()

        def value():
            squares = sum((p.grad**2).sum() for p in model.parameters())
            return float(loss.detach()) + float(squares**0.5)

        return value

    return once, None


def _kind(operation: str) -> str:
    """Kind of work of an operation by its name in the source."""
    # Blockwise attention is a loop inside the attention module.
    parts = operation.split('/attn/')
    if len(parts) > 1 and '/while/body/' in parts[1]:
        return 'attention'
    if operation.endswith('dot_general'):
        return 'matmuls'
    return 'rest'


def profile(once, text: str) -> dict[str, float]:
    """Returns the milliseconds of one run by kind of work, from a trace of jax.profiler.

    The times of threads that work at the same time are added up.

    Args:
      once: function that runs the case.
      text: text of the compiled program, in which instructions have the names of operations.
    """
    operations = dict(re.findall(r'%([\w.\-]+) = .*op_name="([^"]*)"', text))
    milliseconds = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            once()
        (path,) = pathlib.Path(folder).rglob('*.xplane.pb')
        planes = jax.profiler.ProfileData.from_file(str(path)).planes
        events = (event for plane in planes for line in plane.lines for event in line.events)

        for event in events:
            # Events of control flow contain those of their bodies.
            is_control_flow = event.name.split('.')[0] in ('while', 'call', 'conditional')
            if 'hlo_op' in dict(event.stats) and not is_control_flow:
                kind = _kind(operations.get(event.name, ''))
                milliseconds[kind] += event.duration_ns / 1e6
    return dict(milliseconds)


def status_mb(field: str) -> float:
    """A field of /proc/self/status in MB; nan on systems without that file."""
    try:
        status = pathlib.Path('/proc/self/status').read_text()
    except FileNotFoundError:
        return float('nan')
    kilobytes = re.search(rf'{field}:\s+(\d+) kB', status).group(1)
    return int(kilobytes) * 1024 / 1e6


def _answer(values: dict) -> None:
    print(json.dumps(values), flush=True)


def main(case: dict):
    """Serves one case.

    Args:
      case: 'formulation', 'remat', 'scenes' and 'what'.
    """
    # Importing and starting up are not the model's memory.
    if case['formulation'] == 'diffusers':
        import diffusers.models.transformers.cogvideox_transformer_3d  # noqa: F401
    jnp.zeros(()).block_until_ready()
    base = status_mb('VmRSS')

    prepare = diffusers_with_two_calls if case['formulation'] == 'diffusers' else ours
    once, text = prepare(case)
    value = once()()

    # The peak counts from here, without compiling and without the memory that malloc keeps of it.
    if not np.isnan(base):
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path('/proc/self/clear_refs').write_text('5')

    _answer({'value': value})
    for line in sys.stdin:
        if line.strip() == 'profile':
            _answer(profile(once, text) if text else {})
            continue

        start = time.perf_counter()
        once()
        seconds = time.perf_counter() - start
        _answer({'seconds': seconds, 'mb': status_mb('VmHWM') - base})


if __name__ == '__main__':
    main(json.loads(sys.argv[1]))
