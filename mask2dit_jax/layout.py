"""Scenes in token space: which tokens of the joint sequence belong to which scene.

Everything that depends on the scenes of a story is a function of one `SceneLayout`; nothing else in
the package infers scenes from shapes. The joint sequence is [all captions, all videos], both in
story order (Mask²DiT, section 3.2, symmetric binary attention mask).
"""

import dataclasses
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Kinds of segments. TAIL is the part of a video that other scenes do not see.
TAIL, VIDEO, TEXT = -1, 0, 1


class Segment(NamedTuple):
    """Neighbouring tokens that the masks treat alike: the caption or the video of one scene.

    Attributes:
      scene: index of the scene in the story.
      kind: TEXT for the scene's caption, VIDEO for its video, or for the beginning of it where the
        rest is a TAIL.
      start: first token in the joint sequence.
      stop: one past the last token.
    """

    scene: int
    kind: int
    start: int
    stop: int

    @property
    def is_text(self) -> bool:
        return self.kind == TEXT

    @property
    def length(self) -> int:
        return self.stop - self.start


@dataclasses.dataclass(frozen=True)
class SceneLayout:
    """Static description of one multi-scene story in token space.

    Attributes:
      frames: latent frames per scene; scenes may differ in length.
      height: rows of the token grid (latent height / patch size).
      width: columns of the token grid.
      text_tokens: text tokens per scene, padding included.
      patch_t: latent frames per token (1, or 2 for CogVideoX 1.5); a scene that is no multiple, as
        `whole_patches` makes them, is padded at its end.
      remembered: leading scenes that have no tokens in the sequence. Attention has the keys and
        values of their video from a cache (attention/kv_cache.py), and positions count them.
      lead: frames, as token_frames counts them, at the beginning of every scene that other scenes
        see; None for all.
    """

    frames: tuple[int, ...]
    height: int
    width: int
    text_tokens: int
    patch_t: int = 1
    remembered: int = 0
    lead: int | None = None

    def __post_init__(self):
        if not self.frames or min(self.frames) < 1:
            raise ValueError(
                'SceneLayout needs at least one scene of at least one latent frame, '
                f'got {self.frames}.'
            )

        if min(self.height, self.width, self.text_tokens, self.patch_t) < 1:
            raise ValueError(
                f'SceneLayout needs a positive grid, text length and temporal patch, got {self}.'
            )

        if not 0 <= self.remembered < self.num_scenes:
            raise ValueError(f'SceneLayout needs a scene that is not remembered, got {self}.')

    @property
    def num_scenes(self) -> int:
        return len(self.frames)

    @property
    def total_frames(self) -> int:
        return sum(self.frames)

    @property
    def token_frames(self) -> tuple[int, ...]:
        """Frames per scene as the transformer counts them, after temporal patching."""
        return tuple(-(-frames // self.patch_t) for frames in self.frames)

    @property
    def whole(self) -> 'SceneLayout':
        """The layout with tokens for the remembered scenes, too."""
        return dataclasses.replace(self, remembered=0)

    @property
    def num_text(self) -> int:
        return (self.num_scenes - self.remembered) * self.text_tokens

    @property
    def num_remembered(self) -> int:
        """Video tokens of the remembered scenes, of which attention has keys and values: those that
        other scenes see."""
        return sum(stop - start for start, stop in self.remembered_ranges)

    @property
    def remembered_ranges(self) -> list[tuple[int, int]]:
        """Where these tokens are among those of all video, as (start, stop)."""
        whole = self.whole
        return [
            (segment.start - whole.num_text, segment.stop - whole.num_text)
            for segment in whole.segments
            if segment.kind == VIDEO and segment.scene < self.remembered
        ]

    @property
    def num_video(self) -> int:
        return sum(self.token_frames[self.remembered :]) * self.height * self.width

    @property
    def num_tokens(self) -> int:
        return self.num_text + self.num_video

    @property
    def segments(self) -> tuple[Segment, ...]:
        """The joint sequence, cut into segments: all captions, then all videos, in story order.

        Masks and attention kernels learn from this list alone what the sequence is made of. Later
        kinds of segments (a global caption, reference pictures) are to be added here.
        """
        return self._segments(first_video=self.remembered)

    @property
    def key_segments(self) -> tuple[Segment, ...]:
        """The keys of attention: the captions of the sequence, the video of the remembered scenes,
        and the video of the sequence."""
        return self._segments(first_video=0)

    def _segments(self, first_video: int) -> tuple[Segment, ...]:
        parts = [
            (scene, TEXT, self.text_tokens) for scene in range(self.remembered, self.num_scenes)
        ]
        for scene in range(first_video, self.num_scenes):
            length = self.token_frames[scene]
            seen = length if self.lead is None else min(self.lead, length)
            tail = 0 if scene < self.remembered else length - seen
            for kind, frames in ((VIDEO, seen), (TAIL, tail)):
                if frames:
                    parts.append((scene, kind, frames * self.height * self.width))
        ends = np.cumsum([length for _, _, length in parts]).tolist()
        return tuple(
            Segment(scene, kind, end - length, end)
            for (scene, kind, length), end in zip(parts, ends)
        )

    def text_range(self, scene: int) -> tuple[int, int]:
        """First and one-past-last token of a scene's caption in the joint sequence."""
        return self._range(scene, is_text=True)

    def video_range(self, scene: int) -> tuple[int, int]:
        """First and one-past-last token of a scene's video in the joint sequence."""
        return self._range(scene, is_text=False)

    def _range(self, scene: int, is_text: bool) -> tuple[int, int]:
        parts = [s for s in self.segments if (s.scene, s.is_text) == (scene, is_text)]
        return parts[0].start, parts[-1].stop


def token_scenes(segments: tuple[Segment, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Scene index and kind (int32 [L] each) of every token of these segments."""
    lengths = [segment.length for segment in segments]
    scenes = np.array([segment.scene for segment in segments], np.int32)
    kinds = np.array([segment.kind for segment in segments], np.int32)
    return np.repeat(scenes, lengths), np.repeat(kinds, lengths)


def traced_token_scenes(segments: tuple[Segment, ...]) -> tuple[jax.Array, jax.Array]:
    """`token_scenes`, computed in the program.

    A numpy array would be a constant of the program, which grows with the number of tokens.
    """
    scenes = np.array([segment.scene for segment in segments], np.int32)
    kinds = np.array([segment.kind for segment in segments], np.int32)
    starts = np.array([segment.start for segment in segments], np.int32)
    stops = np.array([segment.stop for segment in segments], np.int32)

    token = jnp.arange(stops[-1], dtype=jnp.int32)[:, None]  # [L, 1]
    inside = (token >= starts) & (token < stops)  # [L, segments]
    return tuple(
        jnp.sum(jnp.where(inside, values, 0), axis=1, dtype=jnp.int32) for values in (scenes, kinds)
    )


def frame_scenes(frames: tuple[int, ...]) -> np.ndarray:
    """Scene index of every latent frame, int32 [T], of the latent frames per scene."""
    return np.repeat(np.arange(len(frames), dtype=np.int32), frames)


def twice(frames: tuple[int, ...]) -> tuple[tuple[int, ...], np.ndarray]:
    """Every scene two times, one copy after the other.

    Args:
      frames: latent frames per scene.

    Returns:
      The frames of the copies, and which frame of the story each of their frames is, int [2T].
    """
    starts = np.cumsum((0, *frames))
    scenes = [np.arange(start, stop) for start, stop in itertools.pairwise(starts)]
    source = np.concatenate([scene for scene in scenes for _ in range(2)])
    return tuple(np.repeat(frames, 2).tolist()), source


class WholePatches(NamedTuple):
    """Scenes that are filled up to whole patches in time.

    Attributes:
      frames: latent frames per scene, multiples of the patch.
      source: which frame of the story each frame comes from, int [sum of frames].
      kept: where the story's own frames are among them, int [T].
    """

    frames: tuple[int, ...]
    source: np.ndarray
    kept: np.ndarray


def whole_patches(frames: tuple[int, ...], patch_t: int) -> WholePatches:
    """Fills up every scene to a multiple of `patch_t`, by copies of its first frame before it.

    This is what diffusers does for CogVideoX 1.5 with its one scene: a video has more latents in
    front, which are dropped when it is sampled, and of a given or trained video they are copies.

    Args:
      frames: latent frames per scene.
      patch_t: latent frames per token.

    Returns:
      WholePatches; its frames are the ones given if these are multiples already.
    """
    source = []
    kept = []
    start = 0
    for length in frames:
        added = -length % patch_t
        kept += range(len(source) + added, len(source) + added + length)
        source += [start] * added + list(range(start, start + length))
        start += length
    filled = tuple(length + -length % patch_t for length in frames)
    return WholePatches(filled, np.array(source), np.array(kept))
