"""The whole configuration: frozen dataclasses, their validation, their file and their help text.

`default()` returns the defaults as a ConfigDict for configs/*.py, and `define_flag` the flag
--config, whose flags --config.SECTION.KEY override single values. `parse` turns that ConfigDict
into dataclasses, and names everything in it that is wrong: every field declares what it may be
(see ranges.py). Everything else in the package takes the dataclasses; ml_collections stays at this
edge.
"""

import dataclasses
import inspect
import json
import math
import pathlib
import re
import sys
import textwrap
import types

import ml_collections
from absl import flags
from ml_collections import config_dict, config_flags

from mask2dit_jax import paths, ranges, storage
from mask2dit_jax.diffusion import samplers
from mask2dit_jax.diffusion import schedule as schedule_lib
from mask2dit_jax.distributed import context_parallel
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.models import dit
from mask2dit_jax.models import lora as lora_lib

# --config is a flag of the command that defines it: its --help lists it.
flags.disclaim_key_flags()

# Values that a key may have.
OPTIMIZERS = ('adamw', 'muon')
CODECS = ('stories', 'vae')
SCENES = ('consecutive', 'unrelated')
GIVEN = ('leading', 'any')
CONTEXTS = ('anew', 'carried')
OBJECTIVES = ('denoising', 'teacher_forcing', 'diffusion_forcing')
WORLDS = ('one', 'cast')
CAPTION_STYLES = ('first', 'every')

MAX_STEPS = 2**31 - 1  # the step is an int32

# Keys that a configuration file may require: how to give each.
REQUIRABLE = {
    'init_from': '--checkpoint=FOLDER, a model folder or the workdir of another run',
    'data.encoded': '--config.data.encoded=FOLDER, a data set that mask2dit_jax.encode wrote',
}


def _are_layouts(value) -> bool:
    """Whether a value is a tuple of stories, each a tuple of frames per scene."""
    if not isinstance(value, tuple) or not value:
        return False
    if not all(isinstance(layout, tuple) and layout for layout in value):
        return False
    lengths = [frames for layout in value for frames in layout]
    return all(ranges.is_whole(frames) and frames >= 1 for frames in lengths)


