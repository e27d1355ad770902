"""Stage 3: what quantization noise does to the loss, layer by layer."""

from jaxrmils.sensitivity.candidates import ACTIVATION_CANDIDATES as ACTIVATION_CANDIDATES
from jaxrmils.sensitivity.candidates import WEIGHT_CANDIDATES as WEIGHT_CANDIDATES
from jaxrmils.sensitivity.candidates import Candidate as Candidate
from jaxrmils.sensitivity.perturb import all_off as all_off
from jaxrmils.sensitivity.perturb import perturbed_losses as perturbed_losses
from jaxrmils.sensitivity.scores import Scores as Scores
from jaxrmils.sensitivity.scores import score as score
from jaxrmils.sensitivity.secant import Attribution as Attribution
from jaxrmils.sensitivity.secant import Formats as Formats
from jaxrmils.sensitivity.secant import path_outputs as path_outputs
from jaxrmils.sensitivity.secant import secant as secant
from jaxrmils.sensitivity.shift import shift_secants as shift_secants
from jaxrmils.sensitivity.tangent import Contributions as Contributions
from jaxrmils.sensitivity.tangent import Loss as Loss
from jaxrmils.sensitivity.tangent import ScoreError as ScoreError
from jaxrmils.sensitivity.tangent import contributions as contributions
from jaxrmils.sensitivity.tangent import weight_noise as weight_noise
