"""Numbers of the reference implementation, within float32 rounding: transformers, schedule, loss, sampling loops.

Cases lie in tests/goldens; set MASK2DIT_GOLDENS to run another folder of the same shape.
"""
import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mask2dit_jax import convert, diffusion, samplers, scenes, train_step
from mask2dit_jax.models import dit

GOLDENS = pathlib.Path(os.environ.get('MASK2DIT_GOLDENS', pathlib.Path(__file__).parent / 'goldens'))
FORWARD = sorted(p for p in GOLDENS.glob('transformer_*/*.npz')
                 if p.stem not in ('pos_embedding_buffer',) and 'bf16' not in p.stem and 'train' not in p.stem)
TRAIN = sorted(GOLDENS.glob('transformer_*/*train*.npz'))
PIPELINES = sorted(GOLDENS.glob('pipeline/*.npz'))


@functools.cache
def model_of(folder):
    return convert.load_transformer(folder)


def channels_last(x):
    return np.moveaxis(x, 2, -1)


def assert_close(ours, ref, tolerance):
    np.testing.assert_allclose(ours, ref, rtol=0, atol=tolerance * max(1.0, np.abs(ref).max()))


def scene_times(case, batch, num_scenes):
    t = np.broadcast_to(case['timestep'][:, None], (batch, num_scenes))
    return np.where(np.arange(num_scenes) == case['clip_idx'], t, 0) if 'clip_idx' in case else t


