"""Manifests, the frames that make a clip, and what video files really hold."""

import json

import numpy as np
import pytest
from conftest import damage, moving, panned, turn, write_times

from mask2dit_jax.data import clips, manifest, video

# x264's assembly makes other bytes of the same frames, depending on what lies in memory. In some of
# them the damage that a test does is another legal video; without assembly the bytes are always the
# same.
REPEATABLE = {'crf': '16', 'x264-params': 'asm=0'}


def test_chosen_frames_are_those_of_a_whole_decoding(tmp_path):
    video.write_mp4(tmp_path / 'a.mp4', moving(60), 25)
    info = video.probe(tmp_path / 'a.mp4')
    assert (len(info.times), info.fps, info.height_px, info.width_px) == (60, 25, 32, 48)
    assert not info.rotation_deg and not info.variable_rate
    whole, _ = video.read_video(tmp_path / 'a.mp4', height_px=16, width_px=16)
    for indices in ([0, 1, 2], [17, 20, 41], [59]):
        some = video.read_frames(tmp_path / 'a.mp4', info, indices, height_px=16, width_px=16)
        np.testing.assert_array_equal(some, whole[indices])


def test_rotated_videos_are_turned(tmp_path):
    video.write_mp4(tmp_path / 'a.mp4', moving(), 25)
    turn(tmp_path / 'a.mp4', tmp_path / 'turned.mp4')
    info = video.probe(tmp_path / 'turned.mp4')
    assert (info.rotation_deg, info.height_px, info.width_px) == (-90, 48, 32)

    upright = np.rot90(video.read_video(tmp_path / 'a.mp4')[0], -1, (1, 2))
    np.testing.assert_array_equal(video.read_video(tmp_path / 'turned.mp4')[0], upright)
    some = video.read_frames(tmp_path / 'turned.mp4', info, [3, 9], height_px=48, width_px=32)
    np.testing.assert_array_equal(some, upright[[3, 9]])


def test_variable_rates_are_read_at_a_constant_one(tmp_path):
    ticks = [0, 1, 2, 3, 4, 5, 15, 16, 17, 18, 19, 20]  # the sixth frame lasts ten times as long
    write_times(tmp_path / 'a.mp4', moving(12), ticks)
    info = video.probe(tmp_path / 'a.mp4')
    assert info.variable_rate and len(info.times) == 12
    shown = [
        max(i for i, t in enumerate(ticks) if t <= tick * 20 / 11 + 1e-3) for tick in range(12)
    ]
    assert info.timeline.tolist() == shown and shown.count(5) > 3

    write_times(tmp_path / 'b.mp4', moving(12), range(12))
    assert not video.probe(tmp_path / 'b.mp4').variable_rate


@pytest.mark.parametrize('at', [0.0, 0.2, 0.5, 1.0])
def test_damage_is_not_read_over(at, tmp_path):
    """FFmpeg alone would copy what it cannot read from the frame before.

    Bytes changed elsewhere can make another legal video, whose damage nobody can see.
    """
    video._encode(str(tmp_path / 'a.mp4'), panned(), 25, 'libx264', REPEATABLE)
    damage(tmp_path / 'a.mp4', tmp_path / 'b.mp4', at)
    info = video.probe(tmp_path / 'a.mp4')
    with pytest.raises(ValueError, match=r'b\.mp4.*replace or re-encode'):
        video.read_frames(tmp_path / 'b.mp4', info, range(40), height_px=64, width_px=64)
    with pytest.raises(ValueError, match=r'b\.mp4.*replace or re-encode'):
        video.read_video(tmp_path / 'b.mp4')


def reference_single(n, frames, rng):
    """The reference's draw for the pretraining set, by its constants."""
    end = int(0.95 * n)
    last_start = end - ((frames - 1) * 3 + 1)
    return int(rng.integers(int(0.05 * end), last_start + 1)) + 3 * np.arange(frames)


@pytest.mark.parametrize('n', [164, 170, 300])
def test_frames_of_single_clips(n):
    for seed in range(20):
        got = clips.choose_frames(manifest.SINGLE_SCENE, n, 49, 3, np.random.default_rng(seed))
        np.testing.assert_array_equal(got, reference_single(n, 49, np.random.default_rng(seed)))
        assert got[0] >= int(0.05 * int(0.95 * n)) and got[-1] < int(0.95 * n)

    starts = {
        clips.choose_frames(manifest.SINGLE_SCENE, 164, 49, 3, np.random.default_rng(s))[0]
        for s in range(300)
    }
    assert starts == set(range(7, 11))  # int(.05 * 155) ... 155 - 145

    with pytest.raises(ValueError, match='163 frames and 49 were asked for'):
        clips.choose_frames(manifest.SINGLE_SCENE, 163, 49, 3, np.random.default_rng(0))


@pytest.mark.parametrize('n, stride', [(145, 3), (200, 3), (144, 2), (97, 2), (96, 1), (49, 1)])
def test_frames_of_story_clips(n, stride):
    for seed in range(20):
        got = clips.choose_frames(manifest.MULTI_SCENE, n, 49, 3, np.random.default_rng(seed))
        assert len(got) == 49
        assert set(np.diff(got)) == {stride}
        assert got[0] >= 0 and got[-1] < n

    with pytest.raises(ValueError, match='48 frames and 49 were asked for'):
        clips.choose_frames(manifest.MULTI_SCENE, 48, 49, 3, np.random.default_rng(0))


