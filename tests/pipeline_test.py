"""Generation: guidance, noise per story, given scenes; from Python; wrong inputs are named."""

import dataclasses
import functools
import threading

import jax
import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from conftest import STORY_MODEL

import mask2dit_jax
from mask2dit_jax import config as config_lib
from mask2dit_jax import generation, pipeline, sample
from mask2dit_jax.data import latent_codec
from mask2dit_jax.data import video as video_lib
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.distributed import partitioning
from mask2dit_jax.pretrained import names
from mask2dit_jax.tools import random_model

CONFIG = config_lib.Config(
    model=STORY_MODEL,
    data=config_lib.DataConfig(codec_components=8),
    sample=config_lib.SampleConfig(steps=3),
)
FRAMES = 4, 8
STORIES = [
    ['red ring on gray moves left', 'it grows'],
    ['blue ball on white stays', 'it moves up'],
    ['red ball on gray blinks', 'it stays'],
]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """generate() of a random model."""
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda p: rng.normal(0, 0.5, p.shape).astype(np.float32), names.abstract_params(STORY_MODEL)
    )
    codec = latent_codec.StoriesCodec(CONFIG, tmp_path_factory.mktemp('run'))
    return functools.partial(generation.generate, CONFIG, params, codec, frames=FRAMES, seed=1)


@pytest.mark.parametrize(
    'trained, asked, planned',
    [
        # As many scenes at once as the model was trained on; the first one stays if there is room.
        (2, {}, [((), 0, 2), ((1,), 2, 3), ((2,), 3, 4), ((3,), 4, 5)]),
        (3, {}, [((), 0, 3), ((0, 2), 3, 4), ((0, 3), 4, 5)]),
        (4, {}, [((), 0, 4), ((0, 2, 3), 4, 5)]),
        (4, {'sinks': 2}, [((), 0, 4), ((0, 1, 3), 4, 5)]),
        (3, {'sinks': 0}, [((), 0, 3), ((1, 2), 3, 4), ((2, 3), 4, 5)]),
        (
            3,
            {'window': 3, 'joint': 2},
            [((), 0, 2), ((0, 1), 2, 3), ((0, 1, 2), 3, 4), ((0, 1, 2, 3), 4, 5)],
        ),
        (5, {}, [((), 0, 5)]),
    ],
)
def test_how_a_story_of_five_scenes_is_told(trained, asked, planned):
    data = dataclasses.replace(CONFIG.data, layouts=((4,) * trained, (4,)))
    config = dataclasses.replace(CONFIG, data=data)
    settings = {'joint': None, 'window': None, 'sinks': None} | asked
    blocks, told = pipeline.plan_telling(config, (4,) * 5, 0, **settings)
    assert [tuple(block) for block in blocks] == planned
    again, _ = pipeline.plan_telling(config, (4,) * 5, 0, **told)
    assert again == blocks


def test_after_teacher_forcing_scenes_are_generated_one_by_one(caplog):
    """Each after the steps of the one before, where several are generated together all the same."""
    forced = dataclasses.replace(CONFIG.train, objective='teacher_forcing')
    layouts = dataclasses.replace(CONFIG.data, layouts=((4, 4, 4),))
    config = dataclasses.replace(CONFIG, train=forced, data=layouts)
    settings = {'joint': None, 'window': None, 'sinks': None}
    blocks, _ = pipeline.plan_telling(config, (4,) * 4, 0, **settings)
    assert blocks == [((), 0, 1), ((0,), 1, 2), ((0, 1), 2, 3), ((0, 2), 3, 4)]
    assert generation.lag(config, 20) == 20
    assert generation.lag(pipeline.with_sample(config, lag=3), 20) == 3
    assert generation.lag(CONFIG, 20) == 0

    forcing = dataclasses.replace(CONFIG.train, objective='diffusion_forcing')
    for train, warns in ((CONFIG.train, True), (forced, True), (forcing, False)):
        caplog.clear()
        config = dataclasses.replace(CONFIG, train=train)
        sampling = {'seed': 0, 'sampler': 'ddim', 'steps': 3, 'guidance': 1.0}
        pipeline.check_sampling(config, 2, [], **sampling, lag=2)
        assert ('begin 2 steps after each other' in caplog.text) == warns


