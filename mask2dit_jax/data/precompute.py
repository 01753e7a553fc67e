"""Makes a data set of videos and captions: the moments of the VAE and the states of the text
encoder, once."""

import collections
import dataclasses
import hashlib
import pathlib
import uuid

import grain
import jax
import ml_dtypes
import numpy as np
import tqdm
from absl import logging
from safetensors.numpy import load_file, save_file

from mask2dit_jax import tables
from mask2dit_jax.data import latent_codec, records, video
from mask2dit_jax.data import manifest as manifest_lib
from mask2dit_jax.models import dit, t5, vae
from mask2dit_jax.pretrained import load as load_lib

_CAPTIONS_AT_ONCE = 8
NULL_TEXT = 'null_text.safetensors'  # of the empty caption, for classifier-free guidance


@dataclasses.dataclass(frozen=True)
class Job:
    """What to make.

    Attributes:
      manifest, root: the list of videos, and the folder they are relative to.
      folder: model folder of VAE and text encoder; not needed to store frames.
      frames: of a clip, where the manifest does not say.
      height_px, width_px: of a clip.
      stride: largest distance between frames taken of a video.
      windows: times that every video is cut, from other starts.
      seed: of the starts.
      store: one of clips.STORES.
      tiling, dtype: of the VAE and the text encoder.
      part_clips: clips in a part.
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


def plan(job: Job):
    """What is to be made.

    Returns:
      Settings of the data set; its clips, every one of the manifest `windows` times, as (clip,
      window); problems of the manifest's rows; and a function that raises ValueError for a number
      of frames that cannot be coded.

    Raises:
      FileNotFoundError, ValueError: naming what is missing or does not fit.
    """
    manifest = manifest_lib.read(job.manifest, job.root)
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
        model = load_lib.read_config('transformer', folder / 'transformer', dtype=job.dtype)
        codec = latent_codec.PretrainedCodec(
            folder, model, (job.height_px, job.width_px), tiling=job.tiling
        )
        check_frames = codec.scene_latents
        check_frames(job.frames)
        *size, channels = codec.latent_shape
        settings |= {
            'tiling': job.tiling,
            'dtype': job.dtype,
            'moments_shape': [*size, 2 * channels],
            'text_shape': [model.max_text_seq_length, model.text_embed_dim],
            'scaling_factor': load_lib.read_config('vae', folder / 'vae').scaling_factor,
            'folder': str(folder.absolute()),
            'vae': latent_codec.network_digest(folder / 'vae'),
            'text_encoder': latent_codec.network_digest(folder / 'text_encoder'),
        }
    listed = [(c, w) for c in manifest.clips for w in range(job.windows)]
    listed.sort(key=lambda x: (x[0].story, x[1]))  # the scenes of one story lie together
    settings['parts'] = -(-len(listed) // job.part_clips)
    return settings, listed, manifest.problems, check_frames


def cut(clip: manifest_lib.Clip, window: int, job: Job, kind: str, check_frames):
    """Reads the frames of one clip.

    Returns:
      uint8 [F, H, W, 3], or None, and the problems of the clip.
    """
    problems = []

    def note(word, message, used=True):
        problems.append(manifest_lib.Problem(word, clip.where, str(clip.path), message, used))

    try:
        frames = clip.frames or job.frames
        word = 'frames'
        check_frames(frames)
        word = 'unreadable'
        info = video.probe(clip.path)
        facts = {'frames': len(info.times), 'height_px': info.height_px, 'width_px': info.width_px}
        wrong = [f'{k} {v}, not {facts[k]}' for k, v in clip.claims.items() if v != facts[k]]
        if wrong:
            note(
                'manifest differs', f'the manifest says {", ".join(wrong)}: the file was believed.'
            )
        if info.rotation_deg:
            note('rotated', f'turned by {info.rotation_deg} degrees, as the file asks.')
        if info.variable_rate:
            note('variable rate', f'read at a constant {info.fps:.4g} frames per second.')
        if info.height_px % 2 or info.width_px % 2:
            note('odd size', f'{info.height_px}x{info.width_px} was cropped.')
        if info.height_px < job.height_px or info.width_px < job.width_px:
            note(
                'enlarged',
                f'{info.height_px}x{info.width_px} was scaled up to {job.height_px}x{job.width_px}.',
            )
        word = 'short'
        rng = np.random.default_rng([job.seed, clip.story, clip.scene, window])
        indices = manifest_lib.choose_frames(kind, len(info.times), frames, job.stride, rng)
        word = 'unreadable'
        return video.read_frames(
            clip.path, info, indices, height_px=job.height_px, width_px=job.width_px
        ), problems
    except FileNotFoundError as error:
        note('missing', str(error), False)
    except (OSError, ValueError) as error:
        note(word, str(error), False)
    return None, problems


def _encode_captions(job: Job, model: dit.DiTConfig, captions, known: dict, network) -> np.ndarray:
    """Text states bfloat16 [N, M, E], a few captions at a time."""
    tokenize = t5.load_tokenizer(pathlib.Path(job.folder) / 'tokenizer')
    new = [c for c in dict.fromkeys(captions) if c not in known]
    for first in range(0, len(new), _CAPTIONS_AT_ONCE):
        some = new[first : first + _CAPTIONS_AT_ONCE]
        padded = some + [''] * (_CAPTIONS_AT_ONCE - len(some))  # one shape, one compilation
        states = t5.encode(network[0].cfg, network[1], tokenize(padded, model.max_text_seq_length))
        known |= zip(some, np.asarray(states, ml_dtypes.bfloat16))
    return np.stack([known[c] for c in captions])


def encode_text(job: Job, out: pathlib.Path, parts: dict[int, list]) -> None:
    """Text states of all captions of these parts, to a file each; the text encoder is in memory
    only here."""
    files = {p: _text_path(out, p) for p in parts if not _text_path(out, p).exists()}
    if not files and (out / NULL_TEXT).exists():
        return
    folder = pathlib.Path(job.folder)
    model = load_lib.read_config('transformer', folder / 'transformer')
    network = load_lib.load_t5(folder / 'text_encoder', param_dtype=job.dtype, dtype=job.dtype)
    _save(out / NULL_TEXT, _encode_captions(job, model, [''], {}, network)[0])
    for part, file in tqdm.tqdm(files.items(), desc='captions', unit='part'):
        _save(file, _encode_captions(job, model, [c.caption for c, _ in parts[part]], {}, network))


def _text_path(out: pathlib.Path, part: int) -> pathlib.Path:
    return out / f'text-{part:05d}.safetensors'


def _save(path: pathlib.Path, text: np.ndarray) -> None:
    temporary = path.with_name(
        f'{path.name}.{uuid.uuid4().hex}.tmp'
    )  # workers may write the same file
    save_file({'text': text}, temporary)
    temporary.replace(path)


def video_encoder(folder, tiling: bool):
    """Function of clips uint8 [B, F, H, W, 3] to moments bfloat16 [B, T, h, w, 2C], and its batch
    size B: one clip to every local device. Fewer clips may come at once."""
    model, params = load_lib.load_vae(pathlib.Path(folder) / 'vae', dtype='float32')
    devices = jax.local_devices()
    mesh = jax.sharding.Mesh(np.array(devices), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    spread, whole = (
        jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*a)) for a in (('data',), ())
    )
    params = jax.device_put(params, whole)

    def run(pixels):
        rows = np.resize(np.arange(len(pixels)), len(devices))  # one shape, one compilation
        x = jax.device_put(pixels[rows].astype(np.float32) / 127.5 - 1, spread)
        moments = np.concatenate(vae.encode(model.cfg, params, x, tiling), axis=-1)
        return moments[: len(pixels)].astype(ml_dtypes.bfloat16)

    return run, len(devices)


def in_batches(stream, size: int):
    """Lists of up to `size` neighbours of (number, frames) that have the same length."""
    batch = []
    for item in stream:
        if batch and (len(batch) == size or len(item[1]) != len(batch[0][1])):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def precompute(job: Job, out, worker: int = 0, num_workers: int = 1, threads: int = 4) -> bool:
    """Makes a data set, or this worker's share of it; goes on where it was stopped.

    Args:
      job: what to make.
      out: folder.
      worker, num_workers: which share, and of how many.
      threads: that read videos ahead.

    Returns:
      Whether the data set is complete.

    Raises:
      FileNotFoundError, ValueError: naming what is missing or does not fit, before anything is
        read.
    """
    out = pathlib.Path(out)
    settings, listed, row_problems, check_frames = plan(job)
    records.write_settings(out, settings)
    parts = {
        p: listed[p * job.part_clips : (p + 1) * job.part_clips] for p in range(settings['parts'])
    }
    mine = {p: parts[p] for p in range(worker, settings['parts'], num_workers)}
    todo = {p: c for p, c in mine.items() if not records.part_path(out, settings, p).exists()}
    logging.info(
        '%d clips in %d parts; %d of the %d parts of this worker are to do.',
        len(listed),
        len(parts),
        len(todo),
        len(mine),
    )
    if job.store == 'moments':
        encode_text(job, out, todo)
    _encode_parts(job, out, settings, todo, check_frames, threads)
    done = records.write_info(out, settings)
    if done is None:
        logging.info('This worker is done; the last one completes %s.', out)
        return False
    problems = row_problems + [p for part in done for p in part.problems]
    rows = [r for part in done for r in part.rows]
    (out / 'report.md').write_text(report(settings, len(listed), rows, problems), encoding='utf-8')
    return True


def _encode_parts(job, out, settings, todo, check_frames, threads) -> None:
    flat = [
        (p, i, clip, window) for p, part in todo.items() for i, (clip, window) in enumerate(part)
    ]
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    dataset = grain.MapDataset.source(flat).map(
        lambda x: (x[0], x[1], *cut(x[2], x[3], job, settings['kind'], check_frames))
    )
    bar = tqdm.tqdm(total=len(flat), desc='clips', unit='clip')
    problems = collections.defaultdict(list)
    read = iter(dataset.to_iter_dataset(ahead))

    def of_part(part, count):
        for _ in range(count):
            _, i, frames, found = next(read)
            problems[part].extend(found)
            bar.update()
            if frames is not None:
                yield i, frames

    run, size = (
        video_encoder(job.folder, job.tiling) if job.store == 'moments' and todo else (None, 1)
    )
    for part, listed in todo.items():
        stream = of_part(part, len(listed))
        if job.store == 'moments':
            text = load_file(_text_path(out, part))['text']
            coded = (
                (i, len(frames), {'moments': m, 'text': text[i]})
                for batch in in_batches(stream, size)
                for (i, frames), m in zip(batch, run(np.stack([frames for _, frames in batch])))
            )
        else:
            coded = ((i, len(frames), {'video': frames}) for i, frames in stream)
        examples = (
            {
                'story': listed[i][0].story * job.windows + listed[i][1],
                'scene': listed[i][0].scene,
                'frames': n,
                'caption': listed[i][0].caption,
                'path': str(listed[i][0].path),
                **x,
            }
            for i, n, x in coded
        )
        records.write_part(out, settings, part, examples, problems[part])
        _text_path(out, part).unlink(missing_ok=True)
    bar.close()


def report(settings: dict, listed: int, rows, problems) -> str:
    """report.md: what is in a data set, and everything that was wrong."""
    counts = collections.Counter((p.kind, p.used) for p in problems)
    summary = [
        {'what': kind, 'clips': n, 'in the data set': 'yes' if used else 'NO'}
        for (kind, used), n in sorted(counts.items())
    ]
    lengths = collections.Counter(r[2] for r in rows)
    listing = [
        {
            'kind': p.kind,
            'in': 'yes' if p.used else 'NO',
            'where': p.where,
            'file': p.path,
            'what': p.message,
        }
        for p in sorted(problems, key=lambda p: p.used)
    ]
    malformed = sum(p.kind == 'malformed row' for p in problems)
    lines = [
        f'# {settings["kind"]}',
        '',
        f'{len(rows)} of {listed} clips are in the data set; '
        f'{listed - len(rows)} are not, and {malformed} rows of the manifest are malformed. Frames per clip: '
        + (', '.join(f'{f} ({n} clips)' for f, n in sorted(lengths.items())) or 'none')
        + '.',
        '',
    ]
    if problems:
        lines += [
            tables.format_table(summary, ('what', 'clips', 'in the data set')),
            '',
            tables.format_table(listing, ('kind', 'in', 'where', 'file', 'what')),
            '',
        ]
    return '\n'.join(lines)
