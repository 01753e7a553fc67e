"""Clips of real videos: manifests of them (manifest) and the data sets that encode makes (records)."""
from mask2dit_jax.datasets.clips.manifest import KINDS, MULTI_SCENE, SINGLE_SCENE, Clip, Problem, choose_frames, read
from mask2dit_jax.datasets.clips.records import (
    STORES,
    Records,
    part_path,
    read_settings,
    write_info,
    write_part,
    write_settings,
)

__all__ = ['KINDS', 'MULTI_SCENE', 'SINGLE_SCENE', 'STORES', 'Clip', 'Problem', 'Records', 'choose_frames',
           'part_path', 'read', 'read_settings', 'write_info', 'write_part', 'write_settings']
