"""Data sets, their four disjoint splits, and one that needs no download."""

from jaxrmils.data.dataset import DataError as DataError
from jaxrmils.data.dataset import Dataset as Dataset
from jaxrmils.data.dataset import check_labels as check_labels
from jaxrmils.data.images import Normalization as Normalization
from jaxrmils.data.images import load_image_folder as load_image_folder
from jaxrmils.data.images import resize_and_crop as resize_and_crop
from jaxrmils.data.joining import join as join
from jaxrmils.data.mnist import load_mnist5k as load_mnist5k
from jaxrmils.data.mnist import shifted_copies as shifted_copies
from jaxrmils.data.rows import Batches as Batches
from jaxrmils.data.rows import LazyRows as LazyRows
from jaxrmils.data.splits import SPLIT_NAMES as SPLIT_NAMES
from jaxrmils.data.splits import Splits as Splits
from jaxrmils.data.splits import check_disjoint as check_disjoint
from jaxrmils.data.splits import make_splits as make_splits
from jaxrmils.data.squad import Question as Question
from jaxrmils.data.squad import Squad as Squad
from jaxrmils.data.squad import load_squad as load_squad
from jaxrmils.data.squad_answers import SquadMetrics as SquadMetrics
from jaxrmils.data.squad_answers import squad_metrics as squad_metrics
from jaxrmils.data.squad_answers import squad_predictions as squad_predictions
from jaxrmils.data.task import Task as Task
from jaxrmils.data.text import encode_texts as encode_texts
from jaxrmils.data.text import load_text_csv as load_text_csv
from jaxrmils.data.text import load_tokenizer as load_tokenizer
from jaxrmils.data.tfds_source import load_tfds as load_tfds
