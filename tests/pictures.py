"""Picture files for tests, written by Pillow."""

import io

from torchvision.transforms.v2.functional import to_pil_image


def write(x, path, quality=75):
    """uint8 (3,H,W) to the file `path`, in the format of its ending; quality: of a JPEG."""
    to_pil_image(x).save(path, quality=quality)


def encoded(x, kind):
    """The bytes of a file of format `kind`, of uint8 (3,H,W)."""
    to_pil_image(x).save(file := io.BytesIO(), kind)
    return file.getvalue()
