"""The names, severities and image sizes of the corruptions."""

NAMES = (
    "gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow "
    "frost fog brightness contrast elastic_transform pixelate jpeg_compression"
).split()  # the 15 of the benchmark, in its order

EXTRA = ["speckle_noise", "gaussian_blur", "spatter", "saturate"]  # never part of a mean

SEVERITIES = (1, 2, 3, 4, 5)

SIZES = (32, 64, 224)  # each has its own constants; they are no function of the size
