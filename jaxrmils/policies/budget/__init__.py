"""Plans within a budget: an exact integer programme on a table of costs."""

from jaxrmils.policies.budget.limits import CAPABILITIES as CAPABILITIES
from jaxrmils.policies.budget.limits import LatencyTable as LatencyTable
from jaxrmils.policies.budget.limits import Limits as Limits
from jaxrmils.policies.budget.policy import Problem as Problem
from jaxrmils.policies.budget.policy import Settings as Settings
from jaxrmils.policies.budget.policy import budget as budget
from jaxrmils.policies.budget.policy import problem as problem
from jaxrmils.policies.budget.resources import usage as usage
from jaxrmils.policies.budget.solve import InfeasibleBudgetError as InfeasibleBudgetError
from jaxrmils.policies.budget.solve import Reach as Reach
from jaxrmils.policies.budget.solve import solve as solve
