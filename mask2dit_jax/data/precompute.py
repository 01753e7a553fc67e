"""Encodes clips of videos and their captions once, into a data set that training reads.

clips.py cuts the clips out of the videos that the manifest lists.

The data set holds the moments (mean and log-variance) of the VAE and the states of the text
encoder, so that neither network is needed during training. It may hold the frames instead.
"""

import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import heapq
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import grain
import jax
import ml_dtypes
import numpy as np
import tqdm
from absl import logging
from safetensors.numpy import load_file

from mask2dit_jax import paths, storage, tables, tensor_io
from mask2dit_jax.data import clips, latent_codec, records
from mask2dit_jax.data import manifest as manifest_lib
from mask2dit_jax.models import dit, t5, vae
from mask2dit_jax.pretrained import config_json
from mask2dit_jax.pretrained import load as load_lib

_CAPTIONS_AT_ONCE = 8
_PART_BYTES = 2e9  # a part at most, where --part_clips does not say
_MIN_PARTS = 64  # so that many workers share a small data set, too
NULL_TEXT = 'null_text.safetensors'  # of the empty caption, for classifier-free guidance


@dataclasses.dataclass(frozen=True)
class Job:
    """What to make.

    Attributes:
      manifest: the list of videos and captions.
      root: folder that the videos are relative to, or None for the manifest's own.
      folder: model folder with the VAE and the text encoder; None if frames are stored.
      frames: frames of a clip, where the manifest does not say.
      height_px, width_px: size of a clip.
      stride: largest distance between neighbouring frames of a clip, in frames of the video.
      windows: number of clips that are cut from every video, each from another start.
      seed: seed of the random starts.
      store: what is stored, one of records.STORES.
      tiling: whether the VAE codes overlapping tiles; see vae.encode.
      dtype: dtype in which the text encoder computes; the VAE always computes in float32.
      part_clips: number of clips in a part; None for parts of about 2 GB, but at least 64 of them.
    """

    manifest: str
    root: str | None
    folder: str | None
    frames: int
    height_px: int
    width_px: int
    stride: int = 3
    windows: int = 1
    seed: int = 0
    store: str = 'moments'
    tiling: bool = False
    dtype: str = 'bfloat16'
    part_clips: int | None = None


class Window(NamedTuple):
    """A clip of the manifest, cut for the `window`-th time."""

    clip: manifest_lib.Clip
    window: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """A job, checked.

    Attributes:
      settings: how the data set is made; they are written beside it, and a job that continues must
        have the same.
      windows: everything that is to be cut, in the order of the records.
      problems: the problems of the manifest's rows.
      check_frames: raises ValueError for a number of frames that cannot be coded.
    """

    settings: dict
    windows: list[Window]
    problems: list[manifest_lib.Problem]
    check_frames: Callable[[int], int]

    def part(self, number: int) -> list[Window]:
        """What is to be cut for a part."""
        part_clips = self.settings['part_clips']
        return self.windows[number * part_clips : (number + 1) * part_clips]


