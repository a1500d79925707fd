"""The tool that corrupts an evaluation split."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from supcon_jax import storage
from supcon_jax.data.corruptions import corrupt
from supcon_jax.data.datasets import SOURCES, open_source
from supcon_jax.tools import corrupt as tool
from tests.runs import snapshot

IMAGES = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3), np.uint8)
LABELS = (np.arange(12) * 7 % 3).astype(np.int32)


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The arguments for a split of 12 images in three classes, one of them unlabelled."""
    labels = np.where(np.arange(12) == 7, -1, LABELS)
    np.savez(tmp_path / "data.npz", test_images=IMAGES, test_labels=labels)
    monkeypatch.setattr(tool, "CHUNK", 5)
    return [
        "--config=configs/digits.py",
        "--config.data.name=arrays",
        f"--config.data.root={tmp_path / 'data.npz'}",
        f"--out={tmp_path / 'out'}",
    ]


def test_a_file_a_corruption_and_severity(command, tmp_path, capsys):
    tool.main([*command, "--corruptions=fog,pixelate", "--severities=2,5", "--seed=4"])
    out = tmp_path / "out"
    assert f"{out}: 4 files made, 0 kept" in capsys.readouterr().out
    assert (out / "corruptions.png").read_bytes().startswith(b"\x89PNG")
    for name in ("fog_2", "fog_5", "pixelate_2", "pixelate_5"):
        source = open_source("corrupted", name, root=str(out))
        corruption, severity = name.rsplit("_", 1)
        expected = [
            corrupt(image, corruption, int(severity), seed=4, example=number)
            for number, image in enumerate(IMAGES)
        ]
        np.testing.assert_array_equal(source.images, expected)
        np.testing.assert_array_equal(
            source.labels, np.where(np.arange(12) == 7, -1, LABELS)
        )
        assert source.num_classes == 3


def test_folders_have_the_same_images_and_classes(command, tmp_path, monkeypatch):
    names = ("zebra", "ant", "moth")  # not in the order of their numbers
    opened = SOURCES["arrays"]
    monkeypatch.setitem(
        SOURCES,
        "arrays",
        lambda *args: dataclasses.replace(opened(*args), class_names=names),
    )
    tool.main([*command, "--layout=folders", "--corruptions=contrast"])
    folder = tmp_path / "out/contrast/4"
    assert sorted(p.name for p in folder.iterdir()) == sorted(names)
    source = open_source("corrupted", "contrast_4", root=str(tmp_path / "out"))
    assert source.class_names == names
    for file in (folder / "ant").iterdir():  # a class of which no image is left
        file.unlink()
    (folder / "ant").rmdir()
    few = open_source("corrupted", "contrast_4", root=str(tmp_path / "out"))
    assert few.class_names == names and {*few.labels} == {0, 2}
    tool.main([*command, "--layout=folders", "--corruptions=contrast"])
    files = sorted(folder.rglob("*.png"))
    assert len(files) == 11
    for file in files[::2]:
        number = int(file.stem)
        assert file.parent.name == names[LABELS[number]]
        with Image.open(file) as image:
            found = np.asarray(image)
        np.testing.assert_array_equal(
            found, corrupt(IMAGES[number], "contrast", 4, example=number)
        )


@pytest.mark.parametrize("layout", ["arrays", "folders"])
def test_a_killed_command_goes_on(command, layout, tmp_path, monkeypatch, capsys):
    arguments = [*command, f"--layout={layout}", "--corruptions=shot_noise"]
    whole = [a.replace("/out", "/whole") for a in arguments]
    tool.main(whole)
    writes, write = [], storage.write

    def killed(path, data):
        if len(writes) == 4:
            raise KeyboardInterrupt
        writes.append(path)
        write(path, data)

    monkeypatch.setattr(storage, "write", killed)
    with pytest.raises(SystemExit):
        tool.main(arguments)
    monkeypatch.setattr(storage, "write", write)
    damaged = writes[-1]
    content = storage.read(damaged)
    storage.write(damaged, content[: len(content) // 2])  # a disk that lost the end
    flipped = bytearray(storage.read(writes[-2]))
    flipped[len(flipped) // 2] ^= 1
    storage.write(writes[-2], bytes(flipped))
    capsys.readouterr()
    tool.main(arguments)
    total = 5 if layout == "arrays" else 5 * 11
    kind = "files" if layout == "arrays" else "images"
    assert f"{total - 1} {kind} made, 1 kept" in capsys.readouterr().out
    ours, theirs = (
        {str(path.relative_to(tmp_path / at)): data for path, data in found.items()}
        for at in ("out", "whole")
        for found in [snapshot(tmp_path / at)]
    )
    assert ours == theirs


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--corruptions=fogg"], "unknown corruption 'fogg'; did you mean fog?"),
        (["--severities=0,1"], "got severity '0'; allowed: 1 to 5"),
        (["--seed=-1"], "got seed -1"),
        (["--example=12"], "allowed: 0 to 11"),
        (["--config.data.image_size=4"], "allowed: at least 8"),
        (["--config.data.root=nowhere.npz"], "needs an .npz file"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(
    command, arguments, says, tmp_path, capsys
):
    with pytest.raises(SystemExit) as exit:
        tool.main([*command, *arguments])
    error = capsys.readouterr().err
    assert exit.value.code == 2
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_left_alone(command, tmp_path, capsys):
    few = [*command, "--corruptions=fog", "--severities=1"]
    tool.main(few)
    before = snapshot(tmp_path / "out")
    np.savez(tmp_path / "b.npz", test_images=IMAGES[::-1], test_labels=LABELS)
    for change, says in (
        ("--seed=1", "was made with seed 0, now 1"),
        ("--layout=folders", "was made with layout arrays, now folders"),
        (f"--config.data.root={tmp_path / 'b.npz'}", "was made with data {'examples'"),
    ):
        with pytest.raises(SystemExit):
            tool.main([*few, change])
        error = capsys.readouterr().err
        assert says in error and "use another --out" in error
    assert snapshot(tmp_path / "out") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other/letter.txt").write_text("mine")
    with pytest.raises(SystemExit):
        tool.main([*few, f"--out={tmp_path / 'other'}"])
    assert "holds other files; use another --out" in capsys.readouterr().err


@pytest.mark.slow
def test_processes_make_the_same(command, tmp_path):
    few = [*command, "--corruptions=frost,glass_blur", "--severities=3"]
    tool.main(few)
    tool.main([*few, f"--out={tmp_path / 'two'}", "--workers=2"])
    for name in ("frost_3.npz", "glass_blur_3.npz", "corruptions.png"):
        ours, theirs = (tmp_path / at / name for at in ("out", "two"))
        assert ours.read_bytes() == theirs.read_bytes()
