"""One writer of a folder, on a disk and in a bucket."""

import json
import os
import socket
import subprocess
import sys
import threading

import pytest

from supcon_jax import storage
from supcon_jax.storage import files, lock
from supcon_jax.storage.lock import Lock


@pytest.fixture
def store(monkeypatch):
    """A bucket in memory, which keeps the conditions of its writes as Google's does."""
    import tensorstore as ts

    store = ts.KvStore.open("memory://").result()
    monkeypatch.setattr(files, "_store", lambda bucket: store)
    return store


@pytest.fixture
def soon(monkeypatch):
    """Leases of half a second."""
    monkeypatch.setattr(lock, "LEASE_S", 0.5)
    monkeypatch.setattr(lock, "RENEW_S", 0.05)


FOLDER = "gs://bucket/run"


def test_a_lease_keeps_others_out_until_it_is_released(store, soon, monkeypatch):
    first = Lock(FOLDER)
    monkeypatch.setattr(lock, "_machine", lambda: "another machine")
    me = f"in use by another run \\(process {os.getpid()} on {socket.gethostname()}"
    with pytest.raises(ValueError, match=me):
        Lock(FOLDER)
    first.held()
    first.release()
    assert not storage.exists(f"{FOLDER}/lock")
    Lock(FOLDER).release()


def test_who_died_on_another_machine_is_waited_for(store, soon, messages, monkeypatch):
    """Nobody says that it died: its lease runs out, without a look at any clock."""
    dead = Lock(FOLDER)
    dead._ended.set()  # it renews nothing any more
    monkeypatch.setattr(lock, "_machine", lambda: "another machine")
    second = Lock(FOLDER)
    assert any("waiting up to" in said for said in messages)
    second.held()
    # The first one was not dead but stopped: it learns it before it writes.
    dead._ended.clear()
    dead._renewed -= 1
    with pytest.raises(ValueError, match=r"taken over by another run \(process \d+ on"):
        dead.held()
    dead.release()
    assert storage.exists(f"{FOLDER}/lock")
    second.release()


def test_who_died_on_this_machine_is_not_waited_for(store, messages):
    process = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    held = Lock(FOLDER)
    held._ended.set()
    lease = json.loads(storage.read(f"{FOLDER}/lock")) | {"pid": int(process.stdout)}
    storage.write(f"{FOLDER}/lock", json.dumps(lease).encode())
    Lock(FOLDER).release()
    assert messages == []


def test_of_many_that_want_a_free_folder_one_gets_it(store, monkeypatch):
    """All of them saw it free; the bucket takes the first write alone."""
    read, together = storage.read_generation, threading.Barrier(8, timeout=20)

    def read_together(path):
        found = read(path)
        if found[0] is None:
            together.wait()
        return found

    monkeypatch.setattr(files, "read_generation", read_together)
    got, refused = [], []

    def want():
        try:
            got.append(Lock(FOLDER))
        except ValueError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=want) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert len(got) == 1 and len(refused) == 7
    assert all("is in use by another run" in said for said in refused)
    got[0].release()


def test_a_write_whose_answer_was_lost_is_still_ours(store, soon):
    """The bucket has it, the writer was not told, and tries again: that is no other run."""
    held = Lock(FOLDER)
    storage.write(f"{FOLDER}/lock", held._lease())  # a version that it does not know
    held._renew()
    held.held()
    held.release()
    assert not storage.exists(f"{FOLDER}/lock")


def test_a_damaged_lease_is_waited_for_and_replaced(store, soon):
    for content in (b"", b"[]", b"\xff", b"null", b'{"machine": "", "pid": "x"}'):
        storage.write(f"{FOLDER}/lock", content)
        held = Lock(FOLDER)
        assert storage.read(f"{FOLDER}/lock") != content
        held.release()
        assert not storage.exists(f"{FOLDER}/lock")


def test_a_disk(tmp_path):
    held = Lock(tmp_path)
    with pytest.raises(ValueError, match="is in use by another run"):
        Lock(tmp_path)
    held.held()
    held.release()
    Lock(tmp_path).release()
