"""Real processes of one job on this machine, on loopback."""

import contextlib
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import threading
import time

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
# A digits run of seconds: 4 channels, 16 images a step.
TINY = {
    "batch_size": 16,
    "total_steps": 12,
    "log_every": 1,
    "eval_every": 0,
    "checkpoint_every": 0,
    "encoder.width": 0.25,
    "optimizer.warmup_epochs": 0.02,
    "knn.bank": 64,
    "writers": "()",
}
LAUNCHERS = ("JAX_", "SLURM_", "OMPI_", "PMI", "SUPCON_", "XLA_FLAGS")


def free_port():
    """A port of loopback that nobody has now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def flags(workdir, **changes):
    """The command line of a tiny digits run; dots of a key are written __."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return [
        "--config=configs/digits.py",
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in (TINY | changes).items()),
    ]


class Process:
    """One started process, whose output is read as it comes."""

    def __init__(self, command, environ):
        base = {k: v for k, v in os.environ.items() if not k.startswith(LAUNCHERS)}
        self._popen = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=REPOSITORY,
            env=base | environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.texts = {"out": "", "err": ""}
        self._readers = [
            threading.Thread(target=self._read, args=(name, stream), daemon=True)
            for name, stream in (
                ("out", self._popen.stdout),
                ("err", self._popen.stderr),
            )
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, name, stream):
        for line in stream:
            self.texts[name] += line

    @property
    def out(self):
        return self.texts["out"]

    @property
    def err(self):
        return self.texts["err"]

    @property
    def errors(self):
        """The lines that say why it ended."""
        return [line for line in self.err.splitlines() if line.startswith("error: ")]

    @property
    def code(self):
        return self._popen.poll()

    def send(self, number):
        self._popen.send_signal(number)

    def wait(self, timeout_s):
        code = self._popen.wait(timeout_s)
        for reader in self._readers:
            reader.join(10)
        return code

    def close(self):
        if self.code is None:
            with contextlib.suppress(ProcessLookupError):
                self._popen.send_signal(signal.SIGCONT)
                self._popen.kill()
        self._popen.wait()


class Job:
    """N processes of one program, which find each other by the three variables.

    Args:
      commands: the arguments of Python of each process.
      devices: of each process.
      environs: variables of each process, beside those that the job needs.
      missing: processes that are not started.
    """

    def __init__(self, commands, *, devices=1, environs=None, missing=()):
        address = f"127.0.0.1:{free_port()}"
        size = len(commands)
        cache = REPOSITORY / "build" / "compilation_cache"
        worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
        self.start = time.monotonic()
        self.processes = {}
        for rank, command in enumerate(commands):
            if rank in missing:
                continue
            environ = {
                "JAX_PLATFORMS": "cpu",
                "JAX_NUM_CPU_DEVICES": str(devices),
                # Twins that write one file at once would meet half of one.
                "JAX_COMPILATION_CACHE_DIR": f"{cache}/{worker}_of_{size}_{rank}",
                "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
                "SUPCON_JOIN_TIMEOUT_S": "60",
            }
            if size > 1:
                environ |= {
                    "JAX_COORDINATOR_ADDRESS": address,
                    "JAX_NUM_PROCESSES": str(size),
                    "JAX_PROCESS_ID": str(rank),
                }
            extra = environs[rank] if environs else {}
            self.processes[rank] = Process(command, environ | extra)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes.values():
            process.close()

    def __getitem__(self, rank):
        return self.processes[rank]

    def wait_for(self, pattern, *, rank=0, timeout_s=300):
        """Until a process has printed something."""
        until = time.monotonic() + timeout_s
        while not re.search(pattern, self[rank].out + self[rank].err):
            assert self[rank].code is None, (self[rank].out, self[rank].err)
            assert time.monotonic() < until, (pattern, self[rank].out, self[rank].err)
            time.sleep(0.02)

    def wait(self, timeout_s=180):
        """Exit codes of all processes, by rank."""
        until = time.monotonic() + timeout_s
        return {
            rank: process.wait(max(0.1, until - time.monotonic()))
            for rank, process in self.processes.items()
        }


def main_job(size, workdir, *, devices=1, environs=None, missing=(), **changes):
    """A job of `main.py`; a change may be a list, with a value for each process."""
    commands = []
    for rank in range(size):
        own = {k: v[rank] if isinstance(v, list) else v for k, v in changes.items()}
        folder = workdir[rank] if isinstance(workdir, list) else workdir
        commands.append(["main.py", *flags(folder, **own)])
    return Job(commands, devices=devices, environs=environs, missing=missing)
