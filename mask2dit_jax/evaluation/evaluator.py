"""Scores folders of videos that `sample` wrote."""

import dataclasses
import json
import pathlib

import numpy as np
import safetensors.numpy
import tqdm

from mask2dit_jax import tensor_io
from mask2dit_jax.data import story_file, video
from mask2dit_jax.evaluation import cuts as cuts_lib
from mask2dit_jax.evaluation import feature_encoders, metrics, report_table
from mask2dit_jax.evaluation import frechet as frechet_lib
from mask2dit_jax.evaluation import videos as videos_lib


def _spread(pixels, count: int):
    """`count` frames evenly from first to last; repeated if there are fewer."""
    return pixels[np.linspace(0, len(pixels) - 1, count).round().astype(int)]


def _frame_features(encoder: feature_encoders.Encoder, clips, count: int) -> list[np.ndarray]:
    """Normalised features [F, E] of at most `count` frames of each clip."""
    picked = [_spread(pixels, min(count, len(pixels))) for pixels in clips]
    features = metrics.unit(feature_encoders.encode_clips(encoder, np.concatenate(picked)[:, None]))
    return np.split(features, np.cumsum([len(p) for p in picked])[:-1])


def _clip_features(encoder: feature_encoders.Encoder, clips, count: int) -> np.ndarray:
    """One feature of each clip, [N, D]."""
    if encoder.cfg.frames > 1:
        return feature_encoders.encode_clips(
            encoder, np.stack([_spread(pixels, encoder.cfg.frames) for pixels in clips])
        )
    return np.stack([frames.mean(0) for frames in _frame_features(encoder, clips, count)])


@dataclasses.dataclass(frozen=True)
class FeatureEncoders:
    """Encoders of scenes and captions, of frames and of whole videos; None gives no such
    features."""

    scenes: feature_encoders.Encoder
    frames: feature_encoders.Encoder | None
    videos: feature_encoders.Encoder | None


def encode_video(
    encoders: FeatureEncoders, item: videos_lib.Video, pixels, count: int
) -> dict[str, np.ndarray]:
    """The features of one video uint8 [F, H, W, 3], by their names in a features file; `count` is
    --frames."""
    scenes, features = story_file.split_scenes(pixels, item.frames), {}
    if encoders.frames is not None:
        framed = _frame_features(encoders.frames, scenes, count)
        features = {f'frames/{i}': frames for i, frames in enumerate(framed)}
    features['scenes'] = (
        np.stack([frames.mean(0) for frames in framed])
        if encoders.frames is encoders.scenes
        else _clip_features(encoders.scenes, scenes, count)
    )
    if encoders.videos is not None:
        features['video'] = _clip_features(encoders.videos, [pixels], count)
    return {f'{item.name}/{key}': value.astype(np.float32) for key, value in features.items()}


