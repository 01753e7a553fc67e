"""Scores multi-scene videos: consistency as in the paper's table, subject, captions, cuts, Fréchet
distance.

  python -m mask2dit_jax.evaluate --videos=samples --encoder=clip-vit-large-patch14 --out=scores
  python -m mask2dit_jax.evaluate --videos=samples --encoder=clip-vit-large-patch14 --frame_encoder=dinov2-base \\
    --video_encoder=videomae-base-finetuned-kinetics --reference=real --out=scores
  python -m mask2dit_jax.evaluate --videos=samples --features=features.safetensors --out=scores

--videos is what sample wrote: mp4 files beside a story.json, in the folder or in folders in it; or
any mp4 files of one story that --story names. Encoders are folders as transformers writes them
(model_type clip, dinov2, dinov2_with_registers or videomae). A scene's feature is the mean of the
normalised features of --frames of its frames, evenly spread from first to last; that of a clip
encoder is of the frames that it takes, spread likewise.

Features of any other encoder, such as ViCLIP, come in a safetensors file, with NAME the path of a
video in --videos, without .mp4: NAME/scenes [S, D], a feature per scene, and if you have them
NAME/captions [S, D], NAME/frames/0 [F, E], NAME/frames/1 and so on, the frames of each scene,
NAME/video [1, K], and reference [R, K] for the Fréchet distance. What is not there is not scored.
Encoders' features are written to features.safetensors in --out, in the same form.

--out gets evaluation.md and evaluation.json: means over videos with 95 % bootstrap intervals. Which
pairs of scenes, frames and encoder the paper took is not known: compare numbers of one protocol.
"""

from absl import app, flags

from mask2dit_jax import logs
from mask2dit_jax.evaluation import evaluator, report_table


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f'Unknown arguments {" ".join(argv[1:])}: see --help.')
    logs.quiet_libraries()
    names = (
        'story',
        'encoder',
        'frame_encoder',
        'video_encoder',
        'features',
        'reference',
        'frames',
        'seed',
    )
    print(
        report_table.report(
            evaluator.evaluate(
                flags.FLAGS.videos, flags.FLAGS.out, **{n: flags.FLAGS[n].value for n in names}
            )
        ),
        end='',
    )


if __name__ == '__main__':
    flags.DEFINE_string(
        'videos', None, 'Folder of mp4 files beside story.json, or of such folders.', required=True
    )
    flags.DEFINE_string(
        'story', None, 'Story file of all mp4 files in --videos, instead of story.json beside them.'
    )
    flags.DEFINE_string(
        'encoder',
        None,
        'Folder of the encoder of scenes and captions: CLIP. One without captions '
        '(DINOv2, VideoMAE) gives no semantic consistency.',
    )
    flags.DEFINE_string(
        'frame_encoder',
        None,
        'Folder of the encoder of frames for the subject, e.g. DINOv2; default: --encoder.',
    )
    flags.DEFINE_string(
        'video_encoder',
        None,
        'Folder of the encoder of whole videos for the Fréchet distance, e.g. '
        'VideoMAE; default: --encoder.',
    )
    flags.DEFINE_string(
        'features', None, 'Safetensors file of features, instead of encoders: see above.'
    )
    flags.DEFINE_string(
        'reference', None, 'Folder of real mp4 files, also below it, for the Fréchet distance.'
    )
    flags.DEFINE_integer(
        'frames',
        8,
        'Frames of a scene (and of a whole video) that are encoded, evenly from first to '
        'last; clip encoders take their own number.',
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