def _are_requirable(value) -> bool:
    return isinstance(value, tuple) and all(key in tuple(REQUIRABLE) for key in value)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The training data: real videos that mask2dit_jax.encode has encoded, or rendered stories.

    Attributes:
      layouts: frames per scene of each kind of story. Batches of one kind alternate in this order,
        so a kind that is listed twice is seen twice as often.
      encoded: folder of a data set that mask2dit_jax.encode wrote; empty to train on rendered
        stories.
      held_out: folder of another such data set, for the sample grids and the losses at the end;
        empty to take them from the data set that is trained on.
      scenes: how clips become a story: 'consecutive' takes consecutive clips of one story, from a
        random start (fine-tuning), 'unrelated' takes clips that do not belong together
        (pretraining).
      named_once: whether captions of encoded clips name characters and places only in the first
        clip of a story. Other windows of a story then always have given scenes in training, which
        show what no caption names.
      codec: the codec between pixels and latents: 'stories' is a fixed linear codec, 'vae' is the
        VAE of a model folder.
      height_px: height of the videos in pixels.
      width_px: width of the videos in pixels; rendered stories must be square.
      story_scenes: scenes of a rendered story for training, of which windows of a layout's scenes
        are trained on. They start anywhere, so that captions often do not name what the given
        scenes show. 0 for stories of the layout's own scenes.
      world: rendered stories: 'one' has one character on one background in all scenes, 'cast' a few
        characters and places that have names, leave and come back. Its captions have up to eight
        words, for model.max_text_seq_length.
      caption_style: captions of rendered stories: 'first' describes character and place only in the
        caption of the scene that shows them first, 'every' in each caption.
      codec_patch_frames: frames per latent frame of the 'stories' codec.
      codec_patch_px: height and width in pixels of a cell of the 'stories' codec's latent grid.
      codec_components: latent channels of the 'stories' codec.
      codec_first_frame: whether the 'stories' codec makes a latent frame of the first frame of a
        scene alone, as CogVideoX's VAE does; scenes then have one frame more than a multiple of
        codec_patch_frames.
      num_train: rendered stories of each kind for training.
      num_test: rendered stories of each kind that are held out.
      fps: frames per second of the videos that are written.
      dir: folder for rendered data sets; empty for <workdir>/../data.
    """

    layouts: tuple[tuple[int, ...], ...] = ranges.field(
        ((4, 4, 4),),
        'a tuple of stories, each a tuple of frames per scene (whole numbers of at least 1), such '
        'as ((4, 4, 4),)',
        _are_layouts,
    )
    encoded: str = ranges.path('')
    held_out: str = ranges.path('')
    scenes: str = ranges.word('consecutive', SCENES)
    named_once: bool = ranges.switch(False)
    codec: str = ranges.word('stories', CODECS)
    height_px: int = ranges.whole(16, least=1)
    width_px: int = ranges.whole(16, least=1)
    story_scenes: int = ranges.whole(0, least=0)
    world: str = ranges.word('one', WORLDS)
    caption_style: str = ranges.word('first', CAPTION_STYLES)
    codec_patch_frames: int = ranges.whole(4, least=1)
    codec_patch_px: int = ranges.whole(4, least=1)
    codec_components: int = ranges.whole(48, least=1)
    codec_first_frame: bool = ranges.switch(False)
    num_train: int = ranges.whole(16384, least=1)
    num_test: int = ranges.whole(512, least=1)
    fps: float = ranges.real(4.0, above=0, most=50)  # a gif has at most 50
    dir: str = ranges.path('')


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon as optax has it.

    Muon updates the attention and MLP matrices of the blocks; all other parameters then get AdamW
    with Nesterov momentum.

    Attributes:
      name: 'adamw' or 'muon'.
      learning_rate: peak of the learning rate, which rises linearly from 0 during warmup_steps and
        then follows a cosine.
      warmup_steps: updates until the learning rate is at its peak.
      final_fraction: the cosine ends at this fraction of the peak; 1 keeps the rate constant.
      b1: decay of AdamW's first moment.
      b2: decay of AdamW's second moment.
      eps: added to the denominator of AdamW's update.
      weight_decay: decoupled weight decay, multiplied by the learning rate.
      clip_norm: largest global norm of the gradient; longer gradients are scaled down to it.
      muon_rms: root mean square of Muon's update of a matrix, in units of the learning rate; 0.2
        is the typical value of AdamW's updates.
    """

    name: str = ranges.word('adamw', OPTIMIZERS)
    learning_rate: float = ranges.real(1e-5, above=0)
    warmup_steps: int = ranges.whole(100, least=0)
    final_fraction: float = ranges.real(1.0, least=0, most=1)
    b1: float = ranges.real(0.9, least=0, below=1)
    b2: float = ranges.real(0.999, least=0, below=1)
    eps: float = ranges.real(1e-8, above=0)
    weight_decay: float = ranges.real(0.0, least=0)
    clip_norm: float = ranges.real(1.0, above=0)
    muon_rms: float = ranges.real(0.2, above=0)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Attributes:
      steps: updates of the whole training.
      batch_size: stories per update, over all devices and accumulated micro-batches.
      grad_accumulation: micro-batches per update.
      objective: 'denoising' (all scenes of a story at one timestep, some of them given),
        'diffusion_forcing' (each scene at a timestep of its own, for config.sample.lag) or
        'teacher_forcing' (that, too, and each generated from the clean ones before it, all in one
        pass over twice the tokens; for the pattern 'causal').
      caption_dropout: share of stories whose captions are emptied, for classifier-free guidance.
      conditional_probability: share of stories in which some scenes, but never all, are given
        (clean, at timestep 0).
      given: which scenes are given: 'leading' ones as in extension, or 'any' subset.
      conditional_from_step: updates before this one give no scenes.
      given_max_timestep: given scenes get the noise of a timestep that is uniform from 0, clean, to
        this one; 0 keeps all clean, as in the paper.
      ema_decay: upper limit of the EMA's decay, which is min((1 + k) / (10 + k), ema_decay) at
        update k.
      log_every_steps: updates between two records of the metrics.
      checkpoint_every_steps: updates between two checkpoints.
      sample_every_steps: updates between two sample grids.
      keep_checkpoints: the newest checkpoints that stay on disk.
      keep_every_steps: checkpoints at multiples of this step stay on disk for good; 0 for none.
    """

    steps: int = ranges.whole(1000, least=1, most=MAX_STEPS)
    batch_size: int = ranges.whole(8, least=1)
    grad_accumulation: int = ranges.whole(1, least=1)
    objective: str = ranges.word('denoising', OBJECTIVES)
    caption_dropout: float = ranges.real(0.1, least=0, most=1)
    conditional_probability: float = ranges.real(0.0, least=0, most=1)
    given: str = ranges.word('leading', GIVEN)
    conditional_from_step: int = ranges.whole(0, least=0, most=MAX_STEPS)
    given_max_timestep: int = ranges.whole(0, least=0)
    ema_decay: float = ranges.real(0.9999, least=0, most=1)
    log_every_steps: int = ranges.whole(50, least=1)
    checkpoint_every_steps: int = ranges.whole(1000, least=1)
    sample_every_steps: int = ranges.whole(1000, least=1)
    keep_checkpoints: int = ranges.whole(2, least=1)
    keep_every_steps: int = ranges.whole(0, least=0)


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Sampling, for the sample grids and the final scores, and the defaults of the command sample.

    Attributes:
      sampler: 'ddim', 'dpm++2m' or 'euler'.
      steps: steps of the sampler.
      guidance: scale of classifier-free guidance; 1 switches guidance off.
      lag: steps that each scene begins after the scene before it, of scenes that are generated
        together: 0 denoises them jointly, `steps` one after another, and between is for models that
        were trained by diffusion_forcing. None is 0, or `steps` after teacher_forcing.
      context: how a scene that is generated after others sees the given ones under 'causal'. 'anew'
        computes them once more for every new scene. 'carried' keeps what was computed when each was
        made, which still tells of scenes that have left the window.
      given_timestep: timestep of given scenes, with its noise; 0 for clean ones, as in the paper.
        A little noise hides what generated scenes have wrong, from a model that was trained with
        train.given_max_timestep.
      captions_of_given: whether given scenes keep their captions in the negative half of guidance,
        where the others have the empty or the negative one.
      sheet_stories: stories in a sample grid.
    """

    sampler: str = ranges.word('ddim', samplers.SAMPLERS)
    steps: int = ranges.whole(50, least=1)
    guidance: float = ranges.real(6.0)
    lag: int | None = ranges.whole(None, least=0, or_none=True)
    context: str = ranges.word('anew', CONTEXTS)
    given_timestep: int = ranges.whole(0, least=0)
    captions_of_given: bool = ranges.switch(False)
    sheet_stories: int = ranges.whole(4, least=1)


