"""Digits with a sentence about each, written by TFDS without TensorFlow."""

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

WRITERS = 7


def record(number, image, label):
    """An example as it is written."""
    return {
        "image": np.round(image * 255).astype(np.uint8),
        "label": int(label),
        "text": f"number {number} shows a {label}",
        "row": np.arange(number % 3 + 1),
        "picture": Image.fromarray(np.round(image[..., 0] * 255).astype(np.uint8)),
        "about": {"writer": f"writer {number % WRITERS}", "serial": number},
    }


# Unregistered, a name means what lies in data_dir, as for data that came from elsewhere.
with tfds.core.registered.skip_registration():

    class Handwritten(tfds.core.GeneratorBasedBuilder):
        """Written from `digits`: all as "test", the first half as "train"."""

        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, *, digits, **kwargs):
            self.digits = digits
            super().__init__(**kwargs)

        def _info(self):
            features = {
                "image": tfds.features.Tensor(shape=(28, 28, 1), dtype=np.uint8),
                "picture": tfds.features.Image(shape=(28, 28, 1), encoding_format="png"),
                "label": tfds.features.ClassLabel(num_classes=10),
                "text": tfds.features.Text(),
                "row": tfds.features.Tensor(shape=(None,), dtype=np.int64),
                "about": {
                    "writer": tfds.features.Text(),
                    "serial": tfds.features.Scalar(dtype=np.int64),
                },
            }
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features), description="Digits."
            )

        def _split_generators(self, dl_manager):
            half = self.digits.take(np.arange(len(self.digits) // 2))
            return {"train": self._examples(half), "test": self._examples(self.digits)}

        def _generate_examples(self):
            raise AssertionError("_split_generators passes the examples")

        def _examples(self, digits):
            pairs = zip(digits.inputs, digits.targets, strict=True)
            for number, (image, label) in enumerate(pairs):
                yield number, record(number, image, label)
