"""For every stage: confidence intervals and verdicts on arrays of numbers, free of any model."""

from jaxrmils.statistics.accuracy import AccuracyChange as AccuracyChange
from jaxrmils.statistics.accuracy import accuracy_change as accuracy_change
from jaxrmils.statistics.clusters import group_numbers as group_numbers
from jaxrmils.statistics.clusters import pseudo_values as pseudo_values
from jaxrmils.statistics.errors import StatisticsError as StatisticsError
from jaxrmils.statistics.intervals import METHODS as METHODS
from jaxrmils.statistics.intervals import Interval as Interval
from jaxrmils.statistics.intervals import Method as Method
from jaxrmils.statistics.intervals import mean_interval as mean_interval
from jaxrmils.statistics.intervals import t_interval as t_interval
from jaxrmils.statistics.metrics import MetricChange as MetricChange
from jaxrmils.statistics.metrics import checked_metric as checked_metric
from jaxrmils.statistics.metrics import metric_change as metric_change
from jaxrmils.statistics.verdicts import NonInferiority as NonInferiority
from jaxrmils.statistics.verdicts import default_margin as default_margin
from jaxrmils.statistics.verdicts import noninferiority as noninferiority
from jaxrmils.statistics.verdicts import verdict_words as verdict_words