# Settings of SampleConfig that a story may change, besides sampler, steps and guidance.
HOW = ('lag', 'context', 'given_timestep', 'captions_of_given')


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Scores on held-out stories at the end of training.

    Attributes:
      stories: held-out stories that are scored, of each kind and task; a multiple of batch_size.
      batch_size: stories that are generated at once.
    """

    stories: int = ranges.whole(256, least=1)
    batch_size: int = ranges.whole(64, least=1)


@dataclasses.dataclass(frozen=True)
class LimitsConfig:
    """Seconds without a sign of life after which a phase of training counts as hung.

    The process then prints where it stands and exits with 1, so that it can be started again.

    Attributes:
      start: devices, and the networks that encode.
      data: opening or rendering the data, encoding it, and waiting for a batch.
      restore: making the state, or reading it from a checkpoint or a base.
      compile: the first step of each layout.
      step: any other step.
      save: starting a save, with the end of the one before, and the last one.
      sample: a set of sample grids, compiling included.
      score: a batch of the final scores, compiling included.
    """

    start: float = ranges.real(1800.0, above=0, most=1e7)
    data: float = ranges.real(1800.0, above=0, most=1e7)
    restore: float = ranges.real(3600.0, above=0, most=1e7)
    compile: float = ranges.real(3600.0, above=0, most=1e7)
    step: float = ranges.real(900.0, above=0, most=1e7)
    save: float = ranges.real(1800.0, above=0, most=1e7)
    sample: float = ranges.real(3600.0, above=0, most=1e7)
    score: float = ranges.real(3600.0, above=0, most=1e7)


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that the command main needs.

    Attributes:
      seed: seed of the initial parameters, of the order of the data, of the noise and of sampling.
      init_from: where training starts. A workdir, or one of its checkpoints, gives its EMA
        parameters; a model folder, released or converted, gives its transformer, and its VAE and
        text encoder are used, too. Empty for random parameters. --checkpoint sets it, and also
        takes the model's sizes from there.
      requires: keys that must not be empty when training starts, because the recipe of the
        configuration file makes no sense without them.
    """

    seed: int = ranges.seed(0)
    init_from: str = ranges.path('')
    requires: tuple[str, ...] = ranges.field(
        (), f'a tuple with keys of {", ".join(REQUIRABLE)}', _are_requirable
    )
    model: dit.DiTConfig = dit.DiTConfig()  # noqa: RUF009 (frozen)
    schedule: schedule_lib.Schedule = schedule_lib.Schedule()  # noqa: RUF009 (frozen)
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: lora_lib.LoraConfig = lora_lib.LoraConfig()  # noqa: RUF009 (frozen)
    train: TrainConfig = TrainConfig()
    sample: SampleConfig = SampleConfig()
    eval: EvalConfig = EvalConfig()
    mesh: mesh_lib.MeshConfig = mesh_lib.MeshConfig()  # noqa: RUF009 (frozen)
    limits: LimitsConfig = LimitsConfig()


