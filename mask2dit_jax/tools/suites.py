"""Prompts of public evaluation suites to stories, and videos to the folders that the suites' own
tools score.

Required: `prompts` with --suite, --source and --out, or `layout` with --suite, --videos and --out.

The suite's standard prompts, for numbers that can be compared with those of other models:

  python -m mask2dit_jax.tools.suites prompts --suite=vbench \\
    --source=VBench/vbench/VBench_full_info.json --out=stories
  sh stories/sample.sh samples --workdir=runs/a
  python -m mask2dit_jax.tools.suites layout --suite=vbench \\
    --source=VBench/vbench/VBench_full_info.json --videos=samples --out=vbench

Stories of your own, for those metrics that need nothing but a caption; every scene is cut out as a
clip with its own caption:

  python -m mask2dit_jax.tools.suites layout --suite=vbench --videos=samples --out=vbench

--source is the suite's own list of prompts: VBench_full_info.json (vbench, vbench_long),
metadata.json (evalcrafter) or the folder meta_data (compbench). --category keeps some of its
dimensions. sample.sh loads the model anew for every prompt, and continues where it was stopped.
layout prints the commands to run in a checkout of the suite, on a machine with a GPU; clips.json in
--out lists every video file with its caption and where it came from.

The layouts follow these versions of the tools:

* the package vbench 0.1.5
* vbench2_beta_long of Vchitect/VBench: __init__ 4e54e75, eval_long 078c63d, utils 03c285a
* evalcrafter/EvalCrafter: README 055dfe3, start.sh 0044a73, metrics cc66701
* KaiyueSun98/T2V-CompBench with 1400 prompts: meta_data 193b6b0, and in compbench_eval
  consistent_attr 6d8de07, dynamic_attr 7696e17, action_binding 3534e6a, interaction 09539a7,
  spatial_relationships cdf1853, numeracy a88240c, motion_binding 394d466, its options ff7b2a7, and
  motion_binding_seg 5a909ad
"""

import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Callable

import tqdm
from absl import app, flags

from mask2dit_jax import paths, storage
from mask2dit_jax.data import story_file, video
from mask2dit_jax.evaluation import videos as videos_lib

# Scenes are numbered by four digits in the names of files.
MAX_SCENES = 9999

# Longest name of a file, in bytes, on the common file systems.
MAX_NAME_BYTES = 255

