"""Data sets of encoded clips: TFDS data sets of ArrayRecord files, written part by part.

TFDS's own builders write a data set in one run on one machine, and start from nothing after a kill.
Here every part is a file of its own, which any host may write, and which appears under its name
only when it is whole. The last step adds the files that make a TFDS data set of the parts, so that
`tfds.builder_from_directory(DIR).as_data_source('train')` reads it without this package. The last
of these is dataset_info.json: a folder without it is not finished, and whoever replaces a part
removes it first.

More files lie beside the records: encode.json says how they were made, index-*.json lists the
records and problems of a part, index.npy the records of all parts, and report.md is the summary for
people.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import resource
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_module
from tensorflow_datasets.core import dataset_info, example_serializer

from mask2dit_jax import paths, storage
from mask2dit_jax.data import manifest

STORES = ('moments', 'frames')
_SETTINGS = 'encode.json'
_INDEX = 'index.npy'
_INFO = 'dataset_info.json'
_REPORT = 'report.md'
_VERSION = '1.0.0'

_OPEN_PARTS = 256  # open files at most, of which each has buffers
_RETRY_SECONDS = (0.1, 1)  # before the second and the third try of what may pass
_ENCODE_AGAIN = 'delete it, and run the same mask2dit_jax.encode command again.'


class Row(NamedTuple):
    """The place of a record in its story, and its length in pixel frames."""

    story: int
    scene: int
    frames: int


# The same as columns of an array.
ROW_DTYPE = np.dtype([(name, np.int64) for name in Row._fields])


@dataclasses.dataclass(frozen=True)
class Part:
    """The result of encoding one part of the clips.

    Attributes:
      rows: structured array [N] with the fields of Row, one per record, in the order of the
        records.
      problems: the problems of the part's clips.
    """

    rows: np.ndarray
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


def _part_name(settings: dict, part: int) -> str:
    return f'{settings["kind"]}-train.array_record-{part:05d}-of-{settings["parts"]:05d}'


def part_path(folder, settings: dict, part: int) -> pathlib.Path:
    """File of a part; it exists once the part is whole."""
    return pathlib.Path(folder) / _part_name(settings, part)


def parts_there(folder, settings: dict) -> set[int]:
    """Numbers of the parts that are whole; one look at the folder, however many they are."""
    names = set(os.listdir(folder))
    return {part for part in range(settings['parts']) if _part_name(settings, part) in names}


def _index_path(folder, part: int) -> pathlib.Path:
    return pathlib.Path(folder) / f'index-{part:05d}.json'


def _read_json(path: pathlib.Path, advice: str = _ENCODE_AGAIN):
    """The content of a JSON file of a data set.

    Raises:
      ValueError: if it is not there or not JSON. An error of the system keeps its own words.
    """
    try:
        return json.loads(path.read_text(encoding='utf-8'))
    except (FileNotFoundError, ValueError) as error:
        raise ValueError(f'{path} is damaged ({error}): {advice}') from error


# Writing.


def write_part(
    folder,
    settings: dict,
    part: int,
    examples: Iterable[dict],
    problems: list,
    share: storage.Claim | None = None,
) -> Part:
    """Writes one part, in place of the one that may be there.

    Args:
      folder: folder of the data set.
      settings: how the data set is made.
      part: number of the part.
      examples: dicts with the keys of `features`.
      problems: problems of the part's clips; `examples` may append to this list until it ends.
      share: this process's claim of its parts, if others may claim them too.

    Returns:
      What was written.
    """
    final = part_path(folder, settings, part)
    with contextlib.ExitStack() as publication, storage.whole_file(final) as temporary:
        temporary.unlink(missing_ok=True)  # of a killed process, or of one that stands still
        rows = _write_records(temporary, settings, examples)

        # Whoever completes the data set meanwhile must see the part as it was or as it is.
        publication.enter_context(storage.claim(folder, waits=True))
        if share:
            share.check()
        (final.parent / _INFO).unlink(missing_ok=True)
        (final.parent / _REPORT).unlink(missing_ok=True)

        # A part counts as done once its records are there: its index comes before them, and its
        # old records go before its index.
        final.unlink(missing_ok=True)
        result = Part(rows, problems)
        _write_part_index(folder, part, result)
    return result


def _write_records(path: pathlib.Path, settings: dict, examples: Iterable[dict]) -> np.ndarray:
    """Writes an ArrayRecord file, and returns its rows."""
    record_features = features(settings)
    serializer = example_serializer.ExampleSerializer(record_features.get_serialized_info())

    rows = []
    # Groups of one record, because batches read single clips at random.
    writer = array_record_module.ArrayRecordWriter(os.fspath(path), 'group_size:1')
    for example in examples:
        encoded = record_features.encode_example(example)
        writer.write(serializer.serialize_example(encoded))
        rows.append(Row(int(example['story']), int(example['scene']), int(example['frames'])))
    writer.close()
    return np.array(rows, ROW_DTYPE)


def _write_part_index(folder, part: int, content: Part) -> None:
    index = {
        'rows': content.rows.tolist(),
        'problems': [dataclasses.asdict(problem) for problem in content.problems],
    }
    storage.write_text(_index_path(folder, part), json.dumps(index, indent=1) + '\n')


def replace_problems(
    folder, part: int, problems: list[manifest.Problem], share: storage.Claim
) -> None:
    """Writes other problems of a part, whose records stay as they are."""
    with storage.claim(folder, waits=True):
        share.check()
        rows = read_part(folder, part).rows
        _write_part_index(folder, part, Part(rows, problems))


def read_part(folder, part: int) -> Part:
    """Reads the index that write_part wrote.

    Raises:
      ValueError: if it is damaged or missing.
    """
    path = _index_path(folder, part)
    content = _read_json(path)
    try:
        rows = np.array(content['rows'], np.int64).reshape(-1, len(Row._fields))
        problems = [manifest.Problem(**problem) for problem in content['problems']]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{path} is damaged ({error!r}): {_ENCODE_AGAIN}') from error
    return Part(rows.view(ROW_DTYPE).reshape(-1), problems)


def write_settings(folder, settings: dict) -> None:
    """Writes how a data set is made, or checks that it continues as it began.

    Raises:
      ValueError: if the folder was begun with other settings, naming them.
    """
    path = pathlib.Path(folder) / _SETTINGS
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        if any(path.parent.glob('*.array_record-*')):
            raise ValueError(
                f'{folder} holds records, but no {_SETTINGS} that says how they were made: put '
                'it back, or use another --out.'
            )
        storage.write_text(path, json.dumps(settings, indent=1) + '\n')
        return

    before = read_settings(folder)
    # The model folder may be mounted elsewhere; the digests in the settings identify its networks.
    keys = (before | settings).keys() - {'folder'}
    changed = sorted(key for key in keys if before.get(key) != settings.get(key))
    if changed:
        values = [
            f'{key} was {before.get(key, "unknown")} and is {settings.get(key, "unknown")} now'
            for key in changed
        ]
        raise ValueError(
            f'{folder} was begun with another {", ".join(changed)}: use the same to continue it, '
            f'or another --out ({"; ".join(values)}).'
        )


def read_settings(folder) -> dict:
    """How a data set was made.

    Raises:
      FileNotFoundError: if the folder is not a data set of clips.
      ValueError: if encode.json is damaged.
    """
    paths.check_local(folder=folder)
    path = pathlib.Path(folder) / _SETTINGS
    if not path.is_file():
        raise FileNotFoundError(
            f'{folder} is not a data set of clips: make one with mask2dit_jax.encode.'
        )
    return _read_json(path, 'put back a copy of it, or encode into another folder.')


def write_info(folder, settings: dict) -> list[Part] | None:
    """Makes a TFDS data set of the parts once all are there.

    Returns:
      All parts, or None if some are missing.
    """
    folder = pathlib.Path(folder)
    if len(parts_there(folder, settings)) < settings['parts']:
        return None

    parts = [read_part(folder, i) for i in range(settings['parts'])]
    rows = np.concatenate([part.rows for part in parts])
    write_index(folder, settings, rows, [len(part.rows) for part in parts])
    return parts


def write_index(folder, settings: dict, rows: np.ndarray, part_lengths: list[int]) -> None:
    """Writes what makes a data set of parts: index.npy, and TFDS's two files.

    Args:
      folder: folder of the data set.
      settings: how the data set is made.
      rows: the rows of all parts.
      part_lengths: the number of records in each part.
    """
    folder = pathlib.Path(folder)
    with storage.whole_file(folder / _INDEX) as temporary, temporary.open('wb') as file:
        np.save(file, rows)

    paths = [part_path(folder, settings, i) for i in range(settings['parts'])]
    template = tfds.core.ShardedFileTemplate(
        data_dir=folder,
        dataset_name=settings['kind'],
        split='train',
        filetype_suffix='array_record',
    )
    split = tfds.core.SplitInfo(
        name='train',
        shard_lengths=part_lengths,
        filename_template=template,
        num_bytes=sum(path.stat().st_size for path in paths),
    )
    identity = dataset_info.DatasetIdentity(
        name=settings['kind'],
        version=tfds.core.Version(_VERSION),
        data_dir=os.fspath(folder),
        module_name=__name__,
    )
    description = settings | {'index': _digest_of_rows(rows)}
    info = tfds.core.DatasetInfo(
        builder=identity, features=features(settings), description=json.dumps(description)
    )
    info.set_file_format('array_record')
    info.set_splits(tfds.core.splits.SplitDict([split]))

    # TFDS writes its files piece by piece, and dataset_info.json is what says that all is whole.
    temporary = folder / 'info.unfinished'
    temporary.mkdir(exist_ok=True)
    info.write_to_directory(os.fspath(temporary))
    for path in sorted(temporary.iterdir(), key=lambda path: path.name == _INFO):
        path.replace(folder / path.name)
    temporary.rmdir()


def _digest_of_rows(rows: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows).view(np.uint8)).hexdigest()


# Reading.


def _open_part(path: str, num_records: int) -> array_record_module.ArrayRecordReader:
    """Opens a part.

    Raises:
      RuntimeError: with the words of ArrayRecord, to which every file that it cannot open or
        understand has no records.
    """
    reader = array_record_module.ArrayRecordReader(
        path, options='readahead_buffer_size:0', file_reader_buffer_size=32768
    )
    if not reader.ok():
        reader.read([0])  # raises
    if reader.num_records() != num_records:
        raise RuntimeError(f'it has {reader.num_records()} records, its index {num_records}')
    return reader


class _Parts:
    """Reads single records; a bounded number of files is open."""

    def __init__(self):
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        num_open = min(_OPEN_PARTS, soft // 4) if soft > 0 else _OPEN_PARTS
        # What falls out is closed as soon as nobody reads from it.
        self._open = functools.lru_cache(max(1, num_open))(_open_part)

    def read(self, path: pathlib.Path, num_records: int, position: int) -> bytes:
        """One record of a part that has `num_records`.

        Raises:
          OSError: if the system does not let us read, after some tries.
          ValueError: if the part is damaged.
        """
        for seconds in (*_RETRY_SECONDS, None):
            try:
                return self._open(os.fspath(path), num_records).read([position])[0]
            except RuntimeError as error:
                failure = error

            # Closes all, since they may be what is too many, or be spoilt.
            self._open.cache_clear()
            if '() failed: ' not in str(failure):  # how ArrayRecord words the errors of the system
                raise ValueError(f'{path} is damaged ({failure}): {_ENCODE_AGAIN}') from failure
            if seconds is not None:
                time.sleep(seconds)
        raise OSError(f'{path} cannot be read: {failure}') from failure


def read_records(folder, settings: dict, part: int) -> Iterator[dict]:
    """The records of one part, dicts with the keys of `features`."""
    parts = _Parts()
    record_features = features(settings)
    num_records = len(read_part(folder, part).rows)
    for position in range(num_records):
        record = parts.read(part_path(folder, settings, part), num_records, position)
        yield record_features.deserialize_example_np(record)


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
          ValueError: if the data set is not finished, is empty or has lost a file.
        """
        folder = pathlib.Path(folder)
        self.folder = folder
        self.settings = read_settings(folder)

        num_parts = self.settings['parts']
        num_missing = num_parts - len(parts_there(folder, self.settings))
        if num_missing or not (folder / _INFO).exists():
            raise ValueError(
                f'{folder} is not finished ({num_missing} of {num_parts} parts are missing): run '
                'the same mask2dit_jax.encode command again.'
            )

        info_path = folder / _INFO
        info = _read_json(info_path)
        try:
            lengths = np.array(info['splits'][0]['shardLengths'], np.int64)
            digest = json.loads(info['description']).get('index')
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(f'{info_path} is damaged ({error!r}): {_ENCODE_AGAIN}') from error

        if digest is None:
            self.rows, self.fingerprint = self._read_old_index()
        else:
            self.rows, self.fingerprint = self._read_index(digest)
        if lengths.sum() != len(self.rows):
            raise ValueError(
                f'{folder} holds {lengths.sum()} records where its index has {len(self.rows)}: '
                'delete it and run mask2dit_jax.encode again.'
            )
        if not len(self.rows):
            raise ValueError(f'{folder} is empty: see {_REPORT} there.')

        self._features = features(self.settings)
        self._part_starts = np.concatenate([[0], np.cumsum(lengths)])
        self._parts = _Parts()

    def _read_index(self, digest: str) -> tuple[np.ndarray, str]:
        """Rows and fingerprint; `digest` is that of the rows."""
        path = self.folder / _INDEX
        try:
            rows = np.load(path, mmap_mode='r')  # processes of a host share its memory
            found = _digest_of_rows(rows)
        except (FileNotFoundError, ValueError, EOFError) as error:
            raise ValueError(f'{path} is damaged ({error}): {_ENCODE_AGAIN}') from error
        if found != digest or rows.dtype != ROW_DTYPE:
            raise ValueError(f'{path} is damaged (checksum): {_ENCODE_AGAIN}')

        identity = self._identity() + digest
        return rows, hashlib.sha256(identity.encode()).hexdigest()

    def _read_old_index(self) -> tuple[np.ndarray, str]:
        """Rows and fingerprint of a data set that is older than index.npy.

        Runs that were trained on it know it by this fingerprint.
        """
        num_parts = self.settings['parts']
        rows = np.concatenate([read_part(self.folder, i).rows for i in range(num_parts)])

        # json.dumps([settings, rows]), piece by piece.
        digest = hashlib.sha256(f'[{self._identity()}, ['.encode())
        for first in range(0, len(rows), 65536):
            text = json.dumps(rows[first : first + 65536].tolist())[1:-1]
            digest.update((', ' * bool(first) + text).encode())
        digest.update(b']]')
        return rows, digest.hexdigest()

    def _identity(self) -> str:
        # The model folder does not count: a data set may be read where that is mounted elsewhere.
        return json.dumps(self.settings | {'folder': ''})

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index) -> dict:
        """One record, a dict with the keys of `features`.

        Raises:
          OSError: if the system does not let us read it.
          ValueError: if ArrayRecord's checksums say that the record is damaged, or it is not the
            one that the index has here.
        """
        part = int(np.searchsorted(self._part_starts, index, 'right')) - 1
        first, end = (int(start) for start in self._part_starts[part : part + 2])
        path = part_path(self.folder, self.settings, part)
        content = self._parts.read(path, end - first, int(index) - first)
        record = self._features.deserialize_example_np(content)

        found = tuple(int(record[name]) for name in Row._fields)
        if found != self.rows[index].item():
            raise ValueError(
                f'{path} holds another record than the index of {self.folder}: if encode has '
                'written to it meanwhile, start again.'
            )
        return record
