"""Eight fake CPU devices for every test, flags parsed, since grain's workers read them; and what
several tests share."""

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
# Tests compile far longer than they run. The program stays the same; only LLVM's work on it goes,
# five times faster.
jax.config.update('jax_disable_most_optimizations', True)
if jax.__version_info__ < (
    0,
    11,
):  # later ones have nothing else, and end the process at a flag they do not know
    os.environ['XLA_FLAGS'] = (
        f'{os.environ.get("XLA_FLAGS", "")} --xla_cpu_use_fusion_emitters=false'
    )
flags.FLAGS.mark_as_parsed()

from mask2dit_jax import config as config_lib  # noqa: E402, after the settings above
from mask2dit_jax.distributed import mesh as mesh_lib  # noqa: E402
from mask2dit_jax.distributed import partitioning  # noqa: E402
from mask2dit_jax.models import dit  # noqa: E402
from mask2dit_jax.training import train_step  # noqa: E402

TESTS = pathlib.Path(__file__).parent
ROOT = TESTS.parent
FRAMES = (1, 2)


def tiny_config(**train):
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
    train = config_lib.TrainConfig(
        **({'batch_size': 16, 'conditional_probability': 0.5, 'ema_decay': 0.9} | train)
    )
    return config_lib.Config(
        model=model, train=train, optimizer=config_lib.OptimizerConfig('muon', 1e-2, warmup_steps=1)
    )


def batch_of(step):
    rng = np.random.default_rng(step)
    return {
        'latents': rng.standard_normal((16, 3, 2, 2, 8), np.float32),
        'text': rng.standard_normal((16, 2, 2, 8), np.float32),
    }


def mesh_of(*axes):
    return mesh_lib.make_mesh(mesh_lib.MeshConfig(*axes), jax.devices()[: math.prod(axes)])


def train_on(cfg, mesh, steps=3):
    batch = batch_of(0)
    make = lambda: train_step.init_state(cfg, (batch['latents'][0], batch['text'][0], FRAMES))  # noqa: E731
    shardings = partitioning.shardings(jax.eval_shape(make), mesh)
    state = jax.jit(make, out_shardings=shardings)()
    step = train_step.jit_train_step(cfg, FRAMES, shardings, mesh_lib.batch_sharding(mesh))
    null, curve = np.zeros((2, 8), np.float32), []
    for i in range(steps):
        local = {k: v[mesh_lib.local_rows(mesh, 16)] for k, v in batch_of(i).items()}
        state, metrics = step(state, mesh_lib.global_batch(local, mesh, 16), null)
        curve.append([float(metrics['loss']), float(metrics['grad_norm'])])
    return np.array(curve), state


def child_environment():
    """For scripts that import this file."""
    return os.environ | {'PYTHONPATH': f'{TESTS}{os.pathsep}{ROOT}', 'JAX_PLATFORMS': 'cpu'}


def free_port():
    with socket.socket() as s:
        s.bind(('localhost', 0))
        return s.getsockname()[1]


def moving(frames=20, height=32, width=48):
    """A video whose frames can be told apart: a bright column moves, the left half is red, the top
    row white."""
    out = np.zeros((frames, height, width, 3), np.uint8)
    out[:, :, : width // 2, 0] = 160
    out[:, :4] = 255
    for i in range(frames):
        out[i, :, (2 * i) % width : (2 * i) % width + 4] = 255
    return out


def panned(frames=40, side=128):
    """A smooth landscape that the camera moves over."""
    land = np.cumsum(
        np.cumsum(np.random.default_rng(0).normal(size=(side + 3 * frames,) * 2 + (3,)), 0), 1
    )
    land = (255 * (land - land.min()) / np.ptp(land)).astype(np.uint8)
    return np.stack([land[2 * i : 2 * i + side, 3 * i : 3 * i + side] for i in range(frames)])


def damage(source, target, at=0.5):
    """A copy with some bytes of its pictures changed."""
    content = bytearray(source.read_bytes())
    first = content.index(b'mdat') + 800  # after the encoder's own remarks
    place = first + int((len(content) - first - 800) * at)
    content[place : place + 40] = bytes(range(200, 240))
    target.write_bytes(content)


def turn(source, target):
    """A copy that asks to be shown turned by 90 degrees clockwise, as telephones write them."""
    content = bytearray(source.read_bytes())
    matrix = content.index(b'tkhd') + 4 + 4 + 20 + 16  # after version 0's times, ids and layers
    assert struct.unpack('>9i', content[matrix : matrix + 36])[:5] == (65536, 0, 0, 0, 65536)
    content[matrix : matrix + 36] = struct.pack('>9i', 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    target.write_bytes(content)


def write_times(path, frames, ticks, rate=10):
    """An mp4 whose frames are shown at `ticks` of 1/rate s."""
    with av.open(str(path), 'w') as container:
        stream = container.add_stream('libx264', rate=rate, options={'crf': '4'})
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], 'yuv420p'
        stream.codec_context.time_base = fractions.Fraction(1, rate)
        for pixels, tick in zip(frames, ticks):
            frame = av.VideoFrame.from_ndarray(pixels, format='rgb24')
            frame.pts, frame.time_base = tick, fractions.Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
