"""Prompts of public evaluation suites to stories, and videos to the folders that the suites' own
tools score.

The suite's standard prompts, for numbers to compare with other models':

  python -m mask2dit_jax.tools.suites prompts --suite=vbench --source=VBench/vbench/VBench_full_info.json --out=stories
  sh stories/sample.sh samples --workdir=runs/a
  python -m mask2dit_jax.tools.suites layout --suite=vbench --source=VBench/vbench/VBench_full_info.json \\
    --videos=samples --out=vbench

Own stories, those metrics that need nothing but a caption; every scene is cut out as a clip with
its own caption:

  python -m mask2dit_jax.tools.suites layout --suite=vbench --videos=samples --out=vbench

--source is the suite's own list of prompts: VBench_full_info.json (vbench, vbench_long),
metadata.json (evalcrafter) or the folder meta_data (compbench). --category keeps some of its
dimensions. sample.sh loads the model for every prompt anew, and goes on after a kill. layout prints
the commands to run in a checkout of the suite, on a machine with a GPU; clips.json in --out says
what every file is.

What the tools expect was read in: the package vbench 0.1.5; vbench2_beta_long of Vchitect/VBench
(__init__ 4e54e75, eval_long 078c63d, utils 03c285a); evalcrafter/EvalCrafter (README 055dfe3,
start.sh 0044a73, metrics cc66701); KaiyueSun98/T2V-CompBench with 1400 prompts (meta_data 193b6b0;
of compbench_eval consistent_attr 6d8de07, dynamic_attr 7696e17, action_binding 3534e6a, interaction
09539a7, spatial_relationships cdf1853, numeracy a88240c, motion_binding 394d466, its options
ff7b2a7, and motion_binding_seg 5a909ad).
"""

import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Callable

import tqdm
from absl import app, flags

from mask2dit_jax.data import story_file, video
from mask2dit_jax.evaluation import videos as videos_lib

