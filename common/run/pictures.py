"""Pictures for TensorBoard with words under them."""

import numpy as np
from PIL import Image, ImageDraw

WIDTH = 96  # pixels of one image, at least
LINE = 14  # pixels of the line of words


def show_batch(writer, x, count=32):
    """Write the first images of a batch x (N,3,S,S) in [0,1], eight in a row, as picture "batch".

    Inputs that are no images are left out."""
    if x.ndim == 4:
        writer.add_image("batch", captioned(x[:count], [], 8), 0, dataformats="HWC")


def captioned(images, captions, columns):
    """One picture uint8 (H,W,3) of images (N,3,S,S) in [0,1] with a line of words under each.

    captions: a text for each image, or none at all."""
    side = images.shape[-1]
    side *= max(1, -(-WIDTH // side))
    rows = -(-len(images) // columns)
    line = LINE if captions else 0
    sheet = Image.new("RGB", (columns * side, rows * (side + line)), "white")
    draw = ImageDraw.Draw(sheet)
    pixels = (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    for i, words in enumerate(captions or [""] * len(images)):
        left = i % columns * side
        top = i // columns * (side + line)
        sheet.paste(Image.fromarray(pixels[i]).resize((side, side), Image.NEAREST), (left, top))
        draw.text((left + 2, top + side), words[: side // 6], fill="black")
    return np.array(sheet)
