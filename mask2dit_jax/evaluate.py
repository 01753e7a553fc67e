"""Scores multi-scene videos: consistency as in the paper's table, subject, captions, cuts, FVD.

Required flags: --videos, the folder of the videos, --out, the folder of the scores, and either
--encoder or --features.

  python -m mask2dit_jax.evaluate --videos=samples --encoder=clip-vit-large-patch14 --out=scores
  python -m mask2dit_jax.evaluate --videos=samples --encoder=clip-vit-large-patch14 \\
    --frame_encoder=dinov2-base --video_encoder=videomae-base-finetuned-kinetics \\
    --reference=real --out=scores
  python -m mask2dit_jax.evaluate --videos=samples --features=features.safetensors --out=scores

--videos is a folder that sample wrote: mp4 files beside a story.json, in the folder itself or in
folders below it. With --story it may be any folder of mp4 files that all show this story.

Encoders are folders as transformers writes them (model_type clip, dinov2, dinov2_with_registers or
videomae). An encoder of pictures encodes --frames frames of a scene, evenly spread from first to
last; the feature of the scene is the mean of their features, each scaled to length 1. An encoder of
clips encodes as many frames as it is made for, spread in the same way.

Features of any other encoder, such as ViCLIP, come in a safetensors file with these names, where
NAME is the path of a video below --videos, without .mp4:

  NAME/scenes    [S, D]  one feature per scene
  NAME/captions  [S, D]  one feature per caption (optional)
  NAME/frames/0  [F, E]  the frames of the first scene, then NAME/frames/1 and so on (optional)
  NAME/video     [1, K]  the whole video, for the Fréchet distance (optional)
  reference      [R, K]  the reference videos, for the Fréchet distance (optional)

A score whose features are missing is left out. The features of the encoders are written to
features.safetensors in --out, in the same form. Such a file knows its videos and stories: others of
the same name are refused.

--out receives evaluation.md and evaluation.json: means over the videos with 95 % bootstrap
intervals. They replace those of an earlier evaluation. The paper does not say which pairs of
scenes, which frames and which encoder it takes: compare only numbers of one protocol.
"""

from absl import app, flags

from mask2dit_jax import logs
from mask2dit_jax.evaluation import evaluator, report_table


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'Unknown arguments {" ".join(argv[1:])}: see --help.')
    logs.quiet_libraries()

    result = evaluator.evaluate(
        flags.FLAGS.videos,
        flags.FLAGS.out,
        story=flags.FLAGS.story,
        encoder=flags.FLAGS.encoder,
        frame_encoder=flags.FLAGS.frame_encoder,
        video_encoder=flags.FLAGS.video_encoder,
        features=flags.FLAGS.features,
        reference=flags.FLAGS.reference,
        frames=flags.FLAGS.frames,
        seed=flags.FLAGS.seed,
    )
    print(report_table.report(result), end='')


if __name__ == '__main__':
    flags.DEFINE_string(
        'videos',
        None,
        'Folder of mp4 files beside a story.json, or of such folders.',
        required=True,
    )
    flags.DEFINE_string(
        'story',
        None,
        'Story file of all mp4 files in --videos, instead of a story.json beside them.',
    )
    flags.DEFINE_string(
        'encoder',
        None,
        'Folder of the encoder of scenes and captions: CLIP. DINOv2 and VideoMAE do not encode '
        'captions, so they give no semantic consistency.',
    )
    flags.DEFINE_string(
        'frame_encoder',
        None,
        'Folder of the encoder of frames for the subject, e.g. DINOv2. The default is --encoder.',
    )
    flags.DEFINE_string(
        'video_encoder',
        None,
        'Folder of the encoder of whole videos for the Fréchet distance, e.g. VideoMAE. The '
        'default is --encoder.',
    )
    flags.DEFINE_string(
        'features',
        None,
        'Safetensors file of features, which replaces the encoders; its names are above.',
    )
    flags.DEFINE_string(
        'reference',
        None,
        'Folder of real mp4 files for the Fréchet distance; those in folders below it count too.',
    )
    flags.DEFINE_integer(
        'frames',
        8,
        'Number of frames of a scene (and of a whole video) that are encoded, evenly spread from '
        'first to last. Encoders of clips take their own number.',
        lower_bound=2,
    )
    flags.DEFINE_integer('seed', 0, 'Seed of the bootstrap.')
    flags.DEFINE_string(
        'out',
        None,
        'Folder for evaluation.md, evaluation.json and features.safetensors.',
        required=True,
    )
    app.run(main)