_SAMPLE = """\
# Samples the stories beside this file that are not in FOLDER yet: sh sample.sh FOLDER [flags of mask2dit_jax.sample]
set -e
stories=$(cd "$(dirname "$0")" && pwd)
out=${1:?Give the folder for the samples.}
shift
seed=0
find "$stories" -name story.json | sort | while read -r story; do
  name=${story#"$stories"/}; name=${name%/story.json}; seed=$((seed + 1))
  [ -f "$out/$name/story.json" ] || python -m mask2dit_jax.sample --story="$story" --num_videos=COUNT --seed=$seed \\
    --out="$out/$name" "$@" </dev/null
done
"""
_DIMENSIONS = (
    'subject_consistency background_consistency motion_smoothness dynamic_degree aesthetic_quality '
    'imaging_quality'
)  # those that VBench lists for other prompts than its own
_VBENCH = 'do vbench evaluate --videos_path {out}/videos --output_path {out}/results --dimension $d'
_LONG = (
    'do python vbench2_beta_long/eval_long.py --videos_path {out}/videos --output_path {out}/results --dimension '
    '$d --dev_flag'
)
_ARGS = (
    '--read-prompt-file {source}/{category}.json --t2v-model mask2dit --output-path {out}/csv --video-path '
    '{out}/video/'
)
_DINO = 'python Grounded-Segment-Anything/'
_COMPBENCH = {  # commands by category, which is the name of its file in meta_data
    name: f'(cd LLaVA && python llava/eval/compbench_eval_{script}.py {_ARGS}{{category}})'
    for name, script in (
        ('consistent_attribute_binding', 'consistent_attr'),
        ('dynamic_attribute_binding', 'dynamic_attr'),
        ('action_binding', 'action_binding'),
        ('object_interactions', 'interaction'),
    )
} | {
    'spatial_relationships': f'{_DINO}compbench_eval_spatial_relationships.py --depth_folder {{out}}/depth '
    f'--output_dir {{out}}/boxes/{{category}} {_ARGS}{{category}}',
    'generative_numeracy': f'{_DINO}GroundingDINO/demo/compbench_eval_numeracy.py --output_dir '
    f'{{out}}/boxes/{{category}} {_ARGS}{{category}}',
    'motion_binding': f'{_DINO}compbench_motion_binding_seg.py --total_frame {{frames}} --fps {{fps}} --output_dir '
    '{out}/masks --read-prompt-file {source}/{category}.json --t2v-model mask2dit --video-path '
    '{out}/video/{category}\n(cd dot && python compbench_eval_motion_binding.py --mask_folder '
    f'{{out}}/masks --output_dir {{out}}/tracks {_ARGS}video_standard/{{category}})',
}
_EVALCRAFTER = """\
kept=$(mktemp -d kept.XXXX) && for f in prompts metadata.json SDXL_Imgs results; do [ ! -e $f ] || mv $f $kept; done
cp -r {out}/prompts {out}/metadata.json .
(cd metrics && python3 is.py --dir_videos {out}/videos)
(cd metrics/DOVER && python3 evaluate_a_set_of_videos.py --dir_videos {out}/videos)
for m in clip_score clip_temp_score face_consistency_score sd_score blip_bleu; do
  (cd metrics/Scores_with_CLIP && python3 Scores_with_CLIP.py --dir_videos {out}/videos --metric $m); done
for m in flow_score warping_error; do
  (cd metrics/RAFT && python3 optical_flow_scores.py --dir_videos {out}/videos --metric $m); done
(cd metrics/Segment-and-Track-Anything &&
  python3 object_attributes_eval.py --dir_videos {out}/videos --metric detection_score)"""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One of a suite's prompts: the folder of its story and samples, its text, its dimensions or
    categories."""

    key: str
    text: str
    categories: tuple[str, ...] = ()


def _load(path):
    return json.loads(path.read_text(encoding='utf-8'))


def _read_vbench(path) -> list[Prompt]:
    """Dimensions that have a prompt in common share its videos, as VBench finds these by the prompt
    alone."""
    merged = {}
    for entry in _load(path):
        merged.setdefault(entry['prompt_en'], []).extend(entry['dimension'])
    return [
        Prompt(f'{i:04d}', text, tuple(names)) for i, (text, names) in enumerate(merged.items())
    ]


def _read_evalcrafter(path) -> list[Prompt]:
    return [Prompt(key, entry['prompt']) for key, entry in _load(path).items()]


def _read_compbench(path) -> list[Prompt]:
    return [
        Prompt(f'{name}/{i:04d}', entry['prompt'], (name,))
        for name in _COMPBENCH
        for i, entry in enumerate(_load(path / f'{name}.json'), 1)
    ]


@dataclasses.dataclass(frozen=True)
class Suite:
    """What one suite expects, of its own prompts and of scenes of other stories.

    Attributes:
      read: its prompts, from --source.
      source: what that is.
      videos: of each of its prompts.
      own_file: of {text}, {key} and {index}, counted from 0 for each prompt.
      own_commands: of {out}, {source}, {categories}; or by category, of {category}, {frames} and
        {fps} too.
      scene_file: of {clip}, counted from `first`, or {video} and {scene}, both from 0.
      scene_commands: of {out}.
      note: what to know before comparing, of {out}.
      lists: further files, JSON or text, made of captions by file name without suffix.
      whole_file: of {video}; None leaves whole videos out.
      first: see above.
      min_frames: of a clip.
    """

    read: Callable
    source: str
    videos: int
    own_file: str
    own_commands: str | dict[str, str]
    scene_file: str
    scene_commands: str
    note: str
    lists: Callable = lambda captions: {}
    whole_file: str | None = None
    first: int = 0
    min_frames: int = 2


SUITES = {
    'vbench': Suite(
        _read_vbench,
        'VBench_full_info.json',
        5,
        'videos/{text}-{index}.mp4',
        f'for d in {{categories}}; {_VBENCH} --full_json_dir {{source}}; done',
        'videos/{clip:04d}.mp4',
        f'for d in {_DIMENSIONS}; {_VBENCH} --mode=custom_input --prompt_file {{out}}/prompts.json; done',
        'With pip install vbench. It asks for VBench-Long if videos last 5 s or more. temporal_flickering is of still '
        'videos: vbench static_filter first. With other captions than its own it lists six dimensions, which do not '
        'read them; overall_consistency does and runs too. It refuses object_class, multiple_objects, color, '
        'spatial_relationship, scene and appearance_style; the rest means nothing without its own prompts.',
        lambda captions: {'prompts.json': {f'{name}.mp4': text for name, text in captions.items()}},
    ),
    'vbench_long': Suite(
        _read_vbench,
        'VBench_full_info.json',
        5,
        'videos/{text}-{index}.mp4',
        f'for d in {{categories}}; {_LONG} --mode=long_vbench_standard --full_json_dir {{source}}; done',
        'videos/split_clip/{video:04d}-0/{video:04d}-0_{scene:03d}.mp4',
        f'for d in {_DIMENSIONS}; {_LONG} --mode=long_custom_input --full_json_dir vbench/VBench_full_info.json; done',
        'In a checkout of VBench. temporal_flickering: add --static_filter_flag. Stories of other captions than its '
        'own are cut at their scenes, not every 2 s: what it finds in clips is of scenes, from clip to clip it '
        'compares first frames of scenes, and captions are not read. Do not compare that with its leaderboard.',
        whole_file='videos/{video:04d}-0.mp4',
    ),
    'evalcrafter': Suite(
        _read_evalcrafter,
        'metadata.json',
        1,
        'videos/{key}.mp4',
        'bash start.sh $PWD {out}/videos',
        'videos/{clip:04d}.mp4',
        _EVALCRAFTER,
        'In a checkout of EvalCrafter. For other captions than its own its prompts, and the pictures and results it '
        'keeps by number, are moved to kept.*: take a copy. Those have no celebrity, OCR, action, motion amplitude, '
        'count and color scores, so no totals; detection_score takes captions that name a COCO object.',
        lambda captions: (
            {f'prompts/{name}.txt': text for name, text in captions.items()}
            | {
                'metadata.json': {
                    name: {'prompt': text, 'attributes': {}} for name, text in captions.items()
                }
            }
        ),
    ),
    'compbench': Suite(
        _read_compbench,
        'the folder meta_data',
        1,
        'video/{key}.mp4',
        _COMPBENCH,
        'video/object_interactions/{clip:04d}.mp4',
        _COMPBENCH['object_interactions']
        .replace('{source}', '{out}/meta_data')
        .replace('{category}', 'object_interactions'),
        'In a checkout of T2V-CompBench; its scripts append to {out}/csv: delete that to score anew. Of its categories '
        'only object_interactions takes captions without annotation; it asks how objects act on each other.',
        lambda captions: {
            'meta_data/object_interactions.json': [{'prompt': text} for text in captions.values()]
        },
        first=1,
        min_frames=16,
    ),
}


def read_prompts(suite: str, source, categories=()) -> list[Prompt]:
    """A suite's prompts, of these categories or of all.

    Raises:
      FileNotFoundError, ValueError: naming what is missing or does not fit.
    """
    spec = SUITES[suite]
    try:
        prompts = spec.read(pathlib.Path(source))
        odd = [p for p in prompts if not re.fullmatch(r'(\w+/)?\d{4}', p.key) or not p.text.strip()]
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
        raise ValueError(
            f'{source} holds {odd[0] if odd else "no prompts"}: give {spec.source}, where all prompts '
            'have a text and a number of four digits.'
        )
    known = dict.fromkeys(c for p in prompts for c in p.categories)
    if odd := [c for c in categories if c not in known]:
        raise ValueError(
            f'{source} has no category {", ".join(odd)}, but {", ".join(known) or "none at all"}.'
        )
    prompts = [p for p in prompts if not categories or set(categories) & set(p.categories)]
    for text in (p.text for p in prompts if '{text}' in spec.own_file):
        if '/' in text or len(f'{text}-0.mp4'.encode()) > 255:
            raise ValueError(
                f'{source}: {text!r} has a / or is too long for the name of a file, by which {suite} '
                'finds a video: take it out.'
            )
    return prompts


def _new_folder(out) -> pathlib.Path:
    """Tools score all that lies in a folder."""
    out = pathlib.Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f'{out} is not empty: choose a new folder for --out.')
    out.mkdir(parents=True, exist_ok=True)
    return out


def _write(path: pathlib.Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        (content if isinstance(content, str) else json.dumps(content, indent=2)) + '\n',
        encoding='utf-8',
    )


def write_prompts(suite: str, source, out, *, categories=(), frames: int | None = None) -> str:
    """Writes KEY/story.json of every prompt, one scene each, and sample.sh; returns what to do
    next.

    Raises:
      FileNotFoundError, ValueError: as read_prompts, and if `out` is not empty.
    """
    prompts, out, count = (
        read_prompts(suite, source, categories),
        _new_folder(out),
        SUITES[suite].videos,
    )
    for prompt in prompts:
        scene = {'caption': prompt.text} | ({'frames': frames} if frames else {})
        _write(out / prompt.key / 'story.json', {'scenes': [scene]})
    _write(out / 'sample.sh', _SAMPLE.replace('COUNT', str(count)).rstrip())
    return (
        f'Wrote {len(prompts)} stories, to sample {count} video(s) of each:\n\n'
        f'sh {out}/sample.sh samples --workdir=...\n'
    )


def _own_videos(suite: str, videos, out: pathlib.Path, source, categories) -> str:
    """Copies the samples of a suite's prompts; returns commands."""
    spec, prompts, layouts, rows = SUITES[suite], read_prompts(suite, source, categories), {}, []
    folders = [pathlib.Path(videos) / p.key for p in prompts]
    if lost := [folder for folder in folders if not (folder / 'story.json').is_file()]:
        raise FileNotFoundError(
            f'{len(lost)} of {len(prompts)} prompts have no samples, such as {lost[0]}/story.json: '
            'run sample.sh to its end, or give --category.'
        )
    for prompt, folder in zip(prompts, folders):
        captions, _ = story_file.read_story(folder / 'story.json')
        if captions != [prompt.text]:
            raise ValueError(
                f'{folder}/story.json has captions {captions}, --source {prompt.text!r}: give the '
                '--source of these samples.'
            )
        if (count := len(list(folder.glob('*.mp4')))) != spec.videos:
            raise ValueError(
                f'{folder} has {count} mp4 files, {suite} takes {spec.videos} of a prompt: sample with '
                f'--num_videos={spec.videos}.'
            )
        for i in range(spec.videos):
            path, name = (
                folder / f'video_{i}.mp4',
                spec.own_file.format(text=prompt.text, key=prompt.key, index=i),
            )
            info = video.probe(path)
            layouts.setdefault((_long_enough(suite, path, len(info.times)), round(info.fps)), path)
            rows.append(
                {
                    'file': name,
                    'video': str(path),
                    'caption': prompt.text,
                    'categories': prompt.categories,
                }
            )
    if len(layouts) > 1:
        raise ValueError(
            f'{" and ".join(map(str, layouts.values()))} have different frames and frame rates, '
            f'{" and ".join(map(str, layouts))}: sample all prompts alike.'
        )
    for row in tqdm.tqdm(rows, desc='copying', unit='video'):
        (out / row['file']).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(row['video'], out / row['file'])
    _write(out / 'clips.json', rows)
    names = categories or dict.fromkeys(c for p in prompts for c in p.categories)
    parts = (
        [spec.own_commands]
        if isinstance(spec.own_commands, str)
        else [spec.own_commands[c].replace('{category}', c) for c in names]
    )
    ((frames, fps),) = layouts
    return '\n'.join(parts).format(
        out=out,
        source=pathlib.Path(source).absolute(),
        categories=' '.join(names),
        frames=frames,
        fps=fps,
    )


