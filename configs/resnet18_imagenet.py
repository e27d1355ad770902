r"""ResNet-18 on ImageNet's 50,000 validation photos, as TFDS has prepared them.

Needs ImageNet-1k in TFDS's ArrayRecord format, prepared once where TensorFlow and the original
archives are at hand:

    tfds.builder("imagenet2012", data_dir=FOLDER, file_format="array_record").download_and_prepare()

pip install 'jaxrmils[data,tfds]' to read it, without TensorFlow; photos are decoded batch by batch.
And torchvision's weights resnet18-f37072fd.pth (needs PyTorch, pip install 'jaxrmils[torch]') or
the same tensors as .safetensors.

jaxrmils quantize --config configs/resnet18_imagenet.py --out runs/resnet18 \
    --config.data.data_dir=FOLDER --config.model.weights=resnet18.safetensors

Photos in folders named after the 1,000 classes, or listed in a CSV file, work as well:
--config.data.name= --config.data.files=FOLDER --config.data.labels=FILE.csv
"""

from jaxrmils.cli.defaults import base_config


def get_config():
    """The config; every field can be overridden from the command line."""
    config = base_config()
    config.task = "images"
    config.model.name = "resnet18"
    config.data.name = "imagenet2012"
    config.data.split = "validation"
    config.splits.ranges = 500
    config.splits.selection = 2_000
    config.splits.confirmation = 5_000
    config.splits.test = 10_000
    config.batch_size = 0
    config.policy.formats = ("w8a8", "w4a8")
    config.verify.margin = 0.01
    return config
