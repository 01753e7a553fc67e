"""Numbers of the reference implementation, within float32 rounding.

The three networks, the schedule, the loss and whole sampling loops are compared. The cases are in
tests/goldens; set MASK2DIT_GOLDENS to run another folder. Names of files and folders do not matter:
a network is a folder with config.json and weights, and a case is told by the names of its arrays
(KINDS). What is of no known kind fails test_every_golden_is_known.
"""

import collections
import functools
import json
import os
import pathlib
import re
import shutil
import types
import warnings
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mask2dit_jax.data import clips, manifest
from mask2dit_jax.diffusion import guidance as guidance_lib
from mask2dit_jax.diffusion import loss as loss_lib
from mask2dit_jax.diffusion import samplers
from mask2dit_jax.diffusion import schedule as schedule_lib
from mask2dit_jax.layout import SceneLayout, frame_scenes
from mask2dit_jax.models import embeddings, t5, vae
from mask2dit_jax.pretrained import config_json, export, names
from mask2dit_jax.pretrained import load as load_lib

OWN_GOLDENS = pathlib.Path(__file__).parent / 'goldens'
GOLDENS = pathlib.Path(os.environ.get('MASK2DIT_GOLDENS', OWN_GOLDENS))

# The kinds of cases: the arrays that every case of a kind has, and all others that its test reads,
# as regular expressions of whole names. A file may be of several kinds.
KINDS = {
    'forward': (
        'hidden_states',
        'encoder_hidden_states timestep timestep_conditioning num_scenes clip_idx output',
    ),
    'training': (
        'global_grad_norm',
        'latents noise timesteps encoder_hidden_states latents_per_scene clip_idx loss grad:.*',
    ),
    'positions': ('pos_embedding', ''),
    'text': ('input_ids', 'attention_mask last_hidden_state'),
    'buckets': ('buckets', 'relative_positions_key_minus_query'),
    'encoding': ('video mean', 'logvar mode std moments posterior_noise posterior_sample'),
    'decoding': ('latents video|video_auto_split', ''),
    'scenes apart': (
        'latents_mode',
        'video latents_mode_times_scaling joint_latents_mode decoded_item0',
    ),
    'loop': (
        'prompt_embeds init_latents',
        'negative_prompt_embeds num_scenes clip_idx timesteps guidance_per_step final_latents '
        'latents_per_step',
    ),
    'given clips': (
        'prompt_embeds video_conds',
        'posterior_mean posterior_noise_recovered cond_latents_clean',
    ),
    'pixels': ('prompt_embeds video_0_1', ''),
    'noised clips': ('cond_latents_clean cond_noise', 'cond_latents_noised'),
    'tables': ('alphas_cumprod_.*|timesteps_.*', 'final_alpha_cumprod_.*'),
    'steps': ('.*_prev_sample', '.*_pred_original sample model_output'),
    'noising': (
        'add_noise|noisy_latents velocity|target',
        'sample|latents model_output|noise timesteps latents_per_scene clip_idx',
    ),
    'sinusoids': (r'dim\d+_.*', 'timesteps'),
    'rotary': ('.*:args_.*', '.*:total_rows .*:rows .*:cos .*:sin'),
    'rotation': ('apply_x', 'apply_cos apply_sin apply_out'),
    'crops': ('crop_h_w_.*', ''),
    'frames of clips': ('sft_max_stride|pretrain_linspace', ''),
    'resized frames': ('.*_uint8_thwc', '.*_size .*_antialias .*_no_antialias'),
}
# FFmpeg resizes frames here, which differs from PyTorch.
NOT_COMPARED = ['resized frames']
# Inputs that follow from others, and intermediate results.
SPARE_ARRAYS = (
    'tap_.* rope_cos rope_sin model_pred bias_head.* height_width_frames guidance_scale '
    'batch_size cond_t new_scene_noise posterior_std add_noise_t0_scalar'
)

