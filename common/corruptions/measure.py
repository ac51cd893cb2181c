"""The error of networks under all corruptions."""

import torch

from common import run
from common.corruptions.engine import _check_name, _severities, corrupt
from common.corruptions.images import as_batch
from common.corruptions.names import NAMES, SEVERITIES
from common.corruptions.weather import frost_textures

SHOWN = ("gaussian_noise", "defocus_blur", "fog", "contrast")  # in the picture, below the originals


def corruption_errors(networks, dataset, args, precision=None):
    """{name: mean error (%)} over the 15 corruptions and 5 severities, generated with seed 0.

    networks: {name: model}. The first --corrupted-images test images of the data set are taken.
    """
    images = dataset.test.take(slice(0, args.corrupted_images))
    sums, part = dict.fromkeys(networks, 0.0), run.rows(len(images.y))
    index, mine = torch.arange(len(images.y), device=images.device)[part], images.take(part)
    options = {"index": index, "data_dir": args.data_dir, "scale": dataset.scale}
    for name in NAMES:
        for severity in range(1, 6):
            found = mine.changed(corrupt(mine.x, name, severity, **options))
            for key, model in networks.items():
                sums[key] += run.evaluate(model, found, precision, mine=True)["error"]
    return {key: value / 75 for key, value in sums.items()}


def describe(dataset, args):
    """What stands under a column of `corruption_errors`."""
    count = min(args.corrupted_images, len(dataset.test))
    return (
        f"corrupted: mean of 15 corruptions x 5 severities, {count} images, generated with seed 0\n"
        f"  frost: {frost_textures(data_dir=args.data_dir)[1]}"
    )


def corruption_table(
    model,
    x,
    y,
    names=NAMES,
    severities=SEVERITIES,
    seed=0,
    batch_size=500,
    *,
    report=None,
    **options,
):
    """The error (%) of a model on clean images and under each corruption, as a dict.

    >>> net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    >>> x, y = torch.rand(20, 3, 32, 32), torch.arange(20) % 10
    >>> list(corruption_table(net, x, y, names=["fog", "contrast"]))
    ['clean', 'fog', 'contrast', 'mean']

    model: a module in any mode, from images (N,3,S,S) in [0,1] to logits (N,K), a tuple that begins
        with them, or a dict with the key "logits". The images go to its device, batch by batch.
    x: images in any form that `corrupt` takes; floats are rounded to grey levels.
    y: (N,) labels, a tensor, an array or a list of whole numbers.
    names, severities: the corruptions, and the severities that each error is the mean of.
    seed: of the corruptions; image i has the same noise in every call.
    report: a function that gets each line of the table as it is measured, such as print.
    options: scale, frost_dir and data_dir of `corrupt`. Without its textures frost is procedural.

    "mean" is the mean over the names, without "clean". Raises run.InputError for bad input.
    """
    x, _ = as_batch(x)
    y = _labels(y, len(x))
    names = [names] if isinstance(names, str) else list(names)
    severities = _severities(list(severities), len(severities)).tolist()
    if not names or not severities:
        raise run.InputError("give at least one corruption and one severity")
    for name in names:
        _check_name(name)
    device = next((p.device for p in model.parameters()), x.device)

    def error(name=None, severity=None):
        wrong = 0
        for rows in torch.arange(len(x)).split(batch_size):
            part, truth = x[rows].to(device), y[rows].to(device)
            if name:
                index = rows.to(device)
                part = corrupt(part, name, severity, seed, index, **options)
            logits = run.predict(model, part, batch_size=batch_size)
            if rows[0] == 0 and y.max() >= logits.shape[1]:
                raise run.InputError(
                    f"labels up to {y.max()}, but the model has {logits.shape[1]} logits"
                )
            wrong += run.counts(logits, truth)[1].item()
        return 100 * wrong / len(x)

    def noted(name, value):
        if report:
            report(f"{name:18} {value:6.2f}")
        table[name] = value

    table = {}
    noted("clean", error())
    for name in names:
        noted(name, sum(error(name, severity) for severity in severities) / len(severities))
    noted("mean", sum(table[name] for name in names) / len(names))
    return table


def _labels(y, count):
    """int64 (count,) of labels; InputError unless there is one for each image."""
    y = torch.as_tensor(y)
    if y.shape != (count,) or not count:
        raise run.InputError(f"{count} images and labels {tuple(y.shape)}: give one for each image")
    if y.is_floating_point() or y.dtype == torch.bool or y.min() < 0:
        raise run.InputError("labels are whole numbers from 0 on")
    return y.long()


def show(networks, dataset, args, rundir):
    """Write a picture for TensorBoard: test images, corrupted ones, and what each network says.

    networks: {name: model}; one that was not trained in this run has no sub-run, and no picture.
    """
    few = dataset.test.take(slice(0, 8)).x
    options = {"severity": 3, "data_dir": args.data_dir, "scale": dataset.scale}
    x = torch.cat([few, *(corrupt(few, name, **options) for name in SHOWN)])
    for name, model in networks.items():
        if rundir.step(name):
            said = [str(dataset.classes[k]) for k in run.predict(model, x).argmax(1)]
            picture = run.captioned(run.to_float(x), said, len(few))
            writer = rundir.writer(name)
            writer.add_image("corrupted", picture, rundir.step(name), dataformats="HWC")
