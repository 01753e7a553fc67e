"""Numbers of the reference implementation, within float32 rounding.

The three networks, the schedule, the loss and whole sampling loops are compared. The cases are in
tests/goldens; set MASK2DIT_GOLDENS to run another folder of the same shape.
"""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mask2dit_jax.diffusion import guidance as guidance_lib
from mask2dit_jax.diffusion import loss as loss_lib
from mask2dit_jax.diffusion import samplers
from mask2dit_jax.diffusion import schedule as schedule_lib
from mask2dit_jax.layout import SceneLayout
from mask2dit_jax.models import embeddings, t5, vae
from mask2dit_jax.pretrained import config_json, export, names
from mask2dit_jax.pretrained import load as load_lib

GOLDENS = pathlib.Path(
    os.environ.get('MASK2DIT_GOLDENS', pathlib.Path(__file__).parent / 'goldens')
)
FORWARD = sorted(
    p
    for p in GOLDENS.glob('transformer_*/*.npz')
    if p.stem not in ('pos_embedding_buffer',) and 'bf16' not in p.stem and 'train' not in p.stem
)
TRAIN = sorted(GOLDENS.glob('transformer_*/*train*.npz'))
PIPELINES = sorted(GOLDENS.glob('pipeline/*.npz'))
T5 = sorted(GOLDENS.glob('t5/*.npz'))


@functools.cache
def model_of(folder):
    return load_lib.load_transformer(folder)


def channels_last(x):
    return np.moveaxis(x, 2, -1)


@functools.cache
def vae_of(folder):
    model, params = load_lib.load_vae(folder)
    return model.cfg, params


def video(x):
    """(B, C, F, H, W) to [B, F, H, W, C]."""
    return np.moveaxis(x, 1, -1)


def assert_close(ours, ref, tolerance):
    np.testing.assert_allclose(ours, ref, rtol=0, atol=tolerance * max(1.0, np.abs(ref).max()))


def exported(kind, cfg, params):
    return {n: np.asarray(t) for n, t in export.export_params(kind, cfg, params).items()}


def scene_times(case, batch, num_scenes):
    """Timestep of every scene; all but scene clip_idx are given if the case has one."""
    t = np.broadcast_to(case['timestep'][:, None], (batch, num_scenes))
    if 'clip_idx' not in case:
        return t
    return np.where(np.arange(num_scenes) == case['clip_idx'], t, 0)


