"""Settings of every test (eight fake CPU devices, parsed flags), and what several tests share."""

import fractions
import math
import os
import pathlib
import socket
import struct

import av
import jax
import numpy as np
from absl import flags

jax.config.update('jax_num_cpu_devices', 8)

# Tests compile far longer than they run. The program stays the same; without LLVM's optimizations
# tests compile five times faster.
jax.config.update('jax_disable_most_optimizations', True)
if jax.__version_info__ < (0, 11):
    # Later versions have only the other emitters, and end the process at an unknown flag.
    others = os.environ.get('XLA_FLAGS', '')
    os.environ['XLA_FLAGS'] = f'{others} --xla_cpu_use_fusion_emitters=false'

# The worker processes of grain read flags.
flags.FLAGS.mark_as_parsed()

from mask2dit_jax import config as config_lib  # noqa: E402, after the settings above
from mask2dit_jax.distributed import mesh as mesh_lib  # noqa: E402
from mask2dit_jax.distributed import partitioning  # noqa: E402
from mask2dit_jax.models import dit  # noqa: E402
from mask2dit_jax.training import train_step  # noqa: E402

TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parent
FRAMES = (1, 2)

# The smallest model of rendered stories, with a codec of 8 components.
STORY_MODEL = dit.DiTConfig(
    num_layers=1,
    num_attention_heads=1,
    attention_head_dim=16,
    in_channels=8,
    out_channels=8,
    text_embed_dim=16,
    time_embed_dim=8,
    max_text_seq_length=6,
    patch_size=1,
    sample_height=4,
    sample_width=4,
    sample_frames=4,
    dtype='float32',
    attention_backend='dense',
)


# With fewer layers nothing of a given scene could reach a later one by way of another.
CAUSAL_MODEL = dit.DiTConfig(
    num_layers=3,
    num_attention_heads=4,
    attention_head_dim=16,
    in_channels=4,
    out_channels=4,
    text_embed_dim=8,
    time_embed_dim=16,
    max_text_seq_length=4,
    patch_size=1,
    sample_height=4,
    sample_width=4,
    sample_frames=9,
    pattern='causal',
    attention_backend='blockwise',
    dtype='float32',
)


def tiny_config(**train):
    """A model of two layers, trained by Muon; `train` replaces fields of TrainConfig."""
    model = dit.DiTConfig(
        num_layers=2,
        num_attention_heads=8,
        attention_head_dim=16,
        in_channels=8,
        out_channels=8,
        text_embed_dim=8,
        time_embed_dim=16,
        max_text_seq_length=2,
        patch_size=1,
        sample_height=2,
        sample_width=2,
        sample_frames=5,
        dtype='float32',
        learned_positions=True,
    )
    defaults = {'batch_size': 16, 'conditional_probability': 0.5, 'ema_decay': 0.9}
    return config_lib.Config(
        model=model,
        train=config_lib.TrainConfig(**(defaults | train)),
        optimizer=config_lib.OptimizerConfig('muon', 1e-2, warmup_steps=1),
    )


def batch_of(step):
    """A random global batch of 16 stories of FRAMES, for tiny_config."""
    rng = np.random.default_rng(step)
    return {
        'latents': rng.standard_normal((16, 3, 2, 2, 8), np.float32),  # [B, T, H, W, C]
        'text': rng.standard_normal((16, 2, 2, 8), np.float32),  # [B, S, M, E]
        'least_given': np.zeros(16, np.int32),
    }


def mesh_of(*axes):
    """A mesh of as many devices as the axes (data, fsdp, context, tensor) need."""
    devices = jax.devices()[: math.prod(axes)]
    return mesh_lib.make_mesh(mesh_lib.MeshConfig(*axes), devices)


