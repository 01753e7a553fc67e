"""Tensors in files, one at a time: safetensors folders and Orbax checkpoints larger than the host's
memory."""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Callable

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
import tensorstore as ts

SHARD_BYTES = 1 << 30  # of an exported file; what is written is in memory twice
_DTYPES = {'F64': np.float64, 'F32': np.float32, 'F16': np.float16, 'BF16': ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor in a file: shape and dtype known, values read by np.asarray."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.read(), dtype)


def open_safetensors(folder, unused: str = '(?!)') -> dict[str, Tensor]:
    """All tensors of a folder's .safetensors files by name; nothing but headers is read.

    Args:
      folder: holds them.
      unused: regular expression of whole names to leave out, whatever they hold; the default
        matches none.

    Raises:
      FileNotFoundError, ValueError: one sentence that names the file: none there, only pickled
        weights, a file that is damaged, cut off or lacks a part that the index lists, a tensor
        twice, or one that holds no floats.
    """
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f'{folder} is no folder.')
    files = sorted(folder.glob('*.safetensors'))
    pickled = [
        p.name for p in sorted(folder.iterdir()) if p.suffix in ('.bin', '.pt', '.pth', '.ckpt')
    ]
    if not files and pickled:
        raise ValueError(
            f'{folder} has only pickled weights ({", ".join(pickled)}), which run code when opened: load '
            'them in PyTorch and save them again with save_pretrained(..., safe_serialization=True).'
        )
    listed = _indexed(folder)
    missing = sorted(set(listed.values()) - {p.name for p in files})
    if missing or not files:
        raise FileNotFoundError(
            f'{folder} lacks {", ".join(missing) or "a .safetensors file"}: download or copy it '
            'again.'
        )
    tensors = {}
    for path in files:
        for name, tensor in open_file(path, unused)[0].items():
            if name in tensors:
                raise ValueError(
                    f'{folder} has {name} in two files, one of them {path.name}: remove one set of files.'
                )
            tensors[name] = tensor
    lost = sorted(n for n in set(listed) - set(tensors) if not re.fullmatch(unused, n))
    if lost:
        raise ValueError(
            f'{folder} lacks tensors that its index lists: {", ".join(lost[:5])}: download it again.'
        )
    return tensors


def _indexed(folder: pathlib.Path) -> dict[str, str]:
    """Tensor name to file name, from the index of sharded files; empty if there is none."""
    listed = {}
    for path in folder.glob('*.safetensors.index.json'):
        try:
            listed |= json.loads(path.read_text(encoding='utf-8'))['weight_map']
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f'{path} is no index of safetensors files ({error!r}).') from error
    return listed


def open_file(path, unused: str = '(?!)') -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of one .safetensors file by name, and its metadata; errors as of
    `open_safetensors`."""
    try:
        with safetensors.safe_open(path, 'np') as file:
            metadata = file.metadata() or {}
            slices = {
                name: file.get_slice(name)
                for name in file.keys()  # noqa: SIM118 (no mapping)
                if not re.fullmatch(unused, name)
            }
            described = {
                name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()
            }
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f'{path} is damaged or no safetensors file ({error}): copy it again.'
        ) from error
    strange = [
        f'{name} as {dtype}' for name, (_, dtype) in described.items() if dtype not in _DTYPES
    ]
    if strange:
        raise ValueError(
            f'{path} holds {", ".join(strange)}: only {", ".join(_DTYPES)} can be read.'
        )
    return {
        name: Tensor(shape, np.dtype(_DTYPES[dtype]), functools.partial(_read, path, name))
        for name, (shape, dtype) in described.items()
    }, metadata


def _read(path: pathlib.Path, name: str) -> np.ndarray:
    """One tensor; the file is opened for it alone, since an open one keeps all pages that were read
    in memory."""
    try:
        with safetensors.safe_open(path, 'np') as file:
            return file.get_tensor(name)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f'{path} changed while it was read ({error}): copy it again.') from error


def write_safetensors(
    folder,
    stem: str,
    tensors: dict[str, Tensor],
    shard_bytes: int = SHARD_BYTES,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes tensors as STEM.safetensors, or as numbered files with an index if they exceed
    shard_bytes."""
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {n: int(np.prod(t.shape)) * np.dtype(t.dtype).itemsize for n, t in tensors.items()}
    shards, filled = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    files = [f'{stem}.safetensors']
    if len(shards) > 1:
        files = [f'{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors' for i in range(len(shards))]
        index = {
            'metadata': {'total_size': sum(sizes.values())},
            'weight_map': {n: f for f, names in zip(files, shards) for n in names},
        }
        (folder / f'{stem}.safetensors.index.json').write_text(json.dumps(index, indent=2) + '\n')
    for file, names in zip(files, shards):
        safetensors.numpy.save_file(
            {n: np.ascontiguousarray(tensors[n]) for n in names},
            folder / file,
            metadata={'format': 'pt'} | (metadata or {}),
        )