def read_features(path) -> dict[str, np.ndarray]:
    """All features of a safetensors file.

    Raises:
      FileNotFoundError, ValueError: if it is none.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f'{path} is no file: check --features.')
    return {name: np.asarray(tensor) for name, tensor in tensor_io.open_file(path)[0].items()}


def score(item: videos_lib.Video, features: dict, change) -> dict:
    """All metrics of one video, fractions of 1; see mask2dit_jax.evaluation.metrics.

    Args:
      item: the video.
      features: of all videos, by name.
      change: of metrics.transitions.

    Raises:
      ValueError: if the features do not fit the story.
    """
    own = {
        key.removeprefix(f'{item.name}/'): x
        for key, x in features.items()
        if key.startswith(f'{item.name}/')
    }
    for key in ('scenes', 'captions'):
        if key in own and (own[key].ndim != 2 or len(own[key]) != len(item.frames)):
            raise ValueError(
                f'{item.name}/{key} has shape {own[key].shape}: give one row per scene, '
                f'{len(item.frames)}.'
            )
    if 'scenes' not in own:
        raise ValueError(f'{item.name}/scenes is missing from the features.')
    cuts = cuts_lib.cut_scores(change, item.frames)
    out = {'name': item.name} | {name: float(values.mean()) for name, values in cuts.items()}
    out['visual'] = metrics.visual_consistency(own['scenes'])
    out['visual_adjacent'] = metrics.visual_consistency(own['scenes'], 'adjacent')
    if 'captions' in own:
        confusion = metrics.caption_cosines(own['scenes'], own['captions'])
        semantic = metrics.semantic_consistency(own['scenes'], own['captions'])
        out |= {
            'semantic': semantic,
            'matches': float(metrics.caption_matches(confusion).mean()),
            'margin': metrics.caption_margin(confusion),
            'confusion': confusion.tolist(),
        }
        out |= {
            'sequence': metrics.sequence_consistency(out['visual'], semantic),
            'sequence_adjacent': metrics.sequence_consistency(out['visual_adjacent'], semantic),
        }
    if 'frames/0' in own:
        lost = [
            f'{item.name}/frames/{i}' for i in range(len(item.frames)) if f'frames/{i}' not in own
        ]
        if lost:
            raise ValueError(f'{", ".join(lost)} is missing from the features.')
        frames = [own[f'frames/{i}'] for i in range(len(item.frames))]
        out |= {
            'subject_within': metrics.subject_within(frames),
            'subject_between': metrics.subject_between(frames),
        }
    return out


def _read(path, frames: int | None = None) -> np.ndarray:
    pixels = video.read_video(path)[0]
    if frames is not None and len(pixels) != frames:
        raise ValueError(f'{path} has {len(pixels)} frames, its story {frames}: they must agree.')
    return pixels


def load_encoders(encoder, frame_encoder=None, video_encoder=None) -> FeatureEncoders:
    """Encoders of these folders; without the last, whole videos are not encoded.

    Raises:
      FileNotFoundError, ValueError: of encoders.load, and for a frame encoder of clips.
    """
    loaded = {
        folder: feature_encoders.load(folder)
        for folder in {encoder, frame_encoder, video_encoder} - {None}
    }
    if frame_encoder and loaded[frame_encoder].cfg.frames > 1:
        raise ValueError(
            f'{frame_encoder} is an encoder of clips: give --frame_encoder one of pictures.'
        )
    frames = loaded[frame_encoder or encoder]
    return FeatureEncoders(
        loaded[encoder], frames if frames.cfg.frames == 1 else None, loaded.get(video_encoder)
    )


def _encode_captions(
    encoders: FeatureEncoders, videos: list[videos_lib.Video]
) -> tuple[dict[str, np.ndarray], int]:
    """NAME/captions of all videos, and how many captions were cut off; nothing from an encoder
    without captions."""
    if encoders.scenes.text is None:
        return {}, 0
    captions = list(dict.fromkeys(c for item in videos for c in item.captions))
    features, cut = feature_encoders.encode_captions(encoders.scenes, captions)
    return {
        f'{item.name}/captions': features[[captions.index(c) for c in item.captions]]
        for item in videos
    }, sum(cut)


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
    """Scores the videos of a folder and writes evaluation.md, evaluation.json and
    features.safetensors to `out`.

    Arguments are the flags of the command; returns what evaluation.json holds.

    Raises:
      FileNotFoundError, ValueError: naming the file and what to do.
    """
    if bool(encoder) == bool(features):
        raise ValueError('Give either --encoder or --features.')
    if features and (frame_encoder or video_encoder or reference):
        raise ValueError('--features replaces all encoders and the reference: leave these out.')
    if video_encoder and not reference:
        raise ValueError('--video_encoder is for the Fréchet distance: give --reference too.')
    items, out = videos_lib.find_videos(videos, story), pathlib.Path(out)
    real = sorted(pathlib.Path(reference).rglob('*.mp4')) if reference else []
    if reference and not real:
        raise FileNotFoundError(f'{reference} holds no mp4 file: check --reference.')
    if features:
        encoders, found, settings = None, read_features(features), {'features': str(features)}
    else:
        encoders = load_encoders(
            encoder, frame_encoder, video_encoder or encoder if reference else None
        )
        found, cut = _encode_captions(encoders, items)
        settings = {
            'encoder': str(encoder),
            'frame encoder': str(frame_encoder or encoder),
            'frames per scene': frames,
        }
        settings |= {'captions cut off': cut} if cut else {}
        settings |= (
            {'reference': str(reference), 'video encoder': str(video_encoder or encoder)}
            if reference
            else {}
        )
    changes = []
    for item in tqdm.tqdm(items, desc='reading videos', unit='video', delay=3):
        pixels = _read(item.path, sum(item.frames))
        changes.append(cuts_lib.transitions(pixels))
        found |= encode_video(encoders, item, pixels, frames) if encoders else {}
    out.mkdir(parents=True, exist_ok=True)
    if encoders:
        if reference:
            found['reference'] = np.concatenate(
                [
                    _clip_features(encoders.videos, [_read(path)], frames).astype(np.float32)
                    for path in tqdm.tqdm(real, desc='reading reference', unit='video', delay=3)
                ]
            )
        safetensors.numpy.save_file(found, out / 'features.safetensors')
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
        'frechet': frechet_lib.frechet_video_distance(items, found),
        'confusion': report_table.confusions(rows),
        'videos': rows,
    }
    (out / 'evaluation.json').write_text(json.dumps(result, indent=2) + '\n', encoding='utf-8')
    (out / 'evaluation.md').write_text(report_table.report(result), encoding='utf-8')
    return result