def test_what_is_carried_is_made_again_after_a_kill(tmp_path):
    """And the steps that a callback hears of are counted by blocks."""
    data = dataclasses.replace(CONFIG.data, layouts=((4, 4),))
    network = dataclasses.replace(STORY_MODEL, pattern='causal', num_layers=2)
    config = dataclasses.replace(CONFIG, model=network, data=data)
    rng = np.random.default_rng(0)
    abstract = names.abstract_params(network)
    params = jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), abstract)

    def read(mesh):
        return 'nowhere', jax.device_put(params, partitioning.shardings(params, mesh))

    codec = latent_codec.StoriesCodec(config, tmp_path)
    model = pipeline.Model(config, codec, read, {}, 'nowhere', keep_params=True)

    def told(context, there=(), **how):
        request = model.request([*STORIES[0], *STORIES[0]], context=context, **how)
        return [scene.latents for scene in model.scenes(model.start(request), 0, there)]

    whole = told('carried')
    np.testing.assert_array_equal(told('carried', whole[:3])[3], whole[3])
    anew = told('anew')
    np.testing.assert_array_equal(anew[1], whole[1])
    assert min(np.abs(anew[scene] - whole[scene]).max() for scene in (2, 3)) > 1e-3

    heard = []
    captions = [*STORIES[0], *STORIES[0]]
    model.generate(captions, lag=2, callback=lambda *step: heard.append(step))
    assert heard == [(i + 1, 11) for i in range(11)]  # 3 + 2, 3, 3


@pytest.mark.parametrize(
    'num_given, joint, planned',
    [
        # Given scenes are a part of the first block, or are it.
        (2, 3, [(0, 3), (3, 4), (4, 5)]),
        (3, 3, [(0, 3), (3, 4), (4, 5)]),
        (4, 3, [(0, 4), (4, 5)]),
        (4, 5, [(0, 5)]),
    ],
)
def test_given_scenes_are_in_the_first_block(num_given, joint, planned):
    blocks = generation.plan_blocks(5, num_given, joint=joint, window=2, sinks=0)
    assert [(block.start, block.stop) for block in blocks] == planned


def test_guidance_one_follows_the_caption_and_zero_ignores_it(run):
    by_caption = [[run(STORIES[i : i + 2], guidance=g) for i in (0, 1)] for g in (0.0, 1.0)]
    np.testing.assert_array_equal(*by_caption[0])
    assert np.abs(by_caption[1][0] - by_caption[1][1]).max() > 0.01


def test_guidance_per_scene(run):
    one, scenes = (run(STORIES[:2], steps=1, guidance=g) for g in (1.0, [1.0, 3.0]))
    np.testing.assert_array_equal(
        scenes[:, :4], one[:, :4]
    )  # a single step: nothing has reached scene 1 yet
    assert np.abs(one - scenes)[:, 4:].max() > 0.01


def test_noise_belongs_to_the_story_not_to_the_batch(run):
    whole, later = run(STORIES[:2]), run(STORIES[1:], first_index=1)
    np.testing.assert_allclose(later[0], whole[1], atol=1e-5)
    assert np.abs(run(STORIES[1:])[0] - later[0]).max() > 0.01
    assert np.abs(run(STORIES[:2], seed=2) - whole).max() > 0.01


def test_given_scenes_come_back_through_the_codec_and_change_the_others(run):
    rng = np.random.default_rng(0)
    clips = np.broadcast_to(rng.random((2, 1, 1, 1, 3), np.float32), (2, 4, 16, 16, 3))
    out, free = run(STORIES[:2], given_videos=clips), run(STORIES[:2])
    codec = run.args[2]
    np.testing.assert_allclose(
        out[:, :4], codec.decode_video(codec.encode_video(clips, (4,)), (1,)), atol=1e-5
    )
    assert np.abs(out[:, 4:] - free[:, 4:]).max() > 0.01


def test_errors_name_the_input(run):
    with pytest.raises(ValueError, match='one caption for each of its 2 scenes'):
        run([['it grows']])
    with pytest.raises(ValueError, match=r'one per scene \(2\), got'):
        run(STORIES[:2], guidance=[1, 2, 3])
    for frames in (6, 12):
        with pytest.raises(ValueError, match=f'Given clips have {frames} frames in all'):
            run(STORIES[:2], given_videos=np.zeros((2, frames, 16, 16, 3), np.float32))