# The script that samples every prompt; COUNT stands for the number of videos, LAST for the number
# of the last one, which counts from 0.
_SAMPLE_SCRIPT = """\
# Samples the stories beside this file that are not in FOLDER yet:
# sh sample.sh FOLDER [flags of mask2dit_jax.sample]
set -e
stories=$(cd "$(dirname "$0")" && pwd)
out=${1:?Give the folder for the samples.}
shift
seed=0
find "$stories" -name story.json | sort | while read -r story; do
  name=${story#"$stories"/}; name=${name%/story.json}; seed=$((seed + 1))
  [ -f "$out/$name/video_LAST.mp4" ] ||
    python -m mask2dit_jax.sample --story="$story" --num_videos=COUNT --seed=$seed \\
      --out="$out/$name" "$@" </dev/null
done
"""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One of a suite's prompts.

    Attributes:
      key: folder of its story and of its samples.
      text: the prompt itself.
      categories: the dimensions or categories that it is scored in.
    """

    key: str
    text: str
    categories: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
    """How one suite wants its videos, and how its tool is called.

    Words in braces are filled in: {out}, the folder that was laid out; {source}, the list of
    prompts; those that a field names.

    Attributes:
      read: reads the prompts from --source.
      source: name of the file or folder that --source must be.
      videos: number of videos that the tool wants of every prompt.
      prompt_file: name of a prompt's video, from {text}, {key} and {index}, which counts the videos
        of the prompt from 0.
      prompt_commands: commands that score them, from {categories}, all of them in one line; or one
        template per category, from {category}, {frames} and {fps}.
      scene_file: name of a scene's clip, from {clip}, the number among all clips, or from {video}
        and {scene}, the numbers of its video and of the scene in it, from 0.
      first_clip: number of the first clip.
      story_file: name of a copy of the whole video, from {video}; None if the tool wants none.
      scene_lists: makes further files for the scenes. It takes captions by the name of the clip
        without suffix, and returns the content, JSON or text, by the name of the file.
      scene_commands: commands that score the scenes.
      min_frames: least number of frames that the tool takes in a clip.
      note: remarks to read before numbers are compared.
    """

    read: Callable[[pathlib.Path], list[Prompt]]
    source: str
    videos: int
    prompt_file: str
    prompt_commands: str | dict[str, str]
    scene_file: str
    first_clip: int = 0
    story_file: str | None = None
    scene_lists: Callable[[dict[str, str]], dict] = lambda captions: {}
    scene_commands: str
    min_frames: int = 2
    note: str


def _load(path):
    return json.loads(path.read_text(encoding='utf-8'))


# VBench and VBench-Long.


def _read_vbench(path) -> list[Prompt]:
    """The prompts of VBench_full_info.json, each text once."""
    # VBench finds videos by the text alone: entries with one text share their videos.
    dimensions = {}
    for entry in _load(path):
        dimensions.setdefault(entry['prompt_en'], []).extend(entry['dimension'])

    prompts = []
    for i, (text, names) in enumerate(dimensions.items()):
        prompts.append(Prompt(f'{i:04d}', text, tuple(names)))
    return prompts


def _vbench_lists(captions):
    return {'prompts.json': {f'{name}.mp4': text for name, text in captions.items()}}


# The dimensions that VBench lists for prompts other than its own.
_FREE_DIMENSIONS = (
    'subject_consistency background_consistency motion_smoothness dynamic_degree '
    'aesthetic_quality imaging_quality'
)

_EVALUATE_VBENCH = (
    'vbench evaluate --videos_path {out}/videos --output_path {out}/results --dimension $d'
)

_VBENCH = Suite(
    read=_read_vbench,
    source='VBench_full_info.json',
    videos=5,
    prompt_file='videos/{text}-{index}.mp4',
    prompt_commands=(
        'for d in {categories}; do ' + _EVALUATE_VBENCH + ' --full_json_dir {source}; done'
    ),
    scene_file='videos/{clip:04d}.mp4',
    scene_lists=_vbench_lists,
    scene_commands=(
        f'for d in {_FREE_DIMENSIONS}; do '
        + _EVALUATE_VBENCH
        + ' --mode=custom_input --prompt_file {out}/prompts.json; done'
    ),
    note=(
        'Run this after pip install vbench. It asks for VBench-Long if videos last 5 s or more. '
        'temporal_flickering needs still videos: run vbench static_filter first. With captions '
        'other than its own it lists six dimensions, which do not read the captions; '
        'overall_consistency reads them and runs too. It refuses object_class, multiple_objects, '
        'color, spatial_relationship, scene and appearance_style; the other dimensions mean '
        'nothing without its own prompts.'
    ),
)

_EVALUATE_VBENCH_LONG = (
    'python vbench2_beta_long/eval_long.py --videos_path {out}/videos '
    '--output_path {out}/results --dimension $d --dev_flag'
)

_VBENCH_LONG = Suite(
    read=_read_vbench,
    source='VBench_full_info.json',
    videos=5,
    prompt_file='videos/{text}-{index}.mp4',
    prompt_commands=(
        'for d in {categories}; do '
        + _EVALUATE_VBENCH_LONG
        + ' --mode=long_vbench_standard --full_json_dir {source}; done'
    ),
    # It takes the clips of split_clip as they are, and cuts only videos that have none there.
    scene_file='videos/split_clip/{video:04d}-0/{video:04d}-0_{scene:03d}.mp4',
    story_file='videos/{video:04d}-0.mp4',
    scene_commands=(
        f'for d in {_FREE_DIMENSIONS}; do '
        + _EVALUATE_VBENCH_LONG
        + ' --mode=long_custom_input --full_json_dir vbench/VBench_full_info.json; done'
    ),
    note=(
        'Run this in a checkout of VBench. For temporal_flickering add --static_filter_flag. '
        'Stories with captions other than its own are cut at their scenes, not every 2 s: scores '
        'within clips are scores of scenes, scores between clips compare the first frames of '
        'scenes, and captions are not read. Do not compare these numbers with its leaderboard.'
    ),
)


# EvalCrafter.


def _read_evalcrafter(path) -> list[Prompt]:
    """The prompts of metadata.json."""
    return [Prompt(key, entry['prompt']) for key, entry in _load(path).items()]


def _evalcrafter_lists(captions):
    lists = {}
    metadata = {}
    for name, text in captions.items():
        lists[f'prompts/{name}.txt'] = text
        metadata[name] = {'prompt': text, 'attributes': {}}
    return lists | {'metadata.json': metadata}


# The metrics that need no attributes of the prompts. The tools find prompts, pictures and results
# in the checkout by number: those of its own prompts are moved away first, as otherwise they would
# be taken for those of these clips.
_EVALCRAFTER_SCENE_COMMANDS = """\
kept=$(mktemp -d kept.XXXX) &&
  for f in prompts metadata.json SDXL_Imgs results; do [ ! -e $f ] || mv $f $kept; done
