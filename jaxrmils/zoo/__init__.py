"""Reference Flax models and the few lines that train them."""

from jaxrmils.zoo.bert import BERT_BASE as BERT_BASE
from jaxrmils.zoo.bert import MINILM_L6 as MINILM_L6
from jaxrmils.zoo.bert import BertConfig as BertConfig
from jaxrmils.zoo.bert import BertEncoder as BertEncoder
from jaxrmils.zoo.bert import BertForClassification as BertForClassification
from jaxrmils.zoo.bert import BertForEmbedding as BertForEmbedding
from jaxrmils.zoo.bert import BertForSpans as BertForSpans
from jaxrmils.zoo.bert import import_bert as import_bert
from jaxrmils.zoo.bert import span_cross_entropy as span_cross_entropy
from jaxrmils.zoo.cifar_resnet import CifarResNet as CifarResNet
from jaxrmils.zoo.efficientnet_lite import EfficientNetLite as EfficientNetLite
from jaxrmils.zoo.importing import WeightError as WeightError
from jaxrmils.zoo.importing import import_params as import_params
from jaxrmils.zoo.importing import load_state_dict as load_state_dict
from jaxrmils.zoo.mnist_cnn import MnistCNN as MnistCNN
from jaxrmils.zoo.mnist_task import mnist_cnn_task as mnist_cnn_task
from jaxrmils.zoo.mobilenet_v2 import MobileNetV2 as MobileNetV2
from jaxrmils.zoo.reference_model import Reference as Reference
from jaxrmils.zoo.registry import reference as reference
from jaxrmils.zoo.registry import reference_names as reference_names
from jaxrmils.zoo.resnet import ResNet as ResNet
from jaxrmils.zoo.training import cross_entropy as cross_entropy
from jaxrmils.zoo.training import evaluate_classifier as evaluate_classifier
from jaxrmils.zoo.training import train_classifier as train_classifier
