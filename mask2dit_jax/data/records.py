"""Data sets of encoded clips: TFDS data sets of ArrayRecord files, written part by part.

TFDS's own builders write a data set in one go on one machine, and start over when killed. Here
every part is a file of its own, by any host, and appears under its name only when it is whole; the
last step adds what makes a TFDS data set of them, so that
`tfds.builder_from_directory(DIR).as_data_source('train')` reads it without this package.

Beside the records lie encode.json (how they were made), an index of each part with its problems,
and report.md.
"""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import uuid

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import dataset_info, example_serializer

from mask2dit_jax.data import manifest

STORES = ('moments', 'frames')
_SETTINGS = 'encode.json'
_VERSION = '1.0.0'


@dataclasses.dataclass(frozen=True)
class Part:
    """What became of a part of the clips.

    Attributes:
      rows: story, scene, and frames of each record, in their order.
      problems: those of its clips.
    """

    rows: list[tuple[int, int, int]]
    problems: list[manifest.Problem]


def features(settings: dict) -> tfds.features.FeaturesDict:
    """Of one clip: with store 'moments', mean and log-variance of the VAE [T, h, w, 2C] and text
    [M, E], both bfloat16; with 'frames', video uint8 [F, H, W, 3]."""
    tensor = functools.partial(tfds.features.Tensor, encoding=tfds.features.Encoding.BYTES)
    known = {
        'story': np.int64,
        'scene': np.int64,
        'frames': np.int64,
        'caption': tfds.features.Text(),
        'path': tfds.features.Text(),
    }
    if settings['store'] == 'frames':
        size = settings['height_px'], settings['width_px']
        return tfds.features.FeaturesDict(
            known | {'video': tensor(shape=(None, *size, 3), dtype=np.uint8)}
        )
    return tfds.features.FeaturesDict(
        known
        | {
            'moments': tensor(shape=(None, *settings['moments_shape']), dtype=ml_dtypes.bfloat16),
            'text': tensor(shape=tuple(settings['text_shape']), dtype=ml_dtypes.bfloat16),
        }
    )


def part_path(folder, settings: dict, part: int) -> pathlib.Path:
    """File of a part; it exists once the part is whole."""
    name = f'{settings["kind"]}-train.array_record-{part:05d}-of-{settings["parts"]:05d}'
    return pathlib.Path(folder) / name


def _index_path(folder, part: int) -> pathlib.Path:
    return pathlib.Path(folder) / f'index-{part:05d}.json'


def write_json(path: pathlib.Path, content) -> None:
    """Writes a file that is there whole or not at all."""
    temporary = path.with_name(
        f'{path.name}.{uuid.uuid4().hex}.tmp'
    )  # hosts may write the same file
    temporary.write_text(json.dumps(content, indent=1) + '\n', encoding='utf-8')
    os.replace(temporary, path)


def write_part(folder, settings: dict, part: int, examples, problems: list) -> Part:
    """Writes one part; `examples` are dicts of features' keys, from an iterable that may append to
    `problems`."""
    final, described = part_path(folder, settings, part), features(settings)
    serializer = example_serializer.ExampleSerializer(described.get_serialized_info())
    temporary = final.with_name(f'{final.name}.{os.getpid()}.tmp')
    rows = []
    # One record a group: batches read single clips at random.
    writer = array_record_module.ArrayRecordWriter(os.fspath(temporary), 'group_size:1')
    for example in examples:
        writer.write(serializer.serialize_example(described.encode_example(example)))
        rows.append((int(example['story']), int(example['scene']), int(example['frames'])))
    writer.close()
    # The index first: a part is done when its records are there.
    write_json(
        _index_path(folder, part),
        {'rows': rows, 'problems': [dataclasses.asdict(p) for p in problems]},
    )
    os.replace(temporary, final)
    return Part(rows, problems)


