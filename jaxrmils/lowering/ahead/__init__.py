"""Proof without the device: what a plan becomes on hardware that is not here."""

from jaxrmils.lowering.ahead.abstract_models import abstract_model as abstract_model
from jaxrmils.lowering.ahead.abstract_models import batch_shapes as batch_shapes
from jaxrmils.lowering.ahead.abstract_models import has_symmetric_grids as has_symmetric_grids
from jaxrmils.lowering.ahead.costs import BESIDE as BESIDE
from jaxrmils.lowering.ahead.costs import THIS_PLAN as THIS_PLAN
from jaxrmils.lowering.ahead.costs import Comparison as Comparison
from jaxrmils.lowering.ahead.costs import check_compiled as check_compiled
from jaxrmils.lowering.ahead.costs import check_target as check_target
from jaxrmils.lowering.ahead.costs import site_costs as site_costs
from jaxrmils.lowering.ahead.latency import estimated_latency as estimated_latency
from jaxrmils.lowering.ahead.latency import latency_table as latency_table
from jaxrmils.lowering.ahead.programs import Memory as Memory
from jaxrmils.lowering.ahead.programs import ProgramCost as ProgramCost
from jaxrmils.lowering.ahead.programs import SiteCost as SiteCost
from jaxrmils.lowering.ahead.programs import program_cost as program_cost
from jaxrmils.lowering.ahead.stablehlo import check_lowering as check_lowering
from jaxrmils.lowering.ahead.stablehlo import check_plan_lowering as check_plan_lowering
from jaxrmils.lowering.ahead.stablehlo import operand_words as operand_words
from jaxrmils.lowering.ahead.targets import Target as Target
from jaxrmils.lowering.ahead.targets import compile_for as compile_for
from jaxrmils.lowering.ahead.targets import find_target as find_target
from jaxrmils.lowering.ahead.targets import targets as targets
from jaxrmils.lowering.ahead.targets import without_devices as without_devices