NETWORK_CLASSES = {
    'CogVideoXTransformer3DModel': 'transformer',
    'MultiPromptCogVideoXTransformer3DModel': 'transformer',
    'AutoencoderKLCogVideoX': 'vae',
    'T5EncoderModel': 'text_encoder',
    'T5ForConditionalGeneration': 'text_encoder',
}
SCHEDULER_SAMPLERS = {'CogVideoXDDIMScheduler': 'ddim', 'DDIMScheduler': 'ddim'}


# ------------------------------------------------------------------------------------------------
# What a folder holds


def matches(patterns, name):
    return any(re.fullmatch(pattern, name) for pattern in patterns.split())


def network_class(config):
    """The name of the class that a config.json is for, or None."""
    architectures = config.get('architectures') or [None]
    return config.get('_class_name', architectures[0])


def kinds_of(arrays):
    """The kinds of a case that has these arrays."""
    return [
        kind
        for kind, (required, _) in KINDS.items()
        if all(any(re.fullmatch(pattern, a) for a in arrays) for pattern in required.split())
    ]


def find_goldens(folder):
    """Sorts every file in and below a folder.

    Returns:
      networks: folders of networks by the kind of network.
      cases: paths of cases by kind.
      unknown: what is of no known kind, one line each.
      spare: arrays that are compared with nothing and are not known to be spare, likewise.
    """
    networks = collections.defaultdict(list)
    cases = collections.defaultdict(list)
    unknown = []
    spare = []

    for path in sorted(folder.rglob('*')):
        if path.is_dir() or path.name.startswith('.') or path.suffix == '.md':
            continue
        has_config = (path.parent / 'config.json').exists()
        if has_config and path.name.endswith(('.safetensors', '.safetensors.index.json')):
            continue

        try:
            content = json.loads(path.read_text()) if path.suffix == '.json' else np.load(path)
            content.keys()  # an .npy file has none
        except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
            unknown.append(f'{path} is no case ({error})')
            continue

        if path.name == 'config.json':
            kind = NETWORK_CLASSES.get(network_class(content))
            if kind is None:
                unknown.append(f'{path} is for {network_class(content)}')
            elif not list(path.parent.glob('*.safetensors')):
                unknown.append(f'{path} has no weights beside it')
            else:
                networks[kind].append(path.parent)
        elif path.name == 'scheduler_config.json':
            if content.get('_class_name') not in SCHEDULER_SAMPLERS:
                unknown.append(f'{path} is for {content.get("_class_name")}')
        else:
            kinds = kinds_of(content.keys())
            if not kinds:
                unknown.append(f'{path} holds {", ".join(content)}')
            for kind in kinds:
                cases[kind].append(path)

            known = ' '.join([*(word for kind in kinds for word in KINDS[kind]), SPARE_ARRAYS])
            others = [array for array in content if not matches(known, array)]
            if kinds and others:
                spare.append(f'{path} also holds {", ".join(others)}')
    return types.SimpleNamespace(networks=networks, cases=cases, unknown=unknown, spare=spare)


FOUND = find_goldens(GOLDENS)


def id_of(path):
    return path.relative_to(GOLDENS).with_suffix('').as_posix()


def each_case(kind):
    """Runs a test with every case of a kind."""
    return pytest.mark.parametrize('path', FOUND.cases[kind], ids=id_of)


class Case(dict):
    """The arrays of a case; one that is missing is an error that names the file."""

    def __init__(self, path):
        super().__init__(np.load(path))
        self.path = path

    def __missing__(self, name):
        pytest.fail(f'{self.path} lacks {name}.')


def network_beside(path, kind):
    """Folder of the one network of a kind in the folder of a case, or in a folder below it."""
    near = [f for f in find_goldens(path.parent).networks[kind] if path.parent in (f, f.parent)]
    assert len(near) == 1, f'{path} needs one {kind} beside it, not {len(near)}.'
    return near[0]


