"""Stage 5: from a plan to a model that runs in integers."""

from jaxrmils.lowering.hlo import EXACT_FLOAT as EXACT_FLOAT
from jaxrmils.lowering.hlo import WIDENED as WIDENED
from jaxrmils.lowering.hlo import assert_integer as assert_integer
from jaxrmils.lowering.hlo import check_integer_sites as check_integer_sites
from jaxrmils.lowering.hlo import compiled_integer_sites as compiled_integer_sites
from jaxrmils.lowering.hlo import integer_sites as integer_sites
from jaxrmils.lowering.integer_dot import BACKENDS as BACKENDS
from jaxrmils.lowering.integer_dot import Backend as Backend
from jaxrmils.lowering.quantized_model import QuantizedModel as QuantizedModel
from jaxrmils.lowering.quantized_model import QuantizedParams as QuantizedParams
from jaxrmils.lowering.quantized_model import QuantizedWeight as QuantizedWeight
from jaxrmils.lowering.quantized_model import default_backend as default_backend
from jaxrmils.lowering.quantized_model import quantize as quantize
from jaxrmils.lowering.sites import LoweringError as LoweringError
