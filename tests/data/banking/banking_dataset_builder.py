"""Texts with one of 77 classes, written by TFDS without TensorFlow."""

import tensorflow_datasets as tfds

CLASSES = [f"topic_{number}" for number in range(77)]


# Unregistered, a name means what lies in data_dir, as for data that came from elsewhere.
with tfds.core.registered.skip_registration():

    class Banking(tfds.core.GeneratorBasedBuilder):
        """Written from `rows`, pairs of a text and a class's number, as "test".

        Args:
            rows: the examples.
            names: the features of text and label.
            classes: the classes' names, or how many there are.
        """

        VERSION = tfds.core.Version("1.0.0")

        def __init__(self, *, rows, names=("text", "label"), classes=CLASSES, **kwargs):
            self.rows, self.names, self.classes = rows, names, classes
            super().__init__(**kwargs)

        def _info(self):
            known = isinstance(self.classes, int)
            kind = {"num_classes": self.classes} if known else {"names": self.classes}
            text, label = self.names
            features = {text: tfds.features.Text(), label: tfds.features.ClassLabel(**kind)}
            return self.dataset_info_from_configs(
                features=tfds.features.FeaturesDict(features), description="Questions to a bank."
            )

        def _split_generators(self, dl_manager):
            return {"test": self._generate_examples()}

        def _generate_examples(self):
            text, label = self.names
            for number, (words, chosen) in enumerate(self.rows):
                yield number, {text: words, label: chosen}
