"""Scores folders of videos that `sample` wrote: the body of the command `evaluate`.

The other files of this folder hold the parts: videos.py finds the videos, video_features.py encodes
them, metrics.py, cuts.py and frechet.py score them, and report_table.py prints the scores.
"""

import json
import pathlib

import numpy as np
import tqdm

from mask2dit_jax import paths, storage, tensor_io
from mask2dit_jax.data import video
from mask2dit_jax.evaluation import cuts as cuts_lib
from mask2dit_jax.evaluation import frechet as frechet_lib
from mask2dit_jax.evaluation import metrics, report_table, video_features
from mask2dit_jax.evaluation import videos as videos_lib

# ------------------------------------------------------------------------------------------------
# Scores


def score(item: videos_lib.Video, features: dict, change) -> dict:
    """Computes all scores of one video that its features allow.

    Args:
      item: the video.
      features: of all videos, by the names that video_features.py lists.
      change: [F - 1] of cuts.transitions.

    Returns:
      'name', the means of cuts.cut_scores over the borders, and metrics.METRICS. All are fractions
      of 1, but for the transition deviation, which is in frames.

    Raises:
      ValueError: if the features do not fit the story.
    """
    values = video_features.of_video(features, item)
    scores = {'name': item.name}
    for name, per_border in cuts_lib.cut_scores(change, item.frames).items():
        scores[name] = float(per_border.mean())

    for name, metric in metrics.METRICS.items():
        if all(argument in values for argument in metric.takes):
            values[name] = metric.function(*(values[argument] for argument in metric.takes))
            scores[name] = np.asarray(values[name]).tolist()
    return scores


def _frechet(items: list[videos_lib.Video], features: dict) -> dict | None:
    """Fréchet video distance to the reference, with the counts behind it; None without reference.

    Raises:
      ValueError: if a video lacks its feature, or there are too few videos.
    """
    if 'reference' not in features:
        return None

    names = [f'{item.name}/video' for item in items]
    missing = [name for name in names if name not in features]
    if missing:
        raise ValueError(f'{missing[0]} is missing from the features, which have a reference.')

    generated = [np.atleast_2d(features[name]) for name in names]
    reference = features['reference']
    return {
        'distance': frechet_lib.frechet_video_distance(generated, reference),
        'videos': sum(len(part) for part in generated),
        'references': len(reference),
        'size': reference.shape[1],
    }


# ------------------------------------------------------------------------------------------------
# The command


def evaluate(
    videos,
    out,
    *,
    story=None,
    encoder=None,
    frame_encoder=None,
    video_encoder=None,
    features=None,
    reference=None,
    frames: int = 8,
    seed: int = 0,
) -> dict:
    """Scores the videos of a folder.

    Writes evaluation.md and evaluation.json to `out`, and features.safetensors if it encodes them.
    Each of them appears whole; those of an earlier evaluation are removed before the first one.

    Args: The arguments are the flags of the command; see its help.

    Returns:
      What evaluation.json holds.

    Raises:
      FileNotFoundError, ValueError: naming the file and what to do.
      storage.OutputError: if `out` cannot be written; nothing was loaded then.
    """
    if bool(encoder) == bool(features):
        raise ValueError('Give either --encoder or --features.')
    if features and (frame_encoder or video_encoder or reference):
        raise ValueError('--features replaces all encoders and the reference: leave these out.')
    if video_encoder and not reference:
        raise ValueError('--video_encoder is for the Fréchet distance: give --reference too.')

    paths.check_local(
        videos=videos,
        out=out,
        story=story,
        encoder=encoder,
        frame_encoder=frame_encoder,
        video_encoder=video_encoder,
        features=features,
        reference=reference,
    )
    out = pathlib.Path(out)
    items = videos_lib.find_videos(videos, story)
    reference_paths = _find_reference(reference) if reference else []
    storage.try_output(out)

    # The features come from a file, or from encoders that start with the captions.
    if features:
        encoders = None
        found = video_features.read_features(features, items)
        settings = {'features': str(features)}
    else:
        video_encoder = (video_encoder or encoder) if reference else None
        encoders = video_features.load_encoders(encoder, frame_encoder, video_encoder)
        found, captions_cut = video_features.encode_captions(encoders, items)
        settings = {
            'encoder': str(encoder),
            'frame encoder': str(frame_encoder or encoder),
            'frames per scene': frames,
        }
        if captions_cut:
            settings['captions cut off'] = captions_cut
        if reference:
            settings['reference'] = str(reference)
            settings['video encoder'] = str(video_encoder)

    # Every video is read once and forgotten: its pixels may be larger than all features together.
    changes = []
    for item in tqdm.tqdm(items, desc='reading videos', unit='video', delay=3):
        pixels = _read_video(item.path, sum(item.frames))
        changes.append(cuts_lib.transitions(pixels))
        if encoders:
            found |= video_features.encode_video(encoders, item, pixels, frames)

    if encoders and reference:
        found['reference'] = _encode_reference(encoders, reference_paths, frames)
    with storage.writing(out):
        _remove_results(out, features)
        if encoders:
            identities = {item.name: video_features.identity(item) for item in items}
            tensor_io.write_file(out / 'features.safetensors', found, identities)

    rows = []
    for item, change in zip(items, changes):
        try:
            rows.append(score(item, found, change))
        except ValueError as error:
            raise ValueError(f'{item.path}: {error}') from error

    result = {
        'settings': settings,
        'seed': seed,
        'summary': report_table.summarize(rows, seed),
        'frechet': _frechet(items, found),
        'confusion': report_table.confusions(rows),
        'videos': rows,
    }
    with storage.writing(out):
        storage.write_text(out / 'evaluation.json', json.dumps(result, indent=2) + '\n')
        storage.write_text(out / 'evaluation.md', report_table.report(result))
    return result


def _remove_results(out: pathlib.Path, features) -> None:
    """Removes what an earlier evaluation left, whole or begun, but for the features to be read.

    A kill between two results must not leave new ones beside old ones.
    """
    for name in ('evaluation.md', 'evaluation.json', 'features.safetensors'):
        for path in (*out.glob(name), *out.glob(f'{name}.unfinished'), *out.glob(f'{name}.*.tmp')):
            if not (features and path.samefile(features)):
                path.unlink()


def _find_reference(folder) -> list[pathlib.Path]:
    """The videos in and below a folder."""
    paths = videos_lib.whole_videos(folder)
    if not paths:
        raise FileNotFoundError(f'{folder} holds no mp4 file: check --reference.')
    return paths


def _read_video(path: pathlib.Path, num_frames: int | None = None) -> np.ndarray:
    """Pixels uint8 [F, H, W, 3]; with num_frames, another number of frames is an error."""
    pixels, *_ = video.read_video(path)
    if num_frames is not None and len(pixels) != num_frames:
        raise ValueError(
            f'{path} has {len(pixels)} frames, its story {num_frames}: they must agree.'
        )
    return pixels


def _encode_reference(
    encoders: video_features.FeatureEncoders, paths: list[pathlib.Path], count: int
) -> np.ndarray:
    """One feature of every reference video, float32 [R, K]."""
    features = []
    for path in tqdm.tqdm(paths, desc='reading reference', unit='video', delay=3):
        feature = video_features.clip_features(encoders.videos, [_read_video(path)], count)
        features.append(feature.astype(np.float32))
    return np.concatenate(features)