def read_scheduler(path):
    """The schedule and the sampler of a pipeline's case."""
    files = sorted(path.parent.rglob('scheduler_config.json'))
    assert len(files) == 1, f'{path} needs one scheduler_config.json beside it, not {len(files)}.'
    name = json.loads(files[0].read_text()).get('_class_name')
    assert name in SCHEDULER_SAMPLERS, f'{files[0]} is for {name}, which has no sampler here.'
    return config_json.load_schedule(files[0]), SCHEDULER_SAMPLERS[name]


def check_known(folder):
    """Fails if a folder holds no goldens or unknown ones, and warns of what is not compared."""
    found = find_goldens(folder)
    assert found.networks or found.cases, f'There are no goldens in {folder}.'
    for kind in NOT_COMPARED:
        for path in found.cases[kind]:
            warnings.warn(f'{path} is compared with nothing: {kind}.', stacklevel=1)
    for line in found.spare:
        warnings.warn(f'{line}, compared with nothing.', stacklevel=1)
    assert not found.unknown, '\n'.join(['Goldens of no known kind:', *found.unknown])


def test_every_golden_is_known():
    check_known(GOLDENS)


def test_own_goldens_are_of_every_kind():
    found = find_goldens(OWN_GOLDENS)
    assert {kind for kind, paths in found.cases.items() if paths} == set(KINDS) - {*NOT_COMPARED}
    assert found.networks.keys() == names.NETWORKS.keys()
    assert not found.unknown and not found.spare


def test_goldens_may_have_any_name(tmp_path):
    """All cases and networks are found again, each case beside its network."""
    own = find_goldens(OWN_GOLDENS)
    for number, folder in enumerate(sorted(OWN_GOLDENS.iterdir())):
        shutil.copytree(folder, tmp_path / f'{number}')
    for number, path in enumerate(sorted(tmp_path.rglob('*.npz'))):
        path.rename(path.with_stem(f'case {number}'))
    for path in [*tmp_path.rglob('weights.safetensors')]:
        path.rename(path.with_stem('model'))
        if path.parent.parent != tmp_path:
            path.parent.rename(path.parent.with_name(f'{path.parent.name} of it'))

    found = find_goldens(tmp_path)
    assert not found.unknown
    for ours, theirs in ((own.cases, found.cases), (own.networks, found.networks)):
        assert {k: len(v) for k, v in ours.items()} == {k: len(v) for k, v in theirs.items()}
    for path in found.cases['loop']:
        assert network_beside(path, 'vae').name == 'vae of it'
        read_scheduler(path)


def test_what_is_not_known_is_named(tmp_path):
    with pytest.raises(AssertionError, match='There are no goldens in'):
        check_known(tmp_path)
    with pytest.raises(AssertionError, match='There are no goldens in'):
        check_known(tmp_path / 'nowhere')

    shutil.copytree(OWN_GOLDENS / 'vae', tmp_path / 'vae')
    check_known(tmp_path)

    bad = {}

    def unknown(name, message):
        bad[name] = message
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        return path

    unknown('notes.txt', 'is no case').write_text('numbers')
    unknown('cut.npz', 'is no case').write_bytes(
        (tmp_path / 'vae/decode_3latents.npz').read_bytes()[:99]
    )
    np.save(unknown('one.npy', 'is no case'), np.zeros(2))
    np.savez(unknown('guidance.npz', 'holds dynamic, steps'), dynamic=np.ones(2), steps=np.ones(2))
    unknown('report.json', 'holds scores').write_text('{"scores": []}')
    unknown('unet/config.json', 'is for UNet').write_text('{"_class_name": "UNet"}')
    unknown('empty/config.json', 'has no weights').write_text(
        '{"architectures": ["T5EncoderModel"]}'
    )
    save_file({'x': np.ones(1)}, unknown('alone/weights.safetensors', 'is no case'))
    unknown('s/scheduler_config.json', 'is for Euler').write_text('{"_class_name": "Euler"}')
    with pytest.raises(AssertionError) as error:
        check_known(tmp_path)
    lines = str(error.value).splitlines()[1:]
    for name, message in bad.items():
        assert [line for line in lines if f'{tmp_path / name} {message}' in line], name
    assert 'vae/decode' not in str(error.value)


