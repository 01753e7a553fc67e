"""The stories as a TFDS data set.

`load` builds a configuration on first use, and checks on every use that the stored examples are
those that the code renders today.
"""

import dataclasses
import hashlib
import os
import shutil

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import logging

from mask2dit_jax import storage
from mask2dit_jax.distributed import watchdog
from mask2dit_jax.stories import cast, rendering, world

SEED = 0
SPLITS = ('train', 'test')
KINDS = ('one', 'cast')

# Number of stored examples that are drawn again when a split is opened.
SPOT_CHECKS = 8


@dataclasses.dataclass(eq=False, kw_only=True)
class StoriesConfig(tfds.core.BuilderConfig):
    """One configuration; its name follows from the other fields.

    Attributes:
        name: derived; the name of the folder.
        frames: video frames per scene.
        size_px: height and width of the frame.
        num_train: examples of the train split.
        num_test: examples of the test split; its combinations are not in train.
        kind: 'one' for stories of one character, 'cast' for world.CastStory.
    """

    name: str = ''
    frames: tuple[int, ...] = (4, 4, 4)
    size_px: int = 16
    num_train: int = 16384
    num_test: int = 512
    kind: str = 'one'

    def __post_init__(self):
        """Derives the name, as 3x4_16px_16384_512, 4-8_16px_16384_512, cast_8x4_16px_8192_512."""
        self.frames = tuple(self.frames)
        lengths = '-'.join(map(str, self.frames))
        if len(set(self.frames)) == 1:
            lengths = f'{len(self.frames)}x{self.frames[0]}'
        prefix = '' if self.kind == 'one' else f'{self.kind}_'
        self.name = f'{prefix}{lengths}_{self.size_px}px_{self.num_train}_{self.num_test}'


class Stories(tfds.core.GeneratorBasedBuilder):
    """Stories as TFDS examples: the video, and the JSON text of the story."""

    VERSION = tfds.core.Version('1.0.0')
    RELEASE_NOTES = {'1.0.0': 'First release.'}  # noqa: RUF012, TFDS wants a dict

    def _info(self):
        config = self.builder_config
        video_shape = (sum(config.frames), config.size_px, config.size_px, 3)
        # The default encoding stores every number as a separate integer, which is 10 times slower
        # to read than bytes.
        video = tfds.features.Tensor(
            shape=video_shape, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
        )
        features = tfds.features.FeaturesDict(
            {
                'index': tfds.features.Scalar(np.int64),
                'story': tfds.features.Text(),
                'video': video,
            }
        )
        return self.dataset_info_from_configs(features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager):
        del dl_manager  # Nothing is downloaded.
        return {split: self._generate_examples(split) for split in SPLITS}

    def _generate_examples(self, split):
        config = self.builder_config
        indices = tqdm.tqdm(
            range(num_examples(config, split)),
            desc=f'stories {config.name} {split}',
            unit='story',
        )
        for index in indices:
            watchdog.enter('data')
            story = make_story(config, split, index)
            example = {
                'index': index,
                'story': world.story_to_json(story),
                'video': rendering.render(story),
            }
            yield index, example


def num_examples(config: StoriesConfig, split: str) -> int:
    """Number of examples of a split, 'train' or 'test'."""
    return {'train': config.num_train, 'test': config.num_test}[split]


def make_story(config: StoriesConfig, split: str, index: int) -> world.AnyStory:
    """Draws one story of a split.

    Args:
        config: the configuration.
        split: 'train' or 'test'.
        index: place of the story in the split.

    Returns:
        The story, a pure function of the arguments: it does not depend on earlier draws.
    """
    rng = np.random.default_rng([SEED, split == 'test', index])
    sample = cast.sample_cast_story if config.kind == 'cast' else world.sample_story
    return sample(rng, config.frames, split=split, size_px=config.size_px)


