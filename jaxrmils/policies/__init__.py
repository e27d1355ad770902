"""Stage 4: from scores to a precision plan."""

from jaxrmils.policies.assign import NORMALIZATIONS as NORMALIZATIONS
from jaxrmils.policies.assign import VARIANTS as VARIANTS
from jaxrmils.policies.assign import Decision as Decision
from jaxrmils.policies.assign import PlanTree as PlanTree
from jaxrmils.policies.assign import assign as assign
from jaxrmils.policies.assign import plan_from_tree as plan_from_tree
from jaxrmils.policies.attribution import PlanAttribution as PlanAttribution
from jaxrmils.policies.attribution import attribute as attribute
from jaxrmils.policies.attribution import formats_of as formats_of
from jaxrmils.policies.constraints import Constraints as Constraints
from jaxrmils.policies.formats import FORMATS as FORMATS
from jaxrmils.policies.formats import PlanError as PlanError
from jaxrmils.policies.formats import parse_format as parse_format
from jaxrmils.policies.lossless import Lossless as Lossless
from jaxrmils.policies.lossless import LosslessStep as LosslessStep
from jaxrmils.policies.lossless import lossless as lossless
from jaxrmils.policies.lossless import steps_of as steps_of
from jaxrmils.policies.plan import LayerPlan as LayerPlan
from jaxrmils.policies.plan import Plan as Plan
from jaxrmils.policies.plan import check_plan as check_plan
from jaxrmils.policies.plan import predict as predict
from jaxrmils.policies.plan import predict_second_order as predict_second_order
from jaxrmils.policies.plan import roundings_by_site as roundings_by_site
from jaxrmils.policies.rmils import PROBES as PROBES
from jaxrmils.policies.rmils import mu_values as mu_values
from jaxrmils.policies.rmils import rmils as rmils
from jaxrmils.policies.sequence import Search as Search
from jaxrmils.policies.sequence import plan_sequence as plan_sequence
from jaxrmils.policies.simulation import Simulation as Simulation
from jaxrmils.policies.simulation import Simulator as Simulator
from jaxrmils.policies.simulation import plan_switches as plan_switches
from jaxrmils.policies.uniform import uniform as uniform

POLICIES = ("lossless", "rmils", "uniform")