def test_what_a_case_has_more_or_less_is_named(tmp_path):
    folder = tmp_path / 'vae'
    shutil.copytree(OWN_GOLDENS / 'vae', folder)
    path = folder / 'encode_9frames.npz'
    np.savez(path, **np.load(path), flow=np.zeros(2))
    with pytest.warns(UserWarning, match=f'{path} also holds flow, compared with nothing'):
        check_known(tmp_path)
    with pytest.raises(pytest.fail.Exception, match=f'{path} lacks output'):
        Case(path)['output']

    shutil.copytree(folder, folder / 'another')
    with pytest.raises(AssertionError, match=f'{path} needs one vae beside it, not 2'):
        network_beside(path, 'vae')
    with pytest.raises(AssertionError, match=f'{path} needs one transformer beside it, not 0'):
        network_beside(path, 'transformer')


# ------------------------------------------------------------------------------------------------
# Comparisons


@functools.cache
def model_of(folder):
    return load_lib.load_transformer(folder)


def channels_last(x):
    return np.moveaxis(x, 2, -1)


@functools.cache
def vae_of(folder):
    model, params = load_lib.load_vae(folder)
    return model.cfg, params


def vae_beside(path):
    return vae_of(network_beside(path, 'vae'))


def video(x):
    """(B, C, F, H, W) to [B, F, H, W, C]."""
    return np.moveaxis(x, 1, -1)


def assert_close(ours, ref, tolerance):
    np.testing.assert_allclose(ours, ref, rtol=0, atol=tolerance * max(1.0, np.abs(ref).max()))


def exported(kind, cfg, params):
    return {n: np.asarray(t) for n, t in export.export_params(kind, cfg, params).items()}


def is_given(case, num_scenes):
    """Bool [S]: all scenes but clip_idx are given, if the case has one that is not negative."""
    if 'clip_idx' not in case or case['clip_idx'] < 0:
        return np.zeros(num_scenes, bool)
    return np.arange(num_scenes) != case['clip_idx']


def frame_times(case, batch, frames):
    """Timestep of every latent frame, [B, T]."""
    t = np.broadcast_to(case['timestep'].reshape(-1, 1), (batch, sum(frames)))
    t_given = np.ravel(case.get('timestep_conditioning', 0)).reshape(-1, 1)  # for all, or [B, 1]
    return np.where(is_given(case, len(frames))[frame_scenes(frames)], t_given, t)


