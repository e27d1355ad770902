"""For every stage: confidence intervals and verdicts on arrays of numbers, free of any model."""

from jaxrmils.statistics.intervals import AccuracyChange as AccuracyChange
from jaxrmils.statistics.intervals import Interval as Interval
from jaxrmils.statistics.intervals import NonInferiority as NonInferiority
from jaxrmils.statistics.intervals import accuracy_change as accuracy_change
from jaxrmils.statistics.intervals import default_margin as default_margin
from jaxrmils.statistics.intervals import mean_interval as mean_interval
from jaxrmils.statistics.intervals import noninferiority as noninferiority
from jaxrmils.statistics.intervals import verdict_words as verdict_words
