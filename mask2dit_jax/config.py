"""The whole configuration: frozen dataclasses, their validation, their file and their help text.

`default()` returns the defaults as a locked ConfigDict for configs/*.py and for command-line
overrides. `parse` turns that ConfigDict into dataclasses and refuses keys and values that they do
not know. Everything else in the package takes the dataclasses; ml_collections stays at this edge.
"""

import dataclasses
import inspect
import json
import math
import pathlib
import re
import textwrap

import ml_collections

from mask2dit_jax import storage
from mask2dit_jax.diffusion import schedule as schedule_lib
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.models import dit
from mask2dit_jax.models import lora as lora_lib

# Values that a key may have.
OPTIMIZERS = ('adamw', 'muon')
CODECS = ('stories', 'vae')
SCENES = ('consecutive', 'unrelated')
GIVEN = ('leading', 'any')


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
      codec: the codec between pixels and latents: 'stories' is a fixed linear codec, 'vae' is the
        VAE of a model folder.
      height_px: height of the videos in pixels.
      width_px: width of the videos in pixels; rendered stories must be square.
      caption_style: captions of rendered stories: 'first' names character and place in the first
        scene's caption only, 'every' names them in each caption.
      codec_patch_frames: frames per latent frame of the 'stories' codec.
      codec_components: latent channels of the 'stories' codec.
      num_train: rendered stories of each kind for training.
      num_test: rendered stories of each kind that are held out.
      fps: frames per second of the videos that are written.
      dir: folder for rendered data sets; empty for <workdir>/../data.
    """

    layouts: tuple[tuple[int, ...], ...] = ((4, 4, 4),)
    encoded: str = ''
    held_out: str = ''
    scenes: str = 'consecutive'
    codec: str = 'stories'
    height_px: int = 16
    width_px: int = 16
    caption_style: str = 'first'
    codec_patch_frames: int = 4
    codec_components: int = 48
    num_train: int = 16384
    num_test: int = 512
    fps: float = 4.0
    dir: str = ''


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

    name: str = 'adamw'
    learning_rate: float = 1e-5
    warmup_steps: int = 100
    final_fraction: float = 1.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    muon_rms: float = 0.2


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training loop.

    Attributes:
      steps: updates of the whole training.
      batch_size: stories per update, over all devices and accumulated micro-batches.
      grad_accumulation: micro-batches per update.
      caption_dropout: share of stories whose captions are emptied, for classifier-free guidance.
      conditional_probability: share of stories in which some scenes, but never all, are given
        (clean, at timestep 0).
      given: which scenes are given: 'leading' ones as in extension, or 'any' subset.
      conditional_from_step: updates before this one give no scenes.
      ema_decay: upper limit of the EMA's decay, which is min((1 + k) / (10 + k), ema_decay) at
        update k.
      log_every_steps: updates between two records of the metrics.
      checkpoint_every_steps: updates between two checkpoints.
      sample_every_steps: updates between two sample grids.
      keep_checkpoints: the newest checkpoints that stay on disk.
      keep_every_steps: checkpoints at multiples of this step stay on disk for good; 0 for none.
    """

    steps: int = 1000
    batch_size: int = 8
    grad_accumulation: int = 1
    caption_dropout: float = 0.1
    conditional_probability: float = 0.0
    given: str = 'leading'
    conditional_from_step: int = 0
    ema_decay: float = 0.9999
    log_every_steps: int = 50
    checkpoint_every_steps: int = 1000
    sample_every_steps: int = 1000
    keep_checkpoints: int = 2
    keep_every_steps: int = 0


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """Sampling, for the sample grids and the final scores, and the defaults of the command sample.

    Attributes:
      sampler: 'ddim', 'dpm++2m' or 'euler'.
      steps: steps of the sampler.
      guidance: scale of classifier-free guidance; 1 switches guidance off.
      sheet_stories: stories in a sample grid.
    """

    sampler: str = 'ddim'
    steps: int = 50
    guidance: float = 6.0
    sheet_stories: int = 4


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Scores on held-out stories at the end of training.

    Attributes:
      stories: held-out stories that are scored, of each kind and task; a multiple of batch_size.
      batch_size: stories that are generated at once.
    """

    stories: int = 256
    batch_size: int = 64


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

    start: float = 1800.0
    data: float = 1800.0
    restore: float = 3600.0
    compile: float = 3600.0
    step: float = 900.0
    save: float = 1800.0
    sample: float = 3600.0
    score: float = 3600.0


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that the command main needs.

    Attributes:
      seed: seed of the initial parameters, of the order of the data, of the noise and of sampling.
      init_from: where training starts. A workdir, or one of its checkpoints, gives its EMA
        parameters; a model folder, released or converted, gives its transformer, and its VAE and
        text encoder are used, too. Empty for random parameters. --checkpoint sets it, and also
        takes the model's sizes from there.
    """

    seed: int = 0
    init_from: str = ''
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
    """Returns the defaults as a ConfigDict that refuses new keys."""
    return ml_collections.ConfigDict(_plain(Config()), convert_dict=True)