def default() -> ml_collections.ConfigDict:
    """Returns the defaults as a ConfigDict.

    It takes keys and values of any kind, because `parse` names all that are wrong at once.
    """
    return ml_collections.ConfigDict(_placeholders(_plain(Config())), type_safe=False)


def _placeholders(plain: dict) -> dict:
    """A nested dict with a whole number to come in the place of every None, so that flags can
    override it."""
    return {
        key: _placeholders(value)
        if isinstance(value, dict)
        else config_dict.placeholder(int)
        if value is None
        else value
        for key, value in plain.items()
    }


class _LenientParser(flags.ArgumentParser):
    """Text as the first of some functions reads it; what none can read stays text, and `parse`
    refuses it together with everything else that is wrong."""

    def __init__(self, *readers):
        self._readers = readers

    def parse(self, argument):
        if argument == 'None':
            return None
        if not isinstance(argument, str):
            return argument
        for read in self._readers:
            try:
                return read(argument)
            except ValueError:
                continue
        return argument

    def flag_type(self):
        return 'setting'


class _FileParser(flags.ArgumentParser):
    """Loads a configuration file; what is misspelt is a ValueError of one sentence."""

    def __init__(self, loader: flags.ArgumentParser):
        self._loader = loader  # that of ml_collections

    def parse(self, argument):
        paths.check_local(**{'--config': argument})
        name = argument.partition(':')[0]
        file = pathlib.Path(name)
        if not file.is_file():
            known = {path.stem: path for path in pathlib.Path('configs').glob('*.py')}
            known |= {path.stem: path for path in file.parent.glob('*.py')}
            near = ranges.nearest(file.stem, known, shown=known)
            raise ValueError(f'{name!r} is not a file{near}: give FILE.py or FILE.py:VARIANT.')

        try:
            config = self._loader.parse(argument)
        except SyntaxError as error:
            raise ValueError(f'{name} is not a configuration file in Python ({error}).') from error
        except ValueError as error:
            # ml_collections puts the traceback into the message.
            raise ValueError(str(error.__context__)) from None
        _make_room(config, flags.FLAGS.read_flags_from_files(sys.argv, force_gnu=False))
        return config


