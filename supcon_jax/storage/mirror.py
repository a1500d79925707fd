"""A run's small files: written to a local folder, and kept in its bucket.

Objects of a bucket cannot be appended to. So metrics, log, event files and curves are
written locally, and a thread uploads each that has changed, whole; where the bucket does not
answer the run goes on, and they are uploaded when it does. A restart downloads them first.
"""

from __future__ import annotations

import logging
import os
import pathlib
import shutil
import tempfile
import threading
import time
from collections.abc import Callable

from supcon_jax.storage import files

logger = logging.getLogger(__name__)
# Seconds between uploads: a bucket takes one write of an object a second.
EVERY_S = 1.0
# Orbax writes the first two to the bucket by itself. Event files of an earlier process are
# never written again.
NOT_MIRRORED = ("checkpoints/", "damaged_checkpoints/", "lock")
# Features of a large dataset take gigabytes, and whoever needs them reads them in the bucket.
NOT_DOWNLOADED = (*NOT_MIRRORED, "tensorboard/", "features/", "profile/")


class Mirror:
    """A temporary folder whose files are those of a bucket's folder.

    Args:
      url: the folder in the bucket.
      is_ours: whether this process still holds the folder's lock; what another one writes
        there is not written over.

    Attributes:
      folder: the local one.

    Raises:
      OSError: the files cannot be downloaded.
    """

    def __init__(self, url: str, *, is_ours: Callable[[], bool] = lambda: True):
        self._url, self._is_ours = url, is_ours
        self._temporary = tempfile.mkdtemp(prefix="supcon_jax_")
        # Trackers call a run by its folder's name.
        self.folder = pathlib.Path(self._temporary) / files.name(url)
        self.folder.mkdir()
        self._sent: dict[str, tuple[int, int]] = {}
        for name in files.walk(url):
            if not name.startswith(NOT_DOWNLOADED):
                path = self.folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(files.read(files.join(url, name)))
        self._sent = self._files()
        self._ended = threading.Event()
        self._uploading = threading.Lock()
        self._told = False
        self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
        self._thread.start()

    def flush(self, *, patience_s: float) -> bool:
        """Whether all that was written is in the bucket; waits for it so long."""
        until = time.monotonic() + patience_s
        while time.monotonic() < until and self._is_ours():
            if self._all_sent():
                return True
            time.sleep(EVERY_S / 20)
        return self._all_sent()

    def close(self) -> None:
        """Uploads what is left, and removes the local folder."""
        whole = self.flush(patience_s=files.PATIENCE_S + 5)
        self._ended.set()
        if whole:
            shutil.rmtree(self._temporary, ignore_errors=True)
        else:
            logger.warning(
                "warning: not all files of %s could be uploaded; they are in %s",
                self._url,
                self.folder,
            )

    def _run(self) -> None:
        while not self._ended.wait(EVERY_S):
            for name, state in self._files().items():
                if self._sent.get(name) != state and self._is_ours():
                    self._upload(name, state)

    def _upload(self, name: str, state: tuple[int, int]) -> None:
        try:
            content = (self.folder / name).read_bytes()
        except FileNotFoundError:  # a temporary file that has its name by now
            return
        try:
            files.write(files.join(self._url, name), content)
        except OSError as error:
            if not self._told:
                logger.warning(
                    "warning: cannot upload %s to %s: %s; the run goes on, and tries again",
                    name,
                    self._url,
                    error.strerror,
                )
            self._told = True
            return
        self._sent[name] = state

    def _all_sent(self) -> bool:
        return all(self._sent.get(n) == state for n, state in self._files().items())

    def _files(self) -> dict[str, tuple[int, int]]:
        """Time and length of every file, by its name."""
        found = {}
        for where, _, names in os.walk(self.folder):
            for file in names:
                path = os.path.join(where, file)
                try:
                    state = os.stat(path)
                except FileNotFoundError:
                    continue
                if not file.endswith(".tmp"):
                    name = os.path.relpath(path, self.folder)
                    found[name] = (state.st_mtime_ns, state.st_size)
        return found
