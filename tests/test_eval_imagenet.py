"""eval/corruptions.py on trees of ImageNet's shape: 1000 classes, few images, known answers."""

import json

import numpy as np
import pictures
import pytest
import torch
from PIL import Image

from common import corruptions, data, models, run
from common.data import decode
from common.run import UserError
from eval import corruptions as ev

WNIDS = [f"n{k:08d}" for k in range(1000, 2000)]
USED = (10, 20, 30, 40)  # classes with images


class Colour(torch.nn.Module):
    """Tells the class of a picture from its grey level, in steps of 50; class 999 for others."""

    spec = {"arch": "colour", "norm": "none", "num_classes": 1000, "image_size": 224}  # noqa: RUF012

    def forward(self, x):
        level = (x.mean((1, 2, 3)) * 255 / 50).round().long().clamp(0, 4)
        index = torch.tensor([999, *USED])[level]
        return torch.nn.functional.one_hot(index, 1000).float()


def put(folder, k, right=True, side=224):
    """A picture of class USED[k]; a wrong one has another class's grey."""
    level = 50 * (k + 1) if right else 0
    folder = folder / WNIDS[USED[k]]
    folder.mkdir(parents=True, exist_ok=True)
    x = torch.full((3, side, side), level, dtype=torch.uint8)
    pictures.write(x, folder / f"{len(list(folder.iterdir()))}.JPEG", 95)


@pytest.fixture
def root(tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(WNIDS))
    for k in range(4):
        put(tmp_path / "imagenet" / "val", k, right=k != 0, side=300)
    return tmp_path


def released(root, kinds=None, side=224):
    """ImageNet-C in which corruption i of the 15 has i + severity wrong of 20 pictures."""
    groups = {"fog": "weather", "snow": "weather", "gaussian_noise": "noise"}
    for i, name in enumerate(corruptions.NAMES):
        for severity in range(1, 6):
            folder = root / "imagenet-c" / groups.get(name, "") / name / str(severity)
            if kinds is None or name in kinds:
                for k in range(20):
                    put(folder, k % 4, right=k >= i + severity, side=side)


def evaluate_all(model, root, monkeypatch, *options):
    """The entries of main() on a network, in the place of a checkpoint."""
    facts = {"dataset": "imagenet", "method": "test", "checkpoint": "colour"}
    monkeypatch.setattr(
        ev.models, "for_evaluation", lambda *_: ([("colour", model, facts)], "imagenet")
    )
    out = root / "out.json"
    command = ["colour", "--data-dir", str(root), "--json", str(out), "--workers", "0"]
    found = ev.main(ev.parse_args([*command, "--device", "cpu", "--overwrite", *options]))
    assert json.loads(out.read_text())["checkpoints"] == found["checkpoints"]
    return found["checkpoints"]


def evaluate(root, monkeypatch, *options):
    return evaluate_all(Colour(), root, monkeypatch, *options)[0]


def test_mce_is_alexnets(root, monkeypatch, capsys):
    released(root)
    found = evaluate(root, monkeypatch)
    assert found["clean"]["error"] == pytest.approx(25)
    for i, name in enumerate(corruptions.NAMES):
        expected = [100 * min(i + s, 20) / 20 for s in range(1, 6)]
        assert found["error"][name] == pytest.approx(expected)
    shares = [np.mean(found["error"][n]) / ev.ALEXNET[n] for n in corruptions.NAMES]
    assert found["mCE"] == pytest.approx(np.mean(shares))
    out = capsys.readouterr()
    assert "mCE" in out.out and "20 images; the whole set has 50000" in out.err
    assert "imagenet-a: not in" in out.out


def test_alexnets_own_mce_is_100():
    errors = {name: 100 * e for name, e in ev.ALEXNET.items()}
    assert len(errors) == 15 and ev.mean_ce(errors) == pytest.approx(100)
    assert ev.ALEXNET["brightness"] == 0.564592 and ev.ALEXNET["jpeg_compression"] == 0.6065


def test_files_of_another_size_are_refused(root, monkeypatch):
    released(root, kinds=["gaussian_noise"], side=256)
    with pytest.raises(UserError, match=r"JPEG: is 256x256 pixels, where 224x224 are expected"):
        evaluate(root, monkeypatch, "--corruptions", "gaussian_noise")


