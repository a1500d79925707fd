"""Runs whose workdir and data are in a bucket, against an emulator of one."""

import contextlib
import http.server
import io
import os
import pathlib
import signal
import threading
import time

import fsspec
import jax
import numpy as np
import pytest
from PIL import Image

from configs import evaluate_digits
from supcon_jax import storage
from supcon_jax.checkpoint import restore_encoder, saved_steps
from supcon_jax.data.datasets import open_source
from supcon_jax.evaluate import evaluate
from supcon_jax.linear_eval import linear_eval
from supcon_jax.pretrain import pretrain
from supcon_jax.run.opening import setup_compilation_cache
from supcon_jax.storage import epaths, files
from supcon_jax.storage.mirror import Mirror
from supcon_jax.tools import seeds
from supcon_jax.writers import MetricWriter, read_metrics
from tests.processes import Process, flags, main_job
from tests.runs import assert_trees_equal, linear_config, pretrain_config, shrink


class Killed(Exception):
    """Stands for a SIGKILL: nothing is saved after it."""


def killed_at(monkeypatch, step):
    """Ends the next run when it tells of a step."""
    log_progress = MetricWriter.log_progress

    def killing(self, at, *arguments):
        log_progress(self, at, *arguments)
        if at >= step:
            monkeypatch.undo()
            raise Killed

    monkeypatch.setattr(MetricWriter, "log_progress", killing)


def arrays_in(place):
    """The digits, as an .npz file."""
    arrays, content = {}, io.BytesIO()
    for split in ("train", "test"):
        source = open_source("digits", split)
        arrays |= {f"{split}_images": source.images, f"{split}_labels": source.labels}
    np.savez(content, **arrays)
    storage.write(storage.join(place, "digits.npz"), content.getvalue())
    return storage.join(place, "digits.npz")


@pytest.mark.slow
def test_the_journey_of_the_digits_in_a_bucket(bucket, tmp_path, monkeypatch, messages):
    """Pretraining, a kill, a resume, a move, both evaluations: the bits of a disk."""
    (tmp_path / "data").mkdir()
    changes = {"data.name": "arrays", "checkpoint_every": 4, "log_every": 1}
    local = pretrain_config(**changes, **{"data.root": arrays_in(tmp_path / "data")})
    remote = pretrain_config(**changes, **{"data.root": arrays_in(f"{bucket}/data")})
    expected = pretrain(local, tmp_path / "run")
    killed_at(monkeypatch, 7)
    with pytest.raises(Killed):
        pretrain(remote, f"{bucket}/run/")
    assert saved_steps(f"{bucket}/run") == [4]
    final = pretrain(remote, f"{bucket}/run")
    assert "resumed at step 4" in messages
    assert final["train/loss"] == expected["train/loss"]
    assert saved_steps(f"{bucket}/run") == saved_steps(tmp_path / "run") == [8, 12]
    # Every step once, as on a disk.
    lines = [
        [r["step"] for r in read_metrics(w)]
        for w in (f"{bucket}/run", tmp_path / "run")
    ]
    assert lines[0] == lines[1]
    names = storage.walk(f"{bucket}/run")
    assert {"config.json", "run.json", "log.txt", "figures/curves.png"} <= set(names)
    assert sum(name.startswith("tensorboard/") for name in names) == 2
    assert "lock" not in names
    assert "resumed at step 4" in storage.read_text(f"{bucket}/run/log.txt")
    storage.move(f"{bucket}/run", f"{bucket}/moved")
    assert not storage.exists(f"{bucket}/run")
    ours, theirs = restore_encoder(f"{bucket}/moved"), restore_encoder(tmp_path / "run")
    assert_trees_equal(ours, theirs)
    results = [
        linear_eval(linear_config(pretrained), place)["eval/top1"]
        for pretrained, place in (
            (f"{bucket}/moved", f"{bucket}/linear"),
            (tmp_path / "run", tmp_path / "linear"),
        )
    ]
    assert results[0] == results[1]
    for place in (bucket, tmp_path):
        config = shrink(evaluate_digits.get_config())
        config.pretrained = f"{place}/linear"
        assert evaluate(config, f"{place}/evaluation")["eval/top1"] == results[0]
    assert storage.is_file(f"{bucket}/evaluation/predictions.npz")
    # The same command again: it is complete, and says the same.
    assert pretrain(remote, f"{bucket}/moved")["train/loss"] == final["train/loss"]
    assert f"Workdir: {bucket}/moved" in messages


