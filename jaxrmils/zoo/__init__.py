"""Reference Flax models and the few lines that train them."""

from jaxrmils.zoo.mnist_cnn import MnistCNN as MnistCNN
from jaxrmils.zoo.mnist_task import mnist_cnn_task as mnist_cnn_task
from jaxrmils.zoo.training import cross_entropy as cross_entropy
from jaxrmils.zoo.training import evaluate_classifier as evaluate_classifier
from jaxrmils.zoo.training import train_classifier as train_classifier
