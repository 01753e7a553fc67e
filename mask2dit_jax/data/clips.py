"""Stories made of the clips of a data set that `encode` wrote."""

import dataclasses
import hashlib

import grain
import numpy as np
from absl import logging
from safetensors.numpy import load_file

from mask2dit_jax import config as config_lib
from mask2dit_jax.data import latent_codec
from mask2dit_jax.data import records as records_lib


def with_data_from(config: config_lib.Config) -> config_lib.Config:
    """`config` with the size of the clips that it is to train on."""
    made = records_lib.read_settings(config.data.encoded)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data, codec='vae', height_px=made['height_px'], width_px=made['width_px']
        ),
    )


class EncodedClips:
    """Stories made of the clips of a data set that encode wrote.

    Attributes:
      null_text: of the empty caption, float32 [M, E].
      fingerprint: of the data and of how stories are made of it.
    """

    def __init__(self, config: config_lib.Config, latent_shape: tuple[int, int, int], folder):
        """Opens the data set in a folder.

        Args:
          config: the configuration.
          latent_shape: (h, w, C) of the VAE.
          folder: that encode wrote.

        Raises:
          FileNotFoundError, ValueError: if it is none, or does not fit the model or the VAE.
        """
        self._records, self._config = records_lib.Records(folder), config
        self._folder, made = self._records.folder, self._records.settings
        if made['store'] != 'moments':
            raise ValueError(
                f'{self._folder} holds {made["store"]}: encode the videos again with --store=moments.'
            )
        model, (h, w, channels) = config.model, latent_shape
        want = [h, w, 2 * channels], [model.max_text_seq_length, model.text_embed_dim]
        have = made['moments_shape'], made['text_shape']
        if have != want:
            raise ValueError(
                f'{self._folder} has moments {have[0]} and text {have[1]}, and the configuration asks for '
                f'{want[0]} and {want[1]}: check config.data.height_px, width_px, the model and the data.'
            )
        vae_folder = latent_codec.model_folder(config) / 'vae'
        if latent_codec.network_digest(vae_folder) != made['vae']:
            raise ValueError(
                f'{self._folder} was encoded with another VAE than {vae_folder}: encode the videos again '
                'with it.'
            )
        self._scale = np.float32(made['scaling_factor'])
        self.null_text = load_file(self._folder / 'null_text.safetensors')['text'].astype(
            np.float32
        )
        self.fingerprint = hashlib.sha256(
            f'{self._records.fingerprint} {config.data.scenes}'.encode()
        ).hexdigest()

    def candidates(self, layout: tuple[int, ...]) -> list[np.ndarray]:
        """What an example of this layout may start from: per story the records of first scenes of
        windows that fit, or per clip that fits the first scene itself.

        Raises:
          ValueError: if nothing fits, naming what there is.
        """
        rows, need = self._records.rows, len(layout)
        if self._config.data.scenes == 'unrelated':
            found = [np.array([i]) for i in np.flatnonzero(rows[:, 2] == layout[0])]
            fits = [int(np.sum(rows[:, 2] == n)) >= layout.count(n) for n in layout]
            found = found if all(fits) else []
        else:
            # Windows of neighbouring records: the same story, scenes in a row, frames as the layout
            # has them.
            starts = np.arange(len(rows) - need + 1)
            for i, frames in enumerate(layout):
                here = rows[starts + i]
                same = (
                    (here[:, 0] == rows[starts, 0])
                    & (here[:, 1] == rows[starts, 1] + i)
                    & (here[:, 2] == frames)
                )
                starts = starts[same]
            groups = np.unique(rows[starts, 0])
            found = [starts[rows[starts, 0] == story] for story in groups]
        if not found:
            lengths, counts = np.unique(rows[:, 2], return_counts=True)
            listed = ', '.join(f'{n} of {f} frames' for f, n in zip(lengths, counts))
            raise ValueError(
                f'{self._folder} has no {self._config.data.scenes} scenes of {layout} frames; its clips '
                f'are {listed} in {len(np.unique(rows[:, 0]))} stories: change config.data.layouts or '
                'config.data.scenes, or encode other clips.'
            )
        return found

    def _story(
        self, starts: np.ndarray, rng: np.random.Generator, layout: tuple[int, ...]
    ) -> np.ndarray:
        """Records of one example."""
        first = int(rng.choice(starts))
        if self._config.data.scenes == 'consecutive':
            return first + np.arange(len(layout))
        lengths, picked = self._records.rows[:, 2], [first]
        for frames in layout[1:]:
            picked.append(int(rng.choice(np.setdiff1d(np.flatnonzero(lengths == frames), picked))))
        return np.array(picked)

    def example(self, records, rng: np.random.Generator | None) -> dict:
        """Latents [T, h, w, C], drawn from the posterior, or its mean without rng, and text [S, M,
        E], float32."""
        read = [self._records[i] for i in records]
        latents = []
        for r in read:
            mean, logvar = np.split(r['moments'].astype(np.float32), 2, axis=-1)
            if rng is not None:
                mean = mean + np.exp(0.5 * logvar) * rng.standard_normal(mean.shape, np.float32)
            latents.append(mean * self._scale)
        return {
            'latents': np.concatenate(latents),
            'text': np.stack([r['text'].astype(np.float32) for r in read]),
        }

    def captions(self, records) -> list[str]:
        """Of these records."""
        return [self._records[i]['caption'].decode() for i in records]

    def endless(self, layout: tuple[int, ...]) -> grain.MapDataset:
        """Shuffled examples without end; windows, companions and the posterior are drawn anew every
        time."""
        found = self.candidates(layout)
        used = len(np.unique(np.concatenate(found)))
        logging.info(
            '%s: %d examples of %s frames per epoch; %d of %d clips begin one.',
            self._folder,
            len(found),
            '+'.join(map(str, layout)),
            used,
            len(self._records),
        )

        def draw(starts, rng):
            return self.example(self._story(starts, rng, layout), rng)

        return (
            grain.MapDataset.source(found)
            .seed(self._config.seed)
            .shuffle()
            .repeat()
            .random_map(draw)
        )

    def fixed(self, layout: tuple[int, ...], count: int) -> list[np.ndarray]:
        """Records of `count` stories, always the same ones; they come again if there are fewer."""
        found = self.candidates(layout)
        return [
            self._story(found[i % len(found)], np.random.default_rng([1, i]), layout)
            for i in range(count)
        ]