@pytest.mark.parametrize('path', FORWARD, ids=lambda p: f'{p.parent.name}-{p.stem}')
def test_transformer_forward(path):
    case = dict(np.load(path))
    model, params = model_of(path.parent)
    s, (b, f) = int(case['num_scenes']), case['hidden_states'].shape[:2]
    text = case['encoder_hidden_states'].reshape(b, s, -1, model.cfg.text_embed_dim)
    out = jax.jit(model.apply, static_argnames='frames')(
        {'params': params}, channels_last(case['hidden_states']), text, scene_times(case, b, s), frames=(f // s,) * s)
    assert_close(out, channels_last(case['output']), 5e-6)


@pytest.mark.parametrize('path', TRAIN, ids=lambda p: p.stem)
def test_loss_and_gradients(path):
    case = dict(np.load(path))
    model, params = model_of(path.parent)
    b, f = case['latents'].shape[:2]
    s = f // int(case['latents_per_scene'])
    frames, is_cond = (f // s,) * s, 'cond' in path.stem
    given = np.broadcast_to((np.arange(s) != int(case['clip_idx'])) & is_cond, (b, s))
    batch = {'latents': channels_last(case['latents']),
             'text': case['encoder_hidden_states'].reshape(b, s, -1, model.cfg.text_embed_dim)}

    def loss_fn(params):
        total, count = train_step.denoising_loss(model, params, diffusion.Schedule(), batch,
                                                 channels_last(case['noise']), case['timesteps'], given, frames)
        return total / count

    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(params)
    np.testing.assert_allclose(loss, case['loss'], rtol=5e-5)
    grads = convert.export_transformer(model.cfg, grads)
    norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in grads.values()))
    np.testing.assert_allclose(norm, case['global_grad_norm'], rtol=5e-5)
    named = [k.removeprefix('grad:') for k in case if k.startswith('grad:')]
    assert named
    for name in named:
        assert_close(grads[name], case[f'grad:{name}'], 5e-5)


def test_sincos_buffer():
    path = GOLDENS / 'transformer_sincos'
    model, _ = model_of(path)
    layout = scenes.SceneLayout((model.cfg.base_grid[0],), *model.cfg.base_grid[1:], model.cfg.max_text_seq_length)
    ref = np.load(path / 'pos_embedding_buffer.npz')['pos_embedding'][0]
    for rule in ('reference', 'continuous'):
        ours = scenes.sincos_positions(layout, model.cfg.width, model.cfg.base_grid, rule)
        assert_close(ours, ref, 1e-6)


def test_schedule_tables():
    ref = np.load(GOLDENS / 'schedule/tables.npz')
    np.testing.assert_allclose(diffusion.Schedule().alphas_bar(), ref['alphas_cumprod_5b'], rtol=0, atol=1e-12)
    shifted = diffusion.Schedule(snr_shift_scale=3.0).alphas_bar()
    np.testing.assert_allclose(shifted, ref['alphas_cumprod_2b'], rtol=0, atol=1e-12)
    plain = diffusion.Schedule(rescale_betas_zero_snr=False).alphas_bar()
    np.testing.assert_allclose(plain, ref['alphas_cumprod_5b_no_rescale'], rtol=0, atol=1e-12)
    for key in ref.files:
        if key.startswith('timesteps_'):
            _, n, *spacing = key.split('_')
            schedule = diffusion.Schedule(timestep_spacing=spacing[0] if spacing else 'trailing')
            np.testing.assert_array_equal(schedule.timesteps(int(n)), ref[key], err_msg=key)


def test_ddim_steps():
    ref = np.load(GOLDENS / 'schedule/step.npz')
    for key in ref.files:
        if not key.endswith('prev_sample'):
            continue
        n, t = (int(part[1:]) for part in key.split('_')[:2])
        times, table = samplers.sampler_table('ddim', diffusion.Schedule(), n, reference_prev=True)
        row = table[list(times).index(t)]
        x_next, x0 = samplers.step(row, ref['sample'], ref['model_output'], 0.0)
        assert_close(x_next, ref[key], 5e-6)
        assert_close(x0, ref[key.replace('prev_sample', 'pred_original')], 5e-6)


def test_add_noise_and_velocity():
    ref = np.load(GOLDENS / 'schedule/step.npz')
    args = diffusion.Schedule(), ref['sample'], ref['model_output'], ref['timesteps']
    assert_close(diffusion.add_noise(*args), ref['add_noise'], 5e-6)
    assert_close(diffusion.velocity(*args), ref['velocity'], 5e-6)


def test_bf16_rounding_of_the_reference_leaves_t0_clean():
    x, noise = jnp.ones((1, 2), jnp.bfloat16), jnp.full((1, 2), 8.0, jnp.bfloat16)
    rounded = diffusion.add_noise(diffusion.Schedule(), x, noise, jnp.array([0]), table_dtype=jnp.bfloat16)
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(rounded, x)
    assert diffusion.add_noise(diffusion.Schedule(), x.astype(jnp.float32), noise, jnp.array([0]))[0, 0] > 1.2


def test_timestep_embedding():
    ref = np.load(GOLDENS / 'schedule/timestep_embedding.npz')
    for key in set(ref.files) - {'timesteps'}:
        width, flip, shift = (int(''.join(filter(str.isdigit, part))) for part in key.split('_'))
        ours = dit.timestep_embedding(ref['timesteps'], width, bool(flip), shift)
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
        layout = scenes.SceneLayout((frames,), h // 16, w // 16, 1, patch_t or 1)
        rule = 'slice' if patch_t else 'linspace'
        cos, sin = scenes.rope_table(layout, head_dim, rule, (sample_h // 2, sample_w // 2))
        assert len(cos) == ref[f'{name}:total_rows']
        rows = ref[f'{name}:rows']
        np.testing.assert_allclose(cos[rows], ref[f'{name}:cos'], rtol=0, atol=5e-6, err_msg=name)
        np.testing.assert_allclose(sin[rows], ref[f'{name}:sin'], rtol=0, atol=5e-6, err_msg=name)
    x = np.moveaxis(ref['apply_x'], 1, 2)  # [B, L, N, D]
    out = dit.apply_rope(x, ref['apply_cos'], ref['apply_sin'])
    assert_close(np.moveaxis(out, 2, 1), ref['apply_out'], 5e-6)
    for h, w, top, left, bottom, right in ref['crop_h_w_top_left_bottom_right_base30x45']:
        assert scenes.fit_grid((int(h), int(w)), (30, 45)) == (top, left, bottom - top, right - left)


@pytest.mark.parametrize('path', PIPELINES, ids=lambda p: p.stem)
def test_sampling_loops(path):
    case = dict(np.load(path))
    model, params = model_of(path.parent / 'transformer')
    schedule = convert.load_schedule(path.parent / 'scheduler/scheduler_config.json')
    s, (b, f) = int(case['num_scenes']), case['init_latents'].shape[:2]
    frames = (f // s,) * s
    layout = model.cfg.layout(frames, *case['init_latents'].shape[-2:])
    num_steps = len(case['timesteps'])
    times, table = samplers.sampler_table('ddim', schedule, num_steps, reference_prev=True)
    np.testing.assert_array_equal(times, case['timesteps'])
    text = np.concatenate([case[k].reshape(b, s, -1, model.cfg.text_embed_dim)
                           for k in ('negative_prompt_embeds', 'prompt_embeds')])
    noise = channels_last(case['init_latents'])
    given = {'given': noise, 'given_scenes': np.arange(s) != int(case['clip_idx'])} if 'clip_idx' in case else {}
    guidance = np.repeat(case['guidance_per_step'][:, None], s, axis=1)

    @jax.jit
    def run(params, noise):
        def v(x, t):
            return model.apply({'params': params}, x, text, t, frames=frames)
        return samplers.sample(v, noise, layout, times, table, guidance, trace=True, **given)

    final, steps = run(params, noise)
    for i in range(num_steps):
        assert_close(steps[i], channels_last(case['latents_per_step'][i]), 5e-5)
    assert_close(final, channels_last(case['final_latents']), 5e-5)


def test_reference_noises_given_latents():
    case = np.load(GOLDENS / 'pipeline/ar_3scenes_5steps_cfg6.npz')
    noised = diffusion.add_noise(diffusion.Schedule(), case['cond_latents_clean'], case['cond_noise'], 0)
    assert_close(noised, case['cond_latents_noised'], 5e-6)


def test_dynamic_guidance():
    assert samplers.reference_dynamic_guidance(6.0, 50, 50) == 1
    assert samplers.reference_dynamic_guidance(6.0, 0, 50) == 1 + 6
    # ((50 - t)/50)^5 = 1/2: the cosine is 0.
    assert samplers.reference_dynamic_guidance(6.0, 50 - 50 * 0.5 ** 0.2, 50) == pytest.approx(1 + 6 / 2)


def test_round_trip_is_bit_equal():
    from safetensors.numpy import load_file
    for folder in GOLDENS.glob('transformer_*'):
        model, params = model_of(folder)
        tensors = load_file(folder / 'weights.safetensors')
        exported = convert.export_transformer(model.cfg, params)
        assert exported.keys() == tensors.keys()
        for name, value in tensors.items():
            np.testing.assert_array_equal(exported[name], value, err_msg=name)


def test_loader_names_what_does_not_fit():
    folder = GOLDENS / 'transformer_rope'
    model, _ = model_of(folder)
    from safetensors.numpy import load_file
    tensors = load_file(folder / 'weights.safetensors')
    tensors['stray'] = tensors.pop('proj_out.bias')
    tensors['norm_final.weight'] = tensors['norm_final.weight'][:-1]
    problems = r'norm_final.weight has shape \(47,\).*missing proj_out.bias.*unexpected stray'
    with pytest.raises(ValueError, match=problems):
        convert.import_transformer(model.cfg, tensors)
    with pytest.raises(ValueError, match='keys that the transformer does not know: frobnicate'):
        convert.transformer_config({'frobnicate': 1})