def test_files_are_the_same_in_a_bucket_as_on_a_disk(bucket, tmp_path):
    for root in (bucket, str(tmp_path)):
        os.makedirs(tmp_path / "a" / "c", exist_ok=True)
        inside = storage.join(root, "a", "b.txt")
        assert not storage.exists(inside) and storage.walk(root) == []
        with pytest.raises(FileNotFoundError):
            storage.read(inside)
        storage.write(inside, b"first")
        storage.write(inside, b"hello world")
        storage.write(storage.join(root, "a/c/d.txt"), b"")
        assert storage.read(inside) == b"hello world"
        assert storage.names(root) == ["a"]
        assert storage.names(storage.join(root, "a")) == ["b.txt", "c"]
        assert storage.names(storage.join(root, "nothing")) == []
        assert storage.walk(root) == ["a/b.txt", "a/c/d.txt"]
        assert storage.is_file(inside) and not storage.is_dir(inside)
        assert storage.is_dir(storage.join(root, "a"))
        assert not storage.exists(storage.join(root, "a", "b"))  # begins a name alone
        assert storage.size(inside) == 11
        assert storage.size(storage.join(root, "a/c/d.txt")) == 0
        assert storage.read_ranges(inside, [(0, 3), (4, 11), (2, 2)]) == [
            b"hel",
            b"o world",
            b"",
        ]
        for beyond in ((0, 12), (20, 30)):
            with pytest.raises(OSError, match="ends before the bytes"):
                storage.read_ranges(inside, [beyond])
        storage.move(storage.join(root, "a"), storage.join(root, "z"))
        assert storage.walk(root) == ["z/b.txt", "z/c/d.txt"]
        storage.remove(storage.join(root, "z"))
        storage.remove(storage.join(root, "z"))
        assert not storage.exists(storage.join(root, "z"))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 4097, 1_000_003])
def test_the_size_of_an_object(bucket, length):
    storage.write(f"{bucket}/x", bytes(length))
    assert storage.size(f"{bucket}/x") == length


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("gs:/bucket/run", "allowed: local paths and gs://BUCKET/PATH"),
        ("gcs://bucket/run", "allowed: local paths"),
        ("s3://bucket/run", "allowed: local paths"),
        ("https://storage.googleapis.com/bucket", "allowed: local paths"),
        ("gs://", "'' is no name of a bucket"),
        ("gs://My Bucket/run", "'My Bucket' is no name of a bucket"),
        ("gs://bucket/run?x=1", "no '\\?' and no '#'"),
    ],
)
def test_urls_that_are_none(path, said, tmp_path):
    for use in (
        lambda: pretrain(pretrain_config(), path),
        lambda: open_source("arrays", "train", root=path),
        lambda: open_source("folder", "train", root=path),
        lambda: open_source("cifar10", "train", dir=path),
        lambda: restore_encoder(path),
    ):
        with pytest.raises(ValueError, match=said) as refusal:
            use()
        assert "\n" not in str(refusal.value)
    assert not pathlib.Path("gs:").exists() and not pathlib.Path("s3:").exists()


