"""Batches as a pure function of the step: of rendered stories, encoded at the start, or of clips
that encode has coded.

And the codec between captions or pixels and what the model sees.
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

from mask2dit_jax import config as config_lib
from mask2dit_jax.data import clips, latent_codec
from mask2dit_jax.stories import builder, world


class EncodedStories:
    """Random access to the latents and text of a split, encoded once and held in memory."""

    def __init__(
        self,
        source: builder.StorySource,
        codec: latent_codec.LatentCodec,
        frames: tuple[int, ...],
        caption_style: str,
    ):
        examples = [source[i] for i in range(len(source))]
        self._latents = codec.encode_video(np.stack([e['video'] for e in examples]), frames)
        # Captions repeat: each distinct one is encoded once.
        captions = [world.captions(e['story'], caption_style) for e in examples]
        distinct = sorted({c for story in captions for c in story})
        text = dict(zip(distinct, codec.encode_text(distinct)))
        self._text = [[text[c] for c in story] for story in captions]

    def __len__(self):
        return len(self._latents)

    def __getitem__(self, index):
        return {'latents': self._latents[index], 'text': np.stack(self._text[index])}


@dataclasses.dataclass(frozen=True)
class Batches:
    """Endless shuffled batches.

    Attributes:
      layouts: frames per scene of each kind of story, in the order in which steps take turns.
      datasets: an endless, shuffled grain data set per distinct layout.
      batch_size: global.
      null_text: of the empty caption, float32 [M, E].
      fingerprint: of the data, to be checked on resuming.
    """

    layouts: tuple[tuple[int, ...], ...]
    datasets: dict[tuple[int, ...], grain.MapDataset]
    batch_size: int
    null_text: np.ndarray
    fingerprint: str

    def __call__(self, step: int, rows):
        """Layout of a step, and the examples at `rows` of its global batch."""
        turn, cycle = step % len(self.layouts), step // len(self.layouts)
        layout = self.layouts[turn]
        seen = cycle * self.layouts.count(layout) + self.layouts[:turn].count(layout)
        examples = [self.datasets[layout][seen * self.batch_size + row] for row in rows]
        return layout, {k: np.stack([e[k] for e in examples]) for k in examples[0]}


def open_stories(
    config: config_lib.Config, workdir, frames: tuple[int, ...], split: str
) -> builder.StorySource:
    """One split of the stories, rendered on first use; process 0 renders, the others wait."""
    data = config.data
    folder = data.dir or os.path.join(os.path.dirname(os.path.abspath(workdir)), 'data')
    opened = functools.partial(
        builder.load,
        folder,
        frames,
        split,
        size_px=latent_codec.square(data),
        num_train=data.num_train,
        num_test=data.num_test,
    )
    if jax.process_count() == 1:
        return opened()
    from jax.experimental import multihost_utils

    if jax.process_index() == 0:
        opened()
    multihost_utils.sync_global_devices('stories')
    return opened()


def train_batches(config: config_lib.Config, workdir, codec: latent_codec.LatentCodec) -> Batches:
    """Training batches of every layout in the configuration.

    Raises:
      FileNotFoundError, ValueError: naming what the data lacks.
    """
    layouts, size = config.data.layouts, config.train.batch_size
    if config.data.encoded:
        encoded = clips.EncodedClips(config, codec.latent_shape, config.data.encoded)
        datasets = {f: encoded.endless(f) for f in dict.fromkeys(layouts)}
        return Batches(layouts, datasets, size, encoded.null_text, encoded.fingerprint)
    sources = {f: open_stories(config, workdir, f, 'train') for f in dict.fromkeys(layouts)}
    datasets = {
        f: grain.MapDataset.source(EncodedStories(s, codec, f, config.data.caption_style))
        .seed(config.seed)
        .shuffle()
        .repeat()
        for f, s in sources.items()
    }
    digest = hashlib.sha256(
        repr([(f, s.fingerprint) for f, s in sources.items()]).encode()
    ).hexdigest()
    return Batches(layouts, datasets, size, codec.encode_text([''])[0], digest)


@contextlib.contextmanager
def prefetched(function: Callable, items: Iterable, ahead: int = 2):
    """An iterator over function(item) in the order of items, made by one thread while the last one
    is in use.

    What the function raises is raised where its item's turn comes. Leaving the context waits for
    the item in work.
    """
    items = iter(items)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = collections.deque(
            pool.submit(function, item) for item in itertools.islice(items, ahead)
        )

        def results():
            while waiting:
                result = waiting.popleft().result()
                waiting.extend(pool.submit(function, item) for item in itertools.islice(items, 1))
                yield result

        try:
            yield results()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
