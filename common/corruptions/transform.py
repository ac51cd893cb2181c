"""A corruption as a step of a torchvision pipeline."""

import numpy as np
import torch

from common import run
from common.corruptions.engine import _check_name, _severities, corrupt


class Corrupt:
    """Corrupts an image, each call with other noise; for torchvision.transforms.Compose.

        Compose([RandomCrop(32, 4), Corrupt("fog", 3), ToTensor()])
        Compose([ToTensor(), Corrupt(NAMES, (1, 2, 3)), Normalize(mean, std)])

    names: a corruption, or several, of which every image draws one.
    severities: 1 to 5, or several, of which every image draws one.
    options: scale, frost_dir and data_dir of `corrupt`.

    Takes an RGB image of Pillow, or a tensor or array as `corrupt` does; a batch is one image
    after the other. Returns the same type. All draws come from torch's generator. A DataLoader
    seeds it for each worker and epoch, and torch.manual_seed makes it repeat. Without its
    textures frost is procedural. Raises run.InputError, a ValueError, for names, severities or
    images that do not exist.

    >>> transform = Corrupt(["fog", "contrast"], severities=(1, 2))
    >>> transform
    Corrupt(names=['fog', 'contrast'], severities=[1, 2])
    >>> transform(torch.rand(3, 32, 32)).dtype
    torch.float32
    """

    def __init__(self, names, severities, **options):
        self.names = [names] if isinstance(names, str) else list(names)
        severities = [severities] if np.ndim(severities) == 0 else list(severities)
        if not self.names or not severities:
            raise run.InputError("Corrupt: give at least one name and one severity")
        for name in self.names:
            _check_name(name)
        self.severities = _severities(severities, len(severities)).tolist()
        unknown = set(options) - {"scale", "frost_dir", "data_dir"}
        if unknown:
            raise run.InputError(f"Corrupt: there is no option {', '.join(sorted(unknown))}")
        self.options = options

    def __call__(self, image):
        if _is_pillow(image):
            from PIL import Image

            if image.mode != "RGB":
                raise run.InputError(
                    f"Corrupt takes RGB images, got one of mode {image.mode}: "
                    'image.convert("RGB") first'
                )
            return Image.fromarray(self(np.array(image)))
        if getattr(image, "ndim", 0) == 4 and len(image) > 0:
            together = torch.stack if isinstance(image, torch.Tensor) else np.stack
            found = together([self(one) for one in image])
        else:
            name = self.names[_drawn(len(self.names))]
            severity = self.severities[_drawn(len(self.severities))]
            found = corrupt(image, name, severity, **self.options)
        if type(image).__module__.startswith("torchvision."):  # tv_tensors.Image of its v2
            found = found.as_subclass(type(image))
        return found

    def __repr__(self):
        return f"Corrupt(names={self.names}, severities={self.severities})"


def _drawn(count):
    return torch.randint(count, ()).item()


def _is_pillow(image):
    """Without importing Pillow where nobody uses it."""
    return type(image).__module__.startswith("PIL.")