def read_part(folder, part: int) -> Part:
    """What write_part wrote."""
    content = json.loads(_index_path(folder, part).read_text(encoding='utf-8'))
    return Part(
        [tuple(r) for r in content['rows']], [manifest.Problem(**p) for p in content['problems']]
    )


def write_settings(folder, settings: dict) -> None:
    """Writes how a data set is made, or checks that it goes on as it began.

    Raises:
      ValueError: if the folder was begun with other settings, naming them.
    """
    path = pathlib.Path(folder) / _SETTINGS
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        before = json.loads(path.read_text(encoding='utf-8'))
        changed = sorted(
            k for k in before | settings if k != 'folder' and before.get(k) != settings.get(k)
        )
        if changed:
            raise ValueError(
                f'{folder} was begun with another {", ".join(changed)}: use the same to go on with it, or '
                'another --out.'
            )
    else:
        write_json(path, settings)


def read_settings(folder) -> dict:
    """How a data set was made.

    Raises:
      FileNotFoundError: if the folder holds none.
    """
    path = pathlib.Path(folder) / _SETTINGS
    if not path.is_file():
        raise FileNotFoundError(
            f'{folder} is no data set of clips: make one with mask2dit_jax.encode.'
        )
    return json.loads(path.read_text(encoding='utf-8'))


def write_info(folder, settings: dict) -> list[Part] | None:
    """Makes a TFDS data set of the parts once all are there.

    Returns:
      All parts, or None if some are missing.
    """
    folder, numbers = pathlib.Path(folder), range(settings['parts'])
    if not all(part_path(folder, settings, i).exists() for i in numbers):
        return None
    parts = [read_part(folder, i) for i in numbers]
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder,
        dataset_name=settings['kind'],
        split='train',
        filetype_suffix='array_record',
    )
    split = tfds.core.SplitInfo(
        name='train',
        shard_lengths=[len(p.rows) for p in parts],
        filename_template=template,
        num_bytes=sum(part_path(folder, settings, i).stat().st_size for i in numbers),
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
      settings: how it was made.
      rows: int [N, 3], story, scene and frames of each record.
      fingerprint: of settings and rows.
    """

    def __init__(self, folder):
        """Opens a finished data set.

        Raises:
          FileNotFoundError, ValueError: if it is none, is not finished or has lost a file.
        """
        folder = pathlib.Path(folder)
        self.settings = read_settings(folder)
        numbers = range(self.settings['parts'])
        missing = [
            p.name for i in numbers for p in [part_path(folder, self.settings, i)] if not p.exists()
        ]
        if missing or not (folder / 'dataset_info.json').exists():
            raise ValueError(
                f'{folder} is not finished ({len(missing)} of {len(numbers)} parts are missing): run the '
                'same mask2dit_jax.encode command again.'
            )
        try:
            parts = [read_part(folder, i).rows for i in numbers]
            self.rows = np.array([r for rows in parts for r in rows], np.int64).reshape(-1, 3)
            self._ends = np.cumsum([len(rows) for rows in parts])
            self._source = tfds.builder_from_directory(os.fspath(folder)).as_data_source('train')
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{folder} is damaged ({error}): delete the file named and run mask2dit_jax.encode '
                'again.'
            ) from error
        if len(self._source) != len(self.rows):
            raise ValueError(
                f'{folder} holds {len(self._source)} records where its index has {len(self.rows)}: delete '
                'it and run mask2dit_jax.encode again.'
            )
        text = json.dumps([self.settings | {'folder': ''}, self.rows.tolist()])
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()
        self.folder = folder

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index) -> dict:
        """One record, as `features` has it.

        Raises:
          ValueError: if it is damaged, by ArrayRecord's checksums.
        """
        try:
            return self._source[int(index)]
        except RuntimeError as error:
            part = int(np.searchsorted(self._ends, index, 'right'))
            raise ValueError(
                f'{part_path(self.folder, self.settings, part)} is damaged ({error}): delete it, and run '
                'the same mask2dit_jax.encode command again.'
            ) from error
