"""The command line, and what its commands are made of for scripts of your own: a config file, the
task that it describes, and the task's data in batches.
"""

from jaxrmils.cli.checks import candidates_of as candidates_of
from jaxrmils.cli.checks import search_of as search_of
from jaxrmils.cli.config import ConfigError as ConfigError
from jaxrmils.cli.config import load_config as load_config
from jaxrmils.cli.defaults import base_config as base_config
from jaxrmils.cli.pipeline import batches as batches
from jaxrmils.cli.pipeline import make_task as make_task
from jaxrmils.cli.pipeline import trace_task as trace_task
from jaxrmils.cli.pipeline import with_batch_size as with_batch_size
