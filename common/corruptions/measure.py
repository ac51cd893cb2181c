"""The error of networks under all corruptions."""

import torch

from common import run
from common.corruptions.engine import corrupt
from common.corruptions.names import NAMES
from common.corruptions.weather import frost_textures


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