def _make_room(config: ml_collections.ConfigDict, argv: list[str]) -> None:
    """Adds sections that flags such as --config.trian.steps=5 name, so that `parse` can refuse them
    together with everything else that is wrong."""
    for argument in argv:
        match = re.match(r'--?(?:no)?config\.([^=]*)', argument)
        if not match:
            continue
        section = config
        for name in match[1].split('.')[:-1]:
            if section.get(name) is None:
                section[name] = ml_collections.ConfigDict(type_safe=False)
            section = section[name]
            if not isinstance(section, ml_collections.ConfigDict):
                raise ValueError(f'{match[0]} asks for a key of {name}, which is no section.')


def define_flag(help_text: str) -> flags.FlagHolder:
    """Defines the flag --config, a configuration file whose values --config.SECTION.KEY override.

    Args:
      help_text: the line of --help.

    Returns:
      The flag; its value is a ConfigDict for `parse`.
    """
    flag = config_flags.DEFINE_config_file(
        'config', None, help_text, lock_config=False, accept_new_attributes=True
    )
    flags.FLAGS['config'].parser = _FileParser(flags.FLAGS['config'].parser)
    for kind, readers in {
        int: (int, float),
        float: (int, float),
        bool: (flags.BooleanParser().parse,),
    }.items():
        config_flags.register_flag_parser_for_type(kind, _LenientParser(*readers))
    return flag


def parse(config) -> Config:
    """Returns the validated dataclasses of a configuration.

    Args:
      config: a ConfigDict or a nested dict; keys that it lacks take their defaults.

    Raises:
      ValueError: naming every section and key that is unknown or out of range; if there is none,
        all that do not fit each other.
    """
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()

    found = []
    values = _completed(Config, config, 'config', found)
    ranges.refuse(found)
    ranges.refuse(_conflicts(_namespace(values)))
    return _build(Config, values)


def check_training(config: Config) -> None:
    """Makes sure that training can start with a configuration, however it was made.

    Its model, codec and sizes must be those of the run: `parse` does not know what --checkpoint and
    the data set put in their place.

    Raises:
      ValueError: naming all that is out of range, missing, or does not fit.
    """
    found = []
    _completed(Config, _plain(config), 'config', found)
    for key in config.requires:
        section, _, name = key.rpartition('.')
        if not getattr(getattr(config, section) if section else config, name):
            found.append(
                f'config.{key} is empty, and this configuration does not make sense without it: '
                f'give {REQUIRABLE[key]}.'
            )
    ranges.refuse(found)
    ranges.refuse(_conflicts(config) + _model_conflicts(config))


def describe() -> str:
    """Returns the help text of the configuration: sections, keys, defaults and what they mean.

    The text is made of the dataclasses themselves: their fields, the defaults, and the Attributes
    in their docstrings.
    """
    config = Config()
    sections = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            sections[field.name] = value

    lines = [
        'Configuration: every key below is a flag, --config.SECTION.KEY=VALUE, for example',
        '--config.train.steps=2000. The values shown are the defaults; the file that',
        '--config names changes some of them.',
        '',
        *_describe_keys('config', config),
    ]
    for name, section in sections.items():
        summary = inspect.getdoc(type(section)).partition('\nAttributes:\n')[0]
        lines += ['', f'config.{name}:', *_wrapped(summary, '  '), '']
        lines += _describe_keys(f'config.{name}', section)
    return '\n'.join(lines) + '\n'