def test_csv_manifest(tmp_path):
    path = tmp_path / 'clips.csv'
    path.write_text(
        '\ufefffps,width,height,caption,path,num_frame\n'
        '25,640,480,"a cat, asleep",sub/a.mp4,200\n'
        '25,640,480,a dog,/b.mp4,\n'
    )
    found = manifest.read(path)
    assert found.kind == manifest.SINGLE_SCENE and not found.problems
    a, b = found.clips
    assert (a.path, a.caption, a.claims) == (
        tmp_path / 'sub/a.mp4',
        'a cat, asleep',
        {'frames': 200, 'height_px': 480, 'width_px': 640},
    )
    assert str(b.path) == '/b.mp4' and 'frames' not in b.claims and (a.story, b.story) == (0, 1)
    assert manifest.read(path, root='/videos').clips[0].path.as_posix() == '/videos/sub/a.mp4'


def test_json_manifests(tmp_path):
    """The reference's list, and stories with scenes of their own lengths: together, or one
    alone."""
    path = tmp_path / 'stories.json'
    path.write_text(
        json.dumps(
            [
                {
                    'prefix': 'x',
                    'values': [
                        {'vid': 1, 'url': 'a.mp4', 'caption': 'A', 'duration': 2.5},
                        {'url': 'b.mp4', 'caption': 'B', 'width': 64},
                    ],
                }
            ]
        )
    )
    assert [
        (c.story, c.scene, c.path.name, c.caption, c.frames, c.claims)
        for c in manifest.read(path).clips
    ] == [(0, 0, 'a.mp4', 'A', None, {}), (0, 1, 'b.mp4', 'B', None, {'width_px': 64})]

    story = {
        'scenes': [
            {'video': 'a.mp4', 'caption': 'A', 'frames': 9},
            {'video': 'b.mp4', 'caption': 'B'},
        ]
    }
    for content, stories in ((story, [0, 0]), ({'stories': [story, story]}, [0, 0, 1, 1])):
        path.write_text(json.dumps(content))
        found = manifest.read(path)
        assert found.kind == manifest.MULTI_SCENE and [c.story for c in found.clips] == stories
        assert [c.frames for c in found.clips] == [9, None] * (len(stories) // 2)


BAD_MANIFESTS = {
    'no columns': ('m.csv', 'a,b\n1,2\n', 'm.csv has no column caption, path'),
    'nothing in it': ('m.csv', 'caption,path\n', 'm.csv lists no usable clip'),
    'not UTF-8': ('m.csv', b'caption,path\n\xff\xfe,a.mp4\n', 'm.csv is not UTF-8'),
    'kind unknown': ('m.tsv', 'caption\tpath\n', 'm.tsv is neither .csv nor .json'),
    'no JSON': ('m.json', '[{"values": ', r'm.json is not JSON \(.*line 1'),
    'JSON of another kind': ('m.json', '7', 'm.json holds neither a list nor an object'),
    'JSON without clips': (
        'm.json',
        '[{"prefix": "a"}]',
        'no usable clip; first of 1 problems: no list "values"',
    ),
}


@pytest.mark.parametrize('case', BAD_MANIFESTS)
def test_bad_manifests_are_named(case, tmp_path):
    name, content, message = BAD_MANIFESTS[case]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        manifest.read(tmp_path / name)


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'm\.csv is not a file: check --manifest'):
        manifest.read(tmp_path / 'm.csv')


BAD_ROWS = [
    ('m.csv', 'a,b,c', 'line 3', '3 fields instead of 2: quote captions'),
    ('m.csv', ' ,a.mp4', 'line 3', 'it has no caption'),
    ('m.csv', 'a cat,', 'line 3', 'it names no video'),
    ('m.json', {'values': []}, 'story 1', 'no list "values" or "scenes"'),
    ('m.json', 'a.mp4', 'story 1', 'no list "values" or "scenes"'),
    ('m.json', {'values': ['a.mp4']}, 'story 1 scene 0', 'must be an object'),
    ('m.json', {'values': [{'url': 'a.mp4'}]}, 'story 1 scene 0', 'it has no caption'),
    ('m.json', {'values': [{'caption': 'a'}]}, 'story 1 scene 0', 'it names no video'),
    (
        'm.json',
        {'scenes': [{'video': 'a.mp4', 'caption': 'a', 'frames': 4.5}]},
        'story 1 scene 0',
        'frames is 4.5',
    ),
]


@pytest.mark.parametrize('name, row, where, message', BAD_ROWS, ids=str)
def test_bad_rows_are_counted_and_the_rest_is_kept(name, row, where, message, tmp_path):
    good = {'values': [{'url': 'good.mp4', 'caption': 'good'}]}
    (tmp_path / name).write_text(
        f'caption,path\ngood,good.mp4\n{row}\n'
        if name == 'm.csv'
        else json.dumps([good, row, good])
    )
    found = manifest.read(tmp_path / name)
    (problem,) = found.problems
    assert problem.kind == 'malformed row'
    assert problem.where == f'{name} {where}'
    assert message in problem.message
    assert {c.path.name for c in found.clips} == {'good.mp4'}


def test_strange_numbers_are_noted(tmp_path):
    (tmp_path / 'm.csv').write_text('caption,path,num_frame\na cat,a.mp4,many\n')
    found = manifest.read(tmp_path / 'm.csv')
    assert len(found.clips) == 1
    assert found.problems[0].used
    assert "frames is 'many'" in found.problems[0].message
