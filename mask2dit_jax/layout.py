"""Scenes: which token belongs to which scene, who may attend to whom, and where each token stands.

Everything that depends on the scenes of a story is a function of one `SceneLayout`; nothing else in
the package infers scenes from shapes. The joint sequence is [all text tokens, all video tokens],
both in story order (Mask²DiT, section 3.2, symmetric binary attention mask).
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class SceneLayout:
    """Static description of one multi-scene story in token space.

    Attributes:
      frames: latent frames per scene; scenes may differ in length.
      height: rows of the token grid (latent height / patch size).
      width: columns of the token grid.
      text_tokens: text tokens per scene, padding included.
      patch_t: latent frames per token (1, or 2 for CogVideoX 1.5); a scene is padded at its end to
        a multiple.
    """

    frames: tuple[int, ...]
    height: int
    width: int
    text_tokens: int
    patch_t: int = 1

    def __post_init__(self):
        if not self.frames or min(self.frames) < 1:
            raise ValueError(
                f'SceneLayout needs at least one scene of at least one latent frame, got {self.frames}.'
            )
        if min(self.height, self.width, self.text_tokens, self.patch_t) < 1:
            raise ValueError(
                f'SceneLayout needs a positive grid, text length and temporal patch, got {self}.'
            )

    @property
    def num_scenes(self) -> int:
        return len(self.frames)

    @property
    def total_frames(self) -> int:
        return sum(self.frames)

    @property
    def token_frames(self) -> tuple[int, ...]:
        """Frames per scene as the transformer counts them, after temporal patching."""
        return tuple(-(-f // self.patch_t) for f in self.frames)

    @property
    def num_text(self) -> int:
        return self.num_scenes * self.text_tokens

    @property
    def num_video(self) -> int:
        return sum(self.token_frames) * self.height * self.width

    @property
    def num_tokens(self) -> int:
        return self.num_text + self.num_video

    def text_range(self, scene: int) -> tuple[int, int]:
        """First and one-past-last token of a scene's caption in the joint sequence."""
        return scene * self.text_tokens, (scene + 1) * self.text_tokens

    def video_range(self, scene: int) -> tuple[int, int]:
        """First and one-past-last token of a scene's video in the joint sequence."""
        ends = self.num_text + np.cumsum((0, *self.token_frames)) * self.height * self.width
        return int(ends[scene]), int(ends[scene + 1])


def token_scenes(layout: SceneLayout) -> tuple[np.ndarray, np.ndarray]:
    """Scene index (int32 [L]) and is-text flag (bool [L]) of every token of the joint sequence."""
    scenes = np.arange(layout.num_scenes, dtype=np.int32)
    text = np.repeat(scenes, layout.text_tokens)
    video = np.repeat(scenes, np.array(layout.token_frames) * layout.height * layout.width)
    return np.concatenate([text, video]), np.arange(layout.num_tokens) < layout.num_text


def frame_scenes(layout: SceneLayout) -> np.ndarray:
    """Scene index of every latent frame, int32 [T]."""
    return np.repeat(np.arange(layout.num_scenes, dtype=np.int32), layout.frames)
