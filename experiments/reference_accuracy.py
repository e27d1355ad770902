"""Accuracy of a published checkpoint in Flax and in PyTorch, on the same labelled photos.

    pip install torch==2.13.0 efficientnet-lite-pytorch==0.1.0 pillow
    python experiments/reference_accuracy.py efficientnet_lite0 \
        --weights efficientnet_lite0.safetensors --photos heldout --labels labels.csv \
        --where split=heldout

Photos are prepared as jaxrmils does (the centre cropped, then resized to the network's size) for
both, and for PyTorch once more in torchvision's order (resized, then cropped). Environment
variables in paths are expanded.
"""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from reference_logits import expanded, loaded
from results_file import write_table

BATCH = 50
PACKAGES = ("torch", "efficientnet-lite-pytorch", "jax", "flax", "pillow")


def main() -> None:
    """Writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("network", help="a reference network that classifies images")
    parser.add_argument("--weights", type=expanded, required=True)
    parser.add_argument("--photos", type=expanded, required=True)
    parser.add_argument("--labels", type=expanded, required=True, help="CSV: file, label")
    parser.add_argument("--where", help="COLUMN=VALUE: rows of that table")
    parser.add_argument("--out", type=Path, default=Path("experiments/results/reference_accuracy"))
    args = parser.parse_args()
    row = compared(args)
    names = {
        "flax": "Flax (`jaxrmils.zoo`)",
        "torch": "PyTorch, the same pixels",
        "torch_resized_first": "PyTorch, resized to the crop's surroundings, then cropped",
    }
    lines = [
        "Versions: " + ", ".join(f"{package} {version(package)}" for package in PACKAGES) + ".",
        "",
        f"{row['network']} on {row['photos']} photos:",
        "",
        "| | top-1 | top-5 |",
        "|---|---|---|",
    ]
    for key, name in names.items():
        top1, top5 = row[key]
        lines.append(f"| {name} | {100 * top1:.1f} % | {100 * top5:.1f} % |")
    lines += [
        "",
        f"The first two agree in the class of {row['same_class']} of {row['photos']} photos; "
        f"largest difference of a logit {row['largest_difference']:.1e}.",
    ]
    write_table(args.out, [row], lines)


def compared(args: argparse.Namespace) -> dict[str, Any]:
    """Both implementations on all photos."""
    import jax

    from jaxrmils.data import load_image_folder
    from jaxrmils.zoo import load_state_dict, reference

    entry = reference(args.network)
    state_dict = load_state_dict(args.weights)
    where = dict([args.where.split("=", 1)]) if args.where else None
    size, padding = entry.input_size, entry.crop_padding
    photos = load_image_folder(
        args.photos, size=size, crop_padding=padding, labels=args.labels, where=where
    )
    labels = np.asarray(photos.targets)
    apply, variables = jax.jit(entry.module.apply), entry.from_state_dict(state_dict)
    run = torch_network(args.network, state_dict, size)
    ours, theirs, resized = [], [], []
    for images, _ in photos.batches(BATCH):
        prepared = entry.normalization(images)
        ours.append(np.asarray(apply(variables, prepared)))
        theirs.append(run(prepared))
    whole = load_image_folder(
        args.photos, size=size + padding, labels=args.labels, where=where, lazy=True
    )
    edge = padding // 2
    for images, _ in whole.batches(BATCH):
        middle = np.asarray(images)[:, edge : edge + size, edge : edge + size]
        resized.append(run(entry.normalization(middle)))
    logits = {
        "flax": np.concatenate(ours),
        "torch": np.concatenate(theirs),
        "torch_resized_first": np.concatenate(resized),
    }
    same = logits["flax"].argmax(-1) == logits["torch"].argmax(-1)
    return {
        "network": args.network,
        "photos": len(labels),
        **{name: accuracies(values, labels) for name, values in logits.items()},
        "same_class": int(same.sum()),
        "largest_difference": float(np.abs(logits["flax"] - logits["torch"]).max()),
    }


def accuracies(logits: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Shares of examples whose label has the highest logit, or one of the five highest."""
    better = (logits > np.take_along_axis(logits, labels[:, None], 1)).sum(1)
    return float((better == 0).mean()), float((better < 5).mean())


def torch_network(name: str, state_dict: dict[str, np.ndarray], size: int) -> Any:
    """The original as a function of NHWC arrays."""
    import torch

    network = loaded(name, state_dict, size)

    def run(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.tensor(np.asarray(images).transpose(0, 3, 1, 2))).numpy()

    return run


if __name__ == "__main__":
    main()
