"""The whole configuration as documented, frozen dataclasses; ml_collections only at the edge.

`default()` is a locked ConfigDict of the defaults, for configs/*.py and command-line overrides;
`parse` turns it back into dataclasses and refuses what they do not know.
"""

import dataclasses
import json
import math
import pathlib

import ml_collections

from mask2dit_jax.diffusion import schedule as schedule_lib
from mask2dit_jax.distributed import mesh as mesh_lib
from mask2dit_jax.models import dit
from mask2dit_jax.models import lora as lora_lib

OPTIMIZERS = ('adamw', 'muon')
CODECS = ('stories', 'vae')
SCENES = ('consecutive', 'unrelated')
GIVEN = ('leading', 'any')


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """What to train on: real videos that mask2dit_jax.encode has coded, or rendered stories.

    Attributes:
      layouts: frames per scene of each kind of story; batches of one kind alternate in this order,
        so that a kind listed twice is seen twice as often.
      encoded: folder of clips that encode wrote; empty for rendered stories.
      held_out: another such folder, for the sheets and the last losses; empty to take the one that
        is trained on.
      scenes: what makes a story of clips: 'consecutive' ones of one story from a random start
        (SFT), or 'unrelated' ones (pretraining).
      codec: what makes latents of pixels: 'stories', a fixed linear codec, or 'vae', that of a
        model folder.
      height_px, width_px: size of the videos; stories are square.
      caption_style: 'first' names character and place in the first caption only, 'every' in each.
      codec_patch_frames: frames per latent frame of the stories' codec.
      codec_components: its latent channels.
      num_train, num_test: stories of each kind.
      fps: frames per second of videos written.
      dir: where data sets are kept; empty for <workdir>/../data.
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
    """AdamW, or Muon for the blocks' attention and MLP matrices with Nesterov AdamW for the rest
    (as optax has it).

    Attributes:
      name: 'adamw' or 'muon'.
      learning_rate: peak, after warmup_steps of linear warm-up from 0.
      final_fraction: the cosine ends at this fraction of the peak; 1 keeps the rate constant.
      clip_norm: global gradient norm limit.
      muon_rms: root mean square of Muon's update of a matrix, in units of the learning rate (0.2 is
        AdamW's).
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
      batch_size: global, over all devices and accumulated micro-batches.
      grad_accumulation: micro-batches per update.
      caption_dropout: share of stories trained on empty captions, for classifier-free guidance.
      conditional_probability: share of stories in which some scenes are given (clean, timestep 0),
        but never all.
      given: which, 'leading' ones as in extension, or 'any' subset.
      conditional_from_step: updates before this one give no scenes.
      ema_decay: limit of the decay min((1 + k) / (10 + k), ema_decay).
      keep_checkpoints: the newest ones that stay on disk.
      keep_every_steps: checkpoints of multiples of this stay for good; 0 for none.
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
    """Sampling, in training's sheets, in the final scores, and as the defaults of `sample`."""

    sampler: str = 'ddim'
    steps: int = 50
    guidance: float = 6.0
    sheet_stories: int = 4


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Scores at the end of training: held-out stories, and how many per batch."""

    stories: int = 256
    batch_size: int = 64


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything `main` needs.

    Attributes:
      init_from: where training starts: a workdir or one of its checkpoints, for its EMA parameters,
        or a model folder, released or converted, whose VAE and text encoder are then used, too.
        Empty for random parameters. `main --checkpoint` sets it, and takes the model's sizes from
        there.
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


def default() -> ml_collections.ConfigDict:
    """The defaults as a ConfigDict that refuses new keys."""
    return ml_collections.ConfigDict(_plain(Config()), convert_dict=True)


def _plain(config) -> dict:
    return {
        f.name: _plain(v) if dataclasses.is_dataclass(v) else v
        for f in dataclasses.fields(config)
        for v in [getattr(config, f.name)]
    }


def _tuples(value):
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


def _build(cls, values: dict, where: str):
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise ValueError(
            f'{where} has unknown keys {", ".join(unknown)}; it knows {", ".join(fields)}.'
        )
    nested = {k: v for k, v in values.items() if dataclasses.is_dataclass(fields[k].default)}
    built = {k: _build(type(fields[k].default), v, f'{where}.{k}') for k, v in nested.items()}
    return cls(**({k: _tuples(v) for k, v in values.items()} | built))


def parse(config) -> Config:
    """Validated dataclasses from a ConfigDict or a nested dict.

    Raises:
      ValueError: naming the section and key that is unknown or out of range.
    """
    config = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else config
    parsed = _build(Config, config, 'config')
    _check(parsed)
    return parsed


def _check(config: Config) -> None:
    t, m = config.train, config.mesh
    for name in ('rank', 'alpha'):
        if getattr(config.lora, name) < 0:
            raise ValueError(
                f'config.lora.{name} must not be negative, got {getattr(config.lora, name)}.'
            )
    if config.optimizer.name not in OPTIMIZERS:
        raise ValueError(
            f'config.optimizer.name is {config.optimizer.name!r}: use one of {", ".join(OPTIMIZERS)}.'
        )
    for name, value, known in (
        ('data.codec', config.data.codec, CODECS),
        ('data.scenes', config.data.scenes, SCENES),
        ('train.given', t.given, GIVEN),
    ):
        if value not in known:
            raise ValueError(f'config.{name} is {value!r}: use one of {", ".join(known)}.')
    if config.data.held_out and not config.data.encoded:
        raise ValueError(
            'config.data.held_out goes with config.data.encoded: give both, or neither.'
        )
    if t.batch_size % (t.grad_accumulation * m.data * m.fsdp):
        raise ValueError(
            f'config.train.batch_size {t.batch_size} does not divide into grad_accumulation '
            f'{t.grad_accumulation} x data {m.data} x fsdp {m.fsdp}: make it a multiple.'
        )
    for name in ('caption_dropout', 'conditional_probability', 'ema_decay'):
        if not 0 <= getattr(t, name) <= 1:
            raise ValueError(f'config.train.{name} must lie in 0...1, got {getattr(t, name)}.')
    if t.keep_checkpoints < 1 or t.keep_every_steps % t.checkpoint_every_steps:
        raise ValueError(
            f'config.train.keep_checkpoints {t.keep_checkpoints} must be at least 1 and keep_every_steps '
            f'{t.keep_every_steps} a multiple of checkpoint_every_steps {t.checkpoint_every_steps}.'
        )
    doubled = {
        'eval.batch_size': config.eval.batch_size,
        'sample.sheet_stories': config.sample.sheet_stories,
    }
    for name, size in doubled.items():
        if 2 * size % (m.data * m.fsdp):  # both halves of classifier-free guidance
            raise ValueError(
                f'config.{name} {size}, doubled for guidance, does not divide over data {m.data} x fsdp '
                f'{m.fsdp}: make it a multiple of {m.data * m.fsdp // math.gcd(2, m.data * m.fsdp)}.'
            )
    if config.eval.stories % config.eval.batch_size:
        raise ValueError(
            f'config.eval.stories {config.eval.stories} is not a multiple of eval.batch_size '
            f'{config.eval.batch_size}.'
        )
    for layout in config.data.layouts:
        if not layout or min(layout) < 1:
            raise ValueError(
                f'config.data.layouts has {layout}: a story needs scenes, and a scene frames.'
            )
    if not config.data.layouts:
        raise ValueError(
            'config.data.layouts is empty: list at least one kind of story, e.g. ((4, 4, 4),).'
        )


def save(config: Config, path: pathlib.Path) -> None:
    """Writes the configuration as JSON, at once, so that a kill leaves no half of it."""
    whole = path.with_name(path.name + '.tmp')
    whole.write_text(json.dumps(_plain(config), indent=2) + '\n')
    whole.replace(path)


# Names of backends in the workdirs of earlier versions.
_RENAMED_BACKENDS = {'decomposed': 'blockwise'}


def load(path: pathlib.Path) -> Config:
    """Reads what `save` wrote.

    Raises:
      FileNotFoundError: if there is none, which means that path's folder is no workdir.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f'{path} does not exist: --workdir must be a folder that mask2dit_jax.main wrote.'
        )
    values = json.loads(path.read_text())
    model = values['model']
    model['attention_backend'] = _RENAMED_BACKENDS.get(
        model['attention_backend'], model['attention_backend']
    )
    return parse(values)


def load_run(folder) -> Config:
    """Configuration of the run whose workdir, or one of whose checkpoints, this is; errors as
    `load`."""
    folder = pathlib.Path(folder).absolute()
    return load(
        (folder.parent.parent if folder.parent.name == 'checkpoints' else folder) / 'config.json'
    )
