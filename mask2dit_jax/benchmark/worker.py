"""One case of `benchmark train|sample|scenes`, in a process of its own so that its peak memory is
its own.

  python -m mask2dit_jax.benchmark.worker CASE      (JSON, as benchmark sends it)

Answers every line on stdin by one line of JSON. diffusers runs the same weights under the same
mask, by the reference's two dense attention calls (Mask²DiT's released code): captions with their
own scene, and scenes, each with its caption and a copy of all video keys and values.
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
from mask2dit_jax import pipeline
from mask2dit_jax.diffusion import samplers
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.models import dit
from mask2dit_jax.pretrained import config_json, export
from mask2dit_jax.pretrained import names as names_lib

FRAMES, HEIGHT, WIDTH = 5, 16, 24  # latents of a scene
STEPS, GUIDANCE = 2, 6.0  # of the sampling loop


def model_config(formulation: str, remat: str) -> dit.DiTConfig:
    """8 layers of 8 heads of 64, float32."""
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
    )


def random_inputs(cfg: dit.DiTConfig, num_scenes: int):
    """Parameters, latents [1, T, h, w, C], captions [1, S, M, E] and the empty caption [M, E];
    always the same."""
    rng = np.random.default_rng(0)

    def draw(path, p):  # as after training: nothing is zero, and nothing explodes
        values = rng.standard_normal(p.shape, np.float32)
        kind = path[-1].key
        return values / p.shape[-2] ** 0.5 if kind == 'kernel' else values * 0.1 + (kind == 'scale')

    params = jax.tree_util.tree_map_with_path(draw, names_lib.abstract_params(cfg))
    x = rng.standard_normal((1, num_scenes * FRAMES, HEIGHT, WIDTH, cfg.in_channels), np.float32)
    text = rng.standard_normal(
        (1, num_scenes, cfg.max_text_seq_length, cfg.text_embed_dim), np.float32
    )
    return params, x, text, np.zeros(text.shape[2:], np.float32)


def ours(case: dict):
    """Function that runs the case once and returns a number to compare, and the compiled program's
    text.

    The number is the mean square of what comes out, and for `forward + backward` the gradients'
    norm with it.
    """
    cfg, num_scenes = model_config(case['formulation'], case['remat']), case['scenes']
    params, x, text, null = random_inputs(cfg, num_scenes)
    params, frames = jax.tree.map(jnp.asarray, params), (FRAMES,) * num_scenes
    model, t = dit.DiT(cfg), jnp.full((1, num_scenes), 500)

    def loss(params, x, text):
        return jnp.mean(model.apply({'params': params}, x, text, t, frames) ** 2)

    if case['what'] == 'sampling':
        config = config_lib.Config(model=cfg)
        table = samplers.sampler_table('ddim', config.schedule, STEPS)
        args = (
            params,
            x,
            text,
            null,
            x,
            np.zeros((1, num_scenes), bool),
            np.int32(table[0]),
            np.float32(table[1]),
            np.full(num_scenes, GUIDANCE, np.float32),
        )
        run = pipeline.jit_sample(config, frames, mesh_lib.mesh_of(params))
    else:
        args = params, x, text
        run = jax.jit(jax.value_and_grad(loss) if case['what'] == 'forward + backward' else loss)
    compiled = run.lower(*args).compile()

    def once():
        out = jax.block_until_ready(compiled(*args))
        if case['what'] == 'sampling':
            return lambda: float(jnp.mean(out**2))
        if case['what'] == 'forward':
            return lambda: float(out)
        return lambda: (
            float(out[0]) + float(jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(out[1]))))
        )

    return once, compiled.as_text()


def diffusers_with_two_calls(case: dict):
    """As `ours`, by diffusers' transformer."""
    import torch
    from diffusers import CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
    from diffusers.models.embeddings import apply_rotary_emb, get_3d_rotary_pos_embed

    cfg, num_scenes = model_config('diffusers', ''), case['scenes']
    params, x, text, _ = random_inputs(cfg, num_scenes)
    settings = config_json.transformer_json(cfg)
    del settings[
        'attn_msk_version'
    ]  # the reference's own class knows it; TwoCalls below does what it means
    model = CogVideoXTransformer3DModel.from_config(settings)
    model.load_state_dict(
        {
            n: torch.from_numpy(np.array(w.read()))
            for n, w in export.export_params('transformer', cfg, params).items()
        }
    )
    sdpa = torch.nn.functional.scaled_dot_product_attention

    class TwoCalls:
        def __call__(
            self,
            attn,
            hidden_states,
            encoder_hidden_states,
            attention_mask=None,
            image_rotary_emb=None,
        ):
            num_text = encoder_hidden_states.shape[1]
            h = torch.cat([encoder_hidden_states, hidden_states], 1)
            b, heads = h.shape[0], attn.heads
            q, k, v = (
                f(h).view(b, h.shape[1], heads, -1).transpose(1, 2)
                for f in (attn.to_q, attn.to_k, attn.to_v)
            )
            q, k = (
                torch.cat(
                    [z[:, :, :num_text], apply_rotary_emb(z[:, :, num_text:], image_rotary_emb)], 2
                )
                for z in (attn.norm_q(q), attn.norm_k(k))
            )

            def by_scene(z):  # [B, N, L, D] to [B·S, N, L / S, D]
                return z.unflatten(2, (num_scenes, -1)).transpose(1, 2).flatten(0, 1)

            def joined(z):  # [B·S, N, L / S, D] to [B, L, N·D]
                return z.unflatten(0, (b, num_scenes)).transpose(2, 3).flatten(1, 2).flatten(2)

            captions = [by_scene(z[:, :, :num_text]) for z in (q, k, v)]
            video = [by_scene(z[:, :, num_text:]) for z in (q, k, v)]
            repeated = [z[:, :, num_text:].repeat_interleave(num_scenes, 0) for z in (k, v)]
            out_text = sdpa(captions[0], *(torch.cat(p, 2) for p in zip(captions[1:], video[1:])))
            out_video = sdpa(video[0], *(torch.cat(p, 2) for p in zip(captions[1:], repeated)))
            return attn.to_out[0](joined(out_video)), attn.to_out[0](joined(out_text))

    model.set_attn_processor(TwoCalls())
    rows, columns = HEIGHT // 2, WIDTH // 2
    rotary = get_3d_rotary_pos_embed(
        cfg.attention_head_dim, ((0, 0), (rows, columns)), (rows, columns), x.shape[1]
    )
    x = torch.from_numpy(x).permute(0, 1, 4, 2, 3).contiguous()  # [1, T, C, h, w]
    text = torch.from_numpy(text).flatten(1, 2)

    def forward(x, text, t):
        return model(x, text, torch.full((len(x),), t), image_rotary_emb=rotary).sample

    def once():
        if case['what'] == 'sampling':
            scheduler = CogVideoXDDIMScheduler.from_config(
                config_json.schedule_json(config_lib.Config().schedule)
            )
            scheduler.set_timesteps(STEPS)
            both, latents = torch.cat([torch.zeros_like(text), text]), x
            with torch.no_grad():
                for t in scheduler.timesteps:
                    negative, positive = forward(torch.cat([latents, latents]), both, int(t)).chunk(
                        2
                    )
                    latents = scheduler.step(
                        negative + GUIDANCE * (positive - negative), t, latents
                    ).prev_sample
            return lambda: float((latents**2).mean())
        if case['what'] == 'forward':
            with torch.no_grad():
                loss = (forward(x, text, 500) ** 2).mean()
            return lambda: float(loss)
        model.zero_grad()
        loss = (forward(x, text, 500) ** 2).mean()
        loss.backward()
        return lambda: (
            float(loss.detach()) + float(sum((p.grad**2).sum() for p in model.parameters()) ** 0.5)
        )

    return once, None


