"""Encodes clips of videos and their captions once, into a data set that training reads.

clips.py cuts the clips out of the videos that the manifest lists.

The data set holds the moments (mean and log-variance) of the VAE and the states of the text
encoder, so that neither network is needed during training. It may hold the frames instead.
"""

import collections
import dataclasses
import hashlib
import pathlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import grain
import jax
import ml_dtypes
import numpy as np
import tqdm
from absl import logging
from safetensors.numpy import load_file, save_file

from mask2dit_jax import paths, tables
from mask2dit_jax.data import clips, latent_codec, records
from mask2dit_jax.data import manifest as manifest_lib
from mask2dit_jax.models import dit, t5, vae
from mask2dit_jax.pretrained import config_json
from mask2dit_jax.pretrained import load as load_lib

_CAPTIONS_AT_ONCE = 8
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
      part_clips: number of clips in a part.
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
    part_clips: int = 64


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


def plan(job: Job) -> Plan:
    """Checks a job and lists what it is to make, without reading a video.

    Raises:
      FileNotFoundError, ValueError: naming what is missing or does not fit.
    """
    manifest = manifest_lib.read(job.manifest, job.root)

    # The scenes of one story lie together, so that training can read them as a window of records.
    windows = [Window(clip, i) for clip in manifest.clips for i in range(job.windows)]
    windows.sort(key=lambda item: (item.clip.story, item.window))

    settings = {
        'kind': manifest.kind,
        'store': job.store,
        'stride': job.stride,
        'windows': job.windows,
        'frames': job.frames,
        'height_px': job.height_px,
        'width_px': job.width_px,
        'seed': job.seed,
        'manifest': hashlib.sha256(pathlib.Path(job.manifest).read_bytes()).hexdigest(),
    }
    check_frames = int  # any number of frames can be stored as they are
    if job.store == 'moments':
        folder = pathlib.Path(job.folder)
        model = config_json.read_config('transformer', folder / 'transformer', dtype=job.dtype)
        size_px = (job.height_px, job.width_px)
        codec = latent_codec.PretrainedCodec(folder, model, size_px, tiling=job.tiling)
        check_frames = codec.scene_latents
        check_frames(job.frames)
        settings |= _network_settings(job, model, codec.latent_shape)
    settings['parts'] = -(-len(windows) // job.part_clips)
    return Plan(settings, windows, manifest.problems, check_frames)


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
    }


def encode_text(job: Job, out: pathlib.Path, parts: dict[int, list[Window]]) -> None:
    """Encodes the captions of these parts, into one file per part.

    The text encoder is in memory only during this call; the files last until their parts are
    written.

    Args:
      job: the job.
      out: folder of the data set.
      parts: the windows of each part.
    """
    missing = [part for part in parts if not _text_path(out, part).exists()]
    if not missing and (out / NULL_TEXT).exists():
        return

    folder = pathlib.Path(job.folder)
    model = config_json.read_config('transformer', folder / 'transformer')
    network, params = load_lib.load_t5(
        folder / 'text_encoder', param_dtype=job.dtype, dtype=job.dtype
    )
    tokenize = t5.load_tokenizer(folder / 'tokenizer')
    known = {}  # states by caption, since captions repeat

    def encode(captions: list[str]) -> np.ndarray:
        """Text states bfloat16 [N, M, E]."""
        new = [c for c in dict.fromkeys(captions) if c not in known]
        for first in range(0, len(new), _CAPTIONS_AT_ONCE):
            some = new[first : first + _CAPTIONS_AT_ONCE]
            # Every call has the same shape, so that the network is compiled once.
            padded = some + [''] * (_CAPTIONS_AT_ONCE - len(some))
            ids = tokenize(padded, model.max_text_seq_length)
            states = t5.encode(network.cfg, params, ids)
            known.update(zip(some, np.asarray(states, ml_dtypes.bfloat16)))
        return np.stack([known[caption] for caption in captions])

    _save_text(out / NULL_TEXT, encode([''])[0])
    for part in tqdm.tqdm(missing, desc='captions', unit='part'):
        captions = [item.clip.caption for item in parts[part]]
        _save_text(_text_path(out, part), encode(captions))


