"""Reads and writes files of tensors that are larger than the host's memory, one tensor at a time.

There are two formats: folders of .safetensors files, and items of Orbax checkpoints. Opening either
of them reads names, shapes and dtypes alone; values are read when they are asked for. Writing takes
functions that make one tensor, or one layer of a stacked one, after the other. Whatever is wrong
with a file is one error that names the file.
"""

import dataclasses
import errno
import functools
import json
import pathlib
import re
import uuid
from collections.abc import Callable
from typing import NamedTuple

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
import tensorstore as ts

SHARD_BYTES = 1 << 30  # of an exported file; what is being written is in memory twice
_DTYPES = {'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16}
_PICKLED = ('.bin', '.pt', '.pth', '.ckpt')
_NOTHING = '(?!)'  # a regular expression that matches no name

# What the system says of files that are gone, or are something else.
_LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
# What tensorstore says of content that is not what was written.
_BROKEN = ('NOT_FOUND', 'DATA_LOSS', 'INVALID_ARGUMENT', 'FAILED_PRECONDITION', 'OUT_OF_RANGE')


def is_damage(error: BaseException) -> bool:
    """Whether a failed read shows that files are broken, so that reading again is of no use.

    Files that are missing, and content that cannot be parsed, are damage. Anything else may pass,
    or is mended without touching the files: too many open files, no memory, no permission, an input
    or output error, a server that does not answer.

    Args:
      error: what was raised; what caused it counts, too.
    """
    broken = False
    while error is not None:
        if _may_pass(error):
            return False
        # A bare Exception, which Orbax raises, says nothing.
        broken = broken or type(error) is not Exception
        hidden = error.__suppress_context__
        error = error.__cause__ or (None if hidden else error.__context__)
    return broken


def _may_pass(error: BaseException) -> bool:
    """Whether this error alone, without what caused it, is one that another try may not meet."""
    if found := re.search(r"os_error_code='(\d+)'", str(error)):  # tensorstore's
        return int(found[1]) not in _LOST
    if isinstance(error, OSError):
        return not isinstance(error, (FileNotFoundError, NotADirectoryError, IsADirectoryError))
    if isinstance(error, (MemoryError, RuntimeError)):  # JAX's are RuntimeErrors
        return True
    status = re.match(r'([A-Z_]{4,}): ', str(error))
    return status is not None and status[1] not in _BROKEN


# .safetensors files.


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file: shape and dtype are known, and np.asarray reads the values."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.read(), dtype)


class File(NamedTuple):
    """The content of one .safetensors file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def open_safetensors(folder, unused: str = _NOTHING) -> dict[str, Tensor]:
    """Opens all .safetensors files of a folder; only their headers are read.

    Args:
      folder: the folder.
      unused: regular expression of whole names that are left out, whatever dtype they have.

    Returns:
      Tensors by name.

    Raises:
      FileNotFoundError: if there is no folder or no file, or if a file is missing that the index
        lists.
      ValueError: naming the file, if a file is damaged or cut off, if there are only pickled
        weights, if a tensor is there twice or is missing although the index lists it, or if a
        tensor does not hold floats.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder} is not a folder.')
    files = sorted(folder.glob('*.safetensors'))
    pickled = [path.name for path in sorted(folder.iterdir()) if path.suffix in _PICKLED]
    if not files and pickled:
        raise ValueError(
            f'{folder} has only pickled weights ({", ".join(pickled)}), which run code when '
            'opened: load them in PyTorch and save them again with save_pretrained(..., '
            'safe_serialization=True).'
        )

    # The index lists the files of a network that is spread over several.
    file_of = _read_indices(folder)
    missing = sorted(set(file_of.values()) - {path.name for path in files})
    if missing or not files:
        raise FileNotFoundError(
            f'{folder} lacks {", ".join(missing) or "a .safetensors file"}: download or copy it '
            'again.'
        )

    tensors = {}
    for path in files:
        for name, tensor in open_file(path, unused).tensors.items():
            if name in tensors:
                raise ValueError(
                    f'{folder} has {name} in two files, one of them {path.name}: remove one set '
                    'of files.'
                )
            tensors[name] = tensor

    lost = set(file_of) - set(tensors)
    lost = sorted(name for name in lost if not re.fullmatch(unused, name))
    if lost:
        raise ValueError(
            f'{folder} lacks tensors that its index lists: {", ".join(lost[:5])}: download it '
            'again.'
        )
    return tensors


