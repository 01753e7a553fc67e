"""A lower layer never imports a higher one, and nothing imports what the package must not."""
import ast
import pathlib

import mask2dit_jax

PACKAGE = pathlib.Path(mask2dit_jax.__file__).parent
LAYERS = (
    ('scenes', 'diffusion', 'hlo', 'sharding', 'video', 'metric_writer', 'weights', 'processes', 'metrics', 'datasets'),
    ('attention', 'context_parallel', 'samplers', 'splash'),
    ('models',),
    ('config', 'presets', 'chips', 'checkpoint'),
    ('lora',),
    ('convert', 'random_model', 'encoders'),
    ('data', 'runs'),
    ('train_step', 'generate'),
    ('train',),
    ('main', 'sample', 'encode', 'evaluate', 'report', 'benchmark', 'benchmark_worker', 'aot',
     'figures'),
    ('rank', 'suites'),
)
FORBIDDEN = {'torch', 'tensorflow', 'clu', 'pickle', 'diffusers', 'transformers'}
COMPARED = {('benchmark_worker', 'torch'), ('benchmark_worker', 'diffusers')}  # if they are installed


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def layer_of(name):
    return next((i for i, layer in enumerate(LAYERS) if name in layer), None)


def test_layers():
    files = [p for p in PACKAGE.rglob('*.py') if p.name != '__init__.py']
    assert len(files) > 15
    for path in files:
        top = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
        assert layer_of(top) is not None, f'{top} is in no layer: add it to LAYERS.'
        for name in imports(path):
            root, *rest = name.split('.')
            assert root not in FORBIDDEN or (top, root) in COMPARED, f'{path} imports {name}'
            if root == 'mask2dit_jax' and rest:
                assert layer_of(rest[0]) <= layer_of(top), f'{path} imports {name} from a higher layer'
