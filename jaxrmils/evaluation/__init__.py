"""Stage 6: measured against predicted, with confidence intervals, in plain words."""

from jaxrmils.evaluation.measure import EvaluationError as EvaluationError
from jaxrmils.evaluation.measure import Measured as Measured
from jaxrmils.evaluation.measure import code_agreement as code_agreement
from jaxrmils.evaluation.measure import measure as measure
from jaxrmils.evaluation.measure import measure_layers as measure_layers
from jaxrmils.evaluation.tables import coverage_table as coverage_table
from jaxrmils.evaluation.tables import layer_table as layer_table
from jaxrmils.evaluation.tables import print_report as print_report
from jaxrmils.evaluation.tables import summary as summary
from jaxrmils.evaluation.tables import wide_console as wide_console
from jaxrmils.evaluation.verify import LayerReport as LayerReport
from jaxrmils.evaluation.verify import Report as Report
from jaxrmils.evaluation.verify import verify as verify