@dataclasses.dataclass(frozen=True)
class Leaf:
    """An array to be written part by part: whole, or stacked along its first axis."""

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: tuple[Callable[[], np.ndarray], ...]
    stacked: bool

    @property
    def size(self) -> int:
        """Number of elements; Orbax refuses empty arrays by it."""
        return int(np.prod(self.shape))


class _LeafHandler(ocp.type_handlers.NumpyHandler):
    """Lets Orbax write a Leaf as it writes a numpy array, but one part after the other, and one
    chunk a part."""

    def __init__(self):
        super().__init__(deepcopy_host_arrays=False)

    async def _open_and_write(self, value, tspec, ts_context):
        if value.stacked:
            tspec['metadata']['chunks'] = (1, *value.shape[1:])
        array = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        for i, part in enumerate(value.parts):
            await (array[i] if value.stacked else array).write(part())


def write_orbax(path, tree) -> None:
    """Writes a nested dict of Leafs as an Orbax checkpoint like StandardCheckpointer's, in place of
    an old one."""
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry((Leaf, _LeafHandler()))
    )
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(
            pathlib.Path(path).absolute(),
            force=True,
            args=ocp.args.PyTreeSave(tree, ocdbt_target_data_file_size=SHARD_BYTES // 4),
        )


def open_orbax(path) -> dict[tuple[str, ...], ts.TensorStore]:
    """The arrays of an Orbax checkpoint item by path in the tree; slices are read on demand by
    `.read().result()`.

    Raises:
      ValueError: if it is none, or damaged.
    """
    path = pathlib.Path(path).absolute()
    try:
        # The handler itself: a Checkpointer warns that an item of a training run is no checkpoint
        # of its own.
        tree = ocp.StandardCheckpointHandler().metadata(path).tree
        flat = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, 'shape'))
        names = [tuple(k.key for k in keys) for keys, _ in flat]
        base = f'file://{path}/'
        return {
            n: ts.open(
                {
                    'driver': 'zarr',
                    'kvstore': {'driver': 'ocdbt', 'base': base, 'path': '.'.join(n) + '/'},
                }
            ).result()
            for n in names
        }
    except (ValueError, AttributeError, OSError) as error:
        raise ValueError(f'{path} is no complete Orbax checkpoint ({str(error)[:200]}).') from error


def _shapes(target) -> dict[str, tuple[int, ...]]:
    return {
        '/'.join(k.key for k in keys): x.shape
        for keys, x in jax.tree_util.tree_leaves_with_path(target)
    }


def misshapen(path, target) -> list[str]:
    """What has another shape in an Orbax checkpoint item than in `target`, in words."""
    want = _shapes(target)
    have = {
        name: t.shape for keys, t in open_orbax(path).items() if (name := '/'.join(keys)) in want
    }
    return [
        f'{n} has shape {shape}, expected {want[n]}'
        for n, shape in have.items()
        if shape != want[n]
    ]


def restore_orbax(path, target):
    """An Orbax checkpoint item, cast and laid out like `target` (ShapeDtypeStructs with shardings).

    Raises:
      ValueError: naming arrays that are missing, unexpected or of another shape.
    """
    have, want = ['/'.join(n) for n in open_orbax(path)], _shapes(target)
    problems = [f'missing {n}' for n in want if n not in have] + [
        f'unexpected {n}' for n in have if n not in want
    ]
    problems += misshapen(path, target)
    if problems:
        raise ValueError(f'{path} does not fit the configuration: {"; ".join(problems)}.')
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(pathlib.Path(path).absolute(), target)