def train_on(config, mesh, steps=3):
    """Trains on a mesh. Returns loss and gradient norm of every step, [steps, 2], and the state."""
    first = batch_of(0)
    example = first['latents'][0], first['text'][0], FRAMES

    def make():
        return train_step.init_state(config, example)

    shardings = partitioning.shardings(jax.eval_shape(make), mesh)
    state = jax.jit(make, out_shardings=shardings)()
    train = train_step.jit_train_step(config, FRAMES, shardings, mesh_lib.batch_sharding(mesh))

    null_text = np.zeros((2, 8), np.float32)
    rows = mesh_lib.local_rows(mesh, 16)
    curve = []
    for step in range(steps):
        local = {name: array[rows] for name, array in batch_of(step).items()}
        state, metrics = train(state, mesh_lib.global_batch(local, mesh, 16), null_text)
        curve.append([float(metrics['loss']), float(metrics['grad_norm'])])
    return np.array(curve), state


def child_environment():
    """Environment variables for scripts that import this file."""
    path = f'{TESTS}{os.pathsep}{ROOT}'
    return os.environ | {'PYTHONPATH': path, 'JAX_PLATFORMS': 'cpu'}


_PORTS = []  # sockets that keep their ports


def free_port():
    """A TCP port of this machine for a gRPC server, as that of JAX's coordinator.

    This process keeps the port, so that no other one gets it before the server starts. The server
    can listen all the same, because gRPC sets SO_REUSEPORT, too.
    """
    keeper = socket.socket()
    keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    keeper.bind(('localhost', 0))
    _PORTS.append(keeper)
    return keeper.getsockname()[1]


def moving(frames=20, height=32, width=48):
    """A video whose frames can be told apart, uint8 [T, H, W, 3].

    A bright column moves; the left half is red, and the top rows are white.
    """
    video = np.zeros((frames, height, width, 3), np.uint8)
    video[:, :, : width // 2, 0] = 160
    video[:, :4] = 255
    for frame in range(frames):
        column = (2 * frame) % width
        video[frame, :, column : column + 4] = 255
    return video


def panned(frames=40, side=128):
    """A smooth landscape that the camera moves over, uint8 [T, H, W, 3]."""
    size = side + 3 * frames
    noise = np.random.default_rng(0).normal(size=(size, size, 3))
    land = np.cumsum(np.cumsum(noise, 0), 1)
    land = (255 * (land - land.min()) / np.ptp(land)).astype(np.uint8)

    views = []
    for frame in range(frames):
        row = 2 * frame
        column = 3 * frame
        views.append(land[row : row + side, column : column + side])
    return np.stack(views)


def damage(source, target, at=0.5):
    """Copies an mp4, with some bytes of its pictures changed; `at` says where, from 0 to 1."""
    content = bytearray(source.read_bytes())
    first = content.index(b'mdat') + 800  # the encoder's own remarks come before
    place = first + int((len(content) - first - 800) * at)
    content[place : place + 40] = bytes(range(200, 240))
    target.write_bytes(content)


def turn(source, target):
    """Copies an mp4 that asks to be shown turned by 90 degrees clockwise, as telephones do."""
    content = bytearray(source.read_bytes())
    matrix = content.index(b'tkhd') + 4 + 4 + 20 + 16  # the times, ids and layers come before
    assert struct.unpack('>9i', content[matrix : matrix + 36])[:5] == (65536, 0, 0, 0, 65536)
    content[matrix : matrix + 36] = struct.pack('>9i', 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    target.write_bytes(content)


def write_times(path, frames, ticks, rate=10):
    """Writes an mp4 whose frames are shown at `ticks` of 1/rate s."""
    time_base = fractions.Fraction(1, rate)
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate=rate, options={'crf': '4'})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = 'yuv420p'
        stream.codec_context.time_base = time_base

        for pixels, tick in zip(frames, ticks):
            frame = av.VideoFrame.from_ndarray(pixels, format='rgb24')
            frame.pts = tick
            frame.time_base = time_base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())  # what the encoder holds back


def unlike_the_umask(folder):
    """Files and folders below `folder` whose mode is not that of new ones under the umask."""
    umask = os.umask(0o022)
    os.umask(umask)
    return {
        str(path.relative_to(folder)): oct(path.stat().st_mode & 0o777)
        for path in folder.rglob('*')
        if path.stat().st_mode & 0o777 != (0o777 if path.is_dir() else 0o666) & ~umask
    }