def parse(config) -> Config:
    """Returns the validated dataclasses of a configuration.

    Args:
      config: a ConfigDict or a nested dict; keys that it lacks take their defaults.

    Raises:
      ValueError: naming the section and key that is unknown or out of range.
    """
    if isinstance(config, ml_collections.ConfigDict):
        config = config.to_dict()

    parsed = _build(Config, config, 'config')
    _check(parsed)
    return parsed


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
    """Lines with key, default and meaning of every plain field of a dataclass."""
    meanings = _attribute_texts(type(section))
    lines = []
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            continue
        lines.append(f'  --{prefix}.{field.name}={value!r}')
        lines += _wrapped(meanings.get(field.name, ''), '      ')
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


def _build(cls, values: dict, where: str):
    """An instance of a dataclass from a nested dict; `where` names the section in errors."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(
            f'{where} has unknown keys {", ".join(unknown)}; it knows {", ".join(fields)}.'
        )

    built = {}
    for key, value in values.items():
        section = fields[key].default
        if dataclasses.is_dataclass(section):
            built[key] = _build(type(section), value, f'{where}.{key}')
        else:
            built[key] = _tuples(value)
    return cls(**built)


def _check(config: Config) -> None:
    """Refuses values that are out of range or do not fit together."""
    data = config.data
    train = config.train
    mesh = config.mesh

    # Low-rank fine-tuning.
    for name in ('rank', 'alpha'):
        value = getattr(config.lora, name)
        if value < 0:
            raise ValueError(f'config.lora.{name} must not be negative, got {value}.')

    # Words of which only a few are known.
    for name, value, known in (
        ('optimizer.name', config.optimizer.name, OPTIMIZERS),
        ('data.codec', data.codec, CODECS),
        ('data.scenes', data.scenes, SCENES),
        ('train.given', train.given, GIVEN),
    ):
        if value not in known:
            raise ValueError(f'config.{name} is {value!r}: use one of {", ".join(known)}.')

    # Data.
    if data.held_out and not data.encoded:
        raise ValueError(
            'config.data.held_out goes with config.data.encoded: give both, or neither.'
        )
    if not data.layouts:
        raise ValueError(
            'config.data.layouts is empty: list at least one kind of story, e.g. ((4, 4, 4),).'
        )
    for layout in data.layouts:
        if not layout or min(layout) < 1:
            raise ValueError(
                f'config.data.layouts has {layout}: a story needs scenes, and a scene frames.'
            )

    # How long phases may take.
    for name, value in dataclasses.asdict(config.limits).items():
        if not 0 < value <= 1e7:
            raise ValueError(f'config.limits.{name} must be seconds in 0...1e7, got {value}.')

    # The training loop.
    for name in ('caption_dropout', 'conditional_probability', 'ema_decay'):
        value = getattr(train, name)
        if not 0 <= value <= 1:
            raise ValueError(f'config.train.{name} must lie in 0...1, got {value}.')
    if train.keep_checkpoints < 1 or train.keep_every_steps % train.checkpoint_every_steps:
        raise ValueError(
            f'config.train.keep_checkpoints {train.keep_checkpoints} must be at least 1 and '
            f'keep_every_steps {train.keep_every_steps} a multiple of checkpoint_every_steps '
            f'{train.checkpoint_every_steps}.'
        )

    # Batches divide over the devices. In sampling, guidance doubles the batch.
    groups = mesh.data * mesh.fsdp
    if train.batch_size % (train.grad_accumulation * groups):
        raise ValueError(
            f'config.train.batch_size {train.batch_size} does not divide into grad_accumulation '
            f'{train.grad_accumulation} x data {mesh.data} x fsdp {mesh.fsdp}: make it a multiple.'
        )
    for name, size in (
        ('eval.batch_size', config.eval.batch_size),
        ('sample.sheet_stories', config.sample.sheet_stories),
    ):
        if 2 * size % groups:
            raise ValueError(
                f'config.{name} {size}, doubled for guidance, does not divide over data '
                f'{mesh.data} x fsdp {mesh.fsdp}: make it a multiple of '
                f'{groups // math.gcd(2, groups)}.'
            )
    if config.eval.stories % config.eval.batch_size:
        raise ValueError(
            f'config.eval.stories {config.eval.stories} is not a multiple of eval.batch_size '
            f'{config.eval.batch_size}.'
        )


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
    folder = pathlib.Path(folder).absolute()
    is_checkpoint = folder.parent.name == 'checkpoints'
    workdir = folder.parent.parent if is_checkpoint else folder
    return load(workdir / 'config.json')
