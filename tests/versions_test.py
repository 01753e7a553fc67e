"""Other packages: their versions are within tested bounds, and the private names that we use are as
they were when the versions were tried."""

import ast
import importlib
import importlib.metadata
import inspect
import pathlib
import re
from typing import NamedTuple

import packaging.requirements
import packaging.specifiers
import pytest

import mask2dit_jax

PACKAGE = pathlib.Path(mask2dit_jax.__file__).parent
TESTS = pathlib.Path(__file__).parent


class PrivateName(NamedTuple):
    """A name that another package does not promise to keep.

    Attributes:
      distribution: the other package.
      tried: versions that were tried.
      path: the only file that uses the name.
      module: the module that has the name.
      name: the name.
      arguments: parameters of a function, or the fields of a dataclass that we set.
    """

    distribution: str
    tried: str
    path: pathlib.Path
    module: str
    name: str
    arguments: tuple[str, ...]


_SPLASH = 'tokamax._src.ops.experimental.tpu.splash_attention.splash_attention_kernel'
PRIVATE = [
    PrivateName(
        'jax',
        '0.10.2, 0.11.2, 0.12.0.1',
        PACKAGE / 'distributed/multihost.py',
        'jax._src.hardware_utils',
        'num_available_tpu_chips_and_device_id',
        (),
    ),
    PrivateName(
        'jax',
        '0.10.2, 0.11.2, 0.12.0.1',
        TESTS / 'attention/attend_test.py',
        'jax._src.cudnn.fused_attention_stablehlo',
        'check_cudnn_version',
        (),
    ),
    PrivateName(
        'orbax-checkpoint',
        '0.12.5, 0.12.8',
        PACKAGE / 'tensor_io.py',
        'orbax.checkpoint.type_handlers',
        'NumpyHandler._open_and_write',
        ('self', 'value', 'tspec', 'ts_context'),
    ),
    PrivateName(
        'tokamax',
        '0.0.12, 0.0.17',
        PACKAGE / 'attention/splash.py',
        _SPLASH,
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
    PrivateName(
        'tokamax',
        '0.0.12, 0.0.17',
        PACKAGE / 'attention/splash.py',
        _SPLASH,
        'make_splash_mha_single_device',
        ('mask', 'config'),
    ),
]


def changed(version: str, private: PrivateName) -> str:
    """A sentence that says how this version changed a private name; '' if the name is as it was."""
    told = (
        f'{private.distribution} {version} has changed {private.module}.{private.name}, which was '
        f'as {private.path.name} needs it in {private.tried}:'
    )
    try:
        found = importlib.import_module(private.module)
        for part in private.name.split('.'):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        return f'{told} {error}. Mend {private.path}.'

    parameters = inspect.signature(found).parameters
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = {
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty and parameter.kind not in variadic
    }

    # Our arguments must be taken, and no other ones may be required.
    if required <= set(private.arguments) <= set(parameters):
        return ''
    return f'{told} its parameters are {", ".join(parameters)}. Mend {private.path}.'


@pytest.mark.parametrize(
    'private', PRIVATE, ids=[f'{private.distribution}-{private.name}' for private in PRIVATE]
)
def test_private_names_are_as_they_were(private):
    try:
        version = importlib.metadata.version(private.distribution)
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f'needs {private.distribution}')
    message = changed(version, private)
    assert not message, message


def test_a_changed_name_is_told_with_the_version():
    private = PRIVATE[0]
    gone = private._replace(name='no_such_function')
    assert changed('9.9', gone).startswith(
        'jax 9.9 has changed jax._src.hardware_utils.no_such_function, which was as multihost.py '
        'needs it in 0.10.2'
    )

    other_arguments = private._replace(arguments=('other',))
    assert 'its parameters are ' in changed('9.9', other_arguments)


def test_private_names_stand_in_one_place_each():
    """Neither the code nor the tests import other private modules of other packages."""
    listed = {(private.path, private.module) for private in PRIVATE if '._' in private.module}
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
    """The requirements of the installed package and of all its extras, as in setup.py."""
    return [
        packaging.requirements.Requirement(text)
        for text in importlib.metadata.requires('mask2dit_jax')
    ]


def test_requirements_have_both_bounds():
    for requirement in requirements():
        operators = {clause.operator for clause in requirement.specifier}
        assert operators in ({'>=', '<'}, {'=='}), f'{requirement} needs both bounds'


def test_installed_versions_are_within_the_bounds():
    """A version outside the bounds was installed by hand, and has not been tried."""
    for requirement in requirements():
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue  # an extra that is not installed
        assert requirement.specifier.contains(version), (
            f'{requirement.name} {version} is not {requirement.specifier}'
        )


def test_launch_takes_the_pythons_that_setup_allows():
    """A new TPU VM may have any Python, so launch/worker.sh asks for one that setup.py allows."""
    script = (PACKAGE.parent / 'launch/worker.sh').read_text()
    asked = re.search(r"--python '([^']+)'", script).group(1)
    allowed = importlib.metadata.metadata('mask2dit_jax')['Requires-Python']
    assert packaging.specifiers.SpecifierSet(asked) == packaging.specifiers.SpecifierSet(allowed)
