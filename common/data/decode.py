"""One image file at a time: decoded, cropped, resized.

    x = decode("a.jpg")                        # uint8 (3,H,W), RGB
    x = fitted(x, 224, "crop")                 # uint8 (3,224,224), for an evaluation
    x = augmented(x, 224, (0.08, 1), True, rng)      # the same shape, for a training

Greyscale, palette, CMYK, transparent and 16-bit files become 8-bit RGB. An animation is its first
frame. A file that is no whole picture raises Unreadable with the reason.
"""

import errno
import io
import math
import os
import stat
import warnings

import numpy as np
import torch

from common.run import UserError


class Unreadable(Exception):
    """A file that is no whole picture; its text is the reason."""


# By content, whatever the name says. No other decoder of Pillow sees a file: some start programs.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "PPM", "TIFF")
FULL = (errno.EMFILE, errno.ENFILE)  # no more open files: no fault of the picture


def decode(path):
    """uint8 (3,H,W), RGB, of an image file. Raises Unreadable, whatever is wrong with the file.

    Pillow decodes, as for torchvision's ImageFolder: its decoders refuse damaged files, where those
    of torchvision may end the process (vision #3613, #4485). Like there, transparency is dropped
    and an animation is its first frame. No format is turned by an orientation in the EXIF data.
    Grey of more than 8 bits keeps its greys, see `_eight_bits`. A picture of over twice
    PIL.Image.MAX_IMAGE_PIXELS pixels is unreadable.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait for its writer
            raise Unreadable("no file but a folder, a pipe or a device")
        with open(path, "rb") as file:
            content = io.BytesIO(file.read())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged tags that the picture does not need
            with Image.open(content, formats=FORMATS) as image:
                image = _as_stored(image)
                if image.mode.startswith("I") or image.mode == "F":
                    grey = torch.from_numpy(_eight_bits(np.array(image)))
                    return grey.repeat(3, 1, 1)
                return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    except UnidentifiedImageError:
        raise Unreadable(
            "no image of a known format, or truncated" if content.getvalue() else "empty"
        ) from None
    except Unreadable:
        raise
    except Exception as error:  # Pillow's: OSError, SyntaxError, struct.error, ValueError, ...
        if isinstance(error, OSError) and error.errno in FULL:
            raise UserError(f"{error.strerror}; raise the limit (ulimit -n)") from None
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise Unreadable(reason.splitlines()[0][:100]) from None


def _as_stored(image):
    """The picture of a Pillow image as its file stores it. Pillow turns TIFF files alone by their
    orientation, which would treat one format unlike the others; this turns them back."""
    from PIL import Image

    if image.format != "TIFF":
        return image
    orientation = image.getexif().get(0x0112)
    image.load()  # turns the picture
    turn = Image.Transpose
    back = {
        2: turn.FLIP_LEFT_RIGHT, 3: turn.ROTATE_180, 4: turn.FLIP_TOP_BOTTOM, 5: turn.TRANSPOSE,
        6: turn.ROTATE_90, 7: turn.TRANSVERSE, 8: turn.ROTATE_270,
    }  # fmt: skip
    return image.transpose(back[orientation]) if orientation in back else image


def _eight_bits(grey):
    """uint8 (H,W) of integers or floats (H,W). White is 65535 for integers, and for floats the
    first of 1, 255 and 65535 that no value is above; where all are, the largest value. What is
    negative or not a number is black."""
    scales = (1, 255, 65535) if grey.dtype.kind == "f" else (65535,)
    grey = np.nan_to_num(grey.astype(np.float64), nan=0, posinf=0, neginf=0)
    most = grey.max(initial=0)
    white = next((scale for scale in scales if most <= scale), most)
    return (grey.clip(0) / white * 255).round().astype(np.uint8)


def crop_box(height, width, scale, rng):
    """(top, left, height, width) of torchvision's RandomResizedCrop, ratio 3/4 to 4/3; rng:
    random.Random. The whole picture, cut to that ratio, when ten draws do not fit."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    return (height - h) // 2, (width - w) // 2, h, w


def augmented(image, size, scale, flip, rng):
    """uint8 (3,H,W) to (3,size,size): random resized crop and, with `flip`, mirrored at 1/2."""
    import torchvision.transforms.v2.functional as tf

    box = crop_box(*image.shape[1:], scale, rng)
    image = tf.resized_crop(image, *box, [size, size], antialias=True)
    return image.flip(2) if rng.random() < 0.5 * flip else image


def fitted(image, size, fit):
    """uint8 (3,H,W) to (3,size,size) without chance.

    fit: "crop": short side to 8/7 of the size, centre; "squash": both sides to the size; "exact":
    the file must have that size. Raises UserError where it has not.
    """
    import torchvision.transforms.v2.functional as tf

    height, width = image.shape[1:]
    if fit == "exact":
        if (height, width) != (size, size):
            raise UserError(f"is {width}x{height} pixels, where {size}x{size} are expected")
        return image
    if fit == "squash":
        return tf.resize(image, [size, size], antialias=True)
    return tf.center_crop(tf.resize(image, [round(size * 8 / 7)], antialias=True), [size, size])