def _text_path(out: pathlib.Path, part: int) -> pathlib.Path:
    return out / f'text-{part:05d}.safetensors'


def _save_text(path: pathlib.Path, text: np.ndarray) -> None:
    """Writes text states to a file that is there whole or not at all."""
    # Several workers may write the same file: each has a temporary name of its own.
    temporary = path.with_name(f'{path.name}.{uuid.uuid4().hex}.tmp')
    save_file({'text': text}, temporary)
    temporary.replace(path)


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
    """
    paths.check_local(out=out, folder=job.folder)
    out = pathlib.Path(out)
    planned = plan(job)
    settings = planned.settings
    records.write_settings(out, settings)

    # Worker w takes every num_workers-th part, and leaves out those that are there already.
    todo = {}
    mine = range(worker, settings['parts'], num_workers)
    for part in mine:
        if not records.part_path(out, settings, part).exists():
            first = part * job.part_clips
            todo[part] = planned.windows[first : first + job.part_clips]
    logging.info(
        '%d clips in %d parts; this worker has %d parts, and %d of them are to do.',
        len(planned.windows),
        settings['parts'],
        len(mine),
        len(todo),
    )

    if job.store == 'moments':
        encode_text(job, out, todo)
    if todo:
        _encode_parts(job, out, planned, todo, threads)

    parts = records.write_info(out, settings)
    if parts is None:
        logging.info('This worker is done; the last worker to finish completes %s.', out)
        return False
    problems = planned.problems + [problem for part in parts for problem in part.problems]
    rows = [row for part in parts for row in part.rows]
    text = report(settings, len(planned.windows), rows, problems)
    (out / 'report.md').write_text(text, encoding='utf-8')
    return True


def _encode_parts(
    job: Job, out: pathlib.Path, planned: Plan, todo: dict[int, list[Window]], threads: int
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
        """Records of a part."""
        cuts = usable_cuts(len(todo[part]), problems)
        if job.store == 'frames':
            for item in cuts:
                yield _example(job, todo[part], item, {'video': item.frames})
            return

        text = load_file(_text_path(out, part))['text']  # [clips of the part, M, E]
        for batch in in_batches(cuts, batch_size):
            moments = encode(np.stack([item.frames for item in batch]))
            for item, own_moments in zip(batch, moments):
                content = {'moments': own_moments, 'text': text[item.position]}
                yield _example(job, todo[part], item, content)

    for part in todo:
        problems = []  # filled while the examples are written
        records.write_part(out, planned.settings, part, examples(part, problems), problems)
        _text_path(out, part).unlink(missing_ok=True)
    bar.close()


def _example(job: Job, windows: list[Window], item: Cut, content: dict) -> dict:
    """One record with the keys of records.features; every window makes a story of its own."""
    clip, window = windows[item.position]
    return {
        'story': clip.story * job.windows + window,
        'scene': clip.scene,
        'frames': len(item.frames),
        'caption': clip.caption,
        'path': str(clip.path),
        **content,
    }


def report(
    settings: dict,
    listed: int,
    rows: list[records.Row],
    problems: list[manifest_lib.Problem],
) -> str:
    """Text of report.md: what is in a data set, and everything that was wrong.

    Args:
      settings: how the data set was made.
      listed: number of clips that were to be made.
      rows: one per record.
      problems: those of the manifest's rows and of the clips.
    """
    lengths = collections.Counter(row.frames for row in rows)
    per_length = ', '.join(f'{frames} ({n} clips)' for frames, n in sorted(lengths.items()))
    malformed = sum(problem.kind == 'malformed row' for problem in problems)
    lines = [
        f'# {settings["kind"]}',
        '',
        f'{len(rows)} of {listed} clips are in the data set; {listed - len(rows)} are not, and '
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