def _read_indices(folder: pathlib.Path) -> dict[str, str]:
    """The file name of each tensor, from the index of a folder; empty if there is no index."""
    file_of = {}
    for path in folder.glob('*.safetensors.index.json'):
        try:
            file_of |= json.loads(path.read_text(encoding='utf-8'))['weight_map']
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path} is not an index of safetensors files ({error!r}).') from error
    return file_of


def _safe_open(path):
    """As safetensors.safe_open, which calls any file that it cannot open a missing one."""
    with open(path, 'rb'):
        pass
    return safetensors.safe_open(path, 'np')


def open_file(path, unused: str = _NOTHING) -> File:
    """Opens one .safetensors file; only its header is read.

    Args:
      path: the file.
      unused: regular expression of whole names that are left out, whatever dtype they have.

    Returns:
      Tensors by name, and the metadata.

    Raises:
      ValueError: naming the file, if it is damaged, cut off or absent, or if a tensor does not hold
        floats.
    """
    described = {}
    try:
        with _safe_open(path) as file:
            metadata = file.metadata() or {}
            for name in file.keys():  # noqa: SIM118 (the file is not a mapping)
                if not re.fullmatch(unused, name):
                    part = file.get_slice(name)
                    described[name] = (tuple(part.get_shape()), part.get_dtype())
    except (safetensors.SafetensorError, FileNotFoundError, IsADirectoryError) as error:
        raise ValueError(
            f'{path} is damaged or not a safetensors file ({error}): copy it again.'
        ) from error

    strange = [f'{name} as {code}' for name, (_, code) in described.items() if code not in _DTYPES]
    if strange:
        raise ValueError(
            f'{path} holds {", ".join(strange)}: only {", ".join(_DTYPES)} can be read.'
        )

    tensors = {}
    for name, (shape, code) in described.items():
        read = functools.partial(_read_tensor, path, name)
        tensors[name] = Tensor(shape, np.dtype(_DTYPES[code]), read)
    return File(tensors, metadata)


def _read_tensor(path: pathlib.Path, name: str) -> np.ndarray:
    """One tensor of a file.

    The file is opened for this tensor alone: an open one keeps every page that was read in memory,
    so that the host would hold the whole file in the end.
    """
    try:
        with _safe_open(path) as file:
            return file.get_tensor(name)
    except (safetensors.SafetensorError, FileNotFoundError) as error:
        raise ValueError(f'{path} changed while it was read ({error}): copy it again.') from error