def test_what_is_not_in_a_bucket_is_told_in_one_line(bucket):
    missing = "gs://no-such-bucket-of-anyone/run"
    with pytest.raises(
        ValueError, match="cannot write to workdir .*there is no bucket"
    ):
        pretrain(pretrain_config(), missing)
    with pytest.raises(ValueError, match="no checkpoints in gs://"):
        restore_encoder(f"{bucket}/typo")
    with pytest.raises(ValueError, match="--config.pretrained"):
        linear_eval(linear_config(f"{bucket}/typo"), f"{bucket}/linear")
    for name in ("arrays", "folder"):
        with pytest.raises(ValueError, match="--config.data.root"):
            open_source(name, "train", root=f"{bucket}/typo")
    with pytest.raises(ValueError, match="does not exist .--config.data.dir"):
        open_source("cifar10", "train", dir=f"{bucket}/typo")
    storage.write(f"{bucket}/broken.npz", b"PK no zip")
    with pytest.raises(ValueError, match="cannot read gs://.* as .npz"):
        open_source("arrays", "train", root=f"{bucket}/broken.npz")


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers as Google does where an account may not do what it asks."""

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b'{"error": {"code": 403, "message": "x@y.com does not have access"}}'
        self.send_response(403)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_DELETE = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def forbidden(monkeypatch):
    """A bucket without any permission."""
    import tensorstore as ts

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "x")
    store = ts.KvStore.open("gs://forbidden/", context=ts.Context()).result()
    monkeypatch.setattr(files, "_store", lambda bucket: store)
    yield "gs://forbidden"
    server.shutdown()
    server.server_close()


def test_no_permission_is_told_in_one_line(forbidden):
    """Also where tensorstore finds nothing, and says nothing: when it lists."""
    said = "no permission .x@y.com does not have access.*gcloud auth"
    for use in (
        lambda: storage.names(f"{forbidden}/run"),
        lambda: storage.walk(forbidden),
        lambda: storage.read(f"{forbidden}/x"),
        lambda: storage.write(f"{forbidden}/x", b""),
    ):
        with pytest.raises(PermissionError, match=said):
            use()
    for use in (
        lambda: pretrain(pretrain_config(), f"{forbidden}/run"),
        lambda: open_source("arrays", "train", root=f"{forbidden}/x.npz"),
        lambda: open_source("folder", "train", root=f"{forbidden}/x"),
        lambda: open_source("cifar10", "train", dir=f"{forbidden}/x"),
    ):
        with pytest.raises(ValueError, match=said):
            use()


@pytest.mark.slow
def test_a_bucket_that_is_away_is_waited_for_with_a_word(
    emulator, bucket, messages, monkeypatch
):
    monkeypatch.setattr(files, "WORD_AFTER_S", 0.1)
    storage.write(f"{bucket}/x", b"here")
    emulator.stop()
    back = threading.Timer(6.0, emulator.start)
    back.start()
    assert storage.read(f"{bucket}/x") == b"here"
    back.join()
    assert [said.split(": ")[0] for said in messages[:1]] == ["warning"]
    assert "does not answer (Could not connect" in messages[0]
    assert "answers again" in messages[-1]


@pytest.mark.slow
def test_a_bucket_that_stays_away_is_given_up(emulator, bucket, monkeypatch):
    monkeypatch.setattr(files, "PATIENCE_S", 0.1)
    emulator.stop()
    try:
        with pytest.raises(ConnectionError, match="does not answer"):
            storage.write(f"{bucket}/x", b"")
    finally:
        emulator.start()


def test_without_gcsfs_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package gcsfs.*supcon_jax\[gcs\]"):
        epaths.as_path("gs://bucket/run")


def test_a_mirror_fetches_no_features_and_writes_over_nobody(bucket, tmp_path):
    """Features of a large dataset would fill the disk; a lost folder is another run's."""
    run = f"{bucket}/run"
    for name in ("metrics.jsonl", "features/a.npz", "profile/b.pb", "tensorboard/c"):
        storage.write(f"{run}/{name}", b"there")
    ours = [True]
    mirror = Mirror(run, is_ours=lambda: ours[0])
    assert sorted(p.name for p in mirror.folder.rglob("*")) == ["metrics.jsonl"]
    (mirror.folder / "log.txt").write_text("ours")
    assert mirror.flush(patience_s=20)
    ours[0] = False
    (mirror.folder / "metrics.jsonl").write_text("from the one that lost it")
    start = time.monotonic()
    mirror.close()
    assert time.monotonic() - start < 10
    assert storage.read(f"{run}/metrics.jsonl") == b"there"
    assert storage.read(f"{run}/log.txt") == b"ours"


