"""Cuts clips out of videos: which frames of a video make a clip, and their pixels."""

from collections.abc import Callable, Iterator

import numpy as np

from mask2dit_jax.data import manifest as manifest_lib
from mask2dit_jax.data import video


def choose_frames(
    kind: str, available: int, frames: int, stride: int, rng: np.random.Generator
) -> np.ndarray:
    """Chooses which frames of a video make a clip, by the reference's rules.

    The frames are equally spaced from a random start. The rest depends on the kind of manifest:

    * single_scene: every `stride`-th frame, all of them within the middle nine tenths of the
      video (about 5 % to 95 % of its length). A video that is too short for this is refused.
    * multi_scene: the spacing is the largest one, up to `stride`, with which the clip fits into the
      whole video. Only a video with fewer frames than the clip is refused.

    Args:
      kind: one of manifest.KINDS.
      available: number of frames of the video.
      frames: number of frames of the clip.
      stride: distance between neighbouring frames of the clip, in frames of the video. 3 makes 8
        frames per second of a video of 24.
      rng: draws the start.

    Returns:
      Positions in the video, int [frames], ascending.

    Raises:
      ValueError: if the video is too short.
    """
    if kind == manifest_lib.SINGLE_SCENE:
        span = (frames - 1) * stride + 1
        end = int(0.95 * available)
        first_start = int(0.05 * end)
        last_start = end - span

        # The reference's condition, with its rounding, and the one that its draw of a start needs.
        long_enough = int(available * (0.95 - 0.05) / stride) >= frames
        fits = long_enough and first_start <= last_start
        needed = f'about {int(frames * stride / 0.9) + 2}'
    else:
        while stride > 1 and (frames - 1) * stride > available - 1:
            stride -= 1
        span = (frames - 1) * stride + 1
        first_start = 0
        last_start = available - span
        fits = last_start >= 0
        needed = str(frames)

    if not fits:
        raise ValueError(
            f'it has {available} frames and {frames} were asked for, which needs {needed}: give a '
            'longer video, fewer --frames or a smaller --stride.'
        )
    start = int(rng.integers(first_start, last_start + 1))
    return start + stride * np.arange(frames)


def cut(
    clip: manifest_lib.Clip, window: int, job, kind: str, check_frames: Callable[[int], int]
) -> tuple[np.ndarray | None, list[manifest_lib.Problem]]:
    """Reads the frames of one clip from its video.

    Args:
      clip: a clip of the manifest.
      window: number of this cut of the clip; it changes the random start.
      job: precompute.Job.
      kind: kind of the manifest.
      check_frames: see precompute.Plan.

    Returns:
      Frames uint8 [F, H, W, 3], or None if the clip cannot be used; and the problems of the clip.

    Raises:
      OSError: if this process has too many open files or no memory.
    """
    problems = []

    def note(problem_kind: str, message: str, used: bool) -> None:
        problems.append(
            manifest_lib.Problem(problem_kind, clip.where, str(clip.path), message, used)
        )

    frames = clip.frames or job.frames
    failure = 'frames'  # the kind of problem, if the next step fails
    try:
        check_frames(frames)

        failure = 'unreadable'
        info = video.probe(clip.path)
        for oddity, message in _oddities(clip, info, job):
            note(oddity, message, used=True)

        failure = 'short'
        rng = np.random.default_rng([job.seed, clip.story, clip.scene, window])
        indices = choose_frames(kind, len(info.times), frames, job.stride, rng)

        failure = 'unreadable'
        pixels = video.read_frames(
            clip.path, info, indices, height_px=job.height_px, width_px=job.width_px
        )
    except FileNotFoundError as error:
        note('missing', str(error), used=False)
        return None, problems
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in video.EXHAUSTED:
            raise
        note(failure, str(error), used=False)
        return None, problems
    return pixels, problems


def _oddities(clip: manifest_lib.Clip, info: video.Info, job) -> Iterator[tuple[str, str]]:
    """Kind and message of everything in a video that is unexpected, and harmless."""
    found = {'frames': len(info.times), 'height_px': info.height_px, 'width_px': info.width_px}
    wrong = [
        f'{key} {claim}, not {found[key]}'
        for key, claim in clip.claims.items()
        if claim != found[key]
    ]
    if wrong:
        yield (
            'manifest differs',
            f'the manifest says {", ".join(wrong)}: the video file decides.',
        )

    size = f'{info.height_px}x{info.width_px}'
    if info.rotation_deg:
        yield 'rotated', f'turned by {info.rotation_deg} degrees, as the file asks.'
    if info.variable_rate:
        yield 'variable rate', f'read at a constant {info.fps:.4g} frames per second.'
    if info.height_px % 2 or info.width_px % 2:
        yield 'odd size', f'{size} was cropped.'
    if info.height_px < job.height_px or info.width_px < job.width_px:
        yield 'enlarged', f'{size} was scaled up to {job.height_px}x{job.width_px}.'
