"""A lower layer never imports a higher one, and nothing imports what the package must not."""

import ast
import pathlib

import mask2dit_jax

PACKAGE = pathlib.Path(mask2dit_jax.__file__).parent
# Lowest first: each imports itself and what stands before it. Nothing imports a command, and tools
# only each other.
ORDER = (
    'hardware',
    'layout',
    'logs',
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
COMPARED = {('benchmark', 'torch'), ('benchmark', 'diffusers')}  # if they are installed


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f'{node.module}.{alias.name}' for alias in node.names)


def test_order():
    files = [p for p in PACKAGE.rglob('*.py') if p != PACKAGE / '__init__.py']
    assert len(files) > 60
    for path in files:
        top = path.relative_to(PACKAGE).parts[0].removesuffix('.py')
        assert top in ORDER, f'{top} has no place: add it to ORDER.'
        for name in imports(path):
            root, *rest = name.split('.')
            assert root not in FORBIDDEN or (top, root) in COMPARED, f'{path} imports {name}'
            if root == 'mask2dit_jax' and rest and rest[0] != top:
                assert rest[0] in ORDER[: ORDER.index(top)], (
                    f'{path} imports {name}, which does not stand before {top}'
                )
                assert rest[0] not in COMMANDS, f'{path} imports the command {name}'