def profile(once, text: str) -> dict[str, float]:
    """Milliseconds of one run by kind of work, from a trace of jax.profiler; threads that work at
    once count twice."""
    names = dict(re.findall(r'%([\w.\-]+) = .*op_name="([^"]*)"', text))
    groups = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            once()
        (path,) = pathlib.Path(folder).rglob('*.xplane.pb')
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for event in (e for line in plane.lines for e in line.events):
                if 'hlo_op' in dict(event.stats) and event.name.split('.')[0] not in (
                    'while',
                    'call',
                    'conditional',
                ):
                    name = names.get(event.name, '')
                    kind = (
                        'attention'
                        if '/attn/' in name and '/while/body/' in name.split('/attn/')[1]
                        else 'matmuls'
                        if name.endswith('dot_general')
                        else 'rest'
                    )
                    groups[kind] += event.duration_ns / 1e6
    return dict(groups)


def _status_mb(field: str) -> float:
    """A field of /proc/self/status in MB; nan where there is none."""
    try:
        found = re.search(rf'{field}:\s+(\d+) kB', pathlib.Path('/proc/self/status').read_text())
    except FileNotFoundError:
        return float('nan')
    return int(found.group(1)) * 1024 / 1e6


def main(case: dict):
    """Serves one case: {'formulation', 'remat', 'scenes', 'what'}."""
    if case['formulation'] == 'diffusers':
        import diffusers.models.transformers.cogvideox_transformer_3d  # noqa: F401 (its memory is not the model's)
    jnp.zeros(()).block_until_ready()
    base = _status_mb('VmRSS')
    once, text = (diffusers_with_two_calls if case['formulation'] == 'diffusers' else ours)(case)
    value = once()()
    if not np.isnan(base):
        # The peak counts from here: without compiling, and without what malloc keeps of that.
        ctypes.CDLL(None).malloc_trim(0)
        pathlib.Path('/proc/self/clear_refs').write_text('5')
    print(json.dumps({'value': value}), flush=True)
    for line in sys.stdin:
        if line.strip() == 'profile':
            print(json.dumps(profile(once, text) if text else {}), flush=True)
            continue
        start = time.perf_counter()
        once()
        print(
            json.dumps({'seconds': time.perf_counter() - start, 'mb': _status_mb('VmHWM') - base}),
            flush=True,
        )


if __name__ == '__main__':
    main(json.loads(sys.argv[1]))
