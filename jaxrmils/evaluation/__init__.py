"""Stage 6: measured against predicted, with confidence intervals, in plain words."""

from jaxrmils.evaluation.controls import Control as Control
from jaxrmils.evaluation.controls import controls as controls
from jaxrmils.evaluation.curve import CurvePoint as CurvePoint
from jaxrmils.evaluation.curve import calibration_curve as calibration_curve
from jaxrmils.evaluation.measure import code_agreement as code_agreement
from jaxrmils.evaluation.measure import measure as measure
from jaxrmils.evaluation.measure import measure_layers as measure_layers
from jaxrmils.evaluation.page import compare_page as compare_page
from jaxrmils.evaluation.page import report_page as report_page
from jaxrmils.evaluation.simulate import EvaluationError as EvaluationError
from jaxrmils.evaluation.simulate import Measured as Measured
from jaxrmils.evaluation.simulate import SimulatedModel as SimulatedModel
from jaxrmils.evaluation.spreadsheet import controls_csv as controls_csv
from jaxrmils.evaluation.spreadsheet import layers_csv as layers_csv
from jaxrmils.evaluation.tables import controls_table as controls_table
from jaxrmils.evaluation.tables import coverage_table as coverage_table
from jaxrmils.evaluation.tables import layer_table as layer_table
from jaxrmils.evaluation.tables import print_report as print_report
from jaxrmils.evaluation.tables import summary as summary
from jaxrmils.evaluation.tables import wide_console as wide_console
from jaxrmils.evaluation.temperature import Temperature as Temperature
from jaxrmils.evaluation.temperature import fit_temperature as fit_temperature
from jaxrmils.evaluation.verify import LayerReport as LayerReport
from jaxrmils.evaluation.verify import Report as Report
from jaxrmils.evaluation.verify import verify as verify
