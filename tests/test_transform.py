"""The corruptions as a library: forms of images, severities of each, the step of a pipeline."""

import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms, tv_tensors
from torchvision.transforms import v2

from common import corruptions, run
from common.corruptions import Corrupt, corrupt


@pytest.fixture(scope="module")
def x():
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8, generator=generator)


# --- corrupt --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["uint8", "float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("shape", ["NCHW", "CHW", "NHWC", "HWC"])
@pytest.mark.parametrize("form", ["tensor", "array"])
def test_images_come_back_as_they_came(x, form, shape, dtype):
    """Type, shape, layout, dtype; and the values are those of the uint8 batch."""
    if (form, dtype) == ("array", "bfloat16"):
        pytest.skip("NumPy has no bfloat16")

    def formed(y):
        y = y if dtype == "uint8" else (y.float() / 255).to(getattr(torch, dtype))
        y = y if "N" in shape else y[0]
        y = y if "CH" in shape else y.movedim(-3, -1)
        return y if form == "tensor" else y.numpy()

    found = corrupt(formed(x), "fog", 3, seed=1)
    expected = formed(corrupt(x, "fog", 3, seed=1))
    assert type(found) is type(expected)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert (found == expected).all()


def test_floats_between_the_levels_go_to_the_nearest(x):
    shifted = (x.float() / 255 + 0.4 / 255).clamp(0, 1)
    assert torch.equal(corrupt(shifted, "contrast", 2), corrupt(x.float() / 255, "contrast", 2))


def test_what_is_handed_over_stays_as_it_is(x):
    for given in (x.clone(), x.float() / 255, x.numpy().copy(), np.float64(x.numpy() / 255)):
        before = given.copy() if isinstance(given, np.ndarray) else given.clone()
        corrupt(given, "gaussian_noise", 5)
        assert (given == before).all()


@pytest.mark.parametrize("as_form", [list, np.array, torch.tensor])
def test_every_image_has_its_severity(x, as_form):
    severities = [5, 1, 3, 3, 1, 2]
    found = corrupt(x, "snow", as_form(severities), seed=4)
    for i, severity in enumerate(severities):
        alone = corrupt(x[i : i + 1], "snow", severity, seed=4, index=torch.tensor([i]))
        assert torch.equal(found[i : i + 1], alone)


@pytest.mark.parametrize("one", [3, np.int64(3), np.array(3), torch.tensor(3)])
def test_one_severity_in_any_form(x, one):
    assert torch.equal(corrupt(x, "snow", one, seed=4), corrupt(x, "snow", [3] * 6, seed=4))


def test_one_image_makes_other_noise_each_time(x):
    first, second = (corrupt(x[0], "gaussian_noise", 3) for _ in range(2))
    assert not torch.equal(first, second)


