"""A lower layer never imports a higher one, and nothing imports a package that is forbidden."""

import ast
import pathlib

import mask2dit_jax

PACKAGE = pathlib.Path(mask2dit_jax.__file__).parent

# The lowest layer is the first: a layer imports itself and the layers before it. Nothing imports a
# command.
ORDER = (
    'hardware',
    'layout',
    'logs',
    'paths',
    'ranges',
    'storage',
    'tables',
    'tensor_io',
    'distributed',
    'attention',
    'diffusion',
    'models',
    'config',
    'presets',
    'checkpoint',
    'pretrained',
    'stories',
    'data',
    'evaluation',
    'generation',
    'pipeline',
    'training',
    'aot',
    'benchmark',
    'tools',
    'main',
    'sample',
    'encode',
    'convert',
    'evaluate',
)
COMMANDS = ORDER[ORDER.index('main') :]

FORBIDDEN = {'torch', 'tensorflow', 'clu', 'pickle', 'diffusers', 'transformers'}
# The benchmark compares with diffusers if it is installed.
EXCEPTIONS = {('benchmark', 'torch'), ('benchmark', 'diffusers')}


def imports(path):
    """Names of everything that a file imports: modules, and what is taken from them."""
    for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def test_order():
    files = [path for path in PACKAGE.rglob('*.py') if path != PACKAGE / '__init__.py']
    assert len(files) > 60

    for path in files:
        layer = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
        assert layer in ORDER, f'{layer} has no place: add it to ORDER.'
        lower = ORDER[: ORDER.index(layer)]

        for name in imports(path):
            root, *rest = name.split('.')
            is_allowed = root not in FORBIDDEN or (layer, root) in EXCEPTIONS
            assert is_allowed, f'{path} imports {name}'

            if root == 'mask2dit_jax' and rest and rest[0] != layer:
                message = f'{path} imports {name}, which does not stand before {layer}'
                assert rest[0] in lower, message
                assert rest[0] not in COMMANDS, f'{path} imports the command {name}'
