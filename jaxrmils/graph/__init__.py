"""Stage 1: find the sites of any JAX function."""

from jaxrmils.graph.adapters import from_linen as from_linen
from jaxrmils.graph.adapters import from_nnx as from_nnx
from jaxrmils.graph.builder import TraceError as TraceError
from jaxrmils.graph.interpreter import Handler as Handler
from jaxrmils.graph.interpreter import MissingLeafError as MissingLeafError
from jaxrmils.graph.interpreter import Records as Records
from jaxrmils.graph.interpreter import SiteCall as SiteCall
from jaxrmils.graph.sites import Coverage as Coverage
from jaxrmils.graph.sites import CoverageEntry as CoverageEntry
from jaxrmils.graph.sites import Loop as Loop
from jaxrmils.graph.sites import Operand as Operand
from jaxrmils.graph.sites import Site as Site
from jaxrmils.graph.sites import Weight as Weight
from jaxrmils.graph.sites import WeightUse as WeightUse
from jaxrmils.graph.table import ActivationRow as ActivationRow
from jaxrmils.graph.table import Format as Format
from jaxrmils.graph.table import LayerRow as LayerRow
from jaxrmils.graph.table import ModelTable as ModelTable
from jaxrmils.graph.table import group_axis as group_axis
from jaxrmils.graph.table import tabulate as tabulate
from jaxrmils.graph.trace import SHORTCUTS as SHORTCUTS
from jaxrmils.graph.trace import Graph as Graph
from jaxrmils.graph.trace import Shortcuts as Shortcuts
from jaxrmils.graph.trace import interpret as interpret
from jaxrmils.graph.trace import trace as trace