cp -r {out}/prompts {out}/metadata.json .
(cd metrics && python3 is.py --dir_videos {out}/videos)
(cd metrics/DOVER && python3 evaluate_a_set_of_videos.py --dir_videos {out}/videos)
for m in clip_score clip_temp_score face_consistency_score sd_score blip_bleu; do
  (cd metrics/Scores_with_CLIP &&
    python3 Scores_with_CLIP.py --dir_videos {out}/videos --metric $m); done
for m in flow_score warping_error; do
  (cd metrics/RAFT && python3 optical_flow_scores.py --dir_videos {out}/videos --metric $m); done
(cd metrics/Segment-and-Track-Anything &&
  python3 object_attributes_eval.py --dir_videos {out}/videos --metric detection_score)"""

_EVALCRAFTER = Suite(
    read=_read_evalcrafter,
    source='metadata.json',
    videos=1,
    prompt_file='videos/{key}.mp4',
    prompt_commands='bash start.sh $PWD {out}/videos',
    scene_file='videos/{clip:04d}.mp4',
    scene_lists=_evalcrafter_lists,
    scene_commands=_EVALCRAFTER_SCENE_COMMANDS,
    note=(
        'Run this in a checkout of EvalCrafter. For captions other than its own, its prompts and '
        'the pictures and results that it keeps by number are moved to kept.*: use a copy of the '
        'checkout. Such captions have no celebrity, OCR, action, motion amplitude, count and color '
        'scores, and so no totals; detection_score needs captions that name a COCO object.'
    ),
)


# T2V-CompBench.

_COMPBENCH_LISTS = '--read-prompt-file {source}/{category}.json --t2v-model mask2dit'
_COMPBENCH_ARGS = _COMPBENCH_LISTS + ' --output-path {out}/csv --video-path {out}/video/'
_LLAVA = (
    '(cd LLaVA && python llava/eval/compbench_eval_SCRIPT.py ' + _COMPBENCH_ARGS + '{category})'
)

# Commands by category, which is also the name of its file in meta_data.
COMPBENCH_COMMANDS = {
    'consistent_attribute_binding': _LLAVA.replace('SCRIPT', 'consistent_attr'),
    'dynamic_attribute_binding': _LLAVA.replace('SCRIPT', 'dynamic_attr'),
    'action_binding': _LLAVA.replace('SCRIPT', 'action_binding'),
    'object_interactions': _LLAVA.replace('SCRIPT', 'interaction'),
    'spatial_relationships': (
        'python Grounded-Segment-Anything/compbench_eval_spatial_relationships.py '
        '--depth_folder {out}/depth --output_dir {out}/boxes/{category} '
        + _COMPBENCH_ARGS
        + '{category}'
    ),
    'generative_numeracy': (
        'python Grounded-Segment-Anything/GroundingDINO/demo/compbench_eval_numeracy.py '
        '--output_dir {out}/boxes/{category} ' + _COMPBENCH_ARGS + '{category}'
    ),
    # The first command segments, and writes the videos anew to video/video_standard; the second
    # tracks objects in those.
    'motion_binding': (
        'python Grounded-Segment-Anything/compbench_motion_binding_seg.py '
        '--total_frame {frames} --fps {fps} --output_dir {out}/masks '
        + _COMPBENCH_LISTS
        + ' --video-path {out}/video/{category}\n'
        '(cd dot && python compbench_eval_motion_binding.py '
        '--mask_folder {out}/masks --output_dir {out}/tracks '
        + _COMPBENCH_ARGS
        + 'video_standard/{category})'
    ),
}


def _read_compbench(path) -> list[Prompt]:
    """The prompts of all files in meta_data, numbered from 1 in each."""
    prompts = []
    for category in COMPBENCH_COMMANDS:
        for i, entry in enumerate(_load(path / f'{category}.json'), 1):
            prompts.append(Prompt(f'{category}/{i:04d}', entry['prompt'], (category,)))
    return prompts


def _compbench_lists(captions):
    return {'meta_data/object_interactions.json': [{'prompt': text} for text in captions.values()]}


_COMPBENCH = Suite(
    read=_read_compbench,
    source='the folder meta_data',
    videos=1,
    prompt_file='video/{key}.mp4',
    prompt_commands=COMPBENCH_COMMANDS,
    scene_file='video/object_interactions/{clip:04d}.mp4',
    first_clip=1,
    scene_lists=_compbench_lists,
    # The list of prompts is the one that was laid out beside the clips.
    scene_commands=(
        COMPBENCH_COMMANDS['object_interactions']
        .replace('{category}', 'object_interactions')
        .replace('{source}', '{out}/meta_data')
    ),
    # Its detectors take 16 frames of each video.
    min_frames=16,
    note=(
        'Run this in a checkout of T2V-CompBench. Its scripts append to {out}/csv: delete that '
        'folder to score anew. Among its categories only object_interactions takes captions '
        'without annotation; it asks how objects act on each other.'
    ),
)


SUITES = {
    'vbench': _VBENCH,
    'vbench_long': _VBENCH_LONG,
    'evalcrafter': _EVALCRAFTER,
    'compbench': _COMPBENCH,
}


def read_prompts(suite: str, source, categories=()) -> list[Prompt]:
    """Reads a suite's prompts.

    Args:
      suite: one of SUITES.
      source: the suite's list of prompts, see the module's docstring.
      categories: keeps prompts of these dimensions or categories; all if empty.

    Returns:
      The prompts, in the order of the list.

    Raises:
      FileNotFoundError, ValueError: naming what is missing or does not fit.
    """
    spec = SUITES[suite]
    try:
        prompts = spec.read(pathlib.Path(source))
        odd = [prompt for prompt in prompts if not _is_whole(prompt)]
    except OSError as error:
        raise FileNotFoundError(
            f'{error.filename} cannot be read ({error.strerror}): --source of {suite} is '
            f'{spec.source}.'
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'{source} holds no prompts of {suite} ({error!r}): give {spec.source}.'
        ) from error

    if odd or not prompts:
        found = odd[0] if odd else 'no prompts'
        raise ValueError(
            f'{source} holds {found}: give {spec.source}, where all prompts have a text and a '
            'number of four digits.'
        )

    prompts = _in_categories(prompts, categories, source)
    if '{text}' in spec.prompt_file:
        _check_names(prompts, suite, source)
    return prompts


def _is_whole(prompt: Prompt) -> bool:
    """True if the prompt has a text, and a key that is a safe name of a folder."""
    return bool(re.fullmatch(r'(\w+/)?\d{4}', prompt.key)) and bool(prompt.text.strip())


def _categories_of(prompts: list[Prompt]) -> list[str]:
    """All categories of some prompts, each once, in the order in which they appear."""
    return list(dict.fromkeys(name for prompt in prompts for name in prompt.categories))


def _in_categories(prompts: list[Prompt], categories, source) -> list[Prompt]:
    """The prompts of these categories, or all if there are none."""
    if not categories:
        return prompts

    known = _categories_of(prompts)
    unknown = [name for name in categories if name not in known]
    if unknown:
        raise ValueError(
            f'{source} has no category {", ".join(unknown)}, but '
            f'{", ".join(known) or "none at all"}.'
        )
    return [prompt for prompt in prompts if set(categories) & set(prompt.categories)]


def _check_names(prompts: list[Prompt], suite: str, source) -> None:
    """Raises ValueError if a text cannot be the name of a file."""
    for prompt in prompts:
        name = f'{prompt.text}-0.mp4'
        if '/' in name or len(name.encode()) > MAX_NAME_BYTES:
            raise ValueError(
                f'{source}: {prompt.text!r} has a / or is too long for the name of a file, by '
                f'which {suite} finds a video: take it out.'
            )


def _begin_folder(out: pathlib.Path) -> pathlib.Path:
    """Makes the folder that is to become `out` when it is whole; see `_finish_folder`.

    The tools score everything in a folder: it must not hold older files, nor half of the new ones.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f'{out} is not empty: choose a new folder for --out.')
    unfinished = out.with_name(f'{out.name}.unfinished')
    if unfinished.exists():
        shutil.rmtree(unfinished)  # left by a command that was killed, or that failed
    storage.try_output(unfinished)
    return unfinished


