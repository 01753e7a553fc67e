"""What other packages are relied upon: versions within tested bounds, and names that they do not
promise to keep."""

import ast
import importlib
import importlib.metadata
import inspect
import pathlib
import re

import packaging.requirements
import packaging.specifiers
import pytest

import mask2dit_jax

PACKAGE = pathlib.Path(mask2dit_jax.__file__).parent
TESTS = pathlib.Path(__file__).parent

# Distribution, the versions that were tried, the only file that uses the name, where it is, and
# what it is called with: of a function its parameters, of a dataclass those of its fields that we
# set.
PRIVATE = [
    (
        'jax',
        '0.10.2, 0.11.2, 0.12.0.1',
        PACKAGE / 'distributed/multihost.py',
        'jax._src.hardware_utils',
        'num_available_tpu_chips_and_device_id',
        (),
    ),
    (
        'jax',
        '0.10.2, 0.11.2, 0.12.0.1',
        TESTS / 'attention/attend_test.py',
        'jax._src.cudnn.fused_attention_stablehlo',
        'check_cudnn_version',
        (),
    ),
    (
        'orbax-checkpoint',
        '0.12.5, 0.12.8',
        PACKAGE / 'tensor_io.py',
        'orbax.checkpoint.type_handlers',
        'NumpyHandler._open_and_write',
        ('self', 'value', 'tspec', 'ts_context'),
    ),
    (
        'tokamax',
        '0.0.12, 0.0.17',
        PACKAGE / 'attention/splash.py',
        'tokamax._src.ops.experimental.tpu.splash_attention.splash_attention_kernel',
        'SplashConfig',
        (
            'block_q',
            'block_kv',
            'block_kv_compute',
            'block_q_dkv',
            'block_kv_dkv',
            'block_kv_dkv_compute',
            'dq_reduction_steps',
            'residual_checkpoint_name',
            'interpret',
        ),
    ),
    (
        'tokamax',
        '0.0.12, 0.0.17',
        PACKAGE / 'attention/splash.py',
        'tokamax._src.ops.experimental.tpu.splash_attention.splash_attention_kernel',
        'make_splash_mha_single_device',
        ('mask', 'config'),
    ),
]


def changed(
    version: str, distribution: str, tried: str, path: pathlib.Path, module: str, name: str, wanted
) -> str:
    """A sentence on what a version of a distribution did to a private name; '' if it is as it
    was."""
    told = f'{distribution} {version} has changed {module}.{name}, which was as {path.name} needs it in {tried}:'
    try:
        found = importlib.import_module(module)
        for part in name.split('.'):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        return f'{told} {error}. Mend {path}.'
    parameters = inspect.signature(found).parameters
    variadic = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    needed = {n for n, p in parameters.items() if p.default is p.empty and p.kind not in variadic}
    # What we give must be taken, and nothing else may be asked for.
    if needed <= set(wanted) <= set(parameters):
        return ''
    return f'{told} its parameters are {", ".join(parameters)}. Mend {path}.'


@pytest.mark.parametrize('row', PRIVATE, ids=[f'{row[0]}-{row[4]}' for row in PRIVATE])
def test_private_names_are_as_they_were(row):
    try:
        version = importlib.metadata.version(row[0])
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f'needs {row[0]}')
    message = changed(version, *row)
    assert not message, message


def test_a_changed_name_is_told_with_the_version():
    row = ('jax', '0.10.2', PACKAGE / 'distributed/multihost.py', 'jax._src.hardware_utils')
    assert changed('9.9', *row, 'no_such_function', ()).startswith(
        'jax 9.9 has changed jax._src.hardware_utils.no_such_function, which was as multihost.py needs it in 0.10.2:'
    )
    more = changed('9.9', *row, 'num_available_tpu_chips_and_device_id', ('other',))
    assert 'its parameters are ' in more


def test_private_names_stand_in_one_place_each():
    """No other import of a private module of other packages, in the code or in tests."""
    listed = {(path, module) for _, _, path, module, _, _ in PRIVATE if '._' in module}
    found = set()
    for path in [*PACKAGE.rglob('*.py'), *TESTS.rglob('*.py')]:
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f'{node.module}.{alias.name}' for alias in node.names]
            else:
                continue
            found |= {(path, name) for name in names if '._' in name}
    assert found == listed


def requirements() -> list[packaging.requirements.Requirement]:
    """Those of setup.py, as they were installed: of the package and of all its extras."""
    return [
        packaging.requirements.Requirement(text)
        for text in importlib.metadata.requires('mask2dit_jax')
    ]


def test_requirements_have_both_bounds():
    for requirement in requirements():
        operators = {clause.operator for clause in requirement.specifier}
        assert operators in ({'>=', '<'}, {'=='}), f'{requirement} has not both bounds'


def test_installed_versions_are_within_the_bounds():
    """What is outside was put there by hand, and has not been tried."""
    for requirement in requirements():
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed
        assert requirement.specifier.contains(version), (
            f'{requirement.name} {version} is not {requirement.specifier}'
        )


def test_launch_takes_the_pythons_that_setup_allows():
    """A new TPU VM may have any Python: the one that launch/worker.sh asks for is one that setup.py
    allows."""
    asked = re.search(
        r"--python '([^']+)'", (PACKAGE.parent / 'launch/worker.sh').read_text()
    ).group(1)
    allowed = importlib.metadata.metadata('mask2dit_jax')['Requires-Python']
    assert packaging.specifiers.SpecifierSet(asked) == packaging.specifiers.SpecifierSet(allowed)