def test_networks_of_another_size_are_refused(root, monkeypatch):
    """The released files have 224 pixels; what a network for 64 makes of them is no figure."""
    released(root, kinds=["fog"])
    monkeypatch.setattr(Colour, "spec", Colour.spec | {"image_size": 64})
    with pytest.raises(UserError, match="has 224 pixels, the network takes 64: use --generate"):
        evaluate(root, monkeypatch, "--corruptions", "fog")
    options = ("--corruptions", "brightness", "--severities", "1", "--generate")
    assert "brightness" in evaluate(root, monkeypatch, *options)["error"]


@pytest.mark.parametrize(
    "name", ["efficientnet_b0", "efficientnet_b4", "inception_v3", "googlenet"]
)
def test_torchvision_networks_of_other_images_are_refused(name):
    with pytest.raises(UserError, match=f"torchvision:{name}: takes other images than 224 of 256"):
        models.from_torchvision(name)


def test_incomplete_release(root, monkeypatch, capsys):
    released(root, kinds=["fog"])
    with pytest.raises(UserError, match="no gaussian_noise/1; complete it, choose --corruptions"):
        evaluate(root, monkeypatch)
    found = evaluate(root, monkeypatch, "--corruptions", "fog", "--severities", "1,2")
    assert "mCE" not in found and len(found["error"]["fog"]) == 2
    assert "mCE: needs all 15" in capsys.readouterr().out


def test_unreadable_files_are_counted(root, monkeypatch):
    released(root, kinds=["fog"])
    folder = root / "imagenet-c" / "weather" / "fog" / "1" / WNIDS[USED[3]]
    wrong = 10  # of 20: fog is the tenth corruption, so 9 + severity
    (folder / "4.JPEG").write_bytes(b"")  # number 19, a right one
    out = root / "out.json"
    found = evaluate(root, monkeypatch, "--corruptions", "fog", "--severities", "1")
    assert found["error"]["fog"] == pytest.approx([100 * wrong / 19])
    assert json.loads(out.read_text())["unreadable"] == 1


class Brighter(torch.nn.Module):
    """Class USED[0] for pictures darker than BatchNorm's running mean, else USED[1]."""

    spec = Colour.spec

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm2d(3, affine=False)
        self.norm.running_mean.fill_(0.45)

    def forward(self, x):
        above = self.norm(x).mean((1, 2, 3)) > 0
        index = torch.tensor(USED[:2])[above.long()]
        return torch.nn.functional.one_hot(index, 1000).float()


@pytest.fixture
def two_greys(root):
    """Ten pictures of fog at each of two severities: grey levels 50 and 100, 0.20 and 0.39."""
    for severity in "12":
        for k in (0, 1) * 5:
            put(root / "imagenet-c" / "fog" / severity, k)
    return root


FOG = ("--corruptions", "fog", "--severities", "1,2")


@pytest.mark.parametrize(("source", "error"), [("0", 0), ("10", 0), ("40", 50)])
def test_adapted_on_released_files(two_greys, monkeypatch, source, error):
    """The mean of all ten is 0.29. With 0.45 as 10 images it becomes 0.37, between the two greys;
    as 40 images 0.42, above both. The training's own takes all for dark: half are wrong."""
    options = (*FOG, "--adapt", "all", "--adapt-source", source)
    plain, adapted = evaluate_all(Brighter(), two_greys, monkeypatch, *options)
    assert plain["error"]["fog"] == pytest.approx([50, 50]) and "adapt" not in plain
    assert adapted["error"]["fog"] == pytest.approx([error, error])
    assert adapted["adapt"] == "all" and adapted["adapt_source"] == int(source)


def test_adapted_images_are_drawn_for_each_severity(two_greys, monkeypatch):
    """Five of ten, from the seed; both greys are among them, so their mean tells them apart."""
    options = (*FOG, "--adapt", "5", "--adapt-source", "0", "--batch-size", "2")
    _, adapted = evaluate_all(Brighter(), two_greys, monkeypatch, *options)
    folder = two_greys / "imagenet-c" / "fog"
    for severity, error in zip((1, 2), adapted["error"]["fog"], strict=True):
        level = torch.tensor([50.0] * 5 + [100.0] * 5)  # the folders in the order of the classes
        assert len(list((folder / str(severity)).rglob("*.JPEG"))) == 10
        rng = run.generator(0, "adapt", "fog", severity)
        mean = level[torch.randperm(10, generator=rng)[:5]].mean()
        assert 50 < mean < 100 and error == pytest.approx(0)