def _finish_folder(unfinished: pathlib.Path, out: pathlib.Path) -> None:
    """Gives the folder its name."""
    unfinished.rename(out)


def _write(path: pathlib.Path, content) -> None:
    """Writes text as it is, and anything else as JSON."""
    text = content if isinstance(content, str) else json.dumps(content, indent=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + '\n', encoding='utf-8')


def write_prompts(suite: str, source, out, *, categories=(), frames: int | None = None) -> str:
    """Writes KEY/story.json of every prompt, one scene each, and sample.sh.

    Args:
      suite: one of SUITES.
      source: the suite's list of prompts.
      out: a new folder.
      categories: keeps prompts of these dimensions or categories; all if empty.
      frames: frames of a video; as many as sample makes if None.

    Returns:
      A text that says how many stories there are and how to sample them.

    Raises:
      FileNotFoundError, ValueError: as read_prompts, and if `out` is not empty.
    """
    prompts = read_prompts(suite, source, categories)
    count = SUITES[suite].videos
    final = pathlib.Path(out).absolute()
    out = _begin_folder(final)

    for prompt in prompts:
        scene = {'caption': prompt.text}
        if frames:
            scene['frames'] = frames
        _write(out / prompt.key / 'story.json', {'scenes': [scene]})
    script = _SAMPLE_SCRIPT.replace('COUNT', str(count)).replace('LAST', str(count - 1))
    _write(out / 'sample.sh', script.rstrip())

    _finish_folder(out, final)
    return (
        f'Wrote {len(prompts)} stories, to sample {count} video(s) of each:\n\n'
        f'sh {final}/sample.sh samples --workdir=...\n'
    )


