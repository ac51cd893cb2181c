"""eval/export.py: the official layout, there and back, interrupted, and refused."""

import importlib
import json
import shutil

import numpy as np
import pytest
import torch

from common import corruptions, data, models, run


def load_script(name):
    return importlib.import_module(f"eval.{name}")


script = load_script("export")
evaluation = load_script("corruptions")


@pytest.fixture
def folder(tmp_path):
    """A data directory with a small cifar10.npz."""
    rng = np.random.default_rng(0)
    x = rng.integers(256, size=(30, 32, 32, 3), dtype=np.uint8)
    y = np.arange(30) % 10
    np.savez(tmp_path / "cifar10.npz", x_train=x, y_train=y, x_test=x[:20], y_test=y[:20])
    return tmp_path


def export(folder, out, *options):
    options = [*map(str, options), "--data-dir", str(folder), "--device", "cpu"]
    return script.main(script.parse_args([str(out), *options]))


def evaluate(folder, *options):
    options = [*map(str, options), "--data-dir", str(folder), "--device", "cpu"]
    return evaluation.main(evaluation.parse_args([str(folder / "last.pt"), *options]))


def test_arrays_there_and_back(folder, capsys):
    """All 19 corruptions in the official layout; evaluated from it, the numbers of on the fly."""
    out = folder / "CIFAR-10-C"
    manifest = export(folder, out, "--dataset", "cifar10", "--seed", 3, "--batch-size", 7)
    assert json.loads((out / "manifest.json").read_text()) == manifest
    assert manifest["seed"] == 3 and manifest["frost"] == "procedural"
    assert len(manifest["sha256"]) == 20
    assert sorted(p.name for p in out.iterdir()) == sorted([*manifest["sha256"], "manifest.json"])
    test = data.load("cifar10", folder).test
    assert np.array_equal(np.load(out / "labels.npy"), np.tile(test.y.numpy(), 5))
    for name in (*corruptions.NAMES, *corruptions.EXTRA):
        array = np.load(out / f"{name}.npy")
        assert array.shape == (100, 32, 32, 3) and array.dtype == np.uint8
        for severity in (2, 5):
            read = data.read_corrupted(out, name, severity, torch.arange(20))
            assert torch.equal(read, corruptions.corrupt(test.x, name, severity, seed=3))

    torch.manual_seed(0)
    model = models.build("resnet8", "bn", num_classes=10)
    state = model.spec | {"dataset": "cifar10", "model": model.state_dict(), "method": "ct"}
    run.save_checkpoint(folder / "last.pt", state)
    capsys.readouterr()
    stored = evaluate(folder)
    assert "exported by this project (seed 3)" in capsys.readouterr().out
    assert "frost: procedural" in stored["source"]
    fly = evaluate(folder, "--generate", "--seed", 3, "--overwrite")
    for key in ("error", "ece", "mean_corruption_error", "clean"):
        assert stored["checkpoints"][0][key] == fly["checkpoints"][0][key]


def test_a_limited_export_has_its_own_clean_images(folder):
    """Clean error of the ten images exported, not of the first ten."""
    options = ("--dataset", "cifar10", "--limit", 10, "--corruptions", "brightness")
    export(folder, folder / "CIFAR-10-C", *options)
    test = data.load("cifar10", folder).test
    rows = data.stratified_split(test.y, 10, 0, "--limit")[1]
    assert rows.tolist() != list(range(10))
    torch.manual_seed(0)
    model = models.build("resnet8", "bn", num_classes=10)
    state = model.spec | {"dataset": "cifar10", "model": model.state_dict(), "method": "ct"}
    run.save_checkpoint(folder / "last.pt", state)
    found = evaluate(folder, "--corruptions", "brightness")["checkpoints"][0]
    expected = run.evaluate(model.eval(), test.take(rows))
    assert found["clean"]["error"] == pytest.approx(expected["error"])
    assert found["clean"]["ece"] == pytest.approx(expected["ece"], abs=1e-3)
    few = evaluate(folder, "--corruptions", "brightness", "--limit", 5, "--overwrite")[
        "checkpoints"
    ][0]
    kept = rows[data.stratified_split(test.y[rows], 5, 0, "--limit")[1]]
    expected = run.evaluate(model.eval(), test.take(kept))
    assert few["clean"]["ece"] == pytest.approx(expected["ece"], abs=1e-3)


def test_an_interrupted_export_goes_on(folder, monkeypatch, capsys):
    options = ["--dataset", "cifar10", "--corruptions", "fog,contrast,pixelate"]
    whole = export(folder, folder / "whole", *options)
    out = folder / "out"
    corrupt, calls = corruptions.corrupt, []

    def stop(x, name, severity, *rest, **options):
        calls.append(name)
        if name == "contrast" and severity == 4:
            raise KeyboardInterrupt
        return corrupt(x, name, severity, *rest, **options)

    monkeypatch.setattr(corruptions, "corrupt", stop)
    with pytest.raises(KeyboardInterrupt):
        export(folder, out, *options)
    assert sorted(p.name for p in out.iterdir()) == ["fog.npy", "labels.npy", "manifest.json"]
    monkeypatch.setattr(
        corruptions, "corrupt", lambda *a, **k: calls.append(a[1]) or corrupt(*a, **k)
    )
    calls.clear()
    assert export(folder, out, *options)["sha256"] == whole["sha256"]
    assert set(calls) == {"contrast", "pixelate"}
    # a damaged file is written again
    (out / "fog.npy").write_bytes(b"damaged")
    calls.clear()
    assert export(folder, out, *options)["sha256"] == whole["sha256"]
    assert set(calls) == {"fog"}
    # a subset is the same images
    some = folder / "some"
    export(folder, some, *options, "--limit", 10)
    test = data.load("cifar10", folder).test
    rows = data.stratified_split(test.y, 10, 0, "--limit")[1]
    read = data.read_corrupted(some, "fog", 3, torch.arange(10))
    assert torch.equal(read, data.read_corrupted(out, "fog", 3, rows))