def plan(job: Job) -> Plan:
    """Checks a job and lists what it is to make, without reading a video.

    Raises:
      FileNotFoundError, ValueError: naming what is missing or does not fit.
    """
    manifest = manifest_lib.read(job.manifest, job.root)

    # The scenes of one story lie together, so that training can read them as a window of records.
    windows = [Window(clip, i) for clip in manifest.clips for i in range(job.windows)]
    windows.sort(key=lambda item: (item.clip.story, item.window))

    root = job.root or pathlib.Path(job.manifest).parent
    settings = {
        'kind': manifest.kind,
        'root': os.path.abspath(root),
        'store': job.store,
        'stride': job.stride,
        'windows': job.windows,
        'frames': job.frames,
        'height_px': job.height_px,
        'width_px': job.width_px,
        'seed': job.seed,
        'manifest': hashlib.sha256(pathlib.Path(job.manifest).read_bytes()).hexdigest(),
    }
    clip_bytes = job.frames * job.height_px * job.width_px * 3
    check_frames = int  # any number of frames can be stored as they are
    if job.store == 'moments':
        folder = pathlib.Path(job.folder)
        model = config_json.read_config('transformer', folder / 'transformer', dtype=job.dtype)
        size_px = (job.height_px, job.width_px)
        codec = latent_codec.PretrainedCodec(folder, model, size_px, tiling=job.tiling)
        check_frames = codec.scene_latents
        num_latents = check_frames(job.frames)
        settings |= _network_settings(job, model, codec.latent_shape)
        moments_shape = (num_latents, *settings['moments_shape'])
        clip_bytes = 2 * (math.prod(moments_shape) + math.prod(settings['text_shape']))  # bfloat16
    part_clips = job.part_clips or _default_part_clips(len(windows), clip_bytes)
    settings['part_clips'] = part_clips
    settings['parts'] = -(-len(windows) // part_clips)
    return Plan(settings, windows, manifest.problems, check_frames)


def _default_part_clips(num_clips: int, clip_bytes: int) -> int:
    """As many clips as _PART_BYTES hold, but few enough for _MIN_PARTS parts."""
    return max(1, min(int(_PART_BYTES / clip_bytes), -(-num_clips // _MIN_PARTS)))


def _network_settings(job: Job, model: dit.DiTConfig, latent_shape: tuple[int, int, int]) -> dict:
    """Settings that depend on the model folder."""
    folder = pathlib.Path(job.folder)
    height, width, channels = latent_shape
    return {
        'tiling': job.tiling,
        'dtype': job.dtype,
        'moments_shape': [height, width, 2 * channels],
        'text_shape': [model.max_text_seq_length, model.text_embed_dim],
        'scaling_factor': config_json.read_config('vae', folder / 'vae').scaling_factor,
        'folder': str(folder.absolute()),
        'vae': latent_codec.network_digest(folder / 'vae'),
        'text_encoder': latent_codec.network_digest(folder / 'text_encoder'),
        'vae_weights': _files_digest(folder / 'vae', '*.safetensors'),
        'text_encoder_weights': _files_digest(folder / 'text_encoder', '*.safetensors'),
        'tokenizer': _files_digest(folder / 'tokenizer', '*'),
    }


def _files_digest(folder: pathlib.Path, pattern: str) -> str:
    """Digest of the names and the content of files, which takes as long as reading them."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob(pattern)):
        digest.update(f'{path.name} {path.stat().st_size} '.encode())
        with path.open('rb') as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()[:16]


def encode_text(job: Job, out: pathlib.Path, parts: dict[int, list[Window]]) -> None:
    """Encodes the captions of these parts, into one file per part.

    The text encoder is in memory only during this call; the files last until their parts are
    written.

    Args:
      job: the job.
      out: folder of the data set.
      parts: the windows of each part that are to be encoded.
    """
    missing = [part for part in parts if not _text_path(out, part, parts[part]).exists()]
    if not missing and (out / NULL_TEXT).exists():
        return

    folder = pathlib.Path(job.folder)
    model = config_json.read_config('transformer', folder / 'transformer')
    network, params = load_lib.load_t5(
        folder / 'text_encoder', param_dtype=job.dtype, dtype=job.dtype
    )
    tokenize = t5.load_tokenizer(folder / 'tokenizer')

    def encode(captions: list[str]) -> np.ndarray:
        """Text states bfloat16 [N, M, E]."""
        known = {}  # states by caption, since captions repeat
        distinct = list(dict.fromkeys(captions))
        for first in range(0, len(distinct), _CAPTIONS_AT_ONCE):
            some = distinct[first : first + _CAPTIONS_AT_ONCE]
            # Every call has the same shape, so that the network is compiled once.
            padded = some + [''] * (_CAPTIONS_AT_ONCE - len(some))
            ids = tokenize(padded, model.max_text_seq_length)
            states = t5.encode(network.cfg, params, ids)
            known.update(zip(some, np.asarray(states, ml_dtypes.bfloat16)))
        return np.stack([known[caption] for caption in captions])

    if not (out / NULL_TEXT).exists():
        null_text = encode([''])[0]
        with storage.claim(out, waits=True):  # other workers write the same file
            _save_text(out / NULL_TEXT, null_text)
    for part in tqdm.tqdm(missing, desc='captions', unit='part'):
        captions = [item.clip.caption for item in parts[part]]
        _save_text(_text_path(out, part, parts[part]), encode(captions))


def _text_path(out: pathlib.Path, part: int, windows: list[Window]) -> pathlib.Path:
    # Named by the captions too: what a kill leaves may be for other clips of the part.
    captions = [item.clip.caption for item in windows]
    digest = hashlib.sha256(repr(captions).encode()).hexdigest()[:16]
    return out / f'text-{part:05d}-{digest}.safetensors'


def _save_text(path: pathlib.Path, text: np.ndarray) -> None:
    """Writes text states to a file that is there whole or not at all."""
    tensor_io.write_file(path, {'text': text})


def video_encoder(folder, tiling: bool) -> tuple[Callable[[np.ndarray], np.ndarray], int]:
    """Loads the VAE onto all devices of this host.

    Args:
      folder: the model folder.
      tiling: see vae.encode.

    Returns:
      A function of clips uint8 [B, F, H, W, 3] to moments bfloat16 [B, T, h, w, 2C]; and the
      largest B that it takes, one clip per device.
    """
    model, params = load_lib.load_vae(pathlib.Path(folder) / 'vae', dtype='float32')

    devices = jax.local_devices()
    mesh = jax.sharding.Mesh(np.array(devices), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    one_clip_each = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = jax.device_put(params, replicated)

    def encode(clips: np.ndarray) -> np.ndarray:
        # Fewer clips are filled up by repetition: one shape is compiled once.
        rows = np.resize(np.arange(len(clips)), len(devices))
        pixels = clips[rows].astype(np.float32) / 127.5 - 1  # [B, F, H, W, 3] in -1...1
        posterior = vae.encode(model.cfg, params, jax.device_put(pixels, one_clip_each), tiling)
        moments = np.concatenate(posterior, axis=-1)  # [B, T, h, w, 2C]
        return moments[: len(clips)].astype(ml_dtypes.bfloat16)

    return encode, len(devices)


class Cut(NamedTuple):
    """Frames of a clip, uint8 [F, H, W, 3], and the clip's position in its part."""

    position: int
    frames: np.ndarray


def in_batches(cuts: Iterable[Cut], size: int) -> Iterator[list[Cut]]:
    """Lists of up to `size` neighbours that have the same number of frames."""
    batch = []
    for item in cuts:
        if batch and (len(batch) == size or len(item.frames) != len(batch[0].frames)):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def precompute(job: Job, out, worker: int = 0, num_workers: int = 1, threads: int = 4) -> bool:
    """Makes a data set, or this worker's share of it; continues where it was stopped.

    Clips that could not be used before are looked at again.

    Args:
      job: what to make.
      out: folder of the data set.
      worker: number of this worker, from 0.
      num_workers: number of workers that share the parts.
      threads: number of threads that read videos ahead.

    Returns:
      Whether the data set is complete.

    Raises:
      FileNotFoundError, ValueError: naming what is missing or does not fit, before anything is
        read.
      storage.ClaimedError: if another process has this share, or one with another num_workers has
        any.
    """
    paths.check_local(out=out, folder=job.folder)
    out = pathlib.Path(out)
    planned = plan(job)
    with _claimed_share(out, planned.settings, worker, num_workers) as share:
        # Worker w takes every num_workers-th part, and leaves out those that are there already.
        mine = range(worker, planned.settings['parts'], num_workers)
        todo = _work_of(job, out, planned, mine, threads, share)
        logging.info(
            '%d clips in %d parts; this worker has %d parts, and %d of them are to do.',
            len(planned.windows),
            planned.settings['parts'],
            len(mine),
            len(todo),
        )
        if job.store == 'moments':
            encode_text(job, out, todo)
        if todo:
            _encode_parts(job, out, planned, todo, threads, share)
        _remove_leftovers(out, worker, num_workers)

        with storage.claim(out, waits=True):
            parts = records.write_info(out, planned.settings)
            if parts is None:
                logging.info('This worker is done; the last one to finish completes %s.', out)
                return False
            problems = planned.problems + [problem for part in parts for problem in part.problems]
            frames = np.concatenate([part.rows['frames'] for part in parts])
            text = report(planned.settings, len(planned.windows), frames, problems)
            storage.write_text(out / 'report.md', text)
            return True


@contextlib.contextmanager
def _claimed_share(
    out: pathlib.Path, settings: dict, worker: int, num_workers: int
) -> Iterator[storage.Claim]:
    """Begins or continues a data set, and makes this process the only one with its share.

    The data set itself is claimed only for moments, in which workers wait for each other.
    """
    shares = out / 'workers'
    mine = shares / f'{worker}-of-{num_workers}'

    def remove_folders() -> None:
        with storage.claim(out, waits=True), contextlib.suppress(OSError):
            mine.rmdir()
            shares.rmdir()  # not empty while others work

    with contextlib.ExitStack() as stack:
        with storage.claim(out, waits=True):
            records.write_settings(out, settings)

            # Shares of another number of workers have parts in common with this one.
            others = set(shares.glob('*-of-*')) - set(shares.glob(f'*-of-{num_workers}'))
            with concurrent.futures.ThreadPoolExecutor(len(others) + 1) as pool:
                list(pool.map(_remove_dead_share, others))

            stack.callback(remove_folders)
            share = stack.enter_context(storage.claim(mine))
        yield share


def _remove_dead_share(path: pathlib.Path) -> None:
    """Removes a share that a killed process left behind.

    Raises:
      storage.ClaimedError: if its process lives.
    """
    with storage.claim(path):
        pass
    path.rmdir()


def _work_of(
    job: Job,
    out: pathlib.Path,
    planned: Plan,
    mine: Iterable[int],
    threads: int,
    share: storage.Claim,
) -> dict[int, list[Window]]:
    """The clips that are to be encoded, by part.

    They are all clips of the parts that are missing. Of a part that is there they are the clips of
    which a window has no record, if one of these windows can be used now.
    """
    there = records.parts_there(out, planned.settings)

    todo = {}
    for part in mine:
        windows = planned.part(part)
        if part not in there:
            todo[part] = windows
            continue

        try:
            before = records.read_part(out, part)
        except ValueError as error:
            logging.warning('%s The part is encoded anew.', error)
            todo[part] = windows
            continue

        used = {(row['story'], row['scene']) for row in before.rows}
        failed = {item.clip.where for item in windows if _place(job, item) not in used}
        again = [item for item in windows if item.clip.where in failed]
        usable, found = _look_again(job, planned, again, threads)
        problems = _kept_problems(before, again) + found
        if {_place(job, item) for item in usable} - used:
            todo[part] = again
        elif set(problems) != set(before.problems):
            records.replace_problems(out, part, problems, share)
    return todo


def _place(job: Job, item: Window) -> tuple[int, int]:
    """Story and scene of a record; every window makes a story of its own."""
    return item.clip.story * job.windows + item.window, item.clip.scene


def _look_again(
    job: Job, planned: Plan, windows: list[Window], threads: int
) -> tuple[list[Window], list[manifest_lib.Problem]]:
    """Those of some windows that can be used now, and the problems of all."""
    kind = planned.settings['kind']
    usable, problems = [], []

    def cut(item: Window):
        frames, found = clips.cut(item.clip, item.window, job, kind, planned.check_frames)
        return frames is not None, found

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for item, (is_usable, found) in zip(windows, pool.map(cut, windows)):
            problems += found
            if is_usable:
                usable.append(item)
    return usable, problems


def _kept_problems(part: records.Part, again: list[Window]) -> list[manifest_lib.Problem]:
    """The problems of the clips of a part that are not encoded again."""
    places = {item.clip.where for item in again}
    return [problem for problem in part.problems if problem.where not in places]


def _encode_parts(
    job: Job,
    out: pathlib.Path,
    planned: Plan,
    todo: dict[int, list[Window]],
    threads: int,
    share: storage.Claim,
) -> None:
    """Reads, encodes and writes parts, one after another."""
    kind = planned.settings['kind']
    encode, batch_size = None, 1
    if job.store == 'moments':
        encode, batch_size = video_encoder(job.folder, job.tiling)

    # Threads read ahead, over the borders of parts. The order of the clips is kept.
    windows = [item for part in todo.values() for item in part]
    dataset = grain.MapDataset.source(windows).map(
        lambda item: clips.cut(item.clip, item.window, job, kind, planned.check_frames)
    )
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    results = iter(dataset.to_iter_dataset(options))
    bar = tqdm.tqdm(total=len(windows), desc='clips', unit='clip')

    def usable_cuts(count: int, problems: list) -> Iterator[Cut]:
        """The next `count` clips, without those that cannot be used; appends to `problems`."""
        for position in range(count):
            frames, found = next(results)
            problems.extend(found)
            bar.update()
            if frames is not None:
                yield Cut(position, frames)

    def examples(part: int, problems: list) -> Iterator[dict]:
        """New records of a part."""
        cuts = usable_cuts(len(todo[part]), problems)
        if job.store == 'frames':
            for item in cuts:
                yield _example(job, todo[part], item, {'video': item.frames})
            return

        text = load_file(_text_path(out, part, todo[part]))['text']  # [clips of the part, M, E]
        for batch in in_batches(cuts, batch_size):
            moments = encode(np.stack([item.frames for item in batch]))
            for item, own_moments in zip(batch, moments):
                content = {'moments': own_moments, 'text': text[item.position]}
                yield _example(job, todo[part], item, content)

    there = records.parts_there(out, planned.settings)
    for part in todo:
        problems = []  # filled while the examples are written
        new = examples(part, problems)
        if part in there and len(todo[part]) < len(planned.part(part)):
            problems += _kept_problems(records.read_part(out, part), todo[part])
            kept = _kept_records(job, out, planned.settings, part, todo[part])
            new = heapq.merge(kept, new, key=_order)
        records.write_part(out, planned.settings, part, new, problems, share)
        if job.store == 'moments':
            _text_path(out, part, todo[part]).unlink()
    bar.close()


def _kept_records(
    job: Job, out: pathlib.Path, settings: dict, part: int, again: list[Window]
) -> Iterator[dict]:
    """The records of a part, without those of the clips that are encoded again."""
    places = {_place(job, item) for item in again}
    for record in records.read_records(out, settings, part):
        if _order(record) not in places:
            yield record


def _remove_leftovers(out: pathlib.Path, worker: int, num_workers: int) -> None:
    """Removes what killed processes left of this worker's parts."""
    pattern = re.compile(r'text-(\d+)-.*|.*\.array_record-(\d+)-of-\d+\.unfinished')
    for path in out.iterdir():
        found = pattern.fullmatch(path.name)
        if found and int(found[1] or found[2]) % num_workers == worker:
            path.unlink()


def _order(example: dict) -> tuple[int, int]:
    return int(example['story']), int(example['scene'])


def _example(job: Job, windows: list[Window], item: Cut, content: dict) -> dict:
    """One record with the keys of records.features."""
    clip = windows[item.position].clip
    story, scene = _place(job, windows[item.position])
    return {
        'story': story,
        'scene': scene,
        'frames': len(item.frames),
        'caption': clip.caption,
        'path': str(clip.path),
        **content,
    }


def report(
    settings: dict,
    listed: int,
    frames: np.ndarray,
    problems: list[manifest_lib.Problem],
) -> str:
    """Text of report.md: what is in a data set, and everything that was wrong.

    Args:
      settings: how the data set was made.
      listed: number of clips that were to be made.
      frames: the number of frames of each record.
      problems: those of the manifest's rows and of the clips.
    """
    counts = zip(*np.unique(frames, return_counts=True))
    per_length = ', '.join(f'{length} ({count} clips)' for length, count in counts)
    malformed = sum(problem.kind == 'malformed row' for problem in problems)
    lines = [
        f'# {settings["kind"]}',
        '',
        f'{len(frames)} of {listed} clips are in the data set; {listed - len(frames)} are not, and '
        f'{malformed} rows of the manifest are malformed. '
        f'Frames per clip: {per_length or "none"}.',
        '',
    ]
    if problems:
        lines += [_summary_table(problems), '', _problem_table(problems), '']
    return '\n'.join(lines)


def _summary_table(problems: list[manifest_lib.Problem]) -> str:
    """Number of problems by kind."""
    counts = collections.Counter((problem.kind, problem.used) for problem in problems)
    rows = [
        {'what': kind, 'clips': count, 'in the data set': 'yes' if used else 'NO'}
        for (kind, used), count in sorted(counts.items())
    ]
    return tables.format_table(rows, ('what', 'clips', 'in the data set'))


def _problem_table(problems: list[manifest_lib.Problem]) -> str:
    """All problems, those that cost a clip first."""
    rows = [
        {
            'kind': problem.kind,
            'in': 'yes' if problem.used else 'NO',
            'where': problem.where,
            'file': problem.path,
            'what': problem.message,
        }
        for problem in sorted(problems, key=lambda problem: problem.used)
    ]
    return tables.format_table(rows, ('kind', 'in', 'where', 'file', 'what'))
