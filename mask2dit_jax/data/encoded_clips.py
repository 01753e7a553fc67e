"""Picks encoded clips, each of which is one scene, and makes training stories of them.

clips.py cuts the clips out of videos, and precompute.py encodes them.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import grain
import numpy as np
from absl import logging
from safetensors.numpy import load_file

from mask2dit_jax import config as config_lib
from mask2dit_jax.data import latent_codec
from mask2dit_jax.data import records as records_lib


def with_data_from(config: config_lib.Config) -> config_lib.Config:
    """`config` with the codec and the frame size of the clips in config.data.encoded."""
    settings = records_lib.read_settings(config.data.encoded)
    data = dataclasses.replace(
        config.data,
        codec='vae',
        height_px=settings['height_px'],
        width_px=settings['width_px'],
    )
    return dataclasses.replace(config, data=data)


class Groups(Sequence):
    """Arrays of record numbers, cut out of one array: a list of them would take 100 bytes each.

    Attributes:
      size: the number of records in all arrays.
    """

    def __init__(self, records: np.ndarray, ends: np.ndarray):
        """Cuts `records`, all arrays one after another; `ends` says where each of them ends."""
        self._records = records
        self._ends = ends
        self.size = len(records)

    def __len__(self):
        return len(self._ends)

    def __getitem__(self, index) -> np.ndarray:
        index = range(len(self))[index]
        first = self._ends[index - 1] if index else 0
        return self._records[first : self._ends[index]]


class EncodedClips:
    """Stories made of encoded clips, each clip one scene.

    config.data.scenes says which clips make a story: 'consecutive' takes neighbouring scenes of one
    story of the data set, 'unrelated' takes any clips.

    Attributes:
      null_text: text states of the empty caption, float32 [M, E].
      fingerprint: digest of the data and of how stories are made of it.
    """

    def __init__(self, config: config_lib.Config, latent_shape: tuple[int, int, int], folder):
        """Opens the data set in a folder.

        Args:
          config: the configuration of the run.
          latent_shape: (h, w, C) of the run's VAE.
          folder: the data set that encode wrote.

        Raises:
          FileNotFoundError: if the folder is not a data set of clips.
          ValueError: if the data set is not complete, or does not fit the model or the VAE.
        """
        self._config = config
        self._records = records_lib.Records(folder)
        self._folder = self._records.folder
        settings = self._records.settings
        self._check_fit(settings, latent_shape)

        self._scale = np.float32(settings['scaling_factor'])
        null_text = load_file(self._folder / 'null_text.safetensors')['text']
        self.null_text = null_text.astype(np.float32)  # [M, E]
        identity = f'{self._records.fingerprint} {config.data.scenes}'
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    def _check_fit(self, settings: dict, latent_shape: tuple[int, int, int]) -> None:
        """Raises ValueError if the data set does not fit the model or the VAE."""
        if settings['store'] != 'moments':
            raise ValueError(
                f'{self._folder} holds {settings["store"]}: encode the videos again with '
                '--store=moments.'
            )

        model = self._config.model
        height, width, channels = latent_shape
        moments_wanted = [height, width, 2 * channels]
        text_wanted = [model.max_text_seq_length, model.text_embed_dim]
        moments_shape = settings['moments_shape']
        text_shape = settings['text_shape']
        if (moments_shape, text_shape) != (moments_wanted, text_wanted):
            raise ValueError(
                f'{self._folder} has moments {moments_shape} and text {text_shape}, and the '
                f'configuration asks for {moments_wanted} and {text_wanted}: check '
                'config.data.height_px, width_px, the model and the data.'
            )

        vae_folder = latent_codec.model_folder(self._config) / 'vae'
        if latent_codec.network_digest(vae_folder) != settings['vae']:
            raise ValueError(
                f'{self._folder} was encoded with another VAE than {vae_folder}: encode the videos '
                'again with it.'
            )

    def candidates(self, layout: tuple[int, ...]) -> Groups | np.ndarray:
        """Records that an example of this layout may begin with, in groups.

        An epoch takes one example from every group; its first record is drawn from the group.

        Args:
          layout: pixel frames of each scene.

        Returns:
          With consecutive scenes one group per story of the data set: the first records of its
          windows that fit the layout. With unrelated scenes one group per clip that fits the first
          scene: the clip alone.

        Raises:
          ValueError: if nothing fits, naming what the data set has.
        """
        if self._config.data.scenes == 'unrelated':
            groups = self._single_clips(layout)
        else:
            groups = self._story_windows(layout)
        if len(groups):
            return groups

        rows = self._records.rows
        lengths, counts = np.unique(rows['frames'], return_counts=True)
        listed = ', '.join(f'{count} of {frames} frames' for frames, count in zip(lengths, counts))
        raise ValueError(
            f'{self._folder} has no {self._config.data.scenes} scenes of {layout} frames; its '
            f'clips are {listed} in {len(np.unique(rows["story"]))} stories: change '
            'config.data.layouts or config.data.scenes, or encode other clips.'
        )

    @functools.cached_property
    def _clips_by_length(self) -> dict[int, np.ndarray]:
        """Numbers of the records of each length in pixel frames, ascending."""
        lengths = np.ascontiguousarray(self._records.rows['frames'])
        return {int(frames): np.flatnonzero(lengths == frames) for frames in np.unique(lengths)}

    def _single_clips(self, layout: tuple[int, ...]) -> np.ndarray:
        """Clips that fit the first scene, if there are enough clips for all scenes."""
        nothing = np.zeros(0, np.int64)
        for frames in layout:
            if len(self._clips_by_length.get(frames, nothing)) < layout.count(frames):
                return nothing[:, None]
        return self._clips_by_length[layout[0]][:, None]

    def _story_windows(self, layout: tuple[int, ...]) -> Groups:
        """Per story the first records of its windows that fit the layout."""
        rows = self._records.rows
        num_windows = max(0, len(rows) - len(layout) + 1)
        first = rows[:num_windows]

        fits = np.ones(num_windows, bool)
        for i, frames in enumerate(layout):
            # The i-th record of a window is of the same story, i scenes later, and long enough.
            here = rows[i : i + num_windows]
            fits &= here['story'] == first['story']
            fits &= here['scene'] == first['scene'] + i
            fits &= here['frames'] == frames

        starts = np.flatnonzero(fits)
        stories = rows['story'][starts]
        order = np.argsort(stories, kind='stable')  # they are sorted in what encode wrote
        starts, stories = starts[order], stories[order]
        is_last = np.append(stories[1:] != stories[:-1], np.ones(len(stories[:1]), bool))
        return Groups(starts, np.flatnonzero(is_last) + 1)

    def _draw_records(
        self, starts: np.ndarray, rng: np.random.Generator, layout: tuple[int, ...]
    ) -> np.ndarray:
        """Records of one example, whose first one is drawn from `starts`."""
        first = int(rng.choice(starts))
        if self._config.data.scenes == 'consecutive':
            return first + np.arange(len(layout))

        picked = [first]
        for frames in layout[1:]:
            clips = self._clips_by_length[frames]
            taken = [record for record, length in zip(picked, layout) if length == frames]

            # A place among the clips that are left, as one among all clips of this length.
            place = int(rng.choice(len(clips) - len(taken)))
            for taken_place in np.sort(np.searchsorted(clips, taken)):
                place += int(place >= taken_place)
            picked.append(int(clips[place]))
        return np.array(picked)

    def example(self, records, rng: np.random.Generator | None) -> dict:
        """One example of the model's input.

        Args:
          records: numbers of the records, one per scene.
          rng: draws the latents from their posterior; None takes the posterior's mean.

        Returns:
          'latents' [T, h, w, C] and 'text' [S, M, E], both float32.
        """
        scenes = [self._records[i] for i in records]

        latents = []
        for scene in scenes:
            moments = scene['moments'].astype(np.float32)  # [T, h, w, 2C]
            mean, logvar = np.split(moments, 2, axis=-1)
            if rng is not None:
                mean = mean + np.exp(0.5 * logvar) * rng.standard_normal(mean.shape, np.float32)
            latents.append(mean * self._scale)

        text = [scene['text'].astype(np.float32) for scene in scenes]
        return {'latents': np.concatenate(latents), 'text': np.stack(text)}

    def _least_given(self, records) -> np.ndarray:
        """How many scenes must be given, int32 []: one, if no caption says what they show."""
        begins = self._records.rows['scene'][records[0]] == 0
        return np.array(self._config.data.named_once and not begins, np.int32)

    def captions(self, records) -> list[str]:
        """Captions of these records."""
        return [self._records[i]['caption'].decode() for i in records]

    def endless(self, layout: tuple[int, ...]) -> grain.MapDataset:
        """Shuffled examples of a layout without end.

        Windows, companions of a clip and the posterior are drawn anew every epoch.

        Raises:
          ValueError: if no example fits the layout.
        """
        groups = self.candidates(layout)
        logging.info(
            '%s: %d examples of %s frames per epoch; %d of %d clips begin one.',
            self._folder,
            len(groups),
            '+'.join(map(str, layout)),
            groups.size,
            len(self._records),
        )

        def draw(starts, rng):
            records = self._draw_records(starts, rng, layout)
            return self.example(records, rng) | {'least_given': self._least_given(records)}

        dataset = grain.MapDataset.source(groups).seed(self._config.seed)
        return dataset.shuffle().repeat().random_map(draw)

    def fixed(self, layout: tuple[int, ...], count: int) -> list[np.ndarray]:
        """Records of `count` stories, the same ones on every call.

        Stories repeat, with other windows or companions, if the data set has fewer than `count`.

        Raises:
          ValueError: if no example fits the layout.
        """
        groups = self.candidates(layout)
        stories = []
        for i in range(count):
            rng = np.random.default_rng([1, i])
            stories.append(self._draw_records(groups[i % len(groups)], rng, layout))
        return stories