@pytest.fixture
def tree(tmp_path):
    """Two classes of photographs of different sizes and formats."""
    from PIL import Image

    rng = np.random.RandomState(0)
    for name, size in (
        ("cat/a.jpg", (300, 260)),
        ("cat/b.PNG", (240, 500)),
        ("dog/a.jpeg", (90, 70)),
    ):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        small = rng.randint(0, 256, (6, 6, 3)).astype(np.uint8)
        Image.fromarray(small).resize(size, Image.BILINEAR).save(path)
    (tmp_path / "tree" / "cat" / "notes.txt").write_text("not an image")
    return tmp_path / "tree"


def test_a_set_of_files_is_no_array(tree, tmp_path):
    with pytest.raises(run.UserError, match="domains: its images are files; give --dataset folder"):
        for domain in ("one", "two"):
            shutil.copytree(tree, tmp_path / "set" / "domains" / domain)
        export(tmp_path / "set" / "domains", tmp_path / "out", "--dataset", "domains")


def test_trees_there_and_back(tree, tmp_path):
    """ImageNet-C's layout, quality 85; the files are what Pillow makes of the engine's images."""
    from io import BytesIO

    from PIL import Image

    out = tmp_path / "c"
    options = ["--dataset", "folder", "--corruptions", "fog,jpeg_compression"]
    options += ["--severities", "2,5", "--batch-size", 2, "--seed", 1]
    manifest = export(tree, out, *options)
    assert list(manifest["sha256"]) == [
        "fog/2", "fog/5", "jpeg_compression/2", "jpeg_compression/5",
    ]  # fmt: skip
    names = sorted(str(p.relative_to(out / "fog" / "5")) for p in (out / "fog" / "5").rglob("*.*"))
    assert names == ["cat/a.JPEG", "cat/b.JPEG", "dog/a.JPEG"]
    files = script.photographs(tree)
    x = torch.stack([script.photograph(f) for f in files])
    assert x.shape == (3, 3, 224, 224)
    for name, severity in (("fog", 5), ("jpeg_compression", 2)):
        for image, path in zip(corruptions.corrupt(x, name, severity, seed=1), names, strict=True):
            file = BytesIO()
            image = Image.fromarray(image.permute(1, 2, 0).numpy())
            image.save(file, "JPEG", quality=85, optimize=True)
            assert (out / name / str(severity) / path).read_bytes() == file.getvalue()
    shutil.rmtree(out / "fog" / "5" / "cat")  # an interrupted export
    again = export(tree, out, *options)
    assert again["sha256"] == manifest["sha256"]


def test_trees_are_read_as_for_training(tmp_path):
    """Greys of 16 bits keep their range, hidden files do not count, what is broken is named."""
    from PIL import Image

    (tmp_path / "a").mkdir()
    for name in ("x.png", "y.tiff"):
        Image.fromarray(np.full((300, 300), 100 * 257, np.uint16)).save(tmp_path / "a" / name)
    (tmp_path / "a" / ".x.png").write_text("hidden")
    files = script.photographs(tmp_path)
    assert [f.name for f in files] == ["x.png", "y.tiff"]
    assert all(script.photograph(f).eq(100).all() for f in files)
    files[0].write_bytes(files[0].read_bytes()[:100])
    with pytest.raises(run.UserError, match=r"x\.png: not a readable image \(.*truncated"):
        script.photograph(files[0])


def test_errors(folder, tree, tmp_path):
    out = tmp_path / "out"
    for options, message in (
        (["--dataset", "cifar10", "--severities", "1,2"], "holds all five"),
        ([], "--dataset is needed: cifar10"),
        (["--dataset", "cifar10", "--frost-dir", tmp_path], "frost1.png"),
    ):
        with pytest.raises(run.UserError, match=message):
            export(folder, out, *options)
    assert not out.exists()
    with pytest.raises(run.UserError, match=r"no images <class>/\*\.jpg"):
        export(tmp_path / "nowhere", out, "--dataset", "folder")
    export(folder, out, "--dataset", "cifar10", "--corruptions", "contrast")
    with pytest.raises(run.UserError, match="with seed 0, not 1"):
        export(folder, out, "--dataset", "cifar10", "--seed", 1)
    (tree / "dog" / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(run.UserError, match=r"broken\.jpg: not a readable image"):
        export(tree, tmp_path / "c", "--dataset", "folder", "--corruptions", "fog")
    (tree / "dog" / "broken.png").write_bytes(b"no image")
    with pytest.raises(run.UserError, match="two files are called broken"):
        export(tree, tmp_path / "c", "--dataset", "folder", "--corruptions", "fog")
    (tmp_path / "file").write_text("")
    with pytest.raises(run.UserError, match=r"cannot write in .*; give DIR elsewhere"):
        export(folder, tmp_path / "file" / "out", "--dataset", "cifar10")


def test_the_old_command_names_the_new_one():
    """`eval/corruptions.py --export DIR` says in one line what replaced it."""
    with pytest.raises(run.UserError, match=r"python eval/export\.py OUT --dataset cifar10"):
        evaluation.parse_args(["--export", "OUT", "--dataset", "cifar10"])