BAD = {
    "rank": (lambda x: x[0, 0], "fog", 1, r"images \(N,3,S,S\).*got \(32, 32\)"),
    "channels": (lambda x: x[:, :1], "fog", 1, r"got \(6, 1, 32, 32\)"),
    "dtype": (lambda x: x.int(), "fog", 1, "got torch.int32"),
    "array's dtype": (lambda x: x.numpy().astype(int), "fog", 1, "got int64"),
    "above 1": (lambda x: x.float(), "fog", 1, "got 0 to 255; corrupt before a normalisation"),
    "below 0": (lambda x: x.float() / 255 - 0.1, "fog", 1, r"got -0.1 to 0.9"),
    "NaN": (lambda x: x * float("nan"), "fog", 1, "got nan to nan"),
    "not square": (lambda x: x[..., :30], "fog", 1, "square images, got 32x30"),
    "no images": (lambda x: "cat.png", "fog", 1, "got str"),
    "severity 0": (lambda x: x, "fog", 0, "severity 0: choose one of 1, 2, 3, 4, 5"),
    "severity 6": (lambda x: x, "fog", 6, "severity 6: choose"),
    "a float": (lambda x: x, "fog", 2.5, "severity 2.5: give whole numbers"),
    "a word": (lambda x: x, "fog", "high", "severity 'high': give whole numbers"),
    "too few": (lambda x: x, "fog", [1, 2], r"each of the 6 images, got \(2,\)"),
    "one is 7": (lambda x: x, "fog", torch.tensor([1, 2, 3, 4, 5, 7]), "severity 7: choose"),
    "name": (lambda x: x, "motionblur", 1, "unknown.*did you mean 'motion_blur'"),
    "no name": (lambda x: x, None, 1, "unknown corruption None; known: gaussian_noise"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(x, case):
    make, name, severity, message = BAD[case]
    with pytest.raises(ValueError, match=message) as caught:
        corrupt(make(x), name, severity)
    assert isinstance(caught.value, run.UserError) and "\n" not in str(caught.value)


# --- Corrupt --------------------------------------------------------------------------------------


def test_a_transform_gives_what_it_takes(x):
    array = x[0].permute(1, 2, 0).numpy()
    transform = Corrupt("brightness", 4)
    expected = corrupt(x[0], "brightness", 4)
    image = transform(Image.fromarray(array))
    assert isinstance(image, Image.Image) and image.mode == "RGB"
    assert np.array_equal(np.array(image), expected.permute(1, 2, 0))
    assert np.array_equal(transform(array), expected.permute(1, 2, 0))
    assert torch.equal(transform(x[0]), expected)
    assert torch.equal(transform(x[0] / 255), expected / 255)
    assert torch.equal(transform(x), corrupt(x, "brightness", 4))
    with pytest.raises(ValueError, match=r'mode L: image.convert\("RGB"\) first'):
        transform(Image.fromarray(array).convert("L"))
    with pytest.raises(ValueError, match="got str"):
        transform("cat.png")


def test_a_transform_draws_among_names_and_severities(x):
    """Each of 2 x 2 pairs about as often as the others, and one draw for every image of a batch."""
    names, severities = ["brightness", "contrast"], (1, 5)
    possible = [corrupt(x[0], name, severity) for name in names for severity in severities]
    torch.manual_seed(0)
    batch = x[:1].expand(400, -1, -1, -1)
    seen = Corrupt(names, severities)(batch)
    counts = [(seen == y).flatten(1).all(1).sum().item() for y in possible]
    assert sum(counts) == 400
    assert all(abs(count - 100) < 5 * (400 * 0.25 * 0.75) ** 0.5 for count in counts), counts


def test_a_transform_in_torchvisions_pipelines(x):
    pipeline = transforms.Compose(
        [
            transforms.RandomHorizontalFlip(),
            Corrupt("gaussian_noise", 3),
            transforms.ToTensor(),
            transforms.Normalize((0.5,) * 3, (0.5,) * 3),
        ]
    )
    image = Image.fromarray(x[0].permute(1, 2, 0).numpy())
    torch.manual_seed(3)
    first, second = pipeline(image), pipeline(image)
    assert first.shape == (3, 32, 32) and not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(pipeline(image), first)
    assert "names=['gaussian_noise'], severities=[3]" in repr(pipeline)


def test_a_transform_in_torchvisions_second_version(x):
    """An image of torchvision.transforms.v2 stays one for the next step."""
    pipeline = v2.Compose([v2.ToImage(), Corrupt("fog", 3), v2.ToDtype(torch.float32, scale=True)])
    for image in (Image.fromarray(x[0].permute(1, 2, 0).numpy()), tv_tensors.Image(x[0])):
        found = pipeline(image)
        assert type(found) is tv_tensors.Image and found.dtype == torch.float32
        assert found.shape == (3, 32, 32) and found.max() <= 1
    batch = Corrupt("brightness", 3)(tv_tensors.Image(x))
    assert type(batch) is tv_tensors.Image
    assert torch.equal(batch.as_subclass(torch.Tensor), corrupt(x, "brightness", 3))


class Same(Dataset):
    """The same grey picture at every place, corrupted."""

    def __init__(self):
        self.transform = Corrupt("gaussian_noise", 3)

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return self.transform(torch.full((3, 32, 32), 128, dtype=torch.uint8))


def test_every_worker_and_epoch_makes_other_noise():
    torch.manual_seed(5)
    for persistent in (False, True):
        loader = DataLoader(Same(), 2, num_workers=2, persistent_workers=persistent)
        seen = torch.cat([y for _ in range(2) for y in loader])
        assert len(torch.unique(seen.flatten(1), dim=0)) == 16
    sent = pickle.loads(pickle.dumps(Same().transform))  # as to a worker that is spawned
    assert repr(sent) == repr(Same().transform)


@pytest.mark.parametrize(
    ("names", "severities", "options", "message"),
    [
        ("fogg", 1, {}, "did you mean 'fog'"),
        (["fog", "haze"], 1, {}, "unknown corruption 'haze'"),
        ([], 1, {}, "at least one name"),
        ("fog", 0, {}, "severity 0"),
        ("fog", (1, 6), {}, "severity 6"),
        ("fog", "3", {}, "whole numbers"),
        ("fog", [], {}, "one severity"),
        ("fog", 1, {"seed": 0}, "there is no option seed"),
    ],
)
def test_a_transform_refuses_at_once(names, severities, options, message):
    with pytest.raises(ValueError, match=message):
        Corrupt(names, severities, **options)


def test_the_transform_of_all_corruptions(x):
    """Every corruption at every severity takes one float image."""
    for name in corruptions.EVERY:
        found = Corrupt(name, (1, 2, 3, 4, 5))(x[0] / 255)
        assert found.shape == (3, 32, 32) and 0 <= found.min() and found.max() <= 1, name


# --- corruption_table -----------------------------------------------------------------------------


class Bright(torch.nn.Module):
    """Class 1 for an image whose mean is above 0.5, else class 0; with a parameter to find."""

    def __init__(self):
        super().__init__()
        self.threshold = torch.nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        above = x.mean((1, 2, 3)) - self.threshold
        return {"logits": torch.stack([-above, above], 1)}


@pytest.fixture(scope="module")
def grey():
    """Thirty flat images from dark to light, uint8, and what Bright says of them."""
    level = torch.arange(30, dtype=torch.uint8) * 8 + 3
    return level[:, None, None, None].expand(-1, 3, 32, 32), (level > 127.5).long()


def test_the_table_counts_what_is_wrong(grey, capsys):
    """Brightness adds to every level, so the images that it lifts over the threshold are wrong."""
    x, y = grey
    net = Bright().train()
    table = corruptions.corruption_table(net, x, y, names=["brightness", "contrast"])
    assert list(table) == ["clean", "brightness", "contrast", "mean"]
    assert table["clean"] == 0 and net.training
    added = (0.05, 0.1, 0.15, 0.2, 0.3)
    level = x[:, 0, 0, 0].double()
    lifted = [
        (((level + 255 * a).floor() > 127.5) != (y == 1)).double().mean().item() for a in added
    ]
    assert table["brightness"] == pytest.approx(100 * sum(lifted) / 5, abs=1e-9)
    assert table["contrast"] == 0  # a flat image stays as it is
    assert table["mean"] == pytest.approx(table["brightness"] / 2)
    assert capsys.readouterr() == ("", "")


def test_the_table_of_any_form_and_batch(grey):
    x, y = grey
    names = ["gaussian_noise", "brightness"]
    table = corruptions.corruption_table(Bright(), x, y, names, seed=3)
    for images, labels, size in (
        (x.float() / 255, y.int(), 7),
        (x.permute(0, 2, 3, 1).numpy(), y.numpy(), 500),
        (x.numpy(), y.tolist(), 1),
    ):
        again = corruptions.corruption_table(
            Bright(), images, labels, names, seed=3, batch_size=size
        )
        assert again == table


def test_the_table_is_that_of_the_command(grey):
    """The same images as corruption_errors, all 15 and 5; printed where asked."""
    x, y = grey
    images = type("Images", (), {"x": x, "y": y, "device": x.device})()
    lines = []
    table = corruptions.corruption_table(Bright(), x, y, report=lines.append)
    assert list(table) == ["clean", *corruptions.NAMES, "mean"]
    assert lines[-1].split() == ["mean", f"{table['mean']:.2f}"] and len(lines) == 17
    for name in ("fog", "gaussian_noise"):
        wrong = 0
        for severity in corruptions.SEVERITIES:
            found = run.predict(Bright(), corrupt(images.x, name, severity, seed=0))
            wrong += (found.argmax(1) != y).sum().item()
        assert table[name] == pytest.approx(100 * wrong / 150)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": [0, 1]}, r"30 images and labels \(2,\)"),
        ({"y": torch.zeros(30)}, "whole numbers"),
        ({"y": -torch.ones(30).long()}, "whole numbers from 0"),
        ({"y": torch.arange(30)}, "labels up to 29, but the model has 2 logits"),
        ({"names": ["fogg"]}, "did you mean 'fog'"),
        ({"names": []}, "at least one corruption"),
        ({"severities": (0,)}, "severity 0"),
        ({"x": torch.zeros(30, 32, 32)}, r"got \(30, 32, 32\)"),
    ],
)
def test_the_table_refuses(grey, change, message):
    given = {"x": grey[0], "y": grey[1], "names": ["fog"]} | change
    with pytest.raises(ValueError, match=message):
        corruptions.corruption_table(Bright(), **given)
