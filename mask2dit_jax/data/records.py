"""Data sets of encoded clips: TFDS data sets of ArrayRecord files, written part by part.

TFDS's own builders write a data set in one run on one machine, and start from nothing after a kill.
Here every part is a file of its own, which any host may write, and which appears under its name
only when it is whole. The last step adds the files that make a TFDS data set of the parts, so that
`tfds.builder_from_directory(DIR).as_data_source('train')` reads it without this package.

Three more kinds of files lie beside the records: encode.json says how they were made, an index of
each part lists its records and problems, and report.md is the summary for people.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import uuid
from typing import NamedTuple

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import dataset_info, example_serializer

from mask2dit_jax import paths
from mask2dit_jax.data import manifest

STORES = ('moments', 'frames')
_SETTINGS = 'encode.json'
_VERSION = '1.0.0'


class Row(NamedTuple):
    """The place of a record in its story, and its length in pixel frames."""

    story: int
    scene: int
    frames: int


# The same as columns of an array.
_ROW_DTYPE = np.dtype([(name, np.int64) for name in Row._fields])


@dataclasses.dataclass(frozen=True)
class Part:
    """The result of encoding one part of the clips.

    Attributes:
      rows: one per record, in the order of the records.
      problems: the problems of the part's clips.
    """

    rows: list[Row]
    problems: list[manifest.Problem]


def features(settings: dict) -> tfds.features.FeaturesDict:
    """Features of one record.

    Args:
      settings: how the data set is made, as in encode.json.

    Returns:
      Story, scene, frames, caption and path. With store 'moments' also 'moments', mean and
      log-variance of the VAE [T, h, w, 2C], and 'text' [M, E], both bfloat16; with store 'frames'
      also 'video', uint8 [F, H, W, 3].
    """
    tensor = functools.partial(tfds.features.Tensor, encoding=tfds.features.Encoding.BYTES)
    common = {
        'story': np.int64,
        'scene': np.int64,
        'frames': np.int64,
        'caption': tfds.features.Text(),
        'path': tfds.features.Text(),
    }

    if settings['store'] == 'frames':
        shape = (None, settings['height_px'], settings['width_px'], 3)
        return tfds.features.FeaturesDict(common | {'video': tensor(shape=shape, dtype=np.uint8)})

    encoded = {
        'moments': tensor(shape=(None, *settings['moments_shape']), dtype=ml_dtypes.bfloat16),
        'text': tensor(shape=tuple(settings['text_shape']), dtype=ml_dtypes.bfloat16),
    }
    return tfds.features.FeaturesDict(common | encoded)


def part_path(folder, settings: dict, part: int) -> pathlib.Path:
    """File of a part; it exists once the part is whole."""
    name = f'{settings["kind"]}-train.array_record-{part:05d}-of-{settings["parts"]:05d}'
    return pathlib.Path(folder) / name


def _index_path(folder, part: int) -> pathlib.Path:
    return pathlib.Path(folder) / f'index-{part:05d}.json'


def write_json(path: pathlib.Path, content) -> None:
    """Writes a JSON file that is there whole or not at all."""
    # Several hosts may write the same file: each has a temporary name of its own.
    temporary = path.with_name(f'{path.name}.{uuid.uuid4().hex}.tmp')
    temporary.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    os.replace(temporary, path)


def write_part(folder, settings: dict, part: int, examples, problems: list) -> Part:
    """Writes one part.

    Args:
      folder: folder of the data set.
      settings: how the data set is made.
      part: number of the part.
      examples: iterable of dicts with the keys of `features`.
      problems: problems of the part's clips; `examples` may append to this list until it ends.

    Returns:
      What was written.
    """
    final = part_path(folder, settings, part)
    temporary = final.with_name(f'{final.name}.{os.getpid()}.tmp')
    record_features = features(settings)
    serializer = example_serializer.ExampleSerializer(record_features.get_serialized_info())

    rows = []
    # Groups of one record, because batches read single clips at random.
    writer = array_record_module.ArrayRecordWriter(os.fspath(temporary), 'group_size:1')
    for example in examples:
        encoded = record_features.encode_example(example)
        writer.write(serializer.serialize_example(encoded))
        rows.append(Row(int(example['story']), int(example['scene']), int(example['frames'])))
    writer.close()

    # The index comes first, because a part counts as done once its records are there.
    index = {'rows': rows, 'problems': [dataclasses.asdict(p) for p in problems]}
    write_json(_index_path(folder, part), index)
    os.replace(temporary, final)
    return Part(rows, problems)


def read_part(folder, part: int) -> Part:
    """Reads the index that write_part wrote."""
    content = json.loads(_index_path(folder, part).read_text(encoding='utf-8'))
    rows = [Row(*row) for row in content['rows']]
    problems = [manifest.Problem(**problem) for problem in content['problems']]
    return Part(rows, problems)


def write_settings(folder, settings: dict) -> None:
    """Writes how a data set is made, or checks that it continues as it began.

    Raises:
      ValueError: if the folder was begun with other settings, naming them.
    """
    path = pathlib.Path(folder) / _SETTINGS
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_json(path, settings)
        return

    before = json.loads(path.read_text(encoding='utf-8'))
    # The model folder may be mounted elsewhere; the digests in the settings identify its networks.
    keys = (before | settings).keys() - {'folder'}
    changed = sorted(key for key in keys if before.get(key) != settings.get(key))
    if changed:
        raise ValueError(
            f'{folder} was begun with another {", ".join(changed)}: use the same to continue it, '
            'or another --out.'
        )


def read_settings(folder) -> dict:
    """How a data set was made.

    Raises:
      FileNotFoundError: if the folder is not a data set of clips.
    """
    paths.check_local(folder=folder)
    path = pathlib.Path(folder) / _SETTINGS
    if not path.is_file():
        raise FileNotFoundError(
            f'{folder} is not a data set of clips: make one with mask2dit_jax.encode.'
        )
    return json.loads(path.read_text(encoding='utf-8'))


def write_info(folder, settings: dict) -> list[Part] | None:
    """Makes a TFDS data set of the parts once all are there.

    Returns:
      All parts, or None if some are missing.
    """
    folder = pathlib.Path(folder)
    paths = [part_path(folder, settings, i) for i in range(settings['parts'])]
    if not all(path.exists() for path in paths):
        return None

    parts = [read_part(folder, i) for i in range(settings['parts'])]
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder,
        dataset_name=settings['kind'],
        split='train',
        filetype_suffix='array_record',
    )
    split = tfds.core.SplitInfo(
        name='train',
        shard_lengths=[len(part.rows) for part in parts],
        filename_template=template,
        num_bytes=sum(path.stat().st_size for path in paths),
    )
    identity = dataset_info.DatasetIdentity(
        name=settings['kind'],
        version=tfds.core.Version(_VERSION),
        data_dir=os.fspath(folder),
        module_name=__name__,
    )
    info = tfds.core.DatasetInfo(
        builder=identity, features=features(settings), description=json.dumps(settings)
    )
    info.set_file_format('array_record')
    info.set_splits(tfds.core.splits.SplitDict([split]))
    info.write_to_directory(os.fspath(folder))
    return parts


class Records:
    """Random access to a data set of clips.

    Attributes:
      folder: folder of the data set.
      settings: how the data set was made.
      rows: structured array [N] with the int64 columns 'story', 'scene' and 'frames' of the
        records.
      fingerprint: digest of settings and rows.
    """

    def __init__(self, folder):
        """Opens a finished data set.

        Raises:
          FileNotFoundError: if the folder is not a data set of clips.
          ValueError: if the data set is not finished or has lost a file.
        """
        folder = pathlib.Path(folder)
        self.folder = folder
        self.settings = read_settings(folder)

        num_parts = self.settings['parts']
        paths = [part_path(folder, self.settings, i) for i in range(num_parts)]
        missing = [path for path in paths if not path.exists()]
        if missing or not (folder / 'dataset_info.json').exists():
            raise ValueError(
                f'{folder} is not finished ({len(missing)} of {num_parts} parts are missing): run '
                'the same mask2dit_jax.encode command again.'
            )

        try:
            parts = [read_part(folder, i).rows for i in range(num_parts)]
            self.rows = np.array([row for rows in parts for row in rows], _ROW_DTYPE)
            self._source = tfds.builder_from_directory(os.fspath(folder)).as_data_source('train')
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{folder} is damaged ({error}): delete the file named and run mask2dit_jax.encode '
                'again.'
            ) from error
        if len(self._source) != len(self.rows):
            raise ValueError(
                f'{folder} holds {len(self._source)} records where its index has '
                f'{len(self.rows)}: delete it and run mask2dit_jax.encode again.'
            )

        self._part_ends = np.cumsum([len(rows) for rows in parts])
        # The model folder does not count: a data set may be read where that is mounted elsewhere.
        text = json.dumps([self.settings | {'folder': ''}, self.rows.tolist()])
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index) -> dict:
        """One record, a dict with the keys of `features`.

        Raises:
          ValueError: if ArrayRecord's checksums say that the record is damaged.
        """
        try:
            return self._source[int(index)]
        except RuntimeError as error:
            part = int(np.searchsorted(self._part_ends, index, 'right'))
            raise ValueError(
                f'{part_path(self.folder, self.settings, part)} is damaged ({error}): delete it, '
                'and run the same mask2dit_jax.encode command again.'
            ) from error
