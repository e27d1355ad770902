"""RMILS on a small CNN and MNIST's 5,000 embedded images.

jaxrmils quantize --config configs/mnist_cnn.py --out runs/mnist
jaxrmils quantize --config configs/mnist_cnn.py --config.policy.mu=0.4 --out runs/mnist_mu04
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