@each_case('forward')
def test_transformer_forward(path):
    case = Case(path)
    model, params = model_of(network_beside(path, 'transformer'))
    num_scenes = int(case['num_scenes'])
    batch, total_frames = case['hidden_states'].shape[:2]
    text = case['encoder_hidden_states'].reshape(batch, num_scenes, -1, model.cfg.text_embed_dim)

    frames = (total_frames // num_scenes,) * num_scenes
    out = jax.jit(model.apply, static_argnames='frames')(
        {'params': params},
        channels_last(case['hidden_states']),
        text,
        frame_times(case, batch, frames),
        frames=frames,
    )
    assert_close(out, channels_last(case['output']), 5e-6)


@each_case('training')
def test_loss_and_gradients(path):
    case = Case(path)
    model, params = model_of(network_beside(path, 'transformer'))
    batch_size, total_frames = case['latents'].shape[:2]
    num_scenes = total_frames // int(case['latents_per_scene'])
    frames = (total_frames // num_scenes,) * num_scenes
    text_shape = (batch_size, num_scenes, -1, model.cfg.text_embed_dim)

    of_frames = is_given(case, num_scenes)[frame_scenes(frames)]
    given = np.broadcast_to(of_frames, (batch_size, total_frames))
    t = np.where(given, 0, case['timesteps'][:, None])  # [B, T]
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
            t,
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
    assert named, f'{path} lacks gradients.'
    for name in named:
        assert_close(grads[name], case[f'grad:{name}'], 5e-5)


@each_case('positions')
def test_sincos_buffer(path):
    model, _ = model_of(network_beside(path, 'transformer'))
    layout = SceneLayout(
        (model.cfg.base_grid[0],), *model.cfg.base_grid[1:], model.cfg.max_text_seq_length
    )
    scales = model.cfg.temporal_interpolation_scale, model.cfg.spatial_interpolation_scale
    ref = Case(path)['pos_embedding'][0]
    for rule in ('reference', 'continuous'):
        ours = embeddings.sincos_positions(
            layout, model.cfg.width, model.cfg.base_grid, rule, *scales
        )
        assert_close(ours, ref, 1e-6)


SCHEDULES = {
    '5b': schedule_lib.Schedule(),
    '2b': schedule_lib.Schedule(snr_shift_scale=3.0),
    '5b_no_rescale': schedule_lib.Schedule(rescale_betas_zero_snr=False),
}


@each_case('tables')
def test_schedule_tables(path):
    case = Case(path)
    for key, ref in case.items():
        if key.startswith('alphas_cumprod_'):
            name = key.removeprefix('alphas_cumprod_')
            assert name in SCHEDULES, f'{path} has {key}, which is of no known schedule.'
            np.testing.assert_allclose(
                SCHEDULES[name].alphas_bar(), ref, rtol=0, atol=1e-12, err_msg=key
            )

        # timesteps_N or timesteps_N_spacing.
        if key.startswith('timesteps_'):
            _, num_steps, *spacing = key.split('_')
            schedule = schedule_lib.Schedule(timestep_spacing=spacing[0] if spacing else 'trailing')
            np.testing.assert_array_equal(schedule.timesteps(int(num_steps)), ref, err_msg=key)


@each_case('steps')
def test_ddim_steps(path):
    case = Case(path)
    for key, ref in case.items():
        if not key.endswith('prev_sample'):
            continue
        num_steps, t = (int(part[1:]) for part in key.split('_')[:2])
        times, table = samplers.sampler_table(
            'ddim', schedule_lib.Schedule(), num_steps, reference_prev=True
        )
        row = table[list(times).index(t)]
        x_next, x0 = samplers.step(row, case['sample'], case['model_output'], 0.0)
        assert_close(x_next, ref, 5e-6)
        assert_close(x0, case[key.replace('prev_sample', 'pred_original')], 5e-6)


@each_case('noising')
def test_add_noise_and_velocity(path):
    """Also in bfloat16, whose values are stored as float32, if the file's name says so."""
    case = Case(path)
    x = case['sample' if 'sample' in case else 'latents']
    noise = case['model_output' if 'model_output' in case else 'noise']
    table_dtype = None
    if 'bf16' in path.stem:
        table_dtype = jnp.bfloat16
        x, noise = (jnp.asarray(array).astype(table_dtype) for array in (x, noise))

    args = schedule_lib.Schedule(), x, noise, case['timesteps'], table_dtype
    noisy = schedule_lib.add_noise(*args).astype(jnp.float32)
    velocity = schedule_lib.velocity(*args).astype(jnp.float32)

    # Conditional training keeps given scenes clean, and its target leaves them out.
    if 'latents_per_scene' in case:
        scenes = np.arange(x.shape[1]) // case['latents_per_scene']
        given = is_given(case, scenes[-1] + 1)[scenes]
        noisy = np.where(given.reshape(-1, 1, 1, 1), x, noisy)
        velocity = velocity[:, ~given]

    assert_close(noisy, case['add_noise' if 'add_noise' in case else 'noisy_latents'], 5e-6)
    assert_close(velocity, case['velocity' if 'velocity' in case else 'target'], 5e-6)


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


@each_case('sinusoids')
def test_timestep_embedding(path):
    case = Case(path)
    small = case['timesteps'] < 20
    for key, ref in case.items():
        if key == 'timesteps':
            continue
        width, flip, shift = (int(''.join(filter(str.isdigit, part))) for part in key.split('_'))
        ours = embeddings.timestep_embedding(case['timesteps'], width, bool(flip), shift)
        # float32 angles of up to 999 rad carry 6e-5 on either side; small timesteps are exact.
        np.testing.assert_allclose(ours, ref, rtol=0, atol=1.3e-4, err_msg=key)
        np.testing.assert_allclose(ours[small], ref[small], rtol=0, atol=4e-6, err_msg=key)


@each_case('rotary')
def test_rotary_tables(path):
    case = Case(path)
    for key, args in case.items():
        if ':args' not in key:
            continue
        name = key.split(':')[0]
        head_dim, sample_w, sample_h, patch_t, h, w, frames = (int(value) for value in args)
        layout = SceneLayout((frames,), h // 16, w // 16, 1, patch_t or 1)
        rule = 'slice' if patch_t else 'linspace'
        cos, sin = embeddings.rope_table(layout, head_dim, rule, (sample_h // 2, sample_w // 2))
        assert len(cos) == case[f'{name}:total_rows']
        rows = case[f'{name}:rows']
        np.testing.assert_allclose(cos[rows], case[f'{name}:cos'], rtol=0, atol=5e-6, err_msg=name)
        np.testing.assert_allclose(sin[rows], case[f'{name}:sin'], rtol=0, atol=5e-6, err_msg=name)


@each_case('rotation')
def test_rotation(path):
    case = Case(path)
    x = np.moveaxis(case['apply_x'], 1, 2)  # [B, L, N, D]
    out = embeddings.apply_rope(x, case['apply_cos'], case['apply_sin'])
    assert_close(np.moveaxis(out, 2, 1), case['apply_out'], 5e-6)


@each_case('crops')
def test_crops_of_the_trained_grid(path):
    for key, ref in Case(path).items():
        if not key.startswith('crop_'):
            continue
        base = tuple(int(size) for size in key.split('_base')[1].split('x'))
        for h, w, top, left, bottom, right in ref:
            crop = embeddings.fit_grid((int(h), int(w)), base)
            assert crop == (top, left, bottom - top, right - left)


@each_case('frames of clips')
def test_frames_of_clips(path):
    """Clips of 49 frames at a stride of 3, as the reference draws them."""
    content = json.loads(path.read_text())
    bounds = []

    def choose(kind, available):
        """The frames of the first start, and the range of starts; None if there is none."""
        rng = types.SimpleNamespace(integers=lambda low, high: bounds.append((low, high)) or low)
        try:
            return clips.choose_frames(kind, available, 49, 3, rng), *bounds[-1]
        except ValueError:
            return None

    for ref in content.get('sft_max_stride', []):
        chosen = choose(manifest.MULTI_SCENE, ref['num_frames'])
        assert (chosen is not None) == ref['feasible'], ref
        if chosen:
            frames, low, high = chosen
            assert frames[1] - frames[0] == ref['stride'], ref
            assert (high - low, high - 1) == (ref['num_distinct_starts'], ref['max_start']), ref

    for ref in content.get('pretrain_linspace', []):
        chosen = choose(manifest.SINGLE_SCENE, ref['num_frame'])
        assert (chosen is not None) == ref['kept_by_filter'], ref
        if chosen:
            frames, low, high = chosen
            assert frames.tolist() == ref['indices_from_low'], ref
            assert (low, high - 1) == (ref['start_low'], ref['start_high_inclusive']), ref


@functools.cache
def run_pipeline(path):
    """Final latents and those of every step."""
    case = Case(path)
    model, params = model_of(network_beside(path, 'transformer'))
    schedule, sampler = read_scheduler(path)
    num_scenes = int(case['num_scenes'])
    batch, total_frames = case['init_latents'].shape[:2]
    frames = (total_frames // num_scenes,) * num_scenes
    layout = model.cfg.layout(frames, *case['init_latents'].shape[-2:])

    times, table = samplers.sampler_table(
        sampler, schedule, len(case['timesteps']), reference_prev=True
    )
    np.testing.assert_array_equal(times, case['timesteps'])

    text_shape = (batch, num_scenes, -1, model.cfg.text_embed_dim)
    text = case['prompt_embeds'].reshape(text_shape)
    guidance = None
    if 'negative_prompt_embeds' in case:
        text = np.concatenate([case['negative_prompt_embeds'].reshape(text_shape), text])
        guidance = np.repeat(case['guidance_per_step'][:, None], num_scenes, axis=1)

    # In these cases the initial latents of given scenes are their clean latents.
    noise = channels_last(case['init_latents'])
    given = {}
    if is_given(case, num_scenes).any():
        given = {'given': noise, 'given_scenes': is_given(case, num_scenes)}

    @jax.jit
    def run(params, noise):
        def v(x, t):
            return model.apply({'params': params}, x, text, t, frames=frames)

        return samplers.sample(v, noise, layout, times, table, guidance, trace=True, **given)

    return run(params, noise)


@each_case('loop')
def test_sampling_loops(path):
    case = Case(path)
    final, steps = run_pipeline(path)

    if 'latents_per_step' in case:
        for i in range(len(case['timesteps'])):
            assert_close(steps[i], channels_last(case['latents_per_step'][i]), 5e-5)
    assert_close(final, channels_last(case['final_latents']), 5e-5)


@each_case('noised clips')
def test_reference_noises_given_latents(path):
    case = Case(path)
    schedule, _ = read_scheduler(path)
    noised = schedule_lib.add_noise(schedule, case['cond_latents_clean'], case['cond_noise'], 0)
    assert_close(noised, case['cond_latents_noised'], 5e-6)


def test_dynamic_guidance():
    dynamic = guidance_lib.reference_dynamic_guidance
    assert dynamic(6.0, 50, 50) == 1
    assert dynamic(6.0, 0, 50) == 1 + 6
    # ((50 - t)/50)^5 = 1/2: the cosine is 0.
    assert dynamic(6.0, 50 - 50 * 0.5**0.2, 50) == pytest.approx(1 + 6 / 2)


@each_case('text')
def test_t5(path):
    case = Case(path)
    model, params = load_lib.load_t5(network_beside(path, 'text_encoder'))
    mask = case['attention_mask'].astype(bool) if 'attention_mask' in case else None
    out = t5.encode(model.cfg, params, case['input_ids'], mask)
    assert_close(out, case['last_hidden_state'], 1e-5)


@each_case('buckets')
def test_t5_buckets(path):
    case = Case(path)
    cfg = config_json.read_config('text_encoder', network_beside(path, 'text_encoder'))
    relative = case['relative_positions_key_minus_query']
    farthest = int(np.abs(relative).max())

    # The query in the middle has keys at all distances.
    table = t5.relative_buckets(
        2 * farthest + 1, cfg.relative_attention_num_buckets, cfg.relative_attention_max_distance
    )
    np.testing.assert_array_equal(table[farthest, farthest + relative], case['buckets'])


@each_case('encoding')
def test_vae_encode(path):
    case = Case(path)
    mean, logvar = vae.encode(*vae_beside(path), video(case['video']))
    std = np.exp(0.5 * logvar)
    ours = {
        'mean': mean,
        'mode': mean,
        'logvar': logvar,
        'std': std,
        'moments': np.concatenate([mean, logvar], axis=-1),
    }
    if 'posterior_noise' in case:
        ours['posterior_sample'] = mean + std * video(case['posterior_noise'])
    for key in ours.keys() & case.keys():
        assert_close(ours[key], video(case[key]), 1e-5)


@each_case('decoding')
@pytest.mark.parametrize('rule', vae.DECODE_RULES)
def test_vae_decode(path, rule):
    case = Case(path)
    key = {'reference': 'video', 'diffusers': 'video_auto_split'}[rule]
    if key not in case:
        return  # it is a case of the other rule
    decoded = vae.decode(*vae_beside(path), video(case['latents']), rule=rule)
    assert_close(decoded, video(case[key]), 1e-5)


@each_case('scenes apart')
def test_vae_codes_scenes_apart(path):
    case = Case(path)
    frames, latents = (case[key].shape[2] for key in ('video', 'latents_mode'))
    num_scenes = (4 * latents - frames) // 3  # a scene of t latents has 4(t - 1) + 1 frames
    cfg, params = vae_beside(path)

    scenes = np.split(video(case['video']), num_scenes, axis=1)
    latents = [vae.encode(cfg, params, scene)[0] for scene in scenes]
    latents = np.concatenate(latents, axis=1)
    assert_close(latents, video(case['latents_mode']), 1e-5)
    if 'latents_mode_times_scaling' in case:
        scaled = video(case['latents_mode_times_scaling'])
        assert_close(latents * cfg.scaling_factor, scaled, 1e-5)

    if 'joint_latents_mode' in case:
        joint, _ = vae.encode(cfg, params, video(case['video']))
        assert_close(joint, video(case['joint_latents_mode']), 1e-5)

    if 'decoded_item0' in case:
        scenes = np.split(video(case['latents_mode']), num_scenes, axis=1)
        decoded = [vae.decode(cfg, params, scene[:1]) for scene in scenes]
        assert_close(np.concatenate(decoded, axis=1), video(case['decoded_item0']), 1e-5)


@each_case('given clips')
def test_given_clips_to_latents(path):
    case = Case(path)
    cfg, params = vae_beside(path)
    posteriors = [
        vae.encode(cfg, params, channels_last(clip[None])) for clip in case['video_conds']
    ]
    mean = np.concatenate([mean for mean, _ in posteriors], axis=1)
    std = np.concatenate([np.exp(0.5 * logvar) for _, logvar in posteriors], axis=1)
    assert_close(mean, channels_last(case['posterior_mean']), 1e-5)

    sampled = mean + std * channels_last(case['posterior_noise_recovered'])
    latents = sampled * cfg.scaling_factor
    assert_close(latents, channels_last(case['cond_latents_clean']), 1e-5)


@each_case('pixels')
def test_pipelines_to_video(path):
    """From captions' embeddings to pixels.

    The random VAE amplifies errors, hence the tolerance of the pixels.
    """
    case = Case(path)
    cfg, params = vae_beside(path)
    final, _ = run_pipeline(path)
    scenes = np.split(final / cfg.scaling_factor, int(case['num_scenes']), axis=1)
    pixels = np.concatenate([vae.decode(cfg, params, scene) for scene in scenes], axis=1)
    assert_close(np.clip(pixels / 2 + 0.5, 0, 1), video(case['video_0_1']), 5e-4)


def tensors_of(folder):
    tensors = {}
    for path in sorted(folder.glob('*.safetensors')):
        tensors |= load_file(path)
    return tensors


NETWORKS = [(kind, folder) for kind, folders in FOUND.networks.items() for folder in folders]
ONE_OF_EACH_KIND = [(kind, folders[0]) for kind, folders in FOUND.networks.items()]


def id_of_network(value):
    return value if isinstance(value, str) else value.relative_to(GOLDENS).as_posix()


@pytest.mark.parametrize('kind, folder', NETWORKS, ids=id_of_network)
def test_round_trip_is_bit_equal(kind, folder):
    tensors = tensors_of(folder)
    if 'encoder.embed_tokens.weight' in tensors:
        tensors.setdefault('shared.weight', tensors.pop('encoder.embed_tokens.weight'))
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


@pytest.mark.parametrize('kind, folder', ONE_OF_EACH_KIND, ids=id_of_network)
def test_loading_names_what_does_not_fit(kind, folder):
    cfg = config_json.read_config(kind, folder)
    target = load_lib.on_one_device(names.abstract_params(cfg, kind))
    tensors = tensors_of(folder)

    # One tensor under another name, and one of another shape.
    first, second = sorted(tensors)[:2]
    tensors['stray'] = tensors.pop(first)
    tensors[second] = tensors[second][:-1]

    with pytest.raises(
        ValueError, match=f'missing {first}.*{second} has shape.*expected.*unexpected stray'
    ):
        load_lib.import_params(kind, cfg, tensors, target)
