"""The names, severities and image sizes of the corruptions, and how a command line lists them."""

from common.run import UserError

NAMES = (
    "gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow "
    "frost fog brightness contrast elastic_transform pixelate jpeg_compression"
).split()  # the 15 of the benchmark, in its order

EXTRA = ["speckle_noise", "gaussian_blur", "spatter", "saturate"]  # never part of a mean

EVERY = [*NAMES, *EXTRA]

SEVERITIES = (1, 2, 3, 4, 5)

SIZES = (32, 64, 224)  # each has its own constants; they are no function of the size


def listed_names(text):
    """argparse type: names with commas between them, or "all"."""
    chosen = EVERY if text == "all" else text.split(",")
    for name in chosen:
        if name not in EVERY:
            raise UserError(f"--corruptions: {name} is not one of {', '.join(EVERY)}")
        if chosen.count(name) > 1:
            raise UserError(f"--corruptions: {name} is named twice: name each corruption once")
    return list(chosen)


def listed_severities(text):
    """argparse type: severities with commas between them."""
    chosen = text.split(",")
    if not set(chosen) <= set("12345"):
        raise UserError(f"--severities {text}: severities are 1 to 5, as 1,3,5")
    return sorted({int(severity) for severity in chosen})


def add_arguments(parser, severities):
    """Add --frost-dir, --corruptions and --severities; severities: the help of the last."""
    parser.add_argument("--frost-dir", metavar="DIR", help="the official frost textures")
    parser.add_argument(
        "--corruptions", type=listed_names, default=EVERY, metavar="A,B",
        help="names of corruptions (default: all 19)",
    )  # fmt: skip
    parser.add_argument(
        "--severities", type=listed_severities, default=[1, 2, 3, 4, 5], metavar="1,3",
        help=severities,
    )  # fmt: skip