def _describe_keys(prefix: str, section) -> list[str]:
    """Lines with key, default, meaning and range of every plain field of a dataclass."""
    meanings = _attribute_texts(type(section))
    lines = []
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            continue
        lines.append(f'  --{prefix}.{field.name}={value!r}')
        allowed = ranges.of(type(section), field.name).says
        lines += _wrapped(f'{meanings.get(field.name, "")} Takes {allowed}.', '      ')
    return lines


def _wrapped(text: str, indent: str) -> list[str]:
    """Lines of at most 80 characters."""
    text = ' '.join(text.split())
    return textwrap.wrap(text, 80, initial_indent=indent, subsequent_indent=indent)


def _attribute_texts(cls) -> dict[str, str]:
    """What the Attributes section of a dataclass's docstring says, by field.

    An entry may name several fields, separated by commas.
    """
    _, _, section = inspect.getdoc(cls).partition('\nAttributes:\n')
    # Entries are indented by two spaces, and the lines that continue them by more.
    entries = re.findall(r'^  (\w[\w, ]*):((?:.*\n?)(?:^   .*\n?)*)', section, re.MULTILINE)

    texts = {}
    for names, text in entries:
        for name in names.split(', '):
            texts[name] = ' '.join(text.split())
    return texts


def _plain(config) -> dict:
    """A dataclass as a dict, nested as its sections are."""
    plain = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        plain[field.name] = _plain(value) if dataclasses.is_dataclass(value) else value
    return plain


def _tuples(value):
    """Lists to tuples at every depth, since JSON knows no tuples."""
    if isinstance(value, (list, tuple)):
        return tuple(_tuples(v) for v in value)
    return value


def _completed(cls, given, where: str, found: list[str]) -> dict:
    """The values of a dataclass's fields, nested as its sections are.

    Args:
      cls: the dataclass.
      given: a nested dict of values; keys that it lacks take their defaults.
      where: name of the section, as in 'config.train'.
      found: gets a sentence for everything that is unknown or out of range.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if not isinstance(given, dict):
        found.append(f'{where} is {given!r}: give values of its keys, as --{where}.KEY=VALUE.')
        given = {}

    unknown = [f'{key}{_did_you_mean(str(key), fields)}' for key in given if key not in fields]
    if unknown:
        found.append(
            f'{where} has unknown keys {", ".join(unknown)}; it knows {", ".join(fields)}.'
        )

    values = {}
    for name, field in fields.items():
        if dataclasses.is_dataclass(field.default):
            section = given.get(name, {})
            values[name] = _completed(type(field.default), section, f'{where}.{name}', found)
            continue

        value = _tuples(given.get(name, field.default))
        # Whole numbers are numbers, too: 1 for 1.0.
        is_real = isinstance(field.default, float)
        values[name] = float(value) if is_real and ranges.is_whole(value) else value

    found += ranges.problems(cls, values, f'{where}.')
    return values


def _did_you_mean(key: str, fields) -> str:
    """The nearest name in the key's own section, or the same name in another section."""
    near = ranges.nearest(key, fields)
    if near:
        return near
    elsewhere = [
        f'{section.name}.{key}'
        for section in dataclasses.fields(Config)
        if key in getattr(section.default, '__dataclass_fields__', ())
    ]
    return f' (did you mean {" or ".join(elsewhere)}?)' if elsewhere else ''


def _namespace(values: dict) -> types.SimpleNamespace:
    """Values as attributes, nested as they are."""
    return types.SimpleNamespace(
        **{k: _namespace(v) if isinstance(v, dict) else v for k, v in values.items()}
    )


def _build(cls, values: dict):
    """An instance of a dataclass from the values of all its fields."""
    built = {}
    for field in dataclasses.fields(cls):
        value = values[field.name]
        is_section = dataclasses.is_dataclass(field.default)
        built[field.name] = _build(type(field.default), value) if is_section else value
    return cls(**built)