CAPTIONS = ['a man walks in', 'he sits down']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A model folder of tiny random networks."""
    folder = tmp_path_factory.mktemp('models') / 'tiny'
    random_model.write(folder)
    return folder


@pytest.fixture(scope='module')
def model(folder):
    return mask2dit_jax.load(folder, dtype='float32')


def test_a_list_of_stories_gives_the_videos_of_each(model):
    other = ['a dog', 'it barks']
    one = model.generate(CAPTIONS, steps=2, seed=3)
    first, second, again = model.generate([CAPTIONS, other, CAPTIONS], steps=2, seed=3)
    assert [scene.shape for scene in one.scenes] == [(5, 32, 32, 3)] * 2
    for ours, theirs in zip(one.scenes, first.scenes):
        np.testing.assert_array_equal(ours, theirs)
    assert second.captions == other
    assert np.abs(again.scenes[0] - first.scenes[0]).max() > 0.01  # noise of its own


def test_the_callback_hears_of_every_step_of_every_video(model):
    heard = []
    model.generate([CAPTIONS] * 2, steps=3, callback=lambda *step: heard.append(step))
    assert heard == [(i, 6) for i in range(1, 7)]
    quiet = model.generate(CAPTIONS, steps=3)
    spoken = model.generate(CAPTIONS, steps=3, callback=lambda *step: None)
    np.testing.assert_array_equal(quiet.scenes[1], spoken.scenes[1])


def test_given_pixels_are_as_good_as_a_given_file(model, tmp_path):
    clip = np.random.default_rng(0).random((9, 32, 32, 3), np.float32)
    video_lib.write_mp4(tmp_path / 'given.mp4', clip, 8, scale=8)
    pixels = pipeline.read_given(tmp_path / 'given.mp4', 32, 32, None, 0)
    by_file = model.generate(CAPTIONS, given=[tmp_path / 'given.mp4'], steps=2)
    by_pixels = model.generate(CAPTIONS, given=[pixels], steps=2)
    assert [len(scene) for scene in by_file.scenes] == [9, 5] and by_file.num_given == 1
    np.testing.assert_array_equal(by_file.scenes[1], by_pixels.scenes[1])


def test_it_saves_what_sample_writes(folder, model, tmp_path):
    model.generate(CAPTIONS, steps=2, guidance=[2, 3]).save(tmp_path / 'python')
    flags = {'prompt': CAPTIONS, 'steps': 2, 'dtype': 'float32', 'guidance': ['2', '3']}
    with flagsaver.flagsaver(checkpoint=str(folder), out=str(tmp_path / 'command'), **flags):
        sample.main(['sample'])
    written = {path.name for path in (tmp_path / 'command').iterdir()}
    assert written == {'video_0.mp4', 'video_0.gif', 'sheet_0.png', 'story.json', 'video_0'}
    names = {path.name for path in (tmp_path / 'command/video_0').iterdir()}
    assert names == {'scene_0.mp4', 'scene_1.mp4', 'latents.safetensors'}
    for name in written - {'video_0'} | {f'video_0/{name}' for name in names}:
        ours, theirs = (tmp_path / d / name for d in ('python', 'command'))
        assert ours.read_bytes() == theirs.read_bytes(), name


def test_extending_latents_needs_no_codec(model, tmp_path):
    """Latents from a file, from its folder and from memory give the same, which is not quite what
    the way through pixels gives."""
    first = model.generate(CAPTIONS, steps=2)
    first.save(tmp_path)
    captions = [*CAPTIONS, 'he stands up']
    by_memory = model.generate(captions, steps=2, given=[first.latents])
    for given in tmp_path / 'video_0', tmp_path / 'video_0/latents.safetensors':
        by_file = model.generate(captions, steps=2, given=[given])
        assert by_file.num_given == 2
        for ours, theirs in zip(by_file.latents.scenes, by_memory.latents.scenes):
            np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(by_memory.latents.scenes, first.latents.scenes):
        np.testing.assert_array_equal(ours, theirs)

    by_pixels = model.generate(captions, steps=2, given=first.scenes)
    difference = np.abs(by_pixels.latents.scenes[2] - by_memory.latents.scenes[2]).max()
    assert by_pixels.num_given == 2 and difference > 0

    # One scene of pixels between scenes of latents.
    mixed = model.generate(
        [*CAPTIONS, 'a', 'b'], steps=1, given=[first.latents, np.zeros((9, 32, 32, 3), np.uint8)]
    )
    assert [len(scene) for scene in mixed.scenes] == [5, 5, 9, 5]


def test_latents_that_do_not_fit_are_named(folder, model, tmp_path):
    latents = model.generate(CAPTIONS, steps=1).latents
    wide = mask2dit_jax.load(folder, dtype='float32', width=48)
    with pytest.raises(ValueError, match='latents of 32x32 pixels, and the model makes 32x48'):
        wide.generate([*CAPTIONS, 'x'], given=[latents])
    other = dataclasses.replace(latents, codec='0123')
    with pytest.raises(ValueError, match='codec 0123, and the model has'):
        model.generate([*CAPTIONS, 'x'], given=[other])
    (tmp_path / 'latents.safetensors').write_bytes(b'no')
    with pytest.raises(ValueError, match=r'latents\.safetensors is damaged'):
        model.generate([*CAPTIONS, 'x'], given=[tmp_path])


def test_two_generations_hear_their_own_steps(model):
    """Also when one of them comes in the midst of the other."""
    heard = {2: [], 3: []}

    def generate(steps):
        model.generate(CAPTIONS, steps=steps, callback=lambda *step: heard[steps].append(step))

    generate(2)
    generate(3)
    both = [threading.Thread(target=generate, args=[steps]) for steps in (2, 3)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    for steps, calls in heard.items():
        assert calls == [(i, steps) for i in range(1, steps + 1)] * 2


@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_what_the_callback_raises_comes_out(model, error):
    """Ctrl-C is raised there, too, if the main thread happens to run the loop."""
    heard = []

    def callback(*step):
        heard.append(step)
        raise error

    with pytest.raises(error):
        model.generate([CAPTIONS] * 2, steps=3, callback=callback)
    assert heard == [(1, 6)]
    assert model.generate(CAPTIONS, steps=1).scenes


def test_the_transformer_waits_on_the_host(folder, model):
    """Between two videos of a model that does not keep it."""
    thrifty = mask2dit_jax.load(folder, dtype='float32', keep_params=False)
    request = thrifty.start(thrifty.request([CAPTIONS] * 2, steps=1))
    made = thrifty.videos(request, [0, 1])
    first = next(made)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(thrifty._params[1])}
    assert kinds == {'pinned_host'}
    for ours, theirs in zip([first, next(made)], model.generate([CAPTIONS] * 2, steps=1)):
        np.testing.assert_array_equal(ours.scenes[1], theirs.scenes[1])
    assert thrifty._params is None


def test_the_transformer_is_let_go_where_it_is_not_kept(folder, model):
    thrifty = mask2dit_jax.load(folder, dtype='float32', keep_params=False)
    thrifty.generate(CAPTIONS, steps=1)
    model.generate(CAPTIONS, steps=1)
    assert thrifty._params is None and model._params is not None


def test_what_cannot_be_loaded_is_named(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r'config\.json does not exist'):
        mask2dit_jax.load(tmp_path)
    with pytest.raises(ValueError, match='is not a model folder, for which alone there is tiling'):
        mask2dit_jax.load(tmp_path, tiling=True)
    with pytest.raises(TypeError, match='unexpected keyword argument'):
        mask2dit_jax.load(folder, tilling=True)


def test_inputs_of_generate_that_do_not_fit_are_named(model):
    with pytest.raises(
        ValueError, match=r'Given pixels have shape \(9, 16, 32, 3\), not \[F, 32, 32'
    ):
        model.generate(CAPTIONS, given=[np.zeros((9, 16, 32, 3), np.float32)])
    for captions in ([], [[]], ''):
        with pytest.raises(ValueError, match='There is no caption'):
            model.generate(captions)


# Devices, heads and tokens; and the axes (fsdp, context) that use most of the devices.
DEFAULT_AXES = [
    ((1, 48, 53_328), (1, 1)),
    ((2, 48, 53_328), (2, 1)),
    ((4, 48, 53_328), (2, 2)),
    ((8, 48, 53_328), (2, 4)),
    ((16, 48, 53_328), (2, 8)),
    ((16, 48, 9_676), (2, 4)),  # a clip of 25 frames: 8 does not divide its tokens
    ((8, 30, 53_328), (2, 3)),
    ((16, 30, 53_328), (2, 6)),
    ((8, 30, 17_776), (2, 2)),  # one scene: 3 does not divide its tokens
    ((16, 30, 0), (1, 15)),
    ((4, 1, 100), (2, 1)),
]


@pytest.mark.parametrize('case, axes', DEFAULT_AXES, ids=str)
def test_the_default_mesh_takes_the_devices_that_divide(case, axes):
    assert pipeline._default_axes(*case) == axes


def test_generation_on_devices_that_the_heads_do_not_divide(monkeypatch, caplog, tmp_path):
    """Eight devices, three heads: six generate, and the user hears of the two that stay idle."""
    config = dataclasses.replace(
        CONFIG, model=dataclasses.replace(STORY_MODEL, num_attention_heads=3, attention_head_dim=16)
    )
    rng = np.random.default_rng(0)
    abstract = names.abstract_params(config.model)
    params = jax.tree.map(lambda p: rng.normal(0, 0.3, p.shape).astype(np.float32), abstract)

    def read(mesh):
        return 'nowhere', jax.device_put(params, partitioning.shardings(params, mesh))

    def generate(mesh=None):
        codec = latent_codec.StoriesCodec(config, tmp_path)
        model = pipeline.Model(config, codec, read, {}, 'nowhere', True, mesh)
        video = model.generate(STORIES[0], frames=[4, 8], steps=2)
        return np.concatenate(video.scenes), mesh_lib.mesh_of(model._params[1])

    alone, mesh = generate()
    assert mesh.size == 1

    monkeypatch.setattr(jax, 'default_backend', lambda: 'tpu')
    together, mesh = generate()
    assert (mesh.shape['fsdp'], mesh.shape['context']) == (2, 3)
    assert 'on 6 of 8 devices (fsdp 2 x context 3); 2 stay idle, because 3 heads' in caplog.text
    np.testing.assert_allclose(together, alone, atol=1e-4)

    # A mesh that is asked for must divide.
    with pytest.raises(ValueError, match=r'heads do not divide over context 4 .* may be 1, 3'):
        generate(pipeline.default_mesh((2, 4)))
    with pytest.raises(ValueError, match='A batch of 2 does not divide over data 1 x fsdp 4'):
        generate(pipeline.default_mesh((4, 1)))
    with pytest.raises(ValueError, match='needs 16 devices, and there are 8: let the product be'):
        pipeline.default_mesh((2, 8))


def test_a_mesh_that_does_not_divide_the_heads_is_refused_on_loading(folder):
    with pytest.raises(ValueError, match='attention heads do not divide over context 7'):
        mask2dit_jax.load(folder, mesh=pipeline.default_mesh((1, 7)))


@pytest.mark.parametrize(
    'name, value, allowed',
    [
        ('seed', -1, 'a non-negative integer'),
        ('seed', 2**32, 'a whole number from 0'),
        ('steps', 0, 'a positive integer'),
        ('guidance', ['nan'], 'a finite number'),
        ('guidance', ['6', 'inf'], 'a finite number'),
        ('guidance', ['strong'], 'a finite number'),
        ('mesh', ['0', '1'], 'a whole number of at least 1'),
        ('mesh', ['-1', '-1'], 'a whole number of at least 1'),
        ('mesh', ['1.5', '1'], 'a whole number of at least 1'),
        ('lag', -1, 'a non-negative integer'),
        ('given_timestep', -1, 'a non-negative integer'),
        ('num_videos', 0, 'a positive integer'),
        ('frames', 0, 'a positive integer'),
        ('given_frames', 0, 'a positive integer'),
        ('height', -16, 'a positive integer'),
        ('width', 0, 'a positive integer'),
    ],
)
def test_flags_out_of_range_are_refused(name, value, allowed):
    with flagsaver.flagsaver(), pytest.raises(flags.IllegalFlagValueError) as error:
        setattr(flags.FLAGS, name, value)
    assert f'--{name}' in str(error.value) and allowed in str(error.value)


@pytest.mark.parametrize(
    'wrong, message',
    [
        ({'steps': 0}, 'steps is 0: use a whole number of at least 1'),
        ({'steps': 5000}, 'steps is 5000: use a whole number from 1 to 1000'),
        ({'seed': -1}, 'seed is -1: use'),
        ({'sampler': 'foo'}, "sampler is 'foo': use one of ddim"),
        ({'guidance': np.nan}, 'guidance is nan: use a finite number'),
        ({'guidance': [6.0, np.inf]}, 'guidance is inf: use a finite number'),
        ({'guidance': [6.0, 6.0, 6.0]}, r'one per scene \(2\)'),
        ({'frames': 0}, 'frames is 0: use'),
        ({'frames': [8, -1]}, 'frames is -1: use'),
        ({'given_frames': 0}, 'frames is 0: use'),
        ({'lag': -1}, 'lag is -1: use'),
        ({'context': 'kept'}, "context is 'kept': use one of anew, carried"),
        ({'context': 'carried'}, "not under 'dual'"),
        ({'contxt': 'anew'}, "no setting 'contxt' .did you mean context"),
    ],
)
def test_what_cannot_be_sampled_is_told_before_anything_is_loaded(wrong, message):
    """Without codec and parameters, which stand for what would be loaded."""
    unloaded = pipeline.Model(CONFIG, None, None, {}, '', keep_params=False)
    with pytest.raises(ValueError, match=message):
        unloaded.generate(STORIES[0], **wrong)


def test_settings_of_model_folders_have_ranges(folder):
    with pytest.raises(ValueError, match='3 settings are wrong') as error:
        mask2dit_jax.load(folder, height=0, dtype='float16', decode_rule='foo')
    for name in 'height is 0', "dtype is 'float16'", "decode_rule is 'foo'":
        assert name in str(error.value)
