"""The features of videos, as `evaluate` keeps them in features.safetensors.

Every feature has a name that begins with the video's own (videos.Video.name):

  NAME/scenes    [S, D]  one feature per scene
  NAME/captions  [S, D]  one feature per caption, in the same space
  NAME/frames/0  [F, E]  the features of frames of the first scene; NAME/frames/1 and so on follow
  NAME/video     [1, K]  one feature of the whole video
  reference      [R, K]  one feature of every reference video

The metadata of a file that `evaluate` wrote holds the `identity` of every video under its name. A
file that something else made may do without it.
"""

import dataclasses
import hashlib
import json
import pathlib

import numpy as np

from mask2dit_jax import tensor_io
from mask2dit_jax.data import story_file
from mask2dit_jax.evaluation import feature_encoders, metrics
from mask2dit_jax.evaluation import videos as videos_lib


def identity(item: videos_lib.Video) -> str:
    """A digest of what the features of a video depend on: its file and its story."""
    story = json.dumps([item.captions, item.frames])
    return hashlib.sha256(story.encode() + item.path.read_bytes()).hexdigest()


def read_features(path, items: list[videos_lib.Video]) -> dict[str, np.ndarray]:
    """Reads all features of a safetensors file.

    Args:
      path: the file.
      items: the videos that they are for.

    Raises:
      FileNotFoundError: if the path is not a file.
      ValueError: if the file is damaged, or `evaluate` wrote it for another video of the same name.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f'{path} is not a file: check --features.')
    tensors, metadata = tensor_io.open_file(path)

    changed = [i.name for i in items if i.name in metadata and metadata[i.name] != identity(i)]
    if changed:
        raise ValueError(
            f'{path} is of another {", ".join(changed)}, or its story was another one: give '
            '--encoder to encode the videos as they are.'
        )
    return {name: np.asarray(tensor) for name, tensor in tensors.items()}


def of_video(features: dict[str, np.ndarray], item: videos_lib.Video) -> dict:
    """Selects the features that the metrics of one video take.

    Args:
      features: of all videos.
      item: the video.

    Returns:
      'scenes' [S, D] and, where they exist, 'captions' [S, D] and 'frames', a list of [F, E] per
      scene.

    Raises:
      ValueError: if features are missing, or do not fit the story.
    """
    num_scenes = len(item.frames)
    own = {}
    for key in ('scenes', 'captions'):
        name = f'{item.name}/{key}'
        if name not in features:
            continue
        if features[name].ndim != 2 or len(features[name]) != num_scenes:
            raise ValueError(
                f'{name} has shape {features[name].shape}: give one row per scene, {num_scenes}.'
            )
        own[key] = features[name]
    if 'scenes' not in own:
        raise ValueError(f'{item.name}/scenes is missing from the features.')

    # Frames may be left out, but then of all scenes.
    frame_names = [f'{item.name}/frames/{scene}' for scene in range(num_scenes)]
    if frame_names[0] in features:
        missing = [name for name in frame_names if name not in features]
        if missing:
            raise ValueError(f'{", ".join(missing)} is missing from the features.')
        own['frames'] = [features[name] for name in frame_names]
    return own


@dataclasses.dataclass(frozen=True)
class FeatureEncoders:
    """The encoders of an evaluation; where one is None, its features are not computed.

    Attributes:
      scenes: of scenes and captions.
      frames: of frames.
      videos: of whole videos.
    """

    scenes: feature_encoders.Encoder
    frames: feature_encoders.Encoder | None
    videos: feature_encoders.Encoder | None


def load_encoders(encoder, frame_encoder=None, video_encoder=None) -> FeatureEncoders:
    """Loads the encoders of these folders.

    Args:
      encoder: folder of the encoder of scenes and captions.
      frame_encoder: folder of the encoder of frames; None takes `encoder` if it encodes pictures.
      video_encoder: folder of the encoder of whole videos; None leaves whole videos out.

    Raises:
      FileNotFoundError, ValueError: as feature_encoders.load, and if the frame encoder takes clips.
    """
    # One folder may be given for several roles; it is loaded once.
    folders = dict.fromkeys([encoder, frame_encoder, video_encoder])
    loaded = {folder: feature_encoders.load(folder) for folder in folders if folder is not None}

    if frame_encoder and loaded[frame_encoder].config.frames > 1:
        raise ValueError(
            f'{frame_encoder} is an encoder of clips: give --frame_encoder an encoder of pictures.'
        )
    frames = loaded[frame_encoder or encoder]
    if frames.config.frames > 1:
        frames = None
    return FeatureEncoders(scenes=loaded[encoder], frames=frames, videos=loaded.get(video_encoder))


def _spread(pixels, count: int):
    """Picks `count` frames, evenly from first to last; frames repeat if there are fewer."""
    return pixels[np.linspace(0, len(pixels) - 1, count).round().astype(int)]


def _frame_features(
    encoder: feature_encoders.Encoder, clips: list[np.ndarray], count: int
) -> list[np.ndarray]:
    """Features [F, E] of length 1 of at most `count` frames of each clip."""
    picked = [_spread(pixels, min(count, len(pixels))) for pixels in clips]
    pictures = np.concatenate(picked)[:, None]  # clips of one frame each
    features = metrics.unit(feature_encoders.encode_clips(encoder, pictures))

    ends = np.cumsum([len(frames) for frames in picked])
    return np.split(features, ends[:-1])


def clip_features(
    encoder: feature_encoders.Encoder, clips: list[np.ndarray], count: int
) -> np.ndarray:
    """Encodes every clip as one feature.

    Args:
      encoder: of clips, which takes as many frames as it is made for; or of pictures, whose
        features of length 1 are averaged over frames.
      clips: uint8 [F, H, W, 3] each.
      count: number of frames for an encoder of pictures.

    Returns:
      [N, D].
    """
    if encoder.config.frames == 1:
        per_clip = _frame_features(encoder, clips, count)
        return np.stack([frames.mean(0) for frames in per_clip])
    picked = [_spread(pixels, encoder.config.frames) for pixels in clips]
    return feature_encoders.encode_clips(encoder, np.stack(picked))


def encode_video(
    encoders: FeatureEncoders, item: videos_lib.Video, pixels, count: int
) -> dict[str, np.ndarray]:
    """Encodes one video.

    Args:
      encoders: to use.
      item: the video.
      pixels: uint8 [F, H, W, 3].
      count: number of frames of a scene, and of the whole video, for encoders of pictures.

    Returns:
      Its features, except those of captions, by name; float32.
    """
    scenes = story_file.split_scenes(pixels, item.frames)
    features = {}
    if encoders.frames is not None:
        frames = _frame_features(encoders.frames, scenes, count)
        for scene, scene_frames in enumerate(frames):
            features[f'frames/{scene}'] = scene_frames

    if encoders.frames is encoders.scenes:
        # The frames are encoded already: a scene is their mean, as in clip_features.
        features['scenes'] = np.stack([scene_frames.mean(0) for scene_frames in frames])
    else:
        features['scenes'] = clip_features(encoders.scenes, scenes, count)

    if encoders.videos is not None:
        features['video'] = clip_features(encoders.videos, [pixels], count)
    return {f'{item.name}/{key}': value.astype(np.float32) for key, value in features.items()}


def encode_captions(
    encoders: FeatureEncoders, videos: list[videos_lib.Video]
) -> tuple[dict[str, np.ndarray], int]:
    """Encodes the captions of all videos.

    Returns:
      NAME/captions of every video, and how many different captions were too long and cut off. An
      encoder without captions gives no features.
    """
    if encoders.scenes.text is None:
        return {}, 0

    captions = list(dict.fromkeys(caption for item in videos for caption in item.captions))
    encoded, was_cut = feature_encoders.encode_captions(encoders.scenes, captions)

    features = {}
    for item in videos:
        rows = [captions.index(caption) for caption in item.captions]
        features[f'{item.name}/captions'] = encoded[rows]
    return features, sum(was_cut)