def _conflicts(config) -> list[str]:
    """Says which values, all of them in their ranges, do not fit each other.

    Args:
      config: Config, or a namespace with the same values.
    """
    data = config.data
    train = config.train
    mesh = config.mesh
    schedule = config.schedule
    found = [f'config.{conflict}' for conflict in dit.conflicts(config.model)]

    if data.held_out and not data.encoded:
        found.append('config.data.held_out goes with config.data.encoded: give both, or neither.')
    if data.named_once and (data.scenes == 'unrelated' or min(map(len, data.layouts)) == 1):
        found.append(
            'config.data.named_once needs consecutive scenes and layouts of two or more, because '
            'what no caption names must be seen in another scene.'
        )
    if data.named_once and not data.encoded:
        found.append('config.data.named_once is about the clips of config.data.encoded: give both.')
    longest = max(map(len, data.layouts))
    if 0 < data.story_scenes < longest:
        found.append(
            f'config.data.story_scenes {data.story_scenes} is fewer than the {longest} scenes of a '
            'layout: use as many or more, or 0.'
        )
    for layout in data.layouts:
        if data.story_scenes > len(layout) and (len(layout) == 1 or len(set(layout)) > 1):
            found.append(
                f'config.data.story_scenes {data.story_scenes} needs layouts of two scenes or more '
                f'that have one length, and config.data.layouts has {layout}.'
            )
        if data.story_scenes > len(layout) and data.world == 'cast' and train.given == 'any':
            found.append(
                f'config.data.story_scenes {data.story_scenes} with config.data.world cast needs '
                'config.train.given leading: the first scene of a window shows what its captions '
                'do not describe.'
            )
    if train.objective == 'teacher_forcing':
        if config.model.pattern != 'causal':
            found.append(
                'config.train.objective teacher_forcing is for config.model.pattern causal, not '
                f'{config.model.pattern}.'
            )
        elif dit.cache_conflict(config.model):
            found.append(
                f'config.train.objective teacher_forcing: {dit.cache_conflict(config.model)}'
            )
        for name in ('conditional_probability', 'given_max_timestep'):
            if getattr(train, name):
                found.append(
                    f'config.train.{name} {getattr(train, name)} does not go with the objective '
                    'teacher_forcing, in which every scene is generated from clean ones: set it '
                    'to 0.'
                )
    if train.keep_every_steps % train.checkpoint_every_steps:
        found.append(
            f'config.train.keep_every_steps {train.keep_every_steps} must be a multiple of '
            f'checkpoint_every_steps {train.checkpoint_every_steps}.'
        )

    # Batches divide over the devices. In sampling, guidance doubles the batch.
    groups = mesh.data * mesh.fsdp
    if train.batch_size % (train.grad_accumulation * groups):
        found.append(
            f'config.train.batch_size {train.batch_size} does not divide into grad_accumulation '
            f'{train.grad_accumulation} x data {mesh.data} x fsdp {mesh.fsdp}: make it a multiple.'
        )
    for name, size in (
        ('eval.batch_size', config.eval.batch_size),
        ('sample.sheet_stories', config.sample.sheet_stories),
    ):
        if 2 * size % groups:
            found.append(
                f'config.{name} {size}, doubled for guidance, does not divide over data '
                f'{mesh.data} x fsdp {mesh.fsdp}: make it a multiple of '
                f'{groups // math.gcd(2, groups)}.'
            )
    if config.eval.stories % config.eval.batch_size:
        found.append(
            f'config.eval.stories {config.eval.stories} is not a multiple of eval.batch_size '
            f'{config.eval.batch_size}.'
        )

    for name, timestep in (
        ('sample.given_timestep', config.sample.given_timestep),
        ('train.given_max_timestep', train.given_max_timestep),
    ):
        if timestep >= schedule.num_train_timesteps:
            found.append(
                f'config.{name} {timestep} must be below the num_train_timesteps of '
                f'config.schedule, {schedule.num_train_timesteps}.'
            )
    if schedule.beta_start > schedule.beta_end:
        found.append(
            f'config.schedule.beta_start {schedule.beta_start} must not be above beta_end '
            f'{schedule.beta_end}.'
        )
    found += context_conflicts(config, 'config.sample.')
    return found + step_conflicts(config.sample.steps, schedule, 'config.sample.')


