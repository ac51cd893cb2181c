"""The corruption engine against the outputs of the original code, and its own random numbers.

tests/golden/corruptions.npz was made by the code of hendrycks/robustness (NumPy 1.26, SciPy 1.11,
scikit-image 0.20, OpenCV 4.8.1, Pillow 10.4, ImageMagick 6.9 Q16; impulse_noise as in scikit-image
0.18; AVX-512 switched off in NumPy, whose exp() then is the C library's) from CIFAR-10 test image
0: `clean`, one array (5,32,32,3) per corruption but frost, and `sha256`, JSON of the first 16
digits of the hash of its output on that image enlarged to 64 and 224 pixels by repetition. Before
each output: np.random.seed(7000 + severity).
"""

import hashlib
import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common import corruptions, data, models, run
from common.corruptions import digital, engine, noise, weather

GOLDEN = Path(__file__).parent / "golden" / "corruptions.npz"
EVERY = [*corruptions.NAMES, *corruptions.EXTRA]
DETERMINISTIC = [
    "brightness", "contrast", "saturate", "pixelate", "gaussian_blur", "defocus_blur", "zoom_blur",
]  # fmt: skip


def to_torch(images):
    """(N,S,S,3) to (N,3,S,S)."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def to_numpy(x):
    return x.permute(0, 2, 3, 1).numpy()


def numpy_draws(name, c, image, frost_sizes=None):
    """The random numbers of the original code for one image (S,S,3), from np.random in its order,
    as `corruptions.apply` takes them. Integers become the middle of their interval in [0,1)."""
    size, rng = len(image), np.random
    if name in ("gaussian_noise", "speckle_noise"):
        return [rng.standard_normal((size, size, 3)).transpose(2, 0, 1)]
    if name == "shot_noise":
        return [rng.poisson(image / 255.0 * c).transpose(2, 0, 1).astype(np.int64)]
    if name == "impulse_noise":
        return [rng.random_sample((size, size, 3)).transpose(2, 0, 1) for _ in range(2)]
    if name == "glass_blur":
        _, d, passes = c
        box = size - 2 * d
        shifts = [rng.randint(-d, d, size=(box * box, 2)) for _ in range(passes)]
        return [(np.stack(shifts).reshape(passes, box, box, 2) + d + 0.5) / (2 * d)]
    if name == "motion_blur":
        return [rng.random_sample(1)]
    if name in ("snow", "spatter"):
        layer = rng.standard_normal((size, size))
        return [layer, rng.random_sample(1)] if name == "snow" else [layer]
    if name == "frost":
        which = rng.randint(5)
        rows, cols = (int(n) - size for n in frost_sizes[which])
        row, col = rng.randint(0, rows), rng.randint(0, cols)
        return [np.array([(which + 0.5) / 5, (row + 0.5) / rows, (col + 0.5) / cols])]
    if name == "fog":
        side = 1 << (size - 1).bit_length()
        return [rng.random_sample(side * side - 1)]
    if name == "elastic_transform":
        return [rng.random_sample((3, 2)), rng.random_sample((2, size, size))]
    return []


def as_original(images, name, severity, seed, frost_dir=None, scale=None):
    """What the original code makes of uint8 images (N,S,S,3) after np.random.seed(seed)."""
    c, scale = engine._constants(name, severity, images.shape[1], scale)
    sizes = None
    if name == "frost":
        sizes = weather._frost_canvas(frost_dir, scale, torch.device("cpu"))[1]
    np.random.seed(seed)
    draws = zip(*[numpy_draws(name, c, image, sizes) for image in images], strict=True)
    draws = [torch.from_numpy(np.ascontiguousarray(np.stack(d))) for d in draws]
    return to_numpy(corruptions.apply(to_torch(images), name, severity, draws, frost_dir=frost_dir))


def check(name, severity, ours, original):
    difference = np.abs(ours.astype(int) - original)
    share = (difference > 0).mean()
    assert not difference.any(), f"{name} {severity}: {share:.1e} of the values differ"


# --- equality with the original -------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in EVERY if n != "frost"])
def test_equals_the_original_at_32(name):
    with np.load(GOLDEN) as golden:
        clean, expected = golden["clean"], golden[name]
    for severity in corruptions.SEVERITIES:
        check(name, severity, as_original(clean, name, severity, 7000 + severity)[0],
              expected[severity - 1])  # fmt: skip


@pytest.mark.parametrize("size", [64, 224])
def test_equals_the_original_at(size):
    """On an image of constant patches, where one rounding too many costs a level everywhere."""
    with np.load(GOLDEN) as golden:
        clean, digests = golden["clean"], json.loads(golden["sha256"].tobytes())[str(size)]
    clean = clean.repeat(size // 32, 1).repeat(size // 32, 2)
    wrong = [
        f"{name} {severity}"
        for name, by_severity in digests.items()
        for severity, digest in by_severity.items()
        if digest
        != hashlib.sha256(
            as_original(clean, name, int(severity), 7000 + int(severity)).tobytes()
        ).hexdigest()[:16]
    ]
    assert not wrong
    assert len(digests) == 16


@pytest.mark.parametrize("name", EVERY)
def test_equals_all_golden_images(shared, name):
    frost = shared / "golden" / "frost"
    for file, severities in (("cifar_c", (1, 2, 3, 4, 5)), ("imagenet_c", (1, 3, 5))):
        with np.load(shared / "golden" / f"{file}.npz") as golden:
            clean, expected = golden["clean"], golden[name]
        for severity, original in zip(severities, expected, strict=True):
            ours = as_original(clean, name, severity, 7000 + severity, frost)
            check(name, severity, ours, original)


def test_equals_the_released_images(shared):
    """The seven deterministic corruptions on CIFAR-10-C as released, image 0 (itself recovered to
    within one level on 2 % of its values)."""
    with np.load(shared / "golden" / "cifar10c_release_index0.npz") as released:
        x = to_torch(released["clean"][None])
        names = released["corruptions"].tolist()
        for name in DETERMINISTIC:
            for severity in corruptions.SEVERITIES:
                ours = to_numpy(corruptions.corrupt(x, name, severity, seed=0))[0]
                theirs = released["images"][names.index(name), severity - 1]
                difference = np.abs(ours.astype(int) - theirs)
                assert difference.max() <= 1, (name, severity)
                assert (difference > 0).mean() < 0.05, (name, severity)


def test_frost_crops_of_the_release(shared):
    """Texture and corner of the released frost images are known: fed in, the images come out."""
    frost = shared / "golden" / "frost"
    _, sizes, _ = weather._frost_canvas(frost, 32, torch.device("cpu"))
    crops = [(2, 24, 70), (4, 4, 22), (5, 22, 68), (2, 16, 75), (5, 45, 58)]
    with np.load(shared / "golden" / "cifar10c_release_index0.npz") as released:
        x = to_torch(released["clean"][None])
        theirs = released["images"][released["corruptions"].tolist().index("frost")]
    for severity, (texture, row, col) in enumerate(crops, 1):
        rows, cols = (sizes[texture - 1] - 32).tolist()
        u = torch.tensor([[(texture - 0.5) / 5, (row + 0.5) / rows, (col + 0.5) / cols]]).double()
        ours = to_numpy(corruptions.apply(x, "frost", severity, [u], frost_dir=frost))[0]
        difference = np.abs(ours.astype(int) - theirs[severity - 1])
        assert difference.max() <= 3 and (difference > 0).mean() < 0.05


@pytest.mark.parametrize("size", [32, 50, 63, 224])
def test_jpeg_equals_pillow(size):
    """Bit for bit, on noise and on smooth images; Pillow brings its own libjpeg-turbo."""
    from io import BytesIO

    from PIL import Image, features

    if not features.check("libjpeg_turbo"):
        pytest.skip("this Pillow has another libjpeg")
    rng = np.random.RandomState(0)
    noise = rng.randint(0, 256, (2, size, size, 3))
    smooth = np.clip(128 + np.cumsum(rng.standard_normal((2, size, size, 3)) * 20, 1), 0, 255)
    images = np.concatenate([noise, smooth]).astype(np.uint8)
    for quality in (7, 15, 25, 40, 58, 80):
        ours = to_numpy(digital._jpeg_compression(to_torch(images), quality))
        for image, y in zip(images, ours, strict=True):
            file = BytesIO()
            Image.fromarray(image).save(file, "JPEG", quality=quality)
            assert np.array_equal(np.array(Image.open(file)), y)


# --- the project's own draws ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def images():
    """Twelve images with noise, edges and flat parts, uint8 (12,3,32,32)."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(12, 3, 4, 4, generator=generator).repeat_interleave(8, 2).repeat_interleave(8, 3)
    x = x + 0.1 * torch.randn(12, 3, 32, 32, generator=generator) * (torch.arange(32) < 16)
    return x.mul(255).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("name", EVERY)
