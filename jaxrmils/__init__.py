"""jaxrmils: mixed-precision post-training quantization for JAX and Flax.

The stages, in the order in which data flows: `trace`, `calibrate`, `score`, a policy (`lossless`,
`rmils`, `uniform`), `quantize`, `verify`, `save_model`. Where a plan's loss change comes from:
`attribute`. For your own jitted step: `contributions` and `assign`.
"""

from jaxrmils.artifacts import load_latency as load_latency
from jaxrmils.artifacts import load_model as load_model
from jaxrmils.artifacts import load_plan as load_plan
from jaxrmils.artifacts import load_ranges as load_ranges
from jaxrmils.artifacts import load_scores as load_scores
from jaxrmils.artifacts import save_latency as save_latency
from jaxrmils.artifacts import save_model as save_model
from jaxrmils.artifacts import save_plan as save_plan
from jaxrmils.artifacts import save_ranges as save_ranges
from jaxrmils.artifacts import save_scores as save_scores
from jaxrmils.artifacts import write_page as write_page
from jaxrmils.artifacts.export_file import ExportedModel as ExportedModel
from jaxrmils.artifacts.export_file import export_model as export_model
from jaxrmils.artifacts.export_file import load_exported as load_exported
from jaxrmils.evaluation import Report as Report
from jaxrmils.evaluation import calibration_curve as calibration_curve
from jaxrmils.evaluation import controls as controls
from jaxrmils.evaluation import print_report as print_report
from jaxrmils.evaluation import verify as verify
from jaxrmils.graph import Graph as Graph
from jaxrmils.graph import from_linen as from_linen
from jaxrmils.graph import from_nnx as from_nnx
from jaxrmils.graph import tabulate as tabulate
from jaxrmils.graph import trace as trace
from jaxrmils.lowering import QuantizedModel as QuantizedModel
from jaxrmils.lowering import quantize as quantize
from jaxrmils.lowering.modules import QuantizedVariable as QuantizedVariable
from jaxrmils.lowering.modules import as_linen as as_linen
from jaxrmils.lowering.modules import as_nnx as as_nnx
from jaxrmils.lowering.profile import Profile as Profile
from jaxrmils.lowering.profile import profile as profile
from jaxrmils.numerics import Ranges as Ranges
from jaxrmils.numerics import calibrate as calibrate
from jaxrmils.policies import MEASURED_COSTS as MEASURED_COSTS
from jaxrmils.policies import Costs as Costs
from jaxrmils.policies import InfeasibleBudgetError as InfeasibleBudgetError
from jaxrmils.policies import LatencyTable as LatencyTable
from jaxrmils.policies import LayerPlan as LayerPlan
from jaxrmils.policies import Limits as Limits
from jaxrmils.policies import Lossless as Lossless
from jaxrmils.policies import MeasuredPoint as MeasuredPoint
from jaxrmils.policies import Plan as Plan
from jaxrmils.policies import Refined as Refined
from jaxrmils.policies import Search as Search
from jaxrmils.policies import Simulator as Simulator
from jaxrmils.policies import assign as assign
from jaxrmils.policies import attribute as attribute
from jaxrmils.policies import budget as budget
from jaxrmils.policies import lossless as lossless
from jaxrmils.policies import mu_values as mu_values
from jaxrmils.policies import pareto as pareto
from jaxrmils.policies import plan_from_tree as plan_from_tree
from jaxrmils.policies import predict as predict
from jaxrmils.policies import recommend as recommend
from jaxrmils.policies import refined as refined
from jaxrmils.policies import rmils as rmils
from jaxrmils.policies import uniform as uniform
from jaxrmils.sensitivity import Contributions as Contributions
from jaxrmils.sensitivity import ScoreMoments as ScoreMoments
from jaxrmils.sensitivity import Scores as Scores
from jaxrmils.sensitivity import contributions as contributions
from jaxrmils.sensitivity import curvature as curvature
from jaxrmils.sensitivity import label_free as label_free
from jaxrmils.sensitivity import mean_weight as mean_weight
from jaxrmils.sensitivity import per_sequence as per_sequence
from jaxrmils.sensitivity import score as score
from jaxrmils.sensitivity import score_moments as score_moments
from jaxrmils.sensitivity import token_cross_entropy as token_cross_entropy
from jaxrmils.sensitivity import with_float_outputs as with_float_outputs
from jaxrmils.version import __version__ as __version__