class StorySource:
    """Random access to one split, for grain or a loop.

    `source[i]` is dict(video=uint8 [F, H, W, 3], story=Story or CastStory).

    Attributes:
        config: the StoriesConfig.
        fingerprint: hexadecimal digest of the version, the configuration and the examples that were
            drawn again on opening. It is equal for equal data, so that a resumed run can check that
            it reads the data of its first part.
    """

    def __init__(self, examples, config: StoriesConfig, split: str, folder):
        """Wraps a TFDS data source.

        Args:
            examples: the data source.
            config: the configuration that it should have.
            split: 'train' or 'test'.
            folder: where it lies, for the message.

        Raises:
            ValueError: if the examples are not those that would be rendered today.
        """
        self._examples = examples
        self.config = config
        self.fingerprint = _check(examples, config, split, folder)

    def __len__(self):
        return len(self._examples)

    def __getitem__(self, index):
        example = self._examples[index]
        story = world.story_from_json(example['story'].decode())
        return {'video': example['video'], 'story': story}


def load(
    data_dir: str | os.PathLike,
    frames: tuple[int, ...] = (4, 4, 4),
    split: str = 'train',
    *,
    size_px: int = 16,
    num_train: int = 16384,
    num_test: int = 512,
    kind: str = 'one',
) -> StorySource:
    """Opens a split of the stories; builds both splits in `data_dir` first if they are not there.

    Args:
        data_dir: parent folder of the TFDS data sets.
        frames: video frames per scene.
        split: 'train' or 'test'.
        size_px: height and width of the frame.
        num_train: examples of the train split.
        num_test: examples of the test split.
        kind: 'one' for stories of one character, 'cast' for world.CastStory.

    Returns:
        The split.

    Raises:
        ValueError: for another split or kind, a count below 1, or if the stored examples differ
            from freshly rendered ones.
    """
    world.check_split(split)
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} of stories is unknown; use 'one' or 'cast'.")
    if min(num_train, num_test) < 1:
        raise ValueError(f'num_train {num_train} and num_test {num_test} must be at least 1.')

    config = StoriesConfig(
        frames=frames, size_px=size_px, num_train=num_train, num_test=num_test, kind=kind
    )

    def make_builder():  # it looks for the examples when it is made, and never again
        return Stories(config=config, data_dir=os.fspath(data_dir), file_format='array_record')

    builder = make_builder()
    if not builder.data_path.exists():
        # Another run may be at it: then this one waits, and finds them there.
        with storage.claim(builder.data_path.parent, waits=True):
            builder = make_builder()
            if not builder.data_path.exists():
                logging.info(
                    'Rendering %d + %d stories to %s (once).',
                    num_train,
                    num_test,
                    builder.data_path,
                )
                _build(builder)

    return StorySource(builder.as_data_source(split), config, split, builder.data_path)


def _build(builder):
    """Writes both splits; what killed runs left of them is removed."""
    for left in builder.data_path.parent.glob('incomplete.*'):
        shutil.rmtree(left)

    # The bars of TFDS do not know the number of examples; those of _generate_examples do.
    tfds.disable_progress_bar()
    try:
        builder.download_and_prepare()
    finally:
        tfds.enable_progress_bar()


def _check(examples, config, split, folder):
    """Compares stored examples with the same ones drawn now; returns their fingerprint."""
    stale = ValueError(
        f'the stories in {folder} are not those that this version of the code renders; delete this '
        'folder and they are built again.'
    )
    count = num_examples(config, split)
    if len(examples) != count:
        raise stale

    # Spread evenly from the first to the last; a small split has fewer than SPOT_CHECKS.
    checked = np.unique(np.linspace(0, count - 1, SPOT_CHECKS).astype(int))

    digest = hashlib.sha256(f'stories {Stories.VERSION} {config.name} {split}'.encode())
    for index in checked.tolist():
        story = make_story(config, split, index)
        text = world.story_to_json(story).encode()
        video = rendering.render(story)

        example = examples[index]
        if example['story'] != text or not np.array_equal(example['video'], video):
            raise stale
        digest.update(text + video.tobytes())
    return digest.hexdigest()