def lay_out(suite: str, videos, out, *, source=None, categories=()) -> str:
    """Writes videos and lists as a suite's tool reads them.

    Args:
      suite: one of SUITES.
      videos: folder of samples: of the suite's prompts, by key, if there is a source; else of any
        stories of two scenes or more.
      out: a new folder.
      source: the suite's list of prompts, or None.
      categories: keeps prompts of these dimensions or categories; all if empty.

    Returns:
      A text that says how to score them: the suite's note, a blank line and commands for a shell.

    Raises:
      FileNotFoundError, ValueError: naming the video, story or prompt and what to do.
    """
    for path in filter(None, (out, source)):
        _check_needs_no_quotes(pathlib.Path(path).absolute())
    out = pathlib.Path(out).absolute()
    unfinished = _begin_folder(out)

    if source:
        commands = _lay_out_prompts(suite, videos, unfinished, out, source, categories)
    else:
        commands = _lay_out_scenes(suite, videos, unfinished, out)
    _finish_folder(unfinished, out)
    return f'{SUITES[suite].note.format(out=out)}\n\n{commands}\n'


def _check_needs_no_quotes(path: pathlib.Path) -> None:
    """Raises ValueError for a path that a shell would split or expand."""
    if re.search(r'[^\w./+@-]', str(path)):
        raise ValueError(
            f'{path} has blanks or special signs, which the tools do not quote: rename it.'
        )


