r"""ResNet-20 on CIFAR-10, in images that the network has not seen.

Needs CIFAR-10's 10,000 test images as files: a folder or a zip archive in which every image lies
in a folder named after its class (airplane, automobile, ...). And a checkpoint with the names of
https://github.com/akamaster/pytorch_resnet_cifar10, such as its own resnet20-12fca82f.th (reading
.th files needs PyTorch, pip install 'jaxrmils[data,torch]'; .safetensors files do not).

jaxrmils inspect --config configs/cifar_resnet20.py \
    --config.data.files=cifar10/test.zip --config.model.weights=resnet20.safetensors
jaxrmils quantize --config configs/cifar_resnet20.py --out runs/cifar_resnet20 \
    --config.data.files=cifar10/test.zip --config.model.weights=resnet20.safetensors
"""

from jaxrmils.cli.defaults import base_config


def get_config():
    """The config; every field can be overridden from the command line."""
    config = base_config()
    config.task = "images"
    config.model.name = "cifar_resnet20"
    config.splits.ranges = 250
    config.splits.selection = 1_500
    config.splits.confirmation = 5_000
    config.splits.test = 3_250
    config.batch_size = 0
    config.policy.formats = ("w8a8", "w4a8")
    config.verify.margin = 0.01
    return config