@pytest.mark.parametrize('path', FORWARD, ids=lambda p: f'{p.parent.name}-{p.stem}')
def test_transformer_forward(path):
    case = dict(np.load(path))
    model, params = model_of(path.parent)
    num_scenes = int(case['num_scenes'])
    batch, total_frames = case['hidden_states'].shape[:2]
    text = case['encoder_hidden_states'].reshape(batch, num_scenes, -1, model.cfg.text_embed_dim)

    out = jax.jit(model.apply, static_argnames='frames')(
        {'params': params},
        channels_last(case['hidden_states']),
        text,
        scene_times(case, batch, num_scenes),
        frames=(total_frames // num_scenes,) * num_scenes,
    )
    assert_close(out, channels_last(case['output']), 5e-6)


@pytest.mark.parametrize('path', TRAIN, ids=lambda p: p.stem)
def test_loss_and_gradients(path):
    case = dict(np.load(path))
    model, params = model_of(path.parent)
    batch_size, total_frames = case['latents'].shape[:2]
    num_scenes = total_frames // int(case['latents_per_scene'])
    frames = (total_frames // num_scenes,) * num_scenes
    text_shape = (batch_size, num_scenes, -1, model.cfg.text_embed_dim)

    # Conditional training: all scenes but one are given.
    is_conditional = 'cond' in path.stem
    given = (np.arange(num_scenes) != int(case['clip_idx'])) & is_conditional
    given = np.broadcast_to(given, (batch_size, num_scenes))
    batch = {
        'latents': channels_last(case['latents']),
        'text': case['encoder_hidden_states'].reshape(text_shape),
    }

    def loss_fn(params):
        total, count = loss_lib.denoising_loss(
            model,
            params,
            schedule_lib.Schedule(),
            batch,
            channels_last(case['noise']),
            case['timesteps'],
            given,
            frames,
        )
        return total / count

    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(params)
    np.testing.assert_allclose(loss, case['loss'], rtol=5e-5)

    grads = exported('transformer', model.cfg, grads)
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
    np.testing.assert_allclose(norm, case['global_grad_norm'], rtol=5e-5)

    named = [k.removeprefix('grad:') for k in case if k.startswith('grad:')]
    assert named
    for name in named:
        assert_close(grads[name], case[f'grad:{name}'], 5e-5)


def test_sincos_buffer():
    path = GOLDENS / 'transformer_sincos'
    model, _ = model_of(path)
    layout = SceneLayout(
        (model.cfg.base_grid[0],), *model.cfg.base_grid[1:], model.cfg.max_text_seq_length
    )
    ref = np.load(path / 'pos_embedding_buffer.npz')['pos_embedding'][0]
    for rule in ('reference', 'continuous'):
        ours = embeddings.sincos_positions(layout, model.cfg.width, model.cfg.base_grid, rule)
        assert_close(ours, ref, 1e-6)


def test_schedule_tables():
    ref = np.load(GOLDENS / 'schedule/tables.npz')
    default = schedule_lib.Schedule().alphas_bar()
    np.testing.assert_allclose(default, ref['alphas_cumprod_5b'], rtol=0, atol=1e-12)
    shifted = schedule_lib.Schedule(snr_shift_scale=3.0).alphas_bar()
    np.testing.assert_allclose(shifted, ref['alphas_cumprod_2b'], rtol=0, atol=1e-12)
    plain = schedule_lib.Schedule(rescale_betas_zero_snr=False).alphas_bar()
    np.testing.assert_allclose(plain, ref['alphas_cumprod_5b_no_rescale'], rtol=0, atol=1e-12)

    # Keys are timesteps_N or timesteps_N_spacing.
    for key in ref.files:
        if key.startswith('timesteps_'):
            _, num_steps, *spacing = key.split('_')
            schedule = schedule_lib.Schedule(timestep_spacing=spacing[0] if spacing else 'trailing')
            np.testing.assert_array_equal(schedule.timesteps(int(num_steps)), ref[key], err_msg=key)


def test_ddim_steps():
    ref = np.load(GOLDENS / 'schedule/step.npz')
    for key in ref.files:
        if not key.endswith('prev_sample'):
            continue
        num_steps, t = (int(part[1:]) for part in key.split('_')[:2])
        times, table = samplers.sampler_table(
            'ddim', schedule_lib.Schedule(), num_steps, reference_prev=True
        )
        row = table[list(times).index(t)]
        x_next, x0 = samplers.step(row, ref['sample'], ref['model_output'], 0.0)
        assert_close(x_next, ref[key], 5e-6)
        assert_close(x0, ref[key.replace('prev_sample', 'pred_original')], 5e-6)


def test_add_noise_and_velocity():
    ref = np.load(GOLDENS / 'schedule/step.npz')
    args = schedule_lib.Schedule(), ref['sample'], ref['model_output'], ref['timesteps']
    assert_close(schedule_lib.add_noise(*args), ref['add_noise'], 5e-6)
    assert_close(schedule_lib.velocity(*args), ref['velocity'], 5e-6)


def test_bf16_rounding_of_the_reference_leaves_t0_clean():
    schedule = schedule_lib.Schedule()
    x = jnp.ones((1, 2), jnp.bfloat16)
    noise = jnp.full((1, 2), 8.0, jnp.bfloat16)
    t = jnp.array([0])

    rounded = schedule_lib.add_noise(schedule, x, noise, t, table_dtype=jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, x)

    exact = schedule_lib.add_noise(schedule, x.astype(jnp.float32), noise, t)
    assert exact[0, 0] > 1.2


def test_timestep_embedding():
    ref = np.load(GOLDENS / 'schedule/timestep_embedding.npz')
    for key in set(ref.files) - {'timesteps'}:
        width, flip, shift = (int(''.join(filter(str.isdigit, part))) for part in key.split('_'))
        ours = embeddings.timestep_embedding(ref['timesteps'], width, bool(flip), shift)
        # float32 angles of up to 999 rad carry 6e-5 on either side; small timesteps are exact.
        np.testing.assert_allclose(ours, ref[key], rtol=0, atol=1.3e-4, err_msg=key)
        np.testing.assert_allclose(ours[:3], ref[key][:3], rtol=0, atol=4e-6, err_msg=key)


def test_rotary_tables():
    ref = np.load(GOLDENS / 'schedule/rotary.npz')
    for key in ref.files:
        if ':args' not in key:
            continue
        name = key.split(':')[0]
        head_dim, sample_w, sample_h, patch_t, h, w, frames = (int(v) for v in ref[key])
        layout = SceneLayout((frames,), h // 16, w // 16, 1, patch_t or 1)
        rule = 'slice' if patch_t else 'linspace'
        cos, sin = embeddings.rope_table(layout, head_dim, rule, (sample_h // 2, sample_w // 2))
        assert len(cos) == ref[f'{name}:total_rows']
        rows = ref[f'{name}:rows']
        np.testing.assert_allclose(cos[rows], ref[f'{name}:cos'], rtol=0, atol=5e-6, err_msg=name)
        np.testing.assert_allclose(sin[rows], ref[f'{name}:sin'], rtol=0, atol=5e-6, err_msg=name)

    x = np.moveaxis(ref['apply_x'], 1, 2)  # [B, L, N, D]
    out = embeddings.apply_rope(x, ref['apply_cos'], ref['apply_sin'])
    assert_close(np.moveaxis(out, 2, 1), ref['apply_out'], 5e-6)

    for h, w, top, left, bottom, right in ref['crop_h_w_top_left_bottom_right_base30x45']:
        crop = embeddings.fit_grid((int(h), int(w)), (30, 45))
        assert crop == (top, left, bottom - top, right - left)


@functools.cache
def run_pipeline(path):
    """Final latents and those of every step."""
    case = dict(np.load(path))
    model, params = model_of(path.parent / 'transformer')
    schedule = config_json.load_schedule(path.parent / 'scheduler/scheduler_config.json')
    num_scenes = int(case['num_scenes'])
    batch, total_frames = case['init_latents'].shape[:2]
    frames = (total_frames // num_scenes,) * num_scenes
    layout = model.cfg.layout(frames, *case['init_latents'].shape[-2:])

    times, table = samplers.sampler_table(
        'ddim', schedule, len(case['timesteps']), reference_prev=True
    )
    np.testing.assert_array_equal(times, case['timesteps'])

    text_shape = (batch, num_scenes, -1, model.cfg.text_embed_dim)
    negative = case['negative_prompt_embeds'].reshape(text_shape)
    positive = case['prompt_embeds'].reshape(text_shape)
    text = np.concatenate([negative, positive])

    # In these cases the initial latents of given scenes are their clean latents.
    noise = channels_last(case['init_latents'])
    if 'clip_idx' in case:
        given_scenes = np.arange(num_scenes) != int(case['clip_idx'])
        given = {'given': noise, 'given_scenes': given_scenes}
    else:
        given = {}
    guidance = np.repeat(case['guidance_per_step'][:, None], num_scenes, axis=1)

    @jax.jit
    def run(params, noise):
        def v(x, t):
            return model.apply({'params': params}, x, text, t, frames=frames)

        return samplers.sample(v, noise, layout, times, table, guidance, trace=True, **given)

    return run(params, noise)


@pytest.mark.parametrize('path', PIPELINES, ids=lambda p: p.stem)
def test_sampling_loops(path):
    case = dict(np.load(path))
    final, steps = run_pipeline(path)

    for i in range(len(case['timesteps'])):
        assert_close(steps[i], channels_last(case['latents_per_step'][i]), 5e-5)
    assert_close(final, channels_last(case['final_latents']), 5e-5)


def test_reference_noises_given_latents():
    case = np.load(GOLDENS / 'pipeline/ar_3scenes_5steps_cfg6.npz')
    noised = schedule_lib.add_noise(
        schedule_lib.Schedule(), case['cond_latents_clean'], case['cond_noise'], 0
    )
    assert_close(noised, case['cond_latents_noised'], 5e-6)


def test_dynamic_guidance():
    dynamic = guidance_lib.reference_dynamic_guidance
    assert dynamic(6.0, 50, 50) == 1
    assert dynamic(6.0, 0, 50) == 1 + 6
    # ((50 - t)/50)^5 = 1/2: the cosine is 0.
    assert dynamic(6.0, 50 - 50 * 0.5**0.2, 50) == pytest.approx(1 + 6 / 2)


@pytest.mark.parametrize('path', T5, ids=lambda p: p.stem)
def test_t5(path):
    case = dict(np.load(path))
    model, params = load_lib.load_t5(path.parent)
    mask = case['attention_mask'].astype(bool) if 'attention_mask' in case else None
    out = t5.encode(model.cfg, params, case['input_ids'], mask)
    assert_close(out, case['last_hidden_state'], 1e-5)


def test_t5_buckets():
    case = np.load(GOLDENS / 't5/forward_226.npz')
    relative = case['relative_positions_key_minus_query']
    farthest = int(np.abs(relative).max())

    # The query in the middle has keys at all distances.
    table = t5.relative_buckets(2 * farthest + 1, 32, 128)
    np.testing.assert_array_equal(table[farthest, farthest + relative], case['buckets'])


@pytest.mark.parametrize('path', sorted(GOLDENS.glob('vae/encode_*.npz')), ids=lambda p: p.stem)
def test_vae_encode(path):
    case = dict(np.load(path))
    mean, logvar = vae.encode(*vae_of(path.parent), video(case['video']))
    assert_close(mean, video(case['mean']), 1e-5)
    assert_close(logvar, video(case['logvar']), 1e-5)
    sample = mean + np.exp(0.5 * logvar) * video(case['posterior_noise'])
    assert_close(sample, video(case['posterior_sample']), 1e-5)


@pytest.mark.parametrize('path', sorted(GOLDENS.glob('vae/decode_*.npz')), ids=lambda p: p.stem)
@pytest.mark.parametrize('rule, key', [('reference', 'video'), ('diffusers', 'video_auto_split')])
def test_vae_decode(path, rule, key):
    case = dict(np.load(path))
    decoded = vae.decode(*vae_of(path.parent), video(case['latents']), rule=rule)
    assert_close(decoded, video(case[key]), 1e-5)


def test_vae_codes_scenes_apart():
    case = {k: video(v) for k, v in np.load(GOLDENS / 'vae/per_scene_2x9frames_batch2.npz').items()}
    cfg, params = vae_of(GOLDENS / 'vae')

    scenes = np.split(case['video'], 2, axis=1)
    latents = [vae.encode(cfg, params, scene)[0] for scene in scenes]
    latents = np.concatenate(latents, axis=1)
    assert_close(latents, case['latents_mode'], 1e-5)
    assert_close(latents * cfg.scaling_factor, case['latents_mode_times_scaling'], 1e-5)

    joint, _ = vae.encode(cfg, params, case['video'])
    assert_close(joint, case['joint_latents_mode'], 1e-5)

    scenes = np.split(case['latents_mode'], 2, axis=1)
    decoded = [vae.decode(cfg, params, scene[:1]) for scene in scenes]
    assert_close(np.concatenate(decoded, axis=1), case['decoded_item0'], 1e-5)


@pytest.mark.parametrize('path', PIPELINES, ids=lambda p: p.stem)
def test_pipelines_to_video(path):
    """From captions' embeddings and given clips to pixels.

    The random VAE amplifies errors, hence the tolerance of the pixels.
    """
    case = dict(np.load(path))
    cfg, params = vae_of(path.parent / 'vae')
    num_scenes = int(case['num_scenes'])

    if 'video_conds' in case:
        posteriors = [
            vae.encode(cfg, params, channels_last(clip[None])) for clip in case['video_conds']
        ]
        mean = np.concatenate([mean for mean, _ in posteriors], axis=1)
        std = np.concatenate([np.exp(0.5 * logvar) for _, logvar in posteriors], axis=1)
        assert_close(mean, channels_last(case['posterior_mean']), 1e-5)
        sampled = mean + std * channels_last(case['posterior_noise_recovered'])
        latents = sampled * cfg.scaling_factor
        assert_close(latents, channels_last(case['cond_latents_clean']), 1e-5)

    final, _ = run_pipeline(path)
    scenes = np.split(final / cfg.scaling_factor, num_scenes, axis=1)
    pixels = np.concatenate([vae.decode(cfg, params, scene) for scene in scenes], axis=1)
    assert_close(np.clip(pixels / 2 + 0.5, 0, 1), video(case['video_0_1']), 5e-4)


NETWORKS = [('transformer', f) for f in sorted(GOLDENS.glob('transformer_*'))] + [
    ('vae', GOLDENS / 'vae'),
    ('text_encoder', GOLDENS / 't5'),
]


@pytest.mark.parametrize('kind, folder', NETWORKS, ids=lambda x: getattr(x, 'name', x))
def test_round_trip_is_bit_equal(kind, folder):
    tensors = load_file(folder / 'weights.safetensors')
    tensors.pop('encoder.embed_tokens.weight', None)  # the same as shared.weight
    loaders = {
        'transformer': load_lib.load_transformer,
        'vae': load_lib.load_vae,
        'text_encoder': load_lib.load_t5,
    }
    model, params = loaders[kind](folder)

    back = exported(kind, model.cfg, params)
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], value, err_msg=name)


@pytest.mark.parametrize('kind, folder', NETWORKS[-3:], ids=lambda x: getattr(x, 'name', x))
def test_loading_names_what_does_not_fit(kind, folder):
    cfg = config_json.read_config(kind, folder)
    target = load_lib.on_one_device(names.abstract_params(cfg, kind))
    tensors = load_file(folder / 'weights.safetensors')

    # One tensor under another name, and one of another shape.
    first, second = sorted(tensors)[:2]
    tensors['stray'] = tensors.pop(first)
    tensors[second] = tensors[second][:-1]

    with pytest.raises(
        ValueError, match=f'missing {first}.*{second} has shape.*expected.*unexpected stray'
    ):
        load_lib.import_params(kind, cfg, tensors, target)