def _lay_out_prompts(
    suite: str, videos, unfinished: pathlib.Path, out: pathlib.Path, source, categories
) -> str:
    """Copies the samples of a suite's prompts to `unfinished`; returns commands for `out`."""
    spec = SUITES[suite]
    prompts = read_prompts(suite, source, categories)
    folders = [pathlib.Path(videos) / prompt.key for prompt in prompts]
    _check_all_sampled(folders)

    # Check everything before the first copy.
    rows = []
    lengths = {}  # (frames, frames per second) to the first video that has them
    for prompt, folder in zip(prompts, folders):
        _check_samples(prompt, folder, suite)
        for i in range(spec.videos):
            path = folder / f'video_{i}.mp4'
            info = video.probe(path)
            _check_long_enough(suite, path, len(info.times))
            lengths.setdefault((len(info.times), round(info.fps)), path)

            name = spec.prompt_file.format(text=prompt.text, key=prompt.key, index=i)
            rows.append(
                {
                    'file': name,
                    'video': str(path),
                    'caption': prompt.text,
                    'categories': prompt.categories,
                }
            )
    if len(lengths) > 1:
        raise ValueError(
            f'{" and ".join(map(str, lengths.values()))} have different frames and frame rates, '
            f'{" and ".join(map(str, lengths))}: sample all prompts alike.'
        )

    for row in tqdm.tqdm(rows, desc='copying', unit='video'):
        target = unfinished / row['file']
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(row['video'], target)
    _write(unfinished / 'clips.json', rows)

    ((frames, fps),) = lengths
    return _prompt_commands(
        spec,
        categories or _categories_of(prompts),
        out=out,
        source=pathlib.Path(source).absolute(),
        frames=frames,
        fps=fps,
    )


def _prompt_commands(spec: Suite, categories, **words) -> str:
    """The commands that score samples of a suite's prompts."""
    if isinstance(spec.prompt_commands, str):
        return spec.prompt_commands.format(categories=' '.join(categories), **words)

    commands = []
    for category in categories:
        commands.append(spec.prompt_commands[category].format(category=category, **words))
    return '\n'.join(commands)


def _check_all_sampled(folders: list[pathlib.Path]) -> None:
    """Raises FileNotFoundError if a prompt has no samples."""
    lost = [folder for folder in folders if not (folder / 'story.json').is_file()]
    if lost:
        raise FileNotFoundError(
            f'{len(lost)} of {len(folders)} prompts have no samples, such as {lost[0]}/story.json: '
            'run sample.sh to its end, or give --category.'
        )


def _check_samples(prompt: Prompt, folder: pathlib.Path, suite: str) -> None:
    """Raises ValueError if a folder has samples of another prompt, or too few or too many."""
    captions, _ = story_file.read_story(folder / 'story.json')
    if captions != [prompt.text]:
        raise ValueError(
            f'{folder}/story.json has captions {captions}, --source {prompt.text!r}: give the '
            '--source of these samples.'
        )

    wanted = SUITES[suite].videos
    count = len(list(folder.glob('*.mp4')))
    if count != wanted:
        raise ValueError(
            f'{folder} has {count} mp4 files, {suite} takes {wanted} of a prompt: sample with '
            f'--num_videos={wanted}.'
        )


def _check_long_enough(suite: str, path, frames: int) -> None:
    """Raises ValueError for a clip that the tool cannot score."""
    wanted = SUITES[suite].min_frames
    if frames < wanted:
        raise ValueError(
            f'{path} has {frames} frames in a clip, {suite} needs {wanted} or more: sample longer '
            'scenes.'
        )


