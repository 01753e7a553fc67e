"""Training batches as a pure function of the step.

The examples are rendered stories, encoded at the start of the run, or clips that
mask2dit_jax.encode has encoded.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable

import grain
import jax
import numpy as np
from jax.experimental import multihost_utils

from mask2dit_jax import config as config_lib
from mask2dit_jax.data import encoded_clips, latent_codec
from mask2dit_jax.stories import builder, world


class EncodedStories:
    """Random access to latents and text of rendered stories, encoded once and held in memory.

    An example is a window: neighbouring scenes of a story, which may have more of them. What no
    caption of a window describes, because an earlier scene's did, must be seen before it is
    generated: 'least_given' says how many leading scenes must be given for that. Windows are left
    out whose last scene is the first to show such a thing.
    """

    def __init__(
        self,
        source: builder.StorySource,
        codec: latent_codec.LatentCodec,
        num_scenes: int,
        caption_style: str,
    ):
        """Encodes all stories of a split.

        Args:
          source: the split.
          codec: the codec of the run.
          num_scenes: scenes of a window, which starts at any scene that leaves as many.
          caption_style: how captions are worded; see world.captions.
        """
        examples = [source[i] for i in range(len(source))]
        frames = source.config.frames
        videos = np.stack([example['video'] for example in examples])  # [B, F, H, W, 3]
        self._latents = codec.encode_video(videos, frames)  # [B, T, h, w, C]
        self._borders = np.cumsum((0, *codec.latent_frames(frames)))
        self._num_scenes = num_scenes

        # Captions repeat: each distinct one is encoded once, and stories share its states.
        stories = [example['story'] for example in examples]
        captions = [world.captions(story, caption_style) for story in stories]
        self._windows = _windows(stories, captions, num_scenes)
        distinct = sorted({caption for story in captions for caption in story})
        states = dict(zip(distinct, codec.encode_text(distinct)))
        self._text = [[states[caption] for caption in story] for story in captions]

    def __len__(self):
        return len(self._windows)

    def __getitem__(self, index):
        story, start, least_given = self._windows[index]
        stop = start + self._num_scenes
        return {
            'latents': self._latents[story, self._borders[start] : self._borders[stop]],
            'text': np.stack(self._text[story][start:stop]),
            'least_given': np.array(least_given, np.int32),
        }


def _windows(
    stories: list[world.AnyStory], captions: list[list[str]], num_scenes: int
) -> list[tuple[int, int, int]]:
    """(story, first scene, least_given) of all windows but those that show what is held out, and
    those whose last scene is the first to show something that they do not describe."""
    windows = []
    for index, (story, texts) in enumerate(zip(stories, captions)):
        shown = [{who, where} for who, where in zip(story.who, story.where)]
        described = [world.described(text) for text in texts]
        for start in range(len(shown) - num_scenes + 1):
            stop = start + num_scenes
            unknown = set().union(*shown[start:stop]).difference(*described[start:stop])
            least_given = 0
            while unknown:
                unknown = unknown - shown[start + least_given]
                least_given += 1
            if least_given < num_scenes and not world.is_held_out(story, start, stop):
                windows.append((index, start, least_given))
    return windows


@dataclasses.dataclass(frozen=True)
class Batches:
    """Endless shuffled batches.

    Attributes:
      layouts: pixel frames of each scene, per kind of story; steps take the layouts in turn.
      datasets: an endless, shuffled grain data set per distinct layout.
      batch_size: examples of the global batch.
      null_text: text states of the empty caption, float32 [M, E].
      fingerprint: digest of the data, which a resumed run compares.
    """

    layouts: tuple[tuple[int, ...], ...]
    datasets: dict[tuple[int, ...], grain.MapDataset]
    batch_size: int
    null_text: np.ndarray
    fingerprint: str

    def __call__(self, step: int, rows):
        """Makes the batch of a step, or some rows of it.

        Args:
          step: the step.
          rows: positions in the global batch.

        Returns:
          The layout of the step, and the examples as a dict of arrays, stacked along axis 0.
        """
        cycle, turn = divmod(step, len(self.layouts))
        layout = self.layouts[turn]

        # Batches of this layout before this step: a layout may have several turns in a cycle.
        seen = cycle * self.layouts.count(layout) + self.layouts[:turn].count(layout)
        first = seen * self.batch_size
        examples = [self.datasets[layout][first + row] for row in rows]
        batch = {key: np.stack([example[key] for example in examples]) for key in examples[0]}
        return layout, batch


def open_stories(
    config: config_lib.Config, workdir, frames: tuple[int, ...], split: str
) -> builder.StorySource:
    """Opens one split of the stories, and renders it on first use.

    With several processes, process 0 renders and the others wait for it.

    Args:
      config: the configuration of the run.
      workdir: its folder; stories lie in `data` beside it unless config.data.dir names a folder.
      frames: pixel frames of each scene.
      split: 'train' or 'test'.
    """
    data = config.data
    counts = {'num_train': data.num_train, 'num_test': data.num_test}
    if data.story_scenes:
        # Stories for training have more scenes than those that are held out. Each data set needs
        # one split; the examples of a split do not depend on the size of the other.
        counts['num_test' if split == 'train' else 'num_train'] = 1
    beside_workdir = os.path.join(os.path.dirname(os.path.abspath(workdir)), 'data')
    load = functools.partial(
        builder.load,
        data.dir or beside_workdir,
        frames,
        split,
        size_px=latent_codec.square(data),
        **counts,
        kind=data.world,
    )
    if jax.process_count() == 1:
        return load()

    if jax.process_index() == 0:
        load()
    multihost_utils.sync_global_devices('stories')
    return load()


def train_batches(config: config_lib.Config, workdir, codec: latent_codec.LatentCodec) -> Batches:
    """Training batches of every layout in the configuration.

    Args:
      config: the configuration of the run.
      workdir: its folder.
      codec: its codec.

    Raises:
      FileNotFoundError, ValueError: naming what the data lacks.
    """
    layouts = config.data.layouts
    distinct_layouts = tuple(dict.fromkeys(layouts))
    batch_size = config.train.batch_size

    if config.data.encoded:
        encoded = encoded_clips.EncodedClips(config, codec.latent_shape, config.data.encoded)
        datasets = {layout: encoded.endless(layout) for layout in distinct_layouts}
        return Batches(layouts, datasets, batch_size, encoded.null_text, encoded.fingerprint)

    sources = {}
    for layout in distinct_layouts:
        more_scenes = max(0, config.data.story_scenes - len(layout))
        story_frames = layout + layout[:1] * more_scenes
        sources[layout] = open_stories(config, workdir, story_frames, 'train')
    datasets = {}
    for layout, source in sources.items():
        stories = EncodedStories(source, codec, len(layout), config.data.caption_style)
        dataset = grain.MapDataset.source(stories).seed(config.seed)
        datasets[layout] = dataset.shuffle().repeat()

    null_text = codec.encode_text([''])[0]  # [M, E]
    identity = repr([(layout, source.fingerprint) for layout, source in sources.items()])
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()
    return Batches(layouts, datasets, batch_size, null_text, fingerprint)


@contextlib.contextmanager
def prefetched(function: Callable, items: Iterable, ahead: int = 2):
    """Applies a function to items in one thread, ahead of their use.

    grain's own prefetching does not serve here: it drops results that are None, and closing it does
    not wait for its thread, which may then still use devices after the end of the run.

    Args:
      function: what is applied.
      items: its arguments.
      ahead: results that are made, or being made, before they are asked for.

    Yields:
      An iterator over function(item) in the order of the items. An error of the function is raised
      where the turn of its item comes. Leaving the context waits for the item in work.
    """
    remaining = iter(items)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = collections.deque()

        def submit(count: int) -> None:
            for item in itertools.islice(remaining, count):
                waiting.append(pool.submit(function, item))

        def results():
            while waiting:
                result = waiting.popleft().result()
                submit(1)
                yield result

        submit(ahead)
        try:
            yield results()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