def test_files_written_during_an_outage_reach_the_bucket(emulator, bucket, monkeypatch):
    """A mirror uploads what changed, whole, and waits for the bucket where it must."""
    storage.write(f"{bucket}/run/metrics.jsonl", b"one\n")
    storage.write(f"{bucket}/run/checkpoints/1/data", b"large")
    mirror = Mirror(f"{bucket}/run")
    assert [p.name for p in mirror.folder.iterdir()] == ["metrics.jsonl"]
    emulator.stop()
    with (mirror.folder / "metrics.jsonl").open("a") as file:
        file.write("two\n")
    (mirror.folder / "figures").mkdir()
    (mirror.folder / "figures" / "curves.png").write_bytes(b"png")
    (mirror.folder / "half.tmp").write_bytes(b"not yet")
    assert not mirror.flush(patience_s=0.2)
    emulator.start()
    mirror.close()
    assert storage.read(f"{bucket}/run/metrics.jsonl") == b"one\ntwo\n"
    assert storage.walk(f"{bucket}/run") == [
        "checkpoints/1/data",
        "figures/curves.png",
        "metrics.jsonl",
    ]
    assert not mirror.folder.exists()


@pytest.mark.parametrize("length", [0, 1000, 12_000_000])
def test_libraries_write_what_fits_a_block_in_one_request(bucket, length, monkeypatch):
    """A session for parts is lost with a server that goes away; one request is sent again."""
    path = epaths.as_path(f"{bucket}/metadata")
    content = np.random.default_rng(0).bytes(length)
    asked = []
    file_system = fsspec.filesystem("gs")
    request = type(file_system)._request

    async def noting(self, method, url, *arguments, **options):
        asked.append(options.get("uploadType") or url)
        return await request(self, method, url, *arguments, **options)

    monkeypatch.setattr(type(file_system), "_request", noting)
    path.write_bytes(content)
    assert path.read_bytes() == content
    assert storage.read(f"{bucket}/metadata") == content
    sessions = [one for one in asked if "resumable" in one or "upload_id" in one]
    assert bool(sessions) == (length > 1000)


def test_a_folder_of_images_in_a_bucket(bucket, tmp_path):
    for place in ("train/cat/a.png", "train/cat/deep/b.png", "train/dog/c.png",
                  "test/dog/d.png", "train/cat/.hidden.png", "train/.x/e.png",
                  "train/cat/notes.txt", "beside.png"):  # fmt: skip
        content = io.BytesIO()
        value = sum(place.encode()) % 256
        Image.new("RGB", (5, 4), (value, 0, 0)).save(content, "png")
        for root in (f"{bucket}/pets", str(tmp_path / "pets")):
            path = storage.join(root, place)
            if not storage.is_remote(path):
                pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
            storage.write(path, content.getvalue())
    for split in ("train", "test"):
        ours, theirs = (
            open_source("folder", split, root=root)
            for root in (f"{bucket}/pets", str(tmp_path / "pets"))
        )
        assert ours.class_names == theirs.class_names == ("cat", "dog")
        assert ours.labels.tolist() == theirs.labels.tolist()
        assert [ours.read(i) for i in range(ours.num_examples)] == [
            theirs.read(i) for i in range(theirs.num_examples)
        ]
        assert ours.name(0) == f"{bucket}/pets" + theirs.name(0).split("pets")[1]
        assert [note.split(": ")[1] for note in ours.notes] == [
            note.split(": ")[1] for note in theirs.notes
        ]


