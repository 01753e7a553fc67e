"""Mask²DiT in JAX: one long video of several scenes, each following its own caption."""

__version__ = '0.1.0'
