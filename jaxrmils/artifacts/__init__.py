"""Stage 7: plans, ranges, scores and quantized models on disk."""

from jaxrmils.artifacts.costs_file import load_costs as load_costs
from jaxrmils.artifacts.costs_file import save_costs as save_costs
from jaxrmils.artifacts.description import describe as describe
from jaxrmils.artifacts.errors import ArtifactError as ArtifactError
from jaxrmils.artifacts.folder import versions as versions
from jaxrmils.artifacts.latency_file import load_latency as load_latency
from jaxrmils.artifacts.latency_file import save_latency as save_latency
from jaxrmils.artifacts.model_file import load_model as load_model
from jaxrmils.artifacts.model_file import save_model as save_model
from jaxrmils.artifacts.moments_file import load_moments as load_moments
from jaxrmils.artifacts.moments_file import save_moments as save_moments
from jaxrmils.artifacts.plan_file import load_plan as load_plan
from jaxrmils.artifacts.plan_file import save_plan as save_plan
from jaxrmils.artifacts.ranges_file import load_ranges as load_ranges
from jaxrmils.artifacts.ranges_file import save_ranges as save_ranges
from jaxrmils.artifacts.record_file import load_record as load_record
from jaxrmils.artifacts.record_file import save_record as save_record
from jaxrmils.artifacts.report_files import load_run as load_run
from jaxrmils.artifacts.report_files import write_page as write_page
from jaxrmils.artifacts.report_files import write_spreadsheets as write_spreadsheets
from jaxrmils.artifacts.scores_file import load_scores as load_scores
from jaxrmils.artifacts.scores_file import save_scores as save_scores