def _long_enough(suite: str, path, frames: int) -> int:
    if frames < SUITES[suite].min_frames:
        raise ValueError(
            f'{path} has {frames} frames in a clip, {suite} needs {SUITES[suite].min_frames} or more: '
            'sample longer scenes.'
        )
    return frames


def _scenes(suite: str, videos, out: pathlib.Path) -> str:
    """Cuts stories into scenes; returns commands."""
    spec, items, captions, rows = SUITES[suite], videos_lib.find_videos(videos), {}, []
    if (count := sum(len(item.frames) for item in items)) > 9999:
        raise ValueError(
            f'{videos} has {count} scenes, and their numbers have four digits: lay it out in parts.'
        )
    for v, item in enumerate(tqdm.tqdm(items, desc='cutting', unit='video')):
        pixels, fps = video.read_video(item.path)
        if len(pixels) != sum(item.frames):
            raise ValueError(
                f'{item.path} has {len(pixels)} frames, its story {sum(item.frames)}: they must agree.'
            )
        _long_enough(suite, item.path, min(item.frames))
        for s, (scene, caption) in enumerate(
            zip(story_file.split_scenes(pixels, item.frames), item.captions)
        ):
            name = spec.scene_file.format(clip=spec.first + len(captions), video=v, scene=s)
            video.write_mp4(out / name, scene, fps)
            captions[pathlib.Path(name).stem] = caption
            rows.append({'file': name, 'video': str(item.path), 'scene': s + 1, 'caption': caption})
        if spec.whole_file:
            name = spec.whole_file.format(video=v)
            shutil.copyfile(item.path, out / name)
            rows.append({'file': name, 'video': str(item.path), 'caption': ' '.join(item.captions)})
    for name, content in (spec.lists(captions) | {'clips.json': rows}).items():
        _write(out / name, content)
    return spec.scene_commands.format(out=out)


