"""Image files and checkpoints with random weights, for the task "images"."""

import numpy as np
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors.numpy import save_file

from jaxrmils.cli.defaults import base_config
from jaxrmils.zoo.importing import LEAF_NAMES

CLASSES = ("ant", "bird", "cat")


def write_images(folder, count, *, size=12, classes=CLASSES, seed=0):
    """So many PNG images of random pixels, dealt out to folders named after the classes."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        path = folder / classes[number % len(classes)] / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (size, size, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def write_checkpoint(network, path, seed=0):
    """A state dict of the network: random kernels, and norms that change nothing."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for (kind, *path_, last), leaf in flatten_dict(network.shapes()).items():
        name = ".".join((*path_, LEAF_NAMES.get((kind, last), last)))
        if last == "kernel":
            value = rng.normal(size=leaf.shape) * np.sqrt(2 / np.prod(leaf.shape[:-1]))
            value = value.transpose(value.ndim - 1, value.ndim - 2, *range(value.ndim - 2))
        else:
            value = np.full(leaf.shape, 1.0 if last in ("scale", "var") else 0.0)
        tensors[name] = np.ascontiguousarray(value, np.float32)
    save_file(tensors, path)
    return path


def image_config(name, files, weights, *, splits):
    """The config of the task, with splits of these four sizes."""
    config = base_config()
    config.task = "images"
    config.model.name, config.model.weights = name, str(weights)
    config.data.files = str(files)
    names = ("ranges", "selection", "confirmation", "test")
    config.splits.update(dict(zip(names, splits, strict=True)))
    return config