def test_hosts_that_write_the_same_file_at_once(tmp_path, monkeypatch):
    """Each writes beside it under a name of its own, and leaves nothing of a failure."""
    target, seen = tmp_path / "index.npz", []
    replace = os.replace

    def replaced(source, target):
        seen.append(os.path.basename(source))
        assert pathlib.Path(source).read_bytes() == b"whole"
        replace(source, target)

    monkeypatch.setattr(os, "replace", replaced)
    for host in ("a", "b"):
        monkeypatch.setattr(files.socket, "gethostname", lambda host=host: host)
        storage.write(target, b"whole")
    assert len(set(seen)) == 2 and target.read_bytes() == b"whole"
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        storage.write(tmp_path / "folder", b"whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "index.npz"]


def upload_cifar10(tfds_dir, place):
    """The test split, with what describes the dataset."""
    real = pathlib.Path(tfds_dir, "cifar10")
    for path in real.rglob("*"):
        if path.is_file() and "train" not in path.name:
            name = str(path.relative_to(real.parent))
            storage.write(storage.join(place, name), path.read_bytes())


def test_a_dataset_of_tfds_in_a_bucket(bucket, tfds_dir):
    upload_cifar10(tfds_dir, bucket)
    ours, theirs = (
        open_source("cifar10", "test[:20]+test[-5:]", dir=where)
        for where in (bucket, tfds_dir)
    )
    assert ours.class_names == theirs.class_names
    assert ours.num_examples == theirs.num_examples == 25
    assert [ours.read(i) for i in range(25)] == [theirs.read(i) for i in range(25)]
    with pytest.raises(ValueError, match="has no mnist; it holds cifar10"):
        open_source("mnist", "test", dir=bucket)


def test_the_mean_over_seeds_of_runs_in_a_bucket(bucket, capsys):
    for seed, value in enumerate((0.25, 0.75)):
        config = pretrain_config(seed=seed).to_json()
        line = f'{{"step": 1, "knn/top1": {value}, "final": true}}\n'
        storage.write(f"{bucket}/{seed}/config.json", config.encode())
        storage.write(f"{bucket}/{seed}/metrics.jsonl", line.encode())
    seeds.main([f"{bucket}/0", f"{bucket}/1", f"--out={bucket}/seeds.json"])
    assert "50.00 ± 35.36" in capsys.readouterr().out
    assert b'"mean": 0.5' in storage.read(f"{bucket}/seeds.json")


def test_the_compilation_cache_in_a_bucket(bucket, monkeypatch):
    from jax.experimental.compilation_cache import compilation_cache

    before = jax.config.jax_compilation_cache_dir
    try:
        for folder in (f"{bucket}/cache", "s3://bucket/cache"):
            compilation_cache.reset_cache()
            jax.config.update("jax_compilation_cache_dir", folder)
            if folder.startswith("s3"):
                with pytest.raises(ValueError, match="allowed: local paths"):
                    setup_compilation_cache(enabled=True)
                continue
            setup_compilation_cache(enabled=True)
            jax.jit(lambda x: 3 * x + 0.123456)(1.0).block_until_ready()
            assert any("lambda" in name for name in storage.names(folder))
    finally:
        compilation_cache.reset_cache()
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.slow
def test_damage_and_a_second_run_in_a_bucket(bucket, messages):
    """The newest step is cut off: it is put aside, and training goes on from before."""
    config = pretrain_config(checkpoint_every=6)
    pretrain(config, bucket)
    expected = restore_encoder(bucket)
    assert saved_steps(bucket) == [6, 12]
    for name in storage.walk(f"{bucket}/checkpoints/12/encoder"):
        if "/d/" in f"/{name}":
            storage.write(f"{bucket}/checkpoints/12/encoder/{name}", b"")
    storage.remove(f"{bucket}/metrics.jsonl")  # it is not finished any more
    pretrain(config, bucket)
    assert any("checkpoint of step 12 is damaged" in said for said in messages)
    assert storage.names(f"{bucket}/damaged_checkpoints") == ["12_0"]
    assert_trees_equal(restore_encoder(bucket), expected)


def started(emulator, workdir, **changes):
    environ = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"} | emulator.environ
    return Process(["main.py", *flags(workdir, **changes)], environ)


def wait_for(process, text, timeout_s=240):
    until = time.monotonic() + timeout_s
    while text not in process.out:
        assert process.code is None, process.err
        assert time.monotonic() < until, process.out
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [5, 100])
def test_training_goes_on_while_the_bucket_is_away(emulator, bucket, tmp_path, seconds):
    """Every line and every bit is there in the end; 100 s is longer than Orbax tries."""
    changes = {"total_steps": 4000, "checkpoint_every": 500, "log_every": 50}
    with contextlib.closing(started(emulator, bucket, **changes)) as process:
        wait_for(process, " 600/4000")
        emulator.stop()
        told = process.out.count("\nstep")
        time.sleep(seconds)
        emulator.start()
        assert process.out.count("\nstep") > told
        assert process.wait(400) == 0, process.err
        assert "Traceback" not in process.err
    with contextlib.closing(started(emulator, tmp_path, **changes)) as process:
        assert process.wait(300) == 0
    assert saved_steps(bucket) == [3500, 4000]
    assert_trees_equal(restore_encoder(bucket), restore_encoder(tmp_path))
    lines = [[r["step"] for r in read_metrics(w)] for w in (bucket, tmp_path)]
    assert lines[0] == lines[1]