def lay_out(suite: str, videos, out, *, source=None, categories=()) -> str:
    """Writes videos and lists as a suite's tool reads them: of its prompts if there is a source,
    else of any stories.

    Returns:
      How to score them.

    Raises:
      FileNotFoundError, ValueError: naming the video, story or prompt and what to do.
    """
    for path in (pathlib.Path(p).absolute() for p in (out, source) if p):
        if re.search(r'[^\w./+@-]', str(path)):
            raise ValueError(
                f'{path} has blanks or special signs, which the tools do not quote: rename it.'
            )
    out = _new_folder(out)
    commands = (
        _own_videos(suite, videos, out, source, categories)
        if source
        else _scenes(suite, videos, out)
    )
    return f'{SUITES[suite].note.format(out=out)}\n\n{commands}\n'


def main(argv):
    tasks = {
        'prompts': ({'source'}, {'source', 'category', 'frames'}),
        'layout': (
            {'videos'},
            {'videos', 'source', 'category'} if flags.FLAGS.source else {'videos'},
        ),
    }
    if len(argv) != 2 or argv[1] not in tasks:
        raise app.UsageError(
            f'Give prompts or layout, got {" ".join(argv[1:]) or "neither"}: see --help.'
        )
    needed, used = tasks[argv[1]]
    given = {
        n: flags.FLAGS[n].value
        for n in ('source', 'videos', 'category', 'frames')
        if flags.FLAGS[n].value
    }
    if wrong := sorted(needed - set(given) or set(given) - used):
        raise app.UsageError(
            f'{argv[1]} {"needs" if needed - set(given) else "has no use here for"} '
            f'--{", --".join(wrong)}: see --help.'
        )
    suite, out, kwargs = flags.FLAGS.suite, flags.FLAGS.out, {'categories': flags.FLAGS.category}
    print(
        write_prompts(suite, given['source'], out, frames=flags.FLAGS.frames, **kwargs)
        if argv[1] == 'prompts'
        else lay_out(suite, given['videos'], out, source=flags.FLAGS.source, **kwargs),
        end='',
    )


if __name__ == '__main__':
    flags.DEFINE_enum(
        'suite', None, SUITES, 'vbench_long is VBench-Long, for long videos.', required=True
    )
    flags.DEFINE_string(
        'source',
        None,
        "The suite's own prompts: VBench_full_info.json, metadata.json or meta_data of "
        'a checkout. Without it layout takes any stories of two scenes or more.',
    )
    flags.DEFINE_string(
        'videos', None, 'layout: what sample wrote, in the folder or in folders in it.'
    )
    flags.DEFINE_list(
        'category', [], 'Only these dimensions or categories of --source; default: all.'
    )
    flags.DEFINE_integer(
        'frames',
        None,
        'prompts: frames of a video; default: as many as sample makes.',
        lower_bound=2,
    )
    flags.DEFINE_string('out', None, 'A new folder.', required=True)
    app.run(main)
