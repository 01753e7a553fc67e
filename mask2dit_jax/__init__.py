"""Mask²DiT in JAX: one long video of several scenes, each following its own caption.

import mask2dit_jax

model = mask2dit_jax.load('runs/tiny')
video = model.generate(['red ring on gray moves left', 'it grows', 'it blinks'])
video.save('samples')
"""

__version__ = '0.1.0'


def load(path, **settings):
    """Opens a model for generation; mask2dit_jax.pipeline.load says what it takes and returns."""
    # Only here, so that importing the package imports neither JAX nor the video libraries.
    from mask2dit_jax import pipeline

    return pipeline.load(path, **settings)
