"""TFDS builder of the stories and `load`, which builds a configuration on first use and checks it
on every use."""

import dataclasses
import hashlib
import os

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import logging

from mask2dit_jax.stories import world

SEED = 0
SPOT_CHECKS = 8  # stored examples that are drawn again on opening


@dataclasses.dataclass(eq=False, kw_only=True)
class StoriesConfig(tfds.core.BuilderConfig):
    """One configuration; its name follows from the other fields.

    Attributes:
        frames: video frames per scene.
        size_px: height and width of the frame.
        num_train: examples of the train split.
        num_test: examples of the test split; its combinations are not in train.
    """

    name: str = ''
    frames: tuple[int, ...] = (4, 4, 4)
    size_px: int = 16
    num_train: int = 16384
    num_test: int = 512

    def __post_init__(self):
        """Derives the name, which is also the name of the folder."""
        self.frames = tuple(self.frames)
        equal = len(set(self.frames)) == 1
        lengths = (
            f'{len(self.frames)}x{self.frames[0]}' if equal else '-'.join(map(str, self.frames))
        )
        self.name = f'{lengths}_{self.size_px}px_{self.num_train}_{self.num_test}'


class Stories(tfds.core.GeneratorBasedBuilder):
    """Stories as TFDS examples: the video, and the JSON text from which the Story can be
    rebuilt."""

    VERSION = tfds.core.Version('1.0.0')
    RELEASE_NOTES = {'1.0.0': 'First release.'}  # noqa: RUF012, TFDS wants a dict

    def _info(self):
        config = self.builder_config
        shape = (sum(config.frames), config.size_px, config.size_px, 3)
        features = {
            'index': tfds.features.Scalar(np.int64),
            'story': tfds.features.Text(),
            # bytes: the default encoding stores every number as a separate integer, 10 times slower
            # to read
            'video': tfds.features.Tensor(
                shape=shape, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
            ),
        }
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )

    def _split_generators(self, dl_manager):
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in ('train', 'test')}

    def _generate_examples(self, split):
        count = num_examples(self.builder_config, split)
        for index in tqdm.tqdm(
            range(count), desc=f'stories {self.builder_config.name} {split}', unit='story'
        ):
            story = make_story(self.builder_config, split, index)
            yield (
                index,
                {'index': index, 'story': world.story_to_json(story), 'video': world.render(story)},
            )


def num_examples(config: StoriesConfig, split: str) -> int:
    """Number of examples of a split, 'train' or 'test'."""
    return {'train': config.num_train, 'test': config.num_test}[split]


def make_story(config: StoriesConfig, split: str, index: int) -> world.Story:
    """Story `index` of a split; a pure function of its arguments, whatever was drawn before."""
    rng = np.random.default_rng([SEED, split == 'test', index])
    return world.sample_story(rng, config.frames, split=split, size_px=config.size_px)


class StorySource:
    """Random access to one split: `source[i]` is dict(video=uint8 [F, H, W, 3], story=Story), for
    grain or a loop.

    Attributes:
        config: the StoriesConfig.
        fingerprint: hexadecimal digest of the version, the configuration and examples drawn on
            opening; equal for equal data, so that a resumed run can check that it reads the same.
    """

    def __init__(self, examples, config: StoriesConfig, split: str, folder):
        """Wraps a TFDS data source; raises ValueError if what it holds is not what would be
        rendered today."""
        self._examples, self.config = examples, config
        self.fingerprint = _check(examples, config, split, folder)

    def __len__(self):
        return len(self._examples)

    def __getitem__(self, index):
        example = self._examples[index]
        return {
            'video': example['video'],
            'story': world.story_from_json(example['story'].decode()),
        }


def _check(examples, config, split, folder):
    """Compares stored examples with the same ones drawn now; returns their fingerprint."""
    count = num_examples(config, split)
    right = len(examples) == count
    digest = hashlib.sha256(f'stories {Stories.VERSION} {config.name} {split}'.encode())
    for index in (
        np.unique(np.linspace(0, count - 1, SPOT_CHECKS).astype(int)).tolist() if right else ()
    ):
        story, example = make_story(config, split, index), examples[index]
        video, text = world.render(story), world.story_to_json(story).encode()
        right = right and example['story'] == text and np.array_equal(example['video'], video)
        digest.update(text + video.tobytes())
    if not right:
        raise ValueError(
            f'the stories in {folder} are not those that this version of the code renders; delete this '
            f'folder and they are built again.'
        )
    return digest.hexdigest()


def _build(builder):
    """Writes both splits."""
    tfds.disable_progress_bar()  # its bars know no total; ours does
    try:
        builder.download_and_prepare()
    finally:
        tfds.enable_progress_bar()


def load(
    data_dir: str | os.PathLike,
    frames: tuple[int, ...] = (4, 4, 4),
    split: str = 'train',
    *,
    size_px: int = 16,
    num_train: int = 16384,
    num_test: int = 512,
) -> StorySource:
    """Opens a split of the stories; builds both splits in `data_dir` first if they are not there.

    Args:
        data_dir: parent folder of the TFDS data sets.
        frames: video frames per scene.
        split: 'train' or 'test'.
        size_px: height and width of the frame.
        num_train: examples of the train split.
        num_test: examples of the test split.

    Raises:
        ValueError: for another split, a count below 1, or if the stored examples differ from
          freshly rendered ones.
    """
    if split not in ('train', 'test'):
        raise ValueError(f"split {split!r} is unknown; use 'train' or 'test'.")
    if min(num_train, num_test) < 1:
        raise ValueError(f'num_train {num_train} and num_test {num_test} must be at least 1.')
    config = StoriesConfig(frames=frames, size_px=size_px, num_train=num_train, num_test=num_test)
    builder = Stories(config=config, data_dir=os.fspath(data_dir), file_format='array_record')
    if not builder.data_path.exists():
        logging.info(
            'Rendering %d + %d stories to %s (once).', num_train, num_test, builder.data_path
        )
        _build(builder)
    return StorySource(builder.as_data_source(split), config, split, builder.data_path)