def test_an_image_depends_on_its_index_alone(images, name):
    """Not on the batch, its order, its split, the chunk or the memory layout."""
    index = torch.arange(100, 112)
    whole = corruptions.corrupt(images, name, 4, seed=3, index=index)
    assert whole.dtype == torch.uint8 and whole.shape == images.shape
    order = torch.randperm(12)
    shuffled = corruptions.corrupt(images[order], name, 4, seed=3, index=index[order])
    assert torch.equal(shuffled, whole[order])
    parts = [
        corruptions.corrupt(images[i : i + 5], name, 4, 3, index[i : i + 5]) for i in (0, 5, 10)
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(corruptions.corrupt(images, name, 4, 3, index, chunk=7), whole)
    strided = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(corruptions.corrupt(strided, name, 4, 3, index), whole)
    if name not in (*DETERMINISTIC, "jpeg_compression"):
        assert not torch.equal(corruptions.corrupt(images, name, 4, seed=4, index=index), whole)
        same = images[:1].expand(12, -1, -1, -1)
        several = corruptions.corrupt(same, name, 4, seed=3, index=index)
        assert len(torch.unique(several, dim=0)) > 6


def test_a_generator_draws_the_seed(images):
    def noisy(seed):
        generator = torch.Generator().manual_seed(seed)
        first = corruptions.corrupt(images, "gaussian_noise", 1, generator=generator)
        return first, corruptions.corrupt(images, "gaussian_noise", 1, generator=generator)

    a, b = noisy(0)
    assert torch.equal(a, noisy(0)[0]) and not torch.equal(a, b) and not torch.equal(a, noisy(1)[0])


def test_without_an_index_every_call_makes_other_noise(images):
    """As an augmentation needs it; torch.manual_seed repeats it, and an index or a seed does."""
    torch.manual_seed(0)
    first, second = (corruptions.corrupt(images, "gaussian_noise", 3) for _ in range(2))
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(corruptions.corrupt(images, "gaussian_noise", 3), first)
    index = torch.arange(len(images))
    by_index = corruptions.corrupt(images, "gaussian_noise", 3, index=index)
    assert torch.equal(by_index, corruptions.corrupt(images, "gaussian_noise", 3, seed=0))


def test_draws_have_not_changed():
    """Published numbers hold for these draws: another stream is another corrupted set."""
    index = torch.tensor([0, 1, 9999])
    (u,) = corruptions.draw("shot_noise", 1, 32, seed=0, index=index)
    (z,) = corruptions.draw("gaussian_noise", 3, 32, seed=5, index=index)
    assert u[:, 0, 0, 0].tolist() == EXPECTED_UNIFORM
    torch.testing.assert_close(z[:, 2, 31, 31], torch.tensor(EXPECTED_NORMAL).double())


EXPECTED_UNIFORM = [0.05816652695648372, 0.21089730807580054, 0.13659844733774662]
EXPECTED_NORMAL = [-0.3940107312915089, 0.16046558556344934, 0.3011465411275364]


def test_uniform_draws_are_uniform():
    u, v = corruptions.draw("impulse_noise", 1, 32, seed=0, index=torch.arange(200))
    assert 0 <= u.min() and u.max() < 1
    n = u.numel()
    for values in (u.flatten(), v.flatten()):
        counts = torch.histc(values, 256, 0, 1)
        chi2 = ((counts - n / 256) ** 2 / (n / 256)).sum().item()
        assert abs(chi2 - 255) < 5 * math.sqrt(2 * 255)
    # neighbours in the image, the two draws, neighbouring images: not correlated
    for a, b in ((u[..., 1:], u[..., :-1]), (u, v), (u[1:], u[:-1]), (u[:, 0], u[:, 1])):
        r = ((a - 0.5) * (b - 0.5)).mean().item() * 12
        assert abs(r) < 5 / math.sqrt(a.numel())


def test_normal_draws_are_normal():
    (z,) = corruptions.draw("speckle_noise", 2, 32, seed=0, index=torch.arange(200))
    z, n = z.flatten(), z.numel()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        moment = (z**power).mean().item()
        assert abs(moment - expected) < 5 * math.sqrt(variance / n), power
    for threshold in (1.0, 2.0, 3.0, 4.0):
        p = math.erfc(threshold / math.sqrt(2))
        share = (z.abs() > threshold).double().mean().item()
        assert abs(share - p) < 5 * math.sqrt(p / n), threshold


@pytest.mark.parametrize(("scale", "severity"), [(32, 1), (32, 5), (224, 3), (224, 5)])
def test_shot_noise_is_poisson(scale, severity):
    """Output levels of four input levels against the Poisson probabilities, by chi-square."""
    c = noise.SHOT_NOISE[scale][severity - 1]
    levels = torch.tensor([3, 40, 128, 255], dtype=torch.uint8)
    x = levels.repeat(64, 3, 32, 8)[:, :, :, :32]
    y = corruptions.corrupt(x, "shot_noise", severity, seed=1, scale=scale)
    k = np.arange(2000)
    out_level = (np.clip(k / c, 0, 1) * 255).astype(np.uint8)
    log_factorial = np.array([math.lgamma(i + 1) for i in k])
    for level in levels.tolist():
        mean = level / 255 * c
        expected = np.bincount(out_level, np.exp(k * math.log(mean) - mean - log_factorial), 256)
        seen = np.bincount(y[x == level].numpy(), minlength=256)
        expected *= seen.sum()
        assert seen[expected < 1e-6].sum() == 0
        common = expected > 8
        chi2 = ((seen - expected)[common] ** 2 / expected[common]).sum()
        assert chi2 < common.sum() + 5 * math.sqrt(2 * common.sum())
    assert corruptions.corrupt(torch.zeros_like(x), "shot_noise", 5).max() == 0


def test_fed_counts_and_own_draws_agree_on_shot_noise(images):
    """The alias tables and the plain formula are two ways to one distribution: same means."""
    c = noise.SHOT_NOISE[32][4]
    x = images[:1].expand(400, -1, -1, -1).contiguous()
    own = corruptions.corrupt(x, "shot_noise", 5, seed=0).double().mean(0)
    counts = torch.poisson(x / 255 * c).long()
    fed = corruptions.apply(x, "shot_noise", 5, [counts]).double().mean(0)
    spread = 255 * math.sqrt(2 / c / 400)
    assert (own - fed).abs().max() < 5.5 * spread


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("name", EVERY)
def test_black_and_white_images(name, level):
    x = torch.full((2, 3, 32, 32), level, dtype=torch.uint8)
    for severity in (1, 3, 5):
        y = corruptions.corrupt(x, name, severity, seed=0)
        assert y.shape == x.shape
        if level == 0 and name in ("shot_noise", "speckle_noise", "contrast", "fog", "pixelate"):
            assert y.max() == 0
        if level == 255 and name in ("brightness", "gaussian_blur", "contrast", "zoom_blur"):
            assert y.min() >= 254


def test_severity_grows(images):
    """Each corruption changes the image more at severity 5 than at 1, but for three: saturate
    first removes colour, elastic_transform first shifts, and pixels of 8 fit these images."""
    x = images.double()
    for name in set(EVERY) - {"saturate", "elastic_transform", "pixelate"}:
        change = [
            (corruptions.corrupt(images, name, s, seed=0).double() - x).abs().mean() for s in (1, 5)
        ]
        assert change[1] > change[0] > 0, name


def test_chunks_bound_the_memory(images, monkeypatch):
    seen = []
    apply = engine.apply
    monkeypatch.setattr(engine, "apply", lambda x, *rest: seen.append(len(x)) or apply(x, *rest))
    corruptions.corrupt(images.repeat(20, 1, 1, 1), "fog", 1)
    assert sum(seen) == 240 and max(seen) * 32 * 32 <= corruptions.CHUNK
    seen.clear()
    corruptions.corrupt(images, "fog", 1, chunk=5)
    assert seen == [5, 5, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and `pytest -m gpu`")
@pytest.mark.parametrize("name", EVERY)
def test_gpu_equals_cpu(images, name):
    for severity in (1, 5):
        for x in (images, images.repeat_interleave(7, 2).repeat_interleave(7, 3)[:2]):
            y = corruptions.corrupt(x.cuda(), name, severity, seed=0)
            assert y.is_cuda
            difference = (y.cpu().int() - corruptions.corrupt(x, name, severity, seed=0)).abs()
            loose = name in ("zoom_blur", "elastic_transform", "spatter")
            assert difference.max() <= int(loose)
            assert (difference > 0).double().mean() <= (2e-4 if loose else 0)


# --- frost, sizes, errors -------------------------------------------------------------------------


def test_frost_says_where_its_textures_come_from(images, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert corruptions.frost_textures(data_dir=tmp_path) == (None, "procedural")
    procedural = corruptions.corrupt(images, "frost", 3, seed=0, data_dir=tmp_path)
    folder = tmp_path / "frost"
    folder.mkdir()
    write_textures(folder)
    assert corruptions.frost_textures(data_dir=tmp_path) == (folder, "official")
    found = corruptions.corrupt(images, "frost", 3, seed=0, data_dir=tmp_path)
    given = corruptions.corrupt(images, "frost", 3, seed=0, frost_dir=folder)
    assert torch.equal(found, given) and not torch.equal(found, procedural)
    (folder / "frost4.jpg").unlink()
    assert corruptions.frost_textures(data_dir=tmp_path) == (None, "procedural")
    with pytest.raises(run.UserError, match=r"no frost4\.jpg"):
        corruptions.corrupt(images, "frost", 3, seed=0, frost_dir=folder)


def test_frost_finds_imagecorruptions_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "imagecorruptions"
    (package / "frost").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    write_textures(package / "frost")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "imagecorruptions", raising=False)
    found = corruptions.frost_textures(data_dir=tmp_path / "none")
    assert found == (package / "frost", "official")


def write_textures(folder):
    from PIL import Image

    rng = np.random.RandomState(0)
    for name in corruptions.FROST_FILES:
        texture = rng.randint(0, 256, (320, 400, 3)).astype(np.uint8)
        Image.fromarray(texture).save(folder / name)


@pytest.mark.parametrize("name", EVERY)
def test_other_sizes_take_a_scale(images, name):
    x = images[:2, :, :30, :30].repeat_interleave(3, 2).repeat_interleave(3, 3)  # 90 pixels
    assert corruptions.corrupt(x, name, 3, scale=64).shape == x.shape
    with pytest.raises(run.UserError, match="scale=32, 64 or 224"):
        corruptions.corrupt(x, name, 3, seed=0)


def test_frost_needs_textures_larger_than_the_image(images):
    x = images[:1].repeat_interleave(7, 2).repeat_interleave(7, 3)
    with pytest.raises(run.UserError, match="too small for images of 224"):
        corruptions.corrupt(x, "frost", 1, scale=32)


def test_bad_input(images):
    bad = [
        (images.float(), "fog", 1, {}, r"floats in \[0,1\]"),
        (images.numpy().tolist(), "fog", 1, {}, "got list"),
        (images[:, :1], "fog", 1, {}, r"\(N,3,S,S\)"),
        (images[..., :31], "fog", 1, {}, "square"),
        (images[..., :30, :30], "fog", 1, {}, "32, 64 and 224"),
        (images[..., :16, :16], "fog", 1, {"scale": 32}, "at least 24"),
        (images, "haze", 1, {}, "unknown corruption 'haze'"),
        (images, "fog", 6, {}, "severity 6"),
        (images, "fog", 0, {}, "severity 0"),
        (images, "fog", 1, {"scale": 100}, "32, 64 or 224"),
        (images, "fog", 1, {"index": torch.arange(3)}, "12 images"),
        (images, "fog", 1, {"index": torch.zeros(12)}, "int64"),
        (images, "fog", 1, {"chunk": 0}, "chunk"),
    ]
    for x, name, severity, options, message in bad:
        with pytest.raises(run.UserError, match=message):
            corruptions.corrupt(x, name, severity, **options)
    assert corruptions.corrupt(images[:0], "fog", 1).shape == (0, 3, 32, 32)


def test_every_corruption_has_its_constants():
    assert len(corruptions.NAMES) == 15 and len(set(EVERY)) == 19
    for name in EVERY:
        for size in corruptions.SIZES:
            rows = {engine._constants(name, s, size, None)[0] for s in corruptions.SEVERITIES}
            assert len(rows) == 5, (name, size)


# --- eval/speed.py --------------------------------------------------------------------------------


def test_speed_prints_every_corruption(capsys, tmp_path):
    spec = importlib.util.spec_from_file_location("eval_speed", run.ROOT / "eval" / "speed.py")
    speed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(speed)
    file = tmp_path / "speed.json"
    options = ["--sizes", "32", "--images", "2", "--severities", "1,5", "--repeat", "1"]
    options += ["--arch", "resnet8", "--data-dir", str(tmp_path), "--json", str(file)]
    threads = torch.get_num_threads()
    try:
        output = speed.main(speed.parse_args(["corruptions", *options]))
    finally:
        torch.set_num_threads(threads)
    text = capsys.readouterr().out
    assert all(name in text for name in EVERY) and "frost: procedural" in text
    assert set(speed.ORIGINAL) == set(EVERY)
    rows = output["corruptions"]["sizes"][32]
    assert rows["sum of the 15"] == pytest.approx(sum(rows[n] for n in corruptions.NAMES))
    assert json.loads(file.read_text())["corruptions"]["frost"] == "procedural"
    with pytest.raises(run.UserError, match="33 is not one of 32, 64, 224"):
        speed.parse_args(["corruptions", "--sizes", "33"])


# --- a network trained by others, under the original code's images and the engine's ---------------

RESNET20 = run.ROOT / "eval" / "results" / "corruption_engine_resnet20.json"


def test_a_network_errs_as_under_the_original_code():
    """Of the recorded errors on 2,000 images each pair differs by sampling alone: exactly equal
    where nothing is drawn, elsewhere the images that only one side gets wrong split evenly."""
    cells = json.loads(RESNET20.read_text())["cells"]
    assert set(cells) == {*corruptions.NAMES, *corruptions.EXTRA}
    for name, rows in cells.items():
        for row in rows:
            one, other = row["wrong_in_original_only"], row["wrong_in_engine_only"]
            assert abs(row["original"] - row["engine"]) == pytest.approx(abs(one - other) / 20)
            # 95 pairs: 3.5 standard deviations are passed by chance in 4 % of such tables
            assert abs(one - other) <= 3.5 * (one + other) ** 0.5, name
            if name in DETERMINISTIC:
                assert one + other == 0, name


@pytest.mark.slow
@pytest.mark.parametrize("name", [*corruptions.NAMES, *corruptions.EXTRA])
def test_the_recorded_errors_are_the_engines(shared, cifar10_dir, name):
    """ResNet-20 of akamaster on the first 2,000 test images, seed 0; one image of rounding."""
    images = data.load("cifar10", cifar10_dir).test.take(slice(0, 2000))
    net = models.build("resnet20", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    file = shared / "checkpoints" / "resnet20-12fca82f.th"
    models.load_foreign(net, run.load_checkpoint(file, foreign=True))
    recorded = json.loads(RESNET20.read_text())["cells"][name]
    for severity, row in enumerate(recorded, 1):
        options = {"frost_dir": shared / "golden" / "frost"} if name == "frost" else {}
        x = corruptions.corrupt(images.x, name, severity, seed=0, **options)
        error = run.evaluate(net, images.changed(x))["error"]
        assert error == pytest.approx(row["engine"], abs=0.051)