def context_conflicts(config: Config, where: str = '') -> list[str]:
    """Says why config.sample.context is not for the model; `where` stands before 'context'."""
    sample = config.sample
    if sample.context != 'carried':
        return []
    found = []
    if dit.cache_conflict(config.model):
        found.append(f'{where}context carried: {dit.cache_conflict(config.model)}')
    if not config.model.rotary and not config.model.learned_positions:
        found.append(
            f'{where}context carried is not for sin-cos positions, which are a part of what is '
            "carried and cannot move with the window: use 'anew'."
        )
    if sample.given_timestep:
        found.append(
            f'{where}context carried keeps clean scenes: set given_timestep to 0, not to '
            f'{sample.given_timestep}.'
        )
    return found


def step_conflicts(steps: int, schedule, where: str = '') -> list[str]:
    """Says whether a noise schedule lacks so many sampling steps; `where` stands before 'steps'."""
    total = schedule.num_train_timesteps
    if steps > total:
        return [
            f'{where}steps is {steps}: use a whole number from 1 to {total}, the '
            'num_train_timesteps of config.schedule.'
        ]
    first = (steps - 1) * (total // steps) + schedule.steps_offset
    if schedule.timestep_spacing == 'leading' and first >= total:
        return [
            f'config.schedule.steps_offset {schedule.steps_offset} leads {steps} sampling steps '
            f'beyond num_train_timesteps {total}: use at most {total - 1 - first}.'
        ]
    return []


def _model_conflicts(config: Config) -> list[str]:
    """Says what does not fit the model that is trained, and the data that it is trained on."""
    data = config.data
    found = []

    axes = {axis: getattr(config.mesh, axis) for axis in mesh_lib.AXES}
    groups = axes['data'] * axes['fsdp']
    try:
        # Tokens are checked when the size of the latents is known.
        heads = config.model.num_attention_heads
        context_parallel.check(axes, batch=groups, num_tokens=axes['context'], num_heads=heads)
    except ValueError as error:
        found.append(str(error))

    if not data.encoded and config.sample.sheet_stories > data.num_test:
        found.append(
            f'config.sample.sheet_stories {config.sample.sheet_stories} must not be above '
            f'config.data.num_test {data.num_test}, the stories that are held out.'
        )
    return found


def save(config: Config, path: pathlib.Path) -> None:
    """Writes the configuration as JSON, whole or not at all."""
    storage.write_text(path, json.dumps(_plain(config), indent=2) + '\n')


# Names of backends in the workdirs of earlier versions.
_RENAMED_BACKENDS = {'decomposed': 'blockwise'}


def load(path: pathlib.Path) -> Config:
    """Reads what `save` wrote.

    Raises:
      FileNotFoundError: if there is no such file, which means that its folder is not a workdir.
      ValueError: as for `parse`.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f'{path} does not exist: --workdir must be a folder that mask2dit_jax.main wrote.'
        )

    try:
        values = json.loads(path.read_text())
        backend = values['model']['attention_backend']
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f'{path} is not the configuration of a run ({error!r}): put back a copy, or resume the '
            'run by its own command, which writes it again.'
        ) from error
    values['model']['attention_backend'] = _RENAMED_BACKENDS.get(backend, backend)
    return parse(values)


def load_run(folder) -> Config:
    """Returns the configuration of a run.

    Args:
      folder: the run's workdir, or one of its checkpoints.

    Raises:
      FileNotFoundError, ValueError: as for `load`.
    """
    paths.check_local(folder=folder)
    folder = pathlib.Path(folder).absolute()
    is_checkpoint = folder.parent.name == 'checkpoints'
    workdir = folder.parent.parent if is_checkpoint else folder
    return load(workdir / 'config.json')
