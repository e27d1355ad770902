"""Stage 6: measured against predicted, with confidence intervals, in plain words."""

from jaxrmils.evaluation.measure import EvaluationError as EvaluationError
from jaxrmils.evaluation.measure import Measured as Measured
from jaxrmils.evaluation.measure import code_agreement as code_agreement
from jaxrmils.evaluation.measure import measure as measure
from jaxrmils.evaluation.measure import measure_layers as measure_layers
from jaxrmils.evaluation.statistics import AccuracyChange as AccuracyChange
from jaxrmils.evaluation.statistics import Interval as Interval
from jaxrmils.evaluation.statistics import NonInferiority as NonInferiority
from jaxrmils.evaluation.statistics import accuracy_change as accuracy_change
from jaxrmils.evaluation.statistics import default_margin as default_margin
from jaxrmils.evaluation.statistics import mean_interval as mean_interval
from jaxrmils.evaluation.statistics import noninferiority as noninferiority
from jaxrmils.evaluation.statistics import verdict_words as verdict_words
from jaxrmils.evaluation.tables import coverage_table as coverage_table
from jaxrmils.evaluation.tables import layer_table as layer_table
from jaxrmils.evaluation.tables import print_report as print_report
from jaxrmils.evaluation.tables import summary as summary
from jaxrmils.evaluation.tables import wide_console as wide_console
from jaxrmils.evaluation.verify import LayerReport as LayerReport
from jaxrmils.evaluation.verify import Report as Report
from jaxrmils.evaluation.verify import verify as verify