def test_adapt_refuses_and_notes(two_greys, monkeypatch, capsys):
    """More images than a corruption has are refused; a smaller clean set is adapted on whole."""
    with pytest.raises(UserError, match="--adapt 11: there are only 10 images"):
        evaluate_all(Brighter(), two_greys, monkeypatch, *FOG, "--adapt", "11")
    found = evaluate_all(Brighter(), two_greys, monkeypatch, *FOG, "--adapt", "10")
    assert len(found) == 2
    assert "imagenet val: 4 images for --adapt 10, all are taken" in capsys.readouterr().err
    with pytest.raises(UserError, match="--adapt 4: there are only 3 images"):
        options = ("--adapt", "4", "--limit", "3")
        evaluate_all(Brighter(), two_greys, monkeypatch, *FOG, *options)
    (only,) = evaluate_all(Colour(), two_greys, monkeypatch, *FOG, "--adapt", "4")
    assert "nothing to adapt" in capsys.readouterr().out and "adapt" not in only


def test_subsets_restrict_the_logits(root, monkeypatch):
    """A wrong picture goes to class 999, which imagenet-a lacks: there the first class wins."""
    for k in (0, 1):
        put(root / "imagenet-a", k, right=False)
        put(root / "imagenet-sketch", k, right=False)
    found = evaluate(root, monkeypatch, "--corruptions", "fog", "--severities", "1", "--generate")
    assert found["imagenet-a"] == pytest.approx(50) and found["imagenet-sketch"] == 100


def test_generated_corruptions_do_not_depend_on_the_batch(root, monkeypatch):
    options = ("--corruptions", "gaussian_noise", "--severities", "5", "--generate")
    seen = []
    monkeypatch.setattr(Colour, "forward", lambda self, x: seen.append(x.clone())
                        or torch.zeros(len(x), 1000))  # fmt: skip
    evaluate(root, monkeypatch, *options, "--batch-size", "4")
    evaluate(root, monkeypatch, *options, "--batch-size", "3")
    assert [len(x) for x in seen] == [4, 4, 3, 1, 3, 1]
    assert torch.equal(seen[1], torch.cat(seen[4:])) and not torch.equal(seen[0], seen[1])


def test_torchvision_network_by_name(tmp_path, monkeypatch):
    from torchvision.models import ResNet18_Weights, get_model

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"torchvision:resnet18: no .*; put https://.*resnet18"):
        ev.models.from_torchvision("resnet18")
    with pytest.raises(UserError, match="torchvision:resnet19: has no weights"):
        ev.models.from_torchvision("resnet19")
    theirs = get_model("resnet18").eval()
    place = tmp_path / "hub" / "checkpoints"
    place.mkdir(parents=True)
    torch.save(theirs.state_dict(), place / ResNet18_Weights.IMAGENET1K_V1.url.split("/")[-1])
    model, x = ev.models.from_torchvision("resnet18"), torch.rand(2, 3, 224, 224)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in data.IMAGENET_STATS)
    with torch.no_grad():
        torch.testing.assert_close(model(x), theirs((x - mean) / std))


def test_preprocessing_is_torchvisions(root):
    """Resize 256, centre 224: within two grey levels of the reference transform, on average 0.2."""
    from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize

    rng = np.random.default_rng(0)
    small = rng.integers(256, size=(9, 12, 3), dtype=np.uint8)
    image = Image.fromarray(small).resize((480, 360), Image.BICUBIC)
    path = root / "a.png"
    image.save(path)
    theirs = Compose([Resize(256), CenterCrop(224), PILToTensor()])(image)
    ours = decode.fitted(decode.decode(str(path)), 224, "crop")
    difference = (ours.int() - theirs.int()).abs()
    assert difference.max() <= 2 and difference.float().mean() < 0.2
    assert run.to_float(ours[None]).max() <= 1
