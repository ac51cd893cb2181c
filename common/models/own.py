"""A user's network, named on the command line as FILE.py:NAME.

The code of the file runs because the user named it. A checkpoint never makes code run.
"""

import importlib.util
import inspect
import re
import sys
import traceback
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common import run
from common.models.layers import Normalize, answer
from common.run import UserError


def is_own(arch):
    """Whether the name of an architecture is FILE.py:NAME."""
    return isinstance(arch, str) and ".py:" in arch


def load_module(path):
    """The module of a Python file; its folder is searched for what it imports.

    Raises UserError with the line where the file fails."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path}: no such file; --arch takes FILE.py:NAME")
    name = f"own_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses and pickle look for it
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    with guarded(path):
        spec.loader.exec_module(module)
    return module


class guarded:
    """Inside, what the user's file raises becomes a UserError that names the line."""

    def __init__(self, path, doing=""):
        self.path, self.doing = path, doing

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, UserError) or not isinstance(error, (Exception, SystemExit)):
            return  # as for no error, and for Ctrl-C
        lines = [
            frame.lineno for frame in traceback.extract_tb(trace)
            if Path(frame.filename).name == Path(self.path).name
        ]  # fmt: skip
        line = lines[-1] if lines else getattr(error, "lineno", None)
        reason = (str(error).strip().splitlines() or ["no message"])[0][:200]
        where = f"{self.path}, line {line}" if line else str(self.path)
        raise UserError(f"{where}: {self.doing}{type(error).__name__}: {reason}") from error


def call(arch, **options):
    """The network that FILE.py:NAME gives. It gets those of the options that it has names for.

    Raises UserError where NAME is missing, needs other arguments, or gives no torch.nn.Module; and
    where it has no name for the option "norm" and is asked for another one than "bn"."""
    path, _, name = arch.rpartition(":")
    found = vars(load_module(path)).get(name)
    if found is None:
        module = vars(sys.modules[f"own_{Path(path).stem}"])
        known = [k for k, v in module.items() if callable(v) and not k.startswith("_")]
        raise UserError(
            f"{path} does not define {name}; it defines {', '.join(known) or 'nothing'}"
        )
    if isinstance(found, nn.Module):
        return found
    if not callable(found):
        raise UserError(f"{arch} is a {type(found).__name__}; name a function or a class")
    try:
        parameters = inspect.signature(found).parameters.values()
    except (TypeError, ValueError):
        parameters = ()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    plain = [p for p in parameters if p.kind not in kinds]
    given = {p.name: options[p.name] for p in plain if p.name in options}
    needed = [p.name for p in plain if p.default is p.empty and p.name not in given]
    if needed:
        raise UserError(
            f"{arch} needs arguments ({', '.join(needed)}): give them defaults, or name a function "
            "without any"
        )
    if "norm" not in given and options.get("norm", "bn") != "bn":
        raise UserError(
            f"{arch} cannot be built with norm {options['norm']}: give it a parameter norm, or "
            "choose bn"
        )
    with guarded(path, f"{name}: "):
        model = found(**given)
    if not isinstance(model, nn.Module):
        raise UserError(f"{arch} gives a {type(model).__name__}; it has to give a torch.nn.Module")
    return model


def stage_modules(net):
    """The modules of a user's or torchvision's network whose outputs may be the last feature map of
    a resolution: those named in its attribute `stages`, else layer1 to layer4, else the children of
    its trunk but for the pooling.

    Raises UserError where `stages` names a module that is not there."""
    names = getattr(net, "stages", None)
    if isinstance(names, (list, tuple)):
        modules = dict(net.named_modules())
        for name in names:
            if name not in modules:
                raise UserError(f"stages names {name}, which is no module of the network")
        return [modules[name] for name in names]
    layers = [m for name, m in net.named_children() if re.fullmatch(r"layer\d", name)]
    if layers:
        return layers
    trunks = (getattr(net, name, None) for name in ("features", "trunk_output"))
    trunk = next((t for t in trunks if isinstance(t, nn.Module)), net)
    return [m for m in trunk.children() if "Pool" not in type(m).__name__]


class Own(nn.Module):
    """A user's network of images in [0,1], with what every network here has.

    Logits are a tensor, the first of a tuple, or the entry "logits" of a dict. mean, std: where
    given, images are normalised with them first. The embedding is what the last linear layer sees.
    """

    def __init__(self, net, arch, mean=None, std=None):
        super().__init__()
        self.normalize = nn.Identity() if mean is None else Normalize(mean, std)
        self.net = net
        self.arch = arch

    def last_linear(self):
        linear = [m for m in self.net.modules() if isinstance(m, nn.Linear)]
        if not linear:
            raise UserError(f"{self.arch} has no linear layer, so no embedding: it cannot be used")
        return linear[-1]

    def forward(self, x, with_features=False, with_stages=False, dropout=0.0):
        """Logits (N,K); with_features adds the embedding h, with_stages the list of feature maps
        (see `stage_modules`). dropout: rate in training, on what the head sees of h."""
        if not with_features and not with_stages and not dropout:
            return run.logits_of(self.net(self.normalize(x)))
        seen, maps, handles = [], {}, []

        def look(layer, inputs):
            seen.append(inputs[0])
            return (F.dropout(inputs[0], dropout, self.training), *inputs[1:])

        def keep(layer, inputs, output):
            if isinstance(output, torch.Tensor) and output.ndim == 4 and output.shape[-1] > 1:
                maps[output.shape[-2:]] = output  # the last one of each resolution stays

        if with_features or dropout:
            handles.append(self.last_linear().register_forward_pre_hook(look))
        for layer in stage_modules(self.net) if with_stages else ():
            handles.append(layer.register_forward_hook(keep))
        try:
            logits = run.logits_of(self.net(self.normalize(x)))
        finally:
            for handle in handles:
                handle.remove()
        if with_stages and not maps:
            raise UserError(
                f"{self.arch} has no feature maps (N,C,H,W) that are known: give it an attribute "
                "stages, the names of the modules that return them"
            )
        h = seen[-1].flatten(1).float() if with_features else None
        return answer(logits, h, list(maps.values()) if with_stages else None)

    def features(self, x):
        """Images in [0,1] (N,3,H,W) to the embedding (N,D), fp32."""
        return self(x, with_features=True)[1]

    def head(self, h):
        """Embedding (N,D) to logits (N,K), fp32."""
        return self.last_linear()(h.float()).float()


def build_own(arch, norm="bn", num_classes=None, image_size=32, mean=None, std=None):
    """The network of FILE.py:NAME, tried on two grey images.

    norm, num_classes, image_size: given to NAME where it has parameters of these names. Raises
    UserError where its outputs are no logits of `num_classes` classes, None for any number.
    """
    options = {"norm": norm, "image_size": image_size}
    if num_classes is not None:
        options["num_classes"] = num_classes
    model = Own(call(arch, **options), arch, mean, std)
    path = arch.rpartition(":")[0]
    images = torch.full((2, 3, image_size, image_size), 0.5)
    with run.eval_mode(model), torch.no_grad(), guarded(path, f"on images {tuple(images.shape)}: "):
        try:
            shape = tuple(model(images).shape)
        except UserError as error:
            raise UserError(f"{arch}: {error}") from None
    wanted = (2, num_classes or shape[1])
    if shape != wanted:
        raise UserError(
            f"{arch}: of 2 images it gives {shape}, where logits {wanted} are needed, one for each "
            "class"
        )
    model.spec = {
        "arch": arch, "norm": norm, "num_classes": shape[1], "image_size": image_size,
    }  # fmt: skip
    return model