@pytest.mark.slow
def test_twenty_kills_in_a_bucket(emulator, bucket, tmp_path):
    """SIGKILL at random moments, saves and uploads included: twenty times equal bits."""
    changes = {"total_steps": 200, "checkpoint_every": 20, "log_every": 5}
    with contextlib.closing(started(emulator, tmp_path, **changes)) as process:
        assert process.wait(300) == 0
    expected, rng = restore_encoder(tmp_path), np.random.default_rng(0)
    steps = [r["step"] for r in read_metrics(tmp_path)]
    for trial in range(20):
        workdir = f"{bucket}/{trial}"
        with contextlib.closing(started(emulator, workdir, **changes)) as process:
            wait_for(process, f" {5 * rng.integers(1, 40)}/200")
            time.sleep(rng.uniform(0, 0.5))
            process.send(signal.SIGKILL)
            killed = process.wait(30)
        saved = saved_steps(workdir)
        with contextlib.closing(started(emulator, workdir, **changes)) as process:
            assert process.wait(300) == 0, process.err
        print(f"kill {trial + 1}: exit code {killed}, saved {saved}", flush=True)
        assert_trees_equal(restore_encoder(workdir), expected)
        lines = [r["step"] for r in read_metrics(workdir)]
        # The first step after a resume is told too.
        assert lines == sorted(set(lines)) and set(lines) >= set(steps)


@pytest.mark.slow
def test_two_processes_read_lanes_of_one_bucket_and_write_to_it(
    emulator, bucket, tmp_path, tfds_dir
):
    """Killed, and started again: the bits of a local disk, and of one process there."""
    upload_cifar10(tfds_dir, f"{bucket}/data")
    changes = {
        "data.name": "cifar10",
        "data.train_split": "test[:4000]",
        "data.eval_split": "test[-100:]",
        "data.lanes": 4,
        "total_steps": 60,
        "checkpoint_every": 20,
        "log_every": 5,
    }
    local = changes | {"data.dir": tfds_dir}
    remote = changes | {"data.dir": f"{bucket}/data"}
    for size, devices in ((1, 2), (2, 1)):
        with main_job(size, tmp_path / str(size), devices=devices, **local) as job:
            assert set(job.wait(300).values()) == {0}, job[0].err
    environs = [emulator.environ] * 2
    with main_job(2, f"{bucket}/run", environs=environs, **remote) as job:
        job.wait_for(r" 35/60")
        for process in job.processes.values():
            process.send(signal.SIGKILL)
        job.wait(30)
    with main_job(2, f"{bucket}/run", environs=environs, **remote) as job:
        assert set(job.wait(300).values()) == {0}, job[0].err
        assert "resumed at step" in job[0].out
    assert saved_steps(f"{bucket}/run") == saved_steps(tmp_path / "2") == [40, 60]
    ours = restore_encoder(f"{bucket}/run")
    assert_trees_equal(ours, restore_encoder(tmp_path / "2"))
    assert_trees_equal(ours, restore_encoder(tmp_path / "1"))