def _lay_out_scenes(suite: str, videos, unfinished: pathlib.Path, out: pathlib.Path) -> str:
    """Cuts stories into scenes in `unfinished`; returns commands for `out`."""
    spec = SUITES[suite]
    items = videos_lib.find_videos(videos)
    count = sum(len(item.frames) for item in items)
    if count > MAX_SCENES:
        raise ValueError(
            f'{videos} has {count} scenes, and their numbers have four digits: lay it out in parts.'
        )

    rows = []
    captions = {}  # by the name of the clip without suffix
    for v, item in enumerate(tqdm.tqdm(items, desc='cutting', unit='video')):
        pixels, fps = video.read_video(item.path)
        if len(pixels) != sum(item.frames):
            raise ValueError(
                f'{item.path} has {len(pixels)} frames, its story {sum(item.frames)}: they must '
                'agree.'
            )
        _check_long_enough(suite, item.path, min(item.frames))

        scenes = story_file.split_scenes(pixels, item.frames)
        for s, (scene, caption) in enumerate(zip(scenes, item.captions)):
            clip = spec.first_clip + len(captions)
            name = spec.scene_file.format(clip=clip, video=v, scene=s)
            video.write_mp4(unfinished / name, scene, fps)
            captions[pathlib.Path(name).stem] = caption
            rows.append({'file': name, 'video': str(item.path), 'scene': s + 1, 'caption': caption})

        if spec.story_file:
            name = spec.story_file.format(video=v)
            shutil.copyfile(item.path, unfinished / name)
            rows.append({'file': name, 'video': str(item.path), 'caption': ' '.join(item.captions)})

    for name, content in spec.scene_lists(captions).items():
        _write(unfinished / name, content)
    _write(unfinished / 'clips.json', rows)
    return spec.scene_commands.format(out=out)


def _check_flags(command: str) -> None:
    """Raises UsageError for a flag that the command needs and lacks, or has no use for."""
    if command == 'prompts':
        needed = {'source'}
        used = {'source', 'category', 'frames'}
    else:
        needed = {'videos'}
        used = {'videos', 'source', 'category'} if flags.FLAGS.source else {'videos'}

    names = ('source', 'videos', 'category', 'frames')
    given = {name for name in names if flags.FLAGS[name].value}

    missing = needed - given
    if missing:
        raise app.UsageError(f'{command} needs --{", --".join(sorted(missing))}: see --help.')
    unused = given - used
    if unused:
        raise app.UsageError(
            f'{command} has no use here for --{", --".join(sorted(unused))}: see --help.'
        )


def main(argv):
    if len(argv) != 2 or argv[1] not in ('prompts', 'layout'):
        raise app.UsageError(
            f'Give prompts or layout, got {" ".join(argv[1:]) or "neither"}: see --help.'
        )
    command = argv[1]
    _check_flags(command)

    values = flags.FLAGS
    if command == 'prompts':
        said = write_prompts(
            values.suite,
            values.source,
            values.out,
            categories=values.category,
            frames=values.frames,
        )
    else:
        said = lay_out(
            values.suite,
            values.videos,
            values.out,
            source=values.source,
            categories=values.category,
        )
    print(said, end='')


if __name__ == '__main__':
    flags.DEFINE_enum(
        'suite',
        None,
        list(SUITES),
        'The suite; vbench_long is VBench-Long, for long videos.',
        required=True,
    )
    flags.DEFINE_string(
        'source',
        None,
        "The suite's own prompts: VBench_full_info.json, metadata.json or meta_data of a checkout. "
        'Without it, layout takes any stories of two scenes or more.',
    )
    flags.DEFINE_string(
        'videos',
        None,
        'layout: the folder that sample wrote, or a folder of such folders.',
    )
    flags.DEFINE_list(
        'category',
        [],
        'Keeps only these dimensions or categories of --source; default: all.',
    )
    flags.DEFINE_integer(
        'frames',
        None,
        'prompts: frames of a video; default: as many as sample makes.',
        lower_bound=2,
    )
    flags.DEFINE_string('out', None, 'A new folder.', required=True)
    paths.check_flags_local('source', 'videos', 'out')
    app.run(main)