def write_safetensors(
    folder,
    stem: str,
    tensors: dict[str, Tensor],
    shard_bytes: int = SHARD_BYTES,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes tensors as STEM.safetensors, or as several numbered files with an index.

    Args:
      folder: where to write; made if it is not there.
      stem: file name without suffix.
      tensors: tensors, or arrays, by name.
      shard_bytes: size from which on another file is begun.
      metadata: for the header of each file.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for name, tensor in tensors.items():
        sizes[name] = int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize

    shards = [[]]  # the names of each file
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size

    files = [f'{stem}.safetensors']
    if len(shards) > 1:
        total = len(shards)
        files = [f'{stem}-{i + 1:05d}-of-{total:05d}.safetensors' for i in range(total)]
        file_of = {name: file for file, names in zip(files, shards) for name in names}
        index = {'metadata': {'total_size': sum(sizes.values())}, 'weight_map': file_of}
        (folder / f'{stem}.safetensors.index.json').write_text(json.dumps(index, indent=2) + '\n')

    # transformers refuses a file whose header names no format.
    header = {'format': 'pt'} | (metadata or {})
    for file, names in zip(files, shards):
        arrays = {name: np.ascontiguousarray(tensors[name]) for name in names}
        write_file(folder / file, arrays, header)


def write_file(path, arrays: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """Writes one .safetensors file, which is there whole or not at all.

    Args:
      path: the file.
      arrays: contiguous arrays by name.
      metadata: for the header.
    """
    path = pathlib.Path(path)
    # Several processes may write the same file: each has a temporary name of its own.
    temporary = path.with_name(f'{path.name}.{uuid.uuid4().hex}.tmp')

    # Some versions of safetensors make a file that nobody else may read; a new file has the mode
    # that the umask gives.
    temporary.touch()
    mode = temporary.stat().st_mode
    safetensors.numpy.save_file(arrays, temporary, metadata)
    temporary.chmod(mode)
    temporary.replace(path)


# Items of Orbax checkpoints.


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array to be written part by part.

    Attributes:
      shape: of the whole array.
      dtype: of the array.
      parts: functions that make the parts: the slices along the first axis if the array is stacked,
        otherwise the array itself.
      stacked: whether the array is written by slices.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: tuple[Callable[[], np.ndarray], ...]
    stacked: bool

    @property
    def size(self) -> int:
        """Number of elements; Orbax asks for it to refuse empty arrays."""
        return int(np.prod(self.shape))


class _LeafHandler(ocp.type_handlers.NumpyHandler):
    """Lets Orbax write a Leaf as it writes a numpy array, but one part after the other.

    Each part is a chunk of its own in the file.
    """

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def _open_and_write(self, value, tspec, ts_context):
        if value.stacked:
            tspec['metadata']['chunks'] = (1, *value.shape[1:])
        array = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        for i, part in enumerate(value.parts):
            place = array[i] if value.stacked else array
            await place.write(part())


def write_orbax(path, tree) -> None:
    """Writes an Orbax item as StandardCheckpointer does, in the place of an old one.

    Args:
      path: folder of the item.
      tree: nested dict of Leafs.
    """
    registry = ocp.type_handlers.create_type_handler_registry((Leaf, _LeafHandler()))
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    save_args = ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=SHARD_BYTES // 4)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(pathlib.Path(path).absolute(), force=True, args=save_args)


def open_orbax(path) -> dict[tuple[str, ...], ts.TensorStore]:
    """Opens an Orbax item of nested dicts; no values are read.

    Args:
      path: folder of the item.

    Returns:
      TensorStores by path in the tree; `store[i].read().result()` reads a slice.

    Raises:
      ValueError: if there is no such item, or if it is damaged. Errors that are no damage (see
        is_damage) are raised as they are.
    """
    path = pathlib.Path(path).absolute()
    stores = {}
    try:
        # The handler itself: a Checkpointer warns that an item of a training run is not a whole
        # checkpoint.
        tree = ocp.StandardCheckpointHandler().metadata(path).tree
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, 'shape'))
        for key_path, _ in leaves:
            keys = tuple(key.key for key in key_path)
            kvstore = {'driver': 'ocdbt', 'base': f'file://{path}/', 'path': '.'.join(keys) + '/'}
            stores[keys] = ts.open({'driver': 'zarr', 'kvstore': kvstore}).result()
    except Exception as error:  # Orbax and tensorstore raise many kinds
        if not is_damage(error):
            raise
        raise ValueError(
            f'{path} is not a complete Orbax checkpoint ({str(error)[:200]}).'
        ) from error
    return stores


def _named_shapes(target) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(target)
    return {jax.tree_util.keystr(path, simple=True, separator='/'): x.shape for path, x in leaves}


def misshapen(path, target) -> list[str]:
    """Compares the shapes of an Orbax item with those of `target`.

    Args:
      path: folder of the item.
      target: nested dict of ShapeDtypeStructs; arrays that it lacks are not compared.

    Returns:
      One phrase for each array that has another shape.

    Raises:
      ValueError: if there is no such item, or if it is damaged.
    """
    expected = _named_shapes(target)
    problems = []
    for keys, store in open_orbax(path).items():
        name = '/'.join(keys)
        if name in expected and store.shape != expected[name]:
            problems.append(f'{name} has shape {store.shape}, expected {expected[name]}')
    return problems


def restore_orbax(path, target):
    """Reads an Orbax item.

    Args:
      path: folder of the item.
      target: nested dict of ShapeDtypeStructs with shardings.

    Returns:
      The arrays, cast and laid out like `target`.

    Raises:
      ValueError: naming arrays that are missing, unexpected or of another shape.
    """
    found = ['/'.join(keys) for keys in open_orbax(path)]
    expected = _named_shapes(target)
    problems = [f'missing {name}' for name in expected if name not in found]
    problems += [f'unexpected {name}' for name in found if name not in expected]
    problems += misshapen(path, target)
    if problems:
        raise ValueError(f'{path} does not fit the configuration: {"; ".join(problems)}.')

    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(pathlib.Path(path).absolute(), target)
