"""Data sets in memory, their four disjoint splits, and one that needs no download."""

from jaxrmils.data.dataset import DataError as DataError
from jaxrmils.data.dataset import Dataset as Dataset
from jaxrmils.data.dataset import check_labels as check_labels
from jaxrmils.data.mnist import load_mnist5k as load_mnist5k
from jaxrmils.data.mnist import shifted_copies as shifted_copies
from jaxrmils.data.splits import SPLIT_NAMES as SPLIT_NAMES
from jaxrmils.data.splits import Splits as Splits
from jaxrmils.data.splits import check_disjoint as check_disjoint
from jaxrmils.data.splits import make_splits as make_splits
from jaxrmils.data.task import Task as Task
